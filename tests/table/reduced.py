from attnlib import Layout
from attnlib.check import Case

_AGENTS = ((4, {"num_agents": 4}), (16, {"num_agents": 16}), (64, {"num_agents": 64}))

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
    Case("agent-attention", dict(dim=8, num_heads=2, num_agents=4, window_size=((6, 2), (2, 6))), (6, 6), "cswin"),
]
