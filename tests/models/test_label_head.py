"""Cross-attention from labels told in words: equivariances, padding, frozen features, the toy world, the switch."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from attnlib.models.label_head import POOLS, QUERIES, SCORERS, LabelClassifier, LabelCrossAttentionHead, switch

KINDS = [
    dict(query=q, pool=p, scorer=s)
    for q, p, s in itertools.product(QUERIES, POOLS, SCORERS)
    if (q, s) != ("text", "match")
]


def made(dim=12, **settings):
    torch.manual_seed(0)
    head = LabelCrossAttentionHead(dim, 2, **settings).double()
    text, labels = torch.randn(3, 6, dim).double(), torch.randn(4, 5, dim).double()
    text_valid = torch.arange(6) < torch.tensor([[6], [3], [1]])
    labels_valid = torch.arange(5) < torch.tensor([[5], [2], [4], [1]])
    return head, text, labels, text_valid, labels_valid


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_classes_are_equivariant_and_free_in_number(settings):
    head, text, labels, tv, lv = made(**settings)
    order = torch.tensor([2, 0, 3, 1])
    told = head(text, labels, tv, lv)
    assert torch.allclose(head(text, labels[order], tv, lv[order]), told[:, order], atol=1e-10)
    assert torch.allclose(head(text, labels[:2], tv, lv[:2]), told[:, :2], atol=1e-10)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_padding_changes_nothing_and_an_empty_text_is_no_nan(settings):
    head, text, labels, tv, lv = made(**settings)
    told = head(text, labels, tv, lv)
    more = torch.full((3, 2, 12), float("nan")).double()
    wide = head(torch.cat([text, more], 1), labels, F.pad(tv, (0, 2)), lv)
    assert torch.allclose(wide, told, atol=1e-10) if settings["pool"] == "mean" else wide.shape == told.shape
    junk = torch.where(tv[..., None], text, 7.0)
    assert torch.allclose(head(junk, labels, tv, lv), told, atol=1e-10)
    assert torch.allclose(head(text, torch.where(lv[..., None], labels, 7.0), tv, lv), told, atol=1e-10)
    empty = head(text, labels, torch.zeros_like(tv), lv)
    assert empty.isfinite().all()


def test_label_queries_against_the_equation():
    head, text, labels, tv, lv = made()
    e = torch.stack([labels[c, lv[c]].mean(0) for c in range(4)])
    for b in range(3):
        x = text[b, tv[b]]
        q, k, v = head.cross.q(e), head.cross.k(x), head.cross.v(x)
        heads = [((q[:, s] @ k[:, s].T) / 6**0.5).softmax(-1) @ v[:, s] for s in (slice(0, 6), slice(6, 12))]
        z = head.norm1(e + head.cross.proj(torch.cat(heads, -1)))
        z = head.norm2(z + head.mlp(z))
        assert torch.allclose(head(text, labels, tv, lv)[b], z @ head.score.weight[0], atol=1e-10)


def test_text_queries_against_the_equation():
    head, text, labels, tv, lv = made(query="text")
    e = torch.stack([labels[c, lv[c]].mean(0) for c in range(4)])
    x = torch.stack([text[b, tv[b]].mean(0) for b in range(3)])
    q, k = head.cross.q(x), head.cross.k(e)
    expected = sum(q[:, s] @ k[:, s].T for s in (slice(0, 6), slice(6, 12))) / 2 / 6**0.5
    assert torch.allclose(head(text, labels, tv, lv), expected, atol=1e-10)
    assert {n.split(".")[1] for n, _ in head.named_parameters()} == {"q", "k"}


def test_one_token_is_read_whole_and_warned_of():
    head, text, labels, _, lv = made()
    with pytest.warns(UserWarning, match="one token"):
        head(text[:, :1], labels, None, lv)
    weights = head.cross(labels[:, 0].expand(3, -1, -1), text[:, :1], returns=("weights",)).weights
    assert weights.eq(1).all()


def test_no_gradient_reaches_the_encoder_and_kept_features_train_alike():
    torch.manual_seed(0)
    encoder = torch.nn.Embedding(20, 8)
    ids, target = torch.randint(20, (6, 5)), torch.tensor([0, 1, 2, 0, 1, 2])
    sentences = torch.randint(20, (3, 4))
    exists, told = torch.ones(6, 5, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    heads = []
    for cached in (False, True):
        torch.manual_seed(1)
        model = LabelClassifier(lambda i, v: encoder(i), LabelCrossAttentionHead(8, 2))
        model.describe(sentences, told)
        assert not any(p is encoder.weight for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        kept = model.features(ids, exists)
        for _ in range(3):
            logits = model.head(kept, model.labels, exists, told) if cached else model(ids, exists)
            optimizer.zero_grad()
            F.cross_entropy(logits, target).backward()
            optimizer.step()
        heads.append(model.head.state_dict())
    assert encoder.weight.grad is None
    assert all(torch.equal(heads[0][k], heads[1][k]) for k in heads[0])


def toy(shuffled=False, seed=0):
    """16 texts of each of 8 classes of six keywords, random vectors, which its sentence holds; 40 more to ask."""
    g = torch.Generator().manual_seed(seed)
    embed = F.normalize(torch.randn(400, 64, generator=g), dim=-1)
    keys = torch.randperm(400, generator=g)[:48].view(8, 6)
    rest = torch.tensor(sorted(set(range(400)) - set(keys.flatten().tolist())))

    def texts(shots):
        target = torch.arange(8).repeat_interleave(shots)
        noise = rest[torch.randint(len(rest), (len(target), 11), generator=g)]
        key = keys[target, torch.randint(6, (len(target),), generator=g)]
        return embed[torch.cat([key[:, None], noise], 1)], target

    shown, asked = texts(16), texts(40)
    return *shown, *asked, embed[keys[torch.randperm(8, generator=g) if shuffled else torch.arange(8)]]


def accuracy(x, y, tx, ty, labels):
    head = LabelCrossAttentionHead(64, 1, scorer="match", identity=True)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-4)
    for _ in range(10):
        loss = head.loss(x, labels, y)["class"]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    with torch.no_grad():
        return float((head(tx, labels).argmax(-1) == ty).float().mean())


def probe(x, y, tx, ty, ridge):
    x, tx = (F.pad(t.mean(1), (0, 1), value=1.0) for t in (x, tx))
    weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(65), x.T @ F.one_hot(y, 8).float())
    return float(((tx @ weight).argmax(-1) == ty).float().mean())


def test_labels_in_words_beat_a_linear_probe_and_shuffled_ones_do_not():
    for seed in range(3):
        torch.manual_seed(seed)
        *world, labels = toy(seed=seed)
        best = max(probe(*world, ridge) for ridge in (0.001, 0.01, 0.1, 1.0))
        own = accuracy(*world, labels)
        assert own > best + 0.08 and own > accuracy(*toy(shuffled=True, seed=seed)) + 0.1


def test_switch_keeps_what_a_teacher_trusts():
    torch.manual_seed(0)
    true = torch.randint(8, (400,))
    written = torch.where(torch.rand(400) < 0.3, torch.randint(8, (400,)), true)
    logits = 3.5 * F.one_hot(true, 8) + torch.randn(400, 8) * 0.8
    kept = switch(written, logits.softmax(-1))
    right = written == true
    assert kept[right].float().mean() > 0.8 and (~kept)[~right].float().mean() > 0.8
    sure = switch(written, logits.softmax(-1), "confidence", 0.95)
    assert (sure & ~kept).sum() == 0 and 0 < sure.sum() < kept.sum()
    assert switch(written, logits.softmax(-1), "dev_gain", dev=(0.5, 0.6)).all()
    assert not switch(written, logits.softmax(-1), "dev_gain", dev=(0.6, 0.6)).any()


def test_bad_input():
    with pytest.raises(ValueError, match="query='class'"):
        LabelCrossAttentionHead(8, query="class")
    head = LabelCrossAttentionHead(8, 2)
    with pytest.raises(ValueError, match="no class"):
        head(torch.zeros(1, 2, 8), torch.zeros(0, 2, 8))
    with pytest.raises(ValueError, match="text"):
        head(torch.zeros(1, 2, 9), torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="target"):
        head.loss(torch.zeros(1, 2, 8), torch.zeros(2, 2, 8), torch.tensor([2]))
    with pytest.raises(ValueError, match="describe"):
        LabelClassifier(lambda i, v: i, head)(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))
    labels, even = torch.tensor([0, 1]), torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="probabilities that sum to 1"):
        switch(labels, torch.randn(2, 2) * 5)
    with pytest.raises(ValueError, match="dev=None belongs to"):
        switch(labels, even, "dev_gain")
    with pytest.raises(ValueError, match="how='trust'"):
        switch(labels, even, "trust")
