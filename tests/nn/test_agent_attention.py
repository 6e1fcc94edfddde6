"""agent-attention: one test per acceptance criterion of its card that concerns the module."""

import pytest
import torch
from parity import Fixture

import attnlib
from attnlib import Layout
from attnlib.nn.layers import merge_heads, split_heads
from attnlib.ops import attention

FIXTURE = Fixture("agent-attention")


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("agent-attention", **{"dim": 8, "num_heads": 2, "num_agents": 4, "grid": 6, **config})
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module.double()


def without_biases(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("_bias"):
                p.zero_()
    return module


@pytest.mark.parametrize("case", sorted(FIXTURE.config))
def test_output_and_gradients_equal_the_authors(case):
    module = FIXTURE.build(case)
    call = dict(layout=Layout.image(4, 4, cls=1)) if case == "deit" else {}
    FIXTURE.holds(case, module, lambda m, x: m(x["x"], **call))


def test_rows_of_the_product_of_both_maps_sum_to_1():
    # values that are all 1 come out as 1 before the convolution, whatever the two maps are
    module = make(kernel_size=0, qkv_bias=True)
    with torch.no_grad():
        module.qkv.weight[16:] = 0
        module.qkv.bias[16:] = 1
        module.proj.weight.copy_(torch.eye(8))
        module.proj.bias.zero_()
    x = torch.randn(2, 6, 6, 8).double()
    torch.testing.assert_close(module(x), torch.ones_like(x))


def test_as_many_agents_as_tokens_is_the_product_of_two_softmax_maps():
    module = without_biases(make(num_agents=36, kernel_size=0))
    x = torch.randn(2, 6, 6, 8).double()
    q, k, v = (split_heads(t, 2) for t in module.qkv(x).chunk(3, -1))
    out = attention(q, q, attention(q, k, v))
    torch.testing.assert_close(module(x), module.proj(merge_heads(out, (6, 6))))


def test_one_agent_gives_every_query_the_same_vector_plus_the_convolution():
    x = torch.randn(2, 6, 6, 8).double()
    same = make(num_agents=1, kernel_size=0)(x)
    torch.testing.assert_close(same, same[:, :1, :1].expand_as(same))
    module = make(num_agents=1)
    v = module.qkv(x).chunk(3, -1)[2]
    rest = module(x) - module.cores[0].dwc(v) @ module.proj.weight.T
    torch.testing.assert_close(rest, rest[:, :1, :1].expand_as(rest))


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        # DeiT-T: dim 192, 3 heads, 49 agents; Swin-T stage 1: dim 96, 3 heads, 9 agents, window 56
        (dict(dim=192, num_heads=3, num_agents=49, grid=14, extra_tokens=1, qkv_bias=True), (3, 49, 14, 1)),
        (dict(dim=96, num_heads=3, num_agents=9, window_size=56, qkv_bias=True), (3, 9, 56, 0)),
    ],
)
def test_parameter_count(config, theirs):
    heads, agents, side, extra = theirs
    c = config["dim"]
    tables = heads * agents * (2 * 49 + 4 * side + 2 * extra)
    expected = 3 * c * c + 3 * c + c * c + c + 9 * c + c + tables
    assert sum(p.numel() for p in make(**config).parameters()) == expected


def test_class_token_stays_out_of_the_pool_and_the_convolution():
    layout = Layout.image(6, 6, cls=1)
    module = make(extra_tokens=1)
    x = torch.randn(1, 37, 8).double()
    core = module.cores[0]
    seen = {}
    core.dwc.register_forward_hook(lambda m, args, out: seen.update(conv=args[0], out=out))
    y = module(x, layout=layout)
    q, k, v = module.qkv(x).chunk(3, -1)
    torch.testing.assert_close(seen["conv"].flatten(1, 2), v[:, 1:])
    agents = torch.nn.functional.adaptive_avg_pool2d(q[:, 1:].mT.unflatten(2, (6, 6)), 2).flatten(2).mT
    read, write = core.biases((6, 6), (6, 6), 1, 0)
    torch.testing.assert_close(read[..., 0], core.ac_bias[..., 0])
    torch.testing.assert_close(write[:, 0], core.ca_bias[:, 0])
    heads = [split_heads(t, 2) for t in (q, agents, k, v)]
    out = merge_heads(attention(heads[0], heads[1], attention(heads[1], *heads[2:], bias=read), bias=write))
    out = torch.cat([out[:, :1], out[:, 1:] + seen["out"].flatten(1, 2)], 1)
    torch.testing.assert_close(y, module.proj(out))


