from attnlib.check import Case

_LONG = ((32,), (64,), (128,))  # growth shows once N is beyond a few chunks

ROWS = [
    Case("mamba", dict(dim=16, d_state=4, chunk=8), (12,), growth=_LONG),
    Case(
        "mamba",
        dict(dim=12, d_state=3, d_conv=2, expand=1.5, dt_rank=2, bias=True, conv_bias=False, chunk=4),
        (12,), "options", growth=_LONG,
    ),
    Case("mamba2", dict(dim=16, d_state=4, head_dim=8, chunk=8), (12,), growth=_LONG),
    Case(
        "mamba2",
        dict(
            dim=8, d_state=3, head_dim=4, groups=2, d_conv=2, norm_before_gate=True, skip_per_channel=True, bias=True,
            chunk=4,
        ),
        (12,), "groups", growth=_LONG,
    ),
    Case("bimamba", dict(dim=16, d_state=4, chunk=8), (12,), growth=_LONG),
    Case("bimamba", dict(dim=16, d_state=4, divide=True, layer_scale=0.5), (3, 5), "image"),
    Case("bimamba", dict(dim=16, d_state=4, kind="v1", bias=True), (12,), "v1", growth=_LONG),
]  # fmt: skip
