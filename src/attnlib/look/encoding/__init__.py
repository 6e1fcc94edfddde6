"""Encoding models: features of a model on one side, responses to the same events on the other.

>>> from attnlib.look.encoding import encode, noise_ceiling
"""

from .encode import ALPHAS, Bootstrapped, Encoding, bootstrap, encode, features_of, project
from .folds import Fold, folds, resamples
from .integration import Better, Integration, better, false_discoveries, in_all, integration
from .readout import (
    AttentionReadout,
    LinearReadout,
    Read,
    SpatialReadout,
    blend,
    detr_positions,
    fit_readout,
    readout_loss,
    readout_state,
    with_rest,
)
from .ridge import Ridge, ridge, ridge_path
from .scores import noise_ceiling, pearson

__all__ = [
    "ALPHAS",
    "AttentionReadout",
    "Better",
    "Bootstrapped",
    "Encoding",
    "Fold",
    "Integration",
    "LinearReadout",
    "Read",
    "Ridge",
    "SpatialReadout",
    "better",
    "blend",
    "bootstrap",
    "detr_positions",
    "encode",
    "false_discoveries",
    "features_of",
    "fit_readout",
    "folds",
    "in_all",
    "integration",
    "noise_ceiling",
    "pearson",
    "project",
    "readout_loss",
    "readout_state",
    "resamples",
    "ridge",
    "ridge_path",
    "with_rest",
]