def test_tokens_may_stand_on_both_sides_of_the_map():
    module = make(extra_tokens=2)
    x = torch.randn(1, 38, 8).double()
    before = Layout((("a", 1), ("b", 1), ("image", (6, 6))))
    around = Layout((("a", 1), ("image", (6, 6)), ("b", 1)))
    moved = torch.cat([x[:, :1], x[:, 2:], x[:, 1:2]], 1)
    y, z = module(x, layout=before), module(moved, layout=around)
    torch.testing.assert_close(torch.cat([z[:, :1], z[:, -1:], z[:, 1:-1]], 1), y)


def test_tokens_beside_the_map_without_biases_of_their_own():
    module = make(extra_tokens=0)
    x = torch.randn(1, 39, 8).double()
    y = module(x, layout=Layout.image(6, 6, cls=1, reg=2))
    assert y.shape == x.shape and bool(y.isfinite().all())


def test_padding_by_valid_equals_the_smaller_map():
    # agents on a 3 x 3 grid of 9 x 9 and on the 2 x 2 corner of it: pool cells of 3 x 3 tokens on both
    large, small = (without_biases(make(num_agents=n, grid=g)) for n, g in ((9, 9), (4, 6)))
    small.load_state_dict({k: v for k, v in large.state_dict().items() if not k.endswith("_bias")}, strict=False)
    x = torch.randn(1, 6, 6, 8).double()
    padded = torch.randn(1, 9, 9, 8).double()
    padded[:, :6, :6] = x
    valid = torch.zeros(1, 9, 9, dtype=torch.bool)
    valid[:, :6, :6] = True
    torch.testing.assert_close(large(padded, valid=valid)[:, :6, :6], small(x))


def test_cells_without_tokens_are_no_agents():
    module = without_biases(make(num_agents=4, kernel_size=0))
    x = torch.randn(1, 6, 6, 8).double()
    valid = torch.zeros(1, 6, 6, dtype=torch.bool)
    valid[:, :3, :3] = True  # one cell of four
    y = module(x, valid=valid)
    inside = y[:, :3, :3]
    torch.testing.assert_close(inside, inside[:, :1, :1].expand_as(inside))  # one agent: one vector for all


@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (7, 3)])
def test_reduced_keys_of_any_map_ignore_invalid_tokens(grid):
    module = make(sr_ratio=2, qkv_bias=True)
    x = torch.randn(2, *grid, 8).double()
    valid = torch.rand(2, *grid) < 0.6
    other = torch.where(valid.unsqueeze(-1), x, torch.randn_like(x) * 50)
    torch.testing.assert_close(module(x, valid=valid), module(other, valid=valid))
    assert module(x).shape == x.shape


def test_bias_tables_are_interpolated_to_other_maps():
    module = make()
    core = module.cores[0]
    with torch.no_grad():
        for p in (core.an_bias, core.na_bias):
            p.fill_(2.0)
        ramp = torch.arange(6).double()
        core.ah_bias.copy_(ramp.expand_as(core.ah_bias))
        core.aw_bias.fill_(-1.0)
        core.ha_bias.zero_()
        core.wa_bias.copy_(ramp.expand_as(core.wa_bias))
    for grid in ((6, 6), (12, 9)):
        read, write = core.biases(grid, grid, 0, 0)
        rows = torch.nn.functional.interpolate(ramp.view(1, 1, 6), size=grid[0], mode="linear").flatten()
        columns = torch.nn.functional.interpolate(ramp.view(1, 1, 6), size=grid[1], mode="linear").flatten()
        torch.testing.assert_close(read[0, 0].view(grid), (1 + rows)[:, None].expand(grid))
        torch.testing.assert_close(write[1, :, 3].view(grid), (2 + columns).expand(grid))


def test_windows_are_maps_of_their_own():
    whole, windows = make(grid=3), make(window_size=3)
    windows.load_state_dict(whole.state_dict())
    x = torch.randn(1, 6, 6, 8).double()
    y = windows(x)
    for i in (0, 3):
        for j in (0, 3):
            torch.testing.assert_close(y[:, i : i + 3, j : j + 3], whole(x[:, i : i + 3, j : j + 3]))
    shifted = make(window_size=3, shift_size=1)
    torch.testing.assert_close(shifted(x), windows(x.roll((-1, -1), (1, 2))).roll((1, 1), (1, 2)))


def test_windows_that_do_not_divide_the_map_mask_their_padding():
    module = make(window_size=4)
    x = torch.randn(1, 6, 6, 8).double()
    full = torch.zeros(1, 8, 8, 8).double()
    full[:, :6, :6] = x
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[:, :6, :6] = True
    torch.testing.assert_close(module(x), module(full, valid=valid)[:, :6, :6])


