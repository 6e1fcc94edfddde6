"""PDMER: how a listener feels while music plays, from one song that the listener has rated.

Every half second, arousal and valence. A log-mel spectrogram of each frame and one vector of the whole song are fused;
one Transformer reads the frames twice, once each frame its near neighbours and once far ones, and both are added:

    ``h = W sigmoid(W_s conv(mel) + song)``,
    ``attention_c = softmax_{|i - j| <= c} ((q_i . k_j + q_i . r_{i-j}) / sqrt(d)) v``,
    ``y = sigmoid(Enc_local(h) + Enc_global(h))``, one set of weights for both,

and a recurrent layer in both directions reads off the answer. The loss is made of what such answers are judged by
(concordance, correlation, error), and asks local attention to stay where it is and global attention to look around.
Training is first-order meta-learning over annotators (:class:`~attnlib.models.meta.MetaLearner`).

Reference: Zhang, Ge et al., 2024, "Personalized Dynamic Music Emotion Recognition with Dual-Scale Attention-Based
Meta-Learning", arXiv 2412.19200; ``PDMERModel``, ``utils/train.py`` and ``utils/inference.py`` of
Littleor/Personalized-DMER.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_axes, check_choice, check_divides, check_float, check_int, check_ints, check_real
from ..nn.layers import LSTM, merge_heads, split_heads
from ..nn.released import Released
from ..ops import attention
from ..types import stats_dtype
from .meta import MetaLearner, Rated
from .protocol import Terms

#: What keys of distances are read by; which scales there are.
RELATIVE, SCALES = ("key", "key-query"), ("both", "local", "wide", "none")


class Felt(NamedTuple):
    """(B, S, 2) arousal and valence; and how much a frame attends to itself in the last layer, (B, S), by scale, or
    ``None`` where a model does not have it."""

    values: Tensor
    local: Tensor | None
    wide: Tensor | None


class BandAttention(nn.Module):
    """Attention within a distance, with keys for relative positions.

    Args:
        dim, num_heads: width and heads.
        max_distance: frames at most; distances below it have a key each.
        relative: ``"key"`` (or True): queries read such keys; ``"key-query"``: keys read them, too; False: frames have
            no position but their band.
        drop: dropout of weights, and behind the output.
    """

    def __init__(
        self, dim: int, num_heads: int, max_distance: int = 512, relative: bool | str = True, drop: float = 0.1
    ):
        super().__init__()
        check_divides("num_heads", num_heads, "dim", dim)
        if not isinstance(relative, bool):
            check_choice("relative", relative, (True, False, *RELATIVE))
        self.both = relative == "key-query"
        self.num_heads, self.max_distance, self.drop = num_heads, max_distance, drop
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.distance = nn.Embedding(2 * max_distance - 1, dim // num_heads) if relative else None

    def forward(self, x: Tensor, mask: Tensor | None, own: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, S, C) attending where ``mask`` (B or 1, S, S) allows, or everywhere; and with ``own`` the weights of
        frames for themselves, (B, S), the mean over heads."""
        q, k, v = (split_heads(m(x), self.num_heads) for m in (self.query, self.key, self.value))
        scale, bias, length = q.shape[-1] ** -0.5, None, x.shape[1]
        if self.distance is not None:
            if length > self.max_distance:
                raise ValueError(f"x has {length} frames, but keys reach max_distance={self.max_distance}")
            at = torch.arange(length, device=x.device)
            near = self.distance.weight[self.max_distance - length : self.max_distance + length - 1]
            steps = (at[:, None] - at + length - 1).expand(*q.shape[:2], -1, -1)
            bias = (q @ near.mT).gather(-1, steps) * scale
            if self.both:
                bias = bias + (k @ near.mT).gather(-1, steps.mT).mT * scale
        dropped = self.drop if self.training else 0.0
        out = self.proj(merge_heads(attention(q, k, v, mask=mask, bias=bias, dropout_p=dropped)))
        if not own:
            return out, None
        scores = (q @ k.mT).to(stats_dtype(q.dtype)) * scale
        scores = scores if bias is None else scores + bias
        seen = scores if mask is None else scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
        itself = scores.diagonal(dim1=-2, dim2=-1) - seen.logsumexp(-1)
        return out, itself.exp().mean(1).to(x.dtype)


