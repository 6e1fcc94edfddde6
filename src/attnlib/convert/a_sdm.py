"""A-SDM-style: a U-Net that lost what it can do without, and got small things in its place.

After A-SDM (arXiv 2312.15516), of which no code is released; the forms here are **our reading** of its ideas:

- *redundancy removal*: resnets and transformers are ordered by how much the prediction changes without them,
  ``mean (e - e_without)^2 / mean e^2``, and the least are removed, a few in each round, with training between
  (:func:`redundancy`, :func:`remove`, :func:`incubate`);
- *conditional convolutions that inherit*: ``y = conv(x, sum_m a_m W_m)``, ``a = gate(FC(mean of x))``, the experts
  ``W_m`` those of convolutions around the place (:class:`InheritedConv`, :class:`InheritedResidual`);
- *global and regional attention*: windows of p x p, and all queries against keys and values pooled by p, the mean of
  both (:class:`GlobalRegionalAttention`): work of ``N p^2 + N^2 / p^2`` pairs;
- *semantic alignment*: ``L = L_noise + a L_distill + b sum |M_s - M_t|^2`` of maps with a norm of 1 over places, by
  default channel means of features (:func:`semantic_alignment`, :func:`alignment_losses`).

Its successor's inherited features are :class:`attnlib.cache.FeatureInheritance`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_axes, check_choice, check_int, check_real, describe, to_list
from ..hooks.attach import attach
from ..hooks.denoiser import CallSite
from ..hooks.intervention import Intervention
from ..hooks.site import Site
from ..nn.layers import cell_means
from ..ops._count import counted
from ..ops.attention import attention
from ..ops.partition import window_attention
from ..steer.diffusion.linfusion import distillation_losses

#: Named arguments of a denoiser: ``sample``, ``timestep``, ``encoder_hidden_states``.
Inputs = Mapping[str, Any]

GATES = ("sigmoid", "softmax")
ROUTES = ("regional", "global")


# ---- removal


class Bypass(nn.Module):
    """What stands where a resnet or transformer of a U-Net was: its input goes on.

    Args:
        removed: of which a resnet keeps the convolution that fits its input to its output, where it has one.
    """

    def __init__(self, removed: nn.Module):
        super().__init__()
        self.shortcut = getattr(removed, "conv_shortcut", None)
        self.listed = _is_transformer(removed)

    def forward(self, hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        out = hidden_states if self.shortcut is None else self.shortcut(hidden_states)
        if not self.listed:
            return out
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _is_transformer(module: nn.Module) -> bool:
    return hasattr(module, "transformer_blocks")


def removable(unet: nn.Module) -> list[str]:
    """Names of the resnets and transformers of a U-Net that can be removed: all that keep the size of their map."""
    found = []
    for name, module in unet.named_modules():
        parent, _, last = name.rpartition(".")
        if last.isdigit() and parent.rpartition(".")[2] in ("resnets", "attentions") and not isinstance(module, Bypass):
            if not getattr(module, "up", False) and not getattr(module, "down", False):
                found.append(name)
    return found


class _Without(Intervention):
    """A module's input goes on in its place."""

    name = "without"

    def __init__(self, what: str, module: nn.Module):
        self.acts_on, self.bypass = (what,), Bypass(module)

    def around_module(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        return self.bypass(inputs[site.main], return_dict=inputs.get("return_dict", True))


@torch.no_grad()
def redundancy(unet: nn.Module, batches: Sequence[Inputs], names: Sequence[str] | None = None) -> dict[str, float]:
    """How much a prediction changes without each module, relative to its size: the least are the most redundant.

    Args:
        unet: a U-Net of diffusers.
        batches: named arguments to run it with, noisy latents of all steps for choice.
        names: modules to look at; all :func:`removable` ones by default.

    Returns:
        ``mean (e - e_without)^2 / mean e^2`` by name, ascending.
    """
    names = removable(unet) if names is None else names
    _check_names(unet, names)
    if not batches or isinstance(batches, Mapping):
        raise ValueError(
            f"batches must be a sequence of at least one dictionary of named arguments, got {describe(batches)}"
        )
    full = [_run(unet, batch) for batch in batches]
    size = sum(float(e.square().mean()) for e in full)
    found = {}
    for name in names:
        with attach(unet, _Without(name, unet.get_submodule(name))):
            found[name] = sum(float((_run(unet, b) - e).square().mean()) for b, e in zip(batches, full, strict=True))
    return dict(sorted(((name, value / size) for name, value in found.items()), key=lambda pair: pair[1]))


def _run(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs).sample


def _check_names(unet: nn.Module, names: Sequence[str]) -> None:
    known = removable(unet)
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of names, got {names!r}; write [{names!r}]")
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"names must be resnets and transformers of this U-Net, got {unknown or names}; e.g. {known[:4]}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"names must hold each module once, got {names}")


@dataclass
class Lighter:
    """A U-Net from which modules were removed.

    Args:
        model: the new one; the old one is as it was.
        removed: names, in the order of removal.
        params: parameters before and after.
        multiply_adds: of one call before and after; ``None`` where no inputs were given.
        history: what was measured in each round of :func:`incubate`.
    """

    model: nn.Module
    removed: list[str]
    params: tuple[int, int]
    multiply_adds: tuple[int, int] | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"parameters {self.params[0]:,} -> {self.params[1]:,}"]
        if self.multiply_adds is not None:
            lines.append(f"multiply-adds {self.multiply_adds[0]:,} -> {self.multiply_adds[1]:,}")
        return "\n".join([*lines, *(f"removed {name}" for name in self.removed)])


