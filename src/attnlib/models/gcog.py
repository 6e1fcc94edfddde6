"""The models of gCOG: an instruction and a grid of objects to an answer (Ito et al., 2024, arXiv 2401.15030).

All but the recurrent ones are made of one block, with sine-cosine positions ``p`` and norms behind,

``e = W x + p``, ``a = LN(SA(e) + e)``, ``y = LN(MLP(a) + a)``,

and differ in where instruction and grid meet: in one sequence (``"single-stream"``, ``"multimodal"``), in the sum of
two last tokens (``"two-stream"``), in cross-attention from the instruction (``"cross"``), in latents that read first
the one and then the other (``"latent-cross"``, ``"perceiver"``), or in a recurrent state that sees the whole grid with
every row of the instruction (``"rnn"``, ``"gru"``). :mod:`attnlib.bench.data.gcog` has the task.

Ours differs from the released code: rows of an instruction that do not exist (``rule_valid``) are not read and do not
move the last token, where the release reads padding; with several blocks ``"multimodal"`` embeds once, where the
release embeds in every block and so needs its width to be that of its input.

>>> model = gcog_model("cross", dim=32, classes=35)
>>> model(torch.rand(4, 2, 8), torch.rand(4, 26, 3)).exp().sum(-1).allclose(torch.ones(4))
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_axes, check_choice, check_int, check_valid, check_within, checked
from ..nn.dense.softmax_attention import SoftmaxAttention
from ..nn.frame import HeadCall, HeadFrame, Notes
from ..nn.released import PLAIN, Released
from ..ops import attention
from ..positions import DenseBias, sincos

#: Positions of the instruction; ``"relative"`` ones are causal, as released.
POSITIONS = ("absolute", "relative")


class RelativeAttention(HeadFrame[Notes]):
    """Causal attention with a vector per distance, ``softmax((q_i k_j + q_i e_{i-j}) / sqrt(D))``, without output map.

    Args:
        dim, num_heads: see :class:`attnlib.nn.frame.HeadFrame`.
        max_len: distances that there are; longer sequences are refused.
    """

    def __init__(self, dim: int, num_heads: int = 1, max_len: int = 100):
        super().__init__(dim, num_heads, causal=True)
        self.distance = nn.Parameter(torch.randn(max_len, self.head_dim))
        self.proj = nn.Identity()  # type: ignore[assignment]

    def _mix_heads(self, q: Tensor, k: Tensor, v: Tensor, call: HeadCall, notes: Notes) -> Any:
        n, m, most = q.shape[2], k.shape[2], len(self.distance)
        if m > most:
            raise ValueError(f"x has {m} tokens; max_len={most} distances are possible")
        back = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
        near = (q @ self.distance.T).gather(-1, (most - 1 - back.clamp(min=0)).expand(*q.shape[:2], n, m))
        return attention(q, k, v, scale=self.scale, **call.but(bias=DenseBias(near * self.scale)).options())


def positions(at: Tensor, dim: int) -> Tensor:
    """(..., dim) sine and cosine of places ``at``, in turns."""
    table = sincos(at.reshape(-1, 1), dim)
    return table.view(*at.shape, 2, dim // 2).transpose(-1, -2).flatten(-2)


class GcogBlock(nn.Module):
    """``e = W x + p``, ``a = LN(SA(e) + e)``, ``y = LN(act(W_2 act(W_1 a)) + a)``.

    Args:
        dim: width.
        num_heads: heads.
        in_dim: width of what is embedded; ``None`` for no embedding.
        ratio: hidden width of the MLP over ``dim``.
        activation: of both its layers.
        where: ``"absolute"`` or ``"relative"``.
        max_len: of relative positions.
        pos_drop: dropout behind the absolute positions.
    """

    def __init__(
        self, dim: int, num_heads: int, in_dim: int | None = None, ratio: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU, where: str = "absolute", max_len: int = 100,
        pos_drop: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        check_choice("positions", where, POSITIONS)
        self.where = where
        self.embed = nn.Identity() if in_dim is None else nn.Linear(in_dim, dim)
        self.attention: nn.Module = (
            SoftmaxAttention(dim, num_heads) if where == "absolute" else RelativeAttention(dim, num_heads, max_len)
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), activation(), nn.Linear(ratio * dim, dim), activation())
        self.drop = nn.Dropout(pos_drop)

    def forward(self, x: Tensor, valid: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Tokens (B, N, in_dim) to (B, N, dim).

        Args:
            valid: (B, N) boolean, which tokens exist.
            at: places of the tokens (N,) or (B, N); those that exist in order by default.
        """
        x = self.embed(x)
        if self.where == "absolute":
            if at is None:
                at = torch.arange(x.shape[1], device=x.device) if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
            x = self.drop(x + positions(at, x.shape[-1]).to(x.dtype))
        x = self.norm1(self.attention(x, valid=valid) + x)
        return self.norm2(self.mlp(x) + x)


