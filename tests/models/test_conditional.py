"""Conditional cross attention: one trunk, a space per condition, triplets within it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.retrieval.conditional import (
    ConditionalCrossAttention,
    Embeddings,
    TrunkOfViT,
    compare,
    triplets,
)
from attnlib.models.retrieval.contrast import recall


def built(trunk=None, **settings):
    torch.manual_seed(0)
    settings = {"dim": 12, "embed_dim": 6, "num_heads": 3, **settings}
    model = ConditionalCrossAttention(trunk or nn.Identity(), 4, **settings).double()
    nn.init.normal_(model.conditions)
    return model


def oracle(m, x, c, rows):
    """The last block with ``rows`` equal queries, as the paper repeats the condition, head by head."""
    e = m.conditions[c] + (0 if m.condition_bias is None else m.condition_bias)
    e = e.expand(len(x), rows, -1)
    n = F.layer_norm(x, (12,), m.norm.weight, m.norm.bias, 1e-6)
    q, k, v = m.attend.q(e), m.attend.k(n), m.attend.v(n)
    heads = []
    for h in range(3):
        s = slice(4 * h, 4 * h + 4)
        heads.append((q[..., s] @ k[..., s].mT / 2).softmax(-1) @ v[..., s])
    y = m.attend.proj(torch.cat(heads, -1))
    y = y + (e if m.residual == "query" else x[:, :1] if m.residual == "token" else 0)
    y = y + m.mlp(F.layer_norm(y, (12,), m.norm2.weight, m.norm2.bias, 1e-6))
    z = m.head(F.layer_norm(y, (12,), m.final.weight, m.final.bias, 1e-6))
    return F.normalize(z, dim=-1)


@pytest.mark.parametrize("query", ["onehot", "table"])
@pytest.mark.parametrize("residual", ["query", "token", "none"])
def test_one_query_row_is_all_of_them(query, residual):
    m, x = built(query=query, residual=residual), torch.randn(3, 5, 12).double()
    every = m(x)
    for c in range(4):
        rows = oracle(m, x, c, 5)
        torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
        torch.testing.assert_close(m(x, c).vectors, rows[:, 0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(every.vectors[:, c], rows[:, 0], rtol=1e-10, atol=1e-12)
    mixed = torch.tensor([2, 0, 3])
    torch.testing.assert_close(m(x, mixed).vectors, every.vectors[torch.arange(3), mixed])
    got = torch.autograd.grad(every.vectors.sin().sum(), list(m.parameters()), allow_unused=True)
    want = sum(oracle(m, x, c, 1).sin().sum() for c in range(4))
    for a, b in zip(got, torch.autograd.grad(want, list(m.parameters()), allow_unused=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_parameters_are_those_of_one_block_of_a_vit():
    m = ConditionalCrossAttention(nn.Identity(), 5, query="table")
    block = sum(p.numel() for p in attnlib.create_model("vit_base_patch16_224", depth=1).stages.parameters())
    beside = 5 * 768 + 2 * 768 + 768 * 256 + 256  # conditions, the final norm, the embedding
    assert sum(p.numel() for p in m.parameters()) == block + beside


def test_the_trunk_runs_once_for_all_conditions():
    calls = []
    trunk = nn.Linear(12, 12).double()
    trunk.register_forward_hook(lambda *_: calls.append(1))
    m, x = built(trunk), torch.randn(2, 5, 12).double()
    every = m(x)
    assert calls == [1] and not torch.allclose(every.vectors[:, 0], every.vectors[:, 1])
    tokens = m.tokens(x)
    for c in range(4):
        torch.testing.assert_close(m.embed(tokens, c).vectors, every.vectors[:, c])
    assert len(calls) == 2


def test_a_condition_that_is_the_class_token_is_plain_pooling_by_it():
    m = ConditionalCrossAttention(nn.Identity(), 1, 12, 6, 1, query="table", residual="none").double()
    x = torch.randn(1, 5, 12).double()
    m.conditions.data.copy_(x[:, 0])
    n = m.norm(x)
    own = m.attend
    a = (own.q(x[:, :1]) @ own.k(n).mT / 12**0.5).softmax(-1)
    y = own.proj(a @ own.v(n))
    y = y + m.mlp(m.norm2(y))
    torch.testing.assert_close(m(x, 0).vectors, F.normalize(m.head(m.final(y)), dim=-1)[:, 0])


def test_absent_tokens_change_nothing():
    m, x = built(), torch.randn(2, 5, 12).double()
    longer = torch.cat([x, torch.full((2, 3, 12), float("nan")).double()], 1)
    valid = torch.arange(8).expand(2, 8) < 5
    torch.testing.assert_close(m.embed(longer, 1, valid).vectors, m.embed(x, 1).vectors)


def slow_triplets(vectors, values, margin):
    total, count = 0.0, 0
    n = len(values)
    for a in range(n):
        for p in range(n):
            for q in range(n):
                if a != p and values[a] == values[p] and values[q] != values[a] and min(values[[a, p, q]]) >= 0:
                    d = lambda i, j: (vectors[i] - vectors[j]).norm()  # noqa: E731
                    total, count = total + (d(a, p) - d(a, q) + margin).clamp(min=0), count + 1
    return total, count


def test_triplets_are_counted_within_a_condition():
    g = torch.Generator().manual_seed(1)
    v = F.normalize(torch.randn(7, 3, dtype=torch.float64, generator=g), dim=1)
    values = torch.tensor([0, 1, 0, -1, 1, 2, 0])
    (ours, number), (theirs, count) = triplets(v, values, 0.3), slow_triplets(v, values, 0.3)
    assert number == count
    torch.testing.assert_close(ours, theirs)
    m, x = built(), torch.randn(6, 5, 12).double()
    target = torch.randint(0, 2, (6, 4), generator=g)
    target[:2], target[2:4] = 0, 1
    every = m(x)
    parts = [slow_triplets(every.vectors[:, c], target[:, c], 0.3) for c in range(4)]
    want = sum(p[0] for p in parts) / sum(p[1] for p in parts)
    torch.testing.assert_close(m.loss(every, target)["triplet"], want)
    asked = torch.tensor([0, 0, 0, 1, 1, 1])
    some = m.loss(m(x, asked), target)["triplet"]
    torch.testing.assert_close(some, m.loss(m(x, asked), target.gather(1, asked[:, None]).squeeze(1))["triplet"])
    alike = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)  # equal embeddings have no slope, and no NaN
    triplets(alike, torch.tensor([0, 0, 1]), 0.3)[0].backward()
    assert bool(alike.grad.isfinite().all())


def test_spaces_answer_their_own_question():
    """Tokens carry colour and shape; each condition finds its own, and is near chance for the other."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    names = torch.randn(2, 4, 12, generator=g)

    def batch(n, generator):
        target = torch.randint(0, 4, (n, 2), generator=generator)
        x = 0.3 * torch.randn(n, 5, 12, generator=generator)
        for a in range(2):
            x[:, a] += names[a][target[:, a]]
        return {"images": x, "target": target}

    m = ConditionalCrossAttention(nn.Identity(), 2, 12, 6, 4)
    optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 5e-3))
    for _ in range(400):
        train_batch(m, batch(24, g), optimizers)
    test = batch(120, torch.Generator().manual_seed(9))
    found = m.predict(test["images"]).vectors
    itself = torch.eye(120, dtype=torch.bool)
    for c in range(2):
        scores = (found[:, c] @ found[:, c].T).masked_fill(itself, -2)
        own, other = (
            recall(scores, (t[:, None] == t[None]) & ~itself) for t in (test["target"][:, c], test["target"][:, 1 - c])
        )
        assert own > 0.95 and other < 0.4, (own, other)


