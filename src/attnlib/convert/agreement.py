"""How close a converted model is to the one it was made from: losses to train by, and a report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..hooks.blocks import block_of
from ..nn.linear.heads import map_cross_entropy, output_error
from .swap import Socket, Swap, Watch

#: Losses of one layer against its own softmax attention, on the teacher's hidden states.
LAYERWISE = ("mse", "xent")
#: Losses of the whole converted model.
WHOLE = ("features", "prediction", "task", "own")
LOSSES = (*LAYERWISE, *WHOLE)
#: What each loss is multiplied by unless the caller says so: the authors of LoLCATs take 1000 for ``mse``.
WEIGHTS = {"mse": 1000.0, "xent": 1.0, "features": 1.0, "prediction": 1.0, "task": 1.0, "own": 1.0}

Batch = Any


def weights_of(loss: str | Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    """Losses by name with their weights."""
    if isinstance(loss, str):
        loss = [loss]
    named = dict(loss) if isinstance(loss, Mapping) else {name: WEIGHTS.get(name, 1.0) for name in loss}
    for name in named:
        check_choice("loss", name, LOSSES)
    if not named:
        raise ValueError(f"loss names nothing; possible: {LOSSES}")
    return named


def inputs_of(batch: Batch) -> dict[str, Any] | tuple[Any, ...]:
    if isinstance(batch, Mapping):
        return dict(batch)
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def call_model(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """The model on a batch: keyword arguments by name, or positional ones; without a cache."""
    given = inputs_of(batch)
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    takes = inspect.signature(model.forward).parameters
    if hasattr(getattr(model, "config", None), "use_cache"):
        more.setdefault("use_cache", False)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return model(*args, **kwargs, **{name: value for name, value in more.items() if open_ended or name in takes})


def prediction_of(output: Any) -> Tensor:
    """Logits, or the tensor that a model gives."""
    for name in ("logits", "sample", "y", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"the model gives {type(output).__name__}, in which no prediction is known")


def existing(batch: Batch, like: Tensor) -> Tensor | None:
    """(B, N) boolean, which tokens of a batch exist, for what has a row per token."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    fits = mask is not None and like.dim() == 3 and tuple(mask.shape) == tuple(like.shape[:2])
    return mask.bool() if fits and mask is not None else None


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss; for a language model without labels that of the next token, padding left out."""
    if not isinstance(batch, Mapping):
        raise TypeError("the loss 'task' needs batches that are dictionaries of the model's arguments")
    if "labels" not in batch:
        if "input_ids" not in batch:
            raise ValueError("the loss 'task' needs labels in every batch")
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        batch = {**batch, "labels": labels}
    loss = getattr(call_model(model, batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(f"{type(model).__name__} gives no loss for labels, so 'task' is not possible")
    return loss


def divergence(out: Any, truth: Any, batch: Batch) -> Tensor:
    """KL divergence of predicted classes from the teacher's; for images and noise, the mean square relative to it."""
    student, teacher = prediction_of(out), prediction_of(truth)
    exists = existing(batch, teacher)
    if not hasattr(truth, "logits"):
        error = (student - teacher).float().square()
        size = teacher.float().square()
        if exists is not None:
            error, size = error[exists], size[exists]
        return error.mean() / size.mean().clamp(min=1e-12)
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return kl[exists].mean() if exists is not None else kl.mean()


@contextmanager
def originals(swapped: Swap, watches: Mapping[str, Watch] | None = None) -> Iterator[None]:
    """Inside, the model runs its own attention, and each layer tells who watches it."""
    try:
        for path, socket in swapped.sockets.items():
            socket.original, socket.watch = True, (watches or {}).get(path)
        yield
    finally:
        for socket in swapped.sockets.values():
            socket.original, socket.watch = False, None


@contextmanager
def listening(swapped: Swap) -> Iterator[dict[str, Tensor]]:
    """Inside, each mixer's own losses (codebooks) by its path, summed, as of its last call."""
    found: dict[str, Tensor] = {}

    def listener(path: str, socket: Socket) -> Callable[[Tensor, Tensor, Tensor | None], None]:
        def listen(q: Tensor, k: Tensor, valid: Tensor | None) -> None:
            with torch.enable_grad():
                losses = list(socket.own_losses(q, k, valid).values())
                if losses:
                    found[path] = torch.stack(losses).sum()

        return listen

    try:
        for path, socket in swapped.sockets.items():
            socket.listen = listener(path, socket)
        yield found
    finally:
        for socket in swapped.sockets.values():
            socket.listen = None


def layer_losses(
    socket: Socket, wanted: Iterable[str], q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, truth: Tensor
) -> dict[str, Tensor]:
    """``mse`` between head outputs and ``xent`` between maps of a mixer, given what its teacher read and made."""
    exists = socket.rows(q, valid)
    losses = {}
    if "mse" in wanted:
        losses["mse"] = output_error(socket.inner(q, k, v, valid=valid)[0], truth, exists)
    if "xent" in wanted:
        _, target = socket.softmax(q, k, v, valid)
        losses["xent"] = map_cross_entropy(socket.weights(q, k, valid=valid), target, exists)
    return losses


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@dataclass
class Recorded:
    """A call of a block, and the hidden states behind it."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor

    @property
    def _first(self) -> str:
        return next(name for name, value in self.kwargs.items() if isinstance(value, Tensor))

    @property
    def given(self) -> Tensor:
        """The hidden states that it read."""
        return self.args[0] if self.args else self.kwargs[self._first]

    def follows(self, other: Recorded) -> bool:
        """Whether it read what another block gave, and nothing stands between them."""
        return self.given.shape == other.hidden.shape and bool(torch.equal(self.given, other.hidden))

    def again(self, hidden: Tensor | None) -> Tensor:
        """The block as it was called, on other hidden states where there are some."""
        args, kwargs = self.args, self.kwargs
        if hidden is not None and args:
            args = (hidden, *args[1:])
        elif hidden is not None:
            kwargs = {**kwargs, self._first: hidden}
        return _hidden(self.block(*args, **kwargs))


class Blocks:
    """The numbered blocks around the converted layers, in the model's order."""

    def __init__(self, swapped: Swap):
        self.modules: list[nn.Module] = []
        for site in swapped.sites:
            block = block_of(swapped.model, site)
            if all(block is not m for m in self.modules):
                self.modules.append(block)

    @contextmanager
    def recorded(self) -> Iterator[list[Recorded]]:
        """Arguments and hidden outputs of every block in the calls inside, in their order."""
        kept: list[Recorded] = []
        handles = [
            m.register_forward_hook(
                lambda module, args, kwargs, out: kept.append(Recorded(module, args, kwargs, _hidden(out))),
                with_kwargs=True,
            )
            for m in self.modules
        ]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


