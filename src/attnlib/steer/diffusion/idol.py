"""IDOL: one denoiser makes a video and its depth, each looking at the other.

Video and depth, drawn as a picture in colours, are rows of one batch with one set of weights; a label added to the time
embedding says which is which. At the end of each stage of the U-Net both streams of a frame attend jointly,

    ``X = [x_v; x_d],    Z = X + W_o MHA(LN X)``,

and two losses tie them: the same motion of features, ``L_mo = mean |M^v - M^d|^2`` with ``M_f = softmax_q(cos(x_f(p),
x_{f+1}(q)) / T)``, and the same cross-attention maps, ``L_xa = mean |A^v - A^d|^2``.

The release holds no code, so that this is our reading: where the joint attention stands (behind a stage, after its
downsampler), its start (``W_o = 0``, the plain denoiser), the softmax of the motion field and its temperature, and the
weights of the losses are arguments.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_named, check_real, shaped, to_list
from ...hooks.denoiser import CallSite
from ...hooks.intervention import Intervention
from ...hooks.pipelines import denoiser_of, is_pipeline
from .residual import ResidualAttention

#: The streams, in the order of the rows and of the labels.
MODALITIES = ("video", "depth")


@shaped(features="float (B, F, C, h, w)")
def motion_field(features: Tensor, temperature: float = 0.1) -> Tensor:
    """Where each place of a frame is found in the next: a softmax over its places, of cosines.

    Args:
        features: of F frames.
        temperature: T.

    Returns:
        (B, F - 1, h w, h w), in float32 at least. It is large: take features of low resolution.

    >>> x = torch.eye(4).view(1, 1, 4, 2, 2)
    >>> motion_field(torch.cat([x, x], 1), temperature=0.01)[0, 0].argmax(-1).tolist()
    [0, 1, 2, 3]
    """
    check_real("temperature", temperature, above=0)
    if features.shape[1] < 2:
        raise ValueError(f"features must be of at least two frames, got shape {tuple(features.shape)}")
    wide = features if features.dtype == torch.float64 else features.float()
    unit = F.normalize(wide.flatten(-2), dim=2)
    return (unit[:, :-1].transpose(-1, -2) @ unit[:, 1:] / temperature).softmax(-1)


@shaped(video="float (B, F, C, h, w)", depth="float (B, F, D, h, w)")
def motion_consistency(video: Tensor, depth: Tensor, temperature: float = 0.1) -> Tensor:
    """``L_mo``: how far the motion of the features of both streams is apart; 0 for the same motion.

    >>> x = torch.randn(1, 3, 8, 2, 2)
    >>> motion_consistency(x, 2 * x).item() < 1e-12
    True
    """
    return (motion_field(video, temperature) - motion_field(depth, temperature)).square().mean()


def map_consistency(video: Sequence[Tensor], depth: Sequence[Tensor]) -> Tensor:
    """``L_xa``: how far cross-attention maps of both streams are apart, the mean over layers.

    Args:
        video, depth: of each layer maps of one shape, as :class:`attnlib.hooks.Maps` gives them, rows of one stream.

    >>> map_consistency([torch.ones(1, 2)], [torch.zeros(1, 2)]).item()
    1.0
    """
    for name, maps in (("video", video), ("depth", depth)):
        if isinstance(maps, Tensor) or not all(isinstance(one, Tensor) for one in maps):
            raise TypeError(f"{name} must be a sequence of maps, one of each layer, got {maps!r:.60}; write [maps]")
    if not video or len(video) != len(depth):
        raise ValueError(f"video and depth must be maps of the same layers, got {len(video)} and {len(depth)}")
    terms = []
    for number, (a, b) in enumerate(zip(video, depth, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"layer {number}: maps of video {tuple(a.shape)} and of depth {tuple(b.shape)} differ")
        terms.append((a - b).square().mean())
    return torch.stack(terms).mean()


class JointBlock(ResidualAttention):
    """``X + W_o MHA(LN X)`` over the tokens of both streams of a frame.

    Args:
        dim: width of the tokens.
        num_heads: heads.
    """

    def forward(self, video: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(n, C, h, w) twice -> the same."""
        grid = video.shape[-2:]
        x = torch.cat([video.flatten(2), depth.flatten(2)], 2).transpose(1, 2)
        a, b = (x + super().forward(x)).transpose(1, 2).chunk(2, 2)
        return a.unflatten(2, grid), b.unflatten(2, grid)


