"""One attention call through its stages, whatever model it belongs to.

The model's own kernel keeps running: score and weight edits are computed beside it, a block of query rows at a time,
and only rows that an edit really changed replace the kernel's. An edit that changes nothing therefore gives the
untouched output, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ..masks import Mask
from ..normalizers import softmax_rows
from ..ops import attention
from ..types import exactly, stats_dtype
from .intervention import Intervention, Probe, Stages, implements
from .site import PairMask, Site

#: Whether the kernel itself computed one attention call, and a function that gives the weights (B, H, N, M) used there
#: and which rows (B, H, N) an edit changed.
WholeMap = tuple[bool, Callable[[], tuple[Tensor, Tensor | None]]]

#: Elements of the weight map that score edits, weight edits and probes hold at a time.
BLOCK_ELEMENTS = 1 << 22


def _grouped(a: Tensor, heads: int) -> Tensor:
    """(B, H, r, D) -> (B, heads, H / heads * r, D), so that grouped queries need no copies of keys."""
    return a.reshape(a.shape[0], heads, a.shape[1] // heads * a.shape[2], a.shape[-1])


def score_rows(site: Site, q: Tensor, k: Tensor, rows: Tensor, pair: PairMask) -> tuple[Tensor, Tensor | None]:
    """The model's own scores (B, H, r, M) of some query rows, and which pairs may meet.

    Scale, cap and bias are in them; ``-inf`` stands where a pair may not meet. :func:`weights_of` turns them into
    weights.

    Raises:
        ValueError: a layer whose kernel does something to its scores that is not known.
    """
    weighting, dtype = site.weighting, stats_dtype(q.dtype)
    if weighting.opaque:
        raise ValueError(f"layer {site.layer} ({site.name}): {weighting.opaque}")
    allowed, bias = pair.rows(rows)
    with exactly(q):
        some = _grouped(q.index_select(2, rows).to(dtype), k.shape[1])
        scores = (some @ k.to(dtype).transpose(-2, -1)).reshape(q.shape[0], q.shape[1], len(rows), k.shape[2])
        scores = scores.mul_(site.scale)  # nobody else holds them, and new memory costs more than the product
        if weighting.cap is not None:
            scores = torch.tanh(scores / weighting.cap) * weighting.cap
        if bias is not None:
            scores = scores + bias.to(dtype)
    return (scores if allowed is None else scores.masked_fill_(~allowed, float("-inf"))), allowed


def weights_of(site: Site, scores: Tensor, rows: Tensor) -> Tensor:
    """The model's own weights (B, H, r, M) from scores of the query rows ``rows`` (r,).

    Rows sum to one, to less where heads have sinks, to zero where nothing may be read.
    """
    sinks = site.weighting.sink_rows(rows)
    if sinks is None:
        return softmax_rows(scores)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return softmax_rows(torch.cat([scores, column], -1))[..., :-1]


def mix_rows(weights: Tensor, v: Tensor) -> Tensor:
    """(B, H, r, Dv): weights (B, H, r, M) times values (B, Hv, M, Dv); keys without weight may hold anything."""
    read = (weights != 0).any(2).unflatten(1, (v.shape[1], -1)).any(2)
    v = v.masked_fill(~read.unsqueeze(-1), 0.0)
    with exactly(v):
        out = _grouped(weights, v.shape[1]) @ v.to(weights.dtype)
    return out.reshape(*weights.shape[:-1], v.shape[-1])


def row_blocks(rows: Tensor, per_row: int, whole: bool = False) -> Iterator[Tensor]:
    """Split query rows so that a block's map stays within :data:`BLOCK_ELEMENTS`."""
    yield from rows.split(max(1, len(rows) if whole else BLOCK_ELEMENTS // max(1, per_row)))


def _edited(edit: Intervention, stage: str, site: Site, before: Tensor, rows: Tensor) -> Tensor:
    version = None if before.is_inference() else before._version
    after = getattr(edit, stage)(site, before, rows)
    if version is not None and before._version != version:
        raise ValueError(f"{type(edit).__name__}.{stage} wrote into its input; return a new tensor instead")
    if after.shape != before.shape:
        raise ValueError(
            f"{type(edit).__name__}.{stage} returned shape {tuple(after.shape)}, it was given {tuple(before.shape)}"
        )
    return after


def _changed_rows(before: Tensor, after: Tensor) -> Tensor:
    """(B, H, r) boolean: rows that an edit changed; all of them where it is learned, whatever it makes of them yet."""
    if _learned(before, after):
        return torch.ones(after.shape[:-1], dtype=torch.bool, device=after.device)
    return (after != before).any(-1)


def _learned(before: Tensor, after: Tensor) -> bool:
    """Whether gradients of an edit's result go to something else than through what it was given."""
    if not after.requires_grad or after is before:
        return False
    if not before.requires_grad:
        return True
    seen = {None, before.grad_fn}
    waiting = [after.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if hasattr(node, "variable"):  # a leaf
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]  # type: ignore[union-attr]
    return False


def weight_rows(
    site: Site, q: Tensor, k: Tensor, rows: Tensor, pair: PairMask, edits: Sequence[Intervention]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights of some query rows after ``edits``: ``(weights (B, H, r, M), changed (B, H, r) or None, allowed)``."""
    plain, allowed = score_rows(site, q, k, rows, pair)
    scores = plain
    for edit in edits:
        if implements(edit, "on_scores"):
            scores = _edited(edit, "on_scores", site, scores, rows)
    changed = None if scores is plain else _changed_rows(plain, scores)
    before = weights = weights_of(site, scores, rows)
    for edit in edits:
        if implements(edit, "on_weights"):
            weights = _edited(edit, "on_weights", site, weights, rows)
    if weights is not before:
        differ = _changed_rows(before, weights)
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
    for i, probe in enumerate(stages.all):
        if not isinstance(probe, Probe):
            continue
        with nullcontext() if probe.differentiable else torch.no_grad():
            wanted = probe.probe(site)
            if wanted is None:
                continue
            rows, heads = wanted
            edits = [e for e in stages.all[:i] if e in stages.edits]
            some_q, some_k, mask, here = q, k, pair, site
            if heads is not None and not edits:
                # Without edits only the chosen heads need to be computed.
                index = torch.as_tensor(list(heads), device=q.device)
                some_q = q.index_select(1, index)
                some_k = k.index_select(1, index // (q.shape[1] // k.shape[1]))
                pick = [None if t is None else t if t.shape[1] == 1 else t[:, index] for t in (pair.allowed, pair.bias)]
                mask = replace(pair, allowed=pick[0], bias=pick[1])
                here = site.but(weighting=site.weighting.of_heads(index))
            for block in row_blocks(rows, some_q.shape[0] * some_q.shape[1] * k.shape[2]):
                weights, _, allowed = weight_rows(here, some_q, some_k, block, mask, edits)
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


#: How far an output may be from that of the weights computed beside it, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def verify(site: Site, q: Tensor, k: Tensor, v: Tensor, pair: PairMask, out: Tensor) -> bool:
    """Whether a kernel's output (B, H, N, Dv) is that of the weights computed beside it; some rows are compared.

    Returns:
        ``False`` when nothing could be compared.

    Raises:
        ValueError: the kernel computes something else.
    """
    if torch.compiler.is_compiling() or not out.numel():
        return False
    with torch.no_grad():
        n = q.shape[2]
        rows = torch.tensor(sorted({n // 2, n - 1}), device=q.device)
        q, k, v = q.detach(), k.detach(), v.detach()
        scores, _ = score_rows(site, q, k, rows, pair)
        own = mix_rows(weights_of(site, scores, rows), v)
        kernel = out.detach().index_select(2, rows).to(own.dtype)
        if kernel.shape != own.shape:
            raise ValueError(
                f"layer {site.layer} ({site.name}): its kernel gives {tuple(kernel.shape)}, weights times values "
                f"{tuple(own.shape)}; its weights cannot be computed beside it"
            )
        # Kernels differ in what a row gives that may read nothing.
        compared = (scores > float("-inf")).any(-1) & own.isfinite().all(-1) & kernel.isfinite().all(-1)
        if not bool(compared.any()):
            return False
        size = v.abs().nan_to_num(0.0, 0.0, 0.0).amax().to(own.dtype)
        apart = float((own - kernel).abs().amax(-1)[compared].amax() / size.clamp(min=1e-30))
        limit = _TOLERANCE.get(out.dtype, 5e-2)
        if out.is_cuda and out.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            limit = 1e-2
        if apart > limit:
            raise ValueError(
                f"layer {site.layer} ({site.name}): its kernel does not compute softmax(scale * q k + bias) v as far "
                f"as that is known here (outputs are {apart:.1e} of the largest value apart), so its weights cannot be "
                "computed beside it: scores, weights and probes are not served there, nor are masks in place of its own"
            )
    return True


def _by_weights(site: Site, q: Tensor, k: Tensor, v: Tensor, pair: PairMask) -> Tensor:
    """The model's own attention under another mask, from its weights, in blocks of rows."""
    if site.weighting.plain:
        bias = pair.bias if pair.bias is None else pair.bias.to(q.dtype)
        return attention(q, k, v, mask=pair.allowed, bias=bias, scale=site.scale)
    pieces = []
    for block in row_blocks(torch.arange(q.shape[2], device=q.device), q.shape[0] * q.shape[1] * k.shape[2]):
        scores, _ = score_rows(site, q, k, block, pair)
        pieces.append(mix_rows(weights_of(site, scores, block), v).to(q.dtype))
    return torch.cat(pieces, 2)


def run_attention(
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stages: Stages,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    masked: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None,
    random: bool = False,
    maps: list[WholeMap] | None = None,
    resizes: bool = False,
) -> Tensor:
    """One attention call through the stages of a layer.

    The first time somebody computes weights beside a kernel, or puts a mask in place of the model's, some rows of the
    kernel's output are compared with those of the weights (:func:`verify`): a kernel that does more than is known is
    refused, whoever asks.

    Args:
        site: where, with this call's mask.
        q: (B, H, N, D).
        k: (B, Hk, M, D), as read.
        v: (B, Hk, M, Dv).
        stages: the interventions of this layer.
        kernel: the model's own attention under its own mask, (q, k, v) -> (B, H, N, Dv).
        masked: the model's own attention under a boolean mask (B or 1, H or 1, N, M) that is given, and a bias in place
            of its own or ``None``; computed from its weights by default.
        random: attention dropout is active, so that the kernel's output cannot be compared.
        maps: gets an entry for each time the rest is called; see :func:`only_map`.
        resizes: ``kernel`` takes any number of keys and queries where the model lets every pair meet.

    Returns:
        (B, H, N, Dv) before the output projection.
    """
    assert site.mask is not None
    given = site.mask
    if not q.shape[0] * q.shape[2]:
        return kernel(q, k, v)  # no query, nothing to act on
    for i in stages["on_kv_read"]:
        k, v = i.on_kv_read(site, k, v)
    untouched = q, k, v

    def innermost(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        if m != v.shape[2] or (mask is None and m != given.n_keys and not (given.free and resizes)):
            raise ValueError(
                f"layer {site.layer} ({site.name}): keys and values have lengths {m} and {v.shape[2]}, the "
                f"model's mask is for {given.n_keys}; give call(q, k, v, mask=...) when you change their number"
            )
        pair = given
        if mask is None and bias is None:
            out = kernel(q, k, v)
            if resizes and given.free and (n, m) != (given.n_queries, given.n_keys):
                pair = PairMask(n, m)
            if stages.reads_map and not stages.verified and not random:
                stages.verified = verify(site, q, k, v, pair, out)
        else:
            pair = _replaced(site, n, m, mask, bias)
            if masked is not None:
                out = masked(q, k, v, pair.dense(q.device), bias)
            else:
                if not stages.verified and not random:
                    with torch.no_grad():  # nothing is saved that a second run, of checkpointing, would not save
                        stages.verified = verify(site, *untouched, given, kernel(*untouched))
                out = _by_weights(site, q, k, v, pair)
        if stages.edits:
            out = _apply_edits(site, q, k, v, pair, out, stages.edits)
        if stages.probes:
            _run_probes(site, q, k, pair, stages)
        if maps is not None:
            by_kernel = pair is given or masked is not None
            maps.append((by_kernel, functools.partial(_whole_map, site, q, k, pair, stages.edits)))
        return out

    call: Callable[..., Tensor] = innermost
    for i in reversed(stages["around_attention"]):
        call = _wrap(i, site, call)
    out = call(q, k, v)
    for i in stages["on_output"]:
        out = i.on_output(site, out)
    return out


def _whole_map(
    site: Site, q: Tensor, k: Tensor, pair: PairMask, edits: Sequence[Intervention]
) -> tuple[Tensor, Tensor | None]:
    rows = torch.arange(q.shape[2], device=q.device)
    weights, changed, _ = weight_rows(site, q, k, rows, pair, edits)
    return weights.to(q.dtype), changed


def only_map(site: Site, maps: Sequence[WholeMap], stages: Stages, own: Sequence[Tensor | None] = ()) -> Tensor:
    """The weights (B, H, N, M) that a call of a layer used, for a model that gives them back.

    What an intervention makes of the output afterwards is not in them.

    Args:
        site: where.
        maps: from :func:`run_attention`.
        stages: the interventions of this layer.
        own: the maps that the kernel gave, if it gives any; rows that no edit changed are theirs.

    Raises:
        ValueError: attention was computed several times, or not at all, so that there is no one map.
    """
    if len(maps) != 1:
        who = ", ".join(type(i).__name__ for i in (*stages["around_attention"], *stages["around_sublayer"]))
        raise ValueError(
            f"layer {site.layer} ({site.name}): the model is asked for attention weights, but {who} computes attention "
            f"{len(maps)} times there, so that no one map is the one used; do not ask for it (output_attentions, "
            "need_weights, return_weights)"
        )
    by_kernel, compute = maps[0]
    kernel = own[-1] if own and by_kernel else None
    if kernel is not None and not stages.edits:
        return kernel
    weights, changed = compute()
    if kernel is None:
        return weights
    return kernel if changed is None else torch.where(changed.unsqueeze(-1), weights.to(kernel.dtype), kernel)


def _replaced(site: Site, n: int, m: int, mask: Mask | Tensor | None, bias: Tensor | None) -> PairMask:
    """The model's mask with another one, or another bias, in its place; what is not replaced stays."""
    given = site.mask
    assert given is not None
    same = (n, m) == (given.n_queries, given.n_keys)
    allowed: Tensor | None = None
    if mask is None and given.free:  # a bias alone makes no mask
        pass
    elif mask is None:
        allowed = given.dense(None if site.k_pos is None else site.k_pos.device)
    else:
        allowed = realise_mask(site, mask)
    if bias is None and given.bias is not None:
        if not same:
            raise ValueError(
                f"layer {site.layer} ({site.name}): the model adds a bias to the scores of {given.n_queries} queries "
                f"and {given.n_keys} keys, and there are {n} and {m}; give call(q, k, v, mask=..., bias=...)"
            )
        bias = given.bias
    if bias is not None:
        if bias.dim() != 4 or bias.shape[2] not in (1, n) or bias.shape[3] not in (1, m):
            raise ValueError(
                f"layer {site.layer} ({site.name}): bias must be broadcastable to (B, H, {n}, {m}), got "
                f"{tuple(bias.shape)}"
            )
        bias = _full(bias, n, m)
    return PairMask(n, m, None if allowed is None else _full(allowed, n, m), bias)


def _wrap(intervention: Intervention, site: Site, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        if mask is None and bias is None:
            return intervention.around_attention(site, q, k, v, inner)

        def masked(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            mask: Mask | Tensor | None = mask,
            bias: Tensor | None = bias,
        ) -> Tensor:
            return inner(q, k, v, mask=mask, bias=bias)

        # The mask that was put in its place is the model's for those further in.
        here = site
        if q.shape[2] == site.n_queries and k.shape[2] == site.n_keys:
            here = site.but(mask=_replaced(site, site.n_queries, site.n_keys, mask, bias))
        return intervention.around_attention(here, q, k, v, masked)

    return wrapped
