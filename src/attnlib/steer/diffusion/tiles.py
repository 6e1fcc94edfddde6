"""Denoisers that read a picture in pieces, or in several views, and predict it whole.

A *tiled* denoiser (Bar-Tal et al., 2023, MultiDiffusion) runs on overlapping tiles of the size that it was trained at,
and its predictions are averaged with weights that sum to one at every place,

    ``e(x) = sum_n W_n(x) e_n(x) / sum_n W_n(x)``.

A *view* moves the pixels of a picture to other places, or turns their sign: an orthogonal map, so that noise stays
noise, and its inverse takes a prediction back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_grid, check_int, check_real, checked, shaped, to_tuple
from ...grids import inverse_permutation
from ...hooks.denoiser import CallSite, rows_of
from ...hooks.intervention import Intervention
from ...types import stats_dtype

# ---------------------------------------------------------------------------------------------------------------------
# Tiles

WEIGHTS = ("even", "gaussian")


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture: pixels of its latents, or shares of its height and width."""

    top: float
    left: float
    height: float
    width: float

    def of(self, picture: Tensor) -> Tensor:
        """The tile of (..., H, W)."""
        top, left, height, width = (int(side) for side in (self.top, self.left, self.height, self.width))
        return picture[..., top : top + height, left : left + width]

    def shares(self, sides: Sequence[int]) -> Tile:
        """The same as shares of the height and width of a picture."""
        return Tile(self.top / sides[0], self.left / sides[1], self.height / sides[0], self.width / sides[1])


def tile_starts(size: int, tile: int, stride: int, offset: int = 0) -> list[int]:
    """Where tiles begin along one side: each ``stride`` behind the last, the outermost flush with the border.

    Args:
        offset: by how much the first would begin before the border.

    >>> tile_starts(20, 8, 6), tile_starts(20, 8, 6, 3), tile_starts(8, 8, 6)
    ([0, 6, 12], [0, 3, 9, 12], [0])
    """
    check_int("stride", stride, least=1, most=tile)
    if tile > size:
        raise ValueError(f"a tile of {tile} is larger than the picture, {size}")
    starts = range(-offset, size - tile + stride, stride)
    return sorted({min(max(0, start), size - tile) for start in starts})


def tiles_of(
    sides: Sequence[int], tile: Sequence[int], stride: Sequence[int], offset: Sequence[int] = (0, 0)
) -> list[Tile]:
    """Tiles of one size that cover a picture of ``sides``, row by row.

    >>> [(t.top, t.left) for t in tiles_of((4, 6), (4, 4), (2, 2))]
    [(0, 0), (0, 2)]
    """
    given = (("sides", sides), ("tile", tile), ("stride", stride), ("offset", offset))
    each = (to_tuple(name, value, 2) for name, value in given)
    rows, columns = (tile_starts(*one) for one in zip(*each, strict=True))
    return [Tile(top, left, *tile) for top in rows for left in columns]


def tile_weights(tile: Sequence[int], how: str = "gaussian", like: Tensor | None = None) -> Tensor:
    """(h, w) positive weights of a tile: all one, or falling like a Gaussian of a quarter of the side."""
    check_choice("how", how, WEIGHTS)
    dtype, device = (None, None) if like is None else (like.dtype, like.device)
    sides = [torch.arange(side, dtype=dtype or torch.get_default_dtype(), device=device) for side in tile]
    if how == "even":
        return torch.ones(tuple(tile), dtype=sides[0].dtype, device=device)
    falls = [torch.exp(-((at - (len(at) - 1) / 2) ** 2) / (2 * (len(at) / 4) ** 2)) for at in sides]
    return falls[0][:, None] * falls[1]


