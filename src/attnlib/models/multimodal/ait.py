"""AiT: depth, boxes and masks written as tokens by one solver, and rendered by frozen VQ-VAEs.

Ning et al., 2023, arXiv 2301.02229. ``backbone`` makes the features, :class:`attnlib.models.multimodal.soft_tokens.
Solver` the tokens, :class:`attnlib.models.multimodal.vqvae.VQVAE` depth maps and masks of them.

- depth: codes of the depth map, row by row; loss: cross-entropy + ``SiLog(D(softmax(z) e), depth)``, whose gradient
  reaches the solver through the frozen decoder D.
- objects: per object ``x1 y1 x2 y2 class mask...`` (or the mask before the class), objects in any order, filled up with
  noise whose class is "noise" and whose box and mask cost nothing; loss: cross-entropy, masks weighted by 0.2, and 5 x
  (Dice + squared error) of the rendered mask.
- boxes: the same without masks.

:func:`released_ait` makes the nine released configurations, Swin V2 among them (:func:`swin_v2`).

Differs from the authors' code: the auxiliary loss of masks takes batches of any size, theirs one image; training with
the mask before the class works, theirs returns no loss; masks are cropped with 4 samples a cell, theirs with a number
that depends on the box; a box without an area has an empty mask, theirs fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_flag, check_int, check_real, check_type, check_within, readable
from ...nn.released import Released
from ...types import stats_dtype
from ..backbones.swinv2 import convert as convert_swin
from ..backbones.swinv2 import swinv2
from ..detect.plain_detr import LastMap
from ..detect.regions import roi_align
from ..losses import dice_scores, silog_loss
from ..protocol import answering
from .soft_tokens import TASKS, Solver, Vocabulary
from .vqvae import VQVAE

#: Targets that cost nothing.
IGNORE = -100


def silog(prediction: Tensor, target: Tensor, lambd: float = 0.5, least: float = 1e-3) -> Tensor:
    """``sqrt(mean d^2 - lambd mean(d)^2)`` of log differences ``d`` where the target is above zero.

    Zero, with a zero gradient, where no pixel has a target or prediction and target agree everywhere.

    >>> silog(torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 1.0), lambd=1.0).item()
    0.0
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    check_real("lambd", lambd, least=0, most=1)
    held = target > 0
    if readable(held) and not bool(held.any()):
        return prediction.sum().to(stats_dtype(prediction.dtype)) * 0
    return silog_loss(prediction.clamp(min=least), target, held, focus=lambd)


def dice(prediction: Tensor, target: Tensor) -> Tensor:
    """``1 - (2 sum pt + 1) / (sum p + sum t + 1)`` per row of (N, ...), averaged; predictions are cut to 0..1."""
    return (1 - dice_scores(prediction.clamp(0, 1), target, squared=False)).mean()


