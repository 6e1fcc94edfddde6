from attnlib.check import Case

ROWS = [
    Case("vmamba", dict(dim=6, state_dim=3), (4, 5)),
    Case(
        "vmamba",
        dict(dim=8, state_dim=1, expand=1.0, gate="none", routes=("snake", "zigzag-reversed"), fusion="gate"),
        (4, 4),
        "routes",
    ),
    Case("vmamba", dict(dim=6, state_dim=2, norm="softmax", shared=True, kernel_size=0), (3, 4), "shared"),
    Case("vmamba", dict(dim=6, state_dim=2, rank_ratio=1.0, norm="layer-conv", fusion="variation"), (3, 4), "rank"),
    Case("msvmamba", dict(dim=6), (4, 6)),
    Case("msvmamba", dict(dim=6, compat="authors", state_dim=2, norm="softmax", squeeze=False), (5, 4), "authors"),
    Case("msvmamba", dict(dim=6, coarse=False, separate_norms=True, squeeze=False, gate="none"), (3, 4), "whole"),
]
