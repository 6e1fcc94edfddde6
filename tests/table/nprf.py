from attnlib.check import Case

NAME = "nprf-rpe-fft-attention"
SMALL = dict(dim=12, num_heads=3, num_features=5, max_distance=7)

ROWS = [
    Case(NAME, SMALL, (12,)),
    Case(NAME, dict(**SMALL, causal=True), (12,), "causal"),
    Case(NAME, dict(**SMALL, causal=True, form="direct"), (12,), "causal-direct"),
    Case(NAME, dict(dim=12, num_heads=3, num_features=5, max_distance=(5, 4), rank=2), (5, 6), "image"),
    Case(NAME, dict(dim=12, num_heads=3, num_features=64, features="trigonometric", orthogonal=True), (12,), "trig"),
    Case(NAME, dict(dim=12, num_heads=3, num_features=5, relative=False, norm="none"), (12,), "performer"),
]
