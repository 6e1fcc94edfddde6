"""Where pairs come from: retrieved images, refilled answers, the model's own answers minimally revised."""

import pytest
import torch
from test_preference_training import FAMILIES, IMAGE, make, pairs_of, pixels

from attnlib.convert import preference
from attnlib.convert.preference import TruthJudge, refill, retrieve, revise, rollout
from attnlib.convert.preference.on_policy import items

hf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def a_tokenizer(words="what is there a cat dog mat red blue sits on the barks no yes . ,"):
    table = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words.split()])} | {"<image>": IMAGE}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Split(".", "isolated"),
         tokenizers.pre_tokenizers.Split(",", "isolated")]
    )  # fmt: skip
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


# --------------------------------------------------------------------------------------------------------------------
# Retrieval


def test_the_nearest_other_is_found_and_ties_go_to_the_earlier():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    found = retrieve(x, count=3)
    similar = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1).fill_diagonal_(-2)
    assert found.equal(similar.topk(3).indices) and not (found == torch.arange(7)[:, None]).any()
    assert retrieve(3 * x).equal(found[:, :1])  # lengths do not matter
    same = torch.ones(4, 3)
    assert retrieve(same).flatten().tolist() == [1, 0, 0, 0]
    assert retrieve(same[:1], same, count=4).tolist() == [[0, 1, 2, 3]]
    assert retrieve(x[2:3], x, own=torch.tensor([2])).equal(found[2:3, :1])
    assert retrieve(x[2:3], x).item() == 2
    copies = torch.cat([x[:1], x])
    assert retrieve(copies)[0].item() == 1 and retrieve(copies, apart=0.9999)[0].item() != 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(2, 3), torch.ones(0, 3)), "pool is empty"),
        ((torch.ones(1, 3),), "0 entries besides"),
        ((torch.ones(1, 3), torch.ones(2, 4)), "equal widths"),
        ((torch.full((2, 3), float("nan")),), "finite"),
        ((torch.ones(1, 3), torch.ones(2, 3), 3), "count=3"),
        ((torch.ones(1, 3), torch.ones(2, 3), 1, torch.tensor([2])), "places from -1 to 1"),
    ],
)
def test_bad_pools_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        retrieve(*given)


@FAMILIES
def test_neighbours_become_images(family):
    pairs = [preference.Preference(p.inputs, p.responses) for p in pairs_of(family)]
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    out = preference.with_neighbours(pairs, features)
    for i, place in enumerate([2, 2, 0]):
        assert out[i].images["retrieved"]["pixel_values"].equal(pairs[place].inputs["pixel_values"])
    made, recipe = preference.to_pairs(out, preference.rdpo())
    assert "1" in preference.Collator(recipe)(made)["rows"]
    other = preference.Preference({**pairs[2].inputs, "pixel_values": torch.zeros(1, 3, 9, 9)}, pairs[2].responses)
    with pytest.raises(ValueError, match="images of one size"):
        preference.with_neighbours([*pairs[:2], other], features)


# --------------------------------------------------------------------------------------------------------------------
# Refill


@FAMILIES
def test_masked_tokens_are_said_anew_and_all_others_stay(family):
    model, pairs = make(family), pairs_of(family, pad=2)
    answers = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10, 11]), torch.tensor([12, 13, 14])]
    masked = [torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1, 0]), torch.tensor([0, 0, 1])]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    said = refill(model, [p.inputs for p in pairs], answers, masked)
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())
    for pair, answer, where, out in zip(pairs, answers, masked, said, strict=True):
        assert out.shape == answer.shape and out[where == 0].equal(answer[where == 0])
        keep = pair.inputs["attention_mask"][0].bool()
        row = pair.inputs["input_ids"][0][keep]
        for t in range(len(answer)):  # the oracle: one token after the other, alone
            if where[t]:
                ids = torch.cat([row, out[:t]])[None]
                more = {k: v for k, v in pair.inputs.items() if k in ("pixel_values", "image_grid_thw")}
                if family == "qwen":
                    more["mm_token_type_ids"] = (ids == IMAGE).long()
                with torch.no_grad():
                    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0, -1]
                logits[[0, 1, IMAGE]] = -torch.inf
                if not (t and where[t - 1]):
                    logits[answer[t]] = -torch.inf
                assert logits[out[t]] > logits.max() - 1e-4
    assert all(len(s) == len(a) for s, a in zip(refill(model, [p.inputs for p in pairs], answers, masked, num_beams=3),
                                                answers, strict=True))  # fmt: skip
    filled = preference.refill_pairs(model, pairs, [torch.ones(2 + i) for i in range(3)], batch_size=2)
    made, _ = preference.to_pairs(filled, preference.rdpo(), vocabulary=64)
    assert [len(p.responses["rejected"]) for p in made] == [2, 3, 4]


