import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import attnlib
from attnlib.hooks import TokenTypes

text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, pad_token_id=0)  # fmt: skip
vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
                          image_size=16, patch_size=4)  # fmt: skip
config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=62, image_seq_length=16,
                     vision_feature_select_strategy="default")  # fmt: skip
model = LlavaForConditionalGeneration(config).eval()  # stands for any LLaVA-style model of transformers
ids = torch.randint(3, 60, (1, 24))
ids[:, 3:19] = 62
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
types = TokenTypes(image=62)
