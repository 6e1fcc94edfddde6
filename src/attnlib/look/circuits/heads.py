"""Heads by what they look at, sets of heads by what they share, and heads made to look elsewhere or to say less."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, check_whole, check_within, checked, shaped
from ...hooks import Capture, Intervention, Node, Nodes, Patch, Record, Site, attach
from ...hooks.nodes import at_positions, check_positions, write_at
from .replay import Inputs, call, named_inputs

#: What a head may be for an answer among labels.
CLASSES = ("correct", "single", "uniform", "amplification", "other")


@checked
def answer_attention(model: nn.Module, inputs: Inputs, answer: int = -1) -> Tensor:
    """(L, B, H, N) attention of every head from the token of the answer.

    Args:
        model, inputs: as for :func:`attnlib.look.patch`.
        answer: its position.

    Raises:
        ValueError: a layer without a map, whose mechanism is no softmax over scores.
    """
    given = named_inputs("inputs", inputs, model)
    record = Record(rows=[answer])
    with torch.no_grad(), attach(model, record):
        call(model, given)
    found = record.results()
    if not found:
        raise ValueError(f"answer must be the position of a token of the prompts, got {answer}")
    return torch.stack([found[layer]["weights"][-1][:, :, 0] for layer in sorted(found)])


@shaped(attention="float (L, B, H, N)", labels="whole (B, K)", correct="whole (B)")
def head_classes(
    attention: Tensor, labels: Tensor, correct: Tensor, threshold: float = 0.5, near: int = 2
) -> dict[Node, str]:
    """What each head looks at from the answer, when it is one of several labels.

    Of the attention that a head gives to all labels, ``"correct"`` heads give the right one more than ``threshold``, a
    mean over prompts; ``"single"`` ones give so much to one and the same label whichever is right; ``"uniform"`` ones
    read the labels, none of them so much; ``"amplification"`` heads give more than ``threshold`` of all attention to
    the last ``near`` tokens; ``"other"`` ones give the labels less than ``threshold``.

    Args:
        attention: from :func:`answer_attention`.
        labels: positions of the labels.
        correct: number of the right one.
        threshold: in (0, 1).
        near: tokens at the end.

    Reference: Lieberum et al., 2023, arXiv 2307.09458, section 3; the thresholds are ours.
    """
    check_real("threshold", threshold, above=0, below=1)
    check_int("near", near, least=1)
    depth, batch, heads, tokens = attention.shape
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < tokens:
        raise ValueError(f"labels must be positions in [0, {tokens}), got {labels.tolist()!r:.60}")
    check_within("correct", correct, labels.shape[1], "label")
    index = labels[None, :, None].expand(depth, batch, heads, labels.shape[1])
    on_labels = attention.gather(-1, index)
    mass = on_labels.sum(-1)  # (L, B, H)
    share = on_labels / mass.clamp_min(torch.finfo(attention.dtype).tiny).unsqueeze(-1)
    right = share.gather(-1, correct[None, :, None, None].expand(depth, batch, heads, 1))[..., 0].mean(1)
    one = share.mean(1).amax(-1)
    last = attention[..., -near:].sum(-1).mean(1)
    mass = mass.mean(1)
    found = {}
    for layer in range(depth):
        for head in range(heads):
            if float(last[layer, head]) > threshold:
                name = "amplification"
            elif float(mass[layer, head]) < threshold:
                name = "other"
            elif float(right[layer, head]) > threshold:
                name = "correct"
            else:
                name = "single" if float(one[layer, head]) > threshold else "uniform"
            found[Node("z", layer, head)] = name
    return found


@shaped(weights="float (B, H, N, N)", ids="whole (B, N)")
def token_scores(weights: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """How much heads look at the token before, at the same token earlier, and at the one behind that.

    Args:
        weights: maps of one layer.
        ids: tokens.

    Returns:
        ``{"previous", "duplicate", "induction"}``, (H,) each: mean attention over the queries that have such keys; 0
        where none has.

    Reference: Olsson et al., 2022, arXiv 2209.11895.
    """
    n = ids.shape[1]
    at = torch.arange(n, device=ids.device)
    earlier = at[:, None] > at[None]
    same = (ids[:, :, None] == ids[:, None]) & earlier
    behind = torch.zeros_like(same)
    behind[:, :, 1:] = same[:, :, :-1]
    behind &= earlier
    previous = (at[:, None] == at[None] + 1).expand_as(same)
    found = {}
    for name, keys in (("previous", previous), ("duplicate", same), ("induction", behind)):
        asked = keys.any(-1)  # (B, N)
        looked = (weights * keys[:, None]).sum(-1) * asked[:, None]
        found[name] = looked.sum((0, 2)) / asked.sum().clamp_min(1)
    return found


@dataclass(frozen=True)
class Overlap:
    """What two sets of heads share.

    Args:
        shared: heads in both.
        value: the measure that was asked for.
        expected: its mean over random sets of the same sizes.
        p: share of random sets (with the found one among them) that overlap as much.
    """

    shared: int
    value: float
    expected: float
    p: float


HOW = ("first", "smaller", "jaccard")


def _measure(shared: int, a: int, b: int, how: str) -> float:
    whole = {"first": a, "smaller": min(a, b), "jaccard": a + b - shared}[how]
    return shared / whole


@checked
def overlap(
    a: Iterable[Node],
    b: Iterable[Node],
    among: Iterable[Node],
    how: str = "jaccard",
    by_layer: bool = False,
    draws: int = 10000,
    seed: int = 0,
) -> Overlap:
    """What two circuits share, against random sets of as many heads.

    Args:
        a, b: the two sets.
        among: all heads that they could hold.
        how: shared heads over those of ``"first"`` (``a``), of the ``"smaller"`` set, or of both together
            (``"jaccard"``). The paper's denominator is not said; its 78 % may be any of these.
        by_layer: random sets hold as many heads in each layer as ``b`` does; sets of late heads overlap anyway.
        draws: random sets.
        seed: of the draws.

    Raises:
        ValueError: an empty set, or heads that are not among all.

    >>> heads = [Node("z", 0, h) for h in range(8)]
    >>> overlap(heads[:4], heads[2:6], heads, "smaller", draws=100).value
    0.5
    """
    first, second, every = set(a), set(b), list(dict.fromkeys(among))
    check_choice("how", how, HOW)
    check_int("draws", draws, least=1)
    for name, nodes in (("a", first), ("b", second)):
        if not nodes:
            raise ValueError(f"{name} is empty: a circuit without heads shares nothing")
        if nodes - set(every):
            raise ValueError(
                f"{name} holds {sorted(nodes - set(every))[:4]}, which are not among all {len(every)} nodes"
            )
    maker = torch.Generator().manual_seed(seed)
    mine = torch.tensor([node in first for node in every])
    groups = [[i for i, n in enumerate(every) if not by_layer or n.layer == layer]
              for layer in (sorted({n.layer for n in every}) if by_layer else [0])]  # fmt: skip
    shared = torch.zeros(draws, dtype=torch.long)
    for group in groups:
        index = torch.tensor(group)
        count = sum(every[i] in second for i in group)
        order = torch.rand(draws, len(group), generator=maker).argsort(1)[:, :count]
        shared += mine[index][order].sum(1)
    found = len(first & second)
    values = [_measure(int(s), len(first), len(second), how) for s in shared.unique()]
    counts = [int((shared == s).sum()) for s in shared.unique()]
    expected = sum(v * c for v, c in zip(values, counts, strict=True)) / draws
    p = (int((shared >= found).sum()) + 1) / (draws + 1)
    return Overlap(found, _measure(found, len(first), len(second), how), expected, p)


class _OfHeads(Intervention):
    """What interventions on chosen heads share: which heads of which layer they are."""

    follows_sequence: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(self, heads: Sequence[Node]):
        if not heads:
            raise ValueError("heads is empty; name at least one")
        for node in heads:
            if not isinstance(node, Node) or node.kind != "z" or node.head is None:
                raise ValueError(f"heads must be Node('z', layer, head), got {node!r}")
        self.heads = list(heads)
        self._numbers: dict[str, list[int]] = {}

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        nodes = Nodes(model)
        for node in self.heads:
            nodes.check(node)
        self._numbers = {
            layer.site.name: [n.head for n in self.heads if n.layer == number and n.head is not None]
            for number, layer in enumerate(nodes.layers)
        }


class AttendTo(_OfHeads):
    """Heads look from chosen queries at chosen keys, with all their weight or with some of it.

    ``A'_ij = (1 - w) A_ij + w / |T|`` for keys ``j`` in the targets ``T`` of row ``i``, ``(1 - w) A_ij`` elsewhere.

    Args:
        heads: of kind ``"z"``.
        targets: (B, n) positions of the keys.
        positions: of the queries: numbers, negative from the end.
        weight: ``w`` in [0, 1].

    Raises:
        ValueError: nodes that are no heads, a target that the query may not read.

    Reference: Merullo et al., 2023, arXiv 2310.08744, section 5: four heads are made to look at the wrong colours;
    how exactly is not released, so this is our reading.
    """

    name: ClassVar[str] = "attend-to"

    def __init__(
        self, heads: Sequence[Node], targets: Tensor, positions: Sequence[int] | int = -1, weight: float = 1.0
    ):
        check_whole("targets", targets)
        if targets.dim() != 2 or not targets.shape[1]:
            raise ValueError(f"targets must be (B, n) positions, got {tuple(targets.shape)}")
        if targets.numel() and int(targets.min()) < 0:
            raise ValueError(f"targets must be counted from the first key, 0 and up, got {int(targets.min())}")
        super().__init__(heads)
        self.targets, self.positions = targets, check_positions(positions)
        if isinstance(self.positions, Tensor) and self.positions.dim() > 1:
            raise ValueError("positions of queries must be the same in all samples")
        self.weight = check_real("weight", weight, least=0, most=1)

    @property
    def identity(self) -> bool:
        return self.weight == 0

    def edit_rows(self, site: Site) -> Tensor | None:
        if not self._numbers.get(site.name):
            return torch.zeros(0, dtype=torch.long)
        return torch.as_tensor(self.positions) % site.n_queries

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        heads = self._numbers.get(site.name)
        chosen = self.edit_rows(site)
        assert chosen is not None
        mine = torch.isin(rows.cpu(), chosen)
        if not heads or not bool(mine.any()):
            return weights
        targets = self.targets.to(weights.device)
        if len(targets) != len(weights):
            raise ValueError(f"targets are for {len(targets)} samples, but the call has {len(weights)}")
        if len(targets) and int(targets.max()) >= weights.shape[-1]:
            raise ValueError(f"targets must be below the {weights.shape[-1]} keys, got {int(targets.max())}")
        wanted = torch.zeros(len(weights), weights.shape[-1], device=weights.device, dtype=weights.dtype)
        wanted = wanted.scatter(1, targets, 1.0 / targets.shape[1])
        wanted = wanted / wanted.sum(-1, keepdim=True)
        allowed, _ = (None, None) if site.mask is None else site.mask.rows(rows)
        if allowed is not None and bool((~allowed & (wanted[:, None, None] > 0))[:, :, mine.to(allowed.device)].any()):
            raise ValueError("targets hold a key that the query may not read: it is masked, or lies behind it")
        new = weights.clone()
        at = mine.nonzero()[:, 0].to(weights.device)
        for head in heads:
            new[:, head, at] = (1 - self.weight) * new[:, head, at] + self.weight * wanted[:, None]
        return new


class UniformHeads(_OfHeads):
    """Heads read all keys that they may read alike: ``A_ij = 1 / |keys of i|``, whatever their scores and biases.

    Args:
        heads: of kind ``"z"``.

    Raises:
        ValueError: nodes that are no heads, or do not exist.
    """

    name: ClassVar[str] = "uniform-heads"

    def edit_rows(self, site: Site) -> Tensor | None:
        return None if self._numbers.get(site.name) else torch.zeros(0, dtype=torch.long)

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        heads = self._numbers.get(site.name)
        if not heads:
            return weights
        allowed, _ = (None, None) if site.mask is None else site.mask.rows(rows)
        even = torch.ones_like(weights) if allowed is None else allowed.to(weights).expand_as(weights)
        new = weights.clone()
        new[:, heads] = (even / even.sum(-1, keepdim=True).clamp_min(1))[:, heads]
        return new


@checked
def ablated(model: nn.Module, nodes: Sequence[Node], inputs: Inputs | None = None, how: str = "mean") -> Intervention:
    """An intervention that silences nodes at every token, to be attached for as long as one likes.

    Args:
        model: whose nodes they are.
        nodes: heads or feed-forwards.
        inputs: prompts or images over whose samples and tokens a mean is taken; padding, as ``attention_mask`` says,
            left out.
        how: ``"mean"``, ``"zero"``, or ``"uniform"``, with which heads read all their keys alike.

    Raises:
        ValueError: a mean without prompts, nodes that do not exist, a feed-forward that is to read.
    """
    check_choice("how", how, ("mean", "zero", "uniform"))
    if not nodes:
        raise ValueError("nodes is empty; name at least one")
    whole = Nodes(model)
    kinds = sorted({whole.check(node).kind for node in nodes})
    if how == "uniform":
        made = UniformHeads(nodes)
        made.layers = sorted({whole.layers[node.layer].site.name for node in nodes})
        return made
    if inputs is None:
        raise ValueError("inputs must be prompts to take means over (for how='zero', to learn shapes from)")
    given = named_inputs("inputs", inputs, model)
    capture = Capture(kinds)
    with torch.no_grad(), attach(model, capture):
        call(model, given)
    mask = given.get("attention_mask")
    exists = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    values = {}
    for node in nodes:
        value = capture.value(node)
        x = value.transpose(1, 2) if value.dim() == 4 else value  # (B, N, H, D) or (B, N, D)
        tokens = x.flatten(0, 1) if exists is None else x[exists.to(x.device)]
        mean = tokens.mean(0) if how == "mean" else torch.zeros_like(x[0, 0])
        values[node] = mean[None, :, None] if value.dim() == 4 else mean[None, None]
    return Patch(values)


class LowRank(Intervention):
    """Queries, keys or values of heads reduced to a few dimensions, at chosen tokens and nowhere else.

    ``u' = m + P_r (u - m)``, ``m`` the mean and ``P_r`` the projection on the first r directions of a set of vectors.

    Args:
        subspaces: by node (``"q"``, ``"k"`` or ``"v"`` of a head), ``(mean (D,), directions (r, D))`` from
            :func:`subspaces`.
        positions: by kind: numbers, or (B, n) per sample; kinds that are not named are reduced at all tokens.

    Raises:
        ValueError: nodes of other kinds, subspaces of other widths.

    Reference: Lieberum et al., 2023, arXiv 2307.09458, section 4.
    """

    name: ClassVar[str] = "low-rank"
    follows_sequence: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(self, subspaces: Mapping[Node, tuple[Tensor, Tensor]], positions: Mapping[str, Any] | None = None):
        if not subspaces:
            raise ValueError("subspaces is empty; name at least one head")
        for node, (mean, directions) in subspaces.items():
            if not isinstance(node, Node) or node.kind not in ("q", "k", "v") or node.head is None:
                raise ValueError(f"subspaces must be of Node('q' | 'k' | 'v', layer, head), got {node!r}")
            if mean.dim() != 1 or directions.dim() != 2 or directions.shape[1] != len(mean):
                raise ValueError(
                    f"the subspace of {node} must be (D,) and (r, D), got {tuple(mean.shape)} and "
                    f"{tuple(directions.shape)}"
                )
        self.subspaces = dict(subspaces)
        self.positions = {kind: check_positions(p) for kind, p in (positions or {}).items()}
        for kind in self.positions:
            check_choice("positions", kind, ("q", "k", "v"))
        self._numbers: dict[str, int] = {}

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        nodes = Nodes(model)
        for node in self.subspaces:
            nodes.check(node)
        self._numbers = {layer.site.name: number for number, layer in enumerate(nodes.layers)}

    def on_qkv(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number, values = self._numbers[site.name], {"q": q, "k": k, "v": v}
        for node, (mean, directions) in self.subspaces.items():
            if node.layer != number:
                continue
            x = values[node.kind]
            part = x[:, node.head]
            if len(mean) != x.shape[-1]:
                raise ValueError(f"the subspace of {node} has {len(mean)} dimensions, its vectors {x.shape[-1]}")
            at = self.positions.get(node.kind)
            m, d = mean.to(part), directions.to(part)
            kept = at_positions(part, at, 1, str(node)) - m
            new = x.clone()
            write_at(new[:, node.head], m + (kept @ d.T) @ d, at, 1, str(node))
            values[node.kind] = new
        return values["q"], values["k"], values["v"]


@shaped(vectors="float (n, D)", groups="whole (n)")
def subspace(vectors: Tensor, rank: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (D,) and first directions (r, D) of vectors, by singular values: of all, or of the means of groups.

    Args:
        vectors: queries, keys or values of a head.
        rank: r; at most D, and fewer directions where the vectors span fewer.
        groups: number of the group of each vector, such as the place of its label; the subspace is then that of the
            groups' means, as the paper takes it.

    >>> mean, directions = subspace(torch.eye(3), 1)
    >>> mean.shape, directions.shape
    (torch.Size([3]), torch.Size([1, 3]))
    """
    check_int("rank", rank, least=0, most=vectors.shape[1])
    if not len(vectors):
        raise ValueError("vectors is empty: there is no mean")
    mean = vectors.mean(0)
    rows = vectors - mean
    if groups is not None:
        rows = torch.stack([rows[groups == g].mean(0) for g in groups.unique()])
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    there = int((values > values.max().clamp_min(torch.finfo(values.dtype).tiny) * 1e-6).sum())
    return mean, directions[: min(rank, there)]


