"""Where two modalities meet: sites that a model of both predicts better than anything that keeps them apart.

A site (an electrode) has responses in several time bins. It integrates vision and language when the best model of both
beats, each time after correction over all sites:

=============  ======================================================================================
``trained``    the same architecture with random weights: not the architecture alone
``unimodal``   the best model of one modality
``concat``     features of two unimodal models side by side: not both kinds of information, added up
``matched``    a model of the same architecture, size and data that learned from one modality
``alignments`` and does so whichever modality the events are aligned to (:func:`in_all`)
=============  ======================================================================================

Scores come from :func:`attnlib.look.encoding.bootstrap`, with the same resamples for all models. What is best is
chosen by the events that chose the penalty, and compared on those that were held out.

Reference: Subramaniam et al., 2024, "Revealing Vision-Language Integration in the Brain with Multimodal Networks"
(https://arxiv.org/abs/2406.14481).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_rank, check_real, check_type
from ...extras import need
from .encode import Bootstrapped

#: What is counted to tell two models apart: resamples, or time bins.
TESTS = ("resamples", "bins")


@dataclass(frozen=True)
class Better:
    """Whether one model predicts sites better than another.

    Args:
        gap: (E,) mean difference of scores over bins.
        p: (E,) one-sided; NaN where a site has too few bins.
        holds: (E,) after Benjamini and Hochberg over sites.
    """

    gap: Tensor
    p: Tensor
    holds: Tensor


def false_discoveries(p: Tensor, level: float = 0.05) -> Tensor:
    """(E,) p-values -> (E,) whether they hold when a share ``level`` of those may be false; NaN never does.

    >>> false_discoveries(torch.tensor([0.001, 0.04, float("nan"), 0.9])).tolist()
    [True, False, False, False]
    """
    check_real("level", level, above=0, below=1)
    check_rank("p", p, 1, "(E,)")
    told = ~p.isnan()
    holds = torch.zeros_like(told)
    if bool(told.any()):
        adjusted = need("scipy.stats", "a corrected test").false_discovery_control(p[told].double().numpy())
        holds[told] = torch.as_tensor(adjusted <= level)
    return holds


def better(
    a: Tensor,
    b: Tensor,
    kept: Tensor | None = None,
    *,
    test: Literal["resamples", "bins"] = "resamples",
    level: float = 0.05,
    least: int = 10,
) -> Better:
    """Whether model ``a`` predicts each site better than model ``b``.

    Args:
        a, b: (R, E, B) scores of the same resamples of events.
        kept: (E, B), bins that count; all by default.
        test: ``"resamples"``: the share of resamples in which the mean over bins is not larger, which minds that bins
            overlap. ``"bins"``, as in the paper: Student's paired test over bins of the means over resamples, as if
            bins were independent.
        level: of false discoveries.
        least: bins that a site must have.
    """
    check_choice("test", test, TESTS)
    check_rank("a", a, 3, "(R, E, B)")
    if a.shape != b.shape:
        raise ValueError(f"a and b must be scores of the same resamples, got {tuple(a.shape)} and {tuple(b.shape)}")
    check_int("least", least, least=2)
    gaps = (a - b).double().cpu()
    counted = ~gaps.isnan().any(0) if kept is None else kept.cpu() & ~gaps.isnan().any(0)
    gaps = torch.where(counted, gaps, torch.nan)
    few = counted.sum(1) < least
    if test == "resamples":
        over_bins = gaps.nanmean(2)
        p = (1 + (over_bins <= 0).sum(0)) / (1 + len(gaps))
    else:
        stats = need("scipy.stats", "a paired test")
        means = gaps.mean(0)
        p = torch.ones(len(means), dtype=torch.float64)
        for i, row in enumerate(means):
            own = row[~row.isnan()]
            if len(own) > 1 and bool(own.any()):
                spread = float(own.std())
                p[i] = (
                    float(stats.ttest_1samp(own.numpy(), 0, alternative="greater").pvalue)
                    if spread
                    else float(own.mean() <= 0)
                )
    p = torch.where(few, torch.nan, p.double())
    return Better(torch.where(few, torch.nan, gaps.nanmean((0, 2))), p, false_discoveries(p, level))


@dataclass(frozen=True)
class Integration:
    """What :func:`integration` found.

    Args:
        controls: by name, which were tested.
        best: per site, the model of both modalities that was compared.
        kept: (E, B) bins that some model predicts.
    """

    controls: dict[str, Better]
    best: list[str]
    kept: Tensor

    @property
    def sites(self) -> Tensor:
        """(E,) sites that pass every control that was tested."""
        return torch.stack([c.holds for c in self.controls.values()]).all(0)


def integration(
    scores: Mapping[str, Bootstrapped],
    bins: int,
    *,
    multimodal: Sequence[str],
    unimodal: Sequence[str],
    concat: str | None = None,
    untrained: Mapping[str, str] | None = None,
    matched: tuple[str, str] | None = None,
    test: Literal["resamples", "bins"] = "resamples",
    choose: Literal["val", "test"] = "val",
    level: float = 0.05,
    least: int = 10,
) -> Integration:
    """Sites that integrate two modalities, and by which controls.

    Args:
        scores: by model, of responses (N, E * B) in which the B bins of a site stand side by side.
        bins: B.
        multimodal, unimodal: names of models.
        concat: the model whose features are those of two unimodal ones side by side.
        untrained: from each multimodal model to its twin with random weights.
        matched: a multimodal model, and its twin that learned from one modality.
        test, level, least: of :func:`better`.
        choose: what the best model of a site is chosen by: ``"val"``, or ``"test"``, as in the paper, which then
            compares the winners on the scores that made them win.

    Raises:
        ValueError: names that are not among ``scores``, resamples that do not belong together.
    """
    check_choice("choose", choose, ("val", "test"))
    check_int("bins", bins, least=1)
    asked = [*multimodal, *unimodal, *([concat] if concat else []), *(untrained or {}).values(), *(matched or ())]
    if not multimodal or not unimodal:
        raise ValueError("multimodal and unimodal must name at least one model each")
    if unknown := sorted(set(asked) - set(scores)):
        raise ValueError(f"scores hold no {unknown}; they hold {sorted(scores)}")
    if untrained is not None and (alone := [m for m in multimodal if m not in untrained]):
        raise ValueError(f"untrained names no twin of {alone}")
    shapes = set()
    for name in asked:
        check_type(f"scores[{name!r}]", scores[name], Bootstrapped)
        shapes.add(tuple(scores[name].test.shape))
    if len(shapes) != 1:
        raise ValueError(f"scores must be of the same resamples and responses, got {sorted(shapes)}")
    responses = next(iter(shapes))[1]
    if responses % bins:
        raise ValueError(f"bins={bins} do not divide the {responses} responses into sites")
    test_of = {m: scores[m].test.double().unflatten(1, (-1, bins)) for m in asked}
    val_of = {m: scores[m].val.double().unflatten(1, (-1, bins)) for m in asked}
    low = torch.stack([scores[m].interval("val")[0] for m in dict.fromkeys([*multimodal, *unimodal])])
    kept = (low > 0).any(0).unflatten(0, (-1, bins))
    rank = val_of if choose == "val" else test_of

    def best(names: Sequence[str]) -> list[str]:
        means = torch.stack([torch.where(kept, rank[n].nanmean(0), torch.nan).nanmean(1) for n in names])
        return [names[i] for i in means.nan_to_num(-2.0).argmax(0).tolist()]

    def of(chosen: Sequence[str]) -> Tensor:
        return torch.stack([test_of[name][:, i] for i, name in enumerate(chosen)], 1)

    both, one = best(multimodal), best(unimodal)

    def against(other: Sequence[str], first: Sequence[str] = both) -> Better:
        return better(of(first), of(other), kept, test=test, level=level, least=least)

    sites = range(len(both))
    controls = {"unimodal": against(one)}
    if untrained is not None:
        controls["trained"] = against([untrained[m] for m in both])
    if concat is not None:
        controls["concat"] = against([concat for _ in sites])
    if matched is not None:
        controls["matched"] = against([matched[1] for _ in sites], [matched[0] for _ in sites])
    return Integration(controls, both, kept)


def in_all(found: Sequence[Integration]) -> Tensor:
    """(E,) sites that integrate in every alignment of events: the strictest count."""
    if not found:
        raise ValueError("found is empty; give what integration() found in each alignment")
    if len({len(f.sites) for f in found}) != 1:
        raise ValueError(f"found must be of the same sites, got {[len(f.sites) for f in found]}")
    return torch.stack([f.sites for f in found]).all(0)
