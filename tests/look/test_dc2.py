"""DC²: the recursion equals the authors' on scripted models; what it must do by its paper; HR-Bench's scores."""

import json

import numpy as np
import pytest
import torch
from parity import HERE

from attnlib.bench.evaluate import Item, evaluate
from attnlib.bench.hr_bench import cyclic, hr_bench
from attnlib.bench.judge import read_option
from attnlib.look.speak import CallableSpeaker, Speaker
from attnlib.look.zoom import DC2, DC2Prompts, VisualMemory, sentence_embedder
from attnlib.look.zoom.dc2 import cluster, largest, read_objects, retrieve
from look.speakers import FAMILIES

RECORDED = json.loads((HERE / "dc2-hr-bench.json").read_text())
NAMES = ["dog", "bench", "car", "tree"]


def _picture(height, width):
    y, x, c = np.mgrid[:height, :width, :3]
    return ((y // 9 * 37 + x // 11 * 59 * (c + 1) + (y * x) % 7 * 3) % 256).astype(np.uint8)


def _value(picture):
    return int(np.asarray(picture).astype(np.float64).mean() * 64)


def _objects(caption):
    return [name for i, name in enumerate(NAMES) if int(caption) >> i & 1]


def _features(picture):
    pixels = picture.astype(np.float64)
    return np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1)) + 1])


def _scripted():
    return CallableSpeaker(lambda pictures, text: str(_value(pictures[0])), features=_features, cache=0)


@pytest.mark.parametrize("run", RECORDED["runs"], ids=lambda run: f"{run['size']}-{run['theta']}")
def test_the_recursion_equals_the_authors(run):
    speaker = _scripted()
    dc2 = DC2(
        speaker, leaf=run["leaf"], max_depth=run["depth"], theta=run["theta"], objects=_objects, compat="authors"
    )  # fmt: skip
    memory = VisualMemory()
    picture = _picture(*run["size"])
    caption, _ = dc2._look(picture, ((0, 0),), 0, memory)
    assert caption == run["caption"] and speaker.calls["ask"] == run["calls"]

    def region(boxes):
        return sorted((x, y, x + w, y + h) for x, y, h, w in boxes)

    for name in NAMES:
        theirs = [region(boxes) for boxes in run["objects"].get(name, [])]
        ours = [sorted(boxes) for boxes in memory.objects.get(name, [])]
        if run["depth"] <= 1:  # theirs keeps what several parts name once per part, several times over
            theirs, ours = [[list(map(list, {tuple(map(tuple, r)) for r in x}))] for x in (theirs, ours)]
            assert sorted(map(str, *theirs)) == sorted(map(str, *ours))
        else:
            assert ours == theirs


def test_clusters_search_and_filter_equal_the_authors():
    for rows, theta, labels in RECORDED["clusters"]:
        groups = cluster(torch.tensor(rows, dtype=torch.float64), theta)
        assert [{labels[i] for i in group} for group in groups] == [{labels[group[0]]} for group in groups]
        assert len(groups) == len(set(labels))
    for question, objects, found in RECORDED["search"]:
        assert retrieve(torch.tensor(question), torch.tensor(objects), 0.3, 2) == found
    for boxes, kept in RECORDED["filter"]:
        as_regions = [((x, y, x + w, y + h),) for x, y, h, w in boxes]
        assert largest(as_regions) == [((x, y, x + w, y + h),) for x, y, h, w in kept]


def test_leaves_cover_the_picture_also_after_merges_and_at_odd_sizes():
    for size, theta in (((67, 93), 0.0), ((67, 93), 0.0005), ((64, 64), 2.0), ((61, 45), 0.002)):
        seen = np.zeros(size, bool)
        dc2 = DC2(_scripted(), leaf=7, max_depth=3, theta=theta, objects=lambda caption: ["thing"])
        inner, leaves = dc2._look, []

        def look(picture, corners, depth, memory, inner=inner, leaves=leaves, dc2=dc2):
            if dc2._is_leaf(picture, depth):
                leaves.append((picture.shape[:2], corners))
            return inner(picture, corners, depth, memory)

        dc2._look = look
        dc2.observe(_picture(*size))
        for (height, width), corners in leaves:
            for x, y in corners:
                assert 0 <= x <= size[1] - width and 0 <= y <= size[0] - height
                seen[y : y + height, x : x + width] = True
        assert seen.all()


def test_theta_at_its_ends():
    rows = torch.tensor([[1.0, 0.0], [1.0, 1e-3], [1.0, 0.0], [-1.0, 0.0]])
    assert cluster(rows, 0.0) == [[0, 2], [1], [3]]
    assert cluster(rows, 2.0) == [[0, 1, 2, 3]]
    assert cluster(torch.zeros(3, 2), 0.0) == [[0, 1, 2]]


