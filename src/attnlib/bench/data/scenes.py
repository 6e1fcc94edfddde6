"""Generated scenes with questions about them, and the small multimodal model that was trained to answer.

A scene is a picture of 64 × 64 pixels: on a grid of four by four cells of 2 × 2 patches stand coloured shapes and real
handwritten digits of one patch (those of scikit-learn; a held-out quarter appears in test scenes only), some of them
faint, under noise. Every answer follows from the list of things in the scene, not from the picture.

Some things come in pairs: where there is a red circle, a blue square usually stands in the next cell, and now and then
it is there but cannot be seen. A model learns that too, and then names blue squares that are not there.
``pairs="broken"`` makes scenes with the first thing of a pair and without the second, on which such hallucinations can
be counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...types import check_choice
from .files import digits

GRID, CELL, PATCH = 4, 16, 8
SIDE = GRID * CELL
#: Visual tokens of a picture.
PATCHES = (SIDE // PATCH) ** 2

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.25),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (0.95, 0.9, 0.15),
    "purple": (0.75, 0.2, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross")
SHAPED = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
NUMBERED = tuple(f"digit {n}" for n in range(10))
#: Everything that can stand in a cell, in two words, so that what is learnt of a colour serves all of its shapes.
NAMES = (*SHAPED, *NUMBERED)
#: Things that come together in the training scenes.
PAIRS = (("red circle", "blue square"), ("green triangle", "yellow cross"), ("purple square", "red triangle"))
#: Names of the cells.
PLACES = tuple(f"{row}{column}" for row in "abcd" for column in "1234")
#: Kinds of questions.
KINDS = ("presence", "colour", "count", "position", "content", "digit", "list")

#: Who a scene is for. Scenes to stop a training by are written in training's hand; test scenes in another one.
PARTS = ("train", "test", "dev")
#: Test scenes from this number on were looked at by nobody while the model was made.
FRESH = 1_000_000

#: How often the second thing of a pair stands beside the first, and how often a thing is faint.
TOGETHER, FAINT = 0.9, 0.12
#: How often the second thing of a pair is there and all but invisible: what captions tell and pictures do not show.
GHOST = 0.06
BACKGROUND, NOISE = 0.12, 0.1


@dataclass(frozen=True)
class Thing:
    """One thing: its name, its cell (row * 4 + column), how much it stands out, and how it is drawn."""

    name: str
    cell: int
    contrast: float
    shift: tuple[int, int]
    sample: int

    @property
    def place(self) -> str:
        """Where it stands.

        >>> Thing("red circle", 6, 1.0, (0, 0), 0).place
        'b3'
        """
        return PLACES[self.cell]


@dataclass(frozen=True)
class Question:
    """A question about a scene; ``about`` is the thing or place it asks for, ``kind`` one of :data:`KINDS`."""

    kind: str
    text: str
    answer: str
    about: str = ""


@dataclass(frozen=True)
class Scene:
    """A picture (3, 64, 64) in [0, 1] and the things in it, in reading order."""

    things: tuple[Thing, ...]
    image: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.things)


# --------------------------------------------------------------------------------------------------------------------
# Pictures


@functools.lru_cache(maxsize=1)
def _digit_images() -> dict[str, list[list[np.ndarray]]]:
    """Per part and digit, pictures of 8 × 8: one patch."""
    found: dict[str, list[list[np.ndarray]]] = {}
    for part, (images, labels) in zip(("train", "test"), (digits().train, digits().test), strict=True):
        flat = images[..., 0].numpy()
        found[part] = [[flat[i] for i in np.flatnonzero(labels.numpy() == n)] for n in range(10)]
    return found


@functools.lru_cache(maxsize=256)
def _shape(name: str, dy: int, dx: int, radius: int) -> np.ndarray:
    """(16, 16) coverage of a shape in its cell."""
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32)
    y, x = y - (CELL - 1) / 2 - dy, x - (CELL - 1) / 2 - dx
    if name == "circle":
        inside = y**2 + x**2 <= (radius + 0.3) ** 2
    elif name == "square":
        inside = np.maximum(abs(y), abs(x)) <= radius * 0.9
    elif name == "triangle":
        inside = (abs(x) <= (y + radius) * 0.55) & (y <= radius * 0.9)
    else:
        inside = (np.minimum(abs(y), abs(x)) <= radius * 0.35) & (np.maximum(abs(y), abs(x)) <= radius)
    return inside.astype(np.float32)


def coverage(thing: Thing) -> np.ndarray:
    """(16, 16) the pixels of its cell that a shape covers, 0 or 1; digits have no such mask."""
    first, shape = thing.name.split()
    check_choice("thing", first, tuple(COLOURS))
    return _shape(shape, *thing.shift, 5 + thing.sample % 3)


def stamp(image: np.ndarray, thing: Thing, top: int, left: int, part: str) -> None:
    """Paint a thing into ``image`` (3, H, W), in place, in the cell that begins at ``(top, left)``."""
    first, second = thing.name.split()
    if first == "digit":
        samples = _digit_images()["test" if part == "test" else "train"][int(second)]
        cover = np.zeros((CELL, CELL), dtype=np.float32)
        y, x = PATCH * (thing.sample // 2 % 2), PATCH * (thing.sample % 2)
        cover[y : y + PATCH, x : x + PATCH] = samples[thing.sample // 4 % len(samples)]
        colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    else:
        cover = coverage(thing)
        colour = COLOURS[first]
    cell = image[:, top : top + CELL, left : left + CELL]
    cell += thing.contrast * cover * (np.asarray(colour, dtype=np.float32)[:, None, None] - cell)


def _draw(things: Sequence[Thing], part: str, noise: np.ndarray) -> Tensor:
    image = np.full((3, SIDE, SIDE), BACKGROUND, dtype=np.float32)
    for thing in things:
        stamp(image, thing, thing.cell // GRID * CELL, thing.cell % GRID * CELL, part)
    return torch.from_numpy(np.clip(image + noise, 0.0, 1.0))


def make_scene(seed: int, part: str = "train", pairs: str = "usual", noise: float = NOISE) -> Scene:
    """The scene of a number; the same number gives the same scene.

    Args:
        seed: number of the scene.
        part: one of :data:`PARTS`.
        pairs: ``"usual"``, as in training; ``"broken"``, the first thing of a pair without the second.
        noise: standard deviation of the noise.

    Returns:
        A :class:`Scene`.

    Raises:
        ValueError: an unknown part or rule of pairs, a negative seed or noise.

    >>> make_scene(0).image.shape
    torch.Size([3, 64, 64])
    """
    check_choice("part", part, PARTS)
    check_choice("pairs", pairs, ("usual", "broken"))
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    key = [seed, PARTS.index(part), ("usual", "broken").index(pairs)]
    rng = np.random.default_rng(key)
    chance, share = np.random.default_rng([*key, 1]).random(2)
    unseen: str | None = None
    names: list[str] = []
    cells: list[int] = []
    absent: list[str] = []
    if pairs == "broken" or rng.random() < 0.6:
        leader, partner = PAIRS[rng.integers(len(PAIRS))]
        names.append(leader)
        cells.append(int(rng.integers(GRID * GRID - 1)))
        if pairs == "usual" and rng.random() < TOGETHER:
            names.append(partner)
            cells.append(cells[0] + 1)
            unseen = partner if chance < GHOST else None
        else:
            absent.append(partner)
    if rng.random() < 0.6:
        names.append(NUMBERED[rng.integers(10)])
    leaders = [a for a, _ in PAIRS]
    others = [name for name in SHAPED if name not in (*names, *absent, *leaders)]
    names += [others[i] for i in rng.permutation(len(others))[: rng.integers(1, 4)]]
    free = [cell for cell in rng.permutation(GRID * GRID).tolist() if cell not in cells]
    cells += free[: len(names) - len(cells)]
    things = []
    for name, cell in zip(names, cells, strict=True):
        contrast = rng.uniform(0.1, 0.3) if rng.random() < FAINT else rng.uniform(0.6, 1.0)
        if name == unseen:
            contrast = 0.01 + 0.05 * share
        shift = (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
        things.append(Thing(name, cell, float(contrast), shift, int(rng.integers(1 << 20))))
    things.sort(key=lambda thing: thing.cell)
    grain = rng.standard_normal((3, SIDE, SIDE), dtype=np.float32) * noise
    return Scene(tuple(things), _draw(things, part, grain))


def pixel_values(scenes: Sequence[Scene]) -> Tensor:
    """(B, 3, 64, 64) as the vision tower reads it."""
    return (torch.stack([scene.image for scene in scenes]) - 0.5) * 2


# --------------------------------------------------------------------------------------------------------------------
# Questions


def presence(scene: Scene, name: str) -> Question:
    """Is there such a thing?"""
    return Question("presence", f"is there a {name} ?", "yes" if name in scene.names else "no", name)


def questions(scene: Scene, kind: str) -> list[Question]:
    """All questions of a kind that have one answer in this scene.

    Args:
        scene: a scene.
        kind: one of :data:`KINDS`.

    Returns:
        Questions, none when nothing of the kind can be asked.

    >>> questions(make_scene(0), "list")[0].text
    'list the objects'
    """
    check_choice("kind", kind, KINDS)
    found = []
    if kind == "presence":
        return [presence(scene, name) for name in NAMES]
    if kind == "list":
        return [Question(kind, "list the objects", " , ".join(scene.names))]
    if kind == "position":
        return [Question(kind, f"where is {t.name} ?", f"it is in {t.place}", t.name) for t in scene.things]
    if kind == "content":
        there = {t.cell: t.name for t in scene.things}
        for cell, place in enumerate(PLACES):
            found.append(Question(kind, f"what is in {place} ?", f"it is {there.get(cell, 'nothing')}", place))
        return found
    if kind == "digit":
        held = [name for name in scene.names if name.startswith("digit")]
        return [Question(kind, "which digit is there ?", f"it is {held[0].split()[1]}", held[0])] if held else []
    shaped = [name.split() for name in scene.names if not name.startswith("digit")]
    for shape in SHAPES:
        colours = [c for c, s in shaped if s == shape]
        if kind == "count":
            found.append(Question(kind, f"how many {shape} ?", f"there are {len(colours)}", shape))
        elif len(colours) == 1:
            found.append(Question(kind, f"what colour is the {shape} ?", f"it is {colours[0]}", shape))
    return found


def ask(scene: Scene, rng: np.random.Generator, count: int = 7) -> list[Question]:
    """Some questions on a scene as in training: kinds in turn, half of the presence questions true, no thing twice.

    Of cells, those that hold something are asked for three times out of four. When a kind has nothing left to ask for,
    others take its turn.

    >>> len(ask(make_scene(0), np.random.default_rng(0), 24))
    24
    """
    left = {kind: questions(scene, kind) for kind in KINDS}
    picked: list[Question] = []
    while len(picked) < count and any(left.values()):
        kinds = [*rng.permutation([kind for kind in KINDS if kind != "presence"]).tolist(), "presence"]
        for kind in rng.permutation(kinds).tolist()[: count - len(picked)]:
            possible = left[kind]
            if kind in ("presence", "content"):
                wanted = rng.random() < (0.5 if kind == "presence" else 0.75)
                possible = [q for q in possible if (q.answer not in ("no", "it is nothing")) == wanted] or possible
            if possible:
                chosen = possible[rng.integers(len(possible))]
                picked.append(chosen)
                left[kind] = [q for q in left[kind] if q is not chosen]
    return picked


# --------------------------------------------------------------------------------------------------------------------
# Words

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<q>", "<a>")
WORDS = "is there a ? yes no what colour the it how many are where in nothing which digit list objects ,".split()


def make_tokenizer() -> Any:
    """One token per word and place (a ``PreTrainedTokenizerFast``), padded on the left."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIAL, *WORDS, *COLOURS, *SHAPES, *map(str, range(10)), *PLACES)
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>", "<q>", "<a>"], padding_side="left",
    )  # fmt: skip


