"""What restorers share: tiles with overlap, scales, bad input."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.restore.base import PixelShuffleHead, Restorer
from tests.models.test_hat import tiny


class Convolutions(Restorer):
    """Reads 4 pixels far: two convolutions of 3 x 3, one and two of the head, a part of a pixel each."""

    def __init__(self, scale=2, align=1):
        super().__init__(scale, 3, 1, align=align)
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), PixelShuffleHead(4, 3, scale, 4)

    def body(self, x):
        return self.head(self.conv(x).relu())


def image(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (9, 21), (16, 7)])
def test_tiles_are_the_whole_image_where_they_cover_what_a_pixel_reads(scale, size):
    torch.manual_seed(0)
    m, x = Convolutions(scale).double(), image(2, 3, *size)
    whole = m.restore(x)
    torch.testing.assert_close(whole, m(x).detach(), rtol=0, atol=0)
    for tile, overlap, blend in ((4, 8, None), (7, 6, 2), (5, 4, 0), (1, 8, 4), (64, 0, 0)):
        torch.testing.assert_close(m.restore(x, tile=tile, overlap=overlap, blend=blend), whole, rtol=0, atol=1e-12)


def test_windows_lie_in_tiles_as_in_the_whole_image():
    """Without channel attention, which reads the whole map, one block of windows and its overlap reach 16 pixels."""
    m, x = tiny(alpha=0.0, depths=(1,), num_heads=(2,)).double(), image(1, 3, 40, 26)
    assert m.align == 4
    torch.testing.assert_close(m.restore(x, tile=7, overlap=24, blend=5), m(x).detach(), rtol=0, atol=1e-12)
    assert not torch.allclose(m.restore(x, tile=7, overlap=0), m(x))


def test_neighbours_fade_into_each_other():
    """A model whose answer is which tile it was given: straight lines over the border, and steps without a blend."""

    class Mean(Restorer):
        def body(self, x):
            return x.mean((2, 3), keepdim=True).expand_as(x)

    m, x = Mean(1, 1, 1), torch.zeros(1, 1, 1, 8)
    x[..., 4:] = 8
    assert m.restore(x, tile=4, overlap=0)[0, 0, 0].tolist() == [0] * 4 + [8] * 4
    line = m.restore(x, tile=4, overlap=2, blend=2)[0, 0, 0]
    low, high = 8 * 2 / 6, 8 * 4 / 6
    expected = [low + (high - low) * w for w in (0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1)]
    torch.testing.assert_close(line, torch.tensor(expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scale=4), "scale=4 is not possible: this restorer was built for scale=2"),
        (dict(scale=0), "scale"),
        (dict(tile=0), "tile"),
        (dict(tile=4, overlap=-1), "overlap"),
        (dict(tile=4, overlap=4, blend=5), "blend"),
    ],
)
def test_bad_settings_of_tiles(settings, message):
    with pytest.raises(ValueError, match=message):
        Convolutions().restore(torch.rand(1, 3, 8, 8), **settings)
    assert Convolutions().restore(torch.rand(1, 3, 8, 8), scale=2).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", ["hat_x2", "rgt_x2"])
def test_bad_images_and_scales(name):
    with pytest.raises(ValueError, match="scale=5 is not possible"):
        attnlib.create_model(name, scale=5, depths=(1,), num_heads=(2,))
    m = Convolutions()
    for bad in (torch.rand(1, 1, 8, 8), torch.rand(3, 8, 8), torch.rand(1, 3, 0, 8), torch.zeros(1, 3, 8, 8).long()):
        with pytest.raises(ValueError, match="image must"):
            m.restore(bad)
