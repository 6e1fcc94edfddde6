"""Regions of a picture: labels, weights, gathered attention, and what is moved from box to box."""

import pytest
import torch
import torch.nn.functional as F

from attnlib.steer.diffusion import regions as R


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(q, k, v, allowed):
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def test_boxes_are_the_cells_whose_centre_is_inside():
    boxes = [(0.1, 0.3, 0.62, 0.9), (0.0, 0.0, 1.0, 1.0), (0.45, 0.45, 0.46, 0.46), (0.99, 0.0, 1.0, 0.01)]
    got = R.box_masks(boxes, (6, 8))
    for mask, (left, top, right, bottom) in zip(got[:2], boxes[:2], strict=True):
        for i in range(6):
            for j in range(8):
                inside = left <= (j + 0.5) / 8 < right and top <= (i + 0.5) / 6 < bottom
                assert bool(mask[i, j]) == inside
    assert got[2].nonzero().tolist() == [[2, 3]] and got[3].nonzero().tolist() == [[0, 7]]
    with pytest.raises(ValueError, match="left before right"):
        R.box_masks([(0.5, 0, 0.4, 1)], (4, 4))
    with pytest.raises(TypeError, match="left, top, right, bottom"):
        R.box_masks(["whole"], (4, 4))
    with pytest.raises(TypeError, match="boxes must be a finite number, got 'a'"):
        R.box_masks([("a", 0, 1, 1)], (4, 4))


def test_maps_at_another_grid():
    maps = drawn(2, 3, 9, 6).abs()
    torch.testing.assert_close(
        R.resized(maps, (4, 5)), F.interpolate(maps, (4, 5), mode="bilinear", align_corners=False)
    )
    torch.testing.assert_close(R.resized(maps, (4, 5), "bicubic"), F.interpolate(maps, (4, 5), mode="bicubic"))
    torch.testing.assert_close(
        R.resized(maps, (3, 3), "area"), maps.unflatten(-2, (3, 3)).mean(-2).unflatten(-1, (3, 2)).mean(-1)
    )
    small = torch.zeros(1, 16, 16)
    small[0, 5, 9] = 1
    assert R.resized(small, (4, 4), "any").nonzero().tolist() == [[0, 1, 2]]
    assert R.resized(small, (16, 16)) is small
    assert R.resized(maps.half(), (4, 5)).dtype == torch.float16
    with pytest.raises(ValueError, match="how='nearest'"):
        R.resized(maps, (4, 5), "nearest")


def test_shares_sum_to_one():
    w = drawn(2, 3, 4, 4).clamp(min=0)
    got = R.shares(w)
    some = w.sum(1) > 0
    torch.testing.assert_close(got.sum(1)[some], torch.ones_like(got.sum(1)[some]))
    assert not got.sum(1)[~some].any() and bool((~some).any())
    with_rest = R.shares(w * 0.4, rest=True)
    torch.testing.assert_close(with_rest.sum(1), torch.ones(2, 4, 4, dtype=torch.float64))
    assert with_rest.shape == (2, 4, 4, 4) and (with_rest >= 0).all()
    with pytest.raises(ValueError, match="at least 0"):
        R.shares(drawn(2, 3, 4, 4))


@pytest.mark.parametrize(
    "priority, order",
    [("first", [0, 1, 2]), ("last", [2, 1, 0]), ("smallest", None), ("largest", None), ([1, 2, 0], [1, 2, 0])],
)
def test_a_place_belongs_to_one_region(priority, order):
    masks = drawn(2, 3, 5, 5) > torch.tensor([0.7, -0.5, 0.1]).view(3, 1, 1)
    got = R.label_map(masks, priority)
    for sample, labels in zip(masks, got, strict=True):
        sizes = sample.flatten(1).sum(1).tolist()
        served = order or sorted(range(3), key=lambda r: sizes[r] * (1 if priority == "smallest" else -1))
        for i in range(5):
            for j in range(5):
                wanted = next((r + 1 for r in served if sample[r, i, j]), 0)
                assert labels[i, j] == wanted
    with pytest.raises(ValueError, match="each of the regions 0 to 2 once"):
        R.label_map(masks, [0, 0, 1])


