"""One dispatch for every operator: backends register here, and are chosen, forced and explained by the same rules.

An operator brings its arguments to one checked *call*. Each of its backends says whether it can serve a call
(``supports``), whether the automatic choice should let it (``prefers``), and serves it (``run``). It also states its
derivatives. First derivatives are right everywhere. Second ones are right everywhere, too: where a backend's backward
is written by hand, :func:`twice` takes those of the specification. Forward mode and the transforms of ``torch.func``
(``vmap``, ``grad``, ``jvp``, ...) are right, or the backend refuses by name and the automatic choice moves on.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import check_type
from ._shards import others

#: As ``backend``: the automatic choice even inside :func:`use_backend`, for the problems that an engine hands on.
AUTO = "auto"


class _Thread(threading.local):
    """What :func:`use_backend` forces in this thread, and the device that :func:`described` stands for."""

    name: str | None = None
    device: str | None = None


_thread = _Thread()
#: What was forced and not left again, in any thread, and the last of it: what compiled code sees, since compilers
#: notice when a plain variable changes, and not when a thread's own does.
_entered: list[str | None] = []
_forced: str | None = None

Ask = Callable[[Any], "str | None"]


class Call(Protocol):
    """A checked problem."""

    def inputs(self) -> Sequence[Tensor]:
        """The tensors that derivatives may be taken in."""


def _always(call: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    Args:
        name: what ``use_backend`` calls it.
        run: computes a call.
        supports: why it cannot serve a call; ``None`` when it can.
        prefers: why the automatic choice passes over it although it could serve.
        first: its first derivatives.
        second: where its second derivatives come from.
        transforms: why it has no forward mode and no ``vmap``; ``None`` when it has both.
    """

    name: str
    run: Callable[[Any], Any]
    supports: Ask = _always
    prefers: Ask = _always
    first: str = "right"
    second: str = "autograd"
    transforms: str | None = None


class Operator:
    """An operator and its backends, in the order in which the automatic choice tries them.

    Args:
        name: of the public function.
        prepare: makes the checked call from the function's arguments.
        aliases: other names of backends.
        entries: further public functions on the same backends, with the settings of ``prepare`` that they stand for.
        argument: how the function calls the choice of a backend.
        cut: whether its function also serves sequences that are cut over processes.
    """

    def __init__(
        self, name: str, prepare: Callable[..., Any], aliases: Mapping[str, str] | None = None,
        entries: Mapping[str, Mapping[str, Any]] | None = None, argument: str = "backend", cut: bool = False,
    ):  # fmt: skip
        self.name, self.prepare, self.aliases, self.argument = name, prepare, dict(aliases or {}), argument
        self.cut = cut
        self.backends: dict[str, Backend] = {}
        for entry, settings in {name: {}, **(entries or {})}.items():
            _OPERATORS[entry] = (self, dict(settings))

    def register(self, name: str, run: Callable[[Any], Any], **claims: Any) -> None:
        """Add a :class:`Backend`, behind those that are there."""
        self.backends[name] = Backend(name, run, **claims)

    def refusal(self, backend: Backend, call: Any) -> str | None:
        """Why a backend cannot serve a call; ``None`` when it can."""
        # First, since what supports a call may read numbers, which transforms do not allow.
        if backend.transforms is not None and watched() and transformed([*call.inputs(), *deciding(call)]):
            able = [b.name for b in self.backends.values() if b.transforms is None]
            return f"{backend.transforms}, so it has no forward mode and no vmap; possible: {able}"
        return backend.supports(call)

    def choose(self, call: Any, backend: str | None = None) -> Backend:
        """The backend that serves a call; ``ValueError`` when a forced one cannot."""
        name, argument = (forced(), "backend") if backend is None else (backend, self.argument)
        if name is None or name == AUTO:
            for one in self.backends.values():
                if self.refusal(one, call) is None and one.prefers(call) is None:
                    return one
            raise AssertionError("the specification serves everything")
        check_type(argument, name, str, "the name of a backend")
        found = self.backends.get(self.aliases.get(name, name))
        if found is None:
            known(name, [*self.backends, *self.aliases], argument)
            raise ValueError(
                f"{argument}={name!r} cannot serve this call: {self.name} has no such backend; "
                f"possible: {list(self.backends)}"
            )
        why = self.refusal(found, call)
        if why:
            raise ValueError(f"{argument}={name!r} cannot serve this call: {why}")
        return found

    def run(self, call: Any, backend: str | None = None) -> Any:
        """Compute a call."""
        if not self.cut and others() is not None:
            able = [name for name, (op, _) in _OPERATORS.items() if op.cut]
            raise ValueError(f"{self.name} does not serve a sequence that is cut over processes; those that do: {able}")
        return self.choose(call, backend).run(call)

    def explain(self, call: Any, backend: str | None = None) -> str:
        """Which backend runs, and why each other was passed over."""
        chosen = self.choose(call, backend)
        lines = [f"runs: {chosen.name}"]
        order = list(self.backends)
        for one in self.backends.values():
            if one is not chosen:
                why = self.refusal(one, call) or one.prefers(call)
                lines.append(f"passed over: {one.name}: {why or f'comes after {chosen.name} in the order {order}'}")
        return "\n".join(lines)


