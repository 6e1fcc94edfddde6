"""DyVTE: the authors' gates and labels, exits sample by sample, and training a gate."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hooks.models import prompt, scores

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import SnapKV  # noqa: E402
from attnlib.hooks import IMAGE, PAD, TEXT, Intervention, TokenTypes  # noqa: E402
from attnlib.reduce import (  # noqa: E402
    VTCCLS,
    DyVTE,
    DyVTEByAttention,
    ExitGate,
    ExitGates,
    attention_exit_features,
    exit_features,
    exit_labels,
    gate_loss,
)
from hooks.pictures import IMAGE_ID, TOKENS, image_slots, picture_inputs, picture_model  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "fixtures" / "dyvte.safetensors"
TYPES = TokenTypes(IMAGE_ID)


@pytest.fixture(scope="module")
def model():
    return picture_model()


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def formula(rows, cols, seed):
    """The weights of the recording."""
    index = torch.arange(rows * cols, dtype=torch.float64).reshape(rows, cols)
    return torch.sin(index * 0.7 + seed).float() * 0.3


class Forbid(Intervention):
    """The oracle: behind its exit layer a sample's image keys are read by nobody."""

    kinds = ("self",)

    def __init__(self, image, exits):
        self.image, self.exits = image, torch.as_tensor(exits)

    def around_attention(self, site, q, k, v, call):
        exits, image = (t.repeat_interleave(q.shape[0] // len(self.image), 0) for t in (self.exits, self.image))
        gone = image & ((exits >= 0) & (site.layer > exits))[:, None]
        stays = torch.ones(q.shape[0], site.n_keys, dtype=torch.bool)
        stays[:, : gone.shape[1]] = ~gone
        return call(q, k, v, mask=site.mask.dense() & stays[:, None, None])


class Say(torch.nn.Module):
    """A gate that says yes to chosen rows of the batch."""

    def __init__(self, yes):
        super().__init__()
        self.yes = torch.tensor(yes)

    def forward(self, f):
        yes = self.yes.repeat_interleave(len(f) // len(self.yes))
        return torch.stack([~yes, yes], 1).float()


def gates_of(*rows):
    return torch.nn.ModuleList(Say(list(row)) for row in rows)


# ---- the authors'


@pytest.mark.parametrize("layer", [0, 1])
def test_gates_equal_the_authors_with_their_weights(recorded, layer):
    theirs = {}
    for n in range(2):
        theirs[f"model.visual_gates_router.{n}.w1.weight"] = formula(2048, 6, n)
        theirs[f"model.visual_gates_router.{n}.w2.weight"] = formula(2, 2048, 10 + n) * 0.1
    theirs["model.layers.0.mlp.up_proj.weight"] = torch.zeros(1)
    gates = ExitGates(2, 3)
    gates.load_state_dict(ExitGates.convert_state_dict(theirs))
    text = recorded[f"{layer}/text"]
    types = torch.full((1, len(text) + 4), TEXT)
    types[0, :4] = IMAGE
    f = exit_features(torch.cat([torch.randn(4, 3), text])[None], types)
    close(f[0], recorded[f"{layer}/f"])
    f = recorded[f"{layer}/f"][None].requires_grad_()
    y = gates[layer](f)
    close(y[0], recorded[f"{layer}/y"])
    (y[0] * recorded[f"{layer}/g"]).sum().backward()
    close(f.grad[0], recorded[f"{layer}/df"])
    close(gates[layer].w1.weight.grad[:16], recorded[f"{layer}/dw1"])
    close(gates[layer].w2.weight.grad[:, :16], recorded[f"{layer}/dw2"])
    with pytest.raises(ValueError, match="no visual_gates_router"):
        ExitGates.convert_state_dict({"w": torch.zeros(1)})


def test_gates_that_read_attention_equal_the_authors():
    """Features of three prompts with answers and padding, and what a gate makes of them."""
    t = load_file(FIXTURE.parent / "dyvte-attention.safetensors")
    types = torch.full((3, 16), TEXT)
    types[:, 2:8] = IMAGE
    end, peak = t["valid"].sum(1) - t["answers"], t["weights"].amax(1)
    rows = peak[:, 7], peak[torch.arange(3), end - 1]
    # Theirs takes text up to the row's end less the answer, wherever padding begins.
    f = attention_exit_features(*rows, types.masked_fill(torch.arange(16) >= 16 - t["answers"][:, None], PAD))
    close(f, t["feat"])
    ours = attention_exit_features(*rows, types.masked_fill(torch.arange(16) >= end[:, None], PAD))
    assert torch.equal(ours[0], f[0]) and not torch.allclose(ours[1:], f[1:])
    gate = ExitGate(18, 288)
    gate.load_state_dict({"w1.weight": formula(288, 18, 0), "w2.weight": formula(2, 288, 10) * 0.1})
    f = f.detach().requires_grad_()
    y = gate(f)
    close(y, t["y"])
    (y * t["g"]).sum().backward()
    close(f.grad, t["df"])
    close(gate.w1.weight.grad[:8], t["dw1"])
    close(gate.w2.weight.grad[:, :16], t["dw2"])
    assert gate.w1.weight.shape == ExitGates(1, 6, 288, features="attention")[0].w1.weight.shape


def test_labels_equal_the_authors(recorded):
    full, left, labels, want = (recorded[f"labels/{n}"] for n in ("full", "left", "labels", "want"))
    assert exit_labels(full, left, labels, compat="authors").tolist() == want.tolist()
    # One answer changed at a label of id 0, which only the authors leave out.
    assert (exit_labels(full, left, labels) != want).nonzero().flatten().tolist() == [3]


def test_label_rule():
    torch.manual_seed(0)
    full = torch.randn(1, 51, 9)
    labels = torch.randint(0, 9, (1, 51))
    assert exit_labels(full, full, labels).tolist() == [1]
    left = full.clone()
    left[0, 7, full[0, 7].argmin()] = full[0, 7].max() + 1e-4
    assert exit_labels(full, left, labels).tolist() == [0]  # 49 of 50
    assert exit_labels(full, left, labels, accuracy=0.97, ratio=2.0).tolist() == [1]
    # The same answers, less surely.
    assert exit_labels(full * 3, full, full.argmax(-1).roll(1, 1)).tolist() == [0]
    # A change where nothing is predicted does not count.
    masked = labels.clone()
    masked[0, 8] = -100
    assert exit_labels(full, left, masked).tolist() == [1]


# ---- features and decision


def test_features_are_of_the_text_behind_the_image_only():
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 4)
    types = torch.tensor(
        [[TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT, TEXT, TEXT, TEXT], [PAD, PAD, TEXT] + [IMAGE] * 5 + [TEXT]]
    )
    f = exit_features(hidden, types)
    close(f[0], torch.cat([hidden[0, 5:8].mean(0), hidden[0, 8]]))
    close(f[1], torch.cat([hidden[1, 8], hidden[1, 8]]))
    changed = hidden.clone()
    changed[0, [1, 2, 4]] = changed[0, [4, 1, 2]]
    changed[0, 0] += 1
    assert torch.equal(exit_features(changed, types)[0], f[0])


def test_size_of_a_gate():
    assert sum(p.numel() for p in ExitGate(2 * 4096).parameters()) == 2 * 4096 * 2048 + 4096


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("exits", [(0, 1), (1, -1), (0, 0), (1, 1)])
def test_every_sample_leaves_where_its_gate_says(family, exits):
    model = picture_model(family)
    inputs = picture_inputs((1, 2))
    gates = gates_of(*([e == n for e in exits] for n in range(3)))
    with attnlib.attach(model, Forbid(image_slots(inputs), exits)):
        want, ids = scores(model, inputs)
    with attnlib.attach(model, DyVTE(gates), token_types=TYPES) as session:
        got, mine = scores(model, inputs)
    close(got, want)
    assert torch.equal(ids, mine)
    shown = session.results["dyvte"]
    assert shown["exit"].tolist() == list(exits)
    text = (inputs["attention_mask"].bool() & ~image_slots(inputs)).sum(1)
    everything = inputs["attention_mask"].sum(1)
    for layer in range(3):
        left = torch.tensor([0 <= e < layer for e in exits])
        assert torch.equal(shown["tokens"][layer], torch.where(left, text, everything))


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_every_way_of_decoding(model, mode):
    inputs = picture_inputs((1, 2))
    gates = gates_of([True, False], [False, True], [False, False])
    with attnlib.attach(model, Forbid(image_slots(inputs), (0, 1))):
        want, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, DyVTE(gates), token_types=TYPES):
        got, _ = scores(model, inputs, **mode)
    close(got, want)


def test_never_leaving_and_leaving_after_the_last_layer_are_the_untouched_model(model):
    inputs = picture_inputs()
    before = scores(model, inputs)
    for gates in (gates_of(*[[False, False]] * 3), gates_of([False] * 2, [False] * 2, [True] * 2)):
        with attnlib.attach(model, DyVTE(gates), token_types=TYPES) as session:
            after = scores(model, inputs)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
        assert session.results["dyvte"]["exit"].tolist() == [-1, -1] and session.results["dyvte"]["saved"] == 0


def test_gates_read_states_after_their_layer(model):
    inputs = picture_inputs((1, 1))
    torch.manual_seed(0)
    gates = ExitGates.of(model, hidden=8)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    types = TYPES(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    with attnlib.attach(model, DyVTE(gates), token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
    said = session.results["dyvte"]["gates"]
    close(said[0], gates[0](exit_features(states[1], types)).detach())
    if not (said[0][:, 1] > said[0][:, 0]).any():
        close(said[1], gates[1](exit_features(states[2], types)).detach())


class Width(torch.nn.Module):
    """Keeps what it was asked, and says yes to chosen rows."""

    def __init__(self, yes):
        super().__init__()
        self.yes, self.seen = torch.tensor(yes), []

    def forward(self, f):
        self.seen.append(f)
        return torch.stack([~self.yes, self.yes], 1).float()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("exits", [(0, 1), (1, -1)])
def test_gates_that_read_attention_see_the_models_own_weights(family, exits):
    model = picture_model(family, implementation="eager")
    inputs = picture_inputs((1, 1))
    gates = torch.nn.ModuleList(Width([e == n for e in exits]) for n in range(3))
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    with attnlib.attach(model, Forbid(image_slots(inputs), exits)):
        want, ids = scores(model, inputs)
    with attnlib.attach(model, DyVTEByAttention(gates), token_types=TYPES) as session:
        got, mine = scores(model, inputs)
    close(got, want)
    assert torch.equal(ids, mine) and session.results["dyvte-by-attention"]["exit"].tolist() == list(exits)
    types = TYPES(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    peak = maps[0].amax(1)
    image = image_slots(inputs)
    end = (image * torch.arange(image.shape[1])).amax(1)
    close(gates[0].seen[0], attention_exit_features(peak[torch.arange(2), end], peak[:, -1], types))
    assert len(gates[0].seen) == len(gates[1].seen) == 1 and not gates[2].seen
    asked = DyVTEByAttention(gates, layers=[1])
    with attnlib.attach(model, asked, token_types=TYPES) as session:
        scores(model, inputs, num_beams=1)
    assert session.results["dyvte-by-attention"]["exit"].tolist() == [1 if e == 1 else -1 for e in exits]


def test_cost_behind_the_exit_is_that_of_the_text(model):
    inputs = picture_inputs((2,))
    text = int((~image_slots(inputs)).sum())
    with attnlib.attach(model, DyVTE(exit_layer=0), token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
    shown = session.results["dyvte"]
    assert shown["lengths"] == (text + 2 * TOKENS, text, text)
    per_token, per_pair = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 4 * 32
    want = sum(per_token * n + per_pair * n * n for n in shown["lengths"])
    assert shown["flops"] == want and shown["saved"] > 0.3


def test_caches_hold_the_image_up_to_the_exit(model):
    inputs = picture_inputs((1,))
    with attnlib.attach(model, DyVTE(exit_layer=1), token_types=TYPES):
        out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [25, 25, 9]


def test_each_prompt_decides_anew(model):
    """What an earlier prompt decided is forgotten, and reported of the last one."""
    inputs = picture_inputs((1, 1))
    gates = gates_of([True, False], [False, False], [False, False])
    with attnlib.attach(model, DyVTE(gates), token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
        assert session.results["dyvte"]["exit"].tolist() == [0, -1]
        gates[0].yes = torch.tensor([False, False])
        model(**inputs)
        assert session.results["dyvte"]["exit"].tolist() == [-1, -1]


def test_composes_with_fewer_tokens_before_and_a_compressed_cache(model):
    inputs = picture_inputs((1, 2))
    parts = [VTCCLS(6, start=1, positions="original"), DyVTE(exit_layer=0), SnapKV(cap=8, window_size=3)]
    with attnlib.attach(model, *parts, token_types=TYPES) as session:
        got, _ = scores(model, inputs)
    assert torch.isfinite(got).all()
    text = int((inputs["attention_mask"].bool() & ~image_slots(inputs)).sum(1).max())
    assert session.results["dyvte"]["lengths"] == (text + 12, text, text)
    keep = ~image_slots(inputs)
    slots = torch.zeros_like(keep)
    with (
        attnlib.attach(model, *[VTCCLS(6, start=1, positions="original")], token_types=TYPES) as session,
        torch.no_grad(),
    ):
        model(**inputs)
    chosen = session.results["vtc-cls"]["slots"]
    for b in range(2):
        slots[b, chosen[b][chosen[b] >= 0]] = True
    with attnlib.attach(model, *parts[:2], token_types=TYPES):
        got, _ = scores(model, inputs)

    class Both(Forbid):
        def around_attention(self, site, q, k, v, call):
            stays = torch.ones(len(q), site.n_keys, dtype=torch.bool)
            stays[:, : keep.shape[1]] = slots if site.layer == 0 else keep
            return call(q, k, v, mask=site.mask.dense() & stays[:, None, None])

    with attnlib.attach(model, Both(keep, (0, 0))):
        want, _ = scores(model, inputs)
    close(got, want)


def test_gates_keep_their_own_precision():
    model = picture_model().to(torch.bfloat16)
    inputs = picture_inputs((1, 2))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with attnlib.attach(model, DyVTE(ExitGates.of(model, 8)), token_types=TYPES) as session:
        assert torch.isfinite(scores(model, inputs)[0]).all()
    assert all(g.dtype == torch.float32 for g in session.results["dyvte"]["gates"].values())


# ---- training


def test_a_gate_learns_when_the_image_does_not_matter(model):
    """Labels come from the model itself; the gate alone is trained, and its loss falls."""
    torch.manual_seed(0)
    inputs = picture_inputs((1, 1, 1, 1), after=8)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    gates = ExitGates.of(model, hidden=16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    loose = dict(accuracy=-1.0, ratio=float("inf"))
    _, target = gate_loss(model, gates, inputs, labels, TYPES, 0, **loose)
    assert target.tolist() == [1] * 4
    _, target = gate_loss(model, gates, inputs, labels, TYPES, 0, ratio=0.0)
    assert target.tolist() == [0] * 4
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.03)
    losses = []
    for _ in range(8):
        loss, _ = gate_loss(model, gates, inputs, labels, TYPES, 0, ratio=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert gates[0].w1.weight.grad.abs().sum() > 0 and gates[1].w1.weight.grad is None


def test_training_reads_the_prompt_without_its_answer(model):
    inputs = picture_inputs((1, 2), after=8)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    labels[1, -5:] = inputs["input_ids"][1, -5:]
    seen = []

    class Gate(torch.nn.Module):
        def forward(self, f):
            seen.append(f)
            return f[:, :2]

    gate_loss(model, torch.nn.ModuleList([Gate()]), inputs, labels, TYPES, 0)
    for b, answer in ((0, 3), (1, 5)):
        images = (1, 2)[b]
        n = 3 + images * (TOKENS + 8) - answer
        start = int((inputs["attention_mask"][b] == 0).sum())
        pixels = inputs["pixel_values"][:1] if b == 0 else inputs["pixel_values"][1:]
        alone = {"input_ids": inputs["input_ids"][b : b + 1, start : start + n], "pixel_values": pixels}
        with torch.no_grad():
            state = model(**alone, output_hidden_states=True).hidden_states[1]
        # Positions begin at the row's start in both, so only rounding differs.
        shifted = exit_features(state, TYPES(alone["input_ids"]))
        torch.testing.assert_close(seen[0][b], shifted[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="labels must have an answer"):
        gate_loss(model, ExitGates.of(model, 8), inputs, torch.full_like(labels, -100), TYPES, 0)


def test_training_reads_rows_of_the_prompt_only(model):
    inputs = picture_inputs((1, 1), after=8)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    labels[1, -5:] = inputs["input_ids"][1, -5:]
    gate = Width([False, False])
    eager = picture_model(implementation="eager")
    with torch.no_grad():
        peak = eager(**inputs, output_attentions=True).attentions[0].amax(1)
    gate_loss(model, torch.nn.ModuleList([gate]), inputs, labels, TYPES, 0, features="attention")
    end = torch.tensor([labels.shape[1] - 4, labels.shape[1] - 6])
    image = image_slots(inputs)
    at = (image * torch.arange(image.shape[1])).amax(1)
    types = TYPES(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    types = types.masked_fill(torch.arange(labels.shape[1]) > end[:, None], PAD)
    two = torch.arange(2)
    close(gate.seen[0], attention_exit_features(peak[two, at], peak[two, end], types))
    gates = ExitGates(3, TOKENS, 16, features="attention")
    loss, _ = gate_loss(model, gates, inputs, labels, TYPES, 0, features="attention")
    loss.backward()
    assert gates[0].w1.weight.grad.abs().sum() > 0


# ---- limits


def test_prompts_without_images_are_left_alone(model):
    gates = gates_of(*[[True, True]] * 3)
    for inputs in (picture_inputs((0, 0)), prompt()):
        before = scores(model, inputs)
        with attnlib.attach(model, DyVTE(gates), token_types=TYPES) as session:
            after = scores(model, inputs)
        assert torch.equal(before[0], after[0]) and session.results["dyvte"]["exit"].tolist() == [-1, -1]


def test_bad_settings_and_use(model):
    gates = ExitGates.of(model, 8)
    with pytest.raises(ValueError, match="either gates, or an exit_layer"):
        DyVTE()
    with pytest.raises(ValueError, match="either gates, or an exit_layer"):
        DyVTE(gates, exit_layer=1)
    with pytest.raises(ValueError, match="exit_layer must be"):
        DyVTE(exit_layer=-1)
    with pytest.raises(ValueError, match="layers must be numbers from 0"):
        DyVTE(gates, layers=[-1])
    with pytest.raises(ValueError, match="layers must be at least 1"):
        ExitGates(0, 4)
    with pytest.raises(ValueError, match="features"):
        ExitGates(1, 4, features="tokens")
    row = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="as many image tokens"):
        attention_exit_features(row, row, torch.tensor([[2, 2, 1, 1], [2, 1, 1, 1]]))
    with pytest.raises(ValueError, match="sample 1 has no text after the image"):
        attention_exit_features(row, row, torch.tensor([[1, 2, 2, 1], [1, 1, 2, 2]]))
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        attnlib.attach(model, DyVTE(exit_layer=2), token_types=TYPES)
    with pytest.raises(ValueError, match="got 1, the model asks up to layer 1"):
        attnlib.attach(model, DyVTE(gates[:1]), token_types=TYPES)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, DyVTE(gates))
    dyvte = DyVTE(gates)
    with attnlib.attach(model, dyvte, token_types=TYPES), pytest.raises(ValueError, match="session already"):
        attnlib.attach(model, DyVTE(gates), token_types=TYPES)
