"""Steering attention inside pretrained models, attached with :func:`attnlib.attach`."""

from .head_scaling import HeadScale
from .lacing import DualAttention
from .sink_calibration import HeadSearch, SinkCalibration, calibrate, label_accuracy, search_heads
from .softpag import SoftPAG, guide, hunt_heads
from .uniform_maps import UniformMaps
from .visual_boost import VisualBoost, boost, boost_sets
from .visual_redistribution import VisualRedistribution, find_sink_dims, redistribute, sink_tokens

__all__ = [
    "DualAttention",
    "HeadScale",
    "HeadSearch",
    "SinkCalibration",
    "SoftPAG",
    "UniformMaps",
    "VisualBoost",
    "VisualRedistribution",
    "boost",
    "boost_sets",
    "calibrate",
    "find_sink_dims",
    "guide",
    "hunt_heads",
    "label_accuracy",
    "redistribute",
    "search_heads",
    "sink_tokens",
]
