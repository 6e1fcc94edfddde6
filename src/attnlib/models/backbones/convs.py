"""What convolutional backbones are built of: residual blocks that may change the grid, and inverted residuals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.base import Mechanism
from ...nn.layers import ConvNorm, DropPath, MapNorm, SqueezeExcite, cell_means, strided_valid, zero_invalid
from ...nn.released import Released
from ..blocks import add_losses, mix
from .stages import Stage

Activation = Callable[[], nn.Module]

Relu = functools.partial(nn.ReLU, inplace=True)
Silu = functools.partial(nn.SiLU, inplace=True)
HardSwish = functools.partial(nn.Hardswish, inplace=True)


class ConvStage(Stage):
    """A stage whose blocks may change the grid: ``block(x, valid, carry, losses) -> (x, valid, carry)``."""

    @staticmethod
    def _after(made: Any, valid: Tensor | None) -> tuple[Tensor, Tensor | None, Any]:
        return made


class MaxPool(nn.Module):
    """Maxima of 3 x 3 tokens around every second one, over those that exist."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C), and which of these exist."""
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), float("-inf"))
        x = F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
        valid = strided_valid(valid, 2)
        return zero_invalid(x, valid), valid


class ConvBlock(nn.Module):
    """A :class:`attnlib.nn.layers.ConvNorm` as a block of a :class:`ConvStage`."""

    def __init__(self, conv: ConvNorm):
        super().__init__()
        self.conv, self.stride = conv, int(conv.conv.stride[0])

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        return self.conv(x, valid), strided_valid(valid, self.stride), carry


class Shortcut(nn.Module):
    """1 x 1 convolution and norm of every ``stride``-th token, or of the means of cells of ``stride`` tokens a side."""

    def __init__(self, dim: int, out_dim: int, stride: int = 1, average: bool = False):
        super().__init__()
        self.cell = stride if average else 1
        self.conv = ConvNorm(dim, out_dim, 1, 1 if average else stride)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        if self.cell > 1:
            x, valid = cell_means(x, self.cell, valid), strided_valid(valid, self.cell)
        return self.conv(x, valid)


