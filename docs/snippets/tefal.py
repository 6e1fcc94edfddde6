import torch

from attnlib.models.retrieval.tefal import TEFAL

model = TEFAL(dim=64, audio_dim=32).eval()
texts, frames, sound = torch.randn(5, 64), torch.randn(3, 12, 64), torch.randn(3, 20, 32)
heard = torch.tensor([[True], [True], [False]]).expand(3, 20)  # the last has no sound

print(model.predict(texts, frames, sound, audio_valid=heard).argmax(1))  # the video of each text
print(model.loss(model(texts[:3], frames, sound, audio_valid=heard)))
