"""Looking at attention: what is recorded through the hook protocol, in bounded memory, and drawn.

>>> from attnlib.look import Statistics, image_map
"""

from ..hooks.probes import Record, sink_rate
from .plots import head_grid, map_over_image, profile, sink_profile
from .statistics import Statistics, effective_rank, image_map

__all__ = [
    "Record",
    "Statistics",
    "effective_rank",
    "head_grid",
    "image_map",
    "map_over_image",
    "profile",
    "sink_profile",
    "sink_rate",
]
