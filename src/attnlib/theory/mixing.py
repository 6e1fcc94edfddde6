"""One template for all long-sequence models: ``Y = M(X) V``, with a token-mixing matrix and a fast way to apply it.

Attention, linear attention, low rank, convolutions, samples: they differ in how ``M`` comes about, what it costs and
what must be kept to go on. :func:`mixing_matrix` recovers ``M`` of any mechanism that is linear in its values, by
probing: the values that the layer computes are replaced by unit vectors on their way, while queries and keys stay those
of ``x``. :func:`unified_view` puts the same questions to every mechanism, answered from its claims where it makes any
and by measuring otherwise.

Reference: He and Kabic, 2023, arXiv 2302.06218, of which only the abstract and the notation were at hand: the template
is theirs, the recovery of the matrix is not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..nn.base import Mechanism
from ..normalizers import Normalizer, Softmax
from ..types import Output
from .cascade import Cascade
from .cascades import OPERATORS, Described, attention_cascade


class Mixing(NamedTuple):
    """A mechanism as a matrix: ``mixed[b, i, c] = sum_j matrix[b, g(c), i, j] values[b, j, source[c]] + offset``.

    Args:
        matrix: (B, G, N, M); G is the number of heads where all channels of a head share a matrix, otherwise one per
            channel.
        values: (B, M, Cv) what the layer computes as values; several sources stand one after the other.
        offset: (B, N, C) what is there without values: biases behind them, virtual tokens, terms that bypass them.
        source: (C,) value channel that each mixed channel reads; -1 for none.
        mixed: (B, N, C) what the fast path gives, before the output projection.
    """

    matrix: Tensor
    values: Tensor
    offset: Tensor
    source: Tensor
    mixed: Tensor

    def apply(self, values: Tensor | None = None) -> Tensor:
        """(B, N, C): the matrix times ``values`` (the layer's own by default), plus the offset."""
        v = self.values if values is None else values
        picked = v.index_select(-1, self.source.clamp(min=0)) * (self.source >= 0)
        channels = len(self.source) // self.matrix.shape[1]
        matrix = self.matrix.repeat_interleave(channels, 1)
        return torch.einsum("bcnm,bmc->bnc", matrix, picked) + self.offset


@dataclass(frozen=True)
class Sites:
    """Where a mechanism's values are made, and where they are mixed.

    Args:
        values: (submodule, first row) of each linear map that makes values; the row as a share of the map, or as the
            name of the attribute that says how many rows, counted from the end, are values.
        mixed: the submodule that reads the mixed values, or a torch function of that name.
    """

    values: tuple[tuple[str, float | str], ...]
    mixed: str


#: Mechanisms whose values or mixed values have other names than most.
SITES: dict[str, Sites] = {
    "lightning-attention-2": Sites((("v", 0.0),), "norm"),
    "lightning-attention-tnl": Sites((("v", 0.0),), "norm"),
    "biformer": Sites((("qkv", "dim"),), "proj"),
    "eva": Sites((("v", 0.0),), "norm"),
    "halonet": Sites((("halo.v", 0.0),), "proj"),
    "vmoba": Sites((("qkv", "dim"),), "proj"),
    "shvit": Sites((("qkv", "partial_dim"),), "relu_"),
    "patnet-self-attention": Sites((("qkv", 2 / 3),), "proj"),
    "sg-former": Sites((("kv1", 0.5), ("kv2", 0.5)), "proj"),
}

#: Why some settings of others are not linear in the values; said when the test finds it so.
SOMETIMES: dict[str, str] = {
    "selective-self-attention": "with token_values the temperature of its values is computed from the values",
    "lightning-attention-2": "value_activation acts on the values",
    "lightning-attention-tnl": "value_activation acts on the values",
    "biformer": "a max pool of the values is not linear",
    "hedgehog": "output_norm divides what was mixed by its size",
    "lara": "with value_norms the norms of the values are in its weights",
}

#: Why some mechanisms are no matrix times values.
NOT_LINEAR: dict[str, str] = {
    "abc": "values say themselves how much they count in a slot",
    "based-conv": "a SiLU stands between its convolution and its output map, and a gate multiplies it",
    "crossformer": "its output map reads groups one after another, padding among them, not tokens in their order",
    "danet-channel-attention": "it mixes features, not tokens: its map is features by features",
    "danet-position-attention": "no output map reads what was mixed: scaled, it is added to the tokens",
    "davit": "it mixes features, not tokens: its map is features by features, and reads every token's values",
    "favit": "its groups of channels read summaries of the map of different kinds, with a matrix for each",
    "focalnet": "a GELU stands between the levels of its context, and the gated context is a factor of the query",
    "gaussian-adaptive-attention": "it multiplies every number by a weight of its own; no token reads another's values",
    "hyperzzw-terminator": "a GELU stands behind its convolution, and its values are normed over all places",
    "hilo-litv2": "its two kinds of heads have a matrix and an output map each, side by side",
    "dynamicvis": "tokens that no scan reads are scaled and stay, and the scan computes its steps from what it reads",
    "mhs-vm": "the steps of its scans, and the gate of their variation, are computed from the values that it scans",
    "msvmamba": "the steps and the ways in and out of its states are computed from the values that it scans",
    "vmamba": "the steps and the ways in and out of its states are computed from the values that it scans",
    "bimamba": "its steps, inputs and outputs are computed from the values it scans, which a SiLU bends first",
    "mamba": "its steps, inputs and outputs are computed from the values it scans, which a SiLU bends first",
    "s4d": "an activation bends what its systems read before the output map, and its input is its values",
    "long-short": "its values pass a norm over all heads, which divides them by their own size",
    "bivit": "its values are signs of what makes them, and its output map reads signs of what was mixed",
    "causal-long-short": "its values pass a norm over all heads, which divides them by their own size",
    "mamba2": "its steps, keys and queries come from one map with the values, and a SiLU bends all of them",
    "mambamixer": "its steps, inputs and outputs are computed from the values it scans, along channels as well",
    "mambamixer-channels": "it scans the channels of every token; no token reads another's values",
    "mambaout": "gates multiply what it convolves, and its output map reads channels that were not mixed as well",
    "maxvit": "it is two attentions with a residual and a norm between them, each of which has its own matrix",
    "vwformer": "its values are those of keys folded from neighbouring tokens, behind a ReLU, not of tokens",
    "patnet-partial-attention": "it convolves some channels, and gates others by their own means and deviations",
    "p-adapter": "behind its output projection an adapter reads the values again, through distances between them",
    "moh-vit-aggregated-attention": "it mixes the values of tokens and those of pooled cells, with a matrix for each",
    "tic-msa-conv": "what it mixes goes into a convolution and a ReLU together with its tokens, and into no output map",
    "stvit-super-token": "what its output map reads are super tokens, which tokens read by a matrix of their own",
    "squeeze-excite": "a gate computed from its values multiplies them; no token reads another's",
    "eca": "a gate computed from its values multiplies them; no token reads another's",
    "polarized-self-attention": "a gate computed from its values multiplies them; no token reads another's",
    "ela-efficient-local-attention": "a gate computed from its values multiplies them; no token reads another's",
    "ulsam": "a gate computed from its values multiplies them; no token reads another's",
    "dual-token-vit": "its local branch is an MLP, and what global tokens read of it is pooled and normed",
    "van-large-kernel-attention": "what its large kernel makes of the values multiplies these same values",
    "efficientvit-cascaded-group-attention": "every head's values are made from what the head before it has mixed",
    "overlock-contmix": "windows of two sizes and a convolution meet in normed maps, and a gate multiplies them",
    "spectformer": "its filter mixes the input itself; no map makes values of it, and none reads what was mixed",
    "activator-geglu": "it has a gate for every token and no mixing; values pass a LayerNorm first",
}

_VALUES = (("v", 0.0), ("value", 0.0), ("value_proj", 0.0), ("qkv", 2 / 3), ("kv", 0.5))
_MIXED = ("proj", "output_proj")


def _sites(m: nn.Module) -> Sites:
    slug = getattr(m, "slug", type(m).__name__)
    if slug in SITES and all(hasattr(m, name.partition(".")[0]) for name, _ in SITES[slug].values):
        return SITES[slug]
    for name, share in _VALUES:
        maker = getattr(m, name, None)
        if isinstance(maker, nn.Sequential) and len(maker) and isinstance(maker[-1], nn.Linear):
            name, maker = f"{name}.{len(maker) - 1}", maker[-1]  # a map in several steps: the last one makes them
        if isinstance(maker, nn.Linear):
            for mixed in _MIXED:
                if isinstance(getattr(m, mixed, None), nn.Module):
                    return Sites(((name, share),), mixed)
    raise ValueError(
        f"{slug}: where its values are made and mixed is not known; looked for {[n for n, _ in _VALUES]} and "
        f"{list(_MIXED)}"
    )


class _Probe(TorchFunctionMode):
    """Watches the linear maps that make values, puts others in their place, and keeps what is mixed.

    A map is recognised by its rows, so that a layer may call it as a module, in pieces or beside another one.
    """

    def __init__(self, rows: Sequence[Tensor], mixed: str):
        super().__init__()
        self.rows, self.function = list(rows), mixed
        self.seen: list[Tensor | None] = [None] * len(self.rows)
        self.probes: list[Tensor] | None = None
        self.mixed: Tensor | None = None
        self.read = 0

    def reads(self, mixed: Tensor) -> None:
        """The mixed values arrive where they are read."""
        self.mixed, self.read = mixed.clone(), self.read + 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == self.function and self.mixed is None:
            self.mixed = args[0].clone()
        out = func(*args, **kwargs)
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            for number, rows in enumerate(self.rows):
                start = self._find(weight, rows)
                if start is None:
                    continue
                where = slice(start, start + len(rows))
                self.seen[number] = out[..., where].clone()
                if self.probes is not None:
                    out = out.clone()
                    out[..., where] = self.probes[number].view_as(out[..., where])
        return out

    @staticmethod
    def _find(weight: Tensor, rows: Tensor) -> int | None:
        if weight.shape[1:] != rows.shape[1:] or len(weight) < len(rows):
            return None
        starts = (weight[: len(weight) - len(rows) + 1] == rows[0]).all(-1).nonzero().flatten().tolist()
        return next((s for s in starts if torch.equal(weight[s : s + len(rows)], rows)), None)


@torch.no_grad()
def mixing(mechanism: nn.Module, x: Tensor, context: Tensor | None = None, **call: Any) -> Mixing:
    """The token-mixing matrix of a mechanism at ``x``, with all that is needed to apply it.

    It takes as many calls of the layer as there are tokens to read, and a few more.

    Args:
        mechanism: a module whose output is linear in its values; put in eval for the time being.
        x: (B, *grid, C).
        context: (B, *grid', C') for cross-attention.
        call: further arguments of the layer (a plan, a mask, a carry).

    Returns:
        :class:`Mixing`; its :meth:`~Mixing.apply` equals its ``mixed``.

    Raises:
        ValueError: a mechanism that is no matrix times values, with the reason; found by name, or by testing.

    >>> import attnlib
    >>> m = attnlib.create("softmax-attention", dim=8, num_heads=2, causal=True)
    >>> mixing(m, torch.randn(1, 5, 8)).matrix.shape
    torch.Size([1, 2, 5, 5])
    """
    slug = getattr(mechanism, "slug", type(mechanism).__name__)
    if slug in NOT_LINEAR:
        raise ValueError(f"{slug} has no mixing matrix: {NOT_LINEAR[slug]}")
    if slug == "pointer-networks":
        return _pointers(mechanism, x, context, **call)
    sites, training = _sites(mechanism), mechanism.training
    rows = []
    for name, share in sites.values:
        maker: Any = mechanism.get_submodule(name)
        weight = (maker.folded() if hasattr(maker, "folded") else maker).weight  # as it is called in eval
        first = len(weight) - getattr(mechanism, share) if isinstance(share, str) else round(len(weight) * share)
        rows.append(weight[first:])

    def run(probes: list[Tensor] | None) -> _Probe:
        probe = _Probe(rows, sites.mixed)
        probe.probes = probes
        handle = None
        if isinstance(getattr(mechanism, sites.mixed, None), nn.Module):
            handle = mechanism.get_submodule(sites.mixed).register_forward_pre_hook(
                lambda _, args: probe.reads(args[0])
            )
        try:
            with probe:
                mechanism(x, **call) if context is None else mechanism(x, context, **call)
        finally:
            if handle is not None:
                handle.remove()
        return probe

    mechanism.eval()
    try:
        return _solve(slug, x, run)
    finally:
        mechanism.train(training)


def _solve(slug: str, x: Tensor, run: Any) -> Mixing:
    batch = x.shape[0]
    plain = run(None)
    if plain.mixed is None or any(s is None for s in plain.seen):
        raise ValueError(f"{slug}: the layer did not make its values, or did not mix them, where they were looked for")
    if plain.read > 1:
        raise ValueError(
            f"{slug} has no mixing matrix: its output map reads {plain.read} things, not only mixed values"
        )
    seen = plain.seen
    widths, counts = [s.shape[-1] for s in seen], [s[0].numel() // s.shape[-1] for s in seen]
    total = sum(counts)
    mixed = plain.mixed.reshape(batch, -1, plain.mixed.shape[-1])

    def out(values: list[Tensor]) -> Tensor:
        """Mixed values (B, N, C) of given values, (B, M_s, C_s) each."""
        return run(values).mixed.reshape(mixed.shape)

    zeros = [x.new_zeros(batch, n, w) for n, w in zip(counts, widths, strict=True)]
    offset = out(zeros)

    def at(site: int, fill: Any) -> list[Tensor]:
        """Zeros but for one site."""
        values = [z.clone() for z in zeros]
        values[site] = values[site] + fill
        return values

    matrix = x.new_zeros(batch, mixed.shape[-1], mixed.shape[1], total)
    source = torch.full((mixed.shape[-1],), -1)
    start, first = 0, 0
    for site, (count, width) in enumerate(zip(counts, widths, strict=True)):
        for j in range(count):
            unit = x.new_zeros(count, 1)
            unit[j] = 1.0
            matrix[..., start + j] += (out(at(site, unit)) - offset).transpose(1, 2)
        # Which value channel a mixed channel reads, bit by bit of its number, on random tokens.
        pattern = torch.rand(count, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x) + 0.5
        base = out(at(site, pattern)) - offset
        size = base.abs().amax((0, 1))
        reached = size > 1e-9 * base.abs().max().clamp(min=1e-30)
        number = torch.zeros(len(source), dtype=torch.long)
        for bit in range(max(1, (width - 1).bit_length())):
            chosen = (torch.arange(width) >> bit & 1).to(x)
            part = (out(at(site, pattern * chosen)) - offset).abs().amax((0, 1)) / size.clamp(min=1e-30)
            number += (part > 0.5).long() << bit
        source = torch.where(reached.cpu(), number + first, source)
        start, first = start + count, first + width
    values = x.new_zeros(batch, total, first)
    start, first = 0, 0
    for s, count, width in zip(seen, counts, widths, strict=True):
        values[:, start : start + count, first : first + width] = s.reshape(batch, count, width)
        start, first = start + count, first + width
    found = Mixing(_by_head(matrix), values, offset, source, mixed)
    tolerance = 1e-8 if x.dtype == torch.float64 else 1e-4
    for given, expected in (
        (values, mixed),
        (-2.0 * values, out([-2.0 * s.reshape(batch, -1, w) for s, w in zip(seen, widths, strict=True)])),
    ):
        error = float((found.apply(given) - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not error <= tolerance:
            raise ValueError(
                f"{slug} has no mixing matrix: what it mixes is not a linear function, channel by channel, of its "
                f"values (off by {error:.1e}){'; ' + SOMETIMES[slug] if slug in SOMETIMES else ''}"
            )
    return found


def _by_head(matrix: Tensor) -> Tensor:
    """(B, C, N, M) as (B, G, N, M) for the fewest groups of neighbouring channels that share a matrix."""
    channels, tiny = matrix.shape[1], 1e-9 if matrix.dtype == torch.float64 else 1e-5
    scale = matrix.abs().max().clamp(min=1e-30)
    for groups in range(1, channels):
        if channels % groups:
            continue
        grouped = matrix.unflatten(1, (groups, channels // groups))
        if bool(((grouped - grouped[:, :, :1]).abs() <= tiny * (scale + grouped.abs())).all()):
            return grouped[:, :, 0].contiguous()
    return matrix


def _pointers(m: nn.Module, x: Tensor, context: Tensor | None, **call: Any) -> Mixing:
    """Its values are the tokens themselves, or with a glimpse their projection, and it returns its weights."""
    out = m(x, returns=("weights",), **call) if context is None else m(x, context, returns=("weights",), **call)
    source = x if context is None else context
    source = m.w1(source) if getattr(m, "glimpse", False) else source  # type: ignore[operator]
    channels = torch.arange(source.shape[-1])
    return Mixing(out.weights, source, torch.zeros_like(out.y), channels, out.y)


def mixing_matrix(mechanism: nn.Module, x: Tensor, context: Tensor | None = None, **call: Any) -> Tensor:
    """The token-mixing matrix (B, heads or channels, N, M) of a mechanism at ``x``; see :func:`mixing`.

    >>> import attnlib
    >>> m = attnlib.create("sigmoid-attention", dim=8, num_heads=2)
    >>> x = torch.randn(1, 5, 8)
    >>> torch.allclose(mixing_matrix(m, x), m(x, returns=("weights",)).weights, atol=1e-6)
    True
    """
    return mixing(mechanism, x, context, **call).matrix


# --------------------------------------------------------------------------------------------------------------------
# The table

#: How the operators form their matrix, and its structure.
FORMS: dict[str, str] = {
    "attention": "normalised scores of every pair, full",
    "attention_partial": "normalised scores, parts of the keys merged",
    "split_decoding": "normalised scores of every pair, the keys split among workers",
    "split_partial": "normalised scores, the keys split among workers",
    "window_attention": "normalised scores inside windows: block-diagonal after a permutation",
    "partition_attention": "normalised scores inside groups: block-diagonal after a permutation",
    "halo_attention": "normalised scores of a block and its halo: a band of blocks",
    "neighborhood_attention": "normalised scores of a band around each query",
    "neighborhood_partial": "normalised scores of a band, merged with other keys",
    "block_sparse_attention": "normalised scores of chosen blocks: sparse by a plan",
    "block_sparse_partial": "normalised scores of chosen blocks, merged with other keys",
    "reduced_attention": "normalised scores of summaries: low rank in the tokens",
    "agent_attention": "product of two normalised maps through few agents: low rank",
    "reversed_attention": "scores normalised over the readers of a token: full, columns of a given sum",
    "linear_attention": "products of features, times decay: low rank below the diagonal",
    "linear_partial": "products of features, times decay, merged with other keys",
    "selective_scan": "products of entries and readers, times decay: one matrix per channel",
    "toeplitz_attention": "products of features times a Toeplitz factor",
    "deformable_attention": "predicted weights at predicted places: few entries per row",
    "deformable_attention_3d": "predicted weights at predicted places in a volume: few entries per row",
    "channel_attention": "mixes features, not tokens: the map is features by features",
    "depthwise": "a convolution: fixed, Toeplitz, one matrix per channel",
    "pyramid": "chained convolutions with activations between them",
    "mixed_depthwise": "convolutions of several sizes: fixed, Toeplitz",
    "pool": "a mean over tokens: constant, rank one",
    "gated_sum": "a gate per token and context",
    "modulate": "a factor per token: diagonal",
}

_SIDES = {1: ((8,), (12,), (16,), (32,)), 2: ((4, 4), (6, 6), (7, 7), (8, 8)), 3: ((2, 4, 4), (4, 4, 4))}


def operators_of(mechanism: type | nn.Module) -> list[str]:
    """Names of the operators of :mod:`attnlib.ops` that a mechanism's module, or one it builds on, uses.

    >>> import attnlib
    >>> operators_of(attnlib.create("softmax-attention", dim=8, num_heads=2))
    ['attention']
    """
    cls = mechanism if isinstance(mechanism, type) else type(mechanism)
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if base is Mechanism or base.__module__.startswith(("torch.", "builtins")):
            continue
        for name, value in vars(sys.modules[base.__module__]).items():
            if name in FORMS and getattr(value, "__module__", "").startswith("attnlib.ops"):
                found[name] = None
    return list(found)


def cascades_of(mechanism: type | nn.Module) -> list[tuple[Described, Cascade]]:
    """The cascades that describe a mechanism's operators, with its own normalizer where it has one.

    >>> import attnlib
    >>> [c.passes() for _, c in cascades_of(attnlib.create("sigmoid-attention", dim=8, num_heads=2))]
    [1]
    """
    used, out = set(operators_of(mechanism)), []
    for name, described in OPERATORS.items():
        if not used & set(described.functions) or name == "merge":
            continue
        if name != "attention":
            out.append((described, described.cascade()))
            continue
        for normalizer in _normalizers(mechanism):
            try:
                out.append((described, attention_cascade(normalizer, bias=False)))
            except ValueError:  # a normalizer of the user's own: what it does is not described
                continue
    return out


def _normalizers(mechanism: type | nn.Module) -> list[Normalizer]:
    """How a mechanism normalises: its ``normalizer``, or those that its own module names."""
    cls = mechanism if isinstance(mechanism, type) else type(mechanism)
    own = None if isinstance(mechanism, type) else getattr(mechanism, "normalizer", None)
    if isinstance(own, Normalizer) and not isinstance(own, Softmax):
        return [own]
    named = [
        value
        for value in vars(sys.modules[cls.__module__]).values()
        if isinstance(value, type) and issubclass(value, Normalizer) and value.name
    ]
    return [kind() for kind in named] or [Softmax()]


def _inputs(m: Any) -> tuple[Tensor, Tensor | None] | None:
    """A small input that the mechanism takes."""
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in m.parameters()), torch.float32)
    cross = not any(p.endswith("self") for p in m.traits.patterns)
    if cross and not hasattr(m, "context_dim"):
        return None  # a fusion of two streams
    for rank in sorted(m.traits.grid_ranks):
        for grid in _SIDES[rank]:
            x = torch.randn((1, *grid, m.dim), generator=generator).to(dtype)
            context = torch.randn((1, *grid, m.context_dim), generator=generator).to(dtype) if cross else None
            try:
                with torch.no_grad():
                    m(x) if context is None else m(x, context)
            except (ValueError, TypeError, RuntimeError, NotImplementedError):
                continue
            return x, context
    return None


def matrix_facts(m: Any) -> dict[str, Any]:
    """What the mixing matrix of this instance is like, measured on a small random input; ``{}`` when none fits.

    Returns:
        ``linear`` (and ``why`` it is not), ``shape``, ``data_dependent``, ``rows_sum_to_one``, ``nonnegative``,
        ``causal``, ``toeplitz``, ``rank`` (numerical, the largest of all heads) and ``offset``.
    """
    given = _inputs(m)
    if given is None:
        return {}
    x, context = given
    try:
        one = mixing(m, x, context)
        other = mixing(m, torch.roll(x, 1, -1) + 0.3, None if context is None else torch.roll(context, 1, -1) + 0.3)
    except ValueError as error:
        return {"linear": False, "why": str(error)}
    a = one.matrix.double()
    n, k = a.shape[-2:]
    square = n == k
    live = a[:, a.abs().amax((0, 2, 3)) > 0]
    tiny = 1e-5 * float(a.abs().max())
    diagonals = [live.diagonal(d, -2, -1) for d in range(1 - n, k)] if square else []
    return {
        "linear": True,
        "shape": tuple(a.shape[1:]),
        "data_dependent": a.shape != other.matrix.shape or bool((a - other.matrix).abs().max() > tiny),
        "rows_sum_to_one": bool((live.sum(-1) - 1).abs().max() < 1e-4),
        "nonnegative": bool((live >= -tiny).all()),
        "causal": square and bool(live.triu(1).abs().max() <= tiny),
        "toeplitz": square and all(bool((d - d[..., :1]).abs().max() <= tiny) for d in diagonals),
        "rank": int(torch.linalg.matrix_rank(live, rtol=1e-5).max()),
        "offset": bool(one.offset.abs().max() > tiny),
    }


def state_growth(m: Any) -> tuple[int, int] | None:
    """(elements of the state that stay, elements per token) of a mechanism that decodes; ``None`` when it does not."""
    if not m.traits.streaming:
        return None
    sizes = []
    with torch.no_grad():
        for n in (96, 192, 384):  # beyond the windows of defaults
            x = torch.zeros(1, n, m.dim, dtype=next((p.dtype for p in m.parameters()), torch.float32))
            out = m(x, returns=("state",))
            assert isinstance(out, Output) and out.state is not None
            sizes.append(sum(t.numel() for t in _leaves(out.state)))
    per_token = (sizes[2] - sizes[1]) // 192
    return sizes[2] - 384 * per_token, per_token


def _leaves(state: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, Tensor)]


def _growth(exponents: Mapping[str, float]) -> str:
    said = " ".join(s if e == 1 else f"{s}^{e:g}" for s, e in exponents.items() if e)
    return said or "1"


def _instance(mechanism: Any) -> Any:
    """An instance to measure: the one given, or a small one of the class, causal where it can be."""
    if not isinstance(mechanism, type):
        return mechanism
    for config in ({"dim": 16, "num_heads": 2}, {"dim": 16}, {"dim": 64}):
        try:
            m = mechanism(**config).eval()
        except (TypeError, ValueError):
            continue
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # what starts at zero would hide what it does
            for p in m.parameters():
                if p.numel() and not p.any():
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        return m
    return None


def unified_view(mechanism: type | nn.Module) -> dict[str, str]:
    """A mechanism in the template ``Y = M(X) V``: how ``M`` is formed, what it is like, cost and state.

    Args:
        mechanism: an instance, or a class, of which a small instance with default settings is then measured.

    Returns:
        Rows of the table that ``attnlib info`` prints.

    >>> import attnlib
    >>> unified_view(attnlib.create("softmax-attention", dim=8, num_heads=2, causal=True))["state"]
    '17 elements per token and 1 fixed'
    """
    m = _instance(mechanism)
    bound: Any = getattr(mechanism, "class_traits", None)
    traits = bound if m is None else m.traits
    used = operators_of(mechanism)
    table = {"formed by": "; ".join(f"{name}: {FORMS[name]}" for name in used) or "its own code"}
    facts = {} if m is None else matrix_facts(m)
    if not facts:
        table["matrix"] = "not measured: no small input fits" if m is not None else "not measured: needs settings"
    elif not facts["linear"]:
        table["matrix"] = facts["why"]
    else:
        groups, n, k = facts["shape"]
        heads = getattr(m, "num_heads", None)
        each = "head" if groups == heads else "all channels" if groups == 1 else "group of channels"
        said = [
            f"{n} x {k} per {each}",
            "from the data" if facts["data_dependent"] else "fixed",
            "rows sum to 1" if facts["rows_sum_to_one"] else "rows do not sum to 1",
            *(["no negative entries"] if facts["nonnegative"] else ["negative entries"]),
            *(["causal"] if facts["causal"] else []),
            *(["Toeplitz"] if facts["toeplitz"] else []),
            f"rank {facts['rank']}",
            *(["plus what bypasses the values"] if facts["offset"] else []),
        ]
        table["matrix"] = ", ".join(said)
    table["work"], table["memory"] = _growth(traits.work), _growth(traits.memory)
    streams = m
    if isinstance(mechanism, type) and m is not None and not m.traits.streaming and bound.streaming:
        try:
            streams = mechanism(dim=m.dim, causal=True).eval()  # type: ignore[call-arg]
        except (TypeError, ValueError):
            streams = m
    growth = None if streams is None else state_growth(streams)
    if growth is None:
        table["state"] = "none: it does not decode step by step" if not traits.streaming else "not measured"
    else:
        fixed, per_token = growth
        table["state"] = f"{per_token} elements per token and {fixed} fixed" if per_token else f"{fixed} elements"
        if streams is not m:
            table["state"] += " (causal)"
    return table


def passes_table(mechanism: type | nn.Module) -> list[dict[str, Any]]:
    """Passes, footprint and traffic of the operators of a mechanism, one row each.

    Ranks by letter: M keys, P queries, E and F widths of queries and values, T tokens, D and C features, A agents. The
    traffic is that of one sample and head with everything in one tile, a lower bound.

    >>> import attnlib
    >>> import attnlib
    >>> passes_table(attnlib.create("softmax-attention", dim=8, num_heads=2))[0]["keeps"]
    'E + F + 2'
    """
    m = _instance(mechanism)
    return [
        {
            "operator": c.name,
            "passes": c.passes(),
            "over": described.along,
            "keeps": c.footprint_text(),
            "traffic": c.traffic_text(),
        }
        for described, c in cascades_of(mechanism if m is None else m)
    ]
