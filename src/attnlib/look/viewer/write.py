"""Reading a model once, and writing what it read as one page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_type
from ...hooks.attach import attach
from ...hooks.intervention import Intervention
from ...hooks.probes import Record
from .aligning import difference
from .packing import head_numbers, layer_bytes, pack, thumbs
from .runs import Axis, LayerMaps, Run, check_runs, writable
from .tokens import text_axis

#: Keys up to which every weight is in the page, beside those of no grid in front of a picture.
WHOLE = 256

#: Names of numbers per head, and what they say.
NUMBERS = {
    "change": "half of the weight that moved, mean over tokens",
    "sink": "mean weight on the first token",
    "entropy": "mean entropy of a token's weights, nats",
    "distance": "mean distance to what is read, tokens",
}


@torch.no_grad()
def read(
    model: nn.Module,
    inputs: Mapping[str, Any],
    tokens: Any = None,
    keys: Any = None,
    name: str = "run",
    *,
    layers: Sequence[int | str] | None = None,
    overlays: Mapping[str, Tensor] | None = None,
    sample: int = 0,
    part: str | None = None,
    interventions: Sequence[Intervention] = (),
) -> Run:
    """What a model reads in one forward, to be shown by :func:`attnlib.look.page`.

    Args:
        model: any that :func:`attnlib.attach` knows.
        inputs: named arguments of its forward.
        tokens: what asks: a tokenizer (then ``input_ids`` are the tokens), texts, or an :class:`Axis`; numbers by
            default.
        keys: what is asked in cross-attention, likewise.
        name: of the run.
        layers: only these.
        overlays: see :class:`Run`.
        sample: which of the batch.
        part: submodule to look at, such as the encoder of an encoder-decoder.
        interventions: techniques that act while it reads.

    Raises:
        ValueError: a layer without maps, tokens that do not fit.
    """
    check_type("inputs", inputs, Mapping, "a mapping of named arguments")
    recorder = Record(layers=layers, rows="all", calls=1)
    with attach(model, *interventions, recorder, part=part) as session:
        model(**inputs)
        return from_record(recorder, session.sites, inputs, tokens, keys, name, overlays, sample)


def from_record(
    recorder: Record,
    sites: Sequence[Any],
    inputs: Mapping[str, Any],
    tokens: Any = None,
    keys: Any = None,
    name: str = "run",
    overlays: Mapping[str, Tensor] | None = None,
    sample: int = 0,
) -> Run:
    """A run of what :class:`attnlib.look.Record` kept of all rows; see :func:`read`."""
    results = recorder.results()
    found: list[LayerMaps] = []
    sizes: dict[str, int] = {}
    for site in sites:
        label = site.layer if site.layer in results else f"{site.layer} {site.kind}"
        entry = results.get(label)
        if not entry or not entry["weights"]:
            continue
        weights = entry["weights"][-1]
        check_int("sample", sample, least=0, most=len(weights) - 1)
        maps = weights[sample].detach().float().cpu()
        asked = "tokens" if site.kind != "cross" else "keys"
        for axis, size in (("tokens", maps.shape[1]), (asked, maps.shape[2])):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"layer {site.layer} ({site.name}) has {size} {axis}, others {sizes[axis]}; one page shows layers "
                    "that read the same tokens: choose them with layers="
                )
        found.append(LayerMaps(str(site.layer), maps, site.kind, min(site.kv_heads, len(maps)), "tokens", asked))
    if not found:
        raise ValueError(f"no layer of the model gave maps; sites are {list(sites)[:3]}")
    ids = {"tokens": ("decoder_input_ids", "input_ids"), "keys": ("input_ids",)}
    axes = {}
    for axis, size in sizes.items():
        given = tokens if axis == "tokens" else keys
        known = next((inputs[n][sample].tolist() for n in ids[axis] if isinstance(inputs.get(n), Tensor)), None)
        axes[axis] = _axis(given, known, size, axis)
    return Run(name, found, axes, overlays or {})


def _axis(given: Any, ids: list[int] | None, size: int, what: str) -> Axis:
    if given is None:
        return Axis([str(i if ids is None or len(ids) != size else ids[i]) for i in range(size)])
    if isinstance(given, Axis):
        return given
    if isinstance(given, (list, tuple)):
        return Axis(list(given))
    if ids is None or len(ids) != size:
        raise ValueError(f"{what}: a tokenizer is given, but no input_ids for the {size} tokens; give their texts")
    return text_axis(given, ids)


class Page:
    """The page of some runs; ``str(page)`` is the HTML, and a notebook shows it.

    Args:
        runs: one or several.
        title: of the page; the runs' names by default.
        differences: show the difference of each further run to the first, where their models are alike.
        whole: keys up to which every weight is in the page.
        top: beyond that, keys that are kept of every row.
        limit: bytes of the page.

    Raises:
        ValueError: a page over its size limit; two runs with ``differences=True`` whose models are unlike.
    """

    def __init__(
        self,
        runs: Run | Sequence[Run],
        title: str | None = None,
        *,
        differences: bool = True,
        whole: int = WHOLE,
        top: int = 32,
        limit: int = 64_000_000,
    ):
        several = check_runs(runs)
        check_flag("differences", differences)
        for name, value in (("whole", whole), ("top", top), ("limit", limit)):
            check_int(name, value, least=1)
        self.runs = several + [difference(several[0], other) for other in several[1:] if differences]
        self.title = title or " · ".join(run.name for run in several)
        self.whole, self.top, self.limit = whole, top, limit

    def __str__(self) -> str:
        chunks: list[str] = []
        size = 0

        def keep(text: str) -> int:
            nonlocal size
            size += len(text)
            if size > self.limit:
                raise ValueError(
                    f"the page is over its size limit of {self.limit:,} bytes; give fewer layers, a smaller top= "
                    f"(now {self.top}) or whole= (now {self.whole}), or a larger limit="
                )
            chunks.append(text)
            return len(chunks) - 1

        views = [self._view(run, keep) for run in self.runs]
        text = _fill(self.title, {"title": self.title, "views": views}, chunks)
        if len(text.encode()) > self.limit:
            keep(text)
        return text

    def _view(self, run: Run, keep: Callable[[str], int]) -> dict[str, Any]:
        axes = {}
        for name, axis in run.axes.items():
            shown: dict[str, Any] = {
                "labels": axis.labels, "words": axis.words, "texts": axis.texts, "picture": None,
                "parts": [{"name": p.name, "start": p.start, "stop": p.stop, "grid": p.grid} for p in axis.parts],
            }  # fmt: skip
            if axis.picture is not None:
                pixels = (axis.picture.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
                shown["picture"] = {"chunk": keep(pack(pixels.permute(1, 2, 0))), "size": list(pixels.shape[1:])}
            axes[name] = shown
        layers, numbers, small, first = [], [], [], []
        for layer in run.layers:
            weights = layer.weights.detach().float().cpu()
            signed = run.signed or bool((weights < 0).any())
            before = run.axes[layer.keys].grid
            prefix = len(run.axes[layer.keys]) - (before.stop - before.start) if before else 0
            sparse = weights.shape[-1] > self.whole + prefix
            text, how = layer_bytes(weights, signed, self.top if sparse else None)
            n, m = weights.shape[1:]
            small.append(thumbs(weights, signed).flatten())
            hidden = weights.clone()
            hidden[..., 0] = 0
            first.append(thumbs(hidden, signed).flatten())
            layers.append(
                {"label": layer.label, "kind": layer.kind, "heads": len(weights), "kv": layer.kv_heads, "n": n, "m": m,
                 "q": layer.queries, "k": layer.keys, "chunk": keep(text), "signed": signed, **how}
            )  # fmt: skip
            numbers.append(layer.numbers or head_numbers(weights))
        stats = [
            {"name": name, "help": NUMBERS[name], "signed": run.signed and name != "change",
             "values": [_plain(n[name]) for n in numbers]}
            for name in NUMBERS if all(name in n for n in numbers)
        ]  # fmt: skip
        overlays = []
        for one in run.laid():
            if one["on"] == "heads":
                values = [_plain(row[: la["heads"]]) for row, la in zip(one["values"], layers, strict=True)]
                stats.append({"name": one["name"], "help": "given per head", "signed": True, "values": values})
            else:
                overlays.append({"name": one["name"], "on": one["on"], "axis": one["axis"],
                                 "values": _plain(one["values"])})  # fmt: skip
        return {
            "name": run.name, "signed": run.signed, "axes": axes, "layers": layers, "stats": stats,
            "overlays": overlays, "thumbs": keep(pack(*small, *first)),
        }  # fmt: skip

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all."""
        path = writable(path)
        text = str(self)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _repr_html_(self) -> str:
        inside = html.escape(str(self), quote=True)
        return (
            f'<iframe title="{html.escape(self.title, quote=True)}" sandbox="allow-scripts allow-downloads" '
            f'width="100%" height="820" style="border:0" srcdoc="{inside}"></iframe>'
        )


