"""Agent attention: a few pooled queries read everything, and the queries read them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...grids import Layout, block_windows, crop_grid, flatten_grid, pad_to_multiple, unblock_windows
from ...ops.reduced import adaptive_pool_tokens, agent_attention
from ...types import Traits, check_choice, check_divides, to_tuple
from ..base import Mechanism
from ..layers import DepthwiseConv, flat_valid, merge_heads, plain, split_heads, through, zero_invalid
from ..registry import register
from ..released import Released, Rule, join

#: Side of the coarse bias tables, which are resized to every grid.
COARSE = 7


def _agent_grid(num_agents: int | Sequence[int], name: str = "num_agents") -> tuple[int, int]:
    if not isinstance(num_agents, int):
        rows, columns = to_tuple(name, num_agents, 2)
    else:
        rows = columns = math.isqrt(max(num_agents, 0))
        if rows * columns != num_agents or rows < 1:
            near = max(1, rows) ** 2
            raise ValueError(
                f"{name}={num_agents} is no square; possible: {near}, {(max(1, rows) + 1) ** 2}, or a pair "
                "(rows, columns)"
            )
    if min(rows, columns) < 1:
        raise ValueError(f"{name}={num_agents} must be at least 1 on each axis")
    return rows, columns


class AgentCore(nn.Module):
    """The operator with its position biases and its convolution, on queries, keys and values of one map or window.

    Args:
        dim: channels of all heads.
        num_heads: heads.
        agents: rows and columns of the agents.
        grid: the queries' grid that the fine bias tables are made for; other grids interpolate them.
        reduction: how much smaller the keys' grid is per side.
        extra_tokens: tokens beside the grid that have biases of their own.
        kernel_size: of the depthwise convolution on the values; 0 for none.
        scale: of both score maps; ``head_dim ** -0.5`` by default.
        table_agents: rows and columns of the agents that the bias tables are made for; other agents interpolate them.
        fixed: the tables keep the grid that they are made for, and are read row by row on any other of as many tokens.
    """

    #: Parameters that are tables of places, by how many of their last axes are places, and how they are interpolated.
    tables = {"ah_bias": 1, "aw_bias": 1, "ha_bias": 1, "wa_bias": 1}
    table_mode = "bilinear"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agents: tuple[int, int],
        grid: tuple[int, int],
        reduction: int = 1,
        extra_tokens: int = 0,
        kernel_size: int = 3,
        scale: float | None = None,
        table_agents: tuple[int, int] | None = None,
        fixed: bool = False,
    ):
        super().__init__()
        self.num_heads, self.agents, self.reduction, self.extra_tokens = num_heads, agents, reduction, extra_tokens
        kv_grid = [-(-side // reduction) for side in grid]
        self.grid, self.kv_grid, self.fixed = tuple(grid), tuple(kv_grid), fixed
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.table_agents = agents if table_agents is None else table_agents
        n = math.prod(self.table_agents)

        def table(*shape: int) -> nn.Parameter:
            p = nn.Parameter(torch.empty(num_heads, *shape))
            nn.init.trunc_normal_(p, std=0.02)
            return p

        self.an_bias, self.na_bias = table(n, COARSE, COARSE), table(n, COARSE, COARSE)
        self.ah_bias, self.aw_bias = table(n, kv_grid[0]), table(n, kv_grid[1])
        self.ha_bias, self.wa_bias = table(n, grid[0]), table(n, grid[1])
        if extra_tokens:
            self.ac_bias, self.ca_bias = table(n, extra_tokens), table(extra_tokens, n)
        self.dwc = DepthwiseConv(dim, kernel_size) if kernel_size else None
        self.read: Tensor | None
        self.write: Tensor | None
        self.register_buffer("read", None)
        self.register_buffer("write", None)

    @torch.no_grad()
    def deployed(self) -> AgentCore:
        """The same with its biases laid out once for its grid, extra tokens before it; other calls interpolate."""
        out = copy.deepcopy(self).eval()
        out.read, out.write = (t.contiguous() for t in self.biases(self.grid, self.kv_grid, self.extra_tokens, 0))
        return out

    def _for_agents(self, table: Tensor, axis: int = 1) -> Tensor:
        """A table (H, n, ...) for the agents that there are; ``axis`` is that of the agents."""
        if self.table_agents == self.agents:
            return table
        lines = table.movedim(axis, -1)
        maps = lines.reshape(1, -1, *self.table_agents)
        maps = F.interpolate(maps, size=self.agents, mode="bilinear")
        return maps.reshape(*lines.shape[:-1], math.prod(self.agents)).movedim(-1, axis)

    def _bias(self, coarse: Tensor, rows: Tensor, columns: Tensor, grid: Sequence[int]) -> Tensor:
        """(H, n, h, w): a coarse map, plus one part for rows and one for columns."""
        coarse, rows, columns = (self._for_agents(table) for table in (coarse, rows, columns))

        def resize(line: Tensor, size: int) -> Tensor:
            return line if line.shape[-1] == size else F.interpolate(line, size=size, mode="linear")

        fine = F.interpolate(coarse, size=tuple(grid), mode="bilinear")
        return fine + resize(rows, grid[0]).unsqueeze(-1) + resize(columns, grid[1]).unsqueeze(-2)

    def biases(self, grid: Sequence[int], kv_grid: Sequence[int], before: int, after: int) -> tuple[Tensor, Tensor]:
        """(H, n, M) of the agents' reading and (H, N, n) of the queries'; extra tokens stand around the grid."""
        if self.fixed:
            for given, made in ((grid, self.grid), (kv_grid, self.kv_grid)):
                if math.prod(given) != math.prod(made):
                    raise ValueError(
                        f"x has a map of {tuple(given)}, but compat='authors' keeps the biases of a map of {made}; it "
                        "serves maps of as many tokens only"
                    )
            grid, kv_grid = self.grid, self.kv_grid
        if self.read is not None and self.write is not None:
            if (tuple(grid), tuple(kv_grid), before, after) == (self.grid, self.kv_grid, self.extra_tokens, 0):
                return self.read, self.write
        read = self._bias(self.an_bias, self.ah_bias, self.aw_bias, kv_grid).flatten(2)
        write = self._bias(self.na_bias, self.ha_bias, self.wa_bias, grid).flatten(2).transpose(1, 2)
        if before + after:
            if self.extra_tokens:
                ac = self._for_agents(self.ac_bias).split([before, after], -1)
                ca = self._for_agents(self.ca_bias, 2).split([before, after], 1)
            else:
                heads, n, _ = read.shape
                ac = tuple(read.new_zeros(heads, n, extra) for extra in (before, after))
                ca = tuple(read.new_zeros(heads, extra, n) for extra in (before, after))
            read, write = torch.cat([ac[0], read, ac[1]], -1), torch.cat([ca[0], write, ca[1]], 1)
        return read, write

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Sequence[int],
        kv_grid: Sequence[int],
        before: int = 0,
        after: int = 0,
        valid: Tensor | None = None,
        kv_valid: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """(B, N, C) from q (B, N, C), k and v (B, M, C); ``before`` and ``after`` of the tokens lie beside the grid."""
        n, m = math.prod(grid), math.prod(kv_grid)
        inside, kv_inside = slice(before, before + n), slice(before, before + m)
        image = q[:, inside].unflatten(1, tuple(grid))
        there = None if valid is None else valid[:, inside].unflatten(1, tuple(grid))
        agents, agents_valid = adaptive_pool_tokens(image, self.agents, there)
        read, write = self.biases(grid, kv_grid, before, after)
        heads = [split_heads(t, self.num_heads) for t in (q, flatten_grid(agents)[0], k, v)]
        out = agent_attention(
            *heads, read_bias=read, write_bias=write, valid=kv_valid, agents_valid=flat_valid(agents_valid),
            scale=self.scale, dropout_p=dropout_p,
        )  # fmt: skip
        out = merge_heads(out)
        if self.dwc is None:
            return out
        values = v[:, kv_inside].unflatten(1, tuple(kv_grid))
        if kv_valid is not None:
            values = zero_invalid(values, kv_valid[:, kv_inside].unflatten(1, tuple(kv_grid)))
        if self.reduction > 1:
            # A map that the reduction did not divide was padded: resize to the padded size, then crop.
            size = [side * self.reduction for side in kv_grid]
            values = F.interpolate(values.movedim(-1, 1), size=size, mode="bilinear").movedim(1, -1)
            values = zero_invalid(crop_grid(values, grid), there)
        out[:, inside].add_(flatten_grid(self.dwc(values))[0])
        return out


@register("agent-attention", "agent")
class AgentAttention(Mechanism):
    """Agent attention, on images, with or without tokens beside them.

    With agents ``A``, the queries of the map averaged over a ``a x a`` grid::

        V_A = softmax(D^(-1/2) A K^T + B1) V
        y   = W_O (softmax(D^(-1/2) Q A^T + B2) V_A + DWConv(V))

    ``B1`` (agents by keys) and ``B2`` (queries by agents) are each a 7 x 7 table resized to the map plus one term per
    row and one per column. The paper's four hosts are settings:

    * DeiT: ``extra_tokens=1``, called with a layout; the class token has biases of its own and stays out of the pool
      and of the convolution.
    * PVT: ``sr_ratio`` (a strided convolution and a norm before keys and values; values are resized back for the
      depthwise convolution).
    * Swin: ``window_size`` and ``shift_size``; every window has its own agents. As published, cyclic shifts are not
      masked.
    * CSwin: ``window_size=((h1, w1), (h2, w2))``: half of the heads on windows of either shape.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        num_agents: a square number, or (rows, columns).
        grid: grid of the map, an int or a pair, that the row and column biases are made for; other grids interpolate.
            With windows it is the window.
        qkv_bias: biases of the query, key and value projections.
        sr_ratio: reduction of keys and values per side.
        extra_tokens: tokens beside the grid with biases of their own; without, such tokens get none.
        window_size: ``None`` for the whole map, an int or pair for windows, or a sequence of pairs for groups of heads.
            Maps that it does not divide are padded, and the padding masked.
        shift_size: cyclic shift before cutting windows.
        kernel_size: of the depthwise convolution on values; 0 for none.
        attn_drop: dropout of both attention weights in training.
        proj_drop: dropout after the output projection.
        scale: of both score maps; ``head_dim ** -0.5`` by default. The authors' ``qk_scale`` does nothing; their
            ``scale`` of detectors and segmenters is the exponent of ``head_dim``.
        bias_agents: agents that the bias tables are made for, a square number or (rows, columns); ``num_agents`` by
            default, and interpolated to them. Their detectors and segmenters keep the tables of the classifier and
            read with ``downstream_agent_shape`` agents.
        compat: ``"authors"`` keeps the bias tables on the square map that their PVT is built for: a map of other sides
            and as many tokens reads them row by row, although its rows are longer or shorter.

    Reference: Han et al., 2023, arXiv 2312.08874, equations 5 to 8.

    >>> import torch
    >>> AgentAttention(dim=16, num_heads=2, num_agents=4, grid=6)(torch.randn(2, 6, 6, 16)).shape
    torch.Size([2, 6, 6, 16])
    """

    zero_is_off = ("kernel_size",)
    class_traits = Traits(
        grid_ranks=frozenset({2}),
        layout=True,
        work={"N": 1, "agents": 1},
        memory={"N": 1, "agents": 1},
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_agents: int | Sequence[int] = 49,
        grid: int | Sequence[int] = 14,
        qkv_bias: bool = False,
        sr_ratio: int = 1,
        extra_tokens: int = 0,
        window_size: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        shift_size: int | Sequence[int] = 0,
        kernel_size: int = 3,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        scale: float | None = None,
        bias_agents: int | Sequence[int] | None = None,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_divides("num_heads", num_heads, "dim", dim)
        check_choice("compat", compat, (None, "authors"))
        agents = _agent_grid(num_agents)
        tables = agents if bias_agents is None else _agent_grid(bias_agents, "bias_agents")
        self.num_heads, self.num_agents, self.sr_ratio = num_heads, math.prod(agents), sr_ratio
        self.extra_tokens, self.attn_drop = extra_tokens, attn_drop
        self.shift_size = to_tuple("shift_size", shift_size, 2)
        if sr_ratio < 1 or extra_tokens < 0:
            raise ValueError(f"sr_ratio must be at least 1 and extra_tokens at least 0, got {sr_ratio}, {extra_tokens}")
        if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
            raise ValueError(f"kernel_size={kernel_size} is not possible; choose 0 or an odd number")
        self.windows: tuple[tuple[int, int], ...] = ()
        if window_size is not None:
            several = isinstance(window_size, Sequence) and any(isinstance(w, Sequence) for w in window_size)
            shapes: Sequence[Any] = window_size if several else [window_size]  # type: ignore[assignment]
            self.windows = tuple((w[0], w[1]) for w in (to_tuple("window_size", s, 2) for s in shapes))
            if min(min(w) for w in self.windows) < 1:
                raise ValueError(f"window_size={window_size} must be at least 1 on each axis")
            if sr_ratio > 1 or extra_tokens:
                raise ValueError("window_size cannot be combined with sr_ratio or extra_tokens")
            check_divides("number of window shapes", len(self.windows), "num_heads", num_heads)
        elif any(self.shift_size):
            raise ValueError(f"shift_size={shift_size} needs a window_size")
        base = to_tuple("grid", grid, 2)
        if min(base) < 1:
            raise ValueError(f"grid={grid} must be at least 1 on each axis")
        groups = max(1, len(self.windows))
        if sr_ratio > 1:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
        self.cores = nn.ModuleList(
            AgentCore(
                dim // groups, num_heads // groups, agents, shape, sr_ratio, extra_tokens,
                kernel_size, scale, tables, compat == "authors",
            )
            for shape in (self.windows or [base])
        )  # fmt: skip

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(layout=not self.windows)

    def mix(  # type: ignore[override]
        self, x: Tensor, *, layout: Layout | None = None, valid: Tensor | None = None
    ) -> Tensor:
        x = zero_invalid(x, valid)
        if self.windows:
            return through(self.proj_drop, self.proj(self._windowed(x, valid)))
        before = after = 0
        if layout is None:
            (flat, grid), exists = flatten_grid(x), flat_valid(valid)
        else:
            name = layout.grid_name()
            start, stop = layout.span(name)
            flat, grid, exists = x, layout.grid(name), valid
            before, after = start, x.shape[1] - stop
            if len(grid) != 2:
                raise ValueError(f"layout's grid {name!r} must have two axes, got {grid}")
            if self.extra_tokens and before + after != self.extra_tokens:
                raise ValueError(
                    f"layout has {before + after} tokens beside the grid, but this module was built with "
                    f"extra_tokens={self.extra_tokens}"
                )
        kv_grid, kv_exists = grid, exists
        if self.sr_ratio > 1:
            source, kv_grid, kv_exists = self._reduce(flat, grid, before, exists)
            q, (k, v) = self.q(flat), self.kv(source).chunk(2, -1)
        else:
            q, k, v = self._project(flat)
        drop = self.attn_drop if self.training else 0.0
        out = self.cores[0](q, k, v, grid, kv_grid, before, after, exists, kv_exists, drop)
        return through(self.proj_drop, self.proj(out)).reshape(x.shape)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each contiguous: pool, products and convolution would otherwise copy them."""
        if not plain(self.qkv):
            q, k, v = self.qkv(x).chunk(3, -1)
            return q, k, v
        weights = self.qkv.weight.chunk(3)
        biases = (None, None, None) if self.qkv.bias is None else self.qkv.bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        return q, k, v

    def _reduce(
        self, x: Tensor, grid: Sequence[int], before: int, exists: Tensor | None
    ) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
        """Keys' and values' source: the map through the strided convolution, tokens beside it as they are."""
        n, r = math.prod(grid), self.sr_ratio
        image = pad_to_multiple(x[:, before : before + n].unflatten(1, tuple(grid)), r)
        small = self.sr(image.movedim(-1, 1)).movedim(1, -1)
        kv_grid = tuple(small.shape[1:3])
        parts = [x[:, :before], small.flatten(1, 2), x[:, before + n :]]
        source = self.norm(torch.cat(parts, 1))
        if exists is None:
            return source, kv_grid, None
        cells = pad_to_multiple(exists[:, before : before + n].unflatten(1, tuple(grid)).unsqueeze(-1), r)
        some = block_windows(cells, r).flatten(3).any(-1).flatten(1)
        return source, kv_grid, torch.cat([exists[:, :before], some, exists[:, before + n :]], 1)

    def _windowed(self, x: Tensor, valid: Tensor | None) -> Tensor:
        grid = x.shape[1:3]
        shift = self.shift_size
        split = [t.chunk(len(self.windows), -1) for t in self._project(x)]
        outs = []
        for number, (window, core) in enumerate(zip(self.windows, self.cores, strict=True)):
            exists = valid
            if any(s % w for s, w in zip(grid, window, strict=True)) and exists is None:
                exists = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)

            def cut(t: Tensor, window: tuple[int, int] = window) -> tuple[Tensor, Tensor]:
                t = pad_to_multiple(t, window)
                if any(shift):
                    t = t.roll((-shift[0], -shift[1]), (1, 2))
                t = block_windows(t, window)
                return t, t.reshape(math.prod(t.shape[:3]), math.prod(window), t.shape[-1])

            (shape, q_w), (_, k_w), (_, v_w) = (cut(parts[number]) for parts in split)
            there = None if exists is None else cut(exists.unsqueeze(-1))[1].squeeze(-1)
            drop = self.attn_drop if self.training else 0.0
            out = core(q_w, k_w, v_w, window, window, valid=there, kv_valid=there, dropout_p=drop)
            out = unblock_windows(out.reshape(shape.shape))
            if any(shift):
                out = out.roll(shift, (1, 2))
            outs.append(crop_grid(out, grid))
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    # ---- weights

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], host: str | None = None) -> dict[str, Tensor]:
        """From the authors' ``AgentAttention`` of DeiT, PVT or Swin, or the attention part of their ``CSWinBlock``.

        Args:
            state_dict: theirs; of a ``CSWinBlock`` its norms and MLP are left out.
            host: ``"deit"``, ``"pvt"``, ``"swin"`` or ``"cswin"``; told from the names by default.
        """
        check_choice("host", host, (None, "deit", "pvt", "swin", "cswin"))
        theirs = Released(state_dict, "the authors' AgentAttention or CSWinBlock")
        cswin = any(key.startswith("attns.") for key in theirs) if host is None else host == "cswin"
        if cswin:
            theirs.leave(r"(?:norm1|norm2|mlp)\..*", because="parts of the block around the mechanism")
        core = r"attns\.(\d+)\." if cswin else "()"

        def put(shape: Callable[[Tensor], Tensor]) -> Rule:
            return lambda match, value: {f"cores.{match[1] or 0}.{match[2]}": shape(value)}

        rules: dict[str, Rule] = {
            rf"{core}(an_bias|na_bias)": put(lambda t: t),
            rf"{core}(ah_bias|aw_bias)": put(lambda t: t.squeeze(0).flatten(2)),
            rf"{core}(ha_bias|wa_bias)": put(lambda t: t.squeeze(0).flatten(1, 2).transpose(1, 2)),
            rf"{core}(ac_bias|ca_bias)": put(lambda t: t.squeeze(0)),
            rf"{core}(?:dwc|get_v)\.(weight|bias)": lambda m, value: {f"cores.{m[1] or 0}.dwc.{m[2]}": value},
            r"(qkv|proj)\.(weight|bias)": r"\1.\2",
        }
        if "sr.weight" in theirs:
            rules[r"(q|kv|sr|norm)\.(weight|bias)"] = r"\1.\2"
            return theirs.close(theirs.renamed(rules))
        return theirs.close(join(theirs, "qkv", ("q", "kv")) | theirs.renamed(rules))