def last_token(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, C): the last of the tokens (B, N, C) that exist."""
    if valid is None:
        return x[:, -1]
    at = x.shape[1] - 1 - valid.flip(1).int().argmax(1)
    return x[torch.arange(len(x), device=x.device), at]


def _layers(*sizes: int) -> nn.Sequential:
    pairs = zip(sizes, sizes[1:], strict=False)
    return nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())))


class GcogModel(nn.Module):
    """What all of them share: widths, checks, the head and the loss.

    Args:
        dim: width.
        classes: answers.
        num_heads: of every attention.
        rule_dim, grid_dim: numbers per row of an instruction and per cell.
        positions: of the instruction, ``"absolute"`` or ``"relative"``.
        max_len: rows of an instruction, at most; of relative positions.
        pos_drop: dropout behind absolute positions; the release has this one, whatever its dropout says.
    """

    @checked
    def __init__(
        self, dim: int = 256, classes: int = 138, num_heads: int = 1, rule_dim: int = 8, grid_dim: int = 3,
        positions: str = "absolute", max_len: int = 100, pos_drop: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("dim", dim), ("classes", classes), ("rule_dim", rule_dim), ("grid_dim", grid_dim)):
            check_int(name, value, least=1)
        if dim % 2:
            raise ValueError(f"dim={dim} must be even: positions are pairs of sine and cosine")
        self.dim, self.num_heads, self.rule_dim, self.grid_dim = dim, num_heads, rule_dim, grid_dim
        self.block: dict[str, Any] = dict(num_heads=num_heads, pos_drop=pos_drop)
        self.of_rule: dict[str, Any] = dict(where=positions, max_len=max_len)
        self.head = nn.Linear(dim, classes)

    def forward(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, classes).

        Args:
            rule: (B, R, rule_dim), a row per operator, and the end.
            grid: (B, S, grid_dim), a row per cell, and the end.
            rule_valid: (B, R) boolean, which rows exist; at least one in each sample.
        """
        check_axes("rule", rule, B=None, R=None, rule_dim=self.rule_dim)
        check_axes("grid", grid, B=len(rule), S=None, grid_dim=self.grid_dim)
        check_valid("rule_valid", rule_valid, rule.shape[:2])
        return self.head(self.read(rule, grid, rule_valid)).log_softmax(-1)

    def read(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None) -> Tensor:
        """(B, dim), what the answer is told from."""
        raise NotImplementedError

    def loss(self, rule: Tensor, grid: Tensor, answer: Tensor, rule_valid: Tensor | None = None) -> dict[str, Tensor]:
        """``{"answer": ...}``: mean negative log-probability of the answers (B,)."""
        check_within("answer", answer, self.head.out_features, "classes")
        return {"answer": F.nll_loss(self(rule, grid, rule_valid), answer)}


