import torch

from attnlib.models.tensor_brain import TensorBrain

brain = TensorBrain(entities=20, predicates=5, times=3, sensory_dim=16)
views = {role: torch.randn(2, 16) for role in ("subject", "object", "predicate")}
perceived = brain(views)
print(perceived.chosen, perceived.log_probs["predicate"].exp())
print(brain(time=torch.tensor([0, 2])).chosen)  # remembered, without any view
