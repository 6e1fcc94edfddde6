"""Tiny LLaVA-style models over any language model, with sixteen tokens per image, and prompts with images."""

import pytest
import torch

from hooks.models import SIZES, language_model, release

#: Prompts with unequal numbers of images, copied by generate() itself (beams, several samples).
COPIES = pytest.mark.skipif(
    release() < (5, 19), reason="generate() of transformers before 5.19 mixes up the images of copied prompts"
)

IMAGE_ID = 62
SIDE = 4
TOKENS = SIDE * SIDE


def picture_model(family="llama", seed=0, vision_layers=4, implementation="sdpa", tower="clip", **changes):
    import transformers as hf

    text = language_model(family, seed, attn_implementation=implementation, **changes)
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=vision_layers, num_attention_heads=2,
        image_size=4 * SIDE, patch_size=4,
    )  # fmt: skip
    vision = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig}[tower](**sizes)
    strategy = "default" if tower == "clip" else "full"
    config = hf.LlavaConfig(
        text_config=text.config, vision_config=vision, image_token_id=IMAGE_ID, image_seq_length=TOKENS,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = hf.LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.copy_(text.lm_head.weight)
        for name, p in model.model.vision_tower.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                p.mul_(15)
        for p in model.model.multi_modal_projector.parameters():
            p.mul_(10)
    return model


def picture_inputs(images=(1, 1), before=3, after=5, seed=1):
    """One row per entry of ``images``, that many images each, padded on the left."""
    torch.manual_seed(seed)
    rows = []
    for n in images:
        row = [torch.randint(3, 60, (before,))]
        for _ in range(n):
            row += [torch.full((TOKENS,), IMAGE_ID), torch.randint(3, 60, (after,))]
        rows.append(torch.cat(row) if n else torch.randint(3, 60, (before + after,)))
    length = max(len(r) for r in rows)
    ids = torch.stack([torch.cat([torch.zeros(length - len(r), dtype=torch.long), r]) for r in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if sum(images):
        inputs["pixel_values"] = torch.randn(sum(images), 3, 4 * SIDE, 4 * SIDE)
    return inputs


def image_slots(inputs):
    return inputs["input_ids"] == IMAGE_ID


def shorter(model, inputs, keep):
    """The oracle: embeddings of the prompt without the tokens that left, padded on the left."""
    model_inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    caught = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: caught.update(k), with_kwargs=True
    )  # fmt: skip
    with torch.no_grad():
        model(**model_inputs, attention_mask=inputs["attention_mask"])
    handle.remove()
    rows = [caught["inputs_embeds"][b, keep[b] & (inputs["attention_mask"][b] == 1)] for b in range(len(keep))]
    length = max(len(r) for r in rows)
    embeds = torch.stack([torch.cat([r.new_zeros(length - len(r), r.shape[1]), r]) for r in rows])
    mask = torch.stack([torch.cat([torch.zeros(length - len(r)), torch.ones(len(r))]) for r in rows]).long()
    return {"inputs_embeds": embeds, "attention_mask": mask}


__all__ = ["IMAGE_ID", "SIDE", "SIZES", "TOKENS", "image_slots", "picture_inputs", "picture_model", "shorter"]
