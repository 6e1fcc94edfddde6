"""Calls of the rest of the vocabulary: methods and helpers of masks, grids, positions, normalizers and types; optim."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import torch
from torch import Tensor

from attnlib import grids, masks, normalizers, optim, positions
from attnlib.types import PATTERNS, Output, Partial, Plan, State, Traits

from .engine import Call, Either, family
from .of_floor0 import ANY_DTYPE, META, N, a_mask

# ---- masks


def sizes(mask: masks.Mask) -> tuple[int, int]:
    rows, cols = mask.extent()
    return (N if rows is None else min(rows, N)), (N if cols is None else min(cols, N))


@family("masks.methods")
def block(rng: random.Random) -> Call:
    mask = a_mask(rng)
    n, m = sizes(mask)
    a, c = rng.randint(0, n), rng.randint(0, m)

    def oracle(rows: Any, cols: Any) -> Tensor:
        assert len(rows) == len(cols) == 2 and 0 <= rows[0] <= rows[1] and 0 <= cols[0] <= cols[1]
        return mask.dense(int(rows[1]), int(cols[1]))[..., rows[0] :, cols[0] :]

    def free(rows: Any, cols: Any) -> Tensor:  # positions before 0 mean something where the mask knows no end
        return mask.at(torch.arange(*map(int, rows)), torch.arange(*map(int, cols)))

    return Call(
        mask.block, dict(rows=(rng.randint(0, a), a), cols=(rng.randint(0, c), c)),
        free if mask.extent() == (None, None) else oracle, names=("mask", "queries", "keys", "queries' stop"),
    )  # fmt: skip


@family("masks.methods")
def count(rng: random.Random) -> Call:
    mask = a_mask(rng)
    n, m = sizes(mask)

    def oracle(n: Any, m: Any, chunk: Any) -> Tensor:
        assert n >= 0 and chunk >= 1
        return mask.dense(int(n), None if m is None else int(m)).sum(-1)

    return Call(
        mask.count, dict(n=rng.randint(0, n), m=rng.randint(0, m), chunk=rng.randint(1, 5)), oracle,
        names=("mask", "queries", "keys"),
    )  # fmt: skip


@family("masks.methods")
def lower_and_raise(rng: random.Random) -> Call:
    mask = a_mask(rng)
    spec, tensors = mask.lower()

    def sane(out: Any, given: dict[str, Any]) -> None:
        assert out == mask, "another mask is raised"

    return Call(masks.raise_mask, dict(spec=spec, tensors=Either(tensors)), sane=sane)


@family("masks.methods")
def picture(rng: random.Random) -> Call:
    mask = a_mask(rng)
    n, m = sizes(mask)

    def sane(out: Any, given: dict[str, Any]) -> None:
        full = mask.dense(given["n"], given["m"])
        while full.dim() > 2:
            full = full[0]
        cell = max(1, -(-max(full.shape) // given["width"]))
        lines = out.split("\n") if full.shape[0] else []
        assert len(lines) == -(-full.shape[0] // cell), "the picture has another height"
        for i, line in enumerate(lines):
            for j, sign in enumerate(line):
                part = full[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
                assert sign == ("#" if part.all() else "+" if part.any() else "."), f"the cell {i}, {j} is wrong"

    return Call(
        mask.picture, dict(n=rng.randint(0, n), m=rng.randint(0, m), width=rng.randint(1, 14)), sane=sane,
        names=("mask", "queries", "keys"),
    )  # fmt: skip


@family("masks.methods")
def plane(rng: random.Random) -> Call:
    mask = a_mask(rng)
    n, m = sizes(mask)

    def sane(out: Any, given: dict[str, Any]) -> None:
        full = mask.dense(n, m)
        full = full.reshape((1,) * (4 - full.dim()) + tuple(full.shape)).expand(mask.batch(), mask.heads(), n, m)
        b, h = (0 if size == 1 else given[name] for name, size in zip("bh", full.shape, strict=False))
        assert torch.equal(out.dense(n, m), full[b, h]), "the plane differs"

    kwargs = dict(b=rng.randrange(mask.batch()), h=rng.randrange(mask.heads()))
    return Call(mask.plane, kwargs, sane=sane, names=("mask",))


@family("masks.methods")
def to(rng: random.Random) -> Call:
    mask = a_mask(rng)

    def sane(out: Any, given: dict[str, Any]) -> None:
        assert out == mask or str(given["device"]) != "cpu", "another mask"

    return Call(mask.to, dict(device=rng.choice(["cpu", torch.device("cpu")])), sane=sane)


@family("masks.methods")
def check(rng: random.Random) -> Call:
    mask = a_mask(rng)
    n, m = sizes(mask)

    def sane(out: Any, given: dict[str, Any]) -> None:
        dense = mask.dense(given["n"], given["m"])
        assert not isinstance(mask, masks.Explicit) or dense.shape[-2:] == mask.allowed.shape[-2:], "of another size"
        assert given["batch"] is None or mask.batch() in (1, given["batch"]), "another batch is served"
        assert given["heads"] is None or mask.heads() in (1, given["heads"]), "other heads are served"

    def run(n: Any, m: Any, batch: Any, heads: Any) -> Any:
        return mask.check(n, m, batch=batch, heads=heads)

    kwargs = dict(n=n, m=m, batch=rng.choice([None, mask.batch()]), heads=rng.choice([None, mask.heads()]))
    return Call(run, kwargs, sane=sane, names=("mask",))


@family("masks.methods")
def visible_keys(rng: random.Random) -> Call:
    mask = rng.choice([None, a_mask(rng)])
    n, m = (N, N) if mask is None else sizes(mask)
    b = 1 if mask is None else mask.batch()
    valid = rng.choice([None, torch.rand(max(b, 2) if b == 1 else b, m) > 0.4])

    def oracle(mask: Any, n: Any, m: Any, valid: Any, q_pos: Any) -> Tensor:
        rows = torch.arange(int(n)) if q_pos is None else q_pos.long()
        assert n >= 0 and m >= 0 and rows.shape[-1] == n
        if isinstance(mask, Tensor):
            mask = masks.explicit(mask)
        seen = torch.ones(n, m, dtype=torch.bool) if mask is None else mask.at(rows, torch.arange(m))
        seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
        if valid is not None:
            assert valid.dtype == torch.bool and valid.dim() == 2 and valid.shape[1] == m
            seen = seen & valid[:, None, None]
        return seen.sum(-1, keepdim=True)

    q_pos = rng.choice([None, torch.randint(0, n, (n,))])
    return Call(
        masks.visible_keys, dict(mask=mask, n=n, m=m, valid=valid, q_pos=q_pos), oracle, names=("keys",), allows=META
    )


@family("masks.methods")
def as_mask(rng: random.Random) -> Call:
    allowed = torch.rand(rng.choice([(3, 4), (2, 3, 4), (2, 2, 3, 4)])) > 0.5
    return Call(
        lambda mask: None if mask is None else masks.as_mask(mask).dense(*mask.shape[-2:]), dict(mask=allowed),
        lambda mask: mask[:, None] if mask.dim() == 3 and len(mask) != 1 else mask.reshape(
            mask.shape[-2:] if all(s == 1 for s in mask.shape[:-2]) else mask.shape
        ),
        names=("mask",), allows=("None", "on meta"),
    )  # fmt: skip


@family("masks.methods")
def tiles(rng: random.Random) -> Call:
    """What a mask says of tiles holds for every pair in them."""
    mask = a_mask(rng)
    n, m = sizes(mask)

    def run(q_tile: Any, k_tile: Any) -> Any:
        q_lo, k_lo = torch.arange(0, n, q_tile), torch.arange(0, m, k_tile)
        q_hi, k_hi = (q_lo + q_tile - 1).clamp(max=n - 1), (k_lo + k_tile - 1).clamp(max=m - 1)
        return mask.tile(q_lo[:, None], q_hi[:, None], k_lo[None], k_hi[None])

    def sane(out: Any, given: dict[str, Any]) -> None:
        some, every = out
        full = mask.dense(n, m)
        full = full.reshape(-1, *full.shape[-2:])
        a, c = given["q_tile"], given["k_tile"]
        for i, j in itertools.product(range(some.shape[0]), range(some.shape[1])):
            part = full[:, i * a : (i + 1) * a, j * c : (j + 1) * c]
            assert bool(some[i, j]) or not part.any(), f"tile {i}, {j} is said to be empty"
            assert not bool(every[i, j]) or part.all(), f"tile {i}, {j} is said to be full"

    kwargs = dict(q_tile=rng.randint(1, 5), k_tile=rng.randint(1, 5))
    return Call(run, kwargs, sane=sane, fixed=kwargs)


# ---- grids

LAYOUT = grids.Layout((("text", 3), ("image", (2, 3)), ("cls", 1)))


@family("grids.more")
def layout_image(rng: random.Random) -> Call:
    return Call(
        lambda height, width, cls: grids.Layout.image(height, width, cls=cls).types(),
        dict(height=rng.randint(0, 4), width=rng.randint(1, 4), cls=rng.randint(0, 2)),
        lambda height, width, cls: torch.tensor([0] * int(cls) + [1] * (int(height) * int(width)), dtype=torch.long),
        names=("layout segment 'cls'",),
    )  # fmt: skip


@family("grids.more")
def layout_join(rng: random.Random) -> Call:
    x = torch.randn(2, 10, 3)

    def oracle(parts: Any, dim: Any) -> Tensor:
        assert set(parts) == {"text", "image", "cls"} and dim in (1, -2)
        assert [parts[n].shape[1] for n in ("text", "image", "cls")] == [3, 6, 1]
        return torch.cat([parts[n] for n in ("text", "image", "cls")], dim)

    return Call(LAYOUT.join, dict(parts=LAYOUT.split(x), dim=rng.choice([1, -2])), oracle, names=("layout",))


@family("grids.more")
def window_partition(rng: random.Random) -> Call:
    grid, window = rng.choice([((4, 6), (2, 3)), ((6,), 2), ((2, 4, 4), (1, 2, 2)), ((4, 4), 4)])

    def sane(out: Any, given: dict[str, Any]) -> None:
        grid, kind = [int(s) for s in given["grid"]], given["kind"]
        window = given["window"] if isinstance(given["window"], (tuple, list)) else [given["window"]] * len(grid)
        groups: dict[Any, list[int]] = {}
        for i, at in enumerate(itertools.product(*map(range, grid))):
            key = tuple(a // w if kind == "block" else a % (s // w) for a, w, s in zip(at, window, grid, strict=True))
            groups.setdefault(key, []).append(i)
        assert sorted(map(sorted, out.q_index.tolist())) == sorted(groups.values()), "other tokens share a window"

    return Call(
        grids.window_partition, dict(grid=grid, window=window, kind=rng.choice(["block", "grid"])), sane=sane,
        names=("window_size",),
    )  # fmt: skip


@family("grids.more")
def back_from_windows(rng: random.Random) -> Call:
    rank = rng.choice([1, 2])
    back, there = rng.choice([(grids.unblock_windows, grids.block_windows), (grids.ungrid_windows, grids.grid_windows)])
    x = torch.randn(2, *(rng.randint(1, 3) for _ in range(2 * rank)), 3)

    def sane(out: Any, given: dict[str, Any]) -> None:
        x = given["x"]
        r = (x.dim() - 2) // 2
        if x.numel():
            assert torch.equal(there(out, x.shape[1 + r : -1]), x), "not the inverse"

    return Call(lambda x: back(x), dict(x=x), sane=sane, allows=ANY_DTYPE)


@family("grids.more")
def pad(rng: random.Random) -> Call:
    grid = rng.choice([(3, 5), (7,), (2, 3, 2)])

    def oracle(x: Tensor, multiple: Any, value: Any) -> Tensor:
        r = x.dim() - 2
        per = multiple if isinstance(multiple, (tuple, list)) else [multiple] * r
        assert len(per) == r and min(per) >= 1
        out = torch.full((x.shape[0], *(-(-s // m) * m for s, m in zip(x.shape[1:-1], per, strict=True)), x.shape[-1]),
                         float(value))  # fmt: skip
        out[tuple(slice(0, s) for s in x.shape)] = x
        return out

    return Call(
        grids.pad_to_multiple, dict(x=torch.randn(2, *grid, 3), multiple=rng.randint(1, 4), value=rng.uniform(-1, 1)),
        oracle, allows=(*ANY_DTYPE, "inf", "-inf"),
    )  # fmt: skip


@family("grids.more")
def crop(rng: random.Random) -> Call:
    def oracle(x: Tensor, grid: Any) -> Tensor:
        assert len(grid) == x.dim() - 2 and all(0 <= g <= s for g, s in zip(grid, x.shape[1:-1], strict=True))
        return x[:, : grid[0], : grid[1]] if len(grid) == 2 else x[:, : grid[0]]

    return Call(
        grids.crop_grid, dict(x=torch.randn(2, 4, 5, 3), grid=(rng.randint(0, 4), rng.randint(0, 5))), oracle,
        allows=ANY_DTYPE,
    )  # fmt: skip


@family("grids.more")
def on_device(rng: random.Random) -> Call:
    make = rng.choice(
        [
            lambda device: grids.coordinates((2, 3), device),
            lambda device: LAYOUT.types(device),
            lambda device: masks.causal().dense(3, 4, device=device),
            lambda device: masks.visible_keys(None, 3, 4, device=device),
        ]
    )
    return Call(make, dict(device=rng.choice([None, "cpu", torch.device("cpu")])), names=("device",))


# ---- positions


@family("positions.more")
def window_bias(rng: random.Random) -> Call:
    window = rng.choice([(3, 2), (4,)])

    def oracle(table: Tensor, window: Any) -> Tensor:
        places = grids.coordinates([int(w) for w in window])
        assert table.dim() == 2 and table.shape[1] == math.prod(2 * w - 1 for w in window)
        out = torch.zeros(1, table.shape[0], len(places), len(places), dtype=torch.float64)
        for i, q in enumerate(places.tolist()):
            for j, k in enumerate(places.tolist()):
                at = 0
                for a, c, w in zip(q, k, window, strict=True):
                    at = at * (2 * w - 1) + c - a + w - 1
                out[0, :, i, j] = table[:, at].double()
        return out

    return Call(
        lambda table, window: positions.window_bias(table, window).dense(),
        dict(table=torch.randn(2, math.prod(2 * w - 1 for w in window)), window=window), oracle, names=("grid",),
        allows=META,
    )  # fmt: skip


@family("positions.more")
def alibi_slopes(rng: random.Random) -> Call:
    def oracle(num_heads: Any) -> Tensor:
        num_heads = int(num_heads)
        assert num_heads >= 1
        whole = 2 ** int(math.floor(math.log2(num_heads)))
        first = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
        rest = [2.0 ** (-8 * (i + 1) / (2 * whole)) for i in range(0, 2 * whole, 2)]
        return torch.tensor(first + rest[: num_heads - whole], dtype=torch.float64)

    return Call(positions.alibi_slopes, dict(num_heads=rng.randint(1, 20)), oracle)


@family("positions.more")
def alibi_with_slopes(rng: random.Random) -> Call:
    n, m, h = rng.randint(1, 5), rng.randint(1, 5), rng.choice([1, 3])
    q_pos, k_pos = torch.randint(0, 9, (n,)), torch.randint(0, 9, (m,))

    def oracle(num_heads: Any, q_pos: Tensor, k_pos: Tensor, slopes: Any, span: Any) -> Tensor:
        gaps = k_pos[None].double() - q_pos[:, None]
        assert span is None or (gaps.numel() == 0) or (span[0] <= gaps.min() and span[1] >= gaps.max())
        slopes = positions.alibi_slopes(num_heads) if slopes is None else slopes
        assert slopes.shape == (num_heads,)
        return (-slopes.double()[:, None, None] * gaps.abs())[None]

    return Call(
        lambda **kw: positions.alibi(**kw).dense(),
        dict(num_heads=h, q_pos=q_pos, k_pos=k_pos, slopes=rng.choice([None, torch.rand(h)]),
             span=rng.choice([None, (-9, 9)])), oracle,
    )  # fmt: skip


@family("positions.more")
def relative_offsets(rng: random.Random) -> Call:
    rank = rng.choice([1, 2])
    table = torch.randn(2, *(2 * rng.randint(1, 3) - 1 for _ in range(rank)))

    def oracle(table: Tensor, starts: Any, sizes: Any) -> Tensor:
        assert len(starts) == len(sizes) == table.dim() - 1 and min(sizes, default=0) >= 0
        assert all(s % 2 for s in table.shape[1:])
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True), 1):
            reach = table.shape[axis] // 2
            at = [min(max(start + i, -reach), reach) + reach for i in range(size)]
            table = table.index_select(axis, torch.tensor(at, dtype=torch.long))
        return table

    return Call(
        positions.relative_offsets,
        dict(table=table, starts=tuple(rng.randint(-4, 2) for _ in range(rank)),
             sizes=tuple(rng.randint(0, 4) for _ in range(rank))), oracle, allows=ANY_DTYPE,
    )  # fmt: skip


@family("positions.more")
def toeplitz_on_grids(rng: random.Random) -> Call:
    (n1, n2), (m1, m2) = ((rng.randint(1, 3), rng.randint(1, 3)) for _ in range(2))

    def oracle(c: Tensor, x: Tensor, queries: Any) -> Tensor:
        (n1, n2), (m1, m2) = queries, x.shape[-3:-1]
        assert c.shape[-2:] == (n1 + m1 - 1, n2 + m2 - 1)
        out = torch.zeros(*torch.broadcast_shapes(c.shape[:-2], x.shape[:-3]), n1, n2, x.shape[-1], dtype=torch.float64)
        for i, j in itertools.product(range(n1), range(n2)):
            window = c.double()[..., n1 - 1 - i : n1 - 1 - i + m1, n2 - 1 - j : n2 - 1 - j + m2]
            out[..., i, j, :] = (window[..., None] * x.double()).sum((-3, -2))
        return out

    return Call(
        positions.toeplitz_matmul,
        dict(c=torch.randn(n1 + m1 - 1, n2 + m2 - 1), x=torch.randn(2, m1, m2, 2), queries=(n1, n2)), oracle,
        tolerance=1e-4, fixed=("queries",),
    )  # fmt: skip


@family("positions.more")
def toeplitz_spectrum(rng: random.Random) -> Call:
    n, m = rng.randint(1, 4), rng.randint(1, 4)

    def sane(out: Any, given: dict[str, Any]) -> None:
        spectrum, sizes = out
        assert len(sizes) == len(given["queries"]) and sizes[-1] >= given["c"].shape[-1], "the transform is too short"

    return Call(positions.toeplitz_spectrum, dict(c=torch.randn(2, n + m - 1), queries=(n,)), sane=sane, allows=META)


@family("positions.more")
def rotary_on_grids(rng: random.Random) -> Call:
    grid = rng.choice([(2, 3), (2, 2, 2), (4,)])
    r = len(grid)

    def oracle(pos: Tensor, head_dim: Any, base: Any, grid: Any) -> Tensor:
        r = len(grid)
        half = int(head_dim) // (2 * r)
        assert pos.shape[-1] == r and half and head_dim % (2 * r) == 0 and base > 0
        f = float(base) ** (-torch.arange(half).double() / half)
        return (pos.double()[..., None] * f).flatten(-2)

    return Call(
        positions.rotary_angles,
        dict(pos=grids.coordinates(grid), head_dim=2 * r * rng.randint(1, 3), base=rng.choice([100.0, 1e4]), grid=grid),
        oracle, allows=("floats", "on meta"), tolerance=1e-4,
    )  # fmt: skip


@family("positions.more")
def as_bias(rng: random.Random) -> Call:
    bias = torch.randn(rng.choice([(3, 4), (2, 3, 4), (2, 2, 3, 4)]))
    return Call(
        lambda bias: None if bias is None else positions.as_bias(bias).dense(), dict(bias=bias),
        lambda bias: bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape)), allows=("None", "on meta"),
    )  # fmt: skip


@family("positions.more")
def lower_and_raise_biases(rng: random.Random) -> Call:
    bias = a_bias(rng)
    spec, tensors = bias.lower()
    return Call(
        lambda spec, tensors: positions.raise_bias(spec, tensors).dense(), dict(spec=spec, tensors=tensors),
        lambda spec, tensors: bias.dense(), fixed=("tensors",),
    )  # fmt: skip


def a_bias(rng: random.Random, n: int = 3, m: int = 4) -> positions.Bias:
    return rng.choice(
        [
            lambda: positions.DenseBias(torch.randn(2, 2, n, m)),
            lambda: positions.alibi(2, torch.arange(n), torch.arange(m)),
            lambda: positions.AxisBias([torch.randn(2, 2, n, m)]),
        ]
    )()  # fmt: skip


@family("positions.more")
def bias_block(rng: random.Random) -> Call:
    bias = a_bias(rng)
    start, stop = sorted((rng.randint(0, 3), rng.randint(0, 3)))
    cols = rng.choice([slice(1, 3), torch.randint(0, 4, (5,))])
    rows = slice(start, stop)
    return Call(
        bias.block, dict(rows=rows, cols=cols), lambda rows, cols: bias.dense()[:, :, rows][..., cols],
        fixed=("rows", "cols"),
    )  # fmt: skip


# ---- normalizers


@family("normalizers.more")
def weights(rng: random.Random) -> Call:
    name = rng.choice(normalizers.normalizer_names())
    made = normalizers.as_normalizer(name)
    scores = torch.randn(2, 3, 5)
    scores[torch.rand(2, 3, 5) > 0.7] = -math.inf
    scores[0, 0] = -math.inf

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        scores = given["scores"]
        assert out.shape == scores.shape and out.dtype == scores.dtype
        assert bool(torch.isfinite(out).all()), f"{name}: weights are not finite"
        assert not bool(out[scores == -math.inf].any()), f"{name}: a pair that may not meet has weight"

    return Call(made.weights, dict(scores=scores), sane=sane, fixed=("scores",))


@family("normalizers.more")
def sigmoid_bias(rng: random.Random) -> Call:
    return Call(
        lambda n: torch.tensor(normalizers.sigmoid_bias(n)), dict(n=rng.randint(1, 99)),
        lambda n: torch.tensor(-math.log(n)),
    )  # fmt: skip


@family("normalizers.more")
def raised(rng: random.Random) -> Call:
    made = normalizers.as_normalizer(rng.choice(normalizers.normalizer_names()))

    def sane(out: Any, given: dict[str, Any]) -> None:
        assert out == made, "another normalizer"

    return Call(normalizers.raise_normalizer, dict(spec=made.lower()), sane=sane)


# ---- types


@family("types.more")
def plan(rng: random.Random) -> Call:
    def run(kind: Any, tensors: Any, shape: Any) -> Any:
        return Plan(kind, tensors, shape).expect("topk", N=3).choices("index", (2, None), 4, "key")

    def oracle(kind: Any, tensors: Any, shape: Any) -> Any:
        index = tensors["index"]
        assert kind == "topk" and dict(shape).get("N", 3) == 3
        assert index.dim() == 2 and len(index) == 2 and (not index.numel() or 0 <= index.min() <= index.max() < 4)
        return index

    return Call(
        run, dict(kind="topk", tensors={"index": torch.randint(0, 4, (2, 3))}, shape=(("N", 3),)), oracle,
        names=("plan", "index"),
    )  # fmt: skip


@family("types.more")
def plan_index(rng: random.Random) -> Call:
    def run(index: Any, size: Any) -> Any:
        return Plan("topk", {"index": index}, (("N", size),)).expect("topk", N=3).choices("index", (2, 3), 4, "key")

    def oracle(index: Any, size: Any) -> Any:
        assert size == 3 and index.shape == (2, 3) and 0 <= index.min() <= index.max() < 4
        return index

    return Call(
        run, dict(index=torch.randint(0, 4, (2, 3)), size=3), oracle, names=("plan", "plan's index"), allows=META
    )


@family("types.more")
def state_of(rng: random.Random) -> Call:
    def run(tensors: Any, kind: Any) -> Any:
        return State(tensors, kind).expect("someone", 3).detach()["k"]

    def oracle(tensors: Any, kind: Any) -> Any:
        assert kind in ("", "someone") and len(tensors["k"]) == 3
        return tensors["k"]

    return Call(
        run, dict(tensors={"k": torch.randn(3, 2)}, kind=rng.choice(["", "someone"])), oracle, names=("state",),
        allows=("empty",),
    )  # fmt: skip


@family("types.more")
def state_replace(rng: random.Random) -> Call:
    held = State({"k": torch.randn(3, 2), "n": torch.arange(3)}, "someone")
    return Call(
        lambda k: held.replace(k=k).select(torch.tensor([2, 0]))["k"], dict(k=torch.randn(3, 4)), lambda k: k[[2, 0]],
        names=("state", "index"), allows=ANY_DTYPE,
    )  # fmt: skip


@family("types.more")
def traits(rng: random.Random) -> Call:
    def sane(out: Any, given: dict[str, Any]) -> None:
        assert out.patterns <= set(PATTERNS) and out.grid_ranks <= {1, 2, 3} and out.grid_multiple >= 1
        assert out.but(mask=True).within(out.but(mask=False)) == ["mask"], "an excess is not seen"
        assert out.to_dict()["gradient"] == given["gradient"]
        for exponents in (out.work, out.memory):
            assert all(isinstance(s, str) and math.isfinite(e) for s, e in exponents.items()), "no exponents"
        assert all(isinstance(name, str) for name in out.losses), "losses are named"

    return Call(
        Traits,
        dict(
            patterns=Either(frozenset({rng.choice(PATTERNS)})), grid_ranks=Either({1, 2}), mask=False, valid=True,
            layout=False, streaming=False, work=Either({"N": 2}), memory=Either({"N": 1.0}), gradient="exact",
            batch_independent=True, permutation_equivariant=False, resolution_free=True, needs_plan=False,
            carries=False, losses=("balance",), weights=False, traceable=True, grid_multiple=rng.randint(1, 4),
        ),
        sane=sane,
    )  # fmt: skip


@family("types.more")
def partial_sums(rng: random.Random) -> Call:
    shape = (2, 3, 4)

    def run(log_scale: Any, den: Any, num: Any) -> Any:
        whole = Partial(log_scale, den, num)
        return whole.merge(Partial.identity_like(whole)).lse()

    def oracle(log_scale: Any, den: Any, num: Any) -> Any:
        assert log_scale.shape == den.shape == num.shape[:-1] and num.dim() == 4
        return log_scale.double() + den.double().log()

    return Call(
        run, dict(log_scale=torch.randn(shape), den=torch.rand(shape) + 0.1, num=torch.randn(*shape, 5)), oracle,
        names=("partial", "partials", "others"),
    )  # fmt: skip


@family("types.more")
def outputs(rng: random.Random) -> Call:
    y = torch.randn(2, 3)
    return Call(lambda y: Output(y)._replace(carry=1).y, dict(y=y), lambda y: y, fixed=("y",))


# ---- optim


def _rows(name: str, rng: random.Random) -> dict[str, Any]:
    own: dict[str, Any] = (
        dict(betas=(0.9, 0.99)) if name == "AdamP" else dict(momentum=rng.choice([0.0, 0.9]), dampening=0.0)
    )
    return dict(
        lr=rng.choice([0.1, 0.0, 1e-3]), **own, eps=1e-8, weight_decay=rng.choice([0.0, 0.1]), delta=0.1, wd_ratio=0.1,
        nesterov=rng.random() < 0.5,
    )  # fmt: skip


def _stepped(name: str, w: Tensor, grads: list[Tensor], s: dict[str, Any]) -> Tensor:
    """The algorithms of the paper, one weight (rows, width) in float64."""
    assert 0 <= s["lr"] < math.inf and 0 <= s["eps"] < math.inf and 0 <= s["weight_decay"] < math.inf
    assert 0 <= s["delta"] < math.inf and 0 <= s["wd_ratio"] < math.inf
    w, m, v = w.double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()
    for t, grad in enumerate(g.double() for g in grads):
        if name == "AdamP":
            b1, b2 = s["betas"]
            assert 0 <= b1 < 1 and 0 <= b2 < 1
            m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
            root = v.sqrt() / math.sqrt(1 - b2 ** (t + 1)) + s["eps"]
            p, rate, decay = (b1 * m + (1 - b1) * grad if s["nesterov"] else m) / root, s["lr"] / (1 - b1 ** (t + 1)), 1
        else:
            assert 0 <= s["momentum"] < 1 and math.isfinite(s["dampening"])
            m = s["momentum"] * m + (1 - s["dampening"]) * grad
            p, rate, decay = (grad + s["momentum"] * m if s["nesterov"] else m), s["lr"], 1 / (1 - s["momentum"])
        ratio = 1.0
        for rows in (w.shape[0], 1):
            flat, gr = w.reshape(rows, -1), grad.reshape(rows, -1)
            cosine = torch.nn.functional.cosine_similarity(gr, flat, 1, s["eps"]).abs()
            if cosine.max() < s["delta"] / math.sqrt(flat.shape[1]):
                unit = flat / (flat.norm(dim=1, keepdim=True) + s["eps"])
                up = p.reshape(rows, -1)
                p, ratio = (up - unit * (unit * up).sum(1, keepdim=True)).reshape(w.shape), s["wd_ratio"]
                break
        w = w * (1 - s["lr"] * s["weight_decay"] * ratio * decay) - rate * p
    return w


def _optimizer(name: str, rng: random.Random) -> Call:
    start, grads = torch.randn(2, 3), [torch.randn(2, 3) for _ in range(2)]
    if rng.random() < 0.5:  # rows at right angles to their gradients
        grads = [g - start * (g * start).sum(1, keepdim=True) / start.square().sum(1, keepdim=True) for g in grads]
        grads = grads[:1]

    def run(**settings: Any) -> Tensor:
        w = torch.nn.Parameter(start.clone())
        optimizer = getattr(optim, name)([w], **settings)
        for g in grads:
            w.grad = g.clone()
            optimizer.step()
        return w.detach()

    return Call(
        run, _rows(name, rng), lambda **s: _stepped(name, start, grads, s), names=("beta1", "beta2", "betas"),
        tolerance=1e-4, allows=("no_such_argument",),
    )  # fmt: skip


@family("optim")
def adamp(rng: random.Random) -> Call:
    return _optimizer("AdamP", rng)


@family("optim")
def sgdp(rng: random.Random) -> Call:
    return _optimizer("SGDP", rng)


@family("optim")
def params(rng: random.Random) -> Call:
    make = rng.choice([optim.AdamP, lambda params: optim.SGDP(params, 0.1)])

    def run(params: Any) -> Tensor:
        optimizer = make(params)
        for w in optimizer.param_groups[0]["params"]:
            w.grad = torch.ones_like(w)
        optimizer.step()
        return w.detach()

    return Call(run, dict(params=[torch.nn.Parameter(torch.randn(2, 2))]), names=("params",))
