"""``attention``: one operator, several backends, a documented order of choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..checks import check_flag
from ..masks import Mask
from ..normalizers import Normalizer
from ..positions import Bias
from ..types import Partial
from . import _shards, eager, flex, sdpa, split_decoding, tiled
from ._call import AttentionCall, prepare
from ._dispatch import Backend, Operator, explain, use_backend
from ._guard import guarded
from .kernels import streamed


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None, valid: Tensor | None = None,
    bias: Bias | Tensor | None = None, scale: float | None = None, normalizer: str | Normalizer = "softmax",
    dropout_p: float = 0.0, q_pos: Tensor | None = None, k_pos: Tensor | None = None, return_weights: bool = False,
    want: str = "out",
) -> AttentionCall:  # fmt: skip
    return prepare(
        q, k, v, mask=mask, valid=valid, bias=bias, scale=scale, normalizer=normalizer, dropout_p=dropout_p,
        q_pos=q_pos, k_pos=k_pos, want="weights" if return_weights else want,
    )  # fmt: skip


ATTENTION = Operator("attention", _prepare, entries={"attention_partial": {"want": "partial"}}, cut=True)
for _backend in (sdpa, split_decoding, flex, streamed, tiled, eager):
    _backend.register(ATTENTION)
for _name, _one in ATTENTION.backends.items():
    ATTENTION.backends[_name] = replace(_one, run=partial(guarded, _one.run))

#: Backends in the order in which ``backend=None`` tries them.
BACKENDS: tuple[str, ...] = tuple(ATTENTION.backends)


def lend(operator: Operator, problem: Callable[[Any], AttentionCall]) -> None:
    """Let the backends of attention serve an operator whose calls are, seen whole, attention: ``problem(call)``."""
    for one in ATTENTION.backends.values():
        if one.name not in operator.backends:
            operator.register(
                one.name, partial(_lent, problem, one), supports=partial(_why_not, problem, one),
                prefers=_always if one is ATTENTION.backends["eager"] else _when_forced, first=one.first,
                second=one.second, transforms=one.transforms,
            )  # fmt: skip


def _lent(problem: Callable[[Any], AttentionCall], one: Backend, call: Any) -> Any:
    return one.run(problem(call))


def _why_not(problem: Callable[[Any], AttentionCall], one: Backend, call: Any) -> str | None:
    return one.supports(problem(call))


def _always(call: Any) -> None:
    return None


def _when_forced(call: Any) -> str:
    return "it would compute the whole map, so it runs only when forced"


lend(split_decoding.OPERATOR, lambda call: call.dense)

__all__ = ["ATTENTION", "BACKENDS", "attention", "attention_partial", "explain", "lend", "use_backend"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    valid: Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    normalizer: str | Normalizer = "softmax",
    dropout_p: float = 0.0,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    backend: str | None = None,
    return_weights: bool = False,
) -> Any:
    """``normalizer(scale * q k^T + bias, where mask and valid allow) v``.

    Args:
        q: (B, Hq, N, D) queries.
        k: (B, Hk, M, D) keys, ``Hq % Hk == 0``.
        v: (B, Hv, M, Dv) values, ``Hq % Hv == 0``.
        mask: which pairs may meet: an :class:`attnlib.masks.Mask`, or a boolean tensor (N, M), (B, N, M) or
            (B, H, N, M), in which sides of 1 serve all. A mask sees positions, which begin at 0 for queries and for
            keys: ``masks.causal()`` lets the first query read the first key. Where the queries are the last N of the
            M keys, say so: ``q_pos=torch.arange(M - N, M)``.
        valid: (B, M) boolean, which keys exist.
        bias: added to the scaled scores: a :class:`attnlib.positions.Bias`, or a float tensor (N, M), (H, N, M) or
            (B, H, N, M), in which sides of 1 serve all. ``-inf`` forbids a pair.
        scale: defaults to ``D ** -0.5``.
        normalizer: ``"softmax"``, another name, or an :class:`attnlib.normalizers.Normalizer`.
        dropout_p: dropout of weights; eager and sdpa only.
        q_pos: (N,), (B, N) or (B, H, N) integer positions that the mask sees; ``0..N-1`` by default.
        k_pos: the same for keys.
        backend: one of :data:`BACKENDS`, or ``None`` for the first that serves (see :func:`explain`).
        return_weights: also return the (B, H, N, M) weights (eager only).

    Returns:
        (B, Hq, N, Dv), or a pair of it and the weights. A row that may attend to nothing gives zeros, with zero
        gradients, in every backend.

    Raises:
        ValueError: shapes that do not fit, or a forced backend that cannot serve the call.
        TypeError: mixed or integer dtypes.

    >>> import torch
    >>> attention(torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 6)).shape
    torch.Size([1, 4, 3, 6])
    """
    call = prepare(
        q, k, v, mask=mask, valid=valid, bias=bias, scale=scale, normalizer=normalizer, dropout_p=dropout_p,
        q_pos=q_pos, k_pos=k_pos, want="weights" if check_flag("return_weights", return_weights) else "out",
    )  # fmt: skip
    return _run(call, backend)


def _run(call: AttentionCall, backend: str | None) -> Any:
    who = _shards.others() if _shards.entered else None
    return ATTENTION.run(call, backend) if who is None else who.attention(call, partial(ATTENTION.run, backend=backend))


def attention_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    valid: Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    backend: str | None = None,
) -> Partial:
    """Softmax attention over part of the keys, as a mergeable :class:`attnlib.types.Partial`.

    Arguments as in :func:`attention`.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 6, 4)
    >>> halves = [attention_partial(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 2), slice(2, 6))]
    >>> torch.allclose(halves[0].merge(halves[1]).finish(), attention(q, k, v), atol=1e-6)
    True
    """
    call = prepare(q, k, v, mask=mask, valid=valid, bias=bias, scale=scale, q_pos=q_pos, k_pos=k_pos, want="partial")
    result = _run(call, backend)
    assert isinstance(result, Partial)
    return result
