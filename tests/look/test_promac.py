"""ProMaC: crops, boxes, alignment and contrast, held to the released rules; the cycle on images with one thing."""

import math

import pytest
import torch

from attnlib.look.prompts import components
from attnlib.look.segment import ProMaC, Segmenter, align, boxes_in, clip_box, confidence, crops, masked_images
from attnlib.look.segment.promac import Answer, CLIPSimilarity, ContrastiveAsk
from attnlib.look.segment.segmenter import Segments
from attnlib.look.surgery import SurgeryMaps
from attnlib.ops.points import min_max
from attnlib.steer.contrastive import contrast
from look.test_gensam import clip_model, tiny_sam

F64 = torch.float64


def released_align(scores):
    """The release's rule for weights and kept crops, in float64."""
    s = scores.softmax(0)
    if len(s) > 1:
        s = (s - s.min() + 1e-9) / (s.max() - s.min() + 1e-9)
    kept = set((s > 0.7).nonzero()[:, 0].tolist()) | {0}
    return s / s.sum(), kept


@pytest.mark.parametrize("scores", [[20.0, 24.0, 18.0, 23.9, 5.0], [3.0, 3.0, 3.0], [7.0]])
def test_alignment_as_released(scores):
    scores = torch.tensor(scores, dtype=F64)
    weights, kept = align(scores)
    theirs, chosen = released_align(scores)
    torch.testing.assert_close(weights, theirs, rtol=1e-7, atol=1e-7)
    assert set(kept.nonzero()[:, 0].tolist()) == chosen
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=F64))
    assert weights[scores.argmax()] == weights.max()


def test_crops_as_released():
    assert crops((11, 21), [1, 2]) == [(0, 0, 21, 11), (0, 0, 10, 11), (10, 0, 21, 11), (0, 0, 21, 5), (0, 5, 21, 11)]
    assert crops((12, 20), [4]) == [(0, 0, 10, 6), (0, 6, 10, 12), (10, 0, 20, 6), (10, 6, 20, 12)]
    assert crops((40, 12), [4]) == [(0, 0, 12, 10), (0, 10, 12, 20), (0, 20, 12, 30), (0, 30, 12, 40)]
    assert crops((8, 12), [0.5]) == [(3, 2, 9, 6)]
    with pytest.raises(ValueError, match="scales"):
        crops((8, 8), [3])


def test_boxes_go_to_a_crop_and_back():
    crop = (10, 5, 30, 25)
    box = torch.tensor([12.5, 6.0, 20.0, 21.0])
    inside = clip_box(box, crop)
    assert (inside + torch.tensor([10, 5, 10, 5])).equal(box)
    assert clip_box(torch.tensor([0.0, 0.0, 40.0, 40.0]), crop).tolist() == [0, 0, 20, 20]
    assert clip_box(torch.tensor([0.0, 0.0, 10.0, 40.0]), crop) is None


def test_boxes_are_read_out_of_answers():
    assert [b.tolist() for b in boxes_in("[0.25, 0.5, 0.5, 1.0] or 0.0, 0.0, 2.0, 0.5", (20, 40))] == [
        [10, 10, 20, 20], [0, 0, 40, 10],
    ]  # fmt: skip
    assert boxes_in("[3, 4, 10, 12]", (20, 40), "pixels")[0].tolist() == [3, 4, 10, 12]
    assert boxes_in("[3.0, 4.0, 10.0, 12.0]", (20, 40), "auto")[0].tolist() == [3, 4, 10, 12]
    for nothing in ("", "none", "[0.5, 0.5, 0.5, 0.9]", "[0.9, 0.1, 0.2, 0.5]", "[0.1, 0.2, 0.3]"):
        assert boxes_in(nothing, (20, 40)) == []


def test_contrast_takes_the_prior_away():
    prior, evidence = torch.tensor([[3.0, 0.0, -9.0]]), torch.tensor([[0.0, 2.5, 0.0]])
    image, without = prior + evidence, prior
    assert image.argmax() == 0 and contrast(image, without, 2.0, -1.0, 0.1).argmax() == 1  # a = 1: B wins
    for alpha in (0.0, 0.5, 3.0):  # the same image: the ordinary scores on the plausible tokens
        same = contrast(image, image, 1 + alpha, -alpha, 0.1)
        plausible = image >= image.max() + math.log(0.1)
        torch.testing.assert_close(same[plausible], image[plausible])
        assert same[~plausible].eq(-torch.inf).all()
    assert contrast(image, without, 1.0, 0.0).equal(image)
    assert confidence([-1.0, -3.0]) == 2.0 and confidence([]) == 0.0


H, W = 48, 64
Y, X = torch.meshgrid(torch.arange(float(H)), torch.arange(float(W)), indexing="ij")


