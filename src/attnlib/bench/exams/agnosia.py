"""What a multimodal model fails to recognise, asked from scene graphs, after EMMA (Lu et al., 2023, arXiv 2309.04041).

A scene graph says what is in a picture: things with names, boxes and attributes, and how they lie to each other.
Questions follow from it, of several kinds (the names are ours)::

    existence        which of these is there?          attribute   what colour is the circle?
    identification   what is at the top left?          count       how many circles are there?
    location         where is the circle?              relation    how does the circle lie to the star?

Every question has one true option by the graph; the others replace one slot by words of the same category that make it
false, synonyms and hypernyms left out. Things are named without the attributes that are asked for, so that who does not
see one of them fails in one kind. Within one wording every answer is right as often, as are letters, and yes and no:
without the picture there is nothing to know. Agnosia is the share of wrong answers of a kind.

Written from the abstract alone: the taxonomy and all wordings are ours.

>>> graphs = painted(400, seed=1)
>>> asked = questions(graphs, PAINTED, per_kind=24, seed=0)
>>> report = examine(asked, answerer(graphs, blind=("colour",)))
>>> report.weaknesses(examine(asked, answerer(graphs)))
['attribute']
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...checks import check_choice, check_int, check_name, check_real, check_template, check_type, describe, to_list
from ..data import scenes as grid
from ..evaluate import Evaluation, Item, Parser, evaluate, local_seed
from ..judge import LETTERS, Summary, lettered, read_option, read_yes_no, summarise
from ..stats import Difference, paired_bootstrap
from ..worlds import painter

KINDS = ("existence", "identification", "attribute", "count", "location", "relation")
FORMS = ("choice", "yes-no")

#: By kind: a question with options, one with yes or no, and a statement; words in braces are slots of a fact.
TEMPLATES: Mapping[str, tuple[str, str, str]] = {
    "existence": ("Which of these is in the picture?", "Is there a {value} in the picture?", "There is a {value}."),
    "identification": ("What is {slot}?", "Is the thing {slot} a {value}?", "The thing {slot} is a {value}."),
    "attribute": ("What is the {slot} of the {subject}?", "Is the {slot} of the {subject} {value}?",
                  "The {slot} of the {subject} is {value}."),
    "count": ("How many {subject}s are in the picture?", "Is the number of {subject}s in the picture {value}?",
              "The number of {subject}s is {value}."),
    "location": ("Where is the {subject}?", "Is the {subject} {value}?", "The {subject} is {value}."),
    "relation": ("Where is the {subject}, seen from the {slot}?", "Is the {subject} {value} the {slot}?",
                 "The {subject} is {value} the {slot}."),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Scene graphs


@dataclass(frozen=True)
class Entity:
    """One thing.

    Args:
        name: its kind, without attributes.
        box: left, top, right, bottom in pixels.
        attributes: by kind, such as ``{"colour": "red"}``.
        place: where it is, in words; ``None`` where that is not clear.
    """

    name: str
    box: tuple[float, float, float, float]
    attributes: Mapping[str, str] = field(default_factory=dict)
    place: str | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if len(self.box) != 4 or not all(math.isfinite(v) for v in self.box):
            raise ValueError(f"box of {self.name!r} must be four finite numbers of pixels, got {self.box}")
        if self.box[2] <= self.box[0] or self.box[3] <= self.box[1]:
            raise ValueError(f"box of {self.name!r} must have right > left and bottom > top, got {self.box}")


@dataclass(frozen=True)
class SceneGraph:
    """What is in a picture.

    Args:
        image: name of the picture, no other's.
        entities: all things of the vocabulary that are there.
        relations: ``(number of a thing, predicate, number of another)``.
        picture: the picture itself, if it is at hand.
    """

    image: str
    entities: tuple[Entity, ...]
    relations: frozenset[tuple[int, str, int]] = frozenset()
    picture: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_name("image", self.image)
        for a, predicate, b in self.relations:
            if not (0 <= a < len(self.entities) and 0 <= b < len(self.entities)) or a == b:
                raise ValueError(
                    f"relations of {self.image!r}: {(a, predicate, b)} must join two of {len(self.entities)} things"
                )


@dataclass(frozen=True)
class Vocabulary:
    """Words that can stand in a slot.

    Args:
        names: kinds of things.
        attributes: values by kind of attribute.
        places, predicates: where things can be, and how they can lie.
        also: by word, other words that may be true where it is (synonyms, hypernyms): never a wrong option beside it.
        closed: names whose absence from a graph means absence from the picture; all by default. Only these are offered
            as what is not there, counted, and denied.
        most: largest number that a question of counts offers.
    """

    names: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    predicates: tuple[str, ...] = ()
    also: Mapping[str, frozenset[str]] = field(default_factory=dict)
    closed: tuple[str, ...] | None = None
    most: int = 3

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must hold two different words at least, got {self.names}")
        if unknown := set(self.closed or ()) - set(self.names):
            raise ValueError(f"closed must hold names of the vocabulary, got {sorted(unknown)} beside them")

    def near(self, word: str) -> frozenset[str]:
        """Words that may be true where ``word`` is, itself among them."""
        if not self.also:
            return frozenset((word,))
        turned = {other for other, words in self.also.items() if word in words}
        return frozenset({word, *self.also.get(word, ()), *turned})

    @property
    def certain(self) -> tuple[str, ...]:
        """Names whose absence is known."""
        return self.names if self.closed is None else self.closed


def spatial(entities: Sequence[Entity]) -> frozenset[tuple[int, str, int]]:
    """Left of, right of, above and below between boxes, where one of the four is clear.

    Clear is a distance of centres that is half again as long along one axis as along the other, boxes apart on it.

    >>> a, b = Entity("x", (0, 0, 4, 4)), Entity("y", (10, 1, 14, 5))
    >>> sorted(spatial([a, b]))
    [(0, 'left of', 1), (1, 'right of', 0)]
    """
    found = set()
    for i, a in enumerate(entities):
        for j, b in enumerate(entities):
            dx = (b.box[0] + b.box[2] - a.box[0] - a.box[2]) / 2
            dy = (b.box[1] + b.box[3] - a.box[1] - a.box[3]) / 2
            if abs(dx) > 1.5 * abs(dy) and (a.box[2] <= b.box[0] or b.box[2] <= a.box[0]):
                found.add((i, "left of" if dx > 0 else "right of", j))
            elif abs(dy) > 1.5 * abs(dx) and (a.box[3] <= b.box[1] or b.box[3] <= a.box[1]):
                found.add((i, "above" if dy > 0 else "below", j))
    return frozenset(found)


def place_of(box: Sequence[float], width: float, height: float) -> str | None:
    """One of nine places of a picture in words, ``None`` where a centre is near the border between two.

    >>> place_of((0, 0, 10, 10), 60, 60), place_of((15, 0, 25, 10), 60, 60)
    ('at the top left', None)
    """
    at = []
    for low, high, side in ((box[0], box[2], width), (box[1], box[3], height)):
        share = (low + high) / 2 / side
        middle = 0.4 < share < 0.6
        if not (share < 0.3 or middle or share > 0.7):
            return None
        at.append(1 if middle else 0 if share < 0.5 else 2)
    return next(words for words, cell in painter.PLACES.items() if cell == tuple(at))


# --------------------------------------------------------------------------------------------------------------------
# Graphs of generated scenes

#: Words of :func:`painted`.
PAINTED = Vocabulary(
    painter.SHAPES,
    {"colour": tuple(painter.COLOURS), "size": painter.SIZES, "texture": painter.TEXTURES},
    tuple(painter.PLACES), painter.RELATIONS,
)  # fmt: skip

#: Words of :func:`from_scene`.
GRID = Vocabulary(
    (*grid.SHAPES, "digit"), {"colour": tuple(grid.COLOURS), "value": tuple(map(str, range(10)))},
    tuple(f"in cell {place}" for place in grid.PLACES), painter.RELATIONS,
)  # fmt: skip


def painted(count: int, seed: int = 0, part: str = "test", pictures: bool = False) -> list[SceneGraph]:
    """Graphs of scenes of :mod:`attnlib.bench.worlds.painter`.

    Args:
        count: how many.
        seed: other scenes.
        part: of :func:`attnlib.bench.worlds.painter.sample`.
        pictures: paint them too.
    """
    check_int("count", count, least=1)
    first = check_int("seed", seed, least=0) * 1_000_000
    drawn = painter.sample(range(first, first + count), part, pairings="any")
    images = painter.paint(drawn, part).images if pictures else None
    columns = {k: v.tolist() for k, v in vars(drawn).items()}
    names, found = list(painter.COLOURS), []
    for i in range(count):
        entities = []
        for j in range(columns["count"][i]):
            shape, x, y, r = (columns[k][i][j] for k in ("shape", "x", "y", "radius"))
            attributes = {"colour": names[columns["colour"][i][j]]}
            if shape != painter.CREATURE:  # which has one size
                attributes["size"] = painter.SIZES[columns["size"][i][j]]
            if shape < painter.CREATURE:
                attributes["texture"] = painter.TEXTURES[columns["texture"][i][j]]
            box = (max(x - r, 0.0), max(y - r, 0.0), min(x + r, painter.SIDE), min(y + r, painter.SIDE))
            entities.append(Entity(painter.SHAPES[shape], box, attributes, place_of(box, painter.SIDE, painter.SIDE)))
        picture = None if images is None else images[i]
        found.append(SceneGraph(f"{part}-{first + i}", tuple(entities), spatial(entities), picture))
    return found


def from_scene(scene: grid.Scene, image: str) -> SceneGraph:
    """Graph of a scene of :func:`attnlib.bench.data.scenes.make_scene`; shapes and digits are names."""
    entities = []
    for thing in scene.things:
        first, second = thing.name.split()
        row, column = divmod(thing.cell, grid.GRID)
        top, left = row * grid.CELL, column * grid.CELL
        digit = first == "digit"
        entities.append(
            Entity(
                "digit" if digit else second, (left, top, left + grid.CELL, top + grid.CELL),
                {"value": second} if digit else {"colour": first}, f"in cell {thing.place}",
            )
        )  # fmt: skip
    return SceneGraph(image, tuple(entities), spatial(entities), scene.image)


def split(graphs: Sequence[SceneGraph], share: float = 0.2, seed: int = 0) -> tuple[list[SceneGraph], list[SceneGraph]]:
    """Graphs to tune on and to test with, by image; an image's side depends on its name and the seed alone.

    Args:
        graphs: of different images, or several of one, which stay together.
        share: of the second.
        seed: of the draw.
    """
    check_real("share", share, above=0, below=1)
    tests = [local_seed(seed, g.image) / 2**48 < share for g in graphs]
    return [g for g, t in zip(graphs, tests, strict=True) if not t], [
        g for g, t in zip(graphs, tests, strict=True) if t
    ]


def check_apart(tuning: Iterable[SceneGraph], test: Iterable[SceneGraph]) -> None:
    """Raise ``ValueError`` where an image is on both sides."""
    if both := sorted({g.image for g in tuning} & {g.image for g in test}):
        raise ValueError(f"tuning and test share {len(both)} images: {both[:5]}; split by image")


# --------------------------------------------------------------------------------------------------------------------
# Facts


class Fact(NamedTuple):
    """What can be said of a picture; ``value`` is what a question asks for.

    Existence: ``value`` is there. Identification: what is in place ``slot`` is a ``value``. Attribute: ``slot`` of the
    only ``subject`` is ``value``. Count: there are ``value`` of ``subject``. Location: the only ``subject`` is
    ``value``. Relation: the only ``subject`` is ``value`` the only ``slot``.
    """

    kind: str
    subject: str
    slot: str
    value: str


def _only(graph: SceneGraph, name: str) -> int | None:
    found = [i for i, e in enumerate(graph.entities) if e.name == name]
    return found[0] if len(found) == 1 else None


def holds(graph: SceneGraph, fact: Fact) -> bool:
    """Whether a fact is true of a graph; of a thing that is not there, or there twice, nothing is."""
    if fact.kind not in KINDS:
        check_choice("fact.kind", fact.kind, KINDS)
    if fact.kind == "existence":
        return any(e.name == fact.value for e in graph.entities)
    if fact.kind == "count":
        return str(sum(e.name == fact.subject for e in graph.entities)) == fact.value
    if fact.kind == "identification":
        there = [e.name for e in graph.entities if e.place == fact.slot]
        return there == [fact.value]
    at = _only(graph, fact.subject)
    if at is None:
        return False
    if fact.kind == "attribute":
        return graph.entities[at].attributes.get(fact.slot) == fact.value
    if fact.kind == "location":
        return graph.entities[at].place == fact.value
    other = _only(graph, fact.slot)
    return other is not None and (at, fact.value, other) in graph.relations


def _askable(graph: SceneGraph, words: Vocabulary) -> Iterable[tuple[Fact, tuple[str, ...]]]:
    """Facts that are true of a graph, and all values that their slot could have."""
    names = [e.name for e in graph.entities]
    for name in dict.fromkeys(names):
        if name in words.names:
            yield Fact("existence", "", "", name), words.certain
    for name in words.certain:
        if (n := names.count(name)) <= words.most:
            yield Fact("count", name, "", str(n)), tuple(map(str, range(words.most + 1)))
    single = [(i, e) for i, e in enumerate(graph.entities) if names.count(e.name) == 1 and e.name in words.names]
    places = [e.place for e in graph.entities]
    unclear = None in places  # what is nowhere in particular might be there too
    for i, e in single:
        for kind, value in e.attributes.items():
            if kind in words.attributes:
                yield Fact("attribute", e.name, kind, value), words.attributes[kind]
        if e.place is not None:
            yield Fact("location", e.name, "", e.place), words.places
        for j, other in single:
            said = [p for a, p, b in graph.relations if (a, b) == (i, j) and p in words.predicates]
            if len(said) == 1:
                yield Fact("relation", e.name, other.name, said[0]), words.predicates
    for e in graph.entities:
        if e.place is not None and places.count(e.place) == 1 and not unclear and e.name in words.names:
            yield Fact("identification", "", e.place, e.name), words.names


def _wrong(graph: SceneGraph, fact: Fact, values: Sequence[str], words: Vocabulary) -> list[str]:
    """Values that make a fact false, whose near words do so too."""

    def false(value: str) -> bool:
        return not any(holds(graph, fact._replace(value=v)) for v in words.near(value))

    return [v for v in values if false(v)]


# --------------------------------------------------------------------------------------------------------------------
# Questions


@dataclass(frozen=True)
class Question(Item):
    """An item with the fact that each of its options says; ``groups`` has ``kind``, ``aspect``, ``form``, ``image``."""

    facts: tuple[Fact, ...] = ()


class _Draft(NamedTuple):
    graph: SceneGraph
    fact: Fact
    text: str
    value: str
    wrong: tuple[str, ...]


def words_of(fact: Fact, form: str, templates: Mapping[str, tuple[str, str, str]] = TEMPLATES) -> str:
    """A fact as ``"choice"``, ``"yes-no"`` or ``"statement"``.

    >>> words_of(Fact("location", "star", "", "on the left"), "yes-no")
    'Is the star on the left?'
    """
    check_choice("form", form, (*FORMS, "statement"))
    check_type("templates", templates, Mapping)
    wordings = templates.get(fact.kind)
    if not isinstance(wordings, (list, tuple)) or len(wordings) != len(FORMS) + 1:
        raise ValueError(
            f"templates must hold three wordings for {fact.kind!r}, of {', '.join(FORMS)} and statement, "
            f"got {describe(wordings)}"
        )
    template = check_template(
        f"templates[{fact.kind!r}]", wordings[(*FORMS, "statement").index(form)], ("subject", "slot", "value")
    )
    subject = fact.subject
    if fact.kind == "count" and subject.endswith(("s", "x", "ch", "sh")):
        template = template.replace("{subject}s", "{subject}es")
    return template.format(subject=subject, slot=fact.slot, value=fact.value)


def questions(
    graphs: Sequence[SceneGraph],
    words: Vocabulary,
    kinds: Sequence[str] = KINDS,
    per_kind: int | None = 200,
    options: int = 4,
    form: str = "choice",
    thin: int = 3,
    seed: int = 0,
    templates: Mapping[str, tuple[str, str, str]] = TEMPLATES,
) -> list[Question]:
    """Questions about pictures, each with one true option.

    Every answer to one wording is asked for as often as every other, so that the wording tells nothing; wordings that
    have less than ``thin`` questions for one of their answers are balanced together, by kind. Right letters go round.

    Args:
        graphs: of different images.
        words: what can stand in slots.
        kinds: of :data:`KINDS`.
        per_kind: questions of each; ``None`` for as many as there are.
        options: of a question, fewer where a slot has fewer values.
        form: ``"choice"``, or ``"yes-no"``, as many of each.
        thin: see above.
        seed: of draws and orders.
        templates: other wordings.

    Raises:
        ValueError: too few graphs for ``per_kind``, two of one image.
    """
    check_choice("form", form, FORMS)
    check_int("options", options, 2, len(LETTERS))
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    if per_kind is not None:
        check_int("per_kind", per_kind, least=1)
    check_type("words", words, Vocabulary)
    images = [g.image for g in graphs]
    if not images or len(set(images)) < len(images):
        raise ValueError(f"graphs must be of different images, at least one, got {len(images)} of {len(set(images))}")
    pools: dict[str, list[_Draft]] = {kind: [] for kind in kinds}
    for graph in graphs:
        for fact, values in _askable(graph, words):
            if fact.kind in pools:
                pools[fact.kind] += _drafts(graph, fact, values, words, form, templates)
    made: list[Question] = []
    for kind in kinds:
        rng = np.random.default_rng([seed, KINDS.index(kind), FORMS.index(form)])
        rounds = _rounds(pools[kind], thin if form == "choice" else 1, form, rng)
        chosen = [
            (draft, values)
            for drafts, values in rounds
            for draft in drafts
            if form == "yes-no" or any(v in values for v in draft.wrong)
        ]
        if per_kind is not None:
            if len(chosen) < per_kind:
                raise ValueError(
                    f"per_kind={per_kind} questions of {kind} are wanted, and {len(graphs)} graphs give {len(chosen)} "
                    "that are balanced; give more graphs, or fewer kinds"
                )
            chosen = chosen[:per_kind]
        made += _written(chosen, kind, form, options, rng)
    return made


def _drafts(
    graph: SceneGraph, fact: Fact, values: Sequence[str], words: Vocabulary, form: str, templates: Any
) -> list[_Draft]:
    wrong = tuple(_wrong(graph, fact, values, words))
    if form == "choice":
        return [_Draft(graph, fact, words_of(fact, form, templates), fact.value, wrong)] if wrong else []
    said = [(fact, "yes")] + [(fact._replace(value=v), "no") for v in wrong]
    return [_Draft(graph, f, words_of(f, form, templates), answer, ()) for f, answer in said]


def _rounds(
    pool: Sequence[_Draft], thin: int, form: str, rng: np.random.Generator
) -> list[tuple[list[_Draft], tuple[str, ...]]]:
    """Drafts in rounds that hold every answer of a group once, and the group's answers; no question twice."""
    unique = {(d.graph.image, d.text, d.value): d for d in pool}  # "no" follows from several true facts
    by_text: dict[str, dict[str, list[_Draft]]] = {}
    for draft in unique.values():
        by_text.setdefault(draft.text, {}).setdefault(draft.value, []).append(draft)
    groups: dict[str, dict[str, list[_Draft]]] = {}
    for text, by_value in by_text.items():
        # A draft whose other answers were never right here would stand alone: what is asked says what is answered.
        lonely = len(by_value) < 2 or min(map(len, by_value.values())) < thin
        if lonely and form == "yes-no":
            continue
        key = next(iter(by_value.values()))[0].fact.slot if lonely else text
        for value, drafts in by_value.items():
            groups.setdefault(f"thin {key}" if lonely else text, {}).setdefault(value, []).extend(drafts)
    rounds = []
    for by_value in groups.values():
        if len(by_value) < 2:
            continue
        size = min(map(len, by_value.values()))
        if size < thin and len(by_value) > 2:  # leave out what hardly ever is right
            kept = {v: d for v, d in by_value.items() if len(d) >= thin}
            if len(kept) >= 2:
                by_value, size = kept, min(map(len, kept.values()))
        values = tuple(by_value)
        picked = [[drafts[i] for i in rng.permutation(len(drafts))[:size]] for drafts in by_value.values()]
        rounds += [([column[i] for column in picked], values) for i in range(size)]
    return [rounds[i] for i in rng.permutation(len(rounds))]


