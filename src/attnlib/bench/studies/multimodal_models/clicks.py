"""Maps as clicks: does what a model looks at tell a segmenter where to cut?

``attnlib bench --suite multimodal-models-clicks --out benchmarks/results`` writes
``multimodal-models-clicks-cpu.json`` and its picture. A small ``SamModel`` (:mod:`attnlib.bench.worlds.segmenter`) must
first hold its own bars from a true click and a true box. Then one thing per picture is to be cut out by its name: on
painted pictures by maps of the small CLIP, on scenes by the attention of the small multimodal model while it lists
what it sees, and by where it says that a thing is, alone and in ProMaC. Beside them a click in the middle, one
anywhere, one on the thing, and its true box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....checks import check_choice
from ....hooks import TokenTypes
from ....look.flow import Flow
from ....look.prompts import from_map
from ....look.segment import VLSAM, FlowReader, GenSAM, ProMaC, Segmenter
from ....look.segment.promac import Answer, ContrastiveAsk, Questions, boxes_in
from ....look.segment.segmenter import Predict
from ....look.surgery import SurgeryMaps
from ....ops.points import ABSENT
from ...clock import machine
from ...data import scenes
from ...small import Progress, picture, study, told
from ...worlds import models, segmenter
from ...worlds.segmenter import Sight, box_of, sights

QUESTION = "Do clicks from maps cut a named thing out better than a click in the middle, and how near to its true box?"

#: What the segmenter must do before anything is claimed on it: mean overlap from a click on the thing, and from a box.
BARS = {"click on the thing": 0.85, "true box": 0.9}
CENTRE = "click in the middle"
CONTROLS = (CENTRE, "click anywhere", *BARS)
ROUNDS = 4
#: What the small multimodal model says of a thing's place, and ProMaC with it.
TOLD = NAMED, PROMAC = "cell that is named", "ProMaC"
#: Contestants by world.
PAINTED = (
    *CONTROLS, "CLIP, peak", "CLIP surgery (kk), peak", "CLIP surgery (vv), peak", "CLIP surgery (kk), extremes",
    "CLIP surgery (kk), component", *(f"GenSAM, round {i + 1}" for i in range(ROUNDS)), "GenSAM",
)  # fmt: skip
SCENES = (
    *CONTROLS, "flow, peak", "flow of VL-SAM, peak", "flow of VL-SAM, a token before, peak",
    "flow of VL-SAM, component", "VL-SAM", "VL-SAM, not refined", *TOLD,
)  # fmt: skip
CONTESTANTS = {"painted": PAINTED, "scenes": SCENES}
#: All layers of the small CLIP, chosen on 40 pictures of the part "dev": its peak hits 82 % of them, with three 42.
LAYERS = 4


class _PaintedMaps(SurgeryMaps):
    """Maps of the small CLIP, whose pixels lie in [-1, 1]."""

    def pixels(self, image: Tensor) -> Tensor:
        return (image.permute(2, 0, 1)[None] - 0.5) / 0.5


def clip_maps(path: str, layers: int = LAYERS) -> SurgeryMaps:
    """Maps of names by the small CLIP."""

    def tokenize(texts: list[str]) -> Any:
        return models.tokenizer()(texts, padding=True, return_tensors="pt")

    return _PaintedMaps(models.part("clip"), tokenize, layers=layers, path=path, templates=("a {}",))


def flow_reader(flow: Flow, model: tuple[Any, Any] | None = None, before: bool = False) -> FlowReader:
    """Where the small multimodal model looks while it lists what it sees.

    Args:
        flow: what rolls its attention out.
        model: ``(model, tokenizer)``; ``None`` for the repository's own.
        before: read where each word was chosen, one token before it stands.
    """
    speaker, tokenizer = scenes.load_model() if model is None else model

    def inputs(image: Tensor, question: str) -> dict[str, Any]:
        ids = torch.tensor([tokenizer(scenes.prompt(question))["input_ids"]])
        pixels = (image.permute(2, 0, 1)[None] - 0.5) * 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def names(answer: Tensor) -> list[tuple[str, list[int]]]:
        words = tokenizer.convert_ids_to_tokens(answer.tolist())
        pairs = [
            (f"{a} {b}", [i - before, i + 1 - before]) for i, (a, b) in enumerate(zip(words, words[1:], strict=False))
        ]
        return [(name, places) for name, places in pairs if name in scenes.NAMES]

    side = scenes.SIDE // scenes.PATCH
    token = tokenizer.convert_tokens_to_ids("<image>")
    return FlowReader(speaker, inputs, names, token, (side, side), flow, max_new_tokens=28)


def overlap(mask: Tensor, true: Tensor) -> float:
    """Intersection over union of two masks."""
    return float((mask & true).sum() / (mask | true).sum().clamp(min=1))


def target(world: str, number: int, part: str) -> tuple[Sight, int] | None:
    """A picture, and which of its things is to be cut out; ``None`` where no name stands for one thing alone."""
    (sight,) = sights(world, [number], part)
    alone = [i for i, n in enumerate(sight.names) if sight.names.count(n) == 1 and sight.masks[i].sum() >= 12]
    return (sight, alone[number % len(alone)]) if alone else None


class CellAsk:
    """``ask(image, question, history, without)`` for ProMaC: the small multimodal model says where a thing is.

    It answers with a cell, which is told as a box in shares of the picture; what ProMaC asks beside that is answered
    with the name itself, as the small model knows no such questions.

    Args:
        name: of the thing.
        model: ``(model, tokenizer)``; ``None`` for the repository's own.
    """

    def __init__(self, name: str, model: tuple[Any, Any] | None = None):
        speaker, self.tokenizer = scenes.load_model() if model is None else model
        self.name = name
        token = self.tokenizer.convert_tokens_to_ids("<image>")
        self.ask = ContrastiveAsk(speaker, self._inputs, self._box, TokenTypes(image=token), max_new_tokens=5)

    def _inputs(self, image: Tensor, question: str, history: Any) -> dict[str, Any]:
        ids = torch.tensor([self.tokenizer(scenes.prompt(question))["input_ids"]])
        pixels = (image.permute(2, 0, 1)[None] - 0.5) * 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def _box(self, ids: Tensor) -> str:
        said = [word for word in self.tokenizer.convert_ids_to_tokens(ids.tolist()) if word in scenes.PLACES]
        if not said:
            return ""
        row, column = divmod(scenes.PLACES.index(said[0]), scenes.GRID)
        box = [column, row, column + 1, row + 1]
        return str([value / scenes.GRID for value in box])

    def __call__(
        self, image: Tensor, question: str, history: Sequence[tuple[str, str]] = (), without: Tensor | None = None
    ) -> Answer:
        if not question.startswith("where"):
            return Answer(self.name)
        return self.ask(image, question, history, without)


#: What of ProMaC's questions the small model can answer.
ASKED = Questions("{key}", "{key}", "{key}", "where is {key} ?", "{key}", "where is {name} ?")


class Contest:
    """All contestants of a world on one picture at a time.

    Args:
        world: of :data:`CONTESTANTS`.
        part: of the pictures.
        model: the segmenter; ``None`` for the repository's own.
        layers: of CLIP surgery.
    """

    def __init__(self, world: str, part: str = "test", model: Any = None, layers: int = LAYERS):
        check_choice("world", world, CONTESTANTS)
        self.world, self.part = world, part
        made = segmenter.load() if model is None else model
        self.segmenter = Segmenter(made, segmenter.MEAN, segmenter.STD)
        if world == "painted":
            self.maps = {path: clip_maps(path, layers) for path in ("kk", "vv", "qk")}
        else:
            self.small = small = scenes.load_model()
            self.readers = {
                "flow": flow_reader(Flow("mean", 0.5, "none"), small),
                "flow of VL-SAM": flow_reader(Flow("mean-max", 0.5, "column"), small),
                "flow of VL-SAM, a token before": flow_reader(Flow("mean-max", 0.5, "column"), small, before=True),
            }
        self.number = -1
        self.found: dict[str, tuple[float, float]] = {}

    def __call__(self, number: int, name: str) -> tuple[float, float]:
        """Overlap of a contestant's mask with the thing, and whether its first click lies on it.

        Contestants that share work are done together, and kept until another picture is asked for.
        """
        check_choice("name", name, CONTESTANTS[self.world])
        if self.number != number:
            self._start(number)
        if name not in self.found:
            shown = self.image, self.name, self.predict, self.true
            if name in CONTROLS:
                self.found |= self._controls()
            elif self.world == "painted":
                self.found |= self._painted(*shown)
            else:
                self.found |= self._pointed(*shown) if name in TOLD else self._scenes(*shown)
        return self.found[name]

    def _start(self, number: int) -> None:
        found = target(self.world, number, self.part)
        if found is None:
            raise ValueError(f"number {number} has no thing whose name is its own")
        sight, which = found
        self.number, self.found, self.name, self.true = number, {}, sight.names[which], sight.masks[which]
        self.image = sight.image.permute(1, 2, 0).contiguous()
        self.predict = self.segmenter(self.image)

    def _controls(self) -> dict[str, tuple[float, float]]:
        predict, true, rng = self.predict, self.true, np.random.default_rng([self.number, 31])
        cells, side = true.nonzero(), true.shape[-1]
        on = cells[int(rng.integers(len(cells)))].flip(0).float() + 0.5
        return {
            CENTRE: _clicked(predict, torch.tensor([side / 2, side / 2]), true),
            "click anywhere": _clicked(predict, torch.from_numpy(rng.random(2) * side).float(), true),
            "click on the thing": _clicked(predict, on, true),
            "true box": (overlap(_best(predict(box=box_of(true))), true), 1.0),
        }

    def _painted(self, image: Tensor, name: str, predict: Predict, true: Tensor) -> dict[str, tuple[float, float]]:
        maps = {path: made(image, [name]) for path, made in self.maps.items()}
        out = {"CLIP, peak": _peak(maps["qk"], predict, true)}
        out |= {f"CLIP surgery ({path}), peak": _peak(maps[path], predict, true) for path in ("kk", "vv")}
        for rule in ("extremes", "component"):
            out[f"CLIP surgery (kk), {rule}"] = _prompted(maps["kk"], rule, predict, true)
        answer = GenSAM(self.segmenter, self.maps["kk"], ([name], []), rounds=ROUNDS)(image)
        for i, step in enumerate(answer.steps):
            out[f"GenSAM, round {i + 1}"] = (overlap(step.mask, true), _hit(step.points, step.labels, true))
        out["GenSAM"] = (overlap(answer.mask, true), out["GenSAM, round 1"][1])
        return out

    def _scenes(self, image: Tensor, name: str, predict: Predict, true: Tensor) -> dict[str, tuple[float, float]]:
        names = [name for name in SCENES if name not in (*CONTROLS, *TOLD)]
        out = dict.fromkeys(names, (0.0, 0.0))  # what is not named is not cut out
        question = "list the objects"
        seen = {label: dict(reader(image, question)) for label, reader in self.readers.items()}
        mine = seen["flow of VL-SAM"]
        if name not in mine:
            return out
        out |= {f"{label}, peak": _peak(maps[name], predict, true) for label, maps in seen.items()}
        out["flow of VL-SAM, component"] = _prompted(mine[name], "component", predict, true)
        for label, refine in (("VL-SAM", 1), ("VL-SAM, not refined", 0)):
            said = lambda picture, asked: [(name, mine[name])]  # noqa: E731
            things = VLSAM(lambda picture: predict, said, (question,), crops=False, refine=refine)(image)
            out[label] = (overlap(things[0].mask, true) if things else 0.0, out["flow of VL-SAM, component"][1])
        return out

    def _pointed(self, image: Tensor, name: str, predict: Predict, true: Tensor) -> dict[str, tuple[float, float]]:
        ask = CellAsk(name, self.small)
        cell = _boxed(ask(image, f"where is {name} ?").text, predict, true)
        reader, grid = self.readers["flow of VL-SAM"], (scenes.SIDE // scenes.PATCH,) * 2

        def maps(picture: Tensor, names: Sequence[str], places: Sequence[str]) -> Tensor:
            return dict(reader(picture, "list the objects")).get(name, torch.zeros(grid))

        def alike(images: Tensor, said: str) -> Tensor:  # one crop has no other to be weighed against
            return torch.zeros(len(images))

        found = ProMaC(
            self.segmenter, maps, ask, alike, _filled, key=name, rounds=2, scales=(1,), questions=ASKED
        )(image)  # fmt: skip
        middle = found.steps[found.chosen].box.unflatten(0, (2, 2)).mean(0)[None]
        return {NAMED: cell, PROMAC: (overlap(found.mask, true), _hit(middle, torch.ones(1), true))}


def _filled(image: Tensor, mask: Tensor, names: Sequence[str], places: Sequence[str]) -> Tensor:
    """The image (H, W, 3) with the mask painted over by the median colour of what is left."""
    rest = image[~mask].median(0).values
    return torch.where(mask[..., None], rest, image)


def _boxed(text: str, predict: Predict, true: Tensor) -> tuple[float, float]:
    found = boxes_in(text, true.shape)
    if not found:
        return 0.0, 0.0
    middle = found[0].unflatten(0, (2, 2)).mean(0)[None]
    return overlap(_best(predict(box=found[0])), true), _hit(middle, torch.ones(1), true)


def _best(found: Any) -> Tensor:
    return found.logits[int(found.scores.argmax())] > 0


def _clicked(predict: Predict, point: Tensor, true: Tensor) -> tuple[float, float]:
    labels = torch.ones(1)
    return overlap(_best(predict(point[None], labels)), true), _hit(point[None], labels, true)


def _hit(points: Tensor, labels: Tensor, true: Tensor) -> float:
    """Whether the first click on the thing lies on it."""
    on = points[labels == 1]
    return float(true[int(on[0, 1]), int(on[0, 0])]) if len(on) else 0.0


def _peak(found: Tensor, predict: Predict, true: Tensor) -> tuple[float, float]:
    prompt = from_map(found, true.shape, "extremes", count=1)
    on = prompt.labels[0] == 1
    return _clicked(predict, prompt.points[0][on][0], true) if bool(on.any()) else (0.0, 0.0)


def _prompted(found: Tensor, rule: str, predict: Predict, true: Tensor) -> tuple[float, float]:
    prompt = from_map(found, true.shape, rule)
    if bool(prompt.empty[0]):
        return 0.0, 0.0
    kept = prompt.labels[0] != ABSENT
    points, labels = prompt.points[0][kept], prompt.labels[0][kept]
    return overlap(_best(predict(points, labels)), true), _hit(points, labels, true)


def numbers(world: str, count: int, part: str, first: int) -> list[int]:
    """The first ``count`` pictures from ``first`` on that have a thing whose name is its own."""
    found: list[int] = []
    while len(found) < count:
        if target(world, first, part) is not None:
            found.append(first)
        first += 1
    return found


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    count: int = 400,
    part: str = "test",
    first: int = scenes.FRESH,
    model: Any = None,
) -> dict[str, Any]:
    """Every contestant on the same things.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``multimodal-models-clicks-cpu.svg``.
        count: pictures of each world, one thing of each.
        part: of the pictures.
        first: number of the first.
        model: the segmenter; ``None`` for the repository's own.

    Returns:
        Plain values, for JSON: by world overlaps in percent with intervals over pictures, paired differences from the
        click in the middle, how often the first click hits; and under ``bars`` whether the segmenter holds its own.
    """
    result: dict[str, Any] = {"question": QUESTION, "pictures": count, "part": part, "first": first}
    for world, names in CONTESTANTS.items():
        contest = Contest(world, part, model)

        def run(name: str, number: int, contest: Contest = contest) -> dict[str, float]:
            iou, hit = contest(number, name)
            return {"overlap": 100 * iou, "hit": 100 * hit}

        some = numbers(world, count, part, first)
        found = study(
            names, run, "overlap", CENTRE, seeds=some, progress=progress, keep=keep, key=["clicks", world, part]
        )
        result[world] = found["rows"]
        held = {row["name"]: row["overlap"]["mean"] / 100 for row in found["rows"]}
        result.setdefault("bars", {})[world] = {
            name: {"value": held[name], "bar": bar, "holds": held[name] >= bar} for name, bar in BARS.items()
        }
    if pictures is not None:
        curves = {
            world: [(r["name"], r["overlap"]["mean"], r["overlap"]["half"]) for r in result[world]]
            for world in CONTESTANTS
        }
        picture(
            Path(pictures) / "multimodal-models-clicks-cpu.svg", curves, "what the segmenter is told",
            "overlap with the thing, %", "Cutting a named thing out",
        )  # fmt: skip
    return {**result, "machine": machine()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a world as a table in Markdown."""
    lines = ["| what the segmenter is told | overlap % | against the middle | first click on the thing % |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        cells = [row["name"], *("" if row[k] is None else told(row, k) for k in ("overlap", "against", "hit"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