def _in_notebook(run: Run) -> str:
    return Page([run])._repr_html_()


# A run knows nothing of pages, yet a notebook that shows it asks the run itself.
Run._repr_html_ = _in_notebook  # type: ignore[attr-defined]


def page(runs: Run | Sequence[Run], path: str | Path, **settings: Any) -> Path:
    """One self-contained page of runs; it asks for nothing, wherever it is opened.

    Args:
        runs: what :func:`attnlib.look.read` gave, one or several; of several, differences to the first are shown too.
        path: of the ``.html`` file.
        **settings: of :class:`attnlib.look.viewer.Page`: ``title``, ``differences``, ``whole``, ``top``, ``limit``.

    Returns:
        The path.

    Raises:
        ValueError: a page over its size limit, a difference of unlike models.
    """
    return Page(runs, **settings).write(path)


def _plain(values: Tensor) -> Any:
    def rounded(v: Any) -> Any:
        if isinstance(v, list):
            return [rounded(x) for x in v]
        return float(f"{v:.7g}") if math.isfinite(v) else None

    return rounded(values.tolist())


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _fill(title: str, manifest: dict[str, Any], chunks: list[str]) -> str:
    """The template with everything in it; only its own style and script may run, and nothing may be asked for."""
    place = resources.files("attnlib.look") / "templates"
    style, script, frame = (
        (place / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )  # fmt: skip
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'; " \
             "form-action 'none'"  # fmt: skip
    # In a script element only these could end it or change how it is read.
    data = json.dumps(manifest, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    data = data.replace(">", "\\u003e").replace("&", "\\u0026")
    stored = "\n".join(f'<script type="application/x-attnlib" id="chunk{i}">{c}</script>' for i, c in enumerate(chunks))
    filled = {"policy": policy, "title": html.escape(title), "style": style, "manifest": data, "script": script,
              "chunks": stored}  # fmt: skip
    pieces = frame.split("@@")
    return "".join(filled[piece] if i % 2 else piece for i, piece in enumerate(pieces))
