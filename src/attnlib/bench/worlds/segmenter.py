"""A small promptable segmenter, transformers' ``SamModel``, and pictures with masks that it is trained and judged on.

``examples/multimodal/segmenter.py`` trains it and keeps it in ``examples/multimodal/segmenter``; :func:`load` takes it
from there. It reads 64 × 64 pixels, of painted scenes (:mod:`attnlib.bench.worlds.painter`, geometric things) and of
those of :mod:`attnlib.bench.data.scenes`, clear things.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import check_choice
from ...extras import need
from ..data import scenes
from ..small import started_small
from . import painter

SIDE, PATCH, WIDTH = 64, 4, 64
#: What pixels are normalised with.
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
#: Least contrast of things of scenes.
CLEAR = 0.5
WORLDS = ("painted", "scenes")


class Sight(NamedTuple):
    """A picture (3, 64, 64) in [0, 1] and its things: names and masks (N, 64, 64)."""

    image: Tensor
    names: tuple[str, ...]
    masks: Tensor


def sights(world: str, numbers: Sequence[int], part: str = "train") -> list[Sight]:
    """Pictures by number.

    Args:
        world: one of :data:`WORLDS`.
        numbers: which pictures.
        part: of them.

    >>> [sight.masks.shape[1:] for sight in sights("scenes", [0]) + sights("painted", [0])]
    [torch.Size([64, 64]), torch.Size([64, 64])]
    """
    check_choice("world", world, WORLDS)
    found = []
    if world == "scenes":
        for number in numbers:
            scene = scenes.make_scene(number, part)
            things = [t for t in scene.things if t.contrast >= CLEAR]
            masks = [torch.from_numpy(_cover(t, part)) for t in things]
            names = tuple(t.name for t in things)
            found.append(Sight(scene.image, names, torch.stack(masks) if masks else torch.zeros(0, SIDE, SIDE) > 0))
        return found
    facts = painter.sample(list(numbers), part, geometric=True, pairings="any")
    painting = painter.paint(facts)
    colours = list(painter.COLOURS)
    for i, count in enumerate(facts.count.tolist()):
        named = [f"{colours[facts.colour[i, j]]} {painter.SHAPES[facts.shape[i, j]]}" for j in range(count)]
        found.append(Sight(painting.images[i], tuple(named), painting.masks[i, :count] > 0.5))
    return found


def _cover(thing: scenes.Thing, part: str) -> np.ndarray:
    """(64, 64) the pixels that a thing changes by half of what it can."""
    image = np.zeros((3, SIDE, SIDE), dtype=np.float32)
    whole = scenes.Thing(thing.name, thing.cell, 1.0, thing.shift, thing.sample)
    scenes.stamp(image, whole, thing.cell // scenes.GRID * scenes.CELL, thing.cell % scenes.GRID * scenes.CELL, part)
    found: np.ndarray = image.max(0) > 0.5 * image.max()
    return found


def box_of(mask: Tensor) -> Tensor:
    """(4,) x1, y1, x2, y2 around a mask (H, W)."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def build(seed: int = 0, frequency: float = 2.0) -> Any:
    """An untrained segmenter, started as small models are.

    Args:
        seed: of its weights.
        frequency: of the waves that places are told by. transformers' start has 32 at this width, at which a click and
            the patch that it lies in have nothing in common.
    """
    hf = need("transformers", "the small segmenter")
    vision = hf.SamVisionConfig(
        hidden_size=WIDTH, output_channels=WIDTH, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, mlp_dim=2 * WIDTH, window_size=0, global_attn_indexes=[0, 1, 2], use_rel_pos=False,
        num_pos_feats=WIDTH // 2,
    )  # fmt: skip
    prompt = hf.SamPromptEncoderConfig(hidden_size=WIDTH, image_size=SIDE, patch_size=PATCH, mask_input_channels=8)
    decoder = hf.SamMaskDecoderConfig(
        hidden_size=WIDTH, mlp_dim=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=WIDTH
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = hf.SamModel(
            hf.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
        )
        for module in made.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.reset_parameters()
        waves = frequency * torch.randn(2, WIDTH // 2)
        for part in (made.shared_image_embedding, made.prompt_encoder.shared_embedding):
            part.positional_embedding.data.copy_(waves)
            part.positional_embedding.requires_grad_(False)  # one table, of which transformers keeps two
    return started_small(made, seed)


def weights_folder() -> Path:
    """Where a checkout of the repository keeps the trained segmenter."""
    return Path(__file__).resolve().parents[4] / "examples" / "multimodal" / "segmenter"


def load(folder: Path | str | None = None) -> Any:
    """The trained segmenter, for :class:`attnlib.look.segment.Segmenter` with :data:`MEAN` and :data:`STD`.

    Raises:
        FileNotFoundError: there is none in the folder.
    """
    folder = weights_folder() if folder is None else Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no trained segmenter in {folder}; examples/multimodal/segmenter.py makes one, "
            "and a checkout of the repository has it in examples/multimodal/segmenter"
        )
    hf = need("transformers", "the small segmenter")
    return hf.SamModel.from_pretrained(str(folder), dtype=torch.float32).eval()  # kept in half precision
