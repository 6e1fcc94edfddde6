"""DEYOLO: two maps of one scene gate each other, channels first, then places; and convolutions on checkerboards.

Chen et al., 2024, "DEYOLO: Dual-Feature-Enhancement YOLO for Cross-Modality Object Detection", arXiv 2412.04931.
``conv`` is a convolution, BatchNorm and SiLU; V is the visible map, I the infrared one.

Channels (DECA): ``w_x = sigmoid(W_2 relu(W_1 mean(x)))`` with one pair of matrices for both,
``g = pyramid(conv_3([V, I]))``, one number per channel,

    ``V' = V * sigmoid(w_I * g)``,  ``I' = I * sigmoid(w_V * g)``.

The pyramid is three depthwise convolutions whose strides are their sides, 5, 4 and ``size // 20``, each with SiLU. On
maps below ``size`` a side, ``g`` is the mean.

Places (DEPA): ``s_x = conv_5([conv_3(x), conv_7(x)])``, one channel each, own weights for each of V' and I',
``G = sigmoid(conv_3(V') + conv_3(I'))``,

    ``V'' = V' * sigmoid(G + s_I)``,  ``I'' = I' * sigmoid(G + s_V)``,

and what a neck gets is ``sigmoid(V'' + I'')``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_choice,
    check_int,
    check_ints,
    check_rank,
    check_real,
    check_valid,
    describe,
)
from ...types import Traits
from ..base import Fusion
from ..layers import ConvNorm, SqueezeExcite, masked_mean, zero_invalid
from ..registry import register
from ..released import Released, Rule

#: What a norm holds.
HELD = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def check_maps(names: Sequence[str], maps: Sequence[Tensor], dim: int) -> None:
    """Maps (B, H, W, dim) of floating point on one grid, or an error that names the one that is not.

    Raises:
        ValueError: another rank, width, type or number of maps, or grids that differ.
    """
    if len(maps) != len(names):
        raise ValueError(f"{' and '.join(names)} are needed: {len(names)} streams, got {len(maps)}")
    for name, x in zip(names, maps, strict=True):
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-1] != dim or not x.is_floating_point():
            raise ValueError(f"{name} must be a map (B, H, W, {dim}) of floating point, got {describe(x)}")
        if not (x.shape[1] and x.shape[2]):
            raise ValueError(f"{name} must have a pixel at least, got {tuple(x.shape)}")
        if x.shape[:3] != maps[0].shape[:3]:
            raise ValueError(
                f"{names[0]} and {name} must have one batch and one grid (B, H, W), got {tuple(maps[0].shape[:3])} and "
                f"{tuple(x.shape[:3])}; bring both streams to one size first"
            )


class Pyramid(nn.Module):
    """Three depthwise convolutions with strides as large as their kernels, SiLU after each: few numbers per channel.

    Args:
        dim: channels.
        size: side of the map that comes out as one number.
        first: sides of the first two; that of the third is what is left of ``size``.
    """

    def __init__(self, dim: int, size: int, first: Sequence[int] = (5, 4)):
        super().__init__()
        first = check_ints("first", first, least=1)
        if len(first) != 2 or first[0] * first[1] > size:
            raise ValueError(f"first must be two sides whose product is no more than size={size}, got {first}")
        sides = (*first, size // (first[0] * first[1]))
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, side, side, groups=dim) for side in sides)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H // size, W // size, dim)."""
        x = x.permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.silu(conv(x))
        return x.permute(0, 2, 3, 1)


