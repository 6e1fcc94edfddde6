"""Two modalities: what gates between them find and segment where a thing shows in one of them alone.

Visible and infrared pictures of discs and squares, each of which shows in either or in both
(:mod:`attnlib.bench.worlds.pairs`). Detectors of equal width read one of them, both side by side, or both through
DEYOLO's gates, also with its focused convolutions; segmenters read one, both side by side, both through SegMiF's
attention, or the picture that the whole of SegMiF makes of both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....models.dense.heads import FPNHead, Segmenter
from ....models.dense.segmif import SegMiF
from ....models.detect.anchor_free import AnchorFreeDetector, Predicted
from ....models.detect.pan import conv
from ....models.protocol import Optimizers, train_batch
from ....nn.layers import resize_map
from ....nn.linear.hierarchical_interaction import HierarchicalInteraction
from ....nn.multimodal.deyolo import BiFocus, DualEnhancement
from ...clock import machine
from ...small import Progress, fit, parameters, picture, sheet, study
from ...worlds.pairs import make_pair
from ._detectors import (
    DIMS,
    INKS,
    Batch,
    Encoder,
    Pyramid,
    detection_loss,
    drawn,
    found_by,
    head,
    markdown,
    mean_precision,
    shown,
    true_boxes,
)

QUESTION = "Do gates between two modalities find and segment what shows in one of them better than both side by side?"
DETECTORS = ("visible", "infrared", "concatenation", "DEA", "DEA and BiFocus")
SEGMENTERS = ("visible", "infrared", "concatenation", "HIA", "SegMiF")
BASELINE = "concatenation"
SIDE, NOISE = 32, 0.15


class Both(AnchorFreeDetector):
    """Visible and infrared pictures -> what every point says.

    Args:
        way: one of :data:`DETECTORS`: what is read, and how two maps become one.
    """

    def __init__(self, way: str):
        super().__init__(None, Pyramid(DIMS[1:], DIMS[1]), head(DIMS[1], 2, len(DIMS) - 1))
        self.way = way
        single = way in ("visible", "infrared")
        self.encoders = nn.ModuleList(
            Encoder(3, DIMS, BiFocus(DIMS[0]) if way.endswith("BiFocus") else None) for _ in range(2 - single)
        )
        self.fusions = nn.ModuleList()
        for level, dim in enumerate(() if single else DIMS[1:]):
            size = SIDE // (4 * 2**level)
            self.fusions.append(conv(2 * dim, dim) if way == BASELINE else DualEnhancement(dim, size, 4, first=(2, 2)))

    def features(self, *images: Tensor) -> list[Tensor]:
        """One map of each stride."""
        if len(self.encoders) == 1:
            maps: list[Tensor] = self.encoders[0](images[int(self.way == "infrared")])
            return maps
        made = []
        for fusion, visible, infrared in zip(
            self.fusions, *(f(x) for f, x in zip(self.encoders, images, strict=True)), strict=True
        ):
            if isinstance(fusion, DualEnhancement):
                made.append(fusion.merge(*fusion(visible, infrared)))
            else:
                made.append(fusion(torch.cat([visible, infrared], -1)))
        return made

    def forward(self, x: Tensor, infrared: Tensor) -> Predicted:  # type: ignore[override]
        """What every point says."""
        said: Predicted = self.head(self.neck(self.features(x, infrared)))
        return said


class Maps(Encoder):
    """The encoder as segmenters read it: maps (B, C, h, w), and what they are."""

    def __init__(self, in_chans: int = 3):
        super().__init__(in_chans)
        self.feature_info = [{"num_chs": d, "reduction": 4 * 2**i} for i, d in enumerate(DIMS[1:])]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Finest first."""
        return [m.permute(0, 3, 1, 2) for m in super().forward(x)]


class Streams(nn.Module):
    """Six channels, visible and infrared, to maps of both: an encoder each, joined at every stride.

    What both streams know together, which the attention asks with, are their coarsest maps.

    Args:
        attention: they go through :class:`HierarchicalInteraction` before they are joined.
    """

    def __init__(self, attention: bool):
        super().__init__()
        self.encoders = nn.ModuleList(Encoder(3) for _ in range(2))
        self.hia = nn.ModuleList(HierarchicalInteraction(d, 2) for d in DIMS[1:] if attention)
        self.join = nn.ModuleList(conv(2 * d, d) for d in DIMS[1:])
        self.feature_info = Maps(3).feature_info

    def forward(self, x: Tensor) -> list[Tensor]:
        """Finest first, (B, C, h, w)."""
        levels = list(zip(*(f(part) for f, part in zip(self.encoders, x.split(3, 1), strict=True)), strict=True))
        known = levels[-1][0] + levels[-1][1]
        for i, hia in enumerate(self.hia):
            size = levels[i][0].shape[1:3]
            levels[i] = hia(*levels[i], semantic=resize_map(known, size))
        joined = [f(torch.cat(pair, -1)) for f, pair in zip(self.join, levels, strict=True)]
        return [m.permute(0, 3, 1, 2) for m in joined]


