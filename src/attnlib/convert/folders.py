"""Pictures of several folders as one set to pretrain on: UNIP's InfMix, whatever the folders hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..checks import check_flag, check_int, describe
from ..extras import need

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


class FolderMix(Dataset[Any]):
    """All pictures of some folders, at most so many of each folder within, as grey or colour pictures of 3 channels.

    UNIP mixes infrared sets (all), ImageNet's classes (the first 200 of each) and COCO (all), all made grey.

    Args:
        folders: path -> how many pictures of every folder that lies in it, itself included; ``None`` for all. Or paths
            alone, all of whose pictures are taken. Pictures stand in the order of their paths.
        transform: of a PIL picture; ``None`` gives the picture.
        grey: make pictures grey, in three equal channels.
        share: in (0, 1]: every ``floor(1 / share)``-th picture alone, as the release thins the set.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no picture in a folder, a share outside (0, 1].

    Reference: Zhang et al., 2025, arXiv 2502.02257.
    """

    def __init__(
        self,
        folders: Mapping[str | Path, int | None] | Sequence[str | Path],
        transform: Callable[[Any], Any] | None = None,
        grey: bool = True,
        share: float = 1.0,
    ):
        if isinstance(folders, (str, Path)) or not folders:
            raise ValueError(f"folders must name at least one folder, as a sequence or a mapping, got {folders!r}")
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {describe(share)}")
        self.transform, self.grey = transform, check_flag("grey", grey)
        limits = folders if isinstance(folders, Mapping) else dict.fromkeys(folders)
        self.paths: list[Path] = []
        for folder, limit in limits.items():
            if limit is not None:
                check_int(f"folders[{str(folder)!r}]", limit, least=1)
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"folders: there is no folder {str(folder)!r}")
            within: dict[Path, list[Path]] = {}
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix.lower() in SUFFIXES:
                    within.setdefault(path.parent, []).append(path)
            if not within:
                raise ValueError(f"folders: {str(folder)!r} holds no picture ({', '.join(SUFFIXES)})")
            self.paths += [path for held in within.values() for path in held[:limit]]
        self.paths = self.paths[:: int(1 / share)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with need("PIL.Image", "FolderMix").open(self.paths[index]) as opened:
            picture = opened.convert("RGB")
        if self.grey:
            picture = picture.convert("L").convert("RGB")
        return picture if self.transform is None else self.transform(picture)
