"""What a model learns to prefer, as data: pairs of (response, image variant, token weights) and anchors.

With ``r(y|v) = log pi(y|v) - log ref(y|v)`` of every token of a response ``y`` under an image ``v``, a term that
prefers side ``c`` to side ``n`` is

    l = -logsigmoid(beta (w_c r_c - w_n r_n)),

of the sums over tokens (``reduction="sequence"``, Rafailov et al., 2023, arXiv 2305.18290) or of every position, where
token t of one response meets token t of the other (``"token"``, as OPA-DPO is trained). An anchor holds the reward of
one side above a value, or below it: ``-logsigmoid(sign (beta r - at))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_int, check_name, check_real, check_type, to_list
from ...types import stats_dtype
from .variants import MeanPixels, Variant

#: The image variant that a pair's own inputs hold.
GIVEN = "given"

REDUCTIONS = ("sequence", "token")
DIVERGENCES = ("reverse_kl", "js", "alpha")
TOKENS = ("label", "argmax_other")


class Read(NamedTuple):
    """Which log-probabilities are read: of a response, under an image, of its tokens or of the strongest others."""

    response: str
    image: str | Variant = GIVEN
    tokens: str = "label"


@dataclass(frozen=True)
class Side:
    """One side of a term.

    Args:
        response: name of a response of the pairs.
        image: ``"given"``, the name of an image that the pairs hold besides, or a :class:`~.variants.Variant`.
        weights: name of weights per token that the pairs hold; ``None``, and where a pair has none, is 1.
        tokens: ``"label"``, the response's tokens, or ``"argmax_other"``: at each of its positions the model's own
            strongest token that is not the label.
    """

    response: str
    image: str | Variant = GIVEN
    weights: str | None = None
    tokens: str = "label"

    def __post_init__(self) -> None:
        check_name("response", self.response)
        check_type("image", self.image, (str, Variant), "the name of an image of the pairs or a Variant")
        check_choice("tokens", self.tokens, TOKENS)
        if self.weights is not None:
            check_name("weights", self.weights)

    @property
    def read(self) -> Read:
        return Read(self.response, self.image, self.tokens)


@dataclass(frozen=True)
class Term:
    """``chosen`` is preferred to ``rejected``, ``coefficient`` times in the loss."""

    name: str
    chosen: Side
    rejected: Side
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_type("chosen", self.chosen, Side)
        check_type("rejected", self.rejected, Side)
        check_real("coefficient", self.coefficient, least=0)
        if self.chosen.read == self.rejected.read:
            raise ValueError(f"chosen and rejected of term {self.name!r} read the same: {self.chosen.read}")

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class Anchor:
    """Holds ``beta r`` of a side above ``at`` (``sign=1``) or below (``sign=-1``).

    Args:
        kind: ``"logistic"``, ``-logsigmoid(sign (beta r - at))``, or ``"square"``, ``(beta r - at)^2`` without sign.
    """

    name: str
    side: Side
    sign: int = 1
    at: float = 0.0
    coefficient: float = 1.0
    kind: str = "logistic"

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_type("side", self.side, Side)
        check_choice("sign", self.sign, (1, -1))
        check_real("at", self.at)
        check_real("coefficient", self.coefficient, least=0)
        check_choice("kind", self.kind, ("logistic", "square"))

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.side,)


@dataclass(frozen=True)
class Imitation:
    """Cross-entropy on a response besides, the mean over its tokens."""

    response: str
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        check_name("response", self.response)
        check_real("coefficient", self.coefficient, least=0)

    @property
    def name(self) -> str:
        return f"imitate-{self.response}"

    @property
    def sides(self) -> tuple[Side, ...]:
        return (Side(self.response),)


class Losses(NamedTuple):
    """``total`` (), every part without its coefficient (), and the rewards ``beta sum_t r`` (B,) of every read."""

    total: Tensor
    parts: dict[str, Tensor]
    rewards: dict[Read, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Terms, anchors, imitation, and how they become one loss.

    Args:
        terms, anchors, imitations: with names of their own.
        beta: how far rewards may go.
        reduction: ``"sequence"`` or ``"token"``.
        label_smoothing: share of pairs whose order is taken to be wrong.
        divergence: ``"reverse_kl"``; ``"js"`` takes ``softplus(r)`` off on both sides; ``"alpha"`` compares
            ``-exp(-alpha r) / alpha`` and has no weights.
        alpha: of that divergence.
        reference_free: the policy's log-probabilities in place of log-ratios.
        padded_to: average token terms over so many positions per row, those that no response has too (a constant);
            0 pads to the longest response of the batch. ``None`` averages over positions that exist.
        optional: responses whose parts are left out where *no* pair has them.
        alignment: responses that the policy first learns by imitation; what it is then is the reference.
        published: settings of training that :func:`~.train` starts from.
    """

    terms: tuple[Term, ...] = ()
    anchors: tuple[Anchor, ...] = ()
    imitations: tuple[Imitation, ...] = ()
    beta: float = 0.1
    reduction: str = "sequence"
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 1.0
    reference_free: bool = False
    padded_to: int | None = None
    optional: tuple[str, ...] = ()
    alignment: tuple[str, ...] = ()
    published: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, kind in (("terms", Term), ("anchors", Anchor), ("imitations", Imitation)):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise TypeError(f"{name} must be a list of {kind.__name__}, got {given!r}")
            object.__setattr__(self, name, tuple(given))
            for part in getattr(self, name):
                check_type(name, part, kind)
        for name in ("optional", "alignment"):
            object.__setattr__(self, name, tuple(to_list(name, getattr(self, name), '["chosen"]') or ()))
        names = [part.name for part in self.parts]
        if not names:
            raise ValueError("a recipe needs a term, an anchor or an imitation, got none")
        if len(set(names)) < len(names):
            raise ValueError(f"the parts of a recipe need names of their own, got {names}")
        check_real("beta", self.beta, above=0)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_real("label_smoothing", self.label_smoothing, least=0, below=0.5)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_real("alpha", self.alpha, above=0)
        if self.padded_to is not None:
            check_int("padded_to", self.padded_to, least=0)

    @property
    def parts(self) -> tuple[Term | Anchor | Imitation, ...]:
        return (*self.terms, *self.anchors, *self.imitations)

    @property
    def responses(self) -> list[str]:
        """Names that pairs need, in the order of the parts."""
        return list(dict.fromkeys(side.response for part in self.parts for side in part.sides))

    @property
    def reads(self) -> list[Read]:
        """Every log-probability that the loss needs, once."""
        return list(dict.fromkeys(side.read for part in self.parts for side in part.sides))

    @property
    def needs_reference(self) -> bool:
        return bool(self.terms or self.anchors) and not self.reference_free

    def without(self, *names: str) -> Recipe:
        """The recipe without some parts.

        >>> rdpo().without("image").terms[0].name
        'text'
        """
        known = [part.name for part in self.parts]
        for name in names:
            check_choice("names", name, known)
        return replace(
            self,
            terms=tuple(t for t in self.terms if t.name not in names),
            anchors=tuple(a for a in self.anchors if a.name not in names),
            imitations=tuple(i for i in self.imitations if i.name not in names),
        )

    def for_responses(self, found: Iterable[str]) -> Recipe:
        """The recipe without the optional responses that are not there."""
        absent = set(self.optional) - set(found)
        gone = [part.name for part in self.parts if any(side.response in absent for side in part.sides)]
        short = self.without(*gone) if gone else self
        return replace(short, alignment=tuple(r for r in self.alignment if r not in absent))

    def loss(
        self,
        policy: Mapping[Read, Tensor],
        reference: Mapping[Read, Tensor] | None,
        valid: Mapping[str, Tensor],
        weights: Mapping[tuple[str, str], Tensor] | None = None,
    ) -> Losses:
        """The loss of log-probabilities that are there.

        Args:
            policy: (B, T) per read, of every token; T may differ from response to response.
            reference: the same of the frozen model; ``None`` only where the recipe needs none.
            valid: (B, T) boolean per response: which tokens exist.
            weights: (B, T) by ``(name, response)``.

        >>> zero = {read: torch.zeros(1, 2) for read in dpo().reads}
        >>> here = {name: torch.ones(1, 2, dtype=torch.bool) for name in ("chosen", "rejected")}
        >>> round(float(dpo().loss(zero, zero, here).total), 6)  # log 2
        0.693147
        """
        if reference is None and self.needs_reference:
            raise ValueError("reference must hold log-probabilities: this recipe compares with a reference")
        self._complete(policy, reference if self.needs_reference else None, valid)
        wide = {read: log.to(stats_dtype(log.dtype)) for read, log in policy.items()}
        ratios = {}
        for read, log in wide.items():
            ratio = log
            if reference is not None and self.needs_reference:
                ratio = log - reference[read].to(log)
            ratios[read] = ratio.masked_fill(~valid[read.response], 0.0)
        given = weights or {}
        parts: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for part in self.parts:
            if isinstance(part, Term):
                value = self._term(part, ratios, valid, given)
            elif isinstance(part, Anchor):
                value = self._anchor(part, ratios, valid)
            else:
                exists = valid[part.response]
                log = wide[part.sides[0].read].masked_fill(~exists, 0.0)
                value = -log.sum() / exists.sum().clamp_min(1)
            parts[part.name] = value
            total = total + part.coefficient * value
        rewards = {read: self.beta * ratio.detach().sum(1) for read, ratio in ratios.items()}
        assert isinstance(total, Tensor)
        return Losses(total, parts, rewards)

    def _complete(
        self, policy: Mapping[Read, Tensor], reference: Mapping[Read, Tensor] | None, valid: Mapping[str, Tensor]
    ) -> None:
        for name, given in (("policy", policy), ("reference", reference)):
            missing = [r for r in self.reads if given is not None and r not in given]
            if missing:
                raise ValueError(f"{name} lacks the log-probabilities of {missing}; this recipe reads {self.reads}")
        for read in self.reads:
            if read.response not in valid:
                raise ValueError(f"valid lacks the response {read.response!r}, got {list(valid)}")
            shapes = [valid[read.response].shape, policy[read].shape]
            shapes += [reference[read].shape] if reference is not None else []
            if len(set(shapes)) > 1:
                raise ValueError(f"policy, reference and valid of {read} differ in shape: {[tuple(s) for s in shapes]}")

    def _score(self, side: Side, ratio: Tensor, weights: Mapping[tuple[str, str], Tensor]) -> Tensor:
        """(B, T) ratios -> what is compared, (B, T) or (B,)."""
        weight = None if side.weights is None else weights.get((side.weights, side.response))
        weighted = ratio if weight is None else ratio * weight.to(ratio)
        if self.reduction == "sequence":
            ratio, weighted = ratio.sum(1), weighted.sum(1)
        if self.divergence == "alpha":
            largest = math.floor(math.log(torch.finfo(ratio.dtype).max) * 1e4) / 1e4
            return -(ratio * -self.alpha).clamp(max=largest).exp() / self.alpha
        return weighted - F.softplus(ratio) if self.divergence == "js" else weighted

    def _mean(self, values: Tensor, exists: Tensor) -> Tensor:
        """Over rows, or over positions (B, T): those that exist, or all that padding makes."""
        if self.reduction == "sequence":
            return values.mean()
        if self.padded_to is None:
            return (values * exists).sum() / exists.sum().clamp_min(1)
        return values.mean()

    def _width(self, valid: Mapping[str, Tensor], own: int) -> int:
        """Positions of a row of a token term."""
        if self.padded_to is None:
            return own
        longest = max(v.shape[1] for v in valid.values())
        if self.padded_to and self.padded_to < longest:
            raise ValueError(f"padded_to={self.padded_to} is shorter than a response of {longest} tokens")
        return self.padded_to or longest

    def _term(
        self,
        term: Term,
        ratios: Mapping[Read, Tensor],
        valid: Mapping[str, Tensor],
        weights: Mapping[tuple[str, str], Tensor],
    ) -> Tensor:
        scores = [self._score(side, ratios[side.read], weights) for side in term.sides]
        exists = [valid[side.response] for side in term.sides]
        if self.reduction == "token":
            width = self._width(valid, max(s.shape[1] for s in scores))
            # Where a response has ended its ratio is zero; its score is that of zero, the same on both sides.
            rest = [self._score(side, ratios[side.read].new_zeros(1, 1), {}) for side in term.sides]
            scores = [torch.cat([s, z.expand(s.shape[0], width - s.shape[1])], 1)
                      for s, z in zip(scores, rest, strict=True)]  # fmt: skip
            exists = [F.pad(e, (0, width - e.shape[1])) for e in exists]
            here = exists[0] | exists[1]
        else:
            here = exists[0]
        margin = self.beta * (scores[0] - scores[1])
        loss = -F.logsigmoid(margin) * (1 - self.label_smoothing)
        if self.label_smoothing:
            loss = loss - F.logsigmoid(-margin) * self.label_smoothing
        return self._mean(loss, here)

    def _anchor(self, anchor: Anchor, ratios: Mapping[Read, Tensor], valid: Mapping[str, Tensor]) -> Tensor:
        ratio, exists = ratios[anchor.side.read], valid[anchor.side.response]
        if self.reduction == "sequence":
            ratio = ratio.sum(1)
        else:
            width = self._width(valid, ratio.shape[1])
            ratio, exists = (F.pad(t, (0, width - t.shape[1])) for t in (ratio, exists))
        above = self.beta * ratio - anchor.at
        value = above.square() if anchor.kind == "square" else -F.logsigmoid(anchor.sign * above)
        return self._mean(value, exists)


