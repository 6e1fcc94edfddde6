"""Adapters that are not merged: saved as such, there again in what is loaded, and trained on, merged or taken away."""

import pytest
import torch
from test_conversion import AUTO, MODELS, predict

from attnlib import convert
from attnlib.convert.saved import read_entry

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


def adapted(name):
    """A converted model whose adapters do something."""
    make, batch, to, settings = MODELS[name]
    conversion = convert.linearize(make(), to, **settings)
    conversion.lora(rank=2, alpha=3)
    with torch.no_grad():
        for p in conversion.trained("adapters"):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 4)
    return conversion, batch()


@pytest.mark.parametrize("name", AUTO)
def test_plain_transformers_loads_them(name, tmp_path):
    conversion, batch = adapted(name)
    expected = predict(conversion.model, batch)
    conversion.save(tmp_path)
    again = getattr(transformers, AUTO[name]).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(predict(again, batch), expected)
    state = conversion.model.state_dict()
    assert set(again.state_dict()) == set(state)
    assert all(t.equal(state[key]) for key, t in again.state_dict().items())
    conversion.merge()
    assert conversion.trained() and torch.allclose(predict(conversion.model, batch), expected, atol=1e-5)
    conversion.save(tmp_path / "merged")
    assert read_entry(tmp_path / "merged")["adapters"] is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "unet", "backbone"])
def test_a_conversion_goes_on_where_it_was_saved(name, tmp_path):
    make, _, to, _ = MODELS[name]
    conversion, batch = adapted(name)
    expected, plain = predict(conversion.model, batch), predict(make(), batch)
    conversion.save(tmp_path)
    again = convert.load(make(), tmp_path)
    assert again.to == to and len(again.trained("adapters")) == len(conversion.trained("adapters"))
    torch.testing.assert_close(predict(again.model, batch), expected)
    if isinstance(batch, dict):
        ours = again.fit([batch], "prediction", train="adapters", steps=2, lr=1e-3)
        assert ours == pytest.approx(conversion.fit([batch], "prediction", train="adapters", steps=2, lr=1e-3))
    before = predict(again.model, batch)
    again.merge()
    torch.testing.assert_close(predict(again.model, batch), before, atol=1e-5, rtol=1e-4)
    again.restore()
    assert predict(again.model, batch).equal(plain)


def test_a_folder_without_a_conversion_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no conversion"):
        convert.load(MODELS["llama"][0](), tmp_path)
    MODELS["llama"][0]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no conversion"):
        convert.load(MODELS["llama"][0](), tmp_path)
    adapted("llama")[0].save(tmp_path)
    with pytest.raises(ValueError, match="does not have"):
        convert.load(MODELS["gpt2"][0](), tmp_path)
