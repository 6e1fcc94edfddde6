"""Every operator on every backend: derivatives and transforms are right, or refused by name with what can."""

import functools
import re
import traceback

import pytest
import torch
from reference import generator

from attnlib import masks as M
from attnlib import ops, use_backend
from attnlib.grids import window_partition
from attnlib.positions import AxisBias
from attnlib.types import Partial


def leaves(*shapes, seed=0):
    g = generator(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes]


VALID = torch.tensor([[True] * 5 + [False], [False] + [True] * 5])
PLAN = ops.BlockPlan(torch.tensor([[0, 1], [1, 2], [0, 2]]), 2, 2, 6)
QKV = ((2, 2, 6, 3), (2, 1, 6, 3), (2, 1, 6, 2))
GRID = ((1, 2, 8, 3), (1, 2, 8, 3), (1, 2, 8, 3))


def decayed(x):
    return -x.square() * 0.3


#: name: operator, shapes of the inputs, the call on them. All results are tensors or partials.
CASES = {
    "attention": ("attention", (*QKV, (2, 6, 6)), lambda q, k, v, b: ops.attention(q, k, v, bias=b, mask=M.causal())),
    "attention, valid": ("attention", QKV, lambda q, k, v: ops.attention(q, k, v, valid=VALID)),
    "attention, axes": (
        "attention",
        (*QKV, (2, 2, 6, 2), (1, 1, 6, 3)),
        lambda q, k, v, a, b: ops.attention(q, k, v, bias=AxisBias([a, b]), valid=VALID),
    ),
    "attention, sigmoid": ("attention", QKV, lambda q, k, v: ops.attention(q, k, v, normalizer="sigmoid")),
    "attention, sums": (
        "attention",
        QKV,
        lambda q, k, v: ops.attention(q, k, v, normalizer="softplus_l1", mask=M.recent(3)),
    ),
    "attention, partial": ("attention", QKV, lambda q, k, v: ops.attention_partial(q, k, v, mask=M.recent(3))),
    "blocks": (
        "block_sparse_attention",
        (*QKV, (2, 6, 6)),
        lambda q, k, v, b: ops.block_sparse_attention(q, k, v, PLAN, bias=b, valid=VALID, mask=M.causal()),
    ),
    "blocks, partial": ("block_sparse_attention", QKV, lambda q, k, v: ops.block_sparse_partial(q, k, v, PLAN)),
    "neighborhood": (
        "neighborhood_attention",
        (*GRID, (2, 5), (1, 2, 8, 5)),
        lambda q, k, v, t, a: ops.neighborhood_attention(q, k, v, None, 3, bias_table=t, axis_bias=[a]),
    ),
    "neighborhood, partial": (
        "neighborhood_attention",
        GRID,
        lambda q, k, v: ops.neighborhood_partial(q, k, v, None, 3),
    ),
    "groups": (
        "partition_attention",
        (*GRID, (4, 4)),
        lambda q, k, v, b: ops.partition_attention(q, k, v, window_partition((2, 4), 2), bias=b),
    ),
    "windows": ("window_attention", GRID, lambda q, k, v: ops.window_attention(q, k, v, (2, 4), 2, mask=M.causal())),
    "halo": (
        "halo_attention",
        (*GRID, (2, 4, 16), (1, 2, 8, 5), (1, 2, 8, 5)),
        lambda q, k, v, b, y, x: ops.halo_attention(q, k, v, (2, 4), 2, 1, bias=b, axis_tables=[y, x]),
    ),
    "agents": (
        "agent_attention",
        ((1, 2, 6, 3), (1, 2, 2, 3), (1, 2, 5, 3), (1, 2, 5, 2), (2, 2, 5)),
        lambda q, a, k, v, b: ops.agent_attention(q, a, k, v, read_bias=b, valid=VALID[:1, :5]),
    ),
    "reduced": (
        "reduced_attention",
        QKV,
        lambda q, k, v: ops.reduced_attention(q, k, v, 2, valid=VALID, mask=M.causal()),
    ),
    "reversed": (
        "reversed_attention",
        ((2, 2, 6, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2, 2, 6)),
        lambda q, k, v, m: ops.reversed_attention(
            q, k, v, log_message=m, mask=M.causal(), valid=VALID, receiver_valid=VALID.flip(1)
        ),
    ),
    "channels": ("channel_attention", GRID, lambda q, k, v: ops.channel_attention(q, k, v, l2=True)),
    "depthwise": (
        "depthwise",
        ((2, 3, 4, 2), (2, 1, 3, 3), (2,)),
        lambda x, w, b: ops.depthwise(x, w, b, dilation=2).square(),
    ),
    "given weights": (
        "neighborhood_av",
        ((1, 2, 4, 5, 9), (1, 2, 4, 5, 3)),
        lambda w, v: ops.neighborhood_av(w, v, 3).square(),
    ),
    "linear": ("linear_attention", QKV, lambda q, k, v: ops.linear_attention(q, k, v, valid=VALID, chunk=4)),
    "linear, sum": (
        "linear_attention",
        (*QKV, (2, 6)),
        lambda q, k, v, w: ops.linear_attention(
            q.exp(), k.exp(), v, key_weights=w.exp(), normalizer="sum", causal=False, chunk=4
        ),
    ),
    "linear, decay": (
        "linear_attention",
        (*QKV, (2,)),
        lambda q, k, v, g: ops.linear_attention(q, k, v, decay=decayed(g), chunk=4, cu_seqlens=[0, 3, 6]),
    ),
    "linear, decay of tokens": (
        "linear_attention",
        (*QKV, (2, 2, 6)),
        lambda q, k, v, g: ops.linear_attention(q, k, v, decay=decayed(g), chunk=4, causal=False),
    ),
    "linear, decay of channels": (
        "linear_attention",
        (*QKV, (2, 2, 6, 3)),
        lambda q, k, v, g: ops.linear_attention(q, k, v, decay=decayed(g), chunk=4),
    ),
    "linear, partial": ("linear_attention", QKV, lambda q, k, v: ops.linear_partial(q.exp(), k.exp(), v, chunk=4)),
    "scan": (
        "selective_scan",
        (*((2, 6, 4),) * 2, (4, 3), *((2, 6, 3),) * 2, (4,), (2, 6, 4)),
        lambda u, d, a, b, c, skip, z: ops.selective_scan(
            u, d, decayed(a), b, c, skip, z, delta_softplus=True, valid=VALID, chunk=4, cu_seqlens=[0, 3, 6]
        ),
    ),
    "scan, groups and positions": (
        "selective_scan",
        ((2, 4, 4), (2, 9, 4), (4, 3), *((2, 4, 2, 3),) * 2),
        lambda u, d, a, b, c: ops.selective_scan(
            u, d.exp(), decayed(a), b, c, positions=torch.tensor([[0, 2, 3, 7], [1, 4, 5, 8]]), chunk=3
        ),
    ),
    "toeplitz": (
        "toeplitz_attention",
        (*QKV, (2, 11)),
        lambda q, k, v, b: ops.toeplitz_attention(q.exp(), k.exp(), v, b),
    ),
    "toeplitz on a grid": (
        "toeplitz_attention",
        (*QKV, (1, 3, 5)),
        lambda q, k, v, b: ops.toeplitz_attention(q.exp(), k.exp(), v, b, grid=(2, 3), valid=VALID),
    ),
    "sampled": (
        "deformable_attention",
        ((1, 1, 8, 3), (1, 2, 3, 2, 2, 2), (1, 2, 3, 2, 2)),
        lambda v, at, w: ops.deformable_attention(v, [(2, 2), (1, 4)], at * 0.3 + 0.4, w),
    ),
    "sampled, 3d": (
        "deformable_attention_3d",
        ((1, 1, 8, 3), (1, 1, 8, 4), (1, 2, 3, 2, 2, 3), (1, 2, 3, 2, 2)),
        lambda v, d, at, w: ops.deformable_attention_3d(v, d, [(2, 2), (1, 4)], at * 0.3 + 0.4, w),
    ),
    "late interaction": (
        "late_interaction",
        ((3, 4, 3), (2, 6, 3)),
        lambda x, y: ops.late_interaction(x, y, y_valid=VALID),
    ),
    "split": (
        "split_decoding",
        ((2, 2, 2, 3), (2, 1, 6, 3), (2, 1, 6, 2)),
        lambda q, k, v: ops.split_decoding(q, k, v, lengths=[6, 3], causal=True, tile=2),
    ),
}
PAIRS = [(name, backend) for name, (op, *_) in CASES.items() for backend in ops.derivatives(op) if backend != "flex"]


