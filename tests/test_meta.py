"""On the meta device nothing is made elsewhere by accident: every mechanism, operator and model, forward and backward.

Tensors there hold no numbers, so that whatever computes on the CPU, or waits for a device to look at a number, fails or
is seen here; on a GPU it would only be slow.
"""

import re
import sys
from contextlib import nullcontext

import pytest
import torch
from table import rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from attnlib.bench.speed import gpu
from attnlib.check.kit import subject_makers
from attnlib.models.build import create_model, list_models, model_entry

#: Functions that make tables of token numbers on the CPU on purpose, where they are cut and looked at.
TABLES = {"route", "block_order", "window_partition", "_cut"}
#: Rows and models that choose by numbers, which meta tensors do not have, and what they say.
CHOOSES = {
    "s2-attention-dkernel": "must hold values that can be counted",
    "dynamic_token_routing": "Tensor.item() cannot be called on meta tensors",
}

CASES = [pytest.param(row, id=row.id) for row in rows()]


class Elsewhere(TorchDispatchMode):
    """Keeps what is made outside of meta: tensors with numbers of more than one element that are no tables."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not t.is_meta and t.numel() > 1 and not _tabled():
                self.found.append(f"{func} of {tuple(t.shape)}, {t.dtype}")
        return out


def _tabled() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in TABLES and "attnlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def meta(value):
    return tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, value)


def chooses(name: str):
    """Expects what :data:`CHOOSES` says of a row or model, and nothing of others."""
    said = next((re.escape(words) for start, words in CHOOSES.items() if name.startswith(start)), None)
    return nullcontext() if said is None else pytest.raises((ValueError, RuntimeError), match=said)


def forward_and_back(s, m: nn.Module, x: Tensor, context, scene, plan) -> None:
    x = x.requires_grad_()
    with Elsewhere() as seen:
        y = s.y(m, x, context, scene, **plan)
        y.sum().backward()
    assert y.is_meta and s.fits(y, x) and not seen.found, seen.found[:5]
    assert all(p.grad is None or p.grad.is_meta for p in m.parameters())


@pytest.mark.parametrize("case", CASES)
def test_mechanisms(case) -> None:
    for make in subject_makers(case, None, None, None, None, {}):
        s = make(None)
        with torch.device("meta"):
            m = s.build()
        wrong = [n for n, t in [*m.named_parameters(), *m.named_buffers()] if not t.is_meta]
        assert not wrong, wrong
        for scene in s.scenes:
            x, context = s.x(dtype=torch.float32), s.context(scene, dtype=torch.float32)
            plan = meta(s.plan(s.fresh(torch.float32), x, context)) if s.claims.needs_plan else {}
            for device in ("cpu", "meta"):  # by default
                with torch.device(device), chooses(case.id):
                    forward_and_back(s, m, meta(x), meta(context), scene, plan)


@pytest.mark.parametrize("name", gpu.problems(21))
@pytest.mark.parametrize("default", [False, True], ids=["explicit", "default"])
def test_operators(name, default) -> None:
    problem = gpu.problems(21)[name]
    inputs = [torch.randn(s, device="meta", requires_grad=True) for s in problem.shapes]
    with torch.device("meta" if default else "cpu"), Elsewhere() as seen:
        out = gpu._outcome(problem.call(*inputs))
        grads = torch.autograd.grad(out, inputs, torch.empty_like(out), allow_unused=True)
    assert out.is_meta and all(g is None or g.is_meta for g in grads) and not seen.found, seen.found[:5]


def smallest() -> list[str]:
    """The smallest released size of every family of classifiers; others take more than images."""
    entries: dict[str, list] = {}
    for entry in map(model_entry, list_models()):
        if entry.task == "classify":
            entries.setdefault(entry.family, []).append(entry)
    size = lambda e: (e.params or 1e12, e.img_size, "tiny" not in e.name, e.name)  # noqa: E731
    return [min(found, key=size).name for found in entries.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", smallest())
def test_models(name) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=7).eval()
        size = model_entry(name).img_size
        image = torch.empty(2, 3, size, size)
    wrong = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if not t.is_meta]
    assert not wrong, wrong[:5]
    with Elsewhere() as seen, chooses(name):
        out = model(image)
    if any(name.startswith(start) for start in CHOOSES):
        return
    assert all(t.is_meta for t in tree_leaves(out)) and not seen.found, seen.found[:5]
