"""Vision models by name: what is released in which sizes, and how to build and load it.

>>> import attnlib
>>> sorted(attnlib.list_models("dinat_mini*"))
['dinat_mini']
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_int, check_ints, check_type, checked, describe
from ..extras import need
from ..files import read_file, state_dict_in
from ..nn.registry import shared_acronym
from ..nn.released import WRAPPERS, unwrapped
from ..positions import resized

log = logging.getLogger("attnlib")

Convert = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class ModelEntry:
    """One released size of a model.

    Args:
        name: what :func:`create_model` knows it by.
        family: slug of its paper.
        make: builds it from its settings.
        settings: of this size.
        params: parameters with the released head, as counted on the authors' class.
        license: of the released weights; empty when none are released.
        source: repository of the authors' code, ``owner/name``.
        weights: ``(repository, file)`` on the Hugging Face hub; empty when the weights lie elsewhere.
        convert: from the released state dict to ours: ``convert(state_dict, model)``.
        img_size: side of the images it was trained on.
        task: ``"classify"``, ``"clips"`` (to classify), ``"restore"``, ``"detect"``, ``"segment"``, ``"bags"`` (of
            features) or ``"pretrain"``.
        data: how images come to it where that differs from ImageNet's ``mean`` and ``std``, a ``crop_pct`` of 0.9 and
            bicubic ``interpolation``.
    """

    name: str
    family: str
    make: Callable[..., nn.Module]
    settings: Mapping[str, Any]
    params: int | None = None
    license: str = ""
    source: str = ""
    weights: tuple[str, str] | tuple[()] = ()
    convert: Convert | None = None
    img_size: int = 224
    task: str = "classify"
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name, "family": self.family, "params": self.params, "license": self.license,
            "source": self.source, "weights": "/".join(self.weights), "img_size": self.img_size, "task": self.task,
        }  # fmt: skip


_MODELS: dict[str, ModelEntry] = {}
_discovered = False


def register_models(
    family: str,
    make: Callable[..., nn.Module],
    sizes: Mapping[str, Mapping[str, Any]],
    *,
    params: Mapping[str, int] | None = None,
    license: str = "",
    source: str = "",
    weights: Mapping[str, tuple[str, str]] | None = None,
    convert: Convert | None = None,
    img_size: int | Mapping[str, int] = 224,
    task: str = "classify",
    data: Mapping[str, Any] | None = None,
    data_of: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Make the sizes of a family known.

    Args:
        family: slug of the paper.
        make: builds a model from the settings of a size and what :func:`create_model` hands on.
        sizes: settings by name.
        params: parameters by name, as counted on the authors' class.
        license, source, convert, task: as in :class:`ModelEntry`.
        weights: ``(repository, file)`` by name.
        img_size: one for all, or by name (224 where absent).
        data: as in :class:`ModelEntry`, of all.
        data_of: the same by name, before ``data``.
    """
    for name, settings in sizes.items():
        if name in _MODELS and _MODELS[name].make is not make:
            raise ValueError(f"model {name!r} is registered already, by {_MODELS[name].family!r}")
        side = img_size if isinstance(img_size, int) else img_size.get(name, 224)
        _MODELS[name] = ModelEntry(
            name, family, make, dict(settings), (params or {}).get(name), license, source,
            (weights or {}).get(name, ()), convert, side, task, {**(data or {}), **(data_of or {}).get(name, {})},
        )  # fmt: skip


def discover() -> None:
    """Import every module of models once, so that all registrations have run."""
    global _discovered
    if _discovered:
        return
    for room in ("backbones", "bags", "dense", "detect", "pretrain", "restore"):
        try:
            package = importlib.import_module(f"attnlib.models.{room}")
        except ModuleNotFoundError as error:
            if error.name != f"attnlib.models.{room}":
                raise
            continue
        for module in pkgutil.walk_packages(package.__path__, prefix=f"attnlib.models.{room}."):
            importlib.import_module(module.name)
    _discovered = True


def list_models(pattern: str = "*", family: str | None = None) -> list[str]:
    """Names of models, sorted.

    Args:
        pattern: as of a shell: ``"maxvit*"``.
        family: slug of a paper.
    """
    discover()
    check_type("pattern", pattern, str)
    return sorted(
        n for n, e in _MODELS.items() if fnmatch.fnmatch(n, pattern) and (family is None or e.family == family)
    )


