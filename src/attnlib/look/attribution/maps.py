"""Maps of what a score depends on, at any module of any model: NormGrad's cells, Grad-CAM, layers combined.

Grad-CAM is ``relu(sum_c mean_u(g_uc) x_uc)``. Maps of several layers are resized to one size, put between 0 and 1 each,
and combined (:func:`combine`). Meta-saliency is the map after one step of plain gradient descent on the cross-entropy
of the target (:func:`meta_saliency`). How much a method minds the class is the correlation of its maps for the most
and the least likely class (:func:`class_sensitivity`): near 1 it shows the image, not the answer.

Reference: Rebuffi, Fong, Ji and Vedaldi, 2020 (https://arxiv.org/abs/2004.02866); Selvaraju et al., 2017 (Grad-CAM,
https://arxiv.org/abs/1610.02391).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_ints, check_real, check_tensor, checked, describe
from ...grids import Layout
from ...hooks.tape import Entry, Tape, Target, _cut, logits_of, quantized, score_of, to_grid
from .cells import AGGREGATES, _kernel, extract_aggregate
from .integrated import laid_out

Method = Callable[..., Any]


def top_logit(position: int = -1) -> Callable[[Any], Tensor]:
    """A target for the tape: the largest logit of each sample."""

    def score(output: Any) -> Tensor:
        logits = logits_of(output)
        return (logits[:, position] if logits.dim() == 3 else logits).amax(-1)

    return score


def channels_first(x: Tensor, layout: Layout | None = None, channels: str = "first") -> Tensor:
    """What a module gave as (B, C, *grid): images either way round, tokens as a row or as the grid they come from.

    Args:
        x: (B, C, h, w), with ``channels="last"`` (B, h, w, C); or tokens (B, N, C).
        layout: of tokens that are a grid, and others beside it, which are left out.
        channels: where the channels of four axes are.
    """
    check_choice("channels", channels, ("first", "last"))
    if x.dim() == 3:
        return (x if layout is None else to_grid(x, layout)).movedim(-1, 1)
    if x.dim() != 4:
        raise ValueError(f"a module must give (B, C, h, w) or tokens (B, N, C) to have a map, got {tuple(x.shape)}")
    return x if channels == "first" else x.movedim(-1, 1)


def _maps(
    cell: Callable[[Tensor, Tensor], Tensor], model: nn.Module, inputs: tuple[Any, ...], modules: Sequence[str],
    target: Target | None, layout: Layout | None, channels: str, chunk: int | None, position: int,
    named: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    def one(entry: Entry) -> Tensor:
        if entry.output is None or entry.output_gradient is None:
            raise ValueError(f"module {entry.name!r} gave no floating-point tensor, so it has no map")
        return cell(*(channels_first(t, layout, channels) for t in (entry.output, entry.output_gradient)))

    return _by_call(one, Tape(model, modules), inputs, target, chunk, position, named)


def _by_call(
    one: Callable[[Entry], Tensor], tape: Tape, inputs: tuple[Any, ...], target: Target | None, chunk: int | None,
    position: int, named: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """What becomes of each call on a tape, by the module's name."""
    seen: list[str] = []

    def reduce(entry: Entry) -> Tensor:
        seen.append(entry.name if entry.call == 0 else f"{entry.name}:{entry.call}")
        return one(entry)

    score = top_logit(position) if target is None else target

    def run(*given: Any) -> dict[str, Tensor]:
        seen.clear()
        taped = tape.run(*given, target=score, chunk=chunk, reduce=reduce, position=position, **named)
        return dict(zip(seen, taped.reduced, strict=False))  # with chunks the names come again

    if inputs and isinstance(inputs[0], Tensor):
        return laid_out(lambda x: run(x, *inputs[1:]), inputs[0])[0]
    return run(*inputs)


