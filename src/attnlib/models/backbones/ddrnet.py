"""DDRNet: a branch that keeps an eighth of the resolution beside one that goes on to a 32nd, and exchanges of both.

Hong et al., 2021, "Deep Dual-resolution Networks for Real-time and Accurate Semantic Segmentation of Road Scenes",
arXiv 2101.06085. Of what the blocks give, ``l`` of the low branch and ``h`` of the high one, an exchange makes

``low' = relu(l + down(relu(h))), high' = h + up(compress(relu(l)))``

once in the third and in the fourth stage, twice in the third of DDRNet-39. The maps to take are those of the low
branch, behind the exchanges. :mod:`attnlib.models.dense.ddrnet` is the model for segmentation, with its context module.

Differs from the authors' code: images of any size, where theirs are multiples of 8; tokens that do not exist enter no
convolution, mean or statistic; biases of convolutions start at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_ints
from ...nn.layers import ConvNorm, resize_map, zero_invalid
from ...nn.recompute import checkpointed
from ...nn.released import Released
from ..blocks import ConvStem, Place, check_stages, places
from ..build import register_models
from .convs import ConvStage, Relu, ResidualBlock, by_prefix, conv_names, init_convs
from .stages import Backbone, Head


def residual_blocks(dim: int, row: Sequence[Place], stride: int = 1, basic: bool = True) -> nn.ModuleList:
    """Blocks of one width, the last without its activation; a bottleneck gives twice its width."""
    blocks = nn.ModuleList()
    for place in row:
        out = place.dim if basic else 2 * place.dim
        drop = place.drop_path
        blocks.append(ResidualBlock(dim, out, place.dim, 1 if blocks else stride, basic, drop_path=drop, gain=1.0))
        dim = out
    blocks[-1].act = nn.Identity()
    return blocks


def _through(blocks: nn.ModuleList, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    for block in blocks:
        x, valid, _ = block(x, valid)
    return x, valid


def downs(*dims: int) -> ConvStem:
    """3 x 3 convolutions of stride 2 with norms, ReLUs between them."""
    last = len(dims) - 1
    return ConvStem(
        *(ConvNorm(dims[i], dims[i + 1], 3, 2, activation=Relu if i + 1 < last else None) for i in range(last))
    )


class Exchange(nn.Module):
    """Blocks of both branches, then what each tells the other. The high branch is carried along.

    Args:
        dim, high_dim: channels of the low and of the high branch before.
        row: places of the low branch's blocks; the high branch has as many, ``width`` wide.
        width: of the high branch.
        stride: of the low branch.
    """

    def __init__(self, dim: int, high_dim: int, row: Sequence[Place], width: int, stride: int):
        super().__init__()
        out = row[0].dim
        self.low = residual_blocks(dim, row, stride)
        self.high = residual_blocks(high_dim, [Place(width, 1, p.stage, drop_path=p.drop_path) for p in row])
        self.compress = ConvNorm(out, width)
        self.down = downs(width, *(2 * width * 2**i for i in range((out // width).bit_length() - 1)))

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The low branch and which of its tokens exist; ``carry``: the same of the high one, which begins at ``x``."""
        high, exists = (x, valid) if carry is None else carry
        low, valid = _through(self.low, x, valid)
        high, exists = _through(self.high, F.relu(high), exists)
        told = zero_invalid(self.compress(F.relu(low), valid), valid)
        low = F.relu(low + self.down(F.relu(high), exists)[0])
        return low, valid, (high + resize_map(told, high.shape[1:3]), exists)


class Last(nn.Module):
    """A bottleneck in each branch; for classification their sum, at the low branch's resolution."""

    def __init__(self, place: Place, dim: int, width: int, dense: bool):
        super().__init__()
        self.low = residual_blocks(dim, [place], 2 if dense else 1, basic=False)
        self.high = residual_blocks(width, [Place(width, 1, place.stage, drop_path=place.drop_path)], basic=False)
        self.down = None if dense else downs(2 * width, dim, 2 * dim)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """As :class:`Exchange`."""
        low, valid = _through(self.low, x, valid)
        high, exists = _through(self.high, F.relu(carry[0]), carry[1])
        if self.down is not None:
            low = F.relu(F.relu(low) + self.down(F.relu(high), exists)[0])
        return low, valid, (high, exists)


