"""Encoding models: features of a model on one side, responses to the same events on the other.

>>> from attnlib.look.encoding import encode, noise_ceiling
"""

from .encode import ALPHAS, Encoding, Resampled, bootstrap, encode, features_of, project
from .folds import Fold, folds, resamples
from .ridge import Ridge, ridge, ridge_path
from .scores import noise_ceiling, pearson

__all__ = [
    "ALPHAS",
    "Encoding",
    "Fold",
    "Resampled",
    "Ridge",
    "bootstrap",
    "encode",
    "features_of",
    "folds",
    "noise_ceiling",
    "pearson",
    "project",
    "resamples",
    "ridge",
    "ridge_path",
]
