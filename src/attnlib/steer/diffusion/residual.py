"""Attention that is added to features of a pretrained denoiser, and adds nothing before it is trained."""

from __future__ import annotations

from torch import Tensor, nn

from ...nn.dense.softmax_attention import SoftmaxAttention


class ResidualAttention(nn.Module):
    """``W_o MHA(LN x)`` with ``W_o = 0`` at first: what is to be added to tokens x (B, N, C).

    Args:
        dim: width of the tokens.
        num_heads: heads.

    >>> import torch
    >>> ResidualAttention(4, 2)(torch.randn(1, 3, 4)).any().item()
    False
    """

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = SoftmaxAttention(dim, num_heads)
        nn.init.zeros_(self.attention.proj.weight)
        if self.attention.proj.bias is not None:
            nn.init.zeros_(self.attention.proj.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, N, C), and (B, N) which tokens there are, -> (B, N, C)."""
        added: Tensor = self.attention(self.norm(x), valid=valid)
        return added
