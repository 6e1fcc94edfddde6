"""Patch Matters: boxes, filters and the order of merging equal the authors' on scripted models."""

import json
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from parity import HERE

from attnlib.look.speak import CallableSpeaker, Speaker
from attnlib.look.zoom import (
    BlipScorer,
    CaptionAggregator,
    Description,
    Detection,
    Groups,
    PatchDivider,
    Patches,
    PatchPrompts,
    main_things,
)
from attnlib.look.zoom.iris import box_iou
from attnlib.look.zoom.patch_matters import merge_overlapping, read_groups, reliable, share_inside
from look.speakers import FAMILIES

RECORDED = json.loads((HERE / "patch-matters.json").read_text())
HEIGHT, WIDTH = RECORDED["size"]
PICTURE = np.random.default_rng(0).integers(1, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)


@pytest.mark.parametrize("run", RECORDED["divides"], ids=lambda run: str(len(run["boxes"])))
def test_patches_equal_the_authors(run):
    assert merge_overlapping(run["boxes"]) == sorted(tuple(box) for box in run["merged"])
    patches = PatchDivider(lambda picture: [(box, 0.9, "thing") for box in run["boxes"]])(PICTURE)
    assert [list(map(float, box)) for box in patches.four] == run["four"]


def _score(picture, text):
    size = f"{picture.shape[1]}x{picture.shape[0]}"
    return (zlib.crc32(f"{text}|{size}".encode()) % 1000) / 1000 - 0.2


def _groups(recorded):
    return Groups(
        recorded["same"],
        [[(text, n) for text, n in group] for group in recorded["contradictory"]],
        [(text, n) for text, n in recorded["unique"]],
    )


@pytest.mark.parametrize("run", RECORDED["aggregations"], ids=lambda run: run["name"])
def test_filters_and_merges_equal_the_authors(run):
    waiting = [_groups(g) for g in (*run["groups"], *run["pair_groups"])]
    patches = Patches(tuple(map(tuple, run["four"])), (0, 0, WIDTH, HEIGHT), (HEIGHT, WIDTH))
    speaker = CallableSpeaker(lambda pictures, text: "said", cache=0)
    aggregator = CaptionAggregator(
        speaker, scorer=_score, divider=PatchDivider(lambda picture: []), group=lambda said: waiting.pop(0),
        compat="authors",
    )  # fmt: skip
    found = aggregator.describe(PICTURE, patches)
    assert [found.reliable[f"patch {i}"] for i in range(4)] == run["reliable"]
    assert [facts for name, facts in found.reliable.items() if " and " in name] == run["pairs"]
    assert [list(box) for box in found.boxes] == run["final"] and not waiting
    ours = CaptionAggregator(
        speaker, scorer=_score, divider=PatchDivider(lambda picture: []), group=lambda said: Groups()
    ).describe(PICTURE, patches)
    covered = {box for box in run["four"] and map(tuple, run["four"])}
    assert all(any(box_iou(p, b) > 0 for b in ours.boxes) for p in covered)
    if run["name"] == "three":  # the patch that theirs leaves out
        assert (50, 40, 100, 80) in ours.boxes and (50, 40, 100, 80) not in found.boxes


def test_every_patch_contains_its_quadrant_and_whole_objects():
    boxes = [(30, 10, 70, 30), (5, 50, 20, 70), (60, 30, 90, 75)]
    patches = PatchDivider(lambda picture: [Detection(box, 0.8) for box in boxes], overlap=0.3)(PICTURE)
    quadrants = [(0, 0, 50, 40), (50, 0, 100, 40), (0, 40, 50, 80), (50, 40, 100, 80)]
    cover = np.zeros((HEIGHT, WIDTH), bool)
    for patch, quadrant in zip(patches.four, quadrants, strict=True):
        assert share_inside(quadrant, patch) == 1
        cover[patch[1] : patch[3], patch[0] : patch[2]] = True
        for box in boxes:
            if share_inside(box, quadrant) > 0.3:
                assert share_inside(box, patch) == 1
    assert cover.all() and patches.main == (0, 0, WIDTH, HEIGHT)
    assert share_inside(boxes[0], patches.four[0]) == share_inside(boxes[0], patches.four[1]) == 1


