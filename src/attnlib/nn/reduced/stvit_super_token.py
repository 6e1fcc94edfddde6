"""Super token attention of STViT: tokens gather in super tokens, super tokens attend, and what they say goes back.

Huang et al., 2022, "Vision Transformer with Super Token Sampling", arXiv 2211.11167. The map is cut into cells of
``h x w`` tokens with one super token each, the mean of its cell at first. A token belongs to the nine super tokens
around it, softly,

    ``Q = softmax_9(x N9(S)^T C^-1/2)``,  ``S = Q^T x / (1^T Q)``

once or several times by turns. Then ``S' = MHSA(S)`` and ``y = Q N9(S')``: attention to the whole map at the cost of a
small one, the association twice and the attention in between. Cells of one token are plain multi-head attention.

As in the authors' code, the association carries no gradient (``detach``), and at the border of the map the super tokens
that are not there take their share of the softmax, as zeros (``border="zeros"``); ``border="mask"`` leaves them out.

Differs from that code: a map that cells do not divide is padded with tokens that are in no mean and no sum, unless
``pad="zeros"`` lets zeros take part as theirs do; the association is computed in float32 also beside half precision,
where theirs divides by numbers that may be zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_grid, check_int, to_tuple
from ...grids import block_windows, crop_grid, pad_to_multiple, unblock_windows
from ...masks import Mask
from ...ops import attention
from ...ops._dispatch import wants_gradient, watched
from ...types import Traits, exactly, stats_dtype
from ..base import Mechanism
from ..layers import DepthwiseConv, flat_valid, head_dim_of, merge_heads, split_heads, zero_invalid
from ..registry import register
from ..released import Released, Rule

BORDERS = ("zeros", "mask")
REFINES = ("attention", "conv", "none")


def _read(s: Tensor) -> Tensor:
    height, width = s.shape[1:3]
    around = F.pad(s, (0, 0, 1, 1, 1, 1))
    return torch.stack([around[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], 3)


def _write(t: Tensor) -> Tensor:
    batch, height, width, _, channels = t.shape
    out = t.new_zeros(batch, height + 2, width + 2, channels)
    for slot in range(9):
        i, j = divmod(slot, 3)
        out[:, i : i + height, j : j + width] += t[:, :, :, slot]
    return out[:, 1:-1, 1:-1]


class _Neighbours(torch.autograd.Function):
    """Reading of nine cells; its gradient is their writing, where slices would fill the map with zeros nine times."""

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        return _read(s)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return gathered(grad)


class _Gathered(torch.autograd.Function):
    """Writing to nine cells; its gradient is their reading."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return _write(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return neighbours(grad)


def _plainly() -> bool:
    return torch.compiler.is_compiling() or watched()


def neighbours(s: Tensor) -> Tensor:
    """Each cell and the eight around it, row by row, zeros beyond the border: (B, h, w, C) -> (B, h, w, 9, C)."""
    return _Neighbours.apply(s) if wants_gradient((s,)) and not _plainly() else _read(s)


def gathered(t: Tensor) -> Tensor:
    """What cells hand to their nine neighbours, added up where it arrives: (B, h, w, 9, C) -> (B, h, w, C).

    The transpose of :func:`neighbours`.
    """
    if not _plainly():
        return _Gathered.apply(t) if wants_gradient((t,)) else _write(t)
    height, width = t.shape[1:3]
    around = F.pad(t, (0, 0, 0, 0, 1, 1, 1, 1))
    parts = [around[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width, 3 * i + j] for i in range(3) for j in range(3)]
    return torch.stack(parts).sum(0)