class JointModalities(Intervention, nn.Module):
    """A denoiser's rows are a video and its depth, and each stage lets them look at each other.

    Of every guidance group the first half of the rows is video, the second depth: ``pipe([prompt, prompt])`` makes one
    of each. A U-Net with ``num_class_embeds=2`` is told the label as its class; for another one a label is learned here
    and added to its time embedding, zero at first.

    Args:
        blocks: from the name of a stage (``"down_blocks.0"``, ``"mid_block"``) to its :class:`JointBlock`.
        label: (2, width of the time embedding) of a model without classes; ``None`` for one with two.
        scale: strength of the joint attention; 0 leaves two runs of the plain denoiser.
        keep: name patterns of the stages whose features :meth:`take` gives, for the loss.

    Raises:
        ValueError: a batch that is not made of pairs, a model of other classes.

    Reference: Zhai et al., 2024, arXiv 2407.10937; our reading.
    """

    name: ClassVar[str] = "idol"

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        label: Tensor | None = None,
        scale: float = 1.0,
        keep: Sequence[str] = (),
    ):
        nn.Module.__init__(self)
        check_named("blocks", blocks, JointBlock, "no stage of the denoiser would let its streams look at each other")
        self.stages = tuple(blocks)
        self.blocks = nn.ModuleList(blocks.values())
        self.label = None if label is None else nn.Parameter(label)
        self.scale = check_real("scale", scale)
        self.keep = tuple(to_list("keep", keep) or ())
        self.acts_on = self.stages
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._labels: Tensor | None = None
        self._batch = 0

    @classmethod
    def of(cls, model: Any, num_heads: int = 8, stages: Sequence[str] = ("*",), **settings: Any) -> JointModalities:
        """For the stages of a U-Net (or of a pipeline's) whose names fit a pattern.

        Raises:
            ValueError: a model that is no U-Net, or of other classes than two; no stage fits.
        """
        if is_pipeline(model):
            model = denoiser_of(model)[0]
        widths = getattr(getattr(model, "config", None), "block_out_channels", None)
        if widths is None or not hasattr(model, "down_blocks"):
            raise ValueError(f"{type(model).__name__} has no stages down_blocks, mid_block and up_blocks")
        check_int("num_heads", num_heads, least=1)
        every = {f"down_blocks.{i}": width for i, width in enumerate(widths)}
        every |= {"mid_block": widths[-1]} if getattr(model, "mid_block", None) is not None else {}
        every |= {f"up_blocks.{i}": width for i, width in enumerate(reversed(widths))}
        chosen = {n: w for n, w in every.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in stages)}
        if not chosen:
            raise ValueError(f"stages {list(stages)} fit none of {list(every)}")
        classes = getattr(model.config, "num_class_embeds", None)
        if classes not in (None, 2) or (classes is None and getattr(model, "class_embedding", None) is not None):
            raise ValueError(f"{type(model).__name__} has classes of its own (num_class_embeds={classes}), not the two")
        like = next(model.parameters())
        label = None if classes == 2 else torch.zeros(2, model.time_embedding.linear_2.out_features)
        made = cls({name: JointBlock(width, num_heads) for name, width in chosen.items()}, label, **settings)
        return made.to(like.device, like.dtype)

    # ---- rows

    def labels(self, rows: Sequence[str] | None, batch: int) -> Tensor:
        """(B,) 0 for rows of the video and 1 for rows of its depth."""
        groups = [len(list(same)) for _, same in groupby(rows or [""] * batch)]
        if any(group % 2 for group in groups):
            raise ValueError(
                f"a batch of {batch} rows ({groups} of a kind) is no video and its depth; call the pipeline with two "
                "prompts, or an even number"
            )
        return torch.cat([torch.arange(2).repeat_interleave(group // 2) for group in groups])

    def _of(self, count: int) -> Tensor:
        """(count,) labels of the run that is going on, which may be of some rows or tiles only; frames folded in."""
        rows = self.session.row_names
        batch = self._batch if rows is None else len(rows)
        if not batch or count % batch:
            raise ValueError(f"{count} rows do not belong to a batch of {batch}")
        return self.labels(rows, batch).repeat_interleave(count // batch)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (n, ...) of the last call as those of the video and those of its depth, frames folded in or not."""
        if self._labels is None:
            raise RuntimeError("the denoiser did not run yet, so that rows of video and depth are not known")
        if len(rows) % len(self._labels):
            raise ValueError(f"{len(rows)} rows do not belong to a batch of {len(self._labels)}")
        return _parted(rows, self._labels.repeat_interleave(len(rows) // len(self._labels)))

    def take(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Features (n, C, h, w) of both streams behind the stages that ``keep`` names; forgotten here."""
        kept, self._kept = self._kept, {}
        return kept

    # ---- acting

    def conflicts(self, other: Intervention) -> str | None:
        if other.differentiates:
            return f"{type(other).__name__} runs some pictures by themselves, and a video is joined with its depth here"
        return None

    def on_attach(self, session: Any) -> None:
        if self.label is None:
            return
        embedding = getattr(session.model, "time_embedding", None)
        if embedding is None:
            raise ValueError(f"{type(session.model).__name__} has no time_embedding that a label could be added to")

        def add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            assert self.label is not None
            return out + self.label.to(out)[self._of(len(out)).to(out.device)]

        session.hook(embedding.register_forward_hook(add))

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        main = inputs[site.main]
        self._batch, self._kept = len(main), {}
        self._labels = self.labels(site.rows, len(main))
        if self.label is None:
            inputs = {**inputs, "class_labels": self._labels.to(main.device)}
        return call(inputs)

    def around_module(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        result = call(inputs)
        out = result if isinstance(result, Tensor) else result[0]
        new = self._joined(site, out)
        if any(fnmatch.fnmatchcase(site.name, pattern) for pattern in self.keep):
            self._kept[site.name] = _parted(new, self._of(len(new)))
        if new is out:
            return result
        if isinstance(result, Tensor):
            return new
        # What a stage hands on beside its output is, at the end, the same map.
        beside = tuple(tuple(new if t is out else t for t in one) if isinstance(one, (tuple, list)) else one
                       for one in result[1:])  # fmt: skip
        return (new, *beside)

    def _joined(self, site: CallSite, out: Tensor) -> Tensor:
        if not self.scale:
            return out
        block = self.blocks[self.stages.index(site.name)]
        labels = self._of(len(out)).to(out.device)
        parts = _parted(out, labels)
        new = torch.empty_like(out)
        for number, (before, after) in enumerate(zip(parts, block(*parts), strict=True)):
            new = new.index_copy(0, (labels == number).nonzero().flatten(), before + self.scale * (after - before))
        return new


def _parted(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    labels = labels.to(rows.device)
    return rows[labels == 0], rows[labels == 1]


def dual_modal_loss(
    prediction: Tensor,
    target: Tensor,
    joint: JointModalities,
    maps: Sequence[Tensor] = (),
    frames: int = 1,
    motion: float = 0.1,
    cross: float = 0.1,
    temperature: float = 0.1,
) -> dict[str, Tensor]:
    """The loss of a training step, term by term; their sum is what is minimised.

    Args:
        prediction, target: (B, ...) noise (or velocity), rows of both streams.
        joint: attached to the denoiser, with ``keep`` naming the stages of the motion loss.
        maps: of each layer (B, T, h, w) or (B F, T, h, w), as :class:`attnlib.hooks.Maps` gives them.
        frames: F where the rows of features are frames, folded into the batch.
        motion, cross: weights of ``L_mo`` and ``L_xa``. The paper's are not known to us; these are ours.
        temperature: of the motion field.

    Returns:
        ``video``, ``depth``, and where asked for ``motion`` and ``cross``, weighted.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    check_int("frames", frames, least=1)
    check_real("motion", motion, least=0)
    check_real("cross", cross, least=0)
    errors = [F.mse_loss(a, b) for a, b in zip(joint.split(prediction), joint.split(target), strict=True)]
    terms = dict(zip(MODALITIES, errors, strict=True))
    kept = joint.take()
    if motion:
        if not kept or frames < 2:
            raise ValueError("the motion loss needs features of several frames: frames=..., JointModalities(keep=...)")
        fields = [
            motion_consistency(video.unflatten(0, (-1, frames)), depth.unflatten(0, (-1, frames)), temperature)
            for video, depth in kept.values()
        ]
        terms["motion"] = motion * torch.stack(fields).mean()
    if cross:
        if not maps:
            raise ValueError("the loss of cross-attention maps needs maps; give cross=0 to leave it out")
        pairs = [joint.split(m) for m in maps]
        terms["cross"] = cross * map_consistency([v for v, _ in pairs], [d for _, d in pairs])
    return terms


#: Corners of the colours in which depth is drawn, from far to near.
HEAT = ((0.0, 0.0, 0.5), (0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.5, 0.0, 0.0))


@shaped(depth="float (..., h, w)")
def depth_to_heat(depth: Tensor) -> Tensor:
    """Depth in [0, 1] as colours (..., 3, h, w) in [0, 1] along a path of straight lines, blue to red.

    >>> depth_to_heat(torch.tensor([[0.0, 0.4, 1.0]]))[:, 0].T.tolist()
    [[0.0, 0.0, 0.5], [0.0, 1.0, 1.0], [0.5, 0.0, 0.0]]
    """
    low, high = float(depth.min()), float(depth.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {low:.3g} to {high:.3g}")
    corners = depth.new_tensor(HEAT)
    at = depth * (len(HEAT) - 1)
    below = at.floor().clamp(max=len(HEAT) - 2).long()
    part = (at - below).unsqueeze(-1)
    return torch.lerp(corners[below], corners[below + 1], part).movedim(-1, -3)


@shaped(colours="float (..., 3, h, w)")
def heat_to_depth(colours: Tensor) -> Tensor:
    """The depth (..., h, w) whose colour is nearest, so that pictures that a denoiser made are read, too.

    >>> depth = torch.linspace(0, 1, 7)[None]
    >>> torch.allclose(heat_to_depth(depth_to_heat(depth)), depth, atol=1e-6)
    True
    """
    point = colours.movedim(-3, -1).unsqueeze(-2)
    corners = colours.new_tensor(HEAT)
    start, line = corners[:-1], corners[1:] - corners[:-1]
    part = (((point - start) * line).sum(-1) / line.square().sum(-1)).clamp(0, 1)
    apart = (start + part.unsqueeze(-1) * line - point).square().sum(-1)
    best = apart.argmin(-1, keepdim=True)
    return ((best + part.gather(-1, best)) / len(line)).squeeze(-1)
