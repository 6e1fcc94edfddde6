"""Speakers: what they ask is what the model would be asked by hand, and what they remember is right."""

import copy

import numpy as np
import pytest
import torch

from attnlib.hooks import Intervention, attach
from attnlib.look.pixels import outline, resize, to_picture, to_square
from attnlib.look.speak import CallableSpeaker, Speaker, need_speaker
from look.speakers import FAMILIES

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
OTHER = np.random.default_rng(1).integers(0, 255, (50, 30, 3)).astype(np.uint8)
QUESTION = "is there a red circle ?"


@pytest.fixture(scope="module", params=list(FAMILIES))
def parts(request):
    return FAMILIES[request.param]()


@pytest.fixture
def speaker(parts):
    return Speaker(*parts, max_new_tokens=5)


def _by_hand(model, processor, pictures, question, **settings):
    from PIL import Image

    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pictures = [Image.fromarray(picture) for picture in pictures]
    inputs = processor(text=[prompt], images=pictures or None, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, **settings)
        logits = model(**inputs).logits[0, -1]
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), logits


@pytest.mark.parametrize("pictures", [(PICTURE,), (PICTURE, OTHER)])
def test_answers_and_logits_are_the_models_own(parts, speaker, pictures):
    text, logits = _by_hand(*parts, pictures, QUESTION)
    assert speaker.ask(list(pictures), QUESTION) == text.strip()
    ids = speaker.word_ids(["Yes", "No"])
    assert torch.allclose(speaker.logits(list(pictures), QUESTION, ["Yes", "No"]), logits[ids], atol=1e-5)
    assert speaker.calls == {"ask": 1, "logits": 1}


def test_a_batch_with_left_padding_answers_as_one_by_one(parts, speaker):
    asked = [(PICTURE, QUESTION), ([PICTURE, OTHER], "what is it"), (None, "what"), (OTHER, "where ? where is it ?")]
    single = Speaker(*parts, max_new_tokens=5, batch_size=1, cache=0)
    assert speaker.ask_each(asked) == [single.ask(*one) for one in asked]
    together = speaker.logits_each(asked, ["Yes", "No"])
    alone = torch.stack([single.logits(*one, ["Yes", "No"]) for one in asked])
    assert torch.allclose(together, alone, atol=1e-4)


def test_shared_prompts_give_the_same_scores(parts):
    asked = [(PICTURE, QUESTION), (PICTURE, "is there"), (OTHER, "what"), (PICTURE, "is there a red circle in it ?")]
    asked += [([PICTURE, OTHER], "where"), ([PICTURE, OTHER], "where is it"), (None, "what"), (None, "what is")]
    read = []
    shared = Speaker(*parts, share_prompts=True)
    inner = shared._shared
    shared._shared = lambda part, key: read.append(len(part)) or inner(part, key)
    plain = Speaker(*parts).logits_each(asked, ["Yes", "No"])
    assert torch.allclose(shared.logits_each(asked, ["Yes", "No"]), plain, atol=1e-5)
    assert sorted(read) == [2, 2, 3] and shared.calls["logits"] == 8


def test_kept_starts_give_the_same_scores_and_pictures_are_read_once(parts):
    model, processor = parts
    words, first = ["Yes", "No"], [(PICTURE, QUESTION), (PICTURE, "is there"), (OTHER, "what")]
    later = [(PICTURE, "where is it ?"), ([PICTURE, OTHER], "where"), (OTHER, "is there a red circle in it ?")]
    kept = Speaker(model, processor, share_prompts=True, keep_prompts=2)
    read, forward = [], model.forward

    def counted(*args, **given):
        read.append(given.get("pixel_values") is not None)
        return forward(*args, **given)

    model.forward = counted
    try:
        found = [kept.logits_each(asked, words) for asked in (first, later)]
    finally:
        del model.forward
    for asked, scores in zip((first, later), found, strict=True):
        assert torch.allclose(scores, Speaker(model, processor).logits_each(asked, words), atol=1e-5)
    assert sum(read) == 3 and len(kept.starts.found) == 2  # two pictures, later both; the older ones went
    kept.clear()
    assert not kept.starts.found
    with pytest.raises(ValueError, match="keep_prompts=2 keeps starts"):
        Speaker(model, processor, keep_prompts=2)


def test_beams_and_other_settings_go_to_generate(parts):
    speaker = Speaker(*parts, max_new_tokens=5, generation={"num_beams": 3})
    assert speaker.ask(PICTURE, QUESTION) == _by_hand(*parts, [PICTURE], QUESTION, num_beams=3)[0].strip()


