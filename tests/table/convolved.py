from attnlib.check import Case

ROWS = [
    Case("tic-msa-conv", dict(dim=8), (5, 6)),
    Case("tic-msa-conv", dict(dim=8, num_heads=2, kernel_size=(3, 5), dilation=2, conv=False), (6, 7), "attention"),
    Case("tic-msa-conv", dict(dim=8, num_heads=2, border="mask", conv_bias=True), (4, 5), "mask"),
    Case("tic-msa-conv", dict(dim=8, num_heads=4, shift=2), (5, 6), "shift"),
    Case("tic-msa-conv", dict(dim=8, num_heads=4, shift=0.5, border="mask", dilation=2), (5, 4), "shift-mask"),
]