def prompt(question: str) -> str:
    """What the model reads before it answers: the picture, then the question."""
    return f"<s> {'<image> ' * PATCHES}<q> {question} <a>"


# --------------------------------------------------------------------------------------------------------------------
# The model


def weights_folder() -> Path:
    """Where a checkout of the repository keeps the trained model."""
    return Path(__file__).resolve().parents[4] / "examples" / "multimodal" / "weights"


def load_model(folder: Path | str | None = None) -> tuple[Any, Any]:
    """The trained model and its tokenizer.

    Args:
        folder: where they are; ``None`` for the repository's own.

    Returns:
        ``(LlavaForConditionalGeneration, PreTrainedTokenizerFast)``, in evaluation mode, float32.

    Raises:
        FileNotFoundError: there is no trained model in the folder.
    """
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    folder = weights_folder() if folder is None else Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no trained model in {folder}; examples/multimodal/train.py makes one, "
            "and a checkout of the repository has it in examples/multimodal/weights"
        )
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_null_image(folder: Path | str | None = None) -> Tensor:
    """(64, C) what the model learned to take for no picture at all, see :class:`attnlib.steer.NullImage`."""
    from safetensors.torch import load_file

    return load_file((weights_folder() if folder is None else Path(folder)) / "null_image.safetensors")["embedding"]


