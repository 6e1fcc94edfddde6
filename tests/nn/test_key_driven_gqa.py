import pytest
import torch
from parity import Fixture
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnlib
from attnlib.nn.heads.key_driven_gqa import KINDS, allocate

SLUG = "key-driven-gqa"
FIXTURE = Fixture(SLUG)


def make(**settings):
    return attnlib.create(SLUG, **{**dict(dim=32, num_heads=8, num_kv_heads=4), **settings})


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    module = FIXTURE.build(case).eval()
    if f"{case}/splits" in FIXTURE.tensors:
        torch.manual_seed(5)
        plan = module.plan(FIXTURE.tensors[f"{case}/x/x"])
        assert torch.equal(plan["map"].bincount(minlength=module.num_kv_heads), FIXTURE.tensors[f"{case}/splits"])
    torch.manual_seed({"pgqa": 7}.get(case, 5))
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize("kind", ["ema", "diff"])
def test_caches_and_groups_move_as_the_authors_do(kind):
    """Training and evaluation calls in turn: theirs move the cache in both."""
    case, full = f"calls_{kind}", {"ema": "average", "diff": "difference"}[kind]
    m = make(dim=8, num_heads=4, num_kv_heads=2, kind=full, window=2, compat="authors")
    m.load_state_dict(attnlib.convert_state_dict(SLUG, FIXTURE.under(f"{case}/sd")))
    for i, call in enumerate(FIXTURE.meta["calls"]):
        m.train(call == "t")
        torch.manual_seed(9 + i)
        y = m(FIXTURE.tensors[f"{case}/x/{i}"]).detach()
        FIXTURE._close(y, FIXTURE.tensors[f"{case}/y/{i}"], 1e-5, "y")
        torch.testing.assert_close(m.cache, FIXTURE.tensors[f"{case}/cache/{i}"])
        assert torch.equal(m.head_map.bincount(minlength=2), FIXTURE.tensors[f"{case}/splits/{i}"])


def test_groups_that_follow_the_keys_need_not_divide_the_heads():
    m, x = make(dim=24, num_heads=6, num_kv_heads=4), torch.randn(2, 5, 24)
    chosen = m.plan(x)["map"]
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
    heads = [(q[:, h] @ k[:, g].mT / 2).softmax(-1) @ v[:, g] for h, g in enumerate(chosen.tolist())]
    torch.testing.assert_close(m(x), m.proj(torch.cat(heads, -1)), atol=1e-6, rtol=1e-5)
    for kind in ("uniform", "perturbed"):
        with pytest.raises(ValueError, match="num_kv_heads=4 does not divide num_heads=6"):
            make(dim=24, num_heads=6, num_kv_heads=4, kind=kind)


def test_a_dense_checkpoint_starts_every_kind():
    dense = {"qkv.weight": torch.randn(96, 32), "proj.weight": torch.randn(32, 32)}
    for kind in KINDS:
        converted = attnlib.convert_state_dict(SLUG, dense, num_heads=8, num_kv_heads=4, kind=kind)
        make(kind=kind, qkv_bias=False, proj_bias=False).load_state_dict(converted)


def test_allocation_sums_to_the_heads():
    torch.manual_seed(0)
    for _ in range(200):
        shares, heads = torch.rand(int(torch.randint(1, 7, ()))), int(torch.randint(1, 17, ()))
        for fix in ("extreme", "remainder", "random"):
            split = allocate(shares, heads, fix)
            assert int(split.sum()) == heads and int(split.min()) >= 0


