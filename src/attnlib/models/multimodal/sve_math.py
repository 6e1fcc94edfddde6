"""SVE-Math: a second vision encoder's pyramid, weighed level by level, beside the tokens of a language model's own.

Zhang et al., 2025, "Open Eyes, Then Reason: Fine-grained Visual Mathematical Understanding in MLLMs", arXiv
2501.06430. With tokens ``Q`` of the model's vision tower and maps ``L_i`` of an encoder that knows shapes, junctions
and boundaries, resized to the grid of ``Q``,

    g_i = sigmoid(MLP([LN(mean Q), LN(W mean L_i)])),    a_i = W2 LN(gelu(W1 L_i)),

and one number ``g_i`` per image and level. Two forms:

    channel:   [Q, A_1, ..., A_k] side by side, one projector of k + 1 times the width,
    sequence:  Q and sum A_i, a projector each, twice as many tokens.

The gate stands behind or before the norm:

    after:     A_i = g_i MLP(LN(a_i)),    before:  A_i = MLP(LN(g_i a_i)),

(``a_i + Q`` in the norm in the sequence form). ``LN(g a) = LN(a)`` for every ``g > 0``, so in the channel form a gate
before the norm does nothing but for the norm's eps. The release has it there; its sequence form gates after. Ours gates
after unless ``gate="before"``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_float, check_int, check_rank, check_type
from ...nn.layers import resize_map
from ...nn.released import Released
from ...ops.points import square_grid
from ...types import stats_dtype
from .segmenter import check_size

MERGES = ("channel", "sequence")


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out_dim: int, norm: bool = False):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, out_dim, bias=False)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.norm(nn.functional.gelu(self.linear_1(x))))


class Routed(NamedTuple):
    """``parts``: ``x`` and one (B, N, dim) per level; ``gates`` (B, levels) between 0 and 1."""

    parts: list[Tensor]
    gates: Tensor


class FeatureRouter(nn.Module):
    """Levels of a pyramid as token maps beside given tokens, each weighed by a gate.

    Args:
        dim: of the tokens.
        level_dim: channels of every level.
        levels: k.
        hidden: of the maps between; ``dim`` by default, and always with ``merge="sequence"``.
        merge: ``"channel"`` or ``"sequence"``: whether tokens are added to a level before its norm.
        gate: ``"after"`` the norm or ``"before"`` it; with one level there is none, as released.

    >>> router = FeatureRouter(8, 4, levels=2)
    >>> out = router(torch.randn(2, 9, 8), [torch.randn(2, 6, 6, 4), torch.randn(2, 3, 3, 4)])
    >>> [tuple(p.shape) for p in out.parts], out.gates.shape
    ([(2, 9, 8), (2, 9, 8), (2, 9, 8)], torch.Size([2, 2]))
    """

    def __init__(
        self, dim: int = 1024, level_dim: int = 256, levels: int = 4, hidden: int | None = None,
        merge: str = "channel", gate: str = "after",
    ):  # fmt: skip
        super().__init__()
        for name, value in (("dim", dim), ("level_dim", level_dim), ("levels", levels)):
            check_int(name, value, least=1)
        check_choice("merge", merge, MERGES)
        check_choice("gate", gate, ("after", "before"))
        hidden = dim if hidden is None else check_int("hidden", hidden, least=1)
        if merge == "sequence" and hidden != dim:
            raise ValueError(f"hidden={hidden} must be dim={dim} with merge='sequence': tokens are added to the levels")
        self.dim, self.level_dim, self.merge, self.gate = dim, level_dim, merge, gate
        self.aggregate = nn.ModuleList(_Mlp(level_dim, hidden, hidden, norm=True) for _ in range(levels))
        self.norm, self.proj_out = nn.LayerNorm(hidden), _Mlp(hidden, hidden, dim)
        self.proj_context: nn.Linear | None = None
        if levels > 1:
            self.proj_context = nn.Linear(level_dim, level_dim, bias=False)
            self.norm_context, self.norm_query = nn.LayerNorm(level_dim), nn.LayerNorm(dim)
            self.weight_mlp = _Mlp(dim + level_dim, hidden, 1)

    def _grid(self, x: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        check_rank("x", x, (3, 4), "(B, N, dim) or (B, H, W, dim)")
        if x.dim() == 4:
            return x.shape[1], x.shape[2]
        count = x.shape[1]
        if grid is None:
            return square_grid(count, "x")
        rows, cols = check_size("grid", grid)
        if rows * cols != count:
            raise ValueError(f"grid={(rows, cols)} has {rows * cols} places, but x has {count} tokens")
        return rows, cols

    def forward(self, x: Tensor, levels: Sequence[Tensor], grid: tuple[int, int] | None = None) -> Routed:
        """Weigh the levels.

        Args:
            x: (B, N, dim) or (B, H, W, dim) tokens of the model's own tower, without a class token.
            levels: (B, h_i, w_i, level_dim) each, in the order of the gates.
            grid: (rows, columns) of tokens that are no square.
        """
        rows, cols = self._grid(x, grid)
        check_axes("x", x, **dict(zip("BHW"[: x.dim() - 1], x.shape[:-1], strict=True)), dim=self.dim)
        check_float("x", x)
        if len(levels) != len(self.aggregate):
            raise ValueError(f"levels must be {len(self.aggregate)} maps, got {len(levels)}")
        q = x.flatten(1, -2)
        tokens = []
        for i, level in enumerate(levels):
            check_axes(f"levels[{i}]", level, B=len(x), h=None, w=None, level_dim=self.level_dim)
            # Positions of nearest neighbours are the same in any type; small ones lack the operator on some devices.
            fine = resize_map(level.to(stats_dtype(level.dtype)), (rows, cols), "nearest")
            tokens.append(fine.flatten(1, 2).to(q.dtype))
        gates = self.gates(q, tokens)
        parts = [q]
        for i, (level, aggregate) in enumerate(zip(tokens, self.aggregate, strict=True)):
            g, a = gates[:, i, None, None], aggregate(level)
            if self.gate == "before":
                a = a * g
            if self.merge == "sequence":
                a = a + q
            a = self.proj_out(self.norm(a))
            parts.append(a * g if self.gate == "after" else a)
        return Routed(parts, gates)

    def gates(self, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """(B, N, dim) tokens and (B, N_i, level_dim) levels -> (B, k)."""
        if self.proj_context is None:
            return x.new_ones(len(x), 1)
        context = self.norm_context(self.proj_context(torch.stack([level.mean(1) for level in levels], 1)))
        query = self.norm_query(x.mean(1, keepdim=True)).expand(-1, len(levels), -1)
        return self.weight_mlp(torch.cat([query, context], -1)).sigmoid()[..., 0]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' ORi_VisionToken, alone or as VTMerge of their tower.

        ``ValueError`` for several of its layers: only the last one is read there.
        """
        theirs = Released(state_dict, "the authors' ORi_VisionToken", wrappers=("VTMerge.",))
        rules = {
            r"layers\.0\.aggregate_(\d+)\.attention_layer\.(.+)": r"aggregate.\1.\2",
            r"layers\.0\.norm_quy\.(.+)": r"norm_query.\1",
            r"layers\.0\.((?:proj_out|norm|proj_context|norm_context|weight_mlp)\..+)": r"\1",
        }
        return theirs.close(theirs.renamed(dict(rules)))


