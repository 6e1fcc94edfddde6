"""Single-head self-attention of SHViT: one head on some of the channels, the others pass by and join the projection."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import attention
from ...types import Traits, stats_dtype
from ..base import Mechanism
from ..layers import batch_norm_affine, flat_valid, masked_batch_norm, own_weight, plain
from ..registry import register
from ..released import Released


class NormedLinear(nn.Module):
    """A linear map without bias and BatchNorm over all tokens that exist; folds into one linear map for inference."""

    def __init__(self, dim: int, out: int, gain: float = 1.0):
        super().__init__()
        self.linear = nn.Linear(dim, out, bias=False)
        self.norm = nn.BatchNorm2d(out)
        nn.init.constant_(self.norm.weight, gain)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one linear map that this is with the running statistics."""
        scale, shift = batch_norm_affine(self.norm)
        return own_weight(self.linear, "folding a norm") * scale[:, None], shift

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, N, dim) and (B, N) -> (B, N, out)."""
        if not self.norm.training and plain(self.linear):
            return F.linear(x, *self._affine())
        return masked_batch_norm(self.norm, self.linear(x), valid)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The same map with the running statistics, as one linear layer."""
        weight, bias = self._affine()
        out = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        out.weight.copy_(weight)
        out.bias.copy_(bias)
        return out


class FoldedLinear(nn.Module):
    """A plain linear map that is called like :class:`NormedLinear`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.linear(x)


@register("shvit", "shsa", "single-head-attention")
class SingleHeadAttention(Mechanism):
    """Single-head self-attention on a part of the channels.

    ``x_1, x_2 = split(x)`` with p and C - p channels; ``[q, k, v] = BN(W GN(x_1))`` of widths d, d and p;
    ``x_1 <- softmax(q k^T / sqrt(d)) v`` over all tokens with one head; ``y = BN(W_o relu([x_1, x_2]))``.

    GN normalises all p * N numbers of a sample together. The last BN starts at gain 0, so a residual block around the
    layer starts as the identity. There is no position term: permuting tokens permutes outputs. In training the answer
    depends on the batch through BN; :meth:`deployed` folds both into their linear maps.

    Differs from the authors' code: channels last, any grid; tokens outside ``valid`` are not attended and take part in
    no statistic of GN or BN.

    Args:
        dim: width C.
        partial_dim: p; ``dim / 4.67``, rounded, by default.
        qk_dim: d.
        folded: built as :meth:`deployed` leaves it, without BatchNorms: for weights that were fused when they were
            saved.

    Reference: Yun and Ro, 2024, arXiv 2401.16456, eq. 3-5.

    >>> import torch
    >>> SingleHeadAttention(dim=32, partial_dim=8)(torch.randn(2, 4, 4, 32)).shape
    torch.Size([2, 4, 4, 32])
    """

    class_traits = Traits(
        grid_ranks=frozenset({1, 2, 3}),
        permutation_equivariant=True,
        work={"N": 2},
        memory={"N": 2},
    )

    def __init__(self, dim: int, partial_dim: int | None = None, qk_dim: int = 16, folded: bool = False):
        super().__init__(dim)
        self.partial_dim = max(1, round(dim / 4.67)) if partial_dim is None else partial_dim
        if not 1 <= self.partial_dim <= dim:
            raise ValueError(f"partial_dim must lie between 1 and dim={dim}, got {self.partial_dim}")
        if qk_dim < 1:
            raise ValueError(f"qk_dim must be at least 1, got {qk_dim}")
        self.qk_dim = qk_dim
        self.pre_norm = nn.GroupNorm(1, self.partial_dim)
        width = 2 * qk_dim + self.partial_dim
        self.qkv: nn.Module
        self.proj: nn.Module
        if folded:
            self.qkv = FoldedLinear(nn.Linear(self.partial_dim, width))
            self.proj = FoldedLinear(nn.Linear(dim, dim))
        else:
            self.qkv, self.proj = NormedLinear(self.partial_dim, width), NormedLinear(dim, dim, gain=0.0)

    @property
    def traits(self) -> Traits:
        folded = not isinstance(self.qkv, NormedLinear)
        return self.class_traits.but(batch_independent=folded or not self.training)

    def _normed(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, N, p): each sample normalised over its tokens and channels together."""
        norm, high = self.pre_norm, stats_dtype(x.dtype)
        if valid is None:
            normed = F.layer_norm(x.flatten(1), (math.prod(x.shape[1:]),), eps=norm.eps).view(x.shape)
        else:
            exists = valid.unsqueeze(-1)
            wide = x.to(high).masked_fill(~exists, 0.0)
            count = (exists.sum((1, 2), keepdim=True) * x.shape[-1]).clamp(min=1)
            mean = wide.sum((1, 2), keepdim=True) / count
            centred = (wide - mean).masked_fill(~exists, 0.0)
            var = centred.square().sum((1, 2), keepdim=True) / count
            normed = (centred * torch.rsqrt(var + norm.eps)).to(x.dtype)
        return torch.addcmul(norm.bias, normed, norm.weight)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        exists = flat_valid(valid)
        some, rest = x.flatten(1, -2).split([self.partial_dim, self.dim - self.partial_dim], -1)
        heads = self.qkv(self._normed(some, exists), exists).unsqueeze(1)
        q, k, v = heads.split([self.qk_dim, self.qk_dim, self.partial_dim], -1)
        if self.qk_dim < self.partial_dim:  # fused kernels want q, k and v of one width; zeros change no score
            q, k = (F.pad(t, (0, self.partial_dim - self.qk_dim)) for t in (q, k))
        some = attention(q, k, v, valid=exists, scale=self.qk_dim**-0.5).squeeze(1)
        y = self.proj(torch.cat([some, rest], -1).relu_(), exists)
        return y.unflatten(1, x.shape[1:-1])

    def deployed(self) -> nn.Module:
        """The same layer with both BatchNorms folded into their linear maps."""
        out = copy.deepcopy(self).eval()
        if isinstance(out.qkv, NormedLinear) and isinstance(out.proj, NormedLinear):
            out.qkv, out.proj = FoldedLinear(out.qkv.folded()), FoldedLinear(out.proj.folded())
        return out

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``SHSA``: 1x1 convolutions ``c`` with ``bn``; the projection sits behind a ReLU.

        Where both were fused, the one convolution that is left goes to a layer with ``folded=True``.
        """
        theirs = Released(state_dict, "the authors' SHSA")
        out = theirs.renamed(
            {
                r"pre_norm\.(weight|bias)": r"pre_norm.\1",
                r"(qkv|proj)\.(?:1\.)?c\.weight": lambda match, value: {f"{match[1]}.linear.weight": value.flatten(1)},
                r"(qkv|proj)\.(?:1\.)?weight": lambda match, value: {f"{match[1]}.linear.weight": value.flatten(1)},
                r"(qkv|proj)\.(?:1\.)?bias": r"\1.linear.bias",
                r"(qkv|proj)\.(?:1\.)?bn\.(weight|bias|running_mean|running_var|num_batches_tracked)": r"\1.norm.\2",
            }
        )
        return theirs.close(out)
