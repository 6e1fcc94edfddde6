"""Ten labelled maps: which part of a segmenter should learn from them?

``attnlib bench --suite multimodal-models-maps --out benchmarks/results`` writes ``multimodal-models-maps-cpu.json`` and
its pictures. The small ``SamModel`` of :mod:`attnlib.bench.worlds.segmenter`, which never saw a map, is to find the
ground of vineyards on drawn maps (:mod:`attnlib.bench.worlds.maps`) without a prompt, from ten examples. All rows have
the coarse heads, prompts and decoder of MapSAM; they differ in what of the encoder learns: low-rank changes with a norm
per column (MapSAM's DoRA), the same without the norm (LoRA), nothing ("head only"), or all. "Everything"
calls the whole map a vineyard.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....checks import check_choice
from ....models.multimodal.mapsam import MapSAM
from ...clock import machine
from ...small import Progress, fit, picture, sheet, study, told
from ...worlds import segmenter
from ...worlds.maps import KINDS, make_map

QUESTION = "Of ten labelled maps, does a segmenter learn more by MapSAM's adapter than by LoRA, heads alone or all?"

SIDE, KIND = segmenter.SIDE, "vineyard"
MAPSAM, LORA, HEADS = "MapSAM (DoRA)", "LoRA", "head only"
FULL, NONE = "full tuning", "everything"
LEARNING = (MAPSAM, LORA, HEADS, FULL)
CONTESTANTS = (*LEARNING, NONE)
COLUMNS = {"overlap": "overlap %", "dice": "Dice %"}
#: Rates of learning, chosen on seed 100 and the part "dev" (:func:`choose_rates`).
TRIED = (3e-3, 1e-2, 3e-2)
RATES: Mapping[str, float] = {MAPSAM: 1e-2, LORA: 1e-2, HEADS: 1e-2, FULL: 3e-3}


class Maps(NamedTuple):
    """Maps (B, 64, 64, 3) as the segmenter reads them, and where vineyards are (B, 64, 64)."""

    images: Tensor
    masks: Tensor


@functools.lru_cache(maxsize=4)
def drawn(first: int, count: int, part: str) -> Maps:
    """The first maps from a number on that show a vineyard."""
    images: list[Tensor] = []
    masks: list[Tensor] = []
    while len(images) < count:
        made = make_map(first, part, SIDE)
        first += 1
        mask = made.masks[KINDS.index(KIND)]
        if bool(mask.any()):
            images.append((made.image.permute(1, 2, 0) - torch.tensor(segmenter.MEAN)) / torch.tensor(segmenter.STD))
            masks.append(mask)
    return Maps(torch.stack(images), torch.stack(masks))


class LoRAQKV(nn.Module):
    """A frozen projection to queries, keys and values with low-rank changes of queries and values, without norms.

    Args:
        qkv: linear map C -> 3 C.
        rank: of the changes.
    """

    def __init__(self, qkv: nn.Linear, rank: int = 4):
        super().__init__()
        dim = qkv.in_features
        self.qkv = qkv
        self.down = nn.ParameterList(nn.Parameter(torch.randn(dim, rank) * rank**-0.5) for _ in range(2))
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(rank, dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, v = (x @ a @ b for a, b in zip(self.down, self.up, strict=True))
        return self.qkv(x) + torch.cat([q, torch.zeros_like(q), v], -1)


def made(name: str, seed: int, rank: int = 4) -> MapSAM:
    """A contestant before its training."""
    check_choice("name", name, LEARNING)
    torch.manual_seed(seed)
    model = MapSAM(segmenter.load(), rank=rank if name == MAPSAM else 0, every=1)
    encoder = model.sam.vision_encoder
    if name == LORA:
        for layer in encoder.layers:
            layer.attn.qkv = LoRAQKV(layer.attn.qkv, rank)
    if name == FULL:
        encoder.requires_grad_(True)
    model.sam.prompt_encoder.requires_grad_(False)
    return model


def learnt(model: MapSAM) -> int:
    """How many numbers of the encoder learn."""
    return sum(p.numel() for p in model.sam.vision_encoder.parameters() if p.requires_grad)


@functools.lru_cache(maxsize=len(LEARNING))
def trained(name: str, seed: int, rate: float, shots: int, steps: int, batch: int = 4) -> MapSAM:
    """A contestant after its training on so many maps, half of them mirrored or turned over."""
    data = drawn(10_000 * seed, shots, "train")
    model = made(name, seed)

    def draw(g: torch.Generator) -> Maps:
        some = torch.randint(shots, (batch,), generator=g)
        images, masks = data.images[some], data.masks[some]
        for axis in (1, 2):
            turned = torch.rand(batch, 1, 1, generator=g) < 0.5
            images = torch.where(turned[..., None], images.flip(axis), images)
            masks = torch.where(turned, masks.flip(axis), masks)
        return Maps(images, masks)

    def loss(m: Any, b: Maps) -> Tensor:
        return torch.stack(list(m.loss(m(b.images), b.masks).values())).sum()

    fit(model, draw, loss, steps, rate, seed)
    return model.eval()  # type: ignore[return-value]


def masks_of(name: str, seed: int, images: Tensor, rate: float | None, shots: int, steps: int) -> Tensor:
    """(B, 64, 64) where a contestant sees vineyards."""
    if name == NONE:
        return torch.ones(images.shape[:3], dtype=torch.bool)
    model = trained(name, seed, RATES[name] if rate is None else rate, shots, steps)
    with torch.no_grad():
        return torch.cat([model(part).masks[:, 0] > 0 for part in images.split(16)])


def measured(
    name: str, seed: int, part: str = "test", tests: int = 40, shots: int = 10, steps: int = 60,
    rate: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Overlap on maps that a contestant was not trained on."""
    data = drawn(10_000 * seed, tests, part)
    found = masks_of(name, seed, data.images, rate, shots, steps)
    both, either = (found & data.masks).sum((1, 2)), (found | data.masks).sum((1, 2))
    return {
        "overlap": 100 * float((both / either.clamp(min=1)).mean()),
        "dice": 100 * float((2 * both / (both + either).clamp(min=1)).mean()),
        "parameters": 0.0 if name == NONE else float(learnt(made(name, seed))),
    }


