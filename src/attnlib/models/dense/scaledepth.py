"""ScaleDepth: metric depth as the scale of a scene times relative depth, without a range set beforehand.

Zhu et al., 2024, "ScaleDepth: Decomposing Metric Depth Estimation into Scale Prediction and Relative Depth Estimation",
arXiv 2407.08187. N bin queries Q read the maps of a backbone, each the places that its own mask of the layer before
allows, and give the widths of N bins and a map for each; with pixel embeddings P,

    ``b = softmax(MLP(Q))``,  ``c_i = b_1 + .. + b_(i-1) + b_i / 2``,  ``R = sum_i softmax_i(Q P)_i c_i``,

while scale queries read the maps freely and give one S above 0 and an embedding e of the image, which is held against
frozen embeddings t of prompts ("a photo of a kitchen"). Depth is ``S R``; R lies in (0, 1), so that S plays the part of
the largest depth. Nothing but that bound tells the two apart; ``range_weight`` ties S to a quantile of known depth.
Loss: SILog of depth, and the cross entropy of ``cos(e, t) / tau`` where the kind of scene is known.

No code was released; known second-hand: bins, masked attention as of Mask2Former, one scale of several queries, text
similarity of scenes, SILog. Our reading: self-attention over the coarsest map and a pyramid of sums as the interactor,
layers that go from coarse to fine, norms before, the number of layers, exp of the scale. What text is encoded by is
given by the user (:meth:`ScaleDepth.bind`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_divides, check_float, check_int, check_real, check_type, check_valid, describe, readable
from ...grids import coordinates
from ...nn.layers import Mlp, merge_heads, split_heads
from ...ops import attention
from ...positions import sincos
from ...types import stats_dtype
from ..backbones.stages import map_info
from ..losses import silog_loss
from ..protocol import TaskModel, Terms
from .context import resized_maps

#: exp of more than this is no depth.
MOST_LOG = 15.0


class Depth(NamedTuple):
    """What a model says of images.

    Args:
        depth: (B, H, W), scale times relative depth.
        relative: (B, H, W), between 0 and 1.
        scale: (B,), above 0.
        widths: (B, N) of bins, with a sum of 1.
        centres: (B, N) of bins, increasing.
        image: (B, text_dim) unit vectors beside those of text.
    """

    depth: Tensor
    relative: Tensor
    scale: Tensor
    widths: Tensor
    centres: Tensor
    image: Tensor


def bins(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N) to widths with a sum of 1, and the centres of bins laid one after another from 0 to 1.

    >>> [t.tolist() for t in bins(torch.zeros(2))]
    [[0.5, 0.5], [0.25, 0.75]]
    """
    check_float("logits", logits)
    widths = logits.to(stats_dtype(logits.dtype)).softmax(-1)
    return widths, widths.cumsum(-1) - widths / 2


def scale_between(depth: Tensor, relative: Tensor, valid: Tensor | None = None) -> Tensor:
    """The factor from relative depth to depth, per image: the geometric mean of their ratios where both are above 0.

    Args:
        depth, relative: (B, H, W).
        valid: (B, H, W) boolean, places that count.

    Returns:
        (B,).

    Raises:
        ValueError: shapes that differ, an image without a place.
    """
    for name, t in (("depth", depth), ("relative", relative)):
        check_float(name, t)
    if depth.shape != relative.shape or depth.dim() != 3:
        raise ValueError(f"depth and relative must be (B, H, W), got {describe(depth)} and {describe(relative)}")
    here = depth.isfinite() & (depth > 0) & relative.isfinite() & (relative > 0)
    if valid is not None:
        check_valid("valid", valid, depth.shape)
        here = here & valid
    count = here.sum((1, 2))
    if readable(count) and bool((count == 0).any()):
        raise ValueError(f"image {int((count == 0).nonzero()[0])} has no place with a depth")
    ratio = torch.where(here, depth, 1.0).log() - torch.where(here, relative, 1.0).log()
    return (ratio.sum((1, 2)) / count).exp()