@shaped(parts="float (..., h, w)")
def fuse(parts: Tensor, tiles: Sequence[Tile], sides: Sequence[int], how: str = "gaussian") -> Tensor:
    """The picture (..., H, W) of its tiles, averaged where they overlap with weights that sum to one.

    >>> fuse(torch.ones(2, 1, 4, 4), tiles_of((4, 6), (4, 4), (2, 2)), (4, 6)).sum().item()
    24.0
    """
    if len(parts) != len(tiles):
        raise ValueError(f"parts must hold a part for each of {len(tiles)} tiles, got {len(parts)}")
    sides = check_grid("sides", sides, (2,))
    for tile in tiles:
        if tuple(parts.shape[-2:]) != (tile.height, tile.width):
            raise ValueError(f"parts must be of the size of {tile}, got {tuple(parts.shape[-2:])}")
    weights = tile_weights(parts.shape[-2:], how, parts.to(stats_dtype(parts.dtype)))
    total = parts.new_zeros((*parts.shape[1:-2], *sides), dtype=weights.dtype)
    share = weights.new_zeros(tuple(sides))
    for part, tile in zip(parts, tiles, strict=True):
        tile.of(total).add_(part * weights)
        tile.of(share).add_(weights)
    if not bool((share > 0).all()):
        raise ValueError(f"tiles leave places of the picture {tuple(sides)} uncovered")
    return (total / share).to(parts.dtype)


class InParts(Intervention):
    """A denoiser that runs on several pictures, tiles or views, made of the one that a pipeline denoises."""


