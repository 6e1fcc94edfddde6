"""No code was released: the scores are held to the equation, problems to SciPy and to brute force."""

from itertools import permutations

import pytest
import torch

import attnlib
from attnlib.models.pointer import PointerNetwork

SLUG = "pointer-networks"


def make(**settings):
    torch.manual_seed(0)
    return attnlib.create(SLUG, **{**dict(dim=8), **settings})


def network(**settings):
    torch.manual_seed(0)
    net = PointerNetwork(**{**dict(hidden=12), **settings})
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(12)
    return net.eval()


def oracle(m, d, e):
    """The equation, one pair after another."""
    u = torch.stack([
        torch.stack([m.v.weight[0] @ torch.tanh(m.w1.weight @ e[b, j] + m.w2.weight @ d[b, i])
                     for i in range(d.shape[1]) for j in range(e.shape[1])]).view(d.shape[1], e.shape[1])
        for b in range(len(d))
    ])  # fmt: skip
    return u.softmax(-1)


def test_equals_the_equation():
    m = make(hidden=5).double()
    d, e = torch.randn(2, 3, 8).double().requires_grad_(), torch.randn(2, 6, 8).double().requires_grad_()
    p = oracle(m, d, e)
    torch.testing.assert_close(m.log_probs(d, e).exp(), p)
    out = m(d, e, returns=("weights",))
    torch.testing.assert_close(out.weights[:, 0], p)
    torch.testing.assert_close(out.y, p @ e)
    g = torch.randn_like(out.y)
    for got, want in zip(torch.autograd.grad(out.y, (d, e), g), torch.autograd.grad(p @ e, (d, e), g), strict=True):
        torch.testing.assert_close(got, want)


def test_permuting_inputs_permutes_the_distribution():
    m, d, e = make(), torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    order = torch.randperm(6)
    torch.testing.assert_close(m.log_probs(d, e[:, order]), m.log_probs(d, e)[..., order])


@pytest.mark.parametrize("stop", [False, True])
def test_one_network_answers_for_any_number_of_points(stop):
    net = network(stop=stop)
    for n in (1, 5, 50):
        p = net(torch.rand(2, n, 2), torch.zeros(2, 3, dtype=torch.long))
        assert p.shape == (2, 3, n + stop)
        torch.testing.assert_close(p.exp().sum(-1), torch.ones(2, 3))
    shapes = {tuple(p.shape) for p in net.parameters()}
    assert all(set(s) <= {2, 12, 48, 1} for s in shapes)


@pytest.mark.parametrize("stop", [False, True])
def test_the_log_probability_of_an_answer_is_the_sum_of_its_pointers(stop):
    net = network(stop=stop)
    points = torch.rand(3, 6, 2)
    answers, logp = net.decode(points, beams=4, max_length=4)
    p = net(points, answers)
    want = torch.zeros(3)
    for b in range(3):
        for i, a in enumerate(answers[b].tolist()):
            want[b] = want[b] + p[b, i, a if a >= 0 else 6].detach()
            if a < 0:
                break
    torch.testing.assert_close(logp, want)
    if not stop:
        torch.testing.assert_close(net.loss(points, answers) * answers.numel(), -want.sum())


def test_the_loss_counts_one_end_symbol():
    net = network(stop=True)
    points = torch.rand(1, 5, 2)
    short, long = torch.tensor([[3, 1, -1]]), torch.tensor([[3, 1, -1, -1, -1]])
    torch.testing.assert_close(net.loss(points, long), net.loss(points, short))
    p = net(points, short)
    torch.testing.assert_close(net.loss(points, short), -(p[0, 0, 3] + p[0, 1, 1] + p[0, 2, 5]) / 3)


def test_a_wide_beam_finds_the_best_tour_that_exists():
    net = network()
    points = torch.rand(2, 4, 2)
    found, logp = net.decode(points, tour=True, beams=24)
    for b in range(2):
        best = (-float("inf"), None)
        for order in permutations(range(4)):
            # restricted to cities not visited yet, as decoding does
            p, total = net(points[b : b + 1], torch.tensor([order])).detach()[0].exp(), 0.0
            left = torch.ones(4)
            for i, city in enumerate(order):
                total += float((p[i, city] / (p[i] * left).sum()).log())
                left[city] = 0
            best = max(best, (total, order))
        assert tuple(found[b].tolist()) == best[1]
        assert float(logp[b]) == pytest.approx(best[0], abs=1e-5)
    greedy = net.decode(points, tour=True)[1]
    assert bool((logp >= greedy - 1e-6).all())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("stop", [False, True])
