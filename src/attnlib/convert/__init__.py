"""Turning trained models into others: what a student learns from a teacher, and a model from preferences.

>>> from attnlib.convert import linearize
"""

from ..nn.linear.heads import HeadMixer
from . import preference
from .agreement import Report
from .conversion import Conversion, linearize, load
from .distill import Distillation, FeatureLoss, LogitLoss, MapLoss, distill
from .dual_cross_attention import DualCrossAttention
from .scalekd import ScaleKD
from .swap import Swap, convertible, is_causal, swap
from .targets import target

__all__ = [
    "Conversion",
    "Distillation",
    "DualCrossAttention",
    "FeatureLoss",
    "HeadMixer",
    "LogitLoss",
    "MapLoss",
    "Report",
    "ScaleKD",
    "Swap",
    "convertible",
    "distill",
    "is_causal",
    "linearize",
    "load",
    "preference",
    "swap",
    "target",
]
