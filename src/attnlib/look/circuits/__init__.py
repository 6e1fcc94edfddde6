"""Circuits: which heads and feed-forwards an answer goes through, by what happens when they are changed.

>>> from attnlib.look import circuits, patch, paths
"""

from .attribution import LogitAttribution, logit_attribution
from .effects import Effects, agreement, direct, first_order, patch
from .metrics import Metric, choice_logit, choice_loss, logit_difference, single_tokens
from .paths import paths
from .sources import Mean, Resampled

__all__ = [
    "Effects",
    "LogitAttribution",
    "Mean",
    "Metric",
    "Resampled",
    "agreement",
    "choice_logit",
    "choice_loss",
    "direct",
    "first_order",
    "logit_attribution",
    "logit_difference",
    "patch",
    "paths",
    "single_tokens",
]
