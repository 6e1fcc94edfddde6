import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.models.backbones.vim import Remaining, vim
from attnlib.models.build import model_entry


def tiny(**settings):
    """16 patches in a grid of 4 x 4, every block the same size."""
    return vim(**{**dict(patch_size=4, embed_dim=8, depth=4, d_state=3, img_size=16, num_classes=3), **settings}).eval()


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_counts_are_the_authors():
    for name in attnlib.list_models("vim_*") + attnlib.list_models("top_vim_*"):
        with torch.device("meta"):
            model = attnlib.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == model_entry(name).params, name
    assert model_entry("vim_tiny").params == 7_148_008 and model_entry("vim_small").params == 25_796_584


@pytest.mark.parametrize("place", ["middle", "first", "double", "none"])
def test_order_and_back(place):
    m = tiny(class_token=place, global_pool="avg")
    order, inverse = m.order(5)
    assert [order[i] for i in inverse] == list(range(len(order)))
    assert order == {"middle": [1, 2, 0, 3, 4, 5], "first": [0, 1, 2, 3, 4, 5], "double": [0, 2, 3, 4, 5, 6, 1],
                     "none": [0, 1, 2, 3, 4]}[place]  # fmt: skip


@pytest.mark.parametrize("align", ["gap", "last", "none"])
@pytest.mark.parametrize("place", ["middle", "double", "none"])
def test_keeping_all_is_no_pruning(place, align):
    m = tiny(class_token=place, global_pool="avg" if place == "none" else "token")
    want = m(IMAGES)
    torch.testing.assert_close(m.prune([0, 2], 1.0, align)(IMAGES), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(m.prune()(IMAGES), want)


def left_behind(m, images):
    """What every block hands on."""
    found = []
    hooks = [b.register_forward_pre_hook(lambda _, args: found.append((args[0], args[2]))) for b in m.stages]
    m(images)
    for hook in hooks:
        hook.remove()
    return found


def test_what_is_left_keeps_its_order_and_every_sample_its_own():
    m = tiny(prune_blocks=[0, 2], keep=[0.5, 0.75])
    calls = left_behind(m, IMAGES)
    assert [x.shape[1] for x, _ in calls] == [17, 9, 9, 7]
    assert all(isinstance(carry, Remaining) for _, carry in calls)
    first, last = calls[1][1].positions, calls[3][1].positions
    for at in (first, last):
        assert (at.diff() > 0).all() and (at == 8).any(1).all()  # the class token is always among them
    assert not torch.equal(first[0], first[1])
    for before, after in zip(first, last, strict=True):
        assert set(after.tolist()) < set(before.tolist())


def test_scores_are_clipped_sums_over_both_ways():
    m = tiny(prune_blocks=[1], keep=0.5)
    x = left_behind(m, IMAGES)[1][0]
    ways = m.stages[1].mixer.inner.both_ways(m.stages[1].mixer.norm(x))
    score = (ways.ahead.clamp(min=0) + ways.back.clamp(min=0)).sum(-1)
    score[:, 8] = torch.inf
    assert torch.equal(left_behind(m, IMAGES)[2][1].positions, score.topk(9, 1).indices.sort(1).values)


@pytest.mark.parametrize("align", ["gap", "last", "none"])
def test_a_state_that_does_not_fade_feels_no_alignment(align):
    m = tiny(prune_blocks=[0], keep=0.5)
    with torch.no_grad():
        aligned = m.prune([0], 0.5, align)(IMAGES)
        naive = m.prune([0], 0.5, "none")(IMAGES)
        assert torch.allclose(aligned, naive, atol=1e-7) == (align == "none")
        for block in m.stages:
            for scan in (block.mixer.inner.scan, block.mixer.inner.back):
                scan.A_log.fill_(-60.0)
        close = m.prune([0], 0.5, align)(IMAGES), m.prune([0], 0.5, "none")(IMAGES)
    torch.testing.assert_close(*close, atol=1e-6, rtol=1e-5)


def test_maps_of_what_was_pruned_are_zeros():
    m = tiny(prune_blocks=[1], keep=0.5)
    maps = m.forward_intermediates(IMAGES, intermediates_only=True)
    gone = [(y == 0).all(1).flatten(1).sum(1).tolist() for y in maps]
    assert gone == [[0, 0], [8, 8], [8, 8], [8, 8]]


def test_work_is_that_of_what_is_left():
    """Linear in the tokens of every block."""

    def work(**settings):
        m = tiny(img_size=32, class_token="none", global_pool="avg", **settings)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            m(torch.randn(1, 3, 32, 32))
        return counter.get_total_flops()

    whole, half = work(), work(prune_blocks=[1], keep=0.5)
    stem, head = 2 * 64 * 48 * 8, 2 * 8 * 3
    block = (whole - stem - head) / 4
    assert half - stem - head == 2 * block + 2 * block / 2


def test_absent_patches_are_not_kept():
    m = tiny(prune_blocks=[0], keep=0.5)
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[1, 8:] = False
    spoiled = torch.where(valid[:, None], IMAGES, torch.nan)
    want, got = m(torch.where(valid[:, None], IMAGES, 0.0), valid), m(spoiled, valid)
    torch.testing.assert_close(got, want)
    found = []
    hook = m.stages[1].register_forward_pre_hook(lambda _, args: found.append((args[1], args[2].positions)))
    m(spoiled, valid)
    hook.remove()
    assert found[0][0].all()  # eight patches exist, and eight are kept


def test_gradients_pass_and_checkpoints_do():
    m = tiny(prune_blocks=[1], keep=0.5, drop_path_rate=0.1).train()
    m(IMAGES).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in m.parameters())
    m = tiny()
    want = torch.autograd.grad(m(IMAGES).sum(), m.pos_embed)[0]
    m.set_grad_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(m(IMAGES).sum(), m.pos_embed)[0], want)


def test_other_sizes_and_other_mechanisms():
    assert tiny()(torch.randn(1, 3, 20, 28)).shape == (1, 3)
    m = attnlib.create_model("vim_tiny", mechanism="softmax-attention", embed_dim=32, depth=2, img_size=32)
    assert m(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_starting_values():
    torch.manual_seed(0)
    m = vim(embed_dim=64, depth=4, patch_size=4, img_size=32)
    inner = m.stages[2].mixer.inner
    assert float(inner.out_proj.weight.detach().abs().max()) <= 128**-0.5 / 2
    assert (inner.back.dt_proj.bias == 0).all() and (inner.scan.dt_proj.bias < -2).all()
    assert float(m.cls_token.detach().std()) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(class_token="last"), "class_token='last'"),
        (dict(kind="v4"), "kind='v4'"),
        (dict(prune_blocks=[4]), "prune_blocks"),
        (dict(prune_blocks=[1], keep=0.0), "keep must be"),
        (dict(prune_blocks=[1], keep=1.2), "keep must be"),
        (dict(prune_blocks=[1], keep=[0.5, 0.5]), "one number for each"),
        (dict(prune_blocks=[1], align="own"), "align='own'"),
        (dict(prune_blocks=[1], compat="authors"), "align='none'"),
        (dict(prune_blocks=[1], kind="none"), "bimamba"),
        (dict(class_token="none"), "needs a class token"),
        (dict(patch_size=8, stride=4, img_size=4), "at least one patch"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_too_little_is_left():
    with pytest.raises(ValueError, match="leaves none of 16 patches"):
        tiny(prune_blocks=[0], keep=0.05)(IMAGES)
