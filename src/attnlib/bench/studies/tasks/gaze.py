"""Gaze: does OAT say where a searcher looks, on shelves larger than those that it learnt from?

The searcher is a known policy, so that a second one of the same kind tells how alike paths can be. Beside OAT the same
network with rows of places that are learnt instead of fitted to distances, and chains that draw the next thing by where
it is from the last one, and by its colour besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....models.perception.oat import OAT
from ....models.perception.scanpaths import behaviour_gap, behaviour_rates, sequence_score
from ...clock import machine
from ...data.gaze import Searched, search, shelves
from ...small import Progress, fit, interval, panels, parameters, picture, study, told
from ...stats import paired_interval

QUESTION = "Does OAT tell where a searcher looks on shelves of sizes that it never saw?"
NAMES = ("chain", "chain that sees colours", "learnt places", "OAT", "another searcher")
LEARNT = ((3, 4), (2, 5))
SIZES = {"3 x 4, learnt": (3, 4), "4 x 6": (4, 6), "2 x 8": (2, 8)}
LONGEST = 16
#: Shelves of each size that chains count on.
COUNTED = 1_200

Draw = Callable[[Searched, int, torch.Generator], list[list[int]]]


class LearntPlaces(OAT):
    """The same with a table of rows and columns that is learnt from noise of the same size."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        table = self.table
        del self.table
        self.table = nn.Parameter(torch.randn_like(table) * table.square().mean().sqrt())


class Chain:
    """The next thing is drawn by how often things there, seen from the last one, were taken where there were any.

    Args:
        made: shelves to count on.
        colours: whether things of the colour that is sought are counted apart.
    """

    def __init__(self, made: Sequence[Searched], colours: bool):
        self.colours, taken, offered = colours, Counter[Any](), Counter[Any]()
        for some in made:
            for i, path in enumerate(some.path.tolist()):
                at: int | None = None
                for thing in path[: path.index(-1) if -1 in path else None]:
                    keys = self._keys(some, i, at)
                    offered.update(keys)
                    taken[keys[thing]] += 1
                    at = thing
        self.weights = {key: (taken[key] + 0.1) / (count + 1) for key, count in offered.items()}
        self.rare = min(self.weights.values())

    def _keys(self, made: Searched, i: int, at: int | None) -> list[Any]:
        places = made.places[i]
        here = (places.amin(0) + places.amax(0)) / 2 if at is None else places[at]
        far = (places - here).tolist()
        same = (made.colours[i] == made.colours[i, made.sought[i]]).tolist()
        return [(at is None, *d, s if self.colours else None) for d, s in zip(far, same, strict=True)]

    def sample(self, made: Searched, i: int, generator: torch.Generator) -> list[int]:
        """A path, which ends at what is sought."""
        path: list[int] = []
        while len(path) < LONGEST and (not path or path[-1] != int(made.sought[i])):
            keys = self._keys(made, i, path[-1] if path else None)
            weights = torch.tensor([self.weights.get(key, self.rare) for key in keys])
            path.append(int(weights.multinomial(1, generator=generator)))
        return path


def trained(name: str, seed: int, steps: int, count: int = 24) -> OAT:
    """A small network after so many batches of both sizes in turn."""
    torch.manual_seed(seed)
    kind = LearntPlaces if name == "learnt places" else OAT
    model = kind(32, 4, 64, (1, 1), table_size=10, drop=0.0, levels=1, max_steps=LONGEST)
    turn = [0]

    def batch(generator: torch.Generator) -> Searched:
        turn[0] += 1
        return shelves(count, generator, LEARNT[turn[0] % len(LEARNT)], LONGEST)

    def loss(m: Any, made: Searched) -> Tensor:
        found: Tensor = m.loss(m(*made[:4]), made.path)["next"]
        return found

    fit(model, batch, loss, steps, lr=4e-3, seed=seed)
    return model.eval()


