"""TOPIQ: how good an image looks, where meaning says which distortions count.

Chen et al., 2023, "TOPIQ: A Top-down Approach from Semantics to Distortions for Image Quality Assessment",
arXiv 2308.03060. Maps f_0 (finest) to f_L of a backbone are gated, pooled to the grid of f_L and read by themselves,

    ``t_i = SA_i(W_i pool(g(f_i)) + PE)``,    ``g(f) = GELU(a) * w(b)`` with ``a, b = W f``,

then the tokens of f_L ask those of the finer maps one after another, ``q = t_L``; ``q = CSA_i(q, t_i)`` for i = L - 1
to 0; the score is an MLP of the mean of ``SA(q)``. With a reference r: ``d = sqrt((f - r)^2 + 1e-12)``,
``g = [f, r, d] * w(d)``. CSA is ``q += MHA(LN q, LN t)``, ``q += MLP(LN q)``.

Over a Swin (:class:`SwinMaps`) the maps are those behind its mergings, and the last; released models of faces and of
aesthetics have one, or resize what they judge (``eval_size``). Norms of the backbone stay as they were trained. A map
whose grid is not larger than that of f_L on both axes is not pooled, as released.

Differs from the authors' code: the self-attention that their decoder layers hold and never run is
left out (the converter drops it); distances are float32 at least, where 1e-12 is not zero; terms of the loss have
finite gradients where all scores agree. With a reference both images are resized, the release resizes the judged one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_choice,
    check_divides,
    check_flag,
    check_float,
    check_int,
    check_ints,
    check_real,
    check_tensor,
    check_type,
    describe,
    readable,
)
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import Mlp, smoothed
from ...nn.released import PLAIN, Released
from ...positions import resized
from ...types import stats_dtype
from ..backbones import hosts
from ..backbones.resnet import convert as convert_resnet
from ..backbones.stages import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureInfo, map_info
from ..blocks import Place
from ..build import create_model, register_models
from ..protocol import TaskModel, Terms

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}

#: Width of what weighs the places of a map, and side of the table of positions.
GATE_DIM, TABLE_SIDE = 64, 32


def score_of(distribution: Tensor) -> Tensor:
    """(..., K) probabilities of the grades 1 to K to the mean grade (...).

    >>> float(score_of(torch.tensor([0.0, 0.5, 0.5])))
    2.5
    """
    check_float("distribution", distribution)
    if not distribution.dim():
        raise ValueError(f"distribution must be (..., K), got {describe(distribution)}")
    grades = torch.arange(1, distribution.shape[-1] + 1, device=distribution.device, dtype=distribution.dtype)
    return (distribution * grades).sum(-1)


def norm_in_norm_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """``mean_i |u_i - v_i| sqrt(B) / 2`` of scores brought to mean 0 and length 1: blind to their unit and zero.

    Li et al., 2020, arXiv 2008.03889, with p = 1 and q = 2. Of one score the absolute difference. Scores that all agree
    have no direction: they count as zeros, without a gradient.

    Args:
        prediction, target: (B,).
    """
    check_float("prediction", prediction)
    if not isinstance(target, Tensor) or target.shape != prediction.shape:
        raise ValueError(f"target must be {tuple(prediction.shape)}, as prediction, got {describe(target)}")
    if prediction.numel() < 2:
        return (prediction - target).abs().sum() / max(prediction.numel(), 1)

    def unit(x: Tensor) -> Tensor:
        least = 8 * torch.finfo(x.dtype).eps * x.detach().norm()  # what rounding leaves of the mean
        x = x - x.mean()
        some = ~(x.detach().norm() <= least)  # what is not a number stays none
        return torch.where(some, x / torch.where(some, x, 1.0).norm(), 0.0)

    return (unit(prediction) - unit(target)).abs().sum() / (2 * prediction.numel() ** 0.5)


def earth_movers_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """``mean sqrt(mean_k (P_k - T_k)^2)`` of the cumulated distributions (B, K); where they agree the gradient is 0."""
    check_float("prediction", prediction)
    if prediction.dim() != 2 or not isinstance(target, Tensor) or target.shape != prediction.shape:
        raise ValueError(f"prediction and target must be (B, K), got {describe(prediction)} and {describe(target)}")
    apart = (prediction.cumsum(-1) - target.cumsum(-1)).square().mean(-1)
    some = apart != 0  # what is not a number stays none
    root = torch.where(some, torch.where(some, apart, 1.0).sqrt(), 0.0)
    return root.sum() / max(len(root), 1)


def _weigher(dim: int, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """A weight in (0, 1) for every place of a map."""
    return nn.Sequential(
        nn.Conv2d(dim, GATE_DIM, 1), act(), nn.Conv2d(GATE_DIM, GATE_DIM, 3, padding=1), act(),
        nn.Conv2d(GATE_DIM, 1, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip


class GatedPool(nn.Module):
    """Gated local pooling of one map: ``GELU(a) * w(b)`` with ``a, b`` of one 1 x 1 convolution.

    Args:
        dim: channels.

    >>> GatedPool(4)(torch.randn(1, 4, 6, 5)).shape
    torch.Size([1, 4, 6, 5])
    """

    def __init__(self, dim: int):
        super().__init__()
        self.split, self.weigh = nn.Conv2d(dim, 2 * dim, 1), _weigher(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> the same."""
        a, b = self.split(x).chunk(2, 1)
        return F.gelu(a) * self.weigh(b)


