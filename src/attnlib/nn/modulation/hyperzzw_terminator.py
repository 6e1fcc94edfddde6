"""HyperZ.Z.W: a slow network makes kernels as large as the image, which the image multiplies, and is multiplied by.

Zhang, 2024, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv 2401.17948. The slow
network maps coordinates to a kernel by products of sines, ``h_0 = g_0(c)``, ``h_l = g_l(c) * (W_l h_(l-1) + b_l)``,
``g_l(c) = sin(L_l c + p_l)``, ``K = W_o h``. The fast path multiplies twice:

- global, with a kernel ``K_g`` of every place and channel: ``S = x * K_g``, and per channel the product of matrices
  ``y = S f`` over rows and columns, ``f = IN(W_f x)``: a place reads its row and its column;
- local, with a ``k x k`` kernel that depends on the image: every layer of its slow network is renormed,
  ``a stop(h) + b h / |h|``, and multiplied by a map of the pooled image; then a depthwise convolution with it, a linear
  map, a norm, a GELU.

This is a reading: the code is not in the repository any more. The paper calls the global product a dot product; it is
one of matrices, as in the code that an index had. Differs from it: the pooled image is that of each sample, and norms
are over the places of each sample, where the code averages over the batch, so that the answer depends on the company
(``compat="authors"``); ``a`` and ``b`` are parameters, where the code keeps them in lists that nobody trains; oblong
images are read as far as rows and columns are equally long; kernels are made for any size, without tables of biases.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_rank, check_real
from ...ops.reduced import adaptive_pool_tokens
from ...types import Traits, stats_dtype
from ..base import Mechanism
from ..layers import depthwise_by_sample, zero_invalid
from ..registry import register


class HyperKernel(nn.Module):
    """A slow network: coordinates in [-1, 1] to a kernel (*sides, channels), by products of sines.

    Args:
        channels: of the kernel.
        rank: axes.
        hidden: width.
        num_layers: sines that are multiplied.
        omega: how fast they oscillate.
        context_dim: width of what the kernel depends on; 0 for nothing.

    >>> HyperKernel(6, rank=2, hidden=4)((3, 5)).shape
    torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        channels: int,
        rank: int = 2,
        hidden: int = 32,
        num_layers: int = 2,
        omega: float = 10.0,
        context_dim: int = 0,
    ):
        super().__init__()
        self.rank = rank
        check_int("num_layers", num_layers, least=1)
        check_real("omega", omega, above=0)
        self.sines = nn.ModuleList(nn.Linear(rank, hidden) for _ in range(num_layers))
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num_layers - 1))
        self.out = nn.Linear(hidden, channels)
        self.reduce = nn.Linear(context_dim, hidden) if context_dim else None
        self.contexts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num_layers)) if context_dim else None
        self.alpha = nn.Parameter(torch.ones(num_layers)) if context_dim else None
        self.beta = nn.Parameter(torch.full((num_layers,), 0.1)) if context_dim else None
        with torch.no_grad():
            for layer, sine in enumerate(self.sines):
                weight: Any = sine.weight
                if not weight.is_meta:
                    shape = torch.full((hidden, 1), 6.0 / (layer + 1), dtype=torch.float32, device="cpu")
                    gamma = torch.distributions.Gamma(shape, torch.ones_like(shape)).sample()
                    weight.normal_().mul_((2 * math.pi * omega / 6 * gamma).to(weight))
                nn.init.uniform_(sine.bias, -math.pi, math.pi)  # type: ignore[arg-type]
            for linear in self.linears:
                nn.init.ones_(linear.bias)  # type: ignore[arg-type]

    def forward(self, sides: tuple[int, ...], context: Tensor | None = None) -> Tensor:
        """(*sides, channels); with a context (B, *sides, C) one for each sample, (B, *sides, channels)."""
        weight: Any = self.out.weight
        like = weight if isinstance(weight, Tensor) else torch.zeros(())  # packed weights lie on the CPU
        axes = [torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in sides]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        told = None if context is None or self.reduce is None else F.gelu(self.reduce(context))
        h = torch.ones((), dtype=like.dtype, device=like.device)
        for i, sine in enumerate(self.sines):
            wave = torch.sin(sine(grid))
            h = wave if i == 0 else wave * self.linears[i - 1](h)
            if told is not None and self.contexts is not None and self.alpha is not None and self.beta is not None:
                size = h.norm(dim=-1, keepdim=True).clamp(min=1e-6)
                h = (self.alpha[i] * h.detach() + self.beta[i] * h / size) * self.contexts[i](told)
        return self.out(h) / math.prod(sides) ** 0.5


