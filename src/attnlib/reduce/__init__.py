"""Removing tokens from the sequence inside pretrained models: a scorer, a selector, a merger, a schedule.

::

    with attnlib.attach(model, VTCCLS(keep=64, start=18), token_types=TokenTypes(image=IMAGE_TOKEN_ID)) as session:
        model.generate(**inputs)
    session.results["vtc-cls"]["saved"]  # share of the decoder's operations on the prompt

Before the decoder: :class:`VTCCLS`, :class:`VMTC`, or any scorer with :class:`Reduce`. Inside it: :class:`ATP`,
:class:`DyVTE`, :class:`ScheduledPruning` with the counts of :func:`greedy_search` or :func:`sigmoid_search`, or
:class:`ReduceByAttention`. They compose; tokens, cached keys and operations saved are those of all together.
"""

from ..hooks.vision import received_attention
from .atp_llava import ATP, ATPGate, adaptive_rate, atp_gates, atp_losses, spatial_scores
from .base import (
    ByAttention,
    Grid,
    Learned,
    Merger,
    Rate,
    Reduce,
    ReduceByAttention,
    Reduction,
    Scorer,
    Selector,
    Threshold,
    TopK,
)
from .composite import CompositeLayers
from .dyvte import (
    DyVTE,
    DyVTEByAttention,
    ExitGate,
    ExitGates,
    attention_exit_features,
    exit_features,
    exit_labels,
    gate_loss,
)
from .flops import BlockCost, prefill_flops
from .mergers import ClusterMerge, NearestMerge, cosine_kmeans, merge_clusters
from .token_search import (
    ScheduledPruning,
    SearchResult,
    SigmoidSchedule,
    bayesian_search,
    greedy_search,
    rank_consistency,
    sigmoid_search,
)
from .vision import VisionAttention, ensemble
from .vmtc_cmai import CMAI, VMTC, focus
from .vtc_cls import VTCCLS

__all__ = [
    "ATP",
    "CMAI",
    "VMTC",
    "VTCCLS",
    "ATPGate",
    "BlockCost",
    "ByAttention",
    "ClusterMerge",
    "CompositeLayers",
    "DyVTE",
    "DyVTEByAttention",
    "ExitGate",
    "ExitGates",
    "Grid",
    "Learned",
    "Merger",
    "NearestMerge",
    "Rate",
    "Reduce",
    "ReduceByAttention",
    "Reduction",
    "ScheduledPruning",
    "Scorer",
    "SearchResult",
    "Selector",
    "SigmoidSchedule",
    "Threshold",
    "TopK",
    "VisionAttention",
    "adaptive_rate",
    "atp_gates",
    "attention_exit_features",
    "atp_losses",
    "bayesian_search",
    "cosine_kmeans",
    "ensemble",
    "exit_features",
    "exit_labels",
    "focus",
    "gate_loss",
    "greedy_search",
    "merge_clusters",
    "prefill_flops",
    "rank_consistency",
    "received_attention",
    "sigmoid_search",
    "spatial_scores",
]
