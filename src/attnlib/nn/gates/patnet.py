"""Partial attention: a convolution on some channels, and attention on those that it leaves alone.

Huang et al., 2025, "Partial Convolution Meets Visual Attention", arXiv 2503.03148, by the code of its successor, arXiv
2502.01303. Beside a 3 x 3 convolution of the first quarter of the channels the others pass a gate from their means and
deviations, or attend with image relative positions. Behind an MLP half of them pass a gate of one number a pixel.

Differs from the authors' code: a map of one pixel has the deviation zero, where theirs is not a number; tokens outside
``valid`` are not attended and enter no convolution and no statistic; gates are products of broadcast tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_divides, check_int, check_real, fixed
from ...ops import attention
from ...ops.modulation import pool
from ...positions import euclidean_buckets, window_bias
from ...types import Traits
from ..base import Mechanism
from ..layers import ConvNorm, MapNorm, flat_valid, merge_heads, split_heads, through
from ..registry import register
from ..released import Released, Rule

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_IMAGES = Traits(patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}))


def init_narrow(module: nn.Module) -> None:
    """Convolutions and linear maps start as the authors': narrow, with zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Partial(Mechanism):
    """``y = [conv(x_1), beside(x_2)]`` with C / n and C - C / n channels."""

    def __init__(self, dim: int, n_div: int):
        super().__init__(dim)
        check_int("n_div", n_div, least=2, most=dim)
        self.widths = [dim // n_div, dim - dim // n_div]
        self.conv = ConvNorm(self.widths[0], self.widths[0], 3, norm=False)

    def _beside(self, x: Tensor, valid: Tensor | None) -> Tensor:
        raise NotImplementedError

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        first, rest = x.split(self.widths, -1)
        return torch.cat([self.conv(first, valid), self._beside(rest, valid)], -1)


@register("patnet-partial-attention", "pat-ch", "partial-channel-attention")
class PartialChannelAttention(Partial):
    """``y = [conv(x_1), BN(g x_2)]`` with ``g = hardsigmoid(BN(W [mean(x_2), std(x_2)]))``, one gate a channel.

    The deviation is the unbiased one. In training the norms of gates need two images.

    Args:
        dim: width C.
        n_div: the convolution has ``C / n_div`` channels, rounded down.

    Reference: Huang et al., 2025, arXiv 2503.03148.

    >>> PartialChannelAttention(dim=16)(torch.randn(2, 4, 5, 16)).shape
    torch.Size([2, 4, 5, 16])
    """

    class_traits = _IMAGES.but(work={"N": 1}, memory={"N": 1})

    def __init__(self, dim: int, n_div: int = 4):
        super().__init__(dim, n_div)
        rest = self.widths[1]
        self.gate, self.act, self.norm = ConvNorm(2 * rest, rest), nn.Hardsigmoid(), MapNorm(rest)
        init_narrow(self)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=not self.training)

    def gates(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, 1, 1, C'), in [0, 1], of the channels (B, H, W, C') that are not convolved."""
        if self.training and self.gate.norm is not None and len(x) == 1:
            raise ValueError("x must hold at least two images in training, for the BatchNorm of gates; got one")
        stats = torch.cat([pool(x, valid=valid), pool(x, stat="std", valid=valid)], -1)
        return self.act(self.gate(stats, None if valid is None else valid.flatten(1).any(1)[:, None, None]))

    def _beside(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.norm(x * self.gates(x, valid), valid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Partial_conv3`` with ``channel_type="se"``."""
        theirs = Released(state_dict, 'PATNet\'s Partial_conv3 with channel_type="se"')

        def sides(match: Any, value: Tensor) -> dict[str, Tensor]:
            """Their kernel lies across mean and deviation."""
            return {"gate.conv.weight": torch.cat(value.squeeze(2).unbind(-1), 1)[..., None, None]}

        rules: dict[str, Rule] = {
            r"partial_conv3\.weight": "conv.conv.weight",
            r"attn\.cfc1\.weight": sides,
            rf"attn\.bn\.{_NORM}": r"gate.norm.\1",
            rf"norm\.{_NORM}": r"norm.norm.\1",
        }
        return theirs.close(theirs.renamed(rules))


