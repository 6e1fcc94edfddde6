"""ContMix: a convolution whose kernel every token makes from its affinity to regions of a context.

Lou and Yu, 2025, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", arXiv
2502.20087. The kernel of a token is as wide as a window, but it is made of what the token has in common with the 7 x 7
regions of the whole map, so that context from everywhere decides, and only neighbours are read.

Differs from the authors' code: channels last; tokens outside ``valid`` are read by no window, mean or statistic; at
borders the window is shifted inside, as NATTEN's kernel has it, where the fallback of their stand-alone block repeats
the outermost results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_divides, check_flag, check_int, fixed
from ...ops import neighborhood_av, window_keys
from ...types import Traits, stats_dtype
from ..base import Mechanism
from ..layers import ConvNorm, RepBranches, SqueezeExcite, resize_map, zero_invalid
from ..registry import register
from ..released import Released, Rule

#: ``(kernel_size, dilation)`` of the convolutions that make up one large kernel, behind it.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def large_kernel(dim: int, kernel_size: int, merged: bool = False) -> RepBranches:
    """Depthwise convolutions of a table of kernels and dilations, norms behind each and behind their sum.

    Raises:
        ValueError: a kernel that the table does not have.
    """
    if kernel_size not in BRANCHES:
        raise ValueError(f"kernel_size={kernel_size!r} is not possible; possible: {sorted(BRANCHES)}")
    return RepBranches(dim, ((kernel_size, 1), *BRANCHES[kernel_size]), norm=True, merged=merged)


def region_means(x: Tensor, regions: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Means of ``regions`` x ``regions`` regions of (B, H, W, C), which overlap where they do not divide the map; and
    which of them hold a token that exists.
    """

    def sums(t: Tensor) -> Tensor:
        for axis in (1, 2):
            t = (_inside(t.shape[axis], regions, t.device).to(t.dtype) @ t.movedim(axis, -2)).movedim(-2, axis)
        return t

    exists = torch.ones_like(x[..., :1], dtype=torch.bool) if valid is None else valid.unsqueeze(-1)
    count = sums(exists.to(stats_dtype(x.dtype)))
    means = (sums(zero_invalid(x, valid)) / count.clamp(min=1)).to(x.dtype)
    return means, None if valid is None else count[..., 0] > 0


def _inside(length: int, regions: int, device: torch.device) -> Tensor:
    """(regions, length): which tokens of an axis lie in which region, as adaptive pooling has it."""
    at, number = torch.arange(length, device=device), torch.arange(regions, device=device)[:, None]
    first, behind = number * length // regions, ((number + 1) * length + regions - 1) // regions
    return (at >= first) & (at < behind)


