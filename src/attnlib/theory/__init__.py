"""Executable theory: cascades of Einsums and mixing matrices. Nothing here measures; see :mod:`attnlib.bench`."""

from .cascade import Cascade, Einsum
from .cascades import OPERATORS, attention_cascade, softmax_cascade
from .mixing import mixing_matrix, passes_table, unified_view

__all__ = [
    "OPERATORS",
    "Cascade",
    "Einsum",
    "attention_cascade",
    "mixing_matrix",
    "passes_table",
    "softmax_cascade",
    "unified_view",
]
