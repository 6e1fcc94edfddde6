"""The protocol on attnlib's own mechanisms and models, also under ``generate()``."""

import copy

import pytest
import torch

import attnlib
from attnlib import masks
from attnlib.hooks import IMAGE, TEXT, Intervention, MaskByType, Record, TokenTypes, TypeRule, modality_mutual
from attnlib.models.tiny import TinyBackbone, TinyForecaster, TinyLM
from attnlib.steer import DualAttention, SoftPAG
from hooks.models import prompt, scores

transformers = pytest.importorskip("transformers")

from attnlib.models.language import DecoderConfig, DecoderForCausalLM  # noqa: E402

FRAMED = ("around_attention", "on_qkv", "on_kv_read", "on_context", "on_output")


class NoOp(Intervention):
    name = "no-op"

    def __init__(self, layers=None):
        self.layers, self.sites = layers, []

    def around_attention(self, site, q, k, v, call):
        self.sites.append(site)
        return call(q, k, v)

    def on_qkv(self, site, q, k, v):
        return q, k, v

    def on_context(self, site, k_source, v_source):
        return k_source, v_source

    def around_sublayer(self, site, hidden, call):
        return call(hidden)


class Weights(Intervention):
    """Goes through the map without changing it."""

    def on_weights(self, site, weights, rows):
        return weights * 1.0


def stage(name, fn, layers=None):
    made = type("Stage", (Intervention,), {name: lambda self, *args: fn(*args)})()
    made.layers = layers
    return made


def mark(model):
    return [(n, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]


def attention(seed=0, name="softmax-attention", **settings):
    torch.manual_seed(seed)
    module = attnlib.create(name, **{"dim": 16, "num_heads": 4, **settings})
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module.eval()


def decoder(mechanisms=("softmax-attention",), layers=3, seed=0, **changes):
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, mechanisms=list(mechanisms),
        pad_token_id=0, bos_token_id=1, eos_token_id=None, **changes,
    )  # fmt: skip
    model = DecoderForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".mixer.q.weight" in name or ".mixer.k.weight" in name:
                p.mul_(6)
    return model


