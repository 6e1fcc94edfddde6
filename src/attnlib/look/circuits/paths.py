"""Path patching: what a head does to an answer through chosen queries, keys and values, and nothing else.

Three passes, as in the release of Merullo et al.: (1) values of the sender on the corrupted prompt; (2) the clean
prompt with the sender so changed and every other head at its clean value, feed-forwards frozen too or recomputed, from
which the receivers' values are taken; (3) the clean prompt with the receivers so changed, from which the answer is.

With feed-forwards frozen, the stream at the patched positions changes by what the sender writes, ``(z' - z) W_O``, and
by nothing else: pass 2 is that sum, and for the logits as receivers pass 3 is the final norm of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, checked, describe
from ...hooks import Node
from ...hooks.nodes import at_positions
from .effects import Effects, _capture_more, _edits, _groups, _written, effects_of
from .metrics import Metric
from .replay import Edit, Hold, Inputs, Replay
from .sources import Source, Sources
from .stream import need_stream

FREEZE = ("position", "everywhere")


@checked
def paths(
    model: nn.Module,
    inputs: Inputs,
    source: Source,
    metric: Metric,
    receivers: str | Sequence[Node] = "logits",
    senders: Sequence[Node] | None = None,
    positions: Any = -1,
    freeze_mlps: bool = False,
    freeze: str = "position",
    answer: int = -1,
    chunk: int | None = None,
) -> Effects:
    """Effects of heads through paths into the logits, or into queries, keys or values of other heads.

    Args:
        model, inputs, source, metric, answer, chunk: as for :func:`patch`.
        receivers: ``"logits"``, or nodes of kinds ``"q"``, ``"k"``, ``"v"``, ``"z"`` or ``"residual"``.
        senders: heads (``"z"``); by default all heads up to the lowest receiver's layer, that included, without the
            receivers themselves, as in the release. A sender in the layer of a receiver cannot reach it.
        positions: of senders, receivers and what is frozen: numbers, (B, P), or ``None`` for all tokens.
        freeze_mlps: feed-forwards stay at their clean value too; otherwise they are recomputed and carry effects on.
        freeze: other heads keep their clean values at these ``"position"``s, as in the release, so that effects through
            other tokens may leak; or ``"everywhere"``.

    The released score is ``100 * share`` with the sign turned: ``-100 * effects.share``. Receivers of kind ``"z"`` take
    the value that the changed stream gives them; in the release they are overwritten in place by their clean value, and
    every score of theirs is 0.

    Raises:
        ValueError: a receiver below its sender, receivers of an unknown kind, prompts of unequal length.

    Reference: Merullo et al., 2023, arXiv 2310.08744, ``path_patching``.
    """
    check_choice("freeze", freeze, FREEZE)
    check_flag("freeze_mlps", freeze_mlps)
    replay = Replay(model, inputs, metric, positions, answer, chunk)
    depth = len(replay.nodes)
    goals = _receivers(replay, receivers)
    lowest, highest = min(g.layer for g in goals), max(g.layer for g in goals)
    chosen = _senders(replay, senders, goals, lowest, highest)
    sources = Sources(replay, source, ["z"])
    reached = _by_sum if freeze_mlps and _straight(replay, goals, freeze) else _by_passes
    drawn = []
    for draw in range(sources.draws):
        patched = torch.empty(len(chosen), replay.batch, device=replay.device, dtype=replay.clean.dtype)
        per = max(1, replay.chunk // max(1, replay.batch * replay.length))
        starts = [node.layer for node in chosen]
        for group in _groups(starts, per):
            some = [chosen[i] for i in group]
            values = reached(replay, sources, some, goals, draw, freeze_mlps, freeze)
            patched[group] = _answer(replay, goals, values, len(some), lowest, depth)
        drawn.append(patched)
    return effects_of(chosen, replay, sources, drawn)


def _receivers(replay: Replay, receivers: Any) -> list[Node]:
    depth = len(replay.nodes)
    if isinstance(receivers, str):
        check_choice("receivers", receivers, ("logits",))
        return [Node("residual", depth)]
    if not isinstance(receivers, (list, tuple)) or not receivers:
        raise ValueError(f"receivers must be 'logits' or a list of nodes, got {describe(receivers)}")
    for node in receivers:
        replay.nodes.check(node)
        if node.kind not in ("q", "k", "v", "z", "residual"):
            raise ValueError(f"receivers must be of the kinds q, k, v, z or residual, got {node}")
    return list(dict.fromkeys(receivers))


def _senders(replay: Replay, senders: Any, goals: Sequence[Node], lowest: int, highest: int) -> list[Node]:
    if senders is None:
        own = {(g.layer, g.head) for g in goals if g.kind in ("q", "z") or _ungrouped(replay, g)}
        return [n for n in replay.nodes.of("z") if n.layer <= lowest and (n.layer, n.head) not in own]
    if not senders:
        raise ValueError("senders is empty; name at least one head, or leave it out for all")
    for node in senders:
        replay.nodes.check(node)
        if node.kind != "z" or node.head is None:
            raise ValueError(f"senders must be heads, Node('z', layer, head), got {node}")
        if all(node.layer >= goal.layer for goal in goals):
            raise ValueError(
                f"sender {node} writes behind what its receivers read: a receiver must lie above its sender; the "
                f"highest is in layer {highest}"
            )
    return list(senders)


def _ungrouped(replay: Replay, goal: Node) -> bool:
    """Whether a receiver's key/value head is the query head of its number."""
    site = replay.nodes.layers[min(goal.layer, len(replay.nodes) - 1)].site
    return goal.kind in "kv" and site.heads == site.kv_heads


