from attnlib.check import Case

ROWS = [
    Case("gaussian-adaptive-attention", dict(dim=12, num_heads=3), (12,)),
    Case(
        "gaussian-adaptive-attention", dict(dim=12, num_heads=3, compat="authors", padding_value=0.0), (12,), "authors"
    ),
    Case("gaussian-adaptive-attention", dict(dim=12, num_heads=3, residual=True), (12,), "residual"),
    Case("gaussian-adaptive-attention", dict(dim=8, num_heads=2, axis="tokens"), (4, 5), "tokens"),
    Case("gaussian-adaptive-attention", dict(dim=8, num_heads=1, axis="tokens"), (16,), "tokens-one-head"),
]

ROWS += [
    Case("rcmha", dict(dim=16, num_heads=2, max_distance=8192), (12,)),
    Case("rcmha", dict(dim=16, num_heads=2, max_distance=8192, causal=False), (12,), "noncausal"),
    Case("rcmha", dict(dim=16, num_heads=2, relative=False), (12,), "conv"),
    Case("rcmha", dict(dim=16, num_heads=2, max_distance=8192, qkv_conv=False), (12,), "relative"),
    Case("rcmha", dict(dim=16, num_heads=2, relative=False, qkv_conv=False, causal=False), (12,), "neither"),
]

ROWS += [
    Case("s2-attention-dkernel", dict(dim=16, num_heads=4, block_size=2, local_blocks=1), (12,)),
    Case(
        "s2-attention-dkernel",
        dict(
            dim=16,
            num_heads=4,
            num_kv_heads=2,
            block_size=2,
            local_blocks=1,
            pattern_heads="query",
            offset=1,
            dense_heads=1,
        ),
        (12,),
        "query-heads",
    ),
    Case(
        "s2-attention-dkernel",
        dict(dim=16, num_heads=4, block_size=2, local_blocks=(2, 1), causal=False, stride=3),
        (13,),
        "noncausal",
    ),
    Case(
        "s2-attention-dkernel",
        dict(dim=16, num_heads=4, num_kv_heads=2, block_size=3, local_blocks=2, stride=2, dense_heads=1, rotary=1e4),
        (12,),
        "groups",
    ),
]

ROWS += [
    Case("activator-geglu", dict(dim=8), (12,)),
    Case("activator-geglu", dict(dim=8, hidden_dim=12, shared_norm=False), (12,), "two-norms"),
]