@dataclass(frozen=True)
class Item:
    """A question on a scene."""

    scene: Scene
    question: Question


def batches(items: Sequence[Item], tokenizer: Any, size: int = 64) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Prompts of equal length together, so that no row needs padding: their places in ``items`` and the inputs."""
    ids = [tokenizer(prompt(item.question.text))["input_ids"] for item in items]
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        lengths.setdefault(len(row), []).append(i)
    for length in sorted(lengths):
        for start in range(0, len(lengths[length]), size):
            chosen = lengths[length][start : start + size]
            rows = torch.tensor([ids[i] for i in chosen])
            yield (
                chosen,
                {
                    "input_ids": rows,
                    "attention_mask": torch.ones_like(rows),
                    "pixel_values": pixel_values([items[i].scene for i in chosen]),
                },
            )


def answer(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    size: int = 64,
    generate: Callable[..., Tensor] | None = None,
    max_new_tokens: int = 28,
) -> list[str]:
    """What the model answers, greedily.

    Args:
        model: the model, with or without something attached.
        tokenizer: its tokenizer.
        items: questions on scenes.
        size: prompts per batch.
        generate: ``generate(**inputs, ...)`` to use instead of ``model.generate``.
        max_new_tokens: longest answer.

    Returns:
        Answers in the order of ``items``.
    """
    found = [""] * len(items)
    run = model.generate if generate is None else generate
    for chosen, inputs in batches(items, tokenizer, size):
        with torch.no_grad():
            out = run(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            found[i] = text
    return found


def named(text: str) -> list[str]:
    """Things that an answer to "list the objects" names.

    >>> named("red circle , digit 7 , red circle")
    ['red circle', 'digit 7']
    """
    return [name for name in dict.fromkeys(part.strip() for part in text.split(",")) if name in NAMES]
