"""Greedy search and sigmoid schedules on known functions; pruning by a schedule inside a decoder."""

import math

import pytest
import torch

from hooks.models import scores

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import IMAGE, PAD, TEXT, Intervention, Record, TokenTypes  # noqa: E402
from attnlib.reduce import (  # noqa: E402
    BlockCost,
    ByAttention,
    ClusterMerge,
    Grid,
    Learned,
    NearestMerge,
    Rate,
    Reduce,
    ReduceByAttention,
    ScheduledPruning,
    SigmoidSchedule,
    Threshold,
    TopK,
    bayesian_search,
    greedy_search,
    prefill_flops,
    rank_consistency,
    sigmoid_search,
)
from hooks.pictures import COPIES, IMAGE_ID, TOKENS, image_slots, picture_inputs, picture_model  # noqa: E402

TYPES = TokenTypes(IMAGE_ID)


@pytest.fixture(scope="module")
def model():
    return picture_model(num_hidden_layers=4)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ---- search


def needs(wanted):
    """1 when every layer has what it needs, else less and less."""
    return lambda k: 1.0 if all(a >= b for a, b in zip(k, wanted, strict=True)) else 0.9 * sum(k) / 1e4


@pytest.mark.parametrize(
    "wanted", [(576, 576, 300, 144, 144, 20, 0, 0), (1,) * 8, (0,) * 8, (576,) * 8, (500, 3, 2, 1, 1, 1, 1, 0)]
)
def test_greedy_search_finds_what_is_needed_in_few_evaluations(wanted):
    asked = []

    def f(k):
        asked.append(k)
        return needs(wanted)(k)

    result = greedy_search(f, layers=8, n=576)
    assert result.counts == wanted and result.score == 1.0
    assert len(asked) == len(set(asked)) == result.evaluations <= 8 * (math.ceil(math.log2(577)) + 1) + 1
    assert all(b <= a for k in asked for a, b in zip(k, k[1:], strict=False))


def test_tolerance_minimum_grid_and_first_layers():
    strict = lambda k: float(sum(k))  # noqa: E731
    assert greedy_search(strict, 4, 100).counts == (100,) * 4
    assert greedy_search(strict, 4, 100, tolerance=float("inf")).counts == (0,) * 4
    assert greedy_search(strict, 4, 100, tolerance=float("inf"), minimum=7).counts == (7,) * 4
    assert greedy_search(strict, 4, 100, tolerance=float("inf"), first_layer=2).counts == (100, 100, 0, 0)
    grid = greedy_search(needs((60, 30, 10)), 3, 100, grid=[0, 25, 50, 75, 100])
    assert grid.counts == (75, 50, 25)
    assert grid.rates(100) == (0.75, 0.5, 0.25)
    # Falling by one token per layer costs one: a tolerance of 30 is spent in the first layer it can be.
    assert sum(greedy_search(strict, 4, 100, tolerance=30).counts) == 370
    for bad in (dict(layers=0, n=4), dict(layers=2, n=4, minimum=5), dict(layers=2, n=4, first_layer=3)):
        with pytest.raises(ValueError, match="layers must be at least 1"):
            greedy_search(strict, **bad)
    with pytest.raises(ValueError, match="grid must lie between"):
        greedy_search(strict, 2, 10, grid=[1, 5])


# ---- sigmoid


