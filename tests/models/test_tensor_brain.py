"""The Tensor Brain: read-outs and writes in closed form, a toy world perceived and remembered."""

import pytest
import torch
from torch.nn.functional import one_hot

from attnlib.models.tensor_brain import KINDS, TensorBrain

ROLES = ("subject", "object", "predicate")


def test_probabilities_are_of_the_admissible_indices_alone():
    brain = TensorBrain(6, 3, 4, sensory_dim=5, dim=8).double()
    state = torch.randn(7, 8, dtype=torch.double)
    every = torch.cat([brain.embedding[k] for k in KINDS])
    logits = state.sigmoid() @ every.mT + torch.cat([brain.bias[k] for k in KINDS])
    at = 0
    for kind, n in zip(KINDS, (6, 3, 4), strict=True):
        allowed = torch.zeros(13, dtype=torch.bool)
        allowed[at : at + n] = True
        told = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
        assert not told[:, ~allowed].any()
        assert torch.allclose(brain.read(state, kind).exp(), told[:, allowed])
        at += n


def test_what_is_written_is_read():
    brain = TensorBrain(16, 2, dim=16, squash="identity")
    with torch.no_grad():
        brain.embedding["entity"].copy_(torch.eye(16))
    index = torch.arange(16)
    seen = []
    for scale in (1.0, 3.0, 10.0):
        p = brain.read(scale * brain.write(torch.zeros(16, 16), "entity", index), "entity").exp()
        told = torch.tensor(scale).exp() / (torch.tensor(scale).exp() + 15)
        assert torch.allclose(p.diagonal(), told.expand(16), atol=1e-6)
        seen.append(float(p.detach().diagonal().min()))
    assert seen == sorted(seen) and seen[-1] > 0.999


@pytest.mark.parametrize("squash", ["sigmoid", "tanh", "identity"])
def test_soft_writes_are_attention_with_keys_as_values(squash):
    brain = TensorBrain(6, 3, dim=8, squash=squash, alpha=0.5)
    with torch.no_grad():
        brain.bias["entity"].normal_()
    state = torch.randn(4, 8)
    told = 0.5 * state + brain.read(state, "entity").exp() @ brain.embedding["entity"]
    assert torch.allclose(brain.attend(state, "entity"), told, atol=1e-6)


def world(generator, entities=20, predicates=5, width=16):
    features = torch.randn(entities, width, generator=generator)
    relation = torch.randint(predicates, (entities, entities), generator=generator)

    def draw(count):
        s, o = torch.randint(entities, (2, count), generator=generator)
        views = {
            r: features[i] + 0.2 * torch.randn(count, width, generator=generator)
            for r, i in (("subject", s), ("object", o))
        }
        views["predicate"] = torch.randn(count, width, generator=generator)  # says nothing of the pair
        return views, torch.stack([s, o, relation[s, o]], 1)

    return draw


def test_a_toy_world_is_learnt_and_needs_the_working_memory():
    g = torch.Generator().manual_seed(0)
    draw = world(g)
    torch.manual_seed(0)
    brain = TensorBrain(20, 5, sensory_dim=16, dim=64, memory_dim=96, squash="tanh")
    optimizer = torch.optim.Adam(brain.parameters(), lr=0.01)
    for _ in range(300):
        views, triples = draw(256)
        loss = -brain(views, triples).of(triples).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        views, triples = draw(1000)
        found, cut = brain(views), brain(views, memory=False)
    right = {r: float((found.chosen[r] == triples[:, i]).float().mean()) for i, r in enumerate(ROLES)}
    assert min(right.values()) > 0.9, right
    marginal = float(one_hot(triples[:, 2]).float().mean(0).max())
    assert float((cut.chosen["predicate"] == triples[:, 2]).float().mean()) < marginal + 0.1


