"""What stands between projections: a mixer of heads, with a state of its own, in our layers and in other people's.

A :class:`HeadMixer` gets queries, keys and values with their positions applied and gives head outputs.
:class:`MixedHeads` is a layer around one; ``attnlib.convert`` puts one inside attention modules of models that exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import masks
from ...grids import Layout
from ...ops import attention
from ...types import Output, State, Traits, check_divides, stats_dtype
from ..frame import HeadFrame
from ..layers import through


class HeadMixer(nn.Module):
    """Queries, keys and values of new tokens to head outputs, and a state behind them.

    Args:
        num_heads: query heads H.
        head_dim: width D of a head.
        num_kv_heads: key/value heads; must divide ``num_heads``. Defaults to ``num_heads``.
        causal: every token reads itself and earlier ones.
        scale: of the scores of the softmax that it stands for; ``1 / sqrt(head_dim)`` by default.
    """

    #: Whether it may run on a chunk of a sequence whose others lie with other processes.
    cuts_sequence: bool = False
    #: Keys that a query reads at most, itself and those right before it; ``None`` where any may be read.
    reach: int | None = None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divides("num_kv_heads", self.num_kv_heads, "num_heads", num_heads)
        self.causal = causal
        self.scale = head_dim**-0.5 if scale is None else scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, state: State | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        """Attend.

        Args:
            q: (B, H, N, D) queries of new tokens, not scaled.
            k, v: (B, Hk, N, D) their keys and values, or of M other tokens where nothing is causal.
            valid: (B, N) boolean, which keys exist.
            state: what the call before gave; with ``tokens`` (B,), the tokens that existed before these.
            keep: whether the next state is wanted.

        Returns:
            (B, H, N, Dv) and the state, ``None`` where it is not kept.
        """
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """(B, H, N, M) weights by which the values would be mixed; quadratic, for losses and reports."""
        raise ValueError(f"{type(self).__name__} has no map of weights")

    def trained(self) -> list[nn.Parameter]:
        """What is trained to agree with the attention it stands for."""
        return list(self.parameters())

    def own_losses(self, q: Tensor, k: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Losses beside agreement, of queries and keys that carry no gradient; none by default."""
        return {}


def normalized(weights: Tensor, allowed: Tensor, eps: float = 0.0) -> Tensor:
    """Non-negative (B, H, N, M) weights of the pairs that may meet, every row divided by its sum."""
    weights = weights.masked_fill(~allowed, 0.0)
    total = weights.sum(-1, keepdim=True) + eps
    return weights / torch.where(total == 0, torch.ones_like(total), total)


def pairs(q: Tensor, k: Tensor, causal: bool, valid: Tensor | None) -> Tensor:
    """(B or 1, 1, N, M) boolean: which query may read which key."""
    n, m = q.shape[2], k.shape[2]
    allowed = torch.ones(n, m, dtype=torch.bool, device=q.device)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    return allowed if valid is None else allowed & valid[:, None, None]


def output_error(out: Tensor, truth: Tensor, exists: Tensor) -> Tensor:
    """Mean square between head outputs (B, H, N, D) over the tokens (B, N) that exist."""
    rows = exists[:, None].expand(-1, out.shape[1], -1)
    error = (out - truth).to(stats_dtype(out.dtype)).square().mean(-1)
    return error.masked_fill(~rows, 0.0).sum() / rows.sum().clamp(min=1)


def map_cross_entropy(weights: Tensor, target: Tensor, exists: Tensor) -> Tensor:
    """Mean over existing queries (B, N) of ``-sum_j target_ij log weights_ij``; maps are (B, H, N, M).

    Rows of ``weights`` that do not sum to 1, as with something added to their sum, are divided by it.
    """
    rows = exists[:, None].expand(-1, target.shape[1], -1)
    entropy = -(target * weights.clamp(min=1e-12).log().log_softmax(-1)).sum(-1)
    return entropy.masked_fill(~rows, 0.0).sum() / rows.sum().clamp(min=1)


def softmax_mask(causal: bool, window: int | None = None) -> masks.Mask | None:
    """Which pairs meet in the attention that a mixer stands for."""
    if window is not None:
        return masks.recent(window)
    return masks.causal() if causal else None


def softmax_map(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, valid: Tensor | None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs and weights of the softmax attention that a mixer stands for; causal within a window, if there is one."""
    mask = softmax_mask(causal, window)
    return attention(q, k, v, mask=mask, valid=valid, scale=scale, return_weights=True)


class MixedHeads(HeadFrame):
    """A layer whose operator on heads is a :class:`HeadMixer`, :attr:`heads`.

    With ``attention_transfer`` on, the layer gives plain softmax attention, so that hidden states follow the teacher,
    and returns the losses of its mixer against it, which reach the mixer only: ``transfer_mse`` between head outputs
    before the output projection, ``transfer_xent`` between maps. That is quadratic.
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self", "noncausal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        layout=True,
        streaming=True,
        work={"N": 2},
        memory={"N": 2},
        permutation_equivariant=True,
        losses=("transfer_mse", "transfer_xent"),
    )
    heads: HeadMixer
    attention_transfer: bool = False

    @property
    def cuts_sequence(self) -> bool:  # type: ignore[override]
        return self.heads.cuts_sequence and not self.attention_transfer

    @property
    def traits(self) -> Traits:
        traits = super().traits
        patterns = traits.patterns & self.class_traits.patterns
        if self.attention_transfer:
            return traits.but(patterns=patterns, streaming=False)
        return traits.but(patterns=patterns, work={"N": 1}, memory={"N": 1}, losses=())

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        q, k, v, notes, read = self._read(x, context, valid, context_valid, None, state, returns)
        losses = None
        if self.attention_transfer:
            out, losses = self._transfer(q, k, v, read.exists, read.own, "losses" in returns)
            new = None
        else:
            out, new = self.heads(q, k, v, valid=read.exists, state=read.stream.state, keep=read.stream.keep)
        y = through(self.proj_drop, self._project(self._gate(out, notes), notes, x.shape[1:-1]))
        return Output(y, state=new, losses=losses)

    def _transfer(
        self, q: Tensor, k: Tensor, v: Tensor, exists: Tensor | None, own: Tensor | None, wanted: bool
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The teacher's (B, H, N, D) outputs and the losses of the mixer against it."""
        causal = self.heads.causal
        if not wanted:
            call: dict[str, Any] = dict(mask=masks.causal() if causal else None, valid=exists, scale=self.scale)
            return attention(q, k, v, **call), None
        truth, target = softmax_map(q, k, v, self.scale, causal, exists)
        q, k, v, seen, target = (t.detach() for t in (q, k, v, truth, target))
        rows = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if own is None else own
        out, _ = self.heads(q, k, v, valid=exists)
        return truth, {
            "transfer_mse": output_error(out, seen, rows),
            "transfer_xent": map_cross_entropy(self.heads.weights(q, k, valid=exists), target, rows),
        }

    def feature_parameters(self) -> list[nn.Parameter]:
        """What attention transfer trains; everything else stays as it is."""
        return self.heads.trained()
