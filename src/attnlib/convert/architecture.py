"""Searching architectures with a kind of attention per layer: a space of choices, its cost, a ranker, evolution.

Liu et al., 2022, "Neural Architecture Search on Efficient Transformers and Beyond", arXiv 2207.13955. What softmax
attention likes is not what linear attention likes; so the kind of attention of every layer is searched together with
widths, heads and depths. One network whose layers share weights over their choices is trained on random choices
(:class:`SharedAttention`); a ranker learns which of two architectures is better; evolution looks for the best under a
bound of the cost, counted on modules that are built.

Of the paper only abstract and introduction were at hand. Space and evolution are those of hardware-aware transformers
(Wang et al., 2020, arXiv 2005.14187), which work of this kind builds on; the ranker is a linear one on pairs, where
RankNAS has trees.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..checks import check_choice, check_int, check_real
from ..nn.registry import create

#: A choice for every name of a space.
Gene = dict[str, Any]

KINDS = ("softmax-attention", "cosformer")


@dataclass(frozen=True)
class Space:
    """Names and what each may be.

    >>> space = Space({"dim": (512, 640), "kind0": ("softmax-attention", "cosformer")})
    >>> space.size, space.features({"dim": 640, "kind0": "cosformer"})
    (4, (0.0, 1.0, 0.0, 1.0))
    """

    choices: Mapping[str, tuple[Any, ...]]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("choices must name at least one thing to choose")
        for name, many in self.choices.items():
            if not len(many) or len(set(many)) != len(many):
                raise ValueError(f"choices[{name!r}]={tuple(many)} must be different values, at least one")

    @property
    def size(self) -> int:
        """Architectures."""
        return math.prod(len(many) for many in self.choices.values())

    def check(self, gene: Gene) -> Gene:
        """The gene, or ``ValueError`` where it is none of this space."""
        if set(gene) != set(self.choices):
            raise ValueError(f"a gene must choose {sorted(self.choices)}, got {sorted(gene)}")
        for name, value in gene.items():
            check_choice(name, value, self.choices[name])
        return gene

    def sample(self, rng: random.Random) -> Gene:
        return {name: rng.choice(list(many)) for name, many in self.choices.items()}

    def mutate(self, gene: Gene, rate: float, rng: random.Random) -> Gene:
        """Every choice is drawn anew with probability ``rate``."""
        return {n: rng.choice(list(many)) if rng.random() < rate else gene[n] for n, many in self.choices.items()}

    def cross(self, a: Gene, b: Gene, rng: random.Random) -> Gene:
        """Every choice is that of either parent."""
        return {name: (a if rng.random() < 0.5 else b)[name] for name in self.choices}

    def key(self, gene: Gene) -> tuple[int, ...]:
        """Numbers of the choices."""
        return tuple(self.choices[name].index(gene[name]) for name in self.choices)

    def features(self, gene: Gene) -> tuple[float, ...]:
        """One for what is chosen, zero for all else."""
        return tuple(float(gene[name] == value) for name, many in self.choices.items() for value in many)


def translation_space(layers: int = 6, kinds: Sequence[str] = KINDS) -> Space:
    """Encoders and decoders for translation, as hardware-aware transformers have them, with a kind per attention.

    Args:
        layers: of the encoder; the decoder has 1 to so many.
        kinds: of attention.
    """
    check_int("layers", layers, least=1)
    kinds = tuple(kinds)
    chosen: dict[str, tuple[Any, ...]] = {
        "encoder_dim": (640, 512), "decoder_dim": (640, 512), "decoder_layers": tuple(range(1, layers + 1)),
    }  # fmt: skip
    for i in range(layers):
        chosen |= {f"encoder{i}_ffn": (3072, 2048, 1024), f"encoder{i}_heads": (8, 4), f"encoder{i}_kind": kinds}
        chosen |= {f"decoder{i}_ffn": (3072, 2048, 1024), f"decoder{i}_reads": (1, 2, 3)}
        for part in ("self", "cross"):
            chosen |= {f"decoder{i}_{part}_heads": (8, 4), f"decoder{i}_{part}_kind": kinds}
    return Space(chosen)


# --------------------------------------------------------------------------------------------------------------------
# Cost


@functools.lru_cache(maxsize=4096)
def attention_cost(
    kind: str, dim: int, num_heads: int, n: int, causal: bool = False, m: int | None = None
) -> dict[str, int]:
    """What one attention of the registry costs, counted on a module that is built without memory.

    Args:
        kind: in the registry.
        dim, num_heads: of the module.
        n: tokens.
        causal: of the module.
        m: tokens of a context that it reads instead of its own.

    Returns:
        ``flops`` (two for a multiplication with an addition) and ``params``.

    >>> attention_cost("softmax-attention", 8, 2, 16)["params"]
    288
    """
    with torch.device("meta"):
        module = create(kind, dim=dim, num_heads=num_heads, causal=causal).eval()
        x = torch.empty(1, n, dim)
        context = None if m is None else torch.empty(1, m, dim)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x) if context is None else module(x, context)
    return {"flops": counter.get_total_flops(), "params": sum(p.numel() for p in module.parameters())}


def crossover(dim: int, num_heads: int, longest: int = 1 << 16, kinds: Sequence[str] = KINDS) -> int | None:
    """The first of the lengths 16, 32, 64, ... at which the second kind costs fewer operations than the first."""
    n = 16
    while n <= longest:
        costs = [attention_cost(kind, dim, num_heads, n)["flops"] for kind in kinds]
        if costs[1] < costs[0]:
            return n
        n *= 2
    return None


class SharedAttention(nn.Module):
    """Attention of several kinds over the same projections; :attr:`active` says which.

    Args:
        dim: width.
        num_heads: heads.
        kinds: in the registry, with projections ``q``, ``k``, ``v`` and ``proj`` of one shape.
        options: further settings of every kind.

    >>> m = SharedAttention(8, 2)
    >>> m.active = "cosformer"
    >>> m(torch.randn(1, 5, 8)).shape, sum(p.numel() for p in m.parameters())
    (torch.Size([1, 5, 8]), 288)
    """

    def __init__(self, dim: int, num_heads: int, kinds: Sequence[str] = KINDS, **options: Any):
        super().__init__()
        made = {kind: create(kind, dim=dim, num_heads=num_heads, **options) for kind in kinds}
        first: Any = next(iter(made.values()))
        for kind, module in made.items():
            for name in ("q", "k", "v", "proj"):
                own, shared = getattr(module, name, None), getattr(first, name, None)
                if not isinstance(own, nn.Linear) or not isinstance(shared, nn.Linear):
                    raise ValueError(f"kinds holds {kind!r}, which has no projection {name!r} to share")
                setattr(module, name, shared)
        self.options = nn.ModuleDict(made)
        self._active = next(iter(made))

    @property
    def active(self) -> str:
        return self._active

    @active.setter
    def active(self, kind: str) -> None:
        check_choice("active", kind, tuple(self.options))
        self._active = kind

    @property
    def traits(self) -> Any:
        return self.options[self._active].traits

    def forward(self, x: Tensor, *args: Any, **call: Any) -> Any:
        """As the active kind is called."""
        return self.options[self._active](x, *args, **call)


class SharedWeights(nn.Module):
    """The largest network of a space; every architecture of it works with the leading part of each of its weights.

    Args:
        space: of architectures; the largest takes the largest of every choice that is a number, the first of others.
        build: makes the network of a gene; the weights of all genes have the same names.

    >>> space = Space({"width": (2, 3)})
    >>> shared = SharedWeights(space, lambda gene: nn.Linear(4, gene["width"]))
    >>> shared({"width": 2}, torch.randn(1, 4)).shape, shared.inherit({"width": 3}).weight.shape
    (torch.Size([1, 2]), torch.Size([3, 4]))
    """

    def __init__(self, space: Space, build: Callable[[Gene], nn.Module]):
        super().__init__()
        self.space, self.build = space, build
        self.largest = build({n: max(many) if _counts(many) else many[0] for n, many in space.choices.items()})
        self._built: dict[tuple[int, ...], nn.Module] = {}

    def _empty(self, gene: Gene) -> nn.Module:
        """The architecture without memory; the last ones asked for are kept."""
        key = self.space.key(self.space.check(gene))
        module = self._built.pop(key, None)
        if module is None:
            with torch.device("meta"):
                module = self.build(gene)
        self._built[key] = module
        if len(self._built) > 64:
            self._built.pop(next(iter(self._built)))
        return module.train(self.training)

    def _part(self, module: nn.Module) -> dict[str, Tensor]:
        held = {**dict(self.largest.named_parameters()), **dict(self.largest.named_buffers())}
        part = {}
        for name, own in (*module.named_parameters(), *module.named_buffers()):
            if name not in held or held[name].dim() != own.dim() or any(map(int.__gt__, own.shape, held[name].shape)):
                raise ValueError(f"{name} {tuple(own.shape)} of this architecture is no part of the largest one's")
            part[name] = held[name][tuple(slice(n) for n in own.shape)]
        return part

    def forward(self, gene: Gene, *args: Any, **call: Any) -> Any:
        """What the architecture gives for ``args``; gradients reach the shared weights."""
        module = self._empty(gene)
        return torch.func.functional_call(module, self._part(module), args, call)

    @torch.no_grad()
    def inherit(self, gene: Gene) -> nn.Module:
        """The architecture on its own, with a copy of its weights."""
        module = self.build(self.space.check(gene))
        for name, value in self._part(module).items():
            own = module.get_parameter(name) if name in dict(module.named_parameters()) else module.get_buffer(name)
            own.copy_(value)
        return module.train(self.training)


def _counts(many: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in many)


def network_cost(build: Callable[[], nn.Module], *inputs: Sequence[int]) -> dict[str, int]:
    """Counted operations and parameters of a network that is built without memory.

    Args:
        build: makes it.
        inputs: shapes of the whole numbers it is called with.

    >>> network_cost(lambda: nn.Embedding(5, 4), (1, 3))
    {'flops': 0, 'params': 20}
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module = build().eval()
        module(*(torch.empty(*shape, dtype=torch.long) for shape in inputs))
    return {"flops": counter.get_total_flops(), "params": sum(p.numel() for p in module.parameters())}


