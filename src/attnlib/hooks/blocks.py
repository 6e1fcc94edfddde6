"""Blocks around attention, and what keys and values are projected from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

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
    session: Session,
    stages: Stages,
    site: Callable[[Tensor], Site],
    to_k: nn.Module,
    to_v: nn.Module,
    same_length: bool = False,
) -> None:
    """Let ``on_context`` choose what the two projections read; whichever is called first asks.

    Args:
        same_length: as many tokens must come back.
    """
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
            if same_length and new.shape != source.shape:
                raise ValueError(
                    f"on_context returned {name} with {new.shape[1]} tokens; a stream of joint attention keeps its "
                    f"{source.shape[1]}, since they are queries too"
                )
        waiting.clear()
        mine, other, partner = (k_source, v_source, to_v) if projection is to_k else (v_source, k_source, to_k)
        waiting[partner] = other
        return (mine, *args[1:])

    for projection in (to_k, to_v):
        session.hook(projection.register_forward_pre_hook(before))
    session.undo(waiting.clear)


#: Names under which blocks keep their feed-forward, or the last step of it.
FEED_FORWARDS = (
    "mlp", "feed_forward", "ffn", "ff", "feedforward", "block_sparse_moe", "moe", "output.dense", "fc2", "linear2",
)  # fmt: skip

#: What stands between an attention, and a feed-forward, and the residual stream, in blocks that have the second: norms
#: and scales per channel. Without it, a norm behind the attention is the one before the feed-forward.
BEHIND = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("ls1", "ls2"),
    ("layer_scale1", "layer_scale2"),
)

#: Where an attention module keeps its output projection.
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "proj", "out_lin", "wo", "dense", "o")


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def feed_forward_of(model: nn.Module, site: Site) -> nn.Module:
    """The module of a block whose output is what the feed-forward adds to the residual stream.

    Raises:
        ValueError: the attention is in no numbered block, or nothing in the block is known to be a feed-forward.
    """
    block = block_of(model, site)
    for _, behind in BEHIND:
        if (found := _child(block, behind)) is not None:
            return found
    attention = model.get_submodule(site.name)
    for path in FEED_FORWARDS:
        found = _child(block, path)
        if found is None or attention in set(found.modules()):
            continue
        # A residual sublayer of ours: what it adds comes out of its last step.
        return getattr(found, "drop_path", found) if hasattr(found, "inner") else found
    raise ValueError(
        f"layer {site.layer} ({site.name}): no feed-forward is known in its block, a {type(block).__name__} with "
        f"{[name for name, _ in block.named_children()]}; known are {list(FEED_FORWARDS)}"
    )


def projection_of(model: nn.Module, site: Site) -> nn.Module:
    """The output projection of an attention, from its heads side by side to the width of the model.

    Raises:
        ValueError: none is known.
    """
    for name in PROJECTIONS:
        found = _child(site.module, name)
        if found is not None:
            return found
    parent = model.get_submodule(site.name.rpartition(".")[0])
    found = _child(parent, "output.dense")
    if found is not None:
        return found
    raise ValueError(
        f"layer {site.layer} ({site.name}): no output projection is known in {type(site.module).__name__}, which has "
        f"{[name for name, _ in site.module.named_children()]}; known are {list(PROJECTIONS)}"
    )


def behind_projection(model: nn.Module, site: Site) -> nn.Module | None:
    """What stands between the output projection of an attention and the residual stream; ``None`` for nothing."""
    block = block_of(model, site)
    found: nn.Module | None = None
    for behind, sign in BEHIND:
        if _child(block, sign) is not None and found is None:
            found = _child(block, behind)
    own: Any = _child(block, "mixer")
    if found is None and hasattr(own, "inner"):  # a residual sublayer of ours
        found = own.norm if own.post_norm else own.scale
    return None if isinstance(found, nn.Identity) else found


class Runtime(Protocol):
    """What runs the stages of a layer, as far as blocks know it."""

    session: Session
    site: Site
    stages: Stages


class AfterFeedForward:
    """``on_mlp_output`` behind the feed-forward of a block; (B, N, C), (B, *grid, C) seen flat, or (B * N, C)."""

    def __init__(self, runtime: Runtime, interventions: list[Intervention]):
        self.runtime, self.interventions = runtime, interventions
        self.shape: tuple[int, ...] = ()

    def note(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the block: how many samples and tokens it reads, for a feed-forward that sees them in one axis."""
        hidden = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor) and v.dim() == 3), None)
        self.shape = tuple(hidden.shape[:2]) if isinstance(hidden, Tensor) else ()

    @classmethod
    def install(cls, session: Session, runtimes: Sequence[Runtime]) -> None:
        """Behind the feed-forwards of these layers; of the layers of one block each intervention acts at the first."""
        served: set[tuple[nn.Module, Intervention]] = set()
        for runtime in runtimes:
            if runtime.stages["on_mlp_output"]:
                inner = feed_forward_of(session.model, runtime.site)
                new = [i for i in runtime.stages["on_mlp_output"] if (inner, i) not in served]
                served |= {(inner, i) for i in new}
                if new:
                    after = cls(runtime, new)
                    block = block_of(session.model, runtime.site)
                    session.hook(block.register_forward_pre_hook(after.note, with_kwargs=True))
                    session.hook(inner.register_forward_hook(after))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        runtime = self.runtime
        out = output[0] if isinstance(output, tuple) else output
        joined = isinstance(out, Tensor) and out.dim() == 2 and out.shape[0] == math.prod(self.shape or (-1,))
        if joined:
            out = out.unflatten(0, self.shape)
        if not isinstance(out, Tensor) or out.dim() < 3:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"layer {runtime.site.layer} ({runtime.site.name}): its feed-forward gives {got}, not (B, N, C)"
            )
        second = isinstance(runtime.site.module, nn.MultiheadAttention) and not runtime.site.module.batch_first
        grid = out.shape[1:-1]
        flat = out.transpose(0, 1) if second else out.flatten(1, -2)
        site = runtime.session.described(runtime.site, flat.shape[0], n_queries=flat.shape[1])
        edited = flat
        for i in self.interventions:
            edited = i.on_mlp_output(site, edited)
        if edited is flat:
            return None
        if edited.shape != flat.shape:
            raise ValueError(
                f"layer {site.layer} ({site.name}): on_mlp_output must return (B, N, C)={tuple(flat.shape)}, got "
                f"{tuple(edited.shape)}"
            )
        new = edited.transpose(0, 1) if second else edited.unflatten(1, grid)
        new = new.flatten(0, 1) if joined else new
        return (new, *output[1:]) if isinstance(output, tuple) else new
