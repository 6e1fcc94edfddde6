"""From a model that exists to one with other attention: convert, train to agree, adapt, save, or take it all back."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_real, check_type
from ..files import read_file
from ..optim import shown
from . import agreement as agree
from .agreement import LAYERWISE, Batch, Report
from .saved import inject, load_weights, plan_of, put_plan, read_entry, save_transformers
from .swap import Swap, Watch, is_causal, swap
from .targets import TARGETS, make_socket

#: What training changes.
TRAINS = ("mixers", "adapters", "all")
SCHEDULES = ("constant", "cosine", "plateau")


def linearize(
    model: nn.Module, to: str = "hedgehog", layers: Iterable[int | str] | None = None, **settings: Any
) -> Conversion:
    """Convert the attention of a model in place.

    Args:
        model: of transformers, of diffusers (the denoiser) or of our softmax attention.
        to: ``"hedgehog"``, ``"lolcats"``, ``"elu1"``, ``"window"``, ``"moa-spans"``, ``"spt"``, or what
            :func:`attnlib.convert.target` registered.
        layers: numbers or paths of attention modules; all that can be converted by default.
        **settings: of the mixer, such as ``window_size`` or ``features``.

    Returns:
        A :class:`Conversion`, to train, report, save or restore.

    Raises:
        ValueError: unknown name, nothing to convert, or a model that was converted already.

    >>> import attnlib
    >>> from attnlib.models.tiny import TinyBackbone
    >>> model = TinyBackbone(16, 2, lambda: attnlib.create("softmax-attention", dim=16, num_heads=2))
    >>> conversion = linearize(model, "hedgehog")
    >>> history = conversion.fit([torch.randn(2, 12, 16)] * 3, loss="xent")
    >>> conversion.restore()
    """
    check_type("model", model, nn.Module)
    check_choice("to", to, tuple(TARGETS))

    def make(site: Any) -> Any:
        try:
            return make_socket(site, to, settings)
        except ValueError as error:
            causal = "causal" if is_causal(site) else "not causal"
            raise ValueError(f"layer {site.layer} ({site.name}, {causal}) cannot become {to!r}: {error}") from error

    return Conversion(swap(model, make, None if layers is None else list(layers)), to)


def load(model: nn.Module, path: str | Path) -> Conversion:
    """Convert a model as a saved conversion says, and load its weights, adapters included.

    Models of transformers load without this: import :mod:`attnlib.convert`, then ``from_pretrained(path)``. Here they
    come as a :class:`Conversion` that can be trained on, and whose ``restore`` gives the saved weights without mixers.

    Args:
        model: built as the one that was converted.
        path: what :meth:`Conversion.save` wrote.

    Raises:
        ValueError: a folder without a conversion, or weights that do not fit.
    """
    folder = Path(path)
    entry = read_entry(folder)
    conversion = Conversion(put_plan(model, entry["layers"]), entry["to"])
    if entry.get("adapters"):
        conversion.lora(**entry["adapters"])
    load_weights(model, folder)
    return conversion


class Conversion:
    """A converted model and what it was.

    Attributes:
        model: the model, converted in place.
        swap: where its mixers are.
        history: losses of all steps so far.
    """

    def __init__(self, swapped: Swap, to: str):
        self.swap, self.to = swapped, to
        self.history: list[float] = []
        self._before: dict[str, Tensor] = {}
        ours = {id(p) for socket in swapped.sockets.values() for p in socket.parameters()}
        self._names = {id(p): name for name, p in swapped.model.named_parameters() if id(p) not in ours}
        self._adapters: list[tuple[str, nn.Module]] = []
        self._lora: dict[str, Any] | None = None
        self._configured = False

    @property
    def model(self) -> nn.Module:
        return self.swap.model

    # ---- training

    def trained(self, what: str = "mixers") -> list[nn.Parameter]:
        """Parameters that ``fit(train=what)`` changes."""
        check_choice("train", what, TRAINS)
        if what == "all":
            return [p for p in self.model.parameters() if p.is_floating_point()]
        mixers = [p for socket in self.swap.sockets.values() for p in socket.trained()]
        if what == "mixers":
            return mixers
        if not self._adapters:
            raise ValueError("train='adapters' needs adapters: call lora() first")
        layers = [self.model.get_submodule(name) for name, _ in self._adapters]
        return [p for layer in layers for name, p in layer.named_parameters() if "lora_" in name]

    def fit(
        self,
        batches: Iterable[Batch],
        loss: str | Iterable[str] | Mapping[str, float] = "mse",
        train: str | Sequence[nn.Parameter] | None = None,
        steps: int | None = None,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        accumulate: int = 1,
        schedule: str = "constant",
        blocks: int | None = None,
        clip: float | None = None,
        checkpoint: str | Path | None = None,
        every: int = 50,
        progress: bool | Callable[[int, float], None] = False,
    ) -> list[float]:
        """Train the converted model to agree with its original.

        ``"mse"`` between head outputs and ``"xent"`` between maps train each layer against its own softmax attention
        while hidden states follow the original; only the mixers get gradients, and one layer is held at a time.
        ``"features"`` (hidden states behind each block), ``"prediction"`` (divergence of what the model predicts),
        ``"task"`` (its own loss) and ``"own"`` (what mixers learn by themselves, the sum over layers: codebooks of
        ``"spt"``) run the converted model as a whole.

        Args:
            batches: dictionaries of the model's arguments, or tensors; read again from the start when they run out, if
                they can be.
            loss: one name, several, or names with weights; ``mse`` is multiplied by 1000 by default.
            train: ``"mixers"``, ``"adapters"`` (after :meth:`lora`), ``"all"``, or parameters themselves, such as
                those of mixers, adapters and routed MLPs together. By default adapters for losses of the whole model
                once there are some, and mixers otherwise.
            steps: steps in all, those of a checkpoint included; one pass by default.
            lr, weight_decay: of AdamW.
            accumulate: batches per step.
            schedule: ``"constant"``, ``"cosine"`` over ``steps``, or ``"plateau"``: a tenth when the loss has not
                fallen for ten steps, down to 1e-5.
            blocks: train the blocks of the model in runs of so many, each run from the original's hidden states to the
                original's hidden states behind it, instead of the losses above; a run ends early where something else
                stands between two blocks.
            clip: largest norm of the gradient.
            checkpoint: a file; training goes on from it when it exists, with the batches that follow.
            every: steps between two writes of it.
            progress: draw a bar; or called with step and loss.

        Returns:
            The loss of every step.
        """
        weights = agree.weights_of(loss)
        layerwise = [name for name in weights if name in LAYERWISE]
        if blocks is not None:
            check_int("blocks", blocks, least=1)
        whole = [name for name in weights if name not in LAYERWISE]
        if train is None:
            train = "adapters" if self._adapters and set(whole) - {"own"} and blocks is None else "mixers"
        if not self.swap.active:
            raise ValueError("the model was restored; convert it anew")
        check_choice("schedule", schedule, SCHEDULES)
        check_real("lr", lr, above=0)
        check_int("accumulate", accumulate, least=1)
        check_int("every", every, least=1)
        what = train if isinstance(train, str) else "given"
        if layerwise and blocks is None and what not in ("mixers", "given"):
            raise ValueError(f"loss={layerwise} reaches the mixers only, so train={train!r} is not possible")
        parameters = self.trained(train) if isinstance(train, str) else list(train)
        if not parameters:
            raise ValueError(f"{self.to!r} has nothing to train; fit(train='all'), or use it as it is")
        if what in ("all", "given"):
            chosen = {id(p) for p in parameters}
            self._remember((name, p) for name, p in self.model.named_parameters() if id(p) in chosen)
        if steps is None:
            if not hasattr(batches, "__len__"):
                raise ValueError("steps is needed where batches have no length")
            steps = max(len(batches) // accumulate, 1)  # type: ignore[arg-type]
        check_int("steps", steps, least=1)
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        scheduler: Any = None
        if schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        elif schedule == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=10, min_lr=1e-5)
        signature = {"to": self.to, "loss": weights, "train": what, "lr": lr, "blocks": blocks, "steps": steps}
        history = self._resume(checkpoint, signature, parameters, optimizer, scheduler)
        stream = itertools.islice(_again(batches), len(history) * accumulate, None)
        with self._training(parameters, what), shown(progress, steps) as tell:
            for step in range(len(history), steps):
                optimizer.zero_grad(set_to_none=True)
                total = 0.0
                for batch in itertools.islice(stream, accumulate):
                    if blocks is not None:
                        total += self._block_step(batch, blocks, accumulate)
                        continue
                    if layerwise:
                        total += self._layer_step(batch, {n: weights[n] for n in layerwise}, accumulate)
                    if whole:
                        total += self._whole_step(batch, {n: weights[n] for n in whole}, accumulate)
                if clip is not None:
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step(*((total,) if schedule == "plateau" else ()))
                history.append(total)
                tell(step + 1, total)
                if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == steps):
                    self._keep(Path(checkpoint), signature, parameters, optimizer, scheduler, history)
        self.history += history
        return history

    def _layer_step(self, batch: Batch, weights: dict[str, float], share: int) -> float:
        count, total = len(self.swap.sockets), 0.0

        def watcher(path: str) -> Watch:
            socket = self.swap.sockets[path]

            def watch(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, truth: Tensor) -> None:
                nonlocal total
                with torch.enable_grad():
                    losses = agree.layer_losses(socket, weights, q, k, v, valid, truth)
                    one = torch.stack([losses[name] * weight for name, weight in weights.items()]).sum()
                    one = one / (count * share)
                    one.backward()  # layer by layer, so that the graph of one is held at a time
                total += float(one.detach())

            return watch

        with torch.no_grad(), agree.originals(self.swap, {path: watcher(path) for path in self.swap.sockets}):
            agree.call_model(self.model, batch)
        return total

    def _whole_step(self, batch: Batch, weights: dict[str, float], share: int) -> float:
        blocks = agree.Blocks(self.swap) if "features" in weights else None
        recorded: Callable[[], Any] = blocks.recorded if blocks else lambda: nullcontext([])
        truth = wanted = None
        if weights.keys() & {"features", "prediction"}:
            with torch.no_grad(), agree.originals(self.swap), self._as_before():
                with recorded() as wanted:
                    truth = agree.call_model(self.model, batch)
        losses: list[Tensor] = []
        heard: Callable[[], Any] = (lambda: agree.listening(self.swap)) if "own" in weights else lambda: nullcontext({})
        with heard() as own:
            if truth is not None:
                with recorded() as kept:
                    out = agree.call_model(self.model, batch)
                if blocks is not None:
                    assert wanted is not None
                    exists = agree.existing(batch, wanted[0].hidden)
                    losses.append(agree.features_loss(kept, wanted, exists) * weights["features"])
                if "prediction" in weights:
                    losses.append(agree.divergence(out, truth, batch) * weights["prediction"])
            if "task" in weights:
                losses.append(agree.task_loss(self.model, batch) * weights["task"])
            if not losses:  # what mixers learn by themselves needs nothing behind them
                with torch.no_grad():
                    agree.call_model(self.model, batch)
        if "own" in weights:
            if not own:
                raise ValueError(f"loss 'own' is not possible: {self.to!r} has no losses of its own")
            losses.append(torch.stack(list(own.values())).sum() * weights["own"])
        total = torch.stack(losses).sum() / share
        total.backward()
        return float(total.detach())

    def _block_step(self, batch: Batch, run: int, share: int) -> float:
        blocks = agree.Blocks(self.swap)
        with torch.no_grad(), agree.originals(self.swap), self._as_before(), blocks.recorded() as calls:
            agree.call_model(self.model, batch)
        runs: list[list[agree.Recorded]] = []
        for call in calls:
            if runs and len(runs[-1]) < run and call.follows(runs[-1][-1]):
                runs[-1].append(call)
            else:
                runs.append([call])
        total = 0.0
        for part in runs:
            hidden: Tensor | None = None
            for call in part:
                hidden = call.again(hidden)
            assert hidden is not None
            truth = part[-1].hidden.detach()
            one = agree.relative_error(hidden, truth, agree.existing(batch, truth)) / (len(runs) * share)
            one.backward()
            total += float(one.detach())
        return total

    @contextmanager
    def _training(self, parameters: Sequence[nn.Parameter], train: str) -> Iterator[None]:
        """Only these get gradients; dropout is off while hidden states are compared."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        modes = [(m, m.training) for m in self.model.modules()]
        chosen = {id(p) for p in parameters}
        try:
            for p, _ in flags:
                p.requires_grad_(id(p) in chosen)
            self.model.train(train == "all")
            yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
                if id(p) in chosen:
                    p.grad = None
            for m, mode in modes:
                m.training = mode

    # ---- going on where training stopped

    @staticmethod
    def _resume(
        checkpoint: str | Path | None, signature: dict[str, Any], parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer, scheduler: Any,
    ) -> list[float]:  # fmt: skip
        if checkpoint is None or not Path(checkpoint).exists():
            return []
        kept = read_file(checkpoint, "checkpoint")
        if not isinstance(kept, Mapping) or "signature" not in kept:
            raise ValueError(f"checkpoint={str(checkpoint)!r} was not written by a training of this kind")
        if kept["signature"] != signature:
            raise ValueError(
                f"checkpoint={str(checkpoint)!r} was written by another training: {kept['signature']}, this one is "
                f"{signature}"
            )
        with torch.no_grad():
            for p, value in zip(parameters, kept["parameters"], strict=True):
                p.copy_(value)
        optimizer.load_state_dict(kept["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(kept["scheduler"])
        return list(kept["history"])

    @staticmethod
    def _keep(
        path: Path, signature: dict[str, Any], parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer,
        scheduler: Any, history: list[float],
    ) -> None:  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save(
            {
                "signature": signature,
                "parameters": [p.detach() for p in parameters],
                "optimizer": optimizer.state_dict(),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "history": history,
            },
            part,
        )
        os.replace(part, path)

    # ---- adapters

    def _remember(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Keep weights of the model as they are, before something changes them."""
        for _, p in named:
            name = self._names.get(id(p))
            if name is not None and name not in self._before:
                self._before[name] = p.detach().clone()

    def lora(
        self, rank: int = 8, alpha: float = 16, dropout: float = 0.0, targets: Sequence[str] | None = None
    ) -> None:
        """Low-rank adapters of PEFT on the projections of the converted layers.

        Args:
            rank, alpha, dropout: of the adapters; those of LoLCATs by default.
            targets: paths of linear layers; all inside the converted attention modules by default.
        """
        if self._adapters:
            raise ValueError("there are adapters already; merge them first")
        names = list(self._projections() if targets is None else targets)
        if not names:
            raise ValueError("no linear layers were found in the converted attention modules; name some in targets")
        self._configured = hasattr(self.model, "peft_config")
        self._adapters = inject(self.model, names, rank, alpha, dropout)
        self._lora = {"targets": names, "rank": rank, "alpha": alpha, "dropout": dropout}

    def _projections(self) -> Iterator[str]:
        for site in self.swap.sites:
            module = self.model.get_submodule(site.name)
            for name, child in module.named_modules():
                linear = isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D"
                if name and linear and not any(part in _SOCKETS for part in name.split(".")):
                    yield f"{site.name}.{name}"

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Inside, adapters are off and weights that were changed are what they were."""
        layers = [self.model.get_submodule(name) for name, _ in self._adapters]
        named = dict(self.model.named_parameters()) if self._before else {}
        changed = [(self._named(named, name), value) for name, value in self._before.items()]
        now = [p.data for p, _ in changed]
        try:
            for layer in layers:
                layer.enable_adapters(False)  # type: ignore[operator]
            for p, value in changed:
                p.data = value
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)  # type: ignore[operator]
            for (p, _), value in zip(changed, now, strict=True):
                p.data = value

    @staticmethod
    def _named(named: dict[str, nn.Parameter], name: str) -> nn.Parameter:
        """A parameter by the name that it has without adapters."""
        owner, _, last = name.rpartition(".")
        return named[name] if name in named else named[f"{owner}.base_layer.{last}"]

    def _put_back(self) -> None:
        for name, module in self._adapters:
            owner, _, last = name.rpartition(".")
            self.model.get_submodule(owner)._modules[last] = module
        if self._adapters and not self._configured and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self._adapters, self._lora = [], None

    def merge(self) -> None:
        """Add the adapters to the weights and take them away; the outputs stay what they are."""
        if not self._adapters:
            raise ValueError("there are no adapters to merge; call lora() first")
        self._remember((name, p) for _, m in self._adapters for name, p in m.named_parameters())
        for name, _ in self._adapters:
            self.model.get_submodule(name).merge()  # type: ignore[operator]
        self._put_back()

    # ---- the end

    def report(self, batches: Iterable[Batch]) -> Report:
        """How close the converted model is, on batches that it should not have been trained on."""
        return agree.measure(self.swap, batches, self.to, self._as_before)

    def save(self, path: str | Path) -> Path:
        """Write an ordinary checkpoint.

        Of a transformers model: a folder which ``from_pretrained`` of any auto class loads once :mod:`attnlib.convert`
        is imported. Of another: its weights and what was converted, for :func:`load`. Adapters that are not merged are
        saved as such, and are there again in what is loaded; :func:`load` lets them train on, merge or go.
        """
        import json

        folder = Path(path)
        if not self.swap.active:
            raise ValueError("the model was restored; there is nothing converted to save")
        plan = plan_of(self.swap)  # refuses what cannot be saved, before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        if any(cls.__module__.split(".")[0] == "transformers" for cls in type(self.model).__mro__):
            save_transformers(self.model, self.swap, folder, self._lora)
        else:
            entry = {"to": self.to, "layers": plan, "adapters": self._lora}
            (folder / "attnlib_conversion.json").write_text(json.dumps(entry, indent=2) + "\n")
            state = {name: t.contiguous() for name, t in self.model.state_dict().items()}
            save_file({name: t.clone() for name, t in state.items()}, folder / "model.safetensors")
        return folder

    def restore(self) -> None:
        """The model as it was before, bit for bit, adapters and merged weights taken back."""
        self._put_back()
        self.swap.restore()
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self._before.items():
                named[name].copy_(value)
        self._before = {}

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Conversion({len(self.swap.sockets)} layers of {type(self.model).__name__} to {self.to!r})"


#: Children of attention modules that a conversion brought.
_SOCKETS = ("attnlib_mixer", "heads")


def _again(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        found = False
        for batch in batches:
            found = True
            yield batch
        if not found:
            raise ValueError("batches ran out, or hold none; give a list, or fewer steps")
