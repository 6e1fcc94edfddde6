"""dependency-vit: reversed attention, one test per criterion of the card; held to the equations in float64."""

import math

import pytest
import torch

import attnlib
from attnlib.nn.dense.dependency_vit import Messages

F64 = torch.float64


def make(seed=0, spread=0.4, **config):
    torch.manual_seed(seed)
    m = attnlib.create("dependency-vit", **{"dim": 12, "num_heads": 3, **config}).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, spread)
    return m.eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def oracle(m, x, before=None):
    """Token by token, as the equations are printed: output, A (H, parents, children), messages."""
    count, heads, width = x.shape[0], m.num_heads, m.head_dim
    bias = [0 if f.bias is None else f.bias for f in (m.q, m.k, m.v)]
    q, k, v = (x @ f.weight.T + b for f, b in zip((m.q, m.k, m.v), bias, strict=True))
    message = torch.ones(count, dtype=F64) if before is None else before
    share = torch.softmax(x @ m.selector.weight.T / m.temperature, 1)
    hidden = torch.nn.functional.gelu(x @ m.controller.fc1.weight.T)
    message = message / (1 + torch.exp(-(hidden @ m.controller.fc2.weight.T)[:, 0]))
    a = torch.zeros(heads, count, count, dtype=F64)
    for h in range(heads):
        at = slice(h * width, (h + 1) * width)
        for i in range(count):
            scores = torch.stack([q[i, at] @ k[j, at] / math.sqrt(width) for j in range(count)])
            a[h, :, i] = torch.softmax(scores, 0) * share[i, h] * message[i]
    out = torch.cat([a[h] @ v[:, h * width : (h + 1) * width] for h in range(heads)], 1)
    return out @ m.proj.weight.T + m.proj.bias, a, message


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_it_is_the_equations_with_gradients(temperature):
    m, x = make(temperature=temperature), tokens(2, 7, 12).requires_grad_()
    before = tokens(2, 7).sigmoid()
    out = m(x, carry=Messages(before.log()), returns=("weights", "carry"))
    want = [oracle(m, x[b], before[b]) for b in range(2)]
    for got, part in ((out.y, 0), (out.weights, 1), (out.carry.log.exp(), 2)):
        torch.testing.assert_close(got, torch.stack([w[part] for w in want]), atol=1e-9, rtol=1e-9)
    inputs = [x, *m.parameters()]
    loss = [
        (y * tokens(*y.shape, seed=3)).sum()
        for y in (m(x, carry=Messages(before.log())), torch.stack([w[0] for w in want]))
    ]
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs) for y in loss), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)


def test_columns_sum_to_messages_and_to_one_where_all_is_sent():
    m, x = make(), tokens(2, 7, 12)
    out = m(x, returns=("weights", "carry"))
    torch.testing.assert_close(out.weights.sum((1, 2)), out.carry.log.exp())
    assert (out.carry.log < 0).all()
    whole = make(controller=False)(x, returns=("weights",)).weights
    torch.testing.assert_close(whole.sum((1, 2)), torch.ones(2, 7, dtype=F64))
    flat = make(temperature=1e9, controller=False)(x, returns=("weights",)).weights  # heads share evenly
    torch.testing.assert_close(flat.sum(2), torch.full((2, 3, 7), 1 / 3, dtype=F64))


def test_one_head_without_gates_is_the_transpose_of_attention():
    m, x = make(num_heads=1, selector=False, controller=False), tokens(1, 7, 12)
    out = m(x, returns=("weights",))
    plain = torch.softmax(m.q(x) @ m.k(x).mT / math.sqrt(12), -1)
    torch.testing.assert_close(out.weights[:, 0], plain.mT)
    torch.testing.assert_close(out.y, m.proj(plain.mT @ m.v(x)))
    with torch.no_grad():  # logits that are symmetric and whose map is doubly stochastic: attention itself
        m.k.weight.copy_(m.q.weight)
    ring = torch.zeros(1, 6, 12, dtype=F64)
    angle = torch.arange(6) * math.pi / 3
    with torch.no_grad():
        m.q.weight.copy_(torch.eye(12))
        m.k.weight.copy_(torch.eye(12))
    ring[0, :, 0], ring[0, :, 1] = angle.cos(), angle.sin()
    torch.testing.assert_close(m(ring), m.proj(torch.softmax(ring @ ring.mT / math.sqrt(12), -1) @ m.v(ring)))


def test_messages_multiply_in_log_space_however_deep():
    m, x = make(spread=0.4), tokens(1, 5, 12)
    carry = Messages(torch.full((1, 5), -400.0))  # far below what float32 holds
    out = m.float()(x.float(), carry=carry, returns=("carry",))
    assert (out.carry.log < -400).all() and out.y.isfinite().all() and out.carry.log.dtype == torch.float32
    half = m.bfloat16()(x.bfloat16(), returns=("carry",))
    assert half.carry.log.dtype == torch.float32 and half.y.dtype == torch.bfloat16


def test_a_token_that_sends_nothing_contributes_nothing():
    m, x = make(), tokens(1, 6, 12)
    log = torch.zeros(1, 6, dtype=F64)
    log[0, 2] = float("-inf")
    first = m(x, carry=Messages(log), returns=("weights",))
    assert not first.weights[:, :, :, 2].any()
    torch.testing.assert_close(
        first.weights[..., [0, 1, 3, 4, 5]], m(x, returns=("weights",)).weights[..., [0, 1, 3, 4, 5]]
    )


