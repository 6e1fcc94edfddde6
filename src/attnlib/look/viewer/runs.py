"""What a model read, as maps over named tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_tensor, check_type, describe
from ...hooks.site import KINDS


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of one sort.

    Args:
        name: as it is shown.
        start, stop: the tokens.
        grid: (rows, columns) where they are patches of a picture; ``None`` for text.
    """

    name: str
    start: int
    stop: int
    grid: tuple[int, int] | None = None


@dataclass
class Axis:
    """Tokens that ask or answer.

    Args:
        labels: a text per token.
        words: number of the word that each token is a piece of; ``None`` where every token stands alone.
        parts: sorts of tokens, in order; one of text by default.
        picture: (3, H, W) in [0, 1] under the tokens of a grid.
        texts: of each word, where it is more than its pieces beside each other.
    """

    labels: list[str]
    words: list[int] | None = None
    parts: tuple[Part, ...] = ()
    picture: Tensor | None = None
    texts: list[str] | None = None

    def __post_init__(self) -> None:
        check_type("labels", self.labels, (list, tuple), "a list of texts")
        self.labels = [str(text) for text in self.labels]
        count = len(self.labels)
        if self.words is not None and len(self.words) != count:
            raise ValueError(f"words must name the word of each of the {count} tokens, got {len(self.words)} numbers")
        if self.texts is not None and (self.words is None or len(self.texts) != max(self.words, default=-1) + 1):
            raise ValueError(f"texts must have one text per word, got {len(self.texts)}")
        self.parts = tuple(self.parts) or (Part("text", 0, count),)
        if [p.start for p in self.parts] != [0, *(p.stop for p in self.parts[:-1])] or self.parts[-1].stop != count:
            raise ValueError(f"parts must cover the {count} tokens in order, got {self.parts}")
        for part in self.parts:
            if part.grid is not None and part.grid[0] * part.grid[1] != part.stop - part.start:
                raise ValueError(f"part {part.name!r} has {part.stop - part.start} tokens, but grid={part.grid}")
        if self.picture is not None:
            check_tensor("picture", self.picture)
            if self.picture.dim() != 3 or len(self.picture) != 3 or not self.picture.numel():
                raise ValueError(f"picture must be (3, H, W), got {tuple(self.picture.shape)}")
            if self.grid is None:
                raise ValueError("picture is given, but no part of the axis is a grid of patches")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def grid(self) -> Part | None:
        """The part that is a picture."""
        return next((p for p in self.parts if p.grid is not None), None)


@dataclass
class LayerMaps:
    """The heads of one attention.

    Args:
        label: of the layer, as it is shown.
        weights: (heads, N, M).
        kind: ``"self"``, ``"cross"`` or ``"joint"``.
        kv_heads: heads of keys and values; as many as there are heads by default.
        queries, keys: names of the run's axes.
        numbers: per head, shown instead of those of ``weights``; a difference brings its own.
    """

    label: str
    weights: Tensor
    kind: str = "self"
    kv_heads: int | None = None
    queries: str = "tokens"
    keys: str = "tokens"
    numbers: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        check_tensor("weights", self.weights)
        if self.weights.dim() != 3 or 0 in self.weights.shape:
            raise ValueError(f"weights of layer {self.label} must be (heads, N, M), got {tuple(self.weights.shape)}")
        if not bool(torch.isfinite(self.weights).all()):
            raise ValueError(f"weights of layer {self.label} hold values that are not finite")
        check_choice("kind", self.kind, KINDS)
        heads = len(self.weights)
        self.kv_heads = heads if self.kv_heads is None else check_int("kv_heads", self.kv_heads, least=1)
        if heads % self.kv_heads:
            raise ValueError(f"layer {self.label}: {heads} heads cannot share {self.kv_heads} kv_heads evenly")