def _written(
    chosen: Sequence[tuple[_Draft, tuple[str, ...]]], kind: str, form: str, options: int, rng: np.random.Generator
) -> list[Question]:  # fmt: skip
    made: list[Question] = []
    turns: dict[int, list[int]] = {}  # right places by number of options, each as often
    for number, (draft, values) in enumerate(chosen):
        groups = {"kind": kind, "aspect": draft.fact.slot if kind == "attribute" else kind, "form": form,
                  "image": draft.graph.image}  # fmt: skip
        about = draft.graph.picture if draft.graph.picture is not None else draft.graph.image
        name = f"{kind}-{form}-{number}-{draft.graph.image}"
        if form == "yes-no":
            prompt = f"{draft.text}\nAnswer with yes or no."
            made.append(Question(name, prompt, draft.value, groups, ("yes", "no"), about, (draft.fact,)))
            continue
        wrong = [v for v in draft.wrong if v in values]
        k = min(options, len(wrong) + 1)
        others = [wrong[i] for i in rng.permutation(len(wrong))[: k - 1]]
        if not turns.get(k):
            turns[k] = rng.permutation(k).tolist()
        at = turns[k].pop()
        shown = (*others[:at], draft.value, *others[at:])
        prompt = f"{draft.text}\n{lettered(shown)}\nAnswer with the letter."
        facts = tuple(draft.fact._replace(value=v) for v in shown)
        made.append(Question(name, prompt, draft.value, groups, shown, about, facts))
    return made


