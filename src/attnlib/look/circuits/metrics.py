"""What is measured of the logits at the answer: one number per sample, larger where the right answer wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import check_whole, describe


class Metric:
    """A number per sample from the logits at the position of the answer.

    Args:
        function: (rows, V) logits, or (rows, K) of ``tokens`` alone, and the samples (rows,) they belong to; to
            (rows,).
        tokens: (B, K) the tokens whose logits are read, per sample; ``None`` for the whole vocabulary. Fewer logits are
            cheaper by far.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], tokens: Tensor | None = None):
        if tokens is not None:
            check_whole("tokens", tokens)
            if tokens.dim() != 2:
                raise ValueError(f"tokens must be (B, K), got {tuple(tokens.shape)}")
        self.function, self.tokens = function, tokens

    def __call__(self, logits: Tensor, samples: Tensor) -> Tensor:
        value = self.function(logits, samples)
        if not isinstance(value, Tensor) or value.shape != (len(logits),):
            got = tuple(value.shape) if isinstance(value, Tensor) else describe(value)
            raise ValueError(f"a metric must give one number per row ({len(logits)},), got {got}")
        return value


def _answers(name: str, value: Any) -> Tensor:
    answers = torch.as_tensor(value)
    if answers.is_floating_point() or answers.dtype == torch.bool:
        raise TypeError(f"{name} must hold token ids, got {answers.dtype}")
    if answers.dim() != 1:
        raise ValueError(
            f"{name} must be one token per sample (B,), got {tuple(answers.shape)}; an answer of several tokens has no "
            "single logit"
        )
    return answers


def logit_difference(correct: Tensor | Sequence[int], wrong: Tensor | Sequence[int]) -> Metric:
    """``logit[correct] - logit[wrong]``.

    Args:
        correct, wrong: (B,) token ids.

    >>> metric = logit_difference([0], [2])
    >>> metric(torch.tensor([[3.0, 1.0]]), torch.tensor([0])).tolist()  # logits of its two tokens
    [2.0]
    """
    right, other = _answers("correct", correct), _answers("wrong", wrong)
    if len(right) != len(other):
        raise ValueError(f"correct and wrong must be of the same samples, got {len(right)} and {len(other)} tokens")
    tokens = torch.stack([right, other], 1)
    return Metric(lambda logits, samples: logits[:, 0] - logits[:, 1], tokens)


def choice_logit(correct: Tensor | Sequence[int], choices: Tensor) -> Metric:
    """The logit of the right choice against the mean of all choices.

    Args:
        correct: (B,) number of the right choice.
        choices: (B, K) token ids of the choices.

    >>> choice_logit([1], torch.tensor([[5, 6]]))(torch.tensor([[1.0, 3.0]]), torch.tensor([0])).tolist()
    [1.0]
    """
    index = _choice(correct, choices)
    return Metric(
        lambda logits, samples: logits.gather(1, index.to(logits.device)[samples, None])[:, 0] - logits.mean(1), choices
    )


def choice_loss(correct: Tensor | Sequence[int], choices: Tensor) -> Metric:
    """Minus the cross-entropy among the choices: larger is better, as everywhere here."""
    index = _choice(correct, choices)
    return Metric(
        lambda logits, samples: logits.log_softmax(1).gather(1, index.to(logits.device)[samples, None])[:, 0], choices
    )


def _choice(correct: Any, choices: Tensor) -> Tensor:
    index = _answers("correct", correct)
    check_whole("choices", choices)
    if choices.dim() != 2 or len(choices) != len(index):
        raise ValueError(f"choices must be (B, K) for the {len(index)} answers of correct, got {tuple(choices.shape)}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < choices.shape[1]:
        raise ValueError(f"correct must be numbers of choices in [0, {choices.shape[1]}), got {index.tolist()!r:.60}")
    return index


def single_tokens(tokenizer: Any, words: Sequence[str]) -> Tensor:
    """(n,) ids of words that are one token each.

    Args:
        tokenizer: called as ``tokenizer(word, add_special_tokens=False)``.
        words: with their leading space, where the model puts one.

    Raises:
        ValueError: words of several tokens, by name.
    """
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    long = [word for word, one in zip(words, ids, strict=True) if len(one) != 1]
    if long:
        raise ValueError(f"answers must be one token each; of several tokens are {long[:10]}")
    return torch.tensor([one[0] for one in ids])