# --------------------------------------------------------------------------------------------------------------------
# Recipes that were published

#: Low-rank adapters and optimisation where a paper says nothing else.
PLAIN = {"rank": 16, "alpha": 32, "dropout": 0.0, "lr": 1e-6, "epochs": 1, "batch_size": 8, "warmup": 0.0}


def sft(*responses: str) -> Recipe:
    """Plain imitation of some responses, ``("chosen",)`` by default; no reference."""
    return Recipe(imitations=tuple(Imitation(r) for r in responses or ("chosen",)), published=PLAIN | {"lr": 2e-5})


def dpo(beta: float = 0.1, label_smoothing: float = 0.0, reduction: str = "sequence") -> Recipe:
    """``chosen`` over ``rejected`` under the given image, as trl's ``DPOTrainer`` with its sigmoid loss."""
    term = Term("text", Side("chosen"), Side("rejected"))
    return Recipe((term,), beta=beta, label_smoothing=label_smoothing, reduction=reduction, published=PLAIN)


def rdpo(
    beta: float = 0.1, rejected: str = "label", imitation: float = 0.0, image: str | Variant = "retrieved"
) -> Recipe:
    """Re-Align (Xing et al., 2025, arXiv 2502.13146): DPO, and the chosen answer under its image over another image.

    ``L = -logsigmoid(beta u_text) - logsigmoid(beta u_img)``, with ``u_img`` the log-ratio of the chosen answer under
    the given image less that under a retrieved one. Both terms share the log-probability of the chosen answer.

    Args:
        rejected: ``"label"``; ``"argmax_other"`` is what the release computes for the rejected answer and for the
            retrieved image alike: at every label position the model's own strongest token that is not the label.
        imitation: weight of the cross-entropy on the chosen answer.
        image: what the pairs call the retrieved image, or a variant (mDPO masks).
    """
    check_choice("rejected", rejected, TOKENS)
    chosen = Side("chosen")
    terms = (
        Term("text", chosen, Side("rejected", tokens=rejected)),
        Term("image", chosen, Side("chosen", image=image, tokens=rejected)),
    )
    check_real("imitation", imitation, least=0)
    also = (Imitation("chosen", imitation),) if imitation else ()
    published = PLAIN | {"rank": 128, "alpha": 256, "dropout": 0.05, "warmup": 0.03, "batch_size": 8}
    return Recipe(terms, imitations=also, beta=beta, published=published)


