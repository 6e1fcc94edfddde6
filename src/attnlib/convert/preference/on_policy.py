"""On-policy answers: what the model says itself, and the same minimally revised.

OPA-DPO (Yang et al., 2025, arXiv 2501.09695): the model's own answer is cut into sentences; an expert keeps, rewrites
or removes each and says how severe its error is and whether it was one of seeing. The judge is a callable: a model, a
person, or :class:`TruthJudge`, a rule from what is known of the picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_type, describe
from .batches import Preference, encode
from .refill import encode_with_offsets, left_padded

#: Weight of a token by the score of its sentence, 1 (wrong) to 4 (right), as released.
SEVERITY = {1: 2.5, 2: 2.0, 3: 1.5, 4: 1.0}
#: Weight of a token in the terms of the image, by the kind of error of its sentence, as released.
IMAGE = {"image_recognition_error": 3.0, "language_comprehension_error": 1.0, "correct": 1.0}


@dataclass(frozen=True)
class Segment:
    """One sentence of an answer.

    Args:
        said: by the model; empty for what was added.
        revised: by the expert; empty for what was removed.
        score: 1 (wrong) to 4 (right).
        error: a key of :data:`IMAGE`.
    """

    said: str
    revised: str
    score: int = 4
    error: str = "correct"

    def __post_init__(self) -> None:
        check_type("said", self.said, str)
        check_type("revised", self.revised, str)
        check_choice("score", self.score, SEVERITY)
        check_choice("error", self.error, IMAGE)


#: ``judge(sentence) -> Segment``.
Judge = Callable[[str], Segment]


def sentences(text: str) -> list[str]:
    """Sentences, with their full stops.

    >>> sentences("A cat. It is 2.5 m long! Really")
    ['A cat.', 'It is 2.5 m long!', 'Really']
    """
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def items(text: str) -> list[str]:
    """Entries of a list with commas, each but the last with its comma.

    >>> items("red circle, blue square")
    ['red circle,', 'blue square']
    """
    parts = [p.strip() for p in text.split(",") if p.strip()]
    return [*(p + "," for p in parts[:-1]), *parts[-1:]]


@dataclass(frozen=True)
class TruthJudge:
    """Removes, or replaces, sentences that name things which are not there.

    Args:
        present: names of what is there.
        known: all names; what is no name is left alone.
        instead: by name, what to say in the sentence's place; a name it lacks removes the sentence.

    >>> TruthJudge({"cat"}, {"cat", "dog"})("a dog barks.").revised
    ''
    """

    present: Iterable[str]
    known: Iterable[str]
    instead: Mapping[str, str] | None = None

    def __call__(self, sentence: str) -> Segment:
        named = [
            name for name in sorted(self.known, key=len, reverse=True)
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", sentence, re.IGNORECASE)
        ]  # fmt: skip
        wrong = [name for name in named if name not in set(self.present)]
        if not wrong:
            return Segment(sentence, sentence)
        return Segment(sentence, (self.instead or {}).get(wrong[0], ""), 1, "image_recognition_error")


def revise(answer: str, judge: Judge, split: Callable[[str], list[str]] = sentences) -> list[Segment]:
    """An answer sentence by sentence before a judge.

    Raises:
        ValueError: an empty answer, or one of which nothing is left.
        TypeError: a judge that gives no :class:`Segment`.
    """
    check_type("answer", answer, str)
    if not callable(judge):
        raise TypeError(f"judge must be a callable from a sentence to a Segment, got {describe(judge)}")
    parts = split(answer)
    if not parts:
        raise ValueError(f"answer is empty: {answer!r}")
    out = []
    for part in parts:
        segment = judge(part)
        check_type("judge's answer", segment, Segment)
        out.append(segment)
    if not any(s.revised.strip() for s in out):
        raise ValueError(f"nothing of the answer is left after revision: {answer[:80]!r}; let the judge say something")
    return out


def _weighted(
    tokenizer: Any, pieces: Sequence[tuple[str, float, float]], end: bool
) -> tuple[list[int], list[float], list[float]]:
    """Ids of pieces joined by spaces, and both weights of every token."""
    text, borders = "", []
    for piece, *_ in pieces:
        text = f"{text} {piece}" if text else piece
        borders.append(len(text))
    ids, offsets = encode_with_offsets(tokenizer, text)
    of = [next(i for i, border in enumerate(borders) if b <= border) for _, b in offsets]
    severity, image = [pieces[i][1] for i in of], [pieces[i][2] for i in of]
    if end and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        severity.append(severity[-1])
        image.append(image[-1])
    return ids, severity, image


def encode_revision(
    tokenizer: Any, segments: Sequence[Segment], end: bool = True
) -> tuple[dict[str, list[int]], dict[str, dict[str, list[float]]]]:
    """Responses ``rejected`` (what was said) and ``chosen`` (revised), and their weights per token.

    Args:
        tokenizer: a fast one of transformers.
        segments: of :func:`revise`.
        end: put the end of sequence behind; it weighs as the token before it in ``chosen`` and nothing in
            ``rejected``, as released.

    Returns:
        ``responses`` and ``weights`` as :class:`~.Preference` takes them.
    """
    out: dict[str, tuple[list[int], list[float], list[float]]] = {}
    for name in ("rejected", "chosen"):
        texts = [(s.said if name == "rejected" else s.revised).strip() for s in segments]
        pieces = [(t, SEVERITY[s.score], IMAGE[s.error]) for t, s in zip(texts, segments, strict=True) if t]
        if not pieces:
            raise ValueError(f"the {name} answer is empty")
        out[name] = _weighted(tokenizer, pieces, end)
    if end and tokenizer.eos_token_id is not None:
        out["rejected"][1][-1] = out["rejected"][2][-1] = 0.0
    weights = {"severity": {n: v[1] for n, v in out.items()}, "image": {n: v[2] for n, v in out.items()}}
    return {n: v[0] for n, v in out.items()}, weights


@torch.no_grad()
def rollout(
    model: Any, inputs: Sequence[Mapping[str, Any]], max_new_tokens: int = 128, batch_size: int = 8, **generate: Any
) -> list[Tensor]:
    """What the model says to prompts: token ids (T,) each, without padding, with the end of sequence if it came.

    Args:
        model: of transformers, with ``generate``.
        inputs: of one prompt each.
        max_new_tokens: at most so many.
        batch_size: prompts per call, padded on the left.
        generate: further arguments: ``do_sample``, ``temperature``, ``num_beams``.
    """
    check_int("max_new_tokens", max_new_tokens, least=1)
    check_int("batch_size", batch_size, least=1)
    if not len(inputs):
        raise ValueError("inputs is empty; there must be at least one prompt")
    config = getattr(model, "generation_config", None)
    ends = generate.get("eos_token_id", getattr(config, "eos_token_id", None))
    stops = set() if ends is None else set(ends if isinstance(ends, (list, tuple)) else [ends])
    device, out = next(model.parameters()).device, []
    for i in range(0, len(inputs), batch_size):
        batch = {k: v.to(device) for k, v in left_padded(inputs[i : i + batch_size]).items()}
        said = model.generate(**batch, **{"do_sample": False, "pad_token_id": 0, "max_new_tokens": max_new_tokens,
                                          **generate})  # fmt: skip
        for row in said[:, batch["input_ids"].shape[1] :].cpu():
            end = next((t + 1 for t, token in enumerate(row.tolist()) if token in stops), len(row))
            out.append(row[:end])
    return out


def on_policy_pairs(
    model: Any,
    processor: Any,
    examples: Sequence[Mapping[str, Any]],
    judges: Judge | Sequence[Judge],
    split: Callable[[str], list[str]] = sentences,
    **settings: Any,
) -> list[Preference]:
    """Pairs of the model's own answers and their revisions; answers with nothing to revise are left out.

    Args:
        model: of transformers.
        processor: of transformers, with a fast ``tokenizer``.
        examples: ``{"prompt": str, "image": ..., "standard": str}``; ``standard`` in all of them or in none.
        judges: one for all, or one per example.
        split: how an answer is cut.
        settings: of :func:`rollout`.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    each = [judges] * len(examples) if callable(judges) else list(judges)
    if len(each) != len(examples):
        raise ValueError(f"judges must be one, or one per example, {len(examples)}, got {len(each)}")
    encoded = [encode(processor, example) for example in examples]
    said = rollout(model, [e.inputs for e in encoded], **settings)
    out = []
    for pair, judge, ids in zip(encoded, each, said, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not text:
            continue
        segments = revise(text, judge, split)
        if all(s.said == s.revised for s in segments):
            continue
        responses, weights = encode_revision(tokenizer, segments)
        out.append(Preference(pair.inputs, {**pair.responses, **responses}, pair.images, weights))
    return out