class GatedDifference(nn.Module):
    """The same of a map and its reference: ``[f, r, d] * w(d)`` with ``d = sqrt((f - r)^2 + 1e-12)``.

    Args:
        dim: channels of both.
        act: activation of what weighs.
    """

    def __init__(self, dim: int, act: type[nn.Module] = nn.GELU):
        super().__init__()
        self.weigh = _weigher(dim, act)

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        """(B, dim, H, W) twice -> (B, 3 dim, H, W)."""
        apart = (x - reference).to(stats_dtype(x.dtype))
        apart = (apart.square() + 1e-12).sqrt().to(x.dtype)
        return torch.cat([x, reference, apart], 1) * self.weigh(apart)


class ScaleLayer(nn.Module):
    """Attention and MLP, each behind a norm and a residual; within a scale, or from one to another.

    Args:
        dim, num_heads: of the attention.
        cross: whether it reads other tokens than its own.
        hidden: width of the MLP.
        drop: of weights, of both branches, and of the hidden layer.
        act: activation of the MLP.
    """

    def __init__(self, dim: int, num_heads: int, cross: bool, hidden: int, drop: float, act: type[nn.Module] = nn.GELU):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if cross else None
        self.attention = SoftmaxAttention(dim, num_heads, attn_drop=drop)
        self.mlp, self.drop = Mlp(dim, hidden / dim, act, drop=drop, drop_hidden=True), nn.Dropout(drop)
        bound = (6 / (4 * dim)) ** 0.5  # Xavier's over the three maps together, as torch starts them
        for part in (self.attention.q, self.attention.k, self.attention.v):
            nn.init.uniform_(part.weight, -bound, bound)
        for part in (self.attention.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.kaiming_normal_(part.weight)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, N, dim), and (B, M, dim) where it is ``cross``, -> (B, N, dim)."""
        context = None if self.norm_context is None or context is None else self.norm_context(context)
        x = x + self.drop(self.attention(self.norm1(x), context))
        return x + self.mlp(self.norm2(x))


def _stacks(layer: ScaleLayer, count: int, depth: int) -> nn.ModuleList:
    """So many stacks of copies of one layer: all begin alike, as released."""
    return nn.ModuleList(nn.ModuleList(copy.deepcopy(layer) for _ in range(depth)) for _ in range(count))


class SwinMaps(nn.Module):
    """A Swin for maps (B, C_i, h, w): those behind every merging of 2 x 2 places, of strides 8 to 32, and the last.

    Args:
        embed_dim: channels behind the first 4 x 4 pixels; maps have 2, 4, 8 and 8 times as many.
        depths, num_heads: per stage.
        window_size: of all stages, smaller where a map of ``img_size`` is.
        img_size: side of images, or (height, width).
        in_chans: channels of images.

    >>> [tuple(m.shape) for m in SwinMaps(4, (1, 1, 1, 1), (1, 1, 1, 1), 2, 64)(torch.zeros(1, 3, 64, 64))]
    [(1, 8, 8, 8), (1, 16, 4, 4), (1, 32, 2, 2), (1, 32, 2, 2)]
    """

    def __init__(
        self, embed_dim: int = 128, depths: Sequence[int] = (2, 2, 18, 2), num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 12, img_size: int | tuple[int, int] = 384, in_chans: int = 3,
    ):  # fmt: skip
        super().__init__()
        check_int("window_size", window_size, least=1)
        image, grids = hosts.sides(img_size, len(depths))

        def windows(place: Place) -> nn.Module:
            return hosts.shifted_windows(place, window_size, grids[place.stage])

        body = hosts.swin(
            windows, embed_dim, depths, num_heads, 4.0, 0.0, in_chans, num_classes=0, img_size=image, drop_rate=0.0,
            global_pool="avg",
        )  # fmt: skip
        self.stem, self.stages = body.stem, body.stages
        dims = [embed_dim * 2**i for i in range(1, len(depths))]
        info = [{"num_chs": c, "reduction": 8 * 2**i} for i, c in enumerate(dims)]
        self.feature_info = FeatureInfo([*info, info[-1]])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps, finest first."""
        y, _ = self.stem(x.movedim(1, -1).contiguous(), None)
        maps = []
        for stage in self.stages:
            if stage.downsample is not None:
                y, _ = stage.downsample(y, None)  # type: ignore[operator]
                maps.append(y)
            for block in stage.blocks:  # type: ignore[union-attr]
                y, _ = block(y, None, None, None)
        return [m.movedim(-1, 1) for m in (*maps, y)]


