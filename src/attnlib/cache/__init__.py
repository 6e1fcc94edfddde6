"""KV-cache compression: a scorer, a budget and a selector, attached with :func:`attnlib.attach`."""

from .base import Budget, Cap, KVCompression, Ratio, top_per_head
from .snapkv import SnapKV, snapkv_votes

__all__ = ["Budget", "Cap", "KVCompression", "Ratio", "SnapKV", "snapkv_votes", "top_per_head"]