def test_dropout_acts_in_training_only():
    module, x = make(attn_drop=0.5), torch.randn(1, 6, 6, 8).double()
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_agents=5), "num_agents=5 is no square; possible: 4, 9"),
        (dict(num_agents=0), "num_agents=0 is no square"),
        (dict(num_agents=(2, 0)), "num_agents=.*at least 1 on each axis"),
        (dict(num_heads=3), "num_heads=3 does not divide dim=8"),
        (dict(sr_ratio=0), "sr_ratio must be a finite number above 0"),
        (dict(kernel_size=2), "kernel_size=2 is not possible"),
        (dict(grid=0), "grid=0 must be at least 1"),
        (dict(shift_size=1), "shift_size=1 needs a window_size"),
        (dict(window_size=0), "window_size=0 must be at least 1"),
        (dict(window_size=3, sr_ratio=2), "window_size cannot be combined"),
        (dict(window_size=((2, 3), (3, 2), (1, 1))), "number of window shapes=3 does not divide num_heads=2"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_bad_calls_are_refused():
    module = make(extra_tokens=1)
    x = torch.randn(1, 38, 8).double()
    with pytest.raises(ValueError, match="layout has 2 tokens beside the grid, but .* extra_tokens=1"):
        module(x, layout=Layout.image(6, 6, cls=2))
    with pytest.raises(ValueError, match="layout adds up to 37 tokens"):
        module(x, layout=Layout.image(6, 6, cls=1))
    with pytest.raises(ValueError, match="grid 'image' must have two axes"):
        module(x, layout=Layout((("cls", 1), ("image", (37,)))))
    with pytest.raises(ValueError, match="takes no layout"):
        make(window_size=3)(x, layout=Layout.image(6, 6, cls=2))
    with pytest.raises(ValueError, match="x must have shape"):
        module(x)
    with pytest.raises(ValueError, match="host='vit' is not possible"):
        attnlib.convert_state_dict("agent-attention", {}, host="vit")


def test_tables_made_for_other_agents_are_interpolated():
    """As many agents as the tables hold: the same numbers; others: tables resized over their rows and columns."""
    plain, other = make(num_agents=4), make(num_agents=4, bias_agents=4)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 6, 8).double()
    assert torch.equal(plain(x), other(x))
    wide = make(num_agents=(3, 5), bias_agents=4)
    wide.load_state_dict(plain.state_dict())
    read, write = wide.cores[0].biases((6, 6), (6, 6), 0, 0)
    small, small_write = plain.cores[0].biases((6, 6), (6, 6), 0, 0)

    def grown(t):
        maps = t.mT.unflatten(-1, (2, 2))
        return torch.nn.functional.interpolate(maps, size=(3, 5), mode="bilinear").flatten(-2)

    torch.testing.assert_close(read.mT, grown(small))
    torch.testing.assert_close(write, grown(small_write.mT))
    assert wide(x).shape == x.shape


def test_scale_and_tables_that_keep_their_map():
    x = torch.randn(2, 4, 9, 8).double()
    module = make(scale=0.3, compat="authors")
    assert module.cores[0].scale == 0.3
    tables = [t.detach() for t in module.cores[0].biases((4, 9), (4, 9), 0, 0)]
    square = [t.detach() for t in module.cores[0].biases((6, 6), (6, 6), 0, 0)]
    assert all(torch.equal(a, b) for a, b in zip(tables, square, strict=True))
    assert module(x).shape == x.shape
    with pytest.raises(ValueError, match=r"map of \(4, 8\).*keeps the biases of a map of \(6, 6\)"):
        module(x[:, :, :8])
    with pytest.raises(ValueError, match="bias_agents=5 is no square"):
        make(bias_agents=5)


@pytest.mark.parametrize(
    ("config", "call"),
    [
        ({}, {}),
        ({"grid": (4, 6), "compat": "authors"}, {}),
        ({"extra_tokens": 1, "num_agents": 9, "bias_agents": 4}, {"layout": Layout.image(6, 6, cls=1)}),
        ({"sr_ratio": 2, "qkv_bias": True}, {}),
        ({"grid": 7, "window_size": 3, "shift_size": 1}, {}),
    ],
)
def test_deployed_lays_its_biases_out_once_and_still_serves_other_maps(config, call, monkeypatch):
    module = make(**config).eval()
    sides = (4, 6) if config.get("compat") else (6, 6)
    x = torch.randn(2, 37, 8).double() if call else torch.randn(2, *sides, 8).double()
    deployed = attnlib.deploy(module)
    torch.testing.assert_close(deployed(x, **call), module(x, **call), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(attnlib.deploy(deployed)(x, **call), deployed(x, **call), atol=0, rtol=0)
    if not (call or config.get("compat")):
        other = torch.randn(1, 5, 8, 8).double()
        torch.testing.assert_close(deployed(other), module(other), atol=1e-12, rtol=1e-12)
    for core in deployed.cores:
        monkeypatch.setattr(core, "_bias", None)  # nothing is interpolated any more
    deployed(x, **call)
