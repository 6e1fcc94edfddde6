import torch

from attnlib.look.speak import CallableSpeaker
from attnlib.look.zoom import DC2

image = torch.full((256, 256, 3), 90, dtype=torch.uint8)
image[200:216, 40:56] = torch.tensor([0, 255, 0], dtype=torch.uint8)


def ask(pictures, text):  # a stand-in for Speaker(model, processor)
    dot = (pictures[0][..., 1] > 200).any()
    return "a green dot" if dot and pictures[0].shape[0] <= 128 else "a dot" if dot else "a wall"


speaker = CallableSpeaker(ask, features=lambda picture: picture.mean((0, 1)))
words = ["dot", "wall", "green"]
dc2 = DC2(
    speaker,
    embed=lambda text: torch.tensor([float(word in text) for word in words]),
    leaf=64,
    theta=1e-6,
    objects=lambda caption: [word for word in words[:2] if word in caption],
)
answer = dc2.answer(image, "What colour is the dot?")
print(answer.cues, answer.boxes, dict(answer.calls))
