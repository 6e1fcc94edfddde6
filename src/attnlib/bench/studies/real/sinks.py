"""Where attention sinks and outliers of a pretrained decoder are, and what it loses when they are touched.

``attnlib bench --suite real-sinks --out benchmarks/results`` measures again what ``real-sinks-cpu.json`` holds. Looked
at, on windows of real text: the share of attention that the first token gets, per layer and head; which later tokens
get more than a tenth of all attention of a head; norms of the first token's values and keys against those of the rest;
excess kurtosis of the residual stream over channels and its largest entries (massive activations), where and in which
channels they are. Then something is done to them, and the loss on the same text and on needles in it says what that
costs, as a paired difference from the untouched model with a 95 % interval over windows:

- ACT (:class:`attnlib.steer.SinkCalibration`) on all heads, and on the heads that its search keeps on other text;
- the first token's share scaled down and given to the other keys; its value zeroed; the token left out of the input;
  another token put before it; another key evicted, the control;
- a window of recent keys alone, and with the first one or four beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....hooks import Record, attach
from ....hooks.intervention import Intervention
from ....hooks.site import Site
from ....look import Statistics
from ....steer import SinkCalibration, calibrate, search_heads
from ... import models
from ...clock import machine
from ...converting import tokens_of
from ...data import files
from ...small import Progress, interval
from ...stats import mean_interval
from ._items import Items, needle_items, row_losses, states, text_items
from ._kept import Kept
from ._pictures import heat, panels, save

QUESTION = "where are sinks and outliers, and what do they carry?"
MODELS = ("smollm2-135m",)

#: Mean share of a head's attention from which a token beyond the first counts as a sink (that of ACT).
SHARE = 0.1


class Norms(Intervention):
    """Norms of keys and values, (H, N) per layer, means over samples."""

    name = "norms"

    def __init__(self) -> None:
        self.layers = None
        self.reset()

    def reset(self) -> None:
        self.found: dict[int, dict[str, Tensor]] = {}

    def on_kv_read(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.found[site.layer] = {name: x.float().norm(dim=-1).mean(0) for name, x in (("keys", k), ("values", v))}
        return k, v

    def results(self) -> dict[int, dict[str, Tensor]]:
        return dict(self.found)


class KeyShare(Intervention):
    """Scale the weight that one key gets and give what is taken to the other keys, in proportion."""

    name = "key-share"

    def __init__(self, key: int, beta: float):
        self.layers, self.key, self.beta = None, key, beta

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        there = torch.zeros(1, 1, weights.shape[-1], dtype=torch.bool)
        there[..., self.key] = True
        return calibrate(weights, there, self.beta)


class SilentValue(Intervention):
    """The value of one key is zero: it still takes attention, and says nothing."""

    name = "silent-value"

    def __init__(self, key: int):
        self.layers, self.key = None, key

    def on_kv_read(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v.index_fill(2, torch.tensor([self.key]), 0.0)


class RecentKeys(Intervention):
    """Each query reads the last ``window`` keys and the first ``sinks``."""

    name = "recent-keys"
    replaces_mask = True

    def __init__(self, window: int, sinks: int = 0):
        self.layers, self.window, self.sinks = None, window, sinks

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        query, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        return call(q, k, v, mask=(key <= query) & ((key > query - self.window) | (key < self.sinks)))


@torch.no_grad()
def look(model: Any, items: Items, tokenizer: Any) -> dict[str, Any]:
    """Sinks, norms, kurtosis and massive activations of a model on some rows; see the module."""
    norms = Norms()
    record = Record(rows="all", what=("received",))
    with attach(model, Statistics(what=("entropy", "distance", "sink")), record, norms) as session:
        found = states(model, items)
        seen, received = session.results["statistics"], session.results["record"]
    layers = model.config.num_hidden_layers
    later: list[list[int]] = []  # per layer and head, sinks beyond the first token, summed over rows
    where: dict[int, int] = {}
    for layer in range(layers):
        share = received[layer]["received"] / received[layer]["seen"].clamp_min(1)  # (B, H, N)
        share = share.masked_fill(received[layer]["seen"] < 8, 0.0)  # few readers say little
        above = share > SHARE
        above[..., 0] = False
        later.append(above.sum((0, 2)).tolist())
        for row, _, slot in above.nonzero().tolist():
            token = int(items.ids[row, slot])
            where[token] = where.get(token, 0) + 1
    stream = []
    for layer, x in enumerate(found[:-1]):  # the last are normalised
        x = x.float()
        centred = x - x.mean(-1, keepdim=True)
        kurtosis = centred.pow(4).mean(-1) / centred.pow(2).mean(-1).square().clamp_min(1e-12) - 3  # (B, N)
        size = x.abs()
        top = size.flatten().topk(8).indices
        places = [(int(i) // x.shape[2] % x.shape[1], int(i) % x.shape[2]) for i in top.tolist()]
        stream.append(
            {
                "before": layer, "kurtosis first": float(kurtosis[:, 0].mean()),
                "kurtosis rest": float(kurtosis[:, 1:].mean()), "largest": float(size.max()),
                "largest rest": float(size[:, 1:].max()), "median": float(size.median()),
                "channels": sorted({c for _, c in places}), "places": sorted({p for p, _ in places}),
            }
        )  # fmt: skip
    tables = {
        name: [[round(float(v), 4) for v in seen[n][key]] for n in range(layers)]
        for name, key in (("first token", "sink_score"), ("entropy share", "entropy_share"), ("distance", "distance"))
    }
    return {
        **tables, "later sinks": later,
        "tokens of later sinks": [
            [tokenizer.decode([token]), count] for token, count in sorted(where.items(), key=lambda p: -p[1])[:8]
        ],
        "norms": [
            {
                f"{kind} {which}": round(float(part.mean()), 4)
                for kind, values in norms.found[n].items()
                for which, part in (("first", values[:, 0]), ("rest", values[:, 1:]))
            }
            for n in range(layers)
        ],
        "stream": stream,
    }  # fmt: skip


def shifted(items: Items) -> Items:
    """The same without the first token."""
    return Items(items.ids[:, 1:], items.counts[:, 1:])


def after(items: Items, token: int) -> Items:
    """The same with another token before."""
    rows = len(items.ids)
    ids = torch.cat([torch.full((rows, 1), token), items.ids], 1)
    return Items(ids, torch.cat([torch.zeros(rows, 1, dtype=torch.bool), items.counts], 1))


@torch.no_grad()
def losses(model: Any, items: Items, *what: Intervention) -> dict[str, list[float]]:
    """Loss and share right of every row with something attached."""
    if what:
        with attach(model, *what):
            out = model.model(input_ids=items.ids, use_cache=False).last_hidden_state
    else:
        out = model.model(input_ids=items.ids, use_cache=False).last_hidden_state
    loss, right = row_losses(model, out, items)
    return {"loss": loss.tolist(), "right": right.tolist()}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    name: str = "smollm2-135m",
    rows: tuple[int, int] = (8, 12),
    lengths: tuple[int, int] = (192, 128),
    search_layers: Sequence[int] | None = tuple(range(2, 29, 3)),
    window: int = 48,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Look, then touch.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``real-sinks-cpu.svg``.
        name: of :mod:`attnlib.bench.models`.
        rows, lengths: of text and of needles.
        search_layers: where ACT's heads are searched.
        window: recent keys.
        loaded: ``(model, tokenizer)`` in place of a named one.

    Returns:
        Plain values, for JSON.
    """
    model, tokenizer = models.load(name, dtype=torch.bfloat16) if loaded is None else loaded
    data = files.text()
    held, other = tokens_of(tokenizer, data.test), tokens_of(tokenizer, data.train[:60_000])
    items = {
        "text": text_items(held, rows[0], lengths[0]),
        "needle": needle_items(tokenizer, held, rows[1], lengths[1], 2),
    }
    kept = Kept(keep, ["sinks", name, list(rows), list(lengths), window, str(search_layers)], progress)
    seen = kept("looked at", lambda: look(model, items["text"], tokenizer))

    def searched() -> dict[str, Any]:
        some = text_items(other, 2, 96)

        def evaluate(model: Any) -> float:
            out = model.model(input_ids=some.ids, use_cache=False).last_hidden_state
            return -float(row_losses(model, out, some)[0].mean())

        with torch.no_grad():
            found = search_heads(model, evaluate, layers=search_layers)
        return {"heads": {str(n): h for n, h in found.heads.items()}, "of": len(found.scores)}

    act = kept("ACT's search", searched)
    chosen = {int(n): h for n, h in act["heads"].items()}
    layers = model.config.num_hidden_layers
    middle = list(range(2, layers - 1)) or list(range(layers))  # as the authors have it

    touched: dict[str, tuple[Callable[[Items], Items], tuple[Intervention, ...]]] = {
        "untouched": (lambda i: i, ()),
        "ACT, all heads of its layers": (lambda i: i, (SinkCalibration(layers=middle),)),
        "ACT, all heads, threshold 5 / length": (
            lambda i: i, (SinkCalibration(layers=middle, threshold=5.0, relative=True),)),
        f"ACT, {sum(map(len, chosen.values()))} searched heads": (lambda i: i, (SinkCalibration(chosen),)),
        "first token's share halved": (lambda i: i, (KeyShare(0, 0.5),)),
        "first key evicted": (lambda i: i, (KeyShare(0, 0.0),)),
        "eighth key evicted": (lambda i: i, (KeyShare(7, 0.0),)),
        "first value zeroed": (lambda i: i, (SilentValue(0),)),
        "eighth value zeroed": (lambda i: i, (SilentValue(7),)),
        "first token left out": (shifted, ()),
        "end-of-text before it": (lambda i: after(i, 0), ()),
        f"last {window} keys": (lambda i: i, (RecentKeys(window),)),
        f"first and last {window - 1} keys": (lambda i: i, (RecentKeys(window - 1, 1),)),
        f"first 4 and last {window - 4} keys": (lambda i: i, (RecentKeys(window - 4, 4),)),
    }  # fmt: skip
    table = []
    base: dict[str, dict[str, list[float]]] = {}
    for label, (change, what) in touched.items():

        def told_of(change: Any = change, what: Any = what) -> dict[str, Any]:
            return {task: losses(model, change(one), *what) for task, one in items.items()}

        told = kept(label, told_of)
        base = base or told
        row: dict[str, Any] = {"name": label}
        for task in items:
            row[f"{task} loss"] = round(float(np.mean(told[task]["loss"])), 4)
            gap = np.array(told[task]["loss"]) - np.array(base[task]["loss"])
            row[f"{task} loss added"] = interval(mean_interval(gap.tolist()))
            row[f"{task} right"] = round(float(np.mean(told[task]["right"])), 4)
        table.append(row)
    result: dict[str, Any] = {
        "what": "attention sinks and massive activations of a pretrained decoder, and what touching them costs",
        "model": models.MODELS[name].title if loaded is None else "given", "machine": machine(), "dtype": "bfloat16",
        "text": data.source, "rows": list(rows), "lengths": list(lengths), "seen": seen, "search": act,
        "touched": table, "seconds": round(kept.seconds, 1),
    }  # fmt: skip
    if pictures is not None:
        draw(Path(pictures) / "real-sinks-cpu.svg", result)
    return result


