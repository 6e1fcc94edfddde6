"""SG-Former: a hybrid-scale layer finds out which tokens matter, the next layer merges the others before reading."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...checks import check_device, check_float
from ...grids import block_windows, crop_grid, pad_to_multiple, unblock_windows
from ...ops import attention
from ...types import Output, Plan, Traits, check_choice, check_divides
from ..base import Mechanism
from ..layers import (
    DepthwiseConv,
    flat_valid,
    head_dim_of,
    init_like_pvt,
    merge_heads,
    plain,
    split_heads,
    through,
    zero_invalid,
)
from ..registry import register
from ..released import Released, Rule

Groups = tuple[tuple[int, int], ...]

#: For each reduction ratio: (parts of the sorted tokens, tokens merged into one), least significant first.
#: The parts add up to the denominator of the shares: (1, 2, 1) are a quarter, a half and a quarter.
MERGES: dict[int, Groups] = {8: ((1, 196), (2, 56), (1, 28)), 4: ((1, 49), (2, 14), (1, 7)), 2: ((1, 2), (1, 1))}


def _grid_multiple(groups: Groups) -> int:
    """The smallest side such that every grid of multiples of it splits into the groups."""
    whole = sum(share for share, _ in groups)
    side = 1
    while any(side * side * share % (whole * factor) for share, factor in groups):
        side += 1
    return side


def _scans(carry: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The significance (B, N) of the tokens ``x`` in row-major and in column-major order; raise unless it is one."""
    if isinstance(carry, (tuple, list)) and len(carry) == 2:
        shape = (x.shape[0], x.shape[1] * x.shape[2])
        for part in carry:
            check_float("carry", part, "a pair of floating-point tensors (B, H W), in row-major and column-major order")
            if part.shape != shape:
                raise ValueError(f"carry as a pair must hold two tensors of shape {shape}, got {tuple(part.shape)}")
            check_device(x=x, carry=part)
        return carry[0], carry[1]
    check_float("carry", carry, "a significance map, a floating-point tensor (B, H, W)")
    if carry.shape != x.shape[:-1]:
        raise ValueError(f"carry must be a significance map of shape {tuple(x.shape[:-1])}, got {tuple(carry.shape)}")
    check_device(x=x, carry=carry)
    return carry.flatten(1), carry.transpose(1, 2).flatten(1)


