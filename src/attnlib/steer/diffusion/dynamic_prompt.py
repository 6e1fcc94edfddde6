"""Dynamic prompt learning: nouns of a prompt are learnt anew at each step, so that their maps stay on their objects.

With ``A_k`` the map of noun k, mean over heads and layers of one resolution, three losses of the nouns of a prompt

    ``L_at = max_k (1 - max(G * softmax_tokens(100 A)_k))``, G a blur,
    ``L_bg = mean_k cos(A_k, background)``,
    ``L_dj = mean_(i > j) cos(A_i, A_j)``

are made small until each is below its threshold ``beta exp(-i / alpha)`` at step i (:class:`DynamicPrompt`). With a
path of an inversion, the embedding of the empty prompt is learnt at each step, too, so that guided sampling comes back
to the image; what was learnt is handed to an edit by :class:`LearntPrompt`.

::

    learn = DynamicPrompt(("cat", "dog"), background=mask, path=path)
    with attnlib.attach(pipe, learn):
        pipe("a cat and a dog", latents=path[-1], num_inference_steps=50)
    with attnlib.attach(pipe, LearntPrompt.of(learn), PromptToPrompt("replace")):
        pipe(["a cat and a dog", "a lion and a dog"], latents=..., num_inference_steps=50)

Where masks of the objects are known, from a segmenter or a detector, :class:`LocatedPrompt` learns nouns that look at
them, by losses of its own:

    ``L_in = mean_k (1 - cos(A_k, M_k))`` (of boxes ``mean_k cos(A_k, 1 - M_k)``),
    ``L_out = mean_k sum (1 - M_k) A_k / sum A_k``,    ``L_adj = mean_k (1 - cos(A_k, A_adjective))``,

and, if wanted, the divergence of sums over rows and columns, and ``L_dj``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_flag, check_int, check_real, check_tensors, check_type, shaped
from ...hooks.denoiser import CallSite, rows_of, rows_of_guidance, step_of
from ...hooks.intervention import Intervention
from .invert import NullText, fresh, null_step
from .losses import TokenUpdate, _Tokens, check_words
from .maps import cosine, of_spans, over_words, smooth
from .prompts import find, holds


@shaped(maps="float (T, h, w)")
def balance(
    maps: Tensor, spans: Sequence[Sequence[int]], sigma: float = 0.5, sharpness: float = 100.0, how: str = "max",
    compat: str | None = None,
) -> Tensor:  # fmt: skip
    """How far the peak of the least (``how="max"``) or the mean noun is from 1.

    Args:
        maps: (T, h, w) weights of all tokens.
        spans: the tokens of each noun.
        sigma: of the blur over 3 x 3 places; 0 for none.
        sharpness: of the softmax over tokens, without the first and the last.
        how: ``"max"`` or ``"mean"`` over nouns.
        compat: ``"authors"`` for their blur, whose exponent is half of a Gaussian's, of sigma times the root of two.
    """
    check_choice("how", how, ("max", "mean"))
    check_choice("compat", compat, (None, "authors"))
    found = of_spans(over_words(maps, sharpness), spans)
    if sigma:
        found = smooth(found, sigma * 2**0.5 if compat == "authors" else sigma)
    each = (1 - found.amax((-2, -1))).clamp(min=0)
    return each.amax() if how == "max" else each.mean()


@shaped(maps="float (K, h, w)")
def disjointness(maps: Tensor) -> Tensor:
    """Mean cosine of the maps of each pair of nouns; 0 of a single one.

    >>> disjointness(torch.eye(2).view(2, 1, 2)).item()
    0.0
    """
    pairs = [cosine(maps[i], maps[j]) for i in range(len(maps)) for j in range(i)]
    return torch.stack(pairs).mean() if pairs else maps.sum() * 0


@shaped(maps="float (K, h, w)", background="float (h, w)")
def leakage(maps: Tensor, background: Tensor) -> Tensor:
    """Mean cosine of the maps of nouns and a mask of the background.

    >>> leakage(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1.0, 0.0]])).item()
    0.0
    """
    return cosine(maps, background.expand_as(maps)).mean()


@torch.no_grad()
@shaped(between="float (M, h, w)", maps="float (K, a, b)")
def background_mask(
    between: Tensor, maps: Tensor, clusters: int = 5, threshold: float = 0.2, seed: int = 0, restarts: int = 10
) -> Tensor:
    """Where no noun looks: (h, w), 1 in clusters of self-attention in which every noun's map is low.

    Places are clustered by k-means of their rows of self-attention; a cluster belongs to the noun whose map, shifted by
    its minimum and divided by its maximum, is largest on average there, and to the background where that is not above
    ``threshold``.

    Args:
        between: (h w, h, w) of ``Maps(of="image")``: key, then query place.
        maps: (K, a, b) of each noun, at sides that divide h and w.
        clusters: how many.
        threshold: see above.
        seed: of the beginnings of k-means.
        restarts: how many beginnings; the best of them is taken.

    Raises:
        ValueError: sides that do not divide, or more clusters than places.
    """
    h, w = between.shape[-2:]
    if between.shape[0] != h * w:
        raise ValueError(f"between must hold {h * w} places for a grid of {h} x {w}, got {between.shape[0]}")
    if h % maps.shape[-2] or w % maps.shape[-1]:
        raise ValueError(f"maps {tuple(maps.shape[-2:])} must divide the grid {h} x {w} of the clusters")
    check_int("clusters", clusters, least=1, most=h * w)
    check_int("restarts", restarts, least=1)
    rows = between.flatten(1).T.double()  # query place, key
    labels = _kmeans(rows, clusters, restarts, torch.Generator().manual_seed(seed)).view(h, w)
    wide = maps.repeat_interleave(h // maps.shape[-2], -2).repeat_interleave(w // maps.shape[-1], -1)
    wide = (wide - wide.amin((-2, -1), keepdim=True).abs()) / wide.amax((-2, -1), keepdim=True).clamp(min=1e-12)
    mask = torch.zeros(h, w, dtype=maps.dtype, device=maps.device)
    for c in range(clusters):
        here = labels == c
        if bool(here.any()) and float(wide[:, here].mean(1).amax()) <= threshold:
            mask[here] = 1.0
    return mask


def _kmeans(rows: Tensor, clusters: int, restarts: int, generator: torch.Generator) -> Tensor:
    """Labels (n,) of the least sum of squares of several runs of Lloyd's algorithm."""
    best, found = float("inf"), torch.zeros(len(rows), dtype=torch.long)
    for _ in range(restarts):
        first = int(torch.randint(len(rows), (1,), generator=generator))
        centres = rows[[first]]
        for _ in range(clusters - 1):  # k-means++
            away = torch.cdist(rows, centres).amin(1).square()
            chance = away if bool(away.sum() > 0) else torch.ones_like(away)
            centres = torch.cat([centres, rows[torch.multinomial(chance.cpu(), 1, generator=generator)]])
        labels = torch.full((len(rows),), -1, device=rows.device)
        for _ in range(100):
            new = torch.cdist(rows, centres).argmin(1)
            if torch.equal(new, labels):
                break
            labels = new
            centres = torch.stack([
                rows[labels == c].mean(0) if bool((labels == c).any()) else centres[c] for c in range(clusters)
            ])  # fmt: skip
        cost = float((rows - centres[labels]).square().sum())
        if cost < best:
            best, found = cost, labels
    return found