def test_unsure_detections():
    low = [((0, 0, 10, 10), 0.1, "a"), ((40, 0, 60, 10), 0.3, "b"), ((0, 40, 60, 60), 0.2, "c")]
    used = PatchDivider(lambda picture: low)(PICTURE)  # the two best
    assert used.four[0] == (0, 0, 60, 40) and used.four[2] == (0, 40, 60, 80)  # b and c
    assert PatchDivider(lambda picture: low[:1])(PICTURE).four[0] == (0, 0, 50, 40)
    assert PatchDivider(lambda picture: [])(PICTURE).four == (
        (0, 0, 50, 40),
        (50, 0, 100, 40),
        (0, 40, 50, 80),
        (50, 40, 100, 80),
    )
    relative = PatchDivider(lambda picture: [((0.3, 0.1, 0.7, 0.3), 0.9, "x")], units="relative")(PICTURE)
    assert relative.four[0] == (0, 0, 70, 40)


def test_the_main_box():
    detections = [((0, 0, 10, 10), 0.9, "dog"), ((20, 20, 40, 30), 0.9, "cat"), ((60, 60, 90, 75), 0.9, "car")]
    divider = PatchDivider(lambda picture: detections, lambda picture, names: ["dog", "cat", "unicorn"])
    assert divider(PICTURE).main == (0, 0, 40, 30)
    assert PatchDivider(lambda picture: detections, lambda picture, names: [])(PICTURE).main == (0, 0, WIDTH, HEIGHT)
    chosen = main_things(lambda pictures, text: "a cat", lambda pictures, text: '{"object_list": ["cat", "sea"]}')
    assert chosen(PICTURE, ["dog", "cat"]) == ["cat"]
    assert main_things(lambda pictures, text: "a cat", lambda pictures, text: "?")(PICTURE, ["dog"]) == []
    assert box_iou((0, 0, 4, 4), (2, 2, 6, 6)) == pytest.approx(4 / 28)


def test_the_filter():
    scores = {"a": 0.3, "b": 0.31, "c": 0.9, "d": 0.5, "e": 0.2}
    groups = Groups(["kept"], [[("c", 1), ("d", 2)], [("a", 1), ("e", 3)]], [("a", 1), ("b", 2)])
    assert reliable(groups, scores.__getitem__) == ["kept", "c", "b"]
    assert reliable(Groups(), scores.__getitem__) == []
    assert reliable(groups, scores.__getitem__, lambda text, n: float(n == 1)) == ["kept", "c", "a"]


