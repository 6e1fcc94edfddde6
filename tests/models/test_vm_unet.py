"""VM-UNet with multi-head scans: any size, losses against the equations, predictions, bad input."""

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.models.build import model_entry

TINY = dict(embed_dims=(8, 16), depths=(1, 1), decoder_depths=(1, 1), state_dim=2, drop_path_rate=0.0)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("vmunet_mhs", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (17, 30)])
def test_any_size(size):
    m = tiny(num_classes=3)
    y = m(images(2, 3, *size))
    assert y.shape == (2, 3, *size) and y.isfinite().all()
    assert m.predict(images(1, 3, *size), (5, 7)).shape == (1, 5, 7)


def test_one_channel_is_repeated():
    m, x = tiny(), images(1, 1, 16, 16)
    torch.testing.assert_close(m(x), m(x.expand(-1, 3, -1, -1)))


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 24, 32)
    valid = torch.zeros(2, 24, 32, dtype=torch.bool)
    valid[0, :16, :24] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    a, b = (t.masked_fill(~valid[:, None], 0) for t in (m(other, valid), m(x, valid)))
    torch.testing.assert_close(a, b)


def test_loss_of_one_class():
    m, logits = tiny(), images(2, 1, 4, 5)
    target = (images(2, 4, 5, seed=2) > 0).long()
    terms, p = m.loss(logits, target), logits.sigmoid().flatten(1)
    t = target.flatten(1).float()
    torch.testing.assert_close(terms["bce"], F.binary_cross_entropy(p, t))
    score = [(2 * float((a * b).sum()) + 1) / (float(a.sum() + b.sum()) + 1) for a, b in zip(p, t, strict=True)]
    assert terms["dice"].item() == pytest.approx(1 - sum(score) / 2, rel=1e-5)
    assert torch.equal(m.predict(images(1, 3, 8, 8)), (m(images(1, 3, 8, 8))[:, 0] > 0).long())


def test_loss_of_several_classes():
    m, logits = tiny(num_classes=3), images(2, 3, 4, 5)
    target = images(2, 4, 5, seed=2).mul(10).long().abs() % 3
    terms, p = m.loss(logits, target), logits.softmax(1)
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(logits, target))
    dice = 0.0
    for k in range(3):
        share, truth = p[:, k], (target == k).float()
        dice += 1 - (2 * (share * truth).sum() + 1e-5) / ((share**2).sum() + truth.sum() + 1e-5)
    torch.testing.assert_close(terms["dice"], dice / 3)


def test_it_learns_a_blob():
    torch.manual_seed(0)
    m = tiny().train()
    target = torch.zeros(1, 16, 16, dtype=torch.long)
    target[:, 4:12, 4:12] = 1
    x = target[:, None] + 0.3 * images(1, 3, 16, 16)
    optimizer = torch.optim.AdamW(m.parameters(), 1e-2)
    first = last = sum(m.loss(m(x), target).values())
    for _ in range(17):
        optimizer.zero_grad()
        last = sum(m.loss(m(x), target).values())
        last.backward()
        optimizer.step()
    assert last.item() < 0.85 * first.item()


def test_count_and_stochastic_depth():
    assert model_entry("vmunet_mhs").params == 17_257_129
    m = attnlib.create_model(
        "vmunet_mhs", **{**TINY, "depths": (1, 2), "decoder_depths": (2, 1), "drop_path_rate": 0.4}
    )
    down = [getattr(b.mixer.drop_path, "p", 0.0) for s in m.stages for b in s.blocks]
    up = [getattr(b.mixer.drop_path, "p", 0.0) for row in m.up for b in row]
    assert down == pytest.approx([0.0, 0.2, 0.4]) and up == pytest.approx([0.4, 0.2, 0.0])


def test_bad_input():
    m = tiny()
    with pytest.raises(ValueError, match=r"x must be images \(B, 3, H, W\) or \(B, 1, H, W\)"):
        m(images(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"target must be \(1, 8, 8\)"):
        m.loss(m(images(1, 3, 8, 8)), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"prediction must be logits \(B, 1, H, W\)"):
        m.loss(images(1, 2, 4, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="double from stage to stage"):
        tiny(embed_dims=(8, 12))
    with pytest.raises(ValueError, match="families"):
        tiny(families=["B"])
