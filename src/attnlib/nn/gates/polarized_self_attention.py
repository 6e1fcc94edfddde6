"""Polarized self-attention: one gate that is constant over space, one that is constant over channels.

Liu et al., 2021, "Polarized Self-Attention: Towards High-quality Pixel-wise Regression", arXiv 2107.00782. With
``c = C / 2`` inner channels, for N pixels ``x_n`` of C channels,

    ``z = W_v sum_n softmax_n(w_q x_n) x_n``,     ``A_ch = sigmoid(up(z))``   (C numbers),
    ``g = W_q' mean_n x_n``,  ``t_n = W_v' x_n``,  ``A_sp``                    (one number per pixel),

where the release has two presets that differ in more than their order:

- ``"parallel"`` (``PSA_p``): ``up`` is one linear map, ``A_sp = sigmoid(softmax_n(g t_n))``, ``y = (A_ch + A_sp) x``;
- ``"sequential"`` (``PSA_s``): ``up = W_2 relu(LayerNorm(W_1 z))`` through ``c / 4`` channels,
  ``A_sp = sigmoid(g softmax_n(t_n))`` with a softmax of every channel of ``t``, ``y = A_sp(u) u`` with ``u = A_ch x``.

Pixels are pooled before they are projected, which is the same by linearity: where the softmax acts on scores or on the
pooled vector, no map of ``c`` channels is ever built.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...checks import check_choice
from ...ops.modulation import grid_softmax, pool, weighted_pool
from ..layers import plain
from ..registry import register
from ..released import Released, Rule
from .base import Gate

PRESETS = ("parallel", "sequential")
SPATIAL = {"parallel": "scores", "sequential": "keys"}


@register("polarized-self-attention")
class PolarizedSelfAttention(Gate):
    """Channel gate and spatial gate; shapes x and y (B, *grid, C). No residual: it stands inside a residual block.

    Permuting pixels permutes the output. For many pixels the softmax over scores is nearly zero everywhere, so that the
    spatial gate of ``"parallel"``, which lies in (0.5, 0.731), is nearly flat.

    Args:
        dim: width C, even; ``"sequential"`` needs at least 8.
        preset: ``"parallel"``: both gates of x, added, ``2 C^2 + C`` parameters; ``"sequential"``: the spatial gate of
            the map that the channel gate has left, with a bottleneck.
        spatial_softmax: what the spatial gate normalises: ``"scores"``: the products, over pixels; ``"keys"``: every
            channel of the keys, over pixels; ``"query"``: the pooled query, over channels, as the paper's equation can
            be read. By default that of the preset.

    What differs from the authors' code: strides and other kernels than 1 do not exist, since their gates would not fit
    the map; pixels that do not exist take no part in any softmax or mean; other combinations of preset and softmax.

    Reference: Liu et al., 2021, arXiv 2107.00782, section 3.

    >>> import torch
    >>> module = PolarizedSelfAttention(dim=64)
    >>> sum(p.numel() for p in module.parameters()), module(torch.randn(2, 4, 5, 64)).shape
    (8256, torch.Size([2, 4, 5, 64]))
    """

    def __init__(self, dim: int, preset: str = "parallel", spatial_softmax: str | None = None):
        super().__init__(dim)
        check_choice("preset", preset, PRESETS)
        self.preset, self.spatial_softmax = preset, SPATIAL[preset] if spatial_softmax is None else spatial_softmax
        check_choice("spatial_softmax", self.spatial_softmax, ("scores", "keys", "query"))
        if dim % 2 or (preset == "sequential" and dim < 8):
            raise ValueError(f"dim must be even, and at least 8 with preset='sequential', got dim={dim}")
        inner = dim // 2
        self.channel_q, self.channel_v = nn.Linear(dim, 1, bias=False), nn.Linear(dim, inner, bias=False)
        self.spatial_q, self.spatial_v = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        for layer in (self.channel_q, self.channel_v, self.spatial_q, self.spatial_v):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        if preset == "parallel":
            self.up: nn.Module = nn.Linear(inner, dim, bias=False)
        else:
            middle = inner // 4
            self.up = nn.Sequential(
                nn.Linear(inner, middle), nn.LayerNorm(middle), nn.ReLU(), nn.Linear(middle, dim)
            )  # fmt: skip

    def channel_gate(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *ones, C), in (0, 1); of a map whose absent pixels are zeros."""
        pooled = weighted_pool(x, self.channel_q(x), valid=valid).squeeze(1)
        return self.up(self.channel_v(pooled)).sigmoid().view(x.shape[0], *[1] * (x.dim() - 2), self.dim)

    def spatial_gate(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, 1), in (0, 1); of a map whose absent pixels are zeros."""
        query = self.spatial_q(pool(x, valid=valid).flatten(1, -2))  # (B, 1, c)
        if self.spatial_softmax == "keys":
            keys = grid_softmax(self.spatial_v(x), valid=valid).flatten(1, -2)
            scores = keys.to(query.dtype) @ query.transpose(1, 2)
        else:
            query = query.softmax(-1) if self.spatial_softmax == "query" else query
            if plain(self.spatial_v):
                scores = x.flatten(1, -2) @ (query @ self.spatial_v.weight).transpose(1, 2)
            else:
                scores = self.spatial_v(x).flatten(1, -2) @ query.transpose(1, 2)
        scores = scores.view(*x.shape[:-1], 1)
        return (grid_softmax(scores, valid=valid) if self.spatial_softmax == "scores" else scores).sigmoid()

    def _gate(self, x: Tensor, valid: Tensor | None) -> Tensor:
        channels = self.channel_gate(x, valid)
        if self.preset == "parallel":
            return channels + self.spatial_gate(x, valid)
        return channels * self.spatial_gate((x * channels).to(x.dtype), valid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``PSA_p`` (a linear ``conv_up``) and ``PSA_s`` (a bottleneck)."""
        theirs = Released(state_dict, "the authors' PSA_p or PSA_s")

        def flat(ours: str) -> Rule:
            return lambda match, value: {match.expand(ours): value.flatten(1) if value.dim() == 4 else value.flatten()}

        rules: dict[str, Rule] = {r"conv_up\.weight": flat("up.weight")}
        for side, ours in (("right", "channel"), ("left", "spatial")):
            rules[rf"conv_([qv])_{side}\.weight"] = flat(rf"{ours}_\1.weight")
        rules |= {r"conv_up\.([03])\.(weight|bias)": flat(r"up.\1.\2"), r"conv_up\.1\.(weight|bias)": flat(r"up.1.\1")}
        return theirs.close(theirs.renamed(rules))