class TiledDenoiser(InParts):
    """A denoiser that runs on overlapping tiles of the size that it knows.

    ::

        with attnlib.attach(pipe, TiledDenoiser(stride=48)):
            pipe("a field of flowers", height=1024, width=2048)

    Args:
        tile: sides of a tile in latents; ``None`` for those at training, ``config.sample_size``.
        stride: from tile to tile; ``None`` for three quarters of the tile.
        weights: ``"gaussian"``, or ``"even"`` as in MultiDiffusion.
        jitter: tiles lie elsewhere at every step, so that no seam stays.
        batch: tiles that run at once.
        crops: models that are told where their picture was cut out (SDXL) are told where the tile lies.
        seed: of ``jitter``; torch's own generators are not touched.

    Raises:
        ValueError: a tile larger than the picture, a model that is no U-Net or transformer of (B, C, H, W), residuals
            of a ControlNet.

    One tile that is the whole picture leaves the model as it is, bit for bit. Averaging predictions is what
    MultiDiffusion does to the latents of the next step, for schedulers that are linear in the prediction.

    >>> TiledDenoiser(64).tile
    (64, 64)
    """

    name: ClassVar[str] = "tiled-denoiser"

    def __init__(
        self,
        tile: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        weights: str = "gaussian",
        jitter: bool = False,
        batch: int = 1,
        crops: bool = True,
        seed: int = 0,
    ):
        self.tile = None if tile is None else to_tuple("tile", tile, 2)
        self.stride = None if stride is None else to_tuple("stride", stride, 2)
        for name, sides in (("tile", self.tile), ("stride", self.stride)):
            for side in sides or ():
                check_int(name, side, least=1)
        check_choice("weights", weights, WEIGHTS)
        self.weights, self.jitter, self.crops = weights, check_flag("jitter", jitter), check_flag("crops", crops)
        self.batch, self.seed = check_int("batch", batch, least=1), check_int("seed", seed)
        #: Tiles of the run that is being made, each with the rows of the pipeline's batch, and the sides of the whole.
        self.running: tuple[list[Tile], tuple[int, int]] | None = None

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, InParts):
            return "both run the denoiser on parts of a picture"
        if other.differentiates:
            return "losses of maps look at one run of the denoiser, and tiles take several"
        return "what was kept of one tile would be put into another" if other.reuses_features else None

    def layout(self, site: CallSite, sides: Sequence[int]) -> list[Tile]:
        """The tiles of a call."""
        known = getattr(getattr(site.module, "config", None), "sample_size", None)
        tile = self.tile or (None if known is None else to_tuple("sample_size", known, 2))
        if tile is None:
            raise ValueError(
                f"{type(site.module).__name__} does not say the size of its latents at training; give tile=..."
            )
        stride = self.stride or tuple(max(1, 3 * side // 4) for side in tile)
        offset = (0, 0)
        if self.jitter:
            draw = random.Random(f"{self.seed} {site.step}")  # noqa: S311
            offset = (draw.randrange(stride[0]), draw.randrange(stride[1]))
        return tiles_of(sides, tile, stride, offset)

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        main = inputs[site.main]
        if main.dim() != 4:
            raise ValueError(
                f"{type(self).__name__} cuts pictures (B, C, H, W) into tiles, and {type(site.module).__name__} "
                f"denoises {tuple(main.shape)}"
            )
        sides = tuple(main.shape[-2:])
        tiles = self.layout(site, sides)
        if any(inputs.get(name) is not None for name in ("down_block_additional_residuals",
                                                         "down_intrablock_additional_residuals")):  # fmt: skip
            raise ValueError(f"{type(self).__name__} does not cut residuals of a ControlNet or T2I adapter into tiles")
        parts: list[Tensor] = []
        try:
            for first in range(0, len(tiles), self.batch):
                some = tiles[first : first + self.batch]
                self.running = (some, sides)  # type: ignore[assignment]
                parts += self._run(site, inputs, call, some, len(main))
        finally:
            self.running = None
        return parts[0] if len(tiles) == 1 else fuse(torch.stack(parts), tiles, sides, self.weights)

    def _run(self, site: CallSite, inputs: dict[str, Any], call: Any, some: list[Tile], batch: int) -> list[Tensor]:
        main = inputs[site.main]
        if some[0].of(main).shape == main.shape:
            return [call(inputs)]
        index = list(range(batch)) * len(some)
        given = inputs if len(some) == 1 else rows_of(inputs, index, batch)
        given = {**given, site.main: torch.cat([tile.of(main) for tile in some])}
        added = given.get("added_cond_kwargs")
        if self.crops and isinstance(added, dict) and isinstance(added.get("time_ids"), Tensor):
            given["added_cond_kwargs"] = {**added, "time_ids": self._placed(site, added["time_ids"], some, batch)}
        with self.session.some_rows(index):
            return list(call(given).split(batch))

    @staticmethod
    def _placed(site: CallSite, ids: Tensor, some: list[Tile], batch: int) -> Tensor:
        """(B, 6) sizes and places that SDXL is told, with the upper left corner of each row's tile."""
        scale = getattr(site.sampling.pipe, "vae_scale_factor", 8) if site.sampling is not None else 8
        corners = ids.new_tensor([[t.top * scale, t.left * scale] for t in some]).repeat_interleave(batch, 0)
        return torch.cat([ids[:, :2], ids[:, 2:4] + corners, ids[:, 4:]], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Views


class View:
    """Pixels at other places, with the same or the other sign: ``y = sign x[order]`` for pictures of any size.

    Args:
        order: ``order(h, w)`` gives (h w,) or (h, w) numbers of the pixels that a view shows, row by row.
        sign: 1, or -1 for the negative; predicted variances keep their sign.
        name: for messages.
    """

    @checked
    def __init__(self, order: Callable[[int, int], Any], sign: int = 1, name: str = "view"):
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {sign!r}")
        self.sign, self.name = sign, name
        self.order = order
        self._orders: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"View({self.name})"

    def _order(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """The permutation for pictures of a size, and its inverse."""
        if (h, w) in self._orders:
            return self._orders[h, w]
        found = torch.as_tensor(np.array(self.order(h, w))).flatten()
        if not torch.equal(found.sort().values, torch.arange(h * w)):
            raise ValueError(
                f"{self!r} is not orthogonal: of the {h * w} pixels of {h} x {w} it shows "
                f"{len(found.unique())} different ones"
            )
        self._orders[h, w] = found, inverse_permutation(found)
        return self._orders[h, w]

    def _moved(self, x: Tensor, which: int, sign: int) -> Tensor:
        order = self._order(*x.shape[-2:])[which].to(x.device)
        return sign * x.flatten(-2).index_select(-1, order).view_as(x)

    def view(self, x: Tensor) -> Tensor:
        """What (..., H, W) looks like."""
        return self._moved(x, 0, self.sign)

    def inverse(self, x: Tensor, variance: bool = False) -> Tensor:
        """The way back, of predictions or of predicted variances."""
        return self._moved(x, 1, 1 if variance else self.sign)


def check_orthogonal(view: Any, sides: Sequence[int], channels: int = 3) -> None:
    """Whether a view keeps noise noise: lengths and angles stay, and its inverse is one.

    Raises:
        TypeError: without ``view`` and ``inverse``.
        ValueError: it does not.
    """
    for name in ("view", "inverse"):
        if not callable(getattr(view, name, None)):
            raise TypeError(f"views must have view(x) and inverse(x), got {view!r:.80}")
    x = torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = view.view(x)
    apart = [
        math.inf if y.shape != x.shape else (view.inverse(y) - x).abs().max().item(),
        math.inf if y.shape != x.shape else abs(((y[0] * y[1]).sum() - (x[0] * x[1]).sum()).item()) / x[0].numel(),
        math.inf if y.shape != x.shape else abs((y.square().sum() / x.square().sum()).item() - 1),
    ]
    if max(apart) > 1e-6:
        raise ValueError(
            f"{view!r} is not orthogonal on {tuple(sides)}: its inverse misses the picture by {apart[0]:.1e}, inner "
            f"products change by {apart[1]:.1e} and lengths by {apart[2]:.1e}; noise would not stay noise under it"
        )


def _numbers(h: int, w: int) -> np.ndarray:
    return np.arange(h * w).reshape(h, w)


def _square(h: int, w: int, name: str, by: int = 1) -> int:
    if h != w or h % by:
        raise ValueError(
            f"the view {name} needs square pictures{f' of a multiple of {by}' if by > 1 else ''}, got {h} x {w}"
        )
    return h


def identity_view() -> View:
    """The picture as it is."""
    return View(_numbers, name="identity")


def flipped(axis: int = -2) -> View:
    """Upside down, or mirrored with ``axis=-1``."""
    check_choice("axis", axis, (-2, -1))
    return View(lambda h, w: np.flip(_numbers(h, w), axis), name=f"flipped({axis})")


@checked
def rotated(degrees: int = 180) -> View:
    """Turned against the clock by a multiple of 90 degrees; of square pictures, other than by 180.

    >>> rotated(90).view(torch.tensor([[1, 2], [3, 4]])).tolist()
    [[2, 4], [1, 3]]
    """
    if degrees % 90:
        raise ValueError(f"degrees must be a multiple of 90, others move pixels between places; got {degrees}")

    def order(h: int, w: int) -> np.ndarray:
        if degrees % 180:
            _square(h, w, "rotated")
        return np.rot90(_numbers(h, w), degrees // 90)

    return View(order, name=f"rotated({degrees})")


def negated() -> View:
    """The negative."""
    return View(_numbers, -1, "negated")


def skewed(factor: float = 1.5) -> View:
    """Columns rolled down by ``factor`` times their distance from the middle."""
    check_real("factor", factor)

    def order(h: int, w: int) -> np.ndarray:
        at = _numbers(h, w)
        return np.stack([np.roll(at[:, i], int(factor * (i - h // 2))) for i in range(w)], 1)

    return View(order, name=f"skewed({factor})")


def inner_circle() -> View:
    """A disc of three eighths of the side turned by half a turn."""

    def order(h: int, w: int) -> np.ndarray:
        n = _square(h, w, "inner_circle")
        at = np.arange(n) - n // 2 + 0.5 if n % 2 == 0 else np.arange(n) - n // 2
        inside = at[:, None] ** 2 + at**2 < (n * 3 // 8) ** 2
        return np.where(inside, _numbers(n, n)[::-1, ::-1], _numbers(n, n))

    return View(order, name="inner_circle")


def square_hinge() -> View:
    """Nine squares, each turned by a quarter, neighbours in opposite directions."""

    def order(h: int, w: int) -> np.ndarray:
        n = _square(h, w, "square_hinge") // 3
        at = _numbers(h, w).copy()
        for i in range(3):
            for j in range(3):
                part = at[i * n : (i + 1) * n, j * n : (j + 1) * n]
                part[:] = np.rot90(part, 1 if (i + j) % 2 else -1).copy()
        return at

    return View(order, name="square_hinge")


def patches(count: int = 8, seed: int = 0) -> View:
    """``count`` by ``count`` patches in another order; one of each pixel, where there are so many."""
    check_int("count", count, least=1)
    moved = np.random.RandomState(seed).permutation(count * count)

    def order(h: int, w: int) -> np.ndarray:
        if h % count or w % count:
            raise ValueError(f"{count} x {count} patches do not divide a picture of {h} x {w}")
        parts = _numbers(h, w).reshape(count, h // count, count, w // count).transpose(0, 2, 1, 3)
        parts = parts.reshape(-1, h // count, w // count)[moved]
        return parts.reshape(count, count, h // count, w // count).transpose(0, 2, 1, 3)

    return View(order, name=f"patches({count})")


def jigsaw_pieces(size: int) -> np.ndarray:
    """(size, size) numbers 0 to 15 of the pieces of a jigsaw puzzle of four by four.

    Clockwise from the upper left there are corners 0 to 3 and inner pieces 4 to 7, and along each edge one of 8 to 11
    and then one of 12 to 15. A quarter turn of the puzzle is the puzzle, and both pieces of an edge have one shape.
    """
    side = _square(size, size, "jigsaw", 4) // 4
    at = np.arange(size) + 0.5
    labels = np.zeros((size, size), dtype=np.int64)
    cells = np.array([[0, 8, 12, 1], [15, 4, 5, 9], [11, 7, 6, 13], [3, 14, 10, 2]])
    labels[:] = cells.repeat(side, 0).repeat(side, 1)
    # Of the upper edge: knobs to the right between its pieces, downwards into the inner ones, and right within these.
    knobs = [(0.5, 1, 0, 1, 0), (0.5, 2, 0, 1, 8), (0.5, 3, 0, 1, 12), (1, 1.5, 1, 0, 8), (1, 2.5, 1, 0, 12),
             (1.5, 2, 0, 1, 4)]  # fmt: skip
    for turn in range(4):
        new = np.rot90(labels, turn)  # a view: the edge that is on the left comes up, and so on
        for y, x, down, right, piece in knobs:
            reach = 0.2 * side
            cy, cx = (y + down * 0.15) * side, (x + right * 0.15) * side
            disc = (at[:, None] - cy) ** 2 + (at - cx) ** 2 < reach**2
            group, number = piece // 4 * 4, piece % 4
            new[disc] = group + (number + turn) % 4
    return labels


def jigsaw(seed: int = 4522) -> View:
    """The pieces of :func:`jigsaw_pieces` laid out anew: corners, inner pieces and edges each among themselves."""
    draw = np.random.RandomState(seed)
    moved = np.concatenate([draw.permutation(4) for _ in range(4)])
    swaps = draw.randint(2, size=4)

    def order(h: int, w: int) -> np.ndarray:
        n = _square(h, w, "jigsaw", 4)
        pieces = jigsaw_pieces(n)
        ys, xs = np.divmod(_numbers(n, n), n)
        turns = (moved[pieces] - pieces % 4) % 4  # clockwise quarter turns that bring a piece to its new place
        for turn in range(1, 4):
            some = turns == turn
            y, x = ys[some], xs[some]
            for _ in range(turn):
                y, x = x, n - 1 - y
            ys[some], xs[some] = y, x
        landed = pieces[ys, xs]
        edge = landed % 4
        way = np.where((landed >= 8) & (swaps[edge] == 1), (1 - 2 * ((landed - 8) // 4)) * (1 - 2 * (edge // 2)), 0)
        xs = xs + np.where(edge % 2 == 0, way * (n // 4), 0)
        ys = ys + np.where(edge % 2 == 1, way * (n // 4), 0)
        return ys * n + xs

    return View(order, name=f"jigsaw({seed})")


@shaped(x="float (..., H, W)")
def low_pass(x: Tensor, cutoff: float, how: str = "ideal") -> Tensor:
    """The frequencies of (..., H, W) below ``cutoff`` of the highest, in each direction.

    Args:
        cutoff: share of the highest frequency; 1 keeps all.
        how: ``"ideal"`` cuts, ``"gaussian"`` falls to 0.61 there.

    >>> low_pass(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), 0.5).abs().max().item()
    0.0
    """
    check_choice("how", how, ("ideal", "gaussian"))
    check_real("cutoff", cutoff, above=0, most=1)
    h, w = x.shape[-2:]
    work = x.to(stats_dtype(x.dtype))
    fy = torch.fft.fftfreq(h, device=x.device, dtype=work.dtype).abs() * 2
    fx = torch.fft.rfftfreq(w, device=x.device, dtype=work.dtype).abs() * 2
    if how == "ideal":
        keep = ((fy[:, None] <= cutoff) & (fx <= cutoff)).to(work.dtype)
    else:
        keep = torch.exp(-(fy[:, None] ** 2 + fx**2) / (2 * cutoff**2))
    return torch.fft.irfft2(torch.fft.rfft2(work) * keep, s=(h, w)).to(x.dtype)
