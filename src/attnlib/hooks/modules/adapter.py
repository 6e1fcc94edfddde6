"""Sites of plain PyTorch models: ``torch.nn.MultiheadAttention``, timm's attention, and attnlib's own mechanisms.

The vision encoder of transformers' SAM, which looks no function up, is served here too
(:mod:`attnlib.hooks.modules.sam`).

The forward of an attached module is replaced on the module itself. ``nn.MultiheadAttention`` and timm's modules then
run inside a ``TorchFunctionMode``: the one call of ``scaled_dot_product_attention`` in them is where the stages act.
Where the module would not have called it (fused kernels of evaluation mode, ``need_weights=True``, timm without fused
attention) and no stage changed anything, the module's own forward runs once more and gives the untouched output, bit
for bit.

``nn.TransformerEncoderLayer`` has a fused path in evaluation mode that calls no attention module at all, and
``nn.TransformerEncoder`` packs padded batches for it. Both are turned off around attached layers; what remains is their
ordinary path, which agrees with the fused one to rounding, and leaves values instead of zeros at padded positions.

Mechanisms of attnlib are served by :mod:`attnlib.hooks.modules.native`. A module serves what its mathematics allows,
and refuses other stages by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..blocks import AfterFeedForward
from ..hf.follow import _Follow, follow_generate
from ..hf.names import PROCESSORS, cached_tokens, fused_sam_forward
from ..intervention import Stages
from ..session import Adapter, Session, part_of
from ..site import Site
from .multihead import MultiheadRuntime
from .runtime import ModuleRuntime, _block
from .sam import SamRuntime
from .timm import TimmRuntime, is_timm_attention


def _runtime_of(module: nn.Module) -> type[ModuleRuntime] | None:
    from ...nn.base import Mechanism

    if isinstance(module, Mechanism):
        from .native import MechanismRuntime

        return MechanismRuntime
    if isinstance(module, nn.MultiheadAttention):
        return MultiheadRuntime
    if fused_sam_forward(module) is not None:
        return SamRuntime
    return TimmRuntime if is_timm_attention(module) else None


def attention_modules(root: nn.Module) -> list[tuple[str, nn.Module, type[ModuleRuntime]]]:
    """Attention modules that can be acted on, outermost only: ``(path, module, family)`` in the order of the model."""
    found: list[tuple[str, nn.Module, type[ModuleRuntime]]] = []
    for name, module in root.named_modules():
        family = _runtime_of(module)
        inside = any(outer == "" or name.startswith(outer + ".") for outer, _, _ in found)
        if family is not None and not (found and inside):
            found.append((name, module, family))
    return found


class ModuleAdapter(Adapter):
    """Replaced forwards of attention modules; token types from integer inputs or as they were given."""

    name = "PyTorch"
    stages: ClassVar[frozenset[str]] = ModuleRuntime.serves | {"on_logits", "on_step"}

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        root, prefix = part_of(model, part)
        found = attention_modules(root)
        if not found:
            raise TypeError(f"part={part!r} of {type(model).__name__} has no attention that can be reached")
        sites = []
        for number, (name, module, _) in enumerate(found):
            last = name.rpartition(".")[2]
            cross = any(word in last.lower() for word in ("cross", "multihead_attn", "encoder_attn"))
            cross = cross or (isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim)
            heads: Any = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
            heads = heads if isinstance(heads, int) else 1
            kv_heads: Any = getattr(module, "num_kv_heads", None)
            head_dim: Any = getattr(module, "head_dim", 0)
            sites.append(
                Site(
                    layer=number,
                    name=(prefix + name).rstrip(".") or type(module).__name__,
                    module=module,
                    kind="cross" if cross else "self",
                    heads=heads,
                    kv_heads=kv_heads if isinstance(kv_heads, int) else heads,
                    head_dim=head_dim if isinstance(head_dim, int) else 0,
                )
            )
        return sites

    def install(self, session: Session, plan: list[tuple[Site, Stages]]) -> None:
        self._follow(session)
        attached, runtimes = set(), []
        for site, stages in plan:
            family = _runtime_of(site.module)
            assert family is not None
            runtime = family(session, site, stages)
            runtime.install()
            runtimes.append(runtime)
            attached.add(site.module)
            if stages["on_block_input"]:
                block = _block(session.model, site)
                assert block is not None
                session.hook(block.register_forward_pre_hook(_BlockInput(runtime), with_kwargs=True))
        AfterFeedForward.install(session, runtimes)
        for module in session.model.modules():
            if isinstance(module, nn.TransformerEncoder) and attached & set(module.modules()):
                session.set_attribute(module, "use_nested_tensor", False)

    @staticmethod
    def _follow(session: Session) -> None:
        model = session.model
        generates = callable(getattr(model, PROCESSORS, None))
        follows = bool(session.acting("on_logits") or session.acting("on_step")) and generates
        if generates:
            session.counts_steps = True
            follow_generate(session)
            watch = _Follow(session, follows)

            def look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                session.frame["offset"] = cached_tokens(kwargs)
                watch(model, args, kwargs)

            session.hook(model.register_forward_pre_hook(look, with_kwargs=True))
            session.hook(model.register_forward_hook(watch.after))
        elif session.tracker is not None:
            session.hook(model.register_forward_pre_hook(_types(session), with_kwargs=True))


class _BlockInput:
    """``on_block_input`` before a block that reads (B, N, C), (N, B, C) or (B, *grid, C)."""

    def __init__(self, runtime: ModuleRuntime):
        self.runtime = runtime

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runtime = self.runtime
        name = next(iter(inspect.signature(block.forward).parameters))
        hidden = args[0] if args else kwargs.get(name)
        if not isinstance(hidden, Tensor) or hidden.dim() < 3:
            raise ValueError(f"{runtime.where}: the input of its block is not a tensor (B, N, C)")
        second = isinstance(runtime.module, nn.MultiheadAttention) and not runtime.module.batch_first
        grid = None if hidden.dim() == 3 else hidden.shape[1:-1]
        flat = hidden.transpose(0, 1) if second else hidden.flatten(1, -2)
        edited = flat
        site = runtime.described(
            flat.shape[0], flat.shape[1], runtime.frame.get("offset", 0) + flat.shape[1], flat.device, None,
            offset=runtime.frame.get("offset", 0),
        )  # fmt: skip
        for i in runtime.stages["on_block_input"]:
            new = i.on_block_input(site, edited)
            edited = edited if new is None else new
        if edited is flat:
            return None
        new = edited.transpose(0, 1) if second else edited if grid is None else edited.unflatten(1, grid)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})


def _types(session: Session) -> Callable[..., None]:
    """Token types of a model without a cache: from its integer input, or as they were given."""

    def follow(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tracker = session.tracker
        assert tracker is not None
        integers = [
            t for t in (*args, *kwargs.values())
            if isinstance(t, Tensor) and t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool
        ]  # fmt: skip
        if isinstance(tracker.source, Tensor):
            tracker.advance(None, 0, tracker.source.shape[1], None)
        else:
            ids = integers[0] if integers else None
            tracker.advance(ids, 0, 0 if ids is None else ids.shape[1], None)

    return follow
