"""One small pre-norm backbone per attention pattern, equal in everything but the mechanism under test.

The models of :mod:`attnlib.bench` are these. Embeddings, norms, MLPs and heads draw from one random stream and the
mechanisms from another, so that two models of one seed start from the same shared weights whatever their mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlib.types import check_rank

from .blocks import mix

MakeMixer = Callable[[], nn.Module]


class Prediction(NamedTuple):
    """What a tiny model returns: the prediction and the mechanisms' own losses, summed over blocks."""

    y: Tensor
    losses: dict[str, Tensor]


def make_apart(make: MakeMixer) -> nn.Module:
    """Build a mechanism from its own random stream, seeded from the current one.

    However many numbers its initialisation draws, the modules built after it get the same ones.
    """
    seed = int(torch.randint(2**31 - 1, ()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def mlp(dim: int, ratio: float) -> nn.Sequential:
    """The two-layer MLP of every block."""
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class TinyBlock(nn.Module):
    """``x + mechanism(norm(x))``, then ``x + mlp(norm(x))``; ``prelude`` is a fixed self-mechanism before it.

    Args:
        dim: width.
        make: makes the mechanism under test.
        prelude: makes the mechanism that every competitor shares (decoder self-attention), or ``None``.
        mlp_ratio: hidden width of the MLP over ``dim``.
    """

    def __init__(self, dim: int, make: MakeMixer, prelude: MakeMixer | None = None, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        self.norm_prelude = nn.LayerNorm(dim) if prelude else None
        self.prelude = make_apart(prelude) if prelude else None
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim, mlp_ratio)
        self.mixer = make_apart(make)

    def forward(self, x: Tensor, context: Tensor | None = None, carry: Any = None) -> tuple[Tensor, Any, dict]:
        if self.prelude is not None and self.norm_prelude is not None:
            x = x + mix(self.prelude, self.norm_prelude(x))[0]
        y, carry, losses = mix(self.mixer, self.norm1(x), context, carry)
        x = x + y
        return x + self.mlp(self.norm2(x)), carry, losses


class TinyBackbone(nn.Module):
    """``depth`` blocks and a final norm; hands the carry from block to block and adds up the losses.

    Args:
        dim: width.
        depth: number of blocks.
        make: makes one mechanism; called once per block.
        prelude: see :class:`TinyBlock`.
        mlp_ratio: hidden width of the MLP over ``dim``.

    >>> import torch, attnlib
    >>> body = TinyBackbone(16, 2, lambda: attnlib.create("softmax-attention", dim=16, num_heads=2))
    >>> body(torch.zeros(1, 5, 16)).y.shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self, dim: int, depth: int, make: MakeMixer, prelude: MakeMixer | None = None, mlp_ratio: float = 2.0
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyBlock(dim, make, prelude, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Prediction:
        """Run the blocks on ``x`` (B, *grid, dim), reading ``context`` (B, *grid', dim) in cross patterns."""
        carry: Any = None
        total: dict[str, Tensor] = {}
        for block in self.blocks:
            x, carry, losses = block(x, context, carry)
            for name, loss in losses.items():
                total[name] = total[name] + loss if name in total else loss
        return Prediction(self.norm(x), total)


class TinyModel(nn.Module):
    """Common ground of the tiny models: parameter accounts and training progress."""

    backbone: TinyBackbone

    def mechanisms(self) -> list[nn.Module]:
        """The mechanisms under test, one per block."""
        return [block.mixer for block in self.backbone.blocks]  # type: ignore[union-attr,misc]

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the mechanisms, of everything they share, and in total."""
        total = sum(p.numel() for p in self.parameters())
        own = sum(p.numel() for m in self.mechanisms() for p in m.parameters())
        return {"mechanism": own, "shared": total - own, "total": total}

    def set_progress(self, progress: float) -> None:
        """Tell mechanisms with a schedule how far training is, from 0 to 1."""
        for mechanism in self.mechanisms():
            advance = getattr(mechanism, "set_progress", None)
            if advance is not None:
                advance(progress)


#: Size of embeddings and positions at the start: that of what a block adds to them. Far smaller ones drown in the first
#: block, and a mechanism that cannot tell places apart spends its first hundreds of steps averaging over all of them.
LOUDNESS = 0.3


def _positions(*shape: int) -> nn.Parameter:
    """Learned positions (*grid, dim) that start as waves along each axis, periods from two tokens to the whole side.

    From waves a linear map reads "one to the left" at once, for every place alike; from random vectors it has to be
    learned place by place.
    """
    *grid, dim = shape
    count = dim // (2 * len(grid))  # frequencies per axis
    out = torch.zeros(shape)
    for axis, side in enumerate(grid):
        frequencies = math.pi * (2.0 / side) ** (torch.arange(count) / max(1, count - 1))
        angle = torch.arange(side)[:, None] * frequencies
        waves = torch.cat([angle.sin(), angle.cos()], -1)
        at = 2 * count * axis
        out[..., at : at + 2 * count] = waves.view(*(side if a == axis else 1 for a in range(len(grid))), 2 * count)
    return nn.Parameter(out * LOUDNESS)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class DetailStem(nn.Module):
    """Pixels (B, H, W, C) to tokens (B, H, W, dim): a convolution over the colours and their deviation from the mean of
    the neighbourhood. The deviation is amplified: without it a norm sees little but the colour of the whole patch.

    Args:
        channels: channels of the picture.
        dim: width of the tokens.
        kernel_size: extent of the convolution.
    """

    def __init__(self, channels: int, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, dim, kernel_size, padding=kernel_size // 2, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        mean = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return self.conv(torch.cat([2 * x - 1, 8 * (x - mean)], 1)).permute(0, 2, 3, 1)


class TinyLM(TinyModel):
    """Byte-level language model (causal self).

    Args:
        make: makes one causal mechanism.
        dim: width.
        depth: blocks.
        length: longest sequence.
        vocab: number of symbols.
    """

    def __init__(self, make: MakeMixer, dim: int = 64, depth: int = 2, length: int = 128, vocab: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=LOUDNESS)
        self.positions = _positions(length, dim)
        self.backbone = TinyBackbone(dim, depth, make)
        self.head = nn.Linear(dim, vocab)

    def forward(self, tokens: Tensor) -> Prediction:
        """Logits (B, N, vocab) of the symbol after each of ``tokens`` (B, N)."""
        check_rank("tokens", tokens, 2, "(B, N)")
        longest = len(self.positions)
        if tokens.shape[1] > longest:
            raise ValueError(f"tokens has {tokens.shape[1]} tokens, more than the positions of length={longest}")
        out = self.backbone(self.embed(tokens) + self.positions[: tokens.shape[1]])
        return Prediction(self.head(out.y), out.losses)


class TinyClassifier(TinyModel):
    """Image classifier with one token per pixel (noncausal self).

    Args:
        make: makes one mechanism.
        dim: width.
        depth: blocks.
        grid: (H, W) of the images.
        channels: channels of the images.
        classes: number of classes.
    """

    def __init__(
        self,
        make: MakeMixer,
        dim: int = 64,
        depth: int = 2,
        grid: tuple[int, int] = (8, 8),
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)
        self.positions = _positions(*grid, dim)
        self.backbone = TinyBackbone(dim, depth, make)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Prediction:
        """Class scores (B, classes) of ``images`` (B, H, W, channels)."""
        x = self.stem(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = self.backbone(x + self.positions)
        return Prediction(self.head(out.y.mean((1, 2))), out.losses)


class TinySuperResolution(TinyModel):
    """Enlarges photographs: tokens are low-resolution pixels, the head emits the residual over bicubic.

    The head starts at zero, so that training starts exactly at the bicubic reference.

    Args:
        make: makes one mechanism.
        dim: width.
        depth: blocks.
        grid: (h, w) of the low-resolution patch.
        factor: enlargement.
    """

    def __init__(
        self, make: MakeMixer, dim: int = 64, depth: int = 2, grid: tuple[int, int] = (16, 16), factor: int = 2
    ) -> None:
        super().__init__()
        self.factor = factor
        self.stem = DetailStem(3, dim)
        self.positions = _positions(*grid, dim)
        self.backbone = TinyBackbone(dim, depth, make)
        self.head = _zero(nn.Linear(dim, 3 * factor * factor))

    def forward(self, low: Tensor, bicubic: Tensor) -> Prediction:
        """(B, h·factor, w·factor, 3) from ``low`` (B, h, w, 3) and its ``bicubic`` enlargement."""
        out = self.backbone(self.stem(low) + self.positions)
        residual = F.pixel_shuffle(self.head(out.y).permute(0, 3, 1, 2), self.factor).permute(0, 2, 3, 1)
        return Prediction(bicubic + residual, out.losses)


class TinyCrossUpsampler(TinyModel):
    """High-resolution positions that read a low-resolution context (noncausal cross).

    Queries know where they are and the bicubic picture there; everything else they must read from the context, whose
    tokens are low-resolution pixels with the same Fourier features of their coordinates.

    Args:
        make: makes one mechanism; it is called with ``context``.
        dim: width.
        depth: blocks.
        grid: (h, w) of the context.
        factor: query positions per context position and axis.
    """

    def __init__(
        self, make: MakeMixer, dim: int = 64, depth: int = 2, grid: tuple[int, int] = (12, 12), factor: int = 2
    ) -> None:
        super().__init__()
        self.stem = DetailStem(3, dim)
        self.query = DetailStem(3, dim, kernel_size=1)
        self.grid, self.factor = grid, factor
        self.where = nn.Linear(_fourier_grid(grid, 1).shape[-1], dim)
        self.backbone = TinyBackbone(dim, depth, make)
        self.head = _zero(nn.Linear(dim, 3))

    def forward(self, low: Tensor, bicubic: Tensor) -> Prediction:
        """(B, h·factor, w·factor, 3) from ``low`` (B, h, w, 3) and its ``bicubic`` enlargement."""
        here, there = (_fourier_grid(self.grid, factor).to(low) for factor in (1, self.factor))
        out = self.backbone(self.query(bicubic) + self.where(there), self.stem(low) + self.where(here))
        return Prediction(bicubic + self.head(out.y), out.losses)


def _fourier_grid(grid: tuple[int, int], factor: int) -> Tensor:
    """(h·factor, w·factor, 4·octaves): sines and cosines of pixel-centre coordinates, finest period two pixels."""
    axes = []
    for side in grid:
        centre = (torch.arange(side * factor) + 0.5) / factor
        octaves = max(1, math.ceil(math.log2(side)) + 1)
        angle = centre[:, None] * math.pi / 2.0 ** torch.arange(octaves)
        axes.append(torch.cat([angle.sin(), angle.cos()], -1))
    rows = axes[0][:, None, :].expand(-1, len(axes[1]), -1)
    cols = axes[1][None, :, :].expand(len(axes[0]), -1, -1)
    return torch.cat([rows, cols], -1).contiguous()


class TinyForecaster(TinyModel):
    """Encoder and decoder that forecasts from every decoder position (causal cross).

    Tokens are ``patch`` consecutive samples. The decoder's self-attention and the encoder are plain softmax attention
    in every competitor; only the reading of the context differs. Position t knows the true samples up to its own patch
    and forecasts the ``horizon`` samples after it, so a mechanism that looks ahead would see its own target.

    Args:
        make: makes one causal mechanism; it is called with ``context``.
        plain: makes the plain self-attention of encoder (``causal=False``) and decoder (``causal=True``).
        dim: width.
        depth: decoder blocks.
        context_tokens: tokens of the context.
        decoder_tokens: tokens of the decoder.
        patch: samples per token.
        horizon: samples forecast from each decoder position.
        channels: channels of the series.
    """

    def __init__(
        self,
        make: MakeMixer,
        plain: Callable[[bool], nn.Module],
        dim: int = 64,
        depth: int = 2,
        context_tokens: int = 48,
        decoder_tokens: int = 16,
        patch: int = 4,
        horizon: int = 16,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.patch, self.horizon, self.channels = patch, horizon, channels
        self.embed = nn.Linear(patch * channels, dim)
        self.positions = _positions(context_tokens + decoder_tokens, dim)
        self.encoder = TinyBackbone(dim, 1, lambda: plain(False))
        self.backbone = TinyBackbone(dim, depth, make, prelude=lambda: plain(True))
        self.head = _zero(nn.Linear(dim, horizon * channels))

    def forward(self, past: Tensor, recent: Tensor) -> Prediction:
        """Forecasts (B, decoder_tokens, horizon, F) from ``past`` (B, T, F) and ``recent`` (B, T', F)."""
        check_rank("past", past, 3, "(B, T, F)")
        context = self._tokens(past)
        queries = self._tokens(recent)
        n = context.shape[1]
        encoded = self.encoder(self.embed(context) + self.positions[:n]).y
        out = self.backbone(self.embed(queries) + self.positions[n : n + queries.shape[1]], encoded)
        step = self.head(out.y).unflatten(-1, (self.horizon, self.channels))
        last = recent[:, self.patch - 1 :: self.patch]
        return Prediction(last.unsqueeze(2) + step, out.losses)

    def _tokens(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1] // self.patch, self.patch * self.channels)


__all__: Sequence[str] = (
    "DetailStem",
    "Prediction",
    "TinyBackbone",
    "TinyBlock",
    "TinyClassifier",
    "TinyCrossUpsampler",
    "TinyForecaster",
    "TinyLM",
    "TinyModel",
    "TinySuperResolution",
    "mix",
)
