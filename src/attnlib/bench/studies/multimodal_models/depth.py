"""Depth as tokens: what reading codes softly, and learning through the decoder, add to hard tokens.

``attnlib bench --suite multimodal-models-depth --out benchmarks/results`` writes ``multimodal-models-depth-cpu.json``
and its pictures. Rooms of coloured boxes (:mod:`attnlib.bench.worlds.rooms`) have exact depth. A small VQ-VAE makes
8 x 8 codes of it, and a small AiT (:mod:`attnlib.models.multimodal.ait`) writes them from the picture, learnt with
cross-entropy alone or with SiLog through the frozen decoder besides. Each is read in several ways. Beside them: the
codes of the true depth, which no writer of codes can be expected to beat, and the same backbone with an encoder of
about as many parameters, whose output a decoder of the VQ-VAE's form turns into depth at once, learnt by SiLog.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....models.multimodal.ait import AiT, silog
from ....models.multimodal.soft_tokens import Solver, Vocabulary
from ....models.multimodal.vqvae import VQVAE
from ...clock import machine
from ...small import Progress, fit, parameters, picture, sheet, study, told
from ...worlds.rooms import make_room

QUESTION = "Is depth nearer to the truth with soft tokens than with hard ones, and how near to depth that is regressed?"

SIDE, CODES, RATIO, DIM, FAR = 32, 64, 4, 64, 10.0
#: By contestant: whether SiLog is learnt too, whether all tokens are told at once, and what is soft: reading, feeding.
WAYS: Mapping[str, tuple[bool, bool, bool, bool]] = {
    "hard tokens": (False, False, False, False),
    "hard tokens, read softly": (False, False, True, False),
    "soft tokens": (True, False, True, True),
    "soft tokens, fed hard": (True, False, True, False),
    "soft tokens, read hard": (True, False, False, False),
    "soft tokens, all at once": (True, True, True, True),
}
CONTESTANTS = (*WAYS, "regressed at once", "codes of the true depth")
COLUMNS = {"rmse": "error, m", "relative": "relative error %", "within": "within 25 % of the truth, %"}


class Views(NamedTuple):
    """Pictures (B, 3, 32, 32) and depth (B, 32, 32) in metres."""

    images: Tensor
    depth: Tensor


@functools.lru_cache(maxsize=4)
def views(first: int, count: int, part: str) -> Views:
    """Some rooms."""
    rooms = [make_room(first + i, part, SIDE) for i in range(count)]
    return Views(torch.stack([r.image for r in rooms]), torch.stack([r.depth for r in rooms]))


def backbone() -> nn.Sequential:
    """(B, 3, 32, 32) -> (B, 64, 8, 8)."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, DIM)):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(DIM, DIM, 3, padding=1))


