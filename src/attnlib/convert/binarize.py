"""BiViT: a trained vision transformer made one of single bits (He et al., 2022, arXiv 2211.07091).

The linear maps of attention and MLPs become signs times a scale per output (:class:`attnlib.nn.binary.BinaryLinear`),
queries, keys and values become signs, and attention maps become 0 or 1: 1 where a weight of softmax reaches a share of
its row's largest. Embeddings, norms, biases of positions, the merging of patches and the head stay as they are. The
model keeps its weights and is trained on, in two phases, a part in each::

    binarize(model, "attention")  # MLPs are whole
    ...                           # train
    binarize(model, "mlp")
    ...                           # train
    save(model, folder)
    model = load(folder, model)   # of the same architecture, whole

DeiT, ViT and Swin of transformers, plain vision transformers and Swin V2 of attnlib. In Swin the bias of positions is
added to the scores before they are compared, and a window's mask hides pairs before; in Swin V2 signs are divided by
their length, which is the same for all. Which part comes first the paper's summary leaves open.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_type, to_list
from ..hooks.attach import _adapter
from ..nn.binary import COMPAT, SCALES, BinaryLinear
from ..nn.frame import HeadFrame
from ..nn.partition.maxvit import PartitionAttention
from ..nn.partition.swinv2 import CosineWindowAttention
from ..normalizers import Step, Thresholded, as_normalizer
from ..ops import attention
from .prune import kind_of

#: What can be made binary.
PARTS = ("attention", "mlp")
#: Where a module of transformers keeps how its scores become weights.
NORMALIZER = "attnlib_normalizer"
_FILE, _NOTE = "binary.safetensors", "attnlib_binary.json"
_NORMALIZERS: dict[str, Any] = {"thresholded": Thresholded, "step": Step}


@dataclass(frozen=True)
class Binarized:
    """What :func:`binarize` changed: paths of attention modules, and of linear maps."""

    attention: tuple[str, ...]
    linear: tuple[str, ...]

    @property
    def bits(self) -> str:
        return f"{len(self.attention)} attention maps and {len(self.linear)} linear maps of one bit"


# --------------------------------------------------------------------------------------------------------------------
# transformers


def _attend(
    weights: bool, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention function of a binary module."""
    from ..hooks.hf.names import BIAS, CHOOSES, SINKS

    for name in (BIAS, "softcap", "sliding_window", *SINKS, *CHOOSES):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} is given {name}, which binary attention does not have")
    mask, bias = (attention_mask, None) if attention_mask is None or attention_mask.dtype == torch.bool else (
        None, attention_mask)  # fmt: skip
    found = attention(
        query, key, value, mask=mask, bias=bias, scale=scaling, normalizer=getattr(module, NORMALIZER),
        dropout_p=dropout, return_weights=weights,
    )  # fmt: skip
    out, map_ = found if weights else (found, None)
    return out.transpose(1, 2).contiguous(), map_


@functools.cache
def _named(implementation: str) -> str:
    """The name under which a binary module finds :func:`_attend`, with the model's masks; eager ones give their map."""
    from ..hooks.hf.names import PREFIX, _need

    hf = _need()
    name = f"{PREFIX}binary_{implementation}"
    hf.attention.register(name, functools.partial(_attend, implementation == "eager"))
    if implementation in hf.masks:
        hf.mask_interface.register(name, hf.masks[implementation])
    return name


def _put_in_transformers(module: Any, normalizer: Any) -> None:
    from ..hooks.hf.names import seen_through

    module.config = seen_through(module.config, _named)
    setattr(module, NORMALIZER, normalizer)


def _why_not_transformers(module: Any) -> str | None:
    from ..hooks.hf.names import makes_bias

    if getattr(module, "is_causal", False):
        return "it is causal"
    if makes_bias(module) or not hasattr(module, "config"):
        return "its scores are not made by an attention function of transformers"
    return None


# --------------------------------------------------------------------------------------------------------------------
# Ours


def _why_not_ours(module: Any) -> str | None:
    from ..hooks.modules.native import _softmax

    if isinstance(module, PartitionAttention):
        return None if as_normalizer(module.normalizer).name == "softmax" else "it is not softmax attention"
    if not isinstance(module, HeadFrame) or not _softmax(module):
        return "it is not plain softmax attention"
    if module.rotary is not None:
        return "its queries and keys are turned by their positions, which leaves no signs"
    for name in ("q_norm", "k_norm"):
        norm = getattr(module, name)
        if norm is not None and not isinstance(norm, nn.Identity):
            return f"its {name} stands behind the signs"
    return None


