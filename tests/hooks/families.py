"""One tiny model of every family that can be attached to, and how to call it."""

import torch
from torch import nn

from hooks.models import language_model, prompt


class Family:
    """``make() -> model``; ``call(model) -> (tensor,)`` floats; ``blocks(model)``: what may be checkpointed."""

    def __init__(self, name, make, call, blocks):
        self.name, self.make, self.call, self.blocks = name, make, call, blocks

    def __repr__(self):
        return self.name


def _llama():
    return language_model()


def _decoder():
    from attnlib.models.language import DecoderConfig, DecoderForCausalLM

    torch.manual_seed(0)
    return DecoderForCausalLM(
        DecoderConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    ).eval()


def _logits(model):
    return model(**prompt(length=9, pad=(2, 0)), use_cache=False).logits


def _encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def _native():
    import attnlib

    return attnlib.create("softmax-attention", dim=16, num_heads=2)


class _Attention(nn.Module):
    """The shape of timm's."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.fused_attn = 2, True
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn, self.mlp = attn, nn.Linear(16, 16)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x).tanh()


def _blocks(make):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(*[_Block(make()) for _ in range(2)]).eval()

    return model


def _unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4,
    ).eval()  # fmt: skip


def _denoise(model):
    torch.manual_seed(1)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 12)}
    return model(**inputs, timestep=3).sample


def _seen(*shape):
    def call(model):
        torch.manual_seed(1)
        return model(torch.randn(*shape))

    return call


def _layers(path):
    return lambda model: list(model.get_submodule(path))


FAMILIES = [
    Family("transformers", _llama, _logits, _layers("model.layers")),
    Family("decoder", _decoder, _logits, _layers("model.layers")),
    Family("multihead", _encoder, _seen(2, 6, 16), _layers("layers")),
    Family("timm", _blocks(_Attention), _seen(2, 6, 16), list),
    Family("native", _blocks(_native), _seen(2, 6, 16), list),
    Family("diffusers", _unet, _denoise, lambda m: [b.attentions[0] for b in (*m.down_blocks[1:], *m.up_blocks[:1])]),
]
