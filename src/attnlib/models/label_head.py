"""Labels as sentences: a small cross-attention over frozen features (CrossTune; Luo et al., 2024, arXiv 2403.12468).

A frozen encoder reads a text and a sentence about every class; only the head between them is trained.

``e_c = pool(D_c)``, ``z_c = LN(e_c + CA(e_c, X))``, ``z_c = LN(z_c + MLP(z_c))``, ``logit_c = w . z_c``

One scorer serves all classes, so that their number is free and changes without new weights. Texts that somebody wrote
for a class are used where a teacher trusts them: :func:`switch`.

Our reading: there is no code, and the paper leaves open which side asks, how sentences are pooled, what stands behind
the attention and what the switch looks at; these are options, and no parity is claimed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_axes, check_choice, check_flag, check_int, check_real, check_valid, check_within, checked
from ..nn.dense.softmax_attention import SoftmaxAttention
from ..nn.layers import Mlp, masked_mean

QUERIES = ("label", "text")
POOLS = ("mean", "first")
SCORERS = ("shared", "match")
SWITCHES = ("agreement", "confidence", "dev_gain")


def pooled(x: Tensor, valid: Tensor | None, how: str) -> Tensor:
    """(B, C) of tokens (B, N, C): their mean, or the first that exists; zeros where none does."""
    if how == "mean":
        return masked_mean(x, valid)
    if valid is None:
        return x[:, 0]
    at = valid.int().argmax(1)
    return x[torch.arange(len(x), device=x.device), at] * valid.any(1, keepdim=True)


class LabelCrossAttentionHead(nn.Module):
    """Scores of classes that are told in words.

    Args:
        dim: width of the frozen features.
        num_heads: heads.
        query: ``"label"``: every class reads the text; ``"text"``: the text reads the classes, and the logits are its
            attention's scores, a mean over heads.
        pool: of the sentence about a class, and of the text with ``query="text"``: ``"mean"`` or ``"first"`` token.
        scorer: with ``query="label"``: ``"shared"``, a linear map of what a class has read; ``"match"``, the cosine of
            that, without the class itself, and the class, times a learned number.
        mlp_ratio: hidden width of the MLP behind the attention over ``dim``; 0 for none. Of ``"shared"``.
        identity: projections start as identities, so that an untrained head compares the features as they are.

    >>> head = LabelCrossAttentionHead(dim=16, num_heads=2)
    >>> head(torch.randn(5, 9, 16), torch.randn(3, 4, 16)).shape
    torch.Size([5, 3])
    """

    @checked
    def __init__(
        self, dim: int, num_heads: int = 8, query: str = "label", pool: str = "mean", scorer: str = "shared",
        mlp_ratio: float = 1.0, identity: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_int("dim", dim, least=1)
        check_choice("query", query, QUERIES)
        check_choice("pool", pool, POOLS)
        check_choice("scorer", scorer, SCORERS)
        check_real("mlp_ratio", mlp_ratio, least=0)
        check_flag("identity", identity)
        self.dim, self.query, self.pool, self.scorer = dim, query, pool, scorer
        self.cross = SoftmaxAttention(dim, num_heads)
        self.norm1 = self.norm2 = self.mlp = self.score = self.sharpness = None
        if query == "text":
            del self.cross.v, self.cross.proj  # only scores are read
        elif scorer == "match":
            self.sharpness = nn.Parameter(torch.tensor(10.0))
        else:
            self.norm1 = nn.LayerNorm(dim)
            self.mlp, self.norm2 = (Mlp(dim, mlp_ratio), nn.LayerNorm(dim)) if mlp_ratio else (None, None)
            self.score = nn.Linear(dim, 1, bias=False)
        if identity:
            for part in self.cross.children():
                if isinstance(part, nn.Linear):
                    nn.init.eye_(part.weight)
                    nn.init.zeros_(part.bias)

    def forward(
        self, text: Tensor, labels: Tensor, text_valid: Tensor | None = None, labels_valid: Tensor | None = None
    ) -> Tensor:
        """Logits (B, classes).

        Args:
            text: (B, N, dim) frozen features of texts. A text of one token leaves the attention nothing to choose from.
            labels: (classes, M, dim) frozen features of the sentences about classes.
            text_valid: (B, N) boolean, which tokens exist.
            labels_valid: (classes, M) boolean.
        """
        check_axes("text", text, B=None, N=None, dim=self.dim)
        check_axes("labels", labels, classes=None, M=None, dim=self.dim)
        check_valid("text_valid", text_valid, text.shape[:2])
        check_valid("labels_valid", labels_valid, labels.shape[:2])
        if not len(labels):
            raise ValueError("labels holds no class; possible: one sentence at least")
        if text.shape[1] == 1:
            warnings.warn(
                "text has one token per sample, a pooled vector: every class reads the same, whatever it asks",
                stacklevel=2,
            )
        classes = pooled(labels, labels_valid, self.pool)
        if self.query == "text":
            asks = pooled(text, text_valid, self.pool)
            q, k = (
                f(x).unflatten(-1, (self.cross.num_heads, -1))
                for f, x in ((self.cross.q, asks), (self.cross.k, classes))
            )
            return torch.einsum("bhd,chd->bch", q, k).mean(-1) * self.cross.scale
        asks = classes.expand(len(text), -1, -1)
        read = self.cross(asks, text, context_valid=text_valid)
        if self.sharpness is not None:
            return self.sharpness * F.cosine_similarity(read, asks, dim=-1)
        assert self.norm1 is not None and self.score is not None
        z = self.norm1(asks + read)
        if self.mlp is not None and self.norm2 is not None:
            z = self.norm2(z + self.mlp(z))
        return self.score(z)[..., 0]

    def loss(self, text: Tensor, labels: Tensor, target: Tensor, **valid: Any) -> dict[str, Tensor]:
        """``{"class": ...}``: cross-entropy of the classes (B,)."""
        check_within("target", target, len(labels), "classes")
        return {"class": F.cross_entropy(self(text, labels, **valid), target)}


class LabelClassifier(nn.Module):
    """A frozen encoder and a head; the sentences about classes are read once.

    Args:
        encode: from ids (B, N) and which exist (B, N) to features (B, N, dim); no gradient reaches it.
        head: trained.
    """

    def __init__(self, encode: Callable[[Tensor, Tensor], Tensor], head: LabelCrossAttentionHead):
        super().__init__()
        self._encode = (encode,)  # out of sight: no parameter of ours
        self.head = head
        self.labels: Tensor | None = None
        self.labels_valid: Tensor | None = None

    @torch.no_grad()
    def features(self, ids: Tensor, valid: Tensor) -> Tensor:
        """(B, N, dim), without gradient; may be kept."""
        return self._encode[0](ids, valid).detach()

    def describe(self, ids: Tensor, valid: Tensor) -> None:
        """Read the sentences (classes, M) about the classes from now on."""
        self.labels, self.labels_valid = self.features(ids, valid), valid

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Logits (B, classes) of texts (B, N)."""
        if self.labels is None:
            raise ValueError("no class is known; describe(ids, valid) reads the sentences about them")
        return self.head(self.features(ids, valid), self.labels, valid, self.labels_valid)


