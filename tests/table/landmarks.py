from attnlib.check import Case

_LONG = ((32,), (64,), (128,))  # growth shows once N is beyond a few chunks

ROWS = [
    Case("nystromformer", dict(dim=16, num_heads=2, num_landmarks=4), (13,), growth=_LONG),
    Case(
        "nystromformer",
        dict(dim=16, num_heads=4, num_landmarks=3, conv_size=3, compat="authors", qkv_bias=False),
        (12,),
        "authors",
        growth=_LONG,
    ),
    Case("performer", dict(dim=16, num_heads=2, num_features=12), (12,), growth=_LONG),
    Case("performer", dict(dim=16, num_heads=2, num_features=6, causal=True, chunk=8), (12,), "causal", growth=_LONG),
    Case(
        "performer",
        dict(dim=16, num_heads=2, num_features=6, context_dim=12, compat="authors"),
        (12,),
        "authors",
        growth=_LONG,
    ),
    Case("abc", dict(dim=16, num_heads=2, num_landmarks=3), (12,), growth=_LONG),
    Case("abc", dict(dim=16, num_heads=2, num_landmarks=3, causal=True, chunk=16), (12,), "causal", growth=_LONG),
    Case("abc", dict(dim=16, num_heads=2, num_landmarks=4, context_dim=12), (12,), "cross", growth=_LONG),
    Case(
        "abc",
        dict(dim=16, num_heads=2, num_landmarks=3, add_bias_kv=True, add_zero_attn=True),
        (12,),
        "more keys",
        growth=_LONG,
    ),
    Case(
        "abc",
        dict(dim=16, num_heads=2, num_landmarks=3, causal=True, compat="authors"),
        (12,),
        "authors",
        growth=_LONG,
    ),
    Case("lara", dict(dim=16, num_heads=2, num_landmarks=4), (13,), growth=_LONG),
    Case(
        "lara",
        dict(dim=16, num_heads=4, num_landmarks=3, proposal="adaptive", value_norms=True, antithetic=True),
        (12,),
        "adaptive",
        growth=_LONG,
    ),
]
