"""CHM-Corr: an image is classified by which patches of it are found in images whose class is known.

1. The ``shortlist`` training images most like the query, by the cosine of mean features.
2. A matcher says where each place S of the query's grid lies in each of them, ``T(S)``; the similarity of a place is
   ``M[S] = cos(F_q[S], F_s[T(S)])``. Where a place has no partner it is 0.
3. A score per image from ``M`` at the places that count. Automatic ones are those whose features lie along the mean of
   the other image's, as a share of their range at least ``threshold``; or a user says which.
4. The best ``votes`` images vote.

Everything that costs a forward comes before step 3: another mask is a product and a sort. Scores are the mean of the
``top`` largest of ``M * mask`` (``"top_k"``, as released for automatic places), the sum over all places by their number
(``"mean_all"``, as released for a user's), or by the number that count (``"mean_selected"``). The two released scores
differ, so a mask equal to the automatic one may change the answer; ``scoring=`` makes them alike.

Reference: Nguyen, Taesiri et al., 2024, "Allowing humans to interactively guide machines where to look does not always
improve human-AI team's classification accuracy" (https://arxiv.org/abs/2404.05238); Taesiri, Nguyen and Nguyen, 2022
(CHM-Corr).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_axes, check_choice, check_int, check_real, check_tensor, check_whole, checked
from ..grids import coordinates
from ..models.chmnet import CHMNet, transfer
from .attribution import unit_range

SCORINGS = ("top_k", "mean_all", "mean_selected")
TIES = ("lowest", "enlarge")


class Matcher(Protocol):
    """Where places of one image lie in others.

    ``reads`` is ``"features"``: called as ``(query (h, w, C), support (N, i, j, C))``; or ``"images"``: as
    ``(query (3, H, W), support (N, 3, H, W), (h, w))``. It gives (N, h, w, 2), row and column in the support's grid,
    -1 where there is no partner.
    """

    reads: str

    def __call__(self, query: Tensor, support: Tensor, *grid: tuple[int, int]) -> Tensor: ...


def _cosines(query: Tensor, support: Tensor) -> Tensor:
    """(N, S, T) of (h, w, C) and (N, i, j, C)."""
    a, b = F.normalize(query.flatten(0, 1), dim=-1), F.normalize(support.flatten(1, 2), dim=-1)
    return a @ b.transpose(1, 2)


def _cells(index: Tensor, query: Tensor, support: Tensor) -> Tensor:
    """(N, S) numbers of cells as (N, h, w, 2) rows and columns; -1 stays."""
    width = support.shape[2]
    both = torch.stack([index // width, index % width], -1).masked_fill((index < 0)[..., None], -1)
    return both.view(len(support), *query.shape[:2], 2)


class MutualNearest:
    """Places that are each other's nearest, by cosine; the rest have no partner.

    Args:
        mutual: ``False`` gives every place its nearest.

    >>> MutualNearest()(torch.eye(4).view(2, 2, 4), torch.eye(4).flip(0).view(1, 2, 2, 4))[0, 0, 0].tolist()
    [1, 1]
    """

    reads = "features"

    def __init__(self, mutual: bool = True):
        self.mutual = mutual

    def __call__(self, query: Tensor, support: Tensor) -> Tensor:
        c = _cosines(query, support)
        best = c.argmax(2)
        if self.mutual:
            back = c.argmax(1).gather(1, best)
            best = torch.where(back == torch.arange(c.shape[1], device=c.device), best, -1)
        return _cells(best, query, support)


class Sinkhorn:
    """Optimal transport with entropy, every place of either image with the same mass: the largest entry of each row.

    Args:
        epsilon: weight of the entropy; cosines are between -1 and 1.
        steps: of rows and columns.
    """

    reads = "features"

    def __init__(self, epsilon: float = 0.05, steps: int = 50):
        self.epsilon, self.steps = check_real("epsilon", epsilon, above=0.0), check_int("steps", steps, least=1)

    def plan(self, query: Tensor, support: Tensor) -> Tensor:
        """(N, S, T) mass; it sums to one, columns to ``1 / T`` each, and rows to ``1 / S`` each in the limit."""
        log = _cosines(query, support) / self.epsilon
        sizes = torch.tensor(log.shape[1:], dtype=log.dtype, device=log.device).log()
        for _ in range(self.steps):
            log = log - log.logsumexp(2, keepdim=True) - sizes[0]
            log = log - log.logsumexp(1, keepdim=True) - sizes[1]
        return log.exp()

    def __call__(self, query: Tensor, support: Tensor) -> Tensor:
        return _cells(self.plan(query, support).argmax(2), query, support)


class CHMMatcher:
    """Convolutional Hough matching: points all over the query, carried over by :class:`attnlib.models.chmnet.CHMNet`.

    Args:
        net: with the released weights, see :func:`attnlib.models.chmnet.load_chmnet`.
        size: side to which images are resized.
        margin: of the points, as a share of the side; released 18 of 240.
        compat: ``"authors"``: x is taken for a row of features and y for a column, in both images.
    """

    reads = "images"

    @checked
    def __init__(self, net: CHMNet, size: int = 240, margin: float = 18 / 240, compat: str | None = None):
        check_choice("compat", compat, (None, "authors"))
        check_real("margin", margin, least=0.0, below=0.5)
        self.net, self.size, self.margin, self.compat = net, check_int("size", size, least=32), margin, compat

    @torch.no_grad()
    def __call__(self, query: Tensor, support: Tensor, grid: tuple[int, int]) -> Tensor:
        both = [F.interpolate(t, (self.size,) * 2, mode="bilinear", antialias=True) if t.shape[2:] != (self.size,) * 2
                else t for t in (query[None], support)]  # fmt: skip
        ends = 1 - 2 * self.margin
        points = torch.cartesian_prod(*(torch.linspace(-ends, ends, n, dtype=support.dtype) for n in grid))
        moved = transfer(self.net(both[0].expand_as(both[1]), both[1]), points.to(support.device))
        sides = torch.tensor(grid, device=support.device)
        cells = ((moved + 1) / 2 * sides).long().clamp(min=0).minimum(sides - 1).view(len(support), *grid, 2)
        return cells.transpose(1, 2).flip(-1) if self.compat else cells


MATCHERS: dict[str, Callable[[], Any]] = {
    "mutual": MutualNearest, "nearest": lambda: MutualNearest(False), "sinkhorn": Sinkhorn,
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What :meth:`Correspondences.predict` says.

    Args:
        label: that most of the best images have.
        votes: how many of them.
        of: how many voted.
        order: the shortlist, best first, by its own numbers.
        scores: of the shortlist, in its order.
        neighbours: the best images of that label, at most ``of``.
        selected: (N, *grid) what counted.
    """

    label: int
    votes: int
    of: int
    order: Tensor
    scores: Tensor
    neighbours: Tensor
    selected: Tensor