def test_what_cannot_be_refilled_is_refused():
    model, pairs = make("llava"), pairs_of("llava", 1)
    inputs = [pairs[0].inputs]
    for answers, masked, message in (
        ([[3, 4]], [[0, 0]], "masks nothing"), ([[3, 4]], [[1]], "of the 2 tokens"), ([[]], [[]], "of the 0 tokens"),
        ([], [], "equally many"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            refill(model, inputs, answers, masked)
    bare = [preference.Preference(p.inputs, p.responses) for p in pairs]
    with pytest.raises(ValueError, match="lacks the image 'retrieved'"):
        preference.refill_pairs(model, bare, [[1]])


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(prompt="{question} {answer}"), ValueError, r"prompt holds \{answer\}.*possible are \{question\} and"),
        (dict(prompt="{question}"), ValueError, r"prompt must hold \{masked\}"),
        (dict(prompt="{masked"), ValueError, "prompt cannot be filled in"),
        (dict(prompt=3), TypeError, "prompt must be a text"),
        (dict(question=None), TypeError, "question must be str, got None"),
        (dict(masked=None), TypeError, "masked must be str, got None"),
        (dict(complete=None), TypeError, "complete must be a callable"),
    ],
)
def test_what_cannot_be_asked_in_words_is_refused(change, error, words):
    given = {"complete": lambda image, prompt: "a cat", "image": None, "question": "What?", "masked": "a [MASK]"}
    assert preference.refill_text(**given, prompt="{masked}") == "a cat"
    with pytest.raises(error, match=words):
        preference.refill_text(**{**given, **change})