def saliency(
    model: nn.Module,
    *inputs: Any,
    modules: Sequence[str],
    target: Target | None = None,
    extract: str = "conv1x1",
    aggregate: str = "norm",
    against: bool = False,
    layout: Layout | None = None,
    channels: str = "first",
    chunk: int | None = None,
    position: int = -1,
    **named: Any,
) -> dict[str, Tensor]:
    """The map of one cell of the grid extract x aggregate at the output of each module; NormGrad by default.

    Args:
        model: any module, in evaluation mode.
        inputs, named: of the model.
        modules: paths or patterns, see :class:`attnlib.hooks.Tape`.
        target: class or token, one or one per sample, or ``f(output) -> (B,)``; the most likely one by default.
        extract, aggregate: see :func:`extract_aggregate`.
        against: what speaks against the target: the gradient of its negative. Norms do not mind.
        layout: what the tokens are that a module gives as (B, N, C); their grid becomes the map.
        channels: ``"first"`` or ``"last"``, where a module gives four axes.
        chunk: samples at a time, which bounds memory.
        position: of the token whose logits count.

    Returns:
        (B, h, w), or (B, N) of tokens without a grid, by module; of one called again, ``"name:1"`` and so on.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> saliency(model, torch.randn(3, 1, 6, 5), modules=["0"], target=1)["0"].shape
    torch.Size([3, 6, 5])
    """
    _kernel(extract)
    check_choice("aggregate", aggregate, AGGREGATES)
    sign = -1 if against else 1
    return _maps(
        lambda x, g: extract_aggregate(x, sign * g, extract, aggregate),
        model, inputs, modules, target, layout, channels, chunk, position, named,
    )  # fmt: skip


def grad_cam(
    model: nn.Module,
    *inputs: Any,
    modules: Sequence[str],
    target: Target | None = None,
    layout: Layout | None = None,
    channels: str = "first",
    chunk: int | None = None,
    position: int = -1,
    **named: Any,
) -> dict[str, Tensor]:
    """Grad-CAM, ``relu(sum_c mean_u(g_uc) x_uc)``, at the output of each module; arguments as of :func:`saliency`."""

    def cell(x: Tensor, g: Tensor) -> Tensor:
        places = tuple(range(2, g.dim()))
        return (g.mean(places, keepdim=True) * x).sum(1).relu()

    return _maps(cell, model, inputs, modules, target, layout, channels, chunk, position, named)


