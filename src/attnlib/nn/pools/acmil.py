"""ACMIL: attention pooling of bags by several branches, whose favourite instances are hidden at random in training.

Zhang et al., 2024, "Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", arXiv
2311.07125. M branches score the instances ``x_n`` of a bag, gated as in ABMIL (Ilse et al., 2018, 1802.04712),

    ``a_m = w_m^T (tanh(V x_n) * sigmoid(U x_n))``,  ``f_m = sum_n softmax_n(a_m) x_n``,
    ``f = sum_n mean_m softmax_n(a_m) x_n``,

or each by attention with a query of its own. In training, of the K instances that a branch scores highest, floor(K p)
chosen at random are hidden before the softmax: what they held goes to the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_divides,
    check_flag,
    check_float,
    check_int,
    check_real,
    check_valid,
    describe,
    readable,
)
from ...types import stats_dtype
from ..layers import merge_heads, split_heads
from ..registry import register
from ..released import Released, Rule
from .base import Pool


class Branches(NamedTuple):
    """What the branches of a pool say of a bag.

    Args:
        bag: (B, D), under the mean of their weights.
        branches: (B, M, D), of each.
        weights: (B, M, H, N), which sum to one over the instances that exist; hidden ones have none.
    """

    bag: Tensor
    branches: Tensor
    weights: Tensor


def hide_top(
    scores: Tensor, top_k: int, mask_ratio: float, valid: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """(..., N) boolean: which of the ``min(top_k, N)`` highest scores to hide, ``int(min(top_k, N) * mask_ratio)``.

    Args:
        scores: (B, ..., N).
        top_k: K.
        mask_ratio: p.
        valid: (B, N) boolean, which exist; the others are never hidden and do not count.
        noise: (B, ..., min(K, N)); the lowest numbers choose. Drawn uniformly by default.

    Raises:
        ValueError: another shape, numbers out of range, nothing of a bag would be left.

    >>> hide_top(torch.tensor([[3.0, 1.0, 2.0]]), 2, 0.5, noise=torch.tensor([[0.9, 0.1]])).tolist()
    [[False, False, True]]
    """
    check_float("scores", scores)
    n = scores.shape[-1]
    k = min(check_int("top_k", top_k, least=0), n)
    check_real("mask_ratio", mask_ratio, least=0, most=1)
    own = torch.full_like(scores[..., :1], n, dtype=torch.long)
    if valid is not None:
        over = valid.view(len(valid), *(1,) * (scores.dim() - 2), n)
        own = over.sum(-1, keepdim=True).expand_as(own)
        scores = scores.masked_fill(~over, -torch.inf)
    counts = own.clamp(max=k)
    hide = torch.tensor([int(i * mask_ratio) for i in range(k + 1)], device=scores.device)[counts]
    if readable(hide):
        bare = ((hide >= own) & (hide > 0)).flatten(1).any(1)
        if bool(bare.any()):
            raise ValueError(
                f"mask_ratio={mask_ratio} with top_k={top_k} hides every instance of the bags "
                f"{bare.nonzero().flatten().tolist()[:8]}; bags must be larger than top_k, or mask_ratio below 1"
            )
    hide = torch.minimum(hide, own - 1)
    best = scores.topk(k, -1).indices
    if noise is not None and (not isinstance(noise, Tensor) or noise.shape != best.shape):
        raise ValueError(f"noise must be {tuple(best.shape)}, one for each that may be hidden, got {describe(noise)}")
    drawn = torch.rand(best.shape, device=scores.device) if noise is None else noise
    drawn = drawn.masked_fill(torch.arange(k, device=scores.device) >= counts, torch.inf)
    chosen = drawn.argsort(-1).argsort(-1) < hide
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, chosen)


class _Challenged(Pool):
    """Branches that weigh instances; a subclass scores them (:meth:`scores`) and reads them (:meth:`read`)."""

    def __init__(self, dim: int, num_branches: int, top_k: int, mask_ratio: float):
        super().__init__(dim)
        self.num_branches = check_int("num_branches", num_branches, least=1)
        self.top_k = check_int("top_k", top_k, least=0)
        self.mask_ratio = check_real("mask_ratio", mask_ratio, least=0, most=1)

    def scores(self, x: Tensor) -> Tensor:
        """(B, M, H, N)."""
        raise NotImplementedError

    def read(self, x: Tensor, weights: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) under the mean weights (B, H, N), and (B, M, D) under those of the branches (B, M, H, N)."""
        raise NotImplementedError

    def branches(self, x: Tensor, valid: Tensor | None = None, noise: Tensor | None = None) -> Branches:
        """Bag and branches, with the weights.

        Args:
            x: (B, N, C).
            valid: (B, N) boolean, which instances exist; at least one of every bag.
            noise: (B, M, H, min(top_k, N)) what chooses the hidden ones in training; drawn by default.

        Raises:
            ValueError: a bag of which nothing would be left.
        """
        check_axes("x", x, B=None, N=None, C=self.dim)
        check_valid("valid", valid, x.shape[:2])
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        scores = self.scores(x)
        scores = scores.to(stats_dtype(scores.dtype))
        absent = None if valid is None else ~valid[:, None, None]
        if self.training and self.top_k:
            hidden = hide_top(scores.detach(), self.top_k, self.mask_ratio, valid, noise)
            absent = hidden if absent is None else hidden | absent
        if absent is not None:
            empty = absent.all(-1, keepdim=True)
            scores = scores.masked_fill(absent & ~empty, -torch.inf)
        weights = scores.softmax(-1)
        if absent is not None:
            weights = weights.masked_fill(absent, 0.0)
        held = weights.to(x.dtype)
        bag, branches = self.read(x, held, weights.mean(1).to(x.dtype))
        return Branches(bag, branches, held)

    def pool(self, x: Tensor, valid: Tensor | None, weights: bool) -> tuple[Tensor, Tensor | None]:
        found = self.branches(x, valid)
        return found.bag, found.weights.flatten(1, 2).unsqueeze(2) if weights else None


