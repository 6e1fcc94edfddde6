"""PEMF-VVTO: points matched between a garment and the frames of a clip steer two kinds of attention.

Both stand in a denoiser whose rows are the frames of a clip, with the picture of the garment as the first prompt.

Spatial (PSA): frames also read the garment's keys, and a matched pair shares an embedding ``e_i`` of where on the
garment it lies, added to the query at the frame's end and to the key at the garment's,

    ``O = softmax((Q + E_Q(P)) [K_X, K_G + E_K(P)]^T / sqrt(d)) [V_X, V_G]``.

Temporal (PTA): the tokens that a track passes through attend to each other, ``z_i <- z_i + W_o MHA(LN z_i)``, where
frames in which the point is hidden neither give nor receive; cells that no track visits stay as they are.

The paper's text fixes which points meet in which attention, not the modules: the form above, its zero start, the mean
where several points share a cell, and everything about training is our reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import check_float, check_int, check_named, check_rank, check_real, check_type, shaped
from ...hooks.denoiser import CallSite
from ...hooks.intervention import Intervention
from ...hooks.pipelines import denoiser_of, is_pipeline
from ...hooks.site import Site
from .hidiffusion import HiDiffusion
from .references import attentions_of
from .regions import image_grid
from .residual import ResidualAttention


def check_points(name: str, points: Any, visible: Any, layout: str) -> tuple[Tensor, Tensor]:
    """Points (..., P, 2) in [0, 1), x first, and which of them count.

    Raises:
        ValueError: a point that counts lies outside the picture.
    """
    check_float(name, points)
    check_rank(name, points, 3, layout)
    if points.shape[-1] != 2:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(points.shape)}")
    seen = torch.ones(points.shape[:2], dtype=torch.bool) if visible is None else visible
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool or seen.shape != points.shape[:2]:
        found = f"{seen.dtype} {tuple(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
        raise ValueError(f"visible must be boolean {tuple(points.shape[:2])}, as {name} has points, got {found}")
    outside = seen & ~((points >= 0) & (points < 1)).all(-1)
    if bool(outside.any()):
        frame, number = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: point {number} of frame {frame} lies at {points[frame, number].tolist()}, outside the frame; "
            "give shares of the sides in [0, 1), and visible=False where a point is not seen"
        )
    return points.detach(), seen


@shaped(points="float (..., 2)")
def cells(points: Tensor, grid: Sequence[int]) -> Tensor:
    """Numbers of the cells of a grid (h, w) that points (..., 2) lie in; x first, shares of the sides.

    >>> cells(torch.tensor([[0.0, 0.0], [0.9, 0.5]]), (2, 4)).tolist()
    [0, 7]
    """
    h, w = grid
    x = (points[..., 0] * w).floor().clamp(0, w - 1).long()
    y = (points[..., 1] * h).floor().clamp(0, h - 1).long()
    return y * w + x


def spread(values: Tensor, at: Tensor, count: int, valid: Tensor) -> Tensor:
    """(P, C) values put on ``count`` cells, the mean where several share one, zeros elsewhere.

    >>> spread(torch.tensor([[2.0], [4.0], [9.0]]), torch.tensor([1, 1, 0]), 3, torch.tensor([True, True, False]))
    tensor([[0.],
            [3.],
            [0.]])
    """
    keep = valid.nonzero().flatten()
    at, values = at[keep], values[keep]
    total = values.new_zeros(count, values.shape[-1]).index_add(0, at, values)
    number = values.new_zeros(count).index_add(0, at, values.new_ones(len(at)))
    return total / number.clamp(min=1)[:, None]


def clips_of(rows: Sequence[str] | None, batch: int, frames: int, cloth: bool) -> tuple[Tensor, Tensor]:
    """Row numbers (n, F) of the frames of each clip and (n,) of the garment of each (empty without one)."""
    groups = [len(list(same)) for _, same in groupby(rows or [""] * batch)]
    start, clips, garments = 0, [], []
    for group in groups:
        if (group != frames + 1) if cloth else group % frames:
            wanted = f"a garment and {frames} frames" if cloth else f"clips of {frames} frames"
            raise ValueError(
                f"a batch of {batch} rows ({group} of a kind) is not {wanted}, which the points are of; call the "
                "pipeline with a prompt for each"
            )
        if cloth:
            garments.append(start)
            clips.append(torch.arange(start + 1, start + group))
        else:
            clips += list(torch.arange(start, start + group).view(-1, frames))
        start += group
    return torch.stack(clips), torch.tensor(garments, dtype=torch.long)


class PointMaps(nn.Module):
    """What an embedding of a point adds to queries and keys of one layer; nothing at first.

    Args:
        width: of the embedding.
        dim: of all heads together.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.to_q = nn.Linear(width, dim, bias=False)
        self.to_k = nn.Linear(width, dim, bias=False)
        nn.init.zeros_(self.to_q.weight)
        nn.init.zeros_(self.to_k.weight)


