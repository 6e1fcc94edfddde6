"""Mamba-2 (Dao and Gu, 2024): a selective state space with one decay per head, which is linear attention with decay.

    ``z, [x, B, C], dt = W_in u``,  ``[x, B, C] = silu(conv([x, B, C]))``,  ``delta = softplus(dt + b)``
    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t``,  ``y_t = C_t . h_t + D x_t``,  ``W_out norm(y silu(z))``

with one negative number ``A`` and one step per head, so that queries C, keys B and values ``delta x`` go through
:func:`attnlib.ops.linear.linear_attention` with decay ``delta A`` per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_real
from ...ops.linear import linear_attention
from ...types import Output, State, Traits, stats_dtype
from ..base import Mechanism
from ..frame import Stream
from ..layers import CausalConv, flat_valid, merge_heads, zero_invalid
from ..registry import register
from ..released import Released
from .mamba import inner_width


class GatedNorm(nn.Module):
    """RMSNorm of groups of channels, of ``x silu(z)``, or of ``x`` before the gate.

    Args:
        dim: channels.
        groups: how many are normalised apart.
        before: the norm stands before the gate.
    """

    def __init__(self, dim: int, groups: int = 1, before: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.groups, self.before = groups, before

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """(B, N, dim) and the gate -> the same."""
        high = stats_dtype(x.dtype)
        y, gate = x.to(high), F.silu(z.to(high))
        y = (y if self.before else y * gate).unflatten(-1, (self.groups, -1))
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * self.weight
        return (y * gate if self.before else y).to(x.dtype)


@register("mamba2", "ssd")
class Mamba2(Mechanism):
    """Mamba-2's layer: linear attention with a decay per head and token between two projections; causal.

    Args:
        dim: width of ``x``.
        d_state: width of queries and keys.
        d_conv: length of the causal convolution.
        expand: inner width in units of ``dim``.
        head_dim: width of a head; divides the inner width.
        groups: of heads that share queries and keys.
        norm: RMSNorm behind the scan, per group; else the gate alone.
        norm_before_gate: the norm stands before the gate.
        skip_per_channel: ``D`` is a number per channel instead of one per head.
        decay_range: between which ``-A`` starts, evenly.
        dt_min, dt_max, dt_init_floor: between which steps start, evenly in their logarithm; the least of them.
        conv_bias, bias: of the convolution; of the two projections.
        chunk: tokens per chunk; changes speed, not the result.
        causal: must be True; the scan has a direction.

    Differs from the authors' code: plain PyTorch; the state keeps ``d_conv - 1`` inputs of the convolution; tokens
    outside ``valid`` are zero to the convolution and let no time pass.

    Reference: Dao and Gu, 2024, "Transformers are SSMs", arXiv 2405.21060.

    >>> import torch
    >>> Mamba2(dim=16, d_state=4, head_dim=8)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}),
        grid_ranks=frozenset({1}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
    )

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int = 64,
        groups: int = 1,
        norm: bool = True,
        norm_before_gate: bool = False,
        skip_per_channel: bool = False,
        decay_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        chunk: int = 128,
        causal: bool = True,
    ):
        super().__init__(dim)
        if not check_flag("causal", causal):
            raise ValueError("causal=False is not possible: mamba2 is causal")
        inner = inner_width(dim, expand)
        check_int("head_dim", head_dim, least=1)
        if inner % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide the inner width {inner} of expand={expand}")
        heads = inner // head_dim
        if heads % check_int("groups", groups, least=1):
            raise ValueError(f"groups={groups} does not divide {heads} heads, of head_dim={head_dim}, expand={expand}")
        low, high = (check_real("decay_range", d, above=0) for d in decay_range)
        if low > high:
            raise ValueError(f"decay_range={decay_range} must ascend")
        check_real("dt_min", dt_min, above=0)
        if check_real("dt_max", dt_max, above=0) < dt_min:
            raise ValueError(f"dt_min={dt_min} lies above dt_max={dt_max}; steps start between them")
        check_real("dt_init_floor", dt_init_floor, least=0)
        self.inner, self.heads, self.head_dim = inner, heads, head_dim
        self.groups, self.d_state = groups, check_int("d_state", d_state, least=1)
        self.chunk = check_int("chunk", chunk, least=1)
        self.skip_per_channel = check_flag("skip_per_channel", skip_per_channel)
        mixed = inner + 2 * groups * d_state
        self.in_proj = nn.Linear(dim, inner + mixed + heads, bias=bias)
        self.conv1d = CausalConv(mixed, check_int("d_conv", d_conv, least=1), bias=conv_bias)
        step = (torch.rand(heads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).exp()
        step = step.clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(low, high).log())
        self.D = nn.Parameter(torch.ones(inner if skip_per_channel else heads))
        self.norm = GatedNorm(inner, groups, norm_before_gate) if check_flag("norm", norm) else None
        check_flag("norm_before_gate", norm_before_gate)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        valid = flat_valid(valid)
        stream = Stream(x, valid, state, "state" in returns)
        every = zero_invalid(self.in_proj(x), valid)
        z, mixed, dt = every.split([self.inner, self.conv1d.dim, self.heads], -1)
        before = None if state is None else state["conv"].transpose(1, 2)
        kept: dict[str, Tensor] = {}
        if stream.keep:
            past = self.conv1d.past
            seen = F.pad(mixed, (0, 0, past, 0)) if before is None else torch.cat([before.to(mixed.dtype), mixed], 1)
            kept["conv"] = seen[:, seen.shape[1] - past :].transpose(1, 2)
        width = self.groups * self.d_state
        u, b, c = F.silu(self.conv1d(mixed, before)).split([self.inner, width, width], -1)
        high = stats_dtype(x.dtype)
        step = F.softplus(dt.to(high) + self.dt_bias).transpose(1, 2)  # (B, heads, N)
        decay = step * -self.A_log.to(high).exp().unsqueeze(-1)
        v = u.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2).to(high)
        k, q = (t.unflatten(-1, (self.groups, self.d_state)).transpose(1, 2).to(high) for t in (b, c))
        q = q.repeat_interleave(self.heads // self.groups, 1)
        y, final = linear_attention(
            q, k, v * step.unsqueeze(-1), decay=decay, valid=valid, chunk=self.chunk, return_state=True,
            state=None if state is None else State({"S": state["S"]}),
        )  # fmt: skip
        skip = self.D.view(self.heads, 1, -1)
        y = merge_heads(y + skip * v).to(x.dtype)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        return Output(self.out_proj(y), state=stream.next(**kept, **final.tensors) if stream.keep else None)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``Mamba2`` of mamba_ssm."""
        theirs = Released(state_dict, "Mamba2 of mamba_ssm")
        return theirs.close(
            theirs.renamed(
                {
                    r"(in_proj|out_proj|conv1d)\.(weight|bias)": r"\1.\2",
                    r"(dt_bias|A_log|D)": r"\1",
                    r"norm\.weight": "norm.weight",
                }
            )
        )
