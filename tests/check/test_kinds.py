"""Fusions and pools are checked by the same claims; what a silent module keeps is found out on request."""

import json

import pytest
import torch
from check.test_situations import Fourier, Recurrent, WrappedAttention
from torch import nn
from typer.testing import CliRunner

from attnlib import Traits
from attnlib.check import Case, check
from attnlib.cli import app
from attnlib.nn.base import Fusion
from attnlib.nn.layers import zero_invalid


class Crossed(Fusion):
    """Two streams read each other, with softmax attention and a residual."""

    def __init__(self, dims=(8, 6), lie=""):
        super().__init__()
        self.dims, self.lie = dims, lie
        a, b = dims
        self.q = nn.ModuleList([nn.Linear(a, 8), nn.Linear(b, 8)])
        self.k = nn.ModuleList([nn.Linear(b, 8), nn.Linear(a, 8)])
        self.v = nn.ModuleList([nn.Linear(b, a), nn.Linear(a, b)])

    def forward(self, *streams, valid=None):
        valid = [None, None] if valid is None else valid
        streams = [zero_invalid(x, e) for x, e in zip(streams, valid, strict=True)]
        out = []
        for i, (x, other, exists) in enumerate(zip(streams, streams[::-1], valid[::-1], strict=True)):
            scores = (self.q[i](x) @ self.k[i](other).transpose(1, 2)).double()
            keep = torch.ones_like(scores, dtype=torch.bool) if exists is None else exists[:, None].expand_as(scores)
            keep = torch.ones_like(keep) if self.lie == "valid" and i == 1 else keep
            empty = ~keep.any(-1, keepdim=True)
            weights = scores.masked_fill(~(keep | empty), float("-inf")).softmax(-1).masked_fill(empty, 0.0)
            y = x + weights.to(x.dtype) @ self.v[i](other).to(x.dtype)
            if self.lie == "batch" and i == 0 and len(x):
                y = y + 0.01 * y.mean(0)
            out.append(y)
        return tuple(out[:1] if self.lie == "shape" else out)


def test_an_honest_fusion_passes_on_both_streams():
    report = check(Crossed, dims=(8, 6))
    assert report.ok, str(report)
    passed = {f.claim for f in report.findings if f.status == "pass"}
    assert {"validity", "batch", "modes", "strides", "gradient"} <= passed


@pytest.mark.parametrize(
    "lie, claim, says",
    [("valid", "validity", "stream 1"), ("batch", "batch", "stream 0"), ("shape", "patterns", "not a tuple of 2")],
)
def test_a_lying_fusion_is_rejected(lie, claim, says):
    finding = check(Crossed, lie=lie, select=[claim])[claim]
    assert finding.status == "fail" and says in finding.why, finding


def test_streams_of_a_fusion_come_from_the_case():
    class Three(Fusion):
        def __init__(self, lie=False):
            super().__init__()
            self.lie = lie

        def forward(self, a, b, c, valid=None):
            valid = [None] * 3 if valid is None else valid
            a, b, c = (zero_invalid(t, e) for t, e in zip((a, b, c), valid, strict=True))
            total = a.flatten(1, -2).sum(1) + b.flatten(1, -2).sum(1) + c.flatten(1, -2).sum(1)
            if self.lie:
                total = total + torch.rand(1).to(total.dtype)
            return tuple(t + total.view(len(t), *[1] * (t.dim() - 2), -1).tanh() for t in (a, b, c))

    case = Case("Three", {}, (), streams=((5, 4), (2, 3, 4), (7, 4)))
    report = check(Three, case)
    assert report.ok, str(report)
    assert "no hidden state" in {f.claim for f in check(Three, case, lie=True).failed}
    with pytest.raises(ValueError, match="streams"):
        check(Three)


class Mean(nn.Module):
    """The mean of the tokens that exist, projected: (B, N, C) to (B, D)."""

    def __init__(self, dim=8, lie=False):
        super().__init__()
        self.dim, self.lie, self.proj = dim, lie, nn.Linear(dim, dim + 3)

    def forward(self, x, valid=None):
        if valid is None:
            return self.proj(x.mean(1))
        count = x.shape[1] if self.lie else valid.sum(1).clamp(min=1)[:, None]
        return self.proj(zero_invalid(x, valid).sum(1) / count)


POOL = Traits(valid=True, permutation_equivariant=True, work={"N": 1}, memory={"N": 1}, traceable=False)


def test_pools_are_checked():
    report = check(Mean, claims=POOL, kind="pool", grid=12)
    assert report.ok, str(report)
    assert {"validity", "permutation", "batch"} <= {f.claim for f in report.findings if f.status == "pass"}
    report = check(Mean, claims=POOL, kind="pool", grid=12, lie=True)
    assert {f.claim for f in report.failed} == {"validity"}, str(report)
    assert check(Mean, grid=12).ok  # seen to be a pool by what it returns
    assert "gave (2, 12, 16)" in check(Fourier, kind="pool", grid=12, select=["patterns"])["patterns"].why
    with pytest.raises(ValueError, match="kind"):
        check(Mean, kind="stool")


@pytest.mark.parametrize(
    "module, holds",
    [
        (WrappedAttention(), dict(permutation_equivariant=True, batch_independent=True, resolution_free=True)),
        (Recurrent(), dict(patterns={"causal-self"}, work={"N": 1}, permutation_equivariant=False, traceable=False)),
        (Fourier(), dict(patterns={"noncausal-self"}, traceable=True, permutation_equivariant=False)),
        (Mean(), dict(valid=True, permutation_equivariant=True, work={"N": 1})),
    ],
)
def test_what_seems_to_hold_is_inferred(module, holds):
    report = check(module, grid=12, infer=True)
    assert report.ok, str(report)
    assert "seems to hold: Traits(" in report.note
    want = Traits(**holds).to_dict()
    assert {name: report.claims[name] for name in holds} == {name: want[name] for name in holds}


def test_a_silent_module_is_told_how_little_was_tested():
    report = check(WrappedAttention(), grid=12)
    untested = sum(f.status == "skip" for f in report.findings)
    assert f"{untested} of {len(report.findings)} claims not tested" in report.summary()
    assert "--infer" in str(report) and untested > 15


def test_infer_on_the_command_line():
    args = ["check", "check.test_situations:WrappedAttention", "--set", "dim=8", "--grid", "12", "--json"]
    plain = json.loads(CliRunner().invoke(app, args).stdout)
    more = json.loads(CliRunner().invoke(app, [*args, "--infer"]).stdout)
    assert "claims nothing" in plain["note"] and "seems to hold" in more["note"]
    assert sum(f["status"] == "skip" for f in more["findings"]) < sum(f["status"] == "skip" for f in plain["findings"])
