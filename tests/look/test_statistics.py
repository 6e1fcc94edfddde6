"""Streamed statistics equal those of dense maps, whatever the blocks, calls and masks."""

import math

import pytest
import torch
from hooks.models import call_site, dense_attention, language_model, prompt, run, scores

import attnlib
from attnlib.grids import Layout
from attnlib.hooks import IMAGE, PAD, TEXT, Record, TokenTypes
from attnlib.hooks import call as hooks_core
from attnlib.look import Statistics, effective_rank, image_map
from attnlib.look.statistics import WHAT

T = torch.tensor([[TEXT, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, TEXT, TEXT]])


def tensors(seed=0, n=9, dim=8):
    torch.manual_seed(seed)
    return 3 * torch.randn(2, 4, n, dim), 3 * torch.randn(2, 2, n, dim), torch.randn(2, 2, n, dim)


def oracle(weights, types, grid=None, epsilon=0.3):
    """Plain loops over a causal map (B, H, N, N), in float64; rows of padding are left out."""
    w = weights.double()
    b, h, n, _ = w.shape
    out = {name: torch.zeros(h) for name in ("entropy", "entropy_share", "distance", "grid_distance", "sink_score")}
    mass, count = torch.zeros(h, 6, 6), torch.zeros(h, 6)
    rank = torch.zeros(h)
    over = 0.0
    for head in range(h):
        rows, choices, on_grid = [], [], []
        for s in range(b):
            image = [j for j in range(n) if types[s, j] == IMAGE]
            start = int((types[s] != PAD).long().argmax())
            live = [i for i in range(n) if types[s, i] != PAD]
            for i in live:
                a = w[s, head, i]
                entropy = -sum(float(x) * math.log(float(x)) for x in a if x > 0)
                rows.append((entropy, sum(float(a[j]) * abs(i - j) for j in range(n))))
                if i > start:
                    choices.append(entropy / math.log(i - start + 1))
                for j in range(n):
                    mass[head, types[s, i], types[s, j]] += float(a[j])
                count[head, types[s, i]] += 1
                if grid and i in image:
                    place = {j: divmod(image.index(j), grid[1]) for j in image}
                    on = sum(float(a[j]) for j in image)
                    on_grid.append(sum(float(a[j]) * math.dist(place[i], place[j]) for j in image) / on)
            alpha = float(w[s, head, live, start].mean())
            out["sink_score"][head] += alpha / b
            over += (alpha > epsilon) / (b * h)
            sigma = torch.linalg.svdvals(w[s, head][live])
            p = sigma / sigma.sum()
            rank[head] += float(torch.exp(-(p[p > 0] * p[p > 0].log()).sum())) / b
        out["entropy"][head] = sum(r[0] for r in rows) / len(rows)
        out["distance"][head] = sum(r[1] for r in rows) / len(rows)
        out["entropy_share"][head] = sum(choices) / len(choices)
        out["grid_distance"][head] = sum(on_grid) / len(on_grid) if on_grid else math.nan
    return {**out, "mass": mass / count.unsqueeze(-1), "rank": rank, "sink_rate": torch.tensor(over)}


