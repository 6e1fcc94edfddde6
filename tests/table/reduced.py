from torch import Tensor

from attnlib import Layout
from attnlib.check import Case

RECTANGLES = "attnlib.nn.partition.rgt:RectangularAttention"
_AGENTS = ((4, {"num_agents": 4}), (16, {"num_agents": 16}), (64, {"num_agents": 64}))


def _few(x: Tensor) -> dict[str, Tensor]:
    """Three agents that no token has made."""
    numbers = (x.new_ones(x.shape[0] * 3 * x.shape[-1]).cumsum(0) * 0.7548776662).frac()
    return {"carry": numbers.view(x.shape[0], 3, x.shape[-1])}


ROWS = [
    Case(
        "agent-attention",
        dict(dim=8, num_heads=2, num_agents=4, grid=6, extra_tokens=1, qkv_bias=True),
        (6, 6),
        "deit",
        layout=Layout.image(6, 6, cls=1),
        symbols={"agents": _AGENTS},
    ),
    Case("agent-attention", dict(dim=8, num_heads=2, num_agents=(2, 3), grid=8, sr_ratio=2), (8, 8), "pvt"),
    Case("agent-attention", dict(dim=8, num_heads=2, num_agents=4, window_size=4, shift_size=2), (8, 8), "swin"),
    Case("agent-attention", dict(dim=8, num_heads=2, num_agents=(2, 3), bias_agents=4, grid=5), (6, 7), "detector"),
    Case("agent-attention", dict(dim=8, num_heads=2, num_agents=4, window_size=((6, 2), (2, 6))), (6, 6), "cswin"),
    Case("agent-sd", dict(dim=8, num_heads=2), (9,), "agents", extras=_few),
    Case("agent-sd", dict(dim=8, num_heads=2, shortcut=0.0), (3, 4), "no-shortcut", extras=_few),
    Case("rgt", dict(dim=12, num_heads=2), (16, 20), growth=((256, 256), (1024, 1024), (4096, 4096))),
    Case("rgt", dict(dim=12, num_heads=3, c_ratio=1.0, recursions=1), (8, 6), "once"),
    Case("rgt", dict(dim=12, num_heads=2, recursions=0, compat="authors"), (3, 4), "none"),
    Case(RECTANGLES, dict(dim=96, num_heads=2, split_size=(2, 4)), (4, 8), "rectangles"),
    Case(RECTANGLES, dict(dim=96, num_heads=2, split_size=(2, 3), shift=True), (6, 6), "shifted-rectangles"),
    Case("interformer-imsa", dict(dim=8, num_heads=2, pool_ratios=(1, 2)), (6, 4), context_grid=(5, 7)),
    Case(
        "interformer-imsa",
        dict(dim=8, num_heads=2, pool_ratios=(2, 3), target_size=(6, 8)),
        (6, 8),
        "bounded",
        context_grid=(12, 9),
    ),
]

ROWS += [
    Case("dual-token-vit", dict(dim=8, num_heads=2, grid=3), (5, 6)),
    Case(
        "dual-token-vit",
        dict(dim=8, num_heads=2, grid=2, steps=1, token_mlp="mix", fusion="concat", resize="bilinear"),
        (6, 8),
        "steps",
    ),
    Case("dual-token-vit", dict(dim=8, num_heads=1, grid=3, alpha=0.0, learn_alpha=False), (4, 4), "pooled"),
]
