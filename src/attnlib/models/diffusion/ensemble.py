"""Adaptive feature aggregation: U-Nets of one architecture in lock-step, merged behind every layer.

Wang et al., 2024, "Ensembling Diffusion Models via Adaptive Feature Aggregation", arXiv 2405.17082. K frozen nets read
the same map; what they make of it, F (B, K, C, h, w), becomes one map again, which all of them read next:

    u = resnet(W_in [F_1 .. F_K], e),    u = transformer(u, c),    a = softmax_K(W_out u),    F' = sum_k a_k F_k

with ``e`` the mean of the nets' time embeddings and ``c`` that of their prompts. W_out starts at zero, so that features
are averaged before training. Aggregators stand behind the first convolution, each layer (a resnet with its transformer,
a downsampler, the middle block; an upsampler belongs to the resnet before it) and, for the last layer, behind the last
convolution: 25 in Stable Diffusion 1.5. Only they are trained. ::

    ensemble = UNetEnsemble([pipe.unet, other.unet])
    pipe = StableDiffusionPipeline(
        unet=ensemble, text_encoder=TextEncoders([pipe.text_encoder, other.text_encoder]), ...
    )

Differs from the authors' code: any U-Net of diffusers of the usual blocks, without a copy of its code; prompts of the
nets stand side by side in the last axis, so that pipelines need no change; a ControlNet's residuals are added to what
was merged. Its training script calls what no file defines; the loss is the mean square of the merged prediction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...checks import check_int, check_type, describe, to_list
from ...extras import need
from ...types import check_divides

#: Blocks whose layers are known.
DOWN, MIDDLE, UP = (
    ("DownBlock2D", "CrossAttnDownBlock2D"), ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    ("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip


class Aggregator(nn.Module):
    """Merges K maps into one by a softmax over them at every place.

    Args:
        channels: of the maps.
        count: K.
        text_dim, time_dim: widths of prompts and of the time embedding.
        dim: width inside, a multiple of ``groups`` and more: with one channel a group time would have no effect.
        num_heads: of the transformer.
        num_layers: its blocks.
        groups: of group norms.
    """

    def __init__(
        self, channels: int, count: int, text_dim: int, time_dim: int, dim: int = 128, num_heads: int = 8,
        num_layers: int = 1, groups: int = 32,
    ):  # fmt: skip
        super().__init__()
        resnet: Any = need("diffusers.models.resnet", "Aggregator")
        transformer: Any = need("diffusers.models.transformers.transformer_2d", "Aggregator")
        check_divides("num_heads", num_heads, "dim", dim)
        check_divides("groups", groups, "dim", dim)
        if dim == groups:
            raise ValueError(
                f"dim={dim} has one channel in each of {groups} groups, whose norm takes the time embedding away; "
                "take a larger multiple"
            )
        check_int("count", count, least=2)
        self.settings = {
            "in_channels": channels, "hidden_size": dim, "num_experts": count, "num_layers": num_layers,
            "num_attn_heads": num_heads, "cross_attn_dim": text_dim, "temb_channels": time_dim,
        }  # fmt: skip
        self.conv_in = nn.Conv2d(channels * count, dim, 1)
        self.res_block = resnet.ResnetBlock2D(in_channels=dim, temb_channels=time_dim, groups=groups)
        self.transformer = transformer.Transformer2DModel(
            num_attention_heads=num_heads, attention_head_dim=dim // num_heads, in_channels=dim,
            cross_attention_dim=text_dim, num_layers=check_int("num_layers", num_layers, least=1),
            norm_num_groups=groups,
        )  # fmt: skip
        self.conv_out = nn.Conv2d(dim, count, 1, bias=False)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, features: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, C, h, w), (B, E), (B, L, D) -> the merged map (B, C, h, w) and weights (B, K, h, w)."""
        u = self.res_block(self.conv_in(features.flatten(1, 2)), time)
        u = self.transformer(u, encoder_hidden_states=text, return_dict=False)[0]
        weights = self.conv_out(u).softmax(1)
        return (features * weights.unsqueeze(2)).sum(1), weights


class Merged(NamedTuple):
    """The merged prediction, and the weights (B, K, h, w) of every aggregator, from the first convolution on."""

    sample: Tensor
    weights: tuple[Tensor, ...]


