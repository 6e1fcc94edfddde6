"""Nodes: what layers write into the residual stream, captured, written back and read out."""

import copy

import pytest
import torch
from torch import nn

import attnlib
from attnlib.hooks import Capture, Intervention, Node, Nodes, Patch
from hooks.families import _Attention, _blocks, _decoder, _encoder
from hooks.models import language_model, prompt

IDS = prompt(length=7, pad=(2, 0))


def gpt2():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=24, n_layer=3, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return transformers.BertForMaskedLM(config).eval()


def gemma2():
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def olmo2():
    import transformers

    torch.manual_seed(0)
    config = transformers.Olmo2Config(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, pad_token_id=0
    )
    return transformers.Olmo2ForCausalLM(config).eval()


def opt():
    import transformers

    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=32, pad_token_id=0,
        word_embed_proj_dim=24, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


def timm_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=4, num_classes=5, init_values=0.3
    ).eval()


def tiny_lm():
    from attnlib.models.tiny import TinyLM

    torch.manual_seed(0)
    return TinyLM(lambda: attnlib.create("softmax-attention", dim=24, num_heads=4, causal=True), dim=24).eval()


def text(model):
    return model(**IDS, use_cache=False).logits


def encoded(model):
    return model(**IDS).logits


def vectors(model):
    torch.manual_seed(5)
    return model(torch.randn(2, 7, 16))


def pixels(model):
    torch.manual_seed(5)
    return model(torch.randn(2, 3, 32, 32))


def symbols(model):
    return model(IDS["input_ids"]).y


FAMILIES = {
    "llama": (language_model, text),
    "gpt2": (gpt2, text),
    "bert": (bert, encoded),
    "gemma2": (gemma2, text),
    "olmo2": (olmo2, text),
    "opt": (opt, text),
    "decoder": (_decoder, text),
    "tiny": (tiny_lm, symbols),
    "encoder": (_encoder, vectors),
    "timm": (timm_vit, pixels),
    "timm-like": (_blocks(_Attention), vectors),
}
EVERY = pytest.mark.parametrize("family", FAMILIES)


def made(family):
    make, call = FAMILIES[family]
    return make(), call