def test_a_constant_picture_takes_depth_and_one_captions():
    speaker = _scripted()
    picture = np.full((64, 64, 3), 90, np.uint8)
    for depth in (1, 2, 3):
        memory = DC2(speaker, leaf=4, max_depth=depth, objects=lambda caption: []).observe(picture)
        assert memory.calls["ask"] == depth + 1
    black = DC2(speaker, leaf=4, objects=lambda caption: ["dog"]).observe(np.zeros((64, 64, 3), np.uint8))
    assert black.calls["ask"] == 0 and black.objects == {} and black.caption == ""


@pytest.mark.parametrize("depth", [1, 2])
def test_what_only_the_whole_names_is_not_remembered(depth):
    def ask(pictures, text):
        seen = "dog" if (pictures[0] == 255).any() else "grass"
        return f"{seen} unicorn" if pictures[0].shape[0] == 32 else seen

    picture = _picture(32, 32) // 2
    picture[20:24, 4:8] = 255
    dc2 = DC2(CallableSpeaker(ask, features=_features), leaf=8, max_depth=depth, theta=0.0, objects=str.split)
    memory = dc2.observe(picture)
    assert "unicorn" not in memory.objects
    assert memory.objects["dog"] == [((0, 16, 16, 32),) if depth > 1 else ((0, 0, 32, 32),)]
    theirs = DC2(dc2.speaker, leaf=8, max_depth=1, theta=0.0, objects=str.split, compat="authors").observe(picture)
    assert theirs.objects["unicorn"] == [((0, 0, 32, 32),)]


def test_parts_of_merged_quarters_keep_all_their_places():
    half = _picture(16, 32)
    picture = np.concatenate([half, half])  # upper and lower half are the same
    dc2 = DC2(_scripted(), leaf=4, max_depth=2, theta=0.0, objects=lambda caption: ["stripe"])
    assert dc2.observe(picture).objects["stripe"] == [((0, 0, 32, 32),)]  # the whole: parts within it are let go
    dc2._look(picture, ((0, 0),), 0, memory := VisualMemory())
    assert ((0, 0, 16, 16), (0, 16, 16, 32)) in memory.objects["stripe"]


def _embed(text):
    return torch.tensor([float(word in text) for word in (*NAMES, "grass")]) + 1e-3


def _seeing(asked):
    def ask(pictures, text):
        asked.append((pictures[0].shape, text))
        if text.startswith("Question:"):
            return "NONE." if not (pictures[0] == 255).any() else "a white dog"
        if text.startswith("A closer look"):
            return "white"
        return "dog" if (pictures[0] == 255).any() else "grass"

    return CallableSpeaker(ask, features=_features)


def test_it_answers_with_what_it_found():
    picture = _picture(32, 32) // 2
    picture[20:24, 4:8] = 255
    asked = []
    dc2 = DC2(_seeing(asked), _embed, leaf=8, max_depth=2, theta=0.0, objects=str.split)
    found = dc2.answer(picture, "what colour is the dog")
    assert found == "white" and found.cues == ("dog",) and found.boxes == ((0, 16, 16, 32),)
    assert "a white dog" in asked[-1][1] and "what colour is the dog" in asked[-1][1]
    memory = dc2.observe(picture)
    again = dc2.answer(picture, "where is the dog", memory)
    assert again.calls["ask"] == 2
    nothing = dc2.answer(picture, "where is the tree", memory)
    assert nothing.cues == () and asked[-1][1] == "where is the tree"
    plain = DC2(dc2.speaker, _embed, leaf=8, alpha=1.01, theta=0.0, objects=str.split)
    assert plain.answer(picture, "what colour is the dog").cues == ()


def test_every_picture_has_its_own_memory():
    picture, other = _picture(32, 32) // 2, _picture(32, 32) // 3
    picture[20:24, 4:8] = 255
    dc2 = DC2(_seeing([]), _embed, leaf=8, max_depth=2, theta=0.0, objects=str.split)
    assert dc2.answer(picture, "what colour is the dog").cues == ("dog",)
    assert dc2.answer(other, "what colour is the dog").cues == ()


