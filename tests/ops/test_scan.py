"""Selective scan: every backend against the recurrence, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attnlib import State, explain, ops
from attnlib.ops.scan import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def problem(n=23, batch=2, channels=6, size=3, groups=None, seed=0, dtype=torch.float64, length=None):
    g = torch.Generator().manual_seed(seed)
    part = (batch, n, size) if groups is None else (batch, n, groups, size)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    call = dict(
        u=make(batch, n, channels), delta=make(batch, n if length is None else length, channels),
        A=-make(channels, size).exp(), B=make(*part), C=make(*part), D=make(channels), z=make(batch, n, channels),
        delta_bias=make(channels), delta_softplus=True,
    )  # fmt: skip
    return {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def by_definition(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h=None, starts=()):
    """Sample by sample, channel by channel, token by token."""
    assert delta_softplus
    batch, n, channels = u.shape
    out, final = torch.zeros_like(u), []
    B, C = (t if t.dim() == 4 else t.unsqueeze(2) for t in (B, C))
    for b in range(batch):
        for e in range(channels):
            group = e // (channels // B.shape[2])
            state = torch.zeros_like(A[e]) if h is None else h[b, e]
            for t in range(n):
                state = torch.zeros_like(state) if t in starts else state
                step = F.softplus(delta[b, t, e] + delta_bias[e])
                state = (step * A[e]).exp() * state + step * u[b, t, e] * B[b, t, group]
                y = (C[b, t, group] * state).sum() + D[e] * u[b, t, e]
                out[b, t, e] = y * z[b, t, e] * torch.sigmoid(z[b, t, e])
            final.append(state)
    return out, torch.stack(final).view(batch, channels, -1)


@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("cu", [None, [0, 2, 2, 5, 7]])
def test_recurrence_is_the_definition(cu, groups):
    call = problem(n=7, channels=4, size=2, groups=groups)
    h = torch.randn(2, 4, 2, dtype=torch.float64)
    want, final = by_definition(**call, h=h, starts=(cu or [0])[1:])
    for backend in ("eager", "chunked"):
        out, state = selective_scan(
            **call, state=State({"h": h}), cu_seqlens=cu, backend=backend, chunk=4, return_state=True
        )
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(state["h"], final)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64, None])
@pytest.mark.parametrize("cu", [None, [0, 3, 3, 4, 17, 23]])
@pytest.mark.parametrize("groups", [None, 3])
def test_backends_agree_forward_and_backward(groups, cu, chunk):
    results = []
    for backend in ("eager", "chunked"):
        call = problem(groups=groups)
        h = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        valid = torch.rand(2, 23, generator=torch.Generator().manual_seed(2)) > 0.3
        out, state = selective_scan(
            **call, state=State({"h": h}), cu_seqlens=cu, valid=valid, backend=backend, chunk=chunk, return_state=True
        )
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + state["h"].sin().sum()
        leaves = [*(call[name] for name in NAMES), h]
        results.append([out, state["h"], *torch.autograd.grad(loss, leaves)])
    for ours, spec in zip(*results, strict=True):
        torch.testing.assert_close(ours, spec)


def test_state_alone_and_output_alone_have_gradients():
    call = problem()
    for pick in (lambda out: out.out.sum(), lambda out: out.state["h"].sum()):
        grads = [
            torch.autograd.grad(
                pick(selective_scan(**call, backend=backend, chunk=5, return_state=True)),
                [call[name] for name in ("u", "delta", "A", "B")],
            )
            for backend in ("eager", "chunked")
        ]
        for ours, spec in zip(*grads, strict=True):
            torch.testing.assert_close(ours, spec)


def test_a_prefix_and_single_steps_continue():
    call = problem()
    want, final = selective_scan(**call, return_state=True)
    state, outs = None, []
    for a, b in ((0, 9), (9, 10), (10, 11), (11, 23)):
        part = {k: v[:, a:b] if k in ("u", "delta", "B", "C", "z") else v for k, v in call.items()}
        out, state = selective_scan(**part, state=state, return_state=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want)
    torch.testing.assert_close(state["h"], final["h"])
    one = {k: v[:, :1] if k in ("u", "delta", "B", "C", "z") else v for k, v in call.items()}
    assert explain("selective_scan", **one).startswith("runs: eager")


def test_segments_are_scans_of_their_own():
    call, bounds = problem(), [0, 4, 11, 23]
    out = selective_scan(**call, cu_seqlens=bounds, chunk=8)
    for a, b in zip(bounds, bounds[1:], strict=False):
        part = {k: v[:, a:b] if k in ("u", "delta", "B", "C", "z") else v for k, v in call.items()}
        torch.testing.assert_close(out[:, a:b], selective_scan(**part))


def test_absent_tokens_take_no_step():
    call = problem()
    valid = torch.rand(2, 23) > 0.4
    out, state = selective_scan(**call, valid=valid, return_state=True, chunk=4)
    assert (out[~valid] == 0).all()
    for b in range(2):
        part = {k: v[b : b + 1, valid[b]] if k in ("u", "delta", "B", "C", "z") else v for k, v in call.items()}
        want = selective_scan(**part, return_state=True)
        torch.testing.assert_close(out[b, valid[b]], want.out[0])
        torch.testing.assert_close(state["h"][b], want.state["h"][0])


def kept(call, positions):
    at = positions.unsqueeze(-1)
    return {k: v.gather(1, at.expand(-1, -1, v.shape[-1])) if k in ("u", "B", "C", "z") else v for k, v in call.items()}


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_removed_tokens_go_on_decaying(backend):
    """What is left of a sequence gives what the dense scan gives with zeros for what was removed."""
    call = problem()
    positions = torch.stack([torch.randperm(23)[:9].sort().values for _ in range(2)])
    stays = torch.zeros(2, 23, dtype=torch.bool).scatter(1, positions, True)
    h = State({"h": torch.randn(2, 6, 3, dtype=torch.float64)})
    dense = selective_scan(
        **{**call, "u": call["u"] * stays.unsqueeze(-1)}, state=h, return_state=True, backend=backend
    )
    out, state = selective_scan(
        **kept(call, positions), positions=positions, state=h, return_state=True, backend=backend, chunk=4
    )
    want = dense.out.gather(1, positions.unsqueeze(-1).expand(-1, -1, 6))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state["h"], dense.state["h"])
    grads = [torch.autograd.grad(t.square().sum(), [call[n] for n in NAMES], retain_graph=True) for t in (out, want)]
    for ours, spec in zip(*grads, strict=True):
        torch.testing.assert_close(ours, spec)
    naive = selective_scan(**{**kept(call, positions), "delta": kept({"u": call["delta"]}, positions)["u"]})
    assert not torch.allclose(out, naive, atol=1e-3)


def test_gaps_by_the_step_of_the_next_token():
    call = problem(n=5)
    positions = torch.tensor([[0, 1, 4, 5, 9], [2, 3, 5, 7, 8]])
    out = selective_scan(**call, positions=positions)
    slot = torch.searchsorted(positions, torch.arange(10).expand(2, -1).contiguous()).clamp(max=4)
    longer = call["delta"].gather(1, slot.unsqueeze(-1).expand(-1, -1, 6))
    torch.testing.assert_close(out, selective_scan(**{**call, "delta": longer}, positions=positions))


def test_positions_of_absent_tokens_are_not_read():
    call = problem(n=6, length=15)
    positions = torch.tensor([[1, 3, 4, 8, 9, 14], [0, 2, 5, 7, 11, 13]])
    valid = torch.tensor([[True, True, False, True, True, False], [False, True, True, True, False, True]])
    want = selective_scan(**call, positions=positions, valid=valid, return_state=True)
    moved = torch.where(valid, positions, 99)
    got = selective_scan(**call, positions=moved, valid=valid, return_state=True)
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.state["h"], want.state["h"])
    at = positions[:1][valid[:1]][None]
    part = {k: v[:1][valid[:1]][None] if k in ("u", "B", "C", "z") else v for k, v in call.items()}
    one = selective_scan(**{**part, "delta": call["delta"][:1]}, positions=at, return_state=True)
    torch.testing.assert_close(one.out[0], want.out[0][valid[0]])
    torch.testing.assert_close(one.state["h"][0], want.state["h"][0])


def test_large_steps_underflow_to_zeros():
    call = problem(dtype=torch.float32)
    call = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    call |= {"delta": call["delta"] + 500, "A": (call["A"] * 100).requires_grad_(), "z": None, "D": None}
    out = selective_scan(**call, chunk=8)
    assert bool(out.isfinite().all())
    (grad,) = torch.autograd.grad(out.sum(), call["A"])
    assert bool(grad.isfinite().all())


def test_half_precision_keeps_its_state_in_float32():
    call = problem(dtype=torch.float32)
    want = selective_scan(**call)
    half = {k: v.detach().bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in call.items()}
    out, state = selective_scan(**half, return_state=True)
    assert out.dtype == torch.bfloat16 and state["h"].dtype == torch.float32
    torch.testing.assert_close(out.float(), want, rtol=0.1, atol=0.1)


def test_traced_and_exported_with_any_length():
    call = {k: v.detach().float() if isinstance(v, torch.Tensor) else v for k, v in problem().items()}
    tokens = {k: call[k] for k in ("u", "delta", "B", "C")}
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for cut in (23, 17):
        part = {**call, **{k: call[k][:, :cut].requires_grad_() for k in ("u", "delta", "B", "C", "z")}}
        want, got = selective_scan(**part), compiled(**part)
        torch.testing.assert_close(got, want)
        for ours, spec in zip(
            torch.autograd.grad(got.sum(), part["u"]), torch.autograd.grad(want.sum(), part["u"]), strict=True
        ):
            torch.testing.assert_close(ours, spec)

    class Module(torch.nn.Module):
        def forward(self, u, delta, B, C):
            return selective_scan(u, delta, call["A"], B, C)

    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(Module(), tuple(tokens.values()), dynamic_shapes=({1: n},) * 4)
    longer = tuple(torch.cat([t, t], 1) for t in tokens.values())
    torch.testing.assert_close(program.module()(*longer), Module()(*longer))


def test_flops_grow_with_tokens():
    def flops(n):
        x, part = torch.zeros(2, n, 1, 6, device="meta"), torch.zeros(2, n, 1, 3, device="meta")
        A, start = torch.zeros(1, 3, 6, device="meta"), torch.zeros(2, 1, 3, 6, device="meta")
        with FlopCounterMode(display=False) as counter:
            torch.ops.attnlib.selective_scan(x, x, A, part, part, start, None, 16, False)
        return counter.get_total_flops()

    assert flops(64) == 2 * flops(32) == 8 * 2 * 64 * 6 * 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(chunk=0), ValueError, "chunk"),
        (dict(A=torch.zeros(5, 3)), ValueError, "A must be"),
        (dict(B=torch.zeros(2, 23, 4)), ValueError, "B must be"),
        (dict(C=torch.zeros(2, 23, 4, 3)), ValueError, "C has 4 groups"),
        (dict(D=torch.zeros(5)), ValueError, "D must be"),
        (dict(z=torch.zeros(2, 23, 5)), ValueError, "z must be"),
        (dict(delta=torch.zeros(2, 24, 6)), ValueError, "without positions"),
        (dict(u=torch.zeros(2, 23, 6, dtype=torch.long)), TypeError, "u must be"),
        (dict(state=State({"S": torch.zeros(2, 6, 3)})), ValueError, "with h"),
        (dict(state=State({"h": torch.zeros(1, 6, 3, dtype=torch.float64)})), ValueError, "state h must be"),
        (dict(state=State({"h": torch.zeros(2, 6, 3)})), TypeError, "state h must be"),
        (dict(cu_seqlens=[0, 5]), ValueError, "cu_seqlens"),
        (dict(positions=torch.arange(23).flip(0).expand(2, -1)), ValueError, "ascend"),
        (dict(positions=torch.arange(23).expand(2, -1) - 1), ValueError, "negative"),
        (dict(positions=torch.arange(23).expand(2, -1), delta=torch.zeros(2, 9, 6)), ValueError, "delta has 9"),
        (dict(positions=2 * torch.arange(23).expand(2, -1), delta=torch.zeros(2, 30, 6)), ValueError, "below the 30"),
        (dict(positions=torch.arange(23).expand(2, -1), cu_seqlens=[0, 23]), ValueError, "cu_seqlens"),
        (dict(valid=torch.ones(2, 22, dtype=torch.bool)), ValueError, "valid"),
        (dict(backend="tiled"), ValueError, "selective_scan has no such backend"),
    ],
)
def test_bad_input(change, error, words):
    call = problem()
    with pytest.raises(error, match=words):
        selective_scan(**{**call, **change})


def test_empty_calls():
    call = problem(n=0)
    out, state = selective_scan(**call, return_state=True)
    assert out.shape == (2, 0, 6) and (state["h"] == 0).all()
    assert ops.naive.selective_scan(**problem(n=3, batch=0)).shape == (0, 3, 6)
    assert selective_scan(**problem(n=3, batch=0)).shape == (0, 3, 6)
