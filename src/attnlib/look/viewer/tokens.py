"""Tokens as people read them: labels, and which pieces make one word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .runs import Axis, Part

#: What tokenizers write in front of a piece that begins a word.
_BEGIN = ("Ġ", "▁", "Ċ")

#: What a part of a character is decoded to.
_PART = "\ufffd"


def pieces(tokens: Sequence[str], texts: Sequence[str] | None = None) -> list[int]:
    """Number of the word that each piece belongs to, from how tokenizers mark them.

    WordPiece marks what goes on (``##ing``), byte-pair and unigram vocabularies what begins (``Ġ``, ``▁``). Without
    any mark every token is a word. Punctuation is a word of its own; parts of one character are never apart.

    Args:
        tokens: as the vocabulary writes them.
        texts: as they read; a part of a character reads as U+FFFD.

    >>> pieces(["[CLS]", "look", "##ing", "at", "[SEP]"]), pieces(["The", "Ġto", "ken", "izer", "."])
    ([0, 1, 1, 2, 3], [0, 1, 1, 1, 2])
    """
    texts = list(tokens if texts is None else texts)
    wordpiece = any(t.startswith("##") for t in tokens)
    marked = any(t.startswith(_BEGIN) for t in tokens)
    numbers: list[int] = []
    word, before = -1, ""
    for token, text in zip(tokens, texts, strict=True):
        if wordpiece:
            goes_on = token.startswith("##")
        else:
            joined = (text[:1].isalnum() or _PART in text) and (before[-1:].isalnum() or _PART in before)
            goes_on = marked and joined and not token.startswith(_BEGIN)
        word += not (goes_on and word >= 0)
        before = text
        numbers.append(word)
    return numbers


def text_axis(tokenizer: Any, ids: Sequence[int]) -> Axis:
    """The tokens of a text.

    Args:
        tokenizer: of transformers.
        ids: of the tokens.
    """
    raw = [str(t) for t in tokenizer.convert_ids_to_tokens(list(ids))]

    def decoded(some: Sequence[int]) -> str:
        return tokenizer.decode(list(some), clean_up_tokenization_spaces=False)

    texts = [t if t.startswith("##") else decoded([number]) for t, number in zip(raw, ids, strict=True)]
    words = pieces(raw, texts)
    whole = [decoded([i for i, w in zip(ids, words, strict=True) if w == word]) for word in range(max(words) + 1)]
    # A part of a character has no text of its own, only bytes, as the vocabulary writes them.
    labels = [r if _PART in t or not t else t for r, t in zip(raw, texts, strict=True)]
    return Axis(labels, words, (Part("text", 0, len(labels)),), texts=whole)
