"""Attention, state spaces and gated recurrences as one linear system whose matrices depend on the token.

``h_i = L_i h_{i-1} + B_i u_i``,  ``y_i = C_i h_i + D u_i``,  ``h_{-1} = 0``,  with ``L_i`` diagonal, ``S`` numbers of
state for each of ``D`` channels. Written out, ``y = Phi u`` with ``Phi_ij = C_i (L_i ... L_{j+1}) B_j`` below the
diagonal: one engine turns any of them into the other, and converters say what each model's matrices are.

* linear attention: ``B_j = k_j``, ``C_i = q_i``; the denominator ``eta`` divides ``C_i``, or enters as
  ``L_i = eta_{i-1} / eta_i`` and ``B_i = k_i / eta_i``;
* normalised attention: ``eta`` is a free function of a token instead of a sum (which side it divides is unsure: an
  option);
* S6: ``L_i = exp(delta_i A)``, ``B_i = delta_i b_i``, ``C_i = c_i``;
* qLSTM: gates of the input; with S6's gate ``L = exp(-softplus(x)) = sigmoid(-x)`` and ``B = softplus(x)``.

Softmax attention is linear attention on infinitely many Taylor features; :func:`taylor_features` cuts them off.
Indices of state are ordered state-major: number ``s`` of channel ``c`` is row ``s D + c`` of :meth:`matrices`.

Our reading: the repository that the paper names is not public.

Reference: Sieber et al., 2024, arXiv 2405.15731.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_axes, check_choice, check_int, check_real, check_tensor, checked
from ..masks import causal
from ..ops import attention, selective_scan
from .experiment import Claim, Experiment


@dataclass(frozen=True)
class LinearSystem:
    """A diagonal linear time-varying system over N tokens.

    Args:
        log_decay: (N, S, D) logarithms of ``L``; finite. Axes of size 1 are shared.
        enters: (N, S, D) ``B``, by state and channel.
        reads: (N, S, D) ``C``.
        skip: (D,) of ``D``, or ``None``.

    >>> one = torch.ones(4, 1, 1)
    >>> LinearSystem(0 * one, one, one).recurrent(torch.ones(4, 1)).flatten()
    tensor([1., 2., 3., 4.])
    """

    log_decay: Tensor
    enters: Tensor
    reads: Tensor
    skip: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("log_decay", "enters", "reads"):
            check_axes(name, getattr(self, name), N=None, S=None, D=None)
        try:
            torch.broadcast_shapes(self.log_decay.shape, self.enters.shape, self.reads.shape)
        except RuntimeError:
            shapes = [tuple(getattr(self, n).shape) for n in ("log_decay", "enters", "reads")]
            raise ValueError(
                f"log_decay, enters and reads must agree in N, S, D or have 1 there, got {shapes}"
            ) from None
        if not torch.isfinite(self.log_decay).all():
            raise ValueError("log_decay must be finite: a decay of zero or below has no logarithm")

    def _whole(self, channels: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = torch.broadcast_shapes(self.log_decay.shape, self.enters.shape, self.reads.shape, (1, 1, channels))
        return self.log_decay.expand(shape), self.enters.expand(shape), self.reads.expand(shape)

    def recurrent(self, u: Tensor) -> Tensor:
        """``u`` (N, D) to ``y`` (N, D), token after token."""
        log_decay, enters, reads = self._whole(self._channels(u))
        state, out = torch.zeros_like(enters[0]), []
        for i in range(len(u)):
            state = log_decay[i].exp() * state + enters[i] * u[i]
            out.append((reads[i] * state).sum(0))
        y = torch.stack(out) if out else torch.zeros_like(u)
        return y if self.skip is None else y + self.skip * u

    def phi(self, channels: int) -> Tensor:
        """(D, N, N) the matrix of every channel; decays are sums of logarithms, so that products do not underflow."""
        check_int("channels", channels, least=1)
        log_decay, enters, reads = self._whole(channels)
        total = log_decay.cumsum(0)
        n = len(total)
        below = torch.ones(n, n, dtype=torch.bool, device=total.device).tril()[:, :, None, None]
        gaps = torch.where(below, total[:, None] - total[None], -math.inf)
        phi = (reads[:, None] * gaps.exp() * enters[None]).sum(2).permute(2, 0, 1)
        if self.skip is not None:
            phi = phi + torch.diag_embed(self.skip.expand(channels)[:, None].expand(channels, n))
        return phi

    def parallel(self, u: Tensor) -> Tensor:
        """The same output by the matrix."""
        return (self.phi(self._channels(u)) @ u.mT[..., None])[..., 0].mT

    def matrices(self, i: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
        """``L_i`` (S D, S D), ``B_i`` (S D, D) and ``C_i`` (D, S D) of token ``i``, written out."""
        log_decay, enters, reads = (t[i] for t in self._whole(channels))
        one = torch.eye(channels, dtype=enters.dtype, device=enters.device)
        b, c = ((t[:, :, None] * one).flatten(0, 1) for t in (enters, reads))
        return torch.diag(log_decay.exp().flatten()), b, c.mT

    def _channels(self, u: Tensor) -> int:
        n = torch.broadcast_shapes(self.log_decay.shape, self.enters.shape, self.reads.shape)[0]
        check_axes("u", u, N=n, D=None)
        return u.shape[1]


@checked
def from_linear_attention(q: Tensor, k: Tensor, eta: Tensor | str | None = None, place: str = "output") -> LinearSystem:
    """Causal linear attention on features.

    Args:
        q, k: (N, S) features of queries and keys.
        eta: no denominator, ``"sum"`` for the sum of a row's weights, or (N,) of one's own; above 0.
        place: ``"output"``: it divides what is read; ``"decay"``: the state is kept divided by it.
    """
    check_axes("q", q, N=None, S=None)
    check_axes("k", k, N=q.shape[0], S=q.shape[1])
    check_choice("place", place, ("output", "decay"))
    if isinstance(eta, str):
        check_choice("eta", eta, ("sum",))
        eta = torch.einsum("ns,ns->n", q, k.cumsum(0))
    none = torch.zeros(len(q), 1, 1, dtype=q.dtype, device=q.device)
    if eta is None:
        return LinearSystem(none, k[..., None], q[..., None])
    check_axes("eta", eta, N=q.shape[0])
    if not (eta > 0).all():
        raise ValueError("eta must be above 0 at every token; features with negative products have no such denominator")
    if place == "output":
        return LinearSystem(none, k[..., None], (q / eta[:, None])[..., None])
    before = torch.cat([eta[:1], eta[:-1]])  # of the first token nothing is kept, whatever decays it
    return LinearSystem((before / eta).log()[:, None, None], (k / eta[:, None])[..., None], q[..., None])


ETAS: dict[str, Callable[[Tensor], Tensor]] = {"exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid}


@checked
def normalised_attention(
    q: Tensor, k: Tensor, scores: Tensor, function: str = "exp", side: str = "key"
) -> LinearSystem:
    """Linear attention divided by a free function of a token, ``eta = function(W u)``.

    Args:
        q, k: (N, S) features.
        scores: (N,) what ``W u`` gave.
        function: ``"exp"``, ``"softplus"`` or ``"sigmoid"``.
        side: whose token it is: ``"key"`` or ``"query"`` (unsure).
    """
    check_choice("function", function, ETAS)
    check_choice("side", side, ("key", "query"))
    check_axes("q", q, N=None, S=None)
    check_axes("scores", scores, N=q.shape[0])
    eta = ETAS[function](scores)[:, None]
    return from_linear_attention(q / eta if side == "query" else q, k / eta if side == "key" else k)


@checked
def from_s6(delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None) -> LinearSystem:
    """A selective scan: steps (N, D) after softplus, ``a`` (D, S) of negative numbers, ``b`` and ``c`` (N, S)."""
    check_axes("delta", delta, N=None, D=None)
    check_axes("a", a, D=delta.shape[1], S=None)
    for name, value in (("b", b), ("c", c)):
        check_axes(name, value, N=delta.shape[0], S=a.shape[1])
    steps = delta[:, None]
    return LinearSystem(steps * a.mT, steps * b[..., None], c[..., None], skip)


@checked
def from_gates(forget: Tensor, enter: Tensor, read: Tensor) -> LinearSystem:
    """A quasi-recurrent net: a number of state per channel, gates (N, D) that depend on the input alone."""
    check_axes("forget", forget, N=None, D=None)
    for name, value in (("enter", enter), ("read", read)):
        check_axes(name, value, N=forget.shape[0], D=forget.shape[1])
    return LinearSystem(forget.log()[:, None], enter[:, None], read[:, None])


@checked
def quasi_lstm(forget: Tensor, enter: Tensor, read: Tensor, gate: str = "own") -> LinearSystem:
    """qLSTM from what precedes its gates, each (N, D).

    Args:
        forget, enter, read: scores.
        gate: ``"own"`` gates for forgetting and entering, ``"coupled"``: what enters is what is forgotten, or ``"s6"``:
            ``sigmoid(-x)`` and ``softplus(x)`` of the first score. The last two do not read ``enter``.
    """
    check_choice("gate", gate, ("own", "coupled", "s6"))
    if gate == "s6":
        return from_gates((-F.softplus(forget)).exp(), F.softplus(forget), read.sigmoid())
    entered = enter.sigmoid() if gate == "own" else (-forget).sigmoid()
    return from_gates(forget.sigmoid(), entered, read.sigmoid())


def from_cell(cell: Callable[[Tensor, Tensor], Tensor], u: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The diagonal ``L_i`` and what enters, (N, size) each, of any recurrence ``h' = cell(u_i, h)`` that has them.

    Raises:
        ValueError: the cell is not linear in its state, as the LSTM is not, or mixes numbers of state.
    """
    check_axes("u", u, N=None, D=None)
    check_int("size", size, least=1)
    decays, entered = [], []
    states = torch.randn(2, size, dtype=u.dtype, generator=torch.Generator().manual_seed(0)).to(u.device)
    for token in u:
        slopes = [torch.autograd.functional.jacobian(lambda h, t=token: cell(t, h), state) for state in states]
        if not torch.allclose(slopes[0], slopes[1], rtol=1e-4, atol=1e-6):
            raise ValueError("cell is not linear in its state (its gates read it): it is no system of this form")
        diagonal = slopes[0].diagonal()
        if not torch.allclose(slopes[0], torch.diag(diagonal), rtol=0, atol=1e-6):
            raise ValueError("cell mixes numbers of its state: its matrix is not diagonal")
        decays.append(diagonal)
        entered.append(cell(token, torch.zeros_like(states[0])).detach())
    return torch.stack(decays), torch.stack(entered)


