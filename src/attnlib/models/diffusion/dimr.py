"""DiMR: a transformer denoises a small map, convolutions the full one, and time acts on norms only.

Liu et al., 2024, "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models", arXiv 2406.09416.
Branches of rising resolution each predict the noise at theirs; the first is a transformer, the others are ConvNeXt
blocks, and each but the first reads all features of the one before, pooled over nothing and shuffled up,

    ``x_r <- embed_r(x_t) + LN(shuffle(W LN([h_0, ..., h_n])))``,

``h`` the input of its blocks and what each of them gave. Blocks of a branch have long skips: the second half reads
``W [x, h]`` of the first half in reverse. There is no modulation by layers of a condition: each gain and bias of a norm
is a blend of two vectors, by time alone (*time-dependent layer normalisation*),

    ``p(t) = p_1 + sigmoid(w t + b) (p_0 - p_1),    t = s / 4``,

where s is the log of the signal-to-noise ratio by the paper, and in the authors' code ``8 n / 1000 - 4`` for step n of
1000. A block is ``x + Attention(norm(x))`` (or ``x + DWConv(x)``), then ``x + W_2 (GELU(W_0 n) * W_1 n)`` with
``n = norm(x)``. The loss sums mean squares over resolutions; noise at half the side is the sum of 2 x 2 over 2, so that
its variance stays 1.

Two settings of the authors' blocks that no released configuration uses are here too: an RMS norm whose gain is
``1 + W c`` for the first token c (``norm="ada-rms"``), and queries and keys of length ``exp(s / 2) D^(1/4)`` that
learned frequencies turn along height and width (``positions="axial-rotary"``). Tokens of a text, whose keys and values
stand beside a transformer branch's own, are in their attention, but not in their model (``context_dim``).

Differs from the authors' code: time is handed down, not left in the modules; attention is in the type of the weights
(theirs casts to float32); nothing is recomputed unless ``torch.utils.checkpoint`` is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_real,
    check_type,
    check_whole,
    check_within,
    to_list,
)
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.frame import HeadCall
from ...nn.layers import DepthwiseConv, Mlp, split_heads, through
from ...nn.released import Released
from ...positions import rotate
from ...types import Output, Traits, to_tuple

#: Norms of blocks: time-dependent RMS norm (the released configurations), time-dependent layer norm (the paper), RMS
#: norm without time, or RMS norm whose gain is the first token's.
NORMS = ("td-rms", "td-layer", "rms", "ada-rms")

#: Epsilon of each.
EPS = {"td-rms": 1e-8, "td-layer": 1e-5, "rms": 1e-8, "ada-rms": 1e-6}

#: How transformer branches tell places: a learned table, or rotary positions along both axes.
POSITIONS = ("table", "axial-rotary")

#: Log of the largest scale of normed queries and keys.
LARGEST_SCALE = math.log(100.0)


class TimeParameter(nn.Module):
    """A vector that time blends out of two: ``p_1 + sigmoid(t (1 + w) + b) (p_0 - p_1)``.

    Both are equal at the start, w and b zero, so that time does nothing before training.

    Args:
        dim: its length.
        value: of both at the start.

    >>> TimeParameter(3, 1.0)(torch.tensor([0.5])).tolist()
    [[1.0, 1.0, 1.0]]
    """

    def __init__(self, dim: int, value: float):
        super().__init__()
        check_int("dim", dim, least=1)
        check_real("value", value)
        self.first, self.second = (nn.Parameter(torch.full((dim,), float(value))) for _ in range(2))
        self.slope, self.offset = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(self, time: Tensor) -> Tensor:
        """(B,) or (1,) times -> (B, dim) or (1, dim)."""
        share = torch.sigmoid(torch.addcmul(self.offset, time[:, None].to(self.slope), self.slope + 1))
        return torch.addcmul(self.second, share, self.first - self.second)


class TimeNorm(nn.Module):
    """A norm of the last axis whose gain, and for a layer norm bias, are :class:`TimeParameter`.

    Args:
        dim: width.
        kind: ``"td-rms"``, ``"td-layer"`` or ``"rms"``, which has a plain gain.

    >>> TimeNorm(4, "td-rms")(torch.ones(1, 2, 4), torch.zeros(1))[0, 0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, dim: int, kind: str = "td-layer"):
        super().__init__()
        check_choice("kind", kind, NORMS[:3])
        self.dim, self.kind = check_int("dim", dim, least=1), kind
        self.weight: nn.Module | nn.Parameter = (
            nn.Parameter(torch.ones(dim)) if kind == "rms" else TimeParameter(dim, 1)
        )
        self.bias = TimeParameter(dim, 0) if kind == "td-layer" else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, *grid, dim) and (B,) or (1,) -> (B, *grid, dim)."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, *grid, {self.dim}), got {tuple(x.shape)}")
        if len(time) not in (1, len(x)):
            raise ValueError(f"time must be one number or one for each of {len(x)} samples, got {len(time)}")
        weight = self.weight if isinstance(self.weight, Tensor) else self._spread(self.weight(time), x)
        if self.bias is not None:
            plain = F.layer_norm(x, (self.dim,), eps=EPS[self.kind])
            return torch.addcmul(self._spread(self.bias(time), x), weight, plain)
        wide = x if x.dtype == torch.float64 else x.float()
        size = wide.square().mean(-1, keepdim=True).sqrt() + EPS[self.kind]
        return weight * (wide / size).to(x.dtype)

    @staticmethod
    def _spread(vectors: Tensor, x: Tensor) -> Tensor:
        return vectors.reshape(len(vectors), *[1] * (x.dim() - 2), vectors.shape[-1])

    def extra_repr(self) -> str:
        return f"{self.dim}, kind={self.kind!r}"


