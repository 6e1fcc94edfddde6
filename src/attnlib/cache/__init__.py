"""Caches, attached with :func:`attnlib.attach`: keys and values of language models that are dropped (a scorer, a budget
and a selector), and what denoisers computed at one step, used again at others."""

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
from .steps import DiffusersCache, StepCache
from .votes import snapkv_votes

__all__ = [
    "AcrossHeads",
    "AcrossLayers",
    "Budget",
    "CacheView",
    "Cap",
    "DiffusersCache",
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
    "StepCache",
    "TopK",
    "ValueNorm",
    "snapkv_votes",
]
