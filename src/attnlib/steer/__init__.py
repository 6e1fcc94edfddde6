"""Steering attention inside pretrained models, attached with :func:`attnlib.attach`."""

from .lacing import DualAttention
from .softpag import SoftPAG, guide, hunt_heads
from .visual_redistribution import VisualRedistribution, find_sink_dims, redistribute, sink_tokens

__all__ = [
    "DualAttention",
    "SoftPAG",
    "VisualRedistribution",
    "find_sink_dims",
    "guide",
    "hunt_heads",
    "redistribute",
    "sink_tokens",
]
