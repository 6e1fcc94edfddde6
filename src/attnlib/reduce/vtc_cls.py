"""VTC-CLS: image tokens that the vision tower's class token attends to go to the decoder, the others do not.

With ``a_l`` the attention of the class token to the N patches in layer ``l`` of the vision tower, averaged over heads,

    ``score = sum_{l = start}^{L - 2} a_l``,  ``idx = sort(topk(score, k))``,

the last layer being left out because the features come from the one before it. Kept tokens stay in raster order and
take contiguous positions. Nothing is trained, and the choice does not depend on the prompt.

What differs from the authors' code: any batch (theirs squeezes it away), several images per sample, each ranked by
itself or all of a sample together; only one row of attention is computed beside the tower's own kernel (theirs has the
tower return all maps); of equal scores the first wins (theirs: any). Tokens leave at the input of the decoder's first
block, which gives the same numbers as leaving before it, since nothing mixes tokens in between.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hooks.site import Site
from ..hooks.tokens import IMAGE
from ..types import check_choice
from .base import Reduce, Selector, TopK
from .vision import VisionAttention, spread


class VTCCLS(Reduce):
    """Keep the image tokens with the highest attention of the vision tower's class token.

    Args:
        keep: tokens that stay of each image (of each sample with ``rank="sample"``): a number, a share, or a selector.
        start: first layer of the tower that counts.
        end: the layer after the last one that counts; -1 leaves the last layer out.
        ensemble: ``"sum"`` over layers, ``"min"`` or ``"max"``.
        rank: ``"image"``: each image (each crop of a split one) keeps its own best; ``"sample"``: the best of all.
        positions: ``"contiguous"`` as the authors', or ``"original"``.
        what: ``"class"``, or ``"received"`` for towers without class token.
        tower: dotted path of the vision tower; found by its usual names otherwise.

    Raises:
        ValueError: a share outside [0, 1]; when attached, layers that do not exist; when run, more tokens than an
            image has.

    Reference: Wang et al., 2024, arXiv 2412.05819.

    >>> VTCCLS(keep=64, start=18).schedule
    {0: TopK(k=64)}
    """

    name: ClassVar[str] = "vtc-cls"
    scorer: VisionAttention

    def __init__(
        self,
        keep: int | float | Selector,
        start: int,
        end: int | None = -1,
        ensemble: str = "sum",
        rank: str = "image",
        positions: str = "contiguous",
        what: str = "class",
        tower: str | None = None,
    ):
        check_choice("rank", rank, ("image", "sample"))
        super().__init__(VisionAttention(start, end, ensemble, what, tower), keep, positions=positions)
        self.rank = rank

    def reset(self) -> None:
        super().reset()
        self._scores: Tensor | None = None

    def chosen(self, scores: Tensor, per_row: Tensor, selector: Selector) -> Tensor:
        """(I, n) boolean: which tokens stay, ranked by image or by sample.

        Args:
            scores: (I, n).
            per_row: (B,) images of each sample.
            selector: which stay.
        """
        count, n = scores.shape
        of = torch.full((count,), n, device=scores.device)
        if self.rank == "sample":
            of = (per_row * n).to(scores.device)
        most = int(of.max())
        if isinstance(selector, TopK) and bool((of < selector.k).any()):
            raise ValueError(
                f"keep={selector.k} is more than the {int(of.min())} tokens of {self.rank} {int(of.argmin())}"
            )
        if self.rank == "image":
            return selector.keep(scores, torch.ones_like(scores, dtype=torch.bool), of)
        there = torch.arange(most, device=scores.device) < of[:, None]
        wide = scores.new_zeros(len(of), most)
        wide[there] = scores.reshape(-1)
        return selector.keep(wide, there, of)[there].reshape(count, n)

    def elsewhere(self, site: Site, image: Tensor) -> bool:
        """A branch of the decoding that shows the decoder some of the image tokens by its own choice: left alone."""
        return site.branch is not None and not self.scorer.fits(image)

    def reduce(self, site: Site, hidden: Tensor, image: Tensor, selector: Selector) -> tuple[Tensor, Tensor] | None:
        everywhere = self.all_types(site) == IMAGE
        if self.elsewhere(site, everywhere):
            return None
        scores, _ = self.scorer.of_prompt(everywhere)
        per_row = everywhere.sum(1) // scores.shape[1]
        if self.rank == "sample":
            per_row = per_row[per_row > 0]
        if site.branch is None:
            self._scores = scores
        keep = spread(self.chosen(scores, per_row, selector), everywhere)
        return self.go_on(hidden, site, site.per_query(keep))

    def results(self) -> dict[str, Any]:
        """What every reduction reports, and the ``scores`` (I, n) of the images of the last prompt."""
        shown = super().results()
        return shown if self._scores is None else {**shown, "scores": self._scores}
