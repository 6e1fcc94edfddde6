"""FloAt: the self-attention of a frame is blended with that of the frame before, carried along by the optical flow.

With maps ``A_f`` (H, N, N) of frame f after the softmax and the flow ``F_f`` between frames f - 1 and f, on the grid of
the layer,

    ``A'_f = a A_f + (1 - a) (m_f W(A_{f-1}; F_f) + (1 - m_f) A_{f-1}),    O_f = A'_f V_f``,

where W reads the map bilinearly where each place came from and ``m_f = 1[|F_f| > threshold]`` says which places move:
what moves takes its clothing's row along, what stands still keeps the row it had, so that the background does not
flicker. Rows are made to sum to one again.

There is no released code. What the text leaves open is an option, and its default is our reading: whether keys are
carried along too (``over``), whether ``A_{f-1}`` is the frame's own map or what it was blended to (``source``), the
share ``a``, and what lies outside the image (``border``). A patent application (US 2026/0051101 A1) covers the method.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_float, check_int, check_rank, check_real, check_values, shaped, to_list
from ...hooks.intervention import Intervention
from ...hooks.site import Site

OVER = ("queries", "both")
SOURCES = ("raw", "blended")
BORDERS = ("zeros", "edge", "circular")
FRAMES = ("batch", "calls")


@shaped(flow="float (2, H, W)")
def flow_on_grid(flow: Tensor, grid: Sequence[int]) -> Tensor:
    """A flow on a coarser or finer grid, in cells of that grid: the mean over each cell, scaled by the sides' ratios.

    Args:
        flow: how far in x and y, in pixels of its own grid.
        grid: ``(h, w)``.

    Returns:
        (2, h, w).

    >>> flow_on_grid(torch.full((2, 8, 4), 4.0), (4, 4))[:, 0, 0].tolist()
    [4.0, 2.0]
    """
    h, w = (check_int("grid", side, least=1) for side in grid)
    small = F.interpolate(flow[None], (h, w), mode="area")[0]
    return small * small.new_tensor([w / flow.shape[-1], h / flow.shape[-2]])[:, None, None]


def _carried(flow: Tensor, border: str) -> tuple[Tensor, Tensor]:
    """Where each place of a grid came from: numbers (h w, 4) of the places around it, and their bilinear weights."""
    h, w = flow.shape[-2:]
    rows, columns = torch.arange(h, device=flow.device), torch.arange(w, device=flow.device)
    x, y = flow[0] + columns, flow[1] + rows[:, None]
    left, top = x.floor(), y.floor()
    numbers, weights = [], []
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        column, row = left + dx, top + dy
        weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
        if border == "zeros":
            weight = weight * ((column >= 0) & (column < w) & (row >= 0) & (row < h))
        wrapped = (row % h, column % w) if border == "circular" else (row.clamp(0, h - 1), column.clamp(0, w - 1))
        numbers.append((wrapped[0] * w + wrapped[1]).long().flatten())
        weights.append(weight.flatten())
    return torch.stack(numbers, -1), torch.stack(weights, -1)


@shaped(maps="float (..., N, N)", flow="float (2, h, w)")
def warp_maps(maps: Tensor, flow: Tensor, over: str = "queries", border: str = "zeros") -> Tensor:
    """Attention maps of a frame as the flow carries them to the next: each row is read where its place came from.

    Args:
        maps: N = h w queries and keys, in rows of the grid.
        flow: of the next frame, on its grid: place + flow is where it was in this frame; x first, in cells.
        over: ``"queries"``; ``"both"`` moves keys alike.
        border: what comes from outside the grid: nothing, the nearest place, or the other side.

    Returns:
        Maps of the same shape; their rows sum to less than one where something came from outside.

    >>> maps = torch.eye(4).unflatten(0, (4,))
    >>> warp_maps(maps, torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 2), border="circular")[0].tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    check_choice("over", over, OVER)
    check_choice("border", border, BORDERS)
    if maps.shape[-1] != math.prod(flow.shape[-2:]):
        raise ValueError(f"maps are of {maps.shape[-1]} places, and the grid of the flow is {tuple(flow.shape[-2:])}")
    numbers, weights = _carried(flow, border)
    weights = weights.to(maps)

    def read(x: Tensor) -> Tensor:
        return sum(x[..., numbers[:, c], :] * weights[:, c, None] for c in range(4))  # type: ignore[return-value]

    warped = read(maps)
    return read(warped.transpose(-1, -2)).transpose(-1, -2) if over == "both" else warped


