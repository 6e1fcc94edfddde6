"""The oracles that users can reach: one for every operator, in float64, and what float32 is held to."""

import pytest
import torch
from test_derivatives import CASES, inputs

from attnlib import ops
from attnlib.ops import naive
from attnlib.types import Partial


def test_every_operator_has_one():
    assert all(callable(getattr(naive, name)) for name in ops.operators())


@pytest.mark.parametrize("name", list(CASES))
def test_float32_is_held_to_it(name, monkeypatch):
    """The same call on float32 inputs, by the automatic choice and by the oracle."""
    call = CASES[name][2]
    half = [t.float() for t in inputs(name, False)]
    ours = call(*half)
    for op in ops.operators():
        monkeypatch.setattr(ops, op, getattr(naive, op))
    spec = call(*half)
    for a, b in ((ours.finish(), spec.finish()),) if isinstance(ours, Partial) else ((ours, spec),):
        assert b.dtype == torch.float64
        assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


def test_it_is_always_the_specification():
    x = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert naive.attention(x, x, x, bias=torch.zeros(2, 2)).dtype == torch.float64
    with pytest.raises(TypeError, match="takes no backend"):
        naive.attention(x, x, x, backend="tiled")
    with pytest.raises(TypeError, match="takes no form"):
        naive.linear_attention(x, x, x, form="chunkwise")
