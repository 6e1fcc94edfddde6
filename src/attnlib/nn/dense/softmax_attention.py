"""Multi-head softmax attention with grouped queries: the baseline that everything is compared to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ... import masks
from ...normalizers import Normalizer, as_normalizer
from ...ops import attention
from ...positions import Bias, rotary_angles, rotate
from ...positions import alibi as alibi_bias
from ...types import Output, Plan, State, Traits, check_divides
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import PLAIN, Released


@register("softmax-attention", "mha", "gqa", "mqa")
class SoftmaxAttention(Mechanism):
    """Multi-head attention with separate numbers of query and key/value heads.

    ``o_h = softmax(q_h k_g(h)^T / sqrt(D)) v_g(h)``, ``y = [o_1 .. o_H] W_O``, where ``g`` maps neighbouring query
    heads to one key/value head. Works on sequences, images and videos (all tokens of the grid are flattened), as
    self- and cross-attention, causal or not, with any mask, and decodes with a key/value cache that keeps the validity
    of each token, so that left-padded batches decode right.

    Args:
        dim: width of ``x``.
        num_heads: query heads.
        num_kv_heads: key/value heads; must divide ``num_heads``. Defaults to ``num_heads``.
        head_dim: width of a head; ``dim / num_heads`` by default.
        context_dim: width of ``context``; ``dim`` by default.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        qk_norm: LayerNorm of every head of the queries and of the keys.
        causal: every token reads itself and earlier ones. With a context: reads all of it.
        rotary: rotary positions with this base; ``None`` for none. Positions count valid tokens only.
        rotary_interleaved: rotate neighbouring channels instead of the two halves.
        alibi: linear distance penalties, one slope per head.
        attn_drop: dropout of attention weights in training.
        normalizer: how scores become weights; see :mod:`attnlib.normalizers`.

    Reference: Vaswani et al., 2017, arXiv 1706.03762; Ainslie et al., 2023, arXiv 2305.13245 (grouped queries).

    >>> import torch
    >>> SoftmaxAttention(dim=16, num_heads=4, num_kv_heads=2)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        mask=True,
        layout=True,
        streaming=True,
        work={"N": 2},
        memory={"N": 1},
        permutation_equivariant=True,
        weights=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        causal: bool = False,
        rotary: float | None = None,
        rotary_interleaved: bool = False,
        alibi: bool = False,
        attn_drop: float = 0.0,
        normalizer: str | Normalizer = "softmax",
    ):
        super().__init__(dim, context_dim)
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        check_divides("num_kv_heads", self.num_kv_heads, "num_heads", num_heads)
        self.num_v_heads = self.num_kv_heads
        self.causal, self.rotary, self.rotary_interleaved = causal, rotary, rotary_interleaved
        self.alibi, self.attn_drop = alibi, attn_drop
        self.normalizer = as_normalizer(normalizer)
        self.scale = self.head_dim**-0.5
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(self.context_dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(self.context_dim, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)

    @property
    def traits(self) -> Traits:
        patterns = {"causal-self", "causal-cross"} if self.causal else {"noncausal-self", "noncausal-cross"}
        positional = self.rotary is not None or self.alibi
        if positional:
            patterns = {p for p in patterns if p.endswith("self")}
        if self.context_dim != self.dim:
            patterns = {p for p in patterns if p.endswith("cross")}
        return self.class_traits.but(
            patterns=frozenset(patterns),
            grid_ranks=frozenset({1}) if self.causal else self.class_traits.grid_ranks,
            streaming=self.causal and "causal-self" in patterns,
            permutation_equivariant=not self.causal and not positional,
        )

    # ---- what a relative of this mechanism changes

    def _begin(self, x: Tensor, q: Tensor, **call: Any) -> dict[str, Any]:
        """Whatever the hooks below share in one call: gates, routes; ``q`` (B, H, N, D) is not rotated yet.

        ``shared["losses"]`` is returned and ``shared["state"]`` joins the state; a later hook may set them.
        """
        return {}

    def _rotate(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary positions of the new tokens; the keys go to the cache afterwards."""
        return rotate(q, angles, self.rotary_interleaved), rotate(k, angles, self.rotary_interleaved)

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, shared: dict[str, Any], **call: Any) -> Any:
        """The operator on heads."""
        return attention(q, k, v, scale=self.scale, normalizer=self.normalizer, **call)

    def _gate(self, out: Tensor, shared: dict[str, Any]) -> Tensor:
        """(B, H, N, D) head outputs, before the output projection."""
        return out

    def _project(self, out: Tensor, shared: dict[str, Any], grid: torch.Size) -> Tensor:
        """The output projection: (B, H, N, D) to (B, *grid, C)."""
        return self.proj(merge_heads(out, grid))

    def mix(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: masks.Mask | None = None,
        plan: Plan | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
        **_: Any,
    ) -> Output:
        grid, source = x.shape[1:-1], x if context is None else context
        q, k, v = (
            self.q_norm(split_heads(self.q(x), self.num_heads)),
            self.k_norm(split_heads(self.k(source), self.num_kv_heads)),
            split_heads(self.v(source), self.num_v_heads),
        )
        tokens, own_valid = x.flatten(1, -2), flat_valid(valid)
        shared = self._begin(tokens, q, valid=own_valid, plan=plan, state=state, returns=returns)
        exists = own_valid if context is None else flat_valid(context_valid)
        causal_self = self.causal and context is None
        streaming = causal_self and (state is not None or "state" in returns)
        if self.rotary is not None or streaming:
            now = torch.ones(x.shape[0], q.shape[2], dtype=torch.bool, device=x.device) if exists is None else exists
            past = now.new_zeros(now.shape[0]).long() if state is None else state["tokens"]
        if self.rotary is not None:
            at = past[:, None] + now.long().cumsum(1) - 1
            # Without padding and past every sample stands at the same positions.
            at = at[:1] if exists is None and state is None else at
            angles = rotary_angles(at, self.head_dim, self.rotary)
            q, k = self._rotate(q, k, angles)
        new_state, start = None, 0
        if streaming:
            exists = now
            if state is not None:
                start = state["k"].shape[2]
                k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
                exists = torch.cat([state["valid"], now], 1)
            new_state = State({"k": k, "v": v, "valid": exists, "tokens": past + now.long().sum(1)})
        if causal_self:
            mask = masks.causal() if mask is None else masks.causal() & mask
        q_pos = torch.arange(start, start + q.shape[2], device=x.device) if start else None
        bias: Bias | None = None
        if self.alibi:
            reach = torch.arange(k.shape[2], device=x.device)
            far = k.shape[2] - 1
            bias = alibi_bias(self.num_heads, reach[start:], reach, span=(-far, far - start))
        call = dict(
            mask=mask, valid=exists, q_pos=q_pos, bias=bias, dropout_p=self.attn_drop if self.training else 0.0
        )  # fmt: skip
        weights = None
        if "weights" in returns:
            out, weights = self._mix_heads(q, k, v, shared, return_weights=True, **call)
        else:
            out = self._mix_heads(q, k, v, shared, **call)
        if new_state is not None:
            new_state = new_state.replace(**shared.get("state", {}))
        y = self._project(self._gate(out, shared), shared, grid)
        return Output(y, state=new_state, weights=weights, losses=shared.get("losses"))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``torch.nn.MultiheadAttention``, timm's ``Attention`` (``qkv.*``), or a module of this one's names."""
        theirs = Released(state_dict, "MultiheadAttention or timm's Attention")
        return theirs.close(theirs.renamed(PLAIN))
