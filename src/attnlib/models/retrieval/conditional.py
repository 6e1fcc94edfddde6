"""Conditional cross attention: one ViT, one space of embeddings per question that is asked about an image.

The last self-attention of a ViT becomes a cross-attention: tokens ``X`` of the blocks before it give keys and values, a
condition c (colour, shape, length of sleeves, ...) gives the query, ``Y = softmax(W_q e_c (W_k X)^T / sqrt(d)) W_v X``;
behind a residual and an MLP the embedding is ``z = l2norm(FC(Y))``. Trained by triplets within one condition.

In the paper the condition is repeated to N + 1 equal queries, of which the class token's row is read: rows of equal
queries are equal, so one is computed here. ``X`` does not depend on the condition: it is computed once for all.

Reference: Song et al., 2023, "Conditional Cross Attention Network for Multi-Space Embedding without Entanglement in
Only a SINGLE Network", arXiv 2307.13254. No code was released: what a condition is made of (``query``), what the
residual adds (``residual``) and the widths are our reading.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_int,
    check_real,
    check_tensor,
    check_type,
    check_valid,
    check_whole,
    describe,
    readable,
    shaped,
)
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import Mlp
from ..protocol import TaskModel, Terms

QUERIES = ("onehot", "table")
RESIDUALS = ("query", "token", "none")


class Embeddings(NamedTuple):
    """Unit vectors (B, D) or (B, K, D) and the conditions that they answer, (B,) or (K,)."""

    vectors: Tensor
    conditions: Tensor


class TrunkOfViT(nn.Module):
    """The tokens in front of the last block of a ViT of this library or of timm.

    Args:
        vit: with ``forward_intermediates``.
        drop: blocks that are left out at the end.
    """

    def __init__(self, vit: nn.Module, drop: int = 1):
        super().__init__()
        if not hasattr(vit, "forward_intermediates"):
            raise TypeError(f"vit must be a ViT with forward_intermediates, got {type(vit).__name__}")
        self.vit, self.drop = vit, check_int("drop", drop, least=0)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, C), the class token (and registers) first."""
        vit: Any = self.vit
        ((patches, prefix),) = vit.forward_intermediates(
            images, indices=[-1 - self.drop], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True,
            return_prefix_tokens=True,
        )  # fmt: skip
        return torch.cat([prefix, patches], 1)


