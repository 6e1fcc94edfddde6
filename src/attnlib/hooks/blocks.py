"""Blocks around attention, and what keys and values are projected from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .intervention import Intervention, Stages
from .session import Session
from .site import Site


def block_of(model: nn.Module, site: Site) -> nn.Module:
    """The numbered block that contains an attention module."""
    parent = site.name.rpartition(".")[0]
    while parent and not parent.rpartition(".")[2].isdigit():
        parent = parent.rpartition(".")[0]
    if not parent:
        raise ValueError(f"layer {site.layer} ({site.name}) is not inside a numbered block, so it has no block input")
    return model.get_submodule(parent)


def around(intervention: Intervention, site: Site, inner: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return intervention.around_sublayer(site, hidden, inner)


def swap_sources(
    session: Session, stages: Stages, site: Callable[[Tensor], Site], to_k: nn.Module, to_v: nn.Module
) -> None:
    """Let ``on_context`` choose what the two projections read; whichever is called first asks."""
    waiting: dict[nn.Module, Tensor] = {}

    def before(projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if projection in waiting:
            return (waiting.pop(projection), *args[1:])
        source = args[0]
        k_source, v_source = source, source
        for i in stages["on_context"]:
            k_source, v_source = i.on_context(site(source), k_source, v_source)
        for name, new in (("k_source", k_source), ("v_source", v_source)):
            if new.shape[0] != source.shape[0] or new.shape[-1] != source.shape[-1]:
                raise ValueError(
                    f"on_context returned {name} of shape {tuple(new.shape)}, the model reads {tuple(source.shape)}"
                )
        waiting.clear()
        mine, other, partner = (k_source, v_source, to_v) if projection is to_k else (v_source, k_source, to_k)
        waiting[partner] = other
        return (mine, *args[1:])

    for projection in (to_k, to_v):
        session.hook(projection.register_forward_pre_hook(before))
    session.undo(waiting.clear)
