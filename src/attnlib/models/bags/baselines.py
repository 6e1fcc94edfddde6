"""What bags are classified by beside ACMIL, as its release has them: every model that it is compared with there.

All read features of instances ``x`` (B, N, C) and which of them exist:

- :class:`InstanceMIL`: classes of every instance, then their mean or maximum.
- :class:`DSMIL` (Li et al., 2021, arXiv 2011.08939): the instance that scores highest for a class asks all.
- :class:`CLAM` (Lu et al., 2021, arXiv 2004.09666): gated attention, one branch or one per class; what it weighs most
  and least is told apart by classifiers of instances.
- :class:`TransMIL` (Shao et al., 2021, arXiv 2106.00908): two layers of Nystrom attention over the bag, laid out as a
  square, with convolutions of three sizes between them.
- :class:`ILRA` (Xiang et al., 2023, "Exploring Low-Rank Property in Multiple Instance Learning", ICLR): instances
  exchange what they know through a few latent vectors; one more set of these pools.
- :class:`IBMIL` (Lin et al., 2023, arXiv 2303.06873): gated attention, and what the bag's vector reads of confounders,
  which are vectors of clusters of bags.
- :class:`DTFD` (Zhang et al., 2022, arXiv 2203.12081): a bag is cut into pseudo-bags at random; what gated attention
  makes of each tells which of its instances a second gated attention reads.
- :class:`LBMIL`: the classifier of bags weighs the instances, too, by the exponentials of its scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_choice,
    check_divides,
    check_flag,
    check_float,
    check_int,
    check_real,
    describe,
)
from ...nn.layers import merge_heads, split_heads
from ...nn.pools.acmil import ACMILPool
from ...nn.released import Released, Rule
from ...ops.landmarks import cubic_inverse
from ..build import register_models
from ..protocol import TaskModel, Terms
from .acmil import check_bags, check_classes

ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class BagScores(NamedTuple):
    """What is said of bags.

    Args:
        logits: (B, classes).
        instances: (B, N, classes) logits of every instance, ``-inf`` of those that do not exist; (B, N, 0) of a model
            that scores none.
        weights: (B, H, N) of the instances; (B, 0, N) of a model without.
        features: (B, N, D) of the instances, behind the first map.
    """

    logits: Tensor
    instances: Tensor
    weights: Tensor
    features: Tensor


class Bags(TaskModel):
    """A classifier of bags; a subclass says what it makes of them in :meth:`read`.

    Args:
        in_chans: width of the features of an instance.
        num_classes: classes.
    """

    input_name = "embed.weight"

    def __init__(self, in_chans: int, num_classes: int):
        super().__init__()
        self.in_chans = check_int("in_chans", in_chans, least=1)
        self.num_classes = check_int("num_classes", num_classes, least=1)

    def read(self, bags: Tensor, valid: Tensor) -> BagScores:
        """Of bags whose absent instances are zeros."""
        raise NotImplementedError

    def forward(self, bags: Tensor, valid: Tensor | None = None) -> BagScores:
        """Classes of bags.

        Args:
            bags: (B, N, in_chans).
            valid: (B, N) boolean: which instances exist, one of every bag at least.

        Raises:
            ValueError: another shape, an empty bag.
        """
        bags = check_bags(bags, valid, self.in_chans)
        return self.read(bags, bags.new_ones(bags.shape[:2], dtype=torch.bool) if valid is None else valid)

    def _told(
        self, logits: Tensor, features: Tensor, weights: Tensor | None = None, instances: Tensor | None = None
    ) -> BagScores:
        none = features[..., :0]
        return BagScores(
            logits, none if instances is None else instances, none.mT if weights is None else weights, features
        )

    def loss(self, prediction: BagScores, target: Tensor) -> Terms:
        """``bag``: cross entropy.

        Args:
            prediction: of :meth:`forward`.
            target: (B,) classes.
        """
        check_classes(prediction.logits, target, self.num_classes)
        return {"bag": F.cross_entropy(prediction.logits, target)}

    def predict(self, bags: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, classes) probabilities."""
        return self(bags, valid).logits.softmax(-1)


