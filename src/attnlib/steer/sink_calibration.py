"""ACT: in chosen heads, take weight from attention sinks inside the prompt and give it to the other keys.

With the causal weights ``A`` of a head over the prompt,

1. ``c_j = sum_i A_ij / (number of rows that see j)``,
2. ``S = {j : c_j > theta}`` without the first token of the sample, whose sink is left alone,
3. ``A_ij <- beta A_ij`` for ``j in S``; the weight taken, ``(1 - beta) sum_{j in S} A_ij``, goes to the keys outside
   ``S`` in proportion to their weights. Rows keep their sums.

Heads are chosen offline: each head of each layer is edited alone and a calibration set is scored; the heads that beat
the untouched model are kept (:func:`search_heads`).

What differs from the authors' code: every sample of a batch is edited, and padding counts neither as row nor as key
(theirs edits the first sample); the first token is spared and nothing else (theirs spares the first index above the
threshold, so a real sink where the first token is none); both are theirs with ``compat="authors"``. A row whose whole
weight lies on ``S`` stays (theirs divides by zero); new tokens read sinks of the prompt with the same edit (theirs
breaks there; ``decode=False`` leaves them alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_within, shaped
from ..hooks.attach import attach
from ..hooks.hf.follow import watch_prompts
from ..hooks.intervention import Intervention, check_heads
from ..hooks.session import Session
from ..hooks.site import Site
from ..types import check_choice, exactly, to_list

#: Heads that the authors' search kept, ``{layer: heads}``; ``"all"`` is that of their open questions (MT-Bench).
HEADS: dict[str, dict[int, tuple[int, ...]]] = {
    "llama-2-7b-chat/classification": {
        2: (2, 8, 12, 13, 16, 17, 20, 25), 3: (0, 1, 2, 10, 24, 28), 4: (1, 3, 4, 9, 10, 11, 15, 19, 23, 25, 27, 30),
        5: (0, 1, 3, 8, 9, 12, 13, 14, 19, 22), 6: (1, 11, 13, 15, 17, 18, 20, 21, 22, 25, 28, 31),
        7: (7, 8, 18, 24, 25), 8: (0, 2, 5, 6, 7, 8, 26), 9: (0, 6, 7, 10, 11, 15, 17, 20, 21, 29),
        10: (1, 4, 19, 22, 23, 25, 26, 27, 31), 11: (6, 8, 10, 12, 14, 15, 17, 18, 21, 26, 27, 28),
        12: (0, 4, 6, 11, 21, 24, 25, 27), 13: (1, 4, 9, 21, 25, 26, 27),
        14: (0, 1, 4, 7, 9, 12, 13, 15, 19, 21, 24), 15: (6, 9, 12, 17, 19, 21, 24, 25, 26), 16: (0, 29),
        17: (0, 15, 19, 24, 29, 30), 18: (7, 12, 22, 23), 19: (2, 15, 16, 21, 30),
        20: (1, 2, 5, 9, 10, 15, 20, 27, 29), 21: (17, 20, 24, 29), 22: (2, 3, 5, 6, 13, 15, 25), 23: (5, 6, 16),
        24: (1, 3, 5, 13, 20), 25: (17, 24), 26: (9, 14, 19, 20), 27: (2, 29), 29: (2, 14, 15, 25), 30: (2,),
    },
    "llama-2-7b-chat/multiple-choice": {
        2: (8, 13, 17, 20), 3: (1,), 4: (23, 27, 30), 5: (0, 1, 9, 10, 13, 17, 27), 6: (1, 11, 22, 31), 8: (2, 6),
        9: (0, 7, 10, 15, 20), 10: (19, 22, 23, 25, 26), 11: (8, 10, 12, 14, 15, 17, 18, 26), 12: (0, 6, 31),
        13: (8, 9, 21, 26), 14: (0, 13, 15), 15: (12, 21, 24), 16: (31,), 17: (24, 30), 18: (7, 17), 19: (30,),
        20: (15, 29), 21: (20,), 22: (2, 6), 24: (18, 20), 26: (6, 14, 19), 27: (29,), 28: (13,), 29: (2, 15),
    },
    "llama-2-7b-chat/all": {
        2: (8,), 3: (1,), 5: (1, 13), 6: (11, 31), 8: (2,), 9: (0,), 10: (23, 25), 11: (8, 10, 12, 14, 26), 12: (31,),
        13: (8, 9), 14: (15,), 15: (21,), 20: (15,), 21: (20,), 24: (18,), 29: (2,), 31: (4,),
    },
    "mistral-7b/classification": {
        2: (5, 10), 3: (23,), 5: (3,), 6: (8, 13), 9: (16, 24), 10: (14,), 11: (31,), 12: (9,), 13: (0, 13, 27),
        14: (0, 9),
    },
    "mistral-7b/multiple-choice": {
        2: (19,), 3: (22,), 4: (3, 7, 12, 15, 31), 5: (0, 29), 6: (31,), 7: (5, 13, 21, 23, 24, 27),
        8: (0, 7, 17, 20, 25, 27, 29), 9: (7, 19, 23, 29), 10: (24, 26, 28, 31), 11: (5, 11, 23, 27),
        12: (9, 12, 13, 14), 13: (4, 22, 26, 30), 14: (14, 16, 20, 22, 23, 25), 15: (4, 8, 13, 22),
        16: (15, 23, 26, 28), 17: (7, 10, 22), 18: (6, 28, 31), 19: (3, 14, 21), 20: (1, 7, 21), 21: (9,),
        22: (13, 23), 23: (2,), 24: (8, 9, 19, 28, 30), 25: (4, 6, 17, 22, 28), 26: (22,), 27: (2, 9, 14, 22),
        28: (2, 4, 5, 7, 10, 13, 20), 29: (6, 28, 29), 31: (0, 1, 11, 14, 21, 30),
    },
}  # fmt: skip


@shaped(weights="float (B, H, N, M)", seen="bool (B or 1, H or 1, N, M)")
def column_scores(weights: Tensor, seen: Tensor) -> Tensor:
    """How much each key gets from the rows that see it, on average.

    Args:
        weights: (B, H, N, M).
        seen: (B or 1, H or 1, N, M) boolean, pairs of a row that is no padding and a key it may read.

    Returns:
        (B, H, M); 0 for keys that no row sees.

    >>> column_scores(torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]]), torch.ones(2, 2).tril().bool()[None, None]).tolist()
    [[[0.625, 0.75]]]
    """
    total = torch.where(seen, weights, torch.zeros_like(weights)).sum(-2)
    return total / seen.sum(-2).clamp(min=1)


@shaped(scores="float (B, H, M)", threshold="float (B, H or 1, M or 1) | ()", first="whole (B)")
def find_sinks(scores: Tensor, threshold: float | Tensor, first: Tensor, compat: str | None = None) -> Tensor:
    """Sinks inside the prompt.

    Args:
        scores: (B, H, M) from :func:`column_scores`.
        threshold: theta.
        first: (B,) index of each sample's first token.
        compat: ``"authors"`` spares the first index above the threshold instead of the first token.

    Returns:
        (B, H, M) boolean.

    >>> find_sinks(torch.tensor([[[0.5, 0.05, 0.3]]]), 0.1, torch.tensor([0])).tolist()
    [[[False, False, True]]]
    """
    check_choice("compat", compat, (None, "authors"))
    check_within("first", first, scores.shape[-1], "key")
    above = scores > threshold
    if compat == "authors":
        return above & (above.cumsum(-1) > 1)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return above & (index != first.to(scores.device)[:, None])[:, None]


@shaped(weights="float (B, H, N, M)", sinks="bool (B or 1, H or 1, M)")
def calibrate(weights: Tensor, sinks: Tensor, beta: float = 0.4) -> Tensor:
    """Scale the weight on sinks by ``beta`` and share what is taken among the other keys, in proportion.

    Args:
        weights: (B, H, N, M).
        sinks: (B or 1, H or 1, M) boolean.
        beta: share that sinks keep.

    Returns:
        (B, H, N, M) with the same row sums; rows without weight on sinks, or with all of it, are the same numbers.

    >>> calibrate(torch.tensor([[[[0.5, 0.25, 0.25]]]]), torch.tensor([[[True, False, False]]]), 0.5).tolist()
    [[[[0.25, 0.375, 0.375]]]]
    """
    with exactly(weights):
        on_sinks = weights @ sinks.unsqueeze(-1).to(weights.dtype)
        total = weights @ (~sinks).unsqueeze(-1).to(weights.dtype)
    moves = (on_sinks > 0) & (total > 0)
    grown = torch.where(moves, 1 + (1 - beta) * on_sinks / torch.where(moves, total, 1.0), 1.0)
    return weights * torch.where(sinks.unsqueeze(-2), torch.where(moves, torch.full_like(total, beta), 1.0), grown)


class SinkCalibration(Intervention):
    """Calibrate the attention of chosen heads: weight from sinks beyond the first token to the other keys.

    Args:
        heads: ``{layer: [head, ...]}``, the name of a list in :data:`HEADS`, or ``None`` for all heads of ``layers``.
        beta: share of their weight that sinks keep; 1 changes nothing.
        threshold: theta on the mean weight a key gets.
        relative: theta is ``threshold / M`` with M the tokens of the sample, as the paper writes (``threshold=5``).
        decode: also edit the rows of new tokens, with the sinks of the prompt. Without a cache every step reads all
            tokens anew, and sinks are those of all of them.
        layers: when ``heads`` does not name them.
        compat: ``"authors"``, see :func:`find_sinks`; only the first sample of a batch is edited.

    Raises:
        ValueError: a share outside [0, 1], heads or lists that do not exist.

    Reference: Yu et al., 2024, arXiv 2406.15765 (ACT, section 4).

    >>> SinkCalibration({3: [1, 4]}, beta=0.4).layers
    [3]
    """

    name: ClassVar[str] = "sink-calibration"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    whole_prompt = True
    whole_map: ClassVar[bool] = True

    def __init__(
        self,
        heads: Mapping[int, Sequence[int]] | str | None = None,
        beta: float = 0.4,
        threshold: float = 0.1,
        relative: bool = False,
        decode: bool = True,
        layers: Sequence[int | str] | None = None,
        compat: str | None = None,
    ):
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1], got {beta}")
        if not threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {threshold}")
        check_choice("compat", compat, (None, "authors"))
        if isinstance(heads, str):
            check_choice("heads", heads, HEADS)
            heads = HEADS[heads]
        if heads is not None:
            if layers is not None:
                raise ValueError("heads names its layers already; leave layers out")
            if not isinstance(heads, Mapping) or any(isinstance(some, int) for some in heads.values()):
                raise TypeError(f"heads must be {{layer: [head, ...]}}, the name of a list or None, got {heads!r}")
            heads = {layer: tuple(some) for layer, some in heads.items() if len(some)}
            layers = sorted(heads) or None
        self.heads, self.beta, self.threshold, self.relative = heads, beta, threshold, relative
        self.decode, self.compat = decode, compat
        self.layers = to_list("layers", layers)
        self.reset()

    @property
    def identity(self) -> bool:
        return self.beta == 1.0 or self.heads == {}

    def reset(self) -> None:
        self._sinks: dict[tuple[str | None, int], Tensor] = {}

    def _chosen(self, site: Site) -> Sequence[int]:
        return range(site.heads) if self.heads is None else self.heads.get(site.layer, ())

    def wants(self, site: Site) -> bool:
        check_heads(self, self._chosen(site), site)
        return True

    def on_attach(self, session: Session) -> None:
        def started(given: dict[str, Any]) -> None:
            self._sinks = {key: s for key, s in self._sinks.items() if key[0] != session.branch}

        watch_prompts(session, started)

    # ---- stages

    def edit_rows(self, site: Site) -> Tensor | None:
        if self._first_call(site):
            return None
        sinks = self._sinks.get((site.branch, site.layer))
        if not self.decode or sinks is None or not bool(sinks.any()):
            return torch.zeros(0, dtype=torch.long, device=None if site.k_pos is None else site.k_pos.device)
        return None

    @staticmethod
    def _first_call(site: Site) -> bool:
        return site.phase != "decode"

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        key = (site.branch, site.layer)
        if self._first_call(site) and len(rows) == site.n_queries:
            sinks = self._find(site, weights)
            self._sinks[key] = self._by_slot(site, sinks)
        else:  # new tokens, or a few rows for somebody who looks
            sinks = self._at_keys(site, self._sinks[key])
        some = sinks.any(-1).any(0).nonzero().squeeze(1)
        if len(some) == weights.shape[1]:
            return calibrate(weights, sinks, self.beta)
        if not len(some):
            return weights
        return weights.index_copy(1, some, calibrate(weights[:, some], sinks[:, some], self.beta))

    def _find(self, site: Site, weights: Tensor) -> Tensor:
        """(B, H, M) sinks of the prompt among the keys."""
        assert site.mask is not None
        allowed = site.mask.dense(weights.device)
        itself = site.key_slots() == site.query_slots()
        # A token that exists reads itself; a row of padding does not.
        exists = (allowed & itself).any(-1)
        seen = allowed & exists.unsqueeze(-1)
        seen = seen.expand(max(seen.shape[0], 1), seen.shape[1], *weights.shape[2:])
        chosen = torch.tensor(list(self._chosen(site)), dtype=torch.long, device=weights.device)
        scores = column_scores(weights[:, chosen], seen if seen.shape[1] == 1 else seen[:, chosen])
        key_exists = seen.any(-2)[:, 0]
        index = torch.arange(weights.shape[-1], device=weights.device)
        first = torch.where(key_exists, index, weights.shape[-1]).amin(-1).expand(weights.shape[0])
        threshold: float | Tensor = self.threshold
        if self.relative:
            tokens = key_exists.sum(-1).clamp(min=1).expand(weights.shape[0])  # a batch without padding shares a mask
            threshold = self.threshold / tokens[:, None, None]
        sinks = torch.zeros(*weights.shape[:2], weights.shape[-1], dtype=torch.bool, device=weights.device)
        sinks[:, chosen] = find_sinks(scores, threshold, first, self.compat)
        if self.compat == "authors":
            sinks[1:] = False
        return sinks

    def _by_slot(self, site: Site, sinks: Tensor) -> Tensor:
        """(B, H, L): sinks among keys as sinks by slot of the sequence."""
        slots = site.key_slots()[:, :, 0].expand_as(sinks)
        out = sinks.new_zeros(*sinks.shape[:2], int(slots.max()) + 1)
        return out.scatter(-1, slots.clamp(min=0), sinks & (slots >= 0))

    def _at_keys(self, site: Site, by_slot: Tensor) -> Tensor:
        """(B, H, M): and back, for the keys of this call; tokens after the prompt are none."""
        slots = site.key_slots()[:, :, 0].expand(*by_slot.shape[:2], -1)
        inside = (slots >= 0) & (slots < by_slot.shape[-1])
        return by_slot.gather(-1, slots.clamp(0, by_slot.shape[-1] - 1)) & inside

    def results(self) -> dict[str, object]:
        """The sinks (B, H, L) of the last prompt, ``{layer: sinks}`` of the main branch."""
        return {"sinks": {layer: s for (branch, layer), s in self._sinks.items() if branch is None}}


# --------------------------------------------------------------------------------------------------------------------
# Which heads


class HeadSearch(NamedTuple):
    """Heads ``{layer: [head, ...]}`` that beat ``baseline``; the score of each alone, ``{(layer, head): score}``."""

    heads: dict[int, list[int]]
    baseline: float
    scores: dict[tuple[int, int], float]


def search_heads(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    **settings: Any,
) -> HeadSearch:
    """Calibrate each head alone and keep those with which ``evaluate`` exceeds the untouched model.

    Args:
        model: a transformers model.
        evaluate: score of a model on a calibration set, higher is better; see :func:`label_accuracy`.
        layers: layers to search; by default all but the first two and the last, as the authors do.
        heads: heads to search in each layer; all by default.
        settings: of :class:`SinkCalibration`.

    Returns:
        A :class:`HeadSearch`; ``SinkCalibration(search.heads, **settings)`` puts it to use.

    Raises:
        ValueError: layers or heads that do not exist, or no layer to search.

    Reference: Yu et al., 2024, arXiv 2406.15765, section 4.1.
    """
    probe = SinkCalibration(**{**settings, "heads": None, "layers": layers})
    with attach(model, probe) as session:
        sites = sorted(session.attached, key=lambda s: s.layer)
        last = max((s.layer for s in session.sites), default=-1)
    if layers is None:
        sites = [s for s in sites if 2 <= s.layer < last]
    if not sites:
        raise ValueError(f"no layer to search between the first two and the last of {last + 1}; name them in layers")
    for site in sites:
        check_heads(probe, heads or (), site)
    baseline = float(evaluate(model))
    scores: dict[tuple[int, int], float] = {}
    kept: dict[int, list[int]] = {}
    for site in sites:
        for head in range(site.heads) if heads is None else heads:
            with attach(model, SinkCalibration({site.layer: [head]}, **settings)):
                score = scores[site.layer, head] = float(evaluate(model))
            if score > baseline:
                kept.setdefault(site.layer, []).append(head)
    return HeadSearch(kept, baseline, scores)


def label_accuracy(
    samples: Iterable[tuple[Mapping[str, Tensor], Tensor | Sequence[int], Tensor | Sequence[int]]],
) -> Callable[[nn.Module], float]:
    """A calibration set as the ``evaluate`` of :func:`search_heads`: the share of prompts whose right label wins.

    Args:
        samples: batches ``(inputs, labels, answers)``: inputs of the model with padding on the left, ids (V,) of the
            labels' tokens, and for each row the index of the right one.

    Returns:
        A function from a model to the accuracy over all batches.
    """
    batches = list(samples)

    def evaluate(model: nn.Module) -> float:
        right = total = 0
        with torch.no_grad():
            for inputs, labels, answers in batches:
                logits = model(**inputs).logits[:, -1]
                chosen = logits[:, torch.as_tensor(labels, device=logits.device)].argmax(-1)
                answers = torch.as_tensor(answers, device=logits.device)
                right, total = right + int((chosen == answers).sum()), total + len(answers)
        if not total:
            raise ValueError("the calibration set is empty")
        return right / total

    return evaluate
