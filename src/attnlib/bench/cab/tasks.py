"""The benchmark's seven tasks, read from the folders that their data unpacks to; four of them also without a folder."""

from __future__ import annotations

import csv
import struct
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_real, check_whole
from ..data import files as data
from ..data.files import DataError

__all__ = ["TASKS", "CabTask", "Splits", "crops", "load", "mask_tokens", "windows"]


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples, and where they come from."""

    train: Any
    valid: Any
    test: Any
    source: str


@dataclass(frozen=True)
class CabTask:
    """One task of the benchmark.

    Args:
        name: as the index calls it.
        title: what is asked.
        patterns: of attention that its backbones use.
        length: tokens, as the release says; empty where it does not.
        metrics: of its score, see :mod:`attnlib.bench.cab.metrics`.
        files: what its folder must hold.
        packaged: what serves without a folder; empty where nothing does.
        read: from a folder (or ``None``) and settings to :class:`Splits`.
    """

    name: str
    title: str
    patterns: tuple[str, ...]
    length: str
    metrics: tuple[str, ...]
    files: tuple[str, ...]
    packaged: str
    read: Callable[..., Splits]


def load(task: str, folder: str | Path | None = None, **settings: Any) -> Splits:
    """The data of a task.

    Args:
        task: one of :data:`TASKS`.
        folder: what its ``files`` say; without one, what ships with packages, for LM, MLM, SR and LSTF.
        settings: of the task: ``side`` and ``factor`` (SR); ``series``, one of its files (LSTF).

    Raises:
        DataError: a folder that is none, or lacks a file; a file that cannot be read; a task without packaged data.

    >>> load("LM").train.dtype
    torch.uint8
    """
    check_choice("task", task, tuple(TASKS))
    known = TASKS[task]
    if folder is None:
        if not known.packaged:
            raise DataError(f"{task} needs a folder with {', '.join(known.files)}; no package ships such data")
        return known.read(None, **settings)
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"folder={str(folder)!r} is no folder; {task} reads one with {', '.join(known.files)}")
    return known.read(root, **settings)


def _file(root: Path, name: str, task: str, why: str = "") -> Path:
    """A file of a folder that must be there."""
    path = root / name
    if not path.is_file():
        raise DataError(
            f"{task}: folder {str(root)!r} lacks {name!r}{why}; it must hold {', '.join(TASKS[task].files)}"
        )
    return path


# --------------------------------------------------------------------------------------------------------------------
# Text


def _text(root: Path | None, task: str) -> Splits:
    if root is None:
        packaged = data.text()
        cut = len(packaged.train) * 19 // 20
        return Splits(packaged.train[:cut], packaged.train[cut:], packaged.test, packaged.source)
    parts = []
    for split in ("train", "valid", "test"):
        raw = _file(root, f"{split}.txt", task).read_bytes()
        if not raw:
            raise DataError(f"{task}: {split}.txt of {str(root)!r} is empty")
        parts.append(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    return Splits(parts[0], parts[1], parts[2], f"bytes of the texts in {root.name}")


def mask_tokens(
    tokens: Tensor, mask: int, vocabulary: int, generator: torch.Generator | None = None, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of masked language modelling: of a ``share`` of the tokens, 80 % become the mask, 10 % another
    token, 10 % stay; targets are -100 elsewhere.

    Args:
        tokens: (B, N) integers.
        mask: number of the mask.
        vocabulary: other tokens are drawn below it.
    """
    check_whole("tokens", tokens)
    check_int("vocabulary", vocabulary, least=1)
    check_real("share", share, above=0, most=1)
    draw = torch.rand(tokens.shape, generator=generator)
    how = torch.rand(tokens.shape, generator=generator)
    others = torch.randint(vocabulary, tokens.shape, generator=generator)
    chosen = (draw < share).to(tokens.device)
    targets = torch.where(chosen, tokens.long(), -100)
    inputs = torch.where(chosen & (how < 0.8).to(tokens.device), mask, tokens.long())
    return torch.where(chosen & (how >= 0.9).to(tokens.device), others.to(tokens.device), inputs), targets


