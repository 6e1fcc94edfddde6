"""Words of a prompt as tokens, and arithmetic of maps."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from attnlib.steer.diffusion import maps, prompts  # noqa: E402
from hooks import pipes  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return pipes.clip_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


def pieces(tokenizer, prompt, span):
    ids = tokenizer(prompt).input_ids
    return "".join(tokenizer.convert_ids_to_tokens([ids[i] for i in span])).replace("</w>", " ").strip()


def test_spans_are_the_tokens_of_the_words(tokenizer):
    prompt = "A Red circle, and a zebra wearing glasses."
    words = ["red", "circle", "zebra", "a zebra", "glasses", [1, 2]]
    spans = prompts.token_spans(tokenizer, prompt, words)
    assert spans[0] == [2] and spans[1] == [3] and spans[-1] == [1, 2]
    assert len(spans[2]) == 5 and len(spans[4]) > 1  # pieces
    assert [pieces(tokenizer, prompt, span) for span in spans[:-1]] == ["red", "circle", "zebra", "a zebra", "glasses"]
    # A word is not found inside another one.
    assert prompts.token_spans(tokenizer, "a dog wearing a crown in red", ["in"]) == [[6]]


def test_a_text_that_is_cut_off(tokenizer):
    prompt = "a cat " + "of " * 72 + "dog apple"  # begin, 2 + 72 + 1 tokens and end fill 77
    assert prompts.token_spans(tokenizer, prompt, ["dog"]) == [[75]]
    assert tokenizer(prompt, truncation=True).input_ids[75] == tokenizer("dog").input_ids[1]
    with pytest.raises(ValueError, match="'apple' lies beyond the 77 tokens .* reads: it is token 76"):
        prompts.token_spans(tokenizer, prompt, ["apple"])
    assert prompts.token_spans(tokenizer, prompt, ["apple"], limit=100) == [[76]]
    with pytest.raises(ValueError, match=r"tokens \[77\]; there are 77"):
        prompts.token_spans(tokenizer, "a cat", [[77]])


def test_streams_of_several_encoders(tokenizer):
    class FluxPipeline(SimpleNamespace):
        pass

    three = SimpleNamespace(tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=tokenizer)
    assert prompts.context_spans(three, "a red cat", ["cat", [5]]) == [[3, 80], [5]]
    two = SimpleNamespace(tokenizer=tokenizer, tokenizer_2=tokenizer)
    assert prompts.context_spans(two, "a red cat", ["cat"]) == [[3]]
    flux = FluxPipeline(tokenizer=None, tokenizer_2=tokenizer)
    assert prompts.text_streams(flux, 512) == [(tokenizer, 0, 512)]
    assert prompts.text_streams(two, 20) == [(tokenizer, 0, 20)]
    with pytest.raises(ValueError, match="beyond the 5 tokens"):
        prompts.context_spans(two, "a red cat and a dog", ["dog"], 5)
    with pytest.raises(TypeError, match="SimpleNamespace has no tokenizer"):
        prompts.context_spans(SimpleNamespace(), "a cat", ["cat"])
    with pytest.raises(TypeError, match="gives no offsets"):
        prompts.token_spans(SimpleNamespace(model_max_length=77), "a cat", ["cat"])


def test_t5_words(tmp_path):
    """A tokenizer of words and pieces without a token that begins the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = [("</s>", 0.0), ("<unk>", -9.0), ("▁a", -1.0), ("▁cir", -2.0), ("cle", -2.0), ("▁red", -2.0)]
    plain = Tokenizer(models.Unigram(vocab, unk_id=1))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    t5 = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", pad_token="</s>", model_max_length=10**30)
    assert prompts.token_spans(t5, "a red circle", ["circle", "red"]) == [[2, 3], [1]]
    assert prompts.token_spans(t5, "a red circle", ["red"], limit=3) == [[1]]
    with pytest.raises(ValueError, match="'circle' lies beyond the 4 tokens"):
        prompts.token_spans(t5, "a red circle", ["circle"], limit=4)


def test_noun_phrases():
    chunk = SimpleNamespace(noun_chunks=[SimpleNamespace(text="a red cat"), SimpleNamespace(text="it")])
    assert prompts.noun_phrases("a red cat and it", lambda text: chunk) == ["a red cat"]
    with pytest.raises(TypeError, match="parser must be a function"):
        prompts.noun_phrases("a cat", ["a cat"])
    with pytest.raises(TypeError, match="must give phrases"):
        prompts.noun_phrases("a cat", lambda text: [3])
    with pytest.raises(ValueError, match="'a green cat', which is not in the prompt"):
        prompts.noun_phrases("a red cat", lambda text: ["a green cat"])
    with pytest.raises(ValueError, match="empty word"):
        prompts.find("a cat", " ")


