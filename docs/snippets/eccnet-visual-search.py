import torch

from attnlib.bench.data.displays import display
from attnlib.models.perception import EccNet, asymmetry_index, search

net = EccNet(width=8).eval()  # 64 is VGG-16; net.load_keras(arrays) takes its weights
shown = display("L", count=6, deg2px=6, generator=torch.Generator().manual_seed(0))
found = search(net, shown.image, shown.target, shown.goal, shown.items, border=32)
print(found.found, found.fixations.tolist())
print(asymmetry_index(hard=33, easy=14))  # of people, for L among T and T among L
