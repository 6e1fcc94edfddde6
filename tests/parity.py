"""Recorded runs of the authors' classes, and how to hold a mechanism to them.

A fixture ``fixtures/<slug>.safetensors`` holds per case ``<case>/sd/<name>`` (their state dict), ``x/<input>``, ``y``,
``g`` (the gradient of y), ``dx/<input>`` and ``dw/<name>``; its metadata names repository, commit, class, seed and our
settings per case. ``fixtures/options/<slug>.safetensors`` holds runs with options off their defaults in the same form,
inputs in our layout and named as the arguments of the call.
"""

from __future__ import annotations

import importlib
import json
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
        self.config = json.loads(self.meta["config"])

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
        """Output, input gradients and weight gradients equal the recording. ``call(module, inputs) -> y``."""
        given = self.under(f"{case}/x")
        inputs = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in given.items()}
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


class Options(Fixture):
    """Runs with options off their defaults; the metadata holds per case:

    ``settings`` of ours, ``convert`` (options of the converter), ``train`` (whether the module was training), ``class``
    (``module:name`` where it is not the registered one) and ``note``.
    """

    folder = HERE / "options"

    @classmethod
    def all(cls) -> list[tuple[str, str]]:
        """(slug, case) of every recorded run."""
        slugs = sorted(path.stem for path in cls.folder.glob("*.safetensors"))
        return [(slug, case) for slug in slugs for case in cls(slug).config]

    def convert(self, case: str, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return attnlib.convert_state_dict(self.slug, theirs, **self.config[case].get("convert", {}))

    def _convert(self, case: str, what: str) -> dict[str, torch.Tensor]:
        return self.convert(case, self.under(f"{case}/{what}"))

    def create(self, case: str):
        """Our module as it starts."""
        config = self.config[case]
        settings = dict(config["settings"])
        for name in ("context_layout",):
            if name in settings:
                settings[name] = Layout(tuple((part, tuple(size)) for part, size in settings[name]))
        if "class" not in config:
            return attnlib.create(self.slug, **settings)
        module, name = config["class"].split(":")
        return getattr(importlib.import_module(module), name)(**settings)

    def build(self, case: str, **changes):
        module = self.create(case)
        module.load_state_dict(self._convert(case, "sd"))
        return module.train(self.config[case].get("train", False))