class FlowAttention(Intervention):
    """FloAt in a denoiser: frames of a clip attend as the frame before them did, where the flow leads.

    Frames are the results of one call in their order (``pipe([prompt] * F)`` or ``num_images_per_prompt=F``; every
    guidance group holds all of them), or one call each. Give all of them the same initial noise where the background
    must not flicker.

    Args:
        flow: (F - 1, 2, H, W) of frames 2 to F, in pixels of any grid of the image's shape: a pixel of frame f came
            from pixel + flow of frame f - 1; x first.
        weight: share ``a`` of a frame's own map, in [0, 1]; 1 is the plain model.
        threshold: pixels of the flow's grid above which a place moves.
        over: ``"queries"`` are carried along, or ``"both"`` queries and keys.
        source: the map of the frame before as the model made it (``"raw"``), or as it was ``"blended"``.
        border: ``"zeros"``, ``"edge"`` or ``"circular"``; rows are made to sum to one again.
        frames: ``"batch"``, or ``"calls"``: one call of the pipeline per frame. Their maps are kept, N x N numbers per
            head, layer and step, until the session ends or ``reset()`` begins a new clip.
        layers: numbers or name patterns; ``None`` for all self-attention of images.
        steps: denoising steps at which to act; ``None`` for all.

    Raises:
        ValueError: a batch that is not made of whole clips, more calls than frames, layers without a grid.

    Reference: Karim et al., 2024, arXiv 2411.15028; no released code, our reading.

    >>> FlowAttention(torch.zeros(3, 2, 8, 8)).count
    4
    """

    name: ClassVar[str] = "float-clothing"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    own_keys = True
    whole_map: ClassVar[bool] = True

    def __init__(
        self,
        flow: Tensor,
        weight: float = 0.5,
        threshold: float = 1.0,
        over: str = "queries",
        source: str = "raw",
        border: str = "zeros",
        frames: str = "batch",
        layers: Sequence[int | str] | None = None,
        steps: Collection[int] | None = None,
    ):
        check_float("flow", flow)
        check_rank("flow", flow, 4, "(F - 1, 2, H, W)")
        if not len(flow) or flow.shape[1] != 2:
            raise ValueError(f"flow must have shape (F - 1, 2, H, W) of at least two frames, got {tuple(flow.shape)}")
        check_values("flow", flow)
        if not bool(flow.isfinite().all()):
            raise ValueError("flow must be finite; set places that are not known to zero")
        self.flow, self.count = flow.detach(), len(flow) + 1
        self.weight = check_real("weight", weight, least=0, most=1)
        self.threshold = check_real("threshold", threshold, least=0)
        for name, value, choices in (("over", over, OVER), ("source", source, SOURCES), ("border", border, BORDERS),
                                     ("frames", frames, FRAMES)):  # fmt: skip
            check_choice(name, value, choices)
        self.over, self.source, self.border, self.frames = over, source, border, frames
        self.layers = to_list("layers", layers)
        self.steps = None if steps is None else frozenset(check_int("steps", s, least=0) for s in steps)
        self.reset()

    def reset(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._flows: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._runs: dict[tuple[Any, ...], int] = {}
        self._frame = self._call = -1

    @property
    def identity(self) -> bool:
        return self.weight == 1 or self.steps == frozenset()

    def on_attach(self, session: Any) -> None:
        if self.frames == "calls" and session.sampling is None:
            raise ValueError("frames='calls' counts calls of a pipeline; attach to it: attach(pipe, ...)")

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        if self.steps is not None:
            if site.step is None:
                raise ValueError(f"layer {site.layer} ({site.name}) is not told its step; attach to the pipeline")
            if site.step not in self.steps:
                return weights
        layout = site.q_layout
        grid = layout.grid("image") if layout is not None and "image" in layout.names else ()
        if len(grid) != 2 or math.prod(grid) != weights.shape[-1]:
            raise ValueError(f"layer {site.layer} ({site.name}) attends over no image grid; leave it out with layers=")
        return self._in_calls(site, weights, grid) if self.frames == "calls" else self._in_batch(site, weights, grid)

    def _in_batch(self, site: Site, weights: Tensor, grid: tuple[int, ...]) -> Tensor:
        groups = [len(list(same)) for _, same in groupby(site.rows or [""] * len(weights))]
        if any(group % self.count for group in groups):
            raise ValueError(
                f"flow is of {self.count} frames, and a batch of {len(weights)} rows ({max(groups)} of a kind) holds "
                f"no whole clips; call the pipeline with num_images_per_prompt={self.count}, or attach with "
                "frames='calls'"
            )
        clips = weights.unflatten(0, (-1, self.count))
        done = [clips[:, 0]]
        for f in range(1, self.count):
            before = done[-1] if self.source == "blended" else clips[:, f - 1]
            done.append(self._blend(clips[:, f], before, f, grid))
        return torch.stack(done, 1).flatten(0, 1)

    def _in_calls(self, site: Site, weights: Tensor, grid: tuple[int, ...]) -> Tensor:
        call = self.session.sampling.call
        if call != self._call:
            self._call, self._frame = call, self._frame + 1
            self._runs.clear()
        if self._frame >= self.count:
            raise ValueError(f"flow is of {self.count} frames, and this is one more call; begin a clip with reset()")
        place = (site.layer, site.step, site.pass_name, site.branch)
        run = self._runs[place] = self._runs.get(place, -1) + 1
        key = (*place, run)
        before = self._kept.get(key)
        if self._frame and (before is None or before.shape != weights.shape):
            found = "no such call" if before is None else f"maps {tuple(before.shape)}"
            raise ValueError(
                f"layer {site.layer} ({site.name}), step {site.step}: the frame before had {found}, this one has "
                f"{tuple(weights.shape)}; call the pipeline alike for every frame"
            )
        out = weights if before is None else self._blend(weights, before, self._frame, grid)
        self._kept[key] = (out if self.source == "blended" else weights).detach()
        return out

    def _blend(self, own: Tensor, before: Tensor, frame: int, grid: tuple[int, ...]) -> Tensor:
        key = (frame, grid, own.device)
        if key not in self._flows:
            flow = self.flow[frame - 1].to(own.device, torch.float32)
            sides = flow.new_tensor([flow.shape[-1] / grid[1], flow.shape[-2] / grid[0]])
            small = flow_on_grid(flow, grid)
            moves = (small * sides[:, None, None]).norm(dim=0) > self.threshold
            self._flows[key] = small, moves.flatten()[:, None]
        flow, moves = self._flows[key]
        warped = torch.where(moves, warp_maps(before, flow, self.over, self.border), before)
        mass = warped.sum(-1, keepdim=True)
        # Rows that came from outside altogether stay this frame's own.
        warped = torch.where(mass > 1e-6, warped / mass.clamp(min=1e-6), own)
        return self.weight * own + (1 - self.weight) * warped
