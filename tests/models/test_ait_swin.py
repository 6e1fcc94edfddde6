"""AiT whole: the authors' Swin V2 and solver, options of the solver, the nine released configurations."""

import json

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open
from torch import nn

from attnlib.models.multimodal import ait as module
from attnlib.models.multimodal.ait import AiT, released_ait, swin_v2
from attnlib.models.multimodal.soft_tokens import Solver, Vocabulary

with safe_open(HERE / "ait-swin.safetensors", "pt") as f:
    HELD = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    SAID = {k: json.loads(f.metadata()[k]) for k in ("shapes", "settings", "counts", "rates")}
WORDS = Vocabulary(20, 3, 5, 6)
SMALL = dict(dim=16, num_heads=2, hidden=12, encoder_depth=1, decoder_depth=2, grid=(4, 3), max_length=30, drop=0.0)


def same(ours, theirs, what="", tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda m: f"{what}: {m}")


def weights(name):
    held = {k: v.double() for k, v in synthetic(SAID["shapes"][name]).items()}
    return {k: v.abs() + 0.5 if "cluster" in k else v for k, v in held.items()}


def whole(name, file):
    said = SAID["settings"][name]
    backbone = swin_v2(
        said["embed_dim"], said["depths"], said["num_heads"], said["window_size"], said["pretrain_window_size"],
        said["use_shift"], drop_path_rate=0.0,
    )  # fmt: skip
    made = released_ait(
        file, backbone, WORDS, SMALL | dict(in_dim=16, drop_path=0.0),
        depth_vae=dict(dim=4, hidden_dim=2, ratio=8), mask_vae=dict(dim=4, hidden_dim=2, ratio=4), mask_size=8,
    )  # fmt: skip
    state = AiT.convert_state_dict(weights(name))
    state["solver.enc_embed"] = made.solver.enc_embed  # of sines: a constant that was not recorded
    made.load_state_dict({k: v for k, v in state.items() if made.mask_vae is not None or not k.startswith("mask_vae")})
    return made.double()


@pytest.mark.parametrize(
    ("name", "file"), [("still", "swinv2b_640reso_joint"), ("moved", "swinv2l_480reso_parallel_depthonly")]
)
def test_images_to_logits_equal_the_authors(name, file):
    """Maps that windows do not divide, windows larger than maps, and shifts of these."""
    made = whole(name, file).train()
    x = HELD["img"].double().requires_grad_()
    same(made.backbone(x)[0], HELD[f"{name}/map"], "map")
    logits = made(x, "depth", HELD["seq"])
    same(logits, HELD[f"{name}/logits"], "logits")
    (logits * HELD[f"{name}/w"]).sum().backward()
    same(x.grad[:, 0], HELD[f"{name}/dx"], "dx")
    grads = {n: p.grad for n, p in made.named_parameters()}
    known = {k.removeprefix(f"{name}/dw/"): v for k, v in HELD.items() if k.startswith(f"{name}/dw/")}
    assert len(known) == 5
    full = {k: torch.zeros(s).double() for k, s in SAID["shapes"][name].items()}
    for key, value in known.items():
        (ours,) = (k for k, v in AiT.convert_state_dict(full | {f"backbone.{key}": value}).items() if v is value)
        same(grads[ours], value, key)


