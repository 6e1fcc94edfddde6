"""Statistics of attention over as many calls as there are, in memory that does not grow with them.

For a head with weights ``A`` (a row per query, rows that may read nothing left out):

- entropy of a row, ``H_i = -sum_j A_ij ln A_ij``, and its share of the largest possible, ``H_i / ln(visible keys)``;
- attended distance ``sum_j A_ij |i - j|`` along the sequence, and on a grid of image tokens the Euclidean distance in
  tokens between an image query and the image keys, weighted by the weights on those (renormalised);
- mass: the weight that queries of one token type give to keys of another;
- sink score: the mean weight that the first token gets from the queries that may read it, and the share of samples and
  heads where it exceeds a threshold;
- effective rank ``exp(H(sigma / sum sigma))`` of the map's singular values. Beyond ``sketch`` keys it is that of
  ``A Omega`` with a fixed Gaussian ``Omega`` of ``sketch`` columns: never larger than ``sketch``, close where the true
  rank is small beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_int, check_ints, check_real, shaped
from ..grids import Layout, coordinates
from ..hooks.attach import attach
from ..hooks.probes import Record, _Layer, counted, sink_rate
from ..hooks.site import Site
from ..hooks.tokens import IMAGE, NAMES, PAD
from ..types import check_choice

#: What :class:`Statistics` can keep.
WHAT = ("entropy", "distance", "mass", "sink", "rank")


@shaped(a="float (..., N, M)")
def effective_rank(a: Tensor) -> Tensor:
    """Effective rank of matrices: the exponential of the entropy of their normalised singular values.

    Args:
        a: (..., N, M).

    Returns:
        (...) between 1 and min(N, M); 0 for a matrix of zeros.

    Reference: Roy and Vetterli, 2007, "The effective rank: a measure of effective dimensionality".

    >>> effective_rank(torch.eye(3)).item()
    3.0
    """
    return _rank_of_values(torch.linalg.svdvals(a.double())).to(a.dtype)


@shaped(a="float (..., N, M)")
def mutual_information(a: Tensor) -> Tensor:
    """Normalised mutual information of queries and keys: 1 where each query reads a key of its own, 0 where all read
    alike.

    With queries equally likely, ``p(q, k) = A_qk / N`` and ``p(k) = mean_q A_qk``:
    ``NMI = I(q; k) / sqrt(H(q) H(k))``, ``I = H(k) - mean_q H(A_q)``, ``H(q) = ln N``. One query, or one key that has
    all weight, tells nothing: 0.

    Args:
        a: (..., N, M) weights whose rows sum to 1.

    Returns:
        (...) in [0, 1].

    Reference: Park et al., 2023, arXiv 2305.00729; Zhang et al., 2025, "UNIP", arXiv 2502.02257.

    >>> mutual_information(torch.eye(3)).item(), mutual_information(torch.full((2, 3), 1 / 3)).item()
    (1.0, 0.0)
    """
    wide = a.to(torch.float64)
    return _information(wide.mean(-2), torch.special.entr(wide).sum(-1).mean(-1), a.shape[-2]).to(a.dtype)


def _information(key: Tensor, conditional: Tensor, queries: int) -> Tensor:
    """Of the keys' distribution (..., M) and the mean entropy of a row (...)."""
    entropy = torch.special.entr(key).sum(-1)
    norm = (entropy * math.log(max(queries, 1))).clamp_min(0).sqrt()
    told = (entropy - conditional) / torch.where(norm > 1e-12, norm, torch.ones_like(norm))
    return torch.where(norm > 1e-12, told.clamp(0, 1), torch.zeros_like(told))


