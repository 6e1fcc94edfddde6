"""Calls of masks, layouts, grids, positions, normalizers, partials and states."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from attnlib import grids, masks, normalizers, positions
from attnlib.types import Partial, State

from .engine import Call, Either, target

N = 12
META = ("on meta",)
ANY_DTYPE = ("on meta", "booleans", "integers", "complex", "floats")


def ids(rng: random.Random, high: int = 3) -> Tensor:
    return torch.randint(0, high, rng.choice([(N,), (2, N)]))


def square(rng: random.Random, size: int = 3) -> list[list[bool]]:
    return [[rng.random() < 0.5 for _ in range(size)] for _ in range(size)]


#: name -> (constructor, arguments, ``rule(arguments, b, h, q, k)`` of one pair as plain Python)
MASKS: dict[str, Any] = {
    "causal": (masks.causal, lambda r: {}, lambda a, b, h, q, k: q >= k),
    "sliding_window": (
        masks.sliding_window, lambda r: dict(window=r.randint(1, 6)),
        lambda a, b, h, q, k: q - a["window"] // 2 <= k <= q + (a["window"] - 1) // 2,
    ),
    "recent": (
        masks.recent, lambda r: dict(window=r.randint(1, 6)), lambda a, b, h, q, k: q - a["window"] < k <= q
    ),
    "terraced": (
        masks.terraced, lambda r: dict(window=r.randint(1, 5), previous=r.randint(0, 2)),
        lambda a, b, h, q, k: k <= q and q // a["window"] - k // a["window"] <= a["previous"],
    ),
    "prefix_lm": (
        masks.prefix_lm,
        lambda r: dict(prefix=r.choice([r.randint(0, 5), torch.randint(0, 6, (2,))])),
        lambda a, b, h, q, k: q >= k or k < (a["prefix"][b] if isinstance(a["prefix"], Tensor) else a["prefix"]),
    ),
    "document": (
        masks.document, lambda r: dict(cu_seqlens=r.choice([[0, 4, 4, N], torch.tensor([0, 5, N])])),
        lambda a, b, h, q, k: sum(int(e) <= q for e in a["cu_seqlens"]) == sum(int(e) <= k for e in a["cu_seqlens"]),
    ),
    "documents": (
        masks.documents, lambda r: dict(ids=ids(r)),
        lambda a, b, h, q, k: bool(_of(a["ids"], b)[q] == _of(a["ids"], b)[k]),
    ),
    "strided": (
        masks.strided,
        lambda r: dict(stride=r.randint(1, 4), offset=r.randint(0, 3), local=r.randint(0, 3), per_head=r.randint(0, 1),
                       num_heads=2),
        lambda a, b, h, q, k: k % a["stride"] == (a["offset"] + h * a["per_head"]) % a["stride"]
        or abs(q - k) < a["local"],
    ),
    "neighborhood": (
        masks.neighborhood,
        lambda r: dict(grid=r.choice([(N,), (3, 4)]), kernel=2, dilation=1, stride=1, causal=False), None,
    ),
    "circular_window": (
        masks.circular_window, lambda r: dict(grid=r.choice([(N,), (3, 4)]), radius=r.uniform(0.5, 4.0)),
        lambda a, b, h, q, k: sum((x - y) ** 2 for x, y in zip(_at(q, a["grid"]), _at(k, a["grid"]), strict=True))
        < a["radius"] ** 2,
    ),
    "modality": (
        masks.modality, lambda r: dict(types=ids(r), rule=square(r)),
        lambda a, b, h, q, k: a["rule"][int(_of(a["types"], b)[q])][int(_of(a["types"], b)[k])],
    ),
    "causal_frames": (
        masks.causal_frames, lambda r: dict(queries=N, frames=r.choice([3, torch.tensor([2, 4])]), size=4), None
    ),
    "explicit": (
        masks.explicit, lambda r: dict(allowed=torch.rand(r.choice([(N, N), (2, N, N), (2, 2, N, N)])) > 0.5), None
    ),
    "blocks": (
        masks.blocks, lambda r: dict(chosen=torch.rand(r.choice([(4, 3), (2, 2, 4, 3)])) > 0.5, q_block=3, k_block=4),
        None,
    ),
    "on_segment": (
        masks.on_segment,
        lambda r: dict(layout=grids.Layout((("text", 4), ("image", (2, 3)), ("cls", 2))), name="image",
                       inner=masks.causal()),
        lambda a, b, h, q, k: not (4 <= q < 10 and 4 <= k < 10) or q >= k,
    ),
}  # fmt: skip


def _of(values: Tensor, b: int) -> Tensor:
    return values if values.dim() == 1 else values[b if values.shape[0] > 1 else 0]


def _at(position: int, grid: Any) -> tuple[int, ...]:
    out = []
    for size in reversed(tuple(grid)):
        out.append(position % size)
        position //= size
    return tuple(reversed(out))


def _mask_target(kind: str) -> None:
    make, arguments, rule = MASKS[kind]

    @target(f"masks.{kind}")
    def of_mask(rng: random.Random) -> Call:
        kwargs = arguments(rng)

        def sane(mask: Any, given: dict[str, Any]) -> None:
            known = [N if size is None else size for size in mask.extent()]
            n, m = (min(N, size) for size in known)
            if not n or not m:
                return
            dense = mask.dense(n, m)
            assert dense.dtype == torch.bool and dense.shape[-2:] == (n, m), f"dense has shape {tuple(dense.shape)}"
            assert torch.equal(dense, mask.at(torch.arange(n), torch.arange(m))), "dense is not at"
            assert mask == make(**given) and hash(mask) == hash(make(**given)), "equal arguments, unequal masks"
            assert torch.equal((~mask).dense(n, m), ~dense), "not is no complement"
            if rule is None:
                return
            full = dense.reshape((1,) * (4 - dense.dim()) + tuple(dense.shape))
            if not full.numel():
                return
            for _ in range(12):
                q, k = random.Random(n * m + _).randrange(n), random.Random(n - m + 3 * _).randrange(m)
                b, h = _ % full.shape[0], _ % full.shape[1]
                assert bool(full[b, h, q, k]) == bool(rule(given, b, h, q, k)), f"pair {q}, {k} is wrong"

        return Call(make, kwargs, sane=sane, names=("kernel_size", "mask tensor", "size of the layout"), allows=META)


for _kind in MASKS:
    if MASKS[_kind][1](random.Random(0)):
        _mask_target(_kind)


def a_mask(rng: random.Random) -> masks.Mask:
    kind = rng.choice([k for k in MASKS])
    make, arguments, _ = MASKS[kind]
    return make(**arguments(rng))


@target("masks.at")
def at(rng: random.Random) -> Call:
    mask = a_mask(rng)
    rows, cols = (N if e is None else min(e, N) for e in mask.extent())
    b, h = max(2, mask.batch()), max(2, mask.heads())
    shape = rng.choice([(5,), (b, 5), (b, h, 5)])
    q, k = torch.randint(0, rows, shape), torch.randint(0, cols, rng.choice([(4,), (b, 4)]))

    def oracle(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        spans = []
        for pos, known in ((q_pos, mask.extent()[0]), (k_pos, mask.extent()[1])):
            low, high = (int(pos.min()), int(pos.max())) if pos.numel() else (0, 0)
            assert known is None or not pos.numel() or (low >= 0 and high < known)
            spans.append((low, high + 1))
        (first_q, _), (first_k, _) = spans
        return _looked_up(mask.block(*spans), q_pos - first_q, k_pos - first_k)

    return Call(mask.at, dict(q_pos=q, k_pos=k), oracle, names=("mask",))


def _looked_up(full: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if full.dim() == 2 and q.dim() == k.dim() == 1:
        return full[q.long()][:, k.long()]
    full = full.reshape((1,) * (4 - full.dim()) + tuple(full.shape))
    q, k = ((p if p.dim() == 3 else p[:, None] if p.dim() == 2 else p[None, None]).long() for p in (q, k))
    b, h = (next((t.shape[i] for t in (full, q, k) if t.shape[i] != 1), 1) for i in (0, 1))
    full = full.expand(b, h, -1, -1)
    q, k = q.expand(b, h, -1), k.expand(b, h, -1)
    rows = full.gather(2, q[..., None].expand(-1, -1, -1, full.shape[-1]))
    return rows.gather(3, k[:, :, None].expand(-1, -1, q.shape[-1], -1))


@target("masks.dense")
def dense(rng: random.Random) -> Call:
    mask = a_mask(rng)
    rows, cols = (N if e is None else min(e, N) for e in mask.extent())

    def sane(out: Tensor, given: dict[str, Any]) -> None:
        assert out.dtype == torch.bool and out.shape[-2:] == (given["n"], given["m"]), f"shape {tuple(out.shape)}"

    return Call(
        mask.dense, dict(n=rng.randint(0, rows), m=rng.randint(0, cols)), sane=sane,
        names=("queries", "keys", "rows", "cols"), fixed=(),
    )  # fmt: skip


@target("masks.compose")
def compose(rng: random.Random) -> Call:
    left = a_mask(rng)
    right: Any = a_mask(rng)
    if (left.batch(), left.heads()) != (1, 1):
        right = masks.causal()
    rows, cols = (
        min(N if a is None else a, N if b is None else b) for a, b in zip(left.extent(), right.extent(), strict=True)
    )
    sign = rng.choice("&|")

    def combine(left: Any, right: Any) -> masks.Mask:
        return left & right if sign == "&" else left | right

    def sane(mask: Any, given: dict[str, Any]) -> None:
        def of(m: Any) -> Tensor:
            return m[..., :rows, :cols] if isinstance(m, Tensor) else m.dense(rows, cols)

        if any(isinstance(m, Tensor) and m.shape[-2:] != (rows, cols) for m in given.values()):
            return
        a, b = (of(m) for m in given.values())
        a, b = ((x if x.dim() != 3 else x[:, None]) for x in (a, b))
        assert torch.equal(mask.dense(rows, cols), a & b if sign == "&" else a | b), "composition is wrong"

    return Call(combine, dict(left=left, right=right), sane=sane, names=("mask",), fixed=("left",))


# ---- layouts and grids


@target("grids.Layout")
def layout(rng: random.Random) -> Call:
    segments = [("text", rng.randint(0, 5)), ("image", (rng.randint(1, 3), rng.randint(1, 4))), ("cls", 1)]
    rng.shuffle(segments)

    def sane(made: Any, given: dict[str, Any]) -> None:
        total = sum(math.prod(s) if isinstance(s, (tuple, list)) else s for _, s in given["segments"])
        assert len(made) == total and made.types().shape == (total,), "tokens do not add up"
        x = torch.randn(2, total, 3)
        assert torch.equal(made.join(made.split(x)), x), "join is not the inverse of split"

    return Call(grids.Layout, dict(segments=tuple(segments)), sane=sane, names=("segment", "layout"))


LAYOUT = grids.Layout((("text", 3), ("image", (2, 3)), ("cls", 1)))


@target("grids.Layout.methods")
def layout_methods(rng: random.Random) -> Call:
    def ask(name: str, tokens: int, x: Tensor, dim: int) -> Any:
        LAYOUT.check(tokens)
        parts = LAYOUT.split(x, dim)
        start, stop = LAYOUT.span(name)
        return parts[name], torch.tensor([start, stop, *LAYOUT.grid(name)])

    def oracle(name: str, tokens: int, x: Tensor, dim: int) -> Any:
        assert tokens == 10
        start, stop, grid = {"text": (0, 3, (3,)), "image": (3, 9, (2, 3)), "cls": (9, 10, (1,))}[name]
        return x.narrow(dim, start, stop - start), torch.tensor([start, stop, *grid])

    return Call(
        ask, dict(name=rng.choice(LAYOUT.names), tokens=10, x=torch.randn(2, 10, 3), dim=1), oracle,
        names=("segment", "layout"), allows=ANY_DTYPE,
    )  # fmt: skip


@target("grids.windows")
def windows(rng: random.Random) -> Call:
    grid, window = rng.choice([((4, 6), (2, 3)), ((6,), (2,)), ((2, 4, 4), (1, 2, 2))])
    cut, back = rng.choice(
        [(grids.block_windows, grids.unblock_windows), (grids.grid_windows, grids.ungrid_windows)]
    )  # fmt: skip
    return Call(lambda x, window_size: back(cut(x, window_size)), dict(x=torch.randn(2, *grid, 3), window_size=window),
                lambda x, window_size: x, allows=ANY_DTYPE)  # fmt: skip


@target("grids.helpers")
def helpers(rng: random.Random) -> Call:
    grid = rng.choice([(3, 5), (7,)])
    kind = rng.choice(["pad", "coordinates", "inverse", "flatten"])
    if kind == "pad":
        return Call(
            lambda x, multiple: grids.crop_grid(grids.pad_to_multiple(x, multiple), grid),
            dict(x=torch.randn(2, *grid, 3), multiple=rng.randint(1, 4)), lambda x, multiple: x[:, :, :5],
            names=("grid",), fixed=("x",),
        )  # fmt: skip
    if kind == "coordinates":
        return Call(
            grids.coordinates, dict(grid=grid),
            lambda grid: torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid)),
        )  # fmt: skip
    if kind == "inverse":
        return Call(
            grids.inverse_permutation, dict(permutation=torch.stack([torch.randperm(6) for _ in range(2)])),
            lambda permutation: torch.argsort(permutation, -1), allows=META,
        )  # fmt: skip
    return Call(
        lambda x, grid: grids.unflatten_grid(grids.flatten_grid(x)[0], grid),
        dict(x=torch.randn(2, *grid, 3), grid=grid),
        lambda x, grid: x.reshape(x.shape[0], *grid, x.shape[-1]), allows=ANY_DTYPE,
    )  # fmt: skip


@target("grids.Partition")
def partition(rng: random.Random) -> Call:
    q, k = torch.randint(-1, 9, (3, 2)), torch.randint(-1, 9, (3, 4))
    return Call(grids.Partition, dict(q_index=q, k_index=rng.choice([None, k])), sane=lambda p, g: None, allows=META)


# ---- positions


@target("positions.rotary")
def rotary(rng: random.Random) -> Call:
    b, h, n, d = 2, 3, rng.randint(1, 6), rng.choice([4, 8])
    interleaved = rng.random() < 0.5

    def run(x: Tensor, pos: Tensor, head_dim: int, base: float, interleaved: bool) -> Tensor:
        return positions.rotate(x, positions.rotary_angles(pos, head_dim, base), interleaved)

    def oracle(x: Tensor, pos: Tensor, head_dim: int, base: float, interleaved: bool) -> Tensor:
        half = head_dim // 2
        assert x.shape[-1] == head_dim and base > 0 and math.isfinite(base)
        angle = pos.double()[..., None] * float(base) ** (-torch.arange(half).double() / half)
        angle = angle[:, None] if angle.dim() == 3 else angle
        x = x.double()
        a, c = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        one, two = a * angle.cos() - c * angle.sin(), a * angle.sin() + c * angle.cos()
        return torch.stack([one, two], -1).flatten(-2) if interleaved else torch.cat([one, two], -1)

    pos = rng.choice([torch.arange(n), torch.randint(0, 50, (b, n))])
    return Call(
        run,
        dict(x=torch.randn(b, h, n, d), pos=pos, head_dim=d, base=rng.choice([100.0, 1e4]), interleaved=interleaved),
        oracle, names=("angles",), allows=("floats",), tolerance=1e-4,
    )  # fmt: skip


@target("positions.alibi")
def alibi(rng: random.Random) -> Call:
    n, m, h = rng.randint(1, 6), rng.randint(1, 6), rng.choice([1, 2, 3, 8])

    def oracle(num_heads: int, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        slopes = positions.alibi_slopes(num_heads).double()
        assert q_pos.dim() == k_pos.dim() == 1
        return (-slopes[:, None, None] * (q_pos[:, None] - k_pos[None]).abs())[None]

    return Call(
        lambda num_heads, q_pos, k_pos: positions.alibi(num_heads, q_pos, k_pos).dense(),
        dict(num_heads=h, q_pos=torch.randint(0, 9, (n,)), k_pos=torch.randint(0, 9, (m,))), oracle,
    )  # fmt: skip


@target("positions.relative")
def relative(rng: random.Random) -> Call:
    grid = rng.choice([(3, 2), (4,)])
    coords = grids.coordinates(grid)
    extent = tuple(2 * s - 1 for s in grid)
    offset = tuple(s - 1 for s in grid)

    def run(table: Tensor, q_coords: Tensor, k_coords: Tensor, offset: Any, extent: Any) -> Tensor:
        return positions.RelativeBias(table, q_coords, k_coords, offset, extent).dense()

    def oracle(table: Tensor, q_coords: Tensor, k_coords: Tensor, offset: Any, extent: Any) -> Tensor:
        assert len(offset) == len(extent) == q_coords.shape[1] == k_coords.shape[1]
        out = torch.zeros(1, table.shape[0], len(q_coords), len(k_coords), dtype=torch.float64)
        for i, q in enumerate(q_coords.tolist()):
            for j, k in enumerate(k_coords.tolist()):
                at = 0
                for a, c, o, e in zip(q, k, offset, extent, strict=True):
                    at = at * e + min(max(c - a + o, 0), e - 1)
                out[0, :, i, j] = table[:, at].double()
        return out

    return Call(
        run,
        dict(table=torch.randn(2, math.prod(extent)), q_coords=coords, k_coords=coords, offset=offset, extent=extent),
        oracle,
    )  # fmt: skip


@target("positions.axis")
def axis(rng: random.Random) -> Call:
    factors = [torch.randn(2, 3, 4, 2), torch.randn(1, 3, 4, 3)]
    k_coords = rng.choice([None, torch.stack([torch.randint(0, 2, (5,)), torch.randint(0, 3, (5,))], 1)])

    def oracle(factors: Any, k_coords: Any) -> Tensor:
        k = grids.coordinates([f.shape[-1] for f in factors]) if k_coords is None else k_coords.long()
        assert not k.numel() or k.min() >= 0
        return sum(f.double()[..., k[:, i]] for i, f in enumerate(factors))

    return Call(
        lambda factors, k_coords: positions.AxisBias(factors, k_coords).dense(),
        dict(factors=factors, k_coords=k_coords),
        oracle,
    )  # fmt: skip


@target("positions.toeplitz_matmul")
def toeplitz(rng: random.Random) -> Call:
    n, m, f = rng.randint(1, 5), rng.randint(1, 5), 2

    def oracle(c: Tensor, x: Tensor) -> Tensor:
        m = x.shape[-2]
        n = c.shape[-1] - m + 1
        index = torch.arange(m)[None] - torch.arange(n)[:, None] + n - 1
        assert n >= 1
        return c.double()[..., index] @ x.double()

    return Call(
        positions.toeplitz_matmul, dict(c=torch.randn(n + m - 1), x=torch.randn(m, f)), oracle, names=("queries",),
        tolerance=1e-4,
    )  # fmt: skip


@target("positions.sincos")
def sincos(rng: random.Random) -> Call:
    axes = rng.choice([1, 2])
    return Call(
        positions.sincos, dict(coords=torch.randint(0, 9, (5, axes)), dim=4 * axes, base=1e4),
        allows=("on meta", "floats"),
        sane=lambda out, g: _check(not out.numel() or out.abs().max() <= 1, "no sine"),
    )  # fmt: skip


def _check(fine: Any, words: str) -> None:
    assert bool(fine), words


# ---- normalizers


@target("normalizers")
def normalizer(rng: random.Random) -> Call:
    make, kwargs = rng.choice(
        [
            (normalizers.Sigmoid, dict(bias=-1.5)),
            (normalizers.ClippedSoftmax, dict(gamma=-0.1, zeta=1.1)),
            (normalizers.Relu, dict(divisor=3.0)),
            (normalizers.Uniform, dict(u=0.5)),
            (normalizers.Activated, dict(phi="softplus", l1=True, power=Either(2.0), offset=1.0, spare=3)),
            (normalizers.Activated, dict(phi="elu1", l1=False)),
        ]
    )

    def sane(made: Any, given: dict[str, Any]) -> None:
        scores = torch.randn(2, 3, 5)
        scores[0, 0] = -math.inf
        weights = made.weights(scores)
        _check(torch.isfinite(weights).all(), "weights are not finite")
        _check(not weights[0, 0].any(), "a row that sees nothing has weights")
        _check(normalizers.raise_normalizer(made.lower()) == made, "lower and raise do not return it")

    return Call(make, dict(kwargs), sane=sane)


@target("normalizers.as_normalizer")
def as_normalizer(rng: random.Random) -> Call:
    return Call(
        normalizers.as_normalizer, dict(normalizer=rng.choice(normalizers.normalizer_names())),
        sane=lambda out, g: _check(isinstance(out, normalizers.Normalizer), "no normalizer"),
    )  # fmt: skip


# ---- partials and states


@target("types.Partial")
def partial(rng: random.Random) -> Call:
    shape = (2, 3, 4)

    def run(log_scale: Tensor, den: Tensor, num: Tensor, log_weight: Any) -> Tensor:
        other = Partial(torch.zeros(shape), torch.ones(shape), torch.ones(*shape, 5))
        return other.merge(Partial(log_scale, den, num).shift(log_weight)).finish()

    def oracle(log_scale: Tensor, den: Tensor, num: Tensor, log_weight: Any) -> Tensor:
        assert log_scale.shape == den.shape == shape and num.shape == (*shape, 5)
        w = (log_scale.double() + log_weight).exp()
        return (1 + w[..., None] * num.double()) / (1 + w * den.double())[..., None]

    return Call(
        run, dict(log_scale=torch.randn(shape), den=torch.rand(shape) + 0.1, num=torch.randn(*shape, 5),
                  log_weight=rng.choice([0.5, torch.randn(shape), torch.randn(3, 1)])), oracle,
        names=("partial", "partials", "others"), allows=("-inf",),
    )  # fmt: skip


@target("types.State")
def state(rng: random.Random) -> Call:
    held = State({"k": torch.randn(3, 2), "inner": State({"n": torch.arange(3)})}, "someone")

    def run(index: Tensor, times: int, kind: str, batch: int) -> Any:
        return held.select(index).repeat(times).expect(kind, batch)["k"]

    def oracle(index: Tensor, times: int, kind: str, batch: int) -> Any:
        assert kind == "someone" and index.dim() == 1 and batch == len(index) * times and index.min() >= 0
        return held["k"][index.long()].repeat_interleave(times, 0)

    return Call(run, dict(index=torch.randint(0, 3, (4,)), times=2, kind="someone", batch=8), oracle, names=("state",))
