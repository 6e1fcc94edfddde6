"""Amortized sliced distances: the six released maps, draws, losses, clouds of unequal number, and the claims."""

import math

import pytest
import torch
from parity import HERE
from safetensors.torch import load_file
from torch.nn.functional import normalize

from attnlib.models.clouds import (
    MAPS,
    AmortizedSlicedWasserstein,
    DirectionMap,
    PointNetAutoencoder,
    best_directions,
    random_directions,
    sliced_wasserstein,
    von_mises_fisher,
)

RECORDED = load_file(HERE / "sa-amortized-dsw.safetensors")
NAMES = [*MAPS, "linformer-shared"]


def under(prefix):
    return {k[len(prefix) + 1 :]: v for k, v in RECORDED.items() if k.startswith(prefix + "/")}


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).detach().abs().max()) <= tolerance * max(float(theirs.abs().max()), 1e-3)


def build(name, **settings):
    return DirectionMap(
        name.removesuffix("-shared"), points=7, key_dim=8, length=5, sharing=name.endswith("shared"), **settings
    )


@pytest.mark.parametrize("name", NAMES)
def test_maps_equal_the_authors(name):
    """Initial values from the same seed, output, and gradients of both clouds and of all weights."""
    torch.manual_seed(1)
    net = build(name)
    for key, value in under(f"{name}/sd").items():
        assert torch.equal(net.state_dict()[key], value), key
    net.load_state_dict(under(f"{name}/sd"))
    x, y = RECORDED["x"].clone().requires_grad_(), RECORDED["y"].clone().requires_grad_()
    out = net(x, y)
    (out * RECORDED["g"]).sum().backward()
    close(out, RECORDED[f"{name}/y"])
    close(x.grad, RECORDED[f"{name}/dx"])
    close(y.grad, RECORDED[f"{name}/dy"])
    for key, grad in under(f"{name}/dw").items():
        if key == "attn.tokeys.bias" and "linformer" not in name:
            assert float(grad.abs().max()) < 1e-6  # what all keys share cancels: rounding alone
            continue
        close(dict(net.named_parameters())[key].grad, grad)


LOSSES = sorted(k[: -len("/dx")] for k in RECORDED if k.endswith("/dx") and "sw" in k)


@pytest.mark.parametrize("key", LOSSES)
def test_losses_equal_the_authors(key):
    """Two steps of the map, perhaps a search behind it, then the loss and its gradients; from the same seeds."""
    name, loss = key.split("/")
    torch.manual_seed(1)
    loss_of = AmortizedSlicedWasserstein(
        build(name), 6, 4.0 if "vsw" in loss else None, squared="root" not in loss, refine=3 * ("tuned" in loss),
        refine_lr=1e-2, compat="authors",
    )  # fmt: skip
    moving = torch.optim.Adam(loss_of.map.parameters(), lr=1e-2, betas=(0.0, 0.9))
    x, y = RECORDED["x"].clone().requires_grad_(), RECORDED["y"].clone().requires_grad_()
    torch.manual_seed(2)
    loss_of.train_map(x, y, moving, steps=2)
    value = loss_of(x, y)
    value.backward()
    close(value, RECORDED[key], 1e-4)  # Adam's first steps divide gradients by their own size
    close(x.grad, RECORDED[f"{key}/dx"], 1e-4)
    close(y.grad, RECORDED[f"{key}/dy"], 1e-4)
    for weight, after in under(f"{key}/after").items():
        if weight == "attn.tokeys.bias" and "linformer" not in name:
            continue  # its gradient is rounding, which Adam makes steps of
        close(loss_of.map.state_dict()[weight], after, 1e-4)


def test_draws_equal_the_authors():
    torch.manual_seed(4)
    close(von_mises_fisher(RECORDED["vmf/mean"], 3.0, 4, compat="authors"), RECORDED["vmf/3"])


def test_pointnet_equals_the_authors():
    """From the same seed, with their large weights as a wave; codes and clouds, norms in training."""
    torch.manual_seed(5)
    net = PointNetAutoencoder(latent=8, points=5)
    sums = torch.stack([p.detach().double().sum() for p in net.parameters()])
    torch.testing.assert_close(sums, RECORDED["pointnet/sums"])
    for key, value in net.state_dict().items():
        if value.is_floating_point() and value.numel() > 4096:
            wave = torch.sin(torch.arange(value.numel()).float() * 0.7 + len(key)).view_as(value)
            value.copy_(wave * value.std())
    # In float64: norms of two clouds enlarge what float32 rounds, by how much the processor decides.
    net.double()
    z = net.encode(RECORDED["pointnet/x"].double())
    close(z, RECORDED["pointnet/z"])
    close(net.decode(z), RECORDED["pointnet/y"])
    assert sum(p.numel() for p in PointNetAutoencoder(points=2048).parameters()) == 8028544
    with pytest.raises(ValueError, match="latent"):
        PointNetAutoencoder(latent=0)


