"""Dynamic token routing: what its card asks. No code was released, so that everything is held to equations here."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.models.backbones.dit_dynamic_token_routing import DynamicTokenRoutingViT

TINY = dict(
    embed_dims=(8, 12, 16), depths=(1, 2, 1), num_heads=(1, 2, 2), mlp_ratios=(2, 2, 2), sr_ratios=(2, 2, 1), steps=3,
    num_classes=5,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("dynamic_token_routing_vit_b1", **{**TINY, **settings}).eval()
    for name, p in m.named_parameters():
        if name.endswith(("row.linear.weight", "col.linear.weight")):  # gates that are of both minds
            torch.nn.init.normal_(p, std=1.0)
        elif name.endswith("linear.bias"):
            torch.nn.init.zeros_(p)
    return m


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv(patchify, x):
    return patchify.norm(F.conv2d(x.permute(0, 3, 1, 2), patchify.proj.weight, patchify.proj.bias, patchify.stride,
                                  patchify.proj.padding).permute(0, 2, 3, 1))  # fmt: skip


def plain_block(block, x):
    """A block of PVTv2 in plain steps."""
    a, y = block.attention, block.norm1(x)
    keys = y
    if a.sr is not None:
        keys = a.norm(F.conv2d(y.permute(0, 3, 1, 2), a.sr.weight, a.sr.bias, a.sr.stride).permute(0, 2, 3, 1))
    heads = [
        t.flatten(1, 2).unflatten(2, (a.num_heads, -1)).transpose(1, 2) for t in (a.q(y), *a.kv(keys).chunk(2, -1))
    ]
    q, k, v = heads
    out = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
    x = x + a.proj(out.transpose(1, 2).flatten(2)).view(x.shape)
    z = block.mlp.fc1(block.norm2(x)).permute(0, 3, 1, 2)
    z = F.conv2d(z, block.mlp.dwconv.weight, block.mlp.dwconv.bias, padding=1, groups=z.shape[1])
    return x + block.mlp.fc2(F.gelu(z).permute(0, 2, 3, 1))


def counted(model, call):
    # torch counts no operations of its fused attention on CPUs
    with attnlib.use_backend("eager"), FlopCounterMode(display=False) as counter, torch.no_grad():
        call(model)
    return counter.get_total_flops()


def test_a_forced_path_is_the_sequential_network():
    m, x = tiny(), images(2, 3, 32, 32)
    y = conv(m.stem, x.permute(0, 2, 3, 1))
    for i, scale in enumerate(m.stages):
        for block in scale.nodes[0].blocks:
            y = plain_block(block, y)
        y = scale.norm(y)
        if i < 2:
            y = conv(scale.nodes[0].down, y)
    torch.testing.assert_close(m(x, gates=m.plain_path()), m.head.fc(y.mean((1, 2))))
    route = m.route(x, gates=m.plain_path())
    assert route.ratio.tolist() == [1.0, 1.0]
    torch.testing.assert_close(route.maps[-1], y)
    # another path: two steps on the finest scale before it goes down
    m, x = tiny(steps=4), images(1, 3, 32, 32)
    path = {node: (0, 0) for node in m.plain_path()} | {
        (0, 0): (1, 0),
        (0, 1): (1, 1),
        (1, 2): (1, 1),
        (2, 3): (1, None),
    }
    y = conv(m.stem, x.permute(0, 2, 3, 1))
    for i, first, count in ((0, 0, 2), (1, 1, 1), (2, 1, 1)):
        nodes = m.stages[i].nodes[first : first + count]
        for node in nodes:
            for block in node.blocks:
                y = plain_block(block, y)
        y = m.stages[i].norm(y)
        y = conv(nodes[-1].down, y) if i < 2 else y
    torch.testing.assert_close(m.route(x, gates=path).maps[-1], y)


def test_all_row_gates_off_carry_tokens_on_as_they_are():
    m, x = tiny(), images(1, 3, 32, 32)
    off = {node: (0, cols) for node, (_, cols) in m.plain_path().items()}
    route = m.route(x, gates=off)
    stem = conv(m.stem, x.permute(0, 2, 3, 1))
    torch.testing.assert_close(route.maps[0], m.stages[0].norm(stem))
    first = conv(m.stages[0].nodes[0].down, m.stages[0].norm(stem))
    torch.testing.assert_close(route.maps[1], m.stages[1].norm(first))
    embeddings = 2 * 64 * 49 * 3 * 8 + 2 * 16 * 9 * 8 * 12 + 2 * 4 * 9 * 12 * 16 + 2 * 16 * 5
    assert route.flops.item() == embeddings == counted(m, lambda m: m(x, gates=off))
    assert not any(r.any() for r in route.rows.values())


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_operations_from_masks_are_those_that_are_executed(size):
    m = tiny()
    for seed in range(3):
        x = images(1, 3, *size, seed=seed)
        route = m.route(x)
        shares = [float(r.float().mean()) for r in route.rows.values()]
        assert any(0 < s < 1 for s in shares)  # some are on, some are off
        assert counted(m, lambda m, x=x: m(x)) == route.flops.item()
    batch = torch.cat([images(1, 3, *size, seed=s) for s in range(3)])
    assert counted(m, lambda m: m(batch)) == m.route(batch).flops.sum().item()
    assert m.reference((8, 8)) == counted(m, lambda m: m(images(1, 3, 32, 32), gates=m.plain_path()))


def test_what_is_gathered_is_what_is_masked():
    """Evaluation computes tokens that are on; the same gates over everything give the same numbers."""
    m, x = tiny(), images(2, 3, 40, 36)
    gathered = m.route(x)
    m.gathers = False
    masked = m.route(x)
    for a, b in zip(gathered.maps, masked.maps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for a, b in zip(gathered.there, masked.there, strict=True):
        assert a.equal(b)


def test_gates_have_gradient_in_training_and_are_deterministic_in_evaluation():
    m, x = tiny(), images(2, 3, 32, 32)
    torch.testing.assert_close(m(x), m(x), atol=0, rtol=0)
    m.train()
    torch.manual_seed(0)
    out = m(x, returns=("losses",))
    (out.y.square().sum() + out.losses["budget"]).backward()
    assert bool(m.stages[0].nodes[0].row.linear.weight.grad.any())
    assert bool(m.stages[0].nodes[0].col.linear.weight.grad.any())
    torch.manual_seed(0)
    again = m(x, returns=("losses",))
    torch.testing.assert_close(again.y, out.y)
    torch.manual_seed(1)
    assert not torch.equal(m(x), out.y)


def test_straight_through_is_the_hard_choice_with_the_soft_gradient():
    gate = tiny().stages[0].nodes[0].row.train()
    x = images(1, 2, 2, 8)
    torch.manual_seed(3)
    hard = gate(x)
    assert set(hard.unique().tolist()) <= {0.0, 1.0}
    (own,) = torch.autograd.grad(hard.sum(), gate.linear.weight)
    torch.manual_seed(3)
    soft = F.gumbel_softmax(gate.linear(x), gate.temperature)[..., 1]
    (expected,) = torch.autograd.grad(soft.sum(), gate.linear.weight)
    torch.testing.assert_close(own, expected)


def test_the_budget_is_reached_on_a_toy_task():
    """Two scales; what the image is shows in its right half, so that much of it need not be computed."""
    torch.manual_seed(0)
    m = DynamicTokenRoutingViT((8, 16), (1, 1), (1, 2), (8, 8), (2, 1), 2, num_classes=2, budget=0.5, gate_start=1.0)
    gates = [p for name, p in m.named_parameters() if "linear" in name]
    rest = [p for name, p in m.named_parameters() if "linear" not in name]
    optimizer = torch.optim.Adam([dict(params=gates, lr=2e-2), dict(params=rest, lr=2e-3)])
    generator = torch.Generator().manual_seed(1)

    def sample():
        labels = torch.randint(2, (8,), generator=generator)
        x = 0.3 * torch.randn(8, 3, 32, 32, generator=generator)
        x[:, :, :, 16:] += torch.where(labels == 1, 1.0, -1.0)[:, None, None, None]
        return x, labels

    with torch.no_grad():
        assert float(m.route(sample()[0]).ratio.mean()) > 0.8
    for _ in range(130):
        x, labels = sample()
        out = m(x, returns=("losses",))
        loss = 0.1 * F.cross_entropy(out.y, labels) + 30 * out.losses["budget"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, labels = sample()
        ratios = torch.stack([m.route(x).ratio.mean() for _ in range(16)])
    assert abs(float(ratios.mean()) - 0.5) <= 0.05, ratios


def test_early_stopping_skips_a_scale_from_then_on():
    m, x = tiny(), images(2, 3, 32, 32)
    before = m.route(x)
    m.early_stop = 0.0
    none = m.route(x)
    assert not any(bool(r.any()) for r in none.rows.values()) and none.flops.max() < before.flops.min()
    m.early_stop = 0.4
    some, stopped = m.route(x), {}
    for (i, j), row in some.rows.items():
        for b in range(2):
            there = before.there[0][b] if i == 0 else None
            if row[b].any() and there is not None:
                assert (i, b) not in stopped
                assert row[b].float().mean() > 0.6
            elif i == 0:
                stopped[i, b] = j
    m.early_stop = 1.0
    assert m.route(x).flops.equal(before.flops) or any(not r.any() for r in before.rows.values())
    m.train()
    m.early_stop = 0.0
    assert any(bool(r.any()) for r in m.route(x).rows.values())  # training is never stopped


def test_averaged_gates_serve_evaluation():
    m = tiny(gate_average=0.9).train()
    gate = m.stages[0].nodes[0].row
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([-1.0, 1.0]))
    m(images(1, 3, 32, 32))
    torch.testing.assert_close(gate.weight, 0.1 * gate.linear.weight)
    m.eval()
    gate.weight.zero_()
    assert bool(m.route(images(1, 3, 32, 32)).rows[0, 0].all())


def test_gates_start_on():
    torch.manual_seed(0)
    m = attnlib.create_model("dynamic_token_routing_vit_b1", **TINY).eval()
    route = m.route(images(1, 3, 64, 64))
    assert all(float(route.rows[node].float().mean()) > 0.95 for node in ((0, 0), (1, 1), (2, 2)))


def test_what_goes_nowhere_gives_no_nan():
    m, x = tiny(), images(2, 3, 32, 32)
    nowhere = {node: (0, 0) for node in m.plain_path()}
    route = m.route(x, gates=nowhere)
    assert not route.there[1].any() and not route.maps[2].any()
    torch.testing.assert_close(m(x, gates=nowhere), m.head.fc.bias.expand(2, -1))


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (5, 31), (45, 37)])
def test_any_size(size):
    for training in (False, True):
        y = tiny().train(training)(images(2, 3, *size))
        assert y.shape == (2, 5) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 48, 40)
    valid = torch.zeros(2, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    other = torch.where(valid[:, None], x, torch.full_like(x, float("nan")))
    torch.testing.assert_close(m(other, valid), m(x.masked_fill(~valid[:, None], 7.0), valid))
    route = m.route(x, valid)
    assert not any(bool((r & ~there).any()) for (i, _), r in route.rows.items() for there in [route.there[i]])


def test_maps_for_dense_prediction():
    m, x = tiny(features_only=True), images(1, 3, 33, 40)
    assert [tuple(t.shape) for t in m(x)] == [(1, 8, 9, 10), (1, 12, 5, 5), (1, 16, 3, 3)]
    first = tiny(features_only=True, out_indices=[0])
    assert len(first.model.stages) == 1
    torch.testing.assert_close(first(x)[0], m(x)[0])
    assert tiny(mechanism="softmax-attention")(x).shape == (1, 5)


def test_acronyms_that_papers_share_list_what_they_may_mean():
    for name in ("dit", "hat", "eva", "vsa", "DiT"):
        with pytest.raises(ValueError, match=f"model '{name}' is ambiguous; it may mean '.+, or "):
            attnlib.create_model(name)
    for name in ("dit", "vsa"):
        with pytest.raises(ValueError, match=f"'{name}' is ambiguous; it may mean '.+, or "):
            attnlib.create(name, dim=8)
    assert attnlib.create("hat", dim=16, num_heads=2).slug == "hat"  # its card's name is its own
    with pytest.raises(ValueError, match="did you mean 'dynamic_token_routing_vit_b1'"):
        attnlib.create_model("dit-dynamic-token-routing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=2), "steps=2 must be at least the number of scales, 3"),
        (dict(sr_ratios=(1, 1)), "sr_ratios="),
        (dict(mlp_ratios=(1, 1)), "mlp_ratios="),
        (dict(depths=(1, 1)), "must have one number for each of 3 stages"),
        (dict(num_heads=(3, 2, 2)), "num_heads=3 does not divide"),
        (dict(budget=0.0), "budget"),
        (dict(early_stop=1.5), "early_stop"),
        (dict(temperature=0.0), "temperature"),
        (dict(gate_average=1.0), "gate_average"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_bad_calls():
    m, x = tiny(), images(1, 3, 32, 32)
    for gates, message in (
        ({(1, 0): (1, 1)}, r"node \(1, 0\), which is not there"),
        ({(0, 3): (1, 1)}, "which is not there"),
        ({(0, 0): (2, 1)}, "must be a row and a column gate"),
        ({(0, 0): (1,)}, "must be a row and a column gate"),
    ):
        with pytest.raises(ValueError, match=message):
            m.route(x, gates=gates)
    with pytest.raises(ValueError, match="x must be images"):
        m.route(images(1, 1, 32, 32))
    with pytest.raises(ValueError, match="not possible with gates"):
        m(x, gates=m.plain_path(), returns=("losses",))
    with pytest.raises(ValueError, match="operations are counted for the attention of PVTv2"):
        tiny(mechanism="softmax-attention").route(x)
