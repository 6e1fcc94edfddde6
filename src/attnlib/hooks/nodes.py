"""Nodes of a model: what its layers write into the residual stream, and how the stream is read out at the end.

A block adds to the stream what its heads and its feed-forward put out::

    x_{l+1} = x_l + sum_h z_{l,h} W_O^{l,h} + b_O + mlp_l(...),      logits = norm(x_L) W_U

A *node* is one of these terms, or what goes into one: ``z`` (a head before the output projection), ``q``, ``k``, ``v``,
``mlp`` (what the feed-forward adds), ``residual`` (the stream at the input of a block; at layer L, of the final norm).
Keys and values are counted by key/value head, of which there are fewer under grouped queries.

:class:`Nodes` finds the parts of Llama-, GPT-2- and BERT-like models of transformers, of timm's and of our own.
:class:`Capture` keeps the values of chosen nodes at chosen positions and nothing else, :class:`Patch` writes values
back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, describe
from ..types import to_list
from .attach import _adapter, _unwrapped
from .blocks import behind_projection, block_of, feed_forward_of, projection_of
from .intervention import Intervention
from .site import Site

#: Kinds of nodes: of a head, and of a layer.
OF_HEADS = ("z", "q", "k", "v")
OF_LAYERS = ("mlp", "residual")
NODES = OF_HEADS + OF_LAYERS

_STAGE = {
    "z": "on_output", "q": "on_qkv", "k": "on_qkv", "v": "on_qkv", "mlp": "on_mlp_output", "residual": "on_block_input",
}  # fmt: skip

#: Names of the norm behind the last block, and of the read-out, in models that do not say.
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "layernorm", "ln_post")
READ_OUTS = ("lm_head", "head", "score", "classifier")


@dataclass(frozen=True, order=True)
class Node:
    """One node of a model.

    Args:
        kind: ``"z"``, ``"q"``, ``"k"``, ``"v"`` of a head; ``"mlp"`` or ``"residual"`` of a layer.
        layer: number of the layer, as its site says; for ``"residual"`` also the number of layers, for what the final
            norm reads.
        head: query head of ``z`` and ``q``, key/value head of ``k`` and ``v``; ``None`` for all of them.

    >>> Node("z", 3, 1)
    Node(kind='z', layer=3, head=1)
    """

    kind: str
    layer: int
    head: int | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, NODES)
        check_int("layer", self.layer, least=0)
        if self.head is not None:
            if self.kind in OF_LAYERS:
                raise ValueError(f"head must be left out for {self.kind!r}, which belongs to a layer, got {self.head}")
            check_int("head", self.head, least=0)


@dataclass(frozen=True)
class Layer:
    """One layer: its site, its block, its output projection and its feed-forward; ``None`` for what is not known."""

    site: Site
    block: nn.Module
    projection: nn.Module
    feed_forward: nn.Module | None
    behind: nn.Module | None  # between projection and stream


def _final_norm(model: nn.Module, layers: Sequence[Layer]) -> nn.Module | None:
    """The norm that reads the stream behind the last block: it stands beside the blocks, or outside around them."""
    names = {module: name for name, module in model.named_modules()}
    path = names[layers[-1].block].rpartition(".")[0]
    while True:
        parent = model.get_submodule(path.rpartition(".")[0])
        for name in FINAL_NORMS:
            found = getattr(parent, name, None)
            if isinstance(found, nn.Module):
                return None if isinstance(found, nn.Identity) else found
        if "." not in path:
            return None
        path = path.rpartition(".")[0]


def _unembedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    if isinstance(found, nn.Module):
        return found
    for name in READ_OUTS:
        found = getattr(model, name, None)
        if isinstance(found, nn.Module) and not isinstance(found, nn.Identity):
            return found
    return None


class Nodes:
    """The parts of a model between which its residual stream runs.

    Args:
        model: any that :func:`attnlib.attach` takes, with self-attention in numbered blocks.
        part: as for :func:`attnlib.attach`.

    Attributes:
        layers: a :class:`Layer` per self-attention, in order.
        norm: what reads the stream behind the last block; ``None`` where blocks end in norms of their own (BERT).
        unembedding: from there to logits; ``None`` in models without a head.

    Raises:
        TypeError: a model whose attention cannot be reached.
        ValueError: attention outside numbered blocks, or without a known output projection.
    """

    def __init__(self, model: nn.Module, part: str | None = None):
        self.model = model = _unwrapped(model)
        sites = [s for s in _adapter(model).sites(model, part) if s.kind == "self"]
        if not sites:
            raise ValueError(f"{type(model).__name__} has no self-attention, so it has no nodes")
        self.layers: list[Layer] = []
        for site in sites:
            try:
                feed = feed_forward_of(model, site)
            except ValueError:
                block_of(model, site)  # a block there must be
                feed = None
            projection, behind = projection_of(model, site), behind_projection(model, site)
            self.layers.append(Layer(site, block_of(model, site), projection, feed, behind))
        self.norm = _final_norm(model, self.layers)
        self.unembedding = _unembedding(model)

    def __len__(self) -> int:
        return len(self.layers)

    def of(self, *kinds: str) -> list[Node]:
        """All nodes of these kinds: a node per head (key/value head for ``k`` and ``v``), or per layer.

        Args:
            kinds: any of :data:`NODES`.
        """
        found: list[Node] = []
        for kind in kinds:
            check_choice("kinds", kind, NODES)
            for number, layer in enumerate(self.layers):
                if kind in OF_LAYERS:
                    found.append(Node(kind, number))
                else:
                    heads = layer.site.kv_heads if kind in "kv" else layer.site.heads
                    found += [Node(kind, number, head) for head in range(heads)]
        return found

    def check(self, node: Node) -> Node:
        """The node, if this model has it.

        Raises:
            ValueError: a layer or a head that does not exist; keys and values are counted by key/value head.
        """
        if not isinstance(node, Node):
            raise TypeError(f"nodes must be attnlib.hooks.Node(kind, layer, head), got {describe(node)}")
        last = len(self) if node.kind == "residual" else len(self) - 1
        if node.layer > last:
            raise ValueError(f"{node} does not exist: {node.kind!r} has layers 0 to {last}")
        if node.head is not None:
            site = self.layers[node.layer].site
            heads = site.kv_heads if node.kind in "kv" else site.heads
            if node.head >= heads:
                what = f"{heads} key/value heads" if node.kind in "kv" else f"{heads} heads"
                raise ValueError(f"{node} does not exist: layer {node.layer} has {what}")
        return node

    @torch.no_grad()
    def output_weight(self, layer: int) -> Tensor:
        """(H, Dv, C) the output projection of a layer by head, with the scale behind it: ``z[h] @ W[h]`` is what head
        ``h`` adds to the stream, whatever kind of linear map it is.

        Raises:
            ValueError: a norm stands between the projection and the stream, so that heads do not add up.
        """
        check_int("layer", layer, least=0, most=len(self) - 1)
        this = self.layers[layer]
        if this.behind is not None and "norm" in type(this.behind).__name__.lower():
            raise ValueError(
                f"layer {layer} ({this.site.name}): a {type(this.behind).__name__} stands behind its output "
                "projection, so what one head adds to the stream depends on the others; patch it instead"
            )
        heads, width = this.site.heads, self._width(this.projection)
        weight = next((p for p in this.projection.parameters() if p.is_floating_point()), None)
        if weight is None:
            raise ValueError(f"layer {layer} ({this.site.name}): its output projection is quantized or has no weights")
        with torch.random.fork_rng([]):
            zero = torch.zeros(1, 1, width, device=weight.device, dtype=weight.dtype)
            each = torch.eye(width, device=weight.device, dtype=weight.dtype)[None]
            rows = (this.projection(each) - this.projection(zero))[0]
        if this.behind is not None:
            rows = this.behind(rows[None])[0]
        return rows.unflatten(0, (heads, width // heads))

    @staticmethod
    def _width(projection: nn.Module) -> int:
        """Width of what a linear map reads."""
        width = getattr(projection, "in_features", None) or getattr(projection, "nx", None)
        if isinstance(width, int):
            return width
        weight: Any = getattr(projection, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(
                f"the output projection, a {type(projection).__name__}, does not say how wide its input is"
            )
        return weight.shape[0 if type(projection).__name__ == "Conv1D" else 1]

    def rows(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Columns of the unembedding for some tokens: (..., C) weights and (...) biases, or ``None``.

        Args:
            tokens: (...) integer.
        """
        weight = getattr(self.unembedding, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"{type(self.model).__name__} has no unembedding with a weight per token: its read-out is "
                f"{type(self.unembedding).__name__}"
            )
        bias = getattr(self.unembedding, "bias", None)
        return weight[tokens], None if bias is None else bias[tokens]


