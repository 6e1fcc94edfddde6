"""TaskExpert: gates, memory, experts, and the recipe's five losses as released."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlib.models.backbones.stages import FeatureInfo
from attnlib.models.dense.heads import pixel_cross_entropy
from attnlib.models.dense.taskexpert import (
    NYUD,
    PASCAL,
    DenseTask,
    TaskExpert,
    balanced_cross_entropy,
    edge_loss,
    masked_l1,
)
from attnlib.nn.gates.memorial_experts import MemorialExperts


class Trunk(nn.Module):
    """Two maps at two strides."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.feature_info = FeatureInfo({"num_chs": c, "reduction": r} for c, r in ((8, 2), (12, 4)))

    def forward(self, x):
        x = self.a(x).relu()
        return [x, self.b(x).relu()]


def small(tasks=PASCAL, **settings):
    torch.manual_seed(0)
    return TaskExpert(tasks, Trunk(), **{"num_experts": 3, "expert_dim": 8, "gate_dim": 8, **settings})


def labels(batch, height, width, g=None):
    r = lambda *s: torch.rand(s, generator=g)  # noqa: E731
    size = (batch, height, width)
    return {
        "semseg": (21 * r(*size)).long(), "human_parts": (7 * r(*size)).long(), "sal": (2 * r(*size)).long(),
        "normals": F.normalize(r(batch, 3, height, width) - 0.5, dim=1), "edge": (r(*size) > 0.9).long(),
    }  # fmt: skip


def by_equation(layer, x, memory):
    """The layer, task by task, in loops."""
    B, N, _ = x.shape
    K, D = layer.num_experts, layer.expert_dim
    e = layer.experts(x).view(B, N, K, D)
    e = [
        F.gelu(F.layer_norm(e[:, :, k], (D,), layer.expert_scale[k], layer.expert_shift[k])) for k in range(K)
    ]  # fmt: skip
    features, written, gates = [], [], []
    for t in range(layer.num_tasks):
        linear = lambda part, y: y @ part.weight[t].mT + part.bias[t]  # noqa: B023, E731
        parts = list(e)
        if memory is not None:
            parts.append(linear(layer.reader, memory[:, t]))
        seen = torch.cat(parts, -1)
        seen = seen.mean(1, keepdim=True) if layer.gate == "image" else seen
        gate = linear(layer.gate_out, F.gelu(linear(layer.gate_in, seen))).softmax(-1)
        f = sum(gate[..., i : i + 1] * part for i, part in enumerate(parts))
        features.append(f)
        gates.append(gate[:, 0] if layer.gate == "image" else gate)
        if memory is not None:
            new = linear(layer.writer, f)
            if layer.forgetter is not None:
                z = linear(layer.forgetter, torch.cat([memory[:, t], f], -1)).sigmoid()
                written.append((1 - z) * memory[:, t] + z * new)
            else:
                written.append(memory[:, t] + new)
    return [torch.stack(v, 1) if v else None for v in (features, written, gates)]


def total(several):
    return sum((v * torch.cos(torch.arange(v.numel()).view_as(v))).sum() for v in several if v is not None)


@pytest.mark.parametrize("gate", ["image", "token"])
@pytest.mark.parametrize("update", ["add", "gated"])
@pytest.mark.parametrize("memory", [True, False])
def test_the_equations(gate, update, memory):
    torch.manual_seed(0)
    layer = MemorialExperts(6, 3, 4, 5, 7 if memory else None, memory, gate, 9, update=update).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    held = torch.randn(2, 3, 3, 4, 7, dtype=torch.float64) if memory else None
    made = layer(x, held)
    want = by_equation(layer, x.flatten(1, 2), None if held is None else held.flatten(2, 3))
    params = [x, *layer.parameters()]
    for a, b in zip(made, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.reshape(b.shape), b)
    for a, b in zip(
        torch.autograd.grad(total(made), params), torch.autograd.grad(total(want), params), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_gates_sum_to_one_and_differ_between_inputs_and_tasks():
    layer = MemorialExperts(6, 3, 4)
    _, _, gates = layer(torch.randn(2, 5, 6))
    assert gates.shape == (2, 3, 5)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3))
    assert not torch.allclose(gates[0], gates[1]) and not torch.allclose(gates[:, 0], gates[:, 1])
    few = MemorialExperts(6, 3, 4, top_k=2, gate="token")
    _, _, gates = few(torch.randn(2, 5, 6))
    assert gates.shape == (2, 3, 5, 5) and ((gates > 0).sum(-1) == 2).all() and (gates.sum(-1) < 1).all()


