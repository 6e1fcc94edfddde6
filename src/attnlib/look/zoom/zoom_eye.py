"""ZoomEye: search a tree of sub-pictures for what a question is about, then answer with that in view.

A picture is a tree of boxes; the model itself says, by how much likelier "Yes" is than "No" at the next position,
whether a box shows the wanted thing, whether a closer look might, and whether it suffices to answer::

    c = 2 softmax([z_Yes, z_No])_Yes - 1
    priority(n) = w(d) c_exists + (1 - w(d)) c_latent,    w(d) = b + (1 - b) d^2 / D^2

The most promising box is opened next until one suffices; the bar falls when that takes long. Things asked for with
"all" are collected from every box of the first two levels instead. The answer is given with the whole picture, where
the box is marked, and the box at full resolution.

What differs from the authors' code: pronouns are found by a list of words, not by a parser; a picture with a "red
rectangle" of its own is marked in blue, which theirs means to do and does not; where nothing is found the model is
asked as if there was no search, without a square around the picture. The wording of the prompts is ours: they are data.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...checks import check_choice, check_int, check_real, check_type, describe
from ..pixels import Box, Picture, to_picture
from ..speak import BaseSpeaker, check_text, need_speaker
from .search import Search, best_first, post_order
from .tree import SPLITS, Node, Tree
from .views import Views

#: Words that make a cue refer to another: such cues cannot be searched for on their own.
PRONOUNS = frozenset(
    "i you he she it we they me him her us them my mine your yours his hers its our ours their theirs myself yourself "
    "himself herself itself ourselves themselves this that these those who whom whose which what one another each "
    "other something anything everything nothing someone anyone everyone somebody anybody everybody nobody".split()
)


@dataclass(frozen=True)
class ZoomPrompts:
    """What the model is asked. ``{cue}`` is the thing looked for, ``{question}`` the question, ``{mark}`` a colour."""

    yes: str = "Yes"
    no: str = "No"
    exists: str = "Can a {cue} be seen in the image? Answer Yes or No."
    latent: str = (
        "Judging by the image and by what usually belongs together, might a closer look at the image reveal a {cue}? "
        "Answer Yes or No."
    )
    exists_zoomed: str = "Can a {cue} be seen in the enlarged part? Answer Yes or No."
    latent_zoomed: str = (
        "Judging by the enlarged part, by its place in the image and by what usually belongs together, might a closer "
        "look at it reveal a {cue}? Answer Yes or No."
    )
    answerable: str = "Question: {question}\nIs what can be seen enough to answer the question? Answer Yes or No."
    zoomed: str = (
        "<image>\nThis is the whole image; a {mark} frame marks the part of interest.\n"
        "<image>\nThis is that part, enlarged.\n"
    )
    appearance: str = "What does the {cue} look like?"
    cues: str = "Question: {question}\nWhich things must be looked at to answer it? End with a line 'Objects: ...'."
    examples: tuple[tuple[str, str], ...] = (
        ("What does the sign above the shop door say?", "Objects: sign above the shop door"),
        ("Is the umbrella to the left of the bicycle?", "Objects: umbrella and bicycle"),
        ("How many boats are on the lake?", "Objects: all boats"),
        ("What colour is the scarf of the woman near the bench?", "Objects: scarf of the woman near the bench"),
    )
    found: str = r"Objects:\s*(.+)"

    def __post_init__(self) -> None:
        for name, places in (
            ("exists", ("{cue}",)), ("latent", ("{cue}",)), ("exists_zoomed", ("{cue}",)),
            ("latent_zoomed", ("{cue}",)), ("answerable", ("{question}",)), ("cues", ("{question}",)),
            ("appearance", ("{cue}",)),
        ):  # fmt: skip
            check_type(name, getattr(self, name), str, "a string")
            missing = [place for place in places if place not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name} must have a place {missing[0]}, got {getattr(self, name)!r}")
        if self.zoomed.count("<image>") != 2:
            raise ValueError(f"zoomed must mark two pictures with <image>, got {self.zoomed!r}")


@dataclass(frozen=True)
class ZoomSettings:
    """How a family of models is searched; see :data:`ZOOM_SETTINGS`.

    Args:
        view, scale, canvas: of :class:`attnlib.look.zoom.Views`.
        bias: weight of "exists" at the root.
        upper, lower, steps: the bar to answer, where it gives up, and how it falls.
        threshold: bar of things asked for with "all".
        pops: boxes that may be opened per level before the bar falls; ``more`` between its further falls.
        leaf: boxes are split while their longer side is at least this; ``None`` for the side the model reads.
    """

    view: str = "global-local"
    scale: float | None = 1.2
    canvas: str = "square"
    bias: float = 0.6
    upper: float = 0.6
    lower: float = 0.0
    steps: tuple[float, ...] = (0.1, 0.1, 0.2)
    threshold: float = 0.6
    pops: int = 3
    more: int = 2
    leaf: int | None = None


#: Settings of the authors' releases, by name.
ZOOM_SETTINGS = {
    "llava-anyres": ZoomSettings(),
    "llava": ZoomSettings(view="local", scale=None, bias=0.2),
    "internvl": ZoomSettings(upper=0.2, lower=-0.2, leaf=448),
    "qwen-vl": ZoomSettings(canvas="own", upper=0.95, steps=(0.05, 0.1, 0.2), leaf=448),
}
#: Which of them a model of transformers gets; others, which may read one picture only, get ``"llava"``.
FAMILIES = {
    "llava_next": "llava-anyres", "llava_onevision": "llava-anyres", "internvl": "internvl", "qwen2_vl": "qwen-vl",
    "qwen2_5_vl": "qwen-vl", "qwen3_vl": "qwen-vl",
}  # fmt: skip


class Answer(str):
    """An answer: a string that also says how it was found.

    ``boxes`` (x1, y1, x2, y2) that were shown, in pixels of the picture, none for the plain answer; ``cues`` that were
    searched for; ``searches``, one for each; ``views``, the pictures shown; ``calls`` of the model by kind, without
    those answered from memory; ``choice``, the number of the option, with options.
    """

    boxes: tuple[Box, ...]
    cues: tuple[str, ...]
    searches: tuple[Search, ...]
    views: tuple[Picture, ...]
    calls: Counter[str]
    choice: int | None

    @classmethod
    def of(cls, text: str, **said: Any) -> Answer:
        """``text`` with what is known of it."""
        found = cls(text)
        told = {"boxes": (), "cues": (), "searches": (), "views": (), "calls": Counter(), "choice": None, **said}
        found.__dict__.update(told)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), str(self), self.__dict__)


def _restored(kind: type[Answer], text: str, said: dict[str, Any]) -> Answer:
    return kind.of(text, **said)


def confidence(yes: float, no: float) -> float:
    """``2 softmax([yes, no])[0] - 1`` of two scores, in [-1, 1]; the other way round it changes its sign.

    >>> confidence(1.0, 1.0)
    0.0
    """
    return math.tanh((yes - no) / 2)


def depth_weight(depth: int, deepest: int, bias: float) -> float:
    """How much "exists" counts at a depth: ``bias`` at the root, 1 at the deepest."""
    check_int("deepest", deepest, least=0)
    check_int("depth", depth, least=0, most=deepest)
    return bias + (1 - bias) * (depth / deepest) ** 2 if deepest else bias


def read_cues(text: str, pattern: str = ZoomPrompts.found) -> list[str] | None:
    """Cues from what a model wrote, without those that hold a pronoun; ``None`` where it wrote no list.

    >>> read_cues("I need both. Objects: red car, the man and his bag.")
    ['red car', 'the man']
    """
    match = re.search(pattern, text)
    if match is None:
        return None
    listed = re.split(r" and |, ", match.group(1).strip().removesuffix("."))
    return [cue for cue in (part.strip() for part in listed) if cue and not _pronoun(cue)]


def _pronoun(cue: str) -> bool:
    return any(word in PRONOUNS for word in re.findall(r"[a-z]+", cue.lower()))


class ZoomEye:
    """Zoom into a picture until a question can be answered.

    Args:
        speaker: a :class:`attnlib.look.speak.Speaker` whose "Yes" and "No" are single tokens.
        settings: a name of :data:`ZOOM_SETTINGS`, a :class:`ZoomSettings`, or ``None`` for those of the model's family.
        prompts: what is asked.
        cues: ``cues(question) -> list of things to look for``; ``None`` asks the model. A thing that starts with "all "
            is collected everywhere.
        split: parts of a box: 4, 9 or 16.
        max_depth: deepest level; 0 leaves the plain model.
        all_depth: deepest level of things asked for with "all".
        small: what becomes of pictures smaller than a leaf: ``"refuse"``, or ``"root"``, the plain answer.
        unread: what becomes of a list of things that cannot be read: ``"plain"``, the plain answer, or ``"refuse"``.
        changes: single fields of the settings, for instance ``leaf=224``.

    Raises:
        ValueError: "Yes" or "No" of several tokens; no leaf where the model has no fixed size.

    Reference: Shen et al., 2024, arXiv 2411.16044.
    """

    def __init__(
        self,
        speaker: Any,
        settings: str | ZoomSettings | None = None,
        *,
        prompts: ZoomPrompts = ZoomPrompts(),  # noqa: B008
        cues: Callable[[str], Sequence[str]] | None = None,
        split: int = 4,
        max_depth: int = 5,
        all_depth: int = 2,
        small: str = "refuse",
        unread: str = "plain",
        **changes: Any,
    ):
        self.speaker: BaseSpeaker = need_speaker(speaker)
        if settings is None:
            settings = FAMILIES.get(self.speaker.family or "", "llava")
        if isinstance(settings, str):
            check_choice("settings", settings, ZOOM_SETTINGS)
            settings = ZOOM_SETTINGS[settings]
        check_type("settings", settings, ZoomSettings, f"one of {sorted(ZOOM_SETTINGS)} or a ZoomSettings")
        unknown = sorted(set(changes) - {f.name for f in fields(ZoomSettings)})
        if unknown:
            raise TypeError(f"ZoomEye has no setting {unknown[0]!r}; it has {[f.name for f in fields(ZoomSettings)]}")
        self.settings = replace(settings, **changes)
        check_type("prompts", prompts, ZoomPrompts)
        if cues is not None and not callable(cues):
            raise TypeError(f"cues must be a function of the question, or None, got {describe(cues)}")
        check_choice("split", split, SPLITS)
        check_choice("small", small, ("refuse", "root"))
        check_choice("unread", unread, ("plain", "refuse"))
        check_real("bias", self.settings.bias, least=0, most=1)
        check_int("pops", self.settings.pops, least=0)
        self.prompts, self.cues, self.split, self.small, self.unread = prompts, cues, split, small, unread
        self.max_depth = check_int("max_depth", max_depth, least=0)
        self.all_depth = check_int("all_depth", all_depth, least=0)
        leaf = self.settings.leaf or self.speaker.input_size
        if leaf is None:
            raise ValueError("leaf must be given: the model reads pictures of any size, so that it does not say one")
        self.leaf = check_int("leaf", leaf, least=2)
        self.words = self.speaker.check_words((prompts.yes, prompts.no))
        self.views = Views(
            self.leaf, self.settings.view, self.settings.scale, self.settings.canvas, self.speaker.background
        )

    # Confidences

    def _shown(self, picture: Picture, node: Node, mark: str, full: bool = True) -> tuple[Picture, ...]:
        return self.views.whole(picture, full) if node.is_root else self.views(picture, [node.box], mark)

    def _question(self, images: tuple[Picture, ...], kind: str, said: str, mark: str) -> tuple[Any, str]:
        zoomed = len(images) > 1
        place = "{question}" if kind == "answerable" else "{cue}"
        text = getattr(self.prompts, kind + "_zoomed" * (zoomed and kind != "answerable")).replace(place, said)
        return images, self.prompts.zoomed.replace("{mark}", mark) + text if zoomed else text

    def _confidences(self, asked: Sequence[tuple[Any, str]]) -> list[float]:
        return [confidence(float(yes), float(no)) for yes, no in self.speaker.logits_each(asked, self.words)]

    # Searching

    def look_for(self, image: Any, cue: str, question: str, alone: bool = True, mark: str = "red") -> Search:
        """Search one thing: the box from which ``question`` can be answered.

        Args:
            image: the picture.
            cue: the thing.
            question: what is to be answered about it.
            alone: it is the only thing; otherwise the search goes on to the deepest level.
            mark: colour of the frame.
        """
        picture = to_picture(image)
        tree = self._tree(picture)
        deepest, local = min(tree.depth, self.max_depth), self.settings.view == "local"

        def answering(node: Node) -> float:
            asked = self._question(self._shown(picture, node, mark), "answerable", question, mark)
            return self._confidences([asked])[0]

        def priority(nodes: Sequence[Node]) -> list[float]:
            shown = [self._shown(picture, node, mark) for node in nodes]
            asked = [self._question(images, kind, cue, mark) for images in shown for kind in ("exists", "latent")]
            found = self._confidences(asked)
            weights = [depth_weight(node.depth, deepest, self.settings.bias) for node in nodes]
            return [w * found[2 * i] + (1 - w) * found[2 * i + 1] for i, w in enumerate(weights)]

        s = self.settings
        return best_first(
            tree, answering, priority, upper=s.upper, lower=s.lower, steps=s.steps, limit=s.pops * deepest,
            more=s.more, max_depth=self.max_depth, to_bottom=not alone, skip_root=local and not alone, batched=True,
        )  # fmt: skip

    def look_for_all(self, image: Any, cue: str, mark: str = "red") -> list[Node]:
        """All boxes of the first levels that show a thing."""
        picture = to_picture(image)

        def exists(node: Node) -> float:
            return self._confidences([self._question(self._shown(picture, node, mark), "exists", cue, mark)])[0]

        return post_order(self._tree(picture), exists, self.settings.threshold, min(self.all_depth, self.max_depth))

    def _tree(self, picture: Picture) -> Tree:
        size = (picture.shape[0], picture.shape[1])
        return Tree(size, self.leaf, split=self.split, max_depth=self.max_depth, small=self.small)

    def things(self, question: str) -> list[str]:
        """What must be looked at for a question; none for the plain answer."""
        if self.cues is not None:
            given = self.cues(question)
            if isinstance(given, str) or not all(isinstance(cue, str) and cue.strip() for cue in given):
                raise TypeError(f"cues must give a list of things, e.g. ['red car'], got {describe(given)}")
            return [cue for cue in given if not _pronoun(cue)]
        talk = []
        for asked, answered in self.prompts.examples:
            talk += [("user", self.prompts.cues.replace("{question}", asked)), ("assistant", answered)]
        said = self.speaker.ask(None, [*talk, ("user", self.prompts.cues.replace("{question}", question))])
        found = read_cues(said, self.prompts.found)
        if found is None and self.unread == "refuse":
            raise ValueError(
                f"the model listed no things for {question!r}: {said!r:.200} has no {self.prompts.found!r}"
            )
        return found or []

    # Answering

    def answer(self, image: Any, question: str, options: Sequence[str] | None = None) -> Answer:
        """Answer a question about a picture.

        Args:
            image: one picture, see :func:`attnlib.look.pixels.to_picture`.
            question: what is asked.
            options: possible answers: the one that the model finds likeliest is given.

        Returns:
            An :class:`Answer`; a tree of one node, no things to look for or nothing found give the plain model's.

        Raises:
            ValueError: a picture of one pixel or, unless ``small="root"``, smaller than a leaf; an empty question.
        """
        check_type("question", question, str, "a string")
        check_text("question", question)
        if isinstance(image, (list, tuple)):
            raise TypeError(f"image must be one picture, got {len(image)} in a {type(image).__name__}")
        picture = to_picture(image)
        with self.speaker.counting() as calls:
            nodes, cues, searches, mark = self._find(picture, question)
            images: tuple[Picture, ...] = (picture,)
            text, shown = question, [node.box for node in nodes]
            whole = any(node.is_root for node in nodes) if self.settings.view == "global-local" else len(nodes) == 1
            if not nodes or (whole and nodes[0].is_root) or (whole and self.settings.view == "global-local"):
                shown = []
            else:
                images = self.views(picture, shown, mark)
                if len(images) > 1:
                    text = self.prompts.zoomed.replace("{mark}", mark) + question
            choice = None
            if options is None:
                said = self.speaker.ask(images, text)
            else:
                choice = int(self.speaker.score(images, text, options).argmin())
                said = options[choice]
        return Answer.of(
            said, boxes=tuple(shown), cues=tuple(cues), searches=tuple(searches), views=images, calls=calls,
            choice=choice,
        )  # fmt: skip

    def _find(self, picture: Picture, question: str) -> tuple[list[Node], list[str], list[Search], str]:
        mark = "blue" if "red rectangle" in question.lower() or "red frame" in question.lower() else "red"
        tree = self._tree(picture)
        if tree.is_one_node:
            return [], [], [], mark
        cues = self.things(question)
        if len(cues) > 1 and self.settings.view == "global-local":
            single = [cue for cue in cues if not cue.startswith("all ")]
            seen = self._shown(picture, tree.root, mark, full=False)
            asked = [self._question(seen, "answerable", self._about(cue), mark) for cue in single]
            if any(c >= self.settings.upper for c in self._confidences(asked)):
                return [], cues, [], mark  # some of it can be seen from afar already
        alone = len(cues) == 1 and not cues[0].startswith("all ")
        nodes: list[Node] = []
        searches: list[Search] = []
        for cue in cues:
            if cue.startswith("all "):
                nodes += self.look_for_all(picture, cue[4:].removesuffix("s"), mark)
                continue
            search = self.look_for(picture, cue, question if alone else self._about(cue), alone, mark)
            searches.append(search)
            nodes += sorted(search.found, key=lambda node: -node.depth)[:1]
        return nodes, cues, searches, mark

    def _about(self, cue: str) -> str:
        return self.prompts.appearance.replace("{cue}", cue)


__all__ = [
    "Answer",
    "FAMILIES",
    "PRONOUNS",
    "ZOOM_SETTINGS",
    "ZoomEye",
    "ZoomPrompts",
    "ZoomSettings",
    "confidence",
    "depth_weight",
    "read_cues",
]
