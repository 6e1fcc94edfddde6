"""CACE-Net: which event is seen and heard in a clip, and in which of its segments.

Sound and picture guide one another (:class:`~attnlib.nn.gates.co_guidance.CoGuidance`), pass a recurrent layer each and
encoders over segments, read one another's encodings, and weigh each other by gates. What both say together is fused by
attention; on it stand three answers: whether a segment holds the event, which event the clip has, and vectors that a
contrastive loss draws together for segments of the event and away from background.

Reference: He et al., 2024, "CACE-Net: Co-guidance Attention and Contrastive Enhancement for Effective Audio-Visual
Event Localization", arXiv 2408.01952; ``supv_main_model`` and ``supv_main.py`` of Brain-Cog-Lab/CACE-Net. Theirs
exponentiates scores over a temperature of 0.01, which float32 cannot hold, and therefore trains in float64.

:class:`WeakCACENet` is told the event of a clip alone, not of its segments (``weak_main_model``, without recurrent
layers and gates between modalities). As released it cannot be built: it asks for a setting that it was never given, and
for a class that does not exist, in whose place ``Only_Audio_Guided_Attention`` stands. Its training is not released.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_divides,
    check_float,
    check_int,
    check_ints,
    check_real,
    check_valid,
    check_whole,
    extremes,
)
from ...nn.gates.co_guidance import CoGuidance, convert_co_guidance
from ...nn.layers import LSTM
from ...nn.released import Released, Rule
from ...types import stats_dtype
from ..protocol import TaskModel, Terms
from ..retrieval.contrast import pooled_contrast


class Located(NamedTuple):
    """Of clips with T segments and K events.

    Args:
        is_event: (B, T) logits, whether a segment holds the event.
        event: (B, K) logits, of the clip.
        gate: (B, T), the product of both modalities' gates, between 0 and 1.
        score: (B, K) logits by the best segments of each modality alone.
        query, key: (B, T, D) unit vectors of segments, and of the same with noise (in training; the same otherwise).
    """

    is_event: Tensor
    event: Tensor
    gate: Tensor
    score: Tensor
    query: Tensor
    key: Tensor


class _Encoder(nn.Module):
    """A map to the width of the model, and Transformer layers over segments."""

    def __init__(self, in_dim: int, dim: int, num_heads: int, hidden: int, layers: int):
        super().__init__()
        self.map = nn.Linear(in_dim, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, num_heads, hidden, dropout=0.1, batch_first=True) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.map(x)
        for layer in self.layers:
            x = layer(x)
        return x


class _CrossReader(nn.Module):
    """One modality reads the encoding of the other, and itself beside it."""

    def __init__(self, in_dim: int, dim: int, num_heads: int, hidden: int):
        super().__init__()
        self.map = nn.Linear(in_dim, dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, dropout=0.1, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.map(x)
        keys = torch.cat([memory, x], 1)
        x = self.norm1(x + self.dropout(self.attn(x, keys, keys, need_weights=False)[0]))
        return self.norm2(x + self.dropout(self.fc2(self.dropout(self.fc1(x).relu()))))


class _Together(nn.Module):
    """Where both modalities agree reads both."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        agreed, keys = one * other, torch.cat([other, one], 1)
        return self.norm(agreed + self.dropout(self.attn(agreed, keys, keys, need_weights=False)[0]))


