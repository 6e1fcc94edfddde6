import torch

from attnlib.models.perception.oat import OAT
from attnlib.models.perception.scanpaths import behaviour, multimatch, sequence_score

model = OAT(dim=48, hidden=48, depth=(2, 2), table_size=9).eval()
rows, columns = 3, 9
places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).reshape(1, -1, 2)
shelf, sought = torch.rand(1, rows * columns, 30, 24, 3), torch.tensor([14])  # pictures of objects; which to find

paths = model.predict(shelf, places.float(), sought, samples=2, max_steps=8, generator=torch.Generator().manual_seed(0))
one, other = paths[0]
print(one.tolist(), behaviour(one, sought=14))
print(sequence_score(one, other))
at = places[0].double()
print(multimatch(at[one[one >= 0]], at[other[other >= 0]], size=(rows, columns)))
