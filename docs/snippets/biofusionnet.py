import torch

import attnlib
from attnlib.models.bags.biofusionnet import FeatureVAE, Survival
from attnlib.models.losses import concordance

fused = FeatureVAE().predict(torch.randn(6, 20, 1152))  # three features of every patch to one of 256
genes, clinical = torch.randn(6, 138), torch.randn(6, 4)

model = attnlib.create_model("biofusionnet").eval()
risk = model(fused, genes, clinical)  # (6,) log risks; nobody's depends on the others
known = Survival(time=torch.tensor([3.0, 12.0, 7.0, 30.0, 5.0, 9.0]), event=torch.tensor([1, 0, 1, 0, 0, 1]))
print(risk.shape, model.loss(risk, known)["cox"].item(), concordance(risk, *known).item())
