"""Thinned deltas: DARE, ways to q, magnitude and Wanda, LoRA, merging, sparse serving; AdamR against the authors'."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from attnlib.convert import deltas as dx
from attnlib.optim import AdamR

with safe_open(Path(__file__).parents[1] / "fixtures" / "darex.safetensors", "pt") as file:
    RECORD = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def pair(seed=0, mean=0.0):
    torch.manual_seed(seed)
    pre = {"a.weight": torch.randn(6, 8, dtype=torch.float64), "a.bias": torch.randn(6, dtype=torch.float64)}
    return pre, {k: v + 0.1 * torch.randn_like(v) + mean for k, v in pre.items()}


def test_nothing_dropped_is_the_fine_tuned_model():
    pre, fine = pair()
    change = dx.deltas(pre, fine)
    for how in ("random", "magnitude"):
        for name, value in dx.added(pre, dx.prune(change, 0.0, how)).items():
            torch.testing.assert_close(value, fine[name])


def test_dare_keeps_the_mean_and_q_scales():
    pre, fine = pair()
    change = dx.deltas(pre, fine)
    masks = [dx.prune(change, 0.7, seed=s) for s in range(3000)]
    mean = torch.stack([m["a.weight"] for m in masks]).mean(0)
    spread = change["a.weight"].abs() * (0.7 / 0.3 / 3000) ** 0.5
    assert ((mean - change["a.weight"]).abs() < 5 * spread).all()
    kept = torch.stack([m["a.weight"] != 0 for m in masks]).double().mean()
    assert kept == pytest.approx(0.3, abs=0.01)
    one, other = dx.prune(change, 0.7, q=0.6), dx.prune(change, 0.7, q={"a.weight": 0.3, "a.bias": 0.3})
    torch.testing.assert_close(one["a.weight"] * 2, other["a.weight"])
    assert torch.equal(dx.prune(change, 0.7)["a.weight"], dx.prune(dict(reversed(change.items())), 0.7)["a.weight"])
    assert not torch.equal(masks[0]["a.weight"] != 0, masks[1]["a.weight"] != 0)


def test_expected_error_and_where_it_is_least():
    torch.manual_seed(1)
    c, p = torch.randn(5, 40, dtype=torch.float64) + torch.tensor([0, 0.1, 0.3, 1, 3.0])[:, None], 0.9
    for q in (0.1, 0.3, 0.8):
        draws = (torch.rand(20000, 1, 40) >= p).double()
        wanted = ((c - draws * c / q).sum(-1) ** 2).mean(0)
        torch.testing.assert_close(dx.expected_error(c, p, q), wanted, rtol=0.1, atol=0)
    best = dx.best_q(c, p)
    raw = (1 - p) + p * (c**2).sum(1) / c.sum(1) ** 2
    torch.testing.assert_close(best, raw.clamp(1 - p, 1))
    grid = torch.arange(0.1, 1.0005, 0.001, dtype=torch.float64)
    assert (best - grid[torch.stack([dx.expected_error(c, p, float(q)) for q in grid]).argmin(0)]).abs().max() <= 1e-3
    for row in range(5):
        found = dx.search_q(lambda q, row=row: float(dx.expected_error(c[row], p, q)), p)
        assert abs(found - float(best[row])) <= p / 1000 + 1e-9  # within one fine step
    flat = torch.ones(1, 10**5, dtype=torch.float64)
    assert float(dx.best_q(flat, p)) == pytest.approx(1 - p, abs=1e-4)  # DARE, where S2 << S1
    assert dx.search_q(lambda q: q, 0.0) == 1.0


def test_analytical_q_is_the_bounds_zero():
    torch.manual_seed(2)
    c = torch.randn(7, 30, dtype=torch.float64)
    for p in (0.9, 0.5):
        phi = 0.5 if p == 0.5 else (1 - 2 * p) / torch.tensor((1 - p) / p).log().item()
        for row, q in zip(c, dx.analytical_q(c, p, 0.4), strict=True):
            values = {}
            for i in range(int((1 - p) * 1000 + 1e-9), 999):
                at = i / 1000
                bound = 0.4 * (1 - (1 - p) / at) * row.sum() + 0.16 * phi * (row**2).sum() / (4 * at**2)
                values[at] = abs(float(bound) + torch.tensor(40.0).log().item())
            assert float(q) == pytest.approx(min(values, key=values.get), abs=1e-9)
    assert dx.analytical_q(c, 0.0, 0.4).tolist() == [1.0] * 7
    near = dx.analytical_q(c, 0.5 + 1e-6, 0.4)
    torch.testing.assert_close(near, dx.analytical_q(c, 0.5, 0.4), atol=2e-3, rtol=0)


def test_learned_q_is_the_least_squares_one():
    torch.manual_seed(3)
    weight, delta, x = torch.randn(6, 20), 0.3 + 0.1 * torch.randn(6, 20), torch.rand(64, 20)
    sparse = dx.prune({"w": delta}, 0.5, q=1.0)["w"]
    change, wanted = x @ sparse.t(), x @ delta.t()
    least = float((change * wanted).sum() / (change**2).sum())  # 1 / q
    found = dx.learned_q(weight, sparse, x, x @ (weight + delta).t(), 0.5, steps=400)
    assert found == pytest.approx(max(1 / least, 0.5), rel=0.02)


def test_magnitude_and_wanda():
    _, fine = pair()
    change = {"w": fine["a.weight"]}
    kept = dx.prune(change, 0.75, "magnitude")["w"]
    assert (kept != 0).sum() == 12 and kept[kept != 0].abs().min() > change["w"][kept == 0].abs().max()
    assert torch.equal(kept[kept != 0], change["w"][kept != 0])  # not scaled
    norms = torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])
    score = change["w"].abs() * norms
    kept = dx.prune(change, 0.75, "wanda", norms={"w": norms})["w"]
    assert ((kept != 0).sum(1) == 2).all()
    assert all(
        set(torch.where(k != 0)[0].tolist()) == set(s.topk(2)[1].tolist()) for k, s in zip(kept, score, strict=True)
    )


def test_lora_loses_whole_ranks():
    torch.manual_seed(4)
    a, b = torch.randn(64, 5), torch.randn(4, 64)
    a2, b2 = dx.prune_lora(a, b, 0.5, seed=1)
    gone = (a2 == 0).all(1)
    assert torch.equal(gone, (b2 == 0).all(0)) and 20 <= int(gone.sum()) <= 44
    torch.testing.assert_close(b2 @ a2, b[:, ~gone] @ a[~gone] / 0.5)
    torch.testing.assert_close(torch.mm(*dx.prune_lora(a, b, 0.0)[::-1]), b @ a)


def test_models_are_merged_and_tables_may_grow():
    pre, fine = pair(0)
    other = pair(0, mean=1.0)[1]
    merged = dx.added(pre, dx.deltas(pre, fine), dx.deltas(pre, other), weights=[0.5, 2.0])
    for k in pre:
        torch.testing.assert_close(merged[k], pre[k] + 0.5 * (fine[k] - pre[k]) + 2 * (other[k] - pre[k]))
    grown = {**fine, "a.weight": torch.cat([fine["a.weight"], torch.ones(2, 8)])}
    change = dx.deltas(pre, grown)
    assert change["a.weight"].shape == (6, 8)
    torch.testing.assert_close(dx.added(pre, change)["a.weight"], fine["a.weight"])
    assert list(dx.deltas(pre, fine, lambda name: "bias" not in name)) == ["a.weight"]


def test_sparse_serving_is_the_dense_result():
    torch.manual_seed(5)
    layer = nn.Linear(8, 6).double()
    sparse = dx.prune({"w": torch.randn(6, 8).double()}, 0.8, q=1.0)["w"]
    served, x = dx.SparseDelta(layer, sparse, 0.3), torch.randn(2, 3, 8).double()
    wanted = nn.functional.linear(x, layer.weight + sparse / 0.3, layer.bias)
    torch.testing.assert_close(served(x), wanted)
    torch.testing.assert_close(copy.deepcopy(served)(x[:0]), wanted[:0])
    assert served.values.numel() == int((sparse != 0).sum())


@pytest.mark.parametrize(
    "call,word",
    [
        (lambda pre, fine: dx.prune(pre, 1.0), "p must be.*1.0"),
        (lambda pre, fine: dx.prune(pre, -0.1), "p must be"),
        (lambda pre, fine: dx.prune(pre, 0.5, "sparsegpt"), "how"),
        (lambda pre, fine: dx.prune(pre, 0.5, q=0.0), "q of"),
        (lambda pre, fine: dx.prune(pre, 0.5, "wanda"), "norms must hold"),
        (lambda pre, fine: dx.deltas(pre, {"a.weight": fine["a.weight"]}), r"same parameter names.*a\.bias"),
        (lambda pre, fine: dx.deltas(pre, {**fine, "a.weight": torch.ones(6, 9)}), "but for its rows"),
        (lambda pre, fine: dx.added(pre, {"b": torch.ones(1)}), "has not.*b"),
        (lambda pre, fine: dx.added(pre, fine, weights=[]), "a factor for each of 1"),
        (lambda pre, fine: dx.prune_lora(torch.ones(2, 3), torch.ones(2, 3), 0.5), "a and b"),
        (lambda pre, fine: dx.SparseDelta(nn.Linear(2, 3), torch.ones(2, 3)), "sparse must be"),
        (lambda pre, fine: dx.output_gap(torch.ones(2), torch.ones(3)), "one shape"),
        (lambda pre, fine: AdamR([nn.Parameter(torch.ones(2))], [torch.ones(3)]), "reference"),
        (lambda pre, fine: AdamR([nn.Parameter(torch.ones(2))], lr=-1.0), "lr"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word):
        call(*pair())


def test_output_gap():
    a, b = torch.randn(3, 9), torch.randn(3, 9)
    assert dx.output_gap(a, b) == (a - b).abs().mean()
    at = a.argsort(-1, descending=True)[:, :5]
    torch.testing.assert_close(dx.output_gap(a, b, 5), (a.gather(1, at) - b.gather(1, at)).square().mean())


# ---- AdamR


@pytest.mark.parametrize("case", ["l2", "l1"])
def test_eight_steps_equal_the_authors(case):
    params = [nn.Parameter(RECORD[f"start/{i}"].clone()) for i in range(2)]
    reference = [RECORD[f"pre/{i}"] for i in range(2)]
    optimizer = AdamR(params, reference, lr=0.05, weight_decay=0.1, l1=case == "l1")
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = RECORD[f"grad/{step}/{i}"].clone()
        optimizer.step()
        if step == 3:  # goes on from its state
            again = AdamR(params, reference, lr=0.05, weight_decay=0.1, l1=case == "l1")
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = again
    for i, p in enumerate(params):
        torch.testing.assert_close(p.detach(), RECORD[f"{case}/{i}"], atol=1e-6, rtol=1e-5)


def trained(make, steps=60):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(32, 4).double()
    y, before = x @ torch.randn(4, 3).double(), copy.deepcopy(model)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model, float((model.weight - before.weight).detach().norm())


def test_without_decay_it_is_adam_and_decay_keeps_deltas_small():
    ours, plain = trained(lambda p: AdamR(p, lr=0.05, weight_decay=0)), trained(lambda p: torch.optim.Adam(p, lr=0.05))
    torch.testing.assert_close(ours[0].state_dict(), plain[0].state_dict(), atol=1e-6, rtol=1e-6)
    moved = [trained(lambda p, w=w: AdamR(p, lr=0.05, weight_decay=w))[1] for w in (0, 0.1, 1, 5)]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.5 * moved[0]


def test_at_its_reference_without_gradient_it_stays():
    p = nn.Parameter(torch.randn(5))
    before, optimizer = p.detach().clone(), AdamR([p], lr=0.1, weight_decay=1.0)
    for _ in range(3):
        p.grad = torch.zeros(5)
        optimizer.step()
    assert torch.equal(p.detach(), before)
    p.grad = None
    assert optimizer.step(lambda: torch.tensor(2.0)) == 2.0


def test_groups_added_later_are_drawn_to_where_they_were_added_and_are_checked():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 3.0))
    optimizer = AdamR([first], lr=0.1, weight_decay=1.0)
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.zeros(2)
    with torch.no_grad():
        second.add_(1)
    optimizer.step()
    torch.testing.assert_close(second.detach(), torch.full((2,), 3.9))
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0})
