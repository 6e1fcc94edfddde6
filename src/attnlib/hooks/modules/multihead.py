"""Sites of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..site import PairMask, Site
from .runtime import ModuleRuntime, _block, _check_sources, _quiet


class MultiheadRuntime(ModuleRuntime):
    """``torch.nn.MultiheadAttention``, batch first or second, with any of its masks."""

    module: nn.MultiheadAttention

    def unserved(self, stage: str) -> str | None:
        if stage == "on_block_input":
            return None if _block(self.session.model, self.site) is not None else "it is not inside a numbered block"
        return super().unserved(stage)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
        if query.is_nested or query.dim() != 3:
            kind = "nested" if query.is_nested else f"rank {query.dim()}"
            raise ValueError(f"{self.where}: its query is {kind}, sites need batches (B, N, C) or (N, B, C)")
        shared = query is key, key is value
        kind = "self" if shared[0] else "cross"
        if self.stages["on_context"]:
            site = self.described(
                key.shape[0 if self.module.batch_first else 1], 0, key.shape[1 if self.module.batch_first else 0],
                key.device, None, kind=kind,
            )  # fmt: skip
            k_source, v_source = self.turn(key), self.turn(value)
            for i in self.stages["on_context"]:
                k_source, v_source = i.on_context(site, k_source, v_source)
            _check_sources(self, k_source, v_source, self.turn(key))
            key, value = self.turn(k_source), self.turn(v_source)
            if shared[1] and k_source is v_source:
                value = key
        if not self.stages["around_sublayer"]:
            return self.attend(query, key, value, given, kind)
        hidden = self.turn(query)
        outputs: list[Any] = []

        def call(x: Tensor) -> Tensor:
            new = query if x is hidden else self.turn(x)
            same = shared[0] and key is given_key
            outputs.append(self.attend(new, *((new, new) if same and shared[1] else (key, value)), given, kind))
            return self.turn(outputs[-1][0])

        given_key = query if shared[0] else key
        site = self.described(hidden.shape[0], hidden.shape[1], self.turn(key).shape[1], hidden.device, None, kind=kind)
        result = self.sublayer(site, hidden, call)
        return self.turn(result), outputs[0][1] if outputs else None

    def turn(self, x: Tensor) -> Tensor:
        """Between the module's order of axes and (B, N, C)."""
        return x if self.module.batch_first else x.transpose(0, 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any], kind: str) -> Any:
        if not self.stages.in_attention:
            return self.forward(query, key, value, **given)
        module = self.module
        need_weights, average = given.get("need_weights", True), given.get("average_attn_weights", True)

        def describe(q: Tensor, k: Tensor, pair: PairMask, **fields: Any) -> Site:
            # Learned and zero keys stand nowhere in the sequence.
            extra = module.bias_k is not None or module.add_zero_attn
            where = {"k_pos": None} if extra else {}
            return self.described(q.shape[0], q.shape[2], k.shape[2], q.device, pair, kind=kind, **where, **fields)

        # PyTorch's own fused kernel, or the one that gives weights, is what the untouched module would have run.
        other = need_weights or (
            not module.training
            and query is key
            and module.batch_first
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, *module.parameters())))
        )
        alone = {**given, "need_weights": False}
        if need_weights and given.get("attn_mask") is not None:
            # Asked for weights the module reads its mask; else the hint hides learned and zero keys, too.
            alone["is_causal"] = False
        with _quiet(bool(other and module.training and module.dropout), query.device):
            (out, _), seen = self.intercepted(lambda: self.forward(query, key, value, **alone), describe)
        if not seen.changed:
            return self.forward(query, key, value, **given) if other else (out, None)
        if not need_weights:
            return out, None
        edited = seen.weights().to(out.dtype)
        return out, edited.mean(1) if average else edited
