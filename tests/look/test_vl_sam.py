"""VL-SAM as we read it: points of maps, refinement, quarters and merging, and a reader over transformers' models."""

import pytest
import torch

from attnlib.look.flow import Flow, attention_flow, flow_map
from attnlib.look.segment import VLSAM, FlowReader, Found, Segmenter, corners, iou, merge
from attnlib.look.segment.segmenter import Segments
from look.test_gensam import tiny_sam

H, W = 40, 60


def scene():
    truth = {"cup": torch.zeros(H, W, dtype=torch.bool), "dog": torch.zeros(H, W, dtype=torch.bool)}
    truth["cup"][4:14, 6:18] = True
    truth["dog"][24:38, 36:56] = True
    image = torch.full((H, W, 3), 0.1)
    image[truth["cup"]] = torch.tensor([0.9, 0.1, 0.1])
    image[truth["dog"]] = torch.tensor([0.1, 0.9, 0.1])
    return image, truth


def reader(image, question):
    """Names what is there, looking at it; and a ghost that it did not look at."""
    seen = torch.nn.functional.adaptive_avg_pool2d(image.permute(2, 0, 1), (8, 12))
    said = [("ghost", torch.ones(8, 12))]
    for name, channel in (("cup", 0), ("dog", 1)):
        if (image[..., channel] > 0.5).sum() > 30:
            said.append((name, (seen[channel] - 0.1).clamp(min=0)))
    return said


class Colours:
    def __init__(self):
        self.log = []

    def __call__(self, image):
        def predict(points=None, labels=None, box=None, mask=None):
            self.log.append((points.clone(), labels.clone(), mask is not None))
            x, y = points[labels == 1][0].long()
            same = (image - image[y, x]).abs().sum(-1) < 0.1
            logits = torch.where(same, 5.0, -5.0)
            return Segments(torch.stack([logits - 9, logits]), torch.tensor([0.1, 0.9]), torch.zeros(2, 4, 4))

        return predict


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("crops", [False, True])
def test_what_was_said_is_found_once_and_a_ghost_is_not(refine, crops):
    image, truth = scene()
    before, segmenter = image.clone(), Colours()
    found = VLSAM(segmenter, reader, ["what?", "which things?"], refine=refine, crops=crops)(image)
    assert image.equal(before)
    assert {f.name for f in found} == {"cup", "dog"}
    for name in truth:
        best = next(f for f in found if f.name == name)
        assert iou(best.mask, truth[name]) == 1.0
        rows, columns = truth[name].nonzero().unbind(1)
        want = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        assert best.box.tolist() == want
    for points, labels, _ in segmenter.log:
        assert set(labels.tolist()) <= {0, 1} and (points >= 0).all()
    assert any(again for *_, again in segmenter.log) == bool(refine)


def test_points_are_right_on_grids_that_are_no_square():
    image, truth = scene()
    segmenter = Colours()
    VLSAM(segmenter, reader, refine=0, crops=False)(image)
    for points, labels, _ in segmenter.log:
        (x, y), (u, v) = points.long()
        assert labels.tolist() == [1, 0] and (truth["cup"] | truth["dog"])[y, x]
        name = "cup" if truth["cup"][y, x] else "dog"
        assert not truth[name][v, u]


def test_merging():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    other = torch.zeros(4, 4, dtype=torch.bool)
    other[:2, :3] = True
    make = lambda name, m, score: Found(name, m, torch.zeros(4), score, torch.zeros(1, 1), (0, 0, 4, 4))  # noqa: E731
    found = [make("cup", other, 0.5), make("Cup", mask, 0.9), make("dog", mask, 0.4)]
    assert [(f.name, f.score) for f in merge(found)] == [("Cup", 0.9), ("dog", 0.4)]
    assert [f.name for f in merge(found, by_name=False)] == ["Cup"]
    assert len(merge(found, overlap=0.8)) == 3 and merge([]) == []
    assert corners((5, 4))[1:] == [(0, 0, 2, 2), (2, 0, 4, 2), (0, 2, 2, 5), (2, 2, 4, 5)]
    assert iou(mask & False, mask & False) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_reader_is_the_flow_of_the_models_own_maps(family):
    pytest.importorskip("transformers")
    from hooks.pictures import IMAGE_ID, SIDE, TOKENS, picture_model

    model = picture_model(family, implementation="eager")

    def inputs(image, question):
        ids = torch.tensor([[1, *[IMAGE_ID] * TOKENS, 5, 7, 9]])
        pixels = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], (16, 16)) * 4 - 2
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)

    def names(answer):
        return [("first", [0]), ("others", range(1, len(answer)))]

    read = FlowReader(
        model, inputs, names, IMAGE_ID, (SIDE, SIDE), max_new_tokens=4, pad_token_id=0, suppress_tokens=[IMAGE_ID]
    )
    image = torch.rand(20, 20, 3, generator=torch.Generator().manual_seed(0))
    said = read(image, "what")
    assert [name for name, _ in said] == ["first", "others"]
    given = inputs(image, "")
    written = model.generate(**given, do_sample=False, max_new_tokens=4, pad_token_id=0, suppress_tokens=[IMAGE_ID])
    with torch.no_grad():
        maps = model(input_ids=written, pixel_values=given["pixel_values"], output_attentions=True).attentions
    flow = attention_flow(maps, "mean-max", 0.5, "column")
    at, start = torch.arange(1, 1 + TOKENS), given["input_ids"].shape[1]
    for (_, seen), tokens in zip(said, ([0], range(1, written.shape[1] - start)), strict=True):
        torch.testing.assert_close(seen, flow_map(flow, torch.tensor(list(tokens)) + start, at, (SIDE, SIDE))[0])
    found = VLSAM(Segmenter(tiny_sam()), read)(image)
    assert all(f.mask.shape == (20, 20) for f in found)
    assert FlowReader(model, inputs, lambda ids: [], IMAGE_ID, (SIDE, SIDE), max_new_tokens=1)(image, "") == []
    wrong = FlowReader(model, inputs, names, IMAGE_ID, (3, 5), Flow(), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="has 15 cells, but image names 16"):
        wrong(image, "")


def test_bad_input_is_refused_by_name():
    with pytest.raises(TypeError, match="reader must be callable"):
        VLSAM(Colours(), None)
    with pytest.raises(ValueError, match=r"image_size must be \(height, width\)"):
        corners((4, 4, 3))
    with pytest.raises(ValueError, match="questions must hold"):
        VLSAM(Colours(), reader, [])
    with pytest.raises(ValueError, match="part must be"):
        VLSAM(Colours(), reader, part=0)
    with pytest.raises(ValueError, match="image must lie"):
        VLSAM(Colours(), reader)(scene()[0] * 255)
    with pytest.raises(ValueError, match="map must be finite"):
        VLSAM(Colours(), lambda *a: [("x", torch.full((2, 2), float("nan")))])(scene()[0])
    assert VLSAM(Colours(), lambda *a: [])(scene()[0]) == []
