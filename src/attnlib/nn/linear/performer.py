"""Performer: linear attention whose positive random features stand for the exponential of softmax attention.

Choromanski et al., 2021, "Rethinking Attention with Performers", arXiv 2009.14794 (FAVOR+). With m random directions
``w_r`` per head, at right angles in blocks of D, and ``x' = x / D^(1/4)``,

    ``phi(x)_r = m^(-1/2) (exp(w_r . x' - |x'|^2 / 2 - c) + eps)``,
    ``o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)``,

where ``c`` keeps the exponential in range: for queries it is the token's largest ``w_r . x'``, for keys the largest of
all tokens of a head, and up to ``eps`` it cancels. In causal order, where keys must not know later ones, ``c`` of keys
is 0: the exponent is at most ``|w_r|^2 / 2`` anyway.

Differs from the code of the Comprehensive Attention Benchmark (arXiv 2210.07661), after which it is modelled: causal
self-attention reads sums over earlier tokens, where theirs reads the own token alone and refuses to be causal;
directions are a buffer, which their state dict lacks, and stay as they are in training unless ``resample`` draws new
ones, not at right angles, in every call; the denominator is not cut at 0.1 (``compat="authors"``); tokens that do not
exist count neither in ``c`` nor in sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_int, check_real
from ...ops.feature_maps import random_directions
from ...ops.linear import linear_attention
from ...types import State, Traits, exactly, stats_dtype
from ..registry import register
from .projected import Projected

#: What the authors' code cuts denominators at.
LEAST = 0.1


@register("performer", "favor", "performer-attention")
class PerformerAttention(Projected):
    """Linear attention on positive random features.

    Args:
        dim, num_heads, context_dim, qkv_bias, proj_bias, add_bias_kv, add_zero_attn: as of
            :class:`attnlib.nn.linear.projected.Projected`; a causal one with more keys only reads a context.
        num_features: m, random directions per head.
        orthogonal: directions at right angles, in blocks of D.
        resample: draw new directions, not at right angles, in every call in training.
        causal: every token reads itself and earlier ones. With a context: reads all of it.
        eps: added to every exponential.
        chunk: tokens per chunk in causal order; changes speed, not the result.
        compat: ``"authors"``: denominators are at least 0.1.

    Shapes: x and y (B, N, C). Cost: O(N m D). The state is (H, m, D) and (H, m) numbers.

    >>> PerformerAttention(dim=16, num_heads=2, causal=True)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    source = "Performer"
    own_state = ("directions",)
    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
        weights=True,
    )

    directions: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_features: int = 64,
        orthogonal: bool = True,
        resample: bool = False,
        causal: bool = False,
        eps: float = 1e-4,
        chunk: int = 64,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        compat: str | None = None,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
    ):
        super().__init__(dim, num_heads, context_dim, qkv_bias, proj_bias, add_bias_kv, add_zero_attn)
        check_choice("compat", compat, (None, "authors"))
        self.num_features = check_int("num_features", num_features, least=1)
        self.orthogonal, self.resample = check_flag("orthogonal", orthogonal), check_flag("resample", resample)
        self.causal, self.compat = check_flag("causal", causal), compat
        self.eps, self.chunk = check_real("eps", eps, least=0), check_int("chunk", chunk, least=1)
        if causal and compat is not None:
            raise ValueError("compat='authors' is not possible with causal=True: theirs is not causal")
        self.register_buffer("directions", self._drawn())

    @property
    def traits(self) -> Traits:
        patterns = self._patterns()
        return self.class_traits.but(
            patterns=patterns, streaming="causal-self" in patterns, permutation_equivariant=not self.causal
        )

    def _drawn(self, generator: torch.Generator | None = None) -> Tensor:
        """(H, m, D)."""
        return torch.stack(
            [
                random_directions(self.num_features, self.head_dim, self.orthogonal, generator)
                for _ in range(self.num_heads)
            ]
        )

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New random directions."""
        self.directions.copy_(self._drawn(generator))

    def features(self, x: Tensor, directions: Tensor, largest: str, valid: Tensor | None = None) -> Tensor:
        """(B, H, N, D) -> (B, H, N, m).

        Args:
            x: queries or keys.
            directions: (H, m, D).
            largest: what ``c`` is: of each ``"token"``, of ``"all"``, or ``"none"``.
            valid: (B, N) boolean, which tokens exist.
        """
        x = x * self.head_dim**-0.25
        z = x @ directions.mT
        top = z if valid is None else z.masked_fill(~valid[:, None, :, None], -torch.inf)
        below = x.square().sum(-1, keepdim=True) / 2
        if largest == "token":
            below = below + z.amax(-1, keepdim=True)
        elif largest == "all":
            most = top.amax((-1, -2), keepdim=True)
            below = below + most.masked_fill(most.isneginf(), 0.0)  # nobody is there
        return self.num_features**-0.5 * ((z - below).exp() + self.eps)

    def mix_heads(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, ordered: bool, state: State | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        with exactly(q):
            high = stats_dtype(q.dtype)
            directions = self.directions.to(high)
            if self.training and self.resample:
                directions = torch.randn_like(directions)
            f_q = self.features(q.to(high), directions, "token")
            f_k = self.features(k.to(high), directions, "none" if ordered else "all", valid)
            weights = None
            if self.compat is not None:
                num, final = linear_attention(f_q, f_k, v.to(high), causal=False, valid=valid, return_state=True)
                kept = f_k if valid is None else f_k * valid[:, None, :, None]
                least = (f_q @ kept.sum(2).unsqueeze(-1)).clamp(min=LEAST)
                out = num / least
            else:
                least = None
                out, final = linear_attention(
                    f_q, f_k, v.to(high), normalizer="sum", causal=ordered, valid=valid, state=state, chunk=self.chunk,
                    return_state=True,
                )  # fmt: skip
            if wanted:
                weights = f_q @ f_k.mT
                if valid is not None:
                    weights = weights * valid[:, None, None]
                weights = weights.tril() if ordered else weights
                total = weights.sum(-1, keepdim=True) if least is None else least
                weights = weights / total.masked_fill(total == 0, 1.0)
        return out.to(v.dtype), weights, dict(final.tensors)

    @classmethod
    def _more_rules(cls) -> dict[str, Any]:
        return {r"directions|eval_proj": "directions", **cls._more_keys()}
