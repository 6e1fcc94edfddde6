"""The vision encoder of transformers' SAM under the hook protocol: windows, relative places, both kernels."""

import copy

import pytest
import torch

import attnlib
from attnlib.hooks import Intervention
from attnlib.look import Record

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2)


def tiny(implementation="sdpa", family="Sam"):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(
        vision_config=dict(
            **SMALL, output_channels=16, image_size=64, patch_size=16, mlp_dim=24, global_attn_indexes=[1],
            window_size=3, num_pos_feats=8,
        ),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4),
        mask_decoder_config=dict(
            **SMALL, mlp_dim=16, iou_head_hidden_dim=8, **({"vit_dim": 16} if family == "SamHQ" else {})
        ),
        attn_implementation=implementation,
    )  # fmt: skip
    model = getattr(transformers, family + "Model")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # what SAM starts from hardly lets an image through
            torch.nn.init.normal_(parameter, std=0.3)
    return model


PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
POINTS = torch.tensor([[[[20.0, 30.0]]], [[[5.0, 60.0]]]])


def run(model):
    return model(pixel_values=PIXELS.to(model.dtype), input_points=POINTS.to(model.dtype)).pred_masks


class Halves(Intervention):
    name = "halves"

    def on_weights(self, site, weights, rows):
        return weights / 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_weights_are_the_models_own(implementation):
    model = tiny(implementation)
    before = run(model)
    own = [layer.attn for layer in tiny("eager").vision_encoder.layers]
    seen = []
    for mine, layer in zip(own, model.vision_encoder.layers, strict=True):
        mine.load_state_dict(layer.attn.state_dict())
        layer.attn.register_forward_pre_hook(
            lambda m, args, kwargs, mine=mine: seen.append(mine(kwargs["hidden_states"])[1]), with_kwargs=True
        )
    with attnlib.attach(model, Record(what=("weights",)), part="vision_encoder") as session:
        assert run(model).equal(before)
    record = session.results["record"]
    assert [site.name for site in session.sites] == [f"vision_encoder.layers.{n}.attn" for n in (0, 1)]
    for layer, (windows, side) in enumerate([(8, 9), (2, 16)]):  # 4 x 4 tokens are 2 x 2 windows of 3 x 3
        weights = record[layer]["weights"][0]
        assert weights.shape == (windows, 2, weights.shape[2], side)
        torch.testing.assert_close(weights, seen[layer].unflatten(0, (-1, 2))[:, :, -weights.shape[2] :])
    assert run(model).equal(before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Sam", "SamHQ"])
def test_an_edit_reaches_the_masks_and_leaves(implementation, family):
    model = tiny(implementation, family).double()
    before, halved = run(model), copy.deepcopy(model)
    for layer in halved.vision_encoder.layers:
        layer.attn.proj.weight.data /= 2  # half of the weights is half of what goes into the projection
    with attnlib.attach(model, Halves(), part="vision_encoder"):
        torch.testing.assert_close(run(model), run(halved), rtol=1e-5, atol=1e-6)
    assert run(model).equal(before)


def test_sublayers_and_feed_forwards_and_one_layer_alone():
    model = tiny()
    before = run(model)

    class Nothing(Intervention):
        name = "nothing"
        shapes: list = []

        def around_sublayer(self, site, hidden, call):
            self.shapes.append(tuple(hidden.shape))
            return torch.zeros_like(call(hidden))

    acting = Nothing()
    acting.layers = [1]
    with attnlib.attach(model, acting, part="vision_encoder"):
        changed = run(model)
    assert acting.shapes == [(2, 16, 16)] and not changed.equal(before) and run(model).equal(before)
    alone = transformers.SamVisionModel(model.config.vision_config).eval()
    with attnlib.attach(alone, Record(what=("weights",))) as session:  # without the rest of SAM no part is needed
        alone(pixel_values=PIXELS)
    assert sorted(session.results["record"]) == [0, 1]


def test_gradients_pass_and_exceptions_leave_nothing():
    model = tiny()
    plain = run(model)
    pixels = PIXELS.clone().requires_grad_()
    with attnlib.attach(model, Halves(), part="vision_encoder"):
        out = model(pixel_values=pixels, input_points=POINTS).pred_masks
    assert torch.autograd.grad(out.sum(), pixels)[0].abs().sum() > 0

    class Breaks(Halves):
        name = "breaks"

        def on_weights(self, site, weights, rows):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), attnlib.attach(model, Breaks(), part="vision_encoder"):
        run(model)
    assert run(model).equal(plain)


def test_the_mask_decoder_is_reached_as_before():
    model = tiny()
    with attnlib.attach(model, Record(what=("weights",)), part="mask_decoder") as session:
        run(model)
    assert session.sites and all("mask_decoder" in site.name for site in session.sites)


def test_what_one_projection_cannot_do_is_refused():
    class Context(Intervention):
        name = "context"

        def on_context(self, site, k_source, v_source):
            return k_source, v_source

    with pytest.raises(ValueError, match="one projection"):
        attnlib.attach(tiny(), Context(), part="vision_encoder")
