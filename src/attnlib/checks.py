"""What is checked at a door, written once.

Every refusal says three things: the argument, what was given, what is possible. A wrong kind of value raises
``TypeError``, a wrong value of the right kind ``ValueError``. The functions take plain values and tensors and look at
shapes, types and devices only; the few that read numbers out of a tensor say so, and do not while a compiler traces.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import operator
import string
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def describe(value: Any) -> str:
    """What was given, in a few words.

    >>> describe(torch.zeros(2, 3)), describe([1]), describe("relu")
    ('a torch.float32 tensor of shape (2, 3)', '[1]', "'relu'")
    """
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, str, tuple, list, dict, torch.dtype, torch.device)):
        text = repr(value)
        return text if len(text) <= 80 else f"{type(value).__name__} {text[:70]}..."
    return f"{type(value).__name__}"


# --------------------------------------------------------------------------------------------------------------------
# Numbers


def fixed(value: Any) -> Any:
    """A number as a plain one, to be written out or looked up: tracers that hold it symbolic make a graph for each.

    >>> fixed(3), fixed(0.5)
    (3, 0.5)
    """
    if isinstance(value, (int, torch.SymInt)):
        return operator.index(value)
    return next(iter({value})) if torch.compiler.is_dynamo_compiling() else float(value)


def _bounds(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    low = f"at least {least}" if least is not None else f"above {above}" if above is not None else ""
    high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    return " and ".join(part for part in (low, high) if part)


def check_int(name: str, value: Any, least: int | None = None, most: int | None = None, also: str = "") -> int:
    """``value`` as a plain integer within ``least..most``; ``TypeError`` for what is none, booleans and floats too.

    Args:
        also: what else the caller takes, for the message: ``"or a tensor (B,)"``.

    >>> check_int("window", 3, least=1)
    3
    """
    if type(value) is not int and not isinstance(value, torch.SymInt):
        size = isinstance(value, Tensor) and torch.jit.is_tracing() and value.dim() == 0 and value.dtype == torch.int64
        if not size and (isinstance(value, (bool, Tensor)) or not isinstance(value, SupportsIndex)):
            wanted = _bounds(least, None, most, None)
            raise TypeError(
                f"{name} must be an integer{' of ' + wanted if wanted else ''}{' ' + also if also else ''}, "
                f"got {describe(value)}"
            )
        value = operator.index(value)  # integers of numpy, and the sizes of tensors under torch.jit.trace
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(
            f"{name} must be an integer of {_bounds(least, None, most, None)}{' ' + also if also else ''}, got {value}"
        )
    return value


def check_real(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    finite: bool = True,
) -> float:
    """``value`` as a number within bounds; ``TypeError`` for booleans and tensors, ``ValueError`` for NaN.

    Args:
        least, most: bounds that may be met.
        above, below: bounds that may not.
        finite: refuse infinity.

    >>> check_real("dropout_p", 0.1, least=0, below=1)
    0.1
    """
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        if isinstance(value, (bool, str, Tensor)) or not hasattr(type(value), "__float__"):
            raise TypeError(f"{name} must be {_number(least, above, most, below, finite)}, got {describe(value)}")
        value = float(value)  # numbers of numpy
    if (
        value != value
        or (finite and (value == math.inf or value == -math.inf))
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
        or (below is not None and value >= below)
    ):
        raise ValueError(f"{name} must be {_number(least, above, most, below, finite)}, got {value}")
    return value


def _number(least: float | None, above: float | None, most: float | None, below: float | None, finite: bool) -> str:
    wanted = _bounds(least, above, most, below)
    return f"a {'finite ' if finite else ''}number{' of ' + wanted if least is not None else ' ' + wanted}".rstrip()


def check_flag(name: str, value: Any) -> bool:
    """``value``, or ``TypeError`` unless it is ``True`` or ``False``."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def check_divides(name: str, divisor: int, whole_name: str, whole: int) -> None:
    """Raise unless the positive integer ``divisor`` divides ``whole``; says which divisors would do."""
    divisor, whole = check_int(name, divisor), check_int(whole_name, whole)
    if divisor <= 0 or whole % divisor:
        possible = [n for n in range(1, whole + 1) if whole % n == 0]
        shown = possible if len(possible) <= 12 else [*possible[:6], "...", *possible[-5:]]
        raise ValueError(f"{name}={divisor} does not divide {whole_name}={whole}; possible: {shown}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    options = list(choices)
    if isinstance(value, Tensor) or value not in options:
        near = _nearest(value, options)
        raise ValueError(f"{name}={describe(value)} is not possible; choose one of {options}{near}")


def _nearest(value: Any, options: Iterable[Any]) -> str:
    """What a misspelt name was likely meant to be, to say it behind a list of several."""
    import difflib  # only for an error

    names = {o.casefold(): o for o in options if isinstance(o, str)}
    if not isinstance(value, str) or len(names) < 5:
        return ""
    found = difflib.get_close_matches(value.casefold(), list(names), n=1, cutoff=0.75)
    return f"; did you mean {names[found[0]]!r}?" if found else ""


def check_type(name: str, value: Any, kind: type | tuple[type, ...], what: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` is a ``kind``; ``what`` says it in words."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise TypeError(f"{name} must be {what or ' or '.join(k.__name__ for k in kinds)}, got {describe(value)}")


def check_named(name: str, value: Any, kind: type, empty: str) -> None:
    """Raise unless ``value`` maps names to objects of one class, at least one; ``empty`` says what none would mean."""
    check_type(name, value, Mapping, f"a mapping from names to {kind.__name__}")
    for key, one in value.items():
        check_type(f"{name}[{key!r}]", one, kind)
    if not value:
        raise ValueError(f"{name} is empty: {empty}")


def plain(value: Any) -> Any:
    """A number of numpy as Python's own, also inside a tuple or a list; anything else as it is.

    >>> plain((np.int64(2), "a"))
    (2, 'a')
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (tuple, list) and any(isinstance(v, np.generic) for v in value):
        return type(value)([plain(v) for v in value])
    return value


def check_name(name: str, value: Any) -> str:
    """``value``, or an error unless it is a name that somebody chose: a string that is not empty."""
    check_type(name, value, str, "a name")
    if not value:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return value


# --------------------------------------------------------------------------------------------------------------------
# Sequences


def check_template(name: str, value: Any, fields: Sequence[str], needed: Sequence[str] = ()) -> str:
    """``value``, unless it is no text that ``str.format`` can fill in from ``fields``, ``needed`` among them.

    >>> check_template("prompt", "Is it {word}?", ("word", "question"))
    'Is it {word}?'
    """
    possible = _and("{" + f + "}" for f in fields)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text with {possible} in it, got {describe(value)}")
    try:
        used = {
            field.split(".")[0].split("[")[0] for _, field, _, _ in string.Formatter().parse(value) if field is not None
        }
    except ValueError as error:
        raise ValueError(f"{name} cannot be filled in ({error}): {value[:80]!r}; possible are {possible}") from None
    if unknown := sorted(used - set(fields)):
        raise ValueError(
            f"{name} holds {{{unknown[0]}}}, which is not filled in: {value[:80]!r}; possible are {possible}"
        )
    if missing := [f for f in needed if f not in used]:
        raise ValueError(f"{name} must hold {{{missing[0]}}}, got {value[:80]!r}")
    return value


def to_list(name: str, value: Iterable[Any] | None, example: str = "[0, 1]") -> list[Any] | None:
    """``value`` as a list, ``None`` as it is; raises ``TypeError`` for one number or one string.

    >>> to_list("layers", (2, 3))
    [2, 3]
    """
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence such as {example}, got {value!r}; write {name}=[{value!r}]")
    return list(value)


def to_tuple(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """``value`` for each of ``rank`` axes; raises ``ValueError`` when a sequence has another length."""
    if isinstance(value, (int, bool, float, torch.SymInt)):
        return (value,) * rank
    if isinstance(value, np.generic):
        return (value.item(),) * rank
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be one number or {rank} of them, one per axis, got {describe(value)}")
    if len(value) != rank:
        raise ValueError(f"{name}={tuple(value)} names {len(value)} axes, but the grid has {rank}")
    return tuple(value)


def check_ints(name: str, value: Any, least: int | None = None, most: int | None = None) -> tuple[int, ...]:
    """A sequence of integers as a tuple, each checked by :func:`check_int`."""
    if not isinstance(value, (tuple, list)) and (
        isinstance(value, (str, Tensor, Mapping)) or not isinstance(value, Iterable)
    ):
        raise TypeError(f"{name} must be a sequence of integers such as (14, 14), got {describe(value)}")
    numbers = tuple(value)
    for v in numbers:
        if type(v) is not int or (least is not None and v < least) or (most is not None and v > most):
            return tuple([check_int(f"{name}[{i}]", v, least, most) for i, v in enumerate(numbers)])
    return numbers


def check_grid(name: str, grid: Any, ranks: Sequence[int] = (1, 2, 3)) -> tuple[int, ...]:
    """Sides of a grid as a tuple of positive integers; ``ValueError`` for another number of axes."""
    sides = check_ints(name, grid, least=1)
    if len(sides) not in ranks:
        raise ValueError(f"{name} must have {' or '.join(map(str, ranks))} axes, got {sides}")
    return sides


def check_size(name: str, size: Any, least: int = 1) -> tuple[int, int]:
    """(height, width) of an image, each at least ``least``."""
    sides = check_ints(name, size, least=least)
    if len(sides) != 2:
        raise ValueError(f"{name} must be (height, width), got {sides}")
    return sides[0], sides[1]


# --------------------------------------------------------------------------------------------------------------------
# Tensors


def check_tensor(name: str, value: Any, what: str = "a torch.Tensor") -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {what}, got {describe(value)}")


def _tensor(name: str, value: Any) -> Tensor:
    check_tensor(name, value)
    return value


def check_rank(name: str, value: Any, ranks: int | Sequence[int], layout: str) -> None:
    """Raise unless ``value`` is a tensor with one of ``ranks`` dimensions; ``layout`` spells the expected shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {layout}, got {describe(value)}")
    if value.layout is not torch.strided or value.is_nested:
        check_dense(name, value)
    rank = value.dim()
    if rank != ranks and (isinstance(ranks, int) or rank not in ranks):
        raise ValueError(f"{name} must have shape {layout}, got a tensor of shape {tuple(value.shape)}")


def check_dense(name: str, value: Tensor) -> None:
    """Raise ``TypeError`` for tensors that hold their numbers otherwise than by strides."""
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one; pad it (torch.nested.to_padded_tensor) and say which "
            "tokens exist (valid)"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}; see Tensor.to_dense()")


def check_axes(name: str, value: Any, **axes: int | None) -> None:
    """Raise unless ``value`` is a tensor with exactly these axes, in order; ``None`` leaves a size open.

    >>> check_axes("k", torch.zeros(2, 4, 5, 8), B=2, Hk=None, M=None, D=8)
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if (
        not isinstance(value, Tensor)
        or len(shape) != len(axes)
        or any(size is not None and given != size for given, size in zip(shape, axes.values(), strict=True))
    ):
        spelled = ", ".join([axis if size is None else f"{axis}={size}" for axis, size in axes.items()])
        error = ValueError if isinstance(value, Tensor) else TypeError
        raise error(f"{name} must be a tensor of shape ({spelled}), got {describe(value)}")


def repeated(pairs: Tensor, n: int, m: int) -> Tensor:
    """(..., N or 1, M or 1) as (..., N, M), without copying."""
    rows, cols = pairs.shape[-2:]
    if (rows != 1 or n == 1) and (cols != 1 or m == 1):
        return pairs
    return pairs.expand(*pairs.shape[:-2], n if rows == 1 else rows, m if cols == 1 else cols)


def check_width(name: str, value: Tensor, width: int, what: str = "dim") -> None:
    """Raise ``ValueError`` unless the last axis of ``value`` is ``width`` long."""
    check_tensor(name, value)
    if value.dim() == 0 or value.shape[-1] != width:
        raise ValueError(
            f"{name} has {value.shape[-1] if value.dim() else 0} channels in its last axis (shape "
            f"{tuple(value.shape)}), but this module was built with {what}={width}"
        )


def check_valid(name: str, valid: Any, shape: Sequence[int]) -> None:
    """Raise unless ``valid`` is ``None`` or a boolean tensor of exactly ``shape``."""
    if valid is None:
        return
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean tensor (True: the token exists), got {describe(valid)}")
    if tuple(valid.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(valid.shape)}")


def check_float(name: str, value: Any, what: str = "a floating-point tensor") -> None:
    """Raise ``TypeError`` unless ``value`` is a real floating-point tensor that can be calculated with."""
    if not isinstance(value, Tensor) or value.dtype not in REAL:
        packed = isinstance(value, Tensor) and value.is_floating_point()
        why = "; nothing is calculated in it: convert it, to torch.bfloat16 for example" if packed else ""
        raise TypeError(f"{name} must be {what}, got {describe(value)}{why}")
    if value.layout is not torch.strided or value.is_nested:
        check_dense(name, value)


def check_whole(name: str, value: Any, what: str = "an integer tensor") -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor of integers (booleans are none)."""
    if not isinstance(value, Tensor) or value.dtype not in _WHOLE:
        raise TypeError(f"{name} must be {what}, got {describe(value)}")


#: Types that are calculated in; others with a point (float8) only store.
REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _unlike(tensors: Mapping[str, Tensor | None], attribute: str) -> dict[str, Any]:
    """An attribute of each tensor, by its name, where they differ; nothing where all are alike."""
    first = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            check_tensor(name, t)
        here = getattr(t, attribute)
        first = here if first is None else first
        if here != first:
            return {name: getattr(_tensor(name, t), attribute) for name, t in tensors.items() if t is not None}
    return {}


def check_dtype(**tensors: Tensor | None) -> None:
    """Raise ``TypeError`` unless all of these share one floating dtype; names them in order."""
    first = next((t for t in tensors.values() if t is not None), None)
    if _unlike(tensors, "dtype") or not (first is None or first.is_floating_point()):
        given = {name: t for name, t in tensors.items() if t is not None}
        listed = ", ".join(f"{name} has {t.dtype}" for name, t in given.items())
        raise TypeError(f"{_and(given)} must share one floating dtype, but {listed}")


def check_device(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all of these lie on the device of the first one."""
    if devices := _unlike(tensors, "device"):
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{_and(devices)} must lie on one device, but {listed} was given")


def check_place(name: str, device: Any) -> torch.device | None:
    """``device`` as a ``torch.device``, ``None`` as it is; an error for what names none.

    >>> check_place("device", "cpu")
    device(type='cpu')
    """
    if device is None or isinstance(device, torch.device):
        return device
    check_type(name, device, str, "a torch.device, its name or None")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{name}={device!r} is no device that torch knows, such as 'cpu' or 'cuda:0'") from error


def check_values(name: str, value: Tensor) -> None:
    """Raise ``ValueError`` for a tensor whose values cannot be read, where they are needed."""
    if value.is_meta:
        raise ValueError(f"{name} must hold values that can be read, got a tensor on meta")


def check_tensors(name: str, value: Any, least: int = 0) -> list[Tensor]:
    """``value`` as a list, unless it is no sequence of at least ``least`` tensors."""
    if isinstance(value, (Tensor, str)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, got {describe(value)}")
    for i, t in enumerate(value):
        check_tensor(f"{name}[{i}]", t)
    if len(value) < least:
        raise ValueError(f"{name} must hold at least {least} tensor{'s' * (least > 1)}, got {len(value)}")
    return list(value)


def raised(name: str, spec: Any, build: Callable[[Any], Any], giver: str) -> Any:
    """``build(json of spec)``; ``ValueError`` for a text that ``giver`` did not give."""
    check_type(name, spec, str, f"a text that {giver} gave")
    try:
        return build(json.loads(spec))
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} must be a text that {giver} gave, got {describe(spec)} ({error})") from error


def check_batch(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all of these have the same first axis."""
    sizes = {name: _tensor(name, t).shape[0] for name, t in tensors.items() if t is not None}
    first = next(iter(sizes.values()), 0)
    if any(size != first for size in sizes.values()):
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"{_and(sizes)} must share the batch, but {listed} samples")


def check_serves(name: str, count: int, batch: int, what: str = "samples") -> None:
    """Raise ``ValueError`` unless something for ``count`` samples (or heads) can serve ``batch``: as many, or one."""
    if count != 1 and count != batch:
        raise ValueError(f"{name} is for {count} {what}, but there are {batch}; possible: {batch} or 1")


def check_index(name: str, index: Any, shape: Sequence[int] | None, count: int, what: str) -> None:
    """Raise unless ``index`` is an integer tensor of ``shape`` (``None``: any) that points at ``count`` of ``what``.

    The numbers are looked at as :func:`check_within` says.
    """
    check_whole(name, index)
    if shape is not None and tuple(index.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(index.shape)}")
    check_within(name, index, count, what)


def check_within(name: str, numbers: Tensor, count: int, what: str) -> None:
    """Raise ``ValueError`` unless all of the integers ``numbers`` lie in ``0..count-1``.

    On an accelerator they are asserted there, without waiting for it.
    """
    if not readable(numbers) or not numbers.numel():
        return
    if numbers.device.type != "cpu":
        torch._assert_async(((numbers >= 0) & (numbers < count)).all(), f"{name} points beyond {count} {what}s")
        return
    low, high = extremes(numbers, (0, -1))
    if low < 0 or high >= count:
        raise ValueError(f"{name} points at {what} {low if low < 0 else high}; possible: 0 to {count - 1}")


def readable(value: Tensor) -> bool:
    """Whether numbers can be read out of ``value``: not while tracing, nor of meta, fake or batched tensors."""
    if torch.compiler.is_compiling() or value.is_meta or type(value) not in (Tensor, torch.nn.Parameter):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(value):  # transforms lie around each other
        if torch._C._functorch.is_batchedtensor(value):
            return False
        value = torch._C._functorch.get_unwrapped(value)
    return True


def extremes(value: Tensor, unread: tuple[int, int]) -> tuple[int, int]:
    """The least and the greatest number of a tensor; ``unread`` for one without numbers or that is not readable."""
    if not readable(value) or not value.numel():
        return unread
    low, high = torch.aminmax(value)
    return int(low), int(high)


def _and(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


# --------------------------------------------------------------------------------------------------------------------
# Settings: what a constructor's annotations say


def checked(function: F) -> F:
    """``function``, called only with arguments that its annotations allow; of a class, its constructor.

    What they say is looked at as far as it is plain: numbers (booleans are none, NaN and infinity are refused unless
    they are the default), strings, flags, sequences, tensors, modules and other classes, unions of these. A number
    whose name speaks of dropping must lie in [0, 1).
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return function  # type: ignore[return-value]
    signature = inspect.signature(function)
    names = [n for n in signature.parameters if n not in ("self", "cls")]

    @functools.wraps(function)
    def door(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple([plain(a) for a in args]), {name: plain(value) for name, value in kwargs.items()}
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            possible = _settings(type(args[0])) if args and function.__name__ == "__init__" else names
            raise TypeError(f"{error}; possible are the arguments {possible}") from None
        hints = _hints(function)
        asked: list[tuple[str, Any, Any]] = []
        for name, value in given.items():
            parameter = signature.parameters[name]
            if parameter.kind is _ANY_KEYWORDS and args:
                # What is handed to a base class, by the annotations there.
                asked += [(key, inner, _inherited(type(args[0]), key, inner)) for key, inner in value.items()]
            elif parameter.kind not in (_ANY_ARGS, _ANY_KEYWORDS) and value is not parameter.default:
                asked.append((name, value, hints.get(name, Any)))
        unfit = [refusal for one in asked if (refusal := _check_setting(*one))]
        # Of what is no plain number, word or flag the function itself may have more to say than its annotation.
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            for name, why in unfit:
                if name not in str(error):
                    raise TypeError(why) from error
            raise
        for _, why in unfit:
            raise TypeError(why)
        return result

    return door  # type: ignore[return-value]


def _check_setting(name: str, value: Any, hint: Any) -> tuple[str, str] | None:
    """Raise for a plain value that does not fit; the argument and why for any other that does not."""
    if not _fits(value, hint):
        refusal = f"{name} must be {_spell(hint)}, got {describe(value)}"
        if any(part not in _WORDS and typing.get_origin(part) is not typing.Literal for part in _parts(hint)):
            return name, refusal
        if not _number_for(hint) or isinstance(value, (bool, str, Tensor)) or value is None:
            raise TypeError(refusal)
        check_real(name, value) if _number_for(hint) is float else check_int(name, value)
    if "drop" in name and value is not None and hint is not Any and float in (type(value), _number_for(hint)):
        check_real(name, value, least=0, below=1)
    return None


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _inherited(cls: type, name: str, value: Any) -> Any:
    """The annotation of a constructor's argument, in the first class that names it; ``Any`` for its default."""
    for base in cls.__mro__:
        function = inspect.unwrap(base.__dict__["__init__"]) if "__init__" in base.__dict__ else None
        found = _hints(function) if function else {}
        if function and name in found:
            return Any if inspect.signature(function).parameters[name].default is value else found[name]
    return Any


def _settings(cls: type) -> list[str]:
    """What a constructor takes, together with the bases to which it hands what it does not name itself."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in base.__dict__ or base is object:
            continue
        parameters = list(inspect.signature(base.__dict__["__init__"]).parameters.values())[1:]
        names |= dict.fromkeys(p.name for p in parameters if p.kind not in (_ANY_ARGS, _ANY_KEYWORDS))
        if not any(p.kind is _ANY_KEYWORDS for p in parameters):
            break
    return list(names)


_ANY_ARGS, _ANY_KEYWORDS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a function, ``Any`` for those that are only known to a type checker."""
    found = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, getattr(function, "__globals__", {}))  # noqa: S307 (our own source)
            except Exception:  # names under TYPE_CHECKING
                annotation = Any
        found[name] = annotation
    return found


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, (str, TypeVar)):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is typing.Literal:
        return not isinstance(value, Tensor) and value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, (SupportsIndex, torch.SymInt)) and not isinstance(value, (bool, Tensor))
    if hint is float:
        plain = isinstance(value, (int, float, torch.SymInt, torch.SymFloat, np.floating, np.integer))
        return plain and not isinstance(value, bool) and -math.inf < value < math.inf
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        parts = arguments[:1] * len(value) if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        return len(parts) == len(value) and all(map(_fits, value, parts))
    if origin in (list, set, frozenset, abc.Sequence, abc.Iterable, abc.Collection):
        wanted = abc.Iterable if origin in (list, abc.Sequence) else origin
        if isinstance(value, (str, Tensor, Mapping)) or not isinstance(value, wanted):
            return False
        return not isinstance(value, abc.Collection) or all(_fits(v, a) for a in arguments[:1] for v in value)
    if origin in (dict, abc.Mapping, abc.MutableMapping):
        return isinstance(value, Mapping)
    if origin is abc.Callable or hint in (abc.Callable, Callable):
        return callable(value)
    if origin is type:
        return isinstance(value, type)
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


def _number_for(hint: Any) -> type | None:
    """``int`` or ``float`` where a hint asks for that and nothing else but ``None``."""
    parts = [p for p in _parts(hint) if p is not type(None)]
    return parts[0] if len(parts) == 1 and parts[0] in (int, float) else None


_WORDS = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", type(None): "None"}


def _spell(hint: Any) -> str:
    if len(_parts(hint)) > 1:
        return " or ".join(map(_spell, _parts(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {list(typing.get_args(hint))}"
    return _WORDS.get(hint) or (hint.__name__ if isinstance(hint, type) else str(hint).replace("collections.abc.", ""))


# --------------------------------------------------------------------------------------------------------------------
# Functions of tensors: what shapes belong together


def shaped(**tensors: str) -> Callable[[F], F]:
    """A function called only with tensors of these kinds and shapes; its other arguments as its annotations say.

    Args:
        tensors: by argument ``"float (B, H, N)"``: a kind (``float``, ``alike`` for floats of one type, ``bool``,
            ``whole``, ``number`` for any real one, ``tensor``) and axes. One name is one size in all arguments,
            ``B or 1`` may also be 1, a number is a size, ``...`` in front stands for any axes, the same in all
            arguments; ``|`` separates possible shapes; without axes any shape will do. All lie on one device. An
            argument whose default is ``None`` may be that. Of a number, ``"infinite"`` says that it may be infinite.

    While a compiler traces, nothing is looked at.

    >>> @shaped(x="float (B, N)", weights="float (B or 1, N)")
    ... def mean(x, weights, eps: float = 0.0):
    ...     return (x * weights).sum(1) / (weights.sum(1) + eps)
    >>> mean(torch.ones(2, 3), torch.ones(1, 3)).tolist()
    [1.0, 1.0]
    """
    endless = {name for name, text in tensors.items() if text == "infinite"}
    wanted = {name: _parse_shapes(text) for name, text in tensors.items() if name not in endless}

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        names = list(signature.parameters)
        assert wanted.keys() <= signature.parameters.keys(), f"{function.__name__} has no {wanted.keys() - set(names)}"

        @functools.wraps(function)
        def door(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            args, kwargs = tuple([plain(a) for a in args]), {name: plain(value) for name, value in kwargs.items()}
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{error}; possible are the arguments {names}") from None
            hints = _hints(function)
            sizes: dict[str, Any] = {}
            for name, value in given.items():
                parameter = signature.parameters[name]
                if value is parameter.default or parameter.kind in (_ANY_ARGS, _ANY_KEYWORDS):
                    continue
                if name in wanted and (isinstance(value, Tensor) or not _fits_beside_tensors(value, hints.get(name))):
                    _check_shapes(name, value, wanted[name], sizes)
                elif name in endless:
                    check_real(name, value, above=-math.inf, finite=False)
                elif refusal := _check_setting(name, value, hints.get(name, Any)):
                    raise TypeError(refusal[1])
            found = {name: t for name in wanted if isinstance(t := given.get(name), Tensor)}
            check_device(**found)
            check_dtype(**{name: t for name, t in found.items() if wanted[name][0] == "alike"})
            return function(*args, **kwargs)

        door.shapes = dict(tensors)  # type: ignore[attr-defined]  # to look at
        return door  # type: ignore[return-value]

    return decorate


_Shapes = tuple[str, list[list[str]] | None]

_TENSOR_KINDS: dict[str, tuple[Callable[[Tensor], bool], str]] = {
    "float": (Tensor.is_floating_point, "a floating-point tensor"),
    "alike": (Tensor.is_floating_point, "a floating-point tensor"),
    "bool": (lambda t: t.dtype == torch.bool, "a boolean tensor"),
    "whole": (lambda t: t.dtype in _WHOLE, "an integer tensor"),
    "number": (lambda t: t.dtype != torch.bool and not t.is_complex(), "a tensor of real numbers"),
    "tensor": (lambda t: True, "a tensor"),
}


def _parse_shapes(text: str) -> _Shapes:
    kind, _, shapes = text.partition(" ")
    assert kind in _TENSOR_KINDS, text
    if not shapes:
        return kind, None
    return kind, [[a.strip() for a in s.strip().strip("()").split(",") if a.strip()] for s in shapes.split("|")]


def _fits_beside_tensors(value: Any, hint: Any) -> bool:
    """Whether a value that is no tensor is one of the other kinds that an annotation names."""
    others = [part for part in _parts(hint) if part is not Tensor] if hint is not None else []
    return any(_fits(value, part) for part in others)


def _check_shapes(name: str, value: Any, wanted: _Shapes, sizes: dict[str, Any]) -> None:
    kind, shapes = wanted
    fits, words = _TENSOR_KINDS[kind]
    if not isinstance(value, Tensor) or not fits(value):
        raise TypeError(f"{name} must be {words}, got {describe(value)}")
    if shapes is None:
        return
    for axes in shapes:
        if (found := _bound(tuple(value.shape), axes, sizes)) is not None:
            sizes.update(found)
            return

    def spelled(axis: str) -> str:
        first = axis.split(" or ")[0]
        return f"{first}={sizes[first]}{axis[len(first) :]}" if first in sizes and first != "..." else axis

    possible = " or ".join([f"({', '.join(map(spelled, axes))})" for axes in shapes])
    if "..." in possible and "..." in sizes:
        possible += f" with ...={sizes['...']}"
    raise ValueError(f"{name} must have shape {possible}, got {tuple(value.shape)}")


def _bound(shape: tuple[int, ...], axes: list[str], sizes: dict[str, Any]) -> dict[str, Any] | None:
    """Sizes of the axes, when a shape has them and they agree with those known so far."""
    found: dict[str, Any] = {}
    if axes and axes[0] == "...":
        axes, lead = axes[1:], len(shape) - len(axes) + 1
        if lead < 0 or sizes.get("...", shape[:lead]) != shape[:lead]:
            return None
        found["..."], shape = shape[:lead], shape[lead:]
    if len(shape) != len(axes):
        return None
    for size, axis in zip(shape, axes, strict=True):
        first, _, one = axis.partition(" or ")
        if one and size == int(one):
            continue
        if first.isdigit():
            if size != int(first):
                return None
        elif found.setdefault(first, sizes.get(first, size)) != size:
            return None
    return found