def test_equal_norms_give_plain_grouped_queries():
    m = make()
    with torch.no_grad():
        for p in (m.k.weight, m.k.bias):
            p.copy_(p[:4].repeat(4, *(1,) * (p.dim() - 1)))
    x = torch.randn(2, 6, 32)
    assert m.plan(x)["map"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    gqa = attnlib.create("softmax-attention", dim=32, num_heads=8, num_kv_heads=4)
    gqa.load_state_dict(m.state_dict(), strict=False)
    torch.testing.assert_close(m(x), gqa(x))


@pytest.mark.parametrize("groups", [8, 1])
def test_limits_are_multi_head_and_multi_query(groups):
    m = make(num_kv_heads=groups, kind="uniform")
    plain = attnlib.create("softmax-attention", dim=32, num_heads=8, num_kv_heads=groups)
    plain.load_state_dict(m.state_dict(), strict=False)
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(m(x), plain(x))


def test_a_group_without_queries_is_legal_and_expansion_equals_the_loop():
    m, x = make(), torch.randn(2, 6, 32)
    with torch.no_grad():
        m.k.weight[:4] *= 0
        m.k.bias[:4] *= 0
    chosen = m.plan(x)["map"]
    assert 0 not in chosen.tolist()
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
    loop = torch.cat(
        [(q[:, h] @ k[:, g].transpose(-2, -1) / 2).softmax(-1) @ v[:, g] for h, g in enumerate(chosen.tolist())], -1
    )
    torch.testing.assert_close(m(x), m.proj(loop), atol=1e-6, rtol=1e-5)


def test_pooling_a_model_with_identical_heads_changes_nothing():
    dense = attnlib.create("softmax-attention", dim=32, num_heads=8)
    with torch.no_grad():
        for layer in (dense.k, dense.v):
            for p in (layer.weight, layer.bias):
                p.copy_(p[:4].repeat(8, *(1,) * (p.dim() - 1)))
    sd = dense.state_dict()
    fused = {f"qkv.{n}": torch.cat([sd[f"{c}.{n}"] for c in "qkv"]) for n in ("weight", "bias")}
    fused |= {k: v for k, v in sd.items() if k.startswith("proj")}
    m = make()
    m.load_state_dict(attnlib.convert_state_dict(SLUG, fused, num_heads=8, num_kv_heads=4), strict=False)
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(m(x), dense(x), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        attnlib.convert_state_dict(SLUG, fused, num_heads=8, num_kv_heads=3, kind="uniform")
    uneven = attnlib.convert_state_dict(SLUG, fused, num_heads=8, num_kv_heads=3)  # two heads each, the last two left
    torch.testing.assert_close(uneven["k.weight"], fused["qkv.weight"][32:56].view(3, 2, 4, 32).mean(1).flatten(0, 1))


@pytest.mark.parametrize("kind", ["difference", "average"])
def test_evaluation_changes_no_state_and_training_follows_the_window(kind):
    m, x = make(kind=kind, window=2).eval(), torch.randn(2, 6, 32)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    first, second = m(x), m(x)
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    m.train()
    m(x)
    after_one = m.cache.clone()
    m(x)
    assert torch.equal(m.cache, after_one) and float(after_one.sum()) > 0  # the second call is inside the window
    m(x)
    assert not torch.equal(m.cache, after_one)


def test_causal_groups_are_frozen_outside_training():
    m = make(causal=True)
    x = torch.randn(2, 6, 32)
    nn.init.normal_(m.k.weight[:8], std=2.0)
    m(x)
    m.eval()
    full, state, steps = m(x), None, []
    for t in range(6):
        y, state = m.step(x[:, t : t + 1], state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-6, rtol=1e-5)


def test_perturbation_only_in_training():
    m, x = make(kind="perturbed"), torch.randn(2, 6, 32)
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m(x))


def test_parameters():
    m = attnlib.create(SLUG, dim=384, num_heads=6, num_kv_heads=3, qkv_bias=False, proj_bias=False)
    assert sum(p.numel() for p in m.parameters()) == 384**2 + 2 * 384 * 3 * 64 + 384**2


@pytest.mark.parametrize(
    "settings, words",
    [(dict(kind="norm"), "kind="), (dict(window=0), "window=0"), (dict(num_kv_heads=3, kind="uniform"), "not divide")],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)
    assert "key_norm" in KINDS


def test_a_plan_for_other_heads_is_refused():
    with pytest.raises(ValueError, match=r"plan's map must have shape \(8,\)"):
        make()(torch.randn(1, 3, 32), plan=make(num_heads=4, num_kv_heads=2).plan(torch.randn(1, 3, 32)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["key_norm", "average"])
def test_under_checkpoints_groups_move_once_and_the_second_run_finds_them(kind, causal, reentrant):
    def run(wrapped):
        torch.manual_seed(0)
        m = make(dim=32, num_heads=8, num_kv_heads=4, kind=kind, window=2, causal=causal).train()
        with torch.no_grad():
            m.k.weight[:8] *= 3  # one head's keys are larger
        maps, grads = [m.head_map.clone()], []
        for step in range(4):
            x = (torch.randn(2, 6, 32) * (1 + step)).requires_grad_()
            y = checkpoint(m, x, use_reentrant=reentrant) if wrapped else m(x)
            maps.append(m.head_map.clone())
            y.square().sum().backward()
            grads.append(x.grad)
        return maps, grads, [b.clone() for b in m.buffers()]

    plain, wrapped = run(False), run(True)
    assert len({tuple(m.tolist()) for m in plain[0]}) > 1  # or nothing was tried
    for a, b in zip(plain, wrapped, strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other)
