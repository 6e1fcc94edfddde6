import itertools
import warnings

import numpy as np
import pytest
import torch
from parity import Fixture

import attnlib
from attnlib import attention, masks
from attnlib.nn.heads.s2_attention_dkernel import S2Attention, sharded_context
from attnlib.ops.block_sparse import BlockPlan, block_sparse_attention

SLUG = "s2-attention-dkernel"


def authors_blocks(heads, blocks, local, stride, kv_heads=None, step=None, offset=0, dense=0):
    """Block mask (heads, blocks, blocks) of the authors' causal pattern, a pair at a time."""
    kv_heads = kv_heads or heads
    step = max(1, int(stride / heads)) if step is None else step
    out = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for h, i, j in itertools.product(range(heads), range(blocks), range(blocks)):
        g = h // (heads // kv_heads)
        vertical = g >= kv_heads - dense or (j + g * step + offset) % stride == 0
        out[h, i, j] = i >= j and (i - j < local or vertical)
    return out


PATTERNS = [
    dict(heads=8, local=1, stride=8),
    dict(heads=8, local=2, stride=4),
    dict(heads=4, local=1, stride=8),
    dict(heads=8, local=1, stride=4, kv_heads=4),
    dict(heads=4, local=2, stride=3, offset=1),
    dict(heads=4, local=1, stride=4, dense=1),
    dict(heads=4, local=3, stride=4, step=0),
]


def build(dim=16, block_size=3, *, heads, local, stride, kv_heads=None, dense=0, **settings):
    return attnlib.create(
        SLUG, dim=dim, num_heads=heads, num_kv_heads=kv_heads, block_size=block_size, local_blocks=local,
        stride=stride, dense_heads=dense, coverage="ignore", **settings,
    ).double()  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pattern_is_the_authors(pattern):
    m, n = build(**pattern), 20  # the last block is partial
    expected = torch.kron(authors_blocks(blocks=7, **pattern), torch.ones(3, 3, dtype=torch.bool))
    expected = expected[:, :n, :n] & torch.ones(n, n, dtype=torch.bool).tril()
    got = m.pattern.dense(n).reshape(-1, n, n).expand(pattern["heads"], n, n)
    assert torch.equal(got, expected)
    for h in range(pattern["heads"]):
        assert torch.equal(m.pattern.plane(0, h).dense(n), expected[h])
    spec, tensors = m.pattern.lower()
    assert masks.raise_mask(spec, tensors) == m.pattern


