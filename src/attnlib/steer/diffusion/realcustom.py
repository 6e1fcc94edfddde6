"""RealCustom and RealCustom++: a reference image acts where a real word of the prompt is, and nowhere else.

Beside the text, cross-attention reads tokens E_r of reference r, through maps of its own,

    ``O = Attn(Q, K_t, V_t) + sum_r m_r * Attn(Q, W_k E_r, W_v E_r)``,

with a mask m_r over places. At each step a *guidance pass*, conditional rows without any reference, shows where the
word is: its weights of every layer, the mean over heads and the sum over tokens, taken to half the side of the latents,
each layer stretched over [0, 1], their mean stretched once more, and only the best places kept,

    ``m = top_{floor(scope h w)} stretch( mean_l stretch(A_l) )``.

Later steps use the last mask again, and save that pass. Unconditional rows read the tokens of an empty image under the
same mask.

RealCustom++ makes tokens of features of two scales (:class:`CrossScaleProjector`). Its predecessor renews the mask at
every step, refines maps by self-attention, and lets every layer choose among the tokens (:class:`AdaptiveScoring`);
there is no code of that, so the scoring is our reading.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_flag, check_int, check_real, check_width, shaped
from ...hooks.denoiser import CallSite, rows_of, step_of
from ...hooks.intervention import Intervention
from ...hooks.maps import Maps
from ...hooks.site import Site
from ...ops import attention
from .prompts import context_spans, per_prompt
from .references import ReferenceBranches
from .regions import against_tiles, image_grid, images_of, mixed_branches, resized

#: How weights of several layers become one map.
STRATEGIES = ("min_max_per_channel", "max_norm", "min_max_norm", "mean")

#: How maps between places are scaled before they refine it; ``None`` leaves them out.
SELF_MAPS = (None, "mean", "max_norm", "min_max_per_channel")

KEEP = ("top", "threshold")


def _stretched(flat: Tensor, eps: float = 1e-6) -> Tensor:
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    return (flat - low) / (high - low + eps)


def guidance_mask(
    maps: Sequence[Tensor],
    size: Sequence[int],
    scope: float = 0.25,
    strategy: str = "min_max_per_channel",
    keep: str = "top",
    binary: bool = False,
    between: Sequence[Tensor] = (),
    self_maps: str | None = None,
    compat: str | None = None,
) -> Tensor:
    """(..., h, w) mask of a word, from its maps in every layer.

    Args:
        maps: of each layer (..., h_l, w_l), summed over the word's tokens.
        size: (h, w) of the mask.
        scope: share of the places that are kept.
        strategy: ``"min_max_per_channel"`` stretches each layer over [0, 1] and their mean again, ``"min_max_norm"``
            the mean alone, ``"max_norm"`` divides it by its maximum, ``"mean"`` leaves it.
        keep: the ``"top"`` floor(scope h w) places, or those of at least ``1 - scope`` (``"threshold"``).
        binary: what is kept is 1.
        between: of each self-attention (..., h w, h w) weights of queries and keys at that size, whose mean the map is
            multiplied with.
        self_maps: how these are scaled before: ``"min_max_per_channel"`` each over [0, 1], ``"max_norm"`` all by their
            maximum, ``"mean"`` not.
        compat: ``"authors"`` stretches ``between`` of other numbers of places bilinearly to that of the mask, along
            their numbers; otherwise these are refused.

    >>> guidance_mask([torch.arange(8.0).view(1, 2, 4)], (2, 4), binary=True).flatten().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("keep", keep, KEEP)
    check_choice("self_maps", self_maps, SELF_MAPS)
    check_choice("compat", compat, (None, "authors"))
    scope = check_real("scope", scope, above=0, most=1)
    if not maps:
        raise ValueError("maps is empty: no layer shows where the word is")
    flat = torch.stack([resized(one, size).flatten(-2) for one in maps], -2)  # (..., layers, places)
    if strategy == "min_max_per_channel":
        flat = _stretched(flat)
    found = flat.mean(-2)
    if between:
        places = math.prod(size)
        if compat == "authors":
            between = [resized(one, (places, places)) for one in between]
        if any(one.shape[-2:] != (places, places) for one in between):
            raise ValueError(
                f"between must hold weights of {places} places for a mask of {tuple(size)}, got "
                f"{[tuple(one.shape) for one in between]}"
            )
        pairs = torch.stack(list(between), -3)
        if self_maps == "min_max_per_channel":
            pairs = _stretched(pairs.flatten(-2)).view_as(pairs)
        elif self_maps == "max_norm":
            pairs = pairs / (pairs.amax((-3, -2, -1), keepdim=True) + 1e-10)
        found = (pairs.mean(-3) @ found.unsqueeze(-1)).squeeze(-1)
    if strategy == "max_norm":
        found = found / (found.amax(-1, keepdim=True) + 1e-6)
    elif strategy != "mean":
        found = _stretched(found)
    if keep == "threshold":
        kept = found >= 1 - scope
        best = found > 1 - scope
    else:
        count = math.floor(found.shape[-1] * scope + 1e-9)
        kept = torch.zeros_like(found, dtype=torch.bool).scatter(-1, found.topk(count, -1).indices, True)
        best = kept
    found = found.masked_fill(~kept, 0)
    return (found.masked_fill(best, 1) if check_flag("binary", binary) else found).unflatten(-1, tuple(size))


