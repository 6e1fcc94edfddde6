"""What CONTRIBUTING shows works as it stands there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import attnlib
from attnlib.check import check
from attnlib.nn.base import Mechanism

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def example() -> type[Mechanism]:
    """The class of the complete mechanism, without its registration."""
    (code,) = re.findall(r"### A complete causal mechanism.*?```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.strip().splitlines()) <= 40
    module = types.ModuleType("contributed")
    sys.modules["contributed"] = module  # where the compiler looks the class up
    exec(re.sub(r"(?m)^@register.*\n", "", code), module.__dict__)
    return module.GatedMean


def test_the_complete_mechanism_keeps_its_claims():
    report = check(example(), dim=8)
    assert not report.failed, str(report)
    passed = {finding.claim for finding in report.findings if finding.status == "pass"}
    assert {"causality", "streaming", "validity", "work", "memory", "gradient"} <= passed


def test_it_is_a_language_model(monkeypatch):
    pytest.importorskip("transformers")
    from attnlib.models.language import DecoderConfig, DecoderForCausalLM
    from attnlib.nn import registry

    attnlib.list_mechanisms()
    monkeypatch.setitem(registry._ENTRIES["mechanism"], "gated-mean", example())
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, mechanisms=["gated-mean"])
    model = DecoderForCausalLM(config).eval()
    ids, mask = torch.randint(1, 31, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    first, second = (
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=cached)
        for cached in (True, False)
    )
    assert torch.equal(first, second)


def test_neighbouring_query_heads_share_a_key_head():
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 3, 4, 8)
    got = attnlib.attention(q, k, v)
    want = attnlib.attention(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(got, want)
