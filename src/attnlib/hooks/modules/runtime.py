"""One attached attention module of a plain PyTorch model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import around, block_of
from ..call import WholeMap, only_map, run_attention
from ..eager import eagerly
from ..intercept import Intercept, pair_mask
from ..intervention import ATTENTION_STAGES, Stages
from ..recompute import Shared
from ..session import Session
from ..site import PairMask, Site


class ModuleRuntime(Shared):
    """Stages of one attention module whose forward was replaced; a family fills in :meth:`attend`."""

    #: Stages that this family serves.
    serves: ClassVar[frozenset[str]] = frozenset(ATTENTION_STAGES) - {"on_cache"} | {
        "around_sublayer", "on_block_input", "on_context",
    }  # fmt: skip

    def __init__(self, session: Session, site: Site, stages: Stages):
        self.session, self.site, self.stages = session, site, stages
        self.module: Any = site.module
        self.forward = self.module.forward
        self.check()

    @property
    def frame(self) -> dict[str, Any]:
        """What is known of the model's call that is running."""
        return self.session.frame

    @property
    def where(self) -> str:
        return f"layer {self.site.layer} ({self.site.name})"

    def unserved(self, stage: str) -> str | None:
        """Why this module cannot serve a stage."""
        return None if stage in self.serves else "nothing in its mathematics is that"

    def check(self) -> None:
        """Refuse by name what the module cannot serve."""
        for stage in [*self.stages.used, *(["probe"] if self.stages.probes else [])]:
            why = self.unserved(stage) if stage != "probe" else self.unserved("on_weights")
            if why and stage not in ("on_logits", "on_step"):
                who = next(type(i).__name__ for i in (self.stages.probes if stage == "probe" else self.stages[stage]))
                raise ValueError(
                    f"{who} needs the stage {stage}, which {type(self.module).__name__} ({self.where}) does not serve: "
                    f"{why}"
                )

    def install(self) -> None:
        if self.stages.in_attention or self.stages["around_sublayer"] or self.stages["on_context"]:
            session, plain = self.session, self.forward

            @functools.wraps(plain)
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not session.active:
                    return plain(*args, **kwargs)  # a wrapper that the user put around it is left
                session.enter()
                return self.run(*args, **kwargs)

            self.session.set_attribute(self.module, "forward", eagerly(forward))
            # A hook is what PyTorch's fused paths look for before they bypass a module.
            self.session.hook(self.module.register_forward_pre_hook(lambda module, args: None))

    # ---- one call

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """``around_sublayer`` of all interventions around ``call``; (B, N, C) in and out."""
        chain = call
        for i in reversed(self.stages["around_sublayer"]):
            chain = functools.partial(around, i, site, chain)
        result = chain(hidden)
        if not isinstance(result, Tensor) or result.shape[:2] != hidden.shape[:2] or result.dim() != 3:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{self.where}: around_sublayer must return (B, N, C), got {got}")
        return result

    def described(self, batch: int, n: int, m: int, device: torch.device, pair: PairMask | None, **fields: Any) -> Site:
        """The site of a call without a cache."""
        offset = fields.get("offset", 0)
        kind = fields.get("kind", self.site.kind)
        fields.setdefault("q_pos", torch.arange(offset, offset + n, device=device))
        k_pos = fields.setdefault("k_pos", torch.arange(m, device=device))
        tracker, q_types, k_types = self.session.tracker, None, None
        if tracker is not None and kind == "self" and isinstance(k_pos, Tensor):
            seen = tracker.upto(max(offset + n, m), batch, device)
            q_types, k_types = seen[:, offset : offset + n], seen[:, :m]
        return self.session.described(
            self.site, batch, n_queries=n, n_keys=m, mask=pair, q_types=q_types, k_types=k_types, **fields
        )

    def intercepted(
        self, call: Callable[[], Any], describe: Callable[[Tensor, Tensor, PairMask], Site]
    ) -> tuple[Any, bool, Callable[[], Tensor]]:
        """Run ``call`` with the stages in its attention: (its result, something was changed, the weights used)."""
        seen: dict[str, Any] = {}
        maps: list[WholeMap] = []

        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            q, k, v, stages = query, key, value, self.stages
            if q.dim() != 4:
                raise ValueError(f"{self.where}: it attends over tensors of rank {q.dim()}, not (B, H, N, D)")
            if dropout_p and (stages.edits or stages["around_attention"]):
                raise ValueError(f"{self.where}: attention dropout {dropout_p} is active; call model.eval()")
            pair = pair_mask(attn_mask, q.shape[2], k.shape[2], is_causal)
            site = describe(q, k, pair).but(
                heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3],
                scale=float(q.shape[3] ** -0.5 if scale is None else scale),
            )  # fmt: skip
            for i in stages["on_qkv"]:
                q, k, v = i.on_qkv(site, q, k, v)
            calls = []

            def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                    enable_gqa=enable_gqa,
                )  # fmt: skip
                calls.append((q, k, v, out))
                return out

            out = run_attention(site, q, k, v, stages, kernel, random=bool(dropout_p), maps=maps)
            same = len(calls) == 1 and all(a is b for a, b in zip(calls[0], (query, key, value, out), strict=True))
            seen.update(changed=not same, site=site)
            return out

        with Intercept(attend, self.where, type(self.module).__name__) as intercept:
            result = call()
        if not intercept.count:
            raise ValueError(
                f"{self.where}: {type(self.module).__name__} did not call torch's scaled_dot_product_attention, so "
                "nothing could act there"
            )

        return result, seen["changed"], lambda: only_map(seen["site"], maps, self.stages)


def _quiet(active: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Leave the random state as it is, where a module with dropout may run twice."""
    return torch.random.fork_rng([device] if device.type == "cuda" else []) if active else nullcontext()


def _block(model: nn.Module, site: Site) -> nn.Module | None:
    try:
        return block_of(model, site)
    except (ValueError, AttributeError):
        return None


def _check_sources(runtime: ModuleRuntime, k_source: Tensor, v_source: Tensor, source: Tensor) -> None:
    for name, new in (("k_source", k_source), ("v_source", v_source)):
        if new.shape[0] != source.shape[0] or new.dim() != 3:
            raise ValueError(
                f"{runtime.where}: on_context returned {name} of shape {tuple(new.shape)}, the module reads "
                f"{tuple(source.shape)}"
            )
