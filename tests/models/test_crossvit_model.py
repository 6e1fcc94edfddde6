"""CrossViT: what its card asks of the exchange of class tokens and of the backbone."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.check import check
from attnlib.models.build import load_pretrained, model_entry
from attnlib.nn.dense.crossvit import ClassTokenExchange

TINY = dict(embed_dims=(8, 12), depths=((1, 2), (1, 1)), num_heads=(2, 3), num_classes=5, img_size=56)


def tiny(name="crossvit_9_224", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exchange(dims=(8, 12), heads=(2, 3)):
    torch.manual_seed(0)
    made = ClassTokenExchange(dims, heads).double()
    for p in made.parameters():
        nn.init.normal_(p, 0.1, 0.4)
    return made


def streams(a=8, b=12):
    return images(2, 5, a).double(), images(2, 10, b, seed=2).double()


def oracle(m, i, own, other, heads):
    """The new class token of stream i, head by head, written out."""

    def norm(x, layer):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    def between(x, part):
        x = norm(x, part[0])
        return (x * 0.5 * (1 + torch.erf(x / 2**0.5))) @ part[2].weight.T + part[2].bias

    c = between(own[:, :1], m.there[i])
    z, attn = norm(torch.cat([c, other[:, 1:]], 1), m.norm[i]), m.attn[i]
    q, k, v = (t @ p.weight.T + p.bias for t, p in ((z[:, :1], attn.q), (z, attn.k), (z, attn.v)))
    width, read = q.shape[-1] // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / width**0.5).softmax(-1)
        read.append(weights @ v[..., part])
    c = c + torch.cat(read, -1) @ attn.proj.weight.T + attn.proj.bias
    return between(c, m.back[i])


# ---- the exchange


def test_both_class_tokens_come_from_what_was_before_and_patches_are_untouched():
    m, (a, b) = exchange(), streams()
    new_a, new_b = m(a, b)
    assert torch.equal(new_a[:, 1:], a[:, 1:]) and torch.equal(new_b[:, 1:], b[:, 1:])
    torch.testing.assert_close(new_a[:, :1], oracle(m, 0, a, b, 3))
    torch.testing.assert_close(new_b[:, :1], oracle(m, 1, b, a, 2))


def test_claims():
    report = check(ClassTokenExchange, dims=(8, 12), num_heads=(2, 3))
    assert report.ok, str(report)


def test_cost_is_linear_in_tokens():
    m = ClassTokenExchange((16, 32), (2, 2))

    def flops(n):
        with FlopCounterMode(display=False) as counter:
            m(torch.randn(1, 1 + n, 16), torch.randn(1, 1 + n, 32))
        return counter.get_total_flops()

    assert flops(512) - flops(256) == pytest.approx(2 * (flops(256) - flops(128)), rel=1e-3)


def test_alone_with_itself_and_plain_projections_it_is_class_attention():
    m, x = exchange((8, 8), (2, 2)), images(2, 7, 8).double()
    m.there, m.back = (nn.ModuleList([nn.Identity(), nn.Identity()]) for _ in range(2))
    y, _ = m(x, x)
    z = m.norm[0](x)
    block = nn.MultiheadAttention(8, 2, batch_first=True).double()
    attn = m.attn[0]
    block.load_state_dict(
        {"in_proj_weight": torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]),
         "in_proj_bias": torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]),
         "out_proj.weight": attn.proj.weight, "out_proj.bias": attn.proj.bias}
    )  # fmt: skip
    torch.testing.assert_close(y[:, :1], x[:, :1] + block(z[:, :1], z, z, need_weights=False)[0])


def test_swapped_streams_with_swapped_weights_give_the_same():
    m, (a, b) = exchange(), streams()
    other = ClassTokenExchange((12, 8), (3, 2)).double()
    for name in ("there", "norm", "attn", "back"):
        for i in range(2):
            getattr(other, name)[i].load_state_dict(getattr(m, name)[1 - i].state_dict())
    for x, y in zip(m(a, b), other(b, a)[::-1], strict=True):
        torch.testing.assert_close(x, y)


def test_bad_streams_and_settings():
    with pytest.raises(ValueError, match="streams"):
        exchange()(*streams(8, 8))
    with pytest.raises(ValueError, match="streams"):
        exchange()(*streams(), streams()[0])
    with pytest.raises(ValueError, match="dims"):
        ClassTokenExchange((8, 12, 16), (2, 2))
    with pytest.raises(ValueError, match="num_heads"):
        ClassTokenExchange((8, 12), (2, 5))


# ---- the backbone


def test_counts_of_the_card():
    sizes = ("tiny", "small", "base", "9", "9_dagger", "15", "15_dagger", "18", "18_dagger")
    counts = [round(model_entry(f"crossvit_{s}_224").params / 1e6, 3) for s in sizes]
    assert counts == [7.015, 26.856, 105.025, 8.553, 8.777, 27.528, 28.209, 43.271, 44.267]


def test_grids_of_the_released_sizes():
    with torch.device("meta"):
        for name, grids in (("15_dagger_224", (20, 14)), ("15_dagger_384", (34, 24))):
            model = attnlib.create_model(f"crossvit_{name}")
            assert [tuple(branch.pos_embed.shape[1:]) for branch in model.stem] == [(g, g) for g in grids]


@pytest.mark.parametrize("name", ["crossvit_9_224", "crossvit_9_dagger_224"])
@pytest.mark.parametrize("size", [(1, 1), (33, 70)])
def test_any_size(name, size):
    m = tiny(name)
    maps = m.forward_intermediates(images(2, 3, *size), intermediates_only=True)
    grids = [branch.grid(size) for branch in m.stem] * 2
    assert [tuple(t.shape[1:]) for t in maps] == [(c, *g) for c, g in zip((8, 12) * 2, grids, strict=True)]
    assert all(t.isfinite().all() for t in maps)


@pytest.mark.parametrize("name", ["crossvit_9_224", "crossvit_9_dagger_224"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_pixels_that_do_not_exist_change_nothing(name, pool):
    x, valid = images(2, 3, 64, 48), torch.zeros(2, 64, 48, dtype=torch.bool)
    valid[0, :40, :24] = valid[1] = True
    m = tiny(name, global_pool=pool)
    torch.testing.assert_close(m(x.masked_fill(~valid[:, None], float("nan")), valid), m(x, valid))
    assert not torch.allclose(m(x, valid)[0], m(x)[0])


def test_features_and_heads():
    m, x = tiny(), images(2, 3, 56, 56)
    small, large = m.forward_features(x)
    assert small.shape == (2, 26, 8) and large.shape == (2, 17, 12)
    torch.testing.assert_close(m.forward_head([small, large]), m(x))
    assert m.forward_head([small, large], pre_logits=True).shape == (2, 20)
    logits = (m.head.fc[0](small[:, 0]) + m.head.fc[1](large[:, 0])) / 2
    torch.testing.assert_close(m(x), logits)
    last = tiny(features_only=True, out_indices=(-1,))(x)[0]
    torch.testing.assert_close(m.norm[1](last.movedim(1, -1)).flatten(1, 2), large[:, 1:])


def test_branches_may_be_swapped():
    m, x = tiny(), images(2, 3, 56, 56)
    streams, valids, grids = m.stem(x)
    for stage in m.stages:
        other = ClassTokenExchange((12, 8), (3, 2))
        for name in ("there", "norm", "attn", "back"):
            for i in range(2):
                getattr(other, name)[i].load_state_dict(getattr(stage.exchange, name)[1 - i].state_dict())
        stage.branches, stage.exchange = stage.branches[::-1], other
        streams = stage(streams[::-1], valids, grids[::-1])[::-1]
    torch.testing.assert_close(m.head(m.norm(streams)), tiny()(x))


def test_positions_of_another_size_are_interpolated():
    assert len(load_pretrained(tiny(img_size=84), tiny().state_dict()).resized) == 2


def test_stochastic_depth_grows_over_the_stages():
    m = tiny(drop_path_rate=0.2, depths=((1, 3), (1, 2)))
    rates = [[getattr(b.mixer.drop_path, "p", 0.0) for b in stage.branches[1]] for stage in m.stages]
    assert [r for row in rates for r in row] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [stage.exchange.drop_path.p for stage in m.stages] == pytest.approx([0.1, 0.2])


def test_another_mechanism_and_bad_settings():
    assert tiny(mechanism="sigmoid-attention")(images(1, 3, 56, 56)).shape == (1, 5)
    for settings, message in (
        (dict(embed_dims=(8,)), "embed_dims"), (dict(num_heads=(2, 5)), "num_heads"),
        (dict(depths=((1, 0),)), "depths"),
        (dict(depths=()), "depths"), (dict(embed_dims=(6, 12), num_heads=(2, 3), multi_conv=True), "multiples of 4"),
        (dict(mechanism="van-large-kernel-attention"), "mechanism"), (dict(global_pool="max"), "global_pool"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tiny(**settings)