def test_attention_by_label_is_the_dense_mask():
    """Samples with labels of their own, a label that reads nothing, and gradients."""
    q, k, v = drawn(3, 4, 12, 8), drawn(3, 2, 20, 8, seed=1), drawn(3, 2, 20, 5, seed=2)
    for t in (q, k, v):
        t.requires_grad_()
    labels = torch.randint(0, 3, (3, 12), generator=torch.Generator().manual_seed(3))
    keys = torch.randint(0, 4, (3, 20), generator=torch.Generator().manual_seed(4))
    labels[2], keys[2] = labels[0], keys[0]  # these two run together
    reads = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    own = torch.arange(5, 17)
    got = R.attention_by_label(q, k, v, labels, keys, reads, own)
    allowed = reads[labels].gather(2, keys[:, None].expand(-1, 12, -1))[:, None]
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    truth = torch.where((labels == 2)[:, None, :, None], wide[1][:, :, 5:17], dense(q, *wide, allowed))
    torch.testing.assert_close(got, truth, atol=1e-12, rtol=1e-9)
    out = drawn(3, 4, 12, 5, seed=5)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), out), torch.autograd.grad(truth, (q, k, v), out), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    none = R.attention_by_label(q, k, v, labels, keys, reads)
    assert not none.transpose(1, 2)[labels == 2].any()
    torch.testing.assert_close(none.transpose(1, 2)[labels != 2], got.transpose(1, 2)[labels != 2])
    with pytest.raises(ValueError, match="q_labels must lie in 0 to G - 1 = 2"):
        R.attention_by_label(q, k, v, labels + 1, keys, reads)
    with pytest.raises(ValueError, match="own points at key 20; possible: 0 to 19"):
        R.attention_by_label(q, k, v, labels, keys, reads, own + 4)


def test_what_is_not_read_changes_no_bit():
    q, k, v = (t.float() for t in (drawn(1, 2, 16, 4), drawn(1, 2, 16, 4, seed=1), drawn(1, 2, 16, 4, seed=2)))
    labels = torch.arange(16)[None] % 3
    reads = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    before = R.attention_by_label(q, k, v, labels, labels, reads)
    v[:, :, labels[0] == 2] = float("nan")
    after = R.attention_by_label(q, k, v, labels, labels, reads)
    assert torch.equal(before[:, :, labels[0] == 1], after[:, :, labels[0] == 1])
    assert after[:, :, labels[0] == 2].isnan().all()


def test_branches_are_mixed_where_they_count():
    q, ks = drawn(2, 2, 9, 4).requires_grad_(), [drawn(2, 2, 5, 4, seed=s) for s in range(3)]
    w = drawn(2, 3, 9, seed=7)
    w[0, 0, 2:5] = 0
    w[1, 0, 6:] = 0
    w[:, 2] = 0
    calls = []

    def branch(r):
        def run(some):
            calls.append((r, some.shape[2]))
            return dense(some, ks[r], ks[r], torch.ones(1, dtype=torch.bool))

        return run

    got = R.mixed_branches(q, [branch(r) for r in range(3)], w)
    truth = sum(w[:, r, None, :, None] * dense(q, ks[r], ks[r], torch.ones(1, dtype=torch.bool)) for r in range(3))
    torch.testing.assert_close(got, truth, atol=1e-12, rtol=1e-9)
    out = drawn(2, 2, 9, 4, seed=8)
    for a, b in zip(torch.autograd.grad(got, q, out), torch.autograd.grad(truth, q, out), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    assert calls == [(0, 6), (1, 9)]  # six places at most of the first, nothing of the last
    assert not R.mixed_branches(q, [None], w[:, :1]).any()
    # A branch that goes wrong where it does not count is not seen.
    ks[0][:] = float("nan")
    w[:, 0], w[:, 0, 3] = 0, 1
    bad = R.mixed_branches(q, [branch(0), branch(1)], w[:, :2])
    assert bad[:, :, 3].isnan().all() and bad[:, :, [n for n in range(9) if n != 3]].isfinite().all()


@pytest.mark.parametrize(
    "box, to", [((1, 2, 5, 7), (0, 0, 4, 5)), ((1, 2, 5, 7), (0, 0, 6, 3)), ((0, 0, 2, 2), (2, 1, 8, 8))]
)
def test_what_is_moved_is_sampled_between_cells(box, to):
    maps = drawn(2, 3, 8, 9)
    got = R.moved(maps, box, to)
    h, w = to[2] - to[0], to[3] - to[1]
    y = (torch.arange(h) + 0.5).double() / h * (box[2] - box[0]) + box[0]
    x = (torch.arange(w) + 0.5).double() / w * (box[3] - box[1]) + box[1]
    at = torch.stack([(x / 9 * 2 - 1).expand(h, w), (y / 8 * 2 - 1)[:, None].expand(h, w)], -1)[None].expand(
        2, -1, -1, -1
    )
    truth = F.grid_sample(maps, at, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(got, truth, atol=1e-12, rtol=1e-9)
    if (h, w) == (box[2] - box[0], box[3] - box[1]):
        assert torch.equal(got, maps[..., box[0] : box[2], box[1] : box[3]])
    spoilt = torch.full_like(maps, float("nan"))
    spoilt[..., box[0] : box[2], box[1] : box[3]] = maps[..., box[0] : box[2], box[1] : box[3]]
    assert R.moved(spoilt, box, to, inside=True).isfinite().all()
    assert R.mask_box(torch.zeros(3, 3)) is None
    with pytest.raises(ValueError, match="with a cell in it"):
        R.moved(maps, (1, 1, 1, 2), to)
    with pytest.raises(ValueError, match="box must lie within maps of 8 x 9"):
        R.moved(maps, (1, 1, 9, 2), to)
