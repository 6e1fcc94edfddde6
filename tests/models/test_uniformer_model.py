"""UniFormer: what its card asks of the backbones of images and clips."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.backbones.uniformer import SplitBlock, inflate
from attnlib.models.build import load_pretrained, model_entry

TINY = dict(depths=(1, 1, 2, 1), embed_dims=(8, 8, 16, 16), head_dim=8, mlp_ratio=2.0, num_classes=5)


def tiny(name="uniformer_s", **settings):
    torch.manual_seed(0)
    m = attnlib.create_model(name, **{**TINY, **settings})
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(name, **settings):
    with torch.device("meta"):
        return round(sum(p.numel() for p in attnlib.create_model(name, **settings).parameters()) / 1e6, 3)


def test_counts_of_the_card():
    names = ("s", "s_plus", "b", "b_ls")
    assert [round(model_entry(f"uniformer_{n}").params / 1e6, 3) for n in names] == [21.545, 24.033, 49.777, 49.797]
    # The card's clips were counted without the biases of queries, keys and values that the released settings have.
    assert [count(f"uniformer_{n}_video", qkv_bias=False) for n in "sb"] == [21.388, 49.783]
    assert [count(f"uniformer_{n}_video") for n in "sb"] == [21.400, 49.813]


def test_layer_scale_stays_with_the_model_that_asked_for_it():
    scaled = tiny("uniformer_b_ls")
    gammas = [n for n, _ in scaled.named_parameters() if n.endswith("gamma")]
    assert len(gammas) == 6 and all(n.startswith(("stages.2", "stages.3")) for n in gammas)
    assert not any(n.endswith("gamma") for n, _ in tiny("uniformer_b").named_parameters())


@pytest.mark.parametrize("name", ["uniformer_s", "uniformer_s_plus"])
@pytest.mark.parametrize("size", [(1, 1), (45, 70)])
def test_any_size(name, size):
    maps = tiny(name, features_only=True)(images(2, 3, *size))
    for stride, t in zip((4, 8, 16, 32), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_clips_of_any_length_odd_ones_too(frames):
    x = images(2, 3, frames, 33, 40)
    assert tiny("uniformer_s_video")(x).shape == (2, 5)
    maps = tiny("uniformer_s_video", features_only=True)(x)
    assert [t.shape[2:] for t in maps] == [((frames + 1) // 2, -(-33 // s), -(-40 // s)) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "settings", "grid"),
    [
        ("uniformer_s", {}, (64, 48)), ("uniformer_s_plus", {}, (64, 48)), ("uniformer_s_video", {}, (4, 64, 48)),
        ("uniformer_s_video", dict(split=True), (4, 64, 48)),
    ],
)  # fmt: skip
def test_pixels_that_do_not_exist_change_nothing(name, settings, grid, train):
    x = images(2, 3, *grid)
    valid = torch.zeros(2, *grid, dtype=torch.bool)
    valid[0, ..., :32, :40] = valid[1] = True
    given = x.masked_fill(~valid[:, None], float("nan"))
    first, second = (tiny(name, **settings).train(train) for _ in range(2))
    with torch.no_grad() if not train else torch.enable_grad():
        torch.testing.assert_close(first(given, valid), second(x, valid))


def test_clips_of_equal_frames_are_the_image():
    image, clip = tiny().double(), tiny("uniformer_s_video").double()
    x = images(2, 3, 40, 48).double()
    frames = x.unsqueeze(2).expand(-1, -1, 6, -1, -1)
    clip.load_state_dict(inflate(image.state_dict(), clip, center=True))
    torch.testing.assert_close(clip(frames), image(x))
    # Divided by the frames, the same holds where no zeros beyond the ends are read, before attention spreads them.
    clip.load_state_dict(inflate(image.state_dict(), clip))
    frames = x.unsqueeze(2).expand(-1, -1, 20, -1, -1)
    ours = clip.forward_intermediates(frames, intermediates_only=True)[0]
    theirs = image.forward_intermediates(x, intermediates_only=True)[0]
    torch.testing.assert_close(ours[:, :, 5], theirs)
    assert not torch.allclose(ours[:, :, 0], theirs)


def test_inflation_accounts_for_every_entry():
    image, clip = tiny(), tiny("uniformer_s_video", num_classes=7)
    made = inflate(image.state_dict(), clip)
    assert made["head.fc.weight"].shape == (7, 16)
    load_pretrained(clip, made)
    with pytest.raises(ValueError, match="'mine', which the model of clips does not have"):
        inflate({**image.state_dict(), "mine": torch.zeros(1)}, clip)
    with pytest.raises(ValueError, match=r"stages.0.blocks.0.mixer.inner.conv.weight.* has shape"):
        inflate(image.state_dict(), tiny("uniformer_s_video", kernel_size=3))


def test_split_attention_starts_neutral_in_time_with_gradients():
    torch.manual_seed(0)
    m, x = tiny("uniformer_s_video", split=True), images(2, 3, 4, 32, 32)
    block = m.stages[2].blocks[0]
    assert isinstance(block, SplitBlock)
    tokens = images(2, 3, 2, 2, 16)
    assert torch.equal(block._within(block.temporal, tokens.movedim(1, 3), None, 3), torch.zeros(2, 2, 2, 3, 16))
    m.train()(x).square().sum().backward()
    assert block.temporal.inner.v.weight.grad.abs().max() > 0


def test_global_blocks_without_positions_do_not_know_where_tokens_are():
    m = tiny("uniformer_s_video").double()
    block, x = m.stages[2].blocks[0], images(1, 2, 3, 4, 16).double()
    nn.init.zeros_(block.position.conv.weight)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    y, moved = (block(t)[0].flatten(1, 3) for t in (x, x.flatten(1, 3)[:, order].view(x.shape)))
    torch.testing.assert_close(moved, y[:, order])


def test_starts_are_the_authors():
    m = tiny(embed_dims=(64, 64, 64, 64), head_dim=32)
    local, whole = m.stages[0].blocks[0], m.stages[2].blocks[0]
    assert whole.mixer.inner.q.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert whole.mlp.inner.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert local.mlp.inner.fc1.weight.std().item() == pytest.approx((1 / 3 / 64) ** 0.5, rel=0.1)
    assert not whole.mlp.inner.fc1.bias.any() and local.mlp.inner.fc1.bias.any()


def test_another_mechanism():
    assert tiny(mechanism="softmax-attention")(images(1, 3, 32, 32)).shape == (1, 5)
    assert tiny("uniformer_s_video", mechanism="softmax-attention")(images(1, 3, 2, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("uniformer_s", dict(head_dim=7), "head_dim=7 must divide"), ("uniformer_s", dict(split=True), "split=True"),
        ("uniformer_s_plus", dict(rank=3), "conv_stem=True"), ("uniformer_s", dict(depths=(1, 1)), "depths"),
        ("uniformer_s_video", dict(split=True, layer_scale=1.0), "split=True"), ("uniformer_s", dict(rank=1), "rank"),
    ],
)  # fmt: skip
def test_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **settings)


def test_an_image_for_clips_is_refused():
    with pytest.raises(ValueError, match=r"clips \(B, 3, T, H, W\)"):
        tiny("uniformer_s_video")(images(1, 3, 32, 32))
