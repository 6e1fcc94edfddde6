"""Heads that secure computation can afford."""

from attnlib.check import Case

ROWS = [
    Case("mpcvit", dict(dim=12, num_heads=3), (10,)),
    Case("mpcvit", dict(dim=12, num_heads=2, alpha=0.0, qkv_bias=True), (3, 4), "scaling"),
    Case("mpcvit", dict(dim=12, num_heads=2, alpha=0.4, per="layer", scale=0.3), (10,), "mixed"),
    Case("mpcvit", dict(dim=12, num_heads=2, alpha=0.3, per="row", tokens=10), (10,), "rows", grid_setting="tokens"),
]
