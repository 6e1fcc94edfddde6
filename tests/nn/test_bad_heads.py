"""What cannot be is refused with words that say what was given and what is possible, before anything is computed."""

import pytest
import torch

import attnlib
from attnlib.models.tiny import TinyLM
from attnlib.types import Plan

X = torch.randn(2, 6, 32)


def head_map(*groups):
    return Plan("head-map", {"map": torch.tensor(groups)})


# ---- a head map that leaves a query without keys


@pytest.mark.parametrize("groups", [(0, 0, 1, 1, 2, 2, 3, 4), (0, 0, 1, 1, 2, 2, 3, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_head_map_to_key_heads_that_do_not_exist(groups, causal):
    m = attnlib.create("key-driven-gqa", dim=32, num_heads=8, num_kv_heads=4, causal=causal)
    with pytest.raises(ValueError, match=rf"key head {groups[-1]}; possible: 0 to 3"):
        m(X, plan=head_map(*groups))
    assert m(X, plan=head_map(0, 0, 0, 0, 0, 0, 0, 3)).shape == X.shape  # key heads may go without queries


def test_a_head_map_for_fewer_heads():
    m = attnlib.create("key-driven-gqa", dim=32, num_heads=8, num_kv_heads=4)
    with pytest.raises(ValueError, match="plan.s map must have shape"):
        m(X, plan=head_map(0, 0, 1, 1))


def test_sharded_heads_that_read_nothing_far_or_near():
    make = dict(dim=32, num_heads=4, block_size=2)
    with pytest.raises(ValueError, match=r"no head reads the far key blocks .* stride=8"):
        attnlib.create("s2-attention-dkernel", **make, stride=8, step=1, coverage="error")
    with pytest.raises(ValueError, match="local"):
        attnlib.create("s2-attention-dkernel", **make, local_blocks=0)


@pytest.mark.parametrize("backend", ["eager", "tiled", "sdpa"])
def test_a_mask_that_leaves_a_query_without_keys_gives_zeros(backend):
    m = attnlib.create("softmax-attention", dim=32, num_heads=4, proj_bias=False)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    x = X.clone().requires_grad_()
    with attnlib.use_backend(backend):
        y = m(x, mask=mask)
        y.square().sum().backward()
    assert not y[:, 2].any() and bool(y[:, 3].any()) and bool(x.grad.isfinite().all())


# ---- more active heads than heads


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("moh-mixture-of-heads", dict(num_heads=8, shared_heads=2, active_heads=7), "active_heads=7.*6 routed heads"),
        ("moh-mixture-of-heads", dict(num_heads=8, shared_heads=9), "shared_heads=9.*num_heads=8"),
        ("bam-soft-moa-upcycling", dict(num_heads=4, num_experts=3, top_k=4), "top_k=4.*num_experts=3"),
        ("s2-attention-dkernel", dict(num_heads=4, block_size=2, dense_heads=5), "dense"),
        ("key-driven-gqa", dict(num_heads=4, num_kv_heads=8), "num_kv_heads=8 does not divide num_heads=4"),
        ("diffqkv-sigma", dict(num_heads=4, num_k_heads=8), "num_k_heads=8 does not divide num_heads=4"),
        ("diffqkv-sigma", dict(num_heads=4, num_v_heads=3), "num_v_heads=3 does not divide num_heads=4"),
    ],
)
def test_more_heads_than_there_are(name, settings, words):
    with pytest.raises(ValueError, match=words):
        attnlib.create(name, dim=32, **settings)


@pytest.mark.parametrize(
    "name, settings, kind, most",
    [
        ("moh-mixture-of-heads", dict(num_heads=8, shared_heads=2, active_heads=2), "routed-heads", 6),
        ("bam-soft-moa-upcycling", dict(num_heads=4, num_experts=3, top_k=2), "experts", 3),
    ],
)
def test_a_plan_of_heads_that_do_not_exist(name, settings, kind, most):
    m = attnlib.create(name, dim=32, **settings)
    plan = Plan(kind, {"index": torch.full((2, 6, 2), most)}, (("N", 6),))
    with pytest.raises(ValueError, match=rf"index.* {most}\b.*0 to {most - 1}"):
        m(X, plan=plan)
    with pytest.raises(ValueError, match=r"index.*\(2, 6, 2\)"):
        m(X, plan=Plan(kind, {"index": torch.zeros(1, 6, 2, dtype=torch.long)}, (("N", 6),)))


# ---- a pretrained checkpoint whose head count does not divide


def test_checkpoints_whose_heads_do_not_divide():
    dense = attnlib.create("softmax-attention", dim=24, num_heads=4, num_kv_heads=4).state_dict()
    fused = {f"qkv.{n}": torch.cat([dense[f"{c}.{n}"] for c in "qkv"]) for n in ("weight", "bias")}
    with pytest.raises(ValueError, match="num_kv_heads=5 does not divide num_heads=4"):
        attnlib.convert_state_dict("key-driven-gqa", fused, num_heads=4, num_kv_heads=5)
    with pytest.raises(ValueError, match="24 rows, which num_heads=5 does not divide"):
        attnlib.convert_state_dict("key-driven-gqa", fused, num_heads=5, num_kv_heads=5)
    with pytest.raises(ValueError, match="give|needs"):
        attnlib.convert_state_dict("key-driven-gqa", fused)
    with pytest.raises(ValueError, match="num_heads=5 does not divide"):
        attnlib.convert_state_dict("bam-soft-moa-upcycling", dense, num_heads=5, num_experts=2)
    with pytest.raises(ValueError, match="no released state dict"):
        attnlib.convert_state_dict("diffqkv-sigma", dense)


# ---- past a fixed-length table


def test_generation_past_the_table_of_distances():
    pytest.importorskip("transformers")
    from attnlib.models.language import DecoderConfig, DecoderForCausalLM

    config = DecoderConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        mechanisms=[{"name": "rcmha", "max_distance": 8}],
    )  # fmt: skip
    model = DecoderForCausalLM(config).eval()
    ids = torch.randint(1, 31, (1, 5))
    for cached in (True, False):
        assert model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cached).shape == (1, 9)
        with pytest.raises(ValueError, match="max_distance=8"):
            model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached)
    with pytest.raises(ValueError, match="max_distance=8"):
        model(torch.randint(1, 31, (1, 9)))


def test_a_text_longer_than_its_positions():
    model = TinyLM(lambda: attnlib.create("softmax-attention", dim=16, num_heads=2, causal=True), dim=16, length=8)
    assert model(torch.zeros(1, 8, dtype=torch.long)).y.shape == (1, 8, 256)
    with pytest.raises(ValueError, match="9 tokens, more than .*length=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
