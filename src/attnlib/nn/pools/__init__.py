"""Pools: many tokens to one vector, ``(B, N, C) -> (B, D)``. A registry kind of their own, ``"pool"``."""

from .base import Pool

__all__ = ["Pool"]
