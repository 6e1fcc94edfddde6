from attnlib.check import Case

ROWS = [
    Case("squeeze-excite", dict(dim=8, reduction=4), (6, 5)),
    Case("squeeze-excite", dict(dim=12, reduction=16, divisor=4), (10,), "sequence"),
    Case("eca", dict(dim=8), (6, 5)),
    Case("eca", dict(dim=8, kernel_size=1), (3, 4, 3), "video"),
    Case("polarized-self-attention", dict(dim=8), (6, 5)),
    Case("polarized-self-attention", dict(dim=8, preset="sequential"), (6, 5), "sequential"),
    Case("polarized-self-attention", dict(dim=6, spatial_softmax="query"), (12,), "query"),
    Case("polarized-self-attention", dict(dim=8, preset="sequential", spatial_softmax="scores"), (3, 4, 3), "video"),
    Case("ela-efficient-local-attention", dict(dim=16), (6, 5)),
    Case("ela-efficient-local-attention", dict(dim=16, version="large", shared=False), (6, 5), "large"),
    Case("ela-efficient-local-attention", dict(dim=12, version="tiny", num_groups="gcd"), (6, 5), "narrow"),
    Case("ulsam", dict(dim=8, num_splits=2), (6, 5)),
    Case("ulsam", dict(dim=6, num_splits=1, norm=False), (12,), "paper"),
    Case("ulsam", dict(dim=6, num_splits=3), (3, 4, 3), "video"),
]
