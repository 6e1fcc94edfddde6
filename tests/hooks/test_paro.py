"""PARO, tiles found by search, and few bits: on maps whose structure is known, and on a video denoiser."""

import itertools

import pytest
import torch

from hooks.models import predict

pytest.importorskip("diffusers")

import attnlib  # noqa: E402
from attnlib.grids import axis_order, inverse_permutation  # noqa: E402
from attnlib.ops.attention import attention  # noqa: E402
from attnlib.ops.block_mass import block_profile, heaviest_blocks, plan_recall  # noqa: E402
from attnlib.ops.block_sparse import BlockPlan  # noqa: E402
from attnlib.ops.quantized import quantize, quantized_attention  # noqa: E402
from attnlib.steer.diffusion.video import (  # noqa: E402
    ORDERS,
    PARO,
    BlockSparse,
    FrameTiles,
    TileSearch,
)
from hooks.test_protocol_video import MODELS  # noqa: E402

GRID = (4, 4, 4)


def local(axis, strength=4.0, seed=0):
    """Queries and keys of a head whose tokens attend along one axis: what lies on the same line."""
    g = torch.Generator().manual_seed(seed)
    code = torch.randn(*(4 if a != axis else 1 for a in range(3)), 32, generator=g)
    x = code.expand(*GRID, 32).reshape(1, 1, 64, 32)
    x = x / x.norm(dim=-1, keepdim=True) * (strength * 32**0.5) ** 0.5 * 1.6
    return tuple(x + 0.05 * torch.randn(x.shape, generator=g) for _ in range(2))


def profile(q, k, axes, block=4):
    at = axis_order(GRID, axes)
    return block_profile(q[:, :, at], k[:, :, at], block)


def test_the_profile_of_a_map_is_that_of_its_blocks():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 18, 8, generator=g), torch.randn(2, 2, 22, 8, generator=g)
    found = block_profile(3 * q, 3 * k, 8)
    p = (9 * (q @ k.repeat_interleave(2, 1).transpose(-2, -1)) * 8**-0.5).softmax(-1)
    tiles = [[t for t in rows.split(8, -1)] for rows in p.split(8, -2)]
    empty = sum(((t < 1e-3).float().mean((-2, -1)) >= 0.9).float() for rows in tiles for t in rows) / 9
    uneven = sum(t.amax((-2, -1)) / t.mean((-2, -1)) for rows in tiles for t in rows) / 9
    assert torch.allclose(found.sparse, empty) and torch.allclose(found.incoherence, uneven, rtol=1e-4)
    assert torch.allclose(found.mass[:, :, 2, 1], tiles[2][1].sum((-2, -1)), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_axis_that_a_head_follows_becomes_the_fastest(axis):
    """It raises the share of empty blocks, lowers incoherence, and is what the score chooses."""
    q, k = local(axis)
    found = {axes: profile(q, k, axes) for axes in ORDERS}
    fast = [axes for axes in ORDERS if axes[-1] == axis]
    slow = [axes for axes in ORDERS if axes[-1] != axis]
    assert min(float(found[a].sparse) for a in fast) > max(float(found[a].sparse) for a in slow)
    assert max(float(found[a].incoherence) for a in fast) < min(float(found[a].incoherence) for a in slow)


def test_attention_is_the_same_in_every_order():
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=g) for _ in range(3))
    for axes in itertools.permutations(range(3)):
        at = axis_order(GRID, axes)
        out = attention(q[:, :, at], k[:, :, at], v[:, :, at])[:, :, inverse_permutation(at)]
        assert torch.allclose(out, attention(q, k, v), atol=1e-6)
    with pytest.raises(ValueError, match="no permutation"):
        axis_order(GRID, (0, 1, 1))


def test_static_blocks_serve_another_sample_of_the_same_structure():
    (q, k), (q2, k2) = local(0, seed=0), local(0, seed=5)
    plan = heaviest_blocks(profile(q, k, (1, 2, 0)).mass, 0.75, 4, 4, 64)
    assert float(plan_recall(profile(q2, k2, (1, 2, 0)).mass, plan)) >= 0.9


def test_few_bits_cost_less_by_block_and_less_in_the_right_order():
    q, k = local(0, strength=2.0)
    v = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(2))

    def error(axes, grain, bits=8):
        at = axis_order(GRID, axes)
        a, b, c = (t[:, :, at] for t in (q, k, v))
        out = quantized_attention(a, b, c, qk_bits=None, pv_bits=bits, grain=grain, block=4)
        return float((out - attention(a, b, c)).square().mean())

    assert error((0, 1, 2), "block") < error((0, 1, 2), "row") < error((0, 1, 2), "tensor")
    assert error((1, 2, 0), "block") < error((0, 1, 2), "block")
    assert error((0, 1, 2), "block", 8) < error((0, 1, 2), "block", 4)
    exact = quantized_attention(q, k, v, qk_bits=None, pv_bits=None)
    assert torch.allclose(exact, attention(q, k, v), atol=1e-6)


def test_quantized_numbers_are_whole_and_near():
    x = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(3))
    for grain in ("block", "row", "tensor"):
        held = quantize(x, 8, grain, (4, 3))
        assert torch.equal(held.values, held.values.round()) and float(held.values.abs().max()) == 127
        assert ((held.values * held.scale - x).abs() <= 0.5 * held.scale + 1e-7).all()
    assert torch.equal(quantize(torch.zeros(2, 2)).values, torch.zeros(2, 2))


