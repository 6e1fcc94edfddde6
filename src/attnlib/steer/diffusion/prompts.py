"""Words of a prompt as numbers of the text tokens that a denoiser reads.

Words are found in the text, and their tokens by the offsets that the tokenizer gives, so that words of several pieces
and punctuation need no rules of their own. Numbers count as the denoiser does, from the token that begins the text.
A span that is given as numbers is always taken as it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import check_int, checked, describe

#: A word or phrase of the prompt, or the numbers of its tokens.
Word = str | Sequence[int]

#: Pipelines whose denoiser reads the tokens of the second text encoder only.
SECOND_ONLY = ("Flux",)


@checked
def find(prompt: str, word: str) -> tuple[int, int]:
    """Where a word or phrase stands in a prompt, as characters; letters' case does not matter.

    Raises:
        ValueError: it is not in the prompt, or several times.

    >>> find("a red circle", "red")
    (2, 5)
    """
    found = _matches(prompt, word)
    if not found:
        raise ValueError(f"word {word!r} is not in the prompt {prompt!r}")
    if len(found) > 1:
        raise ValueError(
            f"word {word!r} is {len(found)} times in the prompt {prompt!r}; give the numbers of the tokens that are "
            "meant, or a longer phrase"
        )
    return found[0].span()


def holds(prompt: str, word: str) -> bool:
    """Whether a word or phrase stands in a prompt, once or several times; letters' case does not matter.

    >>> holds("a red circle", "Red"), holds("a red circle", "re")
    (True, False)
    """
    return bool(_matches(prompt, word))


def _matches(prompt: str, word: str) -> list[re.Match[str]]:
    if not word.strip():
        raise ValueError("words holds an empty word; name words of the prompt, or give the numbers of their tokens")
    return list(re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE))


def token_spans(tokenizer: Any, prompt: str, words: Sequence[Word], limit: int | None = None) -> list[list[int]]:
    """The tokens of each word: ``spans[i]`` for ``words[i]``.

    Args:
        tokenizer: of transformers, one that gives offsets.
        prompt: the text.
        words: words or phrases in it, or numbers of tokens, which are taken as they are.
        limit: tokens that the text encoder reads, special ones included; ``tokenizer.model_max_length`` by default.

    Raises:
        ValueError: a word that is not in the prompt, or of whose tokens some are cut off.
        TypeError: a tokenizer without offsets.
    """
    limit = _limit(tokenizer) if limit is None else limit
    written: Any = None
    spans = []
    for word in words:
        if not isinstance(word, str):
            numbers = [check_int("words", number, least=0) for number in word]
            if not numbers or (limit is not None and max(numbers) >= limit):
                raise ValueError(f"words holds the tokens {numbers}; there are {limit}, counted from 0")
            spans.append(numbers)
            continue
        if written is None:
            written = _encoded(tokenizer, prompt)
        start, stop = find(prompt, word)
        offsets, special = written["offset_mapping"], written["special_tokens_mask"]
        span = [
            i for i, ((a, b), s) in enumerate(zip(offsets, special, strict=True)) if not s and a < stop and b > start
        ]  # fmt: skip
        if not span:
            raise ValueError(f"the tokenizer gives no token for the word {word!r} of the prompt {prompt!r}")
        if limit is not None and len(offsets) > limit:
            behind = next(i for i, s in enumerate(reversed(special)) if not s)
            if max(span) >= limit - behind:
                raise ValueError(
                    f"word {word!r} lies beyond the {limit} tokens that the text encoder reads: it is token "
                    f"{span[0]}{f' to {span[-1]}' if len(span) > 1 else ''} of {len(offsets)}"
                )
        spans.append(span)
    return spans


def _limit(tokenizer: Any) -> int | None:
    found = getattr(tokenizer, "model_max_length", None)
    return found if isinstance(found, int) and found < 1 << 20 else None


def _encoded(tokenizer: Any, prompt: str) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} gives no offsets, so words cannot be found in its tokens; give the numbers of "
            "their tokens instead of words"
        )
    return tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)


def text_streams(pipe: Any, longest: int | None = None) -> list[tuple[Any, int, int | None]]:
    """The tokenizers whose tokens a pipeline's denoiser reads side by side: ``(tokenizer, first column, limit)``.

    Stable Diffusion and its like have one; both encoders of SDXL read the same tokens, so the first stands for both;
    Stable Diffusion 3 puts the tokens of T5 behind those of CLIP; Flux reads those of T5 alone.

    Args:
        pipe: the pipeline.
        longest: its argument ``max_sequence_length``, if it takes one.

    Raises:
        TypeError: a pipeline without a tokenizer.
    """
    first, third = getattr(pipe, "tokenizer", None), getattr(pipe, "tokenizer_3", None)
    if type(pipe).__name__.startswith(SECOND_ONLY):
        first, third = getattr(pipe, "tokenizer_2", None), None
        streams: list[tuple[Any, int, int | None]] = [(first, 0, longest)]
    elif third is not None and first is not None:
        width = _limit(first) or 77
        streams = [(first, 0, width), (third, width, longest or 256)]
    else:
        own = None if first is None else _limit(first)
        streams = [(first, 0, own if longest is None or own is not None and own < longest else longest)]
    if first is None:
        raise TypeError(
            f"{type(pipe).__name__} has no tokenizer, so words cannot be found in its tokens; give the numbers of "
            "their tokens instead of words"
        )
    return streams


def context_spans(pipe: Any, prompt: str | None, words: Sequence[Word], longest: int | None = None) -> list[list[int]]:
    """The columns of each word in the text that a pipeline's denoiser reads, those of both encoders that stand side by
    side.

    Args:
        pipe: the pipeline.
        prompt: its prompt; ``None`` where it was given embeddings, so that only numbers can be taken.
        words: see :func:`token_spans`.
        longest: its argument ``max_sequence_length``, if it takes one.
    """
    if all(not isinstance(word, str) for word in words):
        return [[check_int("words", number, least=0) for number in word] for word in words]  # type: ignore[arg-type]
    if prompt is None:
        named = next(word for word in words if isinstance(word, str))
        raise ValueError(
            f"word {named!r} cannot be found, since the pipeline was given embeddings and no prompt; give the numbers "
            "of its tokens"
        )
    spans: list[list[int]] = [[] for _ in words]
    for number, (tokenizer, offset, limit) in enumerate(text_streams(pipe, longest)):
        for i, word in enumerate(words):
            if isinstance(word, str):
                spans[i] += [offset + t for t in token_spans(tokenizer, prompt, [word], limit)[0]]
            elif number == 0:
                spans[i] += [check_int("words", t, least=0) for t in word]
    return spans


def spans_of(sampling: Any, words: Sequence[Any]) -> list[list[list[int]]]:
    """Of each prompt of a running pipeline, the columns of each of its words, see :func:`context_spans`.

    Args:
        sampling: of the attached pipeline.
        words: those of every prompt, or a list for each.
    """
    prompts, longest = sampling.prompts, sampling.arguments.get("max_sequence_length")
    return [
        context_spans(sampling.pipe, None if prompts is None else prompts[n], some, longest)
        for n, some in enumerate(per_prompt(words, sampling.prompt_count))
    ]


def encoder_of(pipe: Any) -> Callable[..., Any]:
    """A pipeline's own way from prompts to what its denoiser reads.

    Raises:
        TypeError: it has none.
    """
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        raise TypeError(
            f"{type(pipe).__name__} has no encode_prompt, so that texts beside its prompt cannot be encoded; use a "
            "pipeline that has one, such as StableDiffusionPipeline"
        )
    return encode  # type: ignore[no-any-return]


def encoded(sampling: Any, texts: Sequence[str], like: Tensor) -> Tensor:
    """(n, L, D) of texts by themselves, as a running pipeline encodes prompts.

    Args:
        sampling: of the attached pipeline.
        texts: n of them.
        like: (L, D) of a prompt, as the denoiser reads it.

    Raises:
        ValueError: the pipeline encodes in another shape than its denoiser reads.
    """
    encode = encoder_of(sampling.pipe)
    settings = {"prompt": list(texts), "device": like.device, "num_images_per_prompt": 1}
    settings |= {"do_classifier_free_guidance": False}
    for name in ("clip_skip", "max_sequence_length", "clean_caption"):
        if sampling.arguments.get(name) is not None:
            settings[name] = sampling.arguments[name]
    known = inspect.signature(encode).parameters
    with torch.no_grad():
        found = encode(**{name: value for name, value in settings.items() if name in known})
    embedded: Tensor = found[0] if isinstance(found, (tuple, list)) else found
    if embedded.shape[1:] != like.shape:
        raise ValueError(
            f"{type(sampling.pipe).__name__} encodes {texts[-1]!r} as {tuple(embedded.shape[1:])}, but its denoiser "
            f"reads a prompt of {tuple(like.shape)}"
        )
    return embedded.to(like)


def encode_alone(sampling: Any, text: str, like: Tensor) -> Tensor:
    """(L, D) of a text by itself, as the pipeline that runs encodes its prompts.

    Args:
        sampling: ``session.sampling``, of the running call.
        text: a phrase, a caption, another prompt.
        like: the embedding (L, D) of a prompt that the denoiser reads.

    Raises:
        ValueError: the text is encoded in another shape.
    """
    return encoded(sampling, [text], like)[0]


def per_prompt(words: Sequence[Any], prompts: int, name: str = "words") -> list[list[Any]]:
    """Words that may be the same for every prompt, or a list for each; ``None`` stands for one that is lacking.

    >>> per_prompt(["cat", [3, 4]], 2)
    [['cat', [3, 4]], ['cat', [3, 4]]]
    >>> per_prompt([["cat"], []], 2)
    [['cat'], []]
    """
    nested = [
        w is not None and not isinstance(w, str) and (not len(w) or any(not isinstance(t, int) for t in w))
        for w in words
    ]
    if not any(nested):
        return [list(words)] * prompts
    if not all(nested) or len(words) != prompts:
        raise ValueError(
            f"{name} must be those of every prompt, or a list of them for each of {prompts} prompts; got "
            f"{describe(words)}"
        )
    return [list(w) for w in words]


def noun_phrases(prompt: str, parser: Callable[[str], Iterable[Any]] | Any) -> list[str]:
    """Noun phrases of a prompt, more than one word each, in the order of the text; what is said twice once.

    Args:
        prompt: the text.
        parser: a function from a text to phrases, or a pipeline of spaCy.

    Raises:
        TypeError: something else.
        ValueError: a phrase that is not in the prompt.

    >>> noun_phrases("a red cat and a dog", lambda text: ["a red cat", "a dog", "cat"])
    ['a red cat', 'a dog']
    """
    if not callable(parser):
        raise TypeError(
            f"parser must be a function from a prompt to its phrases, or a spaCy pipeline, got {parser!r:.80}"
        )
    found = parser(prompt)
    phrases = getattr(found, "noun_chunks", found)
    texts = []
    for phrase in phrases:
        text = getattr(phrase, "text", phrase)
        if not isinstance(text, str):
            raise TypeError(f"parser must give phrases (str), got {describe(phrase)}")
        text = text.strip()
        if len(text.split()) > 1 and text not in texts:
            if text.lower() not in prompt.lower():
                raise ValueError(f"parser gives the phrase {text!r}, which is not in the prompt {prompt!r}")
            texts.append(text)
    return texts
