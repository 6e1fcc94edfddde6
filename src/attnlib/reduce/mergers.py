"""What becomes of tokens that are not kept: clustered by direction and merged by importance, or given to their nearest
kept token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_int, check_values, check_within, checked, readable, shaped
from .base import best


@shaped(x="float (n, C)")
def cosine_kmeans(x: Tensor, clusters: int, iterations: int = 10, first: int = 0) -> Tensor:
    """Cluster vectors by direction, always the same way and into exactly so many clusters.

    Centres start at token ``first`` and at whichever token is farthest from all centres so far. A cluster that runs
    empty takes the token that fits its own cluster worst.

    Args:
        x: (n, C) vectors.
        clusters: M, at most n.
        iterations: rounds of assigning and averaging.
        first: where the first centre starts.

    Returns:
        (n,) numbers of clusters, each of 0 to M - 1 taken at least once.

    Raises:
        ValueError: more clusters than vectors, or none.

    >>> cosine_kmeans(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0]]), 2).tolist()
    [0, 0, 1]
    """
    n = x.shape[0]
    check_values("x", x)
    check_int("iterations", iterations, least=0)
    if n:
        check_int("first", first, least=0, most=n - 1)
    if not 1 <= clusters <= n:
        raise ValueError(f"clusters must lie between 1 and the {n} tokens to be merged, got {clusters}")
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    centres = [first]
    near = unit @ unit[first]
    for _ in range(clusters - 1):
        near[centres] = float("inf")
        centres.append(int(near.argmin()))
        near = torch.maximum(near, unit @ unit[centres[-1]])
    centre = unit[centres]
    labels = torch.zeros(n, dtype=torch.long, device=x.device)
    for _ in range(max(1, iterations)):
        fit, labels = (unit @ centre.T).max(1)
        size = torch.bincount(labels, minlength=clusters)
        for empty in (size == 0).nonzero().flatten().tolist():
            spare = fit.masked_fill(size[labels] < 2, float("inf"))
            moved = int(spare.argmin())
            size[labels[moved]] -= 1
            size[empty] = 1
            labels[moved], fit[moved] = empty, float("inf")
        centre = F.normalize(torch.zeros_like(centre).index_add(0, labels, unit), dim=-1)
    return labels


@shaped(x="float (n, C)", labels="whole (n)", weights="float (n)")
def merge_clusters(x: Tensor, labels: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """One vector per cluster: ``sum_j p_j x_j / sum_j p_j``.

    Args:
        x: (n, C).
        labels: (n,) clusters.
        weights: (n,) p, not negative; a cluster without weight is averaged.
        clusters: M.

    Returns:
        (M, C).

    >>> merge_clusters(torch.tensor([[1.0], [4.0]]), torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), 1).tolist()
    [[3.0]]
    """
    check_int("clusters", clusters, least=1)
    check_within("labels", labels, clusters, "cluster")
    if readable(labels) and labels.device.type == "cpu":
        if (found := labels.unique().numel()) < clusters:
            raise ValueError(f"labels must name each of the {clusters} clusters, got {found} of them")
        if bool((weights < 0).any()):
            raise ValueError("weights must not be negative, got one that is")
    dtype = torch.promote_types(x.dtype, torch.float32)
    p = weights.to(dtype)
    total = p.new_zeros(clusters).index_add(0, labels, p)
    p = torch.where(total[labels] > 0, p, torch.ones_like(p))
    total = p.new_zeros(clusters).index_add(0, labels, p)
    out = p.new_zeros(clusters, x.shape[1]).index_add(0, labels, p.unsqueeze(1) * x.to(dtype))
    return (out / total.unsqueeze(1)).to(x.dtype)


def cluster_rest(
    x: Tensor, scores: Tensor, keep: Tensor, clusters: int, iterations: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge what is not kept of one image.

    A merged token stands where the most important member of its cluster stood.

    Args:
        x: (n, C) tokens.
        scores: (n,) importance, the weights of the merger.
        keep: (n,) boolean.
        clusters: M; 0 drops the rest.
        iterations: of the clustering.

    Returns:
        ``stays`` (n,) boolean with the places of merged tokens, ``places`` (M,) ascending, ``merged`` (M, C).
    """
    rest = (~keep).nonzero().flatten()
    if not clusters or not len(rest):
        return keep, rest[:0], x[:0]
    p = scores[rest]
    labels = cosine_kmeans(x[rest], clusters, iterations, int(p.argmax()))
    merged = merge_clusters(x[rest], labels, p, clusters)
    members = torch.arange(clusters, device=x.device)[:, None] == labels
    leader = rest[p.expand(clusters, -1).masked_fill(~members, float("-inf")).argmax(1)]
    places, order = leader.sort()
    stays = keep.clone()
    stays[places] = True
    return stays, places, merged[order]


@checked
@dataclass(frozen=True)
class ClusterMerge:
    """Merge the tokens that were not chosen into ``clusters`` tokens per sample, in the space where they stand.

    >>> ClusterMerge(4).clusters
    4
    """

    clusters: int
    iterations: int = 10

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.iterations < 1:
            raise ValueError(f"clusters and iterations must be at least 1, got {self.clusters} and {self.iterations}")

    def merge(self, scores: Tensor, keep: Tensor, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        keep, hidden = keep.clone(), hidden.clone()
        for b in range(len(hidden)):
            at = image[b].nonzero().flatten()
            count = min(self.clusters, int((~keep[b, at]).sum()))
            weights = scores[b, at].clamp(min=0)
            stays, places, merged = cluster_rest(hidden[b, at], weights, keep[b, at], count, self.iterations)
            keep[b, at] = stays
            hidden[b, at[places]] = merged
        return keep, hidden


@checked
@dataclass(frozen=True)
class NearestMerge:
    """Average every token that was not chosen into the chosen one of nearest direction, weighted by score.

    >>> NearestMerge()
    NearestMerge()
    """

    def merge(self, scores: Tensor, keep: Tensor, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.clone()
        none = image.any(1) & ~keep.any(1)
        if bool(none.any()):
            # Somebody has to take them.
            keep = keep | best(scores, image & none[:, None], none.to(torch.long))
        for b in range(len(hidden)):
            kept, rest = (keep[b] & image[b]).nonzero().flatten(), (image[b] & ~keep[b]).nonzero().flatten()
            if not len(rest):
                continue
            unit = F.normalize(hidden[b], dim=-1)
            labels = torch.cat([torch.arange(len(kept), device=kept.device), (unit[rest] @ unit[kept].T).argmax(1)])
            both = torch.cat([kept, rest])
            hidden[b, kept] = merge_clusters(hidden[b, both], labels, scores[b, both].clamp(min=0), len(kept))
        return keep, hidden
