import torch
from diffusers import WanTransformer3DModel

import attnlib
from attnlib.steer.diffusion.video import BlockSparse

model = WanTransformer3DModel(  # stands for a video denoiser of diffusers
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=16, ffn_dim=24, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
).eval()  # fmt: skip
inputs = {"hidden_states": torch.randn(1, 4, 4, 6, 4), "timestep": torch.tensor([10]),
          "encoder_hidden_states": torch.randn(1, 5, 16)}  # fmt: skip
