"""Pairs of prompts, and multiple choice in tokens."""

import pytest
import torch

from attnlib.bench.data.circuits import (
    COLOURS,
    MUTATIONS,
    NAMES,
    OBJECTS,
    ChoiceWorld,
    coloured_objects,
    indirect_objects,
    one_token,
)


class Words:
    """A tokenizer of words; names of more than six letters are two tokens."""

    pad_token_id = 0

    def __init__(self):
        self.known = {}

    def __call__(self, text, add_special_tokens=True):
        words = text.replace("\n", " \n ").replace(",", " ,").split(" ")
        pieces = [p for w in words if w for p in ([w] if len(w) <= 8 else [w[:8], w[8:]])]
        return {"input_ids": [self.known.setdefault(p, len(self.known) + 1) for p in pieces]}


def test_the_subject_is_named_twice_and_the_answer_is_the_other_one():
    pairs = indirect_objects(60, seed=3)
    for clean, other, right, wrong, turned, roles in zip(
        pairs.clean, pairs.corrupted, pairs.correct, pairs.wrong, pairs.turned, pairs.places, strict=True
    ):
        count = [t.replace(",", "").split().count(w.strip()) for t in (clean, other) for w in (right, wrong)]
        assert count == [1, 2, 2, 1] and turned == wrong
        assert roles == {"io": right.strip(), "s": wrong.strip()}
    firsts = [
        c.index(r.strip()) < c.index(w.strip()) for c, r, w in zip(pairs.clean, pairs.correct, pairs.wrong, strict=True)
    ]
    assert 10 < sum(firsts) < 50  # who comes first says nothing


def test_three_new_names():
    pairs = indirect_objects(40, seed=3, corruption="names")
    for clean, other, right, wrong in zip(pairs.clean, pairs.corrupted, pairs.correct, pairs.wrong, strict=True):
        a, b = clean.replace(",", "").split(), other.replace(",", "").split()
        moved = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
        assert len(moved) == 3 and {x for x, _ in moved} == {right.strip(), wrong.strip()}
        assert len({y for _, y in moved}) == 3 and not {y for _, y in moved} & {right.strip(), wrong.strip()}
    assert pairs.turned == [None] * 40


def test_a_seed_draws_the_same_prompts():
    assert indirect_objects(5, seed=1) == indirect_objects(5, seed=1) != indirect_objects(5, seed=2)
    assert coloured_objects(5, seed=1) == coloured_objects(5, seed=1) != coloured_objects(5, seed=2)
    assert indirect_objects(9, seed=1).part(2, 4).clean == indirect_objects(9, seed=1).clean[2:4]


@pytest.mark.parametrize("items", [2, 3, 5])
def test_coloured_objects_ask_for_one_and_are_corrupted_by_another(items):
    pairs = coloured_objects(30, items=items, seed=1)
    for clean, other, right, wrong, turned, roles in zip(
        pairs.clean, pairs.corrupted, pairs.correct, pairs.wrong, pairs.turned, pairs.places, strict=True
    ):
        shot, question = clean.rsplit("Q:", 1)
        assert shot.startswith("Q: On the ") and shot.endswith("\n") and "\nA: " in shot
        assert f"{right.strip().lower()} {roles['object']}" in question and question.endswith("\nA:")
        assert f"{wrong.strip().lower()} {roles['other']}" in question and turned == wrong
        assert clean.replace(f"is the {roles['object']}?\nA:", "") != clean
        assert other.endswith(f"What color is the {roles['other']}?\nA:")
        assert clean[: clean.rindex(roles["object"])] == other[: other.rindex(roles["other"])]
        assert sum(c in question for c in COLOURS) >= items
        assert " an orange" not in question.replace(" an orange", "") and " a orange" not in question


def test_tokens_of_pairs():
    tokenizer = Words()
    clean, other, right, wrong = indirect_objects(6, seed=0).tokens(tokenizer)
    assert clean["input_ids"].shape == other["input_ids"].shape and len(right) == len(wrong) == 6
    assert torch.equal(clean["attention_mask"], other["attention_mask"])
    assert bool((clean["attention_mask"][:, -1] == 1).all())  # padding stands on the left
    assert set(one_token(tokenizer, ["Tom", "Bartholomew"])) == {"Tom"}
    names = [*NAMES[:4], "Bartholomew"]
    with pytest.raises(ValueError, match="unequal length|one token each"):
        indirect_objects(20, names=names, seed=0, corruption="names").tokens(tokenizer)


def test_mutations_move_nothing():
    world = ChoiceWorld()
    drawn = {m: world.draw(50, torch.Generator().manual_seed(4), m) for m in MUTATIONS}
    plain = drawn["none"]
    letters = range(8, 8 + world.letters)
    for name, q in drawn.items():
        assert torch.equal(q.correct, plain.correct) and torch.equal(q.labels, plain.labels)
        assert torch.equal(q.ids.gather(1, q.values), plain.ids.gather(1, plain.values))
        assert torch.equal(q.ids.gather(1, q.labels), q.choices)
        assert q.ids.shape == plain.ids.shape == (50, world.length) and int(q.ids.max()) < world.vocabulary
        asked = q.ids.gather(1, q.values.gather(1, q.correct[:, None]))[:, 0]
        assert torch.equal(asked, q.ids[:, world.ASKED]) and torch.equal(asked, q.truth)
        assert all(len(set(row)) == 4 for row in q.choices.tolist())
        if name in ("none", "no prelude", "separators"):
            assert q.choices.tolist() == [[8, 9, 10, 11]] * 50
        if name == "other letters":
            assert bool((q.choices.diff(dim=1) == 1).all()) and int(q.choices.min()) >= 12
        if name == "numbers":
            assert not set(q.choices.flatten().tolist()) & set(letters)
    assert bool((drawn["no prelude"].ids[:, :2] == 0).all())
    assert bool((drawn["separators"].ids != plain.ids).sum(1).eq(4).all())


def test_asking_for_another_choice_changes_one_token():
    q = ChoiceWorld().draw(20, torch.Generator().manual_seed(0))
    other = q.asking((q.correct + 1) % 4)
    assert bool(((q.ids != other.ids).sum(1) == 1).all())
    assert torch.equal(other.answers, q.choices.gather(1, ((q.correct + 1) % 4)[:, None])[:, 0])


def test_bad_input_is_refused():
    for make, says in (
        (lambda: indirect_objects(3, names=("A", "B", "C", "D")), "five different"),
        (lambda: indirect_objects(0), "count"),
        (lambda: indirect_objects(2, corruption="x"), "corruption"),
        (lambda: coloured_objects(2, items=9), "items"),
        (lambda: coloured_objects(2, objects=OBJECTS[:2]), "items"),
        (lambda: ChoiceWorld(letters=7), "letters"),
        (lambda: ChoiceWorld().draw(2, mutation="none at all"), "mutation"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
