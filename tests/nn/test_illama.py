import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib
from attnlib.models import illama
from attnlib.models.illama import ILlama, resize_positions
from attnlib.nn.dense.illama import select_weights

SLUG = "illama"
FIXTURE = Fixture(SLUG)
ATTENTION = [case for case in FIXTURE.config if not case.startswith("model")]
MODELS = [case for case in FIXTURE.config if case.startswith("model")]


def make(**settings):
    return attnlib.create(SLUG, **{**dict(dim=16, num_heads=2), **settings})


def soften(module, rate):
    """Set the soft mask rate as a training loop would."""
    for m in module.modules():
        if isinstance(m, type(make())):
            m.soft_rate, m.cutoff = rate, 1.0
            m.set_progress(0.0)
    return module


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_equals_the_authors(case):
    module = FIXTURE.build(case)
    soften(module, float(FIXTURE.tensors[f"{case}/rate"]))
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize("case", MODELS)
def test_model_equals_the_authors(case):
    model = ILlama(**FIXTURE.config[case])
    model.load_authors({"model": FIXTURE.under(f"{case}/sd")})
    soften(model, float(FIXTURE.tensors[f"{case}/rate"]))
    FIXTURE.holds(case, model, lambda m, xs: m(xs["x"].permute(0, 2, 3, 1)))


def test_weight_selection_equals_the_authors():
    x, y = FIXTURE.tensors["select/x"], FIXTURE.tensors["select/y"]
    assert torch.equal(select_weights(x, y.shape), y)
    with pytest.raises(ValueError, match="axis 1"):
        select_weights(x, (4, 11))
    with pytest.raises(ValueError, match="cannot become"):
        select_weights(x, (4,))


@pytest.mark.parametrize(
    "name, count",
    [
        ("illama_tiny", 5_701_096),
        ("illama_small", 22_018_024),
        ("illama_base", 86_502_376),
        ("illama_large", 310_445_032),
    ],
)
def test_named_models_have_the_papers_parameters(name, count):
    with torch.device("meta"):
        model = getattr(illama, name)()
    assert sum(p.numel() for p in model.parameters()) == count
    # the README counts without positions
    readme = {"illama_tiny": 5.7, "illama_small": 21.9, "illama_base": 86.3, "illama_large": 310.2}[name]
    assert abs((count - model.pos_embed.numel()) / 1e6 - readme) < 0.06


def oracle(m, x, rate, mode):
    """One head after another, the rotation as complex numbers, the mask as written."""
    n, width = x.shape[1], m.head_dim
    angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def turned(t):
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    m_rate = rate + (1 - rate) * torch.ones(n, n, dtype=x.dtype).tril()
    heads = []
    for h in range(m.num_heads):
        q, k, v = (p(x)[..., h * width : (h + 1) * width] for p in (m.q, m.k, m.v))
        s = turned(q) @ turned(k).transpose(-2, -1) / math.sqrt(width)
        if mode == "post":
            heads.append((s.softmax(-1) * m_rate) @ v)
        else:
            e = s.exp() * m_rate
            heads.append(e / e.sum(-1, keepdim=True) @ v)
    return m.proj(torch.cat(heads, -1))


@pytest.mark.parametrize("mode", ["post", "pre"])
@pytest.mark.parametrize("rate", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("streamed", [False, True])
def test_equals_the_oracle(mode, rate, streamed, monkeypatch):
    torch.manual_seed(0)
    if streamed:
        monkeypatch.setattr("attnlib.nn.dense.illama.DENSE_PAIRS", 0)
    m = soften(make(mask_mode=mode).double(), rate)
    x = torch.randn(2, 9, 16, dtype=torch.double, requires_grad=True)
    got, want = m(x), oracle(m, x, rate, mode)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # angles are float32
    g = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (got, want)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["post", "pre"])
