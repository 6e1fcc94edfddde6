"""Schemas, strict parsers, judges that are asked once, and summaries."""

import json
import math

import pytest

from attnlib.bench import judge as J
from attnlib.bench.data.files import DataError
from attnlib.bench.evaluate import Item, Unreadable, evaluate
from attnlib.bench.judge import Judge, conform, option, read_json, read_lines, summarise, yes_no
from attnlib.bench.stats import above_chance, paired_bootstrap
from attnlib.bench.store import Lines

OPTIONS = ["a red ball", "two dogs", "the blue car", "nothing"]


@pytest.mark.parametrize(
    "text,wanted",
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("b)", 1), ("[B]", 1), ("**B**", 1), (" B \n", 1), ("B:", 1),
        ("(B) two dogs", 1), ("B. two dogs", 1), ("two dogs", 1), ("Two dogs.", 1), ("TWO  DOGS", 1),
        ("The answer is b.", 1), ("the answer is (B)", 1), ("Answer: B", 1), ("My answer is B", 1), ("Option B", 1),
        ("I see a red ball, but the answer is (B).", 1), ("I think that there are two dogs here.", 1),
        ("Therefore the correct answer is B, since (A) is wrong.", 1), ("So I choose (D).", 3),
        ("A red ball", 0), ("A", 0), ("(A) a red ball", 0), ("The answer is A.", 0),
        ("Therefore, the correct action is (C) the blue car", 2), ("the answer is: two dogs", 1),
    ],
)  # fmt: skip
def test_options_are_read(text, wanted):
    assert option(text, OPTIONS) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "   ", "E", "(E)", "Who knows?", "A or B", "(A) or (B)", "a red ball and two dogs", "the answer is F",
     "Apples", "Because it rains", "A dog runs", "x" * 10_000, "()", "the answer is a matter of taste"],
)  # fmt: skip
def test_garbage_is_unreadable(text):
    with pytest.raises(Unreadable):
        option(text, OPTIONS)


def test_longer_options_hide_shorter_ones_within():
    words = ["red", "dark red", "not red at all"]
    assert option("it is dark red", words) == 1 and option("red", words) == 0
    assert option("clearly not red at all!", words) == 2
    assert option("There are 3.", ["3", "2", "13"]) == 0 and option("13", ["3", "2", "13"]) == 2
    for bad in (["x"], ["x", "X."], ["x", ""], [str(i) for i in range(30)]):
        with pytest.raises(ValueError, match="options must be"):
            option("x", bad)


@pytest.mark.parametrize("text,value", [
    ("yes", True), ("Yes.", True), ("YES, there is", True), ("no", False), ("No!", False), ("The answer is no.", False),
    ("Answer: Yes", True), ("**No**", False), ("n/a", None), ("No, yes would be wrong", False),
])  # fmt: skip
def test_yes_no(text, value):
    assert yes_no(text, {"n/a": None}) is value


@pytest.mark.parametrize(
    "text",
    ["", "nothing", "not sure", "yesterday", "maybe", "yes and no", "yes or no", "no/yes", "yes\nno", "No. Yes."],
)
def test_no_yes_no(text):
    with pytest.raises(Unreadable):
        yes_no(text)


def test_json_is_parsed_and_never_run(tmp_path):
    schema = {"score": {0, 1}, "why": str}
    assert read_json('{"score": 1, "why": "x"}', schema) == {"score": 1, "why": "x"}
    assert read_json('```json\n{"score": 0, "why": ""}\n```', schema)["score"] == 0
    assert read_json("[1, 2]", [int]) == [1, 2] and read_json("2", float) == 2
    file = tmp_path / "touched"
    for bad in (
        f"__import__('pathlib').Path({str(file)!r}).touch()", "{'score': 1, 'why': 'x'}", '{"score": 1}', "nan", "NaN",
        '{"score": 2, "why": "x"}', '{"score": true, "why": "x"}', '{"score": 1, "score": 0, "why": "x"}', "", "[" * 10**5,  # noqa: E501
        'Sure: {"score": 1, "why": "x"}', '{"score": "1", "why": "x"}', '[{"score": 1, "why": "x"}]', '{"score": 1.0, "why": ""}',  # noqa: E501
    ):  # fmt: skip
        with pytest.raises(Unreadable):
            read_json(bad, schema)
    assert not file.exists()


def test_lines():
    assert read_lines("a: 1\n B  c : 2:3\r\n\n", ["A", ("d", "b c")]) == ["1", "2:3"]
    for bad in ("a: 1", "a: 1\nb c: 2\nmore", "b c: 2\na: 1", "a 1\nb c: 2", ""):
        with pytest.raises(Unreadable):
            read_lines(bad, ["a", "b c"])


