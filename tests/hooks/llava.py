"""A tiny LLaVA-style model and a prompt with one image."""

import torch

from hooks.models import SIZES

IMAGE_ID = 62


def llava(seed=0, **changes):
    import transformers as hf

    torch.manual_seed(seed)
    text = hf.LlamaConfig(**{**SIZES, **changes})
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_ID, image_seq_length=4,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config).eval()


def llava_inputs(model, batch=2, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(3, 60, (batch, 14))
    ids[:, 3:7] = IMAGE_ID
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 8, 8),
    }