@EVERY
@torch.no_grad()
def test_captured_values_written_back_leave_the_model_as_it_was(family):
    model, call = made(family)
    plain = call(model)
    capture = Capture(("z", "mlp", "residual"))
    with attnlib.attach(model, capture):
        torch.testing.assert_close(call(model), plain, rtol=0, atol=1e-6)
    nodes = Nodes(model)
    everything = capture.values(nodes.of("z", "mlp", "residual"))
    with attnlib.attach(model, Patch(everything)):
        torch.testing.assert_close(call(model), plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(call(model), plain, rtol=0, atol=0)


@EVERY
@torch.no_grad()
def test_the_stream_is_the_sum_of_what_nodes_write(family):
    """Where blocks only add: x_{l+1} = x_l + sum_h z_h W_h + b + mlp."""
    model, call = made(family)
    nodes, capture = Nodes(model), Capture(("z", "mlp", "residual"))
    with attnlib.attach(model, capture):
        call(model)
    kept = capture.results()
    if family in ("gemma2", "olmo2"):
        assert nodes.layers[0].feed_forward is model.model.layers[0].post_feedforward_layernorm
        with pytest.raises(ValueError, match="stands behind its output projection"):
            nodes.output_weight(0)
        return
    if family == "timm-like":
        return  # its block puts a tanh behind its feed-forward
    z, mlp, x = kept["z"][0], kept["mlp"][0], kept["residual"]
    written = torch.einsum("bhnd,hdc->bnc", z, nodes.output_weight(0))
    width = nodes._width(nodes.layers[0].projection)
    bias = nodes.layers[0].projection(torch.zeros(1, 1, width, dtype=z.dtype))
    bias = bias if nodes.layers[0].behind is None else nodes.layers[0].behind(bias)
    if family in ("bert", "encoder"):
        assert nodes.norm is None  # blocks end in norms of their own
        return
    sums, rows = x[0] + written + bias + mlp, slice(1, None)  # the first sample is padded, and ours adds nothing there
    torch.testing.assert_close(sums[rows], x[1][rows], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_grouped_queries_count_keys_by_their_own_heads():
    model = language_model()
    nodes, capture = Nodes(model), Capture(("q", "k", "v"), positions=[-1, 0])
    with attnlib.attach(model, capture):
        text(model)
    kept = capture.results()
    assert kept["q"][1].shape == (2, 4, 2, 8) and kept["k"][1].shape == kept["v"][1].shape == (2, 2, 2, 8)
    assert len(nodes.of("k")) == 6 and len(nodes.of("q")) == 12
    with pytest.raises(ValueError, match="layer 1 has 2 key/value heads"):
        nodes.check(Node("v", 1, 2))
    with (
        pytest.raises(ValueError, match="key/value heads"),
        attnlib.attach(model, Patch({Node("k", 0, 3): torch.zeros(1, 1, 8)})),
    ):
        pass


@torch.no_grad()
def test_last_stream_and_read_out_give_the_logits():
    for model in (language_model(), gpt2(), _decoder()):
        nodes, capture = Nodes(model), Capture(("residual",), positions=-1)
        with attnlib.attach(model, capture):
            logits = text(model)[:, -1]
        weight, bias = nodes.rows(torch.arange(64))
        last = nodes.norm(capture.value(Node("residual", len(nodes))))[:, 0]
        read = last @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(read, logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_patching_a_head_is_zeroing_its_columns():
    """A head set to zero at one position of one sample, against the same by hand on what the projection reads."""
    model = gpt2()
    position = torch.tensor([[3], [5]])

    def by_hand(module, args):
        x = args[0].clone()
        x[0, 3, 6:12] = 0
        x[1, 5, 6:12] = 0
        return (x, *args[1:])

    handle = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(by_hand)
    expected = text(model)
    handle.remove()
    with attnlib.attach(model, Patch({Node("z", 1, 1): torch.zeros(1, 1, 6)}, positions=position)):
        got = text(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not torch.equal(got, text(model))


@torch.no_grad()
def test_keys_and_values_patched_are_cached():
    model, other = language_model(), prompt(length=7, pad=(2, 0), seed=9)
    taken = Capture(("k", "v"), layers=[1])
    with attnlib.attach(model, taken):
        model(**other)
    wanted = taken.values([Node("k", 1, 0), Node("k", 1, 1), Node("v", 1, 0), Node("v", 1, 1)])
    with attnlib.attach(model, Patch(wanted)):
        cache = model(**IDS).past_key_values
    torch.testing.assert_close(cache.layers[1].keys[:, 0], taken.value(Node("k", 1, 0)), rtol=0, atol=0)
    torch.testing.assert_close(cache.layers[1].values, taken.value(Node("v", 1)), rtol=0, atol=0)


def test_mlp_stage_edits_what_is_added():
    class Silent(Intervention):
        def on_mlp_output(self, site, out):
            assert out.dim() == 3 and site.n_queries == out.shape[1]
            return out * 0

    model = language_model()
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for layer in bare.model.layers:
            layer.mlp.down_proj.weight.zero_()
        with attnlib.attach(model, Silent()):
            torch.testing.assert_close(text(model), text(bare))


def test_gradients_pass_where_they_are_asked_for():
    model = language_model()
    capture = Capture(("z",), positions=[-1], gradients=True)
    with attnlib.attach(model, capture):
        score = text(model)[:, -1, 5].sum()
    grads = torch.autograd.grad(score, [capture.value(Node("z", 2))])
    whole = Capture(("z", "q", "k", "v", "mlp", "residual"), gradients=True)
    with attnlib.attach(model, whole):
        again = text(model)[:, -1, 5].sum()
    kept = whole.results()
    every = torch.autograd.grad(again, [kept[kind][2] for kind in whole.what])
    torch.testing.assert_close(every[0][:, :, -1:], grads[0])
    assert all(float(g.abs().sum()) > 0 for g in every)
    assert grads[0].shape == (2, 4, 1, 8)
    value, step = capture.value(Node("z", 2))[:, 1].detach(), 1e-2 * torch.ones(2, 1, 8)
    model.double()
    with torch.no_grad(), attnlib.attach(model, Patch({Node("z", 2, 1): (value + step).double()}, positions=-1)):
        up = text(model)[:, -1, 5].sum()
    with torch.no_grad(), attnlib.attach(model, Patch({Node("z", 2, 1): (value - step).double()}, positions=-1)):
        down = text(model)[:, -1, 5].sum()
    model.float()
    torch.testing.assert_close(float((grads[0][:, 1] * step).sum()), float((up - down) / 2), rtol=1e-3, atol=1e-6)
    with attnlib.attach(model, Capture()) as session:
        text(model)
    assert not session.results["capture"]["z"][0].requires_grad


def test_bfloat16_copies_and_calls():
    model = language_model().to(torch.bfloat16)
    capture = copy.deepcopy(Capture(("mlp",), calls="all"))
    with torch.no_grad(), attnlib.attach(model, capture):
        text(model)
        text(model)
    kept = capture.results()["mlp"]
    assert len(kept[0]) == 2 and kept[0][0].dtype == torch.bfloat16
    with torch.no_grad(), attnlib.attach(model, Patch({Node("mlp", 0): torch.zeros(1, 1, 32)})):  # any float type
        text(model)


BAD = {
    "kind": (lambda: Node("w", 0), "kind"),
    "layer": (lambda: Node("z", -1), "layer"),
    "head of a layer": (lambda: Node("mlp", 0, 1), "head must be left out"),
    "what": (lambda: Capture(("z", "p")), "what"),
    "what string": (lambda: Capture("z"), "what must be a sequence"),
    "positions": (lambda: Capture(positions=torch.zeros(2)), "positions must be integers"),
    "calls": (lambda: Capture(calls="some"), "calls"),
    "values": (lambda: Patch({}), "values must map"),
    "value": (lambda: Patch({Node("z", 0): 3.0}), "floating-point"),
    "key": (lambda: Patch({"z": torch.zeros(1)}), "Node"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    make, says = BAD[case]
    with pytest.raises((TypeError, ValueError), match=says):
        make()


def test_bad_input_in_a_call_is_refused():
    model = language_model()

    def run(intervention):
        with torch.no_grad(), attnlib.attach(model, intervention):
            text(model)

    for intervention, says in (
        (Capture(positions=[7]), "positions must lie in"),
        (Capture(positions=torch.zeros(3, 1, dtype=torch.long)), "3 samples"),
        (Capture(layers=[3]), "layers must be"),
        (Patch({Node("z", 3): torch.zeros(1, 4, 1, 8)}), "layers 0 to 2"),
        (Patch({Node("z", 0, 0): torch.zeros(1, 1, 9)}), "the value of"),
        (Patch({Node("mlp", 0): torch.zeros(3, 1, 32)}), "the value of"),
    ):
        with pytest.raises(ValueError, match=says):
            run(intervention)
    with pytest.raises(ValueError, match="no norm behind its last block"):
        with attnlib.attach(bert(), Capture(("residual",), layers=[2])):
            pass
    with pytest.raises(TypeError, match="none of its modules"):
        Nodes(nn.Linear(2, 2))
