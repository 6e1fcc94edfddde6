"""Engine D: queries read a reduction of the tokens instead of the tokens.

A reduction is a pool, a stride, a set of landmarks or of agents; it may be scattered back. All of it knows validity: a
pool averages over the tokens that exist, and a summary without any is never read. Causality is served block by block
(:func:`reduced_attention`): a summary is read only by queries behind its last token. Other pairwise masks cannot be
served, because a summary mixes tokens that such a mask tells apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_choice,
    check_device,
    check_flag,
    check_float,
    check_int,
    check_ints,
    check_rank,
    check_valid,
    to_tuple,
)
from ..masks import Causal, Mask, as_mask, causal
from ..positions import Bias
from ..types import Partial, exactly, stats_dtype
from ._call import AttentionCall, check_qkv, prepare
from ._dispatch import Backend, Operator
from ._guard import guarded
from .attention import ATTENTION
from .block_policies import pool_blocks

#: Below so many keys a map is held keys by queries.
NARROW = 32


def adaptive_pool_tokens(
    x: Tensor, size: int | Sequence[int], valid: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Mean over the tokens that exist in each cell of a ``size`` grid laid over the tokens' grid.

    Args:
        x: (B, *grid, C), one to three axes.
        size: cells per axis; may exceed the grid, cells then repeat tokens.
        valid: (B, *grid) boolean.

    Returns:
        (B, *size, C), zero for cells without tokens, and (B, *size) boolean: which cells have any (``None`` when
        ``valid`` is).

    >>> adaptive_pool_tokens(torch.arange(4.0).view(1, 4, 1), 2)[0].flatten().tolist()
    [0.5, 2.5]
    """
    check_rank("x", x, (3, 4, 5), "(B, N, C), (B, H, W, C) or (B, T, H, W, C)")
    check_valid("valid", valid, x.shape[:-1])
    rank = x.dim() - 2
    check_float("x", x)
    check_device(x=x, valid=valid)
    cells = check_ints("size", to_tuple("size", size, rank), least=1)
    if 0 in x.shape[1:-1]:
        raise ValueError(f"x must hold at least one token per axis to be pooled, got {tuple(x.shape)}")
    pool: Callable[[Tensor, Any], Tensor] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[
        rank - 1
    ]

    def means(t: Tensor) -> Tensor:
        return pool(t.movedim(-1, 1), cells if rank > 1 else cells[0]).movedim(1, -1)

    if valid is None:
        return means(x), None
    share = means(valid.unsqueeze(-1).to(x.dtype))
    some = share > 0
    pooled = means(x.masked_fill(~valid.unsqueeze(-1), 0.0)) / share.masked_fill(~some, 1.0)
    return pooled, some.squeeze(-1)