class ConditionalCrossAttention(TaskModel):
    """A space of embeddings for every condition, over a trunk that runs once.

    Args:
        trunk: from images to tokens (B, N, dim), such as :class:`TrunkOfViT`; ``nn.Identity()`` for tokens.
        num_conditions: K.
        dim: width of tokens.
        embed_dim: D, of embeddings.
        num_heads: heads.
        query: ``"onehot"``: a linear map of a one-hot vector; ``"table"``: a learned row each, without the bias.
        residual: what is added behind the attention: the ``"query"``, the first ``"token"`` of X, or ``"none"``.
        mlp_ratio: width of the MLP in widths.
        margin: of triplets.

    Shape:
        images as the trunk takes them; ``condition``: a number, (B,) numbers, or ``None`` for all K. Returns
        :class:`Embeddings` with vectors (B, D), or (B, K, D) for all.

    >>> model = ConditionalCrossAttention(nn.Identity(), 3, dim=16, embed_dim=8, num_heads=2)
    >>> model(torch.randn(2, 5, 16)).vectors.shape, model(torch.randn(2, 5, 16), 1).vectors.shape
    (torch.Size([2, 3, 8]), torch.Size([2, 8]))
    """

    def __init__(
        self, trunk: nn.Module, num_conditions: int, dim: int = 768, embed_dim: int = 256, num_heads: int = 12,
        query: str = "onehot", residual: str = "query", mlp_ratio: float = 4.0, margin: float = 0.3,
    ):  # fmt: skip
        super().__init__()
        check_int("dim", dim, least=1)
        check_choice("query", query, QUERIES)
        check_choice("residual", residual, RESIDUALS)
        self.trunk, self.dim, self.residual = trunk, dim, residual
        self.num_conditions = check_int("num_conditions", num_conditions, least=1)
        self.margin = check_real("margin", margin, least=0)
        self.conditions = nn.Parameter(torch.empty(num_conditions, dim))
        nn.init.trunc_normal_(self.conditions, std=0.02)
        self.condition_bias = nn.Parameter(torch.zeros(dim)) if query == "onehot" else None
        self.norm, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attend = SoftmaxAttention(dim, num_heads, context_dim=dim)
        self.mlp = Mlp(dim, check_real("mlp_ratio", mlp_ratio, above=0))
        self.final = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, check_int("embed_dim", embed_dim, least=1))

    def tokens(self, images: Any) -> Tensor:
        """X: what the trunk says of images, for :meth:`embed` under any condition."""
        found = self.trunk(images)
        found = getattr(found, "last_hidden_state", found)
        check_axes("tokens of the trunk", found, B=None, N=None, C=self.dim)
        return found

    def queries(self) -> Tensor:
        """(K, dim) e_c."""
        return self.conditions if self.condition_bias is None else self.conditions + self.condition_bias

    def _conditions(self, condition: Any, batch: int, device: torch.device) -> Tensor:
        if condition is None:
            return torch.arange(self.num_conditions, device=device)
        if not isinstance(condition, Tensor):
            check_int("condition", condition, least=0, most=self.num_conditions - 1)
            return torch.full((batch,), int(condition), device=device)
        check_whole("condition", condition)
        if condition.shape != (batch,):
            raise ValueError(f"condition must be ({batch},), one number per image, got {describe(condition)}")
        if (
            readable(condition)
            and batch
            and not 0 <= int(condition.min()) <= int(condition.max()) < self.num_conditions
        ):
            raise ValueError(f"condition must lie in [0, {self.num_conditions - 1}], got {condition.tolist()}")
        return condition

    def embed(self, tokens: Tensor, condition: int | Tensor | None = None, valid: Tensor | None = None) -> Embeddings:
        """Embeddings of tokens.

        Args:
            tokens: (B, N, dim) of :meth:`tokens`.
            condition: a number, (B,) numbers, or ``None``: all, each once.
            valid: (B, N) boolean, which tokens exist.
        """
        check_axes("tokens", tokens, B=None, N=None, C=self.dim)
        check_valid("valid", valid, tokens.shape[:2])
        numbers = self._conditions(condition, len(tokens), tokens.device)
        asked = self.queries().to(tokens.dtype)[numbers.long()]
        asked = asked.expand(len(tokens), -1, -1) if condition is None else asked.unsqueeze(1)  # (B, 1 or K, dim)
        y = self.attend(asked, self.norm(tokens), context_valid=valid)
        if self.residual == "query":
            y = y + asked
        elif self.residual == "token":
            y = y + tokens[:, :1]
        y = y + self.mlp(self.norm2(y))
        vectors = F.normalize(self.head(self.final(y)), dim=-1)
        return Embeddings(vectors if condition is None else vectors.squeeze(1), numbers)

    def forward(self, images: Any, condition: int | Tensor | None = None) -> Embeddings:
        return self.embed(self.tokens(images), condition)

    def loss(self, prediction: Embeddings, target: Tensor) -> Terms:
        """Triplets within each condition: ``mean [d(a, p) - d(a, n) + margin]_+`` over all triplets of the batch.

        Args:
            prediction: of :meth:`forward`, for all conditions or for one each.
            target: (B, K) the value of every attribute of an image, or (B,) of the one that was asked for; negative
                ones are unknown.

        Raises:
            ValueError: no triplet in the batch.
        """
        check_tensor("target", target)
        check_whole("target", target)
        vectors, conditions = prediction
        if vectors.dim() == 3:
            wanted: tuple[int, ...] = (len(vectors), self.num_conditions)
            groups = (
                [(vectors[:, c], target[:, c]) for c in range(self.num_conditions)] if target.shape == wanted else []
            )
        else:
            wanted = (len(vectors),)
            if target.shape == (len(vectors), self.num_conditions):
                target = target.gather(1, conditions[:, None]).squeeze(1)
            same = [conditions == c for c in range(self.num_conditions)]
            groups = [(vectors[s], target[s]) for s in same] if target.shape == wanted else []
        if not groups:
            raise ValueError(f"target must be {wanted} for vectors {tuple(vectors.shape)}, got {tuple(target.shape)}")
        total, count = vectors.new_zeros(()), 0
        for found, values in groups:
            part, number = triplets(found, values, self.margin)
            total, count = total + part, count + number
        if not count:
            raise ValueError("target leaves no triplet: no condition has two images of one value and one of another")
        return {"triplet": total / count}

    def predict(self, images: Any, condition: int | Tensor | None = None) -> Embeddings:
        """Embeddings without a gradient."""
        return self(images, condition)


@shaped(vectors="float (B, D)", values="whole (B)")
def triplets(vectors: Tensor, values: Tensor, margin: float) -> tuple[Tensor, int]:
    """The sum of ``[d(a, p) - d(a, n) + margin]_+`` over all triplets of a batch, Euclidean, and their number."""
    known = values >= 0
    vectors, values = vectors[known], values[known]
    gap = (vectors[:, None] - vectors[None]).square().sum(-1)
    d = torch.where(gap > 0, gap.clamp(min=1e-12).sqrt(), 0.0)  # no slope where two are the same
    same = values[:, None] == values[None]
    pairs = same & ~torch.eye(len(values), dtype=torch.bool, device=values.device)
    use = pairs[:, :, None] & ~same[:, None, :]  # anchor, positive, negative
    each = (d[:, :, None] - d[:, None, :] + margin).clamp(min=0)
    return (each * use).sum(), int(use.sum())


def compare(queries: Embeddings, gallery: Embeddings) -> Tensor:
    """(P, Q) cosines of embeddings that answer the same conditions.

    Args:
        queries: of one condition each, (P, D).
        gallery: (Q, D).

    Raises:
        ValueError: embeddings of several conditions, or of others on both sides: their spaces have nothing in common.
    """
    for name, side in (("queries", queries), ("gallery", gallery)):
        check_type(name, side, Embeddings)
        if side.vectors.dim() != 2:
            raise ValueError(f"{name} must answer one condition, got vectors {tuple(side.vectors.shape)}: choose one")
    asked = torch.cat([queries.conditions, gallery.conditions]).unique().tolist()
    if len(asked) > 1:
        raise ValueError(f"embeddings of the conditions {asked} lie in different spaces and cannot be compared")
    return queries.vectors @ gallery.vectors.mT
