from attnlib.check import Case

ROWS = [
    # Wide enough that a folded key of which one token is there is not shut by its ReLU for every input.
    Case("vwformer", dict(dim=32, num_heads=2, ratio=2, num_windows=2), (8, 12)),
    Case("vwformer", dict(dim=128, num_heads=2, ratio=4, window_size=2, norm=False), (8, 6), "sized"),
    Case("vwformer", dict(dim=8, num_heads=2, ratio=1, window_size=2, norm=False), (4, 6), "windows"),
    Case("vwformer", dict(dim=32, ratio=2, num_windows=1, compat="authors"), (4, 4), "authors"),
]
