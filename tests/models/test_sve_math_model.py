"""SVE-Math: router and projector against the authors' classes; gates before and after the norm; inside LLaVA."""

import copy
import json

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open

from attnlib.models.multimodal.sve_math import FeatureRouter, Routed, RoutedProjector

with safe_open(HERE / "sve-math.safetensors", "pt") as f:
    HELD = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    SAID = {k: json.loads(f.metadata()[k]) for k in ("shapes", "counts")}
#: Which of the finest-to-coarsest maps each number of levels reads in the release, which then turns their order.
READS = {1: [3], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3]}


def same(ours, theirs, what="", tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda m: f"{what}: {m}")


def small(levels=4, merge="channel", gate="after", **more):
    torch.manual_seed(0)
    return FeatureRouter(16, 4, levels, merge=merge, gate=gate, **more)


def maps(batch=2, count=4):
    torch.manual_seed(1)
    return [torch.randn(batch, s, t, 4) for s, t in ((10, 12), (5, 6), (3, 3), (2, 1))][:count]


@pytest.mark.parametrize("case", ["channel1", "channel2", "channel3", "channel4", "sequence1", "sequence4"])
def test_router_and_projector_equal_the_authors(case):
    merge, count = case[:-1], int(case[-1])
    # Their sequence form gates after, unless it has one level: then it merges as the channel form does.
    router = small(count, merge if count == 4 else "channel", "after" if merge == "sequence" else "before")
    theirs = synthetic(SAID["shapes"][f"{case}/router"])
    router.load_state_dict(FeatureRouter.convert_state_dict({f"VTMerge.{k}": v for k, v in theirs.items()}))
    shell = small(count, merge)
    made = RoutedProjector(shell, 6)
    made.router = router
    if count != 4 and merge == "sequence":
        made.router = copy.deepcopy(router)
    weights = RoutedProjector.convert_state_dict(synthetic(SAID["shapes"][f"{case}/projector"]))
    assert weights.keys() == {k for k in made.state_dict() if k.startswith("models")}
    made.load_state_dict(weights, strict=False)
    made.double()
    x = HELD["q"].clone().requires_grad_()
    levels = [HELD[f"level{i}"].permute(0, 2, 3, 1).clone().requires_grad_() for i in range(4)]
    read = [levels[i] for i in READS[count]][::-1]
    if count != 4 and merge == "sequence":
        parts = made.router(x, read).parts
        z = torch.cat([m(p) for m, p in zip(made.models, parts, strict=True)], 1)
    else:
        z = made(x, read)
    same(z, HELD[f"{case}/z"])
    (z * HELD[f"{case}/w"]).sum().backward()
    same(x.grad, HELD[f"{case}/dx"], "dx")
    for i, level in enumerate(levels):
        if f"{case}/dlevel{i}" in HELD:
            same(level.grad.permute(0, 3, 1, 2), HELD[f"{case}/dlevel{i}"], f"level {i}")
        else:
            assert level.grad is None
    grads = {n: p.grad for n, p in made.router.named_parameters()}
    known = {k.removeprefix(f"{case}/dw/"): v for k, v in HELD.items() if k.startswith(f"{case}/dw/")}
    full = {k: torch.zeros(s) for k, s in SAID["shapes"][f"{case}/router"].items()} | known
    for name, value in FeatureRouter.convert_state_dict(full).items():
        if any(value is v for v in known.values()):
            same(grads[name], value, name)
    same(made.models[0][0].weight.grad, HELD[f"{case}/dp"])


def test_parameters_are_counted():
    with torch.device("meta"):
        router = FeatureRouter()
        projector = RoutedProjector(router, 4096)
    counted = sum(p.numel() for p in router.parameters())
    levels = 4 * (256 * 1024 + 1024**2 + 2 * 1024)
    gate = 1280 * 1024 + 1024 + 256**2
    assert counted == levels + gate + 2 * 1024**2 + 2 * 1024 + 2 * 256 + 2 * 1024 == SAID["counts"]["router"]
    assert sum(p.numel() for p in projector.models.parameters()) == SAID["counts"]["projector"]
    with torch.device("meta"):
        out = projector(torch.empty(1, 576, 1024), [torch.empty(1, s, s, 256) for s in (100, 50, 25, 13)])
    assert out.shape == (1, 576, 4096)


def scaled_gate(router, to):
    """The router with all its gates set."""
    router = copy.deepcopy(router)
    router.gates = lambda x, levels: torch.full((len(x), len(levels)), to)
    return router


