"""Mamba (Gu and Dao, 2023) and its two-way form in Vision Mamba (Zhu et al., 2024): selective state spaces as layers.

    ``x, z = W_in u``,  ``x = silu(conv(x))``,  ``dt, B, C = W_x x``,  ``delta = softplus(W_dt dt + b)``
    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t``,  ``y = W_out ((C_t . h_t + D x_t) silu(z_t))``

with ``A = -exp(A_log)`` of shape (inner, d_state), real and negative, and a causal depthwise convolution. ``A`` starts
at ``-1 .. -d_state``, steps between ``dt_min`` and ``dt_max``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...ops.scan import selective_scan
from ...types import Output, State, Traits, stats_dtype
from ..base import Mechanism
from ..frame import Stream
from ..layers import CausalConv, flat_valid, zero_invalid
from ..registry import register
from ..released import Released, Rule


class S6(nn.Module):
    """What lies between the projections of a Mamba layer: convolution, selection and scan.

    Args:
        channels: width.
        d_state: numbers of state per channel.
        d_conv: length of the convolution; ``None`` for none (and no activation).
        dt_rank: width through which steps are projected; ``channels / 32`` rounded up by default.
        dt_min, dt_max: steps at the start, whose logarithms are uniform between these.
        dt_init: ``"random"`` or ``"constant"`` weights of the projection to steps; ``None`` as any linear layer, its
            bias too.
        dt_scale: of these weights.
        dt_init_floor: smallest step at the start.
        conv_bias: bias of the convolution.
        chunk: tokens per chunk of the scan; changes speed, not the result.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 16,
        d_conv: int | None = 4,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str | None = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        chunk: int | None = None,
    ):
        super().__init__()
        check_int("d_state", d_state, least=1)
        check_real("dt_min", dt_min, above=0)
        if check_real("dt_max", dt_max, above=0) < dt_min:
            raise ValueError(f"dt_min={dt_min} lies above dt_max={dt_max}; steps start between them")
        check_real("dt_scale", dt_scale, least=0)
        check_real("dt_init_floor", dt_init_floor, least=0)
        if dt_init is not None:
            check_choice("dt_init", dt_init, ("random", "constant"))
        if chunk is not None:
            check_int("chunk", chunk, least=1)
        self.channels, self.d_state, self.chunk = channels, d_state, chunk
        self.dt_rank = math.ceil(channels / 32) if dt_rank is None else check_int("dt_rank", dt_rank, least=1)
        self.conv1d: CausalConv | None = None
        if d_conv is not None:
            self.conv1d = CausalConv(channels, check_int("d_conv", d_conv, least=1), bias=conv_bias)
        self.x_proj = nn.Linear(channels, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, channels)
        spread = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        if dt_init is not None:
            low, high = math.log(dt_min), math.log(dt_max)
            step = torch.exp(torch.rand(channels) * (high - low) + low).clamp(min=dt_init_floor)
            with torch.no_grad():
                self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        rates = torch.arange(1, d_state + 1, dtype=torch.float32).to(self.dt_proj.weight.dtype)
        self.A_log = nn.Parameter(rates.log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))

    @property
    def A(self) -> Tensor:
        """(channels, d_state) decays, negative."""
        return -self.A_log.to(stats_dtype(self.A_log.dtype)).exp()

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        positions: Tensor | None = None,
        steps: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N, channels), gated by ``z``, and what a state needs: the convolution's last inputs and the scan's state.

        Tokens that do not exist must be zero already. ``positions`` as :func:`attnlib.ops.selective_scan` takes them;
        ``steps`` (B, L, channels) are those of all tokens that there were, before the softplus, in which those of
        ``x`` are put in place; they are returned, too, and so are the steps of ``x`` alone where there are none.
        """
        kept: dict[str, Tensor] = {}
        if self.conv1d is not None:
            before = None if state is None else state["conv"].transpose(1, 2)
            if keep:
                kept["conv"] = self._last(x, before).transpose(1, 2)
            x = F.silu(self.conv1d(x, before))
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        delta = self.dt_proj(dt)
        if steps is not None and positions is not None:
            delta = steps.to(delta.dtype).scatter(1, positions.unsqueeze(-1).expand_as(delta), delta)
        out = selective_scan(
            x, delta, self.A, b, c, self.D, z, delta_softplus=True, valid=valid, positions=positions,
            state=None if state is None else State({"h": state["h"]}), chunk=self.chunk, return_state=True,
        )  # fmt: skip
        if not keep:
            kept["steps"] = delta
        return out.out, {**kept, **out.state.tensors}

    def _last(self, x: Tensor, before: Tensor | None) -> Tensor:
        """(B, d_conv - 1, channels) last inputs of the convolution."""
        assert self.conv1d is not None
        n = self.conv1d.past
        seen = F.pad(x, (0, 0, n, 0)) if before is None else torch.cat([before.to(x.dtype), x], 1)
        return seen[:, seen.shape[1] - n :]


@register("mamba", "s6")
class Mamba(Mechanism):
    """Mamba's layer: a selective state space between two projections, with a gate; causal, with constant state.

    Args:
        dim: width of ``x``.
        d_state: numbers of state per channel.
        d_conv: length of the causal convolution.
        expand: inner width in units of ``dim``.
        dt_rank: width through which steps are projected; ``dim / 16`` rounded up by default.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: how steps start; see :class:`S6`.
        conv_bias: bias of the convolution.
        bias: biases of the two projections.
        chunk: tokens per chunk of the scan; changes speed, not the result.
        causal: must be True; the scan has a direction.

    Differs from the authors' code: plain PyTorch; the state keeps ``d_conv - 1`` inputs of the convolution, theirs one
    more; tokens outside ``valid`` are zero to the convolution and let no time pass.

    Reference: Gu and Dao, 2023, arXiv 2312.00752.

    >>> import torch
    >>> Mamba(dim=16)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}),
        grid_ranks=frozenset({1}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
    )
    cuts_sequence = True

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        chunk: int | None = None,
        causal: bool = True,
    ):
        super().__init__(dim)
        if not check_flag("causal", causal):
            raise ValueError("causal=False is not possible: mamba is causal; bimamba scans both ways")
        inner = inner_width(dim, expand)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.scan = S6(
            inner, d_state, d_conv, math.ceil(dim / 16) if dt_rank is None else dt_rank, dt_min, dt_max, dt_init,
            dt_scale, dt_init_floor, conv_bias, chunk,
        )  # fmt: skip
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
        inner, z = zero_invalid(self.in_proj(x), valid).chunk(2, -1)
        y, kept = self.scan(inner, z, valid=valid, state=state, keep=stream.keep)
        return Output(self.out_proj(y), state=stream.next(**kept) if stream.keep else None)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``Mamba`` of mamba_ssm, or ``MambaMixer`` of transformers."""
        theirs = Released(state_dict, "Mamba of mamba_ssm")
        return theirs.close(theirs.renamed(RULES))


#: Names of mamba_ssm in ours.
RULES: dict[str, Rule] = {
    r"(in_proj|out_proj)\.(weight|bias)": r"\1.\2",
    r"(conv1d|x_proj|dt_proj)\.(weight|bias)": r"scan.\1.\2",
    r"(A_log|D)": r"scan.\1",
}


def inner_width(dim: int, expand: float) -> int:
    """Channels inside a layer."""
    check_real("expand", expand, above=0)
    inner = int(expand * dim)
    if inner < 1:
        raise ValueError(f"expand={expand} leaves no channel of dim={dim}; choose at least {1 / dim:.3g}")
    return inner


class Ways(NamedTuple):
    """Output (B, N, C) of a scan both ways, what each way gives (B, N, inner), in the order of the tokens, and steps.

    Steps are (B, L, inner) before the softplus, one tensor per way, in the order in which that way reads.
    """

    y: Tensor
    ahead: Tensor
    back: Tensor
    steps: tuple[Tensor, Tensor]


@register("bimamba", "vision-mamba-mixer")
class BiMamba(Mechanism):
    """Mamba's layer that scans a sequence both ways, as Vision Mamba has it; not causal.

    ``kind="v2"``: a convolution, selection and scan of its own for each way, both gated by the same ``z``;
    ``y = W_out (forward + backward)``, halved with ``divide``. ``kind="v1"``: one convolution and selection, a second
    ``A`` for the way back.

    Args:
        dim: width of ``x``.
        kind: ``"v2"`` or ``"v1"``.
        divide: halve the sum of the two ways; ``"v2"`` only.
        layer_scale: gain per channel of the output at the start; ``None`` for none.
        d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias, chunk: as
            in :class:`Mamba`; the projection to steps of the way back starts as any linear layer, as theirs does.

    Differs from the authors' code: a grid of any rank is read row by row.

    Reference: Zhu et al., 2024, "Vision Mamba", arXiv 2401.09417.

    >>> import torch
    >>> BiMamba(dim=16)(torch.randn(2, 3, 4, 16)).shape
    torch.Size([2, 3, 4, 16])
    """

    class_traits = Traits(grid_ranks=frozenset({1, 2, 3}), layout=True, work={"N": 1}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        kind: str = "v2",
        divide: bool = False,
        layer_scale: float | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        chunk: int | None = None,
    ):
        super().__init__(dim)
        check_choice("kind", kind, ("v2", "v1"))
        if check_flag("divide", divide) and kind == "v1":
            raise ValueError("divide=True is not possible with kind='v1'; choose kind='v2'")
        self.kind, self.divide = kind, divide
        inner = inner_width(dim, expand)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.gamma: nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((dim,), float(check_real("layer_scale", layer_scale))))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.scan = S6(
            inner, d_state, d_conv, rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, chunk
        )  # fmt: skip
        self.back: S6 | None = None
        if kind == "v2":
            self.back = S6(inner, d_state, d_conv, rank, dt_init=None, conv_bias=conv_bias, chunk=chunk)
        else:
            self.A_back_log = nn.Parameter(self.scan.A_log.detach().clone())
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def mix(self, x: Tensor, *, layout: Any = None, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.both_ways(x.flatten(1, -2), flat_valid(valid)).y.view_as(x)

    def both_ways(
        self, x: Tensor, valid: Tensor | None = None, positions: Tensor | None = None, length: int | None = None,
        steps: tuple[Tensor, Tensor] | None = None,
    ) -> Ways:  # fmt: skip
        """(B, N, C) output, and what each way gives.

        Args:
            x: (B, N, C).
            valid: (B, N) boolean, which tokens exist.
            positions: (B, N) ascending places of the tokens among ``length``: the state decays over what was removed,
                by the step of the next token that is left, once per place.
            length: tokens that there were.
            steps: what an earlier call gave, of all tokens that there were: what was removed decays by these.
        """
        inner, z = zero_invalid(self.in_proj(x), valid).chunk(2, -1)
        if positions is not None and length is None:
            raise ValueError("positions need length, the number of tokens that there were")
        if steps is not None and positions is None:
            raise ValueError("steps need positions, the places of the tokens among those that there were")
        turned = None if positions is None else length - 1 - positions.flip(1)  # type: ignore[operator]
        flipped = None if valid is None else valid.flip(1)
        if self.back is not None:
            own, other = (None, None) if steps is None else steps
            ahead, one = self.scan(inner, z, valid=valid, positions=positions, steps=own)
            back, two = self.back(inner.flip(1), z.flip(1), valid=flipped, positions=turned, steps=other)
            taken = one["steps"], two["steps"]
        else:
            ahead, back, taken = self._shared(inner, z, valid, flipped, positions, turned, steps)
        back = back.flip(1)
        y = self.out_proj((ahead + back) / 2 if self.divide else ahead + back)
        return Ways(y if self.gamma is None else y * self.gamma, ahead, back, taken)

    def _shared(
        self, x: Tensor, z: Tensor, valid: Tensor | None, flipped: Tensor | None, positions: Tensor | None,
        turned: Tensor | None, steps: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        """One convolution and selection for both ways."""
        scan = self.scan
        assert scan.conv1d is not None
        x = F.silu(scan.conv1d(x))
        dt, b, c = scan.x_proj(x).split([scan.dt_rank, scan.d_state, scan.d_state], -1)
        delta = scan.dt_proj(dt)
        if steps is not None and positions is not None:
            delta = steps[0].to(delta.dtype).scatter(1, positions.unsqueeze(-1).expand_as(delta), delta)
        A_back = -self.A_back_log.to(stats_dtype(self.A_back_log.dtype)).exp()
        tokens = (x, delta, b, c, z)
        outs = []
        for (u, d, k, q, gate), A, exists, at in (
            (tokens, scan.A, valid, positions),
            ((t.flip(1) for t in tokens), A_back, flipped, turned),
        ):
            outs.append(
                selective_scan(
                    u, d, A, k, q, scan.D, gate, delta_softplus=True, valid=exists, positions=at, chunk=scan.chunk
                )
            )
        return outs[0], outs[1], (delta, delta.flip(1))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``Mamba`` of Vision Mamba with ``bimamba_type`` ``"v2"`` or ``"v1"``."""
        theirs = Released(state_dict, "Mamba of Vision Mamba")
        back: dict[str, Rule] = {
            r"(conv1d|x_proj|dt_proj)_b\.(weight|bias)": r"back.\1.\2",
            r"D_b": "back.D",
            r"A_b_log": "back.A_log" if "D_b" in theirs else "A_back_log",
            r"gamma": "gamma",
        }
        return theirs.close(theirs.renamed({**RULES, **back}))
