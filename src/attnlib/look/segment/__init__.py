"""Attention as a prompt: what a model looks at tells a segmenter where to cut.

They stand on three callables, so that any model serves: a map of names over an image
(:class:`attnlib.look.surgery.SurgeryMaps`), an answer to a question about it, and a :class:`Segmenter`.

>>> from attnlib.look.segment import GenSAM, Segmenter
"""

from .gensam import GenSAM, NameChain, Segmentation, Step, fuse, grown_box, largest_box
from .promac import ProMaC, align, boxes_in, clip_box, confidence, crops, masked_images
from .segmenter import Segmenter, Segments
from .vl_sam import VLSAM, FlowReader, Found, corners, iou, merge

__all__ = [
    "VLSAM",
    "FlowReader",
    "Found",
    "GenSAM",
    "NameChain",
    "ProMaC",
    "Segmentation",
    "Segmenter",
    "Segments",
    "Step",
    "align",
    "boxes_in",
    "clip_box",
    "confidence",
    "corners",
    "crops",
    "fuse",
    "grown_box",
    "iou",
    "largest_box",
    "masked_images",
    "merge",
]
