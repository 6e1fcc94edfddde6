"""Figures of the report as inline SVG that follows the page: its font, its text colour, light and dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .data.files import require

# Stand-ins that no palette uses; they become CSS so that one figure serves light and dark pages.
_INK, _FAINT = "#010203", "#040506"
_CSS = {_INK: "currentColor", _FAINT: "var(--line)"}

PALETTE = (
    "#2f7de1", "#e8590c", "#0ca678", "#9c36b5", "#e03131", "#f08c00", "#1098ad", "#d6336c", "#74b816", "#7048e8",
    "#a0632b", "#5c7cfa",
)  # fmt: skip
MARKERS = "osD^vP*X<>ph"
_COUNTER = itertools.count()

Style = Mapping[str, tuple[str, str]]


def styles(labels: Sequence[str], baseline: str | None) -> dict[str, tuple[str, str]]:
    """A colour and a marker per mechanism; the baseline is drawn in the colour of the text."""
    out: dict[str, tuple[str, str]] = {}
    free = 0
    for label in labels:
        if label == baseline:
            out[label] = (_INK, "o")
            continue
        out[label] = (PALETTE[free % len(PALETTE)], MARKERS[(free + 1) % len(MARKERS)])
        free += 1
    return out


def css_colour(colour: str) -> str:
    """The colour for CSS: stand-ins become what they stand for."""
    return _CSS.get(colour, colour)


def _figure(width: float = 6.2, height: float = 3.7) -> tuple[Any, Any]:
    require("matplotlib").use("Agg", force=False)
    figure_module = require("matplotlib.figure")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _dress(axes)
    return figure, axes


def _dress(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK, which="both", length=3, labelsize=9)
    axes.tick_params(which="minor", length=0)
    axes.grid(True, which="major", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=_INK, fontsize=9.5)
    axes.yaxis.label.set(color=_INK, fontsize=9.5)


def svg(figure: Any, title: str) -> str:
    """The figure as an ``<svg>`` element with no reference outside itself."""
    matplotlib = require("matplotlib")
    buffer = io.StringIO()
    salt = f"attnlib-{next(_COUNTER)}"
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    for stand_in, css in _CSS.items():
        text = text.replace(stand_in, css)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    # Identifiers repeat from figure to figure; within one page they must not.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{salt}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{salt}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{salt}-\1)", text)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _plain_ticks(axis: Any) -> None:
    ticker = require("matplotlib.ticker")
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _labels(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside points, moved apart where they would overlap, with a thin line when moved far."""
    figure = axes.figure
    figure.canvas.draw()
    box = axes.get_window_extent()
    scale = figure.dpi / 72
    line, letter, gap = 11.0 * scale, 5.0 * scale, 8.0 * scale
    placed: list[tuple[float, float, float]] = []
    for x, y, name, colour in sorted(points, key=lambda p: -p[1]):
        px, py = axes.transData.transform((x, y))
        width = letter * len(name)
        leftward = px + gap + width > box.x1 + gap
        left = px - gap - width if leftward else px + gap
        row = py
        for _ in range(40):
            hits = [p for p in placed if p[0] < left + width and left < p[0] + p[2] and abs(p[1] - row) < line]
            if not hits:
                break
            row = min(p[1] for p in hits) - line
        placed.append((left, row, width))
        at = axes.transData.inverted().transform((px - gap if leftward else px + gap, row))
        far = abs(row - py) > 0.8 * line
        axes.annotate(
            name,
            xy=(x, y),
            xytext=tuple(at),
            color=colour,
            fontsize=8.5,
            va="center",
            ha="right" if leftward else "left",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.7} if far else None,
        )