def test_a_quantized_plan_is_attention_under_its_mask():
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 2, 13, 8, generator=g) for _ in range(3))
    chosen = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]]).bool()
    plan = BlockPlan.from_mask(chosen, 4, 4, 13)
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, 11:] = False
    out = quantized_attention(q, k, v, qk_bits=None, pv_bits=None, block=4, plan=plan, valid=valid)
    assert torch.allclose(out, attention(q, k, v, mask=plan.mask(), valid=valid), atol=1e-6)
    near = quantized_attention(q, k, v, block=4, plan=plan, valid=valid)
    assert 1e-6 < float((near - out).abs().max()) < 0.05


def made(name="wan"):
    make, inputs, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    torch.manual_seed(1)
    return model, inputs()


def sample(model, inputs, session, steps=4):
    out = []
    for step in range(steps):
        with session.at(step=step):
            out.append(predict(model, inputs))
    return out


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_calibrated_then_static(name):
    model, inputs = made(name)
    plain = predict(model, inputs)
    paro = PARO(density=1.0, block=3, half=2)
    with attnlib.attach(model, BlockSparse(paro)) as session:
        assert all(torch.equal(out, plain) for out in sample(model, inputs, session))
    paro.freeze()
    with attnlib.attach(model, BlockSparse(paro)) as session:
        assert all(torch.allclose(out, plain, atol=1e-5) for out in sample(model, inputs, session))
    for held in paro.layers.values():
        assert held["order"].shape == (2,) and set(held["plans"]) == {0, 1}
    half = PARO(density=0.5, block=3)
    with attnlib.attach(model, BlockSparse(half)) as session:
        sample(model, inputs, session, 1)
    half.freeze()
    with attnlib.attach(model, BlockSparse(half)) as session:
        sample(model, inputs, session, 1)
        densities = list(session.results["block-sparse"].values())
    blocks = -(-(12 + (5 if name == "cogvideox" else 0)) // 3)
    assert all(0.5 - 1 / blocks**2 <= d < 1 for d in densities)


def test_few_bits_on_a_model_stay_near():
    model, inputs = made()
    plain = predict(model, inputs)
    paro = PARO(density=1.0, block=3, bits=(8, 8))
    with attnlib.attach(model, BlockSparse(paro)) as session:
        sample(model, inputs, session, 1)
    paro.freeze()
    with attnlib.attach(model, BlockSparse(paro)) as session:
        (out,) = sample(model, inputs, session, 1)
    assert 0 < float((out - plain).abs().max()) < 0.05 * float(plain.abs().max())


def test_what_was_not_calibrated_is_refused():
    model, inputs = made()
    with pytest.raises(ValueError, match="nothing was calibrated"):
        PARO().freeze()
    paro = PARO(density=0.5, block=3, half=2)
    with attnlib.attach(model, BlockSparse(paro)) as session:
        sample(model, inputs, session, 2)
    with pytest.raises(ValueError, match="no step from half=2"):
        paro.freeze()
    paro = PARO(density=0.5, block=3)
    with attnlib.attach(model, BlockSparse(paro, layers=[0])) as session:
        sample(model, inputs, session, 1)
    paro.freeze()
    with attnlib.attach(model, BlockSparse(paro)) as session, pytest.raises(ValueError, match="was not calibrated"):
        sample(model, inputs, session, 1)
    larger = {**inputs, "hidden_states": torch.randn(2, 4, 2, 8, 4)}
    with attnlib.attach(model, BlockSparse(paro)) as session, pytest.raises(ValueError, match="its video is"):
        sample(model, larger, session, 1)


def test_the_search_is_monotone_and_all_frames_are_exact():
    model, inputs = made()
    search = TileSearch((0, 1, 2), block=3)
    plain = predict(model, inputs)
    with attnlib.attach(model, BlockSparse(search)) as session:
        assert all(torch.equal(out, plain) for out in sample(model, inputs, session, 2))
    for rows in search.errors.values():
        assert len(rows) == 2 and all(row[2] < 1e-10 < row[0] for row in rows)
    bounds = (1e-9, 1e-4, 1e-2, 1.0, 10.0)
    found = [search.references(b) for b in bounds]
    for layer in search.errors:
        counts = [f[layer] for f in found]
        assert (
            counts == sorted(counts, reverse=True) and counts[0] == 1 and counts[-1] == 0
        )  # two frames: one of them reaches all
    with attnlib.attach(model, BlockSparse(FrameTiles(found[0], block=3))):
        assert torch.allclose(predict(model, inputs), plain, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PARO(density=0.0), "density"),
        (lambda: PARO(bits=8), "bits"),
        (lambda: PARO(bits=(9, 8)), "bits"),
        (lambda: PARO(orders=((0, 1, 1),)), "no permutation"),
        (lambda: PARO(orders=()), "orders"),
        (lambda: PARO(half=0), "half"),
        (lambda: TileSearch(()), "candidates"),
        (lambda: TileSearch((2, 1)), "candidates"),
        (lambda: TileSearch((1,)).references(0.1), "nothing was measured"),
        (lambda: quantize(torch.zeros(2, 2), 1), "bits"),
        (lambda: quantize(torch.zeros(2)), r"\(\.\.\., N, M\)"),
        (lambda: quantize(torch.zeros(2, 2), grain="column"), "grain"),
        (lambda: block_profile(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0), "block"),
    ],
)
def test_bad_settings(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()
