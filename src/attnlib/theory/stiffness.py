"""Residual networks as Euler steps: how stiff the path of features is, and steps whose size a gate decides.

A residual block ``x + f(x)`` is one step of Euler's method along ``dx/dt = f``; channel attention ``x + a(f) f`` (as of
squeeze-and-excitation nets) makes the size of the step depend on the features. The stiffness index of a block is

``|| x_{t+1} - x_t || / || x_t ||``,

which is ``h |l|`` for ``x_{t+1} = x_t + h l x_t``, zero for a block that does nothing, and blind to the scale of x.

Our reading: the index has the form a third party's tool gives it. The paper's own block, StepNet, could not be found
anywhere; ``look_ahead`` is *inspired* by what is said of it: the gate sees where the step would lead.

Reference: Huang et al., 2023, arXiv 2308.09939.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_flag, check_int, check_real, check_tensors, check_type, checked
from ..hooks import Tape
from ..nn.layers import masked_mean
from ..types import stats_dtype
from .experiment import Claim, Experiment


def stiffness_index(states: Sequence[Tensor], eps: float = 1e-8) -> Tensor:
    """The index of every step between states of one shape (B, ...): (len(states) - 1, B).

    Args:
        states: at least two, of one stage of a network.
        eps: added to the norm that divides.

    >>> x = torch.ones(1, 4)
    >>> stiffness_index([x, 1.5 * x, 1.5 * x]).flatten()
    tensor([0.5000, 0.0000])
    """
    states = check_tensors("states", states, least=2)
    check_real("eps", eps, least=0)
    shapes = {tuple(s.shape) for s in states}
    if len(shapes) > 1:
        raise ValueError(f"states must have one shape, got {sorted(shapes)}: the index is of steps inside one stage")
    if states[0].dim() < 2:
        raise ValueError(f"states must be (B, ...), got shape {tuple(states[0].shape)}")
    flat = torch.stack([s.detach().flatten(1).to(stats_dtype(s.dtype)) for s in states])
    return (flat[1:] - flat[:-1]).norm(dim=-1) / (flat[:-1].norm(dim=-1) + eps)


def block_stiffness(model: nn.Module, blocks: Sequence[str], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The index (B,) of named blocks of any model that keep their input's shape, in evaluation mode.

    >>> model = nn.Sequential(nn.Identity(), nn.ReLU())
    >>> {name: float(v) for name, v in block_stiffness(model, ["0", "1"], torch.tensor([[3.0, -4.0]])).items()}
    {'0': 0.0, '1': 0.800000011920929}
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            taped = Tape(model, blocks, keep=("input", "output")).run(*args, **kwargs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = {}
    for entry in taped.entries:
        if entry.input is None or entry.output is None or entry.input.shape != entry.output.shape:
            raise ValueError(
                f"block {entry.name!r} changes the shape of its input; the index is of steps inside one stage"
            )
        label = entry.name if len(taped.all(entry.name)) == 1 else f"{entry.name} call {entry.call}"
        found[label] = stiffness_index([entry.input, entry.output])[0]
    return found


class StepGate(nn.Module):
    """Sizes of a step, 0 to 1 per channel, from mean tokens.

    Args:
        dim: channels.
        reduction: the middle layer has ``dim / reduction`` units, at least one.
        look_ahead: read the state and where a whole step would lead instead of the step alone (inspired by StepNet).
    """

    @checked
    def __init__(self, dim: int, reduction: int = 16, look_ahead: bool = False):
        super().__init__()
        check_int("dim", dim, least=1)
        check_int("reduction", reduction, least=1)
        check_flag("look_ahead", look_ahead)
        self.look_ahead = look_ahead
        hidden = max(1, dim // reduction)
        self.fc1, self.fc2 = nn.Linear(2 * dim if look_ahead else dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        """(B, *grid, C) twice to sizes (B, 1, ..., C)."""
        means = [masked_mean(t, None) for t in ((x, x + change) if self.look_ahead else (change,))]
        sizes = self.fc2(F.relu(self.fc1(torch.cat(means, -1)))).sigmoid()
        return sizes.view(len(x), *[1] * (x.dim() - 2), x.shape[-1])


class GatedStep(nn.Module):
    """``x + gate(x, f(x)) * f(x)`` around any body that keeps its input's shape.

    Args:
        body: ``f``.
        gate: from state and change to sizes that broadcast over them; a number for a fixed size.
        channels_first: bodies of images (B, C, H, W); the gate is given channels last.

    >>> step = GatedStep(nn.Linear(32, 32), StepGate(32))
    >>> step(torch.randn(2, 7, 32)).shape
    torch.Size([2, 7, 32])
    """

    def __init__(self, body: nn.Module, gate: nn.Module | float = 1.0, channels_first: bool = False):
        super().__init__()
        check_type("body", body, nn.Module)
        check_type("gate", gate, (nn.Module, float, int))
        self.body, self.channels_first = body, check_flag("channels_first", channels_first)
        self.gate = gate if isinstance(gate, nn.Module) else check_real("gate", gate)

    def forward(self, x: Tensor) -> Tensor:
        change = self.body(x)
        if change.shape != x.shape:
            raise ValueError(f"body gave shape {tuple(change.shape)} for {tuple(x.shape)}; a step keeps the shape")
        if not isinstance(self.gate, nn.Module):
            return x + self.gate * change
        if self.channels_first:
            return x + self.gate(x.movedim(1, -1), change.movedim(1, -1)).movedim(-1, 1) * change
        return x + self.gate(x, change) * change


class _Field(nn.Module):
    """``a' = -a``, ``b' = -rate b^3``: slow, and fast where b is large."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        return -torch.stack([a, self.rate * b**3], -1)


