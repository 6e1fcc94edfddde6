"""``attention``: one operator, several backends, a documented order of choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor

from ..masks import Mask
from ..normalizers import Normalizer
from ..positions import Bias
from ..types import Partial
from . import eager, flex, sdpa, split_decoding, tiled
from ._call import AttentionCall, prepare

#: Backends in the order in which ``backend=None`` tries them.
BACKENDS: tuple[str, ...] = ("sdpa", "split", "tiled", "flex", "eager")

_MODULES: dict[str, ModuleType] = {
    "sdpa": sdpa, "split": split_decoding, "tiled": tiled, "flex": flex, "eager": eager,
}  # fmt: skip
_forced: str | None = None


def _backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(
            f"backend={name!r} is unknown; choose one of {list(BACKENDS)} or None for the automatic choice"
        )
    return _MODULES[name]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every operator call inside the block; a backend that cannot serve a call raises.

    >>> import torch
    >>> with use_backend("eager"):
    ...     attention(*torch.zeros(3, 1, 1, 2, 4)).shape
    torch.Size([1, 1, 2, 4])
    """
    global _forced
    if name is not None:
        _backend(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _prefers(name: str, call: AttentionCall) -> str | None:
    """Why the automatic choice passes over a backend that could serve; ``None`` when it is welcome."""
    return getattr(_backend(name), "prefers", lambda call: None)(call)


def _reasons(call: AttentionCall) -> list[tuple[str, str | None]]:
    return [(name, _backend(name).supports(call) or _prefers(name, call)) for name in BACKENDS]


def choose(call: AttentionCall, backend: str | None = None) -> str:
    """Name of the backend that serves ``call``; raises ``ValueError`` when a forced one cannot."""
    backend = backend or _forced
    if backend is not None:
        why = _backend(backend).supports(call)
        if why:
            raise ValueError(f"backend={backend!r} cannot serve this call: {why}")
        return backend
    for name in BACKENDS:
        if _backend(name).supports(call) is None and _prefers(name, call) is None:
            return name
    raise AssertionError("eager serves everything")


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
        mask: which pairs may meet: an :class:`attnlib.masks.Mask`, or a boolean tensor (N, M) up to (B, H, N, M).
        valid: (B, M) boolean, which keys exist.
        bias: added to the scaled scores: a :class:`attnlib.positions.Bias` or a float tensor (N, M) up to (B, H, N, M).
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
        q_pos=q_pos, k_pos=k_pos, want="weights" if return_weights else "out",
    )  # fmt: skip
    return _backend(choose(call, backend)).run(call)


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
    result = _backend(choose(call, backend)).run(call)
    assert isinstance(result, Partial)
    return result


def explain(*args: Any, backend: str | None = None, return_weights: bool = False, **kwargs: Any) -> str:
    """Which backend serves ``attention(*args, **kwargs)`` and why each other was passed over.

    >>> import torch
    >>> print(explain(*torch.zeros(3, 1, 1, 2, 4), normalizer="relu").splitlines()[1])
    passed over: sdpa: its normalizer is relu, SDPA only knows softmax
    """
    call = prepare(*args, want="weights" if return_weights else "out", **kwargs)
    chosen = choose(call, backend)
    lines = [f"runs: {chosen}"]
    for name, why in _reasons(call):
        if name != chosen:
            lines.append(f"passed over: {name}: {why or f'comes after {chosen} in the order {list(BACKENDS)}'}")
    return "\n".join(lines)
