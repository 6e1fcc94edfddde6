"""Late interaction: two sets of tokens are compared token by token, each token counts its best partner.

Every item of one side meets every item of the other (a batch of images and a batch of texts), so the products of all
tokens are P x Q times as large as one pair's. They are never held together here: pairs are computed in chunks, of which
the largest product and its place stay, and the gradient goes back to those places alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_device, check_float, check_rank, check_valid
from ..types import exactly, stats_dtype
from ._dispatch import Operator, twice

#: Products that are held at a time.
CHUNK = 1 << 21
#: Products below which the specification is the faster way.
SMALL = 1 << 16


@dataclass(frozen=True)
class _Call:
    """A checked problem: ``x`` (P, N, D), ``y`` (Q, M, D) and which of their tokens exist."""

    x: Tensor
    y: Tensor
    x_valid: Tensor | None
    y_valid: Tensor | None
    reduction: str

    def inputs(self) -> list[Tensor]:
        return [self.x, self.y]

    def deciding(self) -> list[Tensor]:
        return [t for t in (self.x_valid, self.y_valid) if t is not None]

    def shares(self) -> tuple[Tensor, Tensor]:
        """(P, N) and (Q, M): what a token's largest product counts for, nothing where the token does not exist."""
        return tuple(  # type: ignore[return-value]
            _shares(t, valid, self.reduction) for t, valid in ((self.x, self.x_valid), (self.y, self.y_valid))
        )


