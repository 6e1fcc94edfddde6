"""HiDiffusion: a U-Net of Stable Diffusion above the size that it was trained at.

Two things, without training:

* *RAU-Net*: at the first steps the deep stages are fed maps that are smaller by two more, so that their convolutions
  see the size they know and objects do not double. At one place the strided convolution takes four pixels at a time
  (stride 4, padding 2, dilation 2, the same weights), at another maps are pooled by 2 behind the first layer of a
  stage; on the way up they come back to the sizes of the skips, by the nearest pixel and by bicubic interpolation.
* *MSW-MSA*: self-attention at the highest resolution reads windows of half the height and half the width, shifted by
  r = 0 to 3 quarters of a window, r drawn anew at every call: a quarter of the products. Windows wrap around the border
  of the image without a mask.

The places are data, :class:`Table`; :data:`TABLES` holds those of Stable Diffusion 1.5 (and 2.1), SDXL and SDXL Turbo.
With S steps of which s is the current one, the first place acts while ``s < int(S T1)``, the second while
``s < int(S T2)``. An *aggressive* table has its second place while ``s < int(a S)`` and the first after it.
"""

from __future__ import annotations

import fnmatch
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...checks import (
    check_choice,
    check_flag,
    check_grid,
    check_int,
    check_ints,
    check_real,
    check_type,
    shaped,
    to_tuple,
)
from ...grids import block_windows, unblock_windows
from ...hooks.denoiser import CallSite, parameter_names
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from .regions import resized

HOW = ("conv", "pool")

#: Quarters of a window that windows may be shifted by.
SHIFTS = 4


@dataclass(frozen=True)
class Place:
    """Where maps are shrunk by two more.

    Args:
        how: ``"conv"``, by the convolution at the end of a stage, or ``"pool"``, behind its first layer.
        stage: number of the stage on the way down.
    """

    how: str
    stage: int

    def __post_init__(self) -> None:
        check_choice("how", self.how, HOW)
        check_int("stage", self.stage, least=0)


@dataclass(frozen=True)
class Table:
    """What HiDiffusion does in one kind of U-Net.

    Args:
        stages: how many stages the U-Net has on the way down.
        first, second: places of T1 and of T2.
        windows: name patterns of the self-attention that reads windows.
        ratios: T1 and T2 as shares of the steps.
        large_ratios: those from ``large_from`` on.
        large_from: both sides of the latents that are large; ``None`` for none.
        aggressive: a, the share of the steps that the second place has for itself below that size; ``None`` for none.
        controlled: ratios below that size for text to image beside a ControlNet; ``None`` for the same.
    """

    stages: int
    first: Place
    second: Place | None = None
    windows: tuple[str, ...] = ()
    ratios: tuple[float, float] = (0.4, 0.0)
    large_ratios: tuple[float, float] = (0.7, 0.3)
    large_from: int | None = None
    aggressive: float | None = None
    controlled: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_int("stages", self.stages, least=1)
        check_type("first", self.first, Place)
        check_type("second", self.second, (Place, type(None)), "a Place or None")
        check_type("windows", self.windows, (tuple, list), "a sequence of name patterns")

    def shrunk(
        self,
        step: int,
        steps: int,
        sides: Sequence[int],
        ratios: Sequence[float] | None = None,
        aggressive: bool = True,
        controlled: bool = False,
    ) -> tuple[Place, ...]:
        """The places that act at a step.

        Args:
            step, steps: s and S.
            sides: height and width of the latents.
            ratios: in place of the table's own.
            aggressive: whether the share of an aggressive table holds.
            controlled: text to image beside a ControlNet.

        >>> [TABLES["sdxl"].shrunk(s, 50, (256, 256)) for s in (7, 8, 20)]
        [(Place(how='conv', stage=1),), (Place(how='pool', stage=1),), ()]
        """
        large = self.large_from is not None and min(sides) >= self.large_from
        own = self.large_ratios if large else self.controlled if controlled and self.controlled else self.ratios
        one, two = (int(steps * ratio) for ratio in (own if ratios is None else ratios))
        first = step < one
        if aggressive and self.aggressive is not None and not large:
            two = int(self.aggressive * steps)
            first = two <= step < one
        places = [self.first] if first else []
        return (*places, self.second) if self.second is not None and step < two else tuple(places)