def _summaries(root: Path | None) -> Splits:
    assert root is not None
    parts = []
    for split in ("train", "val", "test"):
        sides = []
        for side in ("source", "target"):
            text = _file(root, f"{split}.{side}", "Sum").read_text(encoding="utf-8")
            sides.append(text.splitlines())
        if len(sides[0]) != len(sides[1]):
            raise DataError(
                f"Sum: {split}.source of {str(root)!r} holds {len(sides[0])} lines and {split}.target {len(sides[1])}; "
                "line by line they are documents and their summary"
            )
        parts.append(list(zip(*sides, strict=True)))
    return Splits(parts[0], parts[1], parts[2], f"documents and summaries in {root.name}")


# --------------------------------------------------------------------------------------------------------------------
# Speech


def _read_wave(path: Path) -> tuple[Tensor, int]:
    """(samples,) in [-1, 1] and samples per second of a 16-bit PCM file."""
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2 or file.getnchannels() != 1:
                raise DataError(f"TTS: {path.name} must be 16-bit and of one channel")
            raw, rate = file.readframes(file.getnframes()), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise DataError(f"TTS: {path.name} is no wave file ({error})") from error
    return torch.from_numpy(np.frombuffer(raw, dtype="<i2").astype(np.float32) / 32768), rate


