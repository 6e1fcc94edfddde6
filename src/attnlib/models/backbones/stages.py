"""The skeleton of vision backbones: stem, stages of blocks, norm, head; and timm's way of asking for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints, check_real, check_valid, describe
from ...nn.base import check_weights
from ...nn.layers import masked_mean, normed
from ...nn.recompute import checkpointed

#: Tables of positions and learned tokens, which weight decay would pull to zero.
UNDECAYED = re.compile(r"(rel_bias|rpb|pos_embed|absolute_pos\w*|relative_position_bias_table|\w+_token)$")

#: What timm's data pipeline reads, where a model says nothing else.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Stage(nn.Module):
    """Downsampling, then blocks; a carry goes from block to block and ends here.

    Args:
        blocks: called as ``block(x, valid, carry, losses) -> (x, carry)``.
        downsample: called as ``downsample(x, valid) -> (x, valid)`` before the blocks; ``None`` for none.
        norm: of what the blocks give; ``None`` for none.
    """

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None = None, norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.checkpointing = False

    def forward(
        self, x: Tensor, valid: Tensor | None = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> (B, H', W', C'), and which of its tokens exist."""
        x, valid, _ = self.carried(x, valid, losses)
        return x, valid

    def carried(
        self, x: Tensor, valid: Tensor | None = None, losses: dict[str, Tensor] | None = None, carry: Any = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The same for a carry that comes from the stage before and goes on to the next."""
        if self.downsample is not None:
            x, valid = self.downsample(x, valid)
        for block in self.blocks:
            made = checkpointed(block, x, valid, carry, losses, when=self.checkpointing and losses is None)
            x, valid, carry = self._after(made, valid)
        return (x if self.norm is None else normed(self.norm, x, valid)), valid, carry

    @staticmethod
    def _after(made: Any, valid: Tensor | None) -> tuple[Tensor, Tensor | None, Any]:
        """What a block gave, as map, which of its tokens exist, and carry."""
        x, carry = made
        return x, valid, carry


class Head(nn.Module):
    """Pool, norm, dropout, ``[hidden layer], linear map`` of the final map.

    Args:
        dim: width of the map.
        num_classes: 0 for no linear map.
        pool: ``"avg"``, ``"max"`` or ``""``.
        norm: makes a norm behind the pool; ``None`` for none.
        drop: dropout in training.
        hidden: width of a layer before the last, with ``activation``; 0 for none.
        activation: of that layer.
        classifier: makes the last map from two widths.
        hidden_bias: bias of the hidden layer.
    """

    #: What ``pool`` can be.
    pools: ClassVar[tuple[str, ...]] = ("avg", "max", "")

    def __init__(
        self,
        dim: int,
        num_classes: int,
        pool: str = "avg",
        norm: Callable[[int], nn.Module] | None = None,
        drop: float = 0.0,
        hidden: int = 0,
        activation: Callable[[], nn.Module] = nn.Tanh,
        classifier: Callable[[int, int], nn.Module] = nn.Linear,
        hidden_bias: bool = True,
    ):
        super().__init__()
        check_choice("global_pool", pool, self.pools)
        self.pool, self.dim, self.hidden, self.classifier = pool, dim, hidden, classifier
        self.norm = nn.Identity() if norm is None else norm(dim)
        self.pre = nn.Linear(dim, hidden, bias=hidden_bias) if hidden else None
        self.act = activation() if hidden else None
        self.drop = nn.Dropout(check_real("drop_rate", drop, least=0, below=1))
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int, pool: str | None = None) -> None:
        """A new linear map."""
        if pool is not None:
            check_choice("global_pool", pool, self.pools)
            self.pool = pool
        like = next(self.parameters(), None)
        width = self.hidden or self.dim
        self.fc = nn.Identity()
        if num_classes:
            self.fc = fc = self.classifier(width, num_classes)
            if isinstance(fc, nn.Linear):
                nn.init.trunc_normal_(fc.weight, std=0.02)
                nn.init.zeros_(fc.bias)
        if like is not None:
            self.fc.to(like.device, like.dtype)

    def forward(self, x: Tensor, valid: Tensor | None = None, pre_logits: bool = False) -> Tensor:
        """(B, H, W, C) -> (B, num_classes), or what stands before the linear map."""
        if self.pool == "avg":
            x = masked_mean(x, valid)
        elif self.pool == "max":
            x = x if valid is None else x.masked_fill(~valid.unsqueeze(-1), float("-inf"))
            x = x.flatten(1, -2).amax(1)
        x = self.norm(x)
        if self.pre is not None and self.act is not None:
            x = self.act(self.pre(x))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class Output(NamedTuple):
    """What a backbone gives with ``returns``."""

    y: Tensor
    losses: dict[str, Tensor]


class Backbone(nn.Module):
    """``stem -> stages -> norm -> head`` on images ``(B, in_chans, H, W)`` of any size from one token up.

    It answers to all that timm's models answer to: ``forward_features``, ``forward_head``, ``reset_classifier``,
    ``get_classifier``, ``feature_info``, ``forward_intermediates``, ``group_matcher``, ``set_grad_checkpointing``,
    ``no_weight_decay``, ``pretrained_cfg``. Inside, maps are channels last.

    Args:
        stem: called as ``stem(x, valid) -> (x, valid)`` on (B, H, W, in_chans).
        stages: the :class:`Stage` s.
        dims: width behind every stage.
        reductions: pixels per token behind every stage.
        norm: of the final map; ``None`` for none.
        head: what gives logits.
        num_classes: of the head.
        in_chans: channels of images.
        img_size: side of images that tables of positions are made for.
        stem_level: ``(width, pixels per token)`` of the stem's map, where timm counts it among the maps to take: it is
            level 0 then, and stage i is level i + 1.
    """

    #: Names of the parts that depend on the number of classes.
    head_names: Sequence[str] = ("head.fc.",)
    #: First convolution, which depends on the number of channels.
    input_name: str | None = "stem.proj.weight"
    #: Axes of the grid: 3 for clips (B, in_chans, T, H, W).
    rank: ClassVar[int] = 2
    #: Convolutions beside the first that read the image as well.
    more_inputs: Sequence[str] = ()
    #: Names of the parts that stand behind the maps.
    behind_maps: ClassVar[Sequence[str]] = ("norm", "head")
    output_fmt = "NHWC"

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        reductions: Sequence[int],
        norm: nn.Module | None,
        head: Head,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        stem_level: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        sides = (img_size,) * 2 if isinstance(img_size, int) else tuple(img_size)
        if len(sides) != 2:
            raise ValueError(f"img_size must be one side or (height, width), got {sides}")
        self.img_size = check_ints("img_size", sides, least=1)
        self.num_features = dims[-1]
        self.head_hidden_size = getattr(head, "hidden", 0) or dims[-1]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = nn.Identity() if norm is None else norm
        self.head = head
        self.before = 0 if stem_level is None else 1
        levels = [("stem", *stem_level)] if stem_level is not None else []
        levels += [(f"stages.{i}", *level) for i, level in enumerate(zip(dims, reductions, strict=True))]
        self.feature_info = [{"num_chs": dim, "reduction": step, "module": name} for name, dim, step in levels]

    # ---- the call

    def _check_images(self, x: Tensor, valid: Tensor | None) -> None:
        wrong = not isinstance(x, Tensor) or x.dim() != self.rank + 2 or x.shape[1] != self.in_chans
        if wrong or not x.is_floating_point():
            what = f"images (B, {self.in_chans}, H, W)" if self.rank == 2 else f"clips (B, {self.in_chans}, T, H, W)"
            raise ValueError(f"x must be {what} of floating point, got {describe(x)}")
        check_weights(self, type(self).__name__, {"x": x})
        if min(x.shape[2:]) < 1:
            raise ValueError(f"x must hold at least one pixel, got shape {tuple(x.shape)}")
        if valid is not None:
            check_valid("valid", valid, (x.shape[0], *x.shape[2:]))

    def _maps(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        self._check_images(x, valid)
        # Convolutions give their output the order of their input; in channels-last order all that follows is faster.
        x, valid = self.stem(x.movedim(1, -1).contiguous(), valid)
        if self.before:
            yield x, valid
        for stage in self.stages[: None if last is None else last + 1 - self.before]:  # type: ignore[union-attr]
            x, valid = stage(x, valid, losses)
            yield x, valid

    def _final(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the final norm reads, and which of the final map's tokens exist."""
        *_, out = self._maps(x, valid, losses)
        return out

    def forward_features(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, h, w, C): the final map, normed. ``valid``: (B, H, W), which pixels exist."""
        x, valid = self._final(x, valid)
        return normed(self.norm, x, valid)

    def forward_head(self, x: Tensor, pre_logits: bool = False, valid: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, num_classes), or what the last linear map reads."""
        return self.head(x, valid, pre_logits)

    def forward(self, x: Tensor, valid: Tensor | None = None, returns: Sequence[str] = ()) -> Any:
        """(B, in_chans, H, W) -> (B, num_classes).

        Args:
            x: images.
            valid: (B, H, W) boolean, which pixels exist: images of several sizes in one batch.
            returns: ``("losses",)`` for an :class:`Output` with the losses of mechanisms as well.
        """
        if isinstance(returns, str) or set(returns) - {"losses"}:
            raise ValueError(f"returns={returns!r} is not possible; possible: () and ('losses',)")
        losses: dict[str, Tensor] | None = {} if returns else None
        x, valid = self._final(x, valid, losses)
        y = self.head(normed(self.norm, x, valid), valid)
        return y if losses is None else Output(y, losses)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of chosen stages: ``(final map, [maps])``, or the maps alone, as timm's models give them.

        Args:
            x: images.
            indices: levels; the last n for a number n; all by default. Negative ones count from the end.
            norm: apply the final norm to the last map.
            stop_early: do not run stages behind the last that was asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: return the maps alone.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        count = len(self.feature_info)
        chosen = stage_indices("indices", list(range(count))[-indices:] if isinstance(indices, int) else indices, count)
        last = max(chosen) if stop_early else count - 1
        maps, y = [], x
        for i, (y, _) in enumerate(self._maps(x, None, last=last)):
            if i in chosen:
                made = self.norm(y) if norm and i == count - 1 else y
                maps.append(made.movedim(-1, 1) if output_fmt == "NCHW" else made)
        if intermediates_only:
            return maps
        return (self.norm(y) if last == count - 1 else y), maps

    # ---- what else timm's models answer to

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head: ``num_classes=0`` for none."""
        self.num_classes = check_int("num_classes", num_classes, least=0)
        self.head.reset(num_classes, global_pool)
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the insides of blocks in the backward pass instead of keeping them."""
        check_flag("enable", enable)
        for stage in self.stages:
            stage.checkpointing = enable  # type: ignore[union-attr, assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters stand at which depth, for layer-wise learning rates."""
        blocks: Any = r"^stages\.(\d+)" if coarse else [
            (r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)), (r"^norm", (99999,)),
        ]  # fmt: skip
        return {"stem": r"^stem", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters that are tables of positions or learned tokens."""
        return {name for name, _ in self.named_parameters() if UNDECAYED.search(name)}

    def set_progress(self, progress: float) -> None:
        """Tell mechanisms with a schedule how far training is, from 0 to 1."""
        for module in self.modules():
            if module is not self and hasattr(module, "set_progress"):
                module.set_progress(progress)  # type: ignore[operator]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's data pipeline and training script read."""
        entry = getattr(self, "entry", None)
        side = entry.img_size if entry is not None else 224
        return {
            "architecture": entry.name if entry is not None else type(self).__name__,
            "num_classes": self.num_classes, "input_size": (self.in_chans, side, side), "fixed_input_size": False,
            "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop_pct": 0.9,
            **(entry.data if entry is not None else {}),
            "first_conv": (self.input_name or "").removesuffix(".weight"), "classifier": "head.fc",
            "license": entry.license if entry is not None else "",
        }  # fmt: skip

    default_cfg = pretrained_cfg


def stage_indices(name: str, given: Sequence[int] | None, count: int) -> list[int]:
    """Numbers of stages, from 0; negative ones count from the end.

    Raises:
        ValueError: a stage that is not there.
    """
    if given is None:
        return list(range(count))
    chosen = check_ints(name, tuple(given))
    wrong = [i for i in chosen if not -count <= i < count]
    if wrong or not chosen:
        raise ValueError(f"{name}={list(given)} names stages that are not there; there are {count}: 0 to {count - 1}")
    return sorted({i % count for i in chosen})


class FeatureInfo(list):
    """What is known of the maps, one dictionary each, with timm's questions."""

    def channels(self) -> list[int]:
        return [f["num_chs"] for f in self]

    def reduction(self) -> list[int]:
        return [f["reduction"] for f in self]

    def module_name(self) -> list[str]:
        return [f["module"] for f in self]

    def get_dicts(self) -> list[dict[str, Any]]:
        return [dict(f) for f in self]


def map_info(encoder: Any, name: str = "encoder") -> FeatureInfo:
    """What an encoder tells of the maps that it gives: ours, and timm's, which knows of maps that it does not give.

    Raises:
        ValueError: it tells nothing.
    """
    info = getattr(encoder, "feature_info", None)
    if not info:
        raise ValueError(
            f"{name} must have a feature_info of its maps, as attnlib.create_model(..., features_only=True) has, got "
            f"{describe(encoder)}"
        )
    return FeatureInfo(info.get_dicts() if hasattr(info, "get_dicts") else info)


class Features(nn.Module):
    """The maps of chosen stages of a backbone: ``(B, C, H, W) -> [(B, C_i, H_i, W_i), ...]``, channels-last in memory.

    Args:
        model: the backbone; stages behind the last chosen one, the final norm and the head are let go.
        out_indices: levels of its ``feature_info``, from 0; all by default.
    """

    def __init__(self, model: Backbone, out_indices: Sequence[int] | None = None):
        super().__init__()
        self.out_indices = stage_indices("out_indices", out_indices, len(model.feature_info))
        model.stages = model.stages[: max(self.out_indices) + 1 - model.before]  # type: ignore[assignment]
        for name in model.behind_maps:
            setattr(model, name, nn.Identity())
        self.model = model
        self.feature_info = FeatureInfo({**model.feature_info[i], "index": i} for i in self.out_indices)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Maps of (B, in_chans, H, W) images, in order of their stages."""
        maps = [y for y, _ in self.model._maps(x, valid)]
        return [maps[i].movedim(-1, 1) for i in self.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the backbone."""
        self.model.set_grad_checkpointing(enable)
