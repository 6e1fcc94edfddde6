"""Based (Arora et al., 2024): convolutions in most layers, Taylor linear attention and a short window in every fifth.

The released mixtures as settings of :class:`attnlib.models.language.DecoderConfig`; training, generation with a state
of fixed size, and saving are those of :class:`attnlib.models.language.DecoderForCausalLM`. Needs ``transformers``.

Differs from the authors' code: the state of the window holds as many keys as it reads, where theirs keeps all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..nn.linear.based import BaseConv, BasedWindow, TaylorLinearAttention
from ..nn.released import Released, Rule
from .language import DecoderConfig, DecoderForCausalLM

#: Width, layers, and the layers of linear attention; a window follows each of them.
SIZES: dict[str, dict[str, Any]] = {
    "based-360m": dict(hidden_size=1024, num_hidden_layers=27, linear_layers=(1, 6, 11, 16, 21)),
    "based-1.3b": dict(hidden_size=1792, num_hidden_layers=36, linear_layers=(1, 6, 11, 16, 21, 27, 33)),
}
#: Parameters of these models, as the authors' configurations build them.
PARAMS = {"based-360m": 362_620_928, "based-1.3b": 1_349_453_056}


def based_config(
    name: str | None = "based-360m",
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    num_attention_heads: int = 16,
    linear_layers: Sequence[int] | None = None,
    window_layers: Sequence[int] | None = None,
    window_size: int = 128,
    feature_dim: int = 16,
    kernel_size: int = 3,
    expand: int = 4,
    conv_bias: bool = False,
    intermediate_size: int | None = None,
    vocab_size: int = 50264,
    **settings: Any,
) -> DecoderConfig:
    """Settings of a Based model.

    Args:
        name: ``"based-360m"`` or ``"based-1.3b"``, for what is left out; ``None`` to say all.
        hidden_size: width.
        num_hidden_layers: layers.
        num_attention_heads: heads of linear attention and windows.
        linear_layers: layers with Taylor linear attention.
        window_layers: layers with a window; those after the linear ones by default. All others are convolutions.
        window_size: tokens before its own that a window reads. The released configurations say 256, which their class
            halves.
        feature_dim: width of the queries and keys of linear attention, per head.
        kernel_size: tokens that the convolutions read.
        expand: width of the convolutions' first projection over ``hidden_size``.
        conv_bias: bias of the convolution, which their kernel has and their plain class has not.
        intermediate_size: hidden width of the feed-forward; twice ``hidden_size`` by default.
        vocab_size: symbols; that of GPT-2, padded to a multiple of 8, by default.
        settings: further settings of :class:`attnlib.models.language.DecoderConfig`.

    Reference: Arora et al., 2024, arXiv 2402.18668.

    >>> config = based_config(None, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, linear_layers=[1])
    >>> [config.layer_spec(i)["name"] for i in range(3)]
    ['based-conv', 'based', 'based-window']
    """
    size: dict[str, Any] = {}
    if name is not None:
        check_choice("name", name, list(SIZES))
        size = SIZES[name]
    given = dict(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, linear_layers=linear_layers)
    size = {**size, **{key: value for key, value in given.items() if value is not None}}
    lacking = [key for key in given if key not in size]
    if lacking:
        raise ValueError(f"name=None leaves out {', '.join(lacking)}; give them or one of {list(SIZES)}")
    width, depth = size["hidden_size"], size["num_hidden_layers"]
    linear = list(size["linear_layers"])
    window = [i + 1 for i in linear if i + 1 < depth] if window_layers is None else list(window_layers)
    for what, layers in (("linear_layers", linear), ("window_layers", window)):
        outside = [i for i in layers if not 0 <= i < depth]
        if outside:
            raise ValueError(f"{what} has {outside}; with num_hidden_layers={depth} layers are 0 to {depth - 1}")
    both = sorted(set(linear) & set(window))
    if both:
        raise ValueError(f"layers {both} stand in linear_layers and in window_layers")
    mechanisms: list[dict[str, Any]] = [
        dict(name="based", feature_dim=feature_dim)
        if i in linear
        else dict(name="based-window", window_size=window_size)
        if i in window
        else dict(name="based-conv", kernel_size=kernel_size, expand=expand, conv_bias=conv_bias)
        for i in range(depth)
    ]
    return DecoderConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=num_attention_heads,
        intermediate_size=2 * width if intermediate_size is None else intermediate_size, mechanisms=mechanisms,
        **{"rms_norm_eps": 1e-5, **settings},
    )  # fmt: skip


@torch.no_grad()
def start(model: DecoderForCausalLM) -> DecoderForCausalLM:
    """The authors' first weights: normal with ``initializer_range``, biases zero, the layers that write to the residual
    stream scaled by ``1 / sqrt(2 layers)``."""
    std, depth = model.config.initializer_range, model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            last = name.endswith((".mixer.proj", ".mlp.down"))
            module.weight.normal_(0.0, std / math.sqrt(2 * depth) if last else std)
            if module.bias is not None:
                module.bias.zero_()
    return model


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the authors' ``GPTLMHeadModel``."""
    theirs = Released(state_dict, "GPTLMHeadModel of Based")
    layer, ours = r"transformer\.layers\.(\d+)", r"model.layers.\1"

    def mixer(held: dict[str, Tensor]) -> dict[str, Tensor]:
        kinds = {"proj_q.weight": TaylorLinearAttention, "Wqkv.weight": BasedWindow}
        cls: Any = next((kind for name, kind in kinds.items() if name in held), BaseConv)
        return dict(cls.convert_state_dict(held))

    def gated(match: Any, value: Tensor) -> dict[str, Tensor]:
        up, gate = value.chunk(2)
        place = f"model.layers.{match[1]}.mlp"
        return {f"{place}.up.weight": up, f"{place}.gate.weight": gate}

    out = theirs.parts(rf"{layer}\.mixer\.(.+)", f"{ours}.mixer", mixer)
    rules: dict[str, Rule] = {
        r"transformer\.embeddings\.word_embeddings\.weight": "model.embed_tokens.weight",
        r"transformer\.ln_f\.weight": "model.norm.weight",
        r"lm_head\.weight": "lm_head.weight",
        rf"{layer}\.norm1\.weight": f"{ours}.mixer_norm.weight",
        rf"{layer}\.norm2\.weight": f"{ours}.mlp_norm.weight",
        rf"{layer}\.mlp\.fc1\.weight": gated,
        rf"{layer}\.mlp\.fc2\.weight": f"{ours}.mlp.down.weight",
    }
    theirs.leave(r"transformer\.decay\.decay|.*metrics.*", because="no layer reads it")
    return theirs.close(out | theirs.renamed(rules))


__all__ = ["based_config", "convert_state_dict", "start"]
