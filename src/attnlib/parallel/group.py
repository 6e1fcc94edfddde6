"""Processes that share one sequence, each a chunk of it, and an account of what they send each other."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_int, check_tensor, describe

__all__ = ["Group", "Traffic", "Transfer", "gather", "mesh", "shard", "sum_gradients"]


@dataclass(frozen=True)
class Transfer:
    """One collective as this process saw it.

    Args:
        layer: the mechanism that asked for it; empty outside of one.
        phase: ``"forward"`` or ``"backward"``.
        collective: its name in ``torch.distributed``.
        what: what travelled: ``"states"``, ``"keys"``, ``"counts"``, ``"halo"``, ``"tokens"`` or ``"gradients"``.
        bytes: size of the whole: what all processes contributed together.
    """

    layer: str
    phase: str
    collective: str
    what: str
    bytes: int


@dataclass
class Traffic:
    """Every collective since the last :meth:`clear`, in order.

    >>> traffic = Traffic([Transfer("0", "forward", "all_gather", "states", 64)])
    >>> traffic.total(phase="forward"), traffic.total(layer="1")
    (64, 0)
    """

    transfers: list[Transfer] = field(default_factory=list)

    def clear(self) -> None:
        self.transfers.clear()

    def select(self, **fields: str) -> list[Transfer]:
        """Those whose fields are as given."""
        for name in fields:
            if name not in ("layer", "phase", "collective", "what"):
                raise ValueError(f"a transfer has no {name!r}; possible: layer, phase, collective, what")
        return [t for t in self.transfers if all(getattr(t, name) == value for name, value in fields.items())]

    def total(self, **fields: str) -> int:
        """Bytes of those whose fields are as given."""
        return sum(t.bytes for t in self.select(**fields))

    def by_layer(self) -> dict[tuple[str, str, str], int]:
        """Bytes by layer, phase and collective."""
        found: Counter[tuple[str, str, str]] = Counter()
        for t in self.transfers:
            found[t.layer, t.phase, t.collective] += t.bytes
        return dict(found)

    def table(self) -> str:
        """:meth:`by_layer` as text."""
        rows = [(layer or "-", phase, name, str(n)) for (layer, phase, name), n in self.by_layer().items()]
        rows.insert(0, ("layer", "phase", "collective", "bytes"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Pending:
    """A collective under way: ``wait()`` gives its result."""

    def __init__(self, result: Tensor, work: Any):
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


class Group:
    """A process group as attnlib reads it: rank ``t`` holds the chunk number ``t`` of every sequence.

    Args:
        group: a ``torch.distributed`` process group, a :class:`~torch.distributed.device_mesh.DeviceMesh` of one
            dimension (``mesh["sequence"]`` of one with several), a :class:`Group`, or ``None`` for all processes.
        traffic: where its collectives are counted; a new account by default.
    """

    def __init__(self, group: Any = None, traffic: Traffic | None = None):
        #: Name of the layer that speaks.
        self.layer = ""
        self.traffic: Traffic = Traffic() if traffic is None else traffic
        if isinstance(group, Group):
            self.group: Any = group.group
            self.traffic = group.traffic if traffic is None else traffic
        else:
            self.group = _process_group(group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group does not contain this process; every process enters with the group it belongs to")

    def note(self, phase: str, collective: str, what: str, size: int, layer: str | None = None) -> None:
        self.traffic.transfers.append(Transfer(self.layer if layer is None else layer, phase, collective, what, size))

    def all_gather(self, flat: Tensor, what: str, phase: str = "forward", layer: str | None = None) -> Pending:
        """(L,) of every process, as (size, L)."""
        if self.size == 1:
            return Pending(flat.unsqueeze(0).clone(), None)
        out = flat.new_empty(self.size, *flat.shape)
        work = _call("all_gather_single", "all_gather_into_tensor", out.view(-1), flat.contiguous(), self.group)
        self.note(phase, "all_gather", what, out.numel() * out.element_size(), layer)
        return Pending(out, work)

    def reduce_scatter(self, parts: Tensor, what: str, phase: str = "forward", layer: str | None = None) -> Pending:
        """(size, L) of every process, summed over processes; this one gets its (L,)."""
        if self.size == 1:
            return Pending(parts[0].clone(), None)
        out = parts.new_empty(parts.shape[1:])
        work = _call("reduce_scatter_single", "reduce_scatter_tensor", out, parts.contiguous().view(-1), self.group)
        self.note(phase, "reduce_scatter", what, parts.numel() * parts.element_size(), layer)
        return Pending(out, work)

    def all_reduce(self, flat: Tensor, what: str, phase: str = "backward") -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(flat, group=self.group)
            self.note(phase, "all_reduce", what, flat.numel() * flat.element_size())
        return flat

    def chunk_of(self, name: str, length: int) -> int:
        """Tokens of each chunk; ``ValueError`` unless the sequence divides."""
        check_int(name, length, least=1)
        if length % self.size:
            raise ValueError(
                f"{name}={length} does not divide into equal chunks for {self.size} processes; "
                f"pad it to {-(-length // self.size) * self.size} tokens, with valid False for those added"
            )
        return length // self.size

    def __repr__(self) -> str:
        return f"Group(rank={self.rank}, size={self.size})"


def _call(name: str, older: str, out: Tensor, source: Tensor, group: Any) -> Any:
    function = getattr(dist, name, None)
    if function is not None:
        return function(out, source, group=group, async_op=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(dist, older)(out, source, group=group, async_op=True)


def _process_group(group: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group needs torch.distributed to be initialised: call torch.distributed.init_process_group first "
            '("gloo" on CPUs), for example in a script that torchrun starts'
        )
    if group is None:
        return dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):
        return group
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of {group.ndim} dimensions {group.mesh_dim_names}; choose one of them by its name, "
                'such as mesh["sequence"]'
            )
        return group.get_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not contain this process; every process enters with the group it belongs to")
    raise TypeError(f"group must be a process group, a DeviceMesh, a Group or None, got {describe(group)}")


def mesh(sequence: int, device_type: str = "cpu") -> Any:
    """A mesh ``("data", "sequence")`` of all processes; neighbouring ranks share a sequence.

    Args:
        sequence: processes that share a sequence; must divide the number of processes.
        device_type: of the mesh, ``"cpu"`` or ``"cuda"``.
    """
    from torch.distributed.device_mesh import init_device_mesh

    check_int("sequence", sequence, least=1)
    _process_group(None)
    world = dist.get_world_size()
    if world % sequence:
        possible = [s for s in range(1, world + 1) if world % s == 0]
        raise ValueError(f"sequence={sequence} does not divide the {world} processes; possible: {possible}")
    return init_device_mesh(device_type, (world // sequence, sequence), mesh_dim_names=("data", "sequence"))


def shard(x: Tensor, group: Any = None, axis: int = 1) -> Tensor:
    """The chunk of ``x`` that belongs to this process; its gradient is zero outside of it.

    Args:
        x: the whole tensor, the same in every process.
        group: as :class:`Group` takes it.
        axis: of the tokens; ``ValueError`` unless they divide.
    """
    group = Group(group)
    check_tensor("x", x)
    _check_axis(x, axis)
    n = group.chunk_of(f"x.shape[{axis}]", x.shape[axis])
    return x.narrow(axis, group.rank * n, n)


def gather(x: Tensor, group: Any = None, axis: int = 1) -> Tensor:
    """The whole tensor from chunks of equal length, in every process.

    The gradient of a chunk is the sum of the gradients that all processes have for it.
    """
    group = Group(group)
    check_tensor("x", x)
    _check_axis(x, axis)
    moved = x.movedim(axis, 0).contiguous()
    out = Gather.apply(group, "tokens", moved.reshape(-1))
    return out.reshape(group.size * moved.shape[0], *moved.shape[1:]).movedim(0, axis)


def _check_axis(x: Tensor, axis: int) -> None:
    if not -x.dim() <= check_int("axis", axis) < x.dim():
        raise ValueError(f"axis={axis} is not possible for x of shape {tuple(x.shape)}")


class Gather(torch.autograd.Function):
    """(L,) of every process as (size, L); backwards, the sum of what all processes say about one's own."""

    @staticmethod
    def forward(ctx: Any, group: Group, what: str, flat: Tensor) -> Tensor:
        ctx.group, ctx.what, ctx.layer = group, what, group.layer
        return group.all_gather(flat, what).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, ctx.group.reduce_scatter(grad, ctx.what, "backward", ctx.layer).wait()


def sum_gradients(parameters: nn.Module | Iterable[Tensor], group: Any = None) -> None:
    """Add up the gradients of all processes, in one collective for each type: what one process would have got.

    Each process has the gradient of the loss of its own chunk. A loss that is a mean over all tokens is the sum over
    processes of each chunk's sum, divided by the number of all tokens.
    """
    group = Group(group)
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    wanted = [p for p in parameters if p.requires_grad]
    for p in wanted:
        if p.grad is None:  # here unused, perhaps not elsewhere
            p.grad = torch.zeros_like(p)
    for dtype in dict.fromkeys(p.dtype for p in wanted):
        grads = [p.grad for p in wanted if p.dtype == dtype and p.grad is not None]
        flat = group.all_reduce(torch.cat([g.reshape(-1) for g in grads]), "gradients")
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


def pack(*tensors: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """One flat tensor of several, and what takes (.., L) apart again."""
    shapes = [t.shape for t in tensors]

    def unpack(flat: Tensor) -> list[Tensor]:
        parts = flat.split([s.numel() for s in shapes], -1)
        return [p.reshape(*flat.shape[:-1], *s) for p, s in zip(parts, shapes, strict=True)]

    return torch.cat([t.reshape(-1) for t in tensors]), unpack
