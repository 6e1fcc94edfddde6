"""Calls of mechanisms: constructors, forward, step, plan; the registry; converters of released weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import math
import random
import re
from typing import Any

import torch
from torch import Tensor, nn

import attnlib
from attnlib import masks, ops
from attnlib.check import Case
from attnlib.grids import Layout
from attnlib.nn.base import Mechanism
from attnlib.nn.registry import find
from attnlib.types import Output

from .engine import REFUSALS, Call, Either, deliberate, target
from .mutate import Name

#: Settings that count something, and must be at least 1 where they are integers.
COUNTS = re.compile(r"^(dim|head_dim|num_heads|num_kv_heads|num_groups|num_agents|kernel_size|block_size)$")


@functools.cache
def rows() -> list[Case]:
    table = importlib.import_module(f"{__package__.rpartition('.')[0]}.table".lstrip("."))
    return [case for case in table.rows() if ":" not in case.name and issubclass(find(case.name), Mechanism)]


def signature(cls: type) -> dict[str, Any]:
    """Settings of a class with their defaults, also of the bases to which it hands what it does not name."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module or "__init__" not in base.__dict__:
            continue
        parameters = inspect.signature(base.__dict__["__init__"]).parameters.values()
        for p in parameters:
            if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


@functools.cache
def settings(index: int) -> dict[str, Any]:
    """The row's settings, and every default that may be said aloud."""
    case = rows()[index]
    cls = find(case.name)
    full = dict(case.config)
    for name, default in signature(cls).items():
        if (
            name in full
            or default is inspect.Parameter.empty
            or not isinstance(default, (int, float, str, tuple, type(None)))
        ):
            continue
        with contextlib.suppress(Exception):
            cls(**{**full, name: default})
            full[name] = default
    return full


@functools.cache
def built(index: int, double: bool = False) -> Any:
    if double:
        return copy.deepcopy(built(index)).double()
    torch.manual_seed(index)
    case = rows()[index]
    m = find(case.name)(**case.config).eval()
    with torch.no_grad():
        for p in m.parameters():
            if not bool(p.any()):
                p.copy_(torch.randn_like(p) * 0.1)  # what starts as zero would hide faults
    return m


#: Read a map as context, and nothing flat.
READ_MAPS = {"window-attention-upsample"}


def scene(index: int, rng: random.Random) -> tuple[Any, Tensor, Tensor | None]:
    """The mechanism, tokens and what they read."""
    case, m = rows()[index], built(index)
    cross = not any(p.endswith("self") for p in m.traits.patterns)
    cross = cross or (any(p.endswith("cross") for p in m.traits.patterns) and rng.random() < 0.2)
    b = rng.randint(1, 3)
    context = None
    if cross:
        grid = case.context_grid or ((3, 4) if case.name in READ_MAPS else (7,))
        context = torch.randn(b, *grid, m.context_dim)
    return m, torch.randn(b, *case.grid, case.config["dim"]), context


def _carry(case: Case, x: Tensor) -> dict[str, Any]:
    return dict(case.extras(x)) if case.extras is not None else {}


