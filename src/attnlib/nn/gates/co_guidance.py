"""Co-guidance: sound says where in a picture, and on which channels; the picture says when in the sound.

A clip has segments t; of each an image of cells ``v`` and a vector of sound ``a``. All attention here is unscaled.

Sound guides sight. With ``s = LN(v + softmax(q k^T) u)`` over the cells of a segment,

    ``g = sigmoid(W relu(W mean(relu(W a) relu(W s))))``                  of channels, ``v' = v (1 + g)``,
    ``w = softmax(tanh(W (relu(W v') relu(W a))))``                       over cells, ``f = w v'``,
    ``w_s = softmax(tanh(W (relu(W s) relu(W mean s))))``                 what is salient without sound,
    ``V = f + beta sigmoid(w_s s) f``.

Sight guides sound, over the segments of a clip: ``a' = LN(a + softmax(q k^T) u)``,

    ``G = softmax((W mean s_2) (W a')^T) W a'``,  ``A = a + psi sigmoid(G) a``

with a second set of maps for ``s_2``, which shares the norm of the first.

Reference: He et al., 2024, "CACE-Net: Co-guidance Attention and Contrastive Enhancement for Effective Audio-Visual
Event Localization", arXiv 2408.01952; ``Co_Guided_Attention`` of Brain-Cog-Lab/CACE-Net.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_float, check_int, check_real
from ...ops import attention
from ..released import Released

GUIDES = ("both", "audio", "visual", "none")


class Guided(NamedTuple):
    """Of each segment: the picture (B, T, C), the sound (B, T, A)."""

    video: Tensor
    audio: Tensor


class SpatialMaps(NamedTuple):
    """Weights of cells (B, T, H, W), one in sum: by the picture alone, and where sound points."""

    own: Tensor
    guided: Tensor


class _Reading(nn.Module):
    """Unscaled attention of tokens (..., N, C) among themselves, with one head."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unsqueeze(1) for m in (self.query, self.key, self.value))
        return attention(q, k, v, scale=1.0).squeeze(1)


