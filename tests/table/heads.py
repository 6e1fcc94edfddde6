from attnlib.check import Case

ROWS = [
    Case("moh-mixture-of-heads", dict(dim=32, num_heads=4, shared_heads=1, active_heads=2), (12,)),
    Case(
        "moh-mixture-of-heads", dict(dim=32, num_heads=4, shared_heads=2, active_heads=1, causal=True), (12,), "causal"
    ),
    Case(
        "moh-mixture-of-heads", dict(dim=32, num_heads=4, shared_heads=2, active_heads=1, router="norm"), (3, 4), "norm"
    ),
]

ROWS += [
    Case(
        "moh-vit-attention",
        dict(dim=16, num_heads=4, shared_heads=1, active_heads=2, bias_hidden=8, base_grid=8),
        (4, 5),
    ),
    Case(
        "moh-vit-aggregated-attention",
        dict(dim=16, num_heads=4, shared_heads=2, active_heads=1, bias_hidden=8, sr_ratio=2, base_grid=8),
        (4, 5),
    ),
    Case(
        "moh-vit-aggregated-attention",
        dict(dim=16, num_heads=4, shared_heads=4, active_heads=0, bias_hidden=8, pool_size=3, window_size=5),
        (6, 5),
        "fixed-pool",
    ),
]

ROWS += [
    Case("key-driven-gqa", dict(dim=16, num_heads=4), (12,)),
    Case("key-driven-gqa", dict(dim=16, num_heads=4, kind="average", window=2), (12,), "average"),
    Case("key-driven-gqa", dict(dim=16, num_heads=4, causal=True), (12,), "causal"),
]
