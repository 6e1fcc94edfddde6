"""Based (Arora et al., 2024): Taylor linear attention, a short softmax window, gated convolutions, each in its layers.

Linear attention on the second-order Taylor features of ``exp(q . k / sqrt(f))`` remembers everything in a state of one
size, the window reads the nearest tokens exactly, and the convolution compares neighbours at next to no cost. Feature
width and window are the dials between memory and recall. :mod:`attnlib.models.based` has the released mixture.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_real
from ...ops import _shards
from ...ops.feature_maps import taylor_features
from ...ops.linear import linear_attention
from ...positions import rotary_angles, rotate
from ...types import Output, State, Traits, exactly, stats_dtype
from ..base import Mechanism
from ..frame import Stream
from ..layers import (
    CausalConv,
    flat_valid,
    head_dim_of,
    last_tokens,
    merge_heads,
    split_heads,
    to_front,
    to_places,
)
from ..registry import register
from ..released import Released, Rule, split_rule
from .lolcats import window_part

_CAUSAL = Traits(
    patterns=frozenset({"causal-self"}), grid_ranks=frozenset({1}), streaming=True, work={"N": 1}, memory={"N": 1}
)


def _must_be_causal(causal: bool) -> None:
    if not causal:
        raise ValueError("causal=False is not possible: the mechanism has a direction; pass causal=True")


def _check_kept(name: str, held: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(held.shape) != shape:
        raise ValueError(
            f"state {name} must be {shape}, got {tuple(held.shape)}; it was made by another mechanism or for another "
            "batch"
        )
    return held


@register("based", "taylor-linear-attention")
class TaylorLinearAttention(Mechanism):
    """Causal linear attention whose features are the Taylor expansion of the exponential, to second order.

    ``y_i = sum_{j <= i} phi(q_i) . phi(k_j) v_j / (sum_{j <= i} phi(q_i) . phi(k_j) + eps)``,
    ``phi(q) . phi(k) = 1 + s + s^2 / 2`` with ``s = q . k / sqrt(f)``: weights of at least 1/2, without positions.
    Queries and keys have ``feature_dim`` channels per head, values ``head_dim``.

    The state of a sequence is (H, features, head_dim) and (H, features) numbers in float32, whatever its length.

    Differs from the authors' code: each product of two channels stands in the features once (``packed``), which gives
    the same weights with 153 instead of 273 features at ``feature_dim=16``; sums are float32 in every type; the state
    of a prompt is made of mapped keys also where theirs, with some of its kernels, takes them unmapped.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        feature_dim: width f of queries and keys of a head.
        head_dim: width of the values of a head; ``dim / num_heads`` by default.
        eps: added to the denominator. Theirs is 1e-12, and 1e-6 with the kernels of flash-linear-attention.
        packed: see above; False for their order of the state.
        chunk: tokens per chunk; changes speed, not the result.
        causal: must be True.

    Reference: Arora et al., 2024, arXiv 2402.18668, section 4.1.

    >>> TaylorLinearAttention(dim=16, num_heads=2, feature_dim=4)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = _CAUSAL
    cuts_sequence = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        feature_dim: int = 16,
        head_dim: int | None = None,
        eps: float = 1e-12,
        packed: bool = True,
        chunk: int = 128,
        causal: bool = True,
    ):
        super().__init__(dim)
        _must_be_causal(causal)
        check_int("feature_dim", feature_dim, least=1)
        check_int("chunk", chunk, least=1)
        check_real("eps", eps, least=0)
        self.num_heads, self.feature_dim = num_heads, feature_dim
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        self.eps, self.packed, self.chunk = eps, packed, chunk
        self.q = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.k = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.v = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    @property
    def features(self) -> int:
        """Width of the mapped queries and keys."""
        f = self.feature_dim
        return 1 + f + (f * (f + 1) // 2 if self.packed else f * f)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, state: State | None = None, returns: tuple[str, ...] = ()
    ) -> Output:
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.q, self.k, self.v))
        exists = flat_valid(valid)
        stream = Stream(x, exists, state, "state" in returns)
        with exactly(q):  # products of features overflow half precision
            q, k = (taylor_features(t.to(stats_dtype(t.dtype)), self.packed) for t in (q, k))
            out, final = linear_attention(
                q, k, v.to(q.dtype), normalizer="sum", eps=self.eps, valid=exists, state=state, chunk=self.chunk,
                return_state=True,
            )  # fmt: skip
        return Output(self.proj(merge_heads(out.to(v.dtype))), state=stream.next(**final.tensors))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``LinearAttention``."""
        theirs = Released(state_dict, "LinearAttention of Based")
        rules: dict[str, Rule] = {r"proj_([qkv])\.weight": r"\1.weight", r"out_proj\.weight": "proj.weight"}
        return theirs.close(theirs.renamed(rules))


@register("based-window", "based-sliding-attention")
class BasedWindow(Mechanism):
    """Softmax attention of every token to itself and the ``window_size`` tokens before it, with rotary positions.

    ``y_i = sum_{i - w <= j <= i} softmax_j(q_i . k_j / sqrt(D)) v_j``: a window of w is w + 1 keys, as flash attention
    counts. Decoding keeps the last w keys and values. Tokens that do not exist take no place in a window.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        window_size: tokens before its own that a token reads; 0 leaves its own alone. The authors' class takes twice
            the number: its ``window_size=128`` reads 64 tokens before, the width the paper names.
        rotary: base of rotary positions; ``None`` for none.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        causal: must be True.

    Reference: Arora et al., 2024, arXiv 2402.18668, section 4.2.

    >>> BasedWindow(dim=16, num_heads=2, window_size=3)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = _CAUSAL
    cuts_sequence = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        window_size: int = 64,
        rotary: float | None = 10000.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        causal: bool = True,
    ):
        super().__init__(dim)
        _must_be_causal(causal)
        check_int("window_size", window_size, least=0)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        if rotary is not None:
            check_real("rotary", rotary, above=0)
            if self.head_dim % 2:
                raise ValueError(f"rotary positions need an even width of heads, got dim / num_heads={self.head_dim}")
        self.window_size, self.rotary = window_size, rotary
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, state: State | None = None, returns: tuple[str, ...] = ()
    ) -> Output:
        batch, n, _ = x.shape
        x, now, order = to_front(x, flat_valid(valid))
        stream = Stream(x, now, state, "state" in returns)
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.q, self.k, self.v))
        if self.rotary is not None:
            angles = rotary_angles(stream.past[:, None] + torch.arange(n, device=x.device), self.head_dim, self.rotary)
            q, k = rotate(q, angles), rotate(k, angles)
        keys = self.window_size + 1  # the slot before the first key that is read stays empty
        shape = (batch, self.num_heads, self.window_size, self.head_dim)
        if state is None:
            k, v = (_shards.behind(t, keys, 2) for t in (k, v))
        else:
            k, v = (
                F.pad(torch.cat([_check_kept(name, state[name], shape).to(t.dtype), t], 2), (0, 0, 1, 0))
                for name, t in (("k", k), ("v", v))
            )
        before = torch.arange(keys, device=x.device) >= keys - stream.past[:, None].clamp(max=self.window_size)
        exists = torch.cat([before, stream.now], 1)
        high = stats_dtype(q.dtype)
        with exactly(q):
            part = window_part((q * self.head_dim**-0.5).to(high), k.to(high), v.to(high), exists, consistent=True)
            out = part.finish().to(v.dtype)
        new = None
        if stream.keep:
            at = stream.now.sum(1)[:, None] + torch.arange(1, keys, device=x.device)
            k, v = (t.gather(2, at[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in (k, v))
            new = stream.next(k=k, v=v)
        return Output(to_places(self.proj(merge_heads(out)), order), state=new)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``SlidingAttention`` with as many key as query heads."""
        theirs = Released(state_dict, "SlidingAttention of Based")
        rules: dict[str, Rule] = {
            r"Wqkv\.(weight|bias)": split_rule("q", "k", "v"),
            r"out_proj\.(weight|bias)": r"proj.\1",
        }
        theirs.leave(r"rotary_emb\.inv_freq", because="made from the base")
        return theirs.close(theirs.renamed(rules))


@register("based-conv", "base-conv")
class BaseConv(Mechanism):
    """A gated convolution: ``y = W_o (silu(conv(u_1)) * u_2)`` with ``[u_1, u_2] = W_i x``.

    The convolution is depthwise over the last ``kernel_size`` tokens; ``u_1`` and ``u_2`` are ``expand / 2`` times as
    wide as ``x``. Tokens that do not exist take no place in it.

    Differs from the authors' code: their decoding step, without their kernel, leaves out the bias of the convolution.

    Args:
        dim: width of ``x``.
        kernel_size: tokens that the convolution reads.
        expand: width of ``W_i``'s output over that of ``x``; 4 in the released models, 2 in the class.
        bias: biases of both projections.
        conv_bias: bias of the convolution; their kernel has one, their plain class has none.
        causal: must be True.

    Reference: Arora et al., 2024, arXiv 2402.18668, appendix; Arora et al., 2023, arXiv 2312.04927.

    >>> BaseConv(dim=8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    class_traits = _CAUSAL
    cuts_sequence = True

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        expand: int = 4,
        bias: bool = True,
        conv_bias: bool = False,
        causal: bool = True,
    ):
        super().__init__(dim)
        _must_be_causal(causal)
        check_int("expand", expand, least=1)
        if expand * dim % 2:
            raise ValueError(f"expand={expand} times dim={dim} must be even, it is split in two halves")
        self.inner = expand * dim // 2
        self.to_inner = nn.Linear(dim, 2 * self.inner, bias=bias)
        self.proj = nn.Linear(self.inner, dim, bias=bias)
        self.conv = CausalConv(self.inner, kernel_size, conv_bias)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, state: State | None = None, returns: tuple[str, ...] = ()
    ) -> Output:
        x, now, order = to_front(x, flat_valid(valid))
        stream = Stream(x, now, state, "state" in returns)
        u, gate = self.to_inner(x).chunk(2, -1)
        u = u if now is None else u.masked_fill(~now[..., None], 0.0)  # a bias speaks for no token
        past = self.conv.past
        if state is None:
            longer = _shards.behind(u, past, 1)
        else:
            tail = _check_kept("tail", state["tail"], (x.shape[0], past, self.inner))
            longer = torch.cat([tail.to(u.dtype), u], 1)
        kept = last_tokens(longer, past, None if now is None else now.sum(1))
        u = self.conv(u, longer[:, :past])
        y = self.proj(F.silu(u) * gate)
        return Output(to_places(y, order), state=stream.next(tail=kept))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``BaseConv``."""
        theirs = Released(state_dict, "BaseConv of Based")
        rules: dict[str, Rule] = {
            r"in_proj\.(weight|bias)": r"to_inner.\1",
            r"out_proj\.(weight|bias)": r"proj.\1",
            r"conv\.conv\.(weight|bias)": r"conv.\1",
        }
        return theirs.close(theirs.renamed(rules))


__all__ = ["BaseConv", "BasedWindow", "TaylorLinearAttention"]