def test_one_expert_without_memory_is_a_static_layer():
    layer = MemorialExperts(6, 2, 1, memory=False)
    x = torch.randn(2, 5, 6)
    features, memory, gates = layer(x)
    expert = F.gelu(F.layer_norm(layer.experts(x), (6,)))
    assert memory is None and (gates == 1).all()
    torch.testing.assert_close(features, expert[:, None].expand(-1, 2, -1, -1))


def test_without_memory_features_depend_on_their_layer_alone():
    model = small(memory=False)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16)
    before = model(x)
    for p in model.experts[0].parameters():
        nn.init.normal_(p)
    for name, y in model(x).items():
        assert y.equal(before[name])
    with_memory = small()
    before = with_memory(x)
    for p in with_memory.experts[0].parameters():
        nn.init.normal_(p)
    assert not with_memory(x)["edge"].equal(before["edge"])


def test_every_expert_gets_a_gradient():
    model = small()
    sum(model.loss(model(torch.randn(2, 3, 16, 16)), labels(2, 16, 16)).values()).backward()
    for layer in model.experts:
        assert (layer.experts.weight.grad.view(3, 8, -1).abs().amax((1, 2)) > 0).all()
    assert all(p.grad is not None for p in model.parameters())


def test_reads_and_writes_can_be_others():
    class Forgetful(MemorialExperts):
        def write(self, memory, features):
            return features

        def read(self, memory):
            return 0 * memory

    layer = Forgetful(6, 2, 3)
    features, memory, _ = layer(torch.randn(1, 4, 6))
    assert memory is features
    assert isinstance(small(experts=Forgetful).experts[0], Forgetful)


def test_tokens_that_do_not_exist():
    for gate in ("image", "token"):
        layer = MemorialExperts(6, 2, 3, gate=gate)
        x, held = torch.randn(1, 5, 6), torch.randn(1, 2, 5, 6)
        valid = torch.tensor([[True, True, True, False, False]])
        alone = layer(x[:, :3], held[:, :, :3])
        x[:, 3:], held[:, :, 3:] = torch.nan, torch.inf
        made = layer(x, held, valid)
        torch.testing.assert_close(made.features[:, :, :3], alone.features)
        torch.testing.assert_close(made.memory[:, :, :3], alone.memory)
        assert not made.features[:, :, 3:].any() and not made.memory[:, :, 3:].any()
        assert layer(x, held, torch.zeros_like(valid)).gates.isfinite().all()


# ---- losses

#: Theirs: cross entropy, balanced, of edges, L1 of directions and of one channel.
RELEASED = (1.4966976642608643, 0.43012985587120056, 0.4748955877798777, 2.7384604066809053, 1.0118620787084973)


