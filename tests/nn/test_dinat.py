"""dinat: parity with NATTEN's module, what the card asks for, bad input."""

import math

import pytest
import torch
from parity import Fixture
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib import masks
from attnlib.ops import attention

FIXTURE = Fixture("dinat")


def make(**config):
    torch.manual_seed(0)
    return attnlib.create("dinat", **{"dim": 8, "num_heads": 2, "kernel_size": 3, **config}).double()


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("case", sorted(FIXTURE.config))
def test_output_and_gradients_equal_the_authors(case, backend):
    module = FIXTURE.build(case)
    with attnlib.use_backend(backend):
        FIXTURE.holds(case, module, lambda m, inputs: m(inputs["x"]))


def test_undilated_is_nat():
    """Same parameters as neighborhood attention with a relative bias, and the same output."""
    ours = make()
    plain = attnlib.create("fused-neighborhood-attention", dim=8, num_heads=2, kernel_size=3, rank=2, rel_bias=True)
    plain.load_state_dict(ours.state_dict())
    x = data(1, 6, 7, 8)
    assert torch.equal(ours(x), plain.double()(x))


def test_bias_is_read_at_key_minus_query_in_units_of_dilation():
    """One entry of the table, made huge, moves all attention to that neighbour."""
    m = make(num_heads=1, dilation=2)
    torch.nn.init.zeros_(m.rpb)
    with torch.no_grad():
        m.rpb[0, 3, 2] = 1e4  # one step of dilation down, none across
        m.qkv.bias.zero_()
    x = data(1, 9, 9, 8)
    values = m.qkv(x).chunk(3, -1)[2]
    y = m(x)
    torch.testing.assert_close(y[0, :7], m.proj(values)[0, 2:], atol=1e-9, rtol=0)


def test_equal_to_dense_attention_with_mask_and_bias():
    m, x = make(kernel_size=(3, 2), dilation=(2, 3)), data(2, 7, 8, 8)
    q, k, v = (t.reshape(2, 56, 2, 4).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    i, j = attnlib.grids.coordinates((7, 8)).unbind(-1)
    down = (i[None] // 2 - i[:, None] // 2 + 2).clamp(0, 4)
    across = (j[None] // 3 - j[:, None] // 3 + 1).clamp(0, 2)
    mask = masks.neighborhood((7, 8), (3, 2), (2, 3))
    out = attention(q, k, v, mask=mask, bias=m.rpb[:, down, across], backend="eager")
    expected = m.proj(out.transpose(1, 2).reshape(2, 7, 8, 8))
    torch.testing.assert_close(m(x), expected, atol=1e-12, rtol=0)


def reach(dilations, side=56, at=(28, 28)):
    """Which input tokens a token of the output depends on, after blocks of these dilations with kernel 7."""
    x = data(1, side, side, 2).requires_grad_()
    y = x
    for d in dilations:
        y = make(dim=2, num_heads=1, kernel_size=7, dilation=d)(y)
    (grad,) = torch.autograd.grad(y[(0, *at)].sum(), x)
    return grad[0].abs().sum(-1) > 0


def test_receptive_field_grows_with_dilation():
    local = reach([1, 1])
    rows, columns = local.nonzero().T
    assert local.sum() == 13 * 13 and rows.max() - rows.min() == 12 and columns.max() - columns.min() == 12
    # Seven keys eight apart, each with seven around it, span the map but leave every eighth row out ...
    spread = reach([1, 8])
    assert spread.any(1).sum() == spread.any(0).sum() == 49 and spread[1].any() and spread[55].any()
    # ... and the stage's next block closes the gaps.
    assert reach([1, 8, 1]).all()


def test_cost_does_not_grow_with_dilation():
    """As many pairs meet at every dilation; tiles of other sizes change the arithmetic by less than a factor of two."""
    for d in (1, 2, 4, 8):
        assert int(masks.neighborhood((56,), 7, d).count(56).sum()) == 56 * 7

    def flops(d):
        m = attnlib.create("dinat", dim=8, num_heads=2, kernel_size=7, dilation=d).to("meta")
        with FlopCounterMode(display=False) as counter:
            m(torch.empty(1, 56, 56, 8, device="meta"))
        return counter.get_total_flops()

    base = flops(1)
    assert all(flops(d) <= 2 * base for d in (2, 4, 8))


def test_state_dicts_of_transformers_are_converted():
    """``attention.self.query`` and its kin become ``qkv``; ``rpb`` keeps its name."""
    m = make()
    parts = m.qkv.weight.chunk(3), m.qkv.bias.chunk(3)
    theirs = {"self.rpb": m.rpb, "output.dense.weight": m.proj.weight, "output.dense.bias": m.proj.bias}
    for name, weight, bias in zip(("query", "key", "value"), *parts, strict=True):
        theirs |= {f"self.{name}.weight": weight, f"self.{name}.bias": bias}
    other = make()
    other.load_state_dict(attnlib.convert_state_dict("dinat", theirs))
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), other.state_dict().values(), strict=True))