def test_a_time_recalls_its_scene_without_any_view():
    torch.manual_seed(0)
    scenes = torch.tensor([[0, 1, 2], [3, 4, 0], [1, 5, 1]])
    brain = TensorBrain(6, 3, 3, sensory_dim=4, dim=32, memory_dim=32, squash="tanh")
    optimizer = torch.optim.Adam(brain.parameters(), lr=0.02)
    for _ in range(120):
        loss = -brain(triples=scenes, time=torch.arange(3)).of(scenes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = brain(time=torch.arange(3)).chosen
    assert torch.equal(torch.stack([found[r] for r in ROLES], 1), scenes)
    table = brain.triples(time=1)
    assert float(table.sum()) == pytest.approx(1.0, abs=1e-4) and float(table[3, 4, 0].detach()) > 0.9


def test_semantic_memory_approaches_the_frequencies():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    data = torch.stack(
        [
            torch.randint(4, (60,), generator=g),
            torch.randint(4, (60,), generator=g),
            torch.randint(2, (60,), generator=g),
        ],
        1,
    )
    counts = torch.zeros(4, 4, 2).index_put_(tuple(data.mT), torch.ones(60), accumulate=True) / 60
    brain = TensorBrain(4, 2, sensory_dim=4, dim=16, memory_dim=16)

    def distance():
        seen = counts > 0
        return float((counts[seen] * (counts[seen] / brain.triples().detach()[seen]).log()).sum())

    falling = [distance()]
    optimizer = torch.optim.Adam(brain.parameters(), lr=0.02)
    for _ in range(3):
        for _ in range(50):
            loss = -brain(triples=data).of(data).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        falling.append(distance())
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.1 * falling[0]
    assert float(brain.triples().sum()) == pytest.approx(1.0, abs=1e-4)


def test_product_pooling_is_distmult():
    brain = TensorBrain(6, 3, dim=8)
    s, o = torch.tensor([0, 3]), torch.tensor([2, 5])
    e, p = brain.embedding["entity"], brain.embedding["predicate"]
    for b in range(2):
        for k in range(3):
            told = sum(e[s[b], r] * e[o[b], r] * p[k, r] for r in range(8))
            assert torch.allclose(brain.trilinear(s, o)[b, k], told, atol=1e-6)


def test_new_indices_leave_the_old_ones_ratios():
    brain = TensorBrain(5, 3, dim=8)
    state = torch.randn(4, 8)
    before = brain.read(state, "entity")
    brain.add_indices("entity", 2)
    after = brain.read(state, "entity")
    assert after.shape == (4, 7)
    assert torch.allclose(after[:, :5] - after[:, :1], before - before[:, :1], atol=1e-5)


@pytest.mark.parametrize("order", ["SOP", "SPO"])
def test_samples_soft_writes_and_gradients(order):
    brain = TensorBrain(5, 3, sensory_dim=4, dim=8, order=order)
    views = {r: torch.randn(2, 4) for r in ROLES}
    one, two = (brain(views, mode="sample", generator=torch.Generator().manual_seed(0)).chosen for _ in range(2))
    assert all(torch.equal(one[r], two[r]) for r in ROLES)
    found = brain(views, mode="soft")
    sum(p.sum() for p in found.log_probs.values()).backward()
    assert brain.sense.weight.grad is not None and brain.enter.weight.grad.abs().sum() > 0


def test_what_makes_no_sense_is_refused():
    brain = TensorBrain(5, 3, sensory_dim=4)
    views = {r: torch.randn(2, 4) for r in ROLES}
    with pytest.raises(ValueError, match="has no index"):
        brain.read(torch.zeros(1, 64), "time")
    with pytest.raises(ValueError, match="views must be"):
        brain({"subject": views["subject"]})
    with pytest.raises(ValueError, match="mode"):
        brain(views, mode="greedy")
    with pytest.raises(ValueError, match="order"):
        TensorBrain(5, 3, order="PSO")
    with pytest.raises(ValueError, match="index"):
        brain.write(torch.zeros(1, 64), "entity", torch.tensor([7]))
    with pytest.raises(ValueError, match="triples"):
        brain(views, torch.zeros(2, 2, dtype=torch.long))