class _Steps(nn.Module):
    """A learnt size for each coordinate, of each step or of all steps: what does not look at the state."""

    def __init__(self, steps: int, each: bool):
        super().__init__()
        self.steps, self.sizes = steps, nn.Parameter(torch.full((steps if each else 1, 2), 0.05))

    def forward(self, field: nn.Module, x: Tensor) -> list[Tensor]:
        states = []
        for size in self.sizes.expand(self.steps, 2):
            x = x + size * field(x)
            states.append(x)
        return states


class _Gated(nn.Module):
    """The same steps by one gate that is used again and again."""

    def __init__(self, steps: int, look_ahead: bool):
        super().__init__()
        self.steps, self.gate = steps, StepGate(2, 1, look_ahead)
        nn.init.constant_(self.gate.fc2.bias, math.log(0.05 / 0.95))

    def forward(self, field: nn.Module, x: Tensor) -> list[Tensor]:
        states, step = [], GatedStep(field, self.gate)
        for _ in range(self.steps):
            x = step(x)
            states.append(x)
        return states


class StiffSteps(Experiment):
    """Do gated steps help where one coordinate is fast in some places? Euler's method with sizes that are learnt.

    The system is ``a' = -a``, ``b' = -rate b^3`` up to time 2. One size per coordinate for all steps (2 numbers) or for
    each (16), the same for every state, against a gate that sees the step (12), and one that looks ahead (16).

    Args:
        rate: how fast ``b`` is; small ones are outside of the theory, which speaks of stiff systems.
        steps: of the method.
        train_steps, lr: of training (Adam, a cosine).
        count: trajectories to learn from, and as many to judge by.
    """

    name = "gated steps on a stiff system"

    @checked
    def __init__(
        self, rate: float = 10.0, steps: int = 8, train_steps: int = 200, lr: float = 0.02, count: int = 128
    ):  # fmt: skip
        check_real("rate", rate, above=0)
        check_int("steps", steps, least=1)
        self.rate, self.steps, self.train_steps, self.lr, self.count = rate, steps, train_steps, lr, count

    def predict(self) -> dict[str, Claim]:
        return {
            "index of x + 0.3 x minus 0.3": Claim.below(1e-6),
            "error of gated steps over fixed ones": Claim.below(1.0),
            "error of look-ahead steps over fixed ones": Claim.below(1.0),
            "error of look-ahead steps over sizes of each step": Claim.below(1.0),
        }

    def outside(self) -> StiffSteps:
        """Both coordinates slow."""
        return StiffSteps(**{**self.setting(), "rate": 0.2})

    def truth(self, start: Tensor) -> Tensor:
        """(steps + 1, B, 1, 2): the states, in closed form."""
        a, b = start.unbind(-1)
        times = torch.linspace(0, 2, self.steps + 1)[:, None, None]
        return torch.stack([a * (-times).exp(), b / (1 + 2 * self.rate * b**2 * times).sqrt()], -1)

    def run(self, seed: int) -> dict[str, float]:
        g = torch.Generator().manual_seed(seed)
        learnt, judged = (self.truth(2 * torch.rand(self.count, 1, 2, generator=g) - 1) for _ in range(2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nets = {
                "fixed": _Steps(self.steps, False), "each step's": _Steps(self.steps, True),
                "gated": _Gated(self.steps, False), "look-ahead": _Gated(self.steps, True),
            }  # fmt: skip
        field, errors = _Field(self.rate), {}
        for name, net in nets.items():
            optimizer = torch.optim.Adam(net.parameters(), lr=self.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.train_steps)
            for _ in range(self.train_steps):
                error = F.mse_loss(torch.stack(net(field, learnt[0])), learnt[1:])
                optimizer.zero_grad()
                error.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                errors[name] = float(F.mse_loss(torch.stack(net(field, judged[0])), judged[1:]))
        x = torch.randn(4, 8, generator=g).double()
        index = stiffness_index([x, x + 0.3 * x])
        true = stiffness_index(list(judged))
        return {
            "index of x + 0.3 x minus 0.3": float((index - 0.3).abs().max()),
            "error of gated steps over fixed ones": errors["gated"] / errors["fixed"],
            "error of look-ahead steps over fixed ones": errors["look-ahead"] / errors["fixed"],
            "error of look-ahead steps over sizes of each step": errors["look-ahead"] / errors["each step's"],
            **{f"error of {name} steps": e for name, e in errors.items()},
            **{f"parameters of {name} steps": sum(p.numel() for p in net.parameters()) for name, net in nets.items()},
            "index of the first true step": float(true[0].median()),
            "index of the last true step": float(true[-1].median()),
        }