class QueryLayer(nn.Module):
    """Queries read a map (places of their own, if masked), then each other, then an MLP; norms before.

    Args:
        dim, num_heads, mlp_ratio: of the layer.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.cross = nn.ModuleDict({n: nn.Linear(dim, dim) for n in ("q", "k", "v", "proj")})
        self.own = nn.ModuleDict({n: nn.Linear(dim, dim) for n in ("q", "k", "v", "proj")})
        self.mlp = Mlp(dim, mlp_ratio)

    def _read(self, part: nn.ModuleDict, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = (split_heads(part[n](t), self.num_heads) for n, t in (("q", q), ("k", k), ("v", v)))
        return part["proj"](merge_heads(attention(*heads, mask=mask)))

    def forward(self, q: Tensor, tokens: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, N, dim), tokens (B, M, dim) at places (M, dim), mask (B, N, M) -> (B, N, dim)."""
        q = q + self._read(self.cross, self.norms[0](q), tokens + places, tokens, mask)
        y = self.norms[1](q)
        q = q + self._read(self.own, y, y, y)
        return q + self.mlp(self.norms[2](q))


class ScaleDepth(TaskModel):
    """Images (B, C, H, W) of any size to :class:`Depth`.

    Args:
        encoder: gives maps, finest first, with a ``feature_info``.
        dim, num_heads: of queries and tokens.
        num_bins: N.
        num_scales: scale queries; their mean gives one scale.
        depth: layers of bin queries; they read the maps from coarse to fine, and over again.
        scale_depth: layers of scale queries.
        interact: self-attention layers over the coarsest map.
        masked: bin queries read only where their map of the layer before says so.
        text_dim: width of embeddings of text.
        text_weight: of the text similarity in the loss.
        temperature: tau.
        silog: weight of SILog.
        focus: how much of a common factor SILog forgives.
        start: the scale before training.
        range_weight: of ``|log S - log d|`` in the loss, d the largest known depth of an image.
        quantile: d is this quantile instead.

    Raises:
        ValueError: settings that do not fit, an encoder without maps.
    """

    texts: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 256,
        num_heads: int = 8,
        num_bins: int = 64,
        num_scales: int = 4,
        depth: int = 6,
        scale_depth: int = 2,
        interact: int = 1,
        masked: bool = True,
        text_dim: int = 512,
        text_weight: float = 0.1,
        temperature: float = 0.07,
        silog: float = 10.0,
        focus: float = 0.85,
        start: float = 10.0,
        range_weight: float = 0.0,
        quantile: float = 1.0,
    ):
        super().__init__()
        check_type("encoder", encoder, nn.Module, "a module that gives maps")
        dims = map_info(encoder).channels()
        if check_int("dim", dim, least=1) % 4:
            raise ValueError(f"dim must be a multiple of 4, for sines and cosines along two axes, got {dim}")
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", dim)
        for name, value in (("num_bins", num_bins), ("num_scales", num_scales), ("text_dim", text_dim)):
            check_int(name, value, least=1)
        for name, value in (("depth", depth), ("scale_depth", scale_depth), ("interact", interact)):
            check_int(name, value, least=0)
        self.text_weight = check_real("text_weight", text_weight, least=0)
        self.temperature = check_real("temperature", temperature, above=0)
        self.silog, self.focus = check_real("silog", silog, least=0), check_real("focus", focus, least=0, most=1)
        self.range_weight = check_real("range_weight", range_weight, least=0)
        self.quantile = check_real("quantile", quantile, above=0, most=1)
        self.encoder, self.dim, self.masked, self.text_dim = encoder, dim, masked, text_dim
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in dims)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in dims)
        self.interact = nn.ModuleList(QueryLayer(dim, num_heads) for _ in range(interact))
        self.levels = nn.Parameter(0.02 * torch.randn(len(dims), dim))
        self.bin_queries = nn.Parameter(torch.randn(num_bins, dim))
        self.scale_queries = nn.Parameter(torch.randn(num_scales, dim))
        self.bin_layers = nn.ModuleList(QueryLayer(dim, num_heads) for _ in range(depth))
        self.scale_layers = nn.ModuleList(QueryLayer(dim, num_heads) for _ in range(scale_depth))
        self.bin_norm, self.scale_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pixels, self.to_map = nn.Conv2d(dim, dim, 1), nn.Linear(dim, dim)
        self.to_width = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))
        self.to_scale, self.to_text = nn.Linear(dim, 1), nn.Linear(dim, text_dim)
        nn.init.constant_(self.to_scale.bias, float(torch.tensor(check_real("start", start, above=0)).log()))
        self.scenes: tuple[str, ...] = ()
        self.texts = None

    # ---- text

    @torch.no_grad()
    def bind(
        self,
        text_encoder: Callable[[list[str]], Tensor],
        scenes: Sequence[str],
        template: str = "a photo of a {}",
    ) -> ScaleDepth:
        """Take the kinds of scenes that images are told apart by.

        Args:
            text_encoder: from sentences to embeddings (K, text_dim), CLIP's for instance; it is called once, not kept.
            scenes: names of the kinds, in the order of their numbers in targets.
            template: with ``{}`` where the name goes.

        Raises:
            ValueError: no scenes, embeddings of another shape, or without a direction.
        """
        if not callable(text_encoder):
            raise TypeError(f"text_encoder must be a function of sentences, got {describe(text_encoder)}")
        names = tuple(scenes)
        if not names or isinstance(scenes, str):
            raise ValueError(f"scenes must be names of kinds of scenes, got {scenes!r}")
        if "{}" not in template:
            raise ValueError(f"template must hold {{}} where the name goes, got {template!r}")
        made = text_encoder([template.format(name) for name in names])
        if not isinstance(made, Tensor) or tuple(made.shape) != (len(names), self.text_dim):
            raise ValueError(f"text_encoder must give {(len(names), self.text_dim)}, got {describe(made)}")
        like = self.to_text.weight
        made = made.detach().to(like.device, stats_dtype(like.dtype))
        if not bool(made.isfinite().all()) or not bool((made.norm(dim=-1) > 0).all()):
            raise ValueError("text_encoder must give finite embeddings that are not zero")
        self.scenes, self.texts = names, F.normalize(made, dim=-1)
        return self

    def likeness(self, image: Tensor) -> Tensor:
        """(B, text_dim) to logits (B, K) of the scenes.

        Raises:
            ValueError: no text encoder is bound.
        """
        if self.texts is None:
            raise ValueError("no text encoder is bound: call bind(text_encoder, scenes) first")
        return image.to(self.texts.dtype) @ self.texts.to(image.device).mT / self.temperature

    # ---- the model

    def _places(self, grid: Sequence[int], like: Tensor) -> Tensor:
        return sincos(coordinates(grid, like.device), self.dim).to(like.dtype)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """Maps of one width, finest first, each with what is coarser."""
        maps = [lateral(m) for lateral, m in zip(self.lateral, self.encoder(x), strict=True)]
        grid = maps[-1].shape[2:]
        tokens = maps[-1].flatten(2).mT
        for layer in self.interact:
            tokens = layer(tokens, tokens, self._places(grid, tokens))
        maps[-1] = tokens.mT.unflatten(2, tuple(grid))
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + resized_maps(maps[i + 1], maps[i].shape[2:])
        return [smooth(m) for smooth, m in zip(self.smooth, maps, strict=True)]

    def forward(self, x: Tensor) -> Depth:
        """Images (B, C, H, W) -> what is said of them."""
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"x must be images (B, C, H, W) of floating point, got {describe(x)}")
        if not x.shape[1:].numel():
            raise ValueError(f"x must hold at least one pixel, got shape {tuple(x.shape)}")
        maps = self._maps(x)
        pixels, count = self.pixels(maps[0]), len(maps)
        tokens = [m.flatten(2).mT + level for m, level in zip(maps, self.levels, strict=True)]
        places = [self._places(m.shape[2:], m) for m in maps]

        q, s = (t.expand(len(x), -1, -1).to(pixels.dtype) for t in (self.bin_queries, self.scale_queries))
        for i, layer in enumerate(self.bin_layers):
            level = count - 1 - i % count
            mask = self._allowed(self._logits(q, pixels), maps[level].shape[2:]) if self.masked else None
            q = layer(q, tokens[level], places[level], mask)
        for i, layer in enumerate(self.scale_layers):
            level = count - 1 - i % count
            s = layer(s, tokens[level], places[level])

        widths, centres = bins(self.to_width(self.bin_norm(q))[..., 0])
        logits = self._logits(q, pixels).to(widths.dtype)
        relative = torch.einsum("bnhw,bn->bhw", logits.softmax(1), centres)
        relative = resized_maps(relative[:, None], x.shape[2:])[:, 0]
        one = self.scale_norm(s).mean(1)
        scale = self.to_scale(one)[:, 0].to(widths.dtype).clamp(-MOST_LOG, MOST_LOG).exp()
        image = F.normalize(self.to_text(one).to(widths.dtype), dim=-1)
        return Depth(scale[:, None, None] * relative, relative, scale, widths, centres, image)

    def _logits(self, q: Tensor, pixels: Tensor) -> Tensor:
        """(B, N, h, w), how much each pixel belongs to each bin."""
        return torch.einsum("bnc,bchw->bnhw", self.to_map(self.bin_norm(q)), pixels) * self.dim**-0.5

    @staticmethod
    def _allowed(logits: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, N, M): where the sigmoid of a bin's map is a half at least; everywhere, if that is nowhere."""
        there = resized_maps(logits.detach(), grid).flatten(2) >= 0
        return there | ~there.any(-1, keepdim=True)

    def loss(self, prediction: Depth, target: Tensor | Mapping[str, Tensor]) -> Terms:
        """``{"silog"}``, ``"range"`` if it has a weight, and ``"text"`` where scenes are known.

        Args:
            prediction: of :meth:`forward`.
            target: depth (B, H, W), or ``{"depth": .., "scene": (B,) numbers, "valid": (B, H, W)}``, of which the last
                two may be absent. A depth of 0, NaN or infinity is unknown.

        Raises:
            ValueError: depth below 0, no known depth, scenes out of range or without a bound text encoder.
        """
        check_type("prediction", prediction, Depth, "what forward gives")
        given: Mapping[str, Any] = target if isinstance(target, Mapping) else {"depth": target}
        if unknown := sorted(set(given) - {"depth", "scene", "valid"}):
            raise ValueError(f"target has {unknown}; possible: depth, scene, valid")
        if "depth" not in given:
            raise ValueError(f"target has no 'depth', got {sorted(given)}")
        depth, valid, scene = given["depth"], given.get("valid"), given.get("scene")
        if not isinstance(depth, Tensor) or depth.shape != prediction.depth.shape or not depth.is_floating_point():
            raise ValueError(f"target must be depth {tuple(prediction.depth.shape)}, got {describe(depth)}")
        known = depth.isfinite() & (depth > 0)
        if valid is not None:
            check_valid("valid", valid, depth.shape)
            known = known & valid
        if readable(depth):
            below = depth[depth < 0] if valid is None else depth[(depth < 0) & valid]
            if below.numel():
                raise ValueError(f"target holds the depth {float(below[0])}; 0, NaN or infinity mark what is unknown")
        out = {"silog": silog_loss(prediction.depth, depth, known, focus=self.focus, scale=self.silog)}
        if self.range_weight:
            some = known.flatten(1).any(1)
            far = torch.where(known, depth, torch.nan).flatten(1).to(prediction.scale.dtype)
            far = torch.where(some, far.nanquantile(self.quantile, dim=1), 1.0).log()
            apart = torch.where(some, (prediction.scale.log() - far).abs(), 0.0)
            out["range"] = self.range_weight * apart.sum() / some.sum().clamp(min=1)
        if scene is not None:
            logits = self.likeness(prediction.image)
            if not isinstance(scene, Tensor) or scene.shape != prediction.scale.shape or scene.is_floating_point():
                raise ValueError(f"scene must be whole numbers {tuple(prediction.scale.shape)}, got {describe(scene)}")
            if readable(scene) and bool(((scene < 0) | (scene >= len(self.scenes))).any()):
                raise ValueError(f"scene must be 0 to {len(self.scenes) - 1}, got {scene.tolist()}")
            out["text"] = self.text_weight * F.cross_entropy(logits, scene.long())
        return out

    def predict(self, x: Tensor) -> Tensor:
        """Depth (B, H, W)."""
        return self(x).depth
