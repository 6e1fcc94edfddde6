from attnlib.check import Case

ROWS = [
    Case("medvitv2", dict(dim=16, num_heads=2, sr_ratio=2), (4, 6)),
    Case("medvitv2", dict(dim=16, num_heads=2, sr_ratio=2, pool="grid"), (4, 6), "grid"),
    Case("medvitv2", dict(dim=16, num_heads=2, qkv_bias=False), (4, 5), "plain"),
    Case("medvitv2", dict(dim=16, num_heads=4, sr_ratio=2, compat="authors"), (12,), "authors"),
]