def own_norm_grad(
    model: nn.Module,
    *inputs: Any,
    modules: Sequence[str],
    target: Target | None = None,
    chunk: int | None = None,
    position: int = -1,
    **named: Any,
) -> dict[str, Tensor]:
    """NormGrad of convolutions that are there: ``|patch of the input at u| |g_u|``, with ``g`` at their output.

    It is the norm of what place ``u`` adds to the gradient of the layer's own weights; arguments as of
    :func:`saliency`.

    Raises:
        TypeError: a module that is no ``nn.Conv2d`` with one group and zeros around its input.
    """
    tape = Tape(model, modules, keep=("input", "output"))
    convs: dict[str, nn.Conv2d] = {}
    for name in tape.names:
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d) or conv.groups > 1 or conv.padding_mode != "zeros":
            raise TypeError(f"modules: {name!r} must be an nn.Conv2d of one group, padded by zeros, got {conv}")
        convs[name] = conv

    def one(entry: Entry) -> Tensor:
        conv, x, g = convs[entry.name], entry.input, entry.output_gradient
        assert x is not None and g is not None
        ones = x.new_ones(1, 1, *conv.kernel_size)
        squares = F.conv2d(x.square().sum(1, keepdim=True), ones, None, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
        return squares[:, 0].sqrt() * torch.linalg.vector_norm(g, dim=1)

    return _by_call(one, tape, inputs, target, chunk, position, named)


def unit_range(maps: Tensor, name: str = "maps", constant: str = "raise") -> Tensor:
    """(B, ...) each sample between 0 and 1.

    Args:
        constant: what becomes of a map that is the same everywhere and has no such range: ``"raise"`` or ``"zeros"``.
    """
    check_choice("constant", constant, ("raise", "zeros"))
    if not maps.numel():
        return maps
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    same = high == low
    if constant == "raise" and bool(same.any()):
        rows = same[:, 0].nonzero()[:, 0].tolist()
        raise ValueError(
            f"{name} is the same everywhere in sample(s) {rows[:8]}, so it shows nothing and cannot be put between 0 "
            "and 1; leave it out, or ask for zeros"
        )
    return ((flat - low) / torch.where(same, 1, high - low)).view_as(maps)


@checked
def combine(
    maps: Mapping[str, Tensor] | Sequence[Tensor],
    size: Sequence[int] | None = None,
    how: str = "product",
    weights: str | Sequence[float] | None = None,
    constant: str = "raise",
) -> Tensor:
    """Maps of several layers as one.

    Args:
        maps: (B, h, w) each, as :func:`saliency` gives them.
        size: (H, W) to which they are resized (bilinear); that of the largest by default.
        how: ``"product"``, ``prod_l s_l^(w_l)``, or ``"sum"``, ``sum_l w_l s_l``, of maps between 0 and 1.
        weights: ``None`` for the plain product, every exponent 1, as the authors' grid has it (a plain mean where maps
            are summed); ``"uniform"``, ``"linear"`` (l / L for the l-th) or numbers, such as each layer's accuracy,
            divided by their sum, as their branch of TorchRay has it.
        constant: what to do with a map that is the same everywhere in a sample, as the bias of a last layer before a
            mean is: ``"raise"``, ``"zeros"`` or ``"skip"`` the layer.

    Returns:
        (B, H, W).

    Raises:
        ValueError: no maps, maps that do not fit, a constant map, weights that do not fit.

    >>> combine([torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 3.0]]])]).tolist()
    [[[0.0, 1.0]]]
    """
    check_choice("how", how, ("product", "sum"))
    check_choice("constant", constant, ("raise", "zeros", "skip"))
    named = dict(maps) if isinstance(maps, Mapping) else {str(i): m for i, m in enumerate(maps)}
    if not named:
        raise ValueError("maps is empty; give at least one")
    for name, m in named.items():
        check_tensor(f"maps[{name!r}]", m)
        if m.dim() != 3 or not m.is_floating_point():
            raise ValueError(f"maps[{name!r}] must be (B, h, w), floating-point, got {describe(m)}")
    if len({m.shape[0] for m in named.values()}) > 1:
        raise ValueError(f"maps must have one batch, got {[tuple(m.shape) for m in named.values()]}")
    if weights is not None and not isinstance(weights, str) and len(weights) != len(named):
        raise ValueError(f"weights must have one number per map, {len(named)}, got {len(weights)}")
    if size is None:
        size = max((tuple(m.shape[1:]) for m in named.values()), key=lambda s: s[0] * s[1])
    to = check_ints("size", size, least=1)
    if len(to) != 2:
        raise ValueError(f"size must be (H, W), got {to}")
    units: list[tuple[int, Tensor]] = []
    for index, (name, m) in enumerate(named.items()):
        if len(m):
            m = F.interpolate(m[:, None], size=to, mode="bilinear", align_corners=False)[:, 0]
        else:
            m = m.new_zeros(0, *to)
        if constant == "skip" and len(m) and bool((m.flatten(1).amax(1) == m.flatten(1).amin(1)).any()):
            continue
        units.append((index, unit_range(m, f"maps[{name!r}]", "zeros" if constant == "zeros" else "raise")))
    if not units:
        raise ValueError("every map is the same everywhere, so none is left to combine")
    powers = _weights(weights, len(named), [i for i, _ in units], how)
    if how == "sum":
        return torch.stack([w * m for w, (_, m) in zip(powers, units, strict=True)]).sum(0)
    return torch.stack([m**w for w, (_, m) in zip(powers, units, strict=True)]).prod(0)


def _weights(weights: str | Sequence[float] | None, count: int, kept: list[int], how: str) -> list[float]:
    if weights is None and how == "product":
        return [1.0] * len(kept)
    if weights is None or weights == "uniform":
        given = [1.0] * count
    elif isinstance(weights, str):
        check_choice("weights", weights, ("uniform", "linear"))
        given = [(i + 1) / count for i in range(count)]
    else:
        given = [check_real(f"weights[{i}]", w, least=0.0) for i, w in enumerate(weights)]
    total = sum(given[i] for i in kept)
    if total <= 0:
        raise ValueError(f"weights must not all be 0, got {given}")
    return [given[i] / total for i in kept]


def meta_saliency(
    method: Method,
    model: nn.Module,
    *inputs: Any,
    target: int | Sequence[int] | Tensor,
    lr: float = 1e-4,
    negate: bool = False,
    position: int = -1,
    **named: Any,
) -> Any:
    """What ``method`` shows after the model has taken one step on the cross-entropy of the target.

    ``theta' = theta - lr dCE(f(x), target) / dtheta``, in evaluation mode, then ``method`` of the model with
    ``theta'``. Weights, modes and what requires gradients are as before afterwards, bit for bit, also after an
    exception: the weights themselves are set aside, not recomputed.

    Args:
        method: ``method(model, *inputs, target=target, **named)``, such as :func:`saliency`.
        target: class or token, one or one per sample.
        lr: length of the step; 0 gives the plain map.
        negate: ascend instead, towards what speaks against the target.
        position: of the token whose logits count.
        named: given to ``method``; what the model takes by name does not reach the step, so give it in ``inputs``.
    """
    check_real("lr", lr, least=0.0)
    if (where := quantized(model)) is not None:
        raise ValueError(f"a step changes weights, but {where} is quantized; load floating-point weights")
    modes = {m: m.training for m in model.modules()}
    needed = {p: p.requires_grad for p in model.parameters()}
    weights = {p: p.data for p in needed}
    state = {b: b.detach().clone() for b in model.buffers()}
    try:
        model.eval()
        for p in needed:
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            logits = logits_of(model(*(_cut(a, slice(None), -1) for a in inputs)))
            if logits.dim() == 3:
                logits = logits[:, position]
            elif logits.dim() > 3:  # classes at places: their sums
                logits = logits.flatten(2).sum(2)
            score_of(logits, target)  # refuses what is no class
            classes = torch.as_tensor(target, device=logits.device).expand(len(logits))
            grads = torch.autograd.grad(F.cross_entropy(logits, classes), list(needed), allow_unused=True)
        with torch.inference_mode(False):
            for p, grad in zip(needed, grads, strict=True):
                p.requires_grad_(needed[p])
                if grad is not None:
                    p.data = p.data - (-lr if negate else lr) * grad
        return method(model, *inputs, target=target, **named)
    finally:
        for p, data in weights.items():
            p.data = data
            p.requires_grad_(needed[p])
        with torch.no_grad():
            for b, value in state.items():
                b.copy_(value)
        for m, training in modes.items():
            m.training = training


def map_correlation(a: Tensor, b: Tensor, measure: str = "pearson") -> Tensor:
    """(B,) correlation over places of two maps of each sample.

    Args:
        a, b: (B, ...) of one shape.
        measure: ``"pearson"`` or ``"spearman"`` (ranks, ties shared); the paper does not say which.

    Raises:
        ValueError: a map that is the same everywhere, which correlates with nothing.

    >>> map_correlation(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1.0, 2.0, 3.0]]), "spearman").item()
    1.0
    """
    check_choice("measure", measure, ("pearson", "spearman"))
    for name, m in (("a", a), ("b", b)):
        check_tensor(name, m)
    if a.shape != b.shape or a.dim() < 2:
        raise ValueError(f"a and b must be maps (B, ...) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    rows = []
    for name, m in (("a", a), ("b", b)):
        flat = m.flatten(1).double()
        if len(flat) and bool((flat.amax(1) == flat.amin(1)).any()):
            raise ValueError(f"{name} has a map that is the same everywhere; it has no correlation with another")
        if measure == "spearman":
            order = flat.sort(1).values
            flat = (torch.searchsorted(order, flat) + torch.searchsorted(order, flat, right=True)) / 2
        rows.append(flat - flat.mean(1, keepdim=True))
    x, y = rows
    return ((x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt()).to(a.dtype)


def class_sensitivity(method: Method, model: nn.Module, *inputs: Any, measure: str = "pearson") -> Tensor:
    """(B,) correlation of the maps of the most and the least likely class: 1 where a method does not mind the class.

    Args:
        method: ``method(model, *inputs, target=(B,)) -> (B, ...)``, one map per sample.
        measure: see :func:`map_correlation`.
    """
    with torch.no_grad():
        logits = logits_of(model(*inputs))
    if logits.dim() == 3:
        logits = logits[:, -1]
    ends = [method(model, *inputs, target=logits.argmax(1)), method(model, *inputs, target=logits.argmin(1))]
    return map_correlation(ends[0], ends[1], measure)
