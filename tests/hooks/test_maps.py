"""``Maps``: pictures of cross and joint attention, held to whole recorded maps, and their gradients."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Intervention, Maps, Record, call, with_gradient  # noqa: E402
from hooks import pipes  # noqa: E402


@pytest.fixture(scope="module")
def unet():
    return pipes.unet()


def inputs(batch=2, dtype=torch.float32, size=(16, 12)):
    torch.manual_seed(1)
    return {
        "sample": torch.randn(batch, 4, *size).to(dtype), "timestep": 3,
        "encoder_hidden_states": torch.randn(batch, 7, 16).to(dtype),
    }  # fmt: skip


def oracle(record, sites, grid, kind="cross"):
    """Mean over heads, then over layers, of whole maps of a kind at a resolution: (B, T, h, w)."""
    whole = [
        torch.cat(record.results()[s.layer]["weights"], 2).double().mean(1) for s in sites if s.kind == kind
    ]  # fmt: skip
    at = [w.transpose(1, 2).unflatten(2, grid) for w in whole if w.shape[1] == grid[0] * grid[1]]
    return torch.stack(at).mean(0)


@pytest.mark.parametrize("elements", [1 << 22, 2000])
def test_maps_are_the_mean_of_whole_maps(unet, monkeypatch, elements):
    monkeypatch.setattr(call, "BLOCK_ELEMENTS", elements)  # in one block, and in many
    maps, coarse, spans, record = Maps(), Maps((8, 6)), Maps(16, spans=[[2], [3, 5]]), Record(rows="all")
    inside = Maps(8, of="image")
    given = inputs()
    plain = unet(**given).sample
    with attnlib.attach(unet, maps, coarse, spans, inside, record) as session:
        assert torch.equal(unet(**given).sample, plain)
        with pytest.raises(ValueError, match=r"resolutions \[\(8, 6\), \(16, 12\)\]"):
            maps.take()
        fine = oracle(record, session.sites, (16, 12))
        for got, truth in (
            (maps.take((16, 12)), fine),
            (coarse.take(), oracle(record, session.sites, (8, 6))),
            (spans.take(), torch.stack([fine[:, 2], fine[:, [3, 5]].mean(1)], 1)),
            (inside.take(), oracle(record, session.sites, (8, 6), "self")),
        ):
            torch.testing.assert_close(got.double(), truth, atol=1e-6, rtol=1e-5)
        assert set(session.results["maps-2"]) == set()
        unet(**given)
        assert set(session.results["maps"]) == {(8, 6), (16, 12)} and not session.results["maps"][8, 6].requires_grad


def test_gradients_are_those_of_finite_differences():
    unet = pipes.unet().double()
    maps, given = Maps((8, 6), spans=[[1], [2, 4]]), inputs(1, torch.float64)
    with attnlib.attach(unet, maps):

        def loss(z):
            unet(**{**given, "sample": z})
            found = maps.take()
            return (found[:, 0] * found[:, 1]).sum() * 100

        with torch.no_grad(), with_gradient():
            z = given["sample"].clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss(z), z)
        with torch.no_grad():
            for seed in range(3):
                torch.manual_seed(seed)
                step = torch.randn_like(z)
                ends = [loss(given["sample"] + h * step) for h in (1e-5, -1e-5)]
                assert not ends[0].requires_grad
                numeric = (ends[0] - ends[1]) / 2e-5
                torch.testing.assert_close((slope * step).sum(), numeric, rtol=1e-6, atol=1e-9)


def test_gradients_pass_through_checkpointed_blocks(unet):
    given, found = inputs(1), []
    for checkpointed in (False, True):
        model = pipes.unet()
        if checkpointed:
            model.enable_gradient_checkpointing()
            model.train()  # blocks checkpoint in training only, in some releases
        maps = Maps(8)

        class Slope(Intervention):
            def around_denoiser(self, site, inputs, call, maps=maps):
                with with_gradient():
                    z = inputs["sample"].clone().requires_grad_()
                    call({**inputs, "sample": z})
                    found.append(torch.autograd.grad(maps.take()[:, 2].square().sum(), z)[0])
                return call(inputs)

        with torch.no_grad(), attnlib.attach(model, Slope(), maps):
            model(**given)
    assert found[0].abs().max() > 1e-6
    torch.testing.assert_close(found[1], found[0], atol=1e-8, rtol=1e-4)


def test_maps_of_joint_attention_are_its_image_rows_and_text_columns():
    pipe, given = pipes.sd3()
    maps, inside, record = Maps(), Maps(4, of="image"), Record(rows="all")
    with attnlib.attach(pipe, maps, inside, record) as session:
        pipes.sample(pipe, None, steps=1, **given)
        whole = torch.stack([e["weights"][0].double().mean(1) for e in session.results["record"].values()]).mean(0)
        layout = session.sites and maps.take().double()
        truth = whole[:, :16, 16:].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(layout, truth, atol=1e-6, rtol=1e-5)
        truth = whole[:, :16, :16].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(inside.take().double(), truth, atol=1e-6, rtol=1e-5)


def test_only_layers_at_the_resolution_are_computed_and_none_while_paused(unet, monkeypatch):
    seen, original = [], call.weight_rows

    def count(site, *args):
        seen.append(site.n_queries)
        return original(site, *args)

    monkeypatch.setattr(call, "weight_rows", count)
    maps = Maps(16)
    with attnlib.attach(unet, maps), torch.no_grad():
        unet(**inputs())
        assert seen and set(seen) == {16 * 12}
        before = maps.take()
        seen.clear()
        with maps.paused():
            unet(**inputs())
            assert not seen
            with pytest.raises(RuntimeError, match="no attention to the text was seen at resolution 16"):
                maps.take()
        unet(**inputs())
        torch.testing.assert_close(maps.take(), before)


def test_edits_before_it_are_seen(unet):
    class Half(Intervention):
        kinds = ("cross",)

        def on_weights(self, site, weights, rows):
            return weights * 0.5

    maps = Maps(8)
    with attnlib.attach(unet, Half(), maps), torch.no_grad():
        unet(**inputs())
        torch.testing.assert_close(maps.take().sum(1), torch.full((2, 8, 6), 0.5))


def test_bad_input_of_maps(unet):
    from diffusers import DiTTransformer2DModel

    model = pipes.dit().transformer
    assert isinstance(model, DiTTransformer2DModel)
    with pytest.raises(ValueError, match="Maps acts on cross/joint attention, but nothing of this model fits"):
        attnlib.attach(model, Maps())
    with pytest.raises(ValueError, match="of='words'"):
        Maps(of="words")
    with pytest.raises(ValueError, match=r"\(height, width\) or the longer side"):
        Maps((8, 8, 8))
    with pytest.raises(ValueError, match="resolution"):
        Maps(0)
    with pytest.raises(ValueError, match="leave them out with of='image'"):
        Maps(spans=[[1]], of="image")
    with pytest.raises(ValueError, match="each at least one token"):
        Maps(spans=[[]])
    maps = Maps(32)
    with attnlib.attach(unet, maps), torch.no_grad():
        unet(**inputs())
        with pytest.raises(RuntimeError, match=r"at resolution 32 .* passed: \[\(8, 6\), \(16, 12\)\]"):
            maps.take()
    maps = Maps(8, spans=[[7]])
    with attnlib.attach(unet, maps), torch.no_grad(), pytest.raises(ValueError, match="reads 7 text tokens, but spans"):
        unet(**inputs())
