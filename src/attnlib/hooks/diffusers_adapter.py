"""Sites of diffusers models.

An attached attention module gets, in place of its processor, an object of a subclass of that processor's class that
shares its state and runs it inside a ``TorchFunctionMode``: the one call of ``scaled_dot_product_attention`` in it is
where the stages act. This serves every processor that ends in that function, with its own projections, norms, rotary
embedding and order of streams; a kernel that bypasses it is noticed and refused. Unattached modules keep their
processor.

Steps and passes come from the pipeline's own ``cache_context`` or from ``session.at(...)``; rows of a
classifier-free-guidance batch come from the user. Layouts come from the shapes the denoiser was called with.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..grids import Layout
from .core import Adapter, PairMask, Session, Site, Stages, run_attention
from .transformers_adapter import swap_sources

#: In which order a processor concatenates the two streams of joint attention.
JOINT_ORDER = {
    "FluxAttnProcessor": ("text", "image"),
    "FusedFluxAttnProcessor2_0": ("text", "image"),
    "CogVideoXAttnProcessor2_0": ("text", "image"),
    "FusedCogVideoXAttnProcessor2_0": ("text", "image"),
    "JointAttnProcessor2_0": ("image", "text"),
    "FusedJointAttnProcessor2_0": ("image", "text"),
}


def _need() -> Any:
    """diffusers itself; ``ImportError`` says what to install."""
    try:
        import diffusers.models.attention_processor as processors

        return processors
    except ImportError as error:
        raise ImportError("acting on diffusers models needs diffusers: pip install 'attnlib[hf]'") from error


class _Intercept(TorchFunctionMode):
    """Hands the attention call of one processor to the stages."""

    def __init__(self, runtime: ModuleRuntime):
        super().__init__()
        self.runtime = runtime
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.count += 1
            if self.count > 1:
                raise ValueError(
                    f"{self.runtime.where}: {self.runtime.processor} computes attention more than once per call; a "
                    "description of its branches is missing"
                )
            return self.runtime.run(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


#: By attention module, since one processor object may serve many.
_runtimes: weakref.WeakKeyDictionary[nn.Module, ModuleRuntime] = weakref.WeakKeyDictionary()


def _forget(module: nn.Module) -> None:
    _runtimes.pop(module, None)


@functools.cache
def _hooked(cls: Any) -> Any:
    """A subclass of a processor's class that runs it under its module's stages."""

    @functools.wraps(cls.__call__)
    def call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(cls.__call__, self, attn)
        runtime = _runtimes.get(attn)
        return plain(*args, **kwargs) if runtime is None else runtime.around(plain, args, kwargs)

    return type(f"Attached{cls.__name__}", (cls,), {"__call__": call})


class ModuleRuntime:
    """Stages of one attention module, and what is known about its current call."""

    def __init__(self, session: Session, site: Site, stages: Stages, frame: dict[str, Any]):
        self.session, self.site, self.stages, self.frame = session, site, stages, frame
        self.processor = type(site.module.processor).__name__
        signature = inspect.signature(type(site.module.processor).__call__)
        self.names = list(signature.parameters)[2:]
        self.given: dict[str, Any] = {}

    @property
    def where(self) -> str:
        return f"layer {self.site.layer} ({self.site.name})"

    def around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        try:
            with _Intercept(self) as intercept:
                result = call(*args, **kwargs)
        finally:
            self.given = {}
        if not intercept.count:
            raise ValueError(
                f"{self.where}: {self.processor} did not call torch's scaled_dot_product_attention, so nothing could "
                "act "
                "there; use a processor that does (AttnProcessor2_0) and the native attention backend"
            )
        return result

    def run(
        self,
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
            raise ValueError(f"{self.where}: {self.processor} attends over tensors of rank {q.dim()}, not (B, H, N, D)")
        if dropout_p and (stages.edits or stages["around_attention"]):
            raise ValueError(f"{self.where}: attention dropout {dropout_p} is active; call model.eval()")
        n, m = q.shape[2], k.shape[2]
        if attn_mask is None:
            pair = PairMask(n, m, causal=is_causal)
        else:
            mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
            mask = mask.expand(*mask.shape[:2], n, m)
            if mask.dtype == torch.bool:
                pair = PairMask(n, m, allowed=mask)
            else:
                # diffusers writes -10000 for "no": as a bias it means the same.
                pair = PairMask(n, m, bias=mask)
        q_layout, k_layout = self.layouts(n, m)
        site = self.session.described(
            self.site, q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3],
            scale=float(q.shape[3] ** -0.5 if scale is None else scale), n_queries=n, n_keys=m, mask=pair,
            q_pos=torch.arange(n, device=q.device), k_pos=torch.arange(m, device=q.device),
            q_layout=q_layout, k_layout=k_layout, rotary=self.given.get("image_rotary_emb") is not None or None,
        )  # fmt: skip
        for i in stages["on_qkv"]:
            q, k, v = i.on_qkv(site, q, k, v)

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )

        return run_attention(site, q, k, v, stages, kernel)

    def layouts(self, n: int, m: int) -> tuple[Layout | None, Layout | None]:
        """What queries and keys are, from the shapes of the denoiser's inputs."""
        if self.site.kind == "joint":
            order, text = JOINT_ORDER.get(self.processor), self.frame.get("text")
            if order is None or text is None or n != m or text > n:
                return None, None
            sizes = {"text": text, "image": self.grid(n - text)}
            layout = Layout(tuple((name, sizes[name]) for name in order))
            return layout, layout
        image = Layout((("image", self.grid(n)),))
        return (image, image) if self.site.kind == "self" else (image, Layout((("text", m),)))

    def grid(self, tokens: int) -> int | tuple[int, ...]:
        """The image grid of so many tokens: a halving of the latent's sides, or their count when it is none."""
        height, width = self.frame.get("grid", (0, 0))
        while height and width and height * width > tokens:
            height, width = -(-height // 2), -(-width // 2)
        return (height, width) if height and height * width == tokens else tokens


class DiffusersAdapter(Adapter):
    """Interception of processors; layouts, passes and steps from the denoiser's call."""

    name = "diffusers"
    stages: ClassVar[frozenset[str]] = frozenset(
        "on_context on_qkv on_kv_read around_attention on_scores on_weights on_output".split()
    )

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        _need()
        root, prefix = model, ""
        if part is not None:
            try:
                root, prefix = model.get_submodule(part), part + "."
            except AttributeError as error:
                names = [n for n, _ in model.named_modules() if n and n.count(".") < 2]
                raise ValueError(f"part={part!r} is not in {type(model).__name__}; it has {names}") from error
        sites: list[Site] = []
        for name, module in root.named_modules():
            if not (hasattr(module, "processor") and hasattr(module, "set_processor") and hasattr(module, "to_q")):
                continue
            heads = module.heads
            if not isinstance(heads, int):
                continue
            kv_dim = module.to_k.out_features if isinstance(module.to_k, nn.Linear) else None
            q_dim = module.to_q.out_features if isinstance(module.to_q, nn.Linear) else None
            kv_heads = heads * kv_dim // q_dim if kv_dim and q_dim else heads
            sites.append(
                Site(
                    layer=len(sites),
                    name=prefix + name,
                    module=module,
                    kind=self._kind(module),
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=q_dim // heads if q_dim else 0,
                )
            )
        if not sites:
            raise TypeError(
                f"{type(model).__name__} has no attention that can be reached: none of its modules has a diffusers "
                "attention "
                "processor"
            )
        return sites

    @staticmethod
    def _kind(module: nn.Module) -> str:
        if getattr(module, "add_q_proj", None) is not None or type(module).__name__ == "FluxAttention":
            return "joint"
        return "cross" if getattr(module, "is_cross_attention", False) else "self"

    def install(self, session: Session, plan: list[tuple[Site, Stages]]) -> None:
        frame: dict[str, Any] = {}
        session.hook(session.model.register_forward_pre_hook(self._look_at_inputs(session, frame), with_kwargs=True))
        if hasattr(session.model, "cache_context"):
            session.set_attribute(session.model, "cache_context", self._follow_context(session))
        for site, stages in plan:
            module: Any = site.module
            original = module.processor
            if getattr(module, "add_k_proj", None) is not None and site.kind != "joint":
                raise ValueError(
                    f"layer {site.layer} ({site.name}): {type(original).__name__} concatenates text keys to its own; a "
                    "description of that is missing"
                )
            runtime = ModuleRuntime(session, site, stages, frame)
            processor_class: Any = type(original)
            attached: Any = object.__new__(_hooked(processor_class))
            # The same dictionary: what is set on one (a backend, a scale) is set on the other.
            object.__setattr__(attached, "__dict__", original.__dict__)
            _runtimes[module] = runtime
            session.undo(functools.partial(_forget, module))
            if isinstance(original, nn.Module):
                module._modules["processor"] = attached
                session.undo(functools.partial(module._modules.__setitem__, "processor", original))
            else:
                session.set_attribute(module, "processor", attached)
            if stages["on_context"]:
                if site.kind == "joint":
                    raise ValueError(
                        f"layer {site.layer} ({site.name}): joint attention reads two sources; on_context is missing "
                        "there"
                    )
                swap_sources(session, stages, self._source_site(session, site), module.to_k, module.to_v)

    @staticmethod
    def _source_site(session: Session, site: Site) -> Callable[[Tensor], Site]:
        return lambda source: session.described(site, source.shape[0], n_keys=source.shape[1])

    @staticmethod
    def _look_at_inputs(session: Session, frame: dict[str, Any]) -> Callable[..., None]:
        names = list(inspect.signature(inspect.unwrap(type(session.model).forward)).parameters)[1:]

        def look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            frame.clear()
            text = given.get("encoder_hidden_states")
            if isinstance(text, Tensor) and text.dim() == 3:
                frame["text"] = text.shape[1]
            sample = given.get("sample", given.get("hidden_states"))
            ids = given.get("img_ids")
            if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] == 3 and len(ids):
                frame["grid"] = (int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1)
            elif isinstance(sample, Tensor) and sample.dim() == 4:
                frame["grid"] = tuple(sample.shape[-2:])

        return look

    @staticmethod
    def _follow_context(session: Session) -> Callable[..., Any]:
        original: Any = session.model.cache_context

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            with session.at(pass_name=name, step=kwargs.get("step_index")), original(name, **kwargs):
                yield

        return cache_context
