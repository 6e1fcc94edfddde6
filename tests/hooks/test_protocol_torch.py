"""The protocol on plain PyTorch attention and on attention of timm's shape."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib import masks
from attnlib.hooks import IMAGE, TEXT, Intervention, MaskByType, Record, TypeRule
from attnlib.steer import SoftPAG
from hooks import models
from hooks.models import dense_attention


class NoOp(models.NoOp):
    """In two more stages."""

    def on_context(self, site, k_source, v_source):
        return k_source, v_source

    def around_sublayer(self, site, hidden, call):
        return call(hidden)


class Stage(Intervention):
    """One stage by a function."""

    def __init__(self, layers=None):
        self.layers = layers


def stage(name, fn, layers=None):
    return type("Stage", (Stage,), {name: lambda self, *args: fn(*args)})(layers)


def mark(model):
    return [
        (n, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), str(m.__dict__.get("forward")))
        for n, m in model.named_modules()
    ]


def mha(seed=0, **settings):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(**{"embed_dim": 16, "num_heads": 4, "batch_first": True, **settings})
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module.eval()


def tokens(n=6, batch=3, width=16, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, n, width)


def padding(n=6, batch=3, end=False):
    mask = torch.zeros(batch, n, dtype=torch.bool)
    mask[0, -2 if end else 0] = mask[1, -1 if end else 1] = True
    return mask


CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
SEED = torch.Generator().manual_seed(5)
PER_HEAD = torch.randn(12, 6, 6, generator=SEED) > 1
PER_HEAD[..., 3] = False  # everybody reads something
SETTINGS = {
    "plain": {},
    "second": {"batch_first": False},
    "odd-heads": {"num_heads": 1},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
}
CALLS = {
    "plain": {},
    "no-weights": {"need_weights": False},
    "all-weights": {"average_attn_weights": False},
    "padding": {"key_padding_mask": padding()},
    "causal": {"attn_mask": CAUSAL, "need_weights": False},
    "is-causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "float-mask": {"attn_mask": torch.randn(6, 6, generator=SEED), "need_weights": False},
    "per-head": {"attn_mask": PER_HEAD, "key_padding_mask": padding()},
}


def run(module, x, y=None, **call):
    """Self- or cross-attention, (B, N, C) outside."""
    turn = (lambda t: t) if module.batch_first else (lambda t: t.transpose(0, 1))
    x = turn(x)
    y = x if y is None else turn(y)
    if call.get("attn_mask") is not None and call["attn_mask"].dim() == 3:
        call = {**call, "attn_mask": call["attn_mask"][: x.shape[0 if module.batch_first else 1] * module.num_heads]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, weights = module(x, y, y, **call)
    return turn(out), weights


FITTING = [(s, c) for s in SETTINGS for c in CALLS if c != "per-head" or SETTINGS[s].get("num_heads") != 1]


@pytest.mark.parametrize("settings, call", FITTING)
@pytest.mark.parametrize("grad", [False, True])
def test_no_op_gives_the_same_bits(settings, call, grad):
    module, no_op = mha(**SETTINGS[settings]), NoOp()
    x, before_mark = tokens(), mark(module)
    with torch.set_grad_enabled(grad):
        before = run(module, x, **CALLS[call])
        with attnlib.attach(module, no_op):
            inside = run(module, x, **CALLS[call])
        after = run(module, x, **CALLS[call])
    for a, b, c in zip(before, inside, after, strict=True):
        assert (a is None and b is None and c is None) or (torch.equal(a, b) and torch.equal(a, c))
    assert mark(module) == before_mark
    (site,) = no_op.sites
    extra = module.bias_k is not None or module.add_zero_attn
    assert (site.kind, site.heads, site.n_queries) == ("self", module.num_heads, 6)
    assert (site.k_pos is None) == extra and site.n_keys == 6 + extra


def by_hand(module, x, y, allowed=None, bias=None, edit=lambda w: w):
    """The oracle: projections, softmax and output projection written out."""
    wq, wk, wv = module.in_proj_weight.chunk(3)
    bq, bk, bv = module.in_proj_bias.chunk(3)
    split = lambda t: t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = split(x @ wq.T + bq), split(y @ wk.T + bk), split(y @ wv.T + bv)
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias
    s = s if allowed is None else s.masked_fill(~allowed, float("-inf"))
    weights = edit(torch.softmax(s, -1))
    return (weights @ v).transpose(1, 2).flatten(2) @ module.out_proj.weight.T + module.out_proj.bias, weights


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_recorded_and_edited_weights_are_the_softmax(batch_first, call):
    module, x = mha(batch_first=batch_first), tokens()
    given = CALLS[call]
    allowed, bias = None, None
    if "attn_mask" in given:
        mask = given["attn_mask"]
        mask = mask.unflatten(0, (3, 4)) if mask.dim() == 3 else mask
        allowed, bias = (~mask, None) if mask.dtype == torch.bool else (None, mask)
    if "key_padding_mask" in given:
        exists = ~given["key_padding_mask"][:, None, None]
        allowed = exists if allowed is None else allowed & exists

    def edit(w):
        return torch.cat([w[:, :1].flip(-1), w[:, 1:]], 1)

    record = Record(rows="all")
    with torch.no_grad():
        with attnlib.attach(module, record):
            run(module, x, **given)
        with attnlib.attach(module, stage("on_weights", lambda site, w, rows: edit(w))):
            got, got_weights = run(module, x, **given)
        plain = by_hand(module, x, x, allowed, bias)[1]
        want, want_weights = by_hand(module, x, x, allowed, bias, edit)
    torch.testing.assert_close(record.results()[0]["weights"][0], plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if given.get("need_weights", True):
        want_weights = want_weights if not given.get("average_attn_weights", True) else want_weights.mean(1)
        torch.testing.assert_close(got_weights, want_weights, atol=1e-6, rtol=1e-5)
    else:
        assert got_weights is None


@pytest.mark.parametrize("batch_first", [True, False])
def test_sources_sublayers_and_read_keys(batch_first):
    module, x, y = mha(batch_first=batch_first), tokens(), tokens(9, seed=3)
    with torch.no_grad():
        with attnlib.attach(module, stage("on_context", lambda site, k, v: (k, v * 0))) as session:
            zero = run(module, x, y, need_weights=False)[0]
            assert session.sites[0].kind == "self"  # called as cross-attention all the same
        bias = module.in_proj_bias.chunk(3)[2] @ module.out_proj.weight.T + module.out_proj.bias
        torch.testing.assert_close(zero, bias.expand_as(zero), atol=1e-5, rtol=1e-5)
        for target, queries in ((None, x), (y, x)):
            twice = stage("around_sublayer", lambda site, hidden, call: 2 * call(hidden * 0.5) + hidden)
            with attnlib.attach(module, twice):
                got, weights = run(module, x, target)
            half = queries * 0.5
            want, _ = run(module, half, half if target is None else target)
            torch.testing.assert_close(got, 2 * want + x, atol=1e-5, rtol=1e-5)
            assert weights.shape == (3, 6, 6 if target is None else 9)
        with attnlib.attach(module, stage("on_kv_read", lambda site, k, v: (k, v.flip(2)))):
            got, _ = run(module, x, y)
        with attnlib.attach(module, stage("on_context", lambda site, k, v: (k, v.flip(1)))):
            want, _ = run(module, x, y)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_masks_and_types(monkeypatch):
    module, x = mha(), tokens()
    types = torch.tensor([[IMAGE, IMAGE, TEXT, TEXT, TEXT, TEXT]]).expand(3, -1)
    window = stage("around_attention", lambda site, q, k, v, call: call(q, k, v, mask=masks.recent(2)))
    lock = TypeRule(lock={(TEXT, IMAGE)})
    with torch.no_grad():
        with attnlib.attach(module, window):
            got, _ = run(module, x)
        torch.testing.assert_close(got, by_hand(module, x, x, masks.recent(2).dense(6))[0], atol=1e-5, rtol=1e-5)
        with attnlib.attach(module, MaskByType(lock), token_types=types):
            got, _ = run(module, x)
        allowed = ~((types[0] == TEXT)[:, None] & (types[0] == IMAGE))
        torch.testing.assert_close(got, by_hand(module, x, x, allowed)[0], atol=1e-5, rtol=1e-5)


def encoder(norm_first=False, batch_first=True, **settings):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, batch_first=batch_first, norm_first=norm_first, **{"dropout": 0.0, **settings}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 3).eval()


@pytest.mark.parametrize("norm_first, batch_first", [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_inside_an_encoder_with_its_fused_path(norm_first, batch_first, masked):
    """Unattached: the fused path. Attached: the ordinary one, whose sites are reached; the same bits with gradients."""
    model, x = encoder(norm_first, batch_first), tokens() if batch_first else tokens().transpose(0, 1)
    call = {"src_key_padding_mask": padding(end=True)} if masked else {}
    exists = ~padding(end=True) if masked else torch.ones(3, 6, dtype=torch.bool)
    exists = exists if batch_first else exists.T
    before_mark, no_op = mark(model), NoOp([1])
    with torch.no_grad():
        fused = model(x, **call)
        with attnlib.attach(model, no_op):
            inside = model(x, **call)
        assert torch.equal(model(x, **call), fused)
    torch.testing.assert_close(inside[exists], fused[exists], atol=1e-5, rtol=1e-5)
    ordinary = model(x, **call)
    with attnlib.attach(model, NoOp()):
        assert torch.equal(model(x, **call), ordinary)
    assert mark(model) == before_mark and len(no_op.sites) == 1 and no_op.sites[0].layer == 1
    assert [s.name for s in attnlib.attach(model, NoOp()).sites] == [f"layers.{i}.self_attn" for i in range(3)]
    hooks_session(model).detach()


def hooks_session(model):
    from attnlib.hooks import session as core

    return core._sessions[model]


def test_encoder_layers_keep_their_modules_and_forwards():
    model = encoder()
    with attnlib.attach(model, NoOp([1])):
        for i in (0, 2):
            attn = model.layers[i].self_attn
            assert "forward" not in attn.__dict__ and not attn._forward_pre_hooks
            assert attn.forward.__func__ is nn.MultiheadAttention.forward
        assert "forward" in model.layers[1].self_attn.__dict__


def test_block_inputs_of_an_encoder():
    for batch_first in (True, False):
        model, seen = encoder(batch_first=batch_first), {}
        x = tokens()

        def look(site, hidden, seen=seen):
            seen[site.layer] = hidden
            return hidden * 0 if site.layer == 2 else None

        with attnlib.attach(model, stage("on_block_input", look)):
            out = model(x if batch_first else x.transpose(0, 1))
        assert torch.equal(seen[0], x) and seen[1].shape == x.shape
        other = copy.deepcopy(model)
        want = other.layers[2](torch.zeros(3, 6, 16) if batch_first else torch.zeros(6, 3, 16))
        torch.testing.assert_close(out, want)
    with pytest.raises(ValueError, match="on_block_input.*not inside a numbered block"):
        attnlib.attach(mha(), stage("on_block_input", look))


def test_decoder_layers_have_self_and_cross_attention():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True), 2).eval()
    x, memory = tokens(), tokens(9, seed=2)
    record = Record(rows="all")
    with torch.no_grad():
        before = model(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)
        with attnlib.attach(model, record, NoOp()) as session:
            assert [(s.layer, s.kind) for s in session.sites] == [(0, "self"), (1, "cross"), (2, "self"), (3, "cross")]
            assert torch.equal(model(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True), before)
    shapes = [tuple(record.results()[i]["weights"][0].shape) for i in range(4)]
    assert shapes == [(3, 4, 6, 6), (3, 4, 6, 9)] * 2
    assert (record.results()[0]["weights"][0].triu(1) == 0).all()


def test_softpag_on_plain_attention():
    module, x = mha(), tokens()
    with torch.no_grad(), attnlib.attach(module, SoftPAG(1.0, rows=("cond",)), rows=("uncond", "cond", "uncond")):
        got, _ = run(module, x)
    wv, bv = module.in_proj_weight.chunk(3)[2], module.in_proj_bias.chunk(3)[2]
    own = (x @ wv.T + bv) @ module.out_proj.weight.T + module.out_proj.bias
    with torch.no_grad():
        torch.testing.assert_close(got[1], own[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[::2], run(module, x)[0][::2], atol=1e-5, rtol=1e-5)


def test_gradients_and_dropout():
    module, x = mha(), tokens().requires_grad_()
    plain = torch.autograd.grad(run(module, x)[0].sum(), x)[0]
    with attnlib.attach(module, NoOp()):
        assert torch.equal(torch.autograd.grad(run(module, x)[0].sum(), x)[0], plain)
    module = mha(dropout=0.5).train()
    torch.manual_seed(0)
    before = run(module, x)[0], torch.rand(1)
    with attnlib.attach(module, Record()):
        torch.manual_seed(0)
        inside = run(module, x)[0], torch.rand(1)
    assert torch.equal(before[0], inside[0]) and torch.equal(before[1], inside[1])
    with attnlib.attach(module, NoOp()), pytest.raises(ValueError, match="dropout 0.5 is active"):
        run(module, x)


def test_an_exception_inside_restores_the_model():
    model = encoder()
    before_mark = mark(model)
    with torch.no_grad():
        before = model(tokens())
        with pytest.raises(ZeroDivisionError), attnlib.attach(model, stage("on_output", lambda site, out: 1 / 0)):
            model(tokens())
        assert mark(model) == before_mark and torch.equal(model(tokens()), before)


def test_refusals():
    module = mha()
    for bad in ("on_cache", "on_tokens"):
        with pytest.raises(ValueError, match=f"{bad}, which is missing for PyTorch models"):
            attnlib.attach(module, stage(bad, lambda *args: None))
    with attnlib.attach(module, NoOp()), pytest.raises(ValueError, match="rank 2"):
        module(*[torch.randn(6, 16)] * 3)
    with (
        attnlib.attach(module, stage("on_context", lambda site, k, v: (k[:1], v))),
        pytest.raises(ValueError, match="k_source of shape"),
    ):
        run(module, tokens())
    with (
        attnlib.attach(module, stage("around_sublayer", lambda site, h, call: call(h)[0])),
        pytest.raises(ValueError, match="must return"),
    ):
        run(module, tokens())
    with pytest.raises(ValueError, match="part='nowhere'"):
        attnlib.attach(encoder(), NoOp(), part="nowhere")
    with pytest.raises(TypeError, match="has no attention that can be reached"):
        attnlib.attach(encoder(), NoOp(), part="layers.0.linear1")
    with attnlib.attach(encoder(), NoOp([0]), part="layers.1") as session:
        assert [s.name for s in session.sites] == ["layers.1.self_attn"]
    bias = mha(add_bias_kv=True)
    window = stage("around_attention", lambda site, q, k, v, call: call(q, k, v, mask=masks.recent(2)))
    with attnlib.attach(bias, window), pytest.raises(ValueError, match="positions are not known"):
        run(bias, tokens())


# ---- the shape of timm's attention


class Attention(nn.Module):
    """The same attributes, branches and order of operations as timm's."""

    def __init__(self, dim=16, num_heads=4, fused=True, qkv_bias=True, attn_drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, fused
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.q_norm = self.k_norm = self.norm = nn.Identity()
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(attn_drop), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        batch, n, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=self.attn_drop.p if self.training else 0.0
            )
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = attn if attn_mask is None else attn + attn_mask
            x = self.attn_drop(attn.softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, n, dim)))


