"""Gates: each against its equation in float64, and what its card asks of it."""

import math

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.nn.gates.base import Gate

F64 = torch.float64


def build(name, **settings):
    torch.manual_seed(0)
    return attnlib.create(name, **settings).double().eval()


def image(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def count(module):
    return sum(p.numel() for p in module.parameters())


GATES = {
    "squeeze-excite": dict(dim=16, reduction=4),
    "eca": dict(dim=16),
    "polarized-self-attention": dict(dim=16),
    "ela-efficient-local-attention": dict(dim=16),
    "ulsam": dict(dim=16),
}


@pytest.mark.parametrize("name", GATES)
def test_the_output_is_the_map_times_the_gate(name):
    module, x = build(name, **GATES[name]), image(2, 5, 4, 16)
    assert isinstance(module, Gate)
    torch.testing.assert_close(module(x), x * module.gate(x))
    valid = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(2)) > 0.3
    torch.testing.assert_close(module(x, valid=valid)[valid], (x * module.gate(x, valid))[valid])
    assert module.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


# ---- polarized self-attention


def polarized(m, x):
    """As the equations stand, pixel by pixel, projected before they are pooled."""
    flat = x.flatten(1, -2)

    def channels(flat):
        q = (flat @ m.channel_q.weight.T).softmax(1)
        return m.up((q * (flat @ m.channel_v.weight.T)).sum(1)).sigmoid()[:, None]

    def spatial(flat):
        g, theta = (flat @ m.spatial_q.weight.T).mean(1, keepdim=True), flat @ m.spatial_v.weight.T
        if m.spatial_softmax == "scores":
            return (g * theta).sum(-1, keepdim=True).softmax(1).sigmoid()
        if m.spatial_softmax == "keys":
            return (g * theta.softmax(1)).sum(-1, keepdim=True).sigmoid()
        return (g.softmax(-1) * theta).sum(-1, keepdim=True).sigmoid()

    if m.preset == "parallel":
        y = channels(flat) * flat + spatial(flat) * flat
    else:
        flat = channels(flat) * flat
        y = spatial(flat) * flat
    return y.view(x.shape)


