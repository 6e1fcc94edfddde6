"""Conversion of pretrained models: what is left of them when softmax attention becomes linear.

``attnlib bench --suite conversion --out benchmarks/results`` measures again what ``conversion-cpu.json`` holds and
draws it; ``make models`` fetches the models. Layers of SmolLM2-135M (a decoder, every third layer) and of MiniLM (a
sentence encoder, every layer) become linear and are trained for some steps to agree with themselves, on text inside
installed packages. Text that was held out says what that costs: bits per byte by step, how far sentence vectors turn,
and per layer how far maps are from softmax, their entropy, and whether weights rise with scores as those of softmax do
(rank correlation of weights and scores along a query's keys, 1 for softmax).

Contestants are the feature maps of Hedgehog trained on maps or on outputs, LoLCATs' window with them, 1 + elu as it is
and with trained matrices before it, and a softmax window alone. The model itself is the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import convert
from ...convert import agreement
from ...nn.linear.heads import softmax_map
from .. import models
from ..clock import machine
from ..converting import batches_of, bits_per_byte, tokens_of
from ..data import files
from ..small import Progress, picture, study

TEACHER = "softmax (the model itself)"
WINDOW = 16


@dataclass(frozen=True)
class Contestant:
    """What a model's attention becomes.

    Args:
        to: a target of :func:`attnlib.convert.linearize`; ``None`` leaves the model as it is.
        settings: of the mixers.
        loss: what they are trained by; ``None`` for no training.
        causal: it serves causal attention only.
    """

    to: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    loss: str | None = None
    causal: bool = False


CONTESTANTS: dict[str, Contestant] = {
    TEACHER: Contestant(None),
    "1 + elu": Contestant("elu1"),
    "1 + elu, trained": Contestant("hedgehog", {"features": "elu1"}, "xent"),
    "Hedgehog, on maps": Contestant("hedgehog", {}, "xent"),
    "Hedgehog, on outputs": Contestant("hedgehog", {}, "mse"),
    f"window of {WINDOW}": Contestant("window", {"window_size": WINDOW}, causal=True),
    f"LoLCATs, window of {WINDOW}": Contestant(
        "lolcats", {"window_size": WINDOW, "feature_options": {"identity": True}}, "mse", causal=True
    ),
}


def rank(x: Tensor) -> Tensor:
    """Ranks along the last axis, as floating-point numbers."""
    return x.argsort(-1).argsort(-1).double()


@torch.no_grad()
def monotony(conversion: convert.Conversion | None, batches: Sequence[Any], least: int = 8) -> float:
    """Rank correlation of weights with scores along the keys of each query that reads at least ``least``, averaged."""
    if conversion is None:
        return 1.0
    found: list[float] = []

    def watcher(path: str) -> agreement.Watch:
        socket = conversion.swap.sockets[path]

        def watch(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, truth: Tensor) -> None:
            weights = socket.weights(q, k, valid=valid)
            _, target = softmax_map(q, k, v, socket.scale, socket.causal, valid)
            n = q.shape[2]
            exists = valid if valid is not None else torch.ones(q.shape[0], n, dtype=torch.bool)
            for row in range(least - 1, n, 7):
                keys = exists[:, None].expand(-1, q.shape[1], -1).clone()
                if socket.causal:
                    keys[..., row + 1 :] = False
                for b in range(q.shape[0]):
                    at = keys[b, 0]
                    if not exists[b, row] or int(at.sum()) < least:
                        continue
                    pair = torch.stack([rank(weights[b, :, row][:, at]), rank(target[b, :, row][:, at])])
                    pair = pair - pair.mean(-1, keepdim=True)
                    size = pair.square().sum(-1).sqrt().prod(0).clamp(min=1e-12)
                    found.append(float((pair.prod(0).sum(-1) / size).mean()))

        return watch

    watches = {path: watcher(path) for path in conversion.swap.sockets}
    with agreement.originals(conversion.swap, watches):
        for given in batches:
            agreement.call_model(conversion.model, given)
    return sum(found) / max(len(found), 1)


def of_layers(conversion: convert.Conversion | None, held: Sequence[Any]) -> dict[str, float]:
    """What a report says of layers, averaged, and :func:`monotony`."""
    if conversion is None:
        return {}
    rows = conversion.report(held).layers
    names = ("error", "divergence", "entropy", "teacher_entropy")
    numbers = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    return {**numbers, "monotony": monotony(conversion, held)}


def sentences(data: Tensor, least: int = 60, most: int = 400) -> list[str]:
    """Paragraphs of a text that are about a sentence or two long."""
    text = bytes(data.tolist()).decode("utf-8", errors="ignore")
    found = (" ".join(part.split()) for part in text.split("\n\n"))
    return [part for part in found if least <= len(part) <= most]


def embeddings(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Sentence vectors: means over tokens, of length one."""
    hidden, mask = model(**given).last_hidden_state, given["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _decoder(
    seeds: Sequence[int], steps: int, marks: Sequence[int], layers: Sequence[int] | None, length: int,
    held_windows: int, progress: Progress | None, keep: str | Path | None, name: str,
) -> dict[str, Any]:  # fmt: skip
    model, tokenizer = models.load(name)
    data = files.text()
    train, test = (tokens_of(tokenizer, part) for part in (data.train, data.test))
    before: dict[int, float] = {}

    def run(contestant: str, seed: int) -> dict[str, float]:
        entry = CONTESTANTS[contestant]
        held = batches_of(test, length, held_windows, most=1, seed=seed)
        if seed not in before:
            before[seed] = bits_per_byte(model, tokenizer, held)
        if entry.to is None:
            return {"bits": before[seed]} | {f"bits after {m}": before[seed] for m in marks}
        conversion = convert.linearize(model, entry.to, layers=layers, **entry.settings)
        found: dict[str, float] = {}
        try:
            bits = bits_per_byte(model, tokenizer, held)
            found[f"bits after {marks[0]}"] = bits

            def look(step: int, loss: float) -> None:
                if step in marks:
                    found[f"bits after {step}"] = bits_per_byte(model, tokenizer, held)

            if entry.loss is not None:
                conversion.fit(batches_of(train, length, seed=seed), entry.loss, steps=steps, lr=1e-2, progress=look)
            found |= {f"bits after {m}": found.get(f"bits after {m}", bits) for m in marks}
            found["bits"] = found[f"bits after {marks[-1]}"]
            return found | of_layers(conversion, held)
        finally:
            conversion.restore()

    names = list(CONTESTANTS)
    key = (name, steps, list(marks), layers if layers is None else list(layers), length, held_windows)
    return {"text": data.source, **study(names, run, "bits", TEACHER, seeds, progress, keep, key)}


