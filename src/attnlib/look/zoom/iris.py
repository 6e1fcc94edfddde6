"""Iris: crops of a screen that hold about as much as each other, and two tasks that teach each other.

*Information-sensitive cropping* spends pictures where there is something to see. Over the edges of a screen, windows
of side ``k`` are kept where their share of edge pixels reaches ``rho_k``, small windows first, and what they cover is
spent::

    rho_k = rho_min (k_min / k)^2,    so that rho_k k^2 = rho_min k_min^2 edge pixels at every size.

*Dual learning* lets grounding (text to box) and referring (box to text) label for each other: a box and its text are
kept once the box comes back from its own text. Screens with rich spectra, and samples that failed before, come first.

There is no authors' code; this is written from the paper and notes on it. What they do not state is an argument:
``k_min``, ``rho_min``, ``alpha``, ``max_crops``, the edge detector, whether the whole screen is shown beside the
crops, how crops are ordered and told to the model, and ``tau``. Windows that end with the screen are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_int, check_real, check_type, describe
from ...extras import need
from ..pixels import Picture, check_box, to_picture
from ..speak import BaseSpeaker, check_text, need_speaker
from .views import Crop, crop
from .zoom_eye import Answer

# ---------------------------------------------------------------------------------------------------------------------
# Edges


def sobel_edges(image: Any, threshold: float = 0.1) -> np.ndarray:
    """(H, W) boolean: where grey levels in [0, 1] change by more than ``threshold`` per pixel; dark and light alike."""
    grey = _grey(image)
    check_real("threshold", threshold, above=0)
    padded = np.pad(grey, 1, mode="edge")
    smooth = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dy = smooth[2:] - smooth[:-2]
    smooth = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    dx = smooth[:, 2:] - smooth[:, :-2]
    return dx * dx + dy * dy > (8 * threshold) ** 2


def canny_edges(image: Any, low: float = 0.1, high: float = 0.2, sigma: float = 1.0) -> np.ndarray:
    """(H, W) boolean by Canny's detector of scikit-image, on grey levels in [0, 1]."""
    check_real("low", low, least=0)
    check_real("high", high, least=low)
    check_real("sigma", sigma, least=0)
    feature = need("skimage.feature", "canny_edges")
    return feature.canny(_grey(image).astype(np.float64), sigma=sigma, low_threshold=low, high_threshold=high)


def _grey(image: Any) -> np.ndarray:
    picture = to_picture(image)
    weights = np.array([0.299, 0.587, 0.114], np.float32) / (255 if picture.dtype == np.uint8 else 1)
    return picture.astype(np.float32) @ weights


