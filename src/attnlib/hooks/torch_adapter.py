"""Sites of plain PyTorch models: ``torch.nn.MultiheadAttention``, timm's attention, and attnlib's own mechanisms.

The forward of an attached module is replaced on the module itself. ``nn.MultiheadAttention`` and timm's modules then
run inside a ``TorchFunctionMode``: the one call of ``scaled_dot_product_attention`` in them is where the stages act.
Where the module would not have called it (fused kernels of evaluation mode, ``need_weights=True``, timm without fused
attention) and no stage changed anything, the module's own forward runs once more and gives the untouched output, bit
for bit.

``nn.TransformerEncoderLayer`` has a fused path in evaluation mode that calls no attention module at all, and
``nn.TransformerEncoder`` packs padded batches for it. Both are turned off around attached layers; what remains is their
ordinary path, which agrees with the fused one to rounding, and leaves values instead of zeros at padded positions.

Mechanisms of attnlib are served by :mod:`attnlib.hooks.native_adapter`. A module serves what its mathematics allows,
and refuses other stages by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .core import ATTENTION_STAGES, Adapter, PairMask, Session, Site, Stages, run_attention, weight_rows


class Intercept(TorchFunctionMode):
    """Hands the attention call inside it to ``run``, or each of the ``calls`` that are known."""

    def __init__(self, run: Callable[..., Tensor], where: str, what: str, calls: int = 1):
        super().__init__()
        self.run, self.where, self.what, self.calls = run, where, what, calls
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.count += 1
            if self.count > self.calls:
                times = "once" if self.calls == 1 else f"{self.calls} times"
                raise ValueError(
                    f"{self.where}: {self.what} computes attention more than {times} per call; a description of its "
                    "branches is missing"
                )
            return self.run(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            # It would hide the call inside it: a function mode is off while it handles a function. This is the same
            # code with another function under that name.
            names = {**func.__globals__, "has_torch_function": _never, "scaled_dot_product_attention": self._attend}
            func = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        return func(*args, **(kwargs or {}))

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.__torch_function__(F.scaled_dot_product_attention, (), args, kwargs)


def _never(tensors: Any) -> bool:
    return False


def pair_mask(mask: Tensor | None, n: int, m: int, causal: bool, floor: float | None = None) -> PairMask:
    """What a mask given to ``scaled_dot_product_attention`` says; values at most ``floor`` mean "no"."""
    if mask is None:
        return PairMask(n, m, causal=causal)
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    mask = mask.expand(*mask.shape[:2], n, m)
    if mask.dtype == torch.bool:
        return PairMask(n, m, allowed=mask)
    if floor is None:
        return PairMask(n, m, bias=mask)
    allowed = mask > floor
    finite = mask.masked_fill(~allowed, 0.0)
    return PairMask(n, m, allowed=allowed, bias=finite if bool((finite != 0).any()) else None)


class ModuleRuntime:
    """Stages of one attention module whose forward was replaced; a family fills in :meth:`attend`."""

    #: Stages that this family serves.
    serves: ClassVar[frozenset[str]] = frozenset(ATTENTION_STAGES) - {"on_cache"} | {
        "around_sublayer", "on_block_input", "on_context",
    }  # fmt: skip

    def __init__(self, session: Session, site: Site, stages: Stages, frame: dict[str, Any]):
        self.session, self.site, self.stages, self.frame = session, site, stages, frame
        self.module: Any = site.module
        self.forward = self.module.forward
        self.check()

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

            @functools.wraps(self.forward)
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self.run(*args, **kwargs)

            self.session.set_attribute(self.module, "forward", forward)
            # A hook is what PyTorch's fused paths look for before they bypass a module.
            self.session.hook(self.module.register_forward_pre_hook(lambda module, args: None))

    # ---- one call

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """``around_sublayer`` of all interventions around ``call``; (B, N, C) in and out."""
        chain = call
        for i in reversed(self.stages["around_sublayer"]):
            chain = functools.partial(_around, i, site, chain)
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
        """Run ``call`` with the stages in its attention: (its result, something was changed, the edited weights)."""
        seen: dict[str, Any] = {}

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
            pair = pair_mask(attn_mask, q.shape[2], k.shape[2], is_causal, floor=torch.finfo(q.dtype).min / 2)
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

            out = run_attention(site, q, k, v, stages, kernel)
            same = len(calls) == 1 and all(a is b for a, b in zip(calls[0], (query, key, value, out), strict=True))
            seen.update(changed=not same, site=site, q=q, k=k, pair=pair)
            return out

        with Intercept(attend, self.where, type(self.module).__name__) as intercept:
            result = call()
        if not intercept.count:
            raise ValueError(
                f"{self.where}: {type(self.module).__name__} did not call torch's scaled_dot_product_attention, so "
                "nothing could act there"
            )

        def weights() -> Tensor:
            rows = torch.arange(seen["q"].shape[2], device=seen["q"].device)
            return weight_rows(seen["site"], seen["q"], seen["k"], rows, seen["pair"], self.stages.edits)[0]

        return result, seen["changed"], weights


def _around(intervention: Any, site: Site, inner: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return intervention.around_sublayer(site, hidden, inner)


def _quiet(active: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Leave the random state as it is, where a module with dropout may run twice."""
    return torch.random.fork_rng([device] if device.type == "cuda" else []) if active else nullcontext()