def test_objects_are_read_from_json_and_never_run():
    assert read_objects('```json\n{"object_list": ["a", "b", "a"]}\n```') == ["a", "b"]
    assert read_objects("[]") == [] and read_objects('so: ["cat"] .') == ["cat"]
    for text in (
        "{'object_list': ['a']}",
        "__import__('os')",
        "dog, cat",
        '{"object_list": 3}',
        '{"object_list": [1]}',
    ):
        with pytest.raises(ValueError, match="must hold JSON"):
            read_objects(text)
    speaker = CallableSpeaker(lambda pictures, text: "no json", features=_features)
    memory = DC2(speaker, leaf=8, max_depth=1).observe(_picture(32, 32))
    assert memory.unread > 0 and memory.objects == {}
    with pytest.raises(ValueError, match="must hold JSON"):
        DC2(speaker, leaf=8, max_depth=1, unread="refuse").observe(_picture(32, 32))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_runs_on_tiny_models(family):
    speaker = Speaker(*FAMILIES[family](), max_new_tokens=4, generation={"num_beams": 2})
    picture = _picture(40, 56)
    dc2 = DC2(speaker, _embed, leaf=16, max_depth=1, theta=0.01, objects=lambda caption: caption.split())
    found = dc2.answer(picture, "what is it")
    assert found.calls["ask"] >= 2
    plain = speaker.ask(picture, "what is it")
    assert DC2(speaker, _embed, leaf=16, max_depth=0).answer(picture, "what is it") == plain
    assert DC2(speaker, _embed, leaf=90, small="root").answer(picture, "what is it") == plain
    assert DC2(speaker, _embed, leaf=16, max_depth=1, alpha=1.5).answer(picture, "what is it") == plain


def test_sentences_are_embedded_by_the_mean_of_their_tokens():
    import transformers as hf

    from look.speakers import tokenizer

    torch.manual_seed(0)
    words = tokenizer()
    model = hf.BertModel(
        hf.BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).eval()
    found = sentence_embedder(model, words)("red circle")
    ids = words("red circle", return_tensors="pt")["input_ids"]
    assert torch.allclose(found, model(ids)[0][0].mean(0), atol=1e-5)


def test_bad_input_is_told_by_name():
    picture = _picture(32, 32)
    dc2 = DC2(_scripted(), leaf=8, max_depth=2, objects=_objects)
    for call, error, message in [
        (lambda: dc2.observe(picture[:1, :1]), ValueError, "more than one pixel"),
        (lambda: dc2.observe(picture[:6, :6]), ValueError, "6 × 6 pixels is smaller than a leaf of 8"),
        (lambda: dc2.answer(picture, "what"), ValueError, "embed must be given"),
        (lambda: dc2.answer(picture, " "), ValueError, "must hold a prompt"),
        (lambda: dc2.answer(picture, "a", VisualMemory()), ValueError, r"size \(0, 0\), but image"),
        (lambda: DC2(_scripted(), 3), TypeError, "embed must be a function"),
        (lambda: DC2(_scripted(), leaf=0), ValueError, "leaf"),
        (lambda: DC2(_scripted(), theta=-1), ValueError, "theta"),
        (lambda: DC2(_scripted(), compat="paper"), ValueError, "compat"),
        (lambda: DC2(3), TypeError, "speaker must be"),
        (lambda: DC2(_scripted(), prompts=DC2Prompts(refine="x")), ValueError, "refine must have a place {captions}"),
        (lambda: DC2(_scripted(), objects=lambda c: "dog", leaf=8).observe(picture), TypeError, "list of names"),
        (lambda: cluster(torch.zeros(3), 0.1), ValueError, "features must be"),
    ]:
        with pytest.raises(error, match=message):
            call()


# ---------------------------------------------------------------------------------------------------------------------


def test_hr_bench_turns_options_and_scores_by_task():
    items = [
        Item(f"q{i}", "Which?", "red", {"task": task}, ("red", "blue", "green", "grey"))
        for i, task in enumerate(("FSP", "FCP"))
    ]
    turns = [turn for item in items for turn in cyclic(item)]
    assert len(turns) == 8 and len({turn.id for turn in turns}) == 8
    assert [turn.options.index("red") for turn in turns[:4]] == [0, 3, 2, 1]
    assert "(A) blue" in turns[1].prompt
    always_a = hr_bench(evaluate(turns, lambda prompts: ["A"] * len(prompts), read_option))
    assert always_a.all.share == 0.25 and always_a.every == 0 and always_a.all.above == 0
    knows = {t.id: "ABCD"[t.options.index("red")] if t.groups["task"] == "FSP" else "hm" for t in turns}
    scored = hr_bench(evaluate(turns, knows, read_option))
    assert scored.tasks["FSP"].share == 1 and scored.tasks["FCP"].share == 0 and scored.every == 0.5
    assert scored.tasks["FCP"].unreadable == 1 and scored.all.share == 0.5
    for bad, message in [
        (Item("q", "?", "pink", {}, ("red", "blue")), "an answer among"),
        (Item("q", "?", "red", {}, ("red", "red")), "two different options"),
        (Item("q", "?", "red", {"task": "XXX"}, ("red", "blue")), "task of"),
    ]:
        with pytest.raises(ValueError, match=message):
            cyclic(bad)
    with pytest.raises(ValueError, match="ask must hold {question} and {options}"):
        cyclic(items[0], "Which?")
    with pytest.raises(ValueError, match="seed must be"):
        hr_bench(evaluate(turns, knows, read_option), seed=-1)
    with pytest.raises(ValueError, match="must have the score 'right'"):
        hr_bench(evaluate(turns, knows, read_option, score=lambda value, item: {"exact": 1.0}))