def random_clouds(seed=0, m=20, n=20, batch=2, dim=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, m, dim, generator=g, dtype=torch.float64)
    y = torch.randn(batch, n, dim, generator=g, dtype=torch.float64) * torch.tensor([1.0, 1.0, 4.0])[:dim].double()
    return x, y


@pytest.mark.parametrize("kind", MAPS)
def test_equal_clouds_are_at_no_distance(kind):
    x, _ = random_clouds(m=7)
    loss_of = AmortizedSlicedWasserstein(build(kind).double(), 5)
    assert float(loss_of(x, x)) == 0.0


@pytest.mark.parametrize("kind", ["attention", "efficient", "linformer"])
def test_attention_maps_are_symmetric_and_blind_to_order(kind):
    x, y = random_clouds(m=7, n=7)
    net = build(kind).double()
    torch.testing.assert_close(net(x, y), net(y, x))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = net(x[:, order], y)
    if kind == "linformer":  # a weight for every place
        assert not torch.allclose(moved, net(x, y), atol=1e-4)
        return
    torch.testing.assert_close(moved, net(x, y))
    loss_of = AmortizedSlicedWasserstein(net, 5)
    both = [loss_of(c, y, generator=torch.Generator().manual_seed(3)) for c in (x, x[:, order])]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("kind", ["attention", "efficient"])
def test_absent_points_change_nothing(kind):
    x, y = random_clouds(m=7, n=5)
    net = DirectionMap(kind, key_dim=8).double()
    padded = torch.cat([x, torch.full((2, 2, 3), 1e3).double()], 1)
    valid = torch.arange(9) < 7
    valid = valid.expand(2, 9)
    torch.testing.assert_close(net(padded, y, x_valid=valid), net(x, y))
    to = random_directions(2, 6, 3).double()
    torch.testing.assert_close(
        sliced_wasserstein(padded, y, to, x_valid=valid, quantiles=True), sliced_wasserstein(x, y, to, quantiles=True)
    )
    loss_of = AmortizedSlicedWasserstein(net, 5)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    torch.testing.assert_close(
        loss_of(padded, y, seeds[0], x_valid=valid, quantiles=True), loss_of(x, y, seeds[1], quantiles=True)
    )


@pytest.mark.parametrize(("m", "n"), [(6, 4), (5, 5), (3, 7), (1, 4)])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_unequal_clouds_are_paired_by_quantiles(m, n, p):
    """Repeating every point until the numbers agree changes no quantile."""
    x, y = random_clouds(m=m, n=n)
    to = random_directions(2, 3, 3).double()
    every = math.lcm(m, n)
    same = [c.repeat_interleave(every // c.shape[1], 1) for c in (x, y)]
    expected = sliced_wasserstein(*same, to, p=p) / every * (m + n) / 2
    torch.testing.assert_close(sliced_wasserstein(x, y, to, p=p, quantiles=True), expected)


def test_quantiles_have_gradients():
    x, y = random_clouds(m=5, n=3, batch=1)
    to = random_directions(1, 2, 3).double()
    assert torch.autograd.gradcheck(
        lambda a, b, c: sliced_wasserstein(a, b, c, quantiles=True), [t.requires_grad_() for t in (x, y, to)]
    )


def test_draws_lie_on_the_sphere_around_their_mean():
    mean = normalize(torch.randn(2, 3, dtype=torch.float64), dim=-1)
    drawn = von_mises_fisher(mean, 5.0, 4000)
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(2, 4000).double())
    # The mean resultant length in three dimensions is coth(kappa) - 1 / kappa.
    length = 1 / math.tanh(5.0) - 1 / 5.0
    torch.testing.assert_close(drawn.mean(1), mean * length, atol=0.03, rtol=0)
    near = von_mises_fisher(mean, 1e6, 50)
    assert float((near * mean[:, None]).sum(-1).min()) > 0.9999
    even = von_mises_fisher(mean, 1e-6, 4000)
    assert float(even.mean(1).norm(dim=-1).max()) < 0.05


@pytest.mark.parametrize("kappa", [0.5, 5.0, 100.0])
def test_closed_sampling_and_rejection_agree(kappa):
    """The largest gap between the two distributions of the cosine (Kolmogorov-Smirnov, 1e-4 level)."""
    mean, n = torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64), 3000
    draws = [
        von_mises_fisher(mean, kappa, n, method=how)[0].matmul(mean[0]).sort().values for how in ("closed", "rejection")
    ]
    at = torch.cat(draws)
    share = [torch.searchsorted(d, at, right=True) / n for d in draws]
    assert float((share[0] - share[1]).abs().max()) < 2.23 * math.sqrt(2 / n)


