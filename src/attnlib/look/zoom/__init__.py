"""Looking again: trees of boxes, searches over them, crops with the way back, and techniques that zoom.

>>> from attnlib.look.zoom import Tree, ZoomEye, best_first
"""

from .dc2 import DC2, DC2Prompts, VisualMemory, sentence_embedder
from .iris import (
    InformationCrops,
    Iris,
    dual_learn,
    failure_weights,
    hardest_first,
    information_windows,
    spectral_entropy,
)
from .patch_matters import (
    BlipScorer,
    CaptionAggregator,
    Description,
    Detection,
    Groups,
    PatchDivider,
    Patches,
    PatchPrompts,
    main_things,
)
from .search import Search, best_first, post_order
from .tree import Node, Tree, divide
from .views import Crop, Views, crop, grown, merged, union
from .zoom_eye import (
    ZOOM_SETTINGS,
    Answer,
    ZoomEye,
    ZoomPrompts,
    ZoomSettings,
    confidence,
    depth_weight,
    read_cues,
)

__all__ = [
    "DC2",
    "DC2Prompts",
    "VisualMemory",
    "sentence_embedder",
    "InformationCrops",
    "Iris",
    "dual_learn",
    "failure_weights",
    "hardest_first",
    "information_windows",
    "spectral_entropy",
    "BlipScorer",
    "CaptionAggregator",
    "Description",
    "Detection",
    "Groups",
    "PatchDivider",
    "Patches",
    "PatchPrompts",
    "main_things",
    "ZOOM_SETTINGS",
    "Answer",
    "Crop",
    "Node",
    "Search",
    "Tree",
    "Views",
    "ZoomEye",
    "ZoomPrompts",
    "ZoomSettings",
    "best_first",
    "confidence",
    "crop",
    "depth_weight",
    "divide",
    "grown",
    "merged",
    "post_order",
    "read_cues",
    "union",
]
