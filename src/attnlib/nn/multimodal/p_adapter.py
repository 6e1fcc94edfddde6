"""p-Laplacian adapter: attention as a graph whose edges are weighed by how much its nodes differ (Wu et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...types import Traits, check_divides, exactly, stats_dtype
from ..frame import HeadCall, HeadFrame, Notes
from ..layers import merge_heads
from ..registry import register
from ..released import Released, Rule

#: Keeps powers of distances finite.
EPS = 1e-8


class PLaplacianAdapter(nn.Module):
    """One step of p-Laplacian message passing in a bottleneck, gated, beside an attention's output projection.

    With attention ``A`` and node features ``F = Dense(nodes) W_i`` per head,

    ``g_ij = |sqrt(A_ij) (F_j - F_i)|^(p-2)``, ``A~ = A g``, ``alpha_i = 1 / (sum_j A~_ij + 2 mu / p)``,
    ``F'_i = alpha_i (sum_j A~_ij F_j + (2 mu / p) F_i)``, ``y = out + (gelu(out W_g) F') W_o``.

    For ``p < 2`` edges between unlike nodes weigh less than in plain attention only relative to those between like
    ones: a token's edge to itself has distance zero and weighs most, so that in self-attention one step stays close to
    the identity. ``p = 2`` is attention's own message passing.

    Args:
        dim: width of the output projection.
        num_heads: heads of the attention.
        reduction: the bottleneck is ``dim / reduction`` wide.
        p: initial exponent, 1.25 in the paper; learned.
        learn_p: learn it; otherwise it is a setting, and no part of the state dict.
        mu: ``mu_0``; ``mu = mu_0 (2 + tanh(theta))`` with a learned ``theta`` that starts at 0.
        restart: the term ``(2 mu / p) F_i`` also where queries and nodes are different tokens. The authors' code loses
            it there, the paper has it.

    Computed in float32: for ``p < 2``, ``1e-8`` to a negative power does not fit half precision.

    Reference: Wu et al., 2023, arXiv 2312.10613, equations 8 to 12.

    >>> adapter = PLaplacianAdapter(16, num_heads=2)
    >>> adapter(torch.randn(1, 3, 16), torch.rand(1, 2, 3, 3).softmax(-1), torch.randn(1, 3, 16)).shape
    torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int = 8,
        p: float = 1.25,
        learn_p: bool = True,
        mu: float = 0.1,
        restart: bool = True,
    ):
        super().__init__()
        check_divides("reduction", reduction, "dim", dim)
        check_divides("num_heads", num_heads, "dim / reduction", dim // reduction)
        if p <= 0 or mu <= 0:
            raise ValueError(f"p and mu must be positive, got p={p}, mu={mu}")
        self.dim, self.num_heads, self.mu, self.restart = dim, num_heads, mu, restart
        self.inner = nn.Linear(dim, dim // reduction)
        self.gate = nn.Linear(dim, dim // reduction)
        self.outer = nn.Linear(dim // reduction, dim)
        self.p = nn.Parameter(torch.tensor([float(p)])) if learn_p else float(p)
        self.theta = nn.Parameter(torch.zeros(1))

    def pass_messages(self, weights: Tensor, keys: Tensor, queries: Tensor, restart: bool = True) -> Tensor:
        """``F'`` of the queries.

        Args:
            weights: (B, H, N, M) attention.
            keys: (B, H, M, D') features of the nodes that are read.
            queries: (B, H, N, D') features of the nodes that read; the same ones in self-attention.
            restart: keep the term of the node itself.

        Returns:
            (B, H, N, D') in float32.
        """
        dtype = stats_dtype(keys.dtype)
        with exactly(keys):
            a, fk, fq = weights.to(dtype), keys.to(dtype), queries.to(dtype)
            p = self.p.to(dtype) if isinstance(self.p, Tensor) else self.p
            mu = self.mu * (2 + torch.tanh(self.theta.to(dtype)))
            soft = a + EPS
            apart = torch.cdist(fq, fk, compute_mode="donot_use_mm_for_euclid_dist")
            # |sqrt(s) (F_j - F_i) + eps|^2, multiplied out, so that no tensor of pairs has a feature axis.
            # It is masked where nodes are the same: a token's two huge gradients as key and as query would cancel.
            lean = (fk.sum(-1).unsqueeze(-2) - fq.sum(-1).unsqueeze(-1)).masked_fill(apart == 0, 0.0)
            square = soft * apart.square() + 2 * EPS * soft.sqrt() * lean + keys.shape[-1] * EPS**2
            edges = a * square.clamp(min=EPS**2).pow((p - 2) / 2)
            again = 2 * mu / p
            total = edges.sum(-1, keepdim=True) + again
            if not restart:
                return edges @ fk / total
            # F_i + sum_j A~_ij (F_j - F_i) alpha_i. Where p < 2 the edge of a token to itself is millions of times
            # larger than the others; here it stands in the sum of weights only, and nothing large cancels.
            far = edges.masked_fill(apart == 0, 0.0)
            return fq + (far @ fk - far.sum(-1, keepdim=True) * fq) / total

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, out: Tensor, weights: Tensor, nodes: Tensor, queries: Tensor | None = None) -> Tensor:
        """What attention and its output projection gave, adapted.

        Args:
            out: (B, N, C) output of the attention's projection.
            weights: (B, H, N, M).
            nodes: (B, M, C) the values of all heads, through that same projection.
            queries: (B, N, C) the queries, through it, in cross-attention. ``None`` in self-attention: the last N nodes

        Returns:
            (B, N, C).
        """
        n, m = weights.shape[-2:]
        if queries is None and m < n:
            raise ValueError(
                f"weights are {n} by {m}: without queries the nodes are the queries' own, at least as many"
            )
        keys = self._split(self.inner(nodes))
        own = keys[:, :, m - n :] if queries is None else self._split(self.inner(queries))
        moved = self.pass_messages(weights, keys, own, self.restart or queries is None)
        bottle = F.gelu(self.gate(out)) * moved.transpose(1, 2).flatten(2).to(out.dtype)
        return out + self.outer(bottle)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``BertSelfOutput`` (``text_laplacian_adapter_*``, ``laplacian_adapter_*``), whose own
        projection and norm stay out."""
        theirs = Released(state_dict, "the authors' BertSelfOutput")
        theirs.leave(r"(dense|LayerNorm)\.(weight|bias)", because="they are the model's, not the adapter's")
        return theirs.close(theirs.renamed(_adapter_rules("", "")))


class BottleneckAdapter(nn.Module):
    """The paper's second adapter, ``y = x + W_2 relu(W_1 x)``, on what the residual of a feed-forward carries.

    A BERT layer then ends in ``norm(feed_forward(x) + adapter(x))``.

    Args:
        dim: width.
        reduction: the bottleneck is ``dim / reduction`` wide.

    Reference: Wu et al., 2023, arXiv 2312.10613, section 4.1; Houlsby et al., 2019, arXiv 1902.00751.

    >>> BottleneckAdapter(16, reduction=4)(torch.randn(1, 3, 16)).shape
    torch.Size([1, 3, 16])
    """

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__()
        check_divides("reduction", reduction, "dim", dim)
        self.down, self.up = nn.Linear(dim, dim // reduction), nn.Linear(dim // reduction, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return x + self.up(F.relu(self.down(x)))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``BertOutput`` (``text_ffn_adapter.*``), whose own projection and norm stay out."""
        theirs = Released(state_dict, "the authors' BertOutput", wrappers=("text_ffn_adapter.",))
        theirs.leave(r"(dense|LayerNorm)\.(weight|bias)", because="they are the model's, not the adapter's")
        rules: dict[str, Rule] = {
            r"(?:text_ffn_adapter\.)?0\.(weight|bias)": r"down.\1",
            r"(?:text_ffn_adapter\.)?2\.(weight|bias)": r"up.\1",
        }
        return theirs.close(theirs.renamed(rules))


def pool_nodes(weights: Tensor, nodes: Tensor, count: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys of cross-attention averaged to ``count`` nodes, and the columns of attention with them.

    Args:
        weights: (B, H, N, M).
        nodes: (B, M, C).
        count: nodes that are left, runs of neighbouring keys (as ``adaptive_avg_pool1d`` cuts them).
        valid: (B, M) boolean, which keys exist; nodes are means of those.

    Returns:
        (B, H, N, count) and (B, count, C).
    """
    pooled = F.adaptive_avg_pool1d(weights.flatten(1, 2), count).unflatten(1, weights.shape[1:3])
    if valid is None:
        return pooled, F.adaptive_avg_pool1d(nodes.transpose(1, 2), count).transpose(1, 2)
    there = valid.unsqueeze(-1).to(nodes.dtype)
    both = torch.cat([nodes.masked_fill(~valid.unsqueeze(-1), 0.0), there], -1)
    both = F.adaptive_avg_pool1d(both.transpose(1, 2), count).transpose(1, 2)
    share = both[..., -1:]
    return pooled, both[..., :-1] / torch.where(share == 0, torch.ones_like(share), share)


@dataclass
class AdapterNotes(Notes):
    """The attention map, (B, M, C) nodes, their validity, and in cross-attention the queries as nodes."""

    weights: Tensor | None = None
    nodes: Tensor | None = None
    exists: Tensor | None = None
    queries: Tensor | None = None


@register("p-adapter", "p-laplacian-adapter")
class PLaplacianAttention(HeadFrame[AdapterNotes]):
    """Softmax attention with a :class:`PLaplacianAdapter` behind its output projection.

    Freeze everything but ``adapter`` to train as the paper does. In self-attention the nodes are the values; in
    cross-attention the queries read the keys averaged to ``pooled`` nodes.

    Args:
        dim, num_heads, num_kv_heads, ...: as in :class:`HeadFrame`.
        cross: for a context. It takes no mask then: averaged nodes would show hidden keys to every query.
        reduction, p, learn_p, mu, restart: of :class:`PLaplacianAdapter`.
        pooled: nodes of a context; ``None`` for the keys themselves.

    It reads the attention map, so memory is quadratic.

    Reference: Wu et al., 2023, arXiv 2312.10613.

    >>> PLaplacianAttention(dim=16, num_heads=2)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = HeadFrame.class_traits.but(memory={"N": 2})
    notes_type = AdapterNotes

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        *,
        cross: bool = False,
        reduction: int = 8,
        p: float = 1.25,
        learn_p: bool = True,
        mu: float = 0.1,
        restart: bool = True,
        pooled: int | None = 16,
        **settings: Any,
    ):
        if pooled is not None and pooled < 1:
            raise ValueError(f"pooled={pooled} must be at least 1")
        if settings.get("attn_drop"):
            raise ValueError("attn_drop is not possible: the adapter reads the weights themselves")
        for name in ("rotary", "alibi"):
            if cross and settings.get(name):
                raise ValueError(f"{name}={settings[name]!r} is not possible with cross=True")
        check_divides("num_heads", num_heads, "dim", dim)
        if settings.get("head_dim") not in (None, dim // num_heads):
            raise ValueError(
                f"head_dim={settings['head_dim']} is not possible: queries go through the projection of values"
            )
        super().__init__(dim, num_heads, num_kv_heads, **settings)
        self.cross, self.pooled = cross, pooled
        self.adapter = PLaplacianAdapter(dim, num_heads, reduction, p, learn_p, mu, restart)

    @property
    def traits(self) -> Traits:
        traits = super().traits
        kind = "cross" if self.cross else "self"
        return traits.but(
            patterns=frozenset(p for p in traits.patterns if p.endswith(kind)),
            mask=not self.cross,
            layout=not self.cross,
            streaming=traits.streaming and not self.cross,
            memory={"N": 2},
        )

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: AdapterNotes) -> Any:
        out, weights = super()._mix_heads(q, k, v, call.but(return_weights=True), notes)
        if self.cross:
            v = v if call.valid is None else v.masked_fill(~call.valid[:, None, :, None], 0.0)
            notes.queries = self._nodes(q)
        notes.weights, notes.nodes, notes.exists = weights, self._nodes(v), call.valid
        return (out, weights) if call.return_weights else out

    def _nodes(self, heads: Tensor) -> Tensor:
        return merge_heads(heads.repeat_interleave(self.num_heads // heads.shape[1], 1))

    def _project(self, out: Tensor, notes: AdapterNotes, grid: torch.Size) -> Tensor:
        y = self.proj(merge_heads(out))
        weights, nodes, queries = notes.weights, notes.nodes, notes.queries
        assert weights is not None and nodes is not None
        if queries is not None:
            if self.pooled is not None:
                weights, nodes = pool_nodes(weights, nodes, self.pooled, notes.exists)
            queries = self.proj(queries)
        return self.adapter(y, weights, self.proj(nodes), queries).unflatten(1, grid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' BERT attention: ``self.query``, ``output.dense`` and the adapter's names; the LayerNorm
        behind them belongs to the block."""
        theirs = Released(state_dict, "the authors' BertAttention")
        theirs.leave(r"output\.LayerNorm\.(weight|bias)", because="it is behind the residual, in the block")
        rules: dict[str, Rule] = {
            r"self\.(q)uery\.(weight|bias)": r"\1.\2",
            r"self\.(k)ey\.(weight|bias)": r"\1.\2",
            r"self\.(v)alue\.(weight|bias)": r"\1.\2",
            r"output\.dense\.(weight|bias)": r"proj.\1",
        }
        return theirs.close(theirs.renamed(rules | _adapter_rules(r"output\.", "adapter.")))


def _adapter_rules(theirs: str, ours: str) -> dict[str, Rule]:
    """Names of the adapter behind ``theirs``, ours behind ``ours``."""
    maps = {"i": "inner", "gate": "gate", "o": "outer"}
    rules: dict[str, Rule] = {
        rf"{theirs}text_laplacian_adapter_{name}\.(weight|bias)": rf"{ours}{to}.\1" for name, to in maps.items()
    }
    return rules | {f"{theirs}laplacian_adapter_p": f"{ours}p", f"{theirs}laplacian_adapter_mu": f"{ours}theta"}
