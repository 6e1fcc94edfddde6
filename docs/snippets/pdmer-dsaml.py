import torch

from attnlib.models.meta import Rated
from attnlib.models.pdmer import PDMER

model = PDMER(dim=32, num_heads=4, depth=2, hidden=64, mel_size=(11, 32), inner_steps=4)
mel, song, felt = torch.randn(4, 60, 11, 32), torch.randn(4, 32), torch.rand(4, 60, 2)  # arousal and valence

batch = {"mel": mel, "song": song, "target": Rated(felt, annotator=torch.tensor([0, 0, 1, 1]))}
(step,) = model.steps(batch)  # of each listener, one song to adapt to and one to be judged by
print({name: round(term.item(), 3) for name, term in step.terms().items()})

mine = model.eval().adapt({"mel": mel[:1], "song": song[:1], "target": felt[:1]})  # one song that I have rated
print(mine.predict(torch.randn(1, 90, 11, 32), song[1:2]).shape)  # any length, in windows of 60 frames
