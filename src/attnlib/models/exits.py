"""Models with several exits: a sample leaves at the first that is sure enough; what lies behind is not computed.

A model of several exits is an :class:`EarlyExit`: it says how it begins and how it comes from one exit to the next.
Thresholds of confidence come from what is to leave where:

    model.eval()
    confidences = torch.stack([confidence(y) for y in model.exits(images)])      # of images kept for that
    thresholds = find_thresholds(confidences, exit_fractions(0.7, model.num_exits))
    answer = model.predict(new_images, thresholds)                               # logits, and the exit of each
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_axes, check_float, check_int, check_rank, check_real, check_values, describe
from ..ops._count import counted
from ..types import State, stats_dtype


class Exited(NamedTuple):
    """What :meth:`EarlyExit.predict` gives.

    Args:
        y: (B, num_classes) logits of the exit at which each sample left.
        exit: (B,) number of that exit, from 0.
    """

    y: Tensor
    exit: Tensor


class EarlyExit:
    """A model that answers at ``num_exits`` places, one behind the other; a mixin beside ``nn.Module``.

    A model says :meth:`begin` and :meth:`advance`; what it keeps in between is a :class:`attnlib.types.State`, so that
    samples which have left can be dropped from it.
    """

    num_exits: int

    def begin(self, x: Tensor, valid: Tensor | None = None) -> State:
        """What stands before the first exit."""
        raise NotImplementedError

    def advance(self, exit: int, state: State) -> tuple[Tensor, State]:
        """From behind exit ``exit - 1`` to exit ``exit``: its logits (B, num_classes), and what goes on."""
        raise NotImplementedError

    def iterate(self, x: Tensor, valid: Tensor | None = None) -> Iterator[Tensor]:
        """Logits of one exit after the other; none is computed before it is asked for."""
        state = self.begin(x, valid)
        for exit in range(self.num_exits):
            y, state = self.advance(exit, state)
            yield y

    def exits(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits of all exits."""
        return tuple(self.iterate(x, valid))

    @torch.no_grad()
    def predict(self, x: Tensor, thresholds: Sequence[float], valid: Tensor | None = None) -> Exited:
        """Every sample leaves at the first exit whose confidence reaches its threshold, at the latest at the last.

        The batch shrinks as samples leave; nothing is computed behind the exit of the last of them.

        Args:
            x: images.
            thresholds: of :func:`confidence`, one for each exit but the last: ``-inf`` lets all go, ``inf`` nobody.
            valid: (B, H, W) boolean, which pixels exist.

        Raises:
            ValueError: another number of thresholds, or a model in training, whose batch norms would mix samples.
        """
        if getattr(self, "training", False):
            raise ValueError("predict needs a model in evaluation: call model.eval() before it")
        limits = _thresholds(thresholds, self.num_exits)
        state = self.begin(x, valid)
        left = torch.arange(len(x), device=x.device)
        ys: list[Tensor] = []
        who: list[Tensor] = []
        at: list[Tensor] = []
        for exit, limit in enumerate((*limits, -math.inf)):
            y, state = self.advance(exit, state)
            goes = confidence(y) >= limit
            ys.append(y[goes])
            who.append(left[goes])
            at.append(torch.full_like(who[-1], exit))
            stays = (~goes).nonzero().flatten()
            if not len(stays):
                break
            left, state = left[stays], state.select(stays)
        order = torch.cat(who).argsort()
        return Exited(torch.cat(ys)[order], torch.cat(at)[order])


def confidence(logits: Tensor) -> Tensor:
    """The largest probability that softmax gives: (..., num_classes) -> (...), in float32 or better.

    >>> confidence(torch.tensor([[0.0, 0.0], [0.0, 9.0]])).round(decimals=3).tolist()
    [0.5, 1.0]
    """
    return logits.softmax(-1, dtype=stats_dtype(logits.dtype)).amax(-1)