SHAPES = {
    "sequence": (dict(), (2, 6, 16)),
    "image": (dict(), (2, 3, 4, 16)),
    "video": (dict(num_kv_heads=2), (2, 2, 3, 2, 16)),
    "causal": (dict(causal=True, rotary=10000.0, num_kv_heads=2), (2, 6, 16)),
    "alibi": (dict(alibi=True, qk_norm=True), (2, 6, 16)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grad", [False, True])
def test_no_op_gives_the_same_bits(shape, grad):
    settings, size = SHAPES[shape]
    module, x = attention(**settings), torch.randn(*size, generator=torch.Generator().manual_seed(1))
    valid = torch.rand(size[:-1], generator=torch.Generator().manual_seed(2)) > 0.2
    before_mark, no_op, record = mark(module), NoOp(), Record(rows="all")
    with torch.set_grad_enabled(grad):
        for call in ({}, {"valid": valid}, {"mask": masks.recent(3)}):
            before = module(x, **call)
            with attnlib.attach(module, no_op, Weights(), record):
                assert torch.equal(module(x, **call), before)
            assert torch.equal(module(x, **call), before)
    assert mark(module) == before_mark
    site = no_op.sites[0]
    assert (site.kind, site.heads, site.kv_heads, site.phase) == ("self", 4, settings.get("num_kv_heads", 4), None)


def test_recorded_weights_are_the_mechanisms_own():
    for settings, size in SHAPES.values():
        module, x = attention(**settings), torch.randn(size)
        record, valid = Record(rows="all"), torch.rand(size[:-1]) > 0.3
        with torch.no_grad(), attnlib.attach(module, record):
            module(x, valid=valid)
        own = module(x, valid=valid, returns=("weights",)).weights
        torch.testing.assert_close(record.results()[0]["weights"][0], own, atol=1e-6, rtol=1e-5)


def test_edits_also_reach_the_weights_that_are_returned():
    module, x = attention(), torch.randn(2, 6, 16)
    flip = stage("on_weights", lambda site, w, rows: w.flip(-1))
    with torch.no_grad():
        plain = module(x, returns=("weights",))
        with attnlib.attach(module, flip):
            edited = module(x, returns=("weights",))
        torch.testing.assert_close(edited.weights, plain.weights.flip(-1), atol=1e-6, rtol=1e-5)
        v = module.v(x).unflatten(-1, (4, 4)).transpose(1, 2)
        want = module.proj((plain.weights.flip(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(edited.y, want, atol=1e-5, rtol=1e-5)
        with attnlib.attach(module, NoOp()):
            same = module(x, returns=("weights",))
        assert torch.equal(same.weights, plain.weights) and torch.equal(same.y, plain.y)


def test_stages_equal_other_weights():
    """Halved queries, shifted values, values of another source, a replaced mask: each by hand."""
    module, x, y = attention(), torch.randn(2, 6, 16), torch.randn(2, 9, 16)
    with torch.no_grad():
        other = copy.deepcopy(module)
        other.q.weight *= 0.5
        other.q.bias *= 0.5
        other.v.bias += 0.25
        with attnlib.attach(module, stage("on_qkv", lambda site, q, k, v: (q * 0.5, k, v + 0.25))):
            for source in (None, y):
                torch.testing.assert_close(module(x, source), other(x, source), atol=1e-6, rtol=1e-5)
        with attnlib.attach(module, stage("on_context", lambda site, k, v: (k, v.flip(1)))):
            got = module(x, y)
        weights = module(x, y, returns=("weights",)).weights
        v = module.v(y.flip(1)).unflatten(-1, (4, 4)).transpose(1, 2)
        torch.testing.assert_close(got, module.proj((weights @ v).transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)
        window = stage("around_attention", lambda site, q, k, v, call: call(q, k, v, mask=masks.recent(2)))
        with attnlib.attach(module, window):
            torch.testing.assert_close(module(x), module(x, mask=masks.recent(2)), atol=1e-6, rtol=1e-5)
        image = torch.randn(2, 3, 4, 16)
        untouched = module(image * 0.5)
        with attnlib.attach(module, stage("around_sublayer", lambda site, h, call: 2 * call(h * 0.5) - h)):
            torch.testing.assert_close(module(image), 2 * untouched - image)
        with attnlib.attach(module, SoftPAG(1.0)):
            torch.testing.assert_close(module(x), module.proj(module.v(x)), atol=1e-6, rtol=1e-5)


MODES = [{}, {"num_beams": 3}, {"use_cache": False}]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "mechanism", ["softmax-attention", {"name": "softmax-attention", "num_kv_heads": 2, "qk_norm": True}]
)
def test_no_op_under_generate_of_our_decoder(mode, mechanism):
    model = decoder([mechanism])
    inputs, no_op, record = prompt(), NoOp([1]), Record(rows="last")
    before, ids = scores(model, inputs, **mode)
    before_mark = mark(model)
    with attnlib.attach(model, no_op, Weights(), record) as session:
        assert [s.name for s in session.sites] == [f"model.layers.{i}.mixer" for i in range(3)]
        inside, inside_ids = scores(model, inputs, **mode)
    assert torch.equal(inside, before) and torch.equal(inside_ids, ids) and mark(model) == before_mark
    if mode.get("use_cache", True):
        phases = [(s.phase, s.offset, s.n_queries, s.n_keys) for s in no_op.sites[:3]]
        assert phases == [("prefill", 0, 20, 20), ("decode", 20, 1, 21), ("decode", 21, 1, 22)]


def test_new_keys_are_edited_before_they_join_the_state():
    model = decoder()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mixer.q.weight *= 0.5
            layer.mixer.q.bias *= 0.5
            layer.mixer.v.bias += 0.25
    seen = []

    def shift(site, q, k, v):
        seen.append((site.rotary, site.phase, k.shape[2]))
        return q * 0.5, k, v + 0.25

    for mode in MODES:
        want, _ = scores(other, prompt(), **mode)
        with attnlib.attach(model, stage("on_qkv", shift)):
            torch.testing.assert_close(scores(model, prompt(), **mode)[0], want, atol=1e-5, rtol=1e-5)
    assert seen[0] == (False, "prefill", 20) and seen[3] == (False, "decode", 1)


def test_types_logits_and_steps_of_our_decoder():
    class Watch(Intervention):
        needs_types = True
        layers = [0]

        def __init__(self):
            self.types, self.steps = [], []

        def on_output(self, site, out):
            self.types.append((site.q_types.clone(), site.k_types.clone()))
            return out

        def on_step(self, step):
            self.steps.append(step)

        def on_logits(self, ids, logits):
            return logits.index_fill(1, torch.tensor([7]), float("inf"))

    model, inputs, watch = decoder(), prompt(), Watch()
    inputs["input_ids"][:, 8:11] = 61
    with attnlib.attach(model, watch, token_types=TokenTypes(image=61)):
        out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert (out[:, 20:] == 7).all() and watch.steps == [0, 1, 2]
    want = torch.tensor([[0] * 5 + [1] * 3 + [2] * 3 + [1] * 9, [1] * 8 + [2] * 3 + [1] * 9])
    assert torch.equal(watch.types[0][0], want) and torch.equal(watch.types[0][1], want)
    assert torch.equal(watch.types[-1][1], torch.cat([want, torch.full((2, 2), 5)], 1))


def test_masks_by_type_and_dual_attention_in_our_decoder():
    model, inputs = decoder(), prompt()
    inputs["input_ids"][:, 7:12] = 61
    inputs["input_ids"][:, 17] = 60
    types = TokenTypes(image=61, answer=60)
    with attnlib.attach(model, MaskByType(modality_mutual()), Record(rows="all"), token_types=types) as session:
        cached, ids = scores(model, inputs)
        assert (session.results["record"][1]["weights"][0][:, :, 7:12, 12:17] > 0).all()
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        with torch.no_grad():
            full = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 19:-1]
    torch.testing.assert_close(cached.transpose(0, 1), full, atol=1e-5, rtol=1e-5)
    plain, _ = scores(model, inputs)
    assert not torch.allclose(plain, cached, atol=1e-3)
    with attnlib.attach(model, DualAttention(), token_types=types):
        dual, ids = scores(model, inputs)
        with torch.no_grad():
            full = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 19:-1]
    torch.testing.assert_close(dual.transpose(0, 1), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}])
def test_mechanisms_without_heads_of_their_own_serve_sublayers(mode):
    """A linear mechanism beside softmax: several runs of it leave the state of the first."""
    model = decoder(["lightning-attention-2", "softmax-attention"])
    inputs = prompt()
    before, _ = scores(model, inputs, **mode)
    for same in (lambda site, h, call: call(h), lambda site, h, call: (call(h), call(-h))[0]):
        with attnlib.attach(model, stage("around_sublayer", same)):
            assert torch.equal(scores(model, inputs, **mode)[0], before)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mixer_norm.weight *= 0.5
    want, _ = scores(other, inputs, **mode)
    with attnlib.attach(model, stage("around_sublayer", lambda site, h, call: call(h * 0.5))):
        torch.testing.assert_close(scores(model, inputs, **mode)[0], want, atol=1e-5, rtol=1e-5)
    skipped = stage("around_sublayer", lambda site, h, call: h * 0)
    with attnlib.attach(model, skipped):
        cached, ids = scores(model, inputs)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        with torch.no_grad():
            full = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 19:-1]
    torch.testing.assert_close(cached.transpose(0, 1), full, atol=1e-5, rtol=1e-5)
    for name in FRAMED:
        with pytest.raises(ValueError, match=f"{name}, which LightningAttention.*not built around one operator"):
            attnlib.attach(model, stage(name, lambda *args: None))
    with attnlib.attach(model, NoOp([1, 3] if len(model.model.layers) > 3 else [1])):
        assert torch.equal(scores(model, inputs, **mode)[0], before)


