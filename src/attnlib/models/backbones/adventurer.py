"""Adventurer: a causal Mamba-2 over patches, whose class token stands last and whose first token is the mean of all.

Wang et al., 2025, "Scaling Laws in Patchification", arXiv 2502.03738 (the models of its linear-cost experiments, down
to patches of one pixel). Every block reads ``[mean(y), y]`` with ``y = norm(x)``, in every second block with the order
of the patches reversed, drops what the mean became, and adds ``W_3 (silu(W_1 x) * W_2 x)``.

Differs from the authors' code: the released rule ``n // 2 == 1`` reverses the order in blocks 2 and 3 alone, where
its comment says every two blocks; ``compat="authors"`` does as the release. Any image size; tokens that do not exist
enter no mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...nn.layers import Mlp, flat_valid, masked_mean
from ...nn.recompute import checkpointed
from ...nn.released import Released, Rule, join
from ...nn.scan.mamba2 import Mamba2
from ..blocks import Block, Make, add_losses, mix, places
from ..build import register_models
from . import vim
from .vit import PatchStem, TokenHead, VisionTransformer, grid_of

HEAD_DIM = 64


class HeadedBlock(Block):
    """A block whose mechanism reads the mean of all tokens first, perhaps with the patches in reverse."""

    reverse = False

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Any = None,
    ) -> tuple[Tensor, Any]:
        """(B, N + 1, C), the class token last -> the same."""
        rest: Any = self.mixer
        y, exists = self._turned(rest.norm(x)), None if valid is None else self._turned(valid)
        mean = masked_mean(y, exists).unsqueeze(1)
        if exists is not None:
            exists = F.pad(exists, (1, 0), value=True)
        y, _, own = mix(rest.inner, torch.cat([mean, y], 1), None, None, exists)
        add_losses(losses, own)
        x = x + rest.drop_path(rest.scale(self._turned(y[:, 1:])))
        assert self.mlp is not None
        return self.mlp(x, valid)[0], carry

    def _turned(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1) if self.reverse else x


class Adventurer(VisionTransformer):
    """Patches, then the class token, under causal blocks; gives the class token first, as vision transformers do."""

    def _tokens(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, int]]]:
        self._check_images(x, valid)
        x, valid = self.stem(x.permute(0, 2, 3, 1), valid)
        grid = (x.shape[1], x.shape[2])
        at, beside = self.positions(grid), self._prefix()
        assert at is not None and beside is not None
        x = torch.cat([(x + at).flatten(1, 2), beside.expand(x.shape[0], -1, -1).to(x.dtype)], 1)
        flat = flat_valid(valid)
        exists = None if flat is None else F.pad(flat, (0, 1), value=True)
        for block in self.stages[: None if last is None else last + 1]:  # type: ignore[union-attr]
            if getattr(block, "checkpointing", False) and torch.is_grad_enabled() and losses is None:
                x, _ = checkpointed(block, x, exists, None, None, None)
            else:
                x, _ = block(x, exists, None, losses, None)
            yield torch.cat([x[:, -1:], x[:, :-1]], 1), valid, grid


def adventurer(
    patch_size: int = 16,
    embed_dim: int = 256,
    depth: int = 12,
    d_state: int = 64,
    expand: float = 2,
    head_dim: int = HEAD_DIM,
    norm: str = "rms",
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "token",
) -> Adventurer:
    """An Adventurer.

    Args:
        patch_size: pixels per side of a patch, down to 1.
        embed_dim, depth: width, blocks.
        d_state, expand, head_dim: of :class:`attnlib.nn.scan.mamba2.Mamba2`.
        norm: ``"rms"`` or ``"layer"``.
        compat: ``"authors"``: blocks 2 and 3 alone (from 0) read the patches in reverse; otherwise every second one.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate: as in :func:`attnlib.create_model`.
        global_pool: ``"token"`` reads the class token; ``"avg"`` and ``"max"`` pool the patches; ``""`` gives all.

    >>> model = adventurer(patch_size=8, embed_dim=16, depth=2, head_dim=8, d_state=4, img_size=32, num_classes=5)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 5])
    """
    check_int("patch_size", patch_size, least=1)
    check_choice("norm", norm, ("rms", "layer"))
    if compat is not None:
        check_choice("compat", compat, ("authors",))
    normed_by = functools.partial(nn.RMSNorm if norm == "rms" else nn.LayerNorm, eps=1e-5)

    def own(place: Any) -> nn.Module:
        return Mamba2(place.dim, d_state, expand=expand, head_dim=head_dim)

    make = mechanism or own
    (row,) = places([embed_dim], [depth], [1], [patch_size], drop_path_rate)
    blocks = []
    for place in row:
        mlp = Mlp(place.dim, hidden=int(place.dim * 2.5), gated=True, activation=nn.SiLU)
        # Stochastic depth as theirs has it: that of the place before.
        drop = row[max(0, place.depth - 1)].drop_path
        block = HeadedBlock(place.dim, make(place), mlp, norm=normed_by, drop_path=drop)
        block.reverse = place.depth // 2 == 1 if compat else place.depth % 2 == 1
        blocks.append(block)
    head = TokenHead(embed_dim, num_classes, global_pool, norm=None, drop=drop_rate)
    model = Adventurer(
        PatchStem(in_chans, embed_dim, patch_size), blocks, embed_dim, patch_size, normed_by(embed_dim), head,
        num_classes=num_classes, in_chans=in_chans, img_size=img_size,
    )  # fmt: skip
    vim.start_tokens(model)
    for block in blocks:
        inner: Any = block.mixer.inner
        if isinstance(inner, Mamba2):
            vim.start_output(inner.out_proj, depth)
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
    return model


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``Adventurer``, for whatever mechanism the blocks of ``model`` hold."""
    theirs = Released(state_dict, "Adventurer")

    def positions(match: Any, value: Tensor) -> dict[str, Tensor]:
        before, table = grid_of(value.roll(1, 1), 1)
        assert before is not None
        return {"pos_embed": table, "prefix_pos_embed": before}

    out: dict[str, Tensor] = {}
    convert_inner = getattr(type(model.stages[0].mixer.inner), "convert_state_dict", None)
    if convert_inner is not None:
        out |= theirs.parts(r"layers\.(\d+)\.mixer\.(.+)", r"stages.\1.mixer.inner", convert_inner)
    for block in range(len(model.stages)):
        out |= join(theirs, f"stages.{block}.mlp.inner.fc1", [f"layers.{block}.mlp.{n}" for n in ("w1", "w2")])
    rules: dict[str, Rule] = {
        r"patch_embed\.proj\.(weight|bias)": r"stem.proj.\1",
        r"cls_token": "cls_token",
        r"pos_embed": positions,
        r"layers\.(\d+)\.norm\.(weight|bias)": r"stages.\1.mixer.norm.\2",
        r"layers\.(\d+)\.norm_mlp\.(weight|bias)": r"stages.\1.mlp.norm.\2",
        r"layers\.(\d+)\.mlp\.w3\.(weight|bias)": r"stages.\1.mlp.inner.fc2.\2",
        r"norm_f\.(weight|bias)": r"norm.\1",
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=256), "small": dict(embed_dim=512), "base": dict(embed_dim=768),
    "large": dict(embed_dim=1024, depth=24),
}  # fmt: skip
register_models(
    "patchification-scaling",
    adventurer,
    {f"adventurer_{name}_patch{p}": size | dict(patch_size=p) for name, size in _SIZES.items() for p in (16, 1)},
    params={
        "adventurer_tiny_patch16": 11_608_840,
        "adventurer_tiny_patch1": 24_207_880,
        "adventurer_small_patch16": 44_491_816,
        "adventurer_small_patch1": 69_689_896,
        "adventurer_base_patch16": 98_657_608,
        "adventurer_base_patch1": 136_454_728,
        "adventurer_large_patch16": 346_196_200,
        "adventurer_large_patch1": 396_592_360,
    },
    source="wangf3014/Patch_Scaling",
    convert=convert,
)
