"""Subspace attention of compact networks: groups of channels, each with one map over the pixels.

Saini et al., 2020, "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
arXiv 2006.15102. The channels are cut into g subspaces; with ``u = maxpool_3(scale * x + shift)`` the map of a subspace
of N pixels is

    ``A = softmax_n(w u_n)``,  ``y = (1 + A) x``,

one number per pixel for all its channels. The release has BatchNorm and ReLU after ``scale * x + shift`` and after
``w u + b``; the paper's equation has neither.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_divides, check_flag
from ...ops.modulation import grid_softmax
from ...types import Traits, stats_dtype
from ..layers import batch_norm_affine, masked_batch_norm, zero_invalid
from ..registry import register
from ..released import Released
from .base import Gate


@register("ulsam")
class SubspaceAttention(Gate):
    """``y = (1 + A) x`` with one map A per subspace; shapes x and y (B, *grid, C).

    Softmax, sum and product are in float32 whatever the map is in, and rounded once: ``1 + 1 / N`` is not 1 in half
    precision. ``attnlib.deploy`` folds the norms. A map whose scores are all negative is uniform, and passes no
    gradient to the score (ReLU before the softmax, as released).

    Args:
        dim: width C.
        num_splits: g, the subspaces; must divide ``dim``.
        norm: BatchNorm and ReLU, as the release has them: ``5 C + 3 g`` parameters. False: the paper's equation,
            ``2 C`` parameters.

    What differs from the authors' code: their unused arguments ``nout``, ``h`` and ``w`` do not exist; importing it
    sets the default tensor type to that of CUDA; all subspaces are computed together. Pixels that do not exist enter no
    maximum, softmax or norm. Maps of one pixel and one sample cannot be normed in training and are refused.

    Reference: Saini et al., 2020, arXiv 2006.15102, section 3.

    >>> module = SubspaceAttention(dim=512)
    >>> sum(p.numel() for p in module.parameters()), module(torch.randn(2, 3, 3, 512)).shape
    (2572, torch.Size([2, 3, 3, 512]))
    """

    class_traits = Gate.class_traits.but(permutation_equivariant=False)

    def __init__(self, dim: int, num_splits: int = 4, norm: bool = True):
        super().__init__(dim)
        check_flag("norm", norm)
        check_divides("num_splits", num_splits, "dim", dim)
        self.num_splits, self.norm = num_splits, norm
        width = dim // num_splits
        # As convolutions begin: of one input each, and of the channels of a subspace.
        self.scale = nn.Parameter(torch.empty(dim).uniform_(-1, 1))
        self.score = nn.Parameter(torch.empty(num_splits, width).uniform_(-(width**-0.5), width**-0.5))
        self.shift = nn.Parameter(torch.empty(dim).uniform_(-1, 1)) if norm else None
        self.bias = nn.Parameter(torch.empty(num_splits).uniform_(-(width**-0.5), width**-0.5)) if norm else None
        self.norms = nn.ModuleList(nn.BatchNorm2d(n, momentum=0.9) for n in (dim, num_splits)) if norm else None

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=self.norms is None or not self.training)

    def maps(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """A: (B, *grid, num_splits) in float32, each summing to one over the pixels; absent pixels of x are zeros."""
        if self.norms is not None and self.training and x.shape[:-1].numel() == 1:
            raise ValueError("x must hold more than one pixel or sample to be normed in training, got one")
        u = x * self.scale if self.shift is None else torch.addcmul(self.shift, x, self.scale)
        u = self._normed(0, u, valid)
        rank = x.dim() - 2
        if self.norm:
            u = zero_invalid(u, valid)  # behind a ReLU zero never is the larger one
        elif valid is not None:
            u = u.masked_fill(~valid.unsqueeze(-1), torch.finfo(u.dtype).min)
        pooling: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        u = zero_invalid(pooling(u.movedim(-1, 1), 3, 1, 1).movedim(1, -1), valid)
        scores = (u.unflatten(-1, (self.num_splits, -1)) * self.score).sum(-1)
        scores = scores if self.bias is None else scores + self.bias
        return grid_softmax(self._normed(1, scores, valid), valid=valid)

    def _normed(self, which: int, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.norms is not None:
            norm = self.norms[which]
            assert isinstance(norm, nn.BatchNorm2d)
            x = masked_batch_norm(norm, x, valid)
        return x.relu() if self.norm else x

    def _gate(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return 1 + self.maps(x, valid).repeat_interleave(self.dim // self.num_splits, -1)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        gate = 1 + self.maps(x, valid).unsqueeze(-1)
        parts = x.to(stats_dtype(x.dtype)).unflatten(-1, (self.num_splits, -1))
        return (parts * gate).flatten(-2).to(x.dtype)

    @torch.no_grad()
    def deployed(self) -> SubspaceAttention:
        """The same with both norms folded into scales and shifts."""
        out = copy.deepcopy(self).eval()
        if out.norms is not None:
            assert out.shift is not None and out.bias is not None
            first, second = (n for n in out.norms if isinstance(n, nn.BatchNorm2d))
            scale, shift = batch_norm_affine(first)
            out.scale.mul_(scale)
            out.shift.mul_(scale).add_(shift)
            scale, shift = batch_norm_affine(second)
            out.score.mul_(scale.unsqueeze(-1))
            out.bias.mul_(scale).add_(shift)
            out.norms = None
        return out

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``ULSAM``, whose subspaces are modules of their own."""
        theirs = Released(state_dict, "the authors' ULSAM")
        parts: dict[str, dict[int, Tensor]] = {}
        kinds = "weight|bias|running_mean|running_var|num_batches_tracked"
        names = {"conv_dws.weight": "scale", "conv_dws.bias": "shift"}
        names |= {"conv_point.weight": "score", "conv_point.bias": "bias"}
        for match, value in theirs.matching(rf"subspaces\.(\d+)\.((?:conv|bn)_(?:dws|point))\.({kinds})"):
            ours = names.get(f"{match[2]}.{match[3]}", f"norms.{0 if match[2] == 'bn_dws' else 1}.{match[3]}")
            parts.setdefault(ours, {})[int(match[1])] = value
        out: dict[str, Tensor] = {}
        for name, held in parts.items():
            if sorted(held) != list(range(len(held))):
                raise ValueError(f"state_dict has {name} of the subspaces {sorted(held)}; some are missing")
            rows = [held[i] for i in range(len(held))]
            if name.endswith("num_batches_tracked"):
                out[name] = rows[0]
            elif name == "score":
                out[name] = torch.cat([row.flatten(1) for row in rows])
            else:
                out[name] = torch.cat([row.flatten() for row in rows])
        return theirs.close(out)