def test_every_registered_mechanism_is_reached_or_says_why():
    """Whatever is registered and can be made from dim and heads: the same bits, or a refusal by name."""
    seen = {"framed": 0, "sublayer": 0}
    for name in attnlib.list_mechanisms():
        try:
            module = attnlib.create(name, dim=16, num_heads=4).eval()
            x = torch.randn(1, 14, 14, 16) if min(module.traits.grid_ranks) == 2 else torch.randn(1, 16, 16)
            torch.manual_seed(0)
            with torch.no_grad():
                before = module(x)
        except (TypeError, ValueError):
            continue  # other settings or another grid are needed, or a context
        with torch.no_grad():
            with attnlib.attach(module, stage("around_sublayer", lambda site, h, call: call(h))):
                torch.manual_seed(0)
                assert torch.equal(module(x), before), name
            seen["sublayer"] += 1
            try:
                session = attnlib.attach(module, NoOp())
            except ValueError as error:
                assert "does not serve" in str(error) and repr(name) in str(error)
                continue
            with session:
                torch.manual_seed(0)
                assert torch.equal(module(x), before), name
            seen["framed"] += 1
    assert seen["framed"] >= 5 and seen["sublayer"] >= 15, seen


def test_weights_that_are_no_softmax_are_refused():
    for name in ("sigmoid-attention",):
        module = attnlib.create(name, dim=16, num_heads=4)
        for bad in (Weights(), Record()):
            with pytest.raises(ValueError, match="not a softmax over scores"):
                attnlib.attach(module, bad)
        with attnlib.attach(module, NoOp()):
            module(torch.randn(1, 5, 16))


