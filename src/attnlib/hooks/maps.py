"""Attention maps of a denoiser as differentiable pictures, reduced while they pass.

Of each layer at one resolution the mean over heads is taken at once, its columns are gathered to spans of text tokens,
and layers are averaged as they come: what is kept is one picture per span. Where the model runs with gradient, so are
the pictures; the model's own kernel stays, and no layer at another resolution is computed beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_int
from ..types import to_list
from .intervention import Probe
from .recompute import refuse_reentrant
from .site import Site

#: What a picture shows: where image tokens look in the text, or in the image.
OF = ("text", "image")


class Maps(Probe):
    """Where the image looks: (B, T, h, w) weights that image tokens give to spans of text tokens (or to each other).

    After every run of the denoiser :meth:`take` gives the mean over heads and layers of that run. Layers of cross
    attention and of joint attention serve; in joint attention weights are those of the softmax over both streams.

    Args:
        resolution: ``(h, w)`` of the maps, or the longer side; layers at others are not looked at. ``None`` for all,
            which are then kept apart.
        spans: token numbers of each span, as the denoiser reads the text; the mean over a span's columns is taken.
            ``None`` for every token by itself.
        of: ``"text"``, or ``"image"`` for the weights between image tokens, (B, h w, h, w): which key, then where.
        layers: numbers or name patterns; ``None`` for all.
        gradient: the maps carry gradient where the model runs with it.

    >>> Maps(16, spans=[[2], [5, 6]]).kinds
    ('cross', 'joint')
    """

    name: ClassVar[str] = "maps"

    def __init__(
        self,
        resolution: int | Sequence[int] | None = None,
        spans: Sequence[Sequence[int]] | None = None,
        of: str = "text",
        layers: Sequence[int | str] | None = None,
        gradient: bool = True,
    ):
        check_choice("of", of, OF)
        if isinstance(resolution, (list, tuple)):
            if len(resolution) != 2:
                raise ValueError(f"resolution must be (height, width) or the longer side, got {resolution!r}")
            resolution = tuple(check_int("resolution", side, least=1) for side in resolution)
        elif resolution is not None:
            resolution = check_int("resolution", resolution, least=1)  # type: ignore[arg-type]
        self.resolution, self.of, self.layers = resolution, of, to_list("layers", layers)
        if spans is not None:
            if of == "image":
                raise ValueError("spans are of text tokens; leave them out with of='image'")
            spans = [[check_int("spans", t, least=0) for t in span] for span in spans]
            if not spans or not all(spans):
                raise ValueError("spans must hold at least one span, and each at least one token")
        self.spans = spans
        self.kinds = ("cross", "joint") if of == "text" else ("self", "joint")  # type: ignore[misc]
        self.differentiable = gradient
        self.looking = True
        #: Of how many layers the maps were that :meth:`take` gave last.
        self.taken = 0
        self.reset()

    def reset(self) -> None:
        self._run = -1
        self._sums: dict[tuple[int, ...], Tensor] = {}
        self._counts: dict[tuple[int, ...], int] = {}
        self._blocks: list[Tensor] = []
        self._passed: set[tuple[int, ...]] = set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is looked at, and what was seen before stays."""
        before, self.looking = self.looking, False
        try:
            yield
        finally:
            self.looking = before

    def take(self, resolution: Sequence[int] | None = None) -> Tensor:
        """The maps of the last run, (B, T, h, w); forgotten here.

        Args:
            resolution: which of several, where ``Maps`` was made without one.

        Raises:
            RuntimeError: no layer was seen at the resolution.
            ValueError: several resolutions were seen and none is named.
        """
        if self._run != self.session._now.run:
            self.reset()
        seen = sorted(self._sums)
        wanted = None if resolution is None else tuple(resolution)
        if wanted is None and len(seen) > 1:
            raise ValueError(f"maps were seen at resolutions {seen}; name one: take(resolution)")
        wanted = wanted or (seen[0] if seen else None)
        if wanted not in self._sums:
            asked = self.resolution if wanted is None else wanted
            raise RuntimeError(
                f"no attention to {'the ' + self.of} was seen at resolution {asked} in the last run of the denoiser; "
                f"resolutions that passed: {sorted(self._passed) or 'none'}"
            )
        found, count = self._sums[wanted] / self._counts[wanted], self._counts[wanted]
        run = self._run
        self.reset()
        self._run, self.taken = run, count
        return found

    def results(self) -> dict[tuple[int, ...], Tensor]:
        """The maps of the last run by resolution, without gradient."""
        return {grid: self._sums[grid].detach() / self._counts[grid] for grid in sorted(self._sums)}

    # ---- looking

    def probe(self, site: Site) -> tuple[Tensor, None] | None:
        if not self.looking:
            return None
        run = self.session._now.run
        if run != self._run:
            self.reset()
            self._run = run
        layout = site.q_layout
        if layout is None or "image" not in layout.names:
            return None
        grid = layout.grid("image")
        if len(grid) != 2:
            return None
        self._passed.add(grid)
        wanted = self.resolution
        if wanted is not None and (max(grid) != wanted if isinstance(wanted, int) else grid != wanted):
            return None
        device = None if site.q_pos is None else site.q_pos.device
        start, stop = layout.span("image")
        self._blocks = []
        if self.differentiable and torch.is_grad_enabled() is False:
            refuse_reentrant(f"layer {site.layer} ({site.name})", "Maps")
        return torch.arange(start, stop, device=device), None

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        layout, k_layout = site.q_layout, site.k_layout
        assert layout is not None
        if k_layout is None or self.of not in k_layout.names:
            return
        start, stop = k_layout.span(self.of)
        mean = weights[..., start:stop].mean(1)  # (B, r, T)
        if self.spans is not None:
            last = max(max(span) for span in self.spans)
            if last >= mean.shape[-1]:
                raise ValueError(
                    f"layer {site.layer} ({site.name}) reads {mean.shape[-1]} text tokens, but spans name token {last}"
                )
            mean = torch.stack([mean[..., span].mean(-1) for span in self.spans], -1)
        self._blocks.append(mean)
        grid = layout.grid("image")
        if sum(block.shape[1] for block in self._blocks) < math.prod(grid):
            return
        whole = torch.cat(self._blocks, 1).transpose(1, 2).unflatten(2, grid)
        self._blocks = []
        self.keep(grid, whole, f"layer {site.layer} ({site.name})")

    def keep(self, grid: tuple[int, ...], whole: Tensor, where: str) -> None:
        """Take the maps (B, T, h, w) of one layer, the mean over its heads."""
        if grid in self._sums and self._sums[grid].shape != whole.shape:
            raise ValueError(
                f"{where}: its maps are {tuple(whole.shape)}, those of layers before it "
                f"{tuple(self._sums[grid].shape)}; name layers that agree with layers=..."
            )
        self._sums[grid] = self._sums[grid] + whole if grid in self._sums else whole
        self._counts[grid] = self._counts.get(grid, 0) + 1
