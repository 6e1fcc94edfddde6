"""KV-cache compression: a scorer, a budget and a selector, attached with :func:`attnlib.attach`."""

from .base import KVCompression
from .budgets import AcrossHeads, AcrossLayers, Budget, Cap, PerLayer, Pyramid, Ratio
from .scorers import (
    CacheView,
    ExpectedAttention,
    KeyNorm,
    LastQuery,
    ObservedAttention,
    Product,
    RandomScores,
    Recency,
    Scorer,
    SnapKVVotes,
    ValueNorm,
)
from .selectors import TopK
from .snapkv import SnapKV, SnapKVByHead
from .votes import snapkv_votes

__all__ = [
    "AcrossHeads",
    "AcrossLayers",
    "Budget",
    "CacheView",
    "Cap",
    "ExpectedAttention",
    "KVCompression",
    "KeyNorm",
    "LastQuery",
    "ObservedAttention",
    "PerLayer",
    "Product",
    "Pyramid",
    "RandomScores",
    "Ratio",
    "Recency",
    "Scorer",
    "SnapKV",
    "SnapKVByHead",
    "SnapKVVotes",
    "TopK",
    "ValueNorm",
    "snapkv_votes",
]
