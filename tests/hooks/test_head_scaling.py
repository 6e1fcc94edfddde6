"""Scaling and ablating heads: the same as scaling the columns of the output projection that read them."""

import pytest
import torch

import attnlib
from attnlib.hooks import Record
from attnlib.steer import HeadScale
from hooks.models import language_model, prompt, scores

pytest.importorskip("transformers")


def folded(model, factors):
    """The same model with factors in its output projections."""
    with torch.no_grad():
        for layer, row in factors.items():
            weight = model.model.layers[layer].self_attn.o_proj.weight
            weight.mul_(torch.as_tensor(row).repeat_interleave(weight.shape[1] // len(row)))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_it_equals_folding_factors_into_the_output_projection(family, mode):
    factors = {0: [1.0, 0.0, 2.0, 1.0], 2: [0.5, 1.0, 1.0, -1.0]}
    inputs = prompt()
    want, ids = scores(folded(language_model(family), factors), inputs, **mode)
    model = language_model(family)
    plain, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, HeadScale(factors)) as session:
        got, mine = scores(model, inputs, **mode)
        assert [s.layer for s in session.attached] == [0, 2]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(mine, ids) and not torch.allclose(got, plain, atol=1e-3)
    assert torch.equal(scores(model, inputs, **mode)[0], plain)


def test_sampling_with_a_seed_gives_the_same_tokens():
    inputs = prompt()
    sequences = []
    for model, scale in (
        (folded(language_model(), {1: [2.0, 0, 1, 1]}), None),
        (language_model(), {1: {0: 2.0, 1: 0.0}}),
    ):
        session = attnlib.attach(model, HeadScale(scale)) if scale else None
        torch.manual_seed(3)
        sequences.append(model.generate(**inputs, max_new_tokens=6, do_sample=True))
        if session:
            session.detach()
    assert torch.equal(*sequences)


def test_ablating_and_factors_per_site_and_sample():
    model = language_model()
    inputs = prompt()
    plain = model(**inputs).logits
    with attnlib.attach(model, HeadScale.ablate({1: [0, 3]})):
        ablated = model(**inputs).logits
    with attnlib.attach(model, HeadScale(lambda s: [0, 1, 1, 0] if s.layer == 1 and s.phase == "prefill" else None)):
        assert torch.equal(model(**inputs).logits, ablated)
    rows = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1]])
    with attnlib.attach(model, HeadScale(rows, layers=[1])):
        mixed = model(**inputs).logits
    torch.testing.assert_close(mixed[0], ablated[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(mixed[1], plain[1]) and not torch.equal(ablated[0], plain[0])


def test_factors_of_one_touch_nothing():
    model = language_model()
    inputs = prompt()
    plain, _ = scores(model, inputs)
    for scale in (HeadScale({}), HeadScale({1: [1.0] * 4}), HeadScale({0: 1.0}, layers=[2]), HeadScale(torch.ones(4))):
        with attnlib.attach(model, scale) as session:
            assert scale.identity and not session.attached
            assert torch.equal(scores(model, inputs)[0], plain)
    with attnlib.attach(model, HeadScale({1: {}, 2: [1.0, 2.0, 1.0, 1.0]})) as session:
        assert [s.layer for s in session.attached] == [2]


def test_it_composes_with_a_record_and_with_itself():
    model = language_model()
    inputs = prompt()
    with attnlib.attach(model, HeadScale({1: {0: 2.0}}), HeadScale({1: {0: 3.0}}), Record(layers=[2])) as session:
        twice = model(**inputs).logits
        assert session.results["record"][2]["weights"]
    with attnlib.attach(model, HeadScale({1: {0: 6.0}})):
        torch.testing.assert_close(model(**inputs).logits, twice, atol=1e-5, rtol=1e-5)


def test_vision_language_model():
    from hooks.llava import llava, llava_inputs

    model = llava()
    inputs = llava_inputs(model)
    plain, _ = scores(model, inputs)
    with attnlib.attach(model, HeadScale({1: [0.0, 2.0, 1.0, 1.0]})):
        assert not torch.allclose(scores(model, inputs)[0], plain, atol=1e-4)
    assert torch.equal(scores(model, inputs)[0], plain)


def test_refusals():
    model = language_model()
    with pytest.raises(ValueError, match="head 4 does not exist"):
        attnlib.attach(model, HeadScale.ablate({0: [4]}))
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        attnlib.attach(model, HeadScale.ablate({7: [0]}))
    with pytest.raises(ValueError, match="4 heads; factors of shape"):
        attnlib.attach(model, HeadScale([1.0, 2.0]))
    with pytest.raises(TypeError, match=r"heads must be \{layer: \[head, ...\]\}, got \[0, 1\]"):
        HeadScale.ablate([0, 1])
    with pytest.raises(ValueError, match="names its layers already"):
        HeadScale({0: [1.0, 2.0, 1.0, 1.0]}, layers=[0])
    scale = HeadScale({0: {0: 2.0}})
    with attnlib.attach(model, scale):
        with pytest.raises(ValueError, match="attached already"):
            attnlib.attach(language_model(seed=1), scale)
        with pytest.raises(ValueError, match="has a session already"):
            attnlib.attach(model, HeadScale({0: {0: 2.0}}))
    with (
        attnlib.attach(model, HeadScale(torch.full((3, 4), 2.0))),
        pytest.raises(ValueError, match="factors have 3 rows"),
    ):
        model(**prompt())
