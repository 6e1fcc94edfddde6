"""Settings that cannot be are refused at the door, each by its name: no internal error, nothing meaningless built."""

import inspect

import numpy as np
import pytest
import torch
from table import rows

from attnlib.check.subject import Subject
from attnlib.nn.registry import find

ONE_EACH = list({case.name: case for case in rows() if ":" not in case.name}.values())
BAD = (-1, 1.5, float("nan"), "x", "", True, [1.5], object())


def settings(cls) -> dict[str, str]:
    """Name and annotation of everything that a class takes, its base classes' settings included."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        for p in parameters:
            if p.kind is not p.VAR_KEYWORD and p.name != "self":
                found.setdefault(p.name, str(p.annotation))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_setting_is_refused_by_its_name_or_means_something(case):
    cls, subject = find(case.name), Subject(case)
    scene = subject.scene
    x, context = subject.x(dtype=torch.float32), subject.context(scene, dtype=torch.float32)
    # What a row sets may be a setting of a part of the mechanism.
    in_rows = {name: "" for row in rows() if row.name == case.name for name in row.config}
    for name, annotation in {**in_rows, **settings(cls)}.items():
        for bad in BAD:
            if bad is True and ("bool" in annotation or case.config.get(name) is False):
                continue  # a setting like another
            try:
                module = cls(**{**case.config, name: bad}).eval()
            except (TypeError, ValueError) as error:
                assert name in str(error), f"{name}={bad!r}: {error}"
                continue
            try:
                y = subject.y(module, x, context, scene)
            except (TypeError, ValueError) as error:
                assert name in str(error), f"{name}={bad!r}, when called: {error}"
            else:
                assert torch.isfinite(y).all(), f"{name}={bad!r} gives no numbers"


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_numbers_of_numpy_are_numbers(case):
    """They go into shapes and traits as Python's own."""

    def numpy(value):
        if isinstance(value, tuple):
            return tuple(map(numpy, value))
        kind = {int: np.int64, float: np.float64}.get(type(value))
        return kind(value) if kind else value

    cls = find(case.name)
    ours, theirs = (cls(**config) for config in (case.config, {k: numpy(v) for k, v in case.config.items()}))
    assert ours.traits == theirs.traits
    for name, value in vars(theirs).items():
        assert not isinstance(value, np.generic), f"{name} stays a number of numpy"


#: Settings that belong to a pair, of which the other one is named.
MEANT: dict[tuple[str, str], tuple[str, ...]] = {("maxvit", "grid_size"): ("window_size",)}
