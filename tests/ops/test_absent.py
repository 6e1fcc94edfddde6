"""NaN and infinity in tokens that take no part reach neither values nor gradients, on any backend of any operator."""

import pytest
import torch
from reference import generator

from attnlib import masks as M
from attnlib import ops, use_backend
from attnlib.grids import window_partition

N = 12
GONE = torch.zeros(2, N, dtype=torch.bool)
GONE[0, 3], GONE[1, 5:8], GONE[1, -1] = True, True, True
VALID = ~GONE
LATE = torch.arange(N) >= 8  # tokens that rows 0 to 7 may not see
DOCUMENTS = M.documents(LATE.long())
PLAN = ops.BlockPlan(torch.tensor([[0, 1], [0, 1], [2, 2]]), 4, 4, N, count=torch.tensor([2, 2, 1]))


def tensors(*shapes, dtype=torch.float64):
    g = generator()
    return [torch.randn(*shape, dtype=dtype, generator=g) for shape in shapes]


def spoiled(t, where, what):
    """(B, H, N, ...) with ``what`` in the tokens ``where`` (B, N) or (N,)."""
    where = (where if where.dim() == 2 else where[None])[:, None]
    return t.masked_fill(where.reshape(*where.shape, *(1,) * (t.dim() - 3)), what)


def scanned(q, k, v, **call):
    """A selective scan in which every factor comes from (B, H, N, D)."""
    u, delta, z = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    decays = -torch.arange(1.0, 13.0, dtype=q.dtype).view(6, 2)
    b, c = k.transpose(1, 2)[..., :2], v.transpose(1, 2)[..., 1:]
    out = ops.selective_scan(u, delta, decays, b, c, z=z, delta_softplus=True, chunk=4, **call)
    return out.unflatten(2, (2, 3)).transpose(1, 2)


ROWS = {"valid": VALID[:, None, :, None], "pairs": (~LATE)[None, None, :, None]}
ROWS["future"] = ROWS["pairs"]

