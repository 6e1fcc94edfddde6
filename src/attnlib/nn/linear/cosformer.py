"""cosFormer (Qin et al., 2022): linear attention whose weights fall off with the distance like a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...ops import _shards
from ...ops._guard import readable
from ...ops.feature_maps import feature_map
from ...ops.linear import linear_partial
from ...types import Output, State, Traits, check_choice, check_int, stats_dtype
from ..base import Mechanism
from ..frame import reading
from ..layers import head_dim_of, merge_heads, split_heads, through
from ..registry import register
from ..released import Released, Rule


@register("cosformer", "cosformer-attention")
class Cosformer(Mechanism):
    """``o_i = sum_j w_ij v_j / sum_j w_ij`` with ``w_ij = (q'_i . k'_j) cos(pi (i - j) / (2 M))``.

    ``q' = relu(q)``, ``k' = relu(k)``, no ``1 / sqrt(D)``. The cosine comes apart into ``cos cos + sin sin``, so that
    features ``[x' sin(pi i / 2M), x' cos(pi i / 2M)]`` of twice the width give it in time linear in N, with a state of
    constant size when causal.

    ``M`` is the number of positions, ``max_length``: within it no weight is negative, and a longer sequence is refused.
    The authors take the length of the *call* for it (the longer of queries and keys): an answer then changes when
    others are longer or padded, and what is causal is not stable as a sequence grows. ``compat="authors"`` does that;
    it has no causal form, as in the Comprehensive Attention Benchmark.

    Differs from the authors' code: M is given; tokens that do not exist are left out (their class ignores the mask) and
    take no position; ``"elu1"`` works (their ``1 + F.elu`` raises).

    Args:
        dim: width of ``x``.
        num_heads: heads.
        max_length: M. Only sequences (of existing tokens) up to it; with a context, the longer of both counts.
        activation: ``"relu"`` or ``"elu1"``.
        context_dim: width of ``context``; ``dim`` by default.
        causal: a token reads itself and earlier ones. With a context: reads all of it.
        qkv_bias: biases of the query, key and value projections.
        out_proj: have an output projection.
        proj_bias: its bias.
        eps: the least denominator.
        chunk: tokens per chunk of the causal form; changes speed, not the result.
        compat: ``"authors"``, see above; ``max_length`` is not used then.
        head_dim: width of a head; ``dim / num_heads`` by default.

    Reference: Qin et al., 2022, arXiv 2202.08791.

    >>> Cosformer(dim=16, num_heads=2, max_length=64)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"}),
        grid_ranks=frozenset({1, 2, 3}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
    )
    cuts_sequence = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        max_length: int = 8192,
        activation: str = "relu",
        context_dim: int | None = None,
        causal: bool = False,
        qkv_bias: bool = True,
        out_proj: bool = True,
        proj_bias: bool = True,
        eps: float = 1e-6,
        chunk: int = 128,
        compat: str | None = None,
        head_dim: int | None = None,
    ):
        super().__init__(dim, context_dim)
        check_choice("activation", activation, ("relu", "elu1"))
        check_choice("compat", compat, (None, "authors"))
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if compat is not None and causal:
            raise ValueError("causal=True is not possible with compat='authors': weights would change with the length")
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else check_int("head_dim", head_dim, least=1)
        inner = num_heads * self.head_dim
        if not out_proj and inner != dim:
            raise ValueError(f"out_proj=False needs num_heads * head_dim={inner} to be dim={dim}")
        self.max_length, self.activation, self.causal, self.eps = max_length, activation, causal, eps
        self.chunk, self.compat = chunk, compat
        self.reads_length = compat is not None
        self.q = nn.Linear(dim, inner, bias=qkv_bias)
        self.k = nn.Linear(self.context_dim, inner, bias=qkv_bias)
        self.v = nn.Linear(self.context_dim, inner, bias=qkv_bias)
        self.proj: nn.Module = nn.Linear(inner, dim, bias=proj_bias) if out_proj else nn.Identity()

    @property
    def traits(self) -> Traits:
        patterns = {"causal-self", "causal-cross"} if self.causal else {"noncausal-self", "noncausal-cross"}
        if self.context_dim != self.dim:
            patterns = {p for p in patterns if p.endswith("cross")}
        return self.class_traits.but(
            patterns=frozenset(patterns),
            grid_ranks=frozenset({1}) if self.causal else self.class_traits.grid_ranks,
            streaming="causal-self" in patterns,
        )

    def _check_length(self, n: int, past: Tensor | None) -> None:
        """Raise ``ValueError`` where positions go beyond M; numbers are looked at where that waits for nobody."""
        if n and past is not None and readable(past) and past.numel():
            n += int(past.max())
        if n > self.max_length:
            raise ValueError(
                f"max_length={self.max_length} is below the {n} tokens of this sequence: weights of distant tokens "
                "would be negative; build it with a larger max_length"
            )

    def _featured(self, x: Tensor, at: Tensor, length: int) -> Tensor:
        """(B, H, N, D) and positions (B or 1, N), from 0, to (B, H, N, 2 D)."""
        x = feature_map(self.activation)(x)
        angle = (at + 1).to(stats_dtype(x.dtype))[:, None, :, None] * (math.pi / 2 / length)
        return torch.cat([x * angle.sin().to(x.dtype), x * angle.cos().to(x.dtype)], -1)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        read = reading(x, context, valid, context_valid, self.causal, state, "state" in returns)
        tokens, own, keys, exists, ordered, stream = read
        at_q, at_k = read.queries.positions, stream.positions
        length = self.max_length
        if self.compat is not None:
            length = max(tokens.shape[1], keys.shape[1], 1)
            at_q, at_k = (torch.arange(t.shape[1], device=x.device)[None] for t in (tokens, keys))
        elif exists is None and own is None:
            others = _shards.others() is not None
            past = stream.past if state is not None or others else None
            self._check_length(max(tokens.shape[1], keys.shape[1]), past)
        elif readable(at_q, at_k) and at_q.numel() and at_k.numel():
            self._check_length(1 + max(int(at_q.max()), int(at_k.max())), None)
        q = self._featured(split_heads(self.q(tokens), self.num_heads), at_q, length)
        k = self._featured(split_heads(self.k(keys), self.num_heads), at_k, length)
        v = split_heads(self.v(keys), self.num_heads)
        part, final = linear_partial(
            q, k, v, causal=ordered, valid=exists, state=state, chunk=self.chunk, return_state=True
        )
        out = (part.num / part.den.clamp(min=self.eps).unsqueeze(-1)).to(x.dtype)
        y = through(self.proj, merge_heads(out, x.shape[1:-1]))
        return Output(y, state=stream.next(**final.tensors) if stream.keep else None)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], out_proj: bool = True) -> dict[str, Tensor]:
        """From ``CosformerAttention``: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

        Without ``has_outproj`` theirs holds an output projection that it does not use: ``out_proj=False`` leaves it.
        """
        theirs = Released(state_dict, "CosformerAttention")
        if not out_proj:
            theirs.leave(r"out_proj\.(weight|bias)", because="not used")
        rules: dict[str, Rule] = {
            r"([qkv])_proj\.(weight|bias)": r"\1.\2",
            r"out_proj\.(weight|bias)": r"proj.\1",
        }
        return theirs.close(theirs.renamed(rules))