def _shares(t: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    there = t.new_ones(t.shape[:2], dtype=stats_dtype(t.dtype)) if valid is None else valid.to(stats_dtype(t.dtype))
    return there if reduction == "sum" else there / there.sum(1, keepdim=True).clamp(min=1)


def _prepare(
    x: Tensor, y: Tensor, *, x_valid: Tensor | None = None, y_valid: Tensor | None = None, reduction: str = "mean"
) -> _Call:
    check_rank("x", x, 3, "(P, N, D)")
    check_rank("y", y, 3, "(Q, M, D)")
    check_float("x", x)
    check_float("y", y)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, y = (t.to(dtype) if t.dtype != torch.float64 else t for t in (x, y))
    if x.dtype != y.dtype:
        raise TypeError(f"x and y must share one floating dtype, got {x.dtype} and {y.dtype}")
    if x.shape[2] != y.shape[2]:
        raise ValueError(f"x has width {x.shape[2]}, y has {y.shape[2]}; they must agree")
    for name, t in (("x", x), ("y", y)):
        if not t.shape[1]:
            raise ValueError(f"{name} must have at least one token, got {tuple(t.shape)}")
    check_valid("x_valid", x_valid, x.shape[:2])
    check_valid("y_valid", y_valid, y.shape[:2])
    check_device(x=x, y=y, x_valid=x_valid, y_valid=y_valid)
    check_choice("reduction", reduction, ("mean", "sum"))
    # Whatever absent tokens hold, NaN included, reaches no product.
    x = x if x_valid is None else x.masked_fill(~x_valid.unsqueeze(-1), 0.0)
    y = y if y_valid is None else y.masked_fill(~y_valid.unsqueeze(-1), 0.0)
    return _Call(x, y, x_valid, y_valid, reduction)


def late_interaction(
    x: Tensor,
    y: Tensor,
    *,
    x_valid: Tensor | None = None,
    y_valid: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Every item of ``x`` with every item of ``y``: the mean over its tokens of the largest product with the other's.

    ``s[0, i, j] = mean_a max_b x[i, a] . y[j, b]`` and ``s[1, i, j] = mean_b max_a x[i, a] . y[j, b]``, which differ in
    general. With ``reduction="sum"``, ``s[0]`` is ColBERT's score of query ``i`` for document ``j``.

    Args:
        x: (P, N, D); tokens are usually of unit length.
        y: (Q, M, D).
        x_valid: (P, N) boolean, which tokens exist; they are neither counted nor anybody's partner otherwise.
        y_valid: (Q, M) boolean.
        reduction: ``"mean"`` over the tokens that exist, or ``"sum"``.
        backend: ``"chunked"``, which holds places of the largest products and never the products of all pairs;
            ``"eager"``, the products themselves (the specification), faster where there are few.

    Returns:
        (2, P, Q), float32 at least. An item without a token scores zero with all others. Where several partners are
        equally good, one of them gets the gradient.

    Raises:
        ValueError: shapes that do not fit.

    References: Khattab and Zaharia, 2020, arXiv 2004.12832; Yao et al., 2021, arXiv 2111.07783, section 3.1.

    >>> images, texts = torch.eye(3)[None], torch.eye(3)[None, :2]
    >>> ours, theirs = late_interaction(images, texts)
    >>> round(ours.item(), 4), theirs.item()  # one part has no word, every word has its part
    (0.6667, 1.0)
    """
    call = _prepare(x, y, x_valid=x_valid, y_valid=y_valid, reduction=reduction)
    return _OPERATOR.run(call, backend)


def _largest(products: Tensor, x_valid: Tensor | None, y_valid: Tensor | None) -> Any:
    """Largest products (p, N, q, M) over M and over N, with their places."""
    over_y = products if y_valid is None else products.masked_fill(~y_valid, float("-inf"))
    over_x = products if x_valid is None else products.masked_fill(~x_valid[:, :, None, None], float("-inf"))
    return over_y.max(3), over_x.max(1)


def _mean(best: Tensor, share: Tensor, axis: str) -> Tensor:
    high = best.to(share.dtype)
    if axis == "x":  # (p, N, q) and (p, N)
        return torch.einsum("pnq,pn->pq", high.masked_fill(high == float("-inf"), 0.0), share)
    return torch.einsum("pqm,qm->pq", high.masked_fill(high == float("-inf"), 0.0), share)


def _scores(call: _Call, x: Tensor, y: Tensor) -> Tensor:
    products = torch.einsum("pnd,qmd->pnqm", x, y)
    (over_y, _), (over_x, _) = _largest(products, call.x_valid, call.y_valid)
    ours, theirs = call.shares()
    return torch.stack([_mean(over_y, ours, "x"), _mean(over_x, theirs, "y")])


def _eager(call: _Call) -> Tensor:
    with exactly(call.x):
        return _scores(call, call.x, call.y)


class _Chunked(torch.autograd.Function):
    """The scores, and for the gradient the place of every largest product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, call: _Call) -> Tensor:
        (p, n, d), (q, m, _) = x.shape, y.shape
        ours, theirs = call.shares()
        out = x.new_empty(2, p, q, dtype=ours.dtype)
        keep = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        small = torch.int16 if max(n, m) <= torch.iinfo(torch.int16).max else torch.int32
        at_y = x.new_empty(p, n, q, dtype=small) if keep else None
        at_x = x.new_empty(p, q, m, dtype=small) if keep else None
        wide = max(1, min(q, CHUNK // (n * m)))
        high = max(1, min(p, CHUNK // (n * m * wide)))
        for j in range(0, q, wide):
            column = slice(j, min(q, j + wide))
            part, there = y[column], None if call.y_valid is None else call.y_valid[column]
            flat = part.reshape(-1, d).t()
            for i in range(0, p, high):
                row = slice(i, min(p, i + high))
                products = (x[row].reshape(-1, d) @ flat).view(-1, n, len(part), m)
                found = _largest(products, None if call.x_valid is None else call.x_valid[row], there)
                out[0, row, column] = _mean(found[0].values, ours[row], "x")
                out[1, row, column] = _mean(found[1].values, theirs[column], "y")
                if at_y is not None and at_x is not None:
                    at_y[row, :, column], at_x[row, column] = found[0].indices, found[1].indices
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, *([] if at_y is None or at_x is None else [at_y, at_x]))
        return out

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # type: ignore[override]
        if grad is None:  # the gradient goes through the specification
            return None, None, None
        x, y, at_y, at_x = ctx.saved_tensors
        call: _Call = ctx.call
        ours, theirs = (t.to(grad.dtype) for t in call.shares())
        # Of each largest product: (P, N, Q), token a of x with its partner in y; (P, Q, M), token b of y with its in x.
        of_x = torch.einsum("pq,pn->pnq", _silenced(grad[0], call.y_valid, 1), ours)
        of_y = torch.einsum("pq,qm->pqm", _silenced(grad[1], call.x_valid, 0), theirs)
        dx = dy = None
        if ctx.needs_input_grad[0]:
            dx = _collected(y, at_y, of_x, at_x, of_y)
        if ctx.needs_input_grad[1]:
            dy = _collected(
                x, at_x.permute(1, 2, 0), of_y.permute(1, 2, 0), at_y.permute(2, 0, 1), of_x.permute(2, 0, 1)
            )
        return dx, dy, None


def _silenced(grad: Tensor, valid: Tensor | None, side: int) -> Tensor:
    """No gradient where an item has no token at all: its scores are zero, whatever the other holds."""
    if valid is None:
        return grad
    return grad * valid.any(1).to(grad.dtype).unsqueeze(1 - side)


def _collected(other: Tensor, place: Tensor, weight: Tensor, back: Tensor, back_weight: Tensor) -> Tensor:
    """The gradient of one side, (P, N, D), from the tokens of the other that it was multiplied with.

    Args:
        other: (Q, M, D).
        place: (P, N, Q) which token of the other was the best partner of one's own, ``weight``: its gradient.
        back: (P, Q, M) which of one's own was the best partner of the other's token, ``back_weight``: its gradient.
    """
    (p, n, q), m = place.shape, other.shape[1]
    flat = other.reshape(q * m, -1).to(weight.dtype)
    start = torch.arange(q, device=other.device) * m
    out = flat.new_empty(p, n, flat.shape[1])
    for i in range(p):
        rows = (place[i].long() + start).view(n, q)
        # Sorted by whom they belong to, the rows of the other direction are bags, too.
        owner, order = back[i].reshape(-1).long().sort()
        index = torch.cat([rows.reshape(-1), order])
        each = torch.cat([weight[i].reshape(-1), back_weight[i].reshape(-1)[order]])
        ends = torch.cat([
            torch.arange(0, n * q, q, device=other.device),
            n * q + torch.searchsorted(owner, torch.arange(n, device=other.device)),
        ])  # fmt: skip
        bags = F.embedding_bag(index, flat, ends, mode="sum", per_sample_weights=each)
        out[i] = bags[:n] + bags[n:]
    return out.to(other.dtype)


def _chunked(call: _Call) -> Tensor:
    with exactly(call.x):
        out = _Chunked.apply(call.x, call.y, call)
    return twice((out,), call.inputs(), lambda x, y: (_scores(call, x, y),))[0]


def _few(call: _Call) -> str | None:
    count = call.x.shape[0] * call.x.shape[1] * call.y.shape[0] * call.y.shape[1]
    if torch.compiler.is_compiling():
        return "compiled code fuses the products itself"
    return f"{count} products are fewer than {SMALL}" if count < SMALL else None


def _why_not(call: _Call) -> str | None:
    if not call.x.shape[0] or not call.y.shape[0]:
        return "there is nothing to cut"
    return "tensors on meta hold no numbers to look for the largest in" if call.x.is_meta else None


_OPERATOR = Operator("late_interaction", _prepare)
_OPERATOR.register(
    "chunked", _chunked, supports=_why_not, prefers=_few, second="the specification",
    transforms="its backward is written by hand",
)  # fmt: skip
_OPERATOR.register("eager", _eager)
