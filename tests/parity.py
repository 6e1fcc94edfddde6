"""Recorded runs of the authors' classes, and how to hold a mechanism to them.

A fixture ``fixtures/<slug>.safetensors`` holds per case ``<case>/sd/<name>`` (their state dict), ``x/<input>``, ``y``,
``g`` (the gradient of y), ``dx/<input>`` and ``dw/<name>``; its metadata names repository, commit, class, seed and our
settings per case. ``fixtures/options/<slug>.safetensors`` holds runs with options off their defaults in the same form,
inputs in our layout and named as the arguments of the call.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

import attnlib
from attnlib.grids import Layout

HERE = Path(__file__).parent / "fixtures"


class Fixture:
    folder = HERE

    def __init__(self, slug: str, **options):
        """``options`` go to ``convert_state_dict``; a callable gets the settings of the case."""
        self.slug, self.options = slug, options
        with safe_open(self.folder / f"{slug}.safetensors", "pt") as f:
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            self.meta = f.metadata()
        self.config = json.loads(self.meta.get("config", "{}"))  # recordings of a test of their own have none

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors below ``prefix/``, without it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + "/")}

    def _convert(self, case: str, what: str) -> dict[str, torch.Tensor]:
        options = {k: v(self.config[case]) if callable(v) else v for k, v in self.options.items()}
        return attnlib.convert_state_dict(self.slug, self.under(f"{case}/{what}"), **options)

    def build(self, case: str, **changes):
        """Our module with the authors' weights, loaded strictly."""
        module = attnlib.create(self.slug, **{**self.config[case], **changes})
        module.load_state_dict(self._convert(case, "sd"))
        return module

    @staticmethod
    def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str, least: float = 0.0) -> None:
        """Largest difference within ``tolerance`` of the largest entry, or of ``least`` when that is larger."""
        assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
        scale = max(float(theirs.abs().max()), least) or 1.0
        error = float((ours.double() - theirs.double()).abs().max()) / scale
        assert error <= tolerance, f"{what}: differs by {error:.2e} of its scale"

    def holds(self, case: str, module, call, atol: float = 1e-5) -> None:
        """Output, input gradients and weight gradients equal the recording. ``call(module, inputs) -> y``.

        Where float32 is further off, by at most three times as much, rounding decided, which differs from machine to
        machine: then float64 has to be within ``atol``.
        """
        fresh = copy.deepcopy(module)
        try:
            self._holds(case, module, call, atol, torch.float32)
        except AssertionError:
            self._holds(case, copy.deepcopy(fresh), call, 3 * atol, torch.float32)
            self._holds(case, fresh.double(), call, atol, torch.float64)

    def _holds(self, case: str, module, call, atol: float, dtype: torch.dtype) -> None:
        given = self.under(f"{case}/x")
        inputs = {
            k: v.to(dtype, copy=True).requires_grad_() if v.is_floating_point() else v.clone() for k, v in given.items()
        }
        y = call(module, inputs)
        self._close(y.detach(), self.tensors[f"{case}/y"], atol, "y")
        (y * self.tensors[f"{case}/g"]).sum().backward()
        theirs = {f"dx/{name}": value for name, value in self.under(f"{case}/dx").items()}
        theirs |= {f"dw/{name}": value for name, value in self._convert(case, "dw").items()}
        ours = {f"dx/{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()}
        ours |= {f"dw/{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert any(name.startswith("dw/") for name in theirs), "no weight gradient to compare"
        # What is zero in exact arithmetic (a key bias under softmax) is rounding of larger numbers.
        least = 3e-2 * max(float(value.abs().max()) for value in theirs.values())
        for name, expected in theirs.items():
            self._close(ours[name], expected, atol, name, least)


def _layout(segments: list[list]) -> Layout:
    return Layout(tuple((name, tuple(size) if isinstance(size, list) else size) for name, size in segments))


class Options(Fixture):
    """Runs with options off their defaults; the metadata holds per case:

    ``settings`` of ours, ``convert`` (options of the converter), ``train`` (whether the module was training), ``class``
    (``module:name`` where it is not the registered one), ``layout`` of the tokens, and ``note``.
    """

    folder = HERE / "options"

    @classmethod
    def all(cls) -> list[tuple[str, str]]:
        """(slug, case) of every recorded run."""
        slugs = sorted(path.stem for path in cls.folder.glob("*.safetensors"))
        return [(slug, case) for slug in slugs for case in cls(slug).config]

    def convert(self, case: str, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = getattr(self._class(case), "convert_state_dict", None)
        options = self.config[case].get("convert", {})
        return own(theirs, **options) if own else attnlib.convert_state_dict(self.slug, theirs, **options)

    def _class(self, case: str):
        if "class" not in self.config[case]:
            return None
        module, name = self.config[case]["class"].split(":")
        return getattr(importlib.import_module(module), name)

    def _convert(self, case: str, what: str) -> dict[str, torch.Tensor]:
        return self.convert(case, self.under(f"{case}/{what}"))

    def create(self, case: str):
        """Our module as it starts."""
        config = self.config[case]
        settings = dict(config["settings"])
        for name in ("context_layout",):
            if name in settings:
                settings[name] = _layout(settings[name])
        cls = self._class(case)
        return cls(**settings) if cls else attnlib.create(self.slug, **settings)

    def call(self, case: str, module, inputs: dict[str, torch.Tensor]):
        """Our output for recorded inputs."""
        if "layout" in self.config[case]:
            return module(**inputs, layout=_layout(self.config[case]["layout"]))
        return module(**inputs)

    def build(self, case: str, **changes):
        module = self.create(case)
        module.load_state_dict(self._convert(case, "sd"))
        return module.train(self.config[case].get("train", False))


def synthetic(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights of a whole model from names and shapes alone, the same everywhere: waves that differ by name.

    Matrices and kernels are scaled by their fan-in, vectors lie near 1 where their name says norm and weight, near 0
    otherwise; running variances are positive. What ends in ``index`` or ``num_batches_tracked`` is whole zeros.
    """
    out = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        if name.endswith(("index", "num_batches_tracked")):
            out[name] = torch.zeros(shape, dtype=torch.long)
            continue
        seed = zlib.crc32(name.encode()) % 10007
        wave = torch.sin(torch.arange(count, dtype=torch.float64) * (1.0 + seed / 10007) + seed)
        wave = wave + 0.5 * torch.sin(torch.arange(count, dtype=torch.float64) * 0.7391 + 2.0 * seed)
        if name.endswith("running_var"):
            wave = 1.0 + 0.3 * wave
        elif len(shape) > 1:
            fan_in = math.prod(shape[1:])
            wave = wave * (1.5 / fan_in**0.5)
        elif "weight" in name or "gamma" in name:
            wave = 1.0 + 0.2 * wave
        else:
            wave = 0.2 * wave
        out[name] = wave.float().reshape(shape)
    return out


def by_name(key: str, shape: Sequence[int]) -> torch.Tensor:
    """Float64 numbers of a state dict by the name of an entry, for recordings that keep the shapes alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if key.endswith(("num_batches_tracked", "relative_position_index")):
        return torch.zeros((), dtype=torch.long)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) > 1:
        return made * (1.2 / made[0].numel()) ** 0.5
    return 1 + made.abs() * 0.3 if "var" in key else made * 0.1 + ("weight" in key)


class Models(Fixture):
    """Runs of the authors' whole models in ``fixtures/models/<slug>.safetensors``, with :func:`synthetic` weights.

    The metadata's ``config`` holds per case ``model`` (a name of ours), ``settings``, ``shapes`` (their state dict),
    and ``train``; tensors are ``<case>/x``, what our model is called with besides ``<case>/with/<name>``, ``<case>/y``,
    ``<case>/g``, ``<case>/dx`` and chosen ``<case>/dw/<name>``, maps of stages ``<case>/map/<i>`` (B, C, H, W), and
    after a pass in training chosen buffers ``<case>/after/<name>``.
    """

    folder = HERE / "models"

    @classmethod
    def all(cls) -> list[tuple[str, str]]:
        """(slug, case) of every recorded run."""
        slugs = sorted(path.stem for path in cls.folder.glob("*.safetensors"))
        # Recordings that a test of their own reads stand beside these, in forms of their own.
        whole = [(slug, case, how) for slug in slugs for case, how in cls(slug).config.items()]
        return [(slug, case) for slug, case, how in whole if isinstance(how, dict) and {"model", "shapes"} <= set(how)]

    def weights(self, case: str) -> dict[str, torch.Tensor]:
        """Their state dict."""
        return synthetic(self.config[case]["shapes"])

    def build_model(self, case: str, weights: dict[str, torch.Tensor] | None = None):
        from attnlib.models.build import load_pretrained

        config = self.config[case]
        module = attnlib.create_model(config["model"], **config["settings"])
        load_pretrained(module, self.weights(case) if weights is None else weights)
        return module.train(config.get("train", False))

    def model_holds(self, case: str, atol: float = 1e-5) -> None:
        """Output, maps, the gradient of the images, and the recorded gradients of weights and buffers.

        Recordings in float64 are held in float64, where no rounding decides, and their output in float32 too, to twice
        ``atol`` or to what rounding makes of this model. One in float32 that is further off than ``atol``, by at most
        three times as much, has to hold in float64.
        """
        if self.config[case].get("double", False):
            self._model_holds(case, atol, torch.float64)
            single, theirs = self._output(case, torch.float32), self.tensors[f"{case}/y"]
            try:
                self._close(single, theirs, 2 * atol, "y in float32")
            except AssertionError:
                plain, moved = (self._output(case, torch.float64, rounded) for rounded in (False, True))
                rounding = float((plain - moved).abs().max() / plain.abs().max())
                self._close(single, theirs, 3 * rounding, "y in float32")
            return
        try:
            self._model_holds(case, atol, torch.float32)
        except AssertionError:
            self._model_holds(case, 3 * atol, torch.float32)
            self._model_holds(case, atol, torch.float64)

    @torch.no_grad()
    def _output(self, case: str, dtype: torch.dtype, rounded: bool = False) -> torch.Tensor:
        module = self.build_model(case).to(dtype)
        if rounded:
            round_off(module)
        y = module(self.tensors[f"{case}/x"].to(dtype), **self.under(f"{case}/with"))
        return torch.cat(y, 1) if isinstance(y, tuple) else y  # two classifiers in training

    def _model_holds(self, case: str, atol: float, dtype: torch.dtype) -> None:
        module = self.build_model(case).to(dtype)
        x = self.tensors[f"{case}/x"].to(dtype, copy=True).requires_grad_()
        beside = self.under(f"{case}/with")
        y = module(x, **beside)
        y = torch.cat(y, 1) if isinstance(y, tuple) else y  # two classifiers in training
        self._close(y.detach(), self.tensors[f"{case}/y"], atol, "y")
        (y * self.tensors[f"{case}/g"]).sum().backward()
        self._close(x.grad, self.tensors[f"{case}/dx"], atol, "dx")
        grads = {name: p.grad for name, p in module.named_parameters()}
        assert self.under(f"{case}/dw"), "no weight gradient to compare"
        self._same(case, "dw", module, grads, atol)
        self._same(case, "after", module, dict(module.named_buffers()), atol)
        if maps := self.under(f"{case}/map"):
            with torch.no_grad():
                ours = self.build_model(case).to(dtype).forward_intermediates(x, intermediates_only=True)
            for i, expected in maps.items():
                self._close(ours[int(i)], expected, atol, f"map {i}")

    def _same(self, case: str, what: str, module, held: dict, atol: float) -> None:
        """What was recorded under ``what`` in their names equals what ``held`` has in ours."""
        theirs = self.under(f"{case}/{what}")
        if not theirs:
            return
        shapes = self.config[case]["shapes"]
        unknown = {k: torch.full(s, torch.nan) for k, s in shapes.items() if k not in theirs}
        converted = module.entry.convert({**unknown, **theirs}, module)
        largest = max(float(t.abs().max()) for t in theirs.values())
        compared = 0
        for name, expected in converted.items():
            known = ~expected.isnan()
            if name not in held or not known.any():
                continue
            compared += 1
            self._close(held[name][known], expected[known], atol, name, 3e-2 * largest)
        assert compared >= len(theirs), f"{len(theirs)} of {what} were recorded, {compared} compared"


def round_off(module: torch.nn.Module, seed: int = 0) -> None:
    """Move the weights of a float64 module, and what its innermost modules return, as rounding to float32 would."""
    generator = torch.Generator().manual_seed(seed)

    def moved(t: torch.Tensor, unit: float) -> torch.Tensor:
        return t * (1 + unit * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1))

    def after(_module, _inputs, out):
        return moved(out, 2.0**-23) if isinstance(out, torch.Tensor) and out.is_floating_point() else None

    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            if t.is_floating_point():
                t.copy_(moved(t, 2.0**-24))
    for inner in module.modules():
        if not any(inner.children()):
            inner.register_forward_hook(after)


def record_model(cases: dict[str, dict], path, **origin) -> None:
    """Write a fixture for :class:`Models`; run by hand, outside the suite, where the authors' code is at hand.

    Args:
        cases: per case ``theirs`` (the authors' module), ``x``, ``model``, ``settings`` (ours), ``grads`` (names of
            theirs), ``train``; ``call`` for what is not ``theirs(x)``, ``maps`` (from their module and images to maps
            of stages) and ``after`` (names of buffers) where they are to be held, too. Theirs runs in float64, unless
            ``double`` is False.
        path: of the file.
        origin: ``repository``, ``commit`` and ``cls`` of theirs.
    """
    from safetensors.torch import save_file

    tensors, config = {}, {}
    for case, run in cases.items():
        double = run.get("double", True)
        theirs = run["theirs"].train(run.get("train", False)).to(torch.float64 if double else torch.float32)
        shapes = {k: list(v.shape) for k, v in theirs.state_dict().items()}
        weights = {k: v for k, v in synthetic(shapes).items() if v.is_floating_point()}
        theirs.load_state_dict(weights, strict=False)
        if "maps" in run:
            with torch.no_grad():
                maps = run["maps"](theirs, run["x"].double() if double else run["x"])
                tensors |= {f"{case}/map/{i}": t.clone() for i, t in enumerate(maps)}
            theirs.load_state_dict(weights, strict=False)
        theirs.zero_grad()
        x = (run["x"].double() if double else run["x"].clone()).requires_grad_()
        y = run.get("call", lambda m, x: m(x))(theirs, x)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
        (y * g).sum().backward()
        grads = {n: p.grad for n, p in theirs.named_parameters()}
        tensors |= {f"{case}/x": x.detach(), f"{case}/y": y.detach(), f"{case}/g": g, f"{case}/dx": x.grad}
        tensors |= {f"{case}/dw/{n}": grads[n] for n in run["grads"]}
        tensors |= {f"{case}/with/{n}": t for n, t in run.get("with", {}).items()}
        tensors |= {f"{case}/after/{n}": theirs.get_buffer(n) for n in run.get("after", ())}
        config[case] = {k: run[k] for k in ("model", "settings", "train") if k in run} | {"shapes": shapes}
        config[case]["double"] = double
    meta = {"config": json.dumps(config), "seed": "7", **{k: str(v) for k, v in origin.items()}}
    single = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file({k: v.detach().contiguous() for k, v in single.items()}, path, metadata=meta)
