"""ABC: attention with a memory of bounded size, whose slots are weighted sums of keys and of values.

Peng et al., 2022, "ABC: Attention with Bounded-memory Control", arXiv 2110.02488, in the form with a learned control
(ABC-MLP): per head, m vectors ``c_r`` say how much every key counts in slot r, and m others ``d_r`` every value,

    ``k~_r = sum_j exp(c_r . k_j) k_j / sum_j exp(c_r . k_j)``,
    ``v~_r = sum_j exp(d_r . v_j) v_j / sum_j exp(d_r . v_j)``,
    ``o_i = sum_r softmax_r(q_i . k~_r / sqrt(D)) v~_r``.

In causal order the sums reach up to token i: each slot is a running mean, which is updated as tokens come, and the
state has the same size at every length. Both readings of the memory are linear attention with decays ``L_{t-1} - L_t``,
``L_t`` being the logarithm of the sum of weights so far: of keys with one head for every slot, of values with the slots
as channels.

Differs from the code of the Comprehensive Attention Benchmark (arXiv 2210.07661), after which it is modelled: in causal
order their slots hold the current token alone, divided by the sum of weights so far, so that nothing is remembered
(``compat="authors"``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int
from ...ops.linear import linear_attention
from ...types import State, Traits, exactly, stats_dtype
from ..registry import register
from .projected import Projected

#: The logarithm of a sum of no weights.
NOTHING = -1e30


@register("abc", "abc-bounded-memory-control", "bounded-memory-attention")
class BoundedMemoryAttention(Projected):
    """Softmax attention to m slots that hold weighted means of all tokens, or of all so far.

    Args:
        dim, num_heads, context_dim, qkv_bias, proj_bias, add_bias_kv, add_zero_attn: as of
            :class:`attnlib.nn.linear.projected.Projected`; a causal one with more keys only reads a context.
        num_landmarks: m, slots; all heads share the control vectors.
        causal: every token reads a memory of itself and earlier ones. With a context: reads one of all of it.
        chunk: tokens per chunk in causal order; changes speed, not the result.
        compat: ``"authors"``: see above.

    Shapes: x and y (B, N, C). Cost: O(N m D).

    >>> BoundedMemoryAttention(dim=16, num_heads=2, num_landmarks=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    source = "ABC"
    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_landmarks: int = 16,
        causal: bool = False,
        chunk: int = 16,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        compat: str | None = None,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
    ):
        super().__init__(dim, num_heads, context_dim, qkv_bias, proj_bias, add_bias_kv, add_zero_attn)
        check_choice("compat", compat, (None, "authors"))
        self.num_landmarks = check_int("num_landmarks", num_landmarks, least=1)
        self.causal, self.compat = check_flag("causal", causal), compat
        self.chunk = check_int("chunk", chunk, least=1)
        self.key_control, self.value_control = (
            nn.Parameter(torch.empty(self.head_dim, num_landmarks)) for _ in range(2)
        )
        for control in (self.key_control, self.value_control):
            nn.init.xavier_uniform_(control, gain=2**-0.5)

    @property
    def traits(self) -> Traits:
        patterns = self._patterns()
        return self.class_traits.but(
            patterns=patterns, streaming="causal-self" in patterns, permutation_equivariant=not self.causal
        )

    def mix_heads(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, ordered: bool, state: State | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        with exactly(q):
            high = stats_dtype(q.dtype)
            q_, k_, v_ = q.to(high) * self.head_dim**-0.5, k.to(high), v.to(high)
            by_key, by_value = k_ @ self.key_control.to(high), v_ @ self.value_control.to(high)
            kept: dict[str, Tensor] = {}
            if ordered:
                out, kept = self._running(q_, k_, v_, by_key, by_value, valid, state)
            else:
                scores = q_ @ self._memory(k_, by_key, valid).mT
                out = torch.softmax(scores, -1) @ self._memory(v_, by_value, valid)
        return out.to(v.dtype), None, kept

    @staticmethod
    def _memory(x: Tensor, control: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, m, D): weighted means of (B, H, M, D); zeros where nobody is."""
        if valid is not None:
            control = control.masked_fill(~valid[:, None, :, None], -torch.inf)
            control = control.masked_fill(~valid.any(1)[:, None, None, None], 0.0)
            x = x.masked_fill(~valid[:, None, :, None], 0.0)
        return torch.softmax(control, 2).mT @ x

    @staticmethod
    def _shares(control: Tensor, valid: Tensor | None, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (B, H, n, m): the share of each token in the sum so far, what the sum decays by, its logarithm at the end.

        The sums are there to stay in range, and are constants to the gradient; what they are divided by has it.

        Args:
            control: logarithms of weights.
            valid: (B, n) boolean, which tokens exist.
            before: (B, H, m) logarithms of the sums before these tokens, :data:`NOTHING` without any.
        """
        batch, n = control.shape[0], control.shape[2]
        exists = torch.ones(batch, n, dtype=torch.bool, device=control.device) if valid is None else valid
        here = exists[:, None, :, None]
        with torch.no_grad():
            old = before.to(control.dtype).unsqueeze(2)
            some = old > NOTHING / 2
            # What does not exist weighs e^-60 of the least that does, which is nothing.
            least = torch.cat([old.masked_fill(~some, torch.inf), control.masked_fill(~here, torch.inf)], 2)
            least = least.amin(2, keepdim=True) - 60
            least = least.masked_fill(least.isinf(), 0.0)
            logs = torch.cat([torch.where(some, old, least), torch.where(here, control, least)], 2)
            sums = torch.logcumsumexp(logs, 2)
            last, now = sums[:, :, :-1], sums[:, :, 1:]
            came = exists.cumsum(1)
            known = some | ((came - exists.long()) > 0)[:, None, :, None]
            decay = torch.where(known, last - now, 0.0).clamp(max=0.0)
            end = torch.where(some.squeeze(2) | (came[:, -1] > 0)[:, None, None], now[:, :, -1], NOTHING)
        return torch.where(here, control - now, -torch.inf).exp(), decay, end

    def _running(
        self, q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, by_value: Tensor, valid: Tensor | None,
        state: State | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        batch, heads, n, dim = q.shape
        m = self.num_landmarks
        shapes = {
            "log_keys": (batch, heads, m), "log_values": (batch, heads, m), "sum_keys": (batch, heads * m, 1, 1),
            "sum_values": (batch, heads * m, 1, 1), "keys": (batch, heads * m, dim, 1),
            "values": (batch, heads, m, dim),
        }  # fmt: skip
        kept = {
            name: q.new_full(shape, NOTHING if name.startswith("log") else 0.0)
            if state is None
            else _held(name, state, shape)
            for name, shape in shapes.items()
            if self.compat is None or "_" in name
        }
        (share_k, decay_k, log_k), (share_v, decay_v, log_v) = (
            self._shares(control, valid, kept[name])
            for control, name in ((by_key, "log_keys"), (by_value, "log_values"))
        )

        def by_slot(t: Tensor) -> Tensor:
            """(B, H, n, m) -> (B, H m, n)."""
            return t.movedim(3, 2).flatten(1, 2)

        options: dict[str, Any] = dict(valid=valid, chunk=self.chunk, return_state=True)
        ones = q.new_ones(batch, heads * m, n, 1)

        def total(share: Tensor, decay: Tensor, name: str) -> tuple[Tensor, Tensor]:
            """(B, H, n, m) sums of shares so far, 1 but for rounding, and the last ones."""
            out, final = linear_attention(
                ones, ones, by_slot(share).unsqueeze(-1), decay=by_slot(decay), state=State({"S": kept[name]}),
                **options,
            )  # fmt: skip
            some = out.squeeze(-1).unflatten(1, (heads, m)).movedim(2, 3)
            return some.masked_fill(some == 0, 1.0), final["S"]

        sum_k, last_k = total(share_k, decay_k, "sum_keys")
        sum_v, last_v = total(share_v, decay_v, "sum_values")
        held = {"log_keys": log_k, "log_values": log_v, "sum_keys": last_k, "sum_values": last_v}
        if self.compat is not None:
            scores = (q * k).sum(-1, keepdim=True) * share_k / sum_k
            return (torch.softmax(scores, -1) * share_v / sum_v).sum(-1, keepdim=True) * v, held
        slots, memory_k = linear_attention(
            q.repeat_interleave(m, 1), k, by_slot(share_k).unsqueeze(-1), decay=by_slot(decay_k),
            state=State({"S": kept["keys"]}), **options,
        )  # fmt: skip
        scores = slots.squeeze(-1).unflatten(1, (heads, m)).movedim(2, 3) / sum_k
        out, memory_v = linear_attention(
            torch.softmax(scores, -1) / sum_v, share_v, v, decay=decay_v, state=State({"S": kept["values"]}), **options
        )
        return out, held | {"keys": memory_k["S"], "values": memory_v["S"]}

    @classmethod
    def _more_rules(cls) -> dict[str, Any]:
        return {r"compress_k": "key_control", r"compress_v": "value_control", **cls._more_keys()}


def _held(name: str, state: State, shape: tuple[int, ...]) -> Tensor:
    if tuple(state[name].shape) != shape:
        raise ValueError(
            f"state {name} must be {shape}, got {tuple(state[name].shape)}; it was made by another mechanism or for "
            "another batch"
        )
    return state[name]
