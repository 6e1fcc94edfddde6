"""Heads with spans of their own."""

from attnlib.check import Case

_MOA = "moa-mixture-of-attention-spans"
ROWS = [
    Case(_MOA, dict(dim=16, num_heads=2, betas=(0.25, 1.0), block=2), (12,)),
    Case(_MOA, dict(dim=16, num_heads=4, num_kv_heads=2, alphas=(2, 4, 1, 1), betas=0, block=1, length=12,
                    rotary=10000.0), (12,), "windows"),
    Case(_MOA, dict(dim=16, num_heads=2, alphas=(-2, 0), betas=(0.5, 0.25), block=2, sinks=0, length=12), (12,),
         "fixed"),
]  # fmt: skip
