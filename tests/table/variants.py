from attnlib.check import Case

ROWS = [
    Case("gaussian-adaptive-attention", dict(dim=12, num_heads=3), (12,)),
    Case("gaussian-adaptive-attention", dict(dim=12, num_heads=3, residual=True), (12,), "residual"),
    Case("gaussian-adaptive-attention", dict(dim=8, num_heads=2, axis="tokens"), (4, 5), "tokens"),
    Case("gaussian-adaptive-attention", dict(dim=8, num_heads=1, axis="tokens"), (16,), "tokens-one-head"),
]
