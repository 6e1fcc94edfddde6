"""UniFormerV2: an image transformer armed for clips; before training it is the mean of what it says of the frames.

Li et al., 2022, "UniFormerV2: Spatiotemporal Learning by Arming Image ViTs with Video UniFormer", arXiv 2211.09552.
The image transformer is CLIP's: patches without bias, a class token, a norm before the blocks, ``x sigmoid(1.702 x)``
in its MLPs. With tokens x (B, T, 1 + h w, C), of which c_t is the class token of a frame:

    x <- x + L(x)              along time, patches alone; L = U a V BatchNorm, ``a`` a convolution over three frames
    x <- x + attention(LN x)   within every frame
    x <- x + L'(x)             along time again
    x <- x + MLP(LN x)

    y = x + DPE(x)             behind chosen blocks; DPE a depthwise 3 x 3 x 3 convolution of the patches
    q <- q + attention(LN q, LN y),   q <- q + MLP(LN q)

One learned token q reads all tokens of all frames, layer by layer; the head reads
``(1 - sigmoid(b)) q + sigmoid(b) mean_t c_t`` with b per channel. U, the output of the attention of q and that of its
MLP start at zero, as q and b do: the head then reads half of mean_t c_t, which its LayerNorm undoes.

:func:`from_clip` builds one from any ``CLIPVisionModel`` of transformers.

Differs from the authors' code: images of any size and form, where theirs reads every map as a square; clips of any
length; stochastic depth drops a branch of a whole clip, where theirs drops it for one token of all frames and clips,
and in the blocks of q for the whole batch; no setting depends on the number of frames.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints, check_real, describe
from ...grids import Layout
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import (
    DropPath,
    MapNorm,
    Mlp,
    PositionalConv,
    QuickGELU,
    init_like_torch,
    masked_mean,
    normed,
    zero_invalid,
)
from ...nn.local.uniformer import LocalRelation
from ...nn.recompute import checkpointed
from ...nn.released import Released, Rule
from ..blocks import Make, Residual, add_losses, mix, places
from ..build import register_models
from .stages import Head
from .uniformer import ClipPatchify, inflate
from .vit import VisionTransformer, beside_patches, grid_of

ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class ClipBlock(nn.Module):
    """A block of an image transformer that looks along time before its attention and behind it.

    Args:
        dim: width.
        mixer: attention of the tokens of one frame.
        mlp: called as ``mlp(x, valid)``.
        local: 0, 1 (before attention) or 2 (behind it as well) relations along time.
        hidden: channels of these.
        norm: makes the norms of attention and MLP.
        drop_path: stochastic depth.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp: nn.Module, local: int, hidden: int, norm: Any, drop_path: float = 0.0
    ):
        super().__init__()

        def along_time() -> Residual:
            relation = LocalRelation(dim, (3, 1, 1), 3, hidden)
            nn.init.zeros_(relation.proj.weight)
            nn.init.zeros_(relation.proj.bias)
            return Residual(dim, relation, MapNorm, drop_path)

        self.before = along_time() if local else None
        self.mixer = Residual(dim, mixer, norm, drop_path)
        self.between = along_time() if local > 1 else None
        self.mlp = Residual(dim, mlp, norm, drop_path)
        self.checkpointing = False

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, T, P + h w, C) -> the same, and the carry; ``valid`` (B, T, P + h w): which tokens exist."""
        assert layout is not None
        x = self._along(self.before, x, valid, layout)
        frames = normed(self.mixer.norm, x, None).flatten(0, 1)
        own = None if valid is None else valid.flatten(0, 1)
        y, carry, made = mix(self.mixer.inner, frames, None, carry, own, layout)
        add_losses(losses, made)
        x = x + self.mixer.drop_path(y.view_as(x))
        x = self._along(self.between, x, valid, layout)
        return self.mlp(x)[0], carry

    @staticmethod
    def _along(part: Residual | None, x: Tensor, valid: Tensor | None, layout: Layout) -> Tensor:
        """``part`` on the patches of all frames."""
        if part is None:
            return x
        first, grid = layout.span("image")[0], layout.grid("image")
        exists = None if valid is None else valid[..., first:].unflatten(-1, grid)
        patches, _ = part(x[..., first:, :].unflatten(-2, grid), exists)
        return torch.cat([x[..., :first, :], patches.flatten(-3, -2)], -2)


class Reader(nn.Module):
    """One token reads all tokens of a clip: position of the patches, attention, MLP.

    Args:
        dim: width.
        num_heads: heads.
        mlp: called as ``mlp(x, valid)``, with a layer ``fc2`` at its end.
        norm: makes norms.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, num_heads: int, mlp: Mlp, norm: Any, drop_path: float = 0.0):
        super().__init__()
        self.position = PositionalConv(dim, 3, 3)
        nn.init.zeros_(self.position.conv.bias)  # type: ignore[arg-type]
        self.norm, self.context_norm = norm(dim), norm(dim)
        self.attention = _attention(dim, num_heads)
        self.mlp = Residual(dim, mlp, norm, drop_path)
        nn.init.xavier_uniform_(mlp.fc1.weight)
        for last in (self.attention.proj, mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, token: Tensor, x: Tensor, valid: Tensor | None, layout: Layout) -> Tensor:
        """(B, 1, C) and the tokens (B, T, P + h w, C) of a level -> (B, 1, C)."""
        first, grid = layout.span("image")[0], layout.grid("image")
        patches, beside = x[..., first:, :].unflatten(-2, grid), x[..., :first, :]
        exists = None if valid is None else valid[..., first:].unflatten(-1, grid)
        y = torch.cat([beside, self.position(patches, exists).flatten(-3, -2)], -2).flatten(1, 2)
        own = None if valid is None else valid.flatten(1)
        read = self.attention(self.norm(token), self.context_norm(y), context_valid=own)
        return self.mlp(token + self.drop_path(read))[0]


