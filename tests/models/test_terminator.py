"""Terminator: the block in float64 by loops over matrices, its reach, the slow loss of the network, bad input."""

import pytest
import torch
import torch.nn.functional as F

from attnlib.models.terminator import SIDES, Terminator, TerminatorBlock
from attnlib.nn.modulation.hyperzzw_terminator import slow_loss


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(**settings):
    torch.manual_seed(0)
    return TerminatorBlock(**{"dim": 6, "hidden": 8, "small_hidden": 5, "omega": 1.0, **settings}).double()


def small(**settings):
    torch.manual_seed(0)
    settings = {"factors": (4, 3, 2), "earlier": (0, 0, 1), "num_layers": (3, 2, 2), **settings}
    return Terminator(**{"hidden": 8, "small_hidden": 5, **settings}).double()


def oracle(m, x, earlier=()):
    """One image (C, H, W), channels first, with torch's own norms and convolutions."""

    def linear(layer, t):
        return torch.einsum("oc,chw->ohw", layer.weight, t) + layer.bias[:, None, None]

    def norm(t):
        return F.instance_norm(t[None])[0]

    def gate(r, t):
        return linear(r.y, F.gelu(norm(linear(r.k, t) * linear(r.q, linear(r.v, t)))))

    c, h, w = x.shape
    s = x * m.slow((h, w)).permute(2, 0, 1)
    fast, mixed = norm(gate(m.gate_slow, s) + gate(m.gate_fast, x)), norm(linear(m.mixer, x))
    mean = x.mean((1, 2))
    told = norm(x * torch.sigmoid(mean**2 * m.slow_told((c,))[:, 0])[:, None, None])
    out, out_mixed, out_told = (torch.stack([s[i] @ f[i] for i in range(c)]) for f in (fast, mixed, told))
    channels, places = (
        out.mean((1, 2)) ** 2 * m.slow_channels((c,))[:, 0],
        out.mean(0) ** 2 * m.slow_places((h, w))[..., 0],
    )
    seen = x * torch.sigmoid(channels[:, None, None] * places)
    near = []
    for branch, size, (of, on) in zip(
        m.local, (3, 9, 5, 7), ((x, told), (told, x), (mixed, x), (x, mixed)), strict=True
    ):
        context = F.adaptive_avg_pool2d(of, size).permute(1, 2, 0)[None]
        kernel = branch.slow((size, size), context)[0].permute(2, 0, 1)[:, None]
        near.append(
            F.gelu(norm(linear(branch.mixer, F.conv2d(on[None], kernel, padding=size // 2, groups=c)[0]))) + branch.bias
        )
    repeated = [torch.cat([e] * (c // len(e))) for e in earlier]
    y = linear(m.squeeze, torch.cat([out, out_mixed, out_told, out * torch.sigmoid(out), fast, seen, *near, *repeated]))
    return F.gelu(F.group_norm(y[None], m.groups)[0]) + m.bias


@pytest.mark.parametrize("earlier", [0, 2])
def test_the_block_is_its_equation(earlier):
    m, x = made(earlier=earlier), noise(2, 9, 9, 6)
    before = [noise(2, 9, 9, width, seed=width) for width in (2, 3)[:earlier]]
    for branch in m.local:
        torch.nn.init.constant_(branch.bias, 0.3)
    y = m(x, before)
    for i in range(2):
        expected = oracle(m, x[i].permute(2, 0, 1), [e[i].permute(2, 0, 1) for e in before])
        torch.testing.assert_close(y[i].permute(2, 0, 1), expected, atol=1e-9, rtol=1e-7)


def test_ten_branches_and_no_residual():
    m, x = made(), noise(1, 9, 9, 6)
    assert len(m.branches(x)) == 10 and len(m.local) == len(SIDES)
    torch.nn.init.zeros_(m.squeeze.weight)
    assert not m(x).any(), "something goes past the block"


def test_every_place_reads_every_other_and_every_weight_learns():
    m, x = made(), noise(1, 9, 9, 6).requires_grad_()
    (grad,) = torch.autograd.grad(m(x)[0, 1, 2].sum(), x)
    assert (grad.abs().amax(-1) > 0).all()
    m(x).square().mul(noise(1, 9, 9, 12)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_the_network_widens_and_joins_what_was_before():
    m, x = small(), noise(2, 3, 8, 8)
    assert [b.dim for b in m.blocks] == [3, 12, 36]
    first = m.blocks[0](x.movedim(1, -1))
    second = m.blocks[1](first)
    torch.testing.assert_close(m.forward_features(x), m.blocks[2](second, [first]), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(m(x)[:1], m(x[:1]), atol=1e-9, rtol=1e-9)
    assert m(x[:0]).shape == (0, 10) and m(noise(1, 3, 6, 9)).shape == (1, 10)


def test_its_kernels_are_what_the_slow_loss_ties():
    m = small()
    loss = slow_loss(m.kernels(4, 4))
    loss.backward()
    assert loss > 0 and all(b.slow.out.weight.grad.any() for b in m.blocks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made(groups=5), "groups must divide"),
        (lambda: made()(noise(1, 4, 4, 5)), "6 channels"),
        (lambda: made(earlier=1)(noise(1, 4, 4, 6)), "earlier must be 1 maps, got 0"),
        (lambda: made(earlier=1)(noise(1, 4, 4, 6), [noise(1, 4, 4, 4)]), "do not repeat"),
        (lambda: small(earlier=(0, 1, 1)), "at most 0 for block 1"),
        (lambda: small(earlier=(0, 0)), "equally long"),
        (lambda: small()(noise(3, 8, 8)), "images"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
