"""Types of tokens: which positions of a prompt are image, text or padding, per sample, extended while decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, checked
from .site import read_mask

#: Types of tokens. The first three are those of LACING's attention mask.
PAD, TEXT, IMAGE, SYSTEM, QUESTION, GENERATED = range(6)

NAMES = ("pad", "text", "image", "system", "question", "generated")


def is_text(types: Tensor) -> Tensor:
    """Boolean: neither padding nor image."""
    return (types != PAD) & (types != IMAGE)


def _ids(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, int) else value
    if isinstance(ids, str) or not isinstance(ids, Iterable) or not all(isinstance(i, int) for i in ids):
        raise TypeError(
            f"{name} must be a token id or several, such as model.config.image_token_id or "
            f"tokenizer.encode(..., add_special_tokens=False); got {value!r}"
        )
    return tuple(ids)


class TokenTypes:
    """Types from token ids: the rule to give to ``attach(..., token_types=...)``.

    With ``answer``, a prompt that has an image is told apart further: text before the first image is ``SYSTEM``, text
    between it and the first answer marker is ``QUESTION``, the marker and everything after it ``GENERATED``, as it is
    when the model writes it. Later questions of a conversation are not ``QUESTION``: what they ask must not be read
    through an image that earlier answers read. A prompt without image or marker is all ``TEXT``.

    Args:
        image: id, or ids, of the image placeholder, one per image token as transformers' processors write them.
        pad: id of the padding token, where padding is not told by an attention mask.
        answer: id that opens the answer, or several ids in a row (``"ASSISTANT:"`` may be more than one token).
        compat: ``"authors"`` counts a marker of one token to the question, and knows no question where the first marker
            stands before the image, as the code of AKI does.

    >>> import torch
    >>> TokenTypes(image=9)(torch.tensor([[1, 9, 9, 4]])).tolist()
    [[1, 2, 2, 1]]
    >>> TokenTypes(image=9, answer=7)(torch.tensor([[1, 9, 4, 7, 5]])).tolist()
    [[3, 2, 4, 5, 5]]
    """

    @checked
    def __init__(
        self,
        image: int | Sequence[int],
        pad: int | None = None,
        answer: int | Sequence[int] | None = None,
        compat: str | None = None,
    ):
        self.image = _ids("image", image)
        if not self.image:
            raise ValueError("image must name at least one token id")
        self.answer = None if answer is None else _ids("answer", answer)
        if self.answer is not None and not self.answer:
            raise ValueError("answer must name at least one token id")
        check_choice("compat", compat, (None, "authors"))
        if compat == "authors" and (self.answer is None or len(self.answer) != 1):
            raise ValueError(f"compat='authors' needs an answer marker of one token, got answer={answer!r}")
        self.pad, self.compat = pad, compat

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, N) ids -> (B, N) types."""
        types = torch.full_like(ids, TEXT)
        image = torch.isin(ids, torch.tensor(self.image, device=ids.device, dtype=ids.dtype))
        if self.answer is not None:
            after_image = image.cumsum(1) > 0
            # The first marker after the first image; before an image there is nothing to answer.
            markers = self._markers(ids)
            opened = ((markers & after_image).cumsum(1) > 0) & after_image
            told_apart = (image.any(1) & opened.any(1))[:, None]
            if self.compat == "authors":
                told_apart = told_apart & ~(markers & ~after_image).any(1, keepdim=True)
            last = F.pad(opened[:, :-1], (1, 0)) if self.compat == "authors" else opened
            parts = torch.where(after_image, torch.full_like(ids, QUESTION), SYSTEM)
            parts = parts.masked_fill(last, GENERATED)
            types = torch.where(told_apart, parts, types)
        types = types.masked_fill(image, IMAGE)
        if self.pad is not None:
            types = types.masked_fill(ids == self.pad, PAD)
        return types

    def _markers(self, ids: Tensor) -> Tensor:
        """(B, N) boolean: a marker starts here."""
        assert self.answer is not None
        found = torch.ones_like(ids, dtype=torch.bool)
        for i, token in enumerate(self.answer):
            # Beyond the end nothing matches.
            found = found & F.pad(ids[:, i:] == token, (0, min(i, ids.shape[1])), value=False)
        return found


