"""ScatterFormer's backbone: the authors' from a recording, and what its card asks."""

import json

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open

from attnlib.models.detect.scatterformer import CrossWindow, ScatterFormer
from attnlib.ops.voxels import numbers

SMALL = dict(in_dim=3, shape=(9, 8, 10), dim=16, num_heads=4, depth=3, window_size=4, pool_heads=8)


@pytest.fixture(scope="module")
def recorded():
    with safe_open(HERE / "scatterformer.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["shapes"])  # noqa: SIM118


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return ScatterFormer(**{**SMALL, **settings})


@pytest.mark.parametrize("case", ["model", "train"])
def test_equals_the_authors(recorded, case):
    held, shapes = recorded
    model = small()
    model.load_state_dict(ScatterFormer.convert_state_dict(synthetic(shapes)))
    model = model.double().train(case == "train")
    x = held[f"{case}/x/x"].double().requires_grad_()
    y, places = model(x, held["coords"])
    theirs = held[f"{case}/y"]
    assert y.shape == theirs.shape and bool((numbers(places, (4, 5)).diff() > 0).all())
    assert float((y - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    (y * held[f"{case}/g"]).sum().backward()
    dx = held[f"{case}/dx/x"]
    assert float((x.grad - dx).abs().max()) < 1e-5 * float(dx.abs().max())
    if case == "train":
        return
    unknown = {k: torch.full(s, torch.nan) for k, s in shapes.items()}
    known = {k[len("model/dw/") :]: v for k, v in held.items() if k.startswith("model/dw/")}
    grads = ScatterFormer.convert_state_dict({**unknown, **known})
    compared = 0
    largest = max(float(v.abs().max()) for v in known.values())
    for name, p in model.named_parameters():
        if not grads[name].isnan().any():
            compared += 1
            scale = max(float(grads[name].abs().max()), 3e-2 * largest)
            assert float((p.grad - grads[name]).abs().max()) < 1e-5 * scale, name
    assert compared >= len(known)


def scene(count=50, seed=1):
    gen = torch.Generator().manual_seed(seed)
    at = torch.randperm(2 * 720, generator=gen)[:count]
    coords = torch.stack([at // 720, at // 80 % 9, at // 10 % 8, at % 10], 1)
    return torch.randn(count, 3, generator=gen), coords


def test_the_order_of_voxels_is_of_no_account_and_samples_do_not_meet():
    model, (x, coords) = small(depth=1).eval(), scene()
    y, places = model(x, coords)
    order = torch.randperm(50)
    turned, same = model(x[order], coords[order])
    assert torch.equal(same, places)
    torch.testing.assert_close(turned, y, atol=1e-5, rtol=1e-4)
    alone, _ = model(x[coords[:, 0] == 0], coords[coords[:, 0] == 0])
    torch.testing.assert_close(alone, y[places[:, 0] == 0], atol=1e-5, rtol=1e-4)


def test_the_map_and_a_scene_without_voxels():
    model, (x, coords) = small(depth=1).eval(), scene()
    y, places = model(x, coords)
    seen = model.map(y, places, batch=2)
    assert seen.shape == (2, 4, 5, 16)
    torch.testing.assert_close(seen[tuple(places.T)], y)
    none, nowhere = model(x[:0], coords[:0])
    assert none.shape == (0, 16) and not model.map(none, nowhere, batch=1).any()


def test_the_layer_across_windows_goes_on_from_the_normed_voxels():
    torch.manual_seed(0)
    layer, (x, coords) = CrossWindow(16, 4).eval(), scene()
    x = torch.randn(50, 16)
    for conv in (layer.cube, layer.columns, layer.rows):
        torch.nn.init.zeros_(conv.weight)
    torch.nn.init.zeros_(layer.fc2.weight)
    torch.nn.init.zeros_(layer.fc2.bias)
    layer.norm.running_mean.fill_(1.0)
    y = layer(x, CrossWindow.tables(coords, SMALL["shape"], 4))
    normed = layer.norm(x)
    torch.testing.assert_close(y[:, :12], normed[:, :12])
    torch.testing.assert_close(y[:, 12:], 2 * normed[:, 12:])


def test_released_size():
    with torch.device("meta"):
        model = ScatterFormer()
    assert model.pool.height == 8 and len(model.stage1.mixers) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(window_size=5), "window_size"),
        (lambda: small(dim=18, num_heads=2), "quarters"),
        (lambda: small(shape=(2, 8, 8)), "shape must be at least 3 heights"),
        (lambda: small()(torch.zeros(2, 3), torch.tensor([[0, 0, 0, 0], [0, 9, 0, 0]])), "coords must lie"),
        (lambda: small()(torch.zeros(2, 4), torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]])), "x must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
