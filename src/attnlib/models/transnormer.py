"""TransNormerLLM (Qin et al., 2023 and 2024): a language model on lightning attention, as a transformers model.

Needs ``transformers``. Importing this module registers it with ``AutoConfig`` and ``AutoModelForCausalLM``. Its state
has one size whatever the length, so that every token costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..extras import missing

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError as error:
    raise missing(__name__, error) from error

from ..checks import check_int
from ..nn.linear.lightning_attention_tnl import TransNormerAttention
from ..nn.released import Released
from .language import DecoderConfig, DecoderForCausalLM, DecoderLayer, DecoderModel

#: Widths, layers, heads and widths of the feed-forward of the released sizes.
SIZES: dict[str, dict[str, int]] = {
    "385M": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=8, intermediate_size=2816),
    "1B": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, intermediate_size=5632),
    "7B": dict(hidden_size=4096, num_hidden_layers=30, num_attention_heads=32, intermediate_size=11008),
}


class TransNormerConfig(DecoderConfig):
    """Settings of :class:`TransNormerForCausalLM`; the defaults are the smallest released size.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, initializer_range, tie_word_embeddings: as in
            :class:`attnlib.models.language.DecoderConfig`.
        intermediate_size: hidden width of the feed-forward (``glu_dim`` of the release); -1 for ``hidden_size``.
        attention_dim: width of all heads together (``hidden_dim`` of the release); ``hidden_size`` by default.
        lrpe_layers: layers with linearized relative positions; the first by default.
        scale_embedding: multiply embeddings by ``sqrt(hidden_size)``.
        bias: biases of all linear maps but the head.
        form: of :class:`attnlib.nn.linear.lightning_attention_tnl.TransNormerAttention`.

    >>> TransNormerConfig.sized("7B").num_hidden_layers
    30
    """

    model_type = "attnlib-transnormer"

    vocab_size: int = 64000
    hidden_size: int = 1024
    intermediate_size: int | None = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    attention_dim: int | None = None
    lrpe_layers: list | None = None
    scale_embedding: bool = True
    bias: bool = False
    form: str = "released"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size == -1:
            self.intermediate_size = self.hidden_size
        layers = [0] if self.lrpe_layers is None else list(self.lrpe_layers)
        wrong = [i for i in layers if not isinstance(i, int) or not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"lrpe_layers={layers} names layers that are not there; choose of {self.num_hidden_layers}"
            )
        self.lrpe_layers = layers
        if self.attention_dim is not None:
            check_int("attention_dim", self.attention_dim, least=1)
        self.mechanisms = ["lightning-attention-tnl"]
        super().__post_init__(**kwargs)

    @classmethod
    def sized(cls, size: str, **settings: Any) -> TransNormerConfig:
        """A released size: ``"385M"``, ``"1B"`` or ``"7B"``."""
        if size not in SIZES:
            raise ValueError(f"size={size!r} is not possible; choose one of {list(SIZES)}")
        return cls(**{**SIZES[size], **settings})

    def layer_spec(self, index: int) -> dict[str, Any]:
        """Attention of TransNormerLLM with these settings, in every layer."""
        assert self.lrpe_layers is not None
        return {
            "name": "lightning-attention-tnl",
            "num_heads": self.num_attention_heads,
            "layer": index,
            "num_layers": self.num_hidden_layers,
            "form": self.form,
            "lrpe": index in self.lrpe_layers,
            "inner_dim": self.attention_dim,
            "qkv_bias": self.bias,
            "proj_bias": self.bias,
            "init_std": self.initializer_range,
        }


class SGLU(nn.Module):
    """``W_3 (W_1 x * W_2 x)``: a gated linear unit whose gate has no activation."""

    def __init__(self, dim: int, hidden: int, bias: bool = False):
        super().__init__()
        self.l1, self.l2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(dim, hidden, bias=bias)
        self.l3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(self.l1(x) * self.l2(x))


def simple_rms_norm(config: DecoderConfig) -> nn.RMSNorm:
    """``x / sqrt(mean(x^2) + eps)``, without a gain."""
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False)


class TransNormerLayer(DecoderLayer):
    """``x + attention(SRMSNorm(x))``, then ``x + SGLU(SRMSNorm(x))``."""

    mixer: TransNormerAttention

    def make_rest(self, config: DecoderConfig) -> None:
        assert isinstance(config, TransNormerConfig) and config.intermediate_size is not None
        self.mixer_norm, self.mlp_norm = simple_rms_norm(config), simple_rms_norm(config)
        self.mlp = SGLU(config.hidden_size, config.intermediate_size, config.bias)


class TransNormerModel(DecoderModel):
    """Embedding times ``sqrt(C)``, layers, norm."""

    config: TransNormerConfig
    config_class = TransNormerConfig
    layer_class = TransNormerLayer

    def make_norm(self) -> nn.Module:
        return simple_rms_norm(self.config)

    def embed(self, embedded: Tensor) -> Tensor:
        return embedded * math.sqrt(self.config.hidden_size) if self.config.scale_embedding else embedded


class TransNormerForCausalLM(DecoderForCausalLM):
    """TransNormerLLM with its head.

    Differs from the authors' code: positions of the linearized encoding are counted per sequence and kept in its state,
    where theirs keeps one number on the module for all; a token that does not exist takes no step of the decay (of
    padding on the left nothing is to be seen either way, the encoding being relative); one layer alone has slopes.

    Reference: Qin et al., 2024, arXiv 2405.17381.

    >>> import torch
    >>> config = TransNormerConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> TransNormerForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 50])
    """

    config: TransNormerConfig
    config_class = TransNormerConfig
    model: TransNormerModel
    model_class = TransNormerModel
    _no_split_modules = ["TransNormerLayer"]

    @staticmethod
    def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``TransnormerForCausalLM``."""
        theirs = Released({k: v for k, v in state_dict.items()}, "TransnormerForCausalLM")
        layer, ours = r"(?:model\.)?layers\.(\d+)", r"model.layers.\1"
        out = theirs.parts(rf"{layer}\.token_mixer\.(.+)", f"{ours}.mixer", TransNormerAttention.convert_state_dict)
        out |= theirs.renamed(
            {
                rf"{layer}\.channel_mixer\.(l[123]\.(?:weight|bias))": rf"{ours}.mlp.\2",
                r"(?:model\.)?embed_tokens\.weight": "model.embed_tokens.weight",
                r"lm_head\.weight": "lm_head.weight",
            }
        )
        return theirs.close(out)


AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig)
AutoModel.register(TransNormerConfig, TransNormerModel)
AutoModelForCausalLM.register(TransNormerConfig, TransNormerForCausalLM)

__all__: Sequence[str] = ("SGLU", "TransNormerConfig", "TransNormerForCausalLM", "TransNormerModel")