@pytest.mark.parametrize("merge", ["channel", "sequence"])
def test_a_norm_behind_the_gate_undoes_it_in_the_channel_form(merge):
    x, levels = torch.randn(2, 9, 16), maps()
    moved = {}
    for gate in ("before", "after"):
        router = small(merge=merge, gate=gate)
        router.norm.eps = 1e-12
        low, high = (torch.stack(scaled_gate(router, g)(x, levels).parts[1:]) for g in (0.2, 0.9))
        moved[gate] = float((low - high).detach().abs().max() / high.detach().abs().max())
    assert moved["after"] > 0.5
    assert moved["before"] < 1e-4 if merge == "channel" else moved["before"] > 0.1
    router = small(merge=merge, gate="before")
    a, b = (scaled_gate(router, 0.0)(x, levels) for levels in (maps(), [m + 1 for m in maps()]))
    for p, q in zip(a.parts[1:], b.parts[1:], strict=True):
        assert torch.equal(p, q)  # no level is read any more
        if merge == "channel":
            assert (p - p[:1, :1]).abs().max() < 1e-6


def test_gates_are_numbers_between_zero_and_one():
    out = small()(torch.randn(3, 9, 16), maps(3))
    assert out.gates.shape == (3, 4) and ((out.gates > 0) & (out.gates < 1)).all()
    assert (small(1)(torch.randn(2, 9, 16), maps(count=1)).gates == 1).all()