# --------------------------------------------------------------------------------------------------------------------
# Ranking and evolution


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Share of pairs in the same order less the share in opposite order; ties count for neither.

    >>> kendall_tau([1, 2, 3], [1, 2, 3]), kendall_tau([1, 2, 3], [3, 2, 1])
    (1.0, -1.0)
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a and b must be as many numbers, at least two, got {len(a)} and {len(b)}")
    total = 0
    for i in range(len(a)):
        for j in range(i):
            product = (a[i] - a[j]) * (b[i] - b[j])
            total += (product > 0) - (product < 0)
    return total / (len(a) * (len(a) - 1) / 2)


class Ranker:
    """Which of two architectures is better: a logistic model of differences of their features.

    Args:
        space: of the architectures.
        pairs: include products of two features, at most so many columns in all.
        decay: weight decay.
    """

    def __init__(self, space: Space, pairs: int = 0, decay: float = 1e-2):
        self.space = space
        self.pairs = check_int("pairs", pairs, least=0)
        self.decay = check_real("decay", decay, least=0)
        self.weight: Tensor | None = None

    def _columns(self, genes: Sequence[Gene]) -> Tensor:
        x = torch.tensor([self.space.features(self.space.check(g)) for g in genes], dtype=torch.float64)
        if not self.pairs:
            return x
        i, j = torch.triu_indices(x.shape[1], x.shape[1], 1)[:, : self.pairs]
        return torch.cat([x, x[:, i] * x[:, j]], 1)

    def fit(self, genes: Sequence[Gene], scores: Sequence[float]) -> Ranker:
        """Learn from architectures and what each scored, the lower the better."""
        if len(genes) != len(scores) or len(genes) < 2:
            raise ValueError(f"genes and scores must be as many, at least two, got {len(genes)} and {len(scores)}")
        x, y = self._columns(genes), torch.tensor(list(scores), dtype=torch.float64)
        better, worse = (y[:, None] < y).nonzero(as_tuple=True)
        if not len(better):
            raise ValueError("scores are all equal, so that nothing can be ranked")
        rows = x[better] - x[worse]
        weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.softplus(-(rows @ weight)).mean() + self.decay * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        self.weight = weight.detach()
        return self

    def predict(self, genes: Sequence[Gene]) -> list[float]:
        """A number for each, the lower the better."""
        if self.weight is None:
            raise ValueError("the ranker has learned nothing yet: call fit() first")
        return (-(self._columns(genes) @ self.weight)).tolist()


