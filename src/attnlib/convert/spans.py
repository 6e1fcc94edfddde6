"""MoA: how much each head's map matters where, and spans per head that cost the least under a budget.

Fu et al., 2024, arXiv 2406.14909. Three steps turn a causal model into one of
:class:`attnlib.nn.sparse.moa_spans.SpanHeads`:

1. :func:`influence`: to first order, what the loss gains when one weight of a map is set to zero and its row made to
   sum to 1 again, added up over blocks: with weights A and ``G = dL/dA``,
   ``E_ij = -A_ij (G_ij - sum_n A_in G_in) / (1 - A_ij)``.
2. :func:`search`: a rule ``span = alpha + beta N`` for every head, so that the influence of all that is not read is
   small at several lengths N, under a bound of the mean density at each: a Pareto set, by mixed-integer programs.
3. :func:`put`: the model with these spans, generating with rings of unequal length. ::

       maps = {n: influence(model, batches[n], block=64) for n in (2048, 4096)}
       plans = search(maps, rules(-2048, 4096, 2048, 8192), {2048: 0.5, 4096: 0.5, 8192: 0.5})
       conversion = put(model, min(plans, key=lambda plan: validation_loss(model, plan)), length=8192)

Differs from the authors' code: scipy's HiGHS in place of Gurobi; grouped queries keep their keys, where theirs repeats
key heads; maps are added up while gradients pass, so that no map is kept.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_rank, check_real
from ..extras import need
from ..hooks import Intervention, attach
from ..hooks.call import row_blocks, weight_rows
from ..hooks.site import PairMask, Site
from ..nn.sparse.moa_spans import block_layout, span_blocks
from .agreement import task_loss
from .conversion import Conversion
from .swap import convertible, swap
from .targets import make_socket

#: How the density of a rule is counted.
DENSITIES = ("kv", "causal")


@dataclass(frozen=True)
class Plan:
    """A rule for every head: ``alphas[layer][head]`` tokens and ``betas[layer][head]`` shares of the length.

    >>> plan = Plan([[0, 128]], [[0.5, 0.0]])
    >>> plan.spans(1024, block=64)
    [[8, 2]]
    """

    alphas: Sequence[Sequence[float]]
    betas: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        if [len(row) for row in self.alphas] != [len(row) for row in self.betas] or not self.alphas:
            raise ValueError(
                f"alphas and betas must have a number for every head of every layer, got "
                f"{[len(row) for row in self.alphas]} and {[len(row) for row in self.betas]}"
            )

    @staticmethod
    def read(path: str | Path) -> Plan:
        """From a file as the authors write it: ``{"alphas": [[...], ...], "betas": [[...], ...]}``."""
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(held, dict) or not {"alphas", "betas"} <= set(held):
            raise ValueError(f"{path} must hold alphas and betas")
        return Plan(held["alphas"], held["betas"])

    def write(self, path: str | Path) -> None:
        """To a file that the authors' code reads."""
        held = {"alphas": [list(row) for row in self.alphas], "betas": [list(row) for row in self.betas]}
        Path(path).write_text(json.dumps(held) + "\n", encoding="utf-8")

    def spans(self, length: int, block: int = 64) -> list[list[int]]:
        """Blocks that every head reads beside its sinks."""
        return [
            [span_blocks(a, b, length, block) for a, b in zip(*rows, strict=True)]
            for rows in zip(self.alphas, self.betas, strict=True)
        ]

    def density(self, length: int, block: int = 64, sinks: int = 1, count: str = "kv") -> float:
        """Mean over heads, as :func:`density` counts it."""
        pairs = [pair for rows in zip(self.alphas, self.betas, strict=True) for pair in zip(*rows, strict=True)]
        return sum(density(a, b, length, block, sinks, count) for a, b in pairs) / len(pairs)