def remove(unet: nn.Module, names: Sequence[str], inputs: Inputs | None = None) -> Lighter:
    """A copy of a U-Net without some modules, whose inputs go on in their place.

    Args:
        unet: a U-Net of diffusers; it stays as it is.
        names: see :func:`removable`.
        inputs: named arguments, to count multiply-adds with.
    """
    _check_names(unet, names)
    lighter = copy.deepcopy(unet)
    for name in names:
        lighter.set_submodule(name, Bypass(lighter.get_submodule(name)))
    params = (_params(unet), _params(lighter))
    counted = None if inputs is None else (_multiply_adds(unet, inputs), _multiply_adds(lighter, inputs))
    return Lighter(lighter, list(names), params, counted)


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _multiply_adds(model: nn.Module, inputs: Inputs) -> int:
    with counted() as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops() // 2


def incubate(
    unet: nn.Module,
    batches: Sequence[Inputs],
    rounds: int,
    each: int = 1,
    train: Callable[[nn.Module, nn.Module, int], None] | None = None,
) -> Lighter:
    """Remove a few modules, train, measure anew, remove a few more.

    Args:
        unet: the teacher; it stays as it is.
        batches: see :func:`redundancy`.
        rounds: how often.
        each: modules removed in each round.
        train: ``train(student, teacher, round)`` after each removal, with :func:`alignment_losses` for choice.

    Returns:
        The student; ``history`` has what was measured in each round.
    """
    check_int("rounds", rounds, least=1)
    check_int("each", each, least=1)
    if rounds * each > len(removable(unet)):
        raise ValueError(f"rounds={rounds} of each={each} are more modules than the {len(removable(unet))} there are")
    student, removed, history = copy.deepcopy(unet), [], []
    for number in range(rounds):
        history.append(redundancy(student, batches))
        least = list(history[-1])[:each]
        student = remove(student, least).model
        removed += least
        if train is not None:
            train(student, unet, number)
    counted = (_multiply_adds(unet, batches[0]), _multiply_adds(student, batches[0]))
    return Lighter(student, removed, (_params(unet), _params(student)), counted, history)


# ---- conditional convolutions


