"""focalnet: focal modulation, one test per acceptance criterion of its card that concerns the module."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import attnlib

FIXTURE = Path(__file__).parents[1] / "fixtures" / "focalnet.safetensors"


def make(**config):
    torch.manual_seed(0)
    module = attnlib.create("focalnet", **{"dim": 8, **config}).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return module


@pytest.mark.parametrize(
    ("case", "config"),
    [("a", {}), ("b", {"normalize_modulator": True, "use_postln_in_modulation": True})],
)
def test_output_and_gradients_equal_the_authors(case, config):
    data = {k.removeprefix(f"{case}."): v for k, v in load_file(FIXTURE).items() if k.startswith(f"{case}.")}
    module = attnlib.create("focalnet", dim=6, focal_window=3, focal_level=2, **config)
    theirs = {k.removeprefix("sd."): v for k, v in data.items() if k.startswith("sd.")}
    module.load_state_dict(attnlib.convert_state_dict("focalnet", theirs))
    x = data["x"].clone().requires_grad_()
    y = module(x)
    (y * data["g"]).sum().backward()
    torch.testing.assert_close(y, data["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, data["dx"], atol=1e-5, rtol=1e-5)
    grads = {k.removeprefix("grad."): v for k, v in data.items() if k.startswith("grad.")}
    grads = attnlib.convert_state_dict("focalnet", grads)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("levels", "window"), [(2, 3), (3, 3), (3, 5), (4, 3)])
def test_parameter_count(levels, window):
    c, m = 8, attnlib.create("focalnet", dim=8, focal_level=levels, focal_window=window)
    f = c * (2 * c + levels + 1) + 2 * c + levels + 1
    convs = sum((window + 2 * i) ** 2 * c for i in range(levels))
    assert sum(p.numel() for p in m.parameters()) == f + convs + 2 * (c * c + c)


@pytest.mark.parametrize(("levels", "fields"), [(2, (3, 7)), (3, (3, 7, 13))])
def test_receptive_field_of_each_level(levels, fields):
    module = make(focal_level=levels)
    assert module.receptive_fields() == fields
    for level in range(levels):
        # gates: only this level; their weights zero, so that the gate of a pixel is its bias alone
        with torch.no_grad():
            module.f.weight[16:] = 0
            module.f.bias[16:] = 0
            module.f.bias[16 + level] = 1
        x = torch.randn(1, 17, 17, 8, dtype=torch.float64, requires_grad=True)
        reach = torch.autograd.grad(module.modulator(x)[0][0, 8, 8].sum(), x)[0].abs().sum(-1)[0] > 0
        half = fields[level] // 2
        want = torch.zeros(17, 17, dtype=torch.bool)
        want[8 - half : 9 + half, 8 - half : 9 + half] = True
        assert torch.equal(reach, want)


def test_global_level_makes_every_output_depend_on_every_pixel():
    x = torch.randn(1, 12, 12, 8, dtype=torch.float64, requires_grad=True)
    reach = torch.autograd.grad(make()(x)[0, 0, 0].sum(), x)[0].abs().sum(-1)
    assert (reach > 0).all()


def test_without_the_global_gate_the_operator_is_strictly_local():
    module = make()
    with torch.no_grad():
        module.f.weight[-1] = 0
        module.f.bias[-1] = 0
    x = torch.randn(1, 12, 12, 8, dtype=torch.float64)
    y = module(x)
    far = x.clone()
    far[0, 0, 0] += 100.0
    changed = (module(far) - y).abs().sum(-1)[0] > 0
    assert changed[:4, :4].any() and not changed[4:].any() and not changed[:, 4:].any()


def test_level_zero_gates_by_the_mean_and_is_permutation_equivariant():
    module = make(focal_level=0)
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    q, z, g = module.f(x).split([8, 8, 1], -1)
    want = module.proj(q * module.h(g * torch.nn.functional.gelu(z.mean((1, 2), keepdim=True))))
    torch.testing.assert_close(module(x), want)
    order = torch.randperm(20)
    shuffled = x.flatten(1, 2)[:, order].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x).flatten(1, 2)[:, order].view_as(x))
    assert module.traits.permutation_equivariant and not make().traits.permutation_equivariant


def test_cost_is_linear_in_pixels():
    module = attnlib.create("focalnet", dim=8)
    counts = []
    for side in (8, 16):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, side, side, 8))
        counts.append(counter.get_total_flops())
    # exact for whatever is counted per pixel; the modules do the same work for every one
    assert counts[1] == 4 * counts[0] > 0


def test_normalize_modulator_divides_by_levels_plus_one():
    plain, normed = make(bias=False), make(bias=False, normalize_modulator=True)
    x = torch.randn(1, 5, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(plain.modulator(x)[0] / 3, normed.modulator(x)[0])


@pytest.mark.parametrize("levels", [0, 2])
def test_padding_marked_invalid_equals_the_cropped_image(levels):
    module = make(focal_level=levels)
    small = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    big = torch.randn(2, 9, 8, 8, dtype=torch.float64)
    big[:, :5, :6] = small
    valid = torch.zeros(2, 9, 8, dtype=torch.bool)
    valid[:, :5, :6] = True
    y = module(big, valid=valid)
    torch.testing.assert_close(y[:, :5, :6], module(small))
    assert (y[~valid] == 0).all()
    assert not torch.allclose(module(big)[:, :5, :6], y[:, :5, :6])


def test_nothing_valid_gives_zeros_and_finite_gradients():
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    y = make()(x, valid=torch.zeros(1, 4, 4, dtype=torch.bool))
    y.sum().backward()
    assert (y == 0).all() and (x.grad == 0).all()


@pytest.mark.parametrize(("rank", "grid"), [(1, (9,)), (3, (3, 4, 5))])
def test_other_grid_ranks_follow_from_the_same_equations(rank, grid):
    module = make(grid_rank=rank)
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    q, z, g = module.f(x).split([8, 8, 3], -1)
    conv = (torch.nn.functional.conv1d, None, torch.nn.functional.conv3d)[rank - 1]
    mixed = 0
    for i, layer in enumerate(module.focal_layers):
        k = layer.weight.shape[-1]
        z = torch.nn.functional.gelu(conv(z.movedim(-1, 1), layer.weight, padding=k // 2, groups=8).movedim(1, -1))
        mixed = mixed + g[..., i : i + 1] * z
    mixed = mixed + g[..., 2:] * torch.nn.functional.gelu(z.mean(tuple(range(1, rank + 1)), keepdim=True))
    torch.testing.assert_close(module(x), module.proj(q * module.h(mixed)))


def test_gradients_are_exact():
    module = make(dim=3)
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    valid[0, 0, 1] = False
    assert torch.autograd.gradcheck(lambda t: module(t, valid=valid), (x,))


def test_nothing_is_kept_on_the_module():
    module = make()
    before = dict(vars(module))
    module(torch.randn(1, 5, 5, 8, dtype=torch.float64))
    assert dict(vars(module)) == before


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"focal_window": 4}, "focal_window=4"),
        ({"focal_factor": 1}, "focal_factor=1"),
        ({"focal_level": -1}, "focal_level must be at least 0"),
        ({"grid_rank": 4}, "grid_rank=4"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        attnlib.create("focal-modulation", dim=8, **config)


def test_bad_inputs_are_refused():
    module = attnlib.create("focalnet", dim=8)
    with pytest.raises(ValueError, match=r"x must have shape \(B, H, W, C\)"):
        module(torch.zeros(1, 16, 8))
    with pytest.raises(ValueError, match="built with dim=8"):
        module(torch.zeros(1, 4, 4, 6))
    with pytest.raises(TypeError, match="valid must be a boolean"):
        module(torch.zeros(1, 4, 4, 8), valid=torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="takes no context"):
        module(torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 8))
    with pytest.raises(ValueError, match="takes no mask"):
        module(torch.zeros(1, 4, 4, 8), mask=torch.ones(16, 16, dtype=torch.bool))