@register("overlock-contmix", "contmix")
class ContMix(Mechanism):
    """Convolutions by kernels that tokens make from their affinity to regions of a context.

    Per head, ``A = (C / G)^-1/2 q k^T`` with queries of the tokens and keys of 7 x 7 means of the context, both C / 2
    wide; ``w = softmax(W A + bias)`` over the window with one W (49 -> K^2 + k^2) for all heads; a half of the channels
    of the values is summed by small kernels k, the other by large ones K. Then
    ``y = proj(BN(gate(x) * SE(BN(W_o mix) + LePE(x))))`` with a large depthwise convolution LePE, merged from parallel
    ones. Windows are clamped to the map; a map smaller than K is enlarged to K for the mixing.

    The scale takes the width ``C / G`` of a head of the values, as the authors' code does, although queries are half as
    wide. In training the answer depends on the batch through BatchNorm; :meth:`deployed` forms fold all of it.

    Args:
        dim: width C.
        num_heads: half the groups G of kernels, as released models count; ``4 num_heads`` divides ``dim``.
        kernel_size: K: 5, 7, ..., 19.
        small_kernel_size: k.
        regions: regions per axis.
        context_dim: width of ``context``.
        out_dim: width of the output; ``dim`` by default, of a block of OverLoCK that of tokens and context together.
        value: project values; otherwise they are the tokens themselves, as in OverLoCK.
        zero_bias: relative biases start at zero; otherwise normal around it.
        merged: LePE is built as one convolution.

    Reference: Lou and Yu, 2025, arXiv 2502.20087, section 3.3.

    >>> ContMix(dim=16, num_heads=2, kernel_size=5)(torch.randn(2, 6, 7, 16)).shape
    torch.Size([2, 6, 7, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "noncausal-cross"}), grid_ranks=frozenset({2}), work={"N": 1},
        memory={"N": 1},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        num_heads: int = 2,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        regions: int = 7,
        context_dim: int | None = None,
        out_dim: int | None = None,
        value: bool = True,
        zero_bias: bool = False,
        merged: bool = False,
    ):
        super().__init__(dim, context_dim)
        check_flag("value", value)
        check_flag("zero_bias", zero_bias)
        self.groups = 2 * check_int("num_heads", num_heads, least=1)
        check_divides("4 num_heads", 2 * self.groups, "dim", dim)
        self.kernels = (
            check_int("small_kernel_size", small_kernel_size, least=2),
            check_int("kernel_size", kernel_size, least=2),
        )
        if small_kernel_size > kernel_size:
            raise ValueError(f"small_kernel_size={small_kernel_size} is larger than kernel_size={kernel_size}")
        self.regions = check_int("regions", regions, least=1)
        self.scale = (dim // self.groups) ** -0.5
        self.query, self.key = ConvNorm(dim, dim // 2), ConvNorm(self.context_dim, dim // 2)
        self.value = ConvNorm(dim, dim) if value else None
        self.weights = nn.Linear(regions**2, sum(k**2 for k in self.kernels))
        self.rpb = nn.ParameterList(torch.zeros(self.groups, 2 * k - 1, 2 * k - 1) for k in self.kernels)
        if not zero_bias:
            for table in self.rpb:
                nn.init.trunc_normal_(table, std=0.02)
        self.fusion = ConvNorm(dim, dim)
        self.lepe = large_kernel(dim, kernel_size, merged)
        self.squeeze = SqueezeExcite(dim, max(16, dim // 8), nn.GELU)
        self.gate = ConvNorm(dim, dim, activation=nn.SiLU)
        self.proj = ConvNorm(dim, dim if out_dim is None else out_dim, bias=True, norm=False, pre_norm=True)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=not self.training)

    def _enlarged(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Sides with room for the largest window."""
        height, width = grid
        least = self.kernels[1]
        if min(grid) >= least:
            return grid
        if height < width:
            return least, max(least, int(least / height * width))
        return max(least, int(least / width * height)), least

    def kernels_of(
        self, x: Tensor, context: Tensor, valid: Tensor | None = None, context_valid: Tensor | None = None
    ) -> list[Tensor]:
        """Window weights (B, G, H, W, k^2) and (B, G, H, W, K^2), each summing to one.

        Args:
            x: (B, H, W, dim), at least as large as the windows.
            context: (B, H', W', context_dim).
            valid: (B, H, W) boolean, which tokens may be read; windows without one give zeros.
            context_valid: the same of the context.
        """
        grid = tuple(x.shape[1:3])
        q = (self.query(x, valid) * self.scale).flatten(1, 2).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        means, exists = region_means(context, self.regions, context_valid)
        k = zero_invalid(self.key(means, exists), exists).flatten(1, 2).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        logits = self.weights(q @ k.transpose(-2, -1))
        out = []
        for kernel, table, some in zip(
            self.kernels, self.rpb, logits.split([k**2 for k in self.kernels], -1), strict=True
        ):
            keys, places = window_keys([fixed(n) for n in grid], kernel, x.device)
            some = some.to(stats_dtype(some.dtype)) + table.flatten(1)[:, places]
            if valid is not None:
                read = valid.flatten(1)[:, keys].unsqueeze(1)
                some = some.masked_fill(~read, torch.finfo(some.dtype).min)
                some = some.softmax(-1).masked_fill(~read, 0.0)
            else:
                some = some.softmax(-1)
            out.append(some.unflatten(2, grid))
        return out

    def mixed(
        self,
        x: Tensor,
        query: Tensor,
        context: Tensor,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        """(B, H, W, out_dim) of values ``x`` by kernels of ``query`` (B, H, W, dim), which may be other tokens.

        The context lies on the grid of the tokens where it is enlarged with them, as in OverLoCK.
        """
        grid = tuple(x.shape[1:3])
        size = self._enlarged((fixed(grid[0]), fixed(grid[1])))
        here = valid
        gate, lepe = self.gate(x, valid), self.lepe(x, valid)
        if size != grid:
            along = context.shape[1:3] == query.shape[1:3]
            x, query = (resize_map(zero_invalid(t, valid), size) for t in (x, query))
            if valid is not None:
                here = resize_map(valid.unsqueeze(-1).to(x.dtype), size)[..., 0] > 0
            if along:
                context = resize_map(zero_invalid(context, context_valid), size)
                if context_valid is not None:
                    context_valid = resize_map(context_valid.unsqueeze(-1).to(x.dtype), size)[..., 0] > 0
        v = x if self.value is None else self.value(x, here)
        v = zero_invalid(v, here)
        v = v.unflatten(-1, (2, self.groups, -1)).permute(3, 0, 4, 1, 2, 5)  # (2, B, G, H, W, C / 2G)
        weights = self.kernels_of(query, context, here, context_valid)
        parts = [
            neighborhood_av(w.to(v.dtype), half, kernel)
            for w, half, kernel in zip(weights, v, self.kernels, strict=True)
        ]
        y = torch.cat(parts, 1).permute(0, 2, 3, 1, 4).flatten(3)
        if size != grid:
            y = F.adaptive_avg_pool2d(y.permute(0, 3, 1, 2), (grid[0], grid[1])).permute(0, 2, 3, 1)
        y = self.squeeze(self.fusion(y, valid) + lepe, valid)
        return self.proj(gate * y, valid)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        if context is None:
            context, context_valid = x, valid
        return self.mixed(x, x, context, valid, context_valid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From what the authors' ``ContMixBlock`` or ``DynamicConvBlock`` has between norm and residual."""
        theirs = Released(state_dict, "the authors' ContMix")
        return theirs.close(theirs.renamed(contmix_rules("", "")))


def contmix_rules(theirs: str, ours: str, fusion: str = "fusion_proj") -> dict[str, Rule]:
    """Rules for the converter of a block: a pattern before all names of theirs, and what stands before ours."""
    first = re.compile(theirs).groups + 1
    rules = large_kernel_rules(theirs + r"lepe\.0\.", theirs + r"lepe\.1\.", ours + "lepe.")
    pairs = {
        "weight_query": ("query", 0),
        "weight_value": ("value", 0),
        "weight_key": ("key", 1),
        fusion: ("fusion", 0),
    }
    for name, (to, at) in {**pairs, "gate": ("gate", 0)}.items():
        rules[rf"{theirs}{name}\.{at}\.weight"] = f"{ours}{to}.conv.weight"
        rules[rf"{theirs}{name}\.{at + 1}\.{NORM}"] = rf"{ours}{to}.norm.\{first}"
    for number, to in ((1, "fc1"), (3, "fc2")):
        rules[rf"{theirs}se_layer\.proj\.{number}\.(weight|bias)"] = flattened(rf"{ours}squeeze.{to}.\{first}")
    rules[rf"{theirs}weight_proj\.(weight|bias)"] = flattened(rf"{ours}weights.\{first}")
    rules[rf"{theirs}proj\.0\.{NORM}"] = rf"{ours}proj.pre.\{first}"
    rules[rf"{theirs}proj\.1\.(weight|bias)"] = rf"{ours}proj.conv.\{first}"
    for number in (1, 2):
        rules[rf"{theirs}rpb{number}"] = f"{ours}rpb.{number - 1}"
    return rules


def large_kernel_rules(theirs: str, norm: str, ours: str) -> dict[str, Rule]:
    """Rules for a ``DilatedReparamBlock``, merged or not, and the norm behind it."""
    first = re.compile(theirs).groups + 1
    return {
        rf"{theirs}lk_origin\.(weight|bias)": rf"{ours}large.conv.\{first}",
        rf"{theirs}origin_bn\.{NORM}": rf"{ours}large.norm.\{first}",
        rf"{theirs}dil_conv_k(\d+)_(\d+)\.weight": rf"{ours}branches.k\{first}_d\{first + 1}.conv.weight",
        rf"{theirs}dil_bn_k(\d+)_(\d+)\.{NORM}": rf"{ours}branches.k\{first}_d\{first + 1}.norm.\{first + 2}",
        rf"{norm}{NORM}": rf"{ours}norm.norm.\{first}",
    }


def flattened(to: str) -> Rule:
    """A rule that makes a matrix of a 1 x 1 kernel."""
    return lambda match, value: {match.expand(to): value.flatten(1) if value.dim() == 4 else value}