def test_what_is_pruned_is_as_if_it_did_not_exist():
    """Executed on the tokens that are left, and on all with the others marked absent: the same numbers."""
    m, x = make(), tokens(2, 4, 3, 12)
    left = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 3, 7, 8]])
    exists = torch.zeros(2, 12, dtype=torch.bool).scatter(1, left, True).view(2, 4, 3)
    log = -tokens(2, 12).abs()
    some = m(x, carry=Messages(log, left), returns=("weights", "carry"))
    absent = m(x, valid=exists, carry=Messages(log), returns=("weights", "carry"))
    torch.testing.assert_close(some.y, absent.y)
    torch.testing.assert_close(some.weights, absent.weights)
    assert not some.y[~exists].any()
    torch.testing.assert_close(some.carry.log[exists.flatten(1)], absent.carry.log[exists.flatten(1)])
    assert torch.equal(some.carry.log[~exists.flatten(1)], log[~exists.flatten(1)]) and some.carry.left is left


def test_letting_a_leaf_go_changes_nothing():
    """A token that nobody sends to and that sends nothing: with or without it, the others are the same."""
    m, x = make(num_heads=1, selector=False, controller=False), tokens(1, 6, 12)
    with torch.no_grad():
        m.q.weight.copy_(torch.eye(12))
        m.k.weight.copy_(torch.eye(12))
    x[..., 0] = 50.0  # every token likes the first channel in its parents,
    x[0, 4, 0] = -50.0  # which this one has not
    log = torch.zeros(1, 6, dtype=F64)
    log[0, 4] = float("-inf")
    every = m(x, carry=Messages(log), returns=("weights",))
    assert every.weights[0, 0, 4].sum() == 0 and every.weights[0, 0, :, 4].sum() == 0  # no child, no parent
    rest = torch.tensor([[0, 1, 2, 3, 5]])
    pruned = m(x, carry=Messages(log, rest))
    torch.testing.assert_close(pruned[0, rest[0]], every.y[0, rest[0]], atol=1e-12, rtol=1e-12)
    other = m(x, carry=Messages(log, torch.tensor([[1, 2, 3, 4, 5]])))
    assert not torch.allclose(other[0, 1], every.y[0, 1])  # one that others depend on does change them


def test_the_plan_keeps_what_receives_or_sends_most():
    x = tokens(2, 10, 12)
    m = make(keep_rate=0.45)
    out = m(x, returns=("weights", "carry"))
    received = out.weights.sum((1, 3))
    want = received.topk(4).indices.sort(-1).values
    assert torch.equal(out.carry.left, want) and torch.equal(m.plan(x)["left"], want)
    torch.testing.assert_close(out.y, make()(x))  # it prunes behind itself
    sent = make(keep_rate=0.45, prune_by="message")
    assert torch.equal(sent.plan(x)["left"], sent(x, returns=("carry",)).carry.log.topk(4).indices.sort(-1).values)
    again = m(x, carry=out.carry, returns=("carry",)).carry.left
    assert all(set(a) <= set(b) for a, b in zip(again.tolist(), want.tolist(), strict=True))
    frozen = attnlib.types.Plan("left", {"left": torch.tensor([[0, 1], [2, 3]])}, (("N", 10),))
    assert torch.equal(m(x, plan=frozen, returns=("carry",)).carry.left, frozen["left"])
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[0, :6] = False
    assert m.plan(x, valid=valid)["left"][0].tolist() == [6, 7, 8, 9]


def test_tokens_of_a_context_send():
    m, x, y = make(context_dim=5, num_heads=2), tokens(1, 4, 12), tokens(1, 6, 5)
    out = m(x, y, returns=("weights", "carry"))
    assert out.weights.shape == (1, 2, 4, 6) and out.carry.log.shape == (1, 6)
    torch.testing.assert_close(out.weights.sum((1, 2)), out.carry.log.exp())


def test_dropout_falls_on_what_is_sent():
    m, x = make(attn_drop=0.5), tokens(1, 7, 12)
    torch.testing.assert_close(m(x), make()(x))
    torch.manual_seed(0)
    assert not torch.allclose(m.train()(x), make()(x))


def test_bad_settings_and_carries():
    x = tokens(1, 6, 12)
    for settings, words in (
        (dict(num_heads=5), "num_heads"), (dict(temperature=0), "temperature"), (dict(keep_rate=1.5), "keep_rate"),
        (dict(prune_by="sent"), "prune_by"), (dict(keep_rate=0.5, context_dim=4), "context_dim"),
        (dict(selector=1), "selector"), (dict(controller_hidden=0), "controller_hidden"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            make(**settings)
    log = torch.zeros(1, 6, dtype=F64)
    for carry in (log, Messages(log[:, :5]), Messages(log, torch.tensor([[0.0]])), Messages(log, torch.tensor([[9]]))):
        with pytest.raises((TypeError, ValueError), match="carry"):
            make()(x, carry=carry)
    with pytest.raises(ValueError, match="takes no mask"):
        make()(x, mask=torch.ones(6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="no plan"):
        make().plan(x)
    with pytest.raises(ValueError, match="plan leaves 4 tokens"):
        few = Messages(log, torch.tensor([[0, 1]]))
        make(keep_rate=0.7)(x, carry=few, plan=attnlib.types.Plan("left", {"left": torch.tensor([[0, 1, 2, 3]])}))
