"""Task preference optimization: dense labels teach a language model through tokens with heads (Yan et al., 2024).

Tokens for boxes, moments and tracks stand in the text; their last hidden states go through heads whose losses flow back
into the model, beside the loss of the next token (arXiv 2412.19326). No pair of answers is compared.

- boxes: ``b = MLP(h)``, corners in shares of the image; ``2 |b - t| + (1 - GIoU) / 5``
- tracks: ``e = MLP(h)``, the embeddings of a prompt for a segmenter, and a box: ``|e - e_t| + |b - t|``, with ``e_t``
  the segmenter's own embedding of the true box
- moments: start and end over frames, one token each (:class:`FrameHead`, as the release reads them), or spans over
  features of the video, asked by one token (:class:`MomentHead`)

Boxes that are given stand in the text as ``track_box`` tokens, encoded by an MLP.

Training has three stages: the model learns when to say which token; heads learn; all together, with conversations.

Differs from the authors' code: predictions that are no box have no overlap term (``compat="authors"``: the constant
2 / 5 where none is); rows are put beside the table and not into what was looked up; tokens are found in every sample of
a batch. Their moments come from CG-DETR, which is another paper's: the small head here is our reading of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_divides, check_int, check_real, check_valid, describe
from ...nn.released import Released
from ...positions import sincos
from ..detect.boxes import match, pair_overlaps
from .losses import box_loss, check_target_boxes
from .task_tokens import Taken, TaskTokens

STAGES = ("assign", "heads", "joint")
TEMPORAL = ("frames", "moments")


class Prompted(NamedTuple):
    """Of track tokens: embeddings (K, n, P) that prompt a segmenter, and boxes (K, 4)."""

    prompts: Tensor
    boxes: Tensor


def _mlp(dim: int, hidden: int, out: int, drop: float = 0.0) -> nn.Sequential:
    """Two maps with a ReLU between; dropout behind each, as theirs has it."""
    if not drop:
        return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(drop), nn.Linear(hidden, out), nn.Dropout(drop))


class TrackHead(nn.Module):
    """(K, C) -> :class:`Prompted`.

    Args:
        dim: width of the model.
        num_prompts: embeddings of a prompt; 3 for SAM 2 (two corners and the end), 2 for transformers' SAM.
        prompt_dim: their width.
    """

    def __init__(self, dim: int, num_prompts: int = 3, prompt_dim: int = 256):
        super().__init__()
        self.shape = (check_int("num_prompts", num_prompts, least=1), check_int("prompt_dim", prompt_dim, least=1))
        self.prompt = _mlp(dim, dim, num_prompts * prompt_dim)
        self.box = _mlp(dim, dim, 4)

    def forward(self, states: Tensor) -> Prompted:
        return Prompted(self.prompt(states).unflatten(-1, self.shape), self.box(states))


class FrameHead(nn.Module):
    """(K, C) of tokens that stand for frames -> (K, 3): scores of a moment's start, of its end, and of being in one.

    Args:
        dim: width of the model.
        drop: dropout behind every map.
    """

    def __init__(self, dim: int, drop: float = 0.3):
        super().__init__()
        check_real("drop", drop, least=0, below=1)
        self.ends, self.action = _mlp(dim, dim, 2, drop), _mlp(dim, dim, 1, drop)

    def forward(self, states: Tensor) -> Tensor:
        return torch.cat([self.ends(states), self.action(states)], -1)


def best_spans(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, 2) first and last frame of the likeliest moment: ``max log p(start) + log p(end)`` over start < end.

    Args:
        logits: (B, T, 2) of starts and ends.
        valid: (B, T) frames that exist; a sample needs two.

    >>> best_spans(torch.tensor([[[5.0, 9.0], [0.0, 0.0], [0.0, 4.0]]])).tolist()
    [[0, 2]]
    """
    if logits.dim() != 3 or logits.shape[-1] != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (B, T, 2) of two frames or more, got {describe(logits)}")
    check_valid("valid", valid, logits.shape[:2])
    if valid is not None and bool((valid.sum(1) < 2).any()):
        raise ValueError("valid leaves a sample less than two frames, which hold no moment")
    frames = logits.shape[1]
    shown = logits if valid is None else logits.masked_fill(~valid.unsqueeze(-1), float("-inf"))
    start, end = shown.log_softmax(1).unbind(-1)
    scores = start[:, :, None] + end[:, None]
    later = torch.ones(frames, frames, dtype=torch.bool, device=logits.device).triu(1)
    best = scores.masked_fill(~later, float("-inf")).flatten(1).argmax(1)
    return torch.stack([best // frames, best % frames], -1)


class Moments(NamedTuple):
    """Spans (K, Q, 2) as start and end in shares of the video, scores (K, Q, 2) of being one and of being none, and
    how much every frame belongs to what was asked, (K, T)."""

    spans: Tensor
    logits: Tensor
    saliency: Tensor


class MomentHead(nn.Module):
    """Spans of a video that a token asks for: an encoder over the token and the frames, a decoder of span queries.

    Our reading of what the paper uses CG-DETR for, without its dummy tokens and adaptive cross attention.

    Args:
        dim: width of the model.
        video_dim: width of the frames' features.
        width: of the head.
        num_heads, depth: of its layers.
        num_queries: spans that are proposed.
    """

    def __init__(
        self, dim: int, video_dim: int, width: int = 256, num_heads: int = 8, depth: int = 2, num_queries: int = 10
    ):
        super().__init__()
        check_int("dim", dim, least=1)
        check_divides("num_heads", num_heads, "width", width)
        check_divides("2", 2, "width", width)
        check_int("depth", depth, least=1)
        self.width, self.video_dim = width, check_int("video_dim", video_dim, least=1)
        self.ask, self.video = nn.Linear(dim, width), nn.Linear(video_dim, width)
        settings: dict[str, Any] = dict(dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(width, num_heads, **settings) for _ in range(depth))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(width, num_heads, **settings) for _ in range(depth))
        self.queries = nn.Parameter(torch.randn(check_int("num_queries", num_queries, least=1), width) * 0.02)
        self.span, self.label = _mlp(width, width, 2), nn.Linear(width, 2)

    def forward(self, states: Tensor) -> Tensor:
        """(K, C) -> (K, width): what is asked; :meth:`ground` finds it."""
        return self.ask(states)

    def ground(self, asked: Tensor, video: Tensor, valid: Tensor | None = None) -> Moments:
        """Spans in videos (K, T, F), one for each token; ``valid`` (K, T) frames exist."""
        check_axes("video", video, K=len(asked), T=None, F=self.video_dim)
        check_valid("valid", valid, video.shape[:2])
        if not video.shape[1] or (valid is not None and not bool(valid.any(1).all())):
            raise ValueError("video must have a frame for every token")
        k, frames = video.shape[:2]
        place = sincos(torch.arange(frames, device=video.device)[:, None], self.width).to(video.dtype)
        x = torch.cat([asked.unsqueeze(1), self.video(video) + place], 1)
        # torch takes no mask of no rows
        absent = None if valid is None or not k else F.pad(~valid, (1, 0), value=False)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=absent)
        found = self.queries.expand(k, -1, -1) + x[:, :1]
        for layer in self.decoder:
            found = layer(found, x, memory_key_padding_mask=absent)
        centre, length = self.span(found).sigmoid().unbind(-1)
        spans = torch.stack([centre - length / 2, centre + length / 2], -1)
        return Moments(spans, self.label(found), (x[:, 1:] * x[:, :1]).sum(-1) / math.sqrt(self.width))

    @staticmethod
    def loss(
        prediction: Moments, target: Sequence[Tensor], none: float = 0.1, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of Moment-DETR: ``10 |s - t| + (1 - GIoU) + 4 CE`` of matched spans, and of which frames belong.

        Args:
            target: for each token (m, 2) spans in shares of the video, start before end.
            none: weight of spans that match nothing.
            valid: (K, T).
        """
        for i, t in enumerate(target):
            check_spans(f"target[{i}]", t)
        if len(target) != len(prediction.spans):
            raise ValueError(f"target holds spans of {len(target)} tokens, prediction of {len(prediction.spans)}")
        labels = torch.ones(prediction.logits.shape[:2], dtype=torch.long, device=prediction.logits.device)
        frames = prediction.saliency.shape[1]
        middle = (torch.arange(frames, device=prediction.saliency.device) + 0.5) / frames
        near, apart, inside = [], [], []
        for i, t in enumerate(target):
            spans, t = prediction.spans[i], t.to(prediction.spans)
            inside.append(((middle >= t[:, :1]) & (middle < t[:, 1:])).any(0))
            distance = (spans[:, None] - t).abs().sum(-1)
            overlap = pair_overlaps(spans[:, None], t)[1]
            cost = 10 * distance + 1 - overlap - 4 * prediction.logits[i].softmax(-1)[:, :1]
            rows, columns = match(cost.detach())
            labels[i, rows] = 0
            near.append(distance[rows, columns] / 2)
            apart.append(1 - overlap[rows, columns])
        count = max(1, sum(len(n) for n in near))
        weight = prediction.logits.new_tensor([1.0, none])
        belongs = torch.stack(inside).to(prediction.saliency)
        exists = torch.ones_like(belongs) if valid is None else valid.to(belongs)
        saliency = F.binary_cross_entropy_with_logits(prediction.saliency, belongs, reduction="none")
        return {
            "span": 10 * torch.cat(near).sum() / count,
            "span_giou": torch.cat(apart).sum() / count,
            "span_label": 4 * F.cross_entropy(prediction.logits.flatten(0, 1), labels.flatten(), weight),
            "saliency": (saliency * exists).sum() / exists.sum().clamp(min=1),
        }


def check_spans(name: str, spans: Tensor) -> None:
    """Raise ``ValueError`` unless spans (m, 2) are shares of a video whose start lies before its end."""
    if not isinstance(spans, Tensor) or spans.dim() != 2 or spans.shape[1] != 2 or not len(spans):
        raise ValueError(f"{name} must be (m, 2) spans, one at least, got {describe(spans)}")
    wrong = ~((spans[:, 1] > spans[:, 0]) & (spans >= 0).all(1) & (spans <= 1).all(1))
    if bool(wrong.any()):
        raise ValueError(f"{name} holds {spans[wrong][0].tolist()}; spans are shares of the video, start before end")


class TaskPreference(TaskTokens):
    """The task tokens of TPO with their heads and losses.

    ::

        tpo = TaskPreference({"boxes": 32001, "tracking": 32002}, dim=4096)
        with attnlib.attach(model, use := UseTaskTokens(tpo)):
            text = model(**inputs, labels=labels).loss
            terms = tpo.losses(use.read(), {"boxes": boxes})
            loss = text + sum(terms.values())

    Args:
        tokens: ids of any of ``boxes``, ``temp``, ``tracking``, ``track_box``, and of words that announce them
            (``box_begin``, ``time_begin``, ``track_begin``), which only have rows.
        dim: width of the model.
        num_prompts, prompt_dim: see :class:`TrackHead`.
        temporal: ``"frames"``, or ``"moments"`` with ``video_dim``.
        video_dim: width of the frames' features.
        heads: heads of the caller in place of these, or for tokens of other names.
        outputs: rows of the model's head are learned as well.
        compat: of :func:`attnlib.models.multimodal.losses.box_loss`.

    >>> tpo = TaskPreference({"boxes": 5, "track_box": 6}, dim=16)
    >>> said = tpo(torch.tensor([[5, 1, 5]]), torch.randn(1, 3, 16))
    >>> sorted(tpo.losses(said, {"boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 2)}))
    ['box_giou', 'box_l1']
    """

    PLAIN = ("box_begin", "time_begin", "track_begin", "track_box")

    def __init__(
        self,
        tokens: Mapping[str, int],
        dim: int,
        num_prompts: int = 3,
        prompt_dim: int = 256,
        temporal: str = "frames",
        video_dim: int | None = None,
        heads: Mapping[str, nn.Module | None] | None = None,
        outputs: bool = False,
        compat: str | None = None,
    ):
        check_int("dim", dim, least=2)
        check_choice("temporal", temporal, TEMPORAL)
        check_choice("compat", compat, (None, "authors"))
        given = dict(heads or {})
        if temporal == "moments" and video_dim is None and "temp" in tokens and "temp" not in given:
            raise ValueError("temporal='moments' needs video_dim, the width of the frames' features")
        for name in tokens:
            if name in given:
                continue
            if name in self.PLAIN:
                given[name] = None
            elif name == "boxes":
                given[name] = _mlp(dim, dim // 2, 4)
            elif name == "tracking":
                given[name] = TrackHead(dim, num_prompts, prompt_dim)
            elif name == "temp":
                given[name] = FrameHead(dim) if temporal == "frames" else MomentHead(dim, int(video_dim or 0))
        super().__init__(tokens, dim, given, outputs=outputs)
        self.compat = compat
        self.box_encoder = nn.Sequential(nn.Linear(4, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim))

    def encode_boxes(self, boxes: Tensor) -> Tensor:
        """(K, C) features of given boxes (K, 4), corners in shares of the image, for ``track_box`` tokens."""
        check_target_boxes("boxes", boxes, "share")
        return self.box_encoder(boxes.to(self.rows.dtype))

    def losses(
        self, said: Mapping[str, Taken], target: Mapping[str, Any], video: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of the loss by name; the text loss goes beside them. Tasks that are not there add nothing.

        Args:
            said: of the tokens, in the order of samples and places.
            target: in that order, ``"boxes"`` (K, 4) corners in shares; ``"tracking"`` a :class:`Prompted` of the
                segmenter's own embeddings of the true boxes, and these; ``"temp"`` of frames (K,) 1 where a frame
                belongs, together with ``video=None``, or (B, 2) first and last frame; of moments a list of (m, 2).
            video: (K, T, F) features, for moments.

        Raises:
            ValueError: tokens without a target, and targets without a token.
        """
        known = {"boxes", "tracking", "temp"}
        if foreign := sorted(set(target) - known):
            raise ValueError(f"target names {foreign[0]!r}; possible: {sorted(known)}")
        if lonely := sorted(name for name in known & set(said) if name not in target):
            raise ValueError(f"token {lonely[0]!r} was read {len(said[lonely[0]].sample)} times, and target has none")
        terms: dict[str, Tensor] = {}
        for name, wanted in target.items():
            self.check_head(name)
            if name not in said:
                if len(wanted):
                    raise ValueError(f"target has {name!r}, and no such token was read")
                continue
            output = said[name].output
            if name == "boxes":
                terms |= box_loss(output, check_target_boxes("target", wanted, "share"), compat=self.compat)
            elif name == "tracking":
                check_axes("target of 'tracking'", wanted.prompts, K=len(output.prompts), n=None, P=None)
                check_target_boxes("target of 'tracking'", wanted.boxes, "share")
                terms["track_prompt"] = F.l1_loss(output.prompts, wanted.prompts)
                terms["track_box"] = F.l1_loss(output.boxes, wanted.boxes)
            elif isinstance(self.heads["temp"], MomentHead):
                if video is None:
                    raise ValueError("moments are found in video=(K, T, F), which was not given")
                head = self.heads["temp"]
                found = head.loss(head.ground(output, video), wanted)
                terms |= {f"temp_{n}": 0.05 * t for n, t in found.items()}
            else:
                terms |= self._frame_terms(said[name], wanted)
        return terms

    @staticmethod
    def _frame_terms(said: Taken, wanted: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the first and last frame (B, 2) of every sample that has such tokens."""
        rows = said.sample.unique()
        check_axes("target of 'temp'", wanted, B=len(rows), ends=2)
        ends = []
        for row, (first, last) in zip(rows.tolist(), wanted.tolist(), strict=True):
            scores = said.output[said.sample == row]
            if not 0 <= first < last < len(scores):
                raise ValueError(
                    f"target of 'temp' holds ({first}, {last}) for a sample of {len(scores)} frames; the first lies "
                    "before the last"
                )
            place = torch.tensor([first, last], device=scores.device)
            ends.append(F.cross_entropy(scores[:, :2].T, place))
        return {"temp_ends": torch.stack(ends).mean()}

    def stage(self, name: str, adapters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Parameters that learn in a stage; all others of these are frozen.

        Args:
            name: ``"assign"``: the model's adapters and the rows of tokens, with the text loss alone; ``"heads"``:
                rows, heads and the encoder of boxes; ``"joint"``: all, with every loss.
            adapters: what learns in the model, such as the parameters of LoRA.
        """
        check_choice("name", name, STAGES)
        rows = [self.rows, *([] if self.out_rows is None else [self.out_rows])]
        heads = [*self.heads.parameters(), *self.box_encoder.parameters()]
        held = list(adapters)
        learns = {"assign": [*held, *rows], "heads": [*rows, *heads], "joint": [*held, *rows, *heads]}[name]
        chosen = {id(p) for p in learns}
        for p in (*held, *rows, *heads):
            p.requires_grad_(id(p) in chosen)
        return learns

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], tokens: Sequence[str]) -> dict[str, Tensor]:
        """From the heads of ``MultiModalLLM_PT`` (``temporal="frames"``), the rest of it left to who loads it.

        Args:
            state_dict: ``loc_encoder.*``, ``loc_decoder.*``, ``track_embed.*``, ``track_embed_decode2.*``,
                ``temporal_embed.*``, ``action_embed.*``, ``box_token``, ``track_token``, ``temporal_token``.
            tokens: the names of our tokens, in order; rows of those that theirs has no parameter for are zero.
        """
        theirs = Released(state_dict, "MultiModalLLM_PT's heads")
        rows = {"boxes": "box_token", "tracking": "track_token", "temp": "temporal_token"}
        taken = {ours: theirs.take(name).flatten() for ours, name in rows.items()}
        like = taken["boxes"]
        out = {"rows": torch.stack([taken.get(name, torch.zeros_like(like)) for name in tokens])}
        out |= theirs.renamed(
            {
                r"loc_encoder\.(\d)\.(weight|bias)": r"box_encoder.\1.\2",
                r"loc_decoder\.(\d)\.(weight|bias)": r"heads.boxes.\1.\2",
                r"track_embed\.layers\.0\.(weight|bias)": r"heads.tracking.prompt.0.\1",
                r"track_embed\.layers\.1\.(weight|bias)": r"heads.tracking.prompt.2.\1",
                r"track_embed_decode2\.layers\.0\.(weight|bias)": r"heads.tracking.box.0.\1",
                r"track_embed_decode2\.layers\.1\.(weight|bias)": r"heads.tracking.box.2.\1",
                r"temporal_embed\.layers\.0\.(weight|bias)": r"heads.temp.ends.0.\1",
                r"temporal_embed\.layers\.1\.(weight|bias)": r"heads.temp.ends.3.\1",
                r"action_embed\.layers\.0\.(weight|bias)": r"heads.temp.action.0.\1",
                r"action_embed\.layers\.1\.(weight|bias)": r"heads.temp.action.3.\1",
            }
        )
        return theirs.close(out)
