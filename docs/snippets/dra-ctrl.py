import torch
from diffusers import HunyuanVideoTransformer3DModel

import attnlib
from attnlib.steer import DimensionReduction

model = HunyuanVideoTransformer3DModel(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=10,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    patch_size=2,
    patch_size_t=1,
    text_embed_dim=6,
    pooled_projection_dim=4,
    rope_axes_dim=(2, 4, 4),
    guidance_embeds=True,
    image_condition_type="token_replace",
)
frames = torch.randn(1, 4, 4, 8, 8)  # a condition, a transition of two frames, the wanted image
with torch.no_grad(), attnlib.attach(model, DimensionReduction(shift=0.6, shift_from=2)):
    out = model(
        frames, torch.tensor([500]), torch.randn(1, 7, 6), torch.ones(1, 7), torch.randn(1, 4), torch.tensor([6000.0])
    ).sample
print(out[:, :, -1].shape)
