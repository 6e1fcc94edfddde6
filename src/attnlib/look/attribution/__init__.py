"""Attribution: what of the input, or of any module's output, an answer depends on, by gradients and by relevance.

Every map is (B, h, w), (B, N) for tokens without a grid: a sample's is what a page or a picture lays over its input.

>>> from attnlib.look.attribution import grad_cam, saliency
"""

from .cells import AGGREGATES, extract_aggregate
from .context import context_aware_saliency, sr_map
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
from .relevance import COMPAT, RULES, Rule, relevance
from .transformer import transformer_relevance
from .verbalize import cited_coverage, coverage, instruction, merge_pieces, search, verbalize

__all__ = [
    "AGGREGATES",
    "COMPAT",
    "RULES",
    "Rule",
    "cited_coverage",
    "class_sensitivity",
    "combine",
    "context_aware_saliency",
    "coverage",
    "extract_aggregate",
    "grad_cam",
    "instruction",
    "integrated_gradients",
    "map_correlation",
    "merge_pieces",
    "meta_saliency",
    "own_norm_grad",
    "relevance",
    "saliency",
    "search",
    "sr_map",
    "transformer_relevance",
    "unit_range",
    "verbalize",
]
