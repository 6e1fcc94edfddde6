"""Subspaces that are added while training: the authors' forward, loss and split, and what they must keep."""

import copy

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, Fixture
from torch import nn
from whole import drawn

from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.retrieval.subspaces import (
    AttentionMap,
    Schedule,
    SubspaceEmbedding,
    clusters,
    margin_loss,
    renamed,
)

CASES = ["one", "three", "unequal"]
NAMES = {"attention_map": "attention", "embedding": "embedding"}


class Models(Fixture):
    folder = HERE / "models"


THEIRS = Models("dynamic-subspace-learners")


def ours(name):
    head, rest = name.split(".", 1)
    return f"{NAMES[head]}.{rest}"


def loaded(case):
    f, config = THEIRS, THEIRS.config[case]
    beta = float(torch.tensor(1.2))  # theirs is a float32
    model = SubspaceEmbedding(nn.Identity(), 32, 24, config["learners"], drop=0.0, beta=beta, compat="authors").double()
    state = {ours(k): v for k, v in f.under(f"{case}/sd").items()}
    model.load_state_dict({**state, "owner": model.owner})
    x = f.tensors[f"{case}/x"].repeat_interleave(7, 2).repeat_interleave(7, 3)
    return model, x, f.tensors[f"{case}/T"], config["learner"]


