"""Whole models of authors, recorded with synthetic weights: outputs, gradients of inputs, and of every parameter.

A gradient of a parameter is kept as its norm and a projection, other tensors as these and every n-th entry, and inputs
not at all (:func:`drawn`), so that a model of millions takes a few KB. Recorded and held in float64.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import torch
from safetensors import safe_open

from tests.parity import synthetic

FOLDER = Path(__file__).parent / "fixtures" / "models"


def wave(t: torch.Tensor, start: int = 0) -> torch.Tensor:
    return torch.cos(torch.arange(start, start + t.numel(), dtype=torch.float64) * 0.9).view_as(t)


def drawn(name: str, shape) -> torch.Tensor:
    """An input, from its name and shape alone."""
    seed = zlib.crc32(name.encode()) % 1009
    at = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(at * 1.37 + seed) + torch.sin(at * 0.0713 * (1 + seed % 7))).view(*shape)


def told(t: torch.Tensor) -> torch.Tensor:
    """Norm, projection, then every n-th entry, 800 at most."""
    flat = t.detach().double().flatten()
    some = flat[:: -(-len(flat) // 800)] if len(flat) else flat
    return torch.cat([torch.stack([flat.norm(), (flat * wave(flat)).sum()]), some])


def traced(outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], params: dict[str, torch.Tensor]):
    """Outputs, the gradients of inputs, and norms and projections of the gradients of parameters."""
    live = {k: p for k, p in params.items() if p.requires_grad}
    grads_of = {k: x for k, x in inputs.items() if x.requires_grad}
    total = sum((y * wave(y)).sum() for y in outputs.values())
    grads = torch.autograd.grad(total, [*grads_of.values(), *live.values()], allow_unused=True)
    dx = {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(grads_of.items(), grads, strict=False)}
    dw = dict(zip(live, grads[len(grads_of) :], strict=True))
    return {k: y.detach() for k, y in outputs.items()}, dx, dw


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in synthetic(shapes).items()}


def record_whole(cases: dict[str, dict], path, **origin) -> None:
    """Write a fixture: run by hand where the authors' code is at hand.

    Args:
        cases: per case ``theirs`` (a module), shapes of ``inputs`` by name, ``call(theirs, inputs)`` to outputs by
            name, ``note`` (settings of ours), ``train``.
    """
    from safetensors.torch import save_file

    tensors, held = {}, {}
    for case, run in cases.items():
        theirs = run["theirs"].double().train(run.get("train", False))
        shapes = {k: list(v.shape) for k, v in theirs.state_dict().items()}
        theirs.load_state_dict(weights(shapes))
        inputs = {k: drawn(k, shape).requires_grad_() for k, shape in run["inputs"].items()}
        params = dict(theirs.named_parameters())
        for p in params.values():
            p.requires_grad_(True)
        y, dx, dw = traced(run["call"](theirs, inputs), inputs, params)
        names = [k for k, g in dw.items() if g is not None]
        for kind, group in (("y", y), ("dx", dx)):
            tensors |= {f"{case}/{kind}/{k}": told(v) for k, v in group.items()}
        tensors[f"{case}/norms"] = torch.stack([dw[k].norm() for k in names])
        tensors[f"{case}/sums"] = torch.stack([(dw[k] * wave(dw[k])).sum() for k in names])
        after = {k: v for k, v in theirs.named_buffers() if v.is_floating_point()} if run.get("train") else {}
        tensors |= {f"{case}/after/{k}": told(v)[:2] for k, v in after.items()}
        held[case] = {
            "shapes": shapes,
            "names": names,
            "inputs": {k: list(v) for k, v in run["inputs"].items()},
            "note": run.get("note", {}),
            "train": run.get("train", False),
        }
    meta = {"config": "{}", "cases": json.dumps(held), **{k: str(v) for k, v in origin.items()}}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=meta)


class Recorded:
    """Tensors and metadata of a recording."""

    def __init__(self, name: str):
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as f:
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            self.meta = f.metadata()


class Whole(Recorded):
    def __init__(self, name: str):
        super().__init__(name)
        self.cases = json.loads(self.meta["cases"])

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + "/")}

    def state(self, case: str) -> dict[str, torch.Tensor]:
        """Their state dict."""
        return weights(self.cases[case]["shapes"])

    def holds(self, case: str, model, convert, call, rename, atol: float = 1e-9, start=lambda name, t: 0) -> None:
        """Strict load, outputs, gradients and what buffers are afterwards, in float64.

        Args:
            model: ours, as built.
            convert: from their state dict to ours.
            call: ``(model, inputs)`` to outputs by name.
            rename: from a name of theirs to ours, ``None`` where ours has no such part.
            start: from our name and tensor to the number of its first entry in theirs, where ours is a part of it.
        """
        run = self.cases[case]
        model = model.double().train(run["train"])
        model.load_state_dict(convert(self.state(case)), strict=True)
        inputs = {k: drawn(k, shape).requires_grad_() for k, shape in run["inputs"].items()}
        y, dx, dw = traced(call(model, inputs), inputs, dict(model.named_parameters()))
        for kind, ours in (("y", y), ("dx", dx)):
            for k, want in self.under(f"{case}/{kind}").items():
                error = float((told(ours[k]) - want).abs().max()) / (float(want.abs().max()) or 1.0)
                assert error <= atol, f"{kind}/{k} differs by {error:.1e}"
        norms, sums = self.tensors[f"{case}/norms"], self.tensors[f"{case}/sums"]
        least = 1e-3 * float(norms.max())
        seen = set()
        for i, theirs in enumerate(run["names"]):
            name = rename(theirs)
            if name is None:
                assert not float(norms[i]), f"{theirs} has a gradient"
                continue
            seen.add(name)
            for what, a, b in (
                ("norm", dw[name].norm(), norms[i]),
                ("sum", (dw[name] * wave(dw[name], start(name, dw[name]))).sum(), sums[i]),
            ):
                error = abs(float(a - b)) / max(float(norms[i]), least)
                assert error <= 10 * atol, f"{what} of the gradient of {name} differs by {error:.1e}"
        assert seen == {k for k, g in dw.items() if g is not None}, "not every parameter was compared"
        buffers = dict(model.named_buffers())
        for theirs, want in self.under(f"{case}/after").items():
            if name := rename(theirs):
                assert float((told(buffers[name])[:2] - want).abs().max()) <= 10 * atol, (
                    f"{name} differs after training"
                )


def renamer(convert, state: dict[str, torch.Tensor]):
    """From their names to ours, found by converting tensors that are told apart by what they hold."""
    marked = {k: torch.full_like(v, float(i), dtype=torch.float64) for i, (k, v) in enumerate(state.items())}
    ours = {int(v.flatten()[0]): k for k, v in convert(marked).items() if v.numel()}
    return lambda name: ours.get(list(state).index(name))
