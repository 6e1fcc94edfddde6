import torch

from attnlib.look.segment import GenSAM
from attnlib.look.segment.segmenter import Segments


def segmenter(image):  # a stand-in for Segmenter(SamModel.from_pretrained(...))
    def predict(points=None, labels=None, box=None, mask=None):
        near = torch.zeros(image.shape[:2])
        for (x, y), label in zip(points, labels, strict=True):
            near[int(y), int(x)] = 1.0 if label == 1 else -1.0
        return Segments(near[None], torch.ones(1))

    return predict


def brightness(image, names, surroundings):  # a stand-in for SurgeryMaps(CLIPModel.from_pretrained(...), tokenizer)
    return torch.nn.functional.adaptive_avg_pool2d(image.mean(-1)[None], 7)[0]


image = torch.zeros(56, 84, 3)
image[10:20, 60:70] = 1.0
answer = GenSAM(segmenter, brightness, (["frog"], ["leaf"]), rounds=2)(image)
print(answer.steps[0].points[answer.steps[0].labels == 1].tolist(), answer.chosen)
