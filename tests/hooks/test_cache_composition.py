"""Scorers, budgets and selectors in any combination, after the prompt and while decoding."""

import copy
import dataclasses

import pytest
import torch

from hooks.llava import llava, llava_inputs
from hooks.models import call_site, dense_attention, language_model, prompt, scores

transformers = pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import (  # noqa: E402
    AcrossHeads,
    AcrossLayers,
    CacheView,
    Cap,
    ExpectedAttention,
    KeyNorm,
    KVCompression,
    LastQuery,
    ObservedAttention,
    PerLayer,
    Product,
    Pyramid,
    RandomScores,
    Ratio,
    Recency,
    Scorer,
    SnapKV,
    SnapKVVotes,
    TopK,
    ValueNorm,
)
from attnlib.hooks import Intervention, Record  # noqa: E402

FAMILIES = ["llama", "qwen2", "mistral"]


@pytest.fixture(scope="module")
def models():
    return {family: language_model(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def llama(models):
    return models["llama"]


def expected(**changes):
    return ExpectedAttention(**{"future": 8, "sinks": 2, **changes})


SCORERS = {
    "votes": lambda: SnapKVVotes(4, 3),
    "recency": lambda: Recency(2),
    "low norm": lambda: KeyNorm("low"),
    "high norm": lambda: KeyNorm("high"),
    "value norm": lambda: ValueNorm(),
    "last query": lambda: LastQuery(),
    "last query per head": lambda: LastQuery(per_head=True),
    "observed": lambda: ObservedAttention(),
    "observed times value": lambda: ObservedAttention() * ValueNorm(),
    "expected": lambda: expected() * ValueNorm(),
    "expected mean": lambda: expected(covariance=False),
}

BUDGETS = {
    "ratio": Ratio(0.5),
    "cap": Cap(9),
    "pyramid": Pyramid(Cap(8), beta=2, window_size=2),
    "per layer": PerLayer([Cap(12), Ratio(0.3), Cap(6)]),
    "across heads": AcrossHeads(Ratio(0.6), 0.3),
    "across layers": AcrossLayers(Cap(9), 0.25),
    "pyramid across heads": AcrossHeads(Pyramid(Cap(8), beta=2, window_size=2)),
}


class ReadOnly(Intervention):
    """The oracle: the cache keeps everything, decoding reads only the slots that ``session`` left at the prompt."""

    name = "read-only"
    kinds = ("self",)

    def __init__(self, kept, length):
        self.kept, self.length = kept, length

    def around_attention(self, site, q, k, v, call):
        if site.phase == "prefill" or site.layer not in self.kept:
            return call(q, k, v)
        return call(q, k, v, mask=only(self.kept[site.layer], site, self.length) & site.mask.dense())


def only(kept, site, since):
    """(B, H, 1, M) boolean: the kept slots, and everything from ``since`` on."""
    slots = site.k_pos if site.k_pos.dim() == 3 else site.k_pos[None, None]
    stays = (slots.unsqueeze(-1) == kept[:, :, None]).any(-1) & (slots >= 0) | (slots >= since)
    return stays.repeat_interleave(site.heads // site.kv_heads, 1)[:, :, None]


def kept_of(session):
    return {layer: entry["kept"] for layer, entry in session.results["kv-compression"].items()}


# ---- what a key is worth, against the equations


def view_of(seed=0, n=15, pad=(4, 0), dtype=torch.float64):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 8, dtype=dtype) for h in (4, 2, 2))
    valid = torch.arange(n) >= torch.tensor(pad)[:, None]
    allowed = ((torch.arange(n) <= torch.arange(n)[:, None]) & valid[:, None])[:, None]
    site = call_site(q, k, allowed=allowed, layer=1)
    order = (valid.long().cumsum(-1) - 1).masked_fill(~valid, -1)
    return CacheView(site, q, order, site.q_pos.expand(2, n), k, v, valid[:, None], site.k_pos), allowed, pad


def test_observed_and_last_attention_by_their_equations():
    view, allowed, pad = view_of()
    _, w = dense_attention(view.q, view.k, view.v, allowed)
    mine = ObservedAttention().score(view)
    last = LastQuery(per_head=True).score(view)
    for b, start in enumerate(pad):
        for j in range(start, 15):
            per_head = w[b, :, j:, j].mean(-1)
            torch.testing.assert_close(mine[b, :, j], per_head.reshape(2, 2).mean(-1))
    torch.testing.assert_close(last, w[:, :, -1].reshape(2, 2, 2, 15).mean(2))
    torch.testing.assert_close(LastQuery().score(view), w[:, :, -1].mean(1, keepdim=True))


def test_observed_attention_does_not_depend_on_its_blocks(monkeypatch):
    view, _, _ = view_of()
    whole = ObservedAttention().score(view)
    monkeypatch.setattr("attnlib.cache.scorers.BLOCK_ELEMENTS", 2 * 4 * 15 * 4)
    torch.testing.assert_close(ObservedAttention().score(view), whole)


def test_norms_recency_and_products_by_their_equations():
    view, _, pad = view_of()
    torch.testing.assert_close(KeyNorm().score(view), -view.k.square().sum(-1).sqrt())
    torch.testing.assert_close(KeyNorm("high").score(view), view.k.square().sum(-1).sqrt())
    torch.testing.assert_close(ValueNorm().score(view), view.v.square().sum(-1).sqrt())
    order = Recency(2).score(view).expand(2, 2, 15)
    for b, start in enumerate(pad):
        assert order[b, :, start : start + 2].isinf().all()
        assert (order[b, :, start + 2 :].diff(dim=-1) == 1).all()
    both = (Recency(2) * ValueNorm()).score(view)
    torch.testing.assert_close(both[1, :, 2:], order[1, :, 2:].double() * ValueNorm().score(view)[1, :, 2:])
    assert both[1, :, :2].isinf().all()


def test_expected_attention_by_its_equation(llama):
    """Each query rotated to each future position by hand, moments, softmax; a sample at a time."""
    pad, future, sinks = (4, 0), 8, 2
    view, _, _ = view_of(dtype=torch.float32)
    module = llama.model.layers[1].self_attn
    site = view.site.but(name="model.layers.1.self_attn", module=module)
    scorer = expected(epsilon=0.01)
    scorer.prepare(llama, [site])
    mine = scorer.score(dataclasses.replace(view, site=site))

    frequency = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def turned(x, offsets):
        angle = offsets.double().unsqueeze(-1) * frequency
        a, b = x[..., :4], x[..., 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for b, start in enumerate(pad):
        q, k = view.q[b, :, start:].double(), view.k[b, :, start:].double().repeat_interleave(2, 0)
        at_last = turned(q, torch.arange(q.shape[1] - 1, -1, -1))[:, sinks:]
        eye = torch.eye(8, dtype=torch.float64)
        average = torch.stack([turned(eye, torch.full((8,), t)) for t in range(1, future + 1)]).mean(0)  # rows: e_i R
        moved = at_last @ average
        mean = moved.mean(1)
        covariance = torch.stack([torch.cov(m.T, correction=0) for m in moved])
        logits = (k @ mean.unsqueeze(-1)).squeeze(-1) * 8**-0.5
        logits = logits + torch.einsum("hnd,hde,hne->hn", k, covariance, k) / 16
        w = torch.softmax(logits[:, sinks:], -1).reshape(2, 2, -1).mean(1) + 0.01
        torch.testing.assert_close(mine[b, :, start + sinks :].double(), w, atol=1e-5, rtol=1e-5)
        assert mine[b, :, start : start + sinks].isinf().all()


# ---- how many stay


def test_heads_share_a_layer_and_keep_a_minimum():
    torch.manual_seed(0)
    s = torch.randn(2, 4, 30) * torch.tensor([0.1, 1.0, 2.0, 4.0])[:, None]
    s[0, :, :7] = -torch.inf
    real = torch.tensor([23, 30])
    counts = AcrossHeads(Ratio(0.5), 0.4).counts([s], [real], [(0, 1)])[0]
    even = torch.tensor([11, 15])
    assert torch.equal(counts.sum(-1), 4 * even)
    assert (counts >= (even * 0.4).long()[:, None]).all() and counts.unique().numel() > 2
    kept = TopK().pick(s, counts)
    assert torch.equal((kept >= 0).sum(-1), counts)
    assert (kept.diff(dim=-1)[kept[..., 1:] >= 0] > 0).all()
    # What stays beyond every head's minimum is worth more than anything that goes.
    for b in range(2):
        stays = torch.zeros(4, 30, dtype=torch.bool)
        for h in range(4):
            stays[h, kept[b, h][kept[b, h] >= 0]] = True
        certain = torch.zeros_like(stays).scatter_(-1, s[b].topk(int(even[b] * 0.4)).indices, True)
        extra = s[b][stays & ~certain]
        assert extra.min() >= s[b][~stays].max()
    assert torch.equal(AcrossHeads(Ratio(0.5), 1.0).counts([s], [real], [(0, 1)])[0], even[:, None].expand(2, 4))


def test_layers_share_and_forced_keys_stay():
    torch.manual_seed(0)
    s = [torch.randn(1, 2, 20), torch.randn(1, 2, 14) + 2, torch.randn(1, 2, 20) - 2]
    s[2][..., -3:] = torch.inf
    real = [torch.tensor([20])] * 3
    places = [(n, 3) for n in range(3)]
    counts = torch.cat(AcrossLayers(Cap(5), 0.2).counts(s, real, places))
    assert int(counts.sum()) == 3 * 2 * 5
    assert (counts[2] >= 3).all() and (counts >= 1).all() and (counts[1] > counts[0]).all()
    chosen = TopK().pick(s[2], counts[2:])
    assert all(set(range(17, 20)) <= set(row.tolist()) for row in chosen[0])


def test_even_budgets():
    s, real, places = torch.randn(2, 2, 12), torch.tensor([12, 5]), [(1, 3)]
    assert Ratio(0.5).counts([s], [real], places)[0].tolist() == [[6, 6], [2, 2]]
    assert Cap(8).counts([s], [real], places)[0].tolist() == [[8, 8], [5, 5]]
    assert PerLayer([Cap(3), Cap(4), Cap(5)]).counts([s], [real], places)[0].tolist() == [[4, 4], [4, 4]]
    assert PerLayer({1: Cap(3)}).keep(10, 0, 3) == 10 and PerLayer({1: Cap(3)}).keep(10, 1, 3) == 3
    pyramid = [Pyramid(Cap(10), beta=5, window_size=1).keep(40, n, 5) for n in range(5)]
    assert pyramid == [18, 14, 10, 6, 2] and sum(pyramid) == 50
    assert Pyramid(Cap(10), beta=1, window_size=1).keep(40, 3, 5) == 10


# ---- which stay


def test_selectors():
    s = torch.tensor([[[0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 1.0]]])
    three = torch.tensor([[3]])
    assert TopK()(s, three).tolist() == [[[2, 6, 9]]]
    assert TopK(kernel_size=3)(s, three).tolist() == [[[1, 2, 3]]]
    assert TopK(kernel_size=3, pooling="avg")(s, three).tolist() == [[[1, 2, 3]]]
    assert TopK(sinks=1, recent=1)(s, three).tolist() == [[[0, 2, 9]]]
    assert TopK(recent=2)(s, torch.tensor([[2]])).tolist() == [[[8, 9]]]
    # Padding neither stays nor counts as first, and its scores reach no neighbour.
    padded = s.clone()
    padded[..., :2] = -torch.inf
    assert TopK(sinks=1)(padded, torch.tensor([[2]])).tolist() == [[[2, 6]]]
    for pooling in ("max", "avg"):
        pooled = TopK(3, pooling).ready(padded)
        torch.testing.assert_close(pooled[..., 2:], TopK(3, pooling).ready(s[..., 2:]))
        assert (pooled[..., :2] == -torch.inf).all()
    must = s.clone()
    must[..., 4] = torch.inf
    assert TopK(kernel_size=3, pooling="avg").ready(must)[0, 0, 3] == 4.5  # mean of what is there: 9 and 0
    assert TopK(kernel_size=3)(must, torch.tensor([[1]])).tolist() == [[[4]]]


# ---- under generate(): decoding equals full attention over what stays


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "family, mode",
    [("llama", {}), ("qwen2", {"num_beams": 2}), ("mistral", {"cache_implementation": "static"})],
    ids=["llama-greedy", "qwen2-beams", "mistral-static"],
)
def test_decoding_equals_full_attention_over_the_kept_keys(models, budget, family, mode):
    model, inputs = models[family], prompt(length=24)
    compression = KVCompression(ObservedAttention(), BUDGETS[budget], TopK(sinks=1, recent=2))
    with attnlib.attach(model, compression) as session:
        mine, ids = scores(model, inputs, new=4, **mode)
    kept = kept_of(session)
    assert len(kept) == 3
    with attnlib.attach(model, ReadOnly(kept, 24)):
        oracle, oracle_ids = scores(model, inputs, new=4, **mode)
    torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, oracle_ids)
    plain, _ = scores(model, inputs, new=4, **mode)
    assert not torch.allclose(mine, plain, atol=1e-3)
    for layer, slots in kept.items():
        for rows, pad in zip(
            slots.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1), (5, 0) * (len(slots) // 2), strict=True
        ):
            assert (rows[rows >= 0] >= pad).all(), layer
            assert all({pad, 22, 23} <= set(row.tolist()) for row in rows)
    if "across" in budget:
        lengths = torch.cat([(slots >= 0).sum(-1) for slots in kept.values()])
        assert lengths.unique().numel() > 1


