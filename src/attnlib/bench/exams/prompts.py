"""Prompts of four parts, and what kind of error an answer has (after Ioste, 2024, arXiv 2402.14002).

The paper's are the idea, that many errors of language models are the instruction's and not the model's, and the recipe:
Persona, Grouping, Intelligence, with what the model cannot know handed over beside the question. It gives no algorithm,
prompt or data. The form of the parts, the rule that tells errors apart, the sheet for raters, the report and the probe
of attention are ours.

>>> prompt = Prompt("You answer a shop's customers.", {"prices": ["What is a pen?"]}, "Answer in one line.")
>>> print(prompt.build()["prices"])
# Persona
You answer a shop's customers.
<BLANKLINE>
# Intelligence
Answer in one line.
<BLANKLINE>
# Group: prices
1. What is a pen?
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import check_int, check_real, describe
from ...types import check_choice
from ..stats import fisher_p, kappa, share_interval

#: Ours, by their definition.
ERRORS: dict[str, str] = {
    "hallucination": "contradicts, or is not supported by, what is given or known, though the instruction is clear",
    "misdirection": "is true to a possible reading of an unclear or incomplete instruction, not to the one meant",
    "format": "is not in the form asked for",
    "refusal": "declines to answer",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """What the model was not trained on and is handed over: a text, and where it is from."""

    text: str
    provenance: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt per group of alike items.

    Args:
        persona: who answers, for whom, what for.
        groups: items by the group's name; every item in one group.
        intelligence: knowledge of the field, definitions, the form of the answer, checks.
        external: what the model cannot know, with its provenance.
        notes: a glossary or rules of one group, by its name.
    """

    persona: str
    groups: Mapping[str, Sequence[str]]
    intelligence: str = ""
    external: Sequence[Source] = ()
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.persona.strip():
            raise ValueError("persona must say who answers, got an empty text")
        if not self.groups:
            raise ValueError("groups must hold at least one group, got none")
        for name, items in self.groups.items():
            if isinstance(items, str):
                raise TypeError(f"groups[{name!r}] must be a sequence of items, got {describe(items)}")
            if not items or not all(item.strip() for item in items):
                raise ValueError(f"groups[{name!r}] is an empty group, or holds an empty item")
        count = Counter(item for items in self.groups.values() for item in items)
        if twice := sorted(item for item, n in count.items() if n > 1):
            raise ValueError(f"groups must hold every item once, more than once there: {twice[:5]}")
        if unknown := sorted(set(self.notes) - set(self.groups)):
            raise ValueError(f"notes names groups that do not exist: {unknown}; possible: {sorted(self.groups)}")
        if any(not s.text.strip() or not s.provenance.strip() for s in self.external):
            raise ValueError("external must hold a text and its provenance each, one is empty")

    def build(self) -> dict[str, str]:
        """By group, its prompt; parts in a fixed order, empty ones left out."""
        context = "\n".join(f"[{s.provenance}] {s.text.strip()}" for s in self.external)
        found = {}
        for name, items in self.groups.items():
            asked = "\n".join(f"{i + 1}. {item.strip()}" for i, item in enumerate(items))
            note = self.notes.get(name, "").strip()
            parts = {
                "Persona": self.persona.strip(), "Intelligence": self.intelligence.strip(),
                "External context": context, f"Group: {name}": f"{note}\n{asked}" if note else asked,
            }  # fmt: skip
            found[name] = "\n\n".join(f"# {title}\n{text}" for title, text in parts.items() if text)
        return found


def classify_error(
    answer: Callable[[str, int], str],
    right: Callable[[str], bool],
    prompt: str,
    repaired: str,
    n: int = 20,
    tau: float = 0.1,
    form: Callable[[str], bool] | None = None,
    refused: Callable[[str], bool] | None = None,
) -> str | None:
    """What kind of error a model makes: misdirection where it vanishes under a clear instruction, else hallucination.

    Args:
        answer: from a prompt and the number of the sample to a text.
        right: whether a text is right.
        prompt: as it was.
        repaired: with an instruction that can be read in one way.
        n: samples of each.
        tau: an error rate up to which an error has vanished.
        form: whether a text is in the form asked for; most of the errors that are not make it a ``"format"`` error.
        refused: whether a text declines to answer; most of the errors that do make it a ``"refusal"``.

    Returns:
        One of :data:`ERRORS`, or ``None`` where there is no error: a rate of at most ``tau`` as it was.
    """
    check_int("n", n, least=1)
    check_real("tau", tau, least=0, below=1)
    wrong = [text for i in range(n) if not right(text := answer(prompt, i))]
    if len(wrong) / n <= tau:
        return None
    for name, test in (("refusal", refused), ("format", lambda text: form is not None and not form(text))):
        if test is not None and 2 * sum(map(test, wrong)) > len(wrong):
            return name
    left = sum(not right(answer(repaired, i)) for i in range(n))
    return "misdirection" if left / n <= tau else "hallucination"


