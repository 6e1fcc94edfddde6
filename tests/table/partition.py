from attnlib.check import Case

HALF = "attnlib.nn.partition.maxvit:PartitionAttention"

ROWS = [
    Case("halonet", dict(dim=16, num_heads=2, block_size=4, halo_size=1), (8, 12)),
    Case("halonet", dict(dim=16, num_heads=2, block_size=2, qk_ratio=2.0, pad_mode="zero"), (4, 6), "zero"),
    Case("halonet", dict(dim=16, num_heads=2, block_size=2, halo_size=1, pad_mode="clamp"), (6, 6), "clamp"),
    Case("crossformer", dict(dim=64, num_heads=2, group_size=3), (6, 4), "near"),
    Case("crossformer", dict(dim=64, num_heads=2, group_size=2, kind="far", interval=2), (8, 4), "far"),
    Case(
        "crossformer",
        dict(dim=16, num_heads=2, group_size=2, kind="far", interval=None, rel_bias=False),
        (6, 4),
        "plain",
    ),
    Case("cswin-attention", dict(dim=8, num_heads=2, split_size=2), (4, 6)),
    Case("cswin-attention", dict(dim=8, num_heads=4, split_size=3, kernel_size=0), (5, 4), "alone"),
    Case("hat", dict(dim=16, num_heads=2, window_size=4), (8, 12)),
    Case("hat", dict(dim=16, num_heads=2, window_size=4, overlap_ratio=1.0, compat="authors"), (8, 8), "zeros"),
    Case("maxvit", dict(dim=16, num_heads=4, window_size=2), (4, 6)),
    Case("maxvit", dict(dim=16, num_heads=2, window_size=4, grid_size=3, rank=1), (12,), "sequence"),
    Case("maxvit", dict(dim=16, num_heads=2, window_size=2, parallel=True, layer_scale=0.5), (4, 6), "parallel"),
    Case(HALF, dict(dim=16, num_heads=2, window_size=2), (4, 6), "block"),
    Case(HALF, dict(dim=16, num_heads=2, window_size=(3, 2), kind="grid"), (6, 6), "grid"),
    Case(HALF, dict(dim=16, num_heads=2, window_size=2, shift=1), (4, 6), "shifted"),
    Case(HALF, dict(dim=16, num_heads=2, window_size=(3, 2, 2), rel_bias=False), (3, 4, 4), "video"),
    Case(HALF, dict(dim=16, num_heads=2, window_size=2, rel_bias="mlp", rel_hidden=8), (4, 6), "position-mlp"),
]
