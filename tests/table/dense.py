from attnlib import Layout
from attnlib.check import Case

ROWS = [
    Case("softmax-attention", dict(dim=16, num_heads=4, num_kv_heads=2), (12,), layout=Layout.image(3, 3, cls=1)),
    Case("softmax-attention", dict(dim=16, num_heads=2, causal=True, rotary=10000.0), (12,), "causal"),
    Case("softmax-attention", dict(dim=16, num_heads=2), (4, 5), "image"),
    Case("softmax-attention", dict(dim=16, num_heads=2, context_dim=8), (12,), "cross", context_grid=(7,)),
]
