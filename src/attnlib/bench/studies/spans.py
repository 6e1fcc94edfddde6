"""Spans per head: what a language model loses when each head reads as far as its own map says it must.

``attnlib bench --suite spans --out benchmarks/results`` measures again what ``spans-cpu.json`` holds and draws it;
``make models`` fetches the model. MoA (Fu et al., 2024, arXiv 2406.14909) profiles SmolLM2-135M on inputs of 256 and
512 tokens and searches a rule for every head under a bound of the mean density, 1024 tokens included, which it never
saw; the sceptic's baseline gives all heads the same window of that density. Documents, docstrings of one source file
each, are held out; intervals are over documents. Profiles come from the documents' own next token, or from answers that
the model itself gives, as the authors take them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...convert.calibration import answered, mixture
from ...convert.spans import Plan, density, influence, put, rules
from .. import models
from ..clock import machine
from ..converting import bits_per_byte
from ..data import files
from ..small import Progress, interval, picture, study
from ..stats import paired_interval

FULL = "full attention"
#: What a calibration prompt ends with.
QUESTION = "\n\nQuestion: What does the text above describe?\nAnswer:"


def tokens_of_documents(tokenizer: Any, texts: Sequence[str], least: int, count: int) -> list[Tensor]:
    """(1, N) ids of the first documents that have so many tokens."""
    found: list[Tensor] = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[None]
        if ids.shape[1] >= least:
            found.append(ids)
        if len(found) == count:
            return found
    raise files.DataError(f"{count} documents of {least} tokens are needed, and there are {len(found)}")


def uniform(layers: int, heads: int, bound: float, block: int, sinks: int) -> Plan:
    """One rule for all heads, whose density is the bound at every length of whole blocks."""
    return Plan([[-float(block * sinks)] * heads] * layers, [[bound] * heads] * layers)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    densities: Sequence[float] = (0.5, 0.25),
    profiled: Sequence[int] = (256, 512),
    longer: int = 1024,
    block: int = 16,
    sinks: int = 1,
    documents: int = 6,
    calibration: int = 2,
    answer: int = 32,
    gap: float = 1e-3,
    decoder: str = "smollm2",
) -> dict[str, Any]:
    """Give the model full attention, one window for all heads, or spans of MoA, and read held-out documents.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``spans-cpu.svg``.
        densities: bounds; the answers serve the last one alone.
        profiled: lengths of the profiles.
        longer: a length without one, at which a plan is chosen.
        block, sinks: of :class:`attnlib.nn.sparse.moa_spans.SpanHeads`.
        documents: held-out ones.
        calibration: others, for profile and choice.
        answer: tokens of an answer.
        gap: of every program of the search.
        decoder: name in :mod:`attnlib.bench.models`.

    Returns:
        Plain values, for JSON.
    """
    model, tokenizer = models.load(decoder, dtype=torch.bfloat16)
    data = files.documents()
    held = tokens_of_documents(tokenizer, data.test, longer, documents)
    others = tokens_of_documents(tokenizer, data.train[:: max(1, len(data.train) // (4 * calibration))], longer,
                                 calibration)  # fmt: skip
    question = torch.tensor(tokenizer(QUESTION, add_special_tokens=False)["input_ids"])[None]
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    lengths = [*profiled, longer]
    choices = rules(-min(lengths), max(profiled), min(lengths), longer, 4 * block, profiled=max(profiled))
    unseen = [{"input_ids": ids[:, :longer]} for ids in others[:2]]
    maps: dict[str, dict[int, Tensor]] = {}
    found: dict[str, Any] = {}

    def batches(source: str) -> dict[int, list[dict[str, Tensor]]]:
        if source == "text":
            return {n: [{"input_ids": ids[:, :n]} for ids in others] for n in profiled}
        room = answer + question.shape[1]
        return {
            n: answered(model, [{"input_ids": torch.cat([ids[:, : n - room], question], 1)} for ids in others], answer)
            for n in profiled
        }

    @functools.cache
    def plan_of(source: str, bound: float) -> Plan:
        if source not in maps:
            maps[source] = {n: influence(model, given, block) for n, given in batches(source).items()}
        made = mixture(
            model, {}, dict.fromkeys(lengths, bound), unseen, block, sinks, choices=choices, maps=maps[source],
            rules_per_layer=None, points=2, gap=gap,
        )  # fmt: skip
        made.conversion.restore()
        found[f"{source}, {bound}"] = {
            "plans": len(made.plans), "losses": made.losses,
            "density": {n: made.plan.density(n, block, sinks) for n in lengths},
            "density_causal": {n: made.plan.density(n, block, sinks, "causal") for n in lengths},
            "spans": made.plan.spans(longer, block),
        }  # fmt: skip
        if progress is not None:
            progress(f"spans from {source}, density {bound}: {len(made.plans)} plans")
        return made.plan

    entries: dict[str, tuple[str, float]] = {FULL: ("", 1.0)}
    for bound in densities:
        entries[f"one window, {bound}"] = ("uniform", bound)
        entries[f"MoA, {bound}"] = ("text", bound)
    entries[f"MoA on answers, {densities[-1]}"] = ("answers", densities[-1])

    def run(name: str, document: int) -> dict[str, float]:
        source, bound = entries[name]
        if source == "uniform":
            plan = uniform(layers, heads, bound, block, sinks)
        elif source:
            plan = plan_of(source, bound)
        with put(model, plan, block, sinks) if source else nullcontext():
            return {
                f"bits at {n}": bits_per_byte(model, tokenizer, [{"input_ids": held[document][:, :n]}]) for n in lengths
            }

    key = (decoder, list(densities), lengths, block, sinks, calibration, answer, data.fingerprint)
    rows = study(list(entries), run, f"bits at {longer}", FULL, range(documents), progress, keep, key)
    for source, bound in entries.values():  # where all runs were kept
        if source in ("text", "answers"):
            plan_of(source, bound)
    more = gaps(rows["runs"], [f"bits at {n}" for n in lengths])
    result = {
        "what": "a language model whose heads read spans of their own", "machine": machine(),
        "model": models.MODELS[models.canonical(decoder)].title + ", in bfloat16",
        "text": data.source, "split": data.split,
        "block": block, "sinks": sinks, "lengths": lengths, "profiled": list(profiled), "calibration": calibration,
        "unit": "documents", "rules": len(choices),
        "density of one window": {
            str(b): {n: density(-block * sinks, b, n, block, sinks) for n in lengths} for b in densities
        },
        "plans": found, "gaps": more, **rows,
    }  # fmt: skip
    if pictures is not None:
        curves = {
            name: [(n, more[name][f"bits at {n}"]["mean"], more[name][f"bits at {n}"]["half"]) for n in lengths]
            for name in entries if name != FULL
        }  # fmt: skip
        title = f"{models.MODELS[models.canonical(decoder)].title.partition(',')[0]}: spans per head"
        dashed = [name for name in entries if name.startswith("one window")]
        picture(Path(pictures) / "spans-cpu.svg", curves, "tokens", "bits per byte more than full attention", title,
                log=("x",), dashed=dashed)  # fmt: skip
    return result


def gaps(runs: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Paired over documents: what every contestant needs more than full attention, and than one window, by length."""

    def values(name: str, metric: str) -> dict[int, float]:
        return {r["seed"]: r[metric] for r in runs if r["name"] == name}

    names = list(dict.fromkeys(r["name"] for r in runs))
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == FULL:
            continue
        window = f"one window, {name.rpartition(', ')[2]}"
        for metric in metrics:
            own, full = values(name, metric), values(FULL, metric)
            entry = found.setdefault(name, {})
            gap = paired_interval(own, full)
            entry[metric] = None if gap is None else interval(gap)
            if name.startswith("MoA") and window in names:
                gap = paired_interval(own, values(window, metric))
                entry[f"{metric}, less one window's"] = None if gap is None else interval(gap)
    return found