def quality_against_time(
    rows: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], task: Mapping[str, Any], style: Style
) -> str:
    """Quality with its interval against the time of a training step; every seed is a faint dot."""
    figure, axes = _figure()
    points: list[tuple[float, float, str, str]] = []
    seen: list[float] = []
    for row in rows:
        if row["mean"] is None:
            continue
        colour, marker = style[row["mechanism"]]
        x, y = 1000 * row["step_seconds"], row["mean"]
        bar = row["half_width"] or None
        axes.errorbar(
            x, y, yerr=bar, color=colour, marker=marker, markersize=7, capsize=3, elinewidth=1.1, linestyle="none"
        )
        values = [r["metrics"][task["metric"]] for r in runs if r["label"] == row["mechanism"] and r["status"] == "ok"]
        axes.plot([x] * len(values), values, ".", color=colour, markersize=5, alpha=0.45)
        seen += values
        points.append((x, y, row["mechanism"], colour))
    axes.set_xscale("log")
    ticker = require("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    _plain_ticks(axes.xaxis)
    axes.margins(x=0.25)
    if seen:
        # A t-interval of two seeds can be a hundred times wider than the data; the axis follows the measurements.
        low, high = min(seen), max(seen)
        room = 0.35 * (high - low) or 0.05 * abs(high) or 1.0
        bounds = (0.0, 100.0) if task["unit"] == "%" else (float("-inf"), float("inf"))
        edge = 0.02 * (high - low + 2 * room)
        axes.set_ylim(max(low - room, bounds[0] - edge), min(high + room, bounds[1] + edge))
    arrow = "higher is better" if task["higher_is_better"] else "lower is better"
    axes.set_xlabel("milliseconds per training step")
    axes.set_ylabel(f"{task['metric']} ({task['unit']}), {arrow}")
    if points:
        _labels(axes, points)
    return svg(figure, f"{task['title']}: {task['metric']} against time per step")


def _smooth(values: Sequence[float], reach: int = 3) -> list[float]:
    """Mean of each value and up to ``reach`` neighbours on either side."""
    out = []
    for i in range(len(values)):
        part = values[max(0, i - reach) : i + reach + 1]
        out.append(sum(part) / len(part))
    return out


def loss_curves(runs: Sequence[Mapping[str, Any]], labels: Sequence[str], style: Style, title: str) -> str:
    """Training loss against step: mean over seeds, smoothed (the noise of the batches is the same for all)."""
    figure, axes = _figure()
    for label in labels:
        curves = [r["loss_curve"] for r in runs if r["label"] == label and r["status"] == "ok"]
        if not curves:
            continue
        steps = [s for s, _ in curves[0]]
        means = [sum(c[i][1] for c in curves) / len(curves) for i in range(len(steps))]
        axes.plot(steps, _smooth(means), color=style[label][0], linewidth=1.5, alpha=0.9, label=label)
    axes.set_yscale("log")
    ticker = require("matplotlib.ticker")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss")
    return svg(figure, f"{title}: training loss against step")


def cost_against_n(
    records: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    cost: str,
    unit: float,
    ylabel: str,
    style: Style,
) -> str:
    """Cost against N on logarithmic axes; the slope over the three largest sizes stands beside each line."""
    figure, axes = _figure(6.2, 4.2)
    exponents = {r["mechanism"]: r[f"{cost.split('_')[0]}_exponent"] for r in summary}
    ends = []
    for record in records:
        colour, marker = style[record["mechanism"]]
        values = [c / unit for c in record[cost]]
        axes.plot(record["sizes"], values, color=colour, marker=marker, markersize=4.5, linewidth=1.5)
        exponent = exponents.get(record["mechanism"])
        if exponent is not None:
            ends.append((record["sizes"][-1], values[-1], f"N^{exponent:.2f}", colour))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    sizes = sorted({n for r in records for n in r["sizes"]})
    ticker = require("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.FixedLocator(sizes))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    _plain_ticks(axes.xaxis)
    if sizes:
        axes.set_xlim(sizes[0] * 0.85, sizes[-1] * 3)
    axes.set_xlabel("tokens N")
    axes.set_ylabel(ylabel)
    if ends:
        _labels(axes, ends)
    return svg(figure, f"{ylabel} against N")


def forecast(exhibit: Mapping[str, Any], samples: Sequence[tuple[str, Sequence[float]]], style: Style) -> str:
    """The truth, and forecasts issued one horizon apart, each knowing the truth up to where it starts."""
    figure, axes = _figure(12.4, 3.2)
    truth, start, horizon = exhibit["truth"], exhibit["start"], exhibit["horizon"]
    axes.plot(range(len(truth)), truth, color=_INK, linewidth=1.3, alpha=0.55, label="truth")
    for label, values in samples:
        colour, _ = style[label]
        for i in range(0, len(values), horizon):
            piece = values[i : i + horizon]
            # The baseline has the colour of the truth; dashes tell it apart.
            dashes = "--" if colour == _INK else "-"
            xs = range(start + i, start + i + len(piece))
            axes.plot(xs, piece, color=colour, linewidth=1.5, linestyle=dashes)
            axes.plot(start + i, piece[0], color=colour, marker=".", markersize=5)
    axes.axvspan(start, len(truth) - 1, color=_FAINT, alpha=0.35, linewidth=0)
    axes.margins(x=0.01)
    axes.set_xlabel("sample")
    axes.set_ylabel(exhibit["column"])
    return svg(figure, "forecasts of held-out samples")


def marker_svg(style: tuple[str, str]) -> str:
    """The marker of a mechanism as a small picture for legends and tables."""
    colour, marker = css_colour(style[0]), style[1]
    shapes = {
        "o": '<circle cx="6" cy="6" r="4.2"/>',
        "s": '<rect x="2.2" y="2.2" width="7.6" height="7.6"/>',
        "D": '<path d="M6 .9 11.1 6 6 11.1 .9 6z"/>',
        "^": '<path d="M6 1.4 11 10.4H1z"/>',
        "v": '<path d="M6 10.6 1 1.6h10z"/>',
        "P": '<path d="M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z"/>',
        "*": '<path d="M6 .6l1.5 3.8 4 .2-3.1 2.6 1 4L6 9l-3.4 2.2 1-4L.5 4.6l4-.2z"/>',
        "X": '<path d="M3.4 1 6 3.6 8.6 1 11 3.4 8.4 6 11 8.6 8.6 11 6 8.4 3.4 11 1 8.6 3.6 6 1 3.4z"/>',
        "<": '<path d="M1.4 6 10.4 1v10z"/>',
        ">": '<path d="M10.6 6 1.6 11V1z"/>',
        "p": '<path d="M6 .9l5 3.7-1.9 5.9H2.9L1 4.6z"/>',
        "h": '<path d="M6 .8l4.5 2.6v5.2L6 11.2 1.5 8.6V3.4z"/>',
    }
    return f'<svg class="mark" viewBox="0 0 12 12" aria-hidden="true" fill="{colour}">{shapes[marker]}</svg>'
