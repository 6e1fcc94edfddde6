from attnlib import Layout
from attnlib.check import Case

_LONG = ((32,), (64,), (128,))  # growth shows once N is beyond a few chunks

ROWS = [
    Case(
        "hedgehog", dict(dim=16, num_heads=4, num_kv_heads=2, causal=True, rotary=10000.0, chunk=8), (12,), growth=_LONG
    ),
    Case("hedgehog", dict(dim=16, num_heads=4, feature_dim=3, features="exp"), (4, 4), "noncausal"),
    Case(
        "hedgehog",
        dict(
            dim=16, num_heads=2, features="joint-softmax", feature_options=dict(bias="features"), share_features=True,
            normalize=False, output_norm="rms", causal=True, chunk=8,
        ),
        (12,), "fla", growth=_LONG,
    ),
    Case("hedgehog", dict(dim=16, num_heads=2, attention_transfer=True, causal=True), (12,), "transfer"),
    Case("lolcats", dict(dim=16, num_heads=4, num_kv_heads=2, window_size=4, window="terraced"), (13,), "terraced"),
    Case(
        "lolcats",
        dict(
            dim=16, num_heads=4, window_size=4, window="terraced", compat="authors", features="relu", tie_features=True,
            feature_options=dict(skip=True),
        ),
        (13,), "terraced-authors",
    ),
    Case("lightning-attention-tnl", dict(dim=16, num_heads=4, num_layers=3, chunk=8), (12,), growth=_LONG),
    Case(
        "lightning-attention-tnl",
        dict(dim=16, num_heads=2, layer=1, num_layers=2, form="example", inner_dim=12, chunk=8),
        (12,), "example", growth=_LONG,
    ),
    Case("lightning-attention-2", dict(dim=16, num_heads=4, chunk=8), (12,), growth=_LONG),
    Case(
        "lightning-attention-2",
        dict(
            dim=16, num_heads=2, layer=1, num_layers=4, lrpe=True, value_activation="silu", norm="layer",
            gate="low-rank", chunk=8,
        ),
        (12,),
        "tnl",
        growth=_LONG,
    ),
    Case("lolcats", dict(dim=16, num_heads=4, num_kv_heads=2, window_size=4, chunk=8), (12,), growth=_LONG),
    Case(
        "lolcats",
        dict(dim=16, num_heads=2, window_size=0, rotary=None, features="exp", affine=True, chunk=8),
        (12,),
        "linear",
        growth=_LONG,
    ),
    Case("lolcats", dict(dim=16, num_heads=2, window_size=4, attention_transfer=True), (12,), "transfer"),
    Case(
        "lolcats",
        dict(dim=16, num_heads=2, window_size=4, chunk=8, rotary_scaling=dict(rope_type="linear", factor=2.0)),
        (12,), "scaled", growth=_LONG,
    ),
    Case("based", dict(dim=16, num_heads=2, feature_dim=4, chunk=8), (12,), growth=_LONG),
    Case("based", dict(dim=16, num_heads=4, feature_dim=3, head_dim=5, packed=False, eps=1e-6, chunk=8), (12,), "full",
         growth=_LONG),
    Case("based-window", dict(dim=16, num_heads=2, window_size=4), (12,), growth=_LONG),
    Case("based-window", dict(dim=16, num_heads=2, window_size=0, rotary=None, qkv_bias=True), (12,), "itself",
         growth=_LONG),
    Case("based-conv", dict(dim=8), (12,), growth=_LONG),
    Case("based-conv", dict(dim=8, kernel_size=5, expand=2, conv_bias=True), (12,), "wide", growth=_LONG),
    Case("inline-attention", dict(dim=8, num_heads=2), (4, 5), layout=Layout.image(4, 5, cls=1)),
    Case("inline-attention", dict(dim=8, num_heads=2, features="exp", window_size=4, shift_size=2), (8, 8), "swin"),
    Case("inline-attention", dict(dim=8, num_heads=4, qkv_bias=False, lepe=True, pre_norm=True), (6, 4), "cswin"),
    Case("inline-attention", dict(dim=8, num_heads=2, residual=False, scale=2.0), (4, 5), "global"),
    Case("rala-ravlt", dict(dim=8, num_heads=2), (4, 5)),
    Case("rala-ravlt", dict(dim=16, num_heads=2, attention="softmax", kernel_size=3), (4, 5), "softmax"),
    Case(
        "rala-ravlt", dict(dim=6, num_heads=2, kernel_size=0, rotary=None, reweight=False, gate=False), (4, 5), "plain"
    ),
    Case("scatterformer", dict(dim=8, num_heads=2, window_size=4), (8, 8)),
    Case("scatterformer", dict(dim=8, num_heads=2, window_size=3, qkv_bias=True), (2, 4, 6), "volume"),
]  # fmt: skip