def test_transformers_uses_these_names():
    modeling = pytest.importorskip("transformers.models.dinat.modeling_dinat")
    source = __import__("inspect").getsource(modeling)
    for name in ("self.query = ", "self.rpb = ", "self.dense = "):
        assert name in source


@pytest.mark.parametrize("side", [7, 13])
def test_dilation_of_the_authors_fits_every_stage(side):
    """floor(side / kernel) is the largest dilation that fits; one more is refused with the reason."""
    largest = side // 3
    m = make(dilation=largest)
    assert m(data(1, side, side, 8)).shape == (1, side, side, 8)
    with pytest.raises(ValueError, match=f"possible: dilation from 1 to {largest}"):
        make(dilation=largest + 1, pad="refuse")(data(1, side, side, 8))


def test_rank_follows_the_settings():
    assert make().traits.grid_ranks == {2}
    assert make(kernel_size=(3, 3, 3)).rpb.shape == (2, 5, 5, 5)
    assert make(causal=True).traits.patterns == {"causal-self"}
    assert make(causal=True).rpb.shape == (2, 5)
    assert math.prod(make(kernel_size=7).rpb.shape) == 2 * 13 * 13


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="num_heads=3 does not divide dim=8"):
        make(num_heads=3)
    with pytest.raises(ValueError, match=r"x must have shape \(B, H, W, C\)"):
        make()(data(1, 9, 8))
    with pytest.raises(ValueError, match="larger than the grid"):
        make(pad="refuse")(data(1, 2, 9, 8))
    with pytest.raises(RuntimeError, match="size mismatch for rpb"):
        make().load_state_dict(make(kernel_size=5).state_dict())


@pytest.mark.parametrize("grid", [(2, 9), (9, 4), (3, 3)])
def test_small_maps_are_padded_as_the_authors_do(grid):
    """Zeros at the bottom and on the right, before the projections, attended; NATTEN's own module did so."""
    m = make(dilation=2, compat="authors")
    x = data(2, *grid, 8)
    padded = torch.zeros(2, *(max(n, 6) for n in grid), 8, dtype=x.dtype)
    padded[:, : grid[0], : grid[1]] = x
    plain = make(dilation=2)
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), plain(padded)[:, : grid[0], : grid[1]])
    valid = torch.ones(x.shape[:-1], dtype=torch.bool)
    valid[:, 0, 1] = False
    exists = torch.ones(padded.shape[:-1], dtype=torch.bool)
    exists[:, 0, 1] = False
    cropped = plain(padded, valid=exists)[:, : grid[0], : grid[1]]
    torch.testing.assert_close(m(x, valid=valid), cropped)


@pytest.mark.parametrize("grid", [(2, 9), (9, 4), (3, 3)])
def test_what_pads_a_small_map_is_not_there(grid):
    """Weights are those of the tokens that came in, and a mask keeps their numbers."""
    m, x, n = make(dilation=2), data(2, *grid, 8), math.prod(grid)
    allowed = torch.rand(n, n, generator=torch.Generator().manual_seed(3)) < 0.7
    out = m(x, mask=allowed, returns=("weights",))
    assert out.weights.shape[-2:] == (n, n)
    assert not out.weights[..., ~allowed].any()
    total = out.weights.sum(-1)
    torch.testing.assert_close(total, torch.where(total > 0, 1.0, 0.0).to(total.dtype))
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in m.qkv(x.flatten(1, 2)).chunk(3, -1))
    mixed = (out.weights @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out.y.flatten(1, 2), m.proj(mixed))


def test_without_a_bias_any_rank_is_taken():
    m = make(rel_bias=False)
    assert m.rpb is None and m.traits.grid_ranks == {1, 2, 3}
    assert m(data(1, 5, 8)).shape == (1, 5, 8)
    with pytest.raises(ValueError, match="compat="):
        make(compat="natten")
