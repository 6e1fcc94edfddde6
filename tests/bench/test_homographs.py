"""Words of two languages: three tasks, baselines that say what they reveal, tables of our own and of the authors."""

import math
from collections import Counter

import pytest

from attnlib.bench.data.files import DataError
from attnlib.bench.evaluate import Item, evaluate
from attnlib.bench.exams import homographs as words
from attnlib.bench.exams.homographs import TYPES


def by_type(found):
    return [found.where(type=t).mean("right") for t in TYPES]


@pytest.fixture(params=["es", "de"])
def pairs(request):
    return words.own_words(request.param)


def test_baselines(pairs):
    first, second = words.same_meaning(pairs), words.which_meaning(pairs)
    assert by_type(evaluate(first, words.oracle(first))) == by_type(evaluate(second, words.oracle(second))) == [1, 1, 1]
    assert by_type(evaluate(first, words.constant(first, "True"))) == [1, 1, 0]
    assert evaluate(second, words.constant(second, "1")).mean("right") == 0.5
    # form alone: right on cognates, wrong on both others, which is what the exam is to reveal
    assert by_type(evaluate(first, words.form_only(first))) == [1, 0, 0]


def test_form_is_letters_with_accents():
    pairs = [words.Pair(t, {"en": a, "fr": b}, "cognate", {"en": "x", "fr": "x"}, {"en": "y", "fr": "y"})
             for t, a, b in (("1", "ocean", "océan"), ("2", "Radio", "radio"), ("3", "fruit", "fruta"))]  # fmt: skip
    items = words.same_meaning(pairs, shots=0)
    assert list(words.form_only(items).values()) == ["False", "True", "False"]
    assert list(words.form_only(items, exact=False).values()) == ["True"] * 3
    with pytest.raises(ValueError, match="of task 1"):
        words.form_only(words.which_meaning(words.own_words(), shots=0))


def test_seeds_decide_prompts_and_options_are_balanced(pairs):
    for task in (words.same_meaning, words.which_meaning):
        assert task(pairs, seed=1) == task(pairs, seed=1)
        assert [i.prompt for i in task(pairs, seed=1)] != [i.prompt for i in task(pairs, seed=2)]
    for seed in range(5):
        items = words.which_meaning(pairs, seed=seed)
        for lang in pairs[0].words:
            assert Counter(i.answer for i in items if i.groups["language"] == lang) == {"1": 6, "2": 6}
        for item in items:  # the number is that of the right meaning
            pair = next(p for p in pairs if p.id == item.groups["pair"])
            asked = item.prompt.rsplit("What does", 1)[1]
            assert f"{item.answer}. {pair.meanings[item.groups['language']]}\n" in asked
            assert pair.wrong[item.groups["language"]] in asked


def test_what_is_shown_is_not_asked(pairs):
    items = words.same_meaning(pairs, shots=2, seed=3)
    shown, asked = words.split(pairs, 2, 3)
    assert Counter(p.type for p in shown) == dict.fromkeys(TYPES, 2) and {i.id for i in items} == {p.id for p in asked}
    solved = items[0].prompt.count("-> True") + items[0].prompt.count("-> False")
    assert solved == 4  # no translations, as the authors have it
    every = words.same_meaning(pairs, shots=2, seed=3, shown_types=TYPES)[0].prompt
    assert every.count("-> True") == 4 and every.count("-> False") == 2
    assert which_solved(words.which_meaning(pairs, shots=2)) == 4  # two languages, half of them
    with pytest.raises(ValueError, match="shots=8 leaves nothing"):
        words.same_meaning(pairs, shots=8)


def which_solved(items):
    return items[0].prompt.count("Answer: ")


def test_wrong_meanings(pairs):
    for p in pairs:
        assert all(p.wrong[g] != p.meanings[g] for g in p.words)
        if p.type == "homograph":
            assert p.wrong == {"en": p.meanings[p.other], p.other: p.meanings["en"]}
            assert words.edits(p.words["en"].lower(), p.words[p.other].lower()) == 0