def _weighed(scores: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the instances that exist, (B, H, N)."""
    return scores.masked_fill(~valid.unsqueeze(1), -torch.inf).softmax(-1)


def _xavier(module: nn.Module, bias: bool = True) -> None:
    """Normal numbers by Xavier in all linear maps; their biases are 0, or as torch has them."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_normal_(m.weight)
            if bias and m.bias is not None:
                nn.init.zeros_(m.bias)


class InstanceMIL(Bags):
    """Logits of every instance by two linear maps; of the bag, their mean or maximum over the instances.

    Args:
        in_chans, num_classes: as of :class:`Bags`.
        dim: width between the maps.
        reduce: ``"mean"`` or ``"max"``.
        act: ``"relu"``, ``"gelu"`` or none.
        drop: dropout before the second map.

    >>> InstanceMIL(8, 2, 8).eval()(torch.randn(3, 5, 8)).instances.shape
    torch.Size([3, 5, 2])
    """

    def __init__(
        self, in_chans: int = 192, num_classes: int = 2, dim: int = 192, reduce: str = "mean", act: str | None = "relu",
        drop: float = 0.25,
    ):  # fmt: skip
        super().__init__(in_chans, num_classes)
        check_choice("reduce", reduce, ("mean", "max"))
        check_choice("act", act, (None, *ACTS))
        self.reduce = reduce
        self.embed = nn.Linear(in_chans, check_int("dim", dim, least=1))
        self.act = nn.Identity() if act is None else ACTS[act]()
        self.drop = nn.Dropout(check_real("drop", drop, least=0, below=1))
        self.head = nn.Linear(dim, num_classes)
        _xavier(self)

    def read(self, bags: Tensor, valid: Tensor) -> BagScores:
        features = self.act(self.embed(bags))
        each, absent = self.head(self.drop(features)), ~valid.unsqueeze(-1)
        if self.reduce == "mean":
            logits = each.masked_fill(absent, 0.0).sum(1) / valid.sum(1, keepdim=True).to(each.dtype)
        else:
            logits = each.masked_fill(absent, -torch.inf).amax(1)
        return self._told(logits, features, None, each.masked_fill(absent, -torch.inf))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``MeanMIL`` or ``MaxMIL``."""
        theirs = Released(state_dict, "the release's MeanMIL or MaxMIL")
        last = r"head\.[123]\.(weight|bias)"
        return theirs.close(theirs.renamed({r"head\.0\.(weight|bias)": r"embed.\1", last: r"head.\1"}))


class DSMIL(Bags):
    """The instance that scores highest for a class is the query of that class; the bag's vectors are classified
    together, by a convolution over all of them.

    Args:
        in_chans, num_classes: as of :class:`Bags`.
        dim: width of queries, or of what lies before them.
        nonlinear: queries by two maps with a ReLU between them and a tanh behind.
        query_dim: width of queries, for ``nonlinear``.
        values: instances are read through a map and a ReLU, behind dropout; as they are otherwise.
        drop: that dropout.

    ``loss`` has ``bag`` and ``instances``, half the cross entropy of the highest scores of instances; ``predict`` is
    the mean of both.

    >>> DSMIL(8, 2, 8).eval()(torch.randn(3, 5, 8)).weights.shape
    torch.Size([3, 2, 5])
    """

    head_names = ("head.", "instance.")
    input_name = "instance.weight"

    def __init__(
        self, in_chans: int = 384, num_classes: int = 2, dim: int = 128, nonlinear: bool = False, query_dim: int = 128,
        values: bool = False, drop: float = 0.0,
    ):  # fmt: skip
        super().__init__(in_chans, num_classes)
        check_int("dim", dim, least=1)
        check_int("query_dim", query_dim, least=1)
        self.instance = nn.Linear(in_chans, num_classes)
        maps: list[nn.Module] = [nn.Linear(in_chans, dim)]
        if check_flag("nonlinear", nonlinear):
            maps += [nn.ReLU(), nn.Linear(dim, query_dim), nn.Tanh()]
        self.query = nn.Sequential(*maps)
        held = [nn.Dropout(check_real("drop", drop, least=0, below=1)), nn.Linear(in_chans, in_chans), nn.ReLU()]
        self.value = nn.Sequential(*(held if check_flag("values", values) else []))
        self.head = nn.Conv1d(num_classes, num_classes, in_chans)

    def read(self, bags: Tensor, valid: Tensor) -> BagScores:
        each = self.instance(bags).masked_fill(~valid.unsqueeze(-1), -torch.inf)
        queries = self.query(bags)
        first = each.argmax(1).unsqueeze(-1).expand(-1, -1, queries.shape[-1])
        weights = _weighed(queries.gather(1, first) @ queries.mT / math.sqrt(queries.shape[-1]), valid)
        return self._told(self.head(weights @ self.value(bags)).squeeze(-1), bags, weights, each)

    def loss(self, prediction: BagScores, target: Tensor) -> Terms:
        check_classes(prediction.logits, target, self.num_classes)
        return {
            "bag": 0.5 * F.cross_entropy(prediction.logits, target),
            "instances": 0.5 * F.cross_entropy(prediction.instances.amax(1), target),
        }

    def predict(self, bags: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        found = self(bags, valid)
        return (found.logits.softmax(-1) + found.instances.amax(1).softmax(-1)) / 2

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``MILNet`` of a ``FCLayer`` and a ``BClassifier``."""
        theirs = Released(state_dict, "the release's MILNet")
        rules: dict[str, Rule] = {
            r"i_classifier\.fc(?:\.0)?\.(weight|bias)": r"instance.\1",
            r"b_classifier\.q\.(weight|bias)": r"query.0.\1",
            r"b_classifier\.q\.([02])\.(weight|bias)": r"query.\1.\2",
            r"b_classifier\.v\.1\.(weight|bias)": r"value.1.\1",
            r"b_classifier\.fcc\.(weight|bias)": r"head.\1",
        }
        return theirs.close(theirs.renamed(rules))


class CLAM(Bags):
    """Gated attention; ``k`` instances of the highest weights and ``k`` of the lowest train classifiers of instances.

    Args:
        in_chans, num_classes: as of :class:`Bags`.
        dim: width of instances behind the first map.
        hidden_dim: of the attention.
        per_class: a branch of attention for every class (CLAM-MB); weights are then ``exp a / (1 + sum exp a)``. One
            branch for all otherwise (CLAM-SB).
        gate: attention ``w^T (tanh(V h) * sigmoid(U h))``; ``w^T tanh(V h)`` without.
        drop: dropout behind the first map, and inside the attention.
        k: how many instances; all, of smaller bags.
        subtyping: of classes that a bag does not have, the highest are trained to be nothing; by default where there
            are more than two.
        bag_weight: of the bag's cross entropy; the instances' has the rest. The release has 1.

    >>> CLAM(8, 3, 8, 4).eval()(torch.randn(2, 5, 8)).weights.shape
    torch.Size([2, 1, 5])
    """

    head_names = ("head.", "judges.")

    def __init__(
        self, in_chans: int = 384, num_classes: int = 2, dim: int = 128, hidden_dim: int = 128, per_class: bool = False,
        gate: bool = True, drop: float = 0.25, k: int = 8, subtyping: bool | None = None, bag_weight: float = 0.7,
    ):  # fmt: skip
        super().__init__(in_chans, num_classes)
        check_int("dim", dim, least=1)
        check_int("hidden_dim", hidden_dim, least=1)
        self.per_class, self.k = check_flag("per_class", per_class), check_int("k", k, least=1)
        self.subtyping = num_classes > 2 if subtyping is None else check_flag("subtyping", subtyping)
        self.bag_weight = check_real("bag_weight", bag_weight, least=0, most=1)
        self.embed, self.drop = nn.Linear(in_chans, dim), nn.Dropout(check_real("drop", drop, least=0, below=1))
        self.v = nn.Linear(dim, hidden_dim)
        self.u = nn.Linear(dim, hidden_dim) if check_flag("gate", gate) else None
        self.score = nn.Linear(hidden_dim, num_classes if per_class else 1)
        self.head = nn.Linear(dim, num_classes)
        self.judges = nn.ModuleList(nn.Linear(dim, 2) for _ in range(num_classes))
        _xavier(self)
        if per_class:  # a map of its own for every class
            for row in self.head.weight.split(1):
                nn.init.xavier_normal_(row)

    def read(self, bags: Tensor, valid: Tensor) -> BagScores:
        h = self.drop(F.relu(self.embed(bags)))
        hidden = self.drop(self.v(h).tanh())
        hidden = hidden if self.u is None else hidden * self.drop(self.u(h).sigmoid())
        scores = self.score(hidden).mT
        if self.per_class:
            weights = _weighed(F.pad(scores, (0, 1)), F.pad(valid, (0, 1), value=True))[..., :-1]
            logits = torch.einsum("bkd,kd->bk", weights @ h, self.head.weight) + self.head.bias
        else:
            weights = _weighed(scores, valid)
            logits = self.head((weights @ h).squeeze(1))
        return self._told(logits, h, weights)

    def loss(self, prediction: BagScores, target: Tensor) -> Terms:
        """``bag`` and ``instances``, weighed."""
        check_classes(prediction.logits, target, self.num_classes)
        found = []
        for weights, h, label in zip(prediction.weights, prediction.features, target.tolist(), strict=True):
            there = (weights > 0).any(0)
            weights, h = weights[:, there], h[there]
            k = min(self.k, len(h))
            terms = []
            for c, judge in enumerate(self.judges):
                own = weights[c if self.per_class else 0]
                best, worst = own.topk(k).indices, (-own).topk(k).indices
                if c == label:
                    answers = judge(torch.cat([h[best], h[worst]]))
                    right = torch.arange(2 * k, device=h.device) < k
                elif self.subtyping:
                    answers, right = judge(h[best]), best < 0
                else:
                    continue
                terms.append(F.cross_entropy(answers, right.long()))
            found.append(torch.stack(terms).sum() / (len(self.judges) if self.subtyping else 1))
        return {
            "bag": self.bag_weight * F.cross_entropy(prediction.logits, target),
            "instances": (1 - self.bag_weight) * torch.stack(found).mean(),
        }

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``CLAM_SB`` or ``CLAM_MB``, with and without dropout and gates."""
        theirs = Released(state_dict, "the release's CLAM")
        held = r"(weight|bias)"
        rules: dict[str, Rule] = {
            rf"attention_net\.0\.{held}": r"embed.\1",
            rf"attention_net\.[23]\.(?:attention_a|module)\.0\.{held}": r"v.\1",
            rf"attention_net\.[23]\.attention_b\.0\.{held}": r"u.\1",
            rf"attention_net\.[23]\.(?:attention_c|module\.[23])\.{held}": r"score.\1",
            rf"instance_classifiers\.(\d+)\.{held}": r"judges.\1.\2",
            rf"classifiers\.{held}": r"head.\1",
        }
        out = theirs.renamed(rules)
        for name in ("weight", "bias"):
            rows = sorted((int(m[1]), value) for m, value in theirs.matching(rf"classifiers\.(\d+)\.{name}"))
            if rows:
                out[f"head.{name}"] = torch.cat([value for _, value in rows])
        return theirs.close(out)


class _Nystrom(nn.Module):
    """Nystrom attention of one bag (1, N, C), with zeros before it until landmarks are means of equally many."""

    def __init__(self, dim: int, num_heads: int, num_landmarks: int, steps: int, conv_size: int, drop: float):
        super().__init__()
        self.num_heads, self.num_landmarks, self.steps = num_heads, num_landmarks, steps
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.conv = nn.Conv2d(
            num_heads, num_heads, (conv_size, 1), padding=(conv_size // 2, 0), groups=num_heads, bias=False
        )
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        count, m = x.shape[1], self.num_landmarks
        x = F.pad(x, (0, 0, -count % m, 0))
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        q = q * q.shape[-1] ** -0.5
        q_land, k_land = (t.unflatten(2, (m, -1)).mean(3) for t in (q, k))
        between = cubic_inverse((q_land @ k_land.mT).softmax(-1), self.steps, shared=True).to(v.dtype)
        read = (q @ k_land.mT).softmax(-1) @ between @ ((q_land @ k.mT).softmax(-1) @ v)
        return self.drop(self.proj(merge_heads(read + self.conv(v))))[:, -count:]


class TransMIL(Bags):
    """Two layers of Nystrom attention over a class token and the instances, with convolutions between them.

    Instances are laid out, row by row, in the smallest square that holds them; what is missing at its end is the
    beginning once more. One bag is read after the other, because all of this depends on how many it holds.

    Args:
        in_chans, num_classes: as of :class:`Bags`.
        dim: width of tokens.
        num_heads: of both layers.
        num_landmarks: segments; half of ``dim`` by default.
        steps: of the pseudo-inverse.
        conv_size: tokens that the convolution of values reads.
        drop: dropout behind the attention.

    >>> TransMIL(8, 2, 16, 2).eval()(torch.randn(3, 5, 8)).logits.shape
    torch.Size([3, 2])
    """

    def __init__(
        self, in_chans: int = 384, num_classes: int = 2, dim: int = 128, num_heads: int = 8,
        num_landmarks: int | None = None, steps: int = 6, conv_size: int = 33, drop: float = 0.1,
    ):  # fmt: skip
        super().__init__(in_chans, num_classes)
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", check_int("dim", dim, least=1))
        m = max(1, dim // 2) if num_landmarks is None else check_int("num_landmarks", num_landmarks, least=1)
        if check_int("conv_size", conv_size, least=1) % 2 == 0:
            raise ValueError(f"conv_size must be odd, got {conv_size}")
        check_int("steps", steps, least=0)
        check_real("drop", drop, least=0, below=1)
        self.embed, self.cls_token = nn.Linear(in_chans, dim), nn.Parameter(torch.randn(dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = nn.ModuleList(_Nystrom(dim, num_heads, m, steps, conv_size, drop) for _ in range(2))
        self.places = nn.ModuleList(nn.Conv2d(dim, dim, n, padding=n // 2, groups=dim) for n in (7, 5, 3))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def read(self, bags: Tensor, valid: Tensor) -> BagScores:
        features = F.relu(self.embed(bags))
        tokens = [self._token(x[there].unsqueeze(0)) for x, there in zip(features, valid, strict=True)]
        none = features.new_zeros(0, self.norm.normalized_shape[0])
        return self._told(self.head(self.norm(torch.cat(tokens) if tokens else none)), features)

    def _token(self, x: Tensor) -> Tensor:
        """(1, dim) of one bag (1, N, dim)."""
        side = math.isqrt(x.shape[1] - 1) + 1
        x = torch.cat([x, x[:, : side**2 - x.shape[1]]], 1)
        x = torch.cat([self.cls_token.to(x.dtype).expand(1, 1, -1), x], 1)
        first, second = zip(self.norms, self.attention, strict=True)
        x = x + first[1](first[0](x))
        square = x[:, 1:].mT.unflatten(2, (side, side))
        square = square + torch.stack([conv(square) for conv in self.places]).sum(0)
        x = torch.cat([x[:, :1], square.flatten(2).mT], 1)
        return (x + second[1](second[0](x)))[:, 0]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``TransMIL``."""
        theirs = Released(state_dict, "the release's TransMIL")

        def layer(match: Any, value: Tensor) -> dict[str, Tensor]:
            at, name = int(match[1]) - 1, match[2]
            if name.startswith("norm."):
                return {f"norms.{at}.{name[5:]}": value}
            for old, new in (("to_qkv", "qkv"), ("to_out.0", "proj"), ("res_conv", "conv")):
                if name.startswith(f"attn.{old}."):
                    return {f"attention.{at}.{new}.{name[len(old) + 6 :]}": value}
            raise ValueError(f"{match[0]!r} is no part of the release's TransMIL")

        rules: dict[str, Rule] = {
            r"_fc1\.0\.(weight|bias)": r"embed.\1",
            r"_fc2\.(weight|bias)": r"head.\1",
            r"norm\.(weight|bias)": r"norm.\1",
            r"cls_token": lambda match, value: {"cls_token": value.flatten()},
            r"pos_layer\.proj\.(weight|bias)": r"places.0.\1",
            r"pos_layer\.proj([12])\.(weight|bias)": r"places.\1.\2",
            r"layer([12])\.(.*)": layer,
        }
        return theirs.close(theirs.renamed(rules))


class _Exchange(nn.Module):
    """Multi-head attention between two sets, with maps before it beside its own, a residual and one more map."""

    def __init__(self, query_dim: int, key_dim: int, dim: int, num_heads: int, norm: bool, gated: bool):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(query_dim, dim), nn.Linear(key_dim, dim), nn.Linear(key_dim, dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.out = nn.Linear(dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))
        self.gate = nn.Linear(query_dim, dim) if gated else None

    def forward(self, x: Tensor, other: Tensor, absent: Tensor | None = None) -> Tensor:
        q = self.q(x)
        y = self.norms[0](q + self.attention(q, self.k(other), self.v(other), absent, need_weights=False)[0])
        y = self.norms[1](y + F.relu(self.out(y)))
        return y if self.gate is None else y * F.silu(self.gate(x))


class ILRA(Bags):
    """Instances and a few latent vectors read each other, gated, layer by layer; another set of vectors pools.

    Args:
        in_chans, num_classes: as of :class:`Bags`.
        dim: width behind the first layer.
        depth: layers.
        num_heads: of all attention.
        rank: latent vectors of every layer, and of the pool, whose logits are averaged.
        norm: layer norms.

    >>> ILRA(8, 2, 16, num_heads=2).eval()(torch.randn(3, 5, 8)).logits.shape
    torch.Size([3, 2])
    """

    input_name = "layers.0.down.k.weight"

    def __init__(
        self, in_chans: int = 384, num_classes: int = 2, dim: int = 256, depth: int = 2, num_heads: int = 8,
        rank: int = 1, norm: bool = True,
    ):  # fmt: skip
        super().__init__(in_chans, num_classes)
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", check_int("dim", dim, least=1))
        check_int("rank", rank, least=1)
        check_flag("norm", norm)
        self.latents = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(rank, dim)) for _ in range(check_int("depth", depth, least=1) + 1)
        )
        widths = [in_chans, *(dim for _ in range(depth - 1))]
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "down": _Exchange(dim, width, dim, num_heads, norm, True),
                "up": _Exchange(width, dim, dim, num_heads, norm, True),
            })
            for width in widths
        )  # fmt: skip
        self.pool = _Exchange(dim, dim, dim, num_heads, norm, False)
        self.head = nn.Linear(dim, num_classes)
        _xavier(self, bias=False)

    def read(self, bags: Tensor, valid: Tensor) -> BagScores:
        x, absent = bags, None if bool(valid.all()) else ~valid
        sets = [latent.to(x.dtype).expand(len(x), -1, -1) for latent in self.latents]
        if len(x):
            for latent, layer in zip(sets[:-1], self.layers, strict=True):
                x = layer["up"](x, layer["down"](latent, x, absent))  # type: ignore[index]
            pooled = self.pool(sets[-1], x, absent)
        else:
            pooled, x = sets[-1], x.new_zeros(*x.shape[:2], sets[-1].shape[-1])
        return self._told(self.head(pooled).mean(1), x)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``ILRA``, with and without norms."""
        theirs = Released(state_dict, "the release's ILRA")
        depth = sum(re.fullmatch(r"gab_blocks\.\d+\.latent", name) is not None for name in theirs)

        def part(where: str, name: str, value: Tensor) -> dict[str, Tensor]:
            for old, new in (
                ("fc_q.", "q."), ("fc_k.", "k."), ("fc_v.", "v."), ("fc_o.", "out."), ("gate.0.", "gate."),
                ("multihead_attn.", "attention."), ("ln0.", "norms.0."), ("ln1.", "norms.1."),
            ):  # fmt: skip
                if name.startswith(old):
                    return {f"{where}.{new}{name[len(old) :]}": value}
            raise ValueError(f"{where} has no part {name!r} in the release's ILRA")

        def block(match: Any, value: Tensor) -> dict[str, Tensor]:
            side = {"forward": "down", "backward": "up"}[match[2]]
            return part(f"layers.{match[1]}.{side}", match[3], value)

        rules: dict[str, Rule] = {
            r"gab_blocks\.(\d+)\.latent": lambda match, value: {f"latents.{match[1]}": value.squeeze(0)},
            r"pooling\.S": lambda match, value: {f"latents.{depth}": value.squeeze(0)},
            r"gab_blocks\.(\d+)\.project_(forward|backward)\.(.*)": block,
            r"pooling\.mha\.(.*)": lambda match, value: part("pool", match[1], value),
            r"classifier\.(weight|bias)": r"head.\1",
        }
        return theirs.close(theirs.renamed(rules))


class IBMIL(Bags):
    """Gated attention, and beside the bag's vector what it reads of confounders.

    Args:
        in_chans, num_classes: as of :class:`Bags`.
        dim: width of instances behind the first map.
        hidden_dim: of the gate.
        confounders: (M, D): means of clusters of vectors of bags, made by a model without; ``None``: gated ABMIL, the
            first stage.
        trained: confounders are parameters.
        joint_dim: width in which bag and confounders are compared.
        merge: ``"cat"``, ``"add"`` or ``"sub"``: what becomes of both; the latter two need ``D == dim``.

    >>> IBMIL(8, 2, 8, confounders=torch.randn(4, 8)).eval()(torch.randn(3, 5, 8)).logits.shape
    torch.Size([3, 2])
    """

    confounders: Tensor | None

    def __init__(
        self, in_chans: int = 384, num_classes: int = 2, dim: int = 128, hidden_dim: int = 128,
        confounders: Tensor | None = None, trained: bool = False, joint_dim: int = 128, merge: str = "cat",
    ):  # fmt: skip
        super().__init__(in_chans, num_classes)
        check_choice("merge", merge, ("cat", "add", "sub"))
        check_flag("trained", trained)
        self.merge = merge
        self.embed = nn.Linear(in_chans, check_int("dim", dim, least=1), bias=False)
        self.pool = ACMILPool(dim, 1, hidden_dim, top_k=0)
        width = dim
        if confounders is None:
            self.confounders = None
        else:
            check_float("confounders", confounders)
            check_int("joint_dim", joint_dim, least=1)
            if confounders.dim() != 2 or not len(confounders) or (merge != "cat" and confounders.shape[1] != dim):
                wanted = "(M, D)" if merge == "cat" else f"(M, {dim}), to be {merge}ed"
                raise ValueError(f"confounders must be {wanted}, got {describe(confounders)}")
            held = confounders.detach().clone()
            if trained:
                self.confounders = nn.Parameter(held)
            else:
                self.register_buffer("confounders", held)
            self.q, self.k = nn.Linear(dim, joint_dim), nn.Linear(held.shape[1], joint_dim)
            width = dim + held.shape[1] if merge == "cat" else dim
        self.head = nn.Linear(width, num_classes)

    def vectors(self, bags: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, dim) of bags, before confounders: clusters of these are the confounders of the second stage."""
        found: Tensor = self.pool(F.relu(self.embed(check_bags(bags, valid, self.in_chans))), valid=valid)
        return found

    def read(self, bags: Tensor, valid: Tensor) -> BagScores:
        features = F.relu(self.embed(bags))
        found = self.pool.branches(features, valid)
        y = found.bag
        if self.confounders is not None:
            keys = self.k(self.confounders)
            read = (self.q(y) @ keys.mT / math.sqrt(keys.shape[1])).softmax(-1) @ self.confounders
            y = torch.cat([y, read], -1) if self.merge == "cat" else y + read if self.merge == "add" else y - read
        return self._told(self.head(y), features, found.weights.flatten(1, 2))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``IBMIL``."""
        theirs = Released(state_dict, "the release's IBMIL")
        out = theirs.renamed(
            {
                r"dimreduction\.fc1\.weight": "embed.weight",
                r"classifier\.(?:fc\.)?(weight|bias)": r"head.\1",
                r"W_([qk])\.(weight|bias)": r"\1.\2",
                r"confounder_feat": "confounders",
            }
        )
        out |= theirs.parts(r"attention\.(.*)", "pool", ACMILPool.convert_state_dict)
        return theirs.close(out)


class TieredScores(NamedTuple):
    """What both tiers say of bags.

    Args:
        logits: (B, classes), of the second.
        groups: (B, G, classes), of the first, of every pseudo-bag.
    """

    logits: Tensor
    groups: Tensor


class DTFD(Bags):
    """Two tiers of gated attention: pseudo-bags, and instances that they choose.

    An instance's scores are its share of the pseudo-bag's vector times the first head's weights; instances are sorted
    by the probability of the last class. No gradient goes from the second tier to the first.

    Args:
        in_chans, num_classes: as of :class:`Bags`.
        dim: width of instances behind the first map.
        hidden_dim: of both gates.
        groups: G, pseudo-bags.
        instances: how many the second tier reads; ``instances // groups`` of either end of every pseudo-bag.
        distill: ``"max-min"``: of both ends; ``"max"``: of the first; ``"vector"``: the vectors of pseudo-bags.

    In training instances are dealt out at random. In evaluation they stay in their order, where the release draws
    again, unless ``noise`` is given.

    >>> DTFD(8, 2, 8)(torch.randn(3, 9, 8)).groups.shape
    torch.Size([3, 4, 2])
    """

    head_names = ("head.", "first_head.")

    def __init__(
        self, in_chans: int = 384, num_classes: int = 2, dim: int = 128, hidden_dim: int = 128, groups: int = 4,
        instances: int = 4, distill: str = "max-min",
    ):  # fmt: skip
        super().__init__(in_chans, num_classes)
        self.groups = check_int("groups", groups, least=1)
        self.each = check_int("instances", instances, least=groups) // groups
        check_choice("distill", distill, ("max-min", "max", "vector"))
        self.distill = distill
        self.embed = nn.Linear(in_chans, check_int("dim", dim, least=1), bias=False)
        self.first, self.pool = (ACMILPool(dim, 1, hidden_dim, top_k=0) for _ in range(2))
        self.first_head, self.head = nn.Linear(dim, num_classes), nn.Linear(dim, num_classes)

    def forward(  # type: ignore[override]
        self, bags: Tensor, valid: Tensor | None = None, noise: Tensor | None = None
    ) -> TieredScores:
        """Classes of bags and of their pseudo-bags.

        Args:
            bags: (B, N, in_chans).
            valid: (B, N) boolean: which instances exist, G of every bag at least.
            noise: (B, N) numbers in whose order instances are dealt out.

        Raises:
            ValueError: another shape, a bag of fewer instances than pseudo-bags.
        """
        bags = check_bags(bags, valid, self.in_chans)
        there = bags.new_ones(bags.shape[:2], dtype=torch.bool) if valid is None else valid
        if len(bags) and int(there.sum(1).min()) < self.groups:
            raise ValueError(
                f"bags must hold {self.groups} instances each, as groups says, got {there.sum(1).tolist()}"
            )
        if noise is None and self.training:
            noise = torch.rand(bags.shape[:2], device=bags.device)
        if noise is not None and noise.shape != bags.shape[:2]:
            raise ValueError(f"noise must be {tuple(bags.shape[:2])}, got {describe(noise)}")
        features, told, chosen = F.relu(self.embed(bags)), [], []
        for b, h in enumerate(features):
            at = there[b].nonzero().squeeze(1)
            at = at if noise is None else at[noise[b, at].argsort()]
            found = [self._group(h[part]) for part in at.tensor_split(self.groups)]
            told.append(torch.stack([logits for logits, _ in found]))
            chosen.append(torch.cat([read for _, read in found]).detach())
        if not told:
            return TieredScores(
                features.new_zeros(0, self.num_classes), features.new_zeros(0, self.groups, self.num_classes)
            )
        vectors = torch.cat([self.pool(read.unsqueeze(0)) for read in chosen])
        return TieredScores(self.head(vectors), torch.stack(told))

    def _group(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (classes,) of a pseudo-bag (N, dim), and what the second tier reads of it."""
        found = self.first.branches(h.unsqueeze(0))
        shares = (found.weights.flatten()[:, None] * h) @ self.first_head.weight.mT
        order = shares.softmax(-1)[:, -1].sort(descending=True).indices
        read = {
            "max-min": lambda: h[torch.cat([order[: self.each], order[-self.each :]])],
            "max": lambda: h[order[: self.each]],
            "vector": lambda: found.bag,
        }[self.distill]()
        return self.first_head(found.bag).squeeze(0), read

    def loss(self, prediction: TieredScores, target: Tensor) -> Terms:  # type: ignore[override]
        """``groups`` and ``bag``: cross entropy of the first tier, the mean over pseudo-bags, and of the second."""
        logits, groups = prediction
        check_classes(logits, target, self.num_classes)
        return {
            "groups": F.cross_entropy(groups.flatten(0, 1), target.repeat_interleave(self.groups)),
            "bag": F.cross_entropy(logits, target),
        }

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's four modules, named as its script calls them.

        ``dimReduction``, ``attention``, ``classifier``, and ``attCls`` (``UClassifier``) of the second tier.
        """
        theirs = Released(state_dict, "the release's modules of DTFD")
        out = theirs.renamed(
            {
                r"dimReduction\.fc1\.weight": "embed.weight",
                r"classifier\.fc\.(weight|bias)": r"first_head.\1",
                r"(?:attCls|UClassifier)\.classifier\.fc\.(weight|bias)": r"head.\1",
            }
        )
        out |= theirs.parts(r"attention\.(.*)", "first", ACMILPool.convert_state_dict)
        out |= theirs.parts(r"(?:attCls|UClassifier)\.attention\.(.*)", "pool", ACMILPool.convert_state_dict)
        return theirs.close(out)


class LBMIL(Bags):
    """Instances are weighed by the exponentials of the classifier's scores, summed over classes.

    Args:
        in_chans, num_classes: as of :class:`Bags`.
        dim: width of instances behind the first map.

    >>> LBMIL(8, 2, 8)(torch.randn(3, 5, 8)).weights.sum(-1).allclose(torch.ones(3, 1))
    True
    """

    def __init__(self, in_chans: int = 384, num_classes: int = 2, dim: int = 128):
        super().__init__(in_chans, num_classes)
        self.embed = nn.Linear(in_chans, check_int("dim", dim, least=1), bias=False)
        self.head = nn.Linear(dim, num_classes)

    def read(self, bags: Tensor, valid: Tensor) -> BagScores:
        features = F.relu(self.embed(bags))
        each = self.head(features)
        weights = _weighed(each.logsumexp(-1).unsqueeze(1), valid)
        logits = self.head((weights @ features).squeeze(1))
        return self._told(logits, features, weights, each.masked_fill(~valid.unsqueeze(-1), -torch.inf))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``LBMIL``."""
        theirs = Released(state_dict, "the release's LBMIL")
        rules: dict[str, Rule] = {
            r"dimreduction\.fc1\.weight": "embed.weight",
            r"classifier\.(weight|bias)": r"head.\1",
        }
        return theirs.close(theirs.renamed(rules))


def _convert(state_dict: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    return model.convert_state_dict(state_dict)  # type: ignore[no-any-return]


def _register(name: str, make: Any, params: int, **settings: Any) -> None:
    register_models(
        "acmil",
        make,
        {name: settings},
        params={name: params},  # of the release with the same settings, counted
        source="dazhangyu123/ACMIL",
        convert=_convert,  # type: ignore[arg-type]
        task="bags",
    )


_register("mean_mil", InstanceMIL, 37_442, in_chans=192)
_register("max_mil", InstanceMIL, 525_826, in_chans=1024, dim=512, reduce="max")
_register("dsmil", DSMIL, 51_588, in_chans=384)
_register("clam_sb", CLAM, 83_207, in_chans=384)
_register("clam_mb", CLAM, 83_336, in_chans=384, per_class=True)
_register("transmil", TransMIL, 193_298, in_chans=384)
_register("ilra", ILRA, 3_032_322, in_chans=384)
_register("ibmil", IBMIL, 82_563, in_chans=384)
_register("lbmil", LBMIL, 49_410, in_chans=384)
_register("dtfd", DTFD, 115_974, in_chans=384)
