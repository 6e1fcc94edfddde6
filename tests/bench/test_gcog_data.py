"""Trials of gCOG: an interpreter of the encoded rows agrees, sides of splits do not meet, worlds that are too small."""

import math
from collections import Counter

import pytest
import torch

from attnlib.bench.data.gcog import (
    HALVES,
    PARITIES,
    PARTS,
    QUESTIONS,
    SPLITS,
    Node,
    World,
    answer,
    encode,
    halves,
    nodes,
    trials,
    widths,
)


def interpreted(rule, grid, side, shapes):
    """An answer from rows of numbers alone: no tree, no objects, nothing of the module."""
    rows = [[int(v) for v in row] for row in rule if row[0] > 0]
    seen = [(i // side, i % side, int(s), int(c)) for i, (c, s, _) in enumerate(grid) if s > 0]
    # children of a level-ordered tree: a question that is not last is followed by its switch, a switch by two questions
    level, index, tree = [0], 1, {}
    while index < len(rows):
        switches = list(range(index, index + len(level)))
        below = list(range(index + len(level), index + 3 * len(level)))
        for i, question in enumerate(level):
            assert rows[switches[i]][0] == 9
            tree[question] = below[2 * i : 2 * i + 2]
        level, index = below, below[-1] + 1
    at = 0
    while True:
        number, *about = rows[at]
        pairs = [about[0:2]] + ([about[3:5]] if about[3] else [])
        name = ("", "exist", "go", "color", "shape", "sum0", "product0", "product1", "sum1")[number]
        found = []
        for s, c in pairs:
            hits = [o for o in seen if (name == "shape" or o[2] == s) and (name == "color" or o[3] == c)]
            assert name == "exist" or len(hits) == 1
            found += hits
        if name == "exist":
            said = bool(found)
        elif name[-1] in "01":
            values = [v for o in found for v in o[:2]]
            total = sum(values) if name.startswith("sum") else math.prod(values)
            said = total % 2 == int(name[-1])
        if at in tree:
            at = tree[at][0 if said else 1]
            continue
        if name == "go":
            return 2 + found[0][0] * side + found[0][1]
        if name == "shape":
            return 2 + side**2 + found[0][2] - 1
        if name == "color":
            return 2 + side**2 + shapes + found[0][3] - 1
        return 0 if said else 1


def test_an_independent_interpreter_agrees_on_ten_thousand_trials():
    world = World(side=10, shapes=12, colors=10)
    for split in SPLITS:
        for part in PARTS:
            made = trials(split, part, 1250, seed=3, world=world)
            batch = encode(made, world)
            for trial, rule, grid in zip(made, batch.rule.tolist(), batch.grid.tolist(), strict=True):
                assert interpreted(rule, grid, world.side, world.shapes) == trial.answer
            assert batch.answer.tolist() == [t.answer for t in made]


def held(split, trial):
    """What a split holds out."""
    if split == "distractor":
        return {len(trial.objects) >= 10}
    if split == "systematic":
        return {(trial.tree.question, trial.tree.about[0])}
    if split == "systematic trees":
        return {(trial.tree.question, leaf.question) for leaf in trial.tree.then}
    return {trial.depth}


@pytest.mark.parametrize("split", SPLITS)
def test_sides_of_a_split_do_not_meet(split):
    deep = split in ("productive", "systematic trees")
    train, test = (
        set().union(*(held(split, t) for t in trials(split, part, 800 if deep else 3000, seed=1))) for part in PARTS
    )
    assert not train & test
    if split == "systematic":  # every question, every shape and every colour is on both sides, exchanged
        for side in (train, test):
            assert {q for q, _ in side} == set(QUESTIONS)
            assert {k[0] for _, k in side} == {k[1] for _, k in side} == set(range(10))
        assert len(train | test) > 0.9 * len(QUESTIONS) * 100
    if split == "systematic trees":
        assert len(train) == 3 * 4 + 2 * 4 == len(test)


def test_released_halves_overlap_and_ours_do_not():
    first, second = (set(half) for half in halves(World()))
    assert not first & second and len(first) == len(second) == 50
    first, second = (set(half) for half in halves(World(), "released"))
    assert len(first & second) == 25 and HALVES == ("disjoint", "released")
    assert trials("systematic", "train", 1, how="released")


def test_one_hot_rows_say_the_same():
    world = World(5, 4, 4, 4)
    made = trials("systematic trees", "train", 20, world=world)
    plain, wide = encode(made, world), encode(made, world, one_hot=True)
    assert {"rule_dim": wide.rule.shape[-1], "grid_dim": wide.grid.shape[-1]} == widths(world)
    assert wide.rule.sum(-1).eq(8).all() and wide.grid.sum(-1).eq(3).all()
    assert torch.equal(wide.grid[..., :5].argmax(-1).float(), plain.grid[..., 0])
    assert torch.equal(wide.rule[..., :10].argmax(-1).float(), plain.rule[..., 0])
    assert World().classes == 138 and not len(encode([], world).rule)


def test_the_same_seed_gives_the_same_bytes():
    one, two = (encode(trials("productive", "train", 50, seed=5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = encode(trials("productive", "train", 50, seed=6))
    assert not torch.equal(one.grid, other.grid)


def test_yes_is_as_frequent_as_no():
    made = trials("distractor", "train", 8000, seed=0)
    for question in ("exist", *PARITIES):
        told = [t.answer for t in made if t.tree.question == question]
        assert set(told) == {0, 1}
    told = [t.answer for t in made if t.answer < 2]
    assert abs(sum(told) / len(told) - 0.5) < 0.03


def test_what_is_placed():
    for trial in trials("productive", "test", 200, seed=2, distractors=(3, 3)):
        kinds = Counter(trial.objects.values())
        for node in nodes(trial.tree):
            for kind in node.about:
                assert kinds[kind] == 1 or (node.question == "exist" and not kinds[kind])
                if node.question == "getcolor":  # alone in its shape
                    assert [k for k in trial.objects.values() if k[0] == kind[0]] == [kind]
    assert {t.depth for t in trials("productive", "test", 20, depth=7)} == {7}
    assert len({len(t.objects) for t in trials("distractor", "train", 200)}) == 7  # 0 to 5, and exist that is false


def test_ambiguous_trials_are_refused_by_the_interpreter():
    tree = Node("getcolor", ((1, 2),))
    assert answer(tree, {(0, 0): (1, 2)}, World()) == 2 + 100 + 26 + 2
    with pytest.raises(ValueError, match="2 objects to answer with"):
        answer(tree, {(0, 0): (1, 2), (0, 1): (1, 3)}, World())


def test_only_the_branch_taken_counts():
    yes, no = Node("go", ((0, 0),)), Node("go", ((1, 1),))
    tree = Node("exist", ((2, 2),), (yes, no))
    objects = {(0, 3): (0, 0), (4, 0): (1, 1)}
    assert answer(tree, objects, World()) == 2 + 40
    assert answer(tree, {**objects, (9, 9): (2, 2)}, World()) == 2 + 3


def test_bad_input():
    with pytest.raises(ValueError, match="depth=4 must be odd.*3 and 5"):
        trials("productive", "test", 1, depth=4)
    with pytest.raises(ValueError, match="depth=5 is not on the train side"):
        trials("productive", "train", 1, depth=5)
    with pytest.raises(ValueError, match="more objects than the 25 cells"):
        trials("distractor", "test", 1, world=World(5, 4, 4, 4), distractors=25)
    with pytest.raises(ValueError, match="has too few"):
        trials("productive", "test", 1, world=World(2, 4, 4, 4), distractors=0)
    with pytest.raises(ValueError, match="distractors=\\(10, 10\\)"):
        trials("distractor", "train", 1, distractors=10)
    with pytest.raises(ValueError, match="features=8"):
        World(5, 4, 4, 8)
    with pytest.raises(ValueError, match="split='systematik'"):
        trials("systematik", "train", 1)
    with pytest.raises(ValueError, match="can be given for the split 'productive' only"):
        trials("distractor", "train", 1, depth=3)
