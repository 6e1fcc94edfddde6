"""Vision Mamba: patches and a class token in their middle under blocks that scan both ways; and its token pruning.

Zhu et al., 2024, "Vision Mamba", arXiv 2401.09417: blocks of one width, ``x <- x + bimamba(norm(x))`` with RMSNorm and
no MLP; the class token stands in the middle of the sequence, so that both ways reach it halfway.

Zhan et al., 2024, "Exploring Token Pruning in Vision State Space Models" (ToP-ViM), arXiv 2409.18962: behind chosen
blocks only the patches stay that the scans answered to most, ``s_t = sum_d max(0, y_td)``, and the class token. The
state goes on decaying at the places of those that were removed, so that what is left sees the state that it would have
seen: ``h_{p_k} = (prod_{p_{k-1} < t <= p_k} A_t) h_{p_{k-1}} + B x``.

Differs from the authors' code: scores are the clipped sums over both ways, where the release sums the way back alone,
unclipped and still in the order in which that way reads, which mirrors it; the class token is set apart in every
sample, there in the first alone; what is left keeps its order, there the class token moves to the new middle; and the
release has no alignment. ``compat="authors"`` does as it does. Any image size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...nn.layers import flat_valid
from ...nn.recompute import checkpointed
from ...nn.released import Released, Rule
from ...nn.scan.mamba import BiMamba, Mamba
from ..blocks import Block, Make, places
from ..build import register_models
from .stages import stage_indices
from .vit import PatchStem, TokenHead, VisionTransformer, grid_of

CLASS_TOKENS = ("middle", "first", "double", "none")
ALIGNMENTS = ("gap", "last", "none")


class OverlappingStem(PatchStem):
    """Patches that overlap: a convolution of stride ``stride`` without padding."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int):
        super().__init__(in_chans, dim, patch_size)
        self.size, self.step = patch_size, stride

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, in_chans) -> (B, (H - P) // stride + 1, (W - P) // stride + 1, dim), and which of these exist."""
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        x = F.conv2d(x.permute(0, 3, 1, 2), self.proj.weight, self.proj.bias, self.step).permute(0, 2, 3, 1)
        if valid is not None:
            valid = valid[:, :: self.step, :: self.step][:, : x.shape[1], : x.shape[2]]
        return x, valid


@dataclass(frozen=True)
class Remaining:
    """Which tokens are left, from block to block.

    Args:
        positions: (B, K) their places in the sequence; ``None`` while all are there.
        length: tokens that there were.
        align: how the state passes places that were removed.
        steps: of all tokens, where these are kept.
        scores: (B, K) what the last block's scans answered.
    """

    positions: Tensor | None
    length: int
    align: str
    compat: bool
    steps: tuple[Tensor, Tensor] | None = None
    scores: Tensor | None = None


class VimBlock(Block):
    """``x + bimamba(norm(x))`` on all tokens, or on those that are left."""

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Any = None,
    ) -> tuple[Tensor, Any]:
        """(B, K, C) -> the same; ``carry`` is a :class:`Remaining` where tokens are pruned."""
        if not isinstance(carry, Remaining):
            return super().forward(x, valid, carry, losses, layout)
        rest: Any = self.mixer
        call: dict[str, Any] = {}
        if carry.positions is not None and carry.align != "none":
            call = dict(positions=carry.positions, length=carry.length, steps=carry.steps)
        ways = rest.inner.both_ways(rest.norm(x), valid, **call)
        if carry.compat:
            scores = ways.back.flip(1).sum(-1)
        else:
            scores = (ways.ahead.clamp(min=0) + ways.back.clamp(min=0)).sum(-1)
        steps = tuple(t.detach() for t in ways.steps) if carry.align == "last" else None
        x = x + rest.drop_path(rest.scale(ways.y))
        return x, replace(carry, steps=steps, scores=scores.detach())  # type: ignore[arg-type]


