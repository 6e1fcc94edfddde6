"""SnapKV: votes as the authors' and kvpress's, decoding as full attention over the keys that are left."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hooks.models import language_model, prompt, scores

pytest.importorskip("transformers")

from parity import Fixture  # noqa: E402

import attnlib  # noqa: E402
from attnlib.cache import Cap, KVCompression, Ratio, Scorer, SnapKV, SnapKVByHead, snapkv_votes  # noqa: E402
from attnlib.hooks import Intervention, Record  # noqa: E402
from hooks.models import call_site  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "fixtures" / "snapkv.safetensors"
OPTIONS = Fixture("snapkv-options")


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE)


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral"])
def model(request):
    return language_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return language_model("llama")


class ReadOnly(Intervention):
    """The oracle: the cache keeps everything, decoding reads only some slots."""

    name = "read-only"
    kinds = ("self",)

    def __init__(self, kept, length):
        self.kept, self.length = kept, length

    def around_attention(self, site, q, k, v, call):
        if site.phase == "prefill":
            return call(q, k, v)
        kept = self.kept[site.layer]
        stays = torch.zeros(*kept.shape[:2], site.n_keys, dtype=torch.bool)
        stays.scatter_(-1, kept.clamp(min=0), kept >= 0)
        stays[..., self.length :] = True
        stays = stays.repeat_interleave(site.heads // stays.shape[1], 1)[:, :, None]
        return call(q, k, v, mask=stays & site.mask.dense())


def kept_of(session):
    return {layer: entry["kept"] for layer, entry in session.results["snapkv"].items()}


# ---- votes


@pytest.mark.parametrize("case, w, cap, kernel, pooling", [("avg", 4, 10, 5, "avg"), ("max", 3, 9, 3, "max")])
def test_votes_equal_the_authors(recorded, case, w, cap, kernel, pooling):
    q, k, v, votes, k_out, v_out = (recorded[f"{case}.{n}"] for n in ("q", "k", "v", "votes", "k_out", "v_out"))
    mine = snapkv_votes(q, k, w, kernel, pooling)
    torch.testing.assert_close(mine, votes, atol=1e-5, rtol=1e-5)
    kept = mine.topk(cap - w).indices
    for full, theirs in ((k, k_out), (v, v_out)):
        body = full[:, :, :-w].gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, full.shape[-1]))
        assert torch.equal(torch.cat([body, full[:, :, -w:]], 2), theirs)


def test_authors_rounding_of_votes(recorded):
    q, k, votes = (recorded[f"bf16.{n}"] for n in ("q", "k", "votes"))
    assert torch.equal(snapkv_votes(q, k, 4, 5, compat="authors"), votes)
    plain = snapkv_votes(q, k, 4, 5)
    assert plain.dtype == torch.float32 and not torch.equal(plain, votes.float())
    torch.testing.assert_close(plain, votes.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("case", OPTIONS.config)
def test_keys_kept_equal_the_authors(case):
    """Even kernels, a window of one, one head; grouped queries, of which each head keeps its own keys."""
    t = OPTIONS.under(case)
    q, k, v = (t[n] for n in "qkv")
    snap = SnapKVByHead(**OPTIONS.config[case], compat="authors")
    memory: dict[str, torch.Tensor] = {}
    site = call_site(q, k).but(memory=memory)
    held = snap.on_cache(site, q, k, v)
    kept = snap.results()[2]["kept"]
    groups = q.shape[1] // k.shape[1]
    for full, theirs in ((k, t["k_out"]), (v, t["v_out"])):
        mine = full.repeat_interleave(groups, 1).gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, 4))
        # Theirs stand in order of votes; rows of a head are told apart by their sums.
        order = [x.double().sum(-1).argsort(-1).unsqueeze(-1).expand_as(x) for x in (mine, theirs)]
        assert torch.equal(mine.gather(2, order[0]), theirs.gather(2, order[1]))
    if groups > 1:
        union = [set(kept[b, h].tolist()) for b in range(len(q)) for h in range(q.shape[1])]
        for b in range(len(q)):
            for g in range(k.shape[1]):
                start = b * q.shape[1] + g * groups
                want = sorted(set().union(*union[start : start + groups]))
                assert [i for i in held[b, g].tolist() if i >= 0] == want
        table = memory["read by head"].view(len(q), q.shape[1], -1)
        assert torch.equal(table.sum(-1), torch.full(table.shape[:2], kept.shape[2]))
    else:
        assert torch.equal(held, kept)


def test_votes_with_grouped_queries_equal_kvpress(recorded):
    q, k, score, kept = (recorded[f"kvpress.{n}"] for n in ("q", "k", "score", "kept"))
    mine = snapkv_votes(q, k, 4, 5, reduce="mean")
    torch.testing.assert_close(mine, score[..., :-4], atol=1e-5, rtol=1e-5)
    full = torch.cat([mine, torch.full_like(mine[..., :4], torch.inf)], -1)
    assert torch.equal(full.topk(Ratio(0.5).keep(18)).indices.sort(-1).values, kept)


def test_padding_on_the_left_changes_no_vote():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 20, 8) * 2, torch.randn(1, 2, 20, 8) * 2
    valid = torch.arange(20)[None] >= 6
    for pooling in ("avg", "max"):
        padded = snapkv_votes(q, k, 4, 5, pooling, valid=valid)
        single = snapkv_votes(q[:, :, 6:], k[:, :, 6:], 4, 5, pooling)
        torch.testing.assert_close(padded[..., 6:], single, atol=1e-6, rtol=1e-5)
        assert (padded[..., :6] == -torch.inf).all()


def test_needle_and_its_neighbours_stay():
    q, k = torch.zeros(1, 2, 40, 4), torch.zeros(1, 2, 40, 4)
    k[:, :, 17, 0], q[:, :, -4:, 0] = 12.0, 2.0
    with_pool = snapkv_votes(q, k, 4, 5).topk(5).indices.sort(-1).values
    assert torch.equal(with_pool, torch.arange(15, 20).expand(1, 2, 5))
    without = snapkv_votes(q, k, 4, 1)
    rest = torch.cat([without[..., :17], without[..., 18:]], -1)
    assert (without.argmax(-1) == 17).all() and torch.allclose(rest, rest[..., :1])


# ---- under generate()


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_decoding_equals_full_attention_over_the_kept_keys(model, mode):
    inputs = prompt(length=28)
    with attnlib.attach(model, SnapKV(ratio=0.5, window_size=4, kernel_size=3)) as session:
        mine, ids = scores(model, inputs, **mode)
    kept = kept_of(session)
    assert all(k.shape[2] == 14 for k in kept.values())
    with attnlib.attach(model, ReadOnly(kept, 28)):
        oracle, oracle_ids = scores(model, inputs, **mode)
    plain, _ = scores(model, inputs, **mode)
    torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, oracle_ids) and not torch.allclose(mine, plain, atol=1e-3)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("settings", [dict(ratio=0.5), dict(cap=9, compat="authors")], ids=str)
def test_query_heads_that_share_keys_read_their_own(model, mode, settings):
    inputs = prompt(length=28)
    snap = SnapKVByHead(**settings, window_size=4, kernel_size=3)
    with attnlib.attach(model, snap) as session:
        mine, ids = scores(model, inputs, **mode)
    kept = {layer: entry["kept"] for layer, entry in session.results["snapkv-by-head"].items()}
    assert all(k.shape[1:] == (4, 14 if "ratio" in settings else 9) for k in kept.values())
    assert any(not torch.equal(k[:, 0], k[:, 1]) for k in kept.values())
    with attnlib.attach(model, ReadOnly(kept, 28)):
        oracle, oracle_ids = scores(model, inputs, **mode)
    torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, oracle_ids)
    with attnlib.attach(model, SnapKV(**{**settings, "compat": None}, window_size=4, kernel_size=3)):
        assert not torch.allclose(scores(model, inputs, **mode)[0], mine, atol=1e-4)


def test_keys_by_head_are_cropped_and_repeated_with_their_layer(llama):
    from transformers import DynamicCache

    inputs = prompt(length=28)
    cache = DynamicCache(config=llama.config)
    more = torch.randint(3, 60, (2, 3))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    with torch.no_grad(), attnlib.attach(llama, SnapKVByHead(cap=9, window_size=4, kernel_size=3)):
        llama(**inputs, past_key_values=cache)
        steps = [llama(more[:, i : i + 1], attention_mask=mask[:, : 29 + i], past_key_values=cache) for i in range(3)]
        cache.crop(-3)
        at_once = llama(more, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), at_once, atol=1e-5, rtol=1e-5)
        cache.crop(-3)
        cache.batch_repeat_interleave(2)
        wide = llama(more.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0), past_key_values=cache)
        torch.testing.assert_close(wide.logits[::2], at_once, atol=1e-5, rtol=1e-5)


def test_batch_with_padding_equals_single_prompts(llama):
    inputs = prompt(length=28, pad=(9, 0))
    with attnlib.attach(llama, SnapKV(cap=10, window_size=4, kernel_size=3)):
        together, _ = scores(llama, inputs)
        alone = []
        for row, start in ((0, 9), (1, 0)):
            single = {name: t[row : row + 1, start:] for name, t in inputs.items()}
            alone.append(scores(llama, single)[0])
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_short_prompts_and_full_caps_are_identical(llama):
    inputs = prompt(length=20)
    plain, _ = scores(llama, inputs)
    for same in (SnapKV(cap=21, window_size=4), SnapKV(cap=20, window_size=4), SnapKV(ratio=0.0)):
        with attnlib.attach(llama, same) as session:
            assert torch.equal(scores(llama, inputs)[0], plain)
            assert session.results["snapkv"] == {}
    assert not SnapKV(ratio=0.5).identity and SnapKV(ratio=0.0).identity


def test_cache_lengths_windows_and_positions(llama):
    from transformers import DynamicCache

    inputs = prompt(length=28)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), attnlib.attach(llama, SnapKV(cap=9, window_size=4, kernel_size=3, layers=[0, 2])) as session:
        llama(**inputs, past_key_values=cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [9, 28, 9]
        assert [cache.get_seq_length(i) for i in range(3)] == [28, 28, 28]
        assert cache.layers[0].positions.shape == (2, 2, 9)
        for kept in kept_of(session).values():
            assert torch.equal(kept[..., -4:], torch.arange(24, 28).expand(2, 2, 4))
            assert (kept.diff(dim=-1) > 0).all()
        # A longer continuation: causal among the new tokens, everything that is left before them.
        more = torch.randint(3, 60, (2, 3))
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
        # Token by token first, then taken back and given at once.
        steps = [llama(more[:, i : i + 1], attention_mask=mask[:, : 29 + i], past_key_values=cache) for i in range(3)]
        cache.crop(-3)
        assert [layer.keys.shape[2] for layer in cache.layers] == [9, 28, 9]
        at_once = llama(more, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), at_once, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="only 3 came after"):
            cache.crop(-4)
        cache.batch_repeat_interleave(2)
        assert cache.layers[0].positions.shape == (4, 2, 12)
        cache.batch_select_indices(torch.tensor([0, 2]))
        assert cache.layers[0].positions.shape == (2, 2, 12)
    with pytest.raises(RuntimeError, match="session that is over"):
        llama(more[:, :1], past_key_values=cache)


def test_heads_choose_independently_and_groups_together(llama):
    with attnlib.attach(llama, SnapKV(cap=9, window_size=4, kernel_size=1)) as session:
        llama(**prompt(length=40, pad=(0, 0)))
    kept = kept_of(session)
    # One choice per key head, hence the same for all query heads of its group, different between key heads.
    assert all(k.shape == (2, 2, 9) for k in kept.values())
    assert any(not torch.equal(k[:, 0], k[:, 1]) for k in kept.values())


def test_records_of_a_compressed_cache_know_the_slots(llama):
    inputs = prompt(length=28, pad=(0, 0))
    with attnlib.attach(llama, SnapKV(cap=9, window_size=4, kernel_size=3), Record(layers=[1])) as session:
        scores(llama, inputs, new=3)
    entry, kept = session.results["record"][1], kept_of(session)[1]
    assert [w.shape[-1] for w in entry["weights"]] == [28, 10, 11]
    assert torch.equal(entry["keys"][1][..., :9], kept.repeat_interleave(2, 1))
    assert (entry["keys"][2][..., 9:] == torch.tensor([28, 29])).all()


def test_another_scorer_is_one_small_class(llama):
    class Norm(Scorer):
        """Keep keys of small norm."""

        def score(self, view):
            return -view.k.norm(dim=-1)

    with attnlib.attach(llama, KVCompression(Norm(), Cap(7))) as session:
        scores(llama, prompt(pad=(0, 0)), new=3)
    assert all(e["kept"].shape == (2, 2, 7) for e in session.results["kv-compression"].values())


# ---- bad input


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio must lie in \[0, 1\)"),
        ({}, "either ratio or cap"),
        ({"ratio": 0.5, "cap": 100}, "either ratio or cap"),
        ({"cap": 64}, "larger than window_size=64"),
        ({"cap": 0}, "at least 1"),
        ({"ratio": 0.5, "kernel_size": 4}, "kernel_size must be odd"),
        ({"ratio": 0.5, "window_size": 0}, "window_size must be at least 1"),
        ({"ratio": 0.5, "pooling": "sum"}, "pooling='sum'"),
        ({"ratio": 0.5, "compat": "kvpress"}, "compat='kvpress'"),
    ],
)
def test_bad_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SnapKV(**kwargs)


def test_refusals(llama):
    inputs = prompt(length=28)
    snap = SnapKV(ratio=0.5, window_size=4)
    with attnlib.attach(llama, snap), pytest.raises(ValueError, match="use_cache=True"):
        llama(**inputs, use_cache=False)
    right = {"input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}
    with attnlib.attach(llama, snap), pytest.raises(ValueError, match="padding_side='left'"):
        llama(**right)
    with pytest.raises(ValueError, match="both evict"):
        attnlib.attach(llama, snap, SnapKV(ratio=0.2, layers=[1]))
    with pytest.raises(ValueError, match="compat='authors'"):
        attnlib.attach(llama, SnapKV(ratio=0.5, compat="authors"))
    with pytest.raises(ValueError, match="must be smaller than the prompt"):
        snapkv_votes(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), window_size=4)
    sliding = language_model("mistral", sliding_window=6)
    with attnlib.attach(sliding, snap), pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        sliding(**inputs)


@pytest.mark.parametrize("layers", [[0], [1], [0, 2]])
def test_static_layers_beside_compressed_ones_hide_unwritten_slots(layers):
    model, inputs = language_model("llama"), prompt(pad=(0, 0))
    with attnlib.attach(model, SnapKV(ratio=0.5, window_size=4, layers=layers)):
        dynamic, _ = scores(model, inputs)
        static, _ = scores(model, inputs, cache_implementation="static")
    torch.testing.assert_close(static, dynamic, atol=1e-6, rtol=1e-5)
