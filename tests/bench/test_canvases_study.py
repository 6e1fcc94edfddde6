"""The line on canvases, small: techniques read what they say they do, and the speaker is the model."""

import json

import pytest
import torch

from attnlib.bench.data import scenes
from attnlib.bench.data.speaking import scene_speaker
from attnlib.bench.studies.multimodal_models import canvases
from attnlib.look.zoom import crop

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return scenes.load_model()


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("canvases")
    settings = dict(count=1, slow=1, side=128, part="dev", first=0, model=model)
    keep = folder / "kept.jsonl"
    found = canvases.measure(keep=keep, pictures=folder, **settings)
    return found, canvases.measure(keep=keep, **settings), folder


def test_the_line_runs_and_goes_on(small):
    found, again, folder = small
    assert (folder / "multimodal-models-canvases-cpu.svg").exists() and json.dumps(found)
    assert {k: v for k, v in again.items() if k != "machine"} == {k: v for k, v in found.items() if k != "machine"}
    assert [row["name"] for row in found["rows"]] == list(canvases.TECHNIQUES)
    assert canvases.table(found).count("\n") == len(canvases.TECHNIQUES) + 1


def test_techniques_read_what_they_say(small):
    rows = {r["name"]: {k: v["mean"] for k, v in r.items() if isinstance(v, dict)} for r in small[0]["rows"]}
    assert rows["whole picture"]["pictures"] == 1 and rows["whole picture"]["prompts"] == 3
    assert rows["uniform 2 × 2"]["visual tokens"] == 4 * 64
    assert rows["DC², nothing merged"]["pictures"] >= 5  # four leaves and the whole
    assert rows["oracle crop"]["right"] > rows["random crop"]["right"]


def test_margins_are_those_of_the_model(model):
    asked = canvases.Asked(1, "dev", 128)
    speaker, plain = canvases.CanvasSpeaker(*model), scene_speaker()
    views = [crop(asked.image, box).image for box in canvases.tiles(128, 2)]
    text = "is there a red cross ?"
    plain = plain.logits_each([(view, text) for view in views], ("yes", "no"))
    speaker.prepare(views, [text, "what colour is the cross ?"])
    assert speaker.pictures == speaker.prompts == 0
    ours = speaker.logits_each([(view, text) for view in views], ("yes", "no"))
    torch.testing.assert_close(ours[:, 0] - ours[:, 1], plain[:, 0] - plain[:, 1], atol=1e-4, rtol=1e-4)
    assert speaker.pictures == speaker.prompts == 4


def test_what_must_be_seen():
    assert canvases.wanted("is there a digit 3 ?") == ("digit 3",)
    with pytest.raises(ValueError, match="text must name a shape"):
        canvases.wanted("list the objects")
    with pytest.raises(ValueError, match="techniques='DC2' is not possible"):
        canvases.measure(count=1, techniques=("DC2",))
    with pytest.raises(ValueError, match="name='DC2' is not possible"):
        canvases.measured("DC2", 0, None, "dev", 128)
