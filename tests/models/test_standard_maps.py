"""Coarse maps as a prior: encoders against their formulas, empty maps, turned frames, hidden lanes."""

import copy
import math

import pytest
import torch

from attnlib.bench.data.lanes import REACH, lanes, recovered
from attnlib.models.maps.standard import (
    MappedLanes,
    PolylineEncoder,
    PolylinePrior,
    RasterPrior,
    Roads,
    collate,
    draw,
    moved,
    resample,
)
from attnlib.models.protocol import Optimizers, train_batch


def roads(seed=0):
    g = torch.Generator().manual_seed(seed)
    line = lambda n: 20 * torch.randn(n, 2, generator=g)  # noqa: E731
    return collate([[(line(4), 0), (line(2), 3), (line(7), 1)], [(line(3), 2)], []], 6)


def double(r):
    return Roads(r.points.double(), r.kind, r.valid)


def test_encoder_and_prior_are_their_formulas():
    torch.manual_seed(0)
    enc, prior = PolylineEncoder(8, num_heads=2, depth=1).double(), PolylinePrior(8, num_heads=2).double()
    torch.nn.init.normal_(enc.order)
    r, bev = double(roads()), torch.randn(3, 8, 4, 5).double().requires_grad_()
    tokens = enc(r)

    def attend(q, k, v):
        halves = [(q[:, s] @ k[:, s].T / 2).softmax(-1) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
        return torch.cat(halves, 1)

    for i, n in enumerate((3, 1, 0)):
        found = []
        for e in range(n):
            ways = []
            for points in (r.points[i, e], r.points[i, e].flip(0)):
                made = []
                for x, y in (points / torch.tensor([50.0, 25.0])).tolist():
                    s = [math.sin(math.pi * 2**k * c) for c in (x, y) for k in range(6)]
                    c = [math.cos(math.pi * 2**k * c) for c in (x, y) for k in range(6)]
                    both = [s[:6] + c[:6], s[6:] + c[6:]]
                    made.append(enc.point(torch.tensor(both[0] + both[1]).double()))
                made = torch.stack(made)
                ways.append(made.mean(0) + (enc.order[0] * made[0] + enc.order[1] * made[-1]) / 6)
            found.append((ways[0] + ways[1]) / 2 + enc.kind.weight[r.kind[i, e]])
        flat = bev[i].flatten(1).T
        if not n:
            assert not tokens[i].any()
            torch.testing.assert_close(prior(bev, tokens, r.valid)[i], bev[i])
            continue
        x = torch.stack(found)
        mixer, mlp = enc.blocks[0].mixer, enc.blocks[0].mlp
        y, b = mixer.norm(x), mixer.inner
        x = x + b.proj(attend(b.q(y), b.k(y), b.v(y)))
        x = enc.norm(x + mlp.inner(mlp.norm(x)))
        torch.testing.assert_close(tokens[i, :n], x, rtol=1e-6, atol=1e-7)
        r2 = prior.read
        q = flat + r2.proj(attend(r2.q(prior.norm(flat)), r2.k(x), r2.v(x)))
        torch.testing.assert_close(prior(bev, tokens, r.valid)[i].flatten(1).T, q, rtol=1e-6, atol=1e-7)


def test_widths_are_those_that_were_asked_for():
    assert PolylineEncoder(8).blocks[0].mlp.inner.fc1.out_features == 16


@pytest.mark.parametrize("prior", ["raster", "polyline"])
def test_an_empty_map_leaves_all_as_it_was(prior):
    torch.manual_seed(0)
    module = PolylinePrior(8) if prior == "polyline" else RasterPrior(8)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    bev = torch.randn(2, 8, 5, 5, requires_grad=True)
    if prior == "polyline":
        for e in (0, 2):
            tokens = torch.full((2, e, 8), float("nan"))
            out = module(bev, tokens, torch.zeros(2, e, dtype=torch.bool))
            assert torch.equal(out, bev)
    else:
        out = module(bev, torch.zeros(2, 5, 20, 20))
        assert torch.equal(out, bev)
    out.sum().backward()
    assert torch.equal(bev.grad, torch.ones_like(bev))
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())


