"""p-Laplacian adapter: alone, as a mechanism, and behind the attention of models that exist."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture
from safetensors.torch import load_file

import attnlib
from attnlib.nn.multimodal.p_adapter import BottleneckAdapter, PLaplacianAdapter, pool_nodes

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
RECORDED = load_file(HERE / "fixtures" / "p-adapter.safetensors")
OPTIONS = Fixture("p-adapter-options")


@pytest.mark.parametrize("case", ["self", "square", "cube", "cross"])
def test_equals_the_authors(case):
    data = {k[len(case) + 1 :]: v for k, v in RECORDED.items() if k.startswith(case + "/")}
    sd = {k[3:]: v for k, v in data.items() if k.startswith("sd/")}
    adapter = PLaplacianAdapter(16, 2, reduction=4, restart=case != "cross")
    adapter.load_state_dict(PLaplacianAdapter.convert_state_dict(sd))
    h, a = (data[n].clone().requires_grad_() for n in "ha")

    def dense(x):
        return F.linear(x, sd["dense.weight"], sd["dense.bias"])

    y = adapter(dense(h), a, dense(data["v"]), dense(data["q"]) if case == "cross" else None)
    torch.testing.assert_close(y, data["y"], rtol=1e-5, atol=1e-5)
    (y * data["g"]).sum().backward()
    for ours, name in ((h.grad, "dx/h"), (a.grad, "dx/a"), (adapter.p.grad, "dw/p"), (adapter.theta.grad, "dw/theta")):
        torch.testing.assert_close(ours, data[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.inner.weight.grad, data["dw/inner"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["masked", "fixed", "sampled", "upsampled", "step"])
def test_options_equal_the_authors(case):
    """Three heads, no bottleneck, an exponent that is not learned, other numbers of nodes, one new token."""
    settings = dict(OPTIONS.config[case])
    pooled = settings.pop("pooled")
    adapter = PLaplacianAdapter(**settings)
    theirs = OPTIONS.under(f"{case}/sd")
    adapter.load_state_dict(PLaplacianAdapter.convert_state_dict(theirs))
    assert ("p" in adapter.state_dict()) == settings["learn_p"]
    x = {k: v.clone().requires_grad_() for k, v in OPTIONS.under(f"{case}/x").items()}

    def dense(t):
        return F.linear(t, theirs["dense.weight"], theirs["dense.bias"])

    weights, nodes = (x["a"], x["v"]) if pooled is None else pool_nodes(x["a"], x["v"], pooled)
    y = adapter(dense(x["h"]), weights, dense(nodes), dense(x["q"]) if "q" in x else None)
    torch.testing.assert_close(y, OPTIONS.tensors[f"{case}/y"], rtol=1e-5, atol=1e-5)
    (y * OPTIONS.tensors[f"{case}/g"]).sum().backward()
    for name, expected in OPTIONS.under(f"{case}/dx").items():
        torch.testing.assert_close(x[name].grad, expected, rtol=1e-5, atol=1e-5)
    for name, expected in PLaplacianAdapter.convert_state_dict(OPTIONS.under(f"{case}/dw")).items():
        torch.testing.assert_close(adapter.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-5)


def test_bottleneck_of_the_feed_forward_equals_the_authors():
    adapter = BottleneckAdapter(**OPTIONS.config["ffn"])
    adapter.load_state_dict(BottleneckAdapter.convert_state_dict(OPTIONS.under("ffn/sd")))
    x = OPTIONS.tensors["ffn/x/x"].clone().requires_grad_()
    y = adapter(x)
    torch.testing.assert_close(y, OPTIONS.tensors["ffn/y"], rtol=1e-5, atol=1e-5)
    (y * OPTIONS.tensors["ffn/g"]).sum().backward()
    torch.testing.assert_close(x.grad, OPTIONS.tensors["ffn/dx/x"], rtol=1e-5, atol=1e-5)
    for name, expected in BottleneckAdapter.convert_state_dict(OPTIONS.under("ffn/dw")).items():
        torch.testing.assert_close(adapter.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="does not have: attn"):
        BottleneckAdapter.convert_state_dict({**OPTIONS.under("ffn/sd"), "attn": torch.zeros(1)})


def test_cross_attention_reads_the_keys_themselves_on_request():
    m = attnlib.create("p-adapter", dim=16, num_heads=2, cross=True, pooled=None, reduction=4)
    pooled = attnlib.create("p-adapter", dim=16, num_heads=2, cross=True, pooled=7, reduction=4)
    pooled.load_state_dict(m.state_dict())
    x, context = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    torch.testing.assert_close(m(x, context), pooled(x, context))


def _pieces(n=6, m=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 3, n, m, dtype=torch.float64, generator=g).softmax(-1)
    return a, *(torch.randn(2, 3, k, 4, dtype=torch.float64, generator=g) for k in (m, n))


def test_messages_are_the_equation_pair_by_pair():
    adapter = PLaplacianAdapter(24, 3, reduction=2, p=1.6).double()
    a, keys, queries = _pieces(5, 7)
    got = adapter.pass_messages(a, keys, queries)
    p, mu = 1.6, 0.2
    for b, h, i in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        g = [(a[b, h, i, j] ** 0.5 * (keys[b, h, j] - queries[b, h, i])).norm() ** (p - 2) for j in range(7)]
        edges = torch.stack([a[b, h, i, j] * g[j] for j in range(7)])
        alpha = 1 / (edges.sum() + 2 * mu / p)
        want = alpha * (edges @ keys[b, h]) + alpha * 2 * mu / p * queries[b, h, i]
        torch.testing.assert_close(got[b, h, i], want, rtol=1e-5, atol=1e-6)


def test_limits_of_p_and_mu():
    a, x, _ = _pieces()
    adapter = PLaplacianAdapter(24, 3, reduction=2, p=2.0).double()
    torch.testing.assert_close(adapter.pass_messages(a, x, x), (a @ x + 0.2 * x) / 1.2)
    adapter.mu = 1e9
    torch.testing.assert_close(adapter.pass_messages(a, x, x), x, rtol=1e-6, atol=1e-6)
    adapter.mu = 1e-12
    torch.testing.assert_close(adapter.pass_messages(a, x, x), a @ x)
    for p in (1.25, 2.0, 3.0):
        ones = torch.ones_like(x)
        rows = PLaplacianAdapter(24, 3, reduction=2, p=p).double().pass_messages(a, ones, ones)
        torch.testing.assert_close(rows, ones)


def test_like_nodes_stay_finite():
    adapter = PLaplacianAdapter(24, 3, reduction=2)
    x = torch.ones(1, 3, 5, 4, requires_grad=True)
    out = adapter.pass_messages(torch.full((1, 3, 5, 5), 0.2), x, x)
    out.sum().backward()
    assert bool(out.isfinite().all()) and bool(x.grad.isfinite().all()) and bool(adapter.p.grad.isfinite().all())


def test_small_p_keeps_two_classes_apart_that_attend_to_each_other():
    """A graph whose edges join unlike nodes only, self-edges aside: messages with p = 2 blur the classes."""
    sign = torch.tensor([1.0, -1.0] * 4)
    a = 0.1 * torch.eye(8) + 0.9 * (sign[:, None] != sign).float() / 4
    x = (sign[:, None] + 0.05 * torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))[None, None]

    def apart(p):
        out = PLaplacianAdapter(4, 1, reduction=1, p=p).pass_messages(a[None, None], x, x)[0, 0].mean(1)
        return float((out[sign > 0].mean() - out[sign < 0].mean()).detach())

    assert apart(1.25) > 1.5 > abs(apart(2.0))


def test_a_closed_output_map_is_the_base():
    m = attnlib.create("p-adapter", dim=16, num_heads=2, causal=True)
    base = attnlib.create("softmax-attention", dim=16, num_heads=2, causal=True)
    base.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith("adapter.")})
    for p in m.adapter.outer.parameters():
        torch.nn.init.zeros_(p)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(m(x), base(x))


def test_parameters_of_the_paper():
    count = sum(p.numel() for p in PLaplacianAdapter(768, 12).parameters())
    assert count == 2 * (768 * 96 + 96) + 96 * 768 + 768 + 2 == 222_146


def test_pooled_nodes_are_means_of_keys_that_exist():
    weights, nodes = torch.rand(2, 2, 3, 8), torch.randn(2, 8, 4)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, 5:] = False
    pooled, means = pool_nodes(weights, nodes, 4, valid)
    torch.testing.assert_close(pooled, weights.unflatten(-1, (4, 2)).mean(-1))
    torch.testing.assert_close(means[0, 2], nodes[0, 4])
    torch.testing.assert_close(means[1], nodes[1].unflatten(0, (4, 2)).mean(1))
    torch.testing.assert_close(pool_nodes(weights, nodes, 4)[1], nodes.unflatten(1, (4, 2)).mean(2))


# ---- behind the attention of models that exist


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_generation_equals_the_equation_and_a_closed_map_changes_nothing(family):
    pytest.importorskip("transformers")
    from hooks.models import language_model, prompt, scores

    from attnlib.hooks import Record
    from attnlib.steer import PLaplacian

    model, inputs = language_model(family), prompt()
    torch.manual_seed(0)
    adapters = torch.nn.ModuleList(PLaplacianAdapter(32, 4, p=1.5) for _ in range(3))
    plain, _ = scores(model, inputs)
    closed = PLaplacianAdapter(32, 4)
    torch.nn.init.zeros_(closed.outer.weight)
    torch.nn.init.zeros_(closed.outer.bias)
    with attnlib.attach(model, PLaplacian({1: closed})):
        assert torch.equal(scores(model, inputs)[0], plain)
    with attnlib.attach(model, PLaplacian(adapters)):
        got, ids = scores(model, inputs)
        alone, _ = scores(model, {k: v[:1, 5:] for k, v in inputs.items()})
        static, _ = scores(model, inputs, cache_implementation="static")
        mask = F.pad(inputs["attention_mask"], (0, 5), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 19:-1]
    torch.testing.assert_close(got.transpose(0, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:, :1], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(static, got, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)
    # One layer against the equation, from recorded weights and values.
    seen = {}
    layer = model.model.layers[0].self_attn
    hook = layer.v_proj.register_forward_hook(lambda m, a, out: seen.__setitem__("v", out))
    after = layer.register_forward_hook(lambda m, a, out: seen.__setitem__("y", out[0]))
    before = layer.o_proj.register_forward_hook(lambda m, a, out: seen.setdefault("o", []).append(out))
    with torch.no_grad(), attnlib.attach(model, PLaplacian({0: adapters[0]}), Record(layers=[0], rows="all")) as s:
        model(**{k: v[1:] for k, v in inputs.items()})
    for handle in (hook, after, before):
        handle.remove()
    weights = s.results["record"][0]["weights"][0]
    values = seen["v"].unflatten(-1, (2, 8)).repeat_interleave(2, 2).flatten(2)
    want = adapters[0](seen["o"][0], weights, layer.o_proj(values))
    torch.testing.assert_close(seen["y"], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores(model, inputs)[0], plain)


def test_cross_attention_of_a_translation_model():
    transformers = pytest.importorskip("transformers")
    from attnlib.steer import PLaplacian

    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    ids = torch.randint(3, 30, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    adapters = [PLaplacianAdapter(16, 2) for _ in range(2)]
    target = torch.randint(3, 30, (2, 6))
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
        with attnlib.attach(model, PLaplacian(adapters, kind="cross", pooled=4), part="model.decoder"):
            both = model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
            other = ids.clone()
            other[0, 12:] = 5
            again = model(input_ids=other, attention_mask=mask, decoder_input_ids=target).logits
            model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
    assert not torch.allclose(both, plain, atol=1e-4)
    torch.testing.assert_close(again, both)


def test_bad_input():
    pytest.importorskip("transformers")
    from hooks.models import language_model

    from attnlib.steer import PLaplacian

    with pytest.raises(ValueError, match="reduction"):
        PLaplacianAdapter(30, 2)
    with pytest.raises(ValueError, match="num_heads"):
        PLaplacianAdapter(16, 4)
    with pytest.raises(ValueError, match="positive"):
        PLaplacianAdapter(16, 2, p=0)
    with pytest.raises(ValueError, match="without queries"):
        PLaplacianAdapter(16, 2)(torch.randn(1, 4, 16), torch.rand(1, 2, 4, 3), torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="attn_drop"):
        attnlib.create("p-adapter", dim=16, num_heads=2, attn_drop=0.1)
    with pytest.raises(ValueError, match="pooled"):
        attnlib.create("p-adapter", dim=16, num_heads=2, pooled=0)
    with pytest.raises(ValueError, match="num_heads must be an integer of at least 1, got 0"):
        attnlib.create("p-adapter", dim=16, num_heads=0)
    model = language_model()
    with pytest.raises(ValueError, match="empty"):
        PLaplacian([])
    with pytest.raises(ValueError, match="kind"):
        PLaplacian([PLaplacianAdapter(32, 4)], kind="joint")
    with pytest.raises(TypeError, match="not a PLaplacianAdapter"):
        PLaplacian([torch.nn.Identity()])
    with pytest.raises(ValueError, match="num_heads=2"):
        attnlib.attach(model, PLaplacian([PLaplacianAdapter(32, 2)]))
    with pytest.raises(ValueError, match="layer 5"):
        attnlib.attach(model, PLaplacian({5: PLaplacianAdapter(32, 4)}))


@pytest.mark.parametrize("p", [0.8, 1.25, 1.8, 2.0, 3.0])
@pytest.mark.parametrize("cross", [False, True])
def test_float32_gradients_are_those_of_float64(cross, p):
    """Edges of a token to itself are huge for p < 2; nothing of that size may cancel."""

    def gradients(dtype):
        torch.manual_seed(0)
        adapter = PLaplacianAdapter(32, 4, reduction=2, p=p).double()
        x = [torch.randn(2, 9, 32, dtype=torch.float64) for _ in range(4)]
        weights = torch.randn(2, 4, 9, 9, dtype=torch.float64).softmax(-1)
        adapter, (h, nodes, q, g) = adapter.to(dtype), [t.to(dtype).requires_grad_() for t in x]
        weights = weights.to(dtype).requires_grad_()
        (adapter(h, weights, nodes, q if cross else None) * g).sum().backward()
        leaves = {"h": h, "weights": weights, "nodes": nodes, **dict(adapter.named_parameters())}
        return {name: t.grad for name, t in leaves.items()}

    single, double = gradients(torch.float32), gradients(torch.float64)
    for name, expected in double.items():
        error = float((single[name].double() - expected).abs().max() / expected.abs().max())
        # the exponent's own gradient is a sum that nearly vanishes for p = 3
        assert error < (2e-5 if name == "p" else 4e-6), f"{name}: {error:.1e}"