@pytest.mark.parametrize("lo, hi", [(0, 2), (2, 5), (5, 8)])
def test_a_range_of_heads_of_a_larger_module(lo, hi):
    """The authors' active_head_range: the same step, stripes that begin where the first of the heads is."""
    whole = authors_blocks(8, 7, 2, 8, dense=2)
    part = build(dim=2 * (hi - lo), heads=hi - lo, local=2, stride=8, dense=max(0, hi - 6), step=1, offset=lo)
    expected = torch.kron(whole, torch.ones(3, 3, dtype=torch.bool))[lo:hi] & torch.ones(21, 21).tril().bool()
    assert torch.equal(part.pattern.dense(21).reshape(-1, 21, 21).expand(hi - lo, 21, 21), expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tile_bounds_are_exact_about_some_and_never_wrong_about_all(pattern):
    m, n = build(**pattern), 18
    lo, hi = torch.tensor([(a, b) for a in range(0, n, 2) for b in range(a, n, 3)]).T
    some, every = m.pattern.tile(lo[:, None], hi[:, None], lo[None], hi[None])
    full = m.pattern.dense(n).reshape(-1, n, n)
    sums = torch.nn.functional.pad(full.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
    q0, q1, k0, k1 = lo[:, None], hi[:, None] + 1, lo[None], hi[None] + 1
    count = sums[:, q1, k1] - sums[:, q0, k1] - sums[:, q1, k0] + sums[:, q0, k0]
    assert torch.equal(some.expand(len(lo), -1), (count > 0).any(0))
    all_ = (count == (q1 - q0) * (k1 - k0)).all(0)
    assert not (every & ~all_).any() and every.any()


def test_blocks_of_a_head_are_ruled_out_by_its_tile_list():
    mask = sharded_context(8, 1, 4, num_heads=4).plane(0, 1)
    start = torch.arange(0, 128, 8)
    some, every = mask.tile(start[:, None], start[:, None] + 7, start[None], start[None] + 7)
    exact = mask.dense(128).reshape(16, 8, 16, 8)
    assert torch.equal(some, exact.any(3).any(1)) and torch.equal(every, exact.all(3).all(1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_masked_attention(pattern):
    m, x = build(rotary=100.0, **pattern), torch.randn(2, 20, 16, dtype=torch.double)
    plain = attnlib.create(
        "softmax-attention", dim=16, num_heads=pattern["heads"], num_kv_heads=pattern.get("kv_heads"), causal=True,
        rotary=100.0,
    ).double()  # fmt: skip
    plain.load_state_dict(m.state_dict())
    expected = plain(x, mask=m.pattern.dense(20))
    torch.testing.assert_close(m(x), expected)
    y, *_, weights, _ = m(x, returns=("weights",))
    torch.testing.assert_close(y, expected)
    assert not weights.masked_fill(m.pattern.dense(20), 0.0).any()
    own = masks.recent(5)
    torch.testing.assert_close(m(x, mask=own), plain(x, mask=m.pattern & own))


def test_executor_of_allowed_blocks_equals_masked_attention():
    m = build(heads=4, local=1, stride=4)
    q, k, v = torch.randn(3, 2, 4, 20, 5, dtype=torch.double)
    plan = m._plan(20, q.device)
    assert isinstance(plan, BlockPlan) and float(plan.density.mean()) < 0.5
    got = block_sparse_attention(q, k, v, plan, mask=masks.causal())
    torch.testing.assert_close(got, attention(q, k, v, mask=m.pattern))


def test_dense_limits_are_causal_attention():
    x = torch.randn(2, 20, 16)
    for settings in (dict(stride=1, local_blocks=1), dict(stride=4, local_blocks=7), dict(stride=8, dense_heads=4)):
        m = attnlib.create(SLUG, dim=16, num_heads=4, block_size=3, coverage="ignore", **settings)
        plain = attnlib.create("softmax-attention", dim=16, num_heads=4, causal=True)
        plain.load_state_dict(m.state_dict())
        torch.testing.assert_close(m(x), plain(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("heads, stride, whole", [(8, 8, True), (8, 4, True), (4, 8, False)])
def test_heads_together_see_everything(heads, stride, whole):
    m = build(heads=heads, local=1, stride=stride, dim=32)
    union = m.pattern.dense(96).any(1)[0]
    assert torch.equal(union, masks.causal().dense(96)) == whole
    assert (m.pattern.uncovered() == []) == whole


def test_uncovered_blocks_are_reported():
    settings = dict(dim=16, num_heads=4, stride=8)
    with pytest.warns(UserWarning, match=r"no head reads the far key blocks j with j % 8 in \[1, 3, 5, 7\]"):
        attnlib.create(SLUG, **settings)
    with pytest.raises(ValueError, match="cover 4 of stride=8"):
        attnlib.create(SLUG, coverage="error", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnlib.create(SLUG, dense_heads=1, **settings)
        attnlib.create(SLUG, **{**settings, "stride": 4})


@pytest.mark.parametrize("heads, stride, expected", [(8, 8, 0.1780), (8, 4, 0.2955)])
def test_density_of_the_paper_setting(heads, stride, expected):
    m = build(heads=heads, local=1, stride=stride)
    assert float(m.density(32).mean()) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_density_is_the_count(pattern):
    m = build(**pattern)
    blocks = authors_blocks(blocks=19, **pattern).sum((1, 2)) / (19 * 20 / 2)
    group = pattern["heads"] // (pattern.get("kv_heads") or pattern["heads"])
    torch.testing.assert_close(m.density(19), blocks[::group])


def test_density_tends_to_one_over_stride():
    m = build(heads=8, local=2, stride=8)
    assert float(m.density(4096).mean()) == pytest.approx(1 / 8, rel=0.01)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_dropped_block_never_comes_back(pattern):
    chosen = authors_blocks(blocks=17, **pattern)
    past = torch.ones(17, 17, dtype=torch.bool).tril(-1)[1:]
    assert not (chosen[:, 1:] & ~chosen[:, :-1] & past).any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_decoding_with_an_evicted_cache_is_the_full_pass(pattern):
    m, x = build(rotary=100.0, **pattern), torch.randn(2, 41, 16, dtype=torch.double)
    valid = torch.ones(2, 41, dtype=torch.bool)
    valid[0, :4] = False
    whole = m(x, valid=valid)
    state, parts, start = None, [], 0
    for size in (7, *[1] * 20, 10, 4):
        part = slice(start, start + size)
        y, state = m.step(x[:, part], state, valid=valid[:, part])
        parts.append(y)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    pos, count = torch.arange(41).expand(2, m.num_kv_heads, -1), torch.tensor([37, 41])
    kept = (m._keep(pos, count) & (pos < count[:, None, None])).sum(-1)
    assert state["k"].shape[2] == int(kept.max()) and state["tokens"].tolist() == [37, 41]
    assert float(kept[1].float().mean()) / 41 == pytest.approx(m.cache_fraction(41))


@pytest.mark.parametrize("own", [None, masks.recent(9)], ids=["pattern", "mask"])
@pytest.mark.parametrize(
    "settings", [dict(), dict(causal=False), dict(stripes="relative"), dict(pattern_heads="query")]
)
def test_the_pattern_lies_on_the_tokens_that_exist(settings, own):
    """Padding at the front and gaps do not move it; masks of the caller count slots."""
    m = attnlib.create(
        SLUG, dim=16, num_heads=4, num_kv_heads=2, block_size=2, local_blocks=1, stride=3, coverage="ignore", **settings
    ).double()  # fmt: skip
    x = torch.randn(2, 19, 16, dtype=torch.double)
    valid = torch.ones(2, 19, dtype=torch.bool)
    valid[0, :5], valid[1, 7:10], valid[1, 0] = False, False, False
    y = m(x, valid=valid, mask=own)
    for i in range(2):
        there = valid[i].nonzero().squeeze(1)
        mask = None if own is None else own.at(there, there)
        torch.testing.assert_close(y[i, there], m(x[i : i + 1, there], mask=mask)[0])
    if m.traits.streaming:
        state, parts = None, []
        for part, exists in zip(x.split([3, 1, 6, 1, 1, 7], 1), valid.split([3, 1, 6, 1, 1, 7], 1), strict=True):
            z, state = m.step(part, state, valid=exists, mask=own)
            parts.append(z)
        torch.testing.assert_close(torch.cat(parts, 1), y)


def test_the_cache_shrinks_with_the_stride():
    m = build(heads=8, local=1, stride=8)
    assert m.cache_fraction(3 * 8 * 64) == pytest.approx(1 / 8, abs=1 / 64)
    _, state = m.step(torch.randn(1, 240, 16, dtype=torch.double))
    assert state["k"].shape[2] <= 240 / 8 + 2 * 3


def test_decoding_reads_the_callers_mask_too():
    m, x = build(heads=4, local=1, stride=2), torch.randn(1, 20, 16, dtype=torch.double)
    own = masks.recent(8)
    whole = m(x, mask=own)
    y, state = m.step(x[:, :13], mask=own)
    z, _ = m.step(x[:, 13:], state, mask=own)
    torch.testing.assert_close(torch.cat([y, z], 1), whole)


def test_bad_settings():
    for settings, words in (
        (dict(stride=0), "stride"),
        (dict(local_blocks=0), "local"),
        (dict(dense_heads=5), "dense_heads must be"),
        (dict(coverage="maybe"), "coverage="),
        (dict(alibi=True), "alibi"),
        (dict(num_kv_heads=3), "num_kv_heads=3"),
    ):
        with pytest.raises(ValueError, match=words):
            S2Attention(16, 4, **settings)
    with pytest.raises(ValueError, match="num_patterns=3"):
        sharded_context(2, 1, 2, num_heads=4, num_patterns=3)


RECORDED = Fixture(SLUG)


@pytest.mark.parametrize("case", RECORDED.config)
def test_pattern_equals_the_authors_function(case):
    """Their dense mask of 29 tokens in blocks of 3, both directions and both kinds of stripes."""
    settings = dict(RECORDED.config[case])
    heads, n = settings.pop("heads"), 29
    bits = np.unpackbits(RECORDED.tensors[case].numpy())[: heads * n * n]
    expected = torch.from_numpy(bits).bool().view(heads, n, n).expand(settings["num_heads"], n, n)
    m = attnlib.create(SLUG, dim=8, block_size=3, coverage="ignore", **settings).double()
    assert torch.equal(m.pattern.dense(n).reshape(-1, n, n).expand_as(expected), expected)
    x = torch.randn(2, n, 8, dtype=torch.float64)
    q = m.q(x).unflatten(-1, (m.num_heads, -1)).transpose(1, 2)
    k, v = (p(x).unflatten(-1, (m.num_kv_heads, -1)).transpose(1, 2) for p in (m.k, m.v))
    out = attention(q, k, v, mask=masks.explicit(expected[None]))
    torch.testing.assert_close(m(x), m.proj(out.transpose(1, 2).flatten(2)))
    spec, tensors = m.pattern.lower()
    assert masks.raise_mask(spec, tensors) == m.pattern
    assert m.traits.streaming == (settings.get("causal", True) and settings.get("stripes") is None)


@pytest.mark.parametrize("dense", [0, 1])
def test_patterns_of_query_heads_decode_from_the_union_of_their_group(dense):
    m = attnlib.create(
        SLUG, dim=16, num_heads=4, num_kv_heads=2, block_size=2, local_blocks=1, stride=4, offset=1, dense_heads=dense,
        pattern_heads="query",
    ).double()  # fmt: skip
    n, x = 21, torch.randn(2, 21, 16, dtype=torch.float64)
    h, j = torch.arange(4)[:, None, None], torch.arange(n) // 2
    i = j[:, None]
    far = ((j + h + 1) % 4 == 0) | (h >= 4 - dense)
    expected = ((i == j) | far) & torch.ones(n, n, dtype=torch.bool).tril()
    assert torch.equal(m.pattern.dense(n)[0], expected)
    out = m(x[:, :9], returns=("state",))
    ys, state = [out.y], out.state
    for t in range(9, n):
        y, state = m.step(x[:, t : t + 1], state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), m(x))
    assert dense or state["k"].shape[2] < n


def test_what_patterns_refuse():
    for settings, words in (
        (dict(local_blocks=(2, 1)), "must be one number with causal=True"),
        (dict(stripes="diagonal"), "stripes="),
        (dict(pattern_heads="group"), "pattern_heads="),
        (dict(causal=False, local_blocks=(1, 2, 3)), "local_blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            attnlib.create(SLUG, dim=8, num_heads=2, **settings)
    with pytest.raises(ValueError, match="needs causal=True and absolute stripes"):
        attnlib.create(SLUG, dim=8, num_heads=2, causal=False).cache_fraction(8)