class ClipReader(nn.Module):
    """What is read of a clip: by one token, layer by layer, and the mean class token of its frames.

    Args:
        dim: width.
        readers: one :class:`Reader` per chosen block.
        frames: whether the mean class token is mixed in, with learned shares.
    """

    def __init__(self, dim: int, readers: Sequence[Reader], frames: bool = True):
        super().__init__()
        self.readers = nn.ModuleList(readers)
        self.video_token = nn.Parameter(torch.zeros(1, 1, dim)) if readers else None
        self.balance = nn.Parameter(torch.zeros(dim)) if readers and frames else None

    def start(self, batch: int) -> Tensor | None:
        """(B, 1, C): the token before it reads."""
        return None if self.video_token is None else self.video_token.expand(batch, -1, -1)

    def forward(self, token: Tensor | None, first: Tensor, exists: Tensor | None) -> Tensor:
        """The token that has read, and class tokens (B, T, C) of frames of which some exist -> (B, C)."""
        if token is not None and self.balance is None:
            return token[:, 0]
        mean = masked_mean(first, exists)
        if token is None or self.balance is None:
            return mean
        share = self.balance.sigmoid()
        return (1 - share) * token[:, 0] + share * mean


class VideoHead(Head):
    """LayerNorm, dropout, linear map of one vector per clip; the linear map starts as those of torch do."""

    pools: ClassVar[tuple[str, ...]] = ("",)

    def reset(self, num_classes: int, pool: str | None = None) -> None:
        super().reset(num_classes, pool)
        if isinstance(self.fc, nn.Linear):
            self.fc.reset_parameters()


