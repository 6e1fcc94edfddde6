"""Stiffness of residual paths, and gated steps."""

import pytest
import torch
from torch import nn

from attnlib.theory.stiffness import GatedStep, StepGate, StiffSteps, block_stiffness, stiffness_index


def test_the_index_is_the_rate_of_a_step_and_blind_to_scale():
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    states = [x, x, x + 0.2 * 3.0 * x, x - 0.5 * x]
    found = stiffness_index(states)
    assert found.shape == (3, 3) and not found[0].any()
    assert torch.allclose(found[1], torch.full((3,), 0.6)) and torch.allclose(found[2], (1.1 / 1.6) * torch.ones(3))
    assert torch.allclose(stiffness_index([7.0 * s for s in states]), found)
    step = torch.randn(3, 5, 4)
    told = [float(step[i].norm() / x[i].norm()) for i in range(3)]
    assert stiffness_index([x, x + step])[0].tolist() == pytest.approx(told, rel=1e-5)
    assert torch.isfinite(stiffness_index([0 * x, 0 * x])).all()


def test_blocks_of_a_model_are_measured_in_evaluation_mode():
    body = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model = nn.Sequential(GatedStep(body), GatedStep(body, 0.0), nn.Linear(4, 2)).train()
    x = torch.randn(6, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = block_stiffness(model, ["0", "1"], x)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    told = body.eval()(x).norm(dim=1) / x.norm(dim=1)
    assert torch.allclose(found["0"], told, atol=1e-5) and not found["1"].any()
    with pytest.raises(ValueError, match="changes the shape"):
        block_stiffness(model, ["2"], x)


@pytest.mark.parametrize("channels_first", [False, True])
def test_gates_of_one_and_zero_are_the_plain_net_and_the_identity(channels_first):
    body = nn.Conv2d(4, 4, 3, padding=1) if channels_first else nn.Linear(4, 4)
    x = torch.randn(2, 4, 5, 3) if channels_first else torch.randn(2, 5, 3, 4)
    plain = x + body(x)
    for look_ahead in (False, True):
        for bias, told in ((60.0, plain), (-60.0, x)):
            gate = StepGate(4, 2, look_ahead)
            nn.init.zeros_(gate.fc2.weight)
            nn.init.constant_(gate.fc2.bias, bias)
            assert torch.allclose(GatedStep(body, gate, channels_first)(x), told, atol=1e-6)
    assert torch.equal(GatedStep(body, 1.0, channels_first)(x), plain)
    assert torch.equal(GatedStep(body, 0.0, channels_first)(x), x)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_the_gate_is_the_equation_and_gradients_reach_it(look_ahead):
    body, gate = nn.Linear(6, 6), StepGate(6, 3, look_ahead)
    x = torch.randn(2, 7, 6)
    change = body(x)
    seen = torch.cat([x.mean(1), (x + change).mean(1)], -1) if look_ahead else change.mean(1)
    sizes = torch.sigmoid(gate.fc2(torch.relu(gate.fc1(seen))))[:, None]
    y = GatedStep(body, gate)(x)
    assert torch.allclose(y, x + sizes * change, atol=1e-6)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in gate.fc2.parameters())
    compiled = torch.compile(GatedStep(body, gate), backend="eager")
    assert torch.allclose(compiled(x), y, atol=1e-6)
    assert GatedStep(body, gate)(x[:0]).shape == (0, 7, 6)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        stiffness_index([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="states"):
        stiffness_index([torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="a step keeps the shape"):
        GatedStep(nn.Linear(3, 4))(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="reduction"):
        StepGate(4, 0)


def test_true_states_solve_the_system():
    experiment = StiffSteps(steps=1000)
    states = experiment.truth(torch.tensor([[[0.5, 0.8]], [[1.0, -0.3]]]))
    slope = (states[2:] - states[:-2]) / (2 * 2 / 1000)
    a, b = states[1:-1].unbind(-1)
    assert torch.allclose(slope, -torch.stack([a, 10.0 * b**3], -1), atol=0.02)


def test_the_experiment_runs():
    inside = StiffSteps(train_steps=1, count=4)
    assert set(inside.predict()) <= set(inside.run(0))
    assert inside.outside().setting() == inside.setting() | {"rate": 0.2}
