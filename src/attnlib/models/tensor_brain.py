"""The Tensor Brain (Tresp et al., 2020): symbols that are read from a state and written back into it.

Concepts have an *index* (a symbol) and an *embedding* ``a_k``, the weights between the index and the *representation
layer* ``q``. Sensory features excite that layer; an index is read from it, and its embedding is written back:

* read-out: ``P(k | q) = softmax_k(a_k . g(q) + b_k)`` over the admissible indices (entities, predicates or times);
* write: ``q <- alpha q + a_k``; by ``"soft"`` attention it is the mean of the embeddings, with keys and values alike;
* working memory: ``h <- tanh(B q + C h)``, and the next step starts from ``q = f(view) + W h``.

A scene is perceived as subject, object, predicate, each step with its own view. *Episodic* memory starts from the index
of a time without any view, *semantic* memory from nothing at all.

Our reading: the series of papers has no code; ``alpha``, the squashing ``g``, the memory's form and the order of the
steps are unsure, and options.

Reference: Tresp, Sharifzadeh, Konopatzki, Ma, 2020, arXiv 2001.11027.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_axes, check_choice, check_flag, check_int, check_real, check_within, checked
from ..ops import attention

KINDS = ("entity", "predicate", "time")
SQUASH = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "identity": lambda x: x}
ORDERS = {"SOP": ("subject", "object", "predicate"), "SPO": ("subject", "predicate", "object")}
MODES = ("best", "sample", "soft")


class Perceived(NamedTuple):
    """Log-probabilities of each step by role, (B, entities) or (B, predicates), and what was chosen, (B,) each."""

    log_probs: dict[str, Tensor]
    chosen: dict[str, Tensor]

    def of(self, triples: Tensor) -> Tensor:
        """(B,) log-probability of subject, object, predicate (B, 3): exact where these were written in."""
        roles = ("subject", "object", "predicate")
        return sum(self.log_probs[r].gather(1, triples[:, i : i + 1])[:, 0] for i, r in enumerate(roles))  # type: ignore[return-value]


class TensorBrain(nn.Module):
    """Index layer, representation layer and working memory.

    Args:
        entities, predicates, times: numbers of indices.
        sensory_dim: width of a view.
        dim: of the representation layer.
        memory_dim: of the working memory; 0 for none.
        order: ``"SOP"`` or ``"SPO"`` (unsure).
        alpha: what is kept of the layer when an embedding is written (unsure).
        squash: ``g``: ``"sigmoid"``, ``"tanh"`` or ``"identity"`` (unsure).

    >>> brain = TensorBrain(5, 3, sensory_dim=8)
    >>> views = {role: torch.randn(2, 8) for role in ("subject", "object", "predicate")}
    >>> brain(views).log_probs["predicate"].exp().sum(-1).allclose(torch.ones(2))
    True
    """

    @checked
    def __init__(
        self, entities: int, predicates: int, times: int = 0, sensory_dim: int = 64, dim: int = 64,
        memory_dim: int = 64, order: str = "SOP", alpha: float = 1.0, squash: str = "sigmoid",
    ):  # fmt: skip
        super().__init__()
        for name, value in (
            ("entities", entities),
            ("predicates", predicates),
            ("sensory_dim", sensory_dim),
            ("dim", dim),
        ):
            check_int(name, value, least=1)
        check_int("times", times, least=0)
        check_int("memory_dim", memory_dim, least=0)
        check_choice("order", order, ORDERS)
        check_choice("squash", squash, SQUASH)
        check_real("alpha", alpha)
        self.sensory_dim, self.dim, self.memory_dim = sensory_dim, dim, memory_dim
        self.order, self.alpha, self.squash = order, alpha, squash
        counts = dict(zip(KINDS, (entities, predicates, times), strict=True))
        self.embedding = nn.ParameterDict({k: nn.Parameter(torch.randn(n, dim) * dim**-0.5) for k, n in counts.items()})
        self.bias = nn.ParameterDict({k: nn.Parameter(torch.zeros(n)) for k, n in counts.items()})
        self.sense = nn.Linear(sensory_dim, dim)
        if memory_dim:
            self.enter, self.keep = nn.Linear(dim, memory_dim), nn.Linear(memory_dim, memory_dim, bias=False)
            self.leave = nn.Linear(memory_dim, dim, bias=False)

    def read(self, state: Tensor, kind: str) -> Tensor:
        """``state`` (B, dim) to log-probabilities (B, indices of that kind); all other indices have none."""
        check_choice("kind", kind, KINDS)
        check_axes("state", state, B=None, dim=self.dim)
        if not len(self.bias[kind]):
            raise ValueError(f"kind={kind!r} has no index; add_indices({kind!r}, ...) makes some")
        return F.linear(SQUASH[self.squash](state), self.embedding[kind], self.bias[kind]).log_softmax(-1)

    def write(self, state: Tensor, kind: str, index: Tensor) -> Tensor:
        """``alpha q + a_k`` for indices (B,)."""
        check_within("index", index, len(self.embedding[kind]), kind)
        return self.alpha * state + self.embedding[kind][index]

    def attend(self, state: Tensor, kind: str) -> Tensor:
        """``alpha q`` plus the mean embedding under the read-out: one step of attention, its keys its values."""
        check_choice("kind", kind, KINDS)
        rows = self.embedding[kind][None, None].expand(len(state), 1, -1, -1)
        asked = SQUASH[self.squash](state)[:, None, None]
        bias = self.bias[kind][None, None]
        found: Tensor = attention(asked, rows, rows, scale=1.0, bias=bias)  # type: ignore[assignment]
        return self.alpha * state + found[:, 0, 0]

    def forward(
        self, views: dict[str, Tensor] | None = None, triples: Tensor | None = None, time: Tensor | None = None,
        mode: str = "best", memory: bool = True, count: int | None = None, generator: torch.Generator | None = None,
    ) -> Perceived:  # fmt: skip
        """Perceive, or remember, a triple.

        Args:
            views: by role (B, sensory_dim): ``subject``, ``object``, ``predicate``; none for what is remembered.
            triples: (B, 3) subject, object, predicate to write in place of what was read (teacher forcing).
            time: (B,) index of a time whose embedding is written first.
            mode: what is written: the ``"best"`` index, a ``"sample"``, or the ``"soft"`` mean.
            memory: off cuts the working memory between steps.
            count: B, where nothing else says it.
            generator: of samples.
        """
        check_choice("mode", mode, MODES)
        check_flag("memory", memory)
        given = [*(views or {}).values(), *(t for t in (triples, time) if t is not None)]
        batch = len(given[0]) if given else check_int("count", 1 if count is None else count, least=1)
        if views is not None and set(views) != set(ORDERS["SOP"]):
            raise ValueError(f"views must be of subject, object and predicate, got {sorted(views)}")
        if triples is not None:
            check_axes("triples", triples, B=batch, roles=3)
        like = self.sense.weight
        kept = like.new_zeros(batch, self.memory_dim)
        start = like.new_zeros(batch, self.dim)
        if time is not None:
            check_axes("time", time, B=batch)
            start = self.write(start, "time", time)
            kept = self._remember(start, kept)
        log_probs, chosen = {}, {}
        for role in ORDERS[self.order]:
            kind = "predicate" if role == "predicate" else "entity"
            state = start
            if views is not None:
                check_axes(f"views[{role!r}]", views[role], B=batch, sensory_dim=self.sensory_dim)
                state = state + self.sense(views[role])
            if self.memory_dim and memory:
                state = state + self.leave(kept)
            log_probs[role] = self.read(state, kind)
            index = log_probs[role].argmax(-1)
            if mode == "sample":
                index = torch.multinomial(log_probs[role].detach().exp(), 1, generator=generator)[:, 0]
            if triples is not None:
                index = triples[:, ORDERS["SOP"].index(role)]
            chosen[role] = index
            soft = mode == "soft" and triples is None
            kept = self._remember(self.attend(state, kind) if soft else self.write(state, kind, index), kept)
        return Perceived(log_probs, chosen)

    def _remember(self, state: Tensor, kept: Tensor) -> Tensor:
        return (self.enter(state) + self.keep(kept)).tanh() if self.memory_dim else kept

    def triples(self, time: int | None = None) -> Tensor:
        """(entities, entities, predicates) probabilities of triples without any view: semantic memory, or a time's."""
        entities, predicates = (len(self.bias[k]) for k in ("entity", "predicate"))
        pairs = torch.cartesian_prod(torch.arange(entities), torch.arange(entities), torch.arange(predicates))
        when = None if time is None else torch.full((len(pairs),), check_int("time", time, least=0))
        return (
            self(triples=pairs.to(self.sense.weight.device), time=when)
            .of(pairs)
            .exp()
            .view(entities, entities, predicates)
        )

    def trilinear(self, subject: Tensor, object: Tensor) -> Tensor:
        """Logits (B, predicates) with product pooling and no memory: DistMult's ``sum_r a_s a_o a_p``."""
        e = self.embedding["entity"]
        return F.linear(e[subject] * e[object], self.embedding["predicate"])

    @torch.no_grad()
    def add_indices(self, kind: str, count: int, std: float | None = None) -> None:
        """New indices of a kind; the old ones' embeddings, and so the ratios of their probabilities, stay as they are.

        Make the optimizer anew afterwards.
        """
        check_choice("kind", kind, KINDS)
        check_int("count", count, least=1)
        old, bias = self.embedding[kind], self.bias[kind]
        new = torch.randn(count, self.dim, dtype=old.dtype, device=old.device) * (
            self.dim**-0.5 if std is None else std
        )
        self.embedding[kind] = nn.Parameter(torch.cat([old, new]))
        self.bias[kind] = nn.Parameter(torch.cat([bias, bias.new_zeros(count)]))
