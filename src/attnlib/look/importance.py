"""Which heads matter: what is lost when one of them is silenced.

For every head (l, h) the model runs on the same images once more, with the head's output zero, with its mean over
images and tokens in its place, or with a map that reads all tokens alike. Three measures tell the intact model's
distribution over classes ``p`` and the other's ``q`` apart:

- accuracy: the share of images that the intact model gets right, less that of the other;
- probability: the mean of ``p_y - q_y``, y the true class;
- divergence: the mean of Jensen and Shannon's ``H((p + q) / 2) - (H(p) + H(q)) / 2``, in [0, ln 2], which needs no y.

Heads are silenced one at a time: one that another makes up for looks idle here. Li et al., 2023, "How Does Attention
Work in Vision Transformers? A Visual Analytics Attempt", arXiv 2303.13731, have several such measures; which, their
abstract does not say, so these are our reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, checked, describe, shaped
from ..extras import need
from ..hooks import Capture, Node, Nodes, Patch, attach
from ..hooks.tape import logits_of
from .circuits.heads import ablated
from .circuits.replay import call, named_inputs

#: How a head is silenced.
ABLATIONS = ("zero", "mean", "uniform")
#: What is measured then.
MEASURES = ("accuracy", "probability", "divergence")


@shaped(p="float (..., K)", q="float (..., K)")
def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """``H((p + q) / 2) - (H(p) + H(q)) / 2`` of distributions along the last axis, in nats: (...) in [0, ln 2].

    >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() / torch.tensor(2.0).log().item()
    1.0
    """
    entropies = [torch.special.entr(t.to(torch.float64)).sum(-1) for t in ((p + q) / 2, p, q)]
    return (entropies[0] - (entropies[1] + entropies[2]) / 2).clamp_min(0).to(p.dtype)


@dataclass
class HeadImportance:
    """What is lost without each head; nan where a layer has no such head.

    Args:
        how: how heads were silenced.
        accuracy: (L, H) share of images that are not right any more, less those that become right.
        probability: (L, H) how much less probable the true class is.
        divergence: (L, H) Jensen-Shannon divergence in nats.
        intact: accuracy of the intact model.
        images: how many there were.
    """

    how: str
    accuracy: Tensor
    probability: Tensor
    divergence: Tensor
    intact: float
    images: int

    def ranked(self, measure: str = "divergence") -> list[Node]:
        """All heads, the most important first.

        Args:
            measure: ``"accuracy"``, ``"probability"`` or ``"divergence"``.
        """
        check_choice("measure", measure, MEASURES)
        table: Tensor = getattr(self, measure)
        order = table.flatten().nan_to_num(float("-inf")).argsort(descending=True, stable=True).tolist()
        return [Node("z", i // table.shape[1], i % table.shape[1]) for i in order if not table.flatten()[i].isnan()]

    def correlations(self) -> dict[tuple[str, str], float]:
        """Spearman's rank correlation of every two measures; nan where one of them is the same for all heads."""
        return {
            (a, b): rank_correlation(getattr(self, a), getattr(self, b))
            for i, a in enumerate(MEASURES)
            for b in MEASURES[i + 1 :]
        }


