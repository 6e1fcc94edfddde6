"""Models whose sequence lies on several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..checks import check_int, check_type
from ..nn.base import Fusion, Mechanism
from ..ops import _shards
from .group import Group, Traffic
from .lasp2 import Shards

__all__ = ["check_cuts", "sequence_parallel"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: What lets tokens meet, outside of mechanisms.
_MEET = (*_CONV, nn.MultiheadAttention, nn.RNNBase, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, Fusion)


def check_cuts(model: nn.Module) -> list[str]:
    """Names of the mechanisms of a model; ``ValueError`` where one cannot work on a sequence that is cut.

    Raises:
        ValueError: a mechanism, convolution, recurrence, norm over tokens or foreign attention whose tokens meet by
            other ways than :func:`attnlib.ops.attention` and :func:`attnlib.ops.linear_attention`.
    """
    check_type("model", model, nn.Module)
    found: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, Mechanism):
            what = f"model holds {getattr(module, 'slug', type(module).__name__)!r} at {name or 'its top'!r}, which"
            if not module.cuts_sequence:
                raise ValueError(f"{what} does not serve a sequence that is cut over processes, in these settings")
            if module.reads_length:
                raise ValueError(f"{what} reads the length of the sequence, of which no process holds all")
            found.append(name)
            return
        if isinstance(module, _MEET):
            raise ValueError(
                f"model holds {type(module).__name__} at {name or 'its top'!r}, which lets tokens meet that lie on "
                "several processes; possible are mechanisms on attention and linear_attention, and what works on "
                "every token alone"
            )
        for child, inner in module.named_children():
            visit(f"{name}.{child}" if name else child, inner)

    visit("", model)
    if not found:
        raise ValueError("model holds no attnlib mechanism, so that nothing of it would join the chunks")
    return found


@contextmanager
def sequence_parallel(
    model: nn.Module, length: int, group: Any = None, context_length: int | None = None
) -> Iterator[Traffic]:
    """Inside the block, ``model`` works on one chunk of every sequence, of which other processes hold the rest.

    Linear layers exchange states (LASP-2), softmax layers keys and values (LASP-2H); positions count on from the chunks
    before. Calls and backward passes go on in all processes alike. What they send is counted, layer by layer::

        chunk = shard(tokens)  # the same tokens in every process
        with sequence_parallel(model, length=tokens.shape[1]) as traffic:
            loss = loss_of(model(chunk), shard(targets)) / targets.numel()  # a sum, by all tokens
            loss.backward()
        sum_gradients(model)  # what one process would have got

    Args:
        model: of mechanisms that can; see :func:`check_cuts`. No caches, no states, no document packing.
        length: tokens of the whole sequence, which must divide into equal chunks.
        group: the processes, as :class:`attnlib.parallel.Group` takes them.
        context_length: of what cross-attention reads, which is cut as well.

    Yields:
        The :class:`~attnlib.parallel.Traffic`, with the names that layers have in ``model``.
    """
    names = check_cuts(model)
    shared = Group(group)
    check_int("length", length, least=1)
    shards = Shards(shared, length, context_length)
    modules = dict(model.named_modules())
    handles = []

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            shared.layer = name

        return hook

    def leave(*_: Any) -> None:
        shared.layer = ""

    for name in names:
        handles.append(modules[name].register_forward_pre_hook(enter(name)))
        handles.append(modules[name].register_forward_hook(leave))
    try:
        with _shards.cut_over(shards):
            yield shared.traffic
    finally:
        for handle in handles:
            handle.remove()