@pytest.mark.parametrize("preset", ["parallel", "sequential"])
@pytest.mark.parametrize("spatial_softmax", ["scores", "keys", "query"])
def test_psa_equals_its_equations(preset, spatial_softmax):
    m = build("polarized-self-attention", dim=16, preset=preset, spatial_softmax=spatial_softmax)
    x = image(2, 3, 5, 16).requires_grad_()
    y, expected = m(x), polarized(m, x)
    torch.testing.assert_close(y, expected)
    g = image(*y.shape).cos()
    leaves = [x, *m.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_psa_masks_are_where_the_card_says():
    m, x = build("polarized-self-attention", dim=64), image(2, 6, 3, 64)
    assert count(m) == 2 * 64**2 + 64 == 8256
    a, s = m.channel_gate(x), m.spatial_gate(x)
    assert a.shape == (2, 1, 1, 64) and s.shape == (2, 6, 3, 1)
    assert 0 < a.min() and a.max() < 1 and 0.5 < s.min() and s.max() < 1 / (1 + math.exp(-1))
    n = build("polarized-self-attention", dim=64, preset="sequential")
    c = 64
    assert count(n) == c + 3 * c * c // 2 + (c // 2 * c // 8 + c // 8 + 2 * c // 8 + c // 8 * c + c)
    wide = n.spatial_gate(30 * x)
    assert wide.min() < 0.4 or wide.max() > 0.75, "this one has no such bounds"
    order = torch.randperm(18)
    for module in (m, n):
        moved = x.flatten(1, 2)[:, order].view(x.shape)
        torch.testing.assert_close(module(moved).flatten(1, 2), module(x).flatten(1, 2)[:, order])


def test_psa_of_zero_projections():
    x = image(2, 3, 4, 16)
    for preset, factor in (("parallel", 0.5 + 1 / (1 + math.exp(-1 / 12))), ("sequential", 0.25)):
        m = build("polarized-self-attention", dim=16, preset=preset)
        for p in m.parameters():
            torch.nn.init.zeros_(p)
        torch.testing.assert_close(m(x), factor * x)


def test_psa_builds_no_map_of_keys_where_the_softmax_acts_on_scores():
    """Counted: work per pixel is linear in C, not quadratic."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(dim, side):
        module = attnlib.create("polarized-self-attention", dim=dim)
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(1, side, side, dim))
        return counter.get_total_flops()

    per_pixel = {dim: (flops(dim, 32) - flops(dim, 16)) / (32**2 - 16**2) for dim in (32, 64)}
    assert per_pixel[64] == 2 * per_pixel[32]


def test_psa_bad_input():
    with pytest.raises(ValueError, match="dim must be even"):
        attnlib.create("polarized-self-attention", dim=7)
    with pytest.raises(ValueError, match="at least 8"):
        attnlib.create("polarized-self-attention", dim=6, preset="sequential")
    with pytest.raises(ValueError, match="preset"):
        attnlib.create("polarized-self-attention", dim=8, preset="both")
    with pytest.raises(ValueError, match="may mean .*polarized-self-attention.*pyramid"):
        attnlib.create("psa", dim=8)


# ---- efficient local attention


@pytest.mark.parametrize(("version", "factor"), [("tiny", 7), ("base", 9), ("small", 42), ("large", 58)])
def test_ela_parameters_and_equation(version, factor):
    assert count(attnlib.create("ela", dim=256, version=version)) == factor * 256
    assert count(attnlib.create("ela", dim=256, version=version, shared=False)) == 2 * factor * 256
    for shared in (True, False):
        m, x = build("ela", dim=32, version=version, shared=shared), image(2, 5, 4, 32)
        for p in m.parameters():
            torch.nn.init.normal_(p)
        gates = []
        for axis in (2, 1):
            conv, norm = m.convs[-1 if axis == 1 else 0], m.norms[-1 if axis == 1 else 0]
            y = F.conv1d(
                x.mean(axis).transpose(1, 2), conv.weight, padding=conv.kernel_size[0] // 2, groups=conv.groups
            )
            parts = y.unflatten(1, (norm.num_groups, -1))
            spread = parts.var((2, 3), correction=0, keepdim=True)
            y = ((parts - parts.mean((2, 3), keepdim=True)) / (spread + 1e-5).sqrt()).flatten(1, 2)
            gates.append((y * norm.weight[:, None] + norm.bias[:, None]).sigmoid().transpose(1, 2).unsqueeze(axis))
        torch.testing.assert_close(m(x), x * gates[0] * gates[1])
        for gate in m.gate(x).movedim(-1, 1).flatten(0, 1):
            assert torch.linalg.matrix_rank(gate) == 1 and 0 < gate.min() and gate.max() < 1


def test_ela_is_independent_of_the_batch_also_in_training():
    m, x = build("ela", dim=16).train(), image(3, 5, 4, 16)
    torch.testing.assert_close(m(x)[:1], m(x[:1]))


def test_ela_reaches_half_a_kernel_of_rows():
    m, x = build("ela", dim=16), image(1, 15, 4, 16)
    m.norms = torch.nn.ModuleList([torch.nn.GroupNorm(16, 16).double()])
    changed = x.clone()
    changed[:, 7] += 1
    before, after = (m.convs[0](t.mean(2).transpose(1, 2))[0] for t in (x, changed))
    assert (before != after).any(0).nonzero().flatten().tolist() == list(range(4, 11))


def test_ela_of_a_strip_of_one():
    m = build("ela", dim=16)
    torch.testing.assert_close(m.strip_gates(image(2, 1, 5, 16))[0], torch.full((2, 1, 1, 16), 0.5, dtype=F64))


def test_ela_finds_a_bright_bar():
    """Trained for a few steps to tell in which of two halves a bar lies, the row gate is largest near it."""
    torch.manual_seed(0)
    m, head = attnlib.create("ela", dim=16), torch.nn.Linear(16 * 12, 12)
    lift = torch.nn.Linear(1, 16)
    optimizer = torch.optim.Adam([*m.parameters(), *head.parameters(), *lift.parameters()], lr=0.03)
    for _ in range(60):
        rows = torch.randint(12, (64,))
        x = 0.3 * torch.randn(64, 12, 8, 1)
        x[torch.arange(64), rows] += 1
        loss = F.cross_entropy(head((lift(x).relu() * m.strip_gates(lift(x).relu())[0]).mean(2).flatten(1)), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate = m.strip_gates(lift(x).relu())[0].squeeze(2)
    seen = gate[torch.arange(64), rows]  # (64, C): the channels that follow the bar
    followed = (gate.argmax(1) == rows[:, None]).float().mean(0).max()
    assert followed > 0.95 and seen.isfinite().all()


def test_ela_bad_input():
    with pytest.raises(ValueError, match="num_groups=16.*dim=24"):
        attnlib.create("ela", dim=24)
    assert attnlib.create("ela", dim=24, num_groups="gcd").norms[0].num_groups == 8
    with pytest.raises(ValueError, match="dim=12"):
        attnlib.create("ela", dim=12, version="small", num_groups="gcd")


# ---- subspaces


def test_ulsam_equals_its_equation():
    x = image(2, 5, 4, 12)
    paper = build("ulsam", dim=12, num_splits=3, norm=False)
    assert count(paper) == 2 * 12
    released = build("ulsam", dim=12, num_splits=3)
    for norm in released.norms:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    assert count(released) == 5 * 12 + 3 * 3
    for m in (paper, released):
        out = []
        for s, part in enumerate(x.split(4, -1)):
            here = slice(4 * s, 4 * s + 4)
            u = (part * m.scale[here]).movedim(-1, 1)
            if m.norm:
                a, b = m.norms
                u = u + m.shift[here][:, None, None]
                u = F.batch_norm(u, a.running_mean[here], a.running_var[here], a.weight[here], a.bias[here]).relu()
            score = (F.max_pool2d(u, 3, 1, 1) * m.score[s][:, None, None]).sum(1, keepdim=True)
            if m.norm:
                score = score + m.bias[s]
                at = slice(s, s + 1)
                score = F.batch_norm(score, b.running_mean[at], b.running_var[at], b.weight[at], b.bias[at]).relu()
            out.append(part * (1 + score.flatten(1).softmax(1).view(2, 5, 4, 1)))
        torch.testing.assert_close(m(x), torch.cat(out, -1))
        torch.testing.assert_close(attnlib.deploy(m)(x), torch.cat(out, -1))
    assert attnlib.deploy(released).norms is None


def test_ulsam_maps_sum_to_one_and_survive_half_precision():
    m, x = build("ulsam", dim=16), image(2, 6, 5, 16)
    torch.testing.assert_close(m.maps(x).sum((1, 2)), torch.ones(2, 4, dtype=F64))
    ratio = (m(x) / x).unflatten(-1, (4, 4))
    assert 1 <= ratio.min() and ratio.max() <= 2
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    flat = torch.full((1, 20, 20, 16), 1.5, dtype=F64)
    torch.testing.assert_close(m(flat), flat * (1 + 1 / 400))
    half = build("ulsam", dim=16).to(torch.bfloat16)
    gate = half.gate(flat.to(torch.bfloat16))
    assert gate.dtype == torch.float32 and (gate > 1).all(), "1 + 1/400 is 1 in bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(m.float()(flat.float()), flat.float() * (1 + 1 / 400), rtol=1e-6, atol=0)


def test_ulsam_channels_of_a_subspace_may_be_permuted():
    m, x = build("ulsam", dim=8, num_splits=1), image(2, 4, 3, 8)
    order = torch.randperm(8)
    n = build("ulsam", dim=8, num_splits=1)
    with torch.no_grad():
        n.scale.copy_(m.scale[order]), n.shift.copy_(m.shift[order]), n.score.copy_(m.score[:, order])
    torch.testing.assert_close(n.maps(x[..., order]), m.maps(x))


def test_ulsam_is_cheaper_than_a_pointwise_convolution():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(1, 7, 7, 64)
    counts = []
    for module in (attnlib.create("ulsam", dim=64), torch.nn.Linear(64, 64)):
        with FlopCounterMode(display=False) as counter:
            module(x)
        counts.append((counter.get_total_flops(), count(module)))
    assert counts[0][0] < counts[1][0] and counts[0][1] < counts[1][1]


def test_ulsam_bad_input():
    with pytest.raises(ValueError, match="num_splits=3.*dim=8"):
        attnlib.create("ulsam", dim=8, num_splits=3)
    with pytest.raises(ValueError, match="more than one pixel or sample"):
        attnlib.create("ulsam", dim=8).train()(torch.randn(1, 1, 1, 8))
    with pytest.raises(ValueError, match="may mean .*ulsam.*sharpness"):
        attnlib.create("sam", dim=8)


# ---- yardsticks


def test_squeeze_excite_and_eca_equal_their_equations():
    x = image(2, 5, 4, 16)
    m = build("squeeze-excite", dim=16, reduction=4)
    mean = x.mean((1, 2))
    gate = (((mean @ m.se.fc1.weight.T + m.se.fc1.bias).relu()) @ m.se.fc2.weight.T + m.se.fc2.bias).sigmoid()
    torch.testing.assert_close(m(x), x * gate[:, None, None])
    assert [attnlib.create("se", dim=d, reduction=16, divisor=8).hidden for d in (64, 256, 320)] == [8, 16, 24]
    m = build("eca", dim=16)
    padded = F.pad(mean, (1, 1))
    gate = sum(m.conv.weight[0, 0, i] * padded[:, i : i + 16] for i in range(3)).sigmoid()
    torch.testing.assert_close(m(x), x * gate[:, None, None])
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        attnlib.create("eca", dim=16, kernel_size=4)