def test_words_are_masked_in_text_and_in_tokens():
    tokenizer = a_tokenizer()
    ids, masked = preference.mask_tokens(tokenizer, "a red cat sits on the mat.", ["mat", "red"])
    assert tokenizer.decode(ids[masked]) == "red mat" and ids[-1] == 1 and len(ids) == 9
    assert preference.mask_words("a red cat, reddish", ["red"]) == "a [MASK] cat, reddish"
    seen = []

    def complete(image, prompt):
        seen.append((image, prompt))
        return " a blue cat "

    assert preference.refill_text(complete, "v", "what?", "a [MASK] cat") == "a blue cat"
    assert seen[0][0] == "v" and "a [MASK] cat" in seen[0][1]
    for call, message in (
        (lambda: preference.mask_words("a cat", ["dog"]), "none of the words"),
        (lambda: preference.mask_words("a cat", []), "words is empty"),
        (lambda: preference.mask_tokens(tokenizer, "a cat", ["dog"]), "none of the words"),
        (lambda: preference.refill_text(complete, "v", "q", "a cat"), "no .MASK."),
        (lambda: preference.refill_text(lambda *_: "", "v", "q", "[MASK]"), "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --------------------------------------------------------------------------------------------------------------------
# On-policy answers


@FAMILIES
def test_rollouts_in_a_batch_are_those_of_each_alone(family):
    model, pairs = make(family), pairs_of(family, pad=2)
    together = rollout(model, [p.inputs for p in pairs], 5, batch_size=3)
    for pair, said in zip(pairs, together, strict=True):
        assert said.equal(rollout(model, [pair.inputs], 5)[0]) and len(said) == 5
    stop = int(together[0][2])
    ended = rollout(model, [p.inputs for p in pairs], 5, eos_token_id=stop)
    assert ended[0][-1] == stop and len(ended[0]) <= 3
    assert len(rollout(model, [p.inputs for p in pairs], 3, num_beams=2)) == 3
    with pytest.raises(ValueError, match="inputs is empty"):
        rollout(model, [])


def test_an_answer_is_revised_by_what_is_there():
    judge = TruthJudge({"cat", "mat"}, {"cat", "dog", "mat"}, {"dog": "the cat sits."})
    segments = revise("a cat sits on the mat. the dog barks.", judge)
    assert [s.score for s in segments] == [4, 1] and segments[1].revised == "the cat sits."
    tokenizer = a_tokenizer()
    responses, weights = preference.encode_revision(tokenizer, segments)
    assert tokenizer.decode(responses["chosen"]) == "a cat sits on the mat . the cat sits . <eos>"
    assert tokenizer.decode(responses["rejected"]) == "a cat sits on the mat . the dog barks . <eos>"
    assert weights["severity"]["chosen"] == [1.0] * 7 + [2.5] * 5
    assert weights["severity"]["rejected"] == [1.0] * 7 + [2.5] * 4 + [0.0]
    assert weights["image"]["chosen"] == [1.0] * 7 + [3.0] * 5
    listed = revise("a cat, a dog, a mat", TruthJudge({"cat", "mat"}, {"cat", "dog", "mat"}), items)
    assert " ".join(s.revised for s in listed if s.revised) == "a cat, a mat"


def test_bad_revisions_are_refused():
    def removes(sentence):
        return preference.Segment(sentence, "")

    with pytest.raises(ValueError, match="answer is empty"):
        revise(" ", removes)
    with pytest.raises(ValueError, match="nothing of the answer is left"):
        revise("a cat.", removes)
    with pytest.raises(TypeError, match="judge's answer"):
        revise("a cat.", str)
    with pytest.raises(ValueError, match="score=5"):
        preference.Segment("a", "b", 5)
    with pytest.raises(ValueError, match="error="):
        preference.Segment("a", "b", 1, "typo")
    with pytest.raises(ValueError, match="rejected answer is empty"):
        preference.encode_revision(a_tokenizer(), [preference.Segment("", "a cat")])


def test_pairs_of_the_models_own_answers_train_it():
    """Roll-out, revision, alignment and preference in one go."""
    tokenizer, model = a_tokenizer(), make("llava")

    class Processor:
        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, text, images=None, return_tensors="pt"):
            text = text.replace("<image>", "<image> " * 4)
            return {**tokenizer(text, return_tensors=return_tensors), "pixel_values": images}

    examples = [
        {"prompt": "<image> what is there", "image": pixels("llava", i)["pixel_values"], "standard": f"a {word} ."}
        for i, word in enumerate(["cat", "dog"])
    ]

    def judge(sentence):
        return preference.Segment(sentence, "a cat.", 1, "image_recognition_error")

    pairs = preference.on_policy_pairs(
        model, Processor(), examples, judge, max_new_tokens=4, suppress_tokens=[0, *range(20, 64)]
    )
    assert len(pairs) == 2 and all(set(p.responses) == {"chosen", "rejected", "standard"} for p in pairs)
    assert all(set(w) == {2.5} for w in (pairs[0].weights["severity"]["chosen"],))
    out = preference.train(model, pairs, "opa-dpo", steps=1, align_steps=1, rank=2, batch_size=2)
    assert len(out.terms) == 8 and out.history[0]["revised"] == pytest.approx(0.693147, abs=1e-5)
    same = preference.on_policy_pairs(
        out.restore(), Processor(), examples, lambda s: preference.Segment(s, s), max_new_tokens=2,
        suppress_tokens=[0, *range(20, 64)],
    )  # fmt: skip
    assert same == []


@pytest.mark.parametrize("call,error,word", [
    (lambda: preference.mask_patches(torch.rand(4, 12), (3, 1, 2, 2), 2), ValueError, "ratio must be"),
    (lambda: preference.mask_patches(torch.rand(4, 12), (3, 2, 2)), ValueError, "patch=.* names 3 axes"),
    (lambda: preference.to_pairs([{"input_ids": [1]}], "dpo"), TypeError, "recipe must be Recipe, got 'dpo'"),
    (lambda: preference.to_pairs([{"input_ids": [1], "chosen": ["a"], "rejected": [2]}], preference.dpo()), TypeError,
     r"response 'chosen' of pairs\[0\] must be token ids"),
    (lambda: preference.revise("a.", None), TypeError, "judge must be a callable"),
    (lambda: preference.mask_words("a", [3]), TypeError, r"words\[0\] must be str, got 3"),
    (lambda: preference.opa_dpo(anchor_signs=1), TypeError, "anchor_signs must be a sequence"),
    (lambda: preference.opa_dpo(image_coefficient=-1), ValueError, "image_coefficient must be"),
    (lambda: preference.opa_dpo(padded_to=896), ValueError, 'padded_to=896 is of compat="authors" alone'),
    (lambda: preference.Recipe(preference.dpo().terms, optional="standard"), TypeError, "optional must be a sequence"),
])  # fmt: skip
def test_what_is_wrong_is_named(call, error, word):
    with pytest.raises(error, match=word):
        call()


def test_words_may_be_drawn_once():
    assert preference.mask_words("a cat", iter(["cat"])) == "a [MASK]"
