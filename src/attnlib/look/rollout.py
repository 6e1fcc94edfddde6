"""Attention rollout: how much of every input token is in every token behind the last layer, if attention is all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_real
from ..hooks.intervention import Probe
from ..hooks.site import Site


class Rollout(Probe):
    """``R_L = A_L ... A_1`` with ``A_l = (1 - residual) mean_h S_lh + residual I`` (Abnar and Zuidema, 2020).

    The product grows while the model runs, row by row and beside its kernel: one (B, N, N) matrix is kept, whatever the
    depth. Rows sum to 1. It is that of the last call, of layers whose tokens are their own keys.

    Args:
        residual: share of a token that stays where it is.
        layers: layers to multiply; ``None`` for all.

    Results: (B, N, N), row i what token i is made of; ``None`` before any call.

    Raises:
        ValueError: a share outside [0, 1); in the call, a layer with other keys than its queries, or tokens that come
            and go between layers; at attach, company that removes tokens.

    Reference: Abnar and Zuidema, 2020, arXiv 2005.00928.
    """

    name: ClassVar[str] = "rollout"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    all_tokens = True

    def __init__(self, residual: float = 0.5, layers: Sequence[int | str] | None = None):
        self.residual, self.layers = check_real("residual", residual, least=0, below=1), layers
        self._first = ""
        self._product: Tensor | None = None
        self._rows: list[Tensor] = []

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._first = sites[0].name

    def reset(self) -> None:
        self._product, self._rows = None, []

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        if site.name == self._first:
            self.reset()
        self._close()
        have = site.n_queries if self._product is None else self._product.shape[-1]
        if not site.n_queries == site.n_keys == have:
            raise ValueError(
                f"Rollout: layer {site.layer} ({site.name}) has {site.n_queries} queries and {site.n_keys} keys, where "
                f"{have} tokens of both are needed"
            )
        return torch.arange(site.n_queries), None

    @torch.no_grad()
    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        mean, r = weights.detach().mean(1), self.residual
        if self._product is None:
            stays = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)[rows.to(mean.device)]
            self._rows.append((1 - r) * mean + r * stays)
        else:
            self._rows.append((1 - r) * mean @ self._product + r * self._product[:, rows.to(mean.device)])

    def _close(self) -> None:
        if self._rows:
            self._product, self._rows = torch.cat(self._rows, 1), []

    def results(self) -> Tensor | None:
        self._close()
        return self._product
