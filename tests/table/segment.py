from attnlib.check import Case

ROWS = [
    # Wide enough that a folded key of which one token is there is not shut by its ReLU for every input.
    Case("vwformer", dict(dim=32, num_heads=2, ratio=2, num_windows=2), (8, 12)),
    Case("vwformer", dict(dim=128, num_heads=2, ratio=4, window_size=2, norm=False), (8, 6), "sized"),
    Case("vwformer", dict(dim=8, num_heads=2, ratio=1, window_size=2, norm=False), (4, 6), "windows"),
    Case("vwformer", dict(dim=32, ratio=2, num_windows=1, compat="authors"), (4, 4), "authors"),
    Case("window-attention-upsample", dict(dim=8, context_dim=6, num_heads=2, window_size=4), (7, 6)),
    Case(
        "window-attention-upsample",
        dict(dim=8, num_heads=2, window_size=4, shift=2, self_attention=True, query_source="both", mlp_ratio=0.0),
        (6, 8), "shifted",
    ),
    Case(
        "window-attention-upsample",
        dict(dim=8, num_heads=2, window_size=4, kv_source="upsampled"), (6, 8), "upsampled",
    ),
    Case("window-attention-upsample", dict(dim=8, num_heads=2, window_size=None, mlp_ratio=0.0), (4, 6), "global"),
    Case("spatial-reduction-attention", dict(dim=16, num_heads=2, sr_ratio=2), (6, 8)),
    Case("spatial-reduction-attention", dict(dim=16, num_heads=2, sr_ratio=3, qkv_bias=False, compat="authors"), (6, 6),
         "authors"),
    Case("spatial-reduction-attention", dict(dim=16, num_heads=4), (4, 5), "plain"),
]  # fmt: skip
