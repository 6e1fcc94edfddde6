"""Composite attention in a model that exists: image tokens stay in the sequence and are no queries (EE-MLLM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..hooks import IMAGE, Intervention, Probe
from ..hooks.intervention import implements
from ..hooks.site import Site
from ..types import check_choice, to_list


class CompositeLayers(Intervention):
    """In the chosen layers, image tokens attend to themselves alone, and their scores are not computed.

    The same as ``MaskByType(composite())``, a mask that saves nothing: here only the rows of the other tokens go
    through attention, and an image token gets its own value (``aligner="vo"``), or nothing (``aligner="none"``).
    Image tokens then adapt from layer to layer by the model's own projections and feed-forward, without new parameters.
    Text before the image is not seen by it. A row is left out when it is an image token in *every* sample of the batch.

    Models are not trained for this: in a model that was not, choose few layers.

    Args:
        layers: layers to change; ``None`` for all.
        aligner: ``"vo"`` or ``"none"``.

    Reference: Ma et al., 2024, arXiv 2408.11795 (composite attention; EE-MLLM-F is its training-free use).

    >>> CompositeLayers(layers=[2, 3]).layers
    [2, 3]
    """

    name: ClassVar[str] = "composite-layers"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    replaces_mask: ClassVar[bool] = True

    def __init__(self, layers: Sequence[int | str] | None = None, aligner: str = "vo"):
        check_choice("aligner", aligner, ("vo", "none"))
        self.layers = to_list("layers", layers)
        self.aligner = aligner
        self.reset()

    def reset(self) -> None:
        self._pairs: dict[int, list[int]] = {}

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, Probe) or implements(other, "on_scores") or implements(other, "on_weights"):
            return "image tokens have no rows of scores or weights to look at or to edit"
        if getattr(other, "replaces_mask", False):
            return "both say which pairs may meet; combine them in one rule of MaskByType"
        return None

    def results(self) -> dict[int, dict[str, int]]:
        """Per layer, the pairs of the last prompt that were scored, and those of the untouched layer."""
        return {layer: {"scored": done, "of": full} for layer, (done, full) in sorted(self._pairs.items())}

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        assert site.q_types is not None and site.mask is not None
        image = site.q_types == IMAGE
        if not bool(image.any()):
            return call(q, k, v)
        n, m = q.shape[2], k.shape[2]
        rows = (~image).any(0).nonzero().flatten()
        self._pairs[site.layer] = [len(rows) * m, n * m]
        start = m - n
        if site.k_pos is not None and site.k_pos.dim() == 1 and site.q_pos is not None:
            start = int(site.q_pos[0] - site.k_pos[0])  # a static cache goes on after the new tokens
        own = v[:, :, start : start + n].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out = own if self.aligner == "vo" else torch.zeros_like(own)
        if len(rows):
            allowed, bias = site.mask.rows(rows)
            if allowed is None:
                allowed = torch.ones(1, 1, len(rows), m, dtype=torch.bool, device=q.device)
            read = call(q.index_select(2, rows), k, v, mask=allowed, bias=bias)
            stays = image.index_select(1, rows)[:, None, :, None]
            out = out.index_copy(2, rows, torch.where(stays, out.index_select(2, rows), read))
        return out