#: Public function: its operator, and the settings of ``prepare`` that it stands for.
_OPERATORS: dict[str, tuple[Operator, dict[str, Any]]] = {}


def operators() -> list[str]:
    """Names of all operators that ``explain`` and ``derivatives`` know."""
    return list(_OPERATORS)


def find(op: str | Callable[..., Any]) -> tuple[Operator, dict[str, Any]]:
    """An operator by its function or its name."""
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPERATORS:
        raise ValueError(f"op={name!r} is no operator; choose one of {operators()}")
    return _OPERATORS[name]


def known(name: str, here: Sequence[str] | None = None, argument: str = "backend") -> None:
    """Raise ``ValueError`` unless some operator has a backend of that name."""
    names = {n for op, _ in _OPERATORS.values() for n in (*op.backends, *op.aliases)}
    if name not in names:
        choices = list(here or sorted(names))
        raise ValueError(f"{argument}={name!r} is unknown; choose one of {choices} or None for the automatic choice")


def forced() -> str | None:
    """The backend that :func:`use_backend` forces here; ``None`` for the automatic choice."""
    return _forced if torch.compiler.is_compiling() else _thread.name


def device_kind(x: Tensor) -> str:
    """Type of the device that a call is for: where ``x`` lies, or the one that :func:`described` stands for."""
    if not torch.compiler.is_compiling() and _thread.device is not None:
        return _thread.device
    return x.device.type