class TypeTracker:
    """Keeps the (B, L) types of all tokens seen, call after call of one model.

    Args:
        source: (B, N) types of the prompt, or a rule from ids to types.
    """

    def __init__(self, source: Tensor | Callable[[Tensor], Tensor]):
        if isinstance(source, Tensor):
            if source.dim() != 2 or source.is_floating_point() or source.is_complex() or source.dtype == torch.bool:
                raise ValueError(
                    f"token_types must be (B, N) integers of {dict(enumerate(NAMES))}, got {source.dtype} "
                    f"{tuple(source.shape)}"
                )
            if source.is_meta:
                raise ValueError("token_types must hold numbers that can be read, got a tensor on meta")
            if source.numel() and not 0 <= int(source.min()) <= int(source.max()) < len(NAMES):
                raise ValueError(f"token_types must lie between 0 and {len(NAMES) - 1}: {dict(enumerate(NAMES))}")
        elif isinstance(source, type) or not callable(source):
            hint = f"; make one: {source.__name__}(...)" if isinstance(source, type) else ""
            raise TypeError(
                f"token_types must be a (B, N) tensor or a rule from ids to types, got {source!r:.200}{hint}"
            )
        self.source = source
        self.types: Tensor | None = None
        self._padded: Tensor | None = None
        self._read: tuple[Tensor, Tensor] | None = None  # ids of the prompt so far, and their types
        self._asked: tuple[Tensor, int, torch.device, Tensor] | None = None

    def anew(self) -> TypeTracker:
        """The same source, nothing seen yet."""
        new = copy.copy(self)
        new.types = new._padded = new._asked = new._read = None
        return new

    def advance(
        self, ids: Tensor | None, offset: int, count: int, attention_mask: Any, in_prompt: bool = False
    ) -> None:
        """The model is about to read ``count`` tokens after ``offset`` others, of the same prompt or after it.

        Raises:
            ValueError: types that do not belong to these tokens, or a rule that takes back the types of tokens of the
                prompt that were read already.
        """
        total = offset + count
        if isinstance(self.source, Tensor):
            if self.types is None and not offset and count > self.source.shape[1]:
                raise ValueError(
                    f"token_types tells of {self.source.shape[1]} tokens, but the prompt has {count}; give the type of "
                    "every token of the prompt"
                )
            types = F.pad(self.source[:, :total], (0, max(0, total - self.source.shape[1])), value=GENERATED)
        else:
            if ids is None:
                raise ValueError(
                    "token_types is a rule on ids, but the model was called without input_ids; "
                    "give a (B, N) tensor of types instead"
                )
            new = self.source(ids)
            if not offset or count > 1:
                self._check_rule(ids, new)
            if in_prompt:
                new = self._in_prompt(ids, offset, new)
            elif offset and count == 1:
                new = torch.full_like(new, GENERATED)
            if offset:
                if self.types is None or self.types.shape[1] < offset or self.types.shape[0] != ids.shape[0]:
                    seen = None if self.types is None else tuple(self.types.shape)
                    raise ValueError(
                        f"the cache holds {offset} tokens of {ids.shape[0]} rows, but types were seen for {seen}; "
                        "run the prompt inside the session"
                    )
                new = torch.cat([self.types[:, :offset].to(new.device), new], 1)
            types = new
        padded = self._padding(attention_mask, offset, count)
        if padded is not None:
            if padded.shape[0] != types.shape[0]:
                raise ValueError(self._wrong_rows(types.shape[0], padded.shape[0]))
            types = types.masked_fill(padded.to(types.device), PAD)
        self.types = types

    def _in_prompt(self, ids: Tensor, offset: int, new: Tensor) -> Tensor:
        """Types of a piece of a prompt, of which the rule is told everything up to there."""
        assert not isinstance(self.source, Tensor)
        if offset and self._read is not None:
            before, types = self._read
            ids = torch.cat([before, ids], 1)
            whole = self.source(ids)
            self._check_rule(ids, whole)
            if not torch.equal(whole[:, :offset], types):
                raise ValueError(
                    f"token_types: the rule {self.source!r:.80} says of tokens of the prompt, once told of later ones, "
                    "that they are of other types, but they were read already; leave prefill_chunk_size out"
                )
            self._read, new = (ids, whole), whole[:, offset:]
        elif not offset:
            self._read = (ids, new)
        return new

    def _check_rule(self, ids: Tensor, types: Any) -> None:
        good = isinstance(types, Tensor) and not types.is_floating_point() and types.dtype != torch.bool
        if not good or types.shape != ids.shape:
            got = f"{types.dtype} {tuple(types.shape)}" if isinstance(types, Tensor) else type(types).__name__
            raise ValueError(
                f"token_types: the rule {self.source!r:.80} must give integers (B, N)={tuple(ids.shape)}, one type per "
                f"id; it gave {got}"
            )
        if types.numel() and not types.is_meta and not 0 <= int(types.min()) <= int(types.max()) < len(NAMES):
            raise ValueError(
                f"token_types: the rule {self.source!r:.80} gave types from {int(types.min())} to {int(types.max())}; "
                f"possible: {dict(enumerate(NAMES))}"
            )

    def _padding(self, mask: Any, offset: int, count: int) -> Tensor | None:
        """(B, offset + count) boolean, slots that are padding, from the mask that the model itself was given."""
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        total = offset + count
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= total:
            self._padded = mask[:, :total] == 0
        elif offset == 0:
            self._padded = None
            if isinstance(mask, Tensor) and mask.dim() == 4:
                # Every token that exists reads itself.
                allowed, _ = read_mask(mask)
                self._padded = ~allowed[..., :count, :total].any(-2).any(1)
        elif self._padded is not None:
            self._padded = F.pad(self._padded[:, :offset], (0, count), value=False)
        return self._padded

    @staticmethod
    def _wrong_rows(given: int, batch: int) -> str:
        return (
            f"token_types has {given} rows, the model got a batch of {batch}; give one row per row of the batch "
            "(beam search repeats each prompt num_beams times), or a rule on ids"
        )

    def upto(self, count: int, rows: int, device: torch.device) -> Tensor:
        """(B, count) types of the first slots; slots not seen yet are padding."""
        if self.types is None:
            raise ValueError("no token types yet: the attached model itself was not called, only a part of it")
        if self.types.shape[0] != rows:
            raise ValueError(self._wrong_rows(self.types.shape[0], rows))
        if self._asked is None or self._asked[0] is not self.types or self._asked[1:3] != (count, device):
            # All layers of a step ask for the same.
            types = self.types[:, :count].to(device)
            self._asked = self.types, count, device, F.pad(types, (0, count - types.shape[1]), value=PAD)
        return self._asked[3]