class UniFormerV2(VisionTransformer):
    """An image transformer on the frames of clips (B, in_chans, T, H, W); every block is a level of ``feature_info``.

    Args:
        stem: gives maps of patches (B, T', h, w, C), called as ``stem(x, valid) -> (x, valid)``.
        blocks: :class:`ClipBlock` s.
        dim: width.
        patch_size: pixels per side of a patch.
        pre_norm: of all tokens before the blocks.
        reader: what the head reads.
        global_layers: blocks behind which the reader's token reads, one for each of its readers.
        head: what gives logits.
        settings: of :class:`attnlib.models.backbones.stages.Backbone`.
    """

    rank = 3
    behind_maps = ("norm", "head", "reader")
    resamples_input = False  # kernels of three axes

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        dim: int,
        patch_size: int,
        pre_norm: nn.Module,
        reader: ClipReader,
        global_layers: Sequence[int],
        head: VideoHead,
        **settings: Any,
    ):
        none: Any = head
        super().__init__(stem, blocks, dim, patch_size, None, none, **settings)
        for table in (self.cls_token, self.pos_embed, self.prefix_pos_embed):
            nn.init.normal_(table, std=dim**-0.5)  # type: ignore[arg-type]
        self.pre_norm, self.reader, self.global_layers = pre_norm, reader, tuple(global_layers)

    def _tokens(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, int]]]:
        """Tokens (B, T', 1 + h w, C) behind every block, which patches (B, T', h, w) exist, and their grid."""
        self._check_images(x, valid)
        x, valid = self.stem(x.movedim(1, -1), valid)
        grid = (x.shape[2], x.shape[3])
        at, beside = self.positions(grid), self._prefix()
        assert at is not None and beside is not None
        x = torch.cat([beside.expand(*x.shape[:2], -1, -1).to(x.dtype), (x + at).flatten(2, 3)], 2)
        layout, exists = self._layout(grid), self._exists(valid)
        x = self.pre_norm(zero_invalid(x, exists))
        carry: Any = None
        for block in self.stages[: None if last is None else last + 1]:  # type: ignore[union-attr]
            again = getattr(block, "checkpointing", False) and losses is None
            x, carry = checkpointed(block, x, exists, carry, losses, layout, when=again)
            yield x, valid, grid

    def _layout(self, grid: tuple[int, int]) -> Layout:
        return Layout((*self.beside, ("image", grid)))

    def _exists(self, valid: Tensor | None) -> Tensor | None:
        """(B, T, h, w) which patches exist -> (B, T, 1 + h w) which tokens do: class tokens of frames that hold one."""
        if valid is None:
            return None
        flat = valid.flatten(2)
        return torch.cat([flat.any(-1, keepdim=True), flat], -1)

    def _final(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, C): what the head reads."""
        token, read = self.reader.start(x.shape[0]), 0
        y, exists = x, valid
        for i, (y, exists, grid) in enumerate(self._tokens(x, valid, losses)):
            if i in self.global_layers:
                reader: Any = self.reader.readers[read]
                again = getattr(self.stages[i], "checkpointing", False)
                token = checkpointed(reader, token, y, self._exists(exists), self._layout(grid), when=again)
                read += 1
        return self.reader(token, y[:, :, 0], None if exists is None else exists.flatten(2).any(-1)), None

    def forward_features(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, in_chans, T, H, W) -> (B, C): one vector per clip. ``valid``: (B, T, H, W), which pixels exist."""
        return self._final(x, valid)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False, valid: Tensor | None = None) -> Tensor:
        """(B, C) -> (B, num_classes), or what the last linear map reads."""
        return self.head(x, None, pre_logits)

    def with_patches(self, patch_size: int, img_size: int | tuple[int, int] | None = None) -> VisionTransformer:
        raise TypeError("with_patches resamples kernels of images; a UniFormerV2 reads clips")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters stand at which depth, for layer-wise learning rates."""
        return {
            "stem": r"^(stem|cls_token|pos_embed|prefix_pos_embed|pre_norm)",
            "blocks": [(r"^stages\.(\d+)", None), (r"^reader", (99999,))],
        }


def uniformerv2(
    patch_size: int = 16,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    activation: str = "quick_gelu",
    norm_eps: float = 1e-5,
    local: int = 0,
    reduction: float = 1.5,
    global_layers: Sequence[int] | None = None,
    temporal_stride: int = 1,
    frozen: bool = False,
    global_mlp_ratio: float = 4.0,
    global_drop_rate: float = 0.5,
    global_drop_path_rate: float = 0.0,
    mechanism: Make | None = None,
    num_classes: int = 400,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.5,
    global_pool: str = "",
) -> UniFormerV2:
    """A UniFormerV2.

    Args:
        patch_size, embed_dim, depth, num_heads, mlp_ratio: of the image transformer.
        activation: of its MLPs: ``"quick_gelu"``, or ``"gelu"``.
        norm_eps: of its LayerNorms.
        local: relations along time per block: 0 (scenes, as of Kinetics), 1 or 2 (motion, as of Something-Something).
        reduction: width over channels of these relations.
        global_layers: blocks, from 0 and ascending, behind which a learned token reads the whole clip; the last four by
            default. None, ``()``, leaves the mean class token of the frames.
        temporal_stride: 1; or 2, one token for three frames around every second one.
        frozen: the image transformer is not trained, and the head reads the learned token alone.
        global_mlp_ratio: hidden width of the MLPs of that token over the width.
        global_drop_rate: dropout of their hidden layers in training.
        global_drop_path_rate: stochastic depth of the last of them.
        mechanism: as in :func:`attnlib.create_model`, in the place of attention within frames.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate: as in :func:`attnlib.create_model`.
        global_pool: ``""`` alone: one vector per clip is all that the head reads.

    Raises:
        ValueError: layers that are not there, a frozen model with relations along time or without global layers.

    >>> model = uniformerv2(8, 16, 2, 2, global_layers=[1], num_classes=3, img_size=16)
    >>> model(torch.zeros(1, 3, 4, 16, 24)).shape
    torch.Size([1, 3])
    """
    check_int("patch_size", patch_size, least=1)
    check_int("depth", depth, least=1)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("local", local, (0, 1, 2))
    check_choice("temporal_stride", temporal_stride, (1, 2))
    for name, ratio in (("mlp_ratio", mlp_ratio), ("global_mlp_ratio", global_mlp_ratio), ("norm_eps", norm_eps)):
        check_real(name, ratio, above=0)
    check_real("reduction", reduction, least=1, most=embed_dim)
    check_real("global_drop_rate", global_drop_rate, least=0, below=1)
    check_real("global_drop_path_rate", global_drop_path_rate, least=0, below=1)
    chosen = _global_layers(global_layers, depth)
    if check_flag("frozen", frozen) and (local or not chosen):
        raise ValueError(
            f"frozen=True trains what reads the image transformer alone: local=0 and global layers are possible, got "
            f"local={local} and global_layers={chosen}"
        )
    norm = functools.partial(nn.LayerNorm, eps=norm_eps)
    act = ACTIVATIONS[activation]
    (row,) = places([embed_dim], [depth], [num_heads], [patch_size], drop_path_rate)
    blocks = []
    for place in row:
        mixer = _attention(place.dim, place.num_heads) if mechanism is None else beside_patches(mechanism(place))
        mlp = Mlp(embed_dim, mlp_ratio, act)
        blocks.append(ClipBlock(embed_dim, mixer, mlp, local, int(embed_dim // reduction), norm, place.drop_path))
    rates = torch.linspace(0, global_drop_path_rate, len(chosen), device="cpu").tolist()

    def dropped() -> nn.Module:
        return nn.Sequential(QuickGELU(), nn.Dropout(global_drop_rate))

    readers = [
        Reader(embed_dim, num_heads, Mlp(embed_dim, global_mlp_ratio, dropped), nn.LayerNorm, rate) for rate in rates
    ]
    model = UniFormerV2(
        ClipPatchify(in_chans, embed_dim, patch_size, 1 if temporal_stride == 1 else 3, norm=False, bias=False),
        blocks, embed_dim, patch_size, norm(embed_dim), ClipReader(embed_dim, readers, not frozen), chosen,
        VideoHead(embed_dim, num_classes, global_pool, nn.LayerNorm, drop_rate),
        num_classes=num_classes, in_chans=in_chans, img_size=img_size,
    )  # fmt: skip
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("reader.", "head.")))
    return model


def _attention(dim: int, num_heads: int) -> SoftmaxAttention:
    """Attention that starts as torch's: queries, keys and values as one matrix, zero biases."""
    made = SoftmaxAttention(dim, num_heads)
    init_like_torch(dim, made.q, made.k, made.v)
    nn.init.zeros_(made.proj.bias)
    return made