def model_entry(name: str) -> ModelEntry:
    """What is known of a model.

    Raises:
        ValueError: unknown name; the nearest, or the sizes of the family of that name, are listed. An acronym that
            several papers share lists what it may mean.
    """
    discover()
    check_type("name", name, str, "the name of a model")
    entry = _MODELS.get(name)
    if entry is not None:
        return entry
    shared_acronym(name, "model ")
    own = [n for n in _MODELS if n.startswith(f"{name}_")] or [n for n, e in _MODELS.items() if e.family == name]
    near = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(n) for n in own[:8] or near)}?" if own or near else "`attnlib models`"
    raise ValueError(f"unknown model {name!r}; {hint}")


def create_model(
    name: str,
    pretrained: bool | str | Path = False,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    drop_rate: float | None = None,
    global_pool: str | None = None,
    mechanism: str | Callable[..., nn.Module] | None = None,
    mechanism_settings: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Build a released model, or a variation of it.

    Args:
        name: one of :func:`list_models`.
        pretrained: True to fetch the released weights from the Hugging Face hub; a path to load a file of them
            (``.safetensors``, ``.pth``, ``.bin``), in the authors', in timm's or in our names.
        num_classes: of the head; the released number by default, 0 for none. Another number than the released one gives
            a new head.
        in_chans: channels of images, 3 for most; the first convolution of released weights is adapted to another
            number.
        img_size: side of images, for models that hold tables of positions.
        features_only: return the maps of the stages instead of logits, as timm does.
        out_indices: which levels of ``feature_info``, with ``features_only``; all by default.
        drop_path_rate: stochastic depth of the last block.
        drop_rate: dropout before the head.
        global_pool: ``"avg"``, ``"max"`` or ``""`` (none); ``"token"`` where a model has a class token.
        mechanism: a registered mechanism (or a function from a :class:`attnlib.models.blocks.Place` to a module) that
            takes the place of the model's own in every block.
        mechanism_settings: of that mechanism, beyond width and heads.
        settings: of the family's constructor.

    Returns:
        The model: ``(B, in_chans, H, W) -> (B, num_classes)``, or a list of ``(B, C_i, H_i, W_i)``.

    Raises:
        ValueError: an unknown name, weights of another model, a stage that does not exist.
        TypeError: a setting that the family does not take.
        FileNotFoundError: no such file of weights.
        OSError: weights that cannot be fetched.
    """
    entry = model_entry(name)
    check_flag("features_only", features_only)
    if not isinstance(pretrained, (bool, str, Path)):
        other = "; load_pretrained(model, state_dict) takes one" if isinstance(pretrained, Mapping) else ""
        raise TypeError(f"pretrained must be True, False or a path, got {describe(pretrained)[:80]}{other}")
    if out_indices is not None and not features_only:
        raise ValueError("out_indices was given without features_only=True")
    given: dict[str, Any] = {
        "in_chans": entry.settings.get("in_chans", 3) if in_chans is None else check_int("in_chans", in_chans, least=1),
        "num_classes": None if num_classes is None else check_int("num_classes", num_classes, least=0),
        "img_size": img_size, "drop_path_rate": drop_path_rate, "drop_rate": drop_rate, "global_pool": global_pool,
        "mechanism": mechanism,
    }  # fmt: skip
    if img_size is not None:
        sides = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
        if len(sides) != 2:
            raise ValueError(f"img_size must be one side or (height, width), got {sides}")
    if mechanism_settings is not None and not isinstance(mechanism, str):
        raise ValueError("mechanism_settings was given without the name of a mechanism")
    if isinstance(mechanism, str):
        from .blocks import fitted

        given["mechanism"] = fitted(mechanism, mechanism_settings)
    given = {k: v for k, v in given.items() if v is not None}
    model: Any = _built(entry, {**given, **settings})
    model.entry = entry
    if pretrained is not False:
        load_pretrained(model, None if pretrained is True else pretrained)
    if features_only:
        from .backbones.stages import Features

        model = getattr(getattr(model, "encoder", None), "model", model)  # of a dense model, its backbone
        if not hasattr(model, "feature_info"):
            raise ValueError(f"{name!r} has no stages to take maps from (features_only=True)")
        return Features(model, out_indices)
    return model


def _built(entry: ModelEntry, given: Mapping[str, Any]) -> Any:
    """A model, or an error that names what was given."""
    settings = {**entry.settings, **given}
    try:
        if not isinstance(entry.make, type):
            return checked(entry.make)(**settings)
        model: Any = object.__new__(entry.make)
        checked(entry.make.__init__)(model, **settings)  # type: ignore[misc]
        return model
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        refusal = isinstance(error, (TypeError, ValueError))
        if not given or (refusal and any(name in str(error) for name in given)):
            if refusal and "argument" in str(error):
                raise type(error)(f"{entry.name!r}: {error}") from None
            raise
        what = ", ".join(f"{name}={describe(value)}" for name, value in given.items())
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{entry.name!r} cannot be built with {what}: {error}") from error


def counted_params(entry: ModelEntry) -> int:
    """Parameters of a model with its released head, counted on one that holds no numbers."""
    with torch.device("meta"):
        return sum(p.numel() for p in entry.make(**entry.settings).parameters())


def register_with_timm() -> list[str]:
    """Make every classifier known to timm, as ``attnlib_<name>``: ``timm.create_model("attnlib_dinat_mini")``.

    Returns:
        The names.

    Raises:
        ImportError: timm is not installed.
    """
    registry = need("timm.models", "register_with_timm")
    names = []
    for name in list_models():
        if model_entry(name).task == "classify":
            names.append(f"attnlib_{name}")
            registry.register_model(_for_timm(name, names[-1]))
    return names


def _for_timm(name: str, known_as: str) -> Callable[..., Any]:
    def build(pretrained: bool = False, **settings: Any) -> Any:
        ours = {k: v for k, v in settings.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
        return create_model(name, pretrained, **ours)

    build.__name__ = build.__qualname__ = known_as
    build.__module__ = __name__
    return build


@dataclass
class Loaded:
    """What became of a state dict: names of ours.

    Args:
        resized: tables that were interpolated to this model's size, and kernels of patches that were resampled.
        adapted: first convolutions that were changed to another number of channels.
        dropped: a head of another number of classes, which stays as it was initialised.
        uncounted: numbers of batches that norms have seen, which old files do not hold; they stay as they were.
        beside: entries of theirs that stand beside a whole model (of a loss that was trained with it, for example).
    """

    resized: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    uncounted: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: ``.safetensors``, or what ``torch.save`` wrote, also inside a training checkpoint.

    Whatever else a checkpoint holds (settings, an optimizer, a whole module instead of its state dict) does not matter,
    and none of its code runs. Averaged weights go before others (:data:`attnlib.files.PLACES`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no state dict in it, several of which nothing says which one is meant, or no such kind of file.
    """
    return state_dict_in(read_file(path, "pretrained"), str(path))


def load_pretrained(model: Any, source: str | Path | Mapping[str, Tensor] | None = None) -> Loaded:
    """Load released weights into a model that :func:`create_model` built.

    Args:
        model: ours.
        source: file, state dict, or training checkpoint with one, in the authors', in timm's or in our names; ``None``
            to fetch it from the hub.

    Raises:
        ValueError: entries that are missing, left over or of another shape; all are named.
        OSError: cannot be fetched.
    """
    entry: ModelEntry = model.entry
    if source is None:
        source = _fetch(entry)
    if isinstance(source, nn.Module) or not isinstance(source, (Mapping, str, Path)):
        raise TypeError(f"source must be a path, a state dict or None, got {describe(source)}")
    state = state_dict_in(source, "source") if isinstance(source, Mapping) else read_weights(source)
    own, head = model.state_dict(), tuple(getattr(model, "head_names", ()))
    done = Loaded()
    theirs, done.beside = _without(unwrapped(state), own)
    if {key for key in theirs if key not in own and not (head and key.startswith(head))} and entry.convert is not None:
        try:
            state = entry.convert(state, model)
        except ValueError:
            if sum(key in own for key in theirs) <= len(own) // 2:
                raise
            state = theirs  # in our names: what is told below is what is amiss
    else:
        state = theirs
    done.uncounted = [key for key in own if key not in state and key.endswith("num_batches_tracked")]
    if len(done.uncounted) == sum(key.endswith("num_batches_tracked") for key in own):  # a file that counts none
        state.update({key: own[key] for key in done.uncounted})
    else:
        done.uncounted = []
    for key in [k for k in state if k in own and state[k].shape != own[k].shape]:
        value, like = state[key], own[key]
        if key.startswith(head) and head:
            done.dropped += [k for k in own if k.startswith(head)]
        elif key == getattr(model, "input_name", None) or key in getattr(model, "more_inputs", ()):
            if value.shape[2:] != like.shape[2:] and getattr(model, "resamples_input", False):
                value = resampled_patch(value, like.shape[2:])
                done.resized.append(key)
            if value.shape[1] != like.shape[1]:
                value = _adapt_channels(value, like.shape[1])
                done.adapted.append(key)
            state[key] = value
        elif (axes := _table_axes(model, key)) and value.shape[:-axes] == like.shape[:-axes]:
            mode = getattr(_owner(model, key), "table_mode", "bicubic")
            state[key] = resized(value, like.shape[-axes:], mode, antialias=getattr(model, "antialias", False))
            done.resized.append(key)
    done.dropped = sorted(set(done.dropped))
    for key in done.dropped:
        state[key] = own[key]
    if not hasattr(model, "num_classes") or model.num_classes == 0:
        state = {k: v for k, v in state.items() if k in own or not (head and k.startswith(head))}
    missing, left = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    other = [f"{k} {tuple(state[k].shape)}, ours {tuple(own[k].shape)}" for k in own if k in state and
             state[k].shape != own[k].shape]  # fmt: skip
    if missing or left or other:
        parts = [f"{what}: {_some(names)}" for what, names in
                 (("missing", missing), ("left over", left), ("of another shape", other)) if names]  # fmt: skip
        if head and missing and not left and not other and all(key.startswith(head) for key in missing):
            parts.append("all of that is the head: num_classes=0 loads a file without one")
        raise ValueError(f"these are no weights of {entry.name!r}; {'; '.join(parts)}")
    if any(t.is_meta for t in own.values()):  # without storage: the file's tensors become the model's
        model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, strict=True, assign=True)
    else:
        model.load_state_dict(state, strict=True)
    for what, names in (("interpolated", done.resized), ("adapted", done.adapted), ("left new", done.dropped),
                        ("not counted in the file", done.uncounted), ("beside the model", done.beside)):  # fmt: skip
        if names:
            log.info("%s: %s %s", entry.name, what, ", ".join(names))
    return done


