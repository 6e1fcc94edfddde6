"""Mechanisms in one language model, trained on real text at several lengths and read beyond them.

``python -m attnlib.bench.studies.language --out FOLDER --json benchmarks/results/language-cpu.json --plots docs``
trains every contestant at every length with every seed and writes what it measured after each run. The same call
continues: finished runs are in the folder and are not repeated.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.tiny import Prediction, TinyModel
from ...nn.dense.attention_sink_empirical import sink_metric
from ...nn.dense.quantizable_transformers import outlier_metrics
from .. import stats, training
from ..clock import interleave, limit_threads, now, peak_bytes, ratio
from ..clock import machine as describe
from ..data import files as data
from ..data.files import Dataset, require
from ..data.tasks import Batch, Make, Plain, TextTask
from ..specs import Spec
from ..store import Store, write_json
from ..training import Settings, Visitor

SCHEMA = 1
BASELINE = "softmax"
LENGTHS = (64, 128, 256)
REACHES = (1, 2, 4)  # times the trained length
SINK_LENGTH = 64  # sinks compare at equal length only
TEST_BYTES = 14336  # whole windows of every length and reach
TOKENS = 1024  # per step
SHOWN = (  # in colour where all would be too many
    "softmax", "sigmoid", "softplus (LSSA)", "softplus re-weighted (LSSAR)", "sharded context (S2)",
    "linear (lightning)", "linear + softmax", "linear + LSSAR",
)  # fmt: skip
KEPT = ("label", "length", "seed", "status", "parameters", "metrics", "train_seconds")  # of a run, in the results


@dataclass(frozen=True)
class Contestant:
    """One line of the comparison.

    Args:
        label: its name in tables.
        layers: mechanisms from the first layer to the last, repeated; see :class:`DecoderConfig`.
        scaled: settings that depend on the trained length, ``{name: factor}``.
        reference: the contestant that differences are taken from.
        lookahead: it reads later tokens in training; it is judged with its metric frozen.
    """

    label: str
    layers: tuple[Mapping[str, Any], ...]
    scaled: Mapping[str, float] | None = None
    reference: str = BASELINE
    lookahead: bool = False

    def mechanisms(self, length: int) -> list[dict[str, Any]]:
        """Layers for models trained at ``length``."""
        extra = {name: int(factor * length) for name, factor in (self.scaled or {}).items()}
        return [{**layer, **extra} for layer in self.layers]


def _one(label: str, name: str, reference: str = BASELINE, **settings: Any) -> Contestant:
    return Contestant(label, ({"name": name, **settings},), reference=reference)


_SINKS = "attention-sink-empirical"
_LINEAR: dict[str, Any] = {"name": "lightning-attention-2"}
_MOH = "moh-mixture-of-heads"

#: With eight heads, seven active ones stand for the 90 % of the paper.
CONTESTANTS: tuple[Contestant, ...] = (
    _one(BASELINE, "softmax-attention"),
    _one("sigmoid", "sigmoid-attention"),
    _one("softplus (LSSA)", "softplus-attention-lssar", power=None),
    _one("softplus re-weighted (LSSAR)", "softplus-attention-lssar"),
    _one("selective", "selective-self-attention"),
    Contestant("clipped softmax", ({"name": "quantizable-transformers", "alpha": 2.0},), {"max_length": 1.0}),
    _one("gated softmax", "quantizable-transformers", gate="conditional_per_token"),
    _one("MoH, 4 of 8 heads", _MOH, shared_heads=2, active_heads=2),
    _one("MoH, 6 of 8 heads", _MOH, shared_heads=2, active_heads=4),
    _one("MoH, 7 of 8 heads", _MOH, shared_heads=2, active_heads=5),
    _one("grouped queries", "softmax-attention", num_kv_heads=4),
    _one("key-driven groups", "key-driven-gqa", reference="grouped queries", num_kv_heads=4),
    Contestant(
        "power-law graph",
        ({"name": "pldr-llm-plga", "metric_hidden": 16, "residual_units": 2, "rotary_interleaved": False},),
        lookahead=True,
    ),
    _one("sharded context (S2)", "s2-attention-dkernel", block_size=8, local_blocks=2, stride=4),
    _one("key bias", _SINKS, k_bias=True),
    _one("key and value bias", _SINKS, k_bias=True, v_bias=True),
    _one("sigmoid, not normalised", _SINKS, similarity="sigmoid", normalize=False),
    _one("linear (lightning)", **_LINEAR),
    Contestant("linear + softmax", (_LINEAR, {"name": "softmax-attention"})),
    Contestant("linear + LSSAR", (_LINEAR, {"name": "softplus-attention-lssar"})),
)


class DecoderUnderTest(TinyModel):
    """The library's decoder as the benchmarks' trainer wants it.

    Args:
        config: settings of :class:`attnlib.models.language.DecoderConfig`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from ...models.language import DecoderConfig, DecoderForCausalLM

        self.decoder = DecoderForCausalLM(DecoderConfig(**config))
        # What contestants share starts from the same numbers, however many their mechanisms drew before.
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
        own = {id(p) for m in self.mechanisms() for p in m.parameters()}
        std = self.decoder.config.initializer_range
        for parameter in self.decoder.parameters():
            if id(parameter) not in own and parameter.dim() > 1:
                nn.init.normal_(parameter, std=std, generator=generator)

    def mechanisms(self) -> list[nn.Module]:
        return [layer.mixer for layer in self.decoder.model.layers]  # type: ignore[union-attr,misc]

    def forward(self, tokens: Tensor) -> Prediction:
        """Logits (B, N, vocab) and the losses that mechanisms balance themselves with, as means over layers."""
        out = self.decoder(input_ids=tokens, use_cache=False)
        losses = out.mechanism_losses or {}
        count = len(self.mechanisms())
        return Prediction(out.logits, {k: v / count for k, v in losses.items() if k == "balance"})

    def freeze_metrics(self, tokens: Tensor) -> None:
        """Keep the metric that power-law graph attention deduces from ``tokens`` (B, N), layer after layer."""
        x = self.decoder.get_input_embeddings()(tokens)
        for layer in self.decoder.model.layers:
            freeze = getattr(layer.mixer, "freeze_metric", None)
            if freeze is not None:
                freeze(layer.mixer_norm(x))  # type: ignore[operator]
            x = layer(x)[0]


