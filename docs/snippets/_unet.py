import torch
from diffusers import UNet2DConditionModel

import attnlib

model = UNet2DConditionModel(  # stands for an image denoiser of diffusers
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4,
).eval()  # fmt: skip
noise, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 12)
