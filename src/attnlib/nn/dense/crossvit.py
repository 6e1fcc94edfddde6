"""CrossViT's exchange: two streams of tokens talk through their class tokens alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_ints
from ..base import Fusion
from ..layers import DropPath, zero_invalid
from ..released import Released
from .softmax_attention import SoftmaxAttention

Norm = functools.partial(nn.LayerNorm, eps=1e-6)


class ClassTokenExchange(Fusion):
    """The class token of each stream reads the patches of the other one, and comes back.

    For stream a with partner b, tokens ``[cls; patches]``:

        c = there(cls_a),   z = norm([c; patches_b]),   c' = c + attention(z_0, z),   cls_a <- back(c')

    ``there`` and ``back`` are LayerNorm, GELU and a linear map, from the width of a to that of b and back. Both streams
    read what the other was before; the patches are handed on as they are. One query: the cost is linear in tokens.

    Args:
        dims: width of both streams.
        num_heads: heads of the attention in each width.
        drop_path: stochastic depth of the attention.

    Shapes: (B, 1 + N_a, C_a), (B, 1 + N_b, C_b) -> the same. ``valid`` has a (B, 1 + N) per stream; tokens
    that do not exist are zeros, and patches of them are not read.

    Raises:
        ValueError: not two widths and two numbers of heads, or heads that do not divide their width; streams that are
            not two batches of one size.

    Reference: Chen et al., 2021, "CrossViT", arXiv 2103.14899.

    >>> a, b = ClassTokenExchange((8, 12), (2, 3))(torch.randn(2, 5, 8), torch.randn(2, 10, 12))
    >>> a.shape, b.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 10, 12]))
    """

    slug = "crossvit"

    def __init__(self, dims: Sequence[int], num_heads: Sequence[int] = (6, 6), drop_path: float = 0.0):
        super().__init__()
        self.dims, heads = check_ints("dims", dims, least=1), check_ints("num_heads", num_heads, least=1)
        if len(self.dims) != 2 or len(heads) != 2:
            raise ValueError(f"dims={self.dims} and num_heads={heads} must have one number for each of two streams")
        own, other = self.dims, self.dims[::-1]
        self.there = nn.ModuleList(narrowed(a, b) for a, b in zip(own, other, strict=True))
        self.norm = nn.ModuleList(Norm(b) for b in other)
        self.attn = nn.ModuleList(SoftmaxAttention(b, h) for b, h in zip(other, heads[::-1], strict=True))
        self.back = nn.ModuleList(narrowed(b, a) for a, b in zip(own, other, strict=True))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, *streams: Tensor, valid: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
        """Both streams, with new class tokens."""
        shapes = [tuple(x.shape) for x in streams]
        if (
            len(shapes) != 2
            or any(len(s) != 3 or s[0] != shapes[0][0] or s[1] < 1 for s in shapes)
            or tuple(s[2] for s in shapes) != self.dims
        ):
            raise ValueError(f"streams must be two (B, 1 + N, C) of one batch with C={self.dims}, got {shapes}")
        held = (None, None) if valid is None else valid
        streams = tuple(zero_invalid(x, exists) for x, exists in zip(streams, held, strict=True))
        out = []
        for i, (x, other) in enumerate(zip(streams, streams[::-1], strict=True)):
            exists = held[1 - i]
            if exists is not None:
                exists = F.pad(exists[:, 1:], (1, 0), value=True)
            c = self.there[i](x[:, :1])
            z = self.norm[i](torch.cat([c, other[:, 1:]], 1))
            c = c + self.drop_path(self.attn[i](z[:, :1], z, context_valid=exists))
            out.append(torch.cat([self.back[i](c), x[:, 1:]], 1))
        return tuple(out)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From what the authors' ``MultiScaleBlock`` has beside its blocks."""
        theirs = Released(state_dict, "the authors' MultiScaleBlock")
        return theirs.close(
            theirs.renamed(
                {
                    r"projs\.(\d)\.(\d)\.(weight|bias)": r"there.\1.\2.\3",
                    r"revert_projs\.(\d)\.(\d)\.(weight|bias)": r"back.\1.\2.\3",
                    r"fusion\.(\d)\.norm1\.(weight|bias)": r"norm.\1.\2",
                    r"fusion\.(\d)\.attn\.(?:w([qkv])|(proj))\.(weight|bias)": lambda m, value: {
                        f"attn.{m[1]}.{m[2] or m[3]}.{m[4]}": value
                    },
                }
            )
        )


def narrowed(dim: int, out_dim: int) -> nn.Sequential:
    """From the width of one branch to that of the other: norm, GELU, linear map."""
    return nn.Sequential(Norm(dim), nn.GELU(), nn.Linear(dim, out_dim))
