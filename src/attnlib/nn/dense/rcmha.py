"""Relative convolutional multi-head attention (Sugiharto et al., 2023): relative scores, convolved projections."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import masks
from ...ops import attention
from ...types import Output, State, Traits, check_choice
from ..base import Mechanism
from ..frame import Stream
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released, Rule

NAMES = ("q", "k", "v")


def shift(scores: Tensor, m: int) -> Tensor:
    """Scores by distance to scores by key: ``out[i, j] = scores[i, j - i + n - 1]``.

    Args:
        scores: (..., n, m + n - 1); column t belongs to the distance ``t - (m - 1)`` of key from query, where the
            queries are the last n of the m tokens.
        m: number of keys.

    Returns:
        (..., n, m).

    >>> shift(torch.tensor([[-2, -1, 0, 1], [-2, -1, 0, 1]]), 3).tolist()
    [[-1, 0, 1], [-2, -1, 0]]
    """
    n, width = scores.shape[-2:]
    # With one more column a row is width + 1 long; read in rows of width, each starts one element earlier.
    flat = F.pad(scores, (0, 1)).flatten(-2)
    return flat[..., n - 1 : n - 1 + n * width].unflatten(-1, (n, width))[..., :m]


@register("rcmha", "rmha", "mdha")
class RelativeConvAttention(Mechanism):
    """Transformer-XL's relative scores on queries, keys and values that went through a short causal convolution.

    ``q = conv(x W_q)``, ``k = conv(x W_k)``, ``v = conv(x W_v + b_v)``: one depthwise convolution over time for each,
    over the last ``kernel_size`` tokens, its D filters shared by all heads (MDHA, from Primer). With learned tables R
    (2P, H, D) and beta (2P, H) over distances, and u (H, D), all starting at zero (RMHA)::

        S_ij = ((q_i + u) . k_j + q_i . R[P + j - i] + beta[P + j - i]) / sqrt(D),  o_i = softmax_j(S_ij) v_j

    Without ``relative`` it is MDHA, without ``qkv_conv`` RMHA, without both multi-head attention. A mask is taken only
    without ``qkv_conv``: a convolved key that a row may read carries its neighbours, which the mask may hide. With a
    context, keys and values are its; the queries are its last tokens, as with a memory.

    The state is Transformer-XL's memory: keys and values of all earlier tokens, with the last tokens before the
    convolutions. Calls that hand it on equal one call on the whole sequence.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        relative: relative scores.
        qkv_conv: the convolutions.
        kernel_size: tokens that a convolution reads.
        max_distance: P; sequences, memory included, have at most P tokens.
        causal: every token reads itself and earlier ones. With a context: reads all of it.
        attn_drop: dropout of attention weights in training.
        qk_bias: biases of the query and key projections, which the authors' plain class has.
        compat: ``"authors"``: takes masks with ``qkv_conv`` too; they hide keys, and not what neighbours took of them.

    What differs from the authors' code: their memory reaches keys and values only, so that at the first
    ``kernel_size - 1`` tokens of a segment the queries' convolution reads zeros; here it reads the earlier tokens
    (``state.replace(q_tail=zeros)`` gives theirs). Sequences longer than P are refused, where theirs reads other rows
    of the table. Their training script uses another library's class without the convolutions.

    Reference: Sugiharto et al., 2023, arXiv 2308.03429; Dai et al., 2019, arXiv 1901.02860 (relative scores); So et
    al., 2021, arXiv 2109.08668 (convolutions).

    >>> RelativeConvAttention(dim=16, num_heads=2, max_distance=8)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"}),
        mask=True,
        streaming=True,
        work={"N": 2},
        memory={"N": 2},
        permutation_equivariant=True,
        weights=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        relative: bool = True,
        qkv_conv: bool = True,
        kernel_size: int = 3,
        max_distance: int = 4096,
        causal: bool = True,
        attn_drop: float = 0.1,
        qk_bias: bool = False,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        self.compat = compat
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        if kernel_size < 1 or max_distance < 1:
            raise ValueError(
                f"kernel_size and max_distance must be at least 1, got kernel_size={kernel_size}, "
                f"max_distance={max_distance}"
            )
        self.relative, self.qkv_conv, self.causal = relative, qkv_conv, causal
        self.kernel_size, self.max_distance, self.attn_drop = kernel_size, max_distance, attn_drop
        self.scale = self.head_dim**-0.5
        self.q = nn.Linear(dim, dim, bias=qk_bias)
        self.k = nn.Linear(dim, dim, bias=qk_bias)
        self.v = nn.Linear(dim, dim)
        if qkv_conv:
            for name in NAMES:
                conv = nn.Conv1d(self.head_dim, self.head_dim, kernel_size, groups=self.head_dim)
                self.add_module(f"{name}_conv", conv)
        if relative:
            self.distance_keys = nn.Parameter(torch.zeros(2 * max_distance, num_heads, self.head_dim))
            self.distance_bias = nn.Parameter(torch.zeros(2 * max_distance, num_heads))
            self.query_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        self.proj = nn.Linear(dim, dim)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(
            patterns=frozenset(
                {"causal-self", "causal-cross"} if self.causal else {"noncausal-self", "noncausal-cross"}
            ),
            mask=not self.qkv_conv or self.compat == "authors",
            streaming=self.causal,
            permutation_equivariant=not (self.causal or self.relative or self.qkv_conv),
        )

    def distance_scores(self, q: Tensor, m: int) -> Tensor:
        """``q_i . R[P + j - i] + beta[P + j - i]``, of queries that are the last n of m tokens, not scaled.

        Args:
            q: (B, H, n, D).
            m: number of keys.

        Returns:
            (B, H, n, m).
        """
        first, last = self.max_distance - m + 1, self.max_distance + q.shape[2]
        table = self.distance_keys[first:last].to(q.dtype)
        by_distance = torch.einsum("bhnd,thd->bhnt", q, table)
        return shift(by_distance + self.distance_bias[first:last].t()[:, None].to(by_distance.dtype), m)

    def _convolve(self, name: str, x: Tensor, tail: Tensor) -> Tensor:
        """Causal convolution of (B, H, N, D) that goes on after ``tail`` (B, H, kernel_size - 1, D)."""
        conv = self.get_submodule(f"{name}_conv")
        longer = torch.cat([tail.to(x.dtype), x], 2)
        return conv(longer.flatten(0, 1).mT).mT.unflatten(0, x.shape[:2])

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: masks.Mask | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        source, exist = x, valid
        if context is not None:
            source, exist = context.flatten(1, -2), flat_valid(context_valid)
        ordered = self.causal and context is None
        stream = Stream(source, exist, state, "state" in returns)
        start = stream.start
        n, m = x.shape[1], start + source.shape[1]
        if self.relative and max(n, m) > self.max_distance:
            raise ValueError(
                f"x has {n} tokens and reads {m}, {start} of them remembered; with max_distance={self.max_distance} a "
                f"sequence has at most {self.max_distance}"
            )
        heads, tails = {}, {}
        for name in NAMES:
            given, there = (x, valid) if name == "q" else (source, exist)
            part = split_heads(self.get_submodule(name)(given), self.num_heads)
            if there is not None:  # after the projection: a bias must not speak for a token that does not exist
                part = part.masked_fill(~there[:, None, :, None], 0.0)
            if self.qkv_conv:
                reach, key = self.kernel_size - 1, f"{name}_tail"
                tail = part.new_zeros(*part.shape[:2], reach, part.shape[3]) if state is None else state[key]
                tails[key] = torch.cat([tail.to(part.dtype), part], 2)[:, :, part.shape[2] :]
                part = self._convolve(name, part, tail)
            heads[name] = part
        q, k, v = (heads[name] for name in NAMES)
        k, v = stream.join(k=k, v=v)
        exists = stream.exists
        new = stream.next(k=k, v=v, valid=stream.slots, **tails) if stream.keep else None
        bias = self.distance_scores(q, m) * self.scale if self.relative else None
        if self.relative:
            q = q + self.query_bias[:, None].to(q.dtype)
        out = attention(
            q, k, v, mask=stream.mask(mask) if ordered else mask, valid=exists, bias=bias, scale=self.scale,
            q_pos=stream.q_pos if context is None else None,
            dropout_p=self.attn_drop if self.training else 0.0, return_weights="weights" in returns,
        )  # fmt: skip
        out, weights = out if "weights" in returns else (out, None)
        return Output(self.proj(merge_heads(out)), state=new, weights=weights)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``RelativeMultiHeadAttention`` or ``MultiHeadAttention`` (with ``qk_bias``)."""
        theirs = Released(state_dict, "the authors' RelativeMultiHeadAttention or MultiHeadAttention")
        rules: dict[str, Rule] = {
            r"output\.(weight|bias)": r"proj.\1",
            "key_pos_embeddings": "distance_keys",
            "key_pos_bias": "distance_bias",
            "query_pos_bias": "query_bias",
        }
        for name in ("query", "key", "value"):
            rules[rf"{name}\.(?:\w+\.)*conv\.(weight|bias)"] = rf"{name[0]}_conv.\1"
            rules[rf"{name}\.(?:\w+\.)*(weight|bias)"] = rf"{name[0]}.\1"
        return theirs.close(theirs.renamed(rules))
