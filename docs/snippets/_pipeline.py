import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import attnlib

unet = UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4,
).eval()  # fmt: skip
parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
pipe = StableDiffusionPipeline(  # stands for a pipeline of diffusers with its weights
    unet=unet, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False, **parts
)
pipe.set_progress_bar_config(disable=True)
prompt = {"prompt_embeds": torch.randn(1, 7, 12), "negative_prompt_embeds": torch.randn(1, 7, 12)}
