import torch

from attnlib.look.speak import CallableSpeaker
from attnlib.look.zoom import ZoomEye


def seen(pictures):  # a stand-in for Speaker(model, processor): it sees green that fills enough of a view
    return (pictures[-1][..., 1] > 200).mean() > 0.004


speaker = CallableSpeaker(
    lambda pictures, text: "green" if seen(pictures) else "I cannot tell",
    logits=lambda pictures, text, words: [2.0, 0.0] if seen(pictures) else [0.0, 2.0],
    input_size=32,
    family="llava_next",
)
image = torch.full((256, 256, 3), 90, dtype=torch.uint8)
image[200:208, 40:48] = torch.tensor([0, 255, 0], dtype=torch.uint8)
answer = ZoomEye(speaker, cues=lambda question: ["dot"]).answer(image, "What colour is the dot?")
print(speaker.ask(image, "What colour is the dot?"), "->", answer, answer.boxes, dict(answer.calls))
