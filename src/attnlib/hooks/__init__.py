"""Acting on attention inside pretrained models: one protocol, an adapter per family.

>>> from attnlib.hooks import Intervention, Record, attach
"""

from .core import KINDS, STAGES, Intervention, PairMask, Probe, Session, Site, attach
from .probes import Record
from .tokens import GENERATED, IMAGE, PAD, QUESTION, SYSTEM, TEXT, TokenTypes

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
    "PairMask",
    "Probe",
    "Record",
    "Session",
    "Site",
    "TokenTypes",
    "attach",
]