@pytest.mark.parametrize("budget", [0.02, 0.11, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    "low, high, steepness", [(0.0, 1.0, 0.1), (0.0, 1.0, 3.0), (0.02, 0.95, 0.5), (0.3, 0.6, 1.0), (0.0, 1.0, 0.0)]
)
def test_schedules_meet_their_budget_and_never_grow(budget, low, high, steepness):
    schedule = SigmoidSchedule.fitted(budget, 32, low, high, steepness)
    rates, counts = schedule.rates(32), schedule.counts(32, 576)
    assert math.isclose(sum(rates) / 32, budget, rel_tol=1e-6)
    assert abs(sum(counts) / 32 - budget * 576) <= 1
    for values in (rates, counts):
        assert all(b <= a for a, b in zip(values, values[1:], strict=False)) and 0 <= values[-1] <= values[0]
    assert max(counts) <= 576


def test_budgets_in_floating_point_operations():
    cost = BlockCost.llama(64, 172)

    def price(rates):
        return sum(cost.flops(round(r * 576) + 40) for r in rates)

    schedule = SigmoidSchedule.fitted(0.4, 24, steepness=0.5, cost=price)
    assert abs(price(schedule.rates(24)) / price([1.0] * 24) - 0.4) < 2e-3
    with pytest.raises(ValueError, match="the budget lies between"):
        SigmoidSchedule.fitted(0.01, 24, steepness=0.5, cost=price)
    flat = SigmoidSchedule.fitted(0.4, 24, steepness=0.0, cost=price)
    assert len(set(flat.rates(24))) == 1 and abs(price(flat.rates(24)) / price([1.0] * 24) - 0.4) < 2e-3


def test_bad_schedules():
    with pytest.raises(ValueError, match="shares must lie"):
        SigmoidSchedule(0.5, 0.2, 1.0, 3.0)
    with pytest.raises(ValueError, match="steepness must not be negative"):
        SigmoidSchedule(0.0, 1.0, -1.0, 3.0)
    for budget in (0.0, 1.5):
        with pytest.raises(ValueError, match="budget must lie"):
            SigmoidSchedule.fitted(budget, 8)


def test_bayesian_search_beats_random_search():
    """On a smooth function of two parameters, at equal evaluations."""

    def f(p):
        return -((p[0] - 0.7) ** 2) - 2 * (p[1] - 0.2) ** 2 + 0.1 * math.cos(6 * p[0] * p[1])

    found, wild = [], []
    for seed in range(3):
        found.append(bayesian_search(f, [(0.0, 1.0)] * 2, 20, seed=seed)[1])
        generator = torch.Generator().manual_seed(seed)
        wild.append(max(f(p) for p in torch.rand(20, 2, generator=generator).tolist()))
    assert all(a > b for a, b in zip(found, wild, strict=True))
    best = max(f((a / 100, b / 100)) for a in range(101) for b in range(101))
    assert min(found) > best - 2e-3
    points = bayesian_search(f, [(0.0, 1.0), (0.5, 0.9)], 7, start=[(0.3, 0.6)])[2]
    assert len(points) == 7 and points[0][0] == pytest.approx((0.3, 0.6))
    assert all(0.5 <= p[1] <= 0.9 for p, _ in points)
    assert bayesian_search(f, [(0.0, 1.0)] * 2, 5, seed=1) == bayesian_search(f, [(0.0, 1.0)] * 2, 5, seed=1)
    with pytest.raises(ValueError, match="bounds"):
        bayesian_search(f, [(1.0, 0.0)], 3)
    with pytest.raises(ValueError, match="evaluations"):
        bayesian_search(f, [(0.0, 1.0)], 0)


def test_sigmoid_search_finds_a_planted_curve():
    planted = SigmoidSchedule.fitted(0.3, 16, 0.05, 0.9, 0.8)
    want = planted.counts(16, 64)

    def f(k):
        return -sum((a - b) ** 2 for a, b in zip(k, want, strict=True)) / 64**2

    plain = f(SigmoidSchedule.fitted(0.3, 16, 0.3, 0.3, 0.0).counts(16, 64))
    result = sigmoid_search(f, 16, 64, 0.3, evaluations=25)
    assert abs(sum(result.counts) / 16 - 0.3 * 64) <= 1
    assert result.score == f(result.counts) > 0.05 * plain
    greedy = greedy_search(needs(want), 16, 64).counts
    assert sigmoid_search(f, 16, 64, 0.3, evaluations=25, like=greedy).score > 0.05 * plain
    late = sigmoid_search(lambda k: -sum(k[2:]), 6, 16, 0.4, evaluations=6, first_layer=2)
    assert late.counts[:2] == (16, 16) and abs(sum(late.counts[2:]) / 4 - 6.4) <= 1
    with pytest.raises(ValueError, match="budget must lie"):
        sigmoid_search(f, 16, 64, 1.0)
    with pytest.raises(ValueError, match="bounds are of low"):
        sigmoid_search(f, 16, 64, 0.3, bounds={"middle": (0.0, 1.0)})


def test_rank_consistency():
    torch.manual_seed(0)
    same = torch.rand(1, 3, 50).expand(5, -1, -1)
    close(rank_consistency(same), torch.ones(5, 5, dtype=torch.float64))
    close(rank_consistency(torch.cat([same, same.exp() * 3])), torch.ones(10, 10, dtype=torch.float64))
    wild = rank_consistency(torch.rand(6, 20, 100))
    assert wild.fill_diagonal_(0).abs().max() < 0.1
    close(
        rank_consistency(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))[0],
        torch.tensor([1.0, -1.0], dtype=torch.float64),
    )
    x, y = torch.rand(2, 40)
    scipy = pytest.importorskip("scipy.stats")
    x[3] = x[7]
    assert float(rank_consistency(torch.stack([x, y]))[0, 1]) == pytest.approx(scipy.spearmanr(x, y).statistic)
    with pytest.raises(ValueError, match="at least two tokens"):
        rank_consistency(torch.rand(3, 2, 1))


