"""Small pieces that many mechanisms share. All are channels-last; none knows a paper."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..checks import check_choice, check_divides, check_int, check_real, to_tuple
from ..ops import _shards, depthwise
from ..positions import resized
from ..types import exactly, stats_dtype


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, *grid, H * D) -> (B, H, N, D) with the grid flattened."""
    batch, *grid, width = x.shape
    return x.reshape(batch, math.prod(grid), num_heads, width // num_heads).transpose(1, 2)


def merge_heads(x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D), or (B, *grid, H * D)."""
    if grid is None or len(grid) == 1:
        return x.transpose(1, 2).flatten(2)
    return x.transpose(1, 2).reshape(x.shape[0], *grid, x.shape[1] * x.shape[3])


def head_dim_of(dim: int, num_heads: int) -> int:
    """``dim / num_heads``, checked."""
    check_divides("num_heads", num_heads, "dim", dim)
    return dim // num_heads


def head_norm(kind: bool | str, dim: int, name: str = "qk_norm") -> nn.Module:
    """A norm over the channels of a head: ``False`` for none, ``True`` or ``"layer"``, ``"rms"``."""
    check_choice(name, kind, (False, True, "layer", "rms"))
    if kind == "rms":
        return nn.RMSNorm(dim, eps=1e-6)
    return nn.LayerNorm(dim) if kind else nn.Identity()


def flat_valid(valid: Tensor | None) -> Tensor | None:
    """(B, *grid) -> (B, N)."""
    return None if valid is None else valid.flatten(1)


def zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the tokens that do not exist: before convolutions, pools and scans. ``x`` is (B, *grid, C)."""
    return x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0)


def tokens_first(valid: Tensor) -> Tensor:
    """(B, N) order in which the tokens that exist come first, each group as it was."""
    return torch.argsort((~valid).to(torch.int8), dim=1, stable=True)