# ---- maps


def test_maps_against_loops():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 3, 4, 5, dtype=torch.float64)
    for index in ((0, 0), (1, 2)):
        x, y = a[index].flatten().tolist(), b[index].flatten().tolist()
        both, either = sum(map(min, x, y)), sum(map(max, x, y))
        assert maps.overlap(a, b)[index].item() == pytest.approx(both / (sum(x) + sum(y)), abs=1e-12)
        assert maps.iou(a, b)[index].item() == pytest.approx(both / either, abs=1e-12)
        p, q = [v / sum(x) for v in x], [v / sum(y) for v in y]
        m = [(u + v) / 2 for u, v in zip(p, q, strict=True)]
        kl = [sum(u * math.log(u / w) for u, w in zip(one, m, strict=True)) for one in (p, q)]
        assert maps.js(a, b)[index].item() == pytest.approx(sum(kl) / 2, abs=1e-9)
        dot = sum(u * v for u, v in zip(x, y, strict=True))
        norm = math.sqrt(sum(u * u for u in x) * sum(v * v for v in y))
        assert maps.cosine(a, b)[index].item() == pytest.approx(dot / norm, abs=1e-12)
    assert maps.js(a, a).abs().max() < 1e-12 and maps.iou(a, a).eq(1).all()
    assert (maps.js(a, b) <= math.log(2)).all()
    for how, high in (("sum", None), ("max", 1.0), ("range", 1.0)):
        got = maps.normalize(a, how)
        assert got.sum((-2, -1)).allclose(torch.ones(2, 3, dtype=torch.float64)) if high is None else got.max() == high
    assert maps.normalize(torch.zeros(2, 2)).eq(0).all()


def test_the_blur_is_a_gaussian():
    x = torch.zeros(1, 9, 9, dtype=torch.float64)
    x[0, 4, 4] = 1
    got = maps.smooth(x, 0.8, 5)
    at = torch.arange(5.0, dtype=torch.float64) - 2
    line = torch.exp(-(at**2) / (2 * 0.8**2))
    torch.testing.assert_close(got[0, 2:7, 2:7], torch.outer(line, line) / line.sum() ** 2)
    assert maps.smooth(torch.rand(2, 3, 6, 7)).shape == (2, 3, 6, 7)
    with pytest.raises(ValueError, match="kernel must be odd"):
        maps.smooth(x, kernel=4)
    with pytest.raises(ValueError, match="reach less far"):
        maps.smooth(x[:, :2], kernel=5)


def test_powers_of_attention_between_places():
    torch.manual_seed(0)
    text = torch.rand(2, 3, 2, 3, dtype=torch.float64)
    between = torch.rand(2, 6, 6, dtype=torch.float64).softmax(-1)  # query, key
    got = maps.refine(text, between.transpose(1, 2).unflatten(2, (2, 3)), 3)
    truth = torch.linalg.matrix_power(between, 3) @ text.flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, truth.transpose(1, 2).unflatten(2, (2, 3)))
    assert torch.equal(maps.refine(text, between.unflatten(2, (2, 3)), 0), text)
    with pytest.raises(ValueError, match="6 places"):
        maps.refine(text, torch.rand(2, 4, 2, 3, dtype=torch.float64))


def test_words_compete_and_keep_their_numbers():
    torch.manual_seed(0)
    text = torch.rand(6, 2, 2)
    got = maps.over_words(text)
    torch.testing.assert_close(got[1:5], (text[1:5] * 100).softmax(0))
    assert not got[[0, 5]].any()
    torch.testing.assert_close(maps.of_spans(got, [[1], [2, 3]])[1], got[2:4].mean(0))
    with pytest.raises(ValueError, match="leave nothing of 6 tokens"):
        maps.over_words(text, first=5)
    with pytest.raises(ValueError, match="tokens 0 to 5"):
        maps.of_spans(text, [[6]])
    soft = maps.soft_threshold(text, 0.5, 50.0)
    assert soft.min() == 0 and soft.max() == 1


@pytest.mark.parametrize("function", [maps.overlap, maps.iou, maps.js, maps.cosine])
def test_gradients_of_maps(function):
    torch.manual_seed(0)
    a, b = (torch.rand(2, 3, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(function, (a, b))
