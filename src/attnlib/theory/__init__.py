"""Executable theory: cascades of Einsums, mixing matrices, and formulas beside the runs that confirm or refute them.

Nothing here measures time; see :mod:`attnlib.bench`.
"""

from .cascade import Cascade, Einsum
from .cascades import OPERATORS, attention_cascade, softmax_cascade
from .dynamical import LinearSystem, OneFramework
from .experiment import Claim, Comparison, Experiment
from .icl import InContextRegression
from .jepa import FeatureOrder
from .mixing import mixing_matrix, passes_table, unified_view
from .random_features import RandomFeatures
from .svm import AttentionSVM, attention_svm, several_svm

__all__ = [
    "OPERATORS",
    "AttentionSVM",
    "Cascade",
    "Claim",
    "Comparison",
    "Einsum",
    "Experiment",
    "FeatureOrder",
    "InContextRegression",
    "LinearSystem",
    "OneFramework",
    "RandomFeatures",
    "attention_cascade",
    "attention_svm",
    "mixing_matrix",
    "passes_table",
    "several_svm",
    "softmax_cascade",
    "unified_view",
]
