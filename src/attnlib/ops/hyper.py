"""Softmax attention in nearly linear time: sorted hashes find heavy pairs, the rest is estimated from a sample.

Queries and keys are sorted by an angular hash, so that those that point the same way lie side by side. What a query
reads is exact inside its block of sorted keys; the mass of all other keys is estimated from a uniform sample of them,
without those of the own block; the two parts are merged as parts of one softmax. Causal attention halves: both halves
by themselves, and the second half reads the first one by the above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_index,
    check_int,
    check_rank,
    check_real,
    check_valid,
)
from ..masks import causal as causal_mask
from ..normalizers import exp_
from ..types import Partial, exactly, stats_dtype
from ._call import check_qkv, expand_heads
from ._dispatch import transformed, wants_gradient
from ._guard import readable
from .attention import attention_partial

COMPAT = (None, "authors")

#: Steps within a bucket that a hash tells apart where queries are aligned with keys by the hash itself.
FINE = 1 << 12

#: Smallest block whose kernel call is worth more than what a loop over blocks costs.
LOOPED = 8


#: Draws are integers below this, so that no change of type rounds them.
DRAWS = 1 << 31


def _gray_ranks(bits: int) -> tuple[int, ...]:
    ranks: tuple[int, ...] = (0,)
    for bit in range(bits):
        ranks = (*ranks, *(r + 2**bit for r in reversed(ranks)))
    return ranks


def angular_hash(x: Tensor, directions: Tensor, fine: bool = False) -> Tensor:
    """Buckets of (..., N, D): signs along ``p`` directions (D, p) as a word, ranked so that neighbours differ in one.

    Args:
        x: queries or keys.
        directions: random, the same for all that is compared.
        fine: tell :data:`FINE` steps within a bucket apart, by the angle to the first direction.

    Returns:
        (..., N) integers from 0 to ``2 ** p - 1``, or ``FINE`` times as many.

    >>> angular_hash(torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]]), torch.eye(2)).tolist()
    [2, 3, 0]
    """
    bits = directions.shape[-1]
    high = stats_dtype(x.dtype)
    with torch.no_grad(), exactly(x):
        along = x.to(high) @ directions.to(high)
        if not bits:
            return torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
        word = ((along > 0).long() * 2 ** torch.arange(bits, device=x.device)).sum(-1)
        code = torch.tensor(_gray_ranks(bits), device=x.device)[word]
        if fine:
            norm = x.to(high).norm(dim=-1) * directions[:, 0].to(high).norm()
            cosine = along[..., 0] / torch.where(norm == 0, 1, norm)
            code = code * FINE + ((cosine.clamp(-1, 1) + 1) / 2 * FINE).long().clamp(max=FINE - 1)
    return code


@dataclass(frozen=True)
class _Options:
    block: int
    samples: int
    least: int
    scale: float
    strict: bool
    compat: str | None


@dataclass(frozen=True)
class _Side:
    """Heads folded into the batch: (R, N, D) tokens, their hashes, and which exist; ``None`` when all do."""

    x: Tensor
    code: Tensor
    valid: Tensor | None

    def halves(self) -> _Side:
        """(R, 2 n, D) -> (2 R, n, D)."""
        split = lambda t: t.unflatten(1, (2, -1)).flatten(0, 1)  # noqa: E731
        return _Side(split(self.x), split(self.code), None if self.valid is None else split(self.valid))

    def part(self, at: slice) -> _Side:
        return _Side(self.x[:, at], self.code[:, at], None if self.valid is None else self.valid[:, at])

    def sorted(self) -> tuple[Tensor, _Side]:
        """The order by hash, what does not exist last, and the side in that order."""
        code = self.code if self.valid is None else self.code.masked_fill(~self.valid, torch.iinfo(torch.long).max)
        order = code.argsort(dim=1, stable=True)
        valid = None if self.valid is None else self.valid.gather(1, order)
        return order, _Side(_rows(self.x, order), code.gather(1, order), valid)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(R, N) or (R, N, D) at (R, n) -> (R, n) or (R, n, D)."""
    if x.dim() == 2:
        return x.gather(1, index)
    count = x.shape[0]
    flat = index + torch.arange(count, device=x.device).unsqueeze(-1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, (count, index.shape[1]))


def _pad(x: Tensor, length: int) -> Tensor:
    more = length - x.shape[1]
    return x if not more else F.pad(x, (0, 0) * (x.dim() - 2) + (0, more))


def _fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the CPU's own kernel serves, which keeps no scores."""
    plain = readable(q, k, v) and q.dtype == torch.float32 and not transformed([q, k, v])
    given = q.numel() and k.numel() and v.shape[-1] == q.shape[-1]
    return bool(plain and given and not wants_gradient([q, k, v]))


