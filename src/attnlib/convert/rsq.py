"""RSQ: rotate, scale, quantize; weights are rounded so that important tokens lose least (Sung et al., 2025).

Layer by layer, GPTQ's second moments of the inputs are summed over calibration tokens, each with a weight ``r_j``: how
much attention token j receives in this layer (``"attncon"``), or one of :data:`WEIGHTINGS`. Inputs come through the
layers that are quantized already; importance is that of the layer before it is. ::

    from attnlib.convert.rotation import rotate
    from attnlib.convert.rsq import Weighting, quantize

    rotate(model)
    quantize(model, tokens, bits=3, weighting=Weighting("attncon", low=0.005, high=1))
    model.save_pretrained(folder)  # an ordinary checkpoint; weights take few values

Reference: arXiv 2503.01820. Differs from the authors' code: rotations inside the MLP and across heads, which act while
the model runs, are left out (:mod:`attnlib.convert.rotation`); embeddings keep their mean, which RMS norms see; maps
are summed up in blocks of rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_int, check_rank, check_real, check_type, check_whole, to_list
from ..hooks import Intervention, attach
from ..hooks.site import Site
from .lattice import E8P, ldlq
from .quantize import Grid, Moments, gptq
from .rotation import llama_layers

#: What a token's weight is made of.
WEIGHTINGS = ("attncon", "actnorm", "actdiff", "tokenfreq", "tokensim", "cluster", "dot", "chunks", "uniform")
#: Raw numbers of these count backwards, as released.
_REVERSED = ("actdiff", "tokenfreq")
#: Maps that share inputs, in the order in which they are quantized.
_ORDER = (("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), ("self_attn.o_proj",),
          ("mlp.up_proj", "mlp.gate_proj"), ("mlp.down_proj",))  # fmt: skip


@dataclass(frozen=True)
class Weighting:
    """Weights of tokens.

    Args:
        kind: ``"attncon"``: attention received, summed over heads and queries; ``"actnorm"``: norm of the layer's
            input; ``"actdiff"``: how far the layer moves it; ``"tokenfreq"``: how often the token occurs in the
            calibration data; ``"tokensim"``: mean squared distance to the other inputs; ``"cluster"``: squared
            distance to the nearest of ``clusters`` centres; ``"dot"``: product with the sum of all inputs;
            ``"chunks"``: 1 in some parts of the sequence and 0 elsewhere; ``"uniform"``: GPTQ.
        low, high: least and largest weight, between which numbers are spread evenly. The release searches ``low``
            among 0.1, 0.05, 0.02, 0.01 and 0.005 per model.
        per_reader: first divide by how many tokens can read each: ``"linear"``, by the root of that: ``"sqrt"``.
        scale: ``"square"`` or ``"sqrt"`` of the raw numbers.
        reverse: count backwards; by default ``"actdiff"`` and ``"tokenfreq"`` do.
        of: ``"input"`` or ``"output"`` of the layer, for ``"actnorm"``, ``"tokensim"``, ``"cluster"`` and ``"dot"``.
        quantile: spread between this quantile and its opposite, cut off beyond; for ``"attncon"``.
        mask_least: this share of the tokens, the least important ones, weighs nothing, all others 1.
        drop_least: this share weighs nothing, the others keep their weights; for ``"attncon"``, ``"actnorm"`` and
            ``"cluster"``.
        bins: equally full classes of one weight each.
        spread: ``False`` leaves numbers as they are, without ``low`` and ``high``.
        clusters: of a sequence, at most its tokens: 30 rounds of Lloyd's algorithm, which starts from the first ones.
        chunks: ``(parts, of)`` for ``"chunks"``, such as ``((0,), 8)``: the first eighth.
    """

    kind: str = "attncon"
    low: float = 0.005
    high: float = 1.0
    per_reader: str | None = None
    scale: str | None = None
    reverse: bool | None = None
    of: str = "input"
    quantile: float | None = None
    mask_least: float | None = None
    drop_least: float | None = None
    bins: int | None = None
    spread: bool = True
    clusters: int = 100
    chunks: tuple[tuple[int, ...], int] = ((0,), 8)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, WEIGHTINGS)
        check_choice("per_reader", self.per_reader, (None, "linear", "sqrt"))
        check_choice("scale", self.scale, (None, "square", "sqrt"))
        check_choice("of", self.of, ("input", "output"))
        check_real("low", self.low, least=0)
        check_real("high", self.high, least=self.low, above=0)
        check_flag("spread", self.spread)
        for name in ("quantile", "mask_least", "drop_least"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name), least=0, most=1)
        if self.bins is not None:
            check_int("bins", self.bins, least=2)
        check_int("clusters", self.clusters, least=1)
        if sum(x is not None for x in (self.mask_least, self.drop_least, self.bins)) > 1:
            raise ValueError("mask_least, drop_least and bins exclude each other")
        if not isinstance(self.chunks, tuple) or len(self.chunks) != 2:
            raise TypeError(f"chunks must be (parts, of), such as ((0,), 8), got {self.chunks!r}")
        parts, total = to_list("chunks[0]", self.chunks[0]) or [], self.chunks[1]
        check_int("chunks", total, least=1)
        if not parts or any(not 0 <= part < total for part in parts):
            raise ValueError(f"chunks={self.chunks}: parts must be among the {total}")

    def __call__(
        self, *, received: Tensor | None = None, before: Tensor | None = None, after: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """(N,) weights of one sequence, ``None`` for ``"uniform"``.

        Args:
            received: (N,) attention each token receives, summed over heads and queries.
            before, after: (N, D) input and output of the layer.
            counts: (N,) how often each token occurs.
        """
        if self.kind == "uniform":
            return None
        if self.kind == "chunks":
            return self._parts(len(_given(before, "before")), _given(before, "before").device)
        raw = self._raw(received, before, after, counts).float()
        if self.scale is not None:
            raw = raw.square() if self.scale == "square" else raw.sqrt()
        if self.kind in _REVERSED if self.reverse is None else self.reverse:
            raw = -raw
        if self.per_reader is not None:
            readers = torch.arange(len(raw), 0, -1, device=raw.device).float()
            raw = raw / (readers if self.per_reader == "linear" else readers.sqrt())
        weights = self._spread(raw) if self.spread else raw
        least = lambda share: weights.topk(int(len(weights) * share), largest=False).indices  # noqa: E731
        if self.mask_least is not None:
            return torch.ones_like(weights).index_fill_(0, least(self.mask_least), 0)
        if self.drop_least is not None:
            return weights.index_fill(0, least(self.drop_least), 0)
        return weights if self.bins is None else self._binned(weights, self.bins)

    def _raw(self, received: Any, before: Any, after: Any, counts: Any) -> Tensor:
        if self.kind == "attncon":
            return _given(received, "received")
        if self.kind == "tokenfreq":
            return _given(counts, "counts")
        if self.kind == "actdiff":
            return (_given(before, "before").float() - _given(after, "after").float()).norm(dim=-1)
        x = (_given(before, "before") if self.of == "input" else _given(after, "after")).float()
        if self.kind == "actnorm":
            return x.norm(dim=-1)
        if self.kind == "dot":
            return x @ x.sum(0)
        if self.kind == "cluster":
            return _to_centres(x, self.clusters)
        square = x.square().sum(-1)  # the mean of |x_j - x_i|^2 over i, without the table of pairs
        return square - 2 * (x @ x.mean(0)) + square.mean()

    def _spread(self, raw: Tensor) -> Tensor:
        low, high = raw.min(), raw.max()
        if self.quantile is not None:
            ends = sorted((1 - self.quantile, self.quantile))
            low, high = raw.quantile(torch.tensor(ends, device=raw.device))
        if not bool(high > low):
            return torch.ones_like(raw)  # all tokens are alike
        return ((raw - low) / (high - low) * (self.high - self.low) + self.low).clamp(self.low, self.high)

    def _binned(self, weights: Tensor, bins: int) -> Tensor:
        ends = weights.quantile(torch.linspace(0, 1, bins + 1, device=weights.device)[1:-1])
        values = torch.linspace(self.low, self.high, bins, device=weights.device)
        return values[torch.searchsorted(ends.contiguous(), weights.contiguous())]

    def _parts(self, length: int, device: torch.device) -> Tensor:
        parts, total = self.chunks
        each = length // total
        if not each:
            raise ValueError(f"chunks={self.chunks}: a sequence of {length} tokens has no {total} parts")
        weights = torch.zeros(length, device=device)
        for part in parts:
            weights[part * each : (part + 1) * each] = 1
        return weights


def _to_centres(x: Tensor, count: int) -> Tensor:
    """(N,) squared distance of (N, D) points to the nearest centre; a centre that no point has falls to zero."""
    if count > len(x):
        raise ValueError(f"clusters={count}: a sequence of {len(x)} tokens has fewer")
    square = x.square().sum(-1)
    centres = x[:count]

    def distances() -> Tensor:
        return torch.addmm(centres.square().sum(-1) + square[:, None], x, centres.mT, alpha=-2)

    for _ in range(30):
        which = distances().argmin(1)
        sizes = torch.bincount(which, minlength=count).to(x)
        centres = torch.zeros_like(centres).index_add_(0, which, x) / (sizes[:, None] + 1e-8)
    return distances().amin(1)


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this kind of weighting needs {name}")
    return value


class _Received(Intervention):
    """Attention that every token receives, summed over heads and queries, in blocks of rows."""

    name = "received-attention"

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        got = weights[0].float().sum((0, 1))
        self.total = got if self.total is None else self.total + got
        return weights


class _Enough(Exception):
    pass


def _first_inputs(model: Any, layer: Any, samples: Sequence[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first layer is called with, sample by sample."""
    states: list[Tensor] = []
    named: list[dict[str, Any]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = dict(kwargs)
        states.append(args[0] if args else call.pop("hidden_states"))
        named.append(call)
        raise _Enough

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for sample in samples:
            try:
                model(sample[None], use_cache=False)
            except _Enough:
                continue
    finally:
        handle.remove()
    return states, named


def _run(layer: Any, state: Tensor, call: dict[str, Any]) -> Tensor:
    """The stream behind a layer."""
    out = layer(state, **call)
    return out[0] if isinstance(out, tuple) else out


def _moments(
    layer: Any, names: Sequence[str], states: Sequence[Tensor], named: Sequence[dict[str, Any]],
    weights: Sequence[Tensor | None], power: float,
) -> dict[str, Moments]:  # fmt: skip
    """Of the inputs of some maps of a layer, over all samples."""
    found = {name: Moments(layer.get_submodule(name).in_features, power) for name in names}
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0])
        )
        for name in names
    ]
    try:
        for state, call, weight in zip(states, named, weights, strict=True):
            _run(layer, state, call)
            for name in names:
                found[name].add(inputs.pop(name), weight)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` made.

    Args:
        errors: by name of a map, ``sum |(W - Q) x|^2 / sum |W x|^2`` over the weighted calibration inputs.
        bits: of a weight.
    """

    errors: dict[str, float]
    bits: int

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        mean = sum(self.errors.values()) / len(self.errors)
        parts = f"error {mean:.2%} on average, {self.errors[worst]:.2%} in {worst}"
        return f"{len(self.errors)} maps at {self.bits} bits; {parts}"


def expand(tokens: Tensor, times: int) -> Tensor:
    """(times S, N): every sequence also rolled by 1, 2, ... ``times``-ths of its length, so that every token stands
    once where much attention goes.

    >>> expand(torch.tensor([[1, 2, 3, 4]]), 2).tolist()
    [[1, 2, 3, 4], [3, 4, 1, 2]]
    """
    check_rank("tokens", tokens, 2, "(S, N)")
    step = tokens.shape[1] // check_int("times", times, least=1, most=max(tokens.shape[1], 1))
    return torch.stack([tokens.roll(step * i, 1) for i in range(times)], 1).flatten(0, 1)


def _relative(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    w, e = weight.to(moments), (weight - rounded).to(moments)
    whole = float(((w @ moments) * w).sum())
    return float(((e @ moments) * e).sum()) / whole if whole else 0.0


@torch.no_grad()
def quantize(
    model: Any,
    tokens: Tensor,
    bits: int = 3,
    weighting: Weighting | str = "attncon",
    *,
    grid: Grid | E8P | None = None,
    power: float = 0.5,
    method: str = "gptq",
    damp: float = 0.01,
    group: int | None = None,
    order: str = "given",
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Put the maps of all layers of a Llama-shaped model of transformers on a grid, in place.

    Args:
        model: see :func:`attnlib.convert.rotation.llama_layers`, in evaluation mode.
        tokens: (S, N) calibration sequences, at least one of two tokens; :func:`expand` makes more of them.
        bits: of a weight, from 2.
        weighting: of tokens, or the name of its kind.
        grid: other settings than ``Grid(bits, clip=True)``, which has a step per row, clipped; or
            :class:`attnlib.convert.lattice.E8P`, of 2 bits, whose columns in eights make up for each other.
        power: of a weight on the inputs, see :class:`attnlib.convert.quantize.Moments`.
        method: ``"gptq"``, or ``"nearest"``: each weight by itself, without the data.
        damp, group, order: of :func:`attnlib.convert.quantize.gptq`.
        resume: a folder; layers that are done are kept there and read again.
        progress: called with the number of layers that are done, and of all.

    Raises:
        ValueError: another architecture, too few tokens, bits below 2, a folder of other settings.
    """
    layers = llama_layers(model)
    check_choice("method", method, ("gptq", "nearest"))
    weighting = Weighting(weighting) if isinstance(weighting, str) else weighting
    check_int("bits", bits, least=2, most=8)
    grid = Grid(bits, clip=True) if grid is None else grid
    check_type("grid", grid, (Grid, E8P))
    if isinstance(grid, E8P):
        if group is not None or order != "given":
            raise ValueError(f"grid=E8P() has no group and no order, got group={group} and order={order!r}")
        for i, layer in enumerate(layers):
            for name in (n for names in _ORDER for n in names):
                grid.check(layer.get_submodule(name).weight, f"layer {i}'s {name}")
    check_rank("tokens", tokens, 2, "(S, N)")
    check_whole("tokens", tokens)
    if not len(tokens) or tokens.shape[1] < 2:
        raise ValueError(f"tokens must hold at least one sequence of two tokens, got {tuple(tokens.shape)}")
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    device, tokens = model.get_input_embeddings().weight.device, tokens.long()  # short ones would be masks
    samples = list(tokens.to(device))
    counts = torch.bincount(tokens.flatten())[tokens].to(device)
    states, named = _first_inputs(model, layers[0], samples)
    folder = None if resume is None else _folder(
        Path(resume), tokens, asdict(weighting), asdict(grid), power, method, damp, group, order
    )  # fmt: skip
    errors: dict[str, float] = {}
    received = _Received()
    with attach(model, received) if weighting.kind == "attncon" else nullcontext():
        for i, layer in enumerate(layers):
            kept = None if folder is None else folder / f"layer_{i:03d}.safetensors"
            if kept is not None and kept.exists():
                _read(layer, kept, errors, i)
            else:
                weights: list[Tensor | None] = []
                for state, call, count in zip(states, named, counts, strict=True):
                    received.total = None
                    after = _run(layer, state, call)[0]
                    weights.append(weighting(received=received.total, before=state[0], after=after, counts=count))
                for names in _ORDER:
                    moments = _moments(layer, names, states, named, weights, power)
                    for name in names:
                        weight, h = layer.get_submodule(name).weight, moments[name].value
                        if method == "nearest":
                            rounded = grid(weight.float()).to(weight.dtype)
                        elif isinstance(grid, E8P):
                            rounded = ldlq(weight, h, grid, damp=damp)
                        else:
                            rounded = gptq(weight, h, grid, damp=damp, group=group, order=order)
                        errors[f"model.layers.{i}.{name}"] = _relative(weight, rounded, h)
                        weight.copy_(rounded)
                if kept is not None:
                    _keep(layer, kept, errors, i)
            states = [_run(layer, state, call) for state, call in zip(states, named, strict=True)]
            if progress is not None:
                progress(i + 1, len(layers))
    return Quantized(errors, grid.bits)


def _folder(folder: Path, tokens: Tensor, *settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
    said = json.loads(json.dumps([digest, *settings]))
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != said:
        raise ValueError(f"resume={folder} holds layers that were quantized with other settings or tokens")
    note.write_text(json.dumps(said) + "\n", encoding="utf-8")
    return folder


def _keep(layer: Any, path: Path, errors: dict[str, float], i: int) -> None:
    start = f"model.layers.{i}."
    held = {name: layer.get_submodule(name).weight.contiguous() for names in _ORDER for name in names}
    told = {name.removeprefix(start): repr(e) for name, e in errors.items() if name.startswith(start)}
    part = path.with_suffix(".part")
    save_file(held, part, metadata=told)
    part.replace(path)


def _read(layer: Any, path: Path, errors: dict[str, float], i: int) -> None:
    for name, weight in load_file(path).items():
        layer.get_submodule(name).weight.copy_(weight)
    with safe_open(path, "pt") as f:
        errors.update({f"model.layers.{i}.{name}": float(e) for name, e in f.metadata().items()})


__all__ = ["WEIGHTINGS", "Quantized", "Weighting", "expand", "quantize"]
