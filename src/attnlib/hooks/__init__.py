"""Acting on attention inside pretrained models: one protocol, an adapter per family.

>>> from attnlib.hooks import Intervention, Record, attach
"""

from .attach import attach
from .intervention import STAGES, Intervention, Probe
from .notes import Notes
from .probes import Record
from .session import Session
from .site import KINDS, PairMask, Site
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
    "Intervention",
    "MaskByType",
    "Notes",
    "PairMask",
    "Probe",
    "Record",
    "Session",
    "Site",
    "TokenTypes",
    "TypeRule",
    "attach",
    "bidirectional",
    "causal_frames",
    "composite",
    "modality_mutual",
]