def at_positions(x: Tensor, positions: Sequence[int] | Tensor | None, dim: int, what: str) -> Tensor:
    """The tokens of ``x`` at chosen positions along ``dim``; (B, n) positions choose per sample."""
    if positions is None:
        return x
    index = _places(positions, x.shape[dim], x.device, what)
    if index.dim() == 1:
        return x.index_select(dim, index)
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"positions are for {index.shape[0]} samples, but {what} are of {x.shape[0]}")
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    return x.gather(
        dim, index.reshape(shape).expand(*[index.shape[1] if d == dim else n for d, n in enumerate(x.shape)])
    )


def _places(positions: Sequence[int] | Tensor, count: int, device: torch.device, what: str) -> Tensor:
    index = torch.as_tensor(positions, device=device, dtype=torch.long)
    if index.numel() and (int(index.max()) >= count or int(index.min()) < -count):
        raise ValueError(
            f"positions must lie in [-{count}, {count}) of the {count} tokens of {what}, got {positions!r:.80}"
        )
    return index % count if count else index


def check_positions(positions: Any) -> Any:
    """Positions as given: ``None``, numbers (negative from the end), or (B, n) integers per sample."""
    if positions is None:
        return None
    if isinstance(positions, int) and not isinstance(positions, bool):
        return [positions]
    if isinstance(positions, Tensor):
        if positions.is_floating_point() or positions.dtype == torch.bool or positions.dim() not in (1, 2):
            raise ValueError(
                f"positions must be integers (n,) or (B, n), got {positions.dtype} {tuple(positions.shape)}"
            )
        return positions
    for number, one in enumerate(to_list("positions", positions) or []):
        check_int(f"positions[{number}]", one)
    return list(positions)


