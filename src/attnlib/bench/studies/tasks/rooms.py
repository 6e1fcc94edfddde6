"""Rooms: depth without a range set beforehand, and three tasks out of one pass.

Rooms of up to 10 m and the same ones of up to 80 m, whose floors alone tell which, with exact depth: ScaleDepth against
itself with the range of 80 m and against the logarithm of depth straight from the maps. Depth, normals and edges of the
small ones: TaskExpert against one trunk for all tasks, of as many numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....models.backbones.resnet import resnet
from ....models.backbones.stages import FeatureInfo, Features
from ....models.dense.context import resized_maps
from ....models.dense.scaledepth import Depth, ScaleDepth
from ....models.dense.taskexpert import DenseTask, TaskExpert
from ....models.losses import silog_loss
from ...clock import machine
from ...data.files import require
from ...small import Progress, fit, parameters, picture, sheet, study, told
from ...worlds.rooms import make_room

QUESTION = "Does one model learn rooms of 10 and of 80 m without a range, and do experts serve three tasks at once?"
DEPTH = ("fixed range", "logarithm", "ScaleDepth")
TASKS = ("one trunk", "TaskExpert")
#: What rooms are scaled by: far walls at 6 to 10 m, and at 50 to 80 m.
SCALES = {"10 m": 1.25, "80 m": 10.0}
SIDE = 32


class FixedRange(ScaleDepth):
    """The same model, whose scale is the largest depth of all, set beforehand: relative depth times 80 m."""

    def forward(self, x: Tensor) -> Depth:
        """As of :class:`ScaleDepth`; what the scale queries say is not heard."""
        said = super().forward(x)
        scale = torch.full_like(said.scale, 80.0)
        return said._replace(depth=scale[:, None, None] * said.relative, scale=scale)


class Logarithm(nn.Module):
    """Maps of one width, summed at the finest grid, smoothed, to the logarithm of depth of every pixel.

    Args:
        encoder: gives maps with a ``feature_info``.
        dim: their width.
    """

    def __init__(self, encoder: Features, dim: int):
        super().__init__()
        self.encoder = encoder
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in encoder.feature_info.channels())
        self.head = nn.Sequential(
            nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(),
            nn.Conv2d(dim, 1, 1),
        )  # fmt: skip
        nn.init.constant_(self.head[-1].bias, 2.3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H, W)."""
        maps = [f(m) for f, m in zip(self.lateral, self.encoder(x), strict=True)]
        y = maps[0] + sum(resized_maps(m, maps[0].shape[2:]) for m in maps[1:])
        return resized_maps(self.head(y), x.shape[2:])[:, 0].clamp(-5, 10).exp()


class Trunk(nn.Module):
    """Three maps of one grid, half as fine as the image: residual blocks of dilated convolutions.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, dim), nn.Conv2d(dim, dim, 3, 1, d, d), nn.GELU(), nn.Conv2d(dim, dim, 1))
            for d in (1, 2, 4)
        )
        info = [{"num_chs": dim, "reduction": 2, "module": f"blocks.{i}"} for i in range(3)]
        self.feature_info = FeatureInfo(info)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> three of (B, dim, H / 2, W / 2)."""
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(maps[-1] + block(maps[-1]))
        return maps[1:]


