import torch

import attnlib
from attnlib.models.exits import confidence, exit_fractions, find_thresholds

model = attnlib.create_model("resnet18_perceiver_t128", embed_dims=(8, 16, 32, 64), stem_dim=8, num_classes=10).eval()
kept, new = torch.randn(32, 3, 64, 64), torch.randn(8, 3, 64, 64)
with torch.no_grad():
    sure = torch.stack([confidence(y) for y in model.exits(kept)])
thresholds = find_thresholds(sure, exit_fractions(0.7, model.num_exits))
logits, exit = model.predict(new, thresholds)
print(logits.shape, exit.shape)
