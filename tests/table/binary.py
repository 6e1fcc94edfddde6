from attnlib.check import Case

# Without biases: fresh ones are thirty times as large as what fresh maps of one bit give, and would decide every sign.
ROWS = [
    Case("bivit", dict(dim=12, num_heads=3, qkv_bias=False), (10,)),
    Case(
        "bivit", dict(dim=12, num_heads=3, qkv_bias=False, causal=True, num_kv_heads=1, rotary=100.0), (10,), "causal"
    ),
    Case("bivit", dict(dim=12, num_heads=2, normalizer="step", weight_scale="mean", compat="authors"), (3, 4), "step"),
]
