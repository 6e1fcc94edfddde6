"""Class semantics-based attention and the small detector in time around it."""

import copy

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.bench.data.actions import clips
from attnlib.models.detect.temporal import (
    BoundaryDetector,
    Segments,
    average_precision,
    overlap,
    point_labels,
    segments,
    soft_nms,
)
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.nn.gates.class_semantics import ClassSemanticsAttention


def built(**settings):
    torch.manual_seed(0)
    return ClassSemanticsAttention(8, **{"semantic_dim": 5, **settings}).double()


def given(seed=0, t=11):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, t, c, dtype=torch.float64, generator=g) for c in (8, 5))


def oracle(m, x, r):
    """The formulas point by point, zeros beyond both ends."""

    def along(conv, s):
        k = conv.kernel_size[0]
        padded = F.pad(s, (0, 0, k // 2, k // 2))
        rows = [sum(padded[:, t + i] @ conv.weight[:, :, i].T for i in range(k)) + conv.bias for t in range(s.shape[1])]
        return torch.stack(rows, 1)

    channel = torch.sigmoid(m.fc2(torch.relu(m.fc1(along(m.conv, r).mean(1)))))[:, None]
    time = torch.sigmoid(along(m.time2, torch.relu(along(m.time1, r))))
    if m.fuse is None:
        return channel, time, x * channel + x * time
    return channel, time, m.fuse(torch.cat([x * channel, x * time], -1))


@pytest.mark.parametrize("fusion", ["sum", "concat"])
def test_equals_its_formulas_with_gradients(fusion):
    m, (x, r) = built(fusion=fusion), given()
    x, r = x.requires_grad_(), r.requires_grad_()
    channel, time, want = oracle(m, x, r)
    gates = m.gates(r)
    torch.testing.assert_close(gates.channel, channel)
    torch.testing.assert_close(gates.time, time)
    assert gates.channel.shape == (2, 1, 8) and gates.time.shape == (2, 11, 1)
    assert all(bool(((g > 0) & (g < 1)).all()) for g in gates)
    got = m(x, r)
    torch.testing.assert_close(got, want)
    inputs = [x, r, *m.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), inputs), torch.autograd.grad(want.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_constant_semantics_give_a_constant_gate_away_from_the_ends():
    m = built()
    time = m.gates(torch.ones(1, 1, 5, dtype=torch.float64).expand(1, 12, 5)).time[0, 2:-2]
    torch.testing.assert_close(time, time[:1].expand_as(time))


def test_of_itself_without_convolution_it_is_squeeze_and_excitation():
    m = ClassSemanticsAttention(8, hidden=4, channel_conv=False).double()
    se = attnlib.create("squeeze-excite", dim=8, reduction=2).double()
    for theirs, ours in ((se.se.fc1, m.fc1), (se.se.fc2, m.fc2)):
        theirs.load_state_dict(ours.state_dict())
    x = next(iter(given()))
    torch.testing.assert_close(m.gates(x).channel, se.gate(x))


def test_the_recogniser_gets_its_gradient_through_the_gates_alone():
    m, (x, r) = built(), given()
    r = r.requires_grad_()
    m(x.detach(), r).sum().backward()
    got = r.grad.clone()
    r.grad = None
    channel, time = m.gates(r)
    (x * channel + x * time).sum().backward()
    torch.testing.assert_close(r.grad, got)


def test_absent_points_change_nothing():
    m, (x, r) = built(fusion="concat"), given()
    valid = torch.arange(15).expand(2, 15) < 11
    pad = lambda t: F.pad(t, (0, 0, 0, 4), value=float("nan"))  # noqa: E731
    got = m(pad(x), pad(r), valid)
    torch.testing.assert_close(got[:, :11], m(x, r))
    assert not got[:, 11:].any()
    assert m(x, r[:, ::2]).shape == x.shape  # resampled
    torch.testing.assert_close(copy.deepcopy(m)(x, r), m(x, r))
    torch.testing.assert_close(torch.compile(m, backend="eager")(x, r), m(x, r))
    assert m(x[:0], r[:0]).shape == (0, 11, 8)


def test_a_stream_that_marks_actions_localises_them():
    """The evidence, smaller: with CSA the detector finds segments far above chance."""
    torch.manual_seed(0)
    model = BoundaryDetector(8, 16)
    optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 5e-3))
    g = torch.Generator().manual_seed(0)
    for _ in range(80):
        features, truth = clips(16, g)
        train_batch(model, {"features": features, "target": truth}, optimizers)
    features, truth = clips(24, torch.Generator().manual_seed(9))
    found = average_precision(model.predict(features), truth)
    assert found[0.5] > 0.5 and found[0.3] >= found[0.7]
    valid = torch.arange(50).expand(24, 50) < 40
    again = model.predict(F.pad(features, (0, 0, 0, 10), value=9.0), valid)
    assert all(torch.equal(a.bounds, b.bounds) for a, b in zip(again, model.predict(features), strict=True))


