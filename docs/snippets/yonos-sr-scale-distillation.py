"""Scale distillation: a model of factor 2 learns from pictures, one of factor 4 from it, in one step."""

import torch
from torch import nn

from attnlib.models.diffusion.scale_distillation import OneStepUpscaler, zero_terminal_snr
from attnlib.models.protocol import Optimizers, train_batch


class Denoiser(nn.Module):
    """Noisy pictures and their hints side by side; what diffusers' UNet2DModel answers to."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(6, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, z, t):
        return self.net(z)


plan = zero_terminal_snr(torch.linspace(0.999, 0.01, 50))  # the last step keeps no signal
pictures = torch.rand(4, 3, 16, 16)
model = OneStepUpscaler(Denoiser(), plan, factor=2)
while True:
    optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 1e-3))
    print(model.factor, train_batch(model, {"target": pictures}, optimizers)["denoiser"].keys())
    if model.factor == 8:
        break
    model = model.student()
print(tuple(model.predict(torch.rand(1, 3, 4, 5)).shape))
