"""Search of architectures: spaces, counted costs, shared attention, a ranker, evolution against random draws."""

import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.convert.architecture import (
    KINDS,
    Ranker,
    SharedAttention,
    Space,
    attention_cost,
    crossover,
    evolve,
    kendall_tau,
    kinds_by_depth,
    sample_best,
    translation_space,
)

SPACE = Space({f"layer{i}_kind": KINDS for i in range(6)} | {f"layer{i}_ffn": (16, 32, 64) for i in range(6)})


def score(gene):
    """Early layers like linear attention, late ones softmax; width helps less and less, and neighbours interact."""
    total = 0.0
    for i in range(6):
        likes = KINDS[1] if i < 3 else KINDS[0]
        total += (gene[f"layer{i}_kind"] != likes) * (1 + 0.1 * i) - 0.3 * {16: 0, 32: 1, 64: 1.5}[
            gene[f"layer{i}_ffn"]
        ]
    return total + 0.2 * sum(gene[f"layer{i}_kind"] != gene[f"layer{i + 1}_kind"] for i in range(5))


def cost(gene):
    return sum(gene[f"layer{i}_ffn"] + 20 * (gene[f"layer{i}_kind"] == KINDS[0]) for i in range(6))


def test_evolution_beats_random_draws_of_as_many():
    won = 0
    for seed in range(6):
        found = evolve(SPACE, score, cost, 260, rounds=8, population=20, parents=5, mutants=8, seed=seed)
        drawn = sample_best(SPACE, score, len(found.seen), cost, 260, seed=100 + seed)
        assert cost(found.gene) <= 260 and all(cost(g) <= 260 for g, _ in found.seen)
        assert len(drawn.seen) == len(found.seen)
        won += found.score < drawn.score
        front = [s for g, s in found.seen if cost(g) <= cost(found.gene)]
        assert found.score == min(front)
    assert won == 6


def test_searches_of_one_seed_are_equal():
    options = dict(rounds=3, population=10, parents=3, mutants=4)
    a, b = (evolve(SPACE, score, seed=3, **options) for _ in range(2))
    assert a.gene == b.gene and a.seen == b.seen


def test_the_ranker_orders_architectures_it_has_not_seen():
    rng = random.Random(0)
    genes = [SPACE.sample(rng) for _ in range(120)]
    ranker = Ranker(SPACE).fit(genes[:60], [score(g) for g in genes[:60]])
    tau = kendall_tau(ranker.predict(genes[60:]), [score(g) for g in genes[60:]])
    assert tau > 0.6
    found = evolve(SPACE, lambda g: ranker.predict([g])[0], rounds=5, population=15, parents=4, mutants=6)
    assert score(found.gene) < sorted(score(g) for g in genes)[5]


def test_costs_are_those_of_built_modules():
    """Of softmax attention projections and both products; of cosFormer what is counted where it really runs."""
    m = attnlib.create("cosformer", dim=16, num_heads=2).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        m(torch.randn(1, 48, 16))
    found = attention_cost("cosformer", 16, 2, 48)
    assert found["flops"] == counter.get_total_flops() and found["params"] == sum(p.numel() for p in m.parameters())
    assert attention_cost("softmax-attention", 16, 2, 48)["flops"] == 8 * 48 * 16**2 + 4 * 48**2 * 16
    both = [attention_cost(kind, 16, 2, 48)["flops"] for kind in KINDS]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        layers = [attnlib.create(kind, dim=16, num_heads=2).eval() for kind in KINDS]
        x = torch.empty(1, 48, 16)
        for layer in layers:
            x = layer(x)
    assert counter.get_total_flops() == sum(both)


def test_linear_attention_is_cheaper_from_some_length_on():
    n = crossover(64, 4)
    assert n is not None
    costs = [[attention_cost(kind, 64, 4, length)["flops"] for kind in KINDS] for length in (n // 2, n)]
    assert costs[0][1] >= costs[0][0] and costs[1][1] < costs[1][0]
    assert crossover(64, 4, longest=16) in (None, 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_shared_attention_is_each_kind_on_the_same_weights(kind, causal):
    torch.manual_seed(0)
    shared = SharedAttention(16, 2, causal=causal)
    shared.active = kind
    alone = attnlib.create(kind, dim=16, num_heads=2, causal=causal)
    alone.load_state_dict({k: v for k, v in shared.options[kind].state_dict().items()})
    x, context = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(shared(x), alone(x))
    torch.testing.assert_close(shared(x, context), alone(x, context))
    assert len(list(shared.parameters())) == 8


def test_one_network_trains_all_mixtures():
    """Random kinds in every step; afterwards each mixture predicts better than it began."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(SharedAttention(8, 2) for _ in range(2))
            self.head = nn.Linear(8, 8)

        def forward(self, x, gene):
            for i, layer in enumerate(self.layers):
                layer.active = gene[f"layer{i}_kind"]
                x = x + layer(x)
            return self.head(x)

    torch.manual_seed(0)
    space, rng, net = Space({f"layer{i}_kind": KINDS for i in range(2)}), random.Random(0), Net()
    x = torch.randn(8, 6, 8)
    y = x.mean(1, keepdim=True).expand_as(x)

    def loss(gene):
        return (net(x, gene) - y).square().mean()

    genes = [{"layer0_kind": a, "layer1_kind": b} for a in KINDS for b in KINDS]
    before = [float(loss(g).detach()) for g in genes]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(space.sample(rng)).backward()
        optimizer.step()
    after = [float(loss(g).detach()) for g in genes]
    assert all(b < 0.5 * a for a, b in zip(before, after, strict=True))
    found = evolve(space, lambda g: float(loss(g).detach()), rounds=3, population=12, parents=2, mutants=6)
    assert found.score == pytest.approx(min(after))


def test_the_space_of_translation_and_what_was_chosen():
    space = translation_space(2)
    gene = space.sample(random.Random(0))
    assert space.check(gene) is gene and space.size == 4 * 2 * (6 * 2) ** 2 * (9 * 4 * 4) ** 2
    shares = kinds_by_depth([gene, {**gene, "encoder0_kind": KINDS[0]}, {**gene, "encoder0_kind": KINDS[1]}])
    assert set(shares) == {name for name in space.choices if name.endswith("kind")}
    assert sum(shares["encoder0_kind"].values()) == pytest.approx(1)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one thing"):
        Space({})
    with pytest.raises(ValueError, match="must be different values"):
        Space({"a": (1, 1)})
    with pytest.raises(ValueError, match="a gene must choose"):
        SPACE.check({"a": 1})
    with pytest.raises(ValueError, match="layer0_ffn"):
        SPACE.check({**SPACE.sample(random.Random(0)), "layer0_ffn": 17})
    with pytest.raises(ValueError, match="costs at most bound=1"):
        evolve(SPACE, score, cost, 1)
    with pytest.raises(ValueError, match="must fit into population"):
        evolve(SPACE, score, population=4, parents=3, mutants=2)
    with pytest.raises(ValueError, match="call fit"):
        Ranker(SPACE).predict([])
    with pytest.raises(ValueError, match="all equal"):
        Ranker(SPACE).fit([SPACE.sample(random.Random(i)) for i in range(3)], [1.0] * 3)
    with pytest.raises(ValueError, match="active"):
        SharedAttention(8, 2).active = "davit"
    with pytest.raises(ValueError, match="no projection"):
        SharedAttention(8, 2, kinds=("softmax-attention", "sg-former"))
    with pytest.raises(ValueError, match="at least two"):
        kendall_tau([1], [1])