def test_cost_model():
    c, m, n = 16, 40, 7
    assert BlockCost.llama(c, m).flops(n) == 2 * (4 * n * c * c + 2 * n * n * c + 3 * n * c * m)
    assert prefill_flops([BlockCost.llama(c, m)] * 2, [7, 3]) == BlockCost.llama(c, m).flops(7) + BlockCost.llama(
        c, m
    ).flops(3)
    with pytest.raises(ValueError, match="lengths must be one for each of 2 costs, got 1"):
        prefill_flops([BlockCost(1, 1)] * 2, [3])


# ---- pruning by a schedule


class Forbid(Intervention):
    """The oracle: ranks and removals computed here, densely, from the attention of the layer before."""

    kinds = ("self",)

    def __init__(self, image, types, counts, rows):
        self.image, self.types, self.counts, self.rows = image, types, counts, rows
        self.stay, self.weights, self.at = {}, {}, image

    def around_attention(self, site, q, k, v, call):
        layer = site.layer
        if site.phase == "prefill" and layer not in self.stay:
            keep = self.stay.get(layer - 1, self.at).clone()
            for b in range(len(keep)):
                count = self.counts[layer](int(self.image[b].sum()))
                if count < int(keep[b].sum()):
                    there = keep[b].nonzero().flatten().tolist()
                    got = {j: float(self.weights[layer - 1][b, j]) for j in there}
                    for j in sorted(there, key=lambda j: (-got[j], j))[count:]:
                        keep[b, j] = False
            self.stay[layer] = keep
        allowed = site.mask.dense()
        n = self.image.shape[1]
        stays = torch.ones(q.shape[0], site.n_keys, dtype=torch.bool)
        gone = (self.image & ~self.stay[layer]).repeat_interleave(q.shape[0] // len(self.image), 0)
        stays[:, :n] = ~gone
        allowed = allowed & stays[:, None, None]
        if site.phase == "prefill" and layer not in self.weights:
            s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * site.scale
            a = s.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0).mean(1)
            read = torch.zeros_like(self.image)
            for b in range(len(read)):
                last = max([j for j in range(n) if self.image[b, j]], default=-1)
                read[b, last + 1 :] = True
                if self.rows == "last":
                    read[b, :-1] = False
            read &= self.types != PAD
            self.weights[layer] = (a * read[:, :, None]).sum(1)
        return call(q, k, v, mask=allowed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("rows", ["text", "last"])
def test_pruning_equals_an_oracle(family, rows):
    model = picture_model(family, num_hidden_layers=4)
    inputs = picture_inputs((1, 2))
    types = TYPES(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    rates = [1.0, 1.0, 0.5, 0.2]
    counts = [lambda n, r=r: round(r * n) for r in rates]
    oracle = Forbid(image_slots(inputs), types, counts, rows)
    with attnlib.attach(model, oracle):
        want, ids = scores(model, inputs)
    with attnlib.attach(model, ScheduledPruning(rates, rows=rows), token_types=TYPES) as session:
        got, mine = scores(model, inputs)
    close(got, want)
    assert torch.equal(ids, mine)
    real = inputs["attention_mask"].sum(1)
    images = image_slots(inputs).sum(1)
    shown = session.results["scheduled-pruning"]
    for layer, rate in enumerate(rates):
        assert torch.equal(shown["tokens"][layer], real - images + (images * rate).round().long())
    for b in range(2):
        left = [s for s in shown["slots"][b].tolist() if s >= 0 and image_slots(inputs)[b, s]]
        assert left == oracle.stay[3][b].nonzero().flatten().tolist()


@pytest.mark.parametrize("mode", [pytest.param({"num_beams": 3}, marks=COPIES), {"cache_implementation": "static"}])
def test_every_way_of_decoding(model, mode):
    inputs = picture_inputs((1, 2))
    types = TYPES(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    rates = [1.0, 1.0, 0.4, 0.4]
    first = Forbid(image_slots(inputs), types, [lambda n, r=r: round(r * n) for r in rates], "text")
    with attnlib.attach(model, first), torch.no_grad():
        model(**inputs)
    with attnlib.attach(model, first):
        want, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, ScheduledPruning(rates), token_types=TYPES):
        got, _ = scores(model, inputs, **mode)
    close(got, want)


def test_counts_serve_one_image_size_and_rates_all(model):
    inputs = picture_inputs((1, 1))
    got = []
    for settings in (dict(counts=[16, 16, 8, 3]), dict(rates=[1.0, 1.0, 0.5, 3 / 16])):
        with attnlib.attach(model, ScheduledPruning(**settings), token_types=TYPES):
            got.append(scores(model, inputs)[0])
    assert torch.equal(*got)
    with attnlib.attach(model, ScheduledPruning(counts=[16, 16, 8, 3]), token_types=TYPES):
        with pytest.raises(ValueError, match=r"counts are for 16 visual tokens, the samples have \[16, 32\]"):
            model(**picture_inputs((1, 2)))


def test_all_tokens_are_the_untouched_model(model):
    inputs = picture_inputs((1, 2))
    before = scores(model, inputs)
    for pruning in (
        ScheduledPruning([1.0] * 4),
        ReduceByAttention({1: TOKENS * 2}),
        ReduceByAttention({2: Threshold(-1.0)}),
    ):
        with attnlib.attach(model, pruning, token_types=TYPES):
            after = scores(model, inputs)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    empty = picture_inputs((0, 0))
    before = scores(model, empty)
    with attnlib.attach(model, ScheduledPruning([1.0, 1.0, 0.5, 0.5]), token_types=TYPES):
        assert torch.equal(scores(model, empty)[0], before[0])


def test_the_search_runs_on_a_model(model):
    """Search the counts of a model by how little its logits move; more tokens never score less."""
    inputs = picture_inputs((1,))
    with torch.no_grad():
        want = model(**inputs).logits[:, -1]

    def f(counts):
        with attnlib.attach(model, ScheduledPruning(counts=counts), token_types=TYPES), torch.no_grad():
            return -float((model(**inputs).logits[:, -1] - want).abs().max())

    exact = greedy_search(f, 4, TOKENS, first_layer=2)
    assert exact.score >= -1e-6 and exact.counts[:2] == (16, 16)
    loose = greedy_search(f, 4, TOKENS, first_layer=2, tolerance=0.5 * float(want.abs().max()))
    assert loose.score >= -0.5 * float(want.abs().max()) and sum(loose.counts) < sum(exact.counts)


def test_recorded_scores_give_the_ranks(model):
    """The consistency of ranks between layers, from what a record holds."""
    inputs = picture_inputs((1,))
    with attnlib.attach(model, Record()) as session, torch.no_grad():
        model(**inputs)
    maps = torch.stack([session.results["record"][n]["weights"][0] for n in range(4)])
    image = image_slots(inputs)[0]
    ranks = rank_consistency(maps.mean(2)[:, :, 0][..., image])
    assert ranks.shape == (4, 4) and torch.equal(ranks, ranks.T) and (ranks.diagonal() > 0.999).all()


# ---- scorers, selectors and mergers in other combinations


def test_learned_scores_and_selectors(model):
    inputs = picture_inputs((1, 2))
    image = image_slots(inputs)
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 1)
    caught = {}

    class Look(Intervention):
        kinds = ("self",)
        layers = (2,)

        def on_block_input(self, site, hidden):
            if site.phase == "prefill":
                caught["hidden"] = hidden

    with attnlib.attach(model, Look()), torch.no_grad():
        model(**inputs)
    worth = head(caught["hidden"])[..., 0].detach()
    for selector, rule in (
        (5, lambda s: s >= s.sort().values[-5]),
        (0.25, lambda s: s >= s.sort().values[-round(0.25 * len(s))]),
        (Threshold(float(worth[image].median())), lambda s: s > worth[image].median()),
        (Threshold(1e9, minimum=1), lambda s: s == s.max()),
    ):
        with attnlib.attach(model, Reduce(Learned(head), {2: selector}), token_types=TYPES) as session, torch.no_grad():
            model(**inputs)
        slots = session.results["reduce"]["slots"]
        for b in range(2):
            kept = torch.zeros(image.shape[1], dtype=torch.bool)
            kept[slots[b][slots[b] >= 0]] = True
            assert torch.equal(kept[image[b]], rule(worth[b, image[b]]))
    with (
        attnlib.attach(model, Reduce(Learned(head), {0: Grid(2, (4, 4))}), token_types=TYPES) as session,
        torch.no_grad(),
    ):
        model(**inputs)
    assert session.results["reduce"]["tokens"][0].tolist() == [8 + 4, 13 + 8]
    with attnlib.attach(model, Reduce(Learned(lambda x: x), 3), token_types=TYPES):
        with pytest.raises(ValueError, match="module must give scores"):
            model(**inputs)


@pytest.mark.parametrize("merger", [ClusterMerge(3), NearestMerge()])
def test_mergers_inside_the_decoder(model, merger):
    """The total of what is merged is where it should be: an image of equal tokens merges into itself."""
    inputs = picture_inputs((1, 2))
    with attnlib.attach(model, ReduceByAttention({2: 4}, merger=merger), token_types=TYPES) as session:
        got, _ = scores(model, inputs)
    assert torch.isfinite(got).all()
    extra = 3 if isinstance(merger, ClusterMerge) else 0
    assert session.results["reduce-by-attention"]["tokens"][2].tolist() == [8 + 4 + extra, 13 + 4 + extra]
    torch.manual_seed(0)
    hidden = torch.randn(1, 1, 8).expand(1, 6, 8)
    image = torch.tensor([[False, True, True, True, True, False]])
    keep, new = merger.merge(torch.rand(1, 6), torch.tensor([[False, True] + [False] * 4]), image, hidden)
    close(new[keep], hidden[keep])
    assert int(keep.sum()) == 1 + extra and not (keep & ~image).any()


def test_nearest_merge_averages_by_score():
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]]])
    image = torch.ones(1, 4, dtype=torch.bool)
    keep, new = NearestMerge().merge(
        torch.tensor([[1.0, 2.0, 3.0, 2.0]]), torch.tensor([[True, True, False, False]]), image, hidden
    )
    close(new[0, :2], torch.tensor([[(1 + 9) / 4, 0.0], [0.0, (2 + 10) / 4]]))
    keep, new = NearestMerge().merge(
        torch.tensor([[1.0, 2.0, 3.0, 2.0]]), torch.zeros(1, 4, dtype=torch.bool), image, hidden
    )
    assert keep.tolist() == [[False, False, True, False]]


