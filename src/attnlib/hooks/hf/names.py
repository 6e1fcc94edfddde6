"""Everything that is not public in transformers, in one place; no other file says these names.

What is asked here is asked when interventions are attached, and what is not known is refused there by name. A cache is
recognised by its type, so that a new name of the argument changes nothing.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..intervention import Intervention
from ..site import _PLAIN, Rotation, Weighting

#: Releases of transformers at whose two ends the whole adapter is tested; the first that is not.
OLDEST, BEYOND = "5.13", "5.25"

PREFIX = "attnlib_"

#: Implementations whose masks can be read pair by pair.
READABLE = ("sdpa", "eager")

#: Arguments under which the eager functions of transformers get a score per head that has no value.
SINKS = ("s_aux", "sinks")

#: The argument that adds to scores, beside the mask.
BIAS = "position_bias"

#: Arguments that choose keys inside a kernel, in ways that are not known.
CHOOSES = ("block_indices",)

#: Names under which models and their modules take a cache, the newest first.
CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")

#: What ``generate`` asks the model for: the processors of scores that it makes for itself.
PROCESSORS = "_get_logits_processor"

#: Where a source of drafts keeps the arguments of the model that drafts.
DRAFTING = "assistant_kwargs"

#: What a processor of guidance asks the model in a second sequence, where it keeps that, and its prompt in there.
UNCONDITIONAL = "get_unconditional_logits"
UNCONDITIONAL_CONTEXT, UNCONDITIONAL_IDS = "unconditional_context", "input_ids"

#: And for the drafts of assisted decoding.
CANDIDATES = "_get_candidate_generator"

#: The child of an attention module that attends in place of the kernel of its configuration.
CONVERTED = "attnlib_mixer"

#: Where ``generate`` reads a prompt, in one call or in chunks.
READS_PROMPT = ("_prefill", "_prefill_chunking")

#: What answers many requests at once, in one row.
BATCHED = ("generate_batch", "init_continuous_batching")

#: Where a configuration keeps the name of its attention implementation.
IMPLEMENTATION = "_attn_implementation_internal"

#: Names under which models keep the encoder of their images.
VISION_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder")

#: A decoder's module that makes rotary angles, what its attention modules are handed, and how those apply them.
ROTARY, ANGLES, TURN = "rotary_emb", "position_embeddings", "apply_rotary_pos_emb"

#: Attention whose rotary positions reach a part of a key that is not its first, or some layers only.
TURNS_PARTS = ("qk_rope_head_dim", "use_rope")
TURNS_SOMETIMES = ("Cohere2", "Exaone4", "SmolLM3", "Llama4")

#: Images that ``generate`` encoded before the model is called.
ENCODED = "mm_encoder_outputs"

#: Inputs of a prompt that a second reading of it makes anew, its cache apart.
OWN_INPUTS = frozenset(
    "input_ids inputs_embeds attention_mask position_ids use_cache logits_to_keep return_dict labels "
    "output_attentions output_hidden_states cache_position token_type_ids mm_token_type_ids".split()
).union(CACHE_ARGUMENTS)

#: Features of images that a decoder adds behind its first blocks, and the slots where it does.
BETWEEN_BLOCKS = ("deepstack_visual_embeds", "visual_pos_masks")

#: Inputs with one number per token, which go with the tokens.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


@functools.cache
def _need() -> types.SimpleNamespace:
    """The parts of transformers used here; ``ImportError`` says what to install."""
    try:
        from transformers import cache_utils, masking_utils, modeling_utils

        return types.SimpleNamespace(
            cache=cache_utils,
            attention=modeling_utils.AttentionInterface,
            functions=modeling_utils.ALL_ATTENTION_FUNCTIONS,
            masks=masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
            mask_interface=masking_utils.AttentionMaskInterface,
            model=modeling_utils.PreTrainedModel,
        )
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"acting on transformers models needs transformers from {OLDEST} to below {BEYOND}, with its "
            "AttentionInterface and AttentionMaskInterface: pip install 'attnlib[hf]'"
        ) from error


def installed() -> tuple[str, bool]:
    """The release of transformers in use, and whether it is inside the range that is tested."""
    import transformers
    from packaging.version import Version

    version = str(transformers.__version__)
    # Development versions of the first release beyond are beyond too.
    return version, Version(OLDEST) <= Version(Version(version).base_version) < Version(BEYOND)


@functools.cache
def hooks_are_recomputed() -> bool:
    """Whether blocks under gradient checkpointing run their hooks inside the checkpoint, as releases before 5.23 do."""
    import transformers
    from packaging.version import Version

    return Version(str(transformers.__version__)) < Version("5.23")


# --------------------------------------------------------------------------------------------------------------------
# Modules


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def parameters_of(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward, past decorators."""
    return list(inspect.signature(_forward_of(module)).parameters)[1:]


