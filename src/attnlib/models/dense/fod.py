"""FOD: what an image without faults lets one expect of every patch, of its neighbours, and of the normal image.

Yao et al., 2023, "Focus the Discrepancy: Intra- and Inter-Correlation Learning for Image Anomaly Detection",
arXiv 2308.02983. Features x of a frozen backbone are rebuilt by layers with two attentions: of patches among themselves
(intra) and to the mean features of normal images (inter),

    ``z = (x + intra(x, x)) - (x + inter(x, ref))``,    ``y = LN(z)``,    ``out = LN(y + MLP(y))``.

Beside its map P each attention predicts a prior T: Gaussians on the grid of widths
``sigma = 3^(sigmoid(5 W x) + 1e-5) - 1`` per query, head and axis. With S(P, T) = KL(P, T) + KL(T, P), sg what gets no
gradient, and E the entropy, two losses are made small in one step (their gradients are added):

    ``L1 = rec + a S(sg P, T)_intra - a S(sg P, T)_inter``                                      (moves T),
    ``L2 = rec - a S(P, sg T)_intra - b E(P)_intra + a S(P, sg T)_inter + b E(P)_inter``        (moves P).

A patch is as anomalous as its reconstruction is wrong, times how far its inter map is from the prior: with
``w = softmax over patches(-S)``, ``score = (|x - x'|^2 / C + 1 - cos) (max w - w)``.

Differs from the authors' code: the output projection of attention, which they compute and throw away, is applied; the
largest w is that of an image, not of a batch (both theirs by ``compat="authors"``); grids may be oblong and of any
size, to which the mean features are interpolated; a batch of any size is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_divides,
    check_flag,
    check_int,
    check_ints,
    check_real,
    check_type,
    describe,
    readable,
)
from ...grids import coordinates
from ...nn.layers import Mlp, merge_heads, split_heads
from ...nn.released import Released
from ...ops import attention
from ...positions import gaussian_prior, resized, sincos
from ...types import stats_dtype
from ..backbones.resnet import resnet
from ..backbones.stages import Features, map_info
from ..build import create_model, register_models
from ..protocol import Step, TaskModel, Terms, trained

COMPAT = (None, "authors")
TINY = 1e-4


class Correlation(NamedTuple):
    """Maps (B, H, N, N) of one attention: what it does, and what it expects of itself."""

    weights: Tensor
    prior: Tensor


class LevelPrediction(NamedTuple):
    """One level: features (B, h, w, C), what they were rebuilt to, and the maps of its layers (none if not kept)."""

    features: Tensor
    rebuilt: Tensor
    intra: tuple[Correlation, ...]
    inter: tuple[Correlation, ...]


class Anomalies(NamedTuple):
    """Scores of all pixels (B, H, W), and of the images (B,)."""

    pixels: Tensor
    images: Tensor


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """``sum_j p (log(p + 1e-4) - log(q + 1e-4))``, a mean over heads: (B, H, N, M) -> (B, N)."""
    return (p * ((p + TINY).log() - (q + TINY).log())).sum(-1).mean(1)


def entropy(p: Tensor) -> Tensor:
    """``-sum_j p log(p + 1e-4)``, a mean over heads: (B, H, N, M) -> (B, N)."""
    return -(p * (p + TINY).log()).sum(-1).mean(1)


def discrepancy(p: Tensor, q: Tensor) -> Tensor:
    """Divergence both ways."""
    return divergence(p, q) + divergence(q, p)


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)


class PriorAttention(nn.Module):
    """Softmax attention over a grid that also says what it expects its map to be.

    Args:
        dim, num_heads: of the attention.
        prior: whether it predicts one.
        project: apply an output projection; the release has one and throws its result away.
        drop: dropout of the map.
    """

    def __init__(self, dim: int, num_heads: int, prior: bool = True, project: bool = True, drop: float = 0.0):
        super().__init__()
        self.num_heads, self.drop = num_heads, drop
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.sigma = nn.Linear(dim, 2 * num_heads) if prior else None
        self.proj = nn.Linear(dim, dim) if project else None

    def widths(self, x: Tensor) -> Tensor:
        """(B, H, N, 2): along rows and along columns, between 0 and 2 (1 + 2e-5)."""
        assert self.sigma is not None
        s = split_heads(self.sigma(x), self.num_heads)
        return 3 ** (torch.sigmoid(5 * s.to(stats_dtype(s.dtype))) + 1e-5) - 1

    def forward(
        self, x: Tensor, context: Tensor, grid: Sequence[int], maps: bool = True
    ) -> tuple[Tensor, Correlation | None]:
        """(B, N, dim) queries on ``grid``, (B, M, dim) keys -> (B, N, dim), and the maps where they are wanted."""
        q, k, v = (split_heads(f(y), self.num_heads) for f, y in ((self.q, x), (self.k, context), (self.v, context)))
        drop = self.drop if self.training else 0.0
        found = None
        if maps and self.sigma is not None:
            weights = ((q * q.shape[-1] ** -0.5) @ k.mT).to(stats_dtype(q.dtype)).softmax(-1)
            weights = F.dropout(weights, drop, training=drop > 0)
            found = Correlation(weights, gaussian_prior(self.widths(x), grid).dense().exp())
            y = merge_heads(weights.to(v.dtype) @ v)
        else:
            y = merge_heads(attention(q, k, v, dropout_p=drop))
        return (y if self.proj is None else self.proj(y)), found


class FODLayer(nn.Module):
    """Both attentions, their difference, and an MLP; norms behind.

    Args:
        dim, num_heads, mlp_ratio, drop: as of transformers.
        intra, inter: which attentions there are; without both it is a plain layer, without maps.
        project: as of :class:`PriorAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop: float, intra: bool, inter: bool, project: bool
    ):
        super().__init__()
        within = intra or not inter
        self.intra = PriorAttention(dim, num_heads, intra, project, drop) if within else None
        self.inter = PriorAttention(dim, num_heads, True, project, drop) if inter else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp, self.drop = Mlp(dim, mlp_ratio), nn.Dropout(drop)

    def forward(
        self, x: Tensor, reference: Tensor | None, grid: Sequence[int], maps: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor, Correlation | None, Correlation | None]:
        """(B, N, dim) -> the same, and the maps of both attentions where they are wanted."""
        found: list[Correlation | None] = [None, None]
        branches = []
        for i, (part, context) in enumerate(((self.intra, x), (self.inter, reference))):
            if part is not None:
                assert context is not None
                y, found[i] = part(x, context, grid, maps[i])
                branches.append(x + self.drop(y))
        y = self.norm1(branches[0] - branches[1] if len(branches) == 2 else branches[0])
        return self.norm2(y + self.drop(self.mlp(y))), found[0], found[1]


class FODLevel(nn.Module):
    """Features of one level and how they are rebuilt.

    Args:
        in_dim: channels of the features.
        dim, num_heads, depth, mlp_ratio, drop: of the layers.
        intra, inter: which attentions they have.
        compat: ``"authors"``: without output projections.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int = 8,
        depth: int = 3,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        intra: bool = True,
        inter: bool = True,
        compat: str | None = None,
    ):
        super().__init__()
        if check_int("dim", dim, least=1) % 4:
            raise ValueError(f"dim must be a multiple of 4, for sines and cosines along two axes, got {dim}")
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", dim)
        check_int("depth", depth, least=1), check_real("drop", drop, least=0, below=1)
        check_real("mlp_ratio", mlp_ratio, above=0)
        check_choice("compat", compat, COMPAT)
        self.in_dim, self.dim = check_int("in_dim", in_dim, least=1), dim
        self.embed = nn.Linear(in_dim, dim)
        self.embed_reference = nn.Linear(in_dim, dim) if check_flag("inter", inter) else None
        for part in (self.embed, self.embed_reference):
            if part is not None:
                nn.init.kaiming_normal_(part.weight)
        self.drop = nn.Dropout(drop)
        self.layers = nn.ModuleList(
            FODLayer(dim, num_heads, mlp_ratio, drop, check_flag("intra", intra), inter, compat is None)
            for _ in range(depth)
        )
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, in_dim)

    def _positions(self, grid: Sequence[int], like: Tensor) -> Tensor:
        """(N, dim): sines and cosines in turns, of columns in the first half and of rows in the second."""
        table = sincos(coordinates(grid, like.device).flip(-1), self.dim)
        return table.unflatten(-1, (2, 2, -1)).mT.flatten(1).to(like.dtype)

    def forward(
        self, x: Tensor, reference: Tensor | None = None, maps: tuple[bool, bool] = (True, True)
    ) -> LevelPrediction:
        """Features (B, h, w, in_dim), and those of the normal image (h, w, in_dim) where ``inter`` needs them.

        Args:
            x: the features.
            reference: mean features.
            maps: whether the maps of the intra and of the inter attention are kept.
        """
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-1] != self.in_dim or not x.is_floating_point():
            raise ValueError(f"x must be features (B, h, w, {self.in_dim}) of floating point, got {describe(x)}")
        grid = x.shape[1:3]
        known = None
        places = self._positions(grid, x)
        if self.embed_reference is not None:
            if not isinstance(reference, Tensor) or reference.shape != x.shape[1:]:
                raise ValueError(f"reference must be features {tuple(x.shape[1:])}, got {describe(reference)}")
            known = self.drop(self.embed_reference(reference.flatten(0, 1).to(x.dtype)) + places)
            known = known.expand(len(x), -1, -1)
        y = self.drop(self.embed(x.flatten(1, 2)) + places)
        intra, inter = [], []
        for layer in self.layers:
            y, a, b = layer(y, known, grid, maps)
            intra += [a] if a is not None else []
            inter += [b] if b is not None else []
        rebuilt = self.out(self.norm(y)).unflatten(1, tuple(grid))
        return LevelPrediction(x, rebuilt, tuple(intra), tuple(inter))


class FOD(TaskModel):
    """Images (B, in_chans, H, W) to what is wrong in them, after a look at images in which nothing is.

    The mean features of normal images are taken by :meth:`remember`, before training; then it is trained on such images
    alone. The backbone is frozen.

    Args:
        encoder: gives maps with a ``feature_info``, or the name of a backbone, built without weights and read at
            strides 8 and 16; a wide ResNet-50 by default.
        img_size: side of the images, or (height, width): of the memory; others are possible, to which it is resized.
        dims: width per level.
        num_heads, depth, mlp_ratio, drop: of the layers.
        intra, inter: which attentions there are; with neither it only rebuilds.
        correlation: weight a of the discrepancies.
        entropy: weight b of the entropies.
        pool: side of the mean over neighbours that features go through.
        in_chans: channels of images.
        compat: ``"authors"``, as above.

    >>> trunk = Features(resnet((4, 4), (1, 1), stem_dim=4, num_classes=0), (1, 2))
    >>> model = FOD(trunk, 32, dims=(8, 8), num_heads=2, depth=1)
    >>> model.remember(torch.randn(4, 3, 32, 32)).predict(torch.randn(2, 3, 32, 40)).pixels.shape
    torch.Size([2, 32, 40])
    """

    seen: Tensor

    def __init__(
        self,
        encoder: nn.Module | str | None = None,
        img_size: int | tuple[int, int] = 256,
        dims: Sequence[int] = (256, 512),
        num_heads: int = 8,
        depth: int = 3,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        intra: bool = True,
        inter: bool = True,
        correlation: float = 0.5,
        entropy: float = 0.5,
        pool: int = 3,
        in_chans: int = 3,
        compat: str | None = None,
    ):
        super().__init__()
        self.in_chans = check_int("in_chans", in_chans, least=1)
        sides = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
        if len(sides) != 2:
            raise ValueError(f"img_size must be one side or (height, width), got {sides}")
        if check_int("pool", pool, least=1) % 2 == 0:
            raise ValueError(f"pool must be odd, got {pool}")
        self.pool, self.intra, self.inter = pool, intra, inter
        self.correlation, self.entropy = (
            check_real("correlation", correlation, least=0),
            check_real("entropy", entropy, least=0),
        )
        check_choice("compat", compat, COMPAT)
        self.compat = compat
        trunk: Any = encoder
        if encoder is None:
            wide = resnet(depths=(3, 4, 6, 3), group_width=128, num_classes=0, in_chans=in_chans)
            trunk = Features(wide, (2, 3))
        elif isinstance(encoder, str):
            steps = [info["reduction"] for info in create_model(encoder, num_classes=0).feature_info]
            if not {8, 16} <= set(steps):
                raise ValueError(f"encoder {encoder!r} has maps at strides {steps}; 8 and 16 are needed")
            at = [steps.index(8), steps.index(16)]
            trunk = create_model(encoder, features_only=True, out_indices=at, in_chans=in_chans)
        check_type("encoder", trunk, nn.Module, "a module that gives maps, or the name of a backbone")
        info, dims = map_info(trunk), check_ints("dims", dims, least=1)
        channels = info.channels()
        if len(channels) != len(dims):
            raise ValueError(f"dims has {len(dims)} levels, the encoder gives {len(channels)} maps with a feature_info")
        self.encoder = trunk.requires_grad_(False).eval()
        self.levels = nn.ModuleList(
            FODLevel(c, d, num_heads, depth, mlp_ratio, drop, intra, inter, compat)
            for c, d in zip(channels, dims, strict=True)
        )
        if inter:
            for i, (c, step) in enumerate(zip(channels, info.reduction(), strict=True)):
                self.register_buffer(f"reference{i}", torch.zeros(*(-(-side // step) for side in sides), c))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> FOD:
        """As of modules; the backbone stays in evaluation."""
        super().train(mode)
        self.encoder.eval()
        return self

    # ---- the backbone and its memory

    @torch.no_grad()
    def features(self, x: Tensor) -> list[Tensor]:
        """What is rebuilt: maps of all levels (B, h, w, C), smoothed over neighbours."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        if not x.shape[2:].numel():
            raise ValueError(f"x must hold at least one pixel, got shape {tuple(x.shape)}")
        if readable(x) and not bool(x.isfinite().all()):
            raise ValueError("x must be finite")
        maps = [F.avg_pool2d(m, self.pool, 1, self.pool // 2) for m in self.encoder(x)]
        return [m.permute(0, 2, 3, 1) for m in maps]

    @torch.no_grad()
    def remember(self, x: Tensor) -> FOD:
        """Take images without faults into the mean features; call it for all of them, batch by batch."""
        if not self.inter:
            raise ValueError("this model was built with inter=False: it has no memory of normal images")
        maps = self.features(x)
        if not len(x):
            return self
        count = self.seen + len(x)
        for i, m in enumerate(maps):
            held = getattr(self, f"reference{i}")
            if m.shape[1:] != held.shape:
                raise ValueError(
                    f"x gives features {tuple(m.shape[1:])} at level {i}, the memory is {tuple(held.shape)}: images of "
                    "img_size are remembered"
                )
            held += (m.to(held.dtype) - held).sum(0) / count
        self.seen.copy_(count)
        return self

    @torch.no_grad()
    def forget(self) -> FOD:
        """Begin the memory anew."""
        for name, held in self.named_buffers(recurse=False):
            if name == "seen" or name.startswith("reference"):
                held.zero_()
        return self

    def _reference(self, level: int, grid: Sequence[int]) -> Tensor | None:
        if not self.inter:
            return None
        if readable(self.seen) and not int(self.seen):
            raise ValueError("no image was remembered: call remember() with images that have no faults first")
        held = getattr(self, f"reference{level}")
        return resized(held.movedim(-1, 0), tuple(grid), "bilinear").movedim(0, -1)

    # ---- the task

    def forward(self, x: Tensor) -> tuple[LevelPrediction, ...]:
        """Images (B, in_chans, H, W), as the backbone takes them, to what :meth:`loss` and :meth:`scores` read."""
        return self._levels(x, (self.intra, self.inter))

    def _levels(self, x: Tensor, maps: tuple[bool, bool]) -> tuple[LevelPrediction, ...]:
        given = self.features(x)
        return tuple(
            level(m, self._reference(i, m.shape[1:3]), maps)
            for i, (level, m) in enumerate(zip(self.levels, given, strict=True))
        )

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """One update of all: both losses are added. A ``"target"`` is not needed, and not read."""
        check_type("batch", batch, Mapping, "a mapping from names to inputs")
        if unknown := sorted(set(batch) - {"x", "target"}):
            raise ValueError(f"batch holds {unknown}, which forward('x',) does not take")
        if "x" not in batch:
            raise ValueError(f"batch has no 'x', got {sorted(batch)}")
        yield Step("all", trained(self), lambda: self.loss(self(batch["x"])))

    def loss(self, prediction: Sequence[LevelPrediction], target: Any = None) -> Terms:
        """Terms of both losses, added over levels; ``*_prior`` move the priors only, ``*_map`` and entropies the maps.

        Args:
            prediction: of :meth:`forward`.
            target: not read: what is rebuilt are the features themselves.
        """
        check_type("prediction", prediction, Sequence, "what forward gives")
        out: dict[str, list[Tensor]] = {}
        both = 2 if self.intra or self.inter else 1  # the reconstruction is part of either loss
        for level in prediction:
            check_type("prediction", level, LevelPrediction, "what forward gives")
            dtype = stats_dtype(level.rebuilt.dtype)
            x, y = level.features.to(dtype), level.rebuilt.to(dtype)
            wrong = _mean((x - y).square()) + _mean(1 - F.cosine_similarity(y, x, dim=-1))
            out.setdefault("reconstruction", []).append(both * wrong)
            for name, maps, sign in (("intra", level.intra, 1.0), ("inter", level.inter, -1.0)):
                for p, t in maps:
                    scale = sign / len(maps)
                    terms = {
                        "prior": scale * self.correlation * _mean(discrepancy(p.detach(), t)),
                        "map": -scale * self.correlation * _mean(discrepancy(p, t.detach())),
                        "entropy": -scale * self.entropy * _mean(entropy(p)),
                    }
                    for kind, term in terms.items():
                        out.setdefault(f"{name}_{kind}", []).append(term)
        return {name: torch.stack(terms).sum() for name, terms in out.items()}

    def scores(self, level: LevelPrediction) -> Tensor:
        """How anomalous every patch of a level is, (B, h, w)."""
        dtype = stats_dtype(level.rebuilt.dtype)
        x, y = level.features.to(dtype), level.rebuilt.to(dtype)
        wrong = (x - y).square().mean(-1) + 1 - F.cosine_similarity(x, y, dim=-1)
        maps = level.inter or level.intra
        if not maps or not wrong.numel():
            return wrong
        apart = torch.stack([discrepancy(p, t) for p, t in maps]).mean(0)
        weight = (-apart).softmax(-1)
        if level.inter:
            most = weight.max() if self.compat == "authors" else weight.amax(-1, keepdim=True)
            weight = most - weight
        return wrong * weight.view_as(wrong)

    def predict(self, x: Tensor, *, smooth: float = 4.0) -> Anomalies:
        """Scores of pixels, a mean over levels, and of images: the largest after smoothing.

        Args:
            x: images of any size.
            smooth: width of the Gaussian, in pixels; 0 for none. The scores of pixels are not smoothed.
        """
        check_real("smooth", smooth, least=0)
        made = self._levels(x, (self.intra and not self.inter, self.inter))
        size = tuple(x.shape[2:])
        up = [F.interpolate(self.scores(m)[:, None], size, mode="bilinear", align_corners=True)[:, 0] for m in made]
        pixels = torch.stack(up).mean(0)
        return Anomalies(pixels, smoothed(pixels, smooth).flatten(1).amax(1))


def smoothed(x: Tensor, sigma: float) -> Tensor:
    """(B, H, W) under a Gaussian cut at 4 widths, mirrored at the borders, as scipy's ``gaussian_filter``."""
    check_axes("x", x, B=None, H=None, W=None)
    radius = int(4 * check_real("sigma", sigma, least=0) + 0.5)
    if not radius or not x.numel():
        return x
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = (-0.5 * (at / sigma).square()).softmax(0)
    for axis in (1, 2):
        side = x.shape[axis]
        places = torch.arange(-radius, side + radius, device=x.device) % (2 * side)
        places = torch.minimum(places, 2 * side - 1 - places)
        x = x.index_select(axis, places).unfold(axis, 2 * radius + 1, 1) @ kernel
    return x


def convert(state_dict: Mapping[str, Tensor], model: FODLevel) -> dict[str, Tensor]:
    """From the authors' ``FOD``, which is one level; what it never reads is dropped."""
    theirs = Released(state_dict, "the authors' FOD")
    layer = model.layers[0]
    assert isinstance(layer, FODLayer)
    start = r"encoder\.encode_layers\.\d+\."
    if layer.intra is None:
        theirs.leave(start + r"self_attention\..*", because="inter=True alone never reads it")
    elif layer.intra.sigma is None:
        theirs.leave(start + r"self_attention\.sigma_projection\..*", because="no prior is read")
    if layer.inter is None:
        theirs.leave(start + r"cross_attention\..*", because="inter=False never reads it")
    if all(part is None or part.proj is None for part in (layer.intra, layer.inter)):
        theirs.leave(start + r"(?:self|cross)_attention\.out_projection\..*", because="its result is thrown away")
    rules: dict[str, Any] = {
        r"(ref_)?embedding\.project_embedding\.project\.(weight|bias)": lambda m, t: {
            f"embed{'_reference' if m[1] else ''}.{m[2]}": t.squeeze(-1) if m[2] == "weight" else t
        },
        r"encoder\.norm\.(.*)": r"norm.\1",
        r"projection\.(.*)": r"out.\1",
    }
    at = r"encoder\.encode_layers\.(\d+)\."
    for their, our in (("self", "intra"), ("cross", "inter")):
        names = {"query": "q", "key": "k", "value": "v", "sigma": "sigma", "out": "proj"}
        for name, short in names.items():
            rules[rf"{at}{their}_attention\.{name}_projection\.(.*)"] = rf"layers.\1.{our}.{short}.\2"
    rules[rf"{at}ffn\.(.*)"] = r"layers.\1.mlp.\2"
    rules[rf"{at}(norm[12]\..*)"] = r"layers.\1.\2"
    return theirs.close(theirs.renamed(rules))


def convert_levels(states: Sequence[Mapping[str, Tensor]], model: FOD) -> dict[str, Tensor]:
    """From ``state_dict`` of a checkpoint of the authors' training: one of their ``FOD`` for each level.

    The backbone and the memory of what is normal are no part of it: they stay as the model has them.

    Raises:
        ValueError: another number of levels.
    """
    if not isinstance(states, (list, tuple)) or len(states) != len(model.levels):
        raise ValueError(
            f"states must be a list of {len(model.levels)} state dicts, one a level, got {describe(states)}"
        )
    out = {k: v for k, v in model.state_dict().items() if not k.startswith("levels.")}
    for i, (state, level) in enumerate(zip(states, model.levels, strict=True)):
        out |= {f"levels.{i}.{k}": v for k, v in convert(state, level).items()}  # type: ignore[arg-type]
    return out


register_models(
    "fod-i2correlation",
    FOD,
    {"fod_wide_resnet50_2": {}},
    license="MIT",
    source="xcyao00/FOD",
    img_size=256,
    task="anomalies",
)