def rules(
    least_alpha: float,
    most_alpha: float,
    least_length: int,
    most_length: int,
    interval: int = 1024,
    betas: int = 9,
    profiled: int | None = None,
) -> list[tuple[float, float]]:
    """All ``(alpha, beta)`` of a grid that give at least a token at the least length and at most all at the greatest.

    Args:
        least_alpha, most_alpha: ends of the grid of alphas; the authors take minus the least length and the greatest
            profiled one.
        least_length, most_length: the shortest and the longest input.
        interval: tokens between alphas.
        betas: shares from 0 to 1.
        profiled: the greatest length with maps, which must not be exceeded either; ``most_length`` by default.

    Returns:
        By rising span at the greatest length.

    >>> rules(-1, 2, 2, 4, interval=1, betas=2)
    [(1.0, 0.0), (2.0, 0.0), (-1.0, 1.0), (0.0, 1.0)]
    """
    check_int("interval", interval, least=1)
    check_int("betas", betas, least=1)
    count = int(most_alpha - least_alpha) // interval + 1
    profiled = most_length if profiled is None else profiled
    found = [
        (a, b)
        for a in torch.linspace(least_alpha, most_alpha, count).tolist()
        for b in torch.linspace(0, 1, betas).tolist()
        if a + b * profiled <= profiled and a + b * most_length <= most_length and a + b * least_length > 0
    ]
    if not found:
        raise ValueError(f"no rule fits lengths from {least_length} to {most_length}; widen the grid of alphas")
    return sorted(found, key=lambda rule: rule[0] + rule[1] * most_length)


