import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib
from attnlib.nn.linear.lightning_attention_2 import decay_slopes
from attnlib.ops.linear import linear_attention

FIXTURE = Fixture("lightning-attention-2")


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    module = FIXTURE.build(case)
    FIXTURE.holds(case, module, lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize("chunk", [1, 4, 7, 19, 64])
def test_operator_equals_the_authors_whatever_the_chunk(chunk):
    t = FIXTURE.under("operator")
    q, k, v = (t[n].requires_grad_() for n in "qkv")
    out = linear_attention(q, k, v, decay=-t["s"], chunk=chunk)
    torch.testing.assert_close(out, t["o"], atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad((out * t["g"]).sum(), (q, k, v))
    for name, grad in zip("qkv", grads, strict=True):
        torch.testing.assert_close(grad, t[f"d{name}"], atol=1e-5, rtol=1e-5)


def test_slopes():
    torch.testing.assert_close(decay_slopes(8), 0.5 ** torch.arange(1, 9))
    torch.testing.assert_close(decay_slopes(3), FIXTURE.under("operator")["s"])
    first, last = decay_slopes(8, 0, 12), decay_slopes(8, 11, 12)
    assert float(first[0]) == pytest.approx(0.5 * (1 + 1e-5)) and float(last.max()) < 1e-5


def test_slopes_of_a_list_and_none_at_all():
    m = attnlib.create("lightning-attention-2", dim=8, num_heads=2, slopes=[0.0, 0.5], chunk=4)
    assert m.slopes.tolist() == [0.0, 0.5]
    x = torch.randn(1, 9, 8)
    free = attnlib.create("lightning-attention-2", dim=8, num_heads=2, slopes=[0.0, 0.0], norm="none", gate="none")
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (F.silu(free.q(x)), F.silu(free.k(x)), free.v(x)))
    out = linear_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(free(x), free.proj(out), atol=1e-6, rtol=1e-5)
    for wrong in ([0.1], [0.1, -0.1]):
        with pytest.raises(ValueError, match="slopes must be"):
            attnlib.create("lightning-attention-2", dim=8, num_heads=2, slopes=wrong)


def test_released_layer_is_its_equation():
    torch.manual_seed(0)
    sd = {"qkvu_proj.weight": torch.randn(48, 12) * 0.3, "out_proj.weight": torch.randn(12, 12) * 0.3}
    m = attnlib.create("lightning-attention-2", dim=12, num_heads=2, chunk=4, layer=1, num_layers=3)
    m.load_state_dict(attnlib.convert_state_dict("lightning-attention-2", sd))
    x = torch.randn(2, 9, 12)
    q, k, v, u = (x @ sd["qkvu_proj.weight"].T).chunk(4, -1)
    q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in (F.silu(q), F.silu(k), v))
    distance = (torch.arange(9)[:, None] - torch.arange(9)).float()
    decay = torch.exp(-decay_slopes(2, 1, 3)[:, None, None] * distance).tril()
    o = (((q @ k.transpose(-2, -1)) * decay) @ v).transpose(1, 2).flatten(2)
    o = u * o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(m(x), o @ sd["out_proj.weight"].T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lrpe", [False, True])
def test_streaming_in_pieces_equals_at_once(lrpe):
    m = attnlib.create("lightning-attention-2", dim=16, num_heads=4, lrpe=lrpe, chunk=4)
    x, state, pieces = torch.randn(2, 14, 16), None, []
    for part in x.split([5, 1, 1, 7], 1):
        y, state = m.step(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), m(x), atol=1e-5, rtol=1e-4)
    assert state["tokens"].tolist() == [14, 14] and state["S"].dtype == torch.float32


@pytest.mark.parametrize("lrpe", [False, True])
def test_left_padding_changes_nothing(lrpe):
    m = attnlib.create("lightning-attention-2", dim=16, num_heads=4, lrpe=lrpe, chunk=4)
    x = torch.randn(1, 9, 16)
    padded = torch.cat([torch.full((1, 5, 16), 7.0), x], 1)
    valid = torch.arange(14)[None] >= 5
    y, state = m.step(padded[:, :12], None, valid=valid[:, :12])
    rest, _ = m.step(padded[:, 12:], state)
    torch.testing.assert_close(torch.cat([y, rest], 1)[:, 5:], m(x), atol=1e-5, rtol=1e-4)
    assert bool((y[:, :5] == 0).all())


def test_state_does_not_grow():
    m = attnlib.create("lightning-attention-2", dim=16, num_heads=4)
    sizes = {m.step(torch.randn(1, n, 16))[1].numel() for n in (1, 10, 100)}
    assert len(sizes) == 1


def test_a_head_without_decay_is_plain_linear_attention():
    m = attnlib.create("lightning-attention-2", dim=8, num_heads=1, slopes=torch.zeros(1), norm="none", gate="none")
    x = torch.randn(1, 10, 8)
    w = (F.silu(m.q(x)) @ F.silu(m.k(x)).transpose(-2, -1)).tril()
    torch.testing.assert_close(m(x), m.proj(w @ m.v(x)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(causal=False), "causal=False is not possible"),
        (dict(num_heads=3), "num_heads=3 does not divide dim=16"),
        (dict(activation="gelu"), "activation='gelu'"),
        (dict(norm="batch"), "norm='batch'"),
        (dict(gate="yes"), "gate='yes'"),
        (dict(layer=4, num_layers=4), "layer=4 is not possible"),
        (dict(slopes=torch.zeros(3)), "slopes must be"),
        (dict(slopes=-torch.ones(4)), "at least 0"),
        (dict(chunk=0), "chunk must be an integer of at least 1"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        attnlib.create("lightning-attention-2", **{"dim": 16, "num_heads": 4, **config})


def test_bad_calls():
    m = attnlib.create("lightning-attention-2", dim=16, num_heads=4)
    with pytest.raises(ValueError, match="takes no context"):
        m(torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="takes no mask"):
        m(torch.randn(1, 3, 16), mask=attnlib.masks.causal())
    other = attnlib.create("lightning-attention-2", dim=16, num_heads=2)
    with pytest.raises(ValueError, match="state S must be"):
        m.step(torch.randn(1, 1, 16), other.step(torch.randn(1, 3, 16))[1])