def test_rejection_serves_other_dimensions():
    mean = normalize(torch.randn(2, 6, dtype=torch.float64), dim=-1)
    drawn = von_mises_fisher(mean, 8.0, 4000)
    # I_3(8) / I_2(8)
    torch.testing.assert_close(drawn.mean(1), mean * 236.0752 / 327.5958, atol=0.03, rtol=0)


def test_a_mean_along_the_first_axis_is_reflected_by_nothing():
    mean = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    drawn = von_mises_fisher(mean, 100.0, 6)
    drawn.sum().backward()
    assert drawn[..., 0].min() > 0.8 and torch.isfinite(mean.grad).all()


def test_concentration_lies_between_one_direction_and_all():
    x, y = random_clouds(m=40, n=40, batch=1)
    center = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64)
    plain = sliced_wasserstein(x, y, random_directions(1, 4000, 3).double())
    alone = sliced_wasserstein(x, y, center)
    loose, tight = (sliced_wasserstein(x, y, von_mises_fisher(center[:, 0], k, 4000)) for k in (1e-6, 1e6))
    torch.testing.assert_close(tight, alone, rtol=1e-3, atol=0)
    torch.testing.assert_close(loose, plain, rtol=0.1, atol=0)
    assert alone > plain


@pytest.mark.parametrize("kind", ["attention", "efficient", "generalized-linear"])
@pytest.mark.parametrize("kappa", [None, 10.0])
def test_a_trained_map_looks_where_clouds_differ(kind, kappa):
    """Clouds that differ along one axis: more than along random directions, after a hundred steps."""
    x, y = random_clouds(m=16, n=16, batch=8)
    x, y = x.float(), y.float()
    torch.manual_seed(0)
    loss_of = AmortizedSlicedWasserstein(DirectionMap(kind, points=16, key_dim=16), 20, kappa)
    moving = torch.optim.Adam(loss_of.map.parameters(), lr=2e-2)
    loss_of.train_map(x, y, moving, steps=100)
    assert float(loss_of(x, y)) > 1.5 * float(sliced_wasserstein(x, y, random_directions(8, 200, 3)).mean())


def test_the_search_finds_the_largest_distance_from_one_of_eight_starts():
    """It climbs, and may end on a lower hill."""
    x, y = (c.repeat_interleave(8, 0) for c in random_clouds(m=40, n=40))
    generator = torch.Generator().manual_seed(3)
    start = random_directions(16, 1, 3, generator=generator).double()
    found = best_directions(x, y, start, steps=150, lr=0.05)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(16, 1).double())
    reached = sliced_wasserstein(x, y, found)
    assert (reached >= sliced_wasserstein(x, y, start)).all()
    many = random_directions(2, 2000, 3, generator=generator).double().unbind(1)
    best = torch.stack([sliced_wasserstein(x[::8], y[::8], d[:, None]) for d in many]).amax(0)
    assert (reached.view(2, 8).amax(1) >= 0.99 * best).all()


def test_the_loss_moves_clouds_and_not_the_map():
    x, y = random_clouds(m=6, n=6)
    loss_of = AmortizedSlicedWasserstein(DirectionMap("attention").double(), 4)
    loss_of(x, y.requires_grad_()).backward()
    assert y.grad.abs().sum() > 0 and all(p.grad is None for p in loss_of.parameters())


BAD = [
    (lambda x, y: sliced_wasserstein(x, y[:, :3], random_directions(2, 2, 3)), "pass quantiles=True"),
    (lambda x, y: sliced_wasserstein(x, y, random_directions(2, 2, 4)), r"directions must be \(B, L, d\)"),
    (lambda x, y: sliced_wasserstein(x[..., :2], y, random_directions(2, 2, 3)), "of one dimension"),
    (lambda x, y: sliced_wasserstein(x[:, :0], y, random_directions(2, 2, 3)), "x has no points"),
    (lambda x, y: sliced_wasserstein(x, y, random_directions(2, 2, 3), p=0.5), "p must be"),
    (lambda x, y: DirectionMap("linear"), "points must be given for kind='linear'"),
    (lambda x, y: DirectionMap("softmax"), "kind='softmax' is not possible; choose one of"),
    (lambda x, y: DirectionMap("linear", points=9)(x, y), "built for points=9"),
    (lambda x, y: DirectionMap("linear", points=5)(x, y, x_valid=torch.ones(2, 5) > 0), "every point has a weight"),
    (lambda x, y: von_mises_fisher(x[:, 0], 0.0, 2), "kappa must be"),
    (lambda x, y: von_mises_fisher(torch.ones(1, 4), 1.0, 2, method="closed"), "method='closed' serves 3 dimensions"),
    (
        lambda x, y: sliced_wasserstein(
            x, y, random_directions(2, 2, 3), quantiles=True, y_valid=torch.zeros(2, 5) > 0
        ),
        "at least one point",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 5, 3), torch.randn(2, 5, 3))