def _edge_map(edges: Any, size: tuple[int, int]) -> np.ndarray:
    if isinstance(edges, Tensor):
        edges = edges.detach().cpu().numpy()
    found = np.asarray(edges)
    if found.dtype != np.bool_ or found.shape != size:
        raise ValueError(f"edges must be a boolean map {size}, got {found.dtype} of shape {found.shape}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Crops


@dataclass(frozen=True)
class Window:
    """A window that holds enough: its box, and the share of its pixels that were unspent edges."""

    box: tuple[int, int, int, int]
    density: float


def _steps(length: int, side: int, step: int, boundary: bool) -> list[int]:
    starts = list(range(0, length - side + 1, step))
    if boundary and starts and starts[-1] != length - side:
        starts.append(length - side)
    return starts


def information_windows(
    edges: np.ndarray | Tensor,
    *,
    k_min: int = 64,
    rho_min: float = 0.15,
    alpha: float = 1.5,
    max_crops: int = 50,
    boundary: bool = True,
) -> list[Window]:
    """Windows that hold as many edge pixels as each other, small ones first.

    Args:
        edges: (H, W) boolean.
        k_min: side of the smallest window.
        rho_min: share of edge pixels that it needs; larger ones need as many pixels.
        alpha: growth of the side from size to size.
        max_crops: most windows.
        boundary: also try windows that end with the picture, where the raster leaves a strip.

    Returns:
        Windows in the order found; edge pixels belong to the first window that holds them.

    Reference: Ge et al., 2024, arXiv 2412.10342.

    >>> edges = np.zeros((64, 64), bool)
    >>> edges[32:48, 32:48] = True
    >>> information_windows(edges, k_min=32, max_crops=1)[0].box
    (32, 32, 64, 64)
    """
    edges = edges.detach().cpu().numpy() if isinstance(edges, Tensor) else np.asarray(edges)
    if edges.ndim != 2 or edges.dtype != np.bool_ or 0 in edges.shape:
        raise ValueError(f"edges must be a boolean map (H, W), got {edges.dtype} of shape {edges.shape}")
    k = check_int("k_min", k_min, least=1)
    check_real("rho_min", rho_min, above=0, most=1)
    check_real("alpha", alpha, above=1)
    check_int("max_crops", max_crops, least=1)
    check_flag("boundary", boundary)
    height, width = edges.shape
    needed = rho_min * k_min**2  # pixels, the same at every size
    sides = []
    while k <= min(height, width):
        sides.append(k)
        k = math.ceil(alpha * k)
    raster = [[np.array(_steps(n, k, max(k // 4, 32), boundary)) for n in (height, width)] for k in sides]
    # All windows lie on few lines: what stands between these is summed once, and spent there.
    lines = []
    for axis, n in enumerate((height, width)):
        ends = [np.concatenate([starts[axis], starts[axis] + k]) for k, starts in zip(sides, raster, strict=True)]
        lines.append(np.unique(np.concatenate([np.arange(0, n, _MOST), np.array([n]), *ends])))
    left = np.add.reduceat(_strips(edges.view(np.uint8), lines[0]), lines[1][:-1], 1, dtype=np.int32)
    found: list[Window] = []
    for k, (ys, xs) in zip(sides, raster, strict=True):
        top, bottom = np.searchsorted(lines[0], ys), np.searchsorted(lines[0], ys + k)
        start, stop = np.searchsorted(lines[1], xs), np.searchsorted(lines[1], xs + k)
        sums = _window_sums(left, top, bottom, start, stop)
        for i, j in zip(*np.nonzero(sums >= needed), strict=True):  # spending only lowers: the rest stays out
            y, x = int(ys[i]), int(xs[j])
            cells = left[top[i] : bottom[i], start[j] : stop[j]]
            mass = int(cells.sum())  # less than before where windows of this size have taken some
            if mass >= needed:
                found.append(Window((x, y, x + k, y + k), mass / k**2))
                cells[:] = 0
                if len(found) == max_crops:
                    return found
    return found


def _window_sums(
    cells: np.ndarray, top: np.ndarray, bottom: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """(n, m) sums of ``cells[top[i]:bottom[i], start[j]:stop[j]]`` by an integral over the lines they use."""
    rows = np.unique(np.concatenate([[0, cells.shape[0]], top, bottom]))
    columns = np.unique(np.concatenate([[0, cells.shape[1]], start, stop]))
    table = np.zeros((len(rows), len(columns)), np.int64)
    between = np.add.reduceat(np.add.reduceat(cells, rows[:-1], 0), columns[:-1], 1)
    table[1:, 1:] = between.cumsum(0).cumsum(1)
    above, below = np.searchsorted(rows, top)[:, None], np.searchsorted(rows, bottom)[:, None]
    left, right = np.searchsorted(columns, start), np.searchsorted(columns, stop)
    return table[below, right] - table[above, right] - table[below, left] + table[above, left]


#: Pixels of a strip whose sums fit into a byte.
_MOST = 255


def _strips(edges: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Sums (len(lines) - 1, W) of rows of zeros and ones between lines at most :data:`_MOST` apart.

    In bytes, which a processor adds dozens at a time; ``reduceat`` converts every one of them.
    """
    out = np.empty((len(lines) - 1, edges.shape[1]), np.uint8)
    for i, (first, last) in enumerate(itertools.pairwise(lines.tolist())):
        np.add.reduce(edges[first:last], 0, dtype=np.uint8, out=out[i])
    return out


class InformationCrops:
    """Crops of a screen that hold about as much as each other, with the way back to it.

    Args:
        k_min, rho_min, alpha, max_crops, boundary: of :func:`information_windows`.
        size: side of the crops as they are shown; ``None`` leaves them as they are.
        edges: ``"sobel"``, ``"canny"``, or a function of the picture that gives a boolean map (H, W).
        whole: show the whole screen last.
        order: ``"density"``, densest first, ``"reading"`` order, or ``"found"``.

    A screen without edges gives the whole screen alone.

    Reference: Ge et al., 2024, arXiv 2412.10342.

    >>> [c.box for c in InformationCrops()(torch.zeros(80, 120, 3))]
    [(0, 0, 120, 80)]
    """

    def __init__(
        self,
        *,
        k_min: int = 64,
        rho_min: float = 0.15,
        alpha: float = 1.5,
        max_crops: int = 50,
        boundary: bool = True,
        size: int | None = 224,
        edges: str | Callable[[Picture], Any] = "sobel",
        whole: bool = True,
        order: str = "density",
    ):
        self.windows = dict(k_min=k_min, rho_min=rho_min, alpha=alpha, max_crops=max_crops, boundary=boundary)
        information_windows(np.zeros((1, 1), bool), **self.windows)  # type: ignore[arg-type]  # checks them
        self.size = None if size is None else check_int("size", size, least=1)
        if isinstance(edges, str):
            check_choice("edges", edges, ("sobel", "canny"))
            edges = sobel_edges if edges == "sobel" else canny_edges
        if not callable(edges):
            raise TypeError(f"edges must be 'sobel', 'canny' or a function of the picture, got {describe(edges)}")
        self.edges = edges
        self.whole = check_flag("whole", whole)
        check_choice("order", order, ("density", "reading", "found"))
        self.order = order

    def __call__(self, image: Any) -> list[Crop]:
        """Crops of a picture, the whole last.

        Raises:
            ValueError: a picture smaller than the smallest window, a map of edges of another size.
        """
        picture = to_picture(image)
        size = (picture.shape[0], picture.shape[1])
        k_min = int(self.windows["k_min"])
        if min(size) < k_min:
            raise ValueError(
                f"image of {size[1]} × {size[0]} pixels is smaller than the smallest window of {k_min}; give a "
                f"smaller k_min"
            )
        windows = information_windows(_edge_map(self.edges(picture), size), **self.windows)  # type: ignore[arg-type]
        if self.order == "density":
            windows.sort(key=lambda window: -window.density)
        elif self.order == "reading":
            windows.sort(key=lambda window: (window.box[1], window.box[0]))
        shown = None if self.size is None else (self.size, self.size)
        crops = [crop(picture, window.box, shown) for window in windows]
        if self.whole or not crops:
            crops.append(crop(picture, (0, 0, size[1], size[0]), shown if crops else None))
        return crops


class Iris:
    """Ask about a screen through its crops.

    Args:
        speaker: a :class:`attnlib.look.speak.Speaker` that reads several pictures.
        crops: what makes them.
        place: how a crop is told to the model; ``{number}``, ``{x1}`` ... ``{y2}`` are filled in, in pixels of the
            screen.
        last: how the whole screen is told.
    """

    def __init__(
        self,
        speaker: Any,
        crops: InformationCrops | None = None,
        place: str = "Crop {number}, at ({x1}, {y1}) to ({x2}, {y2}): <image>\n",
        last: str = "The whole screen: <image>\n",
    ):
        self.speaker: BaseSpeaker = need_speaker(speaker)
        self.crops = InformationCrops() if crops is None else crops
        check_type("crops", self.crops, InformationCrops)
        for name, text in (("place", place), ("last", last)):
            check_type(name, text, str, "a string")
            if text.count("<image>") != 1:
                raise ValueError(f"{name} must mark one picture with <image>, got {text!r}")
        self.place, self.last = place, last

    def answer(self, image: Any, question: str) -> Answer:
        """Answer a question about a screen; one without edges gives the plain model's answer."""
        check_type("question", question, str, "a string")
        check_text("question", question)
        picture = to_picture(image)
        crops = self.crops(picture)
        whole = (0, 0, picture.shape[1], picture.shape[0])
        with self.speaker.counting() as calls:
            if [c.box for c in crops] == [whole]:
                return Answer.of(self.speaker.ask(picture, question), views=(picture,), calls=calls)
            text = ""
            for number, part in enumerate(crops, 1):
                line = self.last if part.box == whole else self.place.replace("{number}", str(number))
                for name, value in zip(("x1", "y1", "x2", "y2"), part.box, strict=True):
                    line = line.replace(f"{{{name}}}", str(value))
                text += line
            views = [part.image for part in crops]
            said = self.speaker.ask(views, text + question)
        boxes = tuple(part.box for part in crops if part.box != whole)
        return Answer.of(said, boxes=boxes, views=tuple(views), calls=calls)


# ---------------------------------------------------------------------------------------------------------------------
# Dual learning


def spectral_entropy(edges: Any) -> float:
    """Entropy of the normalised energy spectrum of a map (H, W), in nats: 0 for a constant map, more for richer ones.

    >>> spectral_entropy(np.ones((8, 8)))
    0.0
    """
    found = np.asarray(edges.detach().cpu() if isinstance(edges, Tensor) else edges, dtype=np.float64)
    if found.ndim != 2 or 0 in found.shape or not np.isfinite(found).all():
        raise ValueError(f"edges must be a map (H, W) of finite numbers, got shape {found.shape}")
    energy = np.abs(np.fft.fft2(found)) ** 2
    total = energy.sum()
    if total == 0:
        return 0.0
    p = energy / total
    p = p[p > 1e-15]
    return max(0.0, float(-(p * np.log(p)).sum()))


def hardest_first(maps: Sequence[Any]) -> list[int]:
    """Numbers of screens, those with the richest edges first."""
    entropies = [spectral_entropy(one) for one in maps]
    return sorted(range(len(entropies)), key=lambda i: -entropies[i])


def failure_weights(correct: Sequence[int], seen: Sequence[int], floor: float = 0.05) -> Tensor:
    """How often samples are drawn: in proportion to how often they failed, at least ``floor``; unseen ones fully.

    Args:
        correct, seen: times each sample was answered right, and at all.
        floor: least weight before they are normalised.

    Returns:
        (n,) float64 that sums to 1.
    """
    right, total = (torch.as_tensor(list(values), dtype=torch.float64) for values in (correct, seen))
    if right.shape != total.shape or right.ndim != 1 or not len(right):
        raise ValueError(f"correct and seen must be two lists of one length, got {len(right)} and {len(total)}")
    if (right < 0).any() or (right > total).any():
        raise ValueError("correct must lie between 0 and seen")
    check_real("floor", floor, above=0, most=1)
    failed = torch.where(total > 0, 1 - right / total.clamp(min=1), 1.0).clamp(min=floor)
    return failed / failed.sum()


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where either is empty.

    >>> box_iou((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    sides = [min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1)]
    shared = max(sides[0], 0.0) * max(sides[1], 0.0)
    areas = [max(c[2] - c[0], 0.0) * max(c[3] - c[1], 0.0) for c in (a, b)]
    union = areas[0] + areas[1] - shared
    return shared / union if shared > 0 and union > 0 else 0.0


@dataclass(frozen=True)
class Dual:
    """What dual learning made of a text: its box, the text that the box gives, how often it went round, if it "
    "agreed."""

    box: tuple[int, int, int, int]
    text: str
    rounds: int
    agreed: bool


def dual_learn(
    ground: Callable[[Any, str], Sequence[float]],
    refer: Callable[[Any, Sequence[float]], str],
    image: Any,
    text: str,
    *,
    tau: float = 0.5,
    max_rounds: int = 3,
    similarity: Callable[[Sequence[float], Sequence[float]], float] = box_iou,
) -> Dual:
    """Let a box and a text label each other until the box comes back from its own text.

    Args:
        ground: ``ground(image, text) -> box`` in pixels.
        refer: ``refer(image, box) -> text``.
        image: the screen.
        text: what is looked for.
        tau: boxes agree above this.
        max_rounds: times the box is described and found again.
        similarity: of two boxes.

    Returns:
        A :class:`Dual`; what did not agree does not belong in a training set.

    Reference: Ge et al., 2024, arXiv 2412.10342.
    """
    check_text("text", text)
    check_real("tau", tau, least=0, below=1)
    check_int("max_rounds", max_rounds, least=1)
    picture = to_picture(image)
    size = (picture.shape[0], picture.shape[1])
    box = check_box("the box of ground", ground(image, text), size)
    said = text
    for number in range(1, max_rounds + 1):
        said = refer(image, box)
        check_type("the text of refer", said, str, "a string")
        again = check_box("the box of ground", ground(image, said), size)
        if similarity(box, again) > tau:
            return Dual(box, said, number, True)
        box = again
    return Dual(box, said, max_rounds, False)
