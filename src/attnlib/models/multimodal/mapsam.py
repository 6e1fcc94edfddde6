"""MapSAM: a promptable segmenter that needs no prompt, tuned on a few labelled maps.

The vision encoder of a Segment Anything model keeps its weights but for low-rank changes of queries and values whose
columns keep a learned norm (DoRA). Small heads on features of several depths give a coarse mask; its two highest and
two lowest pixels are the prompt, the mean feature inside it is added to the decoder's tokens, and what lies outside is
hidden from them; the decoder makes that mask anew after every layer.

    ``W' = m (W + A B) / ||W + A B||``, norms over outputs, one per input column.

Differs from the authors' code: they add the mask to weights that went through a softmax and send them through another,
which leaves all that is kept nearly uniform; here scores are masked once (``compat="authors"`` gives theirs). Where
nothing is kept, nothing is hidden. The batch is decoded at once, theirs image by image. An encoder of any depth has a
head per stored depth; theirs has three whatever the depth (``most=3``).

Source: Xia et al., 2024, arXiv 2411.06971; code Xue-Xia/MapSAM.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_float, check_int, check_ints, check_real, check_type, describe
from ...hooks.hf.names import named_implementation
from ...nn.layers import smoothed
from ...ops.points import extreme_points
from ..detect.plain_detr import focal_loss
from ..losses import dice_scores
from ..protocol import TaskModel, Terms


class DoRAQKV(nn.Module):
    """A frozen projection to queries, keys and values, with weight-decomposed low-rank changes of queries and values.

    Not peft's DoRA, whose norm is that of an output row.

    Args:
        qkv: linear map C -> 3 C.
        rank: r of ``A`` (C, r) and ``B`` (r, C); ``A`` starts normal with deviation ``r ** -0.5``, ``B`` at zero, so
            that nothing changes at first.

    Shape: (..., C) -> (..., 3 C).

    >>> layer = nn.Linear(8, 24)
    >>> sum(p.numel() for p in DoRAQKV(layer, 2).parameters() if p.requires_grad)
    80
    """

    def __init__(self, qkv: nn.Linear, rank: int = 4):
        super().__init__()
        check_type("qkv", qkv, nn.Linear, "a torch.nn.Linear C -> 3 C")
        check_int("rank", rank, least=1)
        dim = qkv.in_features
        if qkv.out_features != 3 * dim:
            raise ValueError(f"qkv must map C to 3 C, got {dim} to {qkv.out_features}")
        self.weight = nn.Parameter(qkv.weight.detach().clone(), requires_grad=False)
        self.bias = None if qkv.bias is None else nn.Parameter(qkv.bias.detach().clone(), requires_grad=False)
        self.dim = dim
        for name, part in (("q", self.weight[:dim]), ("v", self.weight[-dim:])):
            setattr(self, f"m_{name}", nn.Parameter(part.norm(dim=0, keepdim=True)))
            setattr(self, f"a_{name}", nn.Parameter(torch.randn_like(part[:, :1].expand(-1, rank)) * rank**-0.5))
            setattr(self, f"b_{name}", nn.Parameter(torch.zeros_like(part[:rank])))

    def _changed(self, weight: Tensor, name: str) -> Tensor:
        a, b, m = (getattr(self, f"{part}_{name}") for part in "abm")
        weight = weight + a @ b
        norm = weight.norm(dim=0, keepdim=True)
        return m * weight / torch.where(norm > 0, norm, 1)

    def merged(self) -> Tensor:
        """(3 C, C) the weight in use."""
        d = self.dim
        q, k, v = self.weight[:d], self.weight[d:-d], self.weight[-d:]
        return torch.cat([self._changed(q, "q"), k, self._changed(v, "v")])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged(), self.bias)

    def deployed(self) -> nn.Linear:
        """The plain projection that computes the same."""
        plain = nn.Linear(self.dim, 3 * self.dim, self.bias is not None).to(self.weight)
        with torch.no_grad():
            plain.weight.copy_(self.merged())
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain


class _Norm(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _head(dim: int, wide: int, narrow: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, wide, 1), _Norm(wide, 1e-6), nn.GELU(),
        nn.Conv2d(wide, narrow, 1), _Norm(narrow, 1e-6), nn.GELU(), nn.Conv2d(narrow, 1, 1),
    )  # fmt: skip


class MapSAMOutput(NamedTuple):
    """What :class:`MapSAM` predicts, as logits."""

    masks: Tensor  # (B, K, H, W)
    low: Tensor  # (B, K, H / 4, W / 4)
    iou: Tensor  # (B, K)
    coarse: Tensor  # (B, h, w) of the heads, at the size of the features


class MapSAM(TaskModel):
    """See the module.

    Args:
        sam: transformers' ``SamModel``, which is copied; :func:`resized` gives one for another image size.
        num_classes: K, masks per image. Tokens, maps and quality head of the decoder are new where it has another
            number, as in the release.
        rank: of :class:`DoRAQKV`; 0 leaves the encoder frozen.
        tuned: blocks of the encoder whose projections are changed, from 0; all by default.
        every: features behind blocks 0, ``every``, ``2 every``, ... but the last, and those at the end, have a head.
        most: as many of these blocks have one, the first; all by default. The release's models have 3 at any depth.
        hidden: widths of a head.
        points: how many pixels on and as many off the thing prompt.
        dice_weight: of the loss, against focal loss.
        alpha, gamma: of the focal loss.
        compat: ``"authors"``: two softmaxes.

    Shape: x (B, S, S, 3), S the image size of ``sam`` -> :class:`MapSAMOutput`.

    Raises:
        TypeError: no ``SamModel``.
    """

    def __init__(
        self,
        sam: nn.Module,
        num_classes: int = 1,
        rank: int = 4,
        every: int = 4,
        hidden: tuple[int, int] = (64, 16),
        points: int = 2,
        dice_weight: float = 0.8,
        alpha: float = 0.25,
        gamma: float = 2.0,
        compat: str | None = None,
        tuned: Sequence[int] | None = None,
        most: int | None = None,
    ):
        super().__init__()
        if not all(hasattr(sam, name) for name in ("vision_encoder", "prompt_encoder", "mask_decoder")):
            raise TypeError(f"sam must be transformers' SamModel, got {describe(sam)}")
        check_int("num_classes", num_classes, least=1)
        check_int("rank", rank, least=0)
        check_choice("compat", compat, (None, "authors"))
        self.every, self.points = check_int("every", every, least=1), check_int("points", points, least=1)
        self.dice_weight = check_real("dice_weight", dice_weight, least=0, most=1)
        self.alpha, self.gamma = check_real("alpha", alpha, least=0, most=1), check_real("gamma", gamma, least=0)
        self.compat, self.num_classes = compat, num_classes
        self.sam: Any = copy.deepcopy(sam)
        encoder: Any = self.sam.vision_encoder
        decoder: Any = self.sam.mask_decoder
        self.image_size = int(encoder.config.image_size)
        for p in encoder.parameters():
            p.requires_grad_(False)
        count = len(encoder.layers)
        chosen = range(count) if tuned is None else check_ints("tuned", tuned, least=0, most=count - 1)
        self.most = None if most is None else check_int("most", most, least=0)
        for i in chosen if rank else ():
            layer = encoder.layers[i]
            layer.attn.qkv = DoRAQKV(layer.attn.qkv, rank)
        if decoder.num_mask_tokens != num_classes:
            self._new_tokens(decoder)
        width, (wide, narrow) = int(encoder.config.output_channels), hidden
        self.heads = nn.ModuleList(_head(width, wide, narrow) for _ in range(1 + len(self.stored)))

    @property
    def stored(self) -> list[int]:
        """Blocks behind which features are looked at, beside the end."""
        count = len(self.sam.vision_encoder.layers)
        return [i for i in range(0, count, self.every) if i + 1 != count][: self.most]

    def _new_tokens(self, decoder: Any) -> None:
        dim, k, like = decoder.hidden_size, self.num_classes, decoder.mask_tokens.weight
        decoder.num_multimask_outputs, decoder.num_mask_tokens = k - 1, k
        decoder.mask_tokens = nn.Embedding(k, dim).to(like)
        fresh = [copy.deepcopy(decoder.output_hypernetworks_mlps[0]) for _ in range(k)]
        decoder.output_hypernetworks_mlps = nn.ModuleList(fresh)
        head = decoder.iou_prediction_head
        head.proj_out = nn.Linear(head.proj_out.in_features, k).to(like)
        for module in (*fresh, head):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    # ---- forward

    def _features(self, x: Tensor) -> list[Tensor]:
        """(B, C, h, w) at the end and behind the stored blocks."""
        encoder = self.sam.vision_encoder
        hidden = encoder.patch_embed(x.permute(0, 3, 1, 2))
        if encoder.pos_embed is not None:
            hidden = hidden + encoder.pos_embed
        states, stored = [], set(self.stored)
        for number, layer in enumerate(encoder.layers):
            hidden = layer(hidden)
            if number in stored:
                states.append(encoder.neck(hidden))
        return [encoder.neck(hidden), *states]

    def forward(self, x: Tensor) -> MapSAMOutput:
        check_float("x", x)
        check_axes("x", x, B=None, H=self.image_size, W=self.image_size, C=3)
        if not len(x):  # the encoder's windows have no size to be guessed from
            return MapSAMOutput(*(t[:0] for t in self(x.new_zeros(1, *x.shape[1:]))))
        features = self._features(x)
        coarse = torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)]).mean(0)  # (B, 1, h, w)
        inside = coarse.detach().sigmoid()[:, 0]
        side = (self.image_size, self.image_size)
        fine = F.interpolate(coarse.detach(), side, mode="bilinear")[:, 0]
        points, labels = extreme_points(fine, side, count=self.points, compat="authors")
        sparse, dense = self.sam.prompt_encoder(
            input_points=points.to(x.dtype)[:, None], input_labels=labels[:, None], input_boxes=None, input_masks=None
        )
        target = self._target(features[0].detach(), inside)
        low, iou = self._decode(features[0], sparse, dense, self._hide(inside.flatten(1) < 0.5, x.dtype), target)
        masks = F.interpolate(low, side, mode="bilinear")
        return MapSAMOutput(masks, low, iou, coarse[:, 0])

    @staticmethod
    def _target(features: Tensor, inside: Tensor) -> Tensor:
        """(B, 1, 1, C) mean feature inside the coarse mask; zeros where it is empty."""
        chosen = (inside > 0.5).to(features.dtype)[:, None]
        mean = (features * chosen).sum((2, 3)) / chosen.sum((2, 3)).clamp_min(1)
        return mean[:, None, None]

    def _hide(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, h w) to be added: very low where ``hidden`` (B, h w), 0 elsewhere."""
        if self.compat != "authors":
            hidden = hidden & ~hidden.all(1, keepdim=True)  # a row that may see nothing sees all
        lowest = -1e9 if self.compat == "authors" else torch.finfo(dtype).min
        return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, lowest)[:, None, None]

    def _cross(self, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.compat != "authors":
            return attend(query=q, key=k, value=v, attention_similarity=mask)[0]  # type: ignore[no-any-return]
        heads = attend.num_attention_heads
        q, k, v = (
            proj(t).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
            for proj, t in ((attend.q_proj, q), (attend.k_proj, k), (attend.v_proj, v))
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        weights = (weights + mask).softmax(-1)
        return attend.out_proj((weights @ v).transpose(1, 2).flatten(2))[:, None]  # type: ignore[no-any-return]

    def _decode(
        self, features: Tensor, sparse: Tensor, dense: Tensor, mask: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two-way decoder, (B, K, 4 h, 4 w) and (B, K)."""
        decoder, b = self.sam.mask_decoder, len(features)
        two_way = decoder.transformer
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(b, 1, -1, -1)
        tokens = torch.cat([tokens, sparse], 2)
        h, w = features.shape[2:]
        keys = (features + dense).flatten(2).transpose(1, 2)[:, None]
        place = self.sam.get_image_wide_positional_embeddings().to(features.dtype)
        place = place.flatten(2).transpose(1, 2)[:, None].expand_as(keys)
        queries = tokens
        for layer in two_way.layers:
            queries = queries + target
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(query=queries, key=queries, value=queries)[0]
            else:
                placed = queries + tokens
                queries = queries + layer.self_attn(query=placed, key=placed, value=queries)[0]
            queries = layer.layer_norm1(queries)
            read = self._cross(layer.cross_attn_token_to_image, queries + tokens, keys + place, keys, mask)
            queries = layer.layer_norm2(queries + read)
            queries = layer.layer_norm3(queries + layer.mlp(queries))
            back = layer.cross_attn_image_to_token(query=keys + place, key=queries + tokens, value=queries)[0]
            keys = layer.layer_norm4(keys + back)
            first = two_way.layer_norm_final_attn(queries)[:, 0, 1]
            now = (first[:, None] @ (keys + place)[:, 0].transpose(1, 2))[:, 0].detach().sigmoid()
            mask = self._hide(now < 0.5, features.dtype)
        q = queries + tokens + target
        queries = queries + two_way.final_attn_token_to_image(query=q, key=keys + place, value=keys)[0]
        queries = two_way.layer_norm_final_attn(queries)[:, 0]
        image = keys[:, 0].transpose(1, 2).unflatten(2, (h, w))
        image = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(image)))
        image = decoder.activation(decoder.upscale_conv2(image))
        maps = torch.stack([mlp(queries[:, 1 + n]) for n, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
        low = torch.einsum("bkc,bchw->bkhw", maps, image)
        return low, decoder.iou_prediction_head(queries[:, 0])

    # ---- training

    def loss(self, prediction: MapSAMOutput, target: Tensor) -> Terms:
        """Focal and Dice loss of the small mask and of the coarse one.

        Args:
            prediction: of :meth:`forward`.
            target: (B, H, W) or (B, K, H, W) of 0 and 1, at any size.

        Returns:
            ``focal``, ``dice``, ``coarse_focal``, ``coarse_dice``, each with its weight.
        """
        check_type("target", target, Tensor, "a tensor (B, H, W) of 0 and 1")
        truth = target[:, None] if target.dim() == 3 else target
        if truth.dim() != 4 or truth.shape[:2] != prediction.low.shape[:2]:
            b, k = prediction.low.shape[:2]
            raise ValueError(f"target must be ({b}, H, W) or ({b}, {k}, H, W) of 0 and 1, got {describe(target)}")
        size = prediction.low.shape[-2:]
        truth = truth.to(prediction.low)
        if truth.shape[-2:] != size:
            truth = F.interpolate(truth, size, mode="nearest-exact")
        coarse = F.interpolate(prediction.coarse[:, None], size, mode="bilinear")
        any_class = truth.amax(1, keepdim=True)
        dice = self.dice_weight
        return {
            "focal": (1 - dice) * self._focal(prediction.low, truth),
            "dice": dice * self._dice(prediction.low, truth),
            "coarse_focal": (1 - dice) * self._focal(coarse, any_class),
            "coarse_dice": dice * self._dice(coarse, any_class),
        }

    def _focal(self, logits: Tensor, truth: Tensor) -> Tensor:
        return focal_loss(logits, truth, self.alpha, self.gamma).mean()

    @staticmethod
    def _dice(logits: Tensor, truth: Tensor) -> Tensor:
        return 1 - dice_scores(logits.sigmoid(), truth, smooth=1e-6, squared=False).mean()

    def predict(self, x: Tensor, threshold: float = 0.5) -> Tensor:  # type: ignore[override]
        """(B, K, H, W) bool masks of images (B, H, W, 3) of any size, which are resized to the model's and back."""
        check_float("x", x)
        check_axes("x", x, B=None, H=None, W=None, C=3)
        check_real("threshold", threshold, above=0, below=1)
        side = (self.image_size, self.image_size)
        small = smoothed(x.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
        return F.interpolate(self(small).masks, x.shape[1:3], mode="bilinear").sigmoid() > threshold

    def adapter(self) -> dict[str, Tensor]:
        """Tensors that were trained or are new: all but what the encoder had before."""
        return {n: t for n, t in self.state_dict().items() if self._own(n)}

    @staticmethod
    def _own(name: str) -> bool:
        parts = name.split(".")
        return "vision_encoder" not in parts or ("qkv" in parts and parts[-1] not in ("weight", "bias"))

    def load_adapter(self, tensors: dict[str, Tensor]) -> None:
        """Put in what :meth:`adapter` gave; the encoder stays.

        Raises:
            ValueError: names that are missing or not known.
        """
        wanted = {n for n in self.state_dict() if self._own(n)}
        if wanted != set(tensors):
            missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
            raise ValueError(f"tensors must be those of adapter(): missing {missing[:3]}, not known {unknown[:3]}")
        self.load_state_dict(tensors, strict=False)


def resized(sam: nn.Module, image_size: int) -> nn.Module:
    """A copy of transformers' ``SamModel`` for another image size: places are interpolated.

    Args:
        image_size: a multiple of the patch size.
    """
    model: Any = sam
    config = model.config.to_dict()
    patch = config["vision_config"]["patch_size"]
    check_int("image_size", image_size, least=patch)
    if image_size % patch:
        raise ValueError(f"image_size must be a multiple of the patch size {patch}, got {image_size}")
    for part in ("vision_config", "prompt_encoder_config"):
        config[part]["image_size"] = image_size
        config[part].pop("image_embedding_size", None)
    kind = type(model.config)
    parts = {n: config[n] for n in ("vision_config", "prompt_encoder_config", "mask_decoder_config")}
    fresh = kind(**parts, attn_implementation=named_implementation(model.config))
    new = type(model)(fresh).to(next(model.parameters()))
    state = model.state_dict()
    for name, own in new.state_dict().items():
        if state[name].shape == own.shape:
            continue
        if name.endswith("pos_embed"):
            grid = F.interpolate(state[name].permute(0, 3, 1, 2), own.shape[1:3], mode="bilinear")
            state[name] = grid.permute(0, 2, 3, 1)
        else:  # relative places of layers that see the whole grid
            state[name] = F.interpolate(state[name][None, None], own.shape, mode="bilinear")[0, 0]
    new.load_state_dict(state)
    return new.train(model.training)  # type: ignore[no-any-return]


def convert_state_dict(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict, of the ``Sam`` in their ``DoRA_Sam``, in the names of :class:`MapSAM`: every key.

    >>> list(convert_state_dict({"spgen1.hint.0.bias": torch.zeros(2)}))
    ['heads.1.0.bias']
    """
    out: dict[str, Tensor] = {}
    for name, value in theirs.items():
        out[_converted(name)] = value
        if name.endswith("positional_encoding_gaussian_matrix"):
            out["sam.shared_image_embedding.positional_embedding"] = value
    return out


_RENAMED = (
    ("image_encoder.", "vision_encoder."), ("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."),
    (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."), (".norm3.", ".layer_norm3."),
    (".norm4.", ".layer_norm4."), ("neck.0.", "neck.conv1."), ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."), ("neck.3.", "neck.layer_norm2."), ("norm_final_attn", "layer_norm_final_attn"),
    ("output_upscaling.0.", "upscale_conv1."), ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."), ("point_embeddings.", "point_embed."),
    ("mask_downscaling.0.", "mask_embed.conv1."), ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."), ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
)  # fmt: skip


def _converted(name: str) -> str:
    if name.startswith("spgen"):
        head, rest = name.split(".hint.")
        return f"heads.{head.removeprefix('spgen') or 0}.{rest}"
    for old, new in _RENAMED:
        name = name.replace(old, new)
    if "output_hypernetworks_mlps" in name or "iou_prediction_head" in name:  # three layers: in, one between, out
        stem, _, rest = name.rpartition(".layers.")
        number, _, leaf = rest.partition(".")
        name = f"{stem}.{('proj_in', 'layers.0', 'proj_out')[int(number)]}.{leaf}"
    if ".qkv." in name:
        name = name.replace("lora_A_", "a_").replace("lora_B_", "b_")
    return "sam." + name