def opa_dpo(
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    image: Variant | str | None = None,
    image_coefficient: float = 0.2,
    anchor_signs: Sequence[int] = (1, -1, 1, -1),
    anchor: float = 0.0,
    anchor_coefficient: float = 1.0,
    anchor_kind: str = "logistic",
    standard_coefficient: float = 1.0,
    revised_coefficient: float = 1.0,
    reduction: str = "token",
    divergence: str = "reverse_kl",
    padded_to: int = 0,
    compat: str | None = None,
) -> Recipe:
    """OPA-DPO (Yang et al., 2025, arXiv 2501.09695): on-policy alignment, then four terms and four anchors.

    Responses of the pairs: ``rejected``, what the model itself said; ``chosen``, that answer minimally revised by an
    expert; ``standard``, the answer of the dataset. ``chosen`` and ``standard`` are first learned by imitation, which
    makes them likely under the policy; what it is then is the reference. Where no pair has ``standard``, its terms are
    left out.

    Args:
        image: the corrupted image, by default 30 % of the pixels at the mean; a name that the pairs have, or
            :class:`~.variants.MeanBlocks`, :class:`~.variants.MaskedAttention`.
        image_coefficient: of the two terms in which an answer is preferred under the given image.
        anchor_signs: of the anchors, one per term, on its chosen side: standard, chosen, standard, chosen. The
            release pushes the reward of the revised answer *below* ``anchor``; ``(1, 1, 1, 1)`` holds all above it.
        anchor: the value.
        anchor_coefficient: 0 leaves anchors out.
        anchor_kind: ``"logistic"`` or ``"square"``.
        standard_coefficient, revised_coefficient: of the terms of either answer.
        reduction: ``"token"`` as released, or ``"sequence"``.
        padded_to: with ``compat="authors"``, the length responses are padded to (896 in the release); 0 is the longest
            of a batch.
        compat: ``"authors"`` averages over padding too, where every term is a constant log 2.

    Weights per token that pairs may hold: ``"severity"`` of chosen and rejected, ``"image"`` of chosen.
    """
    check_choice("compat", compat, (None, "authors"))
    signs = to_list("anchor_signs", anchor_signs, "(1, -1, 1, -1)") or []
    for name, value in (
        ("image_coefficient", image_coefficient), ("anchor_coefficient", anchor_coefficient),
        ("standard_coefficient", standard_coefficient), ("revised_coefficient", revised_coefficient),
    ):  # fmt: skip
        check_real(name, value, least=0)
    if padded_to and compat is None:
        raise ValueError(f'padded_to={padded_to!r} is of compat="authors" alone: padding counts in nothing else')
    if len(signs) != 4:
        raise ValueError(f"anchor_signs must hold four signs, got {anchor_signs!r}")
    masked = MeanPixels(0.3) if image is None else image
    standard, chosen = Side("standard"), Side("chosen")
    k, j = standard_coefficient, revised_coefficient
    terms = [
        Term("standard", standard, Side("rejected"), k),
        Term("revised", Side("chosen", weights="severity"), Side("rejected", weights="severity"), j),
    ]
    if image_coefficient:
        terms += [
            Term("standard-image", standard, Side("standard", image=masked), k * image_coefficient),
            Term("revised-image", Side("chosen", weights="image"), Side("chosen", image=masked, weights="image"),
                 j * image_coefficient),
        ]  # fmt: skip
    anchors = []
    if anchor_coefficient:
        sides = (standard, chosen, standard, chosen)
        for term, side, sign in zip([t.name for t in terms], sides, signs, strict=False):
            anchors.append(Anchor(f"anchor-{term}", side, sign, anchor, anchor_coefficient, anchor_kind))
    published = PLAIN | {"rank": 256, "alpha": 512, "epochs": 4, "batch_size": 32, "warmup": 5, "align_epochs": 2,
                         "align_lr": 2e-5}  # fmt: skip
    return Recipe(
        tuple(terms), tuple(anchors), beta=beta, reduction=reduction, label_smoothing=label_smoothing,
        divergence=divergence, padded_to=padded_to if compat == "authors" else None, optional=("standard",),
        alignment=("standard", "chosen"), published=published,
    )  # fmt: skip


#: Recipes by name.
RECIPES: dict[str, Callable[..., Recipe]] = {
    "sft": sft,
    "dpo": dpo,
    "re-align-rdpo": rdpo,
    "rdpo": rdpo,
    "opa-dpo": opa_dpo,
}


def get_recipe(recipe: str | Recipe, **settings: Any) -> Recipe:
    """A recipe by name with settings, or one as it is."""
    if isinstance(recipe, Recipe):
        if settings:
            raise ValueError(f"recipe is a Recipe already, so {sorted(settings)} cannot be set besides")
        return recipe
    check_type("recipe", recipe, str, f"a Recipe or one of {list(RECIPES)}")
    check_choice("recipe", recipe, RECIPES)
    return RECIPES[recipe](**settings)


__all__ = [
    "GIVEN", "RECIPES", "Anchor", "Imitation", "Losses", "Read", "Recipe", "Side", "Term", "dpo",
    "get_recipe", "opa_dpo", "rdpo", "sft",
]  # fmt: skip
