"""What fine-tuning changed, thinned out: DARE, and DAREx's ways beyond it (Deng et al., 2024, arXiv 2410.09344).

``delta = W_fine - W_pre``; a share ``p`` of it is dropped at random and the rest divided by ``q``:
``W' = W_pre + (M * delta) / q`` with ``M ~ Bernoulli(1 - p)``. DARE's ``q = 1 - p`` leaves the mean where it was, a
larger ``q`` has a smaller variance. Of a row with ``c_j = delta_j x_j`` the output's expected squared error is

    (1 - (1 - p) / q)^2 S1 + p (1 - p) / q^2 S2,    S1 = (sum_j c_j)^2,  S2 = sum_j c_j^2

least at ``q = (1 - p) + p S2 / S1`` (ours, from the two moments; :func:`best_q`). The paper has four ways to ``q``: a
search for one number with labels or without (:func:`search_q` over any loss, of outputs by :func:`output_gap`), per
layer by a bound (:func:`analytical_q`), per layer learned (:func:`learned_q`). ``p`` is always the share dropped.

>>> pre, fine = {"w": torch.zeros(4, 4)}, {"w": torch.ones(4, 4)}
>>> thin = prune(deltas(pre, fine), p=0.5, seed=0)
>>> sorted(set(added(pre, thin)["w"].flatten().tolist()))
[0.0, 2.0]
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_int, check_real
from ..types import check_choice

Weights = Mapping[str, Tensor]


def _rate(p: float) -> float:
    return check_real("p", p, least=0, below=1)


def _alike(what: str, a: Weights, b: Weights) -> None:
    if a.keys() != b.keys():
        raise ValueError(f"{what} must have the same parameter names; only in one: {sorted(a.keys() ^ b.keys())[:5]}")


def deltas(pre: Weights, fine: Weights, names: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """``fine - pre`` of state dicts; of a table that has grown, the rows that both have.

    Args:
        pre, fine: of the same names.
        names: which parameters have one; all of floating point by default. Leave out heads and embeddings here.
    """
    _alike("pre and fine", pre, fine)
    found = {}
    for name, old in pre.items():
        if not old.is_floating_point() or (names is not None and not names(name)):
            continue
        new = fine[name]
        if old.shape[1:] != new.shape[1:] or old.dim() != new.dim():
            raise ValueError(f"fine[{name!r}] must be {tuple(old.shape)} but for its rows, got {tuple(new.shape)}")
        rows = min(len(old), len(new)) if old.dim() else None
        found[name] = new[:rows] - old[:rows] if rows is not None else new - old
    return found


def added(base: Weights, *changes: Weights, weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """A state dict with one or several deltas added: merged models.

    Args:
        base: what they are added to; what none of them names is kept.
        changes: of :func:`deltas` or :func:`prune`.
        weights: a factor for each; 1 by default.
    """
    factors = [1.0] * len(changes) if weights is None else list(weights)
    if len(factors) != len(changes):
        raise ValueError(f"weights must hold a factor for each of {len(changes)} deltas, got {len(factors)}")
    found = {name: value.clone() for name, value in base.items()}
    for change, factor in zip(changes, factors, strict=True):
        if unknown := sorted(change.keys() - base.keys()):
            raise ValueError(f"changes name parameters that base has not: {unknown[:5]}")
        for name, value in change.items():
            if value.dim():
                found[name][: len(value)] += factor * value
            else:
                found[name] += factor * value
    return found


def prune(
    change: Weights, p: float, how: str = "random", q: float | Mapping[str, float] | None = None, seed: int = 0,
    norms: Weights | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Deltas of which a share ``p`` is zero.

    Args:
        change: of :func:`deltas`.
        p: share that is dropped, at least 0 and below 1.
        how: ``"random"`` (DARE; a mask per parameter, from its name and ``seed``), ``"magnitude"`` keeps the largest,
            ``"wanda"`` the largest per row after each column is multiplied by the norm of its input.
        q: what is kept is divided by it, one number or one by name; by default ``1 - p`` for ``"random"``, else 1.
        seed: of the masks.
        norms: by name, (d_in,) norms of the inputs, for ``"wanda"``.
    """
    _rate(p)
    check_choice("how", how, ("random", "magnitude", "wanda"))
    found = {}
    for name, delta in change.items():
        factor = q[name] if isinstance(q, Mapping) else q if q is not None else (1 - p if how == "random" else 1.0)
        check_real(f"q of {name!r}", factor, above=0)
        if how == "random":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            keep = torch.rand(delta.shape, generator=generator).to(delta.device) >= p
        else:
            score = delta.abs().float()
            if how == "wanda":
                if norms is None or name not in norms or norms[name].shape != delta.shape[-1:]:
                    raise ValueError(f"norms must hold ({delta.shape[-1] if delta.dim() else 1},) for {name!r}")
                score = score * norms[name]
            rows = score.reshape(-1, score.shape[-1]) if how == "wanda" else score.reshape(1, -1)
            count = rows.shape[1] - math.floor(p * rows.shape[1])
            mask = torch.zeros_like(rows, dtype=torch.bool)
            keep = mask.scatter_(1, rows.topk(count, 1).indices, True).reshape(delta.shape)
        found[name] = torch.where(keep, delta / factor, 0)
    return found


