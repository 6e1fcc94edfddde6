"""VM-UNet with multi-head scans: an encoder and a decoder of scanned maps, for the segmentation of images.

Ji, 2024, "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", arXiv 2406.05992, whose host is VM-UNet
(Ruan and Xiang, 2024, arXiv 2402.02491). The encoder has patches of 4 x 4 and Swin's merging between stages; the
decoder expands tokens to four, adds the map of the encoder that has the same sides, and ends with an expansion to
pixels. A block is a norm and a multi-head scan, without an MLP.

Differs from the authors' code: logits are returned, whose sigmoid is theirs for one class; any size, where expanded
maps are cut to the sides of the encoder's; the dice term for several classes is theirs without its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_ints, check_real, check_valid, describe
from ...grids import crop_grid
from ...nn.layers import Patchify, PatchMerging, zero_invalid
from ...nn.recompute import checkpointed
from ...nn.released import Released, Rule
from ...nn.scan.mhs_vm import MultiHeadScan
from ..backbones.stages import Stage
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from ..protocol import answering
from .heads import pixel_cross_entropy, resized_logits


class PatchExpanding(nn.Module):
    """One token to ``factor x factor``: linear map, its channels side by side as tokens, norm.

    Args:
        dim: width.
        factor: tokens along each side.
        widen: channels of the map over ``dim``; the tokens have ``dim * widen / factor**2``.
    """

    def __init__(self, dim: int, factor: int, widen: int):
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, widen * dim, bias=False)
        self.norm = nn.LayerNorm(widen * dim // factor**2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, factor H, factor W, C)."""
        p = self.factor
        x = self.expand(x).unflatten(3, (p, p, -1)).permute(0, 1, 3, 2, 4, 5)
        return self.norm(x.flatten(3, 4).flatten(1, 2))


