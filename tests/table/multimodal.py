from attnlib import Layout
from attnlib.check import Case

PICTURE = Layout((("text", 2), ("image", (2, 3)), ("question", 4)))
ROWS = [
    Case("video-ccam", dict(dim=8, num_heads=2), (5,), context_grid=(7,)),
    Case("video-ccam", dict(dim=8, num_heads=2, num_kv_heads=1, context_dim=6), (9,), "frames", context_grid=(4,)),
    Case("ee-mllm", dict(dim=8, num_heads=4, num_kv_heads=2), (12,), layout=PICTURE),
    Case("ee-mllm", dict(dim=8, num_heads=2, rotary=1e4, aligner="none"), (12,), "no values", layout=PICTURE),
    Case("wings-lorra", dict(dim=8, num_heads=2, rank=3), (6,), context_grid=(5,)),
    Case("wings-lorra", dict(dim=16, num_heads=2, rank=2, rotary=1e4), (6,), "rotary", context_grid=(9,)),
    Case("p-adapter", dict(dim=16, num_heads=2), (7,)),
    Case("p-adapter", dict(dim=16, num_heads=2, num_kv_heads=1, causal=True, p=2.5), (8,), "causal"),
    Case(
        "p-adapter",
        dict(dim=16, num_heads=1, cross=True, context_dim=6, pooled=4, p=1.5),
        (5,),
        "cross",
        context_grid=(9,),
    ),
]
