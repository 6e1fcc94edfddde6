"""spectformer: spectral gating, one test per criterion of the card that concerns the layer."""

import pytest
import torch
from parity import Fixture

import attnlib
from attnlib.ops.modulation import spectral_gate

F64 = torch.float64


def make(grid, dim=3, spread=0.5, **config):
    torch.manual_seed(0)
    m = attnlib.create("spectformer", dim=dim, grid=grid, **config).double()
    torch.nn.init.normal_(m.filter, 0, spread)
    return m


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def fourier(n):
    """The orthonormal transform of n places as a matrix."""
    k = torch.arange(n, dtype=F64)
    return torch.exp(-2j * torch.pi * k[:, None] * k / n) / n**0.5


def oracle(x, weight):
    """The transform as matrices, the other half of the frequencies by symmetry."""
    h, w = x.shape[1:3]
    half = torch.complex(*weight).permute(1, 2, 0)  # (h, w // 2 + 1, C)
    full = torch.zeros(h, w, x.shape[-1], dtype=half.dtype)
    for i in range(h):
        for j in range(w):
            full[i, j] = half[i, j] if j <= w // 2 else half[-i % h, w - j].conj()
    # What has itself as its mirror is real in a real map, whatever the imaginary part there.
    for j in {0} | ({w // 2} if w % 2 == 0 else set()):
        full[:, j] = (half[:, j] + half[[-i % h for i in range(h)], j].conj()) / 2
    a, b = fourier(h), fourier(w)
    spectrum = torch.einsum("ai,bj,nijc->nabc", a, b, x.to(a.dtype)) * full
    return torch.einsum("ai,bj,nabc->nijc", a.conj(), b.conj(), spectrum)


def test_the_authors_layer():
    fixture = Fixture("spectformer")
    fixture.holds("a", fixture.build("a"), lambda m, given: m(given["x"]))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (6, 1), (1, 5)])
def test_it_is_the_equation_for_even_and_odd_sides(grid):
    m, x = make(grid), tokens(2, *grid, 3)
    want = oracle(x, m.filter)
    torch.testing.assert_close(m(x), want.real)
    assert want.imag.abs().max() < 1e-12


@pytest.mark.parametrize("grid", [(7,), (5, 6), (2, 3, 4)])
def test_a_gate_of_one_changes_nothing(grid):
    m, x = make(grid), tokens(2, *grid, 3)
    with torch.no_grad():
        m.filter[0], m.filter[1] = 1, 0
    torch.testing.assert_close(m(x), x)


@pytest.mark.parametrize("grid", [(5, 6), (6, 7)])
def test_the_transform_of_a_kernel_convolves_in_a_circle(grid):
    m, x, kernel = make(grid), tokens(1, *grid, 3), tokens(*grid, 3, seed=2)
    spectrum = torch.fft.rfft2(kernel, dim=(0, 1)).permute(2, 0, 1)
    with torch.no_grad():
        m.filter.copy_(torch.stack([spectrum.real, spectrum.imag]))
    want = sum(kernel[i, j] * x.roll((i, j), (1, 2)) for i in range(grid[0]) for j in range(grid[1]))
    torch.testing.assert_close(m(x), want)


def test_it_moves_with_the_map_around_its_borders():
    m, x = make((5, 8)), tokens(2, 5, 8, 3)
    torch.testing.assert_close(m(x.roll((2, 3), (1, 2))), m(x).roll((2, 3), (1, 2)))


def test_phases_keep_the_energy():
    m, x = make((5, 7)), tokens(2, 5, 7, 3)
    angle = tokens(3, 5, 4) * (torch.arange(4) > 0)  # the constant column has itself as its mirror
    with torch.no_grad():
        m.filter.copy_(torch.stack([angle.cos(), angle.sin()]))
    torch.testing.assert_close(m(x).square().sum(), x.square().sum())


def test_it_computes_in_float32_whatever_the_input():
    x, weight = tokens(1, 4, 6, 3), tokens(2, 3, 4, 4)
    for dtype in (torch.bfloat16, torch.float16):
        low, filters = x.to(dtype), weight.to(dtype)
        y = spectral_gate(low, filters)
        assert y.dtype == dtype and torch.equal(y, spectral_gate(low.float(), filters.float()).to(dtype))
    m = make((4, 6)).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m(x.float()), m.double()(x).float())


def test_other_grids_are_refused_or_resampled_part_by_part():
    x = tokens(1, 6, 9, 3)
    with pytest.raises(ValueError, match="resample=True"):
        make((4, 6))(x)
    m = make((4, 6), resample=True)
    parts = [torch.nn.functional.interpolate(part[None], (6, 5), mode="bilinear")[0] for part in m.filter]
    torch.testing.assert_close(m(x), spectral_gate(x, torch.stack(parts)))
    assert not make((4, 6)).traits.resolution_free and m.traits.resolution_free
    make((4, 6))(tokens(1, 4, 7, 3))  # 6 and 7 tokens have as many frequencies


def test_tokens_that_do_not_exist_are_zeros():
    x, weight = tokens(2, 4, 5, 3), tokens(2, 3, 4, 3)
    valid = tokens(2, 4, 5) > 0
    torch.testing.assert_close(
        spectral_gate(x, weight, valid=valid), spectral_gate(x * valid.unsqueeze(-1), weight), rtol=0, atol=0
    )


def test_bad_settings():
    with pytest.raises(ValueError, match=r"weight must have shape \(2, C, \*frequencies\)"):
        spectral_gate(tokens(1, 4, 6, 3), tokens(2, 4, 4, 4))
    with pytest.raises(ValueError, match="rank 3 must fit"):
        spectral_gate(tokens(1, 3, 4, 6, 3), tokens(2, 3, 4, 4, 4), resample=True)
    with pytest.raises((TypeError, ValueError), match="grid"):
        make((4, 0))
