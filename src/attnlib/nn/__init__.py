"""Mechanisms: projections, positions, one operator, output. One file each, a folder per family."""

from .base import Fusion, Mechanism, deploy
from .pools.base import Pool
from .registry import convert_state_dict, create, find, list_mechanisms, register

__all__ = [
    "Fusion",
    "Mechanism",
    "Pool",
    "convert_state_dict",
    "create",
    "deploy",
    "find",
    "list_mechanisms",
    "register",
]
