"""Multi-step consistency distillation: a denoiser that reaches the end of a stretch of time in one step.

Time from 1 (noise) to 0 (data) is cut into segments. With ``x_t = a_t x_0 + s_t e`` and a denoiser that predicts
``x_0``, a DDIM step from t to u is ``a_u x_0 + (s_u / s_t) (x_t - a_t x_0)``. Inside a segment that ends at ``u`` all
points of one path are taught to reach the same end (Ding et al., 2025, arXiv 2502.06155, stage 1; Heek et al., 2024,
arXiv 2403.06807):

    loss = | DDIM(x_t, f(x_t, t), t -> u) - stop(DDIM(x_s, f'(x_s, s), s -> u)) |^2,

``x_s`` the teacher's step from ``x_t`` to the next point of time, ``f'`` a copy of the student that follows slowly.
Sampling then takes one step per segment.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checks import check_float, check_int, check_real

#: ``denoise(x (B, ...), t (B,)) -> x_0 (B, ...)``.
Denoiser = Callable[[Tensor, Tensor], Tensor]

#: ``(a, s)`` at times (B,).
Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]


def cosine_schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """``(cos, sin)`` of ``t`` quarter turns: data at 0, noise at 1.

    >>> [round(float(x), 4) for x in cosine_schedule(torch.tensor(0.0))]
    [1.0, 0.0]
    """
    return (t * torch.pi / 2).cos(), (t * torch.pi / 2).sin()


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 1))


def ddim_step(x: Tensor, clean: Tensor, t: Tensor, u: Tensor, schedule: Schedule = cosine_schedule) -> Tensor:
    """From time ``t`` to time ``u`` along the direction that the predicted clean sample gives.

    Args:
        x: (B, ...) at time t.
        clean: (B, ...) predicted.
        t, u: (B,) times; ``t`` must not be without noise.
        schedule: of the noise.
    """
    if clean.shape != x.shape or t.shape != x.shape[:1] or u.shape != t.shape:
        raise ValueError(
            f"clean must be {tuple(x.shape)} as x is, t and u {tuple(x.shape[:1])}, got {tuple(clean.shape)}, "
            f"{tuple(t.shape)} and {tuple(u.shape)}"
        )
    (a, s), (b, r) = schedule(t), schedule(u)
    return _like(b, x) * clean + _like(r / s, x) * (x - _like(a, x) * clean)


class ConsistencyDistillation(nn.Module):
    """Teach a denoiser to reach the ends of segments of time in one step.

    Args:
        student: ``student(x, t) -> x_0``; trained.
        teacher: the denoiser whose paths it follows; frozen, no part of this module's state.
        segments: parts that time is cut into; sampling takes as many steps.
        steps: points of time in all, a multiple of ``segments``; the teacher steps from one to the next.
        schedule: of the noise.
        decay: of the slow copy; 0 takes the student itself, without gradient.

    Raises:
        ValueError: steps that segments do not divide, or fewer than two per segment.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Denoiser,
        segments: int = 4,
        steps: int = 64,
        schedule: Schedule = cosine_schedule,
        decay: float = 0.95,
    ):
        super().__init__()
        self.segments, self.steps = check_int("segments", segments, least=1), check_int("steps", steps, least=2)
        if steps % segments or steps // segments < 2:
            raise ValueError(
                f"steps={steps} must be a multiple of segments={segments}, with at least two steps in a segment"
            )
        self.decay = check_real("decay", decay, least=0, below=1)
        self.student = student
        self.slow = copy.deepcopy(student).requires_grad_(False) if decay else None
        self._teacher, self.schedule = [teacher], schedule

    @property
    def teacher(self) -> Denoiser:
        return self._teacher[0]

    def end_of(self, number: Tensor) -> Tensor:
        """Points of time (B,), counted from 0 (data) to ``steps`` -> where their segment ends."""
        per = self.steps // self.segments
        return (number - 1).div(per, rounding_mode="floor") * per

    def loss(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Of a batch of data (B, ...), at random points of time and noise.

        The point next to the end of a segment is taught by the teacher alone.
        """
        check_float("clean", clean)
        number = torch.randint(1, self.steps + 1, (clean.shape[0],), generator=generator).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
        t, s, u = (n.to(clean.dtype) / self.steps for n in (number, number - 1, self.end_of(number)))
        a, b = self.schedule(t)
        x = _like(a, clean) * clean + _like(b, clean) * noise
        with torch.no_grad():
            nearer = ddim_step(x, self.teacher(x, t), t, s, self.schedule)
            follow = self.student if self.slow is None else self.slow
            arrived = s <= u
            safe = torch.where(arrived, t, s)  # at the end there is nothing left to step
            target = ddim_step(nearer, follow(nearer, safe), safe, u, self.schedule)
            target = torch.where(_like(arrived, x), nearer, target)
        reached = ddim_step(x, self.student(x, t), t, u, self.schedule)
        return (reached - target).square().mean()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow copy towards the student; after every optimiser step."""
        if self.slow is None:
            return
        for slow, fast in zip(self.slow.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.decay)
        for kept, now in zip(self.slow.buffers(), self.student.buffers(), strict=True):
            kept.copy_(now)

    @torch.no_grad()
    def sample(self, noise: Tensor) -> list[Tensor]:
        """From noise (B, ...) at time 1, one step per segment: what stands at the end of each, data last."""
        out, x = [], noise
        for i in range(self.segments, 0, -1):
            t, u = (torch.full((noise.shape[0],), n / self.segments, dtype=noise.dtype, device=noise.device)
                    for n in (i, i - 1))  # fmt: skip
            x = ddim_step(x, self.student(x, t), t, u, self.schedule)
            out.append(x)
        return out