@register("patnet-self-attention", "pat-sf", "partial-self-attention")
class PartialSelfAttention(Partial):
    """``y = [conv(x_1), W_o softmax(q k^T d^-1/2 + b) v]`` with ``[q, k, v] = W LN(x_2)``, over the whole map.

    ``b`` is a learned number for every head and bucket of the Euclidean distance between pixels, rounded and, from
    ``ratio`` on, in logarithmic steps: :func:`attnlib.positions.euclidean_buckets`. As released, ``4 ratio + 1`` are
    kept, of which the first ``2 ratio``, those of negative distances, are never read.

    Args:
        dim: width C.
        num_heads: must divide the ``C - C / n_div`` channels that attend.
        n_div: the convolution has ``C / n_div`` channels, rounded down.
        ratio: of the buckets.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of what attention gives in training.

    Reference: Huang et al., 2025, arXiv 2503.03148; Wu et al., 2021, arXiv 2107.14222 (image relative positions).

    >>> PartialSelfAttention(dim=16, num_heads=2)(torch.randn(2, 4, 5, 16)).shape
    torch.Size([2, 4, 5, 16])
    """

    class_traits = _IMAGES.but(work={"N": 2}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        n_div: int = 4,
        ratio: float = 20.0,
        attn_drop: float = 0.1,
        proj_drop: float = 0.1,
    ):
        super().__init__(dim, n_div)
        rest = self.widths[1]
        check_divides("num_heads", num_heads, "dim - dim / n_div", rest)
        self.scale = (rest // num_heads) ** -0.5
        self.ratio = check_real("ratio", ratio, above=0)
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.norm = nn.LayerNorm(rest, eps=1e-6)
        self.qkv, self.proj = nn.Linear(rest, 3 * rest, bias=False), nn.Linear(rest, rest)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rel_bias = nn.Parameter(torch.zeros(num_heads, 2 * int(2 * ratio) + 1))
        init_narrow(self)

    def _beside(self, x: Tensor, valid: Tensor | None) -> Tensor:
        grid = [fixed(n) for n in x.shape[1:3]]
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(self.norm(x)).chunk(3, -1))
        buckets = euclidean_buckets(grid, self.ratio, 2 * self.ratio, 8 * self.ratio, self.rel_bias.device)
        table = self.rel_bias[:, buckets.flatten() + int(2 * self.ratio)]
        out = attention(
            q, k, v, scale=self.scale, bias=window_bias(table.to(q.dtype), grid), valid=flat_valid(valid),
            dropout_p=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        return through(self.proj_drop, self.proj(merge_heads(out, x.shape[1:3])))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Partial_conv3`` with ``channel_type="self"``."""
        theirs = Released(state_dict, 'PATNet\'s Partial_conv3 with channel_type="self"')
        rules: dict[str, Rule] = {
            r"partial_conv3\.weight": "conv.conv.weight",
            r"attn\.(qkv\.weight|proj\.weight|proj\.bias)": r"\1",
            r"attn\.rpe_k\.lookup_table_bias": "rel_bias",
            r"norm\.(weight|bias)": r"norm.\1",
        }
        return theirs.close(theirs.renamed(rules))


class PartialSpatialAttention(nn.Module):
    """``y = [BN(x_1 hardsigmoid(w x_1)), W BN(x_2)]``, half of the channels each: a gate a pixel, which reads no other.

    Args:
        dim: width.

    Reference: Huang et al., 2025, arXiv 2503.03148.

    >>> PartialSpatialAttention(dim=8)(torch.randn(2, 4, 5, 8)).shape
    torch.Size([2, 4, 5, 8])
    """

    def __init__(self, dim: int):
        super().__init__()
        check_int("dim", dim, least=2)
        self.widths = [dim - dim // 2, dim // 2]
        self.score, self.act = nn.Linear(self.widths[0], 1, bias=False), nn.Hardsigmoid()
        self.norm = MapNorm(self.widths[0])
        self.conv = ConvNorm(self.widths[1], self.widths[1], norm=False, pre_norm=True)
        init_narrow(self)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        first, rest = x.split(self.widths, -1)
        gated = first * self.act(self.score(first))
        return torch.cat([self.norm(gated, valid), self.conv(rest, valid)], -1)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``partial_spatial_attn_layer_reverse``."""
        theirs = Released(state_dict, "PATNet's partial_spatial_attn_layer_reverse")
        rules: dict[str, Rule] = {
            r"conv_attn\.weight": lambda match, value: {"score.weight": value.flatten(1)},
            r"conv\.weight": "conv.conv.weight",
            rf"norm\.{_NORM}": r"norm.norm.\1",
            rf"norm2\.{_NORM}": r"conv.pre.\1",
        }
        return theirs.close(theirs.renamed(rules))
