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
from .stiffness import GatedStep, StiffSteps, block_stiffness, stiffness_index
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
    "GatedStep",
    "InContextRegression",
    "LinearSystem",
    "OneFramework",
    "RandomFeatures",
    "StiffSteps",
    "attention_cascade",
    "attention_svm",
    "block_stiffness",
    "mixing_matrix",
    "passes_table",
    "several_svm",
    "softmax_cascade",
    "stiffness_index",
    "unified_view",
]
