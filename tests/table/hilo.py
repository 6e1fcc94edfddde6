from attnlib.check import Case

ROWS = [
    Case("hilo-litv2", dict(dim=16, num_heads=4, alpha=0.5), (6, 4)),
    Case("hilo-litv2", dict(dim=16, num_heads=4, alpha=0.0, window_size=3, qkv_bias=True), (6, 6), "high"),
    Case("hilo-litv2", dict(dim=16, num_heads=4, alpha=1.0, window_size=(2, 3)), (4, 6), "low"),
    Case("hilo-litv2", dict(dim=16, num_heads=4, window_size=1), (4, 5), "plain"),
    Case("hilo-litv2", dict(dim=16, num_heads=4, window_size=4, rank=1), (12,), "sequence"),
    Case("hilo-litv2", dict(dim=16, num_heads=4, alpha=0.5, pad="zeros"), (6, 4), "zeros"),
]