def _encoder(
    seeds: Sequence[int], steps: int, held_sentences: int, progress: Progress | None, keep: str | Path | None, name: str
) -> dict[str, Any]:
    model, tokenizer = models.load(name)
    data = files.text()
    train, test = sentences(data.train), sentences(data.test)

    def batch(texts: Sequence[str]) -> dict[str, Tensor]:
        made = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=64)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    def drawn(texts: list[str], count: int, seed: int) -> list[str]:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        return [texts[i] for i in order[:count].tolist()]

    @torch.no_grad()
    def run(contestant: str, seed: int) -> dict[str, float]:
        entry = CONTESTANTS[contestant]
        held = batch(drawn(test, held_sentences, seed))
        truth = embeddings(model, held)
        if entry.to is None:
            return {"cosine": 1.0, "nearest": 1.0}
        texts = drawn(train, 4 * steps, seed)
        conversion = convert.linearize(model, entry.to, **entry.settings)
        try:
            if entry.loss is not None:
                with torch.enable_grad():
                    conversion.fit([batch(texts[i : i + 4]) for i in range(0, len(texts), 4)], entry.loss, lr=1e-2)
            ours = embeddings(model, held)
            near = [(e @ e.mT).fill_diagonal_(-2.0).argmax(-1) for e in (ours, truth)]
            return {
                "cosine": float((ours * truth).sum(-1).mean()), "nearest": float((near[0] == near[1]).float().mean()),
                **of_layers(conversion, [held]),
            }  # fmt: skip
        finally:
            conversion.restore()

    names = [label for label, entry in CONTESTANTS.items() if not entry.causal]
    return {
        "text": data.source,
        **study(names, run, "cosine", TEACHER, seeds, progress, keep, (name, steps, held_sentences)),
    }


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 20,
    marks: Sequence[int] = (0, 5, 10, 20),
    layers: Sequence[int] | None = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27),
    length: int = 128,
    held_windows: int = 4,
    encoder_steps: int = 60,
    held_sentences: int = 64,
    seeds: Sequence[int] = (0, 1, 2),
    decoder: str = "smollm2",
    encoder: str = "minilm",
) -> dict[str, Any]:
    """Convert both models as every contestant does, with every seed, which draws text for training and for the test.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``conversion-cpu.svg``.
        steps: of the decoder's transfer, one window each.
        marks: steps at which bits per byte are measured, the first 0 and the last ``steps``.
        layers: of the decoder; all with ``None``.
        length: tokens of a window.
        held_windows: for the decoder's test.
        encoder_steps: of the encoder's transfer, four sentences each.
        held_sentences: for the encoder's test.
        seeds: of both.
        decoder, encoder: names of :mod:`attnlib.bench.models`.

    Returns:
        Plain values, for JSON.
    """
    if marks[0] != 0 or marks[-1] != steps:
        raise ValueError(f"marks must begin with 0 and end with steps={steps}, got {list(marks)}")
    result: dict[str, Any] = {
        "what": "pretrained models whose attention became linear, on text that was held out", "machine": machine(),
        "steps": steps, "layers": None if layers is None else list(layers), "length": length,
        "held_windows": held_windows, "encoder_steps": encoder_steps, "held_sentences": held_sentences,
        "decoder": {
            "model": models.MODELS[models.canonical(decoder)].title,
            **_decoder(seeds, steps, marks, layers, length, held_windows, progress, keep, decoder),
        },
        "encoder": {
            "model": models.MODELS[models.canonical(encoder)].title,
            **_encoder(seeds, encoder_steps, held_sentences, progress, keep, encoder),
        },
    }  # fmt: skip
    if pictures is not None:
        curves = {
            row["name"]: [(m, row[f"bits after {m}"]["mean"], row[f"bits after {m}"]["half"]) for m in marks]
            for row in result["decoder"]["rows"]
        }
        title = f"{models.MODELS[models.canonical(decoder)].title.partition(',')[0]}, attention converted"
        picture(Path(pictures) / "conversion-cpu.svg", curves, "steps of transfer", "bits per byte", title,
                dashed=(TEACHER,))  # fmt: skip
    return result
