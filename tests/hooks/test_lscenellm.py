"""LSceneLLM's magnifier: the authors' attention, an oracle, two families with padding and generation, bad input."""

import copy
import json
import types

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import IMAGE, Intervention, TokenTypes  # noqa: E402
from attnlib.steer import (  # noqa: E402
    DetailProjection,
    SceneMagnifier,
    convert_magnifier,
    detail_of_grid,
    detail_of_points,
    magnifier_layers,
    select_coarse,
)
from hooks import llava as tiny_llava  # noqa: E402
from hooks import qwen_vl as tiny_qwen  # noqa: E402
from hooks.models import language_model  # noqa: E402

with safe_open(HERE / "lscenellm.safetensors", "pt") as f:
    HELD = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    SHAPES = json.loads(f.metadata()["shapes"])
IMAGE_ID = 62


# ---- the authors


class Feed(Intervention):
    """Gives two layers chosen inputs and keeps what their attention puts out."""

    def __init__(self, hidden):
        self.hidden, self.out = hidden, {}

    def around_sublayer(self, site, hidden, call):
        if site.layer not in self.hidden:
            return call(hidden)
        self.out[site.layer] = call(self.hidden[site.layer])
        return self.out[site.layer]


def authors_model():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, attention_dropout=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    theirs = {}
    for i in (1, 2):
        weights = synthetic({f"{i}.{k}": s for k, s in SHAPES[f"layer{i}"].items()})
        own = {k.split(".", 1)[1]: v.double() for k, v in weights.items()}
        model.model.layers[i].self_attn.load_state_dict({k: v for k, v in own.items() if "_hd" not in k})
        theirs |= {f"llm.model.layers.{i}.self_attn.{k}": v for k, v in own.items()}
    layers = magnifier_layers(model, 1)
    layers.load_state_dict(convert_magnifier(theirs | {"encoder.weight": torch.zeros(1)}))
    both = magnifier_layers(model, 1, compat="authors")
    assert len(both) == len(layers) + 1
    return model.eval(), layers


@pytest.mark.parametrize("case", ["full", "warm"])
def test_two_layers_equal_the_authors(case):
    model, layers = authors_model()
    ids = torch.full((2, 11), 5)
    ids[:, 2:6] = IMAGE_ID
    rows = torch.zeros(2, 11, dtype=torch.bool)
    rows[0, 7:], rows[1, 7:10] = True, True
    hidden = {1: HELD["hidden1"], 2: HELD["hidden2"].clone().requires_grad_()}
    detail = HELD["detail"].clone().requires_grad_()
    feed, magnifier = Feed(hidden), SceneMagnifier(layers, detail, rows=rows, warm_up=2.0)
    magnifier.set_progress(0.15)
    model.train(case == "warm")
    with attnlib.attach(model, feed, magnifier, token_types=TokenTypes(image=IMAGE_ID)) as session:
        model(input_ids=ids, use_cache=False)
        chosen = session.notes[magnifier, 1]
    close = dict(atol=1e-9, rtol=1e-9)
    theirs = HELD[f"{case}/sel1"].unflatten(-1, (4, 2))
    assert torch.equal(theirs[..., 0], theirs[..., 1]) and theirs.any()
    assert torch.equal(chosen & rows[..., None], theirs[..., 0] & rows[..., None])
    torch.testing.assert_close(feed.out[1], HELD[f"{case}/y1"], **close)
    torch.testing.assert_close(feed.out[2], HELD[f"{case}/y2"], **close)
    (feed.out[2] * HELD[f"{case}/w"]).sum().backward()
    torch.testing.assert_close(hidden[2].grad, HELD[f"{case}/dx2"], **close)
    torch.testing.assert_close(detail.grad, HELD[f"{case}/ddetail"], **close)
    torch.testing.assert_close(layers["2"].k.weight.grad, HELD[f"{case}/dk"], **close)
    torch.testing.assert_close(layers["2"].v.weight.grad, HELD[f"{case}/dv"], **close)


@pytest.mark.parametrize("compat, millions", [(None, 771_751_936), ("authors", 805_306_368)])
def test_parameters_at_seven_billion(compat, millions):
    with torch.device("meta"):
        config = types.SimpleNamespace(num_hidden_layers=32, num_attention_heads=32, hidden_size=4096)
        shell = torch.nn.Linear(1, 1)
        shell.config = config
        layers = magnifier_layers(shell, 8, compat)
    assert sum(p.numel() for p in layers.parameters()) == millions  # 2 x 4096^2 in 23 layers; theirs in 24, one dead


# ---- selection


