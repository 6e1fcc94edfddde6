import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from attnlib import optim
from attnlib.optim import SGDP, AdamP

with safe_open(Path(__file__).parent / "fixtures" / "adamp-sgdp.safetensors", "pt") as file:
    RECORD = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    CASES = json.loads(file.metadata()["config"])


def tangent(weight, grad, dims):
    """The gradient of a function that does not depend on the weight's norm (over ``dims``)."""
    return grad - weight * (grad * weight).sum(dims, keepdim=True) / weight.square().sum(dims, keepdim=True)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_equal_the_authors(case):
    name, settings = CASES[case]
    if name == "SGDP":
        settings = {**settings, "compat": "authors"}
    params = [torch.nn.Parameter(RECORD[f"start/{i}"].clone()) for i in range(4)]
    optimizer = getattr(optim, name)(params, **settings)
    for step in range(10):
        for i, p in enumerate(params):
            grad = RECORD[f"grad/{step}/{i}"]
            p.grad = {0: lambda w, g: tangent(w, g, (1,)), 3: lambda w, g: tangent(w, g, (0, 1))}.get(
                i, lambda w, g: g.clone()
            )(p.detach(), grad)
        optimizer.step()
        for i, p in enumerate(params):
            torch.testing.assert_close(p.detach(), RECORD[f"{case}/{step}/{i}"], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("make, plain", [
    (lambda p: AdamP(p, 0.01, weight_decay=0.1, delta=0.0), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)),
    (lambda p: SGDP(p, lr=0.01, momentum=0.9, delta=0.0), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
])  # fmt: skip
def test_without_projection_they_are_the_plain_optimizers(make, plain):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    a, b = make([ours]), plain([theirs])
    for _ in range(5):
        ours.grad = torch.randn(3, 4)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_projected_updates_are_orthogonal_to_every_row():
    torch.manual_seed(0)
    w, update = torch.randn(5, 7), torch.randn(5, 7)
    grad = tangent(w, torch.randn(5, 7), (1,))
    projected, decay = optim._project(w, grad, update, 0.1, 0.1, 1e-8)
    assert decay == 0.1 and float((projected * w).sum(1).abs().max()) < 1e-5
    same, decay = optim._project(w, w, update, 0.1, 0.1, 1e-8)  # a radial gradient: not scale-invariant
    assert decay == 1.0 and same is update
    vector, decay = optim._project(w[0], grad[0], update[0], 0.1, 0.1, 1e-8)
    assert decay == 1.0 and torch.equal(vector, update[0])


def norm_after(make, steps=200):
    torch.manual_seed(0)
    target = torch.nn.functional.normalize(torch.randn(1, 20), dim=1)
    w = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(1, 20), dim=1))
    optimizer = make([w])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -torch.nn.functional.cosine_similarity(w, target).sum()
        loss.backward()
        optimizer.step()
    return float(w.detach().norm()), float(loss.detach())


def test_weights_of_a_scale_invariant_function_grow_less():
    plain, _ = norm_after(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    still, _ = norm_after(lambda p: torch.optim.SGD(p, lr=0.1))
    projected, loss = norm_after(lambda p: SGDP(p, lr=0.1, momentum=0.9))
    assert projected - 1 < 0.35 * (plain - 1) and loss < -0.999
    assert projected < 1 + 12 * (still - 1) + 0.2
    adam, _ = norm_after(lambda p: torch.optim.Adam(p, lr=0.05))
    adamp, loss = norm_after(lambda p: AdamP(p, lr=0.05))
    assert adamp - 1 < 0.7 * (adam - 1) and loss < -0.99


@pytest.mark.parametrize("make", [lambda p: AdamP(p, lr=0.01), lambda p: SGDP(p, lr=0.01, momentum=0.9)])
def test_state_dict_round_trip_and_frozen_parameters(make):
    torch.manual_seed(0)
    w, frozen = torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.ones(2))
    optimizer = make([w, frozen])
    w.grad = torch.randn(3, 3)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2))
    twin = torch.nn.Parameter(w.detach().clone())
    again = make([twin, torch.nn.Parameter(torch.ones(2))])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    w.grad = torch.randn(3, 3)
    twin.grad = w.grad.clone()
    optimizer.step()
    again.step()
    assert torch.equal(w, twin)


def test_a_layer_that_thaws_later_starts_at_its_own_first_step():
    early, late = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    alone = torch.nn.Parameter(torch.ones(2, 2))
    both, single = AdamP([early, late], lr=0.1), AdamP([alone], lr=0.1)
    early.grad = torch.randn(2, 2)
    both.step()
    late.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    alone.grad = late.grad.clone()
    both.step()
    single.step()
    torch.testing.assert_close(late, alone)


@pytest.mark.parametrize("make, words", [
    (lambda p: AdamP(p, lr=-1), "lr must be .* at least 0, got -1"),
    (lambda p: AdamP(p, lr=float("nan")), "lr must be"),
    (lambda p: AdamP(p, lr=torch.ones(3)), "lr must be"),
    (lambda p: AdamP(p, betas=(1.0, 0.9)), r"betas\[0\] must be"),
    (lambda p: AdamP(p, betas=0.9), "betas must be two numbers"),
    (lambda p: AdamP(p, nesterov="yes"), "nesterov must be"),
    (lambda p: AdamP([dict(params=p, lr=-1)]), "lr must be"),
    (lambda p: AdamP([]), "params must hold"),
    (lambda p: AdamP(p[0]), "params must be"),
    (lambda p: AdamP([p[0].tolist()]), "params must be"),
    (lambda p: SGDP(p, lr=0.1, momentum=1.0), "momentum must be"),
    (lambda p: SGDP(p, lr=0.1, compat="theirs"), "compat"),
])  # fmt: skip
def test_bad_settings(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make([torch.nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("make, times", [
    (lambda p: SGDP(p, lr=0.1, momentum=0.9, compat="authors"), 1),
    (lambda p: SGDP(p, lr=0.1, momentum=0.9, nesterov=True, compat="authors"), 1),
    (lambda p: SGDP(p, lr=0.1, momentum=0.9), 1),
    (lambda p: AdamP(p, lr=0.1), 1),
])  # fmt: skip
def test_an_update_is_projected_once(make, times, monkeypatch):
    calls, project = [], optim._project
    monkeypatch.setattr(optim, "_project", lambda *args: calls.append(args) or project(*args))
    w = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = make([w])
    w.grad = tangent(w.detach(), torch.randn(3, 4), (1,))
    optimizer.step()
    assert len(calls) == times


@pytest.mark.parametrize("make", [lambda p: SGDP(p, lr=0.1, momentum=0.9), lambda p: AdamP(p, lr=0.1)])
def test_a_parameter_without_numbers_is_left_alone(make):
    w, none = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.zeros(0, 4))
    before, optimizer = w.detach().clone(), make([w, none])
    w.grad, none.grad = torch.randn(3, 4), torch.zeros(0, 4)
    optimizer.step()
    assert none.shape == (0, 4) and not torch.equal(w, before)