class Correspondences:
    """A query beside its shortlist, matched; masks are tried without another forward.

    Args:
        similarity: (N, h, w) M.
        partners: (N, h, w, 2) row and column, -1 for none.
        along: (N, h, w) how much each place lies along the other image's mean.
        labels: (N,) of the shortlist.
        index: (N,) which training images it holds.
        votes, threshold, top: of :class:`CorrespondenceClassifier`.
    """

    def __init__(
        self, similarity: Tensor, partners: Tensor, along: Tensor, labels: Tensor, index: Tensor,
        votes: int = 20, threshold: float = 0.55, top: int = 5,
    ):  # fmt: skip
        self.similarity, self.partners, self.along = similarity, partners, along
        self.labels, self.index = labels, index
        self.votes = check_int("votes", votes, least=1)
        self.threshold = check_real("threshold", threshold, least=0.0, most=1.0)
        self.top = check_int("top", top, least=1)

    @property
    def automatic(self) -> Tensor:
        """(N, h, w) the places that count without a user.

        Raises:
            ValueError: an image all of whose places are alike, so that none stands out.
        """
        return unit_range(self.along, "the similarity of the query to an image") >= self.threshold

    def _selected(self, mask: Tensor | None) -> tuple[Tensor, bool]:
        if mask is None:
            return self.automatic, True
        mask = torch.as_tensor(mask, device=self.similarity.device)
        grid = tuple(self.similarity.shape[1:])
        if tuple(mask.shape) not in (grid, tuple(self.similarity.shape)):
            raise ValueError(f"mask must be {grid}, a place each, got {tuple(mask.shape)}")
        if not bool(torch.isfinite(mask).all()) or bool((mask < 0).any()):
            raise ValueError("mask must hold finite numbers of at least 0")
        if not bool(mask.any()):
            return self.automatic, True
        return mask.expand_as(self.similarity), False

    def scores(self, mask: Tensor | None = None, scoring: str | None = None) -> Tensor:
        """(N,) how well each image matches at the places that count.

        Args:
            mask: (h, w), or one per image; ``None``, or zeros everywhere, for the automatic one.
            scoring: one of :data:`SCORINGS`; by default as released, ``"top_k"`` for automatic places, ``"mean_all"``
                for a user's.
        """
        selected, automatic = self._selected(mask)
        how = ("top_k" if automatic else "mean_all") if scoring is None else scoring
        check_choice("scoring", how, SCORINGS)
        counted = (self.similarity * selected).flatten(1)
        if how == "top_k":
            return counted.topk(min(self.top, counted.shape[1]), dim=1).values.mean(1)
        if how == "mean_all":
            return counted.mean(1)
        return counted.sum(1) / selected.flatten(1).sum(1)

    def predict(
        self, mask: Tensor | None = None, votes: int | None = None, scoring: str | None = None, ties: str = "lowest"
    ) -> Verdict:
        """Rank the shortlist again and vote.

        Args:
            mask, scoring: see :meth:`scores`.
            votes: how many images vote; more than there are is all.
            ties: ``"lowest"`` label, or ``"enlarge"`` the number of votes until one label leads, as the released page
                does; all images have voted then at the latest.
        """
        check_choice("ties", ties, TIES)
        k = min(check_int("votes", self.votes if votes is None else votes, least=1), len(self.labels))
        scores = self.scores(mask, scoring)
        order = scores.argsort(descending=True, stable=True)
        ranked = self.labels[order]
        counts = ranked[:k].bincount()
        while ties == "enlarge" and k < len(ranked) and int((counts == counts.max()).sum()) > 1:
            k += 1
            counts = ranked[:k].bincount()
        label = int(counts.argmax())
        return Verdict(label, int(counts[label]), k, order, scores, order[ranked == label][:k], self._selected(mask)[0])

    def lines(self, image: int, mask: Tensor | None = None, most: int = 5) -> Tensor:
        """(L, 4) the pairs that speak most for an image of the shortlist: row, column, there row, column.

        Args:
            image: its number in the shortlist.
            mask: as of :meth:`scores`.
            most: pairs.
        """
        check_int("image", image, least=0, most=len(self.labels) - 1)
        chosen = self._selected(mask)[0][image]
        counts = ((chosen > 0) & (self.partners[image, ..., 0] >= 0)).flatten()
        worth = (self.similarity[image] * chosen).flatten().masked_fill(~counts, -torch.inf)
        best = worth.argsort(descending=True, stable=True)[: min(most, int(counts.sum()))]
        places = coordinates(tuple(chosen.shape), chosen.device)
        return torch.cat([places, self.partners[image].flatten(0, 1)], 1)[best]


