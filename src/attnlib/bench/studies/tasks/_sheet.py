"""Small PNGs, also of curves, of what trained models of tasks answer, beside what they were asked and what is true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...small import write_png


@contextmanager
def sheet(
    path: str | Path, rows: Sequence[str], columns: Sequence[str], cell: tuple[float, float] = (1.3, 1.3), dpi: int = 90
) -> Iterator[Any]:
    """An array of matplotlib's axes, ``(rows, columns)``, without ticks; written when the block ends.

    Args:
        path: of the PNG.
        rows, columns: what stands left and above.
        cell: width and height of one, in inches.
        dpi: dots an inch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(cell[0] * len(columns) + 0.3, cell[1] * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=8)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label, fontsize=7)
    yield axes
    write_png(figure, path, dpi, 128)