def timm_like(fused=True):
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.attn = nn.LayerNorm(16), Attention(fused=fused)

        def forward(self, x, attn_mask=None):
            return x + self.attn(self.norm1(x), attn_mask=attn_mask)

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])

        def forward(self, x, attn_mask=None):
            for block in self.blocks:
                x = block(x, attn_mask)
            return x

    return Vision().eval()


def timm_real(fused=True):
    timm = pytest.importorskip("timm", reason="timm is not installed; its attention is proved with the same shape")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=3, num_classes=5, embed_dim=16, depth=3, num_heads=4
    ).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


class NoOpSelf(NoOp):
    """Without the sources, which one projection makes."""

    on_context = Intervention.on_context


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("make", [timm_like, timm_real], ids=["shape", "timm"])
def test_timm_no_op_record_and_edit(make, fused):
    model = make(fused)
    x = tokens() if make is timm_like else torch.randn(2, 3, 8, 8)
    before_mark, no_op, record = mark(model), NoOpSelf([1]), Record(rows="all")
    with torch.no_grad():
        before = model(x)
        with attnlib.attach(model, record, no_op) as session:
            assert [s.name for s in session.sites] == [f"blocks.{i}.attn" for i in range(3)]
            assert torch.equal(model(x), before)
        assert mark(model) == before_mark and torch.equal(model(x), before)
        grab = {}

        def silence(site, out):
            grab[site.layer] = out
            return out * 0

        with attnlib.attach(model, stage("on_output", silence, [0])):
            silent = model(x)
        model.blocks[0].attn.proj.weight.zero_()
        torch.testing.assert_close(silent, model(x), atol=1e-6, rtol=1e-5)
    weights = record.results()[1]["weights"][0]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert [s.layer for s in no_op.sites] == [1] and no_op.sites[0].heads == 4


