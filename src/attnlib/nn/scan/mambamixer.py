"""MambaMixer: selective scans along tokens and along channels, joined by learned averages of all earlier answers.

Behrouz et al., 2024, "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", arXiv
2403.19888. Block l of a stack reads

    ``x_T = sum_{i<l} alpha_li y_T^i + sum_{i<l} beta_li y_C^i``,    ``y_T^l = token mixer(x_T)``
    ``x_C = sum_{i<=l} theta_li y_T^i + sum_{i<l} gamma_li y_C^i``,  ``y_C^l = channel mixer(x_C)``

with ``y_T^0 = y_C^0`` the input: ``4 l + 1`` scalars. The token mixer is Mamba's layer, one way or more; the channel
mixer is the same along the channels of a token, both ways.

The authors released no code. Readings of ours: the channel mixer reads every token by itself, so that its parameters
do not depend on the number of tokens (in the paper's transposed equations they would); maps around its scan are those
of a linear layer; averages start by handing on the latest answer; a norm stands before every mixer. ``averaging``,
``residual`` and ``norm`` are options, since a replication (n8thantran/mambamixer-replication) has softmax averages and
a residual around each mixer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...types import Output, State, Traits
from ..base import Mechanism
from ..frame import Stream
from ..layers import DropPath, flat_valid, zero_invalid
from ..registry import register
from .mamba import S6, BiMamba, Mamba
from .vmamba import SS2D

AVERAGINGS = ("free", "softmax")
TOKENS = ("bimamba", "ss2d")


@register("mambamixer-channels", "selective-channel-mixer")
class ChannelMixer(Mechanism):
    """A selective scan along the channels of every token, both ways, with a gate.

    ``y = W_out [scan(u) silu(z) + flip(scan'(flip(u))) silu(z)]`` with ``u, z = W_in x``, each scan with a convolution
    and selection of its own along the ``width / group`` places of u, which hold ``group`` numbers each. With
    ``maps="shared"`` the maps act on every place alone, ``group`` to ``expand * group`` and back, so that work is
    linear in the width, too.

    Args:
        dim: width of ``x``.
        width: numbers that are scanned, with ``maps="dense"``; ``dim`` by default.
        group: numbers per place.
        maps: ``"dense"`` or ``"shared"``.
        expand: width inside over ``group``, with ``maps="shared"``.
        d_state, d_conv, chunk: of :class:`attnlib.nn.scan.mamba.S6`.

    Reference: Behrouz et al., 2024, arXiv 2403.19888.

    >>> import torch
    >>> ChannelMixer(dim=8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}), grid_ranks=frozenset({1, 2, 3}), streaming=True, work={"N": 1},
        memory={"N": 1}, permutation_equivariant=True,
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        group: int = 1,
        maps: str = "dense",
        expand: float = 2,
        d_state: int = 16,
        d_conv: int = 4,
        chunk: int | None = None,
    ):
        super().__init__(dim)
        check_choice("maps", maps, ("dense", "shared"))
        check_int("group", group, least=1)
        if width is not None and maps == "shared":
            raise ValueError(f"width={width} needs maps='dense'; shared maps scan the dim={dim} channels themselves")
        self.width, self.group = dim if width is None else check_int("width", width, least=1), group
        if self.width % group:
            raise ValueError(f"group={group} does not divide the {self.width} numbers that are scanned")
        self.inner: BiMamba | None = None
        if maps == "shared":
            self.inner = BiMamba(group, d_state=d_state, d_conv=d_conv, expand=expand, chunk=chunk)
        else:
            self.in_proj = nn.Linear(dim, 2 * self.width, bias=False)
            self.scan = S6(group, d_state, d_conv, chunk=chunk)
            self.back = S6(group, d_state, d_conv, chunk=chunk)
            self.out_proj = nn.Linear(self.width, dim, bias=False)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        # nothing is remembered but how far the sequence has come
        new = Stream(x.flatten(1, -2), flat_valid(valid), state, "state" in returns).next()
        return Output(self.along(x), state=new)

    def along(self, x: Tensor) -> Tensor:
        """(..., dim) -> the same, every token by itself."""
        if self.inner is not None:
            return self.inner.both_ways(x.reshape(-1, self.width // self.group, self.group)).y.reshape(x.shape)
        u, z = (t.reshape(-1, self.width // self.group, self.group) for t in self.in_proj(x).chunk(2, -1))
        ahead, _ = self.scan(u, z)
        back, _ = self.back(u.flip(1), z.flip(1))
        return self.out_proj((ahead + back.flip(1)).reshape(*x.shape[:-1], self.width))


class Averages(nn.Module):
    """The weights with which block l (from 1) reads what stands before it.

    Args:
        number: l.
        kind: ``"free"``, any numbers, that start by handing on the latest; ``"softmax"`` of each of the four.
        channels: whether there are answers of channel mixers.
    """

    def __init__(self, number: int, kind: str = "free", channels: bool = True):
        super().__init__()
        check_choice("averaging", kind, AVERAGINGS)
        self.kind = kind
        free = kind == "free"

        def weights(count: int, latest: bool) -> nn.Parameter:
            if not free:
                return nn.Parameter(torch.full((count,), 1.0 / count))
            start = torch.zeros(count)
            start[-1] = float(latest)
            return nn.Parameter(start)

        self.alpha = weights(number, not channels)
        self.beta = weights(number, True) if channels else None
        self.theta = weights(number + 1, True) if channels else None
        self.gamma = weights(number, False) if channels else None

    def _sum(self, weights: Tensor, given: Sequence[Tensor]) -> Tensor:
        w = weights.softmax(0) if self.kind == "softmax" else weights
        out = w[0] * given[0]
        for i in range(1, len(given)):
            out = torch.addcmul(out, w[i], given[i])
        return out

    def tokens(self, tokens: Sequence[Tensor], channels: Sequence[Tensor]) -> Tensor:
        """What the token mixer reads."""
        out = self._sum(self.alpha, tokens)
        return out if self.beta is None else out + self._sum(self.beta, channels)

    def channels(self, tokens: Sequence[Tensor], channels: Sequence[Tensor]) -> Tensor:
        """What the channel mixer reads."""
        assert self.theta is not None and self.gamma is not None
        return self._sum(self.theta, tokens) + self._sum(self.gamma, channels)


@register("mambamixer", "m2")
class MambaMixer(Mechanism):
    """Blocks of selective token and channel mixers with averages of all earlier answers.

    Args:
        dim: width of ``x``.
        blocks: how many.
        per_block: token mixers in a block, one behind the other.
        causal: the token mixer is Mamba's layer, and a state continues the sequence.
        token: else: ``"bimamba"``, both ways along the tokens, or ``"ss2d"``, along rows and columns of a map.
        channel: with channel mixers.
        averaging: ``"free"`` or ``"softmax"``.
        residual: ``x + mixer(norm(x))`` in place of ``mixer(norm(x))``.
        norm: a LayerNorm before every mixer.
        drop: dropout behind every mixer in training.
        drop_path: stochastic depth of every mixer in training, with ``residual``.
        d_state, d_conv, expand, chunk: of the token mixers (``d_conv`` not of ``"ss2d"``, whose kernels are 3 x 3).
        width, group, maps: of :class:`ChannelMixer`.

    Reference: Behrouz et al., 2024, arXiv 2403.19888.

    >>> import torch
    >>> MambaMixer(dim=8, blocks=2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "causal-self"}), grid_ranks=frozenset({1, 2, 3}), streaming=True,
        work={"N": 1}, memory={"N": 1},
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        blocks: int = 1,
        per_block: int = 1,
        causal: bool = False,
        token: str = "bimamba",
        channel: bool = True,
        averaging: str = "free",
        residual: bool = False,
        norm: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        chunk: int | None = None,
        width: int | None = None,
        group: int = 1,
        maps: str = "dense",
    ):
        super().__init__(dim)
        check_int("blocks", blocks, least=1)
        check_int("per_block", per_block, least=1)
        check_choice("token", token, TOKENS)
        self.causal, self.token = check_flag("causal", causal), token
        self.residual = check_flag("residual", residual)
        check_flag("channel", channel)
        if check_real("drop_path", drop_path, least=0, below=1) and (drop or not residual):
            raise ValueError(f"drop_path={drop_path} needs residual=True and drop=0")
        if causal and token != "bimamba":
            raise ValueError("causal=True scans along the sequence; token='ss2d' scans maps")

        def mixer() -> Mechanism:
            if causal:
                return Mamba(dim, d_state, d_conv, expand, chunk=chunk)
            if token == "ss2d":
                return SS2D(dim, d_state, expand)
            return BiMamba(dim, d_state=d_state, d_conv=d_conv, expand=expand, chunk=chunk)

        def normed(inner: Mechanism) -> nn.ModuleDict:
            parts: dict[str, nn.Module] = {"norm": nn.LayerNorm(dim) if norm else nn.Identity(), "inner": inner}
            return nn.ModuleDict({**parts, "drop": DropPath(drop_path) if drop_path else nn.Dropout(drop)})

        self.averages = nn.ModuleList([Averages(i + 1, averaging, channel) for i in range(blocks)])
        self.tokens = nn.ModuleList(
            [nn.ModuleList([normed(mixer()) for _ in range(per_block)]) for _ in range(blocks)]
        )  # fmt: skip
        self.channels = nn.ModuleList(
            [
                normed(ChannelMixer(dim, width, group, maps, expand, d_state, d_conv, chunk))
                for _ in range(blocks if channel else 0)
            ]
        )

    @property
    def traits(self) -> Traits:
        ranks = {1} if self.causal else {2} if self.token == "ss2d" else {1, 2, 3}
        return self.class_traits.but(
            patterns=frozenset({"causal-self" if self.causal else "noncausal-self"}), grid_ranks=frozenset(ranks),
            streaming=self.causal,
        )  # fmt: skip

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        stream = Stream(x.flatten(1, -2), flat_valid(valid), state, "state" in returns)
        tokens, channels = [x], [x]
        states: dict[str, Any] = {}
        for i, averages in enumerate(self.averages):
            y = averages.tokens(tokens, channels)  # type: ignore[operator]
            block: Any = self.tokens[i]
            for j, part in enumerate(block):
                name = f"{i}.{j}"
                call: dict[str, Any] = {"valid": valid}
                if self.causal:
                    call |= {
                        "state": None if state is None else state[name],
                        "returns": ("state",) if stream.keep else (),
                    }
                y = self._one(part, y, call, states, name if stream.keep else None)
            tokens.append(y)
            if len(self.channels):
                y = averages.channels(tokens, channels)  # type: ignore[operator]
                channels.append(self._one(self.channels[i], y, {"valid": valid}, states, None))
        out = channels[-1] if len(self.channels) else tokens[-1]
        return Output(zero_invalid(out, valid), state=stream.next(**states))

    def _one(self, part: Any, x: Tensor, call: dict[str, Any], states: dict[str, Any], name: str | None) -> Tensor:
        """A mixer with what stands around it."""
        y = part["inner"](part["norm"](x), **call)
        if isinstance(y, Output):
            assert name is not None
            states[name], y = y.state, y.y
        y = part["drop"](y)
        return x + y if self.residual else y
