"""CLEAR on a tiny FLUX: text length and sides come from the call, nothing is left behind."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import FluxTransformer2DModel  # noqa: E402

import attnlib  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.nn.local.clear import clear_attention  # noqa: E402
from attnlib.steer.diffusion.clear import Clear  # noqa: E402


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def inputs(height, width, text):
    torch.manual_seed(1)
    n = height * width
    ids = torch.zeros(n, 3)
    ids[:, 1], ids[:, 2] = torch.arange(n) // width, torch.arange(n) % width
    return {
        "hidden_states": torch.randn(2, n, 4), "encoder_hidden_states": torch.randn(2, text, 12),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([0.5, 0.5]), "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }  # fmt: skip


class Watch(Intervention):
    def __init__(self):
        self.seen = []

    def around_attention(self, site, q, k, v, call):
        out = call(q, k, v)
        self.seen.append((site.q_layout, q, k, v, out))
        return out


@pytest.mark.parametrize(("height", "width", "text"), [(3, 4, 5), (5, 4, 2)])
def test_every_joint_layer_reads_circles(flux, height, width, text):
    given = inputs(height, width, text)
    before = flux(**given).sample
    watch, clear = Watch(), Clear(window_size=2, down_factor=2, num_layers=2, proportional=True)
    with attnlib.attach(flux, watch, clear):
        after = flux(**given).sample
    assert len(watch.seen) == 2 and not torch.allclose(after, before)
    for i, (layout, q, k, v, out) in enumerate(watch.seen):
        assert layout.size("text") == text and layout.grid("image") == (height, width)
        weight = clear.spatial_weights[i]
        torch.testing.assert_close(out, clear_attention(q, k, v, layout, 2, weight, proportional=True))
    assert torch.equal(flux(**given).sample, before)


def test_wide_circles_change_nothing_and_weights_learn(flux):
    given = inputs(3, 4, 5)
    before = flux(**given).sample
    with attnlib.attach(flux, Clear(window_size=9)):
        torch.testing.assert_close(flux(**given).sample, before, rtol=1e-4, atol=1e-5)
    clear = Clear(window_size=1, down_factor=4, num_layers=2)
    with attnlib.attach(flux, clear):
        flux(**given).sample.square().sum().backward()
    assert all(w.grad is not None and bool(w.grad.any()) for w in clear.spatial_weights)
    names = [n for n, m in flux.named_modules() if hasattr(m, "to_q")]
    theirs = {f"{n}.processor.spatial_weight": torch.rand(1, 1, 1, 4, 1, 4, 1) for n in names}
    clear.load_authors(theirs, names)
    assert torch.equal(clear.spatial_weights[1].data, theirs[f"{names[1]}.processor.spatial_weight"].reshape(4, 4))
    flux.zero_grad()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="needs num_layers"):
        Clear(down_factor=4)
    with pytest.raises(ValueError, match="window_size"):
        Clear(window_size=-1)
    with pytest.raises(ValueError, match="has no 'attn.processor.spatial_weight'"):
        Clear(down_factor=2, num_layers=1).load_authors({}, ["attn"])