def exit_fractions(ratio: float, num_exits: int, weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """Fractions of samples that leave at each exit, ``ratio`` times as many as at the one before; they sum to one.

    Args:
        ratio: below 1 most samples leave early, above 1 late.
        num_exits: of the model.
        weights: what the fraction of each exit is then multiplied by, from the first to the last but one; what this
            leaves over, or takes, goes to those behind in proportion.

    >>> [round(p, 4) for p in exit_fractions(0.5, 3)]
    [0.5714, 0.2857, 0.1429]
    >>> [round(p, 3) for p in exit_fractions(1.0, 4, weights=(0.8, 1, 0.5))]
    [0.2, 0.267, 0.133, 0.4]
    """
    check_real("ratio", ratio, above=0)
    check_int("num_exits", num_exits, least=1)
    rough = [ratio**k for k in range(num_exits)]
    found = [p / sum(rough) for p in rough]
    factors = [1.0] * (num_exits - 1) if weights is None else list(weights)
    if len(factors) != num_exits - 1:
        raise ValueError(f"weights={factors} must have one number for each of {num_exits} exits but the last")
    for k, factor in enumerate(factors):
        check_real(f"weights[{k}]", factor, least=0)
        found[k] *= factor
        rest, behind = 1 - sum(found[: k + 1]), sum(found[k + 1 :])
        if rest < 0:
            raise ValueError(f"weights={factors} lets more samples leave up to exit {k} than there are")
        found[k + 1 :] = [rest * p / behind for p in found[k + 1 :]]
    return tuple(found)


def find_thresholds(confidences: Tensor, fractions: Sequence[float] | Tensor) -> tuple[float, ...]:
    """Thresholds at which given fractions of the samples leave at each exit.

    At every exit but the last the ``floor(fraction N)`` surest samples of those still there leave; the threshold is the
    confidence of the last of these. Equal confidences leave together, so that more may; those behind make no up for it.

    Args:
        confidences: (exits, N) of samples that were kept for this, every sample at every exit.
        fractions: how many leave at each exit; they sum to one.

    Returns:
        One threshold for each exit but the last, for :meth:`EarlyExit.predict`; ``inf`` where nobody is to leave.

    Raises:
        ValueError: fractions that do not sum to one, are negative or not as many as exits; confidences that are not
            numbers, or of no samples.

    >>> find_thresholds(torch.tensor([[0.9, 0.4, 0.6, 0.5], [0.8, 0.7, 0.9, 0.6]]), (0.25, 0.75))
    (0.8999999761581421,)
    """
    check_rank("confidences", confidences, 2, "(exits, N)")
    check_float("confidences", confidences)
    check_values("confidences", confidences)
    count = confidences.shape[1]
    if not count or confidences.isnan().any():
        raise ValueError(f"confidences must be numbers of at least one sample, got {describe(confidences)}")
    shares = [float(p) for p in (fractions.tolist() if isinstance(fractions, Tensor) else fractions)]
    if len(shares) != len(confidences):
        raise ValueError(f"fractions={shares} must have one number for each of {len(confidences)} exits")
    if any(not p >= 0 for p in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"fractions must not be negative and must sum to one, got {shares} with sum {sum(shares):.6g}")
    confidences = confidences.detach()
    there = torch.ones(count, dtype=torch.bool, device=confidences.device)
    found = []
    for sure, share in zip(confidences[:-1], shares, strict=False):
        still = sure[there]
        many = min(math.floor(share * count + 1e-6), len(still))  # a third of three is one, however 1 / 3 is rounded
        found.append(float(still.topk(many).values[-1]) if many else math.inf)
        there &= sure < found[-1]
    return tuple(found)


def choose_exits(confidences: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The exit at which each sample leaves: (exits, N) -> (N,); of recorded confidences, without running the model.

    >>> choose_exits(torch.tensor([[0.9, 0.4], [0.8, 0.7]]), (0.5,)).tolist()
    [0, 1]
    """
    check_rank("confidences", confidences, 2, "(exits, N)")
    limits = _thresholds(thresholds, len(confidences))
    reached = confidences >= confidences.new_tensor([*limits, -math.inf])[:, None]
    return reached.to(torch.uint8).argmax(0)


def _thresholds(given: Sequence[float], num_exits: int) -> list[float]:
    limits = [float(t) for t in given]
    if len(limits) != num_exits - 1 or any(math.isnan(t) for t in limits):
        raise ValueError(
            f"thresholds={limits} must have one number for each of {num_exits} exits but the last, where all leave"
        )
    return limits


def exit_losses(
    exits: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float],
    distillation: float = 0.5,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Cross-entropy of every exit, and what the last one teaches those before it.

    ``sum_k w_k CE(y_k, target) + a T^2 sum_k KL(softmax(y_last / T) || softmax(y_k / T))``, where the last exit is
    taken as given: no gradient reaches it through what it teaches.

    Args:
        exits: (B, num_classes) logits of each exit.
        target: (B,) classes, or (B, num_classes) probabilities.
        weights: of the cross-entropies, one for each exit.
        distillation: a; 0 for none.
        temperature: T.
        label_smoothing: of the cross-entropies.

    Returns:
        ``"cross_entropy"`` and ``"distillation"``; their sum is trained.
    """
    factors = [check_real(f"weights[{k}]", w, least=0) for k, w in enumerate(weights)]
    if len(factors) != len(exits) or not exits:
        raise ValueError(f"weights={factors} must have one number for each of {len(exits)} exits")
    check_real("distillation", distillation, least=0)
    check_real("temperature", temperature, above=0)
    for k, y in enumerate(exits):
        check_axes(f"exits[{k}]", y, B=len(target), num_classes=exits[-1].shape[-1])
    terms = [F.cross_entropy(y, target, label_smoothing=label_smoothing) for y in exits]
    losses = {"cross_entropy": torch.stack([w * t for w, t in zip(factors, terms, strict=True)]).sum()}
    if distillation:
        taught = (exits[-1].detach() / temperature).softmax(-1)
        found = [F.kl_div((y / temperature).log_softmax(-1), taught, reduction="batchmean") for y in exits[:-1]]
        losses["distillation"] = distillation * temperature**2 * sum(found, exits[-1].new_zeros(()))
    return losses


@torch.no_grad()
def exit_costs(model: Any, x: Tensor) -> tuple[int, ...]:
    """Multiplications and additions, as pairs, up to each exit and with all exits before it: convolutions and products.

    Args:
        model: of several exits, in evaluation; on the meta device it is counted without being run.
        x: one image (1, C, H, W), or the batch that is to be counted.
    """
    found = []
    with counted() as counter:
        for _ in model.iterate(x):
            found.append(counter.get_total_flops() // 2)
    return tuple(found)
