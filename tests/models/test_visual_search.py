"""eccNET: pools, networks and whole searches by the authors' classes, their arithmetic, baselines and bad input."""

import numpy as np
import pytest
import torch
from parity import Fixture
from scipy.stats import linregress

from attnlib.bench.data.displays import HUMAN_MS, PAIRS, TASKS, display
from attnlib.models.perception.search import (
    EccentricityPool,
    EccNet,
    asymmetry_index,
    attention_map,
    enlarge,
    peak,
    pool_same,
    reaction_time,
    search,
    search_map,
    search_slope,
    smooth,
    template_map,
)


@pytest.fixture(scope="module")
def recorded():
    return Fixture("eccnet-visual-search")


def sines(*shape, k):
    return torch.from_numpy(np.sin(np.arange(int(np.prod(shape)), dtype=np.float64) * k).reshape(shape)).float()


def images(*shape, k):
    """Channels last, as they were recorded."""
    return sines(*shape, k=k).movedim(-1, 1)


def filled(names, **settings):
    """Our narrow network with the sines of the recording."""
    net = EccNet(width=2, **settings).eval()
    own = {theirs: net.get_parameter(ours).shape for ours, theirs in net._keras_names().items()}
    arrays = {}
    for i, name in enumerate(names):
        shape = own[name]
        shape = shape if name.endswith("bias") else (shape[2], shape[3], shape[1], shape[0])
        fan = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        arrays[name] = sines(*shape, k=0.31 + 0.07 * i) * (2 * fan**-0.5 if len(shape) > 1 else 0.1)
    return net.load_keras(arrays)


@pytest.mark.parametrize("case", ["plain", "avg", "wide", "max", "stride1"])
def test_pools_are_the_authors(recorded, case):
    said = recorded.config[f"pool/{case}"]
    kw = dict(said["kw"])
    names = {"ecc_slope": "slope", "pool_type": "kind", "fovea_size": "fovea", "rf_quant": "quant"}
    pool = EccentricityPool(**{names.get(k, k): v for k, v in kw.items()})
    x = images(*said["shape"], k=0.83)
    torch.testing.assert_close(pool(x), recorded.tensors[f"pool/{case}/y"], atol=1e-6, rtol=1e-5)
    rings = pool.rings(max(x.shape[2:]))
    assert [w for w, _ in rings] == said["windows"] and [int(m.sum()) for _, m in rings] == said["cells"]


