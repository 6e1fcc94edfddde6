"""Defects in textures: does the distance of an attention map from its prior find them better than errors alone?

Brick, grass and gravel of scikit-image: crops of the left half train, defects are planted in crops of the right half.
Features come from a small frozen network that tells photographs apart. FOD is held against the same layers that only
rebuild, against each factor of its own score, and against a Gaussian of normal features, without any layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....models.backbones.resnet import resnet
from ....models.backbones.stages import Features
from ....models.dense.fod import FOD, LevelPrediction, discrepancy
from ...clock import machine
from ...data.files import _packaged, photos, require
from ...small import Progress, fit, parameters, picture, sheet, study, told

QUESTION = "Does error times discrepancy of attention maps find defects in textures better than errors alone?"
NAMES = ("rebuilding alone", "FOD", "FOD's error alone", "FOD's discrepancy alone", "Gaussian of features")
TEXTURES = ("brick", "grass", "gravel")
DEFECTS = ("stain", "scratch", "smear", "foreign")
SIDE = 48


def texture(name: str) -> Tensor:
    """(H, W) in [0, 1], half as large as the file."""
    with require("PIL.Image").open(_packaged("skimage", f"data/{name}.png")) as image:
        x = torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32) / 255)
    return F.avg_pool2d(x[None], 2)[0]


def crops(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, 1, 48, 48) from anywhere in an image (H, W)."""
    y, x = (torch.randint(0, n - SIDE + 1, (count,), generator=generator).tolist() for n in image.shape)
    return torch.stack([image[None, a : a + SIDE, b : b + SIDE] for a, b in zip(y, x, strict=True)])


