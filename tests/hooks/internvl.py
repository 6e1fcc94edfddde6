"""A tiny InternVL-style model (its processors want torchvision, the model does not) and a prompt with one image."""

import torch

from hooks.models import SIZES, image_prompt

IMAGE_ID = 62


def internvl(seed=0, **changes):
    import transformers as hf

    torch.manual_seed(seed)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=[16, 16],
        patch_size=[4, 4],
    )  # fmt: skip
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **SIZES, **changes}, vision_config=vision, image_token_id=IMAGE_ID,
        image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config).eval()


def internvl_inputs(model, batch=2, seed=1):
    return image_prompt(IMAGE_ID, 16, batch, seed)
