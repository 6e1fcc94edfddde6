"""p-Laplacian adapters behind the attention of a model that exists (Wu et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..hooks import Intervention
from ..hooks.choose import ask
from ..hooks.site import Site
from ..nn.layers import merge_heads
from ..nn.multimodal.p_adapter import PLaplacianAdapter, pool_nodes
from ._watch import by_layer

#: Names of output projections.
PROJECTIONS = ("o_proj", "out_proj", "dense", "proj")


class PLaplacian(Intervention):
    """Adapters behind the output projection of each attention; the model itself stays frozen.

    Nodes are the values as read, past ones included, through the layer's own output projection. In cross-attention the
    queries join, and the keys are averaged to ``pooled`` nodes.

    Args:
        adapters: :class:`~attnlib.nn.multimodal.p_adapter.PLaplacianAdapter` by number of the layer; a ``ModuleList``
            or sequence for the layers from 0 on. Train them as any module: gradients flow.
        kind: ``"self"`` or ``"cross"`` attention.
        pooled: nodes of a context; ``None`` for the keys themselves.

    Raises:
        TypeError: something that is no adapter.
        ValueError: when attached: a layer that does not exist, another width or number of heads, an attention without
            an output projection of a known name.

    Reference: Wu et al., 2023, arXiv 2312.10613.

    >>> PLaplacian([PLaplacianAdapter(16, 2)]).layers
    [0]
    """

    name: ClassVar[str] = "p-laplacian"

    def __init__(
        self,
        adapters: Mapping[int, PLaplacianAdapter] | Sequence[PLaplacianAdapter] | nn.ModuleList,
        kind: str = "self",
        pooled: int | None = 16,
    ):
        if kind not in ("self", "cross"):
            raise ValueError(f"kind={kind!r} is not possible; choose 'self' or 'cross'")
        if pooled is not None and pooled < 1:
            raise ValueError(f"pooled={pooled} must be at least 1")
        self.adapters = by_layer("adapters", adapters, PLaplacianAdapter)
        self.kinds = (kind,)  # type: ignore[misc]
        self.layers = sorted(self.adapters)
        self.pooled = pooled
        self.reset()

    def reset(self) -> None:
        self._heads: dict[tuple[str | None, int], tuple[Tensor, Tensor]] = {}
        self._weights: dict[tuple[str | None, int], list[Tensor]] = {}

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        for site in sites:
            adapter, projection = self.adapters[site.layer], self._projection(site)
            if projection is None:
                raise ValueError(
                    f"layer {site.layer} ({site.name}): no output projection; known names are {list(PROJECTIONS)}"
                )
            width = projection.weight.shape[0]
            if (adapter.dim, adapter.num_heads) != (width, site.heads):
                raise ValueError(
                    f"adapters[{site.layer}] is for dim={adapter.dim} and num_heads={adapter.num_heads}, layer "
                    f"{site.layer} ({site.name}) has {width} and {site.heads}"
                )

    @staticmethod
    def _projection(site: Site) -> nn.Linear | None:
        found = (getattr(site.module, name, None) for name in PROJECTIONS)
        return next((f for f in found if isinstance(f, nn.Linear)), None)

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        self._heads[site.branch, site.layer] = q, v
        self._weights[site.branch, site.layer] = []
        return call(q, k, v)

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        pieces = self._weights[site.branch, site.layer]
        if sum(w.shape[2] for w in pieces) < site.n_queries:  # later ones are for probes that look on
            pieces.append(weights)
        return weights

    def around_sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        out = call(hidden)
        key = site.branch, site.layer
        (q, v), weights = self._heads.pop(key), torch.cat(self._weights.pop(key), 2)
        projection = self._projection(site)
        assert projection is not None
        nodes, queries = merge_heads(v.repeat_interleave(q.shape[1] // v.shape[1], 1)), None
        if site.kind == "cross":
            if self.pooled is not None:
                weights, nodes = pool_nodes(weights, nodes, self.pooled, (weights > 0).any(2).any(1))
            queries = projection(merge_heads(q))
        elif v.shape[2] > site.offset + q.shape[2]:
            # A static cache goes on after the new tokens; nobody reads that part.
            used = site.offset + q.shape[2]
            nodes, weights = nodes[:, :used], weights[..., :used]
        if site.kind != "cross":
            nodes = nodes.masked_fill(~(weights != 0).any(2).any(1).unsqueeze(-1), 0.0)  # padding may hold anything
        return ask(self.adapters[site.layer], out, weights, projection(nodes), queries).to(out)
