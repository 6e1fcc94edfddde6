import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from attnlib.models.backbones.uniformerv2 import from_clip

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
model = from_clip(clip, num_classes=10, local=2, global_layers=(1, 2)).eval()

clips = torch.randn(2, 3, 5, 32, 32)
frames = clip(clips.transpose(1, 2).flatten(0, 1)).last_hidden_state[:, 0].unflatten(0, (2, 5))
same = torch.allclose(2 * model.forward_features(clips), frames.mean(1), atol=1e-5)
print(model(clips).shape, same)  # it starts as the frame-averaged image model
