"""ACMIL, the whole model: features of patches, branches of attention that must not agree, a class for the slide.

``h = relu(W x)``; the branches of :class:`attnlib.nn.pools.acmil.ACMILPool` (or of
:class:`attnlib.nn.pools.acmil.ACMILHeads`) read ``h``, each has a head, and the bag's head reads what their mean
weights give. Trained by ``CE(bag) + mean_m CE(branch m) + mean_{i<j} cos(A_i, A_j)``. With one branch and nothing
hidden it is ABMIL; the head of a single branch, which never gets a gradient in the release, does not exist.

Reference: Zhang et al., 2024, arXiv 2311.07125; code: dazhangyu123/ACMIL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_float,
    check_int,
    check_real,
    check_tensor,
    check_valid,
    check_whole,
    check_within,
    describe,
    readable,
)
from ...nn.pools.acmil import ACMILHeads, ACMILPool, diversity
from ...nn.released import Released
from ..build import register_models
from ..protocol import TaskModel, Terms


class BagPrediction(NamedTuple):
    """What is said of bags.

    Args:
        logits: (B, classes).
        branches: (B, M, classes), of every branch; (B, 0, classes) of a single one.
        weights: (B, M, H, N) of the instances.
    """

    logits: Tensor
    branches: Tensor
    weights: Tensor


def check_classes(logits: Tensor, target: Tensor, num_classes: int) -> None:
    """Raise unless ``target`` is a class for each of the bags that ``logits`` (B, classes) are of."""
    check_tensor("target", target)
    check_whole("target", target)
    if target.shape != logits.shape[:1] or not len(target):
        raise ValueError(f"target must be ({len(logits)},) classes of at least one bag, got {describe(target)}")
    check_within("target", target, num_classes, "class")


def check_bags(bags: Tensor, valid: Tensor | None, width: int) -> Tensor:
    """Bags (B, N, width) with zeros for absent instances.

    Raises:
        ValueError: another shape, an empty bag.
    """
    check_axes("bags", bags, B=None, N=None, C=width)
    check_float("bags", bags)
    if not bags.shape[1]:
        raise ValueError(f"bags must hold at least one instance each, got shape {tuple(bags.shape)}")
    check_valid("valid", valid, bags.shape[:2])
    if valid is None:
        return bags
    if readable(valid) and not bool(valid.any(1).all()):
        bare = (~valid.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"valid leaves the bags {bare[:8]} empty; each must hold at least one instance")
    return bags.masked_fill(~valid.unsqueeze(-1), 0.0)


class ACMIL(TaskModel):
    """Classes of bags of features.

    Args:
        in_chans: width of the features of an instance.
        num_classes: classes.
        dim: width that the branches read; 128 for 384 features, 256 for 512, 384 for 768, 512 for 1024 in the release.
        attention: ``"gated"`` or ``"multihead"``.
        num_branches: M.
        hidden_dim: width of the gate, for ``"gated"``.
        num_heads: of each branch, for ``"multihead"``.
        top_k: K, how many of the highest scores may be hidden in training.
        mask_ratio: p, the share of them that is.
        drop: dropout before the heads.
        bias: of the first map; the release has none.
        bag_values: of ``"multihead"``: the bag has values of its own; without them a single branch is the bag.

    Shape:
        bags: (B, N, in_chans), ``valid`` (B, N) boolean: which instances exist, one of every bag at least. Returns
        :class:`BagPrediction`.

    >>> model = ACMIL(in_chans=8, dim=16).eval()
    >>> model(torch.randn(3, 20, 8)).logits.shape
    torch.Size([3, 2])
    """

    head_names = ("head.", "branch_heads.")
    input_name = "embed.weight"

    def __init__(
        self, in_chans: int = 384, num_classes: int = 2, dim: int = 128, attention: str = "gated",
        num_branches: int = 5, hidden_dim: int = 128, num_heads: int = 8, top_k: int = 10, mask_ratio: float = 0.6,
        drop: float = 0.0, bias: bool = False, bag_values: bool = True,
    ):  # fmt: skip
        super().__init__()
        check_choice("attention", attention, ("gated", "multihead"))
        if attention == "gated" and not bag_values:
            raise ValueError("bag_values=False is for attention='multihead'; gated branches have no values")
        self.in_chans = check_int("in_chans", in_chans, least=1)
        self.num_classes = check_int("num_classes", num_classes, least=1)
        self.embed = nn.Linear(in_chans, check_int("dim", dim, least=1), bias=bias)
        self.pool: ACMILPool | ACMILHeads
        if attention == "gated":
            self.pool = ACMILPool(dim, num_branches, hidden_dim, top_k, mask_ratio)
        else:
            self.pool = ACMILHeads(dim, num_branches, num_heads, top_k, mask_ratio, bag_values=bag_values)
        self.drop = nn.Dropout(check_real("drop", drop, least=0, below=1))
        self.branch_heads = nn.ModuleList(
            nn.Linear(dim, num_classes) for _ in range(num_branches if num_branches > 1 else 0)
        )
        self.head = nn.Linear(dim, num_classes)

    def forward(self, bags: Tensor, valid: Tensor | None = None, noise: Tensor | None = None) -> BagPrediction:
        """Classes of bags.

        Args:
            bags: (B, N, in_chans).
            valid: (B, N) boolean.
            noise: (B, M, H, min(top_k, N)), what chooses the instances that training hides; drawn by default.

        Raises:
            ValueError: another shape, an empty bag, one all of whose instances would be hidden.
        """
        bags = check_bags(bags, valid, self.in_chans)
        found = self.pool.branches(F.relu(self.embed(bags)), valid, noise)
        each = [head(self.drop(found.branches[:, m])) for m, head in enumerate(self.branch_heads)]
        logits = self.head(self.drop(found.bag))
        return BagPrediction(logits, torch.stack(each, 1) if each else logits[:, None][:, :0], found.weights)

    def loss(self, prediction: BagPrediction, target: Tensor) -> Terms:
        """``bag`` cross entropy, and of several branches the mean of theirs (``branches``) and ``diversity``.

        Args:
            prediction: of :meth:`forward`.
            target: (B,) classes.
        """
        logits, branches, weights = prediction
        check_classes(logits, target, self.num_classes)
        terms = {"bag": F.cross_entropy(logits, target)}
        if branches.shape[1]:
            terms["branches"] = F.cross_entropy(
                branches.flatten(0, 1),
                target.repeat_interleave(branches.shape[1], output_size=branches[..., 0].numel()),
            )
            terms["diversity"] = diversity(weights)
        return terms

    def predict(self, bags: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, classes) probabilities."""
        return self(bags, valid).logits.softmax(-1)


