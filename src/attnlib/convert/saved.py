"""Converted models as checkpoints that transformers loads.

Importing :mod:`attnlib.convert` is enough: ``AutoModelForCausalLM.from_pretrained(path)`` then finds the model's own
class with its mixers in place. The configuration keeps every entry of the original one and says which layers were
converted to what; its ``model_type`` is another, so that transformers alone refuses it instead of running softmax
attention with the weights of something else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ..extras import need
from .swap import Swap, swap
from .targets import make_socket

MODEL_TYPE = "attnlib-converted"
ENTRY = "attnlib_conversion"


def plan_of(swapped: Swap) -> dict[str, dict[str, Any]]:
    """What stands where: by the path of the attention module, name and settings."""
    plan = {}
    for path, socket in swapped.sockets.items():
        if socket.name is None:
            raise ValueError(
                f"{path} holds a {type(socket.inner).__name__} that was given as a module, so it cannot be made again; "
                "register its class with attnlib.convert.target and convert by name"
            )
        plan[path] = {"to": socket.name, **socket.settings}
    return plan


def _place(model: nn.Module, path: str) -> str:
    """The path of a module in a model that perhaps has no head, or has one besides."""
    known = {name for name, _ in model.named_modules()}
    prefix = getattr(model, "base_model_prefix", "")
    options = (path, path.removeprefix(prefix + "."), f"{prefix}.{path}")
    found = next((option for option in options if option in known), None)
    if found is None:
        raise ValueError(f"the conversion names {path!r}, which {type(model).__name__} does not have")
    return found


def put_plan(model: nn.Module, plan: dict[str, dict[str, Any]]) -> Swap:
    """Mixers as :func:`plan_of` says, in a model that has the same attention modules, perhaps without its head."""
    plan = {_place(model, path): entry for path, entry in plan.items()}

    def make(site: Any) -> Any:
        settings = dict(plan[site.name])
        return make_socket(site, settings.pop("to"), settings)

    return swap(model, make, list(plan))


def inject(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float
) -> list[tuple[str, nn.Module]]:
    """Low-rank adapters of PEFT around linear layers; these layers by their paths, as they were before."""
    peft: Any = need("peft", "adapters")
    before = {name: model.get_submodule(name) for name in (_place(model, target) for target in targets)}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(before),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in before.values()),
    )  # fmt: skip
    peft.inject_adapter_in_model(config, model)
    for p, flag in flags:
        p.requires_grad_(flag)
    return list(before.items())


def read_entry(folder: Path) -> dict[str, Any]:
    """``{"to", "layers", "adapters"}`` of a folder with a saved conversion."""
    own, config = folder / "attnlib_conversion.json", folder / "config.json"
    entry: Any = None
    if own.exists():
        entry = json.loads(own.read_text(encoding="utf-8"))
    elif config.exists():
        entry = json.loads(config.read_text(encoding="utf-8")).get(ENTRY)
    if not entry:
        raise ValueError(f"path={str(folder)!r} holds no conversion that Conversion.save() wrote")
    names = {layer["to"] for layer in entry["layers"].values()}
    return {"to": names.pop() if len(names) == 1 else "several", **entry}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Weights of a folder into a model that has its mixers and adapters; what is tied may be missing."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    state = {name: t for file in files for name, t in load_file(folder / file).items()}
    wrong = model.load_state_dict(state, strict=False).unexpected_keys
    if wrong:
        raise ValueError(f"path={str(folder)!r} has weights that {type(model).__name__} does not: {wrong[:4]}")


@functools.cache
def _register() -> Any:
    """The configuration's class under :data:`MODEL_TYPE`."""
    from transformers import AutoConfig, PreTrainedConfig

    class ConvertedConfig(PreTrainedConfig):
        """Stands for the class that the original model type gives, see :func:`config_class`."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return config_class(config_dict[ENTRY]["model_type"]).from_dict(config_dict, **kwargs)

    AutoConfig.register(MODEL_TYPE, ConvertedConfig, exist_ok=True)
    return ConvertedConfig


class Converting:
    """Before a model's class: its mixers are made with it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        entry = getattr(config, ENTRY)
        put_plan(self, entry["layers"])  # type: ignore[arg-type]
        if entry.get("adapters"):
            inject(self, **entry["adapters"])  # type: ignore[arg-type]


@functools.cache
def config_class(model_type: str) -> Any:
    """The configuration of converted models of a type, known to every auto class that knows the type."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type.startswith("attnlib-"):
        from ..models import language  # noqa: F401  registers it
    base = CONFIG_MAPPING[model_type]
    config = type(f"Converted{base.__name__}", (base,), {"model_type": MODEL_TYPE, "__module__": __name__})
    for name in dir(modeling_auto):
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or base not in mapping:
            continue
        found = mapping[base]
        auto.register(config, model_class(found[0] if isinstance(found, (list, tuple)) else found, config), True)
    return config


@functools.cache
def model_class(base: type, config: Any) -> type:
    names = {"config_class": config, "__module__": __name__, "__doc__": base.__doc__}
    return type(f"Converted{base.__name__}", (Converting, base), names)


def save_transformers(model: Any, swapped: Swap, path: Path, adapters: dict[str, Any] | None = None) -> None:
    """An ordinary checkpoint folder; ``adapters`` are the arguments of :func:`inject`."""
    plan = plan_of(swapped)
    # A model that was loaded converted has the class already, and its original type in its configuration.
    known = getattr(model.config, ENTRY, None)
    model_type = known["model_type"] if known else model.config.model_type
    model.save_pretrained(path)
    file = path / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": MODEL_TYPE, ENTRY: {"model_type": model_type, "layers": plan, "adapters": adapters}}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _try() -> None:
    try:
        _register()
    except ImportError:
        return  # models of transformers need transformers


_try()
