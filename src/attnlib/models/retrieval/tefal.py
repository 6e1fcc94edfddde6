"""TEFAL: what a text reads of a video's frames and of its sound, in two blocks that do not know of each other.

``z_v|t = Block_v(t, frames)``, ``z_a|t = Block_a(t, sound)``, ``s(t, video) = cos(t, z_v|t + z_a|t)``. A block is
X-Pool's: ``q = W_q LN1 t``, ``k = W_k LN1 V``, ``v = W_v LN1 V``, ``A = softmax over frames (q . k / sqrt(d))``,
``o = LN2(W_o A v)``, ``z = LN3(o + drop(W o))``: nothing of the text stands in the result but its choice. All its maps
start as identities.

Reference: Ibrahimi et al., 2023, "Audio-Enhanced Text-to-Video Retrieval using Text-Conditioned Feature Alignment",
arXiv 2307.12964; the block is Gorti et al., 2022, arXiv 2203.15086 (layer6ai-labs/xpool, ``modules/transformer.py``).
No code of TEFAL was released: how the two are brought together is our reading, and the argument ``combine``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_divides,
    check_float,
    check_int,
    check_real,
    check_valid,
    check_width,
)
from ...nn.layers import merge_heads, split_heads
from ...ops import attention
from ..protocol import TaskModel, Terms
from .contrast import Scale, symmetric_contrast


class _Projections(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))


class TextConditionedPool(nn.Module):
    """X-Pool: every text pools the frames of every video for itself.

    Args:
        dim: width of texts and frames.
        num_heads: heads.
        drop: dropout behind the last map.

    Shape:
        text: (T, D). frames: (V, F, D), ``valid`` (V, F) boolean. Returns (V, T, D). A video without a frame that
        exists gives what a block of zeros gives; :class:`TEFAL` leaves such out.

    >>> pool = TextConditionedPool(8).eval()
    >>> pool(torch.randn(3, 8), torch.randn(2, 5, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, dim: int, num_heads: int = 1, drop: float = 0.3):
        super().__init__()
        check_int("dim", dim, least=1)
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", dim)
        self.dim, self.num_heads = dim, num_heads
        self.cross_attn = _Projections(dim)
        self.linear_proj = nn.Linear(dim, dim)
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(check_real("drop", drop, least=0, below=1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All maps are identities."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.eye_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor, frames: Tensor, valid: Tensor | None = None) -> Tensor:
        check_axes("text", text, T=None, D=self.dim)
        check_axes("frames", frames, V=None, F=None, D=self.dim)
        check_valid("valid", valid, frames.shape[:2])
        maps = self.cross_attn
        if valid is not None:
            frames = frames.masked_fill(~valid.unsqueeze(-1), 0.0)
        text, frames = self.layer_norm1(text), self.layer_norm1(frames)
        q = split_heads(maps.q_proj(text).unsqueeze(0), self.num_heads).expand(len(frames), -1, -1, -1)
        k, v = (split_heads(m(frames), self.num_heads) for m in (maps.k_proj, maps.v_proj))
        read = self.layer_norm2(maps.out_proj(merge_heads(attention(q, k, v, valid=valid))))
        return self.layer_norm3(read + self.dropout(self.linear_proj(read)))


class TEFAL(TaskModel):
    """Scores of texts and videos with sound.

    Args:
        dim: width of texts and frames (CLIP's).
        audio_dim: width of tokens of sound, brought to ``dim`` by a linear map; ``None`` when it is ``dim`` already.
        num_heads: of both blocks.
        drop: of both blocks.
        combine: ``"sum"`` of both vectors before they are compared, or the mean of ``"scores"`` of each.
        temperature: at the start; it is learnt.
        chunk: videos that are scored at once by :meth:`predict`.

    Shape:
        text: (T, D), one vector a text. frames: (V, F, D). audio: (V, A, audio_dim) or ``None``: without sound. Of a
        video none of whose sound exists by ``audio_valid`` the frames count alone, whatever its row holds. Returns
        (T, V).

    >>> model = TEFAL(8, audio_dim=6).eval()
    >>> model(torch.randn(3, 8), torch.randn(2, 5, 8), torch.randn(2, 9, 6)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self, dim: int = 512, audio_dim: int | None = None, num_heads: int = 1, drop: float = 0.3, combine: str = "sum",
        temperature: float = 0.07, chunk: int = 256,
    ):  # fmt: skip
        super().__init__()
        check_choice("combine", combine, ("sum", "scores"))
        self.combine, self.chunk = combine, check_int("chunk", chunk, least=1)
        self.video = TextConditionedPool(dim, num_heads, drop)
        self.sound = TextConditionedPool(dim, num_heads, drop)
        self.audio_dim = dim if audio_dim is None else check_int("audio_dim", audio_dim, least=1)
        self.audio_projection = nn.Identity() if audio_dim is None else nn.Linear(audio_dim, dim)
        self.scale = Scale(temperature)

    def compare(
        self, text: Tensor, frames: Tensor, audio: Tensor | None = None, frames_valid: Tensor | None = None,
        audio_valid: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(T, V) scores between -1 and 1; no score depends on the other texts and videos."""
        if frames.dim() == 3 and not frames.shape[1]:
            raise ValueError(f"frames must hold at least one frame, got {tuple(frames.shape)}")
        if frames_valid is not None:
            check_valid("frames_valid", frames_valid, frames.shape[:2])
            bare = ~frames_valid.any(1)
            if not torch.compiler.is_compiling() and not bare.is_meta and bool(bare.any()):
                raise ValueError(f"frames_valid leaves the videos {bare.nonzero().flatten().tolist()} without a frame")
        seen = self.video(text, frames, frames_valid)
        unit = F.normalize(text, dim=-1)
        if audio is None:
            if audio_valid is not None:
                raise ValueError("audio_valid is given without audio")
            return _cosines(unit, seen)
        check_float("audio", audio)
        if audio.dim() != 3 or len(audio) != len(frames):
            raise ValueError(
                f"audio must be (V, A, {self.audio_dim}) for {len(frames)} videos, got {tuple(audio.shape)}"
            )
        check_width("audio", audio, self.audio_dim, "audio_dim")
        check_valid("audio_valid", audio_valid, audio.shape[:2])
        if not audio.shape[1]:
            return _cosines(unit, seen)
        if audio_valid is not None:
            audio = audio.masked_fill(~audio_valid.unsqueeze(-1), 0.0)
        heard = self.sound(text, self.audio_projection(audio), audio_valid)
        if self.combine == "sum":
            if audio_valid is not None:
                heard = heard * audio_valid.any(1)[:, None, None]
            return _cosines(unit, seen + heard)
        share = heard.new_full((len(frames),), 0.5)
        if audio_valid is not None:
            share = share * audio_valid.any(1)
        return (1 - share) * _cosines(unit, seen) + share * _cosines(unit, heard)

    def forward(
        self, text: Tensor, frames: Tensor, audio: Tensor | None = None, frames_valid: Tensor | None = None,
        audio_valid: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(T, V) scores times the learnt scale."""
        return self.compare(text, frames, audio, frames_valid, audio_valid) * self.scale()

    def loss(self, prediction: Tensor, target: Tensor | None = None) -> Terms:
        """The contrastive loss in both directions; ``target``: (T, V) boolean, by default text i is of video i."""
        return {"contrast": symmetric_contrast(prediction, same=target)}

    def predict(
        self, text: Tensor, frames: Tensor, audio: Tensor | None = None, frames_valid: Tensor | None = None,
        audio_valid: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(T, V) scores between -1 and 1, some videos at a time: vectors that depend on the text cannot be kept."""
        parts = []
        for i in range(0, max(len(frames), 1), self.chunk):
            some: list[Any] = [
                t if t is None else t[i : i + self.chunk] for t in (frames, audio, frames_valid, audio_valid)
            ]
            parts.append(self.compare(text, *some))
        return torch.cat(parts, 1)


def _cosines(unit: Tensor, vectors: Tensor) -> Tensor:
    """(T, D) and (V, T, D) to (T, V)."""
    return torch.einsum("td,vtd->tv", unit, F.normalize(vectors, dim=-1))


def from_xpool(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of X-Pool's ``Transformer`` for :class:`TextConditionedPool`: the names are the same.

    Args:
        state: of ``Transformer``, or of ``CLIPTransformer``, whose ``pool_frames`` is taken.
    """
    inner = {k.removeprefix("pool_frames."): v for k, v in state.items() if k.startswith("pool_frames.")}
    return inner or dict(state)
