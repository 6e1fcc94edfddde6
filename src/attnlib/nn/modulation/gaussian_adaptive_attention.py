"""Gaussian adaptive attention (Ioannides et al., 2024): values weighed by how near they lie to a learned offset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...types import Output, State, Traits, check_choice, check_valid, stats_dtype
from ..base import Mechanism
from ..frame import Stream
from ..layers import flat_valid, zero_invalid
from ..registry import register
from ..released import Released, stacked

AXES = ("features", "tokens", "batch")


@register("gaussian-adaptive-attention", "gaam")
class GaussianAdaptiveAttention(Mechanism):
    """Every value is multiplied by a product of Gaussians around the mean of its chunk; no queries, no keys.

    An axis of length L is cut into H chunks of ``floor(L / H)``, one per head; the last takes the remainder. In a chunk
    with mean ``mu`` and unbiased variance ``s^2 + eps``, with G learned offsets ``d_g`` and widths ``c_g`` per head::

        w = prod_g exp(-((x - mu - d_g) / s)^2 / (2 c_g^2)),  w <- w / sum w over the chunk,  y = w x

    The product of G Gaussians is one Gaussian, of precision ``a = sum_g 1 / (2 c_g^2)`` around ``mu + b / a`` with
    ``b = sum_g d_g / (2 c_g^2)``; its normalisation is a softmax of ``-a (x - mu - b / a)^2 / s^2``. That is what is
    computed: it costs the same for every G and cannot underflow.

    Over ``"features"`` a token reads only itself: tokens do not mix, which makes it causal and lets it stream. Over
    ``"tokens"`` every channel is weighed along the whole sequence, over one axis of a grid along its rows or columns,
    over ``"batch"`` along the samples.

    Args:
        dim: width of ``x``.
        num_heads: chunks of the axis.
        num_gaussians: G.
        axis: ``"features"``, ``"tokens"`` (all tokens of the grid, flattened), ``"batch"``, or an axis of ``x`` as the
            authors number it: 0 for the batch, 1 to r for the grid, r + 1 or -1 for the features.
        residual: ``y = x + w x``, a layer of the authors' block.
        eps: added to the variance.
        compat: ``"authors"`` computes the product of densities as it stands and clamps their sum at ``eps``.
        padding_value: with ``compat="authors"``: entries of ``x`` that equal it pass unchanged, and count as zeros in
            mean and variance.

    What differs from the authors' code, unless ``compat="authors"``: it clamps the sum of densities at 1e-8, so that
    its weights fall short of one, or vanish, where the densities are small; here they always sum to one. Tokens that do
    not exist leave mean and variance (theirs knows a padding value instead, whose zeros still count), and chunks over
    tokens are made of the tokens that exist. ``eps`` reaches the variance (theirs passes it as another argument).
    Chunks of one element, whose variance does not exist, are refused; where absent tokens leave a head a single one, it
    keeps weight 1.

    Reference: Ioannides et al., 2024, arXiv 2401.11143.

    >>> GaussianAdaptiveAttention(dim=8, num_heads=2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_gaussians: int = 5,
        axis: str | int = "features",
        residual: bool = False,
        eps: float = 1e-8,
        compat: str | None = None,
        padding_value: float | None = None,
    ):
        super().__init__(dim)
        axis = {-1: "features", 0: "batch"}.get(axis, axis) if isinstance(axis, int) else axis
        if isinstance(axis, str):
            check_choice("axis", axis, AXES)
        elif not -5 <= axis <= 4:
            raise ValueError(f"axis={axis} is not possible; x has axes 0 (batch) to 4 at most, or {AXES}")
        check_choice("compat", compat, (None, "authors"))
        if padding_value is not None and compat != "authors":
            raise ValueError(
                f"padding_value={padding_value} needs compat='authors'; valid= says which tokens exist without it"
            )
        self.compat, self.padding_value = compat, padding_value
        if num_heads < 1 or num_gaussians < 1:
            raise ValueError(
                f"num_heads and num_gaussians must be at least 1, got num_heads={num_heads}, "
                f"num_gaussians={num_gaussians}"
            )
        if axis == "features" and dim < 2 * num_heads:
            raise ValueError(
                f"num_heads={num_heads} leaves chunks of fewer than two of the dim={dim} features, whose variance does "
                f"not exist; possible: 1 to {dim // 2}"
            )
        self.num_heads, self.axis, self.residual, self.eps = num_heads, axis, residual, eps
        self.offset = nn.Parameter(torch.zeros(num_heads, num_gaussians))
        self.width = nn.Parameter(torch.randn(num_heads, num_gaussians).exp())

    @property
    def traits(self) -> Traits:
        alone = self.axis == "features"
        ranks, anywhere = self.class_traits.grid_ranks, alone or self.axis == "batch"
        if isinstance(self.axis, int):
            ranks = frozenset(r for r in ranks if -r - 2 <= self.axis <= r + 1)
        return self.class_traits.but(
            patterns=frozenset({"causal-self" if alone else "noncausal-self"}),
            grid_ranks=ranks,
            streaming=alone,
            batch_independent=self.axis != "batch" and not (isinstance(self.axis, int) and self.axis < -2),
            permutation_equivariant=anywhere or (self.axis == "tokens" and self.num_heads == 1),
        )

    def gaussians(self) -> tuple[Tensor, Tensor]:
        """The one Gaussian that each head amounts to: precision ``a`` and offset ``b / a`` of its centre, (H,) each."""
        share = 0.5 / self.width.square()
        precision = share.sum(1)
        return precision, (share * self.offset).sum(1) / precision

    def _chunk(self, x: Tensor, head: int, axis: int, keep: Tensor | None = None) -> Tensor:
        """Weights of one chunk, summing to one along ``axis``; entries outside ``keep`` take no part and get zero."""
        if self.compat == "authors":
            return self._authors_chunk(x, head, axis, keep)
        precision, centre = (t[head].to(x.dtype) for t in self.gaussians())
        if keep is None:
            centred = x - x.mean(axis, keepdim=True)
            variance = centred.square().sum(axis, keepdim=True) / (x.shape[axis] - 1)
            return (-precision * (centred - centre).square() / (variance + self.eps)).softmax(axis)
        count = keep.sum(axis, keepdim=True)
        mean = x.masked_fill(~keep, 0.0).sum(axis, keepdim=True) / count.clamp(min=1)
        centred = (x - mean).masked_fill(~keep, 0.0)
        variance = centred.square().sum(axis, keepdim=True) / (count - 1).clamp(min=1)
        score = -precision * (centred - centre).square() / (variance + self.eps)
        top = score.detach().masked_fill(~keep, float("-inf")).amax(axis, keepdim=True)
        weight = (score - torch.where(count > 0, top, 0.0)).clamp(max=0.0).exp().masked_fill(~keep, 0.0)
        return weight / torch.where(count > 0, weight.sum(axis, keepdim=True), 1.0)

    def _authors_chunk(self, x: Tensor, head: int, axis: int, keep: Tensor | None) -> Tensor:
        """The same in the authors' arithmetic: densities multiplied, their sum clamped, padding values let through."""
        padding = None if self.padding_value is None else x == self.padding_value
        seen = x if padding is None else x.masked_fill(padding, 0.0)
        if keep is None:
            mean, variance = seen.mean(axis, keepdim=True), seen.var(axis, keepdim=True)
        else:
            seen, count = seen.masked_fill(~keep, 0.0), keep.sum(axis, keepdim=True)
            mean = seen.sum(axis, keepdim=True) / count.clamp(min=1)
            centred = (seen - mean).masked_fill(~keep, 0.0)
            variance = centred.square().sum(axis, keepdim=True) / (count - 1).clamp(min=1)
            x = x.masked_fill(~keep, 0.0)
        deviation = torch.sqrt(variance + self.eps)
        density = torch.ones_like(x)
        for offset, width in zip(self.offset[head].to(x.dtype), self.width[head].to(x.dtype), strict=True):
            y = (x - (mean + offset)) / deviation
            density = density * torch.exp(-y.square() / (2 * width**2)) / torch.sqrt(2 * math.pi * width**2)
        if keep is not None:
            density = density.masked_fill(~keep, 0.0)
        weight = density / density.sum(axis, keepdim=True).clamp(min=self.eps)
        return weight if padding is None else torch.where(padding, torch.ones_like(weight), weight)

    def gate(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """The weights ``w``, to look at.

        Args:
            x: (B, *grid, C).
            valid: (B, *grid) boolean, which tokens exist.

        Returns:
            (B, *grid, C), of each head summing to one along the axis (except for ``compat``); zero where no token is.

        >>> float(GaussianAdaptiveAttention(dim=8, num_heads=1).gate(torch.randn(1, 3, 8))[0, 0].sum().round())
        1.0
        """
        check_valid("valid", valid, x.shape[:-1])
        place = self._place(x.dim())
        axis = 2 if place == "features" else 1
        # (lines, tokens of a line, C): what is weighed lies along the last axis or the one before it
        lines = x if isinstance(place, str) else x.movedim(place, -2)
        flat = (lines.flatten(1, -2) if isinstance(place, str) else lines.flatten(0, -3)).to(stats_dtype(x.dtype))
        length = flat.shape[axis]
        if length < 2 * self.num_heads:
            raise ValueError(
                f"x has {length} tokens for num_heads={self.num_heads}; with axis={self.axis!r} every head needs at "
                f"least two, so at least {2 * self.num_heads}"
            )
        exists = valid
        if valid is not None:
            exists = valid.flatten(1) if isinstance(place, str) else valid.movedim(place, -1).flatten(0, -2)
        if axis == 2 or exists is None:
            flat = zero_invalid(flat, exists)
            size = length // self.num_heads
            starts = [head * size for head in range(self.num_heads)]
            parts = [
                self._chunk(flat.narrow(axis, at, length - at if head == self.num_heads - 1 else size), head, axis)
                for head, at in enumerate(starts)
            ]
            total = torch.cat(parts, axis)
        else:
            size_of = (exists.sum(1, keepdim=True) // self.num_heads).clamp(min=1)
            owner = ((exists.long().cumsum(1) - 1).clamp(min=0) // size_of).clamp(max=self.num_heads - 1)
            total = torch.zeros_like(flat)
            for head in range(self.num_heads):
                total = total + self._chunk(flat, head, 1, (exists & (owner == head))[..., None])
        weights = total.view(lines.shape)
        return zero_invalid(weights if isinstance(place, str) else weights.movedim(-2, place), valid)

    def _place(self, dims: int) -> str | int:
        """``"features"``, ``"tokens"``, or the number of the axis in an ``x`` of so many dimensions."""
        if isinstance(self.axis, str):
            return 0 if self.axis == "batch" else self.axis
        place = self.axis % dims
        return "features" if place == dims - 1 else place

    def importance_factor(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """How much each feature is let through: the mean weight, brought to the range from 0 to 1.

        Args:
            x: (B, *grid, C).
            valid: (B, *grid) boolean; the mean is over existing tokens.

        Returns:
            (C,) ``(w - min w) / (max w - min w)`` with ``w`` averaged over samples and tokens; zeros when all agree.
        """
        weights = self.gate(x, valid).detach().flatten(0, -2)
        mean = weights.mean(0) if valid is None else weights.sum(0) / valid.sum().clamp(min=1)
        spread = mean.max() - mean.min()
        return torch.where(spread > 0, (mean - mean.min()) / torch.where(spread > 0, spread, 1.0), 0.0)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        x = zero_invalid(x, valid)
        y = x * self.gate(x, valid).to(x.dtype)
        # nothing is remembered but how far the sequence has come
        new = Stream(x.flatten(1, -2), flat_valid(valid), state, "state" in returns).next()
        return Output(x + y if self.residual else y, state=new)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``MultiHeadGaussianAdaptiveAttention``, one ``GaussianAdaptiveAttention`` of it (a single
        head), or ``GaussianBlock`` for :class:`GaussianBlock`.
        """
        theirs = Released(state_dict, "MultiHeadGaussianAdaptiveAttention, GaussianAdaptiveAttention or GaussianBlock")
        if "c" in theirs:
            return theirs.close({"offset": theirs.take("mean_offsets")[None], "width": theirs.take("c")[None]})
        heads: dict[str, dict[int, Tensor]] = {}
        for name, ours in (("mean_offsets", "offset"), ("c", "width")):
            for match, value in theirs.matching(rf"((?:layers\.\d+\.)?)attention_heads\.(\d+)\.{name}"):
                heads.setdefault(match[1] + ours, {})[int(match[2])] = value
        for key, rows in heads.items():
            if sorted(rows) != list(range(len(rows))):
                raise ValueError(f"state_dict has {key} of the heads {sorted(rows)}; some are missing")
        return theirs.close({key: stacked(key, [rows[i] for i in sorted(rows)]) for key, rows in heads.items()})


class GaussianBlock(nn.Module):
    """Layers of :class:`GaussianAdaptiveAttention` with residuals, as put on top of a frozen encoder.

    Args:
        dim: width of ``x``.
        num_heads, num_gaussians, axes: one per layer.
        settings: of every layer: ``eps``, ``compat``, ``padding_value``.

    Reference: Ioannides et al., 2024, arXiv 2401.11143.

    >>> sum(p.numel() for p in GaussianBlock(16).parameters())
    120
    """

    def __init__(
        self,
        dim: int,
        num_heads: Sequence[int] = (4, 4, 4),
        num_gaussians: Sequence[int] = (5, 5, 5),
        axes: Sequence[str | int] | None = None,
        **settings: Any,
    ):
        super().__init__()
        axes = ["features" for _ in num_heads] if axes is None else axes
        if not len(num_heads) == len(num_gaussians) == len(axes):
            raise ValueError(
                f"num_heads, num_gaussians and axes must name as many layers, got {len(num_heads)}, "
                f"{len(num_gaussians)} and {len(axes)}"
            )
        self.layers = nn.ModuleList(
            GaussianAdaptiveAttention(dim, h, g, a, residual=True, **settings)
            for h, g, a in zip(num_heads, num_gaussians, axes, strict=True)
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, C) -> the same shape."""
        x = zero_invalid(x, valid)
        for layer in self.layers:
            x = layer(x, valid=valid)
        return x