class FirstTokenNorm(nn.Module):
    """RMS norm whose gain is 1 plus a map of the first token; of a map of places, of the first place of each column.

    The map starts at zero.

    Args:
        dim: width.

    >>> FirstTokenNorm(4)(torch.ones(1, 2, 4), torch.zeros(1))[0, 0].detach().round(decimals=5).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, dim: int):
        super().__init__()
        self.map = nn.Linear(check_int("dim", dim, least=1), dim, bias=False)
        self.reset()

    def reset(self) -> None:
        nn.init.zeros_(self.map.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, *grid, dim) and times, which it does not read -> (B, *grid, dim)."""
        wide = x if x.dtype == torch.float64 else x.float()
        size = (wide.square().mean(-1, keepdim=True) + EPS["ada-rms"]).rsqrt()
        return x * ((1 + self.map(x[:, :1])).to(wide.dtype) * size).to(x.dtype)


def block_norm(dim: int, kind: str) -> nn.Module:
    """A norm of :data:`NORMS`."""
    return FirstTokenNorm(dim) if kind == "ada-rms" else TimeNorm(dim, kind)


def places_in_box(height: int, width: int) -> Tensor:
    """(height * width, 2) centres of cells in a box whose longer side goes from -1 to 1.

    >>> places_in_box(1, 2).tolist()
    [[0.0, -0.5], [0.0, 0.5]]
    """
    longest = max(check_int("height", height, least=1), check_int("width", width, least=1))
    rows, columns = (
        (torch.arange(n, dtype=torch.float64) * 2 + 1 - n) / longest for n in (height, width)
    )  # fmt: skip
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