#: name: operator, which tokens are absent, the call, and how its operands are made (three normal ones by default).
CASES = {
    "attention": ("attention", "valid", lambda q, k, v: ops.attention(q, k, v, valid=VALID)),
    "attention, causal": (
        "attention",
        "valid",
        lambda q, k, v: ops.attention(q, k, v, valid=VALID, mask=M.causal(), normalizer="softmax"),
    ),
    "attention, sigmoid": (
        "attention",
        "valid",
        lambda q, k, v: ops.attention(q, k, v, valid=VALID, normalizer="sigmoid"),
    ),
    "attention, sums": (
        "attention",
        "pairs",
        lambda q, k, v: ops.attention(q, k, v, mask=DOCUMENTS, normalizer="softplus_l1"),
    ),
    "attention, documents": ("attention", "pairs", lambda q, k, v: ops.attention(q, k, v, mask=DOCUMENTS)),
    "attention, future": ("attention", "pairs", lambda q, k, v: ops.attention(q, k, v, mask=M.causal())),
    "attention, dense mask": (
        "attention",
        "pairs",
        lambda q, k, v: ops.attention(q, k, v, mask=~LATE.expand(N, N), bias=torch.zeros(N, N)),
    ),
    "partial": ("attention", "pairs", lambda q, k, v: ops.attention_partial(q, k, v, mask=M.causal()).finish()),
    "blocks": ("block_sparse_attention", "pairs", lambda q, k, v: ops.block_sparse_attention(q, k, v, PLAN)),
    "blocks, valid": (
        "block_sparse_attention",
        "valid",
        lambda q, k, v: ops.block_sparse_attention(q, k, v, PLAN, valid=VALID),
    ),
    "neighborhood": (
        "neighborhood_attention",
        "valid",
        lambda q, k, v: ops.neighborhood_attention(q, k, v, (3, 4), 3, valid=VALID),
    ),
    "neighborhood, causal": (
        "neighborhood_attention",
        "pairs",
        lambda q, k, v: ops.neighborhood_attention(q, k, v, None, 5, causal=True),
    ),
    "groups": (
        "partition_attention",
        "valid",
        lambda q, k, v: ops.partition_attention(q, k, v, window_partition((4, 3), (2, 3)), valid=VALID),
    ),
    "windows": (
        "window_attention",
        "valid",
        lambda q, k, v: ops.window_attention(q, k, v, (4, 3), (2, 3), valid=VALID),
    ),
    "windows, shifted": (
        "window_attention",
        "valid",
        lambda q, k, v: ops.window_attention(q, k, v, (4, 3), (2, 3), shift=(1, 2), valid=VALID),
    ),
    "halo": (
        "halo_attention",
        "valid",
        lambda q, k, v: ops.halo_attention(q, k, v, (4, 3), (2, 3), 1, border="zeros", valid=VALID),
    ),
    "windows, mask": (
        "window_attention",
        "pairs",
        lambda q, k, v: ops.window_attention(q, k, v, (N,), 6, mask=DOCUMENTS),
    ),
    "agents": (
        "agent_attention",
        "valid",
        lambda q, k, v: ops.agent_attention(q, tensors((2, 2, 2, 3))[0].to(q), k, v, valid=VALID),
    ),
    "reduced": ("reduced_attention", "valid", lambda q, k, v: ops.reduced_attention(q, k, v, 4, valid=VALID)),
    "reduced, last": (
        "reduced_attention",
        "valid",
        lambda q, k, v: ops.reduced_attention(q, k, v, 2, reduce="last", valid=VALID),
    ),
    "reduced, causal": (
        "reduced_attention",
        "pairs",
        lambda q, k, v: ops.reduced_attention(q, k, v, 4, mask=M.causal()),
    ),
    "channels": ("channel_attention", "valid", lambda q, k, v: ops.channel_attention(q, k, v, valid=VALID)),
    "depthwise": (
        "depthwise",
        "valid",
        lambda q, k, v: (
            ops.depthwise(v.transpose(1, 2).flatten(2), torch.ones(6, 1, 5, dtype=q.dtype), valid=VALID)
            .unflatten(2, (2, 3))
            .transpose(1, 2)
        ),
    ),
    "linear": ("linear_attention", "valid", lambda q, k, v: ops.linear_attention(q, k, v, valid=VALID, chunk=4)),
    "linear, every factor": (
        "linear_attention",
        "valid",
        lambda q, k, v, w, g: ops.linear_attention(
            q, k, v, valid=VALID, chunk=4, key_weights=w, decay=g, normalizer="sum"
        ),
        lambda q, k, v: (q.exp(), k.exp(), v, v.sum(-1).exp(), -k.sum(-1).square()),
    ),
    "linear, channels": (
        "linear_attention",
        "valid",
        lambda q, k, v, g: ops.linear_attention(q, k, v, valid=VALID, decay=g, causal=False),
        lambda q, k, v: (q, k, v, -k.square()),
    ),
    "linear, future": ("linear_attention", "pairs", lambda q, k, v: ops.linear_attention(q, k, v)),
    "linear, decay in the future": (
        "linear_attention",
        "future",
        lambda q, k, v, g: ops.linear_attention(q, k, v, decay=g),
        lambda q, k, v: (q, k, v, -k.sum(-1).square()),
    ),
    "linear, segments": (
        "linear_attention",
        "pairs",
        lambda q, k, v: ops.linear_attention(q, k, v, cu_seqlens=[0, 5, 8, N], causal=False, chunk=3),
    ),
    "scan": ("selective_scan", "valid", lambda q, k, v: scanned(q, k, v, valid=VALID)),
    "scan, future": ("selective_scan", "pairs", lambda q, k, v: scanned(q, k, v)),
    "scan, segments": ("selective_scan", "pairs", lambda q, k, v: scanned(q, k, v, cu_seqlens=[0, 5, 8, N])),
    "toeplitz": (
        "toeplitz_attention",
        "valid",
        lambda q, k, v: ops.toeplitz_attention(q, k, v, torch.zeros(2, 2 * N - 1).to(q), valid=VALID),
        lambda q, k, v: (q.exp(), k.exp(), v),
    ),
    "toeplitz, future": (
        "toeplitz_attention",
        "pairs",
        lambda q, k, v: ops.toeplitz_attention(
            q, k, v, torch.zeros(1, 2 * N - 1).masked_fill(torch.arange(2 * N - 1) >= N, -torch.inf).to(q)
        ),
        lambda q, k, v: (q.exp(), k.exp(), v),
    ),
    "sampled": (
        "deformable_attention",
        "valid",
        lambda v, at, w: ops.deformable_attention(v, [(3, 4)], at, w, valid=VALID),
        lambda q, k, v: (v, q[:, :, :, None, None, :2].sigmoid(), k[:, :, :, None, None, 0]),
    ),
    "sampled, 3d": (
        "deformable_attention_3d",
        "valid",
        lambda v, d, at, w: ops.deformable_attention_3d(v, d, [(3, 4)], at, w, valid=VALID),
        lambda q, k, v: (v, k.exp(), q[:, :, :, None, None, :].sigmoid(), q[:, :, :, None, None, 0]),
    ),
    "split": (
        "split_decoding",
        "pairs",
        lambda q, k, v: ops.split_decoding(q[:, :, :8], k, v, lengths=[8, 8], causal=True, tile=3),
    ),
    "split, causal": (
        "split_decoding",
        "pairs",
        lambda q, k, v: ops.split_decoding(q, k, v, causal=True, tile=5, workers=2),
    ),
}
PAIRS = [(n, b) for n, (op, *_) in CASES.items() for b in (None, *ops.derivatives(op)) if b != "flex"]


