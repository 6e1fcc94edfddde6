"""Scores from the vision tower: how much its class token, or all its tokens, attend to each patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_device, check_float, check_tensors, shaped
from ..hooks.session import Session
from ..hooks.site import Site
from ..hooks.vision import VisionTower, merged
from ..types import check_choice
from .base import Scorer


@shaped()
def ensemble(layers: Sequence[Tensor], how: str = "sum") -> Tensor:
    """Scores (B, N) of several layers as one: their sum, minimum or maximum.

    >>> ensemble([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])], "max").tolist()
    [[3.0, 2.0]]
    """
    check_choice("ensemble", how, ("sum", "min", "max"))
    given = check_tensors("layers", layers, least=1)
    if len({t.shape for t in given}) != 1:
        raise ValueError(f"layers must be of one shape, got {[tuple(t.shape) for t in given]}")
    for i, t in enumerate(given):
        check_float(f"layers[{i}]", t)
    check_device(**{f"layers[{i}]": t for i, t in enumerate(given)})
    stacked = torch.stack(given)
    return stacked.sum(0) if how == "sum" else stacked.amin(0) if how == "min" else stacked.amax(0)


class VisionAttention(Scorer):
    """Scores of a vision-language model's patches, read while its vision tower runs; its kernels stay.

    What the tower's own attention is given is read (:class:`attnlib.hooks.vision.VisionTower`), so whatever kernel it
    runs costs one more row (or, for ``what="received"``, one more map, in blocks).

    Args:
        start: first layer of the tower that counts, negative from the end.
        end: the layer after the last one that counts, as in a slice; ``None`` for all.
        ensemble: ``"sum"``, ``"min"`` or ``"max"`` over layers.
        what: ``"class"``: attention of the class token, which must be the tower's first; ``"received"``: the mean
            attention that a token gets, for towers without class token.
        tower: dotted path of the vision tower; found by its usual names otherwise.

    Raises:
        ValueError: when attached, a model without such a tower, or no layer between ``start`` and ``end``.
    """

    def __init__(
        self,
        start: int,
        end: int | None = None,
        ensemble: str = "sum",
        what: str = "class",
        tower: str | None = None,
    ):
        check_choice("ensemble", ensemble, ("sum", "min", "max"))
        check_choice("what", what, ("class", "received"))
        self.start, self.end, self.ensemble, self.what, self.tower = start, end, ensemble, what, tower
        self.reset()

    def reset(self) -> None:
        self._tower: VisionTower | None = None

    def on_attach(self, session: Session) -> None:
        self._tower = VisionTower(session.model, slice(self.start, self.end), self.what, self.tower)
        self._tower.watch(session)

    @property
    def _read(self) -> VisionTower:
        if self._tower is None:
            raise RuntimeError("VisionAttention is not attached to a model")
        return self._tower

    def _images_of(self, branch: str | None) -> list[Tensor]:
        """(images, n) of every run of the tower for the prompt of a branch."""
        runs = self._read.runs(branch)
        how = "mean" if self.what == "class" else "heads"
        return [ensemble([merged(one, how) for _, one in sorted(run.items())], self.ensemble) for run in runs]

    # ---- scores

    @property
    def runs(self) -> int:
        """How often the tower ran for the prompt of the current branch so far."""
        return len(self._read.runs(self._read.session.branch))

    def source(self) -> str | None:
        """The branch whose images the current one reads: its own, or those of the prompt itself."""
        branch = self._read.session.branch
        return branch if self._read.runs(branch) else None

    @property
    def images(self) -> Tensor:
        """(I, n) scores of the images last seen."""
        found = self._images_of(self.source())
        if not found:
            raise RuntimeError(
                "the prompt has image tokens, but the vision tower did not run in this session; give the model "
                "pixel_values"
            )
        return torch.cat(found)

    def fits(self, image: Tensor) -> bool:
        """Whether the image tokens (B, L) of a prompt may be those that the tower scored."""
        runs = self._images_of(self.source())
        rows = image.sum(1)
        if not runs:
            return False
        n, total = runs[0].shape[1], int(rows.sum())
        repeats = total // sum(run.numel() for run in runs)
        return bool(repeats and total == repeats * sum(run.numel() for run in runs) and not (rows % n).any()
                    and not len(rows) % repeats)  # fmt: skip

    def of_prompt(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images in the order of the prompt's image tokens.

        Args:
            image: (B, L) boolean, image tokens of the whole prompt.

        Returns:
            ``scores`` (I, n), one row for each image of the batch, and ``source`` (I,) which image of the tower's it
            is: beams and repeated samples share one.
        """
        scores = self.images
        count, n = scores.shape
        rows = image.sum(1)
        if not self.fits(image):
            hint = "; a tower without class token needs what='received'" if self.what == "class" else ""
            raise ValueError(
                f"the prompt has {int(rows.sum())} image tokens ({rows.tolist()} by sample), the vision tower scored "
                f"{count} images of {n} patches; they must be the same{hint}"
            )
        repeats = int(rows.sum()) // (count * n)
        if repeats == 1:
            return scores, torch.arange(count, device=scores.device)
        per_row = (rows // n)[::repeats]
        groups = torch.arange(count, device=scores.device).split(per_row.tolist())
        source = torch.cat([group for group in groups for _ in range(repeats)])
        return scores[source], source

    def score(self, site: Site, hidden: Tensor, image: Tensor) -> Tensor:
        raise NotImplementedError("scores of images are read by of_prompt")


def spread(values: Tensor, image: Tensor) -> Tensor:
    """Values by image (I, n) to the slots of image tokens (B, L), zero elsewhere.

    >>> spread(torch.tensor([[1, 2]]), torch.tensor([[False, True, True]])).tolist()
    [[0, 1, 2]]
    """
    out = torch.zeros(image.shape, dtype=values.dtype, device=image.device)
    out[image] = values.reshape(-1).to(image.device)
    return out
