"""Operators on ``(q, k, v)``: an eager specification and faster backends for each."""

from .attention import BACKENDS, attention, attention_partial, explain, use_backend
from .block_sparse import BlockPlan, block_sparse_attention, block_sparse_partial
from .linear import LinearOutput, linear_attention, linear_partial
from .neighborhood import neighborhood_attention, neighborhood_partial
from .partition import partition_attention, window_attention
from .sampled import deformable_attention, deformable_attention_3d
from .split_decoding import split_decoding, split_partial

__all__ = [
    "BACKENDS",
    "BlockPlan",
    "LinearOutput",
    "attention",
    "attention_partial",
    "block_sparse_attention",
    "block_sparse_partial",
    "deformable_attention",
    "deformable_attention_3d",
    "explain",
    "linear_attention",
    "linear_partial",
    "neighborhood_attention",
    "neighborhood_partial",
    "partition_attention",
    "split_decoding",
    "split_partial",
    "use_backend",
    "window_attention",
]