def scalar(name):
    """The case as a function to a number, curved in its outputs."""
    call = CASES[name][2]

    def fn(*tensors):
        out = call(*tensors)
        parts = [out] if isinstance(out, torch.Tensor) else [out.finish(), out.lse()]
        if isinstance(out, Partial):
            parts[1] = parts[1].masked_fill(parts[1] == float("-inf"), 0.0)
        return sum((p * torch.linspace(-1, 2, p.numel(), dtype=p.dtype).view(p.shape)).sin().sum() for p in parts)

    return fn


def inputs(name, grad=True, seed=0):
    return [t.requires_grad_(grad) for t in leaves(*CASES[name][1], seed=seed)]


def first(name):
    x = inputs(name)
    return torch.autograd.grad(scalar(name)(*x), x)


def second(name):
    """A Hessian times a vector, by the gradient of a gradient."""
    x, direction = inputs(name), leaves(*CASES[name][1], seed=1)
    grads = torch.autograd.grad(scalar(name)(*x), x, create_graph=True)
    return torch.autograd.grad(sum((g * d).sum() for g, d in zip(grads, direction, strict=True)), x)


def third(name):
    x, direction = inputs(name), leaves(*CASES[name][1], seed=1)
    value = scalar(name)(*x)
    for _ in range(2):
        grads = torch.autograd.grad(value, x, create_graph=True)
        value = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    return torch.autograd.grad(value, x)