@target("nn.forward", weight=8)
def forward(rng: random.Random) -> Call:
    index = rng.randrange(len(rows()))
    case = rows()[index]
    m, x, context = scene(index, rng)
    traits, b, n = m.traits, x.shape[0], math.prod(x.shape[1:-1])
    more = _carry(case, x)
    kwargs: dict[str, Any] = dict(
        x=x, context=context, layout=None, valid=None, context_valid=None, mask=None, plan=None
    )
    kwargs |= dict(state=None, carry=Either(more.pop("carry", None)) if traits.carries else None, returns=())
    kwargs |= {k: Either(v) for k, v in more.items()}
    if rng.random() < 0.4:
        kwargs["valid"] = torch.rand(x.shape[:-1]) > 0.3
        if context is not None:
            kwargs["context_valid"] = torch.rand(context.shape[:-1]) > 0.3
    if traits.mask and rng.random() < 0.4:
        k = n if context is None else math.prod(context.shape[1:-1])
        kwargs["mask"] = rng.choice([masks.sliding_window(3), torch.rand(n, k) > 0.3, torch.rand(b, n, k) > 0.3])
    if traits.layout and case.layout is not None and rng.random() < 0.4 and context is None:
        kwargs |= dict(layout=case.layout, valid=None, mask=None, x=torch.randn(b, len(case.layout), x.shape[-1]))
    if traits.streaming and context is None and kwargs["layout"] is None and rng.random() < 0.5:
        first = m(x, valid=kwargs["valid"], returns=("state",))
        kwargs |= dict(state=first.state, mask=None)
    if traits.needs_plan and rng.random() < 0.6:
        with contextlib.suppress(*REFUSALS):
            asked = {
                k: v.value if isinstance(v, Either) else v for k, v in kwargs.items() if k not in ("plan", "returns")
            }
            kwargs["plan"] = m.plan(**asked)
    possible = dict(
        state=traits.streaming and context is None,
        carry=traits.carries,
        weights=traits.weights,
        losses=bool(traits.losses),
    )
    wanted = [e for e, yes in possible.items() if yes]
    if wanted and rng.random() < 0.4:
        kwargs["returns"] = tuple(rng.sample(wanted, 1))
    choices_free = not traits.needs_plan or kwargs["plan"] is not None

    def run(**given: Any) -> Any:
        with torch.no_grad():
            out = m(**given)
        return out.y if isinstance(out, Output) else out

    def sane(out: Any, given: dict[str, Any]) -> None:
        x, mask = given["x"], given["mask"]
        assert isinstance(out, Tensor) and out.shape == x.shape, f"y has shape {tuple(out.shape)}, x {tuple(x.shape)}"
        assert out.dtype == x.dtype, f"y is {out.dtype}, x {x.dtype}"
        if isinstance(mask, Tensor):
            source = x if given["context"] is None else given["context"]
            size = (math.prod(x.shape[1:-1]), math.prod(source.shape[1:-1]))
            assert mask.shape[-2:] == size, f"a mask of {tuple(mask.shape)} is taken for {size} pairs"

    def oracle(**given: Any) -> Any:
        def lift(v: Any) -> Any:
            return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v

        deep = built(index, True)
        given = {k: lift(v) for k, v in given.items()}
        if given["state"] is not None:
            given["state"] = given["state"].map(lift)
        with torch.no_grad(), ops.use_backend("eager"):
            out = deep(**given)
        return out.y if isinstance(out, Output) else out

    return Call(
        run, kwargs, oracle if choices_free else None, sane=sane, names=("returns", case.name, "head_dim", "dim"),
        tolerance=2e-4,
    )  # fmt: skip


#: Settings that name a segment of a layout.
SEGMENTS = ("image",)


def use(m: Any, case: Case) -> None:
    """A mechanism that was built must run, or say at its door why it does not."""
    width = getattr(m, "dim", case.config["dim"])
    for name in SEGMENTS:
        if isinstance(chosen := getattr(m, name, None), str):
            found = Layout(((chosen, (2, 3)), ("rest", 3)))
            assert m(torch.randn(1, 9, width), layout=found).shape == (1, 9, width)
            with contextlib.suppress(ValueError):
                m(torch.randn(1, 9, width), layout=Layout((("else", (2, 3)), ("rest", 3))))
                raise AssertionError(f"{name}={chosen!r} is no segment of the layout, which nobody says")
    x = torch.randn(2, *case.grid, width)
    context = None
    if isinstance(m, Mechanism) and not any(p.endswith("self") for p in m.traits.patterns):
        context = torch.randn(2, *(case.context_grid or (7,)), m.context_dim)
    try:
        with torch.no_grad():
            y = m(x, context, **_carry(case, x)) if context is not None else m(x, **_carry(case, x))
    except REFUSALS as error:
        if deliberate(error):
            return
        raise
    y = y.y if isinstance(y, Output) else y
    assert y.shape == x.shape, f"y has shape {tuple(y.shape)}, x {tuple(x.shape)}"
    assert bool(torch.isfinite(y).all()), "y is not finite"


