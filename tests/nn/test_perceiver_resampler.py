"""Perceiver resampler: the authors' class with every option, media apart, and tokens that do not exist."""

import pytest
import torch
from parity import Fixture

from attnlib.nn.multimodal.perceiver_resampler import PerceiverResampler

FIXTURE = Fixture("aki-mma-resampler")


@pytest.mark.parametrize("case", ["full", "plain"])
def test_equals_the_authors(case):
    m = PerceiverResampler(**FIXTURE.config[case])
    m.load_state_dict(PerceiverResampler.convert_state_dict(FIXTURE.under(f"{case}/sd")))
    x = FIXTURE.tensors[f"{case}/x/x"].clone().requires_grad_()
    y = m(x)
    torch.testing.assert_close(y, FIXTURE.tensors[f"{case}/y"], rtol=1e-5, atol=1e-5)
    (y * FIXTURE.tensors[f"{case}/g"]).sum().backward()
    torch.testing.assert_close(x.grad, FIXTURE.tensors[f"{case}/dx/x"], rtol=1e-5, atol=2e-5)
    theirs = PerceiverResampler.convert_state_dict(FIXTURE.under(f"{case}/dw"))
    assert set(theirs) == {name for name, _ in m.named_parameters()}
    for name, expected in theirs.items():
        torch.testing.assert_close(m.get_parameter(name).grad, expected, rtol=1e-5, atol=2e-5)


def test_ranks_and_media_read_by_themselves():
    m = PerceiverResampler(8, 12, depth=2, num_heads=2, head_dim=4, num_latents=5)
    x = torch.randn(2, 3, 4, 6, 8)
    y = m(x)
    assert y.shape == (2, 3, 5, 12)
    torch.testing.assert_close(m(x[:, 1]), m(x[:, 1, :, None]).squeeze(1))
    torch.testing.assert_close(m(x[:, 1].flatten(1, 2)), y[:, 1])
    other = x.clone()
    other[:, 2] += 1
    assert torch.equal(m(other)[:, :2], y[:, :2])


def test_tokens_that_do_not_exist_hold_anything():
    torch.manual_seed(0)
    m = PerceiverResampler(8, depth=2, num_heads=2, head_dim=4, num_latents=3, max_frames=4)
    x = torch.randn(2, 1, 4, 5, 8)
    valid = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    valid[0, :, 2:], valid[1, ..., 3:] = False, False
    y = m(x.masked_fill(~valid[..., None], float("nan")), valid)
    torch.testing.assert_close(y[:1], m(x[:1, :, :2]))
    torch.testing.assert_close(y[1:], m(x[1:, ..., :3, :]))
    assert bool(m(x, torch.zeros_like(valid)).isfinite().all())


def test_initial_values_are_those_of_the_authors_class():
    m = PerceiverResampler(64, 32, depth=1, num_heads=4, head_dim=16, num_latents=100, max_media=50, max_frames=50)
    for name in ("latents", "media", "frames"):
        assert abs(float(m.get_parameter(name).detach().std()) - 1) < 0.1
    for name, p in m.named_parameters():
        if p.dim() == 2 and name not in ("latents", "media", "frames"):
            assert float(p.detach().abs().max()) <= p.shape[1] ** -0.5
            assert abs(float(p.detach().std()) / (p.shape[1] ** -0.5 / 3**0.5) - 1) < 0.1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PerceiverResampler(8, num_latents=0), "num_latents"),
        (lambda: PerceiverResampler(8, depth=0), "depth"),
        (lambda: PerceiverResampler(8, max_media=0), "max_media"),
        (lambda: PerceiverResampler(8, depth=1)(torch.randn(2, 8)), "x"),
        (lambda: PerceiverResampler(8, depth=1)(torch.randn(2, 3, 7)), "dim"),
        (lambda: PerceiverResampler(8, depth=1, max_frames=2)(torch.randn(1, 1, 3, 4, 8)), "max_frames=2"),
        (lambda: PerceiverResampler(8, depth=1, max_media=2)(torch.randn(1, 3, 4, 8)), "max_media=2"),
        (lambda: PerceiverResampler.convert_state_dict({"latents": torch.zeros(2, 3), "x": torch.zeros(1)}), "x"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
