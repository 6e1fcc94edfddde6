"""Scores from the vision tower: how much its class token, or all its tokens, attend to each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.hf.names import VISION_TOWERS, vision_towers
from ..hooks.session import Session
from ..hooks.site import Site
from ..hooks.vision import class_row
from ..types import check_choice, stats_dtype
from .base import Scorer


def class_attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """How much the class token attends to each patch, averaged over heads.

    Args:
        q: (B, H, 1 or more, D) queries, the class token first.
        k: (B, H, 1 + N, D) keys, the class token first.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        (B, N) in the statistics dtype; the class token's own share is left out, so rows sum to less than 1.

    >>> class_attention(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)).tolist()
    [[0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224]]
    """
    return class_row(q, k, scale).mean(1)


def received_attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """How much each token is attended to by all, averaged over queries and heads: (B, H, N, D) twice -> (B, N)."""
    dtype = stats_dtype(q.dtype)
    scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1).mean((1, 2))


def ensemble(layers: Sequence[Tensor], how: str = "sum") -> Tensor:
    """Scores (B, N) of several layers as one: their sum, minimum or maximum.

    >>> ensemble([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])], "max").tolist()
    [[3.0, 2.0]]
    """
    check_choice("ensemble", how, ("sum", "min", "max"))
    stacked = torch.stack(list(layers))
    return stacked.sum(0) if how == "sum" else stacked.amin(0) if how == "min" else stacked.amax(0)


class VisionAttention(Scorer):
    """Scores of a vision-language model's patches, read while its vision tower runs; its kernels stay.

    Queries and keys are taken where the tower projects them, so whatever attention it runs costs one more row (or, for
    ``what="received"``, one more map).

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
        # What the tower read, by branch; and the branches whose prompt was reduced with it.
        self._runs: dict[str | None, list[Tensor]] = {}
        self._used: set[str | None] = set()
        self._layers: list[Tensor] = []
        self._taken: dict[nn.Module, Tensor] = {}

    # ---- watching

    def on_attach(self, session: Session) -> None:
        self._session = session
        tower = self._find(session.model)
        layers = [
            m for m in tower.modules() if all(isinstance(getattr(m, p, None), nn.Linear) for p in ("q_proj", "k_proj"))
        ]
        if not layers:
            raise ValueError(
                f"{type(tower).__name__} has no attention with q_proj and k_proj, whose attention could be read"
            )
        chosen = layers[self.start : self.end]
        if not chosen or not -len(layers) <= self.start < len(layers):
            raise ValueError(
                f"start={self.start}, end={self.end} name no layer of the vision tower, which has {len(layers)}"
            )
        session.hook(tower.register_forward_pre_hook(self._begin))
        session.hook(tower.register_forward_hook(self._end))
        for layer in chosen:
            for projection in (layer.q_proj, layer.k_proj):
                session.hook(projection.register_forward_hook(self._take))  # type: ignore[union-attr, operator]
            session.hook(layer.register_forward_hook(self._layer))
        session.undo(self._taken.clear)

    def _find(self, model: nn.Module) -> nn.Module:
        if self.tower is not None:
            try:
                return model.get_submodule(self.tower)
            except AttributeError as error:
                names = [n for n, _ in model.named_modules() if n and n.count(".") < 2]
                raise ValueError(f"tower={self.tower!r} is not in {type(model).__name__}; it has {names}") from error
        for _, module in vision_towers(model):
            return module
        raise ValueError(
            f"{type(model).__name__} has no vision tower under the names {list(VISION_TOWERS)}; give its path, "
            "tower='...'"
        )

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._layers = []

    def _take(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._taken[module] = output.detach()

    def _layer(self, module: Any, args: Any, output: Any) -> None:
        q, k = self._taken.pop(module.q_proj), self._taken.pop(module.k_proj)
        heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
        q, k = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k))
        scale = getattr(module, "scale", None) or getattr(module, "scaling", None)
        read = class_attention if self.what == "class" else received_attention
        self._layers.append(read(q, k, scale))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        branch = self._session.branch
        if branch in self._used:
            # What was read so far belongs to a prompt that is done.
            self._runs.pop(branch, None)
            self._used.discard(branch)
        self._runs.setdefault(branch, []).append(ensemble(self._layers, self.ensemble))
        self._layers = []

    # ---- scores

    @property
    def runs(self) -> int:
        """How often the tower ran for the prompt of the current branch so far."""
        return len(self._runs.get(self._session.branch, ()))

    def source(self) -> str | None:
        """The branch whose images the current one reads: its own, or those of the prompt itself."""
        branch = self._session.branch
        return branch if branch in self._runs else None

    @property
    def images(self) -> Tensor:
        """(I, n) scores of the images last seen."""
        branch = self.source()
        if branch not in self._runs:
            raise RuntimeError(
                "the prompt has image tokens, but the vision tower did not run in this session; give the model "
                "pixel_values"
            )
        self._used.add(branch)
        return torch.cat(self._runs[branch])

    def fits(self, image: Tensor) -> bool:
        """Whether the image tokens (B, L) of a prompt may be those that the tower scored."""
        runs = self._runs.get(self.source())
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