# --------------------------------------------------------------------------------------------------------------------
# Scores


@dataclass(frozen=True)
class Report:
    """Answers to questions, by kind; unreadable ones are wrong, and told apart as a failure of its own."""

    answers: Evaluation

    def _kinds(self, by: str) -> list[str]:
        return list(dict.fromkeys(a.item.groups[by] for a in self.answers.answers))

    def summary(self, kind: str | None = None, unreadable: str = "wrong", by: str = "kind") -> Summary:
        """Share of right answers of a kind, or of all, drawn again by image."""
        answers = self.answers if kind is None else self.answers.where(**{by: kind})
        return summarise(answers, unreadable=unreadable)

    def degrees(self, by: str = "kind") -> dict[str, float]:
        """Agnosia by kind, or by ``"aspect"``, which tells attributes apart: the share of wrong answers."""
        return {kind: 1 - self.summary(kind, by=by).share for kind in self._kinds(by)}

    def against(self, other: Report, by: str = "kind") -> dict[str, Difference]:
        """By kind, how much more often this one is right than another, question by question, drawn by image."""
        found = {}
        for kind in self._kinds(by):
            one, two = (r.answers.where(**{by: kind}) for r in (self, other))
            images = {a.item.id: a.item.groups["image"] for a in one.answers}
            found[kind] = paired_bootstrap(one.scores("right", "wrong"), two.scores("right", "wrong"), items=images)
        return found

    def weaknesses(self, other: Report, least: float = 0.05, by: str = "kind") -> list[str]:
        """Kinds in which this one is right less often than another, by more than ``least`` at 95 % confidence."""
        check_real("least", least, least=0, below=1)
        return [kind for kind, gap in self.against(other, by).items() if gap.high < -least]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {kind: self.summary(kind).to_dict() for kind in self._kinds("kind")}


