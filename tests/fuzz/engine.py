"""Trials and their judgement."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import attnlib

from .mutate import Either, Junk, Name, mutate

SOURCE = str(Path(attnlib.__file__).parent)
HERE = str(Path(__file__).parent)

#: What a door may raise.
REFUSALS = (TypeError, ValueError, KeyError, NotImplementedError)


@dataclass
class Call:
    """One call: ``fn(*args, **kwargs)``, everything by name in ``kwargs`` so that it can be spoilt.

    Args:
        fn: called with ``kwargs``.
        kwargs: the arguments, valid.
        oracle: what the result must equal, called with the arguments given (spoilt ones too); it raises where the
            arguments mean nothing. ``None``: only properties are looked at.
        sane: further properties of a result; an assertion that fails is a failure.
        names: further names that an error may use, beside those of the arguments.
        fixed: arguments that are not spoilt.
        tolerance: relative to the scale of the oracle's values.
        allows: kinds of spoiling that mean something here, such as ``"on meta"``; what comes out is then not looked at.
        label: which of several functions this is, for the report.
    """

    fn: Callable[..., Any]
    kwargs: dict[str, Any]
    oracle: Callable[..., Any] | None = None
    sane: Callable[[Any, dict[str, Any]], None] | None = None
    names: Iterable[str] = ()
    fixed: Iterable[str] = ()
    tolerance: float = 2e-5
    allows: Iterable[str] = ()
    label: str = ""


Maker = Callable[[random.Random], Call]

TARGETS: dict[str, Maker] = {}
WEIGHTS: dict[str, int] = {}


def target(name: str, weight: int = 1) -> Callable[[Maker], Maker]:
    """Register a maker of valid calls; ``weight`` says how often its turn comes."""

    def add(make: Maker) -> Maker:
        assert name not in TARGETS, name
        TARGETS[name], WEIGHTS[name] = make, weight
        return make

    return add


_FAMILIES: dict[str, dict[str, Maker]] = {}


def family(name: str) -> Callable[[Maker], Maker]:
    """Register a maker as one of a family of small functions that share the target ``name``, each as often."""

    def add(make: Maker) -> Maker:
        members = _FAMILIES.setdefault(name, {})
        assert make.__name__ not in members, make.__name__
        members[make.__name__] = make

        def of_family(rng: random.Random) -> Call:
            label = rng.choice(list(members))
            call = members[label](rng)
            call.label = call.label or label
            return call

        TARGETS[name], WEIGHTS[name] = of_family, -(-len(members) // 3)
        return make

    return add


@dataclass
class Verdict:
    """What became of a trial; ``wrong`` is empty when all is well."""

    trial: str
    what: str
    outcome: str
    wrong: str = ""
    details: str = field(default="", repr=False)


@functools.cache
def _statements(path: str) -> list[tuple[int, int, bool]]:
    tree = ast.parse(Path(path).read_text())
    return [
        (node.lineno, node.end_lineno or node.lineno, isinstance(node, ast.Raise))
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt)
    ]


def deliberate(error: BaseException) -> bool:
    """Whether the error was raised by a ``raise`` statement of attnlib (or by a call that does not fit a signature)."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    if isinstance(error, TypeError) and "got an unexpected keyword argument" in str(error):
        return True  # Python's own words name it
    if last.filename.startswith(HERE):
        text = str(error)
        return isinstance(error, TypeError) and ("argument" in text or "keyword" in text)
    if not last.filename.startswith(SOURCE):
        return False
    around = [s for s in _statements(last.filename) if s[0] <= (last.lineno or 0) <= s[1]]
    return bool(around) and max(around, key=lambda s: (s[0], -s[1]))[2]


def _words(call: Call) -> set[str]:
    names = {*call.kwargs, *call.names}
    with contextlib.suppress(TypeError, ValueError):
        names |= set(inspect.signature(call.fn).parameters)
    return {n for n in names if n}


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point() and not t.is_meta)


