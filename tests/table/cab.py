from attnlib.check import Case

_LONG = ((32,), (64,), (128,))

ROWS = [
    Case("cosformer", dict(dim=16, num_heads=2, max_length=8192), (12,)),
    Case(
        "cosformer", dict(dim=16, num_heads=2, max_length=1 << 16, activation="elu1", out_proj=False), (3, 4), "image"
    ),
    Case("cosformer", dict(dim=16, num_heads=4, max_length=8192, causal=True, chunk=8), (12,), "causal", growth=_LONG),
    Case("cosformer", dict(dim=16, num_heads=2, max_length=8192, context_dim=8), (12,), "cross"),
    Case("cosformer", dict(dim=16, num_heads=2, compat="authors"), (12,), "authors"),
    Case("cosformer", dict(dim=16, num_heads=3, max_length=8192, head_dim=4), (12,), "wide"),
    Case("s4d", dict(dim=8, d_state=4, num_heads=2), (12,)),
    Case("s4d", dict(dim=8, d_state=4, bidirectional=True, postact="glu"), (12,), "bidirectional"),
    Case("s4d", dict(dim=8, d_state=6, activation="silu", scaling="linear"), (12,), "linear"),
    Case("probsparse", dict(dim=16, num_heads=2, factor=1), (12,)),
    Case("probsparse", dict(dim=16, num_heads=4, factor=2, head_dim=3, value_dim=5), (13,), "widths"),
    Case("long-short", dict(dim=16, num_heads=2, num_landmarks=3, window_size=4), (12,)),
    Case("long-short", dict(dim=16, num_heads=4, num_landmarks=0, window_size=5), (12,), "window"),
    Case("causal-long-short", dict(dim=8, num_heads=2, chunk_size=4, window_size=3), (12,)),
    Case(
        "causal-long-short",
        dict(dim=8, num_heads=4, chunk_size=2, window_size=3, chunk_rank=2, qkv_bias=True, mem_len=4, compat="authors"),
        (11,), "authors",
    ),
]  # fmt: skip
