"""FILIP: an image and a text are compared patch by patch and word by word.

``s^I[i, j] = mean_a max_b I[i, a] . T[j, b]`` over patches a of image i, ``s^T[i, j] = mean_b max_a I[i, a] . T[j, b]``
over the words b of text j, all of unit length after one projection each;
``L = (CE(s^I / tau) along texts + CE(s^T / tau) along images) / 2`` with the pairs of the batch on the diagonal.

The encoders are the caller's and stay apart, so that tokens of a collection are computed once
(:meth:`FILIP.encode_images`, :meth:`FILIP.encode_texts`). Scores are :func:`attnlib.ops.late_interaction`.

Reference: Yao et al., 2021, "FILIP: Fine-grained Interactive Language-Image Pre-Training", arXiv 2111.07783, written
from its equations. x-clip's ``CLIP(use_all_token_embeds=True)`` (lucidrains) computes the same two scores; its second
cross-entropy also runs along images, ours along texts as the paper says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_rank, check_real, check_tensor, check_valid, shaped
from ...ops import late_interaction
from ..protocol import TaskModel, Terms
from .contrast import Scale, symmetric_contrast

#: Of scores, which is asked when one number per pair is wanted.
DIRECTIONS = ("mean", "image", "text")


class Tokens(NamedTuple):
    """Projected tokens of unit length, (B, N, D), and which of them exist, (B, N)."""

    values: Tensor
    valid: Tensor | None = None


class Scores(NamedTuple):
    """Of every image (rows) and every text (columns), times the learnt scale: by patches and by words."""

    image: Tensor
    text: Tensor


@shaped(tokens="alike (P, N, D)", others="alike (Q, M, D)", valid="bool (P, N)", others_valid="bool (Q, M)")
def strongest(
    tokens: Tensor,
    others: Tensor,
    share: float = 0.25,
    *,
    valid: Tensor | None = None,
    others_valid: Tensor | None = None,
    chunk: int = 1 << 22,
) -> Tensor:
    """Which tokens of each item have the largest products with any token of the other side.

    What FILIP exchanges between machines instead of all tokens.

    Args:
        tokens: of unit length.
        others: the batch on the other side.
        share: of an item's tokens, rounded up; at least one.
        valid: which tokens exist.
        others_valid: which of the others exist.
        chunk: products at a time.

    Returns:
        (P, N) boolean: a part of ``valid``.

    >>> words = torch.eye(4)[None]
    >>> strongest(words, torch.tensor([[[0.0, 1.0, 0.0, 0.0]]])).tolist()
    [[False, True, False, False]]
    """
    check_real("share", share, above=0, most=1)
    check_int("chunk", chunk, least=1)
    (p, n, d), flat = tokens.shape, others.flatten(0, 1)
    if others_valid is not None:
        flat = flat[others_valid.flatten()]
    if not len(flat):
        raise ValueError("others have no token to compare with")
    with torch.no_grad():
        rows = tokens.reshape(-1, d)
        step = max(1, chunk // len(flat))
        best = (
            torch.cat([(rows[i : i + step] @ flat.mT).amax(1) for i in range(0, len(rows), step)]) if p else rows[:, 0]
        )
        best = best.view(p, n)
        there = torch.ones_like(best, dtype=torch.bool) if valid is None else valid
        best = best.masked_fill(~there, float("-inf"))
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        most = (there.sum(1, keepdim=True) * share).ceil().clamp(min=1)
        return (rank < most) & there


def _hidden(out: Any, what: str) -> Tensor:
    """Tokens of an encoder: a tensor, or what models of transformers give."""
    found = getattr(out, "last_hidden_state", out)
    if not isinstance(found, Tensor) or found.dim() != 3:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(out).__name__
        raise ValueError(f"{what} must give tokens (B, N, C) or an output with last_hidden_state, got {shape}")
    return found


class FILIP(TaskModel):
    """Two encoders under a token-wise contrastive loss.

    Args:
        image_encoder: from images to tokens (B, N, image_dim), or to an output with ``last_hidden_state``.
        text_encoder: ``text_encoder(texts, valid)`` to (B, M, text_dim); one of transformers takes ``valid`` as its
            ``attention_mask``, too.
        image_dim, text_dim: widths of their tokens.
        dim: width in which they are compared.
        image_skip, text_skip: tokens in front that are left out (class, start).
        temperature: tau at the start; it is learnt.
        share: of tokens that are compared, those with the largest products within the batch; 1 for all of them.
        decoupled: see :func:`attnlib.models.retrieval.contrast.contrast`.

    Shape:
        images: as the encoder takes them. texts: (B, M) and ``text_valid`` (B, M) boolean, as the encoder takes them.
    """

    def __init__(
        self, image_encoder: nn.Module, text_encoder: nn.Module, image_dim: int, text_dim: int, dim: int = 256,
        image_skip: int = 1, text_skip: int = 1, temperature: float = 0.07, share: float = 1.0, decoupled: bool = False,
    ):  # fmt: skip
        super().__init__()
        for name, encoder in (("image_encoder", image_encoder), ("text_encoder", text_encoder)):
            if not callable(encoder):
                raise TypeError(f"{name} must be a module that gives tokens, got {type(encoder).__name__}")
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_skip = check_int("image_skip", image_skip, least=0)
        self.text_skip = check_int("text_skip", text_skip, least=0)
        self.share = check_real("share", share, above=0, most=1)
        self.decoupled = check_flag("decoupled", decoupled)
        check_int("dim", dim, least=1)
        self.image_projection = nn.Linear(check_int("image_dim", image_dim, least=1), dim, bias=False)
        self.text_projection = nn.Linear(check_int("text_dim", text_dim, least=1), dim, bias=False)
        self.scale = Scale(temperature)

    def _projected(self, hidden: Tensor, skip: int, projection: nn.Linear, what: str) -> Tensor:
        if hidden.shape[1] <= skip:
            raise ValueError(f"{what} gave {hidden.shape[1]} tokens, of which {skip} are left out: none is left")
        if hidden.shape[2] != projection.in_features:
            raise ValueError(f"{what} gave tokens of width {hidden.shape[2]}, not {projection.in_features}")
        return F.normalize(projection(hidden[:, skip:]), dim=-1)

    def encode_images(self, images: Any) -> Tokens:
        """Tokens of images, to be kept and compared with any text."""
        hidden = _hidden(self.image_encoder(images), "image_encoder")
        return Tokens(self._projected(hidden, self.image_skip, self.image_projection, "image_encoder"))

    def encode_texts(self, texts: Any, valid: Tensor | None = None) -> Tokens:
        """Tokens of texts.

        Args:
            texts: as the encoder takes them.
            valid: (B, M) boolean, which are no padding, on either side; all by default.

        Raises:
            ValueError: a text without a word.
        """
        hidden = _hidden(self._read(texts, valid), "text_encoder")
        kept = None
        if valid is not None:
            check_tensor("valid", valid)
            if valid.dtype != torch.bool and bool(((valid == 0) | (valid == 1)).all()):
                valid = valid.bool()  # attention masks of tokenizers
            check_valid("valid", valid, hidden.shape[:2])
            # What is left out stands in front of the words, wherever padding is.
            kept = valid & (valid.cumsum(1) > self.text_skip)
            empty = ~kept.any(1)
            if not torch.compiler.is_compiling() and not empty.is_meta and bool(empty.any()):
                raise ValueError(f"texts: {empty.nonzero().flatten().tolist()} have no word besides what is left out")
            return Tokens(self._projected(hidden, 0, self.text_projection, "text_encoder"), kept)
        return Tokens(self._projected(hidden, self.text_skip, self.text_projection, "text_encoder"))

    def _read(self, texts: Any, valid: Tensor | None) -> Any:
        if hasattr(self.text_encoder, "config") and hasattr(self.text_encoder, "get_input_embeddings"):
            mask = None if valid is None else valid.long()
            return self.text_encoder(input_ids=texts, attention_mask=mask)
        return self.text_encoder(texts, valid)

    def compare(self, images: Tokens, texts: Tokens) -> Scores:
        """Scores of all images with all texts, between -1 and 1."""
        x, y = images.valid, texts.valid
        if self.share < 1:
            x, y = (
                strongest(images.values, texts.values, self.share, valid=x, others_valid=y),
                strongest(texts.values, images.values, self.share, valid=y, others_valid=x),
            )
        return Scores(*late_interaction(images.values, texts.values, x_valid=x, y_valid=y))

    def forward(self, images: Any, texts: Any, text_valid: Tensor | None = None) -> Scores:
        """Scaled scores of all images with all texts."""
        found = self.compare(self.encode_images(images), self.encode_texts(texts, text_valid))
        scale = self.scale()
        return Scores(found.image * scale, found.text * scale)

    def loss(self, prediction: Scores, target: Tensor | None = None) -> Terms:
        """The contrastive loss.

        Args:
            prediction: of :meth:`forward`.
            target: (B, B) boolean, which images and texts belong together; those of one place by default.
        """
        return {"contrast": symmetric_contrast(prediction.image, prediction.text, target, self.decoupled)}

    def predict(self, images: Any, texts: Any, text_valid: Tensor | None = None, direction: str = "mean") -> Tensor:
        """(images, texts): one score for every image and text, between -1 and 1; see :meth:`rank`."""
        return self.rank(self.encode_images(images), self.encode_texts(texts, text_valid), direction)

    @torch.no_grad()
    def rank(self, images: Tokens, texts: Tokens | Sequence[Tokens], direction: str = "mean") -> Tensor:
        """One score for every image and text, from tokens that were computed before.

        Args:
            images: of :meth:`encode_images`.
            texts: of :meth:`encode_texts`; of several, one per template of a prompt, *scores* are averaged.
            direction: ``"image"`` by patches, ``"text"`` by words, ``"mean"`` of both.

        Returns:
            (images, texts), between -1 and 1.
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction={direction!r} is not possible; choose one of {list(DIRECTIONS)}")
        several = [texts] if isinstance(texts, Tokens) else list(texts)
        if not several:
            raise ValueError("texts must hold one set of tokens at least")
        if len({len(t.values) for t in several}) > 1:
            raise ValueError(f"every template must have all texts, got {[len(t.values) for t in several]}")
        found = torch.stack([torch.stack(tuple(self.compare(images, t))) for t in several])
        found = found.mean(0)
        return found.mean(0) if direction == "mean" else found[DIRECTIONS.index(direction) - 1]


def same_words(ids: Tensor) -> Tensor:
    """(B, B) which texts of a batch are the same, for :meth:`FILIP.loss`: their images belong to each other's.

    >>> same_words(torch.tensor([[1, 2], [1, 3], [1, 2]])).int().tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    check_rank("ids", ids, 2, "(B, M)")
    return (ids[:, None] == ids[None]).all(-1)
