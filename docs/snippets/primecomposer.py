import torch

from attnlib.steer import PrimeComposer

path = [torch.randn(1, 4, 8, 8) for _ in range(21)]  # of an inversion by 20 steps, the clean latents first
mask = torch.zeros(8, 8, dtype=torch.bool)
mask[2:5, 2:5] = True
compose = PrimeComposer(path, path, mask, shift=(1, 2), words=("corgi",))
print(compose.box, compose.start().shape)
