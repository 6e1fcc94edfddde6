"""Activations and gradients of any named modules of any model, in bounded memory.

For a score per sample ``s_b = s(f(x_b))`` and a module whose call read ``u`` and gave ``a``, a :class:`Tape` gives
``u``, ``a``, ``ds_b / du`` and ``ds_b / da``. A module that is called twice has two entries. Modules get, and hand on,
copies of what is kept, so that what works in place behind them (ReLU with ``inplace=True``, ``x += ...``) changes
nothing on the tape.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, checked, describe
from ..grids import Layout
from ..types import to_list

#: What a tape can keep of each call of a module.
KEEP = ("input", "output")

Target = int | Sequence[int] | Tensor | Callable[[Any], Tensor]


@dataclass
class Entry:
    """One call of one module.

    Args:
        name: path of the module.
        call: how many calls of this module came before, in one call of the model.
        input: what it read first, and
        output: what it gave; with the batch first, ``None`` where it was not asked for.
        input_gradient, output_gradient: of the score, of the same shapes; ``None`` where nothing was differentiated.
    """

    name: str
    call: int
    input: Tensor | None = None
    output: Tensor | None = None
    input_gradient: Tensor | None = None
    output_gradient: Tensor | None = None


@dataclass
class Taped:
    """What :meth:`Tape.run` gives.

    Args:
        entries: of all modules, in the order of their calls.
        output: of the model; its tensors are detached.
        score: (B,) that was differentiated; ``None`` without gradients.
        reduced: what ``reduce`` made of the entries of each chunk, one by one.
    """

    entries: list[Entry]
    output: Any
    score: Tensor | None = None
    reduced: list[Any] = field(default_factory=list)

    def __getitem__(self, name: str) -> Entry:
        """The only entry of a module.

        Raises:
            KeyError: it was not taped.
            ValueError: it was called several times; ``all(name)`` has them.
        """
        found = self.all(name)
        if len(found) != 1:
            raise ValueError(f"module {name!r} was called {len(found)} times; taped.all({name!r}) has each call")
        return found[0]

    def all(self, name: str) -> list[Entry]:
        """The entries of a module, one per call."""
        found = [entry for entry in self.entries if entry.name == name]
        if not found:
            raise KeyError(f"module {name!r} was not taped; taped are {sorted({e.name for e in self.entries})}")
        return found


def to_grid(tokens: Tensor, layout: Layout, name: str | None = None) -> Tensor:
    """The tokens of a grid as a grid: (B, N, C) -> (B, *grid, C), what lies beside it left out.

    Args:
        tokens: (B, N, C), or (B, N).
        layout: what the N tokens are.
        name: segment; the only grid by default.

    >>> to_grid(torch.zeros(1, 5, 3), Layout.image(2, 2, cls=1)).shape
    torch.Size([1, 2, 2, 3])
    """
    name = layout.grid_name() if name is None else name
    return layout.split(tokens)[name].unflatten(1, layout.grid(name))


def to_tokens(grid: Tensor, layout: Layout, name: str | None = None) -> Tensor:
    """A grid as tokens among others: (B, *grid, C) -> (B, N, C), zeros for what lies beside it.

    >>> to_tokens(torch.ones(1, 2, 2, 3), Layout.image(2, 2, cls=1))[0, :, 0].tolist()
    [0.0, 1.0, 1.0, 1.0, 1.0]
    """
    name = layout.grid_name() if name is None else name
    shape = layout.grid(name)
    if tuple(grid.shape[1 : 1 + len(shape)]) != shape:
        raise ValueError(f"grid must be (B, *{shape}, ...), as the layout says, got {tuple(grid.shape)}")
    flat = grid.flatten(1, len(shape))
    parts = {n: flat.new_zeros(flat.shape[0], layout.size(n), *flat.shape[2:]) for n in layout.names}
    return layout.join({**parts, name: flat})


def quantized(model: nn.Module) -> str | None:
    """The first module whose weights are not floating-point numbers, so that no gradient passes through them."""
    for name, module in model.named_modules():
        kind = type(module)
        if "quantized" in kind.__module__.split(".") or kind.__name__ in ("Linear4bit", "Linear8bitLt", "QuantLinear"):
            return f"{name or 'the model'} ({kind.__name__})"
        for key, weight in module.named_parameters(recurse=False):
            if not weight.is_floating_point() and not weight.is_complex():
                return f"{name or 'the model'}.{key} ({weight.dtype})"
    return None


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((t for t in value if isinstance(t, Tensor)), None)
    if isinstance(value, Mapping):
        return next((t for t in value.values() if isinstance(t, Tensor)), None)
    return None


def _with_first(value: Any, new: Tensor) -> Any:
    """The same with another tensor in the place of its first one."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        key = next(k for k, t in value.items() if isinstance(t, Tensor))
        again: Any = type(value)(**value) if hasattr(value, "__dataclass_fields__") else dict(value)
        again[key] = new
        return again
    index = next(i for i, t in enumerate(value) if isinstance(t, Tensor))
    items = [*value[:index], new, *value[index + 1 :]]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def logits_of(output: Any) -> Tensor:
    """The scores in what a model gave: its ``logits``, its ``y``, or its first tensor."""
    for name in ("logits", "y"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    found = _first_tensor(output)
    if found is None:
        raise TypeError(f"the model gave {describe(output)}, which holds no tensor; give target= as a function of it")
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        new = {k: _detached(v) for k, v in value.items()}
        return type(value)(**new) if hasattr(value, "__dataclass_fields__") else new
    if isinstance(value, (tuple, list)):
        new_ = [_detached(v) for v in value]
        return type(value)(*new_) if hasattr(value, "_fields") else type(value)(new_)
    return value


def _takes_rows(target: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 2


def score_of(output: Any, target: Target, position: int = -1, rows: slice = slice(None)) -> Tensor:
    """(B,) what is differentiated: the logit of each sample's target, or what a function says.

    Args:
        output: of the model; its logits are (B, K), or (B, N, K) of tokens.
        target: class or token, one for all or one per sample; or ``f(output) -> (B,)``, or ``f(output, rows)`` where it
            needs to know which samples of the batch it is given (a slice).
        position: of the token whose logits count.
        rows: which samples of the batch these are.
    """
    if callable(target):
        score = target(output, rows) if _takes_rows(target) else target(output)  # type: ignore[call-arg]
        if not isinstance(score, Tensor) or score.dim() != 1:
            got = tuple(score.shape) if isinstance(score, Tensor) else describe(score)
            raise ValueError(f"target must give a score per sample (B,), got {got}")
        return score
    logits = logits_of(output)
    if logits.dim() == 3:
        logits = logits[:, position]
    if logits.dim() != 2:
        raise ValueError(
            f"the model gives {tuple(logits.shape)}, neither classes (B, K) nor tokens (B, N, K); give target= as a "
            "function of what it gives"
        )
    index = torch.as_tensor(target, device=logits.device)
    if index.is_floating_point() or index.dtype == torch.bool or index.dim() > 1:
        raise ValueError(f"target must be a class or one per sample, got {index.dtype} {tuple(index.shape)}")
    if index.dim() == 1:
        index = index[rows]
    if index.dim() == 1 and len(index) != len(logits):
        raise ValueError(f"target names {len(index)} samples, but the batch has {len(logits)}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < logits.shape[1]:
        raise ValueError(f"target must lie in [0, {logits.shape[1]}), got {index.tolist()!r:.60}")
    return logits.gather(1, index.expand(len(logits))[:, None])[:, 0]


class Tape:
    """Activations and gradients of named modules of any model.

    ::

        tape = Tape(model, ["layer4", "encoder.*.mlp"])
        taped = tape.run(images, target=labels)
        taped["layer4"].output, taped["layer4"].output_gradient

    Args:
        model: any module. Samples of a batch must not depend on each other, as in evaluation mode they do not.
        modules: paths, or patterns of them, as ``named_modules`` gives; ``""`` is the model itself.
        keep: ``"output"`` and ``"input"`` of each call, or one of them.

    What the tape changes in the model is there only while :meth:`run` runs, and taken back after an exception too.

    Raises:
        ValueError: no such module.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    >>> taped = Tape(model, ["0"]).run(torch.ones(3, 2), target=[0, 1, 0])
    >>> taped["0"].output.shape, taped["0"].output_gradient.shape
    (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    @checked
    def __init__(self, model: nn.Module, modules: Sequence[str], keep: Sequence[str] = ("output",)):
        if isinstance(modules, str) or isinstance(keep, str):
            raise TypeError(f"modules and keep must be sequences of names, got {modules!r} and {keep!r}")
        names = [name for name, _ in model.named_modules()]
        self.model, self.keep = model, tuple(keep)
        if not self.keep:
            raise ValueError(f"keep is empty; choose from {list(KEEP)}")
        for what in self.keep:
            check_choice("keep", what, KEEP)
        self.names: list[str] = []
        for pattern in to_list("modules", modules) or []:
            found = [name for name in names if name == pattern or (pattern and fnmatch.fnmatchcase(name, pattern))]
            if not found:
                raise ValueError(f"modules: {type(model).__name__} has no {pattern!r}; it has {names[:40]}")
            self.names += [name for name in found if name not in self.names]
        if not self.names:
            raise ValueError("modules is empty; name at least one")

    def run(
        self,
        *args: Any,
        target: Target | None = None,
        chunk: int | None = None,
        reduce: Callable[[Entry], Any] | None = None,
        position: int = -1,
        **kwargs: Any,
    ) -> Taped:
        """Call the model and differentiate a score of each sample.

        Args:
            args, kwargs: of the model; every tensor whose first axis is the batch's is cut with ``chunk``.
            target: class or token whose logit is the score, one or one per sample; or ``f(output) -> (B,)``; ``None``
                for activations alone.
            chunk: samples at a time; ``None`` for all at once. Memory for the graph is bounded by it.
            reduce: what to keep of an entry in place of it; with it, what is large is never kept for all samples.
                Its tensors, the batch first, are put together over chunks.
            position: of the token whose logits count.

        Raises:
            ValueError: quantized weights where gradients are asked for, a score without any gradient, targets that do
                not fit. A module that the score does not depend on has gradients of zero.
        """
        if target is not None and (where := quantized(self.model)) is not None:
            raise ValueError(
                f"gradients are asked for (target=...), but {where} is quantized, and no gradient passes through it; "
                "load the model with floating-point weights, or leave target out"
            )
        batch = next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        if batch is None:
            raise TypeError("the model must be given at least one tensor with the batch first")
        size = batch if chunk is None else check_int("chunk", chunk, least=1)
        parts = [slice(i, min(i + size, batch)) for i in range(0, batch, size)] if batch else [slice(0, 0)]
        done = [self._part(args, kwargs, rows, batch, target, reduce, position) for rows in parts]
        if len(done) == 1:
            return done[0]
        entries = [
            replace(first, **{key: _joined([taped.entries[i].__dict__[key] for taped in done]) for key in _TENSORS})
            for i, first in enumerate(done[0].entries)
        ]
        scores = [taped.score for taped in done if taped.score is not None]
        reduced = [_joined(list(values)) for values in zip(*(taped.reduced for taped in done), strict=True)]
        output = _joined([taped.output for taped in done])
        return Taped(entries, output, torch.cat(scores) if scores else None, reduced)

    def _part(self, args: Any, kwargs: Any, rows: slice, batch: int, target: Any, reduce: Any, position: int) -> Taped:
        entries: list[Entry] = []
        asked = target is not None
        with torch.inference_mode(False), torch.set_grad_enabled(asked):
            cut = [_cut(a, rows, batch) for a in args]
            named = {k: _cut(v, rows, batch) for k, v in kwargs.items()}
            handles = [h for name in self.names for h in self._hooks(name, entries, asked)]
            try:
                output = self.model(*cut, **named)
            finally:
                for handle in handles:
                    handle.remove()
            score = None
            if asked:
                score = score_of(output, target, position, rows)
                self._differentiate(score, entries)
        for entry in entries:
            for key in ("input", "output"):
                value = getattr(entry, key)
                setattr(entry, key, None if value is None else value.detach())
        output = _detached(output)
        score = None if score is None else score.detach()
        if reduce is None:
            return Taped(entries, output, score)
        return Taped([], output, score, [reduce(entry) for entry in entries])

    def _hooks(self, name: str, entries: list[Entry], asked: bool) -> list[Any]:
        module = self.model.get_submodule(name)
        open_: list[Entry] = []

        def taped(value: Tensor) -> tuple[Tensor, Tensor]:
            """What is kept, and the copy that the model goes on with."""
            if asked and value.is_floating_point() and not value.requires_grad:
                value = value.detach().requires_grad_()
            return value, value.clone() if asked else value

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            entry = Entry(name, sum(e.name == name for e in entries))
            entries.append(entry)
            open_.append(entry)
            if "input" not in self.keep:
                return None
            given = args if args else kwargs
            first = _first_tensor(given)
            if first is None:
                return None
            entry.input, copy = taped(first)
            if not asked:
                entry.input = first.clone()
            new = _with_first(given, copy)
            return (tuple(new), kwargs) if args else (args, new)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            entry = open_.pop()
            first = _first_tensor(output)
            if "output" not in self.keep or first is None:
                return None
            entry.output, copy = taped(first)
            if not asked:
                entry.output = first.clone()
                return None
            return _with_first(output, copy)

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            # First of all: others that record what a layer gives must record the copy that the model goes on with.
            module.register_forward_hook(after, prepend=True),
        ]

    def _differentiate(self, score: Tensor, entries: list[Entry]) -> None:
        wanted = [
            (entry, key) for entry in entries for key in ("input", "output")
            if isinstance(t := getattr(entry, key), Tensor) and t.requires_grad
        ]  # fmt: skip
        if not score.requires_grad:
            raise ValueError(
                "the score does not depend on any parameter or taped module, so it has no gradients; is a part of the "
                "model run under torch.no_grad()?"
            )
        tensors = [getattr(entry, key) for entry, key in wanted]
        grads = torch.autograd.grad(score.sum(), tensors, allow_unused=True) if tensors else ()
        for (entry, key), tensor, grad in zip(wanted, tensors, grads, strict=True):
            setattr(entry, f"{key}_gradient", torch.zeros_like(tensor) if grad is None else grad)


_TENSORS = ("input", "output", "input_gradient", "output_gradient")


def _cut(value: Any, rows: slice, batch: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    part = value[rows] if value.dim() and len(value) == batch else value
    return part.clone() if part.is_inference() else part  # nothing can be saved of a tensor of inference mode


def _joined(values: list[Any]) -> Any:
    """Results of chunks as one."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values) if first.dim() else torch.stack(values)
    if isinstance(first, Mapping):
        new = {key: _joined([v[key] for v in values]) for key in first}
        return type(first)(**new) if hasattr(first, "__dataclass_fields__") else new
    if isinstance(first, (tuple, list)):
        items = [_joined(list(parts)) for parts in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first