class RoutedProjector(nn.Module):
    """A router and the projector behind it, in the place of a language model's own projector.

        with projector.seeing([map.permute(0, 2, 3, 1) for map in encoder(fine_images)]):
            model.generate(**inputs)

    Args:
        router: of the levels.
        out_dim: of the language model.
        depth: linear maps of each projector, GELUs between them; 1 is the release's ``linear``, n its ``mlpnx_gelu``.

    In the channel form a model keeps its number of image tokens; in the sequence form it has twice as many, which the
    prompt must hold.

    >>> projector = RoutedProjector(FeatureRouter(8, 4, levels=2), 16)
    >>> projector(torch.randn(2, 9, 8), [torch.randn(2, 6, 6, 4), torch.randn(2, 3, 3, 4)]).shape
    torch.Size([2, 9, 16])
    """

    def __init__(self, router: FeatureRouter, out_dim: int, depth: int = 2):
        super().__init__()
        check_type("router", router, FeatureRouter)
        check_int("out_dim", out_dim, least=1)
        check_int("depth", depth, least=1)
        self.router = router
        wide, count = router.dim * (len(router.aggregate) + 1), 1
        if router.merge == "sequence":
            wide, count = router.dim, 2
        self.models = nn.ModuleList()
        for _ in range(count):
            layers: list[nn.Module] = [nn.Linear(wide, out_dim)]
            for _ in range(depth - 1):
                layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
            self.models.append(nn.Sequential(*layers))
        self._seen: list[Tensor] | None = None

    @contextlib.contextmanager
    def seeing(self, levels: Sequence[Tensor]) -> Iterator[None]:
        """Levels of the images that are read inside, one row per image."""
        before, self._seen = self._seen, list(levels)
        try:
            yield
        finally:
            self._seen = before

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_seen": None}

    def forward(
        self, x: Tensor, levels: Sequence[Tensor] | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:  # fmt: skip
        """(B, N, dim) tokens -> (B, N or 2 N, out_dim); ``levels`` are those of :meth:`seeing` unless given."""
        levels = self._seen if levels is None else levels
        if levels is None:
            raise ValueError("there are no levels to weigh: give levels, or call the model inside seeing(levels)")
        if levels and len(x) != len(levels[0]) and len(levels[0]) and not len(x) % len(levels[0]):
            # Beams repeat every image, one after another.
            levels = [level.repeat_interleave(len(x) // len(levels[0]), 0) for level in levels]
        parts = self.router(x, levels, grid).parts
        if self.router.merge == "channel":
            return self.models[0](torch.cat(parts, -1))
        return torch.cat([self.models[0](parts[0]), self.models[1](torch.stack(parts[1:]).sum(0))], 1)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' Vision_projectors, without the router.

        Of linear projectors in the sequence form, of which the release makes one more than there are levels, it reads
        the first two.
        """
        theirs = Released(state_dict, "the authors' Vision_projectors")
        wide = [k for k, v in state_dict.items() if re.search(r"models\.\d+\.weight$", k)]
        # One number counts layers of a projector, every second of which is a GELU, or linear projectors.
        alike = any(re.search(r"models\.1\.weight$", k) for k in wide)
        rules = {
            r"models\.(\d+\.\d+\..+)": r"models.\1",
            r"models\.(weight|bias)": r"models.0.0.\1",
        }
        if alike:
            theirs.leave(r"models\.(?:[2-9]|\d\d+)\.(?:weight|bias)", because="never read")
            rules[r"models\.([01])\.(weight|bias)"] = r"models.\1.0.\2"
        else:
            rules[r"models\.(\d+\.(?:weight|bias))"] = r"models.0.\1"
        return theirs.close(theirs.renamed(dict(rules)))
