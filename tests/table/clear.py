from attnlib.check import Case
from attnlib.grids import Layout

ROWS = [
    Case(
        "clear", dict(dim=8, num_heads=2, window_size=2), (5, 4), layout=Layout.image(5, 4, text=3),
        growth=((64, 64), (128, 64), (256, 64)),  # images wider than a tile of keys
    ),
    Case(
        "clear",
        dict(dim=8, num_heads=2, window_size=2, down_factor=2, proportional=True, qk_norm=False),
        (4, 6), "pooled", layout=Layout.image(4, 6, text=2),
    ),
]  # fmt: skip
