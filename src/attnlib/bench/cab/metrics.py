"""The metrics of the Comprehensive Attention Benchmark, as its tasks' code computes them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_float, check_rank, check_real, check_whole
from ...models.perception.foveation import similarity

# --------------------------------------------------------------------------------------------------------------------
# Text


def perplexity(logits: Tensor, targets: Tensor, ignore: int = -100) -> float:
    """``exp`` of the mean negative log-likelihood of ``targets`` (B, N) under ``logits`` (B, N, V).

    >>> round(perplexity(torch.zeros(1, 3, 7), torch.zeros(1, 3, dtype=torch.long)), 3)
    7.0
    """
    check_float("logits", logits)
    check_rank("logits", logits, 3, "(B, N, V)")
    check_whole("targets", targets)
    if targets.shape != logits.shape[:2]:
        raise ValueError(f"targets must be (B, N)={tuple(logits.shape[:2])}, got {tuple(targets.shape)}")
    if bool((targets == ignore).all()):
        raise ValueError(f"targets holds nothing but {ignore}, which is left out")
    return math.exp(float(F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), ignore_index=ignore)))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _f1(hits: int, found: int, wanted: int) -> float:
    return 2 * hits / (found + wanted) if hits else 0.0


def rouge(guesses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F1, percent), the mean over pairs of texts.

    Words are runs of letters and digits, in lower case, without stemming; ROUGE-L takes a text as one sequence.

    >>> rouge(["the cat sat"], ["the cat ran"])["ROUGE-2"]
    50.0
    """
    if len(guesses) != len(references) or not guesses:
        raise ValueError(f"guesses and references must be pairs of texts, got {len(guesses)} and {len(references)}")
    total = {"ROUGE-1": 0.0, "ROUGE-2": 0.0, "ROUGE-L": 0.0}
    for guess, reference in zip(guesses, references, strict=True):
        a, b = _words(guess), _words(reference)
        for n in (1, 2):
            of_a, of_b = (Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in (a, b))
            total[f"ROUGE-{n}"] += _f1(sum((of_a & of_b).values()), sum(of_a.values()), sum(of_b.values()))
        total["ROUGE-L"] += _f1(_common(a, b), len(a), len(b))
    return {name: 100 * value / len(guesses) for name, value in total.items()}


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(row[j], before[j + 1])
    return row[-1]


# --------------------------------------------------------------------------------------------------------------------
# Images


