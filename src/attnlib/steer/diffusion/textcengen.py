"""TextCenGen: a region of the picture stays free for text, since what a prompt's words look at moves away from it.

In each cross-attention layer, the map of a word that lies in the region is pushed off: by a force away from the
region's centre, and by the four walls of the picture, each as far as ``clamp`` of its sides. It is shifted so, its
centroid staying in the picture, and damped inside the region. No gradient, no training; other words are left alone.

::

    with attnlib.attach(pipe, TextCenGen(region=(0.1, 0.1, 0.4, 0.9))):  # top, left, bottom, right
        image = pipe("a cat on a bench").images[0]

What the result is worth is measured in the region, too: :func:`saliency`, :func:`variation` and :func:`vtcm`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_int, check_ints, check_real, check_tensor, describe, shaped
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from .losses import acts_at, check_first, check_words
from .maps import normalize, smooth, soft_threshold
from .prompts import spans_of, text_streams


@shaped(maps="float (..., h, w)")
def centroid(maps: Tensor) -> Tensor:
    """(..., 2) the mean place, (y, x), of each map.

    >>> centroid(torch.tensor([[0.0, 1.0], [0.0, 1.0]])).tolist()
    [0.5, 1.0]
    """
    h, w = maps.shape[-2:]
    y = torch.arange(h, dtype=maps.dtype, device=maps.device)[:, None]
    x = torch.arange(w, dtype=maps.dtype, device=maps.device)
    total = maps.sum((-2, -1)).clamp(min=1e-12)
    return torch.stack([(maps * y).sum((-2, -1)) / total, (maps * x).sum((-2, -1)) / total], -1)


@shaped(maps="float (..., h, w)", region="float (h, w)")
def conflicts(maps: Tensor, region: Tensor, theta: float = 0.25) -> Tensor:
    """(...) boolean: which maps, in [0, 1], are more than ``theta`` on average over a region.

    >>> conflicts(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[1.0, 0.0]])).tolist()
    [True, False]
    """
    return (maps * region).sum((-2, -1)) / region.sum() > theta


@shaped(places="float (..., 2)", centre="float (2)")
def forces(
    places: Tensor, centre: Tensor, size: Sequence[int], repulsion: float = 14.0, margin: float = 0.4,
    clamp: float = 1.0,
) -> Tensor:  # fmt: skip
    """(..., 2) how far, in sides of the picture, what is at ``places`` is pushed.

    Away from ``centre`` by ``repulsion^2 / distance``, and away from each wall by ``margin / distance^2``; the two
    forces are held within ``clamp`` along each axis. What stands on the centre goes up.

    Args:
        places: (..., 2) as (y, x), in places of the map.
        centre: (2,) of the region.
        size: (h, w) of the map.
        repulsion: xi.
        margin: k.
        clamp: 0 for none.
    """
    h, w = size
    away = places - centre
    distance = away.norm(dim=-1, keepdim=True)
    up = torch.tensor([-1.0, 0.0], dtype=places.dtype, device=places.device)
    direction = torch.where(distance > 1e-6, away / distance.clamp(min=1e-6), up)
    repelled = repulsion**2 / distance.clamp(min=1e-6) * direction
    walls = _walls(places, h, w, margin)
    if clamp:
        repelled, walls = repelled.clamp(-clamp, clamp), walls.clamp(-clamp, clamp)
    return repelled + walls


def _walls(places: Tensor, h: int, w: int, margin: float) -> Tensor:
    y, x = places.unbind(-1)
    inward = [margin / (d.square() + torch.finfo(d.dtype).eps) for d in (y, h - y, x, w - x)]
    return torch.stack([inward[0] - inward[1], inward[2] - inward[3]], -1)


@shaped(maps="float (K, H, h, w)", by="float (K, 2)")
def shifted(maps: Tensor, by: Tensor) -> Tensor:
    """Maps (K, H, h, w) moved by so many places (y, x), between which is interpolated; zeros come in at the edges.

    >>> shifted(torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[0.0, 1.0]])).flatten().tolist()
    [0.0, 1.0, 2.0]
    """
    h, w = maps.shape[-2:]
    theta = torch.zeros(len(maps), 2, 3, dtype=maps.dtype, device=maps.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1.0
    theta[:, 0, 2], theta[:, 1, 2] = -2 * by[:, 1] / w, -2 * by[:, 0] / h
    grid = F.affine_grid(theta, list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@shaped(maps="float (H, L, h, w)", region="float (h, w)")
def free_region(
    maps: Tensor,
    region: Tensor,
    tokens: Sequence[int],
    threshold: float = 0.5,
    sharpness: float = 1.0,
    theta: float = 0.25,
    repulsion: float = 14.0,
    margin: float = 0.4,
    clamp: float = 1.0,
    damping: float = 0.75,
    compat: str | None = None,
) -> Tensor:
    """Cross-attention (H, L, h, w) of one row with what lies in a region moved out of it.

    Args:
        maps: weights of each head and token.
        region: (h, w) 1 where the picture is to stay free.
        tokens: which may be moved.
        threshold, sharpness: of the mask that is made of the mean over heads.
        theta: share of the region that a mask may cover.
        repulsion, margin, clamp: see :func:`forces`.
        damping: what is left of a moved map inside the region.
        compat: ``"authors"`` for their function: forces with the other sign and another length, half of the way, the
            first head's map for all heads, and damping of all tokens.

    Returns:
        The maps, or ``maps`` itself where no token is in the region; rows are not normalised again.
    """
    check_choice("compat", compat, (None, "authors"))
    h, w = region.shape
    tokens = list(check_ints("tokens", tokens, least=0, most=maps.shape[1] - 1))
    some = maps[:, tokens]
    mask = soft_threshold(some.mean(0), threshold, sharpness)  # (K, h, w)
    found = conflicts(mask, region, theta)
    if not bool(found.any()):
        return maps
    places, centre = centroid(mask), centroid(region)
    side = torch.tensor([h, w], dtype=maps.dtype, device=maps.device)
    if compat == "authors":
        away = places - centre
        length = away.norm() + torch.finfo(away.dtype).eps
        repelled, walls = -(repulsion**2) * length / (away / length), -_walls(places, h, w, margin)
        if clamp > 0:
            repelled, walls = repelled.clamp(-clamp, clamp), walls.clamp(-clamp, clamp)
        push = (repelled + walls) * found[:, None]
    else:
        push = forces(places, centre, (h, w), repulsion, margin, clamp)
    push = (places + push * side).clamp(min=torch.zeros_like(side), max=side - 1) - places
    damped = damping + (1 - damping) * (1 - region)
    if compat == "authors":
        moved = shifted(some[:1].transpose(0, 1), -push / 2).expand(-1, len(maps), -1, -1) * damped
    else:
        moved = shifted(some.transpose(0, 1), push) * damped
        moved = torch.where(found.view(-1, 1, 1, 1), moved, some.transpose(0, 1))
    return maps.index_copy(1, torch.as_tensor(tokens, device=maps.device), moved.transpose(0, 1))


class TextCenGen(Intervention):
    """A region of the pictures stays free: maps of the prompt's words are moved out of it.

    Args:
        region: (top, left, bottom, right) as shares of the sides, or a mask (h, w); a list of one for each prompt.
        words: words that may be moved, or numbers of their tokens; one list for all prompts, or a list for each;
            ``None`` for all words of the prompt.
        threshold, sharpness, theta, repulsion, margin, clamp, damping: see :func:`free_region`.
        steps: how many first steps to act at, or their numbers; ``None`` for all.
        layers: numbers or name patterns; ``None`` for all cross-attention.
        compat: ``"authors"`` for their processor: signs and lengths as they are released, both halves of guidance in
            one map, and as tokens the first ones, as many as the prompt has words' pieces, so that the last is missed.

    Raises:
        ValueError: at attach, a model outside a pipeline or without cross-attention; when the pipeline is called, a
            word that is not in its prompt, regions of another number than prompts; an empty region, or one of all.

    Reference: Liang et al., 2024, arXiv 2404.11824.

    >>> TextCenGen((0.0, 0.0, 0.5, 1.0)).kinds
    ('cross',)
    """

    name: ClassVar[str] = "textcengen"
    kinds: ClassVar[tuple[str, ...]] = ("cross",)
    whole_map: ClassVar[bool] = True

    def __init__(
        self,
        region: Sequence[Any] | Tensor,
        words: Sequence[Any] | None = None,
        threshold: float = 0.5,
        sharpness: float = 1.0,
        theta: float = 0.25,
        repulsion: float = 14.0,
        margin: float = 0.4,
        clamp: float = 1.0,
        damping: float = 0.75,
        steps: int | Collection[int] | None = None,
        layers: Sequence[int | str] | None = None,
        compat: str | None = None,
    ):
        check_choice("compat", compat, (None, "authors"))
        one = isinstance(region, Tensor) or (len(region) == 4 and all(isinstance(r, (int, float)) for r in region))
        self.regions = [_region(r) for r in ([region] if one else region)]
        if not self.regions:
            raise ValueError("region must be one or a list of one for each prompt, got an empty list")
        self.words = None if words is None else check_words(words)
        self.settings: dict[str, Any] = {
            "threshold": check_real("threshold", threshold, least=0, most=1),
            "sharpness": check_real("sharpness", sharpness, above=0),
            "theta": check_real("theta", theta, least=0),
            "repulsion": check_real("repulsion", repulsion, least=0),
            "margin": check_real("margin", margin, least=0),
            "clamp": check_real("clamp", clamp, least=0),
            "damping": check_real("damping", damping, least=0, most=1),
            "compat": compat,
        }
        self.steps, self.layers, self.compat = check_first("steps", steps), layers, compat

    @property
    def identity(self) -> bool:
        return self.steps in (0, frozenset())

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"TextCenGen reads the prompts of a pipeline, and {type(session.model).__name__} was attached to by "
                "itself; attach to the pipeline: attach(pipe, ...)"
            )

    def _tokens(self) -> list[list[int]]:
        """Of each prompt, the tokens that may be moved."""
        notes, sampling = self.session.notes, self.session.sampling
        if (self, "tokens") not in notes:
            prompts, longest = sampling.prompts, sampling.arguments.get("max_sequence_length")
            if self.words is not None:
                spans = spans_of(sampling, self.words)
                notes[self, "tokens"] = [sorted({t for span in some for t in span}) for some in spans]
            elif prompts is None:
                raise ValueError("TextCenGen was given no words, and the pipeline no prompt; give numbers of tokens")
            else:
                tokenizer, _, limit = text_streams(sampling.pipe, longest)[0]
                counts = [len(tokenizer(p, add_special_tokens=False, verbose=False)["input_ids"]) for p in prompts]
                first = 0 if self.compat == "authors" else 1
                notes[self, "tokens"] = [
                    list(range(first, min(first + count, (limit or first + count) - 1))) for count in counts
                ]
        return notes[self, "tokens"]

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        if site.step is None or not acts_at(self.steps, site.step):
            return weights
        layout = site.q_layout
        if site.rows is None or site.prompts is None:
            site.rows_named(("cond",))  # which says what is missing
            return weights
        if layout is None or "image" not in layout.names or len(layout.grid("image")) != 2:
            raise ValueError(f"layer {site.layer} ({site.name}): the grid of its {site.n_queries} places is not known")
        grid, tokens = layout.grid("image"), self._tokens()
        if len(self.regions) not in (1, len(tokens)):
            raise ValueError(f"region holds {len(self.regions)} regions, and there are {len(tokens)} prompts")
        maps = weights.transpose(2, 3).unflatten(3, grid)  # (B, H, L, h, w)
        new = list(maps.unbind(0))
        for prompt in range(len(tokens)):
            some = self.regions[prompt if len(self.regions) > 1 else 0]
            region = F.interpolate(some[None, None].to(weights), size=grid, mode="bilinear")[0, 0]
            if not tokens[prompt] or not bool(region.any()):
                continue
            mine = [i for i, p in enumerate(site.prompts) if p == prompt]
            if self.compat == "authors":
                # Heads of all rows of a picture, its unconditional ones too, as one.
                for n in range(len([i for i in mine if site.rows[i] == "cond"])):
                    both = [[i for i in mine if site.rows[i] == name][n] for name in dict.fromkeys(site.rows)]
                    made = free_region(torch.cat([maps[i] for i in both]), region, tokens[prompt], **self.settings)
                    for i, part in zip(both, made.split(maps.shape[1]), strict=True):
                        new[i] = part
                continue
            for i in mine:
                if site.rows[i] == "cond":
                    new[i] = free_region(maps[i], region, tokens[prompt], **self.settings)
        if all(a is b for a, b in zip(new, maps.unbind(0), strict=True)):
            return weights
        return torch.stack(new).flatten(3).transpose(2, 3)


def _region(region: Any) -> Tensor:
    """A region as a mask (h, w) in [0, 1]."""
    if isinstance(region, Tensor):
        check_tensor("region", region)
        if region.dim() != 2:
            raise ValueError(f"region must be a mask (h, w), got {tuple(region.shape)}")
        mask = region.float()
    else:
        if not isinstance(region, Sequence) or len(region) != 4:
            raise ValueError(
                "region must be (top, left, bottom, right) as shares of the sides, a mask (h, w), or a list of these, "
                f"got {describe(region)}"
            )
        top, left, bottom, right = (check_real("region", r, least=0, most=1) for r in region)
        side = (torch.arange(64) + 0.5) / 64
        rows, columns = (side >= top) & (side < bottom), (side >= left) & (side < right)
        mask = (rows[:, None] & columns).float()
    if not bool(mask.any()) or bool((mask > 0).all()):
        raise ValueError("region must leave a part of the picture, and hold one; it is empty, or all of it")
    return mask


# ---- what a free region is worth


@shaped(image="float (..., 3, h, w)")
def grey(image: Tensor) -> Tensor:
    """(..., h, w) luma of colours."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype, device=image.device)
    return (image * weights[:, None, None]).sum(-3)