@target("nn.init", weight=8)
def init(rng: random.Random) -> Call:
    index = rng.randrange(len(rows()))
    case = rows()[index]
    cls = find(case.name)

    def sane(m: Any, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if "drop" in name and isinstance(value, (int, float)):
                assert 0 <= value <= 1, f"{name}={value} is no probability"
            if COUNTS.match(name) and isinstance(value, int):
                assert value >= (name not in m.zero_is_off), f"{name}={value} counts nothing"
        use(m.eval(), case)

    kwargs = {k: v if not callable(v) and not isinstance(v, dict) else Either(v) for k, v in settings(index).items()}
    kwargs |= {k: Name(kwargs[k]) for k in SEGMENTS if k in kwargs}
    return Call(cls, kwargs, sane=sane, names=(*signature(cls), "num_dense"))


@target("nn.step", weight=3)
def step(rng: random.Random) -> Call:
    streams = [i for i in range(len(rows())) if built(i).traits.streaming]
    index = rng.choice(streams)
    m, case = built(index), rows()[index]
    b = rng.randint(1, 3)
    x = torch.randn(b, 5, case.config["dim"])
    with torch.no_grad():
        state = m.step(x[:, :4])[1]
        whole = built(index, True)(x.double())

    def run(x_t: Any, state: Any) -> Any:
        with torch.no_grad():
            return m.step(x_t, state)[0]

    def oracle(x_t: Any, state: Any) -> Any:
        if x_t is x_last and state is first:
            return whole[:, 4:]
        deep = built(index, True)
        with torch.no_grad(), ops.use_backend("eager"):
            return deep.step(
                x_t.double(), None if state is None else state.map(lambda t: t.double() if t.is_floating_point() else t)
            )[0]

    x_last, first = x[:, 4:], state
    return Call(
        run, dict(x_t=x_last, state=state), oracle, names=("x", "state", "head_dim", "dim"), tolerance=5e-4
    )  # fmt: skip


@target("nn.step.strangers")
def strangers(rng: random.Random) -> Call:
    """A state of another mechanism or another configuration must not be continued in silence."""
    streams = [i for i in range(len(rows())) if built(i).traits.streaming]
    index, other = rng.sample(streams, 2)
    m = built(index)

    def run(state: Any, x_t: Any) -> Any:
        with torch.no_grad():
            return m.step(x_t, state)[0]

    def of(i: int) -> Any:
        with torch.no_grad():
            return built(i).step(torch.randn(2, 3, rows()[i].config["dim"]))[1]

    own = of(index)
    foreign = of(other)
    alike = rows()[index].name == rows()[other].name
    x_t = torch.randn(2, 1, rows()[index].config["dim"])
    if alike:
        return Call(run, dict(state=own, x_t=x_t), names=("x",), fixed=("state", "x_t"))

    def must_refuse(state: Any, x_t: Any) -> Any:
        try:
            run(state, x_t)
        except REFUSALS as error:
            if not deliberate(error) or "state" not in str(error):
                raise RuntimeError(f"a stranger's state: {type(error).__name__}: {error}") from error
            return torch.zeros(1)
        raise RuntimeError(f"{rows()[index].id} continues a state of {rows()[other].id}")

    return Call(must_refuse, dict(state=foreign, x_t=x_t), fixed=("state", "x_t"))


@target("nn.create")
def create(rng: random.Random) -> Call:
    index = rng.randrange(len(rows()))
    case = rows()[index]
    return Call(
        attnlib.create, dict(name=case.name, **case.config), sane=lambda m, g: use(m.eval(), case),
        names=(*signature(find(case.name)), "mechanism"),
    )  # fmt: skip


@target("nn.convert_state_dict")
def convert(rng: random.Random) -> Call:
    known = sorted({c.name for c in rows() if hasattr(find(c.name), "convert_state_dict")})
    name = rng.choice(known)

    def run(name: Any, state_dict: Any) -> Any:
        return attnlib.convert_state_dict(name, state_dict)

    def sane(out: Any, given: dict[str, Any]) -> None:
        raise AssertionError("keys that nobody knows are taken")

    strange = rng.choice(
        [
            {"nobody.knows.weight": torch.zeros(2, 2)},
            [("weight", torch.zeros(2))],
            None,
            3,
            {"x": 1.0},
            {3: torch.zeros(1)},
        ]
    )

    def must_refuse(name: Any, state_dict: Any) -> Any:
        try:
            out = run(name, state_dict)
        except REFUSALS as error:
            if not deliberate(error):
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            return torch.zeros(1)
        raise RuntimeError(f"converted to {sorted(map(str, out))[:4]}")

    return Call(must_refuse, dict(name=name, state_dict=strange), fixed=("name", "state_dict"))


@target("nn.set_progress")
def set_progress(rng: random.Random) -> Call:
    index = rng.randrange(len(rows()))
    m = copy.deepcopy(built(index))
    return Call(m.set_progress, dict(progress=rng.random()), sane=lambda out, g: None)