class _Layer(nn.Module):
    """BERT's: norms behind both parts."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, max_distance: int, relative: bool | str, drop: float,
        act: type[nn.Module],
    ):  # fmt: skip
        super().__init__()
        self.act = act()
        self.attn = BandAttention(dim, num_heads, max_distance, relative, drop)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None, own: bool) -> tuple[Tensor, Tensor | None]:
        read, itself = self.attn(x, mask, own)
        x = self.norm1(x + self.dropout(read))
        return self.norm2(x + self.dropout(self.fc2(self.act(self.fc1(x))))), itself


def band(length: int, reach: int, device: torch.device | None = None) -> Tensor:
    """(S, S): pairs of frames at most ``reach`` apart."""
    at = torch.arange(length, device=device)
    return (at[:, None] - at).abs() <= reach


class PDMER(MetaLearner):
    """Arousal and valence along a song.

    Args:
        dim: width, that of the vector of a song (ImageBind's).
        num_heads, depth, hidden: of the Transformer.
        local, wide: how many frames to each side the two scales see.
        mel_size: height (time within a frame) and width (bands) of spectrograms.
        max_distance: frames at most in one pass.
        relative: of :class:`BandAttention`.
        scales: ``"both"``, added and squashed; ``"local"`` or ``"wide"`` alone, not squashed; ``"none"``: frames attend
            to all.
        activation: of the feed-forwards, ``"gelu"`` or ``"relu"``.
        window: frames of a pass of :meth:`predict`.
        drop: dropout.
        attention_weight: of the two terms that pull how much frames attend to themselves to 0.9 and 0.1.
        inner_steps, inner_lr, shots: of :class:`~attnlib.models.meta.MetaLearner`.

    Shape:
        mel: (B, S, *mel_size). song: (B, dim). Returns :class:`Felt`. ``target``: (B, S, 2), or
        :class:`~attnlib.models.meta.Rated` of it to train by annotators.

    >>> model = PDMER(16, 4, 2, 32, local=1, wide=3, mel_size=(9, 12)).eval()
    >>> mel, song, said = torch.randn(3, 8, 9, 12), torch.randn(3, 16), torch.rand(3, 8, 2)
    >>> model(mel, song).values.shape
    torch.Size([3, 8, 2])
    >>> mine = model.adapt({"mel": mel[:1], "song": song[:1], "target": said[:1]}, inner_steps=2)
    >>> mine.predict(mel[1:], song[1:]).shape
    torch.Size([2, 8, 2])
    """

    def __init__(
        self, dim: int = 1024, num_heads: int = 16, depth: int = 3, hidden: int = 2048, local: int = 5, wide: int = 30,
        mel_size: tuple[int, int] = (51, 128), max_distance: int = 512, relative: bool | str = True,
        window: int = 60, drop: float = 0.1, attention_weight: float = 1.0, inner_steps: int = 16,
        inner_lr: float = 5e-3, shots: int = 1, scales: str = "both", activation: str = "gelu",
    ):  # fmt: skip
        super().__init__(inner_steps, inner_lr, shots)
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", check_int("dim", dim, least=4))
        check_divides("4 (the head's halvings)", 4, "dim", dim)
        check_choice("scales", scales, SCALES)
        check_choice("activation", activation, ("gelu", "relu"))
        self.scales = scales
        self.dim, self.mel_size = dim, check_ints("mel_size", mel_size, least=1)
        if len(self.mel_size) != 2:
            raise ValueError(f"mel_size must be a height and a width, got {mel_size}")
        self.local, self.wide = check_int("local", local, least=0), check_int("wide", wide, least=0)
        self.max_distance = check_int("max_distance", max_distance, least=1)
        self.window = check_int("window", window, least=1, most=max_distance)
        self.attention_weight = check_real("attention_weight", attention_weight, least=0)
        drop = check_real("drop", drop, least=0, below=1)
        self.conv1, self.bn1 = nn.Conv2d(1, 8, (3, 1), padding=(2, 1)), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.flat = nn.Conv2d(16, 1, 1)
        cells = [((side + 2) // 2 + 1) // 2 + 1 for side in self.mel_size]
        self.mel_map, self.fused_map = nn.Linear(cells[0] * cells[1], dim), nn.Linear(dim, dim)
        check_int("hidden", hidden, least=1)
        self.layers = nn.ModuleList(
            _Layer(dim, num_heads, hidden, max_distance, relative, drop, nn.GELU if activation == "gelu" else nn.ReLU)
            for _ in range(check_int("depth", depth, least=1))
        )
        self.rnn = LSTM(dim, dim // 4, batch_first=True, bidirectional=True)
        self.fc1, self.fc2, self.dropout = nn.Linear(dim // 2, dim // 4), nn.Linear(dim // 4, 2), nn.Dropout(drop)

    def _check(self, mel: Tensor, song: Tensor) -> None:
        check_float("mel", mel)
        check_float("song", song)
        check_axes("mel", mel, B=None, S=None, H=self.mel_size[0], W=self.mel_size[1])
        check_axes("song", song, B=len(mel), dim=self.dim)
        if not mel.shape[1]:
            raise ValueError(f"mel must hold at least one frame, got {tuple(mel.shape)}")

    def fuse(self, mel: Tensor, song: Tensor) -> Tensor:
        """(B, S, dim): what each frame sounds like, in the light of the song."""
        x = mel.reshape(-1, 1, *self.mel_size)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = F.max_pool2d(norm(conv(x)).relu(), 2, padding=1)
        sound = self.mel_map(self.flat(x).flatten(1)).reshape(*mel.shape[:2], self.dim)
        return self.fused_map((sound + song.unsqueeze(1)).sigmoid())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fused frames at all scales, side by side in the batch: (2 B, S, dim); attention to oneself (2 B, S)."""
        batch, length = x.shape[:2]
        reaches = {"both": (self.local, self.wide), "local": (self.local,), "wide": (self.wide,), "none": ()}[
            self.scales
        ]
        mask = None
        if reaches:
            mask = torch.stack([band(length, reach, x.device) for reach in reaches]).repeat_interleave(batch, 0)
            x = torch.cat([x] * len(reaches))
        own: Tensor | None = None
        for i, layer in enumerate(self.layers):
            x, own = layer(x, mask, i == len(self.layers) - 1)
        assert own is not None
        return x, own

    def forward(self, mel: Tensor, song: Tensor) -> Felt:
        self._check(mel, song)
        if mel.shape[1] > self.max_distance:
            raise ValueError(
                f"mel has {mel.shape[1]} frames, but keys reach max_distance={self.max_distance}; "
                "predict() goes in windows"
            )
        batch = len(mel)
        if not batch:  # recurrent layers take no empty batch
            none = mel.new_zeros(0, mel.shape[1], 2)
            return Felt(none, *self._by_scale(none[..., 0]))
        seen, own = self.encode(self.fuse(mel, song))
        if self.scales == "both":
            seen = (seen[:batch] + seen[batch:]).sigmoid()
        values = self.fc2(self.dropout(self.fc1(self.rnn(seen)[0])))
        return Felt(values, *self._by_scale(own))

    def _by_scale(self, own: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.scales == "both":
            near, far = own.chunk(2) if len(own) else (own, own)
            return near, far
        return own if self.scales == "local" else None, own if self.scales == "wide" else None

    def loss(self, prediction: Felt, target: Tensor | Rated) -> Terms:
        """One minus the mean of scores, and how far attention to oneself is from 0.9 nearby and 0.1 at large.

        The scores are concordance, correlation and one minus the error, of arousal and of valence, each by song. Where
        nothing varies, correlation is 0. A scale that a model does not have has no term.
        """
        said = target.values if isinstance(target, Rated) else target
        check_float("target", said)
        check_axes("target", said, B=prediction.values.shape[0], S=prediction.values.shape[1], av=2)
        if not said.numel():
            raise ValueError("target is empty: there is nothing to learn from")
        marks = scores(prediction.values, said)
        terms = {"score": 1 - (marks.ccc + marks.pcc + 1 - marks.rmse).mean() / 3}
        for name, own, wanted in (("local", prediction.local, 0.9), ("wide", prediction.wide, 0.1)):
            if own is None:
                continue
            mean = own.to(terms["score"].dtype).mean(0)  # over the songs of a batch, as in the release
            terms[name] = self.attention_weight * (mean - wanted).square().mean()
        return terms

    def predict(
        self, mel: Tensor, song: Tensor, hops: Sequence[int] = (5, 1), chunk: int = 32, compat: str | None = None
    ) -> Tensor:
        """(B, S, 2) of songs of any length, in windows that end where something is still to be said.

        The first window answers for its frames, every later one for its last ``hop``. Songs within one window are read
        at once.

        Args:
            mel, song: as in ``forward``.
            hops: frames between windows, of arousal and of valence; a window at most.
            chunk: windows at once.
            compat: ``"authors"``: where a hop is more than one frame, windows end one frame late, so that answers stand
                one frame early.
        """
        self._check(mel, song)
        check_choice("compat", compat, (None, "authors"))
        hops = check_ints("hops", hops, least=1, most=self.window)  # longer ones leave frames without an answer
        if len(hops) != 2:
            raise ValueError(f"hops must be two, of arousal and of valence, got {hops}")
        check_int("chunk", chunk, least=1)
        length, size = mel.shape[1], self.window
        if length <= size or not len(mel):
            return self(mel, song).values
        plans = [_spoken(length, size, hop, compat == "authors") for hop in hops]
        starts = sorted({start for plan in plans for start, _ in plan})
        parts = []
        for i in range(0, len(starts), chunk):
            some = starts[i : i + chunk]
            windows = torch.stack([mel[:, s : s + size] for s in some], 1).flatten(0, 1)
            made = self(windows, song.repeat_interleave(len(some), 0)).values
            parts.append(made.unflatten(0, (-1, len(some))))
        said, row = torch.cat(parts, 1), {start: i for i, start in enumerate(starts)}
        return torch.stack(
            [torch.cat([said[:, row[s], size - n :, k] for s, n in plan], 1) for k, plan in enumerate(plans)], -1
        )

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``PDMERModel``, whose encoder stands under three names; ImageBind is left out."""
        theirs = Released(state_dict, "the authors' PDMERModel")
        theirs.leave(r"imagebind_model\..*", because="it makes the vector of a song, before this model")
        scales = r"multi_scale_attention\.multi_scale_attention\.(?:local|global)_attention\..*"
        theirs.leave(scales, because="both are the encoder, which has a name of its own")
        kind = r"(weight|bias)"
        layer = r"multi_scale_attention\.encoder\.encoder\.layer\.(\d+)\."
        made = theirs.renamed(
            {
                rf"spectrogram_feature_extractor\.feature_extractor\.0\.conv\.{kind}": r"conv1.\1",
                rf"spectrogram_feature_extractor\.feature_extractor\.1\.conv\.{kind}": r"conv2.\1",
                r"spectrogram_feature_extractor\.feature_extractor\.0\.bn\.(.*)": r"bn1.\1",
                r"spectrogram_feature_extractor\.feature_extractor\.1\.bn\.(.*)": r"bn2.\1",
                rf"spectrogram_feature_extractor\.conv1x1\.{kind}": r"flat.\1",
                rf"fusion_model\.spectrogram_feature_project\.{kind}": r"mel_map.\1",
                rf"fusion_model\.fusion_project\.{kind}": r"fused_map.\1",
                layer + rf"attention\.attention\.(query|key|value)\.{kind}": r"layers.\1.attn.\2.\3",
                layer + r"attention\.attention\.distance_embedding\.weight": r"layers.\1.attn.distance.weight",
                layer + rf"attention\.output\.dense\.{kind}": r"layers.\1.attn.proj.\2",
                layer + rf"attention\.output\.LayerNorm\.{kind}": r"layers.\1.norm1.\2",
                layer + rf"intermediate\.dense\.{kind}": r"layers.\1.fc1.\2",
                layer + rf"output\.dense\.{kind}": r"layers.\1.fc2.\2",
                layer + rf"output\.LayerNorm\.{kind}": r"layers.\1.norm2.\2",
                r"sequence_predict_model\.bilstm\.(.*)": r"rnn.\1",
                rf"sequence_predict_model\.layers\.0\.{kind}": r"fc1.\1",
                rf"sequence_predict_model\.layers\.2\.{kind}": r"fc2.\1",
            }
        )
        return theirs.close(made)


def _spoken(length: int, size: int, hop: int, late: bool) -> list[tuple[int, int]]:
    """Windows by their first frame, and how many of their last frames they answer for, one after another."""
    plan, last = [(0, size)], length - size
    if late and hop > 1:
        plan += [(start, hop) for start in range(hop + 1, last + 1, hop)]
        missing = length - size - hop * (len(plan) - 1)
        return plan + ([(last, missing)] if missing else [])
    plan += [(start, hop) for start in range(hop, last + 1, hop)]
    return plan + ([(last, last % hop)] if last % hop else [])


class Scores(NamedTuple):
    """(B, K) by sample and channel: concordance, Pearson's correlation, root of the mean squared error."""

    ccc: Tensor
    pcc: Tensor
    rmse: Tensor


def scores(prediction: Tensor, truth: Tensor, eps: float = 1e-8) -> Scores:
    """How well series (B, S, K) follow others, in float32 at least.

    Where one does not vary, correlation is 0; where neither does, concordance is, too. All have finite gradients.

    >>> x = torch.rand(1, 9, 2)
    >>> scores(x, x).ccc.allclose(torch.ones(1, 2))
    True
    """
    check_float("prediction", prediction)
    check_axes("prediction", prediction, B=None, S=None, K=None)
    batch, length, channels = prediction.shape
    check_float("truth", truth)
    check_axes("truth", truth, B=batch, S=length, K=channels)
    if not length:
        raise ValueError(f"prediction must hold at least one moment, got {tuple(prediction.shape)}")
    p, y = (t.to(stats_dtype(t.dtype)) for t in (prediction, truth))
    dp, dy = p - p.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    both, pp, yy = (dp * dy).mean(1), dp.square().mean(1), dy.square().mean(1)
    apart = pp + yy + (p.mean(1) - y.mean(1)).square()
    ccc = 2 * both / apart.clamp(min=torch.finfo(p.dtype).tiny)
    pcc = both * length / (_root(pp * length) * _root(yy * length) + eps)
    return Scores(ccc, pcc, _root((p - y).square().mean(1)))


def _root(x: Tensor) -> Tensor:
    """A square root whose gradient at 0 is 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)
