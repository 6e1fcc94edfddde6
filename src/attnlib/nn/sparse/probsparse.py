"""ProbSparse attention (Zhou et al., 2021): queries that read unevenly attend, the others take the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...ops import attention
from ...types import Output, Plan, Traits, check_choice, exactly, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, split_heads
from ..registry import register
from ..released import Released, Rule


@register("probsparse", "probsparse-attention", "informer-attention")
class ProbSparse(Mechanism):
    """``u = factor ceil(ln N)`` queries attend to all keys; every other one takes the mean of the values.

    Which queries is decided by ``M_i = max_j s_ij - sum_j s_ij / N`` over as many keys ``j`` drawn for each query:
    a query whose scores are all alike would read the mean anyway. The choice is a plan, without gradient; the keys
    drawn are the same in every sample and head.

    Differs from the authors' code: the keys drawn follow from the length and ``seed``, so that a call answers the same
    every time (``compat="authors"`` draws them by ``torch.randint``); tokens that do not exist are never chosen, drawn
    or averaged. Their attention dropout and their masked form are never reached; as there, only non-causal
    self-attention is possible: the choice among all queries, and their number, look at later ones.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        factor: how many queries attend, and how many keys are drawn, in units of ``ceil(ln N)``.
        scale: of the scores; ``1 / sqrt(head_dim)`` by default.
        head_dim: width of queries and keys; ``dim / num_heads`` by default.
        value_dim: width of the values of a head; ``dim / num_heads`` by default.
        mix: lay heads and tokens out transposed before the output projection, as Informer's decoder does.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.
        seed: other keys.
        compat: ``"authors"``, see above.

    Reference: Zhou et al., 2021, arXiv 2012.07436.

    >>> ProbSparse(dim=16, num_heads=2, factor=1)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1}),
        work={"N": 1},
        memory={"N": 1},
        needs_plan=True,
        gradient="stopped",
    )
    reads_length = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        factor: int = 5,
        scale: float | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        mix: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        seed: int = 0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}: no query would attend")
        self.num_heads, self.factor, self.mixed, self.seed, self.compat = num_heads, factor, mix, seed, compat
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        self.value_dim = head_dim_of(dim, num_heads) if value_dim is None else value_dim
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, num_heads * self.value_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.value_dim, dim, bias=proj_bias)

    def count(self, n: int) -> int:
        """Queries that attend, and keys drawn for each, of ``n`` tokens."""
        return min(self.factor * math.ceil(math.log(max(n, 1))), n)

    def _drawn(self, n: int, device: torch.device) -> Tensor:
        """(N, U) keys drawn for each query, with repetitions."""
        if self.compat is not None:
            return torch.randint(n, (n, self.count(n))).to(device)
        # A mixing of bits instead of a generator, which no graph may hold.
        at = (
            torch.arange(n, device=device)[:, None] * 0x9E3779B1
            + torch.arange(self.count(n), device=device) * 0x85EBCA77
        )
        z = (at + (self.seed + 1) * 0xC2B2AE3D) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            z = ((z ^ (z >> shift)) * factor) & 0xFFFFFFFF
        return (z ^ (z >> 16)) % n

    def _choose(self, q: Tensor, k: Tensor, exists: Tensor | None) -> Plan:
        batch, heads, n, _ = q.shape
        u = self.count(n)
        if u == 0 or batch == 0:
            return Plan("probsparse", {"queries": q.new_zeros(batch, heads, u, dtype=torch.long)}, (("N", n),))
        with torch.no_grad(), exactly(q):
            at = self._drawn(n, q.device)
            q, k = q.to(stats_dtype(q.dtype)), k.to(stats_dtype(k.dtype))
            scores = torch.stack([(q * k[:, :, at[:, i]]).sum(-1) for i in range(u)], -1)  # (B, H, N, U)
            if exists is None:
                measure = scores.amax(-1) - scores.sum(-1) / n
            else:
                there = exists[:, at].unsqueeze(1)
                total = scores.masked_fill(~there, 0.0).sum(-1) / exists.sum(1).clamp(min=1)[:, None, None]
                top = scores.masked_fill(~there, float("-inf")).amax(-1)
                measure = torch.where(torch.isinf(top), 0.0, top) - total
                measure = measure.masked_fill(~exists[:, None], float("-inf"))
            return Plan("probsparse", {"queries": measure.topk(u, sorted=False).indices}, (("N", n),))

    def make_plan(self, x: Tensor, *, valid: Tensor | None = None) -> Plan:  # type: ignore[override]
        return self._choose(split_heads(self.q(x), self.num_heads), split_heads(self.k(x), self.num_heads), valid)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, plan: Plan | None = None
    ) -> Output:
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.q, self.k, self.v))
        exists, n = flat_valid(valid), x.shape[1]
        if plan is None:
            plan = self._choose(q, k, exists)
        chosen = plan.expect("probsparse", N=n).choices("queries", (*q.shape[:2], self.count(n)), n, "query")
        read = attention(
            q.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, q.shape[3])), k, v, valid=exists, scale=self.scale
        )
        if exists is None:
            mean = v.mean(2, keepdim=True) if n else v.sum(2, keepdim=True)
        else:
            there = exists[:, None, :, None]
            mean = v.masked_fill(~there, 0.0).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
        out = mean.expand_as(v).scatter(2, chosen.unsqueeze(-1).expand_as(read), read.to(v.dtype))
        out = out if self.mixed else out.transpose(1, 2)
        return Output(self.proj(out.reshape(x.shape[0], n, self.num_heads * self.value_dim)))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the benchmark's ``ProbSparse`` or Informer's ``AttentionLayer``: ``query_projection`` and so on."""
        theirs = Released(state_dict, "ProbSparse of the Comprehensive Attention Benchmark")
        rules: dict[str, Rule] = {
            rf"{theirs_}_projection\.(weight|bias)": rf"{ours}.\1"
            for theirs_, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj"))
        }
        return theirs.close(theirs.renamed(rules))
