"""LACING's multimodal dual attention: image keys and text keys are normalised apart.

On one set of queries, keys and values, with ``S = Q K^T / sqrt(D)``,

    ``O = softmax(S + M_img) V + softmax(S + M_txt) V``,

so that no amount of text can starve the image: each part sums to one. ``M_img`` allows image keys: all of them
(``image_mask="full"``: also later ones, as the released models were trained), or causally, an image query then seeing
only itself among image keys (``"causal"``). ``M_txt`` allows text keys up to the query. A row without any image key
gets zero for the image part.

What differs from the authors' code: they zero the image part per sample only, so that with the causal mask a row
without image keys attends uniformly, to the future as well, and so does, in the text part, a row without text before
it; here either part is zero per row (``compat="authors"`` is theirs). Generated tokens are text.

Attached to a model that was not trained with it, dual attention changes the scale of attention outputs (a sum, no
mean).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..hooks.intervention import Intervention, Probe, implements
from ..hooks.site import Site
from ..hooks.tokens import IMAGE, is_text
from ..types import check_choice, stats_dtype, to_list


class DualAttention(Intervention):
    """Two softmaxes, over image keys and over text keys, added.

    Token types come from ``attach(..., token_types=...)`` and are kept per sample while decoding.

    Args:
        image_mask: ``"full"`` or ``"causal"``, see the module.
        layers: layers to change; ``None`` for all, as the models were trained.
        compat: ``"authors"`` lets a row without keys of a kind read, alike, what it may see of the other kinds and
            what is to come of its own, as their sum of two masks does in samples with an image.

    Reference: Zhao et al., 2024, arXiv 2411.14279, section 3 (MDA).

    >>> DualAttention().image_mask
    'full'
    """

    name: ClassVar[str] = "lacing"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    needs_types: ClassVar[bool] = True
    replaces_mask: ClassVar[bool] = True
    splits_softmax: ClassVar[bool] = True

    def __init__(self, image_mask: str = "full", layers: Sequence[int | str] | None = None, compat: str | None = None):
        check_choice("image_mask", image_mask, ("full", "causal"))
        check_choice("compat", compat, (None, "authors"))
        self.image_mask, self.compat = image_mask, compat
        self.whole_prompt = image_mask == "full"  # of an image, tokens read later ones
        self.layers = to_list("layers", layers)

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, Probe) or implements(other, "on_scores") or implements(other, "on_weights"):
            return (
                "dual attention normalises image and text keys apart, so there is no single map to look at or to edit"
            )
        return None

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        types = site.key_types()
        image = (types == IMAGE)[:, :, None]
        if not bool(image.any()):
            return call(q, k, v)
        assert site.mask is not None and site.q_types is not None
        text, allowed = is_text(types)[:, :, None], site.mask.dense(q.device)
        itself = site.query_slots() == site.key_slots()
        if self.image_mask == "causal":
            image = image & (itself | (site.q_types != IMAGE)[:, None, :, None])
        parts = []
        for kind, keys in (("image", image), ("text", text)):
            free = kind == "image" and self.image_mask == "full"
            part = call(q, k, v, mask=keys if free else keys & allowed)
            if self.compat == "authors":
                part = self._blank_rows(site, q, k, v, keys, None if free else kind, part)
            parts.append(part)
        return parts[0] + parts[1]

    @staticmethod
    def _blank_rows(
        site: Site, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, kind: str | None, part: Tensor
    ) -> Tensor:
        """Rows without keys of a kind, as the authors' two masks of the lowest number leave them."""
        seen = site.key_slots() <= site.query_slots() if kind and site.n_queries > 1 else keys.new_ones(1, 1, 1, 1)
        blank = ~(keys & seen).any(-1, keepdim=True)
        if kind != "text":
            blank = blank & (site.key_types() == IMAGE).any(-1)[:, :, None, None]
        if not bool(blank.any()):
            return part
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) * site.scale).to(stats_dtype(q.dtype))
        # The number swallows the scores and leaves their gradient, as it does there.
        scores = scores.masked_fill(blank & ~(keys ^ seen), float("-inf")) + torch.finfo(scores.dtype).min
        return torch.where(blank, scores.softmax(-1).to(v.dtype) @ v, part)