@checked
def subspaces(
    model: nn.Module,
    inputs: Inputs,
    heads: Sequence[Node],
    rank: int,
    query: int = -1,
    keys: Tensor | Sequence[int] | None = None,
    what: Sequence[str] = ("q", "k", "v"),
    by_place: bool = False,
) -> dict[Node, tuple[Tensor, Tensor]]:
    """Subspaces of queries at one token and of keys and values at several, over prompts, for :class:`LowRank`.

    Args:
        model, inputs: prompts.
        heads: of kind ``"z"``; keys and values are those of the key/value head that each reads.
        rank: directions to keep.
        query: position of the queries.
        keys: positions of keys and values: (B, K), or numbers; ``None`` for all.
        what: which of the three.
        by_place: subspace of the means by place (by k of K) in place of all vectors, for keys and values.
    """
    whole = Nodes(model)
    given = named_inputs("inputs", inputs, model)
    captures = {"q": Capture(("q",), positions=query), "k": Capture(("k",), positions=keys),
                "v": Capture(("v",), positions=keys)}  # fmt: skip
    for kind in what:
        check_choice("what", kind, tuple(captures))
    found: dict[Node, tuple[Tensor, Tensor]] = {}
    for kind in what:
        with torch.no_grad(), attach(model, captures[kind]):
            call(model, given)
        for head in heads:
            if whole.check(head).kind != "z" or head.head is None:
                raise ValueError(f"heads must be Node('z', layer, head), got {head}")
            site = whole.layers[head.layer].site
            number = head.head if kind == "q" else head.head // (site.heads // site.kv_heads)
            node = Node(kind, head.layer, number)
            value = captures[kind].value(node)  # (B, n, D)
            groups = None
            if by_place and kind != "q":
                groups = torch.arange(value.shape[1], device=value.device).repeat(len(value))
            found[node] = subspace(value.flatten(0, 1), rank, groups)
    return found
