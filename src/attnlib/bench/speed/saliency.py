"""What maps cost beside captum's: gradients at a module, relevance by rules, integrated gradients at fixed memory.

``attnlib bench --suite saliency --out benchmarks/results`` measures it again. The network is plain, of convolutions,
maxima and linear layers, as captum's relevance takes no other; targets are the same, runs are interleaved, and how far
the results are apart and the most bytes alive at once stand beside the times. In float32 a rectifier or maximum that a
rounding decides moves single numbers of integrated gradients by percents, so the mean distance stands there, too.
Without captum installed nothing is compared, and the record of an earlier run with it is kept.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...look.attribution import Rule, grad_cam, integrated_gradients, relevance, saliency, transformer_relevance
from ..clock import interleave, machine, peak_bytes, ratio
from ..small import Progress


def network(width: int, side: int) -> nn.Module:
    """Three pairs of convolutions, two linear layers."""
    layers: list[nn.Module] = []
    dim = 3
    for stage in range(3):
        for _ in range(2):
            out = width * 2**stage
            layers += [nn.Conv2d(dim, out, 3, padding=1), nn.ReLU()]
            dim = out
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(dim * (side // 8) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers).eval()


def measure(
    width: int = 16,
    side: int = 64,
    batch: int = 8,
    steps: int = 32,
    rounds: int = 7,
    progress: Progress | None = None,
    clock: str = "cpu",
) -> dict[str, Any]:
    """Medians of interleaved runs, and ratios: captum's time by ours.

    Args:
        width: of the first convolutions.
        side, batch: of the images.
        steps: of integrated gradients; either runs ``batch`` points at a time.
        rounds: measurements per contender.
        progress: told what is being measured.
        clock: one of :data:`attnlib.bench.clock.CLOCKS`; ``"cpu"`` is fair on a machine that does other work, too.
    """
    if importlib.util.find_spec("captum") is None:
        return {"machine": machine(), "skipped": "captum is not installed: pip install captum"}
    from captum.attr import LRP, InputXGradient, IntegratedGradients, LayerGradCam, LayerGradientXActivation
    from captum.attr._utils.lrp_rules import EpsilonRule

    torch.manual_seed(0)
    model, x = network(width, side), torch.randn(batch, 3, side, side)
    target = torch.arange(batch) % 10
    last = "13"  # the rectifier behind the last convolution
    module = model.get_submodule(last)
    model.requires_grad_(False)

    def captum_relevance() -> Tensor:
        for part in model.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.Flatten)):
                part.rule = EpsilonRule(epsilon=1e-9)  # type: ignore[assignment]
        return LRP(model).attribute(x.clone().requires_grad_(), target=target).detach()

    def captum_cam() -> Tensor:
        found = LayerGradCam(model, module).attribute(x.clone().requires_grad_(), target, relu_attributions=True)
        return found[:, 0].detach()

    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "gradient x input": (
            lambda: transformer_relevance(model, x, target=target, attention="gradient", norm="gradient",
                                          activation="gradient"),
            lambda: InputXGradient(model).attribute(x.clone().requires_grad_(), target).detach()),
        "gradient x activation at a layer": (
            lambda: saliency(model, x, modules=[last], target=target, extract="scaling", aggregate="sum")[last],
            lambda: LayerGradientXActivation(model, module).attribute(
                x.clone().requires_grad_(), target).sum(1).detach()),
        "Grad-CAM": (lambda: grad_cam(model, x, modules=[last], target=target)[last], captum_cam),
        "relevance, epsilon": (
            lambda: relevance(model, x, target, default=Rule("epsilon", epsilon=1e-9)), captum_relevance),
        "integrated gradients": (
            lambda: integrated_gradients(model, x, target=target, steps=steps, chunk=batch),
            lambda: IntegratedGradients(model).attribute(
                x, 0.0, target, n_steps=steps, internal_batch_size=batch).detach()),
    }  # fmt: skip
    records = []
    for name, (ours, theirs) in cases.items():
        if progress is not None:
            progress(name)
        a, b = ours(), theirs()
        taken = interleave({"ours": ours, "captum": theirs}, rounds, clock, progress)
        records.append({
            "case": name, "ours_s": taken["ours"].median, "captum_s": taken["captum"].median,
            **ratio(taken["captum"], taken["ours"]), "apart": float((a - b).abs().max() / b.abs().max()),
            "mean_apart": float((a - b).abs().mean() / b.abs().mean()),
            "ours_peak_bytes": peak_bytes(ours), "captum_peak_bytes": peak_bytes(theirs),
        })  # fmt: skip
    return {"machine": machine(), "clock": clock, "batch": batch, "side": side, "width": width, "steps": steps,
            "captum": records}  # fmt: skip
