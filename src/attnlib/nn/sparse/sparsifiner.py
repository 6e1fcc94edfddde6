"""Sparse attention predicted per image, head and query: a cheap low-rank map says which pairs are worth a product."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real, check_tensor, check_within, describe, to_tuple
from ...grids import Layout
from ...ops import attention
from ...ops.block_sparse import BlockPlan, block_sparse_attention
from ...positions import resized
from ...types import Output, Plan, Traits, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, through
from ..registry import register
from ..released import PLAIN, Released

COMPAT = (None, "authors")

#: Scores of the predicted map that are held at once while keys are chosen.
PIECE = 1 << 22


def _joined(pieces: Sequence[Tensor], batch: int) -> Tensor:
    """(B, H, ...) from itself, or from one (1, 1, ...) for each head of each sample."""
    return pieces[0] if len(pieces) == 1 else torch.cat([p[0] for p in pieces]).unflatten(0, (batch, -1))


@register("sparsifiner")
class Sparsifiner(Mechanism):
    """Attention over pairs that a low-rank predictor chooses for every head and query.

    With ``c = D // reduce_c`` and ``n = T // reduce_n`` for T tokens, per head::

        q' = q W_q + b_q,  k' = k W_k + b_k      (D -> c, shared by all heads)
        k'' = P^T k'                              (n x c; P is T x n)
        C  = top-k(softmax(s q' k''^T)),          s = num_heads ** -0.5 (so released)
        A' = C threshold(|R|)^T                   (N x T; R is T x n)
        S_i = the ceil(keep_rate T) largest entries of row i of A', or those above ``threshold``
        y  = W_O softmax_{j in S_i}(q_i . k_j / sqrt(D)) v_j

    Tokens before the grid (a class token) read everything. The choice has no gradient; the predictor learns from the
    loss ``reconstruction = sum (A' - softmax(q k^T / sqrt(D)))^2`` over rows of the grid. While it is being fitted (the
    first ``recon_share`` of training, see :meth:`set_progress`) attention is dense and ``A' = C R^T`` with all of C and
    R, as they are.

    What is chosen is executed pair by pair, so that work and memory follow what is kept; ``plan`` returns it.

    With ``token_keep_rate`` this layer also drops tokens: those of the grid that the class token reads least, on the
    mean over heads. The carry says which are left, as (B, K) numbers of slots; the layers behind compute nothing for
    the others, whose output is zero.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        keep_rate: share of the tokens that a query reads; 1 is dense attention.
        threshold: keep what the predicted map has above this instead; rows may stay empty, and give zeros.
        grid: grid of the tokens that P and R are made for, an int or two; other grids interpolate them, P scaled with
            the number of tokens, so that sums over tokens stay what they were.
        cls_tokens: tokens before it, in sequences. With a ``layout`` they are what lies before its grid; on maps there
            are none.
        reduce_n: tokens per basis map.
        reduce_c: by how much the predictor's heads are narrower.
        basis_threshold: entries of ``|R|`` that do not exceed this are zero.
        coef_topk: entries of a row of C that are kept; ``None`` for all.
        coef_threshold: with ``coef_topk=None``, entries that do not exceed this are zero.
        share_basis: R is P.
        token_keep_rate: share of the T - ``cls_tokens`` tokens of the grid that are left behind this layer; ``None``
            drops none.
        recon_share: share of training in which the predictor is fitted.
        qkv_bias: biases of the query, key and value projections.
        attn_drop: dropout of attention weights in training, where attention is dense.
        proj_drop: dropout of the output in training.
        compat: ``"authors"`` limits the budget, once tokens were dropped, to the number of those left without the class
            token, and lets tokens before the grid read dropped ones, as keys and values of zeros. By default a query
            may read all that are left, and nothing else.

    Reference: Wei et al., 2023, arXiv 2303.13755; lim142857/Sparsifiner.

    >>> m = Sparsifiner(dim=16, num_heads=2, grid=4, keep_rate=0.25, reduce_n=4)
    >>> x = torch.randn(1, 17, 16)
    >>> m(x).shape, m.plan(x).index.shape
    (torch.Size([1, 17, 16]), torch.Size([1, 2, 16, 5]))
    """

    class_traits = Traits(
        grid_ranks=frozenset({1, 2}),
        layout=True,
        work={"N": 2},
        memory={"N": 2},
        gradient="stopped",
        needs_plan=True,
        carries=True,
        losses=("reconstruction",),
        weights=True,
    )
    own_state = ("fitting",)
    reads_length = True
    fitting: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        keep_rate: float = 0.25,
        threshold: float | None = None,
        grid: int | Sequence[int] = 14,
        cls_tokens: int = 1,
        reduce_n: int = 8,
        reduce_c: int = 2,
        basis_threshold: float = 0.02,
        coef_topk: int | None = 8,
        coef_threshold: float = 0.0,
        share_basis: bool = False,
        token_keep_rate: float | None = None,
        recon_share: float = 0.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.keep_rate = check_real("keep_rate", keep_rate, above=0, most=1)
        self.threshold = None if threshold is None else check_real("threshold", threshold, least=0)
        rows, columns = to_tuple("grid", grid, 2)
        self.grid = check_int("grid", rows, least=1), check_int("grid", columns, least=1)
        self.cls_tokens = check_int("cls_tokens", cls_tokens, least=0)
        self.num_tokens = math.prod(self.grid) + cls_tokens
        check_int("reduce_n", reduce_n, least=1, most=self.num_tokens)
        check_int("reduce_c", reduce_c, least=1, most=self.head_dim)
        self.basis_threshold = check_real("basis_threshold", basis_threshold, least=0)
        self.coef_topk = None if coef_topk is None else check_int("coef_topk", coef_topk, least=1)
        self.coef_threshold = check_real("coef_threshold", coef_threshold, least=0, most=1)
        self.token_keep_rate = None
        if token_keep_rate is not None:
            self.token_keep_rate = check_real("token_keep_rate", token_keep_rate, above=0, most=1)
            if not cls_tokens:
                raise ValueError("token_keep_rate needs a class token, which scores the others: cls_tokens=1")
        self.recon_share = check_real("recon_share", recon_share, least=0, most=1)
        check_choice("compat", compat, COMPAT)
        self.compat, self.attn_drop = compat, attn_drop
        self.scale, self.cheap_scale = self.head_dim**-0.5, num_heads**-0.5
        basis = self.num_tokens // reduce_n
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.cheap_q, self.cheap_k = (nn.Linear(self.head_dim, self.head_dim // reduce_c) for _ in range(2))
        self.reduce = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.num_tokens, basis), std=0.02))
        self.share_basis = check_flag("share_basis", share_basis)
        own = None if share_basis else nn.init.trunc_normal_(torch.empty(self.num_tokens, basis), std=0.02)
        self.expand = None if own is None else nn.Parameter(own)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)
        self.register_buffer("fitting", torch.tensor(recon_share > 0))

    @property
    def traits(self) -> Traits:
        ranks = frozenset({1, 2} if self.token_keep_rate is None else {1})  # on maps nothing scores the tokens
        return self.class_traits.but(
            memory={"N": 1} if self.dense else {"N": 2}, needs_plan=not self.dense, grid_ranks=ranks
        )

    @property
    def dense(self) -> bool:
        """Every query reads everything."""
        return self.threshold is None and self.keep_rate == 1 and self.compat is None

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        self.fitting.fill_(progress < self.recon_share)

    @property
    def _fits(self) -> bool:
        """The predictor is being fitted, so that attention is dense."""
        return self.training and self.recon_share > 0 and bool(self.fitting)

    # ---- where tokens are

    def _sites(self, x: Tensor, layout: Layout | None) -> tuple[int, tuple[int, ...]]:
        """How many of the flat tokens come before the grid, and the grid."""
        if layout is None:
            if x.dim() == 4:
                return 0, (x.shape[1], x.shape[2])
            return min(self.cls_tokens, x.shape[1]), (max(x.shape[1] - self.cls_tokens, 0),)
        name = layout.grid_name()
        before, end = layout.span(name)
        if end != len(layout) or before > self.cls_tokens or len(layout.grid(name)) > 2:
            raise ValueError(
                f"layout {layout} is not possible here: at most cls_tokens={self.cls_tokens} tokens, then a grid of at "
                "most two axes, last"
            )
        return before, layout.grid(name)

    def _table(self, table: Tensor, before: int, grid: tuple[int, ...]) -> Tensor:
        """(before + N, n): P or R for a grid, interpolated where it was made for another one."""
        count, made = math.prod(grid), table.shape[0] - self.cls_tokens
        head, tail = table[: self.cls_tokens], table[self.cls_tokens :]
        if count != made or (len(grid) == 2 and grid != self.grid):
            if len(grid) == 2:
                tail = resized(tail.t().unflatten(1, self.grid), grid).flatten(1).t()
            else:
                tail = resized(tail.t(), grid, "bilinear").t() if count else tail[:0]
        return torch.cat([head[:before], tail]) if self.cls_tokens else tail

    # ---- the predictor

    def _coefficients(
        self, q: Tensor, k: Tensor, before: int, grid: tuple[int, ...], exists: Tensor | None, kept: Tensor | None
    ) -> Tensor:
        """(B, H, N - before, n): C before anything is left out of it."""
        q, k = self.cheap_q(q[:, :, before:]), self.cheap_k(k)
        if exists is not None:
            there = exists[:, None, :, None]
            q, k = q.masked_fill(~there[:, :, before:], 0.0), k.masked_fill(~there, 0.0)
        table = self._table(self.reduce, before, grid)
        if math.prod(grid) != self.num_tokens - self.cls_tokens:
            table = table * (self.num_tokens / max(table.shape[0], 1))
        table = table if kept is None else table[kept].unsqueeze(1)
        few = table.to(k.dtype).mT @ k
        return ((q @ few.mT) * self.cheap_scale).softmax(-1)

    def _basis(self, before: int, grid: tuple[int, ...], raw: bool = False) -> Tensor:
        """(n, N): R, or what the threshold leaves of its absolute value."""
        table = self._table(self.reduce if self.expand is None else self.expand, before, grid).t()
        return table if raw else F.threshold(table.abs(), self.basis_threshold, 0.0)

    def approximation(
        self, x: Tensor, *, layout: Layout | None = None, valid: Tensor | None = None, fitting: bool | None = None
    ) -> Tensor:
        """(B, H, N - before, N): the predicted map A' of the tokens of the grid, with gradient.

        Args:
            x: what the layer reads.
            layout, valid: as in the call.
            fitting: all of C and R as they are; by default while the predictor is being fitted.
        """
        check_tensor("x", x)
        before, grid = self._sites(x, layout)
        exists = flat_valid(valid)
        q, k = (split_heads(f(x), self.num_heads) for f in (self.q, self.k))
        return self._approximation(q, k, before, grid, exists, None, self._fits if fitting is None else fitting)

    def _approximation(
        self, q: Tensor, k: Tensor, before: int, grid: tuple[int, ...], exists: Tensor | None, kept: Tensor | None,
        fitting: bool,
    ) -> Tensor:  # fmt: skip
        coef = self._coefficients(q, k, before, grid, exists, kept)
        basis = self._basis(before, grid, raw=fitting).to(coef.dtype)
        if not fitting:
            coef = self._few(coef)
        return coef @ (basis if kept is None else basis.t()[kept].mT.unsqueeze(1))

    def _few(self, coef: Tensor) -> Tensor:
        """C without what is left out of it."""
        if self.coef_topk is None:
            return F.threshold(coef, self.coef_threshold, 0.0) if self.coef_threshold else coef
        best, index = coef.topk(min(self.coef_topk, coef.shape[-1]), -1, sorted=False)
        return torch.zeros_like(coef).scatter(-1, index, best)

    def _choose(
        self, q: Tensor, k: Tensor, before: int, grid: tuple[int, ...], exists: Tensor | None, kept: Tensor | None,
    ) -> BlockPlan:  # fmt: skip
        """Which keys the tokens of the grid read."""
        with torch.no_grad():
            coef = self._coefficients(q, k, before, grid, exists, kept)
            batch, heads, rows, _ = coef.shape
            keys, high = k.shape[2], stats_dtype(coef.dtype)
            budget = min(math.ceil(self.keep_rate * (before + math.prod(grid))), keys)
            if kept is not None and self.compat == "authors":
                budget = min(budget, keys - before)
            # A row of A' is a sum of a few rows of the basis.
            best, index = coef.to(high).topk(min(self.coef_topk or coef.shape[-1], coef.shape[-1]), -1, sorted=False)
            if self.coef_topk is None and self.coef_threshold:
                best = F.threshold(best, self.coef_threshold, 0.0)
            basis = self._basis(before, grid).to(high).contiguous()

            def scores(b: slice, h: slice) -> Tensor:
                few, which = best[b, h], index[b, h]
                made = F.embedding_bag(which.flatten(0, 2), basis, mode="sum", per_sample_weights=few.flatten(0, 2))
                made = made.view(*few.shape[:3], basis.shape[1])
                if kept is not None:
                    made = made.gather(-1, kept[b, None, None].expand(-1, *made.shape[1:3], -1))
                if exists is not None:
                    made = made.masked_fill(~exists[b, None, None], float("-inf"))
                return made

            pieces = [(slice(None), slice(None))]
            if not torch.compiler.is_compiling() and not coef.is_meta and best[..., 0].numel() * keys > PIECE:
                pieces = [(slice(b, b + 1), slice(h, h + 1)) for b in range(batch) for h in range(heads)]
            if self.threshold is not None:
                above = _joined([scores(b, h) > self.threshold for b, h in pieces], batch)
                fixed = torch.compiler.is_compiling() or coef.is_meta
                return BlockPlan.from_mask(above, 1, 1, rows, keys, keys if fixed else None)
            tops = [scores(b, h).topk(budget, -1, sorted=exists is not None) for b, h in pieces]
            count = None
            if exists is not None:  # sorted, so that what counts stands first
                count = _joined([(t.values != float("-inf")).sum(-1) for t in tops], batch)
            return BlockPlan._made(_joined([t.indices for t in tops], batch), 1, 1, rows, keys, count)

    # ---- the mechanism

    def make_plan(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        carry: Any = None,
    ) -> Plan:
        if self.dense:
            raise ValueError(f"{self._name()} reads everything (keep_rate=1), so it has no plan")
        before, grid = self._sites(x, layout)
        tokens, exists, kept = self._left(x, valid, carry)
        q, k = (split_heads(f(tokens), self.num_heads) for f in (self.q, self.k))
        return self._choose(q, k, before, grid, exists, kept)

    def _left(
        self, x: Tensor, valid: Tensor | None, carry: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The flat tokens that layers before have left, which of them exist, and their slots (B, K)."""
        tokens, exists = x.flatten(1, -2), flat_valid(valid)
        if carry is None:
            return tokens, exists, None
        if not isinstance(carry, Tensor) or carry.dtype != torch.int64 or carry.dim() != 2:
            raise TypeError(f"carry must be (B, K) int64 slots of the tokens that are left, got {describe(carry)}")
        if carry.shape[0] != tokens.shape[0] or carry.shape[1] > tokens.shape[1]:
            raise ValueError(
                f"carry names {carry.shape[1]} slots for {carry.shape[0]} samples, but x has {tokens.shape[0]} samples "
                f"of {tokens.shape[1]} tokens"
            )
        check_within("carry", carry, tokens.shape[1], "slot")
        if carry.shape[1] == tokens.shape[1]:  # all of them
            return tokens, exists, None
        tokens = tokens.gather(1, carry[..., None].expand(-1, -1, tokens.shape[2]))
        return tokens, None if exists is None else exists.gather(1, carry), carry

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        plan: Plan | None = None,
        carry: Any = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        before, grid = self._sites(x, layout)
        shape, slots = x.shape[1:-1], x.flatten(1, -2).shape[1]
        tokens, exists, kept = self._left(x, valid, carry)
        q, k, v = (split_heads(f(tokens), self.num_heads) for f in (self.q, self.k, self.v))
        if exists is not None:
            v = v.masked_fill(~exists[:, None, :, None], 0.0)
        fits, weights, losses = self._fits, None, None
        if self.dense or fits:
            chosen = None
        else:
            chosen = self._choose(q, k, before, grid, exists, kept) if plan is None else self._expected(plan)
            chosen.expect("blocks", N=tokens.shape[1] - before, M=tokens.shape[1], q_block=1, k_block=1)
        drop = self.attn_drop if self.training else 0.0
        if chosen is None or drop or "weights" in returns:
            out, weights = self._densely(q, k, v, chosen, before, exists, slots, drop, "weights" in returns)
        else:
            out = block_sparse_attention(q[:, :, before:], k, v, chosen, valid=exists, scale=self.scale)
            if before:
                keys, values, there = self._read_by_prefix(k, v, exists, slots)
                first = attention(q[:, :, :before], keys, values, valid=there, scale=self.scale)
                out = torch.cat([first, out], 2)
        if "losses" in returns:
            losses = {"reconstruction": self._reconstruction(q, k, before, grid, exists, kept, fits)}
        left = kept
        if self.token_keep_rate is not None and not fits:
            if not before:
                raise ValueError("token_keep_rate needs a class token before the grid, and x has none")
            left = self._drop(q, k, before, slots, exists, kept)
        y = self.proj(merge_heads(out))
        if kept is not None:
            y = y.new_zeros(y.shape[0], slots, self.dim).scatter(1, kept[..., None].expand_as(y), y)
            if weights is not None:
                weights = self._spread(weights, kept, slots)
        y = through(self.proj_drop, y.unflatten(1, shape))
        if "carry" in returns and left is None:
            left = torch.arange(slots, device=x.device).expand(x.shape[0], -1)
        return Output(
            y,
            carry=left if "carry" in returns else None,
            weights=weights if "weights" in returns else None,
            losses=losses,
        )

    @staticmethod
    def _expected(plan: Plan) -> BlockPlan:
        if not isinstance(plan, BlockPlan):
            raise TypeError(f"plan must be a BlockPlan made by m.plan(x), got {type(plan).__name__}")
        return plan

    def _read_by_prefix(
        self, k: Tensor, v: Tensor, exists: Tensor | None, slots: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values, and which exist, that tokens before the grid read; the authors' read dropped ones as zeros."""
        missing = slots - k.shape[2] if self.compat == "authors" else 0
        if not missing:
            return k, v, exists
        pad = (0, 0, 0, missing)
        return F.pad(k, pad), F.pad(v, pad), None if exists is None else F.pad(exists, (0, missing), value=True)

    def _densely(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, before: int, exists: Tensor | None, slots: int,
        drop: float, wanted: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The same numbers through dense attention, and its weights where they are wanted."""
        count = k.shape[2]
        pairs = None if plan is None else F.pad(plan.chosen(), (0, 0, before, 0), value=True)
        keys, values, there = self._read_by_prefix(k, v, exists, slots)
        if pairs is not None and keys.shape[2] > count:
            more = torch.arange(count, device=q.device) < before
            pairs = torch.cat([pairs, more[:, None].expand(*pairs.shape[:3], keys.shape[2] - count)], -1)
        given: dict[str, Any] = dict(mask=pairs, valid=there, scale=self.scale, dropout_p=drop)
        if not wanted:
            return attention(q, keys, values, **given), None
        out, weights = attention(q, keys, values, **given, return_weights=True)
        return out, weights[..., :count]

    @staticmethod
    def _spread(weights: Tensor, kept: Tensor, slots: int) -> Tensor:
        """(B, H, K, K) -> (B, H, slots, slots), zero for what was dropped."""
        batch, heads, count, _ = weights.shape
        columns = kept[:, None, None].expand(-1, heads, count, -1)
        wide = weights.new_zeros(batch, heads, count, slots).scatter(-1, columns, weights)
        rows = kept[:, None, :, None].expand(-1, heads, -1, slots)
        return weights.new_zeros(batch, heads, slots, slots).scatter(2, rows, wide)

    def _reconstruction(
        self, q: Tensor, k: Tensor, before: int, grid: tuple[int, ...], exists: Tensor | None, kept: Tensor | None,
        fitting: bool,
    ) -> Tensor:  # fmt: skip
        """Squared distance of the predicted from the dense map, over what exists."""
        scores = (q[:, :, before:] @ k.mT) * self.scale
        if exists is not None:
            scores = scores.masked_fill(~exists[:, None, None], torch.finfo(scores.dtype).min)
        gap = self._approximation(q, k, before, grid, exists, kept, fitting) - scores.softmax(-1)
        if exists is not None:
            gap = gap * (exists[:, None, before:, None] & exists[:, None, None])
        return gap.square().sum()

    def _drop(
        self, q: Tensor, k: Tensor, before: int, slots: int, exists: Tensor | None, kept: Tensor | None
    ) -> Tensor:
        """(B, K) slots of the tokens that are left, in order."""
        assert self.token_keep_rate is not None
        with torch.no_grad():
            scores = (q[:, :, :1] @ k.mT) * self.scale
            if exists is not None:
                scores = scores.masked_fill(~exists[:, None, None], float("-inf"))
            score = scores.softmax(-1)[:, :, 0, before:].mean(1)
            if exists is not None:
                score = score.masked_fill(~exists[:, before:], -1.0)
            budget = min(math.ceil(self.token_keep_rate * (slots - before)), score.shape[1])
            best = score.topk(budget, -1, sorted=False).indices.sort(-1).values + before
            first = torch.arange(before, device=q.device).expand(q.shape[0], -1)
            left = torch.cat([first, best], 1)
            return left if kept is None else kept.gather(1, left)

    # ---- weights

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention``; that of a plain vision transformer gives all but the predictor."""
        theirs = Released(state_dict, "the authors' Attention of Sparsifiner")
        shared = "mask_predictor.proj_n" in theirs and "mask_predictor.proj_back_n" in theirs
        if shared and theirs.peek("mask_predictor.proj_n").equal(theirs.peek("mask_predictor.proj_back_n")):
            theirs.leave(r"mask_predictor\.proj_back_n", because="it is the same table")
        rules = {
            r"mask_predictor\.proj_c_q\.(weight|bias)": r"cheap_q.\1",
            r"mask_predictor\.proj_c_k\.(weight|bias)": r"cheap_k.\1",
            r"mask_predictor\.proj_n": "reduce",
            r"mask_predictor\.proj_back_n": "expand",
        }
        return theirs.close(theirs.renamed({**rules, **PLAIN}))
