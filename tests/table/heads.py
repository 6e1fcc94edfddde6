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
    Case("key-driven-gqa", dict(dim=16, num_heads=4), (12,)),
    Case("key-driven-gqa", dict(dim=16, num_heads=4, kind="average", window=2), (12,), "average"),
    Case("key-driven-gqa", dict(dim=16, num_heads=4, causal=True), (12,), "causal"),
]
