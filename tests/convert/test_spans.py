"""Spans per head: influence as the authors compute it and as a derivative, plans under budgets, models with rings."""

import json

import pytest
import torch
from parity import HERE
from safetensors.torch import load_file

from attnlib.convert.spans import Plan, _Profile, density, influence, influence_rows, predicted_loss, put, rules, search
from attnlib.hooks.site import PairMask, Site

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")
FIXTURE = load_file(HERE / "moa-spans.safetensors")


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, **changes,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(10)
    return model


def ids(n=16, batch=2):
    return torch.randint(3, 60, (batch, n), generator=torch.Generator().manual_seed(1))


# ---- influence


def test_influence_equals_the_authors():
    profile = _Profile(4, absolute=False)
    for layer in range(2):
        q, k, v, g = (FIXTURE[f"{layer}/{name}"] for name in "qkvg")
        site = Site(layer, f"layer{layer}", torch.nn.Identity(), "self", 4, 4, 4, scale=0.5)
        profile._add(site, PairMask(32, 32, causal=True), q, k, v, g)
    ours = torch.stack([profile.sums[layer] for layer in range(2)])
    theirs = FIXTURE["effect"]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_influence_is_the_derivative_towards_a_row_without_the_key():
    """Of a loss that is linear in the map, it is the very difference."""
    torch.manual_seed(0)
    weights = torch.randn(5, 6, dtype=torch.float64).softmax(-1)
    gradient = torch.randn(5, 6, dtype=torch.float64)
    effect = influence_rows(weights, gradient)
    for i in range(5):
        for j in range(6):
            row = weights[i].clone()
            row[j] = 0
            gain = (gradient[i] * (row / row.sum() - weights[i])).sum()
            torch.testing.assert_close(effect[i, j], gain)
    first = influence_rows(torch.ones(1, 1), torch.full((1, 1), 3.0), first=True)
    assert first.item() == -3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_influence_of_a_model_equals_that_of_its_whole_maps(implementation):
    model = llama(attn_implementation="eager")
    batch = {"input_ids": ids(14), "labels": ids(14)}
    out = model(**batch, output_attentions=True)
    for a in out.attentions:
        a.retain_grad()
    out.loss.backward()
    expected = []
    for a in out.attentions:
        effect = influence_rows(a.detach(), a.grad, first=True).masked_fill(a == 0, 0.0).mean(0)
        effect = torch.nn.functional.pad(effect, (0, 2, 0, 2))
        expected.append(effect.unflatten(1, (4, 4)).unflatten(3, (4, 4)).sum((2, 4)))
    model = llama(attn_implementation=implementation)
    ours = influence(model, [batch], block=4)
    expected = torch.stack(expected)
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-4
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ---- search


def test_rules_losses_and_densities_equal_the_authors():
    found = rules(-16, 32, 16, 64, interval=4, betas=5, profiled=32)
    theirs = list(zip(FIXTURE["alpha"].tolist(), FIXTURE["beta"].tolist(), strict=True))
    assert found == theirs
    loss = predicted_loss(FIXTURE["effect"], found, block=4)
    torch.testing.assert_close(loss, FIXTURE["loss"], rtol=1e-5, atol=1e-6)
    for length in (32, 64):
        ours = torch.tensor([density(a, b, length, 4) for a, b in found], dtype=torch.float64)
        torch.testing.assert_close(ours, FIXTURE[f"density_{length}"].double())


def planned(bound, **options):
    effect = FIXTURE["effect"]
    maps = {32: effect, 16: effect[..., :4, :4]}
    choices = rules(-16, 32, 16, 64, interval=8, betas=5, profiled=32)
    bounds = {16: bound, 32: bound, 64: bound}
    options = {"rules_per_layer": 2, **options}
    return maps, choices, search(maps, choices, bounds, block=4, points=3, **options)


def losses(maps, plan, absolute=True):
    out = []
    for effect in maps.values():
        total = 0.0
        for layer, rows in enumerate(zip(plan.alphas, plan.betas, strict=True)):
            for head, rule in enumerate(zip(*rows, strict=True)):
                total += float(predicted_loss(effect[layer : layer + 1, head : head + 1], [rule], 4))
        out.append(total)
    return out


def test_plans_meet_every_bound_and_no_one_beats_another():
    maps, choices, plans = planned(0.6)
    scores = [losses(maps, plan) for plan in plans]
    for plan, score in zip(plans, scores, strict=True):
        assert all(plan.density(n, 4) <= 0.6 + 1e-6 for n in (16, 32, 64))
        assert all(len(set(zip(*rows, strict=True))) <= 2 for rows in zip(plan.alphas, plan.betas, strict=True))
        assert {rule for rows in zip(plan.alphas, plan.betas, strict=True) for rule in zip(*rows, strict=True)} <= set(
            choices
        )
        assert not any(all(a <= b for a, b in zip(other, score, strict=True)) and other != score for other in scores)
    sparser = min(sum(losses(maps, plan)) for plan in planned(0.5)[2])
    assert sparser >= min(sum(score) for score in scores) - 1e-6


