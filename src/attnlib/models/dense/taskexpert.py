"""TaskExpert: several dense tasks out of one pass, by mixtures of experts along the backbone and a memory per task.

Ye and Xu, 2023, arXiv 2307.15324; the layer is :class:`attnlib.nn.gates.memorial_experts.MemorialExperts`. Chosen maps
of a backbone go through one such layer each; the memory after the last gives the predictions. No code was released: the
heads (norm, linear, GELU, linear) and the host are our reading. Losses are those of the same authors' recipe (InvPT,
arXiv 2203.07997): cross entropy of classes, balanced for saliency, weighted for edges, L1 of normals and of depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_int, check_real, check_type, describe, readable
from ...nn.gates.memorial_experts import MemorialExperts
from ...types import stats_dtype
from ..backbones.stages import map_info
from ..protocol import TaskModel, Terms
from .context import resized_maps
from .heads import pixel_cross_entropy

KINDS = ("classes", "balanced", "edges", "normals", "depth")
IGNORED = 255


@dataclass(frozen=True)
class DenseTask:
    """What is predicted for every pixel.

    Args:
        kind: ``"classes"``; ``"balanced"`` (two classes, each weighted by the share of the other); ``"edges"`` (one
            logit, edges weighted); ``"normals"`` (unit vectors) or ``"depth"``, by L1.
        channels: that come out: the number of classes; 2 of ``"balanced"``, 1 of ``"edges"``, 3 of ``"normals"``.
        weight: of its loss.
        positive: weight of edges against the rest, both sum to 1.
    """

    kind: str
    channels: int = 1
    weight: float = 1.0
    positive: float = 0.95

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_int("channels", self.channels, least=1)
        fixed = {"balanced": 2, "edges": 1, "normals": 3}.get(self.kind, self.channels)
        if self.channels != fixed:
            raise ValueError(f"channels of {self.kind!r} must be {fixed}, got {self.channels}")
        check_real("weight", self.weight, least=0)
        check_real("positive", self.positive, above=0, below=1)


#: Five tasks of PASCAL-Context, and four of NYUD-v2, with the recipe's weights.
PASCAL = {
    "semseg": DenseTask("classes", 21), "human_parts": DenseTask("classes", 7, 2.0),
    "sal": DenseTask("balanced", 2, 5.0), "normals": DenseTask("normals", 3, 10.0), "edge": DenseTask("edges", 1, 50.0),
}  # fmt: skip
NYUD = {
    "semseg": DenseTask("classes", 40), "normals": DenseTask("normals", 3, 10.0), "edge": DenseTask("edges", 1, 50.0),
    "depth": DenseTask("depth", 1),
}  # fmt: skip


def _whole(prediction: Tensor, target: Any, classes: int) -> Tensor:
    want = (len(prediction), *prediction.shape[2:])
    if not isinstance(target, Tensor) or tuple(target.shape) != want or target.is_complex():
        raise ValueError(f"target must be labels {want}, got {describe(target)}")
    known = target != IGNORED
    if readable(target):
        wrong = target[known & ~torch.isin(target, torch.arange(classes, device=target.device).to(target.dtype))]
        if wrong.numel():
            raise ValueError(f"target holds {wrong[0].item()}; possible: 0 to {classes - 1}, and {IGNORED} for none")
    return known


def balanced_cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of two classes, each weighted by the share of the other; a mean over pixels with a label.

    Args:
        prediction: logits (B, 2, H, W).
        target: (B, H, W) of 0, 1 and 255 (none).
    """
    check_axes("prediction", prediction, B=None, classes=2, H=None, W=None)
    known = _whole(prediction, target, 2)
    count = known.sum().clamp(min=1)
    positive = (known & (target == 1)).sum() / count
    one = torch.where(target == 1, 1 - positive, positive)
    labels = torch.where(known, target, 0).long()
    return (F.cross_entropy(prediction, labels, reduction="none") * one * known).sum() / count


def edge_loss(prediction: Tensor, target: Tensor, positive: float = 0.95) -> Tensor:
    """Binary cross entropy, edges weighted by ``positive`` and the rest by what is left of 1; a mean over pixels.

    Args:
        prediction: logits (B, 1, H, W).
        target: (B, H, W) of 0, 1 and 255 (none).
        positive: the weight.
    """
    check_axes("prediction", prediction, B=None, channels=1, H=None, W=None)
    check_real("positive", positive, above=0, below=1)
    known = _whole(prediction, target, 2)
    labels = torch.where(known, target, 0).to(prediction.dtype)
    weight = torch.where(labels > 0, positive, 1 - positive) * known
    terms = F.binary_cross_entropy_with_logits(prediction[:, 0], labels, reduction="none")
    return (terms * weight).sum() / known.sum().clamp(min=1)


def masked_l1(prediction: Tensor, target: Tensor, unit: bool = False) -> Tensor:
    """Absolute differences summed over channels, a mean over places where the target is known.

    Args:
        prediction: (B, C, H, W).
        target: of the same shape; a place with a 255 or with what is not finite in any channel is unknown.
        unit: compare the direction of the prediction.
    """
    if not isinstance(target, Tensor) or target.shape != prediction.shape or not target.is_floating_point():
        raise ValueError(f"target must be floating point {tuple(prediction.shape)}, got {describe(target)}")
    known = ((target != IGNORED) & target.isfinite()).all(1, keepdim=True)
    made = F.normalize(prediction, dim=1) if unit else prediction
    return torch.where(known, made - torch.where(known, target, 0.0), 0.0).abs().sum() / known.sum().clamp(min=1)


