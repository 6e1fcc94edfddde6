from attnlib import Layout
from attnlib.check import Case

SEQUENCES = ((512,), (1024,), (2048,))
IMAGES = ((32, 32), (64, 64), (128, 128))

ROWS = [
    Case("dinat", dict(dim=16, num_heads=2, kernel_size=3, dilation=2, compat="authors"), (7, 6), "compat"),
    Case("fused-neighborhood-attention", dict(dim=16, num_heads=4, kernel_size=3), (6, 7), growth=IMAGES,
         layout=Layout.image(4, 5, cls=1), odd_grid=(5, 9)),
    Case("fused-neighborhood-attention", dict(dim=16, num_heads=2, kernel_size=4, dilation=2, causal=True), (20,),
         "causal", growth=SEQUENCES),
    Case("fused-neighborhood-attention",
         dict(dim=16, num_heads=2, kernel_size=(2, 3, 3), dilation=(1, 1, 2), causal=(True, False, False)), (3, 4, 6),
         "video", growth=((8, 8, 8), (16, 16, 16), (32, 32, 32))),
    Case("generalized-neighborhood-attention", dict(dim=16, num_heads=4, kernel_size=4, stride=2), (6, 8),
         growth=IMAGES, layout=Layout((("text", 3), ("image", (6, 5))))),
    Case("generalized-neighborhood-attention", dict(dim=16, num_heads=2, kernel_size=5, stride=3, causal=True), (16,),
         "causal", growth=SEQUENCES),
    Case("dinat", dict(dim=16, num_heads=2, kernel_size=3, dilation=2), (7, 8), growth=IMAGES,
         layout=Layout.image(6, 6, cls=1)),
    Case("dinat", dict(dim=16, num_heads=2, kernel_size=5, causal=True), (16,), "causal", growth=SEQUENCES),
    Case("uniformer", dict(dim=6), (6, 7)),
    Case("uniformer", dict(dim=4, kernel_size=3, grid_rank=3), (3, 4, 4), "video"),
    Case("uniformer", dict(dim=6, kernel_size=(3, 1, 1), grid_rank=3, hidden=4), (4, 3, 3), "time"),
]  # fmt: skip
