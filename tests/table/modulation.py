from attnlib.check import Case

ROWS = [
    Case("focalnet", dict(dim=8), (6, 6)),
    Case("focalnet", dict(dim=8, grid_rank=1, use_postln_in_modulation=True), (12,), "sequence"),
    Case("focalnet", dict(dim=8, grid_rank=3, focal_level=1, normalize_modulator=True), (3, 4, 4), "video"),
    Case("focalnet", dict(dim=8, focal_level=0), (6, 6), "global"),
    Case("mambaout", dict(dim=8), (6, 6)),
    Case("mambaout", dict(dim=8, conv_ratio=0.5, kernel_size=3, activation="silu", grid_rank=1), (12,), "sequence"),
    Case("mambaout", dict(dim=4, expansion=2.0, conv_ratio=2.0, kernel_size=3, grid_rank=3), (3, 4, 4), "video"),
    Case("davit", dict(dim=16, num_heads=2), (4, 6)),
    Case("davit", dict(dim=12, num_heads=1, scale="tokens", qkv_bias=False), (12,), "tokens"),
    Case("efficientvit-cascaded-group-attention", dict(dim=8, num_heads=2, key_dim=4, window_size=3), (5, 6)),
    Case("smt-scale-aware-modulation", dict(dim=8), (5, 6)),
    Case("smt-scale-aware-modulation", dict(dim=6, num_heads=2, expand_ratio=3, bias=False), (4, 4), "narrow"),
    Case("van-large-kernel-attention", dict(dim=6), (6, 7)),
    Case("van-large-kernel-attention", dict(dim=4, kernel_size=7, dilation=2, grid_rank=1), (12,), "sequence"),
    Case("spectformer", dict(dim=8, grid=(4, 6)), (4, 6)),
    Case("spectformer", dict(dim=8, grid=(5, 7), resample=True), (4, 6), "resampled"),
    Case("spectformer", dict(dim=6, grid=(12,), resample=True), (12,), "sequence"),
    Case("spectformer", dict(dim=4, grid=(3, 4, 5)), (3, 4, 5), "video"),
    Case("overlock-contmix", dict(dim=8, num_heads=1, kernel_size=5, regions=3), (6, 7)),
    Case("overlock-contmix", dict(dim=8, num_heads=2, kernel_size=7, regions=2, value=False), (4, 5), "enlarged"),
]
