import torch
from diffusers import UNet2DConditionModel

from attnlib.models.diffusion.ensemble import UNetEnsemble


def net():  # stands for the U-Nets of two fine-tuned models
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4,
    )  # fmt: skip


ensemble = UNetEnsemble([net(), net()], dim=64, num_heads=4)  # StableDiffusionPipeline(unet=ensemble, ...) takes it
noise, prompts = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)  # both nets' prompts side by side
found = ensemble.predict(noise, 500, prompts)
(found.sample - torch.randn_like(noise)).square().mean().backward()
trained = sum(p.numel() for p in ensemble.parameters() if p.grad is not None)
print(found.sample.shape, len(found.weights), trained)