def test_answers_are_remembered_by_picture_and_text(speaker):
    first = speaker.ask(PICTURE, QUESTION)
    assert speaker.ask(PICTURE.copy(), QUESTION) == first and speaker.calls["ask"] == 1
    speaker.ask(OTHER, QUESTION)
    speaker.ask(PICTURE, "what is it")
    assert speaker.calls["ask"] == 3 and speaker.remembered["ask"] == 1
    found = speaker.logits(PICTURE, QUESTION, ["Yes"])
    found += 1  # what is given away is the user's own
    assert not torch.equal(found, speaker.logits(PICTURE, QUESTION, ["Yes"]))
    speaker.clear()
    speaker.ask(PICTURE, QUESTION)
    assert speaker.calls["ask"] == 4


def test_changed_weights_and_attached_techniques_are_asked_again(parts):
    model, processor = copy.deepcopy(parts[0]), parts[1]
    speaker = Speaker(model, processor)
    before = speaker.logits(PICTURE, QUESTION, ["Yes", "No"])

    class Loud(Intervention):
        name = "loud"

        def on_output(self, site, out):
            return out * 3

    with attach(model, Loud()):
        assert not torch.equal(speaker.logits(PICTURE, QUESTION, ["Yes", "No"]), before)
    assert torch.equal(speaker.logits(PICTURE, QUESTION, ["Yes", "No"]), before)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert torch.allclose(speaker.logits(PICTURE, QUESTION, ["Yes", "No"]), 2 * before, atol=1e-4)


