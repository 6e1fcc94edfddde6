"""Calls of the operators."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnlib import State, masks, normalizers, ops, positions
from attnlib.grids import Partition, coordinates, window_partition
from attnlib.ops import voxels

from .engine import Call, target


def heads(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice([(1, 1, 1), (2, 2, 2), (4, 2, 2), (4, 4, 1), (4, 1, 2), (6, 3, 2)])


def qkv(
    rng: random.Random, dtype: torch.dtype = torch.float32, same: bool = False, wide: bool = True
) -> dict[str, Any]:
    h, hk, hv = heads(rng)
    b, d = rng.randint(1, 3), rng.choice([2, 4, 6])
    n = rng.randint(1, 9)
    m = n if same else rng.randint(1, 9)
    dv = rng.choice([d, 3]) if wide else d
    return dict(
        q=torch.randn(b, h, n, d, dtype=dtype), k=torch.randn(b, hk, m, d, dtype=dtype),
        v=torch.randn(b, hv, m, dv, dtype=dtype),
    )  # fmt: skip


def some(rng: random.Random, chance: float, make: Callable[[], Any]) -> Any:
    return make() if rng.random() < chance else None


def some_valid(rng: random.Random, b: int, m: int) -> Tensor | None:
    return some(rng, 0.4, lambda: torch.rand(b, m) > 0.3)


def some_mask(rng: random.Random, b: int, h: int, n: int, m: int) -> Any:
    size = max(n, m)
    kinds: list[Callable[[], Any]] = [
        lambda: None, lambda: None, masks.causal, lambda: masks.recent(rng.randint(1, 4)),
        lambda: masks.sliding_window(rng.randint(1, 5)), lambda: masks.prefix_lm(rng.randint(0, 4)),
        lambda: torch.rand(n, m) > 0.4, lambda: torch.rand(b, n, m) > 0.4, lambda: torch.rand(b, h, n, m) > 0.4,
        lambda: masks.documents(torch.arange(size) // 3),
        lambda: masks.causal() & masks.documents((torch.arange(size) // 2).expand(b, -1)),
        lambda: ~masks.terraced(3), lambda: masks.strided(3, per_head=1, num_heads=h),
        lambda: masks.prefix_lm(torch.randint(0, 4, (b,))),
        lambda: masks.causal() | (torch.rand(n, m) > 0.5),
    ]  # fmt: skip
    return rng.choice(kinds)()


def allowed_of(mask: Any, n: int, m: int, q_pos: Any = None, k_pos: Any = None) -> Tensor | None:
    """(B or 1, H or 1, N, M) of a mask, by single pairs."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and (q_pos is not None or k_pos is not None):
        mask = masks.explicit(mask)  # looked up by position
    if isinstance(mask, Tensor):
        assert mask.dtype == torch.bool and mask.shape[-2:] == (n, m)
        return mask if mask.dim() == 4 else mask[:, None] if mask.dim() == 3 else mask[None, None]
    q_pos = torch.arange(n) if q_pos is None else q_pos
    k_pos = torch.arange(m) if k_pos is None else k_pos
    out = mask.at(q_pos, k_pos)
    return out.reshape((1,) * (4 - out.dim()) + tuple(out.shape))


def weights_of(scores: Tensor, normalizer: Any) -> Tensor:
    name = normalizer if isinstance(normalizer, str) else normalizer.name
    seen = scores > -math.inf
    if name == "softmax":
        return torch.softmax(scores, -1).nan_to_num(0.0)
    if name == "sigmoid":
        bias = 0.0 if isinstance(normalizer, str) else normalizer.bias
        return torch.sigmoid(scores + bias) * seen
    if name == "relu":
        divisor = 1.0 if isinstance(normalizer, str) else normalizer.divisor
        return scores.clamp(min=0) / divisor
    if name == "softplus_l1":
        a = torch.log1p(torch.exp(scores)) * seen
        return (a / a.sum(-1, keepdim=True)).nan_to_num(0.0)
    if name == "clipped_softmax":
        g, z = (-0.03, 1.0) if isinstance(normalizer, str) else (normalizer.gamma, normalizer.zeta)
        return (torch.softmax(scores, -1).nan_to_num(0.0) * (z - g) + g).clamp(0, 1) * seen
    return normalizers.as_normalizer(normalizer).weights(scores)


