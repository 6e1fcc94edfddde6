"""Multi-axis attention of MaxViT: dense attention in local windows, then dense attention on a sparse global grid.

Tu et al., 2022, "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697. *Block* attention cuts the map into windows
of ``P x P`` neighbouring tokens; *grid* attention lays a ``G x G`` grid over the whole map, so that group ``(a, b)``
holds the tokens ``(i H/G + a, j W/G + b)``. Inside a group

    ``softmax(q k^T D^-1/2 + B[h, key - query + P - 1]) v``

with a learned table ``B`` of ``(2P - 1) x (2P - 1)`` per head. Each is O(N); the pair lets every token read every other
when tokens of the grid lie no further apart than a window is wide (``H / G <= P``).

In the paper's block the two are residual sublayers, each behind a LayerNorm and followed by an MLP. ``maxvit`` is that
pair without the MLPs, in the form of one mechanism inside a residual block that brings its own first norm: it returns
the update ``b + grid(norm(x + b))`` with ``b = block(x)``, so that ``x + maxvit(x)`` is both residual sublayers.

Differs from the PyTorch code in timm: the relative table is stored as key minus query for every variant (timm's
``RelPosBias`` stores query minus key and is flipped by ``convert_state_dict``), and tokens that do not exist
(``valid``) are never attended.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_grid, check_int, check_ints
from ...grids import Windows, check_windows
from ...masks import Mask
from ...normalizers import Normalizer
from ...ops.partition import KINDS, window_attention
from ...positions import dense_window_bias
from ...types import Traits, check_choice, check_divides, to_tuple
from ..base import PADS, Mechanism
from ..layers import LayerScale, PositionMlp, flat_valid, head_dim_of, through
from ..registry import register
from ..released import Released, Rule

PerAxis = int | Sequence[int]


def _window_of(name: str, size: PerAxis, rank: int | None) -> tuple[int, ...]:
    if rank is None:
        rank = len(size) if isinstance(size, (tuple, list)) else 2
    else:
        check_int("rank", rank, least=1, most=3)
    return check_grid(name, to_tuple(name, size, rank))


def attend_in_windows(
    m: Any, x: Tensor, windows: Windows, bias: Tensor | None, scale: float, valid: Tensor | None, mask: Mask | None
) -> Tensor:
    """Attention of a mechanism's ``qkv`` and ``proj`` inside windows, both applied behind the cut: (B, *grid, C).

    Args:
        m: has ``qkv``, ``proj``, ``proj_drop``, ``attn_drop``, ``num_heads``, ``head_dim``, and perhaps ``normalizer``.
        x: (B, *grid, C), on a grid that the windows divide.
        windows: which.
        bias: (H, S, S) inside a window.
        scale: of the scores.
        valid: (B, *grid) boolean, which tokens exist.
        mask: which pairs may meet besides.
    """
    q, k, v = m.qkv(windows.cut(x)).unflatten(-1, (3, m.num_heads, m.head_dim)).permute(3, 0, 1, 4, 2, 5)
    out = window_attention(
        q, k, v, windows.grid, windows.size, windows.kind, shift=windows.shift or 0, interval=windows.interval or 1,
        cut=True, valid=flat_valid(valid), mask=mask, bias=bias, scale=scale,
        normalizer=getattr(m, "normalizer", "softmax"), dropout_p=m.attn_drop if m.training else 0.0,
    )  # fmt: skip
    return windows.join(through(m.proj_drop, m.proj(out.transpose(2, 3).flatten(3))))


class PartitionAttention(Mechanism):
    """Multi-head attention inside block or grid windows, with a relative bias.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``. The authors' models have ``dim / 32``.
        window_size: sides of a window.
        kind: ``"block"``: windows of neighbouring tokens; ``"grid"``: of tokens spread evenly over the map.
        rank: axes of the grid; 2, unless ``window_size`` is a tuple.
        shift: how far windows of ``kind="block"`` are moved, as every second layer of Swin does by half a window;
            along an axis with one window alone they stay.
        keep_shift: they are moved there too, so that the window's two ends do not meet, as in most released Swins.
        rel_bias: learn a relative bias per head: a table, or with ``"mlp"`` a function of the displacement
            (:class:`attnlib.nn.layers.PositionMlp`), as timm's ``rmlp`` models.
        qkv_bias: bias of the query, key and value projections.
        proj_bias: bias of the output projection.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        pad: of a grid that windows do not divide: ``"mask"`` adds tokens at the bottom and on the right that nobody
            attends to, ``"zeros"`` adds zeros that take part, ``"refuse"`` raises.
        rel_hidden: hidden width of that function.
        rel_drop: dropout of its hidden layer in training.
        attn_dim: width of queries, keys and values of all heads; ``dim`` by default.
        out_dim: width of the output; ``dim`` by default, and any other for use inside another module only.

    Reference: Tu et al., 2022, arXiv 2204.01697, section 3.2.

    >>> PartitionAttention(dim=16, num_heads=4, window_size=4, kind="grid")(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        mask=True,
        work={"N": 1},
        memory={"N": 1},
    )

    bias: Tensor | None
    #: How scores become weights; see :mod:`attnlib.normalizers`.
    normalizer: str | Normalizer = "softmax"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: PerAxis = 7,
        kind: str = "block",
        rank: int | None = None,
        rel_bias: bool | str = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
        shift: PerAxis = 0,
        rel_hidden: int = 512,
        rel_drop: float = 0.125,
        attn_dim: int | None = None,
        out_dim: int | None = None,
        keep_shift: bool = False,
    ):
        super().__init__(dim)
        self.keep_shift = check_flag("keep_shift", keep_shift)
        width, out_dim = (dim if given is None else given for given in (attn_dim, out_dim))
        check_choice("kind", kind, KINDS)
        check_choice("pad", pad, PADS)
        self.pad = pad
        self.num_heads, self.head_dim, self.kind = num_heads, head_dim_of(width, num_heads), kind
        self.window_size = _window_of("window_size", window_size, rank)
        self.shift = check_ints("shift", to_tuple("shift", shift, len(self.window_size)), least=0)
        if any(s >= w for s, w in zip(self.shift, self.window_size, strict=True)) or (
            any(self.shift) and kind != "block"
        ):
            raise ValueError(
                f"shift={self.shift} must be less than window_size={self.window_size}, and 0 for kind='grid'"
            )
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, out_dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rel_mlp: PositionMlp | None = None
        self.register_buffer("bias", None)
        if isinstance(rel_bias, str):
            check_choice("rel_bias", rel_bias, (True, False, "mlp"))
            self.rel_mlp = PositionMlp(num_heads, rel_hidden, len(self.window_size), rel_drop)
            self.register_parameter("rel_bias", None)
        elif rel_bias:
            self.rel_bias = nn.Parameter(torch.empty(num_heads, *(2 * w - 1 for w in self.window_size)))
            nn.init.normal_(self.rel_bias, std=0.02)
        else:
            self.register_parameter("rel_bias", None)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(grid_ranks=frozenset({len(self.window_size)}), grid_multiple=self._grid_multiple)

    @property
    def grid_step(self) -> tuple[int, ...]:
        return self.window_size

    @property
    def tables(self) -> dict[str, int]:
        """Tables of places, by how many of their last axes are places."""
        return {"rel_bias": len(self.window_size)}

    def _bias(self) -> Tensor | None:
        """(heads, S, S) inside a window."""
        if self.bias is not None:
            return self.bias
        table = self.rel_bias if self.rel_mlp is None else self.rel_mlp(self.window_size)
        return None if table is None else dense_window_bias(table, self.window_size)

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """The same with its bias laid out once."""
        out = copy.deepcopy(self).eval()
        out.bias = out._bias()
        out.register_parameter("rel_bias", None)
        out.rel_mlp = None
        return out

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        grid = tuple(x.shape[1:-1])
        check_windows(grid, self.window_size)
        windows = Windows(grid, self.window_size, self.kind, self._shift_on(grid))
        return attend_in_windows(self, x, windows, self._bias(), self.head_dim**-0.5, valid, mask)

    def _shift_on(self, grid: Sequence[int]) -> tuple[int, ...]:
        """How far windows are moved on a grid that they divide."""
        sides = zip(grid, self.window_size, self.shift, strict=True)
        return tuple(s if n > w or self.keep_shift else 0 for n, w, s in sides)

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor],
        num_heads: int | None = None,
        head_first: bool = False,
        window_size: PerAxis | None = None,
    ) -> dict[str, Tensor]:
        """From timm's ``AttentionCl`` or ``Attention2d`` (1x1 convolutions).

        A whole ``PartitionAttentionCl`` or ``PartitionAttention2d``, with its norms and MLP, becomes the state of a
        ``models.blocks.Block`` around this mechanism.

        Args:
            state_dict: ``qkv.*``, ``proj.*`` and ``rel_pos.relative_position_bias_table`` or ``rel_pos.mlp.*``.
            num_heads: needed when ``head_first`` and the table does not tell.
            head_first: timm's setting: True for its ``rw`` models, False for weights from TensorFlow (``tf``).
            window_size: needed for the flat table of a window that is not square.
        """
        check_flag("head_first", head_first)
        if num_heads is not None:
            check_int("num_heads", num_heads, least=1)
        theirs = Released(state_dict, "timm's AttentionCl, Attention2d or PartitionAttention")
        if "norm1.weight" in theirs:
            part = {m[1]: value for m, value in theirs.matching(r"attn\.(.+)")}
            inner = PartitionAttention.convert_state_dict(part, num_heads, head_first, window_size)
            return theirs.close({f"mixer.inner.{k}": v for k, v in inner.items()} | _around(theirs))
        theirs.leave(
            r"rel_pos\.(?:relative_position_index|rel_coords_log|height_lookup|width_lookup)", because="constants"
        )
        table_key = "rel_pos.relative_position_bias_table"
        out: dict[str, Tensor] = {}
        if table_key in theirs:
            table = theirs.take(table_key)
            if table.dim() == 2:  # Swin's form: (displacements, heads), query minus key
                sides = _table_sides(table.shape[0], window_size)
                table = table.t().reshape(table.shape[1], *sides).flip(*range(1, 1 + len(sides)))
            out["rel_bias"] = table
            if not table.numel():
                raise ValueError(f"{table_key} of state_dict must hold numbers, got {tuple(table.shape)}")
            num_heads = table.shape[0]
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            if f"rel_pos.mlp.{name}" in theirs:
                value = theirs.take(f"rel_pos.mlp.{name}")
                # It reads query minus key, which is odd in the displacement.
                out[f"rel_mlp.{name}"] = -value if name == "fc1.weight" else value
                num_heads = value.shape[0] if name.startswith("fc2") else num_heads

        def qkv(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
            if head_first:  # (heads, 3, D) -> (3, heads, D)
                if num_heads is None:
                    raise ValueError("num_heads is needed where head_first and state_dict has no relative table")
                value = value.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            return {match[0]: _flat(value)}

        rules: dict[str, Rule] = {
            r"qkv\.(?:weight|bias)": qkv,
            r"proj\.(?:weight|bias)": lambda match, value: {match[0]: _flat(value)},
        }
        return theirs.close(out | theirs.renamed(rules))


def _flat(value: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as that of a linear map; anything else as it is."""
    return value.flatten(1) if value.dim() > 2 else value


def _around(theirs: Released) -> dict[str, Tensor]:
    """Norms, layer scales and MLP of timm's blocks, in the names of ``models.blocks.Block``."""
    rules: dict[str, Rule] = {}
    for number, part in (("1", "mixer"), ("2", "mlp")):
        rules[rf"norm{number}\.(weight|bias)"] = rf"{part}.norm.\1"
        rules[rf"ls{number}\.gamma"] = f"{part}.scale.gamma"
    rules[r"mlp\.(fc[12]\.(?:weight|bias))"] = lambda match, value: {f"mlp.inner.{match[1]}": _flat(value)}
    return theirs.renamed(rules)


def _table_sides(entries: int, window_size: PerAxis | None) -> list[int]:
    """Sides of a flat table of displacements; a square one unless ``window_size`` says otherwise."""
    if window_size is None:
        side = math.isqrt(entries)
        sides = [side, side]
        hint = "that of a square window; give window_size"
    else:
        sides = [2 * w - 1 for w in _window_of("window_size", window_size, None)]
        hint = f"that of window_size={window_size}"
    if math.prod(sides) != entries:
        raise ValueError(f"relative_position_bias_table of state_dict has {entries} displacements, which is not {hint}")
    return sides


@register("maxvit", "max-sa", "multi-axis-attention")
class MaxSA(Mechanism):
    """Block attention, then grid attention: ``b + grid(norm(x + b))`` with ``b = block(x)``.

    With ``parallel``, both read ``x`` and give half of the channels each, ``[block(x), grid(x)]``, as in timm's
    ``ParallelPartitionAttention``.

    Args:
        dim: width of ``x``.
        num_heads: heads of each half; must divide ``dim``.
        window_size: sides ``P`` of a block.
        grid_size: sides ``G`` of the global grid; ``window_size`` by default.
        norm: LayerNorm before the grid half.
        norm_eps: of that norm; models trained by timm (``rw``) have 1e-6.
        layer_scale: start of a learned scale per channel of either half; ``None`` for none.
        parallel: the halves stand beside one another; then there is no norm.
        options: ``rank``, ``rel_bias``, ``qkv_bias``, ``proj_bias``, ``attn_drop``, ``proj_drop``, ``pad``,
            ``rel_hidden``, ``rel_drop``, ``attn_dim`` of :class:`PartitionAttention`.

    Reference: Tu et al., 2022, arXiv 2204.01697, section 3.2 and figure 3.

    >>> MaxSA(dim=16, num_heads=4, window_size=4)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    # No pairwise mask: a token that one half may not read could still arrive through the other.
    class_traits = PartitionAttention.class_traits.but(mask=False)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: PerAxis = 7,
        grid_size: PerAxis | None = None,
        norm: bool = True,
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        parallel: bool = False,
        **options: Any,
    ):
        super().__init__(dim)
        self.parallel, width = parallel, dim
        if parallel:
            check_divides("2 (halves)", 2, "dim", dim)
            width, norm = dim // 2, False
            options = {**options, "out_dim": width}
        if grid_size is None:
            grid_size = window_size
        else:
            _window_of("grid_size", grid_size, options.get("rank"))
        self.block = PartitionAttention(dim, num_heads, window_size, "block", **options)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if norm else nn.Identity()
        self.grid = PartitionAttention(dim, num_heads, grid_size, "grid", **options)
        self.block_scale, self.grid_scale = (
            nn.Identity() if layer_scale is None else LayerScale(width, layer_scale) for _ in range(2)
        )
        if len(self.block.window_size) != len(self.grid.window_size):
            raise ValueError(
                f"window_size={self.block.window_size} and grid_size={self.grid.window_size} must have as many axes"
            )

    @property
    def traits(self) -> Traits:
        halves = self.block.traits, self.grid.traits
        return halves[0].but(mask=False, grid_multiple=math.lcm(*(half.grid_multiple for half in halves)))

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if self.grid.pad == "refuse":
            check_windows(x.shape[1:-1], self.grid.window_size, "grid_size")
        local = self.block_scale(self.block(x, valid=valid))
        if self.parallel:
            return torch.cat([local, self.grid_scale(self.grid(x, valid=valid))], -1)
        return local + self.grid_scale(self.grid(self.norm(x + local), valid=valid))

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor],
        window_size: PerAxis | None = None,
        grid_size: PerAxis | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """From timm's ``MaxxVitBlock`` (``attn_block.attn.*``, ``attn_grid.norm1.*``, ``attn_grid.attn.*``).

        The MLPs, the first norm and the convolution of that block are no part of this mechanism and are left out by
        these names. A ``ParallelPartitionAttention`` (``attn_block.*`` and ``attn_grid.*``, with one norm and one MLP)
        becomes the state of a ``models.blocks.Block`` around a parallel pair. ``window_size``, ``grid_size`` (the same
        by default) and ``options`` as in :meth:`PartitionAttention.convert_state_dict`.
        """
        theirs = Released(state_dict, "timm's MaxxVitBlock or ParallelPartitionAttention")
        sizes = {"block": window_size, "grid": window_size if grid_size is None else grid_size}
        parallel = "attn_block.qkv.weight" in theirs
        out: dict[str, Tensor] = {}
        if parallel:
            if "ls1.gamma" in theirs:
                first, second = theirs.take("ls1.gamma").chunk(2)
                out = {"block_scale.gamma": first, "grid_scale.gamma": second}
        else:
            theirs.leave(
                r"conv\..*|attn_block\.norm1\..*|attn_(?:block|grid)\.(?:norm2|mlp|ls2)\..*",
                because="parts of the block around the mechanism",
            )
            rules: dict[str, Rule] = {
                r"attn_grid\.norm1\.(weight|bias)": r"norm.\1",
                r"attn_(block|grid)\.ls1\.gamma": r"\1_scale.gamma",
            }
            out = theirs.renamed(rules)
        for half, size in sizes.items():
            name = f"attn_{half}" if parallel else f"attn_{half}.attn"
            part = {m[1]: value for m, value in theirs.matching(rf"{re.escape(name)}\.(.+)")}
            if not part:
                raise ValueError(f"state_dict has no {name}.*, which timm's MaxxVitBlock has")
            converted = PartitionAttention.convert_state_dict(part, window_size=size, **options)
            out.update({f"{half}.{k}": v for k, v in converted.items()})
        if parallel:
            out = {f"mixer.inner.{k}": v for k, v in out.items()} | _around(theirs)
        return theirs.close(out)
