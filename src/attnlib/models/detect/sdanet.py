"""SDANet's neck: every level of a pyramid reads all of them, by channel and by place, and a context of the whole map.

Wang et al., 2021, "Towards Real-World Prohibited Item Detection: A Large-Scale X-ray Benchmark", arXiv 2108.07020. For
a level r, all levels are brought to its grid, finer ones by the largest of each cell, coarser ones by the nearest:
``F_i``, ``U = sum_i F_i``.

- channels: ``z = relu(BN(W mean(U)))``, ``A = softmax_i(V_i z + b_i)`` per channel;
- places: ``B = softmax_i(conv_7,i([mean_c U, max_c U]))`` per place;

    ``y_r = x_r + context(sum_i A_i F_i + sum_i B_i F_i)``

with :class:`attnlib.nn.gates.global_context.GlobalContext`, and modules of its own for every level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, describe
from ...nn.gates.global_context import GlobalContext
from ...nn.layers import masked_batch_norm, resize_map
from ...nn.released import Released


def check_levels(maps: Any, dim: int, levels: int) -> Sequence[Tensor]:
    """Maps (B, H, W, dim) of one batch, as many as there are levels, finest first.

    Raises:
        ValueError: another number, shape or batch, or a level that is finer than the one before.
    """
    if not isinstance(maps, (list, tuple)) or len(maps) != levels:
        raise ValueError(f"maps must be {levels} maps, finest first, got {describe(maps)}")
    for i, x in enumerate(maps):
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-1] != dim or not x.is_floating_point():
            raise ValueError(f"maps[{i}] must be (B, H, W, {dim}) of floating point, got {describe(x)}")
        if not (x.shape[1] and x.shape[2]):
            raise ValueError(f"maps[{i}] must have a pixel at least, got {tuple(x.shape)}")
        if len(x) != len(maps[0]):
            raise ValueError(f"maps must be of one batch, got {[len(m) for m in maps]} samples")
        if i and (x.shape[1] > maps[i - 1].shape[1] or x.shape[2] > maps[i - 1].shape[2]):
            raise ValueError(f"maps must come finest first, got {[tuple(m.shape[1:3]) for m in maps]} pixels")
    return maps


class SelectiveAttention(nn.Module):
    """One level's part: all levels (B, H_i, W_i, dim) -> that level (B, H_r, W_r, dim), refined.

    Args:
        level: which one, counted from the finest.
        dim: channels of all levels.
        levels: how many there are.
        hidden: width between the mean and the channels' weights.
        kernel_size: of the places' weights, odd.
        ratio: the context's middle layer has ``dim // ratio`` numbers, at least 4.

    >>> maps = [torch.randn(2, 8, 6, 32), torch.randn(2, 4, 3, 32), torch.randn(2, 2, 2, 32)]
    >>> SelectiveAttention(1, 32, levels=3).eval()(maps).shape
    torch.Size([2, 4, 3, 32])
    """

    def __init__(
        self, level: int, dim: int = 256, levels: int = 5, hidden: int = 128, kernel_size: int = 7, ratio: int = 16
    ):
        super().__init__()
        self.dim, self.levels = check_int("dim", dim, least=1), check_int("levels", levels, least=1)
        self.level = check_int("level", level, least=0, most=levels - 1)
        check_int("hidden", hidden, least=1)
        check_int("ratio", ratio, least=1, most=dim)
        if check_int("kernel_size", kernel_size, least=1) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.squeeze = nn.Linear(dim, hidden, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.channel = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(levels))
        self.place = nn.ModuleList(
            nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False) for _ in range(levels)
        )
        self.context = GlobalContext(dim, max(4, dim // ratio))

    def gathered(self, maps: Sequence[Tensor]) -> Tensor:
        """All levels on this one's grid: (B, levels, H, W, dim)."""
        maps = check_levels(maps, self.dim, self.levels)
        size = maps[self.level].shape[1:3]
        held = []
        for i, x in enumerate(maps):
            if i < self.level and x.shape[1:3] != size:
                held.append(F.adaptive_max_pool2d(x.permute(0, 3, 1, 2), tuple(size)).permute(0, 2, 3, 1))
            else:
                held.append(resize_map(x, size, "nearest"))
        return torch.stack(held, 1)

    def weights(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """How much each level counts, by channel (B, levels, 1, 1, dim) and by place (B, levels, H, W, 1)."""
        total = gathered.sum(1)
        if self.training and len(total) == 1:
            raise ValueError(
                "maps of one image have no statistics for the norm of their mean; train on several images at once"
            )
        z = masked_batch_norm(self.norm, self.squeeze(total.mean((1, 2)))[:, None, None], None).relu()
        channel = torch.stack([f(z) for f in self.channel], 1).softmax(1)
        both = torch.stack([total.mean(-1), total.max(-1).values], 1)
        place = torch.stack([conv(both).squeeze(1) for conv in self.place], 1).softmax(1)
        return channel, place.unsqueeze(-1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The level, refined."""
        gathered = self.gathered(maps)
        channel, place = self.weights(gathered)
        refined: Tensor = self.context((gathered * (channel + place)).sum(1))
        return maps[self.level] + refined


class SelectiveNeck(nn.Module):
    """Maps of a pyramid, finest first -> the same, each refined by a :class:`SelectiveAttention` of its own.

    Args:
        dim: channels of all levels.
        levels: how many there are.
        settings: of :class:`SelectiveAttention`.

    >>> maps = [torch.randn(2, 8, 6, 32), torch.randn(2, 4, 3, 32)]
    >>> [tuple(y.shape) for y in SelectiveNeck(32, 2)(maps)]
    [(2, 8, 6, 32), (2, 4, 3, 32)]
    """

    def __init__(self, dim: int = 256, levels: int = 5, **settings: Any):
        super().__init__()
        check_int("levels", levels, least=1)
        self.refine = nn.ModuleList(SelectiveAttention(i, dim, levels, **settings) for i in range(levels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The levels, refined; all of them read what was given."""
        return [refine(maps) for refine in self.refine]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From what the authors' ``selective_attention_*`` hold, in a ``CascadeRCNN`` or an ``AttFPN``."""
        theirs = Released(state_dict, "the authors' selective_attention modules")
        out: dict[str, Tensor] = {}
        for name in list(theirs):
            found = re.fullmatch(r"(?:neck\.)?selective_attention_(\d+)\.(.*)", name)
            ours = None if found is None else _renamed(found[2])
            if found is None or ours is None:
                continue
            value = theirs.take(name)
            out[f"refine.{found[1]}.{ours}"] = _shaped(ours, value)
        return theirs.close(out)


def _renamed(name: str) -> str | None:
    """Our name of one of their ``selective_attention``'s."""
    held = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    for pattern, ours in (
        (r"channel_att\.fc\.0\.weight", "squeeze.weight"),
        (rf"channel_att\.fc\.1\.{held}", r"norm.\1"),
        (r"channel_att\.fcs\.(\d+)\.(weight|bias)", r"channel.\1.\2"),
        (r"spatial_att\.conv\.(\d+)\.weight", r"place.\1.weight"),
        (r"refine\.conv_mask\.(weight|bias)", r"context.score.\1"),
        (r"refine\.channel_add_conv\.([013])\.(weight|bias)", r"context.change.\1.\2"),
    ):
        if found := re.fullmatch(pattern, name):
            return found.expand(ours)
    return None


def _shaped(ours: str, value: Tensor) -> Tensor:
    """1 x 1 convolutions are linear maps here, and a norm of (C, 1, 1) is one of C."""
    if ours.startswith("place") or not value.dim():
        return value
    if ours.startswith("context.change.1"):
        return value.flatten()
    return value.flatten(1) if value.dim() == 4 else value


__all__ = ["SelectiveAttention", "SelectiveNeck", "check_levels"]