@pytest.mark.parametrize("name", ["shares", "inside", "inside_bare"])
def test_options_of_the_solver_equal_the_authors(name):
    said = SAID["settings"][name]
    made = Solver(
        16, WORDS, **SMALL, drop_path=0.0, positions=said["pos_enc"].replace("_", "-"),
        token_positions=said.get("with_dec_embed", True), inside=said.get("qk_pos", False),
    )  # fmt: skip
    state = Solver.convert_state_dict(weights(name))
    made.load_state_dict({"enc_embed": made.enc_embed.detach()} | state)
    made.double()
    same(made.enc_embed.float(), HELD[f"{name}/enc_embed"].float(), "places", 1e-6)
    made.enc_embed.data = HELD[f"{name}/enc_embed"].double()
    x = HELD["src"].permute(0, 2, 3, 1).clone().requires_grad_()
    logits = made(x, "objects", HELD["seq"])
    same(logits, HELD[f"{name}/logits"], "logits")
    (logits * HELD[f"{name}/w"]).sum().backward()
    same(x.grad, HELD[f"{name}/dx"].permute(0, 2, 3, 1), "dx")
    grads = {n: p.grad for n, p in made.named_parameters()}
    known = {k.removeprefix(f"{name}/dw/"): v for k, v in HELD.items() if k.startswith(f"{name}/dw/")}
    assert len(known) >= 3
    for key, value in known.items():
        ours = grads[key.replace(".blocks", "")]
        same(ours[1, :4] if key == "dec_embed" else ours, value, key)
    written = made.eval().write(x.detach(), "boxes", (["box"] * 4 + ["class"]) * 2, soft=())
    for i in range(2):
        theirs = HELD[f"{name}/gen{i}/tokens"].unflatten(0, (2, 5)).clone()
        theirs[:, 4] += WORDS.ranges["class"].start
        assert torch.equal(written.tokens[i], theirs.flatten())
        same(written.scores[i], HELD[f"{name}/gen{i}/scores"])


def test_stochastic_depth_rises_along_blocks():
    more = SMALL | dict(encoder_depth=3, decoder_depth=4)
    made = Solver(16, WORDS, **more, drop_path=0.3, linear_drop_path=True)
    rates = [[block.drop_path.p for block in part] for part in (made.encoder, made.decoder)]
    assert all(
        abs(a - b) < 1e-7
        for ours, theirs in zip(rates, SAID["rates"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    flat = Solver(16, WORDS, **more, drop_path=0.3)
    assert {block.drop_path.p for part in (flat.encoder, flat.decoder) for block in part} == {0.3}


def test_without_a_table_a_sequence_has_any_length():
    made = Solver(16, WORDS, **SMALL, token_positions=False)
    assert made(torch.randn(1, 2, 2, 16), "boxes", torch.zeros(1, 40, dtype=torch.long)).shape == (1, 41, 37)
    with pytest.raises(ValueError, match="41 tokens are more than max_length=30"):
        Solver(16, WORDS, **SMALL)(torch.randn(1, 2, 2, 16), "boxes", torch.zeros(1, 40, dtype=torch.long))


@pytest.mark.parametrize("name", module.CONFIGS)
def test_released_configurations(name):
    with torch.device("meta"):
        made = released_ait(name)
    size = SAID["counts"]["l" if name.startswith("swinv2l") else "b"]
    assert sum(p.numel() for p in made.backbone.parameters()) == size
    assert (made.depth_vae is not None) == ("depth" in name or "joint" in name)
    assert (made.mask_vae is not None) == ("inssegonly" in name or "joint" in name)
    assert (made.solver.mask_embed is not None) == ("parallel" in name)
    assert made.solver.grid == ((20, 20) if "640" in name else (15, 15))
    assert len(made.solver.vocabulary) == (2467 if "640" in name else 2339)
    shifts = [stage.blocks[1].mixer.inner.shift for stage in made.backbone.model.stages]
    assert shifts == [(15, 15)] * 2 + ([(15, 15), (7, 7)] if "640" in name else [(0, 0)] * 2)
    if "wosoft" in name:
        assert not made.soft and not made.soft_feed and not made.silog_weight * ("depth" in name)


def test_it_starts_as_torch_does():
    made = swin_v2(8, (2, 2), (1, 2), (4, 2), (3, 3))
    for m in made.modules():
        if isinstance(m, nn.LayerNorm):
            assert (m.weight == 1).all() and not m.bias.any()
        elif isinstance(m, nn.Linear):
            bound = m.in_features**-0.5
            assert 0.8 * bound < m.weight.abs().max() <= bound or m.weight.numel() < 64
    assert all((p.exp() - 10).abs().max() < 1e-4 for n, p in made.named_parameters() if n.endswith("logit_scale"))


def test_bad_names():
    with pytest.raises(ValueError, match="name='swin'"):
        released_ait("swin")
    with pytest.raises(ValueError, match="one entry for each of 2 stages"):
        swin_v2(8, (1, 1), (1, 2), (4, 2), (3, 3), shifts=(True,))
