"""Caches, attached with :func:`attnlib.attach`: keys and values of language models that are dropped (a scorer, a budget
and a selector), and what denoisers computed at one step, used again at others."""

from .base import KVCompression
from .budgets import AcrossHeads, AcrossLayers, Budget, Cap, PerLayer, Pyramid, Ratio
from .harmonica import HarmoniCa, Router, RouterTraining, image_error_weights, train_router
from .inheritance import FeatureInheritance
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
    "FeatureInheritance",
    "HarmoniCa",
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
    "Router",
    "RouterTraining",
    "SnapKV",
    "SnapKVByHead",
    "SnapKVVotes",
    "StepCache",
    "TopK",
    "ValueNorm",
    "image_error_weights",
    "snapkv_votes",
    "train_router",
]
