import torch

import attnlib
from attnlib.models.multimodal.ait import AiT
from attnlib.models.multimodal.soft_tokens import Solver, Vocabulary
from attnlib.models.multimodal.vqvae import VQVAE

words = Vocabulary(num_bins=64, num_classes=3, mask_codes=16, depth_codes=16)
backbone = attnlib.create_model(
    "dinat_mini", features_only=True, embed_dim=8, depths=(1, 1), num_heads=(1, 1), kernel_size=3, dilations=None
)
solver = Solver(backbone.feature_info.channels()[-1], words, 32, 4, 64, 2, 2, grid=(8, 8), max_length=64)
model = AiT(backbone, solver, depth_vae=VQVAE(num_codes=16, dim=8, hidden_dim=4, ratio=16))

images, depth = torch.randn(2, 3, 64, 64), torch.rand(2, 64, 64) * 5
losses = model.loss(images, "depth", depth)
sum(losses.values()).backward()
print({name: round(float(value.detach()), 2) for name, value in losses.items()})
print(model.eval().predict(images, "depth", flip=True).shape)