class DDRNet(Backbone):
    """A backbone whose high branch is carried from stage to stage."""

    def _maps(
        self,
        x: Tensor,
        valid: Tensor | None,
        losses: dict[str, Tensor] | None = None,
        last: int | None = None,
        seen: list[Any] | None = None,
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        self._check_images(x, valid)
        x, valid = self.stem(x.permute(0, 2, 3, 1).contiguous(), valid)
        carry: Any = None
        for stage in self.stages[: None if last is None else last + 1]:  # type: ignore[union-attr]
            for block in stage.blocks:  # type: ignore[union-attr]
                x, valid, carry = checkpointed(block, x, valid, carry, losses, when=stage.checkpointing)  # type: ignore[arg-type]
            if seen is not None:
                seen.append(carry)
            yield x, valid


def ddrnet(
    dim: int = 64,
    depths: Sequence[int] = (2, 2, 2, 2),
    exchanges: Sequence[int] = (1, 1),
    last_dim: int = 2048,
    dense: bool = False,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> DDRNet:
    """A DDRNet.

    Args:
        dim: width of the stem; 1, 2, 4, 8 and 16 times as many are those of the maps, twice that of the high branch.
        depths: blocks of the low branch per stage; the high branch has as many in the last two.
        exchanges: in the last two of these stages, among which their blocks are shared out.
        last_dim: channels before the classifier.
        dense: the form for segmentation: the low branch ends at a 64th, nothing is joined, and there is no classifier.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
    """
    check_flag("dense", dense)
    for name, value in (("dim", dim), ("last_dim", last_dim)):
        check_int(name, value, least=1)
    check_stages(4, depths=depths)
    check_stages(2, exchanges=exchanges)
    check_ints("exchanges", exchanges, least=1)
    if any(depth % n for depth, n in zip(depths[2:], exchanges, strict=True)):
        raise ValueError(f"exchanges={tuple(exchanges)} must divide the depths of the last stages, {tuple(depths[2:])}")
    width = 2 * dim
    dims = [dim * 2**i for i in range(5)]
    reductions = [4, 8, 16, 32, 64 if dense else 32]
    rows = places([*dims[:4], dims[3]], (*depths, 1), (1,) * 5, reductions, drop_path_rate)
    stages = []
    for i in range(2):
        blocks = residual_blocks(dims[max(0, i - 1)], rows[i], 2 if i else 1)
        blocks[-1].act = Relu()  # all that reads it reads it behind an activation
        stages.append(ConvStage(blocks))
    for i, count in zip((2, 3), exchanges, strict=True):
        each = depths[i] // count
        parts = [rows[i][n : n + each] for n in range(0, depths[i], each)]
        stages.append(
            ConvStage(
                Exchange(dims[i] if n else dims[i - 1], width, part, width, 1 if n else 2)
                for n, part in enumerate(parts)
            )
        )
    stages.append(ConvStage([Last(rows[4][0], dims[3], width, dense)]))
    stem = ConvStem(*(ConvNorm(a, dim, 3, 2, bias=True, activation=Relu) for a in (in_chans, dim)))
    norm = None if dense else ConvNorm(dims[4], last_dim, activation=Relu)
    head = Head(dims[4] if dense else last_dim, 0 if dense else num_classes, global_pool, drop=drop_rate)
    model = DDRNet(stem, stages, dims, reductions, norm, head, head.dim and num_classes, in_chans, img_size)
    model.num_features = model.head_hidden_size = head.dim
    model.input_name = "stem.0.conv.weight"
    init_convs(model)
    return model


def names_of(model: Any) -> dict[str, str]:
    """Their prefixes of parts and ours."""

    def pair(theirs: str, ours: str, at: int = 0) -> dict[str, str]:
        return conv_names(f"{theirs}.", ours, f"{at}", f"{at + 1}")

    def blocks(theirs: str, ours: str, row: Any) -> dict[str, str]:
        found: dict[str, str] = {}
        for j, block in enumerate(row):
            parts = ("conv1", "conv3") if block.conv2 is None else ("conv1", "conv2", "conv3")
            for n, part in enumerate(parts, 1):
                found |= conv_names(f"{theirs}.{j}.", f"{ours}.{j}.{part}", f"conv{n}", f"bn{n}")
            found |= pair(f"{theirs}.{j}.downsample", f"{ours}.{j}.shortcut.conv")
        return found

    names = pair("conv1", "stem.0") | pair("conv1", "stem.1", 3)
    names |= pair("last_layer", "norm") | {"linear": "head.fc"}
    for i, stage in enumerate(model.stages):
        if i < 2:
            names |= blocks(f"layer{i + 1}", f"stages.{i}.blocks", stage.blocks)
            continue
        for n, block in enumerate(stage.blocks):
            number, ours = f"{i + 1}_{n + 1}" if len(stage.blocks) > 1 else f"{i + 1}", f"stages.{i}.blocks.{n}"
            names |= blocks(f"layer{number}", f"{ours}.low", block.low)
            names |= blocks(f"layer{number}_", f"{ours}.high", block.high)
            names |= pair(f"compression{number}", f"{ours}.compress")
            names |= pair(f"down{number}", f"{ours}.down.0") | pair(f"down{number}", f"{ours}.down.1", 3)
    return names


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``DualResNet`` for classification."""
    theirs = Released(state_dict, "the authors' DualResNet")
    return theirs.close(by_prefix(theirs, names_of(model), model))


#: Settings of the trunk by size.
SIZES: dict[str, dict[str, Any]] = {
    "ddrnet_23_slim": dict(dim=32),
    "ddrnet_23": dict(),
    "ddrnet_39": dict(depths=(3, 4, 6, 3), exchanges=(2, 1)),
}

register_models(
    "ddrnet-dappm",
    ddrnet,
    {**SIZES, "ddrnet_23_slim": dict(dim=32, last_dim=1024)},
    params={"ddrnet_23_slim": 7_574_664, "ddrnet_23": 28_216_616, "ddrnet_39": 40_130_344},
    license="MIT",
    source="ydhongHIT/DDRNet",
    convert=convert,
)
