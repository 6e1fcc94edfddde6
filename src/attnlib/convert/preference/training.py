"""Preferences in transformers' ``Trainer``: one call, or a trainer to set up."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import check_flag, check_int, check_real, check_type, describe
from ...extras import need
from .batches import Collator, Preference, read_batch, to_pairs, weights_of
from .recipes import Recipe, get_recipe, sft
from .reference import REFERENCE, Reference, active_adapters, add_policy, freeze_copy, is_adapted, vocabulary_of
from .variants import About


@functools.cache
def _trainer_class() -> type:
    base: Any = need("transformers", "preference training").Trainer

    class PreferenceTrainer(base):
        """``Trainer`` whose loss is that of a recipe; batches come from :class:`~.batches.Collator`."""

        def __init__(self, *args: Any, recipe: Recipe, reference: Reference | None, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.recipe, self.reference = recipe, reference
            self._parts: dict[str, list[float]] = {}

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            frozen = None
            if self.recipe.needs_reference and self.reference is not None:
                # First, so that the policy is in place when its gradients are taken.
                with self.reference.reading(self.accelerator.unwrap_model(model)) as other:
                    frozen = read_batch(other, self.recipe, inputs)
            losses = self.recipe.loss(
                read_batch(model, self.recipe, inputs), frozen, inputs["valid"], weights_of(inputs)
            )
            for name, value in {**losses.parts, **margins(self.recipe, losses.rewards)}.items():
                self._parts.setdefault(name, []).append(float(value.detach()))
            return (losses.total, losses.parts) if return_outputs else losses.total

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, **{k: sum(v) / len(v) for k, v in self._parts.items()}}, *args, **kwargs)
            self._parts = {}

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    return PreferenceTrainer


def margins(recipe: Recipe, rewards: Any) -> dict[str, Tensor]:
    """``margin/<term>``: how much more reward the chosen side has, mean over the batch, and the share above zero."""
    out = {}
    for term in recipe.terms:
        gap = rewards[term.chosen.read] - rewards[term.rejected.read]
        out[f"margin/{term.name}"], out[f"accuracy/{term.name}"] = gap.mean(), (gap > 0).float().mean()
    return out


def trainer(
    model: Any,
    pairs: Iterable[Any],
    recipe: str | Recipe = "dpo",
    args: Any = None,
    *,
    reference: Any = None,
    processor: Any = None,
    seed: int = 0,
    **more: Any,
) -> Any:
    """transformers' ``Trainer`` over pairs, to be set up further.

    Args:
        model: with adapters (``reference`` is then the base without them, or a named adapter), or a plain model with
            ``reference``, a frozen copy.
        pairs, recipe, reference, processor: as of :func:`train`.
        args: ``TrainingArguments``; ``remove_unused_columns`` is set to ``False``.
        seed: of image variants.
        more: further arguments of ``Trainer``: ``eval_dataset`` (checked pairs), ``callbacks``, ``optimizers``.
    """
    recipe = get_recipe(recipe)
    _check_model(model)
    made, recipe = to_pairs(pairs, recipe, processor, vocabulary_of(model))
    if args is not None:
        args.remove_unused_columns = False
    plain = model.get_base_model() if is_adapted(model) else model
    pad = getattr(plain.config.get_text_config(), "pad_token_id", None)
    generator = torch.Generator().manual_seed(check_int("seed", seed))
    collator = Collator(recipe, About.of(plain), pad if isinstance(pad, int) and pad >= 0 else 0, generator)
    held = Reference(model, reference) if recipe.needs_reference else None
    return _trainer_class()(
        model=model, args=args, train_dataset=made, data_collator=collator, recipe=recipe, reference=held, **more
    )


@dataclass
class Trained:
    """What :func:`train` gives.

    Args:
        model: the policy: with adapters (peft's model around the user's), or the model itself.
        recipe: as it was used, without parts that no pair had.
        history: what the trainer logged, per step: the loss, every part, rewards' margins and their accuracy.
        alignment: the same of the stage before, if there was one.
    """

    model: Any
    recipe: Recipe
    history: list[dict[str, float]] = field(default_factory=list)
    alignment: list[dict[str, float]] = field(default_factory=list)
    _flags: list[tuple[Any, bool]] = field(default_factory=list, repr=False)

    @property
    def terms(self) -> list[str]:
        """Names of the parts that were trained."""
        return [part.name for part in self.recipe.parts]

    def save(self, path: str | Path) -> None:
        """The trained adapter alone, as peft saves it; without adapters the whole model."""
        more = {"selected_adapters": active_adapters(self.model)} if is_adapted(self.model) else {}
        self.model.save_pretrained(path, **more)
        (Path(path) / "preference.json").write_text(json.dumps({"terms": self.terms, "beta": self.recipe.beta}) + "\n")

    def merge(self) -> Any:
        """The plain model with the adapter in its weights."""
        if not is_adapted(self.model):
            return self.model
        return self._plain(self.model.merge_and_unload(adapter_names=active_adapters(self.model)))

    def restore(self) -> Any:
        """The plain model as it was before adapters."""
        if not is_adapted(self.model):
            raise ValueError("the weights themselves were trained (adapter=False), so nothing can be restored")
        return self._plain(self.model.unload())

    def _plain(self, model: Any) -> Any:
        for p, flag in self._flags:
            p.requires_grad_(flag)
        return model


def load(model: Any, path: str | Path) -> Any:
    """A saved adapter on a base; ``load(model, path).merge_and_unload()`` puts it in the weights."""
    peft: Any = need("peft", "loading adapters")
    # peft puts an adapter of another name than "default" into a folder of that name.
    found = [f.parent for f in (Path(path) / "adapter_config.json", *sorted(Path(path).glob("*/adapter_config.json")))
             if f.exists()]  # fmt: skip
    if not found:
        raise ValueError(f"path={str(path)!r} holds no adapter that save() wrote")
    if is_adapted(model):
        raise ValueError("model already has adapters; give the plain model, or load_adapter() by hand")
    return peft.PeftModel.from_pretrained(model, str(found[0])).eval()


@contextlib.contextmanager
def _no_dropout(model: Any) -> Iterator[None]:
    """The model's own dropout is off, so that policy and reference differ in weights alone; adapters keep theirs."""
    found = [(m, m.p) for name, m in model.named_modules()
             if isinstance(m, torch.nn.Dropout) and "lora_dropout" not in name]  # fmt: skip
    for m, _ in found:
        m.p = 0.0
    try:
        yield
    finally:
        for m, p in found:
            m.p = p


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """``Trainer`` seeds every generator of the process; they are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _arguments(folder: str, model: Any, s: dict[str, Any], seed: int, steps: int | None, more: dict[str, Any]) -> Any:
    hf: Any = need("transformers", "preference training")
    warmup = s["warmup"]
    given = {
        "output_dir": folder, "learning_rate": s["lr"], "num_train_epochs": s["epochs"], "max_steps": steps or -1,
        "per_device_train_batch_size": s["batch_size"], "lr_scheduler_type": "cosine", "warmup_steps": warmup,
        "weight_decay": 0.0, "seed": seed, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": False,
        "use_cpu": next(model.parameters()).device.type == "cpu", **more,
    }  # fmt: skip
    return hf.TrainingArguments(**given)


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a model of transformers, got {describe(model)}")


def _run(runner: Any) -> list[dict[str, float]]:
    callbacks: Any = need("transformers", "preference training")
    for callback in (callbacks.PrinterCallback, callbacks.ProgressCallback):
        runner.remove_callback(callback)
    runner.train()
    return [entry for entry in runner.state.log_history if "loss" in entry]


def train(
    model: Any,
    pairs: Iterable[Any],
    recipe: str | Recipe = "dpo",
    *,
    reference: Any = None,
    processor: Any = None,
    adapter: Any = True,
    align: bool | None = None,
    steps: int | None = None,
    align_steps: int | None = None,
    seed: int = 0,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    lr: float | None = None,
    align_lr: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    arguments: dict[str, Any] | None = None,
) -> Trained:
    """Teach a model of transformers what to prefer; its own dropout is off meanwhile, that of adapters is not.

    Args:
        model: a language or vision-language model of transformers, perhaps with an adapter of peft, which is then
            trained on. A plain model is wrapped in place; :meth:`Trained.restore` takes the adapters off again.
        pairs: list of :class:`~.Preference`, of mappings of text (with ``processor``), or of flat mappings of model
            inputs and token ids: ``{"input_ids": ..., "pixel_values": ..., "chosen": [...], "rejected": [...]}``.
        recipe: a :class:`~.Recipe` or a name: ``"dpo"``, ``"rdpo"``, ``"opa-dpo"``, ``"sft"``.
        reference: ``None``: of an adapter that starts as nothing, the base; of one that was aligned or came with the
            model, a frozen copy of it. Or a frozen model, or the name of an adapter of the model.
        processor: of transformers, for pairs of text.
        adapter: ``True`` trains low-rank adapters on the language model; a ``peft.LoraConfig`` others; ``False`` the
            weights that require gradients, which needs ``reference``.
        align: imitate the recipe's ``alignment`` responses first (OPA-DPO does). ``None``: where the recipe has any and
            the model came without adapter.
        steps, align_steps: updates of either stage, in place of epochs.
        seed: of the order, of initial adapters and of image variants; global generators stay as they are.
        rank, alpha, dropout, lr, align_lr, epochs, batch_size: ``None`` is what the recipe's paper says.
        arguments: further ``TrainingArguments``, e.g. ``{"gradient_accumulation_steps": 8, "bf16": True}``.

    Returns:
        The policy with its history; ``save`` writes the adapter without the base.

    Raises:
        ValueError: no pairs, a response that is empty or equal to what it is preferred to, no reference, a reference of
            another vocabulary or one that shares trained weights.
    """
    need("transformers", "preference training")
    recipe = get_recipe(recipe)
    _check_model(model)
    s: dict[str, Any] = {"rank": 16, "alpha": 32, "dropout": 0.0, "lr": 1e-6, "epochs": 1, "batch_size": 8,
                         "warmup": 0, "align_epochs": 1, "align_lr": 2e-5, **recipe.published}  # fmt: skip
    given = {"rank": rank, "alpha": alpha, "dropout": dropout, "lr": lr, "align_lr": align_lr, "epochs": epochs,
             "batch_size": batch_size}  # fmt: skip
    s |= {name: value for name, value in given.items() if value is not None}
    for name in ("lr", "align_lr"):
        check_real(name, s[name], above=0)
    check_int("batch_size", s["batch_size"], least=1)
    check_real("epochs", s["epochs"], above=0)
    for name, number in (("steps", steps), ("align_steps", align_steps)):
        if number is not None:
            check_int(name, number, least=1)
    if align is not None:
        check_flag("align", align)
    made, recipe = to_pairs(pairs, recipe, processor, vocabulary_of(model))
    came_adapted = is_adapted(model)
    if adapter is False and came_adapted:
        raise ValueError("adapter=False trains the weights themselves, but the model has adapters of peft")
    aligned = bool(recipe.alignment) and (not came_adapted if align is None else align)
    if align and not recipe.alignment:
        raise ValueError("align=True needs a recipe that names responses to imitate first; this one has none")
    if adapter is False and aligned:
        raise ValueError("alignment makes the reference from the trained adapter; it needs adapter=True or align=False")
    if adapter is False and recipe.needs_reference:
        Reference(model, reference)  # refused before anything is changed
    arguments = dict(arguments or {})
    check_type("arguments", arguments, dict)
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    policy: Any = model
    before: list[dict[str, float]] = []
    try:
        with _own_randomness(), _no_dropout(model), tempfile.TemporaryDirectory() as folder:
            if not came_adapted and adapter is not False:
                torch.manual_seed(seed)
                policy = add_policy(
                    model, s["rank"], s["alpha"], s["dropout"], None if adapter is True else adapter
                )  # fmt: skip
            if aligned:
                stage = {**s, "lr": s["align_lr"], "epochs": s["align_epochs"], "warmup": 0}
                imitate = sft(*recipe.alignment)
                args = _arguments(folder, policy, stage, seed, align_steps, arguments)
                before = _run(trainer(policy, made, imitate, args, seed=seed))
            held = reference
            if recipe.needs_reference and reference is None and is_adapted(policy) and (came_adapted or aligned):
                freeze_copy(policy, active_adapters(policy)[0])
                held = REFERENCE
            args = _arguments(folder, policy, s, seed, steps, arguments)
            history = _run(trainer(policy, made, recipe, args, reference=held, seed=seed))
    except BaseException:
        if policy is not model:
            policy.unload()
            for p, flag in flags:
                p.requires_grad_(flag)
        raise
    finally:
        for m, mode in modes:
            m.training = mode
        if is_adapted(policy) and REFERENCE in policy.peft_config and reference is None:
            policy.delete_adapter(REFERENCE)
    known = {id(m) for m, _ in modes}
    for m in policy.modules():
        if id(m) not in known:
            m.training = modes[0][1]
    return Trained(policy, recipe, history, before, flags)


def evaluate(
    model: Any, pairs: Iterable[Any], recipe: str | Recipe = "dpo", *, reference: Any = None, processor: Any = None,
    batch_size: int = 8, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Loss, parts, margins and accuracies of pairs, without training; means weighted by pairs.

    Args:
        model, pairs, recipe, reference, processor: as of :func:`train`; a plain model needs ``reference``, unless the
            recipe has none.
        batch_size: pairs per forward.
        seed: of image variants.
    """
    recipe = get_recipe(recipe)
    _check_model(model)
    check_int("batch_size", batch_size, least=1)
    made, recipe = to_pairs(pairs, recipe, processor, vocabulary_of(model))
    held = Reference(model, reference) if recipe.needs_reference else None
    plain = model.get_base_model() if is_adapted(model) else model
    collate = Collator(recipe, About.of(plain), 0, torch.Generator().manual_seed(seed))
    device = next(plain.parameters()).device
    totals: dict[str, float] = {}
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for i in range(0, len(made), batch_size):
                part = made[i : i + batch_size]
                batch = _to(collate(part), device)
                frozen = None
                if held is not None:
                    with held.reading(model) as other:
                        frozen = read_batch(other, recipe, batch)
                losses = recipe.loss(read_batch(model, recipe, batch), frozen, batch["valid"], weights_of(batch))
                found = {"loss": losses.total, **losses.parts, **margins(recipe, losses.rewards)}
                for name, value in found.items():
                    totals[name] = totals.get(name, 0.0) + float(value) * len(part) / len(made)
    finally:
        for m, mode in modes:
            m.training = mode
    return totals


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value.to(device)


__all__ = ["Preference", "Trained", "evaluate", "load", "train", "trainer"]