@register("stvit-super-token", "super-token-attention", "sta")
class SuperTokenAttention(Mechanism):
    """Attention among super tokens, which tokens are gathered in and read from with the same weights, on images.

    Args:
        dim: width of ``x``.
        num_heads: heads of the attention among super tokens; must divide ``dim``.
        stoken_size: sides of a cell, one number or two. With 1 this is plain attention.
        n_iter: how often tokens are associated with super tokens.
        border: what a neighbour beyond the border of the map is to a token: ``"zeros"``, a super token of zeros that
            takes part of its weight, as in the authors' models; ``"mask"``, nothing.
        detach: no gradient through the association, as in the authors' code.
        refine: what is done to super tokens: ``"attention"``, ``"conv"`` (1 x 1, depthwise 5 x 5, 1 x 1) or ``"none"``.
        qkv_bias: bias of the query, key and value projection.
        scale: of the scores among super tokens; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of what attention among super tokens gives, in training.
        pad: of maps that cells do not divide: ``"mask"`` adds tokens that do not exist at the bottom and on the right,
            ``"zeros"`` zeros that take part, as theirs.

    Reference: Huang et al., 2022, arXiv 2211.11167, section 3.2.

    >>> SuperTokenAttention(dim=16, num_heads=2, stoken_size=4)(torch.randn(2, 8, 12, 16)).shape
    torch.Size([2, 8, 12, 16])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), mask=True, work={"N": 2}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        stoken_size: int | Sequence[int] = 8,
        n_iter: int = 1,
        border: str = "zeros",
        detach: bool = True,
        refine: str = "attention",
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
    ):
        super().__init__(dim)
        check_choice("border", border, BORDERS)
        check_choice("refine", refine, REFINES)
        check_choice("pad", pad, ("mask", "zeros"))
        self.pad, self.border, self.refine = pad, border, refine
        self.detach = check_flag("detach", detach)
        self.stoken_size = check_grid("stoken_size", to_tuple("stoken_size", stoken_size, 2))
        self.n_iter = check_int("n_iter", n_iter, least=1)
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.scale = head_dim_of(dim, num_heads) ** -0.5 if scale is None else scale
        if refine == "attention":
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
            self.proj = nn.Linear(dim, dim)
            self.proj_drop = nn.Dropout(proj_drop)
        elif refine == "conv":
            self.before, self.conv, self.proj = nn.Linear(dim, dim), DepthwiseConv(dim, 5), nn.Linear(dim, dim)

    @property
    def traits(self) -> Traits:
        alone = max(self.stoken_size) == 1
        stopped = self.detach and not alone
        work = {"N": 2 if self.refine == "attention" else 1}
        return self.class_traits.but(
            mask=alone and self.refine == "attention", permutation_equivariant=alone and self.refine != "conv",
            gradient="stopped" if stopped else "exact", work=work,
        )  # fmt: skip

    def _refined(self, s: Tensor, exists: Tensor | None, mask: Mask | None = None) -> Tensor:
        """Super tokens (B, h, w, C) that have read one another."""
        if self.refine == "none":
            return s
        if self.refine == "conv":
            return self.proj(self.conv(zero_invalid(self.before(s), exists)))
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(s).chunk(3, -1))
        drop = self.attn_drop if self.training else 0.0
        out = attention(q, k, v, mask=mask, valid=flat_valid(exists), scale=self.scale, dropout_p=drop)
        return self.proj_drop(self.proj(merge_heads(out, s.shape[1:-1])))

    def _weights(self, cells: Tensor, s: Tensor, valid: Tensor | None, exists: Tensor | None) -> Tensor:
        """(B, h, w, 9, S): of the nine super tokens around for each token; the short axis is not the last (faster)."""
        scores = (neighbours(s) * self.dim**-0.5) @ cells.mT
        if self.border == "mask":
            there = cells.new_ones(*s.shape[:-1], 1) if exists is None else exists.unsqueeze(-1).to(cells.dtype)
            reached = neighbours(there) > 0
            reached = reached | (torch.arange(9, device=s.device) == 4).unsqueeze(-1)  # no row without any
            scores = scores.masked_fill(~reached, float("-inf"))
        weights = scores.softmax(-2)
        return weights if valid is None else weights * valid.unsqueeze(-2)

    def _associated(self, cells: Tensor, valid: Tensor | None, exists: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weights (B, h, w, 9, S) of cells (B, h, w, S, C), and how much each super token is given (B, h, w, 1)."""
        s = cells.mean(-2)
        if valid is not None:
            s = s * (cells.shape[-2] / valid.sum(-1, keepdim=True).clamp(min=1))
        for left in reversed(range(self.n_iter)):
            weights = self._weights(cells, s, valid, exists)
            mass = gathered(weights.sum(-1, keepdim=True)) + 1e-12
            if left:
                s = zero_invalid(gathered(weights @ cells) / mass, exists)
        return weights, mass

    def _there(self, x: Tensor, valid: Tensor | None) -> Tensor | None:
        """(B, h, w, S) boolean: which tokens of cells count; ``None``: all."""
        padded = any(n % side for n, side in zip(x.shape[1:3], self.stoken_size, strict=True))
        if valid is None and not (padded and self.pad == "mask"):
            return None
        here = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if valid is None else valid
        here = pad_to_multiple(here.unsqueeze(-1), self.stoken_size, float(self.pad == "zeros"))
        return block_windows(here, self.stoken_size).flatten(3)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, mask: Mask | None = None
    ) -> Tensor:
        if max(self.stoken_size) == 1:
            return self._refined(x, valid, mask)
        high, grid = stats_dtype(x.dtype), x.shape[1:3]
        with exactly(x):
            cells = block_windows(pad_to_multiple(x, self.stoken_size), self.stoken_size).flatten(3, 4).to(high)
            exists, there = None, self._there(x, valid)
            if there is not None:
                exists = None if valid is None else there.any(-1)  # padding leaves no cell without a token
                there = there.to(high)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
                weights, mass = self._associated(cells, there, exists)
            s = zero_invalid(gathered(weights @ cells) / mass, exists).to(x.dtype)
        s = self._refined(s, exists)
        with exactly(x):
            y = weights.mT @ neighbours(zero_invalid(s, exists).to(high))
            return crop_grid(unblock_windows(y.unflatten(3, self.stoken_size)), grid).to(s.dtype)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Tensor]:
        """From the authors' ``StokenAttention``.

        Args:
            state_dict: ``stoken_refine.*``, ``unfold.weights``, ``fold.weights``.
            num_heads: of the attention among super tokens, whose projections lie head by head there.
        """
        theirs = Released(state_dict, "STViT's StokenAttention")
        theirs.leave(r"(un)?fold\.weights", because="constants")
        if "stoken_refine.0.weight" in theirs:
            names = {"0": "before", "1": "conv", "2": "proj"}
            out: dict[str, Tensor] = {}
            for match, value in theirs.matching(r"stoken_refine\.([012])\.(weight|bias)"):
                flat = value.dim() == 4 and match[1] != "1"
                out[f"{names[match[1]]}.{match[2]}"] = value.flatten(1) if flat else value
            return theirs.close(out)
        if num_heads is None:
            raise ValueError("num_heads is needed to split the authors' projections, which lie head by head")
        heads = check_int("num_heads", num_heads, least=1)
        rules: dict[str, Rule] = {
            r"stoken_refine\.qkv\.(weight|bias)": lambda match, value: {
                f"qkv.{match[1]}": value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).flatten(1)
                if value.dim() > 1
                else value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten()
            },
            r"stoken_refine\.proj\.(weight|bias)": lambda match, value: {
                f"proj.{match[1]}": value.flatten(1) if value.dim() > 1 else value
            },
        }
        return theirs.close(cast(dict[str, Tensor], theirs.renamed(rules)))
