"""Lines of gaze, events and annotators, small; their pages hold what was measured."""

import json

import pytest
import torch
from test_tasks_bags import held, on_page

from attnlib.bench.data.annotators import ratings
from attnlib.bench.data.events import KINDS, clips
from attnlib.bench.data.gaze import search, shelves
from attnlib.bench.studies.tasks import annotators, events, gaze
from attnlib.models.perception.oat import OAT


@pytest.mark.parametrize("line", [gaze, events, annotators])
def test_tables_are_of_the_results(line):
    name = line.__name__.rpartition(".")[2]
    assert on_page("tasks-sequences", name) == line.table(held(name))


@pytest.mark.parametrize(
    ("line", "tested", "metric", "most"),
    [(gaze, 3, "unseen", 100), (events, 4, "accuracy", 100), (annotators, 2, "after", 1)],
)
def test_lines(line, tested, metric, most, tmp_path):
    given = dict(steps=2, seeds=(0, 1), tested=tested, keep=tmp_path / "kept")
    found = line.measure(**given, pictures=tmp_path)
    assert [r["name"] for r in found["rows"]] == list(line.NAMES) and json.dumps(found)
    assert all(-most <= r[metric]["mean"] <= most for r in found["rows"])
    assert len(list(tmp_path.glob("tasks-*-cpu.*"))) == 2
    assert line.measure(**given)["runs"] == found["runs"]
    assert all(f"| {name} |" in line.table(found) for name in line.NAMES)


def test_searchers_stop_at_what_they_seek():
    made = shelves(40, torch.Generator().manual_seed(0), (3, 5))
    for path, sought in zip(made.path.tolist(), made.sought.tolist(), strict=True):
        looked = [thing for thing in path if thing >= 0]
        assert sought not in looked[:-1] and (looked[-1] == sought or len(looked) == 16)
    # Of the two things left and right of the middle, a searcher who likes nothing else takes the right one.
    places, alike = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.zeros(2, dtype=torch.long)
    firsts = [int(search(places, alike, 1, torch.Generator().manual_seed(s), drift=20.0)[0]) for s in range(20)]
    assert firsts == [1] * 20


def test_chains_draw_what_they_counted():
    made = [shelves(200, torch.Generator().manual_seed(1), (3, 4))]
    plain, seeing = (gaze.Chain(made, colours) for colours in (False, True))
    right, left = (False, 0.0, 1.0, None), (False, 0.0, -1.0, None)
    assert plain.weights[right] > plain.weights[left]
    assert seeing.weights[False, 0.0, 1.0, True] > seeing.weights[False, 0.0, 1.0, False]
    path = seeing.sample(made[0], 0, torch.Generator().manual_seed(0))
    assert path[-1] == int(made[0].sought[0]) or len(path) == gaze.LONGEST


def test_learnt_places_are_the_same_network():
    torch.manual_seed(0)
    model = gaze.LearntPlaces(24, 2, 16, (1, 1), table_size=8)
    plain = OAT(24, 2, 16, (1, 1), table_size=8)
    theirs = sum(p.numel() for p in plain.parameters()) + plain.table.numel()
    assert sum(p.numel() for p in model.parameters()) == theirs and model.table.requires_grad
    made = shelves(2, torch.Generator().manual_seed(0), (2, 3), longest=4)
    sum(model.loss(model(*made[:4]), made.path).values()).backward()
    assert bool(model.table.grad[:2].abs().sum() > 0)


def test_events_are_seen_and_heard():
    made = clips(200, torch.Generator().manual_seed(0), noise=0.0, hum=0.0)
    event = made.target < KINDS
    assert torch.equal(event, made.seen & made.heard)
    assert all(bool(some.any()) for some in (event, made.seen & ~made.heard, made.heard & ~made.seen))
    assert torch.equal(made.audio.amax(-1) > 0.5, made.heard)
    cells = made.video.flatten(2, 3).amax(-1)  # (B, T, 9)
    assert torch.equal(cells.gather(2, made.at[..., None]).squeeze(2) > 0.5, made.seen)
    assert bool(((cells > 0.5).sum(-1) == 2 + made.seen).all())
    loudest = made.audio.argmax(-1)
    assert torch.equal(loudest[event], 3 * made.target[event] + 1)
    everything = events.scored(made.target, made)
    assert set(everything.values()) == {100.0}
    idle = events.scored(torch.full_like(made.target, KINDS), made)
    assert idle["events"] == 0 and idle["unseen"] == idle["unheard"] == 100


def test_annotators_say_what_sounds_times_their_gains():
    made = ratings(50, torch.Generator().manual_seed(0), songs=2, noise=0.0)
    sound = torch.stack([made.mel[..., 0, 0], made.mel[..., 0, -1]], -1)
    centred = [x - x.mean(1, keepdim=True) for x in (made.values, sound)]
    gain = (centred[0] * centred[1]).sum(1) / centred[1].square().sum(1)
    assert torch.allclose(gain[::2], gain[1::2], atol=1e-4) and -0.5 <= gain.min() < 0 < 1 < gain.max() <= 1.5
    assert torch.allclose(centred[0], gain[:, None] * centred[1], atol=1e-5)
