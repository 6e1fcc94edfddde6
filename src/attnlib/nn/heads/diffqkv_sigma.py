"""DiffQKV attention of Sigma (Lin et al., 2025): queries, keys and values each with their own heads and widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...masks import Mask
from ...ops import attention
from ...positions import rotary_angles
from ...types import Plan, State, Traits, Wanted, check_choice, check_divides
from ..frame import HeadCall, HeadFrame, Notes
from ..layers import head_norm
from ..registry import register

ACTIVATIONS: dict[str, type[nn.Module] | None] = {"none": None, "silu": nn.SiLU, "gelu": nn.GELU}


@register("diffqkv-sigma", "diffqkv")
class DiffQKVAttention(HeadFrame[Notes]):
    """Keys compressed hard, values lightly, queries enlarged: the cache holds ``n_k d_k + n_v d_v`` numbers per token.

    ``o_i = softmax(q_i k_g(i)^T / sqrt(D)) v_u(i)``, ``g(i) = floor(i n_k / n_q)``, ``u(i) = floor(i n_v / n_q)``, with
    optional parts::

        narrow keys        the cache keeps d_k < D channels; a learned map brings them to D before the product
        augmented query    q = W_2 f(W_1 x), through q_hidden channels; queries are not cached, so their width is free
        selective fetch    o_i sums only the v_keep values with the largest weights; the others count as 0,
                           without normalising again

    Args:
        dim, num_heads, ...: as in :class:`HeadFrame`, ``head_dim`` being that of queries and values.
        num_k_heads, num_v_heads: key and value heads, which divide ``num_heads``; ``num_heads`` by default.
        k_head_dim: ``d_k``; ``head_dim`` by default, which needs no map.
        q_hidden: total inner width of the augmented query; ``None`` for one matrix.
        q_activation: ``f``: ``"none"``, ``"silu"`` or ``"gelu"``.
        v_keep: values fetched per query and head; ``None`` for all. Which ones is a plan: slots, counted from
            the start of the cache.

    What the paper leaves open: whether the augmented query has a nonlinearity (``q_activation``; with none, the 1.5B
    model has 1.49e9 parameters beside its embeddings), how the key map is shared (one map for all heads here), and
    where rotary positions go with narrow keys: here behind the map, so that scores depend on relative positions; the
    cache then holds keys without positions.

    Reference: Lin et al., 2025, arXiv 2501.13629.

    >>> m = DiffQKVAttention(dim=32, num_heads=8, num_k_heads=1, num_v_heads=4, q_hidden=48)
    >>> m(torch.randn(2, 5, 32)).shape, m.cache_size
    (torch.Size([2, 5, 32]), 20)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_k_heads: int | None = None,
        num_v_heads: int | None = None,
        *,
        head_dim: int | None = None,
        k_head_dim: int | None = None,
        q_hidden: int | None = None,
        q_activation: str = "none",
        v_keep: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool | str = False,
        **settings: Any,
    ):
        if "num_kv_heads" in settings:
            raise ValueError("num_kv_heads is two numbers here: num_k_heads and num_v_heads")
        heads = {"num_k_heads": num_k_heads, "num_v_heads": num_v_heads}
        for name, value in heads.items():
            if value is not None:
                check_divides(name, value, "num_heads", num_heads)
        check_choice("q_activation", q_activation, ACTIVATIONS)
        for name, value in (("k_head_dim", k_head_dim), ("q_hidden", q_hidden), ("v_keep", v_keep)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        super().__init__(dim, num_heads, num_k_heads, head_dim=head_dim, qkv_bias=qkv_bias, qk_norm=qk_norm, **settings)
        if v_keep is not None and self.attn_drop:
            raise ValueError(f"attn_drop={self.attn_drop} is not possible with v_keep={v_keep}")
        self.num_k_heads = self.num_kv_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.k_head_dim = self.head_dim if k_head_dim is None else k_head_dim
        self.v_keep = v_keep
        self.k = nn.Linear(self.context_dim, self.num_k_heads * self.k_head_dim, bias=qkv_bias)
        self.v = nn.Linear(self.context_dim, self.num_v_heads * self.head_dim, bias=qkv_bias)
        if q_hidden is not None:
            activation = ACTIVATIONS[q_activation]
            self.q = nn.Sequential(  # type: ignore[assignment]
                nn.Linear(dim, q_hidden, bias=qkv_bias),
                nn.Identity() if activation is None else activation(),
                nn.Linear(q_hidden, num_heads * self.head_dim, bias=qkv_bias),
            )
        elif q_activation != "none":
            raise ValueError(f"q_activation={q_activation!r} needs q_hidden, the width that it acts on")
        self.k_up: nn.Linear | None = None
        if self.k_head_dim != self.head_dim:
            self.k_up = nn.Linear(self.k_head_dim, self.head_dim, bias=qkv_bias)
            self.k_norm = head_norm(qk_norm, self.k_head_dim)

    @property
    def traits(self) -> Traits:
        selective = self.v_keep is not None  # the largest scores are searched in the whole map
        return super().traits.but(needs_plan=selective, memory={"N": 2 if selective else 1})

    class_traits = HeadFrame.class_traits.but(needs_plan=True, memory={"N": 2})

    @property
    def cache_size(self) -> int:
        """Numbers that the key/value cache holds per token: ``n_k d_k + n_v D``."""
        return self.num_k_heads * self.k_head_dim + self.num_v_heads * self.head_dim

    # ---- narrow keys

    def _rotate(self, q: Tensor, k: Tensor, angles: Tensor, k_angles: Tensor) -> tuple[Tensor, Tensor]:
        return self._turn(q, angles), k if self.k_up is not None else self._turn(k, k_angles)

    def _widen(self, k: Tensor, valid: Tensor | None) -> Tensor:
        """(B, n_k, M, d_k) cached keys -> (B, n_k, M, D), rotated."""
        if self.k_up is None:
            return k
        k = self.k_up(k)
        if self.rotary is None:
            return k
        at = torch.arange(k.shape[2], device=k.device)[None] if valid is None else valid.long().cumsum(1) - 1
        length = at.amax(-1) + 1 if self._dynamic else None
        return self._turn(
            k, rotary_angles(at, self.rotary_dim, self.rotary, scaling=self.rotary_scaling, length=length)
        )

    # ---- selective fetch

    def make_plan(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: Mask | None = None,
        state: State | None = None,
    ) -> Plan:
        if self.v_keep is None:
            return super().make_plan(x)
        call: dict[str, Any] = dict(valid=valid, context_valid=context_valid, mask=mask, state=state)
        made = self._choice("value-fetch", x, context, **call)
        n, m = (t.shape[1:-1].numel() for t in (x, x if context is None else context))
        return Plan("value-fetch", made, (("N", n), ("M", m)))

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        k = self._widen(k, call.valid)
        if self.v_keep is None:
            return super()._mix_heads(q, k, v, call, notes)
        asked = call.but(return_weights=True)
        _, weights = attention(q, k, v[..., :0], scale=self.scale, normalizer=self.normalizer, **asked.options())
        plan = notes.plan
        if plan is not None and not isinstance(plan, Wanted):
            # slots are counted from the start of the cache, which may have grown since the plan was made
            made = dict(plan.expect("value-fetch", N=q.shape[2]).shape).get("M", 0)
            if made > k.shape[2]:
                raise ValueError(f"plan was made for M={made} keys, but there are M={k.shape[2]}; make a new one")
            index = plan.choices("index", (*weights.shape[:3], None), k.shape[2], "key")
        else:
            index = weights.topk(min(self.v_keep, weights.shape[-1]), dim=-1).indices
            if plan is not None:
                plan.tensors["index"] = index
        chosen = weights.gather(-1, index)
        group = self.num_heads // self.num_v_heads
        if q.shape[2] == 1:
            # One query: only the chosen rows of the cache are read. (B, n_v, group * a, D)
            rows = index.reshape(index.shape[0], self.num_v_heads, -1)
            fetched = v.gather(2, rows[..., None].expand(-1, -1, -1, v.shape[-1]))
            fetched = fetched.unflatten(2, (group, -1)).flatten(1, 2)
            out = chosen @ fetched.to(chosen.dtype)
        else:
            kept = torch.zeros_like(weights).scatter(-1, index, chosen)
            out = kept @ v.repeat_interleave(group, 1).to(kept.dtype)
        out = out.to(q.dtype)
        return (out, torch.zeros_like(weights).scatter(-1, index, chosen)) if call.return_weights else out

    # The authors released no weights; those of plain attention do not fit.
    convert_state_dict = None  # type: ignore[assignment]
