"""EMMA: one true option by the scenes themselves, nothing to know without the picture, a diagnosis by kind."""

from collections import Counter

import numpy as np
import pytest

from attnlib.bench.data.scenes import make_scene
from attnlib.bench.exams import agnosia as emma
from attnlib.bench.exams.agnosia import GRID, KINDS, PAINTED, Entity, Fact, SceneGraph, Vocabulary
from attnlib.bench.worlds import painter

COUNT = 1000


@pytest.fixture(scope="module")
def graphs():
    return emma.painted(COUNT)


@pytest.fixture(scope="module")
def asked(graphs):
    return emma.questions(graphs[:600], PAINTED, per_kind=None, seed=1)


@pytest.fixture(scope="module")
def denied(graphs):
    return emma.questions(graphs[:300], PAINTED, per_kind=None, form="yes-no", seed=1)


@pytest.fixture(scope="module")
def cells():
    scenes = [make_scene(i, "test") for i in range(150)]
    return scenes, [emma.from_scene(s, f"cells-{i}") for i, s in enumerate(scenes)]


def by_kind(asked):
    return {k: [q for q in asked if q.groups["kind"] == k] for k in KINDS}


def painted_truth(drawn, i, fact):
    """The same facts from the painter's own tables."""
    n = int(drawn.count[i])
    names = [painter.SHAPES[s] for s in drawn.shape[i, :n].tolist()]
    xs, ys, rs = (v[i, :n].tolist() for v in (drawn.x, drawn.y, drawn.radius))

    def third(v):
        v = v / painter.SIDE
        return 0 if v < 0.3 else 1 if 0.4 < v < 0.6 else 2 if v > 0.7 else None

    def place(j):
        return [w for w, c in painter.PLACES.items() if c == (third(xs[j]), third(ys[j]))]

    if fact.kind == "existence":
        return fact.value in names
    if fact.kind == "count":
        return names.count(fact.subject) == int(fact.value)
    if fact.kind == "identification":
        return [names[j] for j in range(n) if fact.slot in place(j)] == [fact.value]
    assert names.count(fact.subject) == 1
    j = names.index(fact.subject)
    if fact.kind == "location":
        return fact.value in place(j)
    if fact.kind == "attribute":
        table, words = {"colour": (drawn.colour, list(painter.COLOURS)), "size": (drawn.size, painter.SIZES),
                        "texture": (drawn.texture, painter.TEXTURES)}[fact.slot]  # fmt: skip
        return words[int(table[i, j])] == fact.value
    k = names.index(fact.slot)
    assert names.count(fact.slot) == 1 and rs[j] > 0
    return {"left of": xs[j] < xs[k], "right of": xs[j] > xs[k], "above": ys[j] < ys[k], "below": ys[j] > ys[k]}[
        fact.value
    ] and (abs(xs[j] - xs[k]) > abs(ys[j] - ys[k])) == (fact.value in ("left of", "right of"))


def test_exactly_one_option_is_true(asked, denied):
    drawn = painter.sample(COUNT, "test", pairings="any")
    for q in [*asked[::2], *denied[::25]]:
        true = [painted_truth(drawn, int(q.groups["image"].split("-")[1]), f) for f in q.facts]
        if q.groups["form"] == "choice":
            assert sum(true) == 1 and q.options[true.index(True)] == q.answer, q
            assert q.facts[true.index(True)].value == q.answer and len(set(q.options)) == len(q.options)
        else:
            assert true == [q.answer == "yes"], q
    assert set(by_kind(asked)) == set(KINDS) and all(len(v) >= 40 for v in by_kind(asked).values())


def test_scenes_of_cells_too(cells):
    scenes, graphs = cells
    asked = emma.questions(graphs, GRID, per_kind=40, seed=0)
    assert [len(v) for v in by_kind(asked).values()] == [40] * 6
    for q in asked:
        scene = scenes[int(q.groups["image"].split("-")[1])]
        names = [t.name.split() for t in scene.things]
        if q.groups["kind"] == "count":
            name = q.facts[0].subject
            assert sum(name in parts for parts in names) == int(q.answer)
        if q.groups["kind"] == "location":
            at = [t.place for t in scene.things if q.facts[0].subject in t.name.split()]
            assert q.answer == f"in cell {at[0]}" and len(at) == 1
        if q.groups["aspect"] == "colour":
            assert [a for a, b in names if b == q.facts[0].subject] == [q.answer]
    assert emma.examine(asked, emma.answerer(graphs)).summary().share == 1


def test_letters_and_answers_are_balanced(asked, denied):
    for kind, own in by_kind(asked).items():
        for k in {len(q.options) for q in own}:
            some = [q.options.index(q.answer) for q in own if len(q.options) == k]
            if len(some) >= 60:
                assert max(Counter(some).values()) - min(Counter(some).values()) <= 1
                assert abs(Counter(some)[0] / len(some) - 1 / k) < 0.03, kind
    for own in by_kind(denied).values():
        assert abs(np.mean([q.answer == "yes" for q in own]) - 0.5) < 0.03
    texts = {}
    for q in denied:  # and within every wording
        texts.setdefault(q.prompt, []).append(q.answer)
    assert all(v.count("yes") == v.count("no") for v in texts.values())


