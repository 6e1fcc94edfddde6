"""Anagrams: one picture that reads as another prompt in each of several views, as learning of several tasks.

Let ``v_i`` be orthogonal views of a picture (turned, flipped, cut into a jigsaw puzzle, negative, ...) and ``e_i`` the
guided prediction of noise for what view i shows under prompt i, taken back by the inverse of the view. Plain anagrams
average these. Three parts are added:

* *balancing*: a prompt that the picture shows little of weighs more. With ``s_i`` a score of what view i shows against
  its prompt, ``alpha_i = s_i^(-1 - step / steps)``, divided by their sum;
* *rectification*: a mean of noise has less variance than noise. With ``rho_ij = mean(e_i e_j)``,
  ``e = c sum_i alpha_i e_i,  c = (sum_i alpha_i^2 + 2 sum_{i<j} rho_ij alpha_i alpha_j)^(-1/2)``;
* *no segregation*: concepts should share the picture rather than divide it. With ``a_i`` the map of the word of view i,
  taken back by the view, at the timestep that follows,
  ``L = mean_{i<j} | 1/2 - (T - 1) / 20 - sum min(a_i, a_j) / sum (a_i + a_j) |,  x <- x - 5 dL/dx``.

Predicted variances are averaged with ``alpha``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_flag, check_int, check_rank, check_real, shaped
from ...hooks.denoiser import CallSite, rows_of, with_gradient
from ...hooks.intervention import Intervention
from ...hooks.maps import Maps
from ...types import stats_dtype
from .dynamic_prompt import LearntPrompt
from .maps import overlap
from .prompts import encode_alone, token_spans
from .tiles import InParts, check_orthogonal

#: A score of pictures (B, C, H, W) in [0, 1], noisy ones, against a prompt at a timestep: (B,), the higher the more.
Scorer = Callable[[Tensor, str, Any], Tensor]


@shaped(scores="float (T, B)")
def balance(scores: Tensor, step: int, steps: int, least: float = 1e-3) -> Tensor:
    """(T, B) shares of T views from how well each shows its prompt.

    Args:
        scores: of view and picture; below ``least`` they count as that.
        step, steps: where sampling is.

    >>> balance(torch.tensor([[0.2], [0.2]]), 0, 30).flatten().tolist()
    [0.5, 0.5]
    """
    check_int("steps", steps, least=1)
    shares = scores.clamp(min=least) ** (-1 - step / steps)
    return shares / shares.sum(0)


@shaped(noise="float", shares="float (T, B)")
def rectification(noise: Tensor, shares: Tensor) -> Tensor:
    """(B,) c, what a weighted mean of noises of unit variance is to be multiplied by to have it too.

    Args:
        noise: (T, B, ...) of T views.
        shares: their weights.

    >>> round(rectification(torch.ones(2, 1, 4), torch.tensor([[0.6], [0.4]])).item(), 6)
    1.0
    """
    if noise.dim() < 3 or noise.shape[:2] != shares.shape:
        raise ValueError(f"noise must be (T, B, ...) for shares of {tuple(shares.shape)}, got {tuple(noise.shape)}")
    flat = noise.flatten(2)
    products = torch.einsum("ibn,jbn->bij", flat, flat) / flat.shape[-1]
    same = torch.eye(len(noise), dtype=torch.bool, device=noise.device)
    correlation = torch.where(same, 1.0, products)
    square = torch.einsum("ib,bij,jb->b", shares, correlation, shares)
    return square.clamp(min=1e-6) ** -0.5


@shaped(maps="float (T, h, w)")
def anti_segregation(maps: Tensor) -> Tensor:
    """How far the maps of T concepts are from overlapping by ``1/2 - (T - 1) / 20``, where 1/2 is for equal maps.

    >>> round(anti_segregation(torch.ones(2, 4, 4)).item(), 6)
    0.05
    """
    t = len(maps)
    wanted = 0.5 - 0.05 * (t - 1)
    terms = [(wanted - overlap(one, other)).abs() for one, other in combinations(maps, 2)]
    return torch.stack(terms).mean() if terms else maps.sum() * 0


class Anagram(InParts):
    """A pipeline whose picture reads as another prompt in each view.

    ::

        views, prompts = [identity_view(), rotated(180)], ["a drawing of a cat", "a drawing of a dog"]
        with attnlib.attach(pipe, Anagram(views, prompts, scorer)):
            pipe(prompts[0])

    Args:
        views: T of :mod:`attnlib.steer.diffusion.tiles`, or anything with ``view(x)`` and ``inverse(x)``.
        prompts: what each shows: texts, or embeddings (L, D). The pipeline is called with the first.
        scorer: ``scorer(pictures, prompt, timestep) -> (B,)`` of (B, C, H, W) noisy pictures in [0, 1]; the authors'
            is GLIDE's CLIP for noisy images. ``None`` leaves balancing out: all views weigh the same.
        rectify: keep the variance of noise.
        step_size: of the move against segregation, in pixels' units; 0 leaves it out.
        steps: how many first steps it is made behind.
        words: the word of each prompt whose map is meant, or numbers of its tokens; ``None`` for the last word.
        resolution: of these maps; 32 is the largest of DeepFloyd IF's first stage.
        layers: of these maps; ``None`` for all at that resolution.
        latent: allow a model whose pixels are latents of an autoencoder, where views of an image are none of them.

    Raises:
        ValueError: at attach, a view that is not orthogonal, a model outside a pipeline or one of latents; when it is
            called, several prompts at once, another prompt than the first, slopes that are not finite.

    It serves both stages of DeepFloyd IF: in the second, where the small picture stands behind the noisy one, give
    ``step_size=0`` as the authors do. Each picture of a batch has shares and a factor of its own; theirs takes the
    first picture's.

    Reference: Xu et al., 2024, arXiv 2412.02693; losses and views are held to the authors' code.

    >>> from attnlib.steer.diffusion.tiles import identity_view, rotated
    >>> Anagram([identity_view(), rotated(180)], ["a cat", "a dog"]).moves_latents
    True
    """

    name: ClassVar[str] = "anagram-mtl"

    def __init__(
        self,
        views: Sequence[Any],
        prompts: Sequence[Any],
        scorer: Scorer | None = None,
        rectify: bool = True,
        step_size: float = 5.0,
        steps: int = 26,
        words: Sequence[Any] | None = None,
        resolution: int | Sequence[int] = 32,
        layers: Sequence[int | str] | None = None,
        latent: bool = False,
    ):
        if isinstance(prompts, str) or len(views) != len(prompts) or not len(views):
            raise ValueError(f"prompts must be one for each of {len(views)} views, got {prompts!r:.80}")
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                check_rank(f"prompts[{number}]", prompt, 2, "(L, D), or a text")
        if words is not None and len(words) != len(views):
            raise ValueError(f"words must be one for each of {len(views)} views, got {words!r:.80}")
        self.views, self.prompts, self.scorer = list(views), list(prompts), scorer
        self.rectify, self.latent = check_flag("rectify", rectify), check_flag("latent", latent)
        self.step_size = check_real("step_size", step_size, least=0)
        self.steps = check_int("steps", steps, least=0)
        self.words = None if words is None else list(words)
        self.moves_latents = self.differentiates = bool(self.step_size and self.steps and len(self.views) > 1)
        self.maps = Maps(resolution, layers=layers)
        self.maps.looking = False

    @property
    def companions(self) -> Sequence[Intervention]:
        return (self.maps,) if self.moves_latents else ()

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, InParts):
            return "both run the denoiser on parts of a picture"
        if isinstance(other, LearntPrompt):
            return "both say which text the denoiser reads"
        if other.differentiates:
            return "losses of maps look at one run of the denoiser, and views are several pictures"
        return "features that were kept belong to other views" if other.reuses_features else None

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"Anagram reads prompts with a pipeline, and {type(session.model).__name__} was attached to by itself; "
                "attach to the pipeline: attach(pipe, ...)"
            )
        pipe = session.sampling.pipe
        if getattr(pipe, "vae", None) is not None and not self.latent:
            raise ValueError(
                f"{type(pipe).__name__} denoises latents of an autoencoder, whose views are not views of the image; "
                "take a model of pixels, or latent=True"
            )
        side = getattr(session.model.config, "sample_size", None)
        for view in self.views:
            check_orthogonal(view, (side, side) if isinstance(side, int) else side or (12, 12))

    # ---- one picture as T

    def _texts(self, site: CallSite, like: Tensor) -> Tensor:
        """(T, L, D) of the prompts."""
        notes, sampling = self.session.notes, site.sampling
        if (self, "texts") not in notes:
            if (sampling.prompt_count or 1) != 1:
                raise ValueError(
                    f"an anagram is one picture of all prompts, and the pipeline was called with "
                    f"{sampling.prompt_count}; call it with the first: pipe(prompts[0], num_images_per_prompt=...)"
                )
            asked, first = sampling.prompts, self.prompts[0]
            if asked is not None and isinstance(first, str) and asked[0] != first:
                raise ValueError(f"the pipeline was called with {asked[0]!r:.60}, the first prompt is {first!r:.60}")
            texts = [p.to(like) if isinstance(p, Tensor) else encode_alone(sampling, p, like) for p in self.prompts]
            if any(text.shape != like.shape for text in texts):
                raise ValueError(
                    f"embeddings of prompts must be {tuple(like.shape)}, got {[tuple(t.shape) for t in texts]}"
                )
            notes[self, "texts"] = torch.stack(texts)
        return notes[self, "texts"]

    def _spans(self, site: CallSite) -> list[list[int]]:
        notes = self.session.notes
        if (self, "spans") not in notes:
            spans = []
            for number, prompt in enumerate(self.prompts):
                word: Any = prompt.split()[-1] if self.words is None and isinstance(prompt, str) else None
                word = self.words[number] if self.words is not None else word
                if word is None or isinstance(word, str) and not isinstance(prompt, str):
                    raise ValueError(f"prompt {number} is an embedding; give the numbers of its word's tokens in words")
                if isinstance(word, str):
                    (word,) = token_spans(site.sampling.pipe.tokenizer, prompt, [word], 77)
                spans.append(list(word))
            notes[self, "spans"] = spans
        return notes[self, "spans"]

    def _viewed(self, site: CallSite, inputs: dict[str, Any], main: Tensor) -> tuple[dict[str, Any], list[int]]:
        """Arguments for all views, view by view, and which row each of the rows was."""
        batch, context = len(main), inputs.get("encoder_hidden_states")
        if not isinstance(context, Tensor) or context.dim() != 3 or site.rows is None or main.dim() != 4:
            raise ValueError(
                f"Anagram serves pictures (B, C, H, W) under text (B, L, D) whose rows are known; "
                f"{type(site.module).__name__} was called with {tuple(main.shape)} and rows {site.rows}"
            )
        index = list(range(batch)) * len(self.views)
        given = rows_of(inputs, index, batch)
        cond = torch.tensor([row == "cond" for row in site.rows], device=context.device).view(-1, 1, 1)
        texts = self._texts(site, context[int(cond.flatten().int().argmax())])
        given["encoder_hidden_states"] = torch.cat([torch.where(cond, text, context) for text in texts])
        given[site.main] = torch.cat([view.view(main) for view in self.views])
        return given, index

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        sampling = site.sampling
        if site.step is None:
            return call(inputs)
        main = inputs[site.main]
        notes, rows = self.session.notes, site.rows
        if self.moves_latents and 0 < site.step <= self.steps and notes.get((self, "moved")) != site.step:
            notes[self, "moved"] = site.step
            delta = self._move(site, inputs, call, main)
            sampling.shift(delta[: len(main) // max(1, len(set(rows or "x")))] / sampling.scale)
            main = main + delta
        given, index = self._viewed(site, inputs, main)
        with self.session.some_rows(index):
            out = call(given)
        return self._merged(site, out, main)

    # ---- merging

    def _merged(self, site: CallSite, out: Tensor, main: Tensor) -> Tensor:
        t, batch = len(self.views), len(main)
        assert site.rows is not None
        channels = self._channels(site, out)
        parts = out.unflatten(0, (t, batch))
        noise = torch.stack([v.inverse(p[:, :channels]) for v, p in zip(self.views, parts, strict=True)])
        variance = [_inverse_variance(v, p[:, channels:]) for v, p in zip(self.views, parts, strict=True)]
        groups = list(dict.fromkeys(site.rows))
        some = {name: [i for i, row in enumerate(site.rows) if row == name] for name in groups}
        guided = noise[:, some["cond"]]
        if "uncond" in some:
            free = noise[:, some["uncond"]]
            scale = float(site.sampling.arguments.get("guidance_scale", 1.0))
            guided = free + scale * (guided - free)
        guided = guided.to(stats_dtype(guided.dtype))
        shares = self._shares(site, main, some["cond"]).to(guided)
        factor = rectification(guided, shares) if self.rectify else shares.new_ones(guided.shape[1])
        every = shares.repeat(1, len(groups)).view(t, batch, 1, 1, 1).to(out)
        scale_by = factor.repeat(len(groups)).view(batch, 1, 1, 1).to(out)
        merged = (noise * every).sum(0) * scale_by
        if channels < out.shape[1]:
            merged = torch.cat([merged, (torch.stack(variance) * every).sum(0)], 1)
        return merged

    @staticmethod
    def _channels(site: CallSite, out: Tensor) -> int:
        """How many channels are noise: half, where the model predicts variances too, as those of DeepFloyd IF do."""
        twice = out.shape[1] == 2 * getattr(site.module.config, "in_channels", out.shape[1])
        return out.shape[1] // 2 if twice or type(site.sampling.pipe).__name__.startswith("IF") else out.shape[1]

    def _shares(self, site: CallSite, main: Tensor, cond: list[int]) -> Tensor:
        """(T, n) of the pictures."""
        t = len(self.views)
        if self.scorer is None:
            return torch.full((t, len(cond)), 1 / t, device=main.device)
        assert site.step is not None
        channels = min(3, main.shape[1])
        pictures = main[cond, :channels].detach() / site.sampling.scale
        scores = []
        for view, prompt in zip(self.views, self.prompts, strict=True):
            found = self.scorer(view.view(pictures) / 2 + 0.5, prompt, site.timestep)
            found = torch.as_tensor(found, dtype=stats_dtype(main.dtype), device=main.device)
            if found.shape != (len(cond),) or not bool(found.isfinite().all()):
                raise ValueError(f"scorer must give ({len(cond)},) finite scores, got {tuple(found.shape)}: {found}")
            scores.append(found)
        return balance(torch.stack(scores), site.step, site.steps or 1)

    # ---- against segregation

    def _move(self, site: CallSite, inputs: dict[str, Any], call: Any, main: Tensor) -> Tensor:
        """What is added to all rows of what the denoiser is about to read."""
        assert site.rows is not None
        t, batch, spans = len(self.views), len(main), self._spans(site)
        groups = len(set(site.rows))
        images = batch // groups
        cond = [i for i, row in enumerate(site.rows) if row == "cond"]
        self.maps.looking = True
        try:
            with with_gradient():
                leaf = main[:images].detach().clone().requires_grad_()
                given, index = self._viewed(site, {**inputs, site.main: main}, leaf.repeat(groups, 1, 1, 1))
                with self.session.some_rows(index):
                    call(given)
                seen = self.maps.take().unflatten(0, (t, batch))[:, cond]  # T, n, tokens, h, w
                losses = []
                for n in range(images):
                    a = [v.inverse(seen[i, n, spans[i]].sum(0)[None], True)[0] for i, v in enumerate(self.views)]
                    losses.append(anti_segregation(torch.stack(a)))
                (slope,) = torch.autograd.grad(torch.stack(losses).sum(), leaf)
        finally:
            self.maps.looking = False
        if not bool(slope.isfinite().all()):
            raise ValueError(f"Anagram: at step {site.step} the slope of its loss is not finite; run in float32")
        return (-self.step_size * slope).repeat(groups, 1, 1, 1).to(main)


def _inverse_variance(view: Any, variance: Tensor) -> Tensor:
    """Predicted variances taken back by a view: no sign is turned."""
    if not variance.shape[1]:
        return variance
    return view.inverse(variance, True) if hasattr(view, "sign") else view.inverse(variance)