def segmenter(way: str) -> Any:
    """One of :data:`SEGMENTERS`."""
    trunk = Streams(way == "HIA") if way in (BASELINE, "HIA") else Maps(3)
    reader = Segmenter(trunk, FPNHead([*DIMS[1:]], DIMS[1], 3, drop=0.0))
    return SegMiF(reader, dim=8, growth=4, num_heads=2, rounds=2, alternate="round") if way == "SegMiF" else reader


@functools.lru_cache(maxsize=4)
def scenes(count: int, part: str, noise: float = NOISE) -> tuple[Batch, Tensor]:
    """Pairs, their boxes, and the class of every pixel: 0 is background.

    Targets have ``alone`` (n,), which of them show in one modality, and ``seen``, in which, as
    :data:`attnlib.bench.worlds.pairs.SEEN` counts.
    """
    pairs = [make_pair(i, part, SIDE, noise=noise) for i in range(count)]
    targets, masks = [], torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    at = torch.arange(SIDE) + 0.5
    for pair, mask in zip(pairs, masks, strict=True):
        boxes = pair.boxes.float()
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), pair.labels.tolist(), strict=True):
            across, down = (at[None] - (x1 + x2) / 2).abs(), (at[:, None] - (y1 + y2) / 2).abs()
            away = torch.hypot(across, down) if label == 0 else torch.maximum(across, down)
            mask[away <= (x2 - x1) / 2] = 1 + label
        alone = torch.tensor([s != "both" for s in pair.seen])
        targets.append({"boxes": boxes, "labels": pair.labels, "alone": alone})
    images = tuple(torch.stack([getattr(p, name) for p in pairs]) for name in ("visible", "infrared"))
    return (images, targets), masks