@pytest.mark.parametrize("scorer", SCORERS)
def test_padded_batch_equals_single_prompts(models, scorer):
    """With every scorer; shares are of the tokens that a sample has, while decoding too."""
    inputs = prompt(length=22, pad=(7, 0))
    model = models[FAMILIES[list(SCORERS).index(scorer) % 3]]
    for budget in (Ratio(0.5), AcrossHeads(Cap(7))):
        compression = KVCompression(SCORERS[scorer](), budget, every=2)
        with attnlib.attach(model, compression) as session:
            together, _ = scores(model, inputs, new=5)
            alone = []
            for row, start in ((0, 7), (1, 0)):
                single = {name: t[row : row + 1, start:] for name, t in inputs.items()}
                alone.append(scores(model, single, new=5)[0])
                assert session.results["kv-compression"]
        torch.testing.assert_close(together, torch.cat(alone, 1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("scorer", ["votes", "low norm", "recency", "observed", "expected"])
@pytest.mark.parametrize("budget", [Cap(9), AcrossHeads(Cap(9)), AcrossLayers(Cap(9))], ids=["cap", "heads", "layers"])
def test_keys_evicted_while_decoding_are_gone_and_the_rest_is_exact(llama, scorer, budget):
    """Each step beside a second model that keeps everything and reads only the slots that the first one holds."""
    inputs = prompt(length=16, pad=(0, 0))
    other = copy.deepcopy(llama)
    held = {}

    class Follow(Intervention):
        kinds = ("self",)

        def around_attention(self, site, q, k, v, call):
            if site.offset == 0:
                return call(q, k, v)
            return call(q, k, v, mask=only(held[site.layer], site, site.offset))

    cache = transformers.DynamicCache(config=llama.config)
    whole = transformers.DynamicCache(config=llama.config)
    torch.manual_seed(3)
    more = torch.randint(3, 60, (2, 7))
    compression = KVCompression(SCORERS[scorer](), budget, every=2, prefill=False)
    with torch.no_grad(), attnlib.attach(llama, compression), attnlib.attach(other, Follow()):
        llama(**inputs, past_key_values=cache)
        other(**inputs, past_key_values=whole)
        assert [layer.keys.shape[2] for layer in cache.layers] == [16] * 3
        for t in range(more.shape[1]):
            held.update({n: layer.positions for n, layer in enumerate(cache.layers)})
            mine = llama(more[:, t : t + 1], past_key_values=cache).logits
            oracle = other(more[:, t : t + 1], past_key_values=whole).logits
            torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)
            assert [cache.get_seq_length(n) for n in range(3)] == [17 + t] * 3
            total = sum(int((layer.positions >= 0).sum()) for layer in cache.layers)
            # At steps 2, 4, 6 down to the budget, and one token more after each.
            assert total == (17 if t == 0 else 9 + (t + 1) % 2) * 2 * 2 * 3
            for layer in cache.layers:
                assert (layer.positions[..., -1] == 16 + t).all() or scorer in ("low norm", "observed", "expected")


def test_fixed_capacity_at_every_step(llama):
    """Streaming at capacity 8: two sinks and the six most recent tokens, whatever the length."""
    inputs = prompt(length=12, pad=(3, 0))
    cache = transformers.DynamicCache(config=llama.config)
    mask = inputs["attention_mask"]
    with torch.no_grad(), attnlib.attach(llama, KVCompression(Recency(2), Cap(8), every=1)):
        llama(**inputs, past_key_values=cache)
        for t in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            llama(torch.randint(3, 60, (2, 1)), attention_mask=mask, past_key_values=cache)
            for layer in cache.layers:
                recent = list(range(7 + t, 13 + t))
                assert layer.positions[0, 0].tolist() == [3, 4, *recent]
                assert layer.positions[1, 1].tolist() == [0, 1, *recent]


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
def test_remembered_queries_follow_their_beam(llama, mode):
    """What generate() scored equals the chosen sequence decoded alone, although beams were exchanged on the way."""
    inputs = prompt(length=18, pad=(4, 0))

    def compression():
        return SnapKV(cap=9, window_size=4, kernel_size=3, every=2)

    torch.manual_seed(0)
    with attnlib.attach(llama, compression()):
        out = llama.generate(
            **inputs, max_new_tokens=7, min_new_tokens=7, return_dict_in_generate=True, output_scores=True, **mode
        )
    for row, start in ((0, 4), (1, 0)):
        cache = transformers.DynamicCache(config=llama.config)
        with torch.no_grad(), attnlib.attach(llama, compression()):
            logits = [llama(inputs["input_ids"][row : row + 1, start:], past_key_values=cache).logits[:, -1]]
            for token in out.sequences[row, 18:-1]:
                logits.append(llama(token.view(1, 1), past_key_values=cache).logits[:, -1])
        alone = torch.cat(logits).log_softmax(-1)
        if "do_sample" in mode:
            for mine, score in zip(alone, out.scores, strict=True):
                there = score[row].isfinite()  # the 50 best
                ours, theirs = (t[there].log_softmax(-1) for t in (mine, score[row]))
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        else:
            got = llama.compute_transition_scores(out.sequences, out.scores, out.beam_indices)[row]
            chosen = alone.gather(-1, out.sequences[row, 18:].unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(got, chosen, atol=1e-5, rtol=1e-5)


def test_beams_are_exchanged_in_that_test(llama):
    inputs = prompt(length=18, pad=(4, 0))
    with attnlib.attach(llama, SnapKV(cap=9, window_size=4, kernel_size=3, every=2)):
        out = llama.generate(**inputs, max_new_tokens=7, min_new_tokens=7, num_beams=3, return_dict_in_generate=True,
                             output_scores=True)  # fmt: skip
    steps = out.beam_indices[:, :7]
    assert any(row.unique().numel() > 1 for row in steps)


def test_crop_takes_remembered_queries_back(llama):
    inputs = prompt(length=16, pad=(0, 0))
    more = torch.randint(3, 60, (2, 4), generator=torch.Generator().manual_seed(0))

    def steps(cache, tokens):
        return [llama(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(tokens.shape[1])]

    with torch.no_grad(), attnlib.attach(llama, SnapKV(cap=8, window_size=3, kernel_size=3, every=4)):
        straight, detour = (transformers.DynamicCache(config=llama.config) for _ in range(2))
        for cache in (straight, detour):
            llama(**inputs, past_key_values=cache)
            steps(cache, more[:, :1])
        steps(detour, more[:, 2:])
        detour.crop(-2)
        a, b = (steps(cache, more[:, 1:]) for cache in (straight, detour))
        assert torch.equal(torch.cat(a), torch.cat(b))
        assert [layer.keys.shape[2] for layer in straight.layers] == [8] * 3
        for one, two in zip(straight.layers, detour.layers, strict=True):
            assert torch.equal(one.positions, two.positions)


def test_llava(models):
    model = llava()
    inputs = llava_inputs(model)
    n = inputs["input_ids"].shape[1]
    with attnlib.attach(model, KVCompression(expected() * ValueNorm(), AcrossLayers(Cap(6)))) as session:
        mine, _ = scores(model, inputs, new=4)
    kept = kept_of(session)
    assert sum(int((slots >= 0).sum()) for slots in kept.values()) == 2 * 2 * 3 * 6
    with attnlib.attach(model, ReadOnly(kept, n)):
        oracle, _ = scores(model, inputs, new=4)
    torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)


# ---- identity


@pytest.mark.parametrize(
    "same",
    [
        KVCompression(KeyNorm(), Ratio(0.0)),
        KVCompression(KeyNorm(), AcrossLayers(Ratio(0.0))),
        KVCompression(KeyNorm(), Pyramid(Ratio(0.0))),
        KVCompression(KeyNorm(), PerLayer([Ratio(0.0)] * 3)),
        KVCompression(KeyNorm(), Cap(64)),
        KVCompression(SnapKVVotes(4, 3), Cap(64), every=1),
        KVCompression(ObservedAttention(), AcrossHeads(Cap(64)), every=2),
        KVCompression(ObservedAttention(), AcrossLayers(Cap(64)), every=2),
    ],
    ids=lambda same: f"{type(same.budget).__name__}-{same.every}",
)
def test_budgets_that_keep_everything_change_no_bit(llama, same):
    inputs = prompt(length=18, pad=(0, 0))
    plain, _ = scores(llama, inputs)
    with attnlib.attach(llama, same) as session:
        assert torch.equal(scores(llama, inputs)[0], plain)
        assert session.results["kv-compression"] == {}


# ---- together with others


def test_composes_with_edits_and_records(llama):
    """Keys edited before they are cached are what is scored and kept; records know the slots of uneven heads."""

    class Louder(Intervention):
        name = "louder"

        def on_qkv(self, site, q, k, v):
            return q, k * torch.linspace(0.5, 2.0, k.shape[1])[:, None, None], v

    inputs = prompt(length=20, pad=(0, 0))
    compression = KVCompression(KeyNorm("high"), AcrossHeads(Ratio(0.5), 0.1))
    with attnlib.attach(llama, Louder(), compression, Record(layers=[1])) as session:
        mine, _ = scores(llama, inputs, new=3)
        entry = session.results["record"][1]
    kept = kept_of(session)
    lengths = (kept[1] >= 0).sum(-1)
    assert (lengths[:, 1] > lengths[:, 0]).all()
    assert torch.equal(entry["keys"][1][..., : kept[1].shape[2]], kept[1].repeat_interleave(2, 1))
    nothing = entry["keys"][1] < 0
    assert nothing.any() and (entry["weights"][1].squeeze(2)[nothing] == 0).all()
    with attnlib.attach(llama, Louder(), ReadOnly(kept, 20)):
        oracle, _ = scores(llama, inputs, new=3)
    torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)


def test_token_types_of_uneven_heads(llama):
    seen = []

    class Look(Intervention):
        needs_types = True

        def on_kv_read(self, site, k, v):
            seen.append((site.key_types(), site.per_key(torch.arange(1, 30).expand(2, -1)), site.k_pos))
            return k, v

    types = torch.ones(2, 20, dtype=torch.long)
    types[:, 4:8] = 2
    compression = KVCompression(ObservedAttention(), AcrossHeads(Ratio(0.7), 0.1), layers=[1])
    with attnlib.attach(llama, compression, Look(), token_types=types):
        scores(llama, prompt(length=20, pad=(0, 0)), new=2)
    kinds, slots, k_pos = next(s for s in seen if s[2].dim() == 3)
    k_pos = k_pos.repeat_interleave(2, 1)
    assert (k_pos < 0).any() and (kinds[k_pos < 0] == 0).all()
    assert (kinds[(k_pos >= 4) & (k_pos < 8)] == 2).all()
    assert torch.equal(slots, k_pos + 1)


class Drop(Intervention):
    """Remove some tokens at the input of a block; a different number in each sample."""

    def __init__(self, layer=1):
        self.at = layer

    def wants(self, site):
        return site.layer == self.at

    def on_tokens(self, site, hidden):
        index = torch.tensor([[-1, -1, 6, 7, *range(9, 20)], [0, 2, 5, 7, *range(9, 20)]])
        return hidden.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), index


