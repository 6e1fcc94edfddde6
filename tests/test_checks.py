"""What is checked at a door: each refusal names the argument, what was given and what is possible."""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnlib
from attnlib import checks as C
from attnlib.steer.diffusion.a_star import AStar

T = torch.zeros(2, 3)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "check, value, kw, error",
    [
        (C.check_int, True, {}, TypeError),
        (C.check_int, 2.0, {}, TypeError),
        (C.check_int, "2", {}, TypeError),
        (C.check_int, None, {}, TypeError),
        (C.check_int, torch.tensor(2), {}, TypeError),
        (C.check_int, np.float64(2), {}, TypeError),
        (C.check_int, 0, dict(least=1), ValueError),
        (C.check_int, 9, dict(least=1, most=8), ValueError),
        (C.check_real, True, {}, TypeError),
        (C.check_real, "1", {}, TypeError),
        (C.check_real, None, {}, TypeError),
        (C.check_real, [1.0], {}, TypeError),
        (C.check_real, torch.tensor(1.0), {}, TypeError),
        (C.check_real, NAN, dict(finite=False), ValueError),
        (C.check_real, INF, {}, ValueError),
        (C.check_real, -INF, {}, ValueError),
        (C.check_real, 0, dict(above=0), ValueError),
        (C.check_real, -0.1, dict(least=0), ValueError),
        (C.check_real, 1.0, dict(least=0, below=1), ValueError),
        (C.check_real, 1.1, dict(least=0, most=1), ValueError),
        (C.check_flag, 1, {}, TypeError),
        (C.check_flag, None, {}, TypeError),
        (C.check_flag, torch.tensor(True), {}, TypeError),
        (C.check_ints, 3, {}, TypeError),
        (C.check_ints, "33", {}, TypeError),
        (C.check_ints, (1, 2.5), {}, TypeError),
        (C.check_ints, (1, 0), dict(least=1), ValueError),
        (C.check_grid, (1, 2, 3, 4), {}, ValueError),
        (C.check_grid, (), {}, ValueError),
        (C.check_grid, (0, 2), {}, ValueError),
        (C.check_tensor, [1], {}, TypeError),
        (C.check_float, torch.zeros(2, dtype=torch.long), {}, TypeError),
        (C.check_float, torch.zeros(2, dtype=torch.complex64), {}, TypeError),
        (C.check_whole, torch.zeros(2), {}, TypeError),
        (C.check_whole, torch.zeros(2, dtype=torch.bool), {}, TypeError),
        (C.check_rank, T, dict(ranks=3, layout="(B, N, C)"), ValueError),
        (C.check_rank, [[1]], dict(ranks=2, layout="(B, N)"), TypeError),
        (C.check_axes, T, dict(B=2, N=4), ValueError),
        (C.check_axes, T, dict(B=2, N=3, C=None), ValueError),
        (C.check_axes, 1, dict(B=2), TypeError),
        (C.check_width, T, dict(width=4), ValueError),
        (C.check_width, torch.zeros(()), dict(width=4), ValueError),
        (C.check_valid, T, dict(shape=(2, 3)), TypeError),
        (C.check_valid, T.bool(), dict(shape=(3, 2)), ValueError),
        (C.check_choice, "a", dict(choices=["b"]), ValueError),
        (C.check_choice, T, dict(choices=["b"]), ValueError),
        (C.check_type, {}, dict(kind=str), TypeError),
        (C.check_divides, 5, dict(whole_name="whole", whole=12), ValueError),
        (C.check_divides, 2.0, dict(whole_name="whole", whole=12), TypeError),
        (C.check_divides, 0, dict(whole_name="whole", whole=12), ValueError),
        (C.check_index, torch.tensor([0, 5]), dict(shape=(2,), count=5, what="token"), ValueError),
        (C.check_index, torch.tensor([-1, 4]), dict(shape=None, count=5, what="token"), ValueError),
        (C.check_index, torch.tensor([0.0]), dict(shape=None, count=5, what="token"), TypeError),
        (C.check_index, [0], dict(shape=None, count=5, what="token"), TypeError),
        (C.check_serves, 3, dict(batch=2), ValueError),
        (C.to_tuple, (1, 2), dict(rank=3), ValueError),
        (C.to_tuple, "ab", dict(rank=2), TypeError),
        (C.to_tuple, None, dict(rank=2), TypeError),
        (C.to_list, 3, {}, TypeError),
        (C.check_template, 3, dict(fields=["a"]), TypeError),
        (C.check_template, "{b}", dict(fields=["a"]), ValueError),
        (C.check_template, "{}", dict(fields=["a"]), ValueError),
        (C.check_template, "{a", dict(fields=["a"]), ValueError),
        (C.check_template, "all", dict(fields=["a"], needed=["a"]), ValueError),
    ],
)
def test_refusals_name_the_argument_and_what_was_given(check, value, kw, error):
    with pytest.raises(error) as caught:
        check("thing", value, **kw)
    assert type(caught.value) is error
    assert "thing" in str(caught.value)
    given: Any = value.shape if isinstance(value, torch.Tensor) and value.dim() else value
    if isinstance(given, (int, float, str)) and check is not C.check_axes:
        assert str(given) in str(caught.value)


