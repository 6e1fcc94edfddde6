"""Losses of tasks against their equations in loops, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnlib.models.losses import cox_loss, dice_loss, dice_scores, silog_loss


def test_dice_of_classes():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 4, 5))
    p, t = logits.softmax(1), F.one_hot(target, 3).movedim(-1, 1).double()
    each = [
        (2 * (p[:, k] * t[:, k]).sum() + 1) / (p[:, k].square().sum() + t[:, k].square().sum() + 1) for k in range(3)
    ]
    torch.testing.assert_close(dice_loss(logits, target), 1 - (each[1] + each[2]) / 2)
    torch.testing.assert_close(dice_loss(logits, target, foreground_only=False), 1 - sum(each) / 3)
    torch.testing.assert_close(dice_loss(logits, target, compat="authors"), (1 - sum(each) / 2).clamp(0, 1))
    samples = torch.stack([dice_loss(logits[i : i + 1], target[i : i + 1]) for i in range(2)]).mean()
    torch.testing.assert_close(dice_loss(logits, target, per_sample=True), samples)
    marked = target.clone()
    marked[:, 0] = 9
    torch.testing.assert_close(dice_loss(logits, marked, ignore_index=9), dice_loss(logits[:, :, 1:], target[:, 1:]))
    one = torch.randn(2, 1, 4, dtype=torch.float64)
    truth = torch.randint(0, 2, (2, 4))
    want = 1 - dice_scores(one.sigmoid()[:, 0], truth.double(), axes=(0, 1))
    torch.testing.assert_close(dice_loss(one, truth), want)


def test_the_released_dice_dies_where_the_mean_is_high():
    """Two classes, almost right: the sum over two by one exceeds one, and the clip leaves no gradient. Ours has one."""
    target = torch.tensor([[[0, 1, 1, 0]]])
    logits = (2 * F.one_hot(target, 2).movedim(-1, 1).float() - 1).requires_grad_(True)
    theirs = dice_loss(logits, target, compat="authors")
    assert theirs == 0 and not torch.autograd.grad(theirs, logits)[0].any()
    assert torch.autograd.grad(dice_loss(logits, target), logits)[0].any()


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ((2, 3, 4), torch.zeros(2, 5, dtype=torch.long), r"target must be classes \(2, 4\)"),
        ((2, 3, 4), torch.zeros(2, 4), "whole numbers"),
        ((2, 1, 4), torch.full((2, 4), 0.5), "target must hold 0 and 1, got 0.5"),
        ((2, 3, 4), torch.full((2, 4), 3), "target holds the class 3; possible: 0 to 2"),
        ((2, 3, 4), torch.full((2, 4), -1), "target holds the class -1"),
        ((2, 3), torch.zeros(2, dtype=torch.long), "prediction must be logits"),
    ],
)
def test_bad_masks(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        dice_loss(torch.zeros(prediction), target)


def test_silog():
    torch.manual_seed(0)
    p, t = torch.rand(2, 5, dtype=torch.float64) + 0.1, torch.rand(2, 5, dtype=torch.float64) + 0.1
    t[0, 0], t[1, 1] = 0.0, torch.inf  # no depth
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0, 0] = keep[1, 1] = False
    d = p[keep].log() - t[keep].log()
    want = 10 * (d.square().mean() - 0.85 * d.mean().square()).sqrt()
    torch.testing.assert_close(silog_loss(p, t, scale=10), want)
    torch.testing.assert_close(silog_loss(p, t, keep, scale=10), want)
    torch.testing.assert_close(silog_loss(3 * p, t, focus=1), silog_loss(p, t, focus=1))
    same = t.clone().where(keep, torch.ones(())).requires_grad_(True)
    loss = silog_loss(same, t)
    loss.backward()
    assert loss == 0 and not same.grad.any()
    for prediction, valid, message in (
        (p, torch.zeros_like(keep), "valid holds no place"),
        (p - 5, None, "prediction must be finite and above 0"),
        (p, torch.ones_like(keep), "target must be finite and above 0"),
        (p[:1], None, "target must have the shape"),
        (p, keep.double(), "valid must be boolean"),
    ):
        with pytest.raises(ValueError, match=message):
            silog_loss(prediction, t, valid)


def oracle(risk, time, event, ties):
    """By loops over the times of events."""
    total = torch.zeros((), dtype=torch.float64)
    for t in sorted({float(v) for v, e in zip(time, event, strict=True) if e}):
        dead = [i for i in range(len(time)) if event[i] and float(time[i]) == t]
        at_risk = sum(risk[i].exp() for i in range(len(time)) if float(time[i]) >= t)
        own = sum(risk[i].exp() for i in dead)
        for rank, i in enumerate(dead):
            share = rank / len(dead) if ties == "efron" else 0.0
            total = total + (at_risk - share * own).log() - risk[i]
    return total / sum(map(bool, event))


@pytest.mark.parametrize("ties", ["breslow", "efron"])
@pytest.mark.parametrize("seed", range(4))
def test_cox(ties, seed):
    g = torch.Generator().manual_seed(seed)
    risk = torch.randn(12, dtype=torch.float64, generator=g).requires_grad_(True)
    time = torch.randint(0, 5, (12,), generator=g).double()
    event = torch.rand(12, generator=g) < 0.6
    want = oracle(risk, time, event, ties)
    got = cox_loss(risk, time, event.double(), ties=ties)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    a, b = (torch.autograd.grad(v, risk, retain_graph=True)[0] for v in (got, want))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    order = torch.randperm(12, generator=g)
    torch.testing.assert_close(cox_loss(risk[order], time[order], event[order], ties=ties), got)
    torch.testing.assert_close(cox_loss(risk + 5, time, event, ties=ties), got)
    assert torch.autograd.gradcheck(lambda r: cox_loss(r, time, event, ties=ties), risk)


def test_cox_where_hazards_are_huge_and_by_weight():
    risk = torch.tensor([1000.0, -1000.0, 0.0, 0.0], requires_grad=True)
    time, event = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([True, True, True, False])
    for ties in ("breslow", "efron"):
        loss = cox_loss(risk, time, event, ties=ties)
        assert loss.isfinite() and torch.autograd.grad(loss, risk)[0].isfinite().all()
    one = cox_loss(risk, time, event, weights=torch.tensor([1.0, 0.0, 0.0, 5.0]))
    assert float(one.detach()) == pytest.approx(0.0)
    third = cox_loss(torch.zeros(4), time, event, weights=torch.tensor([0.0, 0.0, 2.0, 0.0]))
    assert float(third) == pytest.approx(math.log(3))
    assert cox_loss(risk.half(), time, event).dtype == torch.float32


@pytest.mark.parametrize(
    ("time", "event", "settings", "message"),
    [
        ([1.0, -2.0], [1, 0], {}, "time must be at least 0, got -2.0"),
        ([1.0, torch.nan], [1, 0], {}, "time must be finite"),
        ([1.0, 2.0], [0, 0], {}, "event holds none"),
        ([1.0, 2.0], [1, 2], {}, "0 and 1 only"),
        ([1.0], [1], {}, r"time must be \(2,\)"),
        ([1.0, 2.0], [1, 0], {"ties": "exact"}, "ties"),
        ([1.0, 2.0], [1, 0], {"weights": torch.tensor([0.0, 1.0])}, "weights must be"),
        ([1.0, 2.0], [1, 0], {"weights": torch.tensor([torch.inf, 1.0])}, "weights must be finite"),
    ],
)
def test_bad_survival(time, event, settings, message):
    with pytest.raises(ValueError, match=message):
        cox_loss(torch.zeros(2), torch.tensor(time), torch.tensor(event), **settings)
    with pytest.raises(ValueError, match="risk must be finite, got nan"):
        cox_loss(torch.tensor([0.0, torch.nan]), torch.ones(2), torch.ones(2))
