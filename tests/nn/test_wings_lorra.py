"""Wings: low-rank residual attention, its router, and learners beside the layers of models that exist."""

import sys
from pathlib import Path

import pytest
import torch
from parity import Fixture
from safetensors.torch import load_file

import attnlib
from attnlib.nn.multimodal.wings_lorra import ROUTER_ACTIVATIONS, LayerWings, LearnerRouter

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
RECORDED = load_file(HERE / "fixtures" / "wings-lorra.safetensors")
OPTIONS = Fixture("wings-lorra-options")


def _under(prefix):
    return {k[len(prefix) :]: v for k, v in RECORDED.items() if k.startswith(prefix)}


def _random(module, scale=0.4, seed=5):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return module


def test_learner_equals_the_authors():
    m = attnlib.create("wings-lorra", dim=16, num_heads=2, rank=3, rotary=1e4)
    m.load_state_dict(attnlib.convert_state_dict("wings-lorra", _under("image/sd/")))
    h, e = (RECORDED[f"image/x/{n}"].clone().requires_grad_() for n in ("h", "features"))
    y = m.attend(h, e, torch.arange(9), RECORDED["image/pos"])
    torch.testing.assert_close(y, RECORDED["image/y"], rtol=1e-5, atol=1e-5)
    (y * RECORDED["image/g"]).sum().backward()
    torch.testing.assert_close(h.grad, RECORDED["image/dx/h"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(e.grad, RECORDED["image/dx/features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.proj[1].weight.grad, RECORDED["image/dw/o_proj.1.weight"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.k[0].weight.grad, RECORDED["image/dw/k_proj.0.weight"], rtol=1e-5, atol=1e-5)


def test_router_equals_the_authors_and_sums_to_one():
    router = LearnerRouter(12)
    router.load_state_dict(_under("router/sd/"))
    weighed = router(RECORDED["router/a"].sum(1))
    torch.testing.assert_close(weighed, RECORDED["router/y"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighed.sum(-1), torch.ones(2, 9))


def test_options_of_the_learner_equal_the_authors():
    """Three heads though the model has one key head, another base, and a mask of numbers with rows that hide all."""
    m = attnlib.create("wings-lorra", **OPTIONS.config["grouped"])
    m.load_state_dict(attnlib.convert_state_dict("wings-lorra", OPTIONS.under("grouped/sd")))
    x = {k: v.clone().requires_grad_() for k, v in OPTIONS.under("grouped/x").items()}
    low = OPTIONS.tensors["grouped/mask"][..., :5].clone()
    for row, count in enumerate(OPTIONS.config["padding"]):
        low[row, :, low.shape[2] - count :] = torch.finfo(torch.float32).min
    y = m.attend(x["h"], x["features"], torch.arange(7), OPTIONS.tensors["grouped/pos"], bias=low)
    torch.testing.assert_close(y, OPTIONS.tensors["grouped/y"], rtol=1e-5, atol=1e-5)
    (y * OPTIONS.tensors["grouped/g"]).sum().backward()
    for name, expected in OPTIONS.under("grouped/dx").items():
        torch.testing.assert_close(x[name].grad, expected, rtol=1e-5, atol=2e-5)
    for name, expected in attnlib.convert_state_dict("wings-lorra", OPTIONS.under("grouped/dw")).items():
        torch.testing.assert_close(m.get_parameter(name).grad, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "activation", sorted(OPTIONS.under("router").keys() - {"a", "sd/linear.weight", "sd/linear.bias"})
)
def test_activations_of_the_router_equal_the_authors(activation):
    router = LearnerRouter(6, activation)
    router.load_state_dict(OPTIONS.under("router/sd"))
    weighed = router(OPTIONS.tensors["router/a"].sum(1))
    torch.testing.assert_close(weighed, OPTIONS.tensors[f"router/{activation}"], rtol=1e-5, atol=1e-6)


def test_every_activation_is_recorded():
    assert {*OPTIONS.under("router"), "silu"} - {"a", "sd/linear.weight", "sd/linear.bias"} == set(ROUTER_ACTIVATIONS)


@pytest.mark.parametrize("case", ["none-both", "zeros-both", "some-both", "some-image", "some-text"])
def test_layer_with_the_authors_mask_and_padding_equals_theirs(case):
    """Their released layer whole: both learners, added as often as it does, and states that may read nothing."""
    padding, kinds = case.split("-")
    wings = LayerWings(**OPTIONS.config["layer"], compat="authors")
    wings.load_state_dict(LayerWings.convert_state_dict(OPTIONS.under("layer/sd")))
    t = {k: v.clone() for k, v in OPTIONS.under("layer").items()}
    x = {name: t[name].requires_grad_() for name in ("h", "image", "text") if name in ("h", kinds) or kinds == "both"}
    y = wings(
        x["h"], x.get("image"), x.get("text"), t["attended"], image_pos=t["image_pos"], text_pos=t["text_pos"],
        mask=t["mask"][:, 0] == 0, text_padding={"none": None, "zeros": [0, 0, 0], "some": [0, 1, 2]}[padding],
    )  # fmt: skip
    torch.testing.assert_close(y, t[f"{case}/y"], rtol=1e-5, atol=1e-5)
    (y * t["g"]).sum().backward()
    for name, tensor in x.items():
        torch.testing.assert_close(tensor.grad, t[f"{case}/d{name}"], rtol=1e-5, atol=2e-5)
    if case == "some-both":
        for name, expected in LayerWings.convert_state_dict(OPTIONS.under("layer/dw")).items():
            torch.testing.assert_close(wings.get_parameter(name).grad, expected, rtol=1e-5, atol=2e-5)


def test_the_layers_own_mask_is_read_where_text_stands():
    m = _random(LayerWings(16, 2, 3, max_keys=12))
    text_pos, slots = torch.tensor([[0, 1, 6, 7, 8]]), torch.arange(9)
    h, text = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
    causal = (slots <= slots[:, None])[None]
    torch.testing.assert_close(m(h, None, text, text_pos=text_pos, mask=causal), m(h, None, text, text_pos=text_pos))
    window = causal & (slots > slots[:, None] - 3)
    allowed = window[:, None][..., text_pos[0]]
    torch.testing.assert_close(
        m(h, None, text, text_pos=text_pos, mask=window), m.textual.attend(h, text, slots, text_pos, mask=allowed)
    )
    for bad, match in (
        (dict(mask=causal[:, :4]), "mask must be boolean"),
        (dict(mask=causal.float()), "mask must be boolean"),
        (dict(mask=causal[..., :8]), "text_pos goes up to 8"),
        (dict(mask=causal[0]), "mask"),
        (dict(text_padding=[0, 1]), "compat='authors'"),
    ):
        with pytest.raises(ValueError, match=match):
            m(h, None, text, text_pos=text_pos, **bad)
    authors = LayerWings(16, 2, 3, max_keys=12, compat="authors")
    with pytest.raises(ValueError, match="one number for each of 2"):
        authors(h, None, text, text_padding=[1])
    with pytest.raises(ValueError, match="4 slots"):
        authors(h, None, text, mask=causal[..., :4])


def test_weights_are_dropped_in_training_only():
    torch.manual_seed(0)
    m = _random(LayerWings(16, 2, 3, max_keys=12, attn_drop=0.5))
    h, e, a = RECORDED["image/x/h"], RECORDED["image/x/features"], RECORDED["router/a"].sum(1)
    still = _random(LayerWings(16, 2, 3, max_keys=12)).eval()
    torch.testing.assert_close(m.eval()(h, e, h, a), still(h, e, h, a))
    many = torch.stack([m.train().visual.attend(h, e) for _ in range(3000)])
    assert not torch.equal(many[0], many[1])
    # Weights become w / 0.5 with probability 0.5, so that the mean is what it is without dropout.
    error = many.std(0) / 3000**0.5
    assert bool(((many.mean(0) - still.visual.attend(h, e)).abs() < 5 * error + 1e-6).all())
    with pytest.raises(ValueError, match="attn_drop"):
        LayerWings(16, 2, attn_drop=1.5)


def test_layer_loads_the_authors_names_and_repeats_their_sum_on_request():
    theirs = {f"attn_pool.{k}": v for k, v in _under("image/sd/").items()}
    theirs |= {f"attn_t_pool.{k}": v * 0.5 for k, v in _under("image/sd/").items()}
    theirs |= {f"reweight_module.{k}": v for k, v in _under("router/sd/").items()}
    ours = LayerWings.convert_state_dict(theirs)
    h, e, a = RECORDED["image/x/h"], RECORDED["image/x/features"], RECORDED["router/a"].sum(1)
    added = {}
    for compat in (None, "authors"):
        wings = LayerWings(16, 2, 3, max_keys=12, compat=compat)
        wings.load_state_dict(ours)
        added[compat] = wings(h, e, h, a)
    torch.testing.assert_close(added["authors"], 2 * added[None])
    router = wings.router(a)
    causal = attnlib.masks.causal()
    spec = router[..., :1] * wings.visual.attend(h, e) + router[..., 1:] * wings.textual.attend(h, h, mask=causal)
    torch.testing.assert_close(added[None], spec)


def test_parameters_per_layer():
    with torch.device("meta"):
        one = LayerWings(4096, 32, textual=False)
        two = LayerWings(4096, 32)
    count = [sum(p.numel() for p in m.parameters()) for m in (one, two)]
    assert count[0] == 8 * 4096 * 64 == 2_097_152
    assert count[1] == 2 * count[0] + 8194


def test_gradients_reach_the_output_map_first():
    wings = LayerWings(16, 2, 3, max_keys=9)
    h, e, a = RECORDED["image/x/h"], RECORDED["image/x/features"], RECORDED["router/a"].sum(1)
    optimizer = torch.optim.SGD(wings.parameters(), 0.5)

    def reached():
        optimizer.zero_grad()
        (wings(h, e, h, a) * RECORDED["image/g"]).sum().backward()
        return {n for n, p in wings.named_parameters() if p.grad is not None and bool(p.grad.any())}

    assert reached() == {"visual.proj.1.weight", "textual.proj.1.weight"}
    optimizer.step()
    second = reached()
    assert {"visual.v.1.weight", "visual.q.1.weight", "visual.proj.0.weight", "router.linear.weight"} <= second


# ---- beside the layers of models that exist


def _model(family="llama"):
    pytest.importorskip("transformers")
    from hooks.models import language_model

    return language_model(family)


def _learners(model, textual=True, scale=0.3):
    torch.manual_seed(3)
    layers = model.config.num_hidden_layers
    made = torch.nn.ModuleList(LayerWings(32, 4, 2, textual=textual, max_keys=64) for _ in range(layers))
    return _random(made, scale) if scale else made


def _prompt(pad=(0, 0)):
    from hooks.models import prompt

    inputs = prompt(pad=pad, length=16)
    inputs["input_ids"][:, 7:11] = 61
    return inputs


def _attach(model, learners, textual=True):
    from attnlib.hooks import TokenTypes
    from attnlib.steer import VisualWings, Wings

    return attnlib.attach(model, (Wings if textual else VisualWings)(learners), token_types=TokenTypes(image=61))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("textual", [False, True])
def test_fresh_learners_change_nothing(family, textual):
    from hooks.models import scores

    model, inputs = _model(family), _prompt((3, 0))
    before, _ = scores(model, inputs)
    with _attach(model, _learners(model, textual, scale=0), textual):
        assert torch.equal(scores(model, inputs)[0], before)
    assert torch.equal(scores(model, inputs)[0], before)


def _oracle(model, learners, ids, textual):
    """Full forward pass of a Llama model written out, learners included; (B, N, V)."""
    decoder, image = model.model, ids == 61
    x = embeds = model.get_input_embeddings()(ids)
    n = ids.shape[1]
    at = torch.arange(n)
    cos, sin = decoder.rotary_emb(x, at[None])
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    prompt = at < 16
    for layer, wings in zip(decoder.layers, learners, strict=True):
        u, a = layer.input_layernorm(x), layer.self_attn
        q, k, v = (f(u).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
        turn = lambda t: t * cos[:, None] + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin[:, None]  # noqa: E731
        k, v = (t.repeat_interleave(2, 1) for t in (turn(k), v))
        w = ((turn(q) @ k.transpose(-1, -2)) * 8**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        h = x + a.o_proj((w @ v).transpose(1, 2).flatten(2))
        rows = []
        for b in range(len(ids)):
            seen, said = image[b] & prompt, ~image[b] & prompt
            z = wings.visual.attend(h[b : b + 1], embeds[b : b + 1, seen], at, at[seen])
            if textual:
                mask = at[said] <= at[:, None]
                t = wings.textual.attend(h[b : b + 1], embeds[b : b + 1, said], at, at[said], mask=mask)
                r = wings.router(w[b : b + 1].sum(1))
                z = r[..., :1] * z + r[..., 1:] * t
            rows.append(z)
        x = h + torch.cat(rows)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


@pytest.mark.parametrize("textual", [False, True])
def test_generation_equals_the_model_written_out(textual):
    from hooks.models import scores

    model, inputs = _model(), _prompt()
    learners = _learners(model, textual)
    plain, _ = scores(model, inputs)
    with _attach(model, learners, textual):
        got, ids = scores(model, inputs)
    with torch.no_grad():
        want = _oracle(model, learners, ids, textual)[:, 15:-1]
    torch.testing.assert_close(got.transpose(0, 1), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-2)
    from attnlib.hooks import Record, TokenTypes
    from attnlib.steer import VisualWings, Wings

    with attnlib.attach(
        model, (Wings if textual else VisualWings)(learners), Record(rows="all"), token_types=TokenTypes(image=61)
    ):
        assert torch.equal(scores(model, inputs)[0], got)


@pytest.mark.parametrize("textual", [False, True])
def test_padding_samples_without_image_and_beams(textual):
    from hooks.models import scores

    model = _model()
    learners = _learners(model, textual)
    inputs = _prompt((4, 0))
    inputs["input_ids"][1, 7:11] = 20
    with _attach(model, learners, textual):
        together, _ = scores(model, inputs)
        alone, _ = scores(model, {k: v[:1, 4:] for k, v in inputs.items()})
        torch.testing.assert_close(together[:, :1], alone, rtol=1e-5, atol=1e-5)
        bare, _ = scores(model, {k: v[1:] for k, v in inputs.items()})
        torch.testing.assert_close(together[:, 1:], bare, rtol=1e-5, atol=1e-5)
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, num_beams=2, do_sample=False)
        static, _ = scores(model, inputs, cache_implementation="static")
    torch.testing.assert_close(static, together, rtol=1e-5, atol=1e-5)
    if not textual:
        plain, _ = scores(model, inputs)
        torch.testing.assert_close(together[:, 1], plain[:, 1])


def test_learners_train_in_place():
    model, inputs = _model(), _prompt()
    model.requires_grad_(False)
    learners = _learners(model, scale=0)
    with _attach(model, learners):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    assert all(bool(one.visual.proj[1].weight.grad.any()) for one in learners)


def test_bad_input():
    model = _model()
    from attnlib.hooks import TokenTypes
    from attnlib.steer import VisualWings, Wings

    with pytest.raises(ValueError, match="num_kv_heads=2 must equal"):
        attnlib.create("wings-lorra", dim=16, num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        attnlib.create("wings-lorra", dim=16, num_heads=4, rank=0)
    with pytest.raises(ValueError, match="max_keys"):
        LearnerRouter(4)(torch.rand(1, 3, 5))
    with pytest.raises(ValueError, match="attended is needed"):
        LayerWings(16, 2, 2)(torch.randn(1, 3, 16), torch.randn(1, 2, 16), torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="compat"):
        LayerWings(16, 2, 2, compat="paper")
    with pytest.raises(ValueError, match="empty"):
        Wings([])
    with pytest.raises(TypeError, match="LayerWings"):
        VisualWings([torch.nn.Identity()])
    with pytest.raises(ValueError, match="no textual learner"):
        Wings([LayerWings(32, 4, 2, textual=False)])
    with pytest.raises(ValueError, match="16 wide"):
        attnlib.attach(model, Wings([LayerWings(16, 2, 2)]), token_types=TokenTypes(image=61))
    with pytest.raises(ValueError, match="layer 7"):
        attnlib.attach(model, Wings({7: LayerWings(32, 4, 2)}), token_types=TokenTypes(image=61))
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, Wings(_learners(model)))


def test_masks_compare_positions_and_the_authors_mask_counts_tokens():
    """Text around an image of four tokens: by position nothing later is read; by index, behind the image, it is."""
    m = LayerWings(16, 2, 3, max_keys=12)
    _random(m)
    text_pos, slots = torch.tensor([0, 1, 6, 7, 8]), torch.arange(9)
    h, text = torch.randn(1, 9, 16), torch.randn(1, 5, 16)
    causal = attnlib.masks.causal()
    by_position = m.textual.attend(h, text, slots, text_pos, mask=causal)
    allowed = (text_pos <= slots[:, None])[None, None]
    torch.testing.assert_close(by_position, m.textual.attend(h, text, slots, text_pos, mask=allowed))
    torch.testing.assert_close(by_position, m(h, None, text, text_pos=text_pos))
    authors = LayerWings(16, 2, 3, max_keys=12, compat="authors")
    authors.load_state_dict(m.state_dict())
    allowed = (torch.arange(5) <= slots[:, None])[None, None]
    expected = m.textual.attend(h, text, slots, text_pos, mask=allowed)
    torch.testing.assert_close(authors(h, None, text, text_pos=text_pos), expected)
    assert float((expected - by_position).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="activation="):
        LearnerRouter(4, activation="prelu")
