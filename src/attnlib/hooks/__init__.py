"""Acting on attention inside pretrained models: one protocol, an adapter per family.

>>> from attnlib.hooks import Intervention, Record, attach
"""

from .attach import attach
from .denoiser import MODULE_KINDS, CallSite, rows_of, rows_of_guidance, step_of, with_gradient
from .intervention import STAGES, Intervention, Probe
from .keys import with_keys
from .maps import Maps
from .nodes import Capture, Node, Nodes, Patch
from .notes import Notes
from .pipelines import Sampling
from .probes import Record
from .reading import Reading
from .session import Session
from .site import KINDS, PairMask, Rotation, Site
from .tape import Entry, Tape, Taped, to_grid, to_tokens
from .tokens import GENERATED, IMAGE, PAD, QUESTION, SYSTEM, TEXT, TokenTypes
from .type_masks import MaskByType, TypeRule, bidirectional, causal_frames, composite, modality_mutual

__all__ = [
    "GENERATED",
    "IMAGE",
    "KINDS",
    "MODULE_KINDS",
    "PAD",
    "QUESTION",
    "STAGES",
    "SYSTEM",
    "TEXT",
    "CallSite",
    "Capture",
    "Entry",
    "Intervention",
    "Maps",
    "MaskByType",
    "Node",
    "Nodes",
    "Notes",
    "PairMask",
    "Patch",
    "Probe",
    "Reading",
    "Record",
    "Rotation",
    "Sampling",
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
    "rows_of",
    "rows_of_guidance",
    "step_of",
    "to_grid",
    "to_tokens",
    "with_gradient",
    "with_keys",
]
