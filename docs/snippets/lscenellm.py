import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import attnlib
from attnlib.hooks import TokenTypes
from attnlib.steer import SceneMagnifier, detail_of_grid, magnifier_layers

text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
)
config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=62, image_seq_length=4)
model = LlavaForConditionalGeneration(config).eval()  # stands for a pretrained model

layers = magnifier_layers(model, start=1)  # to be trained; they read from layer 2 on
ids, pixels = torch.tensor([[1, 62, 62, 62, 62, 8, 9]]), torch.randn(1, 3, 8, 8)
with torch.no_grad():  # four details behind each of the four image tokens, from the picture at twice the size
    larger = torch.nn.functional.interpolate(pixels, scale_factor=2).unfold(2, 8, 8).unfold(3, 8, 8)
    tiles = larger.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    features = model.model.multi_modal_projector(model.model.vision_tower(tiles).last_hidden_state[:, 1:])
    fine = features.view(1, 2, 2, 2, 2, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
magnifier = SceneMagnifier(layers, detail_of_grid(fine, (2, 2)))
with torch.no_grad(), attnlib.attach(model, magnifier, token_types=TokenTypes(image=62)):
    print(model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3).shape, magnifier.detail.shape)
