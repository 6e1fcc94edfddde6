"""Circuits: which heads and feed-forwards an answer goes through, by what happens when they are changed.

>>> from attnlib.look import circuits, patch, paths
"""

from .attribution import LogitAttribution, logit_attribution
from .effects import Effects, agreement, direct, first_order, patch
from .heads import (
    AttendTo,
    LowRank,
    Overlap,
    UniformHeads,
    ablated,
    answer_attention,
    head_classes,
    overlap,
    subspace,
    subspaces,
    token_scores,
)
from .metrics import Metric, choice_logit, choice_loss, logit_difference, single_tokens
from .paths import paths
from .sources import Mean, Resampled

__all__ = [
    "AttendTo",
    "Effects",
    "LogitAttribution",
    "LowRank",
    "Mean",
    "Metric",
    "Overlap",
    "Resampled",
    "UniformHeads",
    "ablated",
    "agreement",
    "answer_attention",
    "choice_logit",
    "choice_loss",
    "direct",
    "first_order",
    "head_classes",
    "logit_attribution",
    "logit_difference",
    "overlap",
    "patch",
    "paths",
    "single_tokens",
    "subspace",
    "subspaces",
    "token_scores",
]
