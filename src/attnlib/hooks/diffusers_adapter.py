"""Sites of diffusers models.

An attached attention module gets, in place of its processor, an object of a subclass of that processor's class that
shares its state and runs it inside a ``TorchFunctionMode``: the one call of ``scaled_dot_product_attention`` in it is
where the stages act, or that of ``get_attention_scores`` with the product behind it. This serves every processor that
ends in one of them, with its own projections, norms, rotary embedding and order of streams; a kernel that bypasses them
is noticed and refused. Processors of IP-Adapters attend once more for each image prompt: those branches are acted on by
who asks for them (``references``), under ``site.reference``. Unattached modules keep their processor.

Steps, passes and rows of a classifier-free-guidance batch come from the pipeline, where it was attached to
(:mod:`attnlib.hooks.pipelines`), from ``cache_context``, or from the user (``session.at(...)``, ``attach(rows=...)``).
Layouts come from the shapes the denoiser was called with: an image grid for images, one of rank three (frames, height,
width) for videos, both under the name ``"image"``; ``"text"`` beside it in joint attention, in the order in which the
processor lays the two streams out.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grids import Layout
from .blocks import around, block_of, swap_sources
from .denoiser import DenoiserRuntime, install_modules, parameter_names
from .eager import eagerly
from .intercept import Intercept, staged
from .intervention import Stages
from .recompute import Shared
from .session import Adapter, Session, part_of
from .site import PairMask, Site

#: In which order a processor concatenates the two streams of joint attention.
JOINT_ORDER = {
    "AuraFlowAttnProcessor2_0": ("text", "image"),
    "CogVideoXAttnProcessor2_0": ("text", "image"),
    "CogView4AttnProcessor": ("text", "image"),
    "Flux2AttnProcessor": ("text", "image"),
    "Flux2ParallelSelfAttnProcessor": ("text", "image"),
    "FluxAttnProcessor": ("text", "image"),
    "FluxIPAdapterAttnProcessor": ("text", "image"),
    "FusedAuraFlowAttnProcessor2_0": ("text", "image"),
    "FusedCogVideoXAttnProcessor2_0": ("text", "image"),
    "FusedFluxAttnProcessor2_0": ("text", "image"),
    "FusedJointAttnProcessor2_0": ("image", "text"),
    "HunyuanVideoAttnProcessor2_0": ("image", "text"),
    "JointAttnProcessor2_0": ("image", "text"),
    "QwenDoubleStreamAttnProcessor2_0": ("text", "image"),
    "SD3IPAdapterJointAttnProcessor2_0": ("image", "text"),
}

#: Processors that join the streams without projections of their own for text.
JOINT_WITHOUT_PROJECTIONS = (
    "AuraFlowAttnProcessor2_0",
    "CogVideoXAttnProcessor2_0",
    "CogView4AttnProcessor",
    "Flux2ParallelSelfAttnProcessor",
    "FluxAttnProcessor",
    "FusedAuraFlowAttnProcessor2_0",
    "FusedCogVideoXAttnProcessor2_0",
    "FusedFluxAttnProcessor2_0",
)

#: Processors that attend several times per call when there are image conditions: what the keys of each call are.
BRANCHES = {"WanAttnProcessor": ("image", "text")}

#: Processors of single streams before whose text a model puts tokens of its own.
TEXT_GROWS = ("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0")

#: Processors of U-Nets that lay keys of text before those of the image itself.
ADDED_KV = ("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0")

#: Processors that attend once more for each image prompt.
IMAGE_PROMPTS = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "FluxIPAdapterAttnProcessor",
                 "SD3IPAdapterJointAttnProcessor2_0")  # fmt: skip

#: Words in the names of modules that attend along something else than the image.
FOLDED = {"motion_modules": "frames", "temp_attentions": "frames", "temporal": "frames", "transformer_in": "frames",
          "token_refiner": "text", "context_refiner": "text", "context_embedder": "text"}  # fmt: skip

#: Denoisers of videos whose latents are (B, T, C, H, W), and (B, T, H, W, C); all others take (B, C, T, H, W).
FRAMES_FIRST = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
CHANNELS_LAST = ("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel")

#: Names under which attention modules keep how many heads they have, of queries and of keys.
HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
KEY_HEADS = ("kv_heads", "num_kv_heads", "num_key_value_heads", "n_kv_heads")


def _need() -> Any:
    """diffusers itself; ``ImportError`` says what to install."""
    try:
        import diffusers.models.attention_processor as processors

        return processors
    except ImportError as error:
        raise ImportError("acting on diffusers models needs diffusers: pip install 'attnlib[hf]'") from error


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
        if runtime is None:
            return plain(*args, **kwargs)
        runtime.session.enter()
        return runtime.around(plain, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # A copy is a plain processor.
        made = object.__reduce_ex__(self, protocol)
        return (made[0], (cls, *made[1][1:]), *made[2:])

    names = {"__call__": eagerly(call), "__reduce_ex__": reduce, "plain": cls}
    return type(f"Attached{cls.__name__}", (cls,), names)


def _plain_class(cls: Any) -> Any:
    """The class of a processor, whether something is attached to it or not."""
    return cls.__dict__.get("plain", cls)


@functools.cache
def _by_hand(cls: Any) -> bool:
    """Whether a processor may compute weights by ``get_attention_scores``; the others are not watched for it."""
    calls = [base.__dict__["__call__"] for base in cls.__mro__ if "__call__" in base.__dict__]
    codes = [getattr(inspect.unwrap(call), "__code__", None) for call in calls]
    return any(code is None or "get_attention_scores" in code.co_names for code in codes)


def _name_of(processor: Any) -> str:
    """The name of a processor's own class."""
    return str(_plain_class(type(processor)).__name__)


