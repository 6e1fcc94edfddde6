import torch
import torch.distributed as dist

from attnlib import parallel

store = dist.HashStore()  # one process here; torchrun starts one per chunk of the sequence
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
q, k, v = torch.randn(3, 1, 2, 16, 8)
print(parallel.linear_attention(q, k, v, causal=True).shape)
dist.destroy_process_group()
