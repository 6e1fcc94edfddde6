"""No code was released: held to a float64 loop over experts, and to the dense models it is made from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib import masks
from attnlib.nn.dense.softmax_attention import SoftmaxAttention
from attnlib.nn.heads.bam_soft_moa_upcycling import ExpertFeedForward, ParallelBlock, router_losses, upcycle

SLUG = "bam-soft-moa-upcycling"


def make(**settings):
    return attnlib.create(SLUG, **{**dict(dim=24, num_heads=4, num_kv_heads=2, num_experts=3), **settings})


def dense(seed, **settings):
    torch.manual_seed(seed)
    return SoftmaxAttention(**{**dict(dim=24, num_heads=4, num_kv_heads=2), **settings})


def experts_of(seeds=(0, 1, 2), **settings):
    return [dense(seed, **settings) for seed in seeds]


def oracle(models, gates, x, shared_kv):
    """``sum_e g_e MHA_e(x)`` as the paper writes it, one expert and one head after another."""
    k_of = [torch.stack([m.k.weight for m in models]).mean(0) if shared_kv else m.k.weight for m in models]
    kb = [torch.stack([m.k.bias for m in models]).mean(0) if shared_kv else m.k.bias for m in models]
    v_of = [torch.stack([m.v.weight for m in models]).mean(0) if shared_kv else m.v.weight for m in models]
    vb = [torch.stack([m.v.bias for m in models]).mean(0) if shared_kv else m.v.bias for m in models]
    y = torch.zeros_like(x)
    for e, m in enumerate(models):
        q = F.linear(x, m.q.weight, m.q.bias).unflatten(-1, (4, 6))
        k = F.linear(x, k_of[e], kb[e]).unflatten(-1, (2, 6))
        v = F.linear(x, v_of[e], vb[e]).unflatten(-1, (2, 6))
        heads = [
            (q[..., h, :] @ k[..., h // 2, :].transpose(-2, -1) / 6**0.5).softmax(-1) @ v[..., h // 2, :]
            for h in range(4)
        ]
        y = y + gates[..., e : e + 1] * F.linear(torch.cat(heads, -1), m.proj.weight, m.proj.bias)
    return y


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loop_over_experts(shared_kv, top_k, masked):
    models = [m.double() for m in experts_of()]
    m = make(shared_kv=shared_kv, top_k=top_k).double()
    m.load_state_dict(upcycle([d.state_dict() for d in models], 4, shared_kv=shared_kv, router_std=1.0))
    x = torch.randn(2, 7, 24, dtype=torch.double, requires_grad=True)
    gates = m.router(x).softmax(-1)
    if top_k:
        gates = gates * torch.zeros_like(gates).scatter(-1, gates.topk(top_k, -1).indices, 1.0)
    want = oracle(models, gates, x, shared_kv)
    # a mask for every head that forbids nothing takes the other way through shared keys
    mask = torch.ones(1, 12, 7, 7, dtype=torch.bool) if masked else None
    got = m(x, mask=mask)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("settings", [{}, dict(causal=True, rotary=1e4), dict(num_kv_heads=4, qk_norm=True)])
@pytest.mark.parametrize("shared_kv", [False, True])
def test_identical_experts_are_the_dense_model(settings, shared_kv):
    d = dense(0, **settings)
    m = make(shared_kv=shared_kv, **settings)
    m.load_state_dict(upcycle([d.state_dict()] * 3, 4, shared_kv=shared_kv, router_std=2.0))
    x = torch.randn(2, 9, 24)
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    torch.testing.assert_close(m(x, valid=valid), d(x, valid=valid), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared_kv", [False, True])
def test_expert_tensors_are_copies_and_the_rest_means(shared_kv):
    dicts = [{f"layer.attn.{k}": v for k, v in d.state_dict().items()} for d in experts_of()]
    for i, sd in enumerate(dicts):
        sd["norm.weight"] = torch.full((24,), float(i))
        sd["step"] = torch.tensor(7)
    out = upcycle(dicts, 4, shared_kv=shared_kv)
    for e, sd in enumerate(dicts):
        for name in ("q.weight", "q.bias", "k.weight", "v.bias"):
            if name[0] == "q" or not shared_kv:
                assert torch.equal(out[f"layer.attn.{name}"].chunk(3)[e], sd[f"layer.attn.{name}"])
        assert torch.equal(out["layer.attn.proj.weight"].chunk(3, 1)[e], sd["layer.attn.proj.weight"])
        assert torch.equal(out["layer.attn.proj_bias"][e], sd["layer.attn.proj.bias"])
    if shared_kv:
        mean = torch.stack([sd["layer.attn.k.weight"] for sd in dicts]).mean(0)
        torch.testing.assert_close(out["layer.attn.k.weight"], mean)
    assert torch.equal(out["norm.weight"], torch.ones(24)) and int(out["step"]) == 7
    assert out["layer.attn.router.weight"].shape == (3, 24)


def test_a_one_hot_router_is_its_expert():
    models = experts_of()
    m = make(top_k=1, renormalize=True)
    m.load_state_dict(upcycle([d.state_dict() for d in models], 4))
    x = torch.randn(2, 5, 24)
    x[..., 0] = 1.0
    for e in range(3):
        with torch.no_grad():
            m.router.weight.zero_()
            m.router.weight[e, 0] = 5.0
        torch.testing.assert_close(m(x), models[e](x), atol=1e-5, rtol=1e-5)
    soft = make()
    soft.load_state_dict(m.state_dict())
    with torch.no_grad():
        soft.router.weight.mul_(100)
    torch.testing.assert_close(soft(x), models[2](x), atol=1e-5, rtol=1e-5)


def test_gradient_reaches_every_expert_only_when_soft():
    x = torch.randn(1, 1, 24)
    for top_k, reached in ((None, 3), (1, 1)):
        m = make(top_k=top_k)
        m(x).square().sum().backward()
        parts = m.proj.weight.grad.chunk(3, 1)
        assert sum(bool(p.any()) for p in parts) == reached


@pytest.mark.parametrize("shared_kv, caches", [(False, 3), (True, 1)])
def test_the_cache_grows_with_experts_only_when_they_have_keys_of_their_own(shared_kv, caches):
    x = torch.randn(1, 6, 24)
    m = make(shared_kv=shared_kv, causal=True)
    sizes = [n(x, returns=("state",)).state["k"].numel() for n in (m, dense(0, causal=True))]
    assert sizes[0] == caches * sizes[1]


def test_router_losses():
    logits = torch.randn(2, 5, 4)
    chosen = F.one_hot(logits.argmax(-1), 4)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    losses = router_losses(logits, chosen, valid)
    p, real = logits.softmax(-1)[valid], chosen[valid].float()
    torch.testing.assert_close(losses["balance"], 4 * (real.mean(0) * p.mean(0)).sum())
    torch.testing.assert_close(losses["z"], logits[valid].logsumexp(-1).square().mean())
    m = make(top_k=1)
    x = torch.randn(2, 5, 24)
    own = m(x, valid=valid, returns=("losses",)).losses
    again = router_losses(m.router(x), F.one_hot(m.router(x).argmax(-1), 3), valid)
    torch.testing.assert_close(own, again)
    worst = router_losses(torch.tensor([[100.0, 0, 0, 0]]), torch.tensor([[1, 0, 0, 0]]))
    torch.testing.assert_close(worst["balance"], torch.tensor(4.0))


def test_feed_forward_experts():
    torch.manual_seed(0)
    m, x = ExpertFeedForward(8, 12, num_experts=3), torch.randn(4, 6, 8)
    y, _ = m(x)
    p = m.router(x).softmax(-1)
    parts = []
    for e in range(3):
        one = ExpertFeedForward(8, 12)
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            getattr(one, name).weight.data = getattr(m, name).weight.chunk(3, axis)[e].detach()
        parts.append(one(x)[0])
    top = p.argmax(-1, keepdim=True)
    picked = torch.stack(parts, -2).gather(-2, top.unsqueeze(-1).expand(-1, -1, -1, 8)).squeeze(-2)
    torch.testing.assert_close(y, p.gather(-1, top) * picked, atol=1e-6, rtol=1e-5)
    assert len(set(top.flatten().tolist())) > 1
    m.renormalize = True
    torch.testing.assert_close(m(x)[0], picked, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shared_kv", [False, True])
def test_identical_parallel_blocks_are_the_dense_block(shared_kv):
    torch.manual_seed(0)
    seed = ParallelBlock(24, 4, 2, causal=True, rotary=1e4)
    sd = upcycle([seed.state_dict()] * 3, 4, shared_kv=shared_kv, ffn_experts=True)
    x = torch.randn(2, 6, 24)
    exact = ParallelBlock(24, 4, 2, num_experts=3, shared_kv=shared_kv, renormalize=True, causal=True, rotary=1e4)
    exact.load_state_dict(sd)
    torch.testing.assert_close(exact(x), seed(x), atol=1e-5, rtol=1e-5)
    # as in the paper, the feed-forward keeps the probability of its expert
    paper = ParallelBlock(24, 4, 2, num_experts=3, shared_kv=shared_kv, causal=True, rotary=1e4)
    paper.load_state_dict(sd)
    u = seed.norm(x)
    p = paper.ffn.router(u).softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(paper(x), x + seed.attn(u) + p * seed.ffn(u)[0], atol=1e-5, rtol=1e-5)


def test_blocks_decode_with_a_state_and_return_losses():
    torch.manual_seed(0)
    block = ParallelBlock(24, 4, 2, num_experts=3, top_k=2, causal=True, rotary=1e4).eval()
    x = torch.randn(2, 6, 24)
    full, state, parts = block(x, returns=("losses",)), None, []
    for t in range(6):
        out = block(x[:, t : t + 1], state=state, returns=("state",))
        state = out.state
        parts.append(out.y)
    torch.testing.assert_close(torch.cat(parts, 1), full.y, atol=1e-5, rtol=1e-5)
    u = block.norm(x)
    both = block.ffn(u)[1]["balance"] + block.attn(u, returns=("losses",)).losses["balance"]
    torch.testing.assert_close(full.losses["balance"], both)


def test_identical_dense_decoders_give_the_dense_decoder():
    pytest.importorskip("transformers")
    from attnlib.models.language import DecoderConfig, DecoderForCausalLM

    def decoder(**spec):
        torch.manual_seed(0)
        return DecoderForCausalLM(
            DecoderConfig(vocab_size=41, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, mechanisms=[spec])
        ).eval()

    seed = decoder(name="softmax-attention", num_kv_heads=2)
    mixture = decoder(name=SLUG, num_kv_heads=2, num_experts=3, shared_kv=True)
    mixture.load_state_dict(upcycle([seed.state_dict()] * 3, 4, shared_kv=True))
    ids = torch.randint(1, 41, (2, 7))
    torch.testing.assert_close(mixture(ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="sequential block"):
        upcycle([seed.state_dict()] * 3, 4, ffn_experts=True)


def test_convert_state_dict_takes_one_checkpoint_or_many():
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(24, 4, batch_first=True)
    m = make(num_kv_heads=4)
    m.load_state_dict(attnlib.convert_state_dict(SLUG, mha.state_dict(), num_heads=4, num_experts=3))
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(m(x), mha(x, x, x, need_weights=False)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="give num_heads"):
        attnlib.convert_state_dict(SLUG, mha.state_dict())
    with pytest.raises(ValueError, match="num_experts=2"):
        attnlib.convert_state_dict(SLUG, [mha.state_dict()] * 3, num_heads=4, num_experts=2)


# ---- the paper's claim, small

SUCCESSORS = {"up": 1, "down": -1, "jump": 5}


def text(domain: str, gen: torch.Generator, batch: int = 16, length: int = 24) -> torch.Tensor:
    """Sequences over 16 symbols that repeat a random phrase of four, moved on by a step that the domain sets."""
    phrase = torch.randint(16, (batch, 4), generator=gen)
    moves = torch.arange(length // 4) * SUCCESSORS[domain]
    return ((phrase[:, None] + moves[:, None]) % 16).flatten(1)


class Tiny(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        made = (ParallelBlock(32, 2, hidden=48, causal=True, rotary=100.0, **settings) for _ in range(2))
        self.blocks = nn.ModuleList(made)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 16, bias=False)

    def forward(self, ids):
        x, extra = self.embed(ids), 0.0
        for block in self.blocks:
            out = block(x, returns=("losses",))
            x = out.y
            if out.losses:
                extra = extra + 0.01 * out.losses["balance"] + 0.001 * out.losses["z"]
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten()), extra


def train(model, domains, steps, lr, seed):
    gen = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        loss, extra = model(torch.cat([text(d, gen) for d in domains]))
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
    return model


@torch.no_grad()
def held_out(model):
    gen = torch.Generator().manual_seed(99)
    return float(model.eval()(torch.cat([text(d, gen, 64) for d in SUCCESSORS]))[0])


def test_attention_experts_beat_averaged_attention_at_equal_steps():
    torch.manual_seed(0)
    seed = train(Tiny(), SUCCESSORS, 60, 3e-3, 1)
    models = [seed]
    for i, domain in enumerate(("up", "down", "jump")):
        branch = Tiny()
        branch.load_state_dict(seed.state_dict())
        models.append(train(branch, [domain], 80, 2e-3, 2 + i))
    losses = {}
    for name, settings in {"btx": dict(moa=False), "bam": {}, "shared": dict(shared_kv=True)}.items():
        torch.manual_seed(5)
        mixture = Tiny(num_experts=4, **settings)
        up = dict(attention_experts=settings.get("moa", True), shared_kv=settings.get("shared_kv", False))
        mixture.load_state_dict(upcycle([m.state_dict() for m in models], 2, ffn_experts=True, **up))
        losses[name] = held_out(train(mixture, SUCCESSORS, 60, 2e-3, 9))
    assert losses["bam"] < losses["btx"] and losses["shared"] < losses["btx"], losses
    assert losses["bam"] < held_out(seed), losses


# ---- bad input


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(top_k=4), "top_k=4 active experts"),
        (dict(top_k=0), "top_k=0"),
        (dict(num_experts=0), "num_experts must be an integer of at least 1, got 0"),
        (dict(num_heads=5, num_kv_heads=None), "num_heads=5 does not divide"),
        (dict(num_kv_heads=3), "num_kv_heads=3 does not divide"),
        (dict(alibi=True), "alibi"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)
    with pytest.raises(ValueError, match="num_experts=0"):
        ExpertFeedForward(8, num_experts=0)


def test_bad_checkpoints():
    a, b = (d.state_dict() for d in experts_of((0, 1)))
    with pytest.raises(ValueError, match="is empty"):
        upcycle([], 4)
    with pytest.raises(ValueError, match="num_heads=5 does not divide"):
        upcycle([a, b], 5)
    with pytest.raises(ValueError, match="k.weight has 12 rows"):
        upcycle([a, b], 3)  # heads of 8: one and a half key heads
    with pytest.raises(ValueError, match="no relatives.*proj.bias"):
        upcycle([a, {k: v for k, v in b.items() if k != "proj.bias"}], 4)
    with pytest.raises(ValueError, match=r"no relatives: k.weight is \(24, 24\)"):
        upcycle([a, dense(1, num_kv_heads=4).state_dict()], 4)
    with pytest.raises(ValueError, match="no attention"):
        upcycle([{"norm.weight": torch.ones(3)}], 4)
    with pytest.raises(ValueError, match="no feed-forward"):
        upcycle([a, b], 4, ffn_experts=True)
    with pytest.raises(ValueError, match="whole numbers have no mean"):
        upcycle([{**a, "n": torch.tensor(1)}, {**b, "n": torch.tensor(2)}], 4)


def test_a_plan_for_another_length_is_refused():
    m = make(top_k=1)
    x = torch.randn(1, 6, 24)
    plan = m.plan(x)
    assert torch.equal(m(x, plan=plan), m(x))
    with pytest.raises(ValueError, match="N=6"):
        m(x[:, :5], plan=plan)
    with pytest.raises(ValueError, match="needs_plan"):
        make()(x, plan=plan)


def test_masks_reach_every_expert():
    m, x = make(shared_kv=True), torch.randn(2, 8, 24)
    whole = masks.sliding_window(3).dense(8, 8, x.device)
    torch.testing.assert_close(m(x, mask=masks.sliding_window(3)), m(x, mask=whole.expand(1, 12, 8, 8)))