def outcome(case, what, grad):
    """Output of the rows that exist, and gradients; with ``what`` in the tokens that do not."""
    _, kind, call, *make = case
    operands = tensors(*[(2, 2, N, 3)] * 3)
    if make:
        operands = make[0](*operands)
    where = GONE if kind == "valid" else LATE
    inputs = [spoiled(t, where, what).requires_grad_(grad) for t in operands]
    out = call(*inputs)
    out = torch.where(ROWS[kind][:, :, : out.shape[2]], out, 0.0)
    if not grad:
        return [out]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [out, *(g for g in grads if g is not None)]


@pytest.mark.parametrize(("name", "backend"), PAIRS, ids=str)
def test_absent_tokens_reach_nothing(name, backend):
    case = CASES[name]
    # An infinite decay of a token that exists is refused, whoever may see it.
    holds = (float("nan"),) if case[1] == "future" else (float("nan"), float("inf"), -float("inf"))
    with use_backend(backend):
        for grad in (False, True):
            try:
                clean = outcome(case, -0.25, grad)
            except ValueError as error:
                assert "cannot serve this call" in str(error)
                return
            for what in holds:
                for ours, spec in zip(outcome(case, what, grad), clean, strict=True):
                    torch.testing.assert_close(ours, spec, rtol=1e-9, atol=1e-11, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("backend", [None, *(b for b in ops.derivatives("attention") if b != "flex")])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "clipped_softmax", "relu", "uniform"])
def test_what_is_seen_is_seen(backend, normalizer):
    """The protection hides nothing: a present token that is not finite spoils its readers and their gradients."""
    q, k, v = tensors(*[(2, 2, N, 3)] * 3, dtype=torch.float32)
    k = spoiled(k, LATE & (torch.arange(N) == 9), float("nan"))
    call = dict(mask=M.causal(), valid=VALID, normalizer=normalizer, backend=backend)
    try:
        out = ops.attention(q, k, v, **call)
    except ValueError:
        return
    assert not bool(torch.isnan(out[:, :, :9]).any()) and bool(torch.isnan(out[:, :, 9:]).all())
    v = v.requires_grad_()
    (grad,) = torch.autograd.grad(ops.attention(q, k, v, **call).sum(), v)
    assert bool(torch.isnan(grad[:, :, 0]).all())


def test_nan_in_a_bias_of_absent_tokens():
    for backend in ("eager", "sdpa", "tiled"):
        results = []
        for what in (0.0, float("nan")):
            q, k, v = (t.requires_grad_() for t in tensors(*[(2, 2, N, 3)] * 3))
            bias = torch.zeros(2, 1, N, N, dtype=torch.float64)
            bias = bias.masked_fill(GONE[:, None, None] | GONE[:, None, :, None], what).requires_grad_()
            out = ops.attention(q, k, v, bias=bias, valid=VALID, mask=M.recent(9), backend=backend)
            out = torch.where(ROWS["valid"], out, 0.0)
            results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, bias])])
        for ours, spec in zip(*results, strict=True):
            torch.testing.assert_close(ours, spec)


def test_traced_and_transformed_calls_hold_valid():
    """There numbers cannot be looked at; keys and values that do not exist are zero instead."""
    q, k, v = tensors(*[(2, 2, N, 3)] * 3, dtype=torch.float32)
    clean = ops.attention(q, k, v, valid=VALID)
    k, v = spoiled(k, GONE, float("nan")), spoiled(v, GONE, float("inf"))
    compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v, valid=VALID), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), clean)
    mapped = torch.func.vmap(lambda q: ops.attention(q, k, v, valid=VALID))(torch.stack([q, q]))
    torch.testing.assert_close(mapped[1], clean)


def test_half_precision_that_overflows_a_sum_is_not_taken_for_infinity():
    q, k, v = (t.half() for t in tensors(*[(1, 1, 70, 64)] * 3, dtype=torch.float32))
    v = torch.full_like(v, 60000.0).requires_grad_()
    out = ops.attention(q, k, v, mask=M.causal())
    assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(torch.autograd.grad(out.sum(), v)[0]).all())
