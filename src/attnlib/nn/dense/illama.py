"""Attention of a LLaMA decoder made into a vision transformer (Wang et al., 2024): causal masks that harden softly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import masks
from ...checks import readable
from ...ops import eager
from ...ops._call import prepare
from ...ops.attention import attention_partial
from ...types import Traits, check_choice, exactly, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes
from ..registry import register
from ..released import Released, Rule

#: Below so many pairs one dense map is faster than two streamed halves.
DENSE_PAIRS = 1 << 20
_PAST, _LATER = masks.causal(), ~masks.causal()


def select_weights(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A smaller weight from a larger one: evenly spaced elements along every axis ("weight selection").

    Args:
        weight: the teacher's weight.
        shape: of the student's weight, nowhere larger.

    Raises:
        ValueError: another number of axes, or an axis longer than the teacher's.

    >>> select_weights(torch.arange(12).view(2, 6), (1, 3)).tolist()
    [[0, 2, 4]]
    """
    if weight.dim() != len(shape):
        raise ValueError(f"weight has the shape {tuple(weight.shape)}, which cannot become {tuple(shape)}")
    for axis, (have, want) in enumerate(zip(weight.shape, shape, strict=True)):
        if want > have:
            raise ValueError(f"axis {axis} of the weight has {have} entries, fewer than the {want} to select")
        if have % want == 0:
            index = torch.arange(want, device=weight.device) * (have // want)
        else:
            index = torch.linspace(0, have - 1, want, device=weight.device).round().long()
        weight = weight.index_select(axis, index)
    return weight


@register("illama")
class SoftMaskedAttention(HeadFrame[Notes]):
    """Softmax attention under a mask that goes from bidirectional to causal in training.

    ``M = r 1 + (1 - r) tril(1)``, where the soft mask rate ``r`` is a buffer that only :meth:`set_progress` changes.
    ``mask_mode="post"``, the authors' code: ``y = (softmax(q k^T / sqrt(D)) * M) v``. The denominator still sees later
    tokens, so this is *not* causal, even for ``r = 0``, and rows do not sum to one. ``mask_mode="pre"``: ``M``
    weighs the exponentials before they are normalised; ``r = 0`` is causal attention, with a cache.

    Tokens count in raster order, class token last: under a causal mask only the last token sees all others.

    Args:
        dim, num_heads, qkv_bias, ...: as in :class:`HeadFrame`.
        mask_mode: ``"post"`` or ``"pre"``.
        soft_rate: ``r`` at the start of training. Before the first :meth:`set_progress`, ``r`` is 0.
        cutoff: the fraction of training after which ``r`` is 0 (the authors: 50 of 300 epochs).
        schedule: until then ``r`` stays ``"constant"`` or falls in a ``"linear"`` way.
        rotary: base of rotary positions, over neighbouring channels.

    What differs from the authors' code: nothing is materialised for long inputs (the two triangles are computed apart
    and merged); ``"pre"`` is ours.

    Reference: Wang et al., 2024, arXiv 2404.06773, sections 3.2 to 3.4.

    >>> m = SoftMaskedAttention(dim=16, num_heads=2)
    >>> m.set_progress(0.0)
    >>> m(torch.randn(1, 5, 16)).shape, float(m.rate)
    (torch.Size([1, 5, 16]), 1.0)
    """

    rate: Tensor
    own_state = ("rate",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        mask_mode: str = "post",
        soft_rate: float = 1.0,
        cutoff: float = 1 / 6,
        schedule: str = "constant",
        rotary: float | None = 10000.0,
        rotary_interleaved: bool = True,
        **settings: Any,
    ):
        for name in ("causal", "attn_drop", "normalizer", "context_dim"):
            if settings.get(name):
                raise ValueError(f"{name}={settings[name]!r} is not possible; this is softmax self-attention under M")
        check_choice("mask_mode", mask_mode, ("post", "pre"))
        check_choice("schedule", schedule, ("constant", "linear"))
        for name, value in (("soft_rate", soft_rate), ("cutoff", cutoff)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value} must lie in [0, 1]")
        super().__init__(dim, num_heads, rotary=rotary, rotary_interleaved=rotary_interleaved, **settings)
        self.mask_mode, self.soft_rate, self.cutoff, self.schedule = mask_mode, soft_rate, cutoff, schedule
        self.register_buffer("rate", torch.zeros(()))
        self._harden()

    def _harden(self) -> None:
        """Set ``causal``, which the base class goes by: whether the mask is hard decides how to compute.

        The buffer is asked each time, for it may have been loaded in whatever way; a trace keeps what it began with.
        """
        if self.mask_mode == "pre" and not torch.compiler.is_compiling():
            if torch._C._functorch.is_functorch_wrapped_tensor(self.rate) and not readable(self.rate):
                raise ValueError("illama: its buffer rate decides how to compute, so vmap cannot go over it (in_dims)")
            self.causal = self.rate.is_meta or float(self.rate) == 0.0

    @property
    def traits(self) -> Traits:
        self._harden()
        traits = super().traits
        return traits.but(
            patterns=frozenset({"causal-self" if self.causal else "noncausal-self"}),
            grid_ranks=frozenset({1}) if self.mask_mode == "pre" else self.class_traits.grid_ranks,
            permutation_equivariant=False,
        )

    def rate_at(self, progress: float) -> float:
        """``r`` when this fraction of training is done."""
        if progress >= self.cutoff:
            return 0.0
        return self.soft_rate * (1.0 if self.schedule == "constant" else 1.0 - progress / self.cutoff)

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        self.rate.fill_(self.rate_at(progress))
        self._harden()

    # ---- attention

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        if self.causal:
            return super()._mix_heads(q, k, v, call, notes)
        seen_by: dict[str, Any] = dict(
            mask=call.mask, valid=call.valid, q_pos=call.q_pos, bias=call.bias, scale=self.scale
        )
        if call.return_weights or (not torch.compiler.is_compiling() and q.shape[2] * k.shape[2] < DENSE_PAIRS):
            out, weights = self._dense(q, k, v, **seen_by)
            return (out, weights) if call.return_weights else out
        past, later = _PAST, _LATER
        if call.mask is not None:
            past, later = past & call.mask, later & call.mask
        seen = attention_partial(q, k, v, **{**seen_by, "mask": past})
        rest = attention_partial(q, k, v, **{**seen_by, "mask": later})
        rate = self.rate.to(rest.num.dtype)
        rest = rest._replace(num=rest.num * rate) if self.mask_mode == "post" else rest.shift(rate.log())
        return seen.merge(rest).finish().to(q.dtype)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **call: Any) -> tuple[Tensor, Tensor]:
        dtype = stats_dtype(q.dtype)
        asked = prepare(q, k, v, scale=1.0, **call)
        with exactly(q):
            # The scale goes to the queries, which are fewer numbers than the scores.
            scores = eager.scores(replace(asked, q=asked.q.to(dtype) * scale))
            whole = asked.mask is None and asked.valid is None and asked.bias is None
            weights = scores.softmax(-1) if whole else asked.normalizer.weights(scores)
            rate = self.rate.to(dtype)
            m = rate + (1 - rate) * torch.ones(weights.shape[-2:], dtype=dtype, device=q.device).tril()
            # Another map is another third of the memory; autograd needs the first one, evaluation does not.
            weights = weights * m if torch.is_grad_enabled() else weights.mul_(m)
            if self.mask_mode == "pre":
                weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
            return (weights @ asked.expanded()[1].to(dtype)).to(q.dtype), weights

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention``, or their whole ``VisionTransformer`` for ``attnlib.models.illama``."""
        theirs = Released(state_dict, "the authors' Attention or VisionTransformer")
        block = r"((?:blocks\.\d+\.attn\.)?)"
        rules: dict[str, Rule] = {
            rf"{block}qkv\.(weight|bias)": lambda match, value: {
                f"{match[1]}{name}.{match[2]}": part for name, part in zip("qkv", value.chunk(3), strict=True)
            },
            rf"{block}proj\.(weight|bias)": r"\1proj.\2",
            r"(blocks\.\d+\.(?:norm[12]|mlp\.\w+)\.(?:weight|bias))": r"\1",
            r"patch_embed\.proj\.(weight|bias)": r"patch_embed.\1",
            r"(cls_token|pos_embed|(?:norm|head)\.(?:weight|bias))": r"\1",
        }
        return theirs.close(theirs.renamed(rules))
