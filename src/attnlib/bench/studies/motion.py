"""Which way a digit moves: what UniFormer and UniFormerV2 add to an image model that reads frame by frame.

``attnlib bench --suite motion --out benchmarks/results`` measures again what ``motion-cpu.json`` holds and draws it. A
digit moves up, down, left or right through about the middle of 8 frames of 24 x 24 pixels. Single frames tell the axis.
Backwards, a video has the same frames and the opposite direction, so that no model that averages over frames can be
right in more than half of the cases; chance is a quarter. All start from random weights. The image model
gets hidden layers as wide as it takes to have the parameters of the whole UniFormerV2, and so does the model that reads
the frames as channels of one image, the cheapest way to read their order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.build import create_model
from ..clock import machine
from ..data.worlds import DIRECTIONS, directed_digits
from ..small import Progress, fit, picture, study

FRAMES, SIDE, PATCH, DIM, DEPTH = 8, 24, 6, 32, 2
BASELINE = "frame-averaged image model"
_ARMED: dict[str, Any] = dict(
    patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=2, img_size=SIDE, in_chans=1, num_classes=len(DIRECTIONS),
    drop_rate=0.0, global_drop_rate=0.0, global_mlp_ratio=2.0, mlp_ratio=2.0,
)  # fmt: skip

#: Contestant -> (name of the model, settings).
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("uniformerv2_b16", _ARMED | dict(global_layers=(), mlp_ratio=8.1)),
    "frames as channels": (
        "vit_tiny_patch16_224",
        dict(patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=2, img_size=SIDE, mlp_ratio=6.1, in_chans=FRAMES,
             num_classes=len(DIRECTIONS)),
    ),
    "UniFormer": (
        "uniformer_s_video",
        dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), head_dim=16, mlp_ratio=2.0, in_chans=1,
             num_classes=len(DIRECTIONS)),
    ),
    "UniFormerV2, token that reads all frames": ("uniformerv2_b16", _ARMED | dict(global_layers=(0, 1))),
    "UniFormerV2, relations along time": ("uniformerv2_b16", _ARMED | dict(local=2, global_layers=())),
    "UniFormerV2": ("uniformerv2_b16", _ARMED | dict(local=2, global_layers=(0, 1))),
}  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    """A contestant, which takes clips (B, 1, T, H, W)."""
    model, settings = CONTESTANTS[name]
    torch.manual_seed(seed)
    return create_model(model, **settings)


def scores(model: nn.Module, clips: Tensor) -> Tensor:
    """Logits of clips (B, T, H, W, 1)."""
    clips = clips - 0.1  # about the mean of all pixels
    return model(clips[..., 0] if getattr(model, "rank", 2) == 2 else clips.movedim(-1, 1))


@torch.no_grad()
def tested(model: nn.Module, clips: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent right, and percent where the axis is right, whichever way along it."""
    model.eval()
    said = torch.cat([scores(model, part).argmax(-1) for part in clips.split(64)])
    return {
        "accuracy": 100 * float((said == labels).float().mean()),
        "axis": 100 * float((said // 2 == labels // 2).float().mean()),
    }


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 200,
    batch: int = 16,
    clips: int = 512,
    seeds: tuple[int, ...] = (0, 1, 2),
    names: tuple[str, ...] = tuple(CONTESTANTS),
) -> dict[str, Any]:
    """Train every contestant to tell the direction.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``motion-cpu.svg``.
        steps, batch: of training, the same for all.
        clips: of the test, of digits that were not trained on.
        seeds: of initial weights and batches.
        names: of :data:`CONTESTANTS`; the image model must be among them.

    Returns:
        Plain values, for JSON: accuracy, how often the axis is right, parameters, paired differences from the image
        model.
    """
    test = directed_digits(clips, FRAMES, SIDE, "test", torch.Generator().manual_seed(1234))

    def run(name: str, seed: int) -> dict[str, float]:
        model = build(name, seed)

        def loss(m: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(scores(m, given[0]), given[1])

        losses = fit(model, lambda g: directed_digits(batch, FRAMES, SIDE, "train", g), loss, steps, 2e-3, seed)
        size = sum(p.numel() for p in model.parameters())
        return {**tested(model, *test), "train_loss": sum(losses[-30:]) / len(losses[-30:]), "parameters": size}

    found = study(names, run, "accuracy", BASELINE, seeds, progress, keep, (steps, batch, clips))
    result = {
        "what": "direction of moving digits", "machine": machine(), "steps": steps, "batch": batch, "tested": clips,
        "chance": 100 / len(DIRECTIONS), "without the order of frames at most": 50.0, **found,
    }  # fmt: skip
    if pictures is not None:
        curves = {
            what: [(row["name"], row[key]["mean"], row[key]["half"]) for row in found["rows"]]
            for what, key in (("direction", "accuracy"), ("axis alone", "axis"))
        }
        picture(
            Path(pictures) / "motion-cpu.svg", curves, "model", "right, %",
            "which way a digit moves (chance 25 and 50 %; 3 seeds, 95 % intervals)",
        )  # fmt: skip
    return result