@pytest.mark.parametrize("fused", [True, False])
def test_timm_masks_and_sublayers(fused):
    model, x = timm_like(fused), tokens()
    bias = torch.zeros(6, 6).masked_fill(CAUSAL, float("-inf"))
    attn = model.blocks[0].attn
    record = Record(rows="all")
    with torch.no_grad():
        before = model(x, bias)
        with attnlib.attach(model, NoOpSelf(), record):
            assert torch.equal(model(x, bias), before)
        window = stage("around_attention", lambda site, q, k, v, call: call(q, k, v, mask=masks.recent(2)))
        with attnlib.attach(attn, window):
            got = attn(x)
        q, k, v = attn.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        want = attn.proj(dense_attention(q, k, v, masks.recent(2).dense(6))[0].transpose(1, 2).flatten(2))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        with attnlib.attach(attn, stage("around_sublayer", lambda site, h, call: call(h) - call(-h))):
            got = attn(x=x)
        torch.testing.assert_close(got, attn(x) - attn(-x), atol=1e-5, rtol=1e-5)
    assert (record.results()[2]["weights"][0].triu(1) == 0).all()
    with pytest.raises(ValueError, match="on_context.*one projection"):
        attnlib.attach(model, NoOp())
    assert isinstance(attn.fused_attn, bool) and attn.fused_attn is fused


def test_timm_dropout_keeps_the_random_stream():
    torch.manual_seed(0)
    attn, x = Attention(fused=False, attn_drop=0.5).train(), tokens()
    torch.manual_seed(3)
    before = attn(x)
    with attnlib.attach(attn, Record()):
        torch.manual_seed(3)
        assert torch.equal(attn(x), before)


def test_modules_that_bypass_the_function_are_refused():
    class Bypass(Attention):
        def forward(self, x):
            return self.proj(x)

    module = Bypass()
    with attnlib.attach(module, NoOpSelf()), pytest.raises(ValueError, match="did not call torch's"):
        module(tokens())
    assert module.fused_attn is True
