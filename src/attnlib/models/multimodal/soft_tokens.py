"""AiT's solver: every task's answer is a sequence of tokens of one vocabulary, fed back softly.

Ning et al., 2023, "All in Tokens: Unifying Output Space of Visual Tasks via Soft Token", arXiv 2301.02229. Features of
an image pass 6 encoder blocks; 6 decoder blocks write tokens behind a start token of the task. One table ``W`` embeds
tokens and, with a bias, scores them. What is fed back where a task writes codes of a VQ-VAE is

    hard: W[argmax z],    soft: sum over the task's own range of softmax(z)_k W_k,

and in training the true tokens. The parallel form writes all tokens at once from one learned embedding.

:class:`Vocabulary` is the one place that says which tokens mean what; probabilities never leave a range.

Differs from the authors' code: keys and values of the image are computed once, not at every step; the parallel form
takes one pass, where theirs takes one for every token; greedy writing draws no random number. Its end token
(``pred_eos``) is left out: it has fewer rows than scores there and cannot run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_real,
    check_size,
    check_type,
    check_valid,
    check_whole,
    check_within,
)
from ...masks import causal
from ...nn.layers import DropPath, Mlp, head_dim_of, merge_heads, split_heads, through
from ...nn.released import Released
from ...ops import attention
from ...positions import sines
from ..sampling import nucleus

#: What a task's number is in the authors' tables, and how they start a sequence of it; the fourth is unused.
TASKS = ("boxes", "objects", "depth")


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens mean what: places of box corners, classes, two specials, codes of masks and of depth.

    Args:
        num_bins: places along a side are ``0 .. num_bins``.
        num_classes: of objects.
        mask_codes, depth_codes: K of each VQ-VAE.
        other_codes: rows kept for further tasks, behind all others.

    >>> v = Vocabulary(num_bins=2000, num_classes=80, mask_codes=128, depth_codes=128)
    >>> v.ranges["depth"], v.noise, len(v)
    (range(2211, 2339), 2082, 2339)
    """

    num_bins: int = 2000
    num_classes: int = 80
    mask_codes: int = 128
    depth_codes: int = 128
    other_codes: int = 0

    def __post_init__(self) -> None:
        for name in ("num_bins", "num_classes", "mask_codes", "depth_codes"):
            check_int(name, getattr(self, name), least=1)
        check_int("other_codes", self.other_codes, least=0)

    @property
    def ranges(self) -> dict[str, range]:
        """Tokens by what they mean, in their order."""
        sizes = {
            "box": self.num_bins + 1, "class": self.num_classes, "special": 2, "mask": self.mask_codes,
            "depth": self.depth_codes, "other": self.other_codes,
        }  # fmt: skip
        out, start = {}, 0
        for name, size in sizes.items():
            out[name] = range(start, start + size)
            start += size
        return out

    @property
    def noise(self) -> int:
        """The label of what is no object."""
        return self.ranges["special"][1]

    def __len__(self) -> int:
        return self.ranges["other"].stop

    def own(self, name: str, x: Tensor) -> Tensor:
        """The part of (..., V) that belongs to one range."""
        check_choice("name", name, self.ranges)
        span = self.ranges[name]
        return x[..., span.start : span.stop]


class Written(NamedTuple):
    """What :meth:`Solver.write` wrote.

    ``tokens`` (B, T) numbers of the vocabulary; ``logits`` by range, (B, T_range, K) of the steps that wrote from it;
    ``scores`` (B, objects) the probabilities of the classes chosen, among all classes and noise.
    """

    tokens: Tensor
    logits: dict[str, Tensor]
    scores: Tensor


