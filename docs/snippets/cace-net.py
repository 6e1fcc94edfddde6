import torch

from attnlib.models.detect.cace import CACENet

model = CACENet(num_classes=5, video_dim=64, audio_dim=16, dim=32, hidden=(16, 64, 32))
frames, sound = torch.randn(2, 10, 7, 7, 64), torch.randn(2, 10, 16)  # ten segments of a picture's cells and of sound
events = torch.tensor([[5, 5, 2, 2, 2, 5, 5, 5, 5, 5], [5] * 10])  # 5 is background

print({name: round(term.item(), 3) for name, term in model.loss(model(frames, sound), events).items()})
print(model.eval().predict(frames, sound))
print(model.guidance.maps(frames, sound).guided.shape)  # where sound points
