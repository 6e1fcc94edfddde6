"""How a row of scores becomes a row of weights.

A normalizer says which activation it applies, which row statistics it needs, and how many passes over the scores that
costs: one that needs the *final* statistic of the row before it acts (clipping a softmax) takes two. It gives its own
derivative so that the tiled engine can recompute weights in a hand-written backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import check_choice, check_flag, check_int, check_real, fixed, raised

_KINDS: dict[str, type[Normalizer]] = {}


@dataclass(frozen=True)
class Normalizer:
    """Base of all normalizers.

    ``scores`` (..., N, M) are already scaled, biased and in the statistics dtype; pairs that may not meet are ``-inf``.
    A subclass with a ``name`` is known to ``as_normalizer`` by it, unless it is declared with ``register=False``.
    """

    name: ClassVar[str] = ""
    activation: ClassVar[str] = "exp"
    stats: ClassVar[tuple[str, ...]] = ()
    passes: ClassVar[int] = 1
    axis: ClassVar[str] = "keys"
    empty: ClassVar[float] = 0.0

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if register and cls.__dict__.get("name"):
            _KINDS[cls.name] = cls

    def weights(self, scores: Tensor) -> Tensor:
        """(..., N, M) weights; zero wherever the score is ``-inf`` and in rows that see nothing."""
        raise NotImplementedError

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to the scores, given the gradient with respect to the weights."""
        raise NotImplementedError

    def weights_(self, scores: Tensor) -> Tensor:
        """:meth:`weights`, free to overwrite ``scores``; the caller vouches that every row sees some key."""
        return self.weights(scores)

    def adjoint_(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """``(weights, gradient of the scores)``, free to overwrite both arguments; every row must see some key."""
        weights = self.weights(scores)
        return weights, self.backward(scores, weights, grad)

    @property
    def deferred(self) -> bool:
        """Whether rows are only divided by their sum, so that this can wait until the values are mixed."""
        return False

    def raw_(self, scores: Tensor) -> Tensor:
        """Weights before they are divided by their row's sum, in the memory of ``scores``. Only where ``deferred``."""
        raise NotImplementedError

    def raw_adjoint_(self, scores: Tensor, grad: Tensor, met: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """``(raw weights, gradient of the scores times the row's sum)``; overwrites all but ``met``.

        Args:
            scores, grad, room: (..., N, M): scores, gradient of the weights, memory for the raw weights.
            met: (..., N, 1) ``(weights * grad).sum(-1)`` over the whole row, which may be longer than ``scores``.
        """
        raise NotImplementedError

    def lower(self) -> str:
        """A string from which :func:`raise_normalizer` rebuilds this normalizer."""
        # Written out by hand because torch.compile traces this and cannot trace the json package.
        return "{" + ",".join([f'"name":"{self.name}"', *(f'"{k}":{_literal(v)}' for k, v in vars(self).items())]) + "}"


def _literal(value: float | bool | str | None) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return repr(fixed(value))
    return repr(int(value) if hasattr(value, "__index__") else float(value))  # numbers of numpy print their type


#: Exponentials as powers of two: on the CPU ``exp`` is 20 to 200 times slower where it underflows or meets ``-inf``.
LOG2_E = math.log2(math.e)


def exp_(s: Tensor) -> Tensor:
    """``e^s`` in the memory of ``s``, as a power of two."""
    return s.mul_(LOG2_E).exp2_()


def peaked(largest: float) -> bool:
    """Whether scores of at most this size may lie so far apart that weights leave the normal numbers.

    Processors calculate ten to a hundred times slower with what is smaller than these.
    """
    return not largest <= 30


def drop_negligible_(scores: Tensor) -> Tensor:
    """Scores less the largest of their row, ``-inf`` where a weight is below 2^-100 of its: nothing is left of it."""
    least = -100 / LOG2_E if scores.dtype != torch.float64 else -990 / LOG2_E
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    return torch.nn.functional.threshold_(scores.sub_(top), least, -math.inf)  # type: ignore[attr-defined]


def softmax_rows(scores: Tensor) -> Tensor:
    """Softmax over the last axis in which a row of ``-inf`` gives zeros with zero gradients."""
    if not scores.shape[-1]:
        return scores
    empty = scores.detach().amax(-1, keepdim=True) == -torch.inf
    # One kernel, whose exponential also stands scores far apart, over which torch.exp takes six times as long.
    if scores.requires_grad:
        return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return torch.softmax(scores, -1).masked_fill_(empty, 0.0)


def _softmax_backward(weights: Tensor, grad: Tensor) -> Tensor:
    return weights * (grad - (weights * grad).sum(-1, keepdim=True))


def _softmax_(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, out=scores)


def _softmax_backward_(weights: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data.out(grad, weights, -1, grad.dtype, grad_input=grad)


@dataclass(frozen=True)
class Softmax(Normalizer):
    """``exp(s) / sum exp(s)``."""

    name: ClassVar[str] = "softmax"
    stats: ClassVar[tuple[str, ...]] = ("max", "sum")

    def weights(self, scores: Tensor) -> Tensor:
        return softmax_rows(scores)

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        return _softmax_backward(weights, grad)

    def weights_(self, scores: Tensor) -> Tensor:
        return _softmax_(scores)

    def adjoint_(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights = _softmax_(scores)
        return weights, _softmax_backward_(weights, grad)


@dataclass(frozen=True)
class Sigmoid(Normalizer):
    """``sigmoid(s + bias)``, element by element; no statistic of the row. ``bias = -log(n)`` matches softmax's size."""

    bias: float = 0.0
    name: ClassVar[str] = "sigmoid"
    activation: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        check_real("bias", self.bias)

    def weights(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores + self.bias)

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        return grad * weights * (1 - weights)

    def weights_(self, scores: Tensor) -> Tensor:
        return (scores.add_(self.bias) if self.bias else scores).sigmoid_()

    def adjoint_(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.weights_(scores)
        return weights, torch.ops.aten.sigmoid_backward.grad_input(grad, weights, grad_input=grad)


@dataclass(frozen=True)
class ClippedSoftmax(Normalizer):
    """``clip((zeta - gamma) softmax(s) + gamma, 0, 1)``: exact zeros at finite scores; forbidden pairs stay 0."""

    gamma: float = -0.03
    zeta: float = 1.0
    name: ClassVar[str] = "clipped_softmax"
    stats: ClassVar[tuple[str, ...]] = ("max", "sum")
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_real("gamma", self.gamma)
        check_real("zeta", self.zeta)
        if self.gamma > 0 or self.zeta < 1:
            raise ValueError(
                f"clipped softmax needs gamma <= 0 and zeta >= 1, got gamma={self.gamma}, zeta={self.zeta}"
            )

    def weights(self, scores: Tensor) -> Tensor:
        return (softmax_rows(scores) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        stretch = self.zeta - self.gamma
        soft = softmax_rows(scores)
        raw = soft * stretch + self.gamma
        return _softmax_backward(soft, grad * ((raw >= 0) & (raw <= 1)) * stretch)

    def _stretch_(self, soft: Tensor) -> Tensor:
        return soft.mul_(self.zeta - self.gamma).add_(self.gamma).clamp_(0, 1)

    def weights_(self, scores: Tensor) -> Tensor:
        return self._stretch_(_softmax_(scores))

    def adjoint_(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        # The clip passes gradients for softmax values strictly between these bounds; where an end does not clip at
        # all the bound lies outside [0, 1].
        stretch, soft = self.zeta - self.gamma, _softmax_(scores)
        low = -self.gamma / stretch if self.gamma < 0 else -1.0
        high = (1 - self.gamma) / stretch if self.zeta > 1 else 2.0
        torch.ops.aten.hardtanh_backward.grad_input(grad, soft, low, high, grad_input=grad)
        grad = _softmax_backward_(soft, grad).mul_(stretch)
        return self._stretch_(soft), grad


@dataclass(frozen=True)
class Relu(Normalizer):
    """``relu(s) / divisor``; no statistic of the row."""

    divisor: float = 1.0
    name: ClassVar[str] = "relu"
    activation: ClassVar[str] = "relu"

    def __post_init__(self) -> None:
        check_real("divisor", self.divisor, above=0)

    def weights(self, scores: Tensor) -> Tensor:
        return torch.relu(scores) / self.divisor

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        return grad * (scores > 0) / self.divisor

    def weights_(self, scores: Tensor) -> Tensor:
        scores.relu_()
        return scores.div_(self.divisor) if self.divisor != 1 else scores

    def adjoint_(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        torch.ops.aten.threshold_backward.grad_input(grad, scores, 0, grad_input=grad)
        return self.weights_(scores), grad.div_(self.divisor) if self.divisor != 1 else grad


@dataclass(frozen=True)
class Step(Normalizer):
    """1 where a score is above 0, else 0. Gradients pass where ``|s| < 1``, in place of a derivative of zero."""

    name: ClassVar[str] = "step"
    activation: ClassVar[str] = "step"

    def weights(self, scores: Tensor) -> Tensor:
        hard = (scores > 0).to(scores.dtype)
        if not scores.requires_grad:
            return hard
        near = torch.where(scores.abs() < 1, scores, 0)
        return hard + (near - near.detach())

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        return grad * (scores.abs() < 1)


@dataclass(frozen=True)
class Thresholded(Normalizer):
    """1 where softmax reaches a share of the largest weight of its row, else 0; gradients are those of softmax.

    That is where ``s >= max s + ln share``. Rows are not divided by their sum.
    """

    share: float = 0.25
    name: ClassVar[str] = "thresholded"
    stats: ClassVar[tuple[str, ...]] = ("max",)
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_real("share", self.share, above=0, most=1)

    def _hard(self, soft: Tensor) -> Tensor:
        if not soft.shape[-1]:
            return soft
        return ((soft >= self.share * soft.amax(-1, keepdim=True)) & (soft > 0)).to(soft.dtype)

    def weights(self, scores: Tensor) -> Tensor:
        soft = softmax_rows(scores)
        hard = self._hard(soft.detach())
        return hard + (soft - soft.detach()) if soft.requires_grad else hard

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        return _softmax_backward(softmax_rows(scores), grad)

    def adjoint_(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        soft = _softmax_(scores)
        return self._hard(soft), _softmax_backward_(soft, grad)


@dataclass(frozen=True)
class SoftplusL1(Normalizer):
    """``softplus(s) / sum softplus(s)``."""

    name: ClassVar[str] = "softplus_l1"
    activation: ClassVar[str] = "softplus"
    stats: ClassVar[tuple[str, ...]] = ("sum",)

    def weights(self, scores: Tensor) -> Tensor:
        a = torch.nn.functional.softplus(scores)
        total = a.sum(-1, keepdim=True)
        return a / torch.where(total == 0, torch.ones_like(total), total)

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        total = torch.nn.functional.softplus(scores).sum(-1, keepdim=True)
        total = torch.where(total == 0, torch.ones_like(total), total)
        return torch.sigmoid(scores) * (grad - (weights * grad).sum(-1, keepdim=True)) / total

    @property
    def deferred(self) -> bool:
        return True

    def raw_(self, scores: Tensor) -> Tensor:
        return _act("softplus", scores, scores)

    def raw_adjoint_(self, scores: Tensor, grad: Tensor, met: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        return _raw_adjoint_("softplus", scores, grad, met, room)


@dataclass(frozen=True)
class Uniform(Normalizer):
    """A mixture ``(1 - u) softmax + u / visible``; ``u = 1`` ignores the scores."""

    u: float = 1.0
    name: ClassVar[str] = "uniform"
    stats: ClassVar[tuple[str, ...]] = ("max", "sum", "count")
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_real("u", self.u, least=0, most=1)

    def weights(self, scores: Tensor) -> Tensor:
        seen = ~torch.isinf(scores)
        count = seen.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
        return softmax_rows(scores) * (1 - self.u) + seen * (self.u / count)

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        return _softmax_backward(softmax_rows(scores), grad * (1 - self.u))


def _elu1(s: Tensor) -> Tensor:
    return torch.where(s > 0, s + 1, torch.exp(s.clamp(max=0)))


#: Positive activations and their derivatives, for :class:`Activated`. All send ``-inf`` to 0 with zero derivative.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (torch.exp, torch.exp),
    "softplus": (torch.nn.functional.softplus, torch.sigmoid),
    "sigmoid": (torch.sigmoid, lambda s: torch.sigmoid(s) * torch.sigmoid(-s)),
    "relu": (torch.relu, lambda s: (s > 0).to(s.dtype)),
    "elu1": (_elu1, lambda s: torch.where(s > 0, torch.ones_like(s), torch.exp(s.clamp(max=0)))),
}


def _act(phi: str, s: Tensor, out: Tensor) -> Tensor:
    """``phi(s)`` written to ``out``, which may be ``s`` itself."""
    if phi == "softplus":
        return torch.ops.aten.softplus.out(s, 1, 20, out=out)
    if phi == "exp":
        return exp_(s) if out is s else torch.mul(s, LOG2_E, out=out).exp2_()
    if phi == "sigmoid":
        return torch.sigmoid(s, out=out)
    if phi == "relu":
        return torch.clamp(s, min=0, out=out)
    low = s.clamp(max=0).exp_()
    return torch.add(s.clamp(min=0), low, out=out)


def _slope_(phi: str, s: Tensor, a: Tensor, grad: Tensor) -> Tensor:
    """``grad * phi'(s)`` in ``grad``, from the scores and ``a = phi(s)``; may overwrite ``s``."""
    if phi == "softplus":
        return grad.mul_(s.sigmoid_())
    if phi == "exp":
        return grad.mul_(a)
    if phi == "sigmoid":
        return torch.ops.aten.sigmoid_backward.grad_input(grad, a, grad_input=grad)
    if phi == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, a, 0, grad_input=grad)
    return grad.mul_(a.clamp(max=1))


def _raw_adjoint_(phi: str, scores: Tensor, grad: Tensor, met: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    a = _act(phi, scores, room)
    return a, _slope_(phi, scores, a, grad.sub_(met))


def _over(a: Tensor, total: Tensor) -> Tensor:
    return a / torch.where(total == 0, torch.ones_like(total), total)


def _l1_backward(weights: Tensor, total: Tensor, grad: Tensor) -> Tensor:
    return _over(grad - (weights * grad).sum(-1, keepdim=True), total)


@dataclass(frozen=True)
class Activated(Normalizer):
    """``phi(s)``, divided by the row's sum or not, then sharpened or not: the family of softmax's relatives.

    ``A = phi(s) / sum phi(s)``; with a ``power``, ``A <- relu(A N - O)^p``, normalised again, where ``N`` is the number
    of visible keys of the row (the mean of ``A N`` is one) and ``O = offset``, except 0 in rows that see at most
    ``spare`` keys. A row in which nothing exceeds the offset (a uniform one) stays as it was.

    Args:
        phi: one of :data:`ACTIVATIONS`.
        l1: divide by the row's sum.
        power: ``p``; ``None`` for no sharpening. Needs ``l1``.
        offset, spare: ``O`` and the rows it spares.

    Reference: Gao and Spratling, 2025, arXiv 2501.13428 (softplus with re-weighting).
    """

    phi: str = "softplus"
    l1: bool = True
    power: float | None = None
    offset: float = 1.0
    spare: int = 3
    name: ClassVar[str] = "activated"
    activation: ClassVar[str] = "any"

    @property
    def stats(self) -> tuple[str, ...]:  # type: ignore[override]
        """None without a sum; sharpening also counts the visible keys."""
        largest = ("max",) if self.phi == "exp" or self.power is not None else ()
        return () if not self.l1 else (*largest, "sum", *(("count",) if self.power is not None else ()))

    @property
    def passes(self) -> int:  # type: ignore[override]
        """Sharpening needs the row's sum before it acts."""
        return 1 if self.power is None else 2

    def __post_init__(self) -> None:
        check_choice("phi", self.phi, list(ACTIVATIONS))
        check_flag("l1", self.l1)
        check_real("offset", self.offset)
        check_int("spare", self.spare, least=0)
        if self.power is not None:
            check_real("power", self.power)
            if self.power <= 0 or not self.l1:
                raise ValueError(f"power={self.power} must be positive and needs l1=True")

    @property
    def deferred(self) -> bool:
        """A plain sum can wait; a softmax needs the row's largest score first, and sharpening the sum itself."""
        return self.power is None and self.l1 and self.phi != "exp"

    def raw_(self, scores: Tensor) -> Tensor:
        return _act(self.phi, scores, scores)

    def raw_adjoint_(self, scores: Tensor, grad: Tensor, met: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        return _raw_adjoint_(self.phi, scores, grad, met, room)

    def weights_(self, scores: Tensor) -> Tensor:
        return self.weights(scores) if self.l1 else _act(self.phi, scores, scores)

    def adjoint_(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.l1:
            return super().adjoint_(scores, grad)
        a = _act(self.phi, scores, torch.empty_like(scores))
        return a, _slope_(self.phi, scores, a, grad)

    def _forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        if self.phi == "exp" and self.l1:
            base, total = softmax_rows(scores), torch.ones_like(scores[..., :1])
        else:
            a = ACTIVATIONS[self.phi][0](scores)
            total = a.sum(-1, keepdim=True) if self.l1 else torch.ones_like(a[..., :1])
            base = _over(a, total)
        if self.power is None:
            return base, base, total, base, total, total
        count = (scores > float("-inf")).sum(-1, keepdim=True).to(scores.dtype)
        excess = (base * count - self.offset * (count > self.spare).to(scores.dtype)).clamp(min=0)
        # Divided by the largest before the power: the same after normalisation, and 4096 ** 15 never appears.
        top = excess.amax(-1, keepdim=True) if scores.shape[-1] else torch.zeros_like(count)
        ratio = _over(excess, top)
        sharp = ratio**self.power
        mass = sharp.sum(-1, keepdim=True)
        return (
            torch.where(mass == 0, base, _over(sharp, mass)),
            base,
            total,
            ratio,
            mass,
            count * (mass != 0) / (torch.where(top == 0, torch.ones_like(top), top)),
        )

    def weights(self, scores: Tensor) -> Tensor:
        return self._forward(scores)[0]

    def backward(self, scores: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        weights, base, total, ratio, mass, slope = self._forward(scores)
        if self.power is not None:
            inner = _l1_backward(weights, mass, grad) * self.power * ratio ** (self.power - 1) * (ratio > 0) * slope
            grad = torch.where(mass == 0, grad, inner)
        if self.phi == "exp" and self.l1:
            return _softmax_backward(base, grad)
        if self.l1:
            grad = _l1_backward(base, total, grad)
        return grad * ACTIVATIONS[self.phi][1](scores)


def raise_normalizer(spec: str) -> Normalizer:
    """The normalizer that :meth:`Normalizer.lower` described; ``ValueError`` for anything else."""
    return raised("spec", spec, lambda settings: _KINDS[settings.pop("name")](**settings), "Normalizer.lower")


def as_normalizer(normalizer: str | Normalizer) -> Normalizer:
    """Accept a name where a normalizer is meant.

    >>> as_normalizer("sigmoid")
    Sigmoid(bias=0.0)
    """
    if isinstance(normalizer, Normalizer):
        return normalizer
    check_choice("normalizer", normalizer, list(_KINDS))
    return _KINDS[normalizer]()


def sigmoid_bias(n: int) -> float:
    """``-log(n)``: with it, sigmoid attention over ``n`` keys starts at the output norm of softmax."""
    check_int("n", n, least=1)
    return -math.log(n)


def normalizer_names() -> Sequence[str]:
    """Names that ``as_normalizer`` knows."""
    return tuple(_KINDS)