def test_a_tour_visits_every_point_once(beams, stop):
    net = network(stop=stop)
    valid = torch.arange(7) < torch.tensor([[7], [4], [1]])
    found, _ = net.decode(torch.rand(3, 7, 2), valid, tour=True, beams=beams)
    for row, n in zip(found.tolist(), (7, 4, 1), strict=True):
        assert sorted(row[:n]) == list(range(n)) and row[n:] == [-1] * (7 - n)


def test_padding_changes_nothing():
    net = network(stop=True)
    points, answers = torch.rand(2, 6, 2), torch.tensor([[0, 2, -1], [1, 3, -1]])
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    together = net(points, answers, valid)
    alone = net(points[1:, :4], answers[1:])
    torch.testing.assert_close(together[1:, :, [0, 1, 2, 3, 6]], alone)
    assert not together[1, :, 4:6].exp().any()
    changed = points.clone()
    changed[1, 4:] = 9.0
    torch.testing.assert_close(net(changed, answers, valid), together)
    net.loss(points, answers, valid).backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    padded, plain = net.decode(points, valid, max_length=5), net.decode(points[1:, :4], max_length=5)
    torch.testing.assert_close(padded[1][1:], plain[1])


def test_it_learns_to_sort():
    torch.manual_seed(0)
    net = PointerNetwork(input_dim=1, hidden=48)
    optimizer = torch.optim.Adam(net.parameters(), lr=8e-3)
    steps = 500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 8e-3 * (1 - step / steps) + 1e-4
        x = torch.rand(64, 5, 1)
        loss = net.loss(x, x.squeeze(-1).argsort(1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
    # a grid, so that no two numbers are close to a tie
    x = torch.rand(400, 5, 1).argsort(1) / 5 + 0.1 * torch.rand(400, 5, 1)
    found, _ = net.decode(x, tour=True)
    assert float((found == x.squeeze(-1).argsort(1)).all(1).float().mean()) > 0.95


def test_bad_input():
    m, net = make(), network()
    d, e, points = torch.randn(1, 2, 8), torch.randn(1, 3, 8), torch.rand(2, 5, 2)
    with pytest.raises(ValueError, match="nothing to point at"):
        m.log_probs(d, e, torch.zeros(1, 1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1, got 0"):
        make(hidden=0)
    with pytest.raises(ValueError, match="d has 7 channels"):
        m.log_probs(torch.randn(1, 2, 7), e)
    with pytest.raises(ValueError, match="input_dim=2"):
        net.decode(torch.rand(2, 5, 3))
    with pytest.raises(ValueError, match="indices from 0 to 5; possible: 0 to 4"):
        net(points, torch.tensor([[0, 5], [1, 2]]))
    with pytest.raises(ValueError, match="answers has batch 1"):
        net(points, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="beams=0"):
        net.decode(points, beams=0)
    with pytest.raises(ValueError, match="no point"):
        net.decode(points[:, :0])
    with pytest.raises(ValueError, match="padding at the end"):
        net.decode(points, torch.tensor([[False, True, True, True, True]] * 2))
    with pytest.raises(ValueError, match="without points"):
        net.decode(points, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="distinguishes 2 heads"):
        m(d, e, mask=torch.ones(1, 2, 2, 3, dtype=torch.bool))


def test_a_glimpse_blends_projected_inputs():
    m = attnlib.create("pointer-networks", dim=4, glimpse=True)
    d, e = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    weights = m.log_probs(d, e).exp()
    torch.testing.assert_close(m(d, e), weights @ (e @ m.w1.weight.T + m.w1.bias), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="hidden must be dim=4"):
        attnlib.create("pointer-networks", dim=4, hidden=6, glimpse=True)