def choose_rates(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    names: Sequence[str] = LEARNING,
    tried: Sequence[float] = TRIED,
    seed: int = 100,
    **given: Any,
) -> dict[str, Any]:
    """Overlap of every contestant and rate, on maps of the part "dev" and a seed that is not reported."""
    pairs = {f"{name}, {rate:g}": (name, rate) for name in names for rate in tried}

    def run(label: str, seed: int) -> dict[str, float]:
        name, rate = pairs[label]
        return measured(name, seed, "dev", rate=rate, **given)

    return study(list(pairs), run, "overlap", None, [seed], progress, keep, key=["maps, rates", given])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of a page."""
    lines = [f"| what learns | {' | '.join(COLUMNS.values())} | numbers of the encoder | against MapSAM |"]
    lines.append("|---" * 5 + "|")
    for row in rows:
        numbers = f"{row['parameters']['mean']:,.0f}"
        lines.append(
            f"| {row['name']} | {told(row, 'overlap')} | {told(row, 'dice')} | {numbers} | {told(row, 'against')} |"
        )
    return "\n".join(lines)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    part: str = "test",
    tests: int = 40,
    shots: int = 10,
    steps: int = 60,
    names: Sequence[str] = CONTESTANTS,
) -> dict[str, Any]:
    """Every contestant on the same maps.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``multimodal-models-maps-cpu.svg`` and ``.png``.
        seeds: of what is new, and of the maps; each has its own.
        part: of the maps that are asked about.
        tests: maps to ask about.
        shots: maps to learn from.
        steps: updates of four maps.
        names: of the contestants.

    Returns:
        Plain values, for JSON: rows with intervals over seeds, differences paired with MapSAM.
    """
    given: dict[str, Any] = dict(part=part, tests=tests, shots=shots, steps=steps)
    rates = {name: RATES[name] for name in names if name in RATES}
    found = study(
        names, lambda name, seed: measured(name, seed, **given), "overlap", MAPSAM, seeds, progress, keep,
        key=["maps", given, rates],
    )  # fmt: skip
    if pictures is not None:
        points = [(r["name"], r["overlap"]["mean"], r["overlap"]["half"]) for r in found["rows"]]
        picture(
            Path(pictures) / "multimodal-models-maps-cpu.svg", {"": points}, "what learns",
            "overlap with vineyards, %", "Ten labelled maps",
        )  # fmt: skip
        some = drawn(10_000 * seeds[-1], tests, part)
        images, true = some.images[:6], some.masks[:6]
        shown = {"map": images.permute(0, 3, 1, 2) * segmenter.STD[0] + segmenter.MEAN[0], "truth": true[:, None]}
        for name in (n for n in (MAPSAM, LORA, HEADS, FULL) if n in names):
            shown[name] = masks_of(name, seeds[-1], images, None, shots, steps)[:, None]
        sheet(Path(pictures) / "multimodal-models-maps-cpu.png", {k: v.float() for k, v in shown.items()}, colours=64)
    return {"question": QUESTION, "kind": KIND, **given, "rates": rates, **found, "machine": machine()}
