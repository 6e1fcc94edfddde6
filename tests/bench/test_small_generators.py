import pytest
import torch

from attnlib.bench.worlds import models, painter

diffusers = pytest.importorskip("diffusers")


def test_every_word_of_a_caption_is_one_token():
    tokens = models.tokenizer()
    assert tokens.model_max_length == 32 and tokens.decode(tokens("a red thing")["input_ids"][1:-1]) == "a red thing"
    assert all(len(tokens(w)["input_ids"]) == 3 for w in painter.WORDS)
    assert len(tokens("zebra")["input_ids"]) > 4
    assert models.token_numbers(["a red star", ""], 9).shape == (2, 9)


def test_parts_are_small(untrained_generators):
    size = {n: sum(f.stat().st_size for f in (untrained_generators / n).iterdir()) / 1e6 for n in models.PARTS}
    assert max(size.values()) < 5 and sum(size.values()) < 20


def test_each_loads_as_an_ordinary_pipeline(untrained_generators, monkeypatch):
    monkeypatch.setenv("ATTNLIB_DIFFUSION_WEIGHTS", str(untrained_generators))
    given = dict(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0))
    for name, cls in models.PIPELINES.items():
        pipe = models.pipeline(name)
        assert isinstance(pipe, getattr(diffusers, cls))
        if name == "dit":
            assert pipe.get_label_ids(["red star"]) == [8 * painter.SHAPES.index("star")]
            images = torch.from_numpy(pipe([3], **{**given, "output_type": "np"}).images).permute(0, 3, 1, 2)
        else:
            images = pipe("a red star left of a blue ring", **given).images
        side = 32 if name == "pixel" else 64
        assert images.shape == (1, 3, side, side) and images.isfinite().all(), name
    wide = models.text_encoder(projected=True)
    ids = models.token_numbers(["a red star"])
    text = models.part("clip").get_text_features(input_ids=ids)
    text = text if isinstance(text, torch.Tensor) else text.pooler_output
    torch.testing.assert_close(wide(ids).text_embeds, text)
    torch.testing.assert_close(models.text_encoder()(ids)[0], wide(ids).last_hidden_state)
    shown = painter.paint(painter.sample(2)).images
    pixels = models.feature_extractor()(list((shown * 255).byte()), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, shown * 2 - 1, rtol=0, atol=0.01)
    seen = models.part("clip").get_image_features(pixel_values=pixels)
    seen = seen if isinstance(seen, torch.Tensor) else seen.pooler_output
    torch.testing.assert_close(models.image_encoder()(pixels).image_embeds, seen)


def test_a_part_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"holds no trained 'vae': .*/train.py vae"):
        models.part("vae", tmp_path)
    with pytest.raises(ValueError, match="name"):
        models.pipeline("flux", tmp_path)
    monkeypatch.setenv("ATTNLIB_DIFFUSION_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no trained generators in .*nowhere"):
        models.weights()
    assert models.missing_parts(["unet", "judge"]) == ["unet", "judge"]


def test_what_is_given_need_not_be_trained(untrained_generators, tmp_path):
    import shutil

    for name in ("text", "vae"):
        shutil.copytree(untrained_generators / name, tmp_path / name)
    own = models.build("unet")
    pipe = models.pipeline("unet", tmp_path, unet=own)
    assert pipe.unet is own
    with pytest.raises(FileNotFoundError, match="holds no trained 'unet'"):
        models.pipeline("unet", tmp_path)
