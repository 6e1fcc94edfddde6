"""Features that are inherited from an earlier step: whole resolutions, layers, or halves of transformer blocks.

After A-SDM's successor (arXiv 2406.00210), of which no code is released: *feature inheritance* leaves a block, a layer
or a unit of a denoiser out at some steps and uses the feature of an earlier one. What the levels are and which steps
there are is our reading, on the table of :class:`attnlib.cache.StepCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..checks import check_choice, check_int
from ..hooks.denoiser import modules_of
from ..hooks.site import Site
from .steps import SUBLAYERS, Rule, StepCache, every

LEVELS = ("block", "layer", "unit")


class FeatureInheritance(StepCache):
    """A denoiser inherits features of earlier steps, at one level.

    ::

        with attnlib.attach(pipe, FeatureInheritance("block", every(2), keep=1)):
            pipe("a red circle", num_inference_steps=20)

    Args:
        level: ``"block"``: resolutions of a U-Net but the ``keep`` outer ones, or, in a transformer, its blocks but
            the ``keep`` first and last; ``"layer"``: resnets and transformers of a U-Net, blocks of a transformer;
            ``"unit"``: attentions and feed-forwards.
        pattern: which steps compute: a rule or table of :class:`StepCache`.
        keep: outer resolutions, or blocks at either end, that always run; ``"block"`` only.

    Reference: our reading of arXiv 2406.00210.

    >>> FeatureInheritance("unit").acts_on
    ('attention', 'feed-forward')
    """

    name: ClassVar[str] = "feature-inheritance"

    def __init__(self, level: str = "block", pattern: Tensor | Rule | None = None, keep: int = 1):
        check_choice("level", level, LEVELS)
        self.level, self.keep = level, check_int("keep", keep, least=0)
        super().__init__(every(2) if pattern is None else pattern, SUBLAYERS)

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.acts_on = self._names(model, sites)
        super().prepare(model, sites)

    def _names(self, model: Any, sites: Sequence[Site]) -> tuple[str, ...]:
        if self.level == "unit":
            return SUBLAYERS
        kinds: dict[str, list[str]] = {}
        for site in modules_of(model, sites):
            kinds.setdefault(site.kind, []).append(site.name)
        if "stage" not in kinds:  # a transformer
            blocks = kinds.get("block", [])
            inner = blocks[self.keep : len(blocks) - self.keep] if self.level == "block" else blocks
            if blocks and not inner:
                raise ValueError(f"keep={self.keep} blocks at either end of {len(blocks)} leave nothing to inherit")
            return tuple(inner) or ("block",)
        if self.level == "layer":
            return tuple(kind for kind in ("resnet", "transformer") if kind in kinds)
        ups = sum(name.startswith("up_blocks") for name in kinds["stage"])
        downs = sum(name.startswith("down_blocks") for name in kinds["stage"])
        outer = {f"down_blocks.{n}" for n in range(self.keep)} | {f"up_blocks.{ups - 1 - n}" for n in range(self.keep)}
        stages = tuple(name for name in kinds["stage"] if name not in outer)
        if self.keep > min(ups, downs) or not stages:
            raise ValueError(f"keep={self.keep} outer resolutions of {min(ups, downs)} leave nothing to inherit")
        return stages