def cascaded_guidance(
    uncond: Tensor,
    both: Tensor,
    text: Tensor | None = None,
    scale: float = 7.5,
    text_scale: float | None = None,
    rescale: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Guidance by a text and by references on top of it: ``u + s_t (t - u) + s (b - t)``.

    Args:
        uncond: (B, C, h, w) prediction u without either.
        both: b, with text and references.
        text: t, with the text alone; ``None`` for ``u + s (b - u)``, as RealCustom++ samples.
        scale: s.
        text_scale: s_t; s by default.
        rescale: share r of a factor that brings the deviation of an image back to that of b: times
            ``r std(b) / std + 1 - r``.
        mask: (B, 1, h, w) where references are; elsewhere the deviation is brought back to that of t.

    >>> one, two = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    >>> cascaded_guidance(one, two, scale=3.0).flatten().tolist()
    [3.0, 3.0]
    """
    for name, given in (("both", both), ("text", text)):
        if given is not None and given.shape != uncond.shape:
            raise ValueError(f"{name} must be {tuple(uncond.shape)}, as uncond is, got {tuple(given.shape)}")
    rescale = check_real("rescale", rescale, least=0, most=1)
    if text is None:
        if text_scale is not None or mask is not None:
            raise ValueError("text_scale and mask speak of a prediction of the text alone, and text is None")
        found = uncond + scale * (both - uncond)
    else:
        found = uncond + (scale if text_scale is None else text_scale) * (text - uncond) + scale * (both - text)
    if not rescale:
        return found
    axes = (1, 2, 3)
    after = found.std(axes, keepdim=True)
    inside = rescale * both.std(axes, keepdim=True) / after + 1 - rescale
    if mask is None:
        return found * inside
    assert text is not None
    outside = rescale * text.std(axes, keepdim=True) / after + 1 - rescale
    return found * mask * inside + found * (1 - mask) * outside


# ---- tokens of a reference


class _Fusion(nn.Module):
    """Deep features read others: one attention without an output projection."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.heads = dim // head_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, deep: Tensor, others: Tensor) -> Tensor:
        others = self.norm2(others)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(self.norm1(deep)), self.to_k(others), self.to_v(others))
        )
        return attention(q, k, v).transpose(1, 2).flatten(2)


def _mlp(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim),
        nn.LayerNorm(out_dim),
    )  # fmt: skip


