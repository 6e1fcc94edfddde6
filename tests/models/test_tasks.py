"""Every row of the table of tasks trains by the one script: it goes on, is saved and loaded, and takes any size."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
FOLDER = Path(__file__).parents[2] / "examples" / "tasks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"tasks_example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train = load("train")
TASKS, inputs_of = train.TASKS, sys.modules["tasks"].inputs_of


def run(name, out, steps, *more):
    return train.main([name, "--out", str(out), "--steps", str(steps), "--batch", "2", "--test", "2", *more])


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def test_rows_stand_in_order():
    assert list(TASKS) == sorted(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_it_trains_stops_goes_on_and_loads(name, tmp_path, capsys):
    task = TASKS[name]
    out = tmp_path / "run"
    result = run(name, out, 1)
    assert result["steps"] == 1
    result = run(name, out, 2)
    assert result["steps"] == 2 and "going on from step 1" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(len(line) > 1 for line in lines)
    torch.manual_seed(1)
    model = task.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    assert any(not v.equal(before[k]) for k, v in model.state_dict().items())
    model.eval()
    batch = task.batch(2, torch.Generator().manual_seed(5))
    for given in [batch, *([task.odd(torch.Generator().manual_seed(6))] if task.odd else [])]:
        inputs = inputs_of(given)
        answer = tensors(model.predict(**inputs))
        assert answer and not any(t.requires_grad for t in answer)
        assert all(t.isfinite().all() for t in answer if t.is_floating_point())
    if task.export:
        inputs = inputs_of(batch)
        made = torch.export.export(model, (), inputs, strict=False).module()(**inputs)
        for a, b in zip(tensors(made), tensors(model(**inputs)), strict=True):
            torch.testing.assert_close(a, b)


def test_a_run_that_stopped_ends_as_one_that_did_not(tmp_path):
    """Bit for bit: with the same number of steps in view, so that rates agree."""
    whole = run("fpn", tmp_path / "a", 3, "--save-every", "2")
    steps = train.train_batch
    calls = []

    def failing(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return steps(*args, **kwargs)

    train.train_batch = failing
    try:
        with pytest.raises(KeyboardInterrupt):
            run("fpn", tmp_path / "b", 3, "--save-every", "2")
    finally:
        train.train_batch = steps
    again = run("fpn", tmp_path / "b", 3, "--save-every", "2")
    assert again["dice"] == whole["dice"]
    logs = [(tmp_path / x / "log.jsonl").read_text() for x in "ab"]
    assert logs[0] == logs[1]
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(a[k].equal(b[k]) for k in a)


def test_what_is_asked_for_wrongly(tmp_path, capsys):
    for words in (["no-such-task", "--out", str(tmp_path)], ["fpn"]):
        with pytest.raises(SystemExit):
            train.main(words)
    assert "--out FOLDER is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("fpn", tmp_path, 0)
    assert "--steps: must be at least 1, got 0" in capsys.readouterr().err
    run("filip", tmp_path / "one", 1)
    for other, said in (("fpn", "name='filip'"), ("filip", "seed=0")):
        with pytest.raises(SystemExit, match=f"holds a run with .*{said}"):
            run(other, tmp_path / "one", 2, "--seed", "1")
    assert train.main(["list"]) == {} and "fpn" in capsys.readouterr().out
