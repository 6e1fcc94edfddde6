"""Which heads of a pretrained decoder matter, and which cheap score says so.

``attnlib bench --suite real --out benchmarks/results`` measures again what ``real-heads-cpu.json`` holds. Every head of
SmolLM2-135M (30 layers of 9) is taken out alone, and scaled alone, with :class:`attnlib.steer.HeadScale`; what that
costs is measured on three tasks: real text (loss per token of documentation), a needle (loss of five digits that a
sentence before them names), and copying (loss of random tokens that came before in the same order). Heads are then
ranked by scores that need one forward pass, or one backward pass, and

- the agreement of each score with the true ranking is Spearman's correlation over the 270 heads, with a bootstrap
  interval over heads; the two halves of the items agree with each other as said under ``halves``, which bounds it;
- heads are removed in the order of each score, least important first, against random orders.

A batch holds the nine heads of a layer, each out in rows of its own, and only the blocks from that layer on are run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....hooks import attach
from ....hooks.intervention import Intervention, Probe
from ....hooks.site import Site
from ....look import Statistics
from ....steer import HeadScale, head_divergence
from ... import models
from ...clock import machine
from ...converting import tokens_of
from ...data import files
from ...plots import PALETTE
from ...small import Progress
from ...stats import mean_interval
from ._items import Items, copying_items, needle_items, row_losses, states, text_items
from ._kept import Kept
from ._pictures import heat, panels, save

QUESTION = "which heads matter, and which cheap score says so?"
MODELS = ("smollm2-135m",)

TASKS = ("text", "needle", "copying")

#: Factors that every head is scaled by alone; 0 takes it out.
FACTORS = (0.0, 2.0)


@contextlib.contextmanager
def blocks_from(model: Any, first: int) -> Iterator[None]:
    """The model without its first blocks; it then starts from ``inputs_embeds``, states before block ``first``."""
    body = model.model
    layers, count = body.layers, model.config.num_hidden_layers
    body.layers, model.config.num_hidden_layers = nn.ModuleList(layers[first:]), count - first
    try:
        yield
    finally:
        body.layers, model.config.num_hidden_layers = layers, count


@torch.no_grad()
def scaled_alone(model: Any, items: Items, before: Tensor, layer: int, factor: float) -> tuple[Tensor, Tensor]:
    """Loss and share right (H, rows) with each head of a layer scaled alone.

    Args:
        model: the model.
        items: what it reads.
        before: (B, L, C) states before block ``layer``.
        layer: whose heads.
        factor: of the scaled head.
    """
    heads, rows = model.config.num_attention_heads, len(items.ids)
    factors = (1 - (1 - factor) * torch.eye(heads, dtype=torch.float64)).repeat_interleave(rows, 0)
    with blocks_from(model, layer), attach(model, HeadScale({layer: factors})):
        out = model.model(inputs_embeds=before.repeat(heads, 1, 1), use_cache=False).last_hidden_state
    loss, right = row_losses(model, out, items)
    return loss.view(heads, rows), right.view(heads, rows)


# --------------------------------------------------------------------------------------------------------------------
# Cheap scores


class Loudness(Probe):
    """How much a head writes: weights times norms of values, the first token left out, and norms of what it adds.

    Results: ``{layer: {"value_mass": (H,), "output": (H,)}}``, means over queries.
    """

    name = "loudness"

    def __init__(self) -> None:
        self.layers = None
        self.reset()

    def reset(self) -> None:
        self._values: Tensor | None = None
        self._sums: dict[int, dict[str, list[Tensor]]] = {}

    def on_kv_read(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        norms = v.float().norm(dim=-1).repeat_interleave(site.heads // site.kv_heads, 1)
        self._values = norms.index_fill(-1, torch.tensor([0]), 0.0)
        return k, v

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None]:
        return torch.arange(site.n_queries), None

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        assert self._values is not None
        mass = weights.float() @ self._values.unsqueeze(-1)
        self._add(site, "value_mass", mass[..., 0].mean(2))

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        weight = site.module.o_proj.weight.float().unflatten(1, (site.heads, -1))  # type: ignore[operator, union-attr]
        added = torch.einsum("bhnd,chd->bhnc", out.float(), weight)
        self._add(site, "output", added.norm(dim=-1).mean(2))
        return out

    def _add(self, site: Site, name: str, value: Tensor) -> None:
        self._sums.setdefault(site.layer, {}).setdefault(name, []).append(value.mean(0))

    def results(self) -> dict[int, dict[str, Tensor]]:
        return {
            layer: {name: torch.stack(parts).mean(0) for name, parts in sums.items()}
            for layer, sums in sorted(self._sums.items())
        }


class LastOutputs(Intervention):
    """Outputs of heads (B, H, D) at one place, per layer."""

    name = "last-outputs"

    def __init__(self, place: int):
        self.layers, self.place = None, place
        self.reset()

    def reset(self) -> None:
        self.found: dict[int, Tensor] = {}

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        self.found[site.layer] = out[:, :, self.place].detach()
        return out


def gate_gradients(model: Any, items: Items) -> Tensor:
    """(L, H) derivative of the loss by a factor on each head, at one."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    gates = torch.ones(layers, heads, requires_grad=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        with torch.enable_grad(), attach(model, HeadScale(lambda site: gates[site.layer])):
            out = model.model(input_ids=items.ids, use_cache=False).last_hidden_state[:, :-1]
            scores = model.lm_head(out[items.counts[:, 1:]]).float()
            F.cross_entropy(scores, items.ids[:, 1:][items.counts[:, 1:]]).backward()
    finally:
        for p in learned:
            p.requires_grad_(True)
    assert gates.grad is not None
    return gates.grad.detach()


