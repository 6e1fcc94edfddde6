"""LinFusion: linear attention that takes the place of self-attention in a trained denoiser, whatever the resolution.

Liu et al., 2024, "LinFusion: 1 GPU, 1 Minute, 16K Image", arXiv 2409.02097. What queries and keys are made of goes
through a small network first, ``g(x) = Linear(LeakyReLU(LN(Linear(x))))``, one for each:

    ``q = elu(W_q (x + g_q(x))) + 1``,   ``k = elu(W_k (x + g_k(x))) + 1``,   ``v = W_v x``,
    ``o_i = q_i mean_j(k_j^T v_j) / (q_i . mean_j(k_j) + eps)``.

Means and not sums: a row's weights add up to one but for ``eps``, and tokens that all come twice change nothing, so
that an image of another size is read like the one before.

Differs from the authors' code: both means are over the keys that exist, where theirs divides the values' by the number
of queries, which is another number in cross-attention (``compat="authors"``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_real
from ...grids import Layout
from ...ops.feature_maps import feature_map
from ...ops.linear import linear_attention
from ...types import Traits, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, through
from ..registry import register
from ..released import Released


def residual_network(dim: int, mid_dim: int | None) -> nn.Module:
    """``g``: two linear maps with a norm and a leaky ReLU between them; the identity for 0."""
    if mid_dim == 0:
        return nn.Identity()
    mid = dim if mid_dim is None else mid_dim
    return nn.Sequential(nn.Linear(dim, mid), nn.LayerNorm(mid), nn.LeakyReLU(inplace=True), nn.Linear(mid, dim))


@register("linfusion", "generalized-linear-attention")
class LinFusionAttention(Mechanism):
    """Linear attention over means of the keys, with a network before queries and keys.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        context_dim: width of ``context``; ``dim`` by default.
        mid_dim: hidden width of the networks; their width by default. 0 for none (-1 in the release): ``x`` is then
            taken twice.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        eps: added to the denominator.
        proj_drop: dropout of the output in training.
        compat: ``"authors"``: the values' mean is over as many keys as there are queries.

    Reference: Liu et al., 2024, arXiv 2409.02097.

    >>> LinFusionAttention(dim=16, num_heads=2)(torch.randn(2, 4, 6, 16)).shape
    torch.Size([2, 4, 6, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "noncausal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        layout=True,
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
    )
    zero_is_off = ("mid_dim",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        context_dim: int | None = None,
        mid_dim: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        eps: float = 1e-4,
        proj_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__(dim, context_dim)
        check_choice("compat", compat, (None, "authors"))
        self.num_heads, self.compat = num_heads, compat
        self.head_dim, self.eps = head_dim_of(dim, num_heads), check_real("eps", eps, least=0)
        self.q, self.g_q = nn.Linear(dim, dim, bias=qkv_bias), residual_network(dim, mid_dim)
        self.k = nn.Linear(self.context_dim, dim, bias=qkv_bias)
        self.g_k = residual_network(self.context_dim, mid_dim)
        self.v = nn.Linear(self.context_dim, dim, bias=qkv_bias)
        self.proj, self.proj_drop = nn.Linear(dim, dim, bias=proj_bias), nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        if self.context_dim == self.dim:
            return self.class_traits
        return self.class_traits.but(patterns=frozenset({"noncausal-cross"}))

    def features(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries (B, H, N, D) and keys (B, H, M, D), and values (B, H, M, D)."""
        source = x if context is None else context
        phi = feature_map("elu1")
        q, k = phi(self.q(x + self.g_q(x))), phi(self.k(source + self.g_k(source)))
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, self.v(source)))
        return q, k, v

    def mix(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.features(x, context)
        exists = flat_valid(valid if context is None else context_valid)
        n, m = q.shape[2], k.shape[2]
        high = stats_dtype(x.dtype)
        if exists is None:
            count = torch.full((x.shape[0], 1), m, dtype=high, device=x.device)
        else:
            count = exists.sum(1, keepdim=True).clamp(min=1).to(high)
        # Means over M keys and eps are sums and M eps.
        sums = exists is None and isinstance(m, int)
        out: Any = linear_attention(
            q, k, v, key_weights=None if sums else (1 / count).expand(-1, m), normalizer="sum", causal=False,
            valid=exists, eps=self.eps * m if sums else self.eps,
        )  # fmt: skip
        if self.compat is not None and context is not None:
            own = flat_valid(valid)
            queries = own.sum(1, keepdim=True).clamp(min=1).to(high) if own is not None else torch.full_like(count, n)
            out = (out * (count / queries)[:, None, :, None]).to(out.dtype)
        return through(self.proj_drop, self.proj(merge_heads(out, x.shape[1:-1])))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``GeneralizedLinearAttention``, or a diffusers ``Attention`` without the networks."""
        theirs = Released(state_dict, "GeneralizedLinearAttention")
        return theirs.close(
            theirs.renamed(
                {
                    r"to_([qkv])_\.(\d)\.(weight|bias)": r"g_\1.\2.\3",
                    r"to_([qkv])\.(weight|bias)": r"\1.\2",
                    r"to_out\.0\.(weight|bias)": r"proj.\1",
                }
            )
        )