class ObjectTokens:
    """Objects as tokens and back.

    Args:
        vocabulary: which tokens there are.
        mask_tokens: of one object; 0 for boxes only.
        norm_val: pixels that ``num_bins`` places stand for.
        mask_first: the mask stands before the class.

    >>> rule = ObjectTokens(Vocabulary(100, 3, 4, 4), mask_tokens=0, norm_val=50)
    >>> tokens = rule.pack(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([2]))
    >>> tokens.tolist(), rule.unpack(tokens)[0].tolist()
    ([[2, 4, 6, 8, 103]], [[1.0, 2.0, 3.0, 4.0]])
    """

    def __init__(self, vocabulary: Vocabulary, mask_tokens: int, norm_val: float, mask_first: bool = False):
        self.vocabulary = vocabulary
        self.mask_tokens = check_int("mask_tokens", mask_tokens, least=0)
        self.norm_val = check_real("norm_val", norm_val, above=0)
        self.mask_first = check_flag("mask_first", mask_first)
        mask = ["mask"] * mask_tokens
        self.plan = ["box"] * 4 + (mask + ["class"] if mask_first else ["class", *mask])
        self.label = self.plan.index("class")
        self.mask = slice(4, 4 + mask_tokens) if mask_first else slice(5, 5 + mask_tokens)

    def pack(self, boxes: Tensor, labels: Tensor, masks: Tensor | None = None) -> Tensor:
        """Boxes (n, 4) in pixels, labels (n,) and codes of masks (n, mask_tokens) -> tokens (n, L).

        A label of ``num_classes`` is noise.
        """
        check_axes("boxes", boxes, n=None, corners=4)
        v = self.vocabulary
        check_axes("labels", labels, n=len(boxes))
        check_within("labels", labels, v.num_classes + 1, "class")
        places = (boxes / self.norm_val * v.num_bins).round().long().clamp(0, v.num_bins)
        token = torch.where(labels == v.num_classes, v.noise, labels + v.ranges["class"].start)
        out = places.new_zeros(len(boxes), len(self.plan))
        out[:, :4], out[:, self.label] = places, token
        if self.mask_tokens:
            check_axes("masks", masks, n=len(boxes), mask_tokens=self.mask_tokens)
            assert masks is not None
            check_within("masks", masks, v.mask_codes, "code")
            out[:, self.mask] = masks + v.ranges["mask"].start
        return out

    def unpack(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (..., L) -> boxes (..., 4) in pixels, labels (...), codes of masks (..., mask_tokens)."""
        v = self.vocabulary
        boxes = tokens[..., :4] * self.norm_val / v.num_bins
        codes = tokens[..., self.mask] - v.ranges["mask"].start
        return boxes, tokens[..., self.label] - v.ranges["class"].start, codes

    def targets(self, tokens: Tensor, real: Tensor) -> Tensor:
        """What is learned of tokens (..., L): boxes and masks of objects that are ``real`` (...), classes of all."""
        out = tokens.masked_fill(~real.unsqueeze(-1), IGNORE)
        out[..., self.label] = tokens[..., self.label]
        return out

    def corrupt(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens (..., L) whose classes are random, or noise with one half: what is fed in training."""
        v, shape = self.vocabulary, tokens.shape[:-1]
        wrong = torch.randint(v.num_classes, shape, generator=generator) + v.ranges["class"].start
        noise = torch.rand(shape, generator=generator) >= 0.5
        out = tokens.clone()
        out[..., self.label] = wrong.masked_fill(noise, v.noise).to(tokens.device)
        return out


def noise_boxes(
    boxes: Tensor, size: Sequence[int], count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Boxes of what is no object: some jittered duplicates, the rest random or moved elsewhere.

    Args:
        boxes: (n, 4) of the objects.
        size: (height, width) of the image.
        count: of boxes.
        generator: of the draws, on the CPU.

    Returns:
        (count, 4) boxes inside the image, and (count,) the object each duplicates, -1 for none.
    """
    check_axes("boxes", boxes, n=None, corners=4)
    check_int("count", count, least=0)
    n = len(boxes)
    full = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=boxes.dtype)

    def normal(*shape: int) -> Tensor:
        held = torch.empty(*shape, dtype=boxes.dtype)
        return nn.init.trunc_normal_(held, generator=generator)

    own = boxes.detach().cpu()
    copies = int(torch.randint(count + 1, (), generator=generator)) if n and count else 0
    bad = count - copies
    half = normal(bad, 2).abs() / 4
    at = uniform(bad, 2)
    random = torch.cat([at - half, at + half], 1) * full
    if n:
        tiled = torch.arange(n).repeat(count // n + 1)
        moved = own[tiled[torch.randperm(len(tiled), generator=generator)[:bad]]]
        half, at = (moved[:, 2:] - moved[:, :2]) / 2, uniform(len(moved), 2) * full[:2]
        random = torch.cat([random, torch.cat([at - half, at + half], 1)])
        random = random[torch.randperm(len(random), generator=generator)[:bad]]
        of = tiled[torch.randperm(len(tiled), generator=generator)[:copies]]
        sides = (own[of, 2:] - own[of, :2]).repeat(1, 2)
        near = own[of] + sides * normal(len(of), 4) / 2 * 0.1
    else:
        of, near = torch.zeros(0, dtype=torch.long), own
    made = torch.cat([random, near]).clamp(min=0).minimum(full)
    from_ = torch.cat([torch.full((bad,), -1), of])
    order = torch.randperm(count, generator=generator)
    return made[order].to(boxes), from_[order].to(boxes.device)


def crop_masks(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Masks (n, H, W) inside boxes (n, 4) -> (n, size, size) of zeros and ones."""
    check_axes("masks", masks, n=len(boxes), H=None, W=None)
    rois = torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes), boxes], 1)
    return (roi_align(masks[:, None].to(boxes.dtype), rois, size)[:, 0] >= 0.5).to(boxes.dtype)