def show(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, Tensor):
        return (
            f"{str(value.dtype)[6:]}{list(value.shape)}{'' if value.device.type == 'cpu' else '@' + value.device.type}"
        )
    if isinstance(value, (Either, Name)):
        return show(value.value)
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(show, value))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _compare(result: Any, expected: Any, tolerance: float) -> str:
    got, want = _tensors(result), _tensors(expected)
    if len(got) != len(want):
        return f"{len(got)} tensors came out, {len(want)} were expected"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            return f"output {i} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        if a.dtype == torch.bool or not a.is_floating_point():
            if not torch.equal(a.to(b.dtype), b):
                return f"output {i} differs"
            continue
        a, b = a.detach().double(), b.detach().double()
        scale = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 1.0
        rough = {torch.float16: 3e-3, torch.bfloat16: 3e-2}.get(got[i].dtype, tolerance)
        if not torch.allclose(a, b, rtol=0, atol=rough * max(scale, 1e-3), equal_nan=False):
            same = (a == b) | ((a - b).abs() <= rough * max(scale, 1e-3))
            worst = float((a - b)[~same].abs().nan_to_num(1e9).max())
            return f"output {i} is wrong by {worst:.3g} where values reach {scale:.3g}"
    return ""


def run_trial(name: str, seed: int, number: int, spoil: float = 0.75) -> Verdict:
    """Trial ``number`` of a target: it depends on target, seed and number alone."""
    trial = f"{name}:{seed}:{number}"
    rng = random.Random(trial)
    torch.manual_seed(rng.randrange(2**31))
    call = TARGETS[name](rng)
    given = dict(call.kwargs)
    what, refuse, spoilt, kind = "valid", False, None, ""
    if rng.random() < spoil:
        open_to = [k for k in given if k not in set(call.fixed)]
        if not open_to or rng.random() < 0.04:
            spoilt, given["no_such_argument"], refuse = "no_such_argument", 1, True
            what = kind = "an unknown argument"
        else:
            spoilt = rng.choice(open_to)
            kind, given[spoilt], refuse = mutate(given[spoilt], rng)
            what = f"{spoilt}: {kind}"
    given = {k: v.value if isinstance(v, (Either, Name)) else v for k, v in given.items()}
    label = f"{call.label}: " if call.label else ""
    described = f"{label}{what} | " + ", ".join(f"{k}={show(v)}" for k, v in given.items())
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            result = call.fn(**given)
    except Exception as error:
        text = str(error)
        outcome = f"{type(error).__name__}: {text}"
        details = "".join(traceback.format_exception(error)[-6:])
        if spoilt is None:
            return Verdict(trial, described, outcome, "a valid call is refused", details)
        if not isinstance(error, REFUSALS):
            return Verdict(trial, described, outcome, "a bare internal error", details)
        if not deliberate(error):
            return Verdict(trial, described, outcome, "an internal error, not one raised at a door", details)
        words = _words(call) | {spoilt}
        if not any(re.search(rf"(?<![\w.]){re.escape(w)}(?!\w)", text) for w in words) or len(text) < 12:
            return Verdict(trial, described, outcome, "a refusal that names no argument", details)
        return Verdict(trial, described, "refused: " + outcome)
    described_result = show(result) if not hasattr(result, "_fields") else show(tuple(result))
    if kind in call.allows:
        return Verdict(trial, described, described_result)
    if refuse:
        return Verdict(trial, described, described_result, "a meaningless call is accepted")
    expected = None
    if call.oracle is not None:
        try:
            expected = call.oracle(**given)
        except Exception as error:
            if spoilt is None:
                wrong = f"the specification refuses a valid call ({type(error).__name__}: {error})"
                return Verdict(trial, described, described_result, wrong, traceback.format_exc())
            return Verdict(
                trial,
                described,
                described_result,
                f"accepted what the oracle refuses ({type(error).__name__}: {error})",
            )
    inputs = [v for v in given.values() if not isinstance(v, Junk)]
    if _finite(inputs) and not _finite(result) and (expected is None or _finite(expected)):
        return Verdict(trial, described, described_result, "NaN or inf from finite input")
    if call.sane is not None:
        try:
            call.sane(result, given)
        except AssertionError as error:
            return Verdict(trial, described, described_result, f"not sane: {error}")
        except Exception as error:
            wrong = f"accepted, but it breaks in use ({type(error).__name__}: {error})"
            return Verdict(trial, described, described_result, wrong, traceback.format_exc())
    if expected is not None:
        wrong = _compare(result, expected, call.tolerance)
        if wrong:
            return Verdict(trial, described, described_result, f"wrong number: {wrong}")
    return Verdict(trial, described, described_result)