@dataclass
class Found:
    """What a search found.

    Args:
        gene, score: the best.
        seen: all that were scored, in order: ``(gene, score)``.
    """

    gene: Gene
    score: float
    seen: list[tuple[Gene, float]] = field(default_factory=list)


class _Scored:
    """Scores of feasible architectures, each asked for once."""

    def __init__(
        self, space: Space, score: Callable[[Gene], float], cost: Callable[[Gene], float] | None, bound: float
    ):
        self.space, self.score, self.cost, self.bound = space, score, cost, bound
        self.known: dict[tuple[int, ...], float] = {}
        self.seen: list[tuple[Gene, float]] = []

    def feasible(self, draw: Callable[[], Gene], tries: int = 1000) -> Gene:
        for _ in range(tries):
            gene = draw()
            if self.cost is None or self.cost(gene) <= self.bound:
                return gene
        raise ValueError(f"none of {tries} architectures costs at most bound={self.bound}")

    def __call__(self, gene: Gene) -> float:
        key = self.space.key(gene)
        if key not in self.known:
            self.known[key] = float(self.score(gene))
            self.seen.append((gene, self.known[key]))
        return self.known[key]

    def found(self) -> Found:
        gene, score = min(self.seen, key=lambda pair: pair[1])
        return Found(gene, score, self.seen)