def test_groups_are_read_from_json():
    found = read_groups('ok ```json\n{"same": ["x"], "contradictory": [[["a", 1], ["b", 2]]]}\n```', 2)
    assert found == Groups(["x"], [[("a", 1), ("b", 2)]], [])
    assert read_groups("{}", 3) == Groups()
    for text, message in [
        ("no", "must be JSON"),
        ("{'same': []}", "must be JSON"),
        ('{"same": "x"}', "must be JSON"),
        ('{"same": [1]}', "must be JSON"),
        ('{"unique": [["a", 9]]}', "descriptions 1..3, got 9"),
        ('{"unique": [["a"]]}', "a statement"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_groups(text, 3)


def _describer(log):
    """A captioner that invents something in one of three samples, and a scorer that sees through it."""

    def ask(pictures, text, sample=0, temperature=0.0):
        log.append(("caption", pictures[0].shape[:2], sample, temperature))
        return ["a dog", "a dog with a red ball", "a dog beside a unicorn"][sample]

    return CallableSpeaker(ask)


def _group(said):
    """Statements by rule: what stands in all, and the rest once."""
    parts = [text.split(" with ")[0].split(" beside ")[0] for text in said]
    unique = [(word, n) for n, text in enumerate(said, 1) for word in ("a red ball", "a unicorn") if word in text]
    return Groups([parts[0]] if len(set(parts)) == 1 else [], [], unique)


def test_invented_things_go_and_seen_details_stay():
    log, written = [], []

    def llm(pictures, text):
        written.append(text)
        return "a dog with a red ball"

    def scorer(picture, text):
        return 0.9 if "ball" in text else 0.1

    def aggregator(divider, **settings):
        return CaptionAggregator(
            _describer(log), CallableSpeaker(llm, cache=0), scorer, divider, group=_group, **settings
        )  # fmt: skip

    found = aggregator(PatchDivider(lambda picture: [])).describe(PICTURE)
    assert all(facts == ["a dog", "a red ball"] for facts in found.reliable.values())
    assert isinstance(found, Description) and found == "a dog with a red ball"
    assert Counter(sample for _, _, sample, _ in log) == {0: 5, 1: 4, 2: 4} and len(log) == 1 + 4 * 3
    assert {t for _, _, _, t in log} == {0.2, 0.7} and len(written) == 4 + 1
    assert found.calls["ask"] == 13 + 5

    log.clear(), written.clear()
    main = PatchDivider(lambda picture: [((10, 10, 40, 30), 0.9, "dog")], lambda picture, names: names)
    found = aggregator(main).describe(PICTURE)
    assert len(log) == 1 + 5 * 3 and len(written) == 5 + 1 + 1 and "main" in found.reliable
    assert "(0.000, 0.000, 0.500, 0.500): a dog with a red ball" in written[-1]


def test_the_language_model_is_asked_for_groups():
    asked = []

    def llm(pictures, text):
        asked.append(text)
        return '{"same": ["a dog"]}' if "Sort every statement" in text else "merged"

    aggregator = CaptionAggregator(_describer([]), llm, lambda p, t: 0.0, PatchDivider(lambda picture: []))
    found = aggregator.describe(PICTURE)
    assert found.reliable["patch 0"] == ["a dog"] and found.unread == 0
    assert any("Facts: a dog" in text and "Description 3: a dog beside a unicorn" in text for text in asked)
    unread = CaptionAggregator(_describer([]), lambda p, t: "hm", lambda p, t: 0.0, PatchDivider(lambda picture: []))
    assert unread.describe(PICTURE).unread == 4
    with pytest.raises(ValueError, match="must be JSON"):
        CaptionAggregator(
            _describer([]), lambda p, t: "hm", lambda p, t: 0.0, PatchDivider(lambda picture: []), unread="refuse"
        ).describe(PICTURE)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_runs_on_tiny_models_and_is_reproducible(family):
    parts = FAMILIES[family]()
    state = torch.get_rng_state()
    found = []
    for _ in range(2):
        speaker = Speaker(*parts, max_new_tokens=3)
        aggregator = CaptionAggregator(
            speaker, scorer=lambda p, t: 0.5, divider=PatchDivider(lambda picture: []), samples=2,
            group=lambda said: Groups(unique=[(said[0], 1)]),
        )  # fmt: skip
        found.append(aggregator.describe(PICTURE))
    assert found[0] == found[1] and found[0].reliable == found[1].reliable
    assert torch.equal(torch.get_rng_state(), state)


def test_blip_scores():
    import transformers as hf

    from look.speakers import tokenizer

    torch.manual_seed(0)
    words = tokenizer()
    text = dict(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        encoder_hidden_size=16, projection_dim=8,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = hf.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    model = hf.BlipForImageTextRetrieval(config).eval()

    def processor(images, text, return_tensors):
        pixels = torch.tensor(np.asarray(images.resize((16, 16)))).permute(2, 0, 1)[None] / 255
        return {"pixel_values": pixels, **words(text, return_tensors="pt", return_token_type_ids=False)}

    value = BlipScorer(model, processor)(PICTURE, "red circle")
    from PIL import Image

    inputs = processor(Image.fromarray(PICTURE), "red circle", "pt")
    with torch.no_grad():
        match = model(**inputs).itm_score.softmax(-1)[0, 1]
        cosine = model(**inputs, use_itm_head=False).itm_score[0, 0]
    assert value == pytest.approx(float(match + cosine) / 2, abs=1e-6)
    with pytest.raises(TypeError, match="BlipForImageTextRetrieval"):
        BlipScorer(torch.nn.Linear(1, 1), processor)


def test_bad_input_is_told_by_name():
    def divide(*boxes, **settings):
        return PatchDivider(lambda picture: [(box, 0.9, "x") for box in boxes], **settings)(PICTURE)

    divider, speaker = PatchDivider(lambda picture: []), CallableSpeaker(lambda p, t: "a")
    for call, error, message in [
        (lambda: divider(PICTURE[:1, :1]), ValueError, "at least 2 × 2"),
        (lambda: divide((5, 5, 5, 9)), ValueError, "x1 < x2"),
        (lambda: divide((0.1, 0.1, 0.5, 0.5)), ValueError, "looks relative"),
        (lambda: divide((1, 1, 5, 5), units="relative"), ValueError, r"within \[0, 1\]"),
        (lambda: PatchDivider(3), TypeError, "detector must be"),
        (lambda: PatchDivider(lambda p: [], units="cells"), ValueError, "units"),
        (lambda: CaptionAggregator(speaker, divider=divider), ValueError, "scorer must be given"),
        (lambda: CaptionAggregator(speaker, scorer=_score), ValueError, "divider must be given"),
        (lambda: CaptionAggregator(3, scorer=_score, divider=divider), TypeError, "captioner must be"),
        (lambda: CaptionAggregator(speaker, scorer=_score, divider=divider, samples=0), ValueError, "samples"),
        (
            lambda: CaptionAggregator(speaker, scorer=_score, divider=divider).describe(PICTURE[:40], divider(PICTURE)),
            ValueError,
            r"size \(80, 100\), but image has \(40, 100\)",
        ),
        (lambda: PatchPrompts(merge="x"), ValueError, "merge must have a place"),
    ]:
        with pytest.raises(error, match=message):
            call()
