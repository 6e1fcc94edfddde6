"""Attention of a denoiser at another image size than it was trained at: one number for the scale of its scores.

The entropy of a row of self-attention grows with the logarithm of the number of tokens. With T tokens at training and N
now, the scale of scores becomes

    ``s' = s sqrt(log_T N) = s sqrt(ln N / ln T)``,

so that rows of a larger image stay as sharp as they were, and rows of a smaller one as soft. T and N are counted layer
by layer, at its own resolution. Queries are multiplied, and nothing else: any kernel serves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...checks import check_int, check_ints, to_tuple
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from .clear import Clear


def scale_factor(tokens: int, trained: int) -> float:
    """``sqrt(ln N / ln T)``.

    >>> round(scale_factor(16, 4) ** 2, 6), scale_factor(4096, 4096)
    (2.0, 1.0)
    """
    check_int("tokens", tokens, least=1)
    check_int("trained", trained, least=2)
    return 1.0 if tokens == trained else math.sqrt(math.log(tokens) / math.log(trained))


def halvings(model: nn.Module, name: str) -> int:
    """How often a U-Net halves its latents before a module, as it is built.

    Raises:
        ValueError: a module that is in no stage of the U-Net.
    """
    place = re.match(r"(down_blocks|up_blocks)\.(\d+)|mid_block", name)
    if place is None:
        raise ValueError(f"{name} is in no stage of {type(model).__name__}, so its resolution at training is not known")

    def samplers(stages: str, kind: str, stop: int | None = None) -> int:
        return sum(bool(getattr(stage, kind, None)) for stage in list(getattr(model, stages))[:stop])

    if place[1] == "down_blocks":
        return samplers("down_blocks", "downsamplers", int(place[2]))
    deepest = samplers("down_blocks", "downsamplers")
    return deepest if place[1] is None else deepest - samplers("up_blocks", "upsamplers", int(place[2]))


class VariableSizeScale(Intervention):
    """Self-attention scaled for the number of tokens that there are, from that at training.

    ::

        with attnlib.attach(pipe, VariableSizeScale()):
            pipe("a red circle", height=768, width=768)

    Args:
        trained_size: side of what the model denoises at training, or (height, width): latents, for Flux in patches of
            two by two; ``None`` for the model's own ``config.sample_size``.
        layers: numbers or name patterns; ``None`` for all self-attention, and all joint attention of transformers.

    Raises:
        ValueError: a model that does not say its size at training; when it is called, latents of a video.

    There is no released code; this is our reading. Ours: text keeps out of both counts in joint attention, where all
    queries are scaled alike; cross-attention, whose keys are as many as ever, is left as it is. At the size of training
    nothing is changed, bit for bit.

    Reference: Jin et al., 2023, arXiv 2306.08645.

    >>> VariableSizeScale(trained_size=64).kinds
    ('self', 'joint')
    """

    name: ClassVar[str] = "variable-size-attention-scale"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")

    def __init__(self, trained_size: int | Sequence[int] | None = None, layers: Sequence[int | str] | None = None):
        sides = None if trained_size is None else to_tuple("trained_size", trained_size, 2)
        self.trained_size = None if sides is None else check_ints("trained_size", sides, least=1)
        self.layers = layers
        self._trained: dict[int, int] = {}

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, VariableSizeScale):
            return "scores would be scaled for the number of tokens twice"
        if isinstance(other, Clear) and other.proportional:
            return "Clear(proportional=True) scales scores for the number of keys already"
        return None

    def prepare(self, model: nn.Module, sites: Sequence[Site]) -> None:
        sides: Any = self.trained_size
        config: Any = getattr(model, "config", None)
        if sides is None:
            sides = getattr(config, "sample_size", None)
            if sides is None:
                raise ValueError(
                    f"VariableSizeScale: {type(model).__name__} does not say the size of its latents at training; give "
                    "trained_size, the side of what it denoises"
                )
            sides = to_tuple("sample_size", sides, 2)
        self._trained = {}
        for site in sites:
            steps = getattr(config, "patch_size", None) or 1
            height, width = (-(-side // s) for side, s in zip(sides, to_tuple("patch_size", steps, 2), strict=True))
            for _ in range(halvings(model, site.name) if hasattr(model, "down_blocks") else 0):
                height, width = -(-height // 2), -(-width // 2)
            if height * width < 2:
                raise ValueError(
                    f"layer {site.layer} ({site.name}) has one token at trained_size={tuple(sides)}, so there is "
                    "nothing to scale from; leave it out with layers=..."
                )
            self._trained[site.layer] = height * width

    def factor(self, site: Site) -> float:
        """What the queries of a call are multiplied by."""
        layout = site.q_layout
        if layout is not None and "image" not in layout.names:
            return 1.0  # along frames, or among text
        grid = None if layout is None else layout.grid("image")
        if grid is None or len(grid) > 2:
            raise ValueError(
                f"VariableSizeScale: layer {site.layer} ({site.name}) does not attend over the tokens of one image, as "
                f"far as is known (grid {grid}); sizes of videos are not served"
            )
        return scale_factor(math.prod(grid), self._trained[site.layer])

    def on_qkv(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor = self.factor(site)
        return (q if factor == 1.0 else q * factor), k, v
