"""Techniques side by side on one pretrained language model: tokens per second, memory and quality.

``attnlib bench --model smollm2 --with SnapKV,ratio=0.5 --with KeyNorm,ratio=0.5 --out report`` measures each beside the
untouched model on real text. Quality is what the model predicts of how each text goes on, once the technique has acted
on its beginning: bits per byte, and how often the first choice is that of the untouched model.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..checks import check_choice, check_int
from ..hooks import Intervention, attach
from ..hooks.hf.names import cache_argument, cache_out
from . import models, plots, report
from .clock import machine, now, peak_bytes
from .converting import needs_head, open_model, tokens_of
from .data import files
from .data.files import require
from .small import Progress, interval
from .specs import Spec
from .stats import mean_interval
from .store import writable, write_json, write_text

UNTOUCHED = "untouched"

#: Where techniques are looked for by the name of their class.
ROOMS = ("cache", "steer", "reduce", "hooks")


@dataclass(frozen=True)
class Technique:
    """One contestant.

    Args:
        label: name and settings.
        act: ``act(model)`` is a context in which it acts.
        make: a new one to attach beside others; ``None`` where the model itself is changed.
    """

    label: str
    act: Callable[[Any], AbstractContextManager[Any]]
    make: Callable[[], Intervention] | None = None


def known_techniques() -> dict[str, Any]:
    """By name: classes of interventions and of scorers of keys (which also take ``ratio``), and what to convert to."""
    from ..cache import Scorer
    from ..convert import targets

    found: dict[str, Any] = {}
    for room in ROOMS:
        module = importlib.import_module(f"attnlib.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            kind = inspect.isclass(value) and issubclass(value, (Intervention, Scorer))
            if kind and not inspect.isabstract(value) and value is not Intervention:
                found[name] = value
    return {**found, **{name: name for name in targets.TARGETS}}


def technique(given: str | Spec) -> Technique:
    """A technique from ``"Name,key=value,..."`` or ``"package.module:Class,key=value,..."``.

    Raises:
        ValueError: an unknown name, or settings that it does not take.

    >>> technique("KeyNorm,ratio=0.5").label
    'KeyNorm (ratio=0.5)'
    """
    from ..cache import KVCompression, Ratio, Scorer
    from ..convert import linearize

    spec = Spec.parse(given, "with")
    settings = dict(spec.config)
    if ":" in spec.name:
        target: Any = spec.find("with")
        if not (inspect.isclass(target) and issubclass(target, (Intervention, Scorer))):
            raise ValueError(f"with: {spec.name!r} is neither an Intervention nor a Scorer")
    else:
        known = known_techniques()
        check_choice("with", spec.name, tuple(known))
        target = known[spec.name]
    label = f"{spec.short} ({spec.settings})" if settings else spec.short
    if isinstance(target, str):

        @contextmanager
        def converted(model: Any) -> Iterator[Any]:
            conversion = linearize(model, target, **settings)
            try:
                yield conversion
            finally:
                conversion.restore()

        return Technique(label, converted)

    def make() -> Intervention:
        call = dict(settings)
        try:
            if issubclass(target, Scorer):
                if "ratio" not in call:
                    raise TypeError("say how much it evicts: ratio=0.5")
                evicted = call.pop("ratio")
                return KVCompression(target(**call), Ratio(evicted))
            return target(**call)
        except TypeError as error:
            raise ValueError(f"with: {spec.name} cannot be made of {settings or 'no settings'}: {error}") from error

    make()  # a wrong setting is told before anything is loaded
    return Technique(label, lambda model: attach(model, make()), make)


def held_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds: keys, values, states, positions."""
    tensors = [
        leaf for layer in getattr(cache, "layers", ()) for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor)
    ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _prompted(model: Any, prompt: Tensor) -> Any:
    return model(prompt, use_cache=True, logits_to_keep=1)


def _steps(model: Any, cache: Any, more: Tensor) -> None:
    for t in range(more.shape[1]):
        model(more[:, t : t + 1], **cache_argument(model, cache))


