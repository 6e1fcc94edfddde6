"""Blocks of vision models: residual sublayers around any mechanism, and how a mechanism is fitted into a place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..checks import check_ints, describe
from ..grids import Layout
from ..nn.base import Mechanism
from ..nn.layers import (
    ConvNorm,
    DropPath,
    LayerScale,
    Mlp,
    Patchify,
    PositionalConv,
    SqueezeExcite,
    cell_means,
    normed,
    strided_valid,
    zero_invalid,
)
from ..nn.registry import find

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Place:
    """Where in a model a mechanism stands.

    Args:
        dim: width.
        num_heads: heads of its stage.
        stage: number of the stage, from 0.
        block: number of the block in its stage, from 0.
        depth: number of the block in the model, from 0.
        stage_depth: blocks of the stage.
        drop_path: stochastic depth here.
        stride: pixels per token.
    """

    dim: int
    num_heads: int
    stage: int = 0
    block: int = 0
    depth: int = 0
    stage_depth: int = 1
    drop_path: float = 0.0
    stride: int = 1


Make = Callable[[Place], nn.Module]


def fitted(name: str, settings: Mapping[str, Any] | None = None, rank: int = 2) -> Make:
    """Makes a registered mechanism for any place of a vision model: widths and heads are the place's.

    Args:
        name: in the registry.
        settings: beyond ``dim`` and ``num_heads``; they win over what the place says.
        rank: axes of the grid.

    Raises:
        ValueError: no such mechanism, or one that cannot read its own tokens in both directions.
    """
    cls: Any = find(name)
    parameters = inspect.signature(cls.__init__).parameters
    settings = dict(settings or {})

    def make(place: Place) -> nn.Module:
        config: dict[str, Any] = {"dim": place.dim}
        if "num_heads" in parameters:
            config["num_heads"] = place.num_heads
        if "rank" in parameters and rank in cls.class_traits.grid_ranks:
            config["rank"] = rank
        if "causal" in parameters and "noncausal-self" in cls.class_traits.patterns:
            config["causal"] = False
        mechanism = cls(**{**config, **settings})
        traits = mechanism.traits
        if "noncausal-self" not in traits.patterns:
            raise ValueError(
                f"mechanism={name!r} cannot stand in a vision model: its patterns are {sorted(traits.patterns)}, and "
                "'noncausal-self' is needed"
            )
        if not {1, rank} & traits.grid_ranks:
            raise ValueError(
                f"mechanism={name!r} with {settings} takes grids of rank {sorted(traits.grid_ranks)}; this model has "
                f"rank {rank}"
            )
        return mechanism

    return make


def mix(
    mixer: nn.Module,
    x: Tensor,
    context: Tensor | None = None,
    carry: Any = None,
    valid: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Any, dict]:
    """Call a mechanism on ``x``: on its grid when it takes that rank, on the flattened grid otherwise.

    Args:
        mixer: a mechanism; its ``traits`` say which grid ranks it takes, whether it carries and what losses it has.
        x: (B, *grid, C).
        context: (B, *grid', C) for cross patterns.
        carry: what the mechanism of the block before handed on.
        valid: (B, *grid) boolean, which tokens exist.
        layout: what the tokens (B, N, C) are, when some lie beside the grid; a mechanism that takes no layouts mixes
            them as a sequence.

    Returns:
        The tokens (B, *grid, C), the carry for the next block and the named losses.

    Raises:
        ValueError: when the mechanism takes neither the grid's rank nor a flat sequence.
    """
    traits: Any = mixer.traits
    rank = x.dim() - 2
    grid = x.shape[1:-1]
    beside = layout is not None and traits.layout
    flat = rank not in traits.grid_ranks and not beside
    if flat:
        if 1 not in traits.grid_ranks:
            raise ValueError(f"x has a grid of rank {rank}, but the mechanism takes ranks {sorted(traits.grid_ranks)}")
        x = x.flatten(1, -2)
        context = context.flatten(1, -2) if context is not None else None
        valid = valid.flatten(1) if valid is not None else None
    returns = (*(("carry",) if traits.carries else ()), *(("losses",) if traits.losses else ()))
    extra: dict[str, Any] = {}
    if context is not None:
        extra["context"] = context
    if valid is not None:
        extra["valid"] = valid
    if beside:
        extra["layout"] = layout
    if traits.carries:
        extra["carry"] = carry
    out = mixer(x, **extra, returns=returns) if returns else mixer(x, **extra)
    if not returns:
        return (out.unflatten(1, grid) if flat else out), None, {}
    return (out.y.unflatten(1, grid) if flat else out.y), out.carry, out.losses or {}


def add_losses(losses: dict[str, Tensor] | None, own: Mapping[str, Tensor]) -> None:
    """Add the losses of a mechanism to those of the model, by name, where somebody asked for them."""
    if losses is not None:
        for name, loss in own.items():
            losses[name] = losses[name] + loss if name in losses else loss


class Residual(nn.Module):
    """``x + drop_path(scale * inner(norm(x)))``, or with the norm behind: ``x + drop_path(scale * norm(inner(x)))``.

    Args:
        dim: width.
        inner: a mechanism, or a module called as ``inner(x, valid)``.
        norm: makes the norm; ``None`` for none.
        drop_path: stochastic depth in training.
        layer_scale: start of the learned scale per channel; ``None`` for none.
        post_norm: the norm stands behind ``inner``.
    """

    def __init__(
        self,
        dim: int,
        inner: nn.Module,
        norm: Norm | None = nn.LayerNorm,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
    ):
        super().__init__()
        self.post_norm = post_norm
        self.norm = nn.Identity() if norm is None else norm(dim)
        self.inner = inner
        self.scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, *grid, C) -> the same and the carry; losses of the mechanism are added into ``losses``."""
        y = x if self.post_norm else normed(self.norm, x, valid)
        if isinstance(self.inner, Mechanism):
            y, carry, own = mix(self.inner, y, None, carry, valid, layout)
            add_losses(losses, own)
        else:
            y = self.inner(y, valid)
        if self.post_norm:
            y = normed(self.norm, y, valid)
        return x + self.drop_path(self.scale(y)), carry


class Block(nn.Module):
    """The block of most vision models: ``[position], mixer, [position], MLP``, each a residual sublayer.

    Args:
        dim: width.
        mixer: the mechanism.
        mlp: module called as ``mlp(x, valid)``; the plain one of ``mlp_ratio`` by default; ``None`` with ratio 0.
        mlp_ratio: hidden width of the MLP over ``dim``.
        norm: makes norms.
        drop_path: stochastic depth of both sublayers.
        layer_scale: start of the learned scales; ``None`` for none.
        post_norm: norms stand behind the sublayers.
        position: side of the depthwise convolution before the mixer (0: none).
        mlp_position: the same before the MLP.
        activation: of the plain MLP.
        rank: axes of the grid, for these convolutions.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module | None = None,
        mlp_ratio: float = 4.0,
        norm: Norm | None = nn.LayerNorm,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        position: int = 0,
        mlp_position: int = 0,
        activation: Callable[[], nn.Module] = nn.GELU,
        rank: int = 2,
    ):
        super().__init__()
        self.position = PositionalConv(dim, position, rank) if position else None
        self.mixer = Residual(dim, mixer, norm, drop_path, layer_scale, post_norm)
        self.mlp_position = PositionalConv(dim, mlp_position, rank) if mlp_position else None
        if mlp is None and mlp_ratio:
            mlp = Mlp(dim, mlp_ratio, activation)
        self.mlp = None if mlp is None else Residual(dim, mlp, norm, drop_path, layer_scale, post_norm)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, *grid, C) -> the same, and the carry for the next block."""
        if self.position is not None:
            x = self.position(x, valid)
        x, carry = self.mixer(x, valid, carry, losses, layout)
        if self.mlp_position is not None:
            x = self.mlp_position(x, valid)
        if self.mlp is not None:
            x, _ = self.mlp(x, valid)
        return x, carry


def at_slots(
    sublayer: nn.Module, x: Tensor, slots: Tensor, valid: Tensor | None = None, rest: Tensor | None = None
) -> Tensor:
    """A residual sublayer for some tokens alone.

    Args:
        sublayer: called as ``sublayer(tokens, valid) -> (tokens, carry)``.
        x: (B, *grid, C).
        slots: (B, K) of the tokens.
        valid: (B, *grid) boolean, which tokens exist.
        rest: (B, *grid, C) what the others become; they stay as they are by default.
    """
    flat = x.flatten(1, -2)
    at = slots[..., None].expand(-1, -1, flat.shape[2])
    exists = None if valid is None else valid.flatten(1).gather(1, slots)
    made, _ = sublayer(flat.gather(1, at), exists)
    return (flat if rest is None else rest.flatten(1, -2)).scatter(1, at, made).view(x.shape)


class MBConv(nn.Module):
    """Inverted residual: BatchNorm, 1 x 1 to more channels, depthwise, squeeze-and-excitation, 1 x 1 back; a shortcut.

    Each of the first two convolutions has a BatchNorm and an activation behind it. With a stride the shortcut is the
    mean of cells, with another width a 1 x 1 convolution behind that.

    Args:
        dim: channels in.
        out_dim: channels out.
        hidden: channels in between.
        stride: of the depthwise convolution.
        squeeze: width between the two maps of the squeeze-and-excitation; 0 for none.
        activation: makes the activation.
        squeeze_activation: makes that of the squeeze-and-excitation.
        bias: of the last convolution and of the shortcut's.
        padding: of the depthwise convolution, as of :class:`attnlib.nn.layers.ConvNorm`.
        drop_path: stochastic depth.
        eps, momentum: of the norms.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        hidden: int,
        stride: int = 1,
        squeeze: int = 0,
        activation: Callable[[], nn.Module] = nn.SiLU,
        squeeze_activation: Callable[[], nn.Module] = nn.SiLU,
        bias: bool = True,
        padding: int | str | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__()
        self.stride = stride
        norms: dict[str, Any] = dict(eps=eps, momentum=momentum, activation=activation)
        self.shortcut = ConvNorm(dim, out_dim, bias=bias, norm=False) if dim != out_dim else None
        self.expand = ConvNorm(dim, hidden, pre_norm=True, **norms)
        self.depthwise = ConvNorm(hidden, hidden, 3, stride, padding, groups=hidden, **norms)
        self.squeeze = SqueezeExcite(hidden, squeeze, squeeze_activation) if squeeze else None
        self.project = ConvNorm(hidden, out_dim, bias=bias, norm=False)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim), and which of these exist."""
        short = cell_means(x, self.stride, valid) if self.stride > 1 else zero_invalid(x, valid)
        y = self.depthwise(self.expand(x, valid), valid)
        valid = strided_valid(valid, self.stride)
        if self.shortcut is not None:
            short = self.shortcut(short)
        if self.squeeze is not None:
            y = self.squeeze(y, valid)
        return short + self.drop_path(self.project(y)), valid


class Chain(nn.Sequential):
    """Modules one after another that are called as ``module(x, valid) -> (x, valid)``: stems of several layers."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        for module in self:
            x, valid = module(x, valid)
        return x, valid


class ConvStem(nn.Sequential):
    """:class:`attnlib.nn.layers.ConvNorm` s one after another, as a stem: ``stem(x, valid) -> (x, valid)``."""

    def __init__(self, *convs: ConvNorm):
        super().__init__(*convs)
        self.strides = [int(c.conv.stride[0]) for c in convs]

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        for module, stride in zip(self, self.strides, strict=True):
            x, valid = module(x, valid), strided_valid(valid, stride)
        return x, valid


class TwoConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2, each with a norm behind it and a GELU between them, as a stem.

    Args:
        dim: channels in.
        out_dim: channels out; half as many in between.
        norm: makes norms.
        mid_norm: the norm between them.
        activation: between them.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        norm: Norm = nn.LayerNorm,
        mid_norm: bool = True,
        activation: Callable[[], nn.Module] = nn.GELU,
    ):
        super().__init__()
        self.first = Patchify(dim, out_dim // 2, 3, 2, 1, norm if mid_norm else None)
        self.act = activation()
        self.second = Patchify(out_dim // 2, out_dim, 3, 2, 1, norm)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / 4), ceil(W / 4), out_dim), and which of these exist."""
        x, valid = self.first(x, valid)
        return self.second(self.act(x), valid)


def init_weights(model: nn.Module, std: float = 0.02, also: tuple[type[nn.Module], ...] = ()) -> None:
    """Linear maps from a truncated normal distribution with zero biases, as most vision transformers start.

    What a mechanism initialises in its own way stays as it is, but for those of the classes ``also``.
    """

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, Mechanism) and not isinstance(child, also):
                continue
            if isinstance(child, nn.Linear):
                nn.init.trunc_normal_(child.weight, std=std)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            visit(child)

    visit(model)


def check_stages(count: int, **given: Any) -> None:
    """Raise unless every setting is a sequence with one entry for each stage."""
    for name, value in given.items():
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
            raise ValueError(f"{name}={describe(value)} must have one number for each of {count} stages")


def places(
    dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], strides: Sequence[int], drop_path: float = 0.0
) -> list[list[Place]]:
    """The places of every stage; stochastic depth grows linearly from 0 to ``drop_path`` over the blocks.

    Raises:
        ValueError: not as many heads as depths.
    """
    if not len(dims) == len(depths) == len(heads) == len(strides):
        raise ValueError(
            f"depths={tuple(depths)} and num_heads={tuple(heads)} must have one number for each of {len(dims)} stages"
        )
    check_ints("depths", depths, least=1)
    check_ints("num_heads", heads, least=1)
    total = sum(depths)
    out: list[list[Place]] = []
    at = 0
    for stage, (dim, depth, h, stride) in enumerate(zip(dims, depths, heads, strides, strict=True)):
        first = Place(dim, h, stage, stage_depth=depth, stride=stride)
        out.append(
            [
                replace(first, block=i, depth=at + i, drop_path=drop_path * (at + i) / max(1, total - 1))
                for i in range(depth)
            ]
        )
        at += depth
    return out
