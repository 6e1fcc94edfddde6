"""How far heads look over an image, and which patterns their maps have: of all images, layers and heads at once.

Strength by distance: of a map A between the patches of a grid, rows renormalised where tokens beside the grid took a
share, ``S(k) = mean_i sum_{j : d(i, j) = k} A_ij``, which sums to 1 over the k. A uniform map has the share of pairs at
every distance, the identity has S(0) = 1.

Atlas of patterns: maps of all images, layers and heads, pooled to one size, go through an autoencoder of convolutions;
codes are clustered, laid out in the plane, and the centre of every cluster is decoded: a prototype of what its maps
look like.

Li et al., 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", arXiv 2303.13731, whose
abstract names these instruments; the distance (Chebyshev's, "k-hop neighbours"), sizes and losses are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_grid, check_int, check_real, check_values, checked, shaped
from ..extras import need
from ..grids import coordinates
from ..hooks.intervention import Probe
from ..hooks.site import Site

#: Distances between places of a grid.
METRICS = ("chebyshev", "manhattan")


def grid_distances(grid: Sequence[int], metric: str = "chebyshev") -> Tensor:
    """(N, N) whole distances between the places of a grid, row by row.

    Args:
        grid: (rows, columns).
        metric: ``"chebyshev"``, the larger of both offsets, or ``"manhattan"``, their sum.

    >>> grid_distances((1, 3)).tolist()
    [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    """
    check_choice("metric", metric, METRICS)
    at = coordinates(check_grid("grid", grid, (2,)))
    apart = (at[:, None] - at[None]).abs()
    return apart.amax(-1) if metric == "chebyshev" else apart.sum(-1)


class _OnPatches(Probe):
    """Probes that see the rows and columns of patches."""

    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(self, grid: Sequence[int], prefix: int, normalise: bool, layers: Sequence[int | str] | None):
        self.grid = check_grid("grid", grid, (2,))
        self.prefix, self.normalise = check_int("prefix", prefix, least=0), check_flag("normalise", normalise)
        self.layers = None if layers is None else list(layers)

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        tokens = self.prefix + math.prod(self.grid)
        if not site.n_queries == site.n_keys == tokens:
            raise ValueError(
                f"{type(self).__name__}: prefix={self.prefix} and grid={self.grid} are {tokens} tokens, but layer "
                f"{site.layer} ({site.name}) has {site.n_queries} queries and {site.n_keys} keys"
            )
        return torch.arange(self.prefix, tokens), None

    def _patches(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, r, N) weights on patches, as of rows that give some, and (B, h, r) what they have together."""
        on = weights.detach()[..., self.prefix :]
        mass = on.sum(-1)
        if self.normalise:
            on = on / torch.where(mass > 0, mass, torch.ones_like(mass)).unsqueeze(-1)
        return on, mass


class DistanceProfile(_OnPatches):
    """How strongly patches attend to patches at each distance, streaming: nothing grows with the images.

    Args:
        grid: (rows, columns) of the patches.
        prefix: tokens before them (class, registers).
        normalise: rows are divided by their weight on patches; a row without any is left out. Otherwise strengths sum
            to 1 less the prefix's share.
        metric: ``"chebyshev"`` or ``"manhattan"``.
        layers: layers to look at; ``None`` for all.

    Results: ``{layer: {"strength": (h, K), "distance": (h,), "entropy": (h,), "prefix_share": (h,)}}``, means over
    images and patches: strength at distance k, ``sum_j A_ij d_ij``, ``-sum_j A_ij ln A_ij``, and the weight on the
    tokens before the patches.

    Raises:
        ValueError: in the call, another number of tokens.

    >>> DistanceProfile((14, 14), prefix=1).grid
    (14, 14)
    """

    name: ClassVar[str] = "distance-profile"

    def __init__(
        self,
        grid: Sequence[int],
        prefix: int = 0,
        normalise: bool = True,
        metric: str = "chebyshev",
        layers: Sequence[int | str] | None = None,
    ):
        super().__init__(grid, prefix, normalise, layers)
        self.metric = metric
        self._apart = grid_distances(self.grid, metric)
        self._sums: dict[int | str, dict[str, Tensor]] = {}

    def reset(self) -> None:
        self._sums = {}

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        on, mass = self._patches(weights)
        apart = self._apart.to(on.device)[rows.to(on.device) - self.prefix]  # (r, N)
        bins = F.one_hot(apart, int(self._apart.max()) + 1).to(on)
        live = (mass > 0).to(on.dtype) if self.normalise else torch.ones_like(mass)
        new = {
            "strength": torch.einsum("bhrn,rnk->hk", on, bins), "distance": (on * apart).sum((0, 2, 3)),
            "entropy": torch.special.entr(on).sum((0, 2, 3)), "rows": live.sum((0, 2)),
            "prefix_share": (1 - mass).sum((0, 2)), "all": torch.ones_like(mass).sum((0, 2)),
        }  # fmt: skip
        key = site.layer
        held = self._sums.setdefault(key, {})
        for name, value in new.items():
            value = value.double().cpu()
            held[name] = held[name] + value if name in held else value

    def results(self) -> dict[int | str, dict[str, Tensor]]:
        shown = {}
        for key, held in sorted(self._sums.items(), key=lambda item: str(item[0]).zfill(6)):
            rows = held["rows"]
            shown[key] = {
                "strength": held["strength"] / rows[:, None], "distance": held["distance"] / rows,
                "entropy": held["entropy"] / rows, "prefix_share": held["prefix_share"] / held["all"],
            }  # fmt: skip
        return shown


@shaped(weights="float (..., N, N)")
def pool_maps(weights: Tensor, grid: Sequence[int], side: int) -> Tensor:
    """Maps between patches of a grid as maps between its cells: queries averaged, keys added, so rows keep their sum.

    Args:
        weights: (..., N, N).
        grid: (rows, columns), N patches.
        side: cells per side at most; a side that has no more patches stays as it is.

    Returns:
        (..., Q, Q), Q cells.
    """
    rows, columns = check_grid("grid", grid, (2,))
    if weights.shape[-1] != rows * columns:
        raise ValueError(f"weights are of {weights.shape[-1]} patches, but grid={tuple(grid)} has {rows * columns}")
    tall, wide = _cells(rows, check_int("side", side, least=1)), _cells(columns, side)
    cell = (tall[:, :, None, None] * wide[None, None]).permute(1, 3, 0, 2).flatten(2).flatten(0, 1).to(weights)
    return cell / cell.sum(-1, keepdim=True) @ weights @ cell.T


def _cells(count: int, side: int) -> Tensor:
    """(count, cells) in which of so many cells each of the places lies, of sizes as equal as they can be."""
    cells = min(count, side)
    return F.one_hot(torch.arange(count) * cells // count, cells)


class CollectMaps(_OnPatches):
    """Maps between patches of every image, layer and head, pooled to few cells as they come: (B h) Q² numbers a layer.

    Args:
        grid: (rows, columns) of the patches.
        prefix: tokens before them.
        side: cells per side at most.
        normalise: as of :class:`DistanceProfile`; a row without weight on patches stays zero.
        layers: layers to look at; ``None`` for all.

    Results: :class:`Maps`, or ``None`` before any call.
    """

    name: ClassVar[str] = "collect-maps"

    def __init__(
        self,
        grid: Sequence[int],
        prefix: int = 0,
        side: int = 7,
        normalise: bool = True,
        layers: Sequence[int | str] | None = None,
    ):
        super().__init__(grid, prefix, normalise, layers)
        self.side = check_int("side", side, least=1)
        self.reset()

    def reset(self) -> None:
        self._open: dict[int, list[Tensor]] = {}
        self._maps: list[Tensor] = []
        self._origins: list[Tensor] = []
        self._images: dict[int, int] = {}

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        wanted = super().probe(site)
        self._close(site.layer)
        self._open[site.layer] = []
        return wanted

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        self._open[site.layer].append(self._patches(weights)[0].float().cpu())

    def _close(self, layer: int) -> None:
        blocks = self._open.pop(layer, [])
        if not blocks:
            return
        pooled = pool_maps(torch.cat(blocks, 2), self.grid, self.side)  # (B, h, Q, Q)
        batch, heads = pooled.shape[:2]
        first = self._images.get(layer, 0)
        self._images[layer] = first + batch
        image = torch.arange(first, first + batch)[:, None].expand(-1, heads)
        head = torch.arange(heads).expand(batch, -1)
        self._maps.append(pooled.flatten(0, 1))
        self._origins.append(torch.stack([image, torch.full_like(image, layer), head], -1).flatten(0, 1))

    def results(self) -> Maps | None:
        for layer in list(self._open):
            self._close(layer)
        if not self._maps:
            return None
        cells = (min(self.grid[0], self.side), min(self.grid[1], self.side))
        return Maps(torch.cat(self._maps), torch.cat(self._origins), cells)


@dataclass
class Maps:
    """Maps of one size.

    Args:
        weights: (n, Q, Q), rows sum to 1.
        origins: (n, 3) image, layer and head of each.
        grid: (rows, columns) of the Q cells.
    """

    weights: Tensor
    origins: Tensor
    grid: tuple[int, int]


class MapAutoencoder(nn.Module):
    """Convolutions of a map as an image of one channel, a code, and back to a map whose rows sum to 1.

    Args:
        size: Q, tokens of a map.
        code: width of the code.
        width: channels.
    """

    def __init__(self, size: int, code: int = 16, width: int = 16):
        super().__init__()
        self.size = check_int("size", size, least=1)
        sides = [size]
        while sides[-1] > 7:
            sides.append(-(-sides[-1] // 2))
        widths = [1, *[width * min(i + 1, 2) for i in range(len(sides))]]
        self.encode_convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, 1 if i == 0 else 2, 1) for i in range(len(sides))
        )
        flat = widths[-1] * sides[-1] ** 2
        self.to_code, self.from_code = nn.Linear(flat, code), nn.Linear(code, flat)
        self.sides, self.first = sides, (widths[-1], sides[-1], sides[-1])
        self.decode_convs = nn.ModuleList(
            nn.Conv2d(widths[i + 1], widths[i] if i else 1, 3, 1, 1) for i in reversed(range(len(sides)))
        )

    def encode(self, maps: Tensor) -> Tensor:
        """(n, Q, Q) -> (n, code)."""
        x = (maps * self.size).log1p().unsqueeze(1)  # 1 is what a uniform map has everywhere
        for conv in self.encode_convs:
            x = F.relu(conv(x))
        return self.to_code(x.flatten(1))

    def decode_logits(self, codes: Tensor) -> Tensor:
        """(n, code) -> (n, Q, Q) scores, a softmax of whose rows is the map."""
        x = self.from_code(codes).unflatten(1, self.first)
        for i, conv in enumerate(self.decode_convs):
            x = conv(F.relu(x))
            if i + 1 < len(self.decode_convs):
                x = F.interpolate(x, size=(self.sides[-2 - i],) * 2)
        return x[:, 0]

    def decode(self, codes: Tensor) -> Tensor:
        """(n, code) -> (n, Q, Q), rows sum to 1."""
        return self.decode_logits(codes).softmax(-1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.decode(self.encode(maps))


@dataclass
class Atlas:
    """Patterns that maps have.

    Args:
        codes: (n, code).
        points: (n, 2) places in the plane.
        clusters: (n,) number of the cluster, the largest first.
        prototypes: (clusters, Q, Q) decoded centres, rows sum to 1.
        origins: (n, 3) image, layer and head.
        grid: (rows, columns) of the cells.
        loss: of the autoencoder behind every epoch.
        autoencoder: it.
    """

    codes: Tensor
    points: Tensor
    clusters: Tensor
    prototypes: Tensor
    origins: Tensor
    grid: tuple[int, int]
    loss: list[float]
    autoencoder: MapAutoencoder = field(repr=False)

    def table(self) -> list[dict[str, float]]:
        """What each cluster's prototype is like: ``maps`` how many, ``self`` its weight on the query's own cell,
        ``row`` and ``column`` on cells of the query's row and column (its own included), ``distance`` mean Chebyshev
        distance, ``entropy_share`` of the largest entropy, ``layer`` mean layer of its maps.
        """
        apart = grid_distances(self.grid).to(self.prototypes)
        at = coordinates(self.grid)
        same = [(at[:, None, axis] == at[None, :, axis]).to(self.prototypes) for axis in (0, 1)]
        most = math.log(max(2, self.prototypes.shape[-1]))
        rows = []
        for number, p in enumerate(self.prototypes):
            mine = self.clusters == number
            rows.append(
                {
                    "maps": int(mine.sum()), "self": float(p.diagonal().mean()),
                    "row": float((p * same[0]).sum(-1).mean()), "column": float((p * same[1]).sum(-1).mean()),
                    "distance": float((p * apart).sum(-1).mean()),
                    "entropy_share": float(torch.special.entr(p).sum(-1).mean()) / most,
                    "layer": float(self.origins[mine, 1].double().mean()),
                }
            )  # fmt: skip
        return rows

    def shares(self) -> Tensor:
        """(L, clusters) which share of a layer's maps has each pattern; rows sum to 1, layers without maps are zero."""
        layers = int(self.origins[:, 1].max()) + 1
        counts = torch.zeros(layers, len(self.prototypes), dtype=torch.float64)
        counts.index_put_((self.origins[:, 1], self.clusters), torch.ones(len(self.clusters)).double(), accumulate=True)
        return counts / counts.sum(-1, keepdim=True).clamp_min(1)


@checked
def atlas(
    maps: Maps,
    clusters: int = 5,
    code: int = 16,
    layout: str = "pca",
    loss: str = "kl",
    epochs: int = 30,
    batch: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> Atlas:
    """Learn an autoencoder of maps, cluster their codes, lay them out in the plane, and decode the centres.

    Args:
        maps: of :class:`CollectMaps`.
        clusters: how many patterns (k-means).
        code: width of codes.
        layout: ``"pca"``, or ``"tsne"`` (scikit-learn's).
        loss: ``"kl"``, the mean divergence of decoded rows from rows, or ``"mse"``.
        epochs, batch, lr: of Adam.
        seed: of everything drawn.

    Raises:
        ValueError: fewer maps than clusters, maps with rows that do not sum to 1.
        ImportError: scikit-learn is not installed.
    """
    check_choice("layout", layout, ("pca", "tsne"))
    check_choice("loss", loss, ("kl", "mse"))
    for name, value in (("clusters", clusters), ("code", code), ("epochs", epochs), ("batch", batch)):
        check_int(name, value, least=1)
    check_real("lr", lr, above=0)
    given = maps.weights.float()
    check_values("maps", given)
    if len(given) < clusters:
        raise ValueError(f"maps are {len(given)}, fewer than clusters={clusters}")
    if not torch.allclose(given.sum(-1), torch.ones(given.shape[:-1], device=given.device), atol=1e-3):
        raise ValueError("maps must have rows that sum to 1; collect them with normalise=True")
    model, history = _train(given, code, loss, epochs, batch, lr, seed)
    with torch.no_grad():
        codes = torch.cat([model.encode(part) for part in given.split(256)])
    cluster = need("sklearn.cluster", "an atlas of patterns")
    fitted = cluster.KMeans(clusters, n_init=10, random_state=seed).fit(codes.cpu().double().numpy())
    labels = torch.as_tensor(fitted.labels_).long()
    order = torch.bincount(labels, minlength=clusters).argsort(descending=True, stable=True)
    centres = torch.as_tensor(fitted.cluster_centers_).float()[order].to(codes)
    with torch.no_grad():
        prototypes = model.decode(centres)
    points = _plane(codes, layout, seed)
    return Atlas(codes, points, order.argsort()[labels], prototypes, maps.origins, maps.grid, history, model)


def _train(
    given: Tensor, code: int, loss: str, epochs: int, batch: int, lr: float, seed: int
) -> tuple[MapAutoencoder, list[float]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MapAutoencoder(given.shape[-1], code).to(given.device)
    maker = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    history = []
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(epochs):
            total = 0.0
            for chosen in torch.randperm(len(given), generator=maker).to(given.device).split(batch):
                x = given[chosen]
                logits = model.decode_logits(model.encode(x))
                if loss == "kl":
                    said = logits.log_softmax(-1)
                    error = (torch.xlogy(x, x) - x * said).sum(-1).mean()
                else:
                    error = (x - logits.softmax(-1)).square().sum(-1).mean()
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
                total += float(error.detach()) * len(x)
            history.append(total / len(given))
    return model.eval(), history


def _plane(codes: Tensor, layout: str, seed: int) -> Tensor:
    """(n, 2)."""
    if layout == "tsne":
        manifold = need("sklearn.manifold", "layout='tsne'")
        fewer = min(30.0, max(1.0, (len(codes) - 1) / 3))
        made = manifold.TSNE(2, perplexity=fewer, init="random", random_state=seed)
        return torch.as_tensor(made.fit_transform(codes.cpu().numpy())).float()
    centred = (codes - codes.mean(0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ axes[:2].T
    return F.pad(points, (0, 2 - points.shape[1])).float()


def strength_by_layer(results: Mapping[Any, Mapping[str, Tensor]]) -> Tensor:
    """(L, K) strength by layer and distance, means over heads, from the results of :class:`DistanceProfile`."""
    if not results:
        raise ValueError("results are empty: nothing was recorded")
    return torch.stack([entry["strength"].mean(0) for entry in results.values()])
