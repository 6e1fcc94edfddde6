"""Dynamic subspace learners: an embedding that is cut into subspaces, one more whenever the last has room to spare.

Features ``x`` (B, C, H, W) are weighed by a map ``A = sigmoid(conv(relu(conv(relu(conv(x))))))`` and averaged, a linear
map gives D neurons, and every learner's neurons are brought to unit length. Images are clustered by their pooled
features, and a batch of cluster c trains the neurons of learner c alone, by a margin loss
``[d(a, p) - beta + m]_+ + [beta - d(a, n) + m]_+``.

When validation has not improved for a while, the neurons of the last learner are scored,
``s_j = |mean_i e_ij dL/de_ij|`` brought to [0, 1]. Those above one half stay its neurons; the rest start anew as a
further learner, and there is one more cluster. In the end the whole embedding is tuned at once. The map ``A`` serves as
a mask of what the class is told by.

Reference: Adiga V et al., 2022, "Attention-based Dynamic Subspace Learners for Medical Image Analysis",
arXiv 2206.09068; adigasu/Dynamic_subspace_learners.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_flag,
    check_int,
    check_real,
    check_type,
    check_whole,
    check_within,
    describe,
    shaped,
)
from ...extras import need
from ..protocol import TaskModel, Terms

COMPAT = (None, "authors")


class Embedded(NamedTuple):
    """Of images: vectors (B, D), every learner's part of unit length; the map (B, 1, H, W); pooled features (B, C).

    ``learner``: whose neurons the loss is to see, ``None`` for all.
    """

    vectors: Tensor
    attention: Tensor
    features: Tensor
    learner: int | None = None


class AttentionMap(nn.Module):
    """Three 3 x 3 convolutions to one map between 0 and 1; ``C -> C / 8 -> C / 32 -> 1`` channels.

    >>> sum(p.numel() for p in AttentionMap(1024).parameters())
    1216961
    """

    def __init__(self, dim: int):
        super().__init__()
        check_int("dim", dim, least=32)
        self.layer1 = nn.Conv2d(dim, dim // 8, 3, padding=1)
        self.layer2 = nn.Conv2d(dim // 8, dim // 32, 3, padding=1)
        self.layer3 = nn.Conv2d(dim // 32, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W)."""
        out: Tensor = self.layer3(self.layer2(self.layer1(x).relu()).relu()).sigmoid()
        return out


