import torch

from attnlib.grids import log_polar_windows
from attnlib.models.perception import foveated_blur, match_strength, occlude, similarity, uniform_blur

images = torch.rand(4, 3, 64, 64)
windows = log_polar_windows((64, 64), scale=0.6, fovea=8)
foveated = foveated_blur(images, windows, strength=0.3)
target = float(similarity(images, foveated).mean())
print(target, match_strength(uniform_blur, images, target))  # a uniform blur that loses as much
hidden, share = occlude(images, "glaucoma", level=6)
