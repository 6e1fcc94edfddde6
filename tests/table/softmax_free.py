from attnlib.check import Case

SLUG = "soft-softmax-free-transformer"

ROWS = [
    Case(SLUG, dict(dim=12, num_heads=2, ratio=2), (6, 4)),
    Case(SLUG, dict(dim=12, num_heads=2, ratio=3, norm=True, conv_size=0), (6, 6), "norm"),
    Case(SLUG, dict(dim=12, num_heads=3, ratio=(2, 3), conv_size=5, compat="authors"), (4, 6), "authors"),
    Case(SLUG, dict(dim=12, num_heads=2, ratio=2, norm=True, compat="authors"), (4, 4), "norm-authors"),
    Case(SLUG, dict(dim=12, num_heads=2, ratio=1), (5, 4), "whole"),
]