class LanguageTask(TextTask):
    """Next byte of English text, with the decoder of :mod:`attnlib.models.language`, at one trained length.

    Args:
        contestant: its layers.
        length: bytes of a training window.
        num_heads: heads of every mechanism.
        path: a text file instead of the packaged text.
        loaded: the text, when it is loaded already.
    """

    name, title = "language", "Byte-level language modelling, trained and longer lengths"
    learning_rate = 6e-3

    def __init__(
        self,
        contestant: Contestant,
        length: int,
        num_heads: int = 8,
        path: Path | None = None,
        loaded: Dataset | None = None,
    ) -> None:
        if length < 1 or TOKENS % length or TEST_BYTES % (length * max(REACHES)):
            raise ValueError(
                f"length={length} is not possible: it must divide {TOKENS} bytes of a step, and {max(REACHES)} times "
                f"it {TEST_BYTES} bytes of test; for example {list(LENGTHS)}"
            )
        self.data = self.load(path) if loaded is None else loaded
        self.contestant, self.length, self.num_heads = contestant, length, num_heads
        self.grid = (length,)  # type: ignore[misc]
        self.batch_size = TOKENS // length  # type: ignore[misc]
        if len(self.data.test) <= TEST_BYTES:
            raise data.DataError(f"the test part has {len(self.data.test)} bytes; {TEST_BYTES + 1} are needed")

    def build(self, make: Make, plain: Plain, dim: int, depth: int) -> TinyModel:
        """The decoder with the contestant's layers; ``make`` and ``plain`` play no part."""
        return DecoderUnderTest(
            {
                "vocab_size": 256,
                "hidden_size": dim,
                "num_hidden_layers": depth,
                "num_attention_heads": self.num_heads,
                "mechanisms": self.contestant.mechanisms(self.length),
                "initializer_range": dim**-0.5,
                "loss_weights": {"dag_lm": 0.0, "dag_p": 0.0, "dag_g": 0.0},
                "allow_lookahead": self.contestant.lookahead,
            }
        )

    def _test(self) -> Batch:
        return self.tiles(self.length)

    def tiles(self, length: int) -> Batch:
        """The test part as neighbouring windows of ``length``: the same bytes whatever the length."""
        part = self.data.test[: TEST_BYTES + 1].long()
        return part[:-1].view(-1, length), part[1:].view(-1, length)

    def bits(self, model: nn.Module, length: int) -> Tensor:
        """(windows, length) bits that the model needs for every byte of the test part."""
        x, y = self.tiles(length)
        rows = []
        for a, b in zip(x.split(max(1, 4096 // length)), y.split(max(1, 4096 // length)), strict=True):
            logits = model(a).y
            rows.append(F.cross_entropy(logits.flatten(0, 1), b.flatten(), reduction="none").view_as(b))
        return torch.cat(rows) / math.log(2)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss at the trained length and beyond, sinks and outliers, on the test part.

        ``bits per byte at 2x`` is the mean over windows of twice the trained length; ``bits beyond, to 2x`` is the mean
        over the positions of these windows that training never had.
        """
        model = model.model if isinstance(model, Visitor) else model
        assert isinstance(model, DecoderUnderTest)
        found: dict[str, float] = {}
        if self.contestant.lookahead:
            found["bits per byte, uncached metric"] = float(self.bits(model, self.length).mean())
            prompts = self.batch(torch.Generator().manual_seed(0))[0]
            model.freeze_metrics(prompts)
        for reach in REACHES:
            bits = self.bits(model, reach * self.length)
            found[self.metric if reach == 1 else f"{self.metric} at {reach}x"] = float(bits.mean())
            if reach > 1:
                found[f"bits beyond, to {reach}x"] = float(bits[:, reach * self.length // 2 :].mean())
        found.update(self.inside(model))
        return found

    def inside(self, model: DecoderUnderTest) -> dict[str, float]:
        """Sinks (at :data:`SINK_LENGTH`) and outliers (at the trained length) of every layer."""
        found: dict[str, float] = {}
        maps: list[Tensor] = []
        attended: list[dict[str, float]] = []
        fed: list[dict[str, float]] = []
        streams: list[dict[str, float]] = []

        def look(mixer: nn.Module, call: tuple[Any, ...], _: Any) -> None:
            if mixer.traits.weights:  # type: ignore[union-attr]
                maps.append(mixer.forward(call[0], returns=("weights",)).weights)

        handles = [m.register_forward_hook(look) for m in model.mechanisms()]
        model(self.tiles(SINK_LENGTH)[0][:64])
        for handle in handles:
            handle.remove()
        if maps:
            found["sink rate"] = statistics.fmean(float(sink_metric(w)[0]) for w in maps)
            shares = [w / w.sum(-1, keepdim=True).clamp(min=1e-8) for w in maps]
            found["sink rate of shares"] = statistics.fmean(float(sink_metric(w)[0]) for w in shares)
            found["share of the first token"] = statistics.fmean(float(w[..., 0].mean()) for w in shares)

        def measure(into: list[dict[str, float]]) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _, __, out: into.append(outlier_metrics(getattr(out, "y", out)))

        for layer in model.decoder.model.layers:
            handles.append(layer.get_submodule("mixer").register_forward_hook(measure(attended)))
            handles.append(layer.get_submodule("mlp").register_forward_hook(measure(fed)))
            handles.append(layer.register_forward_hook(lambda _, __, out: streams.append(outlier_metrics(out[0]))))
        model(self.tiles(self.length)[0][: 4096 // self.length])
        for handle in handles:
            handle.remove()
        for name, records in (("attention output", attended), ("feed-forward output", fed), ("stream", streams)):
            found[f"inf norm, {name}"] = max(r["inf_norm"] for r in records)
            found[f"kurtosis, {name}"] = statistics.fmean(r["kurtosis"] for r in records)
        return found


def costs(tasks: Sequence[LanguageTask], settings: Settings, rounds: int = 9) -> list[dict[str, Any]]:
    """What a training step costs, tasks interleaved; the first one is what the others are held against.

    Returns:
        For every task ``step_seconds`` (median processor time of one thread), ``over_first`` (median over rounds of its
        time over the first task's in the same round) and ``peak_bytes`` (the most memory a step holds at once).
    """
    with limit_threads(1), torch.random.fork_rng(devices=[]):
        trainers = []
        for task in tasks:
            model = training.build(task, Spec("softmax-attention"), 0, settings).train()
            trainers.append(training.Trainer(task, model, 100, 0, settings))
        torch.manual_seed(0)
        times = interleave({i: trainer.step for i, trainer in enumerate(trainers)}, rounds, "cpu")
        peaks = [peak_bytes(trainer.step) for trainer in trainers]
    return [
        {
            "label": task.contestant.label, "length": task.length, "step_seconds": times[i].median,
            "over_first": ratio(times[i], times[0])["ratio"], "peak_bytes": peak,
        }
        for i, (task, peak) in enumerate(zip(tasks, peaks, strict=True))
    ]  # fmt: skip


def measure(
    out: str | Path,
    *,
    contestants: Sequence[Contestant] = CONTESTANTS,
    lengths: Sequence[int] = LENGTHS,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 250,
    settings: Settings | None = None,
    num_heads: int = 8,
    path: Path | None = None,
    until: float | None = None,
    progress: Callable[[str], None] | None = None,
    saved: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train and measure what is not measured yet; seed by seed, so that time that runs out costs seeds.

    Args:
        out: folder of finished runs.
        contestants: who takes part.
        lengths: trained lengths, in bytes.
        seeds: of weights and batches.
        steps: optimiser steps of :data:`TOKENS` bytes.
        settings: width, depth and optimiser, the same for all.
        num_heads: heads of every mechanism.
        path: a text file instead of the packaged text.
        until: reading of :func:`attnlib.bench.clock.now` after which no run starts.
        progress: told, in a line, what was measured.
        saved: given the results so far after every run.

    Returns:
        Plain values, for JSON: settings, machine, data, ``costs``, ``runs`` and their ``summary``.

    Raises:
        ValueError: two contestants of one label, or a length that does not tile.
    """
    if len({c.label for c in contestants}) != len(contestants):
        raise ValueError(f"contestants must have different labels, got {[c.label for c in contestants]}")
    settings = settings or Settings(num_heads=num_heads, warmup=0.1)
    store = Store(out)
    loaded = data.text(path)
    tasks = {(c.label, n): LanguageTask(c, n, num_heads, loaded=loaded) for n in lengths for c in contestants}
    references = LanguageTask(contestants[0], lengths[0], num_heads, loaded=loaded).references()
    spent: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []

    def say(line: str) -> None:
        if progress is not None:
            progress(line)

    def late() -> bool:
        return until is not None and now() > until

    def key(task: LanguageTask, **more: Any) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "layers": task.contestant.mechanisms(task.length), "length": task.length,
            "lookahead": task.contestant.lookahead, "heads": num_heads, "settings": settings.to_dict(),
            "data": loaded.fingerprint, **more,
        }  # fmt: skip

    def results() -> dict[str, Any]:
        return {
            "what": "one decoder, many mechanisms: byte-level language modelling at several trained lengths",
            "settings": {
                **settings.to_dict(), "num_heads": num_heads, "steps": steps, "bytes_per_step": TOKENS,
                "learning_rate": LanguageTask.learning_rate, "test_bytes": TEST_BYTES, "seeds": list(seeds),
                "sink_length": SINK_LENGTH, "clock": "processor time of one thread",
            },
            "machine": machine,
            "data": {"source": loaded.source, "split": loaded.split, "fingerprint": loaded.fingerprint, **loaded.facts},
            "references": references,
            "contestants": [
                {
                    "label": c.label, "reference": c.reference, "lookahead": c.lookahead,
                    "layers": {str(n): c.mechanisms(n) for n in lengths},
                }
                for c in contestants
            ],
            "costs": spent,
            "runs": [{k: v for k, v in r.items() if k in KEPT} for r in runs],
            "left_out": left_out,
            "summary": summarise(contestants, lengths, runs, spent),
        }  # fmt: skip

    with limit_threads(1):
        machine = describe()
        for length in lengths:
            group = [tasks[c.label, length] for c in contestants]
            identity = {"tasks": [key(task) for task in group], "torch": torch.__version__}
            record = store.find("scaling", f"costs-{length}", identity)
            if record is None:
                record = {"costs": costs(group, settings)}
                store.save("scaling", f"costs-{length}", identity, record)
                say(f"time and memory at N = {length} measured")
            spent += record["costs"]
        total, done, began, fresh = len(seeds) * len(tasks), 0, now(), 0
        for seed in seeds:
            for (label, length), task in tasks.items():
                identity = key(task, seed=seed, steps=steps)
                name = f"{label}-{length}-{seed}"
                record = store.find("runs", name, identity)
                done += 1
                if record is None:
                    if late():
                        left_out.append({"label": label, "length": length, "seed": seed, "reason": "time ran out"})
                        continue
                    record = training.run(task, Spec("softmax-attention", alias=label), seed, steps, settings)
                    record = {"label": label, "length": length, "seed": seed, **record}
                    store.save("runs", name, identity, record)
                    fresh += 1
                    left = (now() - began) / fresh * (total - done) / 60
                    value = record["metrics"].get(task.metric, math.nan)
                    say(f"{done} of {total}: {label}, N = {length}, seed {seed}: {value:.3f} bits; {left:.0f} min left")
                    runs.append(record)
                    if saved is not None:
                        saved(results())
                else:
                    runs.append(record)
    final = results()
    if saved is not None:
        saved(final)
    return final


def summarise(
    contestants: Sequence[Contestant],
    lengths: Sequence[int],
    runs: Sequence[Mapping[str, Any]],
    spent: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Mean and 95 % half-width of every measurement over seeds, and the paired difference of the loss.

    >>> summarise((), (), (), ())
    []
    """
    paid = {(c["label"], c["length"]): c for c in spent}
    by: dict[tuple[str, int], dict[int, Mapping[str, float]]] = {}
    for r in runs:
        if r["status"] == "ok":
            by.setdefault((r["label"], r["length"]), {})[r["seed"]] = r["metrics"]
    rows = []
    for length in lengths:
        for c in contestants:
            mine = by.get((c.label, length), {})
            row: dict[str, Any] = {"label": c.label, "length": length, "seeds": len(mine)}
            price = paid.get((c.label, length))
            if price is not None:
                row.update({k: price[k] for k in ("step_seconds", "over_first", "peak_bytes")})
            names = sorted({n for m in mine.values() for n in m})
            row["metrics"] = {}
            for name in names:
                mean, half, _ = stats.mean_interval([m[name] for m in mine.values() if name in m])
                row["metrics"][name] = {"mean": mean, "half_width": half}
            for reference in dict.fromkeys((BASELINE, c.reference)):
                theirs = by.get((reference, length), {})
                if reference == c.label or not mine or not theirs:
                    continue
                metric = LanguageTask.metric
                gap = stats.paired_interval(
                    {s: m[metric] for s, m in mine.items()}, {s: m[metric] for s, m in theirs.items()}
                )
                if gap is not None:
                    row.setdefault("differences", {})[reference] = {"mean": gap.mean, "half_width": gap.half}
            rows.append(row)
    return rows


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of the documentation: one per trained length.

    >>> markdown({"contestants": [], "summary": []})
    ''
    """
    metric = LanguageTask.metric

    def cell(row: Mapping[str, Any], name: str, digits: int = 3) -> str:
        found = row["metrics"].get(name)
        if found is None:
            return "–"
        half = "" if found["half_width"] is None else f" ± {found['half_width']:.{digits}f}"
        return f"{found['mean']:.{digits}f}{half}"

    parts = []
    for length in sorted({r["length"] for r in results["summary"]}):
        lines = [
            f"Trained at {length} bytes:",
            "",
            f"| | {metric} | against {BASELINE} | at 2x, new positions | at 4x, new positions | sink rate | kurtosis | "
            "largest output | first token | step | memory |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in results["summary"]:
            if row["length"] != length or not row["metrics"]:
                continue
            gap = row.get("differences", {}).get(BASELINE)
            half = "" if gap is None or gap["half_width"] is None else f" ± {gap['half_width']:.3f}"
            rate = row["metrics"].get("sink rate of shares")
            against = "" if gap is None else f"{gap['mean']:+.3f}{half}"
            lines.append(
                f"| {row['label']} | {cell(row, metric)} | {against} | "
                f"{cell(row, 'bits beyond, to 2x')} | {cell(row, 'bits beyond, to 4x')} | "
                f"{'–' if rate is None else format(100 * rate['mean'], '.1f') + ' %'} | "
                f"{cell(row, 'kurtosis, attention output', 1)} | {cell(row, 'inf norm, attention output', 1)} | "
                f"{cell(row, 'share of the first token')} | "
                f"{row['over_first']:.2f} × | {row['peak_bytes'] / 1e6:.0f} MB |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def _colours(labels: Sequence[str]) -> dict[str, str]:
    from ..plots import PALETTE

    return {label: "#222222" if label == BASELINE else PALETTE[i % len(PALETTE)] for i, label in enumerate(labels)}


def draw(results: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Loss by mechanism, loss beyond the trained length, outliers and sinks, as pictures.

    Args:
        results: what :func:`measure` returned.
        folder: where ``language-*.png`` go.

    Returns:
        Their paths.
    """
    require("matplotlib").use("Agg", force=False)
    from matplotlib.figure import Figure

    folder = Path(folder)
    labels = [c["label"] for c in results["contestants"]]
    lengths = sorted({r["length"] for r in results["summary"]})
    rows = {(r["label"], r["length"]): r for r in results["summary"] if r["metrics"]}
    shades = {n: c for n, c in zip(lengths, ("#9ec9f5", "#2f7de1", "#123a6b", "#e8590c"), strict=False)}

    def bars(axes: Any, metric: str, title: str, log: bool = False) -> None:
        if log:
            axes.set_xscale("log")
        for k, length in enumerate(lengths):
            found = [(i, rows[label, length]["metrics"].get(metric)) for i, label in enumerate(labels)
                     if (label, length) in rows]  # fmt: skip
            found = [(i, m) for i, m in found if m is not None]
            axes.errorbar(
                [m["mean"] for _, m in found], [i + 0.25 * (k - 1) for i, _ in found],
                xerr=[m["half_width"] or 0.0 for _, m in found], fmt="o", ms=4, capsize=2, lw=1, color=shades[length],
                label=f"trained at {length} bytes",
            )  # fmt: skip
        # An interval of few seeds can be many times wider than the data; the axis follows the measurements.
        values = [r["metrics"][metric]["mean"] for r in rows.values() if metric in r["metrics"]]
        room = 0.12 * (max(values) - min(values)) or 0.1
        axes.set_xlim(
            min(values) * 0.85 if log else min(values) - room, max(values) * 1.2 if log else max(values) + room
        )
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_title(title, fontsize=10)
        axes.grid(True, color="#dddddd", lw=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    paths = []

    def save(figure: Any, name: str) -> None:
        path = folder / f"language-{name}.png"
        figure.savefig(path, dpi=110)
        paths.append(path)

    metric = LanguageTask.metric
    figure = Figure(figsize=(7.6, 6.4), layout="constrained")
    axes = figure.subplots()
    bars(axes, metric, "validation loss at the trained length, bits per byte (mean, 95 % interval over seeds)")
    axes.legend(fontsize=8)
    save(figure, "loss")

    names = [label for label in SHOWN if label in labels] or labels
    colour = _colours(names)
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        xs = [reach * length for reach in REACHES]
        points: list[float] = []
        for label in (*(other for other in labels if other not in names), *names):
            if (label, length) not in rows:
                continue
            found = rows[label, length]["metrics"]
            reached = [found[n] for n in (metric, *(f"bits beyond, to {r}x" for r in REACHES[1:]))]
            ys = [m["mean"] for m in reached]
            points += ys
            if label in names:
                half = [m["half_width"] or 0.0 for m in reached]
                axes.errorbar(xs, ys, half, color=colour[label], marker="o", ms=3, lw=1.4, capsize=2, label=label)
            else:
                axes.plot(xs, ys, color="#cccccc", lw=0.9)
        axes.set_ylim(min(points) - 0.3, max(points) + 0.3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.set_title(f"trained at {length} bytes", fontsize=10)
        axes.set_xlabel("position in the window, up to", fontsize=9)
        axes.grid(True, color="#dddddd", lw=0.6)
    figure.axes[0].set_ylabel("bits per byte at new positions", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save(figure, "extrapolation")

    figure = Figure(figsize=(12.5, 6.2), layout="constrained")
    panels = (
        ("kurtosis, attention output", "kurtosis of attention outputs", True),
        ("inf norm, attention output", "largest attention output", True),
        ("share of the first token", f"weight on the first token, mean (N = {SINK_LENGTH})", False),
    )
    for k, (axes, (name, title, log)) in enumerate(zip(figure.subplots(1, 3, sharey=True), panels, strict=True)):
        bars(axes, name, title, log)
        if k == 0:
            axes.legend(fontsize=8)
    save(figure, "outliers")
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m attnlib.bench.studies.language", description=__doc__)
    parser.add_argument("--out", default="language-runs", help="folder of finished runs")
    parser.add_argument("--json", default="benchmarks/results/language-cpu.json", help="results")
    parser.add_argument("--plots", help="folder for pictures")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--text", type=Path, help="a text file instead of the packaged text")
    given = parser.parse_args(argv)
    target = Path(given.json)
    target.parent.mkdir(parents=True, exist_ok=True)
    results = measure(
        given.out,
        seeds=range(given.seeds),
        steps=given.steps,
        settings=Settings(dim=given.dim, depth=given.depth, num_heads=8, warmup=0.1),
        path=given.text,
        until=None if given.minutes is None else now() + 60 * given.minutes,
        progress=lambda line: print(line, flush=True),
        saved=lambda found: write_json(target, found),
    )
    print(markdown(results))
    if given.plots:
        for path in draw(results, given.plots):
            print(path)


if __name__ == "__main__":
    main()