def test_losses_are_the_recipes():
    """Numbers of prismformore/Multi-Task-Transformer, InvPT/losses/loss_functions.py at 870c6be, seed 0."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(2, 3, 5, 6, generator=g, dtype=torch.float64)
    two = torch.randint(0, 2, (2, 5, 6), generator=g)
    two[:, 0, :2] = 255
    values = torch.randn(2, 3, 5, 6, generator=g, dtype=torch.float64)
    values[0, :, 1, 1] = 255
    classes = torch.randint(0, 3, (2, 5, 6), generator=g)
    classes[0, 2] = 255
    close = lambda a, b, tol=1e-9: torch.testing.assert_close(float(a), b, rtol=0, atol=tol)  # noqa: E731
    close(pixel_cross_entropy(y, classes), RELEASED[0], 1e-7)
    close(balanced_cross_entropy(y[:, :2], two), RELEASED[1], 1e-7)
    close(edge_loss(y[:, :1], two), RELEASED[2], 1e-7)
    close(masked_l1(y, values, unit=True), RELEASED[3])
    close(masked_l1(y[:, :1], values[:, :1]), RELEASED[4])
    assert [t.weight for t in PASCAL.values()] == [1, 2, 5, 10, 50] and len(NYUD) == 4


def test_nothing_known_is_no_loss():
    model = small()
    y = model(torch.randn(1, 3, 8, 8))
    none = torch.full((1, 8, 8), 255)
    target = {
        "semseg": none,
        "human_parts": none,
        "sal": none,
        "edge": none,
        "normals": torch.full((1, 3, 8, 8), 255.0),
    }
    terms = model.loss(y, target)
    assert all(t == 0 for t in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    depth = small(NYUD)
    y = depth(torch.randn(1, 3, 8, 8))
    holes = torch.full((1, 1, 8, 8), torch.nan)  # an invalid depth is unknown, not a number
    holes[..., 0] = 2.0
    term = depth.loss(y, {"depth": holes})["depth"]
    torch.testing.assert_close(term, (y["depth"][..., 0] - 2).abs().mean())


# ---- the model


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (1, 5)])
def test_any_size(size):
    model = small().eval()
    x = torch.randn(3, 3, *size)
    made = model(x)
    assert {k: tuple(v.shape[1:]) for k, v in made.items()} == {k: (t.channels, *size) for k, t in PASCAL.items()}
    for k, v in model(x[:1]).items():
        torch.testing.assert_close(v, made[k][:1], rtol=1e-4, atol=1e-5)
    assert model(x[:0])["edge"].shape == (0, 1, *size)
    answer = model.predict(x)
    assert answer["semseg"].dtype == torch.long and (answer["edge"] <= 1).all()
    torch.testing.assert_close(answer["normals"].norm(dim=1), torch.ones(3, *size))
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    torch.testing.assert_close(half["normals"].float(), made["normals"], rtol=0.1, atol=0.05)


def test_constant_images():
    model = small()
    terms = model.loss(model(torch.zeros(2, 3, 8, 8)), labels(2, 8, 8))
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_two_tasks_that_conflict():
    """One narrow trunk for both is beaten by a mixture of the same width."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1, 6, generator=g)
    kind = x[..., 0] > 0
    a = torch.where(kind, x[..., 1], x[..., 2] * x[..., 3])
    b = torch.where(kind, -x[..., 1], x[..., 4].abs())
    target = torch.stack([a, b], 1)[..., 0]

    def trained(parts, forward):
        optimizer = torch.optim.Adam(parts.parameters(), 1e-2)
        for _ in range(150):
            loss = (forward() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2))
    shared = trained(trunk, lambda: trunk(x)[:, 0])
    layer, heads = MemorialExperts(6, 2, 4, 4, memory=False), nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    mixed = trained(
        nn.ModuleList([layer, heads]),
        lambda: torch.cat([head(f) for head, f in zip(heads, layer(x).features[:, :, 0].unbind(1), strict=True)], 1),
    )
    assert mixed < 0.7 * shared


def test_export_and_compile():
    model = small().eval()
    x = torch.randn(2, 3, 16, 12)
    made = torch.export.export(model, (x,), strict=False).module()(x)
    for k, v in model(x).items():
        torch.testing.assert_close(made[k], v)
    layer = MemorialExperts(6, 2, 3)
    tokens = torch.randn(2, 5, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(tokens)
    torch.testing.assert_close(compiled.memory, layer(tokens).memory)


def test_bad_input():
    layer, model = MemorialExperts(6, 2, 3), small()
    with pytest.raises(ValueError, match=r"x must be tokens \(B, \*grid, 6\)"):
        layer(torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="memory must be"):
        layer(torch.zeros(1, 4, 6), torch.zeros(1, 2, 5, 6))
    with pytest.raises(ValueError, match="memory=False"):
        MemorialExperts(6, 2, memory=False)(torch.zeros(1, 4, 6), torch.zeros(1, 2, 4, 6))
    for settings, match in (
        (dict(gate="pixel"), "gate"), (dict(update="x"), "update"), (dict(top_k=9), "top_k"),
        (dict(num_experts=0), "num_experts"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            MemorialExperts(6, 2, **settings)
    with pytest.raises(ValueError, match="channels of 'normals' must be 3"):
        DenseTask("normals", 1)
    with pytest.raises(ValueError, match="kind"):
        DenseTask("flow", 2)
    with pytest.raises(ValueError, match="must name one"):
        small({})
    with pytest.raises(ValueError, match="feature_info"):
        TaskExpert(PASCAL, nn.Identity())
    with pytest.raises(ValueError, match="x must be images"):
        model(torch.zeros(3, 8, 8))
    y = model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="prediction must be"):
        balanced_cross_entropy(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="positive must be"):
        edge_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4), 3.0)
    with pytest.raises(ValueError, match="target has no task"):
        model.loss(y, {})
    with pytest.raises(ValueError, match=r"target has \['flow'\]"):
        model.loss(y, {"flow": 1})
    with pytest.raises(ValueError, match="target holds 7"):
        model.loss(y, {"sal": torch.full((1, 8, 8), 7)})
    with pytest.raises(ValueError, match="target must be floating point"):
        model.loss(y, {"normals": torch.zeros(1, 8, 8)})
    with pytest.raises(ValueError, match="target must be labels"):
        model.loss(y, {"edge": torch.zeros(1, 4, 8)})
