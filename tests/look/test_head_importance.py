"""Importance of heads by silencing them: against weights that are changed by hand, on three libraries' transformers."""

import math

import pytest
import torch
from torch import nn

import attnlib
from attnlib.hooks import Node
from attnlib.look import (
    UniformHeads,
    ablated,
    head_importance,
    jensen_shannon,
    layer_table,
    rank_correlation,
)

HEADS, WIDTH = 3, 4


def vit(seed=0, **settings):
    torch.manual_seed(seed)
    sizes = dict(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=HEADS, num_classes=4)
    model = attnlib.create_model("vit_tiny_patch16_224", **{**sizes, **settings}).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def images(count=6, seed=1):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 3, 1, 2, 2, 0])


def by_hand(model, layer, head, how, x):
    """The model with the weights of one head changed: the oracle."""
    own = slice(WIDTH * head, WIDTH * head + WIDTH)
    attention = model.stages[layer].mixer.inner
    kept = {n: p.detach().clone() for n, p in attention.named_parameters()}
    with torch.no_grad():
        if how == "uniform":
            attention.q.weight[own], attention.q.bias[own] = 0, 0
        else:
            heard = []
            hook = attention.proj.register_forward_pre_hook(lambda m, given: heard.append(given[0][..., own]))
            model(x)
            hook.remove()
            mean = heard[0].flatten(0, 1).mean(0)
            if how == "mean":
                attention.proj.bias += attention.proj.weight[:, own] @ mean
            attention.proj.weight[:, own] = 0
        y = model(x).softmax(-1)
        attention.load_state_dict(kept)
    return y


@pytest.mark.parametrize("how", ["zero", "mean", "uniform"])
def test_three_measures_of_three_ablations(how):
    model, x = vit(), images()
    found = head_importance(model, [(x[:4], LABELS[:4]), (x[4:], LABELS[4:])], how)
    before = model(x).softmax(-1)
    assert found.images == 6 and found.intact == pytest.approx(float((before.argmax(-1) == LABELS).double().mean()))
    for layer in range(2):
        for head in range(HEADS):
            after = by_hand(model, layer, head, how, x)
            right = [(p.argmax(-1) == LABELS).double().mean() for p in (before, after)]
            assert float(found.accuracy[layer, head]) == pytest.approx(float(right[0] - right[1]))
            drop = (before - after)[torch.arange(6), LABELS].mean()
            middle = (before + after) / 2
            told = 0.5 * (before * (before / middle).log() + after * (after / middle).log()).sum(-1).mean()
            torch.testing.assert_close(found.probability[layer, head], drop, atol=1e-9, rtol=1e-6)
            torch.testing.assert_close(found.divergence[layer, head], told, atol=1e-9, rtol=1e-6)
    assert float(found.divergence.min()) > 0


@pytest.mark.parametrize("how", ["zero", "mean", "uniform"])
def test_a_head_that_says_nothing_is_nothing(how):
    model = vit()
    values = model.stages[1].mixer.inner.v
    with torch.no_grad():
        values.weight[WIDTH : 2 * WIDTH], values.bias[WIDTH : 2 * WIDTH] = 0, 0
    found = head_importance(model, [(images(), LABELS)], how)
    for table in (found.accuracy, found.probability, found.divergence):
        assert abs(float(table[1, 1])) < 1e-12
    assert found.ranked()[-1] == Node("z", 1, 1) and len(found.ranked("accuracy")) == 6


def test_permuted_heads_have_permuted_importance():
    model, order = vit(), [2, 0, 1]
    before = head_importance(model, [(images(), LABELS)])
    attention = model.stages[0].mixer.inner
    rows = torch.cat([torch.arange(WIDTH * h, WIDTH * h + WIDTH) for h in order])
    with torch.no_grad():
        for part in (attention.q, attention.k, attention.v):
            part.weight.copy_(part.weight[rows].clone())
            part.bias.copy_(part.bias[rows].clone())
        attention.proj.weight.copy_(attention.proj.weight[:, rows].clone())
    after = head_importance(model, [(images(), LABELS)])
    for name in ("accuracy", "probability", "divergence"):
        torch.testing.assert_close(getattr(after, name)[0], getattr(before, name)[0, order])
        torch.testing.assert_close(getattr(after, name)[1], getattr(before, name)[1])


def test_without_labels_the_intact_answer_is_the_true_one():
    model, x = vit(), images()
    alone = head_importance(model, [x])
    same = head_importance(model, [(x, model(x).argmax(-1))])
    assert alone.intact == 1 and float(alone.accuracy.min()) >= 0
    torch.testing.assert_close(alone.probability, same.probability)


def test_layers_of_unequal_heads():
    found = head_importance(vit(last_heads=2), [(images(), LABELS)])
    assert found.divergence.isnan().tolist() == [[False] * 3, [False, False, True]]
    assert len(found.ranked()) == 5
    assert rank_correlation(found.divergence, found.divergence) == pytest.approx(1)
    assert set(found.correlations()) == {
        ("accuracy", "probability"), ("accuracy", "divergence"), ("probability", "divergence")
    }  # fmt: skip