@register("sg-former", "self-guided-attention")
class SelfGuidedAttention(Mechanism):
    """The attention layers of SG-Former, which come in pairs.

    ``role="hybrid"``: half of the heads read ``x' = GELU(LN(conv_(s x s, stride s) x))``, the map pooled by the ratio
    s; the other half read within windows. With ``A_1`` and ``A_2`` their weights, the significance of a token is the
    mean attention it receives, over queries and heads: ``S = upsample(mean A_1) + mean A_2`` (B, H, W), without
    gradient. It is returned as the carry: ``returns=("carry",)``.

    ``role="guided"``: takes that map as ``carry`` and sorts the tokens by it. The less significant, the more
    consecutive tokens of the sorted list are merged into one by a learned weighting (a Linear(f, 1) per group). Half of
    the heads read the list sorted from the row-major map, the others the one sorted from the column-major map. The two
    lists differ only in the order of equally significant tokens. All tokens query.

    ``role="global"``: plain attention, as in the last stage.

    Every role adds a locally enhanced position, ``y = W_o (o + DWConv_3x3(W_l x))``. With ratio s = 8, a quarter, a
    half and a quarter of the N tokens are merged by 196, 56 and 28 (s = 4: by 49, 14 and 7; s = 2: halves by 2 and 1),
    so each half of the heads reads N / 784 + N / 112 + N / 112 keys.

    Any size: windows and patches that do not divide the map are completed with tokens that are nobody's key and leave
    the significance; a group that its factor does not divide begins with tokens that do not exist.

    The authors hand on two lists, ``[mask_1, mask_2]``, of one map from their hybrid layer. As a pair of tensors
    (B, H W), in row-major and column-major order, the carry may be any two.

    Shapes: x and y (B, H, W, C). The order is a plan: ``m.plan(x, carry=S)``, with a stable sort, so equal tokens keep
    the order of their scan.

    Differs from the authors' code: the carry is explicit and is handed on by the guided layer as it is, where theirs
    sets it to ``None``; the sort is stable. Theirs fails on maps that windows or groups do not divide, and drops what
    lies behind the last whole patch (``compat="authors"``). Tokens outside ``valid`` are zero before convolutions and
    merges, count as least significant, and are never read; a merged key exists when one of its tokens does.

    Args:
        dim: width C.
        num_heads: heads; even for ``"hybrid"`` and ``"guided"``.
        role: ``"hybrid"``, ``"guided"`` or ``"global"``.
        sr_ratio: the reduction ratio s.
        window_size: side of the windows of the hybrid layer.
        merge: for the guided layer, pairs (share, factor), least significant first; by default the paper's for
            ``sr_ratio``. Shares are relative to their sum.
        qkv_bias: biases of the query, key and value projections.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output.
        pad: of maps that windows, patches or groups do not divide: ``"mask"``, or ``"refuse"`` to raise.
        compat: ``"authors"``: a hybrid layer reads patches up to the last whole one and leaves out the rest of the map.

    Reference: Ren et al., 2023, arXiv 2308.12216, eq. 1-6.

    >>> import torch
    >>> x = torch.randn(2, 8, 8, 8)
    >>> out = SelfGuidedAttention(8, 4, "hybrid", sr_ratio=2, window_size=4)(x, returns=("carry",))
    >>> SelfGuidedAttention(8, 4, "guided", sr_ratio=2)(out.y, carry=out.carry).shape
    torch.Size([2, 8, 8, 8])
    """

    class_traits = Traits(
        grid_ranks=frozenset({2}),
        carries=True,
        needs_plan=True,
        weights=False,
        work={"N": 2},
        memory={"N": 2},
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        role: str = "hybrid",
        sr_ratio: int = 8,
        window_size: int = 7,
        merge: Sequence[Sequence[int]] | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("role", role, ("hybrid", "guided", "global"))
        check_choice("pad", pad, ("mask", "refuse"))
        check_choice("compat", compat, (None, "authors"))
        self.pad, self.compat = pad, compat
        self.head_dim = head_dim_of(dim, num_heads)
        self.num_heads, self.role, self.sr_ratio, self.window_size = num_heads, role, sr_ratio, window_size
        self.attn_drop = attn_drop
        self.scale = self.head_dim**-0.5 if scale is None else scale
        if role != "global":
            check_divides("2 (halves)", 2, "num_heads", num_heads)
        if merge is not None and role != "guided":
            raise ValueError(f"merge={merge} is for role='guided', got role={role!r}")
        self.groups: Groups = ()
        if role == "hybrid":
            if sr_ratio < 1 or window_size < 1:
                raise ValueError(f"sr_ratio and window_size must be at least 1, got {sr_ratio} and {window_size}")
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
            self.q1 = nn.Linear(dim, dim // 2, bias=qkv_bias)
            self.q2 = nn.Linear(dim, dim // 2, bias=qkv_bias)
            self.kv1 = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv2 = nn.Linear(dim, dim, bias=qkv_bias)
        elif role == "guided":
            if merge is None:
                check_choice("sr_ratio", sr_ratio, sorted(MERGES))
                merge = MERGES[sr_ratio]
            if not merge or any(len(g) != 2 or min(g) < 1 for g in merge):
                raise ValueError(f"merge must hold pairs (share, factor) of positive integers, got {merge}")
            self.groups = tuple((int(share), int(factor)) for share, factor in merge)
            self.merge = nn.ModuleList(nn.Linear(factor, 1) for _, factor in self.groups)
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv1 = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv2 = nn.Linear(dim, dim, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.lepe_linear = nn.Linear(dim, dim)
        self.lepe_conv = DepthwiseConv(dim, 3)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear maps start narrow, convolutions at unit gain over their fan-out."""
        init_like_pvt(self)

    @property
    def traits(self) -> Traits:
        refuses = self.pad == "refuse"
        if self.role == "hybrid":
            multiple = 1
            if refuses and self.compat == "authors":  # windows, and at least one whole patch
                multiple = -(-self.sr_ratio // self.window_size) * self.window_size
            elif refuses:
                multiple = math.lcm(self.window_size, self.sr_ratio)
            return self.class_traits.but(needs_plan=False, grid_multiple=multiple)
        if self.role == "guided":
            multiple = _grid_multiple(self.groups) if refuses else 1
            return self.class_traits.but(grid_multiple=multiple, gradient="stopped")
        return self.class_traits.but(needs_plan=False, carries=False)

    # ---- hybrid scale

    def _project(self, x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
        """Two linear maps of the same tokens in one product, side by side."""
        if not plain(first, second):
            return torch.cat([first(x), second(x)], -1)
        bias = None if first.bias is None else torch.cat([first.bias, second.bias])
        return nn.functional.linear(x, torch.cat([first.weight, second.weight]), bias)

    def _hybrid(self, x: Tensor, valid: Tensor | None, significance: bool) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) and the significance (B, H, W)."""
        (batch, height, width, _), half = x.shape, self.num_heads // 2
        ratio, window, whole = self.sr_ratio, self.window_size, self.compat == "authors"
        steps = {"window_size": window} if whole else {"window_size": window, "sr_ratio": ratio}
        for name, step in steps.items() if self.pad == "refuse" else ():
            if height % step or width % step:
                raise ValueError(f"{name}={step} does not divide the grid {(height, width)} of x (pad='refuse')")
        rows, columns = (side // ratio if whole else -(-side // ratio) for side in (height, width))
        if not (rows and columns):
            raise ValueError(
                f"sr_ratio={ratio} is larger than the grid {(height, width)} of x, and compat='authors' reads whole "
                "patches only"
            )

        def covered(t: Tensor) -> Tensor:
            """(B, H, W, C) of what the strided convolution reads: its whole patches, or all, completed with zeros."""
            return t[:, : rows * ratio, : columns * ratio] if whole else pad_to_multiple(t, ratio)

        drop = self.attn_drop if self.training else 0.0

        def read(q: Tensor, k: Tensor, v: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if not significance:
                return attention(q, k, v, valid=exists, scale=self.scale, dropout_p=drop), None
            return attention(q, k, v, valid=exists, scale=self.scale, dropout_p=drop, return_weights=True)

        def received(weights: Tensor, exists: Tensor | None) -> Tensor:
            """(B, M): the mean over heads and existing queries (B, N) of what each key is given."""
            weights = weights.detach()
            if exists is None:
                return weights.mean((1, 2))
            total = weights.masked_fill(~exists[:, None, :, None], 0.0).mean(1).sum(1)
            return total / exists.sum(1, keepdim=True).clamp(min=1)

        source = covered(zero_invalid(x, valid))
        if plain(self.sr):  # patches do not overlap, so that the convolution is one product
            patches = block_windows(source, ratio).flatten(3)
            pooled = nn.functional.linear(patches, self.sr.weight.permute(0, 2, 3, 1).flatten(1), self.sr.bias)
        else:
            pooled = self.sr(source.movedim(-1, 1)).movedim(1, -1)
        pooled_valid = None  # every patch holds a token of the map
        if valid is not None:
            pooled_valid = block_windows(covered(valid.unsqueeze(-1)), ratio).flatten(3).any(-1)
        k1, v1 = (split_heads(t, half) for t in self.kv1(nn.functional.gelu(self.norm(pooled))).chunk(2, -1))
        far, far_weights = read(split_heads(self.q1(x), half), k1, v1, flat_valid(pooled_valid))
        # straight from (window, token, q/k/v, head) to one contiguous (window, head, token) each
        windows = block_windows(pad_to_multiple(self._project(x, self.q2, self.kv2), window), window)
        lead, side = windows.shape[:3], windows.shape[3]
        parts = windows.unflatten(-1, (3, half, self.head_dim)).permute(5, 0, 1, 2, 6, 3, 4, 7)
        q2, k2, v2 = parts.reshape(3, math.prod(lead), half, side * side, self.head_dim)
        window_valid, there = None, valid
        if there is None and (height % window or width % window):
            there = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if there is not None:
            there = pad_to_multiple(there.unsqueeze(-1), window)
            window_valid = block_windows(there, window).flatten(0, 2).flatten(1)
        near, near_weights = read(q2, k2, v2, window_valid)
        near = near.view(*lead, half, side, side, self.head_dim).permute(0, 1, 4, 2, 5, 3, 6)
        near = near.reshape(batch, lead[1] * side, lead[2] * side, self.dim // 2)
        out = torch.cat([merge_heads(far, (height, width)), crop_grid(near, (height, width))], -1)
        if far_weights is None or near_weights is None:
            return out, None
        far_map = received(far_weights, flat_valid(valid)).view(batch, 1, rows, columns)
        reach = (height, width) if whole else (rows * ratio, columns * ratio)
        far_map = nn.functional.interpolate(far_map, reach, mode="nearest")[:, 0, :height, :width]
        near_map = unblock_windows(received(near_weights, window_valid).view(*lead, side, side, 1))
        return out, far_map + crop_grid(near_map, (height, width)).squeeze(-1)

    # ---- self-guided

    def make_plan(  # type: ignore[override]
        self, x: Tensor, *, carry: Any = None, valid: Tensor | None = None
    ) -> Plan:
        """Tokens by rising significance, (B, N) row-major numbers, from both scans."""
        if self.role != "guided":
            return super().make_plan(x)
        if carry is None:
            raise ValueError(
                "role='guided' needs the significance map (B, H, W) as carry: "
                "the hybrid layer before it returns it with returns=('carry',)"
            )
        height, width = x.shape[1:3]
        scans = _scans(carry, x)
        if valid is not None:
            first, second = valid.flatten(1), valid.transpose(1, 2).flatten(1)
            scans = scans[0].masked_fill(~first, float("-inf")), scans[1].masked_fill(~second, float("-inf"))
        rows, columns = (scan.argsort(dim=1, stable=True) for scan in scans)
        columns = columns % height * width + columns // height
        return Plan("significance", {"rows": rows, "columns": columns}, (("B", x.shape[0]), ("grid", (height, width))))

    def key_count(self, tokens: int) -> int:
        """Keys that each half of the heads of a guided layer reads, of ``tokens``.

        >>> SelfGuidedAttention(8, 2, "guided", sr_ratio=8).key_count(3136)
        60
        """
        whole = sum(share for share, _ in self.groups)
        for share, factor in self.groups if self.pad == "refuse" else ():
            if tokens * share % (whole * factor):
                side = _grid_multiple(self.groups)
                raise ValueError(
                    f"{tokens} tokens do not split into groups of shares {[s for s, _ in self.groups]} merged by "
                    f"{[f for _, f in self.groups]} (pad='refuse'); grids whose sides are multiples of {side} do"
                )
        sizes = self._group_sizes(tokens)
        return sum(-(-size // factor) for size, (_, factor) in zip(sizes, self.groups, strict=True))

    def _group_sizes(self, tokens: int) -> list[int]:
        """Tokens of each group: their shares, as near as whole numbers come."""
        ends = [0, *itertools.accumulate(share for share, _ in self.groups)]
        ends = [tokens * end // ends[-1] for end in ends]
        return [stop - start for start, stop in itertools.pairwise(ends)]

    def _merged(self, x: Tensor, order: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, K, C) keys' tokens and which exist (B, K), from the sorted list."""
        ordered = x.gather(1, order.unsqueeze(-1).expand_as(x))
        exists = None if valid is None else valid.gather(1, order)
        keys, alive, start = [], [], 0
        for size, (_, factor), layer in zip(self._group_sizes(x.shape[1]), self.groups, self.merge, strict=True):
            stop, short = start + size, -size % factor
            if not size:
                continue
            chunks = nn.functional.pad(ordered[:, start:stop], (0, 0, short, 0)) if short else ordered[:, start:stop]
            chunks = chunks.unflatten(1, (-1, factor))
            if plain(layer):
                weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
                keys.append((chunks * weight[0].unsqueeze(-1)).sum(-2) + bias)
            else:
                keys.append(layer(chunks.mT).squeeze(-1))
            if exists is not None:
                alive.append(nn.functional.pad(exists[:, start:stop], (short, 0)).unflatten(1, (-1, factor)).any(-1))
            start = stop
        return torch.cat(keys, 1), torch.cat(alive, 1) if alive else None

    def _guided(self, x: Tensor, valid: Tensor | None, plan: Plan) -> Tensor:
        self.key_count(x.shape[1] * x.shape[2])
        flat, exists = zero_invalid(x, valid).flatten(1, 2), flat_valid(valid)
        drop, half = self.attn_drop if self.training else 0.0, self.num_heads // 2
        q = split_heads(self.q(x), self.num_heads)
        rows, columns = (plan.choices(scan, flat.shape[:2], flat.shape[1], "token") for scan in ("rows", "columns"))
        tokens1, alive1 = self._merged(flat, rows, exists)
        tokens2, alive2 = self._merged(flat, columns, exists)
        k1, v1 = (split_heads(t, half) for t in self.kv1(tokens1).chunk(2, -1))
        k2, v2 = (split_heads(t, half) for t in self.kv2(tokens2).chunk(2, -1))
        if valid is None:
            out = attention(q, torch.cat([k1, k2], 1), torch.cat([v1, v2], 1), scale=self.scale, dropout_p=drop)
        else:  # the two lists may differ in which of their merged tokens exist
            q1, q2 = q.chunk(2, 1)
            first = attention(q1, k1, v1, valid=alive1, scale=self.scale, dropout_p=drop)
            out = torch.cat([first, attention(q2, k2, v2, valid=alive2, scale=self.scale, dropout_p=drop)], 1)
        return merge_heads(out, x.shape[1:-1])

    # ---- the layer

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        plan: Plan | None = None,
        carry: Any = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        if self.role == "hybrid":
            if carry is not None:  # the map of an earlier block, replaced by this one's
                check_float("carry", carry)
            out, carry = self._hybrid(x, valid, "carry" in returns)
        elif self.role == "guided":
            scans = None if carry is None else _scans(carry, x)
            if plan is None:
                plan = self.plan(x, carry=carry, valid=valid)
            if scans is not None and valid is not None:
                exists = valid.flatten(1), valid.transpose(1, 2).flatten(1)
                if isinstance(carry, Tensor):
                    carry = carry.masked_fill(~valid, 0.0)
                else:
                    carry = tuple(s.masked_fill(~e, 0.0) for s, e in zip(scans, exists, strict=True))
            plan = plan.expect("significance", B=x.shape[0], grid=tuple(x.shape[1:3]))
            out = self._guided(x, valid, plan)
        else:
            q, k, v = (split_heads(t, self.num_heads) for t in self._project(x, self.q, self.kv).chunk(3, -1))
            drop = self.attn_drop if self.training else 0.0
            out = merge_heads(
                attention(q, k, v, valid=flat_valid(valid), scale=self.scale, dropout_p=drop), x.shape[1:-1]
            )
        out = out + self.lepe_conv(zero_invalid(self.lepe_linear(x), valid))
        return Output(through(self.proj_drop, self.proj(out)), carry=carry)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention``: the merging layers are called ``f1``, ``f2``, ``f3`` there."""
        theirs = Released(state_dict, "the authors' Attention")
        rules: dict[str, Rule] = {
            r"f([123])\.(weight|bias)": lambda match, value: {f"merge.{int(match[1]) - 1}.{match[2]}": value},
            r"(q|q1|q2|kv|kv1|kv2|sr|norm|lepe_linear|lepe_conv|proj)\.(weight|bias)": r"\1.\2",
        }
        return theirs.close(theirs.renamed(rules))
