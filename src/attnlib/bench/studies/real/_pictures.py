"""Pictures of several panels: heat maps beside curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ...data.files import require
from ...store import write_text


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """A figure and its axes (rows, columns)."""
    require("matplotlib").use("Agg", force=False)
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = np.atleast_2d(figure.subplots(rows, columns, squeeze=False))
    for axis in axes.ravel():
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def heat(
    axis: Any,
    values: np.ndarray,
    title: str,
    x: str,
    y: str,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """A table of numbers as colours, diverging where ``low`` is negative."""
    colours = "RdBu_r" if low is not None and low < 0 else "viridis"
    shown = axis.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axis.figure.colorbar(shown, ax=axis).ax.tick_params(labelsize=7)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def save(figure: Any, path: Path) -> None:
    """Write an SVG that is the same for the same numbers."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attnlib"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    write_text(path, buffer.getvalue())