@register("deyolo", kind="fusion")
class DualEnhancement(Fusion):
    """Two maps (B, H, W, dim) on one grid -> the same, each gated by the other one and by both.

    Args:
        dim: channels of both.
        size: side of the map for which the pyramid gives one number per channel. Maps with a smaller side get the mean
            in its place.
        reduction: the channel gates' middle layer has ``dim // reduction`` numbers.
        pooling: what happens to maps that are not ``size`` a side. ``"after"``: the pyramid's numbers are averaged, so
            that larger maps work, and smaller ones get the mean of the map. ``"before"``: maps are pooled to ``size``
            a side first, and the pyramid is always used.
        compat: ``"authors"`` refuses maps of which the pyramid makes more than one number, as the released code does.
        first: sides of the pyramid's first two convolutions.
        sides: of the two convolutions of the place gates, odd.
        eps, momentum: of the norms.

    Shapes: (B, H, W, dim) twice -> twice the same; :meth:`merge` gives the one map of the paper. ``valid`` has a
    (B, H, W) per stream: pixels outside are zeros, and enter neither mean nor statistics.

    Raises:
        ValueError: streams of different grids, or maps that ``compat="authors"`` does not take.

    Reference: Chen et al., 2024, "DEYOLO", arXiv 2412.04931.

    >>> fusion = DualEnhancement(32, size=20).eval()
    >>> visible, infrared = fusion(torch.randn(1, 20, 24, 32), torch.randn(1, 20, 24, 32))
    >>> visible.shape, fusion.merge(visible, infrared).shape
    (torch.Size([1, 20, 24, 32]), torch.Size([1, 20, 24, 32]))
    """

    # Any size, but of both streams at once, which is not what the claim says.
    class_traits = Traits(
        patterns=frozenset({"noncausal-cross"}), grid_ranks=frozenset({2}), work={}, memory={}, resolution_free=False
    )

    def __init__(
        self, dim: int, size: int = 80, reduction: int = 16, pooling: str = "after", compat: str = "",
        first: Sequence[int] = (5, 4), sides: Sequence[int] = (3, 7), eps: float = 1e-5, momentum: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.size = check_int("dim", dim, least=1), check_int("size", size, least=1)
        sides = check_ints("sides", sides, least=1)
        if len(sides) != 2 or not all(side % 2 for side in sides):
            raise ValueError(f"sides must be two odd numbers, got {sides}")
        self.reduction = check_int("reduction", reduction, least=1, most=dim)
        check_choice("pooling", pooling, ("after", "before"))
        check_choice("compat", compat, ("", "authors"))
        if compat and pooling != "after":
            raise ValueError(f"compat='authors' pools nothing before the pyramid; got pooling={pooling!r}")
        check_real("eps", eps, above=0)
        check_real("momentum", momentum, least=0, most=1)
        self.pooling, self.compat = pooling, compat

        def conv(width: int, out: int, side: int) -> ConvNorm:
            return ConvNorm(width, out, side, activation=nn.SiLU, eps=eps, momentum=momentum)

        self.channel = SqueezeExcite(dim, dim // reduction, bias=False)
        self.joint = conv(2 * dim, dim, 3)
        self.pyramid = Pyramid(dim, size, first)
        self.near = nn.ModuleList(conv(dim, 1, sides[0]) for _ in range(2))
        self.far = nn.ModuleList(conv(dim, 1, sides[1]) for _ in range(2))
        self.place = nn.ModuleList(conv(2, 1, 5) for _ in range(2))
        self.shared = nn.ModuleList(conv(dim, 1, 3) for _ in range(2))

    @property
    def traits(self) -> Traits:
        """As the class claims; in training the norms mix samples."""
        return self.class_traits.but(batch_independent=not self.training)

    def channel_gates(
        self, visible: Tensor, infrared: Tensor, valid: Sequence[Tensor | None] = (None, None)
    ) -> tuple[Tensor, Tensor]:
        """What the channels of each stream are multiplied by, twice (B, 1, 1, dim): V's comes of ``w_I``."""
        weights = [self.channel.weights(x, exists) for x, exists in zip((visible, infrared), valid, strict=True)]
        g = self._summary(self.joint(torch.cat([visible, infrared], -1), either(valid)), either(valid))
        return (weights[1] * g).sigmoid(), (weights[0] * g).sigmoid()

    def place_gates(
        self, visible: Tensor, infrared: Tensor, valid: Sequence[Tensor | None] = (None, None)
    ) -> tuple[Tensor, Tensor]:
        """What the places of each stream are multiplied by, twice (B, H, W, 1): V's comes of ``s_I``."""
        own, parts = [], []
        for i, x in enumerate((visible, infrared)):
            both = torch.cat([self.near[i](x, valid[i]), self.far[i](x, valid[i])], -1)
            own.append(self.place[i](both, valid[i]))
            parts.append(zero_invalid(self.shared[i](x, valid[i]), valid[i]))
            own[i] = zero_invalid(own[i], valid[i])
        together = (parts[0] + parts[1]).sigmoid()
        return (together + own[1]).sigmoid(), (together + own[0]).sigmoid()

    def forward(self, *streams: Tensor, valid: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
        """V'' and I''.

        Args:
            streams: V and I.
            valid: (B, H, W) boolean of each, which pixels exist.
        """
        check_maps(("visible", "infrared"), streams, self.dim)
        exists: Sequence[Tensor | None] = (None, None) if valid is None else tuple(valid)
        if len(exists) != 2:
            raise ValueError(f"valid must have one for each of 2 streams, got {len(exists)}")
        for x, e in zip(streams, exists, strict=True):
            check_valid("valid", e, x.shape[:3])
        held = [zero_invalid(x, e) for x, e in zip(streams, exists, strict=True)]
        held = [x * g for x, g in zip(held, self.channel_gates(held[0], held[1], exists), strict=True)]
        return tuple(x * g for x, g in zip(held, self.place_gates(held[0], held[1], exists), strict=True))

    @staticmethod
    def merge(visible: Tensor, infrared: Tensor) -> Tensor:
        """``sigmoid(V'' + I'')``, what the paper's necks get."""
        return (visible + infrared).sigmoid()

    def _summary(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, W, dim) -> (B, 1, 1, dim)."""
        height, width = x.shape[1:3]
        x = zero_invalid(x, valid)
        if self.pooling == "before":
            if (height, width) != (self.size, self.size):
                x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.size).permute(0, 2, 3, 1)
            return self.pyramid(x)
        if min(height, width) < self.size:
            return masked_mean(x, valid)[:, None, None]
        cells = self.pyramid(x)
        if self.compat and cells.shape[1:3] != (1, 1):
            raise ValueError(
                f"compat='authors' takes maps of fewer than {2 * self.size} pixels a side where size={self.size}, got "
                f"{(height, width)}"
            )
        return cells.mean((1, 2), keepdim=True)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``DEA``; of their ``DECA`` and ``DEPA``, under ``deca.`` and ``depa.``."""
        theirs = Released(state_dict, "the authors' DEA")
        return theirs.close(theirs.renamed(rules()))


def either(valid: Sequence[Tensor | None]) -> Tensor | None:
    """Where there is a pixel in one of two maps at least."""
    return None if valid[0] is None or valid[1] is None else valid[0] | valid[1]


def rules(theirs: str = "", ours: str = "") -> dict[str, Rule]:
    """From names of the authors' ``DEA`` to ours, each with what stands before."""
    out: dict[str, Rule] = {
        rf"{theirs}deca\.fc\.0\.weight": rf"{ours}channel.fc1.weight",
        rf"{theirs}deca\.fc\.2\.weight": rf"{ours}channel.fc2.weight",
    }
    for i in range(3):
        out[rf"{theirs}deca\.conv_c{i + 1}\.0\.(weight|bias)"] = rf"{ours}pyramid.convs.{i}.\1"
    names = {r"deca\.compress": "joint"}
    for i, letter in enumerate("vi"):
        names |= {
            rf"depa\.cv_{letter}1": f"near.{i}", rf"depa\.cv_{letter}2": f"far.{i}",
            rf"depa\.conv{i + 1}": f"place.{i}", rf"depa\.compress{i + 1}": f"shared.{i}",
        }  # fmt: skip
    for old, new in names.items():
        out |= conv_rules(theirs + old, ours + new)
    return out


def conv_rules(theirs: str, ours: str) -> dict[str, Rule]:
    """Of one convolution with its norm."""
    return {rf"{theirs}\.conv\.weight": f"{ours}.conv.weight", rf"{theirs}\.bn\.{HELD}": rf"{ours}.norm.\1"}


def checkerboard(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Both halves of a checkerboard, packed along an axis: (B, H, W, C) -> twice the same with half the side there.

    A square of the first half lies where row and column are both even or both odd. :func:`from_checkerboard` is the way
    back.

    Args:
        x: a map of an even side along ``axis``.
        axis: 1 for columns of half the height, 2 for rows of half the width.

    >>> first, second = checkerboard(torch.arange(8.0).view(1, 2, 4, 1), 2)
    >>> first.flatten().tolist(), second.flatten().tolist()
    ([0.0, 2.0, 5.0, 7.0], [1.0, 3.0, 4.0, 6.0])
    """
    check_rank("x", x, 4, "(B, H, W, C)")
    check_choice("axis", axis, (1, 2))
    if x.shape[axis] % 2:
        raise ValueError(f"x must have an even side along axis={axis}, got {tuple(x.shape)}")
    pairs = x.unflatten(axis, (x.shape[axis] // 2, 2))
    even, odd = pairs.unbind(axis + 1)
    crossed = _crossed(even, axis)
    return torch.where(crossed, odd, even), torch.where(crossed, even, odd)


def from_checkerboard(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """The map that :func:`checkerboard` made two of.

    >>> x = torch.randn(2, 4, 6, 3)
    >>> all(from_checkerboard(*checkerboard(x, axis), axis).equal(x) for axis in (1, 2))
    True
    """
    check_choice("axis", axis, (1, 2))
    check_rank("first", first, 4, "(B, H, W, C)")
    if first.shape != second.shape:
        raise ValueError(f"first and second must be of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    crossed = _crossed(first, axis)
    pairs = [torch.where(crossed, second, first), torch.where(crossed, first, second)]
    return torch.stack(pairs, axis + 1).flatten(axis, axis + 1)


def _crossed(x: Tensor, axis: int) -> Tensor:
    """Lines across the axis in which the first square of a pair belongs to the second half."""
    across = 3 - axis
    odd = torch.arange(x.shape[across], device=x.device) % 2 == 1
    return odd.view(-1, 1, 1) if across == 1 else odd.view(-1, 1)


class Focus(nn.Module):
    """A convolution of its own for each half of a checkerboard, packed along an axis: it sees twice as far there.

    Sides that are odd along the axis get a line of zeros, which is taken off again.

    Args:
        dim: channels.
        axis: 1 packs along the height, 2 along the width.
        kernel_size: of both.
        settings: of :class:`attnlib.nn.layers.ConvNorm`.

    >>> Focus(4, 2).eval()(torch.randn(1, 5, 7, 4)).shape
    torch.Size([1, 5, 7, 4])
    """

    def __init__(self, dim: int, axis: int, kernel_size: int = 3, **settings: Any):
        super().__init__()
        check_int("dim", dim, least=1)
        check_choice("axis", axis, (1, 2))
        settings.setdefault("activation", nn.SiLU)
        self.axis = axis
        self.convs = nn.ModuleList(ConvNorm(dim, dim, kernel_size, **settings) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> the same."""
        side = x.shape[self.axis]
        if side % 2:
            x = F.pad(x, (0, 0, 0, 1) if self.axis == 2 else (0, 0, 0, 0, 0, 1))
        halves = [conv(part) for conv, part in zip(self.convs, checkerboard(x, self.axis), strict=True)]
        return from_checkerboard(halves[0], halves[1], self.axis).narrow(self.axis, 0, side)


class BiFocus(nn.Module):
    """``conv_1(depthwise conv_3([x, focus along the width, focus along the height]))`` on (B, H, W, dim).

    Args:
        dim: channels.
        eps, momentum: of the norms.
        out_dim: channels out; ``dim`` by default.

    >>> BiFocus(8).eval()(torch.randn(1, 5, 6, 8)).shape
    torch.Size([1, 5, 6, 8])
    """

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1, out_dim: int | None = None):
        super().__init__()
        self.dim = check_int("dim", dim, least=1)
        settings: dict[str, Any] = dict(activation=nn.SiLU, eps=eps, momentum=momentum)
        self.focus = nn.ModuleList(Focus(dim, axis, **settings) for axis in (2, 1))
        self.depthwise = ConvNorm(3 * dim, 3 * dim, 3, groups=3 * dim, **settings)
        self.out_dim = dim if out_dim is None else check_int("out_dim", out_dim, least=1)
        self.pointwise = ConvNorm(3 * dim, self.out_dim, 1, **settings)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, out_dim)."""
        check_maps(("x",), (x,), self.dim)
        return self.pointwise(self.depthwise(torch.cat([x, *(focus(x) for focus in self.focus)], -1)))

    @classmethod
    def convert_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``BiFocus``."""
        theirs = Released(state_dict, "the authors' BiFocus")
        return theirs.close(theirs.renamed(cls.rules()))

    @staticmethod
    def rules(theirs: str = "", ours: str = "") -> dict[str, Rule]:
        """From names of the authors' ``BiFocus`` to ours."""
        names = {r"depth_wise\.depth_conv": "depthwise", r"depth_wise\.point_conv": "pointwise"}
        for i, letter in enumerate("hv"):
            names |= {rf"focus_{letter}\.conv{j + 1}": f"focus.{i}.convs.{j}" for j in (0, 1)}
        out: dict[str, Rule] = {}
        for old, new in names.items():
            out |= conv_rules(theirs + old, ours + new)
        return out


__all__ = ["BiFocus", "DualEnhancement", "Focus", "Pyramid", "check_maps", "checkerboard", "from_checkerboard"]
