"""Attention flow: rollout in which heads have weights and early columns do not gather everything.

With maps ``S_l`` (H, N, N) of layer ``l``,

    ``F_l = R o ((1 - r) S~_l + r I) F_(l-1)``,  ``S~_l = sum_h w_lh S_lh / sum_h w_lh``

where ``w_lh`` says how much a head counts and ``R`` weakens columns that many tokens see: under a causal mask the first
token is seen by all, so that whatever is multiplied often enough ends there.

VL-SAM (arXiv 2410.05963) adds ``I`` in place of the mean; that differs by a factor ``2^L``, which a map scaled to
[0, 1] does not show. Its heads weigh the mean over queries of their largest weight. The form of ``R`` is our reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_real, check_size, check_type, describe, shaped
from ..hooks.intervention import Probe
from ..hooks.site import Site
from ..ops.points import min_max

HEADS = ("mean", "mean-max")
REGULARISERS = ("none", "linear", "column")

Heads = str | Callable[[Tensor], Tensor]
Regulariser = str | Callable[[int], Tensor]


@shaped(maps="float (B, H, N, M)", exists="bool (B, N)")
def mean_max(maps: Tensor, exists: Tensor | None = None) -> Tensor:
    """(B, H) mean over queries of the largest weight: heads that look at one thing count more.

    Args:
        maps: (B, H, N, M) weights.
        exists: (B, N) queries to average over; by default those that attend to something.

    >>> mean_max(torch.tensor([[[[0.5, 0.5]], [[1.0, 0.0]]]])).tolist()
    [[0.5, 1.0]]
    """
    if not maps.shape[2] * maps.shape[3]:
        return maps.new_zeros(maps.shape[:2])
    most = maps.amax(-1)
    kept = (most > 0) if exists is None else exists[:, None].expand_as(most)
    return (most * kept).sum(-1) / kept.sum(-1).clamp_min(1)


def column_regulariser(n: int, how: str = "linear", device: Any = None) -> Tensor:
    """(N, N) factors of a flow of ``n`` tokens under a causal mask.

    Args:
        n: N.
        how: ``"linear"`` falls along each column from 1 at its first visible row to ``1 / length`` at the last;
            ``"column"`` is ``1 - (length - 1) / N`` in all of a column; ``"none"`` is 1. ``length`` is the number of
            rows that see a column. The linear one leaves the first row of every column as it is, so that beyond some
            ten layers of uniform attention the first column gathers everything again.

    >>> column_regulariser(3, "linear")[2].tolist(), column_regulariser(4, "column")[0].tolist()
    ([0.3333333432674408, 0.5, 1.0], [0.25, 0.5, 0.75, 1.0])
    """
    check_int("n", n, least=0)
    check_choice("how", how, REGULARISERS)
    seen = n - torch.arange(n, device=device, dtype=torch.float32)  # rows that see a column
    if how == "none":
        return torch.ones(n, n, device=device)
    if how == "column":
        return (1 - (seen - 1) / max(n, 1)).expand(n, n)
    row = torch.arange(n, device=device, dtype=torch.float32)[:, None]
    return ((n - row) / seen).clamp(max=1)


def _check(heads: Any, residual: Any, regulariser: Any) -> None:
    if not callable(heads):
        check_choice("heads", heads, HEADS)
    if not callable(regulariser):
        check_choice("regulariser", regulariser, REGULARISERS)
    check_real("residual", residual, least=0, below=1)


def _factors(regulariser: Regulariser, n: int, like: Tensor) -> Tensor | None:
    if regulariser == "none":
        return None
    factors = column_regulariser(n, regulariser, like.device) if isinstance(regulariser, str) else regulariser(n)
    if not isinstance(factors, Tensor) or factors.shape not in ((n, n), (n,), (1, n)):
        raise ValueError(f"regulariser must give ({n}, {n}) or ({n},) for {n} tokens, got {describe(factors)}")
    return factors.to(like)


def _weighted(maps: Tensor, heads: Heads) -> Tensor:
    """(B, N, N) of (B, H, N, N)."""
    if heads == "mean":
        return maps.mean(1)
    weights = mean_max(maps) if isinstance(heads, str) else heads(maps)
    if not isinstance(weights, Tensor) or weights.shape not in (maps.shape[:2], maps.shape[1:2]):
        raise ValueError(f"heads must give weights {tuple(maps.shape[:2])}, got {describe(weights)}")
    weights = weights.to(maps).expand(maps.shape[:2])
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 0, weights / torch.where(total > 0, total, 1), 1 / maps.shape[1])
    return torch.einsum("bh,bhnm->bnm", weights, maps)


def _step(flow: Tensor | None, mean: Tensor, residual: float, factors: Tensor | None) -> Tensor:
    if flow is None:
        out = (1 - residual) * mean + residual * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    else:
        out = (1 - residual) * mean @ flow + residual * flow
    return out if factors is None else out * factors


def attention_flow(
    maps: Iterable[Tensor], heads: Heads = "mean", residual: float = 0.5, regulariser: Regulariser = "none"
) -> Tensor:
    """The flow through given maps, layer after layer; one matrix is kept, so ``maps`` may be a generator.

    Args:
        maps: (B, H, N, N) per layer, the first layer first.
        heads: ``"mean"``, ``"mean-max"`` or a function (B, H, N, N) -> (B, H) of their weights.
        residual: share of a token that stays where it is.
        regulariser: ``"none"``, ``"linear"``, ``"column"`` (:func:`column_regulariser`) or a function N -> (N, N).

    Returns:
        (B, N, N), row i what token i is made of.

    Raises:
        ValueError: no map, or maps that are not square or of other sizes.

    >>> attention_flow([torch.eye(3)[None, None]] * 4).equal(torch.eye(3)[None])
    True
    """
    _check(heads, residual, regulariser)
    check_type("maps", maps, Iterable, "maps (B, H, N, N) of every layer")
    flow, factors = None, None
    for number, layer in enumerate(maps):
        check_type(f"maps[{number}]", layer, Tensor, "a tensor (B, H, N, N)")
        wrong = layer.dim() != 4 or layer.shape[2] != layer.shape[3]
        if wrong or (flow is not None and (layer.shape[0], layer.shape[2]) != tuple(flow.shape[:2])):
            raise ValueError(f"maps[{number}] must be (B, H, N, N) like the others, got {tuple(layer.shape)}")
        layer = layer if layer.dtype == torch.float64 else layer.float()  # products of halves underflow
        if flow is None:
            factors = _factors(regulariser, layer.shape[2], layer)
        flow = _step(flow, _weighted(layer, heads), residual, factors)
    if flow is None:
        raise ValueError("maps must hold at least one layer, got none")
    return flow


class Flow(Probe):
    """:func:`attention_flow` of a model while it runs, beside its kernels.

    One (B, N, N) matrix is kept whatever the depth, and of the layer that runs its (B, H, N, N) unless ``heads`` is
    ``"mean"``. It is that of the last call, of layers whose tokens are their own keys: after ``generate()``, run the
    model once more on all it has written.

    Args:
        heads, residual, regulariser: see :func:`attention_flow`.
        layers: layers to multiply; ``None`` for all.

    Results: (B, N, N); ``None`` before any call.

    Raises:
        ValueError: in the call, a layer with other keys than its queries, or tokens that come and go between layers; at
            attach, company that removes tokens.

    >>> Flow(heads="mean-max", regulariser="linear").residual
    0.5
    """

    name: ClassVar[str] = "flow"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    all_tokens = True

    def __init__(
        self,
        heads: Heads = "mean",
        residual: float = 0.5,
        regulariser: Regulariser = "none",
        layers: Sequence[int | str] | None = None,
    ):
        _check(heads, residual, regulariser)
        self.heads, self.residual, self.regulariser, self.layers = heads, residual, regulariser, layers
        self._first = ""
        self.reset()

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._first = sites[0].name

    def reset(self) -> None:
        self._flow: Tensor | None = None
        self._rows: list[Tensor] = []
        self._factors: Tensor | None = None

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        if site.name == self._first:
            self.reset()
        self._close()
        have = site.n_queries if self._flow is None else self._flow.shape[-1]
        if not site.n_queries == site.n_keys == have:
            raise ValueError(
                f"Flow: layer {site.layer} ({site.name}) has {site.n_queries} queries and {site.n_keys} keys, where "
                f"{have} tokens of both are needed; after generate(), call the model once on all tokens"
            )
        return torch.arange(site.n_queries), None

    @torch.no_grad()
    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        weights = weights.detach()
        # Blocks of rows are views of a buffer that the next block reuses.
        self._rows.append(weights.mean(1, keepdim=True) if self.heads == "mean" else weights.clone())

    @torch.no_grad()
    def _close(self) -> None:
        if not self._rows:
            return
        maps, self._rows = torch.cat(self._rows, 2), []
        if self._flow is None:
            self._factors = _factors(self.regulariser, maps.shape[-1], maps)
        self._flow = _step(self._flow, _weighted(maps, self.heads), self.residual, self._factors)

    def results(self) -> Tensor | None:
        self._close()
        return self._flow


@shaped(flow="float (B, N, N)", tokens="whole (T)", image="whole (P)")
def flow_map(flow: Tensor, tokens: Tensor, image: Tensor, grid: Sequence[int]) -> Tensor:
    """What tokens are made of, over the image: the mean of their rows at the image's columns, scaled to [0, 1].

    Args:
        flow: (B, N, N) as of :class:`Flow`.
        tokens: (T,) positions of the tokens of a word.
        image: (P,) positions of the image tokens, row by row; without class or newline tokens.
        grid: (rows, columns) of the image tokens.

    Returns:
        (B, rows, columns).

    Raises:
        ValueError: no token; another number of image tokens than the grid has; positions beyond the flow.

    >>> flow_map(torch.eye(5)[None], torch.tensor([2]), torch.arange(4), (2, 2)).tolist()
    [[[0.0, 0.0], [1.0, 0.0]]]
    """
    h, w = check_size("grid", grid)
    if not len(tokens):
        raise ValueError("tokens must name at least one token, got none")
    if len(image) != h * w:
        raise ValueError(f"grid={(h, w)} has {h * w} cells, but image names {len(image)} image tokens")
    n = flow.shape[-1]
    for name, at in (("tokens", tokens), ("image", image)):
        if len(at) and (int(at.min()) < 0 or int(at.max()) >= n):
            raise ValueError(f"{name} must lie in 0..{n - 1}, got {int(at.min())} to {int(at.max())}")
    found = flow[:, tokens.to(flow.device)][:, :, image.to(flow.device)].mean(1)
    return min_max(found.unflatten(1, (h, w)), (1, 2))