class CACENet(TaskModel):
    """Localises an event in a clip with sound.

    Args:
        num_classes: K, events; the class of background in targets and answers is K.
        video_dim, audio_dim: channels of the cells of pictures, and of vectors of sound.
        cell_dim: channels of the cells as they are given, mapped to ``video_dim``, which they have by default.
        dim: D, width of the model, even.
        num_heads: of all Transformer layers.
        hidden: of the gates of the co-guidance, and of the feed-forwards: (encoders, readers).
        guide, beta, psi: of :class:`~attnlib.nn.gates.co_guidance.CoGuidance`.
        alpha: how much the gate of one modality adds to the other.
        gamma: weight of the score by modalities in the answer for a clip.
        enhance: Lambda, how much the vectors of the contrastive loss add to what tells events from background.
        top: how many segments make the score of a modality.
        noise: standard deviation of what is added for ``key`` in training.
        temperature: of the contrastive loss.
        contrast_weight: of the contrastive loss; 0 leaves it out, and ``enhance`` with it.
        contrast_from: share of the training that goes by before the contrastive loss and ``enhance`` begin; only counts
            for who calls :meth:`set_progress`, otherwise they are there from the start.

    Shape:
        video: (B, T, H, W, cell_dim). audio: (B, T, audio_dim). Returns :class:`Located`. ``target``: (B, T) whole
        numbers, the event of each segment, or K where there is none; a clip has one event at most.

    >>> model = CACENet(5, video_dim=16, audio_dim=8, dim=8, num_heads=2, hidden=(4, 16, 8)).eval()
    >>> model(torch.randn(2, 6, 3, 3, 16), torch.randn(2, 6, 8)).event.shape
    torch.Size([2, 5])
    """

    progress: Tensor

    def __init__(
        self, num_classes: int = 28, video_dim: int = 512, audio_dim: int = 128, dim: int = 256, num_heads: int = 4,
        hidden: tuple[int, int, int] = (256, 1024, 512), guide: str = "both", beta: float = 0.4, psi: float = 0.3,
        alpha: float = 0.1, gamma: float = 0.3, enhance: float = 0.6, top: int = 4, noise: float = 0.1,
        temperature: float = 0.01, contrast_weight: float = 1.0, contrast_from: float = 0.125,
        cell_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.num_classes = check_int("num_classes", num_classes, least=1)
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", check_int("dim", dim, least=2))
        check_divides("2 (directions of the recurrent layers)", 2, "dim", dim)
        widths = check_ints("hidden", hidden, least=1)
        if len(widths) != 3:
            raise ValueError(f"hidden must be three widths (gates, encoders, readers), got {hidden}")
        gates, encoder, reader = widths
        self.video_dim, self.audio_dim, self.dim = check_int("video_dim", video_dim, least=4), audio_dim, dim
        self.alpha, self.gamma, self.enhance = (
            check_real(name, v) for name, v in (("alpha", alpha), ("gamma", gamma), ("enhance", enhance))
        )
        self.top, self.noise = check_int("top", top, least=1), check_real("noise", noise, least=0)
        self.temperature = check_real("temperature", temperature, above=0)
        self.contrast_weight = check_real("contrast_weight", contrast_weight, least=0)
        self.contrast_from = check_real("contrast_from", contrast_from, least=0, most=1)
        self.register_buffer("progress", torch.ones(()))
        self.cell_dim = video_dim if cell_dim is None else check_int("cell_dim", cell_dim, least=1)
        self.video_fc, self.dropout = nn.Linear(self.cell_dim, video_dim), nn.Dropout(0.2)
        self.guidance = CoGuidance(video_dim, audio_dim, gates, beta, psi, guide)
        self.audio_rnn = LSTM(audio_dim, dim // 2, batch_first=True, bidirectional=True)
        self.video_rnn = LSTM(video_dim, dim, batch_first=True, bidirectional=True)
        self.video_encoder = _Encoder(2 * dim, dim, num_heads, encoder, 2)
        self.audio_encoder = _Encoder(dim, dim, num_heads, encoder, 2)
        self.video_reader = _CrossReader(2 * dim, dim, num_heads, reader)
        self.audio_reader = _CrossReader(dim, dim, num_heads, reader)
        self.video_gate, self.audio_gate = nn.Linear(dim, 1), nn.Linear(dim, 1)
        self.video_score, self.audio_score = nn.Linear(dim, num_classes), nn.Linear(dim, num_classes)
        self.video_together, self.audio_together = _Together(dim, num_heads), _Together(dim, num_heads)
        self.vectors = nn.Linear(dim, dim)
        self.is_event, self.event = nn.Linear(dim, 1), nn.Linear(dim, num_classes)

    def set_progress(self, progress: float) -> None:
        """Say how much of the training is over, 0 to 1: what is contrastive begins at ``contrast_from``."""
        self.progress.fill_(check_real("progress", progress, least=0, most=1))

    def _on(self) -> Tensor:
        """1 where what is contrastive has begun, 0 before."""
        return (self.progress >= self.contrast_from).to(self.event.weight.dtype) * (self.contrast_weight > 0)

    def forward(self, video: Tensor, audio: Tensor) -> Located:
        check_float("video", video)
        check_axes("video", video, B=None, T=None, H=None, W=None, cell_dim=self.cell_dim)
        fused, gate, score = self._fuse(self.dropout(self.video_fc(video).relu()), audio)
        query = self.vectors(fused).relu()
        is_event = self.is_event(fused + self.enhance * self._on() * query).squeeze(-1)
        event = self.event(fused.amax(1)) + self.gamma * score
        noisy = fused + self.noise * torch.randn_like(fused) if self.training else fused
        return Located(is_event, event, gate, score, F.normalize(query, dim=-1), self.unit_vectors(noisy))

    def unit_vectors(self, fused: Tensor) -> Tensor:
        """(B, T, D): what the contrastive loss compares."""
        return F.normalize(self.vectors(fused).relu(), dim=-1)

    def _fuse(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        video, audio = self.guidance(video, audio)
        if not len(video):  # recurrent layers take no empty batch
            video, audio = (
                video.new_zeros(0, video.shape[1], 2 * self.dim),
                video.new_zeros(0, audio.shape[1], self.dim),
            )
        else:
            video, audio = self.video_rnn(video)[0], self.audio_rnn(audio)[0]
        seen, heard = self.video_encoder(video), self.audio_encoder(audio)
        audio, video = self.audio_reader(audio, seen), self.video_reader(video, heard)
        audio_gate, video_gate = self.audio_gate(heard).sigmoid(), self.video_gate(seen).sigmoid()
        video = video + self.alpha * audio_gate * video
        audio = audio + self.alpha * video_gate * audio
        best = [
            head(x).topk(min(self.top, x.shape[1]), dim=1).values.mean(1)
            for head, x in ((self.video_score, video), (self.audio_score, audio))
        ]
        video = self.video_together(video, audio)
        audio = self.audio_together(audio, video)
        return (video + audio) / 2, (audio_gate * video_gate).squeeze(-1), (best[0] + best[1]) / 2

    def loss(self, prediction: Located, target: Tensor, compat: str | None = None) -> Terms:
        """Cross-entropies of segments, gates, events and scores by modality, and the contrastive term.

        Clips without an event train segments and gates alone; without one such clip the event terms are 0.

        Args:
            prediction: of ``forward``.
            target: (B, T), 0 to K.
            compat: ``"authors"``: the gate, which lies between 0 and 1, counts as a logit (so that its term is never
                below log 2 for background, log(1 + 1/e) for events), and clips without an event train as class 0.

        Raises:
            ValueError: classes outside 0 to K, two events in one clip, an empty batch.
        """
        check_choice("compat", compat, (None, "authors"))
        here, which = self._split(target, prediction.is_event.shape)
        high = stats_dtype(prediction.is_event.dtype)
        truth = here.to(high)
        if compat == "authors":
            gate = F.binary_cross_entropy_with_logits(prediction.gate.to(high), truth)
        else:
            share = prediction.gate.to(high).clamp(1e-6, 1 - 1e-6)
            gate = -torch.where(here, share.log(), torch.log1p(-share)).mean()
        has = torch.ones_like(here[:, 0]) if compat == "authors" else here.any(1)
        terms = {"is_event": F.binary_cross_entropy_with_logits(prediction.is_event.to(high), truth), "gate": gate}
        for name, logits in (("event", prediction.event), ("score", prediction.score)):
            each = F.cross_entropy(logits.to(high), which, reduction="none")
            terms[name] = (each * has).sum() / has.sum().clamp(min=1)
        if self.contrast_weight > 0:
            term = event_contrast(prediction.query, prediction.key, here, self.temperature)
            terms["contrast"] = self.contrast_weight * self._on().to(term.dtype) * term
        return terms

    def _split(self, target: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Which segments hold an event, and the event of each clip (0 for none)."""
        check_whole("target", target)
        check_axes("target", target, B=shape[0], T=shape[1])
        if not target.numel():
            raise ValueError("target is empty: there is nothing to learn from")
        low, high = extremes(target, (0, 0))
        if low < 0 or high > self.num_classes:
            raise ValueError(
                f"target holds the class {low if low < 0 else high}; possible: 0 to {self.num_classes - 1}, "
                f"and {self.num_classes} for segments without an event"
            )
        here = target < self.num_classes
        which = target.masked_fill(~here, 0).amax(1)
        mixed = here & (target != which[:, None])
        if not torch.compiler.is_compiling() and bool(mixed.any()):
            i = int(mixed.any(1).nonzero()[0])
            raise ValueError(f"target has several events in clip {i}: {target[i].tolist()}; possible: one a clip")
        return here, which

    def predict(self, video: Tensor, audio: Tensor) -> Tensor:
        """(B, T) event of each segment, K where there is none."""
        found = self(video, audio)
        return torch.where(found.is_event > 0, found.event.argmax(-1, keepdim=True), self.num_classes)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], guide: str = "both") -> dict[str, Tensor]:
        """From the authors' ``supv_main_model``, built with its ``guide`` ("None", "Audio-Guide" ... there)."""
        theirs = Released(state_dict, "the authors' supv_main_model")
        out = {"progress": torch.ones(())}
        if guide != "none":
            out |= convert_co_guidance(theirs, guide, "spatial_channel_att.", "guidance.")
        _leave_idle(theirs)
        out |= theirs.renamed(
            {
                **_SHARED,
                r"audio_visual_rnn_layer\.audio_rnn\.(.*)": r"audio_rnn.\1",
                r"audio_visual_rnn_layer\.visual_rnn\.(.*)": r"video_rnn.\1",
                rf"{_BOTH}_gated\.0\.{_KIND}": r"\1_gate.\2",
                rf"localize_module\.event_classifier\.{_KIND}": r"event.\1",
            }
        )
        return theirs.close(out)


_BOTH, _KIND = r"(audio|video)", r"(weight|bias)"
_CROSS = _BOTH + r"_decoder\.decoder\.layers\.0\."
_SHARED: dict[str, Rule] = {
    rf"v_fc\.{_KIND}": r"video_fc.\1",
    _BOTH + rf"_encoder\.affine_matrix\.{_KIND}": r"\1_encoder.map.\2",
    _BOTH + r"_encoder\.encoder\.layers\.(\d+)\.(.*)": r"\1_encoder.layers.\2.\3",
    _BOTH + rf"_decoder\.affine_matrix\.{_KIND}": r"\1_reader.map.\2",
    _CROSS + r"multihead_attn\.(.*)": r"\1_reader.attn.\2",
    _CROSS + rf"linear([12])\.{_KIND}": r"\1_reader.fc\2.\3",
    _CROSS + rf"norm([12])\.{_KIND}": r"\1_reader.norm\2.\3",
    _BOTH + rf"_cas\.{_KIND}": r"\1_score.\2",
    r"AVInter\.video_multihead\.(.*)": r"video_together.attn.\1",
    rf"AVInter\.norm1\.{_KIND}": r"video_together.norm.\1",
    r"VAInter\.video_multihead\.(.*)": r"audio_together.attn.\1",
    rf"VAInter\.norm1\.{_KIND}": r"audio_together.norm.\1",
    rf"localize_module\.encoder_q\.0\.{_KIND}": r"vectors.\1",
    rf"localize_module\.classifier\.{_KIND}": r"is_event.\1",
}


def _leave_idle(theirs: Released) -> None:
    """What both of their models build and never run."""
    theirs.leave(r"a_fc\..*", because="it is never called")
    theirs.leave(_BOTH + r"_(?:en|de)coder\.(?:en|de)coder_layer\..*", because="its copies are what is called")
    theirs.leave(_BOTH + r"_decoder\.decoder\.layers\.0\.self_attn\..*", because="it is never called")


class WeaklyLocated(NamedTuple):
    """Of clips with T segments and K events.

    Args:
        is_event: (B, T) logits, whether a segment holds the event.
        raw: (B, K + 1) logits of the clip by its best segments, background last.
        event: (B, K + 1) probabilities: ``softmax(max_t sigmoid(is_event) raw)``.
        query, key: (B, T, D) unit vectors of segments, and of the same with noise (in training; the same otherwise).
    """

    is_event: Tensor
    raw: Tensor
    event: Tensor
    query: Tensor
    key: Tensor


class WeakCACENet(TaskModel):
    """Localises an event in a clip with sound, and learns it from the event of the clip alone.

    Both modalities guide one another, are encoded, and read one another's encodings; each then says for every segment
    and class how far it believes in it, and these beliefs weigh the scores of what both say together:

        ``raw = mean of the best (sigmoid(S_v v) / 2 + sigmoid(S_a a) / 2) * S f`` over segments.

    Args:
        num_classes: K, events; class K is background.
        video_dim, audio_dim, cell_dim, dim, beta, psi, top, noise, temperature: as of :class:`CACENet`.
        num_heads: of encoders and readers; ``together_heads``: of what reads both modalities.
        hidden: of the gates of the co-guidance, and of the feed-forwards: (encoders, readers).
        guide: ``"both"`` or ``"audio"``.
        enhance: eta, how much the vectors of the contrastive loss add to what tells events from background.
        contrast_weight: of the contrastive loss (our reading: of segments that the model takes for the event, in clips
            that have one); 0 leaves it out, and ``enhance`` with it.

    Shape:
        video: (B, T, H, W, cell_dim). audio: (B, T, audio_dim). Returns :class:`WeaklyLocated`. ``target``: (B,) whole
        numbers, the event of each clip, or K where it has none.

    >>> model = WeakCACENet(5, video_dim=16, audio_dim=8, dim=8, num_heads=2, hidden=(4, 16, 8)).eval()
    >>> model(torch.randn(2, 6, 3, 3, 16), torch.randn(2, 6, 8)).event.shape
    torch.Size([2, 6])
    """

    def __init__(
        self, num_classes: int = 28, video_dim: int = 512, audio_dim: int = 128, dim: int = 256, num_heads: int = 4,
        hidden: tuple[int, int, int] = (256, 1024, 1024), guide: str = "both", beta: float = 0.4, psi: float = 0.3,
        enhance: float = 0.0, top: int = 4, noise: float = 0.1, temperature: float = 0.01,
        contrast_weight: float = 0.0, together_heads: int = 2, cell_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.num_classes = check_int("num_classes", num_classes, least=1)
        check_int("dim", dim, least=2)
        for name, heads in (("num_heads", num_heads), ("together_heads", together_heads)):
            check_divides(name, check_int(name, heads, least=1), "dim", dim)
        widths = check_ints("hidden", hidden, least=1)
        if len(widths) != 3:
            raise ValueError(f"hidden must be three widths (gates, encoders, readers), got {hidden}")
        check_choice("guide", guide, ("both", "audio"))
        gates, encoder, reader = widths
        self.enhance, self.top = check_real("enhance", enhance), check_int("top", top, least=1)
        self.noise = check_real("noise", noise, least=0)
        self.temperature = check_real("temperature", temperature, above=0)
        self.contrast_weight = check_real("contrast_weight", contrast_weight, least=0)
        check_int("video_dim", video_dim, least=4)
        self.cell_dim = video_dim if cell_dim is None else check_int("cell_dim", cell_dim, least=1)
        self.video_fc, self.dropout = nn.Linear(self.cell_dim, video_dim), nn.Dropout(0.2)
        self.guidance = CoGuidance(video_dim, audio_dim, gates, beta, psi, guide)
        self.video_encoder = _Encoder(video_dim, dim, num_heads, encoder, 2)
        self.audio_encoder = _Encoder(audio_dim, dim, num_heads, encoder, 2)
        self.video_reader = _CrossReader(video_dim, dim, num_heads, reader)
        self.audio_reader = _CrossReader(audio_dim, dim, num_heads, reader)
        self.video_score, self.audio_score = (nn.Linear(dim, num_classes + 1) for _ in range(2))
        self.video_together, self.audio_together = _Together(dim, together_heads), _Together(dim, together_heads)
        self.vectors, self.is_event = nn.Linear(dim, dim), nn.Linear(dim, 1)
        self.score = nn.Linear(dim, num_classes + 1, bias=False)

    def forward(self, video: Tensor, audio: Tensor) -> WeaklyLocated:
        check_float("video", video)
        check_axes("video", video, B=None, T=None, H=None, W=None, cell_dim=self.cell_dim)
        video, audio = self.guidance(self.dropout(self.video_fc(video).relu()), audio)
        seen, heard = self.video_encoder(video), self.audio_encoder(audio)
        audio, video = self.audio_reader(audio, seen), self.video_reader(video, heard)
        belief = 0.5 * self.video_score(video).sigmoid(), 0.5 * self.audio_score(audio).sigmoid()
        video = self.video_together(video, audio)
        audio = self.audio_together(audio, video)
        fused = (video + audio) / 2
        score = self.score(fused)
        score = belief[0] * score + belief[1] * score
        query = self.vectors(fused).relu()
        told = fused + self.enhance * query if self.contrast_weight > 0 else fused
        is_event = self.is_event(told)
        raw = score.topk(min(self.top, score.shape[1]), dim=1).values.mean(1)
        event = (is_event.sigmoid() * raw.unsqueeze(1)).amax(1).softmax(-1)
        noisy = told + self.noise * torch.randn_like(told) if self.training else told
        return WeaklyLocated(is_event.squeeze(-1), raw, event, F.normalize(query, dim=-1), self.unit_vectors(noisy))

    def unit_vectors(self, told: Tensor) -> Tensor:
        """(B, T, D): what the contrastive loss compares."""
        return F.normalize(self.vectors(told).relu(), dim=-1)

    def loss(self, prediction: WeaklyLocated, target: Tensor) -> Terms:
        """``{"event"}``, the cross-entropy of clips, and ``"contrast"`` where it has a weight; our reading.

        Args:
            prediction: of ``forward``.
            target: (B,), 0 to K.

        Raises:
            ValueError: classes outside 0 to K, an empty batch.
        """
        check_whole("target", target)
        check_axes("target", target, B=len(prediction.event))
        if not target.numel():
            raise ValueError("target is empty: there is nothing to learn from")
        low, high = extremes(target, (0, 0))
        if low < 0 or high > self.num_classes:
            raise ValueError(
                f"target holds the class {low if low < 0 else high}; possible: 0 to {self.num_classes - 1}, "
                f"and {self.num_classes} for clips without an event"
            )
        wide = stats_dtype(prediction.raw.dtype)
        logits = (prediction.is_event.to(wide).sigmoid().unsqueeze(-1) * prediction.raw.to(wide).unsqueeze(1)).amax(1)
        terms = {"event": F.cross_entropy(logits, target)}
        if self.contrast_weight > 0:
            here = (prediction.is_event > 0) & (target < self.num_classes).unsqueeze(1)
            term = event_contrast(prediction.query, prediction.key, here, self.temperature)
            terms["contrast"] = self.contrast_weight * term
        return terms

    def predict(self, video: Tensor, audio: Tensor) -> Tensor:
        """(B, T) event of each segment, K where there is none."""
        found = self(video, audio)
        return torch.where(found.is_event > 0, found.event.argmax(-1, keepdim=True), self.num_classes)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], guide: str = "both") -> dict[str, Tensor]:
        """From the authors' ``weak_main_model``, over ``Co_Guided_Attention`` or ``Only_Audio_Guided_Attention``."""
        check_choice("guide", guide, ("both", "audio"))
        theirs = Released(state_dict, "the authors' weak_main_model")
        out = convert_co_guidance(theirs, guide, "spatial_channel_att.", "guidance.")
        _leave_idle(theirs)
        theirs.leave(_BOTH + r"_gated\..*", because="it is never called")
        theirs.leave(r"localize_module\.(?:event_classifier|W3)\..*", because="it is never called")
        rules = {**_SHARED, r"localize_module\.CAS_model\.classifier\.0\.weight": _squeezed}
        return theirs.close(out | theirs.renamed(rules))


def _squeezed(match: Any, value: Tensor) -> dict[str, Tensor]:
    return {"score.weight": value.flatten(1)}


def event_contrast(query: Tensor, key: Tensor, here: Tensor, temperature: float = 0.01) -> Tensor:
    """Segments of a clip's event are drawn together, in both views; background to its own other view alone.

    Every clip compares its 2T vectors among each other. With n segments of the event, a row of one has 2n - 1 partners,
    pooled inside the logarithm, and at equal scores counts ``log (2T - 1)``, as one of background does.

    Args:
        query, key: (B, T, D) unit vectors.
        here: (B, T) boolean, which segments hold the event; none, one or all of a clip may.
        temperature: small ones overflow nothing, in float32 either.

    Returns:
        A number, float32 at least.
    """
    check_float("query", query)
    check_axes("query", query, B=None, T=None, D=None)
    batch, length, width = query.shape
    check_axes("key", key, B=batch, T=length, D=width)
    check_axes("here", here, B=batch, T=length)
    check_valid("here", here, (batch, length))
    high = stats_dtype(query.dtype)
    vectors = torch.cat([query, key], 1).to(high)
    scores = vectors @ vectors.mT / check_real("temperature", temperature, above=0)
    twice = torch.cat([here, here], 1)
    itself = torch.eye(twice.shape[1], dtype=torch.bool, device=here.device)
    same = (twice.unsqueeze(1) & twice.unsqueeze(2)) | itself.roll(length, 1)
    return pooled_contrast(scores, same & ~itself, ~itself.expand_as(same))