def test_rate_one_is_bidirectional_and_rate_zero_a_lower_triangle(mode):
    x = torch.randn(2, 8, 16)
    m = soften(make(mask_mode=mode), 1.0)
    plain = attnlib.create("softmax-attention", dim=16, num_heads=2, rotary=10000.0, rotary_interleaved=True)
    plain.load_state_dict(m.state_dict(), strict=False)
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)
    weights = soften(m, 0.0)(x, returns=("weights",)).weights
    assert not weights.triu(1).any() and bool((weights.diagonal(dim1=-2, dim2=-1) > 0).all())
    sums = weights.sum(-1)
    if mode == "pre":
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:
        assert bool((sums[..., :-1] < 1).all())
        torch.testing.assert_close(sums[..., -1], torch.ones_like(sums[..., -1]))


def test_schedules():
    m = make(soft_rate=0.8, cutoff=0.25)
    assert float(m.rate) == 0.0
    seen = []
    for p in (0.0, 0.1, 0.2, 0.25, 1.0):
        m.set_progress(p)
        seen.append(round(float(m.rate), 6))
    assert seen == [0.8, 0.8, 0.8, 0.0, 0.0]
    line = make(soft_rate=0.8, cutoff=0.5, schedule="linear")
    assert [round(line.rate_at(p), 6) for p in (0.0, 0.125, 0.25, 0.5, 0.75)] == [0.8, 0.6, 0.4, 0.0, 0.0]
    with pytest.raises(ValueError, match="progress"):
        m.set_progress(1.5)


def test_the_rate_is_saved_and_decides_what_is_claimed():
    soft, fresh = soften(make(mask_mode="pre"), 0.5), make(mask_mode="pre")
    assert soft.traits.patterns == {"noncausal-self"} and fresh.traits.patterns == {"causal-self"}
    fresh.load_state_dict(soft.state_dict())
    assert float(fresh.rate) == 0.5 and fresh.traits.patterns == {"noncausal-self"}
    x = torch.randn(1, 6, 16)
    torch.testing.assert_close(fresh(x), soft(x))
    in_place = make(mask_mode="pre")
    in_place.rate.fill_(0.5)  # some loaders copy into the buffer, past load_state_dict
    assert in_place.traits.patterns == {"noncausal-self"}
    again = pickle.loads(pickle.dumps(fresh))
    again.load_state_dict(soft.state_dict())
    torch.testing.assert_close(again(x), soft(x))
    with pytest.raises(ValueError, match="cannot return 'state'"):
        fresh(x, returns=("state",))
    fresh.set_progress(1.0)
    assert fresh.traits.streaming


def images_model(**settings):
    torch.manual_seed(0)
    model = ILlama(img_size=8, patch_size=2, in_chans=1, num_classes=10, dim=32, depth=2, num_heads=2, multiple_of=32,
                   **settings)  # fmt: skip
    with torch.no_grad():
        for p in (model.pos_embed, model.cls_token):
            p.mul_(20)
    return model


def test_a_class_token_at_the_end_sees_every_patch_and_one_at_the_start_none():
    x = torch.randn(1, 8, 8, 1, requires_grad=True)
    for position, mode, seen in (("end", "post", True), ("end", "pre", True), ("start", "pre", False)):
        grad = torch.autograd.grad(images_model(cls_position=position, mask_mode=mode).features(x).square().sum(), x)[0]
        patches = grad.unfold(1, 2, 2).unfold(2, 2, 2).abs().sum((0, 3, 4, 5))
        assert bool((patches > 0).all()) if seen else not bool(patches.any())


def rank(weights):
    return torch.linalg.matrix_rank(weights.double(), rtol=1e-4).float().mean()


def test_a_triangle_has_full_rank():
    """The paper's argument for causal masks: their maps have full rank, bidirectional ones need not."""
    torch.manual_seed(0)
    m, x = make(mask_mode="pre"), torch.randn(4, 32, 16)
    causal = rank(m(x, returns=("weights",)).weights)
    both = rank(soften(m, 1.0)(x, returns=("weights",)).weights)
    assert float(causal) == 32 and float(both) < 32


