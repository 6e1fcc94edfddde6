"""Looking at attention: what is recorded through the hook protocol, in bounded memory, and drawn; and circuits, what an
answer goes through.

>>> from attnlib.look import Statistics, image_map
"""

from ..hooks.probes import Record, sink_rate
from .circuits import (
    Effects,
    LogitAttribution,
    Mean,
    Metric,
    Resampled,
    agreement,
    choice_logit,
    choice_loss,
    direct,
    first_order,
    logit_attribution,
    logit_difference,
    patch,
    paths,
    single_tokens,
)
from .plots import head_grid, map_over_image, profile, sink_profile
from .statistics import Statistics, effective_rank, image_map

__all__ = [
    "Effects",
    "LogitAttribution",
    "Mean",
    "Metric",
    "Record",
    "Resampled",
    "Statistics",
    "agreement",
    "choice_logit",
    "choice_loss",
    "direct",
    "effective_rank",
    "first_order",
    "head_grid",
    "image_map",
    "logit_attribution",
    "logit_difference",
    "map_over_image",
    "patch",
    "paths",
    "profile",
    "single_tokens",
    "sink_profile",
    "sink_rate",
]
