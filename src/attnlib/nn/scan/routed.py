"""Selective scans along routes through a map: parameters of several scans, routes, and how their answers are joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real, describe
from ...grids import check_route, inverse_permutation, route
from ...ops.scan import selective_scan
from ...types import stats_dtype
from ..layers import computes_in, masked_mean

#: A name of :func:`attnlib.grids.route`, or a function from the sides of a map to the order of its tokens.
Route = str | Callable[[tuple[int, ...]], Tensor]

#: How the answers of several routes become one.
FUSIONS = ("sum", "mean", "gate", "variation")
#: How parameters of scans can start.
STARTS = ("s4d", "normal", "small-normal", "small-uniform")


class ScanParameters(nn.Module):
    """Parameters of selective scans (S6), one set or several side by side, each of ``dim`` channels.

    ``[r, B, C] = W_x x``, ``delta = softplus(W_delta r + b)``, ``A = -exp(A_log)``, and then
    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t``, ``y_t = C_t . h_t + D x_t``.

    Args:
        dim: channels of a set.
        sets: how many.
        state_dim: numbers of state per channel.
        rank: width of r; ``ceil(dim / 16)`` by default.
        step_range: between which steps ``softplus(b)`` starts, evenly in their logarithm.
        step_floor: the least of them.
        step_init: ``"random"`` or ``"constant"`` ``W_delta`` of ``rank ** -0.5 * step_scale``.
        step_scale: as above.
        start: ``"s4d"``: as above, with A = -1, -2, .. and D = 1; ``"normal"``: ``A_log``, ``W_delta`` and b from
            a normal distribution; ``"small-normal"``: the latter two a tenth of that; ``"small-uniform"``: A = -1,
            ``W_delta`` and b between 0 and 0.1.
    """

    def __init__(
        self,
        dim: int,
        sets: int = 1,
        state_dim: int = 16,
        rank: int | None = None,
        step_range: tuple[float, float] = (1e-3, 0.1),
        step_floor: float = 1e-4,
        step_init: str = "random",
        step_scale: float = 1.0,
        start: str = "s4d",
    ):
        super().__init__()
        check_choice("step_init", step_init, ("random", "constant"))
        check_choice("start", start, STARTS)
        self.dim, self.sets = check_int("dim", dim, least=1), check_int("sets", sets, least=1)
        self.state_dim = check_int("state_dim", state_dim, least=1)
        self.rank = math.ceil(dim / 16) if rank is None else check_int("rank", rank, least=1)
        bound = self.rank**-0.5 * check_real("step_scale", step_scale, above=0)
        low, high = (math.log(check_real("step_range", s, above=0)) for s in step_range)
        self.x_proj = nn.Parameter(torch.empty(sets, self.rank + 2 * state_dim, dim).uniform_(-(dim**-0.5), dim**-0.5))
        weight = torch.empty(sets, dim, self.rank)
        self.step_weight = nn.Parameter(
            weight.uniform_(-bound, bound) if step_init == "random" else weight.fill_(bound)
        )  # fmt: skip
        steps = torch.empty(sets, dim).uniform_(low, high).exp().clamp(min=check_real("step_floor", step_floor))
        self.step_bias = nn.Parameter(steps + (-torch.expm1(-steps)).log())  # softplus, inverted
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(sets, dim, 1))
        self.D = nn.Parameter(torch.ones(sets, dim))
        if start.endswith("normal"):
            nn.init.normal_(self.A_log)
            for p in (self.step_weight, self.step_bias):
                nn.init.normal_(p, std=1.0 if start == "normal" else 0.1)
        elif start == "small-uniform":
            nn.init.zeros_(self.A_log)
            for p in (self.step_weight, self.step_bias):
                nn.init.uniform_(p, 0.0, 0.1)

    def forward(self, x: Tensor, valid: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> Tensor:
        """Scan every set.

        Args:
            x: (B, N, sets, dim).
            valid: (B, N), or (B, N, sets) where sets walk differently: which tokens exist. Others add nothing, let no
                time pass and give zeros.
            cu_seqlens: where independent sequences begin and end, as of the operator.

        Returns:
            (B, N, sets, dim) in the dtype of the statistics.
        """
        high = stats_dtype(x.dtype)
        if valid is not None and valid.dim() == 3 and self.sets == 1:
            valid = valid[..., 0]
        gone = None if valid is None or valid.dim() == 2 else ~valid.unsqueeze(-1)
        if gone is not None:
            x = x.masked_fill(gone, 0.0)
        r, b, c = torch.einsum("bnkd,kcd->bnkc", x, self.x_proj).split([self.rank, *2 * (self.state_dim,)], -1)
        step = torch.einsum("bnkr,kdr->bnkd", r, self.step_weight)
        bias: Tensor | None = self.step_bias.flatten()
        if gone is not None:  # the operator knows one ``valid`` for all channels: a step of zero lets no time pass
            step, bias = F.softplus(step.to(high) + self.step_bias).masked_fill(gone, 0.0), None
        y = selective_scan(
            x.to(high).flatten(2), step.flatten(2), -self.A_log.to(high).exp().flatten(0, 1), b, c, self.D.flatten(),
            None, bias, gone is None, cu_seqlens=cu_seqlens, valid=valid if gone is None else None,
        )  # fmt: skip
        return y.unflatten(2, (self.sets, self.dim))

    def extra_repr(self) -> str:
        return f"{self.dim}, sets={self.sets}, state_dim={self.state_dim}, rank={self.rank}"


class Walk:
    """A route through a map: there with :meth:`go`, back with :meth:`back`, on (B, N, ..) in row-major order.

    Rows and columns are views, backwards is a flip; other routes look tokens up.

    Args:
        way: the route.
        grid: sides of the map.
        device: of the tokens.

    Raises:
        ValueError: a function's order that is no permutation of the tokens.

    >>> walk = Walk("columns-reversed", (2, 3))
    >>> there = walk.go(torch.arange(6).view(1, 6))
    >>> there.tolist(), walk.back(there).tolist()
    ([[5, 2, 4, 1, 3, 0]], [[0, 1, 2, 3, 4, 5]])
    """

    def __init__(self, way: Route, grid: Sequence[int], device: torch.device | None = None):
        self.grid = tuple(grid)
        self.reversed = self.columns = False
        self.order: Tensor | None = None
        if isinstance(way, str):
            kind, turns = check_route("route", way)
            self.reversed, rest = "reversed" in turns, turns - {"reversed"}
            self.columns = kind == "rows" and rest == {"transposed"} and len(self.grid) == 2
            if rest - {"transposed"} or kind != "rows" or (rest and not self.columns):
                self.order = route("-".join([kind, *sorted(rest)]), self.grid).to(device)
        else:
            order = way(self.grid)
            if not isinstance(order, Tensor) or order.shape != (math.prod(self.grid),):
                raise ValueError(
                    f"a route must give the order (N,)=({math.prod(self.grid)},) of the tokens of a map {self.grid}, "
                    f"got {describe(order)}"
                )
            self.order = order.to(device)
        self.inverse = None if self.order is None else inverse_permutation(self.order)

    def go(self, x: Tensor) -> Tensor:
        """Tokens in the order of their steps."""
        if self.columns:
            x = x.unflatten(1, self.grid).transpose(1, 2).flatten(1, 2)
        elif self.order is not None:
            x = x.index_select(1, self.order)
        return x.flip(1) if self.reversed else x

    def back(self, x: Tensor) -> Tensor:
        """Tokens in their places again."""
        x = x.flip(1) if self.reversed else x
        if self.columns:
            return x.unflatten(1, self.grid[::-1]).transpose(1, 2).flatten(1, 2)
        return x if self.inverse is None else x.index_select(1, self.inverse)


def check_routes(routes: Sequence[Route], name: str = "routes") -> tuple[Route, ...]:
    """The routes of a scan; ``ValueError`` for none, and for a name that is none."""
    if isinstance(routes, str) or callable(routes) or not isinstance(routes, Sequence) or not len(routes):
        raise ValueError(f"{name} must be one route or more, such as ('rows', 'rows-reversed'), got {describe(routes)}")
    for one in routes:
        if not callable(one):
            check_route(name, one)
    return tuple(routes)


def variation_gate(y: Tensor, threshold: float = 0.0, eps: float = 1e-5) -> Tensor:
    """Sum over routes, gated by how much these differ: (B, N, K, D) -> (B, N, D).

    ``sum_k y_k * relu(std_k(y) / (mean_k(y - min_k y) + eps) - threshold)``, with the unbiased deviation: where all
    routes agree it is zero.

    >>> round(variation_gate(torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)).item(), 3)  # 4 sqrt(2) / 1
    5.657
    """
    if not y.numel():
        return y.sum(2)
    least = y.min(2, keepdim=True).values
    ratio = y.std(2) / ((y - least).mean(2) + eps)
    return y.sum(2) * F.relu(ratio - threshold)


class RoutedScan(nn.Module):
    """Scans of the tokens of a map along several routes, joined into one answer per token.

    Args:
        dim: channels.
        routes: names, or functions from the sides of a map to the order of its tokens.
        state_dim, rank, and ``start`` settings: of :class:`ScanParameters`.
        shared: one set of parameters for all routes instead of one each.
        fusion: ``"sum"``; ``"mean"``; ``"gate"``: a weight per route, the softmax of a linear map of the mean tokens of
            all; ``"variation"``: :func:`variation_gate`.
        threshold: of ``"variation"``.

    >>> RoutedScan(8, ("snake", "spiral-reversed"), fusion="gate")(torch.randn(2, 3, 5, 8)).shape
    torch.Size([2, 3, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        routes: Sequence[Route],
        state_dim: int = 16,
        rank: int | None = None,
        shared: bool = False,
        fusion: str = "sum",
        threshold: float = 0.0,
        **start: object,
    ):
        super().__init__()
        self.routes = check_routes(routes)
        check_flag("shared", shared)
        check_choice("fusion", fusion, FUSIONS)
        count = len(self.routes)
        if fusion == "variation" and count < 2:
            raise ValueError("fusion='variation' needs at least two routes, got one")
        self.fusion, self.threshold = fusion, check_real("threshold", threshold)
        self.scan = ScanParameters(dim, 1 if shared else count, state_dim, rank, **start)  # type: ignore[arg-type]
        self.gate = nn.Linear(count * dim, count, bias=False) if fusion == "gate" else None

    def along(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, dim) -> (B, N, K, dim): what every route gives, tokens in their places."""
        grid = tuple(x.shape[1:-1])
        walks = [Walk(way, grid, x.device) for way in self.routes]
        x, valid = x.flatten(1, -2), None if valid is None else valid.flatten(1)
        there = [walk.go(x) for walk in walks]
        exist = None if valid is None else [walk.go(valid) for walk in walks]
        if self.scan.sets == len(walks):
            y = self.scan(torch.stack(there, 2), None if exist is None else torch.stack(exist, 2)).unbind(2)
        else:  # one set of parameters: routes are samples
            y = self.scan(torch.cat(there).unsqueeze(2), None if exist is None else torch.cat(exist))
            y = y.squeeze(2).chunk(len(walks))
        return torch.stack([walk.back(one) for walk, one in zip(walks, y, strict=True)], 2)

    def fused(self, y: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, N, K, dim) -> (B, N, dim)."""
        if self.fusion == "sum":
            return y.sum(2)
        if self.fusion == "mean":
            return y.mean(2)
        if self.fusion == "variation":
            return variation_gate(y, self.threshold)
        assert self.gate is not None
        means = masked_mean(y.flatten(2), None if valid is None else valid.flatten(1))
        weight = self.gate(means.to(computes_in(self.gate))).softmax(-1)
        return (y * weight[:, None, :, None]).sum(2)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, dim) -> the same, in the dtype of the statistics; ``valid``: which tokens exist."""
        y = self.fused(self.along(x, valid), valid)
        return y.unflatten(1, x.shape[1:-1])
