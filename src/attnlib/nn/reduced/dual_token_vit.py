"""Dual token fusion: local tokens by convolution, a small map of global ones that keep their places, and both as one.

Chu et al., 2023, "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion", arXiv 2309.12424.
On a map x and a g x g grid G of global tokens that the block before has handed on::

    L  = x + W_2 gelu(W_1 norm(dwconv(x)))                 local tokens
    D  = L, then M times: conv, half the size; then g x g  step-wise down-sampling
    A  = attention(norm(D))                                global aggregation, among g^2 tokens
    G <- alpha mlp(norm(G)) + (1 - alpha) A                place by place: position-aware
    y  = fuse(L, attention(norm(L), norm(G)))              every local token reads the global ones

Our reading: no code is published, and the equations reached us in words. What these leave open is a setting each: M,
the kernel, alpha and whether it is learned, the MLP of the global tokens, how maps come to g x g, and the fusion.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_device, check_flag, check_int, check_real, describe
from ...ops.reduced import adaptive_pool_tokens
from ...types import Output, Traits
from ..base import Mechanism
from ..dense.softmax_attention import SoftmaxAttention
from ..layers import DepthwiseConv, Mlp, PositionalConv, cell_means, resize_map, strided_valid, zero_invalid
from ..registry import register

FUSIONS = ("sum", "concat")
TOKEN_MLPS = ("mlp", "mix", "none")
RESIZES = ("mean", "bilinear")


class LocalBranch(nn.Module):
    """A ConvNeXt block: ``x + W_2 gelu(W_1 norm(dwconv(x)))``.

    Args:
        dim: width.
        kernel_size: of the depthwise convolution, odd.
        ratio: hidden width over ``dim``.
    """

    def __init__(self, dim: int, kernel_size: int = 7, ratio: float = 4.0):
        super().__init__()
        self.dwconv, self.norm, self.mlp = DepthwiseConv(dim, kernel_size), nn.LayerNorm(dim), Mlp(dim, ratio)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        return x + self.mlp(self.norm(self.dwconv(zero_invalid(x, valid))))


class TokenMix(nn.Module):
    """MLP across tokens, then across channels, each with a shortcut (MLP-Mixer).

    Args:
        tokens: how many there are.
        dim: width.
        ratio: hidden width of the second over ``dim``; the first is as wide as there are tokens.
    """

    def __init__(self, tokens: int, dim: int, ratio: float):
        super().__init__()
        self.across, self.norm, self.mlp = Mlp(tokens, 1.0), nn.LayerNorm(dim), Mlp(dim, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> the same."""
        x = x + self.across(x.mT).mT
        return x + self.mlp(self.norm(x))