def test_without_a_budget_every_head_reads_all():
    maps, _, plans = planned(1.0)
    assert min(sum(losses(maps, plan)) for plan in plans) == 0


def test_a_single_length_is_the_best_choice_of_all():
    """Two heads, every pair of rules tried."""
    effect = FIXTURE["effect"][:1, :2]
    choices = rules(-8, 32, 32, 32, interval=8, betas=3)
    (plan,) = search({32: effect}, choices, {32: 0.5}, block=4, rules_per_layer=None)
    loss = predicted_loss(effect, choices, 4)[0]
    cost = [density(a, b, 32, 4) for a, b in choices]
    best = min(
        float(loss[0, i] + loss[1, j])
        for i in range(len(choices)) for j in range(len(choices)) if (cost[i] + cost[j]) / 2 <= 0.5 + 1e-9
    )  # fmt: skip
    assert sum(losses({32: effect}, plan)) == pytest.approx(best, rel=1e-5)


def test_heads_of_one_key_head_get_one_rule():
    _, _, plans = planned(0.6, groups=2)
    for plan in plans:
        for row in (*plan.alphas, *plan.betas):
            assert row[0] == row[1] and row[2] == row[3]


# ---- models


PLAN = Plan([[4, 0, -4, 6], [2, 2, 0, 0]], [[0, 0.5, 1, 0], [0, 0, 0.25, 1]])


def test_plans_are_read_and_written_as_the_authors_do(tmp_path):
    PLAN.write(tmp_path / "plan.json")
    assert set(json.loads((tmp_path / "plan.json").read_text())) == {"alphas", "betas"}
    assert Plan.read(tmp_path / "plan.json") == PLAN
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold alphas and betas"):
        Plan.read(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="every head of every layer"):
        Plan([[1.0]], [[1.0, 2.0]])


def test_a_model_generates_with_rings_as_without_a_cache(tmp_path):
    model, given = llama(), ids(11)
    given[0, :4] = 0
    batch = {"input_ids": given, "attention_mask": (given != 0).long()}
    before = model(**batch).logits
    options = dict(max_new_tokens=8, do_sample=False)
    conversion = put(model, PLAN, block=2, length=12)
    cached = model.generate(**batch, **options)
    assert cached.equal(model.generate(**batch, **options, use_cache=False))
    beams = model.generate(**batch, **options, num_beams=3)
    assert beams.equal(model.generate(**batch, **options, num_beams=3, use_cache=False))
    logits = model(**batch).logits
    conversion.save(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, logits)
    assert not torch.allclose(logits, before, atol=1e-4)
    conversion.restore()
    assert model(**batch).logits.equal(before)


def test_full_spans_leave_a_model_as_it_was():
    model, given = llama(), ids(12)
    before = model(given).logits
    with put(model, Plan([[0] * 4] * 2, [[1] * 4] * 2), block=4):
        torch.testing.assert_close(model(given).logits, before, atol=1e-5, rtol=1e-4)


def test_bad_input_is_refused():
    effect = FIXTURE["effect"]
    choices = rules(-16, 32, 16, 64, interval=8, betas=5)
    with pytest.raises(ValueError, match=r"bounds\[16\]=0.1 cannot be met"):
        search({32: effect}, choices, {32: 0.5, 16: 0.1}, block=4)
    with pytest.raises(ValueError, match=r"bounds\[32\]"):
        search({32: effect}, choices, {32: 1.5}, block=4)
    with pytest.raises(ValueError, match="at least one length"):
        search({}, choices, {})
    with pytest.raises(ValueError, match="groups=3"):
        search({32: effect}, choices, {32: 0.9}, groups=3, block=4)
    with pytest.raises(ValueError, match="no rule fits"):
        rules(-64, -32, 16, 64)
    with pytest.raises(ValueError, match="batches holds none"):
        influence(llama(), [])
    with pytest.raises(ValueError, match="the plan is for 1 layers, but 2"):
        put(llama(), Plan([[1.0] * 4], [[0.0] * 4]))
    with pytest.raises(ValueError, match="one for each of 4 heads"):
        put(llama(), Plan([[1.0]] * 2, [[0.0]] * 2))
    with pytest.raises(ValueError, match="count"):
        density(0, 1, 64, count="full")
