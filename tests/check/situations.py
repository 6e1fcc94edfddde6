"""Liars that are honest in one situation and lie in another: beyond 64 tokens, in training, on images, when frozen.

Each names the claim that must be refuted; with ``lie=False`` the same class is honest everywhere.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnlib import Output, State
from attnlib.masks import Mask
from attnlib.nn.layers import zero_invalid
from attnlib.types import stats_dtype

from .liars import CAUSAL, PLAIN, Liar, tril

RANKS = PLAIN.but(grid_ranks={1, 2})


def flat(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x.flatten(1, -2), None if valid is None else valid.flatten(1)


class Sometimes(Liar):
    """Base: ``wrong(x, valid)`` says whether this call lies."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return False

    def lies(self, x: Tensor, valid: Tensor | None = None) -> bool:
        return self.lie and self.wrong(x, valid)


# ---- causality


class CausalLiar(Sometimes):
    """Reads the future when it lies."""

    class_traits = CAUSAL
    caught_by = {"causality"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        flat_x, exists = flat(x, valid)
        n = flat_x.shape[1]
        step = torch.arange(n) // max(1, n // max(1, x.shape[1]))
        allowed = (step[:, None] >= step)[None]
        allowed = torch.ones_like(allowed) if self.lies(x, valid) else allowed
        return self.attend(flat_x, allowed, exists).view_as(x)


class PeeksBeyond64(CausalLiar):
    """Forgets the mask on sequences longer than 64."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return x.shape[1] > 64


class PeeksFarAhead(Liar):
    """Reads tokens that lie more than 64 steps ahead."""

    class_traits = CAUSAL
    caught_by = {"causality"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        n = x.shape[1]
        far = torch.arange(n) > torch.arange(n)[:, None] + 64
        return self.attend(x, tril(n) | far if self.lie else tril(n), valid)


class PeeksLate(Liar):
    """Reads one step ahead from position 100 on."""

    class_traits = CAUSAL
    caught_by = {"causality"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        n = x.shape[1]
        late = tril(n, 1) & (torch.arange(n) >= 100)[:, None]
        return self.attend(x, tril(n) | late if self.lie else tril(n), valid)


class PeeksInTraining(CausalLiar):
    """Is causal in eval only."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return self.training


class PeeksInLongTraining(CausalLiar):
    """Is causal in eval, and in training up to 100 tokens."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return self.training and x.shape[1] > 100


class CausalInOneDimension(CausalLiar):
    """Is causal on sequences only, though it claims images."""

    class_traits = RANKS.but(patterns={"causal-self"})

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return x.dim() > 3


class CausalByDetaching(Liar):
    """Averages the future into a scale without gradient, in training."""

    class_traits = CAUSAL
    caught_by = {"causality"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        y = self.attend(x, tril(x.shape[1]), valid)
        loud = zero_invalid(x.detach(), valid).double().square().mean((1, 2), keepdim=True).sqrt()
        return y * (1 + 0.1 * loud.tanh()).to(y.dtype) if self.lie and self.training else y


# ---- validity


class ValidLiar(Sometimes):
    """Reads tokens that do not exist when it lies."""

    caught_by = {"validity"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        flat_x, exists = flat(x, valid)
        exists = None if exists is None or self.lies(x, valid) else exists
        return self.attend(flat_x, None, exists).view_as(x)


class ReadsPaddingOnTheLeft(ValidLiar):
    """Takes a mask that starts with a gap and has no other for something else."""

    exactly = False

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        assert valid is not None
        v = valid.flatten(1)
        return bool(v.numel() and not v[:, 0].any() and (v[:, 1:] >= v[:, :-1]).all())


class ReadsPaddingOnTheRight(ValidLiar):
    """Obeys gaps that are not at the end."""

    exactly = False

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        assert valid is not None
        v = valid.flatten(1)
        return bool(v.numel() and v[:, 0].all() and not v.all() and (v[:, 1:] <= v[:, :-1]).all())


class ReadsAHoleInTheMiddle(ValidLiar):
    """Obeys padding at the ends, not a gap between."""

    exactly = False

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        assert valid is not None
        v = valid.flatten(1)
        return bool(v.numel() and v[:, 0].all() and v[:, -1].all())


class ValidInOneDimension(ValidLiar):
    """Obeys ``valid`` on sequences only."""

    class_traits = RANKS

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return x.dim() > 3


class ValidInEvalOnly(ValidLiar):
    """Ignores ``valid`` in training."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return self.training


class ValidUpTo64(ValidLiar):
    """Ignores ``valid`` beyond 64 tokens."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return x.shape[1] > 64


class RemembersTheFirstValid(Liar):
    """Keeps the first ``valid`` of every size for good, outside the module."""

    caught_by = {"validity"}
    exactly = False
    seen: ClassVar[dict[Any, Tensor]] = {}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if self.lie and valid is not None:
            valid = self.seen.setdefault(tuple(valid.shape), valid.clone())
        return self.attend(x, None, valid)


# ---- batch


class MixesLargeBatches(Liar):
    """Adds the batch's mean once there are more than eight samples."""

    caught_by = {"batch sizes"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        y = zero_invalid(self.attend(x, None, valid), valid)
        return y + 0.01 * y.mean(0, keepdim=True) if self.lie and len(x) > 8 else y


class ScalesByTheLongestRow(Liar):
    """Divides by the number of tokens of the longest sample."""

    caught_by = {"batch"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        y = self.attend(x, None, valid)
        if valid is None:
            return y / x.shape[1]
        count = valid.sum(1)
        count = count.amax().expand_as(count) if self.lie and len(x) else count
        return y / count.clamp(min=1)[:, None, None].to(y.dtype)


class TreatsTheLastSampleDifferently(Liar):
    """Scales the last sample of a batch."""

    caught_by = {"batch sizes"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        y = self.attend(x, None, valid)
        if not self.lie or len(x) < 2:
            return y
        return torch.cat([y[:-1], 1.01 * y[-1:]])


# ---- gradients and modes


class DetachesInTraining(Liar):
    """Cuts the gradient to its values in training."""

    caught_by = {"gradient"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        y = self.attend(x, None, valid)
        return y / 2 + y.detach() / 2 if self.lie and self.training else y


class DetachesBeyond64(Liar):
    """Cuts the gradient of long sequences."""

    caught_by = {"gradient"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        y = self.attend(x, None, valid)
        return y / 2 + y.detach() / 2 if self.lie and x.shape[1] > 64 else y


class ModeLiar(Sometimes):
    """Answers a little differently when it lies."""

    caught_by = {"modes"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        y = self.attend(x, None, valid)
        return 1.001 * y if self.lies(x, valid) else y


class OtherwiseWithoutGradient(ModeLiar):
    """Takes another path under no_grad."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return not torch.is_grad_enabled()


class OtherwiseInInferenceMode(ModeLiar):
    """Takes another path in inference mode."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return torch.is_inference_mode_enabled()


class OtherwiseWhenFrozen(ModeLiar):
    """Takes another path when its weights are frozen."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return not self.q.weight.requires_grad


class OtherwiseWhenTheInputIsConstant(ModeLiar):
    """Takes another path when x needs no gradient, long sequences only."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return not x.requires_grad and x.shape[1] > 64


class LosesGradientsOfFrozenWeights(Liar):
    """Detaches the input of a frozen projection, so that x learns nothing through it."""

    caught_by = {"modes"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        frozen = not self.v.weight.requires_grad
        return self.attend(x, None, valid) + 0.1 * self.v(x.detach() if self.lie and frozen else x)


# ---- growth


class GrowthLiar(Sometimes):
    """Linear attention that multiplies queries by keys when it lies."""

    class_traits = PLAIN.but(work={"N": 1}, memory={"N": 1})
    caught_by = {"work", "memory"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        q, k, v = self.q(x).sigmoid(), zero_invalid(self.k(x).sigmoid(), valid), self.v(x)
        out = (q @ k.transpose(1, 2)) @ v if self.lies(x, valid) else q @ (k.transpose(1, 2) @ v)
        return self.proj(out / (q @ k.sum(1)[..., None]).clamp(min=1e-6))


class LinearAtPowersOfTwo(GrowthLiar):
    """Is quadratic unless the length is five times a power of two."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return x.shape[1] % 32 != 0


class LinearWithoutGradients(GrowthLiar):
    """Is quadratic as soon as gradients are wanted."""

    def wrong(self, x: Tensor, valid: Tensor | None) -> bool:
        return x.requires_grad


class QuadraticBackward(Liar):
    """Is linear forward, and keeps a whole map for its backward pass."""

    class_traits = PLAIN.but(work={"N": 1}, memory={"N": 1})
    caught_by = {"work", "memory"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        q, k, v = self.q(x).sigmoid(), zero_invalid(self.k(x).sigmoid(), valid), self.v(x)
        read = Squares.apply(q, k, v) if self.lie else q @ (k.transpose(1, 2) @ v)
        return self.proj(read / (q @ k.sum(1)[..., None]).clamp(min=1e-6))


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q @ (k.transpose(1, 2) @ v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        return (grad @ v.transpose(1, 2)) @ k, (v @ grad.transpose(1, 2)) @ q, (k @ q.transpose(1, 2)) @ grad


# ---- masks


class MaskLiar(Liar):
    """Attends by a mask that may be another than it was given."""

    class_traits = PLAIN.but(mask=True)
    caught_by = {"mask"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        if mask is None:
            return self.attend(x, None, valid)
        allowed = self.kept(mask, x.shape[1]) if self.lie else mask.dense(x.shape[1])
        return self.attend(x, allowed[:, 0] if allowed.dim() == 4 else allowed, valid)

    def kept(self, mask: Mask, n: int) -> Tensor:
        return mask.dense(n)


class CachesMasksBySize(MaskLiar):
    """Lowers the first mask of every size, and no other."""

    seen: ClassVar[dict[int, Tensor]] = {}

    def kept(self, mask: Mask, n: int) -> Tensor:
        return self.seen.setdefault(n, mask.dense(n))


class CachesMasksByIdentity(MaskLiar):
    """Lowers a mask once for every address it has seen one at."""

    seen: ClassVar[dict[Any, Tensor]] = {}

    def kept(self, mask: Mask, n: int) -> Tensor:
        return self.seen.setdefault((id(mask), n), mask.dense(n))


# ---- memory formats


class ReadsMemoryAsItLies(Liar):
    """Takes strided tokens for contiguous ones."""

    caught_by = {"strides"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if self.lie and not x.is_contiguous() and x.numel():
            x = torch.as_strided(x, x.shape, torch.empty(x.shape).stride())
        return self.attend(x, None, valid)


class ReadsContextAsItLies(Liar):
    """Takes a strided context for a contiguous one."""

    class_traits = PLAIN.but(patterns={"noncausal-cross"})
    caught_by = {"strides"}
    exactly = False

    def mix(self, x: Tensor, context: Tensor, *, context_valid: Tensor | None = None) -> Tensor:
        if self.lie and not context.is_contiguous() and context.numel():
            context = torch.as_strided(context, context.shape, torch.empty(context.shape).stride())
        scores = (self.q(x) @ self.k(context).transpose(1, 2)).to(stats_dtype(x.dtype))
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep = keep if context_valid is None else keep & context_valid[:, None]
        return self.proj(self.weigh(scores, keep).to(x.dtype) @ self.v(context).to(x.dtype))


# ---- weights


class WeightLiar(Liar):
    """Returns attention weights, invented ones when it lies."""

    class_traits = PLAIN.but(weights=True, mask=True)
    caught_by = {"extras"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None, mask: Mask | None = None) -> Output:
        allowed = None if mask is None else mask.dense(x.shape[1])
        allowed = allowed[:, 0] if allowed is not None and allowed.dim() == 4 else allowed
        scores = self.q(x) @ self.k(x).transpose(1, 2) * self.dim**-0.5
        keep = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
        keep = keep if valid is None else keep & valid[:, None]
        weights = self.weigh(scores.double(), keep).to(x.dtype)
        weights = self.invent(scores, keep) if self.lie else weights
        return Output(self.attend(x, allowed, valid), weights=weights[:, None])

    def invent(self, scores: Tensor, keep: Tensor) -> Tensor:
        raise NotImplementedError


class UniformWeights(WeightLiar):
    """Says that all keys count alike."""

    def invent(self, scores: Tensor, keep: Tensor) -> Tensor:
        return self.weigh(torch.zeros_like(scores), keep)


class WeightsOfSomethingElse(WeightLiar):
    """Returns the map of keys to queries."""

    def invent(self, scores: Tensor, keep: Tensor) -> Tensor:
        return self.weigh(torch.sin(40 * scores), keep)


class WeightsBeforeTheMask(WeightLiar):
    """Returns weights as they were before anything was hidden."""

    def invent(self, scores: Tensor, keep: Tensor) -> Tensor:
        return scores.softmax(-1)


# ---- memory and state of the world


class ReturnsItsInput(Liar):
    """Hands x back."""

    class_traits = CAUSAL
    caught_by = {"inputs untouched"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        return x if self.lie else x.clone()


class ReturnsItsInputWhenAlone(Liar):
    """Hands x back when there is one sample."""

    class_traits = CAUSAL
    caught_by = {"inputs untouched"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        return x if self.lie and len(x) == 1 else x + 0


class WritesIntoAPool(Liar):
    """Answers in memory that the next call of that size overwrites."""

    caught_by = {"inputs untouched"}
    exactly = False
    pool: ClassVar[dict[Any, Tensor]] = {}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        y = self.attend(x, None, valid)
        if not self.lie or y.requires_grad or torch.is_inference_mode_enabled():
            return y
        return self.pool.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)


class AdvancesTheGenerator(Liar):
    """Draws a random number that it does not use."""

    caught_by = {"no hidden state"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if self.lie:
            torch.rand(1)
        return self.attend(x, None, valid)


class CountsItsCalls(Liar):
    """Changes its mind at the eighth call, counted outside the module."""

    caught_by = {"no hidden state"}
    exactly = False
    calls: ClassVar[dict[int, int]] = {}

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        count = self.calls[id(self)] = self.calls.get(id(self), 0) + 1
        y = self.attend(x, None, valid)
        return 1.01 * y if self.lie and count > 8 else y


# ---- precision


class SumsInHalf(Liar):
    """Adds tokens up one by one in the type of its input."""

    class_traits = CAUSAL.but(streaming=True, work={}, memory={})
    caught_by = {"bfloat16"}
    exactly = False
    halves = (True, True)  # of what is summed within a call, of what is kept between calls

    def mix(self, x: Tensor, *, valid: Tensor | None = None, state: State | None = None) -> Output:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        inner, kept = (x.dtype if self.lie and half else wide for half in self.halves)
        k, v = zero_invalid(self.k(x).sigmoid(), valid), self.v(x)
        s = x.new_zeros(x.shape[0], self.dim, self.dim, dtype=inner) if state is None else state["S"].to(inner)
        z = x.new_zeros(x.shape[0], self.dim, dtype=inner) if state is None else state["z"].to(inner)
        out = []
        for t in range(x.shape[1]):
            s = s + (k[:, t, :, None] * v[:, t, None, :]).to(inner)
            z = z + k[:, t].to(inner)
            q = self.q(x[:, t]).sigmoid().to(inner)
            out.append((q[:, None] @ s)[:, 0] / (q * z).sum(-1, keepdim=True).clamp(min=1e-6))
        y = torch.stack(out, 1) if out else x.new_zeros(x.shape)
        return Output(self.proj(y.to(x.dtype)), state=State({"S": s.to(kept), "z": z.to(kept)}))


class StateInHalf(SumsInHalf):
    """Keeps its state in the type of its input."""

    caught_by = {"streaming"}
    halves = (False, True)


class StateOfTheInput(Liar):
    """Keeps the last token as it was given, not a copy."""

    class_traits = CAUSAL.but(valid=False, streaming=True, work={"N": 1}, memory={"N": 1})
    caught_by = {"streaming"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None, state: State | None = None) -> Output:
        last = x.new_zeros(x.shape[0], 1, self.dim) if state is None else state["last"]
        y = self.proj(self.q(x) * self.k(torch.cat([last, x[:, :-1]], 1)).sigmoid())
        kept = x[:, -1:] if x.shape[1] else last
        return Output(y, state=State({"last": kept if self.lie else kept.clone()}))


class WritesIntoItsState(Liar):
    """Adds to the state it was given, in place, from the 64th token on."""

    class_traits = CAUSAL.but(streaming=True, work={"N": 1}, memory={"N": 1})
    caught_by = {"streaming"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None, state: State | None = None) -> Output:
        v = zero_invalid(self.v(x), valid).double()
        past = v.new_zeros(x.shape[0], 1, self.dim) if state is None else state["S"]
        sums = past + v.cumsum(1)
        count = 0 if state is None else int(state["n"][0])
        if self.lie and state is not None and count > 64:
            with torch.no_grad():
                past.add_(v.sum(1, keepdim=True).detach())
        n = torch.full((x.shape[0],), count + x.shape[1])
        last = sums[:, -1:] if x.shape[1] else past
        return Output(self.proj(self.q(x) * sums.tanh().to(x.dtype)), state=State({"S": last.clone(), "n": n}))


class ForgetsAfter64(Liar):
    """Keeps a cache of 64 tokens while it decodes."""

    class_traits = CAUSAL.but(streaming=True)
    caught_by = {"streaming"}

    def mix(self, x: Tensor, *, valid: Tensor | None = None, state: State | None = None) -> Output:
        exists = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
        if state is not None:
            old, seen = state["x"], state["valid"]
            if self.lie:
                old, seen = old[:, -64:], seen[:, -64:]
            whole, seen = torch.cat([old, x], 1), torch.cat([seen, exists], 1)
        else:
            whole, seen = x.clone(), exists
        y = self.attend(whole, tril(whole.shape[1]), seen)[:, whole.shape[1] - x.shape[1] :]
        return Output(y, state=State({"x": whole, "valid": seen}))


# ---- cross-attention and size


class WrongAtOddSizes(Liar):
    """Drops the last token of an odd number, beyond a hundred."""

    caught_by = {"validity"}
    exactly = False

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if self.lie and x.shape[1] > 100 and x.shape[1] % 2 and valid is not None:
            valid = None
        return self.attend(x, None, valid)


SITUATIONS = [
    PeeksBeyond64, PeeksFarAhead, PeeksLate, PeeksInTraining, PeeksInLongTraining, CausalInOneDimension,
    CausalByDetaching, ReadsPaddingOnTheLeft, ReadsPaddingOnTheRight, ReadsAHoleInTheMiddle, ValidInOneDimension,
    ValidInEvalOnly, ValidUpTo64, RemembersTheFirstValid, MixesLargeBatches, ScalesByTheLongestRow,
    TreatsTheLastSampleDifferently, DetachesInTraining, DetachesBeyond64, OtherwiseWithoutGradient,
    OtherwiseInInferenceMode, OtherwiseWhenFrozen, OtherwiseWhenTheInputIsConstant, LosesGradientsOfFrozenWeights,
    LinearAtPowersOfTwo, LinearWithoutGradients, QuadraticBackward, CachesMasksBySize, CachesMasksByIdentity,
    ReadsMemoryAsItLies, ReadsContextAsItLies, UniformWeights, WeightsOfSomethingElse, WeightsBeforeTheMask,
    ReturnsItsInput, ReturnsItsInputWhenAlone, WritesIntoAPool, AdvancesTheGenerator, CountsItsCalls, SumsInHalf,
    StateInHalf, StateOfTheInput, WritesIntoItsState, ForgetsAfter64, WrongAtOddSizes,
]  # fmt: skip
