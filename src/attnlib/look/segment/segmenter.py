"""A promptable segmenter of transformers, asked in pixels of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_float, describe

#: What SAM's images are normalised with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segments(NamedTuple):
    """Masks that one prompt may mean."""

    logits: Tensor  # (M, H, W) at the size of the image, above 0 inside
    scores: Tensor  # (M,) how good the segmenter believes each to be
    low: Tensor | None = None  # (M, h, w) as they left the decoder, to be given back as a prompt


#: ``predict(points (K, 2) or None, labels (K,) or None, box (4,) or None, mask (h, w) or None) -> Segments``
Predict = Callable[..., Segments]


def check_image(image: Any, name: str = "image") -> Tensor:
    """``image`` as floats (H, W, 3) in [0, 1]."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor (H, W, 3) in [0, 1], got {describe(image)}")
    check_axes(name, image, H=None, W=None, C=3)
    check_float(name, image)
    if not image.shape[0] * image.shape[1]:
        raise ValueError(f"{name} has no pixels: {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not -1e-4 <= low <= high <= 1 + 1e-4:
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}; divide bytes by 255")
    return image


class Segmenter:
    """transformers' ``SamModel``: ``segmenter(image)`` reads an image once and gives what answers prompts.

    Images are scaled to the model's side along the longer axis and padded below and to the right.

    Args:
        model: ``SamModel`` or one with the same ``forward``.
        mean, std: of the three channels.

    >>> Segmenter(nn.Identity())
    Traceback (most recent call last):
    TypeError: model must be transformers' SamModel, got Identity
    """

    def __init__(self, model: nn.Module, mean: Sequence[float] = MEAN, std: Sequence[float] = STD):
        if not callable(getattr(model, "get_image_embeddings", None)) or not hasattr(model, "prompt_encoder"):
            raise TypeError(f"model must be transformers' SamModel, got {describe(model)}")
        self.model: Any = model
        config: Any = model.config
        self.side = int(config.vision_config.image_size)
        self.mean, self.std = tuple(mean), tuple(std)

    def pixels(self, image: Tensor) -> Tensor:
        """(1, 3, S, S) what the model reads of (H, W, 3)."""
        like = next(self.model.parameters())
        height, width = self.scaled(image.shape[0], image.shape[1])
        small = F.interpolate(
            image.permute(2, 0, 1)[None].to(like), (height, width), mode="bilinear", antialias=True, align_corners=False
        )
        mean, std = (like.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return F.pad((small - mean) / std, (0, self.side - width, 0, self.side - height))

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Size of an image inside the square."""
        scale = self.side / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Predict:
        """Read an image (H, W, 3) in [0, 1].

        Returns:
            ``predict(points=None, labels=None, box=None, mask=None)`` -> :class:`Segments`: points (K, 2) and a box
            (4,) in pixels of the image, a mask as :class:`Segments` has it in ``low``.
        """
        image = check_image(image)
        size = (image.shape[0], image.shape[1])
        inner = self.scaled(*size)
        embedded = self.model.get_image_embeddings(self.pixels(image))
        scale = embedded.new_tensor([inner[1] / size[1], inner[0] / size[0]])

        @torch.no_grad()
        def predict(
            points: Tensor | None = None,
            labels: Tensor | None = None,
            box: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> Segments:
            given: dict[str, Tensor] = {}
            if points is not None and len(points):
                if labels is None or len(labels) != len(points):
                    raise ValueError(f"labels must be {len(points)} like points, got {describe(labels)}")
                given["input_points"] = points.to(scale)[None, None] * scale
                given["input_labels"] = labels.to(scale.device)[None, None].long()
            if box is not None:
                if not (float(box[2]) > float(box[0]) and float(box[3]) > float(box[1])):
                    raise ValueError(f"box must be x1 < x2 and y1 < y2 in pixels, got {[float(c) for c in box]}")
                given["input_boxes"] = (torch.as_tensor(box).to(scale).view(2, 2) * scale).view(1, 1, 4)
            if not given:
                raise ValueError("a prompt must hold at least one point or a box, got neither")
            if mask is not None:
                given["input_masks"] = mask.to(scale)[None, None]
            out = self.model(image_embeddings=embedded, multimask_output=True, **given)
            low = out.pred_masks[0, 0]
            full = F.interpolate(low[None], (self.side, self.side), mode="bilinear")[..., : inner[0], : inner[1]]
            return Segments(F.interpolate(full, size, mode="bilinear")[0], out.iou_scores[0, 0], low)

        return predict