class CorrespondenceClassifier:
    """Nearest images, ranked again by matching patches.

    Args:
        encode: images (B, 3, H, W) -> features (B, h, w, C), such as the last map of a convolutional network.
        images: (N, 3, H, W), or a sequence of images (3, H, W): the training set.
        labels: (N,) integers.
        matcher: ``"mutual"``, ``"nearest"``, ``"sinkhorn"``, or a :class:`Matcher`.
        shortlist: images that are matched.
        votes: images that vote.
        threshold: of automatic places, as a share of their range.
        top: places that ``scoring="top_k"`` means over.
        chunk: images at a time.

    >>> patches = torch.eye(4).view(4, 1, 2, 2)
    >>> images = torch.stack([patches[[0, 1]].sum(0), patches[[2, 3]].sum(0)]).expand(2, 3, 2, 2)
    >>> c = CorrespondenceClassifier(lambda x: x.permute(0, 2, 3, 1) + 0.1, images, torch.tensor([4, 7]), votes=1)
    >>> c.match(images[1]).predict(torch.tensor([[0, 0], [1, 1]])).label
    7
    """

    @checked
    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        images: Any,
        labels: Tensor | Sequence[int],
        matcher: Any = "mutual",
        shortlist: int = 50,
        votes: int = 20,
        threshold: float = 0.55,
        top: int = 5,
        chunk: int = 64,
    ):
        if isinstance(matcher, str):
            check_choice("matcher", matcher, tuple(MATCHERS))
            matcher = MATCHERS[matcher]()
        if not callable(matcher) or getattr(matcher, "reads", None) not in ("features", "images"):
            raise TypeError(f"matcher must be one of {list(MATCHERS)} or a Matcher, got {matcher!r}")
        self.encode, self.images, self.matcher = encode, images, matcher
        self.labels = torch.as_tensor(labels)
        check_whole("labels", self.labels)
        if len(images) != len(self.labels) or self.labels.dim() != 1 or not len(images):
            raise ValueError(f"labels must be one per image, ({len(images)},), got {tuple(self.labels.shape)}")
        if int(self.labels.min()) < 0:
            raise ValueError("labels must be at least 0")
        self.shortlist = check_int("shortlist", shortlist, least=1)
        self.votes, self.threshold, self.top = votes, threshold, top
        self.chunk = check_int("chunk", chunk, least=1)
        parts = range(0, len(images), self.chunk)
        rows = [self._features(range(i, min(i + self.chunk, len(images)))).mean((1, 2)) for i in parts]
        self.means = F.normalize(torch.cat(rows), dim=-1)

    def _pictures(self, index: Sequence[int]) -> Tensor:
        return self.images[list(index)] if isinstance(self.images, Tensor) else torch.stack(
            [self.images[i] for i in index])  # fmt: skip

    @torch.no_grad()
    def _features(self, index: Sequence[int]) -> Tensor:
        return self._encoded(self._pictures(index))

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> Tensor:
        features = self.encode(images)
        check_tensor("the features", features)
        if features.dim() != 4 or len(features) != len(images):
            raise ValueError(f"encode must give (B, h, w, C) for {len(images)} images, got {tuple(features.shape)}")
        return features

    def nearest(self, image: Tensor) -> tuple[Tensor, int]:
        """The shortlist of a query, the most alike first, and what the first ``votes`` of it say without matching."""
        check_axes("image", image, C=None, H=None, W=None)
        likeness = F.normalize(self._encoded(image[None]).mean((1, 2)), dim=-1)[0] @ self.means.T
        index = likeness.argsort(descending=True, stable=True)[: self.shortlist]
        return index, int(self.labels[index[: self.votes]].bincount().argmax())

    @torch.no_grad()
    def match(self, image: Tensor) -> Correspondences:
        """Everything that costs a forward: the query (3, H, W) beside its shortlist."""
        index, _ = self.nearest(image)
        query = self._encoded(image[None])[0]
        parts = []
        for some in index.split(self.chunk):
            support = self._features(some.tolist())
            if self.matcher.reads == "images":
                grid = query.shape[0], query.shape[1]
                partners = self.matcher(image, self._pictures(some.tolist()), grid)
            else:
                partners = self.matcher(query, support)
            parts.append((partners, *compared(query, support, partners)))
        partners, similarity, along = (torch.cat(p) for p in zip(*parts, strict=True))
        return Correspondences(
            similarity, partners, along, self.labels[index], index, self.votes, self.threshold, self.top
        )


def compared(query: Tensor, support: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """``M`` (N, h, w) of places and their partners, and how much each place lies along the support's mean.

    Args:
        query: (h, w, C).
        support: (N, i, j, C).
        partners: (N, h, w, 2), -1 for none.
    """
    n, _, width, dim = support.shape
    exists = partners[..., 0] >= 0
    flat = (partners[..., 0] * width + partners[..., 1]).clamp(min=0).view(n, -1, 1)
    there = support.flatten(1, 2).gather(1, flat.expand(-1, -1, dim)).view(n, *query.shape)
    similarity = F.cosine_similarity(query[None], there, dim=-1, eps=1e-6) * exists
    along = torch.einsum("hwc,nc->nhw", query, support.mean((1, 2)))
    return similarity, along
