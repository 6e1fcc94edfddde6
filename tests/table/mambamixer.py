from attnlib.check import Case

_LONG = ((32,), (64,), (128,))  # growth shows once N is beyond a few chunks

ROWS = [
    Case("mambamixer-channels", dict(dim=8, d_state=2), (5,)),
    Case("mambamixer-channels", dict(dim=8, d_state=2, group=4, maps="shared"), (3, 2), "shared"),
    Case("mambamixer", dict(dim=8, d_state=2, blocks=2, group=4), (9,), growth=_LONG),
    Case(
        "mambamixer", dict(dim=8, d_state=2, causal=True, per_block=2, group=4, chunk=8), (9,), "causal", growth=_LONG
    ),
    Case(
        "mambamixer", dict(dim=8, d_state=2, token="ss2d", averaging="softmax", residual=True, group=4), (3, 4), "map",
        growth=((8, 8), (16, 16), (32, 32)),
    ),
    Case("mambamixer", dict(dim=8, d_state=2, channel=False, blocks=2), (9,), "tokens", growth=_LONG),
]  # fmt: skip
