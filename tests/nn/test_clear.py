"""clear: circles on images beside text, one test per acceptance criterion of the card."""

import itertools
import math

import pytest
import torch

import attnlib
from attnlib.grids import Layout
from attnlib.nn.local.clear import clear_attention, clear_mask, pooled

F64 = torch.float64


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def layout(h, w, text=3):
    return Layout((("text", text), ("image", (h, w))))


def oracle(q, k, v, text, grid, radius, weight=None, scale=None):
    """(N, D), query by query."""
    h, w = grid
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = list(k), list(v)
    cells = 0
    if weight is not None:
        f = weight.shape[0]
        for i, j in itertools.product(range(h // f), range(w // f)):
            at = [(text + (i * f + a) * w + j * f + b, weight[a, b]) for a in range(f) for b in range(f)]
            keys.append(sum(k[t] * c for t, c in at))
            values.append(sum(v[t] * c for t, c in at))
            cells += 1
    out = []
    for i in range(len(q)):
        seen = []
        for j in range(len(keys)):
            if j >= text + h * w:
                meets = i >= text
            elif i < text or j < text:
                meets = True
            else:
                (a, b), (c, d) = divmod(i - text, w), divmod(j - text, w)
                meets = (a - c) ** 2 + (b - d) ** 2 < radius**2
            if meets:
                seen.append(j)
        p = torch.stack([keys[j] @ q[i] * scale for j in seen]).softmax(0)
        out.append(sum(p[n] * values[j] for n, j in enumerate(seen)))
    return torch.stack(out)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("radius", [1, 2, 2.5])
def test_output_equals_the_equation(radius, factor):
    q, k, v = noise(3, 1, 1, 3 + 24, 6)
    weight = None if factor == 1 else noise(2, 2, seed=4)
    out = clear_attention(q, k, v, layout(4, 6), radius, weight)
    torch.testing.assert_close(out[0, 0], oracle(q[0, 0], k[0, 0], v[0, 0], 3, (4, 6), radius, weight))


@pytest.mark.parametrize(("radius", "keys"), [(8, 193), (16, 793), (32, 3205)])
def test_keys_of_the_released_windows(radius, keys):
    assert sum(y * y + x * x < radius**2 for y in range(-40, 41) for x in range(-40, 41)) == keys
    side = 2 * radius + 1
    grids = ((side, side), (side + 3, side + 8)) if radius < 32 else ((side, side),)
    for h, w in grids:
        mask = clear_mask(layout(h, w, 5), radius)
        middle = torch.tensor([5 + (h // 2) * w + w // 2])
        seen = mask.at(middle, torch.arange(5 + h * w))
        assert int(seen.sum()) == 5 + keys


def test_wide_circles_are_full_attention_and_narrow_ones_see_themselves_and_text():
    q, k, v = noise(3, 1, 2, 3 + 20, 6)
    full = (q @ k.mT * 6**-0.5).softmax(-1) @ v
    torch.testing.assert_close(clear_attention(q, k, v, layout(4, 5), 7), full)
    for radius in (1, 2, 3):
        torch.testing.assert_close(clear_attention(q, k, v, layout(4, 5), radius)[:, :, :3], full[:, :, :3])
    seen = clear_mask(layout(4, 5), 1).dense(23, 23, torch.device("cpu")).reshape(23, 23)
    assert torch.equal(seen[3:, 3:], torch.eye(20, dtype=torch.bool))
    assert torch.equal(seen, seen.T)


def test_the_interior_is_the_same_everywhere():
    k, v = noise(2, 1, 1, 9, 9, 4)
    k, v = (t.repeat(1, 1, 2, 2, 1)[:, :, :14, :14].reshape(1, 1, 196, 4) for t in (k, v))
    out = clear_attention(k, k, v, Layout((("image", (14, 14)),)), 2.5).view(14, 14, 4)

    torch.testing.assert_close(out[2, 2], out[11, 11])


def test_proportional_scale():
    q, k, v = noise(3, 1, 1, 3 + 16, 6)
    for weight, n in ((None, 19), (torch.full((2, 2), 0.25, dtype=F64), 190)):
        out = clear_attention(q, k, v, layout(4, 4), 2, weight, proportional=True, trained_tokens=50)
        scale = math.sqrt(math.log(n, 50) / 6)
        torch.testing.assert_close(out[0, 0], oracle(q[0, 0], k[0, 0], v[0, 0], 3, (4, 4), 2, weight, scale))


def test_pooled_keys_are_means_at_first_and_of_the_tokens_that_exist():
    m = attnlib.create("clear", dim=8, num_heads=2, down_factor=4)
    assert m.spatial_weight.shape == (4, 4) and bool((m.spatial_weight == 1 / 16).all())
    x, mean = noise(1, 1, 15, 2), torch.full((2, 2), 0.25, dtype=F64)
    cells, some = pooled(x, mean, (3, 5))
    grid = x.view(3, 5, 2)
    torch.testing.assert_close(cells[0, 0, 5], grid[2, 4])
    torch.testing.assert_close(cells[0, 0, 1], grid[:2, 2:4].mean((0, 1)))
    valid = torch.ones(1, 15, dtype=torch.bool)
    valid[0, [0, 1, 5]] = valid[0, 14] = False
    cells, some = pooled(x, mean, (3, 5), valid)
    torch.testing.assert_close(cells[0, 0, 0], grid[1, 1])
    assert some.tolist() == [[True, True, True, True, True, False]]


def test_work_is_linear_in_the_image():
    """Tiles of keys that a tile of queries reads, on images as wide as the circle's tiles and more."""

    def pairs(side):
        mask, ids = clear_mask(Layout((("image", (side, side)),)), 4), torch.arange(side * side)
        return int(mask.at(ids, ids).sum())

    inner = sum(y * y + x * x < 16 for y in range(-4, 5) for x in range(-4, 5))
    assert inner * 400 > pairs(20) > 0.7 * inner * 400
    assert pairs(40) / pairs(20) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window_size=0), "window_size"),
        (dict(down_factor=0), "down_factor must be an integer of at least 1"),
        (dict(num_heads=3), "num_heads=3 does not divide dim=8"),
        (dict(trained_tokens=1), "trained_tokens"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        attnlib.create("clear", **{"dim": 8, "num_heads": 2, **settings})


def test_bad_calls_are_refused():
    q = noise(1, 1, 12, 4)
    with pytest.raises(ValueError, match="segment 'image'"):
        clear_attention(q, q, q, Layout((("text", 12),)), 2)
    with pytest.raises(ValueError, match="12"):
        clear_attention(q, q, q, layout(2, 3), 2)
    with pytest.raises(ValueError, match="a pooled key is made of several"):
        clear_attention(q, q, q, layout(3, 3), 2, torch.ones(2, 2), mask=attnlib.masks.causal())
