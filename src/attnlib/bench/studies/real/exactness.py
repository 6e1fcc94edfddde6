"""Whether techniques that do nothing do nothing, and leave nothing behind, on a real model.

``attnlib bench --suite real-exactness --out benchmarks/results`` measures again what ``real-exactness-cpu.json`` holds.
Two prompts of real text, padded to one length, in which a span is marked as images are in vision-language models:

- identity: every technique that a language model can carry, at the setting that does nothing, in float32: 200 greedy
  tokens and their scores with all of them attached, and 40 with each alone, against the untouched model;
- passing through: settings that run the technique's code and change nothing (a budget above what there is, factors of
  one from a function, no sink above the threshold), that change less than rounding does, and those that only look: the
  same;
- detached: after each has acted at a setting that changes the text, scores of the prompt are held to those before, bit
  for bit;
- bfloat16: scores of the prompt with each that passes through, against the untouched model; the yardstick beside it is
  what bfloat16 itself errs against float32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....cache import Cap, ExpectedAttention, KeyNorm, KVCompression, ObservedAttention, Ratio, SnapKV, SnapKVByHead
from ....hooks import MaskByType, Record, TypeRule, attach, composite
from ....hooks.intervention import Intervention
from ....hooks.tokens import IMAGE, PAD, TEXT
from ....look import Statistics
from ....reduce import CMAI, DyVTE, Learned, Reduce, ReduceByAttention, ScheduledPruning
from ....steer import (
    ContrastiveDecoding,
    HeadReinforcement,
    HeadScale,
    NoImage,
    SinkCalibration,
    VisualBoost,
    VisualRedistribution,
)
from ... import models
from ...clock import machine
from ...converting import tokens_of
from ...data import files
from ...small import Progress
from ._kept import Kept
from ._pictures import panels, save

QUESTION = "do techniques that do nothing leave a real model exactly as it was?"
MODELS = ("smollm2-135m",)

Make = Callable[[int, int], Intervention]  # from numbers of layers and of heads


def _size(hidden: Tensor) -> Tensor:
    return hidden.norm(dim=-1)


#: Settings that do nothing.
IDENTITY: dict[str, Make] = {
    "KVCompression": lambda n, h: KVCompression(KeyNorm(), Ratio(0.0)),
    "SnapKV": lambda n, h: SnapKV(ratio=0.0),
    "SnapKVByHead": lambda n, h: SnapKVByHead(ratio=0.0),
    "HeadScale": lambda n, h: HeadScale([1.0] * h),
    "SinkCalibration (ACT)": lambda n, h: SinkCalibration(beta=1.0),
    "HeadReinforcement (VHR)": lambda n, h: HeadReinforcement(1.0, [1]),
    "ContrastiveDecoding": lambda n, h: ContrastiveDecoding(NoImage(), 1.0, 0.0),
    "VisualBoost (PAINT, PAI)": lambda n, h: VisualBoost(alpha=0.0, sets="all"),
    "VisualRedistribution (VAR)": lambda n, h: VisualRedistribution((0, 1), p=1.0),
    "CMAI": lambda n, h: CMAI(0.0),
    "MaskByType": lambda n, h: MaskByType(TypeRule()),
    "Reduce": lambda n, h: Reduce(Learned(_size), 1.0),
    "ReduceByAttention": lambda n, h: ReduceByAttention({n // 2: 1.0}),
    "ScheduledPruning": lambda n, h: ScheduledPruning([1.0] * n),
}

#: Settings that run and change nothing.
THROUGH: dict[str, Make] = {
    "KVCompression, a budget above the prompt": lambda n, h: KVCompression(KeyNorm(), Cap(10**5)),
    "observed attention, a budget above the prompt": lambda n, h: KVCompression(ObservedAttention(), Cap(10**5)),
    "SnapKV, a budget above the prompt": lambda n, h: SnapKV(cap=10**5),
    "HeadScale, ones from a function": lambda n, h: HeadScale(lambda site: [1.0] * h),
    "SinkCalibration, no sink above the threshold": lambda n, h: SinkCalibration(threshold=2.0),
    "ContrastiveDecoding, b = 0, normalised": lambda n, h: ContrastiveDecoding(NoImage(), 1.0, 0.0, normalize=True),
    "VisualBoost, a gain of 1e-12": lambda n, h: VisualBoost(alpha=1e-12, sets="all"),
    "SinkCalibration, sinks keep 1 - 1e-12": lambda n, h: SinkCalibration(beta=1 - 1e-12, threshold=0.02),
    "Record, weights of the last query": lambda n, h: Record(),
    "Statistics, everything": lambda n, h: Statistics(what=("entropy", "distance", "mass", "sink")),
}

#: Settings that change the text.
ACTING: dict[str, Make] = {
    "KVCompression": lambda n, h: KVCompression(ExpectedAttention(), Ratio(0.5)),
    "SnapKV": lambda n, h: SnapKV(ratio=0.5),
    "SnapKVByHead": lambda n, h: SnapKVByHead(ratio=0.5),
    "HeadScale": lambda n, h: HeadScale([0.0] * h, layers=[1]),
    "SinkCalibration (ACT)": lambda n, h: SinkCalibration(beta=0.0, threshold=0.02),
    "HeadReinforcement (VHR)": lambda n, h: HeadReinforcement(4.0, [1, n - 1], selection="passes"),
    "ContrastiveDecoding": lambda n, h: ContrastiveDecoding(NoImage(), 2.0, -1.0),
    "VisualBoost (PAINT, PAI)": lambda n, h: VisualBoost(alpha=2.0, sets="all"),
    "CMAI": lambda n, h: CMAI(0.9),
    "Reduce": lambda n, h: Reduce(Learned(_size), 0.25),
    "ReduceByAttention": lambda n, h: ReduceByAttention({n // 2: 0.25}),
    "ScheduledPruning": lambda n, h: ScheduledPruning([1.0] * (n // 2) + [0.25] * (n - n // 2)),
    "MaskByType": lambda n, h: MaskByType(composite()),
    "DyVTE": lambda n, h: DyVTE(exit_layer=1),
}

#: What a language model alone cannot carry.
LEFT_OUT = {
    "AGLA, DAMRO, VTC-CLS, VMTC": "read a vision tower",
    "SoftImageGuidance, PLaplacian, Wings, ATP": "bring learned parts, and say nothing without them",
    "UniformMaps, SoftPAG, BlockSparse, Clear, LinFusion": "act on denoisers",
}


def prompts(tokenizer: Any, tokens: Tensor, lengths: tuple[int, int] = (96, 80)) -> tuple[Tensor, Tensor]:
    """Two prompts, padded on the left, and types with a span marked in each."""
    width = max(lengths)
    ids = torch.full((len(lengths), width), tokenizer.pad_token_id or 0)
    types = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = tokens[row * 300 : row * 300 + length]
        types[row, width - length :] = TEXT
        types[row, width - length + 8 : width - 24] = IMAGE
    return ids, types


def attached(model: Any, what: Sequence[Intervention], types: Tensor) -> Any:
    """A session, or nothing."""
    return attach(model, *what, token_types=types) if what else contextlib.nullcontext()


@torch.no_grad()
def written(model: Any, ids: Tensor, types: Tensor, new: int, *what: Intervention) -> tuple[Tensor, Tensor]:
    """(B, new) greedy tokens and (new, B) the greatest score of each step."""
    with attached(model, what, types):
        out = model.generate(
            input_ids=ids, attention_mask=(types != PAD).long(), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack([s.amax(-1) for s in out.logits])


@torch.no_grad()
def read(model: Any, ids: Tensor, types: Tensor, *what: Intervention) -> Tensor:
    """(B, N, V) scores of the prompt, zero at padding."""
    with attached(model, what, types):
        out = model(input_ids=ids, attention_mask=(types != PAD).long(), use_cache=True).logits
    return out.masked_fill((types == PAD)[..., None], 0)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    name: str = "smollm2-135m",
    new: int = 200,
    new_alone: int = 40,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Write, read, attach and detach.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``real-exactness-cpu.svg``.
        name: of :mod:`attnlib.bench.models`.
        new: greedy tokens with all identity settings together.
        new_alone: greedy tokens with each setting alone.
        loaded: ``(model, tokenizer)`` in float32, in place of a named one.

    Returns:
        Plain values, for JSON.
    """
    model, tokenizer = models.load(name, dtype=torch.float32) if loaded is None else loaded
    ids, types = prompts(tokenizer, tokens_of(tokenizer, files.text().test))
    size = model.config.num_hidden_layers, model.config.num_attention_heads
    kept = Kept(keep, ["exactness", name, new, new_alone], progress)

    def wrote(makes: Sequence[Make], count: int) -> dict[str, Any]:
        tokens, scores = written(model, ids, types, count, *(make(*size) for make in makes))
        return {"tokens": tokens.tolist(), "scores": scores.tolist()}

    base = kept("untouched", lambda: wrote((), new))
    rows: list[dict[str, Any]] = []
    together = {f"all {len(IDENTITY)} together": tuple(IDENTITY.values())}
    alone = {label: (make,) for label, make in IDENTITY.items()}
    through = {label: (make,) for label, make in THROUGH.items()}
    for kind, table, count in (("identity", together, new), ("identity", alone, new_alone),
                               ("passing through", through, new_alone)):  # fmt: skip
        for label, makes in table.items():
            told = kept(f"{kind}: {label}", partial(wrote, makes, count))
            same = np.array(told["tokens"]) == np.array(base["tokens"])[:, :count]
            gap = np.abs(np.array(told["scores"]) - np.array(base["scores"])[:count])
            first = None if same.all() else int(np.argmin(same.all(0)))
            rows.append({"kind": kind, "name": label, "tokens": count, "same": bool(same.all()), "first": first,
                         "largest": float(gap[:first].max(initial=0.0))})  # fmt: skip

    def after(make: Make) -> dict[str, Any]:
        before = read(model, ids, types)
        during, _ = written(model, ids, types, 12, make(*size))
        return {
            "equal": torch.equal(before, read(model, ids, types)),
            "acted": during.tolist() != [t[:12] for t in base["tokens"]],
        }

    detached = [{"name": label, **kept(f"detached: {label}", partial(after, make))}
                for label, make in ACTING.items()]  # fmt: skip

    held: list[tuple[Any, Tensor]] = []

    def half(make: Make | None) -> dict[str, float]:
        if not held:
            rounded = copy.deepcopy(model).to(torch.bfloat16)
            held.append((rounded, read(rounded, ids, types).float()))
        rounded, plain = held[0]
        true = read(model, ids, types) if make is None else plain
        mine = plain if make is None else read(rounded, ids, types, make(*size)).float()
        gap = (mine - true).abs()
        return {
            "largest": float(gap.max()),
            "mean": float(gap.mean()),
            "same first choice": float((mine.argmax(-1) == true.argmax(-1))[types != PAD].float().mean()),
        }

    rounding = kept("bfloat16 against float32", lambda: half(None))
    halves = [{"name": label, **kept(f"bfloat16: {label}", partial(half, make))}
              for label, make in THROUGH.items()]  # fmt: skip
    result: dict[str, Any] = {
        "what": "techniques that do nothing on a real model: greedy text, detaching, bfloat16",
        "model": models.MODELS[models.canonical(name)].title if loaded is None else "given", "machine": machine(),
        "prompts": list(ids.shape), "rows": rows, "detached": detached, "rounding": rounding, "bfloat16": halves,
        "left_out": LEFT_OUT, "seconds": round(kept.seconds, 1),
    }  # fmt: skip
    if pictures is not None:
        draw(Path(pictures) / "real-exactness-cpu.svg", result)
    return result


def draw(path: Path, result: dict[str, Any]) -> None:
    """Largest differences of scores, float32 and bfloat16."""
    figure, axes = panels(1, 2, 12, 5)
    rows = result["rows"]
    floor = 1e-7
    for axis, found, title in (
        (axes[0][0], [(r["name"], r["largest"]) for r in rows], "float32: largest difference of a score (left: none)"),
        (axes[0][1], [("bfloat16 itself, against float32", result["rounding"]["largest"])]
         + [(r["name"], r["largest"]) for r in result["bfloat16"]], "bfloat16: largest difference of a score"),
    ):  # fmt: skip
        axis.plot([max(v, floor) for _, v in found], range(len(found)), "o", color="#2f7de1")
        axis.set_yticks(range(len(found)), [n for n, _ in found], fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(floor / 2, 10)
        axis.set_title(title, fontsize=10)
    save(figure, path)
