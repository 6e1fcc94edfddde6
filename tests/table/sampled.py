from attnlib import Layout
from attnlib.check import Case

ROWS = [
    Case(
        "deformable-attention", dict(dim=8, num_heads=4, num_points=2), (5, 6), context_grid=(4, 3),
        layout=Layout((("image", (4, 5)),)),
    ),
    Case(
        "deformable-attention", dict(dim=8, num_heads=2, num_points=4, num_anchors=2, reference="learned"), (5,),
        "anchors", context_grid=(4, 3),
    ),
    Case(
        "deformable-attention", dict(dim=8, num_heads=4, num_points=3, reference="learned", context_dim=6), (3, 4),
        "learned", context_grid=(4, 3),
    ),
    Case(
        "dfa3d", dict(dim=8, num_heads=4, num_points=2, depth_bins=4, feature_dim=6), (3, 4), context_grid=(4, 3),
    ),
    Case(
        "dfa3d", dict(dim=8, num_heads=4, num_points=4, depth_bins=4, num_anchors=2), (3, 4), "anchors",
        context_grid=(4, 3),
    ),
]  # fmt: skip
