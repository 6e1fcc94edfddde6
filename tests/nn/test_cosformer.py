"""cosFormer: the quadratic form with its cosine, fixed M, what the released class does, and stable causal prefixes."""

import math

import pytest
import torch

import attnlib
from attnlib.nn.linear.cosformer import Cosformer


def quadratic(m, x, source=None, causal=False):
    """The map itself, in float64."""
    source = x if source is None else source
    heads = [f(t).unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for f, t in ((m.q, x), (m.k, source), (m.v, source))]
    act = torch.relu if m.activation == "relu" else lambda t: torch.nn.functional.elu(t) + 1
    q, k, v = act(heads[0]), act(heads[1]), heads[2]
    apart = torch.arange(x.shape[1])[:, None] - torch.arange(source.shape[1])
    w = q @ k.mT * torch.cos(math.pi * apart / (2 * m.max_length))
    if causal:
        w = w.tril()
    out = w @ v / w.sum(-1, keepdim=True).clamp(min=m.eps)
    return m.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["relu", "elu1"])
def test_linear_form_is_the_quadratic_one(causal, activation):
    m = Cosformer(12, 3, max_length=11, activation=activation, causal=causal, chunk=4).double()
    x = torch.randn(2, 11, 12, dtype=torch.double)
    torch.testing.assert_close(m(x), quadratic(m, x, causal=causal))


def test_cross_attention_is_the_quadratic_form():
    m = Cosformer(12, 3, max_length=20, context_dim=8).double()
    x, c = torch.randn(2, 5, 12, dtype=torch.double), torch.randn(2, 9, 8, dtype=torch.double)
    torch.testing.assert_close(m(x, c), quadratic(m, x, c))


def test_weights_do_not_change_with_the_length_unless_as_released():
    x = torch.randn(1, 9, 12)
    fixed = Cosformer(12, 3, max_length=16, causal=True)
    torch.testing.assert_close(fixed(x)[:, :5], fixed(x[:, :5]), atol=1e-6, rtol=1e-5)
    theirs = Cosformer(12, 3, compat="authors")
    ours = Cosformer(12, 3, max_length=9)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(theirs(x[:, :5]), ours(x[:, :5]), atol=1e-5)


def test_absent_tokens_take_no_position():
    m = Cosformer(12, 3, max_length=5).double()
    x = torch.randn(1, 5, 12, dtype=torch.double)
    gaps = torch.full((1, 8, 12), 3.0, dtype=torch.double)
    there = torch.tensor([[False, True, True, False, True, True, True, False]])
    gaps[there] = x[0]
    torch.testing.assert_close(m(gaps, valid=there)[there], m(x)[0])


def test_without_an_output_projection_theirs_is_left_out():
    m, whole = Cosformer(12, 3, out_proj=False), Cosformer(12, 3)
    whole.proj.load_state_dict({"weight": torch.eye(12), "bias": torch.zeros(12)})
    names = {
        f"{n}_proj.{p}": torch.randn(12, *[12] * (p == "weight"))
        for n in ("q", "k", "v", "out")
        for p in ("weight", "bias")
    }
    m.load_state_dict(m.convert_state_dict(names, out_proj=False))
    whole.load_state_dict({**m.state_dict(), **{f"proj.{n}": p for n, p in whole.proj.state_dict().items()}})
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(m(x), whole(x))


def test_patterns_are_those_of_the_benchmark_as_released():
    released = Cosformer(12, 3, compat="authors").traits
    assert released.patterns == {"noncausal-self", "noncausal-cross"}
    assert Cosformer(12, 3, causal=True).traits.patterns == {"causal-self", "causal-cross"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: Cosformer(12, 3, max_length=4)(x), "max_length=4 is below the 5 tokens"),
        (lambda x: Cosformer(12, 3, max_length=5)(x, torch.randn(2, 6, 12)), "max_length=5 is below the 6 tokens"),
        (lambda x: Cosformer(12, 3, max_length=0), "max_length must be at least 1"),
        (lambda x: Cosformer(12, 3, activation="gelu"), "activation='gelu' is not possible"),
        (lambda x: Cosformer(12, 3, causal=True, compat="authors"), "causal=True is not possible with compat"),
        (lambda x: stepped(x), "max_length=6 is below the 8 tokens"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 5, 12))


def stepped(x):
    m = Cosformer(12, 3, max_length=6, causal=True)
    _, state = m.step(x)
    m.step(x[:, :3], state)


def test_it_is_found_by_its_name():
    assert type(attnlib.create("cosformer", dim=8, num_heads=2)) is Cosformer