def _straight(replay: Replay, goals: Sequence[Node], freeze: str) -> bool:
    """Whether pass 2 is a sum: blocks add up, and nothing reaches the receivers through other tokens."""
    try:
        need_stream(replay)
    except ValueError:
        return False
    # Patched tokens see each other's change through attention only, which is held at its clean value there. A receiver
    # of kind z is what attention reads: tokens that are not held hand a change on to it.
    if freeze == "everywhere" or all(goal.kind != "z" for goal in goals):
        return True
    held = torch.zeros(replay.batch, replay.length, dtype=torch.bool, device=replay.device)
    return bool(held.scatter(1, replay.places, True).all())


@torch.no_grad()
def _by_sum(
    replay: Replay, sources: Sources, some: Sequence[Node], goals: Sequence[Node], draw: int, *_: Any
) -> dict[Node, Tensor]:
    """(V, B, P, D) values of the receivers when every sender's change arrives as it was written."""
    weights: dict[int, Tensor] = {}
    moved = torch.stack([_written(replay, sources, node, draw, weights) for node in some])
    layers = torch.tensor([node.layer for node in some], device=replay.device)
    found: dict[Node, Tensor] = {}
    for layer in sorted({goal.layer for goal in goals}):
        arrived = moved * (layers < layer).to(moved)[:, None, None, None]
        clean = at_positions(replay.hidden[layer], replay.places, 1, "the prompt")
        edit = Edit("residual", layer, torch.arange(len(some), device=replay.device), None, clean + arrived)
        mine = [goal for goal in goals if goal.layer == layer]
        if all(goal.kind == "residual" for goal in mine):
            found.update({goal: edit.values for goal in mine})
            continue
        kept = _Keeper(replay, mine, len(some))
        with replay.writing({goal.kind for goal in mine}) as writer:
            replay.climb(writer, [layer] * len(some), [edit], record=kept.functions, stop=layer + 1)
        found.update(kept.values)
        found.update({goal: edit.values for goal in mine if goal.kind == "residual"})
    return found


