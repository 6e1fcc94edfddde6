from attnlib.check import Case

ROWS = [
    Case("hyperzzw-terminator", dict(dim=6, hidden=8, local_hidden=6), (6, 6)),
    Case(
        "hyperzzw-terminator", dict(dim=6, hidden=8, local_hidden=6, kernel_size=5, compat="authors"), (5, 5), "authors"
    ),
]
