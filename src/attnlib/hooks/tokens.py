"""Types of tokens: which positions of a prompt are image, text or padding, per sample, extended while decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Types of tokens. The first three are those of LACING's attention mask.
PAD, TEXT, IMAGE, SYSTEM, QUESTION, GENERATED = range(6)

NAMES = ("pad", "text", "image", "system", "question", "generated")


def is_text(types: Tensor) -> Tensor:
    """Boolean: neither padding nor image."""
    return (types != PAD) & (types != IMAGE)


class TokenTypes:
    """Types from token ids: the rule to give to ``attach(..., token_types=...)``.

    Args:
        image: id, or ids, of the image placeholder, one per image token as transformers' processors write them.
        pad: id of the padding token, where padding is not told by an attention mask.

    >>> import torch
    >>> TokenTypes(image=9)(torch.tensor([[1, 9, 9, 4]])).tolist()
    [[1, 2, 2, 1]]
    """

    def __init__(self, image: int | Sequence[int], pad: int | None = None):
        self.image = (image,) if isinstance(image, int) else tuple(image)
        if not self.image:
            raise ValueError("image must name at least one token id")
        self.pad = pad

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, N) ids -> (B, N) types."""
        types = torch.full_like(ids, TEXT)
        types[torch.isin(ids, torch.tensor(self.image, device=ids.device, dtype=ids.dtype))] = IMAGE
        if self.pad is not None:
            types[ids == self.pad] = PAD
        return types


class TypeTracker:
    """Keeps the (B, L) types of all tokens seen, call after call of one model.

    Args:
        source: (B, N) types of the prompt, or a rule from ids to types.
    """

    def __init__(self, source: Tensor | Callable[[Tensor], Tensor]):
        if isinstance(source, Tensor):
            if source.dim() != 2 or source.is_floating_point() or source.dtype == torch.bool:
                raise ValueError(
                    f"token_types must be (B, N) integers of {dict(enumerate(NAMES))}, got {source.dtype} "
                    f"{tuple(source.shape)}"
                )
            if source.numel() and not 0 <= int(source.min()) <= int(source.max()) < len(NAMES):
                raise ValueError(f"token_types must lie between 0 and {len(NAMES) - 1}: {dict(enumerate(NAMES))}")
        elif not callable(source):
            raise TypeError(f"token_types must be a (B, N) tensor or a rule from ids to types, got {source!r}")
        self.source = source
        self.types: Tensor | None = None
        self._padded: Tensor | None = None

    def advance(self, ids: Tensor | None, offset: int, count: int, attention_mask: Any) -> None:
        """The model is about to read ``count`` tokens after ``offset`` others."""
        total = offset + count
        if isinstance(self.source, Tensor):
            types = F.pad(self.source[:, :total], (0, max(0, total - self.source.shape[1])), value=GENERATED)
        else:
            if ids is None:
                raise ValueError(
                    "token_types is a rule on ids, but the model was called without input_ids; "
                    "give a (B, N) tensor of types instead"
                )
            new = self.source(ids)
            if offset and count == 1:
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
                allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
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
        types = self.types[:, :count].to(device)
        return F.pad(types, (0, count - types.shape[1]), value=PAD)
