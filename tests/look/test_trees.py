"""Trees of tokens: held to the arborescences of networkx."""

import networkx
import pytest
import torch

from attnlib.look import dependency_tree


def mask_of(count, seed):
    a = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return a / a.sum(0)


@pytest.mark.parametrize("score", ["log", "sum"])
@pytest.mark.parametrize("roots", ["any", "one"])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_it_is_the_best_arborescence(score, roots, count):
    for seed in range(6):
        mask = mask_of(count, seed)
        scores = mask.log() if score == "log" else mask
        graph = networkx.DiGraph()
        graph.add_weighted_edges_from((j, i, float(scores[j, i])) for i in range(count) for j in range(count) if i != j)
        off = -1e3 if roots == "one" else 0.0
        graph.add_weighted_edges_from((count, i, float(scores[i, i]) + off) for i in range(count))
        best = networkx.maximum_spanning_arborescence(graph)
        tree = dependency_tree(mask, roots=roots, score=score)
        parents = tree.parents.tolist()
        found = sum(float(scores[i if p < 0 else p, i]) for i, p in enumerate(parents))
        assert found == pytest.approx(
            sum(d["weight"] for *_, d in best.edges(data=True)) - off * best.out_degree(count)
        )
        ours = networkx.DiGraph([(count if p < 0 else p, i) for i, p in enumerate(parents)])
        assert networkx.is_arborescence(ours) and len(tree.roots) == ours.out_degree(count)
        assert roots == "any" or len(tree.roots) == 1
        torch.testing.assert_close(tree.weights, mask[[i if p < 0 else p for i, p in enumerate(parents)], range(count)])


def test_two_families_are_two_trees():
    mask = torch.full((6, 6), 0.01)
    mask[0, [0, 1, 2]], mask[3, [3, 4, 5]] = 0.9, 0.8
    tree = dependency_tree(mask)
    assert tree.roots.tolist() == [0, 3] and tree.leaves.tolist() == [1, 2, 4, 5]
    assert tree.groups().tolist() == [0, 0, 0, 1, 1, 1]
    one = dependency_tree(mask, roots="one")
    assert len(one.roots) == 1 and one.groups().tolist() == [0] * 6
    assert one.groups(2, least=2).tolist() == [0, 0, 0, 1, 1, 1]
    assert one.groups(2, least=4).tolist() == [0] * 6  # no edge leaves four on both sides
    greedy = dependency_tree(mask, "greedy")
    assert greedy.parents.tolist() == tree.parents.tolist()


def test_a_greedy_tree_may_run_in_a_circle():
    mask = torch.tensor([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    tree = dependency_tree(mask, "greedy")
    assert tree.parents.tolist() == [1, 0, -1] and tree.groups().tolist() == [0, 0, 1]
    mask[:2, :2] += 0.05  # they stand more for themselves than for the third
    assert len(dependency_tree(mask).roots) == 2


def test_absent_tokens_have_no_place():
    valid = torch.tensor([True, False, True, True])
    tree = dependency_tree(mask_of(4, 0), roots="one", valid=valid)
    assert tree.parents[1] == -1 and len(tree.roots) == 1 and 1 not in [*tree.roots, *tree.leaves]
    assert tree.groups()[1] == -1
    assert dependency_tree(mask_of(2, 0), valid=torch.zeros(2, dtype=torch.bool)).groups().tolist() == [-1, -1]


def test_bad_masks():
    for given, words in (
        (dict(mask=torch.ones(2, 3)), "mask"), (dict(mask=-torch.ones(2, 2)), "mask"), (dict(method="prim"), "method"),
        (dict(mask=torch.full((2, 2), float("nan"))), "mask"), (dict(roots="two"), "roots"),
        (dict(method="greedy", roots="one"), "greedy"), (dict(score="exp"), "score"),
        (dict(valid=torch.ones(3).bool()), "valid"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            dependency_tree(**{"mask": mask_of(2, 0), **given})
    with pytest.raises(ValueError, match="count"):
        dependency_tree(mask_of(2, 0)).groups(0)
