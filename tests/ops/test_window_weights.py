"""Given window weights, dilated depthwise convolutions in phases: held to their specifications."""

import pytest
import torch

from attnlib.ops import depthwise, neighborhood_attention, neighborhood_av, window_keys

F64 = torch.float64


def given(grid, kernel, batch=2, heads=3, dim=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    count = kernel ** len(grid) if isinstance(kernel, int) else torch.Size(kernel).numel()
    w = torch.randn(batch, heads, *grid, count, dtype=F64, generator=g)
    return w.requires_grad_(), torch.randn(batch, heads, *grid, dim, dtype=F64, generator=g).requires_grad_()


@pytest.mark.parametrize(
    ("grid", "kernel"),
    [((9,), 3), ((30,), 4), ((5, 5), 5), ((13, 7), 3), ((8, 40), (5, 3)), ((14, 15), 13), ((4, 5, 6), 3)],
)
def test_tiles_equal_the_sum_over_a_window(grid, kernel):
    w, v = given(grid, kernel)
    outs, grads = [], []
    for backend in ("eager", "tiles"):
        out = neighborhood_av(w, v, kernel, backend=backend)
        outs.append(out)
        grads.append(torch.autograd.grad((out * out.detach().cos()).sum(), (w, v)))
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_by_hand_with_the_keys_of_every_window():
    w, v = given((6, 7), (3, 5))
    keys, _ = window_keys((6, 7), (3, 5))
    out = torch.zeros(2, 3, 42, 4, dtype=F64)
    for p in range(42):
        for o in range(15):
            out[:, :, p] += w.detach().flatten(2, 3)[:, :, p, o, None] * v.detach().flatten(2, 3)[:, :, keys[p, o]]
    torch.testing.assert_close(neighborhood_av(w, v, (3, 5)).flatten(2, 3), out)


@pytest.mark.parametrize(("grid", "kernel"), [((11, 9), 5), ((8, 8), 4)])
def test_with_the_weights_of_neighborhood_attention_it_is_neighborhood_attention(grid, kernel):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, *grid, 4, dtype=F64, generator=g) for _ in range(3))
    table = torch.randn(2, 2 * kernel - 1, 2 * kernel - 1, dtype=F64, generator=g)
    keys, places = window_keys(grid, kernel)
    scores = torch.einsum("bhnd,bhnkd->bhnk", q.flatten(2, 3), k.flatten(2, 3)[:, :, keys]) * 0.5
    weights = (scores + table.flatten(1)[:, places]).softmax(-1).unflatten(2, grid)
    want = neighborhood_attention(q, k, v, kernel_size=kernel, bias_table=table)
    torch.testing.assert_close(neighborhood_av(weights, v, kernel), want)


def test_weights_that_sum_to_one_keep_a_constant():
    w, _ = given((9, 10), 7)
    out = neighborhood_av(w.softmax(-1), torch.full((2, 3, 9, 10, 2), 2.5, dtype=F64), 7)
    torch.testing.assert_close(out, torch.full_like(out, 2.5))


def test_values_are_not_copied_once_a_key():
    """Elements written, counted: a few times the weights and values together, where unfolding writes K times v."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        written = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                self.written += out.numel()
            return out

    with torch.device("meta"), Count() as count:
        w, v = torch.empty(1, 2, 56, 56, 169), torch.empty(1, 2, 56, 56, 64)
        count.written = 0
        neighborhood_av(w, v, 13)
    assert count.written < 169 * v.numel() / 3


def test_empty_batch_and_bad_input():
    assert neighborhood_av(torch.zeros(0, 2, 5, 5, 9), torch.zeros(0, 2, 5, 5, 3), 3).shape == (0, 2, 5, 5, 3)
    w, v = given((5, 5), 3)
    for args, message in (
        ((w[..., :8], v, 3), "one number for each of 9 keys"),
        ((w[:, :2], v, 3), "weights must be"),
        ((w, v, 7), "larger than the grid"),
        ((w.float(), v, 3), "weights.*float32"),
        ((w, v[0, 0], 3), "v must have shape"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            neighborhood_av(*args)
    with pytest.raises(ValueError, match="is unknown"):
        neighborhood_av(w, v, 3, backend="unfold")


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"), [((10,), 5, 3), ((7, 11), 7, 3), ((3, 3), 3, 4), ((5, 6, 7), 3, 2), ((1, 2), 5, 2)]
)
def test_phases_of_a_dilated_convolution(grid, kernel, dilation):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, *grid, 3, dtype=F64, generator=g).requires_grad_()
    w = torch.randn(3, 1, *[kernel] * len(grid), dtype=F64, generator=g).requires_grad_()
    b = torch.randn(3, dtype=F64, generator=g).requires_grad_()
    outs, grads = [], []
    for backend in ("eager", "phases", "convolution"):
        y = depthwise(x, w, b, dilation=dilation, backend=backend)
        outs.append(y)
        grads.append(torch.autograd.grad(y.square().sum(), (x, w, b)))
    for out, grad in zip(outs[1:], grads[1:], strict=True):
        torch.testing.assert_close(out, outs[0])
        torch.testing.assert_close(grad, grads[0])


def test_phases_serve_dilated_convolutions_on_the_cpu():
    from attnlib.ops import explain

    x, w = torch.zeros(1, 9, 9, 2), torch.zeros(2, 1, 3, 3)
    assert explain("depthwise", x, w, dilation=2).startswith("runs: phases")
    assert explain("depthwise", x, w).startswith("runs: convolution")
    assert depthwise(x[:0], w, dilation=2).shape == (0, 9, 9, 2)
