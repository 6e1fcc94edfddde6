import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib
from attnlib import attention, masks
from attnlib.nn.layers import merge_heads, split_heads
from attnlib.positions import rotary_angles, rotate

SLUG = "diffqkv-sigma"
FIXTURE = Fixture(SLUG)


def build(**settings):
    torch.manual_seed(0)
    return attnlib.create(SLUG, **{**dict(dim=32, num_heads=8, num_k_heads=1, num_v_heads=4), **settings}).double()


def tokens(*shape):
    return torch.randn(*shape, 32, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["sdpa", "tiled", "eager", None])
@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_kernel_authors_reference(case, backend):
    """Unequal head counts and widths of keys and values, forward and backward."""
    q, k, v = (FIXTURE.tensors[f"{case}/x/{n}"].clone().requires_grad_() for n in "qkv")
    mask = masks.causal() if FIXTURE.config[case]["causal"] else None
    y = attention(q, k, v, mask=mask, backend=backend)
    torch.testing.assert_close(y, FIXTURE.tensors[f"{case}/y"], atol=1e-5, rtol=1e-5)
    (y * FIXTURE.tensors[f"{case}/g"]).sum().backward()
    for name, leaf in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(leaf.grad, FIXTURE.tensors[f"{case}/dx/{name}"], atol=1e-5, rtol=1e-5)


def oracle(m, x, keep=None):
    """The equation, for causal attention with rotary positions behind the key map."""
    n, heads = x.shape[1], m.num_heads
    q, k, v = (
        split_heads(p(x), h) for p, h in ((m.q, heads), (m.k, m.num_k_heads), (m.v, m.num_v_heads))
    )  # fmt: skip
    if m.k_up is not None:
        k = k @ m.k_up.weight.T + m.k_up.bias
    angles = rotary_angles(torch.arange(n), m.head_dim, 1e4)
    q, k = rotate(q, angles), rotate(k, angles)
    out = []
    for i in range(heads):
        key, value = k[:, i * m.num_k_heads // heads], v[:, i * m.num_v_heads // heads]
        scores = q[:, i] @ key.transpose(-2, -1) / m.head_dim**0.5
        a = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        if keep is not None:
            least = a.topk(min(keep, n), -1).values[..., -1:]
            a = a * (a >= least)
        out.append(a @ value)
    return m.proj(merge_heads(torch.stack(out, 1)))


@pytest.mark.parametrize(
    "settings", [{}, dict(k_head_dim=2), dict(q_hidden=48), dict(v_keep=3), dict(k_head_dim=6, v_keep=2, q_hidden=20)]
)
def test_equals_the_oracle(settings):
    m, x = build(causal=True, rotary=1e4, **settings), tokens(2, 9)
    torch.testing.assert_close(m(x), oracle(m, x, settings.get("v_keep")))


@pytest.mark.parametrize("groups", [8, 2, 1])
def test_equal_heads_are_mha_gqa_and_mqa(groups):
    m, x = build(num_k_heads=groups, num_v_heads=groups), tokens(2, 6)
    plain = attnlib.create("softmax-attention", dim=32, num_heads=8, num_kv_heads=groups).double()
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), plain(x))