class PointSpatialAttention(Intervention, nn.Module):
    """PSA: frames read the garment, the first prompt, and matched places find each other.

    Args:
        maps: from the name of a self-attention to its :class:`PointMaps`.
        width: of the embedding of a point.
        frames: F, the prompts behind the garment's.
        strength: factor on the embeddings; 0 is reference attention without points.

    ``match(...)`` says which points are matched; without it frames read the garment by content alone.

    Raises:
        ValueError: a batch that is no garment and its frames.

    Reference: Chang et al., 2024, PEMF-VVTO; our reading.
    """

    name: ClassVar[str] = "pemf-spatial"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    replaces_mask: ClassVar[bool] = True
    adds_keys = True

    def __init__(self, maps: Mapping[str, nn.Module], width: int = 64, frames: int = 1, strength: float = 1.0):
        nn.Module.__init__(self)
        check_named("maps", maps, PointMaps, "the model has no self-attention in which frames could read a garment")
        self.names = tuple(maps)
        self.maps = nn.ModuleList(maps.values())
        self.layers = list(self.names)
        self.embed = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.frames = check_int("frames", frames, least=1)
        self.strength = check_real("strength", strength)
        self._matched: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, model: Any, width: int = 64, **settings: Any) -> PointSpatialAttention:
        """For all self-attention of a U-Net (or of a pipeline's)."""
        if is_pipeline(model):
            model = denoiser_of(model)[0]
        maps = {
            name: PointMaps(width, module.to_q.out_features)
            for name, module in attentions_of(model)
            if not module.is_cross_attention and "motion_modules" not in name
        }
        like = next(model.parameters())
        return cls(maps, width, **settings).to(like.device, like.dtype)

    def match(self, points: Tensor, cloth: Tensor, valid: Tensor | None = None) -> PointSpatialAttention:
        """Say which points are matched; this stands until it is said anew.

        Args:
            points: (F, P, 2) in the frames, x first, as shares of the sides.
            cloth: (P, 2) on the garment's picture.
            valid: (F, P) boolean, ``None`` for all.

        Returns:
            itself.
        """
        points, seen = check_points("points", points, valid, "(F, P, 2)")
        if len(points) != self.frames:
            raise ValueError(f"points are of {len(points)} frames, and frames={self.frames} was given")
        check_rank("cloth", cloth, 2, "(P, 2)")
        cloth, _ = check_points("cloth", cloth[None], None, "(1, P, 2)")
        if cloth.shape[1] != points.shape[1]:
            raise ValueError(f"cloth has {cloth.shape[1]} points, and the frames have {points.shape[1]}")
        self._matched = points, cloth[0], seen
        return self

    def conflicts(self, other: Intervention) -> str | None:
        if isinstance(other, HiDiffusion) and other.windows:
            return "windows are rows of their own, and frames read a garment as a whole"
        return None

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        clips, garments = clips_of(site.rows, len(q), self.frames, cloth=True)
        if self._matched is not None and self.strength and bool(self._matched[2].any()):
            q, garment_k = self._pointed(site, q, k, clips, garments)
        else:
            garment_k = k[garments.to(k.device)]
        at = garments.to(k.device)
        whose = torch.arange(len(garments), device=k.device).repeat_interleave(self.frames + 1)
        keys = torch.cat([k, garment_k[whose]], 2)
        values = torch.cat([v, v[at][whose]], 2)
        # The garment reads itself, as ever.
        reads = torch.ones(len(q), keys.shape[2], dtype=torch.bool, device=k.device)
        reads[at, k.shape[2] :] = False
        return call(q, keys, values, mask=reads[:, None, None].expand(-1, -1, q.shape[2], -1))

    def _pointed(self, site: Site, q: Tensor, k: Tensor, clips: Tensor, garments: Tensor) -> tuple[Tensor, Tensor]:
        assert self._matched is not None
        grid = image_grid(site)
        maps: Any = self.maps[self.names.index(site.name)]
        points, cloth, seen = (t.to(q.device) for t in self._matched)
        made = self.embed(cloth.to(self.embed[0].weight)) * self.strength  # type: ignore[arg-type]
        for_q, for_k = maps.to_q(made), maps.to_k(made)
        count = grid[0] * grid[1]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (site.heads, -1)).transpose(-2, -3).to(q)

        added = torch.zeros_like(q)
        for f in range(self.frames):
            here = heads(spread(for_q, cells(points[f], grid), count, seen[f]))
            added = added.index_add(0, clips[:, f].to(q.device), here.expand(len(clips), -1, -1, -1))
        garment = heads(spread(for_k, cells(cloth, grid), count, seen.any(0)))
        return q + added, k[garments.to(k.device)] + garment


