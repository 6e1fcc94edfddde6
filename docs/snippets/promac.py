import torch

from attnlib.look.segment import align, boxes_in, crops

for crop in crops((48, 64), scales=[1, 2]):
    print(crop)
print(boxes_in("The frog is at [0.25, 0.50, 0.75, 1.00].", (48, 64))[0].tolist())
weights, kept = align(torch.tensor([20.0, 24.0, 18.0]))  # CLIP's logits of what was cut out, for "frog"
print(weights.tolist(), kept.tolist())