def examine(
    asked: Sequence[Question],
    model: Callable[..., Sequence[str]] | Mapping[str, str] | str | Path,
    parse: Parser | None = None,
    **settings: Any,
) -> Report:
    """Put questions to a model.

    Args:
        asked: of :func:`questions`.
        model: of :func:`attnlib.bench.evaluate.evaluate`; with an argument ``items`` it gets their ``image``.
        parse: by letter or words, yes or no, by default.
        settings: of :func:`attnlib.bench.evaluate.evaluate`.
    """
    if not asked:
        raise ValueError("asked is empty: there are no questions")

    def read(text: str, item: Item) -> str:
        return read_yes_no(text, item) if item.groups["form"] == "yes-no" else read_option(text, item)

    return Report(evaluate(asked, model, parse or read, **settings))


# --------------------------------------------------------------------------------------------------------------------
# Answerers with a planted blindness


def blurred(graph: SceneGraph, blind: Sequence[str]) -> SceneGraph:
    """A graph as seen by who is blind to kinds of attributes, or to ``"place"`` and so to relations."""
    blind = to_list("blind", blind, '("colour",)') or []
    entities, relations = list(graph.entities), graph.relations
    if "place" in blind:
        entities, relations = [dataclasses.replace(e, place=None) for e in entities], frozenset()
    seen = [
        dataclasses.replace(e, attributes={k: v for k, v in e.attributes.items() if k not in blind}) for e in entities
    ]
    return SceneGraph(graph.image, tuple(seen), relations, graph.picture)


