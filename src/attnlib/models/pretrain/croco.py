"""CroCo: the hidden patches of one picture, predicted from the few that are seen and from another view of the scene.

One encoder reads the seen patches of the first view (90 % are hidden) and all patches of the second; a decoder with
cross-attention to the second predicts the pixels of the first. Only hidden patches enter the loss. Positions are fixed
sines and cosines that are added (version 1) or rotary ones in every attention (version 2). Fine-tuned, the encoder
alone answers for one picture (:class:`CroCoMonocular`), both halves without a mask for two (:class:`CroCoBinocular`).

References: Weinzaepfel et al., 2022, "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View
Completion", arXiv 2210.10716; Weinzaepfel et al., 2023, "CroCo v2", arXiv 2211.10408; code: naver/croco.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_divides,
    check_flag,
    check_float,
    check_int,
    check_ints,
    check_real,
    check_type,
    describe,
)
from ...nn.released import Released
from ..build import register_models
from ..dense.dpt import DPTHead, from_dpt
from ..losses import SPREADS, laplacian_loss
from ..protocol import TaskModel, Terms
from .decoder import AsymmetricDecoder, TokenEncoder, init_like_mae
from .masks import check_mask, random_mask, take, visible_first
from .patches import (
    fixed_positions,
    from_patches,
    grid_coords,
    known_pixels,
    padded,
    patch_error,
    standardized,
    stretched,
    to_patches,
)

HEADS = ("linear", "dpt")


class Tokens(NamedTuple):
    """What an encoder says of a picture.

    Args:
        levels: (B, V, C) behind every block, the last normed.
        grid: (h, w) of its patches.
    """

    levels: list[Tensor]
    grid: tuple[int, int]


class PatchEncoder(nn.Module):
    """A ViT without a class token, of all patches or of those that are seen.

    Args:
        img_size: of the table of positions; other sizes stretch it.
        patch_size, in_chans: of pictures.
        dim, depth, num_heads, mlp_ratio: of the blocks.
        base: of rotary positions, or ``None`` for added ones.
    """

    def __init__(
        self, img_size: int | Sequence[int], patch_size: int, in_chans: int, dim: int, depth: int, num_heads: int,
        mlp_ratio: float, base: float | None,
    ):  # fmt: skip
        super().__init__()
        self.patch_size = check_int("patch_size", patch_size, least=1)
        self.in_chans = check_int("in_chans", in_chans, least=1)
        self.dim, self.base = check_int("dim", dim, least=1), base
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", dim)
        sides = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
        self.grid = (-(-sides[0] // patch_size), -(-sides[1] // patch_size))
        self.stem = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.body = TokenEncoder(dim, depth, num_heads, mlp_ratio, base)
        if base is None:
            fixed_positions(self.grid, dim)  # refuses widths that are too small

    def forward(self, images: Tensor, mask: Tensor | None = None, hidden: int = 0) -> Tokens:
        """Tokens of pictures (B, in_chans, H, W); with ``mask`` (B, N) of those that are not among the ``hidden``."""
        x = self.stem(padded(images, (self.patch_size,) * 2))
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).mT
        coords = None
        if self.base is None:
            x = x + stretched(fixed_positions(self.grid, self.dim).to(x), self.grid, grid)
        else:
            coords = grid_coords(grid, x.device)
        if mask is not None:
            seen = visible_first(mask)[:, : mask.shape[1] - hidden]
            x = take(x, seen)
            coords = None if coords is None else coords[seen]
        return Tokens(self.body(x, coords), grid)


class ViewDecoder(AsymmetricDecoder):
    """A decoder that reads another view.

    Args:
        grid: of the table of positions.
        in_dim, dim, depth, num_heads, mlp_ratio, base, norm_memory: of :class:`AsymmetricDecoder`.
    """

    def __init__(
        self, grid: tuple[int, int], in_dim: int, dim: int, depth: int, num_heads: int, mlp_ratio: float,
        base: float | None, norm_memory: bool,
    ):  # fmt: skip
        super().__init__(in_dim, dim, depth, num_heads, mlp_ratio, base, True, norm_memory)
        self.grid, self.base = grid, base

    def views(self, first: Tokens, second: Tokens, mask: Tensor | None = None) -> list[Tensor]:
        """(B, N, dim) behind every block, of all patches of the first view."""
        x, memory = self.placed(first.levels[-1], mask), self.embed(second.levels[-1])
        if self.base is None:
            x, memory = (
                t + stretched(fixed_positions(self.grid, self.dim).to(t), self.grid, grid)
                for t, grid in ((x, first.grid), (memory, second.grid))
            )
            return self(x, None, memory)
        return self(x, grid_coords(first.grid, x.device), memory, grid_coords(second.grid, x.device))


class Completed(NamedTuple):
    """What is said of a picture that was mostly hidden.

    Args:
        patches: (B, N, P C) of every patch.
        mask: (B, N) boolean, True for those that were hidden.
    """

    patches: Tensor
    mask: Tensor


class CroCo(TaskModel):
    """Cross-view completion.

    Args:
        img_size: of the tables of positions; any size from one patch up is taken.
        patch_size, in_chans: of pictures.
        dim, depth, num_heads: of the encoder.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
        mlp_ratio: of both.
        mask_ratio: share of patches that are hidden, ``int(mask_ratio * N)``.
        positions: ``"cosine"`` or ``"rotary"``.
        rotary_base: of wavelengths, for the latter.
        norm_memory: a norm of the second view in every block of the decoder.
        norm_targets: patches are standardized before they are compared.
        masked: hidden patches alone are compared; else all of them.

    Shape:
        image1, image2: (B, in_chans, H, W), of any sizes. Returns :class:`Completed`. Sides that are no multiple of the
        patch are filled with zeros, which no loss sees.

    >>> model = CroCo(32, 8, dim=16, depth=1, num_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    >>> model(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)).patches.shape
    torch.Size([2, 16, 192])
    """

    def __init__(
        self, img_size: int | Sequence[int] = 224, patch_size: int = 16, in_chans: int = 3, dim: int = 768,
        depth: int = 12, num_heads: int = 12, decoder_dim: int = 512, decoder_depth: int = 8, decoder_heads: int = 16,
        mlp_ratio: float = 4.0, mask_ratio: float = 0.9, positions: str = "cosine", rotary_base: float = 100.0,
        norm_memory: bool = True, norm_targets: bool = False, masked: bool = True,
    ):  # fmt: skip
        super().__init__()
        check_choice("positions", positions, ("cosine", "rotary"))
        self.mask_ratio = check_real("mask_ratio", mask_ratio, above=0, below=1)
        self.norm_targets, self.masked = check_flag("norm_targets", norm_targets), check_flag("masked", masked)
        base = None
        if positions == "rotary":
            base = check_real("rotary_base", rotary_base, above=0)
            for name, heads, width in (("num_heads", num_heads, dim), ("decoder_heads", decoder_heads, decoder_dim)):
                if width % (4 * heads):
                    raise ValueError(
                        f"{name}={heads} of width {width} must have head widths that are multiples of 4 for rotary "
                        "positions on two axes"
                    )
        self.encoder = PatchEncoder(img_size, patch_size, in_chans, dim, depth, num_heads, mlp_ratio, base)
        self.decoder = ViewDecoder(
            self.encoder.grid, dim, decoder_dim, decoder_depth, decoder_heads, mlp_ratio, base,
            check_flag("norm_memory", norm_memory),
        )  # fmt: skip
        self.head = nn.Linear(decoder_dim, patch_size**2 * in_chans)
        init_like_mae(self)

    def grid_of(self, image: Tensor) -> tuple[int, int]:
        """(h, w) patches of a picture."""
        return _grid(self.encoder, image)

    def draw_mask(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, N) boolean, True for hidden."""
        h, w = self.grid_of(image)
        device = image.device if generator is None else generator.device
        return random_mask(len(image), h * w, ratio=self.mask_ratio, generator=generator, device=device).to(
            image.device
        )

    def forward(self, image1: Tensor, image2: Tensor, mask: Tensor | None = None) -> Completed:
        """Complete the first view.

        Args:
            image1, image2: (B, in_chans, H, W).
            mask: (B, N) or (B, h, w) boolean, True for hidden, equally many of every sample; drawn by default. In an
                export it must hide ``int(mask_ratio * N)``.

        Raises:
            ValueError: pictures of other channels or numbers, a mask that hides nothing or everything.
        """
        for name, image in (("image1", image1), ("image2", image2)):
            _check_image(name, image, self.encoder)
        if len(image1) != len(image2):
            raise ValueError(f"image1 and image2 must be equally many, got {len(image1)} and {len(image2)}")
        h, w = self.grid_of(image1)
        if mask is None:
            mask = self.draw_mask(image1)
        mask, hidden = check_mask(mask, len(image1), (h, w), int(self.mask_ratio * h * w))
        first, second = self.encoder(image1, mask, hidden), self.encoder(image2)
        return Completed(self.head(self.decoder.views(first, second, mask)[-1]), mask)

    def loss(self, prediction: Completed, target: Tensor) -> Terms:
        """``pixels``: mean squared error of hidden patches, or of all.

        Args:
            prediction: of :meth:`forward`.
            target: the first view, (B, in_chans, H, W).
        """
        _check_image("target", target, self.encoder)
        size = self.encoder.patch_size
        counted = prediction.mask if self.masked else torch.ones_like(prediction.mask)
        return {"pixels": patch_error(prediction.patches, target, counted, size, self.norm_targets)}

    def predict(self, image1: Tensor, image2: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, in_chans, H, W): the first view, its hidden patches as they are predicted."""
        found, size = self(image1, image2, mask), self.encoder.patch_size
        rows, patches = to_patches(image1, size), found.patches
        if self.norm_targets:  # means and deviations are not predicted: those of the picture are taken
            _, mean, deviation = standardized(rows, known_pixels(image1, size))
            patches = patches * deviation + mean
        rows = torch.where(found.mask.unsqueeze(-1), patches.to(rows.dtype), rows)
        return from_patches(rows, image1.shape[2:], size)


def _grid(encoder: PatchEncoder, image: Tensor) -> tuple[int, int]:
    size = encoder.patch_size
    return -(-image.shape[2] // size), -(-image.shape[3] // size)


def _check_image(name: str, image: Any, encoder: PatchEncoder) -> None:
    check_axes(name, image, B=None, C=encoder.in_chans, H=None, W=None)
    check_float(name, image)
    if not image.shape[2] or not image.shape[3]:
        raise ValueError(f"{name} must have pixels, got {describe(image)}")


class PixelHead(nn.Module):
    """Pixels from tokens: a linear map per patch of the last level, or a DPT of four levels.

    Args:
        kind: ``"linear"`` or ``"dpt"``.
        dims: width of every level.
        patch_size: of the tokens; 16 for ``"dpt"``.
        out_channels: of the answer.
        levels: which four a DPT reads.
        settings: of :class:`attnlib.models.dense.dpt.DPTHead`.
    """

    def __init__(
        self, kind: str, dims: Sequence[int], patch_size: int, out_channels: int, levels: Sequence[int], **settings: Any
    ):
        super().__init__()
        check_choice("head", kind, HEADS)
        self.patch_size, self.out_channels = patch_size, check_int("out_channels", out_channels, least=1)
        self.levels = check_ints("levels", levels, least=0, most=len(dims) - 1)
        self.linear: nn.Linear | None = None
        self.dpt: DPTHead | None = None
        if kind == "linear":
            if settings:
                raise TypeError(f"head='linear' takes no {sorted(settings)}")
            self.linear = nn.Linear(dims[-1], patch_size**2 * out_channels)
            return
        if patch_size != 16:
            raise ValueError(f"head='dpt' gives 16 pixels per patch, but patch_size={patch_size}")
        self.dpt = DPTHead([dims[level] for level in self.levels], out_channels, **settings)

    def forward(self, found: Sequence[Tensor], grid: tuple[int, int], size: Sequence[int]) -> Tensor:
        if self.linear is not None:
            return from_patches(self.linear(found[-1]), tuple(size), self.patch_size, self.out_channels)
        assert self.dpt is not None
        return self.dpt([found[level].mT.unflatten(2, grid) for level in self.levels], size)


class _Downstream(TaskModel):
    def loss(self, prediction: Tensor, target: Tensor) -> Terms:
        """``l1`` where the target is finite.

        Raises:
            ValueError: another shape, or no finite place.
        """
        if not isinstance(target, Tensor) or target.shape != prediction.shape:
            raise ValueError(f"target must be {tuple(prediction.shape)}, got {describe(target)}")
        known = target.isfinite()
        if not bool(known.any()):
            raise ValueError("target has no finite place to learn from")
        gap = torch.where(known, prediction - torch.where(known, target, 0.0), 0.0)
        return {"l1": gap.abs().sum() / known.sum()}


class CroCoMonocular(_Downstream):
    """The encoder of a CroCo and a head that answers for every pixel of one picture.

    Args:
        model: a CroCo, whose weights are copied.
        out_channels: of the answer.
        head: ``"linear"`` per patch, or ``"dpt"``.
        levels: which four blocks a DPT reads; equally spread by default, as in the release.
        settings: of the DPT.

    Shape:
        image: (B, in_chans, H, W) -> (B, out_channels, H, W).
    """

    def __init__(
        self, model: CroCo, out_channels: int = 1, head: str = "linear", levels: Sequence[int] | None = None,
        **settings: Any,
    ):  # fmt: skip
        super().__init__()
        check_type("model", model, CroCo, "a CroCo")
        self.encoder = copy.deepcopy(model.encoder)
        depth = len(self.encoder.body.blocks)
        if levels is None:
            levels = [max(depth - 1 - i * (depth // 4), 0) for i in range(3, -1, -1)]
        dims = [self.encoder.dim] * depth
        self.head = PixelHead(head, dims, self.encoder.patch_size, out_channels, levels, **settings)
        self.head.to(self.encoder.stem.weight)  # where the model is, and in its type

    def forward(self, image: Tensor) -> Tensor:
        _check_image("image", image, self.encoder)
        found = self.encoder(image)
        return self.head(found.levels, found.grid, image.shape[2:])


class CroCoBinocular(_Downstream):
    """A CroCo that hides nothing, and a head that answers for every pixel of the first picture (flow, disparity).

    Args:
        model: a CroCo, whose weights are copied.
        out_channels: of the answer: 1 for disparity, 2 for flow.
        head: ``"linear"`` per patch, or ``"dpt"``.
        levels: which four blocks, of the encoder and then of the decoder, a DPT reads; as in the release by default.
        spread: one more channel says how far to trust the others, by a Laplacian: ``"log"``, ``"bounded"`` or
            ``"bounded-log"``, as :func:`attnlib.models.losses.laplacian_loss` reads it. In the release the stereo of
            ETH3D, flow, and the other stereo; ``None``: there is none.
        most: of that loss.
        settings: of the DPT.

    Shape:
        image1, image2: (B, in_chans, H, W) -> (B, out_channels, H, W), or one channel more.
    """

    def __init__(
        self, model: CroCo, out_channels: int = 1, head: str = "linear", levels: Sequence[int] | None = None,
        spread: str | None = None, most: float | None = None, **settings: Any,
    ):  # fmt: skip
        super().__init__()
        check_choice("spread", spread, (None, *SPREADS))
        self.spread, self.most = spread, None if most is None else check_real("most", most, above=0)
        self.out_channels = check_int("out_channels", out_channels, least=1)
        check_type("model", model, CroCo, "a CroCo")
        self.encoder, self.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
        self.decoder.mask_token = None
        depth, more = len(self.encoder.body.blocks), len(self.decoder.blocks)
        if levels is None:
            step = {8: 3, 12: 4, 24: 8}.get(more, max(more // 3, 1))
            levels = [max(depth + more - 1 - i * step, 0) for i in range(3, -1, -1)]
        dims = [self.encoder.dim] * depth + [self.decoder.dim] * more
        channels = out_channels + (spread is not None)
        self.head = PixelHead(head, dims, self.encoder.patch_size, channels, levels, **settings)
        self.head.to(self.encoder.stem.weight)  # where the model is, and in its type

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:
        for name, image in (("image1", image1), ("image2", image2)):
            _check_image(name, image, self.encoder)
        if image1.shape[0] != image2.shape[0]:
            raise ValueError(f"image1 and image2 must be equally many, got {len(image1)} and {len(image2)}")
        first, second = self.encoder(image1), self.encoder(image2)
        return self.head([*first.levels, *self.decoder.views(first, second)], first.grid, image1.shape[2:])

    def loss(self, prediction: Tensor, target: Tensor) -> Terms:
        """``l1`` where the target is finite; with a spread ``laplacian``.

        Raises:
            ValueError: another shape, or no finite place.
        """
        if self.spread is None:
            return super().loss(prediction, target)
        check_axes("prediction", prediction, B=None, C=self.out_channels + 1, H=None, W=None)
        answer, spread = prediction[:, :-1], prediction[:, -1:]
        return {"laplacian": laplacian_loss(answer, spread, target, self.spread, self.most)}

    def predict(  # type: ignore[override]
        self, image1: Tensor, image2: Tensor, tile: int | tuple[int, int] | None = None, overlap: float = 0.5,
        trust: tuple[float, float] = (15.0, 3.0),
    ) -> Tensor:  # fmt: skip
        """(B, out_channels, H, W), at once or from tiles, which are weighed by ``exp(-a (2 sigmoid(c / b) - 1))``.

        Args:
            image1, image2: (B, in_chans, H, W), of one size.
            tile: sides of tiles, one for both or (height, width); no larger than the pictures are.
            overlap: share of a tile that its neighbour covers at least, from 0 to below 1.
            trust: a and b, with c the channel of the spread; 15 and 3 are the release's for stereo, 10 and 5 for flow.
                Without a spread all weigh the same.
        """
        a, b = (check_real(f"trust[{i}]", v, least=0) for i, v in enumerate(trust))
        check_real("overlap", overlap, least=0, below=1)
        if image1.shape != image2.shape:
            raise ValueError(f"image2 must be of the shape of image1, {tuple(image1.shape)}, got {describe(image2)}")
        if tile is None:
            return self(image1, image2)[:, : self.out_channels]
        sides = check_ints("tile", (tile,) * 2 if isinstance(tile, int) else tile, least=1)
        rows, columns = (_windows(n, min(s, n), overlap) for n, s in zip(image1.shape[2:], sides, strict=True))
        total = image1.new_zeros(len(image1), self.out_channels, *image1.shape[2:])
        weights = image1.new_zeros(len(image1), 1, *image1.shape[2:])
        for row in rows:
            for column in columns:
                made = self(image1[..., row, column], image2[..., row, column])
                answer, c = made[:, : self.out_channels], made[:, self.out_channels :]
                weight = torch.exp(-a * (2 * (c / b).sigmoid() - 1)) if self.spread else torch.ones_like(made[:, :1])
                total[..., row, column] += answer * weight
                weights[..., row, column] += weight
        return total / weights


def _windows(total: int, side: int, overlap: float) -> list[slice]:
    """Equally spread windows over an axis, the first at its start and the last at its end."""
    count = 1 + math.ceil((total - side) / ((1 - overlap) * side))
    starts = [round(i * (total - side) / max(count - 1, 1)) for i in range(count)]
    return [slice(start, start + side) for start in starts]


def convert(state_dict: Any, model: nn.Module) -> dict[str, Tensor]:
    """From the authors' ``CroCoNet`` and its two downstream forms with a DPT.

    Tables of fixed positions are computed here; the keys and values of cross-attention become one map.
    """
    theirs = Released(state_dict, "the authors' CroCoNet")
    theirs.leave(r"enc_pos_embed|dec_pos_embed", "fixed tables, which are computed")
    rules: dict[str, str | Callable[[re.Match[str], Tensor], dict[str, Tensor]]] = {
        r"patch_embed\.proj\.(.*)": r"encoder.stem.\1",
        r"enc_blocks\.(.*)": r"encoder.body.blocks.\1",
        r"enc_norm\.(.*)": r"encoder.body.norm.\1",
        r"mask_token": lambda match, value: {"decoder.mask_token": value.flatten()},
        r"decoder_embed\.(.*)": r"decoder.embed.\1",
        r"dec_blocks\.(\d+)\.norm_y\.(.*)": r"decoder.blocks.\1.norm_memory.\2",
        r"dec_blocks\.(\d+)\.cross_attn\.projq\.(.*)": r"decoder.blocks.\1.cross.q.\2",
        r"dec_blocks\.(\d+)\.cross_attn\.proj\.(.*)": r"decoder.blocks.\1.cross.proj.\2",
        r"dec_norm\.(.*)": r"decoder.norm.\1",
        r"prediction_head\.(.*)": r"head.\1",
    }
    out: dict[str, Tensor] = {}
    for match, key in theirs.matching(r"dec_blocks\.(\d+)\.cross_attn\.projk\.(.*)"):
        value = theirs.take(match.string.replace("projk", "projv"))
        out[f"decoder.blocks.{match[1]}.cross.kv.{match[2]}"] = torch.cat([key, value])
    out |= theirs.renamed(rules)  # type: ignore[arg-type]
    out |= theirs.renamed({r"dec_blocks\.(.*)": r"decoder.blocks.\1"})
    out |= theirs.parts(r"head\.dpt\.(.*)", "head.dpt", from_dpt)
    return theirs.close(out)


_V2: dict[str, Any] = dict(positions="rotary")
register_models(
    "croco",
    CroCo,
    {
        "croco_base": {},
        "croco_v2_base_small_decoder": _V2,
        "croco_v2_base": dict(_V2, decoder_dim=768, decoder_depth=12, decoder_heads=12),
        "croco_v2_large": dict(
            _V2, dim=1024, depth=24, num_heads=16, decoder_dim=768, decoder_depth=12, decoder_heads=12
        ),
    },
    params={
        "croco_base": 120_076_288, "croco_v2_base_small_decoder": 120_076_288, "croco_v2_base": 200_269_824,
        "croco_v2_large": 417_918_720,
    },
    license="CC-BY-NC-SA-4.0",
    source="naver/croco",
    convert=convert,  # type: ignore[arg-type]
    task="pretrain",
)  # fmt: skip