def batched(name):
    """Several gradients at once, as ``torch.autograd.functional.jacobian(vectorize=True)`` takes them."""
    x = inputs(name)
    out = torch.stack([scalar(name)(*x), scalar(name)(*(t * 2 for t in x))])
    return torch.autograd.grad(out, x, torch.eye(2, dtype=out.dtype), is_grads_batched=True)


def forward(name):
    x, direction = inputs(name, False), leaves(*CASES[name][1], seed=1)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(x, direction, strict=True)]
        return (torch.autograd.forward_ad.unpack_dual(scalar(name)(*duals)).tangent,)


def jvp(name):
    x, direction = inputs(name, False), leaves(*CASES[name][1], seed=1)
    return torch.func.jvp(scalar(name), tuple(x), tuple(direction))


def per_sample(name):
    x = [torch.stack([t, -t, t / 2]) for t in inputs(name, False)]
    return torch.func.vmap(torch.func.grad(scalar(name), argnums=tuple(range(len(x)))))(*x)


def one_batched(name):
    """Only one input has the new axis, the last time the last one."""
    x = inputs(name, False)
    return [
        torch.func.vmap(scalar(name), in_dims=tuple(0 if i == j else None for j in range(len(x))))(
            *(torch.stack([t, -t]) if i == j else t for j, t in enumerate(x))
        )
        for i in range(len(x))
    ]


def hessian(name):
    """Forward over reverse, of one column."""
    x, direction = inputs(name, False), leaves(*CASES[name][1], seed=1)
    gradient = torch.func.grad(scalar(name), argnums=tuple(range(len(x))))
    return torch.func.jvp(gradient, tuple(x), tuple(direction))[1]


