"""The suite of effects: rates by hand, intervals that cover, and lines that run or say why not."""

import numpy as np
import pytest
import torch

from attnlib.bench.data import scenes
from attnlib.bench.data.scenes import Item, Question, Scene, make_scene
from attnlib.bench.studies.multimodal import (
    GROUPS,
    LINES,
    Line,
    Rates,
    Workbench,
    answer_after_picture,
    bootstrap,
    broken_items,
    measure,
    rates,
    retrieval_items,
    usual_items,
)

pytest.importorskip("sklearn")
hf = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny():
    """The trained model's shape, smaller and untrained."""
    torch.manual_seed(0)
    tokenizer = scenes.make_tokenizer()
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=scenes.SIDE,
            patch_size=scenes.PATCH,
        ),
        text_config=hf.LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=scenes.PATCHES,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config).eval(), tokenizer


def test_rates_of_answers_by_hand():
    scene = make_scene(0, "test", pairs="broken")
    absent = next(b for a, b in scenes.PAIRS if a in scene.names)
    listing = scenes.questions(scene, "list")[0]
    said = " , ".join([scene.names[0], absent, "digit circle"])
    found = rates(Item(scene, listing), said)
    assert found["named things that are not there"] == (1.0, 2.0)
    assert found["lists with something that is not there"] == (1.0, 1.0)
    assert found["lists with the absent second of a pair"] == (1.0, 1.0)
    assert found["things that are named"] == (1.0, float(len(scene.names)))
    assert "accuracy" not in found
    assert rates(Item(scene, listing), listing.answer)["named things that are not there"][0] == 0.0
    asked = Item(scene, scenes.presence(scene, absent))
    assert rates(asked, "yes")["says yes to what is absent"] == (1.0, 1.0)
    assert rates(asked, "no")["accuracy: presence"] == (1.0, 1.0)
    there = Item(scene, scenes.presence(scene, scene.names[0]))
    assert rates(there, "no")["says yes to what is there"] == (0.0, 1.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # Scenes are told apart by identity, not by content.
    items = [Item(Scene((), torch.zeros(0)), Question("count", "", "right")) for _ in range(60)]
    covered, rng = 0, np.random.default_rng(0)
    for _ in range(200):
        said = ["right" if rng.random() < 0.7 else "wrong" for _ in items]
        low, high = bootstrap(Rates(items, said), samples=300)["accuracy"]["interval"]
        covered += low <= 0.7 <= high
    assert 0.88 < covered / 200 < 0.99


def test_differences_are_paired():
    items = [Item(make_scene(n), Question("count", "", "right")) for n in range(40)]
    rng = np.random.default_rng(0)
    base = ["right" if rng.random() < 0.5 else "wrong" for _ in items]
    same = bootstrap(Rates(items, base), Rates(items, base))["accuracy"]
    assert same["difference"] == 0.0 and same["difference_interval"] == [0.0, 0.0]
    better = ["right" if i < 8 else said for i, said in enumerate(base)]
    entry = bootstrap(Rates(items, better), Rates(items, base))["accuracy"]
    expected = sum(a != b for a, b in zip(base, better, strict=True)) / 40
    assert entry["difference"] == pytest.approx(expected) and entry["difference_interval"][0] > 0


def test_scenes_with_several_questions_are_drawn_whole():
    """Twenty questions on each of five scenes, all right or all wrong, leave five observations, not a hundred."""
    drawn = [make_scene(n) for n in range(5)]
    items = [Item(s, Question("count", "", "right")) for s in drawn for _ in range(20)]
    said = ["right" if n < 40 else "wrong" for n in range(100)]
    low, high = bootstrap(Rates(items, said))["accuracy"]["interval"]
    assert low == 0.0 and high >= 0.8


def test_what_is_asked():
    for item in broken_items(30):
        if item.question.kind == "presence":
            assert (item.question.answer == "yes") == (item.question.about in item.scene.names)
    absent = [i for i in broken_items(30) if i.question.answer == "no"]
    assert len(absent) == 30 and all(i.question.about in {b for _, b in scenes.PAIRS} for i in absent)
    retrieved = retrieval_items(30)
    assert {i.question.kind for i in retrieved} == {"colour", "position", "content"}
    assert {i.question.answer.split()[0] for i in retrieved} == {"it"}
    assert {i.question.kind for i in usual_items(10)} == set(scenes.KINDS)


def test_reading_the_picture_first_changes_nothing_by_itself(tiny):
    items = retrieval_items(4)
    bench = Workbench(*tiny, calibration=[])
    assert answer_after_picture(bench, items) == scenes.answer(*tiny, items, max_new_tokens=8)


@pytest.mark.slow
def test_every_line_of_the_suite_has_a_target_that_exists_or_is_reported(tiny):
    lines = [*LINES, Line("nothing", "cache", "cache:NoSuchThing"), Line("none", "cache", "no_such_module:X")]
    short = [
        Line(line.technique, line.group, line.target, line.settings, line.over and (line.over[0], line.over[1][:1]),
             line.make)
        for line in lines
    ]  # fmt: skip
    result = measure(count=2, lines=short, model=tiny, null_image=torch.zeros(scenes.PATCHES, 32))
    seen = {(r["group"], r["technique"]) for r in result["records"]}
    missing = {(s["group"], s["technique"]): s["why"] for s in result["skipped"]}
    assert seen <= {(line.group, line.technique) for line in lines} | {(group, "untouched") for group in GROUPS}
    assert set(missing) == {("cache", "nothing"), ("cache", "none")}, missing
    assert {(line.group, line.technique) for line in lines} <= seen | set(missing)
    assert "NoSuchThing" in missing["cache", "nothing"] and "no_such_module" in missing["cache", "none"]
    for record in result["records"]:
        assert record["rates"] and all(set(e) >= {"value", "interval"} for e in record["rates"].values())


def test_a_ratio_of_zero_is_the_untouched_model(tiny):
    line = Line("snapkv", "cache", "cache:SnapKV", {"window_size": 4, "kernel_size": 3}, ("ratio", (0.0,)))
    records = [r for r in measure(count=3, lines=[line], model=tiny)["records"] if r["group"] == "cache"]
    assert [r["technique"] for r in records] == ["untouched", "snapkv"]
    assert records[1]["rates"]["accuracy"]["difference_interval"] == [0.0, 0.0]


def test_labels_of_variants():
    line = Line("t", "cache", "x:Y", {"a": 1}, ("ratio", (0.5, 0.25)))
    assert line.variants() == [("ratio=0.5", {"a": 1, "ratio": 0.5}), ("ratio=0.25", {"a": 1, "ratio": 0.25})]
    assert Line("t", "cache", "x:Y").variants() == [("", {})]