@shaped(image="float (B, 3, h, w)")
def saliency(image: Tensor, side: int = 64) -> Tensor:
    """Spectral-residual saliency (B, h, w), at most 1: what a picture's log spectrum has beside its local mean.

    Args:
        image: in [0, 1].
        side: of the square that the spectrum is taken of.

    Reference: Hou and Zhang, 2007, as in OpenCV (3 x 3 mean, a 5 x 5 blur of standard deviation 8, squared).
    """
    check_int("side", side, least=2)
    small = F.interpolate(grey(image)[:, None], size=(side, side), mode="bilinear")[:, 0] * 255
    spectrum = torch.fft.fft2(small.double())
    logs = spectrum.abs().clamp(min=1e-12).log()
    mean = F.avg_pool2d(F.pad(logs[:, None], (1, 1, 1, 1), mode="reflect"), 3, stride=1)[:, 0]
    back = torch.fft.ifft2(torch.polar((logs - mean).exp(), spectrum.angle())).abs()
    found = normalize(smooth(back[:, None], 8.0, 5).square(), "max")
    return F.interpolate(found, size=image.shape[-2:], mode="bilinear")[:, 0].to(image)


@shaped(image="float (B, 3, h, w)")
def variation(image: Tensor, box: Sequence[int]) -> Tensor:
    """(B,) total variation of grey levels (0 to 255) inside a box, per pixel.

    Args:
        image: in [0, 1].
        box: (top, left, bottom, right) in pixels, the last two excluded.
    """
    box, (h, w) = check_ints("box", box), image.shape[-2:]
    if len(box) != 4 or not (0 <= box[0] <= box[2] - 2 <= h - 2 and 0 <= box[1] <= box[3] - 2 <= w - 2):
        raise ValueError(f"box must be (top, left, bottom, right) of at least 2 x 2 pixels within {h} x {w}, got {box}")
    top, left, bottom, right = box
    part = grey(image)[:, top:bottom, left:right] * 255
    total = part.diff(dim=-2).abs().sum((-2, -1)) + part.diff(dim=-1).abs().sum((-2, -1))
    return total / (part.shape[-2] * part.shape[-1])


def vtcm(clip: Tensor, saliency: Tensor, variation: Tensor, form: str = "sum") -> Tensor:
    """How well a picture both follows its prompt and leaves room: higher is better. Our reading of the paper's metric.

    Args:
        clip: similarity of picture and prompt.
        saliency: mean of :func:`saliency` in the region.
        variation: of :func:`variation`.
        form: ``"sum"`` for ``clip (1 / saliency + 1 / variation)``, ``"product"`` for ``clip / (saliency variation)``.

    >>> vtcm(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(4.0)).item()
    2.25
    """
    check_choice("form", form, ("sum", "product"))
    if form == "product":
        return clip / (saliency * variation)
    return clip * (1 / saliency + 1 / variation)