def cheap_scores(model: Any, items: Items) -> dict[str, Tensor]:
    """Scores (L, H) by name; higher says that a head matters more. Directions were fixed before measuring."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads

    def table(found: Any, name: str) -> Tensor:
        return torch.stack([torch.as_tensor(found[layer][name]) for layer in range(layers)]).float()

    with torch.no_grad(), attach(model, Statistics(what=("entropy", "sink")), Loudness()) as session:
        model.model(input_ids=items.ids, use_cache=False)
    seen, loud = session.results["statistics"], session.results["loudness"]
    gradient = gate_gradients(model, items)
    scores = {
        "low entropy": -table(seen, "entropy"),
        "little on the first token": -table(seen, "sink_score"),
        "weights x value norms": table(loud, "value_mass"),
        "norm of what it adds": table(loud, "output"),
        "gradient of a gate, size": gradient.abs(),
        "gradient of a gate, signed": -gradient,
        "earlier layers": -torch.arange(layers)[:, None].expand(layers, heads).float(),
    }
    if items.without is not None:
        place = int(items.counts[0].nonzero()[0]) - 1  # where the first token of the answer is to be said
        found = []
        for ids in (items.ids, items.without):
            last = LastOutputs(place)
            with torch.no_grad(), attach(model, last):
                model.model(input_ids=ids, use_cache=False)
                found.append(dict(last.found))
        scores["divergence with and without (VHR)"] = torch.stack(
            [head_divergence(found[0][n], found[1][n]).mean(0) for n in range(layers)]
        )
    return scores


# --------------------------------------------------------------------------------------------------------------------
# The study


def spearman(a: np.ndarray, b: np.ndarray, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Rank correlation with a 95 % bootstrap interval over what is ranked.

    >>> spearman(np.arange(40), np.arange(40) ** 2)["value"]
    1.0
    """
    from scipy import stats

    def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = (stats.rankdata(v, axis=-1) for v in (x, y))
        x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)).clip(1e-12)

    drawn = np.random.default_rng(seed).integers(0, len(a), (samples, len(a)))
    ends = np.percentile(correlation(a[drawn], b[drawn]), [2.5, 97.5])
    return {"value": round(float(correlation(a, b)), 4), "interval": [round(float(v), 4) for v in ends]}


def heads_in_order(scores: np.ndarray) -> list[tuple[int, int]]:
    """``(layer, head)`` from the least score to the greatest."""
    return [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in scores.ravel().argsort(kind="stable")]


