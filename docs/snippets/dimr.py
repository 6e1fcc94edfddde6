import torch

from attnlib.models.diffusion.dimr import Branch, DiMR

small = Branch(dim=32, hidden=64, depth=3, size=4, num_heads=2, patch_size=2)  # a transformer at half the side
full = Branch(dim=16, hidden=32, depth=2, size=8)  # convolutions at the full one
model = DiMR([small, full], num_classes=11, sample_size=8)  # or dimr("dimr_xl_2r")

noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
prediction = model(noise, torch.tensor([900, 20]), labels)
losses = model.loss(prediction, torch.randn_like(noise))
sum(losses.values()).backward()
print(prediction.sample.shape, {size: round(loss.item(), 3) for size, loss in losses.items()})
