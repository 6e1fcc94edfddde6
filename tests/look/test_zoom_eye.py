"""ZoomEye: trees, searches and views equal the authors'; the whole runs on tiny models of two families."""

import copy
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from parity import HERE

from attnlib.look.speak import CallableSpeaker, Speaker
from attnlib.look.zoom import (
    Answer,
    Tree,
    Views,
    ZoomEye,
    ZoomPrompts,
    best_first,
    confidence,
    crop,
    depth_weight,
    divide,
    merged,
    post_order,
    read_cues,
)
from look.speakers import FAMILIES

QUESTION = "what color is the circle ?"


@pytest.fixture(scope="module")
def fixture():
    from safetensors import safe_open

    with safe_open(HERE / "zoom-eye.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118


def _corners(box):
    x, y, w, h = box
    return (x, y, x + w, y + h)


def test_trees_equal_the_authors(fixture):
    tensors, _ = fixture
    seen = 0
    for name, rows in tensors.items():
        if not name.startswith("tree."):
            continue
        height, width, leaf, split = map(int, name.split(".")[1:])
        tree = Tree((height, width), leaf, split=split)
        assert [(*node.box, node.depth) for node in tree.nodes] == [(*_corners(r[:4]), r[4]) for r in rows.tolist()]
        assert tree.depth == int(rows[:, 4].max())
        seen += 1
    assert seen == 5


@pytest.mark.parametrize("split", [4, 9, 16])
@pytest.mark.parametrize("size,leaf", [((64, 64), 20), ((37, 211), 16), ((7, 3), 2), ((1, 50), 4), ((50, 2), 3)])
def test_leaves_tile_the_picture(size, leaf, split):
    tree = Tree(size, leaf, split=split)
    cover = np.zeros(size, int)
    for node in tree.leaves:
        x1, y1, x2, y2 = node.box
        assert max(x2 - x1, y2 - y1) < leaf
        cover[y1:y2, x1:x2] += 1
    assert (cover == 1).all()
    for node in tree.nodes:
        assert node.is_leaf or sum(
            (c.box[2] - c.box[0]) * (c.box[3] - c.box[1]) for c in node.children
        ) == (node.box[2] - node.box[0]) * (node.box[3] - node.box[1])  # fmt: skip


def _scores(seed):
    """The numbers that the recorded searches were told."""

    def score(box, kind):
        x1, y1, x2, y2 = box
        key = repr((((x1, y1, x2 - x1, y2 - y1), kind), seed)).encode()
        return round(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32 * 2 - 1, 6)

    return score


def test_searches_equal_the_authors(fixture):
    for trace in json.loads(fixture[1]["traces"]):
        tree, score, asked = Tree((97, 203), 40), _scores(trace["seed"]), []

        def answering(node, score=score, asked=asked):
            asked.append(node.box)
            return score(node.box, "answering")

        def priority(node, score=score, tree=tree, bias=trace["bias"]):
            w = depth_weight(node.depth, tree.depth, bias)
            return score(node.box, "existence") * w + score(node.box, "latent") * (1 - w)

        found = best_first(
            tree, answering, priority, upper=trace["upper"], lower=trace["lower"], steps=trace["steps"],
            to_bottom=trace["to_bottom"], skip_root=trace["skip_root"],
        )  # fmt: skip
        assert asked == [_corners(b) for b in trace["asked"]]
        assert [n.box for n in found.found] == [_corners(b) for b in trace["found"]]
        assert [found.pops, found.zoomed_in, found.zoomed_out] == [
            trace[k] for k in ("pops", "zoomed_in", "zoomed_out")
        ]
        everywhere = post_order(tree, lambda n, score=score: score(n.box, "existence"), 0.3)
        assert [n.box for n in everywhere] == [_corners(b) for b in trace["all"]]


def _drawn():
    y, x, c = np.mgrid[:150, :241, :3]
    return ((y * 7 + x * 3 + c * 40 + (y // 10 * x // 10) % 17 * 9) % 256).astype(np.uint8)


def test_views_equal_the_authors(fixture):
    tensors, meta = fixture
    picture, background = _drawn(), (0.481, 0.457, 0.408)
    kinds = {
        "global": Views(24, background=background), "own": Views(24, canvas="own", background=background),
        "local": Views(24, "local", None, background=background),
        "apart": Views(25, "local", None, background=background, apart=60),
    }  # fmt: skip
    digests, seen = json.loads(meta["digests"]), 0
    for name, boxes in json.loads(meta["boxes"]).items():
        for kind, views in kinds.items():
            for i, view in enumerate(views(picture, [_corners(b) for b in boxes])):
                shape, digest = digests[f"{kind}.{name}.{i}"]
                assert list(view.shape) == shape
                same = hashlib.blake2b(np.ascontiguousarray(view).data, digest_size=8).hexdigest() == digest
                if not same:  # what was resized differs by rounding
                    theirs = tensors[f"view.{kind}.{name}.{i}"].int()
                    assert (theirs - torch.from_numpy(view.copy()).int()).abs().max() <= 1, (kind, name, i)
                seen += 1
    assert seen == len(digests)
    whole = torch.from_numpy(kinds["local"].whole(picture)[0].copy())
    assert (whole.int() - tensors["view.whole"].int()).abs().max() <= 1


def test_crops_map_back():
    picture = _drawn()
    found = crop(picture, (20, 30, 60, 50), (80, 80))
    assert found.image.shape == (80, 80, 3)
    boxes = torch.tensor([[0.0, 0.0, 80.0, 80.0], [8.0, 4.0, 16.0, 12.0]])
    assert found.to_picture(boxes)[0].tolist() == [20, 30, 60, 50]
    assert torch.allclose(found.from_picture(found.to_picture(boxes)), boxes.double())
    assert found.to_picture([[40.0, 40.0]]).tolist() == [[40.0, 40.0]]


def test_confidence_and_weights():
    assert confidence(2.0, 0.5) == -confidence(0.5, 2.0)
    both = torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert abs(confidence(2.0, 0.5) - (2 * both.softmax(0)[0].item() - 1)) < 1e-12
    assert depth_weight(0, 4, 0.6) == 0.6 and depth_weight(4, 4, 0.6) == 1.0 and depth_weight(0, 0, 0.2) == 0.2


@pytest.mark.parametrize("target", [(8, 8, 16, 16), (150, 40, 160, 50), (250, 250, 255, 255), (100, 200, 110, 212)])
def test_an_oracle_finds_the_thing_within_three_pops_a_level(target):
    tree = Tree((256, 256), 32)

    def inside(node):
        x1, y1, x2, y2 = (f(a, b) for f, a, b in zip((max, max, min, min), node.box, target, strict=True))
        return max(x2 - x1, 0) * max(y2 - y1, 0) / ((target[2] - target[0]) * (target[3] - target[1]))

    def answering(node):
        area = (node.box[2] - node.box[0]) * (node.box[3] - node.box[1])
        return 1.0 if inside(node) == 1 and area <= 64 * 64 else -1.0

    found = best_first(tree, answering, lambda n: 2 * inside(n) - 1, upper=0.6, lower=0.0)
    assert found.pops <= 3 * tree.depth and inside(found.found[0]) == 1


def test_bars_at_the_ends():
    tree = Tree((256, 256), 32)
    assert best_first(tree, lambda n: -1.0, lambda n: 0.0, upper=-1, lower=-1).found == [tree.root]
    given_up = best_first(tree, lambda n: -1.0, lambda n: 0.0, upper=0.6, lower=0.55)
    assert given_up.found == [] and given_up.pops == 3 * tree.depth


# ---------------------------------------------------------------------------------------------------------------------


def _oracle(target, answer="red", leaf=24):
    """A speaker that is sure of what it sees: a picture is told by its marked or cut-out pixels."""

    def shows(picture):
        return bool((picture.reshape(-1, 3) == [255, 0, 255]).all(-1).any())

    def logits(pictures, text, words):
        seen = shows(pictures[-1])
        small = pictures[-1].shape[0] <= 80
        if text.endswith("enough to answer the question? Answer Yes or No."):
            return [4.0, 0.0] if seen and small else [0.0, 4.0]
        return [3.0 if small else 2.0, 0.0] if seen else [0.0, 3.0]

    def ask(pictures, text):
        return answer if len(pictures) > 1 and shows(pictures[-1]) else "nothing"

    return CallableSpeaker(
        ask, logits=logits, input_size=leaf, family="llava_next", score=lambda p, text, a: len(a) * (len(p) > 1)
    )


def _with_thing(box=(200, 100, 206, 106)):
    picture = np.full((160, 256, 3), 90, np.uint8)
    picture[box[1] : box[3], box[0] : box[2]] = [255, 0, 255]
    return picture


def test_it_finds_a_thing_and_answers_with_it_in_view():
    eye = ZoomEye(_oracle(None), cues=lambda question: ["circle"])
    found = eye.answer(_with_thing(), QUESTION)
    assert found == "red" and isinstance(found, str)
    (box,) = found.boxes
    assert box[0] <= 200 < 206 <= box[2] and box[1] <= 100 < 106 <= box[3]
    assert found.cues == ("circle",) and found.searches[0].pops <= 3 * Tree((160, 256), 24).depth
    assert found.calls["ask"] == 1 and found.calls["logits"] > found.searches[0].pops
    assert len(found.views) == 2
    again = eye.answer(_with_thing(), QUESTION)
    assert again == found and not again.calls  # boxes that were looked at are remembered
    choice = eye.answer(_with_thing(), QUESTION, options=["green", "red"])
    assert choice == "red" and choice.choice == 1
    assert pickle.loads(pickle.dumps(found)).boxes == found.boxes and copy.deepcopy(found).calls == found.calls


def test_several_things_and_all_things():
    picture = _with_thing()
    picture[20:26, 20:26] = [255, 0, 255]
    found = ZoomEye(_oracle(None), cues=lambda question: ["all circles"]).answer(picture, "how many")
    assert len(found.boxes) >= 2 and found.searches == ()
    asked = []
    speaker = _oracle(None)
    speaker.functions["logits"], inner = (
        (lambda p, t, w: asked.append(t) or inner(p, t, w)),
        speaker.functions["logits"],
    )
    found = ZoomEye(speaker, cues=lambda question: ["red circle", "his bag", "square"]).answer(picture, QUESTION)
    assert found.cues == ("red circle", "square") and len(found.searches) == 2
    assert any("What does the red circle look like?" in text for text in asked)


def test_things_are_read_from_what_the_model_lists():
    assert read_cues("Objects: red car and the dog.") == ["red car", "the dog"]
    assert read_cues("nothing of this kind") is None
    told = []

    def ask(pictures, text):
        if not isinstance(text, str):
            told.append(text)
            return "Objects: circle"
        return "red" if len(pictures) > 1 else "nothing"

    speaker = _oracle(None)
    speaker.functions["ask"] = ask
    assert ZoomEye(speaker).answer(_with_thing(), QUESTION) == "red"
    assert told[0][-1][0] == "user" and QUESTION in told[0][-1][1] and told[0][1][0] == "assistant"
    speaker.clear()
    speaker.functions["ask"] = lambda pictures, text: "hm"
    assert ZoomEye(speaker).answer(_with_thing(), QUESTION) == "hm"
    with pytest.raises(ValueError, match="listed no things"):
        ZoomEye(speaker, unread="refuse").answer(_with_thing(), QUESTION)


def test_a_red_rectangle_of_its_own_is_marked_in_blue():
    texts = []
    speaker = _oracle(None)
    inner = speaker.functions["logits"]
    speaker.functions["logits"] = lambda p, t, w: texts.append((t, p)) or inner(p, t, w)
    ZoomEye(speaker, cues=lambda question: ["circle"]).answer(_with_thing(), "what is in the red rectangle?")
    zoomed = [(t, p) for t, p in texts if len(p) > 1]
    assert zoomed and all("a blue frame" in t for t, _ in zoomed)
    assert all((p[1][0, 0] == [0, 0, 255]).all() for _, p in zoomed)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return FAMILIES[request.param]()


PICTURE = np.random.default_rng(3).integers(0, 255, (72, 100, 3)).astype(np.uint8)


@pytest.mark.parametrize("settings", ["llava-anyres", "llava", "qwen-vl"])
def test_it_runs_on_tiny_models(model, settings):
    speaker = Speaker(*model, max_new_tokens=4, batch_size=16)
    eye = ZoomEye(speaker, settings, cues=lambda question: ["red circle", "all squares"], leaf=60, upper=0.3)
    found = eye.answer(PICTURE, QUESTION)
    assert isinstance(found, Answer) and found.calls["ask"] == 1
    assert all(0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 72 for x1, y1, x2, y2 in found.boxes)


def test_memory_batches_and_beams_change_no_answer(model):
    found = {}
    for name, settings in {"all": {}, "none": {"cache": 0, "batch_size": 1}}.items():
        speaker = Speaker(*model, max_new_tokens=4, generation={"num_beams": 2}, **settings)
        eye = ZoomEye(speaker, cues=lambda question: ["circle", "square"], leaf=60, upper=0.3)
        found[name] = eye.answer(PICTURE, QUESTION)
    assert found["all"] == found["none"] and found["all"].boxes == found["none"].boxes
    assert sum(found["all"].calls.values()) <= sum(found["none"].calls.values())


def test_nothing_to_zoom_into_is_the_plain_answer_bit_for_bit(model):
    speaker = Speaker(*model, max_new_tokens=4, cache=0)
    plain = speaker.ask(PICTURE, QUESTION)
    for eye in (
        ZoomEye(speaker, leaf=32, max_depth=0),  # one node
        ZoomEye(speaker, leaf=200, small="root"),
        ZoomEye(speaker, leaf=32, cues=lambda question: []),  # no things
        ZoomEye(speaker, leaf=32, cues=lambda question: ["circle"], upper=2.0, lower=1.99, steps=(0.1,)),  # none found
        ZoomEye(speaker, leaf=32, cues=lambda question: ["circle"], upper=-1.0),  # the whole suffices
    ):
        found = eye.answer(PICTURE, QUESTION)
        assert found == plain and found.boxes == ()
    assert ZoomEye(speaker, leaf=32).answer(PICTURE, QUESTION) == plain  # a random model lists nothing


def test_the_models_of_known_families_get_their_settings(model):
    eye = ZoomEye(Speaker(*model))
    expected = {"llava": ("local", 16), "qwen2_vl": ("global-local", 448)}[model[0].config.model_type]
    assert (eye.settings.view, eye.leaf) == expected


def test_bad_input_is_told_by_name(model):
    speaker = Speaker(*model)
    eye = ZoomEye(speaker, leaf=32, cues=lambda question: "circle")
    unsized = CallableSpeaker(lambda p, t: "x", logits=lambda p, t, w: [0, 0])
    for call, error, message in [
        (lambda: eye.answer(PICTURE[:1, :1], "what"), ValueError, "more than one pixel"),
        (lambda: ZoomEye(speaker, leaf=32, small="root").answer(PICTURE[:1, :1], "what"), ValueError, "one pixel"),
        (lambda: eye.answer(PICTURE[:20, :20], "what"), ValueError, "20 × 20 pixels is smaller than a leaf of 32"),
        (lambda: eye.answer(PICTURE, ""), ValueError, "question must hold"),
        (lambda: eye.answer(PICTURE, 3), TypeError, "question must be a string"),
        (lambda: eye.answer([PICTURE, PICTURE], "what"), TypeError, "one picture, got 2"),
        (lambda: eye.answer(PICTURE, "what"), TypeError, "cues must give a list"),
        (lambda: ZoomEye(speaker, prompts=ZoomPrompts(yes="red circle")), ValueError, "'red circle' is 2"),
        (lambda: ZoomEye(speaker, prompts=ZoomPrompts(exists="is it")), ValueError, "exists must have a place {cue}"),
        (lambda: ZoomEye(speaker, prompts=ZoomPrompts(zoomed="<image>")), ValueError, "mark two pictures"),
        (lambda: ZoomEye(speaker, "gpt"), ValueError, "settings='gpt'"),
        (lambda: ZoomEye(speaker, leef=3), TypeError, "no setting 'leef'"),
        (lambda: ZoomEye(speaker, bias=2.0), ValueError, "bias"),
        (lambda: ZoomEye(model[0]), TypeError, "speaker must be"),
        (lambda: ZoomEye(unsized), ValueError, "leaf must be given"),
        (lambda: Tree((8, 8), 1), ValueError, "leaf"),
        (lambda: Tree((8, 8), 4, split=5), ValueError, "split"),
        (
            lambda: best_first(Tree((8, 8), 4), lambda n: 0, lambda n: 0, upper=0, lower=0, steps=()),
            ValueError,
            "steps",
        ),
        (lambda: crop(PICTURE, (5, 5, 5, 9)), ValueError, "x1 < x2"),
        (lambda: crop(PICTURE, (0.0, 0.0, 0.5, 0.5)), TypeError, r"box\[2\] must be an integer"),
        (lambda: crop(PICTURE, (0, 0, 101, 9)), ValueError, "leaves the picture of 100 × 72"),
        (lambda: crop(PICTURE, ("a", 0, 5, 9)), TypeError, r"box\[0\] must be an integer, got 'a'"),
        (lambda: crop(PICTURE, (0, 0, 5, 9), (0, 4)), ValueError, r"size\[0\] must be"),
        (lambda: Views(8, "far"), ValueError, "view"),
        (lambda: depth_weight(3, 2, 0.5), ValueError, "depth must be an integer of at least 0 and at most 2"),
        (lambda: post_order(Tree((8, 8), 8), lambda n: float("nan")), ValueError, "exists must give numbers, got NaN"),
        (
            lambda: best_first(Tree((8, 8), 4), lambda n: float("nan"), lambda n: 0, upper=0, lower=0),
            ValueError,
            "answering must give numbers, got NaN",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert merged([]) == [] and divide((0, 0, 1, 2)) == [(0, 0, 1, 1), (0, 1, 1, 2)]


def test_it_is_where_users_look_for_it():
    import attnlib

    assert attnlib.look.zoom.ZoomEye is ZoomEye and attnlib.look.Speaker is Speaker


def test_no_input_is_changed(model):
    picture = PICTURE.copy()
    ZoomEye(Speaker(*model, max_new_tokens=2), leaf=32, cues=lambda question: ["circle"]).answer(picture, "what")
    assert (picture == PICTURE).all()