@contextmanager
def described(device: str | torch.device) -> Iterator[None]:
    """Backends are chosen inside as if tensors lay on ``device``, which need not be at hand."""
    before, _thread.device = _thread.device, torch.device(device).type
    try:
        yield
    finally:
        _thread.device = before


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every operator call inside the block; a backend that cannot serve a call raises.

    Other threads are not forced.

    Operators that lay attention over pieces (windows, neighborhoods, blocks, agents) take the names of
    ``attnlib.ops.BACKENDS`` for what runs on a piece. ``"eager"`` is the specification of every operator. A call with a
    ``backend`` of its own keeps that.

    >>> import torch
    >>> from attnlib.ops import attention
    >>> with use_backend("eager"):
    ...     attention(*torch.zeros(3, 1, 1, 2, 4)).shape
    torch.Size([1, 1, 2, 4])
    """
    global _forced
    if name is not None:
        check_type("name", name, str, "the name of a backend or None")
        known(name)
    before, _thread.name = _thread.name, name
    _entered.append(name)
    _forced = name
    try:
        yield
    finally:
        _thread.name = before
        del _entered[len(_entered) - 1 - _entered[::-1].index(name)]
        _forced = _entered[-1] if _entered else None


def explain(
    op: Any, *args: Any, backend: str | None = None, device: str | torch.device | None = None, **kwargs: Any
) -> str:
    """Which backend serves ``op(*args, **kwargs)`` and why each other was passed over.

    Args:
        op: an operator or its name, of :func:`operators`; when it is left out, ``attention`` is meant.
        backend: as the operator takes it (``form`` where that is its name).
        device: the choice on this device, ``"cuda"`` for example, which need not be at hand; where the tensors lie
            when ``None``.

    >>> import torch
    >>> print(explain(*torch.zeros(3, 1, 1, 2, 4), normalizer="relu").splitlines()[1])
    passed over: sdpa: its normalizer is relu, SDPA only knows softmax
    >>> print(explain("linear_attention", *torch.zeros(3, 1, 1, 2, 4)).splitlines()[0])
    runs: chunkwise
    """
    if isinstance(op, Tensor):
        op, args = "attention", (op, *args)
    operator, settings = find(op)
    backend = kwargs.pop("form", backend)
    try:
        call = operator.prepare(*args, **settings, **kwargs)
    except TypeError as error:
        if "positional argument" not in str(error) and "keyword argument" not in str(error):
            raise
        name = op if isinstance(op, str) else op.__name__
        takes = ", ".join([p for p in inspect.signature(operator.prepare).parameters if p not in (*settings, "want")])
        raise TypeError(f"explain({name!r}, ...) wants the arguments of a call: {takes}; {error}") from None
    with nullcontext() if device is None else described(_device(device)):
        return operator.explain(call, backend)


def _device(device: Any) -> torch.device:
    check_type("device", device, (str, torch.device), "a device or its name, such as 'cuda'")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device; possible: 'cpu', 'cuda', ... ({error})") from None


def derivatives(op: str | Callable[..., Any]) -> dict[str, dict[str, str]]:
    """What each backend of an operator states about its derivatives.

    Returns:
        For each backend ``first``, ``second``, ``forward`` (forward mode) and ``vmap`` (with all of ``torch.func``):
        ``"right"``, with where it comes from, or ``"refused"``, with why and what is possible.

    >>> derivatives("attention")["tiled"]["vmap"]
    "refused: its backward is written by hand; possible: ['eager']"
    """
    operator, _ = find(op)
    able = [b.name for b in operator.backends.values() if b.transforms is None]
    out = {}
    for one in operator.backends.values():
        other = "right" if one.transforms is None else f"refused: {one.transforms}; possible: {able}"
        out[one.name] = {"first": one.first, "second": f"right: by {one.second}", "forward": other, "vmap": other}
    return out


# --------------------------------------------------------------------------------------------------------------------
# Derivatives


def transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether a transform of ``torch.func`` or forward mode looks at any of these tensors."""
    if not watched():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def deciding(call: Any) -> Sequence[Tensor]:
    """What a call says by tensors of its own about which pairs meet."""
    return call.deciding() if hasattr(call, "deciding") else ()


def watched() -> bool:
    """Whether a transform or forward mode is at work at all."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def wants_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether a graph is being recorded for any of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _Twice(torch.autograd.Function):
    """The identity on ``outputs``. While its gradient records a graph itself, it goes to ``inputs`` by ``spec``."""

    @staticmethod
    def forward(ctx: Any, spec: Callable[..., Any], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.spec, ctx.count = spec, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        # Detached, not viewed: what is written into the result in place is then found out where it does harm.
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        again = torch.is_grad_enabled()
        if not again and not _batched(grads):
            return (None, None, *grads, *[None] * (len(ctx.needs_input_grad) - 2 - ctx.count))
        inputs = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2 + ctx.count :]) if needed]
        with torch.enable_grad():
            # Views of their own, so that an input that stands in two places gets two gradients.
            fresh = [t.view_as(t) if i in wanted else t for i, t in enumerate(inputs)]
            outputs = ctx.spec(*fresh)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs], [fresh[i] for i in wanted], [g for _, g in pairs], create_graph=again,
                allow_unused=True,
            ) if pairs else [None] * len(wanted)  # fmt: skip
        result: list[Tensor | None] = [None] * len(inputs)
        for i, g in zip(wanted, found, strict=True):
            result[i] = g
        return (None, None, *(None for _ in grads), *result)


def _batched(grads: Sequence[Tensor | None]) -> bool:
    given = [g for g in grads if g is not None]
    return any(map(torch._C._functorch.is_legacy_batchedtensor, given)) or transformed(given)


def twice(
    outputs: tuple[Tensor, ...], inputs: Sequence[Tensor], spec: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``outputs``, differentiable in ``inputs`` any number of times.

    Their own backward runs, unless the gradient is to be differentiated again (``create_graph=True``) or is batched:
    then it is that of ``spec``, which computes the same outputs from the inputs by plain operations.
    """
    if torch.compiler.is_compiling() or not wants_gradient(inputs):
        return outputs
    return _Twice.apply(spec, len(outputs), *outputs, *inputs)
