import json

import pytest

from attnlib.bench import run_bench, suites


def test_mechanisms_against_softmax(tmp_path):
    results = run_bench(
        ["lightning-attention-2"], grid=(32,), settings={"dim": 16, "num_heads": 2}, out=tmp_path, quiet=True
    )
    row = results["lightning-attention-2"]
    assert row["forward"]["ratio"] > 0 and row["decode"]["median_s"] > 0
    assert json.loads((tmp_path / "mechanisms.json").read_text()) == results


def test_unknown_names():
    with pytest.raises(ValueError, match="window"):
        run_bench([], suite="windows", quiet=True)
    with pytest.raises(ValueError, match="did you mean"):
        run_bench(["softmax-atention"], quiet=True)
    assert {"normalizers", "linear", "local", "sparse"} <= set(suites())