def strided_tokens(
    x: Tensor, stride: int | Sequence[int], valid: Tensor | None = None, offset: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Every ``stride``-th token of (B, *grid, C) on each axis, from ``offset``, and which of them exist."""
    check_rank("x", x, (3, 4, 5), "(B, N, C), (B, H, W, C) or (B, T, H, W, C)")
    check_valid("valid", valid, x.shape[:-1])
    check_device(x=x, valid=valid)
    steps = check_ints("stride", to_tuple("stride", stride, x.dim() - 2), least=1)
    check_int("offset", offset, least=0)
    pick = (slice(None), *(slice(offset, None, s) for s in steps))
    return x[pick], None if valid is None else valid[pick]


def _whole_map(call: AttentionCall, few_keys: bool) -> Tensor:
    """Softmax attention by two plain products, the scale on the side that has few tokens.

    With very few keys the map is held keys by queries: a softmax along a short last axis wastes most of a vector
    register (measured: three times the time with 9 keys, the same with 49).
    """
    high = stats_dtype(call.q.dtype)
    k, v = call.expanded()
    keys = -2 if few_keys and k.shape[2] < NARROW else -1
    with exactly(call.q):
        q, k = call.q.to(high), k.to(high)
        q, k = (q, k * call.scale) if few_keys else (q * call.scale, k)
        s = q @ k.mT if keys == -1 else k @ q.mT
        if call.bias is not None:
            bias = call.bias.dense().to(high)
            s = s + (bias if keys == -1 else bias.mT)
        if call.valid is None:
            weights = s.softmax(keys)
        else:
            # A sample without keys attends evenly and is zeroed: no NaN enters, and its gradient is exactly zero.
            exists = call.valid[:, None, None] if keys == -1 else call.valid[:, None, :, None]
            some = exists.any(keys, keepdim=True)
            weights = s.masked_fill(~exists & some, float("-inf")).softmax(keys).masked_fill(~some, 0.0)
        if call.dropout_p:
            weights = F.dropout(weights, call.dropout_p)
        return ((weights if keys == -1 else weights.mT) @ v.to(high)).to(call.q.dtype)


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    read_bias: Bias | Tensor | None = None,
    write_bias: Bias | Tensor | None = None,
    valid: Tensor | None = None,
    agents_valid: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``softmax(q a^T + write_bias) softmax(a k^T + read_bias) v``: agents read the keys, queries read the agents.

    Args:
        q: (B, H, N, D) queries.
        agents: (B, H, n, D), few.
        k: (B, Hk, M, D) keys.
        v: (B, Hv, M, Dv) values.
        read_bias: (H, n, M) up to (B, H, n, M), of the agents' reading.
        write_bias: (H, N, n) up to (B, H, N, n), of the queries' reading.
        valid: (B, M) boolean, which keys exist.
        agents_valid: (B, n) boolean, which agents exist.
        scale: of both score maps; ``D ** -0.5`` by default.
        dropout_p: dropout of both weights.
        backend: ``"products"``, also by default: each map has few rows or few columns, so that holding it whole is
            linear already, and two plain products are fastest. Or a backend of :func:`attnlib.attention` for both.

    Returns:
        (B, H, N, Dv). Each row's product weights sum to 1 where any agent and any key exist. Cost: O(N n D).

    Reference: Han et al., 2023, arXiv 2312.08874, equation 5.

    >>> q, a, k = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4)
    >>> agent_attention(q, a, k, torch.ones(1, 2, 7, 5)).sub(1).abs().max().item() < 1e-6
    True
    """
    call = _prepare_agents(
        q, agents, k, v, read_bias=read_bias, write_bias=write_bias, valid=valid, agents_valid=agents_valid,
        scale=scale, dropout_p=dropout_p,
    )  # fmt: skip
    return _AGENTS.run(call, backend)


class _Agents(NamedTuple):
    """Two checked problems: agents read keys, queries read agents (whose values the first problem makes)."""

    read: AttentionCall
    write: AttentionCall

    def inputs(self) -> list[Tensor]:
        return [*self.read.inputs(), *self.write.inputs()]

    def written(self, run: Callable[[AttentionCall], Any], summary: Tensor) -> Tensor:
        """The second problem with its values; where keys may be absent, queries may be, too."""
        write = replace(self.write, v=summary)
        return run(write) if self.read.valid is None else guarded(run, write, lambda: write)


def _prepare_agents(
    q: Tensor, agents: Tensor, k: Tensor, v: Tensor, *, read_bias: Bias | Tensor | None = None,
    write_bias: Bias | Tensor | None = None, valid: Tensor | None = None, agents_valid: Tensor | None = None,
    scale: float | None = None, dropout_p: float = 0.0,
) -> _Agents:  # fmt: skip
    check_rank("agents", agents, 4, "(B, H, n, D)")
    args: dict[str, Any] = dict(scale=scale, dropout_p=dropout_p)
    read = prepare(agents, k, v, bias=read_bias, valid=valid, bias_name="read_bias", **args)
    check_rank("q", q, 4, "(B, H, N, D)")
    check_valid("agents_valid", agents_valid, (q.shape[0], agents.shape[2]))
    write = prepare(q, agents, agents, bias=write_bias, valid=agents_valid, bias_name="write_bias", **args)
    return _Agents(read, write)


def _by_products(call: _Agents) -> Tensor:
    summary = guarded(functools.partial(_whole_map, few_keys=False), call.read)
    return call.written(functools.partial(_whole_map, few_keys=True), summary)


def _by_backend(name: str, call: _Agents) -> Tensor:
    return call.written(ATTENTION.backends[name].run, ATTENTION.backends[name].run(call.read))


def _why_not(one: Backend, call: _Agents) -> str | None:
    return one.supports(call.read) or one.supports(call.write)


def _when_forced(call: _Agents) -> str:
    return "each map has few rows or few columns, which two plain products serve best"


_AGENTS = Operator("agent_attention", _prepare_agents)
_AGENTS.register("products", _by_products)
for _one in ATTENTION.backends.values():
    _AGENTS.register(
        _one.name, functools.partial(_by_backend, _one.name), supports=functools.partial(_why_not, _one),
        prefers=_when_forced, first=_one.first, second=_one.second, transforms=_one.transforms,
    )  # fmt: skip


def reduced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    *,
    reduce: str = "mean",
    valid: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    partial: bool = False,
    backend: str | None = None,
) -> Tensor | Partial:
    """Queries read one key and one value for each run of ``block`` consecutive tokens.

    Args:
        q: (B, Hq, N, D) queries.
        k: (B, Hk, M, D) keys.
        v: (B, Hv, M, Dv) values.
        block: tokens per summary; the last run may be short.
        reduce: ``"mean"`` of the tokens that exist, or ``"last"``, the run's last token (a stride).
        valid: (B, M) boolean, which keys exist.
        mask: ``None``, or ``masks.causal()``: a summary is then read by queries at or behind its last token; queries
            before the first complete run read nothing and give zeros.
        partial: return a :class:`attnlib.types.Partial`, to merge with attention to near tokens.
        scale: defaults to ``D ** -0.5``.
        backend: a backend of :func:`attnlib.attention`, for what reads the summaries.

    Returns:
        (B, Hq, N, Dv).

    Raises:
        ValueError: for a mask other than causal, which a summary of several tokens cannot follow.

    >>> q, k = torch.randn(2, 1, 2, 8, 4)
    >>> reduced_attention(q, k, torch.ones(1, 2, 8, 4), block=4).mean().item()
    1.0
    """
    call = _prepare_reduced(q, k, v, block, reduce=reduce, valid=valid, mask=mask, scale=scale, partial=partial)
    return _REDUCED.run(call, backend)


