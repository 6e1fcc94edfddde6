"""One attention call through its stages, whatever model it belongs to.

The model's own kernel keeps running: score and weight edits are computed beside it, a block of query rows at a time,
and only rows that an edit really changed replace the kernel's. An edit that changes nothing therefore gives the
untouched output, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..masks import Mask
from ..normalizers import softmax_rows
from ..ops import attention
from ..types import stats_dtype
from .intervention import Intervention, Probe, Stages, implements
from .site import PairMask, Site

#: Elements of the weight map that score edits, weight edits and probes hold at a time.
BLOCK_ELEMENTS = 1 << 22


def _grouped(a: Tensor, heads: int) -> Tensor:
    """(B, H, r, D) -> (B, heads, H / heads * r, D), so that grouped queries need no copies of keys."""
    return a.reshape(a.shape[0], heads, -1, a.shape[-1])


def score_rows(site: Site, q: Tensor, k: Tensor, rows: Tensor, pair: PairMask) -> tuple[Tensor, Tensor | None]:
    """(B, H, r, M) scores of some query rows, ``-inf`` where a pair may not meet, and which pairs may."""
    dtype = stats_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        some = _grouped(q.index_select(2, rows).to(dtype), k.shape[1])
        scores = (some @ k.to(dtype).transpose(-2, -1)).reshape(q.shape[0], q.shape[1], len(rows), k.shape[2])
    scores = scores * site.scale
    allowed, bias = pair.rows(rows)
    if bias is not None:
        scores = scores + bias.to(dtype)
    return (scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))), allowed


def mix_rows(weights: Tensor, v: Tensor) -> Tensor:
    """(B, H, r, Dv): weights (B, H, r, M) times values (B, Hv, M, Dv)."""
    with torch.autocast(v.device.type, enabled=False):
        out = _grouped(weights, v.shape[1]) @ v.to(weights.dtype)
    return out.reshape(*weights.shape[:-1], v.shape[-1])


def row_blocks(rows: Tensor, per_row: int, whole: bool = False) -> Iterator[Tensor]:
    """Split query rows so that a block's map stays within :data:`BLOCK_ELEMENTS`."""
    yield from rows.split(max(1, len(rows) if whole else BLOCK_ELEMENTS // max(1, per_row)))


def _edited(edit: Intervention, stage: str, site: Site, before: Tensor, rows: Tensor) -> Tensor:
    version = before._version
    after = getattr(edit, stage)(site, before, rows)
    if before._version != version:
        raise ValueError(f"{type(edit).__name__}.{stage} wrote into its input; return a new tensor instead")
    if after.shape != before.shape:
        raise ValueError(
            f"{type(edit).__name__}.{stage} returned shape {tuple(after.shape)}, it was given {tuple(before.shape)}"
        )
    return after


def weight_rows(
    site: Site, q: Tensor, k: Tensor, rows: Tensor, pair: PairMask, edits: Sequence[Intervention]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights of some query rows after ``edits``: ``(weights (B, H, r, M), changed (B, H, r) or None, allowed)``."""
    plain, allowed = score_rows(site, q, k, rows, pair)
    scores = plain
    for edit in edits:
        if implements(edit, "on_scores"):
            scores = _edited(edit, "on_scores", site, scores, rows)
    changed = None if scores is plain else (scores != plain).any(-1)
    before = weights = softmax_rows(scores)
    for edit in edits:
        if implements(edit, "on_weights"):
            weights = _edited(edit, "on_weights", site, weights, rows)
    if weights is not before:
        differ = (weights != before).any(-1)
        changed = differ if changed is None else changed | differ
    return weights, changed, allowed


def _apply_edits(
    site: Site, q: Tensor, k: Tensor, v: Tensor, pair: PairMask, out: Tensor, edits: Sequence[Intervention]
) -> Tensor:
    n = q.shape[2]
    wanted = [edit.edit_rows(site) for edit in edits]
    if any(rows is None for rows in wanted):
        rows = torch.arange(n, device=q.device)
    else:
        rows = torch.cat([r for r in wanted if r is not None]).unique()
    if not len(rows):
        return out
    pieces: list[tuple[Tensor, Tensor]] = []
    whole = any(edit.whole_map for edit in edits)
    for block in row_blocks(rows, q.shape[0] * q.shape[1] * k.shape[2], whole):
        weights, changed, _ = weight_rows(site, q, k, block, pair, edits)
        if changed is not None and bool(changed.any()):
            new = mix_rows(weights, v).to(out.dtype)
            pieces.append((block, torch.where(changed.unsqueeze(-1), new, out.index_select(2, block))))
    if not pieces:
        return out
    return out.index_copy(2, torch.cat([b for b, _ in pieces]), torch.cat([p for _, p in pieces], 2))


def _run_probes(site: Site, q: Tensor, k: Tensor, pair: PairMask, stages: Stages) -> None:
    with torch.no_grad():
        for i, probe in enumerate(stages.all):
            if not isinstance(probe, Probe):
                continue
            wanted = probe.probe(site)
            if wanted is None:
                continue
            rows, heads = wanted
            edits = [e for e in stages.all[:i] if e in stages.edits]
            some_q, some_k, mask = q, k, pair
            if heads is not None and not edits:
                # Without edits only the chosen heads need to be computed.
                index = torch.as_tensor(list(heads), device=q.device)
                some_q = q.index_select(1, index)
                some_k = k.index_select(1, index // (q.shape[1] // k.shape[1]))
                pick = [None if t is None else t if t.shape[1] == 1 else t[:, index] for t in (pair.allowed, pair.bias)]
                mask = replace(pair, allowed=pick[0], bias=pick[1])
            for block in row_blocks(rows, some_q.shape[0] * some_q.shape[1] * k.shape[2]):
                weights, _, allowed = weight_rows(site, some_q, some_k, block, mask, edits)
                if heads is not None and edits:
                    weights = weights[:, list(heads)]
                    allowed = allowed if allowed is None or allowed.shape[1] == 1 else allowed[:, list(heads)]
                probe.observe(site, weights, block, allowed)


def realise_mask(site: Site, mask: Mask | Tensor) -> Tensor:
    """A replacing mask as a boolean tensor broadcastable to (B, H, N, M)."""
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True: may attend), got {mask.dtype}")
        return mask if mask.dim() == 4 else mask[None, None] if mask.dim() == 2 else mask[:, None]
    if site.q_pos is None or site.k_pos is None:
        raise ValueError(f"layer {site.layer} ({site.name}): positions are not known; give the mask as a tensor")
    k_pos = site.k_pos
    if k_pos.dim() == 3:
        k_pos = k_pos.repeat_interleave(site.heads // site.kv_heads, 1)
    allowed = mask.at(site.q_pos.to(k_pos.device), k_pos)
    allowed = allowed if allowed.dim() == 4 else allowed[None, None]
    return allowed if k_pos.dim() == 1 else allowed & (k_pos >= 0)[:, :, None]


def _full(allowed: Tensor, n: int, m: int) -> Tensor:
    """A mask with all its rows and columns, whatever it left to broadcasting."""
    return allowed.expand(*torch.broadcast_shapes(allowed.shape, (1, 1, n, m)))


def run_attention(
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stages: Stages,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    masked: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """One attention call through the stages of a layer.

    Args:
        site: where, with this call's mask.
        q: (B, H, N, D).
        k: (B, Hk, M, D), as read.
        v: (B, Hk, M, Dv).
        stages: the interventions of this layer.
        kernel: the model's own attention under its own mask, (q, k, v) -> (B, H, N, Dv).
        masked: the model's own attention under a boolean mask (B or 1, H or 1, N, M) that is given; softmax attention
            by default.

    Returns:
        (B, H, N, Dv) before the output projection.
    """
    assert site.mask is not None
    given = site.mask
    for i in stages["on_kv_read"]:
        k, v = i.on_kv_read(site, k, v)

    def innermost(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        if k.shape[2] != v.shape[2] or (mask is None and k.shape[2] != given.n_keys):
            raise ValueError(
                f"layer {site.layer} ({site.name}): keys and values have lengths {k.shape[2]} and {v.shape[2]}, the "
                f"model's mask is for {given.n_keys}; give call(q, k, v, mask=...) when you change their number"
            )
        if mask is None:
            pair = given
            out = kernel(q, k, v)
        else:
            full = _full(realise_mask(site, mask), q.shape[2], k.shape[2])
            pair = PairMask(q.shape[2], k.shape[2], full)
            out = attention(q, k, v, mask=full, scale=site.scale) if masked is None else masked(q, k, v, full)
        if stages.edits:
            out = _apply_edits(site, q, k, v, pair, out, stages.edits)
        if stages.probes:
            _run_probes(site, q, k, pair, stages)
        return out

    call: Callable[..., Tensor] = innermost
    for i in reversed(stages["around_attention"]):
        call = _wrap(i, site, call)
    out = call(q, k, v)
    for i in stages["on_output"]:
        out = i.on_output(site, out)
    return out


def _wrap(intervention: Intervention, site: Site, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None) -> Tensor:
        if mask is None:
            return intervention.around_attention(site, q, k, v, inner)

        def masked(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor = mask) -> Tensor:
            return inner(q, k, v, mask=mask)

        # The mask that was put in its place is the model's for those further in.
        here = site
        if q.shape[2] == site.n_queries and k.shape[2] == site.n_keys:
            n, m = site.n_queries, site.n_keys
            here = site.but(mask=PairMask(n, m, _full(realise_mask(site, mask), n, m)))
        return intervention.around_attention(here, q, k, v, masked)

    return wrapped