class BranchAttention(SoftmaxAttention):
    """Attention of a branch with tokens of a text beside its own, with axial rotary positions, or both.

    Args:
        dim, num_heads: as ever; no biases but the output's.
        text_dim: width of the text; 0 for none.
        axial: norm queries and keys, with a scale that each head learns, and turn them by learned frequencies.

    >>> BranchAttention(8, 2, text_dim=3)(torch.randn(1, 2, 2, 8), torch.randn(1, 5, 3)).shape
    torch.Size([1, 2, 2, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "noncausal-cross"}), grid_ranks=frozenset({1, 2}), weights=True,
        work={"N": 2}, memory={"N": 1},
    )  # fmt: skip
    zero_is_off = ("text_dim",)

    def __init__(self, dim: int, num_heads: int, text_dim: int = 0, axial: bool = False):
        super().__init__(dim, num_heads, qkv_bias=False)
        self.axial = axial
        self.text: nn.Linear | None = None
        if text_dim:
            self.text, self.context_dim = nn.Linear(text_dim, 2 * dim, bias=False), text_dim
        if axial:
            frequencies = torch.linspace(math.log(math.pi), math.log(5 * math.pi), self.head_dim // 4)
            self.rows, self.columns = (nn.Parameter(frequencies.repeat(num_heads, 1)) for _ in range(2))
            self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(10.0)))

    @property
    def traits(self) -> Traits:
        patterns = {"noncausal-self"} | ({"noncausal-cross"} if self.text is not None else set())
        return self.class_traits.but(
            patterns=frozenset(patterns),
            grid_ranks=frozenset({2} if self.axial else {1, 2}),
            permutation_equivariant=not self.axial,
        )

    def _parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._parts(x, source)
        if not self.axial:
            return q, k, v
        with torch.no_grad():  # a scale at its limit still gets a gradient
            self.log_scale.clamp_(max=LARGEST_SCALE)
        gain = torch.exp(0.5 * self.log_scale - 0.25 * math.log(self.head_dim))[:, None, None]
        places = places_in_box(*x.shape[1:3]).to(self.rows)
        angles = torch.cat([places[:, i, None] * f.exp()[:, None] for i, f in enumerate((self.rows, self.columns))], -1)
        q, k = (self._placed(split_heads(t, self.num_heads), gain, angles) for t in (q, k))
        return q, k, v

    def _placed(self, x: Tensor, gain: Tensor, angles: Tensor) -> Tensor:
        """(B, H, N, D) of one length and turned, as (B, N, H D)."""
        wide = x if x.dtype == torch.float64 else x.float()
        x = x * (gain.to(wide.dtype) * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
        turned, rest = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], -1)
        return torch.cat([rotate(turned, angles[None], interleaved=True), rest], -1).transpose(1, 2).flatten(2)

    def mix(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None, *, context_valid: Tensor | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:  # fmt: skip
        q, k, v, notes, _ = self._read(x, None, None, None, None, None, returns)
        exists: Tensor | None = None
        if context is not None:
            assert self.text is not None
            keys, values = self.text(context).chunk(2, -1)
            k, v = (torch.cat([a, split_heads(b, self.num_heads)], 2) for a, b in ((k, keys), (v, values)))
            if context_valid is not None:
                exists = torch.cat([context_valid.new_ones(len(x), q.shape[2]), context_valid], 1)
        call = HeadCall(valid=exists, return_weights="weights" in returns)
        out, weights = self._mix_heads(q, k, v, call, notes), None
        if call.return_weights:
            out, weights = out
        return Output(self._project(out, notes, x.shape[1:-1]), weights=weights)


@dataclass(frozen=True)
class Branch:
    """One resolution of a :class:`DiMR`.

    Args:
        dim: width.
        hidden: width inside the MLPs.
        depth: blocks; an even number has one more.
        size: largest (height, width) of its map, in tokens; one number for both.
        num_heads: of a transformer branch; 0 for a branch of ConvNeXt blocks.
        kernel_size: of the depthwise convolutions of ConvNeXt blocks.
        downscale: image over what the branch sees, by means over areas.
        patch_size: side of a token in what it sees.
        final_kernel_size: of the convolution that predicts.
        drop: dropout of what blocks add.
    """

    dim: int
    hidden: int
    depth: int
    size: int | tuple[int, int]
    num_heads: int = 0
    kernel_size: int = 7
    downscale: int = 1
    patch_size: int = 1
    final_kernel_size: int = 3
    drop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "depth", "kernel_size", "downscale", "patch_size", "final_kernel_size"):
            check_int(name, getattr(self, name), least=1)
        check_int("num_heads", self.num_heads, least=0)
        check_real("drop", self.drop, least=0, below=1)
        for name in ("kernel_size", "final_kernel_size"):
            if not getattr(self, name) % 2:
                raise ValueError(f"{name}={getattr(self, name)} must be odd, so that maps keep their size")
        size = to_tuple("size", self.size, 2)
        for side in size:
            check_int("size", side, least=1)
        object.__setattr__(self, "size", size)

    @property
    def blocks(self) -> int:
        return self.depth // 2 * 2 + 1

    @property
    def scale(self) -> int:
        """Pixels of the image along a side of a token."""
        return self.downscale * self.patch_size


class DiMRBlock(nn.Module):
    """A transformer block or a ConvNeXt block, without modulation.

    Args:
        branch: of which it is.
        norm: see :data:`NORMS`.
        positions: see :data:`POSITIONS`.
        context_dim: width of a text that a transformer block reads beside; 0 for none.
    """

    def __init__(self, branch: Branch, norm: str, positions: str = "table", context_dim: int = 0):
        super().__init__()
        self.axial = bool(branch.num_heads) and positions == "axial-rotary"
        if branch.num_heads:
            self.norm: nn.Module | None = block_norm(branch.dim, norm)
            self.mixer: nn.Module = (
                BranchAttention(branch.dim, branch.num_heads, context_dim, self.axial)
                if self.axial or context_dim
                else SoftmaxAttention(branch.dim, branch.num_heads, qkv_bias=False)
            )
        else:
            self.norm, self.mixer = None, DepthwiseConv(branch.dim, branch.kernel_size)
        self.mlp_norm = block_norm(branch.dim, norm)
        self.mlp = Mlp(branch.dim, hidden=branch.hidden, gated=True)
        self.drop = nn.Dropout(branch.drop)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        grid: Sequence[int] = (),
        context: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        """(B, N, dim), or (B, H, W, dim) for convolutions, and (B,) or (1,) -> the same as ``x``.

        ``grid`` is (H, W) of the tokens, ``context`` (B, M, context_dim) the text, ``context_valid`` (B, M) which of
        its tokens exist.
        """
        y = x if self.norm is None else self.norm(x, time)
        y = y.unflatten(1, tuple(grid)) if self.axial else y
        text = {} if context is None or self.norm is None else dict(context=context, context_valid=context_valid)
        x = x + through(self.drop, self.mixer(y, **text)).reshape(x.shape)
        return x + through(self.drop, self.mlp(self.mlp_norm(x, time)))


class ShuffleUp(nn.Module):
    """Features of the branch before, shuffled up: ``LN(shuffle(W LN(x)))``.

    Args:
        dim: width of all of them together.
        out_dim: width out.
        ratio: by how much sides grow.
    """

    def __init__(self, dim: int, out_dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.norm, self.out_norm = TimeNorm(dim), TimeNorm(out_dim)
        self.map = nn.Linear(dim, out_dim * ratio**2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ratio H, ratio W, out_dim)."""
        b, h, w, _ = x.shape
        y = self.map(self.norm(x, time)).reshape(b, h, w, self.ratio, self.ratio, -1)
        return self.out_norm(y.transpose(2, 3).reshape(b, h * self.ratio, w * self.ratio, -1), time)


