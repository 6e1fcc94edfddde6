"""Efficient self-attention of Next-ViT and MedViTV2: keys and values of means of tokens in raster order.

Nejati Manzari et al., 2025, "Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood
Attention", arXiv 2502.13693; Li et al., 2022, "Next-ViT", arXiv 2207.05501. Queries are all tokens; keys and values are
made of ``BatchNorm(mean)`` of every ``r^2`` consecutive tokens, along the rows of the map as the release has it, or of
cells of ``r x r`` tokens. With ``r = 1`` this is plain attention.

Differs from the authors' code: tokens at the end that do not fill a run are read, as a shorter run, where theirs leaves
them out (``compat="authors"`` does so, too); any grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...masks import Mask
from ...ops import attention
from ...types import Output, Traits
from ..base import Mechanism
from ..layers import MapNorm, cell_means, flat_valid, head_dim_of, merge_heads, split_heads, strided_valid, through
from ..registry import register
from ..released import Released, Rule


@register("medvitv2", "e-mhsa", "efficient-self-attention")
class EfficientSelfAttention(Mechanism):
    """Attention to means of runs of tokens (E-MHSA).

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``. The authors' models have ``dim / 32``.
        sr_ratio: ``r``; a key stands for ``r^2`` tokens. 1: for itself, without a norm.
        pool: ``"raster"``: means of consecutive tokens, row by row; ``"grid"``: of square cells.
        qkv_bias: bias of the query, key and value projections.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        compat: ``"authors"``: tokens that do not fill a last run are left out, unless there is no other.

    Reference: Li et al., 2022, arXiv 2207.05501, section 3.3.

    >>> import torch
    >>> EfficientSelfAttention(dim=16, num_heads=2, sr_ratio=2)(torch.randn(2, 4, 6, 16)).shape
    torch.Size([2, 4, 6, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        mask=True,
        weights=True,
        work={"N": 2},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 1,
        pool: str = "raster",
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("pool", pool, ("raster", "grid"))
        check_choice("compat", compat, (None, "authors"))
        self.sr_ratio = check_int("sr_ratio", sr_ratio, least=1)
        self.pool, self.compat, self.num_heads, self.attn_drop = pool, compat, num_heads, attn_drop
        self.head_dim = head_dim_of(dim, num_heads)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.norm = MapNorm(dim) if sr_ratio > 1 else None
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        every = self.norm is None
        return self.class_traits.but(
            mask=every, weights=every, permutation_equivariant=every, batch_independent=every or not self.training
        )

    def _means(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What keys and values are made of, and which of it exists."""
        if self.norm is None:
            return x, valid
        side = self.sr_ratio
        if self.pool == "raster":
            x, valid, side = x.flatten(1, -2), flat_valid(valid), side**2
            if self.compat == "authors" and (whole := x.shape[1] // side * side):
                x, valid = x[:, :whole], valid if valid is None else valid[:, :whole]
        means, exists = cell_means(x, side, valid), strided_valid(valid, side)
        return self.norm(means, exists), exists

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        mask: Mask | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        means, exists = self._means(x, valid)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), self.k(means), self.v(means)))
        shown, weights = "weights" in returns, None
        out: Any = attention(
            q, k, v, mask=mask, valid=flat_valid(exists), scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0, return_weights=shown,
        )  # fmt: skip
        if shown:
            out, weights = out
        return Output(through(self.proj_drop, self.proj(merge_heads(out, x.shape[1:-1]))), weights=weights)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``E_MHSA``, also Next-ViT's."""
        theirs = Released(state_dict, "E_MHSA")
        rules: dict[str, Rule] = {
            r"(q|k|v|proj)\.(weight|bias)": r"\1.\2",
            r"norm\.(weight|bias|running_mean|running_var|num_batches_tracked)": r"norm.norm.\1",
        }
        return theirs.close(theirs.renamed(rules))