class VMUNet(nn.Module):
    """VM-UNet: images (B, in_chans, H, W) to logits (B, num_classes, H, W).

    Args:
        embed_dims: width per stage of the encoder, each twice the one before; the decoder goes back.
        depths: blocks per stage of the encoder.
        decoder_depths: of the decoder, from the smallest map on.
        families, threshold, with_proj, state_dim: of :class:`attnlib.nn.scan.mhs_vm.MultiHeadScan`.
        num_classes: one for a foreground and its background.
        in_chans: channels of images; a single channel is repeated.
        img_size: unused; maps have any size.
        drop_path_rate: stochastic depth of the encoder's last block and the decoder's first.
        drop_rate: dropout of the scans.
        num_heads: heads per stage of another ``mechanism``; ``width / 32`` by default.
        mechanism: as in :func:`attnlib.create_model`.
    """

    head_names: Sequence[str] = ("classifier.",)
    input_name = "stem.proj.weight"

    def __init__(
        self,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        families: Sequence[str] = ("C", "X", "S", "Z"),
        threshold: float = 0.0,
        with_proj: bool = True,
        state_dim: int = 16,
        num_classes: int = 1,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 256,
        drop_path_rate: float = 0.2,
        drop_rate: float = 0.0,
        num_heads: Sequence[int] | None = None,
        mechanism: Make | None = None,
    ):
        super().__init__()
        dims = list(check_ints("embed_dims", tuple(embed_dims), least=1))
        if any(b != 2 * a for a, b in zip(dims, dims[1:], strict=False)) or dims[0] % 4:
            raise ValueError(f"embed_dims={tuple(dims)} must begin with a multiple of 4 and double from stage to stage")
        self.num_classes, self.in_chans = check_int("num_classes", num_classes, least=1), in_chans
        check_real("drop_rate", drop_rate, least=0, below=1)
        heads = [max(1, d // 32) for d in dims] if num_heads is None else list(num_heads)

        def own(place: Place) -> nn.Module:
            return MultiHeadScan(
                place.dim, families, threshold, with_proj, state_dim=state_dim, proj_drop=drop_rate
            )  # fmt: skip

        make = mechanism or own

        def blocks(row: list[Place]) -> list[nn.Module]:
            return [Block(p.dim, make(p), mlp_ratio=0, drop_path=p.drop_path) for p in row]

        steps = [4 * 2**i for i in range(len(dims))]
        self.stem = Patchify(in_chans, dims[0], 4)
        self.stages = nn.ModuleList(
            Stage(blocks(row), PatchMerging(row[0].dim // 2) if row[0].stage else None)
            for row in places(dims, depths, heads, steps, drop_path_rate)
        )
        # Stochastic depth falls over the decoder's blocks.
        up = places(dims[::-1], decoder_depths, heads[::-1], steps[::-1], drop_path_rate)
        rates = [p.drop_path for row in up for p in row][::-1]
        self.up = nn.ModuleList()
        self.expand = nn.ModuleList()
        for row in up:
            made = blocks([Place(p.dim, p.num_heads, p.stage, p.block, p.depth, p.stage_depth, rates[p.depth], p.stride)
                           for p in row])  # fmt: skip
            self.up.append(nn.ModuleList(made))
            if row[0].stage:
                self.expand.append(PatchExpanding(2 * row[0].dim, 2, 2))
        self.final = PatchExpanding(dims[0], 4, 4)
        self.classifier = nn.Conv2d(dims[0] // 4, num_classes, 1)
        init_weights(self, also=(MultiHeadScan,))

    checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the insides of blocks in the backward pass instead of keeping them."""
        self.checkpointing = check_flag("enable", enable)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes, H, W). ``valid``: (B, H, W), which pixels exist."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] not in (1, self.in_chans) or min(x.shape[2:]) < 1:
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) or (B, 1, H, W), got {describe(x)}")
        if valid is not None:
            check_valid("valid", valid, (x.shape[0], *x.shape[2:]))
        size = tuple(x.shape[2:])
        x = x.expand(-1, self.in_chans, -1, -1) if x.shape[1] != self.in_chans else x
        exists: list[Tensor | None] = []
        maps: list[Tensor] = []
        x, valid = self.stem(x.permute(0, 2, 3, 1).contiguous(), valid)
        for stage in self.stages:
            if stage.downsample is not None:  # the decoder adds what stages read behind their merging
                x, valid = stage.downsample(x, valid)  # type: ignore[operator]
            maps.append(x)
            exists.append(valid)
            for block in stage.blocks:  # type: ignore[union-attr, attr-defined]
                x, _ = checkpointed(block, x, valid, when=self.checkpointing)
        for i, made in enumerate(self.up):
            at = len(maps) - 1 - i
            if i:
                x = zero_invalid(x + maps[at + 1], exists[at + 1])
                x = crop_grid(self.expand[i - 1](x), maps[at].shape[1:3])
            for block in made:  # type: ignore[union-attr, attr-defined]
                x, _ = checkpointed(block, x, exists[at], when=self.checkpointing)
        return self.classifier(crop_grid(self.final(x), size).permute(0, 3, 1, 2))

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Terms of the loss by name; their sum is trained.

        Args:
            prediction: logits (B, num_classes, H, W).
            target: (B, H, W) whole numbers; of one class, 1 for the foreground.

        Returns:
            One class: ``{"bce": .., "dice": ..}``; several: ``{"cross_entropy": .., "dice": ..}``. Dice is one minus
            ``(2 <p, t> + s) / (|p| + |t| + s)``: per image with s = 1 and sums, or per class with s = 1e-5 and squares.
        """
        classes = self.num_classes
        if not isinstance(prediction, Tensor) or prediction.dim() != 4 or prediction.shape[1] != classes:
            raise ValueError(f"prediction must be logits (B, {classes}, H, W), got {describe(prediction)}")
        if classes > 1:
            entropy = pixel_cross_entropy(prediction, target, -1)
            share = prediction.softmax(1).transpose(0, 1).flatten(1)
            truth = F.one_hot(target.long().clamp(min=0), classes).movedim(-1, 0).flatten(1).to(share.dtype)
            top, below = 2 * (share * truth).sum(1) + 1e-5, share.square().sum(1) + truth.square().sum(1) + 1e-5
            return {"cross_entropy": entropy, "dice": (1 - top / below).mean()}
        whole = isinstance(target, Tensor) and not target.is_complex() and target.dim() == 3
        if not whole or target.shape != (prediction.shape[0], *prediction.shape[2:]):
            raise ValueError(f"target must be {(prediction.shape[0], *prediction.shape[2:])}, got {describe(target)}")
        truth = target.to(prediction.dtype).flatten(1)
        logits = prediction.flatten(1)
        share = logits.sigmoid()
        score = (2 * (share * truth).sum(1) + 1) / (share.sum(1) + truth.sum(1) + 1)
        return {"bce": F.binary_cross_entropy_with_logits(logits, truth), "dice": 1 - score.mean()}

    @answering
    def predict(self, x: Tensor, size: Sequence[int] | None = None, valid: Tensor | None = None) -> Tensor:
        """Classes (B, *size) of images, at their own size by default; of one class, whether a pixel is foreground."""
        logits = self(x, valid)
        if size is not None:
            size = check_ints("size", tuple(size), least=1)
            if len(size) != 2:
                raise ValueError(f"size={tuple(size)} must be a height and a width")
            logits = resized_logits(logits, size)
        return (logits[:, 0] > 0).long() if self.num_classes == 1 else logits.argmax(1)


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``VMUNet``."""
    theirs = Released(state_dict, "the authors' VM-UNet", ("vmunet.",))
    out: dict[str, Tensor] = {}
    rules: dict[str, Rule] = {}
    for part, ours in (("layers", r"stages.\1.blocks.\2"), ("layers_up", r"up.\1.\2")):
        block = rf"{part}\.(\d+)\.blocks\.(\d+)"
        attention = block + r"\.self_attention\.(.+)"
        out |= theirs.parts(attention, ours + ".mixer.inner", MultiHeadScan.convert_state_dict)
        rules[block + r"\.ln_1\.(weight|bias)"] = ours + r".mixer.norm.\3"
    rules |= {
        r"layers\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)": lambda match, value: {
            f"stages.{int(match[1]) + 1}.downsample.{match[2]}.{match[3]}": value
        },
        r"layers_up\.(\d+)\.upsample\.(norm|expand)\.(weight|bias)": lambda match, value: {
            f"expand.{int(match[1]) - 1}.{match[2]}.{match[3]}": value
        },
        r"patch_embed\.(proj|norm)\.(weight|bias)": r"stem.\1.\2",
        r"final_up\.(norm|expand)\.(weight|bias)": r"final.\1.\2",
        r"final_conv\.(weight|bias)": r"classifier.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


register_models(
    "mhs-vm",
    VMUNet,
    {"vmunet_mhs": dict(threshold=0.0), "vmunet_mhs_isic18": dict(threshold=0.5)},
    params={"vmunet_mhs": 17_257_129, "vmunet_mhs_isic18": 17_257_129},
    license="Apache-2.0",
    source="PixDeep/MHS-VM",
    convert=convert,
    img_size={"vmunet_mhs": 256, "vmunet_mhs_isic18": 256},
    task="segment",
)
