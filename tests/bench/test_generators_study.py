import json

import pytest
import torch

from attnlib.bench import suites
from attnlib.bench.studies.diffusion import _judged, generators
from attnlib.bench.worlds import models
from attnlib.bench.worlds.judge import NOTHING, Found
from attnlib.bench.worlds.painter import HELD_OUT, PLACES, Prompt, Want, paint, sample
from attnlib.bench.worlds.prompts import KINDS, class_name, draw, prompts

pytest.importorskip("diffusers")


class Seer:
    """A judge that sees what pictures' first pixels say."""

    def judge(self, images, asked):
        from attnlib.bench.worlds.judge import compare

        out = []
        for image, prompt in zip(images, asked, strict=True):
            whole = [
                Found((0, 0, 9, 9), w.shape, w.colour, "small", "plain", 1.0, torch.zeros(64)) for w in prompt.wants
            ]
            broken = [Found((0, 0, 9, 9), NOTHING, "red", "small", "plain", 1.0, torch.zeros(64))]
            out.append(compare(whole if image[0, 0, 0] > 0.5 else broken, prompt))
        return out


def test_sets_of_prompts_are_the_same_everywhere_and_parts_differ():
    for kind in KINDS:
        asked = prompts(kind, 30)
        assert asked == prompts(kind, 30) and asked[:10] == prompts(kind, 10) and asked != prompts(kind, 30, "dev")
        pairs = {(w.colour, w.shape) for p in asked for w in p.wants}
        assert pairs <= set(HELD_OUT) if kind == "held-out" else not pairs & set(HELD_OUT)
    assert {p.wants[0].place for p in prompts("places", 200)} == set(PLACES)
    assert all(p.relation for p in prompts("relations", 9)) and {len(p.wants) for p in prompts("counts", 30)} == {2, 3}
    shown = sample(range(60), "test", wants=prompts("relations", 60), geometric=True)
    assert paint(shown, "test").images.shape == (60, 3, 64, 64) and (shown.count == 2).all()


def test_a_prompt_of_one_thing_names_its_class():
    assert {class_name(p) for p in prompts("one", 30)} <= set(models.CLASSES)
    for asked in (prompts("two", 1)[0], Prompt("a star", (Want(shape="star"),))):
        with pytest.raises(ValueError, match=f"one thing of one colour and shape, .*{asked.text}"):
            class_name(asked)


def test_contestants_are_held_against_each_other_prompt_by_prompt_and_go_on(tmp_path):
    asked, calls = prompts("two", 7), []

    def contestant(name, good):
        def paint_them(some, seeds):
            calls.append((name, seeds[0], len(some)))
            return torch.stack([torch.full((3, 64, 64), float(good(s))) for s in seeds])

        return paint_them

    both = {"plain": contestant("plain", lambda s: s % 2), "better": contestant("better", lambda s: 1)}
    keep = tmp_path / "kept.jsonl"
    found = _judged.judged(both, asked, "plain", Seer(), batch=3, keep=keep, key="a")
    assert [r["right"]["mean"] for r in found["rows"]] == [pytest.approx(3 / 7), 1.0]
    assert found["rows"][1]["against"]["right"]["mean"] == pytest.approx(4 / 7) and "against" not in found["rows"][0]
    assert found["rows"][0]["recognisable"]["mean"] == pytest.approx(3 / 7)
    assert [c[1:] for c in calls if c[0] == "plain"] == [(0, 3), (3, 3), (6, 1)]
    count = len(calls)
    assert _judged.judged(both, asked, "plain", Seer(), batch=3, keep=keep, key="a") == found and len(calls) == count
    _judged.judged(both, asked, "plain", Seer(), batch=3, keep=keep, key="b")
    assert len(calls) == 2 * count
    with pytest.raises(ValueError, match="baseline='best'"):
        _judged.judged(both, asked, "best", Seer())
    with pytest.raises(ValueError, match="one per prompt, 7, got 2"):
        draw(None, asked, [1, 2])
    assert _judged.grid(torch.rand(5, 3, 8, 8), 3).shape == (3, 18, 28)


def test_the_study_of_generators_tells_missed_bars(tmp_path, untrained_generators):
    fast = {name: {"num_inference_steps": 1, "guidance_scale": 2.0} for name in ("unet", "dit")}
    found = generators.measure(
        pictures=tmp_path,
        names=("unet", "dit"),
        kinds=("one", "held-out"),
        count=2,
        folder=untrained_generators,
        settings=fast,
    )
    json.dumps(found)
    assert "diffusion-generators" in suites() and (tmp_path / "diffusion-generators-cpu.png").exists()
    assert not found["bars"]["reconstruction"]["met"] and not found["bars"]["unet"]["held-out"]["met"]
    assert set(found["generators"]["unet"]) == {"one", "held-out"} and set(found["generators"]["dit"]) == {"one"}
    pipe = models.pipeline("unet", untrained_generators)
    asked = prompts("one", 3)
    together = draw(pipe, asked, [4, 5, 6], num_inference_steps=1, guidance_scale=2.0)
    torch.testing.assert_close(draw(pipe, asked[1:2], [5], num_inference_steps=1, guidance_scale=2.0), together[1:2],
                               rtol=0, atol=1e-5)  # fmt: skip