def convert(state_dict: Any, model: ACMIL) -> dict[str, Tensor]:
    """From the authors' ``ACMIL_GA``, ``ACMIL_MHA``, ``ABMIL`` or ``MHA``.

    The head of a single branch has no counterpart: nothing trains it.
    """
    theirs = Released(state_dict, "the authors' ACMIL")
    out = theirs.renamed({r"dimreduction\.fc1\.(weight|bias)": r"embed.\1"})
    if r"Slide_classifier.fc.weight" in theirs:
        if not len(model.branch_heads):
            theirs.leave(r"classifier\.0\.fc\..*", "the head of a single branch is in no loss but on its own")
        rules = {
            r"Slide_classifier\.fc\.(weight|bias)": r"head.\1",
            r"classifier\.(\d+)\.fc\.(weight|bias)": r"branch_heads.\1.\2",
        }
        out |= theirs.renamed(rules)
    else:  # ABMIL and MHA have one head
        out |= theirs.renamed({r"classifier\.fc\.(weight|bias)": r"head.\1"})
    heads = r"((?:q$|sub_attention\.|bag_attention\.|attention\.(?:[qkv]_proj|out_proj|layer_norm)\.).*)"
    out |= theirs.parts(heads, "pool", ACMILHeads.convert_state_dict)
    out |= theirs.parts(r"attention\.(.*)", "pool", ACMILPool.convert_state_dict)
    return theirs.close(out)


register_models(
    "acmil",
    ACMIL,
    {
        "acmil": dict(in_chans=384),
        "acmil_mha": dict(in_chans=384, attention="multihead"),
        "abmil": dict(in_chans=384, num_branches=1, top_k=0),
        "mha_mil": dict(in_chans=384, attention="multihead", num_branches=1, top_k=0, bag_values=False),
    },
    # The release with the same settings, counted; all that it has is used.
    params={"acmil": 84_369, "acmil_mha": 416_140, "abmil": 82_563, "mha_mil": 115_842},
    source="dazhangyu123/ACMIL",
    convert=convert,  # type: ignore[arg-type]
    task="bags",
)