def test_a_transformer_of_transformers():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=24, image_size=16,
        patch_size=8, num_labels=4,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    x = images().float()
    with torch.no_grad():
        before = model(x).logits.softmax(-1)
        found = {how: head_importance(model, [{"pixel_values": x}], how) for how in ("zero", "mean", "uniform")}
        projections = [(n, p) for n, p in model.named_parameters() if n.endswith("attention.output.dense.weight")]
        projections = projections or [(n, p) for n, p in model.named_parameters() if "o_proj.weight" in n]
        assert len(projections) == 2
        projections[1][1][:, WIDTH : 2 * WIDTH] = 0
        told = jensen_shannon(before.double(), model(x).logits.double().softmax(-1)).mean()
    torch.testing.assert_close(found["zero"].divergence[1, 1], told, atol=1e-6, rtol=1e-4)
    assert len({round(float(f.divergence[0, 0]), 9) for f in found.values()}) == 3


def test_a_transformer_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=HEADS, num_classes=4
    ).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    ours = attnlib.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=HEADS, num_classes=4
    ).eval()
    attnlib.models.build.load_pretrained(ours, model.state_dict())
    for how in ("zero", "mean", "uniform"):
        a, b = (head_importance(m, [(images().float(), LABELS)], how) for m in (model, ours))
        torch.testing.assert_close(a.divergence, b.divergence, atol=1e-6, rtol=1e-4)


def test_uniform_heads_read_what_they_may():
    """Of a causal model every token reads itself and earlier ones, each alike; other heads stay."""
    torch.manual_seed(0)
    from attnlib.models.tiny import TinyLM

    model = TinyLM(lambda: attnlib.create("softmax-attention", dim=8, num_heads=2, causal=True), dim=8).eval()
    record, plain = attnlib.look.Record(rows="all"), attnlib.look.Record(rows="all")
    ids = torch.randint(5, (1, 4))
    with torch.no_grad():
        with attnlib.attach(model, plain):
            model(ids)
        with attnlib.attach(model, ablated(model, [Node("z", 1, 1)], how="uniform"), record):
            model(ids)
    seen, before = (r.results()[1]["weights"][0][0] for r in (record, plain))
    expected = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(seen[1], expected)
    torch.testing.assert_close(seen[0], before[0])


def test_silencing_several_heads_of_an_image_model():
    model, x = vit(), images()
    nodes = [Node("z", 0, 1), Node("z", 1)]
    with torch.no_grad():
        for how in ("zero", "mean"):
            with attnlib.attach(model, ablated(model, nodes, x, how)):
                assert not torch.allclose(model(x), vit()(x))
        with attnlib.attach(model, ablated(model, [Node("z", 0, 1)], x, "zero")):
            torch.testing.assert_close(model(x).softmax(-1), by_hand(vit(), 0, 1, "zero", x))


def test_divergence_is_symmetric_and_bounded():
    p, q = (torch.rand(50, 7, dtype=torch.float64).softmax(-1) for _ in range(2))
    told = jensen_shannon(p, q)
    torch.testing.assert_close(told, jensen_shannon(q, p))
    assert 0 <= float(told.min()) and float(told.max()) <= math.log(2)
    assert float(jensen_shannon(p, p).abs().max()) == 0
    apart = jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert float(apart) == pytest.approx(math.log(2))


def test_it_is_drawn():
    pytest.importorskip("matplotlib")
    figure = layer_table(torch.tensor([[0.1, -0.2], [0.3, float("nan")]]), label="lost", diverging=True, numbers=True)
    assert figure.axes[0].get_ylabel() == "layer"
    with pytest.raises(ValueError, match="table must hold numbers"):
        layer_table(torch.zeros(0, 2))


@pytest.mark.parametrize(
    ("batches", "settings", "error", "message"),
    [
        ([], {}, ValueError, "batches holds none"), ([images()], dict(how="noise"), ValueError, "how='noise'"),
        (iter([images()]), dict(how="mean"), TypeError, "read twice"),
        ([(images(), LABELS[:3])], {}, ValueError, r"labels of 6 images must be \(6,\) whole numbers"),
        ([(images(), LABELS.double())], {}, ValueError, "whole numbers"),
        ([(images(), LABELS + 2)], {}, ValueError, "between 0 and 3"),
        ([(images(), LABELS, LABELS)], {}, ValueError, "pairs"), ([3], {}, TypeError, "batches must be"),
        (images(), {}, TypeError, "a list or a loader"),
    ],
)  # fmt: skip
def test_bad_batches(batches, settings, error, message):
    with pytest.raises(error, match=message):
        head_importance(vit(), batches, **settings)


def test_bad_models_and_heads():
    with pytest.raises(ValueError, match=r"logits \(B, classes\)"):
        head_importance(vit(num_classes=0, global_pool=""), [images()])
    with pytest.raises(ValueError, match="heads must be"):
        UniformHeads([Node("mlp", 0)])
    with pytest.raises(ValueError, match="heads is empty"):
        UniformHeads([])
    with pytest.raises(ValueError, match="does not exist"):
        ablated(vit(), [Node("z", 0, 9)], how="uniform")
    with pytest.raises(ValueError, match="measure='size'"):
        head_importance(vit(), [images()]).ranked("size")