def spoilt(image: Tensor, other: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One crop with one defect, (1, 48, 48), and where it is, (48, 48).

    Args:
        image, other: two textures.
        kind: ``"stain"`` (lighter or darker), ``"scratch"`` (a thin line, also), ``"smear"`` (blurred along rows) or
            ``"foreign"`` (a piece of the other texture).
        generator: of the crop and of the defect.
    """
    x = crops(image, 1, generator)[0]
    a, b, c, d = torch.rand(4, generator=generator).tolist()
    at = torch.arange(SIDE) + 0.5
    y0, x0 = (SIDE * (0.2 + 0.6 * v) for v in (a, b))
    if kind == "scratch":
        angle, long = torch.pi * c, 6 + 8 * d
        along = (at[:, None] - y0) * np.sin(angle) + (at[None] - x0) * np.cos(angle)
        beside = (at[:, None] - y0) * np.cos(angle) - (at[None] - x0) * np.sin(angle)
        soft = ((beside.abs() < 1.2) & (along.abs() < long)).float()
        put = x + (0.3 if a < 0.5 else -0.3)
    else:
        high, wide = 4 + 4 * c, 4 + 4 * d
        soft = (1.2 * (1 - ((at[:, None] - y0) / high).square() - ((at[None] - x0) / wide).square()) * 4).sigmoid()
        if kind == "stain":
            put = x + (0.3 if a < 0.5 else -0.3)
        elif kind == "smear":
            put = F.avg_pool2d(F.pad(x, (4, 4, 1, 1), mode="reflect"), (3, 9), 1)
        else:
            put = crops(other, 1, generator)[0]
    return (x + soft * (put - x)).clamp(0, 1), soft > 0.5


def backbone(steps: int, seed: int = 0) -> Features:
    """A small network that was taught which of five photographs a crop is from, and how it is turned; strides 4 and 8.

    Args:
        steps, seed: of training.
    """
    known = [F.avg_pool2d(p.float().mean(-1)[None] / 255, 2)[0] for p in photos().train]
    torch.manual_seed(seed)
    trunk = resnet((16, 32), (1, 1), basic=True, stem_dim=16, num_classes=0, in_chans=1)
    model = nn.Sequential(trunk, nn.Linear(32, 4 * len(known)))

    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        which = torch.randint(0, len(known), (32,), generator=g)
        turns = torch.randint(0, 4, (32,), generator=g)
        some = [crops(known[w], 1, g)[0].rot90(t, (1, 2)) for w, t in zip(which.tolist(), turns.tolist(), strict=True)]
        return torch.stack(some), 4 * which + turns

    fit(model, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]), steps, lr=3e-3, seed=seed)
    return Features(trunk, (1, 2)).eval()


def factors(level: LevelPrediction) -> tuple[Tensor, Tensor]:
    """Error, and how far inter maps are from their priors, (B, h, w) each: what the score of a level is made of."""
    x, y = level.features, level.rebuilt
    wrong = (x - y).square().mean(-1) + 1 - F.cosine_similarity(x, y, dim=-1)
    apart = torch.stack([discrepancy(p, t) for p, t in level.inter]).mean(0)
    weight = (-apart).softmax(-1)
    return wrong, (weight.amax(-1, keepdim=True) - weight).view_as(wrong)


def gaussian(trunk: nn.Module, normal: Tensor, x: Tensor) -> Tensor:
    """Mahalanobis distance of features from those of normal crops, all places alike: (B, H, W), a mean over levels."""
    out = []
    with torch.no_grad():
        for known, asked in zip(trunk(normal), trunk(x), strict=True):
            flat = F.avg_pool2d(known, 3, 1, 1).movedim(1, -1).flatten(0, 2).double()
            asked = F.avg_pool2d(asked, 3, 1, 1).movedim(1, -1).double() - flat.mean(0)
            inverse = (flat.T.cov() + 1e-3 * flat.var(0).mean() * torch.eye(flat.shape[1])).inverse()
            far = ((asked @ inverse) * asked).sum(-1).clamp(min=0).sqrt()
            out.append(F.interpolate(far[:, None], x.shape[2:], mode="bilinear", align_corners=True)[:, 0])
    return torch.stack(out).mean(0).float()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 100,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 64,
    taught: int = 400,
    dims: Sequence[int] = (32, 32),
) -> dict[str, Any]:
    """Train FOD and the same layers without correlations on each texture, and score every pixel of spoilt crops.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-defects-cpu.svg`` and ``tasks-defects-predictions.png``.
        steps, seeds, tested: of training and of the test; as many crops of each kind of defect.
        taught: steps of the backbone.
        dims: widths of the layers, per level.

    Returns:
        Plain values, for JSON.
    """
    score = require("sklearn.metrics").roc_auc_score
    images = {name: texture(name) for name in TEXTURES}
    half = {name: x.shape[1] // 2 for name, x in images.items()}
    held: dict[Any, Any] = {}

    def once(key: Any, make: Any) -> Any:
        if key not in held:
            held[key] = make()
        return held[key]

    def test(name: str, seed: int) -> tuple[Tensor, Tensor, list[str]]:
        g = torch.Generator().manual_seed(10_000 + seed)
        right = {n: x[:, half[n] :] for n, x in images.items()}
        other = right[TEXTURES[(TEXTURES.index(name) + 1) % len(TEXTURES)]]
        kinds = [DEFECTS[i % len(DEFECTS)] for i in range(tested)]
        made = [spoilt(right[name], other, kind, g) for kind in kinds]
        return torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made]), kinds

    def trained(trunk: Features, name: str, seed: int, maps: bool) -> FOD:
        torch.manual_seed(seed)
        left = images[name][:, : half[name]]
        model = FOD(trunk, SIDE, dims=dims, num_heads=2, depth=2, intra=maps, inter=maps, in_chans=1)
        if maps:
            model.remember(crops(left, 128, torch.Generator().manual_seed(20_000 + seed)))

        def loss(m: Any, x: Tensor) -> Tensor:
            total: Tensor = sum(m.loss(m(x)).values())  # type: ignore[assignment]
            return total

        fit(model, lambda g: crops(left, 4, g), loss, steps, lr=3e-3, seed=seed)
        return model.eval()

    def pixels(contestant: str, name: str, seed: int) -> tuple[Tensor, int]:
        """Scores of the spoilt crops (tested, 48, 48), and numbers that were trained."""
        trunk = once("backbone", lambda: backbone(taught))
        x = once(("test", name, seed), lambda: test(name, seed))[0]
        if contestant == "Gaussian of features":
            left = images[name][:, : half[name]]
            return gaussian(trunk, crops(left, 128, torch.Generator().manual_seed(20_000 + seed)), x), 0
        maps = contestant != "rebuilding alone"
        model = once(("model", name, seed, maps), lambda: trained(trunk, name, seed, maps))
        count = parameters(model) - parameters(trunk)
        if contestant in ("rebuilding alone", "FOD"):
            return model.predict(x).pixels, count
        with torch.no_grad():
            parts = [factors(level)[contestant != "FOD's error alone"] for level in model(x)]
        up = [F.interpolate(p[:, None], x.shape[2:], mode="bilinear", align_corners=True)[:, 0] for p in parts]
        return torch.stack(up).mean(0), count

    def run(contestant: str, seed: int) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for name in TEXTURES:
            given, count = pixels(contestant, name, seed)
            _, truth, kinds = once(("test", name, seed), lambda name=name: test(name, seed))
            found.setdefault(name, []).append(score(truth.flatten(), given.flatten()))
            for kind in DEFECTS:
                rows = [i for i, k in enumerate(kinds) if k == kind]
                found.setdefault(kind, []).append(score(truth[rows].flatten(), given[rows].flatten()))
        means = {key: 100 * sum(v) / len(v) for key, v in found.items()}
        mean = sum(means[n] for n in TEXTURES) / len(TEXTURES)
        return {"auroc": mean, **means, "parameters": count}

    settings = (steps, tested, taught, tuple(dims))
    result = study(NAMES, run, "auroc", NAMES[0], seeds, progress, keep, settings)
    result |= {"question": QUESTION, "machine": machine(), "steps": steps, "tested": tested, "taught": taught}
    if pictures is not None:
        curves = {r["name"]: [(k, r[k]["mean"], r[k]["half"]) for k in (*TEXTURES, *DEFECTS)] for r in result["rows"]}
        place = Path(pictures)
        picture(place / "tasks-defects-cpu.svg", curves, "", "pixel AUROC, %", "defects in textures")
        columns: dict[str, list[Tensor]] = {n: [] for n in ("crop", "defect", *NAMES[:2])}
        titles = []
        for i, name in enumerate(TEXTURES):
            maps = [pixels(c, name, seeds[0])[0] for c in NAMES[:2]]
            x, truth, kinds = once(("test", name, seeds[0]), lambda name=name: test(name, seeds[0]))
            for at in (2 * i % tested, (2 * i + 1) % tested):
                spread = [(m[at] - m[at].min()) / (m[at].max() - m[at].min()).clamp(min=1e-12) for m in maps]
                for shown, column in zip((x[at, 0], truth[at].float(), *spread), columns.values(), strict=True):
                    column.append(shown[None])
                titles.append(f"{name}, {kinds[at]}")
        rows = {n: torch.stack(v) for n, v in columns.items()}
        sheet(place / "tasks-defects-predictions.png", rows, titles, zoom=0.8, colours=64)
    return result


def table(found: Mapping[str, Any]) -> str:
    """The results as a table of a page."""
    lines = [
        "| score | pixel AUROC, % | against rebuilding alone | brick | grass | gravel | parameters |",
        "|---" * 7 + "|",
    ]
    for row in found["rows"]:
        gap = "" if row["name"] == NAMES[0] else f"{row['against']['mean']:+.1f} ± {row['against']['half']:.1f}"
        beside = " | ".join(told(row, k) for k in TEXTURES)
        lines.append(f"| {row['name']} | {told(row, 'auroc')} | {gap} | {beside} | {row['parameters']['mean']:,.0f} |")
    return "\n".join(lines)
