"""Attribution by gradients: what of the input, or of any module's output, an answer depends on.

Every map is (B, h, w), (B, N) for tokens without a grid: a sample's is what a page or a picture lays over its input.

>>> from attnlib.look.attribution import grad_cam, saliency
"""

from .cells import AGGREGATES, extract_aggregate
from .integrated import integrated_gradients
from .maps import (
    class_sensitivity,
    combine,
    grad_cam,
    map_correlation,
    meta_saliency,
    own_norm_grad,
    saliency,
    unit_range,
)

__all__ = [
    "AGGREGATES",
    "class_sensitivity",
    "combine",
    "extract_aggregate",
    "grad_cam",
    "integrated_gradients",
    "map_correlation",
    "meta_saliency",
    "own_norm_grad",
    "saliency",
    "unit_range",
]