def answerer(
    graphs: Sequence[SceneGraph], blind: Sequence[str] = (), lapses: float = 0.0, mumbles: float = 0.0
) -> Callable[..., list[str]]:
    """A model for :func:`examine` that answers from the truth, but for what it is blind to, where it guesses.

    Who is blind to counts sees one of every name that is there, and says so.

    Args:
        graphs: what it sees.
        blind: kinds of attributes, ``"place"`` or ``"count"``.
        lapses: share of answers that are guessed whatever is seen.
        mumbles: share of answers that cannot be read.
    """
    blind = to_list("blind", blind, '("colour",)') or []
    check_real("lapses", lapses, least=0, most=1)
    check_real("mumbles", mumbles, least=0, most=1)
    kinds = {k for g in graphs for e in g.entities for k in e.attributes}
    for name in blind:
        check_choice("blind", name, (*sorted(kinds), "place", "count"))
    seen = {g.image: blurred(g, blind) for g in graphs}

    def call(prompts: Sequence[str], items: Sequence[Question], seeds: Sequence[int]) -> list[str]:
        said = []
        for item, seed in zip(items, seeds, strict=True):
            check_type("an item", item, Question, "a Question, as questions makes them")
            rng, graph = np.random.default_rng(seed), seen[item.groups["image"]]
            if "count" in blind and item.groups["kind"] == "count":
                entities = {e.name: e for e in graph.entities}
                graph = SceneGraph(graph.image, tuple(entities.values()))
            true = [i for i, fact in enumerate(item.facts) if holds(graph, fact)]
            guess = int(rng.integers(len(item.options)))
            if rng.random() < mumbles:
                said.append("I would rather talk about something else.")
            elif item.groups["form"] == "yes-no":
                fact = item.facts[0]
                unseen = ("place" in blind and fact.kind in ("location", "relation", "identification")) or (
                    fact.kind == "attribute" and fact.slot in blind
                )
                told = ("yes" if true else "no") if not unseen and rng.random() >= lapses else item.options[guess]
                said.append(told)
            else:
                at = true[0] if len(true) == 1 and rng.random() >= lapses else guess
                said.append(f"({LETTERS[at]})")
        return said

    return call


