import pytest
import torch
from parity import Fixture

import attnlib
from attnlib.nn.modulation.gaussian_adaptive_attention import GaussianBlock

SLUG = "gaussian-adaptive-attention"
FIXTURE = Fixture(SLUG)


@pytest.mark.parametrize("case", [case for case in FIXTURE.config if case != "block"])
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


def test_block_equals_the_authors():
    block = GaussianBlock(**FIXTURE.config["block"])
    block.load_state_dict(attnlib.convert_state_dict(SLUG, FIXTURE.under("block/sd")))
    FIXTURE.holds("block", block, lambda m, xs: m(xs["x"]))


def build(**settings):
    m = attnlib.create(SLUG, **{"dim": 12, "num_heads": 3, **settings})
    torch.nn.init.normal_(m.offset, std=0.5)
    return m.double()


def naive(m, x):
    """The products as written, over the last axis."""
    size = x.shape[-1] // m.num_heads
    parts = list(x.split(size, -1))
    parts = [*parts[: m.num_heads - 1], torch.cat(parts[m.num_heads - 1 :], -1)]
    out = []
    for part, offsets, widths in zip(parts, m.offset, m.width, strict=True):
        scale = (part.var(-1, keepdim=True) + m.eps).sqrt()
        w = torch.ones_like(part)
        for d, c in zip(offsets, widths, strict=True):
            y = (part - part.mean(-1, keepdim=True) - d) / scale
            w = w * torch.exp(-y.square() / (2 * c.square())) / (2 * torch.pi * c.square()).sqrt()
        out.append(w / w.sum(-1, keepdim=True))
    return torch.cat(out, -1)