class CrossScaleProjector(nn.Module):
    """Tokens of a reference from features of the whole image, of its crops, and of shallow layers.

    ``E = W deep + s MLP(Attn(deep, crops))``, with shallow features ``MLP_2(Attn_2(deep, shallow))`` behind it.

    Args:
        dim: width of the features; SigLIP and DINO side by side, 2176, as released.
        out_dim: width of the tokens.
        head_dim: of the fusions.
        shallow: features of shallow layers are read, too.
        scale: s; learned with ``adaptive_scale``.
        adaptive_scale: see ``scale``.
        compat: ``"authors"`` for weights that were released with ``shallow``: their code computes the fusion with crops
            and leaves it out.

    >>> CrossScaleProjector(8, 6, head_dim=4)(torch.zeros(1, 4, 8), torch.zeros(1, 16, 8)).shape
    torch.Size([1, 4, 6])
    """

    def __init__(
        self,
        dim: int = 2176,
        out_dim: int = 2048,
        head_dim: int = 64,
        shallow: bool = False,
        scale: float = 1.0,
        adaptive_scale: bool = False,
        compat: str | None = None,
    ):
        super().__init__()
        check_divides("head_dim", head_dim, "dim", dim)
        check_choice("compat", compat, (None, "authors"))
        self.shallow, self.compat = check_flag("shallow", shallow), compat
        self.min_attention, self.projector = _Fusion(dim, head_dim), _mlp(dim, out_dim)
        self.projector_base = nn.Linear(dim, out_dim)
        self.scale = check_real("scale", scale)
        self.scale_value = nn.ParameterDict()
        if check_flag("adaptive_scale", adaptive_scale):
            self.scale_value["value"] = nn.Parameter(torch.tensor(self.scale))
        if shallow:
            self.min_attention2, self.projector2 = _Fusion(dim, head_dim), _mlp(dim, out_dim)

    def forward(self, deep: Tensor, crops: Tensor, shallow: Sequence[Tensor] = ()) -> Tensor:
        """(n, T, out_dim) tokens, twice as many with ``shallow``.

        Args:
            deep: (n, T, dim) of the whole image.
            crops: (n, M, dim) of its crops.
            shallow: (n, T', dim) of each shallow layer.
        """
        if bool(len(shallow)) != self.shallow:
            raise ValueError(f"shallow={self.shallow}, but {len(shallow)} shallow features were given")
        for name, features in (("deep", deep), ("crops", crops), *(("shallow", one) for one in shallow)):
            check_width(name, features, self.projector_base.in_features)
        tokens = self.projector_base(deep)
        if not (self.shallow and self.compat == "authors"):
            scale = self.scale_value["value"] if len(self.scale_value) else self.scale
            tokens = tokens + scale * self.projector(self.min_attention(deep, crops))
        if self.shallow:
            tokens = torch.cat([tokens, self.projector2(self.min_attention2(deep, torch.cat(list(shallow), 1)))], 1)
        return tokens


class AdaptiveScoring(nn.Module):
    """Which tokens of a reference a layer reads, from the text and from the image as it is drawn.

    ``s = w softmax(a_txt) + (1 - w) softmax(a_vis)``, where ``a`` is the mean over text tokens (places) of their
    products with a token, and w the share of noise: the text decides first, the image later.

    Args:
        dim: width of the layer's keys and queries.
        width: of the tokens.
        hidden: width of the products.

    Its last map starts at zero, where all tokens score alike. Our reading of a description without code.
    """

    def __init__(self, dim: int, width: int, hidden: int = 64):
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("hidden", hidden)):
            check_int(name, value, least=1)
        self.text, self.visual = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.feature = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.feature.weight)

    def forward(self, text: Tensor, visual: Tensor, tokens: Tensor, noise: float) -> Tensor:
        """(B, R, T) scores that sum to one over T.

        Args:
            text: (B, M, dim).
            visual: (B, N, dim).
            tokens: (B, R, T, width).
            noise: share of it, 1 at the start.
        """
        for name, given, width in (("text", text, self.text), ("visual", visual, self.visual)):
            check_width(name, given, width.in_features)
        check_width("tokens", tokens, self.feature.in_features, "width")
        features = self.feature(tokens)
        total: Any = 0
        for weight, reader, source in ((noise, self.text, text), (1 - noise, self.visual, visual)):
            mean = reader(source.mean(1))  # the mean of products is the product of the mean
            products = (features @ mean[:, None, :, None]).squeeze(-1) * mean.shape[-1] ** -0.5
            total = total + weight * products.softmax(-1)
        return total


@shaped(tokens="float (..., T, C)", scores="float (..., T)")
def keep_best(tokens: Tensor, scores: Tensor, ratio: float) -> Tensor:
    """The floor(ratio T) tokens of the highest scores, in their order, each times T s.

    >>> keep_best(torch.ones(4, 1), torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5).flatten().tolist()
    [1.600000023841858, 1.2000000476837158]
    """
    count = math.floor(check_real("ratio", ratio, above=0, most=1) * tokens.shape[-2] + 1e-9)
    if not count:
        raise ValueError(f"ratio={ratio} keeps none of {tokens.shape[-2]} tokens")
    at = scores.topk(count, -1).indices.sort(-1).values
    weights = scores.gather(-1, at) * tokens.shape[-2]
    return tokens.gather(-2, at.unsqueeze(-1).expand(*at.shape, tokens.shape[-1])) * weights.unsqueeze(-1)


