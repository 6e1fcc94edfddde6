"""deformable-attention: parity with MMCV's module, reference points, levels, validity and bad input."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attnlib
from attnlib import Layout

FIXTURE = Path(__file__).parents[1] / "fixtures" / "deformable-attention.safetensors"
LEVELS = Layout((("fine", (4, 5)), ("coarse", (2, 3))))


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("deformable-attention", **{"dim": 8, "num_heads": 2, "num_points": 3, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_output_and_gradients_equal_the_authors(kind):
    data = load_file(FIXTURE)
    sd = {k.removeprefix("sd."): v for k, v in data.items() if k.startswith("sd.")}
    case = {k.removeprefix(f"{kind}."): v for k, v in data.items() if k.startswith(f"{kind}.")}
    module = attnlib.create(
        "msda", dim=8, num_heads=2, num_levels=2, num_points=3, context_layout=LEVELS, reference="learned"
    )
    missing = module.load_state_dict(attnlib.convert_state_dict("deformable-attention", sd), strict=False)
    assert missing.missing_keys == ["reference.weight", "reference.bias"] and not missing.unexpected_keys
    q, v = case["q"].clone().requires_grad_(), case["v"].clone().requires_grad_()
    y = module(q, v, context_valid=~case["pad"], carry=case["ref"])
    (y * case["g"]).sum().backward()
    torch.testing.assert_close(y, case["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q.grad, case["dq"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v.grad, case["dv"], atol=1e-5, rtol=1e-4)
    for name, p in module.named_parameters():
        if not name.startswith("reference."):
            torch.testing.assert_close(p.grad, case[f"grad.{name}"], atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # the other backend serves where no gradient is wanted
        torch.testing.assert_close(
            module(q, v, context_valid=~case["pad"], carry=case["ref"]), case["y"], atol=1e-5, rtol=1e-5
        )


def test_initial_offsets_are_rays_and_initial_weights_are_uniform():
    module = attnlib.create("deformable-attention", dim=8, num_heads=4, num_points=3, num_levels=2)
    offsets = module.sampling_offsets.bias.view(4, 2, 3, 2)
    rays = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    torch.testing.assert_close(offsets, (rays[:, None, None] * torch.arange(1, 4).view(1, 1, 3, 1)).expand(4, 2, 3, 2))
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any() and not module.attention_weights.bias.any()
    eight = attnlib.create("deformable-attention", dim=8, num_heads=8, num_points=1).sampling_offsets.bias.view(8, 2)
    torch.testing.assert_close(eight.abs().amax(-1), torch.ones(8))


def test_without_offsets_every_pixel_reads_itself():
    module = make()
    with torch.no_grad():
        module.sampling_offsets.weight.zero_()
        module.sampling_offsets.bias.zero_()
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x), module.output_proj(module.value_proj(x)))


def test_levels_of_a_layout_are_read_at_the_same_place():
    module = make(num_levels=2)
    with torch.no_grad():
        module.sampling_offsets.weight.zero_()
        module.sampling_offsets.bias.zero_()
        module.attention_weights.weight.zero_()
        module.attention_weights.bias.zero_()
    x = torch.randn(1, len(LEVELS), 8, dtype=torch.float64)
    y = module(x, layout=LEVELS)
    value = module.value_proj(x)
    fine, coarse = value[:, :20].view(1, 4, 5, 8), value[:, 20:].view(1, 2, 3, 8)
    # the centre of coarse pixel (0, 1) is (0.5, 0.25): fine column 2.0, fine row 0.5
    want = module.output_proj((coarse[:, 0, 1] + (fine[:, 0, 2] + fine[:, 1, 2]) / 2) / 2)
    torch.testing.assert_close(y[:, 21], want)


def test_carry_hands_reference_points_on_and_overrides():
    module = make(reference="learned")
    x, context = torch.randn(2, 7, 8, dtype=torch.float64), torch.randn(2, 4, 5, 8, dtype=torch.float64)
    out = module(x, context, returns=("carry",))
    torch.testing.assert_close(out.carry, module.reference(x).sigmoid())
    torch.testing.assert_close(module(x, context, carry=out.carry), out.y)
    torch.testing.assert_close(module(x, context, carry=out.carry.unsqueeze(2)), out.y)
    assert not torch.allclose(module(x, context, carry=1 - out.carry), out.y)
    box = torch.cat([out.carry, torch.full_like(out.carry, 2 * 3.0)], -1)
    # a box of 6 x 6 with 3 points and halves: offsets count fully, in units of the whole map instead of pixels
    scaled = make(reference="learned")
    with torch.no_grad():
        sizes = torch.tensor([5.0, 4.0]).repeat(2 * 3)
        scaled.sampling_offsets.weight.mul_(sizes[:, None])
        scaled.sampling_offsets.bias.mul_(sizes)
    torch.testing.assert_close(module(x, context, carry=box), scaled(x, context, carry=out.carry))


def test_padding_of_the_context_is_never_read():
    module = make()
    context = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    valid = torch.ones(2, 4, 5, dtype=torch.bool)
    valid[:, :, 3:] = False
    x = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    y = module(x, context, context_valid=valid)
    changed = context.masked_fill(~valid.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(module(x, changed, context_valid=valid), y)


def test_cost_does_not_depend_on_the_size_of_the_map():
    from torch.utils.flop_counter import FlopCounterMode

    module = attnlib.create("deformable-attention", dim=8, num_heads=2)
    counts = []
    for side in (4, 8):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, 3, 3, 8), torch.zeros(1, side, side, 8))
        counts.append(counter.get_total_flops() - 2 * side * side * 8 * 8)  # less the projection of the map
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide dim=8"),
        ({"reference": "box"}, "reference='box'"),
        ({"num_points": 0}, "num_points must be an integer of at least 1"),
        ({"value_ratio": -1.5}, "value_ratio must be a finite number above 0, got -1.5"),
        ({"value_ratio": 0.1}, "value_ratio=0.1 leaves no channel of dim=8"),
        ({"context_layout": LEVELS}, "context_layout has 2 levels, but num_levels=1"),
        ({"context_layout": Layout((("cls", 1), ("image", (2, 2)))), "num_levels": 2}, "feature maps"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)


def test_bad_inputs_are_refused():
    x, image = torch.zeros(2, 3, 3, 8, dtype=torch.float64), torch.zeros(2, 4, 5, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="1 feature maps to read, but num_levels=2"):
        make(num_levels=2)(x)
    with pytest.raises(ValueError, match="context must have shape"):
        make()(x, image.flatten(1, 2))
    with pytest.raises(ValueError, match="context adds up|layout adds up to 26 tokens"):
        make(num_levels=2, context_layout=LEVELS)(x, image.flatten(1, 2))
    with pytest.raises(ValueError, match="must be flat"):
        make(num_levels=2, context_layout=LEVELS)(x, image)
    with pytest.raises(ValueError, match="carry must hold reference points"):
        make()(x, carry=torch.zeros(2, 3, 2, 2, dtype=torch.float64))
    with pytest.raises(TypeError, match="carry must be a tensor"):
        make()(x, carry=[0.5, 0.5])
    with pytest.raises(ValueError, match="context_dim=8"):
        make()(x, image[..., :6])
    with pytest.raises(ValueError, match="needs a context"):
        make(reference="learned")(x)
    with pytest.raises(ValueError, match="layout must hold feature maps"):
        make()(torch.zeros(2, 10, 8, dtype=torch.float64), layout=Layout((("cls", 1), ("image", (3, 3)))))


def test_points_are_dealt_to_anchors_in_turn():
    m = make(num_points=4, num_anchors=2, reference="carried")
    one = make(num_points=4, reference="carried")
    one.load_state_dict(m.state_dict())
    x, maps = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 5, 8, dtype=torch.float64)
    same = torch.rand(2, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(m(x, maps, carry=same[:, :, None].expand(-1, -1, 2, -1)), one(x, maps, carry=same))
    torch.testing.assert_close(m(x, maps, carry=same), one(x, maps, carry=same))
    two = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():  # points 0 and 2 alone carry weight: the second anchor does not matter
        m.attention_weights.weight.zero_()
        m.attention_weights.bias.copy_(torch.tensor([0.0, -1e4, 0.0, -1e4]).repeat(2))
    other = two.clone()
    other[:, :, 1] = 0.5
    torch.testing.assert_close(m(x, maps, carry=two), m(x, maps, carry=other))
    with pytest.raises(ValueError, match=r"\(2, 3\) \+ \(2,\) or \(2, 2\)"):
        m(x, maps, carry=torch.rand(2, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="num_points=3 must be a multiple of num_anchors=2"):
        make(num_points=3, num_anchors=2)


def test_learned_anchors_come_back():
    m = make(num_points=4, num_anchors=2, reference="learned")
    x, maps = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 5, 8, dtype=torch.float64)
    out = m(x, maps, returns=("carry",))
    assert out.carry.shape == (2, 3, 2, 2)
    torch.testing.assert_close(m(x, maps, carry=out.carry), out.y)


def test_carried_points_have_to_come():
    m = make(reference="carried", out_proj=False)
    assert {name.split(".")[0] for name in m.state_dict()} == {"sampling_offsets", "attention_weights", "value_proj"}
    with pytest.raises(ValueError, match="reference='carried' needs reference points"):
        m(torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 5, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="out_proj=False needs dim=8"):
        make(out_proj=False, value_ratio=0.5)