class OneTrunk(TaskExpert):
    """The same encoder, heads and losses; all tasks read one map, of the encoder's three by an MLP.

    Args:
        tasks, encoder: as of :class:`TaskExpert`.
        width: of that map.
    """

    def __init__(self, tasks: dict[str, DenseTask], encoder: Trunk, width: int):
        super().__init__(tasks, encoder, num_experts=1, expert_dim=width, memory=False, gate_dim=1)
        self.experts = nn.ModuleList()
        inside = sum(encoder.feature_info.channels())
        self.shared = nn.Sequential(
            nn.Linear(inside, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width),
            nn.GELU(), nn.Linear(width, width),
        )  # fmt: skip

    def _predicted(self, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        last = self.shared(torch.cat(self.encoder(x), 1).movedim(1, -1))
        made = {n: resized_maps(head(last).movedim(-1, 1), x.shape[2:]) for n, head in self.heads.items()}
        return made, []


def built(name: str) -> Any:
    """A contestant by its name; its first numbers come from torch's seed."""
    if name in DEPTH:
        trunk = Features(resnet((16, 32), (1, 1), basic=True, stem="deep", stem_dim=16, num_classes=0), (1, 2))
        if name == "logarithm":
            return Logarithm(trunk, 70)
        kind = ScaleDepth if name == "ScaleDepth" else FixedRange
        return kind(trunk, 32, 2, num_bins=16, num_scales=2, depth=2, scale_depth=1, text_dim=2, start=30.0)
    tasks = {
        "depth": DenseTask("depth"),
        "normals": DenseTask("normals", 3, 10.0),
        "edges": DenseTask("edges", 1, 50.0),
    }
    if name == "TaskExpert":
        return TaskExpert(tasks, Trunk(16), 3, 16, gate_dim=16)
    return OneTrunk(tasks, Trunk(16), 54)


def edges(normals: Tensor, owner: Tensor) -> Tensor:
    """(H, W) of 0 and 1: where the face that is seen is another one to the right or below."""
    out = torch.zeros_like(owner)
    for axis in (0, 1):
        here, there = (slice(None, -1), slice(1, None))
        at = (here, slice(None)) if axis == 0 else (slice(None), here)
        to = (there, slice(None)) if axis == 0 else (slice(None), there)
        out[at] |= (
            (normals[(slice(None), *at)] != normals[(slice(None), *to)]).any(0) | (owner[at] != owner[to])
        ).long()
    return out


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 250,
    seeds: Sequence[int] = (1, 2, 3),
    taught: int = 160,
    tested: int = 60,
) -> dict[str, Any]:
    """Train the contestants of both parts.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-rooms-cpu.svg`` and ``tasks-rooms-predictions.png``.
        steps, seeds: of training.
        taught, tested: rooms of each scale.

    Returns:
        Plain values, for JSON.
    """
    precision = require("sklearn.metrics").average_precision_score
    held: dict[Any, Any] = {}

    def rooms(part: str, scale: str, seed: int) -> dict[str, Tensor]:
        if (part, scale, seed) not in held:
            count = taught if part == "train" else tested
            made = [make_room(10_000 * seed + i, part, SIDE, scale=SCALES[scale]) for i in range(count)]
            held[part, scale, seed] = {
                "x": torch.stack([2 * r.image - 1 for r in made]), "depth": torch.stack([r.depth for r in made]),
                "normals": torch.stack([r.normals for r in made]),
                "edges": torch.stack([edges(r.normals, r.owner) for r in made]),
            }  # fmt: skip
        return held[part, scale, seed]

    def trained(name: str, seed: int) -> Any:
        if (name, seed) in held:
            return held[name, seed]
        scales = list(SCALES) if name in DEPTH else list(SCALES)[:1]
        parts = [rooms("train", s, seed) for s in scales]
        known = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        torch.manual_seed(seed)
        model = built(name)

        def batch(g: torch.Generator) -> dict[str, Tensor]:
            rows = torch.randint(0, len(known["x"]), (8,), generator=g)
            return {k: t[rows] for k, t in known.items()}

        def loss(m: Any, given: dict[str, Tensor]) -> Tensor:
            made = m(given["x"])
            if name == "logarithm":
                return silog_loss(made, given["depth"], scale=10.0)
            if name in DEPTH:
                terms = m.loss(made, given["depth"])
            else:
                terms = m.loss(made, {**{k: given[k] for k in ("normals", "edges")}, "depth": given["depth"][:, None]})
            total: Tensor = sum(terms.values())
            return total

        fit(model, batch, loss, steps, lr=3e-3, seed=seed)
        held[name, seed] = model.eval()
        return held[name, seed]

    def depth_of(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            made = model(x)
        return made.depth if isinstance(made, Depth) else made

    def depth(name: str, seed: int) -> dict[str, float]:
        model, out = trained(name, seed), {}
        for scale in SCALES:
            test = rooms("test", scale, seed)
            out[scale] = 100 * float(((depth_of(model, test["x"]) - test["depth"]).abs() / test["depth"]).mean())
        return {"error": sum(out.values()) / len(out), **out, "parameters": parameters(model)}

    def three(name: str, seed: int) -> dict[str, float]:
        model, test = trained(name, seed), rooms("test", list(SCALES)[0], seed)
        made = model.predict(test["x"])
        angle = (made["normals"] * test["normals"]).sum(1).clamp(-1, 1).acos().rad2deg()
        return {
            "angle": float(angle.mean()),
            "depth": 100 * float(((made["depth"] - test["depth"]).abs() / test["depth"]).mean()),
            "edges": 100 * precision(test["edges"].flatten(), made["edges"].flatten()),
            "parameters": parameters(model),
        }

    result: dict[str, Any] = {"question": QUESTION, "machine": machine(), "steps": steps, "tested": tested, "parts": {}}

    def kept(
        part: str, run: Callable[[str, int], dict[str, float]], names: Sequence[str], metrics: Sequence[str]
    ) -> None:
        """The study by its first metric; paired differences of all of them."""
        runs: dict[tuple[str, int], dict[str, float]] = {}

        def once(name: str, seed: int) -> dict[str, float]:
            if (name, seed) not in runs:
                runs[name, seed] = run(name, seed)
            return runs[name, seed]

        for metric in metrics:
            hears, key = progress if metric == metrics[0] else None, (part, steps, taught, tested)
            found = study(names, once, metric, names[0], seeds, hears, keep, key)
            if metric == metrics[0]:
                result["parts"][part] = found
            else:
                for row, other in zip(result["parts"][part]["rows"], found["rows"], strict=True):
                    row[f"{metric} against"] = other["against"]

    kept("depth", depth, DEPTH, ("error", *SCALES))
    kept("three tasks", three, TASKS, ("angle", "depth", "edges"))
    if pictures is not None:
        place, seed = Path(pictures), seeds[0]
        curves = {
            r["name"]: [(s, r[s]["mean"], r[s]["half"]) for s in SCALES] for r in result["parts"]["depth"]["rows"]
        }
        picture(place / "tasks-rooms-cpu.svg", curves, "rooms of up to", "relative error of depth, %", "depth of rooms")
        _draw(place / "tasks-rooms-predictions.png", trained, rooms, depth_of, seed)
    return result


def _draw(path: Path, trained: Any, rooms: Any, depth_of: Any, seed: int) -> None:
    """Two rooms of either scale and what is said of their depth, then normals and edges of two."""
    rows: dict[str, list[Tensor]] = {n: [] for n in ("room", "truth", "plain", "ours")}
    titles: list[str] = []
    for scale, longest in (("10 m", 10.0), ("80 m", 80.0)):
        test = rooms("test", scale, seed)
        for i in range(2):
            maps = [
                test["depth"][i],
                *(depth_of(trained(n, seed), test["x"][i : i + 1])[0] for n in (DEPTH[0], DEPTH[-1])),
            ]
            shown = [test["x"][i] / 2 + 0.5, *((m / longest)[None].expand(3, -1, -1) for m in maps)]
            for line, picture_ in zip(rows.values(), shown, strict=True):
                line.append(picture_)
            titles.append(f"depth, {scale}: fixed range, ScaleDepth")
    test = rooms("test", "10 m", seed)
    made = {n: trained(n, seed).predict(test["x"][:2]) for n in TASKS}
    for what in ("normals", "edges"):
        for i in range(2):
            maps = [test[what][i], *(made[n][what][i] for n in TASKS)]
            seen = [m / 2 + 0.5 if what == "normals" else m.float()[None].expand(3, -1, -1) for m in maps]
            for line, picture_ in zip(rows.values(), [test["x"][i] / 2 + 0.5, *seen], strict=True):
                line.append(picture_)
            titles.append(f"{what}: one trunk, TaskExpert")
    sheet(path, {n: torch.stack(v) for n, v in rows.items()}, titles, 0.8, 16, 64)


def depth_table(found: Mapping[str, Any]) -> str:
    """What came of depth, as a table of a page."""
    lines = ["| depth | relative error, % | against the fixed range | 10 m | 80 m | parameters |", "|---" * 6 + "|"]
    for row in found["parts"]["depth"]["rows"]:
        gap = "" if row["name"] == DEPTH[0] else f"{row['against']['mean']:+.1f} ± {row['against']['half']:.1f}"
        beside = " | ".join(told(row, k) for k in SCALES)
        count = f"{row['parameters']['mean']:,.0f}"
        lines.append(f"| {row['name']} | {told(row, 'error')} | {gap} | {beside} | {count} |")
    return "\n".join(lines)


def tasks_table(found: Mapping[str, Any]) -> str:
    """What came of the three tasks, as a table of a page."""
    lines = ["| task | one trunk | TaskExpert | difference |", "|---|---|---|---|"]
    plain, ours = found["parts"]["three tasks"]["rows"]
    said = {
        "angle": "normals, degrees off",
        "depth": "depth, relative error in %",
        "edges": "edges, average precision in %",
    }
    for metric, what in said.items():
        gap = ours["against" if metric == "angle" else f"{metric} against"]
        lines.append(
            f"| {what} | {told(plain, metric)} | {told(ours, metric)} | {gap['mean']:+.1f} ± {gap['half']:.1f} |"
        )
    counts = (f"{row['parameters']['mean']:,.0f}" for row in (plain, ours))
    lines.append(f"| parameters | {' | '.join(counts)} |  |")
    return "\n".join(lines)
