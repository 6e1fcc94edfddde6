"""The two attentions of MoH-ViT (Jin et al., 2024): TransNeXt's, with heads that tokens choose.

Both compare normalised queries and keys, sharpened by a learned temperature and the log of the number of keys, with
a continuous relative bias (an MLP on log-spaced displacements):

``q' = (q / |q| + e_h) softplus(t_h) log(n)``, ``o = softmax(q' (k / |k|)^T + MLP(displacement)) v``

The global one reads every token. The aggregated one reads the tokens around the query and a pooled map in one softmax;
its local values have a second weight, ``(q / |q|) T_h + b_h``, that does not go through the softmax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, to_tuple
from ...positions import as_bias
from ...types import Output, Plan, Traits
from ..frame import HeadCall
from ..layers import flat_valid, merge_heads, split_heads, through, zero_invalid
from ..registry import register
from ..released import Released, Rule, split_rule
from .moh_mixture_of_heads import MixtureOfHeads

#: softplus of the initial temperature is 1 / 0.24.
TEMPERATURE = math.log(math.exp(1 / 0.24) - 1)


@functools.lru_cache(maxsize=64)
def _displacements(queries: int, keys: int, base: int) -> tuple[list[float], list[list[int]]]:
    """Scaled displacements on one axis, each once, and which of them each query (row) has to each key.

    Keys stand at the means of the queries that an adaptive pool gives them. ``base`` is the size of the axis in
    pretraining, on which displacements reach from -8 to 8.
    """
    spans = [(k * queries // keys, -(-(k + 1) * queries // keys)) for k in range(keys)]
    centres = [sum(range(low, high)) / (high - low) for low, high in spans]
    scale = 8 / max(base - 1, 1)
    every = sorted({q - c for q in range(queries) for c in centres})
    at = {value: i for i, value in enumerate(every)}
    return [value * scale for value in every], [[at[q - c] for c in centres] for q in range(queries)]


class _CosineHeads(MixtureOfHeads):
    """What both attentions share: routed heads, scaled cosines, the continuous bias."""

    class_traits = MixtureOfHeads.class_traits.but(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}), mask=False, layout=False, streaming=False,
        weights=False, permutation_equivariant=False, memory={"N": 2},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_heads: int,
        active_heads: int | None,
        base_grid: int | Sequence[int] | None,
        bias_hidden: int,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
    ):
        super().__init__(
            dim, num_heads, shared_heads=shared_heads, active_heads=active_heads, qkv_bias=qkv_bias,
            attn_drop=attn_drop, proj_drop=proj_drop,
        )  # fmt: skip
        check_int("bias_hidden", bias_hidden, least=1)
        self.base_grid = None if base_grid is None else to_tuple("base_grid", base_grid, 2)
        self.scale = 1.0
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), TEMPERATURE))
        self.query_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 1, self.head_dim), std=0.02))
        self.cpb_fc1 = nn.Linear(2, bias_hidden)
        self.cpb_fc2 = nn.Linear(bias_hidden, num_heads)

    @property
    def traits(self) -> Traits:
        routed = bool(self.routed_heads)
        return self.class_traits.but(needs_plan=routed, losses=("balance",) if routed else ())

    def _position_bias(self, grid: Sequence[int], keys: Sequence[int]) -> Tensor:
        """(1, H, N, K): the MLP at every displacement, spread over the pairs."""
        base = grid if self.base_grid is None else self.base_grid
        like = self.temperature
        axes = [_displacements(n, m, b) for n, m, b in zip(grid, keys, base, strict=True)]
        lines = [torch.tensor(values, dtype=like.dtype, device=like.device) for values, _ in axes]
        rows, columns = (torch.tensor(index, device=like.device) for _, index in axes)
        table = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
        table = table.sign() * torch.log2(table.abs() + 1) / math.log2(8)
        table = self.cpb_fc2(F.relu(self.cpb_fc1(table))).flatten(0, 1)
        index = rows[:, None, :, None] * len(lines[1]) + columns[None, :, None, :]
        return table[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)[None]

    def _queries(self, q: Tensor, seen: Tensor | float) -> tuple[Tensor, Tensor]:
        """Queries (B, H, N, D) normalised, and sharpened for ``seen`` keys: a number, (B, 1, N, 1) or (N, 1)."""
        unit = F.normalize(q, dim=-1)
        length = math.log(max(seen, 1)) if isinstance(seen, (int, float)) else seen.clamp(min=1).to(q.dtype).log()
        return unit, (unit + self.query_embedding) * F.softplus(self.temperature) * length

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.q, self.k, self.v))
        return q, k, v

    _RULES: Mapping[str, Rule] = {
        r"qkv\.(weight|bias)": split_rule("q", "k", "v"),
        r"kv\.(weight|bias)": split_rule("k", "v"),
        r"(q|proj|sr|norm|cpb_fc[12]|wg|wg_[01])\.(weight|bias)": r"\1.\2",
        r"(temperature|query_embedding|relative_pos_bias_local|learnable_tokens|learnable_bias)": r"\1",
    }


@register("moh-vit-attention", "moh-transnext-attention")
class MoHViTAttention(_CosineHeads):
    """Mixture-of-head attention of MoH-ViT's last stage, over all tokens of an image.

    See the module's docstring for the scores, :class:`~.moh_mixture_of_heads.MixtureOfHeads` for routing.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        shared_heads: heads that are always on.
        active_heads: routed heads per token; ``None`` for all, 0 only when all heads are shared.
        base_grid: grid of pretraining, on which displacements reach from -8 to 8; that of the call by default.
        bias_hidden: hidden width of the bias's MLP.
        qkv_bias: biases of the query, key and value projections.
        attn_drop, proj_drop: dropout of the weights and of the output.

    Shapes: (B, H, W, C). ``n`` in the scores is the number of tokens that exist; theirs is that of the resolution the
    module is built for, which is the same.

    Reference: Jin et al., 2024, arXiv 2410.11842; Shi, 2023, arXiv 2311.17132 (the attention).

    >>> MoHViTAttention(dim=16, num_heads=4, shared_heads=1, active_heads=2)(torch.randn(2, 3, 4, 16)).shape
    torch.Size([2, 3, 4, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        shared_heads: int = 2,
        active_heads: int | None = None,
        base_grid: int | Sequence[int] | None = None,
        bias_hidden: int = 512,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(
            dim, num_heads, shared_heads, active_heads, base_grid, bias_hidden, qkv_bias, attn_drop, proj_drop
        )

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        plan: Plan | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        grid, exists = x.shape[1:3], flat_valid(valid)
        tokens = zero_invalid(x, valid).flatten(1, 2)
        notes = self._notes(exists, plan, None, returns)
        q, k, v = self._split(tokens)
        self._begin(tokens, q, notes)
        seen = tokens.shape[1] if exists is None else exists.sum(1)[:, None, None, None]
        _, q = self._queries(q, seen)
        bias = as_bias(self._position_bias(grid, grid))
        call = HeadCall(None, exists, None, bias, self.attn_drop if self.training else 0.0)
        q, k = q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)  # autocast normalises in float32
        out = self._gate(self._mix_heads(q, k, v, call, notes), notes)
        return Output(through(self.proj_drop, self.proj(merge_heads(out, grid))), losses=notes.losses)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``Attention`` of MoH-ViT."""
        theirs = Released(state_dict, "Attention of MoH-ViT")
        return theirs.close(theirs.renamed(_CosineHeads._RULES))


@register("moh-vit-aggregated-attention", "moh-transnext-aggregated-attention")
class MoHViTAggregatedAttention(_CosineHeads):
    """Mixture-of-head attention of MoH-ViT's first stages: a window around the query and a pooled map, one softmax.

    With local keys l and pooled keys p, from ``LN(pool(GELU(conv_1x1 x)))``::

        [A_l, A_p] = softmax([q' k_l^T + B_l, q' k_p^T + MLP(displacement)])
        o = (A_l + (q / |q|) T_h + b_h) v_l + A_p v_p

    The learned bias ``B_l`` and the tokens ``T_h`` have one entry per place of the window; places beyond the border are
    no keys.

    Args:
        dim, num_heads, shared_heads, active_heads, base_grid, bias_hidden, qkv_bias, attn_drop, proj_drop: as in
            :class:`MoHViTAttention`.
        window_size: side of the window, odd.
        sr_ratio: the pooled map has ``H // sr_ratio`` by ``W // sr_ratio`` cells, and at least one; they overlap where
            the ratio does not divide a side.
        pool_size: its size instead, whatever the image's; at most that of the map.
        pad: ``"refuse"`` raises on maps that the ratio does not divide, or that are smaller than ``pool_size``;
            ``"mask"`` takes any.

    Shapes: (B, H, W, C). Tokens that do not exist are no local keys; a pooled cell is the mean of those that exist.

    Reference: Jin et al., 2024, arXiv 2410.11842; Shi, 2023, arXiv 2311.17132 (the attention).

    >>> m = MoHViTAggregatedAttention(dim=16, num_heads=4, shared_heads=4, active_heads=0, sr_ratio=2)
    >>> m(torch.randn(2, 4, 6, 16)).shape
    torch.Size([2, 4, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        shared_heads: int = 2,
        active_heads: int | None = None,
        window_size: int = 3,
        sr_ratio: int = 8,
        pool_size: int | Sequence[int] | None = None,
        base_grid: int | Sequence[int] | None = None,
        bias_hidden: int = 512,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
    ):
        super().__init__(
            dim, num_heads, shared_heads, active_heads, base_grid, bias_hidden, qkv_bias, attn_drop, proj_drop
        )
        check_choice("pad", pad, ("mask", "refuse"))
        self.pad = pad
        if check_int("window_size", window_size, least=1) % 2 == 0:
            raise ValueError(f"window_size={window_size} must be odd")
        check_int("sr_ratio", sr_ratio, least=1)
        self.window_size, self.sr_ratio = window_size, sr_ratio
        self.pool_size: tuple[int, int] | None = None
        if pool_size is not None:
            rows, columns = to_tuple("pool_size", pool_size, 2)
            self.pool_size = rows, columns
        places = window_size**2
        self.sr = nn.Conv2d(dim, dim, kernel_size=1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, places), std=0.0004))
        self.learnable_tokens = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(num_heads, self.head_dim, places), std=0.02)
        )
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, places))

    @property
    def traits(self) -> Traits:
        power = 2 if self.pool_size is None else 1
        step = self.sr_ratio if self.pad == "refuse" and self.pool_size is None else 1
        return super().traits.but(work={"N": power}, memory={"N": power}, grid_multiple=step)

    def _around(self, t: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, N, C) to (B, N, C, places): each token's window, zeros beyond the border."""
        image = t.transpose(1, 2).unflatten(2, tuple(grid))
        windows = F.unfold(image, self.window_size, padding=self.window_size // 2)
        return windows.unflatten(1, (t.shape[2], -1)).permute(0, 3, 1, 2)

    def _cells(self, grid: Sequence[int]) -> tuple[int, int]:
        """Sides of the pooled map of a grid."""
        height, width = grid
        ratio, pool = self.sr_ratio, self.pool_size
        if self.pad == "refuse":
            fits = not (height % ratio or width % ratio) if pool is None else pool[0] <= height and pool[1] <= width
            if not fits:
                named = f"sr_ratio={ratio}" if pool is None else f"pool_size={pool}"
                raise ValueError(f"{named} does not fit the grid {(height, width)} of x (pad='refuse')")
        rows, columns = (height // ratio, width // ratio) if pool is None else pool
        return min(max(rows, 1), height), min(max(columns, 1), width)

    def _pooled(self, x: Tensor, valid: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """(B, P, C) tokens of the pooled map, and which of them exist."""
        image = x.movedim(-1, 1)
        image = F.gelu(self.sr(image))
        if valid is None:
            return self.norm(F.adaptive_avg_pool2d(image, size).flatten(2).mT), None
        share = F.adaptive_avg_pool2d(valid[:, None].to(image.dtype), size)
        cells = F.adaptive_avg_pool2d(image * valid[:, None], size) / torch.where(share > 0, share, 1.0)
        return self.norm(cells.flatten(2).mT), share.flatten(1) > 0

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        plan: Plan | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        grid, exists = x.shape[1:3], flat_valid(valid)
        size = self._cells(grid)
        x = zero_invalid(x, valid)
        tokens, heads = x.flatten(1, 2), self.num_heads
        notes = self._notes(exists, plan, None, returns)
        q, k, v = self._split(tokens)
        self._begin(tokens, q, notes)
        there = torch.ones_like(tokens[..., 0], dtype=torch.bool) if exists is None else exists
        local = self._around(there.to(x.dtype).unsqueeze(-1), grid).squeeze(2) > 0  # (B, N, places)
        pooled, cells = self._pooled(x, valid, size)
        pool_k, pool_v = (split_heads(f(pooled), heads) for f in (self.k, self.v))
        count = local.sum(-1) + (pooled.shape[1] if cells is None else cells.sum(1, keepdim=True))
        unit, q = self._queries(q, count[:, None, :, None])

        def window(t: Tensor) -> Tensor:
            """(B, H, N, D) to (B, H, N, D, places)."""
            return self._around(merge_heads(t), grid).unflatten(2, (heads, -1)).transpose(1, 2)

        k_local, v_local = window(F.normalize(k, dim=-1)), window(v.masked_fill(~there[:, None, :, None], 0.0))
        near = (q.unsqueeze(-2) @ k_local).squeeze(-2) + self.relative_pos_bias_local.unsqueeze(1)
        near = near.masked_fill(~local.unsqueeze(1), float("-inf"))
        far = q @ F.normalize(pool_k, dim=-1).mT + self._position_bias(grid, size)
        if cells is not None:
            far = far.masked_fill(~cells[:, None, None], float("-inf"))
        scores = torch.cat([near, far], -1)
        top = scores.detach().amax(-1, keepdim=True)
        weights = torch.exp(scores - torch.where(torch.isinf(top), 0.0, top))
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        weights = F.dropout(weights, self.attn_drop, self.training)
        near, far = weights.split([near.shape[-1], far.shape[-1]], -1)
        near = near + unit @ self.learnable_tokens + self.learnable_bias
        out = (v_local @ near.unsqueeze(-1)).squeeze(-1) + far @ pool_v
        y = self.proj(merge_heads(self._gate(out, notes), grid))
        return Output(through(self.proj_drop, y), losses=notes.losses)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``AggregatedAttention`` of MoH-ViT."""
        theirs = Released(state_dict, "AggregatedAttention of MoH-ViT")
        return theirs.close(theirs.renamed(_CosineHeads._RULES))