def test_tiny_models_and_block_inputs():
    torch.manual_seed(0)
    model = TinyLM(lambda: attnlib.create("softmax-attention", dim=64, num_heads=4, causal=True), length=16).eval()
    tokens, seen = torch.randint(0, 256, (2, 12)), {}

    def look(site, hidden):
        seen[site.layer] = hidden
        return hidden * 0 if site.layer == 1 else None

    with torch.no_grad():
        before = model(tokens).y
        with attnlib.attach(model, NoOp(), Weights(), token_types=TokenTypes(image=7)):
            assert torch.equal(model(tokens).y, before)
        with attnlib.attach(model, stage("on_block_input", look)):
            model(tokens)
        assert torch.equal(seen[0], model.embed(tokens) + model.positions[:12]) and not torch.equal(seen[0], seen[1])
    body = TinyBackbone(16, 2, lambda: attnlib.create("softmax-attention", dim=16, num_heads=4)).eval()
    image = torch.randn(2, 3, 4, 16)
    with torch.no_grad(), attnlib.attach(body, stage("on_block_input", look)):
        out = body(image).y
    assert torch.equal(seen[0], image.flatten(1, 2)) and out.shape == image.shape
    with pytest.raises(ValueError, match="on_block_input.*not inside a numbered block"):
        attnlib.attach(attention(), stage("on_block_input", look))


def test_cross_attention_of_a_forecaster():
    torch.manual_seed(0)
    model = TinyForecaster(
        lambda: attnlib.create("softmax-attention", dim=64, num_heads=4, causal=True),
        lambda causal: attnlib.create("softmax-attention", dim=64, num_heads=4, causal=causal),
    ).eval()
    past, recent = torch.randn(2, 32, 1), torch.randn(2, 16, 1)
    no_op = NoOp()
    with torch.no_grad():
        before = model(past, recent).y
        with attnlib.attach(model, no_op):
            assert torch.equal(model(past, recent).y, before)
    kinds = [(s.layer, s.kind, s.n_queries, s.n_keys) for s in no_op.sites]
    assert ("cross", 4, 8) in [k[1:] for k in kinds] and ("self", 4, 4) in [k[1:] for k in kinds]


def test_gradients_and_dropout():
    module, x = attention(), torch.randn(2, 6, 16, requires_grad=True)
    plain = torch.autograd.grad(module(x).sum(), x)[0]
    with attnlib.attach(module, NoOp()):
        assert torch.equal(torch.autograd.grad(module(x).sum(), x)[0], plain)
    drops = attention(attn_drop=0.5).train()
    with attnlib.attach(drops, NoOp()), pytest.raises(ValueError, match="dropout 0.5 is active"):
        drops(x)
    torch.manual_seed(0)
    before = drops(x)
    with attnlib.attach(drops, Record()):
        torch.manual_seed(0)
        assert torch.equal(drops(x), before)


def test_types_without_ids_and_wrong_shapes():
    module, x = attention(), torch.randn(2, 6, 16)
    types = torch.tensor([[IMAGE, IMAGE, TEXT, TEXT, TEXT, TEXT]]).expand(2, -1)
    lock = TypeRule(lock={(TEXT, IMAGE)})
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed[2:, :2] = False
    with torch.no_grad():
        with attnlib.attach(module, MaskByType(lock), token_types=types):
            got = module(x)
        torch.testing.assert_close(got, module(x, mask=masks.explicit(allowed)), atol=1e-6, rtol=1e-5)
        with (
            attnlib.attach(module, MaskByType(lock), token_types=TokenTypes(1)),
            pytest.raises(ValueError, match="ids"),
        ):
            module(x)
    with (
        attnlib.attach(module, stage("on_qkv", lambda site, q, k, v: (q, k[:, :, 1:], v))),
        pytest.raises(ValueError, match="returned k of shape"),
    ):
        module(x)
    for bad in ("on_cache", "on_tokens"):
        with pytest.raises(ValueError, match=f"{bad}, which is missing for PyTorch models"):
            attnlib.attach(module, stage(bad, lambda *args: None))


def test_an_exception_inside_restores_the_model():
    model, inputs = decoder(), prompt()
    before, _ = scores(model, inputs)
    before_mark = mark(model)

    def breaks(site, q, k, v):
        if site.phase == "decode" and site.layer == 1:
            raise ZeroDivisionError
        return q, k, v * 2

    with pytest.raises(ZeroDivisionError), attnlib.attach(model, stage("on_qkv", breaks)):
        scores(model, inputs)
    assert mark(model) == before_mark and torch.equal(scores(model, inputs)[0], before)


def test_layers_without_stages_keep_their_functions():
    model = decoder()
    before = [layer.mixer.forward.__func__ for layer in model.model.layers]
    with attnlib.attach(model, NoOp([1])):
        for i in (0, 2):
            mixer = model.model.layers[i].mixer
            assert mixer.forward.__func__ is before[i] and not mixer._forward_pre_hooks
            assert "_mix_heads" not in mixer.__dict__ and not mixer.q_norm._forward_hooks
        assert "_mix_heads" in model.model.layers[1].mixer.__dict__
