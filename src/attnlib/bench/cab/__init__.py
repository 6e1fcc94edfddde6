"""The Comprehensive Attention Benchmark (Zhang et al., 2022): its index, its metrics, and its seven tasks' data.

Mechanisms are compared under the four patterns by :func:`attnlib.bench.compare`, on data that ships with packages;
efficiency lengths are :func:`attnlib.bench.stats.efficiency_length`. Here is what makes results comparable to the
published ones: the fixed tables of the compositional index, the metrics as the benchmark computes them, and the tasks
read from the folders that its data unpacks to.
"""

from .index import METRICS, PATTERNS, Metric, compositional_index, read_scores
from .metrics import (
    chamfer,
    f_score,
    mel_cepstral_distortion,
    mel_spectral_distortion,
    perplexity,
    psnr,
    rouge,
    ssim,
)
from .tasks import TASKS, CabTask, load

__all__ = [
    "METRICS",
    "PATTERNS",
    "TASKS",
    "CabTask",
    "Metric",
    "chamfer",
    "compositional_index",
    "f_score",
    "load",
    "mel_cepstral_distortion",
    "mel_spectral_distortion",
    "perplexity",
    "psnr",
    "read_scores",
    "rouge",
    "ssim",
]
