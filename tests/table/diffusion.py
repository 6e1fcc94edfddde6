from attnlib.check import Case
from attnlib.grids import Layout

ROWS = [
    Case("linfusion", dict(dim=8, num_heads=2), (3, 4), layout=Layout.image(3, 4, text=2)),
    Case("linfusion", dict(dim=8, num_heads=2, mid_dim=0, qkv_bias=True, compat="authors"), (7,), "authors"),
    Case("linfusion", dict(dim=8, num_heads=2, context_dim=6, mid_dim=5), (6,), "cross"),
]
