"""What references cost a call of a denoiser: MIP-Adapter beside diffusers' own IP-Adapter with two images.

``python -m attnlib.bench.speed.references benchmarks/results/references-cpu.json`` measures again what that file holds.
Each contender has a U-Net of its own with the same weights, and all take turns; times are those of the processor, on
one thread. Keys and values of references stand over the steps of a run, and are computed before.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks import attach
from ...steer.diffusion.mip_adapter import MIPAdapter
from ..clock import interleave, limit_threads, machine, ratio

#: Widths, heads and text of the U-Net; its attention is at the two finest resolutions.
SIZES = {"channels": (160, 320), "head_dim": 40, "text_width": 512, "latent": 32}


def _unet(channels: tuple[int, ...], head_dim: int, text_width: int, latent: int) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=latent, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels), cross_attention_dim=text_width,
        attention_head_dim=[c // head_dim for c in channels], norm_num_groups=4,
    ).eval()  # fmt: skip


def _with_image_prompts(unet: Any, tokens: Tensor, masked: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """diffusers' IP-Adapter: both images side by side, or one after the other under masks."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.rpartition(".")[0])
        if attention.is_cross_attention:
            new: Any = IPAdapterAttnProcessor2_0(
                attention.to_q.out_features, attention.to_k.in_features, num_tokens=(tokens.shape[2],)
            )
            new.to_k_ip[0].weight.data.copy_(attention.to_k.weight)
            new.to_v_ip[0].weight.data.copy_(attention.to_v.weight)
        else:
            new = AttnProcessor2_0()
        processors[name] = new
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = nn.Identity()  # what the images are is given as tokens
    side = unet.config.sample_size
    extra = {"ip_adapter_masks": [torch.ones(1, tokens.shape[1], side, side)]} if masked else None

    def call(latents: Tensor, text: Tensor) -> Tensor:
        # As UNet2DConditionModel hands them on with encoder_hid_dim_type="ip_image_proj".
        both = (text, [tokens.expand(len(latents), -1, -1, -1)])
        out: Tensor = unet(latents, 500, both, cross_attention_kwargs=extra)[0]
        return out

    return call


@torch.no_grad()
def measure(repeats: int = 15, progress: Callable[[str], None] | None = None, **sizes: Any) -> dict[str, Any]:
    """Times of a call of the denoiser with guidance, and how they compare.

    Args:
        repeats: rounds that count.
        progress: told each round and contender.
        sizes: instead of some of :data:`SIZES`.
    """
    settings: dict[str, Any] = {**SIZES, **sizes}
    plain = _unet(**settings)
    width, side = settings["text_width"], settings["latent"]
    torch.manual_seed(1)
    latents, text = torch.randn(2, 4, side, side), torch.randn(2, 77, width)
    tokens, names = torch.randn(1, 2, 4, width), torch.randn(1, 2, 77, width)
    hooked = copy.deepcopy(plain)
    adapter = MIPAdapter.of(hooked).refer(tokens, entities=names, lengths=[1, 2], empty_entities=names[0, 0])
    runs: dict[str, Callable[[], Any]] = {"none": lambda: plain(latents, 500, text)[0]}
    for name, masked in (("diffusers", False), ("diffusers, masks", True)):
        call = _with_image_prompts(copy.deepcopy(plain), tokens, masked)
        runs[name] = functools.partial(call, latents, text)
    with limit_threads(1), attach(hooked, adapter, rows=("uncond", "cond")):
        runs["mip-adapter"] = lambda: hooked(latents, 500, text)[0]
        times = interleave(runs, repeats, "cpu", progress)
    return {
        "what": "seconds of a call of a U-Net with guidance and two reference images of 4 tokens, names of 1 and 2",
        "settings": {**settings, "repeats": repeats},
        "seconds": {name: time.median for name, time in times.items()},
        "mip-adapter to": {
            name: ratio(times["mip-adapter"], time) for name, time in times.items() if name != "mip-adapter"
        },
        "machine": machine(),
    }


if __name__ == "__main__":
    found = measure(progress=lambda text: print(text, file=sys.stderr))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
