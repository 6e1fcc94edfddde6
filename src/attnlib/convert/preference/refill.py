"""Rejected answers by controlled hallucination: what matters in the chosen answer is masked and said anew.

Re-Align (Xing et al., 2025, arXiv 2502.13146): the model fills the masked places of its chosen answer while it looks at
a retrieved image. All other words stay, so that the two answers differ in what is seen alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...checks import check_flag, check_int, check_template, check_type, describe, to_list
from .batches import SEQUENCES, Preference, _row, _stack

#: ``complete(image, prompt) -> text``.
Complete = Callable[[Any, str], str]

#: How a completion is asked for; ``{question}`` and ``{masked}`` are filled in.
PROMPT = (
    "{question}\nAn answer with gaps: {masked}\n"
    "Fill every [MASK] by what the image shows, keep all other words, and give the whole answer."
)


def _mentions(text: str, words: Sequence[str]) -> list[tuple[int, int]]:
    """Where words stand in a text, as whole words, longest first where they overlap."""
    check_type("text", text, str)
    for i, word in enumerate(words):
        check_type(f"words[{i}]", word, str)
    listed = sorted({w for w in words if w}, key=len, reverse=True)
    if not listed:
        raise ValueError("words is empty: there is nothing to mask")
    pattern = "|".join(re.escape(w) for w in listed)
    return [m.span() for m in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)]


def mask_words(text: str, words: Iterable[str], mask: str = "[MASK]") -> str:
    """A text with a mark in place of words; ``ValueError`` where it has none of them.

    >>> mask_words("A red cat sits by a catalogue.", ["cat", "red"])
    'A [MASK] [MASK] sits by a catalogue.'
    """
    words = to_list("words", words, '["cat"]') or []
    spans = _mentions(text, words)
    if not spans:
        raise ValueError(f"text has none of the words {sorted(words)[:8]}, so nothing is masked: {text[:80]!r}")
    for start, end in reversed(spans):
        text = text[:start] + mask + text[end:]
    return text


def mask_tokens(tokenizer: Any, text: str, words: Iterable[str], end: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids (T,) of an answer and which of them (T,) belong to words.

    Args:
        tokenizer: a fast one of transformers, which knows where tokens stand in the text.
        end: put the end of sequence behind, unmasked.
    """
    words = to_list("words", words, '["cat"]') or []
    spans = _mentions(text, words)
    ids, offsets = encode_with_offsets(tokenizer, text)
    masked = [any(a < e and s < b for s, e in spans) for a, b in offsets]
    if not any(masked):
        raise ValueError(f"text has none of the words {sorted(words)[:8]}, so nothing is masked: {text[:80]!r}")
    if end and tokenizer.eos_token_id is not None:
        ids, masked = [*ids, tokenizer.eos_token_id], [*masked, False]
    return torch.tensor(ids), torch.tensor(masked)


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids without special tokens, and where each stands in the text, without the space before it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer must be a fast one, which knows where its tokens stand in the text")
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = []
    for a, b in out["offset_mapping"]:
        while a < b - 1 and text[a].isspace():
            a += 1
        offsets.append((a, b))
    return list(out["input_ids"]), offsets


def refill_text(complete: Complete, image: Any, question: str, masked: str, prompt: str = PROMPT) -> str:
    """The completed answer of a model that is asked in words, under (a retrieved) ``image``.

    Args:
        complete: what answers.
        image: that it looks at.
        question: what was asked.
        masked: the answer with marks.
        prompt: with ``{masked}`` and, if it likes, ``{question}``.

    Raises:
        ValueError: the masked answer has no mark, the completion is empty or keeps one, or a prompt that cannot be
            filled in.
    """
    if not callable(complete):
        raise TypeError(f"complete must be a callable from (image, prompt) to a text, got {describe(complete)}")
    check_type("question", question, str)
    check_type("masked", masked, str)
    check_template("prompt", prompt, ("question", "masked"), needed=("masked",))
    if "[MASK]" not in masked:
        raise ValueError(f"masked has no [MASK]: {masked[:80]!r}")
    said = complete(image, prompt.format(question=question, masked=masked))
    check_type("complete's answer", said, str)
    if not said.strip() or "[MASK]" in said:
        raise ValueError(f"complete left the answer empty or with a mark: {said[:80]!r}")
    return said.strip()


def left_padded(inputs: Sequence[Mapping[str, Any]], pad: int = 0) -> dict[str, Tensor]:
    """One batch for ``generate`` of prompts that are given each on its own."""
    rows = [_row(given, f"inputs[{i}]") for i, given in enumerate(inputs)]
    names = set().union(*rows)
    length = max(len(r["input_ids"]) for r in rows)
    out = {}
    for name in sorted(names):
        if name in SEQUENCES:
            table = torch.full((len(rows), length), pad if name == "input_ids" else 0, dtype=torch.long)
            for i, row in enumerate(rows):
                value = row.get(name, torch.full_like(row["input_ids"], SEQUENCES[name]))
                table[i, length - len(value) :] = value
            out[name] = table
        else:
            parts = [r[name] for r in rows if name in r]
            out[name] = _stack(name, [p if p.dim() else p[None] for p in parts])
    return out


