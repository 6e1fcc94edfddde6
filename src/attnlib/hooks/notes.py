"""What a session remembers of the sequence that a branch reads, between calls of the model."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Notes:
    """Notes of one branch; a new prompt begins them anew.

    What an adapter knows of the sequence has a field; what an intervention wants to keep of it goes under a key of its
    own choice, ``notes["mine"] = ...``.

    Args:
        prompt: the named arguments with which the model read the prompt, without its cache.
        beams: beams of the running ``generate()``.
        prompt_length: tokens of the prompt, where ``generate()`` or the user said so before it is read.
        length: tokens of the prompt as far as they are known; ``None`` before any.
        total: tokens read so far.
        read: what the last call without a cache read.
        ids: (B, L) tokens that ``on_logits`` was last asked about.
        last_ids: the same, one step before.
        kept: by layer, what is left of a prompt out of which tokens were removed.
        begun: the sequence began in this session, with an empty cache.
        chunks: by layer, what was computed of a prompt that is read in several calls.
    """

    prompt: dict[str, Any] | None = None
    beams: int = 1
    prompt_length: int | None = None
    length: int | None = None
    total: int = 0
    read: Tensor | None = None
    ids: Tensor | None = None
    last_ids: Tensor | None = None
    kept: dict[int, Any] = field(default_factory=dict)
    begun: bool = False
    chunks: dict[int, list[Any]] = field(default_factory=dict)
    _own: dict[Hashable, Any] = field(default_factory=dict)

    def begin(self, prompt_length: int | None = None, beams: int = 1) -> None:
        """Forget everything: a sequence begins, with an empty cache."""
        self.__dict__.update(Notes(beams=beams, prompt_length=prompt_length, begun=True).__dict__)

    def __getitem__(self, key: Hashable) -> Any:
        return self._own[key]

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self._own[key] = value

    def __contains__(self, key: Hashable) -> bool:
        return key in self._own

    def get(self, key: Hashable, default: Any = None) -> Any:
        """What an intervention kept under ``key``."""
        return self._own.get(key, default)

    def pop(self, key: Hashable, default: Any = None) -> Any:
        """The same, forgotten."""
        return self._own.pop(key, default)

    def reading_prompt(self, offset: int) -> bool:
        """Whether a call after ``offset`` tokens still reads the prompt of this sequence."""
        return offset == 0 or (self.prompt_length is not None and self.begun and offset < self.prompt_length)
