"""Relevance through transformers: rules by hand, conservation on transformers' models, refusals by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlib.look.attribution import Rule, integrated_gradients, relevance, transformer_relevance

ROWS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3)).double()


class Attention(nn.Module):
    """One head: tokens (B, N, C) to classes (B, K)."""

    def __init__(self, how="matmul"):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.head = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.how = how
        self.double().eval()

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "matmul":
            y = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=self.how == "causal")[:, 0]
        return self.head(y[:, -1])


def by_hand(model, x, target, rule):
    """Relevance of one head, rule by rule as the papers write them."""
    q, k, v = (x @ w.weight.T for w in (model.q, model.k, model.v))
    s = q @ k.transpose(-1, -2) / 8**0.5
    p = s.softmax(-1)
    y = p @ v
    r = y[:, -1] * model.head.weight[target]  # (B, C)
    r_y = torch.zeros_like(y)
    r_y[:, -1] = r
    flow = r_y / y  # (B, N, C)
    products = p[..., None] * v[:, None] * flow[:, :, None]  # (B, i, j, C)
    if rule == "constant":
        r_v = products.sum(1)
        return x * ((r_v / v) @ model.v.weight)
    r_v, r_p = products.sum(1) / 2, products.sum(3) / 2
    r_s = s * (r_p - p * r_p.sum(-1, keepdim=True))
    pairs = torch.einsum("bic,bjc->bijc", q, k) / 8**0.5 * (r_s / s)[..., None]
    r_q, r_k = pairs.sum(2) / 2, pairs.sum(1) / 2
    return x * sum((r / t) @ w.weight for r, t, w in ((r_v, v, model.v), (r_q, q, model.q), (r_k, k, model.k)))


@pytest.mark.parametrize("how", ["matmul", "sdpa"])
@pytest.mark.parametrize("rule", ["constant", "attnlrp"])
def test_attention_by_hand(how, rule):
    model = Attention(how)
    found = transformer_relevance(model, ROWS, target=3, attention=rule)
    torch.testing.assert_close(found, by_hand(model, ROWS, 3, rule).detach(), rtol=1e-8, atol=1e-10)
    if rule == "constant":
        torch.testing.assert_close(found.sum((1, 2)), model(ROWS)[:, 3].detach())


def test_gradient_is_gradient_times_input_and_causal_masks_hold():
    model = Attention("causal")
    x = ROWS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    found = transformer_relevance(model, ROWS, target=1, attention="gradient")
    torch.testing.assert_close(found, (x * grad).detach())
    plain = {"attention": "gradient", "norm": "gradient", "activation": "gradient"}
    for norm in ("layer", "rms", "hand"):  # gates, norms and activations too, where nothing is asked of them
        block, y = Block(norm), ROWS.clone().requires_grad_()
        (grad,) = torch.autograd.grad(block(y)[:, 2].sum(), y)
        torch.testing.assert_close(transformer_relevance(block, ROWS, target=2, **plain), (y * grad).detach())
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    loose = Attention("matmul")
    loose.forward = lambda x: loose.head(
        F.scaled_dot_product_attention(loose.q(x), loose.k(x), loose.v(x), attn_mask=mask)[:, -1]
    )
    for rule in ("constant", "attnlrp"):
        ours, masked = (transformer_relevance(m, ROWS, target=1, attention=rule) for m in (model, loose))
        torch.testing.assert_close(ours, masked)


class Block(nn.Module):
    """Norm, gate, activation and residual sum."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(1)
        self.norm = {"layer": nn.LayerNorm(8, bias=False), "rms": nn.RMSNorm(8)}.get(norm)
        self.up, self.gate, self.down = (nn.Linear(8, 8, bias=False) for _ in range(3))
        if self.norm is not None:
            nn.init.normal_(self.norm.weight)
        self.double().eval()

    def forward(self, x):
        y = self.norm(x) if self.norm is not None else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (x + self.down(F.silu(self.gate(y)) * self.up(y)))[:, 0]


