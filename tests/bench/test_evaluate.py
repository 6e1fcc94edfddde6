"""Items, answers, parsers, scores; language models in left-padded batches; the statistics of a difference."""

import json
import math

import numpy as np
import pytest
import torch

from attnlib.bench import stats
from attnlib.bench.data.files import DataError
from attnlib.bench.evaluate import (
    Item,
    Speaker,
    evaluate,
    first_match,
    local_seed,
    option_difference,
    read_answers,
    user_file,
)

ITEMS = [
    Item(f"i{n}", f"is {n} even?", str(n % 2 == 0), {"kind": ("even", "odd")[n % 2]}, ("True", "False"))
    for n in range(6)
]


def even(prompts):
    return ["True" if int(p.split()[1]) % 2 == 0 else "False" for p in prompts]


def test_oracle_constant_and_unreadable_answers():
    assert evaluate(ITEMS, even, batch=4).mean("right") == 1
    constant = evaluate(ITEMS, lambda prompts: ["true"] * len(prompts))
    assert constant.where(kind="even").mean("right") == 1 and constant.where(kind="odd").mean("right") == 0
    mixed = evaluate(
        ITEMS, {i.id: "True or False" if i.id == "i0" else "Truest" if i.id == "i1" else "False" for i in ITEMS}
    )
    assert mixed.unreadable == 2 and mixed.answers[0].scores is None and "2 of the options" in mixed.answers[0].reason
    assert mixed.mean("right") == 0.5 and mixed.mean("right", unreadable="wrong") == pytest.approx(2 / 6)
    rows = mixed.table("kind")
    assert [(r["kind"], r["n"], r["unreadable"]) for r in rows] == [("even", 3, 1), ("odd", 3, 1)]
    assert rows[1]["right"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    nothing = evaluate(ITEMS, lambda p: [""])
    assert math.isnan(nothing.mean("right")) and nothing.table()[0]["unreadable"] == 6


def test_goes_on_from_a_file_also_cut_off(tmp_path):
    keep, asked = tmp_path / "answers.jsonl", []

    def model(prompts):
        asked.extend(prompts)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return even(prompts)

    with pytest.raises(KeyboardInterrupt):
        evaluate(ITEMS, model, keep=keep)
    with keep.open("a") as file:
        file.write('{"mark": "half')
    later = []
    found = evaluate(ITEMS, lambda prompts: later.extend(prompts) or even(prompts), keep=keep)
    assert found.mean("right") == 1 and later == [i.prompt for i in ITEMS[4:]]
    evaluate(ITEMS, lambda prompts: pytest.fail("asked again"), keep=keep)
    other = []
    evaluate(ITEMS, lambda prompts: other.extend(prompts) or even(prompts), keep=keep, key="another model")
    assert len(other) == 6


def test_seeds_are_the_items_own():
    def model(prompts, seeds):
        return [str(s) for s in seeds]

    one = evaluate(ITEMS, model, first_match(r"\d+")).scores
    said = {a.item.id: a.text for a in evaluate(ITEMS, model, first_match(r"\d+")).answers}
    turned = {a.item.id: a.text for a in evaluate(ITEMS[::-1], model, first_match(r"\d+"), batch=4).answers}
    assert said == turned and len(set(said.values())) == 6 and callable(one)
    assert local_seed(0, "a") != local_seed(1, "a")
    before = torch.random.get_rng_state()
    evaluate(ITEMS, even)
    assert torch.equal(before, torch.random.get_rng_state())


def test_files_of_answers(tmp_path):
    answers = dict(zip((i.id for i in ITEMS), even([i.prompt for i in ITEMS]), strict=True))
    (tmp_path / "a.json").write_text(json.dumps(answers))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": k, "answer": v}) for k, v in answers.items()))
    for name in ("a.json", "a.jsonl"):
        assert evaluate(ITEMS, tmp_path / name).mean("right") == 1
        assert evaluate(ITEMS, str(tmp_path / name)).mean("right") == 1
    (tmp_path / "b.jsonl").write_text('{"id": "x", "answer": "1"}\n' * 2)
    with pytest.raises(DataError, match="more than once"):
        read_answers(tmp_path / "b.jsonl")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(DataError, match="neither JSON"):
        read_answers(tmp_path / "c.json")
    with pytest.raises(DataError, match=r"lacks walls.json, the walls"):
        user_file(tmp_path, "walls.json", "the walls")


@pytest.mark.parametrize(
    "change,error,word",
    [
        (dict(items=[ITEMS[0], ITEMS[0]]), ValueError, "ids of their own.*i0"),
        (dict(model={"i0": "True"}), ValueError, "no answers to 5 of 6"),
        (dict(model="nowhere.json"), DataError, "does not exist"),
        (dict(model=3), TypeError, "model must be a callable"),
        (dict(model=lambda prompts: []), ValueError, "answer every prompt"),
        (dict(batch=0), ValueError, "batch"),
    ],
)
def test_bad_input(change, error, word):
    with pytest.raises(error, match=word):
        evaluate(**{"items": ITEMS, "model": even, **change})


# ---- language models


@pytest.fixture(scope="module")
def speaker():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<end>", "<unk>", *"abcdefghij", "True", "False", "a" * 2]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", unk_token="<unk>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return Speaker(model, tokenizer, new_tokens=6)


PROMPTS = ["a b c", "d", "e f g h i j a b", "c c"]


def test_left_padded_batches_equal_single_ones(speaker):
    alone = [speaker.options([p], [["True", "False a"]], batch=1)[0] for p in PROMPTS]
    together = speaker.options(PROMPTS, [["True", "False a"]] * 4, batch=8)
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert np.ptp(np.asarray(alone), axis=0).min() > 0.05  # and they do differ by prompt
    assert speaker(PROMPTS) == [speaker([p])[0] for p in PROMPTS]
    warm = Speaker(speaker.model, speaker.tokenizer, 6, temperature=1.0)
    assert warm(PROMPTS, seeds=[1, 2, 3, 4]) == [warm([p], seeds=[s])[0] for p, s in zip(PROMPTS, (1, 2, 3, 4))]  # noqa: B905
    assert speaker([]) == []


def test_answers_are_those_of_generate(speaker):
    ids = speaker.padded([speaker.ids("e f g")])
    made = speaker.model.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=6, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert speaker(["e f g"]) == [speaker.tokenizer.decode(made[0, 3:], skip_special_tokens=True)]


def test_option_difference_is_that_of_the_softmax(speaker):
    logits = speaker.model(torch.tensor([speaker.ids("a b")])).logits[0, -1].double().softmax(-1)
    t, f = (speaker.tokenizer.convert_tokens_to_ids(w) for w in ("True", "False"))
    found = speaker.options(["a b"], [["True", "False"]])[0]
    assert option_difference(found, 0) == pytest.approx(float(logits[t] - logits[f]), abs=1e-6)
    # several tokens: the chain rule
    two = speaker.options(["a b"], [["True c"]])[0][0]
    then = speaker.model(torch.tensor([speaker.ids("a b True")])).logits[0, -1].double().log_softmax(-1)
    assert two == pytest.approx(float(logits[t].log() + then[speaker.tokenizer.convert_tokens_to_ids("c")]), abs=1e-5)
    with pytest.raises(ValueError, match="right=2"):
        option_difference([0.0, 0.0], 2)


def test_chat_asks_for_the_assistants_turn(speaker):
    with pytest.raises(ValueError, match="chat template"):
        Speaker(speaker.model, speaker.tokenizer, chat=True)
    import copy

    tokenizer = copy.deepcopy(speaker.tokenizer)
    tokenizer.chat_template = "a {{ messages[0]['content'] }}{% if add_generation_prompt %} j{% endif %}"
    chatting = Speaker(speaker.model, tokenizer, chat=True)
    assert chatting.tokenizer.convert_ids_to_tokens(chatting.ids("b")) == ["a", "b", "j"]
    with pytest.raises(ValueError, match="seeds"):
        Speaker(speaker.model, tokenizer, temperature=0.5)(["a"])
    with pytest.raises(ValueError, match="at least one token"):
        speaker([""])


# ---- statistics


def test_permutation_p_is_the_exact_one():
    gaps = [0.5, 1.0, -0.25, 2.0, 0.75]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    means = (signs * gaps).mean(1)
    wanted = float((np.abs(means) >= abs(np.mean(gaps)) - 1e-12).mean())
    assert stats.permutation_p(gaps, [0] * 5) == pytest.approx(wanted)
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    assert stats.permutation_p(a, a) == 1.0
    assert stats.permutation_p(a + 1, rng.normal(size=40)) < 0.01
    assert stats.permutation_p(a, a[::-1], seed=3) == stats.permutation_p(a, a[::-1], seed=3)
    for bad in (([1.0], [1.0, 2.0]), ([], []), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match="a and b"):
            stats.permutation_p(*bad)


def test_bootstrap_draws_items_whole():
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    low, high = stats.bootstrap_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(200), rel=0.15)
    # ten copies of each are no more evidence, which drawing single scores would claim
    copies, names = np.repeat(values, 10), np.repeat(np.arange(200), 10)
    wide, narrow = stats.bootstrap_interval(copies, items=names), stats.bootstrap_interval(copies)
    assert np.subtract(*wide) == pytest.approx(low - high, rel=1e-9)
    assert np.subtract(*narrow) / np.subtract(*wide) == pytest.approx(1 / math.sqrt(10), rel=0.2)
    with pytest.raises(ValueError, match="items"):
        stats.bootstrap_interval([1.0], items=[1, 2])


