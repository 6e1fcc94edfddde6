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

__all__ = [
    "FoveatedTransfer", "coral", "cue_conflict", "decoder", "encoder", "foveated_blur", "generalisation",
    "match_strength", "occlude", "shared_start", "similarity", "spatial_frequency", "texture_share", "uniform_blur",
]  # fmt: skip