class _Speech(Sequence):
    """(text, (samples,), rate) of every line; waves are read when they are asked for."""

    def __init__(self, rows: Sequence[tuple[str, Path]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Speech(self.rows[index])
        text, path = self.rows[index]
        return (text, *_read_wave(path))


def _speech(root: Path | None) -> Splits:
    assert root is not None
    rows = []
    for line in _file(root, "metadata.csv", "TTS").read_text(encoding="utf-8").splitlines():
        fields = line.split("|")
        if len(fields) < 2:
            raise DataError(f"TTS: metadata.csv of {str(root)!r} holds {line[:40]!r}; lines are name|text|spoken text")
        named = f"wavs/{fields[0]}.wav"
        rows.append((fields[-1], _file(root, named, "TTS", ", which metadata.csv names")))
    held = max(len(rows) // 100, 1)
    if len(rows) < 3:
        raise DataError(f"TTS: metadata.csv of {str(root)!r} names {len(rows)} recordings; at least 3 are needed")
    speech = _Speech(rows)
    source = f"{len(rows)} recordings in {root.name}; the last two hundredths are held out"
    return Splits(speech[: -2 * held], speech[-2 * held : -held], speech[-held:], source)


# --------------------------------------------------------------------------------------------------------------------
# Images


def crops(image: Tensor, side: int) -> Tensor:
    """(n, side, side, 3) in [0, 1]: all whole squares of an image (H, W, 3) of bytes, side by side."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    cut = image[: rows * side, : columns * side].float() / 255
    return cut.view(rows, side, columns, side, 3).transpose(1, 2).reshape(-1, side, side, 3)


def _pairs(root: Path | None, side: int = 128, factor: int = 8) -> Splits:
    check_int("side", side, least=1)
    check_int("factor", factor, least=1)
    if side % factor:
        raise ValueError(f"factor={factor} must divide side={side}")
    if root is None:
        packaged = data.photos()
        train = [torch.cat([crops(p, side) for p in packaged.train])]
        both = torch.cat([crops(p, side) for p in packaged.test])
        splits = [train[0], both[::2], both[1::2]]
        made = [list(zip(data.shrink(s, factor), s, strict=True)) for s in splits]
        return Splits(made[0], made[1], made[2], f"squares of {side} pixels of {packaged.source}")
    large, small = root / f"hr_{side}", root / f"lr_{side // factor}"
    for folder in (large, small):
        if not folder.is_dir():
            raise DataError(
                f"SR: folder {str(root)!r} lacks {folder.name!r}; it must hold {', '.join(TASKS['SR'].files)}"
            )
    names = sorted(p.name for p in large.iterdir() if p.suffix.lower() in data.IMAGE_SUFFIXES)
    if len(names) < 3:
        raise DataError(f"SR: {large.name} of {str(root)!r} holds {len(names)} images; at least 3 are needed")
    pairs = []
    for name in names:
        low = _file(root, f"{small.name}/{name}", "SR", f", the small side of {large.name}/{name}")
        pair = tuple(data._read_photo(p).float() / 255 for p in (low, large / name))
        for image, wanted in zip(pair, (side // factor, side), strict=True):
            if tuple(image.shape[:2]) != (wanted, wanted):
                raise DataError(f"SR: {name} is {tuple(image.shape[:2])} where {wanted} x {wanted} is expected")
        pairs.append(pair)
    held = max(len(pairs) // 10, 1)
    return Splits(pairs[: -2 * held], pairs[-2 * held : -held], pairs[-held:], f"pairs of images in {root.name}")


# --------------------------------------------------------------------------------------------------------------------
# Series

#: Where training and validation end, in samples; a share for those that are split by shares.
_BORDERS: dict[str, tuple[float, float, float]] = {
    "ETTh1": (8640, 11520, 14400), "ETTh2": (8640, 11520, 14400), "ETTm1": (34560, 46080, 57600),
    "ECL": (0.7, 0.8, 1.0), "WTH": (0.7, 0.8, 1.0),
}  # fmt: skip


def _series(root: Path | None, series: str | None = None) -> Splits:
    chosen = series
    if root is None:
        if chosen is not None:
            raise DataError(f"LSTF: series={chosen!r} needs a folder with {chosen}.csv")
        packaged = data.series()
        train, valid = packaged.train[:-1], packaged.train[-1:]
        return Splits(train, valid, packaged.test, packaged.source)
    if chosen is None:
        for name in _BORDERS:
            _file(root, f"{name}.csv", "LSTF")
        chosen = "ETTh1"
    check_choice("series", chosen, tuple(_BORDERS))
    with _file(root, f"{chosen}.csv", "LSTF").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2 or rows[0][:1] != ["date"]:
        raise DataError(f"LSTF: {chosen}.csv must begin with a line of names, the first of them date")
    try:
        values = torch.tensor([[float(v) for v in row[1:]] for row in rows[1:]])
    except ValueError as error:
        raise DataError(f"LSTF: {chosen}.csv holds what is no number: {error}") from error
    ends = [int(b * len(values)) if b <= 1 else int(b) for b in _BORDERS[chosen]]
    if len(values) < ends[2]:
        raise DataError(f"LSTF: {chosen}.csv holds {len(values)} lines; the published split reads {ends[2]}")
    known = values[: ends[0]].double()
    values = ((values - known.mean(0)) / known.std(0, correction=0).clamp(min=1e-12)).float()
    parts = [[values[a:b]] for a, b in zip([0, *ends[:2]], ends, strict=True)]
    return Splits(
        parts[0],
        parts[1],
        parts[2],
        f"{chosen}.csv in {root.name}, {len(rows[0]) - 1} columns, in units of its training part",
    )


def windows(stretches: Sequence[Tensor], past: int, future: int) -> tuple[Tensor, Tensor]:
    """(n, past, F) and (n, future, F): every place of every stretch (T, F) where both fit."""
    for name, n in (("past", past), ("future", future)):
        check_int(name, n, least=1)
    long = [s for s in stretches if len(s) >= past + future]
    if not long:
        raise DataError(f"no stretch is as long as past={past} and future={future} together")
    cut = torch.cat([s.unfold(0, past + future, 1).transpose(1, 2) for s in long])
    return cut[:, :past], cut[:, past:]


# --------------------------------------------------------------------------------------------------------------------
# Clouds


def _read_pcd(path: Path) -> Tensor:
    """(m, 3) points of a PCD file, as text or plain binary."""
    raw = path.read_bytes()
    head: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in head:
        end = raw.find(b"\n", at)
        if end < 0:
            raise DataError(f"PCC: {path.name} has no DATA line of a PCD file")
        words = raw[at:end].decode("ascii", "replace").split()
        if words and not words[0].startswith("#"):
            head[words[0]] = words[1:]
        at = end + 1
    if head.get("FIELDS", [])[:3] != ["x", "y", "z"] or head["DATA"][:1] not in (["ascii"], ["binary"]):
        raise DataError(f"PCC: {path.name} must have FIELDS x y z and be ascii or binary")
    width, count = len(head["FIELDS"]), int(head.get("POINTS", ["0"])[0])
    if head["DATA"] == ["ascii"]:
        numbers = [float(w) for w in raw[at:].split()]
    else:
        if set(head.get("SIZE", [])) != {"4"} or set(head.get("TYPE", [])) != {"F"}:
            raise DataError(f"PCC: {path.name} must hold 4-byte floating-point numbers")
        if len(raw) - at < 4 * width * count:
            raise DataError(f"PCC: {path.name} is cut off")
        numbers = list(struct.unpack(f"<{width * count}f", raw[at : at + 4 * width * count]))
    if len(numbers) != width * count:
        raise DataError(f"PCC: {path.name} holds {len(numbers)} numbers for {count} points of {width}")
    return torch.tensor(numbers).view(count, width)[:, :3]


class _Clouds(Sequence):
    """(partial (m, 3), complete (n, 3)); files are read when they are asked for."""

    def __init__(self, rows: Sequence[tuple[Path, Path]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Clouds(self.rows[index])
        return tuple(_read_pcd(p) for p in self.rows[index])


def _clouds(root: Path | None) -> Splits:
    assert root is not None
    parts = []
    for split in ("train", "val", "test"):
        for side in ("complete", "partial"):
            if not (root / split / side).is_dir():
                raise DataError(
                    f"PCC: folder {str(root)!r} lacks '{split}/{side}'; it must hold {', '.join(TASKS['PCC'].files)}"
                )
        rows = []
        for whole in sorted((root / split / "complete").glob("*/*.pcd")):
            views = sorted((root / split / "partial" / whole.parent.name / whole.stem).glob("*.pcd"))
            if not views:
                name = f"{split}/partial/{whole.parent.name}/{whole.stem}/00.pcd"
                raise DataError(
                    f"PCC: folder {str(root)!r} lacks {name!r}, a view of {whole.name}; "
                    f"it must hold {', '.join(TASKS['PCC'].files)}"
                )
            rows += [(view, whole) for view in views]
        if not rows:
            raise DataError(f"PCC: '{split}/complete' of {str(root)!r} holds no */*.pcd")
        parts.append(_Clouds(rows))
    return Splits(parts[0], parts[1], parts[2], f"views and whole clouds in {root.name}")


_SELF, _BOTH = ("noncausal-self",), ("noncausal-self", "causal-self", "causal-cross")

TASKS: dict[str, CabTask] = {
    task.name: task
    for task in (
        CabTask(
            "TTS", "Text to speech", _BOTH, "", ("MCD", "MSD"), ("metadata.csv", "wavs/*.wav"), "", _speech,
        ),
        CabTask(
            "Sum", "Summaries of several documents", _BOTH, "4,096 and 400", ("ROUGE-1", "ROUGE-2", "ROUGE-L"),
            tuple(f"{split}.{side}" for split in ("train", "val", "test") for side in ("source", "target")), "",
            _summaries,
        ),
        CabTask(
            "SR", "Super-resolution of 16 x 16 pixels to 128 x 128", _SELF, "16,384", ("PSNR", "SSIM"),
            ("hr_128/*.png", "lr_16/*.png"), "photographs inside scikit-learn and scikit-image", _pairs,
        ),
        CabTask(
            "MLM", "Masked language modelling", _SELF, "2,048", ("PPL",), ("train.txt", "valid.txt", "test.txt"),
            "documentation inside the standard library", lambda root: _text(root, "MLM"),
        ),
        CabTask(
            "LM", "Language modelling", ("causal-self",), "8,192", ("PPL",), ("train.txt", "valid.txt", "test.txt"),
            "documentation inside the standard library", lambda root: _text(root, "LM"),
        ),
        CabTask(
            "PCC", "Completion of point clouds", ("noncausal-cross",), "", ("CD-l1", "CD-l2", "F-score"),
            tuple(
                f"{split}/{side}" for split in ("train", "val", "test")
                for side in ("complete/*/*.pcd", "partial/*/*/*.pcd")
            ), "", _clouds,
        ),
        CabTask(
            "LSTF", "Forecasts of long time series", ("noncausal-cross",), "336 and 720", ("MSE", "MAE"),
            tuple(f"{name}.csv" for name in _BORDERS), "a neuron's membrane potential inside matplotlib", _series,
        ),
    )
}  # fmt: skip