# --------------------------------------------------------------------------------------------------------------------
# Conversations to tune on


def conversation(
    graph: SceneGraph,
    words: Vocabulary,
    turns: int = 6,
    denied: float = 0.3,
    seed: int = 0,
    templates: Mapping[str, tuple[str, str, str]] = TEMPLATES,
) -> list[dict[str, Any]]:
    """A conversation about one picture: a fact of another kind every turn, and some of what is not there.

    Args:
        graph: what is said follows from it.
        words: what can be denied.
        turns: questions with their answers at most; fewer where there are fewer facts.
        denied: share of turns that ask for what is not there.
        seed: of the draw.
        templates: other wordings.

    Returns:
        ``{"role": "user" or "assistant", "content", "loss", "fact"}`` in turn: the loss is on answers only.
    """
    check_int("turns", turns, least=1)
    check_real("denied", denied, least=0, most=1)
    rng = np.random.default_rng(local_seed(seed, graph.image))
    facts: dict[str, list[Fact]] = {}
    for fact, _ in _askable(graph, words):
        if not (fact.kind == "count" and fact.value == "0") and (fact.kind != "existence" or rng.random() < 0.5):
            facts.setdefault(fact.kind, []).append(fact)
    absent = _wrong(graph, Fact("existence", "", "", ""), words.certain, words)
    told: list[dict[str, Any]] = []
    kinds = [k for k in KINDS if k in facts]
    order = [kinds[i] for i in rng.permutation(len(kinds))]
    for turn in range(turns):
        if absent and rng.random() < denied:
            name = absent.pop(int(rng.integers(len(absent))))
            fact = Fact("existence", "", "", name)
            asked, answer = words_of(fact, "yes-no", templates), f"No, there is no {name} in the picture."
        else:
            left = [k for k in order if facts[k]]
            if not left:
                break
            kind = left[turn % len(left)]
            fact = facts[kind].pop(int(rng.integers(len(facts[kind]))))
            asked = words_of(fact, "yes-no" if kind == "existence" else "choice", templates)
            answer = ("Yes. " if kind == "existence" else "") + words_of(fact, "statement", templates)
        told.append({"role": "user", "content": asked, "loss": False, "fact": fact})
        told.append({"role": "assistant", "content": answer, "loss": True, "fact": fact})
    return told