def relative_error(out: Tensor, truth: Tensor, exists: Tensor | None = None) -> Tensor:
    """Mean square of the difference over mean square of the truth."""
    error, size = (out - truth).float().square(), truth.float().square()
    if exists is not None and exists.shape == error.shape[:2]:
        error, size = error[exists], size[exists]
    return error.mean() / size.mean().clamp(min=1e-12)


# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """How close a converted model stayed.

    Args:
        to: what it was converted to.
        layers: per layer ``layer``, ``name``, ``error`` (mean square of head outputs against the teacher's, relative),
            ``divergence`` of its maps from softmax (nats), ``entropy`` of its maps and ``teacher_entropy`` of softmax.
        model: of the whole: ``divergence`` of its predictions, ``agreement`` (how often the likeliest class is the
            same) and, where the task is known, ``loss`` and ``teacher_loss``.
        trained: numbers that training changes, of all ``parameters``.
    """

    to: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, float] = field(default_factory=dict)
    trained: int = 0
    parameters: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.to}: {len(self.layers)} layers, {self.trained:,} of {self.parameters:,} parameters trained",
            f"{'layer':<40} {'error':>9} {'divergence':>11} {'entropy':>9} {'teacher':>9}",
        ]
        lines += [
            f"{row['name']:<40} {row['error']:>9.4f} {row['divergence']:>11.4f} {row['entropy']:>9.3f} "
            f"{row['teacher_entropy']:>9.3f}"
            for row in self.layers
        ]
        return "\n".join([*lines, *(f"{name:<40} {value:>9.4f}" for name, value in self.model.items())])


def _entropy(weights: Tensor, exists: Tensor) -> Tensor:
    return map_cross_entropy(weights, weights, exists)


@torch.no_grad()
def measure(swapped: Swap, batches: Iterable[Batch], to: str = "", before: Callable[[], Any] = nullcontext) -> Report:
    """Compare a converted model with its own original on batches; quadratic in their length.

    ``before`` makes a context in which the weights are the original's. Mixers are compared on what the original's
    layers read.
    """
    sums: dict[str, dict[str, float]] = {path: {} for path in swapped.sockets}
    whole: dict[str, float] = {}
    count = 0
    model = swapped.model

    def watcher(path: str) -> Watch:
        def watch(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, truth: Tensor) -> None:
            socket = swapped.sockets[path]
            exists = socket.rows(q, valid)
            _, target = socket.softmax(q, k, v, valid)
            out, weights = socket.inner(q, k, v, valid=valid)[0], socket.weights(q, k, valid=valid)
            teacher = _entropy(target, exists)
            found = {
                "error": relative_error(out.transpose(1, 2), truth.transpose(1, 2), exists),
                "divergence": map_cross_entropy(weights, target, exists) - teacher,
                "entropy": _entropy(weights, exists),
                "teacher_entropy": teacher,
            }
            for name, value in found.items():
                sums[path][name] = sums[path].get(name, 0.0) + float(value)

        return watch

    watches = {path: watcher(path) for path in swapped.sockets}
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        for batch in batches:
            count += 1
            with originals(swapped, watches), before():
                truth = call_model(model, batch)
            out = call_model(model, batch)
            found = {"divergence": float(divergence(out, truth, batch))}
            if hasattr(truth, "logits"):
                same = (prediction_of(out).argmax(-1) == prediction_of(truth).argmax(-1)).float()
                exists = existing(batch, prediction_of(truth))
                found["agreement"] = float(same[exists].mean() if exists is not None else same.mean())
                language = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
                if isinstance(batch, Mapping) and ("labels" in batch or ("input_ids" in batch and language)):
                    found["loss"] = float(task_loss(model, batch))
                    with originals(swapped), before():
                        found["teacher_loss"] = float(task_loss(model, batch))
            for name, value in found.items():
                whole[name] = whole.get(name, 0.0) + value
    finally:
        for m, training in modes.items():
            m.training = training
    if not count:
        raise ValueError("batches holds none; a report needs at least one")
    rows = [
        {"layer": site.layer, "name": site.name, **{name: v / count for name, v in sums[site.name].items()}}
        for site in swapped.sites
    ]
    trained = sum(p.numel() for socket in swapped.sockets.values() for p in socket.trained())
    return Report(
        to, rows, {name: value / count for name, value in whole.items()}, trained,
        sum(p.numel() for p in model.parameters()),
    )  # fmt: skip


def features_loss(kept: list[Recorded], wanted: list[Recorded], exists: Tensor | None) -> Tensor:
    """Mean relative error of the hidden states behind each block."""
    errors = [
        relative_error(mine.hidden, theirs.hidden.detach(), exists) for mine, theirs in zip(kept, wanted, strict=True)
    ]
    return torch.stack(errors).mean()
