"""Cross-modal comprehension pretraining: a token pool, a mixed mask, a reconstruction (Croc, Xie et al., 2024).

Between the alignment of the projector and instruction tuning, three quarters of the projected image tokens are replaced
by entries of a learned pool; the language model reads everything before the answer in both directions, and must both
reconstruct the image tokens as they were and write the caption.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import masks
from ...types import check_choice, check_divides, check_rank, check_valid, check_width
from ..released import Released, Rule, packed


class Replaced(NamedTuple):
    """What :class:`PromptTokenPool` returns."""

    tokens: Tensor
    """(B, N, C) with the chosen positions replaced."""
    chosen: Tensor
    """(B, N) boolean: the replaced positions."""
    entries: Tensor
    """(B, R) entries of the pool, in order of position."""


class PromptTokenPool(nn.Module):
    """Replaces a random part of the tokens by the nearest entries of a learned pool.

    ``x_j -> P[argmin_k |x_j - P_k|]`` for a random set of positions j. With ``assignment="hungarian"`` every entry is
    used at most once per sample and the sum of distances is the least possible, as the paper describes; the authors'
    code takes the nearest, repeats allowed, which is the default. The choice has no gradient; gradients reach the
    entries that were taken, and the tokens that stay.

    Args:
        dim: width of a token.
        num_entries: size of the pool.
        keep: part of the tokens that stays; ``N - floor(keep N)`` are replaced.
        assignment: ``"nearest"`` or ``"hungarian"`` (needs SciPy).

    Reference: Xie et al., 2024, arXiv 2410.14332, section 3.2.

    >>> pool = PromptTokenPool(8, num_entries=5)
    >>> pool(torch.randn(2, 16, 8)).chosen.sum(1).tolist()
    [12, 12]
    """

    def __init__(self, dim: int, num_entries: int = 2048, keep: float = 0.25, assignment: str = "nearest"):
        super().__init__()
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must lie in [0, 1], got {keep}")
        if num_entries < 1:
            raise ValueError(f"num_entries={num_entries} must be at least 1")
        check_choice("assignment", assignment, ("nearest", "hungarian"))
        self.dim, self.keep, self.assignment = dim, keep, assignment
        self.entries = nn.Parameter(torch.randn(num_entries, dim))

    def choose(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, N) boolean: a random part of the positions of each sample."""
        batch, n = x.shape[:2]
        count = n - math.floor(self.keep * n + 1e-9)  # 0.29 of 100 is 28.999... in binary
        order = torch.rand(batch, n, generator=generator, device=x.device if generator is None else None).argsort(1)
        return (order < count).to(x.device)

    def assign(self, x: Tensor) -> Tensor:
        """(R,) entries for the tokens (R, C) of one sample."""
        distance = torch.cdist(x.detach().float(), self.entries.detach().float())
        if self.assignment == "nearest":
            return distance.argmin(1)
        if distance.shape[0] > distance.shape[1]:
            raise ValueError(
                f"assignment='hungarian' uses every entry once: {distance.shape[0]} tokens to replace, but the pool "
                f"has {distance.shape[1]}"
            )
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise ImportError("assignment='hungarian' needs SciPy: pip install 'attnlib[bench]'") from error
        rows, columns = linear_sum_assignment(distance.cpu().numpy())
        taken = torch.empty(len(rows), dtype=torch.long)
        taken[torch.from_numpy(rows)] = torch.from_numpy(columns)
        return taken.to(x.device)

    def forward(self, x: Tensor, chosen: Tensor | None = None, generator: torch.Generator | None = None) -> Replaced:
        """Replace positions of (B, N, C) tokens.

        Args:
            x: (B, N, C).
            chosen: (B, N) boolean, as many in each sample; random by default.
            generator: of the random choice.

        Raises:
            ValueError: wrong shapes, unequal numbers of positions, or a pool too small for ``"hungarian"``.
        """
        check_rank("x", x, 3, "(B, N, C)")
        check_width("x", x, self.dim)
        check_valid("chosen", chosen, x.shape[:2])
        chosen = self.choose(x, generator) if chosen is None else chosen
        counts = chosen.sum(1)
        if len(counts) and bool((counts != counts[0]).any()):
            raise ValueError(f"chosen must name as many positions in each sample, got {counts.tolist()}")
        entries = torch.stack([self.assign(one[rows]) for one, rows in zip(x, chosen, strict=True)])
        tokens = x.masked_scatter(chosen.unsqueeze(-1), self.entries[entries].to(x.dtype))
        return Replaced(tokens, chosen, entries)


