"""Consistency distillation on a line: data from one Gaussian, whose paths are known."""

import pytest
import torch
from torch import nn

from attnlib.convert.consistency import ConsistencyDistillation, cosine_schedule, ddim_step

MEAN, SPREAD = 1.5, 0.5


def exact(x, t):
    """The posterior mean of the data."""
    a, s = cosine_schedule(t)
    return MEAN + a * SPREAD**2 / (a**2 * SPREAD**2 + s**2) * (x - a * MEAN)


def path(x, t, u):
    """Where the probability flow carries x from time t to time u."""

    def width(time):
        a, s = cosine_schedule(torch.as_tensor(time, dtype=x.dtype))
        return a * MEAN, (a**2 * SPREAD**2 + s**2).sqrt()

    (m, w), (n, r) = width(t), width(u)
    return n + (x - m) * r / w


class Lines(nn.Module):
    """A straight line per point of time, which is what the exact student is."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.slope = nn.Parameter(torch.zeros(steps + 1, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(steps + 1, dtype=torch.float64))

    def forward(self, x, t):
        at = (t * self.steps).round().long()
        return self.slope[at] * (x - MEAN * cosine_schedule(t)[0]) + self.shift[at]


def distilled(segments, steps=64, decay=0.0, rounds=1500):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    trained = ConsistencyDistillation(Lines(steps), exact, segments, steps, decay=decay)
    optimizer = torch.optim.Adam(trained.student.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    for _ in range(rounds):
        data = MEAN + SPREAD * torch.randn(256, generator=g, dtype=torch.float64)
        loss = trained.loss(data, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        trained.follow()
    return trained


@pytest.mark.parametrize("segments", [2, 4])
def test_few_steps_reach_the_ends_of_the_exact_path(segments):
    trained = distilled(segments)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    ends = trained.sample(noise)
    few = noise
    for i, end in enumerate(ends):
        u = 1 - (i + 1) / segments
        assert (end - path(noise, 1.0, u)).abs().max() < 0.05
        t = torch.full_like(noise, u + 1 / segments)
        few = ddim_step(few, exact(few, t), t, torch.full_like(noise, u))
    # as few steps of the teacher itself are further away
    assert (few - path(noise, 1.0, 0.0)).abs().max() > 2 * (ends[-1] - path(noise, 1.0, 0.0)).abs().max()


def test_a_step_of_the_exact_denoiser_follows_the_path():
    x = torch.linspace(-1, 2, 5, dtype=torch.float64)
    t, u = torch.full_like(x, 0.5), torch.full_like(x, 0.499)
    assert (ddim_step(x, exact(x, t), t, u) - path(x, 0.5, 0.499)).abs().max() < 1e-5


def test_ends_of_segments():
    trained = ConsistencyDistillation(Lines(8), exact, 2, 8)
    assert trained.end_of(torch.arange(1, 9)).tolist() == [0, 0, 0, 0, 4, 4, 4, 4]


def test_the_teacher_is_no_part_of_the_state_and_the_copy_follows():
    teacher = nn.Linear(1, 1)
    trained = ConsistencyDistillation(Lines(8), lambda x, t: teacher(x[:, None])[:, 0], 2, 8, decay=0.5)
    assert not any("teacher" in name for name in trained.state_dict())
    with torch.no_grad():
        trained.student.slope.fill_(1.0)
    trained.follow()
    assert torch.allclose(trained.slow.slope, torch.full_like(trained.slow.slope, 0.5))
    assert not any(p.requires_grad for p in trained.slow.parameters())


@pytest.mark.parametrize(("settings", "says"), [
    (dict(segments=3), "multiple of segments"), (dict(segments=8), "multiple of segments"),
    (dict(segments=0), "segments"), (dict(decay=1.0), "decay"),
])  # fmt: skip
def test_bad_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        ConsistencyDistillation(Lines(8), exact, **{"segments": 2, "steps": 8, **settings})


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="clean must be"):
        ddim_step(torch.zeros(2), torch.zeros(3), torch.ones(2), torch.zeros(2))
