import json

import pytest

from attnlib.bench import suites
from attnlib.bench.studies.diffusion import binding
from attnlib.bench.worlds.prompts import prompts

pytest.importorskip("diffusers")


def test_every_technique_draws_the_same_prompts(untrained_generators, diffusion_figures, tmp_path):
    told = []
    assert {"plain", "Attend-and-Excite", "A-STAR", "structured guidance"} <= set(binding.CONTESTANTS)
    found = binding.measure(
        progress=told.append,
        names=("plain", "A-STAR", "structured guidance"),
        keep=tmp_path / "kept",
        kinds=("held-out",),
        count=2,
        folder=untrained_generators,
        settings={"num_inference_steps": 1},
        pictures=tmp_path,
    )
    json.dumps(found)
    rows = found["kinds"]["held-out"]["rows"]
    assert [r["name"] for r in rows] == ["plain", "A-STAR", "structured guidance"] and all(
        r["right"]["n"] == 2 for r in rows
    )
    assert diffusion_figures.binding_table(found).count("\n| ") == 1 + len(rows)
    assert all(("against" in r) == (r["name"] != "plain") for r in rows) and len(told) == len(rows)
    assert (tmp_path / "diffusion-binding-cpu.png").exists() and "diffusion-binding" in suites()


def test_words_and_phrases_are_those_of_the_prompts():
    asked = prompts("three", 3)
    for prompt, words, said in zip(asked, binding.shapes(asked), binding.phrases(asked), strict=True):
        assert len(words) == 3 and all(f" {w}" in prompt.text for w in words)
        assert all(s in prompt.text for s in said)
