"""LACING's soft-image guidance: away from what is said without looking.

A learned null image, one embedding per image token, stands in for the image with probability ``prob`` in training, so
that the model learns to answer without it. At inference a second branch reads the null image, and

    ``z~ = z_null + w (z - z_null)``,

or in contrastive form ``(1 + a) z - a z_null`` on ``{v : z_v >= log(cutoff) + max z}``. The first ``interval + 1``
steps may be guided only.

What differs from the authors' code: an image of another number of tokens than the null image has is refused (theirs
knows 576 only), several images per prompt are served, and the branch has a cache of its own instead of a doubled batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..hooks.branches import NullTokens
from .contrastive import ContrastiveDecoding


class NullImage(nn.Module):
    """A learned image of nothing, and its way into training.

    ``projector.register_forward_hook(null.hook)`` replaces images of a training batch by it now and then.

    Args:
        tokens: T, tokens of an image.
        dim: width of the language model.
        prob: probability with which an image is replaced in training.

    Reference: Zhao et al., 2024, arXiv 2411.14279, section 3.3.

    >>> NullImage(4, 8, prob=1.0)(torch.zeros(2, 4, 8)).abs().sum().item() > 0
    True
    """

    def __init__(self, tokens: int = 576, dim: int = 4096, prob: float = 0.1):
        super().__init__()
        if not 0.0 <= prob <= 1.0:
            raise ValueError(f"prob must lie in [0, 1], got {prob}")
        if tokens < 1 or dim < 1:
            raise ValueError(f"tokens and dim must be positive, got {tokens} and {dim}")
        self.prob = prob
        self.embedding = nn.Parameter(torch.randn(tokens, dim) / dim**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, C) projected images, some of them replaced in training."""
        if not self.training or self.prob == 0:
            return features
        if features.shape[-2:] != self.embedding.shape:
            raise ValueError(
                f"features of an image are {tuple(features.shape[-2:])}, the null image is "
                f"{tuple(self.embedding.shape)}"
            )
        drop = torch.rand(features.shape[0], device=features.device) < self.prob
        return torch.where(drop[:, None, None], self.embedding.to(features.dtype), features)

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        """A forward hook for the projector."""
        return self(out)


class SoftImageGuidance(ContrastiveDecoding):
    """Guide scores away from those of a branch that reads the null image.

    Args:
        null: a :class:`NullImage`, or its (T, C) embedding.
        scale: w; 1 leaves the scores as they are.
        contrast: a of the contrastive form, which is then used in place of ``scale``.
        cutoff: of the contrastive form.
        interval: guide the first ``interval + 1`` steps only; ``None`` for all.

    Raises:
        ValueError: a negative strength, a cut-off outside [0, 1].

    Reference: Zhao et al., 2024, arXiv 2411.14279, section 3.3 (IFG).

    >>> SoftImageGuidance(torch.zeros(4, 8), scale=1.5).b
    -0.5
    """

    name: ClassVar[str] = "soft-image-guidance"

    def __init__(
        self,
        null: NullImage | Tensor,
        scale: float = 1.5,
        contrast: float | None = None,
        cutoff: float = 0.1,
        interval: int | None = None,
    ):
        if not scale >= 0 or (contrast is not None and not contrast >= 0):
            raise ValueError(f"scale and contrast must not be negative, got {scale} and {contrast}")
        if contrast is None:
            super().__init__(NullTokens(null), scale, 1 - scale, interval=interval)
        else:
            super().__init__(NullTokens(null), 1 + contrast, -contrast, cutoff, interval=interval)
