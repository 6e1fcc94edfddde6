"""What techniques do to answers: pruning, hallucinations and caches on the small multimodal model.

``attnlib bench --suite multimodal --out benchmarks/results`` (or ``python -m attnlib.bench.studies.multimodal``)
measures again what ``multimodal-cpu.json`` holds. Every technique is a line of :data:`LINES` and is measured beside the
untouched model on the same questions: the interval of the difference comes from resampling scenes (paired bootstrap),
so it says whether a technique helped, hurt, or cannot be told from doing nothing at this number of scenes. A line that
cannot run is listed with the reason.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...hooks import Session, TokenTypes, attach
from ..clock import machine, now
from ..data import scenes
from ..data.scenes import Item

#: Groups of techniques and what is asked for each.
GROUPS = {
    "pruning": "questions of all kinds on scenes like those in training; visual tokens are removed",
    "hallucination": "scenes that hold the first thing of a usual pair without the second",
    "cache": "questions whose answer is not in the first word; keys are evicted after the prompt",
    "cache-unseen": "the same, keys being evicted after the picture, before the question is read",
}

#: Kinds of questions whose first word says nothing, so that what matters is read from the compressed cache.
RETRIEVED = ("colour", "position", "content")


@dataclass
class Workbench:
    """The model and what techniques may want to look at beforehand: calibration questions from training scenes."""

    model: Any
    tokenizer: Any
    calibration: list[Item]
    null_image: Tensor | None = None

    @property
    def types(self) -> TokenTypes:
        return TokenTypes(image=self.model.config.image_token_id)


@dataclass(frozen=True)
class Line:
    """A technique: a class of the library, its settings, and the one setting to go through.

    Args:
        technique: name in the table.
        group: one of :data:`GROUPS`.
        target: ``"package.module:Name"`` under ``attnlib``.
        settings: keyword arguments.
        over: ``(name, values)`` of the keyword to go through; ``None`` for a single setting.
        make: ``make(workbench, target, settings)`` gives the interventions, or a function that answers; by default the
            target is called with the settings.
    """

    technique: str
    group: str
    target: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    over: tuple[str, Sequence[Any]] | None = None
    make: Callable[[Workbench, Any, dict[str, Any]], Any] | None = None

    def variants(self) -> list[tuple[str, dict[str, Any]]]:
        """Labels and keyword arguments."""
        if self.over is None:
            return [("", dict(self.settings))]
        name, values = self.over
        return [(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}", {**self.settings, name: value})
                for value in values]  # fmt: skip

    def build(self, bench: Workbench, settings: dict[str, Any]) -> Any:
        module, _, name = self.target.partition(":")
        target = getattr(importlib.import_module(f"attnlib.{module}"), name)
        return target(**settings) if self.make is None else self.make(bench, target, settings)


RATIOS = (0.5, 0.75, 0.9)


def _evicting(bench: Workbench, scorer: Any, settings: dict[str, Any]) -> Any:
    """A cache that keeps what a scorer values; ``sinks`` first keys stay in any case, ``recent`` last ones too."""
    from ...cache import KVCompression, Ratio, TopK

    settings = dict(settings)
    ratio = settings.pop("ratio")
    chosen = TopK(sinks=settings.pop("keep_first", 0), recent=settings.pop("keep_last", 0))
    return KVCompression(scorer(**settings), Ratio(ratio), chosen)


def _caches(technique: str, target: str, settings: Mapping[str, Any], make: Any = _evicting) -> tuple[Line, ...]:
    """A cache method, with the question read before keys are evicted and after."""
    groups = ("cache", "cache-unseen")
    return tuple(Line(technique, group, target, settings, ("ratio", RATIOS), make) for group in groups)


class _RandomTokens:
    """A score of chance, the baseline that every other ranking of visual tokens has to beat."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.rand(hidden.shape[:2], generator=self.generator).to(hidden.device)


def _random_tokens(bench: Workbench, reduce: Any, settings: dict[str, Any]) -> Any:
    from ...reduce import Learned

    return reduce(Learned(_RandomTokens()), **settings)


def _grid_tokens(bench: Workbench, reduce: Any, settings: dict[str, Any]) -> Any:
    from ...reduce import Grid, Learned

    return reduce(Learned(_RandomTokens()), Grid(settings["stride"]))


def _late(bench: Workbench, reduce: Any, settings: dict[str, Any]) -> Any:
    """Tokens leave at one layer, by the attention of the block before."""
    return reduce({settings["layer"]: settings["keep"]})


