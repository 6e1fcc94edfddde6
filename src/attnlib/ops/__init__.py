"""Operators on ``(q, k, v)``: an eager specification and faster backends for each."""

from . import naive
from ._dispatch import derivatives, explain, operators, use_backend
from .attention import BACKENDS, attention, attention_partial
from .block_sparse import BlockPlan, block_sparse_attention, block_sparse_partial
from .halo import halo_attention
from .late_interaction import late_interaction
from .linear import LinearOutput, linear_attention, linear_partial
from .modulation import channel_attention, context_attention, depthwise
from .neighborhood import neighborhood_attention, neighborhood_partial
from .nystrom import gaussian_kernel, newton_inverse, nystrom_attention
from .partition import partition_attention, window_attention
from .patches import PatchOutput, patch_attention
from .points import Points, band_points, continuous_points, extreme_points, similarity_points
from .reduced import agent_attention, reduced_attention
from .reversed import reversed_attention
from .sampled import deformable_attention, deformable_attention_3d
from .scan import ScanOutput, selective_scan
from .split_decoding import split_decoding, split_partial
from .toeplitz import toeplitz_attention
from .window_weights import neighborhood_av, window_keys

__all__ = [
    "BACKENDS",
    "BlockPlan",
    "LinearOutput",
    "PatchOutput",
    "Points",
    "ScanOutput",
    "agent_attention",
    "attention",
    "attention_partial",
    "band_points",
    "block_sparse_attention",
    "block_sparse_partial",
    "channel_attention",
    "context_attention",
    "continuous_points",
    "deformable_attention",
    "deformable_attention_3d",
    "depthwise",
    "derivatives",
    "explain",
    "extreme_points",
    "gaussian_kernel",
    "halo_attention",
    "late_interaction",
    "linear_attention",
    "linear_partial",
    "naive",
    "neighborhood_attention",
    "neighborhood_av",
    "neighborhood_partial",
    "newton_inverse",
    "nystrom_attention",
    "operators",
    "partition_attention",
    "patch_attention",
    "reduced_attention",
    "reversed_attention",
    "selective_scan",
    "similarity_points",
    "split_decoding",
    "split_partial",
    "toeplitz_attention",
    "use_backend",
    "window_attention",
    "window_keys",
]
