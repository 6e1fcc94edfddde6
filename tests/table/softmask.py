from attnlib import Layout
from attnlib.check import Case

_ILLAMA = dict(dim=16, num_heads=2)

ROWS = [
    Case("illama", _ILLAMA, (10,), layout=Layout((("image", (3, 3)), ("cls", 1)))),
    Case("illama", _ILLAMA, (3, 4), "image"),
    Case("illama", dict(_ILLAMA, mask_mode="pre"), (12,), "pre"),
]