def test_selectors_on_known_scores():
    s = torch.tensor([[0.3, float("-inf"), 0.9, 0.3, 0.5]])
    there = torch.tensor([[True, True, False, True, True]])
    of = torch.tensor([4])
    assert TopK(2).keep(s, there, of).tolist() == [[True, False, False, False, True]]
    assert TopK(9).keep(s, there, of).tolist() == there.tolist()
    assert TopK(0).keep(s, there, of).sum() == 0
    assert Rate(0.5).keep(s, there, of).sum() == 2 and Rate(0.0).keep(s, there, of).sum() == 0
    assert Threshold(0.4).keep(s, there, of).tolist() == [[False] * 4 + [True]]
    with pytest.raises(ValueError, match="removed before"):
        Grid(2, (2, 2)).keep(s, there, torch.tensor([8]))
    for bad in (lambda: TopK(-1), lambda: Rate(1.2), lambda: Grid(0)):
        with pytest.raises(ValueError):
            bad()


# ---- limits


def test_bad_settings_and_use(model):
    with pytest.raises(ValueError, match="either rates or counts"):
        ScheduledPruning()
    with pytest.raises(ValueError, match="must never grow"):
        ScheduledPruning([1.0, 0.5, 0.6, 0.6])
    with pytest.raises(ValueError, match=r"layers \[1\] would drop tokens by the ranks"):
        ScheduledPruning([1.0, 0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="first_layer must be at least 2"):
        ScheduledPruning([1.0, 0.5], first_layer=1)
    with pytest.raises(ValueError, match="rate must lie in"):
        ScheduledPruning([1.0, 1.0, -0.5])
    with pytest.raises(ValueError, match="3 values were given, the model has 4 layers"):
        attnlib.attach(model, ScheduledPruning([1.0, 1.0, 0.5]), token_types=TYPES)
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        attnlib.attach(model, ReduceByAttention({9: 0.5}), token_types=TYPES)
    with pytest.raises(ValueError, match=r"tokens cannot leave at layers \[0\]"):
        ReduceByAttention({0: 0.5})
    with pytest.raises(TypeError, match="keep must be {layer"):
        ReduceByAttention(0.5)
    with pytest.raises(TypeError, match="scorer must be"):
        Reduce("attention", 3)
    with pytest.raises(TypeError, match=r"size must be the two sides \(h, w\).*got 4"):
        Grid(2, 4)
    with pytest.raises(TypeError, match="merger must have merge.*got 'mean'"):
        ReduceByAttention({2: 0.5}, merger="mean")
    with pytest.raises(ValueError, match="rows"):
        ByAttention(rows="image")
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, ScheduledPruning([1.0, 1.0, 0.5, 0.5]))
    with attnlib.attach(model, ScheduledPruning([1.0, 1.0, 0.5, 0.5]), token_types=TYPES):
        with pytest.raises(ValueError, match="session already"):
            attnlib.attach(model, ScheduledPruning([1.0, 1.0, 0.5, 0.5]), token_types=TYPES)
    assert {TEXT, IMAGE} == set(TYPES(picture_inputs()["input_ids"]).flatten().tolist())
