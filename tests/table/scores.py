from attnlib.check import Case

_PLGA = dict(dim=16, num_heads=2, metric_hidden=6, residual_units=1)

ROWS = [
    Case("pldr-llm-plga", _PLGA, (12,)),
    Case("pldr-llm-plga", dict(_PLGA, metric="cached"), (12,), "cached"),
    Case("pldr-llm-plga", dict(dim=16, num_heads=2, metric="fixed"), (12,), "fixed"),
    Case("pldr-llm-plga", dict(_PLGA, causal=False, rotary=None), (3, 4), "image"),
]

_SINK = dict(dim=16, num_heads=2)

ROWS += [
    Case("attention-sink-empirical", dict(_SINK, k_bias=True), (12,), "k-bias"),
    Case(
        "attention-sink-empirical",
        dict(dim=16, num_heads=4, num_kv_heads=2, k_bias=True, v_bias=True, per_head=False, causal=True, rotary=1e4),
        (12,),
        "kv-bias-causal",
    ),
    Case(
        "attention-sink-empirical",
        dict(_SINK, v_bias=True, similarity="sigmoid", normalize=False, causal=True),
        (12,),
        "sigmoid",
    ),
    Case("attention-sink-empirical", dict(_SINK, similarity="elu1"), (3, 4), "elu-image"),
    Case("attention-sink-empirical", dict(_SINK, causal=True, window_size=3, rotary=1e4), (12,), "window"),
    Case("attention-sink-empirical", dict(_SINK, causal=True, prefix_tokens=3), (12,), "prefix"),
    Case("attention-sink-empirical", dict(_SINK, causal=True, relative="bucket"), (12,), "bucket"),
    Case("attention-sink-empirical", dict(_SINK, kernel="elu1", causal=True, rotary=1e4), (12,), "elu-kernel"),
    Case("attention-sink-empirical", dict(_SINK, kernel="mlp", v_bias=True), (12,), "mlp-kernel"),
    Case("attention-sink-empirical", dict(_SINK, kernel="identity", causal=True), (12,), "linear-kernel"),
]

_DIFF = dict(dim=32, num_heads=4, num_k_heads=1, num_v_heads=2)

ROWS += [
    Case("diffqkv-sigma", dict(_DIFF, q_hidden=24), (12,)),
    Case("diffqkv-sigma", dict(_DIFF, k_head_dim=4, causal=True, rotary=1e4, qk_norm=True), (12,), "narrow-causal"),
    Case("diffqkv-sigma", dict(_DIFF, v_keep=3, causal=True, rotary=1e4), (12,), "selective"),
    Case("diffqkv-sigma", dict(_DIFF, num_k_heads=2, num_v_heads=1, v_keep=5), (3, 4), "image"),
]
