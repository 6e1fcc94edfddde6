"""Files of a comparison: every finished piece is written at once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class StorageError(OSError):
    """A measurement could not be written. The message says what is safe and how to go on.

    Args:
        message: what happened.
        unsaved: the records that are in memory only.
    """

    def __init__(self, message: str, unsaved: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.unsaved = unsaved


def writable(out: str | Path, *parts: str) -> Path:
    """The folder of results, made when missing: asked for before minutes of work that could not be kept.

    Args:
        out: the folder.
        parts: folders in it.

    Raises:
        StorageError: when it cannot be made or written.
    """
    folder = Path(out)
    try:
        for place in (folder, *(folder / name for name in parts)):
            place.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"out={str(out)!r} cannot be written ({reason}); give a folder that can", []) from error
    return folder


def plain(value: Any) -> Any:
    """``value`` with infinities and not-a-numbers as strings, so that any JSON reader takes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` beside ``path`` and move it there: a reader, or a crash, sees the old file or the new one."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fill(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the lines ``<!-- name -->`` and ``<!-- end name -->`` of a page.

    Raises:
        ValueError: the page has no such lines.
    """
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.S)
    if not pattern.search(old):
        raise ValueError(f"{page} has no markers for {name}")
    write_text(page, pattern.sub(lambda m: m.group(1) + text + "\n" + m.group(2), old))


def identity(value: Any) -> str:
    """Ten hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, default=str).encode()).hexdigest()[:10]


def slug(text: str) -> str:
    """Letters, digits and dashes of a label."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


class Lines:
    """A file of JSON lines that takes every piece as soon as it is there, and that a later call goes on from.

    Args:
        path: of the file; ``None`` keeps nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)

    def rows(self, *needed: str) -> list[dict[str, Any]]:
        """What the file holds; a last line without an end was cut off while it was written, and is taken out.

        Args:
            needed: what every row must have.

        Raises:
            ValueError: something else than JSON lines, or a row that lacks something.
        """
        if self.path is None or not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        if lines[-1]:
            self.path.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
        try:
            rows = [dict(json.loads(line)) for line in lines[:-1]]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} does not hold JSON lines, as a run keeps them: {error}") from None
        for number, row in enumerate(rows, 1):
            if missing := [name for name in needed if name not in row]:
                raise ValueError(
                    f"line {number} of {self.path} lacks {missing[0]!r}; it has {list(row)}, give another file"
                )
        return rows

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put rows behind."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(plain(row)) + "\n")


class Store:
    """The folder of a comparison.

    ``runs/*.json`` and ``scaling/*.json`` hold one finished piece each, named by what it is and a hash of everything
    that could change its result; a later comparison in the same folder reuses a piece exactly when the hash agrees.

    Args:
        out: the folder; made when missing.

    Raises:
        StorageError: when the folder cannot be made or written.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = writable(out, "runs", "scaling")
        self.broken: list[str] = []

    def find(self, kind: str, name: str, key: Any) -> dict[str, Any] | None:
        """The finished piece of that name and key, or ``None``. A damaged file counts as absent and is remembered."""
        path = self._path(kind, name, key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            self.broken.append(path.name)
            return None
        return record

    def save(self, kind: str, name: str, key: Any, record: dict[str, Any]) -> None:
        """Write a finished piece.

        Raises:
            StorageError: when the disk does not take it; the record is in the error and, if possible, in the system's
                temporary folder.
        """
        path = self._path(kind, name, key)
        try:
            write_json(path, record)
        except OSError as error:
            kept = self.count()
            rescued = self._rescue(path.name, record)
            where = f"the last one is in {rescued}" if rescued else "the last one is in the error's .unsaved"
            raise StorageError(
                f"could not write {path.name} ({error.strerror or error}): {kept} finished pieces are safe in the out "
                f"folder, {where}. Make room and run the same command again: it goes on from there",
                [record],
            ) from error

    def count(self) -> int:
        """Number of finished pieces."""
        return sum(1 for name in ("runs", "scaling") for _ in (self.out / name).glob("*.json"))

    def _path(self, kind: str, name: str, key: Any) -> Path:
        return self.out / kind / f"{slug(name)}--{identity(key)}.json"

    def _rescue(self, name: str, record: dict[str, Any]) -> Path | None:
        try:
            folder = Path(tempfile.mkdtemp(prefix="attnlib-compare-"))
            write_json(folder / name, record)
        except OSError:
            return None
        return folder / name

    def read(self, name: str) -> dict[str, Any]:
        """A file at the top of the folder, ``{}`` when absent or damaged."""
        try:
            return json.loads((self.out / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
