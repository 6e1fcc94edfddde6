import torch

from attnlib.look.flow import attention_flow, flow_map
from attnlib.look.prompts import from_map

maps = torch.rand(4, 1, 2, 20, 20).tril()  # four layers, two heads, 16 image tokens and four words
maps = maps / maps.sum(-1, keepdim=True)
flow = attention_flow(maps, heads="mean-max", regulariser="column")
seen = flow_map(flow, tokens=torch.tensor([18, 19]), image=torch.arange(16), grid=(4, 4))
prompt = from_map(seen, image_size=(480, 640), rule="component")
print(prompt.points.tolist(), prompt.labels.tolist())
