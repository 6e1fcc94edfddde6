"""The small multimodal model as a speaker: techniques that ask see generated scenes.

>>> from attnlib.bench.data.speaking import SceneProcessor
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...look.pixels import resize, to_picture, to_pictures
from ...look.speak import MARK, Speaker
from . import scenes


class SceneProcessor:
    """What a processor of transformers is, for the model of scenes: a prompt is a question, a picture becomes 64 × 64.

    Args:
        tokenizer: of :func:`attnlib.bench.data.scenes.load_model`.
    """

    takes_floats = True
    image_token = MARK

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.size = {"height": scenes.SIDE, "width": scenes.SIDE}
        self.image_mean = [scenes.BACKGROUND] * 3

    def __call__(
        self, text: str | Sequence[str], images: Any = None, return_tensors: str = "pt", **settings: Any
    ) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``."""
        texts = [text] if isinstance(text, str) else list(text)
        prompts = []
        slots = f"{MARK} " * scenes.PATCHES
        for said in texts:
            body = scenes.prompt(" ".join(said.replace(MARK, " ").split()))
            prompts.append(body.replace(slots, slots * said.count(MARK)))
        found = dict(self.tokenizer(prompts, return_tensors=return_tensors, **settings))
        found.pop("token_type_ids", None)
        if images is not None:
            rows = [picture for one in images for picture in to_pictures(one)]
            found["pixel_values"] = torch.stack([_read(picture) for picture in rows])
        return found


def _read(picture: np.ndarray) -> torch.Tensor:
    picture = resize(to_picture(picture), (scenes.SIDE, scenes.SIDE))
    pixels = torch.from_numpy(picture if picture.dtype == np.float32 else picture.astype(np.float32) / 255)
    return (pixels.permute(2, 0, 1) - 0.5) * 2


def scene_speaker(folder: Path | str | None = None, **settings: Any) -> Speaker:
    """The trained model of ``folder`` (``None``: the repository's own) as a speaker.

    Args:
        folder: of :func:`attnlib.bench.data.scenes.load_model`.
        settings: of :class:`attnlib.look.speak.Speaker`.
    """
    model, tokenizer = scenes.load_model(folder)
    return Speaker(model, SceneProcessor(tokenizer), **{"max_new_tokens": 28, **settings})