def _without(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A whole model of ours below a wrapper's name, and what stands beside it; everything where there is none."""
    for wrapper in WRAPPERS:
        part = unwrapped({key: value for key, value in state.items() if key.startswith(wrapper)})
        if own.keys() <= part.keys() and not own.keys() <= state.keys():
            return part, sorted(key for key in state if not key.startswith(wrapper))
    return state, []


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _fetch(entry: ModelEntry) -> str:
    if not entry.weights:
        where = f"; their home is https://github.com/{entry.source}" if entry.source else ""
        raise OSError(
            f"the weights of {entry.name!r} are not on the Hugging Face hub: pretrained=PATH loads a file{where}"
        )
    hub = need("huggingface_hub", f"create_model({entry.name!r}, pretrained=True)")
    repository, file = entry.weights
    try:
        return hub.hf_hub_download(repository, file)
    except Exception as error:
        raise OSError(
            f"{file} of {repository} on the Hugging Face hub, the weights of {entry.name!r}, could not be fetched and "
            f"is not in the cache ({type(error).__name__}); connect once, or give a file: pretrained=PATH"
        ) from error


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution for another number of channels, with the same answer to grey images."""
    count = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeats = -(-channels // count)
    return weight.repeat(1, repeats, *[1] * (weight.dim() - 2))[:, :channels] * (count / channels)


def _table_axes(model: nn.Module, key: str) -> int:
    """How many last axes of a parameter are a table of places, by the ``tables`` of the module that owns it."""
    return getattr(_owner(model, key), "tables", {}).get(key.rpartition(".")[2], 0)


def _owner(model: nn.Module, key: str) -> nn.Module | None:
    """The module whose parameter ``key`` is; how it wants its tables interpolated is its ``table_mode``."""
    try:
        return model.get_submodule(key.rpartition(".")[0])
    except AttributeError:
        return None


def resampled_patch(kernel: Tensor, size: Sequence[int], method: str = "pseudo-inverse") -> Tensor:
    """A kernel that embeds patches of h x w pixels, for patches of another size.

    ``"pseudo-inverse"`` (Beyer et al., 2022, "FlexiViT", arXiv 2212.08013): with B the matrix that resizes a patch
    (bicubic, antialiased), the new kernel ``pinv(B^T) w`` gives a resized patch ``B x`` the embedding ``<x, w>`` of the
    patch: exactly for larger patches, in the sense of least squares for smaller ones. ``"bicubic"`` interpolates the
    kernel, as EVA's script from 14 to 16 pixels does; embeddings then grow with the number of pixels.

    Args:
        kernel: (C, in_chans, h, w).
        size: (h', w').
        method: as above.

    Raises:
        ValueError: another method, a size below one pixel.
    """
    check_choice("method", method, ("pseudo-inverse", "bicubic"))
    sides = check_ints("size", tuple(size), least=1)
    if tuple(kernel.shape[2:]) == sides:
        return kernel
    if method == "bicubic":
        made = F.interpolate(kernel.float(), sides, mode="bicubic", align_corners=False)
        return made.to(kernel.dtype)
    count = kernel.shape[2] * kernel.shape[3]
    basis = torch.eye(count, dtype=torch.float64, device=kernel.device).view(count, 1, *kernel.shape[2:])
    turned = F.interpolate(basis, sides, mode="bicubic", align_corners=False, antialias=True).flatten(1)  # B^T
    made = kernel.double().flatten(2) @ torch.linalg.pinv(turned).T
    return made.unflatten(2, sides).to(kernel.dtype)
