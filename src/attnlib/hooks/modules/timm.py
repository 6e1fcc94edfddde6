"""Sites of timm's attention."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..site import PairMask, Site
from .runtime import ModuleRuntime, _block, _quiet


def is_timm_attention(module: nn.Module) -> bool:
    """Whether a module has the shape of timm's attention: heads, a choice of fused attention, one or three projections.

    timm need not be installed for it.
    """
    projections = hasattr(module, "qkv") or all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj"))
    return (
        isinstance(getattr(module, "num_heads", None), int)
        and isinstance(getattr(module, "fused_attn", None), bool)
        and projections
        and hasattr(module, "proj")
    )


class TimmRuntime(ModuleRuntime):
    """timm's ``Attention`` and its relatives of the same shape, fused or not."""

    def unserved(self, stage: str) -> str | None:
        if stage == "on_block_input":
            return None if _block(self.session.model, self.site) is not None else "it is not inside a numbered block"
        if stage == "on_context" and not self._separate():
            return "queries, keys and values come from one projection (qkv)"
        return super().unserved(stage)

    def _separate(self) -> bool:
        return all(isinstance(getattr(self.module, name, None), nn.Module) for name in ("k_proj", "v_proj"))

    def install(self) -> None:
        super().install()
        if self.stages["on_context"]:
            from ..blocks import swap_sources

            swap_sources(
                self.session, self.stages,
                lambda source: self.described(source.shape[0], 0, source.shape[1], source.device, None),
                self.module.k_proj, self.module.v_proj,
            )  # fmt: skip

    def run(self, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(inspect.unwrap(type(self.module).forward)).parameters)[1:]
        if not args:
            args, kwargs = (kwargs[names[0]],), {k: v for k, v in kwargs.items() if k != names[0]}
        x, rest = args[0], args[1:]
        rope = {**dict(zip(names[1:], rest, strict=False)), **kwargs}.get("rope")
        if not self.stages["around_sublayer"]:
            return self.attend(x, rest, kwargs, rope)
        if x.dim() != 3:
            raise ValueError(f"{self.where}: its input has rank {x.dim()}, not (B, N, C)")
        site = self.described(x.shape[0], x.shape[1], x.shape[1], x.device, None, rotary=rope is not None or None)
        return self.sublayer(site, x, lambda hidden: self.attend(hidden, rest, kwargs, rope))

    def attend(self, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any], rope: Any) -> Any:
        if not self.stages.in_attention:
            return self.forward(x, *rest, **kwargs)
        module = self.module
        fused = bool(module.fused_attn)
        drop = getattr(getattr(module, "attn_drop", None), "p", 0.0)

        def describe(q: Tensor, k: Tensor, pair: PairMask, **fields: Any) -> Site:
            rotary = rope is not None or None
            return self.described(q.shape[0], q.shape[2], k.shape[2], q.device, pair, rotary=rotary, **fields)

        before = module.__dict__.get("fused_attn")
        module.fused_attn = True
        try:
            with _quiet(bool(not fused and module.training and drop), x.device):
                out, seen = self.intercepted(lambda: self.forward(x, *rest, **kwargs), describe)
        finally:
            if before is None:
                module.__dict__.pop("fused_attn", None)
            else:
                module.fused_attn = before
        return out if seen.changed or fused else self.forward(x, *rest, **kwargs)
