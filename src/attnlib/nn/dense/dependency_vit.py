"""Reversed attention: a token chooses its parents among the others and sends them one message, so that trees emerge.

Ding et al., 2023, "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", CVPR,
arXiv 2304.03282. With ``q, k, v`` of every head, tokens ``i`` that send (children) and ``j`` that receive (parents)::

    P_i = softmax_h(x_i W_P / tau)                        which head, that is which kind of parent, a child uses
    m_i = sigmoid(MLP(x_i)),   M <- M m                   how much it still sends, carried from block to block
    A[h][j, i] = softmax_j(q_i . k_j / sqrt(D)) P[i, h] M[i]
    y_j = W_O concat_h sum_i A[h][j, i] v_i

The softmax runs over receivers, so that the map is never transposed. Column i of the dependency mask ``sum_h A`` sums
to ``M_i``; its rows may have any sum. A token that receives nothing is a leaf.

Our reading, since the authors have published no code: biases and rounding follow an unmerged contribution to timm where
the paper is silent, and each of these points is a setting. ``M`` is kept as its logarithm in float32, where the product
of many gates does not vanish.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_device, check_flag, check_int, check_real, check_within, describe
from ...grids import Layout
from ...ops.reversed import reversed_attention
from ...types import Output, Plan, Traits, stats_dtype
from ..base import Mechanism
from ..frame import reading
from ..layers import Mlp, head_dim_of, merge_heads, split_heads, through
from ..registry import register

#: What tokens are ranked by where some are pruned.
PRUNE_BY = ("received", "message")


class Messages(NamedTuple):
    """What passes from block to block.

    Args:
        log: (B, N) logarithm of the share of its message that every token still sends, in the type of statistics.
        left: (B, K) slots of the tokens that are left, in order; ``None`` for all.
    """

    log: Tensor
    left: Tensor | None = None


@register("dependency-vit")
class ReversedAttention(Mechanism):
    """``y_j = sum_i softmax_j(q_i . k_j / sqrt(D)) P_i M_i v_i``: see the module for the equations.

    No pairwise mask is possible: what a token sends to one receiver depends on all whom it could send to. Nor is a
    causal order: the share that goes to an early token is known when the last has come.

    With a context, its tokens send and those of ``x`` receive. The carry is :class:`Messages`; without one every token
    still sends all of its message. ``returns=("weights",)`` gives ``A`` (B, H, N, M), receivers by senders.

    With ``keep_rate`` this layer also prunes: the carry names the tokens that are left behind it, and the layers behind
    compute nothing for the others, which neither send nor receive there; their ``y`` is zero. ``plan`` returns the
    choice. It has no gradient.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        context_dim: width of the context; ``dim`` by default.
        temperature: ``tau`` of the selector; 0.1 in the paper's appendix.
        selector: choose heads; without, ``P`` is 1 in every head.
        selector_bias: bias of ``W_P`` (the paper does not say).
        controller: gate messages; without, ``m`` is 1.
        controller_hidden: width between the controller's two maps; half of the tokens' by default.
        controller_bias: biases of both (the paper does not say).
        keep_rate: share of all slots that are left behind this layer; ``None`` prunes nothing.
        prune_by: the tokens that are left are those that ``"received"`` the most, over heads and senders, or whose
            ``"message"`` is the largest (the paper does not say which).
        qkv_bias, proj_bias: biases of the projections.
        scale: of the scores; ``1 / sqrt(head_dim)`` by default.
        attn_drop: dropout of entries of ``A`` in training.
        proj_drop: dropout of the output in training.

    Reference: Ding et al., 2023, arXiv 2304.03282.

    >>> m = ReversedAttention(dim=8, num_heads=2)
    >>> out = m(torch.randn(1, 5, 8), returns=("weights", "carry"))
    >>> torch.allclose(out.weights.sum((1, 2)), out.carry.log.exp(), atol=1e-6)  # every column sums to the message
    True
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "noncausal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        layout=True,
        work={"N": 2},
        memory={"N": 1},
        permutation_equivariant=True,
        needs_plan=True,
        carries=True,
        weights=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        context_dim: int | None = None,
        temperature: float = 0.1,
        selector: bool = True,
        selector_bias: bool = False,
        controller: bool = True,
        controller_hidden: int | None = None,
        controller_bias: bool = False,
        keep_rate: float | None = None,
        prune_by: str = "received",
        qkv_bias: bool = False,
        proj_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, context_dim)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.temperature = check_real("temperature", temperature, above=0)
        self.keep_rate = None if keep_rate is None else check_real("keep_rate", keep_rate, above=0, most=1)
        check_choice("prune_by", prune_by, PRUNE_BY)
        self.prune_by = prune_by
        if keep_rate is not None and self.context_dim != dim:
            raise ValueError(f"keep_rate prunes tokens that read themselves: context_dim must be dim={dim}")
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.attn_drop = attn_drop
        self.q = nn.Linear(self.context_dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(self.context_dim, dim, bias=qkv_bias)
        self.selector = None
        if check_flag("selector", selector):
            self.selector = nn.Linear(self.context_dim, num_heads, bias=selector_bias)
        self.controller = None
        if check_flag("controller", controller):
            hidden = max(1, self.context_dim // 2) if controller_hidden is None else controller_hidden
            hidden = check_int("controller_hidden", hidden, least=1)
            self.controller = Mlp(self.context_dim, hidden=hidden, out_dim=1, bias=controller_bias)
        self.proj, self.proj_drop = nn.Linear(dim, dim, bias=proj_bias), nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        patterns = {"noncausal-self", "noncausal-cross"}
        if self.keep_rate is not None:
            patterns = {"noncausal-self"}
        elif self.context_dim != self.dim:
            patterns = {"noncausal-cross"}
        return self.class_traits.but(patterns=frozenset(patterns), needs_plan=self.keep_rate is not None)

    # ---- messages

    def _given(self, carry: Any, senders: Tensor, own: bool) -> Messages:
        """The carry of the block before; full messages of all tokens without one."""
        batch, count = senders.shape[:2]
        high = stats_dtype(senders.dtype)
        if carry is None:
            return Messages(senders.new_zeros(batch, count, dtype=high))
        if not (isinstance(carry, tuple) and len(carry) == 2 and isinstance(carry[0], Tensor)):
            raise TypeError(f"carry must be Messages(log, left) of the block before, got {describe(carry)}")
        log, left = carry
        if log.shape != (batch, count) or not log.is_floating_point():
            raise ValueError(
                f"carry holds messages {describe(log)}, but {(batch, count)} tokens send; it is of another input"
            )
        check_device(x=senders, carry=log)
        if left is not None:
            if not isinstance(left, Tensor) or left.dtype != torch.int64 or left.dim() != 2:
                raise TypeError(f"carry's left must be (B, K) int64 slots, got {describe(left)}")
            if left.shape[0] != batch or left.shape[1] > count or not own:
                raise ValueError(
                    f"carry names {left.shape[1]} slots that are left for {left.shape[0]} samples, but x has {batch} "
                    f"samples of {count} tokens{'' if own else ', and reads a context'}"
                )
            check_within("carry", left, count, "slot")
        return Messages(log.to(high), left)

    def shares(self, senders: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the shares of heads (B, M, H) and of the gates (B, M) of tokens (B, M, C)."""
        high = stats_dtype(senders.dtype)
        batch, count, _ = senders.shape
        if self.selector is None:
            heads = senders.new_zeros(batch, count, self.num_heads, dtype=high)
        else:
            heads = F.log_softmax(self.selector(senders).to(high) / self.temperature, -1)
        if self.controller is None:
            return heads, senders.new_zeros(batch, count, dtype=high)
        return heads, F.logsigmoid(self.controller(senders).squeeze(-1).to(high))

    # ---- the call

    def _left(self, scores: Tensor, valid: Tensor | None, slots: int) -> Tensor:
        """(B, K) places of the tokens that are left among those that are scored (B, n), in order."""
        assert self.keep_rate is not None
        if valid is not None:
            scores = scores.masked_fill(~valid, float("-inf"))
        count = min(scores.shape[1], max(1, int(self.keep_rate * slots + 1e-6)))
        return scores.topk(count, -1, sorted=False).indices.sort(-1).values

    def make_plan(  # type: ignore[override]
        self, x: Tensor, *, layout: Layout | None = None, valid: Tensor | None = None, carry: Any = None
    ) -> Plan:
        if self.keep_rate is None:
            raise ValueError(f"{self._name()} prunes nothing (keep_rate=None), so it has no plan")
        left = self.mix(x, valid=valid, carry=carry, returns=("carry",)).carry.left
        return Plan("left", {"left": left}, (("N", x.flatten(1, -2).shape[1]), ("K", left.shape[1])))

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        plan: Plan | None = None,
        carry: Any = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        read = reading(x, context, valid, context_valid, False, None, False)
        receivers, there, senders, exist = read.tokens, read.own, read.keys, read.exists
        slots, own = receivers.shape[1], context is None
        before = self._given(carry, senders, own)
        log, left = before.log, before.left
        if left is not None:
            receivers = senders = _picked(receivers, left)
            log = log.gather(1, left)
            there = exist = None if there is None else there.gather(1, left)
        heads, gates = self.shares(senders)
        log = log + gates
        parts = ((self.q, senders), (self.k, receivers), (self.v, senders))
        q, k, v = (split_heads(f(t), self.num_heads) for f, t in parts)
        dtype = v.dtype
        count = self._counts(plan, returns)
        if count:  # a channel of ones says what every token receives
            v = F.pad(v, (0, 1), value=1.0)
        given: dict[str, Any] = dict(
            log_message=heads.mT + log[:, None], valid=exist, receiver_valid=there, scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        weights = None
        if "weights" in returns:
            out, weights = reversed_attention(q.to(dtype), k.to(dtype), v, **given, return_weights=True)
            weights = weights if left is None else _spread(weights, left, slots)
        else:
            out = reversed_attention(q.to(dtype), k.to(dtype), v, **given)
        received = None
        if count:
            out, received = out[..., :-1], out[..., -1].detach().sum(1)
        y = self.proj(merge_heads(out))
        if left is not None:
            y = y.new_zeros(*y.shape[:1], slots, self.dim).scatter(1, left[..., None].expand_as(y), y)
            log = before.log.scatter(1, left, log)
        y = through(self.proj_drop, y.unflatten(1, x.shape[1:-1]))
        behind = left
        if self.keep_rate is not None:
            if plan is not None:
                chosen = plan.expect("left", N=slots).choices("left", (x.shape[0], None), slots, "slot")
                if left is not None and chosen.shape[1] > left.shape[1]:
                    raise ValueError(f"plan leaves {chosen.shape[1]} tokens, but {left.shape[1]} are left before it")
                behind = chosen
            elif "carry" in returns:
                by = received if self.prune_by == "received" else log if left is None else log.gather(1, left)
                assert by is not None
                places = self._left(by.detach(), there, slots)
                behind = places if left is None else left.gather(1, places)
        return Output(y, carry=Messages(log, behind) if "carry" in returns else None, weights=weights)

    def _counts(self, plan: Plan | None, returns: tuple[str, ...]) -> bool:
        """Whether what tokens receive is asked for."""
        return self.keep_rate is not None and plan is None and "carry" in returns and self.prune_by == "received"


def _picked(tokens: Tensor, at: Tensor) -> Tensor:
    """(B, K, C): the tokens in slots (B, K)."""
    return tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[-1]))


def _spread(weights: Tensor, left: Tensor, slots: int) -> Tensor:
    """(B, H, K, K) -> (B, H, slots, slots), zero for what was pruned."""
    batch, heads, count, _ = weights.shape
    columns = left[:, None, None].expand(-1, heads, count, -1)
    wide = weights.new_zeros(batch, heads, count, slots).scatter(-1, columns, weights)
    rows = left[:, None, :, None].expand(-1, heads, -1, slots)
    return weights.new_zeros(batch, heads, slots, slots).scatter(2, rows, wide)