class VimHead(TokenHead):
    """Reads the class token, the mean of two of them, or the last token where there is none."""

    pools = ("token", "avg", "max", "last", "logits", "")  # type: ignore[assignment]

    def __init__(self, dim: int, num_classes: int, pool: str, prefix: int, **options: Any):
        super().__init__(dim, num_classes, pool, prefix, True, **options)
        if not prefix and pool == "token":
            raise ValueError("global_pool='token' needs a class token; choose 'avg', 'max', 'last' or 'logits'")

    def forward(self, x: Tensor, valid: Tensor | None = None, pre_logits: bool = False) -> Tensor:
        """(B, prefix + N, C) or (B, h, w, C) -> (B, num_classes)."""
        if self.pool == "token" and self.prefix > 1:
            x = x[:, : self.prefix].mean(1, keepdim=True)
        elif self.pool in ("last", "logits"):
            x = x.flatten(1, -2)[:, self.prefix :]
            exists = flat_valid(valid)
            if self.pool == "logits":  # the largest logit of all patches
                y = self.drop(self.norm(x))
                y = y if pre_logits else self.fc(y)
                return (y if exists is None else y.masked_fill(~exists.unsqueeze(-1), float("-inf"))).amax(1)
            at = x.new_full((x.shape[0],), x.shape[1] - 1, dtype=torch.long)
            if exists is not None:
                at = (exists * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)
            x = x.gather(1, at.view(-1, 1, 1).expand(-1, 1, x.shape[2]))
            y = self.drop(self.norm(x[:, 0]))
            return y if pre_logits else self.fc(y)
        return super().forward(x, valid, pre_logits)


