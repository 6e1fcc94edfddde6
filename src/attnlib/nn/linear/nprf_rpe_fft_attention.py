"""Kernelized attention with relative positions (Luo et al., 2021): random features, a Toeplitz factor, an FFT."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.feature_maps import positive_random_features, random_directions, trigonometric_random_features
from ...ops.toeplitz import FORMS, toeplitz_attention
from ...positions import relative_offsets
from ...types import Output, State, Traits, check_choice, to_tuple
from ..base import Mechanism
from ..frame import Stream
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register

#: A state's keys meet so few new queries through the map itself: fewer products than a transform of all keys takes.
FEW = 64


@register("nprf-rpe-fft-attention", "nprf", "kernelized-attention-rpe")
class KernelizedRelativeAttention(Mechanism):
    """Linear attention that knows relative positions, and whose random features stay bounded.

    ``o_i = sum_j e^(b_{j-i}) (phi(q_i) . phi(k_j)) v_j / sum_j e^(b_{j-i}) (phi(q_i) . phi(k_j))`` with a learned
    scalar ``b`` per head and displacement. ``e^(b_{j-i})`` is a Toeplitz matrix, so that the sums over j of
    ``phi(k_j) v_j`` are correlations, which an FFT makes in O(N log N)
    (:func:`attnlib.ops.toeplitz.toeplitz_attention`). On images ``b`` depends on both displacements and the transform
    has two axes. In expectation the weights are softmax attention's with ``exp(q_i . k_j + b_{j-i})``.

    ``phi`` are positive random features ``m^(-1/2) exp(w_r . x - |x|^2 / 2)``, ``w_r ~ N(0, I)``. Their relative error
    grows like the exponential of the squared norms, so queries and keys are normalised first: ``q <- sqrt(s) q / |q|``
    and likewise ``k``, which gives scores between ``-s`` and ``s``.

    Causal attention lets ``e^b`` be zero for later keys. Every pair of tokens has its own factor, so there is no state
    of fixed size: decoding keeps keys and values as softmax attention does, and one step costs O(N).

    Rounding in the transform is relative to the largest product of the sequence and reaches all rows; in float32 the
    future thus touches the past in the fifth digit. ``form="fft64"`` transforms in float64; ``form="direct"`` builds
    the map instead, exactly causal, O(N^2), and faster for short sequences.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        num_features: ``m``, random directions; trigonometric features are twice as wide.
        features: ``"positive"`` or ``"trigonometric"``; the latter's weights may be negative.
        norm: ``"l2"`` normalises queries and keys; ``"none"`` divides both by ``D^(1/4)`` as Performer does.
        scale: ``s``.
        orthogonal: directions at right angles, in blocks of D.
        max_distance: P; displacements beyond ``P - 1`` share the last entry. A number, or one per axis.
        rank: 1 for sequences, 2 for images.
        relative: the bias ``b``; without it this is Performer.
        causal: every token reads itself and earlier ones; sequences only.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        form: ``"fft"`` (by default), ``"fft64"`` or ``"direct"``; changes speed and rounding, not the result.

    The paper comes without code that could be found. Its ``w_r`` are a buffer here, drawn once and shared by the heads;
    :meth:`redraw` draws new ones.

    Reference: Luo et al., 2021, arXiv 2106.12566.

    >>> KernelizedRelativeAttention(dim=16, num_heads=2, causal=True)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self"}),
        grid_ranks=frozenset({1, 2}),
        streaming=True,
        work={"N": 2},
        memory={"N": 2},
        permutation_equivariant=True,
        weights=True,
    )

    directions: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_features: int = 64,
        features: str = "positive",
        norm: str = "l2",
        scale: float = 1.0,
        orthogonal: bool = False,
        max_distance: int | Sequence[int] = 512,
        rank: int = 1,
        relative: bool = True,
        causal: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        form: str | None = None,
    ):
        super().__init__(dim)
        check_choice("features", features, ("positive", "trigonometric"))
        check_choice("norm", norm, ("l2", "none"))
        check_choice("form", form, (*FORMS, None))
        check_choice("rank", rank, (1, 2))
        if causal and rank != 1:
            raise ValueError("causal=True needs rank=1: an image has no order of tokens")
        if num_features < 1 or scale <= 0:
            raise ValueError(
                f"num_features must be at least 1 and scale positive, got num_features={num_features}, scale={scale}"
            )
        self.max_distance = to_tuple("max_distance", max_distance, rank)
        if min(self.max_distance) < 1:
            raise ValueError(f"max_distance must be at least 1, got {max_distance}")
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.features, self.norm, self.scale, self.orthogonal = features, norm, scale, orthogonal
        self.rank, self.causal, self.form = rank, causal, form
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.bias: nn.Parameter | None = None
        if relative:
            self.bias = nn.Parameter(torch.zeros(num_heads, *(2 * p - 1 for p in self.max_distance)))
        self.register_buffer("directions", random_directions(num_features, self.head_dim, orthogonal))

    @property
    def traits(self) -> Traits:
        power = 2 if self.form == "direct" else 1
        return self.class_traits.but(
            patterns=frozenset({"causal-self" if self.causal else "noncausal-self"}),
            grid_ranks=frozenset({self.rank}),
            streaming=self.causal,
            work={"N": power},
            memory={"N": power},
            permutation_equivariant=not self.causal and self.bias is None,
        )

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new random directions."""
        count, width = self.directions.shape
        with torch.no_grad():
            self.directions.copy_(random_directions(count, width, self.orthogonal, generator))

    def displacement_bias(self, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """``b`` of ``sizes`` displacements ``key - query`` per axis from ``starts`` on, ``-inf`` where no pair meets.

        Returns:
            (H or 1, *sizes).
        """
        if self.bias is None:
            b = self.directions.new_zeros(1, *sizes)
        else:
            b = relative_offsets(self.bias, starts, sizes)
        if self.causal:
            later = torch.arange(sizes[0], device=b.device) + starts[0] > 0
            b = b.masked_fill(later, float("-inf"))
        return b

    def feature_map(self, x: Tensor, queries: bool = False) -> Tensor:
        """``phi`` of queries or keys (B, H, N, D), normalised; (B, H, N, m), or 2 m for trigonometric features."""
        x = F.normalize(x, dim=-1) * math.sqrt(self.scale) if self.norm == "l2" else x * self.head_dim**-0.25
        if self.features == "trigonometric":
            return trigonometric_random_features(x, self.directions)
        return positive_random_features(x, self.directions, stable=queries)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        grid, exists = x.shape[1:-1], flat_valid(valid)
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.q, self.k, self.v))
        n, form = q.shape[2], self.form
        stream = Stream(x.flatten(1, -2), exists, state, "state" in returns)
        k, v = stream.join(k=k, v=v)
        exists = stream.exists
        new_state = stream.next(k=k, v=v, valid=stream.slots)
        if state is not None and n <= FEW:
            form = "direct"
        if not torch.compiler.is_compiling() and n == 0:  # there are no displacements
            weights = q.new_zeros(*q.shape[:3], k.shape[2]) if "weights" in returns else None
            return Output(self.proj(merge_heads(q, grid)), state=new_state, weights=weights)
        start = k.shape[2] - n
        if self.rank == 1:
            bias = self.displacement_bias((1 - n - start,), (n + k.shape[2] - 1,))
        else:
            bias = self.displacement_bias([1 - side for side in grid], [2 * side - 1 for side in grid])
        out = toeplitz_attention(
            self.feature_map(q, queries=True), self.feature_map(k), v, bias, grid=None if self.rank == 1 else grid,
            valid=exists, positive=self.features == "positive", form=form, return_weights="weights" in returns,
        )  # fmt: skip
        out, weights = out if "weights" in returns else (out, None)
        return Output(self.proj(merge_heads(out, grid)), state=new_state, weights=weights)