def by_layer(chosen: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """``{layer: [head, ...]}``."""
    found: dict[int, list[int]] = {}
    for layer, head in chosen:
        found.setdefault(layer, []).append(head)
    return found


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    name: str = "smollm2-135m",
    rows: Sequence[int] = (8, 4, 4),
    doubled: int = 1,
    lengths: Sequence[int] = (128, 96, 64),
    removed: Sequence[int] = (0, 27, 54, 108),
    seeds: Sequence[int] = (0, 1, 2),
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Take every head out, double it, rank, and remove heads in order.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``real-heads-cpu.svg``.
        name: of :mod:`attnlib.bench.models`.
        rows, lengths: of text, needles and copying.
        doubled: rows of text on which heads are doubled.
        removed: numbers of heads that are removed together.
        seeds: of random orders.
        loaded: ``(model, tokenizer)`` in place of a named one.

    Returns:
        Plain values, for JSON.
    """
    model, tokenizer = models.load(name) if loaded is None else loaded
    data = files.text()
    held, other = tokens_of(tokenizer, data.test), tokens_of(tokenizer, data.train[:60_000])
    vocabulary = (model.config.vocab_size // 48, model.config.vocab_size * 4 // 5)  # neither markers nor rare pieces

    def drawn(tokens: Tensor, seed: int) -> dict[str, Items]:
        return {
            "text": text_items(tokens, rows[0], lengths[0]),
            "needle": needle_items(tokenizer, tokens, rows[1], lengths[1], seed),
            "copying": copying_items(rows[2], lengths[2], vocabulary, seed),
        }

    items, calibration = drawn(held, 0), drawn(other, 1)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    kept = Kept(keep, ["heads", name, list(rows), list(lengths), doubled, FACTORS], progress)
    before: dict[str, list[Tensor]] = {}

    def states_of(task: str) -> list[Tensor]:
        if task not in before:
            before[task] = states(model, items[task])
        return before[task]

    base: dict[str, dict[str, Any]] = {}
    for task in TASKS:

        def untouched(task: str = task) -> dict[str, Any]:
            loss, right = row_losses(model, states_of(task)[-1], items[task])
            return {"loss": loss.tolist(), "right": right.tolist()}

        base[task] = kept(f"{task}, untouched", untouched)
    alone: dict[tuple[str, float], dict[str, np.ndarray]] = {}
    for factor, task in [(f, t) for f in FACTORS for t in (TASKS if f == 0 else TASKS[:1])]:
        tables = []
        for layer in range(layers):

            def scaled(task: str = task, layer: int = layer, factor: float = factor) -> dict[str, Any]:
                some, before = items[task], states_of(task)[layer]
                if factor:
                    some, before = Items(some.ids[:doubled], some.counts[:doubled]), before[:doubled]
                loss, right = scaled_alone(model, some, before, layer, factor)
                return {"loss": loss.tolist(), "right": right.tolist()}

            tables.append(kept(f"{task}, layer {layer}, heads x {factor:g}", scaled))
        alone[task, factor] = {k: np.array([t[k] for t in tables]) for k in ("loss", "right")}  # (L, H, rows)

    truth = {task: alone[task, 0.0]["loss"].mean(-1) - np.mean(base[task]["loss"]) for task in TASKS}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for task in TASKS:

        def cheap(task: str = task) -> dict[str, Any]:
            return {k: v.tolist() for k, v in cheap_scores(model, calibration[task]).items()}

        found = kept(f"{task}, scores", cheap)
        scores[task] = {k: np.array(v) for k, v in found.items()}
    agreement: dict[str, Any] = {}
    for task in TASKS:
        loss = alone[task, 0.0]["loss"]
        halves = [loss[..., items[task].half(i)].mean(-1).ravel() for i in (0, 1)]
        agreement[task] = {
            "halves": spearman(halves[0], halves[1]),
            **{k: spearman(v.ravel(), truth[task].ravel()) for k, v in scores[task].items()},
            **{f"damage to {o}": spearman(truth[o].ravel(), truth[task].ravel()) for o in TASKS if o != task},
        }

    orders = {"true damage, each alone": truth["text"], **scores["text"]}
    for seed in seeds:
        orders[f"random, seed {seed}"] = np.random.default_rng(seed).random((layers, heads))
    curves: dict[str, list[dict[str, Any]]] = {}
    for label, score in orders.items():
        ranked = heads_in_order(score)
        for count in removed:

            def without(ranked: Any = ranked, count: int = count) -> dict[str, Any]:
                told = {}
                with torch.no_grad(), attach(model, HeadScale.ablate(by_layer(ranked[:count]))):
                    for task in ("text", "needle"):
                        out = model.model(input_ids=items[task].ids, use_cache=False).last_hidden_state
                        loss, right = row_losses(model, out, items[task])
                        told[task] = {"loss": loss.tolist(), "right": right.tolist()}
                return told

            told = kept(f"{label}, {count} removed", without)
            curves.setdefault(label, []).append(
                {"removed": count}
                | {f"{t} {k}": round(float(np.mean(told[t][k])), 4) for t in told for k in ("loss", "right")}
            )
    result: dict[str, Any] = {
        "what": "every head of a pretrained decoder taken out and doubled alone; scores that foresee it; heads removed",
        "model": models.MODELS[name].title if loaded is None else "given", "machine": machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": data.source, "rows": dict(zip(TASKS, rows, strict=True)),
        "lengths": dict(zip(TASKS, lengths, strict=True)),
        "untouched": {t: {k: round(float(np.mean(v)), 4) for k, v in base[t].items()} for t in TASKS},
        "damage": {t: np.round(truth[t], 4).tolist() for t in TASKS},
        "right": {t: np.round(alone[t, 0.0]["right"].mean(-1), 4).tolist() for t in TASKS},
        "doubled": np.round(
            alone["text", 2.0]["loss"].mean(-1) - np.mean(base["text"]["loss"][:doubled]), 4).tolist(),
        "agreement": agreement, "curves": curves, "seconds": round(kept.seconds, 1),
    }  # fmt: skip
    if pictures is not None:
        draw(Path(pictures) / "real-heads-cpu.svg", result)
    return result


def draw(path: Path, result: dict[str, Any]) -> None:
    """Damage of every head on the three tasks, agreement of scores, and loss as heads are removed."""
    figure, axes = panels(2, 3, 13.5, 8.6)
    for axis, task in zip(axes[0], TASKS, strict=True):
        damage = np.array(result["damage"][task])
        top = float(np.quantile(np.abs(damage), 0.98))
        heat(axis, damage, f"{task}: loss added without the head", "head", "layer", low=-top, high=top)
    names = [n for n in result["agreement"]["needle"] if not n.startswith("damage")]
    for i, task in enumerate(TASKS):
        found = result["agreement"][task]
        points = [(j + (i - 1) * 0.22, found[n]) for j, n in enumerate(names) if n in found]
        axes[1][0].errorbar(
            [v["value"] for _, v in points], [at for at, _ in points],
            xerr=[[v["value"] - v["interval"][0] for _, v in points],
                  [v["interval"][1] - v["value"] for _, v in points]],
            fmt="o", markersize=4, color=PALETTE[i], label=task, capsize=2,
        )  # fmt: skip
    axes[1][0].set_yticks(range(len(names)), names, fontsize=8)
    axes[1][0].axvline(0, color="#888888", linewidth=0.8)
    axes[1][0].set_title("rank agreement with the true damage", fontsize=10)
    axes[1][0].legend(fontsize=8, frameon=False)
    for axis, what, title in ((axes[1][1], "text loss", "loss on text as heads are removed"),
                              (axes[1][2], "needle right", "digits right as heads are removed")):  # fmt: skip
        plain = {n: c for n, c in result["curves"].items() if not n.startswith("random")}
        for i, (label, curve) in enumerate(plain.items()):
            axis.plot([p["removed"] for p in curve], [p[what] for p in curve], marker="o", markersize=3,
                      color=PALETTE[i], label=label, linewidth=1.2)  # fmt: skip
        chance = [c for n, c in result["curves"].items() if n.startswith("random")]
        if chance:
            values = [mean_interval([c[i][what] for c in chance]) for i in range(len(chance[0]))]
            axis.errorbar([p["removed"] for p in chance[0]], [v.mean for v in values],
                          yerr=[v.half or 0 for v in values],
                          color="#888888", linestyle="--", label="random", capsize=2)  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("heads removed", fontsize=9)
    axes[1][2].set_ylim(0, 1.05)
    axes[1][1].set_yscale("log")
    axes[1][1].legend(fontsize=7, frameon=False)
    save(figure, path)