def compare(entry, expected):
    for name, value in expected.items():
        torch.testing.assert_close(entry[name], value.float(), atol=2e-5, rtol=2e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("elements", [1 << 22, 60])
def test_every_statistic_equals_loops_over_the_map(elements, monkeypatch):
    monkeypatch.setattr(hooks_core, "BLOCK_ELEMENTS", elements)
    q, k, v = tensors()
    types = torch.cat([T, T])
    site = call_site(q, k, types=types)
    look = Statistics(what=WHAT, grid=(2, 3))
    look.wants(site)
    plain, weights = dense_attention(q, k, v, site.mask.allowed)
    assert torch.equal(run(look, site, q, k, v), plain)
    compare(look.results()[2], oracle(weights, types, (2, 3)))
    assert look.results()[2]["rows"].tolist() == [18] * 4


def test_padding_and_chosen_heads():
    q, k, v = tensors(1)
    types = torch.cat([T, torch.tensor([[PAD, PAD, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT]])])
    allowed = torch.ones(9, 9, dtype=torch.bool).tril() & (types != PAD)[:, None, None]
    # As transformers does: padding queries may read something, so that no row is empty; they must not count.
    allowed = allowed | (types == PAD)[:, None, :, None]
    site = call_site(q, k, types=types, allowed=allowed)
    look = Statistics(what=("entropy", "distance", "mass", "sink", "rank"), heads=[1, 3])
    look.wants(site)
    run(look, site, q, k, v)
    expected = oracle(dense_attention(q, k, v, allowed)[1], types)
    del expected["grid_distance"]
    weights = dense_attention(q, k, v, allowed)[1][:, [1, 3]]
    rate = oracle(weights, types)["sink_rate"]
    compare(look.results()[2], {n: e[[1, 3]] if e.dim() else rate for n, e in expected.items()})


def test_known_maps():
    n = 12
    q = torch.zeros(1, 1, n, 4)
    site = call_site(q, q)
    look = Statistics(what=("entropy", "distance", "sink", "rank"))
    look.wants(site)
    run(look, site, q, q, q)  # uniform over what is visible
    entry = look.results()[2]
    torch.testing.assert_close(entry["entropy_share"], torch.ones(1))
    torch.testing.assert_close(entry["distance"], torch.tensor([sum(i / 2 for i in range(n)) / n]))
    torch.testing.assert_close(entry["sink_score"], torch.tensor([sum(1 / i for i in range(1, n + 1)) / n]))
    one = torch.zeros(1, 1, n, n)
    one[..., 0] = 1.0
    for weights, rank, distance in ((torch.eye(n)[None, None], n, 0.0), (one, 1, (n - 1) / 2)):
        look = Statistics(what=("distance", "rank"))
        look.wants(site)
        rows, _ = look.probe(site)
        for block in rows.split(5):
            look.observe(site, weights[:, :, block], block, None)
        entry = look.results()[2]
        torch.testing.assert_close(entry["rank"], torch.tensor([float(rank)]))
        torch.testing.assert_close(entry["distance"], torch.tensor([distance]))


def test_effective_rank():
    torch.manual_seed(0)
    low = torch.randn(3, 20, 2) @ torch.randn(3, 2, 30)
    assert bool((effective_rank(low) <= 2.001).all()) and bool((effective_rank(low) > 1).all())
    assert effective_rank(torch.zeros(2, 4, 4)).tolist() == [0.0, 0.0]
    torch.testing.assert_close(effective_rank(torch.diag(torch.tensor([1.0, 1.0]))), torch.tensor(2.0))


def test_sketched_rank_is_close_for_maps_of_low_rank():
    torch.manual_seed(0)
    n = 400
    left, right = torch.rand(1, 2, n, 6) ** 4, torch.rand(1, 2, 6, n) ** 8
    weights = left @ right
    weights = weights / weights.sum(-1, keepdim=True)
    site = call_site(torch.zeros(1, 2, n, 4), torch.zeros(1, 2, n, 4), causal=False)
    found = {}
    for sketch in (n, 96):
        look = Statistics(what=("rank",), sketch=sketch)
        look.wants(site)
        rows, _ = look.probe(site)
        for block in rows.split(64):
            look.observe(site, weights[:, :, block], block, None)
        found[sketch] = look.results()[2]["rank"]
    torch.testing.assert_close(found[n], effective_rank(weights)[0].float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[96], found[n], atol=0.0, rtol=0.08)


def test_distance_by_layout():
    """Of an encoder that has a class token before its grid, and no token types."""
    q, k, v = tensors(2, n=7)
    site = call_site(q, k, causal=False, phase=None)
    look = Statistics(what=("distance",), grid=Layout.image(2, 3, cls=1))
    look.wants(site)
    run(look, site, q, k, v)
    weights = dense_attention(q, k, v)[1].double()
    place = [None, *((y, x) for y in range(2) for x in range(3))]
    expected = torch.zeros(4)
    for head in range(4):
        rows = []
        for s in range(2):
            for i in range(1, 7):
                a = weights[s, head, i]
                rows.append(sum(float(a[j]) * math.dist(place[i], place[j]) for j in range(1, 7)) / float(a[1:].sum()))
        expected[head] = sum(rows) / len(rows)
    torch.testing.assert_close(look.results()[2]["grid_distance"], expected)


def test_two_images_are_two_grids():
    types = torch.tensor([[IMAGE] * 4 + [TEXT] + [IMAGE] * 4])
    q = torch.zeros(1, 1, 9, 4)
    site = call_site(q, q, types=types)
    look = Statistics(what=("distance",), grid=(2, 2))
    look.wants(site)
    run(look, site, q, q, q)
    once = [0.0, 0.5, (1 + 2**0.5) / 3, (2 + 2**0.5) / 4]
    torch.testing.assert_close(look.results()[2]["grid_distance"], torch.tensor([sum(once) / 4]))


# ---- in a model

pytest.importorskip("transformers")


def test_memory_does_not_grow_with_calls():
    model = language_model()
    look = Statistics(what=("entropy", "distance", "sink", "rank"))

    def held():
        tensors = [t for sums in look._sums.values() for t in (*sums.sums.values(), sums.gram) if t is not None]
        for layer in look._layers.values():
            assert not layer.calls and not layer.entropies
            tensors += [t for t in (layer.received, layer.seen) if t is not None]
        return sum(t.numel() for t in tensors)

    sizes = []
    with attnlib.attach(model, look), torch.no_grad():
        for seed in range(4):
            model(**prompt(seed=seed))
            sizes.append(held())
    assert sizes[1] == sizes[2] == sizes[3]


def test_means_over_prompts_and_decoding_equal_recorded_maps():
    model = language_model()
    look, record = Statistics(what=("entropy", "distance", "sink")), Record(rows="all", what=("weights",))
    before = scores(model, prompt(pad=(0, 0)), new=4)[0]
    with attnlib.attach(model, look, record):
        for seed in range(3):
            out = scores(model, prompt(pad=(0, 0), seed=seed), new=4)[0]
    assert torch.equal(out, scores(model, prompt(pad=(0, 0), seed=2), new=4)[0]) and before.shape == out.shape
    for layer in range(3):
        entropy, distance, alphas = [], [], []
        calls = record.results()[layer]
        for i, (w, rows) in enumerate(zip(calls["weights"], calls["rows"], strict=True)):
            entropy.append(torch.special.entr(w).sum(-1).transpose(0, 1).flatten(1))
            away = (rows[:, None] - torch.arange(w.shape[-1])).abs()
            distance.append((w * away).sum(-1).transpose(0, 1).flatten(1))
            if i % 4 == 0:
                alphas.append(torch.zeros(2, 4))
            alphas[-1] += w[..., 0].sum(-1) / 23
        entry = look.results()[layer]
        torch.testing.assert_close(entry["entropy"], torch.cat(entropy, 1).mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entry["distance"], torch.cat(distance, 1).mean(1), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(entry["sink_score"], torch.cat(alphas).mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entry["sink_rate"], (torch.cat(alphas) > 0.3).float().mean())


def test_vision_tower_and_decoder_of_a_multimodal_model():
    from hooks.llava import IMAGE_ID, llava, llava_inputs

    model, inputs = llava(), llava_inputs(llava())
    tower = Statistics(what=("entropy", "distance", "rank"), grid=Layout.image(2, 2, cls=1))
    with attnlib.attach(model, tower, part="model.vision_tower"), torch.no_grad():
        model(**inputs)
    entry = tower.results()[0]
    assert entry["rows"].tolist() == [10, 10] and bool((entry["grid_distance"] > 0).all())
    maps = Record(rows=[-1], what=("weights",))
    decoder = Statistics(what=("mass",), grid=(2, 2))
    with attnlib.attach(model, decoder, maps, token_types=TokenTypes(image=IMAGE_ID)), torch.no_grad():
        model(**inputs)
    mass = decoder.results()[1]["mass"]
    torch.testing.assert_close(mass[:, [TEXT, IMAGE]].sum(-1), torch.ones(4, 2))
    assert bool(mass[:, PAD].isnan().all())
    types = TokenTypes(image=IMAGE_ID)(inputs["input_ids"])
    found = image_map(maps.results()[1], types, (2, 2))
    weights = maps.results()[1]["weights"][0][:, :, 0, 3:7]
    torch.testing.assert_close(found.flatten(2), weights / weights.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match="6 tokens, but samples have"):
        image_map(maps.results()[1], types, (2, 3))


def test_a_grid_that_does_not_fit_says_so():
    q, k, v = tensors()
    site = call_site(q, k, types=torch.cat([T, T]))
    look = Statistics(what=("distance",), grid=(2, 2))
    look.wants(site)
    with pytest.raises(ValueError, match="has 4 tokens"):
        run(look, site, q, k, v)


def test_token_types_are_asked_for():
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(language_model(), Statistics(what=("mass",)))


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({"what": "rank"}, TypeError, "sequence of names"),
        ({"what": ("maps",)}, ValueError, "what='maps'"),
        ({"what": ()}, ValueError, "empty"),
        ({"what": ("rank",), "rows": "last"}, ValueError, "whole map"),
        ({"rows": "first"}, ValueError, "rows='first'"),
        ({"phase": "training"}, ValueError, "phase='training'"),
        ({"epsilon": 1.0}, ValueError, "epsilon"),
        ({"sketch": 0}, ValueError, "sketch"),
        ({"grid": (0, 3)}, ValueError, "grid"),
        ({"grid": 8}, ValueError, r"\(rows, columns\) or a Layout, got 8"),
        ({"grid": (2.5, 3)}, ValueError, "grid must be two positive numbers"),
    ],
)
def test_bad_settings(kwargs, error, match):
    with pytest.raises(error, match=match):
        Statistics(**kwargs)