@pytest.mark.parametrize("scorer", ["votes", "observed", "expected", "recency"])
def test_composes_with_removed_tokens(llama, scorer):
    """What is left of a shorter layer is read at its true slots."""
    inputs = prompt(length=20, pad=(5, 0))
    with attnlib.attach(llama, Drop(), KVCompression(SCORERS[scorer](), AcrossHeads(Ratio(0.5)))) as session:
        mine, _ = scores(llama, inputs, new=4)
    kept = kept_of(session)
    for layer in (1, 2):
        assert not torch.isin(kept[layer], torch.tensor([1, 3, 4, 8])).any()
        assert (kept[layer] >= 0).sum((1, 2)).tolist() == [2 * 6, 2 * 7]  # of 13 and 15 tokens
    with attnlib.attach(llama, Drop(), ReadOnly(kept, 20)):
        oracle, _ = scores(llama, inputs, new=4)
    torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)


def test_removed_tokens_then_evicted_again(llama):
    inputs = prompt(length=20, pad=(5, 0))
    cache = transformers.DynamicCache(config=llama.config)
    mask = inputs["attention_mask"]
    with torch.no_grad(), attnlib.attach(llama, Drop(), KVCompression(Recency(2), Cap(6), every=1)):
        llama(**inputs, past_key_values=cache)
        for t in range(3):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            llama(torch.randint(3, 60, (2, 1)), attention_mask=mask, past_key_values=cache)
            recent = list(range(17 + t, 21 + t))
            assert cache.layers[0].positions[:, 0].tolist() == [[5, 6, *recent], [0, 1, *recent]]
            assert cache.layers[2].positions[:, 0].tolist() == [[6, 7, *recent], [0, 2, *recent]]


