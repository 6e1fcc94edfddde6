"""ScaleKD: what a large pretrained vision transformer knows, taught to a student of any kind.

A projector of learned queries on the teacher's grid attends to the student's map and gives what looks like the
teacher's tokens. With ``n`` the division by the norm over channels, ``m`` the removal of the mean over positions (what
the release does by a discrete cosine transform without its first coefficient) and ``F`` the teacher's last stage,
frozen but passed by gradients:

    L_4 = a |n(P_4(s_4)) - n(t_4)|^2 + b |n(m(P_4'(s_4))) - n(m(t_4))|^2,
    L_3 = the same with F(P_3(s_3)) and F(P_3'(s_3)), which are the queries of P_4 and P_4',

summed over positions and channels, averaged over samples (Fan et al., 2024, arXiv 2411.06786).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_grid, check_int, check_ints, check_real, checked, describe
from ..models.backbones.stages import Backbone
from ..models.backbones.vit import VisionTransformer
from ..nn.layers import Mlp, merge_heads, normed, split_heads
from ..nn.released import Released
from ..ops.attention import attention
from .distill import DistillationLoss, Reading, Wanted

Tail = Callable[[Tensor], Tensor]
NORMS = ("batch", "layer")


class CrossAttentionProjector(nn.Module):
    """``y = z + W_2 relu(W_1 z)``, ``z = LN(W_o softmax(scale q k^T / sqrt(D)) v)`` on the teacher's grid.

    Keys and values are of ``relu(BN(conv3x3(x))) + positions``, queries of ``relu(W query)``.

    Args:
        student_dim, teacher_dim: widths.
        grid: of the queries and of what comes out.
        num_heads: heads, which divide ``teacher_dim``.
        own_query: learned queries; without them the call gives some.
        softmax_scale: of the scores, beside ``1 / sqrt(D)``.
        windows: attention within so many windows down and along.
        student_grid: of the student's map, where it is another: the release's first version, for DeiT behind Swin.
        norm: behind the convolution, ``"batch"``, or ``"layer"`` over channels: the release's version for ConvNeXt.
        compat: ``"authors"`` leaves what windows give in the windows' order, as the release does, so that tokens do not
            lie where the teacher's do.

    Raises:
        ValueError: windows that do not divide the grid, a map of another grid.
    """

    @checked
    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        grid: Sequence[int],
        num_heads: int = 8,
        own_query: bool = True,
        softmax_scale: float = 5.0,
        windows: Sequence[int] = (1, 1),
        compat: str = "",
        student_grid: Sequence[int] | None = None,
        norm: str = "batch",
    ):
        super().__init__()
        check_choice("compat", compat, ("", "authors"))
        check_choice("norm", norm, NORMS)
        self.grid, self.windows = check_grid("grid", tuple(grid), (2,)), check_ints("windows", tuple(windows), least=1)
        self.student_grid = self.grid
        if student_grid is not None:
            self.student_grid = check_grid("student_grid", tuple(student_grid), (2,))
        for sides in (self.grid, self.student_grid):
            if len(self.windows) != 2 or any(g % w for g, w in zip(sides, self.windows, strict=True)):
                raise ValueError(f"windows={self.windows} must divide the grid {sides}, down and along")
        if teacher_dim % check_int("num_heads", num_heads, least=1):
            raise ValueError(f"num_heads={num_heads} must divide teacher_dim={teacher_dim}")
        self.num_heads, self.compat = num_heads, compat
        self.scale = check_real("softmax_scale", softmax_scale, above=0) * (teacher_dim // num_heads) ** -0.5
        self.conv = nn.Conv2d(student_dim, student_dim, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(student_dim) if norm == "batch" else nn.LayerNorm(student_dim)
        self.positions = nn.Parameter(torch.empty(*self.student_grid, student_dim))
        self.query = nn.Parameter(torch.empty(*self.grid, teacher_dim)) if own_query else None
        self.of_query = nn.Linear(teacher_dim, teacher_dim)
        self.q = nn.Linear(teacher_dim, teacher_dim)
        self.k, self.v = nn.Linear(student_dim, teacher_dim), nn.Linear(student_dim, teacher_dim)
        self.proj = nn.Linear(teacher_dim, teacher_dim)
        self.out_norm = nn.LayerNorm(teacher_dim)
        self.mlp = Mlp(teacher_dim, 4.0, nn.ReLU)
        nn.init.trunc_normal_(self.positions, std=0.02)
        if self.query is not None:
            nn.init.normal_(self.query)

    def _cut(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B * windows, tokens, C)."""
        (h, w), (down, along) = x.shape[1:3], self.windows
        x = x.unflatten(2, (along, w // along)).unflatten(1, (down, h // down))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def _join(self, x: Tensor) -> Tensor:
        (h, w), (down, along) = self.grid, self.windows
        if self.compat:
            return x.reshape(-1, h, w, x.shape[-1])
        x = x.reshape(-1, down, along, h // down, w // along, x.shape[-1])
        return x.transpose(2, 3).reshape(-1, h, w, x.shape[-1])

    def _normed(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w, C)."""
        if isinstance(self.norm, nn.LayerNorm):
            return self.norm(x.permute(0, 2, 3, 1))
        return self.norm(x).permute(0, 2, 3, 1)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """(B, h, w, student_dim), queries (B, h', w', teacher_dim) for the learned -> (B, h', w', teacher_dim)."""
        if tuple(x.shape[1:3]) != self.student_grid:
            given = tuple(x.shape[1:3])
            raise ValueError(f"the student's map has a grid of {given}, the projector one of {self.student_grid}")
        if query is None and self.query is None:
            raise ValueError("query must be given to a projector with own_query=False")
        own = self.query if query is None else query
        asking = F.relu(self.of_query(own)).expand(len(x), -1, -1, -1)  # type: ignore[arg-type]
        source = F.relu(self._normed(self.conv(x.permute(0, 3, 1, 2)))) + self.positions
        q, k, v = (
            split_heads(self._cut(f(t)), self.num_heads)
            for f, t in ((self.q, asking), (self.k, source), (self.v, source))
        )
        z = self.out_norm(self.proj(self._join(merge_heads(attention(q, k, v, scale=self.scale)))))
        return z + self.mlp(z)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], grid: Sequence[int]) -> dict[str, Tensor]:
        """From the release's ``AttentionProjector``."""
        theirs = Released(state_dict, "AttentionProjector")
        rows = tuple(grid)
        return theirs.close(
            theirs.renamed(
                {
                    r"proj_student\.0\.(\w+)": r"conv.\1",
                    r"proj_student\.1\.(\w+)": r"norm.\1",
                    r"pos_embed": lambda match, value: {"positions": value[0].permute(1, 2, 0)},
                    r"query\.weight": lambda match, value: {"query": value.unflatten(0, rows)},
                    r"proj_pos\.0\.weight": lambda match, value: {"of_query.weight": value.flatten(1)},
                    r"proj_pos\.0\.bias": r"of_query.bias",
                    r"pos_attention\.(q|k|v|proj)\.(\w+)": r"\1.\2",
                    r"norm\.(\w+)": r"out_norm.\1",
                    r"ffn\.layers\.0\.0\.(\w+)": r"mlp.fc1.\1",
                    r"ffn\.layers\.1\.(\w+)": r"mlp.fc2.\1",
                }
            )
        )


def without_mean(x: Tensor) -> Tensor:
    """(B, h, w, C) without its mean over positions: a cosine transform without its first coefficient, and back."""
    return x - x.mean((1, 2), keepdim=True)


def directions(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of features (B, h, w, C), each divided by its norm; summed, averaged over samples."""
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum() / len(student)


def last_stage(model: nn.Module, blocks: int = 2) -> Tail:
    """What a backbone makes of its last map but one: ``(B, h, w, C) -> (B, h', w', C')``, norm and all.

    Args:
        model: a backbone of attnlib: its last stage, or of a vision transformer the last blocks, which then read
            patches alone.
        blocks: of a vision transformer; the release takes 2 of 24.

    Raises:
        TypeError: what is no backbone; give ScaleKD ``tail=``.
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"the last stage of {describe(model)} is not known; give tail=, a function of features")

    def run(x: Tensor) -> Tensor:
        if isinstance(model, VisionTransformer):
            grid, y = x.shape[1:3], x if not model.num_prefix_tokens else x.flatten(1, 2)
            for block in list(model.stages)[-blocks:]:
                y, _ = block(y)
            y = model.norm(y)
            return y if y.dim() == 4 else y.unflatten(1, grid)
        y, valid = model.stages[-1](x, None)
        return normed(model.norm, y, valid)

    return run


class ScaleKD(DistillationLoss):
    """Both losses of the student's last two stages; see the module. With ``LogitLoss()`` and ``task=0.5`` it is whole.

    Args:
        student, teacher: the models, of which widths and grids are read and nothing is kept.
        img_size: side of images, or (height, width): projectors have learned positions.
        num_heads: heads of the projectors of the last stage but one and of the last; the release takes 16 and 24 for
            widths of 768 and 1536.
        stages: of the student; of a vision transformer they are blocks.
        alpha: weights of the spatial and of the mean-free loss.
        softmax_scale, windows, compat: of :class:`CrossAttentionProjector`.
        norm: of the projectors.
        unlike_grids: whether a stage of the student may have another grid than the teacher's, whose queries then read
            all of it, as the release has it for a DeiT behind a Swin.
        blocks: of a vision transformer as teacher, that are its last stage.
        tail: the teacher's last stage, ``(B, h, w, C) -> (B, h', w', C')``, where :func:`last_stage` does not know it;
            it must run the teacher's own modules.

    Raises:
        ValueError: student and teacher whose maps have unlike grids, without ``unlike_grids``.

    Reference: Fan et al., 2024, arXiv 2411.06786; the classes of the release whose names end in v2, and with
    ``unlike_grids`` or ``norm="layer"`` the first ones and those for ConvNeXt.
    """

    @checked
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        img_size: int | tuple[int, int] = 224,
        num_heads: Sequence[int] = (16, 24),
        stages: Sequence[int] = (-2, -1),
        alpha: Sequence[float] = (0.08, 0.06),
        softmax_scale: float = 5.0,
        windows: Sequence[int] = (1, 1),
        compat: str = "",
        norm: str = "batch",
        unlike_grids: bool = False,
        blocks: int = 2,
        tail: Tail | None = None,
    ):
        super().__init__()
        heads, self.alpha = check_ints("num_heads", tuple(num_heads), least=1), tuple(alpha)
        self.stages = check_ints("stages", tuple(stages))
        if not len(heads) == len(self.alpha) == len(self.stages) == 2:
            raise ValueError(
                f"num_heads, alpha and stages must be two numbers each, got {heads}, {self.alpha}, {self.stages}"
            )
        sides = (img_size,) * 2 if isinstance(img_size, int) else img_size
        self.blocks, self.tail = check_int("blocks", blocks, least=1), tail
        if tail is None:
            last_stage(teacher)
        #: A vision transformer's stages are blocks: what its last ``blocks`` read is behind the block before them.
        before = -1 - blocks if isinstance(teacher, VisionTransformer) else -2
        self.student = Wanted(features=frozenset(self.stages))
        self.teacher = Wanted(features=frozenset({-1}))
        self.projectors = nn.ModuleDict()
        rows = zip("34", self.stages, (before, -1), heads, strict=True)
        for name, ours, theirs, count in rows:
            levels: Any = student.feature_info, teacher.feature_info
            mine, its = levels[0][ours], levels[1][theirs]
            grids = [tuple(-(-side // level["reduction"]) for side in sides) for level in (mine, its)]
            if grids[0] != grids[1] and not unlike_grids:
                raise ValueError(
                    f"the student's stage {ours} has a grid of {grids[0]}, the teacher's stage {theirs} one of "
                    f"{grids[1]}; unlike_grids=True lets them differ"
                )
            for view in ("spatial", "mean-free"):
                self.projectors[f"{view} {name}"] = CrossAttentionProjector(
                    mine["num_chs"], its["num_chs"], grids[1], count, name == "3", softmax_scale, windows, compat,
                    grids[0], norm,
                )  # fmt: skip

    def forward(self, student: Reading, teacher: Reading, model: nn.Module) -> dict[str, Tensor]:
        tail = last_stage(model, self.blocks) if self.tail is None else self.tail
        target = teacher.features[-1]
        found: dict[str, Tensor] = {}
        for view, weight in zip(("spatial", "mean-free"), self.alpha, strict=True):
            change: Any = without_mean if view == "mean-free" else lambda x: x
            through = tail(self.projectors[f"{view} 3"](student.features[self.stages[0]]))
            direct = self.projectors[f"{view} 4"](student.features[self.stages[1]], through)
            for name, y in (("3", through), ("4", direct)):
                found[f"{view} {name}"] = weight * directions(change(y), change(target))
        return found