@pytest.mark.parametrize("case", CASES)
def test_forward_loss_and_gradients_are_the_authors(case):
    f, (model, x, target, learner) = THEIRS, loaded(case)
    found = model(x, learner)
    torch.testing.assert_close(found.vectors, f.tensors[f"{case}/y"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.features, f.tensors[f"{case}/pen"], rtol=1e-9, atol=1e-9)
    loss = model.loss(found, target)["margin"]
    torch.testing.assert_close(loss, f.tensors[f"{case}/loss"], rtol=1e-9, atol=1e-9)
    loss.backward()
    theirs = {ours(k): v for k, v in f.under(f"{case}/dw").items()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_scores_and_split_are_the_authors(case):
    f, (model, x, target, learner) = THEIRS, loaded(case)
    model.loss(model(x, learner), target)["margin"].backward()
    scores, want = model.taylor_scores(), f.tensors[f"{case}/scores"]
    torch.testing.assert_close(scores.double(), want.nan_to_num(), rtol=1e-4, atol=1e-6)
    keep = f.tensors[f"{case}/keep"]
    before = model.embedding.weight.detach().clone()
    cut = model.split(least=1, most=0)
    assert cut == bool(len(keep))
    if cut:
        first, rest = f.tensors[f"{case}/first"], f.tensors[f"{case}/rest"]
        assert torch.equal(model.neurons()[-2], first) and torch.equal(model.neurons()[-1], rest)
        torch.testing.assert_close(model.embedding.weight[first], f.tensors[f"{case}/kept_weight"])
        right = loaded(case)[0]
        right.compat = None
        right.score, right.seen = scores, 1
        right.split(least=1, most=0)
        torch.testing.assert_close(right.embedding.weight[first], before[keep])


def test_equal_classes_need_no_compat():
    """Theirs joins anchors with positives of others only where classes are unequal."""
    g = torch.Generator().manual_seed(0)
    v = F.normalize(torch.randn(8, 6, dtype=torch.float64, generator=g), dim=1)
    even, uneven = torch.arange(8) // 2, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    assert torch.equal(margin_loss(v, even), margin_loss(v, even, compat="authors"))
    total, active = 0.0, 0
    for a in range(8):
        mine = [p for p in range(8) if p != a and uneven[p] == uneven[a]]
        d = (v - v[a]).norm(dim=1)
        others = sorted((n for n in range(8) if uneven[n] != uneven[a]), key=lambda n: (bool(d[n] < 0.5), float(d[n])))
        for turn, p in enumerate(mine):
            pull, push = (d[p] - 1.0).clamp(min=0), (1.4 - d[others[turn % len(others)]]).clamp(min=0)
            total, active = total + pull + push, active + int(pull > 0 or push > 0)
    torch.testing.assert_close(margin_loss(v, uneven), total / active, rtol=1e-6, atol=1e-7)


def test_slices_partition_all_neurons_whatever_happens():
    torch.manual_seed(0)
    model = SubspaceEmbedding(nn.Identity(), 32, 24, 1)
    optimizer = torch.optim.Adam(model.parameters())
    sizes = [24]
    for turn in range(4):
        x, target = torch.randn(12, 32, 3, 3), torch.arange(12) // 3
        model.loss(model(x, model.num_learners - 1), target)["margin"].backward()
        optimizer.step()
        cut = model.split(optimizer, threshold=0.2, least=1, most=2)
        parts = model.neurons()
        assert torch.cat(parts).tolist() == list(range(24))
        now = [len(p) for p in parts]
        assert now == (sizes if not cut else [*sizes[:-1], now[-2], now[-1]]) and sum(now) == 24
        sizes = now
        for part in parts:
            torch.testing.assert_close(model(x).vectors[:, part].norm(dim=1), torch.ones(12))
        if cut:
            moment = optimizer.state[model.embedding.weight]["exp_avg"]
            rows = torch.cat(parts[-2:])
            assert not moment[rows].any() and (turn == 0 or moment[parts[0]].any())
    assert len(sizes) > 2
    again = SubspaceEmbedding(nn.Identity(), 32, 24, 1)
    again.load_state_dict(model.state_dict())
    assert again.num_learners == model.num_learners
    assert torch.equal(again.eval()(x).vectors, model.eval()(x).vectors)
    assert torch.equal(copy.deepcopy(model)(x).vectors, model(x).vectors)


def test_a_learners_batch_leaves_the_others_rows_alone():
    model = SubspaceEmbedding(nn.Identity(), 32, 24, 3).double()
    x, target = torch.randn(8, 32, 3, 3).double(), torch.arange(8) // 2
    model.loss(model(x, 1), target)["margin"].backward()
    grad = model.embedding.weight.grad
    assert grad[8:16].any() and not grad[:8].any() and not grad[16:].any()
    model.forget_scores()
    model.score, model.seen = torch.zeros(24), 1
    model.score[16:20] = 1.0
    scores = model.taylor_scores()
    assert (scores[16:20] == 1).all() and not scores[20:].any() and not scores[:16].any()
    model.score = torch.full((24,), 2.0)
    assert not model.taylor_scores().any() and not model.split()  # nothing stands out: no NaN


@pytest.mark.parametrize(
    ("beta", "value", "by_beta", "norm", "projection"),
    [
        ([float(torch.tensor(1.2))], 0.46909925364599503, [0.025], 0.4073434907364559, 0.03181148897713143),
        ([1.2, 0.9, 1.4], 0.7880833424816136, [0.05, -0.1375, 0.4875], 0.27297987986070194, 0.145617102094467),
    ],
    ids=["one border", "a border per class"],
)
def test_borders_that_are_trained(beta, value, by_beta, norm, projection):
    """Numbers of their MarginLoss with ``nu=0.3``, without and with ``class_specific_beta``, in float64."""
    x = drawn("margin", (9, 5)).requires_grad_()
    border = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    target = torch.arange(9) // 3
    loss = margin_loss(x / x.norm(dim=1, keepdim=True), target, beta=border, compat="authors", nu=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(border.grad, torch.tensor(by_beta, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert x.grad.norm().item() == pytest.approx(norm, rel=1e-9)
    wave = torch.cos(torch.arange(45, dtype=torch.float64) * 0.9).view_as(x)
    assert (x.grad * wave).sum().item() == pytest.approx(projection, rel=1e-8)
    with pytest.raises(ValueError, match="class"):
        margin_loss(x, target, beta=torch.ones(2))
    with pytest.raises(ValueError, match="beta must be"):
        margin_loss(x, target, beta=torch.ones(2, 2))


def test_without_a_split_it_is_one_margin_loss():
    model = SubspaceEmbedding(nn.Identity(), 32, 24, 1, attention=False, drop=0.0).double()
    x, target = torch.randn(8, 32, 3, 3).double(), torch.arange(8) // 2
    plain = F.normalize(model.embedding(x.mean((2, 3))), dim=1)
    torch.testing.assert_close(model.loss(model(x, 0), target)["margin"], margin_loss(plain, target))
    torch.testing.assert_close(model.loss(model(x), target)["margin"], margin_loss(plain, target))


def test_parameters_and_initial_values():
    assert sum(p.numel() for p in AttentionMap(1024).parameters()) == 1_216_961
    torch.manual_seed(0)
    weight = SubspaceEmbedding(nn.Identity(), 1024, 128, 4).embedding.weight
    for rows in weight.chunk(4):  # every learner's rows as those of a map of their own
        assert float(rows.detach().std()) == pytest.approx((2 / (1024 + 32)) ** 0.5, rel=0.03)


def test_clusters_keep_their_names():
    pytest.importorskip("sklearn")
    g = torch.Generator().manual_seed(0)
    at = F.normalize(torch.randn(3, 6, generator=g), dim=1)
    x = F.normalize(at.repeat_interleave(10, 0) + 0.05 * torch.randn(30, 6, generator=g), dim=1)
    first = clusters(x, 3)
    assert all(len(first[i : i + 10].unique()) == 1 for i in (0, 10, 20))
    assert torch.equal(clusters(x, 3, previous=first, seed=7), first)
    target = torch.zeros(30, dtype=torch.long)
    target[4] = 1  # alone with its class
    assert int((clusters(x, 3, target) == -1).sum()) == 1 and not clusters(x, 1).any()
    turned = torch.tensor([1, 2, 0])[first]  # a cycle: their reading of the assignment is another one
    assert torch.equal(renamed(turned, first, 3), first) and not torch.equal(
        renamed(turned, first, 3, "authors"), first
    )


def test_schedule():
    s = Schedule(patience=3, recluster=2, finetune=20)
    values = [0.1, 0.3, 0.3, 0.2, 0.2, 0.2, 0.2, 0.4]
    found = [s.cuts(e, v) for e, v in enumerate(values)]
    assert found == [False, False, False, False, True, True, True, False]
    twin = Schedule(3, 2, 20)
    twin.load_state_dict(s.state_dict())
    assert twin.cuts(10, 0.0)
    twin.was_cut()
    assert not twin.cuts(11, 0.0) and not twin.cuts(20, 0.0)
    assert s.clusters_anew(0, 1) and s.clusters_anew(4, 2) and not s.clusters_anew(5, 2) and not s.clusters_anew(4, 1)
    assert s.whole(20) and not s.whole(19)


def test_masks_and_sizes():
    model = SubspaceEmbedding(nn.Conv2d(3, 32, 3, stride=2, padding=1), 32, 24)
    for size in ((33, 27), (8, 8)):
        mask = model.masks(torch.randn(2, 3, *size))
        assert mask.shape == (2, 1, *size) and mask.dtype == torch.bool
    assert model(torch.randn(0, 3, 8, 8)).vectors.shape == (0, 24)
    made = torch.export.export(model.eval(), (torch.randn(2, 3, 8, 8),), strict=False)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(made.module()(x).vectors, model(x).vectors)


def test_it_trains_by_turns():
    torch.manual_seed(0)
    model = SubspaceEmbedding(nn.Identity(), 32, 24, 2)
    kinds = torch.randn(4, 32, 3, 3)
    optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 3e-3))
    seen = []
    for step in range(30):
        target = torch.arange(12) // 3
        batch = {"images": kinds[target] + 0.5 * torch.randn(12, 32, 3, 3), "learner": step % 2, "target": target}
        seen.append(train_batch(model, batch, optimizers)["all"]["margin"])
    assert seen[-1] < seen[0] / 2


def test_bad_input():
    model = SubspaceEmbedding(nn.Identity(), 32, 24, 2)
    x = torch.randn(4, 32, 3, 3)
    with pytest.raises(ValueError, match="learner must be .* at most 1, got 2"):
        model(x, 2)
    with pytest.raises(ValueError, match="C=32"):
        model(x[:, :31])
    with pytest.raises(ValueError, match="leaves no pair"):
        model.loss(model(x), torch.arange(4))
    with pytest.raises(ValueError, match="leaves no pair"):
        model.loss(model(x), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"target must be \(4,\)"):
        model.loss(model(x), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit into embed_dim=10"):
        SubspaceEmbedding(nn.Identity(), 32, 10, 7)
    with pytest.raises(ValueError, match="compat"):
        SubspaceEmbedding(nn.Identity(), 32, compat="theirs")
    with pytest.raises(ValueError, match="same 3 samples"):
        renamed(torch.tensor([0, 1, 0]), torch.tensor([0, 1]), 2)
