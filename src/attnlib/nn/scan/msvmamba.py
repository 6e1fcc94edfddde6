"""Multi-scale 2-D scan: one route over the map, the other three over a map of half the sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_int
from ..layers import DepthwiseConv, SqueezeExcite, resize_map, strided_valid, zero_invalid
from ..registry import register
from ..released import Released, Rule
from .routed import Route, ScanParameters, Walk, check_routes
from .vmamba import NORMS, ScannedFrame, ScanNorm, frame_rules, inner_width, scan_rules

COMPAT = (None, "authors")


def scanned_tokens(height: int, width: int, routes: int = 3, stride: int = 2) -> int:
    """Tokens that a multi-scale scan of a map reads: ``h w + routes * ceil(h / stride) * ceil(w / stride)``.

    >>> scanned_tokens(56, 56) / (4 * 56 * 56)
    0.4375
    """
    cells = [-(-check_int(name, side, least=0) // stride) for name, side in dict(height=height, width=width).items()]
    return height * width + routes * math.prod(cells)


@register("msvmamba", "ms2d")
class MultiScaleSS2D(ScannedFrame):
    """Multi-scale 2-D selective scan (MS2D): VMamba's four routes with three of them over a smaller map.

    ``[u, z] = W_in x``, ``u_0 = silu(conv(u))`` and ``u_1 = silu(conv_7(u))`` with a stride of 2 and
    ceil(h / 2) x ceil(w / 2) tokens. ``y_0`` is u_0 scanned along its rows. The reversed rows, the columns and the
    reversed columns of u_1 are scanned by one other set of parameters, put back into their places, and added:
    ``y_1``. With a norm behind each scan, ``y = W_out (SE(y_0 + up(y_1)) * silu(z))``, where ``up`` is bilinear and SE
    gates channels by the mean token.

    Shapes: x and y (B, H, W, dim), any H and W. A layer scans L + 3 ceil(h / 2) ceil(w / 2) tokens, 0.4375 of four
    routes over L. Defaults are those of the paper.

    Differs from the authors' code: they scan the three routes as one sequence, and the state at the end of one leaks
    into the next; here every route starts from zero, unless ``compat="authors"``. Tokens outside ``valid`` enter no
    convolution, no scan and no mean, and cells without any are no neighbours in ``up``. Their ``ms_split`` other than
    [1, 3] cannot run, nor can convolutional up-sampling.

    Args:
        dim: width.
        state_dim: numbers of state per channel.
        expand: width inside over ``dim``.
        dt_rank: width of what steps are made of; ``ceil(dim / 16)`` by default.
        kernel_size: of the convolution of u_0, odd.
        conv_bias, bias: of the convolutions; of the maps in and out.
        activation: ``"silu"``, ``"gelu"`` or ``"relu"``.
        gate: z is ``"activated"``, ``"plain"`` or ``"none"``.
        norm: behind the scans, of :class:`attnlib.nn.scan.vmamba.ScanNorm`.
        separate_norms: each of both scales has its own.
        coarse: the second scale is half as large; False scans u itself there, without a convolution.
        coarse_kernel: of the convolution of u_1, odd.
        squeeze: SE, with an eighth of the channels between its maps.
        routes: the three, over the smaller map.
        start: of the scans' parameters, as of :class:`attnlib.nn.scan.routed.ScanParameters`.
        proj_drop: dropout of the output.
        compat: ``"authors"`` for states that leak.

    Reference: Shi et al., 2024, arXiv 2405.14174.

    >>> MultiScaleSS2D(dim=8)(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    reads_length = True  # cells of two tokens, and resizing from them, depend on the sides

    def __init__(
        self,
        dim: int,
        state_dim: int = 1,
        expand: float = 2.0,
        dt_rank: int | None = None,
        kernel_size: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        activation: str = "silu",
        gate: str = "activated",
        norm: str = "layer",
        separate_norms: bool = False,
        coarse: bool = True,
        coarse_kernel: int = 7,
        squeeze: bool = True,
        routes: Sequence[Route] = ("rows-reversed", "columns", "columns-reversed"),
        start: str = "s4d",
        proj_drop: float = 0.0,
        compat: str | None = None,
    ):
        check_choice("compat", compat, COMPAT)
        check_choice("norm", norm, [kind for kind in NORMS if "conv" not in kind])
        for name, flag in dict(separate_norms=separate_norms, coarse=coarse, squeeze=squeeze).items():
            check_flag(name, flag)
        if check_int("coarse_kernel", coarse_kernel, least=1) % 2 == 0:
            raise ValueError(f"coarse_kernel must be odd, got {coarse_kernel}")
        width = inner_width(dim, expand)
        super().__init__(dim, width, check_int("kernel_size", kernel_size, least=1), conv_bias, bias, activation, gate,
                         proj_drop)  # fmt: skip
        if squeeze and width < 8:
            raise ValueError(
                f"squeeze=True needs at least 8 channels inside, expand={expand} of dim={dim} gives {width}"
            )
        self.routes, self.compat = check_routes(routes), compat
        self.coarse = DepthwiseConv(width, coarse_kernel, stride=2, bias=conv_bias) if coarse else None
        rank = -(-dim // 16) if dt_rank is None else check_int("dt_rank", dt_rank, least=1)
        self.fine_scan = ScanParameters(width, 1, state_dim, rank, start=start)
        self.coarse_scan = ScanParameters(width, 1, state_dim, rank, start=start)
        self.norm = ScanNorm(width, norm)
        self.coarse_norm = ScanNorm(width, norm) if separate_norms else None
        self.squeeze = SqueezeExcite(width, width // 8, bias=False) if squeeze else None

    def _scanned(self, u: Tensor, raw: Tensor, valid: Tensor | None) -> Tensor:
        grid = u.shape[1:3]
        fine = self.fine_scan(u.flatten(1, 2).unsqueeze(2), None if valid is None else valid.flatten(1)).squeeze(2)
        y = self.norm(fine.to(u.dtype), None if valid is None else valid.flatten(1)).view(u.shape)
        small, exists = raw, valid
        if self.coarse is not None:
            exists = strided_valid(valid, 2)
            small = zero_invalid(self.act(self.coarse(raw)), exists)
        up = self._routed(small, exists).to(u.dtype)
        if up.shape[1:3] != grid:
            share = None if exists is None else resize_map(exists.unsqueeze(-1).to(u.dtype), grid)
            up = resize_map(up, grid)
            up = up if share is None else up / torch.where(share == 0, 1, share)
        y = zero_invalid(y + up, valid)
        return y if self.squeeze is None else self.squeeze(y, valid)

    def _routed(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The sum over routes of (B, h, w, width), by one set of parameters."""
        grid, count = tuple(x.shape[1:3]), len(self.routes)
        walks = [Walk(way, grid, x.device) for way in self.routes]
        x, valid = x.flatten(1, 2), None if valid is None else valid.flatten(1)
        axis = 1 if self.compat == "authors" else 0  # one sequence of all routes, or routes as samples
        there = torch.cat([walk.go(x) for walk in walks], axis)
        exist = None if valid is None else torch.cat([walk.go(valid) for walk in walks], axis)
        y = self.coarse_scan(there.unsqueeze(2), exist).squeeze(2).to(x.dtype)
        norm = self.norm if self.coarse_norm is None else self.coarse_norm
        if axis == 0 and norm.kind == "softmax":  # over the tokens of all routes, as over one sequence
            y = torch.cat(y.chunk(count), 1)
            y = norm(y, None if exist is None else torch.cat(exist.chunk(count), 1))
            axis = 1
        else:
            y = norm(y, exist)
        parts = [walk.back(one) for walk, one in zip(walks, y.chunk(count, axis), strict=True)]
        out = torch.stack(parts).sum(0)
        return zero_invalid(out, valid).unflatten(1, grid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """From the authors' ``SS2D`` with ``sscore_type="multiscale_4scan_12"``."""
        theirs = Released(state_dict, "the authors' multi-scale SS2D")
        two = any(name.startswith("out_norm1.") for name in theirs)
        rules: dict[str, Rule] = {
            r"conv2d_b1\.(weight|bias)": r"coarse.\1",
            r"se\.fc\.0\.weight": "squeeze.fc1.weight",
            r"se\.fc\.2\.weight": "squeeze.fc2.weight",
        }
        if two:  # the first is that of the three routes, and has two names in theirs
            theirs.leave(r"out_norm0\.(weight|bias)", because="the same module as out_norm")
            rules |= ScanNorm.rules("out_norm", "coarse_norm") | ScanNorm.rules("out_norm1", "norm")
        else:
            rules |= ScanNorm.rules("out_norm", "norm")
        return theirs.close(theirs.renamed(frame_rules() | rules | scan_rules(theirs, ("coarse_scan", "fine_scan"))))