def _prepare_reduced(
    q: Tensor, k: Tensor, v: Tensor, block: int, *, reduce: str = "mean", valid: Tensor | None = None,
    mask: Mask | Tensor | None = None, scale: float | None = None, partial: bool = False,
) -> AttentionCall:  # fmt: skip
    check_qkv(q, k, v)
    check_device(q=q, k=k, v=v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_float(name, t)
    check_choice("reduce", reduce, ("mean", "last"))
    check_int("block", block, least=1)
    check_flag("partial", partial)
    check_valid("valid", valid, (k.shape[0], k.shape[2]))
    check_device(k=k, valid=valid)
    mask = as_mask(mask)
    if mask is not None and not isinstance(mask, Causal):
        raise ValueError(
            f"mask={mask!r} cannot be served over summaries of {block} tokens; possible: None or masks.causal()"
        )
    m = k.shape[2]
    ends = (torch.arange(-(-m // block), device=k.device) * block + block - 1).clamp(max=max(m - 1, 0))
    exists = None
    if reduce == "mean":
        (k_r, some), (v_r, _) = pool_blocks(k, block, valid), pool_blocks(v, block, valid)
        k_r, v_r = k_r.to(k.dtype), v_r.to(v.dtype)
        exists = None if valid is None else some
    else:
        k_r, v_r = k.index_select(2, ends), v.index_select(2, ends)
        exists = None if valid is None else valid.index_select(1, ends)
    args: dict[str, Any] = dict(valid=exists, scale=scale, want="partial" if partial else "out")
    if mask is not None:
        args.update(mask=causal(), q_pos=torch.arange(q.shape[2], device=q.device), k_pos=ends)
    return prepare(q, k_r, v_r, **args)


# Attention over the summaries, by whatever serves attention.
_REDUCED = Operator("reduced_attention", _prepare_reduced)
_REDUCED.backends = ATTENTION.backends
