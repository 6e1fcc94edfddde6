from attnlib.check import Case

_PLGA = dict(dim=16, num_heads=2, metric_hidden=6, residual_units=1)

ROWS = [
    Case("pldr-llm-plga", _PLGA, (12,)),
    Case("pldr-llm-plga", dict(_PLGA, metric="cached"), (12,), "cached"),
    Case("pldr-llm-plga", dict(_PLGA, causal=False, rotary=None), (3, 4), "image"),
]
