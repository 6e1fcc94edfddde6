"""Strength by distance, and the atlas of patterns, on maps whose pattern is known."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.hooks import Site
from attnlib.look import (
    CollectMaps,
    DistanceProfile,
    MapAutoencoder,
    Maps,
    atlas,
    grid_distances,
    pattern_atlas,
    pool_maps,
    strength_by_layer,
)

GRID = (3, 4)


def vit(**settings):
    torch.manual_seed(0)
    sizes = dict(img_size=(24, 32), patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=4, reg_tokens=1)
    model = attnlib.create_model("vit_tiny_patch16_224", **{**sizes, **settings}).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def images(count=3, seed=1):
    return torch.randn(count, 3, 24, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps_of(model, x):
    record = attnlib.look.Record(rows="all")
    with torch.no_grad(), attnlib.attach(model, record):
        model(x)
    return {layer: held["weights"][0] for layer, held in record.results().items()}


def seen(probe, weights, layer=0):
    """What a probe makes of given maps (B, h, N, N)."""
    n = weights.shape[-1]
    site = Site(layer=layer, name=f"l{layer}", module=nn.Identity(), kind="self", heads=weights.shape[1],
                kv_heads=weights.shape[1], head_dim=1, scale=1.0, n_queries=n, n_keys=n)  # fmt: skip
    rows, _ = probe.probe(site)
    for block in rows.split(5):
        probe.observe(site, weights[:, :, block], block, None)


# ---- strength by distance


def test_distances_on_a_grid():
    apart = grid_distances(GRID)
    for i in range(12):
        for j in range(12):
            down, right = abs(i // 4 - j // 4), abs(i % 4 - j % 4)
            assert apart[i, j] == max(down, right) and grid_distances(GRID, "manhattan")[i, j] == down + right


@pytest.mark.parametrize("metric", ["chebyshev", "manhattan"])
def test_uniform_maps_have_the_shares_of_pairs_and_the_identity_stays(metric):
    apart = grid_distances(GRID, metric)
    shares = torch.bincount(apart.flatten()).double() / 144
    probe = DistanceProfile(GRID, metric=metric)
    seen(probe, torch.full((2, 2, 12, 12), 1 / 12))
    seen(probe, torch.eye(12).expand(1, 3, 12, 12), layer=1)
    found = probe.results()
    torch.testing.assert_close(found[0]["strength"], shares.expand(2, -1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0]["distance"], apart.double().mean().expand(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0]["entropy"], torch.tensor(12.0).double().log().expand(2), atol=1e-5, rtol=1e-5)
    assert found[1]["strength"][:, 0].tolist() == [1.0] * 3 and not found[1]["entropy"].any()
    assert strength_by_layer(found).shape == (2, len(shares))


def test_of_a_model_with_tokens_beside_the_patches():
    """The oracle: a loop over all pairs."""
    model, x = vit(), images()
    probe, raw = DistanceProfile(GRID, prefix=2), DistanceProfile(GRID, prefix=2, normalise=False)
    with torch.no_grad(), attnlib.attach(model, probe, raw):
        model(x[:2])
        model(x[2:])
    apart, found = grid_distances(GRID), probe.results()
    for layer, weights in maps_of(model, x).items():
        patches = weights[:, :, 2:, 2:]
        own = patches / patches.sum(-1, keepdim=True)
        for k in range(4):
            of_k = (own * (apart == k)).sum(-1).mean((0, 2))
            torch.testing.assert_close(found[layer]["strength"][:, k], of_k.double(), atol=1e-6, rtol=1e-5)
            of_k = (patches * (apart == k)).sum(-1).mean((0, 2))
            torch.testing.assert_close(raw.results()[layer]["strength"][:, k], of_k.double(), atol=1e-6, rtol=1e-5)
        share = 1 - patches.sum(-1).mean((0, 2))
        torch.testing.assert_close(found[layer]["prefix_share"], share.double(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found[layer]["strength"].sum(-1), torch.ones(3).double(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(raw.results()[layer]["strength"].sum(-1), 1 - share.double(), atol=1e-6, rtol=1e-6)


def test_rows_that_read_no_patch_are_left_out():
    weights = torch.zeros(1, 1, 5, 5)
    weights[0, 0, :, 0] = 1
    weights[0, 0, 1] = torch.tensor([0.0, 1, 0, 0, 0])
    probe = DistanceProfile((2, 2), prefix=1)
    seen(probe, weights)
    found = probe.results()[0]
    assert found["strength"].tolist() == [[1.0, 0.0]] and found["prefix_share"].tolist() == [0.75]


def test_tokens_that_do_not_fit_are_refused():
    for made in (DistanceProfile((3, 4), prefix=1), CollectMaps((2, 2))):
        model = vit()
        with pytest.raises(ValueError, match="are .* tokens, but layer 0"), attnlib.attach(model, made):
            model(images())
    for bad in (lambda: DistanceProfile((3,)), lambda: DistanceProfile((3, 0)), lambda: CollectMaps(GRID, side=0),
                lambda: DistanceProfile(GRID, prefix=-1), lambda: DistanceProfile(GRID, metric="cosine")):  # fmt: skip
        with pytest.raises(ValueError, match="grid|side|prefix|metric"):
            bad()
    with pytest.raises(ValueError, match="nothing was recorded"):
        strength_by_layer({})


# ---- maps of one size


def test_pooled_maps_are_means_over_queries_of_sums_over_keys():
    weights = torch.rand(2, 12, 12, dtype=torch.float64).softmax(-1)
    pooled = pool_maps(weights, GRID, 2)
    rows, columns = [0, 0, 1], [0, 0, 1, 1]
    of = torch.tensor([rows[i // 4] * 2 + columns[i % 4] for i in range(12)])
    for a in range(4):
        for b in range(4):
            expected = weights[:, of == a][:, :, of == b].sum(-1).mean(-1)
            torch.testing.assert_close(pooled[:, a, b], expected)
    torch.testing.assert_close(pooled.sum(-1), torch.ones(2, 4).double())
    torch.testing.assert_close(pool_maps(weights, GRID, 9), weights)
    with pytest.raises(ValueError, match="has 6"):
        pool_maps(weights, (2, 3), 2)


def test_collected_maps_know_where_they_come_from():
    model, x = vit(), images()
    probe = CollectMaps(GRID, prefix=2, side=2)
    assert probe.results() is None
    with torch.no_grad(), attnlib.attach(model, probe):
        model(x[:2])
        model(x[2:])
    found = probe.results()
    assert found.weights.shape == (18, 4, 4) and found.grid == (2, 2)
    assert sorted(map(tuple, found.origins.tolist())) == [
        (i, j, h) for i in range(3) for j in range(2) for h in range(3)
    ]
    held = maps_of(model, x)
    for weights, (image, layer, head) in zip(found.weights, found.origins.tolist(), strict=True):
        patches = held[layer][image, head, 2:, 2:]
        expected = pool_maps(patches / patches.sum(-1, keepdim=True), GRID, 2)
        torch.testing.assert_close(weights, expected.float(), atol=1e-6, rtol=1e-5)


# ---- the atlas


def planted(count=20, side=5):
    """Maps of four families with noise: self, near, row, uniform."""
    maker = torch.Generator().manual_seed(0)
    n = side * side
    apart, at = grid_distances((side, side)), torch.arange(n) // side
    ideal = torch.stack([torch.eye(n), (apart <= 1).float(), (at[:, None] == at[None]).float(), torch.ones(n, n)])
    ideal = ideal / ideal.sum(-1, keepdim=True)
    noise = torch.rand(count * 4, n, n, generator=maker).pow(4)
    noise = noise / noise.sum(-1, keepdim=True)
    family = torch.arange(4).repeat(count)
    origins = torch.stack([torch.arange(4 * count) // 4, family, torch.zeros(4 * count, dtype=torch.long)], -1)
    return Maps(0.8 * ideal[family] + 0.2 * noise, origins, (side, side)), family


@pytest.fixture(scope="module")
def charted():
    pytest.importorskip("sklearn")
    maps, family = planted()
    return atlas(maps, clusters=4, code=8, epochs=10, batch=20), family


def test_planted_patterns_are_told_apart(charted):
    found, family = charted
    pure = sum(int(torch.bincount(family[found.clusters == c]).max()) for c in range(4)) / len(family)
    assert pure > 0.95
    assert found.loss[-1] < 0.5 * found.loss[0]
    assert torch.bincount(found.clusters, minlength=4).diff().max() <= 0
    rows = {int(family[found.clusters == c].mode().values): found.table()[c] for c in range(4)}
    assert rows[0]["self"] > 0.5 > rows[1]["self"] and rows[2]["row"] > 0.5 > rows[3]["row"]
    assert rows[3]["entropy_share"] > max(rows[f]["entropy_share"] for f in range(3))
    assert rows[0]["distance"] < rows[1]["distance"] < rows[3]["distance"]
    torch.testing.assert_close(found.prototypes.sum(-1), torch.ones(4, 25))
    assert found.points.shape == (80, 2) and found.codes.shape == (80, 8)
    # The origin's second number was the family, so that shares tell them apart as well.
    assert found.shares().amax(-1).min() > 0.95 and found.shares().sum(-1).allclose(torch.ones(4).double())


def test_the_plane_keeps_what_varies_most(charted):
    codes, points = charted[0].codes.double(), charted[0].points.double()
    values = torch.linalg.eigvalsh(torch.cov(codes.T))
    torch.testing.assert_close(points.var(0), values.flip(0)[:2], atol=1e-4, rtol=1e-3)


def test_the_same_seed_gives_the_same_atlas_and_leaves_the_generator_alone():
    pytest.importorskip("sklearn")
    maps, _ = planted(4)
    before = torch.get_rng_state()
    first, second = (atlas(maps, clusters=2, epochs=1, loss="mse") for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.clusters, second.clusters)
    assert torch.equal(before, torch.get_rng_state())
    laid = atlas(maps, clusters=2, epochs=1, layout="tsne")
    assert laid.points.shape == (16, 2) and laid.points.isfinite().all()


def test_autoencoders_of_any_size():
    for size in (1, 4, 7, 9, 50):
        model = MapAutoencoder(size, code=3)
        made = model(torch.full((2, size, size), 1 / size))
        torch.testing.assert_close(made.sum(-1), torch.ones(2, size))
        assert model.encode(made).shape == (2, 3)


def test_it_is_drawn(charted):
    pytest.importorskip("matplotlib")
    found = charted[0]
    figure = pattern_atlas(found.points, found.clusters, found.prototypes)
    assert len(figure.axes) == 5
    with pytest.raises(ValueError, match=r"clusters must have shape \(n=79\)"):
        pattern_atlas(found.points[1:], found.clusters, found.prototypes)
    with pytest.raises(ValueError, match="between 0 and 1"):
        pattern_atlas(found.points, found.clusters, found.prototypes[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(clusters=17), "fewer than clusters=17"), (dict(layout="umap"), "layout"), (dict(loss="l1"), "loss"),
        (dict(epochs=0), "epochs"), (dict(lr=0.0), "lr"), (dict(code=0), "code"),
    ],
)  # fmt: skip
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        atlas(planted(4)[0], **change)


def test_maps_whose_rows_do_not_sum_to_one():
    maps, _ = planted(4)
    maps.weights = maps.weights * 0.5
    with pytest.raises(ValueError, match="rows that sum to 1"):
        atlas(maps, clusters=2)