ALWAYS = {f.__name__: f for f in (first, second, third, batched)}
TRANSFORMS = {f.__name__: f for f in (forward, jvp, per_sample, one_batched, hessian)}
ALL = {**ALWAYS, **TRANSFORMS}


@functools.cache
def oracle(name, what):
    with use_backend("eager"):
        return ALL[what](name)


@pytest.mark.parametrize(("name", "backend"), PAIRS, ids=str)
def test_every_backend_is_right_or_refuses_by_name(name, backend):
    stated = ops.derivatives(CASES[name][0])[backend]
    able = set()
    with use_backend(backend):
        try:
            scalar(name)(*inputs(name, False))
        except ValueError as error:
            assert f"backend={backend!r} cannot serve this call: " in str(error)
            return
        for what, fn in ALL.items():
            refusal = stated["vmap"] if what in TRANSFORMS else stated["second"]
            if refusal.startswith("right"):
                for ours, spec in zip(fn(name), oracle(name, what), strict=True):
                    torch.testing.assert_close(
                        ours, spec, rtol=1e-9, atol=1e-10, msg=lambda m, what=what: f"{what}: {m}"
                    )
                able.add(what)
            else:
                with pytest.raises(
                    ValueError, match=r"cannot serve this call: .*no forward mode and no vmap; possible"
                ):
                    fn(name)
    assert able >= set(ALWAYS)