@pytest.mark.parametrize("norm", ["layer", "rms", "hand"])
def test_norms_gates_and_activations_hand_on_what_they_got(norm):
    model = Block(norm)
    found = transformer_relevance(model, ROWS, target=2)
    torch.testing.assert_close(found.sum((1, 2)), model(ROWS)[:, 2].detach(), rtol=1e-9, atol=1e-10)
    # By hand: the gate keeps half, through silu as it is, the standard deviation is a number.
    x = ROWS
    top = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    eps = {"layer": 1e-5, "rms": torch.finfo(torch.float64).eps, "hand": 1e-6}[norm]
    scale = (top.square().mean(-1, keepdim=True) + eps).rsqrt()
    if norm != "hand":
        scale = scale * model.norm.weight
    y = top * scale
    a, b = y @ model.gate.weight.T, y @ model.up.weight.T
    r = F.silu(a) * b * model.down.weight[2]
    back = ((r / 2 / a) @ model.gate.weight + (r / 2 / b) @ model.up.weight) * scale
    if norm == "layer":
        back = back - back.mean(-1, keepdim=True)
    expected = x * back
    expected[..., 2] += x[..., 2]
    expected[:, 1:] = 0
    torch.testing.assert_close(found, expected.detach(), rtol=1e-7, atol=1e-9)


class Multihead(nn.Module):
    """``nn.MultiheadAttention`` (B, N, C) to classes, or the same written out."""

    def __init__(self, written=False, masks=None, **settings):
        super().__init__()
        torch.manual_seed(4)
        self.mha = nn.MultiheadAttention(8, 2, **{"bias": False, "batch_first": True, **settings})
        self.head = nn.Linear(8, 8, bias=False)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=bool(settings.get("bias"))) for _ in range(4))
        with torch.no_grad():
            for p in self.mha.parameters():
                nn.init.normal_(p, std=0.4)
            for layer, w in zip((self.q, self.k, self.v), self.mha.in_proj_weight.chunk(3), strict=True):
                layer.weight.copy_(w)
            self.out.weight.copy_(self.mha.out_proj.weight)
            if settings.get("bias"):
                for layer, b in zip((self.q, self.k, self.v), self.mha.in_proj_bias.chunk(3), strict=True):
                    layer.bias.copy_(b)
                self.out.bias.copy_(self.mha.out_proj.bias)
        self.written, self.masks = written, masks or {}
        self.double().eval()

    def forward(self, x):
        if not self.written:
            return self.head(self.mha(x, x, x, **self.masks)[0][:, -1])
        heads = [
            torch.softmax(q @ k.transpose(-1, -2) / 2 + self.masks.get("added", 0), -1) @ v
            for q, k, v in zip(*(part(x).split(4, -1) for part in (self.q, self.k, self.v)), strict=True)
        ]
        return self.head(self.out(torch.cat(heads, -1))[:, -1])


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False, False, True, False, False], [False, False, False, True, False]])
HIDDEN = torch.zeros(2, 5, 5).double().masked_fill(CAUSAL | PADDED[:, None], -torch.inf)


@pytest.mark.parametrize("rule", ["constant", "attnlrp", "gradient"])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention_of_torch_as_written_out(rule, masked):
    given = {"attn_mask": CAUSAL, "key_padding_mask": PADDED, "is_causal": True} if masked else {"need_weights": False}
    ours, written = Multihead(masks=given), Multihead(True, {"added": HIDDEN} if masked else {})
    torch.testing.assert_close(ours(ROWS), written(ROWS), rtol=1e-9, atol=1e-11)
    found = transformer_relevance(ours, ROWS, target=3, attention=rule)
    expected = transformer_relevance(written, ROWS, target=3, attention=rule)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    if rule == "constant":
        torch.testing.assert_close(found.sum((1, 2)), ours(ROWS)[:, 3].detach(), rtol=1e-9, atol=1e-11)
        assert not masked or float(found[0, 2].abs().max()) == 0  # what is hidden brings nothing