def blob(seed):
    g = torch.Generator().manual_seed(seed)
    cx, cy = 12 + 40 * torch.rand((), generator=g), 10 + 28 * torch.rand((), generator=g)
    truth = (X - cx) ** 2 + (Y - cy) ** 2 < 49
    image = 0.15 * torch.rand(H, W, 1, generator=g) + 0.7 * truth[..., None]
    return image.expand(H, W, 3).clamp(0, 1).contiguous(), truth


def brightness(image, *names):
    return min_max(torch.nn.functional.adaptive_avg_pool2d(image.mean(-1)[None, None], (14, 14))[0, 0], (0, 1))


def bright_segmenter(image):
    def predict(points=None, labels=None, box=None, mask=None):
        grey = image.mean(-1)
        parts = components((grey > 0.4 * grey.max())[None])[0]
        on = points[labels == 1].long() if points is not None else torch.zeros(0, 2, dtype=torch.long)
        hit = [int(parts[y, x]) for x, y in on if parts[y, x]]
        logits = torch.where(torch.isin(parts, torch.tensor(hit or [-1])), 4.0, -4.0)
        return Segments(logits[None], torch.ones(1))

    return predict


def answers(question, image, without):
    """A model that knows the thing by its brightness, and imagines a box in dark crops."""
    if "bounding box" in question and "name" not in question:
        bright = (image.mean(-1) > 0.5).nonzero()
        if len(bright):
            (y1, x1), (y2, x2) = bright.amin(0), bright.amax(0) + 1
            h, w = image.shape[:2]
            return f"[{float(x1) / w:.3f}, {float(y1) / h:.3f}, {float(x2) / w:.3f}, {float(y2) / h:.3f}]"
        return "[0.1, 0.1, 0.4, 0.4]"
    return "meadow" if "environment" in question else "frog"


def build(log=None, **changes):
    def ask(image, question, history, without=None):
        if log is not None:
            log.append((question, tuple(image.shape), None if without is None else tuple(without.shape), len(history)))
        return Answer(answers(question, image, without), 0.5)

    def inpaint(image, mask, names, places):
        return torch.where(mask[..., None], image.new_tensor(0.1), image)

    def similarity(images, name):
        return 100 * images.mean((1, 2, 3))

    settings = dict(segmenter=bright_segmenter, maps=brightness, ask=ask, similarity=similarity, inpaint=inpaint)
    return ProMaC(**{**settings, **changes})


def test_the_cycle_finds_the_thing_and_does_not_lose_it():
    overlap = []
    for seed in range(5):
        image, truth = blob(seed)
        before = image.clone()
        out = build(rounds=3)(image)
        assert image.equal(before)
        overlap.append([float((r.mask & truth).sum() / (r.mask | truth).sum()) for r in out.steps])
        assert float((out.mask & truth).sum() / (out.mask | truth).sum()) > 0.5
        for step in out.steps:
            assert step.name == "frog" and 0 <= float(step.soft.min()) and float(step.soft.max()) == 1
            torch.testing.assert_close(step.weights.sum(), torch.tensor(1.0))
            inside = step.without[truth]
            assert inside.mean() < image[truth].mean()  # the thing was painted out
    mean = torch.tensor(overlap).mean(0)
    assert mean[-1] >= mean[0] - 1e-3


def test_what_is_asked_and_with_which_contrast():
    log, (image, _) = [], blob(0)
    build(log, rounds=2)(image)
    first, second = log[: 5 * 4 + 2], log[5 * 4 + 2 :]
    assert all(without is None for _, _, without, _ in first[:20])  # guesses, imagined ones too
    assert all(without == (H, W, 3) for _, _, without, _ in first[20:])
    assert len(second) == 22 and all(shape == without for _, shape, without, _ in second)
    assert [n for *_, n in first[:4]] == [0, 1, 2, 3] and [n for *_, n in first[20:]] == [0, 1]
    assert "['frog']" in first[20][0] and "camouflaged animal" in first[0][0]


def test_nothing_left_gives_a_black_image_and_nothing_found_the_whole():
    image, _ = blob(1)
    painted = []
    out = build(
        ask=lambda image, question, *a, **k: "" if "ame" in question else "[0.0, 0.0, 1.0, 1.0]",
        inpaint=lambda *a: painted.append(a), rounds=1,
    )(image)  # fmt: skip
    assert not painted and out.steps[0].without.eq(0).all() and out.steps[0].name == "camouflaged animal"
    nothing = build(ask=lambda *a, **k: "nothing", maps=lambda *a: torch.zeros(14, 14), rounds=1)(image)
    assert nothing.steps[0].box.tolist() == [0, 0, W, H] and nothing.logits.isfinite().all()


