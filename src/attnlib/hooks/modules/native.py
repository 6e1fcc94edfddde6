"""Sites of attnlib's own mechanisms, alone or in any model: tiny models, backbones, ``DecoderForCausalLM``.

Every mechanism serves ``around_sublayer`` and, in a numbered block, ``on_block_input`` and ``on_mlp_output``.
Mechanisms that share the frame of :class:`attnlib.nn.frame.HeadFrame` (projections, rotary positions, cache, one
operator on heads, output projection) also serve ``on_context``, ``on_qkv`` (before rotary positions and before the keys
join the state), ``on_kv_read``, ``around_attention`` and ``on_output``, with their own operator as the kernel. Scores
and weights are those of a softmax only in softmax attention itself; elsewhere edits of them and probes are refused by
name.

States of a mechanism hold the validity of a token once for all heads, so keys cannot leave them head by head:
``on_cache`` is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import masks
from ...nn.base import Mechanism
from ...nn.frame import HeadCall, HeadFrame, Notes
from ...nn.layers import split_heads
from ...normalizers import as_normalizer
from ...positions import as_bias
from ...types import Output
from ..call import WholeMap, only_map, run_attention
from ..intervention import Stages
from ..session import Session
from ..site import PairMask, Site
from .runtime import ModuleRuntime, _block


def _framed(module: nn.Module) -> bool:
    """Whether a mechanism has the frame of softmax attention: its ``mix`` with an operator of its own in it."""
    return isinstance(module, HeadFrame) and type(module).mix is HeadFrame.mix


def _softmax(module: nn.Module) -> bool:
    return (
        _framed(module)
        and type(module)._mix_heads is HeadFrame._mix_heads  # type: ignore[attr-defined]
        and as_normalizer(module.normalizer).name == "softmax"  # type: ignore[arg-type]
    )


class MechanismRuntime(ModuleRuntime):
    """A mechanism of attnlib."""

    everywhere: ClassVar[frozenset[str]] = frozenset({"around_sublayer", "on_block_input", "on_mlp_output"})
    module: Mechanism

    def __init__(self, session: Session, site: Site, stages: Stages):
        super().__init__(session, site, stages)
        self._calls: list[dict[str, Any]] = []

    def unserved(self, stage: str) -> str | None:
        name = self.module._name()
        if stage == "on_block_input":
            return None if _block(self.session.model, self.site) is not None else "it is not inside a numbered block"
        if stage in self.everywhere:
            return None
        if not _framed(self.module):
            return f"{name!r} is not built around one operator on queries, keys and values; possible: around_sublayer"
        if stage in ("on_scores", "on_weights") and not _softmax(self.module):
            return f"the weights of {name!r} are not a softmax over scores"
        return super().unserved(stage)

    def install(self) -> None:
        super().install()
        module: Any = self.module
        if not self.stages.in_attention and not self.stages["on_context"]:
            return
        if self.stages.in_attention:
            self.session.set_attribute(module, "_mix_heads", self._operator(module._mix_heads))
        if self.stages["on_context"]:
            from ..blocks import swap_sources

            def site(source: Tensor) -> Site:
                return self.described(source.shape[0], 0, source.flatten(1, -2).shape[1], source.device, None)

            swap_sources(self.session, self.stages, site, module.k, module.v)
        if self.stages["on_qkv"]:
            for name, projection in (("q", module.q_norm), ("k", module.k_norm), ("v", module.v)):
                self.session.hook(projection.register_forward_hook(self._instead(name)))

    # ---- one call

    def run(self, x: Tensor, context: Tensor | None = None, **call: Any) -> Any:
        returns = call.get("returns", ())
        kind = "self" if context is None else "cross"
        state = call.get("state")
        offset = self._offset(state)
        phase = None
        if kind == "self" and (state is not None or "state" in returns):
            phase = "decode" if state is not None else "prefill"
        frame = {"kind": kind, "offset": offset, "phase": phase, "valid": call.get("valid")}

        def forward(tokens: Tensor) -> Any:
            self._calls.append(dict(frame))
            try:
                if self.stages["on_qkv"]:
                    self._project(tokens, context)
                return self.forward(tokens, context, **call)
            finally:
                self._calls.pop()

        if not self.stages["around_sublayer"]:
            return forward(x)
        grid, hidden = x.shape[1:-1], x.flatten(1, -2)
        outputs: list[Any] = []

        def innermost(new: Tensor) -> Tensor:
            outputs.append(forward(x if new is hidden else new.unflatten(1, grid)))
            y = outputs[-1].y if isinstance(outputs[-1], Output) else outputs[-1]
            return y.flatten(1, -2)

        keys = hidden.shape[1] + offset if context is None else context.flatten(1, -2).shape[1]
        site = self.described(
            hidden.shape[0], hidden.shape[1], keys, hidden.device, None, kind=kind, offset=offset, phase=phase
        )
        result = self.sublayer(site, hidden, innermost)
        if returns and not outputs:
            innermost(hidden)  # later tokens need its state
        y = result.unflatten(1, grid)
        if call.get("valid") is not None:
            y = y.masked_fill(~call["valid"].unsqueeze(-1), 0.0)
        return outputs[0]._replace(y=y) if returns else y

    def _offset(self, state: Any) -> int:
        if state is None:
            return 0
        if "offset" in self.frame:
            return self.frame["offset"]
        return state["k"].shape[2] if "k" in state else 0

    def _project(self, x: Tensor, context: Tensor | None) -> None:
        """Queries, keys and values of the new tokens, through ``on_qkv``; the module takes them instead of its own."""
        module: Any = self.module
        call, source = self._calls[-1], x if context is None else context
        call["own"] = True  # the hooks below let these three pass
        q = module.q_norm(split_heads(module.q(x), module.num_heads))
        k = module.k_norm(split_heads(module.k(source), module.num_kv_heads))
        v = split_heads(module.v(source), module.num_v_heads)
        call["own"] = False
        n, m, offset = q.shape[2], k.shape[2], call["offset"]
        site = self.described(
            q.shape[0], n, m, q.device, None, kind=call["kind"], offset=offset, phase=call["phase"],
            k_pos=torch.arange(offset, offset + m, device=q.device), rotary=None if module.rotary is None else False,
            **self._shape(q, k),
        )  # fmt: skip
        before = q, k, v
        for i in self.stages["on_qkv"]:
            q, k, v = i.on_qkv(site, q, k, v)
        for name, old, new in zip("qkv", before, (q, k, v), strict=True):
            if new.shape != old.shape:
                raise ValueError(
                    f"{self.where}: on_qkv returned {name} of shape {tuple(new.shape)}, not {tuple(old.shape)}"
                )
            if new is not old:
                call[name] = new

    def _instead(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not self._calls or self._calls[-1].get("own") or name not in self._calls[-1]:
                return None
            new = self._calls[-1][name]
            return new if name != "v" else new.transpose(1, 2).reshape(output.shape)

        return hook

    def _shape(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        return dict(heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3], scale=float(self.module.scale))  # type: ignore[arg-type]

    def _operator(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def mix_heads(q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
            frame = self._calls[-1] if self._calls else {"kind": "self", "offset": 0, "phase": None}
            want = call.return_weights
            n, m, stages = q.shape[2], k.shape[2], self.stages
            if call.dropout_p and (stages.edits or stages["around_attention"]):
                raise ValueError(f"{self.where}: attention dropout {call.dropout_p} is active; call model.eval()")
            pair = self._pairs(call, n, m, q.device)
            site = self.described(
                q.shape[0], n, m, q.device, pair, kind=frame["kind"], offset=m - n if frame["offset"] else 0,
                phase=frame["phase"], rotary=None if self.module.rotary is None else True, **self._shape(q, k),
            )  # fmt: skip
            own: list[Tensor] = []
            maps: list[WholeMap] = []

            def operate(q: Tensor, k: Tensor, v: Tensor, call: HeadCall) -> Tensor:
                out = operator(q, k, v, call, notes)
                if want:
                    out, weights = out
                    own.append(weights)
                return out

            def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return operate(q, k, v, call)

            def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None) -> Tensor:
                if bias is None and call.bias is not None and k.shape[2] != m:
                    raise ValueError(f"{self.where}: its position bias is for {m} keys, got {k.shape[2]}")
                alone = call.but(mask=masks.explicit(allowed), valid=None, q_pos=None)
                return operate(q, k, v, alone if bias is None else alone.but(bias=as_bias(bias)))

            out = run_attention(site, q, k, v, stages, kernel, masked, random=bool(call.dropout_p), maps=maps)
            if not want:
                return out
            return out, only_map(site, maps, stages, own).to(out.dtype)

        return mix_heads

    def _pairs(self, call: HeadCall, n: int, m: int, device: torch.device) -> PairMask:
        """The mechanism's mask, validity and bias in one."""
        if not (self.stages.reads_map or self.stages["around_attention"]):
            return PairMask(n, m, opaque=f"{self.where}: its mask was not asked for")
        allowed = None
        if call.mask is not None:
            at = torch.arange(n, device=device) if call.q_pos is None else call.q_pos
            allowed = call.mask.at(at, torch.arange(m, device=device))
            allowed = allowed if allowed.dim() == 4 else allowed[None, None]
        if call.valid is not None:
            exists = call.valid[:, None, None]
            allowed = exists.expand(-1, -1, n, -1) if allowed is None else allowed & exists
        bias = None if call.bias is None else call.bias.dense()
        if bias is not None:
            bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
        return PairMask(n, m, allowed=allowed, bias=bias)