def test_selection_is_the_least_and_most_of_a_row():
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 4, 9).softmax(-1)
    coarse = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 7]])
    found = select_coarse(weights, coarse)
    for b in range(2):
        for t in range(4):
            a = weights[b, :, t, coarse[b]].sum(0)
            assert torch.equal(found[b, t], (a - a.min()) / (a.max() - a.min()) > 96 / 255)
    assert not select_coarse(weights, coarse, 255).any() and select_coarse(weights, coarse, -1).all()
    alike = torch.full((1, 2, 3, 4), 0.25)
    assert not select_coarse(alike, torch.tensor([[0, 1, 2]])).any()
    grad = weights.clone().requires_grad_()
    assert not select_coarse(grad, coarse).requires_grad


# ---- details


def test_details_of_points_and_of_grids():
    torch.manual_seed(0)
    for axes in (2, 3):  # a picture, a room
        centres = torch.randint(0, 5, (2, 6, axes)).float() * 10
        points = torch.cat([centres + torch.randn(2, 6, axes) * 0.1 for _ in range(8)], 1)
        features = torch.cat([points, points.square()], -1)
        detail = detail_of_points(points, features, centres, count=4, group=8)
        assert detail.shape == (2, 6, 4, 2 * axes)
        assert (detail[..., :axes] - centres[:, :, None]).abs().max() < 1
    whole = detail_of_points(points, features, centres, count=1, group=48)
    torch.testing.assert_close(whole[:, 0, 0], features.mean(1))
    same = detail_of_points(torch.zeros(1, 5, 3), torch.randn(1, 5, 2), torch.zeros(1, 1, 3), count=3, group=5)
    assert same.isfinite().all()
    fine = torch.randn(2, 6, 8, 3)
    cells = detail_of_grid(fine, (3, 4))
    assert cells.shape == (2, 12, 4, 3)
    torch.testing.assert_close(cells[:, 5], fine[:, 2:4, 2:4].flatten(1, 2))


# ---- inside models


def random(layers, scale=0.4):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(torch.randn_like(p) * scale)
    return layers


def family(name, seed=0):
    if name == "llava":
        model = tiny_llava.llava(seed)
        inputs = tiny_llava.llava_inputs(model)
        inputs["input_ids"][0, :2] = 0
        inputs["attention_mask"][0, :2] = 0
    else:
        tiny_qwen.needs_turn()
        model, inputs = tiny_qwen.qwen_vl(seed), tiny_qwen.qwen_vl_inputs()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "language_model" in n and ("q_proj.weight" in n or "k_proj.weight" in n):
                p.mul_(12)
    torch.manual_seed(7)
    return model, inputs, torch.randn(2, 4, 2, 32)


def attached(model, magnifier, *more):
    return attnlib.attach(model, magnifier, *more, token_types=TokenTypes(image=IMAGE_ID))


