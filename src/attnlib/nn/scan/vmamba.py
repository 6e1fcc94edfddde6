"""SS2D: a map scanned along its rows and columns, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...types import Traits
from ..base import Mechanism
from ..layers import DepthwiseConv, through, zero_invalid
from ..registry import register
from ..released import Released, Rule
from .routed import Route, RoutedScan

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}
GATES = ("activated", "plain", "none")
NORMS = ("layer", "softmax", "sigmoid", "conv", "layer-conv", "none")

#: VMamba's cross scan.
CROSS = ("rows", "columns", "rows-reversed", "columns-reversed")


class ScanNorm(nn.Module):
    """What stands behind scans.

    Args:
        dim: width.
        kind: ``"layer"``, LayerNorm; ``"conv"``, a depthwise 3 x 3 convolution; ``"layer-conv"``, one behind the other;
            ``"softmax"`` over the tokens; ``"sigmoid"``; ``"none"``.
    """

    def __init__(self, dim: int, kind: str):
        super().__init__()
        check_choice("norm", kind, NORMS)
        self.kind = kind
        self.layer = nn.LayerNorm(dim) if kind.startswith("layer") else None
        self.conv = DepthwiseConv(dim, 3, bias=False) if kind.endswith("conv") else None

    def forward(self, y: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, dim) -> the same; ``valid``: which tokens exist."""
        if self.kind == "sigmoid":
            return y.sigmoid()
        if self.kind == "softmax":
            flat = y.flatten(1, -2)
            if valid is None:
                return flat.softmax(1).view(y.shape)
            gone = ~valid.flatten(1).unsqueeze(-1)
            return flat.masked_fill(gone, -1e30).softmax(1).masked_fill(gone, 0.0).view(y.shape)
        y = y if self.layer is None else self.layer(y)
        return y if self.conv is None else self.conv(zero_invalid(y, valid))

    @staticmethod
    def rules(theirs: str, ours: str) -> dict[str, Rule]:
        """From the released names of one that is called ``theirs``."""

        def numbered(match: Any, value: Tensor) -> dict[str, Tensor]:
            return {f"{ours}.{'conv' if value.dim() == 4 else 'layer'}.{match[1]}": value}

        return {
            rf"{theirs}\.(weight|bias)": rf"{ours}.layer.\1",
            rf"{theirs}\.[0-9]\.(weight|bias)": numbered,
        }


