"""A plan that was not made for a call is refused by name before it is executed, by every mechanism that takes one."""

import re
from pathlib import Path

import pytest
import torch
from table import rows
from torch.utils import _pytree as pytree

import attnlib
from attnlib.check.subject import Subject
from attnlib.types import Plan

CASES = [case for case in rows() if ":" not in case.name and attnlib.create(case.name, **case.config).traits.needs_plan]


def numbers(change):
    """Change the whole numbers of a plan, whatever it is made of."""
    return lambda plan: pytree.tree_map(lambda t: change(t) if t is not None and t.dtype == torch.long else t, plan)


SPOILT = {
    "far beyond": numbers(lambda t: t + 999),
    "one beyond": numbers(lambda t: t + (999 - t) * (t == t.max())),
    "negative": numbers(lambda t: -t - 1),
    "floats": numbers(lambda t: t.float()),
    "more samples": numbers(lambda t: torch.cat([t, t, t])),
    "on meta": numbers(lambda t: t.to("meta")),
    "another kind": lambda plan: Plan("something", plan.tensors, plan.shape),
    "empty": lambda plan: Plan(plan.kind, {}, plan.shape),
    "other names": lambda plan: Plan(plan.kind, {f"{k}_": v for k, v in plan.tensors.items()}, plan.shape),
    "junk inside": lambda plan: Plan(plan.kind, {k: "junk" for k in plan.tensors}, plan.shape),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_spoilt_plan_is_refused_by_name(case, how):
    s = Subject(case)
    scene = s.scenes[0]
    m, x, context = s.fresh(), s.x(), s.context(scene)
    made = s.plan(m, x, context)
    s.y(m, x, context, scene, **made)
    with pytest.raises((TypeError, ValueError, KeyError), match="plan"):
        s.y(m, x, context, scene, **{**made, "plan": SPOILT[how](made["plan"])})


def test_every_plan_is_read_by_its_choices():
    """A plan's numbers reach no arithmetic unchecked: the sources read them by ``choices`` alone."""
    found = []
    for path in (Path(attnlib.__file__).parent / "nn").rglob("*.py"):
        found += [f"{path.name}: {hit}" for hit in re.findall(r"plan\[.*?\]|\.expect\(.*?\)\[.*?\]", path.read_text())]
    assert not found, found