class VisionMamba(VisionTransformer):
    """Vision Mamba: tokens of one width under scans in both ways; perhaps with pruning.

    The model gives tokens as other vision transformers do, class tokens first; where these stand while it scans is
    ``class_token``. Patches that were pruned are zeros in the maps of later blocks.

    Args:
        class_token: in the ``"middle"`` of the patches, ``"first"``, or ``"double"``, one at each end; ``"none"``.
        settings: of :class:`attnlib.models.backbones.vit.VisionTransformer`.
    """

    def __init__(self, *args: Any, class_token: str = "middle", **settings: Any):
        self.place = check_choice_of_place(class_token)
        super().__init__(  # type: ignore[misc]
            *args, class_token=class_token != "none", reg_tokens=int(class_token == "double"), **settings
        )  # fmt: skip
        self.pruning: dict[int, float] = {}
        self.align, self.compat = "gap", False

    def prune(
        self, blocks: Sequence[int] = (), keep: float | Sequence[float] = 0.8, align: str = "gap",
        compat: str | None = None,
    ) -> VisionMamba:  # fmt: skip
        """Drop patches behind chosen blocks, from now on; returns the model.

        Args:
            blocks: numbers of the blocks, from 0, behind which patches leave; none for no pruning.
            keep: share of the patches that stays, of all these blocks or one each.
            align: how the state passes what was removed: decaying by the step of the next token that is left, once for
                each place (``"gap"``); by the steps that the removed tokens had in the last block that saw them
                (``"last"``); or not at all, as if they had never been there (``"none"``).
            compat: ``"authors"`` as the release prunes: see the module.

        Raises:
            ValueError: a share outside (0, 1], a block that is not there, blocks that do not scan both ways.
        """
        check_choice("align", align, ALIGNMENTS)
        if compat is not None:
            check_choice("compat", compat, ("authors",))
        chosen = stage_indices("prune_blocks", blocks, len(self.stages)) if len(blocks) else []
        shares = [keep] * len(chosen) if isinstance(keep, (int, float)) else list(keep)
        if len(shares) != len(chosen):
            raise ValueError(f"keep={shares} must have one number for each of prune_blocks={chosen}")
        for share in [keep] if isinstance(keep, (int, float)) else shares:
            check_real("keep", share, above=0, most=1)
        if chosen and any(not isinstance(b.mixer.inner, BiMamba) for b in self.stages):  # type: ignore[union-attr]
            raise ValueError(
                "prune_blocks: pruning reads the scans of bimamba, which not all blocks of this model have"
            )
        if compat and (self.place != "middle" or align != "none"):
            raise ValueError("compat='authors' is a class token in the middle and align='none'")
        self.pruning = dict(zip(chosen, shares, strict=True))
        self.align, self.compat = align, compat is not None
        return self

    def order(self, count: int) -> tuple[list[int], list[int]]:
        """Where each place of the sequence finds its token, class tokens first; and the inverse."""
        before = self.num_prefix_tokens
        patches = list(range(before, before + count))
        half = count // 2
        places_of = {
            "middle": [*patches[:half], 0, *patches[half:]], "first": [0, *patches], "double": [0, *patches, 1],
            "none": patches,
        }[self.place]  # fmt: skip
        inverse = [0] * len(places_of)
        for at, token in enumerate(places_of):
            inverse[token] = at
        return places_of, inverse

    def _tokens(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, int]]]:
        if self.place == "none" and not self.pruning:
            yield from super()._tokens(x, valid, losses, last)
            return
        self._check_images(x, valid)
        x, valid = self.stem(x.permute(0, 2, 3, 1), valid)
        grid = (x.shape[1], x.shape[2])
        at, beside = self.positions(grid), self._prefix()
        x = (x if at is None else x + at).flatten(1, 2)
        places_of, inverse = (torch.tensor(i, device=x.device) for i in self.order(x.shape[1]))
        exists = flat_valid(valid)
        if beside is not None:
            x = torch.cat([beside.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
            exists = None if exists is None else F.pad(exists, (beside.shape[1], 0), value=True)
        x, exists = x[:, places_of], None if exists is None else exists[:, places_of]
        fixed = places_of < self.num_prefix_tokens
        carry: Any = Remaining(None, x.shape[1], self.align, self.compat) if self.pruning else None
        for number, block in enumerate(self.stages[: None if last is None else last + 1]):  # type: ignore[union-attr]
            if getattr(block, "checkpointing", False) and torch.is_grad_enabled() and losses is None:
                x, carry = checkpointed(block, x, exists, carry, None, None)
            else:
                x, carry = block(x, exists, carry, losses, None)
            if number in self.pruning:
                x, exists, carry = self._drop(x, exists, carry, fixed, self.pruning[number])
            if not isinstance(carry, Remaining) or carry.positions is None:
                yield x[:, inverse], valid, grid
                continue
            yield self._spread(x, exists, carry, inverse, grid)

    def _drop(
        self, x: Tensor, exists: Tensor | None, carry: Remaining, fixed: Tensor, share: float
    ) -> tuple[Tensor, Tensor | None, Remaining]:
        """What is left behind a block, in its order."""
        assert carry.scores is not None
        batch, n, width = x.shape
        scores, beside = carry.scores, self.num_prefix_tokens
        patches = n - beside
        count = math.ceil(patches * share)
        if self.place == "middle" and (share < 1 or self.compat):
            count -= count % 2  # so that the class token stands in the middle
        if count < 1:
            raise ValueError(f"keep={share} leaves none of {patches} patches")
        positions = carry.positions
        if positions is None:
            positions = torch.arange(n, device=x.device).expand(batch, -1)
        if self.compat:
            scores = scores.clone()
            scores[:1, n // 2] = float("-inf")
            left = scores.topk(count, 1).indices.sort(1).values
            middle = left.new_full((batch, 1), n // 2)
            left = torch.cat([left[:, : count // 2], middle, left[:, count // 2 :]], 1)
        else:
            if exists is not None:
                scores = scores.masked_fill(~exists, float("-inf"))
            scores = scores.masked_fill(fixed[positions], float("inf"))
            left = scores.topk(count + beside, 1).indices.sort(1).values
        at = left.unsqueeze(-1).expand(-1, -1, width)
        exists = None if exists is None else exists.gather(1, left)
        return x.gather(1, at), exists, replace(carry, positions=positions.gather(1, left), scores=None)

    def _spread(
        self, x: Tensor, exists: Tensor | None, carry: Remaining, inverse: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """All tokens, class tokens first, zeros where there are none any more; and which patches are left."""
        assert carry.positions is not None
        batch, n, width = x.shape
        at = carry.positions
        whole = x.new_zeros(batch, carry.length, width).scatter(1, at.unsqueeze(-1).expand_as(x), x)[:, inverse]
        left = torch.ones(batch, n, dtype=torch.bool, device=x.device) if exists is None else exists
        left = left.new_zeros(batch, carry.length).scatter(1, at, left)[:, inverse]
        if self.compat:
            whole = torch.cat([x[:, (n - 1) // 2, None], whole[:, 1:]], 1)
        return whole, left[:, self.num_prefix_tokens :].unflatten(1, grid), grid


def check_choice_of_place(class_token: str) -> str:
    """``class_token``, if it is one."""
    check_choice("class_token", class_token, CLASS_TOKENS)
    return class_token


def vim(
    patch_size: int = 16,
    stride: int | None = None,
    embed_dim: int = 192,
    depth: int = 24,
    d_state: int = 16,
    kind: str = "v2",
    divide: bool = True,
    layer_scale: float | None = None,
    norm: str = "rms",
    class_token: str = "middle",
    positions: str = "all",
    prune_blocks: Sequence[int] = (),
    keep: float | Sequence[float] = 0.8,
    align: str = "gap",
    compat: str | None = None,
    mixer: Mapping[str, Any] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "token",
) -> VisionMamba:
    """A Vision Mamba.

    Args:
        patch_size: pixels per side of a patch.
        stride: pixels from patch to patch; ``patch_size`` by default.
        embed_dim, depth: width, blocks.
        d_state: numbers of state per channel.
        kind: ``"v2"``, ``"v1"``, or ``"none"`` for scans from left to right alone.
        divide: the sum of the two ways is halved.
        layer_scale: start of the mixers' gains; ``None`` for none.
        norm: ``"rms"`` or ``"layer"``.
        class_token: ``"middle"``, ``"first"``, ``"double"`` or ``"none"``.
        positions: ``"all"`` tokens have learned positions, or ``"none"``.
        prune_blocks, keep, align, compat: of :meth:`VisionMamba.prune`; no pruning by default.
        mixer: more settings of :class:`attnlib.nn.scan.mamba.BiMamba`.
        mechanism: as in :func:`attnlib.create_model`; it mixes the sequence.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate: as in :func:`attnlib.create_model`.
        global_pool: ``"token"`` reads the class token; ``"avg"`` and ``"max"`` pool the patches, ``"last"`` reads the
            last of them, ``"logits"`` takes the largest of their logits; ``""`` gives all.

    >>> model = vim(patch_size=8, embed_dim=16, depth=2, img_size=32, num_classes=5)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 5])
    """
    check_int("patch_size", patch_size, least=1)
    step = patch_size if stride is None else check_int("stride", stride, least=1)
    check_int("embed_dim", embed_dim, least=1)
    check_int("depth", depth, least=1)
    check_flag("divide", divide)
    check_choice("kind", kind, ("v2", "v1", "none"))
    check_choice("norm", norm, ("rms", "layer"))
    check_choice("positions", positions, ("all", "none"))
    check_choice_of_place(class_token)
    normed_by = functools.partial(nn.RMSNorm if norm == "rms" else nn.LayerNorm, eps=1e-5)
    given = {"d_state": d_state, **(mixer or {})}

    def own(place: Any) -> nn.Module:
        if kind == "none":
            return Mamba(place.dim, **given)
        return BiMamba(place.dim, kind, divide and kind == "v2", layer_scale, **given)

    make = mechanism or own
    (row,) = places([embed_dim], [depth], [1], [step], drop_path_rate)
    blocks = [VimBlock(p.dim, make(p), mlp_ratio=0, norm=normed_by, drop_path=p.drop_path) for p in row]
    beside = {"middle": 1, "first": 1, "double": 2, "none": 0}[class_token]
    head = VimHead(embed_dim, num_classes, global_pool, beside, norm=None, drop=drop_rate)
    overlap = step != patch_size
    stem = (
        OverlappingStem(in_chans, embed_dim, patch_size, step)
        if overlap
        else PatchStem(in_chans, embed_dim, patch_size)
    )
    model = VisionMamba(
        stem, blocks, embed_dim, step, normed_by(embed_dim), head, class_token=class_token, positions=positions,
        num_classes=num_classes, in_chans=in_chans, img_size=img_size,
    )  # fmt: skip
    if overlap and model.pos_embed is not None:
        sides = model.img_size
        if min(sides) < patch_size:
            raise ValueError(f"img_size={sides} must hold at least one patch of patch_size={patch_size}")
        model.pos_embed = nn.Parameter(torch.empty(embed_dim, *((side - patch_size) // step + 1 for side in sides)))
        nn.init.trunc_normal_(model.pos_embed, std=0.02)
    start(model)
    return model.prune(prune_blocks, keep, align, compat)


@torch.no_grad()
def start_tokens(model: VisionTransformer) -> None:
    """Initial values of stem, tokens and head as the authors have them."""
    weight = model.stem.proj.weight  # type: ignore[union-attr]
    nn.init.trunc_normal_(weight, std=weight[0].numel() ** -0.5 / 0.87962566103423978)  # type: ignore[arg-type, index, operator]
    for bias in (model.stem.proj.bias, getattr(model.head.fc, "bias", None)):  # type: ignore[union-attr]
        if bias is not None:
            nn.init.zeros_(bias)  # type: ignore[arg-type]
    if isinstance(model.head.fc, nn.Linear):
        nn.init.trunc_normal_(model.head.fc.weight, std=0.02)
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02)


@torch.no_grad()
def start_output(linear: nn.Linear, depth: int) -> None:
    """An output projection, divided by the square root of the number of blocks."""
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    linear.weight.div_(math.sqrt(depth))


@torch.no_grad()
def start(model: VisionMamba) -> None:
    """Initial values as the authors have them."""
    start_tokens(model)
    for block in model.stages:
        inner: Any = block.mixer.inner  # type: ignore[union-attr]
        if isinstance(inner, (BiMamba, Mamba)):
            start_output(inner.out_proj, len(model.stages))
            for linear in (inner.in_proj, inner.out_proj):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            if (back := getattr(inner, "back", None)) is not None:
                nn.init.zeros_(back.dt_proj.bias)


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``VisionMamba``, for whatever mechanism the blocks of ``model`` hold."""
    theirs = Released(state_dict, "VisionMamba")
    beside = model.num_prefix_tokens

    def positions(match: Any, value: Tensor) -> dict[str, Tensor]:
        order, _ = model.order(value.shape[1] - beside)
        standard = value[:, torch.tensor(order).argsort()]
        before, table = grid_of(standard, beside)
        return {"pos_embed": table} | ({} if before is None else {"prefix_pos_embed": before})

    out: dict[str, Tensor] = {}
    convert_inner = getattr(type(model.stages[0].mixer.inner), "convert_state_dict", None)
    if convert_inner is not None:
        out = theirs.parts(r"layers\.(\d+)\.mixer\.(.+)", r"stages.\1.mixer.inner", convert_inner)
    rules: dict[str, Rule] = {
        r"patch_embed\.proj\.(weight|bias)": r"stem.proj.\1",
        r"cls_token|cls_token_head": "cls_token",
        r"cls_token_tail": "reg_token",
        r"pos_embed": positions,
        r"layers\.(\d+)\.norm\.(weight|bias)": r"stages.\1.mixer.norm.\2",
        r"norm_f\.(weight|bias)": r"norm.\1",
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


_TINY, _SMALL, _BASE = dict(embed_dim=192), dict(embed_dim=384), dict(embed_dim=768)
_VIM: dict[str, dict[str, Any]] = {
    "vim_tiny": _TINY,
    "vim_tiny_stride8": _TINY | dict(stride=8),
    "vim_small": _SMALL,
    "vim_small_stride8": _SMALL | dict(stride=8),
    "vim_base": _BASE,
}
register_models(
    "vision-mamba",
    vim,
    _VIM,
    params={
        "vim_tiny": 7_148_008,
        "vim_tiny_stride8": 7_250_344,
        "vim_small": 25_796_584,
        "vim_small_stride8": 26_001_256,
        "vim_base": 97_598_440,
    },
    license="Apache-2.0",
    source="hustvl/Vim",
    convert=convert,
)

# The release prunes behind the 5th, 10th and 15th block of Vim-S, and behind the 10th and 20th of Vim-T.
register_models(
    "top-vim-token-pruning-ssm",
    vim,
    {"top_vim_tiny": _TINY | dict(prune_blocks=(9, 19)), "top_vim_small": _SMALL | dict(prune_blocks=(4, 9, 14))},
    params={"top_vim_tiny": 7_148_008, "top_vim_small": 25_796_584},
    license="Apache-2.0",
    source="ZLKong/ToP-ViM",
    convert=convert,
)
