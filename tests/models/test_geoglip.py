"""GeoGLIP against the authors' tower: maps, gradients, statistics of a step of training; what is frozen; bad input."""

import json

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open
from torch import nn

from attnlib.models.multimodal.geoglip import GeoGLIP, drop_block
from attnlib.models.multimodal.sve_math import FeatureRouter

with safe_open(HERE / "geoglip.safetensors", "pt") as f:
    HELD = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    SAID = {k: json.loads(f.metadata()[k]) for k in ("shapes", "counts")}


def same(ours, theirs, what="", tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda m: f"{what}: {m}")


def small(**more):
    torch.manual_seed(0)
    return GeoGLIP(4, (2, 2, 2, 1), (1, 1, 2, 2), 4, dim=8, **{**dict(drop_path_rate=0.0), **more})


def loaded(**more):
    made = small(**more)
    held = synthetic(SAID["shapes"])
    # Scores of a few: windows that do not meet are -100 apart in theirs, not infinitely far.
    held = {k: v * 0.25 if k.endswith("qkv.weight") else v for k, v in held.items()}
    made.load_state_dict(GeoGLIP.convert_state_dict(held))
    return made.double()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_it_equals_the_authors(mode):
    """On maps that windows do not divide, some smaller than a window; in training without hidden squares."""
    made = loaded(frozen=-1, drop=0.0).train(mode == "train")
    x = synthetic({"img": [2, 3, 68, 60]})["img"].double().requires_grad_()
    levels = made(x)[::-1]
    assert len(levels) == 4
    total = 0
    for i, level in enumerate(levels):
        level = level.permute(0, 3, 1, 2)
        same(level, HELD[f"{mode}/y{i}"], f"level {i}")
        total = total + (level * HELD[f"{mode}/w{i}"]).sum()
    total.backward()
    same(x.grad[:, 0, ::3, ::3], HELD[f"{mode}/dx"], "dx", 1e-8)
    grads = {n: p.grad for n, p in made.named_parameters()}
    known = {k.removeprefix(f"{mode}/dw/"): v for k, v in HELD.items() if k.startswith(f"{mode}/dw/")}
    full = {k: torch.zeros(s) for k, s in SAID["shapes"].items()}
    tried = 0
    for key, value in known.items():
        ours = GeoGLIP.convert_state_dict(full | {f"glip_model.{key}": value})
        (name,) = (k for k, v in ours.items() if k in grads and v.any())
        same(grads[name], ours[name], key, 1e-8)
        tried += 1
    assert tried == 7
    if mode == "train":
        after = {k.removeprefix("train/after/"): v for k, v in HELD.items() if k.startswith("train/after/")}
        ours = GeoGLIP.convert_state_dict(full | {f"glip_model.{k}": v for k, v in after.items()})
        buffers = dict(made.named_buffers())
        names = [n for n in ours if "running" in n]
        assert len(names) == 2 * 6
        for name in names:
            same(buffers[name], ours[name], name)


def test_squares_are_hidden_as_the_authors_hide_them():
    torch.manual_seed(6)
    same(drop_block(HELD["block/x"], 0.3), HELD["block/y"], tolerance=1e-6)
    x = torch.ones(4, 2, 9, 9)
    assert drop_block(x, 0.0) is x
    hidden = drop_block(x, 0.5)
    assert (hidden == 0).any() and torch.equal(hidden[:, 0], hidden[:, 1])
    assert abs(float(hidden.mean()) - 1) < 1e-5


def test_parameters_are_the_authors():
    with torch.device("meta"):
        made = GeoGLIP()
    assert sum(p.numel() for p in made.parameters()) == SAID["counts"] == 32_654_586
    assert [tuple(t.shape[1:]) for t in made(torch.empty(1, 3, 800, 1333, device="meta"))] == [
        (7, 11, 256), (13, 21, 256), (25, 42, 256), (100, 167, 256),
    ]  # fmt: skip


def test_it_starts_as_the_authors_class():
    made = GeoGLIP(16, (1, 1, 1, 1), (1, 2, 2, 2), 4, dim=32)
    for name, m in made.body.model.named_modules():
        if isinstance(m, nn.Linear):
            assert 0.9 * m.in_features**-0.5 < m.weight.abs().max() <= m.in_features**-0.5, name
    for conv in (*made.inner, *made.outer, made.p6, made.p7):
        bound = (3 / conv.weight[0].numel()) ** 0.5
        assert 0.9 * bound < conv.weight.abs().max() <= bound and not conv.bias.any()
    tables = torch.cat([p.flatten() for n, p in made.named_parameters() if n.endswith("rel_bias")])
    assert 0.015 < tables.std() < 0.025


def test_what_is_frozen_stays_as_it_is():
    made = small(drop_path_rate=0.5).train()
    fixed = {n for n, p in made.named_parameters() if not p.requires_grad}
    assert any(n.startswith("body.model.stem") for n in fixed) and any(
        n.startswith("body.model.stages.2.blocks") for n in fixed
    )
    assert not any(n.startswith(("body.model.stages.3.blocks", "body.norms", "inner", "boundary")) for n in fixed)
    assert not made.body.model.stages[2].blocks[0].training and made.body.model.stages[3].blocks[0].training
    assert all(p.requires_grad for p in small(frozen=-1).parameters())


def test_a_router_reads_it():
    made = small().eval()
    router = FeatureRouter(16, 8, levels=4)
    images = torch.randn(2, 3, 64, 64)
    parts = router(torch.randn(2, 9, 16), made(images)).parts
    assert len(parts) == 5 and all(p.shape == (2, 9, 16) for p in parts)
    half = made.bfloat16()(images.bfloat16())
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in half)
    assert [t.shape for t in made.float()(torch.randn(1, 3, 1, 1))] == [(1, 1, 1, 8)] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dim=9), "heads=8"), (dict(drop=1.0), "drop must be"), (dict(frozen=9), "frozen must be"),
        (dict(window_size=1), "window_size must be"), (dict(depths=(1, 1), num_heads=(1, 1)), "at least 3 stages"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GeoGLIP(**{**dict(embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4, dim=8), **settings})
