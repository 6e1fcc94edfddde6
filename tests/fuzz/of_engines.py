"""Calls of the operators' further entries and helpers: partials, plans, policies, schedules, features, modulation."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlib import masks, ops
from attnlib.grids import Partition
from attnlib.ops import block_policies, block_sparse, feature_maps, modulation, neighborhood_sim, reduced
from attnlib.ops.split_decoding import fixed_split, flash_decoding_splits, lean_launch
from attnlib.ops.split_decoding import stream_k as stream_of

from .engine import Call, Either, family, target
from .of_ops import (
    allowed_of,
    attention_oracle,
    biases,
    dense,
    eager64,
    group_mask,
    heads,
    qkv,
    some,
    some_mask,
    some_valid,
)

META = ("on meta",)

# ---- partials of engines


@family("ops.partials")
def linear_partial(rng: random.Random) -> Call:
    call = qkv(rng, same=True)
    call["q"], call["k"] = call["q"].abs() + 0.1, call["k"].abs() + 0.1
    b, h, n, _ = call["q"].shape
    causal = rng.random() < 0.7
    call |= dict(
        decay=rng.choice([None, -torch.rand(h), -torch.rand(b, h, n)]), causal=causal,
        key_weights=some(rng, 0.3, lambda: torch.rand(b, n)), valid=some_valid(rng, b, n), chunk=rng.choice([None, 2]),
        form=rng.choice([None, "recurrent"] if causal else [None]),
    )  # fmt: skip

    def oracle(**kw: Any) -> Any:
        return eager64(ops.linear_attention, form="eager", normalizer="sum")(**kw)

    return Call(
        lambda **kw: ops.linear_partial(**kw).finish(), call, oracle, names=("cu_seqlens", "state"), tolerance=1e-4
    )  # fmt: skip


@family("ops.partials")
def neighborhood_partial(rng: random.Random) -> Call:
    grid = tuple(rng.randint(3, 6) for _ in range(rng.choice([1, 2])))
    h, hk, hv = heads(rng)
    b = rng.randint(1, 2)
    kernel = tuple(rng.randint(2, s) for s in grid)
    call = dict(
        q=torch.randn(b, h, *grid, 4), k=torch.randn(b, hk, *grid, 4), v=torch.randn(b, hv, *grid, 4),
        kernel_size=kernel, dilation=1, stride=1, causal=False, scale=some(rng, 0.3, lambda: 0.5), valid=None,
    )  # fmt: skip

    def oracle(q, k, v, kernel_size, dilation, stride, causal, scale, valid):
        grid = q.shape[2:-1]
        assert k.shape[2:-1] == v.shape[2:-1] == grid
        rule = masks.neighborhood(grid, kernel_size, dilation, stride, causal).dense(math.prod(grid))
        return dense(q.flatten(2, -2), k.flatten(2, -2), v.flatten(2, -2), rule[None, None], valid, None, scale)[0]

    return Call(lambda **kw: ops.neighborhood_partial(**kw).finish(), call, oracle, names=("grid", "border"))


@family("ops.partials")
def block_sparse_partial(rng: random.Random) -> Call:
    call = qkv(rng)
    b, h, n, _ = call["q"].shape
    m = call["k"].shape[2]
    plan = a_plan(rng, b, h, n, m)
    call |= dict(plan=plan, valid=some_valid(rng, b, m), scale=0.5, order=rng.choice([None, "queries", "keys"]))

    def oracle(q, k, v, plan, valid, scale, order):
        return dense(q, k, v, allowed_of(plan.mask(), q.shape[2], k.shape[2]), valid, None, scale)[0]

    return Call(
        lambda **kw: ops.block_sparse_partial(**kw).finish(), call, oracle,
        names=("q_pos", "k_pos", "backend", "mask", "bias"),
    )  # fmt: skip


@family("ops.partials")
def split_partial(rng: random.Random) -> Call:
    call = qkv(rng)
    b, _, n, _ = call["q"].shape
    m = call["k"].shape[2]
    call |= dict(
        lengths=some(rng, 0.4, lambda: torch.randint(0, m + 1, (b,))), causal=False, scale=0.5,
        tile=rng.choice([None, 2, 3]), q_tile=rng.choice([None, 1, 2]), workers=rng.choice([None, 1, 3]),
    )  # fmt: skip

    def oracle(q, k, v, lengths, causal, scale, tile, q_tile, workers):
        n, m = q.shape[2], k.shape[2]
        lengths = torch.full((q.shape[0],), m) if lengths is None else torch.as_tensor(lengths)
        assert lengths.shape == (q.shape[0],) and bool((lengths >= 0).all()) and bool((lengths <= m).all())
        allowed = torch.arange(m) < lengths[:, None, None, None]
        if causal:
            allowed = allowed & (torch.arange(m) <= (lengths[:, None] - n + torch.arange(n))[:, None, :, None])
        return dense(q, k, v, allowed.expand(-1, 1, n, m), None, None, scale)[0]

    return Call(lambda **kw: ops.split_partial(**kw).finish(), call, oracle, names=("backend", "schedule", "splits"))


@family("ops.partials")
def merged_halves(rng: random.Random) -> Call:
    """Attention over two halves of the keys, merged, is attention over all."""
    call = qkv(rng)
    m = call["k"].shape[2]
    call |= dict(at=rng.randint(0, m))

    def run(q, k, v, at):
        parts = [ops.attention_partial(q, k[:, :, s], v[:, :, s]) for s in (slice(0, at), slice(at, None))]
        return parts[0].merge(parts[1]).finish()

    return Call(run, call, lambda q, k, v, at: dense(q, k, v)[0], fixed=call)


@family("ops.partials")
def naive(rng: random.Random) -> Call:
    call = qkv(rng)
    b, h, n, _ = call["q"].shape
    m = call["k"].shape[2]
    call |= dict(
        mask=some_mask(rng, b, h, n, m), valid=some_valid(rng, b, m), bias=biases(rng, b, h, n, m),
        normalizer=rng.choice(["softmax", "sigmoid", "relu"]), return_weights=rng.random() < 0.3,
    )  # fmt: skip

    def oracle(**given: Any) -> Any:  # whatever the precision of each
        return attention_oracle(**{k: v.double() if k in "qkv" else v for k, v in given.items()})

    return Call(ops.naive.attention, call, oracle, names=("q_pos", "k_pos", "backend"), tolerance=1e-9)


# ---- plans of blocks and their policies


def a_plan(rng: random.Random, b: int, h: int, n: int, m: int) -> ops.BlockPlan:
    qb, kb = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    chosen = torch.rand(rng.choice([1, b]), rng.choice([1, h]), -(-n // qb), -(-m // kb)) > 0.4
    return ops.BlockPlan.from_mask(chosen, qb, kb, n, m)


@family("ops.blocks")
def plan_by_index(rng: random.Random) -> Call:
    n, m, qb, kb = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 3), rng.randint(1, 3)
    rows, blocks = -(-n // qb), -(-m // kb)
    lead = rng.choice([(), (2,), (2, 3)])
    width = rng.randint(0, blocks)
    index = torch.stack([torch.randperm(blocks)[:width] for _ in range(math.prod(lead) * rows)])
    index = index.reshape(*lead, rows, width)
    count = rng.choice([None, torch.randint(0, width + 1, (*lead, rows))])

    def sane(plan: Any, given: dict[str, Any]) -> None:
        index, count = plan.index, plan.count
        blocks = -(-(given["n"] if given["m"] is None else given["m"]) // given["k_block"])
        lead = index.shape[:-1] if count is None else torch.broadcast_shapes(index.shape[:-1], count.shape)
        rows = index.expand(*lead, -1).flatten(0, 2).tolist()
        counts = [len(r) for r in rows] if count is None else count.expand(lead).flatten().tolist()
        want = [sorted(r[:c]) for r, c in zip(rows, counts, strict=True)]
        assert all(len(set(r)) == len(r) and all(0 <= k < blocks for k in r) for r in want), "no choice of blocks"
        assert all(0 <= c <= index.shape[-1] for c in counts), "no counts"
        got = [[j for j, yes in enumerate(r) if yes] for r in plan.chosen().flatten(0, 2).tolist()]
        assert got == want, "other blocks are chosen"

    kwargs = dict(index=index, q_block=qb, k_block=kb, n=n, m=m, count=count)
    return Call(ops.BlockPlan, kwargs, sane=sane, allows=META)


@family("ops.blocks")
def plan_by_rows(rng: random.Random) -> Call:
    n, m, qb, kb, h = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 2)
    chosen = torch.rand(rng.randint(1, 2), h, -(-n // qb), -(-m // kb)) > 0.4
    row_ptr, cols = ops.BlockPlan.from_mask(chosen, qb, kb, n, m).csr()

    def sane(plan: Any, given: dict[str, Any]) -> None:
        again_ptr, again = plan.csr()
        assert torch.equal(again_ptr, given["row_ptr"]) and torch.equal(again, given["cols"]), "other blocks"

    kwargs = dict(row_ptr=row_ptr, cols=cols, q_block=qb, k_block=kb, n=n, m=m, heads=h)
    return Call(ops.BlockPlan.from_csr, kwargs, sane=sane)


@family("ops.blocks")
def full_plan(rng: random.Random) -> Call:
    def sane(plan: Any, given: dict[str, Any]) -> None:
        assert bool(plan.chosen().all()) and plan.chosen().shape[-2:] == (plan.q_blocks, plan.k_blocks)
        if plan.chosen().numel():
            assert float(plan.density) == 1.0, "all pairs are not all"

    kwargs = dict(n=rng.randint(0, 9), m=rng.randint(0, 9), q_block=rng.randint(1, 4), k_block=rng.randint(1, 4))
    return Call(ops.BlockPlan.full, kwargs, sane=sane)


@family("ops.blocks")
def pool_blocks(rng: random.Random) -> Call:
    b, n = rng.randint(1, 2), rng.randint(1, 7)

    def oracle(x: Tensor, block: Any, valid: Any) -> Any:
        assert block >= 1 and x.dim() == 4
        valid = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool) if valid is None else valid
        assert valid.dtype == torch.bool and valid.shape == (x.shape[0], x.shape[2])
        blocks = -(-x.shape[2] // block)
        means = torch.zeros(*x.shape[:2], blocks, x.shape[3], dtype=torch.float64)
        some = torch.zeros(x.shape[0], blocks, dtype=torch.bool)
        for i, j in itertools.product(range(x.shape[0]), range(blocks)):
            there = valid[i, j * block : (j + 1) * block]
            if there.any():
                some[i, j] = True
                means[i, :, j] = x[i, :, j * block : (j + 1) * block][:, there].double().mean(1)
        return means, some

    kwargs = dict(x=torch.randn(b, 2, n, 3), block=rng.randint(1, 4), valid=some_valid(rng, b, n))
    return Call(block_policies.pool_blocks, kwargs, oracle, allows=META)


@family("ops.blocks")
def block_affinity(rng: random.Random) -> Call:
    call = qkv(rng)
    del call["v"]
    b, _, n, _ = call["q"].shape
    m = call["k"].shape[2]
    call |= dict(
        q_block=rng.randint(1, 3), k_block=rng.randint(1, 3), scale=rng.choice([1.0, 0.5]),
        q_valid=some_valid(rng, b, n), valid=some_valid(rng, b, m),
    )  # fmt: skip

    def oracle(q, k, q_block, k_block, scale, q_valid, valid):
        assert q.shape[0] == k.shape[0] and q.shape[1] % k.shape[1] == 0 and q.shape[3] == k.shape[3]
        q_mean, _ = block_policies.pool_blocks(q.double(), int(q_block), q_valid)
        k_mean, there = block_policies.pool_blocks(k.double(), int(k_block), valid)
        scores = float(scale) * q_mean @ k_mean.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        return scores if valid is None else scores.masked_fill(~there[:, None, None], -math.inf)

    return Call(block_policies.block_affinity, call, oracle)


@family("ops.blocks")
def own_blocks(rng: random.Random) -> Call:
    def oracle(n, q_block, k_block):
        n, q_block, k_block = int(n), int(q_block), int(k_block)
        out = torch.zeros(-(-n // q_block), -(-n // k_block), dtype=torch.bool)
        for t in range(n):
            out[t // q_block, t // k_block] = True
        assert n >= 0 and q_block >= 1 and k_block >= 1
        return out

    kwargs = dict(n=rng.randint(0, 9), q_block=rng.randint(1, 3), k_block=rng.randint(1, 3))
    return Call(block_policies.own_blocks, kwargs, oracle)


def _scores(rng: random.Random) -> tuple[Tensor, dict[str, Any]]:
    n, m, qb, kb = rng.randint(1, 8), rng.randint(1, 8), rng.randint(1, 3), rng.randint(1, 3)
    scores = torch.randn(rng.randint(1, 2), rng.randint(1, 2), -(-n // qb), -(-m // kb))
    shape = scores.shape
    return scores, dict(
        q_block=qb, k_block=kb, n=n, m=m,
        forced=some(rng, 0.3, lambda: torch.rand(shape) > 0.8), allowed=some(rng, 0.3, lambda: torch.rand(shape) > 0.2),
    )  # fmt: skip


def _spread(t: Any, shape: Any, fill: bool) -> Tensor:
    if t is None:
        return torch.full(shape, fill)
    assert t.dtype == torch.bool
    return t.expand(shape)


@family("ops.blocks")
def topk_blocks(rng: random.Random) -> Call:
    scores, call = _scores(rng)

    def sane(plan: Any, given: dict[str, Any]) -> None:
        s, k = given["scores"].double(), int(given["topk"])
        forced, allowed = _spread(given["forced"], s.shape, False), _spread(given["allowed"], s.shape, True)
        s = s.masked_fill(forced, math.inf).masked_fill(~allowed, -math.inf)
        chosen = plan.chosen().expand(s.shape)
        assert plan.chosen().shape[-2:] == s.shape[-2:], "a plan for other blocks"
        if not s.numel():
            return
        assert not (chosen & ~allowed).any(), "a block is chosen that is not allowed"
        rows, nk = s.shape[2], s.shape[3]
        scopes = {"row": (0, 1, 2), "head": (0, 1), "all": (0,)}[given["per"]]
        budget = k * math.prod(size for i, size in enumerate(s.shape[:3]) if i not in scopes)
        flat = s.flatten(len(scopes)) if given["per"] != "row" else s
        picked = chosen.flatten(len(scopes)) if given["per"] != "row" else chosen
        for one, yes in zip(flat.reshape(-1, flat.shape[-1]), picked.reshape(-1, flat.shape[-1]), strict=True):
            able = int((one > -math.inf).sum())
            assert int(yes.sum()) == min(budget, able), f"{int(yes.sum())} blocks are chosen of {budget} and {able}"
            if yes.any() and not yes.all():
                assert one[yes].min() >= one[~yes].max(), "a better block is left out"
        assert rows and nk

    kwargs = dict(scores=scores, topk=rng.randint(1, 3), **call, per=rng.choice(["row", "head", "all"]))
    return Call(block_policies.topk_blocks, kwargs, sane=sane, names=("chosen",), allows=META)


@family("ops.blocks")
def threshold_blocks(rng: random.Random) -> Call:
    scores, call = _scores(rng)

    def sane(plan: Any, given: dict[str, Any]) -> None:
        shape = given["scores"].shape
        forced, allowed = _spread(given["forced"], shape, False), _spread(given["allowed"], shape, True)
        chosen = plan.chosen().expand(shape)
        assert not (chosen & ~allowed).any(), "a block is chosen that is not allowed"
        assert not (forced & allowed & ~chosen).any(), "a forced block is left out"
        assert 0 < given["threshold"] <= 1 and given["at_least"] >= 0
        if given["threshold"] == 1:
            assert torch.equal(chosen, allowed), "not everything is chosen"

    kwargs = dict(
        scores=scores, threshold=rng.choice([0.3, 0.7, 1.0]), **call, per=rng.choice(["row", "block", "head", "all"]),
        weigh=rng.choice(["minmax", "softmax"]), at_least=rng.randint(0, 1),
    )  # fmt: skip
    return Call(block_policies.threshold_blocks, kwargs, sane=sane, names=("chosen",), allows=META)


@family("ops.blocks")
def gather_blocks(rng: random.Random) -> Call:
    b, h, m = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 7)
    plan = a_plan(rng, b, h, 4, m)

    def oracle(x: Tensor, plan: Any) -> Tensor:
        assert x.dim() == 4 and x.shape[2] == plan.m and plan.index.shape[0] in (1, x.shape[0])
        assert plan.index.shape[1] in (1, x.shape[1])
        slots = plan.slots()
        index = plan.index.expand(*x.shape[:2], -1, -1)
        keep = slots.expand(index.shape)
        padded = F.pad(x, (0, 0, 0, plan.k_blocks * plan.k_block - x.shape[2])).unflatten(2, (-1, plan.k_block))
        out = torch.zeros(*index.shape, plan.k_block, x.shape[3], dtype=x.dtype)
        for i, j, r, s in itertools.product(*map(range, index.shape)):
            out[i, j, r, s] = padded[i, j, int(index[i, j, r, s]) if keep[i, j, r, s] else 0]
        return out

    kwargs = dict(x=torch.randn(b, h, m, 3), plan=plan)
    spread = ("one sample more",) if plan.index.shape[0] == 1 and b == 2 else ()
    return Call(block_sparse.gather_blocks, kwargs, oracle, allows=("complex", "booleans", "integers", *spread))


@family("ops.blocks")
def block_recall(rng: random.Random) -> Call:
    call = qkv(rng)
    del call["v"]
    b, h, n, _ = call["q"].shape
    m = call["k"].shape[2]
    call |= dict(
        plan=a_plan(rng, b, h, n, m), valid=some_valid(rng, b, m), mask=some(rng, 0.3, masks.causal),
        scale=some(rng, 0.3, lambda: 0.5),
    )  # fmt: skip

    def oracle(q, k, plan, valid, mask, scale):
        allowed = allowed_of(mask, q.shape[2], k.shape[2])
        weights = dense(q, k, k, allowed, valid, None, scale)[1]
        got = (weights * allowed_of(plan.mask(), q.shape[2], k.shape[2])).sum(-1)
        return torch.where(weights.sum(-1) == 0, 1.0, got)

    return Call(block_sparse.block_recall, call, oracle, names=("bias",))


@family("ops.blocks")
def rectangular_partition(rng: random.Random) -> Call:
    """Groups of queries that read other groups of keys, with holes."""
    call = qkv(rng)
    b, h, n, _ = call["q"].shape
    m = call["k"].shape[2]
    order = torch.randperm(n)
    groups = rng.randint(1, n)
    size = -(-n // groups)
    q_index = F.pad(order, (0, groups * size - n), value=-1).view(groups, size)
    k_index = torch.randint(-1, m, (groups, rng.randint(1, 3)))
    # A key may stand in many groups, but in one group once.
    k_index = torch.stack(
        [torch.tensor((sorted({*r} - {-1}) + [-1] * 9)[: k_index.shape[1]]) for r in k_index.tolist()]
    )
    call |= dict(partition=Partition(q_index, k_index), valid=some_valid(rng, b, m), scale=0.5)

    def oracle(q, k, v, partition, valid, scale):
        allowed = group_mask(partition, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return dense(q, k, v, allowed, valid, None, scale)[0]

    return Call(ops.partition_attention, call, oracle, names=("q_index", "k_index", "backend"))


# ---- schedules of split decoding and tiles of neighbourhoods


@family("ops.schedules")
def stream_k(rng: random.Random) -> Call:
    def sane(s: Any, given: dict[str, Any]) -> None:
        tiles = [int(t) for t in given["tiles"]]
        seen = [[0] * t for t in tiles]
        for pieces in s.work:
            for p in pieces:
                for i in range(p.first, p.last):
                    seen[p.output][i] += 1
        assert all(c == 1 for row in seen for c in row), "a tile is computed twice or not at all"
        assert s.workers == given["workers"] and s.total == sum(tiles) and sum(s.loads) == s.total
        if given.get("splits", "even") == "even":
            assert max(s.loads) - min(s.loads) <= 1, "loads differ"

    tiles = [rng.randint(0, 6) for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.5:
        return Call(stream_of, dict(tiles=tiles, workers=rng.randint(1, 5)), sane=sane)
    kwargs = dict(tiles=tiles, workers=rng.randint(1, 5), splits=rng.choice([None, 1, 2]))
    return Call(fixed_split, kwargs, sane=sane, label="fixed_split")


@family("ops.schedules")
def launches(rng: random.Random) -> Call:
    if rng.random() < 0.5:
        kwargs = dict(outputs=rng.randint(1, 60), workers=rng.randint(1, 120), tiles=rng.randint(1, 70), most=128)

        def few(out: Any, given: dict[str, Any]) -> None:
            assert 1 <= out <= max(1, min(given["most"], given["workers"], given["tiles"])), f"{out} pieces"
            assert min(given["outputs"], given["tiles"], given["workers"], given["most"] + 0) >= 0

        return Call(flash_decoding_splits, kwargs, sane=few, label="flash_decoding_splits")

    def sane(out: Any, given: dict[str, Any]) -> None:
        total = given["outputs"] * given["tiles"]
        assert out.high * out.most + (out.programs - out.high) * (out.most - 1) == total, "tiles are lost"
        assert out.programs <= given["processors"] and out.splits >= 1

    kwargs = dict(outputs=rng.randint(1, 60), tiles=rng.randint(1, 70), processors=rng.randint(1, 120))
    return Call(lean_launch, kwargs, sane=sane)


@family("ops.schedules")
def visited_tiles(rng: random.Random) -> Call:
    grid = rng.choice([(8,), (12,), (4, 6)])

    def sane(out: Any, given: dict[str, Any]) -> None:
        grid = [int(s) for s in given["grid"]]
        rule = masks.neighborhood(
            grid, given["kernel_size"], given["dilation"], given["stride"], given["causal"]
        ).dense(math.prod(grid))
        assert out.visited <= out.q_tiles * out.kv_tiles, "more visits than tiles"
        if given["tiling"] == "flat":
            q, k = given["q_tile"], given["kv_tile"]
            visits = [
                sum(bool(rule[i : i + q, j : j + k].any()) for j in range(0, rule.shape[1], k))
                for i in range(0, rule.shape[0], q)
            ]
            assert (out.visited, out.most, out.q_tiles) == (sum(visits), max(visits), len(visits)), "other visits"

    tiling = rng.choice(["grid", "flat"])
    return Call(
        neighborhood_sim.visited_tiles,
        dict(grid=grid, kernel_size=rng.randint(2, 4), stride=rng.randint(1, 2), dilation=1,
             causal=rng.random() < 0.3, q_tile=rng.randint(1, 4), kv_tile=rng.randint(1, 4), tiling=tiling,
             kv_tiling="static" if tiling == "flat" else rng.choice(["static", "dynamic"])), sane=sane,
        names=("kernel",),
    )  # fmt: skip


# ---- feature maps


@family("ops.features")
def maps(rng: random.Random) -> Call:
    x = torch.randn(2, 3, 4)
    eps = 1e-12

    def halves(z: Tensor, f: Any, fullspace: bool) -> Tensor:
        z = z.double()
        return torch.cat([f(z), f(-z)], -1) if fullspace else f(z)

    def exp(z: Tensor, fullspace: bool, stable: bool, eps: float) -> Tensor:
        f = (lambda t: (t - t.amax(-1, keepdim=True)).exp()) if stable else torch.exp
        return halves(z, f, fullspace).clamp(min=float(eps))

    kinds: list[Any] = [
        (feature_maps.elu1, dict(x=x), lambda x: F.elu(x.double()) + 1),
        (feature_maps.exp_features, dict(z=x, fullspace=True, stable=rng.random() < 0.5, eps=eps), exp),
        (
            feature_maps.softmax_features, dict(z=x, fullspace=rng.random() < 0.5, eps=eps),
            lambda z, fullspace, eps: halves(z, lambda t: t.softmax(-1), fullspace).clamp(min=float(eps)),
        ),
        (
            feature_maps.joint_softmax_features, dict(z=x),
            lambda z: torch.cat([2 * z.double(), -2 * z.double()], -1).softmax(-1),
        ),
    ]  # fmt: skip
    fn, kwargs, oracle = rng.choice(kinds)
    return Call(fn, kwargs, oracle, label=fn.__name__, allows=META)


@family("ops.features")
def random_features(rng: random.Random) -> Call:
    kwargs = dict(x=torch.randn(2, 5, 3), directions=torch.randn(4, 3))
    if rng.random() < 0.5:

        def trigonometric(x: Tensor, directions: Tensor) -> Tensor:
            x, w = x.double(), directions.double()
            assert w.dim() == 2 and len(w)
            z = x @ w.t()
            return torch.cat([z.sin(), z.cos()], -1) * (x.square().sum(-1, keepdim=True) / 2).exp() / len(w) ** 0.5

        return Call(
            feature_maps.trigonometric_random_features, kwargs, trigonometric, label="trigonometric", tolerance=1e-4
        )

    def positive(x: Tensor, directions: Tensor, stable: bool) -> Tensor:
        x, w = x.double(), directions.double()
        assert w.dim() == 2 and len(w)
        z = x @ w.t()
        z = z - (z.amax(-1, keepdim=True) if stable else x.square().sum(-1, keepdim=True) / 2)
        return z.exp() / len(w) ** 0.5

    kwargs |= dict(stable=rng.random() < 0.5)
    return Call(feature_maps.positive_random_features, kwargs, positive, tolerance=1e-4)


@family("ops.features")
def random_directions(rng: random.Random) -> Call:
    def sane(w: Tensor, given: dict[str, Any]) -> None:
        assert w.shape == (given["count"], given["dim"]), f"shape {tuple(w.shape)}"
        if given["orthogonal"] and w.numel():
            block = F.normalize(w[: given["dim"]].double(), dim=1)
            assert torch.allclose(block @ block.t(), torch.eye(len(block)).double(), atol=1e-4), "no right angles"

    return Call(
        feature_maps.random_directions,
        dict(count=rng.randint(1, 6), dim=rng.randint(1, 4), orthogonal=rng.random() < 0.5,
             generator=rng.choice([None, Either(torch.Generator().manual_seed(0))])), sane=sane,
    )  # fmt: skip


@family("ops.features")
def by_name(rng: random.Random) -> Call:
    kwargs = dict(name=rng.choice([*feature_maps.FEATURE_MAPS]))
    return Call(lambda name: feature_maps.feature_map(name)(torch.ones(2, 3)), kwargs, names=("feature_map",))


# ---- modulation and reduced tokens


def _field(rng: random.Random) -> tuple[Tensor, Tensor | None]:
    grid = [rng.randint(2, 5) for _ in range(rng.choice([1, 2]))]
    x = torch.randn(rng.randint(1, 2), *grid, 4)
    return x, some(rng, 0.4, lambda: torch.rand(x.shape[:-1]) > 0.3)


def _alive(x: Tensor, valid: Any) -> Tensor:
    assert x.dim() in (3, 4, 5)
    if valid is not None:
        assert valid.dtype == torch.bool and valid.shape == x.shape[:-1]
        x = x.masked_fill(~valid[..., None], 0.0)
    return x.double()


@family("ops.modulation")
def pyramid(rng: random.Random) -> Call:
    x, valid = _field(rng)
    r = x.dim() - 2
    weights = [torch.randn(4, 1, *[rng.choice([1, 3])] * r) for _ in range(2)]

    def oracle(x, weights, biases, dilations, valid):
        assert biases is None or len(biases) == len(weights)
        out, z = [], _alive(x, valid)
        for i, w in enumerate(weights):
            z = ops.naive.depthwise(
                z, w, None if biases is None else biases[i], dilation=1 if dilations is None else dilations[i],
                valid=valid,
            )  # fmt: skip
            out.append(z)
        return out

    kwargs = dict(
        x=x, weights=weights, biases=some(rng, 0.4, lambda: [torch.randn(4), None]),
        dilations=some(rng, 0.4, lambda: [1, 2]), valid=valid,
    )  # fmt: skip
    return Call(modulation.pyramid, kwargs, oracle, names=("weight", "bias", "dilation"), tolerance=1e-4)


@family("ops.modulation")
def mixed_depthwise(rng: random.Random) -> Call:
    x, valid = _field(rng)
    r = x.dim() - 2
    weights = [torch.randn(2, 1, *[k] * r) for k in (1, 3)]

    def oracle(x, weights, biases, valid):
        x, start, out = _alive(x, valid), 0, []
        for i, w in enumerate(weights):
            part = x[..., start : start + len(w)]
            out.append(ops.naive.depthwise(part, w, None if biases is None else biases[i]))
            start += len(w)
        assert start == x.shape[-1] and len(weights)
        return torch.cat(out, -1)

    kwargs = dict(x=x, weights=weights, biases=some(rng, 0.4, lambda: [torch.randn(2), None]), valid=valid)
    return Call(modulation.mixed_depthwise, kwargs, oracle, names=("weight", "bias"), tolerance=1e-4)


@family("ops.modulation")
def pool(rng: random.Random) -> Call:
    x, valid = _field(rng)

    def oracle(x, keep, valid):
        alive = _alive(x, valid)
        there = torch.ones(x.shape[:-1]) if valid is None else valid.double()
        assert keep is None or 0 <= keep < x.dim() - 2
        axes = [a + 1 for a in range(x.dim() - 2) if a != keep]
        if not axes:
            return alive
        return alive.sum(axes, keepdim=True) / there.sum(axes, keepdim=True).clamp(min=1)[..., None]

    kwargs = dict(x=x, keep=rng.choice([None, *range(x.dim() - 2)]), valid=valid)
    return Call(modulation.pool, kwargs, oracle, allows=META)


@family("ops.modulation")
def gated_sum(rng: random.Random) -> Call:
    x, _ = _field(rng)
    contexts = [x, torch.randn(x.shape[0], *[1] * (x.dim() - 2), 4)]

    def oracle(contexts, gates):
        assert len(contexts) == gates.shape[-1] and all(c.dim() == gates.dim() for c in contexts)
        return sum(c.double() * gates.double()[..., i : i + 1] for i, c in enumerate(contexts))

    return Call(modulation.gated_sum, dict(contexts=contexts, gates=torch.randn(*x.shape[:-1], 2)), oracle)


@family("ops.modulation")
def modulate(rng: random.Random) -> Call:
    x, _ = _field(rng)
    factor = torch.randn(x.shape[0], *[1] * (x.dim() - 2), 4)

    def oracle(query, factor, activation):
        assert factor.dim() == query.dim()
        factor = factor.double().sigmoid() if activation is not None else factor.double()
        assert torch.broadcast_shapes(factor.shape, query.shape) == query.shape
        return query.double() * factor

    return Call(
        lambda query, factor, activation: modulation.modulate(query, factor, activation=activation),
        dict(query=x, factor=factor, activation=rng.choice([None, Either(torch.sigmoid)])), oracle,
        tolerance=1e-3,
    )  # fmt: skip


@family("ops.modulation")
def adaptive_pool_tokens(rng: random.Random) -> Call:
    x, valid = _field(rng)

    def oracle(x, size, valid):
        alive, grid = _alive(x, valid), x.shape[1:-1]
        size = list(size) if isinstance(size, (tuple, list)) else [size] * len(grid)
        assert len(size) == len(grid) and min(size) >= 1 and min(grid) >= 1
        there = torch.ones(x.shape[:-1], dtype=torch.bool) if valid is None else valid
        out = torch.zeros(x.shape[0], *size, x.shape[-1], dtype=torch.float64)
        some = torch.zeros(x.shape[0], *size, dtype=torch.bool)
        for cell in itertools.product(*map(range, size)):
            cut = tuple(slice(c * g // s, -(-(c + 1) * g // s)) for c, g, s in zip(cell, grid, size, strict=True))
            part, exists = alive[(slice(None), *cut)].flatten(1, -2), there[(slice(None), *cut)].flatten(1)
            out[(slice(None), *cell)] = part.sum(1) / exists.sum(1).clamp(min=1)[:, None]
            some[(slice(None), *cell)] = exists.any(1)
        return (out, None) if valid is None else (out, some)

    kwargs = dict(x=x, size=rng.randint(1, 4), valid=valid)
    return Call(reduced.adaptive_pool_tokens, kwargs, oracle, allows=META)


@family("ops.modulation")
def strided_tokens(rng: random.Random) -> Call:
    x, valid = _field(rng)

    def oracle(x, stride, valid, offset):
        r = x.dim() - 2
        steps = stride if isinstance(stride, (tuple, list)) else [stride] * r
        assert r in (1, 2, 3) and len(steps) == r and min(steps) >= 1 and offset >= 0
        _alive(x, valid)
        pick = (slice(None), *(slice(offset, None, s) for s in steps))
        return x[pick], None if valid is None else valid[pick]

    kwargs = dict(x=x, stride=rng.randint(1, 3), valid=valid, offset=rng.randint(0, 1))
    return Call(reduced.strided_tokens, kwargs, oracle, allows=(*META, "booleans", "integers", "complex"))


# ---- what an operator says of itself


@target("ops.explain")
def explain(rng: random.Random) -> Call:
    call = qkv(rng)
    b, h, n, _ = call["q"].shape
    call |= dict(op=rng.choice(["attention", "attention_partial"]), backend=rng.choice([None, "eager", "tiled"]))

    def sane(text: str, given: dict[str, Any]) -> None:
        chosen = text.splitlines()[0].removeprefix("runs: ")
        assert given["backend"] in (None, chosen), f"another backend runs: {chosen}"

    def run(op, q, k, v, backend):
        return ops.explain(op, q, k, v, backend=backend)

    return Call(run, call, sane=sane, names=("op",))


@target("ops.derivatives")
def derivatives(rng: random.Random) -> Call:
    def sane(out: Any, given: dict[str, Any]) -> None:
        assert out and all(set(d) == {"first", "second", "forward", "vmap"} for d in out.values())

    return Call(ops.derivatives, dict(op=rng.choice(ops.operators())), sane=sane)