class Mixing(nn.Module):
    """A mechanism in the place of a convolution: mechanism, means of cells where it strides, BatchNorm, activation.

    Args:
        inner: a mechanism; or a module called as ``inner(x, valid)`` that strides by itself.
        dim: width.
        stride: tokens a side per token of the output.
        activation: makes the activation.
    """

    def __init__(self, inner: nn.Module, dim: int, stride: int = 1, activation: Activation = Relu):
        super().__init__()
        self.inner, self.stride = inner, stride
        self.norm, self.act = MapNorm(dim), activation()

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), dim), and the carry for the next block."""
        if isinstance(self.inner, Mechanism):
            x, carry, own = mix(self.inner, zero_invalid(x, valid), None, carry, valid)
            add_losses(losses, own)
            if self.stride > 1:  # what is carried belongs to the finer grid
                x, carry = cell_means(x, self.stride, valid), None
        else:
            x = self.inner(x, valid)
        return self.act(self.norm(x, strided_valid(valid, self.stride))), carry


class ResidualBlock(nn.Module):
    """``act(shortcut(x) + drop_path(branch(x)))``, the block of ResNets.

    The branch is 1 x 1, 3 x 3 and 1 x 1 convolution with BatchNorms behind them (a bottleneck), or 3 x 3 and 3 x 3
    (``basic``). The first 3 x 3 convolution strides; its place may be a mechanism's.

    Args:
        dim: channels in.
        out_dim: channels out.
        hidden: channels in between.
        stride: tokens a side per token of the output.
        basic: two convolutions instead of three.
        groups: of the 3 x 3 convolution of a bottleneck.
        squeeze: width inside a squeeze-and-excitation before the last convolution; 0 for none.
        squeeze_activation: makes its activation.
        squeeze_last: it stands behind the last convolution and its norm instead.
        mixer: takes the place of the 3 x 3 convolution of a bottleneck, as of :class:`Mixing`.
        mixed: width that it gives; ``hidden`` by default.
        average: the shortcut takes means of cells instead of every ``stride``-th token.
        activation: makes activations.
        drop_path: stochastic depth.
        gain: of the last norm at the start.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        hidden: int,
        stride: int = 1,
        basic: bool = False,
        groups: int = 1,
        squeeze: int = 0,
        squeeze_activation: Activation = Relu,
        squeeze_last: bool = False,
        mixer: nn.Module | None = None,
        mixed: int | None = None,
        average: bool = False,
        activation: Activation = Relu,
        drop_path: float = 0.0,
        gain: float = 0.0,
    ):
        super().__init__()
        self.stride = stride
        self.shortcut = Shortcut(dim, out_dim, stride, average) if stride > 1 or dim != out_dim else None
        self.conv1 = ConvNorm(dim, hidden, 3 if basic else 1, stride if basic else 1, activation=activation)
        self.conv2: nn.Module | None = None
        if mixer is not None:
            hidden = hidden if mixed is None else mixed
            self.conv2 = Mixing(mixer, hidden, stride, activation)
        elif not basic:
            self.conv2 = ConvNorm(hidden, hidden, 3, stride, groups=groups, activation=activation)
        self.squeeze_last, squeezed = squeeze_last, out_dim if squeeze_last else hidden
        self.squeeze = SqueezeExcite(squeezed, squeeze, squeeze_activation) if squeeze else None
        self.conv3 = ConvNorm(hidden, out_dim, 3 if basic else 1, gain=gain)
        self.act = activation()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim), which of these exist, and the carry."""
        short = zero_invalid(x, valid) if self.shortcut is None else self.shortcut(x, valid)
        x = self.conv1(x, valid)
        strided = strided_valid(valid, self.stride)
        if isinstance(self.conv2, Mixing):
            x, carry = self.conv2(x, valid, carry, losses)
        elif self.conv2 is not None:
            x = self.conv2(x, valid)
        if self.squeeze is not None and not self.squeeze_last:
            x = self.squeeze(x, strided)
        x = self.conv3(x, strided)
        if self.squeeze is not None and self.squeeze_last:
            x = self.squeeze(x, strided)
        return self.act(short + self.drop_path(x)), strided, carry


class InvertedResidual(nn.Module):
    """1 x 1 convolution to more channels, depthwise, squeeze-and-excitation, 1 x 1 back; added to ``x`` where it fits.

    Behind every convolution stands a BatchNorm, behind all but the last an activation.

    Args:
        dim: channels in.
        out_dim: channels out.
        hidden: channels in between; ``None`` for no first convolution.
        kernel_size: side of the depthwise kernel.
        stride: of the depthwise convolution.
        squeeze: width inside the squeeze-and-excitation; 0 for none.
        activation: makes activations.
        squeeze_activation: makes that of the squeeze-and-excitation.
        gate: makes its gate.
        drop_path: stochastic depth.
        conv: further settings of the convolutions: ``padding``, ``eps``, ``momentum``.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        hidden: int | None,
        kernel_size: int = 3,
        stride: int = 1,
        squeeze: int = 0,
        activation: Activation = Silu,
        squeeze_activation: Activation = Silu,
        gate: Activation = nn.Sigmoid,
        drop_path: float = 0.0,
        **conv: Any,
    ):
        super().__init__()
        self.stride, self.skip = stride, stride == 1 and dim == out_dim
        wide = dim if hidden is None else hidden
        self.expand = None if hidden is None else ConvNorm(dim, wide, activation=activation, **conv)
        self.depthwise = ConvNorm(wide, wide, kernel_size, stride, groups=wide, activation=activation, **conv)
        self.squeeze = SqueezeExcite(wide, squeeze, squeeze_activation, gate) if squeeze else None
        self.project = ConvNorm(wide, out_dim, **conv)
        self.drop_path = DropPath(drop_path) if drop_path and self.skip else nn.Identity()

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim), which of these exist, and the carry."""
        y = x if self.expand is None else self.expand(x, valid)
        y = self.depthwise(y, valid)
        strided = strided_valid(valid, self.stride)
        if self.squeeze is not None:
            y = self.squeeze(y, strided)
        y = self.drop_path(self.project(y, strided))
        return (zero_invalid(x, valid) + y if self.skip else y), strided, carry


@dataclass(frozen=True)
class Inverted:
    """One inverted residual of a table.

    Args:
        out_dim: channels out.
        kernel_size: of the depthwise convolution.
        stride: of the depthwise convolution.
        ratio: hidden width over channels in; 0 for none, and no first convolution; -1 for a 1 x 1 convolution alone.
        squeeze: a squeeze-and-excitation.
        relu: ReLU instead of the model's activation.
        hidden: hidden width itself, where it is not ``ratio`` times the channels in.
    """

    out_dim: int
    kernel_size: int = 3
    stride: int = 1
    ratio: float = 6
    squeeze: bool = True
    relu: bool = False
    hidden: int | None = None


def inverted_stages(
    stacks: Sequence[Sequence[Inverted]],
    make: Callable[[int, Inverted, float], nn.Module],
    dim: int,
    drop_path: float = 0.0,
) -> tuple[list[ConvStage], list[int], list[int], dict[str, str]]:
    """Stages that begin where a stack of blocks strides, as far as one map of features reaches.

    Args:
        stacks: of the released model, one after another.
        make: from channels in, row of the table and stochastic depth to a block.
        dim: channels of the stem, of which two pixels a side are a token.
        drop_path: stochastic depth grows to it by ``number / blocks``.

    Returns:
        Stages, channels and pixels per token behind them, and our name for ``<stack>.<block>``.
    """
    total, number, step = sum(map(len, stacks)), 0, 2
    rows: list[list[nn.Module]] = []
    dims: list[int] = []
    steps: list[int] = []
    names: dict[str, str] = {}
    for i, stack in enumerate(stacks):
        step *= stack[0].stride
        if stack[0].stride > 1 or not rows:
            rows.append([])
            dims.append(0)
            steps.append(step)
        for j, row in enumerate(stack):
            names[f"{i}.{j}"] = f"stages.{len(rows) - 1}.blocks.{len(rows[-1])}"
            rows[-1].append(make(dim, row, drop_path * number / total))
            dim, number = row.out_dim, number + 1
        dims[-1] = dim
    return [ConvStage(row) for row in rows], dims, steps, names


def divisible(width: float, by: int = 8) -> int:
    """The nearest multiple, and not less than nine tenths of ``width``."""
    near = max(by, int(width + by / 2) // by * by)
    return near + by if near < 0.9 * width else near


def init_convs(model: nn.Module, linear: Callable[[Tensor], object] | None = None) -> None:
    """Convolutions from normal distributions of ``sqrt(2 / fan_out)``, those of squeeze-and-excitations too.

    What a mechanism initialises in its own way stays as it is.

    Args:
        model: with its head at ``head.fc``.
        linear: in place, the start of the classifier's weight; as torch's linear maps start by default.
    """

    def visit(module: nn.Module) -> None:
        if isinstance(module, Mechanism):
            return
        if isinstance(module, SqueezeExcite):
            for layer in (module.fc1, module.fc2):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.out_features))
                nn.init.zeros_(layer.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        for child in module.children():
            visit(child)

    visit(model)
    head: Any = model.head
    if isinstance(head.fc, nn.Linear):
        if linear is None:
            head.fc.reset_parameters()
        else:
            linear(head.fc.weight)
            nn.init.zeros_(head.fc.bias)


def by_prefix(theirs: Released, prefixes: Mapping[str, str], model: nn.Module) -> dict[str, Tensor]:
    """Take the entries of the parts that are named: from their name of a part to ours.

    1 x 1 kernels become matrices where ours is a linear map.
    """
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    out: dict[str, Tensor] = {}
    for name in theirs:
        where, _, last = name.rpartition(".")
        if where in prefixes:
            value = theirs.take(name)
            flat = value.dim() == 4 and prefixes[where] in linear
            out[f"{prefixes[where]}.{last}"] = value.flatten(1) if flat else value
    return out


def conv_names(theirs: str, ours: str, conv: str = "conv", norm: str = "bn") -> dict[str, str]:
    """The two prefixes of a :class:`attnlib.nn.layers.ConvNorm`."""
    return {f"{theirs}{conv}": f"{ours}.conv", f"{theirs}{norm}": f"{ours}.norm"}


def blocks_of(model: Any) -> Iterator[tuple[int, int, Any]]:
    """Stage, number in it, and block."""
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            yield i, j, block
