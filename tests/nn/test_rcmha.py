import pytest
import torch
from parity import Fixture
from torch import nn

import attnlib
from attnlib.nn.dense.rcmha import shift

SLUG = "rcmha"
FIXTURE = Fixture(SLUG)


@pytest.mark.parametrize("case", ["both", "relative", "conv"])
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


def test_memory_equals_the_authors():
    """Their queries know nothing of the memory, so the tail of the query convolution is empty."""
    module = FIXTURE.build("memory")

    def call(m, xs):
        state = m(xs["mem"], returns=("state",)).state
        return m(xs["x"], state=state.replace(q_tail=torch.zeros_like(state["q_tail"])))

    FIXTURE.holds("memory", module, call)


def build(**settings):
    """Everything that starts at zero made alive."""
    m = attnlib.create(SLUG, **{"dim": 12, "num_heads": 3, "max_distance": 16, **settings}).double().eval()
    for p in (m.distance_keys, m.distance_bias, m.query_bias) if m.relative else ():
        nn.init.normal_(p)
    return m


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_equation(causal):
    m, x, d = build(causal=causal), torch.randn(2, 7, 12, dtype=torch.double), 4
    heads = []
    for name in ("q", "k", "v"):
        z = m.get_submodule(name)(x).unflatten(-1, (3, d))
        conv = m.get_submodule(f"{name}_conv")
        w = conv.weight[:, 0]
        past = [torch.cat([torch.zeros_like(z[:, :back]), z[:, : 7 - back]], 1) for back in (2, 1, 0)]
        heads.append(sum(w[:, tap] * p for tap, p in enumerate(past)) + conv.bias)
    q, k, v = heads
    y = torch.zeros(2, 7, 3, d, dtype=torch.double)
    for h in range(3):
        for i in range(7):
            keys = range(i + 1) if causal else range(7)
            score = [
                (q[:, i, h] + m.query_bias[h]).mul(k[:, j, h]).sum(-1)
                + q[:, i, h].mul(m.distance_keys[16 + j - i, h]).sum(-1)
                + m.distance_bias[16 + j - i, h]
                for j in keys
            ]
            weight = (torch.stack(score, 1) / d**0.5).softmax(1)
            y[:, i, h] = (weight[..., None] * v[:, : len(keys), h]).sum(1)
    torch.testing.assert_close(m(x), m.proj(y.flatten(2)), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("n, m", [(5, 5), (3, 8), (1, 6), (1, 1)])
def test_shift_is_the_loop(n, m):
    module, q = build(), torch.randn(2, 3, n, 4, dtype=torch.double)
    got = module.distance_scores(q, m)
    for i in range(n):
        for j in range(m):
            at = 16 + j - i - (m - n)
            expected = (q[:, :, i] * module.distance_keys[at]).sum(-1) + module.distance_bias[at]
            torch.testing.assert_close(got[:, :, i, j], expected)
    columns = torch.arange(m + n - 1).expand(n, -1)
    assert torch.equal(shift(columns, m), torch.arange(m) - torch.arange(n)[:, None] + n - 1)


def test_silent_switches_are_plain_attention():
    m = attnlib.create(SLUG, dim=12, num_heads=3, max_distance=16).eval()
    for name in ("q", "k", "v"):
        conv = m.get_submodule(f"{name}_conv")
        nn.init.zeros_(conv.bias)
        with torch.no_grad():
            conv.weight.copy_(torch.tensor([0.0, 0.0, 1.0]).expand_as(conv.weight))
    plain = attnlib.create("softmax-attention", dim=12, num_heads=3, causal=True)
    for name in ("q", "k"):
        nn.init.zeros_(plain.get_submodule(name).bias)
    plain.load_state_dict(m.state_dict(), strict=False)
    off = attnlib.create(SLUG, dim=12, num_heads=3, relative=False, qkv_conv=False).eval()
    off.load_state_dict(m.state_dict(), strict=False)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(off(x), plain(x), atol=1e-6, rtol=1e-5)


def test_the_future_does_not_reach_the_past():
    m, x = build(), torch.randn(1, 7, 12, dtype=torch.double)
    other = x.clone()
    other[:, 4] += 1
    difference = (m(other) - m(x)).abs().amax(-1)[0]
    assert not difference[:4].any() and (difference[4:] > 1e-6).all()


def test_memory_is_the_earlier_part_of_one_sequence():
    m, x = build(), torch.randn(2, 11, 12, dtype=torch.double)
    whole = m(x)
    state = None
    parts = []
    for segment in x.split((1, 4, 1, 5), 1):
        y, state = m.step(segment, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    state = m(x[:, :5], returns=("state",)).state
    cold = m(x[:, 5:], state=state.replace(q_tail=torch.zeros_like(state["q_tail"])))
    differs = (cold - whole[:, 5:]).abs().amax((0, 2)) > 1e-9
    assert differs.tolist() == [True, True, False, False, False, False], "only the first kernel_size - 1 queries"


@pytest.mark.parametrize("n, m", [(3, 8), (8, 3)])
def test_queries_are_the_last_tokens_of_a_context(n, m):
    module = build(qkv_conv=False, causal=False)
    x, context = torch.randn(2, n, 12, dtype=torch.double), torch.randn(2, m, 12, dtype=torch.double)
    q, k, v = (
        p(t).unflatten(-1, (3, 4)).transpose(1, 2) for p, t in ((module.q, x), (module.k, context), (module.v, context))
    )
    scores = torch.empty(2, 3, n, m, dtype=torch.double)
    for i in range(n):
        for j in range(m):
            at = 16 + j - i - (m - n)
            near = (q[:, :, i] * module.distance_keys[at]).sum(-1) + module.distance_bias[at]
            scores[:, :, i, j] = ((q[:, :, i] + module.query_bias) * k[:, :, j]).sum(-1) + near
    out = (scores / 2).softmax(-1) @ v
    torch.testing.assert_close(module(x, context), module.proj(out.transpose(1, 2).flatten(2)))


def test_masks_and_convolutions():
    x, hidden = torch.randn(1, 5, 12, dtype=torch.double), torch.ones(5, 5, dtype=torch.bool)
    hidden[:, 1] = False
    with pytest.raises(ValueError, match="takes no mask"):
        build(causal=False)(x, mask=hidden)
    m = build(causal=False, compat="authors")
    other = x.clone()
    other[:, 1] += 1
    assert not torch.allclose(m(x, mask=hidden)[:, 4], m(other, mask=hidden)[:, 4])  # through its neighbours' keys
    with pytest.raises(ValueError, match="compat="):
        build(compat="paper")


def test_parameter_count():
    c, h, d, p = 12, 3, 4, 16
    expected = 2 * c * c + 2 * (c * c + c) + 3 * (3 * d + d) + 2 * p * h * (d + 1) + c
    assert sum(t.numel() for t in build().parameters()) == expected


def test_learns_what_attention_without_positions_cannot():
    """Name the token before the last: by convolution or by distance it is easy, without either it is not."""
    vocabulary, n = 6, 12

    def final_loss(**switches):
        torch.manual_seed(0)
        embed, head = nn.Embedding(vocabulary, 24), nn.Linear(24, vocabulary)
        mixer = attnlib.create(SLUG, dim=24, num_heads=2, max_distance=16, attn_drop=0.0, **switches)
        parts = nn.ModuleList([embed, mixer, head])
        optimizer = torch.optim.Adam(parts.parameters(), 1e-2)
        for _ in range(120):
            tokens = torch.randint(0, vocabulary, (16, n))
            logits = head(mixer(embed(tokens)))[:, 2:]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-2].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    plain = final_loss(relative=False, qkv_conv=False)
    assert plain > 1.0
    assert final_loss() < 0.5 * plain
    assert final_loss(qkv_conv=False) < 0.8 * plain


def test_bad_settings():
    with pytest.raises(ValueError, match="at most 4"):
        attnlib.create(SLUG, dim=8, num_heads=2, max_distance=4)(torch.randn(1, 5, 8))
    m = attnlib.create(SLUG, dim=8, num_heads=2, max_distance=4)
    _, state = m.step(torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match="3 of them remembered"):
        m.step(torch.randn(1, 2, 8), state)
    with pytest.raises(ValueError, match="takes no mask"):
        m(torch.randn(1, 3, 8), mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_heads=3"):
        attnlib.create(SLUG, dim=8, num_heads=3)
    with pytest.raises(ValueError, match="kernel_size"):
        attnlib.create(SLUG, dim=8, num_heads=2, kernel_size=0)