class _Heads(nn.Module):
    """Multi-head attention with separate projections, whose keys and values can be made beforehand."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def keys(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return split_heads(self.wk(_at(x, places)), self.num_heads), split_heads(self.wv(x), self.num_heads)

    def forward(
        self, x: Tensor, keys: tuple[Tensor, Tensor], ordered: bool = False, valid: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        q, (k, v) = split_heads(self.wq(_at(x, places)), self.num_heads), keys
        mask = causal() if ordered and q.shape[2] > 1 else None
        return self.proj(merge_heads(attention(q, k, v, mask=mask, valid=valid)))


def _at(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x + places


class _EncoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, drop_path: float, drop: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Heads(dim, num_heads)
        self.mlp = _mlp(dim, hidden, drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, valid: Tensor | None, places: Tensor | None = None) -> Tensor:
        z = self.norm1(x)
        x = x + self.drop_path(self.attn(z, self.attn.keys(z, places), valid=valid, places=places))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _DecoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, drop_path: float, drop: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn, self.crossattn = _Heads(dim, num_heads), _Heads(dim, num_heads)
        self.mlp = _mlp(dim, hidden, drop)
        self.drop_path = DropPath(drop_path)

    def image(self, z: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # The image passes the same norm as the tokens, as released.
        return self.crossattn.keys(self.norm2(z), places)

    def forward(
        self, x: Tensor, image: tuple[Tensor, Tensor], valid: Tensor | None, past: tuple[Tensor, Tensor] | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        z = self.norm1(x)
        k, v = self.attn.keys(z, places)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = x + self.drop_path(self.attn(z, (k, v), ordered=past is None, places=places))
        x = x + self.drop_path(self.crossattn(self.norm2(x), image, valid=valid, places=places))
        return x + self.drop_path(self.mlp(self.norm3(x))), (k, v)


def _mlp(dim: int, hidden: int, drop: float) -> Mlp:
    return Mlp(dim, hidden=hidden, norm=lambda _: nn.Dropout(drop))  # of the hidden layer only


class Solver(nn.Module):
    """Image features to tokens of a task.

    Args:
        in_dim: channels of the features.
        vocabulary: which tokens there are.
        dim, num_heads, hidden, encoder_depth, decoder_depth: of the transformer.
        grid: the largest (rows, columns) of features.
        max_length: tokens of a sequence, the start among them.
        num_tasks: start tokens and tables of positions.
        positions: of features: ``"sine"``, ``"sine-norm"`` of places as shares of the grid, or ``"learned"``.
        parallel: the embedding that stands for every token that is not known yet.
        drop, drop_path: in training.
        token_positions: tokens have positions, a table per task.
        inside: positions are added to queries and keys of every block, in place of what the first block reads.
        linear_drop_path: ``drop_path`` rises from 0 in the first block of encoder and decoder to its value in the last.

    >>> solver = Solver(8, Vocabulary(10, 3, 4, 4), 16, 2, 32, 1, 1, grid=(4, 4), max_length=20)
    >>> logits = solver(torch.randn(2, 4, 4, 8), "depth", torch.randint(18, 22, (2, 8)))
    >>> logits.shape, solver.write(torch.randn(2, 4, 4, 8), "depth", ["depth"] * 9).logits["depth"].shape
    (torch.Size([2, 9, 24]), torch.Size([2, 9, 4]))
    """

    def __init__(
        self, in_dim: int, vocabulary: Vocabulary | None = None, dim: int = 256, num_heads: int = 8, hidden: int = 1024,
        encoder_depth: int = 6, decoder_depth: int = 6, grid: tuple[int, int] = (20, 20), max_length: int = 2100,
        num_tasks: int = 4, positions: str = "sine", parallel: bool = False, drop: float = 0.1, drop_path: float = 0.1,
        token_positions: bool = True, inside: bool = False, linear_drop_path: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.vocabulary = Vocabulary() if vocabulary is None else vocabulary
        check_type("vocabulary", self.vocabulary, Vocabulary)
        head_dim_of(dim, num_heads)
        grid = check_size("grid", grid)
        for name, count in (("in_dim", in_dim), ("hidden", hidden)):
            check_int(name, count, least=1)
        for name, count in (("encoder_depth", encoder_depth), ("decoder_depth", decoder_depth)):
            check_int(name, count, least=0)
        for name, share in (("drop", drop), ("drop_path", drop_path)):
            check_real(name, share, least=0, below=1)
        check_flag("parallel", parallel)
        check_flag("token_positions", token_positions)
        check_flag("linear_drop_path", linear_drop_path)
        self.inside = check_flag("inside", inside)
        check_choice("positions", positions, ("sine", "sine-norm", "learned"))
        check_int("max_length", max_length, least=1)
        check_int("num_tasks", num_tasks, least=len(TASKS))
        if positions != "learned" and dim % 4:
            raise ValueError(f"dim={dim} must be a multiple of 4 for sine positions on two axes")
        self.in_dim, self.dim, self.grid = in_dim, dim, grid
        table = torch.empty(1, *grid, dim) if positions == "learned" else _places(grid, dim, positions == "sine-norm")
        if positions == "learned":
            self.enc_embed = nn.Parameter(table)
        else:
            self.register_buffer("enc_embed", table)
        self.mask_embed = nn.Parameter(torch.empty(1, 1, dim)) if parallel else None
        self.det_embed = nn.Parameter(torch.empty(num_tasks, 1, dim))
        self.voc_embed = nn.Parameter(torch.empty(len(self.vocabulary), dim))
        self.max_length = max_length
        self.dec_embed = nn.Parameter(torch.empty(num_tasks, max_length, dim)) if token_positions else None
        self.outp_bias = nn.Parameter(torch.empty(len(self.vocabulary)))
        self.input_proj, self.proj = nn.Linear(in_dim, dim), nn.Linear(dim, dim)

        def rates(depth: int) -> list[float]:
            return torch.linspace(0, drop_path, depth).tolist() if linear_drop_path else [drop_path] * depth

        self.encoder = nn.ModuleList(_EncoderBlock(dim, num_heads, hidden, p, drop) for p in rates(encoder_depth))
        self.decoder = nn.ModuleList(_DecoderBlock(dim, num_heads, hidden, p, drop) for p in rates(decoder_depth))
        self.stem_ln, self.encout_ln, self.proj_ln, self.proj_mlp_ln, self.norm = (nn.LayerNorm(dim) for _ in range(5))
        self.proj_mlp = _mlp(dim, hidden, drop)
        self.drop, self.drop_path = nn.Dropout(drop), DropPath(drop_path)
        for own in (self.det_embed, self.voc_embed, self.dec_embed, self.outp_bias, self.mask_embed):
            if own is not None:
                nn.init.trunc_normal_(own, std=0.02)
        if positions == "learned":
            nn.init.trunc_normal_(self.enc_embed, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    # ---- the image

    def see(self, x: Tensor, valid: Tensor | None = None) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Features (B, H, W, in_dim) -> what every decoder block reads, and which of it exists."""
        check_axes("x", x, B=None, H=None, W=None, in_dim=self.in_dim)
        check_float("x", x)
        rows, cols = x.shape[1:3]
        if not rows or not cols or rows > self.grid[0] or cols > self.grid[1]:
            raise ValueError(f"x has {rows} x {cols} features, but this solver has places for 1 x 1 to {self.grid}")
        check_valid("valid", valid, x.shape[:3])
        there = None if valid is None else valid.flatten(1)
        if there is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)  # type: ignore[union-attr]
        places = self.enc_embed[:, :rows, :cols].flatten(1, 2).to(x.dtype)
        z = self.stem_ln(self.input_proj(through(self.drop, x.flatten(1, 2))))
        if not self.inside:
            z = z + places
        own = places if self.inside else None
        for block in self.encoder:
            z = block(z, there, own)
        z = self.proj_ln(self.proj(self.encout_ln(z))) + places
        z = z + self.drop_path(self.proj_mlp(self.proj_mlp_ln(z)))
        own = own if self.dec_embed is not None else None  # as released: without a table none stands in the decoder
        images: list[tuple[Tensor, Tensor]] = [cast(_DecoderBlock, block).image(z, own) for block in self.decoder]
        return images, there

    def score(self, x: Tensor) -> Tensor:
        """States (..., dim) -> logits (..., V)."""
        x = self.norm(x)
        return x @ self.voc_embed.to(x.dtype).T + self.outp_bias.to(x.dtype)

    def _task(self, task: str | int, length: int) -> int:
        number = TASKS.index(task) if task in TASKS else task
        if isinstance(number, str):
            check_choice("task", task, TASKS)
        number = check_int("task", number, least=0, most=len(self.det_embed) - 1)
        if length > self.max_length and self.dec_embed is not None:
            raise ValueError(f"{length} tokens are more than max_length={self.max_length}")
        return number

    def _placed(self, z: Tensor, number: int, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, dim) from place ``first`` on as the first block reads them, and what is added inside."""
        if self.dec_embed is None:
            return z, None
        places = self.dec_embed[number, first : first + z.shape[1]].to(z.dtype)
        return (z, places) if self.inside else (z + places, None)

    def _start(self, number: int, like: Tensor, batch: int) -> Tensor:
        return self.det_embed[number].to(like).expand(batch, 1, -1)

    # ---- training

    def forward(
        self, x: Tensor, task: str | int, tokens: Tensor, valid: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Logits (B, T + 1, V) of the next token behind the start and behind each of the true tokens.

        Args:
            x: (B, H, W, in_dim) features.
            task: one of ``"boxes"``, ``"objects"``, ``"depth"``, or its number.
            tokens: (B, T) the true tokens but the last; the parallel form reads only how many there are.
            valid: (B, H, W) which features exist.
        """
        check_axes("tokens", tokens, B=x.shape[0], T=None)
        check_whole("tokens", tokens)
        check_within("tokens", tokens, len(self.vocabulary), "token")
        number = self._task(task, tokens.shape[1] + 1)
        images, there = self.see(x, valid)
        known = self.voc_embed[tokens.long()]
        if self.mask_embed is not None:
            known = self.mask_embed.expand_as(known)
        z = torch.cat([self._start(number, known, len(known)), known], 1).to(x.dtype)
        z, places = self._placed(z, number)
        for block, image in zip(self.decoder, images, strict=True):
            z, _ = block(z, image, there, places=places)
        return self.score(z)

    # ---- writing

    @torch.no_grad()
    def write(
        self, x: Tensor, task: str | int, plan: Sequence[str], soft: Sequence[str] = ("mask", "depth"),
        top_p: float = 0.0, valid: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> Written:  # fmt: skip
        """Write a sequence, token by token; in one pass with the parallel form.

        Args:
            x: (B, H, W, in_dim) features.
            task: as of :meth:`forward`.
            plan: the range that every token is from; a class is chosen among classes, noise lowers its score.
            soft: ranges whose tokens are fed back softly; ``()`` for hard ones throughout.
            top_p: tokens are drawn from the smallest set whose probability exceeds it; 0 takes the likeliest.
            valid: (B, H, W) which features exist.
            generator: of the draws.
        """
        for i, name in enumerate(plan):
            check_choice(f"plan[{i}]", name, self.vocabulary.ranges)
        for i, name in enumerate(soft):
            check_choice(f"soft[{i}]", name, self.vocabulary.ranges)
        check_real("top_p", top_p, least=0, most=1)
        if not plan:
            raise ValueError("plan is empty: it must name the range of every token to be written")
        number = self._task(task, len(plan))
        images, there = self.see(x, valid)
        written = _Writer(self.vocabulary, top_p, generator)
        z = self._start(number, x, len(x))
        if self.mask_embed is not None:
            z = torch.cat([z, self.mask_embed.to(z).expand(len(z), len(plan) - 1, -1)], 1)
            z, places = self._placed(z, number)
            for block, image in zip(self.decoder, images, strict=True):
                z, _ = block(z, image, there, places=places)
            logits = self.score(z)
            for i, name in enumerate(plan):
                written.choose(name, logits[:, i])
            return written.done()
        past: list[tuple[Tensor, Tensor]] = []
        for i, name in enumerate(plan):
            z, places = self._placed(z, number, i)
            held = []
            for j, (block, image) in enumerate(zip(self.decoder, images, strict=True)):
                z, kv = block(z, image, there, past[j] if past else None, places)
                held.append(kv)
            past = held
            token, own = written.choose(name, self.score(z)[:, 0])
            if name in soft:
                z = self.feed(name, own.softmax(-1)).unsqueeze(1).to(x.dtype)
            else:
                z = self.voc_embed[token].unsqueeze(1).to(x.dtype)
        return written.done()

    def feed(self, name: str, weights: Tensor) -> Tensor:
        """Weights (..., K) over one range -> the mean of its embeddings, (..., dim)."""
        check_choice("name", name, self.vocabulary.ranges)
        span = self.vocabulary.ranges[name]
        return weights @ self.voc_embed[span.start : span.stop].to(weights.dtype)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' ARTransformer, alone or within their AiT (their backbone and VQ-VAEs are left out)."""
        theirs = Released(state_dict, "the authors' ARTransformer")
        theirs.leave(r"(?:backbone|\w+_head\.vqvae)\..+", because="modules of their own, converted apart")
        theirs.leave(r"\w+_head\.(?:transformer\..+|loss_seq\.weight)", because="the same weights again, and settings")
        rules = {
            r"(?:transformer\.)?(enc_embed|mask_embed|det_embed|voc_embed|dec_embed|outp_bias)": r"\1",
            r"(?:transformer\.)?((?:en|de)coder)\.blocks\.(\d+\..+)": r"\1.\2",
            r"(?:transformer\.)?((?:input_proj|proj|stem_ln|encout_ln|proj_ln|proj_mlp_ln|norm|proj_mlp)\..+)": r"\1",
        }  # fmt: skip
        return theirs.close(theirs.renamed(dict(rules)))


class _Writer:
    """Tokens chosen so far."""

    def __init__(self, vocabulary: Vocabulary, top_p: float, generator: torch.Generator | None):
        self.vocabulary, self.top_p, self.generator = vocabulary, top_p, generator
        self.tokens: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.logits: dict[str, list[Tensor]] = {}

    def choose(self, name: str, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V) -> tokens (B,) of the range, and its own logits (B, K)."""
        own = self.vocabulary.own(name, logits)
        index = nucleus(own, self.top_p, self.generator)
        if name == "class":
            among = torch.cat([own, logits[:, self.vocabulary.noise, None]], 1).softmax(-1)
            self.scores.append(among.gather(1, index[:, None])[:, 0])
        token = index + self.vocabulary.ranges[name].start
        self.tokens.append(token)
        self.logits.setdefault(name, []).append(own)
        return token, own

    def done(self) -> Written:
        tokens = torch.stack(self.tokens, 1)
        held = {name: torch.stack(parts, 1) for name, parts in self.logits.items()}
        like = next(iter(held.values()))
        return Written(tokens, held, torch.stack(self.scores, 1) if self.scores else like.new_zeros(len(tokens), 0))


def _places(grid: tuple[int, int], dim: int, shares: bool = False) -> Tensor:
    """(1, rows, columns, dim) encodings of places, of rows in the first half; of shares of a side, up to 2 pi."""
    at = (torch.arange(n, dtype=torch.float32) for n in grid)
    rows, cols = (sines(p / max(len(p) - 1, 1) * 2 * math.pi if shares else p, dim // 2) for p in at)
    return torch.cat([rows[:, None].expand(*grid, -1), cols[None].expand(*grid, -1)], -1)[None]
