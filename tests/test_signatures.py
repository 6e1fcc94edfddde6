"""Nothing swallows arguments: every call of every mechanism says by name what it does not know."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from table import rows

import attnlib
from attnlib.nn.base import CALL, Mechanism
from attnlib.nn.registry import find
from attnlib.types import State

ROOT = Path(attnlib.__file__).parent
ONE_EACH = list({case.name: case for case in rows() if ":" not in case.name}.values())


def test_no_catch_all_in_the_sources():
    """No function takes what it was given by mistake into a ``**_``; a fake kernel gets what torch gives it."""
    found = []
    for folder in ("nn", "models", "ops"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            lines = text.splitlines()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and node.args.kwarg:
                    line = lines[node.args.kwarg.lineno - 1]
                    if node.args.kwarg.arg.startswith("_") and "no-untyped-def" not in line:
                        found.append(f"{path.relative_to(ROOT)}:{node.args.kwarg.lineno}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", attnlib.list_mechanisms())
def test_every_method_of_the_call_names_what_it_takes(name):
    for cls in find(name).__mro__:
        if not issubclass(cls, Mechanism) or cls is Mechanism:
            continue
        for method in ("mix", "make_plan"):
            if method in vars(cls):
                parameters = inspect.signature(vars(cls)[method]).parameters.values()
                assert not any(p.kind is p.VAR_KEYWORD for p in parameters), f"{cls.__name__}.{method}"
                assert {p.name for p in parameters} <= {"self", "x", *CALL}, f"{cls.__name__}.{method}"


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_an_unknown_argument_is_refused_by_name(case):
    module = attnlib.create(case.name, **case.config).eval()
    x = torch.randn(1, *case.grid, case.config["dim"])
    for call in (module.forward, module.mix, module.plan, module.step):
        with pytest.raises(TypeError, match="unexpected keyword argument 'vaild'"):
            call(x, vaild=torch.ones(x.shape[:-1], dtype=torch.bool))


STREAMING = [
    case for case in rows() if ":" not in case.name and attnlib.create(case.name, **case.config).traits.streaming
]


@pytest.mark.parametrize("case", STREAMING, ids=lambda case: case.id)
def test_a_state_that_cannot_be_continued_is_refused(case):
    module = attnlib.create(case.name, **case.config).eval()
    x = torch.randn(2, *case.grid, case.config["dim"])
    _, state = module.step(x)
    foreign = attnlib.create("softmax-attention", dim=8, num_heads=1, causal=True)
    for wrong, says in (
        ({}, "state must be"),
        (State({}), "state"),
        (state.select(torch.tensor([0])), "samples"),
        (foreign.step(torch.randn(2, 3, 8))[1], "state"),
        (State({"nothing": torch.zeros(2)}), "state"),
        (State({f"{name}_": value for name, value in state.tensors.items()}), "state"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            module.step(x, wrong)
        with pytest.raises((TypeError, ValueError), match=says):
            module(x, state=wrong)  # also where the new state, for which it is read, is not asked for
    y, anonymous = module(x, state=state), State(state.tensors)
    torch.testing.assert_close(module(x, state=anonymous), y, rtol=0, atol=0)


def test_a_context_has_no_state():
    module = attnlib.create("softmax-attention", dim=8, num_heads=2, causal=True)
    x, context = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    _, state = module.step(x)
    with pytest.raises(ValueError, match="state was given with a context"):
        module(x, context, state=state)
    with pytest.raises(ValueError, match="cannot return 'state'"):
        module(x, context, returns=("state",))