class CoGuidance(nn.Module):
    """Pictures guided by sound, and sound guided by pictures.

    Args:
        dim: C, channels of pictures.
        audio_dim: A, channels of sound.
        hidden: of the gates.
        beta: how much what is salient without sound adds to the picture; 0 is the audio-guided attention of CMRAN.
        psi: how much the picture adds to the sound; 0 returns it as it came.
        guide: ``"both"``, or one direction: ``"audio"`` guides the picture and leaves sound alone, ``"visual"`` guides
            the sound and takes the mean of cells, ``"none"`` takes that mean and leaves sound alone.
        drop: dropout behind the attention over cells and over segments.

    Shape:
        video: (B, T, H, W, C) of any H and W. audio: (B, T, A). Returns :class:`Guided`.

    >>> video, audio = CoGuidance(16, 8, hidden=4)(torch.randn(2, 5, 3, 4, 16), torch.randn(2, 5, 8))
    >>> video.shape, audio.shape
    (torch.Size([2, 5, 16]), torch.Size([2, 5, 8]))
    """

    def __init__(
        self, dim: int = 512, audio_dim: int = 128, hidden: int = 256, beta: float = 0.4, psi: float = 0.3,
        guide: str = "both", drop: float = 0.2,
    ):  # fmt: skip
        super().__init__()
        check_int("dim", dim, least=4)
        for name, value in (("audio_dim", audio_dim), ("hidden", hidden)):
            check_int(name, value, least=1)
        check_choice("guide", guide, GUIDES)
        self.dim, self.audio_dim, self.guide = dim, audio_dim, guide
        self.beta, self.psi = check_real("beta", beta), check_real("psi", psi)
        self.dropout = nn.Dropout(check_real("drop", drop, least=0, below=1))
        if guide != "none":
            self.video_norm = nn.LayerNorm(dim)
        if guide in ("both", "audio"):
            self.cells = _Reading(dim, dim // 4)
            self.channel_video, self.channel_audio = nn.Linear(dim, dim), nn.Linear(audio_dim, dim)
            self.channel_down, self.channel_up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
            self.space_video, self.space_audio = nn.Linear(dim, hidden), nn.Linear(audio_dim, hidden)
            self.space = nn.Linear(hidden, 1)
            self.own_mean, self.own_cells, self.own = (
                nn.Linear(dim, hidden),
                nn.Linear(dim, hidden),
                nn.Linear(hidden, 1),
            )
        if guide in ("both", "visual"):
            self.guiding_cells = _Reading(dim, dim // 4)
            self.segments = _Reading(audio_dim, audio_dim)
            self.audio_norm = nn.LayerNorm(audio_dim)
            self.when = nn.Linear(dim, audio_dim)
            self.audio_key, self.audio_value = nn.Linear(audio_dim, audio_dim), nn.Linear(audio_dim, audio_dim)

    def _check(self, video: Tensor, audio: Tensor) -> None:
        check_float("video", video)
        check_float("audio", audio)
        check_axes("video", video, B=None, T=None, H=None, W=None, C=self.dim)
        check_axes("audio", audio, B=video.shape[0], T=video.shape[1], A=self.audio_dim)
        if 0 in video.shape[1:4]:
            raise ValueError(f"video must hold segments of at least one cell, got {tuple(video.shape)}")

    def forward(self, video: Tensor, audio: Tensor) -> Guided:
        self._check(video, audio)
        seen = video.flatten(2, 3).mean(2) if self.guide in ("visual", "none") else self._see(video, audio)[0]
        return Guided(seen, audio if self.guide in ("audio", "none") else self._hear(video, audio))

    def maps(self, video: Tensor, audio: Tensor) -> SpatialMaps:
        """Where in each segment the picture is read.

        Raises:
            ValueError: a ``guide`` that reads the mean of all cells.
        """
        self._check(video, audio)
        if self.guide in ("visual", "none"):
            raise ValueError(f"guide={self.guide!r} has no spatial maps; choose one of ['both', 'audio']")
        _, own, guided = self._see(video, audio)
        return SpatialMaps(own.reshape(video.shape[:4]), guided.reshape(video.shape[:4]))

    def _see(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The guided picture, and both weights of cells (BT, 1, HW)."""
        cells, sound = video.flatten(2, 3).flatten(0, 1), audio.flatten(0, 1).unsqueeze(1)  # (BT, HW, C), (BT, 1, A)
        known = self.video_norm(cells + self.dropout(self.cells(cells)))
        mean = self.own_mean(known.mean(1, keepdim=True)).relu()
        own = self.own(self.own_cells(known).relu() * mean).tanh().mT.softmax(-1)
        salient = (own @ known).squeeze(1)
        both = (self.channel_audio(sound).relu() * self.channel_video(known).relu()).mean(1)
        gate = self.channel_up(self.channel_down(both).relu()).sigmoid()
        weighed = cells * (gate + 1).unsqueeze(1)
        guided = self.space(self.space_video(weighed).relu() * self.space_audio(sound).relu()).tanh().mT.softmax(-1)
        found = (guided @ weighed).squeeze(1)
        found = found + self.beta * salient.sigmoid() * found
        return found.unflatten(0, video.shape[:2]), own, guided

    def _hear(self, video: Tensor, audio: Tensor) -> Tensor:
        cells = video.flatten(2, 3).flatten(0, 1)
        known = self.video_norm(cells + self.dropout(self.guiding_cells(cells))).mean(1).unflatten(0, video.shape[:2])
        sound = self.audio_norm(audio + self.dropout(self.segments(audio)))
        q, k, v = self.when(known), self.audio_key(sound), self.audio_value(sound)
        found = attention(*(t.unsqueeze(1) for t in (q, k, v)), scale=1.0).squeeze(1)
        return audio + self.psi * found.sigmoid() * audio

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], guide: str = "both") -> dict[str, Tensor]:
        """From the authors' ``Co_Guided_Attention``, or of one direction.

        These are ``Only_Audio_Guided_Attention`` for ``guide="audio"`` and ``Only_Visual_Guided_Attention`` for
        ``guide="visual"``.
        """
        check_choice("guide", guide, ("both", "audio", "visual"))
        theirs = Released(state_dict, "the authors' Co_Guided_Attention")
        return theirs.close(convert_co_guidance(theirs, guide))


def convert_co_guidance(theirs: Released, guide: str = "both", there: str = "", here: str = "") -> dict[str, Tensor]:
    """Takes what :class:`CoGuidance` has out of a released state dict, and leaves what theirs computes nothing with.

    Args:
        theirs: opened.
        guide: of the module that is to load it.
        there, here: what stands before the names, theirs and ours.
    """
    t, dead = there.replace(".", r"\."), [r"ave_bottleneck", r"v_norm2"]
    names: dict[str, str] = {}
    sees, hears = guide in ("both", "audio"), guide in ("both", "visual")
    own = {
        "affine_video_1": "channel_video", "affine_audio_1": "channel_audio", "affine_bottleneck": "channel_down",
        "affine_v_c_att": "channel_up", "affine_video_2": "space_video", "affine_audio_2": "space_audio",
        "affine_v_s_att": "space", "affine_video_ave": "own_mean", "affine_video_3": "own_cells", "ave_v_att": "own",
    }  # fmt: skip
    first = "cells" if sees else "guiding_cells"
    norm = "norm" if f"{there}norm.weight" in theirs else "v_norm"  # of Only_Audio_Guided_Attention, of the others
    read = {f"video_{part}": f"{first}.{part}" for part in ("query", "key", "value")}
    second = {f"video_{part}2": f"guiding_cells.{part}" for part in ("query", "key", "value")}
    heard = {
        "v_query": "when", "vaudio_key": "audio_key", "vaudio_value": "audio_value", "a_norm": "audio_norm",
        **{f"audio_{part}": f"segments.{part}" for part in ("query", "key", "value")},
    }  # fmt: skip
    for group, used in (
        (own, sees),
        (second, hears and sees),
        (heard, hears),
        ({**read, norm: "video_norm"}, True),
    ):
        if used:
            names |= group
        else:
            dead += list(group)
    rules: dict[str, str] = {rf"{t}{a}\.(weight|bias)": rf"{here}{b}.\1" for a, b in names.items()}
    out = theirs.renamed(rules)  # type: ignore[arg-type]
    for name in dead:
        if any(key.startswith(f"{there}{name}.") for key in theirs):
            theirs.leave(rf"{t}{name}\.(weight|bias)", because="nothing that is returned is computed with it")
    return out