def test_precision_by_hand():
    truth = [torch.tensor([[0.0, 10.0], [20.0, 30.0]]), torch.zeros(0, 2)]
    found = [
        Segments(torch.tensor([[0.0, 9.0], [1.0, 10.0], [22.0, 30.0]]), torch.tensor([0.9, 0.8, 0.6])),
        Segments(torch.tensor([[3.0, 5.0]]), torch.tensor([0.7])),
    ]
    # right, twice the same, of nothing, right: precision 1 at recall 1/2, 1/2 at recall 1
    assert average_precision(found, truth, (0.5,))[0.5] == pytest.approx((1 + 0.5) / 2)
    assert average_precision(found, truth, (0.85,))[0.85] == pytest.approx(0.5)
    assert overlap(truth[0], truth[0]).tolist() == [[1, 0], [0, 1]]


def test_segments_and_suppression():
    start, end = torch.tensor([0.9, 0.1, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.8, 0.1])
    made = segments(start, end, torch.ones(4))
    assert made.bounds[0].tolist() == [0, 3] and made.scores[0] == pytest.approx(0.72)
    assert len(made.scores) == 10 and len(segments(start, end, torch.ones(4), longest=1).scores) == 4
    kept = soft_nms(made, most=3)
    assert kept.bounds[0].tolist() == [0, 3] and (kept.scores.diff() <= 0).all() and len(kept.scores) == 3
    assert len(soft_nms(segments(start[:0], end[:0], end[:0])).scores) == 0
    labels = point_labels([torch.tensor([[1.0, 3.0]])], 4)[0]
    assert labels.T.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]]


def test_bad_input():
    m, (x, r) = built(), given()
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        built(kernel_size=2)
    with pytest.raises(ValueError, match="fusion"):
        built(fusion="mean")
    with pytest.raises(TypeError, match="semantics must be"):
        m(x, [1])
    with pytest.raises(ValueError, match="length must be an integer of at least 1"):
        m.gates(r, 0)
    with pytest.raises(ValueError, match="share the batch"):
        m(x, r[:1])
    with pytest.raises(ValueError, match="semantic_dim=5"):
        m(x, x)
    with pytest.raises(ValueError, match="resample it to the same points"):
        m(x, r[:, :7], torch.arange(11).expand(2, 11) < 9)
    with pytest.raises(ValueError, match="begin < end"):
        point_labels([torch.tensor([[3.0, 3.0]])], 5)
    with pytest.raises(ValueError, match="nothing to find"):
        average_precision([], [])
    with pytest.raises(ValueError, match="attention='cbam'"):
        BoundaryDetector(8, attention="cbam")
    with pytest.raises(ValueError, match=r"target\[0\] must be"):
        average_precision([Segments(torch.zeros(0, 2), torch.zeros(0))], [torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="end must have shape"):
        segments(torch.zeros(3), torch.zeros(4), torch.zeros(3))
