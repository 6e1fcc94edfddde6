"""Efficient probing: learned queries read the tokens themselves, without key and output projections.

Psomas et al., 2025, "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling", arXiv 2506.10178. Q
queries ``u_j`` of C channels weigh the tokens ``x_n``, and each keeps its slice of the values,

    ``a_j = softmax_n(u_j x_n / sqrt(C))``,  ``y = concat_j sum_n a_jn W_v^(j) x_n``.

Values are linear, so ``W_v^(j) sum_n a_jn x_n`` is the same: pooled first, C numbers per query are projected instead of
N tokens. It is attention with Q heads whose keys are the tokens and whose queries have full width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checks import check_divides
from ...ops.modulation import grid_softmax, weighted_pool
from ..layers import plain
from ..registry import register
from ..released import Released
from .base import Pool


@register("efficient-probing", "ep", kind="pool")
class EfficientProbing(Pool):
    """``Q C + C^2 / d_out`` parameters; shapes x (B, N, C), y (B, C / d_out).

    With queries of zero it is mean pooling followed by ``W_v``. A probe is this, a BatchNorm without parameters and a
    linear map (:func:`attnlib.bench.probing.probe_head`).

    Args:
        dim: width C.
        num_queries: Q; its product with ``d_out`` must divide ``dim``.
        d_out: how many times narrower than the tokens the vector is.
        qkv_bias: bias of the values.

    What differs from the authors' code: ``num_heads`` other than 1, which breaks theirs, does not exist.

    Reference: Psomas et al., 2025, arXiv 2506.10178, section 3.

    >>> pool = EfficientProbing(dim=768)
    >>> sum(p.numel() for p in pool.parameters()), pool(torch.randn(2, 5, 768)).shape
    (614400, torch.Size([2, 768]))
    """

    def __init__(self, dim: int, num_queries: int = 32, d_out: int = 1, qkv_bias: bool = False):
        check_divides("d_out * num_queries", d_out * num_queries, "dim", dim)
        super().__init__(dim, dim // d_out)
        self.num_queries = num_queries
        self.v = nn.Linear(dim, self.out_dim, bias=qkv_bias)
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> tuple[Tensor, Tensor | None]:
        scores = x @ (self.queries * self.dim**-0.5).T
        pooled = weighted_pool(x, scores, valid=valid)  # (B, Q, C)
        count = self.num_queries
        if plain(self.v):
            y = torch.einsum("bqc,qdc->bqd", pooled, self.v.weight.unflatten(0, (count, -1))).flatten(1)
            y = y if self.v.bias is None else y + self.v.bias
        else:  # every query through all of the values, of which it keeps its slice
            y = self.v(pooled).unflatten(-1, (count, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)
        if not weights:
            return y, None
        return y, grid_softmax(scores, valid=valid).transpose(1, 2).unsqueeze(2).to(x.dtype)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``EfficientProbing``."""
        theirs = Released(state_dict, "the authors' EfficientProbing")
        rules = {r"cls_token": lambda match, value: {"queries": value.squeeze(0)}, r"v\.(weight|bias)": r"v.\1"}
        return theirs.close(theirs.renamed(rules))  # type: ignore[arg-type]