def evolve(
    space: Space,
    score: Callable[[Gene], float],
    cost: Callable[[Gene], float] | None = None,
    bound: float = math.inf,
    rounds: int = 30,
    population: int = 125,
    parents: int = 25,
    mutants: int = 50,
    rate: float = 0.3,
    seed: int = 0,
) -> Found:
    """The architecture of the lowest score that evolution finds.

    A round keeps the ``parents`` best, ``mutants`` of them are mutated, the rest of the population are crossings; what
    costs too much is drawn again.

    Args:
        space: of architectures.
        score: the lower the better: validation loss with shared weights, or a ranker's.
        cost: of an architecture; ``None`` for none.
        bound: of the cost.
        rounds, population, parents, mutants, rate: sizes, and how often a choice is mutated.
        seed: of all draws.

    Raises:
        ValueError: no architecture within the bound.
    """
    for name, value in (("rounds", rounds), ("population", population), ("parents", parents)):
        check_int(name, value, least=1)
    check_int("mutants", mutants, least=0)
    if parents + mutants > population:
        raise ValueError(f"parents={parents} and mutants={mutants} must fit into population={population}")
    check_real("rate", rate, least=0, most=1)
    rng = random.Random(seed)
    scored = _Scored(space, score, cost, bound)
    living = [scored.feasible(lambda: space.sample(rng)) for _ in range(population)]
    best: list[Gene] = []

    def mutant() -> Gene:
        return space.mutate(rng.choice(best), rate, rng)

    def crossing() -> Gene:
        return space.cross(rng.choice(best), rng.choice(best), rng)

    for _ in range(rounds):
        best[:] = sorted(living, key=scored)[:parents]
        children = [scored.feasible(mutant) for _ in range(mutants)]
        crossed = [scored.feasible(crossing) for _ in range(population - parents - mutants)]
        living = best + children + crossed
    for gene in living:
        scored(gene)
    return scored.found()


def sample_best(
    space: Space, score: Callable[[Gene], float], evaluations: int, cost: Callable[[Gene], float] | None = None,
    bound: float = math.inf, seed: int = 0,
) -> Found:  # fmt: skip
    """The best of so many different random architectures: what a search is held against."""
    check_int("evaluations", evaluations, least=1)
    rng = random.Random(seed)
    scored = _Scored(space, score, cost, bound)
    tries = 0
    while len(scored.seen) < evaluations and tries < 100 * evaluations:
        scored(scored.feasible(lambda: space.sample(rng)))
        tries += 1
    return scored.found()


def kinds_by_depth(genes: Iterable[Gene], kinds: Sequence[str] = KINDS) -> dict[str, dict[str, float]]:
    """How often each kind is chosen, by the name of the choice: ``{"encoder0_kind": {"cosformer": 0.4, ..}}``."""
    counts: dict[str, dict[str, int]] = {}
    for gene in genes:
        for name, value in gene.items():
            if value in kinds:
                row = counts.setdefault(name, dict.fromkeys(kinds, 0))
                row[value] += 1
    return {name: {kind: n / sum(row.values()) for kind, n in row.items()} for name, row in counts.items()}