class ReconstructionHead(nn.Module):
    """Learned positions, post-norm transformer layers, a linear map: states of image positions to image tokens.

    Args:
        dim: width.
        max_tokens: largest number of image tokens.
        num_layers: layers, each with ``dim / head_dim`` heads and a feed-forward of ``4 dim``.
        head_dim: width of a head.
        drop: dropout of the layers in training.
        out_dim: width of what is reconstructed; ``dim`` by default.

    Reference: Xie et al., 2024, arXiv 2410.14332, section 3.3.

    >>> ReconstructionHead(64, max_tokens=9)(torch.randn(2, 9, 64)).shape
    torch.Size([2, 9, 64])
    """

    def __init__(
        self,
        dim: int,
        max_tokens: int = 576,
        num_layers: int = 1,
        head_dim: int = 64,
        drop: float = 0.1,
        out_dim: int | None = None,
    ):
        super().__init__()
        check_divides("head_dim", head_dim, "dim", dim)
        self.dim, self.max_tokens = dim, max_tokens
        self.positions = nn.Embedding(max_tokens, dim)
        layer = nn.TransformerEncoderLayer(
            dim, dim // head_dim, 4 * dim, drop, nn.functional.gelu, layer_norm_eps=1e-12, batch_first=True
        )
        layer.dropout = nn.Dropout(0.0)  # BERT's layer, the authors', drops nothing inside the feed-forward
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        for one in self.layers.layers:  # torch copies one layer, and draws attention otherwise than linear maps
            attn: Any = one.self_attn
            for linear in (attn.out_proj, one.linear1, one.linear2):
                linear.reset_parameters()  # type: ignore[operator, union-attr]
            for p in (attn.in_proj_weight, attn.in_proj_bias):
                nn.init.uniform_(p, -(dim**-0.5), dim**-0.5)
        self.out = nn.Linear(dim, dim if out_dim is None else out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, C) states of the image positions to (B, P, out_dim)."""
        check_rank("x", x, 3, "(B, P, C)")
        check_width("x", x, self.dim)
        if x.shape[1] > self.max_tokens:
            raise ValueError(
                f"x has {x.shape[1]} image tokens, the head has positions for max_tokens={self.max_tokens}"
            )
        return self.out(self.layers(x + self.positions(torch.arange(x.shape[1], device=x.device)).to(x.dtype)))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``CustomTransformer`` (``transform_block.*`` of their model, with or without prefix)."""
        theirs = Released(state_dict, "the authors' CustomTransformer", wrappers=("transform_block.",))
        names = {
            "attention.output.dense": "self_attn.out_proj", "attention.output.LayerNorm": "norm1",
            "intermediate.dense": "linear1", "output.dense": "linear2", "output.LayerNorm": "norm2",
        }  # fmt: skip
        out: dict[str, Tensor] = {}
        for number in sorted({name.split(".")[1] for name in theirs if name.startswith("layers.")}):
            inside = f"layers.{number}.attention.self."
            for kind in ("weight", "bias"):
                found = theirs.take_all(f"{inside}{part}.{kind}" for part in ("query", "key", "value"))
                if found is not None:
                    ours = f"layers.layers.{number}.self_attn.in_proj_{kind}"
                    out[ours] = packed(ours, found)
        rules: dict[str, Rule] = {
            rf"layers\.(\d+)\.{re.escape(path)}\.(weight|bias)": rf"layers.layers.\1.{ours}.\2"
            for path, ours in names.items()
        }
        rules |= {r"position_embeddings\.weight": "positions.weight", r"resize\.(weight|bias)": r"out.\1"}
        return theirs.close(out | theirs.renamed(rules))


