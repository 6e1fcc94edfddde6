"""Effects of nodes on an answer: total, direct, along paths, and to first order.

With a metric ``m`` of the logits, a clean prompt ``x`` and values ``v'`` from a source:

- total effect of a node ``c``: ``m(x; c := v') - m(x)``, everything behind it recomputed;
- direct effect: the same with every later node at its clean value, so that only the path ``c -> logits`` changes. It
  needs no pass: the stream behind the last block is ``x_L + (v' - v) W_O``;
- path to receivers ``R`` (queries, keys or values of heads): the receivers' inputs with ``c := v'`` and all other heads
  at their clean values; then the answer with the receivers so changed;
- to first order (attribution patching): ``(v' - v) . dm / dv`` at the clean value, one backward pass for all nodes.

Reference: Wang et al., 2022, arXiv 2211.00593 (path patching); Merullo et al., 2023, arXiv 2310.08744; Lieberum et al.,
2023, arXiv 2307.09458; Nanda, 2023 (attribution patching).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, checked, describe
from ...extras import need
from ...hooks import Capture, Node, Nodes, attach
from ...hooks.nodes import NODES, OF_LAYERS, at_positions
from ...hooks.tape import logits_of, quantized
from .metrics import Metric
from .replay import Edit, Inputs, Replay, call
from .sources import Resampled, Source, Sources
from .stream import FrozenNorm, need_stream

NodeSet = Node | Sequence[Node]


@dataclass
class Effects:
    """What changing nodes, or sets of nodes changed together, did to a metric.

    Args:
        nodes: what was changed: a :class:`attnlib.hooks.Node`, or a tuple of them, each.
        clean: (B,) metric of the clean prompts.
        patched: (V, B) metric with each node changed; a mean over draws.
        corrupted: (B,) metric of the prompts that values came from, where there is one for each sample.
        draws: (R, V, B) single draws, where values were drawn several times.
    """

    nodes: list[Any]
    clean: Tensor
    patched: Tensor
    corrupted: Tensor | None = None
    draws: Tensor | None = field(default=None, repr=False)

    @property
    def change(self) -> Tensor:
        """(V, B) ``patched - clean``."""
        return self.patched - self.clean

    @property
    def mean(self) -> Tensor:
        """(V,) change, a mean over samples."""
        return self.change.mean(1)

    @property
    def share(self) -> Tensor:
        """(V,) share of the difference between corrupted and clean that a change makes, means over samples first; 0
        where the prompts do not differ in it.

        Raises:
            ValueError: values did not come from one corrupted prompt per sample.
        """
        if self.corrupted is None:
            raise ValueError("values came from no corrupted prompts of their own, so there is no share; see change")
        apart = (self.corrupted - self.clean).mean()
        return torch.zeros_like(self.mean) if float(apart) == 0 else self.mean / apart

    def grid(self, what: str = "mean", kind: str = "z") -> Tensor:
        """(layers, heads) of the nodes of one kind that were changed alone; 0 for those that were not.

        Args:
            what: ``"mean"`` or ``"share"``.
            kind: of the nodes; of a layer's ``"mlp"`` and ``"residual"`` it is (layers, 1).
        """
        check_choice("what", what, ("mean", "share"))
        alone = [(n, v) for n, v in zip(self.nodes, getattr(self, what), strict=True) if isinstance(n, Node)]
        alone = [(n, v) for n, v in alone if n.kind == kind]
        if not alone:
            raise ValueError(f"no node of kind {kind!r} was changed alone; nodes are {self.nodes[:4]}")
        return table_of(alone)

    def ranked(self, largest: bool = True, by_size: bool = False) -> list[Any]:
        """The nodes by their mean change: largest first, or smallest, or by absolute size."""
        values = self.mean.abs() if by_size else self.mean
        return [self.nodes[i] for i in values.argsort(descending=largest, stable=True).tolist()]


def table_of(values: Sequence[tuple[Node, Tensor]]) -> Tensor:
    """(layers, heads) a number per node, 0 where there is none; (layers, 1) of nodes without heads."""
    table = torch.zeros(max(n.layer for n, _ in values) + 1, max(n.head or 0 for n, _ in values) + 1)
    for node, value in values:
        table[node.layer, node.head or 0] = value
    return table


def effects_of(variants: Sequence[Any], replay: Replay, sources: Sources, drawn: Sequence[Tensor]) -> Effects:
    """Effects from the metric (V, B) of every draw."""
    draws = torch.stack(list(drawn)).detach()
    several = draws if isinstance(sources.given, Resampled) else None
    return Effects(list(variants), replay.clean, draws.mean(0), sources.corrupted, several)


def _node_sets(nodes: Nodes, wanted: Any, kinds: Sequence[str]) -> list[Any]:
    """Nodes as they were asked for: kinds, nodes, or sets of nodes."""
    if wanted is None:
        return list(nodes.of("z"))
    if isinstance(wanted, str):
        check_choice("nodes", wanted, kinds)
        return list(nodes.of(wanted))
    if not isinstance(wanted, (list, tuple)) or not wanted:
        raise ValueError(f"nodes must be a kind, or a list of nodes or of sets of nodes, got {describe(wanted)}")
    found: list[Any] = []
    for one in wanted:
        if isinstance(one, str):
            check_choice("nodes", one, kinds)
            found += nodes.of(one)
        else:
            found.append(one if isinstance(one, Node) else tuple(one))
    for one in found:
        for node in _members(one):
            if nodes.check(node).kind not in kinds:
                raise ValueError(f"{node}: nodes here must be of the kinds {list(kinds)}")
    return found


def _members(one: Any) -> tuple[Node, ...]:
    if isinstance(one, Node):
        return (one,)
    if not one:
        raise ValueError("nodes holds an empty set")
    return tuple(one)


def _edits(variants: Sequence[Any], values: Any) -> list[Edit]:
    """Edits of variants, those of one kind and layer together; ``values(node)`` gives (B, P, D)."""
    places: dict[tuple[str, int, bool], list[tuple[int, int | None, Tensor]]] = {}
    for number, one in enumerate(variants):
        for node in _members(one):
            value = values(node)
            if node.head is None and node.kind not in OF_LAYERS:
                for head in range(value.shape[1]):
                    places.setdefault((node.kind, node.layer, True), []).append((number, head, value[:, head]))
            else:
                key = (node.kind, node.layer, node.head is not None)
                places.setdefault(key, []).append((number, node.head, value))
    found = []
    for (kind, layer, of_head), entries in places.items():
        stacked = torch.stack([value for _, _, value in entries])
        rows = torch.tensor([row for row, _, _ in entries], device=stacked.device)
        heads = torch.tensor([head for _, head, _ in entries], device=stacked.device) if of_head else None
        found.append(Edit(kind, layer, rows, heads, stacked))
    return found


def _groups(starts: Sequence[int], per: int) -> list[list[int]]:
    """Variants in the order in which they begin to differ, so many at a time."""
    order = sorted(range(len(starts)), key=lambda v: starts[v])
    return [order[i : i + per] for i in range(0, len(order), per)]


@checked
def patch(
    model: nn.Module,
    inputs: Inputs,
    source: Source,
    metric: Metric,
    nodes: str | Sequence[Any] | None = None,
    positions: Any = -1,
    answer: int = -1,
    chunk: int | None = None,
) -> Effects:
    """Total effects: each node, or set of nodes, gets the value of a source; all that lies above it is recomputed.

    What lies below a node and before it in the prompt is computed once for all nodes, and the nodes climb through the
    layers in one batch.

    Args:
        model: in evaluation mode; see :class:`attnlib.hooks.Nodes` for what is served.
        inputs: clean prompts: named inputs (B, N), or a tensor.
        source: named inputs of corrupted prompts, one per clean one and as long; ``"zero"``; :class:`Mean`;
            :class:`Resampled`.
        metric: see :func:`logit_difference`.
        nodes: a kind (``"z"`` for all heads, the default; ``"q"``, ``"k"``, ``"v"``, ``"mlp"``, ``"residual"``), or a
            list of nodes, of tuples of nodes that are changed together, and of kinds.
        positions: where: numbers (negative from the end), (B, P) per sample, or ``None`` for all tokens.
        answer: position of the token whose logits count.
        chunk: tokens, over all changes, that are run at once; it bounds memory.

    Raises:
        ValueError: prompts of unequal length, nodes that do not exist, blocks that do not follow each other.
    """
    replay = Replay(model, inputs, metric, positions, answer, chunk)
    variants = _node_sets(replay.nodes, nodes, NODES)
    kinds = sorted({node.kind for one in variants for node in _members(one)})
    sources = Sources(replay, source, kinds)
    if isinstance(source, str):  # zeros like the clean values
        _capture_more(replay, kinds)
    starts = [min(n.layer for n in _members(one)) for one in variants]
    per = max(1, replay.chunk // max(1, replay.batch * replay.length))
    drawn = []
    with replay.writing(set(kinds)) as writer:
        for draw in range(sources.draws):
            patched = torch.empty(len(variants), replay.batch, device=replay.device, dtype=replay.clean.dtype)
            for group in _groups(starts, per):
                chosen = [variants[v] for v in group]
                edits = _edits(chosen, lambda node, draw=draw: sources.value(node, draw))
                last = replay.climb(writer, [starts[v] for v in group], edits)
                patched[group] = replay.measure(last)
            drawn.append(patched)
    return effects_of(variants, replay, sources, drawn)


def _capture_more(replay: Replay, kinds: Sequence[str]) -> None:
    """Clean values of kinds that a replay does not keep by itself, of the tokens that it runs again."""
    missing = [kind for kind in kinds if kind not in replay.values]
    if missing:
        capture = Capture(missing)
        with torch.no_grad(), attach(replay.model, capture):
            call(replay.model, replay.given_now)
        replay.values = {**replay.values, **capture.results()}


@checked
def direct(
    model: nn.Module,
    inputs: Inputs,
    source: Source,
    metric: Metric,
    nodes: str | Sequence[Any] | None = None,
    answer: int = -1,
    norm: str = "recomputed",
    chunk: int | None = None,
) -> Effects:
    """Direct effects: the path from each node to the logits alone, all later nodes at their clean values.

    No pass is run for it: what a node writes differently is added to the stream behind the last block.

    Args:
        model, inputs, source, metric, answer, chunk: as for :func:`patch`.
        nodes: of kinds ``"z"`` and ``"mlp"``.
        norm: the final norm is ``"recomputed"``, or ``"frozen"`` at its clean statistics, so that effects add up.

    Raises:
        ValueError: a model whose blocks end in norms, so that nodes do not add up.
    """
    check_choice("norm", norm, ("recomputed", "frozen"))
    replay = Replay(model, inputs, metric, answer, answer, chunk)
    need_stream(replay)
    variants = _node_sets(replay.nodes, nodes, ("z", "mlp"))
    sources = Sources(replay, source, sorted({node.kind for one in variants for node in _members(one)}))
    last = replay.hidden[-1][:, replay.read]
    per = max(1, replay.chunk // max(1, replay.batch))
    weights: dict[int, Tensor] = {}
    drawn = []
    for draw in range(sources.draws):
        moved = torch.stack(
            [sum(_written(replay, sources, node, draw, weights) for node in _members(one)) for one in variants]  # type: ignore[misc]
        )[:, :, 0]
        parts = []
        for at in range(0, len(moved), per):
            step = moved[at : at + per]
            parts.append(_frozen(replay, last, step) if norm == "frozen" else replay.measure(last + step))
        drawn.append(torch.cat(parts))
    return effects_of(variants, replay, sources, drawn)


def _written(replay: Replay, sources: Sources, node: Node, draw: int, weights: dict[int, Tensor]) -> Tensor:
    """(B, P, C) what a node writes into the stream with the value of the source, less what it wrote."""
    change = sources.value(node, draw) - sources.clean(node)
    if node.kind == "mlp":
        return change
    if node.layer not in weights:
        weights[node.layer] = replay.nodes.output_weight(node.layer).to(change)
    if node.head is None:
        return torch.einsum("bhpd,hdc->bpc", change, weights[node.layer])
    return change @ weights[node.layer][node.head]


def _frozen(replay: Replay, last: Tensor, step: Tensor) -> Tensor:
    """(V, B) the metric with the final norm frozen: its linear part acts on what was added."""
    assert replay.nodes.norm is not None
    linear = FrozenNorm(replay.nodes.norm, last)
    samples = replay._samples(len(step))
    rows = linear(step).flatten(0, 1)
    if replay.metric.tokens is None:
        weight, _ = replay.nodes.rows(torch.arange(replay.clean_logits.shape[1], device=last.device))
        moved = rows @ weight.to(rows).T
    else:
        weight, _ = replay.nodes.rows(replay.metric.tokens.to(last.device)[samples])
        moved = torch.einsum("rc,rkc->rk", rows, weight.to(rows))
    logits = replay.clean_logits.repeat(len(step), 1) + moved
    return replay.metric(logits, samples).unflatten(0, (len(step), -1))


@checked
@torch.inference_mode(False)
def first_order(
    model: nn.Module,
    inputs: Inputs,
    source: Source,
    metric: Metric,
    nodes: str | Sequence[Any] | None = None,
    positions: Any = -1,
    answer: int = -1,
) -> Effects:
    """Attribution patching: total effects to first order, ``(v' - v) . dm / dv``, one backward pass for all nodes.

    Args:
        model, inputs, source, metric, nodes, positions, answer: as for :func:`patch`.

    Raises:
        ValueError: quantized weights, through which no gradient passes.
    """
    if (where := quantized(model)) is not None:
        raise ValueError(f"attribution patching needs gradients, but {where} is quantized; use patch")
    replay = Replay(model, inputs, metric, positions, answer)
    variants = _node_sets(replay.nodes, nodes, NODES)
    kinds = sorted({node.kind for one in variants for node in _members(one)})
    _capture_more(replay, kinds)
    sources = Sources(replay, source, kinds)
    capture = Capture(kinds, gradients=True)
    with torch.enable_grad(), attach(replay.model, capture):
        # Nothing can be saved for a gradient of a tensor made in inference mode.
        given = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in replay.given_now.items()}
        if "inputs_embeds" in given:
            given["inputs_embeds"] = given["inputs_embeds"].detach()
        logits = logits_of(call(replay.model, given))
        logits = logits[:, replay.read] if replay.tokens_out else logits
        samples = replay._samples(1)
        score = metric(replay._picked(logits, samples), samples)
        found = capture.results()
        tensors = [found[kind][layer] for kind in found for layer in found[kind]]
        if not any(t.requires_grad for t in tensors):
            raise ValueError(
                "no value has a gradient: the parameters of the model do not require them; model.requires_grad_(True)"
            )
        grads = torch.autograd.grad(score.sum(), [t for t in tensors if t.requires_grad], allow_unused=True)
    by_place: dict[tuple[str, int], Tensor] = {}
    left = iter(grads)
    for kind in found:
        for layer, tensor in found[kind].items():
            grad = next(left) if tensor.requires_grad else None
            by_place[kind, layer] = torch.zeros_like(tensor) if grad is None else grad
    drawn = []
    for draw in range(sources.draws):
        rows = []
        for one in variants:
            total = torch.zeros_like(replay.clean)
            for node in _members(one):
                slope = by_place[node.kind, node.layer]
                slope = slope if node.head is None else slope[:, node.head]
                slope = at_positions(slope, replay.places, slope.dim() - 2, "the prompt")
                total = total + ((sources.value(node, draw) - sources.clean(node)) * slope).flatten(1).sum(1)
            rows.append(replay.clean + total)
        drawn.append(torch.stack(rows))
    return effects_of(variants, replay, sources, drawn)


@checked
def agreement(a: Effects, b: Effects) -> float:
    """Spearman's rank correlation between the mean changes of the same nodes, from two ways of finding them.

    Raises:
        ValueError: effects of other nodes, or all equal.
    """
    if [*a.nodes] != [*b.nodes]:
        raise ValueError("effects are of different nodes, so their ranks cannot be compared")
    for name, effects in (("a", a), ("b", b)):
        if len(effects.nodes) < 2 or bool((effects.mean == effects.mean[0]).all()):
            raise ValueError(f"effects {name} are all equal, so they have no ranks")
    stats = need("scipy.stats", "rank agreement")
    return float(stats.spearmanr(a.mean.cpu().numpy(), b.mean.cpu().numpy()).statistic)