def _global_layers(given: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if given is None:
        return tuple(range(max(0, depth - 4), depth))
    chosen = check_ints("global_layers", given)
    if list(chosen) != sorted(set(chosen)) or not all(0 <= i < depth for i in chosen):
        raise ValueError(f"global_layers must be blocks from 0 to {depth - 1}, ascending, got {chosen}")
    return chosen


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``VisionTransformer`` of clips, or from the ``Uniformerv2`` around it."""
    theirs = Released(state_dict, "the authors' UniFormerV2", wrappers=("backbone.",))
    grid = model.pos_embed.shape[1:]
    block, to = r"transformer\.resblocks\.(\d+)\.", r"stages.\1."
    out: dict[str, Tensor] = {}
    inner = getattr(type(model.stages[0].mixer.inner), "convert_state_dict", None)
    if inner is not None:
        out |= theirs.parts(rf"{block}attn\.(.+)", to + "mixer.inner", inner)
    out |= theirs.parts(
        r"transformer\.dec\.(\d+)\.attn\.(.+)", r"reader.readers.\1.attention", SoftmaxAttention.convert_state_dict
    )
    rules: dict[str, Rule] = {
        r"conv1\.weight": "stem.proj.weight",
        r"class_embedding": lambda m, t: {"cls_token": t.view(1, 1, -1)},
        r"positional_embedding": _positions(grid),
        r"ln_pre\.(weight|bias)": r"pre_norm.\1",
        rf"{block}ln_1\.(weight|bias)": to + r"mixer.norm.\2",
        rf"{block}ln_2\.(weight|bias)": to + r"mlp.norm.\2",
        rf"{block}mlp\.c_fc\.(weight|bias)": to + r"mlp.inner.fc1.\2",
        rf"{block}mlp\.c_proj\.(weight|bias)": to + r"mlp.inner.fc2.\2",
        r"transformer\.temporal_cls_token": "reader.video_token",
        r"transformer\.balance": "reader.balance",
        r"transformer\.proj\.0\.(weight|bias)": r"head.norm.\1",
        r"transformer\.proj\.2\.(weight|bias)": r"head.fc.\1",
    }
    reader, ours = r"transformer\.dec\.(\d+)\.", r"reader.readers.\1."
    rules |= {
        r"transformer\.dpe\.(\d+)\.(weight|bias)": ours + r"position.conv.\2",
        rf"{reader}ln_1\.(weight|bias)": ours + r"norm.\2",
        rf"{reader}ln_2\.(weight|bias)": ours + r"mlp.norm.\2",
        rf"{reader}ln_3\.(weight|bias)": ours + r"context_norm.\2",
        rf"{reader}mlp\.c_fc\.(weight|bias)": ours + r"mlp.inner.fc1.\2",
        rf"{reader}mlp\.c_proj\.(weight|bias)": ours + r"mlp.inner.fc2.\2",
    }
    for number, name in ((1, "before"), (2, "between")):
        part = rf"{block}lmhra{number}\.pos_embed\."
        rules |= {
            rf"{part}0\.(weight|bias|running_mean|running_var|num_batches_tracked)": f"{to}{name}.norm.norm.\\2",
            rf"{part}2\.(weight|bias)": f"{to}{name}.inner.conv.\\2",
        }
        for at, linear in ((1, "value"), (3, "proj")):
            rules[rf"{part}{at}\.(weight|bias)"] = _flat(f"{to}{name}.inner.{linear}.\\2")
    return theirs.close(out | theirs.renamed(rules))


def _flat(to: str) -> Rule:
    """Convolutions of one pixel as linear maps."""
    return lambda m, t: {m.expand(to): t.flatten(1) if t.dim() > 2 else t}


def _positions(grid: Sequence[int]) -> Rule:
    """A table (1 + N, C): that of the class token, and a map."""

    def rule(match: Any, value: Tensor) -> dict[str, Tensor]:
        before, table = grid_of(value[None], 1, grid)
        assert before is not None
        return {"prefix_pos_embed": before, "pos_embed": table}

    return rule


def clip_weights(state_dict: Mapping[str, Tensor], model: UniFormerV2) -> dict[str, Tensor]:
    """A state dict for ``model`` whose image transformer is that of transformers' ``CLIPVisionModel``.

    All else is as in ``model``: what looks along time, reads the clip and gives logits. Kernels of patches of three
    frames are the image's in the middle, zeros beside it. CLIP's last norm and its projection, which the authors leave
    out, are left out.

    Args:
        state_dict: of a ``CLIPVisionModel``, a ``CLIPVisionModelWithProjection`` or a whole ``CLIPModel``.
        model: the one to load it into.

    Raises:
        ValueError: entries that no such model has, or of another width or depth; all are named.
    """
    theirs = Released(state_dict, "transformers' CLIPVisionModel")
    layer, to = r"(?:vision_model\.)?encoder\.layers\.(\d+)\.", r"stages.\1."
    theirs.leave(r"text_model\..+|text_projection\.weight|logit_scale", because="they read text")
    theirs.leave(
        r"(?:vision_model\.)?post_layernorm\.(weight|bias)|visual_projection\.weight",
        because="the head has a norm and a map of its own",
    )
    theirs.leave(r"(?:vision_model\.)?embeddings\.position_ids", because="they count")
    outside = r"(?:vision_model\.)?"
    grid = model.pos_embed.shape[1:]  # type: ignore[union-attr]
    mapped = theirs.close(
        theirs.renamed(
            {
                rf"{outside}embeddings\.class_embedding": lambda m, t: {"cls_token": t.view(1, 1, -1)},
                rf"{outside}embeddings\.patch_embedding\.weight": "stem.proj.weight",
                rf"{outside}embeddings\.position_embedding\.weight": _positions(grid),
                rf"{outside}pre_layrnorm\.(weight|bias)": r"pre_norm.\1",
                rf"{layer}self_attn\.([qkv])_proj\.(weight|bias)": to + r"mixer.inner.\2.\3",
                rf"{layer}self_attn\.out_proj\.(weight|bias)": to + r"mixer.inner.proj.\2",
                rf"{layer}layer_norm1\.(weight|bias)": to + r"mixer.norm.\2",
                rf"{layer}layer_norm2\.(weight|bias)": to + r"mlp.norm.\2",
                rf"{layer}mlp\.(fc[12])\.(weight|bias)": to + r"mlp.inner.\2.\3",
            }
        )
    )
    image = {name for name in model.state_dict() if not name.startswith(("reader.", "head."))}
    missing = sorted(n for n in image - set(mapped) if ".before." not in n and ".between." not in n)
    if missing:
        raise ValueError(f"state_dict lacks what {len(missing)} entries of the model need: {', '.join(missing[:6])}")
    return inflate(mapped, model, center=True)


def from_clip(clip: nn.Module, **settings: Any) -> UniFormerV2:
    """A UniFormerV2 of the sizes, weights, type and device of a CLIP image encoder of transformers.

    Args:
        clip: a ``CLIPVisionModel``, ``CLIPVisionModelWithProjection`` or ``CLIPModel``.
        settings: of :func:`uniformerv2`, beyond sizes: ``num_classes``, ``local``, ``global_layers``, ...

    Raises:
        TypeError: something else than such a model.
        ValueError: an activation that there is not; a setting that the encoder decides.
    """
    config: Any = getattr(clip, "config", None)
    config = getattr(config, "vision_config", config)
    if not isinstance(clip, nn.Module) or not hasattr(config, "hidden_act") or not hasattr(config, "patch_size"):
        raise TypeError(f"clip must be a CLIPVisionModel of transformers, got {describe(clip)}")
    sizes = {
        "patch_size": config.patch_size, "embed_dim": config.hidden_size, "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads, "mlp_ratio": config.intermediate_size / config.hidden_size,
        "img_size": config.image_size, "in_chans": config.num_channels, "activation": config.hidden_act,
        "norm_eps": config.layer_norm_eps,
    }  # fmt: skip
    if twice := sorted(set(sizes) & set(settings)):
        raise ValueError(f"{', '.join(twice)} cannot be set: the encoder decides")
    model = uniformerv2(**sizes, **settings).to(next(clip.parameters()))
    model.load_state_dict(clip_weights(clip.state_dict(), model))
    return model


_LARGE: dict[str, Any] = dict(patch_size=14, embed_dim=1024, depth=24, num_heads=16)
_MOTION: dict[str, Any] = dict(
    local=2, temporal_stride=2, drop_path_rate=0.2, global_drop_path_rate=0.4, num_classes=174
)

register_models(
    "uniformerv2",
    uniformerv2,
    {
        "uniformerv2_b16": dict(),
        "uniformerv2_l14": _LARGE,
        "uniformerv2_l14_336": dict(**_LARGE, img_size=336),
        "uniformerv2_l14_336_frozen": dict(**_LARGE, img_size=336, frozen=True),
        "uniformerv2_b16_ssv2": dict(**_MOTION, global_layers=tuple(range(4, 12))),
        "uniformerv2_l14_ssv2": dict(**_LARGE, **_MOTION, global_layers=tuple(range(8, 24))),
    },
    params={
        "uniformerv2_b16": 114_552_208,
        "uniformerv2_l14": 354_099_600,
        "uniformerv2_l14_336": 354_427_280,
        "uniformerv2_l14_336_frozen": 354_426_256,
        "uniformerv2_b16_ssv2": 162_992_814,
        "uniformerv2_l14_ssv2": 573_949_966,
    },
    license="Apache-2.0",
    source="OpenGVLab/UniFormerV2",
    convert=convert,
    img_size={"uniformerv2_l14_336": 336, "uniformerv2_l14_336_frozen": 336},
    task="clips",
    data=dict(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225)),
)
