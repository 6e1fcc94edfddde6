"""Perception: images as an eye has them, images that look alike to it, and search that moves it."""

from .foveation import (
    cue_conflict,
    foveated_blur,
    generalisation,
    match_strength,
    occlude,
    shared_start,
    similarity,
    spatial_frequency,
    uniform_blur,
)
from .metamers import FoveatedTransfer, coral, decoder, encoder, texture_share
from .search import EccentricityPool, EccNet, asymmetry_index, search, search_map, search_slope, template_map

__all__ = [
    "EccNet", "EccentricityPool", "FoveatedTransfer", "asymmetry_index", "coral", "cue_conflict", "decoder", "encoder",
    "foveated_blur", "generalisation", "match_strength", "occlude", "search", "search_map", "search_slope",
    "shared_start", "similarity", "spatial_frequency", "template_map", "texture_share", "uniform_blur",
]  # fmt: skip