def test_a_vit_of_the_library_is_a_trunk():
    vit = attnlib.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    m = ConditionalCrossAttention(TrunkOfViT(vit), 3, dim=192, embed_dim=8, num_heads=3)
    images = torch.randn(2, 3, 32, 32)
    found = m(images)
    assert found.vectors.shape == (2, 3, 8) and m.tokens(images).shape == (2, 5, 192)
    torch.testing.assert_close(copy.deepcopy(m)(images, 2).vectors, found.vectors[:, 2])
    last = list(vit.stages)[-1]
    m.loss(m(images.repeat(2, 1, 1, 1)), torch.tensor([[0, 0, 0], [1, 1, 1]] * 2))["triplet"].backward()
    assert all(p.grad is None for p in last.parameters())  # its last block is left out


def test_traces_and_takes_empty_batches():
    m, x = built(), torch.randn(2, 5, 12).double()
    run = torch.compile(m, backend="eager")
    torch.testing.assert_close(run(x, 1).vectors, m(x, 1).vectors)
    assert m(x[:0]).vectors.shape == (0, 4, 6)


def test_bad_input():
    m, x = built(), torch.randn(2, 5, 12).double()
    with pytest.raises(ValueError, match="condition must be .* at most 3, got 4"):
        m(x, 4)
    with pytest.raises(ValueError, match=r"condition must lie in \[0, 3\]"):
        m(x, torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="one number per image"):
        m(x, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"conditions \[0, 1\] lie in different spaces"):
        compare(m(x, 0), m(x, 1))
    with pytest.raises(ValueError, match="gallery must answer one condition"):
        compare(m(x, 0), m(x))
    torch.testing.assert_close(compare(m(x, 0), m(x, 0)).diagonal(), torch.ones(2).double())
    with pytest.raises(ValueError, match="no triplet"):
        m.loss(m(x), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="target must be"):
        m.loss(m(x), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="forward_intermediates"):
        TrunkOfViT(nn.Identity())
    with pytest.raises(ValueError, match="residual"):
        built(residual="cls")
    assert isinstance(m(x), Embeddings)
