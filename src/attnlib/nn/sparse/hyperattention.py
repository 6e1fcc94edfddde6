"""HyperAttention: sorted hashes find the large weights, a sample of the keys stands for the small ones.

Han et al., 2023, "HyperAttention: Long-context Attention in Near-Linear Time", arXiv 2310.05869. With the signs along
``p`` random directions as a word, ranked in Gray order so that neighbouring buckets differ in one sign, queries and
keys are sorted by bucket; a query reads the ``b`` sorted keys of its block exactly, and the others through ``s`` of
them drawn with replacement, whose weights count ``M / s`` times and which leave out the own block. Causal attention
halves until ``min_seq_len``, below which all is exact (:func:`attnlib.ops.hyper.hyper_attention`).

Differs from the authors' code: parts are merged as parts of a softmax, where theirs adds an epsilon inside of a
logarithm; where the block does not divide the keys, nobody reads the padding, which theirs reads as keys of zeros; keys
of the own block never count twice, as they do in theirs in float32 and with flash attention (a mask is made for them
and not used). ``compat="authors"`` does as theirs in all three. In their causal form a query's block is its rank among
the queries of its half, so that later tokens decide which earlier keys are read exactly; here it is found by the
query's own hash, unless ``strict=False``, which then is no claim to be causal. The sample is the same in every call
(``fresh=True``: drawn anew, as theirs), and may be drawn again by :meth:`HyperAttention.redraw`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_int
from ...ops.hyper import COMPAT, DRAWS, FINE, hyper_attention, hyper_codes
from ...types import Plan, Traits, Wanted
from ..dense.softmax_attention import SoftmaxAttention
from ..frame import HeadCall, HeadFrame, Notes
from ..registry import register


@register("hyperattention", "hyper-attention")
class HyperAttention(HeadFrame[Notes]):
    """Softmax attention of long sequences: blocks of sorted keys exactly, the others through a sample.

    Args:
        dim: width of ``x``.
        num_heads: query heads.
        num_projs: directions of the hash; 0 sorts nothing.
        block_size: sorted keys that a query reads exactly.
        sample_size: keys that stand for all others; 0 leaves them out.
        min_seq_len: sequences up to this length are read exactly.
        causal: every token reads itself and earlier ones.
        strict: a causal query's block is found by its own hash alone; by default, unless ``compat`` says otherwise.
        fresh: draw the sample anew in every call, from torch's global generator.
        compat: ``"authors"``, see above.
        settings: ``num_kv_heads``, ``head_dim``, ``context_dim``, ``qkv_bias``, ``proj_bias``, ``qk_norm``, ``rotary``,
            ``rotary_interleaved``, ``rotary_dim``, ``rotary_scaling``, ``scale``, ``proj_drop`` of
            :class:`attnlib.nn.frame.HeadFrame`.

    Reference: Han et al., 2023, arXiv 2310.05869.

    >>> HyperAttention(dim=16, num_heads=2, block_size=8, sample_size=4, min_seq_len=8)(torch.randn(2, 40, 16)).shape
    torch.Size([2, 40, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self", "noncausal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        layout=True,
        work={"N": 1},
        memory={"N": 1},
        gradient="stopped",
        needs_plan=True,
    )
    own_state = ("directions", "draws")
    zero_is_off: ClassVar[tuple[str, ...]] = ("num_projs",)

    directions: Tensor
    draws: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_projs: int = 7,
        block_size: int = 256,
        sample_size: int = 256,
        min_seq_len: int = 4096,
        causal: bool = False,
        strict: bool | None = None,
        fresh: bool = False,
        compat: str | None = None,
        **settings: Any,
    ):
        for name in ("alibi", "attn_drop", "normalizer"):
            if name in settings:
                raise ValueError(f"{name} is not possible: weights are never there as a whole; leave it out")
        super().__init__(dim, num_heads, causal=causal, **settings)
        self.reads_length = True  # halves and blocks lie where the slots are
        check_choice("compat", compat, COMPAT)
        self.num_projs = check_int("num_projs", num_projs, least=0, most=20)
        self.block_size = check_int("block_size", block_size, least=1)
        self.sample_size = check_int("sample_size", sample_size, least=0)
        self.min_seq_len = check_int("min_seq_len", min_seq_len, least=1)
        self.compat, self.fresh = compat, check_flag("fresh", fresh)
        self.strict = (causal and compat is None) if strict is None else check_flag("strict", strict)
        if self.strict and compat is not None:
            raise ValueError(f"strict=True is not what the authors' code does; compat={compat!r} needs strict=False")
        self.register_buffer("directions", torch.randn(self.head_dim, num_projs))
        self.register_buffer("draws", torch.randint(DRAWS, (num_heads, sample_size)))

    @property
    def traits(self) -> Traits:
        made = super().traits
        patterns = made.patterns & self.class_traits.patterns
        if self.causal:
            patterns = frozenset({"causal-self"} if self.strict else {"noncausal-self"})
        return made.but(patterns=patterns, streaming=False, permutation_equivariant=False)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw directions and sample again."""
        self.directions.copy_(torch.randn(self.directions.shape, generator=generator))
        self.draws.copy_(torch.randint(DRAWS, self.draws.shape, generator=generator))

    def make_plan(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Plan:  # type: ignore[override]
        made = self._choice("hash", x, context, valid=valid)
        return Plan("hash", made, (("N", made["q"].shape[2]), ("M", made["k"].shape[2])))

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Tensor:
        plan = notes.plan
        codes = None
        if isinstance(plan, Wanted):
            for name, code in zip("qk", hyper_codes(q, k, self.directions, self.strict), strict=True):
                plan.tensors[name] = code // FINE if self.strict else code
                if self.strict:
                    plan.tensors[f"{name}_step"] = code % FINE
        elif plan is not None:
            plan.expect("hash", N=q.shape[2], M=k.shape[2])
            codes = (self._code(plan, "q", q), self._code(plan, "k", k))
        out: Tensor = hyper_attention(
            q, k, v, self.directions, None if self.fresh else self.draws, block_size=self.block_size,
            sample_size=self.sample_size, min_seq_len=self.min_seq_len, causal=call.mask is not None,
            valid=call.valid, scale=self.scale, codes=codes, strict=self.strict, compat=self.compat,
        )  # fmt: skip
        return out

    def _code(self, plan: Plan, name: str, x: Tensor) -> Tensor:
        shape = (x.shape[0], self.num_heads, x.shape[2])
        bucket = plan.choices(name, shape, 2**self.num_projs, "bucket")
        return bucket * FINE + plan.choices(f"{name}_step", shape, FINE, "step") if self.strict else bucket

    convert_state_dict = staticmethod(SoftmaxAttention.convert_state_dict)