def information_by_layer(model: nn.Module, batches: Iterable[Tensor]) -> dict[int | str, float]:
    """:func:`mutual_information` of every layer's maps, all tokens counted, averaged over heads and samples.

    Maps are not kept: rows are read in blocks beside the model's kernel.

    Args:
        model: any that :func:`attnlib.hooks.attach` knows; called as it is.
        batches: what it is called with, each the same number of tokens throughout the model.

    Raises:
        ValueError: no batch.
    """
    record = Record(rows="all", what=("entropy", "received"))
    sums: dict[int | str, float] = {}
    count = 0
    with attach(model, record), torch.no_grad():
        for batch in batches:
            record.reset()
            model(batch)
            count += len(batch)
            for layer, held in record.results().items():
                entropies = torch.cat(held["entropy"], 0).double()
                queries = entropies.shape[-1]
                found = _information(held["received"].double() / queries, entropies.mean(-1), queries)
                sums[layer] = sums.get(layer, 0.0) + float(found.mean(1).sum())
    if not count:
        raise ValueError("batches holds none; information needs at least one")
    return {layer: total / count for layer, total in sums.items()}


def hybrid_layer(information: Mapping[int | str, float], target: float) -> int | str:
    """The layer whose normalised mutual information is nearest to a target: neither local nor global (UNIP).

    Args:
        information: as :func:`information_by_layer` gives it.
        target: in [0, 1]; the authors' code chooses layers by hand, and no value of theirs could be verified.

    >>> hybrid_layer({0: 0.4, 1: 0.15, 2: 0.02}, target=0.1)
    1
    """
    check_real("target", target, least=0, most=1)
    if not information:
        raise ValueError("information is empty; information_by_layer() gives it")
    return min(information, key=lambda layer: abs(information[layer] - target))


