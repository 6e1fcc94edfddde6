"""Sentences that choose masks: does a gate over channels let them, and does an erased phrase help DMMI?

Scenes of coloured shapes and digits; a sentence names nothing, one thing or many. Gates and the sceptic's way (the
sentence is added to the coarsest map) stand on one convolutional backbone and read MiniLM's vector of the sentence.
DMMI reads words, by a small table that it learns, with and without the loss of the erased phrase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....models.backbones.resnet import resnet
from ....models.backbones.stages import Features
from ....models.dense.dmmi import DMMI, referring_scores
from ....models.dense.grounding import SentenceSegmenter
from ...clock import machine
from ...data.referring import KINDS, SENTENCES, WORDS, Referred, referred
from ...small import Progress, fit, interval, parameters, picture, sheet, study, told
from ...stats import paired_interval
from ..real.encoding import minilm

QUESTION = "Does the sentence choose the mask, also where it names nothing or many things?"
SHOWN = {
    "none": "no sentence", "added": "sentence added to the coarsest map", "softmax": "sentence gate, softmax",
    "softmax*C": "sentence gate, softmax times C", "dmmi plain": "DMMI, nothing erased", "dmmi": "DMMI",
}  # fmt: skip
#: What a contestant is held against besides the one that hears nothing.
BESIDE = {"softmax": "added", "softmax*C": "added", "dmmi": "dmmi plain"}
#: DMMI's learning rate, and its share of the steps, each of which takes three times as long.
RATE, SHARE = 4e-3, 0.8

#: Sentences to vectors (n, D).
Read = Callable[[Sequence[str]], Tensor]


class Added(SentenceSegmenter):
    """Without gates; a linear map of the sentence is added to the coarsest map."""

    def __init__(self, **settings: Any):
        super().__init__(gate=None, **settings)
        merge: Any = self.merges[-1]
        self.told = nn.Linear(settings["text_dim"], merge.conv.in_channels)

    def gated(
        self, maps: Sequence[Tensor], text: Tensor | Sequence[Tensor], has_text: Tensor | None = None
    ) -> list[Tensor]:
        *fine, coarse = super().gated(maps, text, has_text)
        return [*fine, coarse + self.told(text)[:, :, None, None]]


class Words(nn.Module):
    """Vectors (B, T, dim) of words by number, and of where they stand."""

    def __init__(self, dim: int, length: int = 3):
        super().__init__()
        self.table, self.place = nn.Embedding(len(WORDS), dim), nn.Parameter(0.1 * torch.randn(length, dim))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table(ids) + self.place[: ids.shape[1]]


def network(name: str, text_dim: int) -> Any:
    """A contestant, freshly drawn."""
    if name.startswith("dmmi"):
        sizes: dict[str, Any] = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
        words: dict[str, Any] = dict(text_dim=32, text_heads=2, ff_dim=64, drop=0.0)
        return DMMI(**sizes, **words, text_encoder=Words(32), drop_path_rate=0.0)
    trunk = resnet((16, 24, 32, 48), (1, 1, 1, 1), stem_dim=16, num_classes=0)
    given: dict[str, Any] = dict(encoder=Features(trunk), text_dim=text_dim, drop=0.0, hidden=1)
    if name == "added":
        return Added(**given)
    return SentenceSegmenter(gate=None if name == "none" else name, **given)


def inputs(name: str, samples: Referred, chosen: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """What a contestant is called with."""
    given = {"x": samples.pixels[samples.scene[chosen]]}
    if name.startswith("dmmi"):
        words = samples.words[chosen]
        given |= {"text": words, "valid": words > 0}
        return given | ({"erased": samples.erased[chosen]} if name == "dmmi" else {})
    return given | {"text": vectors[chosen]}


def by_kind(found: Tensor, samples: Referred) -> dict[str, float]:
    """``mIoU`` and ``oIoU`` of what is named, mean overlap of ``one`` and of ``many``, right ``empty`` masks, in %."""
    scores = referring_scores(found, samples.masks, at=())
    for k, kind in enumerate(KINDS[1:], 1):
        of = samples.kind == k
        if of.any():
            scores[kind] = referring_scores(found[of], samples.masks[of], at=())["mIoU"]
    return {k: 100 * v for k, v in scores.items()}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 200,
    seeds: Sequence[int] = (1, 2, 3),
    made: int = 600,
    tested: int = 100,
    names: Sequence[str] = tuple(SHOWN),
    read: Read = minilm,
    lr: float = 8e-3,
) -> dict[str, Any]:
    """Train all, and ask them for what is named in other scenes.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-sentence-cpu.svg``, and for ``tasks-sentence-cpu.png`` of predictions.
        steps, seeds: of training; DMMI takes :data:`SHARE` of the steps.
        made, tested: scenes to train and to test on, each with up to three sentences.
        names: contestants; ``"none"`` must be among them.
        read: from sentences to vectors; MiniLM by default.
        lr: learning rate; DMMI has its own, :data:`RATE`.

    Returns:
        Plain values, for JSON.
    """
    table_ = dict(zip(SENTENCES, read(SENTENCES), strict=True))
    held: dict[int, tuple[Referred, Referred]] = {}
    trained: dict[tuple[str, int], Any] = {}

    def samples(seed: int) -> tuple[Referred, Referred]:
        if seed not in held:
            held[seed] = referred(made, seed), referred(tested, seed, "test")
        return held[seed]

    def vectors(given: Referred) -> Tensor:
        return torch.stack([table_[s] for s in given.sentences])

    def model(name: str, seed: int) -> Any:
        if (name, seed) not in trained:
            torch.manual_seed(seed)
            own = samples(seed)[0]
            net, said = network(name, len(table_[SENTENCES[0]])), vectors(own)

            def batch(g: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
                chosen = torch.randint(0, len(own.scene), (12,), generator=g)
                return inputs(name, own, chosen, said), own.masks[chosen].long()

            def loss(m: Any, given: tuple[dict[str, Tensor], Tensor]) -> Tensor:
                total: Tensor = sum(m.loss(m(**given[0]), given[1]).values())  # type: ignore[assignment]
                return total

            words = name.startswith("dmmi")
            fit(net, batch, loss, math.ceil(SHARE * steps) if words else steps, lr=RATE if words else lr, seed=seed)
            trained[name, seed] = net
        return trained[name, seed]

    def answer(name: str, seed: int, chosen: Tensor) -> Tensor:
        exam, said = samples(seed)[1], vectors(samples(seed)[1])
        parts = [model(name, seed).predict(**inputs(name, exam, part, said)) for part in chosen.split(64)]
        return torch.cat(parts) == 1

    def run(name: str, seed: int) -> dict[str, float]:
        exam = samples(seed)[1]
        found = answer(name, seed, torch.arange(len(exam.scene)))
        return by_kind(found, exam) | {"parameters": parameters(model(name, seed))}

    result = study(names, run, "mIoU", "none", seeds, progress, keep, (steps, made, tested, lr, RATE, SHARE))
    result |= {
        "question": QUESTION, "machine": machine(), "steps": steps, "dmmi steps": math.ceil(SHARE * steps),
        "made": made, "tested": tested, "lr": lr, "dmmi lr": RATE,
    }  # fmt: skip
    for row in result["rows"]:
        base = BESIDE.get(row["name"])
        if base in names:
            row["beside"] = {k: _gap(result["runs"], row["name"], base, k) for k in ("mIoU", "empty")}
    if pictures is not None:
        curves = {
            SHOWN[r["name"]]: [(k, r[k]["mean"], r[k]["half"]) for k in ("one", "many", "empty")]
            for r in result["rows"]
        }
        path, seed = Path(pictures) / "tasks-sentence-cpu", seeds[-1]
        picture(path.with_suffix(".svg"), curves, "what is named", "mean overlap, and empty masks, %", "sentences")
        _drawn(path.with_suffix(".png"), names, samples(seed)[1], lambda n, chosen: answer(n, seed, chosen))
    return result


def _gap(runs: Sequence[Mapping[str, Any]], name: str, base: str | None, metric: str) -> dict[str, Any] | None:
    """Paired difference."""
    own, other = ({r["seed"]: r[metric] for r in runs if r["name"] == n} for n in (name, base))
    gap = paired_interval(own, other)
    return None if gap is None else interval(gap)


def _drawn(path: Path, names: Sequence[str], exam: Referred, answer: Callable[[str, Tensor], Tensor]) -> None:
    """Sentences of every kind: the scene, the mask that is meant, and what the contestants find, in white."""
    each = max(1, min(3, *((exam.kind == k).sum().item() for k in range(len(KINDS)))))
    chosen = torch.cat([(exam.kind == k).nonzero()[:each, 0] for k in (1, 2, 0)])
    scenes = exam.pixels[exam.scene[chosen]] / 2 + 0.5

    def marked(mask: Tensor) -> Tensor:
        return torch.where(mask[:, None], torch.ones(()), 0.35 * scenes)

    rows = {"scene": scenes, "truth": marked(exam.masks[chosen])}
    rows |= {SHOWN[n]: marked(answer(n, chosen)) for n in ("none", "added", "softmax*C", "dmmi") if n in names}
    sheet(path, rows, [exam.sentences[i] for i in chosen.tolist()], zoom=0.5, colours=48)


def table(result: Mapping[str, Any]) -> str:
    """The table of the page."""

    def signed(found: Mapping[str, Any] | None) -> str:
        return "" if found is None else f"{found['mean']:+.1f} ± {found['half']:.1f}"

    heads = ["contestant", "mIoU, %", "one thing", "many things", "empty where nothing is named, %",
             "mIoU against no sentence", "mIoU against its base", "empty against its base", "parameters"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = [told(row, k) for k in ("mIoU", "one", "many", "empty")]
        beside = row.get("beside") or {}
        cells += ["" if row["name"] == "none" else signed(row["against"])]
        cells += [signed(beside.get(k)) for k in ("mIoU", "empty")]
        lines.append(f"| {SHOWN[row['name']]} | {' | '.join([*cells, format(row['parameters']['mean'], '.0f')])} |")
    return "\n".join(lines)