def _kernel(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum of (B, H, N, D), by the kernel of :func:`_fused`."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **call)
    return out, lse


def _part(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None) -> Partial:
    """Softmax attention over the keys that are not hidden, as a mergeable part."""
    if _fused(q, k, v):
        flat = q.dim() == 3
        q, k, v = (t.unsqueeze(1) if flat else t for t in (q, k, v))
        mask = None
        if hidden is not None:
            hidden = hidden.unsqueeze(1) if flat else hidden
            mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -math.inf)
        out, lse = _kernel(q, k, v, attn_mask=mask, scale=scale)
        den = torch.ones_like(lse)
        if hidden is not None:
            none = hidden.all(-1).expand(lse.shape)
            out, lse, den = out.masked_fill(none.unsqueeze(-1), 0), lse.masked_fill(none, 0), den.masked_fill(none, 0)
        return Partial(*(t.squeeze(1) if flat else t for t in (lse, den, out)))
    scores = (q * scale) @ k.mT
    # In place where nobody watches: the scores are by far the largest tensor of a call.
    fresh = not torch.compiler.is_compiling() and not transformed([q, k, v])
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -math.inf) if fresh else scores.masked_fill(hidden, -math.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isinf(top), 0, top)
    weights = exp_(scores.sub_(top)) if fresh else (scores - top).exp()
    return Partial(top.squeeze(-1), weights.sum(-1), weights @ v)


def _exact(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, causal: bool, scale: float) -> Partial:
    """Attention of (R, N, D) as it is."""
    if valid is None and _fused(q, k, v):
        out, lse = _kernel(q[None], k[None], v[None], is_causal=causal, scale=scale)
        return Partial(lse[0], torch.ones_like(lse[0]), out[0])
    made = attention_partial(
        q[:, None], k[:, None], v[:, None], mask=causal_mask() if causal else None, valid=valid, scale=scale
    )
    return Partial(*(t[:, 0] for t in made))


def _authors_merge(a: Partial, b: Partial) -> Partial:
    """As the release writes it: ``1 / (1 + exp(b - a))`` and ``log(c + eps)``, which lose what is small."""
    one, two = a.lse(), b.lse()
    some = torch.isfinite(one) & torch.isfinite(two)  # else one of them has seen nothing
    apart = torch.where(some, two, 0) - torch.where(some, one, 0)
    c = 1 / (1 + apart.exp())
    out = c.unsqueeze(-1) * a.finish() + (1 - c).unsqueeze(-1) * b.finish()
    made = Partial(one - (c + torch.finfo(c.dtype).eps).log(), torch.ones_like(c), out)
    plain = a.merge(b)
    return Partial(
        *(torch.where(some.view(*some.shape, *[1] * (x.dim() - 2)), x, y) for x, y in zip(made, plain, strict=True))
    )


def _merge(a: Partial, b: Partial, o: _Options) -> Partial:
    return a.merge(b) if o.compat is None else _authors_merge(a, b)