#: What masks of objects can be.
MASKS = ("segments", "boxes")


@shaped(maps="float (K, h, w)", masks="float (K, h, w)")
def misplaced(maps: Tensor, masks: Tensor, kind: str = "segments") -> Tensor:
    """How unlike the maps of nouns are to the masks of their objects, by cosines.

    Args:
        maps: of nouns.
        masks: of their objects.
        kind: ``"segments"``, one minus the cosine with the mask, or ``"boxes"``, the cosine with what is around it.

    >>> misplaced(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.0, 1.0]]])).item()
    0.0
    """
    check_choice("kind", kind, MASKS)
    return cosine(maps, 1 - masks).mean() if kind == "boxes" else 1 - cosine(maps, masks).mean()


@shaped(maps="float (K, h, w)", masks="float (K, h, w)")
def outside(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean share of the maps that lies outside their masks.

    >>> outside(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])).item()
    0.25
    """
    return ((maps * (1 - masks)).sum((-2, -1)) / maps.sum((-2, -1))).mean()


@shaped(maps="float (K, h, w)", masks="float (K, h, w)")
def profile_divergence(maps: Tensor, masks: Tensor, eps: float = 1e-5) -> Tensor:
    """Kullback-Leibler divergence of the sums over rows and over columns of maps from those of masks.

    Sums over rows (a number for each column) count half; each is a mean over its entries, of all maps as one
    distribution, as in the authors' code.

    Args:
        maps: of nouns.
        masks: of their objects.
        eps: added to each place.
    """
    total: Any = 0
    for axis, weight in ((-2, 0.5), (-1, 1.0)):
        found, wanted = (t.sum(axis) / t.sum() for t in (maps + eps, masks + eps))
        total = total + weight * F.kl_div(found.log(), wanted, reduction="mean")
    return total


@shaped(nouns="float (K, h, w)", adjectives="float (K, h, w)")
def unbound(nouns: Tensor, adjectives: Tensor) -> Tensor:
    """Mean of one minus the cosine of the map of a noun and that of its adjective.

    >>> unbound(torch.eye(2).view(2, 1, 2), torch.eye(2).view(2, 1, 2)).item()
    0.0
    """
    return 1 - cosine(nouns, adjectives).mean()


#: Losses, in the order in which settings name them.
LOSSES = ("balance", "background", "disjoint")

#: Those of :class:`LocatedPrompt`.
LOCATED = ("misplaced", "outside", "profiles", "disjoint", "unbound")

#: Which of them decide whether a move is made.
DECIDING = ("misplaced", "outside", "unbound")


class DynamicPrompt(TokenUpdate):
    """Learns the nouns of a prompt, and the empty prompt, along an inversion of an image.

    Args:
        words: nouns of the prompt, or numbers of their tokens; one list for all prompts, or a list for each.
        background: (h, w) mask of the background, at any resolution, see :func:`background_mask`; a list of one for
            each prompt. Without it, that loss is left out.
        path: latents of an inversion, the clean ones first; the embedding of the empty prompt is then learnt at each
            step, see :func:`attnlib.steer.diffusion.invert.null_text`.
        weights: of balance, background and disjointness.
        alpha, beta: of their thresholds ``beta exp(-i / alpha)`` at step i; no move is made once all losses are below.
        inner: tries of a step; 21 as in the authors' script. Their function's default of 1 never moves anything.
        lr, weight_decay: of AdamW, torch's own as in their code.
        background_from: step from which the background counts; its threshold is counted from there, too.
        how: ``"max"`` or ``"mean"`` of the nouns' balance.
        sigma: of the blur.
        null_inner, null_lr: moves of the empty prompt's embedding at a step, without stopping early, and their rate.
        steps, resolution, layers: see :class:`attnlib.steer.TokenUpdate`.
        compat: ``"authors"`` for their blur, see :func:`balance`.

    Raises:
        ValueError: as :class:`attnlib.steer.TokenUpdate`; other steps than the path has; more than one image, or no
            guidance, with a path.

    Reference: Wang et al., 2023, arXiv 2309.15664.

    >>> DynamicPrompt(("cat", "dog")).thresholds(0)
    {'balance': 0.3, 'disjoint': 0.9}
    """

    name: ClassVar[str] = "dynamic-prompt-learning"

    def __init__(
        self,
        words: Sequence[Any],
        background: Tensor | Sequence[Tensor] | None = None,
        path: Sequence[Tensor] | None = None,
        weights: Sequence[float] = (1.0, 0.05, 0.05),
        alpha: Sequence[float] = (25.0, 50.0, 25.0),
        beta: Sequence[float] = (0.3, 0.7, 0.9),
        inner: int = 21,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        background_from: int = 0,
        how: str = "max",
        sigma: float = 0.5,
        null_inner: int = 51,
        null_lr: float = 1e-2,
        steps: int | Sequence[int] | None = None,
        resolution: int | Sequence[int] = 16,
        layers: Sequence[int | str] | None = None,
        compat: str | None = None,
    ):
        super().__init__(words, inner, lr, weight_decay, steps, resolution, layers)
        check_choice("how", how, ("max", "mean"))
        check_choice("compat", compat, (None, "authors"))
        for name, three in (("weights", weights), ("alpha", alpha), ("beta", beta)):
            if len(three) != 3:
                raise ValueError(f"{name} must be three numbers, of {', '.join(LOSSES)}; got {three!r}")
        self.weights = tuple(check_real("weights", v, least=0) for v in weights)
        self.alpha = tuple(check_real("alpha", v, above=0) for v in alpha)
        self.beta = tuple(check_real("beta", v) for v in beta)
        self.background = [background] if isinstance(background, Tensor) else background
        if self.background is not None:
            for mask in self.background:
                if mask.dim() != 2 or not bool(mask.any()):
                    raise ValueError(f"background must be masks (h, w) that are not empty, got {tuple(mask.shape)}")
        self.path = None if path is None else check_tensors("path", path, least=2)
        self.background_from = check_int("background_from", background_from, least=0)
        self.sigma = check_real("sigma", sigma, least=0)
        self.null_inner = check_int("null_inner", null_inner, least=0)
        self.null_lr = check_real("null_lr", null_lr, above=0)
        self.how, self.compat = how, compat
        self.empty: list[Tensor] = []

    @property
    def identity(self) -> bool:
        return super().identity and self.path is None

    def thresholds(self, step: int) -> dict[str, float]:
        found = {}
        for n, name in enumerate(LOSSES):
            if name == "background" and (self.background is None or step < self.background_from):
                continue
            late = step - self.background_from if name == "background" else step
            found[name] = self.beta[n] * float(torch.tensor(-late / self.alpha[n], dtype=torch.float64).exp())
        return {name: limit for name, limit in found.items() if self.weights[LOSSES.index(name)]}

    def losses(self, maps: Tensor, spans: list[list[int]], step: int, prompt: int) -> dict[str, tuple[float, Tensor]]:
        nouns, wanted, found = of_spans(maps, spans), self.thresholds(step), {}
        if "balance" in wanted:
            found["balance"] = balance(maps, spans, self.sigma, how=self.how, compat=self.compat)
        if "background" in wanted:
            found["background"] = leakage(nouns, self._background(maps, prompt))
        if "disjoint" in wanted:
            found["disjoint"] = disjointness(nouns)
        return {name: (self.weights[LOSSES.index(name)], loss) for name, loss in found.items()}

    def _background(self, maps: Tensor, prompt: int) -> Tensor:
        assert self.background is not None
        if 1 < len(self.background) <= prompt:
            raise ValueError(f"background holds masks of {len(self.background)} prompts, and there are more")
        mask = self.background[prompt if len(self.background) > 1 else 0]
        return F.interpolate(mask[None, None].to(maps), size=maps.shape[-2:])[0, 0]

    def finish(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        if self.path is None:
            return call(inputs)
        assert site.rows is not None and site.step is not None
        if site.rows != ("uncond", "cond") and site.rows != ("cond", "uncond"):
            raise ValueError(
                f"with a path, DynamicPrompt learns the empty prompt of one image under guidance in one pass, got rows "
                f"{list(site.rows)}"
            )
        if site.steps != len(self.path) - 1:
            raise ValueError(f"path has {len(self.path) - 1} steps, the pipeline takes {site.steps}")
        pipe, context = site.sampling.pipe, inputs["encoder_hidden_states"]
        at, row = site.rows.index("uncond"), site.rows.index("cond")
        if type(pipe.scheduler).__name__ != "DDIMScheduler":
            raise ValueError(f"a path is of DDIM's steps, the pipeline has a {type(pipe.scheduler).__name__}")
        if site.step == 0:
            self.empty = []
        if len(self.empty) == site.step:
            forward, main = fresh(pipe.scheduler, len(self.path) - 1), inputs[site.main]
            under, free = rows_of(inputs, [row], 2), rows_of(inputs, [at], 2)

            def denoise(latents: Tensor, t: Any, text: Tensor) -> Tensor:
                return call({**free, site.main: latents.to(main), "encoder_hidden_states": text})

            with torch.no_grad(), self.session.some_rows([row]):
                cond = call(under)
            with self.session.some_rows([at]):
                learnt = null_step(
                    denoise, forward, site.step, main[at : at + 1], self.path[-2 - site.step].to(main), cond,
                    context[at : at + 1], pipe.guidance_scale, self.null_inner, self.null_lr, 0.01, None, 0.0,
                )  # fmt: skip
            self.empty.append(learnt)
        index = torch.as_tensor([at], device=context.device)
        new = context.index_copy(0, index, self.empty[site.step].to(context))
        return call({**inputs, "encoder_hidden_states": new})


class LocatedPrompt(DynamicPrompt):
    """Learns the nouns of a prompt so that each looks at its object, whose mask is known.

    Args:
        words: nouns of the prompt, or numbers of their tokens; one list for all prompts, or a list for each.
        masks: (nouns, h, w) of 0 and 1, at any resolution; a list of them for several prompts.
        kind: what masks are, see :func:`misplaced`.
        adjectives: nouns are bound to the token before each of them, which is not learnt.
        path: see :class:`DynamicPrompt`.
        weights, alpha, beta: of misplaced, outside, profiles, disjoint and unbound: their weights, and thresholds
            ``beta exp(-i / alpha)``. Those of profiles and disjoint never ask for a move. Without either of the first
            two no move is made. Defaults are those of the authors' script for boxes; their script for segments has
            weights 1, 1, 1, 0 and 2.
        inner, lr, weight_decay, null_inner, null_lr, steps, resolution, layers: see :class:`DynamicPrompt`.

    Raises:
        ValueError: as :class:`DynamicPrompt`; masks that are empty, or not one for each noun.

    Reference: Wang et al., 2023, arXiv 2309.15664: scripts of its code for detected and segmented objects.

    >>> LocatedPrompt(("cat",), torch.ones(1, 4, 4)).thresholds(0)
    {'misplaced': 0.7, 'outside': 0.7}
    """

    name: ClassVar[str] = "located-prompt-learning"

    def __init__(
        self,
        words: Sequence[Any],
        masks: Tensor | Sequence[Tensor],
        kind: str = "boxes",
        adjectives: bool = False,
        path: Sequence[Tensor] | None = None,
        weights: Sequence[float] = (1.0, 1.0, 0.0, 0.0, 0.0),
        alpha: Sequence[float] = (50.0, 25.0, 25.0, 25.0, 50.0),
        beta: Sequence[float] = (0.7, 0.7, 1.0, 0.9, 0.1),
        inner: int = 31,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        null_inner: int = 31,
        null_lr: float = 1e-2,
        steps: int | Sequence[int] | None = None,
        resolution: int | Sequence[int] = 16,
        layers: Sequence[int | str] | None = None,
    ):
        super().__init__(
            words, None, path, inner=inner, lr=lr, weight_decay=weight_decay, null_inner=null_inner, null_lr=null_lr,
            steps=steps, resolution=resolution, layers=layers,
        )  # fmt: skip
        check_choice("kind", kind, MASKS)
        self.kind, self.adjectives = kind, check_flag("adjectives", adjectives)
        for name, five in (("weights", weights), ("alpha", alpha), ("beta", beta)):
            if len(five) != len(LOCATED):
                raise ValueError(f"{name} must be five numbers, of {', '.join(LOCATED)}; got {five!r}")
        self.weights = tuple(check_real("weights", v, least=0) for v in weights)
        self.alpha = tuple(check_real("alpha", v, above=0) for v in alpha)
        self.beta = tuple(check_real("beta", v) for v in beta)
        self.masks = check_tensors("masks", [masks] if isinstance(masks, Tensor) else masks, least=1)
        for some in self.masks:
            if some.dim() != 3 or not bool(some.flatten(1).any(1).all()):
                raise ValueError(f"masks must be (nouns, h, w), none of them empty, got {tuple(some.shape)}")

    @property
    def identity(self) -> bool:
        return super().identity or (self.path is None and not (self.weights[0] or self.weights[1]))

    def thresholds(self, step: int) -> dict[str, float]:
        if not (self.weights[0] or self.weights[1]):
            return {}
        found = {}
        for name, weight, alpha, beta in zip(LOCATED, self.weights, self.alpha, self.beta, strict=True):
            if weight and (name != "unbound" or self.adjectives):
                found[name] = beta * math.exp(-step / alpha) if name in DECIDING else math.inf
        return found

    def losses(self, maps: Tensor, spans: list[list[int]], step: int, prompt: int) -> dict[str, tuple[float, Tensor]]:
        wanted = self.thresholds(step)
        if not wanted:
            return {}
        nouns = of_spans(maps, spans)
        if 1 < len(self.masks) <= prompt:
            raise ValueError(f"masks are of {len(self.masks)} prompts, and there are more")
        given = self.masks[prompt if len(self.masks) > 1 else 0]
        if len(given) != len(spans):
            raise ValueError(f"masks hold {len(given)} objects, the prompt has {len(spans)} words")
        masks = F.interpolate(given[None].to(maps), size=maps.shape[-2:])[0]
        made: dict[str, Callable[[], Tensor]] = {
            "misplaced": lambda: misplaced(nouns, masks, self.kind),
            "outside": lambda: outside(nouns, masks),
            "profiles": lambda: profile_divergence(nouns, masks),
            "disjoint": lambda: disjointness(nouns),
            "unbound": lambda: unbound(nouns, maps[[span[0] - 1 for span in spans]]),
        }
        return {name: (self.weights[n], made[name]()) for n, name in enumerate(LOCATED) if name in wanted}


class LearntPrompt(Intervention):
    """A pipeline's prompts are read with words that were learnt at each step, and with a learnt empty prompt.

    Prompts that hold a word get what was learnt of it, edits of the prompt too.

    Args:
        words: words that were learnt.
        embeddings: of each step, for each text encoder (1, tokens, D), the tokens of all words after one another.
        empty: of each step the embedding (1, T, D) of the empty prompt; ``None`` for the pipeline's own.

    Raises:
        ValueError: when the pipeline is called, a word that is in no prompt, or has another number of tokens; other
            steps than embeddings.

    Reference: Wang et al., 2023, arXiv 2309.15664.

    >>> LearntPrompt(("cat",), []).identity
    True
    """

    name: ClassVar[str] = "learnt-prompt"

    def __init__(
        self, words: Sequence[str], embeddings: Sequence[Sequence[Tensor]], empty: Sequence[Tensor] | None = None
    ):
        self.words = check_words(words)
        if not all(isinstance(word, str) for word in self.words):
            raise TypeError(f"words must be words (str), which are looked for in each prompt; got {words!r:.80}")
        self.embeddings = [check_tensors("embeddings", step, least=1) for step in embeddings]
        self.empty = NullText([] if empty is None else empty)
        if self.empty.embeddings and len(self.empty.embeddings) != len(self.embeddings):
            raise ValueError(
                f"empty holds {len(self.empty.embeddings)} embeddings, and there are {len(self.embeddings)} steps"
            )

    @classmethod
    def of(cls, learnt: DynamicPrompt) -> LearntPrompt:
        """What a run of :class:`DynamicPrompt` learnt of its first image."""
        check_type("learnt", learnt, DynamicPrompt)
        words = learnt.words[0] if isinstance(learnt.words[0], list) else learnt.words
        steps = [[t[:1] for t in step] for step in learnt.embeddings]
        return cls(words, steps, learnt.empty or None)

    @property
    def companions(self) -> Sequence[Intervention]:
        return () if self.empty.identity else (self.empty,)

    @property
    def identity(self) -> bool:
        return not self.embeddings

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, (LearntPrompt, TokenUpdate)):
            return "both say how words of the prompt are read"
        return None

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"LearntPrompt encodes the prompts of a pipeline, and {type(session.model).__name__} was attached to "
                "by itself; attach to the pipeline: attach(pipe, ...)"
            )

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        step, rows = step_of(site, self), rows_of_guidance(site, self)
        if "cond" not in rows or site.prompts is None:
            return call(inputs)
        if site.steps != len(self.embeddings):
            raise ValueError(f"LearntPrompt has embeddings of {len(self.embeddings)} steps, there are {site.steps}")
        index = [i for i, row in enumerate(rows) if row == "cond"]
        notes, key = self.session.notes, (self, "tokens", tuple(site.prompts[i] for i in index))
        if key not in notes:
            prompts = site.sampling.prompts or []
            held = [[w for w in self.words if holds(p, w)] for p in prompts]
            for word in self.words:
                if not any(word in some for some in held):
                    find(" | ".join(prompts), word)
            tokens = _Tokens(site, held, index, "LearntPrompt")
            notes[key] = tokens, [self._columns(tokens, n, held[tokens.numbers[n]]) for n in range(len(index))]
        tokens, columns = notes[key]
        given, learnt = self.embeddings[step], []
        if len(given) != len(tokens.learnt):
            raise ValueError(
                f"embeddings are of {len(given)} text encoders, and {type(site.sampling.pipe).__name__} has "
                f"{len(tokens.learnt)} of them"
            )
        for own, new in zip(tokens.learnt, given, strict=True):
            own = own.clone()
            for n, some in enumerate(columns):
                own[n, : len(some)] = new[0, some].to(own)
            learnt.append(own)
        context = inputs["encoder_hidden_states"]
        at = torch.as_tensor(index, device=context.device)
        with torch.no_grad():
            text = tokens.encode(learnt).to(context)
        return call({**inputs, "encoder_hidden_states": context.index_copy(0, at, text)})

    def _columns(self, tokens: _Tokens, image: int, held: list[str]) -> list[int]:
        """Which of the learnt tokens stand in a prompt, in the order of its words."""
        widths = [len(tokens.pipe.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in self.words]
        if sum(widths) != self.embeddings[0][0].shape[1]:
            raise ValueError(
                f"embeddings hold {self.embeddings[0][0].shape[1]} tokens, the words {self.words} have {sum(widths)}"
            )
        starts = {word: sum(widths[:n]) for n, word in enumerate(self.words)}
        found = []
        for word, span in zip(held, tokens.spans[image], strict=True):
            found += [starts[word] + i for i in range(len(span))]
        return found
