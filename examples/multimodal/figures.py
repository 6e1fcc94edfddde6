"""Pictures and tables of docs/multimodal.md, from the trained model and from benchmarks/results/multimodal-cpu.json.

    python examples/multimodal/figures.py --results benchmarks/results/multimodal-cpu.json --out docs

Pictures go to docs/multimodal/, tables between the markers of docs/multimodal.md.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import attnlib
from attnlib.bench.data import scenes
from attnlib.bench.store import fill
from attnlib.bench.worlds import camouflage, canvas, forms, geometry, maps, rooms, screens
from attnlib.hooks import TokenTypes
from attnlib.look import Record, Statistics, head_grid, image_map, map_over_image, profile, sink_profile

GRID = (8, 8)
COLOURS = (
    "#2f7de1", "#e8590c", "#0ca678", "#9c36b5", "#e03131", "#f08c00", "#1098ad", "#d6336c", "#74b816", "#7048e8",
    "#a0632b", "#5c7cfa",
)  # fmt: skip
MARKERS = "osD^vP*X<>ph"


def examples(path: Path) -> None:
    """Test scenes as the model sees them."""
    figure = Figure(figsize=(8.4, 2.5), layout="constrained")
    for number, axis in enumerate(figure.subplots(1, 5)):
        scene = scenes.make_scene(number, "test", "broken" if number == 4 else "usual")
        axis.imshow(scene.image.permute(1, 2, 0).numpy())
        axis.set_title("\n".join(scene.names), fontsize=6.5)
        axis.axis("off")
    figure.savefig(path, dpi=110)


def more_worlds(path: Path) -> None:
    """A picture or two of every world."""
    shown = {
        "canvas": canvas.make_canvas(1).image, "camouflage": camouflage.make_hidden(1).image,
        "geometry": geometry.make_drawing(4).image, "screens": screens.make_screen(0).image,
        "screens, dark": screens.make_screen(1).image, "forms": forms.make_form(0).image,
        "rooms": rooms.make_room(1, side=128).image, "maps": maps.make_map(1).image,
    }  # fmt: skip
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for (name, image), axis in zip(shown.items(), figure.subplots(2, 4).flat, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(name, fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=64)


def looks(folder: Path) -> None:
    """Attention of the trained model on one scene, and its statistics over sixty-four."""
    model, tokenizer = scenes.load_model()
    rule = TokenTypes(image=model.config.image_token_id)
    number = next(n for n in range(500) if _asks_well(scenes.make_scene(n, "test")))
    scene = scenes.make_scene(number, "test")
    asked = [scenes.Item(scene, q) for q in scenes.questions(scene, "colour")[:1]]
    inputs = next(scenes.batches(asked, tokenizer))[1]
    record = Record(rows="last", what=("weights",), calls=1)
    with attnlib.attach(model, record, token_types=rule), torch.no_grad():
        # "it is" are the first words of the answer; the third call reads "is" and has to find the colour.
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    types = rule(inputs["input_ids"])
    maps = torch.cat([image_map(entry, types, GRID, call=-1) for entry in record.results().values()])
    head_grid(maps, image=scene.image).savefig(folder / "heads.png", dpi=80)
    weights = [entry["weights"][-1] for entry in record.results().values()]
    mass = torch.stack([w[0, :, 0, 1 : 1 + scenes.PATCHES].sum(-1) for w in weights])
    best = [divmod(int(i), maps.shape[1]) for i in mass.flatten().topk(4).indices]
    titles = [f"layer {layer}, head {head}\n{mass[layer, head]:.0%} on the image" for layer, head in best]
    figure = map_over_image(torch.stack([maps[layer, head] for layer, head in best]), scene.image, titles)
    figure.suptitle(f"{asked[0].question.text}  it is …", fontsize=9)
    figure.savefig(folder / "maps.png", dpi=100)

    statistics = Statistics(what=("entropy", "distance", "mass", "sink", "rank"), grid=GRID, phase="prefill")
    items = []
    for n in range(64):
        scene = scenes.make_scene(n, "test")
        items += [scenes.Item(scene, q) for q in scenes.questions(scene, "position")[:1]]
    with attnlib.attach(model, statistics, token_types=rule), torch.no_grad():
        for _, inputs in scenes.batches(items, tokenizer):
            model(**inputs)
    found = statistics.results()
    sink_profile(found).savefig(folder / "sinks.png", dpi=90)
    profile(found, "entropy_share", "entropy / largest possible").savefig(folder / "entropy.png", dpi=90)
    profile(found, "grid_distance", "distance on the image, in patches").savefig(folder / "distance.png", dpi=90)
    profile(found, "rank", "effective rank of the map").savefig(folder / "rank.png", dpi=90)


def _asks_well(scene: scenes.Scene) -> bool:
    clear = all(t.contrast > 0.6 for t in scene.things)
    return len(scene.things) >= 5 and clear and bool(scenes.questions(scene, "colour"))


def _curves(axis, records: list[dict], rate: str, place, xlabel: str) -> None:
    base = next(r for r in records if r["technique"] == "untouched")["rates"][rate]
    axis.axhspan(*base["interval"], color="#888888", alpha=0.18, linewidth=0)
    axis.axhline(base["value"], color="#555555", linewidth=1, label="untouched")
    names = list(dict.fromkeys(r["technique"] for r in records if r["technique"] != "untouched"))
    for number, name in enumerate(names):
        mine = [r for r in records if r["technique"] == name and place(r) is not None]
        mine.sort(key=place)
        if not mine:
            continue
        xs, ys = [place(r) for r in mine], [r["rates"][rate]["value"] for r in mine]
        low, high = zip(*(r["rates"][rate]["interval"] for r in mine), strict=True)
        colour = COLOURS[number % len(COLOURS)]
        axis.fill_between(xs, low, high, color=colour, alpha=0.10, linewidth=0)
        axis.plot(xs, ys, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1.3, label=name)
    axis.set_xlabel(xlabel)
    axis.grid(True, linewidth=0.4, alpha=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def caches(records: list[dict], path: Path) -> None:
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"cache": "evicted after the question", "cache-unseen": "evicted before the question"}
    for axis, (group, title) in zip(axes, titles.items(), strict=True):
        mine = [r for r in records if r["group"] == group]
        _curves(axis, mine, "accuracy", _number, "share of keys evicted")
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("accuracy")
    axes[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=100)


def _number(record: dict) -> float | None:
    found = re.search(r"=([\d.]+)$", record["setting"])
    return float(found.group(1)) if found else None


def pruning(records: list[dict], path: Path) -> None:
    mine = [r for r in records if r["group"] == "pruning"]
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    axis = figure.subplots()
    _curves(axis, mine, "accuracy", lambda r: r.get("visual_tokens"), "visual tokens per block, mean of the blocks")
    axis.set_ylabel("accuracy")
    axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=100)


def hallucination(records: list[dict], path: Path) -> None:
    """Differences from the untouched model, with their intervals."""
    shown = {
        "lists with the absent second of a pair": "lists with the absent\nsecond of a pair",
        "named things that are not there": "named things that\nare not there",
        "things that are named": "things that are named\n(more is better)",
        "says yes to what is absent": "says yes to\nwhat is absent",
        "says yes to what is there": "says yes to what is\nthere (more is better)",
    }
    mine = [r for r in records if r["group"] == "hallucination" and r["technique"] != "untouched"]
    figure = Figure(figsize=(10.5, 1.2 + 0.24 * len(mine)), layout="constrained")
    for number, (axis, (rate, title)) in enumerate(
        zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True)
    ):
        axis.axvline(0, color="#555555", linewidth=0.8)
        for row, record in enumerate(mine):
            entry = record["rates"][rate]
            if entry.get("difference_interval") is None:
                continue
            low, high = entry["difference_interval"]
            good = (high < 0) if number in (0, 1, 3) else (low > 0)
            bad = (low > 0) if number in (0, 1, 3) else (high < 0)
            colour = "#0ca678" if good else "#e03131" if bad else "#868e96"
            axis.plot([low, high], [row, row], color=colour, linewidth=1.6)
            axis.plot(entry["difference"], row, "o", color=colour, markersize=4)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(True, axis="x", linewidth=0.4, alpha=0.6)
        axis.set_yticks(range(len(mine)), [f"{r['technique']} {r['setting']}".strip() for r in mine], fontsize=7)
        axis.set_ylim(len(mine) - 0.5, -0.5)
    figure.savefig(path, dpi=100)


def _cell(entry: dict | None) -> str:
    if entry is None or entry["value"] is None:
        return ""
    low, high = entry["interval"] or (float("nan"), float("nan"))
    text = f"{100 * entry['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    if entry.get("difference_interval") is None:
        return text
    low, high = entry["difference_interval"]
    return f"**{text}**" if low > 0 or high < 0 else text


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def table(records: list[dict], group: str, rates: dict[str, str], extra: dict | None = None) -> str:
    """Markdown; what differs from the untouched model beyond its interval is bold."""
    extra = extra or {}
    head = ["technique", "setting", *extra, *rates.values()]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for record in records:
        if record["group"] == group:
            cells = [record["technique"], record["setting"], *(str(get(record)) for get in extra.values())]
            cells += [_cell(record["rates"].get(rate)) for rate in rates]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bars(entries: dict[str, dict]) -> str:
    """Markdown: what must hold of the model and what does."""
    lines = ["| what | share % | bar | holds |", "|---|---|---|---|"]
    for name, entry in entries.items():
        if "known" in entry:
            bar = f"≤ {100 * entry['known']:.1f} (known without one) + {100 * entry['bar']:.0f}"
        elif isinstance(entry["bar"], list):
            bar = f"{100 * entry['bar'][0]:.0f} to {100 * entry['bar'][1]:.0f}"
        else:
            bar = f"≥ {100 * entry['bar']:.0f}"
        lines.append(f"| {name} | {_cell(entry)} | {bar} | {'yes' if entry['holds'] else '**no**'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/multimodal-cpu.json"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    torch.manual_seed(0)
    np.random.seed(0)
    folder = args.out / "multimodal"
    folder.mkdir(parents=True, exist_ok=True)
    examples(folder / "scenes.png")
    more_worlds(folder / "worlds.png")
    looks(folder)
    held = args.results.with_name("multimodal-bars-cpu.json")
    if held.exists():
        fill(args.out / "multimodal.md", "bars", bars(json.loads(held.read_text(encoding="utf-8"))["bars"]))
    if not args.results.exists():
        return
    results = json.loads(args.results.read_text(encoding="utf-8"))
    records, page = results["records"], args.out / "multimodal.md"
    caches(records, folder / "cache.png")
    hallucination(records, folder / "hallucination.png")
    if any(r["group"] == "pruning" and r["technique"] != "untouched" for r in records):
        pruning(records, folder / "pruning.png")
    accuracy = {"accuracy": "accuracy %"}
    kinds = {f"accuracy: {k}": k for k in ("presence", "colour", "count", "position", "content", "digit")}
    tokens = {
        "visual tokens": lambda r: r.get("visual_tokens", ""),
        "FLOPs of the prompt saved": lambda r: _percent(r.get("prompt_flops_saved")),
    }
    fill(page, "pruning", table(records, "pruning", {**accuracy, **kinds}, tokens))
    rates = {
        "lists with the absent second of a pair": "lists with the absent second %",
        "named things that are not there": "named and not there %",
        "things that are named": "there and named %",
        "says yes to what is absent": "yes to what is absent %",
        "says yes to what is there": "yes to what is there %",
    }
    fill(page, "hallucination", table(records, "hallucination", rates))
    kinds = {f"accuracy: {k}": k for k in ("colour", "position", "content")}
    fill(page, "cache", table(records, "cache", {**accuracy, **kinds}))
    fill(page, "cache-unseen", table(records, "cache-unseen", {**accuracy, **kinds}))
    lines = [f"- {s['technique']} {s['setting']} ({s['group']}): {s['why']}" for s in results["skipped"]]
    fill(page, "skipped", "\n".join(lines) or "Every line ran.")


if __name__ == "__main__":
    main()
