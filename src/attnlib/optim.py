"""AdamP and SGDP: momentum optimizers that do not let scale-invariant weights grow (Heo et al., 2021).

A weight before a normalisation is scale-invariant: its gradient is orthogonal to it, so every step adds to its norm,
and momentum adds up to nineteen times as much (at beta = 0.9), which shrinks the effective step. Both optimizers remove
the radial part of the update wherever gradient and weight are almost orthogonal, and reduce weight decay there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .checks import check_choice, check_flag, check_float, check_real, check_type, describe

__all__ = ["SGDP", "AdamP", "AdamR", "Kar3"]

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


def _project(
    p: Tensor, grad: Tensor, update: Tensor, delta: float, wd_ratio: float, eps: float
) -> tuple[Tensor, float]:
    """The update without its radial part, and the factor of weight decay.

    Rows of the weight are tried first, then the weight as a whole: the first view in which every row of the gradient is
    almost orthogonal to the weight decides. Vectors and scalars are left alone.
    """
    if p.dim() <= 1 or not p.numel():
        return update, 1.0
    for rows in (p.shape[0], 1):
        weight = p.reshape(rows, -1)
        # cosine in float32 at least: the threshold is far below what half precision resolves
        high = torch.promote_types(p.dtype, torch.float32)
        cosine = F.cosine_similarity(grad.reshape(rows, -1).to(high), weight.to(high), dim=1, eps=eps).abs()
        if bool(cosine.max() < delta / math.sqrt(weight.shape[1])):
            unit = weight / weight.norm(dim=1, keepdim=True).add_(eps)
            flat = update.reshape(rows, -1)
            return (flat - unit * (unit * flat).sum(1, keepdim=True)).view_as(p), wd_ratio
    return update, 1.0


class _Checked(Optimizer):
    """Parameters and settings are checked, those of groups that are added later too."""

    #: Settings that lie in [0, 1), beside those of at least 0.
    below_one: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Params, defaults: dict[str, Any]):
        if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
            raise TypeError(
                f"params must be parameters, or dictionaries of them, in a sequence; got {describe(params)}"
            )
        given: list[Any] = list(params)
        if not given:
            raise ValueError("params must hold at least one parameter, got none")
        for p in given:
            check_type("params", p, (Tensor, dict, tuple), "tensors, or dictionaries with settings of their own")
        super().__init__(given, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, which are held to the same bounds as the optimizer's."""
        check_type("param_group", param_group, dict)
        for name, value in {**self.defaults, **param_group}.items():
            if name == "betas":
                if not isinstance(value, (tuple, list)) or len(value) != 2:
                    raise TypeError(f"betas must be two numbers, got {describe(value)}")
                for i, beta in enumerate(value):
                    check_real(f"betas[{i}]", beta, least=0, below=1)
            elif name in ("nesterov", "l1"):
                check_flag(name, value)
            elif name in self.defaults:
                check_real(name, value, least=0, below=1 if name in self.below_one else None)
        given: Any = param_group.get("params", [])
        for one in [given] if isinstance(given, Tensor) else given if isinstance(given, Sequence) else []:
            p: Any = one[1] if isinstance(one, tuple) and len(one) == 2 else one  # as named_parameters() gives them
            check_float("params", p)
            if not (p.is_leaf or p.retains_grad):
                raise ValueError(f"params must be leaves, or retain their gradient, got {describe(p)} of a graph")
        super().add_param_group(param_group)


