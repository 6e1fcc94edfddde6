"""Random features of one attention layer: the equation term by term, its symmetry, its fits and what they learn."""

import pytest
import torch
from torch.nn.functional import normalize

from attnlib.theory.random_features import (
    RandomFeatureAttention,
    RandomFeatureMLP,
    RandomFeatures,
    ridge,
    target,
)

DOUBLE = torch.float64


def draw(count, keys, dim, seed=0):
    x = torch.randn(count, keys + 1, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    x = normalize(x, dim=-1)
    return x[:, 0], x[:, 1:]


@pytest.mark.parametrize("settings", [{}, {"bias": 2.0}, {"activation": "exp"}, {"normalise": True}])
def test_features_are_the_equation(settings):
    layer = RandomFeatureAttention(3, 4, seed=5, **settings)
    query, keys = draw(2, 5, 3)
    one = torch.ones(1, dtype=DOUBLE)
    for b in range(2):
        found = []
        for w in layer.weight:
            tokens = [torch.cat([k, one]) for k in keys[b]]
            scores = [torch.cat([query[b], one]) @ w @ t for t in tokens]
            weights = [s.exp() if settings.get("activation") == "exp" else s.clamp(min=0) for s in scores]
            total = sum(weights) if settings.get("normalise") else 5
            found.append(sum(a * t for a, t in zip(weights, tokens, strict=True)) / (total if total else 1))
        assert torch.allclose(layer(query, keys)[b], torch.cat(found))


def test_biased_weights_differ_by_their_mean_alone():
    plain, biased = (RandomFeatureAttention(3, 4, bias=b, seed=1).weight for b in (0.0, 2.0))
    assert torch.allclose(biased - plain, 2.0 * torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=DOUBLE)).expand(4, 4, 4))
    drawn = RandomFeatureAttention(15, 400).weight
    assert float(drawn.var()) == pytest.approx(0.25, rel=0.02)


def test_exponentials_over_their_sum_are_softmax_attention():
    layer = RandomFeatureAttention(3, 1, activation="exp", normalise=True)
    query, keys = draw(2, 5, 3)
    ones = torch.ones(2, 5, 1, dtype=DOUBLE)
    k = torch.cat([keys, ones], -1)
    q = torch.cat([query, ones[:, 0]], -1)[:, None] @ layer.weight[0]
    told = torch.nn.functional.scaled_dot_product_attention(q, k, k, scale=1.0)[:, 0]
    assert torch.allclose(layer(query, keys), told)


def test_order_of_keys_is_not_seen_but_which_token_asks_is():
    layer = RandomFeatureAttention(4, 6)
    query, keys = draw(3, 5, 4)
    assert torch.allclose(layer(query, keys), layer(query, keys[:, torch.tensor([3, 1, 4, 0, 2])]))
    swapped = torch.cat([query[:, None], keys[:, 1:]], 1)
    assert not torch.allclose(layer(query, keys), layer(keys[:, 0], swapped), atol=1e-2)
    mlp = RandomFeatureMLP(4, 5, 6)
    assert not torch.allclose(mlp(query, keys), mlp(query, keys.flip(1)), atol=1e-2)


def test_models_of_the_paper_train_as_many_numbers():
    query, keys = (t.float() for t in draw(1, 16, 16))
    assert RandomFeatureAttention(16, 1000)(query, keys).shape[1] == 17_000
    assert RandomFeatureMLP(16, 16, 17_000)(query, keys).shape[1] == 17_000


def test_ridge_is_where_gradient_training_ends():
    g = torch.Generator().manual_seed(0)
    query, keys = draw(30, 4, 3)
    features, y = RandomFeatureAttention(3, 3)(query, keys), torch.randn(30, dtype=DOUBLE, generator=g)
    v = ridge(features, y, 0.5)
    assert torch.allclose(ridge(features, y, 0.5, "dual"), v)
    trained = torch.zeros_like(v, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [trained], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        error = (features @ trained - y).square().sum() + 0.5 * trained.square().sum()
        error.backward()
        return error

    optimizer.step(closure)
    assert torch.allclose(trained, v, atol=1e-6)


def test_targets_are_their_equations():
    query, keys = draw(2, 3, 4)
    beta = torch.randn(4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for b in range(2):
        told = sum((query[b] @ k) ** 2 * (beta @ k) ** 3 for k in keys[b]) / 3
        assert torch.allclose(target(query, keys, beta, 3, 2)[b], told)
        weights = torch.stack([(1.5 * query[b] @ k).exp() for k in keys[b]])
        told = sum(w * (beta @ k) for w, k in zip(weights, keys[b], strict=True)) / weights.sum()
        assert torch.allclose(target(query, keys, beta, gamma=1.5)[b], told)


def test_attention_learns_a_square_of_keys_from_fewer_samples_than_the_mlp():
    few, many = (RandomFeatures(dim=4, keys=8, heads=60, count=n, tested=1000).run(0) for n in (100, 400))
    square = "error of plain attention, square of keys"
    assert many[square] < few[square] and many[square] < 0.3
    assert many["attention over MLP, square of keys"] < 0.5


def test_a_bias_helps_where_the_target_is_a_power_of_the_correlation():
    """Several seeds."""
    for seed in (0, 1, 2):
        found = RandomFeatures(dim=6, keys=8, heads=60, count=500, tested=1000).run(seed)
        assert found["biased over plain attention, fourth power of query times key"] < 1


def test_what_makes_no_sense_is_refused():
    query, keys = draw(2, 3, 4)
    with pytest.raises(ValueError, match="keys has none"):
        RandomFeatureAttention(4, 2)(query, keys[:, :0])
    with pytest.raises(ValueError, match="activation"):
        RandomFeatureAttention(4, 2, activation="gelu")
    with pytest.raises(ValueError, match="query"):
        RandomFeatureAttention(5, 2)(query, keys)
    with pytest.raises(ValueError, match="penalty"):
        ridge(keys[0], keys[0, :, 0], 0.0)
    with pytest.raises(ValueError, match="form"):
        ridge(keys[0], keys[0, :, 0], 1.0, "kernel")


def test_the_experiment_has_an_outside():
    inside = RandomFeatures()
    assert inside.outside().setting() == inside.setting() | {"ordered": True}
