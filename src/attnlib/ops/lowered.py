"""Mask, bias, normalizer and positions of a problem as tensors, numbers and strings: what may enter a custom operator.

Every engine with an operator of its own takes a :class:`Lowered` behind ``q, k, v`` and raises from it what it needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..masks import Mask, raise_mask
from ..normalizers import Normalizer, raise_normalizer
from ..positions import Bias, raise_bias
from ._call import AttentionCall

#: The fields of :class:`Lowered` in the schema of an operator.
SCHEMA = (
    "Tensor? valid, Tensor? q_pos, Tensor? k_pos, Tensor[] mask_tensors, Tensor[] bias_tensors, str mask, str bias, "
    "str normalizer, float scale"
)


class Lowered(NamedTuple):
    """What decides weights beside queries and keys.

    Args:
        valid: (B, M) which keys exist.
        q_pos, k_pos: positions that the mask sees.
        mask_tensors, bias_tensors: what the text forms refer to.
        mask, bias: text forms, empty for none.
        normalizer: its text form.
        scale: of the scores.
    """

    valid: Tensor | None
    q_pos: Tensor | None
    k_pos: Tensor | None
    mask_tensors: list[Any]
    bias_tensors: list[Any]
    mask: str
    bias: str
    normalizer: str
    scale: float

    def raise_mask(self) -> Mask | None:
        return raise_mask(self.mask, self.mask_tensors) if self.mask else None

    def raise_bias(self) -> Bias | None:
        return raise_bias(self.bias, self.bias_tensors) if self.bias else None

    def raise_normalizer(self) -> Normalizer:
        return raise_normalizer(self.normalizer)

    @property
    def pair_tensors(self) -> list[Tensor]:
        """The tensors that decide which pairs may meet."""
        return [t for t in (*self.mask_tensors, self.valid, self.q_pos, self.k_pos) if t is not None]

    @property
    def saved(self) -> list[Tensor | None]:
        """All tensors in a row, for ``save_for_backward``; :meth:`restored` puts them back."""
        return [self.valid, self.q_pos, self.k_pos, *self.mask_tensors, *self.bias_tensors]

    def restored(self, saved: list[Tensor | None]) -> Lowered:
        """This value with the tensors of :attr:`saved`, which need not be held here meanwhile (:meth:`bare`)."""
        valid, q_pos, k_pos, *rest = saved
        masks = len(self.mask_tensors)
        return self._replace(
            valid=valid, q_pos=q_pos, k_pos=k_pos, mask_tensors=rest[:masks], bias_tensors=rest[masks:]
        )

    def bare(self) -> Lowered:
        """The same without tensors, only their number."""
        return self._replace(
            valid=None, q_pos=None, k_pos=None, mask_tensors=[None] * len(self.mask_tensors),
            bias_tensors=[None] * len(self.bias_tensors),
        )  # fmt: skip


def lower(call: AttentionCall) -> Lowered:
    """The lowered form of a checked call."""
    mask, mask_tensors = ("", []) if call.mask is None else call.mask.lower()
    bias, bias_tensors = ("", []) if call.bias is None else call.bias.lower()
    return Lowered(
        call.valid, call.q_pos, call.k_pos, mask_tensors, bias_tensors, mask, bias, call.normalizer.lower(), call.scale
    )