def mixed_mask(labels: Tensor, valid: Tensor | None = None, compat: str | None = None) -> Tensor:
    """Everything before the answer reads everything before the answer; from the first label on, causal.

    Padding is read by nobody, wherever it stands; a sample without labels is causal.

    Args:
        labels: (B, N) integers, -100 where there is none.
        valid: (B, N) boolean, which tokens exist.
        compat: ``"authors"`` opens, as their loop does, padding that stands before the first label, and all of a
            sample without labels.

    Returns:
        (B, 1, N, N) boolean, for a transformers model that takes four-dimensional masks, or for ``attention``.

    Reference: Xie et al., 2024, arXiv 2410.14332, section 3.3 (mixed attention).

    >>> mixed_mask(torch.tensor([[-100, -100, 7]]))[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    check_rank("labels", labels, 2, "(B, N)")
    check_valid("valid", valid, labels.shape)
    check_choice("compat", compat, (None, "authors"))
    n = labels.shape[1]
    asked = labels != -100
    at = torch.arange(n, device=labels.device)
    first = torch.where(asked, at, n).amin(1) if n else asked.new_zeros(len(labels), dtype=torch.long)
    allowed = masks.prefix_lm(first if compat == "authors" else torch.where(asked.any(1), first, 0)).at(at, at)
    allowed = allowed.expand(len(labels), 1, n, n)
    if valid is None:
        return allowed
    read = valid | (at < first[:, None]) if compat == "authors" else valid
    return allowed & read[:, None, None]


class CrocLoss(NamedTuple):
    """Parts of the objective; ``total = caption + weight * reconstruction``."""

    total: Tensor
    caption: Tensor
    reconstruction: Tensor


class CrocPretraining(nn.Module):
    """The objective around a decoder: replace, read with the mixed mask, reconstruct and caption.

    Args:
        model: a transformers decoder that takes ``inputs_embeds`` and four-dimensional masks and gives ``logits`` and
            ``hidden_states``.
        dim: its width.
        image_tokens: image tokens of a sample, at most.
        num_entries, keep, assignment: of :class:`PromptTokenPool`.
        weight, beta: of the reconstruction, a smooth L1 loss over *all* image positions.
        head_dim: of :class:`ReconstructionHead`.
        normalize: image tokens are brought to unit length first, as the authors' code does (the paper does not say).
        compat: of :func:`mixed_mask`.

    The target are the image tokens before replacement, in float32 and without gradient.

    Reference: Xie et al., 2024, arXiv 2410.14332, equations 3 to 6.
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int,
        image_tokens: int = 576,
        num_entries: int = 2048,
        keep: float = 0.25,
        assignment: str = "nearest",
        weight: float = 10.0,
        beta: float = 0.01,
        head_dim: int = 64,
        normalize: bool = False,
        compat: str | None = None,
    ):
        super().__init__()
        check_choice("compat", compat, (None, "authors"))
        self.model, self.weight, self.beta, self.normalize, self.compat = model, weight, beta, normalize, compat
        self.pool = PromptTokenPool(dim, num_entries, keep, assignment)
        self.head = ReconstructionHead(dim, image_tokens, head_dim=head_dim)

    def forward(
        self,
        inputs_embeds: Tensor,
        image: Tensor,
        labels: Tensor,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
        **call: Any,
    ) -> CrocLoss:
        """Loss of a batch.

        Args:
            inputs_embeds: (B, N, C) embeddings, projected image tokens among them.
            image: (B, N) boolean, where they stand, as many in each sample.
            labels: (B, N) of the caption, -100 elsewhere.
            valid: (B, N) boolean, which tokens exist.
            generator: of the random choice.

        Raises:
            ValueError: a batch without image tokens, with unequal numbers of them, or without labels.
        """
        check_rank("inputs_embeds", inputs_embeds, 3, "(B, N, C)")
        check_valid("image", image, inputs_embeds.shape[:2])
        counts = image.sum(1)
        if not len(counts) or int(counts[0]) == 0 or bool((counts != counts[0]).any()):
            raise ValueError(
                f"image must name the same positive number of tokens in each sample, got {counts.tolist()}"
            )
        if bool((labels == -100).all()):
            raise ValueError("labels are -100 everywhere; a caption to be predicted is needed")
        shape = (len(counts), int(counts[0]), -1)
        original = inputs_embeds[image].view(shape)
        if self.normalize:
            original = F.normalize(original, dim=-1)
        replaced = self.pool(original, generator=generator)
        embeds = inputs_embeds.masked_scatter(image.unsqueeze(-1), replaced.tokens)
        allowed = mixed_mask(labels, valid, self.compat)
        # Rows of padding see nothing; an additive mask of finite size keeps them out of trouble.
        additive = torch.zeros_like(allowed, dtype=embeds.dtype).masked_fill(~allowed, torch.finfo(embeds.dtype).min)
        out = self.model(inputs_embeds=embeds, attention_mask=additive, output_hidden_states=True, **call)
        caption = F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        back = self.head(out.hidden_states[-1][image].view(shape))
        reconstruction = F.smooth_l1_loss(back.float(), original.detach().float(), beta=self.beta)
        return CrocLoss(caption + self.weight * reconstruction, caption, reconstruction)
