"""biformer: bi-level routing attention, one test per acceptance criterion of its card that concerns the module."""

import itertools

import pytest
import torch
from parity import Fixture

import attnlib
from attnlib.grids import block_windows, unblock_windows
from attnlib.nn.layers import merge_heads, split_heads
from attnlib.ops import attention
from attnlib.ops.block_sparse import BlockPlan

FIXTURE = Fixture("biformer")


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("biformer", **{"dim": 8, "num_heads": 2, "n_win": 4, "topk": 3, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module


def dense(module, x, mask=None):
    """The module's tokens reading all tokens, or those that ``mask`` allows, with its scale and LePE."""
    q, k, v = module.qkv(x).split([module.qk_dim, module.qk_dim, module.dim], -1)
    heads = (split_heads(t, module.num_heads) for t in (q, k, v))
    out = merge_heads(attention(*heads, scale=module.scale, mask=mask, backend="eager"), x.shape[1:3])
    return module.proj(out + module.lepe(v))


@pytest.mark.parametrize("case", sorted(FIXTURE.config))
def test_output_and_gradients_equal_the_authors(case):
    module = FIXTURE.build(case)
    FIXTURE.holds(case, module, lambda m, x: m(x["x"]))


def test_authors_classes_agree_where_regions_divide_the_map():
    x = torch.randn(1, 8, 8, 8).double()
    plain = make(n_win=4)
    for compat in ("authors", "authors-nchw"):
        other = make(n_win=4, compat=compat)
        torch.testing.assert_close(other(x), plain(x))


def test_all_regions_chosen_equals_full_attention():
    module, x = make(topk=16), torch.randn(2, 8, 8, 8).double().requires_grad_()
    ours, full = module(x), dense(module, x)
    torch.testing.assert_close(ours, full)
    g = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad((ours * g).sum(), x)[0], torch.autograd.grad((full * g).sum(), x)[0])


def test_all_regions_chosen_equals_full_attention_on_a_map_that_needs_padding():
    module, x = make(n_win=3, topk=9), torch.randn(2, 7, 8, 8).double()
    torch.testing.assert_close(module(x), dense(module, x))


def test_order_of_chosen_regions_is_irrelevant():
    module, x = make(), torch.randn(1, 8, 8, 8).double()
    plan = module.plan(x)
    turned = BlockPlan(plan.index.flip(-1), plan.q_block, plan.k_block, plan.n, plan.m)
    torch.testing.assert_close(module(x, plan=turned), module(x))


def one_hot_regions(module, n_win=4, side=2):
    """A map whose region r has the feature e_r, and a module whose queries equal its keys equal its input."""
    regions = torch.eye(n_win * n_win).double() * 5
    x = regions.view(1, n_win, n_win, 1, 1, -1).expand(1, n_win, n_win, side, side, -1)
    with torch.no_grad():
        eye = torch.eye(module.dim).double()
        module.qkv.weight.copy_(torch.cat([eye, eye, eye]))
        module.qkv.bias.zero_()
    return unblock_windows(x)


def test_top_1_with_one_hot_regions_selects_the_own_region():
    module = make(dim=16, topk=1)
    x = one_hot_regions(module)
    plan = module.plan(x)
    assert plan.index[0, 0, :, 0].tolist() == list(range(16))


def test_top_1_of_random_regions_with_equal_queries_and_keys_is_window_attention():
    module = make(dim=16, topk=1)
    base = one_hot_regions(module)
    x = base + 0.3 * torch.randn_like(base)
    windows = block_windows(x, 2).flatten(1, 2).flatten(0, 1)  # (regions, 2, 2, C)
    q, k, v = module.qkv(windows).chunk(3, -1)
    out = merge_heads(attention(*(split_heads(t, 2) for t in (q, k, v)), scale=module.scale))
    out = unblock_windows(out.view(1, 4, 4, 2, 2, 16))
    expected = module.proj(out + module.lepe(module.qkv(x).chunk(3, -1)[2]))
    torch.testing.assert_close(module(x), expected)


def test_routing_is_integer_and_carries_no_gradient():
    module = make()
    x = torch.randn(1, 8, 8, 8).double().requires_grad_()
    plan = module.plan(x)
    assert plan.index.dtype == torch.int64 and plan.index.shape == (1, 1, 16, 3) and not plan.index.requires_grad
    frozen, free = module(x, plan=plan), module(x)
    torch.testing.assert_close(frozen, free)
    g = torch.randn_like(free)
    a, b = (torch.autograd.grad((y * g).sum(), [x, module.qkv.weight]) for y in (frozen, free))
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_soft_routing_lets_the_choice_be_trained():
    module = make(soft_routing=True, diff_routing=True, param_routing=True)
    module(torch.randn(1, 8, 8, 8).double()).square().sum().backward()
    assert module.router.weight.grad.abs().max() > 0
    hard = make(soft_routing=True)
    x = torch.randn(1, 8, 8, 8).double()
    a = torch.autograd.grad(hard(x).square().sum(), hard.qkv.weight)[0]
    soft = make(soft_routing=True, diff_routing=True)
    soft.load_state_dict(hard.state_dict())
    b = torch.autograd.grad(soft(x).square().sum(), soft.qkv.weight)[0]
    torch.testing.assert_close(soft(x), hard(x))
    assert (a - b).abs().max() > 1e-6


def test_plan_reports_density_and_is_shared_by_heads():
    plan = make(topk=4).plan(torch.randn(3, 8, 8, 8).double())
    assert plan.density == 0.25 and plan.index.shape[:2] == (3, 1)


def test_regions_without_tokens_are_never_chosen():
    module, x = make(topk=4), torch.randn(1, 8, 8, 8).double()
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[:, :, 2:] = False  # four regions remain
    chosen = module.plan(x, valid=valid).chosen()
    assert set(chosen.nonzero()[:, -1].tolist()) == {0, 4, 8, 12}
    valid[:, 2:] = False  # one region remains, fewer than top-k
    assert bool((module.plan(x, valid=valid).count == 1).all())
    y = module(x, valid=valid)
    alone = dense(module, x[:, :2, :2])
    torch.testing.assert_close(y[:, :2, :2], alone)


def test_a_padded_batch_equals_the_smaller_map():
    # regions of 2 x 2 on both: 6 x 6 with three per side is the corner of 8 x 8 with four per side
    small, large = make(n_win=3, topk=9), make(n_win=4, topk=16)
    x = torch.randn(1, 6, 6, 8).double()
    padded = torch.randn(1, 8, 8, 8).double()
    padded[:, :6, :6] = x
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[:, :6, :6] = True
    torch.testing.assert_close(large(padded, valid=valid)[:, :6, :6], small(x))


@pytest.mark.parametrize(
    ("kind", "compat"),
    [
        *itertools.product(["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"], [None, "authors"]),
        ("identity", "authors-nchw"),
    ],
)
def test_pooled_keys_ignore_invalid_tokens(kind, compat):
    module = make(n_win=2, topk=2, kv_downsample=kind, kv_per_win=2, kv_downsample_ratio=2, compat=compat)
    x = torch.randn(2, 8, 8, 8).double()
    valid = torch.rand(2, 8, 8) < 0.5
    valid[1, :4, :4] = False
    other = torch.where(valid.unsqueeze(-1), x, torch.randn_like(x) * 100)
    torch.testing.assert_close(module(x, valid=valid), module(other, valid=valid))


def test_pooling_by_constant_cells_equals_attention_to_the_cells():
    module = make(n_win=2, topk=4, kv_downsample="avgpool", kv_downsample_ratio=2, side_dwconv=0)
    cells = torch.randn(1, 4, 4, 8).double()
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)
    q, k, v = module.qkv(cells).chunk(3, -1)
    small = module.proj(merge_heads(attention(*(split_heads(t, 2) for t in (q, k, v)), scale=module.scale), (4, 4)))
    torch.testing.assert_close(module(x), small.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_padding_is_attended_only_on_request():
    x = torch.randn(1, 7, 8, 8).double()
    ours, first, second = (make(n_win=3, topk=2, compat=c)(x) for c in (None, "authors", "authors-nchw"))
    assert (ours - first).abs().max() > 1e-3 and (ours - second).abs().max() > 1e-3


def test_scale_is_of_the_whole_width_unless_given():
    assert make(qk_dim=4).scale == 0.5 and make(scale=0.1).scale == 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide dim=8; possible: "),
        (dict(qk_dim=5), "num_heads=2 does not divide qk_dim=5"),
        (dict(topk=17), "topk=17 is not possible with 4 x 4 regions; choose 1 to 16"),
        (dict(topk=0), "topk=0"),
        (dict(n_win=(2, 2, 2)), r"n_win=\(2, 2, 2\) names 3 axes"),
        (dict(n_win=0), "n_win=0 must be at least 1"),
        (dict(side_dwconv=4), "side_dwconv=4 is not possible"),
        (dict(kv_downsample="conv"), "kv_downsample='conv' is not possible; choose one of"),
        (dict(kv_per_win=0), "kv_per_win and kv_downsample_ratio must be at least 1"),
        (dict(diff_routing=True), "diff_routing=True needs soft_routing=True"),
        (dict(soft_routing=True, param_routing=True), "param_routing=True needs diff_routing=True"),
        (dict(compat="paper"), "compat='paper' is not possible"),
        (dict(compat="authors-nchw", soft_routing=True), "authors-nchw' has neither soft_routing"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_bad_calls_are_refused():
    module, x = make(), torch.randn(1, 8, 8, 8).double()
    with pytest.raises(ValueError, match=r"x must have shape \(B, H, W, C\)"):
        module(x.flatten(1, 2))
    with pytest.raises(ValueError, match="x has 6 channels"):
        module(x[..., :6])
    with pytest.raises(ValueError, match="plan was made for N=64, but the input has N=256"):
        module(torch.randn(1, 16, 16, 8).double(), plan=module.plan(x))
    with pytest.raises(ValueError, match="plan was made for q_block=4, but the input has q_block=16"):
        make(n_win=2)(x, plan=module.plan(x))
    with pytest.raises(TypeError, match="plan must be a BlockPlan"):
        module(x, plan=attnlib.Plan("blocks", {}))
    with pytest.raises(ValueError, match="takes no mask"):
        module(x, mask=torch.ones(64, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="kv_downsample_ratio=4 is larger than the regions of 2 x 2"):
        make(kv_downsample="avgpool", compat="authors")(x)
    with pytest.raises(ValueError, match="3 tokens on axis 1 .* fewer than n_win=4"):
        make(compat="authors-nchw")(x[:, :, :3])


@pytest.mark.parametrize("kind", ["avgpool", "maxpool"])
def test_cells_that_do_not_divide_a_region_pool_what_there_is(kind):
    """Regions of 3 x 3 in cells of 2: the last row and column are cells of their own; the authors leave them out."""
    config = dict(n_win=2, topk=2, kv_downsample=kind, kv_downsample_ratio=2)
    x = torch.randn(2, 6, 6, 8).double()
    t = x.unflatten(1, (2, 3)).unflatten(3, (2, 3)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)
    for compat, side in ((None, 2), ("authors", 1)):
        module = make(**config, compat=compat)
        cells, exists = module._shrink(t, None)
        pool = torch.mean if kind == "avgpool" else torch.amax
        parts = [(slice(0, 2), slice(2, 3))[i] for i in range(side)]
        expected = torch.stack([pool(t[:, :, a, b], dim=(2, 3)) for a in parts for b in parts], 2)
        torch.testing.assert_close(cells, expected)
        assert exists is None and module(x).shape == x.shape


def test_maps_that_regions_do_not_divide_are_refused_on_request():
    module = make(pad="refuse", kv_downsample="avgpool", kv_downsample_ratio=2)
    assert module.traits.grid_multiple == 8 and make(pad="refuse").traits.grid_multiple == 4
    x = torch.randn(1, 8, 8, 8).double()
    assert module(x).shape == x.shape
    with pytest.raises(ValueError, match=r"n_win=4 does not divide axis 1 .*pad='refuse'"):
        module(x[:, :, :7])
    with pytest.raises(ValueError, match="kv_downsample_ratio=2 does not divide the regions of 1 x 2"):
        module(x[:, :4])
    with pytest.raises(ValueError, match="pad='zeros'"):
        make(pad="zeros")