@pytest.mark.parametrize("dim, heads", [(12, 3), (13, 3), (7, 1)])
def test_gate_is_the_normalised_product(dim, heads):
    m = build(dim=dim, num_heads=heads)
    x = torch.randn(2, 4, dim, dtype=torch.double)
    torch.testing.assert_close(m.gate(x), naive(m, x), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(m(x), x * naive(m, x), atol=1e-12, rtol=1e-9)
    with torch.no_grad():
        m.width.mul_(0.01)
    assert not naive(m, x).isfinite().all(), "as written, the product underflows here"
    torch.testing.assert_close(m.gate(x).sum(-1), torch.full((2, 4), float(heads), dtype=torch.double))


def test_weights_sum_to_one():
    x = torch.randn(2, 10, 12, dtype=torch.double)
    one = torch.ones(1, dtype=torch.double)
    torch.testing.assert_close(build().gate(x).unflatten(-1, (3, 4)).sum(-1), one.expand(2, 10, 3))
    sums = torch.stack([p.sum(1) for p in build(axis="tokens").gate(x).split([3, 3, 4], 1)], 1)
    torch.testing.assert_close(sums, one.expand(2, 3, 12))


def test_shift_and_scale():
    m, x = build(eps=0.0), torch.randn(2, 4, 12, dtype=torch.double)
    torch.testing.assert_close(m.gate(x + 3.0), m.gate(x))
    assert not torch.allclose(m.gate(2 * x), m.gate(x)), "a nonzero offset has a scale"
    torch.nn.init.zeros_(m.offset)
    torch.testing.assert_close(m.gate(2 * x), m.gate(x))


def test_wide_gaussians_are_uniform():
    m, x = build(num_heads=1, residual=True), torch.randn(2, 4, 12, dtype=torch.double)
    torch.nn.init.constant_(m.width, 1e8)
    torch.testing.assert_close(m.gate(x), torch.full_like(x, 1 / 12))
    torch.testing.assert_close(m(x), x * (1 + 1 / 12))


def test_nearest_the_mean_weighs_most():
    m, x = build(num_heads=1, num_gaussians=1), torch.randn(8, 4, 12, dtype=torch.double)
    torch.nn.init.zeros_(m.offset)
    nearest = (x - x.mean(-1, keepdim=True)).abs().argmin(-1)
    assert torch.equal(m.gate(x).argmax(-1), nearest)


def test_features_of_a_chunk_may_be_permuted():
    m, x = build(), torch.randn(2, 4, 12, dtype=torch.double)
    order = torch.cat([torch.randperm(4) + start for start in (0, 4, 8)])
    torch.testing.assert_close(m(x[..., order]), m(x)[..., order])
    across = torch.arange(12).roll(2)
    assert not torch.allclose(m(x[..., across]), m(x)[..., across])


def test_several_gaussians_are_one():
    m, x = build(num_gaussians=4), torch.randn(2, 4, 12, dtype=torch.double)
    one = build(num_gaussians=1)
    precision, centre = m.gaussians()
    with torch.no_grad():
        one.offset.copy_(centre[:, None])
        one.width.copy_((0.5 / precision).sqrt()[:, None])
    torch.testing.assert_close(one(x), m(x))


@pytest.mark.parametrize("heads", [1, 2])
def test_absent_tokens_leave_the_statistics(heads):
    m = build(num_heads=heads, axis="tokens")
    x = torch.randn(1, 9, 12, dtype=torch.double)
    valid = torch.tensor([[True, False, True, True, False, True, True, False, True]])
    torch.testing.assert_close(m(x, valid=valid)[valid], m(x[:, valid[0]])[0])
    alone = torch.zeros(1, 9, dtype=torch.bool)
    alone[0, 4] = True
    torch.testing.assert_close(m(x, valid=alone)[0, 4], x[0, 4])


def test_importance_factor():
    m, x = build(), torch.randn(3, 5, 12, dtype=torch.double)
    factor = m.importance_factor(x)
    mean = m.gate(x).mean((0, 1))
    assert factor.shape == (12,) and float(factor.min()) == 0 and float(factor.max()) == 1
    assert torch.equal(factor.argsort(), mean.argsort())
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[:, 3:] = False
    torch.testing.assert_close(m.importance_factor(x, valid), m.importance_factor(x[:, :3]))
    assert not m.importance_factor(torch.ones_like(x)).any()


def test_parameter_count():
    assert sum(p.numel() for p in GaussianBlock(16, (4, 4, 4), (5, 5, 5)).parameters()) == 3 * 4 * 5 * 2


def test_bad_settings():
    with pytest.raises(ValueError, match="axis="):
        attnlib.create(SLUG, dim=8, axis="rows")
    with pytest.raises(ValueError, match="num_heads=5 leaves chunks"):
        attnlib.create(SLUG, dim=8, num_heads=5)
    with pytest.raises(ValueError, match="num_gaussians"):
        attnlib.create(SLUG, dim=8, num_gaussians=0)
    with pytest.raises(ValueError, match="at least 8"):
        attnlib.create(SLUG, dim=8, axis="tokens")(torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match="as many layers"):
        GaussianBlock(8, (2, 2), (1,))
    with pytest.raises(ValueError, match="does not have: weight"):
        attnlib.convert_state_dict(SLUG, {"weight": torch.zeros(1)})


def test_padding_values_pass_and_need_the_authors_arithmetic():
    with pytest.raises(ValueError, match=r"padding_value=0\.0 needs compat='authors'"):
        attnlib.create(SLUG, dim=8, num_heads=2, padding_value=0.0)
    m = attnlib.create(SLUG, dim=8, num_heads=2, compat="authors", padding_value=-3.0)
    x = torch.randn(1, 4, 8)
    x[0, 1] = -3.0
    assert torch.equal(m(x)[0, 1], x[0, 1])


def test_an_axis_of_a_grid_weighs_every_line_alone():
    m = build(axis=1, num_heads=2)
    x = torch.randn(2, 5, 3, 12, dtype=torch.double)
    lines = build(axis="tokens", num_heads=2)
    lines.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x)[:, :, 1], lines(x[:, :, 1]))
    assert attnlib.create(SLUG, dim=8, axis=2).traits.grid_ranks == {1, 2, 3}  # features of a sequence, or columns
    assert attnlib.create(SLUG, dim=8, axis=3).traits.grid_ranks == {2, 3}


@pytest.mark.parametrize("axis", [1, 2, -2, "tokens", "batch"])
def test_absent_tokens_leave_the_lines(axis):
    m, x = build(axis=axis, num_heads=1), torch.randn(4, 4, 5, 12, dtype=torch.double)
    valid = torch.rand(4, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    y = m(x, valid=valid)
    torch.testing.assert_close(m(torch.where(valid[..., None], x, 7.0), valid=valid), y)
    along = (1, 2) if axis == "tokens" else {"batch": 0, -2: 2}.get(axis, axis)
    some = valid.any(1).any(1)[:, None] if axis == "tokens" else valid.any(along)[..., None]
    sums = m.gate(x, valid).sum(along)
    torch.testing.assert_close(sums, some.expand_as(sums).double())


def test_over_the_batch_samples_meet():
    m, x = build(axis="batch", num_heads=1), torch.randn(4, 3, 12, dtype=torch.double)
    assert not m.traits.batch_independent
    torch.testing.assert_close(m.gate(x).sum(0), torch.ones(3, 12, dtype=torch.double))
    with pytest.raises(ValueError, match="axis='batch' every head needs at least two"):
        m(x[:1])
