"""Neighborhood attention: every token attends to the ``kernel_size`` tokens around it, on grids of 1 to 3 axes.

Hassani, Hwu, Shi, 2024, "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock
Level", arXiv 2403.04690. Along one axis of ``X`` tokens, with kernel ``w`` and dilation ``d``, token ``x`` belongs to
the residue class ``x mod d`` of ``L`` tokens and stands there at ``i = x // d``; it meets tokens of its class only:

- bidirectional: ``centre = clamp(i, w // 2, L - 1 - (w - 1) // 2)``, keys ``centre - w // 2 .. centre + (w - 1) // 2``.
  Near a border the window is shifted, never cut: always ``w`` keys, with even ``w`` one more on the left;
- causal: keys ``max(i - w + 1, 0) .. i``.

Several axes: a pair meets when it meets on each. ``out = softmax(q k^T D^-1/2 + B) v``, where ``B`` is an optional
relative bias ``rpb[h, key - query + w - 1]`` in units of dilation, which current NATTEN dropped and checkpoints of NAT
and DiNAT need.

Differs from the authors' code: their fused operators are CUDA kernels; here the same sums run as batched dense
attention over tiles (:func:`attnlib.ops.neighborhood.neighborhood_attention`) on any device. Relative bias, validity,
pairwise masks, dropout, streaming and tokens beside the grid are supported together with everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import masks
from ...checks import check_choice
from ...grids import Layout, coordinates
from ...ops import attention
from ...ops.neighborhood import axis_rules, neighborhood_attention
from ...types import Output, State, Traits, to_tuple
from ..base import PADS, Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, through
from ..registry import register
from ..released import Released, Rule, join

PerAxis = int | Sequence[int]


def _rank_of(rank: int | None, settings: Mapping[str, Any]) -> int | None:
    """Number of axes that tuples among ``settings`` agree on, or ``rank``; ``None`` when every grid will do."""
    for name, value in settings.items():
        if isinstance(value, Sequence):
            if rank is not None and len(value) != rank:
                raise ValueError(f"{name}={tuple(value)} names {len(value)} axes, other settings say rank={rank}")
            rank = len(value)
    if rank is not None and rank not in (1, 2, 3):
        raise ValueError(f"rank={rank} is not possible; choose 1, 2 or 3")
    return rank


@register("fused-neighborhood-attention", "na", "neighborhood-attention", "fna")
class FusedNeighborhoodAttention(Mechanism):
    """Multi-head neighborhood attention on sequences, images and videos.

    Tokens beside the grid (class, register, text; see ``layout``) attend to everything and are attended by everything.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        kernel_size: keys per axis, at least 2.
        dilation: tokens between neighbouring keys, per axis.
        causal: the window ends at the query, per axis. ``True`` without a ``rank`` means a sequence, which then streams
            with a ring of ``(kernel_size - 1) * dilation`` tokens.
        rank: axes of the grid. Found from tuples among the settings; otherwise every rank from 1 to 3 is taken.
        rel_bias: learn a relative bias per head (needs a ``rank``).
        qkv_bias: bias of the query, key and value projections.
        scale: ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        pad: of a grid with less than ``kernel_size * dilation`` tokens on an axis that is not causal: ``"mask"`` adds
            tokens that nobody attends to, ``"zeros"`` adds zeros that take part, ``"refuse"`` raises.

    Reference: Hassani, Hwu, Shi, 2024, arXiv 2403.04690, section 2; Hassani et al., 2023, arXiv 2204.07143, eq. 2-4.

    >>> FusedNeighborhoodAttention(dim=16, num_heads=4, kernel_size=3)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        mask=True,
        layout=True,
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
        weights=True,
    )

    stride: PerAxis = 1

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: PerAxis = 7,
        dilation: PerAxis = 1,
        causal: bool | Sequence[bool] = False,
        rank: int | None = None,
        rel_bias: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
    ):
        super().__init__(dim)
        check_choice("pad", pad, PADS)
        self.pad = pad
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.kernel_size, self.dilation, self.causal = kernel_size, dilation, causal
        settings: dict[str, Any] = dict(kernel_size=kernel_size, dilation=dilation, stride=self.stride, causal=causal)
        rank = _rank_of(rank, settings)
        self.rank = 1 if rank is None and causal is True else rank
        if rel_bias and self.rank is None:
            raise ValueError("rel_bias needs to know the axes of the grid: give rank=1, 2 or 3")
        # Check the settings now, on the smallest grid they fit.
        trial = self.rank or 1
        room = zip(to_tuple("kernel_size", kernel_size, trial), to_tuple("dilation", dilation, trial), strict=True)
        axis_rules([int(max(1, w) * max(1, d)) for w, d in room], **settings)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if rel_bias:
            assert self.rank is not None
            extents = [2 * w - 1 for w in to_tuple("kernel_size", kernel_size, self.rank)]
            self.rpb = nn.Parameter(torch.empty(num_heads, *extents))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)

    @property
    def traits(self) -> Traits:
        # Time is the first axis of a grid.
        causal = self.rank is not None and to_tuple("causal", self.causal, self.rank)[0]
        return self.class_traits.but(
            patterns=frozenset({"causal-self"} if causal else {"noncausal-self"}),
            grid_ranks=self.class_traits.grid_ranks if self.rank is None else frozenset({self.rank}),
            # Tokens that read everything and are read by everyone, and a leader in the future, look ahead.
            layout=not causal,
            streaming=causal and self.rank == 1 and to_tuple("stride", self.stride, 1)[0] == 1,
        )

    @property
    def tables(self) -> dict[str, int]:
        """Tables of places, by how many of their last axes are places."""
        return {} if self.rpb is None else {"rpb": self.rpb.dim() - 1}

    def _full_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        sides, steps, causal = (
            to_tuple(name, value, len(grid))
            for name, value in (
                ("kernel_size", self.kernel_size), ("dilation", self.dilation), ("causal", self.causal),
            )
        )  # fmt: skip
        return tuple(n if c else max(n, w * d) for n, w, d, c in zip(grid, sides, steps, causal, strict=True))

    @property
    def _window(self) -> dict[str, Any]:
        return dict(kernel_size=self.kernel_size, dilation=self.dilation, stride=self.stride, causal=self.causal)

    @property
    def _reach(self) -> int:
        """Tokens that the window of a sequence spans."""
        return to_tuple("kernel_size", self.kernel_size, 1)[0] * to_tuple("dilation", self.dilation, 1)[0]

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        mask: masks.Mask | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        shape, exists = x.shape[1:-1], flat_valid(valid)
        grid = tuple(shape) if layout is None else layout.grid()
        if self.rank is not None and len(grid) != self.rank:
            raise ValueError(f"layout has a grid {grid}, but this module was built for rank={self.rank}")
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        drop = self.attn_drop if self.training else 0.0
        weights = new_state = None
        # A causal sequence shorter than its window is the beginning of one, as it is for a state, whatever the stride.
        short = self.rank == 1 and to_tuple("causal", self.causal, 1)[0] and x.shape[1] < self._reach
        if state is not None or "state" in returns or short:
            out, weights, new_state = self._stream(q, k, v, exists, mask, state, drop, "weights" in returns)
            new_state = new_state if "state" in returns else None
        elif "weights" in returns:
            out, weights = self._with_weights(q, k, v, grid, layout, exists, mask, drop)
        elif layout is None:
            out = neighborhood_attention(
                q, k, v, grid, **self._window, bias_table=self.rpb, valid=exists, mask=mask, scale=self.scale,
                dropout_p=drop,
            )  # fmt: skip
        else:
            out = self._with_layout(q, k, v, grid, layout, exists, mask, drop)
        return Output(through(self.proj_drop, self.proj(merge_heads(out, shape))), state=new_state, weights=weights)

    def _with_layout(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, ...],
        layout: Layout,
        exists: Tensor | None,
        mask: masks.Mask | None,
        drop: float,
    ) -> Tensor:
        """Tokens of the grid read their window and all tokens beside it; tokens beside the grid read everything."""
        start, stop = layout.span(layout.grid_name())
        numbers = torch.arange(len(layout), device=q.device)
        beside = torch.cat([numbers[:start], numbers[stop:]])

        def others(t: Tensor, dim: int) -> Tensor:
            return torch.cat([t.narrow(dim, 0, start), t.narrow(dim, stop, len(layout) - stop)], dim)

        inner_q, inner_k, inner_v = (t[:, :, start:stop] for t in (q, k, v))
        near = neighborhood_attention(
            inner_q, inner_k, inner_v, grid, **self._window, bias_table=self.rpb,
            extra_k=others(k, 2), extra_v=others(v, 2), extra_valid=None if exists is None else others(exists, 1),
            valid=None if exists is None else exists[:, start:stop], mask=mask, offset=start, extra_pos=beside,
            scale=self.scale, dropout_p=drop,
        )  # fmt: skip
        far = attention(
            others(q, 2), k, v, mask=mask, valid=exists, q_pos=beside, k_pos=numbers, scale=self.scale, dropout_p=drop
        )
        return torch.cat([far[:, :, :start], near, far[:, :, start:]], 2)

    def _with_weights(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, ...],
        layout: Layout | None,
        exists: Tensor | None,
        mask: masks.Mask | None,
        drop: float,
    ) -> tuple[Tensor, Tensor]:
        """The same as one dense attention, which can show its weights."""
        local = masks.neighborhood(
            grid, *(self._window[name] for name in ("kernel_size", "dilation", "stride", "causal"))
        )
        start, stop = (0, q.shape[2]) if layout is None else layout.span(layout.grid_name())
        if layout is not None:
            local = masks.on_segment(layout, layout.grid_name(), local)
        bias = None
        if self.rpb is not None:
            inner = self._dense_bias(coordinates(grid, q.device))
            bias = nn.functional.pad(inner, (start, q.shape[2] - stop, start, q.shape[2] - stop))
        return attention(
            q, k, v, mask=local if mask is None else local & mask, valid=exists, bias=bias, scale=self.scale,
            dropout_p=drop, return_weights=True,
        )  # fmt: skip

    def _dense_bias(self, places: Tensor) -> Tensor:
        """(H, N, N): the relative bias between tokens at ``places`` (N, r)."""
        rank = places.shape[1]
        kernel, step = to_tuple("kernel_size", self.kernel_size, rank), to_tuple("dilation", self.dilation, rank)
        index = torch.zeros((), dtype=torch.long, device=places.device)
        for axis, (w, d) in enumerate(zip(kernel, step, strict=True)):
            i = places[:, axis] // d
            index = index * (2 * w - 1) + (i[None, :] - i[:, None] + w - 1).clamp(0, 2 * w - 2)
        return self.rpb.flatten(1)[:, index]

    def _stream(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        exists: Tensor | None,
        mask: masks.Mask | None,
        state: State | None,
        drop: float,
        shown: bool,
    ) -> tuple[Tensor, Tensor | None, State]:
        """Continue a causal sequence: the state is the last ``(kernel_size - 1) * dilation`` tokens.

        Weights, if they are to be shown, are (B, H, n, M): over the remembered tokens and then the new ones.
        """
        (w,), (d,) = to_tuple("kernel_size", self.kernel_size, 1), to_tuple("dilation", self.dilation, 1)
        batch, fresh = q.shape[0], q.shape[2]
        if exists is None:
            exists = torch.ones(batch, fresh, dtype=torch.bool, device=q.device)
        tokens = exists.sum(1) if state is None else state["tokens"] + exists.sum(1)
        seen = torch.zeros(batch, dtype=torch.long, device=q.device) if state is None else state["seen"]
        if state is not None:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            exists = torch.cat([state["valid"], exists], 1)
        past, total, weights = k.shape[2] - fresh, k.shape[2], None
        if mask is None and not shown and fresh > max(past, 2 * w) and total >= self._reach:
            # A long run of new tokens: the ring is simply the beginning of the sequence.
            padded = nn.functional.pad(q, (0, 0, past, 0))
            out = neighborhood_attention(
                padded, k, v, (total,), **self._window, border="mask", bias_table=self.rpb, valid=exists,
                scale=self.scale, dropout_p=drop,
            )[:, :, past:]  # fmt: skip
        else:
            i = torch.arange(past, total, device=q.device)[:, None]
            j = torch.arange(total, device=q.device)
            steps = (i - j) // d
            allowed = (i >= j) & ((i - j) % d == 0) & (steps < w)
            if mask is not None:
                allowed = allowed & mask.at(seen[:, None] + i[:, 0] - past, (seen[:, None] + j - past).clamp(min=0))
            bias = None if self.rpb is None else self.rpb[:, (w - 1 - steps).clamp(0, 2 * w - 2)]
            out = attention(
                q, k, v, mask=allowed, valid=exists, bias=bias, scale=self.scale, dropout_p=drop, return_weights=shown
            )
            out, weights = out if shown else (out, None)
        keep = max(0, total - (w - 1) * d)
        ring = State(
            {
                "k": k[:, :, keep:],
                "v": v[:, :, keep:],
                "valid": exists[:, keep:],
                "seen": seen + fresh,
                "tokens": tokens,
            }
        )
        return out, weights, ring

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From NATTEN's modules (any release; ``rpb`` of 0.17 and before) or transformers' NAT and DiNAT attention."""
        theirs = Released(state_dict, "NATTEN's NeighborhoodAttention or transformers' NAT and DiNAT attention")
        out: dict[str, Tensor] = {}
        for prefix in ("self.", ""):
            out |= join(theirs, "qkv", [f"{prefix}{name}" for name in ("query", "key", "value")])
        rules: dict[str, Rule] = {
            r"qkv\.(weight|bias)": r"qkv.\1",
            r"(?:proj|output\.dense)\.(weight|bias)": r"proj.\1",
            r"(?:self\.)?rpb": "rpb",
        }
        return theirs.close(out | theirs.renamed(rules))