@pytest.mark.parametrize(
    "check, value, kw",
    [
        (C.check_int, 3, dict(least=3, most=3)),
        (C.check_int, np.int32(3), {}),
        (C.check_real, 1, {}),
        (C.check_real, np.float32(0.5), {}),
        (C.check_real, INF, dict(finite=False)),
        (C.check_real, 0.0, dict(least=0, below=1)),
        (C.check_flag, False, {}),
        (C.check_ints, [1, np.int64(2)], {}),
        (C.check_grid, [4, 4], {}),
        (C.check_axes, T, dict(B=2, N=None)),
        (C.check_index, torch.zeros(0, dtype=torch.long), dict(shape=None, count=0, what="token")),
        (C.check_index, torch.zeros(2, dtype=torch.int32), dict(shape=(2,), count=1, what="token")),
        (C.check_serves, 1, dict(batch=5)),
        (C.check_serves, 5, dict(batch=5)),
        (C.check_divides, 3, dict(whole_name="whole", whole=12)),
    ],
)
def test_what_is_possible_passes(check, value, kw):
    result = check("thing", value, **kw)
    if check in (C.check_int, C.check_real):
        assert result == value and isinstance(result, (int, float))
    elif check in (C.check_ints, C.check_grid):
        assert result == tuple(value) and all(type(n) is int for n in result)


@pytest.mark.parametrize(
    "check, error, tensors, words",
    [
        (C.check_dtype, TypeError, dict(q=T, k=T.double()), "q has torch.float32, k has torch.float64"),
        (C.check_dtype, TypeError, dict(q=T.long(), k=T.long()), "floating"),
        (C.check_device, ValueError, dict(q=T, k=T, v=T.to("meta")), "q on cpu, k on cpu, v on meta"),
        (C.check_batch, ValueError, dict(q=T, k=T[:1]), "q has 2, k has 1"),
    ],
)
def test_tensors_that_do_not_belong_together(check, error, tensors, words):
    with pytest.raises(error, match=words):
        check(**tensors)
    check(q=T, k=T, v=None)


def test_checks_trace_with_free_sizes():
    def f(x, p: float):
        C.check_axes("x", x, B=None, N=None)
        C.check_int("n", x.shape[0], least=1)
        C.check_divides("heads", 2, "channels", x.shape[1])
        C.check_index("index", torch.arange(x.shape[0]), (x.shape[0],), 3, "row")
        C.check_dtype(x=x, y=x)
        C.check_device(x=x, y=x)
        C.check_batch(x=x, y=x)
        return x * C.check_real("p", p, least=0, below=math.inf)

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=True)
    for n in (3, 5, 7):
        x = torch.randn(n, 4)
        assert torch.equal(compiled(x, 0.5), x * 0.5)


# ---- settings, by what a constructor's annotations say


