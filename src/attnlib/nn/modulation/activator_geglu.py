"""Activator (Abdullah and Aydin, 2024): a gated unit with LayerNorms in the place of attention; it mixes no tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ...types import Output, State, Traits, check_rank
from ..base import Mechanism
from ..frame import Stream
from ..layers import flat_valid, zero_invalid
from ..registry import register
from ..released import Released


@register("activator-geglu", "activator")
class ActivatorUnit(Mechanism):
    """A GEGLU whose two branches are normalised: ``y = W_3 (LN(GELU(W_1 x)) * LN(W_2 x))``.

    Tokens do not mix: ``y_i`` reads ``x_i`` alone. It replaces attention in the authors' blocks, but is no substitute
    for it: put it beside a mechanism that mixes, or pool its output. It is causal, therefore, and streams.

    Args:
        dim: width of ``x``.
        hidden_dim: width of the branches; ``2 dim`` by default.
        norm: the LayerNorms; without them it is a GEGLU.
        shared_norm: one LayerNorm (weights and biases) for both branches, as the authors have it.

    Reference: Abdullah and Aydin, 2024, arXiv 2405.15953.

    >>> ActivatorUnit(dim=8)(torch.randn(2, 4, 4, 8)).shape
    torch.Size([2, 4, 4, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        streaming=True,
        work={"N": 1},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(self, dim: int, hidden_dim: int | None = None, norm: bool = True, shared_norm: bool = True):
        super().__init__(dim)
        hidden = 2 * dim if hidden_dim is None else hidden_dim
        if hidden < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden}")
        self.gate = nn.Linear(dim, hidden)
        self.value = nn.Linear(dim, hidden)
        self.proj = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(hidden) if norm else None
        self.value_norm = nn.LayerNorm(hidden) if norm and not shared_norm else None

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        gate, value = F.gelu(self.gate(x)), self.value(x)
        if self.norm is not None:
            gate, value = self.norm(gate), (self.value_norm or self.norm)(value)
        # nothing is remembered but how far the sequence has come
        new = Stream(x.flatten(1, -2), flat_valid(valid), state, "state" in returns).next()
        return Output(self.proj(gate * value), state=new)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``ActivatorGatingUnit``, ``ActivatorBlock``, ``ACTIVATOR`` or its image classifier."""
        theirs = Released(state_dict, "ActivatorGatingUnit, ActivatorBlock, ACTIVATOR or ACTIVATORImageClassification")
        out: dict[str, Tensor] = {}
        # a block in a stack, whose only name "model." counts as a wrapper's; a unit in a block; or either alone
        for block, ours in ((r"(?:model\.)?(\d+)\.", r"blocks.\1."), (r"()", r"\1")):
            for unit, inside in ((r"actgu\.", "unit."), ("", "")):
                out |= theirs.renamed(
                    {
                        rf"{block}{unit}proj_{i}\.(weight|bias)": rf"{ours}{inside}{name}.\2"
                        for i, name in ((1, "gate"), (2, "value"), (3, "proj"))
                    }
                    | {rf"{block}{unit}norm\.(weight|bias)": rf"{ours}{inside}norm.\2"}
                )
            out |= theirs.renamed({rf"{block}ffn\.net\.(\d+)\.(weight|bias)": rf"{ours}ffn.\2.\3"})
        out |= theirs.renamed({r"patcher\.(weight|bias)": r"patch.\1", r"classifier\.(weight|bias)": r"head.\1"})
        return theirs.close(out)


class ActivatorBlock(nn.Module):
    """``x <- x + unit(LN(x))``, then ``x <- x + FFN(LN(x))``, by default with one LayerNorm for both.

    Args:
        dim: width of ``x``.
        hidden_dim: width of the unit and of the FFN.
        ffn: the second half; without it only the GEGLU is left.
        drop: dropout in the FFN.
        shared_norm: one LayerNorm for both halves, and one inside the unit, as the authors have it.

    Reference: Abdullah and Aydin, 2024, arXiv 2405.15953.

    >>> ActivatorBlock(8, 16)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self, dim: int, hidden_dim: int | None = None, ffn: bool = True, drop: float = 0.5, shared_norm: bool = True
    ):
        super().__init__()
        hidden = 2 * dim if hidden_dim is None else hidden_dim
        self.norm = nn.LayerNorm(dim)
        self.ffn_norm = nn.LayerNorm(dim) if ffn and not shared_norm else None
        self.unit = ActivatorUnit(dim, hidden, shared_norm=shared_norm)
        layers = (nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, dim), nn.Dropout(drop))
        self.ffn = nn.Sequential(*layers) if ffn else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, C) -> the same shape."""
        x = zero_invalid(x, valid)
        x = x + self.unit(self.norm(x), valid=valid)
        return x if self.ffn is None else x + self.ffn((self.ffn_norm or self.norm)(x))


class Activator(nn.Module):
    """Blocks one after another: the authors' ``ACTIVATOR``.

    Args:
        dim, hidden_dim, drop, ffn, shared_norm: as in :class:`ActivatorBlock`.
        depth: number of blocks.

    Reference: Abdullah and Aydin, 2024, arXiv 2405.15953.

    >>> Activator(8, 16, depth=2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        depth: int = 4,
        drop: float = 0.5,
        ffn: bool = True,
        shared_norm: bool = True,
    ):
        super().__init__()
        self.blocks = nn.Sequential(*(ActivatorBlock(dim, hidden_dim, ffn, drop, shared_norm) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> the same shape."""
        return self.blocks(x)


class ActivatorClassifier(Activator):
    """Patches, blocks, the mean over patches, a linear map; no positions, so that the order of patches is not seen.

    Args:
        num_classes: width of the output.
        dim, hidden_dim, depth, drop: of the blocks; the authors' CIFAR-10 settings by default.
        patch_size: side of a patch.
        in_channels: channels of the image.
        ffn, shared_norm: as in :class:`ActivatorBlock`.

    Reference: Abdullah and Aydin, 2024, arXiv 2405.15953.

    >>> ActivatorClassifier(10, dim=8, hidden_dim=16, depth=1)(torch.randn(2, 8, 8, 3)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        dim: int = 256,
        hidden_dim: int = 512,
        depth: int = 4,
        patch_size: int = 4,
        in_channels: int = 3,
        drop: float = 0.5,
        ffn: bool = True,
        shared_norm: bool = True,
    ):
        super().__init__(dim, hidden_dim, depth, drop, ffn, shared_norm)
        self.patch = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """(B, H, W, in_channels) -> (B, num_classes); sides must be multiples of the patch size."""
        check_rank("image", image, 4, "(B, H, W, C)")
        side = self.patch.kernel_size[0]
        if image.shape[1] % side or image.shape[2] % side:
            raise ValueError(f"image sides {tuple(image.shape[1:3])} must be multiples of patch_size={side}")
        tokens = self.patch(image.movedim(-1, 1)).flatten(2).mT
        return self.head(self.blocks(tokens).mean(1))