def test_without_the_picture_there_is_nothing_to_know(asked, graphs):
    """Frequencies of right options by wording, learnt from an exam, guess one on other images at chance."""

    def guessed(learnt, tested):
        right, seen = Counter(), Counter()
        for q in learnt:
            for o in q.options:
                for key in ((q.prompt.split("\n")[0], o), (q.groups["kind"], o)):
                    seen[key] += 1
                    right[key] += o == q.answer

        def rate(q, o):
            wide, near = (q.groups["kind"], o), (q.prompt.split("\n")[0], o)
            prior = (right[wide] + 1) / (seen[wide] + len(q.options))
            return (right[near] + 4 * prior) / (seen[near] + 4)

        hits = np.array([max(q.options, key=lambda o: rate(q, o)) == q.answer for q in tested])  # noqa: B023
        return hits.mean() - np.mean([1 / len(q.options) for q in tested])

    other = emma.questions(graphs[600:], PAINTED, per_kind=None, seed=2)
    assert len(asked) > 2000 and abs(guessed(other, asked)) < 0.03
    # where large things are asked for more often than small ones, the same guesser knows
    plain = [q for q in asked if q.groups["kind"] == "attribute" and q.groups["aspect"] == "size"]
    skewed = [q for q in plain if q.answer == "large"] + [q for q in plain if q.answer == "small"][::4]
    assert guessed(skewed[::2], skewed[1::2]) > 0.2


@pytest.mark.parametrize("blind,kinds", [
    ((), []), (("colour",), ["attribute"]), (("place",), ["identification", "location", "relation"]),
    (("count",), ["count"]),
])  # fmt: skip
def test_diagnosis_is_by_kind(asked, denied, graphs, blind, kinds):
    some = [q for own in by_kind(asked).values() for q in own[:240]]
    clear, report = emma.examine(some, emma.answerer(graphs)), emma.examine(some, emma.answerer(graphs, blind))
    assert set(clear.degrees().values()) == {0.0}
    assert report.weaknesses(clear) == kinds
    assert {k for k, v in report.degrees().items() if v > 0} == set(kinds)  # and nowhere else at all
    if blind == ("colour",):
        by = report.degrees("aspect")
        assert by["size"] == by["texture"] == 0 and report.weaknesses(clear, by="aspect") == ["colour"]
        colour = report.summary("colour", by="aspect")
        assert abs(colour.above) < 0.15 and colour.chance == 0.25
        told = emma.examine([q for q in denied if q.groups["aspect"] == "colour"][:400], emma.answerer(graphs, blind))
        assert abs(told.summary().above) < 0.15


def test_lapses_and_mumbles(asked, graphs):
    some = asked[:400]
    report = emma.examine(some, emma.answerer(graphs, lapses=0.5, mumbles=0.3))
    assert 0.2 < report.summary().unreadable < 0.4 and report.summary().share < 0.6
    assert report.summary(unreadable="apart").share > report.summary().share
    assert report.to_dict()["existence"]["coverage"] < 1
    again = emma.examine(some[::-1], emma.answerer(graphs, lapses=0.5, mumbles=0.3), batch=7)
    assert again.degrees() == report.degrees()  # neither order nor batches matter


def test_one_seed_one_exam_and_images_apart(graphs):
    first, again = (emma.questions(graphs[:300], PAINTED, ("attribute",), 30, seed=s) for s in (3, 3))
    assert first == again != emma.questions(graphs[:300], PAINTED, ("attribute",), 30, seed=4)
    tuning, test = emma.split(graphs, 0.25)
    assert 0.2 < len(test) / COUNT < 0.3 and emma.split(graphs[::-1], 0.25)[1] == test[::-1]
    emma.check_apart(tuning, test)
    facts = [{(g.image, f) for g in part for f, _ in emma._askable(g, PAINTED)} for part in (tuning, test)]
    assert not facts[0] & facts[1] and all(facts)
    with pytest.raises(ValueError, match="share 1 images.*split by image"):
        emma.check_apart([graphs[0]], graphs[:3])


@pytest.mark.parametrize(
    "text", ["{0}", "({0})", "{0}.", "{1}", "The answer is {2}.", "the answer is ({0})", "It is {1}."]
)
def test_answers_in_many_forms_are_read(asked, text):
    some = [q for q in asked if q.groups["kind"] in ("location", "count")][:80]
    letters = ["ABCD"[q.options.index(q.answer)] for q in some]
    said = {q.id: text.format(letter, q.answer, letter.lower()) for q, letter in zip(some, letters, strict=True)}
    report = emma.examine(some, said)
    assert report.summary().share == 1 and report.summary().coverage == 1
    garbage = emma.examine(some, {q.id: "hmm, hard to say" for q in some})
    assert garbage.summary().unreadable == 1 and garbage.summary().share == 0