class SubspaceEmbedding(TaskModel):
    """Features of a network, weighed by a map, as an embedding of several subspaces.

    Args:
        backbone: from images to features (B, dim, H, W), or to a list of which the last is taken; ``nn.Identity()`` for
            features. Its batch norms are the caller's to freeze.
        dim: channels of the features.
        embed_dim: D.
        learners: K at the start, of ``ceil(D / K)`` neurons each.
        attention: whether features are weighed by a map; it is 1 everywhere otherwise.
        drop: dropout of pooled features.
        margin, beta, cutoff: of :func:`margin_loss`.
        compat: ``"authors"``: pairs are drawn as theirs are (see :func:`margin_loss`).

    Shape:
        images as the backbone takes them; ``learner`` whose neurons the loss sees. Returns :class:`Embedded`.

    What differs from the authors' code: features are averaged over maps of any size (14 x 14 there).

    >>> model = SubspaceEmbedding(nn.Identity(), 32, embed_dim=8, learners=3)
    >>> [len(n) for n in model.neurons()]
    [3, 3, 2]
    """

    owner: Tensor
    score: Tensor | None
    seen: int

    def __init__(
        self, backbone: nn.Module, dim: int = 1024, embed_dim: int = 128, learners: int = 1, attention: bool = True,
        drop: float = 0.01, margin: float = 0.2, beta: float = 1.2, cutoff: float = 0.5, compat: str | None = None,
    ):  # fmt: skip
        super().__init__()
        check_type("backbone", backbone, nn.Module)
        check_int("dim", dim, least=1)
        check_int("embed_dim", embed_dim, least=1)
        check_int("learners", learners, least=1, most=embed_dim)
        check_choice("compat", compat, COMPAT)
        self.backbone, self.dim, self.compat = backbone, dim, compat
        self.attention = AttentionMap(dim) if check_flag("attention", attention) else None
        self.dropout = nn.Dropout(check_real("drop", drop, least=0, below=1))
        self.embedding = nn.Linear(dim, embed_dim)
        self.margin, self.beta, self.cutoff = margin, beta, cutoff
        size = -(-embed_dim // learners)
        if size * (learners - 1) >= embed_dim:
            raise ValueError(f"learners={learners} of {size} neurons do not fit into embed_dim={embed_dim}")
        self.register_buffer("owner", torch.arange(embed_dim) // size)
        self.forget_scores()
        for rows in self.neurons():
            self._start(rows)

    # ---- subspaces

    @property
    def num_learners(self) -> int:
        return int(self.owner.max()) + 1

    def neurons(self) -> list[Tensor]:
        """The numbers of every learner's neurons: a partition of all."""
        return [(self.owner == c).nonzero().flatten() for c in range(self.num_learners)]

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        fresh = nn.Linear(self.dim, len(rows)).to(self.embedding.weight)
        nn.init.xavier_normal_(fresh.weight)
        self.embedding.weight[rows], self.embedding.bias[rows] = fresh.weight, fresh.bias

    def _units(self, x: Tensor) -> Tensor:
        """Every learner's part of unit length."""
        squares = torch.zeros_like(x).index_add(1, self.owner, x.square())
        # As normalize does it: parts of zeros stay, with gradient zero.
        length = torch.where(squares > 0, squares.clamp(min=1e-24).sqrt(), 1e-12)
        return x / length[:, self.owner]

    # ---- the protocol

    def pooled(self, images: Any) -> tuple[Tensor, Tensor]:
        """Weighed and averaged features (B, C), and the map (B, 1, H, W)."""
        x = self.backbone(images)
        x = x[-1] if isinstance(x, (list, tuple)) else x
        check_axes("features of the backbone", x, B=None, C=self.dim, H=None, W=None)
        a = x.new_ones(len(x), 1, *x.shape[2:]) if self.attention is None else self.attention(x)
        return (x * a).mean((2, 3)), a

    def forward(self, images: Any, learner: int | None = None) -> Embedded:
        if learner is not None:
            check_int("learner", learner, least=0, most=self.num_learners - 1)
        features, a = self.pooled(images)
        vectors = self._units(self.embedding(self.dropout(features)))
        if self.training and vectors.requires_grad:
            vectors.register_hook(lambda grad, e=vectors.detach(): self._note(e, grad))
        return Embedded(vectors, a, F.normalize(features, dim=1), learner)

    def loss(self, prediction: Embedded, target: Tensor) -> Terms:
        """The margin loss of one learner's neurons, or of all together; ``target``: (B,) classes."""
        vectors = prediction.vectors
        if prediction.learner is not None:
            vectors = vectors[:, self.owner == prediction.learner]
        given: dict[str, Any] = dict(margin=self.margin, beta=self.beta, cutoff=self.cutoff, compat=self.compat)
        return {"margin": margin_loss(F.normalize(vectors, dim=1), target, **given)}

    def predict(self, images: Any, learner: int | None = None) -> Embedded:
        """Vectors to compare, the map, and features to cluster, without a gradient."""
        return self(images, learner)

    @torch.no_grad()
    def masks(self, images: Tensor, threshold: float = 0.5) -> Tensor:
        """(B, 1, H, W) boolean, of the images' size: where the map, brought to [0, 1] in each image, lies above."""
        check_real("threshold", threshold, least=0, most=1)
        a = self.pooled(images)[1]
        low, high = a.amin((1, 2, 3), keepdim=True), a.amax((1, 2, 3), keepdim=True)
        a = torch.where(high > low, (a - low) / torch.where(high > low, high - low, 1.0), 0.0)
        return F.interpolate(a, images.shape[-2:], mode="bilinear", align_corners=False) > threshold

    # ---- one learner more

    @torch.no_grad()
    def _note(self, e: Tensor, grad: Tensor) -> None:
        found = (e * grad).sum(0).to(torch.promote_types(e.dtype, torch.float32))
        self.score = found if self.score is None else self.score.to(found) + found
        self.seen += len(e)

    def forget_scores(self) -> None:
        """Begin to score neurons anew, as every epoch does."""
        self.score, self.seen = None, 0

    def taylor_scores(self) -> Tensor:
        """(D,) of the last learner's neurons, between 0 and 1, from all training batches since :meth:`forget_scores`.

        Zero for the others, and for all where no neuron stands out.
        """
        last = self.owner == self.num_learners - 1
        if self.score is None:
            return torch.zeros(len(self.owner), device=self.owner.device)
        found = torch.zeros_like(self.score)
        s = (self.score[last] / self.seen).abs()
        s = s / (s.square().sum() + 1e-8).sqrt()
        if bool(s.max() > s.min()):
            found[last] = (s - s.min()) / (s.max() - s.min())
        return found

    @torch.no_grad()
    def split(
        self, optimizer: torch.optim.Optimizer | None = None, threshold: float = 0.5, least: int = 5, most: int = 10
    ) -> bool:
        """Cut the last learner: what it needs stays, the rest starts anew as one learner more.

        Args:
            optimizer: whose moments of the learner's rows are set to zero, since other weights stand there now.
            threshold: of :meth:`taylor_scores`; neurons above stay.
            least: of neurons that must stay, or nothing is done.
            most: of neurons of a learner that is too small to be cut.

        Returns:
            Whether there is one learner more.
        """
        check_real("threshold", threshold, least=0, below=1)
        rows, scores = self.neurons()[-1], self.taylor_scores()
        order = rows[scores[rows].argsort(descending=True, stable=True)]
        kept = order[scores[order] > threshold]
        if len(rows) <= most or len(kept) < check_int("least", least, least=1):
            return False
        first, rest = rows[: len(kept)], rows[len(kept) :]
        layer = self.embedding
        if self.compat == "authors":  # one by one: a row may be overwritten before it is read
            for to, source in zip(first.tolist(), kept.tolist(), strict=True):
                layer.weight[to], layer.bias[to] = layer.weight[source].clone(), layer.bias[source].clone()
        else:
            weight, bias = layer.weight[kept].clone(), layer.bias[kept].clone()
            layer.weight[first], layer.bias[first] = weight, bias
        self.owner[rest] = self.num_learners
        self._start(rest)
        if optimizer is not None:
            for p in (layer.weight, layer.bias):
                for moment in optimizer.state.get(p, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == p.shape:
                        moment[rows] = 0
        self.forget_scores()
        return True


@shaped(vectors="float (B, D)")
def margin_loss(
    vectors: Tensor, target: Tensor, margin: float = 0.2, beta: float | Tensor = 1.2, cutoff: float = 0.5,
    compat: str | None = None, nu: float = 0.0,
) -> Tensor:  # fmt: skip
    """``(sum [d(a, p) - beta + m]_+ + [beta - d(a, n) + m]_+ + nu |beta|) / P`` over pairs, P of which are not zero.

    Every anchor has its k positives and, drawn by distance, the k nearest negatives that lie at ``cutoff`` or beyond
    (nearer ones where there are not so many).

    Args:
        vectors: usually of unit length.
        target: (B,) classes.
        margin: m.
        beta: the border between near and far: a number, a tensor of one that is trained, or of one for every class.
        cutoff: least distance of a negative, unless there are too few.
        compat: ``"authors"``: all anchors get as many negatives as anchors have positives on average, and lists of
            pairs are cut to the shortest, which joins anchors with positives of others where classes are unequal.
        nu: of the sum of ``beta`` over anchors that takes part, one summand of every pair; of a single ``beta``, once.

    Raises:
        ValueError: no two samples of one class, or none of another.

    >>> margin_loss(torch.tensor([[0.0], [0.0], [9.0]]), torch.tensor([0, 0, 1])).item()
    0.0
    """
    check_whole("target", target)
    if target.shape != vectors.shape[:1]:
        raise ValueError(f"target must be ({len(vectors)},), got {tuple(target.shape)}")
    check_choice("compat", compat, COMPAT)
    check_real("nu", nu, least=0)
    if isinstance(beta, Tensor):
        if beta.dim() > 1 or not beta.is_floating_point() or not beta.numel():
            raise ValueError(f"beta must be a number, or a tensor of one for every class, got {describe(beta)}")
        if beta.numel() > 1:
            check_within("target", target, beta.numel(), "class")
    n = len(vectors)
    with torch.no_grad():
        x = vectors.detach()
        square = (x @ x.mT).diagonal()
        d = (square[:, None] + square[None] - 2 * (x @ x.mT)).clamp(min=1e-4).sqrt()
        same = target[:, None] == target[None]
        pairs = same & ~torch.eye(n, dtype=torch.bool, device=x.device)
        positives = pairs.sum(1)
        if not bool(positives.any()) or bool(same.all()):
            raise ValueError("target leaves no pair: it needs two samples of one class and one of another")
        if compat == "authors":
            each = int(positives.sum()) // n
            far = d + 1e6 * (pairs.to(d) + (d < cutoff).to(d)).clamp(max=1)
            drawn = far.topk(max(1, min(each, n)), dim=1, largest=False)[1].sort(1).values
            anchors, partners, negatives = _as_theirs(pairs, drawn, each)
        else:
            far = torch.where(d < cutoff, d + 1e3, d).masked_fill(same, float("inf"))
            order = far.argsort(dim=1, stable=True)
            count = torch.minimum(positives, (~same).sum(1))
            anchors, partners = pairs.nonzero().unbind(1)
            turn = torch.cat([torch.arange(int(k), device=x.device) for k in positives])
            # Where there are fewer negatives than positives they are taken again, from the nearest on.
            negatives = order[anchors, turn % count[anchors].clamp(min=1)]
    near = ((vectors[partners] - vectors[anchors]).square().sum(1) + 1e-8).sqrt()
    away = ((vectors[negatives] - vectors[anchors]).square().sum(1) + 1e-8).sqrt()
    border = beta[target[anchors]] if isinstance(beta, Tensor) and beta.numel() > 1 else beta
    pull, push = (near - border + margin).relu(), (border - away + margin).relu()
    active = ((pull > 0) | (push > 0)).sum()
    total = (pull + push).sum()
    if nu:
        total = total + nu * torch.where(active > 0, torch.as_tensor(border, dtype=total.dtype).abs().sum(), 0.0)
    return total / active.clamp(min=1)


def _as_theirs(pairs: Tensor, drawn: Tensor, each: int) -> tuple[Tensor, Tensor, Tensor]:
    lists: list[list[int]] = [[], [], []]
    for i in range(len(pairs)):
        lists[0] += [i] * each
        lists[1] += pairs[i].nonzero().flatten().tolist()
        lists[2] += drawn[i].tolist()
        shortest = min(map(len, lists))
        lists = [one[:shortest] for one in lists]
    made = [torch.tensor(one, dtype=torch.long, device=pairs.device) for one in lists]
    return made[0], made[1], made[2]


def clusters(
    features: Tensor, count: int, target: Tensor | None = None, previous: Tensor | None = None, seed: int = 0,
    compat: str | None = None,
) -> Tensor:  # fmt: skip
    """(N,) the learner of every sample: k-means, named as the clusters that were before as far as possible.

    Args:
        features: (N, C), pooled, of unit length.
        count: K.
        target: (N,) classes; a sample that is alone with its class in a cluster trains nobody: -1.
        previous: (N,) of the last time; which cluster is whose is chosen so that most samples stay.
        seed: of k-means.
        compat: ``"authors"``: the assignment of names is read the wrong way round, as theirs is.
    """
    check_axes("features", features, N=None, C=None)
    check_int("count", count, least=1, most=max(1, len(features)))
    check_choice("compat", compat, COMPAT)
    if not bool(features.isfinite().all()):
        raise ValueError("features hold numbers that are not finite: they lie in no cluster")
    numbers = torch.zeros(len(features), dtype=torch.long)
    if count > 1:
        kmeans = need("sklearn.cluster", "clusters").KMeans(count, n_init=5, random_state=seed)
        numbers = torch.from_numpy(kmeans.fit(features.detach().double().cpu().numpy()).labels_).long()
    if previous is not None and count > 1:
        numbers = renamed(numbers, previous, count, compat)
    if target is not None:
        for c in range(count):
            for value in target.cpu()[numbers == c].unique().tolist():
                alone = (numbers == c) & (target.cpu() == value)
                if int(alone.sum()) == 1:
                    numbers = numbers.masked_fill(alone, -1)
    return numbers


def renamed(numbers: Tensor, previous: Tensor, count: int, compat: str | None = None) -> Tensor:
    """Clusters under the names of those before with which they share most samples.

    >>> renamed(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([2, 2, 0, 0, 1]), 3).tolist()
    [2, 2, 0, 0, 1]
    """
    if numbers.shape != previous.shape:
        raise ValueError(f"previous must be of the same {len(numbers)} samples, got {len(previous)}")
    now, before = ((t[None] == torch.arange(count)[:, None]).double() for t in (numbers, previous))
    cost = (now[:, None] - before[None]).abs().sum(-1)
    rows, columns = need("scipy.optimize", "clusters").linear_sum_assignment(cost.numpy())
    out = numbers.clone()
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        if compat == "authors":
            out[numbers == column] = row
        else:
            out[numbers == row] = column
    return out


class Schedule:
    """When to cluster anew, when to cut the last learner, when to tune all at once.

    Args:
        patience: epochs without a better validation before the last learner is looked at, once per best epoch.
        recluster: epochs between clusterings.
        finetune: epoch from which the whole embedding is trained.
    """

    def __init__(self, patience: int = 10, recluster: int = 2, finetune: int = 250):
        self.patience = check_int("patience", patience, least=1)
        self.recluster = check_int("recluster", recluster, least=1)
        self.finetune = check_int("finetune", finetune, least=1)
        self.best, self.best_epoch, self.open = float("-inf"), -1, True

    def whole(self, epoch: int) -> bool:
        """Whether all neurons are trained together in this epoch."""
        return epoch >= self.finetune

    def clusters_anew(self, epoch: int, learners: int) -> bool:
        """Whether samples are clustered before this epoch."""
        return epoch == 0 or (learners > 1 and not self.whole(epoch) and epoch % self.recluster == 0)

    def cuts(self, epoch: int, value: float) -> bool:
        """Tell the validation (higher is better) of an epoch: whether the last learner is to be cut now.

        :meth:`was_cut` says that it was.
        """
        if check_real("value", value) > self.best:
            self.best, self.best_epoch, self.open = value, epoch, True
        return 0 < epoch < self.finetune and epoch >= self.best_epoch + self.patience and self.open

    def was_cut(self) -> None:
        """The last learner was cut: none is cut again before validation is better."""
        self.open = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_epoch": self.best_epoch, "open": self.open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_epoch, self.open = state["best"], state["best_epoch"], state["open"]
