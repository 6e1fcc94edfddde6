"""Train pointer networks on hulls, triangulations and tours, and try them on more points than they were trained on.

    python examples/pointer/train.py                             # all three tasks, minutes on one thread
    python examples/pointer/train.py --task hull --times 3 --out hull.json

Points come from left to right, which is learnt faster. Results go to a JSON file after every task, networks
to the folder of `--keep`, from which a run that was interrupted goes on; `--picture` draws answers beside the truth.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from attnlib.bench.clock import machine
from attnlib.bench.data.geometry import Problems, nearest_neighbour_tours, problems, score, tour_length
from attnlib.models.pointer import PointerNetwork

#: Points in training, points in the test, problems made per number of points, and minutes of processor time.
SETTINGS: dict[str, dict[str, Any]] = {
    "hull": dict(train=range(5, 13), test=(5, 8, 12, 16, 20, 30), made=8_000, minutes=1.62),
    "delaunay": dict(train=range(4, 7), test=(4, 5, 6, 7, 8), made=20_000, minutes=3.4),
    "tsp": dict(train=range(5, 10), test=(5, 7, 9, 10, 11, 12), made=12_000, minutes=1.35),
}
HIDDEN, BATCH, RATE, CLIP, BEAMS, TESTED = 128, 64, 3e-3, 2.0, 3, 500


def train(task: str, minutes: float, seed: int, progress: Progress) -> tuple[PointerNetwork, dict[str, Any]]:
    """Train until ``minutes`` of processor time are used, those for making problems included."""
    settings = SETTINGS[task]
    began = time.process_time()
    torch.manual_seed(seed)
    sets = [problems(task, settings["made"], n, seed=1000 * seed + n, ordered=True) for n in settings["train"]]
    net = PointerNetwork(hidden=HIDDEN, stop=task != "tsp")
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    bar = progress.add_task(task, total=1.0, loss=float("nan"))
    steps, used = 0, 0.0
    losses: list[float] = []
    while used < 1.0 or not losses:
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1.0 - used) + 1e-5
        points, answers = sets[int(torch.randint(len(sets), ()))]
        rows = torch.randint(len(points), (BATCH,))
        loss = net.loss(points[rows], answers[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        steps += 1
        losses.append(float(loss.detach()))
        used = (time.process_time() - began) / (60 * minutes)
        if steps % 50 == 0:
            progress.update(bar, completed=min(used, 1.0), loss=sum(losses[-50:]) / 50)
    progress.update(bar, completed=1.0)
    return net.eval(), {"steps": steps, "loss": sum(losses[-200:]) / len(losses[-200:]), "minutes": minutes}


def measure(net: PointerNetwork, task: str, n: int) -> dict[str, float]:
    """Scores on problems that training has not seen."""
    test = problems(task, TESTED, n, seed=10_000_000 + n, ordered=True)
    found, _ = net.decode(test.points, beams=BEAMS, tour=task == "tsp")
    row = {"points": n, **score(task, test, found)}
    if task == "tsp":
        optimal = float(tour_length(test.points, test.answers).mean())
        nearest = float(tour_length(test.points, nearest_neighbour_tours(test.points)).mean())
        row["nearest_neighbour_ratio"] = nearest / optimal
    return row


def draw(nets: dict[str, PointerNetwork], path: Path) -> None:
    """One row per task: the truth in grey, what the network says in colour, up to twice the trained size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(nets), 4, figsize=(11, 2.9 * len(nets)), squeeze=False)
    for row, (task, net) in zip(axes, nets.items(), strict=True):
        trained = SETTINGS[task]["train"]
        for ax, n in zip(row, (trained[0], trained[-1], SETTINGS[task]["test"][-2], SETTINGS[task]["test"][-1])):  # noqa: B905
            one = problems(task, 1, n, seed=77, ordered=True)
            found, _ = net.decode(one.points, beams=BEAMS, tour=task == "tsp")
            for answer, style in (
                (one.answers, dict(color="0.75", linewidth=5)),
                (found, dict(color="tab:red", linewidth=1.4)),
            ):
                for line in _lines(task, Problems(one.points, answer)):
                    ax.plot(line[:, 0], line[:, 1], **style)
            ax.scatter(*one.points[0].T, color="black", s=14, zorder=3)
            beyond = "" if n in trained else ", beyond training"
            ax.set_title(f"{task}, {n} points{beyond}", fontsize=10)
            ax.set_xticks([])
            ax.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _lines(task: str, given: Problems) -> list[torch.Tensor]:
    index = [i for i in given.answers[0].tolist() if i >= 0]
    rings = [index[i : i + 3] for i in range(0, len(index) - 2, 3)] if task == "delaunay" else [index]
    return [given.points[0][[*ring, ring[0]]] for ring in rings if ring]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--times", type=float, default=1.0, help="train so many times as long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pointer.json"))
    parser.add_argument("--keep", type=Path, help="folder for trained networks; tasks that are there are not trained")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = list(SETTINGS) if args.task == "all" else [args.task]
    report: dict[str, Any] = {
        "what": "pointer networks",
        "settings": {
            "hidden": HIDDEN, "batch": BATCH, "rate": RATE, "beams": BEAMS, "tested": TESTED, "seed": args.seed,
            "order": "left to right",
        },
        "machine": machine(),
        "records": [],
    }  # fmt: skip
    nets = {}
    columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[loss]:.3f}"))
    with Progress(*columns) as progress:
        for task in chosen:
            minutes = args.times * SETTINGS[task]["minutes"]
            kept = args.keep and args.keep / f"{task}-{args.seed}-{minutes:g}.pt"
            if kept and kept.exists():
                facts = torch.load(kept, weights_only=True)
                net = PointerNetwork(hidden=HIDDEN, stop=task != "tsp").eval()
                net.load_state_dict(facts.pop("net"))
            else:
                net, facts = train(task, minutes, args.seed, progress)
                if kept:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    torch.save({"net": net.state_dict(), **facts}, kept)
            nets[task] = net
            trained = [SETTINGS[task]["train"][0], SETTINGS[task]["train"][-1]]
            rows = [measure(net, task, n) for n in SETTINGS[task]["test"]]
            report["records"].append({"task": task, "trained_points": trained, **facts, "test": rows})
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            for row in rows:
                progress.console.print(task, {k: round(v, 4) for k, v in row.items()})
    if args.picture:
        draw(nets, args.picture)


if __name__ == "__main__":
    main()
