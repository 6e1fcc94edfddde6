"""TransNormerLLM: the authors' numbers, one state whatever the length, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from parity import HERE  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import attnlib  # noqa: E402
from attnlib.models.transnormer import SIZES, TransNormerConfig, TransNormerForCausalLM  # noqa: E402
from attnlib.nn.linear.lightning_attention_2 import decay_slopes  # noqa: E402


def recording():
    with safe_open(HERE / "transnormer-model.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def small(**settings):
    torch.manual_seed(0)
    config = dict(vocab_size=31, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    return TransNormerForCausalLM(TransNormerConfig(**{**config, "pad_token_id": 0, "eos_token_id": None, **settings}))


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_logits_and_gradients_equal_the_authors(case):
    tensors, configs = recording()
    held = {k[len(case) + 1 :]: t for k, t in tensors.items() if k.startswith(f"{case}/")}
    m = TransNormerForCausalLM(TransNormerConfig(**configs[case])).train()
    theirs = {k[3:]: t for k, t in held.items() if k.startswith("sd/")}
    m.load_state_dict(m.convert_state_dict(theirs))
    y = m(held["ids"], attention_mask=held["pad"]).logits
    exists = held["pad"].bool()
    torch.testing.assert_close(y[exists], held["y"][exists], rtol=1e-5, atol=1e-5)
    (y * held["g"]).sum().backward()
    expected = m.convert_state_dict({k[3:]: t for k, t in held.items() if k.startswith("dw/")})
    ours = dict(m.named_parameters())
    compared = 0
    for name, grad in expected.items():
        compared += 1
        scale = grad.abs().max().clamp(min=1e-3)
        assert ((ours[name].grad - grad).abs().max() / scale) < 1e-5, name
    assert compared == len(ours)
    with pytest.raises(ValueError, match="does not have: one_of_mine"):
        m.convert_state_dict({**theirs, "one_of_mine": theirs["model.embed_tokens.weight"]})


def test_it_starts_as_the_authors_model():
    m = small(hidden_size=64, intermediate_size=96)
    assert sum("norm" in name for name, _ in m.named_parameters()) == 0  # norms have no gain
    for linear in (m.model.layers[1].mixer.q, m.model.layers[1].mixer.proj, m.model.layers[1].mlp.l3):
        assert 0.018 < linear.weight.std() < 0.022 and linear.bias is None
    assert m.lm_head.weight is m.model.embed_tokens.weight
    mixers = [layer.mixer for layer in m.model.layers]
    assert [x.lrpe is not None for x in mixers] == [True, False, False]
    for i, x in enumerate(mixers):
        torch.testing.assert_close(x.slopes, decay_slopes(2, i, 3))


def test_it_generates_with_one_state_whatever_the_length():
    m = small().eval()
    prompt = torch.randint(1, 31, (2, 5), generator=torch.Generator().manual_seed(1))
    prompt[1, :2] = 0
    mask = (prompt != 0).long()
    runs = [
        m.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*runs)
    alone = m.generate(prompt[1:, 2:], max_new_tokens=9, do_sample=False)
    assert torch.equal(alone[0, -9:], runs[0][1, -9:])
    sizes = []
    for n in (4, 64):
        layers = m(torch.ones(1, n, dtype=torch.long), use_cache=True).cache.layers
        sizes.append(sum(layer.state.numel() for layer in layers))
    assert sizes[0] == sizes[1]


def test_the_position_lives_in_the_state():
    m = attnlib.create("lightning-attention-tnl", dim=16, num_heads=2, num_layers=3)
    x = torch.randn(1, 9, 16)
    whole = m(x)
    y, state = m.step(x[:, :4])
    m(torch.randn(3, 20, 16))  # other sequences in between
    rest, _ = m.step(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([y, rest], 1), whole, rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_loaded(tmp_path):
    m = small(bias=True, lrpe_layers=[0, 2]).eval()
    m.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(again(ids).logits, m(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).lrpe_layers == [0, 2]


def test_sizes():
    counts = {}
    with torch.device("meta"):
        for name in SIZES:
            m = TransNormerForCausalLM(TransNormerConfig.sized(name, num_hidden_layers=2))
            counts[name] = sum(p.numel() for p in m.model.layers[1].parameters())
    for name, size in SIZES.items():
        c, glu = size["hidden_size"], size["intermediate_size"]
        assert counts[name] == 5 * c * c + 3 * c * glu
    total = {n: s["num_hidden_layers"] * counts[n] + 64001 * s["hidden_size"] for n, s in SIZES.items()}
    assert total == {"385M": 398_984_192, "1B": 1_020_266_496, "7B": 6_836_719_616}


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="size='3B' is not possible"):
        TransNormerConfig.sized("3B")
    with pytest.raises(ValueError, match="lrpe_layers="):
        TransNormerConfig(num_hidden_layers=2, lrpe_layers=[2])
    with pytest.raises(ValueError, match="num_heads=3 does not divide dim=16"):
        small(num_attention_heads=3)
    with pytest.raises(ValueError, match="form='module' is not possible"):
        attnlib.create("lightning-attention-tnl", dim=8, num_heads=2, form="module")
    with pytest.raises(ValueError, match="causal"):
        attnlib.create("lightning-attention-tnl", dim=8, num_heads=2, causal=False)
    assert TransNormerConfig(hidden_size=24, num_attention_heads=2, intermediate_size=-1).intermediate_size == 24
