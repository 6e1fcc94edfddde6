"""The line of evidence on a vision transformer, on one of a few numbers."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("skimage")

from attnlib.bench.studies.real import vit  # noqa: E402
from attnlib.reduce import TopK  # noqa: E402


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=14, image_size=84,
    )  # fmt: skip
    return transformers.Dinov2Model(config).eval()


def test_crops_of_one_image_share_no_pixel_between_known_and_asked():
    image = torch.zeros(300, 400)
    image[:, 200:] = 1.0
    known, a, asked, b = vit.crops([image, image], 3, 4, 28)
    assert known.shape == (6, 3, 28, 28) and asked.shape == (8, 3, 28, 28) and b.tolist() == [0] * 4 + [1] * 4
    assert float(known.std((1, 2, 3)).max()) == pytest.approx(float(known[0].std())) and known.mean() < asked.mean()
    assert torch.equal(known, vit.crops([image, image], 3, 4, 28)[0])


def test_states_go_on_where_they_were_taken(model):
    pixels = torch.randn(3, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = torch.nn.functional.normalize(model(pixels).pooler_output, dim=-1)
    for layer in (1, 2):
        hidden, by_class, by_all = vit.until(model, pixels, layer, size=2)
        assert hidden.shape == (3, 37, 16) and by_class.shape == by_all.shape == (3, 36)
        assert (by_class.sum(1) < 1).all() and (by_all > 0).all()
        torch.testing.assert_close(vit.features(model, hidden, layer, size=2), truth)


def test_patches_leave_or_are_averaged():
    patches = torch.arange(16.0).view(1, 16, 1)
    scores = torch.zeros(1, 16)
    scores[0, [3, 9]] = 1
    assert vit.leave(patches, scores, TopK(2)).flatten().tolist() == [3, 9]
    assert vit.pooled(patches, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_the_line_of_the_vision_transformer(model, tmp_path):
    call = dict(
        loaded=model, keep=tmp_path / "kept.jsonl", pictures=tmp_path, images=3, known=1, asked=2, side=6,
        layers=(1, 2), counts=(18, 9, 4), seeds=(0, 1),
    )  # fmt: skip
    found = vit.measure(**call)
    json.dumps(found)
    assert {row["name"] for row in found["rows"]} >= {"random, seed 0", "regular grid", "average pooling"}
    assert len(found["seen"]["layers"]) == 3 and (tmp_path / "real-vit-cpu.svg").exists()
    again = vit.measure(progress=pytest.fail, **{**call, "pictures": None})
    assert again["rows"] == found["rows"]