@shaped(a="float (L, H)", b="float (L, H)")
def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two tables of heads, of those that both have; nan where one is constant."""
    stats = need("scipy.stats", "a rank correlation")
    both = ~(a.isnan() | b.isnan())
    x, y = a[both].double(), b[both].double()
    if len(x) < 2 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return float("nan")
    return float(stats.spearmanr(x.cpu().numpy(), y.cpu().numpy()).statistic)


@checked
@torch.no_grad()
def head_importance(model: nn.Module, batches: Iterable[Any], how: str = "zero") -> HeadImportance:
    """Silence every head of a classifier, one at a time.

    It runs once per batch and head, and once more per batch; nothing but sums is kept.

    Args:
        model: gives logits (B, classes), alone or as ``logits`` of an output; any that :func:`attnlib.attach` takes, in
            evaluation mode.
        batches: pairs ``(inputs, labels)`` with labels (B,), or inputs alone: then the class that the intact model
            prefers counts as the true one. Inputs are a tensor or named inputs. ``"mean"`` reads them twice.
        how: ``"zero"``, ``"mean"`` over all images and tokens, or ``"uniform"``.

    Raises:
        ValueError: no batches, labels of another number or outside the classes, a model that gives no logits per image.
        TypeError: batches that can be read only once where they are read twice.

    >>> import attnlib
    >>> model = attnlib.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=3).eval()
    >>> head_importance(model, [torch.zeros(2, 3, 32, 32)], "uniform").divergence.shape
    torch.Size([2, 3])
    """
    check_choice("how", how, ABLATIONS)
    if isinstance(batches, Tensor):
        raise TypeError(f"batches must be a list or a loader of batches, got {describe(batches)}")
    if how == "mean" and isinstance(batches, Iterator):
        raise TypeError(
            f"batches are read twice with how='mean': give a list or a loader of them, got {describe(batches)}"
        )
    nodes = Nodes(model)
    heads = [node for node in nodes.of("z") if node.head is not None]
    means = _means(model, batches) if how == "mean" else {}
    sums: dict[Node, Tensor] = {node: torch.zeros(3, dtype=torch.float64) for node in heads}
    right, images = 0.0, 0
    widths: dict[int, int] = {}
    for batch in batches:
        inputs, labels = _pair(model, batch)
        capture = Capture(("z",))
        with attach(model, capture):
            before = _probabilities(model, inputs)
        if not widths:
            widths = {layer: value.shape[-1] for layer, value in capture.results()["z"].items()}
        truth = before.argmax(-1) if labels is None else _checked_labels(labels, before)
        hit = before.argmax(-1) == truth
        right, images = right + float(hit.sum()), images + len(before)
        for node in heads:
            if how == "uniform":
                silenced = ablated(model, [node], how="uniform")
            else:
                zero = torch.zeros(1, 1, widths[node.layer], device=before.device)
                silenced = Patch({node: means.get(node, zero)})
            with attach(model, silenced):
                after = _probabilities(model, inputs)
            lost = hit.double() - (after.argmax(-1) == truth).double()
            drop = (before - after).gather(1, truth[:, None])[:, 0]
            told = jensen_shannon(before, after)
            sums[node] += torch.stack([lost.sum(), drop.sum(), told.sum()]).cpu()
    if not images:
        raise ValueError("batches holds none; importance needs at least one")
    table = torch.full((len(nodes), 1 + max(n.head or 0 for n in heads), 3), torch.nan, dtype=torch.float64)
    for node, total in sums.items():
        table[node.layer, node.head] = total / images
    accuracy, probability, divergence = table.unbind(-1)
    return HeadImportance(how, accuracy, probability, divergence, right / images, images)


def _pair(model: nn.Module, batch: Any) -> tuple[dict[str, Any], Tensor | None]:
    """Named inputs, and labels where there are any."""
    labels = None
    if isinstance(batch, (tuple, list)):
        if len(batch) != 2:
            raise ValueError(f"batches must hold pairs (inputs, labels) or inputs alone, got {describe(batch)}")
        batch, labels = batch
    return named_inputs("batches", batch, model), labels


def _probabilities(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits = logits_of(call(model, inputs))
    if logits.dim() != 2:
        raise ValueError(f"model must give logits (B, classes), got {describe(logits)}")
    return logits.double().softmax(-1)


def _checked_labels(labels: Any, before: Tensor) -> Tensor:
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.dtype == torch.bool)
    if not whole or labels.shape != before.shape[:1]:
        raise ValueError(
            f"labels of {len(before)} images must be ({len(before)},) whole numbers, got {describe(labels)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < before.shape[1]:
        raise ValueError(f"labels must lie between 0 and {before.shape[1] - 1}, got up to {int(labels.max())}")
    return labels.to(before.device).long()


def _means(model: nn.Module, batches: Iterable[Any]) -> dict[Node, Tensor]:
    """(1, 1, D) the mean output of every head over images and tokens."""
    sums: dict[int, Tensor] = {}
    count = 0
    for batch in batches:
        inputs, _ = _pair(model, batch)
        capture = Capture(("z",))
        with attach(model, capture):
            call(model, inputs)
        values = capture.results()["z"]
        for layer, value in values.items():
            sums[layer] = sums.get(layer, 0) + value.double().sum((0, 2))
        first = next(iter(values.values()))
        count += first.shape[0] * first.shape[2]
    return {
        Node("z", layer, head): (total[head] / count)[None, None].float()
        for layer, total in sums.items()
        for head in range(len(total))
    }
