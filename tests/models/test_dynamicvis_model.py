"""DynamicVis: the backbone, regions cut out of maps, the loss of many instances, pretraining on regions."""

import math

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.models.build import model_entry
from attnlib.models.detect.regions import RegionClassifier, mil_loss, roi_align

TINY = dict(embed_dims=(8, 16), depths=(1, 2), reductions=(4, 2), img_size=32, num_classes=5)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("dynamicvis_base", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (17, 30), (32, 64)])
def test_any_size(size):
    y = tiny()(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_sizes_by_name():
    for name, width, blocks in (("base", 768, 26), ("large", 1024, 42)):
        with torch.device("meta"):
            m = attnlib.create_model(f"dynamicvis_{name}")
        assert m.num_features == width and sum(len(s.blocks) for s in m.stages) == blocks
        assert [s.blocks[0].inner.reduction for s in m.stages] == [8, 4, 2, 1]


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 24, 32)
    valid = torch.zeros(2, 24, 32, dtype=torch.bool)
    valid[0, :16, :24] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


def test_start():
    m = tiny()
    assert not m.stem[1].pos_embed.any()
    conv = m.stages[1].downsample.proj
    assert conv.weight.std().item() == pytest.approx(72**-0.5, rel=0.1) and not conv.bias.any()


def test_mil_with_one_positive_each_is_symmetric_contrast():
    logits = images(4, 4)
    own = torch.eye(4, dtype=torch.bool)
    both = (mil_loss(logits, own) + mil_loss(logits.T, own.T)) / 2
    at = torch.arange(4)
    torch.testing.assert_close(both, (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2)


def test_mil_sums_over_positives_and_skips_rows_without():
    logits = images(3, 5).double()
    positive = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    share = (logits.softmax(-1) * positive).sum(-1)
    torch.testing.assert_close(mil_loss(logits, positive), -(share[0].log() + share[2].log()) / 2)
    none = logits.requires_grad_()
    loss = mil_loss(none, torch.zeros(3, 5, dtype=torch.bool))
    assert loss.item() == 0 and torch.autograd.grad(loss, none)[0].isfinite().all()
    with pytest.raises(ValueError, match="positive must be boolean"):
        mil_loss(logits, positive.long())


def test_regions_against_a_loop_over_samples():
    x = images(2, 3, 6, 5).double()
    boxes = torch.tensor([[0, 2.0, 1.0, 9.0, 11.0], [1, -6.0, 0.0, 30.0, 4.0]]).double()

    def at(image, row, column):
        if not (-1 <= row <= 6 and -1 <= column <= 5):
            return torch.zeros(3).double()
        row, column = min(max(row, 0), 5), min(max(column, 0), 4)
        top, left = int(row), int(column)
        low, right, dr, dc = min(top + 1, 5), min(left + 1, 4), row - int(row), column - int(column)
        x00, x01, x10, x11 = image[:, top, left], image[:, top, right], image[:, low, left], image[:, low, right]
        return (1 - dr) * ((1 - dc) * x00 + dc * x01) + dr * ((1 - dc) * x10 + dc * x11)

    got = roi_align(x, boxes, size=3, scale=0.5, samples=2)
    for r, (image, left, top, right, bottom) in enumerate(boxes.tolist()):
        left, top, right, bottom = (v * 0.5 - 0.5 for v in (left, top, right, bottom))
        for i in range(3):
            for j in range(3):
                samples = [
                    at(x[int(image)], top + (bottom - top) / 3 * (i + (a + 0.5) / 2),
                       left + (right - left) / 3 * (j + (b + 0.5) / 2))
                    for a in range(2) for b in range(2)
                ]  # fmt: skip
                torch.testing.assert_close(got[r, :, i, j], torch.stack(samples).mean(0))
    with pytest.raises(ValueError, match=r"boxes must be \(R, 5\)"):
        roi_align(x, boxes[:, 1:])


def test_pretraining_on_regions_learns_their_classes():
    torch.manual_seed(0)
    encoder = attnlib.create_model("dynamicvis_base", features_only=True, **{**TINY, "num_classes": 0})
    m = RegionClassifier(encoder, num_classes=3, dim=8)
    x = torch.zeros(1, 3, 32, 32)
    boxes = torch.tensor([[0.0, 0, 0, 15, 15], [0, 16, 0, 31, 15], [0, 0, 16, 15, 31]])
    for k, (_, left, top, right, bottom) in enumerate(boxes.long().tolist()):
        x[0, k, top:bottom, left:right] = 1
    target = torch.arange(3)
    optimizer = torch.optim.AdamW(m.parameters(), 1e-2)
    terms = first = m.loss(m(x, boxes, returns=("regions",)), target)
    assert set(first) == {"cross_entropy", "mil"} and m.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    for _ in range(25):
        optimizer.zero_grad()
        terms = m.loss(m(x, boxes, returns=("regions",)), target)
        sum(terms.values()).backward()
        optimizer.step()
    assert terms["mil"].item() < 0.5 * first["mil"].item()
    assert m.log_scale.grad is not None and m.log_scale.grad.abs() > 0
    assert torch.equal(m.eval().predict(x, boxes), target)


def test_bad_input():
    with pytest.raises(ValueError, match="reductions"):
        tiny(reductions=(4,))
    with pytest.raises(ValueError, match="feature_info"):
        RegionClassifier(torch.nn.Identity())
    encoder = attnlib.create_model("dynamicvis_base", features_only=True, **{**TINY, "num_classes": 0})
    m = RegionClassifier(encoder, num_classes=3, dim=8)
    got = m(images(1, 3, 32, 32), torch.tensor([[0.0, 4, 4, 20, 28]]), returns=("regions",))
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        m.loss(got, torch.tensor([3]))
    with pytest.raises(ValueError, match=r"target must be \(1,\)"):
        m.loss(got, torch.tensor([1, 2]))
    assert model_entry("dynamicvis_base").family == "dynamicvis"
