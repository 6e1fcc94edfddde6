"""AGLA: let a second look at the relevant part of the image join in.

A matching model says which regions of the image the prompt is about (Grad-CAM on its cross-attention) and how well
they match. The rest is blacked out, and the scores of a branch that reads this image are *added*:

    ``z~ = z + alpha z'``  on  ``{v : z_v >= log(cutoff) + max z}``.

The mask: the relevance map is resized with cubic splines, scaled to [0, 1], blurred (sigma 2 % of the longer side) and
scaled again; with the matching score ``s`` pixels stay that are at least as relevant as the one of rank
``int(H W min(1 - s / 2, 1 - 1e-5))``, so that a better match keeps fewer. Where both looks agree, scores grow by
``1 + alpha``: a temperature of ``1 / (1 + alpha)``.

What differs from the authors' code: the branch keeps a cache of its own; from the second new token on theirs continues
the main branch's cache, so that both scores coincide (``compat="authors"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_ints, check_real, check_values, shaped
from ..hooks.branches import OtherPixels
from ..types import check_choice
from .contrastive import ContrastiveDecoding, contrast

# --------------------------------------------------------------------------------------------------------------------
# From relevance to a mask


def _spline_matrix(n: int, size: int) -> Tensor:
    """(size, n) cubic-spline interpolation of ``n`` samples with zeros around them, at ``size`` cell centres."""
    pad = 12
    long = n + 2 * pad
    # Samples of a spline with coefficients c are (c[i-1] + 4 c[i] + c[i+1]) / 6, mirrored at the ends.
    sample = torch.eye(long, dtype=torch.float64) * 4 / 6
    index = torch.arange(long - 1)
    sample[index, index + 1] = sample[index + 1, index] = 1 / 6
    sample[0, 1] = sample[-1, -2] = 2 / 6
    at = (torch.arange(size, dtype=torch.float64) + 0.5) * n / size - 0.5 + pad
    distance = (at[:, None] - torch.arange(long, dtype=torch.float64)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    spline = torch.where(distance < 1, near, far)
    return torch.linalg.solve(sample, spline, left=False)[:, pad : pad + n]


def _blur_matrix(n: int, sigma: float) -> Tensor:
    """(n, n) Gaussian filter, cut off at four sigma, with the edge mirrored."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    at = (torch.arange(n)[:, None] + torch.arange(-radius, radius + 1)) % (2 * n)
    at = torch.where(at >= n, 2 * n - 1 - at, at)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add(1, at, kernel.expand(n, -1))


@shaped(relevance="float (B, h, w)")
def spread_relevance(relevance: Tensor, size: tuple[int, int] = (384, 384), blur: float = 0.02) -> Tensor:
    """A coarse map as a smooth one between 0 and 1.

    Args:
        relevance: (B, h, w).
        size: (H, W).
        blur: sigma of the blur as a share of the longer side; with 0 the resized map is left as it is.

    Returns:
        (B, H, W) float64.

    >>> spread_relevance(torch.eye(4)[None], (16, 16)).amax().item()
    1.0
    """
    check_values("relevance", relevance)
    if not relevance.numel():
        raise ValueError(f"relevance must hold numbers, got {tuple(relevance.shape)}")
    height, width = check_ints("size", size, least=1)
    size = (height, width)
    check_real("blur", blur, least=0)

    def scaled(x: Tensor) -> Tensor:
        x = x - x.amin((1, 2), keepdim=True)
        top = x.amax((1, 2), keepdim=True)
        return x / torch.where(top > 0, top, 1.0)

    x = scaled(relevance.double().cpu())
    rows, columns = (_spline_matrix(n, m) for n, m in zip(x.shape[1:], size, strict=True))
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x = (rows @ x @ columns.T).clamp(low, high)
    if not blur:
        return x.to(relevance.device)
    sigma = check_real("blur", blur, above=0.0) * max(size)
    x = _blur_matrix(size[0], sigma) @ x @ _blur_matrix(size[1], sigma).T
    return scaled(x).to(relevance.device)


