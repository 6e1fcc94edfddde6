"""EVA: what its card asks of the model. Its pretraining is in ``test_pretrain``."""

import pytest
import torch

import attnlib
from attnlib.models.build import load_pretrained, model_entry
from tests.parity import Models

TINY = dict(embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0, num_classes=5, img_size=28, patch_size=7)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("eva_giant_patch14_224", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_parameters_in_closed_form():
    dim, hidden, depth, tokens = 1408, 6144, 40, 256
    attention = 4 * dim * dim + 2 * dim + dim
    block = attention + 2 * dim * hidden + hidden + dim + 4 * dim
    rest = 3 * 14 * 14 * dim + dim + dim + (tokens + 1) * dim + 2 * dim + 1000 * dim + 1000
    assert depth * block + rest == model_entry("eva_giant_patch14_224").params == 1_012_555_112


def test_shared_tables_are_one():
    m = tiny(relative="shared")
    first, second = (b.mixer.inner.relative for b in m.stages)
    assert first is second and tiny(relative="table").stages[0].mixer.inner.relative is not None
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in tiny().parameters()) + 4 * (7 * 7 + 3)


@pytest.mark.parametrize("relative", [None, "table", "axes", "shared-axes"])
@pytest.mark.parametrize("size", [(7, 7), (45, 20)])
def test_any_size(relative, size):
    assert tiny(relative=relative)(images(1, 3, *size)).isfinite().all()


def test_tables_follow_the_size_of_images_when_loaded():
    recorded, x = Models("eva"), images(1, 3, 42, 42)
    small = recorded.build_model("tables").eval()
    config = recorded.config["tables"]
    large = attnlib.create_model(config["model"], **{**config["settings"], "img_size": 42}).eval()
    done = load_pretrained(large, small.state_dict())
    assert {n.rpartition(".")[2] for n in done.resized} == {"pos_embed", "table"}
    assert large(x).isfinite().all() and large.stages[0].mixer.inner.relative.table.shape == (3, 11, 11)


def test_how_it_starts():
    m = attnlib.create_model("eva_giant_patch14_224", **{**TINY, "embed_dim": 128, "num_classes": 50}, relative="table")
    inner = m.stages[1].mixer.inner
    assert 0.0185 < inner.q.weight.std() < 0.0215 and not inner.q.bias.any() and not inner.relative.table.any()
    assert 0.009 < inner.proj.weight.std() < 0.011 and 0.015 < m.cls_token.std() < 0.025  # 0.02 / sqrt(2 * 2)
    assert 1.8e-5 < m.head.fc.weight.std() < 2.2e-5 and not m.head.fc.bias.any()


def test_the_second_eva_starts_as_the_first_and_takes_any_size():
    torch.manual_seed(0)
    small = {k: v for k, v in TINY.items() if k != "mlp_ratio"} | dict(embed_dim=96, num_classes=50, drop_path_rate=0.0)
    m = attnlib.create_model("eva02_base_patch14_448", **small).eval()
    mlp = m.stages[1].mlp.inner
    assert mlp.gated and mlp.fc2.in_features == 256 and mlp.norm.weight.shape == (256,)
    assert 0.0185 < mlp.fc1.weight.std() < 0.0215 and not mlp.fc1.bias.any()  # no gate starts open
    assert 0.009 < mlp.fc2.weight.std() < 0.011
    inner = m.stages[0].mixer.inner
    assert (inner.rotary, inner.rotary_grid, type(inner.norm).__name__) == (10000.0, (16, 16), "Identity")
    for size in ((7, 7), (45, 20)):
        assert m(images(1, 3, *size)).isfinite().all()
    later = attnlib.create_model("eva02_enormous_patch14_clip_224", **TINY, global_pool="token")
    assert all(part.post_norm for block in later.stages for part in (block.mixer, block.mlp))
    assert attnlib.create_model("eva02_large_patch14_clip_224", **TINY).stages[0].mixer.inner.norm.eps == 1e-6


def test_bad_settings():
    with pytest.raises(ValueError, match="relative="):
        tiny(relative="both")
    with pytest.raises(ValueError, match="head_scale"):
        tiny(head_scale=-1.0)
    with pytest.raises(TypeError, match="relativ"):
        tiny(relativ="table")
