"""Documents packed into the rows of a batch, for layers that take one document per sample.

What says where documents begin, in the forms that collators and attention kernels use, becomes one :class:`Packing`. It
takes a row apart into a batch of documents and puts the answers back, so that whatever a layer keeps from token to
token (keys, a convolution's tail, a matrix, a metric) begins anew with every document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_type

#: Arguments of a decoder that say where documents begin.
ARGUMENTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class Packing:
    """Where every document of a batch lies.

    Args:
        exists: (B, N) boolean, which tokens exist.
        starts: (B, N) boolean, first tokens of documents.

    >>> packing = Packing(torch.ones(1, 5, dtype=torch.bool), torch.tensor([[True, False, True, False, False]]))
    >>> packing.each(torch.ones(1, 5, 1), lambda x, valid: x.cumsum(1), "whole").flatten().tolist()
    [1.0, 2.0, 1.0, 2.0, 3.0]
    """

    def __init__(self, exists: Tensor, starts: Tensor):
        self.exists, self.starts = exists, starts
        tokens = exists.flatten().nonzero().squeeze(1)
        lengths = torch.bincount(starts.flatten()[tokens].cumsum(0) - 1)
        first = lengths.cumsum(0) - lengths

        def piece(documents: Tensor, late: bool = False) -> tuple[Tensor, Tensor]:
            own = lengths[documents, None]
            step = torch.arange(int(own.max()), device=lengths.device) - (own.max() - own if late else 0)
            valid = (step >= 0) & (step < own)
            return tokens[torch.where(valid, first[documents, None] + step, 0)], valid

        everything = torch.arange(len(lengths), device=lengths.device)
        size = torch.log2(lengths.double()).floor()
        self._pieces = {
            "whole": lambda: [piece(everything)],
            "late": lambda: [piece(everything, late=True)],
            "alike": lambda: [piece(everything[size == each]) for each in size.unique()],
            "exact": lambda: [piece(everything[lengths == each]) for each in lengths.unique()],
        }
        self._made: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def each(self, x: Tensor, call: Callable[[Tensor, Tensor | None], Tensor], how: str = "alike") -> Tensor:
        """Answers on documents instead of on rows.

        Args:
            x: (B, N, C).
            call: from documents as samples (D', L, C) and which of their tokens exist (``None``: all), to (D', L, C').
            how: ``"alike"``: a call for those of like length, padded at the end to no more than twice their own;
                ``"exact"``: of equal length; ``"whole"``: one call for all, row by row; ``"late"``: the same, padded at
                the front, so that all end together and can be continued.

        Returns:
            (B, N, C'); zeros for tokens that do not exist.
        """
        flat, places, values = x.flatten(0, 1), [], []
        if how not in self._made:
            self._made[how] = self._pieces[how]()
        for slots, valid in self._made[how]:
            full = bool(valid.all())
            tokens = flat[slots] if full else flat[slots].masked_fill(~valid.unsqueeze(-1), 0.0)
            y = call(tokens, None if full else valid)
            places.append(slots[valid])
            values.append(y[valid])
        made = torch.cat(values)
        out = made.new_zeros(len(flat), made.shape[-1]).index_copy(0, torch.cat(places), made)
        return out.view(*x.shape[:2], -1)


@torch.compiler.disable
def rows_alone(exists: Tensor) -> Packing:
    """Every row (B, N) as one document of the tokens that exist, for what padding would change."""
    return Packing(exists, exists & (exists.long().cumsum(1) == 1))


def _runs(label: Tensor, exists: Tensor) -> Tensor:
    """(B, N) where the label of a token that exists differs from that of the one before it; the first ones, too."""
    at = torch.arange(label.shape[1], device=label.device)
    last = torch.where(exists, at, -1).cummax(1).values  # the last token that exists, this one included
    before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)
    same = label.gather(1, before.clamp(min=0)) == label
    return exists & ((before < 0) | ~same)


def _rows(name: str, value: Any, batch: int, n: int) -> Tensor:
    """An integer tensor (N,), (1, N) or (B, N) as (B, N)."""
    check_type(name, value, Tensor)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    if tuple(value.shape) not in ((n,), (1, n), (batch, n)):
        raise ValueError(f"{name} must be (B, N)={(batch, n)}, (1, N) or (N,), got {tuple(value.shape)}")
    return value.expand(batch, n)


def _by_position(position_ids: Tensor, exists: Tensor, past: Tensor) -> Tensor:
    """First tokens of documents by positions, which count the tokens of a document from 0."""
    counted = position_ids - exists.long().cumsum(1)  # constant inside a document
    starts = _runs(counted, exists)
    first = starts & (exists.long().cumsum(1) == 1)
    wrong = starts & (position_ids != torch.where(first, past[:, None], 0))
    if bool(wrong.any()):
        row, at = (int(i) for i in wrong.nonzero()[0])
        expected = int(past[row]) if bool(first[row, at]) else 0
        raise ValueError(
            f"position_ids of row {row} begin or jump at token {at} with {int(position_ids[row, at])}; possible: the "
            f"next position, or {expected} where a document begins (mechanisms count the tokens that exist themselves)"
        )
    return starts


def _by_lengths(name: str, cu: Any, batch: int, n: int, longest: Any, exists: Tensor) -> Tensor:
    """First tokens of documents by cumulative lengths over the whole batch."""
    check_type(name, cu, Tensor)
    if cu.dim() != 1 or cu.is_floating_point() or len(cu) < 2:
        raise ValueError(f"{name} must hold D + 1 integers, got {cu.dtype} of shape {tuple(cu.shape)}")
    cu = cu.to(exists.device).long()
    lengths = cu.diff()
    if int(cu[0]) != 0 or int(cu[-1]) != batch * n or bool((lengths < 0).any()):
        raise ValueError(
            f"{name} must rise from 0 to the {batch * n} tokens of the batch, got {cu.tolist()[:8]}"
            f"{'...' if len(cu) > 8 else ''}"
        )
    if longest is not None and int(longest) < int(lengths.max()):
        raise ValueError(
            f"max_length{name.removeprefix('cu_seq_lens')}={int(longest)} is less than the {int(lengths.max())} tokens "
            f"of the longest document in {name}"
        )
    label = torch.searchsorted(cu, torch.arange(batch * n, device=cu.device), right=True).view(batch, n)
    if batch > 1 and n and bool((label[1:, 0] == label[:-1, -1]).any()):
        raise ValueError(f"{name} has a document that runs over the end of a row; each must lie in one row")
    return _runs(label, exists)


def _by_pairs(mask: Tensor, batch: int, n: int) -> tuple[Tensor, Tensor]:
    """Which tokens exist and begin documents, by a map of the pairs that may meet."""
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (n, n):
        raise ValueError(
            f"attention_mask of pairs must be (B, 1, N, N)={(batch, 1, n, n)}, without a cache, got {tuple(mask.shape)}"
        )
    if mask.is_floating_point():
        allowed = mask == 0
        if bool((~allowed & (mask > -1e4)).any()):
            raise ValueError(
                "attention_mask of pairs, when it is added to scores, must be 0 where they meet and -1e4 or less where "
                "they do not; a bias is not possible: mechanisms make their own"
            )
    else:
        allowed = mask != 0
    allowed = allowed[:, 0].expand(batch, n, n)
    exists = allowed.diagonal(dim1=1, dim2=2)
    at = torch.arange(n, device=mask.device)
    last = torch.where(exists, at, -1).cummax(1).values
    before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)
    sees = allowed.gather(2, before.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    starts = exists & ((before < 0) | ~sees)
    document = starts.long().cumsum(1)
    wanted = (document[:, :, None] == document[:, None]) & (at[:, None] >= at) & exists[:, None] & exists[:, :, None]
    wrong = exists[:, :, None] & (allowed != wanted)
    if bool(wrong.any()):
        row, query, key = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"attention_mask of pairs must be causal inside documents and empty between them: in row {row}, token "
            f"{query} {'may' if bool(allowed[row, query, key]) else 'may not'} read token {key}; other masks are not "
            "possible in this decoder"
        )
    return exists, starts


def _numbered(mask: Tensor, batch: int, n: int) -> Tensor:
    """The last N columns of a mask (B, M), whose nonzero entries may number documents."""
    if mask.shape[0] != batch or mask.shape[1] < n:
        raise ValueError(
            f"attention_mask must be (B, M)={(batch, f'{n} or more')}, nonzero for tokens that exist, or (B, 1, N, N), "
            f"got {tuple(mask.shape)}"
        )
    mask = mask[:, mask.shape[1] - n :]
    if not torch.compiler.is_compiling() and mask.dtype != torch.bool and mask.numel():
        if bool((mask < 0).any()) or bool((mask != mask.round() if mask.is_floating_point() else mask < 0).any()):
            raise ValueError(
                f"attention_mask (B, M) must hold 0 for tokens that do not exist and 1 (or the number of its document) "
                f"for those that do, got {float(mask.min()):g} to {float(mask.max()):g}; what is added to scores is "
                "(B, 1, N, N)"
            )
    return mask


def exists_by(mask: Tensor, batch: int, n: int) -> Tensor:
    """(B, N) which tokens exist by a mask (B, M), as it is taken while a compiler traces: without reading it."""
    return _numbered(mask, batch, n) != 0


@torch.compiler.disable
def read_documents(
    attention_mask: Tensor | None, batch: int, n: int, past: Tensor, seen: int, given: dict[str, Any]
) -> tuple[Tensor | None, Packing | None]:
    """Which tokens exist (B, N), ``None`` for all, and the documents, ``None`` when every row is one.

    Args:
        attention_mask: (B, M) nonzero for tokens that exist, or their document's number; (B, 1, N, N) pairs that meet.
        batch, n: of the new tokens.
        past: (B,) tokens that existed before them.
        seen: slots before them.
        given: of :data:`ARGUMENTS`, those that were given.

    Raises:
        ValueError: what does not say documents that are causal inside and apart from each other, or says two things.
    """
    device = past.device
    exists = torch.ones(batch, n, dtype=torch.bool, device=device)
    found: dict[str, Tensor] = {}
    if attention_mask is not None:
        check_type("attention_mask", attention_mask, Tensor)
        mask = attention_mask.to(device)
        if mask.dim() == 4:
            if seen:
                raise ValueError("attention_mask of pairs (B, 1, N, N) cannot go with a cache; give (B, M)")
            exists, found["attention_mask"] = _by_pairs(mask, batch, n)
        elif mask.dim() == 2:
            mask = _numbered(mask, batch, n)
            exists = mask != 0
            if mask.dtype != torch.bool and bool((mask > 1).any()):
                found["attention_mask"] = starts = _runs(mask, exists)
                runs = starts.sum(1)
                for row in range(batch):
                    if int(runs[row]) != len(mask[row][exists[row]].unique()):
                        raise ValueError(f"attention_mask numbers documents, but one of row {row} is torn apart")
        else:
            raise ValueError(
                f"attention_mask must be (B, M), nonzero for tokens that exist, or (B, 1, N, N), got "
                f"{tuple(mask.shape)}"
            )
    if "position_ids" in given:
        positions = _rows("position_ids", given["position_ids"], batch, n).to(device).long()
        found["position_ids"] = _by_position(positions, exists, past)
    if "seq_idx" in given:
        found["seq_idx"] = _runs(_rows("seq_idx", given["seq_idx"], batch, n).to(device), exists)
    for side in ("q", "k"):
        name, longest = f"cu_seq_lens_{side}", given.get(f"max_length_{side}")
        if name in given:
            found[name] = _by_lengths(name, given[name], batch, n, longest, exists)
        elif longest is not None:
            raise ValueError(f"max_length_{side} was given without {name}, whose longest document it is")
    names = list(found)
    for name in names[1:]:
        if not torch.equal(found[name], found[names[0]]):
            raise ValueError(f"{names[0]} and {name} name different documents; give one of them, or let them agree")
    valid = None if bool(exists.all()) else exists
    if not names or not bool((found[names[0]].sum(1) > 1).any()):
        return valid, None
    if seen:
        raise ValueError(f"{names[0]} begins a document, but a cache goes on with the one that each sample holds")
    return valid, Packing(exists, found[names[0]])