class TaskExpert(TaskModel):
    """Images (B, C, H, W) to maps by name of the task, ``{name: (B, channels, H, W)}``.

    Args:
        tasks: what is predicted, by name; :data:`PASCAL` has the recipe's.
        encoder: gives maps with a ``feature_info``, one per layer of experts.
        num_experts, expert_dim, memory_dim, memory, gate, gate_dim, top_k, update: of
            :class:`attnlib.nn.gates.memorial_experts.MemorialExperts`; ``expert_dim`` is 64 by default. Without a
            memory the features of the last layer give the predictions.
        experts: makes the layers, called as ``experts(dim, num_tasks, ...)``; one with other reads and writes has its
            place here.

    Raises:
        ValueError: no task, an encoder without maps.
    """

    head_names: Sequence[str] = ("heads.",)

    def __init__(
        self,
        tasks: Mapping[str, DenseTask],
        encoder: nn.Module,
        num_experts: int = 5,
        expert_dim: int = 64,
        memory_dim: int | None = None,
        memory: bool = True,
        gate: str = "image",
        gate_dim: int = 64,
        top_k: int | None = None,
        update: str = "add",
        experts: Any = MemorialExperts,
    ):
        super().__init__()
        check_type("tasks", tasks, Mapping, "tasks by name")
        if not tasks:
            raise ValueError("tasks must name one at least")
        for name, task in tasks.items():
            check_type(f"tasks[{name!r}]", task, DenseTask)
        self.tasks = dict(tasks)
        check_type("encoder", encoder, nn.Module, "a module that gives maps")
        dims = map_info(encoder).channels()
        self.encoder = encoder
        settings = dict(
            num_experts=num_experts, expert_dim=expert_dim, memory_dim=memory_dim, memory=memory, gate=gate,
            gate_dim=gate_dim, top_k=top_k, update=update,
        )  # fmt: skip
        self.experts = nn.ModuleList(experts(d, len(self.tasks), **settings) for d in dims)
        width = (memory_dim or expert_dim) if memory else expert_dim
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, t.channels)
                )
                for name, t in self.tasks.items()
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) -> ``{name: (B, channels, H, W)}``, logits of what has classes."""
        return self._predicted(x)[0]

    def gates(self, x: Tensor) -> list[Tensor]:
        """Weights of the experts at every layer, (B, T, ..., K + 1)."""
        return self._predicted(x)[1]

    def _predicted(self, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"x must be images (B, C, H, W) of floating point, got {describe(x)}")
        memory, features, gates = None, None, []
        for layer, m in zip(self.experts, self.encoder(x), strict=True):
            if memory is not None and memory.shape[2:4] != m.shape[2:]:
                flat = memory.flatten(0, 1).permute(0, 3, 1, 2)
                memory = resized_maps(flat, m.shape[2:]).permute(0, 2, 3, 1).unflatten(0, memory.shape[:2])
            features, memory, gate = layer(m.permute(0, 2, 3, 1), memory)
            gates.append(gate)
        last = features if memory is None else memory
        assert last is not None
        out = {}
        for i, (name, head) in enumerate(self.heads.items()):
            out[name] = resized_maps(head(last[:, i]).permute(0, 3, 1, 2), x.shape[2:])
        return out, gates

    def loss(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Terms:
        """Weighted terms by name of the task.

        Args:
            prediction: of :meth:`forward`.
            target: by name: classes (B, H, W), or values (B, channels, H, W); 255 where nothing is known. Tasks that
                are absent are not trained by this batch.

        Raises:
            ValueError: no task at all, unknown names, shapes and labels that do not fit.
        """
        check_type("prediction", prediction, Mapping, "maps by name of the task")
        check_type("target", target, Mapping, "labels by name of the task")
        if unknown := sorted(set(target) - set(self.tasks)):
            raise ValueError(f"target has {unknown}; possible: {sorted(self.tasks)}")
        if not target:
            raise ValueError(f"target has no task; possible: {sorted(self.tasks)}")
        out = {}
        for name, labels in target.items():
            task, y = self.tasks[name], prediction[name]
            y = y.to(stats_dtype(y.dtype))
            if task.kind == "classes":
                term = pixel_cross_entropy(y, labels, IGNORED)
            elif task.kind == "balanced":
                term = balanced_cross_entropy(y, labels)
            elif task.kind == "edges":
                term = edge_loss(y, labels, task.positive)
            else:
                term = masked_l1(y, labels, task.kind == "normals")
            out[name] = task.weight * term
        return out

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Classes (B, H, W), probabilities of edges (B, H, W), unit normals (B, 3, H, W), depth (B, H, W)."""
        made = self(x)
        out = {}
        for name, y in made.items():
            kind = self.tasks[name].kind
            if kind in ("classes", "balanced"):
                out[name] = y.argmax(1)
            elif kind == "edges":
                out[name] = y[:, 0].sigmoid()
            elif kind == "normals":
                out[name] = F.normalize(y, dim=1)
            else:
                out[name] = y[:, 0] if y.shape[1] == 1 else y
        return out
