"""sg-former: hybrid-scale and self-guided attention, one test per acceptance criterion of the card."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import attnlib
from attnlib.grids import block_windows, unblock_windows

FIXTURE = Path(__file__).parents[1] / "fixtures" / "sg-former.safetensors"
F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("sg-former", **{"dim": 8, "num_heads": 4, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module


CASES = {
    "hybrid": dict(role="hybrid", sr_ratio=2),
    "uneven": dict(role="hybrid", sr_ratio=4, scale=0.3, compat="authors"),  # on 14 x 7 tokens, which 4 does not divide
    "guided2": dict(role="guided", sr_ratio=2),
    "guided4": dict(role="guided", sr_ratio=4),
    "global": dict(role="global"),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_authors(case):
    data = {k.removeprefix(f"{case}."): v for k, v in load_file(FIXTURE).items() if k.startswith(f"{case}.")}
    module = attnlib.create("sg-former", dim=8, num_heads=4, **CASES[case])
    theirs = {k.removeprefix("sd."): v for k, v in data.items() if k.startswith("sd.")}
    module.load_state_dict(attnlib.convert_state_dict("sg-former", theirs))
    x = data["x"].clone().requires_grad_()
    carry = data["S"] if case.startswith("guided") else None
    y = module(x, carry=carry)
    (y * data["g"]).sum().backward()
    torch.testing.assert_close(y, data["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, data["dx"], atol=1e-5, rtol=1e-4)
    grads = {k.removeprefix("grad."): v for k, v in data.items() if k.startswith("grad.")}
    grads = attnlib.convert_state_dict("sg-former", grads)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=2e-5, rtol=1e-4)


def test_significance_on_sides_that_do_not_divide_equals_the_authors():
    data = load_file(FIXTURE)
    module = attnlib.create("sg-former", dim=8, num_heads=4, **CASES["uneven"])
    sd = {k.removeprefix("uneven.sd."): v for k, v in data.items() if k.startswith("uneven.sd.")}
    module.load_state_dict(attnlib.convert_state_dict("sg-former", sd))
    out = module(data["uneven.x"], returns=("carry",))
    torch.testing.assert_close(out.carry, data["uneven.S"], atol=1e-6, rtol=1e-5)


def test_significance_equals_the_authors():
    data = load_file(FIXTURE)
    module = attnlib.create("sg-former", dim=8, num_heads=4, role="hybrid", sr_ratio=2)
    sd = {k.removeprefix("hybrid.sd."): v for k, v in data.items() if k.startswith("hybrid.sd.")}
    module.load_state_dict(attnlib.convert_state_dict("sg-former", sd))
    out = module(data["hybrid.x"], returns=("carry",))
    torch.testing.assert_close(out.carry, data["hybrid.S"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.carry.transpose(1, 2).flatten(1), data["hybrid.S_columns"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.y, data["hybrid.y"], atol=1e-5, rtol=1e-5)
    assert not out.carry.requires_grad


def test_significance_of_uniform_attention_is_one_over_keys_for_each_half():
    module = make(role="hybrid", sr_ratio=2, window_size=4)
    with torch.no_grad():
        for layer in (module.q1, module.q2):
            layer.weight.zero_()
            layer.bias.zero_()
    out = module(torch.randn(1, 8, 8, 8, dtype=F64), returns=("carry",))
    torch.testing.assert_close(out.carry, torch.full((1, 8, 8), 1 / 16 + 1 / 16, dtype=F64))


def test_uniform_significance_and_mean_merging_read_averages_of_chunks():
    module = make(role="guided", merge=((1, 8), (2, 4), (1, 2)))
    with torch.no_grad():
        for layer in module.merge:
            layer.weight.fill_(1 / layer.in_features)
            layer.bias.zero_()
    x = torch.randn(2, 8, 8, 8, dtype=F64)
    rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
    halves = []
    q = module.q(x).flatten(1, 2).view(2, 64, 4, 2).transpose(1, 2)
    for tokens, kv, heads in ((rows, module.kv1, slice(0, 2)), (columns, module.kv2, slice(2, 4))):
        chunks = [(0, 16, 8), (16, 48, 4), (48, 64, 2)]
        keys = torch.cat([tokens[:, a:b].unflatten(1, (-1, f)).mean(2) for a, b, f in chunks], 1)
        assert keys.shape[1] == module.key_count(64) == 2 + 8 + 8
        k, v = kv(keys).view(2, -1, 2, 2, 2).permute(2, 0, 3, 1, 4)
        halves.append(F.scaled_dot_product_attention(q[:, heads], k, v))
    local = module.lepe_linear(x).permute(0, 3, 1, 2)
    local = F.conv2d(local, module.lepe_conv.weight, module.lepe_conv.bias, padding=1, groups=8).permute(0, 2, 3, 1)
    want = module.proj(torch.cat(halves, 1).transpose(1, 2).reshape(2, 8, 8, 8) + local)
    torch.testing.assert_close(module(x, carry=torch.zeros(2, 8, 8, dtype=F64)), want)


def test_a_significant_token_lands_in_the_least_merged_group_and_gains_influence():
    module = make(role="guided", sr_ratio=2)
    with torch.no_grad():
        module.merge[0].weight.fill_(1 / 2)
        module.merge[1].weight.fill_(1.0)
        module.lepe_linear.weight.zero_()
    x = torch.randn(1, 8, 8, 8, dtype=F64, requires_grad=True)
    torch.manual_seed(1)
    base = torch.rand(1, 8, 8, dtype=F64) + 1
    influence = {}
    for name, value in (("minor", 0.0), ("major", 100.0)):
        carry = base.clone()
        carry[0, 3, 5] = value
        place = (module.plan(x, carry=carry)["rows"][0] == 3 * 8 + 5).nonzero().item()
        assert (place < 32) == (name == "minor") and (place == 63) == (name == "major")
        y = module(x, carry=carry)
        others = torch.ones(8, 8, dtype=torch.bool)
        others[3, 5] = False
        (grad,) = torch.autograd.grad(y[0][others].square().sum(), x)
        influence[name] = grad[0, 3, 5].norm().item()
    assert influence["major"] > influence["minor"]


@pytest.mark.parametrize(
    ("ratio", "tokens", "keys"), [(8, 3136, 4 + 28 + 28), (4, 784, 4 + 28 + 28), (2, 196, 49 + 98)]
)
def test_key_count(ratio, tokens, keys):
    assert make(role="guided", sr_ratio=ratio).key_count(tokens) == keys


def test_window_half_is_window_attention_and_pooled_half_is_spatial_reduction():
    module = make(role="hybrid", sr_ratio=2, window_size=4)
    with torch.no_grad():
        module.lepe_linear.weight.zero_()
        module.lepe_linear.bias.zero_()
        module.lepe_conv.bias.zero_()
        module.proj.weight.copy_(torch.eye(8))
        module.proj.bias.zero_()
    x = torch.randn(2, 8, 8, 8, dtype=F64)
    y = module(x)
    pooled = F.conv2d(x.permute(0, 3, 1, 2), module.sr.weight, module.sr.bias, stride=2).flatten(2).transpose(1, 2)
    pooled = F.gelu(F.layer_norm(pooled, (8,), module.norm.weight, module.norm.bias))

    def heads(q, kv):
        k, v = kv.chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(-3, -2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)

    torch.testing.assert_close(y[..., :4], heads(module.q1(x).flatten(1, 2), module.kv1(pooled)).view(2, 8, 8, 4))
    windows = block_windows(x, 4).flatten(3, 4)
    near = heads(module.q2(windows), module.kv2(windows)).unflatten(3, (4, 4))
    torch.testing.assert_close(y[..., 4:], unblock_windows(near))


def test_ties_keep_the_order_of_their_scan():
    module = make(role="guided", sr_ratio=2)
    plan = module.plan(torch.zeros(1, 2, 6, 8, dtype=F64), carry=torch.zeros(1, 2, 6))
    assert plan["rows"].tolist() == [list(range(12))]
    assert plan["columns"].tolist() == [[0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]]


def test_a_plan_can_be_frozen():
    module = make(role="guided", sr_ratio=2)
    x, carry = torch.randn(1, 4, 4, 8, dtype=F64), torch.rand(1, 4, 4, dtype=F64)
    plan = module.plan(x, carry=carry)
    torch.testing.assert_close(module(x, plan=plan), module(x, carry=carry))
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: module(t, plan=plan), (leaf,))


def test_padding_marked_invalid_is_never_a_key_and_takes_no_part_in_the_significance():
    module = make(role="hybrid", sr_ratio=2, window_size=4)
    x = torch.randn(1, 8, 8, 8, dtype=F64)
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[:, :, :4] = True
    out = module(x, valid=valid, returns=("carry",))
    small = module(x[:, :, :4], returns=("carry",))
    torch.testing.assert_close(out.y[:, :, :4], small.y)
    torch.testing.assert_close(out.carry[:, :, :4], small.carry)
    assert (out.carry[:, :, 4:] == 0).all()


@pytest.mark.parametrize("grid", [(5, 6), (9, 3), (1, 1)])
def test_a_map_of_any_size_is_the_larger_one_with_tokens_that_do_not_exist(grid):
    m = make(role="hybrid", sr_ratio=4, window_size=3)
    x = torch.randn(2, *grid, 8, dtype=F64)
    full = torch.full((2, 12, 12, 8), float("nan"), dtype=F64)
    full[:, : grid[0], : grid[1]] = x
    valid = torch.zeros(2, 12, 12, dtype=torch.bool)
    valid[:, : grid[0], : grid[1]] = True
    out, larger = m(x, returns=("carry",)), m(full, valid=valid, returns=("carry",))
    torch.testing.assert_close(out.y, larger.y[:, : grid[0], : grid[1]])
    torch.testing.assert_close(out.carry, larger.carry[:, : grid[0], : grid[1]])


@pytest.mark.parametrize(("tokens", "keys"), [(800, 2 + 8 + 8), (49, 1 + 1 + 1), (1, 1), (2, 1 + 1)])
def test_groups_keep_their_shares_on_maps_of_any_size(tokens, keys):
    assert make(role="guided", sr_ratio=8).key_count(tokens) == keys


def test_a_group_that_its_factor_does_not_divide_begins_with_tokens_that_do_not_exist():
    m = make(role="guided", merge=((1, 4), (1, 2)))
    x = torch.randn(1, 1, 7, 8, dtype=F64)  # groups of 3 and 4
    plan = m.plan(x, carry=torch.arange(7.0).view(1, 1, 7))
    tokens, alive = m._merged(x.flatten(1, 2), plan["rows"], None)
    first = (x[0, 0, :3] * m.merge[0].weight[0, 1:, None]).sum(0) + m.merge[0].bias
    second = (x[0, 0, 3:].unflatten(0, (2, 2)) * m.merge[1].weight[0, :, None]).sum(1) + m.merge[1].bias
    torch.testing.assert_close(tokens[0], torch.cat([first[None], second]))
    assert alive is None
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: m(t, plan=plan), (leaf,))


def test_significance_does_not_change_the_output():
    module = make(role="hybrid", sr_ratio=2, window_size=4)
    x = torch.randn(1, 8, 8, 8, dtype=F64)
    torch.testing.assert_close(module(x), module(x, returns=("carry",)).y)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"role": "local"}, "role='local'"),
        ({"num_heads": 3}, "num_heads=3 does not divide dim=8"),
        ({"num_heads": 1}, "does not divide num_heads=1"),
        ({"role": "guided", "sr_ratio": 3}, "sr_ratio=3"),
        ({"role": "guided", "merge": ((1, 0),)}, "merge must hold pairs"),
        ({"merge": ((1, 2),)}, "merge=.* is for role='guided'"),
        ({"window_size": 0}, "at least 1"),
        ({"pad": "zeros"}, "pad='zeros'"),
        ({"compat": "theirs"}, "compat='theirs'"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)


def test_bad_inputs_are_refused():
    refuse = dict(pad="refuse")
    hybrid = make(role="hybrid", sr_ratio=2, window_size=4, **refuse)
    guided = make(role="guided", sr_ratio=2, **refuse)
    x = torch.zeros(1, 8, 8, 8, dtype=F64)
    with pytest.raises(ValueError, match="window_size=4 does not divide the grid"):
        hybrid(torch.zeros(1, 8, 6, 8, dtype=F64))
    with pytest.raises(ValueError, match="sr_ratio=3 does not divide the grid"):
        make(role="hybrid", sr_ratio=3, window_size=4, **refuse)(x)
    with pytest.raises(ValueError, match="sr_ratio=8 is larger than the grid"):
        make(role="hybrid", sr_ratio=8, window_size=3, compat="authors")(torch.zeros(1, 9, 6, 8, dtype=F64))
    with pytest.raises(ValueError, match="needs the significance map"):
        guided(x)
    with pytest.raises(ValueError, match=r"carry must be a significance map of shape \(1, 8, 8\), got \(1, 4, 4\)"):
        guided(x, carry=torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="multiples of 2 do"):
        guided(x[:, :3, :3], carry=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="multiples of 28 do"):
        make(role="guided", sr_ratio=8, **refuse)(x, carry=torch.zeros(1, 8, 8))
    plan = guided.plan(x, carry=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="plan was made for"):
        guided(x[:, :4], plan=plan)
    for bad in ("junk", torch.zeros(1, 8, 8, dtype=torch.long), torch.zeros(1, 4, 4), torch.zeros(1, 8, 8).to("meta")):
        with pytest.raises((TypeError, ValueError), match="carry"):
            guided(x, plan=plan, carry=bad)
    with pytest.raises(ValueError, match="takes no plan"):
        hybrid(x, plan=plan)
    with pytest.raises(ValueError, match="takes no carry"):
        make(role="global")(x, carry=torch.zeros(1, 8, 8))


def test_carry_may_be_two_lists():
    """The authors hand on both scans; they need not be those of one map."""
    m, x = make(role="guided", sr_ratio=2), torch.randn(2, 4, 6, 8, dtype=F64)
    one, other = torch.rand(2, 4, 6, dtype=F64), torch.rand(2, 4, 6, dtype=F64)
    pair = one.flatten(1), one.transpose(1, 2).flatten(1)
    torch.testing.assert_close(m(x, carry=pair), m(x, carry=one))
    plan = m.plan(x, carry=(pair[0], other.transpose(1, 2).flatten(1)))
    assert torch.equal(plan["rows"], m.plan(x, carry=one)["rows"])
    assert torch.equal(plan["columns"], m.plan(x, carry=other)["columns"])
    valid = torch.rand(2, 4, 6) > 0.3
    y = m(x, carry=pair, valid=valid, returns=("carry",))
    whole = m(x, carry=one, valid=valid, returns=("carry",))
    torch.testing.assert_close(y.y, whole.y)
    torch.testing.assert_close(y.carry[1], whole.carry.transpose(1, 2).flatten(1))
    with pytest.raises(ValueError, match=r"carry as a pair must hold two tensors of shape \(2, 24\)"):
        m(x, carry=(one, other))