def test_a_turned_frame_turns_the_map():
    r = roads()
    plain = draw(r, (16, 16), reach=REACH)
    turned = draw(Roads(moved(r.points, math.pi / 2), r.kind, r.valid), (16, 16), reach=REACH)
    # To the left by a quarter: front (row 0) goes to the left (column 0), as rot90 does it.
    assert float((turned - torch.rot90(plain, 1, (2, 3))).abs().mean()) < 0.01
    pushed = moved(torch.zeros(1, 1, 2), shift=(3.0, -2.0))
    assert pushed.flatten().tolist() == [3.0, -2.0]
    for fusion in ("add", "concat"):  # convolutions of the raster follow it
        m = RasterPrior(4, fusion=fusion)
        if fusion == "add":
            torch.nn.init.normal_(m.conv3.weight)
        for conv in (m.conv1, m.conv2):  # equal in all directions
            conv.weight.data = sum(torch.rot90(conv.weight.data, k, (2, 3)) for k in range(4)) / 4
        bev = torch.randn(3, 4, 16, 16)
        a = torch.rot90(m(bev, plain), 1, (2, 3))
        b = m(torch.rot90(bev, 1, (2, 3)), torch.rot90(plain, 1, (2, 3)))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_other_end_is_the_same_road_unless_it_is_directed():
    r = roads()
    back = Roads(r.points.flip(2), r.kind, r.valid)
    for directed in (False, True):
        torch.manual_seed(0)
        enc = PolylineEncoder(8, directed=directed)
        torch.nn.init.normal_(enc.order)
        assert torch.allclose(enc(r), enc(back), atol=1e-6) != directed


def test_order_and_company_of_roads():
    torch.manual_seed(0)
    enc = PolylineEncoder(8)
    r = roads()
    turned = Roads(r.points[:1, [2, 0, 1]], r.kind[:1, [2, 0, 1]], r.valid[:1, [2, 0, 1]])
    torch.testing.assert_close(enc(turned), enc(r)[:1, [2, 0, 1]])
    broken = Roads(r.points.masked_fill(~r.valid[..., None, None], float("nan")), r.kind, r.valid)
    assert torch.equal(enc(broken), enc(r))
    torch.testing.assert_close(copy.deepcopy(enc)(r), enc(r))
    half = enc.bfloat16()(Roads(r.points.bfloat16(), r.kind, r.valid))
    assert bool(half.isfinite().all())


def test_resampling():
    line = torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 3.0], [4.0, 3.0]])
    torch.testing.assert_close(resample(line, 8)[:, 0], torch.tensor([0.0, 0, 0, 0, 1, 2, 3, 4]))
    torch.testing.assert_close(resample(line, 8)[:, 1], torch.tensor([0.0, 1, 2, 3, 3, 3, 3, 3]))


def test_maps_recover_hidden_lanes():
    """Against none, after as many steps; the whole comparison is a study."""
    found = {}
    for prior in ("none", "raster"):
        torch.manual_seed(0)
        model = MappedLanes(2, 16, prior, reach=REACH)
        optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 1e-2))
        g = torch.Generator().manual_seed(0)
        for _ in range(60):
            bev, r, truth = lanes(12, g)
            train_batch(model, {"bev": bev, "roads": r, "target": truth}, optimizers)
        bev, r, truth = lanes(32, torch.Generator().manual_seed(9))
        found[prior] = recovered(model.predict(bev, r), truth, bev[:, 1])
    assert found["raster"] > found["none"] + 0.1, found


def test_traces():
    bev, r, _ = lanes(2, torch.Generator().manual_seed(0), size=16)
    for prior in ("none", "polyline"):
        model = MappedLanes(2, 8, prior, reach=REACH)
        torch.testing.assert_close(torch.compile(model, backend="eager")(bev, r), model(bev, r))
        assert model(bev[:0], Roads(r.points[:0], r.kind[:0], r.valid[:0])).shape == (0, 16, 16)


def test_bad_input():
    with pytest.raises(ValueError, match="two points at least"):
        resample(torch.zeros(1, 2), 4)
    with pytest.raises(ValueError, match="no length"):
        resample(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="not finite"):
        resample(torch.tensor([[0.0, float("nan")], [1.0, 1.0]]), 4)
    r = roads()
    with pytest.raises(ValueError, match=r"kind must lie in \[0, 4\]"):
        PolylineEncoder(8)(Roads(r.points, r.kind + 4, r.valid))
    with pytest.raises(ValueError, match="one per road"):
        PolylineEncoder(8)(Roads(r.points, r.kind[:, :1], r.valid))
    with pytest.raises(ValueError, match="road_dim=8"):
        PolylinePrior(8)(torch.randn(1, 3, 8), torch.randn(1, 2, 7), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="kinds=5"):
        RasterPrior(4)(torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match="width must be one or 5"):
        draw(r, (4, 4), width=[1.0, 2.0])
    with pytest.raises(ValueError, match="prior"):
        MappedLanes(2, prior="hd")
    with pytest.raises(ValueError, match="target must be"):
        m = MappedLanes(2, 8, "none")
        m.loss(m(torch.randn(1, 2, 4, 4)), torch.zeros(1, 4, 5))