def read(way: str, visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
    """What a segmenter of :data:`SEGMENTERS` is given."""
    if way == "SegMiF":
        return visible, infrared[:, :1]
    if way in (BASELINE, "HIA"):
        return (torch.cat([visible, infrared], 1),)
    return (visible if way == "visible" else infrared,)


def detect(name: str, seed: int, steps: int, trained: int) -> Any:
    """A detector, trained."""
    torch.manual_seed(seed)
    model = Both(name)
    pool = scenes(trained, "train")[0]
    fit(model, lambda g: drawn(pool, 16, g), detection_loss, steps, lr=5e-3, seed=seed)
    return model.eval()


def segment(name: str, seed: int, steps: int, trained: int, batch: int = 8) -> Any:
    """A segmenter, trained; of SegMiF a batch trains one of both networks, in the order and shares of its rounds."""
    torch.manual_seed(seed)
    model = segmenter(name)
    (images, _), masks = scenes(trained, "train")
    fusing = isinstance(model, SegMiF)
    generator = torch.Generator().manual_seed(seed)
    optimizers = Optimizers(lambda _, params: torch.optim.AdamW(params, 5e-3))
    model.train()
    for step in range(steps):
        which = torch.randint(trained, (batch,), generator=generator)
        given = read(name, *(x[which] for x in images))
        rate = 5e-3 * min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
        for held in optimizers.held.values():
            for group in held.param_groups:
                group["lr"] = rate
        if fusing:
            model.set_progress(step / steps)
        names = ("visible", "infrared") if fusing else ("x",)
        train_batch(model, {**dict(zip(names, given, strict=True)), "target": masks[which]}, optimizers, clip=1.0)
    return model.eval()


def classes_of(model: Any, name: str, images: Sequence[Tensor]) -> Tensor:
    """Class of every pixel of pictures (B, H, W)."""
    made = model.predict(*read(name, *images))
    return made.classes if isinstance(model, SegMiF) else made  # type: ignore[no-any-return]


def overlap_alone(classes: Tensor, truth: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean over both kinds of intersection over union, in %, but for pixels in boxes of what shows in both pictures."""
    counted = torch.ones_like(truth, dtype=torch.bool)
    for keep, target in zip(counted, targets, strict=True):
        for x1, y1, x2, y2 in target["boxes"][~target["alone"]].tolist():
            keep[max(0, int(y1) - 1) : int(y2) + 2, max(0, int(x1) - 1) : int(x2) + 2] = False
    each = []
    for kind in (1, 2):
        mine, theirs = (classes == kind) & counted, (truth == kind) & counted
        each.append(float((mine & theirs).sum()) / max(1, int((mine | theirs).sum())))
    return 100 * sum(each) / len(each)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: Sequence[int] = (200, 200),
    trained: int = 768,
    tested: int = 192,
    seeds: Sequence[int] = (1, 2, 3),
) -> dict[str, Any]:
    """Train every detector and every segmenter.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-fusion-cpu.svg``, and ``tasks-fusion-cpu.png``, what some of them see.
        steps: of training, with 16 pairs each for boxes, and with 8 for pixels.
        trained, tested: pairs of training and of the test.
        seeds: of weights and batches.

    Returns:
        Plain values, for JSON.
    """
    (images, targets), truth = scenes(tested, "test")
    models: dict[tuple[str, str], Any] = {}  # of the first seed, for the pictures

    def boxes(name: str, seed: int) -> dict[str, float]:
        model = detect(name, seed, steps[0], trained)
        if seed == seeds[0]:
            models["boxes", name] = model
        found = found_by(model, images)
        return {
            "alone": mean_precision(found, targets, 2, "alone"), "all": mean_precision(found, targets, 2),
            "parameters": parameters(model),
        }  # fmt: skip

    def pixels(name: str, seed: int) -> dict[str, float]:
        model = segment(name, seed, steps[1], trained)
        if seed == seeds[0]:
            models["pixels", name] = model
        classes = classes_of(model, name, images)
        everything = [{**t, "alone": torch.ones_like(t["alone"])} for t in targets]
        return {
            "alone": overlap_alone(classes, truth, targets), "all": overlap_alone(classes, truth, everything),
            "parameters": parameters(model),
        }  # fmt: skip

    result: dict[str, Any] = {
        "question": QUESTION,
        "machine": machine(),
        "steps": list(steps),
        "noise": NOISE,
        "parts": {},
    }
    result |= {"trained": trained, "tested": tested}
    for part, names, run in (("boxes", DETECTORS, boxes), ("pixels", SEGMENTERS, pixels)):
        key = (part, steps[part == "pixels"], trained, tested, NOISE)
        result["parts"][part] = study(names, run, "alone", BASELINE, seeds, progress, keep, key)
    if pictures is not None:
        curves = {
            f"{what}: {row['name']}": [(what, row["alone"]["mean"], row["alone"]["half"])]
            for part, what in (("boxes", "average precision of boxes"), ("pixels", "overlap of pixels"))
            for row in result["parts"][part]["rows"]
        }
        picture(
            Path(pictures) / "tasks-fusion-cpu.svg", curves, "", "things that show in one picture alone, %",
            "two modalities", (), (),
        )  # fmt: skip
        for part, name in (("boxes", "DEA"), ("boxes", BASELINE), ("pixels", "HIA"), ("pixels", BASELINE)):
            if (part, name) not in models:
                train, length = (detect, steps[0]) if part == "boxes" else (segment, steps[1])
                models[part, name] = train(name, seeds[0], length, trained)
        _seen(Path(pictures) / "tasks-fusion-cpu.png", models, images, targets, truth)
    return result


def _seen(
    path: Path, models: Mapping[tuple[str, str], Any], images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]], truth: Tensor,
) -> None:  # fmt: skip
    """What both detectors and segmenters make of five pairs with things that show in one picture alone."""
    most = sorted(range(len(targets)), key=lambda i: -int(targets[i]["alone"].sum()))[:5]
    some = [x[most] for x in images]
    rows = {"visible": some[0], "infrared": some[1], "truth": true_boxes(some[0], [targets[i] for i in most])}
    for name in (BASELINE, "DEA"):
        found = models["boxes", name].predict(*some, threshold=0.02, most=12, overlap=0.5)
        rows[name] = shown(some[0], found)
    inks = torch.tensor([(0.1, 0.1, 0.15), *INKS])
    rows["truth, pixels"] = inks[truth[most]].permute(0, 3, 1, 2)
    for name in (BASELINE, "HIA"):
        rows[f"{name}, pixels"] = inks[classes_of(models["pixels", name], name, some)].permute(0, 3, 1, 2)
    sheet(path, rows, colours=64)


def table(part: Mapping[str, Any]) -> str:
    """Rows of one part as a table in Markdown."""
    heads = ("reads", "in one picture alone, %", "against concatenation", "all, %", "parameters")
    return markdown(heads, part, ("alone", "against", "all", "parameters"))


#: Tables of the page by name.
TABLES = {"fusion boxes": ("boxes", table), "fusion pixels": ("pixels", table)}

__all__ = ["Both", "Maps", "measure", "scenes", "segmenter", "table"]
