from attnlib.check import Case

ROWS = [
    Case("shvit", dict(dim=12, partial_dim=6, qk_dim=4), (4, 5)),
    Case("shvit", dict(dim=8, partial_dim=8, qk_dim=4), (12,), "all-channels"),
]
