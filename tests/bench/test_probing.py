"""Probing frozen encoders, and the studies of pools and of gates, small."""

import json

import pytest
import torch
from torch import nn

import attnlib
from attnlib.bench import suites
from attnlib.bench.data.worlds import cluttered_digits, placed_digits
from attnlib.bench.probing import cached_tokens, linear, nearest_neighbours, probe
from attnlib.bench.studies import gates, probing

pytest.importorskip("sklearn")


def blobs(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.eye(3, 8).mul(4)
    return centres[labels][:, None] + torch.randn(n, 5, 8, generator=g), labels


def test_tokens_are_computed_once(tmp_path):
    calls = []

    class Encoder(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            assert not self.training
            return x.movedim(1, -1)

    encoder, images = Encoder().train(), torch.randn(5, 4, 3, 2)
    tokens = cached_tokens(encoder, images, batch=2, keep=tmp_path / "t.safetensors")
    assert tokens.shape == (5, 6, 4) and calls == [2, 2, 1]
    assert torch.equal(cached_tokens(encoder, images, keep=tmp_path / "t.safetensors"), tokens) and len(calls) == 3
    with pytest.raises(ValueError, match="5 images, not of 4"):
        cached_tokens(encoder, images[:4], keep=tmp_path / "t.safetensors")


def test_neighbours_a_linear_map_and_a_probe_tell_classes_apart():
    train, test = blobs(60), blobs(60, 1)
    assert nearest_neighbours(train, test, k=5) > 95 and linear(train, test) > 95
    right, model = probe(attnlib.create("efficient-probing", dim=8, num_queries=2), train, test, steps=60, batch=32)
    assert right > 95 and not model.training
    # by hand: the vote of the nearest, weighed by the exponential of their cosines
    known, asked = (torch.nn.functional.normalize(x.mean(1).double(), dim=-1) for x in (train[0], test[0]))
    cosine = asked @ known.T
    right = 0
    for row, truth in zip(cosine, test[1], strict=True):
        votes = [0.0] * 3
        for i in row.argsort(descending=True)[:7]:
            votes[int(train[1][i])] += float((row[i] / 0.1).exp())
        right += votes.index(max(votes)) == int(truth)
    assert nearest_neighbours(train, test, k=7, temperature=0.1) == pytest.approx(100 * right / 60)
    with pytest.raises(ValueError, match="k must be"):
        nearest_neighbours(train, test, k=61)


def test_placed_digits_are_where_it_says():
    images, labels, at = placed_digits(3, side=24, pieces=0, generator=torch.Generator().manual_seed(0))
    same, too = cluttered_digits(3, side=24, pieces=0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images, same) and torch.equal(labels, too)
    for image, (row, column) in zip(images[:, 0], at.tolist(), strict=True):
        inside = image[row : row + 14, column : column + 14]
        assert inside.count_nonzero() == image.count_nonzero() > 0


def test_gates_stand_in_networks_of_equal_parameters():
    counts = [sum(p.numel() for p in gates.build(n, gates.width_for(n)).parameters()) for n in gates.GATES]
    assert max(counts) < 1.05 * min(counts)
    for draw, classes in gates.TASKS.values():
        x, labels = draw(2, "train", torch.Generator().manual_seed(0))
        assert x.shape == (2, gates.SIDE, gates.SIDE, 1) and 0 <= labels.min()
        assert labels.max() < (classes or gates.CELLS**2)
    peak = gates.heat(torch.tensor([17]))
    assert peak.flatten().argmax() == 17 and peak.max() == 1


def test_a_heat_map_is_right_in_the_exact_cell_alone():
    labels = torch.tensor([17, 30, 100])
    right, aside = gates.heat(labels), gates.heat(labels + 1)
    assert gates.score(nn.Identity(), right, labels) == {"right": 100.0, "cells_off": 0.0}
    assert gates.score(nn.Identity(), aside, labels) == {"right": 0.0, "cells_off": 1.0}


def test_a_small_run_of_the_gates(monkeypatch, tmp_path):
    monkeypatch.setattr(gates, "GATES", {n: gates.GATES[n] for n in (gates.BASELINE, "ELA")})
    found = gates.measure(pictures=tmp_path, steps=1, batch=2, seeds=(0,), tested=20)
    assert list(found["tasks"]) == list(gates.TASKS) and (tmp_path / "gates-cpu.svg").exists()
    json.dumps(found)


def test_the_studies_are_suites():
    assert {"probing", "gates"} <= set(suites())


def test_a_small_run_of_the_probes(monkeypatch):
    monkeypatch.setattr(probing, "POOLS", {n: probing.POOLS[n] for n in (probing.OURS, probing.BASELINE)})
    monkeypatch.setattr(probing, "times", lambda repeats: {})
    found = probing.measure(pretraining=2, steps=2, batch=8, labelled=40, seeds=(0,))
    assert [r["name"] for r in found["rows"]][:2] == [probing.NEIGHBOURS, probing.LINEAR]
    json.dumps(found)