def taylor_features(x: Tensor, order: int) -> Tensor:
    """Features whose products are the Taylor polynomial of ``exp(q . k)``: (..., d) to (..., C(d + order, order)).

    >>> taylor_features(torch.ones(3), 2).shape
    torch.Size([10])
    """
    check_tensor("x", x)
    check_int("order", order, least=0)
    parts = [torch.ones_like(x[..., :1])]
    for degree in range(1, order + 1):
        chosen = list(itertools.combinations_with_replacement(range(x.shape[-1]), degree))
        share = [1 / math.sqrt(math.prod(math.factorial(c.count(i)) for i in set(c))) for c in chosen]
        parts.append(x[..., torch.tensor(chosen)].prod(-1) * torch.tensor(share, dtype=x.dtype, device=x.device))
    return torch.cat(parts, -1)


class OneFramework(Experiment):
    """Are the converters exact, and does linear attention approach softmax as Taylor features grow?

    Args:
        tokens, dim: of random queries, keys and values.
        size: standard deviation of scores; beyond about one, low orders of Taylor's series approach nothing.
    """

    name = "attention, state spaces and gates as one linear system"

    @checked
    def __init__(self, tokens: int = 48, dim: int = 4, size: float = 0.5):
        check_real("size", size, above=0)
        self.tokens, self.dim, self.size = tokens, dim, size

    def predict(self) -> dict[str, Claim]:
        return {
            "S6 by the matrix minus by the scan": Claim.below(1e-6),
            "linear attention by the recurrence minus by the matrix": Claim.below(1e-6),
            "error at order 2 over that at order 1": Claim.below(1.0),
            "error at order 4 over that at order 2": Claim.below(0.5),
            "error at order 4": Claim.below(0.1),
        }

    def outside(self) -> OneFramework:
        """Scores so large that a polynomial of low order is no exponential."""
        return OneFramework(self.tokens, self.dim, 10.0)

    def run(self, seed: int) -> dict[str, float]:
        g = torch.Generator().manual_seed(seed)
        q, k, v, b, c = torch.randn(5, self.tokens, self.dim, dtype=torch.float64, generator=g)
        scale = math.sqrt(self.size / math.sqrt(self.dim))
        q, k = scale * q, scale * k
        exact = attention(q[None, None], k[None, None], v[None, None], scale=1.0, mask=causal())[0, 0]  # type: ignore[index]
        errors = {}
        for order in (1, 2, 4):
            phi_q, phi_k = taylor_features(q, order), taylor_features(k, order)
            system = from_linear_attention(phi_q, phi_k)
            total = system.recurrent(torch.ones_like(v[:, :1]))
            out = system.recurrent(v) / total  # of either sign at odd orders
            errors[order] = float((out - exact).norm() / exact.norm())
        steps, a = F.softplus(v), -torch.rand(self.dim, self.dim, dtype=torch.float64, generator=g) - 0.1
        system = from_s6(steps, a, b, c)
        scanned = selective_scan(k[None], steps[None], a, b[None], c[None])[0]
        plain = from_linear_attention(taylor_features(q, 2), taylor_features(k, 2))
        return {
            "S6 by the matrix minus by the scan": float((system.parallel(k) - scanned).abs().max()),
            "linear attention by the recurrence minus by the matrix": float(
                (plain.recurrent(v) - plain.parallel(v)).norm() / plain.parallel(v).norm()
            ),
            "error at order 2 over that at order 1": errors[2] / errors[1],
            "error at order 4 over that at order 2": errors[4] / errors[2],
            **{f"error at order {p}": e for p, e in errors.items()},
        }