def reachable(module: nn.Module) -> bool:
    """Whether a module looks its attention function up in transformers' interface."""
    code = getattr(_forward_of(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def fused_sam_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward with a fused kernel of an attention like that of SAM's vision encoder; ``None`` for other modules."""
    named = all(hasattr(module, name) for name in ("get_decomposed_rel_pos", "qkv", "proj", "num_attention_heads"))
    if not named or not type(module).__module__.startswith("transformers."):
        return None
    base = next((c for c in reversed(type(module).__mro__) if "get_decomposed_rel_pos" in vars(c)), type(module))
    for cls in (type(module), *_forward_of(module).__globals__.values()):
        if isinstance(cls, type) and issubclass(cls, base):
            code = getattr(inspect.unwrap(cls.forward), "__code__", None)  # type: ignore[attr-defined]
            if code is not None and "scaled_dot_product_attention" in code.co_names:
                return cls.forward  # type: ignore[attr-defined, no-any-return]
    return None


def kernel_of(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that the module would call under ``implementation``; the same object it would look up itself."""
    own = getattr(module, CONVERTED, None)
    return own.kernel if own is not None else plain_kernel_of(module, implementation)


def plain_kernel_of(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The same, whether the module was converted or not."""
    scope = _forward_of(module).__globals__
    interface = scope.get("ALL_ATTENTION_FUNCTIONS")
    eager = scope.get("eager_attention_forward")
    function = interface.get(implementation, eager if implementation == "eager" else None)
    if function is None:
        raise ValueError(
            f"{type(module).__name__} has no attention function for attn_implementation={implementation!r} that can be "
            f"reached; possible: {sorted(interface.keys())}"
        )
    return function


@functools.cache
def _collector() -> Any:
    """What a running model collects of its layers' outputs, in releases that collect it by hooks."""
    try:
        from transformers.utils.output_capturing import _active_collector

        return _active_collector
    except ImportError:
        return None


def asks_for_weights(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether somebody takes the weights that an attention function gives back: ``output_attentions``."""
    collector = _collector()
    if collector is not None:
        collected = collector.get()
        return collected is not None and any(name.endswith("attentions") for name in collected)
    return bool(kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)))


def weighting_of(module: nn.Module, implementation: str, kwargs: dict[str, Any], heads: int) -> Weighting:
    """What the kernel makes of scores, from the arguments of its call."""
    if hasattr(module, CONVERTED):
        return Weighting(opaque="it was converted, so its weights are no softmax over scores")
    for name in CHOOSES:
        if kwargs.get(name) is not None:
            return Weighting(opaque=f"its kernel is given {name}, so its weights cannot be computed beside it")
    if implementation != "eager":
        return _PLAIN  # sdpa knows neither
    cap = kwargs.get("softcap")
    sinks = next((kwargs[name] for name in SINKS if kwargs.get(name) is not None), getattr(module, "sinks", None))
    if not isinstance(sinks, Tensor):
        return _PLAIN if cap is None else Weighting(cap=float(cap))
    sinks = sinks.reshape(-1) if sinks.numel() == heads else sinks.squeeze(-1)
    return Weighting(None if cap is None else float(cap), sinks)


def implementation_of(module: nn.Module) -> str:
    """Which attention a module runs, under whatever name."""
    return named_implementation(module.config)


def seen_through(config: Any, name: Callable[[str], str]) -> Any:
    """The same configuration, what is set on one is set on the other, that names another implementation:
    ``name(implementation)``, whatever the implementation is at that time."""
    cls: type = type(config)
    view: Any = object.__new__(_view(cls, name))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


@functools.cache
def _view(cls: type, name: Callable[[str], str]) -> type:
    def get(self: Any) -> str:
        return name(named_implementation(self))

    known: Any = inspect.getattr_static(cls, "_attn_implementation")

    def reduce(self: Any, protocol: Any) -> Any:
        plain: Any = object.__new__(cls)
        object.__setattr__(plain, "__dict__", self.__dict__)
        return seen_through, (plain, name)

    names = {
        "_attn_implementation": property(get, known.fset), "__reduce_ex__": reduce, "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }  # fmt: skip
    return type(cls.__name__, (cls,) if issubclass(cls, _Quiet) else (_Quiet, cls), names)


class _Quiet:
    """Before a class of configurations: no dataclass is made of the class below."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        return None


def named_implementation(config: Any) -> str:
    """Which attention a configuration asks for now, under whatever name."""
    # Asked in every layer of every call, and what configurations do to find an attribute would cost more than the rest.
    return (object.__getattribute__(config, "__dict__")[IMPLEMENTATION] or "eager").removeprefix(PREFIX)


def rotary_of(module: nn.Module) -> nn.Module | None:
    """The module that makes rotary positions, where a decoder or an attention module has one."""
    rotary = getattr(module, ROTARY, None)
    return rotary if isinstance(rotary, nn.Module) else None


def gets_angles(module: nn.Module) -> bool:
    """Whether an attention module is handed rotary angles, so that queries and keys carry positions when they meet."""
    return ANGLES in parameters_of(module)


def turn_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function with which an attention module applies rotary positions to queries and keys."""
    return _forward_of(module).__globals__.get(TURN)


@functools.cache
def _turns(cls: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    apply = inspect.unwrap(cls.forward).__globals__.get(TURN)
    if apply is None or cls.__name__.startswith(TURNS_SOMETIMES):
        return None

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        try:
            return apply(x, x, cos, sin)[0]
        except RuntimeError:  # positions of a part of a key, which its attention cuts off before
            width = cos.shape[-1]
            if width >= x.shape[-1]:
                raise
            turned, rest = x[..., :width], x[..., width:]
            return torch.cat([apply(turned, turned, cos, sin)[0], rest], -1)

    return turn


def rotation_of(module: nn.Module, given: Mapping[str, Any], slots: Tensor) -> Rotation | None:
    """The rotary positions that an attention module was handed; ``None`` where it is not known how it applies them."""
    angles = given.get(ANGLES)
    if not (isinstance(angles, tuple) and len(angles) == 2 and all(isinstance(t, Tensor) for t in angles)):
        return None
    cos, sin = angles
    if cos.dim() != 3 or cos.is_complex() or any(hasattr(module, name) for name in TURNS_PARTS):
        return None
    cls: Any = type(module)
    turn = _turns(cls)
    return None if turn is None else Rotation(cos, sin, slots, turn)


def vision_towers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Encoders of images inside a model, by the names that models give them."""
    return [(name, m) for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in VISION_TOWERS]


# --------------------------------------------------------------------------------------------------------------------
# Caches among arguments


def reader(model: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """A function from the arguments of a call of ``model`` to the same by name."""
    names = list(inspect.signature(model.forward).parameters)
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def cache_name(given: Mapping[str, Any]) -> str | None:
    """The name under which a call was given a cache, whatever it is; ``None`` when it was given none."""
    for name in CACHE_ARGUMENTS:
        if (value := given.get(name)) is not None and hasattr(value, "get_seq_length"):
            return name
    return next((name for name, value in given.items() if hasattr(value, "get_seq_length")), None)


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache that a call was given, ``None`` without one."""
    name = cache_name(given)
    return None if name is None else given[name]


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call but for its cache."""
    return {k: v for k, v in given.items() if k not in CACHE_ARGUMENTS and k != cache_name(given)}


def cached_tokens(given: Mapping[str, Any]) -> int:
    """Tokens that the cache of a call holds before it."""
    cache = cache_in(given)
    return 0 if cache is None else int(cache.get_seq_length())


def holds_tokens(layer: Any) -> bool:
    """Whether a cache layer keeps what attention reads, and counts it."""
    return hasattr(layer, "get_seq_length")


def tokens_before(cache: Any, index: int) -> int:
    """Tokens that a layer of a cache was given; where it keeps none itself, those of the others."""
    if index >= len(cache.layers):
        return 0
    layers = [cache.layers[index], *cache.layers]
    return next((int(layer.get_seq_length()) for layer in layers if holds_tokens(layer)), 0)


def shares_keys(module: nn.Module) -> str | None:
    """How an attention module shares keys with others of its model; ``None`` where it does not."""
    if getattr(module, "is_kv_shared_layer", False):
        return "it reads the keys of another layer"
    return "other layers read its keys" if getattr(module, "store_full_length_kv", False) else None


def makes_bias(module: nn.Module) -> bool:
    """Whether an attention module makes the bias of positions for itself and later layers, from the number of keys."""
    return bool(getattr(module, "has_relative_attention_bias", False)) and hasattr(module, "compute_bias")


def told_its_layer(module: nn.Module) -> bool:
    """Whether one module stands at several depths of its model, told at each call at which."""
    return "layer_idx" in parameters_of(module)


def cache_parameter(module: nn.Module) -> str | None:
    """The name under which a module's forward takes a cache; ``None`` where it takes none.

    Raises:
        ValueError: it uses a cache, but under a name that is not known here, or hides its arguments.
    """
    function = _forward_of(module)
    given = inspect.signature(function).parameters
    for name in CACHE_ARGUMENTS:
        if name in given:
            return name
    for name, parameter in given.items():
        if "Cache" in str(parameter.annotation):
            return name
    hidden = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for n, p in given.items() if n != "self")
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    if hidden and given.keys() - {"self"}:
        raise ValueError(
            f"{type(module).__name__}.forward({', '.join(list(given)[1:])}) hides its arguments, so its cache cannot "
            "be followed; attach to the model inside it"
        )
    if "update" in names and "layer_idx" in names:
        raise ValueError(
            f"{type(module).__name__}.forward updates a cache that it takes under none of the names "
            f"{list(CACHE_ARGUMENTS)}; its arguments are {list(given)[1:]}"
        )
    return None


def cache_layer(config: Any, index: int) -> Any:
    """The layer that ``generate`` makes for a cache of a model of this configuration, ``None`` where any will do."""
    layers = _need().cache.DynamicCache(config=config).layers
    return layers[index] if index < len(layers) else None


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """``cache`` as the argument under which ``model`` takes it.

    Raises:
        ValueError: the model takes no cache, or one that cannot be named.
    """
    name = cache_parameter(model)
    if name is None:
        raise ValueError(f"{type(model).__name__}.forward takes no cache; its arguments are {parameters_of(model)}")
    return {name: cache}


def cache_out(output: Any) -> Any:
    """The cache that a call of a model returned.

    Raises:
        ValueError: it returned none.
    """
    cache = cache_in(dict(output))
    if cache is None:
        raise ValueError(f"{type(output).__name__} holds no cache; it has {list(output)}")
    return cache


def prompt_being_read(part: nn.Module) -> int | None:
    """Tokens of the prompt that a ``generate`` further up the stack is reading with a model that ``part`` is in.

    ``None`` where an intervention has the model read something else meanwhile, such as the prompt without image.
    """
    frame = sys._getframe(1)
    while frame is not None:
        held = frame.f_locals if frame.f_code.co_varnames[:1] == ("self",) else {}
        if isinstance(held.get("self"), Intervention):
            return None
        if frame.f_code.co_name in READS_PROMPT:
            whole, ids = held.get("self"), held.get("input_ids")
            if isinstance(whole, nn.Module) and isinstance(ids, Tensor) and any(m is part for m in whole.modules()):
                embeds = (held.get("model_kwargs") or {}).get("inputs_embeds")
                return max(ids.shape[1], embeds.shape[1] if isinstance(embeds, Tensor) else 0) or None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def made_cache(output: Any) -> Any:
    """The cache among what a call of a model returned, ``None`` without one."""
    values = list(output.values()) if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


@functools.cache
def output_field() -> str:
    """The name under which ``generate`` looks for a cache among a model's outputs."""
    from transformers.generation import utils

    return str(utils.ALL_CACHE_NAMES[0])


@functools.cache
def _crops_to_length() -> bool:
    return "max_length" in inspect.signature(_need().cache.DynamicLayer.crop).parameters


def tokens_to_remove(given: int, seen: int) -> int:
    """How many tokens ``crop(given)`` is to remove of ``seen``: older releases say which length is to stay."""
    if given < 0:
        return -given
    return max(0, seen - given) if _crops_to_length() else given


def crop(cache: Any, tokens: int) -> None:
    """Remove the newest tokens from a cache, in every release the same."""
    if tokens:
        cache.crop(-tokens)


def encoded_images(given: Mapping[str, Any]) -> Any:
    """Images that were encoded before the call, ``None`` without them."""
    return (given.get(ENCODED) or {}).get("image")


def image_features_between(given: Mapping[str, Any]) -> int:
    """Behind how many first blocks a decoder adds features of images."""
    return len(given.get(BETWEEN_BLOCKS[0]) or ())


def cuts_images(model: Any) -> bool:
    """Whether a model cuts images into crops and ends every row of them with a line break."""
    inner = getattr(model, "model", model)
    return (
        bool(getattr(model.config, "image_grid_pinpoints", None)) and getattr(inner, "image_newline", None) is not None
    )


def with_sizes(model: Any, seen: Callable[[Tensor], None]) -> tuple[nn.Module, str, Callable[..., Any]]:
    """The method by which a model that :func:`cuts_images` encodes them: its owner, its name, and itself, telling
    ``seen`` the sizes of the images."""
    inner = getattr(model, "model", model)
    encode = inner.get_image_features
    known = inspect.signature(encode)

    @functools.wraps(encode)
    def telling(*args: Any, **kwargs: Any) -> Any:
        sizes = known.bind(*args, **kwargs).arguments.get("image_sizes")
        if isinstance(sizes, Tensor):
            seen(sizes)
        return encode(*args, **kwargs)

    return inner, "get_image_features", telling


def crops_of_images(model: Any, sizes: Tensor) -> list[int]:
    """How many crops images of these sizes are cut into, the whole image, which comes first, counted too."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    points, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    return [int(image_size_to_num_patches(size, points, side)) for size in sizes.tolist()]


def reads_images(given: Mapping[str, Any]) -> bool:
    """Whether a call of a model comes with images, to be encoded or already encoded."""
    return isinstance(given.get("pixel_values"), Tensor) or bool(given.get(ENCODED))
