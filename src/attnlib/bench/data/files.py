"""Real data that ships inside ordinary Python packages, so that a comparison needs no download.

Nothing is fetched: files are read from the installed packages, and a package built without them says so. Every loader
is deterministic and its training and test parts share nothing; ``fingerprint`` is a hash of what was read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...extras import need

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
CSV_SUFFIXES = (".csv", ".tsv")
MIN_TEXT_BYTES = 4096
MIN_PHOTO_SIDE = 64


class DataError(ValueError):
    """``data`` cannot be read or cannot serve the task; the message says what would do."""


def require(module: str) -> Any:
    """Import ``module`` of the ``bench`` extra, or say how to install it."""
    return need(module, "this data")


@dataclass(frozen=True)
class Dataset:
    """A training and a test part, and what they are.

    Args:
        train: tensors of the training part.
        test: tensors of the test part.
        source: one sentence that says what the data is, without paths.
        split: one sentence that says how the parts were separated.
        fingerprint: hash of both parts.
        facts: numbers worth printing.
    """

    train: Any
    test: Any
    source: str
    split: str
    fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(*parts: Iterable[Tensor] | Tensor) -> str:
    """Sixteen hexadecimal digits that change when any tensor does."""
    digest = hashlib.sha256()
    for part in parts:
        for t in [part] if isinstance(part, Tensor) else part:
            digest.update(str(tuple(t.shape)).encode())
            digest.update(t.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def resolve(data: str | Path | Mapping[str, str | Path] | None, kinds: Mapping[str, str]) -> dict[str, Path]:
    """Which task reads which path.

    Args:
        data: a path (an image folder, a CSV file or a text file), or ``{task: path}``, or ``None``.
        kinds: for every task of the comparison the kind of data it reads: text, images, series or digits.

    Returns:
        ``{task: path}`` for the tasks that read the user's data; the others keep the data that ships with packages.

    Raises:
        DataError: when a path does not exist or cannot be read, or when none of the tasks can use it.
    """
    if data is None:
        return {}
    if isinstance(data, Mapping):
        unknown = sorted(set(data) - set(kinds))
        if unknown:
            raise DataError(f"data names the tasks {unknown}, which are not in this comparison: {sorted(kinds)}")
        given = {task: Path(path) for task, path in data.items()}
        for task, path in given.items():
            kind = path_kind(path)
            if kind != kinds[task]:
                raise DataError(f"data={str(path)!r} is {_KIND_WORDS[kind]}, but task {task!r} {_WANTS[kinds[task]]}")
        return given
    path = Path(data)
    kind = path_kind(path)
    chosen = {task: path for task, wanted in kinds.items() if wanted == kind}
    if not chosen:
        raise DataError(
            f"data={str(path)!r} is {_KIND_WORDS[kind]}, which none of the tasks {sorted(kinds)} reads; "
            f"possible: {'; '.join(f'{t} {_WANTS[k]}' for t, k in sorted(kinds.items()))}"
        )
    return chosen


_KIND_WORDS = {"text": "a text file", "images": "a folder of images", "series": "a CSV file"}
_WANTS = {
    "text": "reads a text file",
    "images": "reads a folder of images",
    "series": "reads a CSV file",
    "digits": "reads only the digits that come with scikit-learn",
}


def path_kind(path: Path) -> str:
    """``"text"``, ``"images"`` or ``"series"``: what a path holds, or :class:`DataError` when it cannot be read."""
    possible = "possible: a text file, a folder of images, or a .csv file with numeric columns"
    if not path.exists():
        raise DataError(f"data={str(path)!r} does not exist; {possible}")
    try:
        if path.is_dir():
            if not any(p.suffix.lower() in IMAGE_SUFFIXES for p in path.iterdir()):
                raise DataError(
                    f"data={str(path)!r} is a folder without images ({', '.join(IMAGE_SUFFIXES)}); {possible}"
                )
            return "images"
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DataError(f"data={str(path)!r} cannot be read ({error.strerror}); {possible}") from error
    return "series" if path.suffix.lower() in CSV_SUFFIXES else "text"


# --------------------------------------------------------------------------------------------------------------------
# Text


def text(path: Path | None = None) -> Dataset:
    """Bytes of English text: the language documentation inside the standard library, or a file.

    The topics of ``pydoc_data.topics`` quote one another at length, so a paragraph is kept only where it first occurs;
    without that, most of a held-out topic would also stand in the training part.

    Returns:
        ``train`` and ``test``: one-dimensional uint8 tensors.
    """
    if path is None:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        seen: set[str] = set()
        train_parts: list[str] = []
        test_parts: list[str] = []
        for index, name in enumerate(sorted(topics)):
            kept = []
            for paragraph in topics[name].split("\n\n"):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
            (test_parts if index % 8 == 3 else train_parts).append("\n\n".join(kept) + "\n\n")
        train, test = "".join(train_parts).encode(), "".join(test_parts).encode()
        source = "English documentation of the Python language (pydoc_data.topics of the standard library), as bytes"
        split = "every eighth topic is held out; a paragraph that several topics share is kept once"
    else:
        raw = path.read_bytes()
        if len(raw) < MIN_TEXT_BYTES:
            raise DataError(f"data={str(path)!r} holds {len(raw)} bytes; a text needs at least {MIN_TEXT_BYTES}")
        if b"\0" in raw[:MIN_TEXT_BYTES]:
            raise DataError(f"data={str(path)!r} is a binary file; possible: a text file in any encoding")
        cut = len(raw) * 9 // 10
        train, test = raw[:cut], raw[cut:]
        source, split = f"the text file {path.name}, as bytes", "the last tenth is held out"
    a, b = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, test))
    return Dataset(a, b, source, split, fingerprint(a, b), {"train_bytes": len(a), "test_bytes": len(b)})


def documents(least: int = 16_000, packages: Iterable[str] = ("numpy", "scipy", "sklearn")) -> Dataset:
    """Long documents: the docstrings of one source file each, of scientific packages.

    A paragraph that another document has already is left out, so that the parts share none.

    Args:
        least: characters of a document.
        packages: whose sources are read, without importing them.

    Returns:
        ``train`` and ``test``: lists of strings.
    """
    found: list[str] = []
    seen: set[str] = set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError(f"packages holds {package!r}, which is not installed")
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            if file.stat().st_size < least or "tests" in file.parts:
                continue
            tree = ast.parse(file.read_text(encoding="utf-8"))
            nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
            parts = [p.rstrip() for n in nodes for p in (ast.get_docstring(n) or "").split("\n\n")]
            kept = [p for p in parts if p and (len(p) < 60 or p not in seen)]
            if sum(map(len, kept)) >= least:
                found.append("\n\n".join(kept))
                seen |= set(kept)
    held = [text for i, text in enumerate(found) if i % 8 == 3]
    rest = [text for i, text in enumerate(found) if i % 8 != 3]
    marks = [torch.frombuffer(bytearray("".join(part).encode()), dtype=torch.uint8) for part in (rest, held)]
    return Dataset(
        rest, held, f"docstrings of {', '.join(packages)}, one document per source file",
        "every eighth document is held out; a paragraph that several documents share is kept once",
        fingerprint(*marks), {"train_documents": len(rest), "test_documents": len(held)},
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Digits


def digits() -> Dataset:
    """The 1,797 handwritten digits of scikit-learn (UCI, Alpaydin and Kaynak 1998), 8 × 8 pixels.

    Returns:
        ``train`` and ``test``: pairs ``(images (n, 8, 8, 1) in [0, 1], labels (n,))``.
    """
    bunch = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(np.ascontiguousarray(bunch.images)).float().div(16).unsqueeze(-1)
    labels = torch.from_numpy(np.ascontiguousarray(bunch.target)).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:450], order[450:]
    parts = ((images[train], labels[train]), (images[test], labels[test]))
    return Dataset(
        *parts,
        "handwritten digits, 8 × 8 pixels (scikit-learn load_digits; UCI, Alpaydin and Kaynak 1998)",
        "a fixed random quarter is held out",
        fingerprint(*parts[0], *parts[1]),
        {"train_images": len(train), "test_images": len(test)},
    )


# --------------------------------------------------------------------------------------------------------------------
# Photographs

# Whole photographs are held out, so no test patch touches a training photograph.
_TRAIN_PHOTOS = (
    ("sklearn.datasets", "images/flower.jpg"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
)
_TEST_PHOTOS = (("sklearn.datasets", "images/china.jpg"), ("skimage", "data/astronaut.png"))


def _packaged(package: str, name: str) -> Path:
    root = Path(require(package).__file__).parent
    path = root / name
    if not path.is_file():
        raise DataError(
            f"the installed {package.split('.')[0]} does not ship {name}; "
            "install a wheel that does, or give a folder of images with data=PATH"
        )
    return path


def _read_photo(path: Path) -> Tensor:
    image_module = require("PIL.Image")
    try:
        with image_module.open(path) as image:
            array = np.asarray(image.convert("RGB"), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"data={str(path)!r} is not an image that Pillow can read ({error})") from error
    return torch.from_numpy(array.copy())


def photos(path: Path | None = None) -> Dataset:
    """Colour photographs as uint8 tensors (H, W, 3): those inside scikit-learn and scikit-image, or a folder.

    Returns:
        ``train`` and ``test``: lists of photographs; no photograph is in both.
    """
    if path is None:
        train = [_read_photo(_packaged(*p)) for p in _TRAIN_PHOTOS]
        test = [_read_photo(_packaged(*p)) for p in _TEST_PHOTOS]
        source = "photographs inside the wheels of scikit-learn and scikit-image"
        split = "china.jpg and astronaut.png are held out whole; five other photographs train"
    else:
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < 2:
            raise DataError(f"data={str(path)!r} holds {len(files)} image; at least 2 are needed, one of them for test")
        images = [_read_photo(p) for p in files]
        small = [f.name for f, i in zip(files, images, strict=True) if min(i.shape[:2]) < MIN_PHOTO_SIDE]
        if small:
            raise DataError(f"data={str(path)!r}: {small[:3]} are smaller than {MIN_PHOTO_SIDE} pixels on a side")
        unique: dict[str, Tensor] = {}
        for image in images:
            unique.setdefault(fingerprint(image), image)
        images = list(unique.values())
        held = max(1, len(images) // 5)
        train, test = images[:-held], images[-held:]
        if not train:
            raise DataError(f"data={str(path)!r}: all images are the same; at least 2 different ones are needed")
        source, split = f"{len(images)} images of the folder {path.name}", f"the last {held} by name are held out whole"
    return Dataset(
        train, test, source, split, fingerprint(train, test), {"train_photos": len(train), "test_photos": len(test)}
    )


def shrink(images: Tensor, factor: int) -> Tensor:
    """Bicubic reduction with antialiasing of (B, H, W, C) in [0, 1]; the low-resolution side of every photo task."""
    size = (images.shape[1] // factor, images.shape[2] // factor)
    small = F.interpolate(images.permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1).clamp(0, 1)


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Bicubic enlargement of (B, h, w, C): the reference every super-resolution is held against."""
    size = (images.shape[1] * factor, images.shape[2] * factor)
    big = F.interpolate(images.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
    return big.permute(0, 2, 3, 1)


# --------------------------------------------------------------------------------------------------------------------
# Series


def series(path: Path | None = None) -> Dataset:
    """A measured time series: a neuron's membrane potential that ships with matplotlib, or the columns of a CSV file.

    matplotlib's ``membrane.dat`` is six seconds of intracellular recording at 2 kHz (the trace of its first logo):
    rest, then current injection with regular and later irregular spikes. Pairs of samples are averaged to 1 kHz.

    Returns:
        ``train`` and ``test``: lists of stretches (T, F), in units of the training part's standard deviation.
    """
    if path is None:
        file = _packaged("matplotlib", "mpl-data/sample_data/membrane.dat")
        raw = np.fromfile(file, dtype="<f4")
        values = torch.from_numpy(raw.astype(np.float32)).reshape(-1, 2).mean(1, keepdim=True)
        blocks = list(values.split(500))
        train = [b for i, b in enumerate(blocks) if i % 4 != 2]
        test = [b for i, b in enumerate(blocks) if i % 4 == 2]
        source = "membrane potential of a neuron, 6 s at 1 kHz (matplotlib's sample data membrane.dat)"
        split = "twelve stretches of 500 ms, every fourth held out; no window crosses from one to another"
        names = ["membrane potential"]
    else:
        names, values = _read_csv(path)
        cut = len(values) * 3 // 4
        train, test = [values[:cut]], [values[cut:]]
        source, split = f"{len(names)} numeric columns of {path.name}", "the last quarter in time is held out"
    joined = torch.cat(train)
    mean, std = joined.mean(0), joined.std(0).clamp_min(1e-8)
    train, test = [(t - mean) / std for t in train], [(t - mean) / std for t in test]
    facts = {
        "train_samples": sum(map(len, train)),
        "test_samples": sum(map(len, test)),
        "columns": names,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    return Dataset(train, test, source, split, fingerprint(train, test), facts)


def _read_csv(path: Path) -> tuple[list[str], Tensor]:
    import csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
            rows = [r for r in csv.reader(file, dialect) if r and not r[0].startswith("#")]
    except UnicodeDecodeError as error:
        raise DataError(f"data={str(path)!r} is not UTF-8 text; possible: a CSV file with numeric columns") from error

    def number(cell: str) -> float:
        try:
            return float(cell)
        except ValueError:
            return float("nan")

    width = max((len(r) for r in rows), default=0)
    table = np.asarray([[number(c) for c in r] + [np.nan] * (width - len(r)) for r in rows], dtype=np.float64)
    if table.size == 0:
        raise DataError(f"data={str(path)!r} holds no rows; possible: a CSV file with numeric columns")
    header = bool(np.isnan(table[0]).all())
    names = [c.strip() or f"column {i}" for i, c in enumerate(rows[0])] if header else []
    names += [f"column {i}" for i in range(len(names), width)]
    body = table[1:] if header else table
    finite = np.isfinite(body)
    keep = finite.mean(0) > 0.5 if len(body) else np.zeros(width, dtype=bool)
    if not keep.any():
        raise DataError(f"data={str(path)!r} has no column that is mostly numbers (columns: {names})")
    body = body[:, keep]
    body = body[np.isfinite(body).all(1)]
    values = torch.from_numpy(body).float()
    return [n for n, k in zip(names, keep, strict=True) if k], values
