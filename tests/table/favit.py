from attnlib.check import Case

ROWS = [
    Case("favit", dict(dim=32, num_heads=2, sr_ratio=2, window_size=3), (6, 4)),
    Case("favit", dict(dim=32, num_heads=2, window_size=2, qkv_bias=False), (4, 6), "last"),
    Case("favit", dict(dim=32, num_heads=2, sr_ratio=2, window_size=3, legacy_fusion=True), (6, 4), "legacy"),
    Case("favit", dict(dim=32, num_heads=1, sr_ratio=3, window_size=2, compat="authors"), (6, 6), "authors"),
]
