"""Features of boxes that do not depend on their size: losses by hand, the bank, labels, and a search across scales."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.retrieval.contrast import recall
from attnlib.models.retrieval.scale_invariant import (
    Known,
    MemoryBank,
    ScaleInvariantSearch,
    cluster_contrast,
    falling,
    identities,
    multi_label_loss,
    scale_invariant_loss,
)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_hardest_scales():
    f, g = unit(5, 4), unit(5, 3, 4, seed=1)
    want = 0.0
    for i in range(5):
        own = min(float(f[i] @ g[i, k]) for k in range(3))
        other = max(float(f[i] @ g[j, k]) for j in range(5) if j != i for k in range(3))
        want += torch.tensor((other - own) / 0.1, dtype=torch.float64).exp().log1p() / 5
    torch.testing.assert_close(scale_invariant_loss(f, g), want)
    near = torch.eye(5, dtype=torch.float64)
    assert scale_invariant_loss(near, near[:, None].expand(5, 3, 5), 0.02) < 1e-9
    pair = torch.tensor([[True, True, False, False, False]] * 2 + [[False] * 5] * 3)
    assert scale_invariant_loss(f, f[[0, 0, 2, 3, 4], None], same=pair) < scale_invariant_loss(
        f, f[[0, 0, 2, 3, 4], None]
    )
    assert scale_invariant_loss(f, g, same=torch.ones(5, 5, dtype=torch.bool)) == 0
    alone = unit(1, 4).requires_grad_()
    assert scale_invariant_loss(alone, g[:1]).item() == 0


def bank_of(values, image=None, **settings):
    bank = MemoryBank(len(values), values.shape[1], image, **settings).double()
    bank.update(torch.arange(len(values)), values)
    return bank


def test_the_bank_keeps_unit_features_without_gradients():
    bank = MemoryBank(4, 3, momentum=0.6).double()
    f = unit(2, 3).requires_grad_()
    bank.update(torch.tensor([2, 0]), f)
    torch.testing.assert_close(bank.values[[2, 0]], f.detach())
    assert bank.filled.tolist() == [True, False, True, False]
    g = unit(2, 3, seed=1)
    bank.update(torch.tensor([2, 0]), 3 * g)
    torch.testing.assert_close(bank.values[[2, 0]], F.normalize(0.6 * f.detach() + 0.4 * g, dim=1))
    half = MemoryBank(1, 3, momentum=0.5).double()
    half.update(torch.tensor([0]), g[:1])
    half.update(torch.tensor([0]), -g[:1])  # opposites cancel
    torch.testing.assert_close(half.values.norm(dim=1), torch.ones(1).double())
    assert not bank.values.requires_grad and not list(bank.parameters())
    twin = MemoryBank(4, 3).double()
    twin.load_state_dict(bank.state_dict())
    assert torch.equal(copy.deepcopy(twin).values, bank.values)


def test_labels_grow_as_the_threshold_falls_and_never_join_an_image():
    v = unit(8, 2)
    bank = bank_of(v, [0, 0, 1, 1, 2, 2, 3, 3])
    number = torch.arange(8)
    before = torch.zeros(8, 8, dtype=torch.bool)
    for threshold in (1.0, 0.5, 0.0, -1.0):
        labels = bank.labels(v, number, threshold)
        assert labels.diagonal().all() and (labels | ~before).all()
        assert not labels[0, 1] and not labels[5, 4]
        before = labels
    assert int(before.sum()) == 8 * 7
    assert [falling(0.9, 0.5, s) for s in (0, 1)] == [0.9, 0.5]


def test_multi_labels_by_hand():
    f, v = unit(3, 4), unit(9, 4, seed=2)
    positive = torch.zeros(3, 9, dtype=torch.bool)
    positive[0, :2] = positive[1, 4] = positive[2, 8] = True
    apart = torch.zeros(3, 9, dtype=torch.bool)
    apart[0, 5:8] = True
    want = 0.0
    for i in range(3):
        s = f[i] @ v.T
        rest = sorted((float(s[j]) for j in range(9) if not positive[i, j] and not apart[i, j]), reverse=True)
        some = rest[: -(-len(rest) * 3 // 10)]
        want += 5 * float((s[positive[i]] - 1).square().mean()) + sum((x + 1) ** 2 for x in some) / len(some)
    assert float(multi_label_loss(f, v, positive, apart, hardest=0.3)) == pytest.approx(want / 3)


def test_identities_and_their_contrast():
    pytest.importorskip("sklearn")
    at = unit(3, 6)
    v = F.normalize(at.repeat_interleave(4, 0) + 0.05 * unit(12, 6, seed=3), dim=1)
    image = torch.arange(12)
    labels = identities(bank_of(v, image))
    assert all(len(labels[i : i + 4].unique()) == 1 for i in (0, 4, 8)) and len(labels.unique()) == 3
    image[1] = image[0]  # two things of one image that look alike
    bank = bank_of(v, image)
    labels = identities(bank)
    assert labels[0] != labels[1] and len(labels.unique()) == 4
    means = torch.stack([F.normalize(v[labels == c].sum(0), dim=0) for c in range(4)])
    number = torch.tensor([3, 7])
    want = F.cross_entropy(v[number] @ means.T / 0.05, labels[number])
    torch.testing.assert_close(cluster_contrast(v[number], number, labels, bank), want)


def scenes(count, sides, seed=0, kinds=6):
    """One thing a scene, of several colours, at some side."""
    g = torch.Generator().manual_seed(seed)
    colour = 2 * torch.randn(kinds, 3, generator=torch.Generator().manual_seed(1))
    which = torch.arange(count) % kinds
    images, boxes = 0.3 * torch.randn(count, 3, 32, 32, generator=g), torch.zeros(count, 5)
    for i in range(count):
        side = int(sides[i % len(sides)])
        x, y = (int(torch.randint(0, 33 - side, (), generator=g)) for _ in range(2))
        images[i, :, y : y + side, x : x + side] += colour[which[i]][:, None, None]
        boxes[i] = torch.tensor([i, x, y, x + side, y + side])
    return images, boxes, which


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1))


def test_cross_scale_cosines_rise():
    """Against the same training without the loss over scales."""

    def trained(use):
        torch.manual_seed(0)
        model = ScaleInvariantSearch(Small(), 16, MemoryBank(12, 8), 8, size=16)
        images, boxes, _ = scenes(12, (6, 10, 16, 24), kinds=12)
        optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 3e-3))
        if not use:
            whole = model.loss
            model.loss = lambda prediction, target: {"labels": whole(prediction, target)["labels"]}
        batch = {"images": images, "boxes": boxes, "target": Known(torch.arange(12), 1.0)}
        for _ in range(30):
            train_batch(model, batch, optimizers)
        assert bool(model.bank.filled.all())
        with torch.no_grad():
            found = model(images, boxes)
        own = torch.einsum("nd,nkd->nk", found.scene, found.exemplars)
        other = torch.einsum("nd,mkd->nmk", found.scene, found.exemplars).mean((1, 2))
        return float((own.mean(1) - other).mean())

    with_it, without = trained(True), trained(False)
    assert with_it > without + 0.1, (with_it, without)


def test_it_searches_across_scales_clusters_and_goes_on():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    model = ScaleInvariantSearch(Small(), 16, MemoryBank(24, 8), 8, size=16)
    images, boxes, which = scenes(24, (8, 12, 16, 20))
    optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 3e-3))
    for step in range(40):
        batch = {"images": images, "boxes": boxes, "target": Known(torch.arange(24), falling(1.0, 0.9, step / 40))}
        terms = train_batch(model, batch, optimizers)["all"]
    assert set(terms) == {"scale", "labels"}
    model.cluster()
    assert "clusters" in train_batch(model, batch, optimizers)["all"]
    again = ScaleInvariantSearch(Small(), 16, MemoryBank(24, 8), 8, size=16)
    again.load_state_dict(model.state_dict())  # clusters are kept with the rest
    assert torch.equal(again.identity, model.identity) and "clusters" in again.loss(
        again(images, boxes), batch["target"]
    )
    big, small = (model.predict(*scenes(12, (s,), seed=5)[:2]) for s in (24, 8))
    same = which[:12, None] == which[None, :12]
    assert recall(small @ big.T, same) > 0.5  # by chance 1 / 6
    assert model.predict(images[:1], boxes[:0]).shape == (0, 8)


def test_bad_input():
    model = ScaleInvariantSearch(Small(), 16, MemoryBank(4, 8), 8)
    images, boxes, _ = scenes(2, (8,))
    wrong = boxes.clone()
    wrong[1, 3] = wrong[1, 1]
    with pytest.raises(ValueError, match=r"left < right and top < bottom; those at \[1\]"):
        model(images, wrong)
    with pytest.raises(ValueError, match="images outside"):
        model(images[:1], boxes)
    with pytest.raises(ValueError, match=r"number must lie in \[0, 3\]"):
        model.bank.update(torch.tensor([4]), torch.randn(1, 8))
    with pytest.raises(ValueError, match="names a box twice"):
        model.bank.update(torch.tensor([1, 1]), torch.randn(2, 8))
    with pytest.raises(ValueError, match="width 8, embed_dim is 9"):
        ScaleInvariantSearch(Small(), 16, MemoryBank(4, 8), 9)
    with pytest.raises(ValueError, match="scales"):
        ScaleInvariantSearch(Small(), 16, MemoryBank(4, 8), 8, scales=())
    with pytest.raises(ValueError, match="one per box"):
        cluster_contrast(unit(1, 8), torch.tensor([0]), torch.zeros(3, dtype=torch.long), model.bank)
    with pytest.raises(ValueError, match=r"image must be \(4,\)"):
        MemoryBank(4, 8, [0, 1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_numbers_of_boxes_may_be_short_whole_numbers(dtype):
    values, number = unit(4, 3), torch.tensor([1, 0, 3])
    ours, short = bank_of(values, torch.tensor([0, 0, 1, 1])), bank_of(values, torch.tensor([0, 0, 1, 1]))
    ours.update(number, values[:3])
    short.update(number.to(dtype), values[:3])
    assert ours.values.equal(short.values) and ours.apart(number).equal(short.apart(number.to(dtype)))
    assert ours.labels(values[:3], number, 0.5).equal(short.labels(values[:3], number.to(dtype), 0.5))