class TOPIQ(TaskModel):
    """Images (B, 3, H, W) from 0 to 1, of any size, to (B, num_classes): a score, or a distribution over grades.

    Args:
        reference: whether an image is judged against another.
        num_classes: 1 for a score; more for a distribution over the grades 1 to ``num_classes``.
        dim, num_heads: of the attention.
        depth: layers of each stack.
        drop: dropout.
        positive: softplus on a score.
        encoder: name of a backbone, built without weights, ``"swin"`` for :class:`SwinMaps`, or what gives maps, finest
            first, with a ``feature_info``.
        encoder_settings: of a backbone given by name, as of :func:`attnlib.create_model`, or of :class:`SwinMaps`.
        activation: ``"gelu"`` or ``"relu"``, of all but the gates of single images.
        eval_size: what images are resized to in evaluation: their shorter side, or (height, width); none by default.
        in_chans: channels of images.
        mean, std: of the channels, for the backbone; ImageNet's by default, 0 and 1 where ``in_chans`` is not 3.
        freeze_norms: the backbone always answers as in evaluation, and its batch norms do not train.

    Raises:
        ValueError: settings that do not fit each other, an encoder without maps.

    >>> model = TOPIQ(dim=16, num_heads=2, encoder_settings=dict(depths=(1, 1, 1, 1))).eval()
    >>> model.predict(torch.rand(2, 3, 50, 67)).shape
    torch.Size([2])
    """

    head_names: Sequence[str] = ("head.",)

    def __init__(
        self,
        reference: bool = False,
        num_classes: int = 1,
        dim: int = 256,
        num_heads: int = 4,
        depth: int = 1,
        drop: float = 0.1,
        positive: bool = False,
        encoder: str | nn.Module = "resnet50",
        encoder_settings: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        freeze_norms: bool = True,
        activation: str = "gelu",
        eval_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        act = ACTIVATIONS[activation]
        self.eval_size = eval_size if eval_size is None else check_size(eval_size)
        self.reference, self.freeze_norms = check_flag("reference", reference), check_flag("freeze_norms", freeze_norms)
        self.num_classes, self.in_chans = check_int("num_classes", num_classes, 1), check_int("in_chans", in_chans, 1)
        check_divides("2 * num_heads", 2 * check_int("num_heads", num_heads, 1), "dim", check_int("dim", dim, 2))
        check_int("depth", depth, least=1)
        check_real("drop", drop, least=0, below=1)
        if check_flag("positive", positive) and num_classes > 1:
            raise ValueError(f"positive is for a score, got num_classes={num_classes}")
        trunk: Any = encoder
        if encoder == "swin":
            trunk = SwinMaps(in_chans=in_chans, **dict(encoder_settings or {}))
        elif isinstance(encoder, str):
            trunk = create_model(encoder, features_only=True, in_chans=in_chans, **dict(encoder_settings or {}))
        elif encoder_settings is not None:
            raise ValueError("encoder_settings is for an encoder given by name")
        check_type("encoder", trunk, nn.Module, "the name of a backbone or a module that gives maps")
        dims = map_info(trunk).channels()
        plain = in_chans != 3
        self.mean = _colours("mean", mean, in_chans, (0.0,) * in_chans if plain else IMAGENET_MEAN)
        self.std = _colours("std", std, in_chans, (1.0,) * in_chans if plain else IMAGENET_STD)
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        self.encoder = trunk
        self.gates = nn.ModuleList(GatedDifference(d, act) if reference else GatedPool(d) for d in dims)
        self.act = act()
        self.reduce = nn.ModuleList(nn.Conv2d(d * (3 if reference else 1), dim, 1) for d in dims)
        hidden = min(4 * dim, 2048)
        within, across = (ScaleLayer(dim, num_heads, cross, hidden, drop, act) for cross in (False, True))
        self.within, self.across = _stacks(within, len(dims), depth), _stacks(across, len(dims) - 1, depth)
        self.last = ScaleLayer(dim, num_heads, False, hidden, drop, act)
        self.head = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), act(), nn.LayerNorm(dim), nn.Linear(dim, dim), act(),
            nn.Linear(dim, num_classes),
        )  # fmt: skip
        self.positive = positive
        self.rows, self.columns = (nn.Parameter(torch.empty(dim // 2, TABLE_SIDE)) for _ in range(2))
        for table in (self.rows, self.columns):
            nn.init.trunc_normal_(table, std=0.02)
        if freeze_norms:
            for part in self.encoder.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.requires_grad_(False)
            self.encoder.eval()

    def train(self, mode: bool = True) -> TOPIQ:
        """As of modules; a backbone whose norms are frozen stays in evaluation."""
        super().train(mode)
        if self.freeze_norms:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor, reference: Tensor | None = None) -> Tensor:
        """(B, num_classes): scores, or distributions.

        Args:
            x: (B, in_chans, H, W) images that are judged.
            reference: of the same shape, what they should look like, for a model that was built for it.
        """
        return self.judge(self.tokens(x, reference))

    def _maps(self, x: Tensor) -> list[Tensor]:
        if self.eval_size is not None and not self.training:
            x = resized_to(x, self.eval_size)
        mean, std = (torch.tensor(t, dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for t in (self.mean, self.std))
        return self.encoder((x - mean) / std)

    def tokens(self, x: Tensor, reference: Tensor | None = None) -> list[Tensor]:
        """Tokens (B, N_i, dim) of all scales with their positions, coarsest first."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        if not x.shape[2:].numel():
            raise ValueError(f"x must hold at least one pixel, got shape {tuple(x.shape)}")
        if self.reference != (reference is not None):
            has = "needs a reference" if self.reference else "was built without reference=True: it takes none"
            raise ValueError(f"this model {has}, got reference={describe(reference)}")
        maps, beside = self._maps(x), None
        if reference is not None:
            if not isinstance(reference, Tensor) or reference.shape != x.shape or reference.is_complex():
                raise ValueError(f"reference must be images {tuple(x.shape)}, as x, got {describe(reference)}")
            beside = self._maps(reference.to(x.dtype))
        least, made = maps[-1].shape[2:], []
        for i in reversed(range(len(maps))):
            y = self.gates[i](maps[i]) if beside is None else self.gates[i](maps[i], beside[i])
            if y.shape[2] > least[0] and y.shape[3] > least[1]:
                y = F.adaptive_avg_pool2d(y, (least[0], least[1]))
            y = self.act(self.reduce[i](y)).permute(0, 2, 3, 1)
            made.append((y + self._positions(y.shape[1], y.shape[2]).to(y.dtype)).flatten(1, 2))
        return made

    def _positions(self, height: int, width: int) -> Tensor:
        """(H, W, dim): what a row adds, then what a column adds."""
        rows, columns = resized(self.rows, (height,)).mT, resized(self.columns, (width,)).mT
        return torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1)

    def judge(self, tokens: Sequence[Tensor]) -> Tensor:
        """What tokens of all scales (B, N_i, dim), coarsest first, are worth: (B, num_classes)."""
        read = []
        for stack, t in zip(reversed(self.within), tokens, strict=True):  # type: ignore[call-overload]
            for layer in stack:  # type: ignore[attr-defined]
                t = layer(t)
            read.append(t)
        query = read[0]
        for stack, context in zip(self.across, read[1:], strict=True):
            for layer in stack:  # type: ignore[attr-defined]
                query = layer(query, context)
        y = self.head(self.last(query).mean(1))
        if self.num_classes > 1:
            return y.softmax(-1)
        return F.softplus(y) if self.positive else y

    def loss(self, prediction: Tensor, target: Tensor) -> Terms:
        """``{"square", "norm_in_norm"}`` of scores; ``{"earth_movers"}`` of distributions.

        Args:
            prediction: of :meth:`forward`.
            target: (B,) scores, or (B, num_classes) shares of the grades.

        Raises:
            ValueError: shapes that differ, scores that are not finite, shares that do not sum to 1.
        """
        check_float("prediction", prediction)
        check_tensor("target", target)
        grades = self.num_classes > 1
        if prediction.dim() != 2 or prediction.shape[1] != self.num_classes:
            raise ValueError(f"prediction must be (B, {self.num_classes}), got {describe(prediction)}")
        want = tuple(prediction.shape) if grades else (len(prediction),)
        if tuple(target.shape) not in (want, tuple(prediction.shape)):
            raise ValueError(f"target must be {want}, got {describe(target)}")
        prediction = prediction.to(stats_dtype(prediction.dtype))
        target = target.to(prediction.dtype)
        if readable(target):
            if not target.isfinite().all():
                raise ValueError("target must be finite")
            if grades and (bool((target < 0).any()) or bool(((target.sum(-1) - 1).abs() > 1e-3).any())):
                raise ValueError("target must hold shares of the grades: at least 0, with a sum of 1")
        if grades:
            return {"earth_movers": earth_movers_loss(prediction, target)}
        a, b = prediction[:, 0], target.reshape(-1)
        square = (a - b).square().sum() / max(len(a), 1)
        return {"square": square, "norm_in_norm": norm_in_norm_loss(a, b)}

    def predict(
        self, x: Tensor, reference: Tensor | None = None, *, crops: int = 1, crop_size: int | tuple[int, int] = 256
    ) -> Tensor:
        """Scores (B,): of grades their mean; averages over ``crops`` crops where there are more than one.

        Args:
            x, reference: as of :meth:`forward`.
            crops: number of crops, laid over the image in a square pattern.
            crop_size: their side, or (height, width); smaller images are made larger.
        """
        if check_int("crops", crops, least=1) == 1:
            return score_of(self(x, reference))
        parts = [None if t is None else _crops(t, crops, crop_size) for t in (x, reference)]
        y = self(*parts)  # type: ignore[arg-type]
        return score_of(y.unflatten(0, (-1, crops)).mean(1))


def check_size(size: int | tuple[int, int]) -> int | tuple[int, int]:
    """A shorter side, or (height, width)."""
    if isinstance(size, int):
        return check_int("eval_size", size, least=1)
    sides = check_ints("eval_size", size, least=1)
    if len(sides) != 2:
        raise ValueError(f"eval_size must be the shorter side or (height, width), got {size}")
    return sides[0], sides[1]


def resized_to(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) of (height, width), or whose shorter side is ``size``; bilinear, antialiased."""
    height, width = x.shape[2:]
    if isinstance(size, int):
        least = min(height, width)
        size = (int(size * height / least), int(size * width / least))
    if tuple(size) == (height, width):
        return x
    return smoothed(x, size)


def _colours(name: str, given: Sequence[float] | None, count: int, default: Sequence[float]) -> tuple[float, ...]:
    values = tuple(check_real(name, v) for v in (default if given is None else given))
    if len(values) != count:
        raise ValueError(f"{name} must hold {count} numbers, one per channel, got {values}")
    return values


def _crops(x: Tensor, count: int, size: int | tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B count, C, *size), the crops of an image one after another."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        raise ValueError(f"x must be images (B, C, H, W), got {describe(x)}")
    high, wide = (size, size) if isinstance(size, int) else size
    check_int("crop_size", high, least=1), check_int("crop_size", wide, least=1)
    if x.shape[2] <= high or x.shape[3] <= wide:
        factor = max((high + 1) / x.shape[2], (wide + 1) / x.shape[3])
        x = F.interpolate(x, scale_factor=factor, mode="bilinear")
    root = count**0.5
    steps = [(n - s) // int(root) for n, s in zip(x.shape[2:], (high, wide), strict=True)]
    at = [(i * steps[0], j * steps[1]) for i in range(math.ceil(root)) for j in range(math.ceil(root))]
    return torch.stack([x[..., i : i + high, j : j + wide] for i, j in at[:count]], 1).flatten(0, 1)


def convert(state_dict: Mapping[str, Tensor], model: TOPIQ) -> dict[str, Tensor]:
    """From the authors' ``CFANet`` over a ResNet or a Swin; the self-attention that never runs is dropped."""
    theirs = Released(state_dict, "the authors' CFANet")
    trunk = getattr(model.encoder, "model", None)
    swin = isinstance(model.encoder, SwinMaps)
    if not swin and not isinstance(trunk, Backbone):
        raise ValueError("encoder must be a ResNet of this library, or 'swin', to take the authors' weights")
    theirs.leave(r"attn_blks\.\d+\.layers\.\d+\.(self_attn\..*)", because="it never runs")
    if swin:
        theirs.leave(r"semantic_model\.(?:norm|head)\..*", because="they come behind the maps")
        theirs.leave(r"semantic_model\..*\.(?:attn_mask|relative_position_index)", because="they hold places")
    held = {m[1]: value for m, value in theirs.matching(r"semantic_model\.(.*)")}
    if not held:
        out = {}
    elif swin:
        made = hosts.convert_swin(held, "the authors' Swin", hosts.own_attention)
        out = {f"encoder.{k}": v for k, v in made.items()}
    else:
        out = {f"encoder.model.{k}": v for k, v in convert_resnet(held, trunk).items()}

    def table(match: Any, value: Tensor) -> dict[str, Tensor]:
        return {{"h": "rows", "w": "columns"}[match[1]]: value.flatten(1).view(value.shape[1], -1)}

    def attention(where: str) -> Any:
        return lambda part: {k: v for k, v in Released(part, where).renamed(PLAIN).items()}

    places = {
        r"sa_attn_blks\.(\d+)\.layers\.(\d+)\.self_attn\.(.*)": r"within.\1.\2.attention",
        r"attn_blks\.(\d+)\.layers\.(\d+)\.multihead_attn\.(.*)": r"across.\1.\2.attention",
        r"attn_pool\.self_attn\.(.*)": r"last.attention",
    }
    for pattern, ours in places.items():
        out |= theirs.parts(pattern, ours, attention("nn.MultiheadAttention"))
    rules: dict[str, Any] = {
        r"([hw])_emb": table,
        r"weight_pool\.(\d+)\.splitconv\.(.*)": r"gates.\1.split.\2",
        r"weight_pool\.(\d+)\.(?:weight_blk\.)?(\d+\..*)": r"gates.\1.weigh.\2",
        r"dim_reduce\.(\d+)\.0\.(.*)": r"reduce.\1.\2",
        r"score_linear\.(\d+\..*)": r"head.\1",
    }
    for pattern, ours in ((r"sa_attn_blks\.(\d+)\.layers\.(\d+)\.", r"within.\1.\2."), (r"attn_pool\.", "last.")):
        last = r"\3" if "1" in ours else r"\1"
        rules |= {f"{pattern}(norm[12].*)": ours + last}
        rules |= {f"{pattern}linear([12]){x}": f"{ours}mlp.fc{last}.{y}" for x, y in _tails()}
    across = r"attn_blks\.(\d+)\.layers\.(\d+)\."
    for their, our in (("norm1", "norm1"), ("norm2", "norm_context"), ("norm3", "norm2")):
        rules[rf"{across}{their}\.(.*)"] = rf"across.\1.\2.{our}.\3"
    rules[rf"{across}linear([12])\.(.*)"] = r"across.\1.\2.mlp.fc\3.\4"
    return theirs.close(out | theirs.renamed(rules))


def _tails() -> list[tuple[str, str]]:
    return [(rf"\.{kind}", kind) for kind in ("weight", "bias")]


register_models(
    "topiq-cfanet",
    TOPIQ,
    {
        "topiq_nr_resnet50": {},
        "topiq_fr_resnet50": dict(reference=True),
        "topiq_iaa_resnet50": dict(num_classes=10, dim=512, num_heads=8, eval_size=384),
        "topiq_flive_resnet50": dict(eval_size=384),
        "topiq_face_resnet50": dict(eval_size=512),
        "topiq_face_swin_base": dict(encoder="swin", eval_size=(384, 384)),
        "topiq_iaa_swin_base": dict(encoder="swin", num_classes=10, dim=512, num_heads=8, eval_size=(384, 384)),
    },
    # The released classes have 1,052,672 more, which never run; 4,202,496 at width 512, and over a Swin 1,816,552 and
    # 4,178,920 with its last norm and its classifier.
    params={
        "topiq_nr_resnet50": 44_144_262,
        "topiq_fr_resnet50": 34_985_990,
        "topiq_iaa_resnet50": 69_181_071,
        "topiq_flive_resnet50": 44_144_262,
        "topiq_face_resnet50": 44_144_262,
        "topiq_face_swin_base": 99_244_925,
        "topiq_iaa_swin_base": 119_277_190,
    },
    license="PolyForm-Noncommercial-1.0.0",
    source="chaofengc/IQA-PyTorch",
    convert=convert,  # type: ignore[arg-type]
    task="quality",
)