@pytest.mark.parametrize("value,schema,word", [
    ([1], {"a": int}, "mapping with"), ({"a": 1}, {"a": int, "b": str}, r"lacks \['b'\]"), (True, int, "must be int"),
    ({"a": [1, "x"]}, {"a": [int]}, r"v\['a'\]\[1\] must be int, got 'x'"), (3, {1, 2}, r"one of \[1, 2\]"),
    (math.nan, float, "finite"), ("x", (int, float), "one of the kinds"), ("ab", [str], "must be a list"),
])  # fmt: skip
def test_schema_says_where(value, schema, word):
    with pytest.raises(ValueError, match=word):
        conform(value, schema, "v")
    assert conform(1, float) == 1 and conform(2, (str, int)) == 2 and conform({}, {"a": int}, optional=["a"]) == {}


def test_records(tmp_path):
    (tmp_path / "a.json").write_text('[{"x": 1}, {"x": 2, "y": "z"}]')
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"x": 2, "y": "z"}\n')
    for name in ("a.json", "a.jsonl"):
        assert J.read_records(tmp_path / name, {"x": int}, "things") == [{"x": 1}, {"x": 2, "y": "z"}]
    with pytest.raises(DataError, match="does not exist: things; nothing is downloaded"):
        J.read_records(tmp_path / "b.json", {"x": int}, "things")
    for text, word in (("{", "Expecting"), ("{}", "must be a list"), ('[{"x": "1"}]', r"record 0\['x'\] must be int")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(DataError, match=word):
            J.read_records(tmp_path / "c.json", {"x": int}, "things")


def test_a_judge_is_asked_once_and_again_only_when_unreadable(tmp_path):
    asked, keep = [], tmp_path / "said.jsonl"

    def call(prompts, seeds):
        asked.extend(zip(prompts, seeds, strict=True))
        return ["hm" if p == "p1" and len(asked) < 3 else "never" if p == "p2" else "yes" for p in prompts]

    judge = Judge(call, "j-1", yes_no, tries=2, keep=keep, batch=2)
    found = judge(["p0", "p1", "p2", "p0"])
    assert [j.value for j in found] == [True, True, None, True] and found[2].tries == 2 and not found[2].read
    assert "must begin" in found[2].reason and found[2].text == "never"
    assert [p for p, _ in asked] == ["p0", "p1", "p2", "p1", "p2"] and len(set(asked)) == 5  # another seed each time
    again = Judge(lambda prompts: pytest.fail("asked again"), "j-1", yes_no, tries=2, keep=keep)
    assert again(["p2", "p1", "p0"]) == [found[2], found[1], found[0]] and again.calls == 0
    with keep.open("a") as file:
        file.write('{"judge": "cut o')
    other = Judge(lambda prompts: ["no"] * len(prompts), "j-2", yes_no, keep=keep)
    assert [j.value for j in other(["p0"])] == [False] and other.calls == 1
    rows = [json.loads(line) for line in keep.read_text().splitlines()]
    assert {r["judge"] for r in rows} == {"j-1", "j-2"} and all(r["prompt"] and r["answer"] for r in rows)
    assert Judge(call, "j-3", yes_no)([]) == []


@pytest.mark.parametrize("change,error,word", [
    (dict(call=None), ValueError, "call must be given.*none by default"), (dict(call=3), TypeError, "callable"),
    (dict(id=""), ValueError, "id must not be empty"), (dict(id=None), TypeError, "id"),
    (dict(parse=1), TypeError, "parse"), (dict(tries=0), ValueError, "tries"), (dict(batch=True), TypeError, "batch"),
])  # fmt: skip
def test_bad_judges(change, error, word):
    with pytest.raises(error, match=word):
        Judge(**{"call": lambda p: p, "id": "x", "parse": yes_no, **change})


def test_judges_that_answer_wrongly():
    with pytest.raises(ValueError, match="'x' must answer every prompt, got 0"):
        Judge(lambda p: [], "x", yes_no)(["p"])
    with pytest.raises(TypeError, match="an answer of the judge 'x' must be str"):
        Judge(lambda p: [None], "x", yes_no)(["p"])
    with pytest.raises(TypeError, match="prompts must be a sequence"):
        Judge(lambda p: p, "x", yes_no)("p")

    def broken(text):
        raise KeyError("a slip of the parser is no unreadable answer")

    with pytest.raises(KeyError):
        Judge(lambda p: p, "x", broken)(["p"])


def test_summaries():
    items = [Item(f"i{n}", f"p{n}", "x", {"image": str(n // 2)}, ("x", "y", "z", "w")) for n in range(8)]
    answers = {i.id: "x" if n < 4 else "y" if n < 6 else "?" for n, i in enumerate(items)}
    found = evaluate(items, answers, J.read_option)
    all_of, read = summarise(found), summarise(found, unreadable="apart")
    assert (all_of.n, all_of.read, all_of.coverage, all_of.unreadable) == (8, 6, 0.75, 0.25)
    assert all_of.share == 0.5 and all_of.chance == 0.25 and all_of.above == pytest.approx(1 / 3)
    assert read.share == pytest.approx(4 / 6) and all_of.low < 0.5 < all_of.high
    wide = summarise(found, by_image=False)
    assert wide.high - wide.low < all_of.high - all_of.low  # two questions on one image are not independent
    nothing = summarise(evaluate(items, {i.id: "?" for i in items}, J.read_option), unreadable="apart")
    assert math.isnan(nothing.share) and nothing.coverage == 0
    empty = summarise(evaluate([], {}, J.read_option))
    assert math.isnan(empty.coverage) and empty.n == 0 and "share" in empty.to_dict()


def test_paired_bootstrap_and_chance():
    a = {f"q{i}": float(i % 3 == 0) for i in range(300)}
    b = {k: 0.0 if i % 2 else v for i, (k, v) in enumerate(a.items())}
    gap = paired_bootstrap(a, b)
    assert gap.mean == pytest.approx(1 / 6) and gap.n == 300 and 0.1 < gap.low < gap.mean < gap.high < 0.23
    wide = paired_bootstrap(a, b, items={k: i // 30 for i, k in enumerate(a)})
    assert wide.mean == gap.mean and paired_bootstrap(a, b) == gap
    with pytest.raises(ValueError, match="share no question"):
        paired_bootstrap({"x": 1.0}, {"y": 1.0})
    with pytest.raises(ValueError, match="items must tell"):
        paired_bootstrap(a, b, items={})
    assert above_chance(0.0, 0.25) == pytest.approx(-1 / 3)
    for share, chance in ((1.2, 0.5), (0.5, 1.0), (0.5, -0.1)):
        with pytest.raises(ValueError):
            above_chance(share, chance)


def test_models_get_items_and_nothing_is_kept_without_a_file(tmp_path):
    items = [Item("a", "what is it?", "cat", image="cat.png"), Item("b", "what is it?", "dog", image="dog.png")]

    def model(prompts, items):
        return [item.image.split(".")[0] for item in items]

    assert evaluate(items, model, lambda text, item: text, batch=2).mean("right") == 1
    assert Lines(None).rows() == [] and Lines(None).add([{"x": 1}]) is None


@pytest.mark.parametrize("call,error,word", [
    (lambda: option("a", "ab"), TypeError, "options must be a sequence"),
    (lambda: option("a", [1, 2]), TypeError, r"options\[0\] must be str, got 1"),
    (lambda: read_lines("a: 1", "a"), TypeError, "names must be a sequence"),
    (lambda: Judge(lambda p: p, "x", yes_no)(3), TypeError, "prompts must be a sequence"),
    (lambda: summarise([1]), TypeError, "answers must be Evaluation"),
    (lambda: paired_bootstrap({"q": math.nan}, {"q": 1.0}), ValueError, r"a\['q'\] must be a finite number"),
])  # fmt: skip
def test_what_is_wrong_is_named(call, error, word):
    with pytest.raises(error, match=word):
        call()


def test_a_file_of_something_else_is_no_file_of_answers(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(ValueError, match=r"notes\.txt does not hold JSON lines"):
        Lines(tmp_path / "notes.txt").rows()


def test_rows_that_lack_something_are_refused_by_line(tmp_path):
    keep = tmp_path / "said.jsonl"
    keep.write_text('{"judge": "j-1", "mark": "a", "answer": "yes"}\n{"judge": "j-1", "answer": "yes"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*said.jsonl lacks 'mark'; it has \['judge', 'answer'\]"):
        Judge(lambda prompts: ["yes"] * len(prompts), "j-1", yes_no, keep=keep)
    with pytest.raises(ValueError, match="line 2 of .* lacks 'mark'"):
        evaluate([Item("a", "?", "yes")], lambda prompts: ["yes"], keep=keep)
    keep.write_text('{"judge": "j-1", "mark": "a", "answer": 1}\n')
    with pytest.raises(TypeError, match="an answer kept in .* must be str, got 1"):
        Judge(lambda prompts: ["yes"] * len(prompts), "j-1", yes_no, keep=keep)
