import torch
import transformers

from attnlib.models.multimodal.mapsam import MapSAM

sizes = dict(hidden_size=16, num_attention_heads=2)
image = dict(image_size=64, patch_size=16)
config = transformers.SamConfig(
    vision_config=dict(
        **sizes,
        **image,
        num_hidden_layers=2,
        output_channels=16,
        mlp_dim=32,
        global_attn_indexes=[1],
        window_size=2,
        num_pos_feats=8,
    ),
    prompt_encoder_config=dict(hidden_size=16, mask_input_channels=4, **image),
    mask_decoder_config=dict(**sizes, num_hidden_layers=2, mlp_dim=32, iou_head_hidden_dim=16),
)
model = MapSAM(transformers.SamModel(config), rank=4)  # with pretrained weights: SamModel.from_pretrained(...)
prediction = model(torch.randn(2, 64, 64, 3))
print(
    prediction.masks.shape, {name: term.shape for name, term in model.loss(prediction, torch.zeros(2, 64, 64)).items()}
)
