"""ABC: the memory token by token, forms that agree, extreme controls, bad input."""

import pytest
import torch

import attnlib
from attnlib.nn.linear.abc_bounded_memory import BoundedMemoryAttention


def made(**settings):
    torch.manual_seed(0)
    m = BoundedMemoryAttention(**{**dict(dim=16, num_heads=2, num_landmarks=3), **settings}).double()
    for control in (m.key_control, m.value_control):
        torch.nn.init.normal_(control)
    return m


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(m, x, context=None):
    """Every query on its own: the memory of what it may read, and attention to that."""
    read = x if context is None else context
    q, k, v = (part(t).unflatten(-1, (2, 8)).transpose(1, 2) for part, t in ((m.q, x), (m.k, read), (m.v, read)))
    rows = []
    for i in range(x.shape[1]):
        end = i + 1 if m.causal and context is None else read.shape[1]
        keys = torch.softmax(k[:, :, :end] @ m.key_control, 2).mT @ k[:, :, :end]
        values = torch.softmax(v[:, :, :end] @ m.value_control, 2).mT @ v[:, :, :end]
        rows.append(torch.softmax(q[:, :, i : i + 1] @ keys.mT / 8**0.5, -1) @ values)
    return m.proj(torch.cat(rows, 2).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_it_is_the_equation(causal, cross):
    m, x = made(causal=causal, chunk=4), noise(2, 11, 16)
    context = noise(2, 9, 16, seed=2) if cross else None
    y = m(x) if context is None else m(x, context)
    torch.testing.assert_close(y, oracle(m, x, context), atol=1e-6, rtol=1e-6)


def test_controls_of_any_size_stay_finite_and_in_order():
    m, x = made(causal=True, chunk=4), noise(1, 12, 16)
    x[:, 5] *= 50.0
    torch.testing.assert_close(m(x), oracle(m, x), atol=1e-5, rtol=1e-5)
    other = x.clone()
    other[:, 8:] *= 1000.0
    torch.testing.assert_close(m(other)[:, :8], m(x)[:, :8], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("compat", [None, "authors"])
def test_decoding_has_a_state_of_one_size(compat):
    m, x = made(causal=True, compat=compat), noise(2, 9, 16)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    expected = m(x, valid=valid)
    out = m(x[:, :5], valid=valid[:, :5], returns=("state",))
    sizes = {k: tuple(v.shape) for k, v in out.state.tensors.items()}
    rest = m(x[:, 5:], valid=valid[:, 5:], state=out.state, returns=("state",))
    torch.testing.assert_close(torch.cat([out.y, rest.y], 1), expected, atol=1e-6, rtol=1e-6)
    assert {k: tuple(v.shape) for k, v in rest.state.tensors.items()} == sizes
    if compat is None:
        torch.testing.assert_close(expected[1, 4:], oracle(m, x[1:, 4:])[0], atol=1e-6, rtol=1e-6)


def test_one_slot_with_equal_shares_is_the_running_mean():
    m, x = made(causal=True, num_landmarks=1), noise(1, 6, 16)
    torch.nn.init.zeros_(m.value_control)
    means = m.v(x).cumsum(1) / torch.arange(1, 7).view(1, 6, 1)
    torch.testing.assert_close(m(x), m.proj(means), atol=1e-6, rtol=1e-6)


def test_how_it_starts():
    m = attnlib.create("abc", dim=64, num_heads=2, num_landmarks=16)
    bound = 2**-0.5 * (6 / 48) ** 0.5
    for control in (m.key_control, m.value_control):
        assert 0.95 * bound < control.abs().max() <= bound
    assert not m.q.bias.any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: made(num_landmarks=0), "num_landmarks"),
        (lambda: made(compat="theirs"), "compat"),
        (lambda: made(dim=15), "num_heads"),
        (
            lambda: made(causal=True)(
                noise(1, 2, 16),
                state=made(causal=True, num_landmarks=2)(noise(1, 2, 16), returns=("state",)).state,
            ),
            "state log_keys must be",
        ),
        (lambda: attnlib.convert_state_dict("abc", {"compress_q": torch.zeros(1)}), "compress_q"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()


def test_more_keys_are_read_by_all_and_refused_in_causal_order():
    """A learned key and one of zeros stand behind the others: as two more tokens whose keys and values are these."""
    m, x = made(add_bias_kv=True, add_zero_attn=True), noise(2, 6, 16)
    plain = made()
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith("bias")})
    k, v = (torch.cat([part(x), bias.expand(2, 1, 16), torch.zeros(2, 1, 16)], 1) for part, bias in
            ((m.k, m.bias_k), (m.v, m.bias_v)))  # fmt: skip
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (m.q(x), k, v))
    out, _, _ = plain.mix_heads(q, k, v, None, False, None, False)
    torch.testing.assert_close(m(x), m.proj(out.transpose(1, 2).flatten(2)))
    valid = torch.arange(6) < 4
    torch.testing.assert_close(m(x, valid=valid.expand(2, -1))[:, :4], m(x[:, :4]))
    with pytest.raises(ValueError, match="needs a context"):
        made(causal=True, add_zero_attn=True)(x)
    assert made(causal=True, add_bias_kv=True)(x, noise(2, 3, 16)).shape == (2, 6, 16)


def test_learned_keys_of_a_mechanism_that_has_none_are_refused_by_name():
    theirs = {"bias_k": torch.zeros(1, 1, 16), "q_proj.weight": torch.zeros(16, 16)}
    for slug in ("lara", "nystromformer"):
        with pytest.raises(ValueError, match="bias_k"):
            attnlib.convert_state_dict(slug, theirs)
    assert attnlib.convert_state_dict("abc", theirs)["bias_k"].shape == (1, 16)
