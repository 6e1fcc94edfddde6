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
    Case("dynamicvis", dict(dim=8, reduction=2, state_dim=2), (4, 5)),
    Case(
        "dynamicvis",
        dict(
            dim=8,
            reduction=3,
            state_dim=2,
            order="place",
            normalize=True,
            keep_rest=False,
            global_tokens=2,
            global_place="middle",
        ),
        (12,),
        "place",
    ),
    Case("dynamicvis", dict(dim=8, reduction=0, state_dim=2, path="gate", global_tokens=0), (4, 4), "whole"),
    Case("mhs-vm", dict(dim=8, state_dim=2), (4, 5)),
    Case("mhs-vm", dict(dim=7, state_dim=2, families=("C", "X", "S"), threshold=0.5, gate=False), (3, 4), "ungated"),
    Case("mhs-vm", dict(dim=8, state_dim=2, families=("Z", "S"), with_proj=False), (4, 4), "plain"),
    Case("msvmamba", dict(dim=6), (4, 6)),
    Case("msvmamba", dict(dim=6, compat="authors", state_dim=2, norm="softmax", squeeze=False), (5, 4), "authors"),
    Case("msvmamba", dict(dim=6, coarse=False, separate_norms=True, squeeze=False, gate="none"), (3, 4), "whole"),
]
