"""Pictures of what was recorded; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_real, check_values, shaped
from ..extras import need


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Any, Any]:
    figure = need("matplotlib.figure", "a plot").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _array(t: Tensor) -> Any:
    return t.detach().float().cpu().numpy()


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


@shaped(weights="number (K, rows, columns) | (rows, columns)", image="number (3, H, W)")
def map_over_image(weights: Tensor, image: Tensor, titles: Sequence[str] = (), opacity: float = 0.65) -> Any:
    """The image, and beside it each map laid over it.

    Args:
        weights: (rows, columns) or (K, rows, columns), weights on the image tokens.
        image: (3, H, W) in [0, 1].
        titles: of the maps.
        opacity: of the maps.

    Returns:
        A matplotlib ``Figure``; ``figure.savefig(path)`` keeps it.

    Raises:
        ValueError: shapes that are no map and no image.
        ImportError: matplotlib is not installed.
    """
    check_real("opacity", opacity, least=0, most=1)
    for name, t in (("weights", weights), ("image", image)):
        check_values(name, t)
        if not t.numel():
            raise ValueError(f"{name} must hold numbers, got {tuple(t.shape)}")
    maps = weights[None] if weights.dim() == 2 else weights
    if titles and len(titles) != len(maps):
        raise ValueError(f"{len(titles)} titles were given for {len(maps)} maps")
    figure, axes = _figure(2.0 * (len(maps) + 1), 2.2, 1, len(maps) + 1)
    picture = _array(image.permute(1, 2, 0).clamp(0, 1))
    height, width = picture.shape[:2]
    for number, axis in enumerate(axes[0]):
        axis.imshow(picture, interpolation="nearest")
        _bare(axis)
        if number:
            axis.imshow(
                _array(maps[number - 1]), cmap="inferno", alpha=opacity, interpolation="nearest", vmin=0,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )  # fmt: skip
            if titles:
                axis.set_title(titles[number - 1], fontsize=8)
    return figure


@shaped(maps="number (layers, heads, rows, columns)", image="number (3, H, W)")
def head_grid(maps: Tensor, labels: Sequence[str] | None = None, image: Tensor | None = None) -> Any:
    """Small maps of all heads: a row per layer, a column per head, each on its own scale.

    Args:
        maps: (layers, heads, rows, columns).
        labels: names of the layers.
        image: (3, H, W) to show under the maps.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: maps of another rank.
        ImportError: matplotlib is not installed.
    """
    check_values("maps", maps)
    if 0 in maps.shape:
        raise ValueError(f"maps must be (layers, heads, rows, columns), got {tuple(maps.shape)}")
    layers, heads = maps.shape[:2]
    names = [str(i) for i in range(layers)] if labels is None else list(labels)
    if len(names) != layers:
        raise ValueError(f"{len(names)} labels were given for {layers} layers")
    figure, axes = _figure(1.05 * heads + 0.6, 1.1 * layers + 0.4, layers, heads)
    for i in range(layers):
        for j in range(heads):
            axis = axes[i][j]
            extent = None
            if image is not None:
                extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
                axis.imshow(_array(image.permute(1, 2, 0).clamp(0, 1)), interpolation="nearest")
            axis.imshow(
                _array(maps[i, j]), cmap="inferno", interpolation="nearest", vmin=0, extent=extent,
                alpha=1.0 if image is None else 0.65,
            )  # fmt: skip
            _bare(axis)
            if i == 0:
                axis.set_title(f"head {j}", fontsize=7)
            if j == 0:
                axis.set_ylabel(f"layer {names[i]}", fontsize=7)
    return figure


@shaped()
def profile(results: Mapping[Any, Mapping[str, Any]], statistic: str, ylabel: str | None = None) -> Any:
    """One statistic over the layers: a dot per head, a line through the means.

    Args:
        results: of :class:`attnlib.look.Statistics`.
        statistic: a key whose values are (h,), such as ``"entropy"`` or ``"rank"``.
        ylabel: what the axis is called.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: nothing was recorded, or not this.
        ImportError: matplotlib is not installed.
    """
    if not results:
        raise ValueError("results are empty: nothing was recorded")
    for layer, entry in results.items():
        if statistic not in entry or torch.as_tensor(entry[statistic]).dim() != 1:
            fitting = [name for name, value in entry.items() if isinstance(value, Tensor) and value.dim() == 1]
            raise ValueError(f"statistic={statistic!r} is not recorded per head in layer {layer}; possible: {fitting}")
    figure, axes = _figure(4.6, 3.0)
    axis = axes[0][0]
    places = range(len(results))
    values = [torch.as_tensor(entry[statistic]).float() for entry in results.values()]
    for x, v in zip(places, values, strict=True):
        axis.plot([x] * len(v), v.tolist(), "o", color="#2f7de1", alpha=0.45, markersize=5, markeredgewidth=0)
    axis.plot(places, [float(v.nanmean()) for v in values], color="#e8590c", linewidth=1.8, label="mean of the heads")
    axis.set_xticks(list(places), [str(layer) for layer in results])
    axis.set_xlabel("layer")
    axis.set_ylabel(ylabel or statistic)
    axis.grid(True, linewidth=0.4, alpha=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure


@shaped()
def sink_profile(results: Mapping[Any, Mapping[str, Any]]) -> Any:
    """Mean weight that the first token gets, per head, over the layers.

    Args:
        results: of :class:`attnlib.look.Statistics` with ``"sink"``.

    Returns:
        A matplotlib ``Figure``.
    """
    figure = profile(results, "sink_score", "weight that the first token gets")
    figure.axes[0].set_ylim(-0.02, 1.02)
    return figure


@shaped(table="number (L, K)")
def layer_table(
    table: Tensor, columns: str = "head", label: str = "", diverging: bool = False, numbers: bool = False
) -> Any:
    """A table with a row per layer as a picture: importance of heads, strength by distance, shares of patterns.

    Args:
        table: (L, K); nan is left white.
        columns: what they are.
        label: what the colours mean.
        diverging: colours around zero, which is white.
        numbers: write them into the cells.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: an empty table.
        ImportError: matplotlib is not installed.
    """
    check_values("table", table)
    if not table.numel():
        raise ValueError(f"table must hold numbers, got {tuple(table.shape)}")
    layers, count = table.shape
    figure, axes = _figure(0.42 * count + 1.8, 0.34 * layers + 1.0)
    axis, shown = axes[0][0], _array(table)
    most = float(table.nan_to_num(0.0).abs().max()) or 1.0
    limits: dict[str, Any] = dict(cmap="PuOr_r", vmin=-most, vmax=most) if diverging else dict(cmap="viridis", vmin=0)
    picture = axis.imshow(shown, aspect="auto", interpolation="nearest", **limits)
    figure.colorbar(picture, ax=axis, label=label)
    axis.set_xlabel(columns)
    axis.set_ylabel("layer")
    axis.set_xticks(range(count))
    axis.set_yticks(range(layers))
    if numbers:
        for i in range(layers):
            for j in range(count):
                axis.text(j, i, f"{shown[i, j]:.2g}", ha="center", va="center", fontsize=6, color="#e8590c")
    return figure


@shaped(points="number (n, 2)", clusters="whole (n)", prototypes="number (K, Q, Q)")
def pattern_atlas(points: Tensor, clusters: Tensor, prototypes: Tensor) -> Any:
    """Maps in the plane, a colour per pattern, and the decoded pattern of every colour beside it.

    Args:
        points: (n, 2) of an :class:`attnlib.look.Atlas`.
        clusters: (n,).
        prototypes: (K, Q, Q), rows are queries.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: no points, clusters without a prototype.
        ImportError: matplotlib is not installed.
    """
    for name, t in (("points", points), ("clusters", clusters), ("prototypes", prototypes)):
        check_values(name, t)
    count = len(prototypes)
    if not len(points):
        raise ValueError("points must be those of one map at least, got none")
    if not 0 <= int(clusters.min()) <= int(clusters.max()) < count:
        raise ValueError(f"clusters must lie between 0 and {count - 1}, got {int(clusters.min())} to "
                         f"{int(clusters.max())}")  # fmt: skip
    figure, axes = _figure(2.0 * (count + 1), 2.2, 1, count + 1)
    colours = need("matplotlib", "a plot").colormaps["tab10"]
    first = axes[0][0]
    for number in range(count):
        mine = clusters == number
        at = _array(points[mine])
        first.scatter(at[:, 0], at[:, 1], s=6, color=colours(number % 10), linewidths=0, alpha=0.7)
        axis = axes[0][number + 1]
        axis.imshow(_array(prototypes[number]), cmap="inferno", interpolation="nearest", vmin=0)
        axis.set_title(f"{int(mine.sum())} maps", fontsize=8, color=colours(number % 10))
        _bare(axis)
    _bare(first)
    return figure