class InheritedConv(nn.Module):
    """A convolution whose kernel is a sum of inherited ones, weighted by what it reads.

    ``y = conv(x, sum_m a_m W_m) + sum_m a_m b_m,  a = gate(FC(mean of x over places))``.

    Args:
        convs: whose kernels are the experts; of equal shapes, strides and paddings, without groups.
        gate: ``"sigmoid"`` or ``"softmax"``. Gates start where every expert has an equal share.

    Raises:
        ValueError: convolutions that differ.

    >>> conv = nn.Conv2d(4, 6, 3, padding=1)
    >>> one, x = InheritedConv([conv], "softmax"), torch.randn(2, 4, 5, 5)
    >>> torch.allclose(one(x), conv(x), atol=1e-6)
    True
    """

    def __init__(self, convs: Sequence[nn.Conv2d], gate: str = "sigmoid"):
        super().__init__()
        check_choice("gate", gate, GATES)
        convs = to_list("convs", convs, "[conv]") or []
        if not convs or not all(isinstance(conv, nn.Conv2d) for conv in convs):
            raise ValueError("convs must hold at least one torch.nn.Conv2d")

        def form(conv: nn.Conv2d) -> tuple[Any, ...]:
            shape, padding = tuple(conv.weight.shape), (conv.padding, conv.padding_mode)
            return (shape, conv.stride, *padding, conv.dilation, conv.groups, conv.bias is None)

        forms = [form(conv) for conv in convs]
        if len(set(forms)) > 1 or convs[0].groups != 1 or convs[0].padding_mode != "zeros":
            raise ValueError(
                f"convolutions whose kernels are mixed must be alike, padded by zeros and without groups, got {forms}"
            )
        first = convs[0]
        self.gate, self.stride, self.dilation = gate, first.stride, first.dilation
        self.padding: Any = first.padding
        self.weight = nn.Parameter(torch.stack([conv.weight.detach() for conv in convs]))
        biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
        self.bias = nn.Parameter(torch.stack(biases)) if biases else None
        self.fc = nn.Linear(first.in_channels, len(convs)).to(first.weight)
        nn.init.zeros_(self.fc.weight)
        share = min(1 / len(convs), 0.99)
        nn.init.constant_(self.fc.bias, math.log(share / (1 - share)) if gate == "sigmoid" else 0.0)

    def shares(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, M) weights of the experts."""
        logits = self.fc(x.mean((2, 3)))
        return logits.sigmoid() if self.gate == "sigmoid" else logits.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W')."""
        check_axes("x", x, B=None, C=self.fc.in_features, H=None, W=None)
        shares, batch = self.shares(x), len(x)
        kernels = torch.einsum("bm,moikl->boikl", shares, self.weight).flatten(0, 1)
        out = F.conv2d(
            x.reshape(1, -1, *x.shape[2:]), kernels, None, self.stride, self.padding, self.dilation, groups=batch
        )
        out = out.view(batch, -1, *out.shape[2:])
        return out if self.bias is None else out + (shares @ self.bias)[:, :, None, None]


class InheritedResidual(nn.Module):
    """What may stand where a resnet was removed: ``shortcut(x) + conv(SiLU(norm(x)))`` with an :class:`InheritedConv`.

    Args:
        resnet: that was removed; its first norm, its shortcut and one of its convolutions are inherited.
        around: convolutions around it, of that one's shape.
        gate: see :class:`InheritedConv`.
    """

    def __init__(self, resnet: Any, around: Sequence[nn.Conv2d] = (), gate: str = "sigmoid"):
        super().__init__()
        if not all(hasattr(resnet, name) for name in ("norm1", "conv1", "conv_shortcut")):
            raise TypeError(f"resnet must be a ResnetBlock2D of diffusers, got {type(resnet).__name__}")
        self.norm, self.shortcut = copy.deepcopy(resnet.norm1), copy.deepcopy(resnet.conv_shortcut)
        self.conv = InheritedConv([resnet.conv1, *around], gate)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        x = hidden_states
        return (x if self.shortcut is None else self.shortcut(x)) + self.conv(F.silu(self.norm(x)))