@dataclass
class Run:
    """What one model read once, to be shown by :func:`attnlib.look.page`; a notebook shows it by itself.

    Args:
        name: as it is shown.
        layers: their maps.
        axes: the tokens; a list of texts stands for text.
        overlays: by name, a tensor to lay over the tokens (tokens,), over the patches (rows, columns), over the picture
            (H, W), over every head's tokens (layers, heads, tokens), or one number per head (layers, heads).
        signed: the maps are differences.

    Raises:
        ValueError: maps that do not fit the tokens, an overlay that fits nothing.

    >>> run = Run("mine", [LayerMaps("0", torch.eye(2)[None])], {"tokens": ["a", "b"]})
    >>> len(run.axes["tokens"])
    2
    """

    name: str
    layers: list[LayerMaps]
    axes: Mapping[str, Any]
    overlays: Mapping[str, Tensor] = field(default_factory=dict)
    signed: bool = False

    def __post_init__(self) -> None:
        self.axes = {n: a if isinstance(a, Axis) else Axis(a) for n, a in dict(self.axes).items()}
        if not self.layers:
            raise ValueError(f"run {self.name!r} has no layer with maps")
        for layer in self.layers:
            for what, axis, size in (
                ("queries", layer.queries, layer.weights.shape[1]),
                ("keys", layer.keys, layer.weights.shape[2]),
            ):
                check_choice(what, axis, tuple(self.axes))
                if len(self.axes[axis]) != size:
                    count = len(self.axes[axis])
                    raise ValueError(f"layer {layer.label} has {size} {what}, but the axis {axis!r} has {count} tokens")
        self.overlays = dict(self.overlays)
        self.laid()

    def laid(self) -> list[dict[str, Any]]:
        """The overlays and what they lie on: name, on (``"heads"``, ``"tokens"``, ``"head tokens"``), axis, values."""
        return [self._laid(name, values) for name, values in self.overlays.items()]

    def _laid(self, name: str, values: Any) -> dict[str, Any]:
        check_tensor(f"overlay {name!r}", values)
        values = values.detach().cpu().double()
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"overlay {name!r} holds values that are not finite")
        heads = max(len(layer.weights) for layer in self.layers)
        shape = tuple(values.shape)
        if shape == (len(self.layers), heads):
            return {"name": name, "on": "heads", "axis": None, "values": values}
        possible = [f"(layers, heads) = {(len(self.layers), heads)}"]
        for key, axis in self.axes.items():
            part = axis.grid
            if shape == (len(axis),):
                return {"name": name, "on": "tokens", "axis": key, "values": values}
            if shape == (len(self.layers), heads, len(axis)):
                return {"name": name, "on": "head tokens", "axis": key, "values": values}
            possible += [f"tokens {(len(axis),)}", f"all heads' tokens {(len(self.layers), heads, len(axis))}"]
            if part is None:
                continue
            patches = None
            if shape == part.grid:
                patches = values
            elif axis.picture is not None and shape == tuple(axis.picture.shape[1:]):
                patches = torch.nn.functional.adaptive_avg_pool2d(values[None], part.grid)[0]
            if patches is not None:
                flat = values.new_zeros(len(axis))
                flat[part.start : part.stop] = patches.flatten()
                return {"name": name, "on": "tokens", "axis": key, "values": flat}
            possible.append(f"patches {part.grid}")
        raise ValueError(f"overlay {name!r} has shape {shape}, which fits nothing; possible: {', '.join(possible)}")

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Keep the run, exactly, in a ``.safetensors`` file."""
        from safetensors.torch import save_file

        if self.signed:
            raise ValueError("a difference is not kept; keep the two runs that it is of")
        path = writable(path)
        tensors = {f"layer.{i}": layer.weights.detach().cpu().contiguous() for i, layer in enumerate(self.layers)}
        tensors |= {f"overlay.{name}": v.detach().cpu().contiguous() for name, v in self.overlays.items()}
        axes = {}
        for name, axis in self.axes.items():
            if axis.picture is not None:
                tensors[f"picture.{name}"] = axis.picture.detach().cpu().contiguous()
            axes[name] = {
                "labels": axis.labels, "words": axis.words, "texts": axis.texts,
                "parts": [[p.name, p.start, p.stop, p.grid] for p in axis.parts],
            }  # fmt: skip
        layers = [[la.label, la.kind, la.kv_heads, la.queries, la.keys] for la in self.layers]
        about = {"name": self.name, "layers": layers, "axes": axes, "overlays": list(self.overlays)}
        save_file(tensors, str(path), metadata={"attnlib.run": json.dumps(about)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """The run that :meth:`save` kept.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file that holds no run.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no run {str(path)!r}; Run.save, or attnlib look --save, keeps one")
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("attnlib.run", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no run that was kept: {error}") from error
        if about is None:
            raise ValueError(f"{str(path)!r} holds tensors, but no run that Run.save kept")
        axes = {
            name: Axis(
                a["labels"], a["words"],
                tuple(Part(n, i, j, None if g is None else (g[0], g[1])) for n, i, j, g in a["parts"]),
                tensors.get(f"picture.{name}"), a["texts"],
            )
            for name, a in about["axes"].items()
        }  # fmt: skip
        layers = [
            LayerMaps(label, tensors[f"layer.{i}"], kind, kv, queries, keys)
            for i, (label, kind, kv, queries, keys) in enumerate(about["layers"])
        ]
        return cls(about["name"], layers, axes, {name: tensors[f"overlay.{name}"] for name in about["overlays"]})


def writable(path: str | Path) -> Path:
    """``path``, or ``FileNotFoundError`` where its folder does not exist."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
    return path


def check_runs(runs: Any) -> list[Run]:
    """One run or several, as a list."""
    several: Sequence[Any] = [runs] if isinstance(runs, Run) else runs
    if not isinstance(several, (list, tuple)) or not several or not all(isinstance(r, Run) for r in several):
        raise TypeError(f"runs must be a Run or a list of them, as attnlib.look.read gives, got {describe(runs)}")
    return list(several)