def density(alpha: float, beta: float, length: int, block: int = 64, sinks: int = 1, count: str = "kv") -> float:
    """Share of an input of ``length`` tokens that a rule reads.

    Args:
        alpha, beta, block, sinks: of :class:`attnlib.nn.sparse.moa_spans.SpanHeads`.
        length: tokens.
        count: ``"kv"``: the longest row over all key blocks, what a cache keeps, as the authors count; ``"causal"``:
            blocks that are read over blocks that are not later.

    >>> density(0, 0.5, 512), density(0, 0.5, 512, count="causal")
    (0.625, 0.8333333333333334)
    """
    check_choice("count", count, DENSITIES)
    blocks = -(-length // block)
    near = min(span_blocks(alpha, beta, length, block), blocks)
    if count == "kv":
        return min(near + sinks, blocks) / blocks
    read = sum(min(near, row + 1) + min(sinks, max(0, row + 1 - near)) for row in range(blocks))
    return read / (blocks * (blocks + 1) / 2)


# --------------------------------------------------------------------------------------------------------------------
# Influence


def influence_rows(weights: Tensor, gradient: Tensor, first: bool = False) -> Tensor:
    """``E`` (.., r, M) of rows of a map and of the gradient of the loss in them.

    Args:
        weights: (.., r, M) rows that sum to 1.
        gradient: (.., r, M).
        first: whether row 0 is the first of the sequence, which has one key alone: then ``-A G``.
    """
    both = weights * gradient
    eps = torch.finfo(weights.dtype).eps
    effect = -(weights * (gradient - both.sum(-1, keepdim=True))) / (1 - weights + eps)
    if first:
        effect = torch.cat([-both[..., :1, :], effect[..., 1:, :]], -2)
    return effect


class _Profile(Intervention):
    """Adds up the influence of blocks while gradients come back."""

    name = "moa-influence"
    kinds = ("self",)

    def __init__(self, block: int, absolute: bool):
        self.block, self.absolute = block, absolute
        self.sums: dict[int, Tensor] = {}
        self.calls: dict[int, int] = {}

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        if not site.weighting.plain:
            raise ValueError(f"layer {site.layer} ({site.name}): its weights are not a plain softmax")
        out = call(q, k, v)
        # Where nothing before it is trained, the gradient begins here. What comes back is another tensor than the
        # kernel's, so that the model goes on with the one that is listened to.
        out = out.view_as(out) if out.requires_grad else out.detach().requires_grad_()
        pair = site.mask if site.mask is not None else PairMask(q.shape[2], k.shape[2])
        qs, ks, vs = (t.detach() for t in (q, k, v))
        out.register_hook(lambda grad: self._add(site, pair, qs, ks, vs, grad.detach()))
        return out

    @torch.no_grad()
    def _add(self, site: Site, pair: PairMask, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
        batch, heads, n, _ = q.shape
        m = k.shape[2]
        # Rows in pieces of whole blocks.
        values = v.repeat_interleave(heads // v.shape[1], 1).to(torch.float32)
        total = q.new_zeros(heads, n, -(-m // self.block), dtype=torch.float32)
        for rows in row_blocks(torch.arange(n, device=q.device), batch * heads * m):
            weights, _, _ = weight_rows(site, q, k, rows, pair, ())
            gradient = grad.index_select(2, rows).to(torch.float32) @ values.transpose(-2, -1)
            effect = influence_rows(weights.to(torch.float32), gradient, first=int(rows[0]) == 0)
            effect = effect.masked_fill(weights == 0, 0.0)
            if self.absolute:
                effect = effect.abs()
            missing = -m % self.block
            effect = F.pad(effect, (0, missing)) if missing else effect
            total[:, rows] += effect.unflatten(-1, (-1, self.block)).sum(-1).sum(0)
        missing = -n % self.block
        total = F.pad(total, (0, 0, 0, missing)) if missing else total
        summed = total.unflatten(1, (-1, self.block)).sum(2)
        self.sums[site.layer] = self.sums[site.layer] + summed if site.layer in self.sums else summed
        self.calls[site.layer] = self.calls.get(site.layer, 0) + batch


def influence(
    model: nn.Module,
    batches: Iterable[Any],
    block: int = 64,
    loss: Callable[[nn.Module, Any], Tensor] = task_loss,
    absolute: bool = False,
) -> Tensor:
    """(layers, heads, blocks, blocks): first-order gain of the loss when blocks are not read, mean over samples.

    Args:
        model: causal, of transformers or ours.
        batches: inputs of one length, not padded. With ``labels`` where an answer begins: the authors take answers that
            the model itself gave to questions which need distant parts of the input.
        block: tokens per block.
        loss: ``loss(model, batch)``; the model's own by default.
        absolute: add up absolute values.

    Reference: Fu et al., 2024, arXiv 2406.14909, section 4.1.
    """
    check_int("block", block, least=1)
    profile = _Profile(block, absolute)
    grads = {p: p.requires_grad for p in model.parameters()}
    seen = 0
    try:
        for p in grads:
            p.requires_grad_(False)
        with attach(model, profile), torch.enable_grad():
            for batch in batches:
                loss(model, batch).backward()
                seen += 1
    finally:
        for p, wanted in grads.items():
            p.requires_grad_(wanted)
    if not seen:
        raise ValueError("batches holds none; a profile needs at least one")
    shapes = {tuple(t.shape) for t in profile.sums.values()}
    if len(shapes) != 1:
        raise ValueError(f"layers have maps of unequal shapes {sorted(shapes)}; choose inputs of one length")
    return torch.stack([profile.sums[layer] / profile.calls[layer] for layer in sorted(profile.sums)])


def predicted_loss(
    effect: Tensor, choices: Sequence[tuple[float, float]], block: int = 64, sinks: int = 1, absolute: bool = True
) -> Tensor:
    """(layers, heads, rules): the influence of all blocks that each rule does not read.

    Args:
        effect: (layers, heads, blocks, blocks), of :func:`influence`.
        choices: ``(alpha, beta)`` of every rule.
        block, sinks: of :class:`attnlib.nn.sparse.moa_spans.SpanHeads`.
        absolute: of every block's mean influence, as the authors' search does, so that blocks which hurt are not
            dropped for credit.
    """
    check_rank("effect", effect, 4, "(layers, heads, blocks, blocks)")
    count = effect.shape[-1]
    if effect.shape[-2] != count:
        raise ValueError(f"effect must have as many blocks of queries as of keys, got {tuple(effect.shape)}")
    effect = effect.abs() if absolute else effect
    spans = [span_blocks(a, b, count * block, block) for a, b in choices]
    left = (~block_layout(spans, sinks, count, effect.device)).tril()
    return torch.einsum("lhij,rij->lhr", effect, left.to(effect.dtype))


# --------------------------------------------------------------------------------------------------------------------
# Search


def search(
    maps: Mapping[int, Tensor],
    choices: Sequence[tuple[float, float]],
    bounds: Mapping[int, float],
    block: int = 64,
    sinks: int = 1,
    rules_per_layer: int | None = 2,
    points: int = 5,
    count: str = "kv",
    absolute: bool = True,
    groups: int | None = None,
    seconds: float | None = None,
    floor: float = 0.0,
    gap: float = 0.0,
) -> list[Plan]:
    """Plans that no other plan beats at all lengths, under bounds of the mean density.

    Every length with a map is an objective. One after another is made as small as possible while the others are held to
    each of ``points - 1`` intervals of the range that they have where each is best.

    Args:
        maps: length -> (layers, heads, blocks, blocks), of :func:`influence`.
        choices: rules, of :func:`rules`.
        bounds: length -> mean density over all heads, in (0, 1]; also lengths without a map.
        block, sinks: of :class:`attnlib.nn.sparse.moa_spans.SpanHeads`.
        rules_per_layer: different rules in a layer at most; ``None`` for any number.
        points: ends of the intervals of every objective.
        count: of :func:`density`.
        absolute: of :func:`predicted_loss`.
        groups: key/value heads per layer: query heads that share one get one rule, by the largest influence among them.
        seconds: limit of every program.
        floor: share of every bound that the density must reach at least; the authors take 0.9.
        gap: a program stops where its plan is at most this share worse than the best there may be.

    Raises:
        ValueError: a bound that no plan meets, by its length; no lengths.
    """
    if not maps or not choices:
        raise ValueError("maps and choices must hold at least one length and one rule")
    check_int("points", points, least=2)
    if rules_per_layer is not None:
        check_int("rules_per_layer", rules_per_layer, least=1)
    for length, bound in bounds.items():
        check_real(f"bounds[{length}]", bound, above=0, most=1)
    check_real("floor", floor, least=0, most=1)
    check_real("gap", gap, least=0)
    shapes = {tuple(t.shape[:2]) for t in maps.values()}
    if len(shapes) != 1:
        raise ValueError(f"maps have unequal layers and heads: {sorted(shapes)}")
    layers, query_heads = next(iter(shapes))
    heads = query_heads if groups is None else check_int("groups", groups, least=1)
    if query_heads % heads:
        raise ValueError(f"groups={heads} does not divide {query_heads} heads")
    objectives = []
    for effect in maps.values():
        effect = effect.abs() if absolute else effect
        effect = effect.unflatten(1, (heads, -1)).amax(2)
        objectives.append(predicted_loss(effect, choices, block, sinks, absolute).flatten().double().numpy())
    costs = {length: [density(a, b, length, block, sinks, count) for a, b in choices] for length in bounds}
    for length, row in costs.items():
        if min(row) > bounds[length]:
            raise ValueError(
                f"bounds[{length}]={bounds[length]} cannot be met: the sparsest rule has density {min(row):.4g} there"
            )
    program = _Program(layers, heads, len(choices), costs, bounds, rules_per_layer, seconds, floor, gap)
    best = [program.solve(objective) for objective in objectives]
    if any(found is None for found in best):
        tight = max(bounds, key=lambda n: min(costs[n]) / bounds[n])
        if floor:
            raise ValueError(f"no plan has densities from {floor} of all bounds to the bounds; lower floor={floor}")
        raise ValueError(f"no plan meets all bounds together; the tightest is bounds[{tight}]={bounds[tight]}")
    found = {found.tobytes(): found for found in best if found is not None}
    values = [[float(o @ x) for x in best] for o in objectives]
    ends = [[min(row) + (max(row) - min(row)) * i / (points - 1) for i in range(points)] for row in values]
    for primary, objective in enumerate(objectives):
        others = [i for i in range(len(objectives)) if i != primary]
        for cell in itertools.product(range(points - 1), repeat=len(others)):
            held = [(objectives[i], ends[i][at], ends[i][at + 1]) for i, at in zip(others, cell, strict=True)]
            x = program.solve(objective, held)
            if x is not None:
                found[x.tobytes()] = x
    scored = [(tuple(float(o @ x) for o in objectives), x) for x in found.values()]
    kept = [
        (score, x) for score, x in scored
        if not any(all(a <= b for a, b in zip(s, score, strict=True)) and s != score for s, _ in scored)
    ]  # fmt: skip
    share = query_heads // heads
    plans = []
    for _, x in sorted(kept, key=lambda pair: pair[0]):
        chosen = x.reshape(layers, heads, len(choices)).argmax(-1)
        picked = [[choices[r] for r in row for _ in range(share)] for row in chosen.tolist()]
        plans.append(Plan([[a for a, _ in row] for row in picked], [[b for _, b in row] for row in picked]))
    return plans


class _Program:
    """Which rule every head has, as a mixed-integer linear program of scipy."""

    def __init__(
        self, layers: int, heads: int, rules_: int, costs: Mapping[int, Sequence[float]], bounds: Mapping[int, float],
        limit: int | None, seconds: float | None, floor: float, gap: float,
    ):  # fmt: skip
        optimize = need("scipy.optimize", "the search of spans")
        sparse = need("scipy.sparse", "the search of spans")
        numpy = need("numpy", "the search of spans")
        self.numpy, self.optimize, self.sparse = numpy, optimize, sparse
        bags = layers * heads
        self.count = bags * rules_
        used = layers * rules_ if limit is not None and limit < min(heads, rules_) else 0
        self.size = self.count + used
        one = sparse.kron(sparse.eye(bags), numpy.ones((1, rules_)), format="csr")
        self.constraints = [self._rows(one, 1, 1)]
        for length, row in costs.items():
            mean = numpy.tile(numpy.asarray(row), bags)[None] / bags
            self.constraints.append(self._rows(sparse.csr_matrix(mean), floor * bounds[length], bounds[length] + 1e-9))
        if used:
            # A rule that a head of a layer has counts as used there.
            places = sparse.kron(
                sparse.kron(sparse.eye(layers), numpy.ones((heads, 1))), sparse.eye(rules_), format="csr"
            )
            both = sparse.hstack([sparse.eye(self.count), -places], format="csr")
            self.constraints.append(optimize.LinearConstraint(both, -numpy.inf, 0))
            sums = sparse.kron(sparse.eye(layers), numpy.ones((1, rules_)))
            zero = sparse.csr_matrix((layers, self.count))
            total = sparse.hstack([zero, sums], format="csr")
            self.constraints.append(optimize.LinearConstraint(total, -numpy.inf, limit))
        self.options = {"mip_rel_gap": gap} | ({} if seconds is None else {"time_limit": seconds})

    def _rows(self, matrix: Any, low: float, high: float) -> Any:
        """A constraint on the rules alone."""
        more = self.sparse.csr_matrix((matrix.shape[0], self.size - self.count))
        return self.optimize.LinearConstraint(self.sparse.hstack([matrix, more], format="csr"), low, high)

    def solve(self, objective: Any, held: Sequence[tuple[Any, float, float]] = ()) -> Any | None:
        """0 and 1 for every head and rule, or ``None`` where there is no solution."""
        scale = max(float(abs(objective).max()), 1e-30)
        cost = self.numpy.concatenate([objective / scale, self.numpy.zeros(self.size - self.count)])
        more = []
        for other, low, high in held:
            size = max(float(abs(other).max()), 1e-30)
            row = self.sparse.csr_matrix(other[None] / size)
            more.append(self._rows(row, low / size - 1e-9, high / size + 1e-9))
        found = self.optimize.milp(
            cost, constraints=[*self.constraints, *more], integrality=self.numpy.ones(self.size),
            bounds=self.optimize.Bounds(0, 1), options=self.options,
        )  # fmt: skip
        if found.x is None and found.status == 1:
            raise ValueError(f"seconds={self.options['time_limit']} passed before any plan was found")
        return None if found.x is None else self.numpy.rint(found.x[: self.count])


# --------------------------------------------------------------------------------------------------------------------


def put(
    model: nn.Module, plan: Plan, block: int = 64, sinks: int = 1, length: int | None = None,
    layers: Sequence[int | str] | None = None,
) -> Conversion:  # fmt: skip
    """The model with the spans of a plan, in place; ``restore()`` of what comes back takes them away.

    Args:
        model: causal, of transformers or ours.
        plan: a row for every layer that is converted.
        block, sinks, length: of :class:`attnlib.nn.sparse.moa_spans.SpanHeads`.
        layers: as of :func:`attnlib.convert.swap`.

    Raises:
        ValueError: a plan for another number of layers or heads.
    """
    sites = convertible(model)[0]
    chosen = sites if layers is None else [s for s in sites if s.layer in layers or s.name in layers]
    if len(plan.alphas) != len(chosen):
        raise ValueError(f"the plan is for {len(plan.alphas)} layers, but {len(chosen)} are to be converted")
    rows = {site.name: i for i, site in enumerate(chosen)}

    def make(site: Site) -> Any:
        row = rows[site.name]
        alphas, betas = list(plan.alphas[row]), list(plan.betas[row])
        settings = dict(alphas=alphas, betas=betas, block=block, sinks=sinks, length=length)
        return make_socket(site, "moa-spans", settings)

    return Conversion(swap(model, make, layers), "moa-spans")
