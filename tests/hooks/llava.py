"""A tiny LLaVA-style model and a prompt with one image."""

import torch

from hooks.models import SIZES, image_prompt

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
    return image_prompt(IMAGE_ID, 8, batch, seed)


def outspoken_llava():
    """A model whose scores and answer to the image differ clearly, and a batch with padding on the left."""
    model = llava()
    inputs = llava_inputs(model)
    inputs["input_ids"][0, :2] = 0
    inputs["attention_mask"][0, :2] = 0
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
        for p in model.model.multi_modal_projector.parameters():
            p.mul_(40)
    return model, inputs
