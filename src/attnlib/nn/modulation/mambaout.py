"""Gated CNN: a Mamba block without its state space model, and the rule that says where it will not be missed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real
from ...types import Traits
from ..base import Mechanism
from ..layers import DepthwiseConv
from ..registry import register
from ..released import Released, Rule

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU}


def long_sequence(tokens: int, dim: int) -> bool:
    """Whether a task is one of long sequences, which state space models are for: ``tokens > 6 dim``.

    A Transformer block spends 24 D^2 L + 4 D L^2 operations on L tokens of width D; beyond L = 6 D the quadratic part
    is the larger one.

    >>> long_sequence(196, 384), long_sequence(4096, 384)
    (False, True)
    """
    return check_int("tokens", tokens, least=0) > 6 * check_int("dim", dim, least=1)


@register("mambaout", "gated-cnn")
class GatedCNN(Mechanism):
    """Gated convolution: some channels look around, then all are multiplied by gates.

    ``[g, i, c] = W_1 x`` of widths h, h - c and c, ``c' = mixer(conv(c))`` and ``y = W_2 (act(g) * [i, c'])``, with
    h = int(expansion dim) and c = int(conv_ratio dim) channels in a depthwise convolution. Without a ``mixer``, the
    default, c' = conv(c). With a selective scan for a mixer, and all channels in the convolution, it is a Mamba block.

    Shapes: x and y (B, H, W, dim), or (B, N, dim) with ``grid_rank=1``, linear in the tokens; a token sees
    ``kernel_size`` tokens along each axis. Defaults are those of the paper. There is no MLP beside this block.

    Differs from the authors' code: the norm and the residual around it belong to the block that holds it; tokens
    outside ``valid`` are zero before the convolution; other ranks than 2.

    Args:
        dim: width.
        expansion: h over ``dim``; the product is rounded down.
        kernel_size: side of the convolution, odd.
        conv_ratio: c over ``dim``, rounded down; c is at most h.
        activation: of the gates, ``"gelu"`` or ``"silu"``.
        grid_rank: axes of the grid.
        mixer: makes from c a module on (B, *grid, c) that stands between convolution and gate; ``None`` for none. A
            mechanism is told which tokens exist.

    Raises:
        ValueError: an even kernel, more channels in the convolution than there are.

    Reference: Yu and Wang, 2024, arXiv 2405.07992.

    >>> GatedCNN(dim=6)(torch.randn(2, 5, 4, 6)).shape
    torch.Size([2, 5, 4, 6])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({1, 2, 3}), work={"N": 1}, memory={"N": 1}
    )

    def __init__(
        self,
        dim: int,
        expansion: float = 8 / 3,
        kernel_size: int = 7,
        conv_ratio: float = 1.0,
        activation: str = "gelu",
        grid_rank: int = 2,
        mixer: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__(dim)
        check_choice("grid_rank", grid_rank, (1, 2, 3))
        check_choice("activation", activation, ACTIVATIONS)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.hidden = int(check_real("expansion", expansion, above=0) * dim)
        self.conv_dim = int(check_real("conv_ratio", conv_ratio, above=0) * dim)
        if not 1 <= self.conv_dim <= self.hidden:
            raise ValueError(
                f"conv_ratio={conv_ratio} puts {self.conv_dim} channels into the convolution; possible are 1 to "
                f"{self.hidden}, which expansion={expansion} gives"
            )
        self.grid_rank = grid_rank
        self.fc1 = nn.Linear(dim, 2 * self.hidden)
        self.act = ACTIVATIONS[activation]()
        self.conv = DepthwiseConv(self.conv_dim, kernel_size, grid_rank)
        self.mixer = None if mixer is None else mixer(self.conv_dim)
        self.fc2 = nn.Linear(self.hidden, dim)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(grid_ranks=frozenset({self.grid_rank}))

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        gate, still, seen = self.fc1(x).split([self.hidden, self.hidden - self.conv_dim, self.conv_dim], -1)
        if valid is not None:
            seen = seen.masked_fill(~valid.unsqueeze(-1), 0.0)  # the bias of fc1
        seen = self.conv(seen)
        if isinstance(self.mixer, Mechanism):
            seen = self.mixer(seen, valid=valid)
        elif self.mixer is not None:
            seen = self.mixer(seen)
        return self.fc2(self.act(gate) * torch.cat([still, seen], -1))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """From the ``fc1``, ``conv`` and ``fc2`` of the authors' ``GatedCNNBlock`` or timm's ``GatedConvBlock``."""
        theirs = Released(state_dict, "MambaOut's gated convolution")
        rules: dict[str, Rule] = {r"(fc1|conv|fc2)\.(weight|bias)": r"\1.\2"}
        return theirs.close(theirs.renamed(rules))
