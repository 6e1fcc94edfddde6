from attnlib.check import Case

ROWS = [
    Case("stvit-super-token", dict(dim=8, num_heads=2, stoken_size=2), (6, 8)),
    Case("stvit-super-token", dict(dim=8, num_heads=2, stoken_size=1), (4, 5), "one-token"),
    Case(
        "stvit-super-token",
        dict(dim=8, num_heads=2, stoken_size=(3, 2), n_iter=2, border="mask", detach=False, refine="conv"),
        (5, 6),
        "conv",
    ),
    Case("stvit-super-token", dict(dim=8, stoken_size=2, refine="none", pad="zeros", detach=False), (5, 4), "none"),
]