@torch.no_grad()
def measure(
    model: str,
    techniques: Sequence[str | Spec],
    length: int = 1024,
    tokens: int = 32,
    windows: int = 8,
    rounds: int = 3,
    out: Path | str | None = None,
    text: Path | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed, memory and quality of a language model with each technique, beside the untouched model.

    Args:
        model: of :mod:`attnlib.bench.models`, a folder of a transformers model, or its name on the hub.
        techniques: as :func:`technique` reads them.
        length: tokens of every prompt.
        tokens: that follow it: decoded one by one for speed, predicted for quality.
        windows: texts for quality.
        rounds: of the times, one technique after another in each.
        out: folder for ``techniques.json`` and ``report.html``.
        text: a file; text inside installed packages by default.
        dtype: of the weights.
        progress: told of every piece.

    Returns:
        Plain values, for JSON: ``rows`` in the order given, the untouched model first.

    Raises:
        ValueError: no technique, an unknown one, a model without a head, more tokens than it reads, a ratio that leaves
            no key.
    """
    if not techniques:
        raise ValueError("with: name a technique, for example SnapKV,ratio=0.5")
    for what, number, least in (("length", length, 2), ("tokens", tokens, 2), ("windows", windows, 1),
                                ("rounds", rounds, 1)):  # fmt: skip
        check_int(what, number, least=least)
    contestants = [Technique(UNTOUCHED, nullcontext), *map(technique, techniques)]
    labels = [c.label for c in contestants]
    if len(set(labels)) < len(labels):
        raise ValueError(f"with: every technique once, got {labels[1:]}")
    _leaves_keys(techniques, length)
    if out is not None:
        writable(out)
    data = files.text(None if text is None else Path(text))
    loaded, tokenizer = open_model(model, dtype)
    needs_head(loaded)
    limit = int(getattr(loaded.config, "max_position_embeddings", 1 << 30))
    if length + tokens > limit:
        raise ValueError(f"length={length} and tokens={tokens} are more than the {limit} that {model} can read")
    ids = tokens_of(tokenizer, data.test)
    if ids.numel() < length + tokens:
        ids = tokens_of(tokenizer, torch.cat([data.train, data.test]))
    size = length + tokens
    rows = ids[: ids.numel() // size * size].view(-1, size)[:windows]
    if not len(rows):
        raise files.DataError(f"the text has {ids.numel()} tokens, fewer than length={length} and tokens={tokens}")

    def say(line: str) -> None:
        if progress is not None:
            progress(line)

    bits, first, memory = {}, {}, {}
    for c in contestants:
        with c.act(loaded):
            bits[c.label], first[c.label] = _quality(loaded, tokenizer, rows, length)

            memory[c.label] = _memory(loaded, rows[:1, :length], rows[:1, length:])
        say(f"{c.label}: {sum(bits[c.label]) / len(rows):.3f} bits per byte")
    times: dict[str, list[tuple[float, float]]] = {c.label: [] for c in contestants}
    for done in range(rounds + 1):
        for c in contestants:
            with c.act(loaded):
                start = now()
                cache = cache_out(_prompted(loaded, rows[:1, :length]))
                read = now()
                _steps(loaded, cache, rows[:1, length:])
                if done:
                    times[c.label].append((read - start, (now() - read) / tokens))
        say(f"times, round {done} of {rounds}")
    found = []
    for label in labels:
        gap = mean_interval([a - b for a, b in zip(bits[label], bits[UNTOUCHED], strict=True)])
        prompts, steps = zip(*times[label], strict=True)
        base = times[UNTOUCHED]
        same = torch.cat([a == b for a, b in zip(first[label], first[UNTOUCHED], strict=True)])
        found.append({
            "label": label, "bits": interval(mean_interval(bits[label])), "more bits": interval(gap),
            "agreement": float(same.float().mean()),
            "prompt_s": _median(prompts), "prompt": _median([p / b for p, (b, _) in zip(prompts, base, strict=True)]),
            "tokens_per_s": 1 / _median(steps),
            "speed": _median([b / s for s, (_, b) in zip(steps, base, strict=True)]),
            "cache_bytes": memory[label][0], "cache": memory[label][0] / max(memory[UNTOUCHED][0], 1),
            "peak_bytes": memory[label][1], "peak": memory[label][1] / max(memory[UNTOUCHED][1], 1),
        })  # fmt: skip
    result = {
        "what": "techniques side by side on one model", "machine": machine(), "model": models.title(model),
        "dtype": str(dtype).removeprefix("torch."), "text": data.source, "length": length, "tokens": tokens,
        "windows": len(rows), "rounds": rounds, "rows": found,
    }  # fmt: skip
    if out is not None:
        write_json(Path(out) / "techniques.json", result)
        write_text(Path(out) / "report.html", render(result))
    return result


def _leaves_keys(techniques: Sequence[str | Spec], length: int) -> None:
    for given in techniques:
        evicted = Spec.parse(given).config.get("ratio")
        if isinstance(evicted, (int, float)) and 0 <= evicted < 1 and int(length * (1 - evicted)) < 1:
            raise ValueError(f"with: ratio={evicted} leaves no key of {length}")


def _quality(model: Any, tokenizer: Any, rows: Tensor, length: int) -> tuple[list[float], list[Tensor]]:
    bits, first = [], []
    for row in rows:
        prompt, rest = row[None, :length], row[None, length:]
        out = _prompted(model, prompt)
        more = model(rest[:, :-1], **cache_argument(model, cache_out(out))).logits
        logits = torch.cat([out.logits, more], 1).float()
        loss = torch.nn.functional.cross_entropy(logits[0], rest[0], reduction="sum")
        bits.append(float(loss) / math.log(2) / max(len(tokenizer.decode(rest[0]).encode()), 1))
        first.append(logits[0].argmax(-1))
    return bits, first


def _memory(model: Any, prompt: Tensor, more: Tensor) -> tuple[int, int]:
    """Bytes that the cache holds in the end, and the most that live at once on the way."""
    held = []

    def work() -> None:
        cache = cache_out(_prompted(model, prompt))
        _steps(model, cache, more)
        held.append(held_bytes(cache))

    peak = peak_bytes(work)
    return held[0], peak


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def render(result: dict[str, Any]) -> str:
    """One self-contained HTML page."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnlib.bench"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(number=report.number)
    labels = [row["label"] for row in result["rows"]]
    style = plots.styles(labels, UNTOUCHED)
    figures = [
        _scatter(result, style, "cache_bytes", 2**20, "cache, MiB"),
        _scatter(result, style, "tokens_per_s", 1.0, "tokens per second"),
    ]
    return environment.get_template("techniques.html.j2").render(
        r=result, marks={label: plots.marker_svg(style[label]) for label in labels}, figures=figures
    )


def _scatter(result: dict[str, Any], style: plots.Style, cost: str, unit: float, x: str) -> str:
    figure, axes = plots._figure(5.6, 3.6)
    for row in result["rows"]:
        colour, marker = style[row["label"]]
        held = row["bits"]
        axes.errorbar(
            row[cost] / unit, held["mean"], yerr=row["more bits"]["half"] or 0.0, color=colour, marker=marker,
            markersize=6, linestyle="none", capsize=2.5,
        )  # fmt: skip
    axes.set_xlabel(x)
    axes.set_ylabel("bits per byte")
    return plots.svg(figure, f"bits per byte against {x}")


def print_table(result: dict[str, Any], console: Console) -> None:
    """The rows, as the command line shows them."""
    table = Table("technique", "tokens/s", "prompt s", "MiB", "bits/byte", "more", "same", box=None,
                  title=result["model"])  # fmt: skip
    for row in result["rows"]:
        more = row["more bits"]
        half = "" if more["half"] is None else f" ± {more['half']:.3f}"
        table.add_row(
            row["label"], f"{row['tokens_per_s']:.1f}", f"{row['prompt_s']:.2f}", f"{row['cache_bytes'] / 2**20:.1f}",
            f"{row['bits']['mean']:.3f}", "" if row["label"] == UNTOUCHED else f"{more['mean']:+.3f}{half}",
            f"{row['agreement']:.0%}",
        )  # fmt: skip
    console.print(table)
