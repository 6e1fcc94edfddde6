"""Policy and reference on one base: low-rank adapters of peft, of which the reference is a frozen copy or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...checks import check_int, check_real, describe
from ...extras import need

POLICY, REFERENCE = "default", "reference"


def is_adapted(model: Any) -> bool:
    """Whether a model is wrapped by peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def vocabulary_of(model: Any) -> int | None:
    """Rows of the output layer, or what the configuration says."""
    plain = model.get_base_model() if is_adapted(model) else model
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    if head is not None and hasattr(head, "weight"):
        return int(head.weight.shape[0])
    config: Any = getattr(plain, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def language_layers(model: Any) -> list[str]:
    """Paths of the linear layers of the language model, without its output layer: vision and projector stay."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = (nn.Linear, *_conv1d())
    found = [
        name for name, module in model.named_modules()
        if isinstance(module, linear) and module is not head and (not prefix or name.startswith(prefix + "."))
    ]  # fmt: skip
    if not found:
        raise ValueError(f"model={type(model).__name__} has no linear layers to adapt; give adapter=LoraConfig(...)")
    return found


def _conv1d() -> tuple[type, ...]:
    return (need("transformers.pytorch_utils", "adapters").Conv1D,)


def add_policy(model: Any, rank: int, alpha: float, dropout: float, config: Any = None) -> Any:
    """Low-rank adapters, which start as nothing, around the language model's linear layers.

    Args:
        model: of transformers; it is changed in place, ``unload()`` of the result gives it back.
        rank, alpha, dropout: of the adapters.
        config: a ``peft.LoraConfig`` or another configuration of peft in their place.
    """
    peft: Any = need("peft", "preference training with adapters")
    if config is None:
        check_int("rank", rank, least=1)
        check_real("alpha", alpha, above=0)
        check_real("dropout", dropout, least=0, below=1)
        layers = language_layers(model)
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers,
            fan_in_fan_out=any(not isinstance(model.get_submodule(name), nn.Linear) for name in layers),
        )  # fmt: skip
    elif not isinstance(config, peft.PeftConfig):
        raise TypeError(f"adapter must be a configuration of peft, True or False, got {describe(config)}")
    return peft.get_peft_model(model, config, adapter_name=POLICY)


def freeze_copy(model: Any, policy: str, name: str = REFERENCE) -> None:
    """A frozen copy of the adapter ``policy`` on the same base, which stays switched off."""
    peft: Any = need("peft", "preference training with adapters")
    if name in model.peft_config:
        raise ValueError(f"the model already has an adapter {name!r}; delete_adapter({name!r}) first")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    # Making an adapter draws its initial values, which the copy then replaces.
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(name, model.peft_config[policy])
    state = peft.get_peft_model_state_dict(model, adapter_name=policy)
    peft.set_peft_model_state_dict(model, {k: v.clone() for k, v in state.items()}, adapter_name=name)
    model.set_adapter(policy)
    for n, p in model.named_parameters():
        p.requires_grad_(flags.get(n, False))


class Reference:
    """Where the frozen model is: another model, an adapter beside the policy's, or the base without adapters.

    Args:
        policy: the model that is trained.
        given: a model of its own, the name of an adapter of the policy, or ``None`` for the base without adapters.

    Raises:
        ValueError: no reference, one of another vocabulary, or one that holds weights that training changes.
    """

    def __init__(self, policy: Any, given: Any = None):
        self.module, self.adapter = None, None
        if isinstance(given, str):
            if not is_adapted(policy) or given not in policy.peft_config:
                known = sorted(policy.peft_config) if is_adapted(policy) else []
                raise ValueError(f"reference={given!r} is no adapter of the model, which has {known}")
            if given in active_adapters(policy):
                raise ValueError(f"reference={given!r} is the adapter that is trained; a reference is frozen")
            self.adapter = given
        elif given is None:
            if not is_adapted(policy):
                raise ValueError(
                    "policy and reference would share the weights that are trained: train adapters (adapter=True), or "
                    "give reference=, a frozen copy of the model"
                )
            moved = [n for n, p in policy.named_parameters() if p.requires_grad and not _of_adapter(n, policy)]
            if moved:
                raise ValueError(
                    f"policy and reference share weights that are trained besides the adapters: {moved[:3]}; freeze "
                    "them or give reference=, a frozen copy of the model"
                )
        else:
            if not isinstance(given, nn.Module):
                raise TypeError(f"reference must be a model, the name of an adapter or None, got {describe(given)}")
            ours, theirs = vocabulary_of(policy), vocabulary_of(given)
            if ours != theirs:
                raise ValueError(f"policy and reference have other vocabularies: {ours} and {theirs} tokens")
            if given is policy or {id(m) for m in given.modules()} & {
                id(m) for m in policy.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
            }:
                raise ValueError("reference shares modules with the model that is trained; give a frozen copy of it")
            trained = {p.data_ptr() for p in policy.parameters() if p.requires_grad and p.numel()}
            shared = [n for n, p in given.named_parameters() if p.numel() and p.data_ptr() in trained]
            if shared:
                raise ValueError(f"policy and reference share weights that are trained: {shared[:3]}; give a copy")
            self.module = given

    @contextlib.contextmanager
    def reading(self, policy: Any) -> Iterator[Any]:
        """The frozen model, in evaluation and without gradients; afterwards the policy is as it was."""
        model = self.module if self.module is not None else policy
        modes = [(m, m.training) for m in model.modules()]
        flags = [(p, p.requires_grad) for p in model.parameters()]
        active = None
        model.eval()
        try:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                if self.adapter is not None:
                    active = active_adapters(policy)
                    policy.set_adapter(self.adapter)
                elif self.module is None:
                    stack.enter_context(policy.disable_adapter())
                yield model
        finally:
            if active is not None:
                policy.set_adapter(active[0] if len(active) == 1 else active)
            for m, mode in modes:
                m.training = mode
            for p, flag in flags:
                p.requires_grad_(flag)


def active_adapters(model: Any) -> list[str]:
    """Names of the adapters that are switched on."""
    active = model.active_adapter
    return [active] if isinstance(active, str) else list(active)


def _of_adapter(name: str, model: Any) -> bool:
    prefix = getattr(model.base_model, "prefix", "lora_")
    return prefix in name or "modules_to_save" in name or any(f".{a}." in name or name.endswith(f".{a}") for a in
                                                              model.peft_config)  # fmt: skip
