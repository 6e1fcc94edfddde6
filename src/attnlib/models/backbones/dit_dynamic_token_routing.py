"""Dynamic token routing: each token decides at every node if it is computed, and if it goes on to a coarser map.

Ma et al., 2023, "DiT: Efficient Vision Transformers with Dynamic Token Routing", arXiv 2308.03409. (The diffusion
transformer of the same acronym is another model.) No code was released. From the paper: a routing space of depth and
scale, two gates for each token and node, Gumbel-Softmax in training, a loss that holds the arithmetic to a budget,
early stopping, blocks of PVTv2. **Everything below that level is ours**: which nodes there are, what a node that is off
does, how arithmetic is counted, where gates start, the sizes.

There is a map for every scale i, and S steps. At step j, for the scales i = 0 .. min(j, last), from fine to coarse::

    [row, col] = argmax over {off, on} of the two linear gates of F_i     (one bit per token each)
    for every block of node (i, j):  F_i <- F_i + row * attention(F_i),  F_i <- F_i + row * mlp(F_i)
    F_{i+1} <- F_{i+1} + P_ij(col * norm_i(F_i))     (a strided convolution and a norm, in cells where a token goes on)

Blocks are PVTv2's: attention to keys and values of a map made smaller by a strided convolution, an MLP with a depthwise
convolution. Tokens that are off are keys like others, and zeros to the depthwise convolution. A coarse map starts
without tokens; a cell holds one from when the first of its finer tokens comes. Logits are read from the coarsest map.

In evaluation only tokens that are on are computed: queries and MLPs are gathered, what nobody needs is skipped, and
:class:`Routing` says the floating-point operations of that. In training everything is computed, gates are hard in the
forward pass and soft in the backward pass (straight through), and the loss ``budget`` is ``(ratio - budget)^2`` with
the expected operations over those of the plain PVTv2 path, which goes down one scale a step with every gate on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_ints, check_real
from ...nn.layers import (
    DepthwiseConv,
    DropPath,
    Mlp,
    Patchify,
    init_fan_out,
    merge_heads,
    split_heads,
    strided_valid,
    zero_invalid,
)
from ...nn.recompute import checkpointed
from ...nn.reduced.spatial_reduction import SpatialReductionAttention
from ...ops import attention
from ..blocks import Make, Place, init_weights, mix, places
from ..build import register_models
from .stages import Backbone, Head

#: Forced gates by node (scale, step): the row gate and the column gate, 0, 1, or ``None`` for what tokens decide.
Gates = Mapping[tuple[int, int], tuple[int | None, int | None]]


@dataclass(frozen=True)
class Routing:
    """What became of the tokens.

    Args:
        maps: (B, H_i, W_i, C_i) of every scale, normed.
        there: (B, H_i, W_i) boolean, which tokens of a scale there are at the end.
        rows: by node (scale, step), (B, H_i, W_i) boolean: tokens that were computed.
        cols: by node, tokens that went on to the coarser scale.
        flops: (B,) floating-point operations of the gates, nodes, stem and head, with gradient in training.
        reference: those of the plain PVTv2 path, of one image.
    """

    maps: list[Tensor]
    there: list[Tensor]
    rows: dict[tuple[int, int], Tensor]
    cols: dict[tuple[int, int], Tensor]
    flops: Tensor
    reference: int

    @property
    def ratio(self) -> Tensor:
        """(B,): operations over those of the plain path."""
        return self.flops / self.reference


class Gate(nn.Module):
    """Two choices for every token, off and on, from a linear map that starts near "on".

    Args:
        dim: width.
        start: logit of "on" over "off" at the start.
        temperature: of Gumbel-Softmax, in training.
        average: with a rate such as 0.99, evaluation takes the moving average of the map's parameters in training.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int, start: float, temperature: float, average: float | None):
        super().__init__()
        self.linear, self.temperature, self.average = nn.Linear(dim, 2), temperature, average
        self.start = start
        self.reset()
        if average is not None:
            self.register_buffer("weight", self.linear.weight.detach().clone())
            self.register_buffer("bias", self.linear.bias.detach().clone())

    def reset(self) -> None:
        """The start."""
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        with torch.no_grad():
            self.linear.bias.copy_(torch.tensor([-0.5, 0.5]) * self.start)
            if self.average is not None and hasattr(self, "weight"):
                self.weight.copy_(self.linear.weight)
                self.bias.copy_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W) of 0 and 1, with the gradient of the soft choice in training."""
        if self.training:
            if self.average is not None:
                with torch.no_grad():
                    self.weight.lerp_(self.linear.weight, 1 - self.average)
                    self.bias.lerp_(self.linear.bias, 1 - self.average)
            return F.gumbel_softmax(self.linear(x), self.temperature, hard=True)[..., 1]
        if self.average is not None:
            logits = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        else:
            logits = self.linear(x)
        return (logits[..., 1] >= logits[..., 0]).to(x.dtype)


class RoutedAttention(SpatialReductionAttention):
    """Spatial-reduction attention that can also be asked for chosen queries alone."""

    def some(self, x: Tensor, there: Tensor, chosen: Tensor) -> Tensor:
        """(1, H, W, C) -> (1, n, C) for the tokens of ``chosen`` (H, W), reading the keys that exist alone."""
        source, exist = self.reduced(x, there)
        assert exist is not None
        q = split_heads(self.q(x[:, chosen]), self.num_heads)
        k, v = (split_heads(t, self.num_heads) for t in self.kv(source[exist].unsqueeze(0)).chunk(2, -1))
        return self.proj(merge_heads(attention(q, k, v, scale=self.scale)))

    def flops(self, chosen: Any, keys: Any, sides: tuple[int, int]) -> Any:
        """Operations that come with any query, and those of ``chosen`` ones; ``keys`` of a map of these sides exist."""
        dim, fixed = self.dim, 4 * keys * self.dim**2
        if self.sr is not None:
            cells = -(-sides[0] // self.sr_ratio) * -(-sides[1] // self.sr_ratio)
            fixed = fixed + 2 * self.sr_ratio**2 * dim * dim * cells
        return fixed, chosen * (4 * dim * dim + 4 * keys * dim)


class RoutedBlock(nn.Module):
    """``x + row * attention(norm(x))``, then ``x + row * mlp(norm(x))``.

    Args:
        place: where it stands.
        sr_ratio: as of :class:`RoutedAttention`.
        mlp_ratio: hidden width of the MLP over the width.
        mechanism: in the place of that attention; it is computed for all tokens and masked.
    """

    def __init__(self, place: Place, sr_ratio: int, mlp_ratio: float, mechanism: Make | None):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.norm1, self.norm2 = norm(place.dim), norm(place.dim)
        made = RoutedAttention(place.dim, place.num_heads, sr_ratio) if mechanism is None else mechanism(place)
        self.attention = made
        self.mlp = Mlp(place.dim, mlp_ratio, depthwise=3)
        self.drop_path = DropPath(place.drop_path) if place.drop_path else nn.Identity()

    @property
    def gathers(self) -> bool:
        return isinstance(self.attention, RoutedAttention)

    def forward(self, x: Tensor, there: Tensor, row: Tensor) -> Tensor:
        """(B, H, W, C) -> the same; ``there`` (B, H, W) boolean, ``row`` (B, H, W) of 0 and 1."""
        on, exists = row.unsqueeze(-1), None if bool_all(there) else there
        y = zero_invalid(self.norm1(x), exists)
        x = x + on * self.drop_path(mix(self.attention, y, valid=exists)[0])
        return x + on * self.drop_path(self.mlp(self.norm2(x), row.detach() > 0))

    def some(self, x: Tensor, there: Tensor, chosen: Tensor) -> Tensor:
        """(1, H, W, C) -> the same; tokens outside ``chosen`` (H, W) stay as they are."""
        y = zero_invalid(self.norm1(x), there)
        tokens = x[:, chosen] + self.attention.some(y, there, chosen)  # type: ignore[operator, union-attr]
        mlp = self.mlp
        hidden = mlp.fc1(self.norm2(tokens))
        assert mlp.dwconv is not None
        wide = hidden.new_zeros(*x.shape[:3], hidden.shape[2])
        wide[:, chosen] = hidden
        tokens = tokens + mlp.fc2(mlp.act(mlp.dwconv(wide)[:, chosen]))
        out = x.clone()
        out[:, chosen] = tokens
        return out

    def flops(self, chosen: Any, keys: Any, sides: tuple[int, int]) -> Any:
        """Operations that come with the node, and those of the chosen tokens."""
        if not isinstance(self.attention, RoutedAttention):
            raise ValueError("operations are counted for the attention of PVTv2; another mechanism was built in")
        fixed, each = self.attention.flops(chosen, keys, sides)
        dim, hidden = self.mlp.fc1.in_features, self.mlp.fc1.out_features
        return fixed + 18 * hidden * sides[0] * sides[1], each + chosen * 4 * dim * hidden


def bool_all(there: Tensor) -> bool:
    """Whether all tokens exist, as far as it can be read."""
    return not torch.compiler.is_compiling() and not there.is_meta and bool(there.all())


class Node(nn.Module):
    """The gates of a node, its blocks, and the way to the coarser scale.

    Args:
        blocks: a :class:`RoutedBlock` each.
        row, col: gates; no ``col`` on the coarsest scale.
        down: the convolution to the coarser scale.
    """

    def __init__(self, blocks: Sequence[RoutedBlock], row: Gate, col: Gate | None, down: Patchify | None):
        super().__init__()
        self.blocks, self.row, self.col, self.down = nn.ModuleList(blocks), row, col, down


class Scale(nn.Module):
    """The nodes of one scale, one for each step from its first, and the norm of its map."""

    def __init__(self, nodes: Sequence[Node], dim: int):
        super().__init__()
        self.nodes, self.norm = nn.ModuleList(nodes), nn.LayerNorm(dim, eps=1e-6)
        self.checkpointing = False


class DynamicTokenRoutingViT(Backbone):
    """See the module's docstring.

    Args:
        embed_dims, depths, num_heads, mlp_ratios, sr_ratios: width, blocks per node, heads, hidden width of MLPs over
            the width and tokens a side that become one key, per scale.
        steps: steps S, at least as many as scales.
        budget: what ``flops / reference`` is driven to by the loss ``budget``.
        early_stop: in evaluation, the share of tokens that are off at a node from which that node and all later ones of
            the scale are skipped for an image; ``None`` for never.
        gate_start: logit of "on" over "off" at the start.
        temperature: of Gumbel-Softmax.
        gate_average: evaluation takes moving averages of the gates' parameters with this rate; ``None`` for themselves.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`. Of another mechanism all tokens are computed, and its operations are not
            counted.

    >>> m = DynamicTokenRoutingViT((8, 16), (1, 1), (1, 2), (2, 2), (2, 1), steps=2, num_classes=3).eval()
    >>> m(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 3])
    >>> routing = m.route(torch.randn(1, 3, 32, 32), gates={(0, 0): (0, 1), (0, 1): (0, 0), (1, 1): (1, None)})
    >>> [int(routing.rows[node].sum()) for node in ((0, 0), (1, 1))]
    [0, 16]
    """

    #: Whether evaluation computes the tokens that are on alone, or all and masks; the numbers are the same.
    gathers: bool = True

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        steps: int = 4,
        budget: float = 0.5,
        early_stop: float | None = None,
        gate_start: float = 2.0,
        temperature: float = 1.0,
        gate_average: float | None = None,
        mechanism: Make | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        scales = len(embed_dims)
        for name, given in (("mlp_ratios", mlp_ratios), ("sr_ratios", sr_ratios)):
            if len(given) != scales:
                raise ValueError(f"{name}={tuple(given)} must have one number for each of {scales} scales")
        check_ints("sr_ratios", sr_ratios, least=1)
        if check_int("steps", steps, least=1) < scales:
            raise ValueError(f"steps={steps} must be at least the number of scales, {scales}, to reach the coarsest")
        reductions = [4 * 2**i for i in range(scales)]
        rows = places(embed_dims, depths, num_heads, reductions, drop_path_rate)
        average = None if gate_average is None else check_real("gate_average", gate_average, least=0, below=1)
        start = check_real("gate_start", gate_start)
        check_real("temperature", temperature, above=0)

        def gate(dim: int) -> Gate:
            return Gate(dim, start, temperature, average)

        columns = []
        for i, row in enumerate(rows):
            dim, last, nodes = embed_dims[i], i == scales - 1, []
            for _step in range(i, steps):
                blocks = [RoutedBlock(place, sr_ratios[i], mlp_ratios[i], mechanism) for place in row]
                down = None if last else Patchify(dim, embed_dims[i + 1], 3, 2, 1)
                nodes.append(Node(blocks, gate(dim), None if last else gate(dim), down))
            columns.append(Scale(nodes, dim))
        head = Head(embed_dims[-1], num_classes, global_pool, None, drop_rate)
        super().__init__(
            Patchify(in_chans, embed_dims[0], 7, 4, 3), columns, embed_dims, reductions, None, head, num_classes,
            in_chans, img_size,
        )  # fmt: skip
        self.steps, self.embed_dims = steps, tuple(embed_dims)
        self.budget = check_real("budget", budget, above=0)
        self.early_stop = None if early_stop is None else check_real("early_stop", early_stop, least=0, most=1)
        init_weights(self, also=(RoutedAttention,))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DepthwiseConv)):
                init_fan_out(module)
            elif isinstance(module, Gate):
                module.reset()

    # ---- routing

    def _check_gates(self, gates: Gates | None, scales: int) -> Gates:
        for node, pair in (gates or {}).items():
            i, j = node
            if not (0 <= i <= j < self.steps and i < len(self.embed_dims)):
                raise ValueError(
                    f"gates names node {node}, which is not there; nodes are (scale, step) with scale <= step < "
                    f"{self.steps} and scale < {len(self.embed_dims)}"
                )
            if len(pair) != 2 or any(g not in (0, 1, None) for g in pair):
                raise ValueError(f"gates[{node}] must be a row and a column gate, 0, 1 or None each, got {pair}")
        return gates or {}

    def plain_path(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Gates of the plain PVTv2 path: every step one scale down, everything on there, and nothing elsewhere."""
        last = len(self.embed_dims) - 1
        out = {(i, j): (0, 0) for i in range(last + 1) for j in range(i, self.steps)}
        for i in range(last + 1):
            out[i, i] = (1, int(i < last))
        return out

    def reference(self, sides: tuple[int, int]) -> int:
        """Operations of the plain path on a map of these sides, without the gates."""
        total = self._ends(sides)
        for i in range(len(self.embed_dims)):
            count = sides[0] * sides[1]
            node: Any = self.stages[i].nodes[0]  # type: ignore[union-attr, index]
            for block in node.blocks:
                ratio = block.attention.sr_ratio if block.gathers else 1
                keys = -(-sides[0] // ratio) * -(-sides[1] // ratio)
                total += sum(block.flops(count, keys, sides))
            if node.down is not None:
                sides = -(-sides[0] // 2), -(-sides[1] // 2)
                total += self._down_flops(i, sides)
        return total

    def _ends(self, sides: tuple[int, int]) -> int:
        """Operations of the stem and of the head."""
        head = self.head.fc
        classes = head.out_features if isinstance(head, nn.Linear) else 0
        return 2 * 49 * self.in_chans * self.embed_dims[0] * sides[0] * sides[1] + 2 * self.embed_dims[-1] * classes

    def _down_flops(self, i: int, sides: tuple[int, int]) -> int:
        return 18 * self.embed_dims[i] * self.embed_dims[i + 1] * sides[0] * sides[1]

    def route(self, x: Tensor, valid: Tensor | None = None, gates: Gates | None = None) -> Routing:
        """Where the tokens of images (B, in_chans, H, W) go.

        Args:
            x: images.
            valid: (B, H, W) boolean, which pixels exist.
            gates: forced ones.

        Raises:
            ValueError: a node that is not there, or a gate that is neither 0, 1 nor ``None``.
        """
        return self._route(x, valid, self._check_gates(gates, len(self.embed_dims)), len(self.stages), True)

    def _route(self, x: Tensor, valid: Tensor | None, gates: Gates, scales: int, count: bool) -> Routing:
        self._check_images(x, valid)
        x, valid = self.stem(x.permute(0, 2, 3, 1).contiguous(), valid)
        sides = [(x.shape[1], x.shape[2])]
        for _ in range(scales - 1):
            sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
        batch = x.shape[0]
        maps = [x] + [x.new_zeros(batch, *sides[i], self.embed_dims[i]) for i in range(1, scales)]
        # Which tokens there are: booleans, and in training the same as numbers, with gradient to the gates.
        exists = x.new_ones(x.shape[:3]) if valid is None else valid.to(x.dtype)
        there = [exists] + [x.new_zeros(batch, *side) for side in sides[1:]]
        flops = x.new_zeros(batch, dtype=torch.float64)
        stopped = [torch.zeros(batch, dtype=torch.bool, device=x.device) for _ in range(scales)]
        rows: dict[tuple[int, int], Tensor] = {}
        cols: dict[tuple[int, int], Tensor] = {}
        for j in range(self.steps):
            for i in range(min(j + 1, scales)):
                node: Any = self.stages[i].nodes[j - i]  # type: ignore[union-attr, index]
                force_row, force_col = gates.get((i, j), (None, None))
                tokens = zero_invalid(maps[i], there[i] > 0)
                row = self._gate(node.row, tokens, force_row) * there[i]
                if self.early_stop is not None and not self.training:
                    on = row.flatten(1).sum(1) / there[i].flatten(1).sum(1).clamp(min=1)
                    stopped[i] = stopped[i] | (1 - on >= self.early_stop)
                    row = row.masked_fill(stopped[i][:, None, None], 0.0)
                rows[i, j] = row > 0
                maps[i] = self._node(self.stages[i], node, tokens, there[i] > 0, row)
                if count:
                    flops = flops + self._node_flops(node, there[i], row, sides[i], force_row is None)
                if node.col is None:
                    continue
                col = self._gate(node.col, maps[i], force_col) * there[i]
                cols[i, j] = col > 0
                if count and force_col is None:
                    flops = flops + 4 * self.embed_dims[i] * sides[i][0] * sides[i][1]
                if i + 1 < scales:
                    maps[i + 1], there[i + 1] = self._down(i, node, maps[i], col, maps[i + 1], there[i + 1])
                    if count:
                        goes = cols[i, j].flatten(1).any(1)
                        flops = flops + goes * self._down_flops(i, sides[i + 1])
        made = [zero_invalid(self.stages[i].norm(maps[i]), there[i] > 0) for i in range(scales)]  # type: ignore[union-attr, operator]
        whole = scales == len(self.embed_dims) and count
        return Routing(
            made, [t > 0 for t in there], rows, cols, flops + self._ends(sides[0]) if count else flops,
            self.reference(sides[0]) if whole else 0,
        )  # fmt: skip

    @staticmethod
    def _gate(gate: Gate, x: Tensor, forced: int | None) -> Tensor:
        return gate(x) if forced is None else x.new_full(x.shape[:3], float(forced))

    def _node(self, stage: Any, node: Any, x: Tensor, there: Tensor, row: Tensor) -> Tensor:
        """(B, H, W, C) behind the blocks of a node."""
        gathers = not self.training and all(block.gathers for block in node.blocks)
        if not gathers or torch.compiler.is_compiling():
            for block in node.blocks:
                x = checkpointed(block, x, there, row, when=stage.checkpointing)
            return x
        on = row > 0
        out = []
        for b in range(x.shape[0]):
            y = x[b : b + 1]
            if bool(on[b].any()):
                for block in node.blocks:
                    y = block.some(y, there[b : b + 1], on[b])
            out.append(y)
        return torch.cat(out) if len(out) != 1 else out[0]

    def _down(
        self, i: int, node: Any, x: Tensor, col: Tensor, coarse: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The coarser map and its tokens, with those that go there."""
        norm: Any = self.stages[i].norm  # type: ignore[union-attr]
        goes = col.flatten(1).any(1) if not self.training else None
        if goes is not None and not torch.compiler.is_compiling() and not bool(goes.all()):
            if not bool(goes.any()):
                return coarse, there
            at = goes.nonzero().flatten()
            some, here = self._down(i, node, x[at], col[at], coarse[at], there[at])
            return coarse.index_copy(0, at, some), there.index_copy(0, at, here)
        new, _ = node.down(norm(x) * col.unsqueeze(-1))
        sides = coarse.shape[1:3]
        pad = (0, 2 * sides[1] - x.shape[2], 0, 2 * sides[0] - x.shape[1])
        comes = F.max_pool2d(F.pad(col, pad).unsqueeze(1), 2).squeeze(1)
        return coarse + zero_invalid(new, comes > 0), torch.maximum(there, comes)

    def _node_flops(self, node: Any, there: Tensor, row: Tensor, sides: tuple[int, int], gated: bool) -> Tensor:
        """(B,) operations of a node; the number of tokens that are on has a gradient in training."""
        chosen = row.flatten(1).sum(1).double()
        runs = (chosen.detach() > 0).double()
        if self.training:  # what comes with a node goes when its last token does: the gradient says so to all of them
            share = chosen / there.detach().flatten(1).sum(1).clamp(min=1)
            runs = runs + share - share.detach()
        total = chosen.new_full(chosen.shape, 4.0 * self._width(node) * sides[0] * sides[1] if gated else 0.0)
        for block in node.blocks:
            ratio = block.attention.sr_ratio if block.gathers else 1
            cells = strided_valid(there > 0, ratio)
            assert cells is not None
            keys = cells.flatten(1).sum(1).double()
            fixed, each = block.flops(chosen, keys, sides)
            total = total + runs * fixed + each
        return total

    @staticmethod
    def _width(node: Any) -> int:
        return int(node.row.linear.in_features)

    # ---- the call

    def _maps(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        scales = len(self.stages) if last is None else last + 1
        found = self._route(x, valid, {}, scales, losses is not None)
        if losses is not None:
            losses["budget"] = (found.ratio - self.budget).square().mean().to(x.dtype)
        yield from zip(found.maps, found.there, strict=True)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, returns: Sequence[str] = (), gates: Gates | None = None
    ) -> Any:
        """(B, in_chans, H, W) -> (B, num_classes).

        Args:
            x, valid, returns: as of :class:`attnlib.models.backbones.stages.Backbone`.
            gates: forced ones, by node.
        """
        if gates is None:
            return super().forward(x, valid, returns)
        if returns:
            raise ValueError(f"returns={returns!r} is not possible with gates; route(x, valid, gates) says all")
        found = self.route(x, valid, gates)
        return self.head(found.maps[-1], found.there[-1])


def _size(depths: Sequence[int], **settings: Any) -> dict[str, Any]:
    return dict(depths=tuple(depths), **settings)


register_models(
    "dit-dynamic-token-routing",
    DynamicTokenRoutingViT,
    {
        "dynamic_token_routing_vit_b1": _size((2, 2, 2, 2)),
        "dynamic_token_routing_vit_b2": _size((3, 4, 6, 3)),
        "dynamic_token_routing_vit_b3": _size((3, 4, 18, 3)),
        "dynamic_token_routing_vit_b4": _size((3, 8, 27, 3)),
        "dynamic_token_routing_vit_b5": _size((3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
    },
    source="Maycbj/DiT",
)
