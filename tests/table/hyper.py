from attnlib.check import Case

SMALL = dict(dim=8, num_heads=2, num_projs=3, block_size=4, sample_size=3, min_seq_len=5)
# Work per token is that of a piece and of two blocks a level, whose number grows with the logarithm.
LONG = ((4096,), (8192,), (16384,))

ROWS = [
    Case("hyperattention", SMALL, (22,)),
    Case(
        "hyperattention",
        dict(SMALL, causal=True, num_kv_heads=1, rotary=100.0, block_size=2, sample_size=2, min_seq_len=8),
        (22,),
        "causal",
        growth=LONG,
    ),
    Case("hyperattention", dict(SMALL, compat="authors", rotary=100.0), (5, 4), "authors"),
]
