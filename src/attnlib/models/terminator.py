"""Terminator: an image network without attention and without residuals, of blocks of ten branches side by side.

Zhang, 2024, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv 2401.17948. With the
global kernel ``K``, ``S = x * K``, the channel scores of ``y`` with a kernel ``c`` over channels, ``y_c^2 c``
(``y_c`` the mean over places), and ``N`` the norm over the places of each channel:

- ``RGU(x) = W_y GELU(N(W_k x * W_q W_v x))``; ``fast = N(RGU(S) + RGU'(x))``, ``mixed = N(W x)``,
  ``told = N(x sigmoid(x_c^2 c))``;
- global branches ``out = S fast``, ``S mixed``, ``S told``, and of the first ``sigmoid(out) out``;
- ``x sigmoid((out_c^2 c') (out_s^2 s))``, ``out_s`` the mean over channels and ``s`` a kernel over places;
- four convolutions with kernels that images make: of 3 from ``x`` on ``told``, of 9 from ``told`` on ``x``, of 5 from
  ``mixed`` on ``x``, of 7 from ``x`` on ``mixed``.

These nine, ``fast``, and the outputs of up to two earlier blocks, repeated to the width, go through one linear map,
a norm in groups, a GELU and dropout.

A reading: the release has the block in its history, but neither its norm in groups (G-IBS) nor the network. The norm is
one of each sample over the places and channels of a group here, and what follows the last block a mean over places and
a linear map. Context and norms are those of each sample; kernels are made for any size, without tables of biases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_float, check_int, check_ints, check_rank
from ..nn.layers import depthwise_by_sample
from ..nn.modulation.hyperzzw_terminator import HyperKernel, place_norm, place_product
from ..ops.reduced import adaptive_pool_tokens

#: Sides of the four local kernels.
SIDES = (3, 9, 5, 7)


class RecursiveGate(nn.Module):
    """``W_y GELU(N(W_k x * W_q W_v x))`` on (B, H, W, C).

    >>> RecursiveGate(4)(torch.randn(2, 3, 3, 4)).shape
    torch.Size([2, 3, 3, 4])
    """

    def __init__(self, dim: int):
        super().__init__()
        self.k, self.v, self.q, self.y = (nn.Linear(dim, dim) for _ in range(4))
        for linear in (self.k, self.v, self.q, self.y):
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.y(F.gelu(place_norm(self.k(x) * self.q(self.v(x)), None)))


def channel_scores(x: Tensor, slow: HyperKernel) -> Tensor:
    """(B, 1, 1, C): the mean over places, multiplied by a kernel over channels and by itself."""
    mean = x.mean((1, 2), keepdim=True)
    return mean * slow((x.shape[-1],)).squeeze(-1).to(x.dtype) * mean


class LocalBranch(nn.Module):
    """A convolution of ``x`` with a kernel that ``told`` makes, a linear map, a norm, a GELU and a bias."""

    def __init__(self, dim: int, size: int, hidden: int, omega: float):
        super().__init__()
        self.size = size
        self.slow = HyperKernel(dim, 2, hidden, 2, omega, context_dim=dim)
        self.mixer = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, told: Tensor, x: Tensor) -> Tensor:
        near = depthwise_by_sample(x, self.slow((self.size,) * 2, adaptive_pool_tokens(told, self.size)[0]))
        return F.gelu(place_norm(self.mixer(near), None)) + self.bias


class TerminatorBlock(nn.Module):
    """Ten branches side by side, and those of earlier blocks, squeezed to ``factor`` times the width.

    Args:
        dim: width of ``x``.
        factor: of the output's width.
        earlier: how many outputs of earlier blocks join, 0, 1 or 2.
        num_layers: of the global kernel's slow network.
        hidden: its width.
        small_hidden: of the slow networks of local and channel kernels.
        omega: how fast they oscillate.
        groups: of the norm.
        dropout: behind the block.

    >>> TerminatorBlock(6, factor=2)(torch.randn(2, 5, 5, 6)).shape
    torch.Size([2, 5, 5, 12])
    """

    def __init__(
        self,
        dim: int,
        factor: int = 2,
        earlier: int = 0,
        num_layers: int = 2,
        hidden: int = 64,
        small_hidden: int = 32,
        omega: float = 10.0,
        groups: int = 12,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.dim, width = check_int("dim", dim, least=1), dim * check_int("factor", factor, least=1)
        self.earlier = check_int("earlier", earlier, least=0)
        if width % check_int("groups", groups, least=1):
            raise ValueError(f"groups must divide dim * factor = {width}, got {groups}")
        self.groups = groups
        self.slow = HyperKernel(dim, 2, hidden, num_layers, omega)
        self.gate_slow, self.gate_fast, self.mixer = RecursiveGate(dim), RecursiveGate(dim), nn.Linear(dim, dim)
        self.slow_told, self.slow_channels = (HyperKernel(1, 1, small_hidden, 2, omega) for _ in range(2))
        self.slow_places = HyperKernel(1, 2, small_hidden, 2, omega)
        self.local = nn.ModuleList(LocalBranch(dim, size, small_hidden, omega) for size in SIDES)
        self.squeeze = nn.Linear(dim * (len(SIDES) + 6 + earlier), width)
        self.bias, self.dropout = nn.Parameter(torch.zeros(1)), nn.Dropout(dropout)
        for linear in (self.mixer, self.squeeze):
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def global_kernel(self, height: int, width: int) -> Tensor:
        """(H, W, C): what :func:`attnlib.nn.modulation.hyperzzw_terminator.slow_loss` compares."""
        return self.slow((height, width))

    def branches(self, x: Tensor) -> list[Tensor]:
        """Ten maps (B, H, W, C)."""
        s = x * self.global_kernel(*x.shape[1:3]).to(x.dtype)
        fast = place_norm(self.gate_slow(s) + self.gate_fast(x), None)
        mixed = place_norm(self.mixer(x), None)
        told = place_norm(x * torch.sigmoid(channel_scores(x, self.slow_told)), None)
        out, out_mixed, out_told = (place_product(s, f) for f in (fast, mixed, told))
        mean = out.mean(-1, keepdim=True)
        places = mean * self.slow_places(tuple(x.shape[1:3])).to(x.dtype) * mean
        seen = x * torch.sigmoid(places * channel_scores(out, self.slow_channels))
        pairs = ((x, told), (told, x), (mixed, x), (x, mixed))
        near = [branch(a, b) for branch, (a, b) in zip(self.local, pairs, strict=True)]
        return [out, out_mixed, out_told, torch.sigmoid(out) * out, fast, seen, *near]

    def forward(self, x: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """(B, H, W, C), and earlier outputs whose widths divide C -> (B, H, W, C factor)."""
        check_rank("x", x, 4, "(B, H, W, C)")
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have {self.dim} channels, got {tuple(x.shape)}")
        if len(earlier) != self.earlier:
            raise ValueError(f"earlier must be {self.earlier} maps, got {len(earlier)}")
        for other in earlier:
            if other.shape[:3] != x.shape[:3] or self.dim % other.shape[-1]:
                raise ValueError(f"earlier maps of {tuple(other.shape)} do not repeat to {tuple(x.shape)}")
        maps = self.branches(x) + [other.repeat(1, 1, 1, self.dim // other.shape[-1]) for other in earlier]
        y = self.squeeze(torch.cat(maps, -1))
        y = F.group_norm(y.movedim(-1, 1), self.groups).movedim(1, -1)
        return self.dropout(F.gelu(y) + self.bias)


class Terminator(nn.Module):
    """Blocks of ten branches, the mean over places, and a linear map.

    Args:
        num_classes: 0 for the features.
        in_chans: channels of images.
        factors: by which each block widens.
        earlier: how many outputs of earlier blocks join each.
        num_layers: of the slow network of each global kernel.
        hidden, small_hidden, omega, groups, dropout: as of :class:`TerminatorBlock`.

    Shapes: images (B, in_chans, H, W) -> (B, num_classes).

    >>> Terminator(10, factors=(4, 3), earlier=(0, 0), num_layers=(3, 2))(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        factors: Sequence[int] = (4, 3, 2, 2, 2),
        earlier: Sequence[int] = (0, 0, 1, 1, 2),
        num_layers: Sequence[int] = (3, 2, 2, 2, 2),
        hidden: int = 64,
        small_hidden: int = 32,
        omega: float = 10.0,
        groups: int = 12,
        dropout: float = 0.0,
    ):
        super().__init__()
        factors = check_ints("factors", factors, least=1)
        if not len(factors) == len(earlier) == len(num_layers):
            raise ValueError(
                "factors, earlier and num_layers must be equally long, got "
                f"{len(factors)}, {len(earlier)} and {len(num_layers)}"
            )
        for i, count in enumerate(check_ints("earlier", earlier, least=0)):
            if count > max(0, i - 1):
                raise ValueError(f"earlier must be at most {max(0, i - 1)} for block {i}, got {count}")
        self.earlier, dim, blocks = tuple(earlier), check_int("in_chans", in_chans, least=1), []
        for factor, count, depth in zip(factors, earlier, num_layers, strict=True):
            blocks.append(TerminatorBlock(dim, factor, count, depth, hidden, small_hidden, omega, groups, dropout))
            dim *= factor
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(dim, num_classes) if check_int("num_classes", num_classes, least=0) else nn.Identity()

    def kernels(self, height: int, width: int) -> list[Tensor]:
        """The global kernel of each block, for :func:`attnlib.nn.modulation.hyperzzw_terminator.slow_loss`."""
        return [block.global_kernel(height, width) for block in self.blocks]  # type: ignore[operator]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H, W, C)."""
        check_rank("images", images, 4, "(B, C, H, W)")
        check_float("images", images)
        done = [images.movedim(1, -1)]
        for block, count in zip(self.blocks, self.earlier, strict=True):
            done.append(block(done[-1], done[-1 - count : -1][::-1]))
        return done[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean((1, 2)))
