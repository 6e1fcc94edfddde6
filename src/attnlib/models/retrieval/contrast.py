"""Losses between what belongs together and what does not, on tables of scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_real, shaped


@shaped(scores="float (P, Q)", same="bool (P, Q)")
def contrast(scores: Tensor, same: Tensor | None = None, decoupled: bool = False) -> Tensor:
    """InfoNCE along rows: every row must find its own column among all.

    ``mean_i mean_{j in same_i} (log sum_k exp s_ik - s_ij)``; the outer mean runs over rows that have a partner.

    Args:
        scores: already divided by the temperature.
        same: which pairs belong together; row i and column i by default.
        decoupled: leave the positives out of the denominator (Yeh et al., 2021, arXiv 2110.06848).

    Returns:
        A number, float32 at least.

    Raises:
        ValueError: no default for tables that are not square; no row has a partner.

    >>> round(contrast(torch.zeros(4, 4)).exp().item(), 4)  # one of four
    4.0
    """
    check_flag("decoupled", decoupled)
    high = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if same is None:
        if scores.shape[0] != scores.shape[1]:
            raise ValueError(f"same must say which pairs belong together: scores {tuple(scores.shape)} are not square")
        same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    found = same.any(1)
    if not torch.compiler.is_compiling() and not high.is_meta and not bool(found.any()):
        raise ValueError("same has no positive pair: there is nothing to find")
    pool = high.masked_fill(same, float("-inf")) if decoupled else high
    against = pool.logsumexp(1, keepdim=True)
    # A row whose columns are all its own has nobody to be told from.
    each = torch.where(against == float("-inf"), 0.0, against - high).masked_fill(~same, 0.0).sum(1)
    return (each / same.sum(1).clamp(min=1)).sum() / found.sum()


def symmetric_contrast(
    scores: Tensor, back: Tensor | None = None, same: Tensor | None = None, decoupled: bool = False
) -> Tensor:
    """The mean of :func:`contrast` along rows and along columns.

    Args:
        scores: (P, Q), from each row's point of view.
        back: (P, Q), from each column's point of view; the same by default.
        same: (P, Q), which pairs belong together; row i and column i by default.
        decoupled: see :func:`contrast`.

    >>> round(symmetric_contrast(torch.zeros(4, 4)).exp().item(), 4)
    4.0
    """
    back = scores if back is None else back
    if back.shape != scores.shape:
        raise ValueError(f"back must have the shape of scores {tuple(scores.shape)}, got {tuple(back.shape)}")
    theirs = None if same is None else same.mT
    return (contrast(scores, same, decoupled) + contrast(back.mT, theirs, decoupled)) / 2


class Scale(nn.Module):
    """One over a learnt temperature, as CLIP keeps it: a logarithm, and never more than ``most``.

    Args:
        temperature: at the start.
        most: of the scale.
    """

    def __init__(self, temperature: float = 0.07, most: float = 100.0):
        super().__init__()
        check_real("temperature", temperature, above=0)
        self.most = check_real("most", most, above=0)
        self.log = nn.Parameter(torch.tensor(1 / temperature).log())

    def forward(self) -> Tensor:
        return self.log.exp().clamp(max=self.most)


@shaped(scores="float (P, Q)", same="bool (P, Q)")
def recall(scores: Tensor, same: Tensor | None = None, at: int = 1) -> Tensor:
    """Share of rows that have one of their own among the ``at`` columns of the highest scores.

    Rows without a partner are left out. Columns of equal scores share the places they reach, so that a constant
    table is at chance.

    Args:
        scores: of pairs.
        same: which belong together; row i and column i by default.
        at: how many columns are looked at.

    >>> recall(torch.eye(3)).item(), round(recall(torch.zeros(4, 4)).item(), 4)
    (1.0, 0.25)
    """
    if same is None:
        if scores.shape[0] != scores.shape[1]:
            raise ValueError(f"same must say which pairs belong together: scores {tuple(scores.shape)} are not square")
        same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    check_int("at", at, least=1)
    if bool(scores.isnan().any()):
        raise ValueError("scores hold NaN: what comes first is not known")
    scores, same = scores[same.any(1)].double(), same[same.any(1)]
    if not len(scores):
        raise ValueError("same has no positive pair: there is nothing to find")
    best = scores.masked_fill(~same, float("-inf")).amax(1, keepdim=True)
    better, level = (scores > best).sum(1), (scores == best).sum(1)
    own = (same & (scores == best)).sum(1)
    open_places = (at - better).clamp(min=0)
    # One minus the chance that none of one's own is among the open places, drawn from those that are level.
    missed = torch.ones(len(scores), dtype=torch.float64, device=scores.device)
    for place in range(min(int(open_places.max()), int(level.max()))):
        here = place < torch.minimum(open_places, level)
        left = (level - own - place).clamp(min=0) / (level - place).clamp(min=1)
        missed = torch.where(here, missed * left, missed)
    return (1 - missed).mean()


@shaped(scores="float (..., P, Q)", same="bool (..., P, Q)", among="bool (..., P, Q)")
def pooled_contrast(scores: Tensor, same: Tensor, among: Tensor | None = None) -> Tensor:
    """InfoNCE of rows that have several partners, which are pooled inside the logarithm.

    ``mean_i -log(mean_{j in same_i} exp s_ij / sum_{k in among} exp s_ik)``, by ``logsumexp`` from end to end: scores
    over a small temperature overflow nothing. At equal scores it is the logarithm of how many stand in ``among``.

    Args:
        scores: (..., P, Q), already divided by the temperature; every table stands for itself.
        same: which pairs belong together.
        among: which pairs a row is compared with; all by default, and its partners always.

    Returns:
        A number, float32 at least: the mean over the rows that have a partner.

    Raises:
        ValueError: no row of any table has a partner.

    >>> same = torch.eye(4, dtype=torch.bool)
    >>> round(pooled_contrast(torch.zeros(4, 4), same).exp().item(), 4)
    4.0
    """
    high = scores.to(torch.promote_types(scores.dtype, torch.float32))
    found = same.any(-1)
    if not torch.compiler.is_compiling() and not high.is_meta and not bool(found.any()):
        raise ValueError("same has no positive pair: there is nothing to find")
    among = torch.ones_like(same) if among is None else among | same
    # Rows without a partner are taken out before the logarithm, so that their gradient is zero and no NaN.
    alone = ~found.unsqueeze(-1)
    hit = high.masked_fill(~(same | alone), float("-inf")).logsumexp(-1)
    all_ = high.masked_fill(~(among | alone), float("-inf")).logsumexp(-1)
    each = all_ - hit + same.sum(-1).clamp(min=1).to(high.dtype).log()
    return each.masked_fill(~found, 0.0).sum() / found.sum()
