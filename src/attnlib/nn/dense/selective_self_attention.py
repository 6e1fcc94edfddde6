"""Selective self-attention (Zhang et al., 2024): a temperature per token and position, for queries and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_real
from ...masks import Mask, visible_keys
from ...ops import attention
from ...types import Plan, State, Traits, Wanted, check_choice, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes
from ..layers import merge_heads
from ..registry import register
from ..released import Released, grouped_rule, split_rule

POSITION = ("none", "sigmoid", "double_exponential", "linear")


@dataclass
class TemperatureNotes(Notes):
    """(B, 1, N, 1) temperature of each query's token."""

    token: Tensor | None = None


@register("selective-self-attention", "ssa")
class SelectiveAttention(HeadFrame[TemperatureNotes]):
    """Softmax attention in which a token chooses how peaked its row is, and how loud its own value.

    ``q_i <- (tau_tok(x_i) + tau_pos(i)) q_i``, ``v_j <- (1 + tau_tok'(x_j)) v_j``, with ``n_i`` keys visible to row i::

        tau_tok(x) = tanh(w . GELU(W x)),  W the layer's own query (or value) projection, only w is new
        tau_pos(i) = 1 + sigmoid(a) log(n_i)

    Args:
        dim, num_heads, ...: as in :class:`HeadFrame`.
        token_queries, token_values: the learned per-token temperatures; they start at zero, so that nothing changes.
        position: ``"sigmoid"`` as above; ``"double_exponential"``: ``1 + exp(-exp(b)) log(n_i)`` and ``"linear"``:
            ``1 + b log(n_i)``, the authors' released forms; ``"none"``.
        per_head: one ``a`` (or ``b``) per head instead of one per layer.
        init: initial value of ``a`` or ``b``; by default -6, 2 or 1e-5.
        sparse: the authors' ablation of plain attention, which a row with ``n_i`` keys gives to its largest scores
            alone: the ``max(10, n_i ** sparse)`` largest up to 1.5, the ``floor(sparse)`` largest above.
        compat: ``"authors"``: ``n_i = 1, 2, ..`` counts the rows of the call, whatever keys they see.

    What differs from the authors' code: it releases only the position temperature, counts rows from the start of every
    call (so decoding with its cache restarts at 1) and ignores its mask argument; here ``n_i`` is the number of keys
    that row really sees. Theirs refuses sequences shorter than what sparse rows keep; here all is kept. The token
    temperatures follow the paper's description.

    Reference: Zhang et al., 2024, arXiv 2411.12892.

    >>> SelectiveAttention(dim=16, num_heads=2, causal=True)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    notes_type = TemperatureNotes
    own_state = ("beta",)  # as a buffer, of sparse rows: theirs makes it in the first call
    class_traits = HeadFrame.class_traits.but(needs_plan=True, memory={"N": 2})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        token_queries: bool = True,
        token_values: bool = True,
        position: str = "sigmoid",
        per_head: bool = False,
        init: float | None = None,
        sparse: float | None = None,
        compat: str | None = None,
        **settings: Any,
    ):
        super().__init__(dim, num_heads, **settings)
        check_choice("position", position, POSITION)
        check_choice("compat", compat, (None, "authors"))
        self.position, self.compat, self.sparse = position, compat, sparse is not None
        if sparse is not None:
            check_real("sparse", sparse, above=0)
            if position != "none":
                raise ValueError(f"sparse={sparse} is an ablation of plain attention; it needs position='none'")
            if self.attn_drop:
                raise ValueError(f"attn_drop={self.attn_drop} is not possible with sparse={sparse}")
        self.tau_q = nn.Parameter(torch.zeros(self.q.out_features)) if token_queries else None
        self.tau_v = nn.Parameter(torch.zeros(self.v.out_features)) if token_values else None
        start = {"none": 0.0, "sigmoid": -6.0, "double_exponential": 2.0, "linear": 1e-5}[position]
        shape = (num_heads, 1, 1) if per_head else ()
        start = float(start if init is None else init)
        if sparse is not None:
            self.register_buffer("beta", torch.tensor(float(sparse)))
        else:
            self.beta = nn.Parameter(torch.full(shape, start)) if position != "none" else None

    @property
    def traits(self) -> Traits:
        # the largest scores are searched in the whole map
        return super().traits.but(needs_plan=self.sparse, memory={"N": 2 if self.sparse else 1})

    def _growth(self) -> Tensor:
        """Factor of ``log(n_i)``: a scalar or (H, 1, 1)."""
        assert self.beta is not None
        if self.position == "sigmoid":
            return self.beta.sigmoid()
        return torch.exp(-torch.exp(self.beta)) if self.position == "double_exponential" else self.beta

    def _token(self, heads: Tensor, weight: Tensor) -> Tensor:
        """(B, 1, N, 1): ``tanh(w . GELU(W x))`` from the projected heads (B, H, N, D)."""
        return torch.tanh(F.gelu(merge_heads(heads)) @ weight)[:, None, :, None]

    def _begin(self, x: Tensor, q: Tensor, notes: TemperatureNotes) -> None:
        # from the queries before rotary: W x
        if self.tau_q is not None:
            notes.token = self._token(q, self.tau_q)

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: TemperatureNotes) -> Any:
        temperature: Tensor | float = 1.0
        if self.position != "none":
            count = self._count(q, k, call).clamp(min=1).to(stats_dtype(q.dtype))
            temperature = 1 + self._growth() * torch.log(count)
        if notes.token is not None:
            temperature = temperature + notes.token
        if isinstance(temperature, Tensor):
            q = q * temperature.to(q.dtype)
        if self.tau_v is not None:
            v = v * (1 + self._token(v, self.tau_v)).to(v.dtype)
        if self.sparse:
            return self._largest(q, k, v, call, notes)
        return super()._mix_heads(q, k, v, call, notes)

    def _count(self, q: Tensor, k: Tensor, call: HeadCall) -> Tensor:
        """(B or 1, H or 1, N, 1): ``n_i``."""
        if self.compat == "authors":
            return torch.arange(1, q.shape[2] + 1, device=q.device)[None, None, :, None]
        return visible_keys(call.mask, q.shape[2], k.shape[2], call.valid, call.q_pos, q.device)

    # ---- sparse rows

    def _largest(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        """Attention to the largest scores of every row."""
        whole = call.but(return_weights=True)
        _, weights = attention(q, k, v[..., :0], scale=self.scale, normalizer=self.normalizer, **whole.options())
        plan = notes.plan
        if plan is not None and not isinstance(plan, Wanted):
            # keys that came since the plan was made are not among its choices
            index = plan.expect("largest-scores", N=q.shape[2]).choices(
                "index", (*weights.shape[:3], None), k.shape[2], "key"
            )
        else:
            assert self.beta is not None
            power = (self._count(q, k, call).to(self.beta.dtype) ** self.beta).clamp(min=10)
            some = torch.where(self.beta > 1.5, self.beta, power).long()
            index = weights.detach().argsort(dim=-1, descending=True, stable=True)
            late = torch.arange(k.shape[2], device=q.device) >= some
            index = torch.where(late, index[..., :1], index)  # the largest once more instead of one too many
            if plan is not None:
                plan.tensors["index"] = index
        keep = torch.zeros_like(weights).scatter(-1, index, 1.0)
        weights = weights * keep
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1, total)
        out = (weights @ v.repeat_interleave(self.num_heads // self.num_kv_heads, 1).to(weights.dtype)).to(q.dtype)
        return (out, weights) if call.return_weights else out

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
        if not self.sparse:
            return super().make_plan(x)
        call: dict[str, Any] = dict(valid=valid, context_valid=context_valid, mask=mask, state=state)
        made = self._choice("largest-scores", x, context, **call)
        return Plan("largest-scores", made, (("N", made["index"].shape[2]),))

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor], num_heads: int | None = None, num_kv_heads: int | None = None
    ) -> dict[str, Tensor]:
        """From the authors' ``CausalSelfAttention`` classes: lit-gpt's, whose ``attn`` interleaves the projections of
        every group (give ``num_heads``), or GPT-2's, whose ``c_attn`` holds queries, keys, values one after another."""
        theirs = Released(state_dict, "the authors' CausalSelfAttention")
        theirs.leave(r"bias|attn_bias|mask_cache", because="a constant causal mask")
        theirs.leave(r"sorted_att_buffer", because="what model_statistic recorded")
        if "alpha" in theirs:
            theirs.leave(r"alpha|beta", because="constants that model_statistic keeps and does not use")
        out = theirs.renamed(
            {
                r"attn\.(weight|bias)": grouped_rule(num_heads, num_kv_heads),
                r"c_attn\.(weight|bias)": split_rule("q", "k", "v"),
                r"(?:c_proj|proj)\.(weight|bias)": r"proj.\1",
                r"beta": "beta",
            }
        )
        return theirs.close(out)


def effective_support(weights: Tensor) -> Tensor:
    """``1 / sum a^2`` of rows of weights (..., M): how many keys a row really reads."""
    return 1 / weights.square().sum(-1)