def _looked_at(bench: Workbench, agla: Any, settings: dict[str, Any]) -> Any:
    """AGLA's second look, at what the class token of the vision tower attends to: there is no matching model here."""
    tower = copy.deepcopy(bench.model.model.vision_tower)
    tower.set_attn_implementation("eager")
    settings = dict(settings)
    score = settings.pop("score")

    def masked(pixels: Tensor) -> Tensor:
        from ...steer import mask_pixels, relevance_mask

        with torch.no_grad():
            attentions = tower(pixels, output_attentions=True).attentions
        side = scenes.SIDE // scenes.PATCH
        relevance = attentions[-1][:, :, 0, 1:].mean(1).unflatten(-1, (side, side))
        return mask_pixels(pixels, relevance_mask(relevance, score, (scenes.SIDE, scenes.SIDE)), (0.5,), (0.5,))

    return agla(masked, **settings)


def _searched(bench: Workbench, calibration: Any, settings: dict[str, Any]) -> Any:
    """ACT: heads are chosen on presence questions about training scenes."""
    from ...steer import label_accuracy, search_heads

    words = [bench.tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    items = [item for item in bench.calibration if item.question.kind == "presence"]
    samples = []
    for chosen, inputs in scenes.batches(items, bench.tokenizer):
        samples.append((inputs, words, [int(items[i].question.answer == "yes") for i in chosen]))
    search = search_heads(bench.model, label_accuracy(samples), **settings)
    return calibration(search.heads, **settings)


def _without_image(bench: Workbench, decoding: Any, settings: dict[str, Any]) -> Any:
    from ...steer import NoImage

    alpha = settings["alpha"]
    return decoding(NoImage(), 1 + alpha, -alpha, cutoff=0.1)


def _null_image(bench: Workbench, guidance: Any, settings: dict[str, Any]) -> Any:
    if bench.null_image is None:
        raise ValueError("the model comes without a learned null image (null_image.safetensors)")
    return guidance(bench.null_image, **settings)


class _GateTraining(nn.Module):
    """DyVTE's gates as transformers' Trainer takes them: the loss of one gate, drawn anew for each batch."""

    def __init__(self, bench: Workbench, gates: nn.ModuleList):
        super().__init__()
        self.gates = gates
        self.bench = (bench,)  # in a tuple: the model is no part of what is trained
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        from ...reduce import gate_loss

        (bench,) = self.bench
        labels = batch.pop("labels")
        layer = int(torch.randint(len(self.gates) - 1, (), generator=self.generator))
        return {"loss": gate_loss(bench.model, self.gates, batch, labels, bench.types, layer)[0]}


def answered_batches(bench: Workbench, items: Sequence[Item], size: int = 16) -> list[dict[str, Tensor]]:
    """Prompts with their right answers, rows of equal lengths together; only answers are labels."""
    groups: dict[tuple[int, int], list[tuple[list[int], list[int], Item]]] = {}
    for item in items:
        asked = bench.tokenizer(scenes.prompt(item.question.text))["input_ids"]
        said = bench.tokenizer(f"{item.question.answer} </s>")["input_ids"]
        groups.setdefault((len(asked), len(said)), []).append((asked, said, item))
    found = []
    for (length, _), rows in groups.items():
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            ids = torch.tensor([asked + said for asked, said, _ in some])
            labels = ids.clone()
            labels[:, :length] = -100
            pixels = scenes.pixel_values([item.scene for _, _, item in some])
            found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
                          "labels": labels})  # fmt: skip
    return found


def _train(bench: Workbench, module: nn.Module, steps: int, rate: float) -> None:
    """transformers' Trainer on the calibration questions and their answers."""
    from transformers import Trainer, TrainingArguments

    data: Any = answered_batches(bench, bench.calibration)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, max_steps=steps, learning_rate=rate, report_to=[],
            remove_unused_columns=False, save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
            logging_strategy="no",
        )  # fmt: skip
        Trainer(model=module, args=arguments, train_dataset=data, data_collator=lambda rows: rows[0]).train()


class _ThresholdTraining(nn.Module):
    """ATP's thresholds as transformers' Trainer takes them: the model's own loss and that of the budget."""

    def __init__(self, bench: Workbench, gates: nn.ModuleDict, settings: Mapping[str, Any]):
        super().__init__()
        self.gates, self.settings = gates, settings
        self.bench = (bench,)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        from ...reduce import ATP

        (bench,) = self.bench
        atp = ATP(self.gates, **self.settings)
        bench.model.train()
        try:
            with attach(bench.model, atp, token_types=bench.types):
                return {"loss": bench.model(**batch).loss + atp.losses()["total"]}
        finally:
            bench.model.eval()