def test_conversations_follow_from_the_graph(graphs):
    kinds = Counter()
    for graph in graphs[:60]:
        turns = emma.conversation(graph, PAINTED, turns=6, seed=2)
        assert turns == emma.conversation(graph, PAINTED, turns=6, seed=2) and len(turns) <= 12
        assert [t["role"] for t in turns] == ["user", "assistant"] * (len(turns) // 2)
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            assert not asked["loss"] and answer["loss"] and asked["fact"] == answer["fact"]
            assert emma.holds(graph, answer["fact"]) != answer["content"].startswith("No, there is no")
            kinds[answer["fact"].kind if emma.holds(graph, answer["fact"]) else "denied"] += 1
        facts = [t["fact"] for t in turns[::2]]
        assert len(set(facts)) == len(facts)
    assert set(kinds) == {*KINDS, "denied"}


def test_near_words_and_open_names_are_never_wrong_options():
    words = Vocabulary(
        ("dog", "animal", "cat", "car", "tree"), {"colour": ("red", "scarlet", "blue")},
        also={"dog": frozenset({"animal"}), "scarlet": frozenset({"red"})}, closed=("dog", "cat", "car"),
    )  # fmt: skip
    graph = SceneGraph("one", (Entity("dog", (0, 0, 5, 5), {"colour": "red"}),))
    assert emma._wrong(graph, Fact("existence", "", "", "dog"), words.certain, words) == ["cat", "car"]
    assert emma._wrong(graph, Fact("existence", "", "", "dog"), words.names, words) == ["cat", "car", "tree"]
    assert emma._wrong(graph, Fact("attribute", "dog", "colour", "red"), words.attributes["colour"], words) == ["blue"]
    counted = [f.subject for f, _ in emma._askable(graph, words) if f.kind == "count"]
    assert counted == ["dog", "cat", "car"]


def test_pictures_come_along():
    graphs = emma.painted(40, seed=5, pictures=True)
    asked = emma.questions(graphs, PAINTED, ("attribute",), per_kind=None, thin=1)
    assert asked and all(q.image.shape == (3, 64, 64) for q in asked)


@pytest.mark.parametrize("change,error,word", [
    (dict(per_kind=10**6), ValueError, "per_kind=1000000 questions of existence are wanted.*more graphs"),
    (dict(per_kind=0), ValueError, "per_kind"), (dict(form="essay"), ValueError, "form"),
    (dict(options=1), ValueError, "options"),
    (dict(kinds=("smell",)), ValueError, "kinds"), (dict(graphs=[]), ValueError, "graphs must be of different images"),
])  # fmt: skip
def test_bad_questions(graphs, change, error, word):
    with pytest.raises(error, match=word):
        emma.questions(**{"graphs": graphs[:20], "words": PAINTED, **change})
    with pytest.raises(ValueError, match="different images"):
        emma.questions([graphs[0]] * 2, PAINTED)


def test_bad_graphs_and_models(graphs, asked):
    for box in ((5, 0, 5, 4), (0, 4, 4, 3), (0, 0, 4), (0, 0, float("nan"), 1)):
        with pytest.raises(ValueError, match="box of 'x' must"):
            Entity("x", box)
    one = Entity("x", (0, 0, 1, 1))
    for relation in ((0, "on", 1), (0, "on", 0)):
        with pytest.raises(ValueError, match="must join two of 1 things"):
            SceneGraph("i", (one,), frozenset({relation}))
    with pytest.raises(ValueError, match="names must hold"):
        Vocabulary(("x",))
    with pytest.raises(ValueError, match="closed must hold"):
        Vocabulary(("x", "y"), closed=("z",))
    with pytest.raises(ValueError, match="blind"):
        emma.answerer(graphs, ("smell",))
    with pytest.raises(TypeError, match="blind must be a sequence"):
        emma.answerer(graphs, "colour")
    with pytest.raises(ValueError, match="asked is empty"):
        emma.examine([], emma.answerer(graphs))
    with pytest.raises(ValueError, match="no answers to"):
        emma.examine(asked, {})
    with pytest.raises(ValueError, match="share"):
        emma.split(graphs, 1.0)


def test_blindness_and_words_are_named():
    (graph,) = emma.painted(1)
    with pytest.raises(TypeError, match="blind must be a sequence"):
        emma.blurred(graph, "colour")
    with pytest.raises(TypeError, match="words must be Vocabulary"):
        emma.questions([graph], "painted")


def test_wordings_that_cannot_be_filled_in_are_refused():
    from attnlib.bench.exams.agnosia import Fact, words_of

    fact = Fact("location", "star", "", "on the left")
    with pytest.raises(ValueError, match=r"templates\['location'\] holds \{thing\}"):
        words_of(fact, "yes-no", {"location": ("", "Is the {thing} there?", "")})
    with pytest.raises(ValueError, match="templates must hold three wordings for 'location'"):
        words_of(fact, "yes-no", {})