# ---- acting


class _LayerMaps(Maps):
    """Maps of every layer by itself."""

    def reset(self) -> None:
        super().reset()
        self.layers_seen: list[Tensor] = []

    def keep(self, grid: tuple[int, ...], whole: Tensor, where: str) -> None:
        self.layers_seen.append(whole)


class RealCustom(ReferenceBranches):
    """Cross-attention that reads references where words of the prompt are.

    ::

        custom = RealCustom.of(pipe.unet, words=["dog"])
        custom.refer(tokens)                          # (1, references, tokens, width), see CrossScaleProjector
        with attnlib.attach(pipe, custom):
            pipe("a dog on the moon")

    Attached to a denoiser itself it is in training: with gradients, references act everywhere. What learns is
    :meth:`trained`, and is saved and loaded as the state dict of this module.

    Args:
        maps: see :class:`attnlib.steer.diffusion.references.ReferenceBranches`; use :meth:`of`.
        words: the word of each reference, or numbers of its tokens; one list for all prompts or a list for each.
        scope, strategy, keep, binary, self_maps: of the mask, see :func:`guidance_mask`.
        guided_steps: at how many first steps the mask is made anew; ``None`` for all.
        scoring: a module (text, visual, tokens, noise) -> scores for each layer, as :class:`AdaptiveScoring`; ``None``
            reads all tokens.
        ratio: share of the tokens that is read, with ``scoring``. Where gradients are computed in training it is drawn
            from ``ratio_range``.
        ratio_range: see ``ratio``.
        settings: ``project``, ``scale`` and ``step_range`` of the branches.

    Defaults are those of RealCustom++'s pipeline. RealCustom: ``guided_steps=None``, ``self_maps="mean"`` and
    ``scoring=True`` of :meth:`of`.

    Raises:
        ValueError: at attach, company that runs some pictures by themselves; when it is called, a denoiser outside a
            pipeline without gradients, a word that is not in its prompt, or not one word for each reference.

    Reference: Mao et al., 2024, arXiv 2408.09744 (RealCustom++); Huang et al., 2024, arXiv 2403.00483 (RealCustom).
    """

    name: ClassVar[str] = "realcustom"

    def __init__(
        self,
        maps: Mapping[str, nn.Module],
        words: Sequence[Any],
        scope: float = 0.25,
        strategy: str = "min_max_per_channel",
        keep: str = "top",
        binary: bool = False,
        self_maps: str | None = None,
        guided_steps: int | None = 12,
        scoring: Sequence[nn.Module] | None = None,
        ratio: float = 0.8,
        ratio_range: Sequence[float] = (0.3, 1.0),
        **settings: Any,
    ):
        super().__init__(maps, **settings)
        if isinstance(words, str) or not len(words):
            raise TypeError(f"words must be a sequence with the word of each reference, got {words!r:.80}")
        check_choice("strategy", strategy, STRATEGIES)
        check_choice("keep", keep, KEEP)
        check_choice("self_maps", self_maps, SELF_MAPS)
        self.words, self.strategy, self.keep, self.self_maps = list(words), strategy, keep, self_maps
        self.scope = check_real("scope", scope, above=0, most=1)
        self.binary = check_flag("binary", binary)
        self.guided_steps = None if guided_steps is None else check_int("guided_steps", guided_steps, least=1)
        self.scoring = None if scoring is None else nn.ModuleList(scoring)
        if self.scoring is not None and len(self.scoring) != len(self.names):
            raise ValueError(f"scoring needs a module for each of {len(self.names)} layers, got {len(self.scoring)}")
        self.ratio = check_real("ratio", ratio, above=0, most=1)
        low, *others = (check_real("ratio_range", r, above=0, most=1) for r in ratio_range)
        if len(others) != 1 or low > others[0]:
            raise ValueError(f"ratio_range must be (least, most) in order, got {tuple(ratio_range)}")
        self.ratio_range = (low, others[0])
        self._looks = {"text": _LayerMaps(gradient=False)}
        if self_maps is not None:
            self._looks["image"] = _LayerMaps(of="image", gradient=False)
        for probe in self._looks.values():
            probe.looking = False
        self._guiding = False

    @classmethod
    def of(
        cls,
        model: Any,
        project: nn.Module | None = None,
        width: int | None = None,
        scoring: bool = False,
        hidden: int = 64,
        **settings: Any,
    ) -> Any:
        """For all cross attention of a U-Net (or of a pipeline's).

        Args:
            model: the denoiser, or a pipeline.
            project, width: as in the branches.
            scoring: every layer chooses among the tokens.
            hidden: width of its products.
            settings: of the class.
        """
        made = super().of(model, project=project, width=width, **settings)
        if check_flag("scoring", scoring):
            made.scoring = nn.ModuleList(
                AdaptiveScoring(m.to_k_ip.out_features, m.to_k_ip.in_features, hidden).to(m.to_k_ip.weight)
                for m in made.maps
            )
        return made

    # ---- attaching

    @property
    def companions(self) -> Sequence[Intervention]:
        return tuple(self._looks.values())

    def conflicts(self, other: Intervention) -> str | None:
        if other.differentiates:
            return f"{type(other).__name__} runs some pictures by themselves, and each has a mask of its own here"
        if other.reuses_features:
            return f"{type(other).__name__} would keep what the model makes without the references"
        if isinstance(other, RealCustom):
            return "each would look for its words in what the other draws; give both references to one"
        return against_tiles(other) or super().conflicts(other)

    # ---- where the words are

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        if not self.references:
            self.tokens()  # says what is missing
        if site.sampling is None:
            if not torch.is_grad_enabled():
                raise ValueError(
                    f"{type(self).__name__} looks for words of a pipeline's prompt, and {type(site.module).__name__} "
                    "was attached to by itself, which is for training; attach to the pipeline: attach(pipe, ...)"
                )
            return call(inputs)
        step, notes = step_of(site, self), self.session.notes
        cond = [] if site.rows is None else [i for i, row in enumerate(site.rows) if row == "cond"]
        due = (self.guided_steps is None or step < self.guided_steps) and notes.get((self, "step")) != step
        if due or (self, "masks") not in notes:
            if not cond or site.prompts is None:
                raise ValueError(
                    f"{type(self).__name__} looks for words in conditional rows, and which these are is not known in "
                    f"{type(site.sampling.pipe).__name__}, or they come after the others; say it: attach(pipe, ..., "
                    "rows=('uncond', 'cond'))"
                )
            notes[self, "masks"], notes[self, "step"] = self._guide(site, inputs, call, cond), step
        return call(inputs)

    def _guide(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor], cond: list[int]
    ) -> Tensor:
        """(images, R, h, w): where the word of each reference is."""
        main = inputs[site.main]
        with ExitStack() as stack:
            stack.enter_context(self.session.some_rows(cond))
            stack.callback(self._quiet)
            self._guiding = True
            for probe in self._looks.values():
                probe.reset()
                probe.looking = True
            call(rows_of(inputs, cond, len(main)))
            seen = {of: list(probe.layers_seen) for of, probe in self._looks.items()}
        size = tuple(max(1, side // 2) for side in main.shape[-2:])
        between = [m for m in seen.get("image", []) if tuple(m.shape[-2:]) == size]
        if self.self_maps is not None and not between:
            raise ValueError(
                f"self_maps={self.self_maps!r} needs self-attention at {size}, half the side of the latents; this "
                f"model has it at {sorted({tuple(m.shape[-2:]) for m in seen['image']})}"
            )
        spans = self._spans(site)
        masks = []
        for n, i in enumerate(cond):
            mine = [
                guidance_mask(
                    [m[n, list(span)].sum(0) for m in seen["text"]], size, self.scope, self.strategy, self.keep,
                    self.binary, [m[n].flatten(1).T for m in between], self.self_maps,
                )
                for span in spans[site.prompts[i]]  # type: ignore[index]
            ]  # fmt: skip
            masks.append(torch.stack(mine))
        return torch.stack(masks)

    def _quiet(self) -> None:
        self._guiding = False
        for probe in self._looks.values():
            probe.looking = False
            probe.reset()

    def _spans(self, site: CallSite) -> list[list[list[int]]]:
        """For each prompt the tokens of the word of each reference."""
        notes, sampling = self.session.notes, site.sampling
        found = notes.get((self, "spans"))
        if found is None:
            texts, longest = sampling.prompts, sampling.arguments.get("max_sequence_length")
            found = []
            for p, words in enumerate(per_prompt(self.words, sampling.prompt_count)):
                if len(words) != self.references:
                    raise ValueError(
                        f"words must name one for each of {self.references} references, got {len(words)} for prompt {p}"
                    )
                found.append(context_spans(sampling.pipe, None if texts is None else texts[p], words, longest))
            notes[self, "spans"] = found
        return found

    # ---- attention

    def weigh(self, site: Site, q: Tensor, out: Tensor) -> Tensor:
        """(B, R, N) masks at the grid of a layer; ones in training."""
        masks = self.session.notes.get((self, "masks"))
        if masks is None:
            return q.new_ones(len(q), self.references, q.shape[2])
        at = resized(masks, image_grid(site)).flatten(-2)
        return at.index_select(0, torch.tensor(images_of(site.rows or ()), device=at.device))

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        out = call(q, k, v)
        if self._guiding or not self.acts(site):
            return out
        scales = self.scales(site, self.references)
        if not any(scales):
            return out
        keys, values = self.keys_values(site, len(q)) if self.scoring is None else self._chosen(site, q, k)
        weights = self.weigh(site, q, out) * torch.tensor(scales, device=q.device, dtype=torch.float32)[:, None]
        branches = [
            functools.partial(attention, k=keys[r].to(q), v=values[r].to(q), scale=site.scale)
            for r in range(len(scales))
        ]
        return out + mixed_branches(q, branches, weights.to(q.device)).to(out.dtype)

    def _chosen(self, site: Site, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (R, B, H, K, D) of the tokens that score best."""
        assert self.scoring is not None
        maps: Any = self.at(site)
        scoring = self.scoring[next(n for n, m in enumerate(self.maps) if m is maps)]
        images, empty = self.tokens()
        rows = torch.tensor(self.row_numbers(site, len(q), len(images), len(empty)), device=images.device)
        tokens = torch.cat([images, empty.to(images)]).index_select(0, rows).to(maps.to_k_ip.weight)
        steps = site.timestep if site.timestep is not None else 0.0
        noise = float(torch.as_tensor(steps, dtype=torch.float32).flatten()[0]) / 1000
        flat = [t.transpose(1, 2).flatten(2).to(tokens.dtype) for t in (k, q)]
        ratio = self.ratio
        if self.training and torch.is_grad_enabled():
            low, high = self.ratio_range
            ratio = low + (high - low) * float(torch.rand(()))
        best = keep_best(tokens, scoring(*flat, tokens, noise), ratio)
        made = (f(best).unflatten(-1, (site.kv_heads, -1)).permute(1, 0, 3, 2, 4) for f in (maps.to_k_ip, maps.to_v_ip))
        new_k, new_v = made
        return new_k, new_v

    # ---- training, and released weights

    def trained(self) -> list[nn.Parameter]:
        """What is trained: the maps of all layers, and the scoring."""
        return [*super().trained(), *([] if self.scoring is None else self.scoring.parameters())]

    def load_authors(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load the maps of a released checkpoint, and give what it has for the projector.

        Args:
            state_dict: with ``{layer}.to_k_vision.weight`` and ``{layer}.to_v_vision.weight`` of every layer and
                ``encoder_hidden_states_vision_projection.*``.

        Raises:
            ValueError: entries that are missing, or left over.
        """
        prefix = "encoder_hidden_states_vision_projection."
        rest = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
        wanted = {f"{name}.to_{p}_vision.weight": (name, p) for name in self.names for p in ("k", "v")}
        if rest.keys() != wanted.keys():
            raise ValueError(
                f"state_dict lacks {sorted(wanted.keys() - rest.keys())[:4]} and has "
                f"{sorted(rest.keys() - wanted.keys())[:4]} too many"
            )
        for key, (name, p) in wanted.items():
            with torch.no_grad():
                getattr(self.maps[self.names.index(name)], f"to_{p}_ip").weight.copy_(rest[key])
        self._kept.clear()
        return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