def paste_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (n, h, w) of boxes (n, 4) in an image of ``size`` (height, width): (n, height, width) booleans."""
    check_axes("masks", masks, n=len(boxes), h=None, w=None)
    out = torch.zeros(len(boxes), *size, dtype=torch.bool, device=masks.device)
    rows, cols = (torch.arange(s, device=masks.device, dtype=torch.float32) + 0.5 for s in size)
    for i, (x1, y1, x2, y2) in enumerate(boxes.float()):
        if x2 <= x1 or y2 <= y1:
            continue
        at = torch.stack(torch.meshgrid((cols - x1) / (x2 - x1), (rows - y1) / (y2 - y1), indexing="xy"), -1) * 2 - 1
        drawn = F.grid_sample(masks[i, None, None].float(), at[None], align_corners=False)
        out[i] = drawn[0, 0] >= 0.5
    return out


class AiT(nn.Module):
    """Depth, boxes and masks of images.

    Args:
        backbone: images (B, 3, H, W) -> a map (B, C, h, w), or several of which the last is taken.
        solver: of features with C channels.
        depth_vae, mask_vae: trained; they are frozen here, and stay in evaluation.
        mask_size: side of a mask that ``mask_vae`` reads.
        norm_val: pixels of a box that all places stand for.
        mask_first: the mask of an object stands before its class.
        soft: codes are read softly by the decoders.
        soft_feed: and fed back softly while a sequence is written.
        silog_weight, mask_weight, render_weight: of the losses.

    ``loss`` returns terms whose sum is the authors' loss over the number of tokens that count.
    """

    depth_vae: VQVAE | None
    mask_vae: VQVAE | None

    def __init__(
        self, backbone: nn.Module, solver: Solver, depth_vae: VQVAE | None = None, mask_vae: VQVAE | None = None,
        mask_size: int = 64, norm_val: float = 640, mask_first: bool = False, soft: bool = True, soft_feed: bool = True,
        silog_weight: float = 1.0, mask_weight: float = 0.2, render_weight: float = 5.0,
    ):  # fmt: skip
        super().__init__()
        check_type("solver", solver, Solver)
        vocabulary = solver.vocabulary
        for name, vae in (("depth", depth_vae), ("mask", mask_vae)):
            if vae is None:
                continue
            check_type(f"{name}_vae", vae, VQVAE)
            if vae.quantizer.num_codes != len(vocabulary.ranges[name]):
                raise ValueError(
                    f"{name}_vae has {vae.quantizer.num_codes} codes, but the vocabulary of the solver keeps "
                    f"{len(vocabulary.ranges[name])} tokens for them ({name}_codes)"
                )
            vae.requires_grad_(False)
        self.backbone, self.solver, self.depth_vae, self.mask_vae = backbone, solver, depth_vae, mask_vae
        self.soft, self.soft_feed = check_flag("soft", soft), check_flag("soft_feed", soft_feed)
        self.silog_weight = check_real("silog_weight", silog_weight, least=0)
        self.mask_weight = check_real("mask_weight", mask_weight, least=0)
        self.render_weight = check_real("render_weight", render_weight, least=0)
        self.mask_size = check_int("mask_size", mask_size, least=1)
        side = 0 if mask_vae is None else mask_size // mask_vae.ratio
        if mask_vae is not None and side * mask_vae.ratio != mask_size:
            raise ValueError(f"mask_size={mask_size} must be a multiple of the ratio of mask_vae, {mask_vae.ratio}")
        self.objects = ObjectTokens(vocabulary, side * side, norm_val, mask_first)
        self.boxes = ObjectTokens(vocabulary, 0, norm_val)
        self.side = side
        self.train(self.training)

    def train(self, mode: bool = True) -> AiT:
        super().train(mode)
        for vae in (self.depth_vae, self.mask_vae):
            if vae is not None:
                vae.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C)."""
        maps: Any = self.backbone(images)
        last = maps if isinstance(maps, Tensor) else maps[-1]
        check_axes("the map of backbone", last, B=len(images), C=self.solver.in_dim, h=None, w=None)
        return last.permute(0, 2, 3, 1)

    def forward(self, images: Tensor, task: str, tokens: Tensor) -> Tensor:
        """Logits (B, T + 1, V) of images (B, 3, H, W) behind true tokens (B, T)."""
        return self.solver(self.features(images), task, tokens)

    def _vae(self, name: str) -> VQVAE:
        vae: VQVAE | None = getattr(self, f"{name}_vae")
        if vae is None:
            raise ValueError(f"this AiT has no {name}_vae, which {name} maps are rendered by")
        return vae

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``AiT`` with its Swin V2, for what :func:`released_ait` makes."""
        theirs = Released(state_dict, "the authors' AiT")
        theirs.leave(r"\w+_head\.(?:transformer\..+|loss_seq\.weight)", because="the same weights again, and settings")
        out = theirs.parts(r"backbone\.(.+)", "backbone.model", _swin_state)
        out |= theirs.parts(r"transformer\.(.+)", "solver", Solver.convert_state_dict)
        for name, vae in (("depth", "depth_vae"), ("insseg", "mask_vae")):
            out |= theirs.parts(rf"{name}_head\.vqvae\.(.+)", vae, VQVAE.convert_state_dict)
        return theirs.close(out)

    # ---- depth

    def depth_tokens(self, depth: Tensor) -> Tensor:
        """(B, H, W) -> (B, N) tokens of the vocabulary."""
        check_axes("depth", depth, B=None, H=None, W=None)
        codes = self._vae("depth").encode(depth.unsqueeze(-1))
        return codes.flatten(1) + self.solver.vocabulary.ranges["depth"].start

    def depth_loss(self, logits: Tensor, depth: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """``tokens`` and ``silog`` of logits (B, N, V) and the depth (B, H, W); zero depth costs nothing."""
        tokens = self.depth_tokens(depth) if tokens is None else tokens
        losses = {"tokens": F.cross_entropy(logits.flatten(0, 1), tokens.flatten())}
        if self.silog_weight:
            vae = self._vae("depth")
            grid = (depth.shape[1] // vae.ratio, depth.shape[2] // vae.ratio)
            own = self.solver.vocabulary.own("depth", logits).unflatten(1, grid)
            losses["silog"] = self.silog_weight * silog(vae.decode_soft(own)[..., 0], depth)
        return losses

    def _depth(self, images: Tensor, size: Sequence[int], **options: Any) -> Tensor:
        vae = self._vae("depth")
        if any(s % vae.ratio or s < vae.ratio for s in size):
            raise ValueError(f"size must be of multiples of {vae.ratio}, the ratio of depth_vae, got {tuple(size)}")
        grid = (size[0] // vae.ratio, size[1] // vae.ratio)
        soft = ("depth",) if self.soft_feed else ()
        plan = ["depth"] * (grid[0] * grid[1])
        written = self.solver.write(self.features(images), "depth", plan, soft, **options)
        if self.soft:
            return vae.decode_soft(written.logits["depth"].unflatten(1, grid))[..., 0]
        codes = written.tokens - self.solver.vocabulary.ranges["depth"].start
        return vae.decode(codes.unflatten(1, grid))[..., 0]

    # ---- objects

    def mask_codes(self, masks: Tensor) -> Tensor:
        """Cropped masks (n, mask_size, mask_size) -> (n, mask tokens)."""
        return self._vae("mask").encode(masks.unsqueeze(-1)).flatten(1)

    def sequences(
        self, task: str, targets: Sequence[dict[str, Tensor]], size: Sequence[int], count: int = 100,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Sequences of ``count`` objects: those of each image in random order, then noise.

        Args:
            task: ``"boxes"`` or ``"objects"``.
            targets: per image ``boxes`` (n, 4) in pixels, ``labels`` (n,), and ``masks`` (n, H, W) for objects.
            size: (height, width) of the images.
            count: of objects; ``ValueError`` where an image has more.
            generator: of the draws, on the CPU.

        Returns:
            (B, count * L) what is fed, whose classes are wrong on purpose; (B, count * L) what is to come out; and
            (sum n, mask_size, mask_size) cropped masks of the true objects.
        """
        rule = self._rule(task)
        check_int("count", count, least=1)
        fed, wanted, crops = [], [], []
        for i, target in enumerate(targets):
            for name in ("boxes", "labels", *(["masks"] if rule.mask_tokens else [])):
                if name not in target:
                    raise ValueError(f"targets[{i}] has no {name!r}; it has {sorted(target)}")
            n = len(target["boxes"])
            if n > count:
                raise ValueError(f"targets[{i}] holds {n} objects, but a sequence has count={count}")
            order = torch.randperm(n, generator=generator).to(target["boxes"].device)
            boxes, labels = target["boxes"][order], target["labels"][order]
            extra, of = noise_boxes(boxes, size, count - n, generator)
            all_boxes = torch.cat([boxes, extra])
            all_labels = torch.cat([labels, labels.new_full((len(extra),), self.solver.vocabulary.num_classes)])
            codes = None
            if rule.mask_tokens:
                masks = target["masks"][order]
                own = crop_masks(masks, boxes, self.mask_size)
                others = own.new_zeros(len(extra), self.mask_size, self.mask_size)
                if bool((of >= 0).any()):
                    others[of >= 0] = crop_masks(masks[of[of >= 0]], extra[of >= 0], self.mask_size)
                codes = self.mask_codes(torch.cat([own, others]))
                crops.append(own)
            tokens = rule.pack(all_boxes, all_labels, codes)
            real = torch.arange(count, device=tokens.device) < n
            fed.append(rule.corrupt(tokens, generator).flatten())
            wanted.append(rule.targets(tokens, real).flatten())
        cut = torch.cat(crops) if crops else torch.zeros(0, self.mask_size, self.mask_size)
        return torch.stack(fed), torch.stack(wanted), cut

    def object_loss(
        self, logits: Tensor, wanted: Tensor, crops: Tensor | None = None, task: str = "objects", most: int = 100
    ) -> dict[str, Tensor]:
        """``tokens`` and, where masks are given, ``render``.

        Args:
            logits: (B, count * L, V).
            wanted: (B, count * L) tokens, :data:`IGNORE` where nothing is to be learned.
            crops: (n, mask_size, mask_size) masks of the objects whose masks are to be learned, in their order.
            task: ``"boxes"`` or ``"objects"``.
            most: masks that are rendered.
        """
        rule, v = self._rule(task), self.solver.vocabulary
        held = (wanted != IGNORE).sum().clamp(min=1)
        weight = logits.new_ones(len(v))
        span = v.ranges["mask"]
        weight[span.start : span.stop] = self.mask_weight
        total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, reduction="sum", ignore_index=IGNORE)
        losses = {"tokens": total / held}
        if crops is None or not rule.mask_tokens or not self.render_weight:
            return losses
        length = len(rule.plan)
        asked = wanted.unflatten(1, (-1, length))[..., rule.mask] != IGNORE
        own = v.own("mask", logits.unflatten(1, (-1, length))[..., rule.mask, :])[asked[..., 0]]
        if len(own) != len(crops):
            raise ValueError(f"crops must hold the masks of {len(own)} objects, got {len(crops)}")
        if not len(own):
            losses["render"] = logits.sum() * 0
            return losses
        drawn = self._vae("mask").decode_soft(own[:most].unflatten(1, (self.side, self.side)))[..., 0]
        apart = dice(drawn, crops[:most].to(drawn)) + F.mse_loss(drawn, crops[:most].to(drawn))
        losses["render"] = self.render_weight * self.mask_weight * apart * asked.sum() / held
        return losses

    def _rule(self, task: str) -> ObjectTokens:
        check_choice("task", task, ("boxes", "objects"))
        if task == "objects":
            self._vae("mask")
        return self.objects if task == "objects" else self.boxes

    def loss(
        self, images: Tensor, task: str, target: Any, count: int = 100, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Terms of one task.

        Args:
            images: (B, 3, H, W).
            task: ``"depth"`` with ``target`` (B, H, W), zero where unknown; ``"boxes"`` or ``"objects"`` with the list
                of :meth:`sequences`.
            count, generator: of :meth:`sequences`.
        """
        check_choice("task", task, TASKS)
        if task == "depth":
            tokens = self.depth_tokens(target)
            return self.depth_loss(self(images, task, tokens[:, :-1]), target, tokens)
        fed, wanted, crops = self.sequences(task, target, images.shape[-2:], count, generator)
        return self.object_loss(self(images, task, fed[:, :-1]), wanted, crops if task == "objects" else None, task)

    # ---- answers

    @answering
    def predict(
        self, images: Tensor, task: str, size: Sequence[int] | None = None, count: int = 100, top_p: float = 0.0,
        flip: bool = False, windows: int = 1, generator: torch.Generator | None = None,
    ) -> Any:  # fmt: skip
        """The answer to a task.

        Args:
            images: (B, 3, H, W).
            task: ``"depth"`` gives (B, *size) maps; ``"boxes"`` and ``"objects"`` a list of ``boxes``, ``labels``,
                ``scores`` and ``masks`` per image, all ``count`` of them.
            size: (height, width) of the answer; that of the images by default.
            count: of objects.
            top_p, generator: of :meth:`attnlib.models.multimodal.soft_tokens.Solver.write`.
            flip: depth is the mean with that of the mirrored images.
            windows: squares side by side that a wide image is read in, depth averaged where they overlap.
        """
        check_choice("task", task, TASKS)
        check_int("windows", windows, least=1)
        size = tuple(images.shape[-2:]) if size is None else tuple(size)
        options: dict[str, Any] = dict(top_p=top_p, generator=generator)
        if task == "depth":
            return self._depth_views(images, size, flip, windows, options)
        rule = self._rule(task)
        soft = ("mask",) if self.soft_feed else ()
        written = self.solver.write(self.features(images), task, rule.plan * count, soft, **options)
        out = []
        for i in range(len(images)):
            boxes, labels, codes = rule.unpack(written.tokens[i].unflatten(0, (count, -1)))
            found = {"boxes": boxes, "labels": labels, "scores": written.scores[i]}
            if rule.mask_tokens:
                if self.soft:
                    own = written.logits["mask"][i].unflatten(0, (count, self.side, self.side))
                    drawn = self._vae("mask").decode_soft(own)
                else:
                    drawn = self._vae("mask").decode(codes.unflatten(1, (self.side, self.side)))
                found["masks"] = paste_masks(drawn[..., 0], boxes, size)
            out.append(found)
        return out

    def _depth_views(
        self, images: Tensor, size: Sequence[int], flip: bool, windows: int, options: dict[str, Any]
    ) -> Tensor:
        batch, _, height, width = images.shape
        if windows == 1:
            views, starts = images, [0]
        else:
            if width < height or tuple(size) != (height, width):
                raise ValueError(
                    f"windows={windows} are squares side by side: images must be at least as wide as high, and size "
                    f"theirs; got {height} x {width} and size={tuple(size)}"
                )
            step = (width - height) // (windows - 1)
            if step > height:
                raise ValueError(
                    f"windows={windows} leave columns of {height} x {width} unread; {-(-width // height)} do not"
                )
            starts = [i * step for i in range(windows)]
            views = torch.cat([images[..., s : s + height] for s in starts])
        own = tuple(size) if windows == 1 else (height, height)
        depth = self._depth(torch.cat([views, views.flip(-1)]) if flip else views, own, **options)
        if flip:
            straight, mirrored = depth.chunk(2)
            depth = (straight + mirrored.flip(-1)) / 2
        if windows == 1:
            return depth
        total, times = depth.new_zeros(batch, height, width), depth.new_zeros(width)
        for s, part in zip(starts, depth.split(batch), strict=True):
            total[..., s : s + height] += part
            times[s : s + height] += 1
        return total / times.clamp(min=1)


# ---- the released configurations


def swin_v2(
    embed_dim: int = 128, depths: Sequence[int] = (2, 2, 18, 2), num_heads: Sequence[int] = (4, 8, 16, 32),
    window_size: Sequence[int] = (30, 30, 30, 15), pretrained_windows: Sequence[int] = (12, 12, 12, 6),
    shifts: bool | Sequence[bool] = True, drop_path_rate: float = 0.3,
) -> LastMap:  # fmt: skip
    """The authors' Swin V2 as a backbone: the normed map of the last stage.

    Windows are filled up with zeros that take part and are moved wherever a block moves them; norms start at ones and
    the rest as torch's layers do, which is how the authors' class starts without its weights.

    Args:
        embed_dim, depths, num_heads, window_size, pretrained_windows, shifts, drop_path_rate: of
            :func:`attnlib.models.backbones.swinv2.swinv2`.

    >>> swin_v2(8, (1, 1), (1, 2), (4, 2), (3, 3))(torch.randn(1, 3, 32, 32))[0].shape
    torch.Size([1, 16, 4, 4])
    """
    model = swinv2(
        embed_dim, depths, num_heads, tuple(window_size), tuple(pretrained_windows), shifts, keep_shift=True,
        global_blocks=((),) * len(depths), eps=1e-6, pad="zeros", clip_windows=False, length_eps=5e-5, num_classes=0,
        img_size=640, drop_path_rate=drop_path_rate,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.reset_parameters()
    return LastMap(model)


def _swin_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stages = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("layers."))
    return convert_swin(dict(state_dict), stages)


@dataclasses.dataclass(frozen=True)
class _Config:
    """Of one released file."""

    large: bool = False
    depth: bool = False
    masks: bool = False
    soft: bool = True
    soft_feed: bool = True
    parallel: bool = False
    tau: float = 1.0
    render: bool = True
    silog: bool = True


_DEPTH: dict[str, Any] = dict(depth=True, tau=0.8)
_PARALLEL: dict[str, Any] = dict(depth=True, tau=0.8, parallel=True, soft_feed=False)
CONFIGS: dict[str, _Config] = {
    "swinv2b_480reso_depthonly": _Config(**_DEPTH),
    "swinv2b_480reso_depthonly_wosoft": _Config(depth=True, soft=False, soft_feed=False, silog=False),
    "swinv2b_480reso_parallel_depthonly": _Config(**_PARALLEL),
    "swinv2b_640reso_detonly": _Config(soft=False, soft_feed=False),
    "swinv2b_640reso_inssegonly": _Config(masks=True),
    "swinv2b_640reso_inssegonly_wosoft": _Config(masks=True, soft=False, soft_feed=False, render=False),
    "swinv2b_640reso_joint": _Config(depth=True, masks=True),
    "swinv2l_480reso_depthonly": _Config(large=True, **_DEPTH),
    "swinv2l_480reso_parallel_depthonly": _Config(large=True, **_PARALLEL),
}


def released_ait(
    name: str, backbone: nn.Module | None = None, vocabulary: Vocabulary | None = None,
    solver: Mapping[str, Any] | None = None, depth_vae: Mapping[str, Any] | None = None,
    mask_vae: Mapping[str, Any] | None = None, **settings: Any,
) -> AiT:  # fmt: skip
    """An :class:`AiT` as one of the released configuration files makes it.

    Args:
        name: of the file, such as ``"swinv2b_480reso_depthonly"``.
        backbone: in place of its Swin V2, :func:`swin_v2`.
        vocabulary: in place of its own.
        solver, depth_vae, mask_vae: settings of the :class:`~attnlib.models.multimodal.soft_tokens.Solver` and of the
            :class:`~attnlib.models.multimodal.vqvae.VQVAE` s beside those of the file.
        settings: of :class:`AiT` beside those of the file.

    >>> with torch.device("meta"):
    ...     model = released_ait("swinv2b_480reso_depthonly")
    >>> sum(p.numel() for p in model.parameters())
    109251084
    """
    check_choice("name", name, CONFIGS)
    config = CONFIGS[name]
    alone = config.depth and not config.masks
    if backbone is None:
        size: dict[str, Any] = dict(embed_dim=192, num_heads=(6, 12, 24, 48)) if config.large else {}
        if alone:
            size |= dict(shifts=(True, True, False, False), drop_path_rate=0.1)
        backbone = swin_v2(**size)
    words = Vocabulary(other_codes=0 if alone else 128) if vocabulary is None else vocabulary
    grid = (15, 15) if alone else (20, 20)
    made = Solver(
        **{
            **dict(in_dim=1536 if config.large else 1024, vocabulary=words, grid=grid, parallel=config.parallel),
            **dict(solver or {}),
        }
    )
    vaes: dict[str, Any] = {}
    if config.depth:
        kind = dict(num_codes=words.depth_codes, tau=config.tau, ratio=32, ignore_zero=True)
        vaes["depth_vae"] = VQVAE(**{**kind, **dict(depth_vae or {})})
    if config.masks:
        vaes["mask_vae"] = VQVAE(
            **{**dict(num_codes=words.mask_codes, ratio=16, normalize=True), **dict(mask_vae or {})}
        )
    own: dict[str, Any] = dict(
        soft=config.soft,
        soft_feed=config.soft_feed,
        silog_weight=float(config.silog),
        render_weight=5.0 * config.render,
    )
    return AiT(backbone, made, **vaes, **{**own, **settings})