def slow_loss(kernels: list[Tensor]) -> Tensor:
    """How far global kernels (H, W, C) of successive blocks are from the earlier ones, repeated along the channels.

    The sum over pairs of blocks of mean squares; zero where each kernel is the one before, repeated.

    >>> k = torch.randn(2, 2, 3)
    >>> slow_loss([k, torch.cat([k, k], -1)]).item()
    0.0
    """
    total: Tensor | float = 0.0
    for later, kernel in enumerate(kernels):
        check_rank("kernels", kernel, 3, "(H, W, C)")
        for earlier in kernels[:later]:
            if kernel.shape[-1] % earlier.shape[-1] or kernel.shape[:2] != earlier.shape[:2]:
                raise ValueError(f"kernels of {tuple(earlier.shape)} do not repeat to {tuple(kernel.shape)}")
            tiled = earlier.repeat(1, 1, kernel.shape[-1] // earlier.shape[-1])
            total = total + (tiled - kernel).square().mean()
    return torch.as_tensor(total)


def place_norm(x: Tensor, valid: Tensor | None, batch: bool = False, eps: float = 1e-5) -> Tensor:
    """Every channel of (B, H, W, C) normed over the places that exist, of each sample or of the batch; no gain."""
    axes = (0, 1, 2) if batch else (1, 2)
    high = x.to(stats_dtype(x.dtype))
    here = torch.ones_like(high[..., :1]) if valid is None else valid.unsqueeze(-1).to(high.dtype)
    count = here.sum(axes, keepdim=True).clamp(min=1)
    mean = (high * here).sum(axes, keepdim=True) / count
    var = ((high - mean).square() * here).sum(axes, keepdim=True) / count
    return zero_invalid(((high - mean) * torch.rsqrt(var + eps)).to(x.dtype), valid)


def place_product(s: Tensor, f: Tensor) -> Tensor:
    """Per channel the product of (H, W) matrices, of maps (B, H, W, C): as far as rows and columns are equally long."""
    common = min(s.shape[1:3])
    return torch.einsum("bhkc,bkwc->bhwc", s[:, :, :common], f[:, :common])


@register("hyperzzw-terminator", "hyperzzw")
class HyperZZW(Mechanism):
    """Global and local HyperZ.Z.W side by side, and a linear map of both.

    Args:
        dim: width of ``x``.
        kernel_size: side of the local kernel, odd.
        hidden: width of the global kernel's slow network.
        local_hidden: width of the local one's.
        num_layers: layers of both.
        omega: of both.
        compat: ``"authors"``: context and norms are those of the whole batch.

    Shapes: x and y (B, H, W, C). Cost: O(H W min(H, W) C).

    Reference: Zhang, 2024, arXiv 2401.17948; a reading.

    >>> HyperZZW(dim=8)(torch.randn(2, 6, 6, 8)).shape
    torch.Size([2, 6, 6, 8])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 1.5}, memory={"N": 1}, gradient="surrogate")
    reads_length = True

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        hidden: int = 64,
        local_hidden: int = 32,
        num_layers: int = 2,
        omega: float = 10.0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.kernel_size, self.compat = kernel_size, compat
        self.slow = HyperKernel(dim, 2, hidden, num_layers, omega)
        self.local = HyperKernel(dim, 2, local_hidden, num_layers, omega, context_dim=dim)
        self.fast, self.mixer = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(2 * dim, dim)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=self.compat is None)

    def global_kernel(self, height: int, width: int) -> Tensor:
        """(H, W, C): what :func:`slow_loss` compares."""
        return self.slow((height, width))

    def local_kernel(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, k, k, C): the kernel of each sample."""
        context, known = adaptive_pool_tokens(x, self.kernel_size, valid)
        here = torch.ones_like(context[..., :1]) if known is None else known.unsqueeze(-1).to(x.dtype)
        if self.compat is not None:
            count = here.sum(0, keepdim=True)
            context = ((context * here).sum(0, keepdim=True) / count.clamp(min=1)).expand_as(context)
            here = (count > 0).to(x.dtype).expand_as(here)
        if known is not None:  # a cell without tokens is told what the others are told on average
            mean = (context * here).sum((1, 2), keepdim=True) / here.sum((1, 2), keepdim=True).clamp(min=1)
            context = torch.where(here > 0, context, mean)
        return self.local((self.kernel_size,) * 2, context)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        height, width = x.shape[1:3]
        together = self.compat is not None
        s = zero_invalid(x * self.global_kernel(height, width).to(x.dtype), valid)
        far = place_product(s, place_norm(self.fast(x), valid, together))
        near = depthwise_by_sample(x, self.local_kernel(x, valid))
        near = F.gelu(place_norm(self.mixer(zero_invalid(near, valid)), valid, together))
        return self.proj(torch.cat([far, near], -1))