def _put_in_ours(module: Any, normalizer: Any) -> None:
    module.normalizer = normalizer


def _one_bias(module: nn.Module) -> None:
    """Biases of queries and values that are added behind the map become its own, so that signs are of the sum."""
    if not isinstance(module, CosineWindowAttention) or module.q_bias is None or module.v_bias is None:
        return
    bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias]).detach()
    if module.qkv.bias is not None:
        bias = bias + module.qkv.bias.detach()
    module.qkv.bias = nn.Parameter(bias)
    module.q_bias = module.v_bias = None


# --------------------------------------------------------------------------------------------------------------------


def _family(model: nn.Module) -> tuple[list[Any], Any, Any]:
    adapter = _adapter(model)
    if adapter.name == "transformers":
        return adapter.sites(model, None), _why_not_transformers, _put_in_transformers
    if adapter.name == "diffusers":
        raise ValueError(f"{type(model).__name__} of diffusers cannot be made binary; vision transformers can")
    return adapter.sites(model, None), _why_not_ours, _put_in_ours


def _linear(module: nn.Module, kinds: Sequence[str], under: str = "") -> dict[str, str]:
    """Kind of every linear map of these kinds, by path."""
    found = {}
    for name, layer in module.named_modules():
        path = ".".join(part for part in (under, name) if part)
        if isinstance(layer, nn.Linear) and (kind := kind_of(path)) in kinds:
            found[path] = str(kind)
    return found


def _plan(model: nn.Module, parts: Sequence[str], settings: Mapping[str, Any], normalizer: Any) -> dict[str, Any]:
    """Normalizers of attention modules and settings of linear maps, by path."""
    plan: dict[str, Any] = {"attention": {}, "linear": {}}
    sites, why_not, _ = _family(model)
    inside = {path for site in sites for path in _linear(site.module, ("qkv", "proj", "mlp"), site.name)}
    if "attention" in parts:
        if not sites:
            raise ValueError(f"no attention of {type(model).__name__} is known")
        for site in sites:
            if any(isinstance(m, BinaryLinear) for m in site.module.modules()):
                raise ValueError(f"{site.name} is binary already")
            maps = _linear(site.module, ("qkv", "proj"), site.name)
            reason = why_not(site.module)
            if reason is None and {"qkv", "proj"} - set(maps.values()):
                reason = "its maps of queries, keys, values and outputs are not linear layers of known names"
            if reason is not None:
                raise ValueError(f"{site.name} ({type(site.module).__name__}) cannot be made binary: {reason}")
            plan["attention"][site.name] = normalizer
            for path, kind in maps.items():
                plan["linear"][path] = {**settings, "binary_input": True, "binary_output": kind == "qkv"}
    if "mlp" in parts:
        maps = {path: kind for path, kind in _linear(model, ("mlp",)).items() if path not in inside}
        if not maps:
            raise ValueError(f"no MLP of {type(model).__name__} is known")
        for path in maps:
            if isinstance(model.get_submodule(path), BinaryLinear):
                raise ValueError(f"{path} is binary already")
            plan["linear"][path] = dict(settings)
    for path in plan["linear"]:
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            raise ValueError(f"{path} must be a plain nn.Linear, got {type(layer).__name__}")
    return plan


def _put(model: nn.Module, plan: Mapping[str, Any]) -> None:
    put = _family(model)[2]
    for path, normalizer in plan["attention"].items():
        module = model.get_submodule(path)
        _one_bias(module)
        put(module, normalizer)
    for path, settings in plan["linear"].items():
        layer: Any = model.get_submodule(path)
        check_type(path, layer, nn.Linear)
        made = BinaryLinear.of(layer, **settings)
        for name, p in layer.named_parameters():
            getattr(made, name).requires_grad_(p.requires_grad)
        model.set_submodule(path, made.train(layer.training))


