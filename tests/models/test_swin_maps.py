"""Swin's maps against the Swin that UPN stands on; its sizes; UPN behind it."""

import json

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open

from attnlib.models.multimodal.proposals import UPN
from attnlib.models.multimodal.swin_maps import SIZES, SwinMaps

with safe_open(HERE / "chatrex-swin.safetensors", "pt") as f:
    HELD = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    SAID = {k: json.loads(f.metadata()[k]) for k in ("shapes", "counts")}


def same(ours, theirs, what="", tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda m: f"{what}: {m}")


def small(**more):
    torch.manual_seed(0)
    return SwinMaps(4, (2, 1, 2), (1, 2, 2), 4, **{**dict(drop_path_rate=0.0), **more})


def test_it_equals_the_release():
    """On maps that windows do not divide, the last of them smaller than a window."""
    made = small()
    held = synthetic(SAID["shapes"])
    # Scores of a few: windows that do not meet are -100 apart in theirs, not infinitely far.
    held = {k: v * 0.25 if k.endswith("qkv.weight") else v for k, v in held.items()}
    made.load_state_dict(SwinMaps.convert_state_dict(held))
    made.double()
    x = synthetic({"img": [2, 3, 36, 28]})["img"].double().requires_grad_()
    total = 0
    for i, level in enumerate(made(x)):
        same(level, HELD[f"y{i}"], f"map {i}")
        total = total + (level * HELD[f"w{i}"]).sum()
    total.backward()
    same(x.grad[:, 0, ::2, ::2], HELD["dx"], "dx")
    grads = {n: p.grad for n, p in made.named_parameters()}
    known = {k.removeprefix("dw/"): v for k, v in HELD.items() if k.startswith("dw/")}
    full = {k: torch.zeros(s) for k, s in SAID["shapes"].items()}
    for key, value in known.items():
        ours = SwinMaps.convert_state_dict(full | {key: value})
        (name,) = (k for k, v in ours.items() if v.any())
        same(grads[name], ours[name], key)
    assert len(known) == 4
    later = small(first=1)
    later.load_state_dict(
        SwinMaps.convert_state_dict({k: v for k, v in held.items() if ".norm0." not in k})
    )  # fmt: skip
    for ours, i in zip(later.double()(x), (1, 2), strict=True):
        same(ours, HELD[f"y{i}"], f"map {i} alone")


@pytest.mark.parametrize("name", SAID["counts"])
def test_named_sizes_have_the_parameters_of_the_release(name):
    with torch.device("meta"):
        made = SwinMaps.named(name)
    assert sum(p.numel() for p in made.parameters()) == SAID["counts"][name]


def test_a_proposal_network_stands_on_it():
    swin = small()
    upn = UPN(swin.channels, 16, 4, 2, 2, 16, 1, 1, 6, groups=4)
    found = upn(swin(torch.randn(2, 3, 40, 56)), granularity="coarse")
    assert found.boxes.shape == (2, 6, 4)
    found.logits.sum().backward()
    assert swin.model.stem.proj.weight.grad.isfinite().all()
    assert SwinMaps.named("swin_T_224_1k", embed_dim=8, num_heads=(1, 1, 1, 1), first=3).channels == (64,)
    assert UPN.__init__.__defaults__[0] == tuple(SIZES["swin_L_384_22k"]["embed_dim"] * 2**i for i in range(4))
    for bad, message in ((dict(first=3), "first must be"), (dict(window_size=1), "window_size must be")):
        with pytest.raises(ValueError, match=message):
            SwinMaps(**{**dict(embed_dim=4, depths=(1, 1), num_heads=(1, 1)), **bad})
    with pytest.raises(ValueError, match="name='swin_X'"):
        SwinMaps.named("swin_X")
