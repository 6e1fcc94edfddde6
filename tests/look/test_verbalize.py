"""Maps of text in words: candidates against the authors' searches, numbers recomputed from the sentences."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from attnlib.look.attribution import coverage, instruction, merge_pieces, search, verbalize
from attnlib.look.attribution.verbalize import cited_coverage, filters, runs, threshold

VALUES = {"mean": 0.4, "quantile": 0.8, "variance": 3.0}


def recorded():
    path = Path(__file__).parents[1] / "fixtures" / "saliency-map-verbalization.safetensors"
    with safe_open(path, "pt") as f:
        return [(f.get_tensor(f"scores/{i}"), sets) for i, sets in enumerate(json.loads(f.metadata()["sets"]))]


@pytest.mark.parametrize("mode", VALUES)
@pytest.mark.parametrize("how", ["convolution", "span"])
def test_candidates_are_the_released_ones_and_those_of_the_last_window(how, mode):
    seen = 0
    for scores, sets in recorded():
        for sign in ("+", None):
            theirs = {tuple(w) for w in sets[f"{how}/{mode}/{sign}"]}
            ours = {f.words for f in search(scores, how, 5, mode, VALUES[mode], sign)}
            n = len(scores)
            last = {tuple(n - 5 + p for p in places) for places in filters(5, how)}
            assert theirs <= ours and ours - theirs <= last, (theirs, ours)
            seen += len(theirs)
    assert seen or (how, mode) == ("span", "mean")


def test_candidates_by_hand():
    rng = np.random.default_rng(0)
    scores = rng.uniform(-0.5, 1, 8)
    shares = scores / scores.max()
    least = threshold(scores, "quantile", 0.8)
    assert least == pytest.approx(0.8 * shares.std())
    expected = set()
    for start in range(8 - 5 + 1):
        for bits in product([0, 1], repeat=5):
            if 2 <= sum(bits) <= 3:
                words = [start + i for i, b in enumerate(bits) if b]
                if (shares[words] >= 0).all() and shares[words].mean() > least:
                    expected.add(tuple(words))
    found = search(scores.tolist(), "convolution", 5, "quantile", 0.8)
    assert {f.words for f in found} == expected and expected
    means = [f.score for f in found]
    assert means == sorted(means, reverse=True)
    for f in found:
        assert f.score == pytest.approx(shares[list(f.words)].mean())
        assert f.coverage == pytest.approx(scores[list(f.words)].sum() / np.maximum(scores, 0).sum())


def test_coverage_counts_the_words_that_are_named():
    scores = [1.0, -2.0, 3.0, 0.5, 0.5]
    assert coverage(scores, [0, 2, 3, 4]) == 1.0
    assert coverage(scores, [4]) == pytest.approx(0.1)
    assert coverage(scores, [0, 2]) == pytest.approx(0.8)  # what lies between is not in it
    assert coverage(scores, [1]) == 0.0
    assert coverage(scores, [2, 2]) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="no score is positive"):
        coverage([-1.0, 0.0], [0])
    with pytest.raises(ValueError, match=r"words must lie in \[0, 5\)"):
        coverage(scores, [5])


@pytest.mark.parametrize("place", [0, 4, 9])
def test_a_planted_run_comes_first(place):
    words = [f"w{i}" for i in range(12)]
    rng = np.random.default_rng(place)
    scores = rng.uniform(-0.1, -0.01, 12)
    scores[place : place + 3] = 2.0, 1.5, 1.8
    scores[(place + 6) % 12] = 0.2
    found = verbalize(words, scores.tolist(), "positive")
    assert found.spans[0].words == (place, place + 1, place + 2)
    share = round(100 * 5.3 / 5.5)
    planted = " ".join(words[place : place + 3])
    assert found.text.startswith(
        f"The phrase » {planted} « is most important for the prediction 'positive' ({share} %)."
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("seed", range(3))
def test_every_number_can_be_recomputed_and_scale_changes_nothing(n, seed):
    rng = np.random.default_rng(100 * n + seed)
    scores = rng.normal(size=n)
    scores[rng.integers(n)] = 1.0
    words = [f"w{i}{'.' if i % 5 == 4 else ''}" for i in range(n)]
    found = verbalize(words, torch.tensor(scores))
    said = re.findall(r"The (word|phrase|span) » (.*?) « .*?\((\d+) %\)\.", found.text)
    assert len(said) == len(found.spans) >= 1
    for kind, text, share in said:
        places = [words.index(w) for w in text.split()]
        assert places == list(range(places[0], places[0] + len(places)))
        covered = max(scores[places].sum(), 0) / np.maximum(scores, 0).sum()
        assert abs(100 * covered - int(share)) <= 0.5 + 1e-9
        assert kind == ("word" if len(places) == 1 else "span" if "." in text else "phrase")
    assert [s.coverage for s in found.spans] == sorted((s.coverage for s in found.spans), reverse=True)
    assert verbalize(words, torch.tensor(4 * scores)).text == found.text


def test_without_evidence_it_says_so():
    for scores in ([-1.0, -2.0], [0.0, 0.0], []):
        found = verbalize(["a", "b"][: len(scores)], scores)
        assert found.spans == () and found.text == "There is no positive evidence for the prediction."
    assert search([-1.0, -2.0, -1.0]) == []


def test_word_pieces_become_words():
    tokens = ["[CLS]", "un", "##us", "##ed", "film", "[SEP]", "[PAD]"]
    words, scores, groups = merge_pieces(tokens, [9.0, 1, 2, 3, 4, 9, 9])
    assert (words, scores, groups) == (["unused", "film"], [6.0, 4.0], [(1, 2, 3), (4,)])
    words, scores, _ = merge_pieces(["<s>", "\u0120good", "ness", "\u0120me"], [9.0, 1, 2, 3], how="mean")
    assert (words, scores) == (["goodness", "me"], [1.5, 3.0])
    words, _, groups = merge_pieces(["Hel", "lo", "\u2581you"], [1.0, 1, 1])
    assert (words, groups) == (["Hello", "you"], [(0, 1), (2,)])
    assert merge_pieces(["a", "b"], [1.0, 2.0])[0] == ["a", "b"]
    assert verbalize(words, [1.0, 0.5]).text.startswith("The phrase » Hello you «")


def test_instructions_and_faithfulness():
    text = instruction(["good", "film"], torch.tensor([0.914, 0.02]), "positive", task="You explain.")
    assert "good (0.91) film (0.02)" in text and text.startswith("You explain. A model")
    assert cited_coverage([3.0, 1.0, 0.0], [1, 2]) == (0.25, 1.0)
    assert runs([]) == []


def test_bad_input():
    with pytest.raises(TypeError, match="sequence of strings"):
        verbalize("text", [1.0] * 4)
    with pytest.raises(ValueError, match="one per word"):
        verbalize(["a"], [1.0, 2.0])
    with pytest.raises(TypeError, match="scores must be numbers"):
        verbalize(["a"], None)
    with pytest.raises(ValueError, match="finite"):
        verbalize(["a", "b"], [1.0, float("nan")])
    with pytest.raises(ValueError, match="length must be"):
        search([1.0] * 20, length=13)
    with pytest.raises(ValueError, match="how="):
        search([1.0], "window")
    with pytest.raises(ValueError, match="mode="):
        verbalize(["a"], [1.0], mode="median")
