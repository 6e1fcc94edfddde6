"""Sites of SAM's vision encoder and its relatives of the same attention: windows of a grid, biased by relative place.

Tokens of a window are a row of the batch: queries and keys are (B windows, H, N, D). The fused kernel of the same
module is where the stages act; a module that computes its weights itself keeps its output where nothing changed it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..hf.names import fused_sam_forward
from ..site import PairMask, Site
from .runtime import ModuleRuntime, _block


class SamRuntime(ModuleRuntime):
    """One attention of transformers' ``SamVisionEncoder``, fused or not."""

    def unserved(self, stage: str) -> str | None:
        if stage == "on_block_input":
            return None if _block(self.session.model, self.site) is not None else "it is not inside a numbered block"
        if stage == "on_context":
            return "queries, keys and values come from one projection (qkv)"
        return super().unserved(stage)

    def run(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.stages["around_sublayer"]:
            return self.attend(hidden_states, args, kwargs)
        b, h, w, _ = hidden_states.shape
        site = self.described(b, h * w, h * w, hidden_states.device, None)
        weights: list[Any] = []

        def call(hidden: Tensor) -> Tensor:
            out, found = self.attend(hidden.unflatten(1, (h, w)), args, kwargs)
            weights.append(found)
            return out.flatten(1, 2)

        out = self.sublayer(site, hidden_states.flatten(1, 2), call)
        return out.unflatten(1, (h, w)), weights[-1] if weights else None

    def attend(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.stages.in_attention:
            return self.forward(x, *args, **kwargs)
        module = self.module
        if module.training and module.dropout and (self.stages.edits or self.stages["around_attention"]):
            raise ValueError(f"{self.where}: attention dropout {module.dropout} is active; call model.eval()")
        fused = fused_sam_forward(module)
        assert fused is not None
        own = fused is getattr(type(module), "forward", None)

        def describe(q: Tensor, k: Tensor, pair: PairMask, **fields: Any) -> Site:
            return self.described(q.shape[0], q.shape[2], k.shape[2], q.device, pair, **fields)

        out, seen = self.intercepted(
            (lambda: self.forward(x, *args, **kwargs)) if own else (lambda: fused(module, x)), describe
        )
        if own:
            return out
        if not seen.changed:
            return self.forward(x, *args, **kwargs)
        return out[0], seen.weights().to(x.dtype).flatten(0, 1)