class TrackBlock(ResidualAttention):
    """``W_o MHA(LN z)`` along tracks.

    Args:
        dim: width of the tokens.
        num_heads: heads.
    """

    def forward(self, x: Tensor, points: Tensor, visible: Tensor) -> Tensor:  # type: ignore[override]
        """(n, F, C, h, w) frames, (F, T, 2) tracks and (F, T) where they are seen -> what is added, of x's shape."""
        n, frames, _, h, w = x.shape
        at = cells(points, (h, w))  # (F, T)
        tokens = x.flatten(3).transpose(2, 3)  # (n, F, hw, C)
        z = torch.stack([tokens[:, f].index_select(1, at[f]) for f in range(frames)], 2).flatten(0, 1)  # (n T, F, C)
        added = super().forward(z, visible.T.repeat(n, 1)).unflatten(0, (n, -1))
        out = [torch.stack([spread(added[i, :, f], at[f], h * w, visible[f]) for f in range(frames)]) for i in range(n)]
        return torch.stack(out).transpose(2, 3).unflatten(3, (h, w))


class PointTemporalAttention(Intervention, nn.Module):
    """PTA: places that a track passes through attend to each other over time.

    Args:
        blocks: from the name of a transformer of a U-Net (``"down_blocks.0.attentions.0"``) to its
            :class:`TrackBlock`.
        frames: F.
        cloth: the first prompt is the garment, and no frame.
        strength: of the residual; 0 leaves the plain model.

    ``track(points, visible)`` says where the tracks run; without it, and with one frame, nothing is done.

    Reference: Chang et al., 2024, PEMF-VVTO; our reading.
    """

    name: ClassVar[str] = "pemf-temporal"

    def __init__(self, blocks: Mapping[str, nn.Module], frames: int, cloth: bool = False, strength: float = 1.0):
        nn.Module.__init__(self)
        check_named(
            "blocks", blocks, TrackBlock, "the model has no transformer of images behind which tracks could attend"
        )
        self.names = tuple(blocks)
        self.blocks = nn.ModuleList(blocks.values())
        self.acts_on = self.names
        self.frames = check_int("frames", frames, least=1)
        self.cloth, self.strength = cloth, check_real("strength", strength)
        self._tracks: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, model: Any, frames: int, num_heads: int = 8, **settings: Any) -> PointTemporalAttention:
        """For all image transformers of a U-Net (or of a pipeline's)."""
        if is_pipeline(model):
            model = denoiser_of(model)[0]
        check_type("model", model, nn.Module, "a denoiser or a pipeline of diffusers")
        blocks = {
            name: TrackBlock(module.in_channels, num_heads)
            for name, module in model.named_modules()
            if type(module).__name__ == "Transformer2DModel"
        }
        like = next(model.parameters())
        return cls(blocks, frames, **settings).to(like.device, like.dtype)

    def track(self, points: Tensor, visible: Tensor | None = None) -> PointTemporalAttention:
        """Say where the tracks run; this stands until it is said anew.

        Args:
            points: (F, T, 2), x first, as shares of the sides.
            visible: (F, T) boolean, ``None`` for everywhere.

        Returns:
            itself.
        """
        points, seen = check_points("points", points, visible, "(F, T, 2)")
        if len(points) != self.frames:
            raise ValueError(f"points are of {len(points)} frames, and frames={self.frames} was given")
        self._tracks = points, seen
        return self

    def around_module(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
        result = call(inputs)
        if self._tracks is None or self.frames == 1 or not self.strength or not bool(self._tracks[1].any()):
            return result
        out = result if isinstance(result, Tensor) else result[0]
        rows = site.rows
        if rows is not None and len(out) != len(rows):  # frames are folded into the batch
            rows = tuple(row for row in rows for _ in range(len(out) // len(rows)))
        clips, _ = clips_of(rows, len(out), self.frames, self.cloth)
        points, seen = (t.to(out.device) for t in self._tracks)
        block = self.blocks[self.names.index(site.name)]
        at = clips.flatten().to(out.device)
        added = block(out.index_select(0, at).unflatten(0, clips.shape), points, seen).flatten(0, 1)
        new = out.index_add(0, at, self.strength * added)
        return new if isinstance(result, Tensor) else (new, *result[1:])
