"""Rooms, maps and clips: numbered, and what they tell is in the picture."""

import pytest
import torch

from attnlib.bench.worlds import clips, maps, rooms
from attnlib.bench.worlds.painter import COLOURS

MAKERS = {"room": rooms.make_room, "map": maps.make_map, "clip": clips.make_clip}


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_and_parts_make_the_picture(name):
    make = MAKERS[name]

    def shown(*key):
        made = make(*key)
        return made.frames if name == "clip" else made.image

    a = shown(3, "dev")
    assert torch.equal(a, shown(3, "dev")) and a.dtype == torch.float32 and 0 <= float(a.min()) <= float(a.max()) <= 1
    assert not any(torch.equal(a, shown(*key)) for key in ((4, "dev"), (3, "test"), (3, "train")))
    with pytest.raises(ValueError, match="part="):
        make(0, "valid")


# ---- rooms


def test_points_lie_on_the_boxes_they_belong_to():
    for number in range(10):
        room = rooms.make_room(number, noise=0.0)
        points = room.points()
        for i, box in enumerate(room.boxes):
            mine = points[room.owner == i]
            low, high = torch.tensor(box.low), torch.tensor(box.high)
            assert bool(((mine > low - 1e-4) & (mine < high + 1e-4)).all())
            on_face = torch.minimum((mine - low).abs(), (mine - high).abs()).amin(-1)
            assert len(mine) == 0 or float(on_face.max()) < 1e-4
            seen = room.image[:, room.owner == i]
            colour = torch.tensor(COLOURS[box.colour])[:, None]
            shade = (seen / colour.clamp(min=1e-3)).mean(0)
            assert len(mine) == 0 or (0.7 < float(shade.min()) and float(shade.max()) < 1.01)
        walls = points[room.owner == -1]
        far = torch.stack([walls[:, 0].abs() - rooms.HALF, walls[:, 2] - room.back], -1)
        floor = torch.stack([walls[:, 1] - rooms.FLOOR, -walls[:, 1] - rooms.CEILING], -1)
        assert float(torch.cat([far, floor], -1).abs().amin(-1).max()) < 1e-4


def test_boxes_stand_apart_and_most_are_seen():
    seen = total = 0
    for number in range(30):
        room = rooms.make_room(number)
        assert len({b.colour for b in room.boxes}) == len(room.boxes) >= 2
        for i, a in enumerate(room.boxes):
            assert a.high[1] == rooms.FLOOR
            for b in room.boxes[:i]:
                assert any(a.low[k] > b.high[k] or a.high[k] < b.low[k] for k in (0, 2))
        seen += len(set(room.owner.unique().tolist()) - {-1})
        total += len(room.boxes)
    assert seen / total > 0.8


def test_normals_are_those_of_what_is_seen():
    for number in range(5):
        room = rooms.make_room(number, noise=0.0)
        points = room.points()
        # Off edges, the cross product of differences between neighbours.
        right, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        made = torch.nn.functional.normalize(torch.linalg.cross(down, right), dim=-1)
        flat = torch.stack([room.normals.roll((a, b), (1, 2)) for a in (-1, 0, 1) for b in (-1, 0, 1)])
        same = room.owner.unfold(0, 3, 1).unfold(1, 3, 1).flatten(2)
        inside = (same == same[..., :1]).all(-1) & (flat == flat[:1]).all(0).all(0)[1:-1, 1:-1]
        given = room.normals.movedim(0, -1)[1:-1, 1:-1]
        assert float(inside.float().mean()) > 0.5 and torch.equal(given.norm(dim=-1), torch.ones_like(given[..., 0]))
        assert float((made - given)[inside].abs().max()) < 1e-3
        assert bool((given * points[1:-1, 1:-1]).sum(-1).lt(0).all())  # towards the camera


def test_larger_rooms_differ_in_tiles_alone():
    small, large = rooms.make_room(4, noise=0.0), rooms.make_room(4, noise=0.0, scale=8.0)
    torch.testing.assert_close(large.depth, 8 * small.depth)
    torch.testing.assert_close(large.points(), 8 * small.points())
    assert large.back == 8 * small.back and large.boxes[0].high == tuple(8 * v for v in small.boxes[0].high)
    ground = (small.owner == -1) & (small.normals[1] == -1)
    apart = (large.image != small.image).any(0)
    assert bool(apart.any()) and not bool(apart[~ground].any())
    with pytest.raises(ValueError, match="scale must"):
        rooms.make_room(0, scale=0.0)


def test_clouds():
    room = rooms.make_room(2, noise=0.0)
    flat = torch.cat([room.points(), room.image.permute(1, 2, 0)], -1).flatten(0, 1)
    some = rooms.cloud(room, 50)
    assert bool((some[:, None] == flat).all(-1).any(1).all()) and torch.equal(some, rooms.cloud(room, 50))
    whole = rooms.cloud(room, 400, of="boxes", seed=1)
    for box in room.boxes:
        mine = whole[(whole[:, 3:] - torch.tensor(COLOURS[box.colour])).abs().amax(1) < 1e-6, :3]
        low, high = torch.tensor(box.low), torch.tensor(box.high)
        assert len(mine) > 5 and bool(((mine >= low - 1e-5) & (mine <= high + 1e-5)).all())
        assert float(torch.minimum((mine - low).abs(), (mine - high).abs()).amin(-1).max()) < 1e-5
    with pytest.raises(ValueError, match="of="):
        rooms.cloud(room, 5, of="walls")


# ---- maps


def test_symbols_are_dark_lie_apart_and_their_ground_is_masked():
    kinds = set()
    for number in range(20):
        drawn = maps.make_map(number)
        cover = torch.zeros(128, 128, dtype=torch.long)
        for s in drawn.symbols:
            left, top, right, bottom = s.box
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128
            cover[top:bottom, left:right] += 1
            assert bool(drawn.masks[maps.KINDS.index(s.kind), top:bottom, left:right].all())
            assert int((drawn.image[:, top:bottom, left:right].amax(0) < 0.32).sum()) >= 10
            kinds.add(s.kind)
        assert cover.max() == 1 and torch.equal(cover == 1, drawn.masks.any(0))
    assert kinds == set(maps.KINDS)


# ---- clips


def test_what_happens_happens_then_and_only_then():
    events = set()
    for number in range(40):
        clip = clips.make_clip(number, noise=0.0)
        assert 1 <= len(clip.moments) <= 2 and len({m.colour for m in clip.moments}) == len(clip.moments)
        ground = float(clip.frames[0, 0, 0, 0])
        for i, colour in enumerate(clip.colours):
            moment = next((m for m in clip.moments if m.colour == colour), None)
            rest = [t for t in range(24) if moment is None or not moment.start <= t < moment.end]
            tops = clip.boxes[i, :, 1]
            assert len(set(tops[rest].tolist())) <= 1
            for t in range(24):
                left, top, right, bottom = clip.boxes[i, t].tolist()
                inside = clip.frames[t, :, top:bottom, left:right]
                full = bool((inside - torch.tensor(COLOURS[colour])[:, None, None]).abs().max() < 1e-5)
                if t in rest:
                    assert full
                elif moment.event == "pales":
                    assert not full
                elif moment.event == "jumps":
                    assert full and (not rest or int(top) != int(tops[rest[0]]))
                else:
                    assert full == bool((t - moment.start) % 2)
            if moment is not None:
                events.add(moment.event)
                assert 0 <= moment.start < moment.end <= 24 and colour in moment.text
        assert 0 <= ground <= 1
    assert events == set(clips.EVENTS)
