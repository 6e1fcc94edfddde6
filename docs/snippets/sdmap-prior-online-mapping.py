import torch

from attnlib.models.maps.standard import PolylineEncoder, PolylinePrior, RasterPrior, collate, draw

street = (torch.tensor([[-40.0, 2.0], [0.0, 1.0], [40.0, -6.0]]), 1)  # metres ahead and to the left, class "main"
path = (torch.tensor([[10.0, -20.0], [12.0, 20.0]]), 4)
maps = collate([[street, path], []])  # the second place has no map

encode, read = PolylineEncoder(64), PolylinePrior(64)
bev = torch.randn(2, 64, 50, 25)
seen = read(bev, encode(maps), maps.valid)
print(torch.equal(seen[1], bev[1]))

print(RasterPrior(64)(bev, draw(maps, (50, 25))).shape)