@pytest.mark.parametrize("every", [None, 1, 2])
def test_composes_with_a_module_that_runs_twice(llama, every):
    class Twice(Intervention):
        """The mean of two runs of the module on the same input, which is that of one."""

        def around_sublayer(self, site, hidden, call):
            return (call(hidden) + call(hidden)) / 2

    inputs = prompt(length=18)

    def compression():
        return KVCompression(SnapKVVotes(3, 3), AcrossHeads(Cap(7)), every=every)

    with attnlib.attach(llama, compression()) as session:
        once, _ = scores(llama, inputs)
        kept = kept_of(session)
    with attnlib.attach(llama, Twice(), compression()) as session:
        twice, _ = scores(llama, inputs)
        for layer, slots in kept_of(session).items():
            assert torch.equal(slots, kept[layer])
    torch.testing.assert_close(twice, once, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_eager_and_fused_attention_decode_alike(llama, mode):
    """Masks are added by one kernel and boolean in the other; heads and samples are uneven in both."""
    inputs, out = prompt(length=18), []
    for implementation in ("sdpa", "eager"):
        model = copy.deepcopy(llama)
        model.set_attn_implementation(implementation)
        with attnlib.attach(
            model, KVCompression(ObservedAttention(), AcrossHeads(Ratio(0.6), 0.1), every=3)
        ) as session:
            out.append(scores(model, inputs, new=7, **mode)[0])
            assert any((slots < 0).any() for slots in kept_of(session).values())
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)


