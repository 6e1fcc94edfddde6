"""What a mechanism is handed is looked at where it enters: the state's owner and form, the type and place of tokens."""

import pytest
import torch
from table import rows

import attnlib
from attnlib import State
from attnlib.check.subject import Subject
from attnlib.nn.registry import find


def make(name="softmax-attention", **config):
    return attnlib.create(name, **{"dim": 8, "num_heads": 2, "causal": True, **config}).eval()


X = torch.randn(2, 3, 8)


@pytest.mark.parametrize(
    "state, error, words",
    [
        (lambda: {}, TypeError, "state must be an attnlib State"),
        (lambda: State({}), ValueError, "state holds nothing"),
        (lambda: make("lolcats").step(X)[1], ValueError, "state belongs to 'lolcats', not to 'softmax-attention'"),
        (lambda: make().step(X[:1])[1], ValueError, "state holds 'k' of 1 samples, but x has 2"),
        (lambda: make(num_heads=4).step(X)[1], ValueError, r"state holds k of shape \(2, 4, 3, 2\), .*\(2, 2, M, 4\)"),
        (lambda: make().double().step(X.double())[1], (ValueError, TypeError), "state"),
        (lambda: make().step(X)[1].map(lambda t: t.to("meta")), ValueError, "state holds 'k' on meta"),
        (lambda: State({"S": torch.zeros(2, 2, 4, 4)}), (ValueError, KeyError), "state holds"),
    ],
)
def test_a_state_of_something_else_is_refused(state, error, words):
    m = make()
    with pytest.raises(error, match=words):
        m.step(X, state())
    y, state = m.step(X)
    assert state.kind == "softmax-attention"
    torch.testing.assert_close(m.step(X[:, :1], state)[0], m(torch.cat([X, X[:, :1]], 1))[:, 3:])


@pytest.mark.parametrize(
    "x, error, words",
    [
        (X.half(), TypeError, "x has torch.float16, but the parameters of softmax-attention have torch.float32"),
        (X.long(), TypeError, "x must be.*int64"),
        (X.to("meta"), ValueError, "x on meta"),
        (X.tolist(), TypeError, "x must be a torch.Tensor"),
        (X.to_sparse(), TypeError, "x must be a dense tensor, got torch.sparse_coo"),
        (torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged), TypeError, "x must be a dense .*valid"),
        (X.to(torch.complex64), TypeError, "x must be.*complex64"),
        (X.to(torch.float8_e4m3fn), TypeError, "x must be.*float8_e4m3fn.*convert it, to torch.bfloat16"),
    ],
)
def test_tokens_of_another_kind_are_refused(x, error, words):
    with pytest.raises(error, match=words):
        make()(x)


def test_autocast_takes_what_it_casts():
    with torch.autocast("cpu", torch.bfloat16):
        assert make()(X.bfloat16()).shape == X.shape


def test_weights_that_are_brought_in_when_needed_do_not_refuse():
    """An offloaded module has its parameters on meta until a hook of the layer fetches them."""
    m = make()
    m.q.register_forward_pre_hook(lambda layer, args: None)
    whole = m(X)
    held = m.proj.weight.data
    m.proj.weight = torch.nn.Parameter(held.to("meta"))
    m.proj.register_forward_pre_hook(lambda layer, args: setattr(layer, "weight", torch.nn.Parameter(held)))
    assert torch.equal(m(X), whole)


STREAMING = [row for row in rows() if ":" not in row.name and find(row.name)(**row.config).eval().traits.streaming]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in STREAMING])
def test_a_state_of_another_type_is_refused(row):
    s = Subject(row)
    m, x = s.fresh(torch.float32), s.x(dtype=torch.float32)
    _, state = m.step(x[:, :3])
    if not any(t.is_floating_point() for _, t in state._named()):
        return  # it only counts
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        other = state.map(lambda t, dtype=dtype: t.to(dtype) if t.is_floating_point() else t)
        with pytest.raises(TypeError, match=f"state holds '.*' in {dtype}, but beside x of torch.float32"):
            m.step(x[:, 3:], other)
    with torch.autocast("cpu", torch.bfloat16):  # keys of a step under autocast are bfloat16
        _, state = m.step(x[:, 3:4], m.step(x[:, :3])[1])
        assert m.step(x[:, 4:5], state)[0].isfinite().all()


def test_masks_of_keys_serve_all_queries():
    m, keys = make(causal=False), torch.tensor([[True, False, True], [True, True, False]])
    torch.testing.assert_close(m(X, mask=keys[:, None, None]), m(X, mask=keys[:, None].expand(2, 3, 3)))
    context = torch.randn(2, 5, 8)
    mask = torch.rand(2, 1, 1, 5) > 0.3
    torch.testing.assert_close(m(X, context, mask=mask), m(X, context, mask=mask.expand(2, 1, 3, 5)))
    local = attnlib.create("fused-neighborhood-attention", dim=8, num_heads=2, kernel_size=3).eval()
    image, mask = torch.randn(2, 4, 4, 8), torch.rand(1, 1, 1, 16) > 0.3
    torch.testing.assert_close(local(image, mask=mask), local(image, mask=mask.expand(1, 1, 16, 16)))


@pytest.mark.parametrize("router", ["linear", "norm"])
def test_heads_are_routed_under_vmap_too(router):
    m = attnlib.create(
        "moh-mixture-of-heads", dim=16, num_heads=4, shared_heads=2, active_heads=1, router=router
    ).eval()  # fmt: skip
    x = torch.randn(3, 5, 16)
    one = torch.func.vmap(lambda t: m(t[None])[0])
    torch.testing.assert_close(one(x), m(x))
    p = {n: t.detach() for n, t in m.named_parameters()}
    loss = lambda p, t: torch.func.functional_call(m, p, (t[None],)).square().sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(p, x)
    m(x).square().sum().backward()
    torch.testing.assert_close(each["proj.weight"].sum(0), m.proj.weight.grad, rtol=1e-4, atol=1e-4)


def test_what_counts_numbers_refuses_vmap_by_name():
    m = attnlib.create("key-driven-gqa", dim=16, num_heads=4).eval()
    x = torch.randn(3, 5, 16)
    with pytest.raises(ValueError, match="by numbers that vmap does not let it read; possible: plan="):
        torch.func.vmap(lambda t: m(t[None])[0])(x)
    plan = m.plan(x)
    torch.testing.assert_close(torch.func.vmap(lambda t: m(t[None], plan=plan)[0])(x), m(x, plan=plan))
