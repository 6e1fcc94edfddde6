"""Annotators: after one song that somebody has rated, does PDMER's meta-learning follow what they say of others?

Annotators have gains of their own, a quarter of them below zero. The same network is trained to adapt to them, and
plainly on the same kind of ratings, for as long and for as many steps; all then adapt to one song of annotators whom
they have not met, with the steps and the rate that served best on another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.meta import Rated
from ....models.pdmer import PDMER, scores
from ...clock import machine
from ...data.annotators import MEL, WIDTH, Ratings, ratings
from ...small import Progress, fit, panels, parameters, picture, study, told

QUESTION = "Does meta-learning follow an annotator better after one song than training without it?"
NAMES = ("no meta-learning", "no meta-learning, as many steps", "PDMER")
#: How many plain steps take about as long as one that adapts.
PLAIN = 8
#: Steps and rate of adapting, of PDMER in training, and of all in the test.
INNER = (4, 0.1)
ADAPT = (32, 0.3)


def trained(name: str, seed: int, steps: int, people: int = 6) -> PDMER:
    """A small network after so many batches of annotators, or :data:`PLAIN` times as many without adapting."""
    torch.manual_seed(seed)
    inner, lr = INNER
    model = PDMER(
        WIDTH, 4, 1, 32, local=1, wide=4, mel_size=MEL, window=12, max_distance=16, drop=0.0, attention_weight=0.1,
        inner_steps=inner, inner_lr=lr,
    )  # fmt: skip

    def loss(m: Any, made: Ratings) -> Tensor:
        said: Any = Rated(made.values, made.annotator) if name == "PDMER" else made.values
        (step,) = m.steps({"mel": made.mel, "song": made.song, "target": said})
        total: Tensor = sum(step.terms().values())
        return total

    fit(model, lambda g: ratings(people, g), loss, PLAIN * steps if name == NAMES[0] else steps, lr=5e-3, seed=seed)
    return model.eval()


def follow(model: PDMER, made: Ratings, inner: int, lr: float) -> tuple[Tensor, Tensor]:
    """Answers for the songs of annotators but their first, before and after adapting to it: (P, songs - 1, S, 2)."""
    before, after = [], []
    for who in made.annotator.unique():
        mel, song, said = (t[made.annotator == who] for t in made[:3])
        mine = model.adapt({"mel": mel[:1], "song": song[:1], "target": said[:1]}, inner, lr)
        before.append(model.predict(mel[1:], song[1:]))
        after.append(mine.predict(mel[1:], song[1:]))
    return torch.stack(before), torch.stack(after)


def concordance(found: Tensor, made: Ratings) -> tuple[float, float]:
    """Mean CCC of arousal and valence."""
    truth = made.values.unflatten(0, (len(found), -1))[:, 1:]
    ccc = scores(found.flatten(0, 1), truth.flatten(0, 1)).ccc.mean(0)
    return float(ccc[0]), float(ccc[1])


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 60,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 20,
) -> dict[str, Any]:
    """Train all, adapt all to annotators they have not met, and measure concordance with what these say.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-annotators-cpu.svg`` and ``.png``.
        steps, seeds, tested: of training, and annotators of the test.

    Returns:
        Plain values, for JSON.
    """

    held: dict[str, PDMER] = {}  # of the first seed, for the picture

    def run(name: str, seed: int) -> dict[str, float]:
        model = trained(name, seed, steps)
        if seed == seeds[0]:
            held[name] = model
        made = ratings(tested, torch.Generator().manual_seed(10_000 + seed))
        before, after = (concordance(x, made) for x in follow(model, made, *ADAPT))
        return {
            "after": sum(after) / 2, "before": sum(before) / 2, "arousal": after[0], "valence": after[1],
            "parameters": parameters(model),
        }  # fmt: skip

    key = (steps, tested, PLAIN, INNER, ADAPT)
    result = study(NAMES, run, "after", NAMES[0], seeds, progress, keep, key)
    result |= {"question": QUESTION, "machine": machine(), "steps": steps, "tested": tested, "adapting": ADAPT}
    if pictures is not None:
        curves = {r["name"]: [(k, r[k]["mean"], r[k]["half"]) for k in ("before", "after")] for r in result["rows"]}
        path = Path(pictures) / "tasks-annotators-cpu.svg"
        picture(path, curves, "one song", "concordance (CCC)", "annotators that were never met", (), (NAMES[0],))
        _draw(Path(pictures) / "tasks-annotators-cpu.png", seeds[0], steps, held)
    return result


def _draw(path: Path, seed: int, steps: int, held: dict[str, PDMER]) -> None:
    """What three annotators say of a song's arousal, and what both models answer after another song."""
    made = ratings(3, torch.Generator().manual_seed(30_000 + seed))
    names = (NAMES[0], NAMES[-1])
    answers = {n: follow(held[n] if n in held else trained(n, seed, steps), made, *ADAPT)[1][:, 0, :, 0] for n in names}
    truth = made.values.unflatten(0, (3, -1))[:, 1, :, 0]
    with panels(path, ["arousal"], [f"annotator {i + 1}" for i in range(3)], (2.0, 1.6)) as axes:
        for i, axis in enumerate(axes[0]):
            axis.plot(truth[i].tolist(), color="black", linewidth=1.6, label="said")
            for (name, found), style in zip(answers.items(), ("--", "-"), strict=True):
                axis.plot(found[i].tolist(), style, linewidth=1.2, label=name)
            axis.set_ylim(-1.4, 1.4)
        axes[0][0].legend(fontsize=6, frameon=False)


def table(result: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| training | CCC before the song | after it | against no meta-learning | arousal | valence | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        against = row["against"]
        gap = "" if row["name"] == NAMES[0] else f"{against['mean']:+.2f} ± {against['half']:.2f}"
        cells = [row["name"], told(row, "before", 2), told(row, "after", 2), gap]
        cells += [told(row, k, 2) for k in ("arousal", "valence")]
        lines.append("| " + " | ".join([*cells, f"{row['parameters']['mean']:.0f}"]) + " |")
    return "\n".join(lines)
