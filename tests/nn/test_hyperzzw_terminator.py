"""hyperzzw-terminator: kernels of a slow network that multiply and are multiplied, a test per acceptance criterion."""

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.nn.modulation.hyperzzw_terminator import HyperKernel, place_norm, slow_loss
from attnlib.optim import Kar3

F64 = torch.float64


def make(**settings):
    torch.manual_seed(0)
    return attnlib.create("hyperzzw", **{"dim": 4, "hidden": 8, "local_hidden": 6, **settings}).double()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_the_slow_network_is_a_product_of_sines():
    torch.manual_seed(0)
    net = HyperKernel(5, rank=2, hidden=4, num_layers=3).double()
    ys, xs = torch.linspace(-1, 1, 3, dtype=F64), torch.linspace(-1, 1, 4, dtype=F64)
    kernel = net((3, 4))
    for i in range(3):
        for j in range(4):
            c = torch.stack([ys[i], xs[j]])
            h = torch.sin(net.sines[0](c))
            for layer in (1, 2):
                h = torch.sin(net.sines[layer](c)) * net.linears[layer - 1](h)
            torch.testing.assert_close(kernel[i, j], net.out(h) / 12**0.5)


def test_the_global_product_is_one_of_matrices_of_what_the_kernel_has_multiplied():
    m, x = make(), noise(1, 5, 5, 4)
    kernel, f = m.global_kernel(5, 5), place_norm(m.fast(x), None)
    far = torch.stack([(x[0, ..., c] * kernel[..., c]) @ f[0, ..., c] for c in range(4)], -1)
    k = m.local_kernel(x)[0].permute(2, 0, 1)[:, None]
    near = F.conv2d(x.permute(0, 3, 1, 2), k, padding=1, groups=4).permute(0, 2, 3, 1)
    near = F.gelu(place_norm(m.mixer(near), None))
    torch.testing.assert_close(m(x), m.proj(torch.cat([far[None], near], -1)))


def test_a_place_reads_its_row_and_column_and_two_blocks_read_everything():
    first, second = make(), make()
    for m in (first, second):  # without the norm's means, which every place is in
        m.fast = torch.nn.Identity()
    x = noise(1, 6, 6, 4).requires_grad_()

    def reached(y):
        (grad,) = torch.autograd.grad(y[0, 2, 3].sum(), x, retain_graph=True)
        return grad[0].abs().sum(-1) > 0

    kernel = first.global_kernel(6, 6)
    once = torch.einsum("bhkc,bkwc->bhwc", x * kernel, x)
    seen = reached(once)
    assert bool(seen[2].all()) and bool(seen[:, 3].all()) and int(seen.sum()) == 11
    assert bool(reached(torch.einsum("bhkc,bkwc->bhwc", once * kernel, once)).all())
    assert bool(reached(first(x)).all())


def test_local_kernels_depend_on_their_own_image():
    x = noise(3, 6, 6, 4)
    m = make()
    kernels = m.local_kernel(x)
    assert kernels.shape == (3, 3, 3, 4) and not torch.allclose(kernels[0], kernels[1])
    torch.testing.assert_close(m(x)[:1], m(x[:1]))
    theirs = make(compat="authors")
    kernels = theirs.local_kernel(x)
    torch.testing.assert_close(kernels[0], kernels[1])
    assert not torch.allclose(theirs(x)[:1], theirs(x[:1]))
    assert not theirs.traits.batch_independent


def test_the_scalars_are_parameters():
    m = make()
    m(noise(1, 4, 4, 4)).square().sum().backward()
    for scalar in (m.local.alpha, m.local.beta):
        assert scalar.grad is not None and bool(scalar.grad.any())
    assert set(m.state_dict()) >= {"local.alpha", "local.beta"}


def test_the_slow_loss_is_zero_for_repeated_kernels():
    k = noise(3, 3, 2)
    assert slow_loss([k, torch.cat([k] * 2, -1), torch.cat([k] * 4, -1)]) == 0
    wide = torch.cat([k, k + 1], -1)
    torch.testing.assert_close(slow_loss([k, wide]), torch.tensor(0.5, dtype=F64))
    with pytest.raises(ValueError, match="do not repeat"):
        slow_loss([k, noise(3, 3, 3)])


def test_kar3_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = Kar3([p], lr=0.1, betas=(0.5, 0.95))
    value, first, second = 1.0, 0.0, 0.0
    sign = lambda t: (t > 0) - (t < 0)  # noqa: E731
    for grad in (2.0, -1.0, -1.5, -0.5, 3.0):
        p.grad = torch.tensor([grad], dtype=F64)
        optimizer.step()
        value -= 0.1 * (sign(grad) + sign(first) + sign(second))
        first, second = 0.5 * first + 0.5 * grad, 0.95 * second + 0.05 * grad
        assert p.item() == pytest.approx(value)
    for wrong in (dict(lr=-1), dict(betas=(0.5,)), dict(betas=(0.5, 1.0)), dict(weight_decay=-1)):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            Kar3([p], **wrong)


def test_oblong_images_are_read_as_far_as_rows_and_columns_go():
    assert make()(noise(1, 5, 3, 4)).shape == (1, 5, 3, 4)
    assert make()(noise(1, 2, 7, 4)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kernel_size=2), "kernel_size must be odd"),
        (dict(num_layers=0), "num_layers"),
        (dict(omega=0.0), "omega"),
        (dict(compat="batch"), "compat='batch' is not possible"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
