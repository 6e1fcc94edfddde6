"""overlock-contmix: the dynamic convolution, one test per criterion of the card that concerns the layer."""

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture
from torch import nn

import attnlib
from attnlib.nn.layers import GlobalResponseNorm, RepBranches

F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("overlock-contmix", **{"dim": 8, "num_heads": 1, "kernel_size": 5, **config}).double()
    for p in module.parameters():
        nn.init.normal_(p, 0, 0.4)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    return module.eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("case", ["window", "enlarged"])
def test_the_authors_block(case):
    fixture = Fixture("overlock-contmix")
    fixture.holds(case, fixture.build(case).eval(), lambda m, given: m(given["x"]))


def test_it_is_the_equation_written_out():
    m, x, context = make(context_dim=6), tokens(2, 6, 7, 8), tokens(2, 9, 8, 6, seed=2)
    channels = F.adaptive_avg_pool2d(context.permute(0, 3, 1, 2), 7).permute(0, 2, 3, 1)
    q, k, v = m.query(x), m.key(channels), m.value(x)
    out = torch.zeros_like(v)
    for group in range(2):
        mine = slice(2 * group, 2 * group + 2)
        a = torch.einsum("bhwc,bklc->bhwkl", q[..., mine], k[..., mine]) * (8 / 2) ** -0.5
        logits = a.flatten(3) @ m.weights.weight.T + m.weights.bias
        for half, kernel in enumerate((5, 5)):
            own = slice(4 * half + 2 * group, 4 * half + 2 * group + 2)
            for i in range(6):
                for j in range(7):
                    top, left = min(max(i - 2, 0), 1), min(max(j - 2, 0), 2)
                    rows = slice(top - i + 4, top - i + 9), slice(left - j + 4, left - j + 9)
                    bias = m.rpb[half][group][rows].flatten()
                    w = (logits[:, i, j].split([25, 25], -1)[half] + bias).softmax(-1)
                    window = v[:, top : top + kernel, left : left + kernel, own].flatten(1, 2)
                    out[:, i, j, own] = torch.einsum("bk,bkc->bc", w, window)
    y = m.squeeze(m.fusion(out) + m.lepe(x))
    torch.testing.assert_close(m(x, context), m.proj(m.gate(x) * y))


def test_weights_sum_to_one_and_without_logits_are_a_box():
    m, x = make(kernel_size=7), tokens(1, 9, 8, 8)
    small, large = m.kernels_of(x, x)
    assert small.shape == (1, 2, 9, 8, 25) and large.shape == (1, 2, 9, 8, 49)
    for w in (small, large):
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    for p in (m.weights.weight, m.weights.bias, *m.rpb):
        nn.init.zeros_(p)
    small, large = m.kernels_of(x, x)
    torch.testing.assert_close(small, torch.full_like(small, 1 / 25))
    torch.testing.assert_close(large, torch.full_like(large, 1 / 49))


def test_one_far_pixel_changes_every_kernel_and_no_value_beyond_the_window():
    m, x = make(), tokens(1, 16, 16, 8)
    other = x.clone()
    other[0, 15, 15] += 3
    before, after = m.kernels_of(x, x)[1], m.kernels_of(x, other)[1]
    assert ((before - after).abs().amax(-1) > 0).all()
    value = tokens(1, 16, 16, 8, seed=3).requires_grad_()
    held = [w.detach() for w in m.kernels_of(x, x)]
    out = attnlib.ops.neighborhood_av(held[1], value.view(1, 16, 16, 2, 4).permute(0, 3, 1, 2, 4), 5)
    out[0, :, 8, 8].sum().backward()
    seen = value.grad.abs().sum((0, 3)) > 0
    assert seen[6:11, 6:11].all() and seen.sum() == 25


def test_tokens_that_do_not_exist_are_read_by_no_window():
    m, x = make(), tokens(2, 7, 8, 8)
    valid = torch.zeros(2, 7, 8, dtype=torch.bool)
    valid[0, :5, :6] = valid[1] = True
    small, _ = m.kernels_of(x, x, valid, valid)
    keys, _ = attnlib.ops.window_keys((7, 8), 5)
    assert not small[0].flatten(1, 2)[:, ~valid[0].flatten()[keys]].any()
    torch.testing.assert_close(m(x.masked_fill(~valid[..., None], float("nan")), valid=valid), m(x, valid=valid))


def test_deployed_it_is_the_same_and_has_no_norm_left():
    m, x = make(kernel_size=9), tokens(2, 10, 9, 8)
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deployed.modules())
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)
    assert deployed.lepe.large.conv.weight.shape == (8, 1, 9, 9) and not len(deployed.lepe.branches)


@pytest.mark.parametrize("identity", [False, True])
def test_branches_are_their_sum(identity):
    m = RepBranches(3, ((7, 1), (5, 1), (3, 2), (3, 3)), identity=identity, norm=True).double()
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    x = tokens(2, 6, 9, 3)
    y = sum(branch.eval()(x) for branch in (m.large, *m.branches.values()))
    y = m.norm.eval()(y + m.identity.eval()(x) if identity else y)
    m.eval()
    torch.testing.assert_close(m(x), y)
    merged = m.deployed()
    torch.testing.assert_close(merged(x), y)
    assert merged.deployed() is merged and sum(p.numel() for p in merged.parameters()) == 3 * 50
    with pytest.raises(ValueError, match="branches="):
        RepBranches(3, ((3, 1), (3, 2)))


def test_global_response_is_relative_to_the_mean_channel():
    norm, x = GlobalResponseNorm(3).double(), tokens(2, 4, 5, 3)
    assert torch.equal(norm(x), x)
    nn.init.normal_(norm.gamma)
    nn.init.normal_(norm.beta)
    g = x.square().sum((1, 2), keepdim=True).sqrt()
    want = norm.gamma * (x * g / (g.mean(-1, keepdim=True) + 1e-6)) + norm.beta + x
    torch.testing.assert_close(norm(x), want)
    valid = torch.zeros(2, 4, 5, dtype=torch.bool)
    valid[:, :3, :2] = True
    torch.testing.assert_close(norm(x, valid)[:, :3, :2], norm(x[:, :3, :2]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kernel_size=6), r"kernel_size=6 is not possible; possible: \[5, 7"),
        (dict(small_kernel_size=7), "small_kernel_size=7 is larger"),
        (dict(num_heads=3), "4 num_heads"),
        (dict(regions=0), "regions"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
