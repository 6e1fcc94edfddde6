import json
import sys
from pathlib import Path

import pytest
import torch

import attnlib
from attnlib.bench import run_against
from attnlib.bench.speed import calls, revisions
from attnlib.nn import Mechanism
from attnlib.types import Traits

SOURCE = Path(attnlib.__file__).parents[1]


def test_this_tree_beside_itself(tmp_path):
    result = revisions.measure(SOURCE, "attention", turns=2)
    (row,) = result["records"]
    assert row["row"] == "attention" and row["before_ms"] > 0 and row["after_ms"] > 0 and row["ratio"] > 0
    assert row["functions_before"] == row["functions_after"] > 10
    assert result["settings"]["turns"] == 2 and result["machine"]["threads"] == 1


def test_the_command_keeps_what_it_measured(tmp_path, monkeypatch):
    measured = {"records": [{"row": "attention"}]}
    monkeypatch.setattr(revisions, "measure", lambda against, rows, progress: measured)
    assert run_against(SOURCE, "attention", tmp_path, quiet=True) == measured
    assert json.loads((tmp_path / "revisions-cpu.json").read_text()) == measured


def test_trees_and_rows_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a revision"):
        revisions.measure("no-such-revision")
    (tmp_path / "attnlib").mkdir()
    with pytest.raises((ValueError, RuntimeError)):
        revisions.measure(tmp_path)
    with pytest.raises(ValueError, match=r"rows='nothing' fits none of \['step"):
        revisions.measure(SOURCE, "nothing")


@pytest.mark.parametrize("row", [r for r in calls.ROWS if "dim=256" not in r and not r.startswith("decoder")])
def test_every_row_runs(row):
    calls.ROWS[row]()()


class Plain(Mechanism):
    """A mechanism that is nothing but its door."""

    class_traits = Traits(patterns={"noncausal-self"}, mask=True)

    def mix(self, x, *, valid=None, mask=None):
        return x


def counted(run):
    """Functions of this library that one call of ``run`` calls."""
    count = 0

    def tell(frame, event, argument):
        nonlocal count
        count += event == "call" and "attnlib" in frame.f_code.co_filename

    run()
    sys.setprofile(tell)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@torch.no_grad()
def test_doors_stay_cheap():
    """Calls, not seconds: what passes a door is compared, and no words are made for it."""
    x, q = torch.randn(1, 4, 8), torch.randn(1, 2, 4, 8)
    plain = Plain(8)
    assert counted(lambda: plain(x)) <= 18
    softmax = attnlib.create("softmax-attention", dim=8, num_heads=2, causal=True)
    assert counted(lambda: softmax._check_call(x, None, None, None, None, None, None, None, None, ())) <= 14
    assert counted(lambda: attnlib.attention(q, q, q)) <= 36
    assert counted(lambda: attnlib.attention(q, q, q, mask=attnlib.masks.causal())) <= 50
    _, state = softmax.step(x)
    assert counted(lambda: softmax.step(x[:, :1], state)) <= 185
