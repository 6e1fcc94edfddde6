"""E8P points and LDLQ, and weights of tokens by clusters and products, against the authors' code of RSQ."""

import itertools
import json

import pytest
import torch
from parity import HERE
from safetensors import safe_open
from safetensors.torch import load_file
from test_rsq import model

from attnlib.convert.lattice import E8P, ldlq, lengths
from attnlib.convert.quantize import Moments, gptq
from attnlib.convert.rsq import Weighting, quantize

PATH = HERE / "rsq-lattice.safetensors"
RECORDED = load_file(PATH)
with safe_open(PATH, "pt") as f:
    META = f.metadata()
RUNS, WEIGHTS = json.loads(META["runs"]), json.loads(META["weights"])


def close(a, b, **more):
    torch.testing.assert_close(a, b, **{"atol": 1e-5, "rtol": 1e-5, **more})


def points():
    """All 65,536: sizes, seven free signs and the eighth that makes the sum even, a quarter more or less."""
    free = torch.tensor(list(itertools.product((1.0, -1.0), repeat=7)))
    sizes = lengths()
    signed = torch.cat([free, torch.ones(128, 1)], 1)[None] * sizes[:, None]
    signed[..., 7] *= torch.where(signed.sum(-1) % 2 == 0, 1.0, -1.0)
    return torch.cat([signed.flatten(0, 1) + t for t in (0.25, -0.25)])


def test_points_are_those_of_the_release():
    made = points()
    assert len(torch.unique(made, dim=0)) == 2**16 and int((lengths().square().sum(1) == 12).sum()) == 29
    close(made.double().T @ made.double(), RECORDED["grid/moment"])
    close(made.double().square().sum(1).sort().values[::1024], RECORDED["grid/norms"])
    assert bool((torch.cdist(RECORDED["grid/some"], made).amin(1) < 1e-4).all())
    # E8 and a quarter: differences of two points with the same shift are whole and of an even sum.
    between = made[1:3000] - made[0]
    assert torch.equal(between, between.round()) and bool((between.sum(1) % 2 == 0).all())


def test_the_nearest_point_is_found():
    made = points()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=g) * torch.linspace(0.1, 3, 300)[:, None]
    found = E8P().nearest(x)
    close((found - x).norm(dim=1), torch.cdist(x, made, compute_mode="donot_use_mm_for_euclid_dist").amin(1))
    close(E8P().nearest(RECORDED["round/x"]), RECORDED["round/y"])
    assert E8P().nearest(torch.empty(0, 8)).shape == (0, 8)
    again = E8P().nearest(made[::97])
    close(again, made[::97], atol=0, rtol=0)


@pytest.mark.parametrize("name", RUNS)
def test_ldlq_equals_the_authors(name):
    run = RUNS[name]
    moments = Moments(run["columns"])
    for i in range(2):
        moments.add(RECORDED[f"run/{name}/x{i}"], RECORDED.get(f"run/{name}/r{i}"))
    close(moments.value, RECORDED[f"run/{name}/H"])
    scale = run.get("scale_override", 0.9)
    grid = E8P(scale if scale > 0 else 1.03)
    weight = RECORDED[f"run/{name}/w"]
    close(grid.step(weight), RECORDED[f"run/{name}/scale"])
    close(ldlq(weight, moments.value, grid), RECORDED[f"run/{name}/q"])


def test_blocks_make_up_for_each_other():
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(16, 32, generator=g), torch.randn(1, 300, 32, generator=g) @ torch.randn(32, 32, generator=g)
    moments = Moments(32)
    moments.add(x)

    def error(q):
        return float(((w - q) @ x[0].T).square().sum())

    nearest, once, often = E8P()(w), *(ldlq(w, moments.value, E8P(rounds=n)) for n in (0, 10))
    assert error(often) < error(once) < 0.8 * error(nearest)
    # For each weight alone eight at a time is nearer than a step of two bits, whatever its clipping.
    from attnlib.convert.quantize import Grid

    big = torch.randn(64, 512, generator=g)
    assert (E8P()(big) - big).square().mean() < 0.85 * (Grid(2, clip=True)(big) - big).square().mean()
    close(ldlq(w.double(), moments.value.double(), E8P()).float(), often)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_tokens_equal_the_authors(name):
    said = dict(WEIGHTS[name])
    kind = {"ClusterWeighting": "cluster", "DotWeighting": "dot"}[said.pop("cls")]
    names = {"min_value": "low", "max_value": "high", "num_bins": "bins", "masking": "mask_least",
             "truncate": "drop_least", "input_or_output": "of", "n_clusters": "clusters"}  # fmt: skip
    settings = {names.get(k, k): v for k, v in said.items()}
    normalize = settings.pop("normalize", "default")
    settings |= {"per_reader": normalize if normalize in ("linear", "sqrt") else None, "spread": normalize is not None}
    got = Weighting(kind, **settings)(before=RECORDED["before"][0], after=RECORDED["after"][0])
    close(got, RECORDED[f"weights/{name}"])


@pytest.mark.parametrize("weighting", ["uniform", "cluster", "dot"])
def test_whole_models_on_the_lattice(weighting, tmp_path):
    made = model(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24)
    tokens = torch.randint(31, (3, 12), generator=torch.Generator().manual_seed(0))
    before = made(tokens).logits
    kind = Weighting(weighting, clusters=4)
    told = quantize(made, tokens, 2, kind, grid=E8P(), resume=tmp_path)
    assert told.bits == 2 and len(told.errors) == 14 and max(told.errors.values()) < 0.5
    weight = made.model.layers[1].mlp.up_proj.weight.detach()
    step = weight.abs()[weight != 0].min() / 0.25
    assert bool(((weight / step - 0.25) % 0.5 < 1e-3).logical_or((weight / step - 0.25) % 0.5 > 0.499).all())
    again = model(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24)
    quantize(again, tokens, 2, kind, grid=E8P(), resume=tmp_path)
    assert torch.equal(again(tokens).logits, made(tokens).logits) and not torch.equal(before, made(tokens).logits)
    rounded = model(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24)
    worse = quantize(rounded, tokens, 2, kind, grid=E8P(), method="nearest")
    assert sum(told.errors.values()) < sum(worse.errors.values())


def test_bad_input():
    for call, message in (
        (lambda: E8P(scale=0), "scale"), (lambda: E8P(rounds=-1), "rounds"),
        (lambda: E8P()(torch.randn(3, 12)), "12 columns"), (lambda: E8P().nearest(torch.randn(3, 7)), "entries"),
        (lambda: ldlq(torch.randn(2, 8), torch.eye(8), "e8p"), "grid"),
        (lambda: ldlq(torch.randn(2, 8), torch.eye(7), E8P()), "moments"),
        (lambda: ldlq(torch.randn(2, 8), -torch.eye(8), E8P()), "positive definite"),
        (lambda: gptq(torch.randn(2, 8), torch.eye(8), E8P()), "grid"),
        (lambda: Weighting("cluster", clusters=0), "clusters"),
        (lambda: Weighting("cluster", clusters=9)(before=torch.randn(8, 4)), "clusters=9"),
        (lambda: quantize(model(), torch.ones(1, 4, dtype=torch.long), grid=E8P(), group=4), "no group"),
        (lambda: quantize(model(), torch.ones(1, 4, dtype=torch.long), grid=E8P()), "columns"),
        (lambda: quantize(model(), torch.ones(1, 4, dtype=torch.long), grid="e8p"), "grid"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            call()
