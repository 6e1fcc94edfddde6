"""Reading a frozen encoder: its tokens are computed once, then neighbours, a linear map and probes answer from them.

The protocol of Psomas et al., 2025, arXiv 2506.10178: a probe is a pool (:data:`attnlib.Pool`), a BatchNorm without
parameters and a linear map; beside it stand the vote of nearest neighbours and logistic regression, both of mean
tokens.

>>> tokens, labels = torch.randn(8, 5, 4), torch.arange(8) % 2
>>> nearest_neighbours((tokens, labels), (tokens, labels), k=1)
100.0
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checks import check_int, check_real
from .small import fit

#: Tokens (n, N, C) or vectors (n, C), and labels (n,).
Labelled = tuple[Tensor, Tensor]


@torch.no_grad()
def cached_tokens(
    encode: Callable[[Tensor], Tensor], images: Tensor, batch: int = 64, keep: str | Path | None = None
) -> Tensor:
    """Tokens of every image by a frozen encoder, computed once.

    Args:
        encode: from images to tokens (B, N, C) or a map (B, *grid, C). A module is put in evaluation.
        images: (n, ...).
        batch: images at a time.
        keep: file that holds them; read where it exists, written where it does not.

    Returns:
        (n, N, C).

    Raises:
        ValueError: a file with tokens of another number of images.
    """
    check_int("batch", batch, least=1)
    file = None if keep is None else Path(keep)
    if file is not None and file.exists():
        held = load_file(file)["tokens"]
        if len(held) != len(images):
            raise ValueError(f"keep={str(file)!r} holds the tokens of {len(held)} images, not of {len(images)}")
        return held
    if isinstance(encode, nn.Module):
        encode.eval()
    tokens = torch.cat([encode(part).flatten(1, -2) for part in images.split(batch)])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": tokens.contiguous()}, file)
    return tokens


def _vectors(x: Tensor) -> Tensor:
    return x.mean(1) if x.dim() == 3 else x


def _percent(found: Tensor, truth: Tensor) -> float:
    return 100 * float((found == truth).float().mean())


@torch.no_grad()
def nearest_neighbours(train: Labelled, test: Labelled, k: int = 20, temperature: float = 0.07) -> float:
    """Percent right by a vote of the k nearest, each weighing ``exp(cosine / temperature)``.

    Args:
        train, test: tokens, whose mean is taken, or vectors; and labels.
        k: neighbours, at most as many as there are training vectors.
        temperature: of the votes.
    """
    known, asked = (F.normalize(_vectors(x).double(), dim=-1) for x in (train[0], test[0]))
    check_int("k", k, least=1, most=len(known))
    check_real("temperature", temperature, above=0)
    near, at = (asked @ known.T).topk(k, dim=1)
    votes = torch.zeros(len(asked), int(train[1].max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, train[1][at], (near / temperature).exp())
    return _percent(votes.argmax(1), test[1])


def linear(train: Labelled, test: Labelled, strength: float = 1.0) -> float:
    """Percent right by scikit-learn's logistic regression of mean tokens in standard units.

    Args:
        train, test: tokens, whose mean is taken, or vectors; and labels.
        strength: inverse of the penalty, its ``C``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    model.fit(_vectors(train[0]).numpy(), train[1].numpy())
    return 100 * float(model.score(_vectors(test[0]).numpy(), test[1].numpy()))


def probe_head(pool: Any, classes: int) -> nn.Sequential:
    """A pool, a BatchNorm without parameters and a linear map.

    >>> import attnlib
    >>> probe_head(attnlib.create("efficient-probing", dim=64), 10)(torch.randn(3, 7, 64)).shape
    torch.Size([3, 10])
    """
    return nn.Sequential(
        pool, nn.BatchNorm1d(pool.out_dim, affine=False, eps=1e-6), nn.Linear(pool.out_dim, classes)
    )  # fmt: skip


def probe(
    pool: nn.Module,
    train: Labelled,
    test: Labelled,
    steps: int = 300,
    batch: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
) -> tuple[float, nn.Sequential]:
    """Train a probe on cached tokens.

    Args:
        pool: from (B, N, C) to (B, D), with ``out_dim``; trained in place.
        train, test: tokens and labels.
        steps, batch, lr, seed: of training with AdamW, a warm-up and a cosine.

    Returns:
        Percent of the test that is right, and the probe.
    """
    model = probe_head(pool, int(train[1].max()) + 1)

    def draw(generator: torch.Generator) -> Labelled:
        at = torch.randint(len(train[0]), (batch,), generator=generator)
        return train[0][at], train[1][at]

    fit(model, draw, lambda m, given: F.cross_entropy(m(given[0]), given[1]), steps, lr=lr, seed=seed)
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(-1) for part in test[0].split(256)])
    return _percent(found, test[1]), model