@pytest.mark.parametrize("name", list(CASES))
def test_the_automatic_choice_serves_every_derivative(name):
    for what, fn in ALL.items():
        for ours, spec in zip(fn(name), oracle(name, what), strict=True):
            torch.testing.assert_close(ours, spec, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", list(CASES))
def test_the_specification_against_finite_differences(name):
    with use_backend("eager"):
        assert torch.autograd.gradcheck(scalar(name), inputs(name))


@pytest.mark.parametrize("name", ["attention", "attention, sums", "blocks", "linear, decay of tokens", "toeplitz"])
def test_whole_hessians(name):
    """As torch.autograd.functional and torch.func make them, of the first input."""
    x = inputs(name, False)

    def of_first(t):
        return scalar(name)(t, *x[1:])

    with use_backend("eager"):
        exact = torch.autograd.functional.hessian(of_first, x[0])
    torch.testing.assert_close(torch.func.hessian(of_first)(x[0]), exact)
    for vectorize in (False, True):
        torch.testing.assert_close(torch.autograd.functional.hessian(of_first, x[0], vectorize=vectorize), exact)


def test_dropout_of_sdpa_refuses_a_second_derivative():
    q, k, v = (t.requires_grad_() for t in leaves((1, 1, 4, 3), (1, 1, 4, 3), (1, 1, 4, 3)))
    out = ops.attention(q, k, v, dropout_p=0.5, backend="sdpa")
    with pytest.raises(NotImplementedError, match="no second derivative with dropout; possible: .'eager'."):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_writing_into_the_output_is_found_out_or_right():
    """The node that keeps second derivatives right is no view: what autograd could do before, it can still do."""
    q, k, v = (t.requires_grad_() for t in leaves((1, 1, 80, 3), (1, 1, 80, 3), (1, 1, 80, 3)))
    plain = torch.autograd.grad((ops.attention(q, k, v, backend="tiled") * 2).sum(), q)[0]
    written = torch.autograd.grad(ops.attention(q, k, v, backend="tiled").mul_(2).sum(), q)[0]
    torch.testing.assert_close(written, plain)


@pytest.mark.parametrize("name", [name for name, (op, *_) in CASES.items() if "flex" in ops.derivatives(op)])
def test_flex_has_none_on_the_cpu_and_says_so(name):
    """It never gets as far as its compiler."""
    stated = ops.derivatives(CASES[name][0])["flex"]
    assert "refused on the CPU" in stated["first"] and stated["vmap"] == stated["forward"]
    assert stated["vmap"].startswith("refused: it compiles its kernels; possible: ")
    x, direction = ([t.float() for t in leaves(*CASES[name][1], seed=seed)] for seed in (0, 1))
    with use_backend("flex"):
        with pytest.raises(ValueError, match="backend='flex' cannot serve this call: "):
            scalar(name)(*(t.clone().requires_grad_() for t in x))
        for transform in (
            lambda: torch.func.jvp(scalar(name), tuple(x), tuple(direction)),
            lambda: torch.func.vmap(scalar(name))(*(torch.stack([t, -t]) for t in x)),
            lambda: torch.func.grad(scalar(name))(*x),
        ):
            with pytest.raises(ValueError, match="it compiles its kernels, so it has no forward mode and no vmap"):
                transform()


def of_another_kind(t):
    """What is no dense tensor that can be calculated with, and how it is called."""
    yield t.to_sparse(), "dense tensor|sparse"
    if t.dim() > 1:
        yield torch.nested.nested_tensor([t[0], t[0]], layout=torch.jagged), "dense tensor|nested"
    yield t.to(torch.complex64), "complex64"
    yield t.float().to(torch.float8_e4m3fn), "float8_e4m3fn|share one floating dtype"


@pytest.mark.parametrize("name", list(CASES))
def test_tensors_of_another_kind_are_refused_by_name(name):
    """Nothing of torch's internals comes out, whichever tensor it is."""
    x, call = inputs(name, False), CASES[name][2]
    for i, t in enumerate(x):
        for other, words in of_another_kind(t):
            operands = [other if j == i else one for j, one in enumerate(x)]
            try:
                call(*operands)
            except (TypeError, ValueError) as error:
                assert re.search(words, str(error)), f"input {i}: {error}"
            except (NotImplementedError, RuntimeError) as error:
                inside = any(
                    "attnlib" in f.filename and "tests" not in f.filename
                    for f in traceback.extract_tb(error.__traceback__)
                )
                assert not inside, f"input {i}, {words}: {type(error).__name__}: {error}"  # else the case itself broke
            else:
                raise AssertionError(f"input {i}, {words}: accepted")


def test_which_pairs_meet_may_be_batched():
    q, k, v = leaves((3, 2, 2, 4, 3), (3, 2, 1, 5, 3), (3, 2, 1, 5, 2))
    g = generator(1)
    keys, pairs = torch.rand(3, 2, 5, generator=g) > 0.3, torch.rand(3, 4, 5, generator=g) > 0.3
    at = torch.randint(0, 5, (3, 4), generator=g)
    for call, decide in (
        (lambda q, k, v, d: ops.attention(q, k, v, valid=d), keys),
        (lambda q, k, v, d: ops.attention(q, k, v, mask=d), pairs),
        (lambda q, k, v, d: ops.attention(q, k, v, mask=M.causal(), q_pos=d), at),
        (lambda q, k, v, d: ops.attention_partial(q, k, v, valid=d).finish(), keys),
        (lambda q, k, v, d: ops.reduced_attention(q, k, v, 2, valid=d), keys),
        (lambda q, k, v, d: ops.linear_attention(q, k, v, valid=d, causal=False), keys),
    ):
        expected = torch.stack([call(q[i], k[i], v[i], decide[i]) for i in range(3)])
        torch.testing.assert_close(torch.func.vmap(call)(q, k, v, decide), expected)
        alone = torch.func.vmap(call, in_dims=(None, None, None, 0))(q[0], k[0], v[0], decide)
        torch.testing.assert_close(alone, torch.stack([call(q[0], k[0], v[0], d) for d in decide]))


def test_every_operator_states_its_derivatives():
    covered = {op for op, *_ in CASES.values()}
    assert covered == {op for op in ops.operators() if not op.endswith("_partial")}
    for op in covered:
        for stated in ops.derivatives(op).values():
            assert set(stated) == {"first", "second", "forward", "vmap"}
