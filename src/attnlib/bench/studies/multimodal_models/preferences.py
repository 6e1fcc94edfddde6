"""Preference training of the small multimodal model: what it invents afterwards, misses, and how sure it is.

``attnlib bench --suite multimodal-models-preferences --out benchmarks/results`` writes
``multimodal-models-preferences-cpu.json`` and its picture. The model lists what is on training scenes, half of them
with a broken pair; where it errs, its answer is rejected and the same answer, minimally revised by what can be seen, is
chosen. Every recipe has the same pictures and the same number of updates (OPA-DPO's alignment is part of them), the
same adapters, and a rate chosen with the same effort on scenes of the part "dev" (:func:`choose_rates`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ....checks import check_choice
from ....convert import preference
from ....convert.preference import MeanPixels, Preference, Recipe, Segment, Side, Term, dpo, opa_dpo, rdpo, sft
from ....convert.preference.reference import language_layers
from ....extras import need
from ...clock import machine
from ...data import scenes
from ...data.scenes import Item, Scene
from ...small import Progress, picture
from ...store import Lines, identity
from ..multimodal import bootstrap
from ._lists import Asked, Told, ask, clear, visible

QUESTION = (
    "Does preference training make a small multimodal model invent less, at what cost in recall and calibration, and "
    "what of each recipe does it?"
)

#: Numbers of the first scenes of training, of choosing rates, and of the test.
TRAIN, DEV, TEST = 60_000_000, 2_000_000, scenes.FRESH + 50_000
#: Rates that every recipe is tried with.
TRIED = (3e-4, 1e-3, 3e-3)


class Contestant(NamedTuple):
    """How it is trained.

    Args:
        recipe: of :mod:`attnlib.convert.preference`.
        pairs: ``"own"`` answers as rejected, or ``"refilled"`` ones.
        rate: the contestant whose rate it has.
        align: imitate first, where the recipe does.
    """

    recipe: Recipe
    pairs: str
    rate: str
    align: bool = True


def _over_own(response: str) -> Recipe:
    return replace(dpo(), terms=(Term("text", Side(response), Side("rejected")),))


MAIN = ("SFT", "DPO", "DPO with image term", "rDPO", "OPA-DPO")
CONTESTANTS: dict[str, Contestant] = {
    "SFT": Contestant(sft(), "own", "SFT"),
    "DPO": Contestant(dpo(), "own", "DPO"),
    "DPO with image term": Contestant(rdpo(image=MeanPixels(0.3)), "own", "DPO with image term"),
    "rDPO": Contestant(rdpo(), "refilled", "rDPO"),
    "OPA-DPO": Contestant(opa_dpo(), "own", "OPA-DPO"),
    "SFT, captions": Contestant(sft("standard"), "own", "SFT"),
    "DPO, captions chosen": Contestant(_over_own("standard"), "own", "DPO"),
    "DPO, captions in another order chosen": Contestant(_over_own("foreign"), "own", "DPO"),
    "rDPO without image": Contestant(rdpo().without("image"), "refilled", "rDPO"),
    "rDPO without text": Contestant(rdpo().without("text"), "refilled", "rDPO"),
    "OPA-DPO without alignment": Contestant(opa_dpo(), "own", "OPA-DPO", False),
    "OPA-DPO without captions": Contestant(
        replace(opa_dpo().without("standard", "standard-image", "anchor-standard", "anchor-standard-image"),
                alignment=("chosen",)), "own", "OPA-DPO"),
    "OPA-DPO without revisions": Contestant(
        replace(opa_dpo().without("revised", "revised-image", "anchor-revised", "anchor-revised-image"),
                alignment=("standard",)), "own", "OPA-DPO"),
    "OPA-DPO without images": Contestant(opa_dpo(image_coefficient=0), "own", "OPA-DPO"),
    "OPA-DPO without anchors": Contestant(opa_dpo(anchor_coefficient=0), "own", "OPA-DPO"),
}  # fmt: skip
POLICY = ("SFT", "SFT, captions", "DPO", "DPO, captions chosen", "DPO, captions in another order chosen")

#: Chosen by :func:`choose_rates`.
RATES: Mapping[str, float] = {"SFT": 3e-3, "DPO": 3e-4, "DPO with image term": 3e-4, "rDPO": 3e-4, "OPA-DPO": 3e-4}


def revise(said: str, scene: Scene) -> list[Segment]:
    """An answer thing by thing: what cannot be seen, or was said before, gives way to a thing that shares a word with
    it and was not named, or to nothing; clear things that were not named are added where reading order has them."""
    here, place = visible(scene), {thing.name: thing.cell for thing in scene.things}
    parts = [part.strip() for part in said.split(",") if part.strip()]
    missing = [name for name in here if name not in parts]
    steps: list[tuple[str, str]] = []
    for i, part in enumerate(parts):
        right = part in here and part not in parts[:i]
        new = part if right else next((n for n in missing if set(n.split()) & set(part.split())), "")
        if not right and new:
            missing.remove(new)
        steps.append((part, new))
    for name in [n for n in clear(scene) if n in missing]:
        later = [i for i, (_, new) in enumerate(steps) if new and place[new] > place[name]]
        steps.insert(later[0] if later else len(steps), ("", name))
    out: list[Segment] = []
    for old, new in steps:
        before = [", " if any(text) else "" for text in ([s.said for s in out], [s.revised for s in out])]
        first, second = (f"{comma}{text}" if text else "" for comma, text in zip(before, (old, new), strict=True))
        fine = old == new
        out.append(Segment(first, second, 4 if fine else 1, "correct" if fine else "image_recognition_error"))
    return out


@functools.lru_cache(maxsize=1)
def _base() -> tuple[Any, Any]:
    return scenes.load_model()


@functools.lru_cache(maxsize=4)
def _pairs(seed: int, count: int) -> dict[str, list[Preference]]:
    """Own answers that err, their revisions and captions, and revisions refilled under a neighbour's picture."""
    model, tokenizer = _base()
    prompt = torch.tensor(tokenizer(scenes.prompt("list the objects"))["input_ids"])
    own: list[Preference] = []
    number = TRAIN + 100_000 * seed
    while len(own) < count:
        some = [scenes.make_scene(number + i, "train", ("broken", "usual")[i % 2]) for i in range(64)]
        number += 64
        said = scenes.answer(model, tokenizer, [Item(s, scenes.questions(s, "list")[0]) for s in some])
        for scene, text in zip(some, said, strict=True):
            segments = revise(text, scene)
            if all(s.score == 4 for s in segments) or not any(s.revised for s in segments):
                continue
            responses, weights = preference.encode_revision(tokenizer, segments)
            for name, things in (("standard", scene.names), ("foreign", scene.names[::-1])):
                responses[name] = [*tokenizer(" , ".join(things))["input_ids"], tokenizer.eos_token_id]
            if responses["rejected"] not in [v for k, v in responses.items() if k != "rejected"]:
                inputs = {"input_ids": prompt, "pixel_values": scenes.pixel_values([scene])}
                own.append(Preference(inputs, responses, {}, weights))
    own = own[:count]
    with torch.no_grad():
        pixels = torch.cat([p.inputs["pixel_values"] for p in own])
        seen = model.model.vision_tower(pixels).last_hidden_state[:, 1:].mean(1)
    own = preference.with_neighbours(own, seen - seen.mean(0))
    # Half of the things of a revision are said anew; what is said are names of things.
    names = {i for name in scenes.NAMES for i in tokenizer(name)["input_ids"]}
    rng = np.random.default_rng([seed, 31])
    masked = []
    for pair in own:
        ids = pair.responses["chosen"]
        thing = np.cumsum([i not in names for i in ids])
        chosen = rng.permutation(thing.max())[: max(1, (thing.max() + 1) // 2)]
        masked.append([i in names and t in chosen for i, t in zip(ids, thing, strict=True)])
    refilled = preference.refill_pairs(
        model, own, masked, batch_size=64, never=[i for i in range(len(tokenizer)) if i not in names]
    )
    return {"own": own, "refilled": refilled}


def trained(name: str, rate: float, seed: int, steps: int, count: int, batch_size: int = 8, rank: int = 16) -> Any:
    """The model after a contestant's training: adapters on queries and values, merged."""
    check_choice("name", name, CONTESTANTS)
    peft: Any = need("peft", "preference training")
    how, model = CONTESTANTS[name], copy.deepcopy(_base()[0])
    layers = [n for n in language_layers(model) if n.endswith(("q_proj", "v_proj"))]
    align = how.align and bool(how.recipe.alignment)
    first = max(1, steps // 4) if align else 0
    return preference.train(
        model, _pairs(seed, count)[how.pairs], how.recipe, seed=seed, lr=rate, align_lr=rate, batch_size=batch_size,
        adapter=peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers),
        align=align if how.recipe.alignment else None, steps=steps - first, align_steps=first or None,
    ).merge()  # fmt: skip


@functools.lru_cache(maxsize=8)
def _asked(count: int, first: int, part: str) -> Asked:
    return ask(count, first, part)


def _told(name: str, rate: float, seed: int, steps: int, count: int, asked: Asked, presence: bool = True) -> Told:
    model = _base()[0] if name == "plain" else trained(name, rate, seed, steps, count).eval()
    return Told.of(model, _base()[1], asked, presence)


def choose_rates(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    tried: Sequence[float] = TRIED,
    names: Sequence[str] = MAIN,
    scenes: int = 100,
    steps: int = 24,
    count: int = 160,
) -> dict[str, Any]:
    """Errors per scene of the part "dev" for every recipe and rate, seed 0; the least decides.

    Returns:
        ``rates`` by recipe, and ``rows``, that of the plain model first.
    """
    kept, rows = Lines(keep), []
    mark = identity(["rates", scenes, steps, count])
    held = {(r["name"], r["rate"]): r for r in kept.rows("key", "name", "rate") if r["key"] == mark}
    for rate in (0.0, *tried):
        for name in names if rate else ("plain",):
            row = held.get((name, rate))
            if row is None:
                told = _told(name, rate, 0, steps, count, _asked(scenes, DEV, "dev"), False)
                row = {"key": mark, "name": name, "rate": rate, **{k: round(told.value(k), 4) for k in told.sums}}
                kept.add([row])
                if progress is not None:
                    progress(f"{name}, rate {rate:g}: {row}")
            rows.append({k: v for k, v in row.items() if k != "key"})
    best = {n: min((r for r in rows if r["name"] == n), key=lambda r: r["errors"])["rate"] for n in names}
    return {"rates": best, "rows": rows, "scenes": 2 * scenes, "part": "dev", "first": DEV}


#: Rates of the table, what they are called there, and how they are written.
COLUMNS = {
    "invented second": ("second of a broken pair listed %", 100, 1), "invented": ("listed and not there %", 100, 1),
    "recall": ("clear things listed %", 100, 1), "errors": ("errors per scene", 1, 3), "Brier": ("Brier", 1, 3),
    "too sure": ("too sure", 1, 3), "yes to absent seconds": ("yes to absent seconds %", 100, 1),
    "yes to what is there": ("yes to what is there %", 100, 1),
}  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of :func:`measure` in Markdown; what differs from the plain model beyond its interval is bold."""
    lines = [
        f"| contestant | {' | '.join(title for title, *_ in COLUMNS.values())} |",
        f"|{'---|' * (1 + len(COLUMNS))}",
    ]
    for row in rows:
        cells = [row["name"]]
        for key, (_, by, digits) in COLUMNS.items():
            value, low, high = (f"{by * v:.{digits}f}" for v in (row[key]["value"], *row[key]["interval"]))
            below, above = row[key]["difference_interval"]
            text = f"{value} ({low} to {high})"
            cells.append(f"**{text}**" if below > 0 or above < 0 else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    names: Sequence[str] = tuple(CONTESTANTS),
    scenes: int = 200,
    steps: int = 24,
    count: int = 160,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Every contestant on the same test scenes, and paired differences from the plain model and from what it varies.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``multimodal-models-preferences-cpu.svg``.
        seeds: of training scenes, order and adapters; each has test scenes of its own.
        names: contestants.
        scenes: of a seed with a broken pair, and as many usual ones.
        steps: updates of 8 pairs.
        count: pairs.
        rates: of the recipes; ``None`` for :data:`RATES`.

    Returns:
        Plain values, for JSON: by contestant every rate with its interval over resampled scenes and its paired
        ``difference`` from the plain model; under ``against`` the same from the recipe it is a variant of.
    """
    used = dict(RATES if rates is None else rates)
    for name in names:
        check_choice("names", name, CONTESTANTS)
        if CONTESTANTS[name].rate not in used:
            raise ValueError(f"rates must hold that of {CONTESTANTS[name].rate!r}, got {sorted(used)}")
    if not seeds:
        raise ValueError(f"seeds must hold at least one, got {seeds!r}")
    kept = Lines(keep)
    mark = identity(["preferences", scenes, steps, count, used])
    held = {(r["name"], r["seed"]): r for r in kept.rows("key", "name", "seed") if r["key"] == mark}
    for seed in seeds:
        asked = _asked(scenes, TEST + 10_000 * seed, "test")
        for name in ("plain", *names):
            if (name, seed) not in held:
                rate = used[CONTESTANTS[name].rate] if name != "plain" else 0.0
                told = _told(name, rate, seed, steps, count, asked)
                held[name, seed] = {"key": mark, "name": name, "seed": seed, "sums": told.plain()}
                kept.add([held[name, seed]])
                if progress is not None:
                    progress(f"{name}, seed {seed}: " + ", ".join(f"{k} {told.value(k):.3f}" for k in told.sums))
    sums = {n: Told.joined([held[n, s]["sums"] for s in seeds]) for n in ("plain", *names)}
    found = {n: bootstrap(t, sums["plain"]) for n, t in sums.items()}
    against: list[dict[str, Any]] = []
    for name in names:
        whole = CONTESTANTS[name].rate
        if whole != name and whole in sums:
            both = bootstrap(sums[name], sums[whole])
            gaps = {k: {w: v[w] for w in ("difference", "difference_interval")} for k, v in both.items()}
            against.append({"name": name, "of": whole, **gaps})
    if pictures is not None:
        picture(
            Path(pictures) / "multimodal-models-preferences-cpu.svg",
            {
                label: [(n, *_bar(found[n][rate])) for n in found]
                for label, rate in (("second of a broken pair listed", "invented second"),
                                    ("listed and not there", "invented"), ("clear things missed", "missed"))
            },
            "", "%", "What is invented and missed in lists after preference training",
        )  # fmt: skip
    return {
        "question": QUESTION, "settings": {"scenes": 2 * scenes * len(seeds), "seeds": list(seeds), "updates": steps,
        "pairs": count, "batch": 8, "rates": used}, "rows": [{"name": n, **f} for n, f in found.items()],
        "against": against, "machine": machine(),
    }  # fmt: skip


def _bar(entry: Mapping[str, Any]) -> tuple[float, float]:
    """Middle and half of an interval, in percent."""
    low, high = entry["interval"]
    return 50 * (low + high), 50 * (high - low)
