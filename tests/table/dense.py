from attnlib import Layout
from attnlib.check import Case

ROWS = [
    Case("softmax-attention", dict(dim=16, num_heads=4, num_kv_heads=2), (12,), layout=Layout.image(3, 3, cls=1)),
    Case("softmax-attention", dict(dim=16, num_heads=2, causal=True, rotary=10000.0), (12,), "causal"),
    Case("softmax-attention", dict(dim=16, num_heads=2), (4, 5), "image"),
    Case("softmax-attention", dict(dim=16, num_heads=2, context_dim=8), (12,), "cross", context_grid=(7,)),
]

ROWS += [
    Case("sigmoid-attention", dict(dim=16, num_heads=2), (12,), layout=Layout.image(3, 3, cls=1)),
    Case("sigmoid-attention", dict(dim=16, num_heads=2, causal=True, alibi=True), (12,), "causal"),
    Case("sigmoid-attention", dict(dim=16, num_heads=2, context_length=16, row_norm="sqrt"), (3, 4), "image"),
    Case(
        "sigmoid-attention",
        dict(dim=16, num_heads=2, causal=True, activation="softmax", qk_norm="rms"),
        (12,),
        "softmax",
    ),
    Case("sigmoid-attention", dict(dim=16, num_heads=2, causal=True, linear_norm="post"), (12,), "post-norm"),
    Case("quantizable-transformers", dict(dim=16, num_heads=2, gamma=-0.03), (12,), "clipped"),
    Case(
        "quantizable-transformers",
        dict(dim=16, num_heads=2, causal=True, gate="conditional_per_token", gate_hidden=4),
        (12,),
        "gated-causal",
    ),
    Case("softmax-attention", dict(dim=16, num_heads=2, rotary=100.0, rotary_dim=4), (12,), "rotary"),
    Case("sigmoid-attention", dict(dim=16, num_heads=2, alibi=True, compat="authors"), (12,), "alibi"),
    Case("quantizable-transformers", dict(dim=16, num_heads=2, relative="key", max_distance=8192), (12,), "relative"),
    Case(
        "quantizable-transformers",
        dict(dim=16, num_heads=4, num_kv_heads=2, relative="key_query", max_distance=8192, causal=True, out_proj=False),
        (12,),
        "relative-causal",
    ),
    Case("quantizable-transformers", dict(dim=16, num_heads=2, gate="conditional_per_head"), (3, 4), "gated-head"),
    Case("quantizable-transformers", dict(dim=16, num_heads=2, head_mask=[0.5, 1.0], causal=True), (12,), "head-mask"),
    Case("softplus-attention-lssar", dict(dim=16, num_heads=2), (12,)),
    Case("softplus-attention-lssar", dict(dim=16, num_heads=2, power=None, causal=True, rotary=1e4), (12,), "causal"),
    Case("selective-self-attention", dict(dim=16, num_heads=2), (12,)),
    Case("selective-self-attention", dict(dim=16, num_heads=2, causal=True, per_head=True), (12,), "causal"),
    Case(
        "selective-self-attention",
        dict(dim=16, num_heads=2, causal=True, position="none", sparse=4, token_values=False),
        (12,),
        "sparse",
    ),
]

ROWS += [
    Case("eva", dict(dim=16, num_heads=2), (12,), layout=Layout.image(3, 3, cls=1)),
    Case(
        "eva",
        dict(dim=16, num_heads=2, relative="table", grid=(3, 4)),
        (3, 4),
        "table",
        layout=Layout.image(3, 3, cls=1),
    ),
    Case("eva", dict(dim=16, num_heads=2, relative="axes", grid=(5, 3), qkv_bias=False), (4, 4), "axes"),
    Case(
        "eva",
        dict(dim=16, num_heads=2, rotary=10000.0, rotary_grid=(6, 5), inner_norm=True),
        (3, 4),
        "rotary",
        layout=Layout.image(3, 3, cls=1),
    ),
]

ROWS += [
    Case("dependency-vit", dict(dim=12, num_heads=3), (12,), layout=Layout.image(3, 3, cls=1)),
    Case("dependency-vit", dict(dim=8, num_heads=2, keep_rate=0.7), (3, 4), "pruned"),
    Case("dependency-vit", dict(dim=8, num_heads=2, keep_rate=0.5, prune_by="message"), (12,), "by-message"),
    Case(
        "dependency-vit",
        dict(dim=8, num_heads=2, context_dim=6, temperature=1.0, selector_bias=True, controller_bias=True),
        (2, 3, 2),
        "cross",
        context_grid=(7,),
    ),
    Case("dependency-vit", dict(dim=8, num_heads=1, selector=False, controller=False), (3, 4), "reversed"),
    Case("danet-position-attention", dict(dim=8), (4, 5)),
    Case("danet-position-attention", dict(dim=8, qk_dim=3, bias=False), (3, 2, 3), "volume"),
]