def prune_lora(a: Tensor, b: Tensor, p: float, q: float | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """LoRA's ``B A`` with a share ``p`` of its ranks dropped whole, the others divided by ``q``, ``1 - p`` by default.

    Args:
        a: (r, d_in).
        b: (d_out, r).
    """
    _rate(p)
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
        raise ValueError(f"a and b must be (r, d_in) and (d_out, r), got {tuple(a.shape)} and {tuple(b.shape)}")
    keep = torch.rand(len(a), generator=torch.Generator().manual_seed(seed)).to(a.device) >= p
    return torch.where(keep[:, None], a / check_real("q", 1 - p if q is None else q, above=0), 0), torch.where(
        keep, b, 0
    )


# --------------------------------------------------------------------------------------------------------------------
# Ways to q


def expected_error(c: Tensor, p: float, q: float) -> Tensor:
    """Mean over masks of the squared error of each row, (d_out,), from ``c = delta * x`` (d_out, d_in)."""
    _rate(p)
    check_real("q", q, above=0)
    bias, noise = c.sum(-1) ** 2, (c**2).sum(-1)
    return (1 - (1 - p) / q) ** 2 * bias + p * (1 - p) / q**2 * noise


def best_q(c: Tensor, p: float) -> Tensor:
    """Where :func:`expected_error` is least within ``1 - p .. 1``, per row: ``(1 - p) + p S2 / S1``. Ours."""
    _rate(p)
    bias, noise = c.sum(-1) ** 2, (c**2).sum(-1)
    at = (1 - p) + p * noise / torch.where(bias == 0, 1, bias)
    return torch.where(bias == 0, 1.0, at).clamp(1 - p, 1.0)


def search_q(loss: Callable[[float], float], p: float, step: float | None = None, patience: int = 4) -> float:
    """One ``q`` between ``1 - p`` and 1: coarse steps upwards, then steps a tenth as long around the best.

    Args:
        loss: of a ``q``: on labelled data, or :func:`output_gap` on data without labels, averaged over masks.
        p: share that is dropped.
        step: coarse step; a hundredth of the range by default.
        patience: stop after so many that are no better than the best.
    """
    _rate(p)
    check_int("patience", patience, least=1)
    stride = p / 100 if step is None else check_real("step", step, above=0)
    if p == 0:
        return 1.0

    def walk(low: float, high: float, stride: float) -> float:
        best, least, worse = low, math.inf, 0
        for i in range(math.floor((high - low) / stride + 1e-6) + 1):
            value = loss(q := min(low + i * stride, 1.0))
            best, least, worse = (q, value, 0) if value < least else (best, least, worse + 1)
            if worse >= patience:
                break
        return best

    coarse = walk(1 - p, 1.0, stride)
    return walk(max(1 - p, coarse - stride), min(1.0, coarse + stride), stride / 10)


def output_gap(fine: Tensor, pruned: Tensor, top: int | None = None) -> Tensor:
    """Mean distance of last hidden states, or the mean square of that of the fine model's ``top`` logits (5)."""
    if fine.shape != pruned.shape:
        raise ValueError(f"fine and pruned must have one shape, got {tuple(fine.shape)} and {tuple(pruned.shape)}")
    if top is None:
        return (fine - pruned).abs().mean()
    values, at = fine.topk(check_int("top", top, least=1, most=fine.shape[-1]), -1)
    return F.mse_loss(pruned.gather(-1, at), values)


def analytical_q(c: Tensor, p: float, eta: float, prob: float = 0.95, step: float = 1e-3) -> Tensor:
    """Per row the ``q`` in ``1 - p, ..., .998`` at which the bound is nearest to zero; a layer takes the mean of them.

    ``| eta (1 - (1 - p) / q) sum c + eta^2 Phi(p) sum c^2 / (4 q^2) + ln(2 / (1 - prob)) |``,
    ``Phi(p) = (1 - 2 p) / ln((1 - p) / p)``, 1/2 at ``p = 1/2``. Where the release keeps values in float16 and stops
    when most rows have passed theirs, this looks at all; of equal values the smallest ``q`` counts.

    Args:
        c: (d_out, d_in), delta times the mean activation of each input; a column more for a bias.
        eta: between the terms, found by an outer search.
    """
    _rate(p)
    check_real("eta", eta, above=0)
    check_real("prob", prob, above=0, below=1)
    if p == 0:
        return torch.ones(len(c), dtype=torch.float64)
    phi = 0.5 if abs(p - 0.5) < 1e-9 else (1 - 2 * p) / math.log((1 - p) / p)
    grid = torch.arange(int((1 - p) / step + 1e-9), int(0.999 / step + 1e-9), dtype=torch.float64) * step
    grid = grid[grid > 0]
    if not len(grid):
        return torch.full((len(c),), 1 - p, dtype=torch.float64)
    x = c.double()[:, :, None]
    value = eta * (1 - (1 - p) / grid) * x.sum(1) + eta**2 * phi * (x**2).sum(1) / (4 * grid**2)
    return grid[(value + math.log(2 / (1 - prob))).abs().argmin(1)]


def learned_q(
    weight: Tensor, sparse: Tensor, x: Tensor, target: Tensor, p: float, steps: int = 200, lr: float = 1e-2
) -> float:
    """The ``q = |a| + (1 - p)`` whose output is nearest to the fine-tuned layer's; ``a`` starts at 1e-4, by Adam.

    Args:
        weight: (d_out, d_in), pre-trained.
        sparse: its delta after :func:`prune` with ``q=1``.
        x, target: inputs and outputs of the fine-tuned layer, without bias.
    """
    _rate(p)
    check_int("steps", steps, least=1)
    base, change = F.linear(x, weight).detach(), F.linear(x, sparse).detach()
    a = torch.full((), 1e-4, requires_grad=True, device=x.device)
    optimizer = torch.optim.Adam([a], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(base + change / (a.abs() + (1 - p)), target.detach()).backward()
            optimizer.step()
    return float(a.detach().abs()) + 1 - p


class SparseDelta(nn.Module):
    """A frozen linear layer served with a sparse delta: ``x W^T + x (sparse)^T / q + b``.

    Several fine-tuned models then share one dense weight.
    """

    def __init__(self, layer: nn.Linear, sparse: Tensor, q: float = 1.0):
        super().__init__()
        if sparse.shape != layer.weight.shape:
            raise ValueError(f"sparse must be {tuple(layer.weight.shape)} as the layer, got {tuple(sparse.shape)}")
        self.layer, self.q = layer, check_real("q", q, above=0)
        self.shape = sparse.shape
        held = sparse.to_sparse_coo().coalesce()
        self.register_buffer("at", held.indices())
        self.register_buffer("values", held.values())

    at: Tensor
    values: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        held = torch.sparse_coo_tensor(self.at, self.values, self.shape, check_invariants=False)
        change = torch.sparse.mm(held, x.reshape(-1, x.shape[-1]).t()).t()
        out: Tensor = self.layer(x)
        return out + (change / self.q).reshape(out.shape)