@pytest.mark.parametrize("position", ["end", "start"])
def test_it_learns_digits_only_with_the_class_token_at_the_end(position):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(-1) / 16
    y = torch.tensor(digits.target)
    model = images_model(cls_position=position, mask_mode="pre", soft_rate=1.0, cutoff=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    gen = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=gen)
    training, test = order[:1400], order[1400:]
    steps = 120 if position == "end" else 25
    for step in range(steps):
        model.set_progress(step / steps)
        rows = training[torch.randint(1400, (100,), generator=gen)]
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.set_progress(1.0)
    with torch.no_grad():
        accuracy = float((model(x[test]).argmax(-1) == y[test]).float().mean())
    assert accuracy > 0.85 if position == "end" else accuracy < 0.2, accuracy


def test_soft_training_ends_with_a_hard_mask():
    model = images_model(mask_mode="post", cutoff=0.5)
    model.set_progress(0.0)
    x = torch.randn(2, 8, 8, 1)
    soft = model(x)
    model.set_progress(1.0)
    assert not torch.allclose(model(x), soft)
    again = images_model(mask_mode="post")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_weights_of_a_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4
    )
    llama = transformers.LlamaForCausalLM(config).state_dict()
    for i in range(3):
        llama[f"model.layers.{i}.input_layernorm.weight"] = torch.arange(48.0)
    model = images_model()
    before = model.head.weight.detach().clone()
    model.load_llama(llama)
    assert torch.equal(model.head.weight, before)
    at = torch.linspace(0, 47, 32).round().long()
    assert torch.equal(model.blocks[1].norm1.weight, torch.arange(48.0)[at])
    rows = torch.linspace(0, 143, 96).round().long()
    fused = torch.cat([llama[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv"])
    assert torch.equal(model.blocks[1].attn.k.weight, fused[rows][:, at][32:64])
    with pytest.raises(ValueError, match="no layer 3"):
        ILlama(img_size=8, patch_size=2, dim=32, depth=4, num_heads=2, multiple_of=32).load_llama(llama)
    with pytest.raises(ValueError, match="fewer than"):
        ILlama(img_size=8, patch_size=2, dim=64, depth=1, num_heads=2, multiple_of=32).load_llama(llama)


def test_positions_follow_the_image_size():
    sd = FIXTURE.under("model/sd")
    larger = ILlama(**{**FIXTURE.config["model"], "img_size": (16, 12)})
    larger.load_authors(sd)
    assert larger(torch.randn(1, 16, 12, 3)).shape == (1, 5)
    assert torch.equal(larger.pos_embed[:, -1], sd["pos_embed"][:, -1])
    same = resize_positions(sd["pos_embed"], (2, 2))
    torch.testing.assert_close(same, sd["pos_embed"])
    with pytest.raises(ValueError, match="no square grid"):
        resize_positions(torch.zeros(1, 7, 4), (2, 2))


def test_bad_input():
    for settings, words in (
        (dict(mask_mode="after"), "mask_mode"),
        (dict(schedule="cosine"), "schedule"),
        (dict(soft_rate=1.5), "soft_rate=1.5"),
        (dict(cutoff=-0.1), "cutoff=-0.1"),
        (dict(causal=True), "causal=True"),
        (dict(attn_drop=0.1), "attn_drop=0.1"),
        (dict(num_heads=3), "num_heads=3 does not divide"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**settings)
    with pytest.raises(ValueError, match="patch_size=3 does not divide"):
        ILlama(img_size=8, patch_size=3)
    with pytest.raises(ValueError, match="channels last"):
        images_model()(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match="cls_position"):
        images_model(cls_position="middle")


def test_dropped_branches_only_in_training():
    model = images_model(drop_path=0.5)
    x = torch.randn(8, 8, 8, 1)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    assert [b.drop_path for b in model.blocks] == [0.0, 0.5]