FAMILIES = ["llava", "qwen"]


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_selected_or_no_share_is_the_plain_model(name):
    model, inputs, detail = family(name)
    layers = random(magnifier_layers(model, 0))

    with torch.no_grad():
        plain = model(**inputs).logits
        for magnifier in (SceneMagnifier(layers), SceneMagnifier(layers, detail, threshold=255)):
            with attached(model, magnifier):
                assert torch.equal(model(**inputs).logits, plain)
        with attached(model, SceneMagnifier(layers, detail)):
            assert not torch.equal(model(**inputs).logits, plain)
        model.train()
        silent = SceneMagnifier(layers, detail, warm_up=1.0)
        trained = model(**inputs).logits
        with attached(model, silent):
            assert torch.equal(model(**inputs).logits, trained)  # alpha is 0
            silent.set_progress(0.5)
            assert silent.alpha(True) == 0.5 and silent.alpha(False) == 1.0
            assert not torch.equal(model(**inputs).logits, trained)
        assert torch.equal(model.eval()(**inputs).logits, plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_rows_stay_bit_for_bit_and_text_is_causal(name):
    model, inputs, detail = family(name)
    layers = random(magnifier_layers(model, 0))
    ids = inputs["input_ids"]
    last = (ids == IMAGE_ID).int().cumsum(1).argmax(1)
    with torch.no_grad():
        plain = model(**inputs).logits
        with attached(model, SceneMagnifier(layers, detail)):
            ours = model(**inputs).logits
            for b in range(2):
                assert torch.equal(ours[b, : last[b] + 1], plain[b, : last[b] + 1])
                assert (ours[b, last[b] + 2 :] != plain[b, last[b] + 2 :]).any()
            changed = {**inputs, "input_ids": ids.clone()}
            changed["input_ids"][:, -1] = 17
            other = model(**changed).logits
        torch.testing.assert_close(other[:, :-1], ours[:, :-1], atol=1e-5, rtol=1e-5)
        rows = torch.zeros_like(ids, dtype=torch.bool)
        rows[:, -2:] = True
        with attached(model, SceneMagnifier(layers, detail, rows=rows)):
            assert torch.equal(model(**inputs).logits[:, :-2], plain[:, :-2])


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_selected_is_attention_over_more_keys(name):
    """Detail keys made of what coarse tokens read, by the layer's own projections, are those keys once more."""
    model, inputs, _ = family(name)
    decoder = model.model.language_model
    layers = magnifier_layers(model, 1)
    hidden = {}

    class Look(Intervention):
        def around_sublayer(self, site, x, call):
            hidden[site.layer] = x
            return call(x)

    class Twice(Intervention):
        """The oracle: coarse keys count twice for text behind them, by a bias of log 2."""

        layers = (2,)

        def around_attention(self, site, q, k, v, call):
            coarse = site.k_types == IMAGE
            slot = torch.arange(k.shape[2])
            after = torch.arange(q.shape[2])[None] > torch.where(coarse, slot, -1).amax(1)[:, None]
            bias = torch.log1p((after[..., None] & coarse[:, None]).float())[:, None]
            return call(q, k, v, bias=bias)

    with torch.no_grad():
        with attnlib.attach(model, Look()):
            model(**inputs)
        attention = decoder.layers[2].self_attn
        layers["2"] = DetailProjection(
            32, layers["2"].num_kv_heads, layers["2"].head_dim, attention.k_proj.bias is not None
        )
        layers["2"].k.load_state_dict(attention.k_proj.state_dict())
        layers["2"].v.load_state_dict(attention.v_proj.state_dict())
        at = inputs["input_ids"] == IMAGE_ID
        detail = hidden[2][at].view(2, 4, 1, 32)  # what the layer reads does not depend on itself
        only = torch.nn.ModuleDict({"2": layers["2"]})
        with attnlib.attach(model, Twice(), token_types=TokenTypes(image=IMAGE_ID)):
            expected = model(**inputs).logits
        with attached(model, SceneMagnifier(only, detail, threshold=-1)):
            ours = model(**inputs).logits
    exists = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[exists], expected[exists], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_padding_beams_and_cache(name):
    model, inputs, detail = family(name)
    layers = random(magnifier_layers(model, 0))
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad(), attached(model, SceneMagnifier(layers, detail)):
        written = model.generate(**inputs, **options)
        beams = model.generate(**inputs, **options, num_beams=2)
        assert beams.sequences.shape == written.sequences.shape
        # Without a cache, every step reads the whole text once more.
        slow = model.generate(**inputs, **options, use_cache=False)
        assert torch.equal(slow.sequences, written.sequences)
        for a, b in zip(slow.logits, written.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if name == "llava":  # a padded row answers as it does alone
        one = {"input_ids": inputs["input_ids"][:1, 2:], "pixel_values": inputs["pixel_values"][:1]}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        with torch.no_grad(), attached(model, SceneMagnifier(layers, detail[:1])):
            alone = model.generate(**one, **options)
        for a, b in zip(alone.logits, written.logits, strict=True):
            torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)


def test_details_stand_where_their_coarse_tokens_do():
    """More text before an image moves neither scores of details nor, but for that text, anything else."""
    model = language_model("llama")
    layers = random(magnifier_layers(model, 0))
    torch.manual_seed(3)
    detail = torch.randn(1, 4, 2, 32)
    ids = torch.tensor([[5, IMAGE_ID, IMAGE_ID, IMAGE_ID, IMAGE_ID, 9, 8, 7]])
    with torch.no_grad(), attached(model, SceneMagnifier(layers, detail)):
        plain = model(input_ids=ids).logits
        shifted = model(input_ids=ids, position_ids=torch.arange(8)[None] + 11).logits
    torch.testing.assert_close(shifted, plain, atol=1e-5, rtol=1e-4)


def test_gradients_reach_details_and_projections_under_checkpointing():
    model, inputs, detail = family("llava")
    layers = random(magnifier_layers(model, 0))
    found = {}
    for checkpointing in (False, True):
        layers.zero_grad()
        asked = detail.clone().requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.train()
        with attached(model, SceneMagnifier(layers, asked)):
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found[checkpointing] = [asked.grad, *(p.grad.clone() for p in layers.parameters())]
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found[checkpointing])
    for a, b in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_prompt_without_a_scene_stays_and_settings_are_copied():
    model, inputs, detail = family("llava")
    layers = random(magnifier_layers(model, 0))
    words = {"input_ids": torch.randint(3, 50, (2, 6))}
    magnifier = SceneMagnifier(layers, detail)
    copy.deepcopy(magnifier)
    with torch.no_grad():
        plain, seen = model(**words).logits, model(**inputs).logits
        with attached(model, magnifier):
            assert torch.equal(model(**words).logits, plain)
            first = model(**inputs).logits
            assert torch.equal(model(**words).logits, plain)  # nothing is left of the last prompt
            magnifier.detail = detail * 3
            assert not torch.equal(model(**inputs).logits, first)
        assert torch.equal(model(**inputs).logits, seen)
        half = model.bfloat16()
        with attached(half, SceneMagnifier(magnifier_layers(half, 0), detail)):
            assert half(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits.dtype == torch.bfloat16


def one(layer=1, kv=2, width=8):
    return {layer: DetailProjection(32, kv, width)}


def reads(model, magnifier, inputs):
    with torch.no_grad(), attached(model, magnifier):
        model(**inputs)


BAD = [
    (lambda m, i, d: SceneMagnifier({}, d), "layers must be neighbours"),
    (lambda m, i, d: SceneMagnifier({0: DetailProjection(32, 2, 8)}, d), "layers must be neighbours"),
    (lambda m, i, d: SceneMagnifier(one(1) | one(3), d), r"layers must be neighbours.*\[1, 3\]"),
    (lambda m, i, d: SceneMagnifier({"a": DetailProjection(32, 2, 8)}, d), "layers must be numbered"),
    (lambda m, i, d: SceneMagnifier(one(), d[..., :5]), "detail must be a tensor of shape"),
    (lambda m, i, d: SceneMagnifier(one(), d, warm_up=0), "warm_up"),
    (lambda m, i, d: magnifier_layers(m, 7), "start"),
    (lambda m, i, d: convert_magnifier({"model.norm.weight": torch.zeros(2)}), "no k_proj_hd"),
    (lambda m, i, d: reads(m, SceneMagnifier(one(1, 1), d), i), r"layers\[1\] makes 1 heads of 8"),
    (lambda m, i, d: reads(m, SceneMagnifier(one(9), d), i), "layer 8 does not exist"),
    (lambda m, i, d: reads(m, SceneMagnifier(one(), d[:, :3]), i), r"detail is of 3 coarse tokens.*\[4, 4\]"),
    (lambda m, i, d: reads(m, SceneMagnifier(one(), torch.cat([d, d[:1]])), i), "detail is of 3 rows"),
    (
        lambda m, i, d: reads(m, SceneMagnifier(one(), d, rows=torch.ones(3, 4, dtype=torch.bool)), i),
        "rows is of 3 rows",
    ),
    (lambda m, i, d: detail_of_points(d[:, :, 0], d[:, :, 0], d[:, :, 0], 4, 9), "group"),
    (lambda m, i, d: detail_of_grid(torch.zeros(1, 5, 4, 2), (2, 2)), "fine is 5 x 4"),
    (lambda m, i, d: detail_of_grid(torch.zeros(1, 4, 4, 2), (-2, 2)), r"grid\[0\] must be"),
    (lambda m, i, d: one()[1](d[:, :, 0, :5]), "x has 5 channels"),
    (lambda m, i, d: select_coarse(torch.ones(1, 2, 3, 3), torch.tensor([[7]])), "coarse points at key 7"),
]


@pytest.mark.parametrize("call, says", BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(call, says):
    model, inputs, detail = family("llava")
    with pytest.raises(ValueError, match=says):
        call(model, inputs, detail)
    with pytest.raises(TypeError, match="layers"):
        SceneMagnifier([DetailProjection(32, 2, 8)], detail)


def test_rows_left_out_of_a_call_change_nothing():
    """Alone, only rows that look are attended anew; beside somebody who acts on attention, all rows are."""

    class Around(Intervention):
        def around_attention(self, site, q, k, v, call):
            self.rows = q.shape[2]
            return call(q, k, v)

    model = language_model("llama")
    layers = magnifier_layers(model, 0)
    ids = torch.full((2, 14), 5)
    ids[0, 2:6], ids[1, 3:7] = IMAGE_ID, IMAGE_ID
    detail, found = torch.randn(2, 4, 3, layers["1"].dim), []
    for others in ((), (Around(),)):
        magnifier = SceneMagnifier(layers, detail)
        with torch.no_grad(), attnlib.attach(model, magnifier, *others, token_types=TokenTypes(image=IMAGE_ID)):
            found.append(model(input_ids=ids, use_cache=False).logits)
    assert others[0].rows == 14
    plain = model(input_ids=ids, use_cache=False).logits.detach()
    assert torch.equal(found[0][:, :2], plain[:, :2]) and not torch.allclose(found[0], plain, atol=1e-3)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
