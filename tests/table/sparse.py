from attnlib.check import Case

ROWS = [
    Case(
        "biformer",
        dict(dim=8, num_heads=2, n_win=4, topk=3),
        (8, 8),
        odd_grid=(9, 6),
        symbols={"topk": ((4, {"topk": 4}), (8, {"topk": 8}), (16, {"topk": 16}))},
    ),
    Case("biformer", dict(dim=8, num_heads=2, n_win=(2, 3), topk=2, qk_dim=4), (4, 6), "rectangular"),
    Case(
        "biformer",
        dict(dim=8, num_heads=2, n_win=2, topk=2, kv_downsample="avgpool", kv_downsample_ratio=2),
        (8, 8),
        "avgpool",
        odd_grid=(10, 8),
    ),
    Case(
        "biformer",
        dict(
            dim=8,
            num_heads=2,
            n_win=2,
            topk=2,
            soft_routing=True,
            diff_routing=True,
            param_routing=True,
            kv_downsample="ada_maxpool",
            kv_per_win=2,
        ),
        (8, 8),
        "soft",
    ),
    Case("biformer", dict(dim=8, num_heads=2, n_win=3, topk=2, compat="authors"), (7, 8), "authors"),
    Case("biformer", dict(dim=8, num_heads=2, n_win=3, topk=2, compat="authors-nchw"), (7, 8), "authors-nchw"),
    Case("sparsifiner", dict(dim=8, num_heads=2, grid=(3, 4), reduce_n=3, keep_rate=0.4), (13,), odd_grid=(9,)),
    Case(
        "sparsifiner", dict(dim=8, num_heads=2, grid=(3, 4), reduce_n=3, keep_rate=0.4), (3, 4), "map", odd_grid=(5, 3)
    ),
    Case(
        "sparsifiner",
        dict(dim=8, num_heads=2, grid=(3, 4), reduce_n=3, threshold=0.003, coef_topk=None, share_basis=True),
        (13,),
        "threshold",
    ),
    Case("sparsifiner", dict(dim=8, num_heads=2, grid=3, reduce_n=2, token_keep_rate=0.6), (10,), "dropping"),
    Case("sparsifiner", dict(dim=8, num_heads=2, grid=3, reduce_n=2, keep_rate=1.0), (10,), "dense"),
    Case("attention-lepe", dict(dim=8, num_heads=2), (4, 5)),
    Case("attention-lepe", dict(dim=8, num_heads=2, lepe="input", side_dwconv=3, qkv_bias=True), (4, 5), "input"),
    Case("attention-lepe", dict(dim=8, num_heads=2, side_dwconv=0), (4, 5), "alone"),
    Case("vmoba", dict(dim=8, num_heads=2, cut=(2, 2), threshold=0.4), (2, 4, 4), odd_grid=(3, 5, 3)),
    Case("vmoba", dict(dim=8, num_heads=2, cut=(1, 2, 2), per="row", topk=2), (2, 4, 4), "cuboids"),
    Case("vmoba", dict(dim=8, num_heads=2, cut=1.5, per="block"), (4, 2, 2), "frames"),
    Case("vmoba", dict(dim=8, num_heads=2, cut=(3,), rank=1, per="all", threshold=0.6), (12,), "sequence"),
    Case("vmoba", dict(dim=8, num_heads=2, cut=(2, 2), rank=2, threshold=1.0), (4, 6), "image"),
]