@shaped(relevance="float (B, h, w)", score="number (B or 1) | ()")
def relevance_mask(
    relevance: Tensor, score: Tensor | float, size: tuple[int, int] = (384, 384), blur: float = 0.02
) -> Tensor:
    """Which pixels stay.

    Args:
        relevance: (B, h, w) how much each region matters to the text.
        score: (B,) how well image and text match, at most 2.
        size: (H, W).
        blur: of :func:`spread_relevance`.

    Returns:
        (B, H, W) boolean.

    Reference: An et al., 2024, arXiv 2406.12718, section 3.2.

    >>> relevance_mask(torch.eye(4)[None], 2.0, (16, 16)).sum().item()
    1
    """
    spread = spread_relevance(relevance, size, blur)
    share = (1 - torch.as_tensor(score, dtype=torch.float64).reshape(-1) / 2).clamp(0, 1 - 1e-5)
    if len(share) not in (1, len(spread)):
        raise ValueError(f"score has {len(share)} entries for {len(spread)} images")
    rank = (size[0] * size[1] * share).long().expand(len(spread)).to(spread.device)
    threshold = spread.flatten(1).sort(1, descending=True).values.gather(1, rank[:, None])
    return spread >= threshold[..., None]


@shaped(pixels="float (B, channels, H, W)", mask="bool (B, h, w)")
def mask_pixels(pixels: Tensor, mask: Tensor, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> Tensor:
    """Black out what a mask leaves out, in pixels that are normalised already.

    Args:
        pixels: (B, channels, H, W) as a processor gives them, ``(x - mean) / std``.
        mask: (B, h, w) boolean, resized by nearest neighbours where it has another size.
        mean: the processor's ``image_mean``.
        std: the processor's ``image_std``.

    Returns:
        (B, channels, H, W).

    >>> mask_pixels(torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]]), (0.5,), (0.5,)).flatten().tolist()
    [1.0, -1.0]
    """
    if not pixels.numel() or not mask.numel():
        raise ValueError(f"pixels and mask must hold something, got {tuple(pixels.shape)} and {tuple(mask.shape)}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, pixels.shape[1]):
            raise ValueError(
                f"{name} must hold one number, or one for each of {pixels.shape[1]} channels, got {values}"
            )
    if 0 in std:
        raise ValueError(f"std must hold no zero, got {std}")
    if mask.shape[-2:] != pixels.shape[-2:]:
        mask = F.interpolate(mask[:, None].float(), size=pixels.shape[-2:], mode="nearest-exact")[:, 0] > 0.5
    given = [torch.as_tensor(t, dtype=torch.float64, device=pixels.device) for t in (mean, std)]
    black = -given[0] / given[1]
    return torch.where(mask[:, None].to(pixels.device), pixels, black.to(pixels.dtype)[:, None, None])


# --------------------------------------------------------------------------------------------------------------------
# Relevance


@shaped(attention="float (B, H, T, K)", gradient="float (B, H, T, K)", valid="bool (B, T)")
def grad_cam(attention: Tensor, gradient: Tensor, valid: Tensor, grid: tuple[int, int], average: bool = True) -> Tensor:
    """Relevance of patches from one layer of cross-attention.

    Args:
        attention: (B, H, T, P) or (B, H, T, 1 + P) with the class token in front, weights of text on patches.
        gradient: of the matching score with respect to them.
        valid: (B, T) tokens that exist; the first and the last of them are left out of the average.
        grid: (h, w) of the patches.
        average: over the text; otherwise there is a map for every token.

    Returns:
        (B, h, w), or (B, T, h, w): ``mean_h(A * max(G, 0))``; zeros for tokens that do not exist.

    Reference: An et al., 2024, arXiv 2406.12718, equations 4 and 5.
    """
    rows, columns = check_ints("grid", grid, least=1)
    grid, patches = (rows, columns), rows * columns
    if attention.shape != gradient.shape or attention.shape[-1] not in (patches, patches + 1):
        raise ValueError(
            f"attention {tuple(attention.shape)} and its gradient {tuple(gradient.shape)} must agree and have "
            f"{patches} keys, or one more"
        )
    cam = (attention * gradient.clamp(min=0))[..., -patches:].mean(1)
    cam = cam.masked_fill(~valid.bool().unsqueeze(-1), 0.0)
    if not average:
        return cam.unflatten(2, grid)
    count = valid.long().sum(1) - 2
    place = valid.long().cumsum(1) - 1
    inner = valid & (place >= 1) & (place <= count[:, None])
    total = torch.where(inner[..., None], cam, torch.zeros_like(cam)).sum(1)
    return (total / count.clamp(min=1)[:, None]).unflatten(1, grid)


class BlipRelevance:
    """Relevance and matching score from a BLIP matching model of transformers.

    Args:
        model: a ``BlipForImageTextRetrieval``.
        layer: layer of the text encoder whose cross-attention is read.

    Raises:
        TypeError: another model.
        ValueError: no such layer.
    """

    def __init__(self, model: nn.Module, layer: int = 6):
        self.model = model
        encoder: Any = getattr(model, "text_encoder", None)
        if encoder is None or not hasattr(model, "itm_head"):
            raise TypeError(f"model must be a BlipForImageTextRetrieval, got {type(model).__name__}")
        layers = encoder.encoder.layer
        if not -len(layers) <= layer < len(layers):
            raise ValueError(f"layer {layer} of the text encoder does not exist; it has {len(layers)}")
        self.attention = layers[layer].crossattention.self

    def __call__(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, h, w) relevance and (B,) cosine score of the pairs of image and text."""
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen: list[Tensor] = []
        handle = self.attention.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                given = dict(
                    pixel_values=pixel_values.clone(), input_ids=input_ids.clone(), attention_mask=valid.clone()
                )
                match = self.model(**given).itm_score[:, 1].sum()
                (gradient,) = torch.autograd.grad(match, seen[-1])
            with torch.no_grad():
                score = self.model(**given, use_itm_head=False).itm_score.diagonal()
        finally:
            handle.remove()
            self.model.train(training)
        side = int((seen[-1].shape[-1] - 1) ** 0.5)
        return grad_cam(seen[-1].detach(), gradient, valid.bool(), (side, side)), score


# --------------------------------------------------------------------------------------------------------------------
# Decoding


class AGLA(ContrastiveDecoding):
    """Add the scores of a branch that reads an image of the relevant regions only.

    Args:
        pixels: (images, channels, H, W) masked pixels as the model's processor gives them, or a function from the
            prompt's own pixels to such; see :func:`relevance_mask` and :func:`mask_pixels`.
        alpha: weight of the branch; 0 leaves the scores of plausible tokens as they are.
        cutoff: share of the largest probability that a token needs.
        compat: ``"authors"`` reads the branch for the first new token only; from the second on its scores are the
            model's own, which are then sharpened by ``1 + alpha``.

    Raises:
        ValueError: a negative weight, a cut-off outside [0, 1].

    Reference: An et al., 2024, arXiv 2406.12718.

    >>> AGLA(torch.zeros(1, 3, 8, 8)).b
    2.0
    """

    name: ClassVar[str] = "agla"

    def __init__(
        self,
        pixels: Tensor | Callable[[Tensor], Tensor],
        alpha: float = 2.0,
        cutoff: float = 0.5,
        compat: str | None = None,
    ):
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {alpha}")
        check_choice("compat", compat, (None, "authors"))
        self.compat = compat
        super().__init__(OtherPixels(pixels, "relevant-region"), 1.0, alpha, cutoff, interval=0 if compat else None)

    def beyond(self, logits: Tensor) -> Tensor:
        return contrast(logits, logits, self.a, self.b, self.cutoff) if self.compat else logits

    @classmethod
    def from_relevance(
        cls,
        relevance: Tensor,
        score: Tensor | float,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        **settings: Any,
    ) -> AGLA:
        """Mask the prompt's own pixels by relevance maps (images, h, w) and matching scores (images,).

        ``mean`` and ``std`` are those of the model's image processor; ``settings`` those of the class.
        """

        def masked(pixels: Tensor) -> Tensor:
            repeats, rest = divmod(len(pixels), len(relevance))
            if rest:
                raise ValueError(f"there are relevance maps of {len(relevance)} images, pixels of {len(pixels)}")
            mask = relevance_mask(relevance, score, (int(pixels.shape[-2]), int(pixels.shape[-1])))
            return mask_pixels(pixels, mask.repeat_interleave(repeats, 0), mean, std)

        return cls(masked, **settings)
