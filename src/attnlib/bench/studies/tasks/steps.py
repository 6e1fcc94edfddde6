"""Scale distillation: one step of factor 8, learnt by way of 2 and 4, and learnt directly.

Made-up signals of two waves; pictures are their own latents, and the denoiser is a small perceptron. A contestant is
told by what it costs: a *stage* is a number of steps. *Direct* learns factor 8 from signals for one stage, or for all
three; *distilled* is YONOS, 2 from signals, 4 from 2, 8 from 4, a stage each; *same start* goes through the same three
factors, each started from the one before, but always learns from signals: what is left of the gain then is the start's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....models.diffusion.scale_distillation import OneStepUpscaler, smaller, zero_terminal_snr
from ...clock import machine
from ...plots import _figure
from ...small import Progress, _write, fit, picture, study, told

QUESTION = "Is one step of factor 8 better learnt by way of 2 and 4, at the same cost?"
DIRECT, LONGER, STARTED, OURS = "direct, one stage", "direct, three stages", "same start, from signals", "distilled"
NAMES = (DIRECT, LONGER, STARTED, OURS)
LENGTH, LEVELS = 32, 20


def waves(count: int, generator: torch.Generator) -> Tensor:
    """A wave of any strength and phase with a faster one on it, up or down (count, 1, 32).

    Eight times smaller, the faster one is nearly gone: its phase and strength follow from the slow one's, its sign from
    what little is left of it.
    """
    strength, phase = (torch.rand(count, 1, generator=generator) for _ in range(2))
    sign = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
    at = 2 * torch.pi * (torch.arange(LENGTH) / LENGTH + phase)
    return ((0.5 + strength) * (torch.sin(at) + 0.5 * sign * torch.sin(3 * at)))[:, None]


class Perceptron(nn.Module):
    """Noise, a hint and the time to what is clean: (B, 2, 32), (B,) -> (B, 1, 32)."""

    def __init__(self, dim: int = 96):
        super().__init__()
        first, last = nn.Linear(2 * LENGTH + 1, dim), nn.Linear(dim, LENGTH)
        self.net = nn.Sequential(first, nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), last)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([z.flatten(1), t[:, None].to(z.dtype) / LEVELS], 1))
        return out[:, None]


def trained(name: str, seed: int, steps: int, batch: int = 128, lr: float = 3e-3) -> OneStepUpscaler:
    """A contestant of factor 8 after its stages."""

    def stage(model: OneStepUpscaler, count: int, number: int) -> OneStepUpscaler:
        def some(g: torch.Generator) -> dict[str, Tensor]:
            y = waves(batch, g)
            times = torch.randint(LEVELS, (batch,), generator=g)
            return {"target": y, "timesteps": times, "noise": torch.randn(y.shape, generator=g)}

        def loss(m: Any, given: dict[str, Tensor]) -> Tensor:
            found: Tensor = m.denoiser_loss(**given)["clean"]
            return found

        fit(model.denoiser, some, lambda _, given: loss(model, given), count, lr=lr, seed=100 * seed + number)
        return model

    torch.manual_seed(seed)
    plan = zero_terminal_snr(torch.linspace(0.999, 0.01, LEVELS))
    if name in (DIRECT, LONGER):
        return stage(OneStepUpscaler(Perceptron(), plan, 8), steps * (3 if name == LONGER else 1), 2)
    model = stage(OneStepUpscaler(Perceptron(), plan, 2), steps, 0)
    for number in (1, 2):
        model = model.student()
        if name == STARTED:
            model.teacher = None
        stage(model, steps, number)
    return model


@torch.no_grad()
def errors(model: OneStepUpscaler, tested: int, seed: int) -> tuple[dict[str, float], Tensor, Tensor, Tensor]:
    """Squared errors of one step from pure noise, over the signals' variance; with signals, hints and answers."""
    g = torch.Generator().manual_seed(seed)
    y = waves(tested, g)
    low = smaller(y, model.factor)
    noise = torch.randn(2, *y.shape, generator=g)
    made, again = (model.eval()(low, n) for n in noise)
    spread = y.var()
    told = {"error": float((made - y).square().mean() / spread), "noise": float((made - again).var() / 2 / spread)}
    return told, y, model.hint(low, (LENGTH,)), made


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: Sequence[int] = (100, 300),
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 1024,
) -> dict[str, Any]:
    """Train the four with stages of several lengths.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-steps-cpu.svg`` and ``tasks-steps-predictions.svg``, the last seed's answers.
        steps: of a stage.
        seeds, tested: of training and of the test.

    Returns:
        Plain values, for JSON: by steps of a stage, squared ``error`` over the variance of signals, and how much of it
        the noise makes.
    """
    result: dict[str, Any] = {"question": QUESTION, "machine": machine(), "tested": tested, "stages": {}}
    shown: dict[str, Tensor] = {}
    for count in steps:

        def run(name: str, seed: int, count: int = count) -> dict[str, float]:
            found, y, hint, made = errors(trained(name, seed, count), tested, 10_000 + seed)
            shown.update({"what is given": hint[:4, 0], "truth": y[:4, 0], name: made[:4, 0]})
            return found

        result["stages"][count] = study(NAMES, run, "error", DIRECT, seeds, progress, keep, (count, tested))
    if pictures is not None:
        curves = {
            name: [
                (count, r["error"]["mean"], r["error"]["half"])
                for count, found in result["stages"].items()
                for r in found["rows"]
                if r["name"] == name
            ]
            for name in NAMES
        }
        picture(
            Path(pictures) / "tasks-steps-cpu.svg", curves, "steps of a stage", "squared error over variance",
            "one step of factor 8", ("x", "y"), (DIRECT, LONGER),
        )  # fmt: skip
        if shown:
            draw(Path(pictures) / "tasks-steps-predictions.svg", shown)
    return result


def draw(path: Path, shown: Mapping[str, Tensor]) -> None:
    """Signals side by side, every contestant's answer a line."""
    figure, first = _figure(8.0, 2.4)
    first.remove()
    for i, axes in enumerate(figure.subplots(1, 4, sharey=True)):
        for name, signals in shown.items():
            wide = 2.0 if name == "truth" else 1.0
            axes.plot(signals[i].tolist(), label=name, linewidth=wide, linestyle=":" if "given" in name else "-")
        axes.tick_params(labelsize=7)
        if i == 0:
            axes.legend(fontsize=5, frameon=False)
    _write(path, figure)


def table(found: Mapping[str, Any]) -> str:
    """The results as a table of a page."""
    stages = found["stages"]
    lines = [
        "| learnt | " + " | ".join(f"stages of {n} steps" for n in stages) + " | from noise, last |",
        "|---" * (len(stages) + 2) + "|",
    ]
    for i, name in enumerate(NAMES):
        rows = [part["rows"][i] for part in stages.values()]
        cells = [told(row, "error", 3) for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} | {told(rows[-1], 'noise', 3)} |")
    return "\n".join(lines)
