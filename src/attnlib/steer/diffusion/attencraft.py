"""AttenCraft: several concepts are learnt from one image, each token from its own part of it.

Attention of the model itself says where each concept is. With cross maps ``C_k`` of the tokens of concepts and of the
token that begins the text (the background), resized to the grid of the self map S, stretched over [0, 1] by ``r``,

    ``P = r(r(S)^4),  M_k = r(P r(C_k^2)),  place p is of k where M_k - M_j > threshold for all j,``

which gives a mask ``B_k`` for each. While the model learns (:class:`attnlib.steer.Personalize`), prompts name some of
the concepts, noise is compared in the masks of those alone, and the maps of their tokens are pulled to them:

    ``mean_k JS(softmax(r(C_k) / temperature), softmax(B_k / temperature))`` over places, at most ln 2.

A softmax of values in [0, 1] over a thousand places is nearly flat, so that the released temperature of 1 gives about
0.01 whatever the maps; lower ones tell them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_int, check_ints, check_real, shaped
from ...models.losses import local_similarity
from .maps import js, normalize, of_spans, resized
from .personalize import Example, Personalize, Seen, Term
from .prompts import find, holds


@shaped(between="float (N, h, w)")
def affinity(between: Tensor, power: int = 4) -> Tensor:
    """(N, N) of query, then key place: a self map stretched over [0, 1], its matrix power stretched again.

    Args:
        between: of key, then query place, as ``Maps(of="image")`` gives it.
        power: of the matrix.
    """
    check_int("power", power, least=1)
    h, w = between.shape[1:]
    if between.shape[0] != h * w:
        raise ValueError(f"between must hold {h * w} places for maps of {h} x {w}, got {tuple(between.shape)}")
    rows = normalize(between.flatten(1).T, "range")
    return normalize(torch.linalg.matrix_power(rows, power), "range")


@shaped(maps="float (K, h, w)", between="float (N, H, W)")
def refined(maps: Tensor, between: Tensor, power: int = 4, square: bool = True) -> Tensor:
    """(K, H, W) maps in [0, 1], spread over places that belong together.

    Args:
        maps: cross maps as they are, of any size; they are resized to that of ``between`` (bicubic).
        between: see :func:`affinity`.
        power: see :func:`affinity`.
        square: the resized maps are squared before they are stretched, as in the released code.
    """
    h, w = between.shape[1:]
    maps = resized(maps, (h, w))
    maps = normalize(maps.square() if square else maps, "range")
    return normalize((affinity(between, power) @ maps.flatten(1).T).T.unflatten(1, (h, w)), "range")


@shaped(maps="float (K, h, w)")
def assign(maps: Tensor, threshold: float = 0.1) -> Tensor:
    """(K, h, w) boolean masks: places where one map is above all others by more than ``threshold``; others have none.

    >>> assign(torch.tensor([[[0.9, 0.5]], [[0.1, 0.45]]])).tolist()
    [[[True, False]], [[False, False]]]
    """
    check_real("threshold", threshold, least=0)
    k = len(maps)
    if k < 2:
        raise ValueError(f"maps must be of two things at least, a background being one, got {k}")
    apart = maps[:, None] - maps[None]
    apart[range(k), range(k)] = torch.inf
    return (apart > threshold).all(1)


@shaped(maps="float (K, h, w)", masks="tensor (K, h, w)")
def match(maps: Tensor, masks: Tensor) -> list[int]:
    """For each mask the map that it holds most of.

    >>> match(torch.eye(2)[:, None], torch.eye(2).flip(0)[:, None])
    [1, 0]
    """
    held = torch.einsum("chw,khw->ck", masks.to(maps), maps)
    return [int(k) for k in held.argmax(1)]


@shaped(a="float (h, w)", b="float (h, w)")
def ssim(a: Tensor, b: Tensor, window: int = 7) -> float:
    """Structural similarity of two pictures in [0, 1]: flat windows, inside only, sample covariances.

    >>> ssim(torch.eye(8), torch.eye(8))
    1.0
    """
    check_int("window", window, least=3, most=min(a.shape))
    a, b = a.double(), b.double()
    count = window**2

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[None], window, 1)[0]

    return float(local_similarity(a, b, mean, share=count / (count - 1)).mean())


@shaped(maps="float (K, h, w)", masks="tensor (K, h, w)")
def pull(maps: Tensor, masks: Tensor, temperature: float = 1.0) -> Tensor:
    """(K,) Jensen-Shannon divergence of maps and masks, both a softmax over places; 0 to ln 2.

    >>> masks = torch.eye(2)[None]
    >>> pull(masks, masks).item(), round(pull(masks, 1 - masks, 0.01).item(), 4)
    (0.0, 0.6931)
    """
    check_real("temperature", temperature, above=0)
    h, w = maps.shape[1:]
    p, q = ((x.flatten(1) / temperature).softmax(1).unflatten(1, (h, w)) for x in (maps, masks.to(maps)))
    return js(p, q)


class AttenCraft(Term):
    """The term of AttenCraft, with its masks of the noise and its prompts.

    ::

        craft = AttenCraft({"<new1>": "<new1> cat", "<new2>": "<new2> dog"})
        learner = Personalize(pipe, {"<new1>": "cat", "<new2>": "dog"}, terms=[craft])
        learner.fit([Example(image, craft.prompt())], steps=500, lr=5e-5)

    Args:
        concepts: the modifier of each concept, and the phrase that names it in a prompt. A phrase of several tokens has
            the largest of their maps where masks are made, and the modifier alone is pulled.
        template: of prompts, ``{}`` for the phrases.
        joiner: between phrases.
        threshold: how far a map must be above all others.
        guard: new masks are taken if each is at least so similar (:func:`ssim`) to the one before.
        every: at every so many steps all concepts are named and masks are made anew.
        temperature: see :func:`pull`.
        subsets: which concepts prompts name, and how often: ``{(0,): 1, (0, 1): 2}``; any of them alike by default.
        warmup: timesteps, from and up to, at which the first masks are made.
        power: see :func:`affinity`.
        resolution: of cross maps and of self maps.
        layers: whose maps, see :class:`attnlib.hooks.Maps`.
        weight: what the term counts.

    Raises:
        ValueError: before the first step, masks that cannot be told apart or are empty; another image than the first.

    The gradient reaches keys, not values, since maps have none of these. Reweighted sampling (the paper's, of a concept
    that learns slowly) is not in the released code; ``subsets`` gives any weights.

    Reference: Shentu et al., 2024, arXiv 2405.17965; held to the functions in the authors' train.py.

    >>> AttenCraft({"<new1>": "<new1> cat", "<new2>": "<new2>"}).prompt()
    'a photo of <new1> cat and <new2>'
    """

    name: ClassVar[str] = "attencraft"
    detached = ("image",)

    def __init__(
        self,
        concepts: Mapping[str, str],
        template: str = "a photo of {}",
        joiner: str = " and ",
        threshold: float = 0.1,
        guard: float = 0.8,
        every: int = 20,
        temperature: float = 1.0,
        subsets: Mapping[tuple[int, ...], float] | None = None,
        warmup: tuple[int, int] = (0, 300),
        power: int = 4,
        resolution: tuple[int, int] = (16, 32),
        layers: Sequence[int | str] | None = None,
        weight: float = 1.0,
    ):
        if isinstance(concepts, str) or not isinstance(concepts, Mapping) or not concepts:
            raise TypeError(
                f"concepts must give each modifier its phrase: {{'<new1>': '<new1> cat'}}, got {concepts!r:.80}"
            )
        for modifier, phrase in concepts.items():
            find(phrase, modifier)
        if template.count("{}") != 1:
            raise ValueError(f"template must hold {{}} once, got {template!r}")
        self.concepts, self.template, self.joiner = dict(concepts), template, joiner
        self.threshold = check_real("threshold", threshold, least=0)
        self.guard = check_real("guard", guard, most=1)
        self.every = check_int("every", every, least=1)
        self.temperature = check_real("temperature", temperature, above=0)
        self.weight = check_real("weight", weight)
        self.power = check_int("power", power, least=1)
        if not 0 <= warmup[0] < warmup[1]:
            raise ValueError(f"warmup must be two timesteps, 0 <= from < to, got {warmup}")
        self.warmup, self.layers = warmup, layers
        self.reads = {"text": resolution[0], "image": resolution[1]}
        count = len(concepts)
        if subsets is None:
            subsets = {s: 1.0 for n in range(1, count + 1) for s in itertools.combinations(range(count), n)}
        for some, often in subsets.items():
            known = isinstance(some, tuple) and set(some) <= set(range(count))
            if not known or not some or len(set(some)) < len(some):
                raise ValueError(f"subsets holds {some!r}, no tuple of numbers; concepts are numbered 0 to {count - 1}")
            check_real("subsets", often, least=0)
        if not sum(subsets.values()) > 0:
            raise ValueError("subsets gives no set of concepts a weight above 0")
        self.subsets = dict(subsets)
        #: (K + 1, h, w) of each concept and of the background, once they are made.
        self.masks: Tensor | None = None
        self._image: Tensor | None = None

    def prompt(self, some: Sequence[int] | None = None) -> str:
        """The prompt that names some of the concepts, by number; all by default."""
        phrases = list(self.concepts.values())
        some = None if some is None else check_ints("some", some, least=0, most=len(phrases) - 1)
        return self.template.format(self.joiner.join(phrases if some is None else [phrases[i] for i in some]))

    # ---- masks

    def segment(self, text: Tensor, between: Tensor, modifiers: Sequence[Any], phrases: Sequence[Any]) -> Tensor | None:
        """(K + 1, h, w) masks of concepts and background; ``None`` if they cannot be told apart.

        Args:
            text: (T, h, w) of each token.
            between: (h w, h, w).
            modifiers, phrases: tokens of each.
        """
        cross = torch.stack(
            [
                text[list(phrase)].amax(0) if len(phrase) > 1 else of_spans(text, [modifier])[0]
                for modifier, phrase in zip([*modifiers, [0]], [*phrases, [0]], strict=True)
            ]
        )
        maps = refined(cross, between, self.power)
        found = assign(maps, self.threshold)
        owners = match(maps, found)
        if sorted(owners) != list(range(len(owners))) or not bool(found[:-1].flatten(1).any(1).all()):
            return None
        return found[[owners.index(k) for k in range(len(owners))]].to(maps.dtype)

    def _segment(self, seen: Seen, row: int) -> Tensor | None:
        modifiers = [seen.span(row, modifier) for modifier in self.concepts]
        phrases = [seen.span(row, phrase) for phrase in self.concepts.values()]
        if any(span is None for span in [*modifiers, *phrases]):
            return None
        text, between = seen.maps["text"][row].detach(), seen.maps["image"][row].detach()
        return self.segment(text, between, modifiers, phrases)

    def looks(self, step: int) -> tuple[str, ...]:
        return ("text",) if step % self.every else ("text", "image")

    def begin(self, learner: Personalize, examples: list[Example], generator: torch.Generator) -> None:
        shown = [replace(e, prompt=self.prompt()) for e in examples if not e.prior][:1]
        if not shown:
            raise ValueError("AttenCraft makes its masks of an example, and the first step has priors alone")
        at = torch.randint(*self.warmup, (1,), generator=generator)
        seen = learner.look(shown, at, generator)[learner.terms.index(self)]
        masks = self._segment(seen, 0)
        if masks is None:
            raise ValueError(
                f"AttenCraft cannot tell the concepts {list(self.concepts)} apart in the maps of the image (threshold="
                f"{self.threshold}, timestep {int(at)}); change threshold or warmup"
            )
        self.masks = masks

    def choose(self, examples: list[Example], step: int, generator: torch.Generator) -> list[Example]:
        chosen = []
        sets, often = list(self.subsets), torch.tensor(list(self.subsets.values()))
        for e in examples:
            if e.prior:
                chosen.append(e)
                continue
            if self._image is None:
                self._image = e.image
            if e.image is not self._image and not torch.equal(e.image, self._image):
                raise ValueError("AttenCraft learns from one image, whose masks it keeps; examples holds another")
            some: Sequence[int] | None = None
            if step % self.every:
                some = sets[int(torch.multinomial(often, 1, generator=generator))]
                some = [some[i] for i in torch.randperm(len(some), generator=generator).tolist()]
            chosen.append(replace(e, prompt=self.prompt(some)))
        return chosen

    def _named(self, example: Example) -> list[int]:
        return [k for k, word in enumerate(self.concepts) if word in example.spans or holds(example.prompt, word)]

    def inside(self, examples: Sequence[Example], size: tuple[int, int]) -> Tensor | None:
        assert self.masks is not None
        unions = []
        for e in examples:
            named = self._named(e)
            unions.append(self.masks[named].amax(0) if named else torch.ones_like(self.masks[0]))
        return resized(torch.stack(unions), size)

    # ---- the term

    def __call__(self, seen: Seen) -> Tensor:
        assert self.masks is not None
        size = (self.masks.shape[1], self.masks.shape[2])
        rows = []
        for row, example in enumerate(seen.examples):
            named = self._named(example)
            spans = [seen.span(row, modifier) for modifier in self.concepts]
            tokens = [span for k in named if (span := spans[k]) is not None]
            maps = normalize(resized(of_spans(seen.maps["text"][row], [*tokens, [0]]), size), "range")
            masks = self.masks[[*named, len(self.concepts)]]
            rows.append(pull(maps, masks.to(maps), self.temperature).mean())
        return torch.stack(rows).mean()

    def after(self, seen: Seen) -> None:
        if seen.step % self.every:
            return
        new = self._segment(seen, 0)
        if new is None or self.masks is None:
            return
        if all(ssim(a, b) >= self.guard for a, b in zip(new[:-1], self.masks[:-1], strict=True)):
            self.masks = new

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks = state["masks"]