def sampler(name: str, seed: int, steps: int) -> tuple[Draw, int]:
    """What draws paths for the shelves of a world, so many each, and how many numbers it holds."""
    if name == "another searcher":
        return lambda made, many, g: [
            search(made.places[i], made.colours[i], int(made.sought[i]), g, LONGEST).tolist()
            for i in range(len(made.path)) for _ in range(many)
        ], 0  # fmt: skip
    if name.startswith("chain"):
        generator = torch.Generator().manual_seed(seed)
        held = [shelves(COUNTED, generator, size, LONGEST) for size in LEARNT]
        chain = Chain(held, "colours" in name)
        return lambda made, many, g: [
            chain.sample(made, i, g) for i in range(len(made.path)) for _ in range(many)
        ], len(chain.weights)  # fmt: skip
    model = trained(name, seed, steps)
    return lambda made, many, g: [
        path for one in model.predict(*made[:3], samples=many, generator=g).tolist() for path in one
    ], parameters(model)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 250,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 50,
    samples: int = 4,
) -> dict[str, Any]:
    """Train what is trained, draw paths, and hold them against one searcher's.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-gaze-cpu.svg`` and ``.png``.
        steps, seeds, tested: of training, and shelves of each size.
        samples: paths drawn for each.

    Returns:
        Plain values, for JSON. ``<size>`` is the mean sequence score in percent, ``<size>, behaviour`` the mean
        relative gap of behaviour counts in percent.
    """

    held: dict[str, Draw] = {}  # of the first seed, for the picture

    def run(name: str, seed: int) -> dict[str, float]:
        draw, size = sampler(name, seed, steps)
        if seed == seeds[0]:
            held[name] = draw
        found: dict[str, float] = {"parameters": size}
        for label, shape in SIZES.items():
            made = shelves(tested, torch.Generator().manual_seed(10_000 + seed), shape, LONGEST)
            paths = draw(made, samples, torch.Generator().manual_seed(20_000 + seed))
            truth = [p for p in made.path.tolist() for _ in range(samples)]
            scores = [sequence_score(a, b) for a, b in zip(paths, truth, strict=True)]
            sought = made.sought.repeat_interleave(samples).tolist()
            gap = behaviour_gap(behaviour_rates(paths, sought), behaviour_rates(made.path, made.sought.tolist()))
            found |= {label: 100 * sum(scores) / len(scores), f"{label}, behaviour": 100 * gap}
        unseen = [k for k in list(SIZES)[1:]]
        return found | {"unseen": sum(found[k] for k in unseen) / len(unseen)}

    result = study(NAMES, run, "unseen", "chain that sees colours", seeds, progress, keep, (steps, tested, samples))
    by = {n: {r["seed"]: r["unseen"] for r in result["runs"] if r["name"] == n} for n in NAMES}
    gap = paired_interval(by["OAT"], by["learnt places"])
    result["OAT against learnt places"] = None if gap is None else interval(gap)
    result |= {"question": QUESTION, "machine": machine(), "steps": steps, "tested": tested, "samples": samples}
    if pictures is not None:
        curves = {r["name"]: [(k, r[k]["mean"], r[k]["half"]) for k in SIZES] for r in result["rows"]}
        path = Path(pictures) / "tasks-gaze-cpu.svg"
        picture(path, curves, "shelf", "sequence score, %", "paths alike", (), (NAMES[0], NAMES[-1]))
        _draw(Path(pictures) / "tasks-gaze-cpu.png", seeds[0], steps, held)
    return result


def _draw(path: Path, seed: int, steps: int, held: dict[str, Draw]) -> None:
    """Two shelves of a size that was not learnt, a searcher's path and drawn ones."""
    made = shelves(2, torch.Generator().manual_seed(30_000 + seed), (4, 6), LONGEST)
    columns = {"a searcher": made.path.tolist()}
    for name in ("chain", "learnt places", "OAT"):
        draw = held[name] if name in held else sampler(name, seed, steps)[0]
        columns[name] = draw(made, 1, torch.Generator().manual_seed(seed))
    with panels(path, ["", ""], list(columns), (1.7, 1.25)) as axes:
        for i, line in enumerate(axes):
            shelf = made.images[i, :, 0, 0].reshape(4, 6, 3).numpy()
            for axis, paths in zip(line, columns.values(), strict=True):
                axis.imshow(shelf, interpolation="nearest", alpha=0.75)
                at = made.places[i][[thing for thing in paths[i] if thing >= 0]]
                axis.plot(at[:, 1].numpy(), at[:, 0].numpy(), "-o", color="black", markersize=2.5, linewidth=1)
                row, column = made.places[i, made.sought[i]].tolist()
                axis.plot(column, row, "s", markersize=13, markerfacecolor="none", color="white", markeredgewidth=1.5)


def table(result: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    sizes = list(SIZES)
    lines = [
        f"| paths by | {' | '.join(sizes)} | unseen, against the chain that sees colours "
        "| behaviour off, learnt size | behaviour off, unseen | parameters |",
        "|---" * (5 + len(sizes)) + "|",
    ]
    for row in result["rows"]:
        gap = (
            "" if row["name"] == result["baseline"] else f"{row['against']['mean']:+.1f} ± {row['against']['half']:.1f}"
        )
        unseen = " / ".join(f"{row[f'{k}, behaviour']['mean']:.0f}" for k in sizes[1:])
        cells = [row["name"], *(told(row, k) for k in sizes), gap, told(row, f"{sizes[0]}, behaviour", 0), unseen]
        lines.append("| " + " | ".join([*cells, f"{row['parameters']['mean']:.0f}"]) + " |")
    return "\n".join(lines)
