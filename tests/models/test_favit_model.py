"""FaViT: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.models.build import load_pretrained
from attnlib.nn.reduced.favit import FactorizationAttention

TINY = dict(
    embed_dims=(32, 32), depths=(1, 2), num_heads=(1, 2), sr_ratios=(2, 1), mlp_ratios=(2, 1), window_size=3,
    num_classes=5, drop_path_rate=0.0,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("favit_b0", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_layout_of_the_smallest():
    with torch.device("meta"):
        m = attnlib.create_model("favit_b0")
    inner = [[b.mixer.inner for b in stage.blocks] for stage in m.stages]
    assert all(isinstance(a, FactorizationAttention) and not a.legacy_fusion for stage in inner for a in stage)
    assert [(stage[0].dim, stage[0].num_heads, stage[0].sr_ratio, len(stage)) for stage in inner] == [
        (32, 1, 8, 2), (64, 2, 4, 2), (128, 4, 2, 6), (256, 8, 1, 2),
    ]  # fmt: skip
    assert [s.blocks[0].mlp.inner.fc1.out_features // s.blocks[0].mixer.inner.dim for s in m.stages] == [8, 6, 4, 4]
    assert m.stem.norm.eps == 1e-5 and m.stages[0].norm.eps == m.stages[0].blocks[0].mixer.norm.eps == 1e-6


@pytest.mark.parametrize("compat", [None, "authors"])
@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 38)])
def test_any_size(size, compat):
    y = tiny(compat=compat)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 32, 32)
    valid = torch.zeros(2, 32, 32, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


def test_maps_of_all_stages_are_normed():
    f = attnlib.create_model("favit_b0", **TINY, features_only=True).eval()
    maps = f(images(1, 3, 33, 40))
    assert [tuple(t.shape) for t in maps] == [(1, 32, 9, 10), (1, 32, 5, 5)]
    for t in maps:
        torch.testing.assert_close(t.mean(1), torch.zeros_like(t[:, 0]), atol=1e-5, rtol=0)


def test_released_weights_need_the_fusion_they_were_trained_with():
    with torch.device("meta"):
        names = {"block1.0.attn.fcs.0.weight": torch.zeros(14, 14, device="meta")}
        m = attnlib.create_model("favit_b0")
    with pytest.raises(ValueError, match='compat="authors"'):
        load_pretrained(m, names)


def test_convolutions_start_at_unit_gain_over_their_fan_out():
    m = attnlib.create_model("favit_b0", **{**TINY, "embed_dims": (64, 128)})
    between, block = m.stages[1].downsample, m.stages[1].blocks[0]
    for conv, fan_out in ((m.stem.proj, 64 * 49), (between.proj, 128 * 9), (block.mlp.inner.dwconv, 9)):
        assert 0.9 < conv.weight.std() / (2 / fan_out) ** 0.5 < 1.1 and not conv.bias.any()
    assert 0.019 < block.mlp.inner.fc1.weight.std() < 0.021


def test_bad_settings_are_refused():
    for name, given in (("sr_ratios", (2,)), ("mlp_ratios", (2, 2, 2))):
        with pytest.raises(ValueError, match=f"{name}="):
            tiny(**{name: given})
    with pytest.raises(ValueError, match="does not divide dim=24"):
        tiny(embed_dims=(24, 32))
    with pytest.raises(ValueError, match="compat="):
        tiny(compat="paper")