def test_two_compressions_on_different_layers(llama):
    a, b = KVCompression(KeyNorm(), Cap(6), layers=[0]), SnapKV(cap=8, window_size=4, layers=[1, 2])
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad(), attnlib.attach(llama, a, b):
        llama(**prompt(length=20, pad=(0, 0)), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [6, 8, 8]
    with pytest.raises(ValueError, match="both evict"):
        attnlib.attach(llama, KVCompression(KeyNorm(), Cap(6)), SnapKV(cap=100))


def test_a_cache_filled_before_the_session(llama):
    """A prompt read outside is compressed at the first step inside."""
    inputs = prompt(length=16, pad=(3, 0))
    cache = transformers.DynamicCache(config=llama.config)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        llama(**inputs, past_key_values=cache)
        with attnlib.attach(llama, KVCompression(KeyNorm(), Ratio(0.5), every=4)) as session:
            llama(torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=cache)
        kept = kept_of(session)[0]
    assert (kept >= 0).sum(-1).tolist() == [[7, 7], [8, 8]]


# ---- bad input


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: KVCompression(KeyNorm, Cap(4)), TypeError, r"make one: KeyNorm\(...\)"),
        (lambda: KVCompression(KeyNorm(), 0.5), TypeError, "budget must be a Budget, got 0.5"),
        (lambda: KVCompression(KeyNorm(), Cap(4), every=0), ValueError, "every must be at least 1"),
        (lambda: KVCompression(KeyNorm(), Cap(4), prefill=False), ValueError, "nothing would ever be evicted"),
        (lambda: KVCompression(KeyNorm(), Cap(4), "topk"), TypeError, "selector must be a TopK, got 'topk'"),
        (lambda: AcrossHeads(0.5), TypeError, r"budget must be a Budget such as Ratio\(0.5\).*got 0.5"),
        (lambda: PerLayer(Cap(4)), TypeError, r"budgets must be a sequence.*got Cap\(cap=4\)"),
        (lambda: SnapKVVotes(window_size=4.0), TypeError, "window_size must be an integer, got 4.0"),
        (lambda: Ratio(1.0), ValueError, r"ratio must lie in \[0, 1\)"),
        (lambda: Cap(0), ValueError, "at least 1"),
        (lambda: Pyramid(Cap(4), beta=0.5), ValueError, "beta must be at least 1"),
        (lambda: Pyramid(AcrossHeads(Cap(4))), TypeError, "takes Ratio or Cap"),
        (lambda: PerLayer([]), ValueError, "at least one layer"),
        (lambda: PerLayer([AcrossHeads(Cap(4))]), ValueError, "put it around"),
        (lambda: AcrossHeads(AcrossLayers(Cap(4))), ValueError, "scope"),
        (lambda: AcrossHeads(Cap(4), 1.5), ValueError, r"minimum must lie in \[0, 1\]"),
        (lambda: TopK(kernel_size=2), ValueError, "kernel_size must be odd"),
        (lambda: TopK(pooling="sum"), ValueError, "pooling='sum'"),
        (lambda: TopK(sinks=-1), ValueError, "sinks must not be negative"),
        (lambda: KeyNorm("middle"), ValueError, "keep='middle'"),
        (lambda: Recency(-1), ValueError, "sinks must not be negative"),
        (lambda: ExpectedAttention(future=0), ValueError, "future must be at least 1"),
        (lambda: ObservedAttention(0), ValueError, "queries must be at least 1"),
        (lambda: SnapKVVotes(kernel_size=4), ValueError, "kernel_size must be odd"),
    ],
)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_refusals(llama):
    inputs = prompt(length=16)
    with pytest.raises(ValueError, match="names 2 layers, but 3 are compressed"):
        attnlib.attach(llama, KVCompression(KeyNorm(), PerLayer([Cap(4), Cap(5)])))
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        attnlib.attach(llama, KVCompression(KeyNorm(), Cap(4), layers=[7]))
    with attnlib.attach(llama, KVCompression(KeyNorm(), Cap(4))), pytest.raises(ValueError, match="use_cache=True"):
        llama(**inputs, use_cache=False)
    right = {name: t.flip(1) for name, t in inputs.items()}
    with attnlib.attach(llama, KVCompression(KeyNorm(), Cap(4))), pytest.raises(ValueError, match="padding_side"):
        llama(**right)
    with (
        attnlib.attach(llama, KVCompression(ExpectedAttention(sinks=16), Cap(4))),
        pytest.raises(ValueError, match="sinks=16 must be fewer"),
    ):
        llama(**inputs)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(ValueError, match="no rotary positions that can be reached"):
        attnlib.attach(gpt, KVCompression(ExpectedAttention(), Cap(4)))
    repeating = prompt(batch=1, pad=(0,))
    repeating["input_ids"][0, 17:] = repeating["input_ids"][0, 7:10]
    often = KVCompression(KeyNorm(), Cap(9), every=1)
    with attnlib.attach(llama, often), pytest.raises(ValueError, match="drafts"):
        llama.generate(**repeating, max_new_tokens=4, prompt_lookup_num_tokens=3)
    once = KVCompression(KeyNorm(), Cap(4))
    with attnlib.attach(llama, once), pytest.raises(ValueError, match="attached already"):
        attnlib.attach(language_model("llama"), once)


def test_a_scorer_of_ones_own(llama):
    class Every(Scorer):
        """Even slots before odd ones."""

        def score(self, view):
            return -(view.slots % 2).float().expand(view.k.shape[:3])

    with attnlib.attach(llama, KVCompression(Product((Every(), ValueNorm())), Cap(10))) as session:
        scores(llama, prompt(length=20, pad=(0, 0)), new=2)
    assert all((slots % 2 == 0).all() for slots in kept_of(session).values())
    assert RandomScores(1).seed == 1