def test_rings_are_a_partition_and_no_slope_is_plain_pooling():
    for side in (7, 40, 101):
        for pool in (EccentricityPool(0.3, 4), EccentricityPool(0.1, 2, stride=1), EccentricityPool(0.4, 30)):
            assert (torch.stack([m for _, m in pool.rings(side)]).sum(0) == 1).all()
    x = torch.rand(2, 3, 41, 41)
    torch.testing.assert_close(EccentricityPool(0.0, 4)(x), pool_same(x, 2, 2))
    torch.testing.assert_close(pool_same(x[..., :40, :40], 2, 2), torch.nn.functional.avg_pool2d(x[..., :40, :40], 2))
    flat, deep = (EccNet(width=1, ecc_depth=d, slopes=(0.0,) * 5).eval() for d in (0, 5))
    deep.load_state_dict(flat.state_dict())
    for a, b in zip(flat(x[:, :, :32, :32] * 255), deep(x[:, :, :32, :32] * 255), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("case, settings", [
    ("eccnet", {}), ("ivsn", dict(ecc_depth=0, kind="max")), ("two", dict(ecc_depth=2))
])  # fmt: skip
def test_networks_are_the_authors(recorded, case, settings):
    net = filled(recorded.config["names"], **settings)
    # the recording has no mean colour taken off: it is put back
    given = {
        "display": images(1, 416, 416, 3, k=0.37) * 100 + images(1, 416, 416, 3, k=0.0007) * 60,
        "target": images(1, 28, 36, 3, k=0.51) * 120,
    }
    mean = torch.tensor([123.68, 116.779, 103.939])[:, None, None]
    for what, x in given.items():
        for i, got in enumerate(net(x.flip(1) + mean, target=what == "target")):
            want = recorded.tensors[f"net/{case}/{what}{i}"]
            step = 6 if what == "display" else 3
            scale = float(want.abs().max())
            assert float((got[:, :, ::step, ::step] - want).abs().max()) < 2e-4 * scale


def scene(seed):
    """The display that was searched: nine items, one with another shape and colour."""
    r = np.random.RandomState(seed)
    img = np.full((96, 96, 3), 255, np.uint8)
    t = int(r.randint(9))
    items = np.zeros((9, 96, 96), bool)
    for i in range(9):
        a, b = divmod(i, 3)
        items[i, a * 32 : a * 32 + 32, b * 32 : b * 32 + 32] = True
        y, x = a * 32 + r.randint(4), b * 32 + r.randint(4)
        it = np.full((28, 28, 3), 255, np.uint8)
        colour = r.randint(0, 200, 3)
        if i == t:
            it[4:24, 12:16] = it[4:8, 4:24] = (20, 40, 200)
            target = it
        else:
            it[4:24, 12:16] = it[20:24, 4:20] = colour
        img[y : y + 28, x : x + 28] = it
    picture, kernel = (torch.from_numpy(a).movedim(-1, 0).float() for a in (img, target))
    return picture, kernel, torch.from_numpy(items), t


@pytest.mark.parametrize("case", ["items", "zero", "ivsn", "free"])
@pytest.mark.parametrize("seed", [0, 1])
def test_searches_are_the_authors(recorded, case, seed):
    said = recorded.config[f"search/{case}/{seed}"]
    picture, kernel, items, t = scene(seed)
    assert t == said["goal"]
    net = filled(recorded.config["names"], ecc_depth=said["depth"], kind="max" if said["depth"] == 0 else "avg")
    weighting = "equal" if said["pattern"] == "l" else "response"
    found = search(
        net, picture, kernel, items[t], items if said["items"] else None, reach=96, limit=10 if said["items"] else 6,
        out_layer=said["layer"], weighting=weighting, dog=said["dog"],
    )  # fmt: skip
    assert found.fixations.tolist() == recorded.tensors[f"search/{case}/{seed}/fixations"].tolist()
    with torch.no_grad():
        seen = torch.nn.functional.pad(picture, (160,) * 4, value=255)[:, 48:368, 48:368]
        attention = attention_map(
            net(seen[None]), net(kernel[None], target=True), said["layer"], weighting, said["dog"]
        )
    big = enlarge(attention, (320, 320))
    big = (big - big.min())[112:208, 112:208]
    want = recorded.tensors[f"search/{case}/{seed}/map"][7:13, 7:13]
    inside = want > 0  # what is not visited
    got = big[::16, ::16]
    assert int(inside.sum()) > 20
    assert float((got - want)[inside].abs().max()) < 1e-3 * float(want.max())


def test_gaussians_and_enlarging_are_those_of_opencv(recorded):
    x = recorded.tensors["cv/x"]
    for name, size, sigma in (("31", 3, 1), ("75", 7, 5), ("30", 3, 0), ("50", 5, 0)):
        torch.testing.assert_close(smooth(x, size, sigma), recorded.tensors[f"cv/blur{name}"], atol=1e-6, rtol=1e-5)
    for name, size in (("resize", (40, 60)), ("resize2", (36, 44))):
        torch.testing.assert_close(enlarge(x, size), recorded.tensors[f"cv/{name}"], atol=1e-5, rtol=1e-4)


def test_a_target_alone_is_found_at_once_and_nothing_is_visited_twice():
    torch.manual_seed(0)
    net = EccNet(width=4).eval()
    for task in ("L", "curve"):
        shown = display(task, 1, deg2px=6 if task == "L" else 12, generator=torch.Generator().manual_seed(1))
        only = shown.goal[None]
        found = search(net, shown.image, shown.target, shown.goal, only, TASKS[task].background, border=32)
        assert found.found and len(found.fixations) == 2 and found.count(10, 32) == 1
    shown = display("cross", 9, deg2px=6, generator=torch.Generator().manual_seed(2))
    nowhere = torch.zeros_like(shown.goal)
    nowhere[0, 0] = True
    found = search(net, shown.image, shown.target, nowhere, shown.items, border=32, limit=9)
    visited = [int(i.nonzero()) for r, c in found.fixations[1:].tolist() if len(i := shown.items[:, r, c])]
    assert len(set(visited)) == len(visited) >= 5


def test_baselines():
    shown = display("20 among 0", 8, deg2px=12, generator=torch.Generator().manual_seed(0))
    best = template_map(shown.image, shown.target)
    assert search_map(best, shown.goal, shown.items).found
    counts = [
        search_map(torch.rand(best.shape, generator=torch.Generator().manual_seed(s)), shown.goal, shown.items)
        for s in range(40)
    ]
    assert all(c.found for c in counts) and 6 < np.mean([len(c.fixations) - 1 for c in counts]) < 11


def test_displays():
    for name, pair in PAIRS.items():
        for task in (pair.hard, pair.easy):
            assert len(HUMAN_MS[task]) == len(pair.items)
            shown = display(task, pair.items[-1], deg2px=8, generator=torch.Generator().manual_seed(3))
            side = shown.image.shape[1]
            assert (shown.items.sum(0) == 1).all() and shown.items.shape == (pair.grid**2, side, side)
            changed = shown.image[0] != pair.background
            assert sum(bool((changed & i).any()) for i in shown.items) == pair.items[-1]
            box = shown.image[0][shown.goal].reshape(side // pair.grid, -1)
            h = shown.target.shape[1]
            places = box.unfold(0, h, 1).unfold(1, h, 1)
            assert (places == shown.target[0]).flatten(2).all(2).any(), (name, task)
        slopes = [search_slope(pair.items, HUMAN_MS[t]) for t in (pair.hard, pair.easy)]
        assert asymmetry_index(*slopes) > 0  # people find one harder than the other
    a, b = (display("T", 6, 6, torch.Generator().manual_seed(1)).image for _ in range(2))
    assert torch.equal(a, b)


def test_slopes_times_and_indices():
    items, times = [3, 6, 9, 12], [510.0, 560.0, 700.0, 720.0]
    assert search_slope(items, times) == pytest.approx(linregress(items, times).slope)
    assert reaction_time(2) == pytest.approx(2 * 252.359 + 376.271)
    assert asymmetry_index(7, 3) == -asymmetry_index(3, 7) == pytest.approx(0.4)


def test_bad_input():
    net = EccNet(width=1).eval()
    shown = display("L", 3, deg2px=6, generator=torch.Generator().manual_seed(0))
    given = dict(display=shown.image, target=shown.target, goal=shown.goal, items=shown.items, border=16)
    with pytest.raises(ValueError, match="search map is zero everywhere"):
        peak(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="search map is zero everywhere"):
        search_map(torch.ones(40, 40), torch.ones(40, 40).triu(38) > 0, torch.ones(1, 40, 40) > 0)
    for p in net.parameters():
        p.data.zero_()
    with pytest.raises(ValueError, match="no block answers"):
        search(net, **given)
    with pytest.raises(ValueError, match="goal is nowhere"):
        search(net, **{**given, "goal": torch.zeros_like(shown.goal)})
    with pytest.raises(ValueError, match="items"):
        search(net, **{**given, "items": shown.items[:, 1:]})
    with pytest.raises(ValueError, match="count must be"):
        display("L", 10)
    with pytest.raises(ValueError, match="task="):
        display("Q", 3)
    with pytest.raises(ValueError, match="rings of less than one pixel"):
        EccentricityPool(0.3, 1)
    with pytest.raises(ValueError, match="two numbers of items"):
        search_slope([3, 3], [1, 2])
    with pytest.raises(ValueError, match=r"too many or too few: \['block1_conv1/bias'"):
        net.load_keras({})
