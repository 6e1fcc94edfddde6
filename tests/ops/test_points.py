"""Maps to points: READ's release, the equation with every pixel, and what maps without anything in them give."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnlib.ops.points import (
    ABSENT,
    band_points,
    cell_centres,
    continuous_points,
    crop_in_image,
    extreme_points,
    min_max,
    similarity_points,
    square_grid,
)

F64 = torch.float64
READ = load_file(Path(__file__).parents[1] / "fixtures" / "read-seg-points.safetensors")
CASES = sorted({name.split(".")[0] for name in READ})


def every_pixel(scores, points):
    """The equation: all pixels around each point."""
    b, h, w = scores.shape
    ys, xs = torch.meshgrid(torch.arange(h, dtype=scores.dtype), torch.arange(w, dtype=scores.dtype), indexing="ij")
    share = scores.flatten(1).softmax(-1).view(b, 1, h, w)
    near = (-(xs - points[..., 0, None, None]).square() - (ys - points[..., 1, None, None]).square()).exp() * share
    near = near / near.sum((-1, -2), keepdim=True)
    return torch.stack([(near * xs).sum((-1, -2)), (near * ys).sum((-1, -2))], -1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 1e-5)])
def test_the_release_of_read(case, dtype, tolerance):
    given = {n.split(".")[1]: t for n, t in READ.items() if n.startswith(case + ".")}
    features, target = (given[n].to(dtype).requires_grad_() for n in ("features", "target"))
    downsample, count, positive = given["settings"].tolist()
    size = tuple(given["size"].tolist())
    points, labels = similarity_points(
        features, target, size, int(count), positive, downsample=int(downsample), compat="authors"
    )
    assert labels[0].equal(given["labels"]) and points.dtype == dtype
    grads = torch.autograd.grad((points[0] * given["weight"].to(dtype)).sum(), (features, target))
    for ours, theirs in zip(
        (points[0], *grads), (given["points"], given["grad_features"], given["grad_target"]), strict=True
    ):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("grid", [(20, 31), (5, 40), (1, 1), (3, 4)])
def test_only_near_pixels_are_read(grid):
    g = torch.Generator().manual_seed(1)
    scores = (4 * torch.rand(2, *grid, dtype=F64, generator=g)).requires_grad_()
    points = torch.rand(2, 6, 2, dtype=F64, generator=g) * torch.tensor([grid[1] - 1, grid[0] - 1])
    points.requires_grad_()
    ours, plain = continuous_points(scores, points), every_pixel(scores, points)
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)
    weight = torch.randn(ours.shape, dtype=F64, generator=g)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (scores, points)),
        torch.autograd.grad((plain * weight).sum(), (scores, points)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_far_from_the_corner_nothing_is_rounded():
    scores = torch.zeros(1, 8, 4000, requires_grad=True)
    moved = continuous_points(scores, torch.tensor([[[3900.0, 4.0]]]))
    torch.testing.assert_close(moved, torch.tensor([[[3900.0, 4.0]]]), rtol=0, atol=1e-3)
    assert torch.autograd.grad(moved.sum(), scores)[0].isfinite().all()


@pytest.mark.parametrize("size", [(64, 64), (48, 90), (90, 48)])
def test_a_planted_blob_holds_all_positive_points(size):
    scores = torch.zeros(12, 12)
    scores[2:6, 7:11] = 1.0
    features = scores.flatten()[None, :, None] + 0.01 * torch.rand(
        1, 144, 1, generator=torch.Generator().manual_seed(0)
    )
    points, labels = similarity_points(features, torch.ones(1, 1), size, count=30, downsample=1, side=72)
    assert points.shape == (1, 30, 2) and set(labels.unique().tolist()) <= {-1, 0, 1}
    cell = min(size) / 12
    left, top = (size[1] - min(size)) / 2, (size[0] - min(size)) / 2
    x, y = points[0].T

    def inside(slack):
        along = (x > left + 7 * cell - slack) & (x < left + 11 * cell + slack)
        return along & (y > top + 2 * cell - slack) & (y < top + 6 * cell + slack)

    assert inside(2)[labels[0] == 1].all() and not inside(-1)[labels[0] == 0].any() and (labels == 1).sum() == 16
    inframe = (x >= left - 1) & (x <= left + min(size)) & (y >= top - 1) & (y <= top + min(size))
    assert inframe.all()


def test_a_peak_is_met_and_moves_with_the_map():
    scores = torch.full((1, 20, 30), 0.0)
    scores[0, 11, 17] = 12.0
    scores.requires_grad_()
    moved = continuous_points(scores, torch.tensor([[[16.0, 10.0]]]))
    assert (moved - torch.tensor([17.0, 11.0])).abs().max() < 0.5
    assert torch.autograd.grad(moved.sum(), scores)[0].abs().sum() > 0


def test_a_positive_factor_and_a_constant_change_nothing():
    g = torch.Generator().manual_seed(2)
    features, target = torch.randn(2, 36, 5, dtype=F64, generator=g), torch.randn(2, 5, dtype=F64, generator=g)
    ones = similarity_points(features, target, (50, 70), side=36)
    more = similarity_points(features, 7 * target, (50, 70), side=36)
    torch.testing.assert_close(more.points, ones.points)
    assert more.labels.equal(ones.labels)


@pytest.mark.parametrize("size", [(40, 40), (30, 55)])
def test_a_map_that_says_nothing(size):
    features = torch.ones(1, 36, 4, requires_grad=True)
    points, labels = similarity_points(features, torch.ones(1, 4), size, count=5, side=36)
    assert labels.unique().tolist() == [-1] and points.isfinite().all() and points.shape == (1, 5, 2)
    assert torch.autograd.grad(points.sum(), features)[0].isfinite().all()
    assert extreme_points(torch.ones(2, 4, 4), size, threshold=0.5).labels.shape == (2, 0)
    assert (extreme_points(torch.ones(2, 4, 4), size, count=2).labels == ABSENT).all()
    assert min_max(torch.ones(2, 3)).eq(0).all()


def test_one_hot_patches_mark_their_own():
    patches = torch.eye(64, dtype=F64)[None]
    for cell in (0, 13, 63):
        points, labels = similarity_points(patches, patches[:, cell], (80, 80), count=1, downsample=1, side=80)
        assert labels.tolist() == [[1]]
        want = cell_centres(torch.tensor([[cell]]), (8, 8), (80, 80), dtype=F64)
        assert (points - want).abs().max() < 1.0


def test_no_positive_points_are_a_legal_prompt():
    scores = torch.full((2, 3, 4), 0.5)
    scores[:, 0, 0] = 0.4
    points, labels = band_points(scores, (30, 40), count=7)
    assert labels.unique().tolist() == [-1] and points.shape == (2, 7, 2)
    assert points[0, :2].tolist() == [[5.0, 5.0], [15.0, 5.0]]  # in their order
    assert band_points(scores, (30, 40), count=50).points.shape == (2, 12, 2)  # all there are


def test_bands_choose_in_order_and_only_what_is_valid():
    scores = torch.tensor([[[0.9, 0.05, 1.0], [0.5, 0.2, 0.0]]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    points, labels = band_points(scores, (2, 3), count=9, valid=valid)
    assert labels.tolist() == [[1, 0, 0, 0, -1]]
    assert points[0].tolist() == [[0.5, 0.5], [2.0, 1.0], [1.5, 0.5], [1.5, 1.0], [0.5, 1.0]]
    assert band_points(scores, (2, 3), valid=torch.zeros(2, 3, dtype=torch.bool)).labels.shape == (1, 0)


def test_extremes_of_maps_that_hold_different_numbers():
    scores = torch.tensor([[[1.0, 0.95, 0.0], [0.2, 0.3, 0.1]], [[0.1, 0.2, 1.0], [0.6, 0.5, 0.0]]])
    points, labels = extreme_points(scores, (20, 30), threshold=0.9)
    assert labels.tolist() == [[1, 1, 0, 0], [1, ABSENT, 0, ABSENT]]
    assert points[0].tolist() == [[5.0, 5.0], [15.0, 5.0], [25.0, 5.0], [25.0, 15.0]]
    assert points[1][[0, 2]].tolist() == [[25.0, 5.0], [25.0, 15.0]] and points[1][[1, 3]].eq(0).all()
    assert extreme_points(scores, (20, 30), threshold=-1).labels.shape == (2, 6)  # never more than half on the thing
    few = extreme_points(scores, (20, 30), threshold=2.0)
    assert few.points.shape == (2, 0, 2) and few.labels.shape == (2, 0)


def test_bfloat16_maps_have_pixels_told_apart():
    scores = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    points, _ = extreme_points(scores, (900, 1200), count=4)
    assert points.dtype == torch.float32
    features = torch.rand(1, 576, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    points, _ = similarity_points(features, features[:, 0].detach(), (300, 400))
    assert points.dtype == torch.float32 and torch.autograd.grad(points.sum(), features)[0].dtype == torch.bfloat16


def test_points_beside_the_image_move_to_its_border():
    far = torch.tensor([[[100.0, -50.0], [3.0, 0.0]]])
    moved = continuous_points(torch.zeros(1, 4, 4), far)
    torch.testing.assert_close(moved[0, 0], torch.tensor([3.0, 0.0]))


def test_what_is_no_number_stays_so():
    scaled = min_max(torch.tensor([[float("nan"), 1.0], [0.0, 2.0]]))
    assert scaled[0].isnan().all() and scaled[1].tolist() == [0, 1]


def test_an_empty_batch():
    none = torch.zeros(0, 4, 4)
    assert extreme_points(none, (8, 8), count=1).points.shape[0] == 0
    assert band_points(none, (8, 8)).points.shape == (0, 16, 2)
    assert similarity_points(torch.zeros(0, 16, 3), torch.zeros(0, 3), (8, 8), side=8).points.shape[0] == 0


def test_a_crop_lies_in_the_middle():
    laid = crop_in_image(torch.ones(1, 4, 4), (30, 60), 4, fill=-1)
    assert laid.shape == (1, 4, 8) and laid[0, 0].tolist() == [-1, -1, 1, 1, 1, 1, -1, -1]


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="features has 12 image tokens, which fill no square; give their grid"):
        similarity_points(torch.zeros(1, 12, 3), torch.zeros(1, 3), (8, 8))
    with pytest.raises(ValueError, match=r"grid=\(3, 5\) has 15 cells, but features has 12"):
        similarity_points(torch.zeros(1, 12, 3), torch.zeros(1, 3), (8, 8), grid=(3, 5))
    with pytest.raises(ValueError, match="downsample must be at most 4"):
        similarity_points(torch.zeros(1, 16, 3), torch.zeros(1, 3), (8, 8), downsample=5)
    with pytest.raises(ValueError, match=r"image_size must be \(height, width\)"):
        band_points(torch.zeros(1, 2, 2), (8,))
    with pytest.raises(ValueError, match="cells points at cell 9; possible: 0 to 3"):
        cell_centres(torch.tensor([9]), (2, 2), (8, 8))
    with pytest.raises(ValueError, match="negative must be"):
        band_points(torch.zeros(1, 2, 2), (8, 8), positive=0.1)
    with pytest.raises(ValueError, match="either count or threshold"):
        extreme_points(torch.zeros(1, 2, 2), (8, 8))
    with pytest.raises(ValueError, match="count must be an integer of at least 1 and at most 2"):
        extreme_points(torch.zeros(1, 2, 2), (8, 8), count=3)
    with pytest.raises(ValueError, match="scores must have shape .B, h, w"):
        extreme_points(torch.zeros(4, 4), (8, 8), count=1)
    with pytest.raises(ValueError, match="compat"):
        cell_centres(torch.zeros(1, dtype=torch.long), (2, 2), (4, 4), compat="theirs")
    with pytest.raises(ValueError, match="fill no square"):
        square_grid(0)


@pytest.mark.parametrize("size", [(49, 49), (93, 140), (107, 53)])
def test_no_cell_is_rounded_away(size):
    assert min(crop_in_image(torch.ones(1, 12, 12), size, 12).shape[1:]) == 12


def test_compiled_and_exported():
    features, target = torch.rand(2, 16, 4), torch.rand(2, 4)

    class Asks(torch.nn.Module):
        def forward(self, features, target):
            return similarity_points(features, target, (32, 48), count=5, side=32)

    want = Asks()(features, target)
    for got in (
        torch.compile(Asks(), backend="eager", fullgraph=True)(features, target),
        torch.export.export(Asks(), (features, target)).module()(features, target),
    ):
        assert got[0].equal(want.points) and got[1].equal(want.labels)
