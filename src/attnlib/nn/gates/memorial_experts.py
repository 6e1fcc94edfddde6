"""Memorial mixture of experts: task-generic features, mixed for every task, with a memory as one more expert.

Ye and Xu, 2023, "TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts",
arXiv 2307.15324. With K experts ``E_e = GELU(LN(W_e x))``, the memory ``M_t`` of task t, and a gate per task,

    ``R_t = read(M_t)``,  ``g_t = softmax(G_t([E_1 .. E_K, R_t]))``,
    ``F_t = sum_e g_te E_e + g_t,K+1 R_t``,   ``M_t <- write(M_t, F_t)``.

No code was released. Certain: every task has its own gate, which depends on the input; the memory is read as one more
expert and written at every such layer. Our reading, each an argument or a method to override: ``G_t`` is a layer with
GELU and a task's own bias (its embedding), then a linear map; it sees means over the grid (``gate="image"``) or every
token; :meth:`MemorialExperts.read` is a linear map per task, :meth:`MemorialExperts.write` adds one of ``F_t`` to the
memory, or blends (``update="gated"``). ``top_k``, without rescaling, is that of its successor MLoRE. All experts run:
this mixes features, it does not route tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_valid, describe
from ...types import stats_dtype

GATES, UPDATES = ("image", "token"), ("add", "gated")


class Mixed(NamedTuple):
    """What a layer gives.

    Args:
        features: (B, T, *grid, expert_dim), one map per task.
        memory: (B, T, *grid, memory_dim), written; ``None`` without one.
        gates: (B, T, K + 1), or (B, T, *grid, K + 1) of tokens; K without a memory.
    """

    features: Tensor
    memory: Tensor | None
    gates: Tensor


class TaskLinear(nn.Module):
    """A linear map per task: (B, T, *grid, in_dim) -> (B, T, *grid, out_dim).

    Args:
        num_tasks, in_dim, out_dim: T and the widths.
    """

    def __init__(self, num_tasks: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_tasks, out_dim, in_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_tasks, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2, -2) @ self.weight.mT + self.bias[:, None]
        return y.unflatten(2, x.shape[2:-1])


class MemorialExperts(nn.Module):
    """One layer of the mixture, on any grid.

    Args:
        dim: width of ``x``.
        num_tasks: T.
        num_experts: K.
        expert_dim: width of experts and features; ``dim`` by default.
        memory_dim: width of the memory; ``expert_dim`` by default.
        memory: whether there is one; without, features depend on ``x`` alone.
        gate: ``"image"`` or ``"token"``.
        gate_dim: hidden width of the gates.
        top_k: largest weights that are kept, the others are zero and the sum less than 1; all by default.
        update: how the memory is written: ``"add"`` or ``"gated"``.

    >>> layer = MemorialExperts(8, num_tasks=3, num_experts=4)
    >>> features, memory, gates = layer(torch.randn(2, 6, 5, 8))
    >>> features.shape, memory.shape, gates.shape
    (torch.Size([2, 3, 6, 5, 8]), torch.Size([2, 3, 6, 5, 8]), torch.Size([2, 3, 5]))
    """

    def __init__(
        self,
        dim: int,
        num_tasks: int,
        num_experts: int = 5,
        expert_dim: int | None = None,
        memory_dim: int | None = None,
        memory: bool = True,
        gate: str = "image",
        gate_dim: int = 64,
        top_k: int | None = None,
        update: str = "add",
    ):
        super().__init__()
        self.dim = check_int("dim", dim, least=1)
        self.num_tasks = check_int("num_tasks", num_tasks, least=1)
        self.num_experts = check_int("num_experts", num_experts, least=1)
        self.expert_dim = dim if expert_dim is None else check_int("expert_dim", expert_dim, least=1)
        self.memory_dim = self.expert_dim if memory_dim is None else check_int("memory_dim", memory_dim, least=1)
        check_int("gate_dim", gate_dim, least=1)
        check_choice("gate", gate, GATES)
        check_choice("update", update, UPDATES)
        self.memory, self.gate, self.update = check_flag("memory", memory), gate, update
        count = num_experts + int(memory)
        self.top_k = count if top_k is None else check_int("top_k", top_k, least=1, most=count)
        width = self.expert_dim
        self.experts = nn.Linear(dim, num_experts * width)
        self.expert_scale = nn.Parameter(torch.ones(num_experts, width))
        self.expert_shift = nn.Parameter(torch.zeros(num_experts, width))
        self.gate_in = TaskLinear(num_tasks, count * width, gate_dim)
        self.gate_out = TaskLinear(num_tasks, gate_dim, count)
        self.reader = TaskLinear(num_tasks, self.memory_dim, width) if memory else None
        self.writer = TaskLinear(num_tasks, width, self.memory_dim) if memory else None
        both = memory and update == "gated"
        self.forgetter = TaskLinear(num_tasks, width + self.memory_dim, self.memory_dim) if both else None

    # ---- to override

    def begin(self, x: Tensor) -> Tensor:
        """The memory before the first layer: zeros."""
        return x.new_zeros(len(x), self.num_tasks, *x.shape[1:-1], self.memory_dim)

    def read(self, memory: Tensor) -> Tensor:
        """(B, T, *grid, memory_dim) -> (B, T, *grid, expert_dim), the further expert."""
        assert self.reader is not None
        return self.reader(memory)

    def write(self, memory: Tensor, features: Tensor) -> Tensor:
        """The memory after features of this layer (B, T, *grid, expert_dim)."""
        assert self.writer is not None
        new = self.writer(features)
        if self.forgetter is None:
            return memory + new
        return torch.lerp(memory, new, torch.sigmoid(self.forgetter(torch.cat([memory, features], -1))))

    # ---- the call

    def forward(self, x: Tensor, memory: Tensor | None = None, valid: Tensor | None = None) -> Mixed:
        """(B, *grid, dim) -> :class:`Mixed`.

        Args:
            x: the backbone's tokens.
            memory: (B, T, *grid, memory_dim) of the layer before; :meth:`begin` by default.
            valid: (B, *grid) boolean, which tokens exist: others enter no mean and come out as zeros.
        """
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(f"x must be tokens (B, *grid, {self.dim}) of floating point, got {describe(x)}")
        grid, tasks = x.shape[1:-1], self.num_tasks
        if valid is not None:
            check_valid("valid", valid, x.shape[:-1])
            x = torch.where(valid[..., None], x, 0.0)
        if memory is None:
            memory = self.begin(x) if self.memory else None
        elif not self.memory:
            raise ValueError("this layer was built with memory=False: it takes none")
        elif not isinstance(memory, Tensor) or tuple(memory.shape) != (len(x), tasks, *grid, self.memory_dim):
            want = (len(x), tasks, *grid, self.memory_dim)
            raise ValueError(f"memory must be {want}, got {describe(memory)}; resize it between grids")
        elif valid is not None:
            memory = torch.where(valid[:, None, ..., None], memory, 0.0)
        experts = self.experts(x).unflatten(-1, (self.num_experts, -1))
        experts = F.gelu(F.layer_norm(experts, (self.expert_dim,)) * self.expert_scale + self.expert_shift)
        read = None if memory is None else self.read(memory)
        gates = self._gates(experts, read, valid)
        wide = gates if self.gate == "token" else gates.view(*gates.shape[:2], *[1] * len(grid), gates.shape[-1])
        wide = wide.expand(-1, -1, *grid, -1).to(x.dtype)
        mixed = torch.einsum("btnk,bnkd->btnd", wide[..., : self.num_experts].flatten(2, -2), experts.flatten(1, -3))
        features = mixed.unflatten(2, grid)
        if read is not None:
            features = features + wide[..., self.num_experts :] * read
        written = None if memory is None else self.write(memory, features)
        if valid is not None:
            here = valid[:, None, ..., None]
            features = torch.where(here, features, 0.0)
            written = None if written is None else torch.where(here, written, 0.0)
        return Mixed(features, written, gates)

    def _gates(self, experts: Tensor, read: Tensor | None, valid: Tensor | None) -> Tensor:
        """Weights of all experts, float32 at least."""
        seen = experts.flatten(-2)[:, None]
        if self.gate == "image":
            axes = tuple(range(2, seen.dim() - 1))
            here = None if valid is None else valid[:, None, ..., None].to(seen.dtype)

            def mean(t: Tensor) -> Tensor:
                if here is None:
                    return t.sum(axes) / max(t.shape[2:-1].numel(), 1)
                return (t * here).sum(axes) / here.sum(axes).clamp(min=1)

            seen, read = mean(seen)[:, :, None], None if read is None else mean(read)[:, :, None]
        seen = seen.expand(-1, self.num_tasks, *seen.shape[2:])
        if read is not None:
            seen = torch.cat([seen, read], -1)
        logits = self.gate_out(F.gelu(self.gate_in(seen)))
        logits = logits[:, :, 0] if self.gate == "image" else logits
        weights = logits.to(stats_dtype(logits.dtype)).softmax(-1)
        if self.top_k < weights.shape[-1]:
            kept = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, weights.topk(self.top_k, -1).indices, True)
            weights = torch.where(kept, weights, 0.0)
        return weights