class Base:
    @C.checked
    def __init__(self, dim: int, attn_drop: float = 0.0, causal: bool = False, reach: float = INF):
        self.dim = dim


class Derived(Base):
    @C.checked
    def __init__(
        self,
        name: str,
        sides: int | Sequence[int] = 1,
        map: Tensor | None = None,
        rule: Callable[[int], int] | None = None,
        **settings: Any,
    ):
        super().__init__(**settings)


@pytest.mark.parametrize(
    "kw, error, words",
    [
        (dict(dim=True), TypeError, "dim must be an integer, got True"),
        (dict(dim=2.5), TypeError, "dim.*2.5"),
        (dict(dim=None), TypeError, "dim.*None"),
        (dict(attn_drop=1.5), ValueError, "attn_drop.*1.5"),
        (dict(attn_drop=NAN), ValueError, "attn_drop.*nan"),
        (dict(attn_drop="0.1"), TypeError, "attn_drop.*'0.1'"),
        (dict(causal=1), TypeError, "causal must be True or False, got 1"),
        (dict(causal=T), TypeError, "causal.*shape"),
        (dict(name=3), TypeError, "name must be a string, got 3"),
        (dict(sides="33"), TypeError, "sides.*'33'"),
        (dict(sides=(2, 1.5)), TypeError, r"sides.*\(2, 1.5\)"),
        (dict(map=[1]), TypeError, r"map must be Tensor or None, got \[1\]"),
        (dict(rule=3), TypeError, "rule.*3"),
        (dict(no_such=3), TypeError, "no_such"),
    ],
)
def test_settings_are_checked_by_their_annotations(kw, error, words):
    with pytest.raises(error, match=words):
        Derived(**{"name": "a", "dim": 4, **kw})
    assert Derived("a", sides=[1, np.int64(2)], map=T, rule=abs, dim=np.int64(4), attn_drop=0, reach=INF).dim == 4


# ---- shaped


@C.shaped(x="float (B, N)", w="bool (B or 1, N) | (N)", y="alike (..., D)", z="alike (..., D)", much="infinite")
def mean(x: Tensor, w: Tensor, y: Tensor | float | None = None, z: Tensor | None = None, much: float = 0.0,
         how: str = "sum", times: int = 1) -> int:  # fmt: skip
    return times


W = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    "given",
    [
        dict(x=T, w=W), dict(x=T, w=W[None]), dict(x=T, w=W.expand(2, 3)), dict(x=T, w=W, y=2.0), dict(x=T, w=W, y=T),
        dict(x=T, w=W, y=T, z=T + 1), dict(x=T, w=W, much=INF), dict(x=T, w=W, times=np.int64(3)),
    ],
)  # fmt: skip
def test_what_belongs_together_passes(given):
    assert mean(**given) == given.get("times", 1) and type(mean(**given)) is int


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(x=[1.0], w=W), TypeError, "x must be a floating-point tensor"),
        (dict(x=T.long(), w=W), TypeError, "x must be a floating-point tensor"),
        (dict(x=T, w=T), TypeError, "w must be a boolean tensor"),
        (dict(x=T[0], w=W), ValueError, r"x must have shape \(B, N\), got \(3,\)"),
        (dict(x=T, w=W.expand(3, 3)), ValueError, r"w must have shape \(B=2 or 1, N=3\) or \(N=3\), got \(3, 3\)"),
        (dict(x=T, w=W[:2]), ValueError, "w must have shape"),
        (dict(x=T, w=W, y="much"), TypeError, "y must be"),
        (dict(x=T, w=W, y=T, z=T[:, :2]), ValueError, "z must have shape"),
        (dict(x=T, w=W, y=T, z=T.double()), TypeError, "y and z must share one floating dtype"),
        (dict(x=T, w=W.to("meta")), ValueError, "x and w must lie on one device"),
        (dict(x=T, w=W, much=NAN), ValueError, "much must be"),
        (dict(x=T, w=W, much=-INF), ValueError, "much must be"),
        (dict(x=T, w=W, how=3), TypeError, "how must be a string"),
        (dict(x=T, w=W, times=1.5), TypeError, "times must be an integer"),
        (dict(x=T), TypeError, "missing a required argument: 'w'"),
        (dict(x=T, w=W, wieghts=T), TypeError, "possible are the arguments"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(given, error, words):
    with pytest.raises(error, match=words):
        mean(**given)


def test_a_misspelt_setting_is_told_what_the_class_and_its_bases_take():
    for build, own, inherited in (
        (lambda: AStar(("a", "b"), treshold=0.2), "threshold", "step_size"),
        (lambda: attnlib.create("sigmoid-attention", dim=8, biass=True), "attn_bias", "num_kv_heads"),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument") as raised:
            build()
        assert f"'{own}'" in str(raised.value) and f"'{inherited}'" in str(raised.value)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ([torch.nn.Linear(1, 1)], TypeError, "maps must be a mapping from names to Linear, got"),
        ({"a": torch.nn.Linear(1, 1), "b": 3}, TypeError, r"maps\['b'\] must be Linear, got 3"),
        ({}, ValueError, "maps is empty: nothing would act"),
    ],
)
def test_what_is_named_must_be_of_its_class(value, error, words):
    C.check_named("maps", {"a": torch.nn.Linear(1, 1)}, torch.nn.Linear, "nothing would act")
    with pytest.raises(error, match=words):
        C.check_named("maps", value, torch.nn.Linear, "nothing would act")