def test_draws_are_numbered_and_leave_the_generator_alone(speaker):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawn = [speaker.ask(PICTURE, QUESTION, temperature=5.0, sample=n) for n in range(4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(drawn)) > 1
    speaker.clear()
    assert drawn == [speaker.ask(PICTURE, QUESTION, temperature=5.0, sample=n) for n in range(4)]
    every = speaker.ask_each([(PICTURE, QUESTION), (OTHER, QUESTION)], temperature=5.0, sample=2)
    assert every[0] == drawn[2]


def test_training_mode_is_left_as_it_was(parts):
    model = copy.deepcopy(parts[0]).train()
    still = next(model.children())
    still.eval()
    speaker = Speaker(model, parts[1])
    speaker.ask(PICTURE, QUESTION)
    assert model.training and not any(m.training for m in still.modules())
    assert all(p.grad is None for p in model.parameters())


def test_features_and_scores(parts, speaker):
    found = speaker.features([PICTURE, OTHER])
    assert found.shape[0] == 2 and torch.equal(found[0], speaker.features(PICTURE))
    assert speaker.calls["features"] == 2
    scores = speaker.score(PICTURE, QUESTION, ["Yes", "a red circle"])
    logits = speaker.logits(PICTURE, QUESTION, ["Yes"])
    full = _by_hand(*parts, [PICTURE], QUESTION)[1]
    assert scores.shape == (2,)
    assert torch.allclose(scores[0], full.logsumexp(-1) - logits[0], atol=1e-4)


def test_bfloat16_and_pil_and_channels_first(parts):
    from PIL import Image

    model = copy.deepcopy(parts[0]).bfloat16()
    speaker = Speaker(model, parts[1], max_new_tokens=3)
    first = torch.from_numpy(PICTURE).permute(2, 0, 1)
    answers = {speaker.ask(image, QUESTION) for image in (PICTURE, Image.fromarray(PICTURE), first, first / 255)}
    assert len(answers) == 1
    assert speaker.logits(PICTURE, QUESTION, ["Yes"]).dtype == torch.float32


def test_templates_are_data(parts):
    model, processor = parts
    spoken = Speaker(model, processor, template="USER : {prompt} ASSISTANT :")
    assert spoken.prompt(2, "what") == f"USER : {spoken.image_token * 2}\nwhat ASSISTANT :"
    placed = Speaker(model, processor, template="{images} picture {text} answer")
    assert placed.prompt(1, "what") == f"{placed.image_token} picture what answer"
    own = Speaker(model, processor, template=lambda turns: "<image> in " + turns[-1][1])
    assert own.prompt(1, "what") == f"{own.image_token} in what"
    talk = [("user", "what"), ("assistant", "a circle"), ("user", "where")]
    assert "a circle" in spoken.prompt(0, talk) and spoken.prompt(0, talk).endswith("where ASSISTANT :")


def test_functions_are_speakers():
    seen = []

    def ask(pictures, text, sample=0):
        seen.append((len(pictures), text, sample))
        return f" {text} {sample} "

    speaker = CallableSpeaker(ask, logits=lambda pictures, text, words: [float(len(w)) for w in words])
    assert speaker.ask([PICTURE, OTHER], "hello", temperature=1.0, sample=3) == "hello 3"
    assert speaker.logits(None, "x", ["a", "bcd"]).tolist() == [1.0, 3.0]
    assert seen == [(2, "hello", 3)]
    assert need_speaker(lambda pictures, text: "yes").ask(None, "?") == "yes"
    with pytest.raises(TypeError, match=r"asked\[0\] must be a pair \(image, text\)"):
        speaker.ask_each(["hello"])
    with pytest.raises(TypeError, match="no function 'features'.*'ask', 'logits'"):
        speaker.features(PICTURE)
    with pytest.raises(TypeError, match="a string, got 3|must be a string"):
        CallableSpeaker(lambda pictures, text: 3).ask(None, "x")


def test_scenes_small_model_answers_as_it_does_by_itself():
    from attnlib.bench.data import scenes
    from attnlib.bench.data.speaking import SceneProcessor

    model, tokenizer = scenes.load_model()
    speaker = Speaker(model, SceneProcessor(tokenizer), max_new_tokens=28)
    made = [scenes.make_scene(seed, "train") for seed in range(2)]
    items = [scenes.Item(scene, question) for scene in made for question in scenes.questions(scene, "position")]
    expected = scenes.answer(model, tokenizer, items)
    found = speaker.ask_each([(item.scene.image.permute(1, 2, 0), item.question.text) for item in items])
    assert found == [text.strip() for text in expected]
    assert speaker.input_size == scenes.SIDE
    assert speaker.logits(made[0].image, "is there a red circle ?", ["yes", "no"]).shape == (2,)


def test_bad_input_is_told_by_name(parts, speaker):
    model, processor = parts
    for call, error, message in [
        (lambda: Speaker(3, processor), TypeError, "model must be a model of transformers"),
        (lambda: Speaker(model, None), TypeError, "processor must be"),
        (lambda: Speaker(model, processor, template="hello"), ValueError, "template must have a place"),
        (lambda: Speaker(model, processor, generation={"do_sample": True}), ValueError, "generation must not hold"),
        (lambda: Speaker(model, processor, batch_size=0), ValueError, "batch_size"),
        (lambda: speaker.ask(PICTURE, " "), ValueError, "text must hold a prompt"),
        (lambda: speaker.ask(PICTURE, 3), TypeError, "text must be a string"),
        (lambda: speaker.ask(PICTURE, [("user", "a"), ("assistant", "b")]), ValueError, "end with what the user"),
        (lambda: speaker.ask(PICTURE, "<image> and <image>"), ValueError, "marks 2 places.*1 pictures"),
        (lambda: speaker.ask("a.png", "what"), TypeError, "image must be a PIL image"),
        (lambda: speaker.ask(torch.randn(40, 60, 3) * 9, "what"), ValueError, r"lie in \[0, 1\]"),
        (lambda: speaker.ask(torch.full((4, 4, 3), float("nan")), "what"), ValueError, r"lie in \[0, 1\]"),
        (lambda: speaker.ask(np.zeros((0, 4, 3), np.uint8), "what"), ValueError, "image must be"),
        (lambda: speaker.ask(np.full((4, 4, 3), 300), "what"), ValueError, "300; pixels are 0..255"),
        (lambda: speaker.ask(PICTURE, "what", temperature=-1), ValueError, "temperature"),
        (lambda: speaker.logits(PICTURE, "what", "Yes"), TypeError, "words must be a list"),
        (lambda: speaker.logits(PICTURE, "what", ["Yes", "Yes"]), ValueError, "words must differ"),
        (lambda: speaker.logits(PICTURE, "what", ["red circle"]), ValueError, "single tokens.*'red circle' is 2"),
        (lambda: speaker.logits(PICTURE, "what", ["elephant"]), ValueError, "'elephant' is not"),
        (lambda: speaker.score(PICTURE, "what", []), TypeError, "answers must be a list"),
        (lambda: speaker.features(None), ValueError, "image must be a picture"),
        (lambda: need_speaker(model), TypeError, "speaker must be a Speaker"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert speaker.ask_each([]) == [] and speaker.logits_each([], ["Yes", "No"]).shape == (0, 2)


def test_pictures():
    gray = to_picture(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert gray.shape == (3, 4, 3) and (gray[..., 0] == gray[..., 2]).all()
    assert to_picture(np.zeros((4, 5, 4), np.uint8)).shape == (4, 5, 3)
    assert to_picture(torch.zeros(5, 4, 3, dtype=torch.bfloat16)).dtype == np.float32
    square, left, top = to_square(PICTURE, (1.0, 0.0, 0.0))
    assert square.shape == (60, 60, 3) and (left, top) == (0, 10) and square[0, 0].tolist() == [255, 0, 0]
    assert (square[10:50] == PICTURE).all()
    drawn = outline(PICTURE, (10, 10, 20, 20), (0, 0, 1), 2)
    assert (drawn[12:19, 12:19] == PICTURE[12:19, 12:19]).all() and drawn[10, 15].tolist() == [0, 0, 255]
    assert drawn[20, 20].tolist() == [0, 0, 255] and (drawn != PICTURE).any()
    assert resize(PICTURE, (40, 60)) is PICTURE and resize(PICTURE, (20, 30)).dtype == np.uint8