def test_sentences(pairs):
    plain, cross = words.in_sentence(pairs), words.in_sentence(pairs, cross=True)
    assert len(plain) == len(cross) == 3 * 2 * 2 and not any("<MASK>" in i.prompt for i in plain)
    assert Counter(i.groups["type"] for i in plain) == dict.fromkeys(TYPES, 4)
    assert {i.answer["sense"] for i in plain} == {"yes"}
    assert {i.groups["type"] for i in cross if i.answer["sense"] == "no"} == {"homograph"}
    for item in cross:
        assert item.answer["language"] != words.LANGUAGES[item.groups["language"]]
    said = {i.id: f"A1: {i.answer['language']}\nA2: {i.answer['meaning']}\nA3: {i.answer['sense']}, yes" for i in cross}
    said[cross[0].id] = "It is Spanish."
    found = evaluate(cross, said, words.parse_three, words.score_three(lambda a, b: float(a == b)))
    assert found.unreadable == 1 and [found.mean(m) for m in ("language", "sense", "meaning")] == [1, 1, 1]
    assert "meaning" not in evaluate(cross[1:], said, words.parse_three, words.score_three()).answers[0].scores
    with pytest.raises(ValueError, match="some with sentences"):
        words.in_sentence([p for p in pairs if not p.sentences])


def test_tables_of_the_users_folder(tmp_path):
    with pytest.raises(DataError, match=r"lacks en_fr_dataset\.csv.*nothing is downloaded"):
        words.load_words(tmp_path, "fr")
    table = tmp_path / "en_fr_dataset.csv"
    table.write_text(
        "ID,en,en_meaning,fr,fr_meaning,type,lexical_category\n1,fruit,sweet food,fruit,a food,COGNATE,N\n"
        "2,coin,a piece of money,coin,an angle,FALSE COGNATE,N\n3,dog,it barks,chien,a pet,NON COGNATE,N\n"
    )
    pairs = words.load_words(tmp_path, "fr")
    assert [p.type for p in pairs] == ["cognate", "homograph", "translation"] and not pairs[0].sentences
    assert pairs[1].wrong == {"en": "an angle", "fr": "a piece of money"}
    (tmp_path / "task3_en_fr.csv").write_text(
        "ID,en,fr,type,low_en,high_en,low_fr,high_fr\n"
        "2,coin,coin,FALSE COGNATE,A <MASK>.,Pay by <MASK>.,Le <MASK>.,Au <MASK>.\n"
    )
    assert len(words.in_sentence(words.load_words(tmp_path, "fr"))) == 4
    table.write_text("ID,en\n1,a\n")
    with pytest.raises(DataError, match="lacks the columns"):
        words.load_words(tmp_path, "fr")
    table.write_text("ID,en,en_meaning,fr,fr_meaning,type\n1,a,b,c,d,OTHER\n")
    with pytest.raises(DataError, match=r"types \['OTHER'\]"):
        words.load_words(tmp_path, "fr")


def test_link_of_the_tasks():
    pairs = words.own_words()
    first, second = words.same_meaning(pairs, shots=0), words.which_meaning(pairs, shots=0)
    right = {i.id: i.answer if i.groups["type"] != "homograph" else "True" for i in first}
    other = {"1": "2", "2": "1"}
    linked = {i.id: i.answer if i.groups["type"] != "homograph" else other[i.answer] for i in second}
    assert words.link(evaluate(first, right), evaluate(second, linked)) == pytest.approx(1)
    assert math.isnan(words.link(evaluate(first, words.oracle(first)), evaluate(second, linked)))
    with pytest.raises(ValueError, match="share at least two"):
        words.link(evaluate([Item("x", "", "1")], {"x": "1"}, lambda t, i: t), evaluate(second, linked))


def test_bad_names():
    with pytest.raises(ValueError, match="language"):
        words.own_words("fr")
    with pytest.raises(ValueError, match="shown_types"):
        words.same_meaning(words.own_words(), shown_types=["COGNATE"])
