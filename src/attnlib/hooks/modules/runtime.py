"""One attached attention module of a plain PyTorch model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..blocks import around, block_of
from ..eager import eagerly
from ..intercept import Intercept, Seen, staged
from ..intervention import ATTENTION_STAGES, Stages
from ..recompute import Shared
from ..session import Session
from ..site import PairMask, Site


class ModuleRuntime(Shared):
    """Stages of one attention module whose forward was replaced; a family fills in :meth:`attend`."""

    #: Stages that this family serves.
    serves: ClassVar[frozenset[str]] = frozenset(ATTENTION_STAGES) - {"on_cache"} | {
        "around_sublayer", "on_block_input", "on_context", "on_mlp_output",
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

    def intercepted(self, call: Callable[[], Any], describe: Callable[..., Site]) -> tuple[Any, Seen]:
        """Run ``call`` with the stages in its attention: its result, and what became of that attention."""
        seen: list[Seen] = []
        what = type(self.module).__name__
        attend = staged(self.where, what, self.stages, describe, seen)
        result = Intercept(attend, self.where, what).around(call)
        return result, seen[0]


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
