"""DualToken-ViT: its skeleton, global tokens through all stages, any size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.models.backbones.dual_token_vit import BiDimensional, ResidualMerging
from attnlib.models.build import load_pretrained

NAME = "dual_token_vit_lightvit_t"
TINY = dict(
    embed_dims=(8, 12, 16), depths=(1, 2, 1), num_heads=(1, 2, 2), mlp_ratios=(2, 2, 2), grid=3,
    num_classes=5, img_size=64,
)  # fmt: skip


def model(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model(NAME, **{**TINY, **settings}).eval()
    for name, p in m.named_parameters():
        if "norm" not in name:
            nn.init.normal_(p, 0, 0.3)
    return m


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_no_size_bears_the_papers_name():
    assert attnlib.list_models(family="dual-token-vit") == [NAME]
    entry = attnlib.models.build.model_entry(NAME)
    assert entry.params is None and not entry.weights


def test_bi_dimensional_attention_is_its_equation():
    torch.manual_seed(0)
    m, x = BiDimensional(8).double(), images(2, 3, 4, 8).double()
    z = F.layer_norm(x, (8,), m.norm.weight, m.norm.bias)
    g = F.gelu(z.mean((1, 2)) @ m.global_reduce.weight.T + m.global_reduce.bias)
    gates = []
    for b in range(2):
        per_token = F.gelu(z[b] @ m.local_reduce.weight.T + m.local_reduce.bias)
        both = torch.cat([per_token, g[b].expand(3, 4, -1)], -1)
        place = torch.sigmoid(both @ m.spatial_select.weight.T + m.spatial_select.bias)
        gates.append(torch.sigmoid(m.channel_select(g[b])) * place)
    torch.testing.assert_close(m(x), x * torch.stack(gates))
    assert (torch.stack(gates) < 1).all()


def test_merging_has_the_largest_beside_it():
    torch.manual_seed(0)
    m, x = ResidualMerging(3, 5).double(), images(1, 4, 6, 3).double()
    four = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    want = m.merge.reduction(m.merge.norm(four)) + m.shortcut(
        torch.stack([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]).amax(0)
    )
    torch.testing.assert_close(m(x)[0], want)
    low = -images(1, 3, 5, 3).double().abs() - 1  # zeros that are added would be the largest
    assert (m(low)[0] - m.merge(low)[0] - m.shortcut(torch.full((1, 2, 3, 3), -1.0).double())).abs().max() > 0
    valid = torch.zeros(1, 3, 5, dtype=torch.bool)
    valid[:, :2, :4] = True
    torch.testing.assert_close(m(low, valid)[0][:, :1, :2], m(low[:, :2, :4])[0])


def test_the_model_is_its_parts_and_tokens_pass_all_stages():
    m, x = model().double(), images(2, 3, 48, 64).double()
    y, _ = m.stem(x.permute(0, 2, 3, 1), None)
    assert y.shape == (2, 6, 8, 8)
    g = m.global_token.permute(1, 2, 0).expand(2, -1, -1, -1)
    for i, stage in enumerate(m.stages):
        if i:
            y, _ = stage.downsample(y)
            g = m.projections[i - 1](g)
        for block in stage.blocks:
            out = block.mixer(y, carry=g, returns=("carry",))
            y, g = out.y, out.carry
            y = y + block.mlp.inner(block.mlp.norm(y))
        torch.testing.assert_close(m.forward_intermediates(x, [i], intermediates_only=True)[0], y.permute(0, 3, 1, 2))
    torch.testing.assert_close(m(x), m.head.fc(m.norm(y).mean((1, 2))))
    before = m(x)
    with torch.no_grad():
        m.global_token.copy_(m.global_token.roll(1, 1))
    assert not torch.allclose(m(x), before)  # they know where they are


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_any_size_and_features_only(size):
    maps = model(features_only=True)(images(1, 3, *size))
    for stride, t in zip((8, 16, 32), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()
    assert model()(images(1, 3, *size)).shape == (1, 5)


@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(train):
    x = images(2, 3, 64, 48)
    valid = torch.zeros(2, 64, 48, dtype=torch.bool)
    valid[0, :32, :40] = valid[1] = True
    first, second = model().train(train), model().train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))


def test_training_recomputing_and_other_grids():
    m, again = model().train(), model().train()
    again.set_grad_checkpointing()
    x = images(2, 3, 112, 112)
    for one in (m, again):
        one(x).square().sum().backward()
    for (name, a), b in zip(m.named_parameters(), again.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad)
    assert load_pretrained(model(grid=5), model().state_dict()).resized == ["global_token"]
    torch.manual_seed(0)
    dropped = model(drop_path_rate=0.5).train()
    assert dropped(images(2, 3, 64, 64)).isfinite().all()


def test_another_mechanism_and_bad_settings():
    assert model(mechanism="softmax-attention")(images(1, 3, 64, 64)).shape == (1, 5)
    for settings, words in (
        (dict(steps=(1, 0)), "steps"), (dict(mlp_ratios=(2,)), "mlp_ratios"), (dict(grid=0), "grid"),
        (dict(alpha=2.0), "alpha"), (dict(fusion="product"), "fusion"), (dict(num_heads=(3, 2, 2)), "num_heads"),
        (dict(global_pool="token"), "global_pool"), (dict(mlp_ratios=(0, 2, 2)), "mlp_ratios"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            model(**settings)