def test_multihead_attention_with_one_head_by_hand():
    one = nn.MultiheadAttention(8, 1, bias=False, batch_first=True).double().eval()
    plain = Attention()
    with torch.no_grad():
        one.in_proj_weight.copy_(torch.cat([plain.q.weight, plain.k.weight, plain.v.weight]))
        one.out_proj.weight.copy_(plain.head.weight)
    model = Multihead()
    model.forward = lambda x: one(x, x, x)[0][:, -1]
    for rule in ("constant", "attnlrp"):
        found = transformer_relevance(model, ROWS, target=3, attention=rule)
        torch.testing.assert_close(found, by_hand(plain, ROWS, 3, rule).detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["epsilon", "gamma", "z+"])
def test_projections_of_multihead_attention_by_their_rules(name):
    ours, written = Multihead(bias=True), Multihead(True, bias=True)
    found, expected = (transformer_relevance(m, ROWS, target=1, default=name) for m in (ours, written))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    found = transformer_relevance(ours, ROWS, target=1, rules={nn.MultiheadAttention: name, "mha.out_proj": "0"})
    expected = transformer_relevance(written, ROWS, target=1, rules={"[qkv]": name})
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    plain = transformer_relevance(ours, ROWS, target=1)
    assert (found - plain).abs().max() > 1e-9 or name == "epsilon"


@pytest.mark.parametrize(
    "settings",
    [{"batch_first": False}, {"kdim": 8, "vdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": True}],
    ids=lambda s: next(iter(s)),
)
def test_kinds_of_multihead_attention(settings):
    torch.manual_seed(2)
    mha = nn.MultiheadAttention(8, 2, **{"batch_first": True, **settings}).double().eval()
    kept = []

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = mha

        def forward(self, x):
            y, weights = self.mha(x, x, x[..., : mha.vdim], average_attn_weights=False)
            kept.append((y.detach(), weights.detach()))
            return y[:, -1]

    x = ROWS[:, :2] if settings.get("batch_first") is False else ROWS
    found = transformer_relevance(Read(), x, target=1, attention="gradient", norm="gradient", activation="gradient")
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(Read()(z)[:, 1].sum(), z)
    torch.testing.assert_close(found, (z * grad).detach(), rtol=1e-8, atol=1e-10)
    for a, b in zip(kept[0], kept[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_encoders_of_torch_hand_on_what_they_got():
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, norm_first=True, bias=False)
    model = (
        nn.Sequential(
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3, bias=False)
        )
        .double()
        .eval()
    )
    found = transformer_relevance(model, ROWS, target=2)
    torch.testing.assert_close(found.sum((1, 2)), model(ROWS)[:, 2].detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["epsilon", "z+", "alphabeta", "gamma"])
def test_linear_layers_by_rule_as_the_traced_ones(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)).double().eval()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    ours, traced = transformer_relevance(model, x, target=1, default=name), relevance(model, x, 1, default=name)
    torch.testing.assert_close(ours, traced, rtol=1e-6, atol=1e-9)
    mixed = {"0": "z+", nn.Linear: Rule("epsilon", epsilon=0.1)}
    ours, traced = transformer_relevance(model, x, target=1, rules=mixed), relevance(model, x, 1, mixed)
    torch.testing.assert_close(ours, traced, rtol=1e-6, atol=1e-9)


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, **small)
        model, module = transformers.BertForSequenceClassification(config), "bert.embeddings"
    elif kind == "llama":
        config = transformers.LlamaConfig(vocab_size=30, num_key_value_heads=1, **small)
        model, module = transformers.LlamaForCausalLM(config), "model.embed_tokens"
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        model, module = transformers.GPT2LMHeadModel(config), "transformer.drop"
    else:
        config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **small)
        model, module = transformers.ViTForImageClassification(config), "vit.embeddings"
    model = model.double().eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embed" not in name:
            nn.init.normal_(p, std=0.3)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    if kind == "vit":
        return model, module, {"pixel_values": torch.randn(2, 3, 16, 16).double()}
    return model, module, {"input_ids": torch.tensor([[4, 7, 1, 9, 2], [3, 3, 8, 0, 5]])}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "vit"])
