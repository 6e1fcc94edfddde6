"""MSVMamba: sizes, maps of any size, pixels that do not exist, starts."""

import pytest
import torch

import attnlib
from attnlib.models.build import model_entry
from attnlib.nn.scan.msvmamba import MultiScaleSS2D
from attnlib.nn.scan.vmamba import SS2D

TINY = dict(embed_dims=(8, 12), depths=(1, 2), num_classes=5, drop_path_rate=0.0)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("msvmamba_nano", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (17, 30)])
def test_any_size(size):
    y = tiny()(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_counts():
    counts = {n: round(model_entry(f"msvmamba_{n}").params / 1e6, 2) for n in ("nano", "micro", "tiny")}
    assert counts == {"nano": 6.86, "micro": 11.88, "tiny": 33.05}


def test_released_sizes_have_states_that_leak():
    for name in attnlib.list_models("msvmamba*"):
        assert model_entry(name).settings["compat"] == "authors"
    assert tiny(compat=None).stages[0].blocks[0].mixer.inner.compat is None


def test_stages_of_one_scale():
    m = tiny(scale_stages=[1])
    kinds = [type(stage.blocks[0].mixer.inner) for stage in m.stages]
    assert kinds == [SS2D, MultiScaleSS2D]
    with pytest.raises(ValueError, match="scale_stages=\\[2\\]"):
        tiny(scale_stages=[2])


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 24, 32)
    valid = torch.zeros(2, 24, 32, dtype=torch.bool)
    valid[0, :16, :24] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


def test_start_as_the_authors_model():
    m = tiny(embed_dims=(32, 64))
    block = m.stages[1].blocks[0]
    assert 0.018 < block.mixer.inner.squeeze.fc1.weight.std().item() < 0.022
    fc1 = block.mlp.inner.fc1  # a convolution in theirs
    assert fc1.weight.abs().max() <= 1 / 8 and fc1.weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_bad_settings():
    with pytest.raises(ValueError, match="mlp='deep'"):
        tiny(mlp="deep")