def binarize(
    model: nn.Module,
    parts: str | Sequence[str] = PARTS,
    *,
    normalizer: str = "thresholded",
    share: float = 0.25,
    scale: str = "learned",
    mlp_input: bool = True,
    compat: str | None = None,
) -> Binarized:
    """Make parts of a vision transformer binary, in place; see the module.

    Args:
        model: of transformers (DeiT, ViT, Swin) or attnlib (plain ones, Swin V2).
        parts: ``"attention"``, ``"mlp"`` or both; the other may follow later.
        normalizer, share: how scores become 0 or 1, as of :class:`attnlib.nn.dense.bivit.BinaryAttention`.
        scale, compat: of the linear maps, see :class:`attnlib.nn.binary.BinaryLinear`.
        mlp_input: whether what MLPs read is signs, too; two of the three released MLPs read numbers.

    Raises:
        TypeError: a model whose attention is not known.
        ValueError: attention that is not softmax of a known kind, a part that is binary already, or no MLP.
    """
    check_type("model", model, nn.Module)
    chosen = [parts] if isinstance(parts, str) else to_list("parts", parts) or []
    for part in chosen:
        check_choice("parts", part, PARTS)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"parts must name some of {PARTS}, each once, got {parts!r}")
    check_choice("normalizer", normalizer, tuple(_NORMALIZERS))
    check_choice("scale", scale, SCALES)
    check_choice("compat", compat, COMPAT)
    made = Thresholded(share) if normalizer == "thresholded" else Step()
    settings = {"scale": scale, "compat": compat, "binary_input": check_flag("mlp_input", mlp_input)}
    plan = _plan(model, chosen, settings, made)
    _put(model, plan)
    return Binarized(tuple(plan["attention"]), tuple(plan["linear"]))


def plan_of(model: nn.Module) -> dict[str, Any]:
    """What of a model is binary: ``{"attention": {path: normalizer}, "linear": {path: settings}}``, for JSON."""
    check_type("model", model, nn.Module)
    linear = {path: m.settings for path, m in model.named_modules() if isinstance(m, BinaryLinear)}
    found = {}
    for site in _family(model)[0] if linear else ():
        made = getattr(site.module, NORMALIZER, getattr(site.module, "normalizer", None))
        if made is not None and as_normalizer(made).name in _NORMALIZERS:
            found[site.name] = {"name": as_normalizer(made).name, **asdict(as_normalizer(made))}
    return {"attention": found, "linear": linear}


def save(model: nn.Module, folder: str | Path) -> None:
    """Write weights, scales and what is binary; of a model of transformers also its configuration."""
    plan = plan_of(model)
    if not plan["linear"]:
        raise ValueError(f"{type(model).__name__} has nothing that is binary; call binarize(model) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / _FILE)
    (folder / _NOTE).write_text(json.dumps({"class": type(model).__name__, **plan}, indent=2) + "\n", encoding="utf-8")
    if (config := getattr(model, "config", None)) is not None and hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read what :func:`save` wrote, every weight accounted for.

    Args:
        folder: where.
        model: whole, of the architecture that was saved; changed in place. ``None`` makes one of transformers from the
            configuration in the folder.

    Raises:
        FileNotFoundError: nothing of ours is there.
        ValueError: another class.
        RuntimeError: weights that do not fit.
    """
    folder = Path(folder)
    if not (folder / _NOTE).exists():
        raise FileNotFoundError(f"folder={str(folder)!r} holds no {_NOTE}; attnlib.convert.binarize.save writes one")
    said = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
    if model is None:
        import transformers

        cls = getattr(transformers, said["class"], None)
        if cls is None or not (folder / "config.json").exists():
            raise ValueError(f"the folder is of a {said['class']}, not of transformers: give model=, whole")
        model = cls(cls.config_class.from_pretrained(folder))
    check_type("model", model, nn.Module)
    if type(model).__name__ != said["class"]:
        raise ValueError(f"model must be a {said['class']}, which was saved, got {type(model).__name__}")
    made = {}
    for path, entry in said["attention"].items():
        entry = dict(entry)
        made[path] = _NORMALIZERS[entry.pop("name")](**entry)
    names = {name for name, _ in model.named_modules()}
    if missing := sorted({*made, *said["linear"]} - names):
        raise ValueError(f"model has no {missing[0]!r}, which was saved")
    if present := [path for path in said["linear"] if isinstance(model.get_submodule(path), BinaryLinear)]:
        raise ValueError(f"model must be whole, but {present[0]} is binary already")
    _put(model, {"attention": made, "linear": said["linear"]})
    model.load_state_dict(load_file(folder / _FILE))
    return model


__all__ = ["PARTS", "Binarized", "binarize", "load", "plan_of", "save"]
