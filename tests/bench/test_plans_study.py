"""The study of searched plans, as small as it goes."""

import random

import pytest
import torch

from attnlib.bench.studies import plans


def test_plans_decide_what_layers_compute_and_what_it_costs():
    torch.manual_seed(0)
    model = plans.network().eval()
    x = torch.randn(2, 1, plans.SIDE, plans.SIDE)
    small = {n: v[-1 if n.startswith("kind") else 0] for n, v in plans.SPACE.choices.items()}
    large = {n: v[0 if n.startswith("kind") else -1] for n, v in plans.SPACE.choices.items()}
    told = []
    for gene in (small, large, {**large, "kind3": small["kind3"]}, {**large, "width0": 24}):
        plans.take(model, gene)
        told.append(model(x))
    for i, one in enumerate(told):
        assert all(not torch.allclose(one, other) for other in told[:i])
    assert plans.operations(small) < plans.middle() < plans.operations(large)


@pytest.mark.parametrize("width", plans.WIDTHS)
def test_a_narrow_mlp_is_the_first_channels_of_a_wide_one(width):
    torch.manual_seed(0)
    mlp, x = plans.SharedMlp(8, plans.WIDTHS), torch.randn(3, 8)
    mlp.active = width
    hidden = torch.nn.functional.gelu(mlp.fc1(x))[:, :width]
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight[:, :width].T + mlp.fc2.bias)


def test_a_ranker_finds_good_plans_of_a_made_score_with_as_many_evaluations():
    def score(gene):
        return sum((gene[f"kind{i}"] == plans.KINDS[0]) * (i - 1.5) + gene[f"width{i}"] / 100 for i in range(4))

    found = plans.by_ranker(score, 40, plans.middle(), 10, 0)
    rng = random.Random(1)
    drawn = [g for g in (plans.SPACE.sample(rng) for _ in range(80)) if plans.operations(g) <= plans.middle()]
    assert len(found.seen) <= 40 and found.score == min(s for _, s in found.seen)
    assert found.score <= min(score(g) for g in drawn[:40])


def test_heads_are_of_one_kind_each_and_as_many_as_asked_for():
    torch.manual_seed(0)
    model = plans.heads_network()
    for m in plans._mixers(model):
        torch.nn.init.uniform_(m.alpha)
    total = plans.HEADS * plans.DEPTH
    kept = {}
    for name in plans.HEAD_PLANS:
        made = torch.cat([m.alpha for m in plans._mixers(plans.decide(model, name, 3))])
        assert set(made.tolist()) <= {0.0, 1.0} and not made.requires_grad
        kept[name] = made
    assert kept["all ReLU-softmax"].sum() == total and kept["all scaling"].sum() == 0
    assert torch.equal(kept[plans.CHOSEN] + kept["smallest alphas"], torch.ones(total))
    assert kept[plans.RANDOM].sum() == total // 2 and not torch.equal(kept[plans.RANDOM], kept[plans.CHOSEN])


def test_the_study_runs(tmp_path):
    found = plans.measure(
        pictures=tmp_path, shared_steps=1, steps=1, batch=2, seeds=(0, 1), rounds=1, validated=4, tested=8, unseen=4
    )
    kinds, heads = found["kinds of attention"], found["heads without exponentials"]
    assert [r["name"] for r in kinds["rows"]] == list(plans.SEARCHES) and (tmp_path / "plans-cpu.svg").exists()
    assert [r["name"] for r in heads["rows"]] == list(plans.HEAD_PLANS) and heads["rows"][1]["against"]["n"] == 2
    counts = {r["name"]: r["evaluations"]["mean"] for r in kinds["rows"]}
    assert counts[plans.DRAWN] == counts[plans.EVOLVED] >= counts[plans.RANKED] > counts[plans.ONE] == 1
