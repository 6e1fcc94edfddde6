"""Based as a language model: the authors' model from a recording, sizes, first weights, generation."""

import json

import pytest
import torch
from parity import HERE, synthetic
from safetensors import safe_open

pytest.importorskip("transformers")

from attnlib.models.based import PARAMS, based_config, convert_state_dict, start  # noqa: E402
from attnlib.models.language import DecoderForCausalLM  # noqa: E402

SMALL = dict(name=None, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, linear_layers=[1], feature_dim=4)


def small(**more):
    return DecoderForCausalLM(based_config(**{**SMALL, "vocab_size": 32, "window_size": 3, **more}))


def test_equals_the_authors_model():
    with safe_open(HERE / "based-model.safetensors", "pt") as f:
        held, shapes = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["shapes"])  # noqa: SIM118
    theirs = synthetic(shapes)
    theirs["lm_head.weight"] = theirs["transformer.embeddings.word_embeddings.weight"]
    model = small(intermediate_size=256).double()
    model.load_state_dict(convert_state_dict(theirs))
    logits = model(held["ids"]).logits
    largest = float(held["y"].abs().max())
    assert float((logits - held["y"]).abs().max()) < 1e-5 * largest
    (logits * held["g"]).sum().backward()
    unknown = {k: torch.full(s, torch.nan) for k, s in shapes.items() if f"dw/{k}" not in held}
    grads = convert_state_dict({**unknown, **{k[3:]: v for k, v in held.items() if k.startswith("dw/")}})
    compared = 0
    for name, p in model.named_parameters():
        if not grads[name].isnan().any():
            compared += 1
            assert float((p.grad - grads[name]).abs().max()) < 1e-5 * float(grads[name].abs().max()), name
    assert compared == sum(k.startswith("dw/") for k in held) + 2  # one of theirs is three of ours


@pytest.mark.parametrize(("name", "size", "share"), [("based-360m", 360e6, 0.02), ("based-1.3b", 1.3e9, 0.04)])
def test_sizes(name, size, share):
    with torch.device("meta"):
        model = DecoderForCausalLM(based_config(name))
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMS[name] and abs(count / size - 1) < share


def test_layers_of_the_released_mixture():
    names = [based_config().layer_spec(i)["name"] for i in range(27)]
    assert [i for i, n in enumerate(names) if n == "based"] == [1, 6, 11, 16, 21]
    assert [i for i, n in enumerate(names) if n == "based-window"] == [2, 7, 12, 17, 22]
    assert names.count("based-conv") == 17


def test_first_weights():
    torch.manual_seed(0)
    model = start(small(hidden_size=64))
    layer = model.model.layers[1]
    assert float(layer.mixer.q.weight.std()) == pytest.approx(0.02, rel=0.1)
    for last in (layer.mixer.proj, layer.mlp.down):
        assert float(last.weight.std()) == pytest.approx(0.02 / 8**0.5, rel=0.1)
    assert bool((model.model.layers[0].mixer.proj.bias == 0).all())


def test_generation_with_a_constant_state_equals_without():
    torch.manual_seed(0)
    model = start(small(initializer_range=0.5)).eval()
    ids = torch.randint(1, 32, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    call = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    cached, plain = (model.generate(ids * mask, use_cache=use, **call) for use in (True, False))
    assert torch.equal(cached, plain)
    sizes = []
    for n in (8, 40):
        cache = model(torch.randint(1, 32, (1, n)), use_cache=True).cache
        sizes.append(sum(layer.state.numel() for layer in cache.layers))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name="based-7b"), "name='based-7b'"),
        (dict(name=None, hidden_size=8), "leaves out num_hidden_layers, linear_layers"),
        (dict(linear_layers=[40]), r"linear_layers has \[40\]"),
        (dict(window_layers=[1]), r"layers \[1\] stand in linear_layers and in window_layers"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        based_config(**change)