def test_relevance_of_transformers_models_is_their_logit(kind):
    model, module, inputs = transformers_model(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    needed = [p.requires_grad for p in model.parameters()]
    found = transformer_relevance(model, **inputs, module=module, target=[2, 1])
    logits = model(**inputs).logits
    logits = logits[:, -1] if logits.dim() == 3 else logits
    wanted = logits[range(2), [2, 1]].detach()
    torch.testing.assert_close(found.sum((1, 2)), wanted, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == needed
    assert not any(m._forward_hooks for m in model.modules())
    # Either way of computing attention, one sample at a time, and in inference mode.
    if kind != "vit":
        model.set_attn_implementation("eager")
    with torch.inference_mode():
        again = transformer_relevance(model, **inputs, module=module, target=[2, 1], chunk=1)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-6)  # theirs takes softmax in float32
    other = transformer_relevance(model, **inputs, module=module, target=[2, 1], attention="attnlrp")
    assert torch.isfinite(other).all() and (other - found).abs().max() > 1e-6


def test_our_models_and_what_is_refused():
    import attnlib

    torch.manual_seed(0)
    model = attnlib.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    model = model.double().eval()
    found = transformer_relevance(model, torch.randn(2, 3, 32, 32).double(), target=1, attention="attnlrp")
    assert found.shape == (2, 3, 32, 32) and float(found.abs().max()) > 0

    class Odd(nn.Module):
        def forward(self, x):
            return torch.exp(x).sum(1)

    with pytest.raises(ValueError, match="exp cannot hand relevance down: it has no rule"):
        transformer_relevance(Odd(), ROWS, target=0)
    fixed = Multihead()
    fixed.forward = lambda x: F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3, 8, 2, fixed.mha.in_proj_weight, None, None, None, False, 0.0,
        fixed.mha.out_proj.weight, None, static_k=torch.zeros(4, 5, 4).double(),
    )[0][0]  # fmt: skip
    with pytest.raises(ValueError, match="multi_head_attention_forward cannot hand relevance down: static_k"):
        transformer_relevance(fixed, ROWS, target=0)
    with pytest.raises(ValueError, match="training mode"):
        transformer_relevance(nn.MultiheadAttention(8, 2, dropout=0.1), ROWS, target=0)
    with pytest.raises(ValueError, match="rule 'flat'"):
        transformer_relevance(Attention(), ROWS, target=0, default="flat")
    with pytest.raises(ValueError, match="attention"):
        transformer_relevance(Attention(), ROWS, target=0, attention="mine")
    with pytest.raises(TypeError, match="name the module that embeds it"):
        transformer_relevance(nn.Sequential(nn.Embedding(4, 8)), torch.tensor([[1, 2]]), target=0)
    with pytest.raises(ValueError, match="no module is called"):
        transformer_relevance(Attention(), ROWS, target=0, rules={"nope": "z+"})
    only = nn.Module()
    only.forward = lambda x: torch.softmax(x[:, 0], -1)
    with pytest.raises(ValueError, match="does not depend on"):
        transformer_relevance(only, ROWS, target=0)
    torch.testing.assert_close(
        integrated_gradients(Attention(), ROWS, target=1, steps=64).sum((1, 2)),
        (Attention()(ROWS) - Attention()(torch.zeros_like(ROWS)))[:, 1].detach(), rtol=1e-5, atol=1e-7,
    )  # fmt: skip
