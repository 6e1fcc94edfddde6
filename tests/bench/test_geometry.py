from itertools import permutations

import pytest
import torch

from attnlib.bench.data import geometry
from attnlib.bench.data.geometry import Problems, problems, score

pytest.importorskip("scipy")


@pytest.mark.parametrize("n", [3, 4, 7, 12])
def test_hulls(n):
    points, answers = problems("hull", 20, n, seed=n)
    for p, row in zip(points, answers, strict=True):
        ring = row[row >= 0].tolist()
        assert row.tolist()[len(ring) :] == [-1] * (len(row) - len(ring)) and ring[0] == min(ring)
        corners = p[ring]
        edge = corners.roll(-1, 0) - corners
        to = p[None] - corners[:, None]  # every point lies to the left of every edge
        left = edge[:, None, 0] * to[..., 1] - edge[:, None, 1] * to[..., 0]
        assert float(left.min()) > -1e-6 and geometry.is_simple(corners)
    assert bool((geometry.polygon_area(points, answers) > 0).all())


def test_triangulations_have_empty_circles_in_the_papers_order():
    points, answers = problems("delaunay", 15, 8)
    for p, row in zip(points.double(), answers, strict=True):
        found = row[row >= 0].view(-1, 3)
        assert torch.equal(found, found.sort(1).values)
        centres = []
        for triangle in found:
            a, b, c = p[triangle]
            sides = torch.stack([(b - c).norm(), (c - a).norm(), (a - b).norm()])
            centres.append(tuple(((sides[:, None] * p[triangle]).sum(0) / sides.sum()).tolist()))
            middle = torch.linalg.solve(2 * torch.stack([b - a, c - a]), torch.stack([b @ b - a @ a, c @ c - a @ a]))
            distance = (p - middle).norm(dim=1)
            assert float(distance.min()) >= float((a - middle).norm()) - 1e-9
        assert centres == sorted(centres)
        hull = len(geometry.hull_of(p))
        assert len(found) == 2 * 8 - 2 - hull  # Euler


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7])
def test_tours_are_the_shortest(n):
    points = torch.rand(6, n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.double)
    found, length = geometry.shortest_tours(points)
    assert torch.equal(found.sort(1).values, torch.arange(n).expand(6, n)) and not found[:, 0].any()
    every = torch.tensor([(0, *rest) for rest in permutations(range(1, n))]).view(-1, n)
    for b in range(6):
        best = geometry.tour_length(points[b].expand(len(every), -1, -1), every).min()
        torch.testing.assert_close(length[b], best)
    if n > 2:
        assert bool((geometry.polygon_area(points, found) > 0).all())


def test_scores_of_hulls():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    given = Problems(square.expand(4, -1, -1), torch.tensor([[0, 1, 2, 3, -1]] * 4))
    found = torch.tensor([[1, 2, 3, 0, -1], [0, 1, 2, -1, -1], [0, 2, 1, 3, -1], [0, 1, -1, -1, -1]])
    measured = score("hull", given, found)
    assert measured == pytest.approx({"accuracy": 0.25, "area": 0.75, "failed": 0.5})


def test_scores_of_triangulations():
    given = problems("delaunay", 10, 6)
    assert score("delaunay", given, given.answers) == pytest.approx({"accuracy": 1.0, "coverage": 1.0})
    without = given.answers.clone()
    without[:, 3:] = -1
    part = score("delaunay", given, without)
    counts = (given.answers >= 0).sum(1) / 3
    assert part["accuracy"] == 0.0 and part["coverage"] == pytest.approx(float((1 / counts).mean()))
    shuffled = given.answers[:, [1, 2, 0, *range(3, given.answers.shape[1])]]
    assert score("delaunay", given, shuffled)["accuracy"] == 1.0


def test_scores_of_tours():
    given = problems("tsp", 30, 6)
    best = score("tsp", given, given.answers.roll(2, 1))
    assert best["accuracy"] == 1.0 and best["ratio"] == pytest.approx(1.0, abs=1e-5)
    nearest = score("tsp", given, geometry.nearest_neighbour_tours(given.points))
    assert 1.0 < nearest["ratio"] < 1.3 and nearest["length"] > best["optimal"]
    with pytest.raises(ValueError, match="no tour"):
        score("tsp", given, torch.zeros_like(given.answers))


def test_problems_repeat_with_their_seed():
    a, b, c = (problems("hull", 3, 6, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.points, b.points) and torch.equal(a.answers, b.answers)
    assert not torch.equal(a.points, c.points)


def test_bad_input():
    with pytest.raises(ValueError, match="choose one of"):
        problems("sorting", 3, 5)
    with pytest.raises(ValueError, match="n=2 points are too few"):
        problems("hull", 3, 2)
    with pytest.raises(ValueError, match="count=0"):
        problems("tsp", 0, 5)
    with pytest.raises(ValueError, match="15 cities"):
        problems("tsp", 1, 15)


def test_without_scipy_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(ImportError, match=r"pip install 'attnlib\[bench\]'"):
        problems("hull", 1, 5)
    assert problems("tsp", 1, 4).answers.shape == (1, 4)
