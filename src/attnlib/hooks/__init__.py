"""Acting on attention inside pretrained models: one protocol, an adapter per family.

>>> from attnlib.hooks import Intervention, Record, attach
"""

from .attach import attach
from .intervention import STAGES, Intervention, Probe
from .nodes import Capture, Node, Nodes, Patch
from .notes import Notes
from .probes import Record
from .session import Session
from .site import KINDS, PairMask, Site
from .tape import Entry, Tape, Taped, to_grid, to_tokens
from .tokens import GENERATED, IMAGE, PAD, QUESTION, SYSTEM, TEXT, TokenTypes
from .type_masks import MaskByType, TypeRule, bidirectional, causal_frames, composite, modality_mutual

__all__ = [
    "GENERATED",
    "IMAGE",
    "KINDS",
    "PAD",
    "QUESTION",
    "STAGES",
    "SYSTEM",
    "TEXT",
    "Capture",
    "Entry",
    "Intervention",
    "MaskByType",
    "Node",
    "Nodes",
    "Notes",
    "PairMask",
    "Patch",
    "Probe",
    "Record",
    "Session",
    "Site",
    "Tape",
    "Taped",
    "TokenTypes",
    "TypeRule",
    "attach",
    "bidirectional",
    "causal_frames",
    "composite",
    "modality_mutual",
    "to_grid",
    "to_tokens",
]
