"""Bi-level routing attention: regions choose regions, then tokens read the tokens of the chosen ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...grids import block_windows, crop_grid, pad_to_multiple, unblock_windows
from ...ops.attention import attention
from ...ops.block_policies import topk_blocks
from ...ops.block_sparse import BlockPlan, block_sparse_attention, gather_blocks
from ...types import Plan, Traits, check_choice, check_divides, to_tuple
from ..base import Mechanism
from ..layers import DepthwiseConv, split_heads, zero_invalid
from ..registry import register
from ..released import Released, Rule

DOWNSAMPLE = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")
COMPAT = (None, "authors", "authors-nchw")


@register("biformer", "bra", "bi-level-routing-attention")
class BiLevelRoutingAttention(Mechanism):
    """Bi-level routing attention of BiFormer, on images.

    The map is cut into ``S x S`` regions. With ``q_r, k_r`` the means of queries and keys over each region::

        A   = q_r k_r^T                         (region to region, no gradient)
        I   = top-k columns of each row of A
        O   = softmax(scale * Q_r K[I_r]^T) V[I_r]   for the tokens of each region r
        y   = W_O (O + LePE(V)),                LePE: a depthwise convolution

    ``plan`` returns the routing ``I`` and ``forward(x, plan=...)`` executes it. All heads share it.

    The scale defaults to ``qk_dim ** -0.5`` of the *whole* width, not of a head: the authors kept it so, and their
    weights are trained with it. Pass ``scale`` to change it.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim`` and ``qk_dim``.
        n_win: regions per side, an int or one per axis. A side that is not a multiple is padded at its end.
        topk: regions that each region reads; all of them where there are fewer.
        qk_dim: width of queries and keys; ``dim`` by default.
        scale: of the scores; ``qk_dim ** -0.5`` by default.
        side_dwconv: kernel of LePE; 0 for none.
        qkv_bias: biases of the query, key and value projection.
        out_proj: apply ``W_O``.
        kv_downsample: pool keys and values inside a region: ``"identity"``, ``"ada_avgpool"`` or ``"ada_maxpool"`` (to
            ``kv_per_win x kv_per_win``), ``"avgpool"`` or ``"maxpool"`` (by ``kv_downsample_ratio``).
        kv_per_win: see ``kv_downsample``.
        kv_downsample_ratio: see ``kv_downsample``.
        soft_routing: multiply the keys and values of a chosen region by its routing weight (softmax over the chosen).
        diff_routing: let the routing weight carry gradient to queries and keys; needs ``soft_routing``.
        param_routing: a linear layer before the routing product; needs ``diff_routing``.
        compat: ``None`` masks padding out of means and softmax. ``"authors"`` is their first class with ``auto_pad``:
            ``x`` is padded before the projection, padding counts in the means and is attended. ``"authors-nchw"`` is
            their second class: regions of ``H // n_win`` (so there may be more than ``n_win`` of them), means over real
            tokens, zero padding behind the projection, attended. All three agree where ``n_win`` divides the sides;
            either of theirs leaves out what lies behind the last whole cell of ``kv_downsample_ratio`` in a region.
        pad: ``"refuse"`` raises on sides that ``n_win``, and regions that ``kv_downsample_ratio``, do not divide;
            ``"mask"`` takes any.

    Reference: Zhu et al., 2023, arXiv 2303.08810, equations 3 to 7.

    >>> import torch
    >>> BiLevelRoutingAttention(dim=16, num_heads=2, n_win=4, topk=2)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    class_traits = Traits(
        grid_ranks=frozenset({2}),
        work={"N": 2, "topk": 1},
        memory={"N": 2},
        gradient="stopped",
        needs_plan=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        scale: float | None = None,
        side_dwconv: int = 3,
        qkv_bias: bool = True,
        out_proj: bool = True,
        kv_downsample: str = "identity",
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        compat: str | None = None,
        pad: str = "mask",
    ):
        super().__init__(dim)
        check_choice("pad", pad, ("mask", "refuse"))
        self.pad = pad
        self.num_heads, self.qk_dim = num_heads, dim if qk_dim is None else qk_dim
        check_divides("num_heads", num_heads, "dim", dim)
        check_divides("num_heads", num_heads, "qk_dim", self.qk_dim)
        check_choice("kv_downsample", kv_downsample, DOWNSAMPLE)
        check_choice("compat", compat, COMPAT)
        self.n_win = to_tuple("n_win", n_win, 2)
        if min(self.n_win) < 1:
            raise ValueError(f"n_win={n_win} must be at least 1")
        # their second class may cut more regions than n_win, so that only the map tells how many there are
        most = None if compat == "authors-nchw" else math.prod(self.n_win)
        if topk < 1 or (most is not None and topk > most):
            raise ValueError(
                f"topk={topk} is not possible with {self.n_win[0]} x {self.n_win[1]} regions; "
                f"choose 1 to {math.prod(self.n_win)}"
            )
        if side_dwconv < 0 or (side_dwconv and side_dwconv % 2 == 0):
            raise ValueError(f"side_dwconv={side_dwconv} is not possible; choose 0 or an odd kernel size")
        if min(kv_per_win, kv_downsample_ratio) < 1:
            raise ValueError(
                f"kv_per_win and kv_downsample_ratio must be at least 1, got {kv_per_win} and {kv_downsample_ratio}"
            )
        if diff_routing and not soft_routing:
            raise ValueError("diff_routing=True needs soft_routing=True: hard choices carry no gradient")
        if param_routing and not diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True, otherwise its weights are never trained")
        if compat == "authors-nchw" and (soft_routing or kv_downsample != "identity" or self.qk_dim != dim):
            raise ValueError(
                "compat='authors-nchw' has neither soft_routing nor kv_downsample nor qk_dim; use compat='authors'"
            )
        self.topk, self.compat = topk, compat
        self.kv_downsample, self.kv_per_win, self.kv_downsample_ratio = kv_downsample, kv_per_win, kv_downsample_ratio
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        self.scale = self.qk_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim, bias=qkv_bias)
        self.router = nn.Linear(self.qk_dim, self.qk_dim) if param_routing else nn.Identity()
        self.lepe = DepthwiseConv(dim, side_dwconv) if side_dwconv else None
        self.proj = nn.Linear(dim, dim) if out_proj else nn.Identity()

    @property
    def traits(self) -> Traits:
        multiple = 1
        if self.pad == "refuse":
            cell = 1 if self.kv_downsample in ("identity", *DOWNSAMPLE[1:3]) else self.kv_downsample_ratio
            multiple = math.lcm(*self.n_win) * cell
        return self._costs.but(grid_multiple=multiple)

    @property
    def _costs(self) -> Traits:
        if self.kv_downsample.startswith("ada_"):  # every region keeps a fixed number of keys
            return self.class_traits.but(work={"N": 1, "topk": 1}, memory={"N": 1})
        if self.soft_routing:  # copies keys and values out per choice
            return self.class_traits
        return self.class_traits.but(memory={"N": 1})  # the executor holds pieces of the score map only

    # ---- regions

    def region(self, grid: Sequence[int]) -> tuple[int, int]:
        """Height and width of a region on this grid."""
        sides = []
        for axis, (size, regions) in enumerate(zip(grid, self.n_win, strict=True)):
            if self.pad == "refuse" and size % regions:
                raise ValueError(
                    f"n_win={regions} does not divide axis {axis} of the grid {tuple(grid)} of x (pad='refuse')"
                )
            if self.compat == "authors-nchw":
                if size < regions:
                    raise ValueError(
                        f"x has {size} tokens on axis {axis} of its grid {tuple(grid)}, fewer than n_win={regions}; "
                        "compat='authors-nchw' cannot serve it"
                    )
                sides.append(size // regions)
            else:
                sides.append(max(1, -(-size // regions)))
        return sides[0], sides[1]

    def _regions(self, x: Tensor, region: tuple[int, int]) -> Tensor:
        """(B, H, W, C) -> (B, R, h, w, C), padded with zeros."""
        return block_windows(self._pad(x, region), region).flatten(1, 2)

    def _pad(self, x: Tensor, region: tuple[int, int]) -> Tensor:
        if self.compat != "authors":
            return pad_to_multiple(x, region)
        # The authors keep n_win regions even when the last ones are empty.
        extra = [r * s - n for r, s, n in zip(region, self.n_win, x.shape[1:3], strict=True)]
        return F.pad(x, (0, 0, 0, extra[1], 0, extra[0])) if any(extra) else x

    def _exists(self, x: Tensor, valid: Tensor | None, region: tuple[int, int], attended: bool) -> Tensor | None:
        """(B, R, h, w) boolean: the tokens that count in means, or (``attended``) that may be attended; ``None``: all.

        The authors attend to padding; their second class leaves it out of the means, their first does not.
        """
        padded = any(s % r for s, r in zip(x.shape[1:3], region, strict=True))
        counts = self.compat == "authors" or (attended and self.compat == "authors-nchw")
        if valid is None and (counts or not padded):
            return None
        exists = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if valid is None else valid
        if not counts:
            return self._regions(exists.unsqueeze(-1), region).squeeze(-1)
        return ~self._regions(~exists.unsqueeze(-1), region).squeeze(-1)

    def _project(self, x: Tensor, valid: Tensor | None, region: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (B, R, h, w, .)."""
        x = zero_invalid(x, valid)
        widths = [self.qk_dim, self.qk_dim, self.dim]
        if self.compat == "authors":
            q, k, v = self.qkv(self._regions(x, region)).split(widths, -1)
        else:
            q, k, v = self._regions(self.qkv(x), region).split(widths, -1)
        return q, k, v

    # ---- routing

    @staticmethod
    def _mean(x: Tensor, exists: Tensor | None) -> Tensor:
        """(B, R, h, w, C) -> (B, R, C): mean over the tokens that exist."""
        if exists is None:
            return x.mean((2, 3))
        size = exists.sum((2, 3)).clamp(min=1).unsqueeze(-1)
        return x.masked_fill(~exists.unsqueeze(-1), 0.0).sum((2, 3)) / size

    def _affinity(self, q: Tensor, k: Tensor, exists: Tensor | None) -> Tensor:
        """(B, 1, R, R) scores between regions."""
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        q_r, k_r = self.router(self._mean(q, exists)), self.router(self._mean(k, exists))
        scale = 1.0 if self.compat == "authors-nchw" else self.scale  # only the order counts there
        return ((q_r * scale) @ k_r.transpose(-2, -1)).unsqueeze(1)

    def _route(self, affinity: Tensor, exists: Tensor | None, tokens: tuple[int, int]) -> BlockPlan:
        regions, (q_block, k_block) = affinity.shape[-1], tokens
        allowed = None if exists is None else exists.flatten(2).any(-1)[:, None, None]
        return topk_blocks(affinity, self.topk, q_block, k_block, regions * q_block, regions * k_block, allowed=allowed)

    def make_plan(self, x: Tensor, *, valid: Tensor | None = None) -> Plan:  # type: ignore[override]
        region = self.region(x.shape[1:3])
        q, k, _v = self._project(x, valid, region)
        exists = self._exists(x, valid, region, attended=False)
        return self._route(self._affinity(q, k, exists), exists, self._tokens(region))

    # ---- keys and values of a region

    def _tokens(self, region: tuple[int, int]) -> tuple[int, int]:
        """Queries and keys in a region."""
        if self.kv_downsample == "identity":
            return math.prod(region), math.prod(region)
        if self.kv_downsample.startswith("ada_"):
            return math.prod(region), self.kv_per_win**2
        ratio = self.kv_downsample_ratio
        if self.pad == "refuse" and any(side % ratio for side in region):
            raise ValueError(
                f"kv_downsample_ratio={ratio} does not divide the regions of {region[0]} x {region[1]} tokens on this "
                "grid (pad='refuse')"
            )
        small = [side // ratio if self.compat else -(-side // ratio) for side in region]
        if min(small) < 1:
            raise ValueError(
                f"kv_downsample_ratio={self.kv_downsample_ratio} is larger than the regions of "
                f"{region[0]} x {region[1]} tokens on this grid"
            )
        return math.prod(region), math.prod(small)

    def _shrink(self, x: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pool (B, R, h, w, C) inside the regions to (B, R, K, C); also (B, R, K) which of the results exist."""
        if self.kv_downsample == "identity":
            return x.flatten(2, 3), None if exists is None else exists.flatten(2)
        batch, regions = x.shape[:2]

        def pool(t: Tensor, kind: str) -> Tensor:
            t = t.flatten(0, 1).permute(0, 3, 1, 2)
            if self.kv_downsample.startswith("ada_"):
                ada = F.adaptive_avg_pool2d if kind == "avg" else F.adaptive_max_pool2d
                t = ada(t, self.kv_per_win)
            else:
                shrink = F.avg_pool2d if kind == "avg" else F.max_pool2d  # a cell at the end is that of what there is
                t = shrink(t, self.kv_downsample_ratio, ceil_mode=self.compat is None)
            return t.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (batch, regions))

        kind = "avg" if "avg" in self.kv_downsample else "max"
        if exists is None:
            return pool(x, kind), None
        there = exists.unsqueeze(-1)
        share = pool(there.to(x.dtype), "avg")
        some = share.squeeze(-1) > 0
        if kind == "avg":
            return pool(x.masked_fill(~there, 0.0), "avg") / share.masked_fill(share == 0, 1.0), some
        low = torch.finfo(x.dtype).min
        return pool(x.masked_fill(~there, low), "max").masked_fill(~some.unsqueeze(-1), 0.0), some

    # ---- the mechanism

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        grid = x.shape[1:3]
        region = self.region(grid)
        q, k, v = self._project(x, valid, region)
        counted = self._exists(x, valid, region, attended=False)
        affinity = self._affinity(q, k, counted) if plan is None or self.soft_routing else None
        if plan is None:
            assert affinity is not None
            with torch.no_grad():
                plan = self._route(affinity, counted, self._tokens(region))
        if not isinstance(plan, BlockPlan):
            raise TypeError(f"plan must be a BlockPlan made by m.plan(x), got {type(plan).__name__}")
        n, m = (q.shape[1] * t for t in self._tokens(region))
        plan.expect("blocks", N=n, M=m, q_block=n // q.shape[1], k_block=m // q.shape[1])
        if plan.index.shape[0] not in (1, q.shape[0]) or plan.index.shape[1] != 1:
            raise ValueError(
                f"plan routes {plan.index.shape[0]} samples and {plan.index.shape[1]} heads, but there are "
                f"{q.shape[0]} samples, whose heads share one routing"
            )
        readable = self._exists(x, valid, region, attended=True)
        if readable is not None:
            v = v.masked_fill(~readable.unsqueeze(-1), 0.0)
        small_k, exists = self._shrink(k, readable)
        small_v, _same = self._shrink(v, readable)
        q_h, k_h, v_h = (split_heads(t, self.num_heads) for t in (q, small_k, small_v))
        keys = None if exists is None else exists.flatten(1)
        if self.soft_routing:
            assert affinity is not None
            out = self._read_softly(q_h, k_h, v_h, plan, affinity, keys)
        else:
            out = block_sparse_attention(q_h, k_h, v_h, plan, valid=keys, scale=self.scale)
        out = out.transpose(1, 2).reshape(v.shape)
        if self.lepe is not None and self.compat == "authors":
            out = out + block_windows(self.lepe(self._image(v, region, grid)), region).flatten(1, 2)
        y = crop_grid(self._image(out, region, grid), grid)
        if self.lepe is not None and self.compat != "authors":
            y = y + self.lepe(crop_grid(self._image(v, region, grid), grid))
        return self.proj(y)

    def _image(self, x: Tensor, region: tuple[int, int], grid: Sequence[int]) -> Tensor:
        """(B, R, h, w, C) -> (B, H', W', C) with the padding still on."""
        rows = self.n_win[0] if self.compat == "authors" else -(-grid[0] // region[0])
        return unblock_windows(x.unflatten(1, (rows, x.shape[1] // rows)))

    def _read_softly(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, affinity: Tensor, keys: Tensor | None
    ) -> Tensor:
        """Chosen keys and values times the routing weight of their region: they differ per choice, so copy them out."""
        slots = plan.slots()
        index = plan.index.expand(affinity.shape[0], 1, -1, -1)
        chosen = affinity.gather(-1, index).masked_fill(~slots, float("-inf"))
        weight = chosen.masked_fill(~slots.any(-1, keepdim=True), 0.0).softmax(-1)[..., None, None]
        k_g, v_g = gather_blocks(k, plan) * weight, gather_blocks(v, plan) * weight
        batch, heads, regions, width, k_block, _ = k_g.shape
        there = slots.unsqueeze(-1).expand(batch, 1, regions, width, k_block)
        if keys is not None:
            there = there & gather_blocks(keys[:, None, :, None], plan).squeeze(-1)

        def rows(x: Tensor) -> Tensor:
            return x.transpose(1, 2).flatten(0, 1)

        out = attention(
            rows(q.unflatten(2, (regions, plan.q_block))),
            rows(k_g.flatten(3, 4)),
            rows(v_g.flatten(3, 4)),
            valid=None if keys is None and plan.count is None else rows(there.flatten(3, 4)).squeeze(1),
            scale=self.scale,
        )
        return out.unflatten(0, (batch, regions)).transpose(1, 2).flatten(2, 3)

    # ---- weights

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``BiLevelRoutingAttention`` (channels last) or ``nchwBRA`` (1x1 convolutions)."""
        theirs = Released(state_dict, "the authors' BiLevelRoutingAttention or nchwBRA")

        def flat(ours: str) -> Rule:
            return lambda match, value: {f"{ours}.{match[1]}": value.flatten(1) if value.dim() > 1 else value}

        rules: dict[str, Rule] = {
            r"(?:qkv\.qkv|qkv_linear)\.(weight|bias)": flat("qkv"),
            r"(?:wo|output_linear)\.(weight|bias)": flat("proj"),
            r"router\.emb\.(weight|bias)": r"router.\1",
            r"lepe\.(weight|bias)": r"lepe.\1",
        }
        return theirs.close(theirs.renamed(rules))