def _images(guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    check_float("guess", guess)
    check_float("truth", truth)
    check_rank("guess", guess, 4, "(B, H, W, C)")
    if guess.shape != truth.shape:
        raise ValueError(f"guess and truth must be of one shape, got {tuple(guess.shape)} and {tuple(truth.shape)}")
    # As pictures are kept: 256 steps
    return tuple(t.clamp(0, 1).mul(255).round().double() for t in (guess, truth))  # type: ignore[return-value]


def psnr(guess: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images (B, H, W, C) in [0, 1], the mean over images; ``inf`` for equal ones.

    >>> round(psnr(torch.zeros(1, 4, 4, 3), torch.full((1, 4, 4, 3), 0.2)), 2)
    13.98
    """
    a, b = _images(guess, truth)
    mse = (a - b).square().flatten(1).mean(1)
    return float((20 * torch.log10(255 / mse.sqrt())).mean())


def ssim(guess: Tensor, truth: Tensor) -> float:
    """Structural similarity of images (B, H, W, C) in [0, 1]: Gaussian windows of 11, deviation 1.5, inside only."""
    a, b = (t.movedim(-1, 1) / 255 for t in _images(guess, truth))
    return float(similarity(a, b).mean())


# --------------------------------------------------------------------------------------------------------------------
# Clouds


def _nearest(guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(B, m) and (B, n) distances to the nearest point of the other cloud."""
    for name, t in (("guess", guess), ("truth", truth)):
        check_float(name, t)
        check_rank(name, t, 3, "(B, m, 3)")
        if t.shape[1] == 0:
            raise ValueError(f"{name} has no points")
    apart = torch.cdist(guess.double(), truth.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return apart.amin(2), apart.amin(1)


def chamfer(guess: Tensor, truth: Tensor, order: int = 1) -> float:
    """Chamfer distance of clouds (B, m, 3) and (B, n, 3), times 1000: ``CD-l1`` is half the sum of both mean distances,
    ``CD-l2`` the sum of both mean squared distances."""
    check_choice("order", order, (1, 2))
    there, back = _nearest(guess, truth)
    total = (there.mean(1) + back.mean(1)) / 2 if order == 1 else there.square().mean(1) + back.square().mean(1)
    return 1000 * float(total.mean())


def f_score(guess: Tensor, truth: Tensor, threshold: float = 0.01) -> float:
    """Harmonic mean of the shares of points that have one of the other cloud within ``threshold``."""
    check_real("threshold", threshold, above=0)
    there, back = ((d < threshold).double().mean(1) for d in _nearest(guess, truth))
    total = there + back
    return float(torch.where(total > 0, 2 * there * back / total.clamp(min=1e-300), 0.0).mean())


# --------------------------------------------------------------------------------------------------------------------
# Speech


def _log_mel(wave: Tensor, rate: int) -> Tensor:
    """(T, 80) logarithms of a mel spectrogram: Hann windows of 50 ms every 12.5 ms, triangles from 20 Hz up."""
    n, hop = int(0.05 * rate), int(0.0125 * rate)
    if wave.shape[0] <= n // 2:
        raise ValueError(f"a wave of {wave.shape[0]} samples is shorter than half a window of {n}")
    spectrum = torch.stft(
        wave, n, hop, n, torch.hann_window(n, dtype=wave.dtype), center=True, pad_mode="reflect", return_complex=True
    )
    power = spectrum.abs().square()  # (F, T)

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    edges = torch.linspace(mel(20.0), mel(rate / 2), 82, dtype=wave.dtype)
    edges = 700 * (10 ** (edges / 2595) - 1)
    at = torch.linspace(0, rate // 2, n // 2 + 1, dtype=wave.dtype)[:, None]
    up = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return torch.log(power.mT @ torch.minimum(up, down).clamp(min=0) + 1e-6)


def _along(a: Tensor, b: Tensor) -> float:
    """Mean distance along the best alignment of two sequences of features, by dynamic time warping."""
    apart = torch.cdist(a[None], b[None])[0] / math.sqrt(a.shape[1])
    cost = apart.tolist()
    rows, columns = apart.shape
    # What the way to here costs, and of how many places it is made
    best = [(0.0, 0)] * columns
    for i in range(rows):
        row: list[tuple[float, int]] = []
        for j in range(columns):
            ways = []
            if j:
                ways.append(row[j - 1])
            if i and j:
                ways.append(best[j - 1])
            if i:
                ways.append(best[j])
            before = min(ways, key=lambda w: w[0]) if ways else (0.0, 0)
            row.append((before[0] + cost[i][j], before[1] + 1))
        best = row
    return best[-1][0] / best[-1][1]


def _waves(guess: Tensor, truth: Tensor, rate: int) -> tuple[Tensor, Tensor]:
    for name, wave in (("guess", guess), ("truth", truth)):
        check_float(name, wave)
        check_rank(name, wave, 1, "(samples,)")
    if rate < 1000:
        raise ValueError(f"rate must be at least 1000 samples per second, got {rate}")
    return _log_mel(guess.double(), rate), _log_mel(truth.double(), rate)


def mel_spectral_distortion(guess: Tensor, truth: Tensor, rate: int) -> float:
    """Root mean square difference of log-mel spectrograms (80 channels), the mean along the best alignment.

    Args:
        guess, truth: (samples,) waves.
        rate: samples per second.
    """
    return _along(*_waves(guess, truth, rate))


def mel_cepstral_distortion(guess: Tensor, truth: Tensor, rate: int) -> float:
    """The same of the first 13 cepstral coefficients (orthonormal cosine transform of the log-mel spectrogram)."""
    n = torch.arange(80, dtype=torch.float64)[:, None]
    basis = torch.cos(math.pi / 80 * (n + 0.5) * torch.arange(13)) * math.sqrt(2 / 80)
    basis[:, 0] /= math.sqrt(2)
    a, b = _waves(guess, truth, rate)
    return _along(a @ basis, b @ basis)
