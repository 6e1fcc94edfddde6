from attnlib.check import Case

ROWS = [
    Case("video-ccam", dict(dim=8, num_heads=2), (5,), context_grid=(7,)),
    Case("video-ccam", dict(dim=8, num_heads=2, num_kv_heads=1, context_dim=6), (9,), "frames", context_grid=(4,)),
]
