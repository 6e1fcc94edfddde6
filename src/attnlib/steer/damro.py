"""DAMRO: take away what the background would say.

The tokens that the class token of a vision encoder attends to most are outliers of the background, and language models
attend to them too much. A second branch reads only the ``k`` of them as its image, and its scores are subtracted:

    ``z~ = (1 + alpha) z - alpha z'``  on  ``{v : z_v >= log(cutoff) + max z}``.

The branch has the kept tokens in order of decreasing attention.

What differs from the authors' code: batches, several images, beams and the model's own sampling settings are served
(theirs samples one prompt directly). Theirs computes attention over all heads as one of full width
(``head_merge="concat"``, the default here too); per head and averaged it ranks differently (``"mean"``). For their
InstructBLIP branch see :func:`select_outliers`.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import shaped
from ..hooks.branches import ImageTokens, Prompt
from ..hooks.hf.names import crops_of_images, cuts_images, with_sizes
from ..hooks.session import Session
from ..hooks.tokens import IMAGE
from ..hooks.vision import VisionTower
from ..types import check_choice
from ._watch import image_slots, whole_image_slots
from .contrastive import ContrastiveDecoding


@shaped(features="float (B, K, C)", attention="float (B, N)")
def select_outliers(features: Tensor, attention: Tensor, k: int, compat: str | None = None) -> Tensor:
    """The features of the patches that the class token attends to most, the strongest first.

    Args:
        features: (B, N, C) of the patches, or (B, 1 + N, C) with the class token in front.
        attention: (B, N) what the class token reads of each patch.
        k: patches to keep.
        compat: ``"authors"`` counts patches from the class token where features have one, as their InstructBLIP branch
            does: every feature is that of the patch before, and the first one is the class token.

    Returns:
        (B, k, C).

    >>> select_outliers(torch.arange(3.0).view(1, 3, 1), torch.tensor([[0.1, 0.7, 0.2]]), 2).flatten().tolist()
    [1.0, 2.0]
    """
    check_choice("compat", compat, (None, "authors"))
    extra = features.shape[1] - attention.shape[1]
    if extra not in (0, 1):
        raise ValueError(f"features of {features.shape[1]} tokens do not fit attention to {attention.shape[1]} patches")
    if not 1 <= k <= attention.shape[1]:
        raise ValueError(f"k must lie between 1 and the {attention.shape[1]} patches, got {k}")
    index = attention.topk(k, 1).indices + (0 if compat == "authors" else extra)
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))


class _Outliers(ImageTokens):
    """Only the outlier tokens of each image."""

    name = "outliers"

    def __init__(
        self, k: int, score: str, head_merge: str, layer: int | None, vision: str | None, order: str,
        compat: str | None,
    ):  # fmt: skip
        super().__init__(k, self.outlier_scores, order)
        self.score, self.head_merge, self.layer, self.vision, self.compat = score, head_merge, layer, vision, compat
        self.encoder: VisionTower | None = None
        self.sizes: Tensor | None = None

    def watch(self, session: Session) -> None:
        if self.score == "norm":
            return
        layer = self.layer
        if layer is None:
            config: Any = session.model.config
            chosen = getattr(config, "vision_feature_layer", -2)
            chosen = chosen[-1] if isinstance(chosen, (list, tuple)) else chosen
            # Hidden state i is the output of layer i - 1, counted from the end the numbers agree.
            layer = chosen if chosen < 0 else max(chosen - 1, 0)
        what = "concat" if self.head_merge == "concat" else "class"
        self.encoder = VisionTower(session.model, (layer,), what, self.vision, "vision")
        self.encoder.watch(session)
        self.sizes = None
        if cuts_images(session.model):
            session.set_attribute(*with_sizes(session.model, functools.partial(self._sizes_of, session)))

    def _sizes_of(self, session: Session, sizes: Tensor) -> None:
        if session.branch is None:
            self.sizes = sizes

    def outlier_scores(self, prompt: Prompt) -> Any:
        if self.score == "norm":
            return prompt.embedded().float().norm(dim=-1).masked_fill(prompt.types != IMAGE, float("-inf"))
        assert self.encoder is not None
        values = self.encoder.scores(next(iter(self.encoder.layers)), None, self.head_merge)
        if values is None:
            raise ValueError(
                "DAMRO: the prompt has image tokens, but the vision encoder did not run for it, so there is nothing to "
                "choose outliers by; score='norm' needs no encoder"
            )
        nowhere = float("-inf")
        if self.sizes is not None:
            crops = crops_of_images(prompt.model, self.sizes)
            if not self.k <= values.shape[1]:
                raise ValueError(f"k={self.k} outliers are to stay, but the whole image has {values.shape[1]} patches")
            best = values.topk(self.k, 1)
            values = torch.full_like(values, nowhere).scatter(1, best.indices, best.values)
            return whole_image_slots(prompt.types, values, crops, nowhere, -1.0), None, self.k + 1
        if self.encoder.class_token and self.compat == "authors":
            # Counted from the class token, every patch's attention stands at its left neighbour.
            values = F.pad(values, (0, 1), value=nowhere)
            return image_slots(prompt.types, values, nowhere), values.shape[1]
        at_slots = image_slots(prompt.types, values, nowhere, self.encoder.class_token)
        return at_slots, values.shape[1] + self.encoder.class_token


class DAMRO(ContrastiveDecoding):
    """Subtract the scores of a branch whose image consists of outlier tokens only.

    Args:
        alpha: strength; 0 leaves the scores of plausible tokens as they are.
        k: outliers of each image.
        cutoff: share of the largest probability that a token needs.
        score: ``"class-attention"``, or ``"norm"`` for the largest embeddings, where encoders have no class token.
        head_merge: ``"concat"``, ``"mean"`` or ``"sum"``, see :func:`attnlib.hooks.vision.class_attention`.
        layer: of the vision encoder; by default the one whose features the model reads.
        order: of the outliers: ``"score"``, the strongest first, or ``"place"``.
        vision: dotted path of the vision encoder, when it is not found by itself.
        compat: ``"authors"`` counts outliers from the class token in models that show it to the decoder
            (``vision_feature_select_strategy="full"``), see :func:`select_outliers`.

    Of an image that is cut into crops (LLaVA-NeXT) the branch reads outliers of the whole view, its first crop, and the
    line break that ends the image.

    Raises:
        ValueError: a negative strength, fewer than one outlier, no vision encoder with a class token.

    Reference: Gong et al., 2024, arXiv 2410.04514, section 4.

    >>> DAMRO(alpha=0.5, k=4).a
    1.5
    """

    name: ClassVar[str] = "damro"

    def __init__(
        self,
        alpha: float = 2.0,
        k: int = 10,
        cutoff: float = 0.1,
        score: str = "class-attention",
        head_merge: str = "concat",
        layer: int | None = None,
        order: str = "score",
        vision: str | None = None,
        compat: str | None = None,
    ):
        check_choice("compat", compat, (None, "authors"))
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {alpha}")
        check_choice("score", score, ("class-attention", "norm"))
        check_choice("head_merge", head_merge, ("concat", "mean", "sum"))
        branch = _Outliers(k, score, head_merge, layer, vision, order, compat)
        super().__init__(branch, 1 + alpha, -alpha, cutoff)
