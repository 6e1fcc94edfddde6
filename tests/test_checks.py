"""What is checked at a door: each refusal names the argument, what was given and what is possible."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnlib import checks as C

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
