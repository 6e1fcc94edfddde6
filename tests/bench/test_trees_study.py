"""The study of trees, small: two digits apart, groups told apart, leaves let go from the same weights."""

import torch

from attnlib.bench import suites
from attnlib.bench.data.worlds import two_digits
from attnlib.bench.studies import trees
from attnlib.nn.dense.dependency_vit import ReversedAttention


def test_two_digits_lie_apart():
    x, labels, ink = two_digits(6, 28, "test", torch.Generator().manual_seed(0))
    assert x.shape == (6, 1, 28, 28) and ink.shape == (6, 2, 28, 28)
    assert (labels[:, 0] != labels[:, 1]).all() and not (ink[:, 0] * ink[:, 1]).any()
    again = two_digits(6, 28, "test", torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip((x, labels, ink), again, strict=True))
    own = trees.owners(ink)
    assert own.shape == (6, 49) and all(((own == n).sum(1) >= 3).all() for n in (0, 1))
    covered = torch.nn.functional.avg_pool2d(ink, 4).flatten(2)
    assert torch.equal(own < 0, covered.amax(1) < trees.INK)


def test_groups_are_scored_against_the_truth():
    truth = torch.tensor([[0, 0, 0, 1, 1, 1, -1]])
    mask = torch.full((1, 7, 7), 0.01)
    mask[0, 0, :3], mask[0, 3, 3:6] = 0.9, 0.9
    for how, held in (("tree", mask), ("spectral", mask), ("places", truth[..., None].float())):
        assert trees.rand_index(how, held, truth) == 1
    assert trees.rand_index("tree", mask[:, :, [0, 3, 4, 1, 2, 5, 6]], truth) < 1


def test_other_tokens_go_from_the_same_weights():
    model, x = trees.build("dependency", 0).eval(), torch.randn(2, 1, 28, 28)
    found = {by: trees.lite(model, by, 0.3).dependencies(x) for by in trees.PRUNED}
    for d in found.values():
        assert (d.messages > 0).sum(-1).tolist() == [[49, 49], [34, 34], [19, 19]]
    assert torch.equal(found["received"].messages[0], found["reversed"].messages[0])
    received = found["received"].masks[0].sum(-1)
    kept = {by: d.messages[1] > 0 for by, d in found.items()}
    for b in range(2):
        assert received[b][kept["received"][b]].min() >= received[b][~kept["received"][b]].max()
        assert received[b][kept["reversed"][b]].max() <= received[b][~kept["reversed"][b]].min()
    assert all(type(m) is ReversedAttention for m in model.modules() if isinstance(m, ReversedAttention))


def test_it_runs_small(tmp_path):
    small = dict(steps=2, batch=2, seeds=(0, 1), chosen=2, tested=2, classified=4, drawn=4)
    result = trees.measure(pictures=tmp_path, keep=tmp_path / "kept.jsonl", **small)
    assert [row["name"] for row in result["groups"]["rows"]] == list(trees.WAYS)
    assert [row["name"] for row in result["pruned"]["rows"]] == ["nothing", *trees.PRUNED]
    assert (tmp_path / "trees-cpu.svg").exists() and "trees" in suites()
    assert all(-1 <= run["index"] <= 1 for run in result["groups"]["runs"])