def neighbours(unet: nn.Module, name: str) -> list[nn.Conv2d]:
    """Convolutions in resnets of the same stage as a resnet, with kernels of the shape of its first one."""
    if name not in removable(unet) or _is_transformer(unet.get_submodule(name)):
        resnets = [n for n in removable(unet) if not _is_transformer(unet.get_submodule(n))]
        raise ValueError(f"name must be a resnet of this U-Net, got {name!r}; e.g. {resnets[:4]}")
    first: Any = unet.get_submodule(name)
    stage = ".".join(name.split(".")[:2]) if not name.startswith("mid_block") else "mid_block"
    found = []
    for other, module in unet.get_submodule(stage).named_modules():
        alike = isinstance(module, nn.Conv2d) and module.weight.shape == first.conv1.weight.shape
        if alike and module is not first.conv1 and other.rpartition(".")[2] in ("conv1", "conv2"):
            found.append(module)
    return found  # type: ignore[return-value]


# ---- attention


class GlobalRegionalAttention(Intervention):
    """Self-attention of images by two cheap routes: in windows, and from all places to pooled ones.

    ``o = mean(window_p(q, k, v), attention(q, pool_p k, pool_p v))``.

    Args:
        window_size: p of the windows, cut off at the right and lower border of the map.
        pool: p of the pooled keys and values; means over what there is.
        routes: ``"regional"``, ``"global"`` or both.
        combine: ``"mean"`` or ``"sum"`` of both, or ``"alternate"``: one of them by turns, layer by layer.
        layers: numbers or name patterns; ``None`` for all self-attention.

    Raises:
        ValueError: when it runs, a layer whose queries are no image.

    >>> GlobalRegionalAttention(8, 4, layers=["down_blocks.0*"]).pairs(64, 64)
    (262144, 1048576)
    """

    name: ClassVar[str] = "global-regional-attention"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    replaces_mask = True

    def __init__(
        self,
        window_size: int = 8,
        pool: int = 4,
        routes: Sequence[str] = ROUTES,
        combine: str = "mean",
        layers: Sequence[int | str] | None = None,
    ):
        self.window_size = check_int("window_size", window_size, least=1)
        self.pool = check_int("pool", pool, least=1)
        check_choice("combine", combine, ("mean", "sum", "alternate"))
        if not routes or isinstance(routes, str) or set(routes) - set(ROUTES) or len(set(routes)) < len(routes):
            raise ValueError(f"routes must be some of {ROUTES}, each once, got {routes!r}")
        if combine == "alternate" and len(set(routes)) < 2:
            raise ValueError("combine='alternate' needs both routes")
        self.routes, self.combine, self.layers = tuple(routes), combine, layers

    def pairs(self, height: int, width: int) -> tuple[int, int]:
        """Pairs of queries and keys of the regional and the global route; of plain attention ``(height width)^2``."""
        whole, p = height * width, self.pool
        return whole * self.window_size**2, whole * (-(-height // p) * -(-width // p))

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._turn = {site.layer: number for number, site in enumerate(sites)}

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        layout = site.q_layout
        grid = layout.grid("image") if layout is not None and layout.names == ("image",) else None
        if grid is None or len(grid) != 2:
            raise ValueError(
                f"GlobalRegionalAttention: layer {site.layer} ({site.name}) attends {q.shape[2]} tokens that are no "
                "map of an image; name the layers"
            )
        routes: Sequence[str] = self.routes
        if self.combine == "alternate":
            routes = (ROUTES[self._turn[site.layer] % 2],)
        by = {"regional": self._regional, "global": self._global}
        outs = [by[route](q, k, v, grid, site.scale) for route in routes]
        total = sum(outs[1:], outs[0])
        return total / len(outs) if self.combine == "mean" else total

    def _regional(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], scale: float | None) -> Tensor:
        p, (h, w) = self.window_size, grid
        sides = (-(-h // p) * p, -(-w // p) * p)
        if sides == tuple(grid):
            return window_attention(q, k, v, grid, p, scale=scale)

        def padded(t: Tensor) -> Tensor:
            return F.pad(t.unflatten(2, grid), (0, 0, 0, sides[1] - w, 0, sides[0] - h)).flatten(2, 3)

        exists = torch.zeros(len(q), *sides, dtype=torch.bool, device=q.device)
        exists[:, :h, :w] = True
        out = window_attention(padded(q), padded(k), padded(v), sides, p, valid=exists.flatten(1), scale=scale)
        return out.unflatten(2, sides)[:, :, :h, :w].flatten(2, 3)

    def _global(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], scale: float | None) -> Tensor:
        def pooled(t: Tensor) -> Tensor:
            return cell_means(t.flatten(0, 1).unflatten(1, grid), self.pool).flatten(1, 2).unflatten(0, t.shape[:2])

        return attention(q, pooled(k), pooled(v), scale=scale)


# ---- alignment


def semantic_alignment(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``sum |M_s - M_t|^2`` over maps (B, h, w), each with a norm of 1 over places; the mean over samples.

    >>> maps = [torch.rand(2, 4, 4)]
    >>> semantic_alignment(maps, [3 * maps[0]]).item() < 1e-6
    True
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"maps of the student are {len(student)}, of the teacher {len(teacher)}; one for each")
    for side, maps in (("student", student), ("teacher", teacher)):
        for i, one in enumerate(maps):
            check_axes(f"{side}[{i}]", one, B=None, h=None, w=None)
    total = student[0].new_zeros(())
    for a, b in zip(student, teacher, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"maps {tuple(a.shape)} of the student do not fit {tuple(b.shape)} of the teacher")
        total = total + (F.normalize(a.flatten(1), dim=1) - F.normalize(b.flatten(1), dim=1)).square().sum(1).mean()
    return total


class _Maps(Intervention):
    """Channel means of what modules give."""

    name = "channel-means"

    def __init__(self, acts_on: Sequence[str]):
        self.acts_on = tuple(acts_on)
        self.reset()

    def reset(self) -> None:
        self.maps: dict[str, Tensor] = {}

    def around_module(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        out = call(inputs)
        first = out if isinstance(out, Tensor) else out[0]
        self.maps[site.name] = first.mean(1)
        return out


def alignment_losses(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Inputs,
    target: Tensor,
    at: Sequence[str] = ("stage",),
    distill: float = 1.0,
    align: float = 1.0,
) -> dict[str, Tensor]:
    """The three terms of a lighter U-Net's training, weighted; their sum is the loss.

    Args:
        student, teacher: U-Nets of diffusers with modules of the same names at ``at``.
        inputs: named arguments for both.
        target: noise, or whatever the scheduler says is right.
        at: kinds or name patterns of the modules whose channel means are aligned.
        distill, align: a and b.

    Returns:
        ``{"noise", "distill", "align"}``.
    """
    check_real("distill", distill, least=0)
    check_real("align", align, least=0)
    seen = []
    for model, learns in ((student, True), (teacher, False)):
        maps = _Maps(at)
        with attach(model, maps), torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            seen.append((_run(model, inputs), dict(maps.maps)))
    (own, mine), (theirs, wanted) = seen
    if list(mine) != list(wanted):
        raise ValueError(f"modules {sorted(set(mine) ^ set(wanted))} are in one of the two U-Nets only")
    terms = distillation_losses(own, target, theirs)
    aligned = semantic_alignment(list(mine.values()), list(wanted.values()))
    return {"noise": terms["task"], "distill": distill * terms["prediction"], "align": align * aligned}