class _Keep:
    """A logits processor: kept tokens are forced; in masked places the chosen token may be ruled out."""

    def __init__(self, answers: Sequence[Tensor], masked: Sequence[Tensor], start: int, differ: bool, never: set[int]):
        self.answers, self.masked, self.start, self.differ, self.never = answers, masked, start, differ, never

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, out = input_ids.shape[1] - self.start, scores.clone()
        beams = len(scores) // len(self.answers)
        for row in range(len(scores)):
            answer, masked = self.answers[row // beams], self.masked[row // beams]
            if step < len(answer) and masked[step]:
                out[row, list(self.never)] = -torch.inf
                if self.differ and not (step and masked[step - 1]):
                    out[row, answer[step]] = -torch.inf
            else:
                out[row] = -torch.inf
                out[row, answer[min(step, len(answer) - 1)]] = 0.0
        return out


@torch.no_grad()
def refill(
    model: Any,
    inputs: Sequence[Mapping[str, Any]],
    answers: Sequence[Any],
    masked: Sequence[Any],
    differ: bool = True,
    never: Iterable[int] = (),
    **generate: Any,
) -> list[Tensor]:
    """Answers whose masked tokens the model says anew, left to right, under the images of ``inputs``.

    Args:
        model: of transformers, with ``generate``.
        inputs: of one prompt each, with the retrieved image.
        answers: token ids (T,) each.
        masked: (T,) each: which tokens are said anew; as many come back.
        differ: the first token of every masked stretch must be another than before.
        never: ids that are not said: special tokens, image tokens. The padding and the end of sequence never are.
        generate: further arguments of ``generate``: ``do_sample``, ``num_beams``, ``temperature``.

    Returns:
        Token ids (T,) per answer.
    """
    check_flag("differ", differ)
    if not len(inputs) or not len(inputs) == len(answers) == len(masked):
        counts = (len(inputs), len(answers), len(masked))
        raise ValueError(f"inputs, answers and masked must be equally many and at least one, got {counts}")
    told = [torch.as_tensor(a).long().flatten() for a in answers]
    where = [torch.as_tensor(m).bool().flatten() for m in masked]
    for i, (a, m) in enumerate(zip(told, where, strict=True)):
        if not len(a) or a.shape != m.shape:
            raise ValueError(f"masked[{i}] must say of each of the {len(a)} tokens of answers[{i}], got {len(m)}")
        if not m.any():
            raise ValueError(f"masked[{i}] masks nothing, so the answer would stay as it is")
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in left_padded(inputs).items()}
    config = getattr(model, "generation_config", None)
    ends = [getattr(config, name, None) for name in ("eos_token_id", "pad_token_id")]
    out_of = {int(i) for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}
    images = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
    out_of |= {int(i) for i in (*never, *(i for i in images if i is not None))}
    keep = _Keep(told, where, batch["input_ids"].shape[1], differ, out_of)
    length = max(map(len, told))
    settings = {"do_sample": False, **generate, "max_new_tokens": length, "min_new_tokens": None, "eos_token_id": None}
    said = model.generate(**batch, logits_processor=[keep], pad_token_id=0, **settings)
    said = said[:, -length:].cpu()
    if len(said) != len(told):
        raise ValueError(f"generate gave {len(said)} answers for {len(told)} prompts; ask for one each")
    return [row[: len(a)] for row, a in zip(said, told, strict=True)]


def refill_pairs(
    model: Any,
    pairs: Sequence[Preference],
    masked: Sequence[Any],
    image: str = "retrieved",
    batch_size: int = 8,
    **settings: Any,
) -> list[Preference]:
    """Pairs whose rejected answer is the chosen one, refilled under another image of theirs.

    Args:
        model: of transformers.
        pairs: with ``chosen`` and the image.
        masked: per pair, (T,) of its chosen tokens.
        image: name of the image.
        batch_size: pairs per call of ``generate``.
        settings: of :func:`refill`.
    """
    check_int("batch_size", batch_size, least=1)
    if len(pairs) != len(masked):
        raise ValueError(f"masked must have an entry per pair, {len(pairs)}, got {len(masked)}")
    for i, pair in enumerate(pairs):
        if image not in pair.images:
            raise ValueError(f"pairs[{i}] lacks the image {image!r}; it has {sorted(pair.images)}")
    out = []
    for i in range(0, len(pairs), batch_size):
        part = pairs[i : i + batch_size]
        seen = []
        for pair in part:
            other = pair.images[image]
            seen.append({**pair.inputs, **({"pixel_values": other} if isinstance(other, Tensor) else other)})
        said = refill(model, seen, [p.responses["chosen"] for p in part], masked[i : i + batch_size], **settings)
        for pair, answer in zip(part, said, strict=True):
            # Weights of an answer that is replaced say nothing of the new one.
            kept = {n: {r: v for r, v in of.items() if r != "rejected"} for n, of in pair.weights.items()}
            out.append(replace(pair, responses={**pair.responses, "rejected": answer}, weights=kept))
    return out