#: Where a model puts its default processors back, if it knows the classes of all that are there.
SET_DEFAULT = "set_default_attn_processor"


def _set_default(session: Session, runtimes: list[ModuleRuntime]) -> Callable[..., Any]:
    original: Any = getattr(session.model, SET_DEFAULT)

    @functools.wraps(original)
    def set_default(*args: Any, **kwargs: Any) -> Any:
        for runtime in runtimes:
            runtime.give_back()
        return original(*args, **kwargs)

    return set_default


class ModuleRuntime(Shared):
    """Stages of one attention module, and what is known about its current call."""

    def __init__(self, session: Session, site: Site, stages: Stages):
        self.session, self.site, self.stages = session, site, stages
        self.module: Any = site.module
        self.given: dict[str, Any] = {}
        self.intercept: Any = None
        self.original: Any = None
        self.attached: Any = None
        self.processor = _name_of(self.module.processor)
        self.by_hand = False
        self._referring: Stages | None = None

    @property
    def where(self) -> str:
        return f"layer {self.site.layer} ({self.site.name})"

    @property
    def frame(self) -> dict[str, Any]:
        """What is known of the denoiser's call that is running."""
        return self.session.frame

    def take_over(self) -> None:
        """Put the stages around the processor that the module has now.

        Raises:
            ValueError: a processor under which the stages cannot act.
        """
        original, stages = self.module.processor, self.stages
        self.original = original
        cls = _plain_class(type(original))
        self.by_hand = _by_hand(cls)
        self.processor, self.names = cls.__name__, list(inspect.signature(cls.__call__).parameters)[2:]
        if self._has_image_keys() and stages.in_attention and self.processor not in (*BRANCHES, *ADDED_KV):
            raise ValueError(
                f"{self.where}: {self.processor} concatenates text keys to its own; a description of that is missing"
            )
        if stages["on_context"]:
            if getattr(self.module, "fused_projections", False):
                raise ValueError(
                    f"{self.where}: its projections are fused, so on_context is missing there; unfuse them"
                )
            missing = [n for n in ("to_k", "to_v") if not isinstance(getattr(self.module, n, None), nn.Module)]
            if missing and self.processor not in ADDED_KV:
                raise ValueError(
                    f"{self.where}: on_context needs separate projections of keys and values; {missing} are missing in "
                    f"{type(self.module).__name__}"
                )
        if not (stages.in_attention or stages["around_sublayer"]):
            self.attached = original
            return
        self.attached = object.__new__(_hooked(cls))
        # The same dictionary: what is set on one (a backend, a scale) is set on the other.
        object.__setattr__(self.attached, "__dict__", original.__dict__)
        own = isinstance(original, nn.Module)
        self.session.set_entry(
            self.module, self.module._modules if own else self.module.__dict__, "processor", self.attached
        )

    def give_back(self) -> None:
        """Put the plain processor in its place, until the next call: its class is about to be looked at."""
        if self.module.processor is self.attached and self.attached is not self.original:
            own = isinstance(self.original, nn.Module)
            (self.module._modules if own else self.module.__dict__)["processor"] = self.original

    def follow(self) -> None:
        """The user may have chosen another processor since."""
        if self.module.processor is self.attached:
            return
        kind = DiffusersAdapter._kind(self.site.name, self.module)
        if kind != self.site.kind:
            raise RuntimeError(
                f"{self.where} is attached, but inside the session its processor was replaced by "
                f"{type(self.module.processor).__name__}, which makes it {kind} attention; it was {self.site.kind}. "
                "Detach, and attach to the model as it is now"
            )
        self.take_over()

    def before_module(self, module: nn.Module, args: Any) -> None:
        self.follow()

    def with_streams(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], **streams: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the processor with other streams in them."""
        named = dict(zip(self.names, args, strict=False))
        positional = tuple(streams.get(name, value) for name, value in named.items()) + args[len(named) :]
        return positional, {**kwargs, **{name: new for name, new in streams.items() if name not in named}}

    def around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The processor's call under the stages."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if not self.stages["around_sublayer"]:
            return self.attend(call, args, kwargs, given)
        hidden = given["hidden_states"]
        if hidden.dim() != 3:
            raise ValueError(f"{self.where}: its input has rank {hidden.dim()}, not (B, N, C)")
        context = given.get("encoder_hidden_states")
        if self.site.kind == "joint" and isinstance(context, Tensor):
            return self.around_streams(call, args, kwargs, given)
        if isinstance(context, tuple):  # text, and the image prompts beside it
            context = context[0]
        m = hidden.shape[1] if context is None else context.shape[1]

        def innermost(x: Tensor) -> Tensor:
            new_args, new_kwargs = self.with_streams(args, kwargs, hidden_states=x)
            return self.attend(call, new_args, new_kwargs, {**given, "hidden_states": x})

        return self.through_sublayer(hidden, m, given, innermost)

    def through_sublayer(self, hidden: Tensor, m: int, given: dict[str, Any], chain: Callable[[Tensor], Any]) -> Any:
        """``chain(hidden)`` under ``around_sublayer``."""
        q_layout, k_layout = self.layouts(hidden.shape[1], m, given)
        site = self.session.described(
            self.site, hidden.shape[0], n_queries=hidden.shape[1], n_keys=m, q_layout=q_layout, k_layout=k_layout,
            q_pos=torch.arange(hidden.shape[1], device=hidden.device), k_pos=torch.arange(m, device=hidden.device),
        )  # fmt: skip
        for i in reversed(self.stages["around_sublayer"]):
            chain = functools.partial(around, i, site, chain)
        result = chain(hidden)
        if not isinstance(result, Tensor) or result.shape[:2] != hidden.shape[:2]:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{self.where}: around_sublayer must return (B, N, C)={tuple(hidden.shape)}, got {got}")
        return result

    def around_streams(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
    ) -> Any:
        """``around_sublayer`` of joint attention: its two streams side by side, in the order of its keys."""
        image, text = given["hidden_states"], given["encoder_hidden_states"]
        order = JOINT_ORDER.get(self.processor)
        if order is None or image.shape[-1] != text.shape[-1]:
            why = (
                f"how {self.processor} orders its streams is not known" if order is None
                else f"its streams have widths {image.shape[-1]} and {text.shape[-1]}"
            )  # fmt: skip
            raise ValueError(f"{self.where}: {why}, so around_sublayer is missing there")
        sizes = [(image if name == "image" else text).shape[1] for name in order]

        def join(image: Tensor, text: Tensor) -> Tensor:
            return torch.cat([image if name == "image" else text for name in order], 1)

        def split(both: Tensor) -> tuple[Tensor, Tensor]:
            parts = dict(zip(order, (part.contiguous() for part in both.split(sizes, 1)), strict=True))
            return parts["image"], parts["text"]

        joined = join(image, text)
        last: list[Any] = []  # what the module gave, and the same side by side

        def innermost(both: Tensor) -> Tensor:
            if both.shape != joined.shape:
                raise ValueError(
                    f"{self.where}: call of around_sublayer takes both streams {tuple(joined.shape)}, got "
                    f"{tuple(both.shape)}"
                )
            new, beside = (image, text) if both is joined else split(both)
            new_args, new_kwargs = self.with_streams(args, kwargs, hidden_states=new, encoder_hidden_states=beside)
            out = self.attend(
                call, new_args, new_kwargs, {**given, "hidden_states": new, "encoder_hidden_states": beside}
            )
            last[:] = [out, join(out[0], out[1])]
            return last[1]

        result = self.through_sublayer(joined, joined.shape[1], given, innermost)
        if last and last[1] is result:
            return last[0]
        rest = tuple(last[0][2:]) if last else ()
        if not last and self.processor == "FluxIPAdapterAttnProcessor":
            rest = (torch.zeros_like(image),)  # of no image prompt
        return (*split(result), *rest)

    def attend(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
    ) -> Any:
        """The processor itself, its attention through the stages."""
        if not self.stages.in_attention:
            return call(*args, **kwargs)
        before, self.given = self.given, given
        branches = BRANCHES.get(self.processor, ()) if self._has_image_keys() else ()
        prompted = self.processor in IMAGE_PROMPTS
        attend = staged(self.where, self.processor, self.stages, self.describe)
        run = self._by_branch(attend, F.scaled_dot_product_attention) if prompted else attend
        self.intercept = Intercept(run, self.where, self.processor, None if prompted else max(1, len(branches)))
        try:
            with self._own_scores(prompted):
                return self.intercept.around(
                    lambda: call(*args, **kwargs),
                    "; use a processor that does (AttnProcessor2_0) and the native attention backend",
                )
        finally:
            self.given = before

    @contextmanager
    def _own_scores(self, prompted: bool) -> Iterator[None]:
        """Inside, a processor that computes weights by ``get_attention_scores`` is seen, too."""
        module, intercept = self.module, self.intercept
        scores = getattr(module, "get_attention_scores", None) if self.by_hand else None
        if scores is None or "get_attention_scores" in module.__dict__:
            yield
            return
        heads = self.site.heads

        def flat(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
            mask = None if attn_mask is None else attn_mask.flatten(0, 1)
            return torch.bmm(scores(q.flatten(0, 1), k.flatten(0, 1), mask), v.flatten(0, 1)).unflatten(0, (-1, heads))

        attend = staged(self.where, self.processor, self.stages, self.describe, own=flat)
        run = self._by_branch(attend, flat) if prompted else attend

        def by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            if len(q) % heads:
                raise ValueError(
                    f"{self.where}: {self.processor} computes attention of {len(q)} heads of its batch at a time, not "
                    f"of {heads}; use a processor that attends once (AttnProcessor2_0)"
                )
            q, k, v = (t.unflatten(0, (-1, heads)) for t in (q, k, v))
            if mask is not None:
                mask = mask.unflatten(0, (-1, heads))
            return run(q, k, v, mask, scale=module.scale).flatten(0, 1)

        intercept.by_product = by_heads
        module.__dict__["get_attention_scores"] = intercept.scores
        try:
            yield
        finally:
            del module.__dict__["get_attention_scores"]

    def _by_branch(self, attend: Callable[..., Tensor], own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The model's own attention through all stages, then one call per image prompt for who asked for them."""
        if self._referring is None:
            self._referring = Stages([i for i in self.stages.all if i.sees_references])
        referring = staged(self.where, self.processor, self._referring, self.describe, own=own)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            assert self._referring is not None
            if self.intercept.count == 1:
                return attend(*args, **kwargs)
            return (referring if self._referring.in_attention else own)(*args, **kwargs)

        return run

    def image_prompts(self) -> list[tuple[tuple[int, int | None], int]]:
        """``((adapter, image), images)`` of each call behind the first, in the order in which the processor makes them:
        image ``None`` where the images of an adapter stand side by side."""
        given, processor = self.given, self.attached
        if self.processor == "SD3IPAdapterJointAttnProcessor2_0":
            return [((0, None), 1)]
        if self.processor == "FluxIPAdapterAttnProcessor":
            return [((n, None), 1) for n in range(len(processor.scale))]
        context, masks = given["encoder_hidden_states"], given.get("ip_adapter_masks")
        counts = [c.shape[1] for c in context[1]] if isinstance(context, tuple) else [1]
        if isinstance(masks, Tensor):
            masks = list(masks.unsqueeze(1))
        found: list[tuple[tuple[int, int | None], int]] = []
        for number, (scale, images) in enumerate(zip(processor.scale, counts, strict=False)):
            if all(s == 0 for s in scale) if isinstance(scale, list) else scale == 0:
                continue
            if masks is None or masks[number] is None:
                found.append(((number, None), images))
            else:
                found += [((number, image), 1) for image in range(images)]
        return found

    def before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``on_block_input``: the stream of image tokens."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise ValueError(f"{self.where}: the input of its block is not (B, N, C)")
        n, edited = hidden.shape[1], hidden
        layout = None if self.site.kind == "joint" else self.layouts(n, n, {})[0]
        site = self.session.described(
            self.site, hidden.shape[0], n_queries=n, q_pos=torch.arange(n, device=hidden.device), q_layout=layout
        )
        for i in self.stages["on_block_input"]:
            new = i.on_block_input(site, edited)
            edited = edited if new is None else new
        if edited is hidden:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    def _has_image_keys(self) -> bool:
        return getattr(self.module, "add_k_proj", None) is not None and self.site.kind != "joint"

    def describe(self, q: Tensor, k: Tensor, pair: PairMask, **fields: Any) -> Site:
        """The site of an attention call of the processor."""
        n, m = q.shape[2], k.shape[2]
        if self.processor in IMAGE_PROMPTS and self.intercept.count > 1:
            return self.describe_reference(q, k, pair, **fields)
        q_layout, k_layout = self.layouts(n, m, self.given)
        if self._has_image_keys() and self.processor in BRANCHES:
            branches = BRANCHES[self.processor]
            k_layout = Layout(((branches[self.intercept.count - 1], m),))
        rotary = any(self.given.get(name) is not None for name in ("image_rotary_emb", "rotary_emb"))
        return self.session.described(
            self.site, q.shape[0], n_queries=n, n_keys=m, mask=pair, q_pos=torch.arange(n, device=q.device),
            k_pos=torch.arange(m, device=q.device), q_layout=q_layout, k_layout=k_layout, rotary=rotary or None,
            **fields,
        )  # fmt: skip

    def describe_reference(self, q: Tensor, k: Tensor, pair: PairMask, **fields: Any) -> Site:
        """The site of a call whose keys come from an image prompt."""
        n, m = q.shape[2], k.shape[2]
        prompts, number = self.image_prompts(), self.intercept.count - 2
        if number >= len(prompts):
            raise ValueError(
                f"{self.where}: {self.processor} computes attention {self.intercept.count} times, but "
                f"{len(prompts)} branches of image prompts are known"
            )
        reference, images = prompts[number]
        grid = (("image", self.grid(n) or n),)
        beside = grid if self.processor == "SD3IPAdapterJointAttnProcessor2_0" else ()
        tokens = m - n if beside else m
        side_by_side = (images, tokens // images) if images > 1 else tokens
        return self.session.described(
            self.site, q.shape[0], n_queries=n, n_keys=m, mask=pair, kind="cross", reference=reference,
            q_pos=torch.arange(n, device=q.device), k_pos=torch.arange(m, device=q.device), q_layout=Layout(grid),
            k_layout=Layout((*beside, ("reference", side_by_side))), **fields,
        )  # fmt: skip

    def layouts(self, n: int, m: int, given: dict[str, Any]) -> tuple[Layout | None, Layout | None]:
        """What queries and keys are, from the shapes of the denoiser's inputs; ``None`` where they do not tell."""
        if self.site.kind == "joint":
            context = given.get("encoder_hidden_states")
            order = JOINT_ORDER.get(self.processor)
            text = context.shape[1] if isinstance(context, Tensor) else self.beside_image(n)
            if order is None or text is None or n != m or not 0 < text < n:
                return None, None
            sizes = {"text": text, "image": self.grid(n - text) or n - text}
            layout = Layout(tuple((name, sizes[name]) for name in order))
            return layout, layout
        folded = next((what for word, what in FOLDED.items() if word in self.site.name), None)
        if folded is not None:
            own = Layout(((folded, n),))
            return (own, own) if self.site.kind == "self" else (own, Layout((("text", m),)))
        grid = self.grid(n)
        image = None if grid is None else Layout((("image", grid),))
        if self.processor in ADDED_KV and not self.module.only_cross_attention:
            return image, None if grid is None else Layout((("text", max(0, m - n)), ("image", grid)))
        if self.site.kind == "self":
            return (image, image) if n == m else (image, None)
        return image, Layout((("text", m),))

    def beside_image(self, n: int) -> int | None:
        """How many of ``n`` tokens are none of the image, where text was put before it outside of the attention."""
        if self.processor in TEXT_GROWS:
            grid = self.frame.get("patches")
            return None if grid is None else n - math.prod(grid)
        return self.frame.get("text")

    def grid(self, tokens: int) -> int | tuple[int, ...] | None:
        """The grid of so many tokens; ``None`` where it is not known, or there are others beside the image's.

        Videos: the latent's sides over the patch, or the count of one frame at a halving of them; images: a halving of
        the latent's sides.
        """
        if "video" in self.frame:
            video = self.frame["video"]
            if math.prod(video) == tokens:
                return video  # type: ignore[no-any-return]
            return tokens if tokens in _halvings(*video[1:]) else None
        if "called" not in self.frame or self.module is self.session.model:
            return tokens  # an attention that is called by itself
        return _halvings(*self.frame.get("grid", (0, 0))).get(tokens)


def _halvings(height: int, width: int) -> dict[int, tuple[int, int]]:
    """Grids by their count of tokens, each half as large as the one before, of odd sides the larger half."""
    found: dict[int, tuple[int, int]] = {}
    while height and width:
        found.setdefault(height * width, (height, width))
        if height == width == 1:
            break
        height, width = -(-height // 2), -(-width // 2)
    return found


def _video_grid(model: Any, given: dict[str, Any], sample: Any) -> tuple[int, int, int] | None:
    """(frames, height, width) of the tokens of a video denoiser; ``None`` for images."""
    sides = [given.get(name) for name in ("num_frames", "height", "width")]
    if all(isinstance(side, int) for side in sides):
        return sides[0], sides[1], sides[2]  # type: ignore[return-value]
    if not isinstance(sample, Tensor) or sample.dim() != 5:
        return None
    sizes = list(sample.shape[-3:])
    if type(model).__name__ in CHANNELS_LAST:
        sizes = list(sample.shape[1:4])
    if type(model).__name__ in FRAMES_FIRST:
        sizes[0] = sample.shape[1]
    config = getattr(model, "config", None)  # an attention alone has none
    patch = getattr(config, "patch_size", 1)
    if isinstance(patch, (tuple, list)):
        steps = list(patch)
    else:
        steps = [getattr(config, "patch_size_t", None) or 1, patch, patch]
    return tuple(-(-size // step) for size, step in zip(sizes, steps, strict=True))  # type: ignore[return-value]


def _count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first attribute of a module that is a number."""
    found = (getattr(module, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


class DiffusersAdapter(Adapter):
    """Interception of processors; layouts, passes and steps from the denoiser's call."""

    name = "diffusers"
    stages: ClassVar[frozenset[str]] = frozenset(
        "on_block_input around_sublayer on_context on_qkv on_kv_read around_attention on_scores on_weights on_output "
        "on_step around_denoiser around_module".split()
    )

    def sites(self, model: nn.Module, part: str | None) -> list[Site]:
        _need()
        root, prefix = part_of(model, part)
        sites: list[Site] = []
        for name, module in root.named_modules():
            if not (hasattr(module, "processor") and hasattr(module, "set_processor")):
                continue
            heads = _count(module, HEADS)
            if heads is None:
                continue
            to_q, to_k = (getattr(module, name, None) for name in ("to_q", "to_k"))
            kv_dim = to_k.out_features if isinstance(to_k, nn.Linear) else None
            q_dim = to_q.out_features if isinstance(to_q, nn.Linear) else None
            kv_heads = heads * kv_dim // q_dim if kv_dim and q_dim else _count(module, KEY_HEADS) or heads
            sites.append(
                Site(
                    layer=len(sites),
                    name=prefix + name,
                    module=module,
                    kind=self._kind(prefix + name, module),
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=q_dim // heads if q_dim else _count(module, ("head_dim", "dim_head", "dim_heads")) or 0,
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
    def _kind(name: str, module: Any) -> str:
        processor = _name_of(module.processor)
        if getattr(module, "add_q_proj", None) is not None or processor in JOINT_WITHOUT_PROJECTIONS:
            return "joint"
        # Hunyuan's single blocks join the streams without projections, its text refiner has none to join.
        if processor == "HunyuanVideoAttnProcessor2_0" and "refiner" not in name:
            return "joint"
        if processor in ADDED_KV:
            return "cross"
        last = name.rpartition(".")[2]
        if "self" in last:  # OmniGen's is made as one of another stream, and reads its own
            return "self"
        if hasattr(module, "is_cross_attention"):
            return "cross" if module.is_cross_attention else "self"
        return "cross" if last.endswith("attn2") or "cross" in last else "self"

    def install(self, session: Session, plan: list[tuple[Site, Stages]]) -> None:
        look, names = self._look_at_inputs(session), parameter_names(session.model)

        def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            main = given.get(names[0])
            if session.sampling is not None and isinstance(main, Tensor):
                session.sampling.tell(len(main))
            look(given)

        session.hook(session.model.register_forward_pre_hook(before, with_kwargs=True))
        if whole := session.acting("around_denoiser"):
            DenoiserRuntime(session, whole, look).install()
        install_modules(session, session.sites)
        if hasattr(session.model, "cache_context"):
            session.set_attribute(session.model, "cache_context", self._follow_context(session))
        runtimes: list[ModuleRuntime] = []
        if hasattr(session.model, SET_DEFAULT):
            session.set_attribute(session.model, SET_DEFAULT, _set_default(session, runtimes))
        for site, stages in plan:
            module: Any = site.module
            if stages["around_sublayer"]:
                if getattr(module, "residual_connection", False) or _name_of(module.processor) in ADDED_KV:
                    raise ValueError(
                        f"layer {site.layer} ({site.name}): it adds its residual by itself; around_sublayer is missing "
                        "there"
                    )
            runtime = ModuleRuntime(session, site, stages)
            runtimes.append(runtime)
            if stages["on_block_input"]:
                block = block_of(session.model, site)
                session.hook(block.register_forward_pre_hook(runtime.before_block, with_kwargs=True))
            if not (stages.in_attention or stages["around_sublayer"]):
                if stages["on_context"]:
                    runtime.take_over()
                    session.followed_by(runtime.follow)
                    self._swap(runtime)
                continue
            _runtimes[module] = runtime
            session.undo(functools.partial(_forget, module), functools.partial(_runtimes.__setitem__, module, runtime))
            runtime.take_over()
            # A decoder of latents is called past the forward of its model, so each attention looks for itself.
            session.hook(module.register_forward_pre_hook(runtime.before_module))
            if stages["on_context"]:
                self._swap(runtime)

    @staticmethod
    def _swap(runtime: ModuleRuntime) -> None:
        """``on_context``: for the text that cross attention reads, for each stream of joint attention."""
        session, site, module = runtime.session, runtime.site, runtime.module
        added = getattr(module, "add_k_proj", None) is not None

        def described(source: Tensor, what: str | None) -> Site:
            m = source.shape[1]
            if what is None:
                layout = runtime.layouts(m, m, {})[1] if site.kind == "joint" else None
            else:
                layout = Layout(((what, (runtime.grid(m) or m) if what == "image" else m),))
            return session.described(site, source.shape[0], n_keys=m, k_layout=layout)

        def swap(to_k: nn.Module, to_v: nn.Module, what: str | None) -> None:
            swap_sources(
                session, runtime.stages, functools.partial(described, what=what), to_k, to_v, site.kind == "joint"
            )

        if _name_of(module.processor) in ADDED_KV:
            swap(module.add_k_proj, module.add_v_proj, "text")
        elif site.kind == "joint" and added:
            swap(module.to_k, module.to_v, "image")
            swap(module.add_k_proj, module.add_v_proj, "text")
        else:
            swap(module.to_k, module.to_v, "text" if site.kind == "cross" else None)

    @staticmethod
    def _look_at_inputs(session: Session) -> Callable[[dict[str, Any]], None]:
        def look(given: dict[str, Any]) -> None:
            model, frame, now = session.model, session.frame, session._now
            frame.clear()
            frame["called"] = True
            now.run += 1
            now.timestep = given.get("timestep")
            text = given.get("encoder_hidden_states")
            if isinstance(text, Tensor) and text.dim() == 3:
                frame["text"] = text.shape[1]
            sample = given.get("sample", given.get("hidden_states"))
            video = _video_grid(model, given, sample)
            if video is not None:
                frame["video"] = video
            ids = given.get("img_ids")
            if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] == 3 and len(ids):
                frame["grid"] = (int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1)
            elif isinstance(sample, Tensor) and sample.dim() == 4:
                frame["grid"] = tuple(sample.shape[-2:])
                patch = getattr(getattr(model, "config", None), "patch_size", None)
                if isinstance(patch, int):
                    frame["patches"] = tuple(-(-size // patch) for size in sample.shape[-2:])

        return look

    @staticmethod
    def _follow_context(session: Session) -> Callable[..., Any]:
        original: Any = session.model.cache_context

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            with session.at(pass_name=name, step=kwargs.get("step_index")), original(name, **kwargs):
                yield

        return cache_context
