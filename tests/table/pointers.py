from attnlib.check import Case

ROWS = [
    Case("pointer-networks", dict(dim=8, hidden=6), (12,)),
    Case("pointer-networks", dict(dim=12, glimpse=True), (12,), "glimpse"),
]
