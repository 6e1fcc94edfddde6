"""The study of prompts for tokens, as small as it goes."""

import json

import torch

from attnlib.bench import suites
from attnlib.bench.studies import prompting, tuning


def test_prompts_have_equal_parameters_and_their_own_start():
    given = prompting.build(0)
    made = {name: tuning.contestant(name, given, 0) for name in tuning.NAMES}
    counts = {name: tuning.trained(model) for name, model in made.items()}
    head = counts.pop(tuning.LINEAR)
    depth, width = prompting.DEPTH, prompting.DIM
    assert head == tuning.CLASSES * (width + 1)
    assert set(counts.values()) == {head + depth * width * 2 * sum(tuning.PAIR)}
    largest = {name: float(made[name].pools[0].detach().abs().max()) for name in counts}
    for name, found in largest.items():
        assert (0.9 < found <= 1) if name == tuning.RELEASED else (0.2 < found <= 0.25)
    x = tuning.noisy(2, torch.Generator().manual_seed(0))[0]
    with torch.no_grad():  # of VPT every token reads every prompt: its keys say nothing
        before = made[tuning.VPT].eval()(x)[0]
        for keys in made[tuning.VPT].keys:
            keys.copy_(torch.randn(keys.shape))
        torch.testing.assert_close(made[tuning.VPT](x)[0], before)


def test_a_small_run_of_tuning(tmp_path):
    found = tuning.measure(pictures=tmp_path, pretraining=1, steps=1, batch=2, tested=8, seeds=(0,))
    assert [row["name"] for row in found["rows"]] == list(tuning.NAMES)
    assert (tmp_path / "tuning-cpu.svg").exists() and "tuning" in suites()
    json.dumps(found)
