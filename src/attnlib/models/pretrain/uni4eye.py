"""Uni4Eye: one masked autoencoder for pictures and volumes, which predicts what was hidden and its edges.

A picture is cut into squares by a 2-D kernel, a volume into cubes by a 3-D one; everything behind these stems is
shared. A quarter of the tokens is seen; one decoder predicts the pixels of the hidden ones, another the magnitude of
their gradients (Sobel): ``MSE(pixels) + weight * MSE(gradients)``, both over hidden patches. Fine-tuned, the encoder
alone classifies (:class:`EyeClassifier`).

Reference: Cai et al., 2022, "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image Modeling
Transformer for Ophthalmic Image Classification", arXiv 2203.04614. Its code is not public. The stems, the encoder and
the decoder of pixels are held to that of its successor (Davidczy/Uni4Eye_pp); the gradients are our reading: whether a
volume's are those of its slices (``gradient``), their weight, and two decoders. In the successor positions of volumes
are zeros (``compat="authors"``) and a token of a volume predicts three slices of a square; here it predicts its cube.

Of the successor there are, too, a head that mixes what is predicted for all places, by weights made of these places and
of which task a picture is from (``tasks``), and masks that hide what holds much (``masking="entropy"``,
:func:`patch_entropy`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_choice,
    check_divides,
    check_float,
    check_int,
    check_real,
    check_type,
    check_whole,
    check_within,
    describe,
)
from ...nn.released import Released
from ...types import stats_dtype
from ..protocol import Step, TaskModel, Terms, trained
from .decoder import AsymmetricDecoder, TokenEncoder, init_like_mae
from .masks import check_mask, random_mask, take, visible_first
from .patches import fixed_positions, from_patches, padded, patch_error, patch_sides, stretched, to_patches

GRADIENTS = ("volume", "slices", None)


def sobel(x: Tensor, slices: bool = False) -> Tensor:
    """The magnitude of the gradient of every channel, by Sobel's kernels; zero where a picture is constant.

    Args:
        x: (B, C, H, W) or (B, C, H, W, D); edges are continued.
        slices: of a volume, the gradient within its slices (H, W) alone.

    >>> sobel(torch.ones(1, 1, 4, 4)).abs().max().item()
    0.0
    """
    rank = x.dim() - 2
    if rank not in (2, 3):
        raise ValueError(f"x must be (B, C, H, W) or (B, C, H, W, D), got {describe(x)}")
    check_float("x", x)
    axes = range(2 if slices else rank)
    total = torch.zeros_like(x)
    for axis in axes:
        found = x
        for other in axes:  # a difference along the axis, a smooth 1, 2, 1 along the others
            before, after = _moved(found, other, -1), _moved(found, other, 1)
            found = after - before if other == axis else before + 2 * found + after
        total = total + found.square()
    some = total != 0  # what is not a number stays none
    return torch.where(some, torch.where(some, total, 1.0).sqrt(), 0.0)


def _moved(x: Tensor, axis: int, by: int) -> Tensor:
    """(B, C, *grid): the neighbour of every place along an axis; at the end the place itself."""
    at = axis + 2
    places = (torch.arange(x.shape[at], device=x.device) + by).clamp(0, x.shape[at] - 1)
    return x.index_select(at, places)


def patch_entropy(x: Tensor, size: int, span: tuple[float, float] | None = None, bins: int = 256) -> Tensor:
    """(B, N) entropy in bits of the values of every patch, the mean over channels.

    Args:
        x: (B, C, H, W) or (B, C, H, W, D).
        size: side of patches.
        span: from which to which value bins reach; values beyond it do not count. By default each sample's own.
        bins: how many, all equally wide; the last one holds its end, too.

    Raises:
        ValueError: a span that is empty.

    >>> patch_entropy(torch.tensor([[[[0.0, 1.0, 2.0, 2.0], [2.0, 3.0, 2.0, 2.0]]]]), 2, bins=4).tolist()
    [[2.0, 0.0]]
    """
    _check_input("x", x, x.shape[1] if isinstance(x, Tensor) and x.dim() > 1 else 1)
    check_int("bins", bins, least=1)
    rows = to_patches(x, size).unflatten(-1, (-1, x.shape[1])).mT  # (B, N, C, P)
    rows = rows.to(stats_dtype(rows.dtype))
    if span is None:
        flat = x.flatten(1).to(rows.dtype)
        low, high = (t.view(-1, 1, 1, 1) for t in (flat.amin(1), flat.amax(1)))
        high = torch.where(high > low, high, low + 1)
    else:
        if not span[0] < span[1]:
            raise ValueError(f"span must go from a value to a larger one, got {span}")
        low, high = rows.new_tensor(span[0]), rows.new_tensor(span[1])
    at = ((rows - low) / (high - low) * bins).floor()
    inside = (rows >= low) & (rows <= high)
    at = at.clamp(0, bins - 1).long()
    counts = torch.zeros(*rows.shape[:3], bins, dtype=rows.dtype, device=rows.device)
    counts = counts.scatter_add(-1, at, inside.to(rows.dtype))
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1).mean(-1) / math.log(2)


class Seen(NamedTuple):
    """What the encoder says.

    Args:
        tokens: (B, 1 + V, C), the class token first.
        grid: of the patches, two or three sides.
    """

    tokens: Tensor
    grid: tuple[int, ...]


class UnifiedEncoder(nn.Module):
    """A ViT with a stem for pictures and one for volumes.

    Args:
        img_size: side of pictures, of the table of positions.
        volume_size: (H, W, D) of volumes; the side, the side, and half of it by default.
        patch_size: side of squares and cubes.
        in_chans: channels of both.
        dim, depth, num_heads, mlp_ratio: of the blocks.
        compat: ``"authors"``: positions of volumes are zeros.
    """

    def __init__(
        self, img_size: int = 224, volume_size: Sequence[int] | None = None, patch_size: int = 16, in_chans: int = 3,
        dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0, compat: str | None = None,
    ):  # fmt: skip
        super().__init__()
        check_choice("compat", compat, (None, "authors"))
        self.patch_size = check_int("patch_size", patch_size, least=1)
        self.in_chans, self.dim = check_int("in_chans", in_chans, least=1), check_int("dim", dim, least=1)
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", dim)
        side = check_int("img_size", img_size, least=1)
        sides = patch_sides("volume_size", (side, side, max(side // 2, 1)) if volume_size is None else volume_size, 3)
        self.grids = {
            2: (-(-side // patch_size),) * 2,
            3: tuple(-(-n // patch_size) for n in sides),
        }
        self.stem2 = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.stem3 = nn.Conv3d(in_chans, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(dim))
        self.body = TokenEncoder(dim, depth, num_heads, mlp_ratio)
        self.compat = compat
        fixed_table(self, 3)  # refuses widths that are too small for three axes

    def forward(self, x: Tensor, mask: Tensor | None = None, hidden: int = 0) -> Seen:
        """Tokens of pictures (B, C, H, W) or volumes (B, C, H, W, D), with ``mask`` of those that are not hidden."""
        rank = x.dim() - 2
        x = (self.stem2 if rank == 2 else self.stem3)(padded(x, (self.patch_size,) * rank))
        grid = tuple(x.shape[2:])
        x = x.flatten(2).mT
        x = x + _table(self, grid, x)
        if mask is not None:
            x = take(x, visible_first(mask)[:, : mask.shape[1] - hidden])
        first = self.cls_token.to(x.dtype).expand(len(x), 1, -1)
        return Seen(self.body(torch.cat([first, x], 1))[-1], grid)

    @torch.no_grad()
    def inflate(self) -> None:
        """Start the stem of volumes from that of pictures: where a volume is constant in depth, it sees a slice."""
        self.stem3.weight.copy_(self.stem2.weight.unsqueeze(-1).expand_as(self.stem3.weight) / self.patch_size)
        self.stem3.bias.copy_(self.stem2.bias)  # type: ignore[union-attr, arg-type]


def fixed_table(module: Any, rank: int) -> Tensor:
    """(N, dim) positions of a part on a grid of so many axes; zeros of volumes by ``compat="authors"``."""
    grid: tuple[int, ...] = module.grids[rank]
    zeros = module.compat == "authors" and rank == 3
    return torch.zeros(math.prod(grid), module.dim) if zeros else fixed_positions(grid, module.dim)


def _table(module: Any, grid: tuple[int, ...], like: Tensor) -> Tensor:
    return stretched(fixed_table(module, len(grid)).to(like), module.grids[len(grid)], grid)


class PatchDecoder(AsymmetricDecoder):
    """A decoder of all places of a picture or a volume, with a map to pixels for each.

    Args:
        encoder: whose tokens it reads.
        dim, depth, num_heads, mlp_ratio: of the blocks.
        compat: as of the encoder; with ``tasks``, blocks read what is above 0 only, too.
        tasks: how many, for :meth:`mixed`.
    """

    def __init__(
        self, encoder: UnifiedEncoder, dim: int, depth: int, num_heads: int, mlp_ratio: float, compat: str | None,
        tasks: int | None = None,
    ):  # fmt: skip
        super().__init__(encoder.dim, dim, depth, num_heads, mlp_ratio)
        self.grids = encoder.grids
        self.head2 = nn.Linear(dim, encoder.patch_size**2 * encoder.in_chans)
        self.head3 = nn.Linear(dim, encoder.patch_size**3 * encoder.in_chans)
        self.compat, self.tasks = compat, tasks
        fixed_table(self, 3)  # refuses widths that are too small for three axes
        if tasks is not None:
            total = math.prod(self.grids[2])
            self.controller = nn.Linear(1 + total + check_int("tasks", tasks, least=1), total * (total + 1))

    def patches(self, seen: Seen, mask: Tensor) -> Tensor:
        """(B, N, P C) of every patch."""
        x = self._places(seen, mask)
        return self._pixels(x.relu() if self.tasks is not None and self.compat else x, len(seen.grid))

    def mixed(self, seen: Seen, mask: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """The patches, and ``W patches + b`` over all places, of weights that places and the task make.

        ``[W, b] = A [mean relu(x), one_hot(task)] + a`` with the mean over channels of every place.

        Args:
            seen: of the encoder.
            mask: (B, N) boolean.
            task: (B,) numbers of tasks.
        """
        total = math.prod(self.grids[2])
        if math.prod(seen.grid) != total:
            raise ValueError(f"x of {math.prod(seen.grid)} patches does not fit tasks, which are for {total} patches")
        x = self._places(seen, mask)
        above = x.relu()
        which = F.one_hot(task, self.tasks or 1).to(x.dtype)
        weights = self.controller(torch.cat([above.mean(-1), which], 1))
        found = self._pixels(above if self.compat else x, len(seen.grid))
        return found, torch.baddbmm(
            weights[:, total**2 :, None], weights[:, : total**2].unflatten(1, (total, -1)), found
        )

    def _places(self, seen: Seen, mask: Tensor) -> Tensor:
        x = self.placed(seen.tokens, mask, prefix=1)
        return x + F.pad(_table(self, seen.grid, x), (0, 0, 1, 0))  # the class token has none

    def _pixels(self, x: Tensor, rank: int) -> Tensor:
        return (self.head2 if rank == 2 else self.head3)(self(x)[-1][:, 1:])


class Reconstructed(NamedTuple):
    """What is said of a picture or a volume that was mostly hidden.

    Args:
        patches: (B, N, P C), pixels of every patch.
        gradients: the same of magnitudes, or ``None`` without that decoder.
        mask: (B, N) boolean, True for those that were hidden.
        mixed: (B, N, P C), patches as the task mixes them, which the loss judges; ``None`` without a task.
    """

    patches: Tensor
    gradients: Tensor | None
    mask: Tensor
    mixed: Tensor | None = None


class Uni4Eye(TaskModel):
    """Masked pretraining of one encoder by pictures and volumes.

    Args:
        img_size, volume_size, patch_size, in_chans, dim, depth, num_heads, mlp_ratio: of :class:`UnifiedEncoder`.
        decoder_dim, decoder_depth, decoder_heads: of each decoder.
        mask_ratio: share of patches that are hidden; ``int(N (1 - mask_ratio))`` are seen.
        gradient: ``"volume"``: magnitudes along all axes; ``"slices"``: within the slices of volumes; ``None``: no
            second decoder. (unsure)
        gradient_weight: of its error. (unsure) Sobel's sums are 8 times a slope in pictures, 32 times in volumes.
        norm_targets: pixels of a patch are standardized before they are compared.
        compat: ``"authors"``: positions of volumes are zeros, as in the successor's release, and with ``tasks`` its
            decoder reads what is above 0 only.
        tasks: how many tasks pictures are from (7 in the successor): given one, patches are mixed for it. For as many
            patches as a picture of ``img_size`` has.
        masking: ``"random"``, or ``"entropy"``: hidden are the patches whose random number times their entropy,
            brought to [0, 1] in every sample, is highest.
        entropy_span: of :func:`patch_entropy`; (0, 256) in the successor.

    Shape:
        x: (B, in_chans, H, W) or (B, in_chans, H, W, D), of any size. Returns :class:`Reconstructed`.

    >>> small = dict(dim=12, depth=1, num_heads=2, decoder_dim=12, decoder_depth=1, decoder_heads=2)
    >>> model = Uni4Eye(16, patch_size=4, in_chans=1, **small)
    >>> model(torch.randn(2, 1, 16, 16)).patches.shape, model(torch.randn(2, 1, 16, 16, 8)).patches.shape
    (torch.Size([2, 16, 16]), torch.Size([2, 32, 64]))
    """

    def __init__(
        self, img_size: int = 224, volume_size: Sequence[int] | None = None, patch_size: int = 16, in_chans: int = 3,
        dim: int = 768, depth: int = 12, num_heads: int = 12, decoder_dim: int = 512, decoder_depth: int = 8,
        decoder_heads: int = 16, mlp_ratio: float = 4.0, mask_ratio: float = 0.75, gradient: str | None = "volume",
        gradient_weight: float = 1.0, norm_targets: bool = False, compat: str | None = None, tasks: int | None = None,
        masking: str = "random", entropy_span: tuple[float, float] | None = None,
    ):  # fmt: skip
        super().__init__()
        check_choice("masking", masking, ("random", "entropy"))
        self.masking, self.entropy_span, self.tasks = masking, entropy_span, tasks
        check_choice("gradient", gradient, GRADIENTS)
        self.gradient, self.norm_targets = gradient, norm_targets
        self.mask_ratio = check_real("mask_ratio", mask_ratio, above=0, below=1)
        self.gradient_weight = check_real("gradient_weight", gradient_weight, least=0)
        self.encoder = UnifiedEncoder(
            img_size, volume_size, patch_size, in_chans, dim, depth, num_heads, mlp_ratio, compat
        )
        more = (decoder_dim, decoder_depth, decoder_heads, mlp_ratio, compat)
        self.decoder = PatchDecoder(self.encoder, *more, tasks)
        self.edges = None if gradient is None else PatchDecoder(self.encoder, *more)
        init_like_mae(self)
        if tasks is not None:
            self.decoder.controller.reset_parameters()

    def grid_of(self, x: Tensor) -> tuple[int, ...]:
        """Patches along every axis."""
        return tuple(-(-n // self.encoder.patch_size) for n in x.shape[2:])

    def hidden_of(self, x: Tensor) -> int:
        """How many patches are hidden by default."""
        total = math.prod(self.grid_of(x))
        return total - int(total * (1 - self.mask_ratio))

    def draw_mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, N) boolean, True for hidden."""
        device = x.device if generator is None else generator.device
        total = math.prod(self.grid_of(x))
        if self.masking == "entropy":
            held = patch_entropy(x.detach(), self.encoder.patch_size, self.entropy_span)
            held = held - held.amin(1, keepdim=True)
            most = held.amax(1, keepdim=True)
            held = torch.where(most > 0, held / torch.where(most > 0, most, 1), 1.0)  # all alike: at random
            noise = torch.rand(held.shape, generator=generator, device=device, dtype=held.dtype).to(x.device) * held
            return noise.argsort(1).argsort(1) >= total - self.hidden_of(x)
        return random_mask(len(x), total, self.hidden_of(x), generator=generator, device=device).to(x.device)

    def forward(self, x: Tensor, mask: Tensor | None = None, task: Tensor | None = None) -> Reconstructed:
        """Reconstruct pictures or volumes.

        Args:
            x: (B, in_chans, H, W) or (B, in_chans, H, W, D).
            mask: (B, N) or (B, *patches) boolean, True for hidden, equally many of every sample; drawn by default.
            task: (B,) number of the task of every sample, for a model with ``tasks``.

        Raises:
            ValueError: other channels or axes, a mask that hides nothing or everything.
        """
        _check_input("x", x, self.encoder.in_chans)
        if mask is None:
            mask = self.draw_mask(x)
        mask, hidden = check_mask(mask, len(x), self.grid_of(x), self.hidden_of(x))
        seen = self.encoder(x, mask, hidden)
        edges = None if self.edges is None else self.edges.patches(seen, mask)
        if task is None:
            return Reconstructed(self.decoder.patches(seen, mask), edges, mask)
        if self.tasks is None:
            raise ValueError("task is given, but the model was built without tasks")
        check_whole("task", task)
        if task.shape != x.shape[:1]:
            raise ValueError(f"task must be ({len(x)},) numbers of tasks, got {describe(task)}")
        check_within("task", task, self.tasks, "task")
        patches, mixed = self.decoder.mixed(seen, mask, task)
        return Reconstructed(patches, edges, mask, mixed)

    def loss(self, prediction: Reconstructed, target: Tensor) -> Terms:
        """``pixels`` and ``gradients`` of hidden patches.

        Args:
            prediction: of :meth:`forward`.
            target: what was given to it.
        """
        _check_input("target", target, self.encoder.in_chans)
        size = self.encoder.patch_size
        told = prediction.patches if prediction.mixed is None else prediction.mixed
        terms = {"pixels": patch_error(told, target, prediction.mask, size, self.norm_targets)}
        if prediction.gradients is not None:
            slopes = sobel(target.detach(), self.gradient == "slices")
            terms["gradients"] = self.gradient_weight * patch_error(prediction.gradients, slopes, prediction.mask, size)
        return terms

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """One step per kind: ``"pictures"`` (B, C, H, W), then ``"volumes"`` (B, C, H, W, D), whichever a batch has.

        A batch with a ``"target"`` is trained as usual.
        """
        check_type("batch", batch, Mapping, "a mapping with pictures, volumes or both")
        if "target" in batch:
            yield from super().steps(batch)
            return
        unknown = sorted(set(batch) - {"pictures", "volumes"})
        if unknown or not batch:
            raise ValueError(f"batch must hold pictures, volumes or both, or x and a target; got {sorted(batch)}")
        params = trained(self)
        for kind, rank in (("pictures", 4), ("volumes", 5)):
            x = batch.get(kind)
            if x is None:
                continue
            if not isinstance(x, Tensor) or x.dim() != rank:
                raise ValueError(f"{kind} of the batch must have {rank} axes, got {describe(x)}")

            def terms(x: Tensor = x, kind: str = kind) -> Terms:
                return {f"{name} of {kind}": term for name, term in self.loss(self(x), x).items()}

            yield Step("all", params, terms)

    def predict(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``x`` with its hidden patches as they are predicted (standardized ones, with ``norm_targets``)."""
        found, size = self(x, mask), self.encoder.patch_size
        rows = to_patches(x, size)
        rows = torch.where(found.mask.unsqueeze(-1), found.patches.to(rows.dtype), rows)
        return from_patches(rows, x.shape[2:], size)


def _check_input(name: str, x: Any, channels: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(x)}")
    if x.dim() not in (4, 5) or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(f"{name} must be (B, {channels}, H, W) or (B, {channels}, H, W, D), got {describe(x)}")
    check_float(name, x)


class EyeClassifier(TaskModel):
    """Classes of pictures and volumes, by the encoder of a :class:`Uni4Eye`.

    Args:
        model: whose encoder is copied.
        num_classes: classes.
        pool: the class ``"token"`` or the mean of the patches (``"avg"``).

    Shape:
        x: (B, in_chans, H, W) or (B, in_chans, H, W, D) -> (B, num_classes).
    """

    def __init__(self, model: Uni4Eye, num_classes: int, pool: str = "token"):
        super().__init__()
        check_type("model", model, Uni4Eye, "a Uni4Eye")
        check_choice("pool", pool, ("token", "avg"))
        self.encoder, self.pool = copy.deepcopy(model.encoder), pool
        self.num_classes = check_int("num_classes", num_classes, least=1)
        self.head = nn.Linear(self.encoder.dim, num_classes).to(self.encoder.cls_token)

    def forward(self, x: Tensor) -> Tensor:
        _check_input("x", x, self.encoder.in_chans)
        tokens = self.encoder(x).tokens
        return self.head(tokens[:, 0] if self.pool == "token" else tokens[:, 1:].mean(1))

    def loss(self, prediction: Tensor, target: Tensor) -> Terms:
        """``class``: cross entropy with (B,) classes."""
        check_whole("target", target)
        if target.shape != prediction.shape[:1] or not len(target):
            raise ValueError(f"target must be ({len(prediction)},) classes of at least one, got {describe(target)}")
        check_within("target", target, self.num_classes, "class")
        return {"class": F.cross_entropy(prediction, target)}


def convert(state_dict: Any, model: Uni4Eye | None = None) -> dict[str, Tensor]:
    """From the successor's ``MaskedAutoencoderViT_partial23D``, ``_partial`` or ``_partial_imgen``.

    For a :class:`Uni4Eye` with ``gradient=None``. Its tables are fixed and are computed here; a map that never runs is
    left out, and its head for tasks where ``model`` has none. Its prediction of volumes fits where ``3 patch_size^2 ==
    in_chans patch_size^3``, and is refused elsewhere by its shape. The latter two classes know no volumes: what reads
    and predicts them stays as ``model`` has it.
    """
    theirs = Released(state_dict, "the authors' MaskedAutoencoderViT_partial23D")
    theirs.leave(r"(decoder_)?pos_embed[23]?", "fixed tables, which are computed")
    theirs.leave(r"mlp\..*", "a map that never runs")
    if model is None or model.tasks is None:
        theirs.leave(r"controller\..*", "the successor's head for tasks")
    flat = "patch_embed.proj.weight" in theirs
    if flat and model is None:
        raise ValueError("state_dict knows pictures only; give the model whose parts for volumes are to stay")
    out = theirs.renamed(
        {
            r"patch_embed\.proj([23])\.(.*)": r"encoder.stem\1.\2",
            r"patch_embed\.proj\.(.*)": r"encoder.stem2.\1",
            r"cls_token": lambda match, value: {"encoder.cls_token": value.flatten()},
            r"(blocks|norm)\.(.*)": r"encoder.body.\1.\2",
            r"mask_token": lambda match, value: {"decoder.mask_token": value.flatten()},
            r"decoder_(embed|blocks|norm)\.(.*)": r"decoder.\1.\2",
            r"decoder_pred([23])\.(.*)": r"decoder.head\1.\2",
            r"decoder_pred\.(.*)": r"decoder.head2.\1",
            r"controller\.weight": lambda match, value: {"decoder.controller.weight": value.flatten(1)},
            r"controller\.bias": "decoder.controller.bias",
        }
    )
    if flat and model is not None:
        own = model.state_dict()
        out |= {k: v for k, v in own.items() if k.startswith(("encoder.stem3.", "decoder.head3."))}
    return theirs.close(out)
