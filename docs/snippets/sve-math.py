import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import attnlib
from attnlib.models.multimodal.sve_math import FeatureRouter, RoutedProjector

text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
)
config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=62, image_seq_length=4)
model = LlavaForConditionalGeneration(config).eval()  # stands for a pretrained model

encoder = attnlib.create_model(  # stands for an encoder of shapes and junctions
    "dinat_mini", features_only=True, embed_dim=8, depths=(1, 1), num_heads=(1, 1), kernel_size=3, dilations=None
)
lateral = torch.nn.ModuleList(torch.nn.Conv2d(c, 8, 1) for c in encoder.feature_info.channels())
projector = RoutedProjector(FeatureRouter(dim=16, level_dim=8, levels=2), out_dim=32)
model.model.multi_modal_projector = projector

ids = torch.tensor([[1, 62, 62, 62, 62, 8, 9]])
levels = [conv(m).permute(0, 2, 3, 1) for conv, m in zip(lateral, encoder(torch.randn(1, 3, 32, 32)), strict=True)]
with torch.no_grad(), projector.seeing(levels):
    print(model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), max_new_tokens=3).shape)
    print(projector.router(torch.randn(1, 4, 16), levels).gates)
