"""Connecting walls: scores against the authors' scorer, clusters of one size, walls with and without red herrings."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from attnlib.bench.data.files import DataError
from attnlib.bench.evaluate import Unreadable, evaluate
from attnlib.bench.exams import walls as ocw
from attnlib.bench.exams.walls import SCORES, Wall, score_groups

FIXTURE = Path(__file__).parents[1] / "fixtures" / "ocw.safetensors"


@pytest.fixture(scope="module")
def made():
    return ocw.own_walls(24, seed=0)


def recorded():
    with safe_open(FIXTURE, "np") as f:
        return json.loads(f.metadata()["vocabulary"]), f.get_tensor("order"), f.get_tensor("scores")


def test_scores_are_those_of_the_authors():
    words, orders, scores = recorded()
    wall = Wall("w", tuple(tuple(words[4 * g : 4 * g + 4]) for g in range(4)), tuple("abcd"))
    for order, wanted in zip(orders, scores, strict=True):
        predicted = [[words[i].upper() for i in order[4 * g : 4 * g + 4]] for g in range(4)]
        found = score_groups(predicted, wall)
        np.testing.assert_allclose([found[name] for name in SCORES], wanted, atol=1e-12)
    assert len(np.unique(scores[:, 5])) > 5 and {0, 1, 2, 4} <= set(scores[:, 0])  # all sorts are there


def test_perfect_in_any_order(made):
    for wd, order in itertools.product(("paper", "matched"), itertools.permutations(range(4))):
        found = score_groups([made[0].groups[i][::-1] for i in order], made[0], wd)
        assert [found[name] for name in SCORES] == [4, 1, 1, 1, 1, 0]


def test_a_swap_costs_two_groups(made):
    groups = [list(g) for g in made[0].groups]
    groups[0][0], groups[1][0] = groups[1][0], groups[0][0]
    orders = list(itertools.permutations(groups))
    paper = [score_groups(o, made[0]) for o in orders]
    matched = {score_groups(o, made[0], "matched")["WD"] for o in orders}
    assert all(f["correct groups"] == 2 and f["full wall"] == 0 and 0 < f["WD"] <= 1 for f in paper)
    assert len({f["WD"] for f in paper}) > 1 and len(matched) == 1  # only pairing makes the order of groups nothing
    assert matched == {min(f["WD"] for f in paper)} == {2 * 0.25 / 4}


def test_random_groups_score_as_chance(made):
    rng, n = np.random.default_rng(0), 4000
    right, ami = 0, []
    for i in range(n):
        mixed = [made[0].clues[j] for j in rng.permutation(16)]
        groups = [mixed[4 * g : 4 * g + 4] for g in range(4)]
        right += sum(sorted(g) in [sorted(t) for t in made[0].groups] for g in groups)
        if i < 100:
            ami.append(score_groups(groups, made[0])["AMI"])
    expected = 4 * 4 / 1820
    assert abs(right / n - expected) < 4 * np.sqrt(expected / n)
    assert abs(np.mean(ami)) < 0.05


@pytest.mark.parametrize("change", ["short", "none", "invented", "long", "many", "twice"])
def test_odd_predictions_do_not_crash(made, change):
    right = [list(g) for g in made[0].groups]
    predicted = {
        "short": [*right[:3], right[3][:2]], "none": [], "invented": [*right[:3], ["a", "b", "c", right[3][0]]],
        "long": [*right[:3], [*right[3], "more"]], "many": [["x"], *right], "twice": [right[0], *right[:3]],
    }[change]  # fmt: skip
    for wd in ("paper", "matched"):
        found = score_groups(predicted, made[0], wd)
        assert found["correct groups"] == {"none": 0, "many": 4}.get(change, 3)
        assert 0 <= found["WD"] <= 1 and all(np.isfinite(list(found.values())))
    if change in ("short", "invented"):
        assert found["AMI"] < 1 and found["WD"] > 0


def test_clusters_of_one_size():
    rng = np.random.default_rng(0)
    for seed in range(5):
        label = ocw.balanced_clusters(rng.normal(size=(16, 7)), 4, seed)
        assert sorted(Counter(label.tolist()).values()) == [4] * 4
    centres = np.repeat(10 * np.eye(4), 4, axis=0)
    order = rng.permutation(16)
    label = ocw.balanced_clusters((centres + 0.1 * rng.normal(size=(16, 4)))[order], 4)
    assert all(len(set(label[order // 4 == g])) == 1 for g in range(4))
    assert sorted(Counter(ocw.balanced_clusters(np.zeros((8, 2)), 2).tolist()).values()) == [4, 4]
    # against every partition: the least sum of squares of eight points in two
    points = rng.normal(size=(8, 3))

    def squares(part):
        return sum(((points[list(p)] - points[list(p)].mean(0)) ** 2).sum() for p in part)

    least = min(squares((c, set(range(8)) - set(c))) for c in itertools.combinations(range(8), 4))
    label = ocw.balanced_clusters(points, 2, restarts=20)
    assert squares([np.flatnonzero(label == c) for c in range(2)]) == pytest.approx(least)
    for bad, word in ((np.zeros((7, 2)), "multiple"), (np.full((4, 2), np.nan), "finite")):
        with pytest.raises(ValueError, match=word):
            ocw.balanced_clusters(bad, 2)


def test_own_walls_have_herrings_and_one_solution(made):
    assert made == ocw.own_walls(24, seed=0) != ocw.own_walls(24, seed=1)
    for wall in made:
        assert ocw.herrings(wall) >= 4 and ocw.solutions(wall) == 1
        assert all(set(g) <= set(ocw.CONNECTIONS[c]) for g, c in zip(wall.groups, wall.connections, strict=True))
    two = Wall("w", tuple(tuple(f"{g}{i}" for i in range(4)) for g in "abcd"), tuple("abcd"))
    both = {c: (*g, *two.groups[0], *two.groups[1]) for c, g in zip(two.connections, two.groups, strict=True)}
    assert ocw.solutions(two, both) == 2  # counted up to two
    with pytest.raises(ValueError, match="only 0 of count=1"):
        ocw.own_walls(1, least=49)


def test_randomized_walls(made):
    mixed = ocw.randomized(made, seed=3)
    assert [w.groups[0] for w in mixed] == [w.groups[0] for w in made]
    assert all(len(set(w.sources)) == 4 and len({c.lower() for c in w.clues}) == 16 for w in mixed)
    used = Counter((s, g) for w in mixed for s, g in zip(w.sources, w.groups, strict=True))
    assert max(used.values()) == 1 and len(used) == 4 * len(made)
    assert np.mean([ocw.herrings(w) for w in mixed]) < 0.5 * np.mean([ocw.herrings(w) for w in made])
    with pytest.raises(ValueError, match="at least four"):
        ocw.randomized(made[:3])
    with pytest.raises(ValueError, match="ids of their own"):
        ocw.randomized([made[0]] * 4)

    def wall(w, first):
        groups = [[f"{w}{g}{i}" for i in range(4)] for g in range(4)]
        for g, clue in enumerate(first):
            groups[g if w else 0][0 if w else g] = clue
        return Wall(str(w), tuple(map(tuple, groups)), tuple("abcd"))

    # all of the second wall's other groups share a clue with the first group of the first
    four = [wall(0, "xyz"), wall(1, ("u", *"xyz")), wall(2, ""), wall(3, "")]
    with pytest.raises(ValueError, match="no arrangement"):
        ocw.randomized(four)


@pytest.mark.parametrize(
    "groups,word",
    [
        ([("a", "b", "c", "A"), tuple("efgh"), tuple("ijkl"), tuple("mnop")], r"differ, twice there: \['a'\]"),
        ([tuple("abc"), tuple("efgh"), tuple("ijkl"), tuple("mnop")], "four of four"),
        ([tuple("abcd")], "four of four"),
        ([("a", "b", "c", " "), tuple("efgh"), tuple("ijkl"), tuple("mnop")], "not be empty"),
    ],
)
def test_duplicate_or_missing_clues_are_refused(groups, word):
    with pytest.raises(ValueError, match=word):
        Wall("w", tuple(groups), tuple("1234"))


def test_walls_from_the_users_folder(made, tmp_path):
    with pytest.raises(DataError, match=r"lacks test\.json.*nothing is downloaded"):
        ocw.load_walls(tmp_path)
    rows = [
        {"wall_id": w.id, "groups": {f"group_{i + 1}": {"gt_words": list(g), "gt_connection": c}
                                     for i, (g, c) in enumerate(zip(w.groups, w.connections, strict=True))}}
        for w in made
    ]  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps({"season_to_walls_map": {}, "dataset": rows}))
    assert ocw.load_walls(tmp_path) == made
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(DataError, match="not in the form"):
        ocw.load_walls(tmp_path, "train")


def test_prompts_and_answers(made):
    items = ocw.wall_items(made[3:], made[:3])
    assert items == ocw.wall_items(made[3:], made[:3]) and items[0].prompt.count("Connection:") == 12
    assert all(clue in items[0].prompt for clue in made[3].clues)
    solved = {w.id: ocw._solved(w) for w in made[3:]} | {made[3].id: "I would rather not."}
    found = evaluate(items, solved, ocw.parse_groups, ocw.score_wall)
    assert found.unreadable == 1 and found.mean("full wall") == 1 and found.mean("WD") == 0
    with pytest.raises(ValueError, match="examples must not be asked"):
        ocw.wall_items(made, made[:1])


@pytest.mark.parametrize(
    "line",
    ["Group 1: a, b b, c, d", "**Group 1:** a, b b, c, d (things)", "1. a, b b, c, d - things",
     "- group 2: A, B B, C, D. Connection: x, y"],
)  # fmt: skip
def test_parser(line):
    groups = ocw.parse_groups("Sure!\n" + "\n".join([line] * 4))
    assert [[c.lower() for c in g] for g in groups] == [["a", "b b", "c", "d"]] * 4
    with pytest.raises(Unreadable, match="3 lines"):
        ocw.parse_groups("\n".join([line] * 3))


def test_connections_keep_their_order(made):
    right = list(made[0].connections)
    assert ocw.score_connections([f" {c.upper()} " for c in right], made[0]) == {"exact match": 1, "ROUGE-1": 1}
    assert ocw.score_connections([*right[1:], right[0]], made[0])["exact match"] == 0
    found = ocw.score_connections(
        right, made[0], bert=lambda a, b: [float(x == y) / 2 for x, y in zip(a, b, strict=True)]
    )
    assert found["BERTScore"] == 0.5
    # clipped counts: "the" once of two
    assert ocw.rouge1("the the cat", "the dog") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    with pytest.raises(ValueError, match="four connections"):
        ocw.score_connections(right[:3], made[0])
