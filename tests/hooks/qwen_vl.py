"""A tiny Qwen2-VL with an image of 4 x 4 patches, merged to 4 tokens, in every prompt."""

import pytest
import torch

IMAGE_ID, VISION_START, VISION_END, TOKENS = 62, 61, 63, 4


def qwen_vl(seed=0):
    import transformers as hf

    torch.manual_seed(seed)
    config = hf.Qwen2VLConfig(
        text_config=dict(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        ),
        vision_config=dict(
            depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=1, in_channels=3,
        ),
        image_token_id=IMAGE_ID, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        video_token_id=60,
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config).eval()


def qwen_vl_inputs(batch=2, pad=(2, 0), seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(3, 50, (batch, 16))
    ids[:, 3], ids[:, 4:8], ids[:, 8] = VISION_START, IMAGE_ID, VISION_END
    for row, count in enumerate(pad):
        ids[row, :count] = 0
    return {
        "input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(batch * 16, 48),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch), "mm_token_type_ids": (ids == IMAGE_ID).int(),
    }  # fmt: skip


def needs_turn():
    """Skip where this release turns three axes by a function of its own: no rotation is known there, by name."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    if not hasattr(modeling_qwen2_vl, "apply_rotary_pos_emb"):
        pytest.skip("this release of transformers turns positions of three axes by a function of its own")
