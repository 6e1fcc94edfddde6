"""Scaling on scales: held to the authors' function, and to what the card says."""

import json

import pytest
import torch
from parity import HERE
from safetensors import safe_open
from torch import nn

from attnlib.models.build import create_model
from attnlib.models.multiscale import MultiScale


class Small(nn.Module):
    """What was recorded: patches, a convolution across them, two prefix tokens."""

    def __init__(self):
        super().__init__()
        self.patch, self.mix, self.cls = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 6, 3, 1, 1), nn.Linear(6, 12)

    def map(self, x):
        return torch.tanh(self.mix(self.patch(x)))

    def forward(self, x):
        tokens = self.map(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls(tokens.mean(1)).view(len(x), 2, 6), tokens], 1)


with safe_open(HERE / "scaling-on-scales.safetensors", "pt") as f:
    TENSORS = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    CONFIG = json.loads(f.metadata()["config"])


def small():
    model = Small()
    model.load_state_dict({k[3:]: v for k, v in TENSORS.items() if k.startswith("sd/")})
    return model


@pytest.mark.parametrize("case", CONFIG)
def test_equals_the_authors(case):
    theirs = CONFIG[case]
    ours = {"scales": theirs["scales"], "resize_to": theirs.get("resize_output_to_idx", 0)}
    ours |= {k: theirs[k] for k in ("max_split_size", "split_forward") if k in theirs}
    model, x = small(), TENSORS["x"].clone().requires_grad_()
    y = MultiScale(model, num_prefix_tokens=2, **ours)(x)
    torch.testing.assert_close(y, TENSORS[f"{case}/tokens"])
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, TENSORS[f"{case}/dx"], rtol=1e-4, atol=1e-5)
    first = MultiScale(model.map, layout="channels_first", **ours)(TENSORS["x"])
    torch.testing.assert_close(first, TENSORS[f"{case}/map"])
    last = MultiScale(lambda x: model.map(x).movedim(1, -1), layout="channels_last", **ours)(TENSORS["x"])
    torch.testing.assert_close(last, first.movedim(1, -1))


def test_one_scale_is_the_model_exactly():
    x = torch.randn(2, 3, 16, 24)
    for model, layout in ((small(), "tokens"), (small().map, "channels_first")):
        prefix = 2 if layout == "tokens" else 0
        assert torch.equal(MultiScale(model, [1], layout, prefix)(x), model(x))


def test_tiles_of_an_embedding_of_patches_are_the_whole_image():
    """Nothing crosses a patch, so that cutting changes nothing; larger maps are averaged."""
    embed, x = nn.Conv2d(3, 6, 4, 4), torch.randn(2, 3, 16, 24)
    y = MultiScale(embed, [1, 2], "channels_first")(x)
    large = nn.functional.interpolate(x, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(y[:, 6:], nn.functional.avg_pool2d(embed(large), 2))
    assert MultiScale(embed, [1, 2], "channels_first", resize_to=1)(x).shape == (2, 12, 8, 12)


def test_a_constant_image_looks_alike_at_every_scale():
    y = MultiScale(small(), [1, 2, 3], num_prefix_tokens=2)(torch.full((1, 3, 16, 16), 0.7))
    for block in y.split(6, -1)[1:]:
        torch.testing.assert_close(block[:, :2], y[..., :6][:, :2])


def test_splitting_runs_as_many_tiles_as_images_and_gives_the_same():
    sizes = []

    def model(x):
        sizes.append(len(x))
        return embed(x)

    embed, x = nn.Conv2d(3, 6, 4, 4), torch.randn(2, 3, 16, 16)
    whole = MultiScale(model, [1, 3], "channels_first")(x)
    assert sizes == [2, 18]
    sizes.clear()
    torch.testing.assert_close(MultiScale(model, [1, 3], "channels_first", split_forward=True)(x), whole)
    assert sizes == [2] * 10


def test_a_vision_transformer_of_the_library():
    torch.manual_seed(0)
    vit = create_model(
        "vit_tiny_patch16_224", patch_size=4, img_size=16, embed_dim=24, depth=1, num_heads=2, features_only=True
    ).eval()
    wide = MultiScale(lambda x: vit(x)[-1], [1, 2], "channels_first", multiple=4)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert wide(x).shape == (1, 48, 4, 4)
        torch.testing.assert_close(wide(x)[:, :24], vit(x)[-1])


def test_bad_input():
    model, x = small().map, torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="1.5 gives a height of 24 pixels in 2 tiles of 12.*multiples of 8"):
        MultiScale(model, [1, 1.5], "channels_first", multiple=8)(x)
    with pytest.raises(ValueError, match="scales"):
        MultiScale(model, [1, 2.2], "channels_first", max_split_size=17)(x)
    with pytest.raises(ValueError, match="at least one factor"):
        MultiScale(model, [])
    with pytest.raises(ValueError, match="resize_to"):
        MultiScale(model, [1], resize_to=1)
    with pytest.raises(ValueError, match="num_prefix_tokens=1 needs layout"):
        MultiScale(model, [1], "channels_first", num_prefix_tokens=1)
    with pytest.raises(ValueError, match="no grid"):
        MultiScale(small(), [1], num_prefix_tokens=1)(x)
    with pytest.raises(ValueError, match="4 axes"):
        MultiScale(small(), [1], "channels_last")(x)
    fixed = nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.Flatten(1), nn.Linear(32, 8), nn.Unflatten(1, (2, 4)))
    with pytest.raises(ValueError, match="cannot take tiles of 12 x 12"):
        MultiScale(fixed, [1.5])(x)
