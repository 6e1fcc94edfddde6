"""Recording attention weights and statistics of them, in bounded memory, beside the fast kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_int, shaped
from ..types import check_choice, to_list
from .intervention import Probe, check_heads
from .site import Site

#: What a :class:`Record` can keep.
WHAT = ("weights", "entropy", "received", "sink")


class _Layer:
    """Accumulators of one layer."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, list[Tensor]]] = []  # query slots, key slots, blocks of weights
        self.entropies: list[list[Tensor]] = []
        self.received: Tensor | None = None  # (B, H, L) sum of weights each slot got
        self.seen: Tensor | None = None  # (B, H, L) how many recorded queries could read the slot


class Record(Probe):
    """Weights of chosen layers, heads and query rows, and statistics over them; the model's kernel stays.

    ``entropy``: ``-sum_j A_ij ln A_ij`` of every recorded row. ``received``: per slot of the sequence, the weight it
    got from all recorded queries, and how many of them could read it. ``sink``: with ``alpha_j = received_j / seen_j``,
    the share of samples and heads with ``alpha_j > epsilon`` at the first ``sinks`` tokens of each sample (the sink
    metric of Gu et al.; with causal attention ``seen_j = T - j``). Only ``weights`` keeps maps; the rest streams.

    Args:
        layers: layers to look at; ``None`` for all.
        heads: heads to look at; ``None`` for all.
        rows: ``"last"`` query of each call, ``"all"``, or query numbers (negative from the end).
        what: any of ``"weights"``, ``"entropy"``, ``"received"``, ``"sink"``.
        phase: ``"prefill"`` or ``"decode"`` to look at only; ``None`` for both.
        epsilon: threshold of the sink metric.
        sinks: how many first tokens the sink metric is given for.
        calls: keep the weights of only the last so many calls; ``None`` for all.

    Results: ``{layer: {"weights": [(B, h, r, M), ...], "rows": [...], "keys": [...], "entropy": [(B, h, r), ...],
    "received": (B, h, L), "seen": (B, h, L), "sink": "
    "(sinks,)}}``, rows and keys being slots of the sequence. In a compressed cache ``keys`` holds the slots
    (B, h, M) of the keys, -1 where there is none; otherwise it is (M,). Where tokens were removed, rows are (B, r).
    What a second branch reads (contrastive decoding, ``guidance_scale``) stands apart, under ``"LAYER BRANCH"``.

    Reference: Gu et al., 2024, arXiv 2410.10781 (sink metric, section 2).

    >>> Record(layers=[3], what=("entropy", "sink"), rows="all").layers
    [3]
    """

    name: ClassVar[str] = "record"

    def __init__(
        self,
        layers: Sequence[int | str] | None = None,
        heads: Sequence[int] | None = None,
        rows: str | Sequence[int] = "last",
        what: Sequence[str] = ("weights",),
        phase: str | None = None,
        epsilon: float = 0.3,
        sinks: int = 1,
        calls: int | None = None,
    ):
        if isinstance(what, str):
            raise TypeError(f"what must be a sequence of names, got the string {what!r}; write what=({what!r},)")
        for name in what:
            check_choice("what", name, WHAT)
        if isinstance(rows, str):
            check_choice("rows", rows, ("last", "all"))
        if phase is not None:
            check_choice("phase", phase, ("prefill", "decode"))
        if not what:
            raise ValueError(f"what is empty; choose from {list(WHAT)}")
        if not 0.0 < epsilon < 1.0:
            raise ValueError(f"epsilon must lie in (0, 1), got {epsilon}")
        if sinks < 1:
            raise ValueError(f"sinks must be at least 1, got {sinks}")
        self.layers = to_list("layers", layers)
        self.heads = to_list("heads", heads)
        self.rows: Any = rows if isinstance(rows, str) else to_list("rows", rows)
        self.what, self.phase, self.epsilon, self.sinks, self.calls = tuple(what), phase, epsilon, sinks, calls
        self._layers: dict[int | str, _Layer] = {}
        self._kinds: dict[int, set[str]] = {}

    def wants(self, site: Site) -> bool:
        if self.heads is not None:
            if not len(self.heads):
                raise ValueError(f"{type(self).__name__}: heads is empty; name at least one, or leave it out for all")
            check_heads(self, self.heads, site)
        self._kinds.setdefault(site.layer, set()).add(site.kind)
        return True

    def reset(self) -> None:
        self._layers = {}

    # ---- looking

    def probe(self, site: Site) -> tuple[Tensor, Sequence[int] | None] | None:
        if self.phase is not None and site.phase != self.phase:
            return None
        n = site.n_queries
        if self.rows == "all":
            rows = torch.arange(n)
        elif self.rows == "last":
            rows = torch.tensor([n - 1])
        else:
            chosen = [r if r >= 0 else n + r for r in self.rows]  # type: ignore[union-attr, operator]
            rows = torch.tensor([r for r in chosen if 0 <= r < n], dtype=torch.long)  # type: ignore[operator]
        if not len(rows):
            return None
        layer = self._layers.setdefault(self._key(site), _Layer())
        if site.phase == "prefill":
            # A new sequence: sums over slots of the last one do not go on.
            layer.received = layer.seen = None
        if "weights" in self.what:
            layer.calls.append((self._row_slots(site, rows), self._slots(site), []))
            if self.calls is not None:
                layer.calls = layer.calls[-self.calls :]
        if "entropy" in self.what:
            layer.entropies.append([])
        return (rows if site.q_pos is None else rows.to(site.q_pos.device)), self.heads

    def observe(self, site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> None:
        layer = self._layers[self._key(site)]
        if "weights" in self.what:
            layer.calls[-1][2].append(weights.detach())
        if "entropy" in self.what:
            logs = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
            layer.entropies[-1].append(-(weights * logs).sum(-1))
        if "received" in self.what or "sink" in self.what:
            weights, visible = counted(site, weights, rows, allowed)
            self._add(layer, site, weights.sum(2), visible.sum(2))

    def _add(self, layer: _Layer, site: Site, received: Tensor, seen: Tensor) -> None:
        slots = self._slots(site)
        length = int(slots.max()) + 1
        if layer.received is None or layer.received.shape[:2] != received.shape[:2]:
            layer.received, layer.seen = received.new_zeros(*received.shape[:2], 0), seen.new_zeros(*seen.shape[:2], 0)
        assert layer.seen is not None
        grow = max(0, length - layer.received.shape[-1])
        layer.received, layer.seen = F.pad(layer.received, (0, grow)), F.pad(layer.seen, (0, grow))
        # Where a head holds no key there is no weight to add either.
        index = slots.clamp(min=0).to(received.device).expand_as(received)
        layer.received.scatter_add_(-1, index, received)
        layer.seen.scatter_add_(-1, index, seen)

    @staticmethod
    def _row_slots(site: Site, rows: Tensor) -> Tensor:
        """Slots of the recorded queries: (r,), or (B, r) where tokens were removed."""
        if site.q_pos is None or site.q_pos.dim() == 1:
            return rows + site.offset
        return site.q_pos[:, rows.to(site.q_pos.device)]

    def _slots(self, site: Site) -> Tensor:
        """Slots of the keys: (M,), or (B, h, M) in an evicted cache."""
        if site.k_pos is None:
            return torch.arange(site.n_keys)
        if site.k_pos.dim() == 1:
            return site.k_pos
        slots = site.k_pos.repeat_interleave(site.heads // site.kv_heads, 1)
        return slots if self.heads is None else slots[:, self.heads]

    def _key(self, site: Site) -> int | str:
        # In encoder-decoder models two attentions carry the same number, and a second branch is another sequence.
        key = site.layer if len(self._kinds[site.layer]) == 1 else f"{site.layer} {site.kind}"
        return key if site.branch is None else f"{key} {site.branch}"

    # ---- results

    def results(self) -> dict[int | str, dict[str, Any]]:
        shown: dict[int | str, dict[str, Any]] = {}
        for key in sorted(self._layers, key=str):
            layer = self._layers[key]
            entry: dict[str, Any] = {}
            if "weights" in self.what:
                entry["rows"] = [rows for rows, _, _ in layer.calls]
                entry["keys"] = [keys for _, keys, _ in layer.calls]
                entry["weights"] = [torch.cat(blocks, 2) for _, _, blocks in layer.calls if blocks]
            if "entropy" in self.what:
                entry["entropy"] = [torch.cat(blocks, 2) for blocks in layer.entropies if blocks]
            if layer.received is not None and layer.seen is not None:
                if "received" in self.what:
                    entry["received"], entry["seen"] = layer.received, layer.seen
                if "sink" in self.what:
                    entry["sink"] = sink_rate(layer.received, layer.seen, self.epsilon, self.sinks)
            shown[key] = entry
        return shown


def counted(site: Site, weights: Tensor, rows: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights (B, h, r, M) of query rows and which pairs may meet, both 0 in rows that are padding."""
    visible = torch.ones_like(weights) if allowed is None else allowed.to(weights.dtype).expand_as(weights)
    exists = site.existing_queries()
    if exists is None:
        return weights, visible
    padding = ~exists.index_select(1, rows.to(exists.device)).to(weights.device)[:, None, :, None]
    return weights.masked_fill(padding, 0.0), visible.masked_fill(padding, 0.0)


@shaped(received="number (B, H, L)", seen="number (B, H, L)")
def sink_rate(received: Tensor, seen: Tensor, epsilon: float = 0.3, sinks: int = 1) -> Tensor:
    """Share of samples and heads whose first tokens are sinks.

    Args:
        received: (B, H, L) weight each slot got, summed over queries.
        seen: (B, H, L) how many of the queries could read it; slots nobody could read are padding and are skipped.
        epsilon: a token is a sink when the mean weight it gets exceeds this.
        sinks: for how many first tokens.

    Returns:
        (sinks,) shares in [0, 1] of the samples that have tokens at all.

    >>> sink_rate(torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[4.0, 3.0]]])).tolist()
    [1.0]
    """
    check_int("sinks", sinks, least=1)
    if not received.shape[-1]:
        raise ValueError(f"received must hold at least one slot, got {tuple(received.shape)}")
    alpha = received / seen.clamp_min(1)
    first = (seen > 0).to(torch.int64).argmax(-1, keepdim=True)
    index = first + torch.arange(sinks, device=received.device)
    exists = index < received.shape[-1]
    picked = alpha.gather(-1, index.clamp(max=received.shape[-1] - 1))
    found = ((picked > epsilon) & exists).to(torch.float32)
    return found[(seen > 0).any(-1)].mean(0)
