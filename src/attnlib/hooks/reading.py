"""What a model reads: the tokens of one of its calls, for stages that look at tokens and not at attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """One call of a model that reads tokens.

    Args:
        ids: (B, N) tokens of this call, padding included; -1 for what stands in place of tokens that were removed.
        slots: (B, N) places of these tokens in the sequence, padding counted; -1 likewise.
        offset: tokens of the sequence before this call.
        phase: ``"prefill"`` or ``"decode"``.
        beams: rows of the batch that belong to one sample of the running ``generate()``.
        step: decoding step, 0 for the prompt, where it is known.
        pass_name, branch: of this call, see :class:`attnlib.hooks.Site`.
    """

    ids: Tensor
    slots: Tensor
    offset: int = 0
    phase: str = "prefill"
    beams: int = 1
    step: int | None = None
    pass_name: str | None = None
    branch: str | None = None

    def but(self, **fields: Any) -> Reading:
        """The same with other fields."""
        return replace(self, **fields)

    def __repr__(self) -> str:
        return f"Reading({tuple(self.ids.shape)} after {self.offset}, {self.phase}, branch={self.branch})"
