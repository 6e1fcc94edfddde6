"""Looking at attention: what is recorded through the hook protocol, in bounded memory, and drawn; circuits, what an
answer goes through; and attribution, what of an input it depends on.

>>> from attnlib.look import Statistics, image_map
"""

from ..hooks.probes import Record, sink_rate
from .attribution import context_aware_saliency, grad_cam, integrated_gradients, relevance, saliency
from .circuits import (
    AttendTo,
    Effects,
    LogitAttribution,
    LowRank,
    Mean,
    Metric,
    Overlap,
    Resampled,
    ablated,
    agreement,
    answer_attention,
    choice_logit,
    choice_loss,
    direct,
    first_order,
    head_classes,
    logit_attribution,
    logit_difference,
    overlap,
    patch,
    paths,
    single_tokens,
    subspace,
    subspaces,
    token_scores,
)
from .plots import head_grid, map_over_image, profile, sink_profile
from .statistics import Statistics, effective_rank, image_map

__all__ = [
    "AttendTo",
    "Effects",
    "LogitAttribution",
    "LowRank",
    "Mean",
    "Metric",
    "Overlap",
    "Record",
    "Resampled",
    "Statistics",
    "ablated",
    "agreement",
    "answer_attention",
    "choice_logit",
    "choice_loss",
    "context_aware_saliency",
    "direct",
    "effective_rank",
    "first_order",
    "grad_cam",
    "head_classes",
    "head_grid",
    "image_map",
    "integrated_gradients",
    "logit_attribution",
    "logit_difference",
    "map_over_image",
    "overlap",
    "patch",
    "paths",
    "profile",
    "relevance",
    "saliency",
    "single_tokens",
    "sink_profile",
    "sink_rate",
    "subspace",
    "subspaces",
    "token_scores",
]
