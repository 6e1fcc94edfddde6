"""Masked pretraining of backbones: hide patches behind a mask token, predict what a frozen teacher says of them.

EVA (Fang et al., 2022, arXiv 2211.07636): with m_p = 1 for hidden patches, the blocks read ``x_p (1 - m_p) + e m_p``
with a learned token ``e``, and

    loss = - mean_{p: m_p = 1} cos(W h_p, t_p),

where ``h_p`` is what stands behind the last norm, ``W`` a linear map and ``t_p`` the teacher's feature of the patch. No
tokenizer, no decoder; patches that are seen add nothing to the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, describe
from ..backbones.stages import Backbone

Loss = Callable[[Tensor, Tensor], Tensor]


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """``- mean cos(prediction, target)`` over (M, D), in float32 at least: -1 where they agree up to a scale."""
    high = torch.promote_types(prediction.dtype, torch.float32)
    return -F.cosine_similarity(prediction.to(high), target.to(high), dim=-1).mean()


class Predicted(NamedTuple):
    """What a step of pretraining gives.

    Args:
        loss: over the hidden patches.
        prediction: (M, D), of every hidden patch, sample by sample, row by row.
        target: (M, D), what the teacher says of it.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor


class MaskedPretraining(nn.Module):
    """A backbone, a mask token and a linear map, trained to predict a frozen teacher's features of hidden patches.

    Any :class:`attnlib.models.backbones.stages.Backbone` serves: the mask token takes the place of what its stem gives
    for hidden patches. Where the stem's map is finer than the last one, a hidden patch of the last map hides all that
    lie in it; a stem of overlapping patches sees pixels of hidden patches at their borders.

    The teacher is no part of this module: it is not in the state dict, gets no gradient, and is called in evaluation.

    Args:
        student: what is trained; all its parameters but the head's get gradients.
        teacher: another backbone, whose last map, normed, is the target; or what gives (B, N, D) or (B, h, w, D) for
            images, with one feature for every patch of the student's last map.
        target_dim: D.
        norm: a LayerNorm before the linear map; where the student has no norm behind its blocks by default.
        loss: ``"cosine"`` or ``"mse"``, or a function of prediction and target (M, D) to a number.
        std: of the initial mask token and linear map.

    Raises:
        TypeError: a student that is no backbone, a teacher that cannot be called.
        ValueError: another ``loss``; in the call, a teacher whose patches are not the student's, features of another
            width, a mask of another grid, or one that hides nothing.
    """

    def __init__(
        self,
        student: Backbone,
        teacher: nn.Module | Callable[[Tensor], Tensor],
        target_dim: int,
        norm: bool | None = None,
        loss: str | Loss = "cosine",
        std: float = 0.02,
    ):
        super().__init__()
        if not isinstance(student, Backbone):
            raise TypeError(f"student must be a backbone, as create_model() gives it, got {describe(student)}")
        if not callable(teacher):
            raise TypeError(f"teacher must be a model or a function of images, got {describe(teacher)}")
        if isinstance(loss, str):
            check_choice("loss", loss, ("cosine", "mse"))
            loss = cosine_loss if loss == "cosine" else F.mse_loss
        check_real("std", std, above=0)
        self.target_dim = check_int("target_dim", target_dim, least=1)
        self.student, self.loss = student, loss
        object.__setattr__(self, "teacher", teacher)  # a child module would be trained and saved with the student
        dim = student.num_features
        norm = isinstance(student.norm, nn.Identity) if norm is None else norm
        self.mask_token = nn.Parameter(torch.empty(_stem_width(student)))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.predict = nn.Linear(dim, target_dim)
        nn.init.trunc_normal_(self.mask_token, std=std)
        nn.init.trunc_normal_(self.predict.weight, std=std)
        nn.init.zeros_(self.predict.bias)

    def targets(self, images: Tensor) -> Tensor:
        """(B, N, D) or (B, h, w, D): what the teacher says of every patch, without gradient."""
        teacher: Any = self.teacher
        training = [m for m in teacher.modules() if m.training] if isinstance(teacher, nn.Module) else []
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                found = last_map(teacher, images) if isinstance(teacher, Backbone) else teacher(images)
        finally:
            for module in training:
                module.training = True
        if not isinstance(found, Tensor) or found.dim() not in (3, 4) or found.shape[0] != images.shape[0]:
            raise ValueError(
                f"teacher must give (B, N, D) or (B, h, w, D) for {len(images)} images, got {describe(found)}"
            )
        if found.shape[-1] != self.target_dim:
            raise ValueError(f"teacher gives features of width {found.shape[-1]}, but target_dim={self.target_dim}")
        return found

    def features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C): the student's last map, normed, with the patches in ``mask`` (B, h, w) hidden."""
        if mask is None:
            return self.norm(last_map(self.student, images))

        def hide(module: nn.Module, given: Any, out: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            x, valid = out
            fine = mask
            for axis in (1, 2):
                cells = -(-x.shape[axis] // mask.shape[axis])
                fine = fine.repeat_interleave(cells, axis).narrow(axis, 0, x.shape[axis])
            return torch.where(fine[..., None], self.mask_token.to(x.dtype), x), valid

        handle = self.student.stem.register_forward_hook(hide)
        try:
            return self.norm(last_map(self.student, images))
        finally:
            handle.remove()

    def forward(self, images: Tensor, mask: Tensor, teacher_images: Tensor | None = None) -> Predicted:
        """One step: the loss of a batch.

        Args:
            images: (B, in_chans, H, W).
            mask: (B, h, w) or (B, h * w) boolean, which patches of the student's last map are hidden.
            teacher_images: what the teacher sees of the same crops; ``images`` by default.
        """
        info: Any = self.student.feature_info[-1]
        count, size = images.shape[0], info["reduction"]
        grid = tuple(-(-side // size) for side in images.shape[2:])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape[0] != count:
            raise ValueError(f"mask must be boolean and one per image of {count}, got {describe(mask)}")
        if tuple(mask.shape[1:]) not in (grid, (math.prod(grid),)):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, but the last map has patches {grid}")
        mask = mask.reshape(count, *grid)
        if not bool(mask.any()):
            raise ValueError("mask hides no patch, which leaves nothing to predict")
        target = self.targets(images if teacher_images is None else teacher_images)
        theirs = tuple(target.shape[1:-1])
        if theirs not in (grid, (math.prod(grid),)):
            raise ValueError(
                f"teacher is on another patch grid: it gives {theirs} features per image, the student has patches "
                f"{grid}; images of the same crop at a size that fits its patches (teacher_images=) give it the same"
            )
        h = self.features(images, mask)
        prediction, wanted = self.predict(h[mask]), target.reshape(count, *grid, -1)[mask]
        return Predicted(self.loss(prediction, wanted), prediction, wanted)


def _stem_width(student: Backbone) -> int:
    """Channels of what the stem gives."""
    stem, info = copy.deepcopy(student.stem).eval(), student.feature_info
    side = max(int(level["reduction"]) for level in info)  # type: ignore[call-overload]
    like = next(student.parameters())
    with torch.no_grad():
        return stem(torch.zeros(1, side, side, student.in_chans, device=like.device, dtype=like.dtype))[0].shape[-1]


def last_map(model: Any, images: Tensor) -> Tensor:
    """(B, h, w, C): the last map of a backbone, behind its norm."""
    (found,) = model.forward_intermediates(images, [-1], norm=True, output_fmt="NHWC", intermediates_only=True)
    return found
