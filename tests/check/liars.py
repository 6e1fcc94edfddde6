"""Small mechanisms that lie about one thing each; with ``lie=False`` the same class is honest.

They are the tests of the conformance kit: it must reject every lie for the right reason and pass every honest twin.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnlib import Mechanism, Output, State, Traits
from attnlib.masks import Mask
from attnlib.nn.layers import zero_invalid
from attnlib.types import stats_dtype

PLAIN = Traits(grid_ranks={1}, work={"N": 2}, memory={"N": 2}, traceable=False)
CAUSAL = PLAIN.but(patterns={"causal-self"})


class Liar(Mechanism):
    """One head of softmax attention that is honest; every liar changes one thing."""

    class_traits = PLAIN
    caught_by: ClassVar[set[str]] = set()  # the claims that must be refuted
    exactly: ClassVar[bool] = True  # and no other

    def __init__(self, dim: int, lie: bool = True):
        super().__init__(dim)
        self.lie = lie
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def attend(self, x: Tensor, allowed: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """(B, N, C): ``allowed`` (B or 1, N, N) and ``valid`` (B, N) say which keys a row reads; none gives zeros."""
        scores = (self.q(x) @ self.k(x).transpose(1, 2)).to(stats_dtype(x.dtype)) * self.dim**-0.5
        keep = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
        keep = keep if valid is None else keep & valid[:, None]
        return self.proj(self.weigh(scores, keep).to(x.dtype) @ self.v(x).to(x.dtype))

    def weigh(self, scores: Tensor, keep: Tensor) -> Tensor:
        """Softmax over the kept keys; a row without any gives zeros."""
        empty = ~keep.any(-1, keepdim=True)
        return scores.masked_fill(~(keep | empty), float("-inf")).softmax(-1).masked_fill(empty, 0.0)

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor | Output:
        return self.attend(x, None, valid)


def tril(n: int, diagonal: int = 0) -> Tensor:
    return torch.ones(1, n, n, dtype=torch.bool).tril(diagonal)


class PeeksOneAhead(Liar):
    """Reads one token of the future."""

    class_traits = CAUSAL
    caught_by = {"causality"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        return self.attend(x, tril(x.shape[1], 1 if self.lie else 0), valid)


class ChoosesByTheFuture(Liar):
    """Keeps loud tokens only, where "loud" is judged, without gradient, by the mean over the whole sequence."""

    class_traits = CAUSAL
    caught_by = {"causality"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        exists = torch.ones_like(x[..., 0], dtype=torch.float64) if valid is None else valid.double()
        loud = x.detach().double().square().sum(-1) * exists
        total, count = (loud.sum(1, True), exists.sum(1, True)) if self.lie else (loud.cumsum(1), exists.cumsum(1))
        keep = (loud >= total / count.clamp(min=1))[:, None] & tril(x.shape[1])
        return self.attend(x, keep, valid)


class QuadraticInDisguise(Liar):
    """Claims linear growth, multiplies queries by keys all the same."""

    class_traits = PLAIN.but(work={"N": 1}, memory={"N": 1})
    caught_by = {"work", "memory"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        q, k, v = self.q(x).sigmoid(), zero_invalid(self.k(x).sigmoid(), valid), self.v(x)
        out = (q @ k.transpose(1, 2)) @ v if self.lie else q @ (k.transpose(1, 2) @ v)
        return self.proj(out / (q @ k.sum(1)[..., None]).clamp(min=1e-6))


class NanOnAnEmptyRow(Liar):
    """Divides zero by zero where a mask leaves nothing to read."""

    class_traits = PLAIN.but(mask=True)
    caught_by = {"mask"}

    def mix(
        self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, mask: Mask | None = None, **_: Any
    ) -> Tensor:
        allowed = None if mask is None else mask.dense(x.shape[1])
        allowed = allowed[:, 0] if allowed is not None and allowed.dim() == 4 else allowed
        y = self.attend(x, allowed, valid)
        if self.lie and allowed is not None:
            y = y / allowed.any(-1, keepdim=True)
        return y


class StreamDrifts(Liar):
    """Forgets a little with every call, so that many short calls differ from one long one."""

    class_traits = CAUSAL.but(streaming=True)
    caught_by = {"streaming"}

    def mix(
        self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, state: State | None = None, **_: Any
    ) -> Output:
        k, v = zero_invalid(self.k(x).sigmoid(), valid), self.v(x)
        past = x.new_zeros(x.shape[0], self.dim, self.dim, dtype=stats_dtype(x.dtype)) if state is None else state["S"]
        past = past * 0.999 if self.lie else past
        sums = past[:, None] + (k[..., None] * v[..., None, :]).to(past.dtype).cumsum(1)
        y = self.proj((self.q(x).to(sums.dtype)[..., None, :] @ sums)[..., 0, :].to(x.dtype))
        return Output(y, state=State({"S": sums[:, -1]}))


class LooksAtItsNeighbours(Liar):
    """Mixes a little of the batch's mean into every sample."""

    caught_by = {"batch", "batch sizes"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        y = zero_invalid(self.attend(x, None, valid), valid)
        return y + 0.01 * y.mean(0, keepdim=True) if self.lie else y


class WritesIntoItsInput(Liar):
    """Bounds its input, in place."""

    caught_by = {"inputs untouched"}
    exactly = False  # gradients suffer too

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        (x.detach() if self.lie else x.detach().clone()).clamp_(-0.5, 0.5)
        return self.attend(x, None, valid)


class BreaksUnderAutocast(Liar):
    """Adds what a matrix product returned, now in half precision, into a buffer of the input's dtype."""

    caught_by = {"autocast"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        out = self.attend(x, None, valid)
        index = torch.arange(x.shape[1])
        return torch.zeros_like(x).index_add_(1, index, out if self.lie else out.to(x.dtype))


class IgnoresValid(Liar):
    """Attends to tokens that do not exist."""

    caught_by = {"validity"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        return self.attend(x, None, None if self.lie else valid)


class ReadsContextThatIsNotThere(Liar):
    """Attends to tokens of a context that do not exist."""

    class_traits = PLAIN.but(patterns={"noncausal-cross"})
    caught_by = {"validity"}

    def mix(self, x: Tensor, context: Any = None, *, context_valid: Tensor | None = None, **_: Any) -> Tensor:
        scores = (self.q(x) @ self.k(context).transpose(1, 2)).to(stats_dtype(x.dtype))
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep = keep if self.lie or context_valid is None else keep & context_valid[:, None]
        return self.proj(self.weigh(scores, keep).to(x.dtype) @ self.v(context).to(x.dtype))


class ZeroesInsteadOfHiding(Liar):
    """Zeroes invalid tokens and then attends to the keys that the biases make of them."""

    caught_by = {"validity"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        return self.attend(zero_invalid(x, valid), None, None if self.lie else valid)


class CalibratesItself(Liar):
    """Remembers the size of the first input it ever saw, outside the state dict."""

    caught_by = {"no hidden state"}

    def __init__(self, dim: int, lie: bool = True):
        super().__init__(dim, lie)
        self.size: float | None = None

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        if self.lie and self.size is None and x.numel():
            self.size = float(x.detach().float().norm()) / x.numel() ** 0.5
        return self.attend(x, None, valid) * (self.size or 1.0)


class AnswersFromMemory(Liar):
    """Blends the last answer into the next, which disturbs whatever compares two calls."""

    caught_by = {"no hidden state"}
    exactly = False

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        y = self.attend(x, None, valid)
        if self.lie:
            last = getattr(self, "last", None)
            self.last = y.detach()
            if last is not None and last.shape == y.shape:
                y = y + 0.01 * last.to(y.dtype)
        return y


class LosesItsLoss(Liar):
    """Counts its loss once per step by skipping it when checkpointing runs the forward again."""

    class_traits = PLAIN.but(losses=("balance",))
    caught_by = {"checkpointing"}

    def mix(
        self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, returns: tuple[str, ...] = (), **_: Any
    ) -> Output:
        y = self.attend(x, None, valid)
        again = torch._C._current_graph_task_id() != -1
        if "losses" not in returns or (self.lie and again):
            return Output(y)
        return Output(y, losses={"balance": self.k(x).square().mean()})


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.9


class SurrogateCalledExact(Liar):
    """Has a backward that is not the derivative of its forward, and calls it exact."""

    caught_by = {"gradient"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        y = self.attend(x, None, valid)
        return WrongBackward.apply(y) if self.lie else y * 2


class KnowsItsPlace(Liar):
    """Claims that the order of tokens does not matter, and adds positions."""

    class_traits = PLAIN.but(permutation_equivariant=True)
    caught_by = {"permutation", "validity"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        place = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.1
        return self.attend(x + place if self.lie else x, None, valid)


class BreaksTheGraph(Liar):
    """Branches on values, so that no single graph exists, and claims to be traceable."""

    class_traits = PLAIN.but(traceable=True)
    caught_by = {"compile", "export"}

    def mix(self, x: Tensor, context: Any = None, *, valid: Tensor | None = None, **_: Any) -> Tensor:
        y = self.attend(x, None, valid)
        if self.lie and float(y.detach().sum()) > 1e6:
            y = y * 2
        return y


class SilentAboutBadInput(Liar):
    """Skips the checks at the door."""

    caught_by = {"bad arguments", "patterns", "grid ranks"}

    def _check_call(self, *args: Any) -> None:
        if not self.lie:
            super()._check_call(*args)


LIARS = Liar.__subclasses__()
