import pytest
import torch
from parity import Fixture

import attnlib
from attnlib import masks
from attnlib.normalizers import Sigmoid, sigmoid_bias
from attnlib.ops import attention

FIXTURE = Fixture("sigmoid-attention")


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"], xs.get("context")))


def test_zero_queries_average_the_values():
    n = 50
    q, k, v = torch.zeros(1, 1, n, 4), torch.randn(1, 1, n, 4), torch.randn(1, 1, n, 4)
    out = attention(q, k, v, normalizer=Sigmoid(sigmoid_bias(n)))
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out) * n / (n + 1), atol=1e-6, rtol=1e-5)


def test_weights_do_not_compete():
    scores = torch.randn(3, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(Sigmoid(-1.0).weights, scores)
    off_diagonal = jacobian.flatten(0, 1).flatten(1) * (1 - torch.eye(15, dtype=torch.float64))
    assert float(off_diagonal.abs().max()) == 0.0


def test_causal_weights_above_the_diagonal_are_exactly_zero():
    m = attnlib.create("sigmoid-attention", dim=16, num_heads=2, causal=True)
    weights = m(torch.randn(1, 6, 16), returns=("weights",)).weights.detach()
    assert float(weights.triu(1).abs().max()) == 0.0 and float(weights.tril().min()) >= 0.0


def test_parts_add_up_without_rescaling():
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    whole = attention(q, k, v, normalizer=Sigmoid(-4.0))
    parts = [attention(q, k[:, :, s], v[:, :, s], normalizer=Sigmoid(-4.0)) for s in (slice(0, 20), slice(20, 64))]
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-6, rtol=1e-5)


def test_the_bias_brings_the_norm_to_softmax():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 1024, 32)
    soft = attention(q, k, v).norm()
    plain = attention(q, k, v, normalizer=Sigmoid()).norm()
    scaled = attention(q, k, v, normalizer=Sigmoid(sigmoid_bias(1024))).norm()
    assert plain > 20 * soft
    assert 0.5 < scaled / soft < 2


def test_permutation_equivariant():
    m, x, p = attnlib.create("sigmoid-attention", dim=16, num_heads=2), torch.randn(2, 7, 16), torch.randperm(7)
    torch.testing.assert_close(m(x[:, p]), m(x)[:, p], atol=1e-6, rtol=1e-5)


def test_rows_count_the_keys_they_see():
    m = attnlib.create("sigmoid-attention", dim=8, num_heads=2)
    x, valid = torch.randn(2, 6, 8), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    torch.testing.assert_close(m(x, valid=valid)[1, :4], m(x[1:, :4])[0], atol=1e-6, rtol=1e-5)
    window = masks.sliding_window(3)
    same = m(x, mask=window)
    torch.testing.assert_close(same, m(x, mask=window.dense(6)), atol=1e-6, rtol=1e-5)


def test_context_length_fixes_the_bias():
    fixed = attnlib.create("sigmoid-attention", dim=8, num_heads=2, context_length=6)
    counted = attnlib.create("sigmoid-attention", dim=8, num_heads=2)
    counted.load_state_dict(fixed.state_dict())
    x = torch.randn(1, 6, 8)
    torch.testing.assert_close(fixed(x), counted(x), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(fixed(x[:, :3]), counted(x[:, :3]))


def test_rms_norms_of_heads():
    """The plain norm, whatever batch and length; the authors' counts the entries of the whole tensor."""
    m, x = attnlib.create("sigmoid-attention", dim=8, num_heads=2, qk_norm="rms", attn_bias=-1.0), torch.randn(2, 5, 8)
    assert {"q_norm.weight", "k_norm.weight"} <= set(m.state_dict()) and "q_norm.bias" not in m.state_dict()
    torch.testing.assert_close(m(x)[:1], m(x[:1]), atol=1e-6, rtol=1e-5)
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
    q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    out = torch.sigmoid(q @ k.mT / 2 - 1.0) @ v
    torch.testing.assert_close(m(x), m.proj(out.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)
    theirs = attnlib.create("sigmoid-attention", dim=8, num_heads=2, qk_norm="rms", attn_bias=-1.0, compat="authors")
    theirs.load_state_dict(m.state_dict())
    assert not torch.allclose(theirs(x)[:1], theirs(x[:1]), atol=1e-4)
    assert not theirs.traits.batch_independent and not theirs.traits.valid
    with pytest.raises(ValueError, match="qk_norm="):
        attnlib.create("softmax-attention", dim=8, num_heads=2, qk_norm="batch")


def test_norms_with_projections():
    x, context = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    m = attnlib.create("sigmoid-attention", dim=8, num_heads=2, linear_norm="pre", attn_bias=-1.0)
    bare = attnlib.create("sigmoid-attention", dim=8, num_heads=2, attn_bias=-1.0)
    bare.load_state_dict({k: v for k, v in m.state_dict().items() if k.split(".")[0] not in ("in_norm", "out_norm")})
    torch.testing.assert_close(m.in_norm(x).mean(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)
    heads = {}
    bare.proj.register_forward_pre_hook(lambda module, args: heads.update(before=args[0]))
    bare(m.in_norm(x))
    torch.testing.assert_close(m(x), m.proj(m.out_norm(heads["before"])), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="takes no context"):
        m(x, context)
    cross = attnlib.create("sigmoid-attention", dim=8, num_heads=2, linear_norm="post", v_norm=True)
    assert cross.traits.patterns == {"noncausal-cross"} and cross(x, context).shape == x.shape
    y = cross(x, context)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(linear_norm="both"), "linear_norm="),
        (dict(activation="relu"), "activation="),
        (dict(activation="softmax", row_norm="sqrt"), "row_norm='sqrt'"),
        (dict(v_norm="batch"), "v_norm="),
        (dict(attn_bias=0.0, context_length=3), "not both"),
        (dict(context_length=0), "context_length"),
        (dict(row_norm="rows"), "row_norm"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        attnlib.create("sigmoid-attention", dim=8, num_heads=2, **settings)