@torch.no_grad()
def _by_passes(
    replay: Replay,
    sources: Sources,
    some: Sequence[Node],
    goals: Sequence[Node],
    draw: int,
    freeze_mlps: bool,
    freeze: str,
) -> dict[Node, Tensor]:
    """The same with layers run again, other heads held."""
    highest = max(goal.layer for goal in goals)
    kinds = {"z", *(["mlp"] if freeze_mlps else []), *(g.kind for g in goals if g.kind != "residual")}
    edits = _edits(some, lambda node: sources.value(node, draw))
    top = min(highest + 1, len(replay.nodes))
    starts = [node.layer for node in some]
    kept = _Keeper(replay, goals, len(some))
    with replay.writing(kinds) as writer:
        if freeze == "everywhere":
            writer.hold_places = torch.arange(replay.length, device=replay.device).expand(replay.batch, -1)
        assert writer.hold_places is not None
        holds = []
        for layer in range(min(starts), top):
            for kind in ("z", "mlp") if freeze_mlps else ("z",):
                value = replay.values[kind][layer]
                held = at_positions(value, writer.hold_places, value.dim() - 2, "the prompt")
                holds.append(Hold(kind, layer, held))
        stream = replay.climb(writer, starts, edits, holds, kept.functions, stop=top)
    kept.fill()
    for goal in goals:
        if goal.kind == "residual" and goal.layer == top:
            kept.values[goal] = _at(replay, stream)
    return kept.values


def _at(replay: Replay, x: Tensor) -> Tensor:
    """(V, B, ..., n, D) at the patched positions: (V, B, ..., P, D)."""
    return at_positions(x.transpose(0, 1), replay.places, x.dim() - 2, "the prompt").transpose(0, 1)


class _Keeper:
    """Takes receivers' values while variants climb; those that do not run a layer yet have its clean value there."""

    def __init__(self, replay: Replay, goals: Sequence[Node], variants: int):
        self.replay, self.variants = replay, variants
        self.values: dict[Node, Tensor] = {}
        self.goals: dict[tuple[str, int], list[Node]] = {}
        for goal in goals:
            self.goals.setdefault((goal.kind, goal.layer), []).append(goal)
        _capture_more(replay, sorted({g.kind for g in goals if g.kind != "residual"}))
        self.functions = {place: self._taker(place) for place in self.goals}

    def _taker(self, place: tuple[str, int]) -> Any:
        def take(value: Tensor) -> None:
            """(V', B, H, n, D), or (V', B, n, C) of the stream."""
            for goal in self.goals[place]:
                one = value if goal.head is None else value[:, :, goal.head]
                self.values[goal] = self._padded(goal, _at(self.replay, one))

        return take

    def _clean(self, goal: Node) -> Tensor:
        if goal.kind == "residual":
            x = self.replay.hidden[goal.layer]
        else:
            x = self.replay.values[goal.kind][goal.layer]
            x = x if goal.head is None else x[:, goal.head]
        return _at(self.replay, x[None])

    def _padded(self, goal: Node, value: Tensor) -> Tensor:
        missing = self.variants - len(value)
        return torch.cat([value, self._clean(goal).expand(missing, *value.shape[1:])]) if missing else value

    def fill(self) -> None:
        """Receivers below all senders keep their clean value."""
        for goals in self.goals.values():
            for goal in goals:
                if goal not in self.values:
                    self.values[goal] = self._padded(goal, self._clean(goal)[:0])


def _answer(
    replay: Replay, goals: Sequence[Node], values: dict[Node, Tensor], count: int, lowest: int, depth: int
) -> Tensor:
    """(V, B) pass 3: the metric with the receivers' values."""
    rows = torch.arange(count, device=replay.device)
    edits = []
    for goal in goals:
        value = values[goal]
        if goal.head is None and goal.kind != "residual":
            edits += [
                Edit(goal.kind, goal.layer, rows, torch.full_like(rows, head), value[:, :, head])
                for head in range(value.shape[2])
            ]
        else:
            heads = None if goal.head is None else torch.full_like(rows, goal.head)
            edits.append(Edit(goal.kind, goal.layer, rows, heads, value))
    with replay.writing({goal.kind for goal in goals}) as writer:
        if lowest == depth:
            stream = replay.hidden[-1].expand(count, *replay.hidden[-1].shape)
            return replay.measure(replay._with_residual(stream, depth, edits))
        return replay.measure(replay.climb(writer, [lowest] * count, edits))
