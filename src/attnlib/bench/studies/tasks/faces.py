"""Small faces made worse: RestoreFormer scaled down, whose decoder reads the dictionary, and one with self-attention.

The faces are the hundred of scikit-image's ``lfw_subset``, grey and 24 pixels a side; a fifth, other ones for every
seed, is the test. For every seed one dictionary is trained on undegraded faces; both restorers start from it, keep its
codes, and are trained for as many steps on the same degraded faces (blur, up to four times smaller, noise). With
self-attention all that is known of a face goes through its codes; with cross attention the degraded face asks, at two
scales, and the dictionary's map answers. Beside them: the degraded face as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.restore.degrade import Degradation
from ....models.restore.restoreformer import RestoreFormer
from ...clock import machine
from ...data.files import _packaged, require
from ...small import Progress, fit, parameters, picture, psnr, sheet, study, told

QUESTION = "Do faces come back better when a degraded face reads a dictionary than by self-attention on its codes?"
GIVEN, PLAIN, OURS = "as given", "self-attention", "cross attention"
NAMES = (GIVEN, PLAIN, OURS)
SIDE = 24
WORSE = Degradation(
    blur=(2.0, 8.0), down=(1.5, 4.0), noise=(0.0, 40.0), quality=None, shift=0.0, grey=0.0, haze=0.0, uneven=0.0,
    size=96,
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def lfw() -> Tensor:
    """The hundred faces of scikit-image (100, 1, 24, 24), 0 to 1."""
    held = require("numpy").load(_packaged("skimage", "data/lfw_subset.npy"))
    return torch.from_numpy(held[:100]).float()[:, None, :SIDE, :SIDE].contiguous()


def halves(seed: int, tested: int) -> tuple[Tensor, Tensor]:
    """Faces to train on and to test with."""
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    return lfw()[order[tested:]], lfw()[order[:tested]]


def some(faces: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Faces out of these, half of them mirrored."""
    chosen = faces[torch.randint(len(faces), (count,), generator=generator)]
    turned = torch.rand(count, generator=generator) < 0.5
    return torch.where(turned[:, None, None, None], chosen.flip(3), chosen)


def made_worse(faces: Tensor, generator: torch.Generator) -> Tensor:
    """Each degraded in its own way."""
    return torch.stack([WORSE(face, generator)[0] for face in faces])


def build(cross: bool) -> RestoreFormer:
    """Three levels of 8, 16 and 16 channels, 32 codes."""
    return RestoreFormer(
        1, 8, (1, 2, 2), 1, 32, 16, 2, 1, cross, ("dictionary",) if cross else (), groups=4, codes=0.25
    )


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 100,
    batch: int = 8,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 20,
    times: int = 4,
    lr: float = 3e-3,
) -> dict[str, Any]:
    """Train a dictionary and both restorers for each seed.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-faces-cpu.svg`` and ``tasks-faces-predictions.png``, what the last seed restores.
        steps, batch, lr: of each of the three trainings.
        seeds: of everything.
        tested: faces that are held out.
        times: degradations of each.

    Returns:
        Plain values, for JSON: PSNR in decibels, and of the dictionary's own faces.
    """
    shown: dict[str, Tensor] = {}

    def fitted(model: RestoreFormer, faces: Tensor, worse: bool, seed: int) -> RestoreFormer:
        def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
            right = some(faces, batch, g)
            return 2 * (made_worse(right, g) if worse else right) - 1, 2 * right - 1

        def loss(m: Any, given: tuple[Tensor, Tensor]) -> Tensor:
            total: Tensor = sum(m.loss(m(given[0]), given[1]).values())  # type: ignore[assignment]
            return total

        fit(model, draw, loss, steps, lr=lr, seed=seed)
        return model.eval()

    @functools.lru_cache(maxsize=1)
    def dictionary(seed: int) -> RestoreFormer:
        torch.manual_seed(seed)
        return fitted(build(False), halves(seed, tested)[0], False, seed)

    def run(name: str, seed: int) -> dict[str, float]:
        faces, test = halves(seed, tested)
        test = test.repeat(times, 1, 1, 1)
        given = made_worse(test, torch.Generator().manual_seed(10_000 + seed))
        if name == GIVEN:
            made, count, codes = given, 0, 0.0
        else:
            first = dictionary(seed)
            torch.manual_seed(seed)
            model = build(name == OURS)
            model.start_from(first)
            if name == PLAIN:
                model.quantizer.requires_grad_(False)
            fitted(model, faces, True, 100 + seed)
            made, count = model.predict(given * 2 - 1) / 2 + 0.5, parameters(model)
            codes = psnr(first.predict(test[:tested] * 2 - 1) / 2 + 0.5, test[:tested])
        shown.update({"given": given[:8], "truth": test[:8]} | ({} if name == GIVEN else {name: made[:8]}))
        return {"psnr": psnr(made, test), "parameters": count, "dictionary": codes}

    result = study(NAMES, run, "psnr", PLAIN, seeds, progress, keep, (steps, batch, tested, times, lr))
    result |= {
        "question": QUESTION, "machine": machine(), "steps": steps, "batch": batch, "tested": tested, "times": times,
        "lr": lr,
    }  # fmt: skip
    if pictures is not None:
        curves = {r["name"]: [(r["name"], r["psnr"]["mean"], r["psnr"]["half"])] for r in result["rows"]}
        picture(Path(pictures) / "tasks-faces-cpu.svg", curves, "", "PSNR, dB", "small faces restored")
        if shown:
            rows = {n: shown[n] for n in ("given", "truth", PLAIN, OURS) if n in shown}
            sheet(Path(pictures) / "tasks-faces-predictions.png", rows, zoom=0.7, colours=64)
    return result


def table(found: Mapping[str, Any]) -> str:
    """The results as a table of a page."""
    lines = ["| restored by | PSNR, dB | against self-attention | parameters |", "|---|---|---|---|"]
    for row in found["rows"]:
        gap = "" if row["name"] == PLAIN else told(row, "against", 2)
        gap = gap if gap.startswith("-") or not gap else f"+{gap}"
        lines.append(f"| {row['name']} | {told(row, 'psnr', 2)} | {gap} | {row['parameters']['mean']:,.0f} |")
    return "\n".join(lines)
