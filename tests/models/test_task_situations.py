"""Every model of the table of tasks in the situations that users bring: mixed precision, other default types, labels of
any width, inputs that are not of the model's precision."""

import copy
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import attnlib
from attnlib.models.protocol import TaskModel
from attnlib.nn.layers import LSTM, mean_pool, smoothed

spec = importlib.util.spec_from_file_location(
    "tasks_in_situations", Path(__file__).parents[2] / "examples" / "tasks" / "tasks.py"
)
tasks = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tasks
spec.loader.exec_module(tasks)


@functools.cache
def made(name):
    """A model in evaluation, and a batch."""
    torch.manual_seed(0)
    return tasks.TASKS[name].build().eval(), tasks.TASKS[name].batch(4, torch.Generator().manual_seed(5))


def mapped(change, value):
    return pytree.tree_map(lambda t: change(t) if isinstance(t, torch.Tensor) else t, value)


def tensors(value):
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def terms_of(model, batch):
    torch.manual_seed(1)
    return [step.terms() for step in copy.deepcopy(model).steps(batch)]  # banks of features change


@pytest.mark.parametrize("name", tasks.TASKS)
def test_under_autocast_losses_are_exact_and_slopes_finite(name):
    model, batch = made(name)
    model.train()
    try:
        for step in model.steps(batch):
            with torch.autocast("cpu", torch.bfloat16):
                terms = step.terms()
            assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values()), terms
            slopes = torch.autograd.grad(sum(terms.values()), step.params, allow_unused=True)
            assert all(t is None or t.isfinite().all() for t in slopes)
    finally:
        model.eval()


@pytest.mark.parametrize("name", tasks.TASKS)
@torch.no_grad()
def test_default_types_change_nothing(name):
    model, batch = made(name)
    inputs = tasks.inputs_of(batch)
    expected = tensors(model(**inputs))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = tensors(model(**inputs))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", tasks.TASKS)
@torch.no_grad()
def test_a_batch_of_none_has_answers_of_none(name):
    model, batch = made(name)
    inputs = tasks.inputs_of(batch)
    size = len(tensors(inputs)[0])
    none = mapped(lambda t: t[:0] if t.dim() and len(t) == size else t, inputs)
    none = {k: v[:0] if isinstance(v, (list, tuple)) and len(v) == size else v for k, v in none.items()}
    found = tensors(model(**none))
    assert all(t.isfinite().all() for t in found if t.is_floating_point())
    assert any(t.dim() and not len(t) for t in found)


@pytest.mark.parametrize("name", tasks.TASKS)
@torch.no_grad()
def test_an_input_of_another_precision_is_named(name):
    model, batch = made(name)
    inputs = tasks.inputs_of(batch)
    for argument, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            try:
                model.predict(**{**inputs, argument: value.double()})  # coordinates may be of any
            except (TypeError, ValueError) as error:
                assert argument in str(error), error


@pytest.mark.parametrize("name", tasks.TASKS)
@torch.no_grad()
def test_labels_are_whole_numbers_of_any_width(name):
    model, batch = made(name)
    whole = [t for t in tensors(batch["target"]) if t.dtype == torch.int64]
    if not whole:
        pytest.skip("no classes")
    expected = terms_of(model, batch)
    for dtype in (torch.int32, torch.uint8):
        if dtype == torch.uint8 and min((int(t.min()) for t in whole if t.numel()), default=0) < 0:
            continue
        target = mapped(lambda t, to=dtype: t.to(to) if t.dtype == torch.int64 else t, batch["target"])
        found = terms_of(model, {**batch, "target": target})
        for a, b in zip(found, expected, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key])


def test_what_else_goes_wrong_inside_is_told_as_it_is():
    class Odd(TaskModel):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(2, 2)

        def forward(self, x):
            return self.map(x)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Odd()(torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"x has torch.float64, but the parameters of Odd have torch.float32"):
        Odd()(torch.ones(1, 2).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_where_the_processor_has_no_kernel(dtype):
    x = torch.randn(1, 2, 4, 4, 4)
    torch.testing.assert_close(
        mean_pool(x.to(dtype), (2, 2, 2), ceil_mode=True), mean_pool(x.to(dtype).float(), (2, 2, 2)).to(dtype)
    )
    flat = x[..., 0].to(dtype)
    for mode in ("bilinear", "bicubic"):
        torch.testing.assert_close(smoothed(flat, (2, 3), mode), smoothed(flat.float(), (2, 3), mode).to(dtype))
    torch.manual_seed(0)
    layer, seen = LSTM(4, 3, batch_first=True), torch.randn(2, 5, 4)
    expected, (h, c) = layer(seen)
    packed = nn.utils.rnn.pack_padded_sequence(seen, torch.tensor([5, 3]), batch_first=True)
    with torch.autocast("cpu", dtype):
        found, state = layer(seen.to(dtype), (torch.zeros(1, 2, 3, dtype=dtype), torch.zeros(1, 2, 3, dtype=dtype)))
        rows = layer(packed)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(state[0], h, atol=0.02, rtol=0.02)
    torch.testing.assert_close(rows.data, layer(packed)[0].data)


@pytest.mark.parametrize("name", ["softmax-attention", "sigmoid-attention", "hedgehog", "performer"])
def test_under_autocast_a_context_may_be_of_another_precision(name):
    torch.manual_seed(0)
    mixer = attnlib.create(name, dim=8, num_heads=2)
    x, context = torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixer(x, context), mixer(x.float(), context))
        torch.testing.assert_close(mixer(context, x), mixer(context, x.float()))
    with pytest.raises(TypeError, match="x and context must share one floating dtype"):
        mixer(x, context)
