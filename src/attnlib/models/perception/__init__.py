"""Perception: images as an eye has them, images that look alike to it, and search that moves it."""

from .metamers import FoveatedTransfer, coral, decoder, encoder, texture_share

__all__ = ["FoveatedTransfer", "coral", "decoder", "encoder", "texture_share"]