@register("acmil", "acmil-ga", kind="pool")
class ACMILPool(_Challenged):
    """Gated branches that share their gate: x (B, N, C) to the bag's vector (B, C).

    With one branch and ``top_k=0`` it is the pool of ABMIL with gated attention. :meth:`branches` gives what every
    branch says, for heads of their own; :class:`attnlib.models.bags.acmil.ACMIL` is the whole model.

    Args:
        dim: width C.
        num_branches: M; the paper has 5.
        hidden_dim: width of the gate.
        top_k: K, how many of the highest scores may be hidden in training; 0 hides none.
        mask_ratio: p, the share of them that is. In evaluation nothing is hidden.

    What differs from the authors' code: batches; hidden instances get no weight at all (theirs e^-1e9, which float16
    does not hold); p = 1 in a bag of K instances or fewer, where theirs turns uniform, is refused.

    Reference: Zhang et al., 2024, arXiv 2311.07125, section 3.

    >>> pool = ACMILPool(dim=128).eval()
    >>> pool(torch.randn(2, 9, 128)).shape, pool.branches(torch.randn(2, 9, 128)).branches.shape
    (torch.Size([2, 128]), torch.Size([2, 5, 128]))
    """

    def __init__(
        self, dim: int, num_branches: int = 5, hidden_dim: int = 128, top_k: int = 10, mask_ratio: float = 0.6
    ):
        super().__init__(dim, num_branches, top_k, mask_ratio)
        self.v, self.u = (nn.Linear(dim, check_int("hidden_dim", hidden_dim, least=1)) for _ in range(2))
        self.score = nn.Linear(hidden_dim, num_branches)

    def scores(self, x: Tensor) -> Tensor:
        return self.score(torch.tanh(self.v(x)) * torch.sigmoid(self.u(x))).transpose(1, 2).unsqueeze(2)

    def read(self, x: Tensor, weights: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        return (mean @ x).squeeze(1), weights.squeeze(2) @ x

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention_Gated``."""
        theirs = Released(state_dict, "the authors' Attention_Gated")
        rules: dict[str, Rule] = {
            rf"attention_{a}{b}\.(weight|bias)": rf"{ours}.\1"
            for a, b, ours in (("V", r"\.0", "v"), ("U", r"\.0", "u"), ("weights", "", "score"))
        }
        return theirs.close(theirs.renamed(rules))


class _Reader(nn.Module):
    """Values, output map and norm of one branch; a norm of 1e-6 and dropout as the release has them."""

    def __init__(self, dim: int, num_heads: int, drop: float):
        super().__init__()
        self.num_heads = num_heads
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.drop, self.norm = nn.Dropout(drop), nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """(B, D) under weights (B, H, N)."""
        read = weights.unsqueeze(2) @ split_heads(self.v(x), self.num_heads)
        return self.norm(self.drop(self.proj(merge_heads(read)))).squeeze(1)


class _Asker(_Reader):
    def __init__(self, dim: int, num_heads: int, drop: float):
        super().__init__(dim, num_heads, drop)
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def scores(self, query: Tensor, x: Tensor) -> Tensor:
        """(B, H, N) of a query (D,)."""
        q, k = split_heads(self.q(query)[None, None], self.num_heads), split_heads(self.k(x), self.num_heads)
        return (q @ k.mT).squeeze(2) * (x.shape[-1] // self.num_heads) ** -0.5


@register("acmil-mha", kind="pool")
class ACMILHeads(_Challenged):
    """Branches with a query, heads and projections of their own: x (B, N, C) to the bag's vector (B, C).

    The bag is read with one more set of values, under the mean of the branches' weights, head by head.

    Args:
        dim: width C.
        num_branches: M.
        num_heads: heads of each.
        top_k: K, how many of a head's highest scores may be hidden in training; 0 hides none.
        mask_ratio: p, the share of them that is.
        drop: dropout behind the output map.
        bag_values: the bag has values of its own; without them, of a single branch, it is what the branch reads.

    Reference: Zhang et al., 2024, arXiv 2311.07125; ``ACMIL_MHA`` of the authors' code, and ``MHA`` without
    ``bag_values``.

    >>> ACMILHeads(dim=16).eval()(torch.randn(2, 9, 16)).shape
    torch.Size([2, 16])
    """

    def __init__(
        self, dim: int, num_branches: int = 5, num_heads: int = 8, top_k: int = 10, mask_ratio: float = 0.6,
        drop: float = 0.1, bag_values: bool = True,
    ):  # fmt: skip
        super().__init__(dim, num_branches, top_k, mask_ratio)
        if not check_flag("bag_values", bag_values) and num_branches > 1:
            raise ValueError(f"bag_values=False is for a single branch, got num_branches={num_branches}")
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", dim)
        check_real("drop", drop, least=0, below=1)
        self.queries = nn.Parameter(1e-6 * torch.randn(num_branches, dim))
        self.askers = nn.ModuleList(_Asker(dim, num_heads, drop) for _ in range(num_branches))
        self.bag = _Reader(dim, num_heads, drop) if bag_values else None

    def scores(self, x: Tensor) -> Tensor:
        each = zip(self.askers, self.queries, strict=True)
        return torch.stack([asker.scores(query, x) for asker, query in each], 1)  # type: ignore[operator]

    def read(self, x: Tensor, weights: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        each = zip(self.askers, weights.unbind(1), strict=True)
        branches = torch.stack([asker(x, own) for asker, own in each], 1)
        return branches[:, 0] if self.bag is None else self.bag(x, mean), branches

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the pooling parts of the authors' ``ACMIL_MHA``: ``q``, ``sub_attention``, ``bag_attention``.

        Also from those of their ``MHA``: ``q`` and ``attention``.
        """
        theirs = Released(state_dict, "the authors' ACMIL_MHA")
        ours = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "proj", "layer_norm": "norm"}
        rules: dict[str, Rule] = {r"q": lambda match, value: {"queries": value.squeeze(0)}}
        for name, to in ours.items():
            rules[rf"sub_attention\.(\d+)\.{name}\.(weight|bias)"] = rf"askers.\1.{to}.\2"
            rules[rf"bag_attention\.{name}\.(weight|bias)"] = rf"bag.{to}.\1"
            rules[rf"attention\.{name}\.(weight|bias)"] = rf"askers.0.{to}.\1"
        return theirs.close(theirs.renamed(rules))


def diversity(weights: Tensor) -> Tensor:
    """Mean cosine of the weights of two branches, over pairs, heads and bags: 1 where they agree, 0 where none meet.

    Args:
        weights: (B, M, N) or (B, M, H, N), M at least 2.

    Raises:
        ValueError: fewer branches.

    >>> float(diversity(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])))
    0.0
    """
    check_float("weights", weights)
    if weights.dim() not in (3, 4) or weights.shape[1] < 2:
        raise ValueError(f"weights must be (B, M, N) or (B, M, H, N) of two branches at least, got {describe(weights)}")
    unit = F.normalize(weights.to(stats_dtype(weights.dtype)), dim=-1)
    unit = unit.transpose(1, -2)  # (B, H, M, N), or as it was
    count = unit.shape[-2]
    first, second = torch.triu_indices(count, count, 1, device=unit.device)
    return (unit @ unit.mT)[..., first, second].mean()