def test_other_statistics():
    assert np.round(stats.wilson(126, 4000), 4).tolist() == [0.0265, 0.0374]
    for k in (0, 7):
        low, high = stats.wilson(k, 7)
        assert 0 <= low < high <= 1
    p = [0.01, 0.04, 0.03, 0.005, 0.5]  # sorted, k alpha / 5: .01 .02 .03 .04 .05
    assert stats.benjamini_hochberg(p, 0.05) == [True, True, True, True, False]
    assert stats.holm(p, 0.05) == [True, False, False, True, False]
    assert stats.benjamini_hochberg([], 0.05) == []
    assert stats.binomial_p(5, 10, 0.5) == pytest.approx(1.0)
    assert stats.fisher_p((8, 1), (10, 6)) == pytest.approx(0.0350, abs=1e-4)
    assert stats.kappa("aabb", "aabb") == 1 and stats.kappa("aabb", "abab") == 0 and math.isnan(stats.kappa("aa", "aa"))
    rng = np.random.default_rng(0)
    assert abs(stats.kappa(rng.integers(3, size=4000).tolist(), rng.integers(3, size=4000).tolist())) < 0.05
    assert stats.kappa([1, 1, 0, 0, 1], [1, 0, 0, 0, 1]) == pytest.approx((0.8 - 0.48) / 0.52)
    for call in (
        lambda: stats.kappa([1], []),
        lambda: stats.fisher_p((3, 1), (2, 1)),
        lambda: stats.benjamini_hochberg([0.1], 1),
    ):
        with pytest.raises(ValueError):
            call()
