"""Our Triton kernels through Triton's interpreter, on the CPU, held to the specification in float64.

The interpreter has to be asked for before Triton is imported, so that :mod:`test_triton` runs this in a process of its
own.
"""

import pytest
import torch
from reference import generator, gradients

from attnlib import masks as M
from attnlib import normalizers as Z
from attnlib.ops import attention, split_decoding, split_partial
from attnlib.ops._dispatch import described
from attnlib.ops.kernels._tuning import interpreted


def problem(heads, n, m, d, dv, dtype=torch.float32, batch=1):
    g = generator(n)
    shapes = ((heads[0], n, d), (heads[1], m, d), (heads[2], m, dv))
    return [torch.randn(batch, *s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def test_the_interpreter_runs():
    assert interpreted()


STREAMED = {
    "sigmoid": (Z.Sigmoid(bias=-2.0), None, False, (2, 1, 1), 37, 71, 12, 20),
    "sigmoid, causal, valid": (Z.Sigmoid(), M.causal(), True, (2, 2, 1), 67, 67, 16, 8),
    "relu, recent": (Z.Relu(3.0), M.recent(7), False, (2, 2, 2), 45, 70, 5, 5),
    "relu with sums": (Z.Activated("relu"), M.causal() & M.recent(20), True, (1, 1, 1), 40, 40, 8, 8),
    "softplus with sums": (Z.SoftplusL1(), M.sliding_window(8), True, (4, 2, 1), 33, 33, 8, 8),
    "softplus": (Z.Activated("softplus", l1=False), None, True, (2, 1, 2), 1, 65, 8, 16),
}


@pytest.mark.parametrize("name", STREAMED)
def test_streamed(name):
    normalizer, mask, some, heads, n, m, d, dv = STREAMED[name]
    inputs = problem(heads, n, m, d, dv)
    if name == "relu with sums":  # dividing by the sum of a row that hardly weighs anything enlarges any rounding
        inputs = [t.detach().abs().requires_grad_() for t in inputs]
    valid = None
    if some:
        valid = torch.rand(1, m, generator=generator(1)) > 0.3
        valid[:, :4] = False  # the first rows of a causal mask see nothing
    call = dict(normalizer=normalizer, mask=mask, valid=valid)
    with described("cuda"):
        out = attention(*inputs, backend="triton", **call)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = attention(*exact, backend="eager", **call)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, grad)
    for a, b in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)
    if some and mask is not None:
        assert not out[:, :, 0].any()


def test_streamed_softplus_keeps_small_weights():
    q, k, v = (t.detach() for t in problem((1, 1, 1), 5, 9, 8, 8))
    q, k = -q.abs() * 3, k.abs() * 3  # all scores far below zero
    with described("cuda"):
        out = attention(q, k, v, normalizer="softplus_l1", backend="triton")
    expected = attention(q.double(), k.double(), v.double(), normalizer="softplus_l1", backend="eager")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_streamed_second_derivatives_and_the_choice():
    inputs = problem((2, 1, 1), 20, 20, 8, 8)
    with described("cuda"):
        out = attention(*inputs, normalizer="sigmoid", backend="triton")
    expected = attention(*inputs, normalizer="sigmoid", backend="eager")
    seconds = []
    for y in (out, expected):
        (first,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
        seconds.append(gradients(first, inputs))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "heads,n,m,d,dv,settings",
    [
        ((4, 2, 2), 1, 301, 12, 20, {}),
        ((4, 2, 1), 3, 150, 16, 16, dict(causal=True, lengths=[150, 2])),
        ((2, 2, 2), 1, 70, 8, 8, dict(splits=5, lengths=[0, 33], scale=0.2)),
    ],
)
def test_decoding(heads, n, m, d, dv, settings):
    q, k, v = (t.detach() for t in problem(heads, n, m, d, dv, batch=2))
    with described("cuda"):
        out = split_decoding(q, k, v, **settings)  # it is what is chosen
        part = split_partial(q, k, v, backend="triton", **settings)
    expected = split_decoding(q.double(), k.double(), v.double(), backend="eager", **settings)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    halves = split_partial(q, k[:, :, :0], v[:, :, :0], backend="split") if not settings else None
    torch.testing.assert_close((part if halves is None else part.merge(halves)).finish(), out, rtol=1e-5, atol=1e-6)
    other = split_partial(q.double(), k.double(), v.double(), backend="eager", **settings)
    torch.testing.assert_close(part.lse().double(), other.lse(), rtol=1e-5, atol=1e-5)


def test_decoding_refuses_gradients():
    q, k, v = problem((2, 1, 1), 1, 40, 8, 8)
    with described("cuda"), pytest.raises(ValueError, match="no backward"):
        split_decoding(q, k, v, backend="triton")
