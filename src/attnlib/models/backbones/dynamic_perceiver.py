"""Dynamic Perceiver: latents beside a CNN that classify early, so that its own features need not.

Han et al., 2023, "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248. Beside each of four stages of
a CNN stand a few latents, which exchange with the map before the stage
(:class:`attnlib.nn.dense.dynamic_perceiver.LatentExchange`; the first stage's are only told) and go through blocks of
self-attention. From stage to stage they become half as many, by a linear map over tokens, and as wide as the next map.
After the last stage the map reads the latents once more. There are four exits:

    y_1 = f_1(mean z_3),   y_2 = f_2([mean z_4, r(y_1)]),   y_3 = f_3(mean x_4),
    y_4 = f_4(norm([mean x_4', mean z_4, r'(y_2)])),        r(y) = relu(norm(W y))

where ``x_4'`` is the map with what it read. The first is reached before the third stage of the CNN, the second before
the fourth. The model is an :class:`attnlib.models.exits.EarlyExit`: called as any other it gives the last exit's
logits, ``model.exits(x)`` gives all, ``model.predict(x, thresholds)`` lets samples leave.

Differs from the authors' code: images and maps of any size; pixels that do not exist are not read; a constructor runs
nothing and writes no file; the CNN's own classifier is not run where only the last exit is asked for. How deep latents
go is an argument of their training script: sizes here have that of the README's command for their CNN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_ints, check_real, checked
from ...nn.dense.dynamic_perceiver import LatentExchange
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import masked_mean
from ...nn.recompute import checkpointed
from ...nn.released import Released
from ...types import State
from ..blocks import Block, Chain, Make, Place, check_stages
from ..build import register_models
from ..exits import EarlyExit, exit_losses
from .convs import ConvBlock, ConvStage, InvertedResidual, ResidualBlock, by_prefix, conv_names, divisible
from .mobilenetv3 import mobilenetv3
from .regnet import regnet
from .resnet import resnet
from .stages import Backbone


class Condense(nn.Module):
    """Half as many latents, by a linear map over tokens behind a norm over tokens; then another width."""

    def __init__(self, tokens: int, dim: int, out_dim: int):
        super().__init__()
        self.mix_norm, self.mix = nn.LayerNorm(tokens), nn.Linear(tokens, tokens // 2)
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, out_dim)

    def forward(self, z: Tensor) -> Tensor:
        """(B, n, dim) -> (B, n // 2, out_dim)."""
        return self.fc(self.norm(self.mix(self.mix_norm(z.mT)).mT))


class TwoStreamStage(ConvStage):
    """Convolutions as a stage of the CNN, and before them what happens between their map and the latents.

    Args:
        blocks: of the CNN.
        condense: what latents go through first; ``None`` in the first stage.
        exchange: called as ``exchange(x, z, valid=...)``; ``None`` for none.
        latents: blocks that latents go through afterwards.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], condense: nn.Module | None, exchange: nn.Module | None,
        latents: Iterable[nn.Module],
    ):  # fmt: skip
        super().__init__(blocks)
        self.condense, self.exchange, self.latents = condense, exchange, nn.ModuleList(latents)

    def read(
        self, x: Tensor, z: Tensor, valid: Tensor | None = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The map (B, H, W, C) before the convolutions, and latents: both with what they read."""
        again = self.checkpointing and losses is None
        z = z if self.condense is None else self.condense(z)
        if self.exchange is not None:
            x, z = self.exchange(x, z, valid=(valid, None))
        carry: Any = None
        for block in self.latents:
            z, carry = checkpointed(block, z, None, carry, losses, when=again)
        return x, z


class ExitHeads(nn.Module):
    """Four classifiers: of latents, twice, of the CNN's map, and of both; later ones of latents read earlier logits.

    Args:
        dims: width of the latents at the first and at the second exit, and of the last map.
        num_classes: 0 for no classifiers: what the last one would read is given.
        reuse: the second exit reads the logits of the first, the last one those of the second.
        hidden: width of a layer with hard swish before the CNN's and the last classifier; 0 for none.
        drop: dropout in training, before the CNN's classifier, and with ``hidden`` before the last.
    """

    pools = ("avg",)

    def __init__(
        self, dims: tuple[int, int, int], num_classes: int, reuse: bool = True, hidden: int = 0, drop: float = 0.0
    ):
        super().__init__()
        first, second, last = dims
        self.told = second if reuse else 0
        self.dims = (first, second + self.told, last, last + second + self.told)
        self.hidden = hidden
        self.norm = nn.BatchNorm1d(self.dims[3])
        self.pre = nn.ModuleList(nn.Linear(dim, hidden) for dim in self.dims[2:] if hidden)
        self.act = nn.Hardswish() if hidden else nn.Identity()
        self.drop = nn.Dropout(check_real("drop_rate", drop, least=0, below=1))
        self.reuse, self.fc = nn.ModuleList(), nn.ModuleList()
        self.reset(num_classes)

    def reset(self, num_classes: int, pool: str | None = None) -> None:
        """New classifiers, and new ways from logits to the next exit."""
        if pool is not None:
            check_choice("global_pool", pool, self.pools)
        widths = (*self.dims[:2], *((self.hidden,) * 2 if self.hidden else self.dims[2:]))
        told = [self.told] * 2 if self.told and num_classes else []
        self.fc = nn.ModuleList(nn.Linear(width, num_classes) for width in widths if num_classes)
        self.reuse = nn.ModuleList(
            nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU()) for width in told
        )
        self.to(self.norm.weight.device, self.norm.weight.dtype)

    def forward(
        self, exit: int, read: Tensor, earlier: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:  # fmt: skip
        """(B, C) that an exit reads, and the logits of the latents' exit before it -> (B, num_classes)."""
        if exit % 2 and self.norm.training and len(read) == 1:
            raise ValueError("x holds one image, which has no statistics: batch norms of exits train on two or more")
        if exit % 2 and self.told:
            told = self.reuse[exit // 2](earlier) if len(self.reuse) else read.new_zeros(len(read), self.told)
            read = torch.cat([read, told], 1)
        if exit == 3:
            read = self.norm(read)
        if exit >= 2 and self.hidden:
            read = self.act(self.pre[exit - 2](read))
        if exit == 2 or (exit == 3 and self.hidden):
            read = self.drop(read)
        return read if pre_logits or not len(self.fc) else self.fc[exit](read)


class Output(NamedTuple):
    """What a :class:`DynamicPerceiver` gives with ``returns``: the last exit's logits, those of all, losses."""

    y: Tensor
    exits: tuple[Tensor, ...] | None
    losses: dict[str, Tensor] | None


class DynamicPerceiver(EarlyExit, Backbone):
    """A CNN of four stages with latents beside it, and four exits.

    ``forward_features`` gives what the last exit reads: the last map, the latents, the second exit's logits. The maps
    to take are those of the CNN's stages.

    Args:
        stem: of the CNN.
        stages: the :class:`TwoStreamStage` s.
        dims: width of the stem's and of every stage's map.
        reductions: pixels per token behind every stage.
        last: what the last map reads the latents with; ``None`` for nothing.
        head: the :class:`ExitHeads`.
        num_latents: of the first stage.
        settings: of :class:`attnlib.models.backbones.stages.Backbone`.
    """

    head_names = ("head.fc.", "head.reuse.")
    num_exits = 4
    #: Of the cross-entropies in :meth:`loss`, as of the README's training command.
    loss_weights = (0.5, 0.5, 1.0, 1.0)

    def __init__(
        self, stem: nn.Module, stages: Sequence[nn.Module], dims: Sequence[int], reductions: Sequence[int],
        last: nn.Module | None, head: ExitHeads, num_latents: int, **settings: Any,
    ):  # fmt: skip
        of_head: Any = head
        super().__init__(stem, stages, dims[1:], reductions, None, of_head, **settings)
        self.last = last
        self.latents = nn.Parameter(torch.empty(num_latents, dims[0]))
        nn.init.trunc_normal_(self.latents, std=0.02)
        self.head_hidden_size = head.hidden or head.dims[3]

    # ---- from exit to exit

    def begin(self, x: Tensor, valid: Tensor | None = None) -> State:
        """The stem's map, and the latents."""
        self._check_images(x, valid)
        x, valid = self.stem(x.permute(0, 2, 3, 1).contiguous(), valid)
        return self._state(x, self.latents.to(x.dtype).repeat(len(x), 1, 1), valid)

    def advance(
        self, exit: int, state: State, losses: dict[str, Tensor] | None = None, logits: bool = True
    ) -> tuple[Tensor, State]:
        """To exit ``exit``: its logits, and what goes on. The CNN's classifier is left out without ``logits``."""
        x, z, valid = self._parts(state)
        earlier = state.tensors.get("logits")
        if exit == 3:
            x = x if self.last is None else self.last(x, z, valid=(valid, None))[0]
            y = self.head(3, torch.cat([masked_mean(x, valid), z.mean(1)], 1), earlier)
            return y, self._state(x, z, valid, y)
        for at in ((0, 1), (2,), (3,))[exit]:
            if at < 2:
                x, z = self._stage(at).read(x, z, valid, losses)
            x, valid = self._stage(at)(x, valid, losses)
        if exit == 2:
            y = self.head(2, masked_mean(x, valid)) if logits else x.new_empty(0)
            return y, self._state(x, z, valid, earlier)
        x, z = self._stage(exit + 2).read(x, z, valid, losses)
        y = self.head(exit, z.mean(1), earlier)
        return y, self._state(x, z, valid, y)

    def _stage(self, at: int) -> Any:
        return self.stages[at]

    @staticmethod
    def _state(x: Tensor, z: Tensor, valid: Tensor | None, logits: Tensor | None = None) -> State:
        held = {"x": x, "z": z, "valid": valid, "logits": logits}
        return State({name: t for name, t in held.items() if t is not None})

    @staticmethod
    def _parts(state: State) -> tuple[Tensor, Tensor, Tensor | None]:
        return state["x"], state["z"], state.tensors.get("valid")

    # ---- the call

    def forward(self, x: Tensor, valid: Tensor | None = None, returns: Sequence[str] = ()) -> Any:
        """(B, in_chans, H, W) -> (B, num_classes), of the last exit.

        Args:
            x: images.
            valid: (B, H, W) boolean, which pixels exist.
            returns: ``"exits"`` and ``"losses"`` for an :class:`Output` with the logits of all exits, and with the
                losses of mechanisms.
        """
        if isinstance(returns, str) or set(returns) - {"exits", "losses"}:
            raise ValueError(f"returns={returns!r} is not possible; possible: () and any of 'exits', 'losses'")
        losses: dict[str, Tensor] | None = {} if "losses" in returns else None
        state, ys = self.begin(x, valid), []
        for exit in range(self.num_exits):
            y, state = self.advance(exit, state, losses, exit != 2 or "exits" in returns)
            ys.append(y)
        return Output(ys[-1], tuple(ys) if "exits" in returns else None, losses) if returns else ys[-1]

    def loss(
        self, exits: Sequence[Tensor], target: Tensor, distillation: float = 0.5, temperature: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Terms of the loss of :meth:`exits`, with self-distillation: see :func:`attnlib.models.exits.exit_losses`."""
        return exit_losses(exits, target, self.loss_weights, distillation, temperature, label_smoothing)

    def _maps(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        x, z, valid = self._parts(self.begin(x, valid))
        for at in range(len(self.stages) if last is None else last + 1):
            x, z = self._stage(at).read(x, z, valid, losses)
            x, valid = self._stage(at)(x, valid, losses)
            yield x, valid

    def forward_features(self, x: Tensor, valid: Tensor | None = None) -> Any:
        """(B, in_chans, H, W) -> (B, h, w, C), (B, n, C') and (B, num_classes): the last map, latents, logits."""
        state = self.begin(x, valid)
        for exit in range(3):
            _, state = self.advance(exit, state, None, False)
        x, z, valid = self._parts(state)
        x = x if self.last is None else self.last(x, z, valid=(valid, None))[0]
        return x, z, state["logits"]

    def forward_head(self, x: Any, pre_logits: bool = False, valid: Tensor | None = None) -> Tensor:
        """What :meth:`forward_features` gives -> (B, num_classes), or what the last linear map reads."""
        features, z, earlier = x
        return self.head(3, torch.cat([masked_mean(features, valid), z.mean(1)], 1), earlier, pre_logits)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters stand at which depth, for layer-wise learning rates."""
        return {"stem": r"^(stem|latents)", "blocks": [(r"^stages\.(\d+)", None), (r"^last", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Learned latents, and learned vectors on keys."""
        return super().no_weight_decay() | {"latents"}


# ---- from a CNN


def _width(block: nn.Module) -> int:
    conv = {ResidualBlock: "conv3", InvertedResidual: "project", ConvBlock: "conv"}[type(block)]
    return int(getattr(block, conv).conv.out_channels)


@checked
def with_latents(
    cnn: Backbone,
    cuts: Sequence[int] | None = None,
    num_latents: int = 128,
    latent_depths: Sequence[int] = (3, 3, 9, 3),
    num_heads: Sequence[int] = (1, 2, 4, 8),
    mlp_ratio: float = 4.0,
    grid: int = 7,
    latents_read: bool = True,
    features_read: bool = True,
    depthwise: bool = True,
    last_read: bool = True,
    reuse: bool = True,
    hidden: int = 0,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> DynamicPerceiver:
    """A Dynamic Perceiver on a CNN, whose modules it takes.

    Args:
        cnn: a ResNet, RegNet or MobileNetV3, without a head.
        cuts: how many of its blocks belong to the stem and to each of four stages; its own four stages by default.
        num_latents: in the first stage; half as many in each of the next.
        latent_depths: blocks of self-attention per stage.
        num_heads: their heads per stage.
        mlp_ratio: hidden width of their MLPs over the width.
        grid: cells a side that latents read.
        latents_read, features_read: the two directions of the exchanges; without the first, latents read in the first
            stage only.
        depthwise: convolutions before latents read.
        last_read: whether the last map reads latents.
        reuse: whether exits read the logits of earlier ones.
        hidden: width of a layer before the last two classifiers; 0 for none.
        mechanism: takes the place of self-attention among latents, as in :func:`attnlib.create_model`.
        num_classes, drop_rate, global_pool: as in :func:`attnlib.create_model`.

    Raises:
        ValueError: a CNN that is not cut into four stages, numbers that are not four, too few latents to be halved.
    """
    check_choice("global_pool", global_pool, ExitHeads.pools)
    check_int("num_latents", num_latents, least=8)
    depths, heads = check_ints("latent_depths", latent_depths, least=1), check_ints("num_heads", num_heads, least=1)
    check_stages(4, latent_depths=depths, num_heads=heads)
    check_real("mlp_ratio", mlp_ratio, above=0)
    check_int("hidden", hidden, least=0)
    stages: list[Any] = list(cnn.stages)
    blocks = [block for stage in stages for block in stage.blocks]
    counts = [0, *(len(stage.blocks) for stage in stages)] if cuts is None else [*check_ints("cuts", cuts, least=0)]
    if len(counts) != 5 or sum(counts) != len(blocks) or 0 in counts[1:]:
        raise ValueError(f"cuts={counts[1:]} must cut the {len(blocks)} blocks of the CNN into four stages")
    stem: nn.Module = cnn.stem
    pool = stages[0].downsample
    rows = [[blocks.pop(0) for _ in range(count)] for count in counts]
    if pool is not None or rows[0]:
        stem = Chain(stem, *([pool] if pool is not None else []), *([ConvStage(rows[0])] if rows[0] else []))
    info: Any = cnn.feature_info[0]
    width = int(info["num_chs"]) if cnn.before else 0
    first: Any = rows[0][-1] if rows[0] else None
    dims = [_width(first) if first is not None else width, *(_width(row[-1]) for row in rows[1:])]
    step = (2 if pool is None else 4) * math.prod(int(block.stride) for block in rows[0])
    made, steps = [], []
    for i, row in enumerate(rows[1:]):
        step *= math.prod(int(block.stride) for block in row)
        steps.append(step)
        dim = dims[i]
        exchange = None
        if latents_read or not i or features_read:
            exchange = LatentExchange(
                (dim, dim), grid, features_read and i > 0, latents_read or not i, 7 if depthwise else 0
            )  # fmt: skip
        mixers = []
        for j in range(depths[i]):
            place = Place(dim, heads[i], i, j, sum(depths[:i]) + j, depths[i], stride=step)
            mixer = SoftmaxAttention(dim, heads[i], qkv_bias=False) if mechanism is None else mechanism(place)
            mixers.append(Block(dim, mixer, mlp_ratio=mlp_ratio))
        condense = Condense(num_latents >> i - 1, dims[i - 1], dim) if i else None
        made.append(TwoStreamStage(row, condense, exchange, mixers))
    last = LatentExchange((dims[4], dims[3]), latents_read=False) if last_read else None
    head = ExitHeads((dims[2], dims[3], dims[4]), num_classes, reuse, hidden, drop_rate)
    model = DynamicPerceiver(
        stem, made, dims, steps, last, head, num_latents, num_classes=num_classes, in_chans=cnn.in_chans,
        img_size=cnn.img_size,
    )  # fmt: skip
    model.input_name = f"stem.{'0.' if stem is not cnn.stem else ''}0.conv.weight"
    return model


def _start(model: DynamicPerceiver) -> DynamicPerceiver:
    """Grouped convolutions of the CNN start as others of their width: their groups do not count, as released."""
    for part in (model.stem, *(stage.blocks for stage in model.stages)):  # type: ignore[union-attr]
        for conv in part.modules():  # type: ignore[union-attr, operator]
            if isinstance(conv, nn.Conv2d) and conv.groups > 1:
                fan_out = conv.out_channels * math.prod(conv.kernel_size)
                nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    return model


def regnet_perceiver(
    initial: int = 56,
    slope: float = 38.84,
    factor: float = 2.4,
    depth: int = 14,
    group: int = 16,
    exact: bool = False,
    squeeze: float = 0.25,
    stem_dim: int = 32,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    **settings: Any,
) -> DynamicPerceiver:
    """A Dynamic Perceiver on a RegNetY.

    Args:
        initial, slope, factor, depth, group, exact, squeeze, stem_dim, in_chans, img_size, drop_path_rate: as of
            :func:`attnlib.models.backbones.regnet.regnet`.
        num_classes: of all exits.
        settings: of :func:`with_latents`.
    """
    cnn = regnet(
        initial, slope, factor, depth, group, exact, squeeze, stem_dim, num_classes=0, in_chans=in_chans,
        img_size=img_size, drop_path_rate=check_real("drop_path_rate", drop_path_rate, least=0, below=1),
    )  # fmt: skip
    model = _start(with_latents(cnn, num_classes=num_classes, **settings))
    for stage in model.stages:
        for block in stage.blocks:  # type: ignore[union-attr]
            nn.init.ones_(block.conv3.norm.weight)
            if block.squeeze is not None:
                for layer in (block.squeeze.fc1, block.squeeze.fc2):
                    bound = layer.in_features**-0.5
                    nn.init.uniform_(layer.bias, -bound, bound)
    if num_classes:
        own: Any = model.head.fc
        nn.init.normal_(own[2].weight, std=0.01)
        nn.init.zeros_(own[2].bias)
    return model


def resnet_perceiver(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (3, 4, 6, 3),
    basic: bool = False,
    stem_dim: int = 64,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.2,
    drop_rate: float = 0.2,
    **settings: Any,
) -> DynamicPerceiver:
    """A Dynamic Perceiver on a ResNet.

    Args:
        embed_dims, depths, basic, stem_dim, in_chans, img_size, drop_path_rate: as of
            :func:`attnlib.models.backbones.resnet.resnet`.
        num_classes: of all exits.
        drop_rate: dropout before the CNN's classifier.
        settings: of :func:`with_latents`.
    """
    rate = check_real("drop_path_rate", drop_path_rate, least=0, below=1)
    cnn = resnet(
        embed_dims, depths, basic, stem_dim=stem_dim, num_classes=0, in_chans=in_chans, img_size=img_size,
        drop_path_rate=rate,
    )  # fmt: skip
    return with_latents(cnn, num_classes=num_classes, drop_rate=drop_rate, **settings)


#: Blocks of the large MobileNetV3 in the stem and in each of four stages.
CUTS = (2, 2, 3, 6, 3)


def mobilenetv3_perceiver(
    width: float = 1.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.2,
    **settings: Any,
) -> DynamicPerceiver:
    """A Dynamic Perceiver on the large MobileNetV3, cut where its maps get smaller next.

    Args:
        width: of the CNN over that of the paper.
        num_classes: of all exits.
        drop_rate: dropout before the last two classifiers.
        in_chans, img_size, drop_path_rate: as of :func:`attnlib.models.backbones.mobilenetv3.mobilenetv3`.
        settings: of :func:`with_latents`.
    """
    check_real("width", width, above=0)
    cnn = mobilenetv3(
        "large", width, eps=1e-3, momentum=0.01, num_classes=0, in_chans=in_chans, img_size=img_size,
        drop_path_rate=check_real("drop_path_rate", drop_path_rate, least=0, below=1), stem_dim=divisible(16 * width),
        scale_hidden=True,
    )  # fmt: skip
    return _start(
        with_latents(
            cnn, CUTS, num_classes=num_classes, drop_rate=drop_rate, **{"hidden": divisible(1280 * width), **settings}
        )
    )


def _names(model: DynamicPerceiver) -> dict[str, str]:
    """From the authors' names of parts to ours; those of other CNNs stand beside them."""
    names = {
        "early_classifier3": "head.fc.0", "classifier_att": "head.fc.1", "classifier_cnn": "head.fc.2",
        "classifier_cnn.0": "head.pre.0", "classifier_cnn.3": "head.fc.2", "classifier_merge.0": "head.norm",
    }  # fmt: skip
    if model.head.hidden:
        names |= {"classifier_merge.1": "head.pre.1", "classifier_merge.4": "head.fc.3"}
    else:
        names["classifier_merge.1"] = "head.fc.3"
    for i in range(2):
        names |= {f"isc{i + 3}.{part}": f"head.reuse.{i}.{part}" for part in (0, 1)}
    for i in range(3):
        ours = f"stages.{i + 1}.condense"
        names |= {f"token_mixer.{i}.0": f"{ours}.mix_norm", f"token_mixer.{i}.1": f"{ours}.mix"}
        names |= {f"token_expander.{i}.0": f"{ours}.norm", f"token_expander.{i}.1": f"{ours}.fc"}
    chain = isinstance(model.stem, Chain)
    conv = "stem.0.0" if chain else "stem.0"
    names |= conv_names("cnn_stem.", conv, "0", "1") | conv_names("cnn_stem.0.", conv, "0", "1")
    rows: list[tuple[str, str, Any]] = []
    if chain and isinstance(model.stem[-1], ConvStage):  # type: ignore[index]
        at = len(model.stem) - 1  # type: ignore[arg-type]
        rows += [(f"cnn_stem.{j + 1}", f"stem.{at}.blocks.{j}", b) for j, b in enumerate(model.stem[at].blocks)]  # type: ignore[index, union-attr, arg-type]
    for i, stage in enumerate(model.stages, 1):
        for j, block in enumerate(stage.blocks):  # type: ignore[union-attr, arg-type]
            regnet_name = f"cnn_body.block{i}.block{i}-{j}"
            rows += [(t, f"stages.{i - 1}.blocks.{j}", block) for t in (f"cnn_body_stage{i}.{j}", regnet_name)]
    for theirs, ours, block in rows:
        names |= _block_names(theirs, ours, block)
    return names


def _block_names(theirs: str, ours: str, block: Any) -> dict[str, str]:
    if isinstance(block, ConvBlock):
        return conv_names(f"{theirs}.", f"{ours}.conv", "0", "1")
    names: dict[str, str] = {}
    if isinstance(block, InvertedResidual):
        parts = [part for part in ("expand", "depthwise", "squeeze", "project") if getattr(block, part) is not None]
        for i, part in enumerate(parts):
            names |= conv_names(f"{theirs}.block.{i}.", f"{ours}.{part}", "0", "1")
            names |= {f"{theirs}.block.{i}.fc{n}": f"{ours}.squeeze.fc{n}" for n in (1, 2) if part == "squeeze"}
        return names
    convs = ["conv1", "conv2", "conv3"] if block.conv2 is not None else ["conv1", "conv3"]
    for i, conv in enumerate(convs):
        names |= conv_names(f"{theirs}.f.{'abc'[i]}.", f"{ours}.{conv}", "0", "1")
        names |= conv_names(f"{theirs}.", f"{ours}.{conv}", f"conv{i + 1}", f"bn{i + 1}")
    names |= {f"{theirs}.f.se.fc{n}": f"{ours}.squeeze.fc{n}" for n in (1, 2)}
    for shortcut in ("proj", "downsample"):
        names |= conv_names(f"{theirs}.{shortcut}.", f"{ours}.shortcut.conv", "0", "1")
    return names


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``DynPerceiver`` on a RegNet, a ResNet or a MobileNetV3."""
    theirs = Released(state_dict, "the authors' DynPerceiver")
    out = {"latents": theirs.take("latent")}
    exchanges: dict[str, dict[str, Tensor]] = {}
    for match, value in theirs.matching(r"(dwc|cross_att)(\d)_(x2z|z2x)\.(.+)"):
        kind = "dwc" if match[1] == "dwc" else match[3]
        exchanges.setdefault(f"stages.{int(match[2]) - 1}.exchange", {})[f"{kind}.{match[4]}"] = value
    for match, value in theirs.matching(r"last_cross_att_z2x\.(.+)"):
        exchanges.setdefault("last", {})[f"z2x.{match[1]}"] = value
    for name, part in exchanges.items():
        out |= {f"{name}.{key}": value for key, value in LatentExchange.convert_state_dict(part).items()}
    block, to = r"self_att(\d)\.(\d+)", lambda m: f"stages.{int(m[1]) - 1}.latents.{m[2]}"  # noqa: E731
    out |= theirs.renamed(
        {
            rf"{block}\.self_attn\.norm\.(weight|bias)": lambda m, value: {f"{to(m)}.mixer.norm.{m[3]}": value},
            rf"{block}\.self_attn\.attention\.([qkvo])_proj\.(weight|bias)": lambda m, value: {
                f"{to(m)}.mixer.inner.{'proj' if m[3] == 'o' else m[3]}.{m[4]}": value
            },
            rf"{block}\.mlp\.layernorm\.(weight|bias)": lambda m, value: {f"{to(m)}.mlp.norm.{m[3]}": value},
            rf"{block}\.mlp\.(fc[12])\.(weight|bias)": lambda m, value: {f"{to(m)}.mlp.inner.{m[3]}.{m[4]}": value},
        }
    )
    return theirs.close(out | by_prefix(theirs, _names(model), model))


# ---- sizes


def _resnet50(share: float) -> dict[str, Any]:
    return dict(embed_dims=tuple(int(dim * share) for dim in (64, 128, 256, 512)), stem_dim=int(64 * share))


_REGNETS: dict[str, dict[str, Any]] = {
    "reg400m": dict(initial=48, slope=27.89, factor=2.09, group=8, depth=16),
    "reg800m": dict(),
    "reg1x6g": dict(initial=48, slope=20.71, factor=2.65, group=24, depth=27),
    "reg3x2g": dict(initial=80, slope=42.63, factor=2.66, group=24, depth=21),
}
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": dict(depths=(2, 2, 2, 2), basic=True), "resnet34": dict(basic=True), "resnet50": dict(),
    "resnet50_0375": _resnet50(0.375), "resnet50_050": _resnet50(0.5), "resnet50_0625": _resnet50(0.625),
    "resnet50_075": _resnet50(0.75),
}  # fmt: skip
_MOBILENETS: dict[str, dict[str, Any]] = {
    "mobilenetV3": dict(), "mobilenetV3_0x5": dict(width=0.5), "mobilenetV3_0x75": dict(width=0.75),
    "mobilenetV3_1x25": dict(width=1.25), "mobilenetV3_1x5": dict(width=1.5), "mobilenetV3_2x0": dict(width=2.0),
}  # fmt: skip
#: Parameters by the CNN and the number of latents.
_PARAMS: dict[str, dict[int, int]] = {
    "reg400m": {32: 11_592_972, 64: 11_596_152, 128: 11_606_544, 256: 11_643_456, 512: 11_781_792},
    "reg800m": {32: 21_784_788, 64: 21_787_968, 128: 21_798_360, 256: 21_835_272, 512: 21_973_608},
    "reg1x6g": {128: 27_161_246, 256: 27_198_158, 512: 27_336_494},
    "reg3x2g": {128: 62_743_346, 256: 62_780_258, 512: 62_918_594},
    "resnet18": {128: 19_826_064, 256: 19_867_072, 512: 20_013_600},
    "resnet34": {128: 29_934_224, 256: 29_975_232, 512: 30_121_760},
    "resnet50": {64: 125_531_256, 128: 125_543_696, 256: 125_584_704, 512: 125_731_232},
    "resnet50_0375": {64: 20_273_456, 128: 20_283_336, 256: 20_319_224},
    "resnet50_050": {64: 34_176_984, 128: 34_187_376, 256: 34_224_288},
    "resnet50_0625": {128: 51_665_432, 160: 51_672_900, 192: 51_681_712, 256: 51_703_368},
    "resnet50_075": {128: 72_717_504, 256: 72_756_464},
    "mobilenetV3": {128: 15_162_448, 256: 15_198_336, 512: 15_334_624},
    "mobilenetV3_0x5": {128: 4_698_264, 256: 4_733_128, 512: 4_867_368},
    "mobilenetV3_0x75": {128: 9_299_040, 256: 9_334_928, 512: 9_471_216},
    "mobilenetV3_1x25": {128: 22_730_000, 256: 22_766_912, 512: 22_905_248},
    "mobilenetV3_1x5": {128: 31_559_632, 256: 31_597_568, 512: 31_737_952},
    "mobilenetV3_2x0": {128: 53_647_240, 256: 53_686_200, 512: 53_828_632},
}  # fmt: skip

for _make, _cnns, _depths in (
    (regnet_perceiver, _REGNETS, (3, 3, 9, 6)),
    (resnet_perceiver, _RESNETS, (3, 3, 9, 3)),
    (mobilenetv3_perceiver, _MOBILENETS, (3, 3, 9, 9)),
):
    register_models(
        "dynamic-perceiver",
        _make,
        {
            f"{name}_perceiver_t{count}": dict(**settings, num_latents=count, latent_depths=_depths)
            for name, settings in _cnns.items()
            for count in _PARAMS[name]
        },
        params={f"{name}_perceiver_t{count}": params for name in _cnns for count, params in _PARAMS[name].items()},
        license="MIT",
        source="LeapLabTHU/Dynamic_Perceiver",
        convert=convert,
    )