class _TwoBlocks(GcogModel):
    """A block for the instruction and one for the grid."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.grid_block = GcogBlock(self.dim, in_dim=self.grid_dim, **self.block)
        self.rule_block = GcogBlock(self.dim, in_dim=self.rule_dim, **self.block, **self.of_rule)

    def read(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None) -> Tensor:
        return self.meet(self.rule_block(rule, rule_valid), self.grid_block(grid), rule_valid)

    def meet(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None = None) -> Tensor:
        """(B, dim) from the tokens of both."""
        raise NotImplementedError

    def _cross(self) -> SoftmaxAttention:
        return SoftmaxAttention(self.dim, self.num_heads)


class TwoStream(_TwoBlocks):
    """Last tokens of both through a layer each, summed, and an MLP ("DSTFMR")."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        dim = self.dim
        self.rule_out, self.grid_out = _layers(dim, dim), _layers(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = _layers(dim, 2 * dim, 2 * dim, dim)

    def meet(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None = None) -> Tensor:
        both = self.rule_out(last_token(rule, rule_valid)) + self.grid_out(grid[:, -1])
        return self.norm2(self.mlp(self.norm1(both)))


class Cross(_TwoBlocks):
    """The instruction's last token reads the grid: ``LN(MLP(LN(CA(r, g)) + r))``."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.cross = self._cross()
        self.norm1, self.norm2 = nn.LayerNorm(self.dim), nn.LayerNorm(self.dim)
        self.mlp = _layers(self.dim, self.dim, self.dim)

    def meet(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None = None) -> Tensor:
        asks = last_token(rule, rule_valid)  # no other row is read from
        return self.norm2(self.mlp(self.norm1(self.cross(asks[:, None], grid)[:, 0]) + asks))


class LatentCross(_TwoBlocks):
    """A zero latent reads the instruction, then the grid; one norm serves both."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.rule_cross, self.grid_cross = self._cross(), self._cross()
        self.norm = nn.LayerNorm(self.dim)

    def meet(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None = None) -> Tensor:
        latent = rule.new_zeros(len(rule), 1, self.dim)
        latent = self.norm(self.rule_cross(latent, rule, context_valid=rule_valid) + latent)
        return self.norm(self.grid_cross(latent, grid) + latent)[:, 0]


class Perceiver(_TwoBlocks):
    """Zero latents read the instruction, themselves, the grid, and themselves again; one norm and one self-attention.

    All latents start alike and stay so: their number changes nothing.
    """

    latents = 10

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        dim = self.dim
        self.rule_cross, self.grid_cross, self.among = self._cross(), self._cross(), self._cross()
        self.rule_norm, self.grid_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.rule_mlp, self.grid_mlp, self.mlp = _layers(dim, dim), _layers(dim, dim), _layers(dim, dim)

    def meet(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None = None) -> Tensor:
        latent = rule.new_zeros(len(rule), self.latents, self.dim)
        found = self.rule_norm(self.rule_cross(latent, rule, context_valid=rule_valid))
        latent = self.norm(self.rule_mlp(found) + found + latent)
        latent = self.norm(self.among(latent) + latent)
        found = self.grid_norm(self.grid_cross(latent, grid))
        latent = self.norm(self.grid_mlp(found) + found + latent)
        latent = self.norm(self.among(latent) + latent)
        return self.mlp(latent)[:, -1]


class _OneSequence(GcogModel):
    """Instruction and grid behind each other, in features of their own, read at the last cell."""

    def sequence(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, R + S, rule_dim + grid_dim), and which of these exist."""
        both = torch.cat([F.pad(rule, (0, self.grid_dim)), F.pad(grid, (self.rule_dim, 0))], 1)
        return both, None if rule_valid is None else F.pad(rule_valid, (0, grid.shape[1]), value=True)


class SingleStream(_OneSequence):
    """Blocks with a GELU MLP of four times the width; each adds the positions again ("SSTFMR").

    Args:
        depth: blocks.
        cells: of the grid, at most; of relative positions.
    """

    def __init__(self, *args: Any, depth: int = 1, cells: int = 101, **settings: Any):
        super().__init__(*args, **settings)
        check_int("depth", depth, least=1)
        long = {**self.of_rule, "max_len": self.of_rule["max_len"] + cells}
        self.embed = nn.Linear(self.rule_dim + self.grid_dim, self.dim)
        self.blocks = nn.ModuleList(
            GcogBlock(self.dim, ratio=4, activation=nn.GELU, **self.block, **long) for _ in range(depth)
        )

    def read(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None) -> Tensor:
        x, valid = self.sequence(rule, grid, rule_valid)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, valid)
        return x[:, -1]


class Multimodal(_OneSequence):
    """Blocks as of the two streams over the one sequence, then an MLP and a norm.

    Args:
        depth: blocks.
        cells: of the grid, at most; of relative positions.
    """

    def __init__(self, *args: Any, depth: int = 1, cells: int = 101, **settings: Any):
        super().__init__(*args, **settings)
        check_int("depth", depth, least=1)
        long = {**self.of_rule, "max_len": self.of_rule["max_len"] + cells}
        width = self.rule_dim + self.grid_dim
        self.blocks = nn.ModuleList(
            GcogBlock(self.dim, in_dim=None if i else width, **self.block, **long) for i in range(depth)
        )
        self.mlp = _layers(self.dim, self.dim, 2 * self.dim, self.dim)
        self.norm = nn.LayerNorm(self.dim)

    def read(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None) -> Tensor:
        x, valid = self.sequence(rule, grid, rule_valid)
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(self.mlp(x[:, -1]))


class Recurrent(GcogModel):
    """A recurrent layer sees a row of the instruction and the whole grid at every step.

    Args:
        cell: ``"rnn"`` (ReLU) or ``"gru"``.
        cells: rows of the grid, its end included; these are weights here.
    """

    def __init__(self, *args: Any, cell: str = "rnn", cells: int = 101, **settings: Any):
        super().__init__(*args, **settings)
        check_choice("cell", cell, ("rnn", "gru"))
        width = self.rule_dim + check_int("cells", cells, least=1) * self.grid_dim
        self.cells = cells
        self.layer: nn.Module = (
            nn.RNN(width, self.dim, nonlinearity="relu", batch_first=True) if cell == "rnn"
            else nn.GRU(width, self.dim, batch_first=True)
        )  # fmt: skip
        self.norm = nn.LayerNorm(self.dim)

    def read(self, rule: Tensor, grid: Tensor, rule_valid: Tensor | None) -> Tensor:
        if grid.shape[1] != self.cells:
            raise ValueError(f"grid has {grid.shape[1]} rows; this recurrent model was built for cells={self.cells}")
        every = grid.flatten(1)[:, None].expand(-1, rule.shape[1], -1)
        states, _ = self.layer(torch.cat([rule, every], -1))
        return self.norm(last_token(states, rule_valid))


#: Name -> how it is made of the settings.
MODELS: dict[str, Callable[..., GcogModel]] = {
    "rnn": lambda **s: Recurrent(cell="rnn", **s),
    "gru": lambda **s: Recurrent(cell="gru", **s),
    "single-stream": SingleStream,
    "multimodal": Multimodal,
    "two-stream": TwoStream,
    "cross": Cross,
    "latent-cross": LatentCross,
    "perceiver": Perceiver,
}


def gcog_model(name: str, **settings: Any) -> GcogModel:
    """One of :data:`MODELS`; settings as of :class:`GcogModel`, and ``depth`` or ``cells`` where a model has them.

    Raises:
        ValueError: no such model.
    """
    check_choice("name", name, MODELS)
    return MODELS[name](**settings)


_BLOCK = {
    r"w_embed\.(weight|bias)": r"embed.\1",
    r"layernorm0\.(weight|bias)": r"norm1.\1",
    r"layernorm1\.(weight|bias)": r"norm2.\1",
    r"(mlp\.\d\.(?:weight|bias))": r"\1",
    r"selfattention\.(key|value|query)\.(weight|bias)": lambda m, t: {f"attention.{m[1][0]}.{m[2]}": t},
    r"selfattention\.Er": r"attention.distance",
}


def _block(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    block = Released(theirs, "a block of gCOG")
    out = block.parts(r"(selfattention)\.((?:in_proj|out_proj).*)", "attention", _attention)
    out |= block.renamed(_BLOCK)  # type: ignore[arg-type]
    block.leave(r"pe\.pe", because="positions are computed")
    block.leave(r"selfattention\.mask", because="the causal order is a setting")
    return block.close(out)


def _attention(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    part = Released(theirs, "MultiheadAttention")
    return part.close(part.renamed(PLAIN))


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From any model of IBM/gcog with ``num_hidden`` equal to ``embedding_dim``."""
    theirs = Released(state_dict, "a model of gCOG")
    out = theirs.parts(r"(rule|stim)_transformer\.(.*)", r"\1_block", _block)
    out |= theirs.parts(r"(blocks\.\d+)\.(.*)", r"\1", _block)
    out |= theirs.parts(r"(rule|stim)_crossattention\.(.*)", r"\1_cross", _attention)
    out |= theirs.parts(r"()crossattention\.(.*)", r"cross", _attention)
    out |= theirs.parts(r"()latent_selfattention\.(.*)", r"among", _attention)
    out |= theirs.renamed(
        {
            r"w_out\.0\.(weight|bias)": r"head.\1",
            r"w_embed\.(weight|bias)": r"embed.\1",
            r"((?:weight|bias)_[ih]h_l0)": r"layer.\1",
            r"layernorm\.(weight|bias)": r"norm.\1",
            r"(rule|stim)_(?:fnn|ffn)\.0\.(weight|bias)": _side("rule_crossattention.in_proj_weight" in state_dict),
            r"(?:fnn|mlp)\.(\d)\.(weight|bias)": r"mlp.\1.\2",
            r"latent_ffn\.0\.(weight|bias)": r"mlp.0.\1",
            r"fnn_layernorm\.(weight|bias)": r"norm1.\1",
            r"fnnout_layernorm\.(weight|bias)": _side_norm("fnn_layernorm.weight" in state_dict),
            r"layernorm_mlp\.(weight|bias)": r"norm2.\1",
            r"layernorm_(rule|stim)crossattn\.(weight|bias)": r"\1_norm.\2",
        }
    )
    shared = "layernorm_latent.weight" in state_dict  # latents
    if shared and "latent_ffn.0.weight" not in state_dict:
        theirs.leave(r"layernorm_latent\.(weight|bias)", because="nothing reads it in TransformerCrossAttn")
    out |= theirs.renamed(
        {
            r"layernorm_crossattn\.(weight|bias)": r"norm.\1" if shared else r"norm1.\1",
            r"layernorm_latent\.(weight|bias)": r"norm.\1",
        }
    )
    return {name.replace("stim_", "grid_"): value for name, value in theirs.close(out).items()}


def _side(latents: bool) -> str:
    return r"\1_mlp.0.\2" if latents else r"\1_out.0.\2"


def _side_norm(two_streams: bool) -> str:
    return r"norm2.\1" if two_streams else r"norm.\1"