def switch(
    labels: Tensor, teacher: Tensor, how: str = "agreement", threshold: float = 0.9,
    dev: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """(N,) boolean: which of the texts that were written for a class are used.

    Args:
        labels: (N,) classes that they were written for.
        teacher: (N, classes) probabilities of a teacher that was trained on the few true examples.
        how: ``"agreement"``: the teacher says the same; ``"confidence"``: and is as sure as ``threshold``;
            ``"dev_gain"``: all of them or none, by ``dev``.
        threshold: of ``"confidence"``.
        dev: accuracy on the development set without and with them.
    """
    check_choice("how", how, SWITCHES)
    check_axes("labels", labels, N=None)
    check_axes("teacher", teacher, N=len(labels), classes=None)
    check_within("labels", labels, teacher.shape[1], "classes")
    check_real("threshold", threshold, least=0, most=1)
    if bool((teacher < 0).any()) or not torch.allclose(teacher.sum(-1), torch.ones_like(teacher[:, 0]), atol=1e-3):
        raise ValueError("teacher must hold probabilities that sum to 1 over classes; softmax(-1) of logits does")
    if (how == "dev_gain") != (dev is not None):
        raise ValueError(f"dev={dev} belongs to how='dev_gain', accuracies (without, with); how={how!r}")
    if dev is not None:
        return torch.full_like(labels, dev[1] > dev[0], dtype=torch.bool)
    sure, said = teacher.max(-1)
    agrees = said == labels
    return agrees if how == "agreement" else agrees & (sure >= threshold)
