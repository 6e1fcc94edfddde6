"""Recorded runs of the authors' classes, and how to hold a mechanism to them.

A fixture ``fixtures/<slug>.safetensors`` holds per case ``<case>/sd/<name>`` (their state dict), ``x/<input>``, ``y``,
``g`` (the gradient of y), ``dx/<input>`` and ``dw/<name>``; its metadata names repository, commit, class, seed and our
settings per case.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

import attnlib

HERE = Path(__file__).parent / "fixtures"


class Fixture:
    def __init__(self, slug: str, **options):
        """``options`` go to ``convert_state_dict``; a callable gets the settings of the case."""
        self.slug, self.options = slug, options
        with safe_open(HERE / f"{slug}.safetensors", "pt") as f:
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
        """Our module with the authors' weights, and the names that the conversion did not fill."""
        module = attnlib.create(self.slug, **{**self.config[case], **changes})
        missing, unexpected = module.load_state_dict(self._convert(case, "sd"), strict=False)
        assert not unexpected, unexpected
        return module, missing

    @staticmethod
    def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
        """Largest difference within ``tolerance`` of the largest entry (of 1, when all entries are smaller)."""
        assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
        error = float((ours.double() - theirs.double()).abs().max()) / max(1.0, float(theirs.abs().max()))
        assert error <= tolerance, f"{what}: differs by {error:.2e} of its scale"

    def holds(self, case: str, module, call, atol: float = 1e-5) -> None:
        """Output, input gradients and weight gradients equal the recording. ``call(module, inputs) -> y``."""
        inputs = {k: v.clone().requires_grad_() for k, v in self.under(f"{case}/x").items()}
        y = call(module, inputs)
        self._close(y.detach(), self.tensors[f"{case}/y"], atol, "y")
        (y * self.tensors[f"{case}/g"]).sum().backward()
        for name, expected in self.under(f"{case}/dx").items():
            self._close(inputs[name].grad, expected, atol, f"dx/{name}")
        ours = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        theirs = self._convert(case, "dw")
        assert set(theirs) & set(ours), "no weight gradient to compare"
        for name, expected in theirs.items():
            self._close(ours[name], expected, atol, f"dw/{name}")