def shaped_functions():
    """Every function of the library with such a door whose arguments are tensors or may be left out."""
    found = {}
    for module in pkgutil.walk_packages(attnlib.__path__, "attnlib."):
        if module.name.split(".")[1] in ("steer", "reduce", "cache", "look", "hooks"):
            for name, value in vars(importlib.import_module(module.name)).items():
                if shapes := getattr(value, "shapes", None):
                    parameters = inspect.signature(value).parameters.values()
                    if all(p.name in shapes or p.default is not p.empty for p in parameters):
                        found[name] = value
    return found


FUNCTIONS = shaped_functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_techniques_refuse_what_is_no_tensor_by_name(name):
    function, sizes = FUNCTIONS[name], {}
    for argument, text in function.shapes.items():
        assert " " not in text.strip() or "(" in text, f"{argument}: {text!r}"
    for argument in function.shapes:
        if function.shapes[argument] == "infinite":
            continue
        given = {argument: object()}
        for other, text in function.shapes.items():
            if other == argument or text == "infinite":
                continue
            kind, _, shape = text.partition(" ")
            axes = [a.split(" or ")[0].strip() for a in shape.split("|")[0].strip("() ").split(",") if a.strip()]
            t = torch.ones([int(a) if a.isdigit() else sizes.setdefault(a, 4) for a in axes if a != "..."])
            given[other] = t.bool() if kind == "bool" else t.long() if kind == "whole" else t
        with pytest.raises(TypeError, match=argument):
            function(**given)


def test_a_misspelt_name_of_a_long_list_is_guessed():
    names = ["SnapKV", "KeyNorm", "Recency", "LastQuery", "ValueNorm"]
    for given, near in (("snapkv", "; did you mean 'SnapKV'?"), ("KeyNrom", "; did you mean 'KeyNorm'?"), ("zzz", "")):
        with pytest.raises(ValueError) as told:
            C.check_choice("with", given, names)
        assert str(told.value) == f"with={given!r} is not possible; choose one of {names}{near}"
    with pytest.raises(ValueError, match=r"choose one of \['ab', 'b'\]$"):  # a short list says it by itself
        C.check_choice("with", "aB", ["ab", "b"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("causal", [False, True])
def test_sizes_are_whole_numbers_under_jit_trace_which_holds_them_as_tensors(causal):
    mixer, x = attnlib.create("softmax-attention", dim=8, num_heads=2, causal=causal).eval(), torch.randn(2, 5, 8)
    torch.testing.assert_close(torch.jit.trace(mixer, x, check_trace=False)(x), mixer(x))
    with pytest.raises(TypeError, match="n must be an integer"):
        C.check_int("n", torch.tensor(3))