def _thresholds(bench: Workbench, atp: Any, settings: dict[str, Any]) -> Any:
    """ATP with thresholds trained on questions about training scenes."""
    from ...reduce import atp_gates

    torch.manual_seed(0)
    settings = dict(settings)
    gates = atp_gates(bench.model, settings.pop("layers"), settings.pop("rate"))
    steps = settings.pop("steps")
    _train(bench, _ThresholdTraining(bench, gates, settings), steps, 3e-3)
    return atp(gates.eval(), **settings)


def _policy_score(bench: Workbench, scheduled: Any) -> Callable[[tuple[int, ...]], float]:
    """Accuracy of a vector of counts on calibration questions with short answers."""
    items = [item for item in bench.calibration if item.question.kind != "list"][:96]

    def score(counts: tuple[int, ...]) -> float:
        said, _ = answer_with(bench, "pruning", items, scheduled(counts=list(counts)))
        return sum(s == i.question.answer for s, i in zip(said, items, strict=True)) / len(items)

    return score


def _greedy(bench: Workbench, scheduled: Any, settings: dict[str, Any]) -> Any:
    from ...reduce import greedy_search

    layers = bench.model.config.text_config.num_hidden_layers
    found = greedy_search(
        _policy_score(bench, scheduled), layers, scenes.PATCHES, settings["tolerance"], first_layer=2,
        grid=(0, 2, 4, 8, 16, 32, 64),
    )  # fmt: skip
    return scheduled(counts=list(found.counts))


def _sigmoid(bench: Workbench, scheduled: Any, settings: dict[str, Any]) -> Any:
    from ...reduce import sigmoid_search

    layers = bench.model.config.text_config.num_hidden_layers
    found = sigmoid_search(
        _policy_score(bench, scheduled), layers, scenes.PATCHES, settings["budget"], evaluations=10, first_layer=2
    )
    return scheduled(counts=list(found.counts))


def _gated(bench: Workbench, dyvte: Any, settings: dict[str, Any]) -> Any:
    """DyVTE with gates trained on questions about training scenes."""
    from ...reduce import ExitGates

    torch.manual_seed(0)
    gates = ExitGates.of(bench.model, hidden=settings["hidden"])
    _train(bench, _GateTraining(bench, gates), settings["steps"], 1e-3)
    return dyvte(gates.eval())


TOKENS = (32, 16, 8)

