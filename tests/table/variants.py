from attnlib.check import Case

ROWS = [
    Case("gaussian-adaptive-attention", dict(dim=12, num_heads=3), (12,)),
    Case("gaussian-adaptive-attention", dict(dim=12, num_heads=3, residual=True), (12,), "residual"),
    Case("gaussian-adaptive-attention", dict(dim=8, num_heads=2, axis="tokens"), (4, 5), "tokens"),
    Case("gaussian-adaptive-attention", dict(dim=8, num_heads=1, axis="tokens"), (16,), "tokens-one-head"),
]

ROWS += [
    Case("rcmha", dict(dim=16, num_heads=2, max_distance=8192), (12,)),
    Case("rcmha", dict(dim=16, num_heads=2, max_distance=8192, causal=False), (12,), "noncausal"),
    Case("rcmha", dict(dim=16, num_heads=2, relative=False), (12,), "conv"),
    Case("rcmha", dict(dim=16, num_heads=2, max_distance=8192, qkv_conv=False), (12,), "relative"),
    Case("rcmha", dict(dim=16, num_heads=2, relative=False, qkv_conv=False, causal=False), (12,), "neither"),
]
