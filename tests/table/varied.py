from attnlib.check import Case

ROWS = [
    Case("vsa-varied-size-window", dict(dim=8, num_heads=2, window_size=2), (4, 6)),
    Case("vsa-varied-size-window", dict(dim=8, num_heads=2, window_size=3, zero_init=False), (7, 5), "padded"),
    Case(
        "vsa-varied-size-window",
        dict(dim=8, num_heads=2, window_size=(3, 2), border="mask", rel_bias=False, zero_init=False),
        (6, 6),
        "mask",
    ),
]
