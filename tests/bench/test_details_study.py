"""The study of glyphs that are nearly alike, as small as it goes."""

import json

import torch

from attnlib.bench import suites
from attnlib.bench.studies import details


def test_glyphs_differ_in_their_gap_alone():
    images, labels = details.glyphs(40, "train", torch.Generator().manual_seed(0))
    assert images.shape == (40, 1, details.SIDE, details.SIDE) and set(labels.tolist()) <= set(range(details.CLASSES))
    assert len({*details.GAPS}) == details.CLASSES
    for row, column in details.GAPS:  # every gap touches the frame, which is two pixels wide
        assert min(row, column) < 2 or max(row, column) + details.GAP > details.FRAME - 2
    # where the gap of an image is, its frame is not: the darkest of all gaps' places, at the best place of the frame
    room = range(0, details.SIDE - details.FRAME + 1, details.STEP)
    frame = torch.ones(details.FRAME, details.FRAME)
    frame[2:-2, 2:-2] = 0

    def told(image):
        at = [image[t : t + details.FRAME, x : x + details.FRAME] for t in room for x in room]
        best = max(at, key=lambda a: float((a * frame).sum()))
        sides = [(best * frame)[r : r + details.GAP, c : c + details.GAP].sum() for r, c in details.GAPS]
        whole = [frame[r : r + details.GAP, c : c + details.GAP].sum() for r, c in details.GAPS]
        return max(range(details.CLASSES), key=lambda i: float(whole[i] - sides[i]))

    right = sum(told(image) == label for image, label in zip(images[:, 0], labels.tolist(), strict=True))
    assert right >= 34


def test_a_small_run_of_details(tmp_path):
    found = details.measure(pictures=tmp_path, steps=1, batch=2, tested=8, seeds=(0,))
    assert [row["name"] for row in found["rows"]] == list(details.NAMES)
    plain = found["rows"][0]
    assert plain["accuracy"] == plain["alone"]  # nothing stands beside it
    cost = found["megaflops"]
    assert cost[details.OURS] > 2 * cost[details.PLAIN]
    assert found["steps of equal work"] == round(cost[details.OURS] / cost[details.PLAIN])
    assert (tmp_path / "details-cpu.svg").exists() and "details" in suites()
    json.dumps(found)