def test_equals_sdpa_on_repeated_heads():
    m, x = build(), tokens(2, 6)
    q, k, v = split_heads(m.q(x), 8), split_heads(m.k(x), 1), split_heads(m.v(x), 4)
    out = F.scaled_dot_product_attention(q, k.repeat_interleave(8, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(m(x), m.proj(merge_heads(out)))


def test_which_head_reads_which():
    """Of 32 query heads, head i reads key head i // 8 and value head i // 2, as in Sigma."""
    m, x = build(dim=32, num_heads=32, num_k_heads=4, num_v_heads=16), tokens(1, 5)
    m.proj.weight.data.copy_(torch.eye(32))
    base = m(x)
    for projection, heads, group in ((m.k, 4, 8), (m.v, 16, 2)):
        for h in range(heads):
            saved = projection.weight.data.clone()
            projection.weight.data[h] += 1.0
            moved = ((m(x) - base).abs() > 1e-9).any(1)[0].nonzero().flatten().tolist()
            projection.weight.data.copy_(saved)
            assert moved == list(range(h * group, (h + 1) * group))


def test_cache_size():
    """Sigma 1.5B keeps 62.5 % of what grouped queries with 16 heads keep, and the state holds just that."""
    with torch.device("meta"):
        sigma = attnlib.create(SLUG, dim=2048, num_heads=32, num_k_heads=4, num_v_heads=16)
        gqa = attnlib.create(SLUG, dim=2048, num_heads=32, num_k_heads=16, num_v_heads=16)
    assert sigma.cache_size / gqa.cache_size == 0.625
    m = build(causal=True, rotary=1e4, k_head_dim=2)
    _, state = m.step(tokens(3, 7))
    assert state["k"].numel() + state["v"].numel() == 3 * 7 * m.cache_size == 3 * 7 * (2 + 16)


def test_parameters_of_sigma():
    """With an augmented query of two matrices: 1.486e9 in 26 layers, 1.749e9 with tied embeddings."""
    with torch.device("meta"):
        m = attnlib.create(
            SLUG, dim=2048, num_heads=32, num_k_heads=4, num_v_heads=16, q_hidden=3072, qkv_bias=False, proj_bias=False
        )
    layers = 26 * (sum(p.numel() for p in m.parameters()) + 3 * 2048 * 6144)
    assert layers == pytest.approx(1.486e9, rel=1e-3)
    assert layers + 128256 * 2048 == pytest.approx(1.749e9, rel=1e-3)


@pytest.mark.parametrize("one", [True, False])
def test_fetching_every_value_is_plain(one):
    m, full, x = build(v_keep=6), build(), tokens(2, 1 if one else 6)
    context = tokens(2, 6)
    torch.testing.assert_close(m(x, context), full(x, context))


def test_one_query_reads_only_the_chosen_values():
    m, x, context = build(v_keep=2), tokens(1, 1), tokens(1, 9)
    weights = m(x, context, returns=("weights",)).weights
    assert ((weights > 0).sum(-1) == 2).all()
    index = m.plan(x, context)["index"]
    q, k = split_heads(m.q(x), 8), split_heads(m.k(context), 1)
    full = (q @ k.transpose(-2, -1) * m.scale).softmax(-1)
    assert torch.equal(index.sort(-1).values, full.topk(2).indices.sort(-1).values)
    # the kept weights are those of the whole row, not normalised again
    torch.testing.assert_close(weights.gather(-1, index), full.gather(-1, index))


def test_scores_with_narrow_keys_depend_on_relative_positions():
    m, x = build(k_head_dim=2, rotary=1e4, causal=True), tokens(1, 5)
    valid = torch.ones(1, 8, dtype=torch.bool)
    valid[:, :3] = False
    shifted = torch.cat([tokens(1, 3), x], 1)
    torch.testing.assert_close(m(shifted, valid=valid)[:, 3:], m(x))
    _, state = m.step(tokens(1, 2))
    y, _ = m.step(x, state)
    assert y.shape == x.shape


def test_bad_input():
    for settings, message in (
        (dict(num_k_heads=3), "num_k_heads=3 does not divide num_heads=8"),
        (dict(num_v_heads=5), "num_v_heads=5 does not divide num_heads=8"),
        (dict(num_kv_heads=2), "num_k_heads and num_v_heads"),
        (dict(v_keep=0), "v_keep=0 must be at least 1"),
        (dict(k_head_dim=0), "k_head_dim must be an integer of at least 1, got 0"),
        (dict(q_activation="silu"), "needs q_hidden"),
        (dict(q_hidden=8, q_activation="tanh"), "q_activation="),
        (dict(v_keep=2, attn_drop=0.1), "attn_drop=0.1 is not possible"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**settings)
    m = build(v_keep=2)
    with pytest.raises(ValueError, match="plan was made for N=4"):
        m(tokens(2, 5), plan=m.plan(tokens(2, 4)))
    with pytest.raises(ValueError, match="plan was made for M=6 keys"):
        m(tokens(2, 4), tokens(2, 5), plan=m.plan(tokens(2, 4), tokens(2, 6)))
    with pytest.raises(ValueError, match="plan's index must have shape"):
        m(tokens(3, 4), plan=m.plan(tokens(2, 4)))
    with pytest.raises(ValueError, match="no released state dict"):
        attnlib.convert_state_dict(SLUG, {})
