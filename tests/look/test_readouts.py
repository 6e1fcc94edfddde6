"""Read-outs of brain areas: float64 oracles, independence, parameters, and which one wins where."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlib.look.encoding import (
    AttentionReadout,
    LinearReadout,
    SpatialReadout,
    blend,
    detr_positions,
    fit_readout,
    pearson,
    readout_loss,
    readout_state,
    with_rest,
)

LEFT = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()
RIGHT = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()


def model(resolution="area", v_proj=True, final_norm=True, seed=0, areas=(LEFT, RIGHT)):
    torch.manual_seed(seed)
    made = AttentionReadout(
        8, areas, resolution=resolution, num_heads=2, hidden=12, v_proj=v_proj, final_norm=final_norm
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.double().eval()


def picture(batch=3, h=4, w=5, dim=8, seed=1):
    return torch.randn(batch, h, w, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions(h, w, dim):
    """Entry by entry."""
    out = torch.zeros(h, w, dim, dtype=torch.float64)
    half = dim // 2
    for i in range(h):
        for j in range(w):
            for c in range(half):
                period = 10000 ** (2 * (c // 2) / half)
                f = math.sin if c % 2 == 0 else math.cos
                out[i, j, c] = f((i + 1) / (h + 1e-6) * 2 * math.pi / period)
                out[i, j, half + c] = f((j + 1) / (w + 1e-6) * 2 * math.pi / period)
    return out.flatten(0, 1)


def oracle(m, x):
    """One picture, query by query, head by head."""
    flat = x.flatten(0, 1)
    keys = flat + positions(*x.shape[:2], x.shape[2])
    tokens, maps = [], []
    for query in m.query.weight:
        parts, seen = [], []
        values = flat if m.v is None else m.v(flat)
        for q, k, v in zip(m.q(query).chunk(2), m.k(keys).chunk(2, 1), values.chunk(2, 1), strict=True):
            a = torch.softmax(k @ q / math.sqrt(len(q)), 0)
            parts.append(a @ v)
            seen.append(a)
        t = m.proj(torch.cat(parts))
        n = (t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt() * m.norm_mlp.weight + m.norm_mlp.bias
        t = t + m.fc2(torch.relu(m.fc1(n)))
        if isinstance(m.norm, nn.LayerNorm):
            t = (t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt() * m.norm.weight + m.norm.bias
        tokens.append(t)
        maps.append(torch.stack(seen))
    out, first = [], 0
    for mask, read in zip((LEFT, RIGHT), m.read, strict=True):
        count = {"area": mask.shape[0], "unit": mask.shape[1], "group": 1}[m.resolution]
        own, first = tokens[first : first + count], first + count
        y = torch.zeros(mask.shape[1], dtype=torch.float64)
        for v in range(mask.shape[1]):
            for r, t in enumerate(own):
                if m.resolution == "group" or (mask[r, v] if m.resolution == "area" else r == v):
                    y[v] += read.weight[v] @ t + read.bias[v]
        out.append(y)
    return out, torch.stack(maps, 1)


@pytest.mark.parametrize("resolution", ["area", "unit", "group"])
@pytest.mark.parametrize(("v_proj", "final_norm"), [(True, True), (False, False), (True, False)])
def test_the_equation(resolution, v_proj, final_norm):
    m, x = model(resolution, v_proj, final_norm), picture()
    found = m(x, weights=True)
    for i in range(3):
        out, maps = oracle(m, x[i])
        for mine, told in zip(found.responses, out, strict=True):
            assert torch.allclose(mine[i], told, atol=1e-6)  # positions are float32
        assert torch.allclose(found.weights[i], maps, atol=1e-6)
    plain = m(x)
    assert plain.weights is None and torch.allclose(plain.responses[0], found.responses[0], atol=1e-12)
    assert torch.allclose(found.weights.sum(-1), torch.ones(()).double())


def released(kind, seed=0):
    """A state dict with the names of the release, of modules of torch, and what they compute for areas."""
    torch.manual_seed(seed)
    mha, linear1, linear2 = nn.MultiheadAttention(8, 2), nn.Linear(8, 12), nn.Linear(12, 8)
    norms = [nn.LayerNorm(8) for _ in range(4)]
    q, k, c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    query, lh, rh = nn.Embedding(6, 8), nn.Linear(8, 5), nn.Linear(8, 4)
    layer = {"linear1": linear1, "linear2": linear2, **{f"norm{i + 1}": norms[i] for i in range(3)}}
    if kind == "transformer":
        layer |= {"multihead_attn": mha, "self_attn": nn.MultiheadAttention(8, 2)}
    else:
        layer |= {"cross_attn": nn.ModuleDict({
            "k_proj": k, "q_proj": q, "c_proj": c, "v_proj": nn.Linear(8, 8), "c_attn": nn.Linear(8, 24)})}  # fmt: skip
    for module in (*layer.values(), norms[3], query, lh, rh):
        for p in module.parameters():
            nn.init.normal_(p, 0, 0.4)
    sd = {f"transformer.decoder.layers.0.{n}.{key}": v for n, m in layer.items() for key, v in m.state_dict().items()}
    sd |= {"transformer.memory_proj.weight": torch.zeros(64, 8, 1, 1), "transformer.memory_proj.bias": torch.zeros(64)}
    sd |= {"query_embed.weight": query.weight.detach(), "backbone_model.0.w": torch.zeros(1)}
    sd |= {f"{n}_embed.0.{key}": v for n, m in (("lh", lh), ("rh", rh)) for key, v in m.state_dict().items()}
    if kind == "transformer":
        sd |= {f"transformer.decoder.norm.{key}": v for key, v in norms[3].state_dict().items()}

    def run(x):
        flat = x.flatten(1, 2).transpose(0, 1)
        keys = flat + detr_positions(*x.shape[1:3], 8)[:, None]
        target = torch.zeros(6, len(x), 8)
        if kind == "transformer":
            at = norms[0](target) + query.weight[:, None]
            target = mha(at, keys, flat, need_weights=False)[0]
        else:
            heads = [a.chunk(2, -1) for a in (q(target + query.weight[:, None]), k(keys), flat)]
            mixed = [torch.einsum("nbd,mbd->bnm", a, b).div(2).softmax(-1) @ v.transpose(0, 1)
                     for a, b, v in zip(*heads, strict=True)]  # fmt: skip
            target = c(torch.cat(mixed, -1)).transpose(0, 1)
        target = target + linear2(F.relu(linear1(norms[2](target))))
        tokens = (norms[3](target) if kind == "transformer" else target).transpose(0, 1)
        return (lh(tokens[:, :3]).mT * LEFT.T).sum(-1), (rh(tokens[:, 3:]).mT * RIGHT.T).sum(-1)

    return sd, run


@pytest.mark.parametrize("kind", ["transformer", "custom_transformer"])
def test_released_weights_load_strictly_and_give_what_their_layer_gives(kind):
    sd, run = released(kind)
    own = kind == "transformer"
    m = AttentionReadout(8, [LEFT, RIGHT], num_heads=2, hidden=12, v_proj=own, final_norm=own)
    m.load_state_dict(readout_state(sd))
    m.eval()
    x = picture().float()
    for mine, theirs in zip(m(x).responses, run(x), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    fewer = readout_state(sd, queries=(2, 1))["query.weight"]
    whole = m.query.weight.detach()
    assert torch.equal(fewer, whole[[0, 1, 3]])
    with pytest.raises(ValueError, match="does not have"):
        readout_state({**sd, "transformer.decoder.layers.1.linear1.weight": torch.zeros(1)})


def test_released_weights_of_the_baselines_load_too():
    x = picture(h=9, w=9).float()
    spatial = SpatialReadout(8, [LEFT, RIGHT], (9, 9))
    sd = {"spatial_embed.weight": torch.randn(6, 81), **{
        f"{n}_embed.0.{k}": v for n, m in zip(("lh", "rh"), spatial.read, strict=True)
        for k, v in m.state_dict().items()}}  # fmt: skip
    spatial.load_state_dict(readout_state(sd))
    tokens = torch.einsum("qn,bnc->bqc", sd["spatial_embed.weight"].softmax(1), x.flatten(1, 2))
    told = (spatial.read[0](tokens[:, :3]).mT * LEFT.T).sum(-1)
    found = spatial(x, weights=True)
    assert torch.allclose(found.responses[0], told, atol=1e-5) and found.weights.shape == (3, 1, 6, 81)
    linear = LinearReadout(8, [5, 4], (9, 9), hidden=6)
    sd = {f"input_proj.{k}": v for k, v in linear.reduce.state_dict().items()}
    sd |= {f"{n}_embed.0.{k}": v for n, m in zip(("lh", "rh"), linear.read, strict=True)
           for k, v in m.state_dict().items()}  # fmt: skip
    linear.load_state_dict(readout_state(sd))
    told = linear.read[1](F.conv2d(x.permute(0, 3, 1, 2), linear.reduce.weight, linear.reduce.bias, 3, 1).flatten(1))
    assert torch.allclose(linear(x).responses[1], told, atol=1e-5)
    assert torch.allclose(linear.penalty(), sum(p.norm() for p in linear.read.parameters()))


def test_permuting_patches_with_their_positions_changes_nothing():
    m, x = model(), picture()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    from attnlib.look.encoding import readout

    whole = m(x).responses
    before = readout.detr_positions
    try:
        readout.detr_positions = lambda *a: before(*a)[order]
        moved = m(x.flatten(1, 2)[:, order].unflatten(1, (4, 5))).responses
    finally:
        readout.detr_positions = before
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(whole, moved, strict=True))


def test_a_query_moves_the_units_of_its_area_alone():
    m, x = model(), picture()
    before = m(x).responses
    for area in range(6):
        changed = model()
        with torch.no_grad():
            changed.query.weight[area] += 1
        after = changed(x).responses
        for group, mask in enumerate((LEFT, RIGHT)):
            own = mask[area - 3 * group] if area // 3 == group else torch.zeros(mask.shape[1], dtype=torch.bool)
            moved = (after[group] != before[group]).any(0)
            assert torch.equal(moved, own)


def test_a_query_per_unit_is_a_query_per_area_of_one_unit():
    alone = torch.eye(4, dtype=torch.bool)
    a, b = model("area", areas=(alone,)), model("unit", areas=(torch.ones(1, 4, dtype=torch.bool),))
    b.load_state_dict(a.state_dict())
    assert torch.allclose(a(picture()).responses[0], b(picture()).responses[0], atol=1e-12)


def test_absent_patches_are_not_read_whatever_they_hold():
    m, x = model(), picture()
    valid = torch.ones(3, 4, 5, dtype=torch.bool)
    valid[1, 2:] = False
    filled = torch.where(valid[..., None], x, torch.nan)
    found = m(filled, valid=valid, weights=True)
    assert torch.isfinite(found.responses[0]).all() and not found.weights[1][..., 10:].any()
    assert torch.allclose(found.responses[0][0], m(x).responses[0][0], atol=1e-12)
    assert not torch.allclose(found.responses[0][1], m(x).responses[0][1])


@pytest.mark.parametrize("v_proj", [True, False])
def test_parameters_follow_from_shapes(v_proj):
    m = AttentionReadout(32, [LEFT, RIGHT], num_heads=4, hidden=48, v_proj=v_proj, final_norm=v_proj)
    told = AttentionReadout.count(32, 6, 9, 48, v_proj, v_proj)
    assert sum(p.numel() for p in m.parameters()) == told
    # the paper's sizes: 24 areas and the rest, 20,000 units, in both hemispheres, against the linear read-out
    ours = AttentionReadout.count(768, 50, 40_000)
    linear = 9 * 768 * 256 + 256 + 40_000 * (256 * 11 * 11 + 1)
    assert ours == 50 * 768 + 4 * 769 * 768 + 2 * 768 * 1024 + 1024 + 768 + 4 * 768 + 769 * 40_000
    assert LinearReadout(8, [3], (31, 31), hidden=4).read[0].in_features == 4 * 11 * 11 and linear > 35 * ours


def test_initial_values_are_the_releases():
    torch.manual_seed(0)
    fused = AttentionReadout(64, [LEFT], num_heads=4).requires_grad_(False)
    assert fused.q.weight.abs().max() == pytest.approx(math.sqrt(6 / (4 * 64)), rel=0.01)  # one matrix of 3 x 64 rows
    assert fused.proj.weight.abs().max() == pytest.approx(math.sqrt(6 / 128), rel=0.01)
    assert not any(m.bias.any() for m in (fused.q, fused.k, fused.v, fused.proj))
    apart = AttentionReadout(64, [LEFT], num_heads=4, v_proj=False).requires_grad_(False)
    assert apart.q.weight.abs().max() == pytest.approx(math.sqrt(6 / 128), rel=0.01)
    assert apart.q.bias.abs().max() == pytest.approx(1 / 8, rel=0.1)
    assert fused.query.weight.std() == pytest.approx(1, rel=0.1)


def world(routed, events=600, seed=0):
    """Pictures with one thing of each of two kinds; areas answer to what their thing looks like, or to fixed places.

    Features lie in a part of the space, as those of networks do: where things are can be told from what they are.
    """
    g = torch.Generator().manual_seed(seed)
    kinds, looks = [8, 9], [*range(10, 16), *range(26, 32)]
    flat = torch.zeros(events, 25, 32)
    flat[..., looks] = torch.randn(events, 25, 12, generator=g)
    rows = torch.arange(events)
    places = torch.stack([torch.randperm(25, generator=g)[:2] for _ in range(events)])
    for r, kind in enumerate(kinds):
        flat[rows, places[:, r], kind] = 4.0
    if not routed:
        places = torch.tensor([[6, 18]]).expand(events, 2)
    w = torch.randn(2, 6, 12, generator=g)
    y = torch.cat([flat[rows, places[:, r]][:, looks] @ w[r].T for r in range(2)], 1)
    return flat.unflatten(1, (5, 5)), y + 0.5 * torch.randn(y.shape, generator=g)


@pytest.mark.parametrize("routed", [True, False])
def test_routing_wins_where_areas_follow_things_and_not_where_they_look_at_places(routed):
    x, y = world(routed)
    areas = torch.eye(2, dtype=torch.bool).repeat_interleave(6, 1)
    torch.manual_seed(0)
    attention = AttentionReadout(32, [areas], num_heads=1, hidden=32, dropout=0.0)
    spatial = SpatialReadout(32, [areas], (5, 5))
    r = {}
    for name, m, lr in (("attention", attention, 1e-2), ("spatial", spatial, 1e-1)):
        told = fit_readout(m, x[:500], [y[:500]], epochs=25, lr=lr, clip=10.0, batch=100)
        assert told[-1] < told[0] and not m.training
        with torch.no_grad():
            r[name] = float(pearson(m(x[500:]).responses[0], y[500:]).mean())
    if routed:
        assert r["attention"] > 0.8 and r["spatial"] < 0.4
    else:
        assert r["spatial"] > 0.8 and abs(r["attention"] - r["spatial"]) < 0.15


def test_loss_and_blending():
    m, x = model(), picture()
    read = m(x)
    targets = [torch.zeros_like(y) for y in read.responses]
    assert torch.allclose(readout_loss(read, targets), sum(y.square().mean() for y in read.responses))
    predicted, scores = torch.randn(3, 6, 2), torch.tensor([[0.1, 0.3], [0.2, 0.1], [0.0, 0.0]])
    weights = (40 * scores).exp() / (40 * scores).exp().sum(0)
    assert torch.allclose(blend(predicted, scores), torch.einsum("lv,lnv->nv", weights, predicted), atol=1e-6)


def test_bad_input_is_refused():
    hole = torch.tensor([[True, False]])
    assert with_rest(hole).tolist() == [[True, False], [False, True]] and with_rest(LEFT) is not None
    m, x = model(), picture()
    cases = [
        (lambda: AttentionReadout(8, [hole], num_heads=2), r"areas\[0\]: units \[1\] are in no area"),
        (lambda: AttentionReadout(8, LEFT, num_heads=2), "areas must be a sequence"),
        (lambda: AttentionReadout(8, [LEFT[0]], num_heads=2), r"areas\[0\] must have shape \(R, V\)"),
        (lambda: AttentionReadout(8, [LEFT], num_heads=3), "num_heads=3 does not divide dim=8"),
        (lambda: AttentionReadout(6, [LEFT], num_heads=2), "4=4 does not divide|4 does not divide dim=6"),
        (lambda: AttentionReadout(8, [LEFT], num_heads=2, resolution="voxels"), "resolution='voxels' is not possible"),
        (lambda: m(x.flatten(1, 2)), r"features must have shape \(B, h, w, C\)"),
        (lambda: m(x[..., :4]), "dim=8"),
        (lambda: m(x, valid=torch.ones(3, 4, 4, dtype=torch.bool)), "valid must be boolean"),
        (lambda: SpatialReadout(8, [LEFT], (4, 4))(x.float()), r"the grid \(4, 4\)"),
        (lambda: readout_loss(m(x), [LEFT]), "each of 2 groups, got 1"),
        (lambda: fit_readout(m, x, [torch.zeros(2, 5)]), "the 3 events of features"),
        (lambda: readout_state({}), "empty"),
    ]  # fmt: skip
    for call, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            call()
