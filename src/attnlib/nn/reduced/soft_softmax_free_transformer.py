"""Softmax-free attention (SOFT): a Gaussian kernel of one projection, read through landmarks that a convolution makes.

Lu et al., 2021, "SOFT: Softmax-free Transformer with Linear Complexity", arXiv 2110.11945; 2022, "Softmax-free Linear
Transformers", arXiv 2207.03341 (the normalized form). Queries are their own keys, ``q = W_q x / D^(1/4)``, and with
``K(a, b) = exp(-|a - b|^2 / 2)`` and the landmarks ``l = GELU(LN(conv_(r x r, stride r) q))``, one convolution for all
heads,

    ``o = K(q, l) K(l, l)^-1 K(l, q) v + local(v)``,  ``y = W_o o``,

``local`` being a ``k x k`` convolution with one filter per head. The inverse is found by Newton's steps
(:func:`attnlib.ops.newton_inverse`), whose gradient is that of an inverse. ``norm`` divides it on both sides by the
root of the rows' sums of ``K(l, l)``: the norm of the map then does not grow with the number of tokens. ``ratio=1``
reads the transformed tokens directly: ``K(l, l) v``.

A kernel of distances between projections of one kind has neither a mask nor another sequence to read: masks and
contexts are refused.

Differs from the authors' code: maps that ``ratio`` does not divide are completed with zeros where theirs leaves out the
last rows and columns; landmarks without tokens are no landmarks; the first guess of the normalized form is made for
each sample, where theirs takes one for the whole batch. ``compat="authors"`` does as theirs. Their
normalized classes cannot be built (a parent of theirs has another name than the one they call); with the name mended
they are what ``norm=True`` is. Their ``ratio=1`` needs a number of landmarks that nobody sets, and counts a class token
that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints
from ...ops.nystrom import finely, gaussian_kernel, nystrom_attention
from ...types import Traits, to_tuple
from ..base import Mechanism
from ..layers import (
    conv_any_size,
    flat_valid,
    head_dim_of,
    merge_heads,
    own_weight,
    split_heads,
    strided_valid,
    zero_invalid,
)
from ..registry import register
from ..released import Released


@register("soft-softmax-free-transformer", "soft", "softmax-free-attention")
class SoftmaxFreeAttention(Mechanism):
    """Gaussian attention of one projection through landmarks, and a convolution of the values, on images.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        ratio: sides of the cell that makes a landmark; 1 for none, the whole kernel.
        conv_size: side of the convolution of values, odd; 0 for none.
        max_iter: Newton's steps.
        norm: the normalized form.
        head_dim: width of a head; ``dim / num_heads`` by default.
        compat: ``"authors"``: rows and columns behind the last whole cell make no landmark, and with ``norm`` a batch
            has one first guess, so that its samples depend on one another.

    Shapes: x and y (B, H, W, C). Cost: O(N m D + m^3) with m = N / ratio^2 landmarks.

    Reference: Lu et al., 2021, arXiv 2110.11945, section 3; Lu et al., 2022, arXiv 2207.03341, section 3.4.

    >>> import torch
    >>> SoftmaxFreeAttention(dim=16, num_heads=2, ratio=4)(torch.randn(2, 8, 12, 16)).shape
    torch.Size([2, 8, 12, 16])
    """

    class_traits = Traits(
        grid_ranks=frozenset({2}), work={"N": 3}, memory={"N": 2}, gradient="surrogate", batch_independent=True
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        ratio: int | Sequence[int] = 2,
        conv_size: int = 3,
        max_iter: int = 20,
        norm: bool = False,
        head_dim: int | None = None,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        rows, columns = check_ints("ratio", to_tuple("ratio", ratio, 2), least=1)
        self.ratio = (rows, columns)
        if check_int("conv_size", conv_size, least=0) and conv_size % 2 == 0:
            raise ValueError(f"conv_size must be odd, or 0 for no convolution, got {conv_size}")
        self.num_heads, self.compat = num_heads, compat
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        self.max_iter, self.normalized = check_int("max_iter", max_iter, least=1), check_flag("norm", norm)
        inner = num_heads * self.head_dim
        self.q, self.v, self.proj = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.whole = self.ratio == (1, 1)
        self.landmark: nn.Module = (
            nn.Linear(self.head_dim, self.head_dim, bias=False)
            if self.whole
            else nn.Conv2d(self.head_dim, self.head_dim, self.ratio, self.ratio, bias=False)
        )
        self.landmark_norm = nn.LayerNorm(self.head_dim)
        pad = conv_size // 2
        self.local = (
            nn.Conv2d(num_heads, num_heads, conv_size, padding=pad, groups=num_heads, bias=False) if conv_size else None
        )

    @property
    def traits(self) -> Traits:
        exact = self.normalized or self.whole
        return self.class_traits.but(
            gradient="exact" if exact else "surrogate",
            batch_independent=not (self.normalized and self.compat and not self.whole),
            work={"N": 2 if self.whole else 3},
            permutation_equivariant=self.whole and self.local is None,
        )

    def landmarks(self, q: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, h, w, heads * D) queries before their scale -> (B, heads, m, D), and which of them exist (B, m)."""
        if self.compat is not None and not self.whole:
            # A map that is smaller than a cell, on which theirs fails, is read as it is.
            height, width = (n - n % r or n for n, r in zip(q.shape[1:3], self.ratio, strict=True))
            q, valid = q[:, :height, :width], None if valid is None else valid[:, :height, :width]
        dtype, scale = q.dtype, self.head_dim**0.25
        # The norm of a narrow head multiplies what a sum over a cell has lost to rounding.
        q = zero_invalid(q, valid) / scale if self.whole else finely(zero_invalid(q, valid)) / scale
        batch, grid = q.shape[0], tuple(q.shape[1:3])
        heads = split_heads(q, self.num_heads)
        if isinstance(self.landmark, nn.Conv2d):
            cells = conv_any_size(
                self.landmark, heads.reshape(batch * self.num_heads, *grid, self.head_dim),
                self.landmark.weight.to(heads.dtype), None,
            )  # fmt: skip
            heads = cells.reshape(batch, self.num_heads, cells.shape[1] * cells.shape[2], self.head_dim).to(dtype)
            valid = strided_valid(valid, self.ratio)
        else:
            heads = self.landmark(heads)
        return F.gelu(self.landmark_norm(heads)), flat_valid(valid)

    def kernel(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, heads, N, N): what stands for the kernel of all pairs of tokens, without the convolution."""
        q, marks, exist = self._read(x, valid)
        if self.whole:
            return gaussian_kernel(marks, marks)
        out: Tensor = nystrom_attention(
            q, marks, q, valid=flat_valid(valid), landmarks_valid=exist, normalize=self.normalized, steps=self.max_iter,
            shared=self.compat is not None, return_weights=True,
        )[1]  # fmt: skip
        return out

    def _read(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        q = self.q(x)
        return split_heads(q / self.head_dim**0.25, self.num_heads), *self.landmarks(q, valid)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        q, marks, exist = self._read(x, valid)
        values = zero_invalid(self.v(x), valid)
        v = split_heads(values, self.num_heads)
        if self.whole:
            weights = gaussian_kernel(marks, marks)
            out = (weights @ v.to(weights.dtype)).to(v.dtype)
        else:
            out = nystrom_attention(
                q, marks, v, valid=flat_valid(valid), landmarks_valid=exist, normalize=self.normalized,
                steps=self.max_iter, shared=self.compat is not None,
            )  # fmt: skip
        y = merge_heads(out, x.shape[1:-1])
        if self.local is not None:
            # One filter per head, for all its channels.
            weight = own_weight(self.local, "softmax-free attention").repeat_interleave(self.head_dim, 0)
            near = F.conv2d(
                values.permute(0, 3, 1, 2), weight.to(values.dtype), padding=self.local.padding, groups=weight.shape[0]
            )
            y = y + near.permute(0, 2, 3, 1)
        return self.proj(y)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``SoftmaxFreeAttention`` and ``SoftmaxFreeNormAttention``."""
        theirs = Released(state_dict, "the authors' SoftmaxFreeAttention")
        return theirs.close(
            theirs.renamed(
                {
                    r"W_([qv])\.(weight|bias)": r"\1.\2",
                    r"ff\.(weight|bias)": r"proj.\1",
                    r"attn\.Qlandmark_op\.weight": "landmark.weight",
                    r"attn\.Qnorm_act\.0\.(weight|bias)": r"landmark_norm.\1",
                    r"attn\.conv\.weight": "local.weight",
                }
            )
        )
