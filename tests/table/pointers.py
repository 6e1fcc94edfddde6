from attnlib.check import Case

ROWS = [
    Case("pointer-networks", dict(dim=8, hidden=6), (12,)),
]