class DiMRBranch(nn.Module):
    """A branch: embedding, blocks with long skips, a prediction.

    Args:
        branch: its settings.
        channels: of the latents.
        norm: see :data:`NORMS`.
        classes: of a transformer branch's class token; 0 for none.
        before: the branch before, ``None`` for the first.
        positions: see :data:`POSITIONS`.
        context_dim: width of a text; 0 for none.
    """

    def __init__(
        self,
        branch: Branch,
        channels: int,
        norm: str,
        classes: int = 0,
        before: Branch | None = None,
        positions: str = "table",
        context_dim: int = 0,
    ):
        super().__init__()
        dim, patch = branch.dim, branch.patch_size
        height, width = to_tuple("size", branch.size, 2)
        self.settings = branch
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        axial = bool(branch.num_heads) and positions == "axial-rotary"
        self.pos_embed = None if axial else nn.Parameter(torch.empty(height, width, dim))
        self.class_embed = nn.Embedding(classes, dim) if classes and branch.num_heads else None
        self.up: ShuffleUp | None = None
        if before is not None:
            if before.scale % branch.scale:
                raise ValueError(
                    f"tokens of a branch must be smaller than those of the one before by a whole factor, got "
                    f"{before.scale} and {branch.scale} pixels"
                )
            self.up = ShuffleUp(before.dim * (before.blocks + 1), dim, before.scale // branch.scale)
        self.blocks = nn.ModuleList(DiMRBlock(branch, norm, positions, context_dim) for _ in range(branch.blocks))
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(branch.blocks // 2))
        self.out_norm = TimeNorm(dim)
        self.out = nn.Conv2d(dim, channels, branch.final_kernel_size, padding=branch.final_kernel_size // 2)

    def forward(
        self,
        image: Tensor,
        time: Tensor,
        classes: Tensor | None = None,
        below: Tensor | None = None,
        context: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (B,) or (1,), (B,), (B, h, w, D) -> noise (B, C, H', W') and all features (B, H', W', D')."""
        if self.settings.downscale > 1:
            image = F.interpolate(
                image, size=tuple(s // self.settings.downscale for s in image.shape[-2:]), mode="area"
            )
        x = self.embed(image).permute(0, 2, 3, 1)
        h, w = x.shape[1:3]
        if self.pos_embed is not None:
            if h > self.pos_embed.shape[0] or w > self.pos_embed.shape[1]:
                raise ValueError(
                    f"a map of {h} x {w} tokens is larger than the {self.pos_embed.shape[0]} x "
                    f"{self.pos_embed.shape[1]} that this branch has positions for"
                )
            x = x + self.pos_embed[:h, :w]
        if self.up is not None:
            assert below is not None
            x = x + self.up(below, time)
        flat = bool(self.settings.num_heads)
        if flat:
            x = x.flatten(1, 2)
            if self.class_embed is not None:
                assert classes is not None
                x = torch.cat([self.class_embed(classes)[:, None], x], 1)
        seen, half = [x], len(self.blocks) // 2
        for number, block in enumerate(self.blocks):
            if number > half:
                x = self.skips[number - half - 1](torch.cat([x, seen[2 * half + 1 - number]], -1))
            x = block(x, time, (h, w), context, context_valid)
            seen.append(x)
        features = torch.cat(seen, -1)
        if flat:
            x, features = (t[:, -h * w :].unflatten(1, (h, w)) for t in (x, features))
        return self.out(self.out_norm(x, time).permute(0, 3, 1, 2)), features


@dataclass
class Prediction:
    """What a :class:`DiMR` gives.

    Args:
        sample: (B, C, H, W) the noise at full resolution.
        levels: the noise at each resolution, the last one ``sample``.
    """

    sample: Tensor
    levels: list[Tensor]

    def __getitem__(self, index: int) -> Any:
        return (self.sample, self.levels)[index]


def linear_time(timestep: Tensor) -> Tensor:
    """s of the authors' code: ``8 n / 1000 - 4`` of step n = timestep + 1, whatever the schedule.

    >>> linear_time(torch.tensor([499, 999])).tolist()
    [0.0, 4.0]
    """
    return (timestep.double() + 1) / 1000 * 8 - 4


def log_snr(alphas_cumprod: Tensor) -> Callable[[Tensor], Tensor]:
    """s of the paper: ``log(a / (1 - a))`` of a scheduler's ``alphas_cumprod`` (N,), by timestep.

    >>> log_snr(torch.tensor([0.9, 0.5]))(torch.tensor([1])).tolist()
    [0.0]
    """
    check_axes("alphas_cumprod", alphas_cumprod, N=None)
    table = torch.logit(alphas_cumprod.double())

    def time(timestep: Tensor) -> Tensor:
        check_within("timestep", timestep, len(table), "step")
        return table.to(timestep.device)[timestep.long()]

    return time


class DiMR(nn.Module):
    """A denoiser of latents, in branches of rising resolution.

    It is called as diffusers' ``DiTTransformer2DModel`` is, so that a ``DiTPipeline`` samples from it::

        pipe = DiTPipeline(transformer=dimr("dimr_xl_2r"), vae=vae, scheduler=scheduler)
        pipe(class_labels=[207], guidance_scale=1.4)  # the paper's scale is one less

    Args:
        branches: from the smallest map to the full one, a transformer first.
        channels: of the latents.
        num_classes: labels, the last for none; 0 for a model without classes.
        norm: of blocks, see :data:`NORMS`.
        sample_size: side of the latents that a pipeline samples.
        time: s of a timestep (B,); the authors' :func:`linear_time`, or :func:`log_snr`.
        stop_gradient: branches learn nothing from the next.
        loss_weights: of each resolution's loss; ``None`` for 1 at the full one and its share of the
            places below.
        positions: of transformer branches, see :data:`POSITIONS`; rotary ones have no place for the token of a class.
        context_dim: width of a text whose tokens transformer branches read beside their own; 0 for none.

    Raises:
        ValueError: no branch, unfit sizes or weights, classes with rotary positions; when called, latents of other
            channels or larger than the tables of positions, or labels out of range.

    Reference: Liu et al., 2024, arXiv 2406.09416; held to its code.

    >>> tiny = [Branch(16, 32, 3, 4, num_heads=2, patch_size=2), Branch(8, 16, 1, 8)]
    >>> out = DiMR(tiny, num_classes=10)(torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.tensor([1, 9]))
    >>> out.sample.shape, [tuple(level.shape[2:]) for level in out.levels]
    (torch.Size([2, 4, 8, 8]), [(4, 4), (8, 8)])
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        channels: int = 4,
        num_classes: int = 1001,
        norm: str = "td-rms",
        sample_size: int = 32,
        time: Callable[[Tensor], Tensor] = linear_time,
        stop_gradient: bool = False,
        loss_weights: Sequence[float] | None = None,
        positions: str = "table",
        context_dim: int = 0,
    ):
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_choice("positions", positions, POSITIONS)
        check_int("context_dim", context_dim, least=0)
        check_int("channels", channels, least=1)
        check_int("num_classes", num_classes, least=0)
        check_int("sample_size", sample_size, least=1)
        branches = to_list("branches", branches, "SIZES['dimr_xl_2r']") or []
        if not callable(time):
            raise TypeError(f"time must be a function of timesteps such as linear_time, got {type(time).__name__}")
        if not branches or not all(isinstance(b, Branch) for b in branches):
            raise ValueError(f"branches must hold at least one Branch, got {branches!r:.80}")
        if num_classes and not any(b.num_heads for b in branches):
            raise ValueError("classes enter as a token of a transformer branch, and no branch has num_heads")
        if num_classes and positions == "axial-rotary":
            raise ValueError(
                f"num_classes={num_classes} puts a token of the class among those of the map, which "
                'positions="axial-rotary" gives no place; possible: num_classes=0, or positions="table"'
            )
        if context_dim and not any(b.num_heads for b in branches):
            raise ValueError(f"context_dim={context_dim} needs a transformer branch, and no branch has num_heads")
        self.context_dim = context_dim
        self.time, self.stop_gradient = time, check_flag("stop_gradient", stop_gradient)
        self.num_classes = num_classes
        pairs = zip(branches, [None, *branches], strict=False)
        self.branches = nn.ModuleList(
            DiMRBranch(b, channels, norm, num_classes, before, positions, context_dim) for b, before in pairs
        )
        finest = branches[-1].scale
        shares = [(finest / b.scale) ** 2 for b in branches]
        weights = to_list("loss_weights", shares if loss_weights is None else loss_weights) or []
        if len(weights) != len(branches):
            raise ValueError(f"loss_weights must be {len(branches)} numbers, one a branch, got {loss_weights!r}")
        self.loss_weights = [check_real("loss_weights", w, least=0) for w in weights]
        #: What pipelines of diffusers read.
        self.config = SimpleNamespace(
            sample_size=sample_size, in_channels=channels, out_channels=channels, num_classes=num_classes, norm=norm
        )
        self.apply(self._start)
        for branch in self._each:
            if branch.pos_embed is not None:
                nn.init.trunc_normal_(branch.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, FirstTokenNorm):
                module.reset()

    @staticmethod
    def _start(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @property
    def _each(self) -> list[DiMRBranch]:
        return list(self.branches)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        return self._each[0].embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._each[0].embed.weight.device

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Prediction | tuple[Tensor, list[Tensor]]:
        """Noise in latents.

        Args:
            hidden_states: (B, channels, H, W).
            timestep: of a scheduler with 1000, (B,), (1,) or a number.
            class_labels: (B,) integers below ``num_classes``.
            return_dict: a :class:`Prediction`, or a tuple of the same.
            encoder_hidden_states: (B, M, context_dim) of a text; without it, none is read.
            encoder_attention_mask: (B, M) boolean, which of its tokens exist.
        """
        x = hidden_states
        check_float("hidden_states", x)
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"hidden_states must be (B, {self.config.in_channels}, H, W), got {tuple(x.shape)}")
        coarsest = max(b.settings.scale for b in self._each)
        if x.shape[2] % coarsest or x.shape[3] % coarsest:
            raise ValueError(f"hidden_states of {tuple(x.shape[2:])} do not divide into tokens of {coarsest} pixels")
        t = torch.as_tensor(timestep, device=x.device).reshape(-1)
        if len(t) not in (1, len(x)):
            raise ValueError(f"timestep must be one number or one for each of {len(x)} samples, got {len(t)}")
        if self.num_classes:
            if class_labels is None:
                raise ValueError(f"class_labels are needed, integers below {self.num_classes}, the last for no class")
            check_whole("class_labels", class_labels)
            if len(class_labels) != len(x) or bool((class_labels < 0).any() | (class_labels >= self.num_classes).any()):
                raise ValueError(
                    f"class_labels must be {len(x)} integers below {self.num_classes}, got "
                    f"{class_labels.tolist()!r:.60}"
                )
        if encoder_hidden_states is not None:
            if not self.context_dim:
                raise ValueError("encoder_hidden_states need context_dim, which is 0: this model reads no text")
            check_axes("encoder_hidden_states", encoder_hidden_states, B=len(x), M=None, context_dim=self.context_dim)
        if encoder_attention_mask is not None:
            if encoder_hidden_states is None:
                raise ValueError("encoder_attention_mask is given without encoder_hidden_states")
            check_axes("encoder_attention_mask", encoder_attention_mask, B=len(x), M=encoder_hidden_states.shape[1])
            encoder_attention_mask = encoder_attention_mask.bool()
        return self.at(x, self.time(t), class_labels, return_dict, encoder_hidden_states, encoder_attention_mask)

    def at(
        self,
        x: Tensor,
        s: Tensor,
        classes: Tensor | None = None,
        return_dict: bool = True,
        context: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Prediction | tuple[Tensor, list[Tensor]]:
        """The same at times given as s, (B,) or (1,)."""
        time = s.to(x.dtype) / 4
        levels: list[Tensor] = []
        below: Tensor | None = None
        for branch in self._each:
            if below is not None and self.stop_gradient:
                below = below.detach()
            level, below = branch(x, time, classes, below, context, context_valid)
            levels.append(level)
        return Prediction(levels[-1], levels) if return_dict else (levels[-1], levels)

    def loss(self, prediction: Prediction, noise: Tensor) -> dict[str, Tensor]:
        """Weighted mean squares of each resolution, by its sides; their sum is the loss.

        Args:
            prediction: of this model.
            noise: (B, C, H, W) that was added.
        """
        check_type("prediction", prediction, Prediction)
        if not isinstance(noise, Tensor) or noise.shape != prediction.sample.shape:
            got = tuple(noise.shape) if isinstance(noise, Tensor) else noise
            raise ValueError(f"noise must be {tuple(prediction.sample.shape)}, as the prediction is, got {got!r:.60}")
        found: dict[str, Tensor] = {}
        for level, weight in zip(prediction.levels, self.loss_weights, strict=True):
            target = noise_at(noise, level.shape[-2:])
            found["x".join(map(str, level.shape[-2:]))] = weight * (level - target).square().mean()
        return found

    def decayed(self, weight_decay: float = 0.03) -> list[dict[str, Any]]:
        """Groups of parameters for an optimizer: slopes and offsets of time are not decayed."""
        check_real("weight_decay", weight_decay, least=0)
        free = (".slope", ".offset")
        return [
            {"params": [p for n, p in self.named_parameters() if not n.endswith(free)], "weight_decay": weight_decay},
            {"params": [p for n, p in self.named_parameters() if n.endswith(free)], "weight_decay": 0.0},
        ]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``MRModel``."""
        theirs = Released(state_dict, "the authors' MRModel")
        theirs.leave(r"stages\.\d+\.pos_emb\.freqs_[hw]", because="made beside those of the blocks, and read nowhere")

        def norm(ours: str) -> Callable[[re.Match[str], Tensor], dict[str, Tensor]]:
            parts = {"param0": "first", "param1": "second", "nodecay_weight": "slope", "nodecay_bias": "offset"}

            def rename(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
                found = match.groupdict()
                gain = "bias" if found["what"] == "bias" else "weight"
                last = "" if found["part"] is None else "." + parts[found["part"]]
                return {match.expand(ours) + f".{gain}{last}": value}

            return rename

        leaf = r"(?P<what>weight|bias|scale)(?:\.(?P<part>param0|param1|nodecay_weight|nodecay_bias))?"
        stage = r"stages\.(?P<s>\d+)"
        block = stage + r"\.blocks\.(?P<b>\d+)"
        ours, mine = r"branches.\g<s>", r"branches.\g<s>.blocks.\g<b>"
        halves: dict[str, dict[str, Tensor]] = {}

        def gate(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
            name = match.expand(mine + r".mlp.fc1.\g<kind>")
            seen = halves.setdefault(name, {})
            seen[match["half"]] = value
            return {name: torch.cat([seen["0"], seen["1"]])} if len(seen) == 2 else {}

        def maps(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
            return {match.expand(mine + f".mixer.{n}.weight"): v for n, v in zip("qkv", value.chunk(3), strict=True)}

        out = theirs.renamed(
            {
                stage + r"\.input_layer\.1\.(?P<kind>weight|bias)": ours + r".embed.\g<kind>",
                stage + r"\.input_layer\.3\.position_embeddings\.weight": ours + r".pos_embed",
                stage + r"\.class_embeds\.weight": ours + r".class_embed.weight",
                stage + r"\.upsample\.0\." + leaf: norm(ours + ".up.norm"),
                stage + r"\.upsample\.1\.kernel\.(?P<kind>weight|bias)": ours + r".up.map.\g<kind>",
                stage + r"\.upsample\.2\." + leaf: norm(ours + ".up.out_norm"),
                stage + r"\.skip_denses\.(?P<n>\d+)\.(?P<kind>weight|bias)": ours + r".skips.\g<n>.\g<kind>",
                stage + r"\.output_layer\.0\." + leaf: norm(ours + ".out_norm"),
                stage + r"\.output_layer\.2\.(?P<kind>weight|bias)": ours + r".out.\g<kind>",
                block + r"\.block1\.norm\.linear\.weight": mine + ".norm.map.weight",
                block + r"\.block1\.norm\." + leaf: norm(mine + ".norm"),
                block + r"\.block1\.pos_emb\.freqs_h": mine + ".mixer.rows",
                block + r"\.block1\.pos_emb\.freqs_w": mine + ".mixer.columns",
                block + r"\.block1\.qk_norm\.scale": mine + ".mixer.log_scale",
                block + r"\.block1\.condition_key_value\.weight": mine + ".mixer.text.weight",
                block + r"\.block1\.query_key_value\.weight": maps,
                block + r"\.block1\.dense\.(?P<kind>weight|bias)": mine + r".mixer.proj.\g<kind>",
                block + r"\.block1\.1\.(?P<kind>weight|bias)": mine + r".mixer.\g<kind>",
                block + r"\.block2\.norm\.linear\.weight": mine + ".mlp_norm.map.weight",
                block + r"\.block2\.norm\." + leaf: norm(mine + ".mlp_norm"),
                block + r"\.block2\.w(?P<half>[01])\.(?P<kind>weight|bias)": gate,
                block + r"\.block2\.w2\.(?P<kind>weight|bias)": mine + r".mlp.fc2.\g<kind>",
            }
        )
        return theirs.close(out)

    def load_released(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the authors' state dict, every entry accounted for."""
        new = self.convert_state_dict(state_dict)
        for number, branch in enumerate(self._each):
            name = f"branches.{number}.pos_embed"
            if name in new and branch.pos_embed is not None and new[name].numel() == branch.pos_embed.numel():
                new[name] = new[name].reshape(branch.pos_embed.shape)
        self.load_state_dict(new)


def noise_at(noise: Tensor, size: Sequence[int]) -> Tensor:
    """Noise at a smaller size, of the same variance: sums over k x k places, divided by k.

    Args:
        noise: (B, C, H, W).
        size: (height, width) that divide its sides by the same number.

    >>> noise_at(torch.ones(1, 1, 4, 4), (2, 2)).flatten().tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    check_axes("noise", noise, B=None, C=None, H=None, W=None)
    height, width = noise.shape[-2:]
    size = to_tuple("size", tuple(size) if isinstance(size, Sequence) else size, 2)
    ratio = height // check_int("size", size[0], least=1)
    if ratio < 1 or (size[0] * ratio, size[1] * ratio) != (height, width):
        raise ValueError(f"size {tuple(size)} must divide {(height, width)} by one whole number")
    return noise if ratio == 1 else F.avg_pool2d(noise, ratio) * ratio


#: Released sizes, for latents of 32 x 32.
SIZES: dict[str, tuple[Branch, ...]] = {
    "dimr_xl_2r": (Branch(960, 1920, 39, 16, num_heads=16, patch_size=2), Branch(480, 960, 20, 32)),
    "dimr_g_2r": (Branch(1152, 2304, 57, 16, num_heads=16, patch_size=2), Branch(576, 1152, 29, 32)),
}


def dimr(name: str = "dimr_xl_2r", **changes: Any) -> DiMR:
    """A model of a released size; ``changes`` are settings of :class:`DiMR`.

    >>> [branch.blocks for branch in SIZES["dimr_xl_2r"]]
    [39, 21]
    """
    check_choice("name", name, tuple(SIZES))
    return DiMR(SIZES[name], **changes)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of :class:`DiMR` from the authors' configuration of a model, as nested mappings."""
    norms = {"TDRMSN": "td-rms", "LN": "td-layer", "RMSN": "rms", "ADARMSN": "ada-rms"}
    places = {"APE": "table", "Axial_RoPE": "axial-rotary"}
    kind, place = config.get("norm_type", "LN"), config.get("pe_type", "APE")
    check_choice("norm_type", kind, norms)
    check_choice("pe_type", place, places)
    if "stage_configs" not in config:
        raise ValueError(f"config must have stage_configs, got {sorted(config)}")
    known = {f.name for f in fields(Branch)}
    names = {
        "hidden_dim": "hidden", "num_blocks": "depth", "num_attention_heads": "num_heads", "dropout_prob": "drop",
        "image_input_ratio": "downscale", "input_feature_ratio": "patch_size",
    }  # fmt: skip
    branches = []
    for stage in config["stage_configs"]:
        given = {names.get(name, name): value for name, value in stage.items()}
        given["size"] = (stage["max_height"], stage["max_width"])
        check_choice("block_type", stage["block_type"], ("TransformerBlock", "ConvNeXtBlock"))
        if stage["block_type"] == "ConvNeXtBlock":
            given["num_heads"] = 0
        branches.append(Branch(**{name: value for name, value in given.items() if name in known}))
    return {
        "branches": branches, "channels": config["channels"], "num_classes": config.get("num_classes", 0),
        "norm": norms[kind], "stop_gradient": config["block_grad_to_lowres"], "positions": places[place],
        "context_dim": config.get("condition_dim", 0),
    }  # fmt: skip