class _OnNodes(Intervention):
    """What :class:`Capture` and :class:`Patch` share: which stages and layers a set of nodes needs."""

    follows_sequence: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(self) -> None:
        self._order: dict[str, int] = {}
        self._whole: Nodes | None = None

    def on_attach(self, session: Any) -> None:
        nodes = self._nodes(session.model)
        if any(layer == len(nodes) for layer in self._layers_of("residual")):
            if nodes.norm is None:
                raise ValueError(
                    f"{type(session.model).__name__} has no norm behind its last block, so the residual stream at "
                    f"layer {len(nodes)} cannot be reached"
                )
            session.hook(nodes.norm.register_forward_pre_hook(self._before_norm))

    def _nodes(self, model: nn.Module) -> Nodes:
        if self._whole is None or self._whole.model is not model:
            self._whole = Nodes(model)
        return self._whole

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        nodes = self._nodes(model)
        self._order = {layer.site.name: number for number, layer in enumerate(nodes.layers)}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_whole": None}

    def _before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        depth = len(self._order)
        hidden = args[0]
        grid = hidden.shape[1:-1]
        flat = hidden.flatten(1, -2) if hidden.dim() > 3 else hidden
        new = self._act("residual", depth, flat)
        return None if new is flat else (new.unflatten(1, grid), *args[1:])

    def _layers_of(self, kind: str) -> Iterable[int]:
        raise NotImplementedError

    def _act(self, kind: str, layer: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def on_output(self, site: Site, out: Tensor) -> Tensor:
        return self._act("z", self._order[site.name], out)

    def on_qkv(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number = self._order[site.name]
        return self._act("q", number, q), self._act("k", number, k), self._act("v", number, v)

    def on_mlp_output(self, site: Site, out: Tensor) -> Tensor:
        return self._act("mlp", self._order[site.name], out)

    def on_block_input(self, site: Site, hidden: Tensor) -> Tensor | None:
        new = self._act("residual", self._order[site.name], hidden)
        return None if new is hidden else new


class Capture(_OnNodes):
    """Keep the values of nodes, at the positions asked for; nothing else is kept, and the model runs as it is.

    Args:
        what: kinds of nodes: ``"z"``, ``"q"``, ``"k"``, ``"v"``, ``"mlp"``, ``"residual"``. Queries and keys are as
            the layer caches them, with rotary positions applied where the model does so before it attends.
        layers: layers to look at; ``None`` for all. For ``"residual"`` the stream behind the last block is layer L.
        positions: which tokens of each call: numbers (negative from the end), or (B, n) per sample; ``None`` for all.
        gradients: keep the values as parts of autograd's graph, so that ``torch.autograd.grad(score, value)`` is the
            gradient of what the model made of them; otherwise they are detached.
        calls: ``"last"`` keeps the last call of the model, ``"all"`` a list of all calls.

    Results: ``{kind: {layer: value}}``, a value being (B, H, n, D) for ``z`` and ``q``, (B, Hk, n, D) for ``k`` and
    ``v``, (B, n, C) for ``mlp`` and ``residual``; with ``calls="all"`` a list of them.

    Raises:
        ValueError: an unknown kind, a position outside the call.

    >>> Capture(("z", "mlp"), positions=[-1]).what
    ('z', 'mlp')
    """

    name: ClassVar[str] = "capture"

    def __init__(
        self,
        what: Sequence[str] = ("z",),
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | Tensor | int | None = None,
        gradients: bool = False,
        calls: str = "last",
    ):
        if isinstance(what, str):
            raise TypeError(f"what must be a sequence of names, got the string {what!r}; write what=({what!r},)")
        super().__init__()
        if not what:
            raise ValueError(f"what is empty; choose from {list(NODES)}")
        for name in what:
            check_choice("what", name, NODES)
        check_choice("calls", calls, ("last", "all"))
        self.what, self.positions, self.gradients, self.calls = (
            tuple(what),
            check_positions(positions),
            gradients,
            calls,
        )
        self.chosen = to_list("layers", layers)
        self.uses = {_STAGE[name] for name in self.what}
        self._values: dict[str, dict[int, list[Tensor]]] = {}

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().prepare(model, sites)
        last = len(self._order) if "residual" in self.what else len(self._order) - 1
        for layer in self.chosen or ():
            check_int("layers", layer, least=0, most=last)

    def _layers_of(self, kind: str) -> Iterable[int]:
        return () if kind not in self.what else range(len(self._order) + 1) if self.chosen is None else self.chosen

    def on_attach(self, session: Any) -> None:
        # Without a norm behind the last block there is no stream there to look at.
        if self.chosen is not None or self._nodes(session.model).norm is not None:
            super().on_attach(session)

    def reset(self) -> None:
        self._values = {}

    def _act(self, kind: str, layer: int, x: Tensor) -> Tensor:
        if kind in self.what and (self.chosen is None or layer in self.chosen):
            dim = 2 if kind in OF_HEADS else 1
            # The model goes on with what is kept, so that gradients reach it.
            x = x.clone() if self.gradients else x
            value = at_positions(x if self.gradients else x.detach(), self.positions, dim, "the captured call")
            kept = self._values.setdefault(kind, {}).setdefault(layer, [])
            if self.calls == "last":
                kept.clear()
            kept.append(value)
            if self.gradients and self.positions is not None:
                write_at(x, value, self.positions, dim, "the captured call")
        return x

    def results(self) -> dict[str, dict[int, Any]]:
        last = self.calls == "last"
        return {
            kind: {layer: values[0] if last else list(values) for layer, values in sorted(layers.items())}
            for kind, layers in self._values.items()
        }

    def value(self, node: Node) -> Tensor:
        """The value of a node in the last call: (B, n, D) of a head, (B, H, n, D) of all heads, (B, n, C) of a layer.

        Raises:
            KeyError: it was not captured.
        """
        layers = self._values.get(node.kind, {})
        if node.layer not in layers:
            raise KeyError(f"{node} was not captured; kept are { {k: sorted(v) for k, v in self._values.items()} }")
        value = layers[node.layer][-1]
        if node.head is None:
            return value
        if node.head >= value.shape[1]:
            raise ValueError(f"{node} does not exist: {value.shape[1]} heads were captured")
        return value[:, node.head]

    def values(self, nodes: Iterable[Node]) -> dict[Node, Tensor]:
        """Values of several nodes, as :class:`Patch` takes them."""
        return {node: self.value(node) for node in nodes}


class Patch(_OnNodes):
    """Write values into nodes while the model runs.

    Args:
        values: by node: (B, n, D) for a head, (B, H, n, D) for all heads of a layer, (B, n, C) for a layer; B and n may
            also be 1, for all samples and all positions.
        positions: where, as for :class:`Capture`; ``None`` for all tokens of the call.

    Raises:
        ValueError: no value, a node that the model does not have, a value of another shape, a position outside.

    >>> Patch({Node("z", 0, 1): torch.zeros(1, 1, 8)}, positions=[-1]).nodes
    [Node(kind='z', layer=0, head=1)]
    """

    name: ClassVar[str] = "patch"

    def __init__(
        self,
        values: Mapping[Node, Tensor],
        positions: Sequence[int] | Tensor | int | None = None,
    ):
        super().__init__()
        if not isinstance(values, Mapping) or not values:
            raise ValueError(f"values must map at least one Node to its value, got {describe(values)}")
        for node, value in values.items():
            if not isinstance(node, Node):
                raise TypeError(
                    f"values must map attnlib.hooks.Node(kind, layer, head) to tensors, got {describe(node)}"
                )
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"the value of {node} must be a floating-point tensor, got {describe(value)}")
        self.positions = check_positions(positions)
        self._by_place: dict[tuple[str, int], list[tuple[Node, Tensor]]] = {}
        for node, value in values.items():
            self._by_place.setdefault((node.kind, node.layer), []).append((node, value))
        self.uses = {_STAGE[node.kind] for node in values}

    @property
    def nodes(self) -> list[Node]:
        return [node for entries in self._by_place.values() for node, _ in entries]

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().prepare(model, sites)
        for node in self.nodes:
            self._nodes(model).check(node)

    def _layers_of(self, kind: str) -> Iterable[int]:
        return [layer for name, layer in self._by_place if name == kind]

    def _act(self, kind: str, layer: int, x: Tensor) -> Tensor:
        entries = self._by_place.get((kind, layer))
        if entries is None:
            return x
        new = x.clone()
        for node, value in entries:
            dim = 1 if node.head is not None or kind in OF_LAYERS else 2
            part = new if node.head is None else new[:, node.head]
            write_at(part, value.to(part), self.positions, dim, str(node))
        return new


def write_at(part: Tensor, value: Tensor, positions: Any, dim: int, what: str) -> None:
    """Put ``value`` into ``part`` at the positions along ``dim``."""
    index = None if positions is None else _places(positions, part.shape[dim], part.device, what)
    count = part.shape[dim] if index is None else index.shape[-1]
    wanted = list(part.shape)
    wanted[dim] = count
    fits = value.dim() == part.dim() and all(
        have == want or (have == 1 and d in (0, dim))
        for d, (have, want) in enumerate(zip(value.shape, wanted, strict=True))
    )
    if not fits:
        raise ValueError(
            f"the value of {what} must be {tuple(wanted)} (the batch and the {count} positions may be 1), got "
            f"{tuple(value.shape)}"
        )
    value = value.expand(wanted)
    if index is None:
        part.copy_(value)
    elif index.dim() == 1:
        part.index_copy_(dim, index, value.contiguous())
    else:
        if index.shape[0] != part.shape[0]:
            raise ValueError(f"positions are for {index.shape[0]} samples, but {what} is of {part.shape[0]}")
        shape = [1] * part.dim()
        shape[0], shape[dim] = index.shape
        part.scatter_(dim, index.reshape(shape).expand(wanted), value)