def test_soft_masks_are_cut_in_their_middle():
    image, truth = blob(2)
    ours, theirs = build(rounds=2)(image), build(rounds=2, compat="authors")(image)
    assert ours.mask.sum() <= theirs.mask.sum()
    assert float((theirs.logits > 0).float().mean()) > float((ours.logits > 0.5).float().mean())
    sure = build(rounds=2, fusion="confidence")(image)
    torch.testing.assert_close(sure.logits, ours.logits)  # all answers are equally sure here


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_of_transformers_answers_in_contrast(family):
    pytest.importorskip("transformers")
    from hooks.pictures import IMAGE_ID, TOKENS, picture_model

    from attnlib.hooks import TokenTypes

    model = picture_model(family)

    def inputs(image, question, history):
        words = [3 + sum(map(ord, w)) % 50 for w in (" ".join(t for pair in history for t in pair) + question).split()]
        ids = torch.tensor([[1, *[IMAGE_ID] * TOKENS, *words]])
        pixels = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], (16, 16)) * 4 - 2
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)

    given = dict(inputs=inputs, decode=lambda ids: str(ids.tolist()), token_types=TokenTypes(image=IMAGE_ID))
    ask = ContrastiveAsk(model, max_new_tokens=4, pad_token_id=0, suppress_tokens=[IMAGE_ID], **given)
    image, other = torch.rand(20, 20, 3), torch.rand(20, 20, 3)
    plain, same = ask(image, "what is it"), ask(image, "what is it", without=image)
    assert plain.text == same.text and plain.doubt > 0
    # by hand: greedy over scores of two plain calls
    ids, written, doubts = inputs(image, "what is it", ())["input_ids"], [], []
    for _ in range(4):
        scores = []
        for pixels in (inputs(image, "", ())["pixel_values"], inputs(other, "", ())["pixel_values"]):
            with torch.no_grad():
                scores.append(model(input_ids=ids, pixel_values=pixels).logits[:, -1])
        both = contrast(*scores, 2.0, -1.0, 0.1)
        both[:, IMAGE_ID] = -torch.inf
        ids = torch.cat([ids, both.argmax(-1, keepdim=True)], 1)
        written.append(int(ids[0, -1]))
        doubts.append(-float(both.log_softmax(-1).max()))
    found = ask(image, "what is it", without=other)
    assert found.text == str(written) and found.doubt == pytest.approx(sum(doubts) / 4, abs=1e-5)


def test_on_models_of_transformers():
    def tokenize(texts):
        rows = [[1, *(3 + ord(c) % 50 for c in text[:12])] for text in texts]
        width = max(map(len, rows)) + 1
        return {"input_ids": torch.tensor([row + [59] * (width - len(row)) for row in rows])}

    maps = SurgeryMaps(clip_model(), tokenize, layers=2)
    similarity = CLIPSimilarity(maps)
    images = torch.rand(3, 40, 30, 3)
    pixels = torch.cat([maps.pixels(image) for image in images])
    plain = clip_model()(pixel_values=pixels, **tokenize(["frog"])).logits_per_image[:, 0]
    torch.testing.assert_close(similarity(images, "frog"), plain, rtol=1e-4, atol=1e-4)
    out = build(segmenter=Segmenter(tiny_sam()), maps=maps, similarity=similarity, rounds=2, upsample=4)(blob(0)[0])
    assert out.mask.shape == (H, W) and out.logits.isfinite().all()


def test_bad_input_is_refused_by_name():
    image, _ = blob(0)
    with pytest.raises(TypeError, match="inpaint must be callable"):
        build(inpaint=None)
    with pytest.raises(ValueError, match="inpaint must give an image"):
        build(inpaint=lambda *a: torch.zeros(2, 2, 3))(image)
    with pytest.raises(ValueError, match="similarity must give one score for each of 5"):
        build(similarity=lambda images, name: torch.zeros(2))(image)
    with pytest.raises(ValueError, match="units="):
        build(units="inches")
    with pytest.raises(ValueError, match="scales"):
        build(scales=[7])
    with pytest.raises(ValueError, match="image must lie"):
        build()(image * 255)
    with pytest.raises(ValueError, match="at least one crop"):
        align(torch.zeros(0))
    with pytest.raises(ValueError, match="scores must be finite"):
        align(torch.tensor([float("nan"), 1.0]))
    with pytest.raises(TypeError, match="inputs must be callable"):
        ContrastiveAsk(torch.nn.Identity(), None, str, None)
    assert masked_images(torch.ones(2, 2, 3), torch.zeros(4, 2, 2, dtype=torch.bool)).eq(0).all()