def draw(path: Path, result: dict[str, Any]) -> None:
    """Share of the first token, later sinks, outliers by layer, and what touching them costs."""
    figure, axes = panels(2, 3, 13.5, 8.2)
    seen = result["seen"]
    heat(axes[0][0], np.array(seen["first token"]), "attention on the first token", "head", "layer", 0, 1)
    heat(axes[0][1], np.array(seen["entropy share"]), "entropy, share of the largest", "head", "layer", 0, 1)
    stream = seen["stream"]
    depth = [s["before"] for s in stream]
    axes[0][2].plot(depth, [s["largest"] for s in stream], label="largest entry, any token", color="#e8590c")
    axes[0][2].plot(depth, [s["largest rest"] for s in stream], label="largest, first token left out", color="#2f7de1")
    axes[0][2].plot(depth, [s["median"] for s in stream], label="median", color="#888888")
    axes[0][2].set_yscale("log")
    axes[0][2].set_title("entries of the residual stream", fontsize=10)
    for which, colour in (("first", "#e8590c"), ("rest", "#2f7de1")):
        axes[1][0].plot(depth, [s[f"kurtosis {which}"] + 3 for s in stream], label=f"{which}", color=colour)
    axes[1][0].set_yscale("log")
    axes[1][0].set_title("kurtosis over channels (a normal distribution has 3)", fontsize=10)
    for kind, style in (("values", "-"), ("keys", "--")):
        for which, colour in (("first", "#e8590c"), ("rest", "#2f7de1")):
            norms = [n[f"{kind} {which}"] for n in seen["norms"]]
            axes[1][1].plot(norms, style, color=colour, label=f"{kind}, {which}")
    axes[1][1].set_title("norms by layer", fontsize=10)
    for axis in (axes[0][2], axes[1][0], axes[1][1]):
        axis.set_xlabel("layer", fontsize=9)
        axis.legend(fontsize=7, frameon=False)
    rows = [r for r in result["touched"] if r["name"] != "untouched"]
    bar = axes[1][2]
    bar.errorbar([max(r["text loss added"]["mean"], -1) for r in rows], range(len(rows)),
                 xerr=[r["text loss added"]["half"] or 0 for r in rows], fmt="o", color="#2f7de1",
                 capsize=2)  # fmt: skip
    bar.set_yticks(range(len(rows)), [r["name"] for r in rows], fontsize=7)
    bar.axvline(0, color="#888888", linewidth=0.8)
    bar.set_xscale("symlog", linthresh=0.1)
    bar.invert_yaxis()
    bar.set_title("loss added per token of text (nats)", fontsize=10)
    save(figure, path)