@register("dual-token-vit")
class DualTokenFusion(Mechanism):
    """A convolution for local tokens, attention among a few global ones, both fused: see the module for the equations.

    The carry is the grid of global tokens (B, g, g, C), position by position; without one, and with ``alpha=0``, local
    tokens read what is aggregated here alone, as attention to a pooled map does.

    Args:
        dim: width of ``x``.
        num_heads: heads of both attentions.
        grid: side ``g`` of the global map; 7 in the paper.
        steps: ``M``, how often the map is halved before it is brought to ``g x g``; a step that would leave less than
            ``g`` a side is left out.
        kernel_size: of the local convolution, odd.
        step_kernel: of the convolution before every halving, odd.
        conv_ratio: hidden width of the local branch over ``dim``.
        token_ratio: the same of the global tokens' MLP.
        alpha: share of the global tokens that were handed on, in [0, 1].
        learn_alpha: learn it, from there on, as the logistic function of a number.
        token_mlp: of the tokens that were handed on: ``"mlp"``, ``"mix"`` (tokens, then channels), ``"none"``.
        resize: how a map comes to ``g x g``: ``"mean"`` of cells or ``"bilinear"``.
        fusion: ``"sum"`` of local and read tokens, or ``"concat"``: a linear map of both side by side.
        qkv_bias: biases of the query, key and value projections.
        attn_drop, proj_drop: dropout of the weights and of the outputs of both attentions in training.

    Reference: Chu et al., 2023, arXiv 2309.12424.

    >>> m = DualTokenFusion(dim=8, num_heads=2, grid=3)
    >>> out = m(torch.randn(1, 6, 9, 8), carry=torch.randn(1, 3, 3, 8), returns=("carry",))
    >>> out.y.shape, out.carry.shape
    (torch.Size([1, 6, 9, 8]), torch.Size([1, 3, 3, 8]))
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1}, carries=True
    )
    reads_length = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid: int = 7,
        steps: int = 0,
        kernel_size: int = 7,
        step_kernel: int = 3,
        conv_ratio: float = 4.0,
        token_ratio: float = 2.0,
        alpha: float = 0.5,
        learn_alpha: bool = True,
        token_mlp: str = "mlp",
        resize: str = "mean",
        fusion: str = "sum",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim)
        self.grid = check_int("grid", grid, least=1)
        for name, kernel in (("kernel_size", kernel_size), ("step_kernel", step_kernel)):
            if check_int(name, kernel, least=1) % 2 == 0:
                raise ValueError(f"{name} must be odd, got {kernel}")
        check_real("alpha", alpha, least=0, most=1)
        check_flag("learn_alpha", learn_alpha)
        if learn_alpha and not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha} cannot be learned from its end: learn_alpha=False, or between 0 and 1")
        check_choice("token_mlp", token_mlp, TOKEN_MLPS)
        check_choice("resize", resize, RESIZES)
        check_choice("fusion", fusion, FUSIONS)
        self.resize, self.fixed_alpha = resize, alpha
        self.local = LocalBranch(dim, kernel_size, conv_ratio)
        self.steps = nn.ModuleList(PositionalConv(dim, step_kernel) for _ in range(check_int("steps", steps, least=0)))
        given: dict[str, Any] = dict(num_heads=num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.gather_norm, self.gather = nn.LayerNorm(dim), SoftmaxAttention(dim, **given)
        self.token_norm: nn.Module | None = None
        self.token_mlp: nn.Module | None = None
        if alpha:
            self.token_norm = nn.LayerNorm(dim)
            self.token_mlp = {
                "mlp": lambda: Mlp(dim, token_ratio), "mix": lambda: TokenMix(grid**2, dim, token_ratio),
                "none": nn.Identity,
            }[token_mlp]()  # fmt: skip
        self.alpha = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha)))) if learn_alpha else None
        self.read_norm, self.key_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.read = SoftmaxAttention(dim, **given)
        self.fuse = nn.Linear(2 * dim, dim) if fusion == "concat" else None

    # ---- the parts

    def pooled(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> (B, g, g, C), step by step, and which cells hold a token."""
        for conv in self.steps:
            if min(x.shape[1:3]) < 2 * self.grid:
                break
            x = cell_means(conv(x, valid), 2, valid)
            valid = strided_valid(valid, 2)
        sides = (self.grid, self.grid)
        if self.resize == "mean" or x.shape[1:3] == sides:
            return adaptive_pool_tokens(x, sides, valid)
        if valid is None:
            return resize_map(x, sides), None
        share = resize_map(valid.unsqueeze(-1).to(x.dtype), sides)
        some = share > 0
        made = resize_map(zero_invalid(x, valid), sides) / share.masked_fill(~some, 1.0)
        return made, some.squeeze(-1)

    def _before(self, carry: Any, x: Tensor) -> Tensor | None:
        if carry is None:
            return None
        shape = (x.shape[0], self.grid, self.grid, self.dim)
        if not isinstance(carry, Tensor) or not carry.is_floating_point():
            raise TypeError(f"carry must be global tokens (B, g, g, C), got {describe(carry)}")
        if carry.shape != shape:
            raise ValueError(f"carry must be global tokens (B, g, g, C) = {shape}, got {tuple(carry.shape)}")
        check_device(x=x, carry=carry)
        return carry

    def tokens(self, local: Tensor, valid: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The global tokens (B, g, g, C) of local ones and of those that were handed on, and which of them exist."""
        cells, exist = self.pooled(local, valid)
        made = self.gather(self.gather_norm(cells), valid=exist).to(local.dtype)  # autocast
        if before is None or self.token_norm is None or self.token_mlp is None:
            return made, exist
        kept = self.token_mlp(self.token_norm(before).flatten(1, 2)).view(before.shape).to(local.dtype)
        share = self.fixed_alpha if self.alpha is None else torch.sigmoid(self.alpha).to(made.dtype)
        fused = share * kept + (1 - share) * made
        # A cell without tokens knows what was handed on, and nothing else.
        return (fused if exist is None else torch.where(exist.unsqueeze(-1), fused, kept)), None

    def mix(  # type: ignore[override]
        self, x: Tensor, *, valid: Tensor | None = None, carry: Any = None, returns: tuple[str, ...] = ()
    ) -> Output:
        before = self._before(carry, x)
        local = zero_invalid(self.local(x, valid), valid)
        made, exist = self.tokens(local, valid, before)
        queries = self.read_norm(local)
        read = self.read(queries, self.key_norm(made).to(queries.dtype), context_valid=exist)
        y = local + read if self.fuse is None else self.fuse(torch.cat([local, read], -1))
        return Output(y, carry=made if "carry" in returns else None)
