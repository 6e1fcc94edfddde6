"""Removing tokens from the sequence inside pretrained models: a scorer, a selector, a merger, a schedule."""

from .base import (
    ByAttention,
    Grid,
    Learned,
    Merger,
    Rate,
    Reduce,
    ReduceByAttention,
    Reduction,
    Scorer,
    Selector,
    Threshold,
    TopK,
)
from .flops import BlockCost, prefill_flops
from .vision import VisionAttention, class_attention, ensemble, received_attention
from .vtc_cls import VTCCLS

__all__ = [
    "VTCCLS",
    "BlockCost",
    "ByAttention",
    "Grid",
    "Learned",
    "Merger",
    "Rate",
    "Reduce",
    "ReduceByAttention",
    "Reduction",
    "Scorer",
    "Selector",
    "Threshold",
    "TopK",
    "VisionAttention",
    "class_attention",
    "ensemble",
    "prefill_flops",
    "received_attention",
]