class _Projected(_Checked):
    """The shared part: gather, advance the moments with foreach kernels, project, decay, step."""

    def _moments(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], float]:
        """Updates (new tensors) and the learning rate's share of one step; advances the state."""
        raise NotImplementedError

    def _decay(self, group: dict[str, Any]) -> float:
        return group["lr"] * group["weight_decay"]

    def _keep(self, group: dict[str, Any], p: Tensor, update: Tensor) -> None:
        """What the state remembers of the projected update; nothing by default."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. ``closure`` evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise ValueError(f"{type(self).__name__} takes dense gradients only; a parameter has a sparse one")
            # Tensors that start at different times (frozen layers) keep steps of their own.
            for bucket in self._buckets(params):
                grads = [p.grad for p in bucket if p.grad is not None]
                updates, rates = self._moments(group, bucket, grads)
                for i, (p, g) in enumerate(zip(bucket, grads, strict=True)):
                    updates[i], ratio = _project(p, g, updates[i], group["delta"], group["wd_ratio"], group["eps"])
                    self._keep(group, p, updates[i])
                    if group["weight_decay"] > 0:
                        p.mul_(1 - self._decay(group) * ratio)
                torch._foreach_add_(bucket, updates, alpha=-rates)
        return loss

    def _buckets(self, params: list[Tensor]) -> list[list[Tensor]]:
        found: dict[Any, list[Tensor]] = {}
        for p in params:
            found.setdefault((self.state[p].get("step", 0), p.device, p.dtype), []).append(p)
        return list(found.values())


class AdamP(_Projected):
    """Adam with the projection, and weight decay decoupled as in AdamW.

    Args:
        params, lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        delta: a row counts as scale-invariant when ``|cos(gradient, weight)| < delta / sqrt(width)``.
        wd_ratio: weight decay of scale-invariant weights, as a fraction.
        nesterov: look ahead along the gradient.

    Its state dict is the authors' own: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Reference: Heo et al., 2021, arXiv 2006.08217, algorithm 2.

    >>> w = torch.nn.Parameter(torch.ones(2, 2))
    >>> w.grad = torch.eye(2)
    >>> AdamP([w], lr=0.1).step()
    >>> w.shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ):
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                delta=delta,
                wd_ratio=wd_ratio,
                nesterov=nesterov,
            ),
        )

    def _moments(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], float]:
        beta1, beta2 = group["betas"]
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            self.state[p]["step"] += 1
        step = self.state[params[0]]["step"]
        first, second = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        denom = torch._foreach_sqrt(second)
        torch._foreach_div_(denom, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denom, group["eps"])
        if group["nesterov"]:
            ahead = torch._foreach_mul(first, beta1)
            torch._foreach_add_(ahead, grads, alpha=1 - beta1)
            updates = torch._foreach_div(ahead, denom)
        else:
            updates = torch._foreach_div(first, denom)
        return list(updates), group["lr"] / (1 - beta1**step)


class SGDP(_Projected):
    """SGD with momentum and the projection.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``, except that weight decay is
            decoupled and divided by ``1 - momentum``.
        eps, delta, wd_ratio: as in :class:`AdamP`.
        compat: ``"authors"`` projects the momentum buffer itself, as their release does without ``nesterov``; by
            default the buffer keeps the raw momentum.

    Reference: Heo et al., 2021, arXiv 2006.08217, algorithm 1.

    >>> w = torch.nn.Parameter(torch.ones(2, 2))
    >>> w.grad = torch.eye(2)
    >>> SGDP([w], lr=0.1, momentum=0.9).step()
    >>> w.shape
    torch.Size([2, 2])
    """

    below_one = ("momentum",)

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        compat: str | None = None,
    ):
        check_choice("compat", compat, (None, "authors"))
        self.compat = compat
        super().__init__(
            params,
            dict(
                lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, eps=eps,
                delta=delta, wd_ratio=wd_ratio,
            ),
        )  # fmt: skip

    def _decay(self, group: dict[str, Any]) -> float:
        return group["lr"] * group["weight_decay"] / (1 - group["momentum"])

    def _moments(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], float]:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
        if group["nesterov"]:
            updates = torch._foreach_mul(buffers, group["momentum"])
            torch._foreach_add_(updates, grads)
            return list(updates), group["lr"]
        return list(buffers), group["lr"]

    def _keep(self, group: dict[str, Any], p: Tensor, update: Tensor) -> None:
        if self.compat == "authors" and not group["nesterov"]:
            self.state[p]["momentum"].copy_(update)