#: The authors' tables, by the name of the model.
TABLES = {
    "sd15": Table(
        4, Place("conv", 0), Place("pool", 1),
        tuple(f"{stage}.attentions.*.transformer_blocks.0.attn1" for stage in ("down_blocks.0", "up_blocks.3")),
        large_from=256,
    ),
    "sdxl": Table(
        3, Place("pool", 1), Place("conv", 1),
        tuple(f"{s}.attentions.*.transformer_blocks.{b}.attn1" for s in ("down_blocks.1", "up_blocks.1") for b in "01"),
        large_from=512, aggressive=8 / 50, controlled=(0.5, 0.0),
    ),
    "sdxl-turbo": Table(
        3, Place("pool", 1), None,
        tuple(f"{s}.attentions.*.transformer_blocks.{b}.attn1" for s in ("down_blocks.1", "up_blocks.1") for b in "01"),
        ratios=(0.5, 0.0),
    ),
}  # fmt: skip


def skip_sizes(model: Any, sides: Sequence[int], places: Sequence[Place] = ()) -> list[list[tuple[int, int]]]:
    """Sizes of the maps that each stage of a U-Net on the way down gets, and hands on: ``[[in, out, ...], ...]``.

    Args:
        model: with ``down_blocks`` of ``resnets`` and ``downsamplers``.
        sides: height and width of the latents.
        places: those that act.
    """
    found, size = [], (sides[0], sides[1])
    for number, stage in enumerate(model.down_blocks):
        sizes = [size]
        if Place("pool", number) in places:
            size = (-(-size[0] // 2), -(-size[1] // 2))
        sizes += [size] * len(stage.resnets)
        if getattr(stage, "downsamplers", None):
            by = 4 if Place("conv", number) in places else 2
            size = (-(-size[0] // by), -(-size[1] // by))
            sizes.append(size)
        found.append(sizes)
    return found


@shaped(x="float (B, N, C)")
def shifted_windows(x: Tensor, grid: Sequence[int], shift: int = 0) -> Tensor:
    """(4 B, N / 4, C): the four windows of each image, after it was rolled back by ``shift`` quarters of a window.

    Args:
        x: tokens of images.
        grid: height and width; odd ones are stretched to the next even number, bicubically.
        shift: r, 0 to 3.

    >>> shifted_windows(torch.arange(4.0).view(1, 4, 1), (2, 2)).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    (h, w), window = _windows(grid, shift)
    if x.shape[1] != h * w:
        raise ValueError(f"x must have the {h * w} tokens of grid={(h, w)}, got shape {tuple(x.shape)}")
    pixels = x.unflatten(1, (h, w))
    if h % 2 or w % 2:
        pixels = _stretched(pixels, (2 * window[0], 2 * window[1]))
    pixels = pixels.roll([-(side // 4 * shift) for side in window], (1, 2)) if shift else pixels
    return block_windows(pixels, window).flatten(0, 2).flatten(1, 2)


@shaped(x="float (B, N, C)")
def merge_windows(x: Tensor, grid: Sequence[int], shift: int = 0) -> Tensor:
    """(B, N, C) from (4 B, N / 4, C): the way back from :func:`shifted_windows`."""
    (h, w), window = _windows(grid, shift)
    if len(x) % 4 or x.shape[1] != math.prod(window):
        raise ValueError(
            f"x must be (4 B, {math.prod(window)}, C), four windows of each image of grid={(h, w)}, got "
            f"{tuple(x.shape)}"
        )
    pixels = unblock_windows(x.unflatten(1, window).unflatten(0, (-1, 2, 2)))
    pixels = pixels.roll([side // 4 * shift for side in window], (1, 2)) if shift else pixels
    return (_stretched(pixels, (h, w)) if h % 2 or w % 2 else pixels).flatten(1, 2)


def _windows(grid: Sequence[int], shift: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image, and of a window."""
    h, w = check_grid("grid", grid, (2,))
    check_int("shift", shift, least=0, most=SHIFTS - 1)
    return (h, w), (-(-h // 2), -(-w // 2))


def _stretched(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) at another size."""
    return F.interpolate(pixels.permute(0, 3, 1, 2), size=size, mode="bicubic").permute(0, 2, 3, 1)


class _FourPixels(TorchFunctionMode):
    """Convolutions of 3 x 3 with stride 2 inside it, those of adapters too, take four pixels at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if given["weight"].shape[-2:] == (3, 3) and to_tuple("stride", given.get("stride", 1), 2) == (2, 2):
                self.count += 1
                return func(**{**given, "stride": (4, 4), "padding": (2, 2), "dilation": (2, 2)})
        return func(*args, **(kwargs or {}))


class HiDiffusion(Intervention):
    """A U-Net of Stable Diffusion at sizes above those of its training: whole objects, in less time.

    ::

        with attnlib.attach(pipe, HiDiffusion()):
            pipe("a red circle", height=1024, width=1024)

    Args:
        table: name of one of :data:`TABLES`, or another :class:`Table`; ``None`` for the one whose U-Net this is.
        raunet: smaller maps in the deep stages at the first steps.
        windows: self-attention at the highest resolution in shifted windows.
        ratios: T1 and T2 in place of the table's.
        aggressive: whether an aggressive table is one; ``None`` for yes, but not in inpainting or for models of the
            name "playground", as released.
        seed: of the shifts; every call of the pipeline draws the same, and torch's own generators are not touched.
        steps: how many steps there are, where no pipeline says it.
        control_share: beside a ControlNet, what it adds is left out from this share of the steps on.
        control_size: sides of the latents that a ControlNet is called with at most; ``None`` for those at training of
            the U-Net. What it adds is brought to the sizes of the U-Net's maps, bicubically.

    Raises:
        ValueError: at attach, a transformer, a U-Net without a table, or one whose stages do not end in the convolution
            that a table speaks of; when it is called, steps that are not known or too few for the ratios, videos, or
            the features of a T2I adapter.

    Calls are not counted: steps come from the pipeline, or from ``session.at(step=...)`` and ``steps``. Weights of
    adapters take part. From step T1 on, without windows, the model is itself bit for bit.

    The authors' code draws shifts from torch's generator, which changes what a seed gives, counts forwards, and leaves
    an image unshifted whose windows are less than four tokens high.

    Reference: Zhang et al., 2023, arXiv 2311.17528; held to the authors' code.

    >>> HiDiffusion("sdxl", ratios=(0.5, 0.0)).kinds
    ('self',)
    """

    name: ClassVar[str] = "hidiffusion"
    kinds: ClassVar[tuple[str, ...]] = ("self",)

    def __init__(
        self,
        table: str | Table | None = None,
        raunet: bool = True,
        windows: bool = True,
        ratios: Sequence[float] | None = None,
        aggressive: bool | None = None,
        seed: int = 0,
        steps: int | None = None,
        control_share: float = 0.6,
        control_size: int | Sequence[int] | None = None,
    ):
        if isinstance(table, str):
            check_choice("table", table, TABLES)
            table = TABLES[table]
        self.table = table
        self.raunet, self.windows = check_flag("raunet", raunet), check_flag("windows", windows)
        if ratios is not None:
            if len(ratios) != 2:
                raise ValueError(f"ratios must be two numbers, T1 and T2, got {ratios!r}")
            ratios = tuple(check_real("ratios", ratio, least=0, most=1) for ratio in ratios)
        self.ratios = ratios
        self.aggressive = None if aggressive is None else check_flag("aggressive", aggressive)
        self.seed = check_int("seed", seed)
        self.steps = None if steps is None else check_int("steps", steps, least=1)
        self.control_share = check_real("control_share", control_share, least=0, most=1)
        size = None if control_size is None else to_tuple("control_size", control_size, 2)
        self.control_size = None if size is None else check_ints("control_size", size, least=1)

    @property
    def identity(self) -> bool:
        return not (self.raunet or self.windows)

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, HiDiffusion):
            return "both shrink the same maps and cut the same windows"
        if self.raunet and other.reuses_features:
            return "maps change their sizes between steps, so that those of another step cannot be put in their place"
        return None

    # ---- which model

    def meet(self, model: nn.Module) -> None:
        if not all(isinstance(getattr(model, name, None), nn.ModuleList) for name in ("down_blocks", "up_blocks")):
            raise ValueError(
                f"HiDiffusion changes the stages of a U-Net, and {type(model).__name__} has none (down_blocks, "
                "up_blocks): transformers have one resolution, and nothing to shrink"
            )
        table = self.table or self._known(model)
        down: Any = model.down_blocks
        if len(down) != table.stages:
            raise ValueError(f"table is of a U-Net of {table.stages} stages, {type(model).__name__} has {len(down)}")
        self.chosen = table
        cut = self.windows and bool(table.windows)
        self.layers = list(table.windows) if cut else None
        stages = {"around_denoiser", "around_module"} if self.raunet else set()
        self.uses = stages | ({"around_sublayer"} if cut else set())
        self.acts_on = [f"up_blocks.{n}" for n in range(table.stages)]
        for place in (table.first, table.second) if self.raunet else ():
            if place is None:
                continue
            if place.stage >= table.stages:
                raise ValueError(f"table names stage {place.stage}, the U-Net has stages 0 to {table.stages - 1}")
            stage, up = down[place.stage], table.stages - 1 - place.stage
            if place.how == "conv":
                self._check_conv(place, stage)
                self.acts_on.append(f"down_blocks.{place.stage}.downsamplers.0")
            else:
                self.acts_on += [f"down_blocks.{place.stage}.attentions.0"]
                self.acts_on += [f"up_blocks.{up}.attentions.{len(stage.resnets) - 1}"]

    @staticmethod
    def _known(model: Any) -> Table:
        names = [name for name, _ in model.named_modules()]

        def has(pattern: str) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for name in names)

        fitting = [
            name
            for name, table in TABLES.items()
            if len(model.down_blocks) == table.stages and all(has(pattern) for pattern in table.windows)
        ]
        if not fitting:
            raise ValueError(
                f"{type(model).__name__} is built like none of {list(TABLES)}; give HiDiffusion(table=Table(...)), "
                "which names the places"
            )
        turbo = "turbo" in str(getattr(model.config, "_name_or_path", ""))
        return TABLES[fitting[-1] if turbo else fitting[0]]

    @staticmethod
    def _check_conv(place: Place, stage: Any) -> None:
        samplers = list(getattr(stage, "downsamplers", None) or [])
        conv = getattr(samplers[0], "conv", None) if len(samplers) == 1 else None
        conv = getattr(conv, "base_layer", conv)
        settings = tuple(getattr(conv, name, None) for name in ("kernel_size", "stride", "padding"))
        if settings != ((3, 3), (2, 2), (1, 1)):
            raise ValueError(
                f"down_blocks.{place.stage} does not end in a convolution of 3 x 3, stride 2 and padding 1, as the "
                f"table says, but in {[type(sampler).__name__ for sampler in samplers] or 'nothing'}"
            )

    # ---- which step

    def shrunk(self, site: CallSite) -> tuple[Place, ...]:
        """The places that act in a call.

        Raises:
            ValueError: the step is not known, or there are too few.
        """
        steps = site.steps if site.steps is not None else self.steps
        if site.step is None or steps is None:
            raise ValueError(
                "HiDiffusion must know the step and how many there are; attach to the pipeline, attach(pipe, ...), or "
                "give HiDiffusion(steps=...) and call the U-Net inside session.at(step=...)"
            )
        sides = self.session.frame.get("grid")
        if sides is None:
            raise ValueError(f"HiDiffusion serves U-Nets of images (B, C, H, W), {type(site.module).__name__} is none")
        sampling = site.sampling
        controlled, aggressive = False, self.aggressive
        if sampling is not None:
            controlled = getattr(sampling.pipe, "controlnet", None) is not None
            controlled = controlled and sampling.arguments.get("control_image") is None
            if aggressive is None:
                name = str(getattr(sampling.pipe, "name_or_path", "")).lower()
                inpainting = "Inpaint" in type(sampling.pipe).__name__ or "inpainting" in name
                aggressive = not (inpainting or "playground" in name)
        settings = (steps, sides, self.ratios, aggressive is not False, controlled)
        places = self.chosen.shrunk(site.step, *settings)
        if not places and site.step == 0 and (self.ratios is None or any(self.ratios)):
            if not any(self.chosen.shrunk(step, *settings) for step in range(steps)):
                raise ValueError(
                    f"HiDiffusion would shrink nothing in {steps} steps, which are too few for the table's ratios; "
                    "give ratios=..., more steps, or raunet=False"
                )
        return places

    # ---- RAU-Net

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        places = self.shrunk(site)
        added = inputs.get("down_block_additional_residuals")
        middle = inputs.get("mid_block_additional_residual")
        if places and (
            inputs.get("down_intrablock_additional_residuals") is not None or added is not None and middle is None
        ):
            raise ValueError("HiDiffusion: features of a T2I adapter do not fit the smaller maps of RAU-Net")
        if added is None or middle is None:
            return call(inputs)
        steps = site.steps if site.steps is not None else self.steps
        if site.step >= self.control_share * steps:  # type: ignore[operator]
            added = middle = None
        else:
            stages = skip_sizes(site.module, inputs[site.main].shape[-2:], places)
            sizes = [stages[0][0], *(size for stage in stages for size in stage[1:])]
            added = tuple(resized(a, size, "bicubic") for a, size in zip(added, sizes, strict=True))
            middle = resized(middle, sizes[-1], "bicubic")
        names = ("down_block_additional_residuals", "mid_block_additional_residual")
        return call({**inputs, names[0]: added, names[1]: middle})

    def around_module(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        places = self.shrunk(site)
        if not places:
            return call(inputs)
        number = int(site.name.split(".")[1])
        model: Any = self.session.model
        if site.kind == "stage":
            if number == len(model.up_blocks) - 1:
                return call(inputs)
            after = skip_sizes(model, self.session.frame["grid"], places)[-2 - number]
            return call({**inputs, "upsample_size": after[1]})
        if site.kind == "downsampler":
            if Place("conv", number) not in places:
                return call(inputs)
            with _FourPixels() as mode:
                out = call(inputs)
            if not mode.count:
                raise ValueError(f"{site.name} ran no convolution that could take four pixels at a time")
            return out
        down = number if site.name.startswith("down_blocks") else self.chosen.stages - 1 - number
        if Place("pool", down) not in places:
            return call(inputs)
        (pixels,) = call(inputs)
        if site.name.startswith("down_blocks"):
            return (F.avg_pool2d(pixels, 2, ceil_mode=True),)
        size = skip_sizes(model, self.session.frame["grid"], places)[down][0]
        return (F.interpolate(pixels, size=size, mode="bicubic"),)

    # ---- ControlNet

    def on_attach(self, session: Any) -> None:
        net = None if session.sampling is None else getattr(session.sampling.pipe, "controlnet", None)
        if net is None or not self.raunet:
            return
        for one in getattr(net, "nets", [net]):
            session.hook(one.register_forward_pre_hook(self._before_control, with_kwargs=True))

    def _before_control(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A ControlNet is called with latents and a picture of the size that it knows, picked by the nearest pixel."""
        if not self.session.active:
            return None
        given = {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}
        latents, picture = given["sample"], given["controlnet_cond"]
        known = self.control_size or to_tuple("sample_size", self.session.model.config.sample_size, 2)
        h, w = latents.shape[-2:]
        factor = max(h / known[0], w / known[1])
        if factor <= 1:
            return None
        size = tuple(max(8, int(side // factor) // 8 * 8) for side in (h, w))
        per = picture.shape[-2] // h
        given["sample"] = F.interpolate(latents, size=size)
        given["controlnet_cond"] = F.interpolate(picture, size=tuple(per * side for side in size))
        return (), given

    # ---- MSW-MSA

    def draw(self, site: Site) -> int:
        """By how many quarters of a window a call is shifted: the same for the same seed, run and layer."""
        run, notes = self.session._now.run, self.session.notes
        if notes.get(self) is None:
            notes[self] = run
        return random.Random(f"{self.seed} {run - notes[self]} {site.layer}").randrange(SHIFTS)  # noqa: S311

    def around_sublayer(self, site: Site, hidden: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        grid = None if site.q_layout is None else site.q_layout.grid("image")
        if grid is None or len(grid) != 2:
            raise ValueError(
                f"HiDiffusion: layer {site.layer} ({site.name}) has {hidden.shape[1]} tokens, whose height and width "
                "are not known"
            )
        shift = self.draw(site)
        parts = shifted_windows(hidden, grid, shift)
        with self.session.some_rows([row for row in range(len(hidden)) for _ in range(4)]):
            out = call(parts)
        return merge_windows(out, grid, shift)