# --------------------------------------------------------------------------------------------------------------------
# torch.nn.MultiheadAttention


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

        def describe(q: Tensor, k: Tensor, pair: PairMask) -> Site:
            # Learned and zero keys stand nowhere in the sequence.
            extra = module.bias_k is not None or module.add_zero_attn
            where = {"k_pos": None} if extra else {}
            return self.described(q.shape[0], q.shape[2], k.shape[2], q.device, pair, kind=kind, **where)

        # PyTorch's own fused kernel, or the one that gives weights, is what the untouched module would have run.
        other = need_weights or (
            not module.training
            and query is key
            and module.batch_first
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, *module.parameters())))
        )
        with _quiet(bool(other and module.training and module.dropout), query.device):
            (out, _), changed, weights = self.intercepted(
                lambda: self.forward(query, key, value, **{**given, "need_weights": False}), describe
            )
        if not changed:
            return self.forward(query, key, value, **given) if other else (out, None)
        if not need_weights:
            return out, None
        edited = weights().to(out.dtype)
        return out, edited.mean(1) if average else edited


# --------------------------------------------------------------------------------------------------------------------
# timm


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
            from .transformers_adapter import swap_sources

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

        def describe(q: Tensor, k: Tensor, pair: PairMask) -> Site:
            return self.described(q.shape[0], q.shape[2], k.shape[2], q.device, pair, rotary=rope is not None or None)

        before = module.__dict__.get("fused_attn")
        module.fused_attn = True
        try:
            with _quiet(bool(not fused and module.training and drop), x.device):
                out, changed, _ = self.intercepted(lambda: self.forward(x, *rest, **kwargs), describe)
        finally:
            if before is None:
                module.__dict__.pop("fused_attn", None)
            else:
                module.fused_attn = before
        return out if changed or fused else self.forward(x, *rest, **kwargs)


# --------------------------------------------------------------------------------------------------------------------
# The family


def _runtime_of(module: nn.Module) -> type[ModuleRuntime] | None:
    from ..nn.base import Mechanism

    if isinstance(module, Mechanism):
        from .native_adapter import MechanismRuntime

        return MechanismRuntime
    if isinstance(module, nn.MultiheadAttention):
        return MultiheadRuntime
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


def _block(model: nn.Module, site: Site) -> nn.Module | None:
    from .transformers_adapter import block_of

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


class ModuleAdapter(Adapter):
    """Replaced forwards of attention modules; token types from integer inputs or as they were given."""

    name = "PyTorch"
    stages: ClassVar[frozenset[str]] = ModuleRuntime.serves | {"on_logits", "on_step"}

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        root, prefix = model, ""
        if part is not None:
            try:
                root, prefix = model.get_submodule(part), part + "."
            except AttributeError as error:
                names = [n for n, _ in model.named_modules() if n and n.count(".") < 2]
                raise ValueError(f"part={part!r} is not in {type(model).__name__}; it has {names}") from error
        found = attention_modules(root)
        if not found:
            raise TypeError(f"part={part!r} of {type(model).__name__} has no attention that can be reached")
        sites = []
        for number, (name, module, _) in enumerate(found):
            last = name.rpartition(".")[2]
            cross = any(word in last.lower() for word in ("cross", "multihead_attn", "encoder_attn"))
            cross = cross or (isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim)
            heads: Any = getattr(module, "num_heads", None)
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
        frame: dict[str, Any] = {}
        self._follow(session, frame)
        attached = set()
        for site, stages in plan:
            family = _runtime_of(site.module)
            assert family is not None
            runtime = family(session, site, stages, frame)
            runtime.install()
            attached.add(site.module)
            if stages["on_block_input"]:
                block = _block(session.model, site)
                assert block is not None
                session.hook(block.register_forward_pre_hook(_BlockInput(runtime), with_kwargs=True))
        for module in session.model.modules():
            if isinstance(module, nn.TransformerEncoder) and attached & set(module.modules()):
                session.set_attribute(module, "use_nested_tensor", False)

    @staticmethod
    def _follow(session: Session, frame: dict[str, Any]) -> None:
        model = session.model
        generates = callable(getattr(model, "_get_logits_processor", None))
        follows = bool(session.acting("on_logits") or session.acting("on_step")) and generates
        if generates:
            from .transformers_adapter import _Follow, _processors

            session.counts_steps = True
            if follows:
                session.set_attribute(model, "_get_logits_processor", _processors(session))
            watch = _Follow(session, follows)

            def look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                cache: Any = kwargs.get("past_key_values")
                frame["offset"] = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
                watch(model, args, kwargs)

            session.hook(model.register_forward_pre_hook(look, with_kwargs=True))
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


__all__ = ["Intercept", "ModuleAdapter", "ModuleRuntime", "attention_modules", "is_timm_attention", "pair_mask"]
