"""The models of gCOG against all classes of the authors' code, and what ours does beyond it."""

import copy

import pytest
import torch
from parity import Fixture, synthetic

from attnlib.models.gcog import MODELS, RelativeAttention, convert_state_dict, gcog_model, last_token

RUNS = Fixture("gcog")
FIXED = ("pe.pe", ".mask")


def weights(case):
    shapes = RUNS.config[case]["shapes"]
    fixed = {name: torch.zeros(shape) for name, shape in shapes.items() if name.endswith(FIXED)}
    return {**synthetic({n: s for n, s in shapes.items() if n not in fixed}), **fixed}


def built(case):
    model = gcog_model(RUNS.config[case]["model"], **RUNS.config[case]["settings"])
    model.load_state_dict(convert_state_dict(weights(case)))
    return model.eval().double()


@pytest.mark.parametrize("case", RUNS.config)
def test_output_and_gradients_are_the_authors(case):
    model = built(case)
    rule, grid, g = (RUNS.tensors[name].double() for name in ("rule", "grid", "g"))
    rule.requires_grad_(), grid.requires_grad_()
    y = model(rule, grid)
    Fixture._close(y.detach(), RUNS.tensors[f"{case}/y"], 1e-6, "y")
    (y * g).sum().backward()
    Fixture._close(rule.grad, RUNS.tensors[f"{case}/drule"], 1e-5, "drule")
    Fixture._close(grid.grad, RUNS.tensors[f"{case}/dgrid"], 1e-5, "dgrid")
    # the derivative along three directions of all weights together
    shapes = RUNS.config[case]["shapes"]
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    along = []
    for i in range(3):
        names = [n for n in shapes if not n.endswith(FIXED)]
        ways = synthetic({f"{i}/{n}": shapes[n] for n in names})
        ways = convert_state_dict({n: ways[f"{i}/{n}"] for n in names})
        assert set(ways) == set(grads)
        along.append(sum(float((grads[n] * ways[n]).sum()) for n in grads))
    Fixture._close(torch.tensor(along), RUNS.tensors[f"{case}/along"], 1e-5, "weights")


@pytest.mark.parametrize("case", RUNS.config)
def test_parameters_are_the_authors(case):
    unread = 2 * 8 if case.startswith("latent") else 0  # a norm that nothing reads
    own = sum(p.numel() for p in built(case).parameters())
    assert own == RUNS.config[case]["parameters"] - unread


def test_every_entry_is_accounted_for():
    with pytest.raises(ValueError, match="strange"):
        convert_state_dict({**weights("cross"), "strange": torch.zeros(1)})


@pytest.mark.parametrize("name", MODELS)
def test_padding_of_instructions_changes_nothing(name):
    torch.manual_seed(0)
    model = gcog_model(name, dim=16, classes=7, **({"cells": 10} if name in ("rnn", "gru") else {})).eval().double()
    rule, grid = torch.randn(3, 4, 8).double(), torch.randn(3, 10, 3).double()
    padded = torch.cat([rule, torch.full((3, 3, 8), 5.0).double()], 1)
    valid = torch.arange(7).expand(3, 7) < 4
    assert torch.allclose(model(rule, grid), model(padded, grid, valid), atol=1e-10)
    assert not torch.allclose(model(rule, grid), model(padded, grid), atol=1e-3)  # which the release would read


def test_cells_moved_with_their_places_change_nothing_for_cross():
    torch.manual_seed(0)
    model = gcog_model("cross", dim=16, classes=7).eval().double()
    rule, grid = torch.randn(2, 3, 8).double(), torch.randn(2, 10, 3).double()
    order = torch.randperm(10)
    seen = model.grid_block(grid[:, order], at=order)
    moved = model.head(model.meet(model.rule_block(rule), seen)).log_softmax(-1)
    assert torch.allclose(moved, model(rule, grid), atol=1e-10)
    assert not torch.allclose(model(rule, grid[:, order]), model(rule, grid), atol=1e-3)


def test_relative_attention_against_its_equation():
    torch.manual_seed(0)
    attend = RelativeAttention(8, num_heads=2, max_len=6).double()
    x = torch.randn(2, 5, 8).double()
    q, k, v = (f(x).view(2, 5, 2, 4) for f in (attend.q, attend.k, attend.v))
    expected = torch.zeros(2, 5, 2, 4).double()
    for b in range(2):
        for h in range(2):
            for i in range(5):
                row = [q[b, i, h] @ (k[b, j, h] + attend.distance[5 - (i - j)]) / 2 for j in range(i + 1)]
                expected[b, i, h] = torch.stack(row).softmax(0) @ v[b, : i + 1, h]
    assert torch.allclose(attend(x), expected.flatten(2), atol=1e-10)
    with pytest.raises(ValueError, match="max_len=6"):
        attend(torch.randn(1, 7, 8).double())


def test_latents_of_the_perceiver_stay_alike():
    torch.manual_seed(0)
    model = gcog_model("perceiver", dim=16, classes=7).eval().double()
    rule, grid = torch.randn(2, 3, 8).double(), torch.randn(2, 10, 3).double()
    told = model(rule, grid)
    one = copy.deepcopy(model)
    one.latents = 1
    assert torch.allclose(one(rule, grid), told, atol=1e-10)


def test_loss_falls():
    torch.manual_seed(0)
    model = gcog_model("cross", dim=16, classes=5)
    rule, grid, answer = torch.randn(16, 2, 8), torch.randn(16, 10, 3), torch.randint(5, (16,))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = model.loss(rule, grid, answer)["answer"]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input():
    with pytest.raises(ValueError, match="name='crosss'"):
        gcog_model("crosss")
    with pytest.raises(ValueError, match="dim=9 must be even"):
        gcog_model("cross", dim=9)
    with pytest.raises(ValueError, match="positions='learned'"):
        gcog_model("two-stream", positions="learned")
    with pytest.raises(ValueError, match="cells=101"):
        gcog_model("gru", dim=8)(torch.zeros(1, 2, 8), torch.zeros(1, 26, 3))
    with pytest.raises(ValueError, match="rule"):
        gcog_model("cross", dim=8)(torch.zeros(1, 2, 7), torch.zeros(1, 26, 3))
    with pytest.raises(ValueError, match="answer"):
        gcog_model("cross", dim=8, classes=4).loss(torch.zeros(1, 2, 8), torch.zeros(1, 5, 3), torch.tensor([4]))


def test_last_token_of_those_that_exist():
    x = torch.arange(6.0).view(1, 6, 1)
    valid = torch.tensor([[True, True, False, True, False, False]])
    assert float(last_token(x, valid)) == 3.0 and float(last_token(x)) == 5.0