def test_turned_levels_turn_their_channels_only():
    router, order = small(3), [2, 0, 1]
    turned = copy.deepcopy(router)
    turned.aggregate = torch.nn.ModuleList(router.aggregate[i] for i in order)
    x, levels = torch.randn(2, 9, 16), maps(count=3)
    a, b = router(x, levels), turned(x, [levels[i] for i in order])
    for i, j in enumerate(order):
        same(b.parts[i + 1], a.parts[j + 1], tolerance=1e-6)
    same(b.gates, a.gates[:, order], tolerance=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_widths_and_lengths(levels):
    x, given = torch.randn(2, 9, 16), maps(count=levels)
    channel = RoutedProjector(small(levels), 6)
    assert channel.models[0][0].in_features == (levels + 1) * 16 and channel(x, given).shape == (2, 9, 6)
    assert RoutedProjector(small(levels, "sequence"), 6)(x, given).shape == (2, 18, 6)


def learned(gate, steps=100):
    """Gates of a router whose task can be read from level 3 (of 1..4) only, which looks different."""
    torch.manual_seed(0)
    router = FeatureRouter(16, 4, 4, gate=gate)
    for one in router.aggregate:  # only gates can tell the levels apart
        one.load_state_dict(router.aggregate[0].state_dict())
        one.requires_grad_(False)
    head = torch.nn.Linear(16, 1)
    trained = [p for p in (*router.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    x = torch.randn(64, 4, 16) * 0.1
    for _ in range(steps):
        levels = [torch.randn(64, 1, 1, 4) for _ in range(4)]
        for i, level in enumerate(levels):
            level[..., 1] = 2.0 if i == 2 else -2.0
        wanted = levels[2][:, 0, 0, 0]
        parts, gates = router(x, levels)
        loss = (head(torch.stack(parts[1:]).sum(0)).mean(1)[:, 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gates.detach().mean(0)


def test_the_gate_of_the_level_that_tells_rises():
    after = learned("after", 60)
    assert after.argmax() == 2 and after[2] > after[[0, 1, 3]].max() + 0.2


def test_a_gate_before_the_norm_has_next_to_no_gradient():
    """What is left of it is the norm's eps: gates have to fall to 1e-5 before they close a level."""
    pull = {}
    for gate in ("before", "after"):
        router = small(gate=gate)
        parts = torch.stack(
            router(torch.randn(8, 9, 16, generator=torch.Generator().manual_seed(0)), maps(8)).parts[1:]
        )
        (parts * torch.randn(parts.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        pull[gate] = float(router.weight_mlp.linear_2.weight.grad.norm())
    assert pull["before"] < 1e-2 * pull["after"]


# ---- inside models


def routed(model, merge="channel", holder="model.multi_modal_projector"):
    torch.manual_seed(3)
    own = model.get_submodule(holder)
    dim = next(p for n, p in own.named_parameters() if n.endswith("linear_1.weight")).shape[1]
    width = model.config.text_config.hidden_size
    projector = RoutedProjector(FeatureRouter(dim, 4, 3, merge=merge), width).eval()
    model.set_submodule(holder, projector)
    return projector


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_language_model_sees_levels_with_padding_and_beams(family):
    pytest.importorskip("transformers")
    from hooks.internvl import internvl, internvl_inputs
    from hooks.llava import llava, llava_inputs

    model = llava() if family == "llava" else internvl()
    inputs = (llava_inputs if family == "llava" else internvl_inputs)(model)
    inputs["input_ids"][0, :2] = 0
    inputs["attention_mask"][0, :2] = 0
    projector = routed(model)
    levels = maps(count=3)
    with pytest.raises(ValueError, match="seeing"):
        model(**inputs)
    with torch.no_grad(), projector.seeing(levels):
        both = model(**inputs).logits
        for beams in (1, 2):
            written = model.generate(
                **inputs, max_new_tokens=3, num_beams=beams, do_sample=False, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            assert written.sequences.shape == (2, 17)
    one = {k: v[1:] for k, v in inputs.items()}
    with torch.no_grad(), projector.seeing([m[1:] for m in levels]):
        same(model(**one).logits, both[1:], tolerance=1e-4)
        assert torch.equal(model.generate(**one, max_new_tokens=3, num_beams=2, do_sample=False), written.sequences[1:])
    with torch.no_grad(), projector.seeing([m + 1 for m in levels]):
        assert (model(**inputs).logits - both).abs().max() > 1e-4
    assert projector._seen is None


def test_copies_compilation_export_and_types():
    made = RoutedProjector(small(), 6).eval()
    x, levels = torch.randn(2, 9, 16), maps()
    y = made(x, levels)
    with made.seeing(levels):
        assert copy.deepcopy(made)._seen is None
    assert torch.equal(copy.deepcopy(made)(x, levels), y)
    assert torch.equal(made(x.unflatten(1, (3, 3)), levels), y)
    same(torch.compile(made, backend="eager")(x, levels), y, tolerance=1e-5)
    same(torch.export.export(made, (x, levels)).module()(x, levels), y, tolerance=1e-5)
    assert made.bfloat16()(x.bfloat16(), [m.bfloat16() for m in levels]).dtype == torch.bfloat16
    assert made(x[:0].bfloat16(), [m[:0].bfloat16() for m in levels]).shape == (0, 9, 6)
    wide = small()(torch.randn(1, 8, 16), maps(1), grid=(2, 4))
    assert wide.parts[1].shape == (1, 8, 16)


BAD = [
    (lambda: small()(torch.zeros(2, 8, 16), maps()), "x has 8 image tokens, which fill no square"),
    (lambda: small()(torch.zeros(2, 8, 16), maps(), (3, 3)), r"grid=\(3, 3\) has 9 places"),
    (lambda: small()(torch.zeros(2, 9, 16), maps(), (9,)), r"grid must be \(height, width\), got \(9,\)"),
    (lambda: small()(torch.zeros(2, 9, 16), maps(count=3)), "levels must be 4 maps, got 3"),
    (lambda: small()(torch.zeros(2, 9, 15), maps()), "dim=16"),
    (lambda: small()(torch.zeros(3, 9, 16), maps()), r"levels\[0\]"),
    (lambda: small(merge="sequence", hidden=8), "hidden=8 must be dim=16"),
    (lambda: small(merge="add"), "merge='add'"),
    (lambda: small(gate="none"), "gate='none'"),
    (lambda: FeatureRouter(levels=0), "levels"),
    (lambda: FeatureRouter.convert_state_dict({"layers.1.norm.weight": torch.zeros(2)}), "layers.1.norm.weight"),
]


@pytest.mark.parametrize("call, says", BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


with safe_open(HERE / "sve-math-projectors.safetensors", "pt") as f:
    PROJECTED = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    LAYERS = json.loads(f.metadata()["shapes"])


@pytest.mark.parametrize("case", LAYERS)
def test_projectors_of_any_depth_equal_the_authors(case):
    kind, form = case.split("/")
    depth = 1 if kind == "linear" else int(kind[3])
    router = FeatureRouter(6, 3, 4, merge=form.removeprefix("identify_"))
    made = RoutedProjector(router, 5, depth).double()
    own = made.models.state_dict()
    made.models.load_state_dict(
        {k.removeprefix("models."): v for k, v in RoutedProjector.convert_state_dict(synthetic(LAYERS[case])).items()}
    )
    assert len(own) == 2 * depth * len(made.models)
    parts = list(PROJECTED[f"{case}/parts"])
    router.forward = lambda x, levels, grid=None: Routed(parts, x)
    same(made(parts[0], [parts[0]]), PROJECTED[f"{case}/y"])


def test_projectors_have_a_layer():
    with pytest.raises(ValueError, match="depth must be"):
        RoutedProjector(FeatureRouter(6, 3, 2), 5, 0)
