"""Scale-invariant features of things in scenes, learnt from boxes without identities.

A feature ``f_i`` of each box of a scene is drawn to features ``g_i^k`` of its crop at several scales, against the
hardest crop of another box:

    ``L_s = mean_i log(1 + exp((max_{j != i, k} f_i . g_j^k - min_k f_i . g_i^k) / tau))``.

A memory bank keeps one feature per box, ``V_i <- norm(m V_i + (1 - m) f_i)``. What is similar enough, ``f_i . V_j >
lambda``, counts as the same (``lambda`` falls while training goes on), never two boxes of one image; a multi-label loss
draws such together and pushes the hardest of the others away. Clusters (DBSCAN) of the bank give pseudo identities for
a contrast with their means.

Reference: Wang et al., 2023, "Self-similarity Driven Scale-invariant Learning for Weakly Supervised Person Search",
arXiv 2302.12986. No code was released: which pieces there are is the paper's, their formulas are our reading
(MMCL's multi-label loss, SpCL's contrast with means).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_int, check_real, check_type, check_whole, describe, readable, shaped
from ...extras import need
from ..detect.regions import roi_align
from ..protocol import Step, TaskModel, Terms, split_batch, trained


class Instances(NamedTuple):
    """Of the boxes of a batch: features (N, D) of the scene and (N, K, D) of the crops, all of unit length."""

    scene: Tensor
    exemplars: Tensor


class Known(NamedTuple):
    """Of the boxes of a batch: their numbers (N,) in the bank, and lambda, the similarity from which two are one."""

    number: Tensor
    threshold: float


@shaped(scene="alike (N, D)", exemplars="alike (N, K, D)", same="bool (N, N)")
def scale_invariant_loss(
    scene: Tensor, exemplars: Tensor, temperature: float = 0.1, same: Tensor | None = None
) -> Tensor:
    """The hardest of one's own scales against the hardest of all others; zero for a batch of one.

    Args:
        scene: f, of unit length.
        exemplars: g, of unit length.
        temperature: tau.
        same: boxes that count as one thing: their crops are no others of each other.

    >>> f = torch.eye(2)
    >>> scale_invariant_loss(f, f[:, None], 0.01).item() < 1e-6  # one's own is nearest by far
    True
    """
    check_real("temperature", temperature, above=0)
    if not exemplars.shape[1]:
        raise ValueError("exemplars must have one scale at least, got none")
    if len(scene) < 2:
        return (scene.sum() + exemplars.sum()) * 0
    products = torch.einsum("nd,mkd->nmk", scene, exemplars)
    one = torch.eye(len(scene), dtype=torch.bool, device=scene.device)
    one = one if same is None else one | same
    own = products.diagonal().mT.amin(1)
    other = products.amax(2).masked_fill(one, float("-inf")).amax(1)  # -inf where all are one thing: no loss
    return F.softplus((other - own) / temperature).mean()


class MemoryBank(nn.Module):
    """One feature of unit length for every box of a collection; nothing of it has a gradient.

    Args:
        count: boxes.
        dim: width of features.
        image: (count,) which image a box lies in; two of one image are never the same.
        momentum: m, of what is there already.
    """

    values: Tensor
    image: Tensor
    filled: Tensor

    def __init__(self, count: int, dim: int, image: Tensor | Sequence[int] | None = None, momentum: float = 0.8):
        super().__init__()
        check_int("count", count, least=1)
        self.momentum = check_real("momentum", momentum, least=0, below=1)
        self.register_buffer("values", torch.zeros(count, check_int("dim", dim, least=1)))
        where = torch.arange(count) if image is None else torch.as_tensor(image)
        check_whole("image", where)
        if where.shape != (count,):
            raise ValueError(f"image must be ({count},), one number per box, got {describe(where)}")
        self.register_buffer("image", where.long())
        self.register_buffer("filled", torch.zeros(count, dtype=torch.bool))

    def _number(self, number: Tensor) -> Tensor:
        """Numbers of boxes; short whole numbers would be masks where they point."""
        check_whole("number", number)
        if number.dim() != 1:
            raise ValueError(f"number must be (N,), got {describe(number)}")
        if readable(number) and len(number):
            if not 0 <= int(number.min()) <= int(number.max()) < len(self.values):
                raise ValueError(f"number must lie in [0, {len(self.values) - 1}], got {number.tolist()}")
            if len(number.unique()) < len(number):
                raise ValueError(f"number names a box twice, got {number.tolist()}")
        return number.long()

    @torch.no_grad()
    def update(self, number: Tensor, features: Tensor) -> None:
        """Take features (N, D) of some boxes."""
        number = self._number(number)
        check_axes("features", features, N=len(number), D=self.values.shape[1])
        old, new = self.values[number], F.normalize(features.detach().to(self.values), dim=1)
        mixed = F.normalize(self.momentum * old + (1 - self.momentum) * new, dim=1)
        # A mixture of opposites is nothing: what is new counts then, as it does where nothing is held yet.
        keep = self.filled[number, None] & (mixed.norm(dim=1, keepdim=True) > 0.5)
        self.values[number] = torch.where(keep, mixed, new)
        self.filled[number] = True

    def apart(self, number: Tensor) -> Tensor:
        """(N, count) which pairs cannot be one: two boxes of an image, and what the bank does not hold."""
        number = number.long()
        same_image = self.image[number][:, None] == self.image[None]
        itself = number[:, None] == torch.arange(len(self.values), device=number.device)[None]
        return (same_image & ~itself) | ~(self.filled[None] | itself)

    def labels(self, features: Tensor, number: Tensor, threshold: float) -> Tensor:
        """(N, count) boolean: what is as similar as ``threshold`` asks, and each box itself.

        Lowering the threshold never takes one away.
        """
        number = self._number(number)
        check_real("threshold", threshold, least=-1, most=1)
        itself = number[:, None] == torch.arange(len(self.values), device=number.device)[None]
        near = features.detach().to(self.values) @ self.values.mT >= threshold
        return (near & ~self.apart(number)) | itself


@shaped(features="float (N, D)", positive="bool (N, M)", apart="bool (N, M)")
def multi_label_loss(
    features: Tensor, bank: Tensor, positive: Tensor, apart: Tensor, weight: float = 5.0, hardest: float = 0.01
) -> Tensor:
    """Similarities to positives are drawn to 1, those to the hardest of the rest to -1, by squares.

    Args:
        features: of unit length.
        bank: (M, D).
        positive: which are the same.
        apart: which two cannot be; they do count among the rest only when nothing else is known of them, that is not.
        weight: of the positives.
        hardest: share of the rest that counts.
    """
    check_real("weight", weight, least=0)
    check_real("hardest", hardest, above=0, most=1)
    scores = features @ bank.detach().to(features).mT
    pull = ((scores - 1).square() * positive).sum(1) / positive.sum(1).clamp(min=1)
    rest = ~positive & ~apart
    count = (rest.sum(1).double() * hardest).ceil().long()
    most = max(1, int(count.max())) if len(count) else 1
    top = scores.masked_fill(~rest, -1.0).topk(min(most, scores.shape[1]), dim=1).values
    use = torch.arange(top.shape[1], device=top.device) < count[:, None]
    push = ((top + 1).square() * use).sum(1) / count.clamp(min=1)
    return (weight * pull + push).mean()


def identities(bank: MemoryBank, eps: float = 0.5, min_samples: int = 2) -> Tensor:
    """(count,) pseudo identities by DBSCAN on the bank's distances; a box in no cluster is one of its own.

    Two boxes of one image are infinitely far from each other; where a chain joins them all the same, all but the one
    nearest to the cluster's mean leave it.
    """
    check_type("bank", bank, MemoryBank)
    check_real("eps", eps, above=0)
    values = bank.values.double()
    distance = (2 - 2 * values @ values.mT).clamp(min=0).sqrt()
    everyone = torch.arange(len(values), device=values.device)
    distance = distance.masked_fill(bank.apart(everyone), 10.0).fill_diagonal_(0)
    dbscan = need("sklearn.cluster", "pseudo identities").DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed")
    labels = torch.from_numpy(dbscan.fit(torch.maximum(distance, distance.mT).cpu().numpy()).labels_).long()
    image, values = bank.image.cpu(), values.cpu()
    for c in range(int(labels.max()) + 1 if len(labels) else 0):
        mine = (labels == c).nonzero().flatten()
        near = values[mine] @ values[mine].mean(0)
        for where in image[mine].unique():
            twins = mine[image[mine] == where]
            if len(twins) > 1:
                best = twins[near[image[mine] == where].argmax()]
                labels[twins[twins != best]] = -1
    alone = (labels < 0).nonzero().flatten()
    labels[alone] = int(labels.max()) + 1 + torch.arange(len(alone))
    return labels.unique(return_inverse=True)[1].to(bank.values.device)


def cluster_contrast(
    features: Tensor, number: Tensor, labels: Tensor, bank: MemoryBank, temperature: float = 0.05
) -> Tensor:
    """The cross-entropy of each feature among the means of all clusters.

    Args:
        features: (N, D), of unit length.
        number: (N,) of boxes.
        labels: (count,) of :func:`identities`.
        bank: whose features the means are of.
        temperature: of the softmax.
    """
    check_real("temperature", temperature, above=0)
    if labels.shape != bank.image.shape:
        raise ValueError(f"labels must be ({len(bank.image)},), one per box of the bank, got {describe(labels)}")
    sums = bank.values.new_zeros(int(labels.max()) + 1, bank.values.shape[1]).index_add(0, labels, bank.values)
    means = F.normalize(sums, dim=1).to(features)
    return F.cross_entropy(features @ means.mT / temperature, labels[number.long()])


def falling(start: float, end: float, share: float) -> float:
    """lambda after a share of the training, from ``start`` to ``end`` along a half cosine.

    >>> falling(0.9, 0.5, 0.0), round(falling(0.9, 0.5, 0.5), 6), falling(0.9, 0.5, 1.0)
    (0.9, 0.7, 0.5)
    """
    for name, value in (("start", start), ("end", end)):
        check_real(name, value, least=-1, most=1)
    check_real("share", share, least=0, most=1)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


class ScaleInvariantSearch(TaskModel):
    """Features of boxes that do not depend on how large a thing appears.

    Args:
        backbone: from images to maps (B, C, H, W).
        dim: C.
        bank: features of all boxes of the collection.
        embed_dim: D, of features.
        size: pixels a side of the crop at scale one.
        scales: of the crops, in sides; the first is the original and three others follow in the paper.
        cells: of a box on the map of a scene, a side.
        temperature: of the scale-invariant loss.

    Shape:
        images: (B, 3, H, W); ``boxes``: (N, 5), the image's number, left, top, right, bottom in pixels. Returns
        :class:`Instances`. ``target`` of the loss: :class:`Known`.
    """

    identity: Tensor

    def __init__(
        self, backbone: nn.Module, dim: int, bank: MemoryBank, embed_dim: int = 256, size: int = 64,
        scales: Sequence[float] = (1.0, 0.5, 0.75, 1.5), cells: int = 4, temperature: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        check_type("bank", bank, MemoryBank)
        self.backbone, self.cells = backbone, check_int("cells", cells, least=1)
        self.embedding = nn.Linear(check_int("dim", dim, least=1), check_int("embed_dim", embed_dim, least=1))
        if bank.values.shape[1] != embed_dim:
            raise ValueError(f"bank holds features of width {bank.values.shape[1]}, embed_dim is {embed_dim}")
        self.bank = bank
        self.size = check_int("size", size, least=1)
        self.scales = tuple(check_real("scales", s, above=0) for s in scales)
        if not self.scales:
            raise ValueError("scales must name one at least, got none")
        self.temperature = check_real("temperature", temperature, above=0)
        self.register_buffer("identity", torch.full_like(bank.image, -1))

    def _boxes(self, images: Tensor, boxes: Tensor) -> None:
        check_axes("boxes", boxes, N=None, **{"image, left, top, right, bottom": 5})
        if not readable(boxes) or not len(boxes):
            return
        if not bool((boxes[:, 3:] > boxes[:, 1:3]).all()):
            bad = (boxes[:, 3:] <= boxes[:, 1:3]).any(1).nonzero().flatten().tolist()
            raise ValueError(f"boxes must have left < right and top < bottom; those at {bad} have not")
        if not 0 <= int(boxes[:, 0].min()) <= int(boxes[:, 0].max()) < len(images):
            raise ValueError(f"boxes name images outside [0, {len(images) - 1}]: {boxes[:, 0].unique().tolist()}")

    def _embedded(self, cells: Tensor) -> Tensor:
        return F.normalize(self.embedding(cells.mean((2, 3))), dim=1)

    def embed(self, images: Tensor, boxes: Tensor) -> Tensor:
        """(N, D) of boxes in their scenes."""
        self._boxes(images, boxes)
        maps = self.backbone(images)
        return self._embedded(roi_align(maps, boxes.to(maps), self.cells, maps.shape[-1] / images.shape[-1]))

    def exemplars(self, images: Tensor, boxes: Tensor) -> Tensor:
        """(N, K, D) of the crops of boxes at every scale."""
        self._boxes(images, boxes)
        found = []
        for scale in self.scales:
            side = max(1, round(self.size * scale))
            crops = roi_align(images, boxes.to(images), side, samples=1 if side >= self.size else 2)
            found.append(self._embedded(self.backbone(crops)))
        return torch.stack(found, 1)

    def forward(self, images: Tensor, boxes: Tensor) -> Instances:
        return Instances(self.embed(images, boxes), self.exemplars(images, boxes))

    def loss(self, prediction: Instances, target: Known) -> Terms:
        """Scales, labels by similarity, and clusters once :meth:`cluster` was called."""
        f, bank = prediction.scene, self.bank
        number, threshold = target
        labels = bank.labels(f, number, threshold)
        same = labels[:, number] | labels[:, number].mT
        terms = {
            "scale": scale_invariant_loss(f, prediction.exemplars, self.temperature, same),
            "labels": multi_label_loss(f, bank.values, labels, bank.apart(number)),
        }
        if bool((self.identity >= 0).any()):
            terms["clusters"] = cluster_contrast(f, number, self.identity, bank)
        return terms

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """One update; the bank takes the features that the loss was computed from behind it."""
        inputs, target = split_batch(self, batch)
        made: list[Instances] = []

        def terms() -> Terms:
            made.append(self(**inputs))
            return self.loss(made[-1], target)

        yield Step("all", trained(self), terms)
        if made:
            self.bank.update(target[0], made[-1].scene)

    def cluster(self, eps: float = 0.5, min_samples: int = 2) -> Tensor:
        """Give every box of the bank an identity, from now on part of the loss; see :func:`identities`."""
        self.identity.copy_(identities(self.bank, eps, min_samples))
        return self.identity

    def predict(self, images: Tensor, boxes: Tensor) -> Tensor:
        """(N, D) features to search by, of unit length."""
        return self.embed(images, boxes)