def dense(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, valid: Any = None, bias: Any = None,
    scale: Any = None, normalizer: Any = "softmax",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by its definition, in float64; strict about what it is given."""
    assert q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype and q.is_floating_point()
    b, h, n, d = q.shape
    m = k.shape[2]
    assert k.shape[0] == v.shape[0] == b and k.shape[3] == d and v.shape[2] == m
    assert h % k.shape[1] == 0 and h % v.shape[1] == 0
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(h // k.shape[1], 1), v.repeat_interleave(h // v.shape[1], 1)
    assert scale is None or (not isinstance(scale, bool) and math.isfinite(scale))
    s = q @ k.transpose(-1, -2) * (d**-0.5 if scale is None else float(scale))
    if bias is not None:
        full = bias.double() if isinstance(bias, Tensor) else bias.dense().double()
        assert full.shape[-2:] == (n, m) and full.dim() in (2, 3, 4)
        full = full.reshape((1,) * (4 - full.dim()) + tuple(full.shape))
        assert full.shape[0] in (1, b) and full.shape[1] in (1, h)
        s = s + full
    if allowed is not None:
        assert allowed.shape[0] in (1, b) and allowed.shape[1] in (1, h)
        s = s.masked_fill(~allowed, -math.inf)
    if valid is not None:
        assert valid.dtype == torch.bool and valid.shape == (b, m)
        s = s.masked_fill(~valid[:, None, None], -math.inf)
    w = weights_of(s, normalizer)
    return w @ v, w


def attention_oracle(
    q, k, v, mask=None, valid=None, bias=None, scale=None, normalizer="softmax", dropout_p=0.0, q_pos=None, k_pos=None,
    backend=None, return_weights=False,
):  # fmt: skip
    assert dropout_p == 0
    for pos, size in ((q_pos, q.shape[2]), (k_pos, k.shape[2])):
        assert pos is None or (pos.shape[-1] == size and not pos.is_floating_point())
        assert pos is None or pos.dim() == 1 or pos.shape[0] in (1, q.shape[0])
        assert pos is None or pos.dim() < 3 or pos.shape[1] in (1, q.shape[1])
    allowed = allowed_of(mask, q.shape[2], k.shape[2], q_pos, k_pos)
    out, weights = dense(q, k, v, allowed, valid, bias, scale, normalizer)
    return (out, weights) if return_weights else out


def biases(rng: random.Random, b: int, h: int, n: int, m: int) -> Any:
    return rng.choice(
        [
            lambda: None, lambda: None, lambda: torch.randn(n, m), lambda: torch.randn(h, n, m),
            lambda: torch.randn(b, h, n, m), lambda: torch.randn(b, 1, n, m),
            lambda: positions.alibi(h, torch.arange(n), torch.arange(m)),
            lambda: positions.AxisBias([torch.randn(b, h, n, m)]),
            lambda: positions.RelativeBias(
                torch.randn(h, n + m - 1), coordinates((n,)), coordinates((m,)), (n - 1,), (n + m - 1,)
            ),
        ]
    )()  # fmt: skip


@target("ops.attention")
def attention(rng: random.Random) -> Call:
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    call = qkv(rng, dtype)
    b, h, n, _ = call["q"].shape
    m = call["k"].shape[2]
    mask = some_mask(rng, b, h, n, m)
    knows = mask is not None and (isinstance(mask, Tensor) or mask.extent() != (None, None))
    bias = biases(rng, b, h, n, m)
    if isinstance(bias, Tensor):
        bias = bias.to(dtype)
    call |= dict(
        mask=mask, valid=some_valid(rng, b, m), bias=bias, scale=some(rng, 0.3, lambda: rng.choice([0.5, 1.0, 0.0])),
        normalizer=rng.choice(["softmax", "softmax", "softmax", "sigmoid", "relu", "softplus_l1", "clipped_softmax"]),
        dropout_p=0.0, return_weights=rng.random() < 0.15,
        q_pos=None if knows else some(rng, 0.2, lambda: torch.randint(0, 9, rng.choice([(n,), (b, n), (b, h, n)]))),
        backend=rng.choice([None, None, "eager", "tiled"]),
    )  # fmt: skip
    if call["return_weights"]:
        call["backend"] = None
    return Call(ops.attention, call, attention_oracle)


@target("ops.attention_partial")
def attention_partial(rng: random.Random) -> Call:
    call = qkv(rng)
    b, h, n, _ = call["q"].shape
    m = call["k"].shape[2]
    call |= dict(mask=some_mask(rng, b, h, n, m), valid=some_valid(rng, b, m), bias=biases(rng, b, h, n, m), scale=0.5)
    return Call(
        lambda **kw: ops.attention_partial(**kw).finish(), call, attention_oracle, names=("q_pos", "k_pos", "backend")
    )


def eager64(fn: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """The specification of an operator in float64."""

    def oracle(**kw: Any) -> Any:
        def lift(x: Any) -> Any:
            if isinstance(x, State):
                return x.map(lift)
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        return fn(**{name: lift(x) for name, x in {**kw, **fixed}.items()})

    return oracle


@target("ops.linear_attention")
def linear(rng: random.Random) -> Call:
    causal = rng.random() < 0.7
    call = qkv(rng, same=True)
    b, h, n, d = call["q"].shape
    normalizer = rng.choice(["none", "sum", "subtract"])
    if normalizer == "sum":
        call["q"], call["k"] = call["q"].abs() + 0.1, call["k"].abs() + 0.1
    other = normalizer == "sum" and rng.random() < 0.3
    if other:
        call["denominator"] = (torch.rand(b, h, n, 3) + 0.1, torch.rand(b, call["k"].shape[1], n, 3) + 0.1)
    decay = rng.choice(
        [lambda: None, lambda: -torch.rand(h), lambda: -torch.rand(b, h, n), lambda: -torch.rand(b, h, n, d)][
            : 4 - other
        ]
    )()
    state = None
    if causal and rng.random() < 0.3:
        prior = dict(call)
        state = ops.linear_attention(**prior, normalizer=normalizer, return_state=True).state
    call |= dict(
        decay=decay, key_weights=some(rng, 0.3, lambda: torch.rand(b, n)), normalizer=normalizer, causal=causal,
        valid=some_valid(rng, b, n), state=state, chunk=rng.choice([None, 2, 5]), eps=rng.choice([0.0, 1e-6]),
        form=rng.choice([None, "recurrent"] if causal else [None]), return_state=False,
        cu_seqlens=None if state is not None else some(rng, 0.2, lambda: torch.tensor([0, n // 2, n])),
    )  # fmt: skip
    # A mechanism hands on the state that it keeps, which has its name.
    oracle = eager64(ops.linear_attention, form="eager")
    return Call(ops.linear_attention, call, oracle, tolerance=1e-4, allows=("another kind",))


@target("ops.neighborhood_attention")
def neighborhood(rng: random.Random) -> Call:
    rank = rng.choice([1, 1, 2])
    grid = tuple(rng.randint(3, 6) for _ in range(rank))
    h, hk, hv = heads(rng)
    b, d = rng.randint(1, 2), 4
    kernel = tuple(rng.randint(2, s) for s in grid)
    stride = tuple(rng.randint(1, w) for w in kernel)
    causal = tuple(rng.random() < 0.3 for _ in grid)
    call = dict(
        q=torch.randn(b, h, *grid, d), k=torch.randn(b, hk, *grid, d), v=torch.randn(b, hv, *grid, d),
        kernel_size=kernel, dilation=1, stride=stride, causal=causal, scale=some(rng, 0.3, lambda: 0.5),
        valid=None, dropout_p=0.0, backend=None, mask=None, border="clamp",
    )  # fmt: skip

    def oracle(q, k, v, kernel_size, dilation, stride, causal, scale, valid, dropout_p, backend, mask, border):
        assert border == "clamp" and dropout_p == 0 and mask is None
        grid = q.shape[2:-1]
        assert k.shape[2:-1] == v.shape[2:-1] == grid
        rule = masks.neighborhood(grid, kernel_size, dilation, stride, causal).dense(math.prod(grid))
        out, _ = dense(q.flatten(2, -2), k.flatten(2, -2), v.flatten(2, -2), rule[None, None], valid, None, scale)
        return out.reshape(*out.shape[:2], *grid, out.shape[-1])

    return Call(ops.neighborhood_attention, call, oracle, names=("grid",), fixed=("border",))


def group_mask(partition: Partition, b: int, h: int, n: int, m: int) -> Tensor:
    allowed = torch.zeros(b, h, n, m, dtype=torch.bool)
    q_index = partition.q_index
    k_index = q_index if partition.k_index is None else partition.k_index

    def of(index: Tensor, i: int, j: int) -> Tensor:
        index = index.reshape((1,) * (4 - index.dim()) + tuple(index.shape))
        assert index.shape[0] in (1, b) and index.shape[1] in (1, h)
        return index[i if index.shape[0] > 1 else 0, j if index.shape[1] > 1 else 0]

    for i in range(b):
        for j in range(h):
            for q, k in zip(of(q_index, i, j).tolist(), of(k_index, i, j).tolist(), strict=True):
                assert max(q) < n and max(k) < m
                for a in q:
                    for c in k:
                        if a >= 0 and c >= 0:
                            allowed[i, j, a, c] = True
    return allowed


@target("ops.partition_attention")
def partition_attention(rng: random.Random) -> Call:
    call = qkv(rng, same=True)
    b, h, n, _ = call["q"].shape
    groups = rng.choice([g for g in range(1, n + 1) if n % g == 0])
    shape = rng.choice([(), (h,), (b, h)])
    index = torch.stack([torch.randperm(n) for _ in range(math.prod(shape))]).reshape(*shape, groups, n // groups)
    call |= dict(
        partition=Partition(index), valid=some_valid(rng, b, n), mask=some(rng, 0.3, masks.causal),
        scale=some(rng, 0.3, lambda: 0.5), dropout_p=0.0, bias=None,
    )  # fmt: skip

    def oracle(q, k, v, partition, valid, mask, scale, dropout_p, bias):
        assert bias is None and dropout_p == 0
        allowed = group_mask(partition, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        more = allowed_of(mask, q.shape[2], k.shape[2])
        return dense(q, k, v, allowed if more is None else allowed & more, valid, None, scale)[0]

    return Call(ops.partition_attention, call, oracle, names=("q_index", "k_index", "backend"))


@target("ops.window_attention")
def window_attention(rng: random.Random) -> Call:
    grid, window = rng.choice([((4, 4), (2, 2)), ((6,), (3,)), ((2, 6), (1, 3)), ((8,), (8,))])
    n = math.prod(grid)
    h, hk, hv = heads(rng)
    b, kind = rng.randint(1, 2), rng.choice(["block", "grid"])
    call = dict(
        q=torch.randn(b, h, n, 4), k=torch.randn(b, hk, n, 4), v=torch.randn(b, hv, n, 4), grid=grid,
        window_size=window, kind=kind, valid=some_valid(rng, b, n), mask=None, dropout_p=0.0, scale=None,
    )  # fmt: skip

    def oracle(q, k, v, grid, window_size, kind, valid, mask, dropout_p, scale):
        assert dropout_p == 0
        allowed = group_mask(window_partition(grid, window_size, kind), q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        more = allowed_of(mask, q.shape[2], k.shape[2])
        return dense(q, k, v, allowed if more is None else allowed & more, valid, None, scale)[0]

    return Call(ops.window_attention, call, oracle, names=("backend",))


@target("ops.block_sparse_attention")
def block_sparse(rng: random.Random) -> Call:
    call = qkv(rng)
    b, h, n, _ = call["q"].shape
    m = call["k"].shape[2]
    qb, kb = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    chosen = torch.rand(b, h, -(-n // qb), -(-m // kb)) > 0.4
    plan = ops.BlockPlan.from_mask(chosen, qb, kb, n, m)
    call |= dict(
        plan=plan, valid=some_valid(rng, b, m), mask=some(rng, 0.3, masks.causal), scale=some(rng, 0.3, lambda: 0.5),
        bias=biases(rng, b, h, n, m), order=rng.choice([None, "queries", "keys"]),
    )  # fmt: skip

    def oracle(q, k, v, plan, valid, mask, scale, bias, order):
        allowed = allowed_of(plan.mask(), q.shape[2], k.shape[2])
        more = allowed_of(mask, q.shape[2], k.shape[2])
        return dense(q, k, v, allowed if more is None else allowed & more, valid, bias, scale)[0]

    return Call(ops.block_sparse_attention, call, oracle, names=("q_pos", "k_pos", "backend"))


@target("ops.BlockPlan")
def block_plan(rng: random.Random) -> Call:
    n, m, qb, kb = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 3), rng.randint(1, 3)
    chosen = torch.rand(2, 1, -(-n // qb), -(-m // kb)) > 0.4

    def sane(plan: Any, given: dict[str, Any]) -> None:
        assert torch.equal(plan.chosen(), given["chosen"].reshape(plan.chosen().shape)), "other blocks are chosen"

    return Call(ops.BlockPlan.from_mask, dict(chosen=chosen, q_block=qb, k_block=kb, n=n, m=m), sane=sane)


@target("ops.split_decoding")
def split_decoding(rng: random.Random) -> Call:
    call = qkv(rng)
    b, _, n, _ = call["q"].shape
    m = call["k"].shape[2]
    causal = rng.random() < 0.4
    if causal:
        call["q"] = call["q"][:, :, : min(n, m)]
        n = call["q"].shape[2]
    call |= dict(
        lengths=some(rng, 0.4, lambda: torch.randint(n if causal else 0, m + 1, (b,))), causal=causal,
        scale=some(rng, 0.3, lambda: 0.5), tile=rng.choice([None, 2, 3]), q_tile=rng.choice([None, 1, 2]),
        workers=rng.choice([None, 1, 3]), schedule=rng.choice(["stream-k", "fixed"]), splits=None,
    )  # fmt: skip
    if call["schedule"] == "fixed":
        call["splits"] = rng.choice([None, 1, 2])

    def oracle(q, k, v, lengths, causal, scale, tile, q_tile, workers, schedule, splits):
        n, m = q.shape[2], k.shape[2]
        lengths = torch.full((q.shape[0],), m) if lengths is None else torch.as_tensor(lengths)
        assert lengths.shape == (q.shape[0],) and bool((lengths >= 0).all()) and bool((lengths <= m).all())
        allowed = torch.arange(m) < lengths[:, None, None, None]
        if causal:
            allowed = allowed & (torch.arange(m) <= (lengths[:, None] - n + torch.arange(n))[:, None, :, None])
        return dense(q, k, v, allowed.expand(-1, 1, n, m), None, None, scale)[0]

    return Call(ops.split_decoding, call, oracle, names=("backend",))


@target("ops.reduced_attention")
def reduced(rng: random.Random) -> Call:
    call = qkv(rng)
    b, m = call["k"].shape[0], call["k"].shape[2]
    call |= dict(
        block=rng.randint(1, 4), reduce=rng.choice(["mean", "last"]), valid=some_valid(rng, b, m),
        mask=some(rng, 0.3, masks.causal), scale=some(rng, 0.3, lambda: 0.5), backend=None,
    )  # fmt: skip
    return Call(ops.reduced_attention, call, eager64(ops.reduced_attention, backend="eager"), names=("partial",))


@target("ops.agent_attention")
def agent(rng: random.Random) -> Call:
    call = qkv(rng)
    b, h, n, d = call["q"].shape
    m, a = call["k"].shape[2], rng.randint(1, 4)
    call |= dict(
        agents=torch.randn(b, h, a, d), read_bias=some(rng, 0.3, lambda: torch.randn(h, a, m)),
        write_bias=some(rng, 0.3, lambda: torch.randn(b, h, n, a)), valid=some_valid(rng, b, m),
        agents_valid=some_valid(rng, b, a), scale=some(rng, 0.3, lambda: 0.5), dropout_p=0.0,
    )  # fmt: skip

    def oracle(q, k, v, agents, read_bias, write_bias, valid, agents_valid, scale, dropout_p):
        read, _ = dense(agents, k, v, None, valid, read_bias, scale)
        if not q.shape[2]:  # a bias of one row serves no queries as well
            write_bias = None
        return dense(q.double(), agents.double(), read, None, agents_valid, write_bias, scale)[0]

    return Call(ops.agent_attention, call, oracle, names=("backend",))


@target("ops.deformable_attention")
def deformable(rng: random.Random) -> Call:
    shapes = [(rng.randint(1, 4), rng.randint(1, 4)) for _ in range(rng.randint(1, 2))]
    b, h, n, p = rng.randint(1, 2), rng.choice([1, 2]), rng.randint(1, 5), rng.randint(1, 3)
    m = sum(x * y for x, y in shapes)
    call = dict(
        value=torch.randn(b, h, m, 3), spatial_shapes=shapes, valid=some_valid(rng, b, m),
        sampling_locations=torch.rand(b, h, n, len(shapes), p, 2) * 1.4 - 0.2,
        attention_weights=torch.rand(b, h, n, len(shapes), p), backend=rng.choice([None, "grid_sample"]),
    )  # fmt: skip
    return Call(ops.deformable_attention, call, eager64(ops.deformable_attention, backend="eager"))


@target("ops.deformable_attention_3d")
def deformable_3d(rng: random.Random) -> Call:
    shapes = [(rng.randint(1, 3), rng.randint(1, 3)) for _ in range(rng.randint(1, 2))]
    b, h, n, p = rng.randint(1, 2), rng.choice([1, 2]), rng.randint(1, 4), rng.randint(1, 3)
    m = sum(x * y for x, y in shapes)
    call = dict(
        value=torch.randn(b, h, m, 3), depth=torch.rand(b, 1, m, 4), spatial_shapes=shapes,
        sampling_locations=torch.rand(b, h, n, len(shapes), p, 3) * 1.4 - 0.2,
        attention_weights=torch.rand(b, h, n, len(shapes), p), valid=some_valid(rng, b, m),
    )  # fmt: skip
    return Call(
        ops.deformable_attention_3d, call, eager64(ops.deformable_attention_3d, backend="eager"),
        names=("backend", "return_depth_score"),
    )  # fmt: skip


@target("ops.toeplitz_attention")
def toeplitz(rng: random.Random) -> Call:
    call = qkv(rng)
    call["q"], call["k"] = call["q"].abs() + 0.1, call["k"].abs() + 0.1
    b, h, n, _ = call["q"].shape
    m = call["k"].shape[2]
    call |= dict(bias=torch.randn(rng.choice([1, h]), n + m - 1), valid=some_valid(rng, b, m), positive=True, grid=None)
    call["form"] = rng.choice([None, "fft64"])
    return Call(ops.toeplitz_attention, call, eager64(ops.toeplitz_attention, form="eager"), tolerance=1e-3)


@target("ops.selective_scan")
def scan(rng: random.Random) -> Call:
    b, n, groups, size = rng.randint(1, 2), rng.randint(1, 9), rng.choice([1, 2]), rng.randint(1, 3)
    e = groups * rng.randint(1, 3)
    part = (b, n, size) if groups == 1 and rng.random() < 0.5 else (b, n, groups, size)
    positions = some(rng, 0.3, lambda: torch.stack([torch.randperm(n + 3)[:n].sort().values for _ in range(b)]))
    longer = positions is not None and rng.random() < 0.5
    call = dict(
        u=torch.randn(b, n, e), delta=torch.rand(b, n + 3 if longer else n, e), A=-torch.rand(e, size),
        B=torch.randn(*part), C=torch.randn(*part), D=some(rng, 0.5, lambda: torch.randn(e)),
        z=some(rng, 0.5, lambda: torch.randn(b, n, e)), delta_bias=some(rng, 0.5, lambda: torch.rand(e)),
        delta_softplus=rng.random() < 0.5, valid=some_valid(rng, b, n), positions=positions,
        cu_seqlens=None if positions is not None else some(rng, 0.3, lambda: [0, n // 2, n]),
        state=some(rng, 0.3, lambda: State({"h": torch.randn(b, e, size)})), chunk=rng.choice([None, 1, 4]),
        backend=rng.choice([None, "chunked"]),
    )  # fmt: skip
    return Call(ops.selective_scan, call, eager64(ops.selective_scan, backend="eager"))


@target("ops.channel_attention")
def channel(rng: random.Random) -> Call:
    b, h, n, d = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, 5)
    call = {name: torch.randn(b, h, n, d) for name in "qkv"}
    call |= dict(
        scale=rng.choice([None, 0.5]), l2=rng.random() < 0.3, valid=some_valid(rng, b, n),
        normalizer=rng.choice(["softmax", "relu"]), return_weights=rng.random() < 0.2,
    )  # fmt: skip
    return Call(ops.channel_attention, call, eager64(ops.channel_attention, backend="eager"), names=("backend",))


@target("ops.depthwise")
def depthwise(rng: random.Random) -> Call:
    rank = rng.choice([1, 2])
    grid = [rng.randint(2, 5) for _ in range(rank)]
    b, c = rng.randint(1, 2), 3
    kernel = [rng.choice([1, 3]) for _ in range(rank)]
    call = dict(
        x=torch.randn(b, *grid, c), weight=torch.randn(c, 1, *kernel), bias=some(rng, 0.5, lambda: torch.randn(c)),
        dilation=rng.choice([1, 2]), valid=some(rng, 0.3, lambda: torch.rand(b, *grid) > 0.3),
    )  # fmt: skip
    return Call(ops.depthwise, call, eager64(ops.depthwise, backend="eager"), names=("backend",))


@target("ops.use_backend")
def use_backend(rng: random.Random) -> Call:
    def run(name: Any) -> Tensor:
        with ops.use_backend(name):
            x = torch.ones(1, 1, 3, 2)
            return ops.attention(x, x, x)

    return Call(run, dict(name=rng.choice(["eager", "sdpa", "tiled"])), names=("backend", "name", "use_backend"))


@target("ops.voxels.sparse_conv")
def voxel_conv(rng: random.Random) -> Call:
    n, taps, c, out = rng.randint(1, 7), rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 4)
    call = dict(
        x=torch.randn(n, c), weight=torch.randn(taps, c, out), table=torch.randint(0, n + 1, (rng.randint(0, 6), taps)),
        bias=some(rng, 0.5, lambda: torch.randn(out)),
    )  # fmt: skip
    return Call(voxels.sparse_conv, call, eager64(voxels.sparse_conv))


@target("ops.voxels.sparse_depthwise")
def voxel_depthwise(rng: random.Random) -> Call:
    n, taps, c = rng.randint(1, 7), rng.randint(1, 4), rng.randint(1, 4)
    call = dict(
        x=torch.randn(n, c), weight=torch.randn(taps, c), table=torch.randint(0, n + 1, (rng.randint(0, 6), taps)),
    )  # fmt: skip
    return Call(voxels.sparse_depthwise, call, eager64(voxels.sparse_depthwise))


@target("ops.nystrom_attention")
def nystrom(rng: random.Random) -> Call:
    b, h, n, m, d = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 8), rng.randint(1, 4), rng.randint(1, 4)
    call = dict(
        q=torch.randn(b, h, n, d), landmarks=torch.randn(b, h, m, d), v=torch.randn(b, h, n, rng.choice([d, 3])),
        valid=some_valid(rng, b, n), steps=rng.choice([4, 20]),
    )  # fmt: skip
    return Call(ops.nystrom_attention, call, eager64(ops.nystrom_attention), tolerance=1e-3)