class Regressor(nn.Module):
    """The backbone, blocks of a transformer, and a decoder of the VQ-VAE's form that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIDE // RATIO) ** 2, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)
        self.out = nn.Linear(DIM, 16)
        self.render = _vae()

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W) metres."""
        x = self.backbone(images).flatten(2).transpose(1, 2)
        x = self.out(self.blocks(x + self.places))
        return self.render.render(x.unflatten(1, (SIDE // RATIO, -1)))[..., 0].clamp(min=1e-3)


def _vae() -> VQVAE:
    return VQVAE(1, CODES, 16, 16, RATIO, 1, normalize=True, max_value=FAR)


def _of(data: Views, batch: int = 16) -> Any:
    def draw(g: torch.Generator) -> Views:
        at = torch.randint(len(data.images), (batch,), generator=g)
        turned = torch.rand(batch, 1, 1, generator=g) < 0.5  # rooms are as likely mirrored
        images, depth = data.images[at], data.depth[at]
        return Views(
            torch.where(turned.unsqueeze(1), images.flip(-1), images), torch.where(turned, depth.flip(-1), depth)
        )

    return draw


@functools.lru_cache(maxsize=1)
def codes(seed: int, rooms: int, steps: int) -> VQVAE:
    """A trained VQ-VAE of depth."""
    torch.manual_seed(seed)
    vae = _vae()
    data = views(seed * 100_000, rooms, "train")

    def loss(model: Any, batch: Views) -> Tensor:
        terms = model.loss(batch.depth.unsqueeze(-1))
        return 10 * terms["recon"] + terms["codes"].sum()

    # The codes start as what the untrained encoder makes: random ones would be far from all of it.
    with torch.no_grad():
        made = vae.features(data.depth[:64].unsqueeze(-1)).flatten(0, 2)
        vae.quantizer.codebook.copy_(made[torch.randperm(len(made))[:CODES]])
        vae.quantizer.sums.copy_(vae.quantizer.codebook)
        vae.quantizer.counts.fill_(1.0)
    fit(vae, _of(data), loss, steps, 2e-3, seed)
    return vae.eval()


@functools.lru_cache(maxsize=3)
def writer(seed: int, silog_too: bool, at_once: bool, rooms: int, steps: int, vae_steps: int) -> AiT:
    """A trained AiT."""
    vae = codes(seed, rooms, vae_steps)
    torch.manual_seed(seed + 1)
    words = Vocabulary(1, 1, 1, CODES)
    grid = (SIDE // RATIO, SIDE // RATIO)
    solver = Solver(
        DIM, words, DIM, 4, 2 * DIM, 2, 2, grid, grid[0] * grid[1] + 1, parallel=at_once, drop=0.0, drop_path=0.0
    )  # fmt: skip
    model = AiT(backbone(), solver, vae, silog_weight=1.0 if silog_too else 0.0)
    data = views(seed * 100_000, rooms, "train")

    def loss(m: Any, b: Views) -> Tensor:
        return torch.stack(list(m.loss(b.images, "depth", b.depth).values())).sum()

    fit(model, _of(data), loss, steps, 2e-3, seed)
    return model.eval()


@functools.lru_cache(maxsize=1)
def regressor(seed: int, rooms: int, steps: int) -> Regressor:
    """What tells depth without codes."""
    torch.manual_seed(seed + 1)
    model = Regressor()
    data = views(seed * 100_000, rooms, "train")

    def loss(m: nn.Module, b: Views) -> Tensor:
        said = m(b.images)
        return silog(said, b.depth) + 0.1 * (said - b.depth).abs().mean()

    fit(model, _of(data), loss, steps, 2e-3, seed)
    return model.eval()  # type: ignore[return-value]


@torch.no_grad()
def told_by(name: str, seed: int, asked: Views, rooms: int, steps: int, vae_steps: int) -> tuple[Tensor, int]:
    """Depth of pictures as a contestant tells it, and how many numbers it learnt."""
    if name == "codes of the true depth":
        vae = codes(seed, rooms, vae_steps)
        return vae.decode(vae.encode(asked.depth.unsqueeze(-1)))[..., 0], 0
    with torch.enable_grad():
        if name == "regressed at once":
            model: Any = regressor(seed, rooms, steps)
        else:
            silog_too, at_once, read, feed = WAYS[name]
            model = writer(seed, silog_too, at_once, rooms, steps, vae_steps)
    if name == "regressed at once":
        return torch.cat([model(part) for part in asked.images.split(64)]), parameters(model)
    model.soft, model.soft_feed = read, feed
    found = torch.cat([model.predict(part, "depth") for part in asked.images.split(64)])
    return found, sum(p.numel() for p in model.parameters() if p.requires_grad)


def measured(
    name: str,
    seed: int,
    part: str = "test",
    tests: int = 200,
    rooms: int = 1200,
    steps: int = 250,
    vae_steps: int = 300,
) -> dict[str, float]:
    """Errors of a contestant on rooms that it was not trained on."""
    asked = views(seed * 100_000, tests, part)
    depth, count = told_by(name, seed, asked, rooms, steps, vae_steps)
    depth, true = depth.clamp(min=1e-3), asked.depth
    ratio = torch.maximum(depth / true, true / depth)
    return {
        "rmse": float((depth - true).square().mean((1, 2)).sqrt().mean()),
        "relative": 100 * float(((depth - true).abs() / true).mean()),
        "within": 100 * float((ratio < 1.25).float().mean()),
        "parameters": float(count),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of a page."""
    lines = [f"| depth | {' | '.join(COLUMNS.values())} | error against hard tokens |", "|---" * 5 + "|"]
    for row in rows:
        cells = [told(row, "rmse", 3), told(row, "relative"), told(row, "within")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {told(row, 'against', 3)} |")
    return "\n".join(lines)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    part: str = "test",
    tests: int = 200,
    rooms: int = 1200,
    steps: int = 250,
    vae_steps: int = 300,
    names: Sequence[str] = CONTESTANTS,
) -> dict[str, Any]:
    """Every contestant on the same rooms.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``multimodal-models-depth-cpu.svg`` and ``.png``.
        seeds: of networks and rooms; each has its own.
        part: of the rooms that are asked about.
        tests: rooms to ask about.
        rooms, steps, vae_steps: rooms to learn from, updates of everybody and of the VQ-VAE.
        names: of the contestants.

    Returns:
        Plain values, for JSON: rows with intervals over seeds, differences paired with the hard tokens.
    """
    given: dict[str, Any] = dict(part=part, tests=tests, rooms=rooms, steps=steps, vae_steps=vae_steps)
    found = study(
        names, lambda name, seed: measured(name, seed, **given), "rmse", "hard tokens", seeds, progress, keep,
        key=["depth", given],
    )  # fmt: skip
    if pictures is not None:
        points = [(r["name"], r["rmse"]["mean"], r["rmse"]["half"]) for r in found["rows"]]
        picture(
            Path(pictures) / "multimodal-models-depth-cpu.svg", {"": points}, "", "error of depth, metres",
            "Depth of rooms, written as codes",
        )  # fmt: skip
        some = views(seeds[-1] * 100_000, tests, part)
        some = Views(some.images[:6], some.depth[:6])
        shown = {"picture": some.images, "truth": some.depth.unsqueeze(1) / FAR}
        for name in (n for n in ("hard tokens", "soft tokens", "regressed at once") if n in names):
            shown[name] = told_by(name, seeds[-1], some, rooms, steps, vae_steps)[0].unsqueeze(1) / FAR
        sheet(Path(pictures) / "multimodal-models-depth-cpu.png", shown, colours=64)
    return {"question": QUESTION, **given, **found, "machine": machine()}