class ScannedFrame(Mechanism):
    """What mechanisms around scans of a map share: maps in and out, the convolution before, the gate behind.

    ``[u, z] = W_in x``; ``u' = act(conv(u))``; ``y = W_out (scanned(u') * act(z))``. A subclass says what is scanned.
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1}
    )

    def __init__(
        self, dim: int, width: int, kernel_size: int, conv_bias: bool, bias: bool, activation: str, gate: str,
        proj_drop: float, out_activation: bool = False,
    ):  # fmt: skip
        super().__init__(dim)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("gate", gate, GATES)
        check_flag("out_activation", out_activation)
        if check_int("kernel_size", kernel_size, least=0) and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, or 0 for no convolution, got {kernel_size}")
        self.width, self.gate_kind, self.out_activation = width, gate, out_activation
        self.in_proj = nn.Linear(dim, width * (1 if gate == "none" else 2), bias=bias)
        self.act = ACTIVATIONS[activation]()
        self.conv = DepthwiseConv(width, kernel_size, bias=conv_bias) if kernel_size else None
        self.proj = nn.Linear(width, dim, bias=bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def _scanned(self, u: Tensor, raw: Tensor, valid: Tensor | None) -> Tensor:
        """Of the activated convolution and of what it read, (B, H, W, width) -> the same."""
        raise NotImplementedError

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        raw, z = self.in_proj(x), None
        if self.gate_kind != "none":
            raw, z = raw.chunk(2, -1)
        raw = zero_invalid(raw, valid)  # a bias
        u = self.act(raw if self.conv is None else self.conv(raw))
        y = self._scanned(zero_invalid(u, valid), raw, valid).to(x.dtype)
        y = F.gelu(y) if self.out_activation else y
        if z is not None:
            y = y * (self.act(z) if self.gate_kind == "activated" else z)
        return through(self.proj_drop, self.proj(y))


def inner_width(dim: int, expand: float) -> int:
    """``int(expand * dim)``; ``ValueError`` where that is none."""
    width = int(check_real("expand", expand, above=0) * dim)
    if width < 1:
        raise ValueError(f"expand={expand} of dim={dim} leaves no channels")
    return width


@register("vmamba", "ss2d")
class SS2D(ScannedFrame):
    """2-D selective scan (SS2D): the tokens of a map in several orders, each scanned by parameters of its own.

    ``[u, z] = W_in x``, ``u' = silu(conv(u))``; for every route r, ``y_r`` is u' walked along r, scanned by S6 and put
    back into its places (see :class:`attnlib.nn.scan.routed.RoutedScan`); ``y = W_out (norm(sum_r y_r) * silu(z))``.
    The routes are rows, columns, and both from the end.

    Shapes: x and y (B, H, W, dim), any H and W; the width inside is ``expand * dim``. Work and memory are linear in the
    tokens. Defaults are those of the paper. State and steps are float32.

    Differs from the authors' code: tokens outside ``valid`` are zero before the convolution, add nothing to a state and
    let no time pass, so that padding changes nothing.

    Args:
        dim: width.
        state_dim: numbers of state per channel.
        expand: width inside over ``dim``.
        rank_ratio: width of the scans over ``dim`` where that is less than ``expand``: maps without bias lead there and
            back. 0 for none.
        dt_rank: width of what steps are made of; ``ceil(dim / 16)`` by default.
        kernel_size: of the convolution; 0 for none.
        conv_bias, bias: of the convolution; of the maps in and out.
        activation: ``"silu"``, ``"gelu"`` or ``"relu"``.
        gate: z is ``"activated"``, ``"plain"`` or ``"none"``.
        norm: behind the scans, of :class:`ScanNorm`.
        out_activation: a GELU behind that.
        routes: names of :func:`attnlib.grids.route`, or functions from the sides of a map to an order.
        fusion: of the routes, as of :class:`attnlib.nn.scan.routed.RoutedScan`.
        shared: one set of parameters for all routes.
        start: ``"s4d"`` or ``"normal"``, of the scans' parameters.
        proj_drop: dropout of the output.

    Reference: Liu et al., 2024, arXiv 2401.10166.

    >>> import torch
    >>> SS2D(dim=8, state_dim=2)(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    zero_is_off = ("kernel_size", "rank_ratio")

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        expand: float = 2.0,
        rank_ratio: float = 0.0,
        dt_rank: int | None = None,
        kernel_size: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        activation: str = "silu",
        gate: str = "activated",
        norm: str = "layer",
        out_activation: bool = False,
        routes: Sequence[Route] = CROSS,
        fusion: str = "sum",
        shared: bool = False,
        start: str = "s4d",
        proj_drop: float = 0.0,
    ):
        width = inner_width(dim, expand)
        super().__init__(dim, width, kernel_size, conv_bias, bias, activation, gate, proj_drop, out_activation)
        inner = inner_width(dim, min(rank_ratio, expand)) if rank_ratio else width
        self.to_rank = nn.Linear(width, inner, bias=False) if inner < width else None
        self.from_rank = nn.Linear(inner, width, bias=False) if inner < width else None
        rank = -(-dim // 16) if dt_rank is None else check_int("dt_rank", dt_rank, least=1)
        self.scan = RoutedScan(inner, routes, state_dim, rank, shared, fusion, start=start)
        self.norm = ScanNorm(inner, norm)

    def _scanned(self, u: Tensor, raw: Tensor, valid: Tensor | None) -> Tensor:
        inner = u if self.to_rank is None else self.to_rank(u)
        y = self.norm(self.scan(inner, valid).to(u.dtype), valid)
        return y if self.from_rank is None else self.from_rank(y)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """From the authors' ``SS2D``."""
        theirs = Released(state_dict, "the authors' SS2D")
        more: dict[str, Rule] = {
            r"in_rank\.weight": lambda match, value: {"to_rank.weight": value.flatten(1)},
            r"out_rank\.weight": "from_rank.weight",
        }
        return theirs.close(
            theirs.renamed(frame_rules() | more | ScanNorm.rules("out_norm", "norm") | scan_rules(theirs, "scan.scan"))
        )


def frame_rules() -> dict[str, Rule]:
    """What every released SS2D has around its scans."""
    return {
        r"in_proj\.weight": lambda match, value: {"in_proj.weight": value.flatten(1)},
        r"out_proj\.weight": lambda match, value: {"proj.weight": value.flatten(1)},
        r"in_proj\.bias": "in_proj.bias",
        r"out_proj\.bias": "proj.bias",
        r"conv2d\.(weight|bias)": r"conv.\1",
    }


def scan_rules(theirs: Released, to: str | Sequence[str]) -> dict[str, Rule]:
    """The parameters of its scans: all sets into ``to``, or every set into one of ``to``."""
    bias = theirs.peek("dt_projs_bias") if "dt_projs_bias" in theirs else None
    sets = max(1, bias.shape[0]) if bias is not None and bias.dim() else 1

    def rule(ours: str, merged: bool) -> Rule:
        def take(match: Any, value: Tensor) -> dict[str, Tensor]:
            value = value.unflatten(0, (sets, -1)) if merged else value
            if isinstance(to, str):
                return {f"{to}.{ours}": value}
            if not value.dim() or len(value) != len(to):
                raise ValueError(f"{match.string} of state_dict must hold {len(to)} sets of parameters")
            return {f"{one}.{ours}": part for one, part in zip(to, value.split(1), strict=True)}

        return take

    return {
        r"x_proj_weight": rule("x_proj", False),
        r"dt_projs_weight": rule("step_weight", False),
        r"dt_projs_bias": rule("step_bias", False),
        r"A_logs": rule("A_log", True),
        r"Ds": rule("D", True),
    }