LINES: tuple[Line, ...] = (
    # pruning
    Line("random tokens", "pruning", "reduce:Reduce", {}, ("keep", TOKENS), _random_tokens),
    Line("every second row and column", "pruning", "reduce:Reduce", {}, ("stride", (2,)), _grid_tokens),
    Line("VTC-CLS", "pruning", "reduce:VTCCLS", {"start": 1}, ("keep", TOKENS)),
    Line("VTC-CLS, true positions", "pruning", "reduce:VTCCLS", {"start": 1, "positions": "original"},
         ("keep", TOKENS)),
    Line("VMTC, 4 clusters", "pruning", "reduce:VMTC", {"merge": 4}, ("keep", (28, 12, 4))),
    Line("by attention at layer 2", "pruning", "reduce:ReduceByAttention", {"layer": 2}, ("keep", (16, 8, 4)),
         _late),
    Line("by attention at layer 4", "pruning", "reduce:ReduceByAttention", {"layer": 4}, ("keep", (16, 8, 4)),
         _late),
    Line("DyVTE, fixed layer", "pruning", "reduce:DyVTE", {}, ("exit_layer", (0, 1, 2, 3))),
    Line("ATP, trained thresholds", "pruning", "reduce:ATP",
         {"layers": (1, 2, 3), "rate": 0.0625, "scores": "sigmoid", "steps": 60}, ("target", (32, 12)), _thresholds),
    Line("greedy search", "pruning", "reduce:ScheduledPruning", {}, ("tolerance", (0.0, 0.02)), _greedy),
    Line("sigmoid schedule", "pruning", "reduce:ScheduledPruning", {}, ("budget", (0.5, 0.25, 0.1)), _sigmoid),
    Line("DyVTE, trained gates", "pruning", "reduce:DyVTE", {"hidden": 64, "steps": 80}, None, _gated),
    # cache
    *_caches("random keys", "cache:RandomScores", {}),
    *_caches("first and last keys (StreamingLLM)", "cache:Recency", {"sinks": 1}),
    *_caches("small keys", "cache:KeyNorm", {"keep_first": 1}),
    *_caches("observed attention (H2O)", "cache:ObservedAttention", {}),
    *_caches("attention of the last query (TOVA)", "cache:LastQuery", {}),
    *_caches("expected attention", "cache:ExpectedAttention", {"future": 16, "sinks": 1}),
    *_caches("snapkv", "cache:SnapKV", {"window_size": 4, "kernel_size": 3}, None),
    # hallucination
    Line("contrast with no image", "hallucination", "steer:ContrastiveDecoding", {}, ("alpha", (0.5, 1.0)),
         _without_image),
    Line("DAMRO", "hallucination", "steer:DAMRO", {"k": 10}, ("alpha", (0.5, 2.0))),
    Line("AGLA, by class attention", "hallucination", "steer:AGLA", {"score": 1.0}, ("alpha", (1.0, 2.0)), _looked_at),
    Line("soft-image guidance (LACING)", "hallucination", "steer:SoftImageGuidance", {}, ("scale", (1.5, 2.0, 3.0)),
         _null_image),
    Line("dual attention (LACING), not trained for", "hallucination", "steer:DualAttention"),
    Line("image boost (PAI)", "hallucination", "steer:VisualBoost", {"sets": "all"}, ("alpha", (0.2, 0.5, 1.0))),
    Line("image boost by the vision encoder (PAINT)", "hallucination", "steer:VisualBoost", {"beta": 0.3},
         ("alpha", (0.3, 0.7))),
    Line("sink calibration (ACT)", "hallucination", "steer:SinkCalibration", {"threshold": 0.1},
         ("beta", (0.4, 0.0)), _searched),
    Line("head reinforcement (VHR)", "hallucination", "steer:HeadReinforcement", {}, ("alpha", (1.5, 2.0))),
    Line("inhibition (CMAI)", "hallucination", "reduce:CMAI", {}, ("threshold", (0.2, 0.5))),
    Line("visual redistribution (VAR)", "hallucination", "steer:VisualRedistribution",
         {"sink_dims": "auto", "first_layer": 1, "tau": 5.0}, ("p", (0.6, 0.2))),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Questions and scores

Score = tuple[float, float]  # numerator and denominator of one item's part of a rate


def usual_items(count: int, first: int = scenes.FRESH) -> list[Item]:
    """Questions of all kinds on ``count`` test scenes that nobody looked at while the model was made."""
    found = []
    for number in range(first, first + count):
        scene = scenes.make_scene(number, "test")
        found += [Item(scene, q) for q in scenes.ask(scene, np.random.default_rng([number, 7]))]
    return found


def broken_items(count: int, first: int = scenes.FRESH) -> list[Item]:
    """On scenes without the usual second thing: is it there, is something there that is, and what is there?"""
    found = []
    for number in range(first, first + count):
        scene = scenes.make_scene(number, "test", pairs="broken")
        rng = np.random.default_rng([number, 8])
        present = [thing.name for thing in scene.things if thing.contrast > 0.5]
        for pair in scenes.PAIRS:
            if pair[0] in scene.names and pair[1] not in scene.names:
                found.append(Item(scene, scenes.presence(scene, pair[1])))
                if present:
                    found.append(Item(scene, scenes.presence(scene, present[rng.integers(len(present))])))
        found.append(Item(scene, scenes.questions(scene, "list")[0]))
    return found


def retrieval_items(count: int, first: int = scenes.FRESH) -> list[Item]:
    """Two questions of each of :data:`RETRIEVED` on test scenes, about things that stand out."""
    found = []
    for number in range(first, first + count):
        scene = scenes.make_scene(number, "test")
        rng = np.random.default_rng([number, 9])
        clear = {name for t in scene.things if t.contrast > 0.5 for name in (t.name, t.place)}
        shapes = {name.split()[1] for name in clear if name in scenes.SHAPED}
        for kind in RETRIEVED:
            possible = [q for q in scenes.questions(scene, kind) if q.about in clear or q.about in shapes]
            found += [Item(scene, possible[i]) for i in rng.permutation(len(possible))[:1]]
    return found


def rates(item: Item, said: str) -> dict[str, Score]:
    """What one answer adds to each rate."""
    scene, question = item.scene, item.question
    right = float(said == question.answer)
    out: dict[str, Score] = {}
    if question.kind != "list":
        out["accuracy"] = out[f"accuracy: {question.kind}"] = (right, 1.0)
    if question.kind == "presence":
        if question.answer == "no":
            out["says yes to what is absent"] = (float(said == "yes"), 1.0)
        else:
            out["says yes to what is there"] = (float(said == "yes"), 1.0)
    if question.kind == "list":
        names = scenes.named(said)
        invented = [name for name in names if name not in scene.names]
        out["named things that are not there"] = (float(len(invented)), float(len(names)))
        out["lists with something that is not there"] = (float(bool(invented)), 1.0)
        partners = [b for a, b in scenes.PAIRS if a in scene.names and b not in scene.names]
        if partners:
            out["lists with the absent second of a pair"] = (float(any(b in names for b in partners)), 1.0)
        out["things that are named"] = (float(len(names) - len(invented)), float(len(scene.names)))
    return out


class Rates:
    """Sums per scene of every rate, to be resampled."""

    def __init__(self, items: Sequence[Item], said: Sequence[str]):
        places: dict[int, int] = {}
        for item in items:
            places.setdefault(id(item.scene), len(places))
        self.count = len(places)
        self.sums: dict[str, np.ndarray] = {}
        for item, text in zip(items, said, strict=True):
            for name, (top, bottom) in rates(item, text).items():
                table = self.sums.setdefault(name, np.zeros((self.count, 2)))
                table[places[id(item.scene)]] += (top, bottom)

    def value(self, name: str) -> float:
        top, bottom = self.sums[name].sum(0)
        return float(top / bottom) if bottom else float("nan")


def bootstrap(rates: Rates, base: Rates | None = None, samples: int = 2000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Rates with 95 % intervals from resampled scenes, and paired differences from ``base``.

    Args:
        rates: of a technique.
        base: of the untouched model on the same items.
        samples: how often the scenes are drawn anew.
        seed: of the draws.

    Returns:
        Per rate ``value`` and ``interval``, and with a base ``difference`` and ``difference_interval``.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(rates.count, np.full(rates.count, 1 / rates.count), size=samples).astype(np.float64)

    def resampled(source: Rates, name: str) -> np.ndarray:
        sums = weights @ source.sums[name]
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[:, 0] / sums[:, 1]

    def interval(values: np.ndarray) -> list[float] | None:
        values = values[np.isfinite(values)]
        return [round(float(v), 4) for v in np.percentile(values, [2.5, 97.5])] if len(values) else None

    out: dict[str, dict[str, Any]] = {}
    for name in rates.sums:
        value = rates.value(name)
        mine = resampled(rates, name)
        entry: dict[str, Any] = {"value": round(value, 4) if np.isfinite(value) else None, "interval": interval(mine)}
        if base is not None and name in base.sums:
            entry["difference"] = round(value - base.value(name), 4) if np.isfinite(value) else None
            entry["difference_interval"] = interval(mine - resampled(base, name))
        out[name] = entry
    return out


# --------------------------------------------------------------------------------------------------------------------
# Answering


def answer_after_picture(bench: Workbench, items: Sequence[Item], size: int = 64) -> list[str]:
    """Answers when the picture was read, and its keys evicted, before the question came."""
    tokenizer, model = bench.tokenizer, bench.model
    context = len(tokenizer("<s> " + "<image> " * scenes.PATCHES)["input_ids"])
    found = [""] * len(items)
    for chosen, inputs in scenes.batches(items, tokenizer, size):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            read = model(
                input_ids=ids[:, :context], attention_mask=mask[:, :context], pixel_values=inputs["pixel_values"],
                use_cache=True,
            )  # fmt: skip
            out = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=read.past_key_values, max_new_tokens=8,
                do_sample=False,
            )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            found[i] = text
    return found


class Savings:
    """Sums over batches of what reductions report: visual tokens per block and FLOPs of reading prompts."""

    def __init__(self) -> None:
        self.tokens, self.samples, self.spent, self.full = 0.0, 0, 0.0, 0.0

    def add(self, session: Session, inputs: Mapping[str, Tensor]) -> None:
        shown = [r for r in session.results.values() if isinstance(r, Mapping) and "flops_untouched" in r]
        if shown:
            rows, length = inputs["input_ids"].shape
            visual = shown[0]["tokens"].double().mean(0) - (length - scenes.PATCHES)
            self.tokens += float(visual.sum())
            self.samples += rows
            self.spent += float(shown[0]["flops"])
            self.full += float(shown[0]["flops_untouched"])

    def to_dict(self) -> dict[str, float]:
        if not self.samples:
            return {}
        saved = round(1 - self.spent / self.full, 4)
        return {"visual_tokens": round(self.tokens / self.samples, 2), "prompt_flops_saved": saved}


def answer_with(
    bench: Workbench, group: str, items: Sequence[Item], made: Any = None
) -> tuple[list[str], dict[str, float]]:
    """Answers of the model with interventions attached, or of a function; what was saved."""
    savings = Savings()

    def run(session: Session | None = None) -> list[str]:
        if group == "cache-unseen":
            return answer_after_picture(bench, items)
        longest = 28 if any(i.question.kind == "list" for i in items) else 8

        def generate(**inputs: Any) -> Tensor:
            out = bench.model.generate(**inputs)
            if session is not None:
                savings.add(session, inputs)
            return out

        return scenes.answer(bench.model, bench.tokenizer, items, generate=generate, max_new_tokens=longest)

    if made is None:
        return run(), {}
    if callable(made):
        return made(items), {}
    interventions = made if isinstance(made, (list, tuple)) else [made]
    with attach(bench.model, *interventions, token_types=bench.types) as session:
        said = run(session)
        return said, savings.to_dict()


def _chosen(made: Any) -> dict[str, Any]:
    """What a search found: counts per layer, or heads."""
    if isinstance(getattr(made, "values", None), list):
        return {"chosen": made.values}
    if isinstance(getattr(made, "heads", None), Mapping):
        return {"chosen": {str(layer): list(heads) for layer, heads in made.heads.items()}}
    return {}


def measure(
    count: int = 100,
    lines: Sequence[Line] = LINES,
    model: tuple[Any, Any] | None = None,
    null_image: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Every line beside the untouched model.

    Args:
        count: scenes per group.
        lines: techniques.
        model: ``(model, tokenizer)``; ``None`` for the trained one of the repository.
        null_image: (64, C) learned embedding of no image, of a given model.
        progress: told what is being measured.

    Returns:
        A dict of plain values: settings, machine, records per technique and setting, and what could not run and why.
    """
    tell = progress or (lambda line: None)
    null = scenes.load_null_image() if model is None else null_image
    bench = Workbench(*(scenes.load_model() if model is None else model), calibration=[], null_image=null)
    for number in range(200_000, 200_000 + max(8, count // 3)):
        scene = scenes.make_scene(number)
        bench.calibration += [Item(scene, q) for q in scenes.ask(scene, np.random.default_rng([number, 7]))]
    items = {
        "pruning": usual_items(count), "hallucination": broken_items(count), "cache": retrieval_items(count),
        "cache-unseen": retrieval_items(count),
    }  # fmt: skip
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for group, asked in items.items():
        mine = [line for line in lines if line.group == group]
        if not mine:
            continue
        tell(f"{group}: untouched model, {len(asked)} questions")
        started = now()
        base = Rates(asked, answer_with(bench, group, asked)[0])
        records.append(
            {"group": group, "technique": "untouched", "setting": "", "rates": bootstrap(base),
             "seconds": round(now() - started, 2)}
        )  # fmt: skip
        for line in mine:
            for label, settings in line.variants():
                tell(f"{group}: {line.technique} {label}")
                started = now()
                try:
                    made = line.build(bench, settings)
                    prepared = now()
                    said, saved = answer_with(bench, group, asked, made)
                except (ImportError, AttributeError, TypeError, ValueError) as error:
                    skipped.append({"group": group, "technique": line.technique, "setting": label, "why": str(error)})
                    continue
                records.append(
                    {"group": group, "technique": line.technique, "setting": label,
                     "rates": bootstrap(Rates(asked, said), base),
                     "prepare_seconds": round(prepared - started, 2),
                     "seconds": round(now() - prepared, 2), **saved, **_chosen(made)}
                )  # fmt: skip
    return {
        "what": "effects of techniques on the small multimodal model: rates with 95 % intervals over resampled scenes",
        "groups": GROUPS,
        "settings": {"scenes": count, "questions": {g: len(i) for g, i in items.items()}},
        "machine": machine(),
        "records": records,
        "skipped": skipped,
    }


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/multimodal-cpu.json")
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    result = measure(number, progress=lambda line: print(line, file=sys.stderr))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