def _rank_of_values(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    rank = torch.special.entr(values / total.clamp_min(torch.finfo(values.dtype).tiny)).sum(-1).exp()
    return torch.where(total[..., 0] > 0, rank, torch.zeros_like(rank))


class _Sums:
    """Running sums of one layer; each is (h,) or (h, ...), over samples, rows and calls."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.gram: Tensor | None = None  # (B, h, s, s) of the call that is running

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double().cpu()
        self.sums[name] = value if name not in self.sums else self.sums[name] + value

    def mean(self, name: str, count: str) -> Tensor:
        total = self.sums[count]
        value = self.sums[name]
        total = total.reshape((*total.shape, *[1] * (value.dim() - total.dim())))
        return (value / total).float()  # 0 / 0 says that there was nothing: nan


class Statistics(Record):
    """Entropy, distance, mass by token type, sinks and effective rank per layer and head, summed while they pass.

    Nothing per row or per call is kept: memory depends on heads, token types and the longest sequence only, whatever
    the number of calls. For maps use :class:`attnlib.hooks.Record`.

    Args:
        layers: layers to look at; ``None`` for all.
        heads: heads to look at; ``None`` for all.
        rows: ``"last"`` query of each call, ``"all"``, or query numbers (negative from the end).
        what: any of ``"entropy"``, ``"distance"``, ``"mass"`` (needs token types), ``"sink"``, ``"rank"`` (needs rows
            ``"all"``; of calls with more than one query).
        phase: ``"prefill"`` or ``"decode"`` to look at only; ``None`` for both.
        grid: for distances on an image: its grid ``(rows, columns)``, the image tokens being known from
            ``attach(..., token_types=...)``; or a :class:`attnlib.Layout` of the sequence.
        epsilon: threshold of the sink rate.
        sketch: keys beyond which the effective rank is sketched.

    Results: ``{layer: {...}}`` with ``"rows"`` (h,) how many rows were read, ``"entropy"`` and ``"entropy_share"``
    (h,), ``"distance"`` and ``"grid_distance"`` (h,), ``"mass"`` (h, types, types) from queries to keys in the order of
    :data:`attnlib.hooks.tokens.NAMES`, ``"sink_score"`` (h,) and ``"sink_rate"`` of the first token, ``"rank"`` (h,).
    What never occurred is nan.

    Raises:
        ValueError: an unknown statistic, ``"rank"`` of chosen rows only, a threshold outside (0, 1).

    Reference: Roy and Vetterli, 2007 (effective rank); Gu et al., 2024, arXiv 2410.10781 (sink metric).

    >>> Statistics(what=("entropy", "rank")).what
    ('entropy', 'rank')
    """

    name: ClassVar[str] = "statistics"

    def __init__(
        self,
        layers: Sequence[int | str] | None = None,
        heads: Sequence[int] | None = None,
        rows: str | Sequence[int] = "all",
        what: Sequence[str] = ("entropy", "distance", "sink"),
        phase: str | None = None,
        grid: tuple[int, int] | Layout | None = None,
        epsilon: float = 0.3,
        sketch: int = 256,
    ):
        if isinstance(what, str):
            raise TypeError(f"what must be a sequence of names, got the string {what!r}; write what=({what!r},)")
        for name in what:
            check_choice("what", name, WHAT)
        if not what:
            raise ValueError(f"what is empty; choose from {list(WHAT)}")
        if sketch < 1:
            raise ValueError(f"sketch must be at least 1, got {sketch}")
        if "rank" in what and rows != "all":
            raise ValueError(f"the effective rank is that of a whole map: rows must be 'all', got {rows!r}")
        super().__init__(layers, heads, rows, ("sink",), phase, epsilon)
        if grid is not None and not isinstance(grid, Layout):
            if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
                raise ValueError(f"grid must be two positive numbers (rows, columns) or a Layout, got {grid!r}")
            grid = (grid[0], grid[1])
        self.what, self.grid, self.sketch = tuple(what), grid, sketch
        self.needs_types = "mass" in what or isinstance(grid, tuple)  # type: ignore[misc]
        self._sums: dict[int | str, _Sums] = {}

    def reset(self) -> None:
        super().reset()
        self._sums = {}

    # ---- looking

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        key = self._key(site)
        if site.phase != "decode" and (self.phase is None or self.phase == site.phase) and key in self._sums:
            self._close(self._sums[key], self._layers.get(key))
            self._layers.pop(key, None)
        wanted = super().probe(site)
        if wanted is not None:
            sums = self._sums.setdefault(key, _Sums())
            self._close_rank(sums)
            self._layers[key].entropies.clear()
        return wanted

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        key = self._key(site)
        sums = self._sums[key]
        weights, visible = counted(site, weights, rows, allowed)
        live = weights.sum(-1) > 0
        if site.q_types is not None:
            live = live & (site.q_types.to(rows.device)[:, rows] != PAD)[:, None]
        weights, visible = (t.masked_fill(~live.unsqueeze(-1), 0.0) for t in (weights, visible))
        sums.add("rows", live.sum((0, 2)))
        if "entropy" in self.what:
            entropy = torch.special.entr(weights).sum(-1)
            most = visible.sum(-1).log()
            choice = live & (most > 0)
            sums.add("entropy", entropy.sum((0, 2)))
            share = torch.where(choice, entropy / torch.where(choice, most, torch.ones_like(most)), 0.0)
            sums.add("entropy_share", share.sum((0, 2)))
            sums.add("choices", choice.sum((0, 2)))
        if "distance" in self.what:
            self._add_distances(sums, site, weights, rows)
        if "mass" in self.what:
            self._add_mass(sums, site, weights, rows, live)
        if "sink" in self.what:
            self._add(self._layers[key], site, weights.sum(2), visible.sum(2))
        if "rank" in self.what and site.n_queries > 1:
            self._add_gram(sums, weights)

    def _add_distances(self, sums: _Sums, site: Site, weights: Tensor, rows: Tensor) -> None:
        query, key = self._query_slots(site, rows).to(weights), self._key_slots(site).to(weights)
        apart = (query.unsqueeze(-1) - key.unsqueeze(-2)).abs()  # (B or 1, h or 1, r, M)
        sums.add("distance", (weights * apart).sum((0, 2, 3)))
        if self.grid is None:
            return
        q_place, k_place = self._places(site, rows)
        both = (q_place[..., 0] >= 0).unsqueeze(-1) & (k_place[..., 0] >= 0).unsqueeze(-2)
        both = both & (q_place[..., 0].unsqueeze(-1) == k_place[..., 0].unsqueeze(-2))  # of the same image
        steps = (q_place[..., None, 1:] - k_place[..., None, :, 1:]).to(weights.dtype)
        on_image = torch.where(both, weights, torch.zeros_like(weights))
        mass = on_image.sum(-1)
        seen = mass > 0
        mean = (on_image * steps.norm(dim=-1)).sum(-1) / torch.where(seen, mass, torch.ones_like(mass))
        sums.add("grid_distance", mean.sum((0, 2)))
        sums.add("grid_rows", seen.sum((0, 2)))

    def _places(self, site: Site, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(..., r, 3) and (..., M, 3): number of the image, row and column of queries and keys; -1 off the image."""
        if isinstance(self.grid, Layout):
            name = self.grid.grid_name()
            first, last = self.grid.span(name)
            table = torch.full((len(self.grid), 3), -1)
            table[first:last, 0] = 0
            table[first:last, 1:] = coordinates(self.grid.grid(name))
            slots = self._query_slots(site, rows), self._key_slots(site)
            return tuple(table.to(s.device)[s] for s in slots)  # type: ignore[return-value]
        assert self.grid is not None and site.q_types is not None
        types = site.key_types() if self.heads is None or site.k_types is None or site.k_types.dim() == 2 else None
        types = site.key_types()[:, self.heads] if types is None else types
        if site.k_pos is not None and site.k_pos.dim() > 1:
            raise ValueError(
                f"Statistics: layer {site.layer} ({site.name}) has an evicted cache, in which image tokens are no grid "
                "any more; leave grid out, or look at phase='prefill'"
            )
        size = self.grid[0] * self.grid[1]

        def place(is_image: Tensor) -> Tensor:
            number = torch.where(is_image, is_image.long().cumsum(-1) - 1, -1)
            held = is_image.sum(-1)
            if bool((held % size != 0).any()):
                raise ValueError(f"grid={self.grid} has {size} tokens, but samples have {held.flatten().tolist()}")
            inside = number % size
            spot = torch.stack([number // size, inside // self.grid[1], inside % self.grid[1]], -1)  # type: ignore[index]
            return torch.where(is_image.unsqueeze(-1), spot, torch.full_like(spot, -1))

        keys = place(types == IMAGE)
        return place(site.q_types[:, None] == IMAGE)[:, :, rows], keys

    def _add_mass(self, sums: _Sums, site: Site, weights: Tensor, rows: Tensor, live: Tensor) -> None:
        assert site.q_types is not None
        keys = site.key_types()
        if self.heads is not None and keys.shape[1] > 1:
            keys = keys[:, self.heads]
        count = len(NAMES)
        of_key = torch.nn.functional.one_hot(keys.long(), count).to(weights.dtype)
        of_query = torch.nn.functional.one_hot(site.q_types[:, rows].long(), count).to(weights.dtype)[:, None]
        per_row = weights @ of_key  # (B, h, r, types)
        of_query = of_query * live.unsqueeze(-1)
        sums.add("mass", torch.einsum("bhrq,bhrk->hqk", of_query, per_row))
        sums.add("mass_rows", of_query.sum((0, 2)))

    def _add_gram(self, sums: _Sums, weights: Tensor) -> None:
        wide = weights.double()
        if weights.shape[-1] > self.sketch:
            maker = torch.Generator().manual_seed(weights.shape[-1])
            omega = torch.randn(weights.shape[-1], self.sketch, generator=maker, dtype=torch.float64)
            wide = wide @ omega.to(wide.device)
        gram = wide.transpose(-2, -1) @ wide
        sums.gram = gram if sums.gram is None else sums.gram + gram

    def _query_slots(self, site: Site, rows: Tensor) -> Tensor:
        """(B or 1, 1, r)."""
        if site.q_pos is None:
            return rows[None, None] + site.offset
        slots = site.q_pos.to(rows.device)
        return slots[rows][None, None] if slots.dim() == 1 else slots[:, None, rows]

    def _key_slots(self, site: Site) -> Tensor:
        """(B or 1, h or 1, M)."""
        slots = self._slots(site)
        return slots[None, None] if slots.dim() == 1 else slots[:, None] if slots.dim() == 2 else slots

    # ---- results

    def _close_rank(self, sums: _Sums) -> None:
        if sums.gram is not None:
            values = torch.linalg.eigvalsh(sums.gram).clamp_min(0).sqrt()
            rank = _rank_of_values(values)
            sums.add("rank", rank.sum(0))
            sums.add("maps", (rank > 0).sum(0))
            sums.gram = None

    def _close(self, sums: _Sums, layer: _Layer | None) -> None:
        """A sequence is over: its sums over slots become shares."""
        self._close_rank(sums)
        if layer is None or layer.received is None or layer.seen is None:
            return
        received, seen = layer.received, layer.seen
        first = (seen > 0).to(torch.int64).argmax(-1, keepdim=True)
        alpha = (received / seen.clamp_min(1)).gather(-1, first)[..., 0]
        there = (seen > 0).any(-1).any(1).sum().to(alpha.dtype)
        sums.add("sink_score", alpha.sum(0))
        sums.add("sink_rate", sink_rate(received, seen, self.epsilon)[0].nan_to_num(0.0) * there)
        sums.add("sequences", there)

    def results(self) -> dict[int | str, dict[str, Any]]:
        """Means per layer and head so far."""
        shown: dict[int | str, dict[str, Any]] = {}
        for key in sorted(self._sums, key=lambda k: (not isinstance(k, int), k)):
            running = self._sums[key]
            sums = _Sums()
            sums.sums, sums.gram = dict(running.sums), running.gram
            self._close(sums, self._layers.get(key))
            if not sums.sums:
                continue
            entry: dict[str, Any] = {"rows": sums.sums["rows"].long()}
            for name, count in (
                ("entropy", "rows"),
                ("entropy_share", "choices"),
                ("distance", "rows"),
                ("grid_distance", "grid_rows"),
                ("mass", "mass_rows"),
                ("sink_score", "sequences"),
                ("sink_rate", "sequences"),
                ("rank", "maps"),
            ):
                if name in sums.sums:
                    entry[name] = sums.mean(name, count)
            shown[key] = entry
        return shown


@shaped(types="whole (B, L)")
def image_map(
    entry: dict[str, Any], types: Tensor, grid: tuple[int, int], call: int = 0, row: int = -1, normalise: bool = True
) -> Tensor:
    """Weights of one recorded query on the image tokens, laid out as the image.

    Args:
        entry: what ``Record(what=("weights",)).results()`` holds for a layer.
        types: (B, L) token types of the prompt.
        grid: (rows, columns) of the image tokens; each sample must hold one image.
        call: which recorded call.
        row: which recorded query of it.
        normalise: divide by the weight on the whole image.

    Returns:
        (B, h, rows, columns).

    Raises:
        ValueError: another number of image tokens than the grid has, keys that were evicted.

    >>> entry = {"weights": [torch.tensor([[[[0.5, 0.25, 0.25]]]])], "keys": [torch.arange(3)]}
    >>> image_map(entry, torch.tensor([[1, 2, 2]]), (1, 2)).tolist()
    [[[[0.5, 0.5]]]]
    """
    for name in ("weights", "keys"):
        if name not in entry:
            raise ValueError(f"entry holds no {name!r}; record it with Record(what=('weights',)), got {sorted(entry)}")
    calls = len(entry["weights"])
    check_int("call", call, least=-calls, most=calls - 1)
    recorded, keys = entry["weights"][call], entry["keys"][call]
    check_int("row", row, least=-recorded.shape[2], most=recorded.shape[2] - 1)
    check_ints("grid", grid, least=1)
    if len(types) != len(recorded):
        raise ValueError(f"types is for {len(types)} samples, but the weights are of {len(recorded)}")
    weights = recorded[:, :, row]
    if keys.dim() > 1:
        raise ValueError("keys were evicted from this cache, so the image is not whole any more")
    size = grid[0] * grid[1]
    image = types == IMAGE
    held = image.sum(-1)
    if bool((held != size).any()):
        raise ValueError(f"grid={tuple(grid)} has {size} tokens, but samples have {held.tolist()} image tokens")
    slots = image.nonzero()[:, 1].reshape(len(types), size)
    if int(slots.max()) >= len(keys) or not torch.equal(keys, torch.arange(len(keys), device=keys.device)):
        raise ValueError("this call did not read the whole prompt, so the image is not whole")
    picked = weights.gather(-1, slots[:, None].expand(-1, weights.shape[1], -1).to(weights.device))
    if normalise:
        picked = picked / picked.sum(-1, keepdim=True).clamp_min(torch.finfo(picked.dtype).tiny)
    return picked.unflatten(-1, grid)