@dataclasses.dataclass(frozen=True)
class Rating:
    """What a rater says of one answer: ``error`` is of :data:`ERRORS`, or ``None`` for none."""

    item: str
    rater: str
    guideline: str
    error: str | None = None

    def __post_init__(self) -> None:
        check_choice("error", self.error, (None, *ERRORS))
        for name in ("item", "rater", "guideline"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given: labels are a rater's, under a version of the guideline")


def agreement(ratings: Sequence[Rating], raters: tuple[str, str]) -> float:
    """Cohen's kappa of two raters over the items that both have rated, under one version of the guideline."""
    if versions := {r.guideline for r in ratings if r.rater in raters}:
        if len(versions) > 1:
            raise ValueError(f"ratings must be under one guideline, got {sorted(versions)}")
    one, two = ({r.item: r.error for r in ratings if r.rater == rater} for rater in raters)
    both = [item for item in one if item in two]
    if not both:
        raise ValueError(f"ratings hold no item that both of {raters} have rated")
    return kappa([one[i] for i in both], [two[i] for i in both])


def report(ratings: Sequence[Rating], rater: str) -> dict[str, dict[str, Any]]:
    """Errors of one rater: per kind, and of any kind, the number, the share and Wilson's 95 % interval."""
    own = [r for r in ratings if r.rater == rater]
    if not own:
        raise ValueError(f"rater={rater!r} has rated nothing; possible: {sorted({r.rater for r in ratings})}")
    if len({r.item for r in own}) < len(own):
        raise ValueError(f"rater={rater!r} has rated an item more than once")
    count = Counter(r.error for r in own)
    found = {"any": len(own) - count[None], **{name: count[name] for name in ERRORS}}
    return {k: {"errors": v, "n": len(own), "share": v / len(own), "interval": share_interval(v, len(own))}
            for k, v in found.items()}  # fmt: skip


def compare_prompts(errors: tuple[int, int], n: tuple[int, int]) -> dict[str, Any]:
    """Error rates of two prompts, each with its interval, and the p of Fisher's exact test that they are one.

    >>> compare_prompts((30, 12), (200, 200))["p"] < 0.01
    True
    """
    shares = [{"share": e / m, "interval": share_interval(e, m)} for e, m in zip(errors, n, strict=True)]
    return {"prompts": shares, "p": fisher_p(errors, n)}


def attention_shares(
    weights: Sequence[Tensor], rows: slice | Sequence[int], spans: Mapping[str, Sequence[int]], sinks: int | None = 1
) -> dict[str, float]:
    """Share of the attention that rows of a causal model give to spans, over layers, heads and rows: where it looks,
    which is no proof that it answers so because of it. Ours.

    Args:
        weights: (B, heads, N, N) per layer, as a model gives them with ``output_attentions``.
        rows: of the answer's tokens.
        spans: columns by name, none in two spans.
        sinks: first tokens that are left out, and the rest is scaled to one; they take most of it in many models.
            ``None`` or 0 leaves them in; report both.

    Returns:
        By span; spans that cover every column sum to 1.
    """
    if not len(weights):
        raise ValueError("weights must hold at least one layer, got none")
    every = [i for columns in spans.values() for i in columns]
    length = weights[0].shape[-1]
    if len(set(every)) < len(every):
        raise ValueError("spans must not overlap")
    if every and not 0 <= min(every) <= max(every) < length:
        raise ValueError(f"spans must lie in 0..{length - 1}, got {min(every)}..{max(every)}")
    skip = check_int("sinks", sinks or 0, least=0, most=length - 1)
    total: dict[str, float] = dict.fromkeys(spans, 0.0)
    count = 0
    for layer in weights:
        if layer is None:
            raise ValueError("weights hold a layer without a map; load the model with attn_implementation='eager'")
        part = layer.detach().to(torch.float64)[..., rows, :]
        if not part.numel():
            raise ValueError(f"rows={rows} name no row of {length}")
        if skip:
            part = part.clone()
            part[..., :skip] = 0
            mass = part.sum(-1, keepdim=True)
            if bool((mass == 0).any()):
                raise ValueError(f"sinks={skip} leaves rows that give all their weight to the tokens left out")
            part = part / mass
        for name, columns in spans.items():
            total[name] += float(part[..., list(columns)].sum())
        count += part[..., 0].numel()
    return {name: value / count for name, value in total.items()}
