"""One run of a comparison: the same optimiser, batches and number of steps for every mechanism."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnlib.models.tiny import Prediction, TinyModel

from .clock import now
from .data.tasks import Task
from .specs import Spec

CURVE_POINTS = 60


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Args:
        dim: width of the backbone.
        depth: blocks.
        num_heads: heads of every mechanism that has heads.
        weight_decay: of AdamW.
        warmup: share of the steps over which the learning rate rises.
        clip: largest gradient norm.
        loss_weight: weight of the losses that mechanisms return themselves.
        device: where models and batches are; what evaluates and what is kept stays on the CPU.
    """

    dim: int = 64
    depth: int = 2
    num_heads: int = 4
    weight_decay: float = 0.01
    warmup: float = 0.2
    clip: float = 1.0
    loss_weight: float = 0.01
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(task: Task, spec: Spec, seed: int, settings: Settings) -> TinyModel:
    """The model of one run, initialised from ``seed``; shared weights do not depend on the mechanism."""
    causal = task.pattern.startswith("causal")

    def make() -> nn.Module:
        return spec.make(causal, settings.dim, settings.num_heads)

    def plain(causal: bool) -> nn.Module:
        return Spec("softmax-attention").make(causal, settings.dim, settings.num_heads)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.build(make, plain, settings.dim, settings.depth).to(settings.device)


class Visitor(nn.Module):
    """A model on its device, called with tensors of the CPU and answering there."""

    def __init__(self, model: TinyModel, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, *inputs: Tensor) -> Prediction:
        out = self.model(*(t.to(self.device) for t in inputs))
        return Prediction(out.y.cpu(), out.losses)


class Trainer:
    """Takes optimiser steps; used by runs and by the measurement of what they will cost.

    Args:
        task: data and loss.
        model: what to train.
        steps: length of the schedule.
        seed: of the batches.
        settings: shared settings.
    """

    def __init__(self, task: Task, model: TinyModel, steps: int, seed: int, settings: Settings) -> None:
        self.task, self.model, self.steps, self.settings = task, model, steps, settings
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=task.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.taken = 0

    def _rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1.0, self.settings.warmup * self.steps))
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

    def step(self) -> tuple[float, float]:
        """One step; returns the task's loss and the seconds that forward, backward and update took.

        On one thread of the CPU these are seconds of the processor, which other programs hardly disturb; elsewhere,
        seconds of the clock.
        """
        batch = tuple(t.to(self.settings.device) for t in self.task.batch(self.generator))
        self.model.set_progress(min(1.0, self.taken / self.steps))
        clock = "cpu" if self.settings.device == "cpu" and torch.get_num_threads() == 1 else "wall"
        start = now(clock)
        loss, extra = self.task.loss(self.model, batch)
        total: Tensor = loss
        for own in extra.values():
            total = total + self.settings.loss_weight * own
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        value = float(loss.detach())
        seconds = now(clock) - start
        self.schedule.step()
        self.taken += 1
        return value, seconds


def run(
    task: Task,
    spec: Spec,
    seed: int,
    steps: int,
    settings: Settings,
    sample: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train and evaluate one mechanism on one task with one seed.

    Args:
        task: what to train on.
        spec: the mechanism.
        seed: of initial weights and batches.
        steps: optimiser steps.
        settings: shared settings.
        sample: also keep something to look at.
        progress: called with the steps taken and the latest loss.

    Returns:
        Plain values, for JSON: ``status`` is ``"ok"`` or ``"diverged"``.
    """
    model = build(task, spec, seed, settings).train()
    trainer = Trainer(task, model, steps, seed, settings)
    losses: list[float] = []
    seconds: list[float] = []
    status = "ok"
    began = now()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for taken in range(1, steps + 1):
            loss, elapsed = trainer.step()
            losses.append(loss)
            seconds.append(elapsed)
            if not math.isfinite(loss):
                status = "diverged"
                break
            if progress is not None:
                progress(taken, loss)
    trained = now() - began
    record: dict[str, Any] = {
        "status": status,
        "steps_taken": len(losses),
        "loss_curve": curve(losses),
        "train_seconds": trained,
        "step_seconds": statistics.median(seconds),
        "parameters": model.parameter_counts(),
        "metrics": {},
    }
    if status == "ok":
        model.set_progress(1.0)
        model.eval()
        began = now()
        with torch.no_grad():
            guest = Visitor(model, settings.device)
            record["metrics"] = task.evaluate(guest)
            record["evaluate_seconds"] = now() - began
            if sample:
                record["sample"] = task.sample(guest)
        if not math.isfinite(record["metrics"][task.metric]):
            record["status"], record["metrics"] = "diverged", {}
    return record


def curve(losses: list[float], points: int = CURVE_POINTS) -> list[list[float | None]]:
    """``[step, loss]`` averaged over at most ``points`` equal stretches.

    >>> curve([3.0, 1.0], points=1)
    [[1.5, 2.0]]
    """
    count = min(points, len(losses))
    out: list[list[float | None]] = []
    for i in range(count):
        a, b = i * len(losses) // count, (i + 1) * len(losses) // count
        mean = sum(losses[a:b]) / (b - a)
        out.append([(a + 1 + b) / 2, mean if math.isfinite(mean) else None])
    return out


def measure(task: Task, spec: Spec, settings: Settings, steps: int = 3) -> tuple[float, float]:
    """Seconds of one step and of one evaluation, to tell how long a comparison will take; proves that it can start."""
    model = build(task, spec, 0, settings).train()
    trainer = Trainer(task, model, 100, 0, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer.step()
        taken = min(trainer.step()[1] for _ in range(steps))
    model.eval()
    began = now()
    with torch.no_grad():
        task.evaluate(Visitor(model, settings.device))
    return taken, now() - began