class UNetEnsemble(nn.Module):
    """U-Nets in lock-step, called as one U-Net of diffusers is.

    Args:
        unets: at least two ``UNet2DConditionModel`` of the same parts; frozen here, and kept in evaluation.
        dim, num_heads, num_layers, groups: of every :class:`Aggregator`.

    Raises:
        ValueError: nets of unlike parts, or of blocks whose layers are not known.
    """

    def __init__(
        self, unets: Sequence[nn.Module], dim: int = 128, num_heads: int = 8, num_layers: int = 1, groups: int = 32
    ):
        super().__init__()
        kind: Any = need("diffusers", "UNetEnsemble").UNet2DConditionModel
        nets = to_list("unets", unets) or []
        for i, net in enumerate(nets):
            check_type(f"unets[{i}]", net, kind)
        if len(nets) < 2:
            raise ValueError(f"unets must hold at least two, got {len(nets)}")
        _check_alike(nets)
        self.unets = nn.ModuleList(nets)
        self.unets.requires_grad_(False).eval()
        first: Any = nets[0]
        text, time = first.config.cross_attention_dim, first.time_embedding.linear_2.out_features
        self.aggregators = nn.ModuleList(
            Aggregator(channels, len(nets), text, time, dim, num_heads, num_layers, groups)
            for channels in _channels(first)
        ).to(first.device, first.dtype)

    def train(self, mode: bool = True) -> UNetEnsemble:
        super().train(mode)
        self.unets.eval()
        return self

    @property
    def config(self) -> Any:
        return self.unets[0].config

    @property
    def dtype(self) -> torch.dtype:
        return self.unets[0].dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.unets[0].device  # type: ignore[return-value]

    @property
    def add_embedding(self) -> Any:
        """What pipelines of SDXL ask a U-Net for."""
        return self.unets[0].add_embedding

    def _texts(self, text: Tensor) -> Tensor:
        """(K, B, L, D) from that, from (B, L, K D), or from (B, L, D), which all nets share."""
        count, width = len(self.unets), self.config.cross_attention_dim
        check_type("encoder_hidden_states", text, Tensor)
        if text.dim() == 4 and text.shape[0] == count and text.shape[-1] == width:
            return text
        if text.dim() == 3 and text.shape[-1] == width:
            return text.expand(count, *text.shape)
        if text.dim() == 3 and text.shape[-1] == count * width:
            return torch.stack(text.chunk(count, -1))
        raise ValueError(
            f"encoder_hidden_states must be (B, L, {width}), (B, L, {count * width}) or ({count}, B, L, {width}) for "
            f"{count} nets, got {tuple(text.shape)}"
        )

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Merged:
        """What every net is given; prompts as :meth:`forward` takes them."""
        nets: list[Any] = list(self.unets)
        texts = self._texts(encoder_hidden_states)
        extra = {
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": _as_bias(attention_mask, sample),
            "encoder_attention_mask": _as_bias(encoder_attention_mask, sample),
        }
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise ValueError("down_block_additional_residuals and mid_block_additional_residual come together")
        times = [
            _time(net, sample, timestep, timestep_cond, class_labels, text, added_cond_kwargs)
            for net, text in zip(nets, texts, strict=True)
        ]
        time, text = torch.stack(times).mean(0), texts.mean(0)
        aggregators, weights = iter(self.aggregators), []

        def merge(maps: Sequence[Tensor]) -> Tensor:
            merged, found = next(aggregators)(torch.stack(list(maps), 1), time, text)
            weights.append(found)
            return merged

        def all_of(step: Callable[[Any], Callable[..., Tensor]], x: Tensor) -> list[Tensor]:
            return [step(net)(x, e, c) for net, e, c in zip(nets, times, texts, strict=True)]

        def with_text(resnet: Any, transformer: Any, *behind: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
            def run(x: Tensor, e: Tensor, c: Tensor) -> Tensor:
                x = resnet(x, e)
                if transformer is not None:
                    x = transformer(x, encoder_hidden_states=c, return_dict=False, **extra)[0]
                for module in behind:
                    x = module(x)
                return x

            return run

        x = 2 * sample - 1.0 if self.config.center_input_sample else sample
        x = merge([net.conv_in(x) for net in nets])
        skips = [x]
        for b, block in enumerate(nets[0].down_blocks):
            for i in range(len(block.resnets)):

                def down(net: Any, b: int = b, i: int = i) -> Callable[..., Tensor]:
                    return with_text(*_layer(net.down_blocks[b], i))

                x = merge(all_of(down, x))
                skips.append(x)
            for i in range(len(block.downsamplers or ())):
                x = merge([net.down_blocks[b].downsamplers[i](x) for net in nets])
                skips.append(x)
        if down_block_additional_residuals is not None:
            skips = [s + r for s, r in zip(skips, down_block_additional_residuals, strict=True)]
        x = merge([_middle(net.mid_block, x, e, c, extra) for net, e, c in zip(nets, times, texts, strict=True)])
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        last: list[Tensor] = []
        fits = 2 ** nets[0].num_upsamplers
        forced = any(n % fits for n in sample.shape[-2:])
        for b, block in enumerate(nets[0].up_blocks):
            for i in range(len(block.resnets)):
                x, end = torch.cat([x, skips.pop()], 1), i == len(block.resnets) - 1
                size: Any = skips[-1].shape[2:] if forced and end and block.upsamplers else None

                def up(net: Any, b: int = b, i: int = i, end: bool = end, size: Any = size) -> Callable[..., Tensor]:
                    behind = (net.up_blocks[b].upsamplers or ()) if end else ()
                    return with_text(*_layer(net.up_blocks[b], i), *(_sized(m, size) for m in behind))

                last = all_of(up, x)
                if not (end and b == len(nets[0].up_blocks) - 1):
                    x = merge(last)
        sample = merge([_out(net, x) for net, x in zip(nets, last, strict=True)])
        return Merged(sample, tuple(weights))

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None, timestep_cond: Tensor | None = None, attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None, added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Any = None, encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """As ``UNet2DConditionModel`` is called; see there.

        Args:
            sample: (B, C, h, w).
            encoder_hidden_states: (B, L, D) for all nets, (B, L, K D) side by side (:class:`TextEncoders`), or
                (K, B, L, D).
            down_intrablock_additional_residuals: refused, a T2I-Adapter adds inside layers.
        """
        if down_intrablock_additional_residuals is not None:
            raise ValueError("down_intrablock_additional_residuals (T2I-Adapter) cannot be added to nets in lock-step")
        found = self.predict(
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask,
            cross_attention_kwargs, added_cond_kwargs, down_block_additional_residuals,
            mid_block_additional_residual, encoder_attention_mask,
        )  # fmt: skip
        if not return_dict:
            return (found.sample,)
        output: Any = need("diffusers.models.unets.unet_2d_condition", "UNetEnsemble")
        return output.UNet2DConditionOutput(sample=found.sample)

    def save_aggregators(self, folder: str | Path) -> None:
        """``aggregator_<i>/aggregator.safetensors`` and ``config.json``, as the release lays them out."""
        for i, aggregator in enumerate(self.aggregators):
            place = Path(folder) / f"aggregator_{i}"
            place.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in aggregator.state_dict().items()}, place / "aggregator.safetensors")
            settings: Any = aggregator.settings
            (place / "config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def load_aggregators(self, folder: str | Path) -> None:
        """What :meth:`save_aggregators` or the release wrote, every weight accounted for.

        Raises:
            FileNotFoundError: no aggregator there.
            ValueError: another number of them, or other settings.
        """
        found = sorted(Path(folder).glob("aggregator_*/config.json"))
        if not found:
            raise FileNotFoundError(f"folder={str(folder)!r} holds no aggregator_0/config.json")
        if len(found) != len(self.aggregators):
            raise ValueError(
                f"folder={str(folder)!r} holds {len(found)} aggregators, these nets have {len(self.aggregators)}"
            )
        for i, aggregator in enumerate(self.aggregators):
            place = Path(folder) / f"aggregator_{i}"
            said, settings = json.loads((place / "config.json").read_text(encoding="utf-8")), aggregator.settings
            if said != settings:
                raise ValueError(f"{place.name} was made with {said}, here it is {settings}")
            aggregator.load_state_dict(load_file(place / "aggregator.safetensors"))


class TextEncoders(nn.Module):
    """Text encoders of several nets as one: their last states side by side, (B, L, K D).

    Args:
        encoders: of transformers, which share a tokenizer.
    """

    def __init__(self, encoders: Sequence[nn.Module]):
        super().__init__()
        held = to_list("encoders", encoders) or []
        if len(held) < 2 or not all(isinstance(e, nn.Module) for e in held):
            raise ValueError(f"encoders must hold at least two modules, got {describe(encoders)}")
        self.encoders = nn.ModuleList(held)

    @property
    def config(self) -> Any:
        return self.encoders[0].config

    @property
    def dtype(self) -> torch.dtype:
        return self.encoders[0].dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device  # type: ignore[return-value]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> tuple[Tensor]:
        """(B, L) token numbers -> a tuple of the states alone."""
        if options.get("output_hidden_states"):
            raise ValueError("output_hidden_states (clip_skip) is not possible: encoders side by side give their last")
        states = [encoder(input_ids, attention_mask=attention_mask)[0] for encoder in self.encoders]
        return (torch.cat(states, -1),)


def _check_alike(nets: Sequence[Any]) -> None:
    first = nets[0]
    wanted = {name: tuple(p.shape) for name, p in first.state_dict().items()}
    kinds = [[type(b).__name__ for b in (*net.down_blocks, net.mid_block, *net.up_blocks)] for net in nets]
    for i, net in enumerate(nets[1:], 1):
        found = {name: tuple(p.shape) for name, p in net.state_dict().items()}
        if other := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
            name = other[0]
            raise ValueError(
                f"unets[{i}] has other parts than unets[0]: {name} is {found.get(name)}, not {wanted.get(name)}"
            )
        if kinds[i] != kinds[0]:
            raise ValueError(f"unets[{i}] has blocks {kinds[i]}, unets[0] has {kinds[0]}")
    allowed = {"down_blocks": DOWN, "up_blocks": UP}
    for name, known in allowed.items():
        for block in getattr(first, name):
            if type(block).__name__ not in known:
                raise ValueError(f"{name} holds a {type(block).__name__}; layers are known of {known}")
    if type(first.mid_block).__name__ not in MIDDLE:
        raise ValueError(f"mid_block is a {type(first.mid_block).__name__}; layers are known of {MIDDLE}")
    config = first.config
    if not isinstance(config.cross_attention_dim, int):
        raise ValueError(f"cross_attention_dim must be one number, got {config.cross_attention_dim}")
    possible: dict[str, tuple[str | None, ...]] = {
        "encoder_hid_dim_type": (None,), "addition_embed_type": (None, "text_time", "text")
    }  # fmt: skip
    for name, kinds_of in possible.items():
        if getattr(config, name, None) not in kinds_of:
            raise ValueError(f"{name}={getattr(config, name)!r} is not known here; possible: {kinds_of}")


def _channels(net: Any) -> list[int]:
    """Of the maps of every aggregator, in the order of the call."""
    widths = list(net.config.block_out_channels)
    found = [widths[0]]
    for width, block in zip(widths, net.down_blocks, strict=True):
        found += [width] * (len(block.resnets) + len(block.downsamplers or ()))
    found.append(widths[-1])
    for width, block in zip(reversed(widths), net.up_blocks, strict=True):
        found += [width] * len(block.resnets)
    found[-1] = net.config.out_channels
    return found


def _layer(block: Any, i: int) -> tuple[Any, Any]:
    if all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
        raise ValueError("FreeU is on in a net of the ensemble; call disable_freeu() on it")
    return block.resnets[i], block.attentions[i] if getattr(block, "has_cross_attention", False) else None


def _sized(upsampler: Any, size: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: upsampler(x, size)


def _middle(block: Any, x: Tensor, time: Tensor, text: Tensor, extra: dict[str, Any]) -> Tensor:
    if getattr(block, "has_cross_attention", False):
        return block(x, time, encoder_hidden_states=text, **extra)
    return block(x, time)


def _out(net: Any, x: Tensor) -> Tensor:
    if net.conv_norm_out:
        x = net.conv_act(net.conv_norm_out(x))
    return net.conv_out(x)


def _as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return None if mask is None else ((1 - mask.to(like.dtype)) * -10000.0).unsqueeze(1)


def _time(
    net: Any, sample: Tensor, timestep: Any, condition: Tensor | None, labels: Tensor | None, text: Tensor,
    added: dict[str, Any] | None,
) -> Tensor:  # fmt: skip
    """The time embedding of a net, with what its kind adds to it."""
    emb = net.time_embedding(net.get_time_embed(sample=sample, timestep=timestep), condition)
    of_class = net.get_class_embed(sample=sample, class_labels=labels)
    if of_class is not None:
        emb = torch.cat([emb, of_class], -1) if net.config.class_embeddings_concat else emb + of_class
    more = net.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added or {})
    emb = emb if more is None else emb + more
    return emb if net.time_embed_act is None else net.time_embed_act(emb)


__all__ = ["Aggregator", "Merged", "TextEncoders", "UNetEnsemble"]
