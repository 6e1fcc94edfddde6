"""The line on clicks, small; the segmenter that the repository holds; pictures with their masks."""

import json

import pytest
import torch

from attnlib.bench.studies.multimodal_models import clicks
from attnlib.bench.worlds import segmenter
from attnlib.look.segment.promac import boxes_in

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks")
    settings = dict(count=2, part="dev", first=0)
    keep = folder / "kept.jsonl"
    found = clicks.measure(keep=keep, pictures=folder, **settings)
    return found, clicks.measure(keep=keep, **settings), folder


def test_the_line_runs_and_goes_on(small):
    found, again, folder = small
    assert (folder / "multimodal-models-clicks-cpu.svg").exists() and json.dumps(found)
    assert {k: v for k, v in again.items() if k != "machine"} == {k: v for k, v in found.items() if k != "machine"}
    for world, names in clicks.CONTESTANTS.items():
        assert [row["name"] for row in found[world]] == list(names)
        assert clicks.table(found[world]).count("\n") == len(names) + 1


def test_hits_and_bars_are_what_they_say(small):
    for world in clicks.CONTESTANTS:
        rows = {row["name"]: row for row in small[0][world]}
        assert rows["click on the thing"]["hit"]["mean"] == rows["true box"]["hit"]["mean"] == 100
        for name, bar in small[0]["bars"][world].items():
            assert bar["value"] == pytest.approx(rows[name]["overlap"]["mean"] / 100)
            assert bar["holds"] == (bar["value"] >= clicks.BARS[name])


@pytest.mark.parametrize("world", segmenter.WORLDS)
def test_masks_lie_on_their_things(world):
    for sight in segmenter.sights(world, range(6), "dev"):
        assert len(sight.names) == len(sight.masks)
        for mask in sight.masks:
            x1, y1, x2, y2 = segmenter.box_of(mask).long().tolist()
            assert mask.any() and mask[y1:y2, x1:x2].sum() == mask.sum()
        if world == "scenes" and len(sight.masks):
            on = sight.masks.any(0)
            assert sight.image[:, on].max(0)[0].mean() > sight.image[:, ~on].max(0)[0].mean() + 0.2


def test_the_start_knows_which_patch_a_click_lies_in():
    model = segmenter.build()
    table = model.shared_image_embedding.positional_embedding
    assert torch.equal(table, model.prompt_encoder.shared_embedding.positional_embedding) and not table.requires_grad
    assert sum(p.numel() for p in model.parameters()) * 4 < 5e6
    places = model.get_image_wide_positional_embeddings()[0].flatten(1).T
    at = torch.tensor([[[22.3, 41.7]]])  # in row 10 of patches, column 5
    point = model.prompt_encoder.shared_embedding(at[None], (64, 64))[0, 0, 0]
    assert int((places @ point).argmax()) == 10 * 16 + 5


def test_no_segmenter_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"segmenter\.py makes one"):
        segmenter.load(tmp_path)
    with pytest.raises(ValueError, match="world='photos' is not possible"):
        clicks.Contest("photos")


def test_a_place_in_words_is_a_box_and_the_same_picture_takes_nothing_away():
    sight, which = clicks.target("scenes", clicks.numbers("scenes", 1, "dev", 0)[0], "dev")
    image, name = sight.image.permute(1, 2, 0).contiguous(), sight.names[which]
    ask = clicks.CellAsk(name)
    said = ask(image, f"where is {name} ?")
    (box,) = boxes_in(said.text, image.shape[:2])
    assert box.tolist() == [16 * v for v in (box / 16).round().tolist()] and (box[2:] - box[:2]).tolist() == [16, 16]
    assert ask(image, f"where is {name} ?", without=image).text == said.text
    assert ask(image, "describe it").text == name
    x1, y1, x2, y2 = box.int().tolist()
    assert sight.masks[which][y1:y2, x1:x2].sum() > 0.5 * sight.masks[which].sum()


def test_what_is_painted_over_has_the_colour_of_the_rest():
    image = torch.full((4, 4, 3), 0.2)
    image[1, 1] = 0.9
    mask = image[..., 0] > 0.5
    assert torch.equal(clicks._filled(image, mask, [], []), torch.full((4, 4, 3), 0.2))