class Kar3(_Checked):
    """Signs of the gradient and of two of its running means (Zhang, 2024, arXiv 2401.17948; a reading).

    ``p <- p - lr (sign(g) + sign(m_1) + sign(m_2))``, then ``m_i <- beta_i m_i + (1 - beta_i) g``: a step reads the
    means of the gradients before it. A weight that has seen none yet moves by the gradient's sign alone.

    Args:
        params: parameters, or dictionaries of them.
        lr: of a step; every number moves by at most three of it.
        betas: of the two means.
        weight_decay: added to the gradient, times the weight.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([-2.0])
    >>> Kar3([p], lr=0.5).step()
    >>> p.item()
    1.5
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.215e-3,
        betas: Sequence[float] = (0.5, 0.95),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the closure's loss, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                state = self.state[p]
                means = [state.setdefault(name, torch.zeros_like(p)) for name in ("first", "second")]
                p.add_(grad.sign() + means[0].sign() + means[1].sign(), alpha=-group["lr"])
                for mean, beta in zip(means, group["betas"], strict=True):
                    mean.mul_(beta).add_(grad, alpha=1 - beta)
        return loss


class AdamR(_Checked):
    """Adam with weights drawn to where they started, so that what fine-tuning changes stays small (arXiv 2410.09344).

    Before Adam's step, ``w <- w - lr decay / sqrt(mean(v)) (w - w_pre)``, with the mean over all weights of the squared
    gradients' corrected running mean; the sign of ``w - w_pre`` instead with ``l1``. Without decay this is Adam.

    Args:
        params: parameters, or dictionaries of them.
        reference: where they are drawn to, one tensor for each parameter, in the order of all groups; by default where
            they are now.
        lr, betas, eps: as in ``torch.optim.Adam``.
        weight_decay: of the distance, not of the weights.
        l1: decay by signs.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = AdamR([p], reference=[torch.zeros(1)], lr=0.1, weight_decay=1.0)
    >>> p.grad = torch.tensor([0.0])
    >>> optimizer.step()
    >>> round(p.item(), 4)
    0.9
    """

    def __init__(
        self, params: Params, reference: Sequence[Tensor] | None = None, lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-4, l1: bool = False,
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, l1=l1))
        every: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        given = every if reference is None else list(reference)
        if [t.shape for t in given] != [p.shape for p in every]:
            raise ValueError(f"reference must hold a tensor of each of the {len(every)} parameters' shapes, in order")
        for p, t in zip(every, given, strict=True):
            self.state[p]["reference"] = t.detach().clone().to(p)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, drawn to where they are now."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["reference"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the closure's loss, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        total, count = 0.0, 0
        moving = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p in moving:
            state, (one, two) = self.state[p], group["betas"]
            if "step" not in state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1 - one)
            state["exp_avg_sq"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
            if group["weight_decay"]:
                total += float(state["exp_avg_sq"].sum()) / (1 - two ** state["step"])
            count += p.numel()
        scale = math.sqrt(total / count) if total else 1.0  # as the authors: no gradient yet, no division
        for group, p in moving:
            state, (one, two) = self.state[p], group["betas"]
            if group["weight_decay"]:
                away = p - state["reference"]
                p.add_(away.sign() if group["l1"] else away, alpha=-group["lr"] * group["weight_decay"] / scale)
            denom = (state["exp_avg_sq"] / (1 - two ** state["step"])).sqrt_().add_(group["eps"])
            p.addcdiv_(state["exp_avg"], denom, value=-group["lr"] / (1 - one ** state["step"]))
        return loss


@contextmanager
def shown(progress: bool | Callable[[int, float], None], steps: int) -> Iterator[Callable[[int, float], None]]:
    """Progress of a training: a function of how many steps are done and of the loss.

    Args:
        progress: draw a bar; or what is called with both.
        steps: how many there are.
    """
    if callable(progress):
        yield progress
        return
    if not check_flag("progress", progress):
        yield lambda step, loss: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("training", total=steps)
        yield lambda step, loss: bar.update(task, completed=step, description=f"loss {loss:.4f}")
