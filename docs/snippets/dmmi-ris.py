"""DMMI: a sentence that may name nothing, one thing or many, and the mask of what it names."""

import torch

from attnlib.models.dense.dmmi import DMMI, referring_scores

small = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4)
model = DMMI(**small, text_dim=32)  # words of a BERT have 768
x, words, erased = torch.rand(2, 3, 48, 40), torch.randn(2, 6, 32), torch.randn(2, 6, 32)
valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
target = torch.zeros(2, 48, 40, dtype=torch.long)  # the second sentence names nothing
target[0, :20] = 1
terms = model.loss(model(x, words, valid, erased), target)
print({name: round(float(term.detach()), 3) for name, term in terms.items()})
print(referring_scores(model.eval().predict(x, words, valid), target == 1))