def _by_rank(q: Tensor, k: _Side, v: Tensor, o: _Options) -> tuple[Partial, Tensor]:
    """Block i of sorted queries reads block i of sorted keys; and the block of every query."""
    n, m, b = q.shape[1], k.x.shape[1], o.block
    blocks = -(-m // b)
    if o.compat is None:
        tile = b if n == m else -(-n // blocks)
    else:
        padded = -(-n // b) * b
        if padded % blocks:
            raise ValueError(
                f"{n} queries and {m} keys do not lie in equally many blocks of block_size={b}, which the authors' "
                "arithmetic needs"
            )
        tile = padded // blocks
    tiles = _pad(q, blocks * tile).unflatten(1, (blocks, tile))
    keys, values = (_pad(t, blocks * b).unflatten(1, (blocks, b)) for t in (k.x, v))
    exists = k.valid
    if exists is not None or (o.compat is None and m % b):
        here = torch.ones(k.x.shape[:2], dtype=torch.bool, device=q.device) if exists is None else exists
        # The release pads with keys of zeros that are read like others.
        filled = blocks * b - m
        exists = F.pad(here, (0, filled), value=o.compat is not None).unflatten(1, (blocks, b)).unsqueeze(2)
    part = _part(tiles, keys, values, o.scale, None if exists is None else ~exists)
    part = Partial(*(t.flatten(1, 2)[:, :n] for t in part))
    return part, (torch.arange(n, device=q.device) // tile).expand(q.shape[0], -1)


def _own_blocks(q: _Side, k: _Side, o: _Options) -> tuple[Tensor, Tensor]:
    """(R, N) the block of sorted keys that each hash falls into, and (R, 1) how many keys exist."""
    many, m = k.x.shape[:2]
    last = torch.full((many, 1), m, device=q.x.device) if k.valid is None else k.valid.sum(1, keepdim=True)
    at = torch.searchsorted(k.code.contiguous(), q.code.contiguous())
    return torch.minimum(at, (last - 1).clamp(min=0)) // o.block, last


def _by_hash(q: _Side, k: _Side, v: Tensor, o: _Options) -> tuple[Partial, Tensor]:
    """Every query reads the block of sorted keys that its own hash falls into, whatever the other queries are.

    Sorted queries in tiles and blocks of keys meet along a staircase: at step p = tile + block, one pair of them.
    """
    n, m, b = q.x.shape[1], k.x.shape[1], o.block
    size = -(-b // 4)  # small tiles lie across few blocks
    blocks, tiles = -(-m // b), -(-n // size)
    many = q.x.shape[0]
    block, _ = _own_blocks(q, k, o)
    # What does not exist comes last; it must not lead the tiles on.
    ends = F.pad(block, (0, tiles * size - n)).unflatten(1, (tiles, size)).amax(-1).cummax(1).values
    steps = torch.arange(tiles + blocks - 1, device=q.x.device).expand(many, -1).contiguous()
    tile = torch.searchsorted(ends + torch.arange(tiles, device=q.x.device), steps).clamp(max=tiles - 1)
    column = (steps - tile).clamp(0, blocks - 1)

    def taken(t: Tensor, which: Tensor, count: int, each: int) -> Tensor:
        t = _pad(t, count * each).unflatten(1, (count, each))
        return _rows(t.flatten(2), which).unflatten(2, (each, -1))

    hidden = None
    if k.valid is not None:
        hidden = ~taken(k.valid.unsqueeze(-1), column, blocks, b).mT
    elif m % b:
        hidden = (torch.arange(b, device=q.x.device) + column.unsqueeze(-1) * b >= m).unsqueeze(-2)
    part = _part(
        taken(q.x, tile, tiles, size), taken(k.x, column, blocks, b), taken(v, column, blocks, b), o.scale, hidden
    )  # fmt: skip
    number = torch.arange(n, device=q.x.device)
    where = (number // size + block) * size + number % size
    return Partial(*(_rows(t.flatten(1, 2), where) for t in part)), block


def _across(q: _Side, k: _Side, v: Tensor, draws: Tensor | None, o: _Options) -> Partial:
    """All of ``k`` is read, (R, N, D) by (R, M, D); ``draws`` (R, s) choose the sample."""
    n, m = q.x.shape[1], k.x.shape[1]
    if n < o.least:
        return _exact(q.x, k.x, v, k.valid, False, o.scale)
    order, q = q.sorted()
    k_order, k = k.sorted()
    v = _rows(v, k_order)
    if o.strict and o.block >= LOOPED and _fused(q.x, k.x, v):
        part = _block_by_block(q, k, v, draws, o)
        back = order.argsort(dim=1, stable=True)
        return Partial(*(_rows(t, back) for t in part))
    part, block = _by_hash(q, k, v, o) if o.strict else _by_rank(q.x, k, v, o)
    if o.samples and m > o.block and (o.strict or n > -(-n // -(-m // o.block))):
        part = _merge(part, _sampled(q.x, k, v, block, draws, o), o)
    back = order.argsort(dim=1, stable=True)
    return Partial(*(_rows(t, back) for t in part))


def _drawn(k: _Side, draws: Tensor | None, o: _Options) -> tuple[Tensor, Tensor]:
    """Numbers of the sampled keys (R, s), with replacement among those that exist, and how many these are (R, 1)."""
    many, m = k.x.shape[:2]
    if k.valid is None:
        count = torch.full((many, 1), m, device=k.x.device)
    else:
        count = k.valid.sum(1, keepdim=True)
    if draws is None and k.valid is None:
        return torch.randint(m, size=(many, o.samples), device=k.x.device), count
    if draws is None:
        draws = torch.randint(DRAWS, size=(many, o.samples), device=k.x.device)
    return draws * count // DRAWS, count


def _sampled(q: Tensor, k: _Side, v: Tensor, block: Tensor, draws: Tensor | None, o: _Options) -> Partial:
    """The mass of the keys outside of the own block, estimated from a sample with replacement."""
    index, count = _drawn(k, draws, o)
    hidden = None if o.compat is not None else block.unsqueeze(-1) == (index // o.block).unsqueeze(1)
    if k.valid is not None:
        none = (count == 0).unsqueeze(-1)
        hidden = none if hidden is None else hidden | none
    part = _part(q, _rows(k.x, index), _rows(v, index), o.scale, hidden)
    return part.shift((count.to(v.dtype) / o.samples).clamp(min=1e-30).log())


def _block_by_block(q: _Side, k: _Side, v: Tensor, draws: Tensor | None, o: _Options) -> Partial:
    """:func:`_by_hash` and :func:`_sampled` where the numbers may be looked at: the queries of a block are neighbours,
    and read it and the sample without it in one call."""
    many, n = q.x.shape[:2]
    block, last = _own_blocks(q, k, o)
    blocks = -(-k.x.shape[1] // o.block)
    ends = torch.arange(blocks + 1, device=block.device).expand(many, -1).contiguous()
    starts = torch.searchsorted(block, ends).tolist()
    out, lse = v.new_zeros(many, n, v.shape[-1]), v.new_zeros(many, n)
    den = torch.zeros_like(lse)
    sampling = o.samples > 0 and blocks > 1
    if sampling:
        index = _drawn(k, draws, o)[0].sort(1).values
        cuts = torch.searchsorted(index, ends * o.block).tolist()
        k_drawn, v_drawn = _rows(k.x, index), _rows(v, index)
    for r, exist in enumerate(last.flatten().tolist()):
        for i in range(blocks):
            rows, own = slice(*starts[r][i : i + 2]), slice(i * o.block, min((i + 1) * o.block, exist))
            if rows.start == rows.stop or own.start >= own.stop:
                continue
            keys, values, bias = [k.x[r, own]], [v[r, own]], None
            if sampling:
                for beside in (slice(0, cuts[r][i]), slice(cuts[r][i + 1], None)):
                    keys.append(k_drawn[r, beside])
                    values.append(v_drawn[r, beside])
                near = own.stop - own.start
                bias = v.new_full((sum(len(t) for t in keys),), math.log(exist / o.samples))
                bias[:near] = 0
                bias = bias[None, None, None]
            got, total = _kernel(
                q.x[None, r : r + 1, rows], torch.cat(keys)[None, None], torch.cat(values)[None, None], attn_mask=bias,
                scale=o.scale,
            )  # fmt: skip
            out[r, rows], lse[r, rows], den[r, rows] = got[0, 0], total[0, 0], 1
    return Partial(lse, den, out)


def _in_order(q: _Side, k: _Side, v: Tensor, draws: Tensor | None, o: _Options) -> Partial:
    n = q.x.shape[1]
    if n <= o.least:
        return _exact(q.x, k.x, v, k.valid, True, o.scale)
    if n % 2:  # a row of zeros at the end, which only itself would read
        q, k = (_Side(_pad(s.x, n + 1), _pad(s.code, n + 1), None if s.valid is None else _pad(s.valid, n + 1))
                for s in (q, k))  # fmt: skip
        v = _pad(v, n + 1)
    half = (n + 1) // 2
    both = None if draws is None else draws.repeat_interleave(2, 0)
    inside = _in_order(q.halves(), k.halves(), v.unflatten(1, (2, -1)).flatten(0, 1), both, o)
    first, second = (Partial(*(t.unflatten(0, (-1, 2))[:, i] for t in inside)) for i in (0, 1))
    before, after = slice(None, half), slice(half, None)
    second = _merge(second, _across(q.part(after), k.part(before), v[:, before], draws, o), o)
    return Partial(*(torch.cat([a, b], 1)[:, :n] for a, b in zip(first, second, strict=True)))


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    draws: Tensor | None = None,
    *,
    block_size: int = 256,
    sample_size: int = 256,
    min_seq_len: int = 4096,
    causal: bool = False,
    valid: Tensor | None = None,
    scale: float | None = None,
    codes: tuple[Tensor, Tensor] | None = None,
    strict: bool | None = None,
    compat: str | None = None,
    partial: bool = False,
) -> Any:
    """Attention whose large weights are exact and whose small ones are estimated, in ``O(N (b + s) D)``.

    Args:
        q: (B, H, N, D) queries.
        k: (B, Hk, M, D) keys.
        v: (B, Hv, M, Dv) values.
        directions: (D, p) random directions of the hash.
        draws: (H, s) or (B, H, s) integers from 0 to :data:`DRAWS` - 1, which choose the sample; ``None`` draws anew.
        block_size: sorted keys that a query reads exactly.
        sample_size: keys that stand for all others; 0 leaves them out.
        min_seq_len: sequences up to this length are read exactly.
        causal: a token reads itself and earlier ones; needs as many queries as keys.
        valid: (B, M) boolean, which keys exist; queries too, where there are as many.
        scale: ``D ** -0.5`` by default.
        codes: hashes (B, H, N) of queries and (B, H, M) of keys made earlier by :func:`hyper_codes`.
        strict: a query's block is found by its own hash. Otherwise by its rank among the queries, so that which keys it
            reads exactly depends on other queries, later ones too. By default where ``causal``.
        compat: ``"authors"``: the release's arithmetic: keys of zeros where the block does not divide M, a merge that
            loses what is small, ranks, and sampled keys of the own block that count twice.
        partial: return a :class:`attnlib.types.Partial` instead of the output.

    Returns:
        (B, H, N, Dv).

    Reference: Han et al., 2023, arXiv 2310.05869, algorithms 1 to 4.

    >>> q, k, v = torch.randn(3, 1, 2, 32, 4)
    >>> out = hyper_attention(q, k, v, torch.randn(4, 3), block_size=32, min_seq_len=0)
    >>> torch.allclose(out, (q @ k.mT / 2).softmax(-1) @ v, atol=1e-5)
    True
    """
    check_qkv(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v), ("directions", directions)):
        check_float(name, t)
    check_dtype(q=q, k=k, v=v)
    check_device(q=q, k=k, v=v, directions=directions, draws=draws, valid=valid)
    batch, heads, n, width = q.shape
    m = k.shape[2]
    check_rank("directions", directions, 2, "(D, p)")
    if directions.shape[0] != width:
        raise ValueError(f"directions must be (D, p) with D={width}, got {tuple(directions.shape)}")
    check_int("block_size", block_size, least=1)
    check_int("sample_size", sample_size, least=0)
    check_int("min_seq_len", min_seq_len, least=0)
    check_choice("compat", compat, COMPAT)
    for name, flag in (("causal", causal), ("partial", partial)):
        check_flag(name, flag)
    check_valid("valid", valid, (batch, m))
    if causal and n != m:
        raise ValueError(f"causal=True needs as many queries as keys, got N={n} and M={m}")
    if scale is not None:
        check_real("scale", scale)
    strict = (causal and compat is None) if strict is None else check_flag("strict", strict)
    if strict and compat is not None:
        raise ValueError(f"strict=True is not what the authors' code does; compat={compat!r} needs strict=False")
    if draws is not None:
        check_index("draws", draws, None, DRAWS, "number")
        if draws.shape[-1] != sample_size or tuple(draws.shape[:-1]) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"draws must be (H, s)={(heads, sample_size)} or (B, H, s), got {tuple(draws.shape)}"
            )  # fmt: skip
        draws = draws.expand(batch, heads, -1).flatten(0, 1)
    o = _Options(
        block_size, sample_size, min_seq_len, width**-0.5 if scale is None else scale, strict, compat
    )  # fmt: skip
    out_dtype, high = v.dtype, stats_dtype(q.dtype)
    with exactly(q):
        if codes is None:
            codes = hyper_codes(q, k, directions, strict)
        else:
            most = 2 ** directions.shape[-1] * (FINE if strict else 1)
            check_index("codes of q", codes[0], (batch, heads, n), most, "bucket")
            check_index("codes of k", codes[1], (batch, heads, m), most, "bucket")
        k, v = expand_heads(k, heads), expand_heads(v, heads)
        q, k, v = (t.to(high).flatten(0, 1) for t in (q, k, v))
        q_code, k_code = (t.flatten(0, 1) for t in codes)
        exists = None if valid is None else valid[:, None].expand(-1, heads, -1).flatten(0, 1)
        if exists is not None:
            k, v = (t.masked_fill(~exists.unsqueeze(-1), 0.0) for t in (k, v))
        reads = _Side(q, q_code, exists if n == m else None)
        keys = _Side(k, k_code, exists)
        if causal:
            made = _in_order(reads, keys, v, draws, o)
        elif n <= min_seq_len and compat is None:
            made = _exact(q, k, v, exists, False, o.scale)
        else:
            made = _across(reads, keys, v, draws, o)
        made = Partial(*(t.unflatten(0, (batch, heads)) for t in made))
    return made if partial else made.finish().to(out_dtype)


def hyper_codes(q: Tensor, k: Tensor, directions: Tensor, fine: bool) -> tuple[Tensor, Tensor]:
    """Hashes of queries (B, H, N) and keys (B, H, M), of whatever dtype those are: all that is discrete in a call."""
    heads = q.shape[1]
    return angular_hash(q, directions, fine), angular_hash(k, directions, fine).repeat_interleave(
        heads // k.shape[1], 1
    )