def to_front(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens (B, N, C) that exist before those that do not, which become zeros; also which exist then, and the order.

    What looks at neighbours (windows, convolutions) then sees runs of tokens that exist. See :func:`to_places`.

    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> to_front(x, torch.tensor([[False, True, True]]))[0].flatten().tolist()
    [2.0, 3.0, 0.0]
    """
    if valid is None:
        return x, None, None
    if _shards.others() is not None:
        raise ValueError(
            "valid is not possible here while the sequence is cut over processes: what looks at neighbours counts "
            "tokens that exist, which may lie with any of them"
        )
    order = tokens_first(valid)
    now = torch.gather(valid, 1, order)
    return zero_invalid(torch.gather(x, 1, order[..., None].expand_as(x)), now), now, order


def to_places(x: Tensor, order: Tensor | None) -> Tensor:
    """Tokens (B, N, C) back from the ``order`` that :func:`to_front` gave."""
    return x if order is None else torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), x)


def last_tokens(x: Tensor, count: int, many: Tensor | None) -> Tensor:
    """The last ``count`` tokens of (B, count + N, C), where ``many`` (B,) of the N new ones exist, or all."""
    if many is None:
        return x[:, x.shape[1] - count :]
    at = (many[:, None] + torch.arange(count, device=x.device))[..., None]
    return torch.gather(x, 1, at.expand(-1, -1, x.shape[2]))


def through(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, where an identity or a dropout that drops nothing is not called unless somebody listens to it."""
    kind = type(module)
    if not (kind is nn.Identity or (kind is nn.Dropout and not (module.training and module.p))):
        return module(x)
    return module(x) if _heard(module) else x


def _heard(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of a module, or put something in their place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def plain(*layers: nn.Module) -> bool:
    """Whether linear maps and convolutions are what they were built as, so that reading their weights does what calling
    them does: not what an adapter, a quantized layer or a hook has made of them.
    """
    return not any([type(layer) not in (nn.Linear, nn.Conv2d) or _heard(layer) for layer in layers])


def own_weight(layer: nn.Module, who: str) -> Tensor:
    """The weight of a layer that can only be read, not called; ``TypeError`` when it is not all that the layer does."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise TypeError(
            f"{who} reads the weights of a layer whose place {type(layer).__name__} has taken; merge what it adds into "
            "the weights, or leave this layer as it is"
        )
    return layer.weight


class DepthwiseConv(nn.Module):
    """Depthwise convolution of (B, *grid, C), zero padded to keep the size (or strided).

    Parameters live under the names and shapes of ``nn.Conv{r}d(dim, dim, kernel_size, groups=dim)``.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | Sequence[int],
        rank: int = 2,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        kernel = to_tuple("kernel_size", kernel_size, rank)
        self.rank, self.stride, self.dilation, self.dim = rank, stride, dilation, dim
        self.padding = tuple(dilation * (k // 2) for k in kernel)
        self.weight = nn.Parameter(torch.empty(dim, 1, *kernel))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        fan_in = math.prod(kernel)
        nn.init.uniform_(self.weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        if self.dilation > 1 and self.stride == 1:
            return depthwise(x, self.weight, self.bias, dilation=self.dilation)
        conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1]
        out = conv(
            x.movedim(-1, 1), self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.dim,
        )  # fmt: skip
        return out.movedim(1, -1)

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={tuple(self.weight.shape[2:])}, stride={self.stride}, dilation={self.dilation}"


def depthwise_by_sample(x: Tensor, kernels: Tensor) -> Tensor:
    """(B, H, W, C), every channel of every sample convolved with a kernel of its own, (B, k, k, C) with odd k.

    >>> depthwise_by_sample(torch.ones(2, 4, 4, 1), torch.ones(2, 3, 3, 1))[0, 1, 1].tolist()
    [9.0]
    """
    batch, height, width, dim = x.shape
    if not batch:
        return x + kernels.sum()
    # All samples are channels of one map, channels last, which is many times faster than samples as groups.
    beside = x.permute(1, 2, 0, 3).reshape(1, height, width, batch * dim)
    weight = kernels.permute(0, 3, 1, 2).reshape(batch * dim, 1, *kernels.shape[1:3]).to(x.dtype)
    return depthwise(beside, weight).reshape(height, width, batch, dim).permute(2, 0, 1, 3)


class CausalConv(DepthwiseConv):
    """Depthwise convolution of (B, N, C) in which a token sees itself and those before it.

    >>> CausalConv(4, 3)(torch.randn(2, 7, 4)).shape
    torch.Size([2, 7, 4])
    """

    def __init__(self, dim: int, kernel_size: int, bias: bool = True):
        super().__init__(dim, check_int("kernel_size", kernel_size, least=1), rank=1, bias=bias)
        self.past = kernel_size - 1

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """``before`` (B, kernel_size - 1, C) are the tokens before ``x``; zeros by default."""
        x = _shards.behind(x, self.past, 1) if before is None else torch.cat([before.to(x.dtype), x], 1)
        return F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=self.dim).transpose(1, 2)


def init_fan_out(conv: nn.Conv2d | DepthwiseConv) -> None:
    """Normal weights of unit gain over the fan-out, zero biases: how convolutions of PVTv2 and its relatives start."""
    groups = conv.dim if isinstance(conv, DepthwiseConv) else conv.groups
    fan_out = conv.weight.shape[0] * math.prod(conv.weight.shape[2:]) // groups
    nn.init.normal_(conv.weight, std=math.sqrt(2.0 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def init_like_torch(dim: int, *maps: nn.Linear) -> None:
    """Maps of queries, keys and values start as those of ``torch.nn.MultiheadAttention``: Xavier's, of the three as one
    matrix of ``dim``, with zero biases.
    """
    bound = math.sqrt(6 / (4 * dim))
    for part in maps:
        nn.init.uniform_(part.weight, -bound, bound)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def init_like_pvt(module: nn.Module) -> None:
    """Linear maps start narrow, with zero biases, convolutions as by :func:`init_fan_out`."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, (nn.Conv2d, DepthwiseConv)):
            init_fan_out(m)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: the approximation of GELU in CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """``Linear -> activation -> Linear`` on the last axis, with a gate or a depthwise convolution in the middle.

    Args:
        dim: width of ``x``.
        ratio: hidden width over ``dim``.
        activation: of the hidden layer.
        drop: dropout in training, of the output (and of the hidden layer with ``drop_hidden``).
        hidden: hidden width, instead of ``ratio``.
        out_dim: width of the output; ``dim`` by default.
        gated: ``fc2(act(a) * b)`` with ``[a, b] = fc1(x)`` and ``a``, ``b`` of the hidden width (SwiGLU, GEGLU).
        depthwise: side of a depthwise convolution over the grid, before the activation (0: none).
        skip: add the hidden layer to that convolution: ``act(z + conv(z))``.
        act_first: the activation stands before that convolution, not behind it.
        bias: of both linear maps.
        drop_hidden: apply ``drop`` to the hidden layer as well, as timm does.
        norm: makes a norm of the hidden layer (sub-LN); ``None`` for none.
    """

    def __init__(
        self,
        dim: int,
        ratio: float = 4.0,
        activation: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        hidden: int | None = None,
        out_dim: int | None = None,
        gated: bool = False,
        depthwise: int = 0,
        skip: bool = False,
        bias: bool = True,
        drop_hidden: bool = False,
        norm: Callable[[int], nn.Module] | None = None,
        act_first: bool = False,
    ):
        super().__init__()
        hidden = int(dim * ratio) if hidden is None else hidden
        if act_first and (gated or not depthwise):
            raise ValueError("act_first=True needs a depthwise convolution and no gate")
        self.gated, self.skip, self.drop_hidden, self.act_first = gated, skip, drop_hidden, act_first
        self.fc1 = nn.Linear(dim, hidden * (2 if gated else 1), bias=bias)
        self.dwconv = DepthwiseConv(hidden, depthwise) if depthwise else None
        self.act = activation()
        self.norm = None if norm is None else norm(hidden)
        self.fc2 = nn.Linear(hidden, dim if out_dim is None else out_dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, dim) -> (B, *grid, out_dim); tokens outside ``valid`` are zeros to the convolution."""
        z = self.fc1(x)
        gate = None
        if self.gated:
            z, gate = z.chunk(2, -1)
        if self.act_first:
            z = self.act(z)
        if self.dwconv is not None:
            z = zero_invalid(z, valid)
            local = self.dwconv(z)
            z = z + local if self.skip else local
        if not self.act_first:
            z = self.act(z) if gate is None else self.act(z) * gate
        z = through(self.drop, z) if self.drop_hidden else z
        return through(self.drop, self.fc2(z if self.norm is None else self.norm(z)))


class DropPath(nn.Module):
    """Stochastic depth: in training, whole samples of a branch are dropped with ``p`` and the rest is scaled up."""

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = check_real("drop_path", p, least=0, below=1)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device, dtype=torch.float32) >= self.p
        return x * (kept.float() / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.p}"


class LayerScale(nn.Module):
    """``gamma * x`` with one learned number per channel, ``init`` at the start; with ``bias``, ``gamma * x + beta``."""

    def __init__(self, dim: int, init: float = 1e-5, bias: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))
        self.beta = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma if self.beta is None else torch.addcmul(self.beta, x, self.gamma)


class GlobalResponseNorm(nn.Module):
    """``(1 + gamma n) x + beta`` with ``n_c = g_c / mean(g)`` and ``g_c`` the length of channel c over the grid (GRN).

    Woo et al., 2023, "ConvNeXt V2", arXiv 2301.00808. It starts as the identity.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.gamma, self.beta, self.eps = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, dim) -> the same; lengths are those of the tokens that exist."""
        axes = tuple(range(1, x.dim() - 1))
        g = torch.linalg.vector_norm(zero_invalid(x, valid), dim=axes, keepdim=True, dtype=stats_dtype(x.dtype))
        scale = (g / (g.mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return torch.addcmul(self.beta, x, 1 + self.gamma * scale)


class PositionalConv(nn.Module):
    """``x + conv(x)``, depthwise: a position encoding that is conditioned on the tokens (CPE).

    Its parameters are those of the convolution: ``conv.weight``, ``conv.bias``.
    """

    def __init__(self, dim: int, kernel_size: int | Sequence[int] = 3, rank: int = 2, bias: bool = True):
        super().__init__()
        self.conv = DepthwiseConv(dim, kernel_size, rank, bias=bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return x + self.conv(zero_invalid(x, valid))


class PositionMlp(nn.Module):
    """A relative bias per head as a function of the displacement, learned by an MLP: the same for windows of any size.

    ``table[h, d] = fc2(drop(relu(fc1(sign(d) log(1 + |d|)))))_h`` for displacements ``d`` of 1 - w to w - 1 per axis.

    Args:
        num_heads: tables.
        hidden: width of the hidden layer.
        rank: axes of a window.
        drop: dropout of the hidden layer in training.
    """

    def __init__(self, num_heads: int, hidden: int = 512, rank: int = 2, drop: float = 0.125):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(rank, hidden), nn.Linear(hidden, num_heads)
        self.drop = nn.Dropout(drop)

    def forward(self, window: Sequence[int]) -> Tensor:
        """Sides of a window -> (num_heads, *(2 w - 1))."""
        like = next(self.parameters(), torch.zeros(()))  # none are left in a quantized layer
        sides = [torch.arange(1 - w, w, device=like.device, dtype=like.dtype) for w in window]
        at = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
        hidden = F.relu(self.fc1(at.sign() * at.abs().log1p()))
        return self.fc2(self.drop(hidden)).movedim(-1, 0)


class PositionTable(nn.Module):
    """``x + table``: a learned vector per place of a map, interpolated to maps of other sides.

    Args:
        dim: width.
        grid: sides of the map that the table is made for.
        mode: how, ``"bicubic"`` or ``"bilinear"``.

    >>> PositionTable(8, (4, 4))(torch.zeros(1, 3, 5, 8))[0].shape
    torch.Size([1, 3, 5, 8])
    """

    #: Parameters that are tables of places, by how many of their last axes are places.
    tables = {"pos_embed": 2}

    def __init__(self, dim: int, grid: Sequence[int], mode: str = "bicubic"):
        super().__init__()
        self.table_mode = mode
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim, *to_tuple("grid", grid, 2)), std=0.02))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> the same, and ``valid``."""
        return x + resized(self.pos_embed, x.shape[1:3], self.table_mode).permute(1, 2, 0), valid


def strided_valid(valid: Tensor | None, stride: int | Sequence[int]) -> Tensor | None:
    """Which cells of ``stride`` tokens a side hold a token that exists: (B, H, W) -> (B, ceil(H / s), ceil(W / s)).

    >>> strided_valid(torch.tensor([[[True, False, False]]]), 2)
    tensor([[[ True, False]]])
    """
    if valid is None:
        return None
    steps = to_tuple("stride", stride, valid.dim() - 1)
    sides = [-n % s for n, s in zip(valid.shape[1:], steps, strict=True)]
    cells = F.pad(valid, [end for side in reversed(sides) for end in (0, side)])
    for axis, step in enumerate(steps, 1):
        cells = cells.unflatten(axis, (-1, step)).any(axis + 1)
    return cells


def masked_batch_norm(norm: nn.BatchNorm2d, x: Tensor, valid: Tensor | None) -> Tensor:
    """BatchNorm of (B, *grid, C) whose statistics, in training, are those of the tokens that exist."""
    if not norm.training or valid is None:
        flat = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), 1, x.shape[-1])  # a batch of none has no -1
        return norm(flat.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(x.shape)
    high = stats_dtype(x.dtype)
    exists = valid.unsqueeze(-1).to(high)
    axes = tuple(range(x.dim() - 1))
    count = exists.sum().clamp(min=1)
    mean = (x * exists).sum(axes) / count
    var = ((x - mean).square() * exists).sum(axes) / count
    if norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            unbiased = var * (count / (count - 1).clamp(min=1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    y = ((x - mean) * torch.rsqrt(var + norm.eps)).to(x.dtype)
    return y if norm.weight is None else y * norm.weight + norm.bias


class MapNorm(nn.Module):
    """BatchNorm of (B, *grid, C): in training its statistics are those of the tokens that exist. ``norm.*``."""

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, eps, momentum)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return masked_batch_norm(self.norm, x, valid)


def normed(norm: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """``norm(x)``, told which tokens exist where it reads more than one."""
    return norm(x, valid) if isinstance(norm, (MapNorm, ConvNorm)) else norm(x)


def batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``(scale, shift)`` of BatchNorm with its running statistics: ``norm(x) = scale * x + shift``."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, activation on (B, H, W, C); convolution and norm are one convolution in evaluation.

    Any size: the output has ``ceil(side / stride)`` tokens a side, zeros are added at the bottom and on the right where
    that needs them. Parameters: ``conv.weight``, ``norm.*``, ``pre.*``.

    Args:
        dim: channels in.
        out_dim: channels out.
        kernel_size: side of the kernel.
        stride: of the convolution.
        padding: zeros on every side; ``(dilation * (kernel_size - 1)) // 2`` by default; ``"same"``: as TensorFlow has
            it, as few as ``ceil(side / stride)`` tokens need, the odd one at the bottom and on the right.
        dilation: of the convolution.
        groups: of the convolution.
        bias: of the convolution, which a norm makes superfluous.
        norm: BatchNorm after it.
        activation: makes the activation; ``None`` for none.
        gain: of the norm at the start.
        eps: of the norms.
        momentum: of the norms.
        pre_norm: BatchNorm before it, too, for 1 x 1 convolutions.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | str | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        activation: Callable[[], nn.Module] | None = None,
        gain: float = 1.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        pre_norm: bool = False,
    ):
        super().__init__()
        self.same = isinstance(padding, str)
        if isinstance(padding, str):
            check_choice("padding", padding, ("same",))
            padding = 0
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        if pre_norm and (kernel_size, groups) != (1, 1):
            raise ValueError(f"pre_norm needs kernel_size=1 and groups=1, got {kernel_size} and {groups}")
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride, padding, dilation, groups, bias=bias)
        self.pre: nn.BatchNorm2d | None = nn.BatchNorm2d(dim, eps, momentum) if pre_norm else None
        self.norm: nn.BatchNorm2d | None = nn.BatchNorm2d(out_dim, eps, momentum) if norm else None
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, gain)
        self.act = None if activation is None else activation()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim).

        Args:
            x: the tokens; those outside ``valid`` are zeros to the convolution.
            valid: (B, H, W) boolean, which tokens exist; only they enter the statistics of the norm.
        """
        conv, pre, norm = self.conv, self.pre, self.norm
        x = zero_invalid(x, valid)
        training = norm.training if norm is not None else pre is not None and pre.training
        if training or (norm is None and pre is None) or not self._pays(x):
            if pre is not None:
                x = zero_invalid(masked_batch_norm(pre, x, valid), valid)
            x = conv_any_size(conv, x, conv.weight, conv.bias, self.same)
            if norm is not None:
                x = masked_batch_norm(norm, x, strided_valid(valid, conv.stride))
        else:
            x = conv_any_size(conv, x, *self._folded(), self.same)
        return x if self.act is None else self.act(x)

    def _pays(self, x: Tensor) -> bool:
        """Whether there are more numbers to norm than weights to fold the norm into."""
        if torch.compiler.is_compiling():  # a choice by size would tie the graph to one size
            return True
        normed = x.numel() if self.norm is None else x.numel() // x.shape[-1] * self.conv.out_channels
        return normed > self.conv.weight.numel() * math.prod(self.conv.stride)

    def _folded(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.conv.weight, self.conv.bias
        if self.pre is not None:
            scale, shift = batch_norm_affine(self.pre)
            moved = weight.flatten(1) @ shift
            weight, bias = weight * scale[:, None, None], moved if bias is None else bias + moved
        if self.norm is not None:
            scale, shift = batch_norm_affine(self.norm)
            weight, bias = weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale
        assert bias is not None
        return weight, bias

    @torch.no_grad()
    def deployed(self) -> ConvNorm:
        """The same with norms and convolution folded into one."""
        out = copy.deepcopy(self).eval()
        if self.norm is not None or self.pre is not None:
            weight, bias = self._folded()
            # In the order of the maps: convolutions need not lay them out anew in every call.
            out.conv.weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
            out.conv.bias = nn.Parameter(bias.detach().clone())
            out.norm = out.pre = None
        return out


class RepBranches(nn.Module):
    """Parallel depthwise convolutions of several kernels and dilations, each with a norm, as one kernel in evaluation.

    ``y = norm(sum_i norm_i(conv_i(x)) [+ norm_0(x)])`` on (B, H, W, dim). In training every branch is its own; in
    evaluation all are merged into one kernel of the largest reach; :meth:`deployed` keeps only that.

    Args:
        dim: channels.
        branches: ``(kernel_size, dilation)`` of every branch, odd kernels; the first reaches as far as any.
        identity: a norm of ``x`` itself as one more branch.
        norm: a norm of the sum.
        merged: built as one convolution with a bias, for weights that were merged when they were saved.
    """

    def __init__(
        self,
        dim: int,
        branches: Sequence[tuple[int, int]],
        identity: bool = False,
        norm: bool = False,
        merged: bool = False,
    ):
        super().__init__()
        (reach, step), *rest = branches
        reach = step * (reach - 1) + 1
        if any(k % 2 == 0 or d * (k - 1) >= reach for k, d in branches):
            raise ValueError(f"branches={tuple(branches)} must have odd kernels, none reaching further than the first")
        self.kernel_size = reach
        self.large = ConvNorm(dim, dim, branches[0][0], dilation=step, groups=dim, bias=merged, norm=not merged)
        self.branches = nn.ModuleDict(
            {} if merged else {f"k{k}_d{d}": ConvNorm(dim, dim, k, dilation=d, groups=dim) for k, d in rest}
        )
        self.identity = MapNorm(dim) if identity and not merged else None
        self.norm = MapNorm(dim) if norm else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same; tokens outside ``valid`` are zeros to the convolutions."""
        x = zero_invalid(x, valid)
        if not self.training:
            return depthwise(x, *self._merged())
        y = self.large(x, valid)
        for branch in self.branches.values():
            y = y + branch(x, valid)
        y = y if self.identity is None else y + self.identity(x, valid)
        return y if self.norm is None else self.norm(y, valid)

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Kernel (dim, 1, K, K) and bias of all that is here."""
        size = self.kernel_size
        weight, bias = torch.zeros(()), torch.zeros(())
        branches: list[Any] = [self.large, *self.branches.values()]
        for i, branch in enumerate(branches):
            w, b = branch._folded()
            step = branch.conv.dilation[0]
            if step > 1:
                w = F.conv_transpose2d(w, w.new_ones(1, 1, 1, 1), stride=step)
            if w.shape[-1] < size:
                w = F.pad(w, [(size - w.shape[-1]) // 2] * 4)
            weight, bias = (weight + w, bias + b) if i else (w, b)
        if self.identity is not None:
            scale, shift = batch_norm_affine(self.identity.norm)
            weight, bias = weight + F.pad(scale[:, None, None, None], [size // 2] * 4), bias + shift
        if self.norm is not None:
            scale, shift = batch_norm_affine(self.norm.norm)
            weight, bias = weight * scale[:, None, None, None], shift + bias * scale
        return weight, bias

    @torch.no_grad()
    def deployed(self) -> RepBranches:
        """The same as one convolution."""
        if not self.branches and self.norm is None and self.identity is None and self.large.norm is None:
            return self
        weight, bias = self._merged()
        out = RepBranches(len(bias), ((self.kernel_size, 1),), merged=True).eval()
        out.large.conv.weight, out.large.conv.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        return out


def masked_group_norm(norm: nn.GroupNorm, x: Tensor, valid: Tensor | None) -> Tensor:
    """GroupNorm of (B, *grid, C) whose statistics are those of the tokens that exist."""
    if valid is None:
        return norm(x.movedim(-1, 1)).movedim(1, -1)
    grouped = x.to(stats_dtype(x.dtype)).unflatten(-1, (norm.num_groups, -1))
    exists = valid[..., None, None]
    axes = (*range(1, x.dim() - 1), x.dim())
    count = (valid.flatten(1).sum(1) * grouped.shape[-1]).clamp(min=1).view(-1, *[1] * (grouped.dim() - 1))
    mean = grouped.masked_fill(~exists, 0.0).sum(axes, keepdim=True) / count
    var = (grouped - mean).masked_fill(~exists, 0.0).square().sum(axes, keepdim=True) / count
    out = ((grouped - mean) * torch.rsqrt(var + norm.eps)).flatten(-2).to(x.dtype)
    return out if norm.weight is None else out * norm.weight + norm.bias


class ConvGroupNorm(nn.Module):
    """Convolution without bias, then GroupNorm, on (B, H, W, C). Parameters: ``conv.weight``, ``norm.*``.

    Any size: the output has ``ceil(side / stride)`` tokens a side.

    Args:
        dim: channels in.
        out_dim: channels out.
        kernel_size: side of the kernel, odd.
        stride: of the convolution.
        groups: of the convolution.
        norm_groups: of the norm.
    """

    def __init__(
        self, dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, norm_groups: int = 1
    ):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.norm = nn.GroupNorm(norm_groups, out_dim)

    @property
    def stride(self) -> int:
        return int(self.conv.stride[0])

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim); ``valid``: which tokens exist."""
        x = conv_any_size(self.conv, zero_invalid(x, valid), self.conv.weight, None)
        return masked_group_norm(self.norm, x, strided_valid(valid, self.stride))


class ResidualConv(nn.Module):
    """``x + BatchNorm(conv(x))``, depthwise: one convolution in its deployed form.

    Args:
        dim: channels.
        kernel_size: side of the kernel, odd.
        gain: of the norm at the start.
    """

    def __init__(self, dim: int, kernel_size: int = 3, gain: float = 1.0):
        super().__init__()
        check_int("kernel_size", kernel_size, least=1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.conv = ConvNorm(dim, dim, kernel_size, groups=dim, gain=gain)
        self.skip = True

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        y = self.conv(x, valid)
        return x + y if self.skip else y

    @torch.no_grad()
    def deployed(self) -> ResidualConv:
        """The same with norm and identity in the kernel."""
        if not self.skip:
            return self
        out = copy.deepcopy(self).eval()
        out.conv, out.skip = self.conv.deployed(), False
        middle = out.conv.conv.kernel_size[0] // 2
        out.conv.conv.weight[:, 0, middle, middle] += 1
        return out


class ConvMlp(nn.Module):
    """``ConvNorm -> activation -> ConvNorm`` with 1 x 1 kernels on (B, H, W, dim).

    Args:
        dim: width.
        ratio: hidden width over ``dim``.
        activation: of the hidden layer.
        gain: of the last norm at the start.
    """

    def __init__(
        self, dim: int, ratio: float = 4.0, activation: Callable[[], nn.Module] = nn.GELU, gain: float = 1.0
    ):  # fmt: skip
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.fc2 = ConvNorm(dim, hidden, activation=activation), ConvNorm(hidden, dim, gain=gain)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        return self.fc2(self.fc1(x, valid), valid)


class ChannelBatchNorm(nn.BatchNorm2d):
    """BatchNorm of the last axis of a tensor of any rank."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1], 1, 1)).view(x.shape)


class BatchNormLinear(nn.Module):
    """BatchNorm of the last axis, then a linear map: one linear map in its deployed form. It starts as heads do."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm, self.linear = ChannelBatchNorm(dim), nn.Linear(dim, out_dim)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    @torch.no_grad()
    def deployed(self) -> nn.Linear:
        """The same as one linear map."""
        out = copy.deepcopy(self.linear)
        scale, shift = batch_norm_affine(self.norm)
        out.bias.copy_(self.linear.bias + self.linear.weight @ shift)
        out.weight.copy_(self.linear.weight * scale)
        return out


#: A strided pointwise convolution of fewer channels than this goes by indexing: where a block of channels is not full,
#: its gradient in oneDNN overruns a buffer on CPUs with AVX2 (uxlfoundation/oneDNN#6035), and is wrong or ends the run.
_BLOCK = 16


def conv_any_size(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, same: bool = False) -> Tensor:
    """A convolution of (B, H, W, C) that leaves ``ceil(side / stride)`` tokens a side, whatever the side.

    Args:
        conv: kernel size, stride, padding, dilation and groups are read from it.
        x: the tokens.
        weight: of the convolution.
        bias: of the convolution.
        same: zeros are halved between both sides as TensorFlow does, instead of the convolution's padding.
    """
    own_weight(conv, "a convolution of any size")
    if conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1:
        down, across = conv.stride
        if down == across == 1:
            return F.linear(x, weight.flatten(1), bias)
        if weight.shape[1] < _BLOCK:
            return F.linear(x[:, ::down, ::across], weight.flatten(1), bias)
    cuts: list[tuple[int, int]] = []  # of the output
    padding: list[int] = []
    more: list[int] = []  # zeros behind that the padding does not bring
    for axis, n in enumerate(x.shape[1:-1]):
        k, s, d = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        out = -(-n // s)
        zeros = max(0, (out - 1) * s + d * (k - 1) + 1 - n)
        before = zeros // 2 if same else int(conv.padding[axis])
        behind = max(0, zeros - before)
        # Where TensorFlow's odd zero lies behind, a stride more of zeros before lets the convolution pad by itself;
        # what it gives for them is cut off.
        skip = -(-(behind - before) // s) if same and behind > before else 0
        cuts.append((skip, skip + out))
        padding.append(before + s * skip)
        more.append(0 if same else max(0, behind - before))
    x = x.permute(0, 3, 1, 2)
    if any(more):
        x = F.pad(x, [0, more[1], 0, more[0]])
    heavy = _mostly_weights(conv, x)
    if heavy:
        x = x.contiguous()
    x = F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups).permute(0, 2, 3, 1)
    if heavy:
        x = x.contiguous()
    return x[:, slice(*cuts[0]), slice(*cuts[1])]


def _mostly_weights(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution of (B, C, H, W) on the CPU has so many weights for so small a map that it is faster in the
    order of its weights: channels last, these are laid out anew in every call.
    """
    if torch.compiler.is_compiling() or not x.is_cpu:  # a choice by size would tie the graph to one size
        return False
    weights = conv.weight.numel()
    both = x.numel() // x.shape[1] * (conv.in_channels + conv.out_channels // math.prod(conv.stride))
    return weights >= 1 << 19 and weights > 4 * both


def resize_map(x: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """(B, H, W, C) at another size, corners not aligned; as it is where that is its size.

    >>> resize_map(torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), (1, 4)).flatten().tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    size = (int(size[0]), int(size[1]))
    if tuple(x.shape[1:3]) == size:
        return x
    options = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(x.permute(0, 3, 1, 2), size, mode=mode, **options).permute(0, 2, 3, 1)


def mean_pool(x: Tensor, sides: Sequence[int], *settings: Any, **more: Any) -> Tensor:
    """``F.avg_pool1d``, ``2d`` or ``3d`` of (B, C, *grid), in any precision: on the CPU torch has no means of half ones
    over three axes.

    >>> mean_pool(torch.ones(1, 1, 2, 2, 2, dtype=torch.bfloat16), (2, 2, 2)).flatten()
    tensor([1.], dtype=torch.bfloat16)
    """
    pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    return _widely(x, lambda t: pool(t, tuple(sides), *settings, **more), x.dim() == 5)


def smoothed(x: Tensor, sides: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Images (B, C, H, W) of other sides, corners not aligned, antialiased: in any precision, which torch's filter on
    the CPU is not.

    >>> smoothed(torch.ones(1, 1, 4, 4, dtype=torch.bfloat16), (2, 2)).flatten()[:1]
    tensor([1.], dtype=torch.bfloat16)
    """
    return _widely(x, lambda t: F.interpolate(t, tuple(sides), mode=mode, align_corners=False, antialias=True))


def _widely(x: Tensor, call: Callable[[Tensor], Tensor], here: bool = True) -> Tensor:
    """``call`` in float32, where the CPU has none for half precision."""
    wide = stats_dtype(x.dtype)
    return call(x.to(wide)).to(x.dtype) if here and x.device.type == "cpu" and wide != x.dtype else call(x)


class LSTM(nn.LSTM):
    """torch's, which runs in the precision of its weights on the CPU: under autocast some processors have no kernel."""

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        held = input.data if isinstance(input, PackedSequence) else input
        if held.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(input, hx)
        dtype: Any = self.weight_ih_l0.dtype
        with exactly(held):
            return super().forward(input.to(dtype), None if hx is None else (hx[0].to(dtype), hx[1].to(dtype)))


def cell_means(x: Tensor, side: int | Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Means of cells of ``side`` tokens per axis over those that exist: (B, H, W, C) -> (B, ceil(H / s), ..., C).

    Grids of one to three axes; a cell without tokens is zero.

    >>> cell_means(torch.tensor([1.0, 3.0, 7.0]).view(1, 1, 3, 1), 2).flatten().tolist()
    [2.0, 7.0]
    """
    sides = to_tuple("side", side, x.dim() - 2)

    def means(t: Tensor) -> Tensor:
        return mean_pool(t.movedim(-1, 1), sides, ceil_mode=True).movedim(1, -1)

    out = means(zero_invalid(x, valid))
    if valid is None:
        return out
    shares = means(valid.unsqueeze(-1).to(stats_dtype(x.dtype)))
    return (out / torch.where(shares == 0, 1, shares)).to(x.dtype)


class Patchify(nn.Module):
    """Patches to tokens, as stems and between stages: a strided convolution with a norm before or after it.

    Any size: the output has ``ceil(side / stride)`` tokens a side, zeros are added at the bottom and on the right where
    that needs them. Parameters: ``proj.weight``, ``proj.bias``, ``norm.*``.

    Args:
        dim: channels in.
        out_dim: channels out.
        kernel_size: side of the kernel.
        stride: of the convolution; ``kernel_size`` by default.
        padding: zeros on every side.
        norm: makes the norm from a width; ``None`` for none.
        norm_first: norm before the convolution instead of after it.
        bias: of the convolution.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        norm: Callable[[int], nn.Module] | None = nn.LayerNorm,
        norm_first: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        self.norm_first = norm_first
        self.proj = nn.Conv2d(dim, out_dim, kernel_size, stride or kernel_size, padding, bias=bias)
        self.norm = None if norm is None else norm(dim if norm_first else out_dim)

    @property
    def stride(self) -> int:
        return int(self.proj.stride[0])

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / s), ceil(W / s), out_dim), and which of these exist."""
        if self.norm is not None and self.norm_first:
            x = normed(self.norm, x, valid)
        x = conv_any_size(self.proj, zero_invalid(x, valid), self.proj.weight, self.proj.bias)
        if self.norm is not None and not self.norm_first:
            x = normed(self.norm, x, strided_valid(valid, self.stride))
        return x, strided_valid(valid, self.stride)


class CrossScale(nn.Module):
    """Patches of several sizes around the same centres, side by side as one token: convolutions of one stride (CEL).

    Of ``n`` kernels, number ``i`` gives ``out_dim / 2^(i + 1)`` channels, the last as many as the one before it, so
    that large kernels get few. Any size, as :class:`Patchify`. Parameters: ``projs.<i>.*``, ``norm.*``.

    Args:
        dim: channels in.
        out_dim: channels out.
        kernel_sizes: sides of the kernels, from the smallest; ``stride`` and each differ by an even number.
        stride: of the convolutions; the first kernel's side by default.
        norm: makes the norm from a width; ``None`` for none.
        norm_first: norm before the convolutions instead of after them.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_sizes: Sequence[int],
        stride: int | None = None,
        norm: Callable[[int], nn.Module] | None = nn.LayerNorm,
        norm_first: bool = False,
    ):
        super().__init__()
        stride = kernel_sizes[0] if stride is None else stride
        if any(k < stride or (k - stride) % 2 for k in kernel_sizes):
            raise ValueError(f"kernel_sizes={tuple(kernel_sizes)} must be stride={stride} plus even numbers from 0")
        last = len(kernel_sizes) - 1
        if out_dim % 2**last:
            raise ValueError(f"out_dim={out_dim} must be a multiple of {2**last} for {last + 1} kernel_sizes")
        self.stride, self.norm_first = stride, norm_first
        self.projs = nn.ModuleList(
            nn.Conv2d(dim, out_dim // 2 ** min(i + 1, last), k, stride, (k - stride) // 2)
            for i, k in enumerate(kernel_sizes)
        )
        self.norm = None if norm is None else norm(dim if norm_first else out_dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / s), ceil(W / s), out_dim), and which of these exist."""
        if self.norm is not None and self.norm_first:
            x = self.norm(x)
        x = zero_invalid(x, valid)
        if torch.is_grad_enabled() and x.shape[-1] < 8:
            # Large kernels over few channels have a slow backward pass in channels-last order (on the CPU).
            x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        x = torch.cat([conv_any_size(conv, x, conv.weight, conv.bias) for conv in self.projs], -1)  # type: ignore[arg-type]
        if self.norm is not None and not self.norm_first:
            x = self.norm(x)
        return x, strided_valid(valid, self.stride)


class PatchMerging(nn.Module):
    """Four neighbouring tokens to one: their channels side by side, norm, linear map without bias (Swin).

    The order of the four is (0, 0), (1, 0), (0, 1), (1, 1) in rows and columns. Any size: a missing row or column is
    zeros. Parameters: ``norm.*``, ``reduction.weight``.

    Args:
        dim: width.
        out_dim: width of the output; twice ``dim`` by default.
        norm: makes the norm from a width.
        norm_first: norm of the four before the linear map; of its output otherwise.
    """

    stride = 2

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_first: bool = True,
    ):
        super().__init__()
        out_dim = 2 * dim if out_dim is None else out_dim
        self.norm_first = norm_first
        self.norm = norm(4 * dim if norm_first else out_dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim), and which of these exist."""
        x = zero_invalid(x, valid)
        _, height, width, _ = x.shape
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        x = self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))
        return x, strided_valid(valid, 2)


class SqueezeExcite(nn.Module):
    """Channel gates from the mean token: ``x * gate(W_2 act(W_1 mean(x)))`` on (B, *grid, C).

    Args:
        dim: width.
        hidden: width of the middle layer.
        activation: of the middle layer.
        gate: of the output.
        bias: of both linear maps.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
        bias: bool = True,
    ):
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, hidden, bias=bias), activation()
        self.fc2, self.gate = nn.Linear(hidden, dim, bias=bias), gate()

    def weights(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """The gates, (B, *ones, C); the mean is that of the tokens in ``valid``."""
        g = self.gate(self.fc2(self.act(self.fc1(masked_mean(x, valid)))))
        return g.view(g.shape[0], *[1] * (x.dim() - 2), g.shape[-1])

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """The mean is that of the tokens in ``valid``."""
        return x * self.weights(x, valid)


def computes_in(layer: nn.Module) -> torch.dtype:
    """The type a linear layer wants its input in: that of its weights, float32 where they are packed (quantized)."""
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else torch.float32


def masked_mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean token of (B, *grid, C) over those that exist: (B, C); zeros where none does."""
    x = x.flatten(1, -2)
    if valid is None:
        return x.mean(1)
    exists = valid.flatten(1)
    count = exists.sum(1, keepdim=True).clamp(min=1)
    return (x.masked_fill(~exists.unsqueeze(-1), 0.0).sum(1) / count).to(x.dtype)
