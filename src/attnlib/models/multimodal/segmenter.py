"""A promptable segmenter that is told by embeddings: transformers' SAM, with prompts that a language model makes.

Its encoders stay as they are and belong to the caller; its mask decoder may learn. Masks of an image whose longer side
was resized to the side of the segmenter, padded below and on the right, come back in the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_flag, check_float, check_ints, check_whole, readable


def check_size(name: str, size: Any) -> tuple[int, int]:
    """(height, width) of an image."""
    sizes = check_ints(name, size, least=1)
    if len(sizes) != 2:
        raise ValueError(f"{name} must be (height, width), got {sizes}")
    return sizes[0], sizes[1]


def check_sizes(name: str, sizes: Any, count: int) -> list[tuple[int, int]]:
    """(height, width) of every image of a batch."""
    if isinstance(sizes, Tensor):
        sizes = sizes.tolist()
    if not isinstance(sizes, (list, tuple)) or len(sizes) != count:
        raise ValueError(f"{name} must hold (height, width) of {count} images, got {sizes!r:.200}")
    return [check_size(f"{name}[{i}]", size) for i, size in enumerate(sizes)]


def resized_size(size: Sequence[int], side: int) -> tuple[int, int]:
    """An image's size when its longer side is ``side``.

    >>> resized_size((40, 60), 1024)
    (683, 1024)
    """
    scale = side / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


class PromptedMasks(nn.Module):
    """Masks of prompts, of transformers' ``SamModel``.

    Args:
        segmenter: the model. It is not part of this module's parameters or state dict, but for its mask decoder.
        train_decoder: the mask decoder learns, and is saved here; otherwise it is frozen with the rest.

    Raises:
        TypeError: a segmenter without prompt encoder and mask decoder.
    """

    def __init__(self, segmenter: nn.Module, train_decoder: bool = True):
        super().__init__()
        parts = ("prompt_encoder", "mask_decoder", "get_image_wide_positional_embeddings", "get_image_embeddings")
        missing = [name for name in parts if not hasattr(segmenter, name)]
        if missing:
            raise TypeError(
                f"segmenter must be transformers' SamModel or built like it, got {type(segmenter).__name__} without "
                f"{missing[0]}"
            )
        check_flag("train_decoder", train_decoder)
        self._held: tuple[Any, ...] = (segmenter,)
        for p in segmenter.parameters():
            p.requires_grad_(False)
        if train_decoder:
            decoder: Any = segmenter.mask_decoder
            self.mask_decoder = decoder
            for p in self.mask_decoder.parameters():
                p.requires_grad_(True)

    @property
    def segmenter(self) -> Any:
        """The model whose parts these are."""
        return self._held[0]

    @property
    def side(self) -> int:
        """Pixels of a side of what the segmenter reads."""
        return int(self.segmenter.config.vision_config.image_size)

    @property
    def prompt_dim(self) -> int:
        """Width of the embedding of a prompt."""
        return int(self.segmenter.config.prompt_encoder_config.hidden_size)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """(B, C, h, w) embeddings of images (B, 3, side, side), without gradient."""
        check_float("pixel_values", pixel_values)
        check_axes("pixel_values", pixel_values, B=None, channels=3, height=self.side, width=self.side)
        with torch.no_grad():
            return self.segmenter.get_image_embeddings(pixel_values)

    def place(self, points: Tensor, size: Sequence[int]) -> Tensor:
        """Points (..., 2) of ``x, y`` in pixels of an image, in those of what the segmenter reads."""
        size = check_size("size", size)
        check_float("points", points)
        if not points.dim() or points.shape[-1] != 2:
            raise ValueError(f"points must be (..., 2) of x, y, got {tuple(points.shape)}")
        if readable(points) and not bool(points.isfinite().all()):
            raise ValueError("points must be finite, got some that are NaN or infinite; label absent ones -1")
        height, width = resized_size(size, self.side)
        return points * points.new_tensor([width / size[1], height / size[0]])

    def point_prompts(self, points: Tensor, labels: Tensor, size: Sequence[int]) -> Tensor:
        """(K, P + 1, C): the embeddings of points, and the end of them.

        Args:
            points: (K, P, 2) of ``x, y`` in pixels of the image; gradients pass.
            labels: (K, P): 1 on what is meant, 0 off it, -1 for a point that says nothing.
            size: (height, width) of the image.
        """
        check_axes("points", points, K=None, P=None, xy=2)
        check_axes("labels", labels, K=points.shape[0], P=points.shape[1])
        check_whole("labels", labels)
        if readable(labels) and bool(((labels < -1) | (labels > 1)).any()):
            raise ValueError(f"labels must be 1, 0 or -1, got {labels.unique().tolist()}")
        placed = self.place(points, size).unsqueeze(0)
        sparse, _ = self.segmenter.prompt_encoder(
            input_points=placed, input_labels=labels.unsqueeze(0), input_boxes=None, input_masks=None
        )
        return sparse[0]

    def box_prompts(self, boxes: Tensor, size: Sequence[int]) -> Tensor:
        """(K, 2, C): the embeddings of boxes (K, 4), corners in pixels of the image."""
        check_axes("boxes", boxes, K=None, corners=4)
        check_float("boxes", boxes)
        if readable(boxes) and not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError("boxes must be x1, y1, x2, y2 with x2 > x1 and y2 > y1, got some that are not")
        placed = self.place(boxes.unflatten(-1, (2, 2)), size).flatten(-2)
        # Their encoder writes into what it made.
        with torch.no_grad():
            sparse, _ = self.segmenter.prompt_encoder(
                input_points=None, input_labels=None, input_boxes=placed.unsqueeze(0), input_masks=None
            )
        return sparse[0]

    def decode(self, image: Tensor, prompts: Tensor) -> Tensor:
        """(K, h', w') logits of masks of K prompts (K, N, C) in one image (C, h, w), at the decoder's size."""
        h, w = self.segmenter.prompt_encoder.image_embedding_size
        check_axes("image", image, C=self.prompt_dim, h=h, w=w)
        check_axes("prompts", prompts, K=None, N=None, C=self.prompt_dim)
        model = self.segmenter
        _, dense = model.prompt_encoder(input_points=None, input_labels=None, input_boxes=None, input_masks=None)
        low, _ = model.mask_decoder(
            image_embeddings=image.unsqueeze(0),
            image_positional_embeddings=model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=prompts.unsqueeze(0),
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return low[0, :, 0]

    def full_size(self, low: Tensor, size: Sequence[int]) -> Tensor:
        """(K, height, width) of masks (K, h', w'), without the padding."""
        size = check_size("size", size)
        check_axes("low", low, K=None, h=None, w=None)
        if not len(low):
            return low.new_zeros(0, *size)
        height, width = resized_size(size, self.side)
        masks = F.interpolate(low.float().unsqueeze(0), (self.side, self.side), mode="bilinear")
        return F.interpolate(masks[..., :height, :width], size, mode="bilinear")[0]
