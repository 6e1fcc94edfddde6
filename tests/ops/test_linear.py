"""Linear attention: every form against the definition, and against each other."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnlib import State
from attnlib.ops.feature_maps import FEATURE_MAPS, feature_map
from attnlib.ops.linear import linear_attention, linear_partial

DECAYS = ("none", "head", "token", "channel")


def problem(n=23, m=None, batch=2, heads=3, d=4, dv=5, seed=0, decay="none", dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    q, k, v = (
        torch.randn(batch, heads, *shape, generator=gen, dtype=dtype, requires_grad=True)
        for shape in ((n, d), (m, d), (m, dv))
    )
    shape = {"none": None, "head": (heads,), "token": (batch, heads, n), "channel": (batch, heads, n, d)}[decay]
    g = None if shape is None else -torch.rand(shape, generator=gen, dtype=dtype)
    return q, k, v, None if g is None else g.requires_grad_()


def by_definition(q, k, v, decay=None, causal=True, cu=None, weights=None, state=None):
    """Sums over pairs, one by one."""
    batch, heads, n, d = q.shape
    out = q.new_zeros(batch, heads, n, v.shape[-1])
    den = q.new_zeros(batch, heads, n)
    bounds = [0, n] if cu is None else cu
    for b, h, t in itertools.product(range(batch), range(heads), range(n)):
        s = max(i for i in range(len(bounds) - 1) if bounds[i] <= t and bounds[i] < bounds[i + 1])
        for j in range(bounds[s], t + 1 if causal else bounds[s + 1]):
            lo, hi = min(j, t), max(j, t)
            factor = q.new_ones(d)
            if decay is not None:
                g = decay[h] * (hi - lo) if decay.dim() == 1 else decay[b, h, lo + 1 : hi + 1].sum(0)
                factor = g.exp() * q.new_ones(d)
            w = (q[b, h, t] * k[b, h, j] * factor).sum() * (1 if weights is None else weights[b, h, j])
            out[b, h, t] += w * v[b, h, j]
            den[b, h, t] += w
        if state is not None and s == 0:
            g = q.new_zeros(())
            if decay is not None:
                g = decay[h] * (t + 1) if decay.dim() == 1 else decay[b, h, : t + 1].sum(0)
            out[b, h, t] += (q[b, h, t] * g.exp()) @ state[b, h]
    return out, den


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cu", [None, [0, 1, 1, 6, 9]])
@pytest.mark.parametrize("decay", DECAYS)
def test_parallel_form_is_the_definition(decay, cu, causal):
    q, k, v, g = problem(n=9, batch=1, heads=2, decay=decay)
    weights = torch.rand(1, 2, 9, dtype=torch.float64)
    want, den = by_definition(q, k, v, g, causal, cu, weights)
    call = dict(decay=g, causal=causal, cu_seqlens=cu, key_weights=weights, form="parallel")
    torch.testing.assert_close(linear_attention(q, k, v, **call), want)
    torch.testing.assert_close(linear_attention(q, k, v, normalizer="sum", **call), want / den.unsqueeze(-1))


@pytest.mark.parametrize("form", ["chunkwise", "recurrent"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cu", [None, [0, 3, 3, 4, 17, 23]])
@pytest.mark.parametrize("decay", DECAYS)
def test_forms_agree_forward_and_backward(decay, cu, causal, form):
    q, k, v, g = problem(decay=decay)
    leaves = [t for t in (q, k, v, g) if t is not None]
    valid = torch.rand(2, 23) > 0.3
    with_state = causal
    state = State({"S": torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)}) if with_state else None
    if state is not None:
        leaves.append(state["S"])
    results = []
    for which, chunk in (("parallel", None), (form, 5)):
        out, final = linear_attention(
            q, k, v, decay=g, causal=causal, cu_seqlens=cu, valid=valid, state=state, form=which, chunk=chunk,
            return_state=True,
        )  # fmt: skip
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
        if causal:
            loss = loss + (final["S"] * torch.linspace(-1, 2, 20 * 6, dtype=out.dtype).view(2, 3, 4, 5)).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append((out, final["S"] if causal else None, *grads))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("normalizer", ["none", "sum"])
@pytest.mark.parametrize("decay", DECAYS)
def test_compiled_equals_eager(decay, normalizer):
    q, k, v, g = problem(decay=decay)
    q, k = q.detach().abs(), k.detach().abs()
    cu = torch.tensor([0, 7, 8, 23])
    torch.compiler.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, backend="eager")
    for extra in ({}, {"cu_seqlens": cu}, {"cu_seqlens": cu, "causal": False}):
        call = dict(decay=g, normalizer=normalizer, chunk=4, **extra)
        want, got = linear_attention(q, k, v, **call), compiled(q, k, v, **call)
        torch.testing.assert_close(got, want)
        leaves = [v] if g is None else [v, g]
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (want, got)]
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_custom_operator_is_well_formed(decay):
    q, k, v, g = problem(n=9, dtype=torch.float32, decay=decay)
    g = g.detach().view(1, 3, 1).requires_grad_() if decay == "head" else g
    start = torch.randn(2, 3, 4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.attnlib.linear_chunkwise, (q, k, v, g, None, start, 4, False, True))


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_export_with_a_dynamic_length(decay):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, g):
            if decay == "none":
                g = None
            elif decay == "head":
                g = g[0, :, 0]
            return linear_attention(q, k, v, decay=g, normalizer="sum", chunk=8)

    def inputs(n):
        q, k, v, g = problem(n=n, decay="token")
        return q.detach().abs(), k.detach().abs(), v.detach(), g.detach()

    n = torch.export.Dim("n", min=2, max=4096)
    dims = ({2: n}, {2: n}, {2: n}, {2: n})
    program = torch.export.export(Model(), inputs(24), dynamic_shapes=dims).module()
    for size in (24, 61, 5):
        torch.testing.assert_close(program(*inputs(size)), Model()(*inputs(size)))


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_gradients_against_finite_differences(decay):
    q, k, v, g = problem(n=7, batch=1, heads=2, d=2, dv=2, decay=decay)
    s = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, g, s):
        out, state = linear_attention(q, k, v, decay=g, state=State({"S": s}), chunk=3, return_state=True)
        return out, state["S"]

    assert torch.autograd.gradcheck(run, (q, k, v, g, s))


@pytest.mark.parametrize("n", [0, 1, 3, 16, 37])
@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
def test_any_length_and_the_state_closes_the_gap(n, form):
    q, k, v, g = problem(n=n + 11, decay="token")
    whole, final = linear_attention(q, k, v, decay=g, normalizer="sum", form="parallel", return_state=True)
    first = linear_attention(
        q[:, :, :n], k[:, :, :n], v[:, :, :n], decay=g[:, :, :n], normalizer="sum", form=form, chunk=16,
        return_state=True,
    )  # fmt: skip
    rest = linear_attention(
        q[:, :, n:], k[:, :, n:], v[:, :, n:], decay=g[:, :, n:], normalizer="sum", form=form, chunk=16,
        state=first.state, return_state=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.cat([first.out, rest.out], 2), whole)
    torch.testing.assert_close(rest.state["S"], final["S"])
    torch.testing.assert_close(rest.state["z"], final["z"])


def test_final_state_is_the_decayed_sum():
    q, k, v, g = problem(decay="head")
    age = torch.arange(22, -1, -1, dtype=torch.float64)
    want = torch.einsum("hn,bhnd,bhne->bhde", (g[:, None] * age).exp(), k, v)
    torch.testing.assert_close(linear_attention(q, k, v, decay=g, return_state=True, chunk=4).state["S"], want)


@pytest.mark.parametrize("causal", [True, False])
def test_empty_batch(causal):
    q, k, v, g = problem(batch=0, decay="token")
    out, state = linear_attention(q, k, v, decay=g, causal=causal, return_state=True)
    assert out.shape == (0, 3, 23, 5) and state["S"].shape == (0, 3, 4, 5)
    out.sum().backward()


def test_tokens_that_do_not_exist_change_nothing():
    q, k, v, g = problem(decay="head")
    valid = torch.rand(2, 23) > 0.4
    out, state = linear_attention(q, k, v, decay=g, valid=valid, chunk=4, return_state=True)
    for b in range(2):
        kept = valid[b]
        want = linear_attention(*(t[b : b + 1, :, kept] for t in (q, k, v)), decay=g, return_state=True)
        torch.testing.assert_close(out[b : b + 1, :, kept], want.out)
        torch.testing.assert_close(state["S"][b : b + 1], want.state["S"])
    poisoned = [torch.where(valid[:, None, :, None], t, float("nan")) for t in (k, v)]
    torch.testing.assert_close(linear_attention(q, *poisoned, decay=g, valid=valid, chunk=4), out)


@pytest.mark.parametrize("slope", [0.0, 1e4])
def test_extreme_decays(slope):
    q, k, v, _ = problem(dtype=torch.float32)
    g = torch.full((3,), -slope, requires_grad=True)
    out = linear_attention(q, k, v, decay=g, chunk=4)
    if slope:
        want = (q * k).sum(-1, keepdim=True) * v
    else:
        want = linear_attention(q, k, v)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.sum(), (q, k, v, g))
    assert all(bool(t.isfinite().all()) for t in grads)


def test_half_precision_keeps_a_float32_state():
    q, k, v, g = problem(n=200, decay="head", dtype=torch.float32)
    want, exact = linear_attention(q, k, v, decay=g, return_state=True)
    half = [t.detach().bfloat16() for t in (q, k, v)]
    out, state = linear_attention(*half, decay=g.detach(), return_state=True)
    assert out.dtype == torch.bfloat16 and state["S"].dtype == torch.float32
    assert (out - want).abs().max() < 0.02 * want.abs().max()
    assert (state["S"] - exact["S"]).abs().max() < 0.02 * exact["S"].abs().max()


def test_cross_attention_and_grouped_heads():
    q, k, v, _ = problem(n=5, m=9, heads=4)
    k, v = k[:, :2], v[:, :1]
    want = (q @ k.repeat_interleave(2, 1).transpose(-2, -1)) @ v
    torch.testing.assert_close(linear_attention(q, k, v, causal=False), want)


def test_segments_are_windows_computed_alone():
    q, k, v, _ = problem(n=1100, batch=1, dtype=torch.float32)
    q, k = q.detach().relu(), k.detach().relu()
    cu = [0, 1, 2, 3, 3, 1003, 1100]
    out = linear_attention(q, k, v, causal=False, cu_seqlens=cu, normalizer="sum", eps=1e-6)
    for a, b in itertools.pairwise(cu):
        w = q[:, :, a:b] @ k[:, :, a:b].transpose(-2, -1)
        want = (w @ v[:, :, a:b]) / (w.sum(-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(out[:, :, a:b], want, rtol=1e-4, atol=1e-5)


def test_partial_shares_a_denominator_with_softmax():
    from attnlib import attention_partial

    q, k, v, _ = problem(n=10)
    fq, fk = q.exp(), k.exp()
    part, state = linear_partial(fq, fk, v, causal=False, return_state=True)
    both = attention_partial(q, k, v).merge(part).finish()
    weights = (q @ k.transpose(-2, -1) * 0.5).exp() + fq @ fk.transpose(-2, -1)
    torch.testing.assert_close(both, weights @ v / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(state["z"], fk.sum(2))


def test_a_row_without_weight_gives_zeros():
    q, k, v, _ = problem()
    q = torch.zeros_like(q).requires_grad_()
    out = linear_attention(q, k, v, normalizer="sum")
    assert bool((out == 0).all())
    assert bool((torch.autograd.grad(out.sum(), v)[0] == 0).all())


def test_memory_is_linear():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.numel())
            return out

    sizes = []
    for n in (2048, 8192):
        q, k, v = (torch.zeros(1, 1, n, 8, device="meta", requires_grad=True) for _ in range(3))
        with Largest() as seen:
            linear_attention(q, k, v, decay=torch.zeros(1, device="meta"), normalizer="sum").sum().backward()
        sizes.append(seen.size)
    assert sizes[1] <= 4 * sizes[0] and sizes[1] < 8192 * 64


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_feature_maps(name):
    x = torch.randn(2, 3, 5, 4)
    out = feature_map(name)(x)
    assert out.shape[-1] in (4, 8) and bool(out.isfinite().all())
    if name not in ("identity", "silu"):
        assert bool((out >= 0).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(decay=torch.zeros(4)), ValueError, r"decay must be \(H,\)"),
        (dict(decay=torch.zeros(3, dtype=torch.long)), TypeError, "decay must be a floating"),
        (dict(cu_seqlens=[0, 5]), ValueError, "cu_seqlens must run from 0 to N=23"),
        (dict(cu_seqlens=[0, 9, 4, 23]), ValueError, "cu_seqlens must not decrease"),
        (dict(normalizer="l2"), ValueError, "normalizer='l2'"),
        (dict(form="fast"), ValueError, "form='fast'"),
        (dict(chunk=0), ValueError, "chunk must be an integer of at least 1"),
        (dict(valid=torch.ones(2, 22, dtype=torch.bool)), ValueError, "valid must have shape"),
        (dict(key_weights=torch.ones(2, 22)), ValueError, "key_weights must be"),
        (dict(state=State({"S": torch.zeros(2, 3, 4, 4)})), ValueError, "state S must be"),
        (dict(state=State({"S": torch.zeros(2, 3, 4, 5)}), normalizer="sum"), ValueError, "state has no z"),
        (dict(k=torch.zeros(2, 3, 22, 4), v=torch.zeros(2, 3, 22, 5)), ValueError, "as many queries as keys"),
        (dict(k=torch.zeros(2, 2, 23, 4)), ValueError, "k has 2 heads"),
        (dict(q=torch.zeros(2, 3, 23)), ValueError, "q must have shape"),
    ],
)
def test_bad_input(change, error, message):
    q, k, v, _ = problem(dtype=torch.float32)
    call = {"q": q, "k": k, "v": v, **change}
    with pytest.raises(error, match=message):
        linear_attention(**call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_a_state_of_another_type_is_refused(dtype):
    q = torch.randn(2, 2, 3, 4)
    state = linear_attention(q, q, q, normalizer="sum", return_state=True).state
    for name in ("S", "z"):
        wrong = state.replace(**{name: state[name].to(dtype)})
        with pytest.raises(TypeError, match=f"state {name} must be torch.float32, as return_state gives it, got"):
            linear_attention(q, q, q, normalizer="sum", state=wrong)
    assert linear_attention(q.half(), q.half(), q.half(), normalizer="sum", state=state).dtype == torch.float16


@pytest.mark.parametrize("n", [1, 3])
def test_one_decay_per_head_beside_what_is_not_finite(n):
    q = torch.randn(2, 2, n, 4)
    v = q.clone()
    v[0] = float("inf")
    decay = torch.tensor([-0.1, -0.2])
    out = linear_attention(q, q, v, decay=decay)
    torch.testing.assert_close(out[1], linear_attention(q, q, q, decay=decay)[1])
    assert out[0].isnan().all() and linear_attention(q, q, q, decay=decay * float("nan"))[:, :, 1:].isnan().all()


def subtracted(q, k, v, allowed, weights=None):
    """Weights less their mean over the tokens a row reads, plus one over their number."""
    scores = q @ k.transpose(-2, -1)
    scores = (scores if weights is None else scores * weights.unsqueeze(-2)) * allowed
    count = allowed.sum(-1, keepdim=True).clamp(min=1)
    return (scores - scores.sum(-1, keepdim=True) / count + 1 / count) * allowed


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent", None])
@pytest.mark.parametrize("cu", [None, [0, 3, 3, 4, 17, 23]])
@pytest.mark.parametrize("causal", [True, False])
def test_subtracting_the_mean(causal, cu, form):
    q, k, v, _ = problem()
    weights, valid = torch.rand(2, 3, 23, dtype=torch.float64), torch.rand(2, 23) > 0.3
    number = (
        torch.zeros(23).long() if cu is None else torch.searchsorted(torch.tensor(cu[1:]), torch.arange(23), right=True)
    )
    allowed = number[:, None] == number
    allowed = (allowed.tril() if causal else allowed)[None, None] & valid[:, None, None] & valid[:, None, :, None]
    w = subtracted(q, k, v, allowed, weights)
    rows = w.sum(-1)[valid[:, None].expand(-1, 3, -1)]
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert bool((w < 0).any())
    out = linear_attention(
        q,
        k,
        v,
        normalizer="subtract",
        causal=causal,
        cu_seqlens=cu,
        key_weights=weights,
        valid=valid,
        chunk=5,
        form=form,
    )
    own = valid[:, None, :, None].to(out.dtype)
    torch.testing.assert_close(out * own, w @ v * own)
    for want, got in zip(*(torch.autograd.grad((t * own).cos().sum(), (q, k, v)) for t in (w @ v, out)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("given", ["subtract", "denominator"])
def test_states_of_other_normalizers_close_the_gap(given):
    q, k, v, g = problem(decay="token")
    a, b = torch.rand(2, 2, 3, 23, 6, dtype=torch.float64)

    def call(part, **more):
        more |= dict(normalizer="subtract") if given == "subtract" else dict(
            normalizer="sum", eps=0.1, denominator=(a[:, :, part], b[:, :, part])
        )  # fmt: skip
        more |= dict(decay=g[:, :, part], return_state=True)
        return linear_attention(q[:, :, part], k[:, :, part], v[:, :, part], **more)

    whole, first = call(slice(0, 23)), call(slice(0, 9))
    rest = call(slice(9, 23), state=first.state)
    torch.testing.assert_close(torch.cat([first.out, rest.out], 2), whole.out)
    assert set(rest.state.tensors) == set(whole.state.tensors)
    for name in rest.state.tensors:
        torch.testing.assert_close(rest.state[name], whole.state[name])


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent", None])
@pytest.mark.parametrize("causal", [True, False])
def test_a_denominator_of_other_features(causal, form):
    q, k, v, _ = problem(heads=4)
    k, v = k[:, :2], v[:, :1]
    a, b = torch.rand(2, 4, 23, 6, dtype=torch.float64), torch.rand(2, 2, 23, 6, dtype=torch.float64)
    valid, weights = torch.rand(2, 23) > 0.3, torch.rand(2, 23, dtype=torch.float64)
    out = linear_attention(
        q,
        k,
        v,
        normalizer="sum",
        denominator=(a, b),
        causal=causal,
        valid=valid,
        key_weights=weights,
        eps=1e-2,
        form=form,
    )
    pairs = torch.ones(23, 23).tril() if causal else torch.ones(23, 23)
    pairs = pairs * (weights * valid)[:, None, None]
    num = (q @ k.repeat_interleave(2, 1).transpose(-2, -1) * pairs) @ v
    den = (a @ b.repeat_interleave(2, 1).transpose(-2, -1) * pairs).sum(-1, keepdim=True)
    own = valid[:, None, :, None].to(out.dtype)
    torch.testing.assert_close(out * own, num / (den + 1e-2) * own)


@pytest.mark.parametrize(
    "lengths", [[1] * 9, [1, 0, 2, 300, 0, 7, 129, 1, 0], [0, 0], [1000], [8, 8, 0, 8], [256, 128]]
)
def test_scattered_segments_in_any_sizes(lengths):
    cu = list(itertools.accumulate([0, *lengths]))
    q, k, v, _ = problem(n=cu[-1], batch=1, heads=2)
    call = dict(causal=False, cu_seqlens=cu, normalizer="sum", eps=1e-3, return_state=True)
    results = []
    for form in ("scatter", "parallel"):
        out, state = linear_attention(q.abs(), k.abs(), v, form=form, **call)
        results.append(
            [out, state["S"], state["z"], *torch.autograd.grad(out.sin().sum() + state["S"].sum(), (q, k, v))]
        )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_scattered_segments_differentiate_twice_and_trace():
    q, k, v, _ = problem(n=12, batch=1, heads=2, d=2, dv=2)
    cu = torch.tensor([0, 3, 3, 4, 12])

    def run(q, k, v):
        return linear_attention(q, k, v, causal=False, cu_seqlens=cu, normalizer="subtract", form="scatter")

    assert torch.autograd.gradgradcheck(run, (q, k, v))
    q, k, v = (t.detach().float().requires_grad_() for t in (q, k, v))
    torch.library.opcheck(torch.ops.attnlib.linear_segment_sums, (k, v, cu))
    sums = torch.randn(1, 2, 4, 2, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.attnlib.linear_segment_reads, (q, sums, cu))


def test_scattered_segments_do_the_work_of_their_tokens_alone():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for cu in ([0, 512], list(range(513)), [0, 1, 511, 512]):
        q, k, v = torch.zeros(3, 1, 1, 512, 8)
        with FlopCounterMode(display=False) as seen:
            linear_attention(q, k, v, causal=False, cu_seqlens=cu)
        counts.append(seen.get_total_flops())
    assert counts == [2 * 2 * 512 * 8 * 8] * 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(form="scatter", causal=True), ValueError, "it sums whole segments, so it needs cu_seqlens"),
        (dict(denominator=(torch.ones(2, 3, 23, 2),) * 2), ValueError, "denominator needs normalizer='sum'"),
        (dict(normalizer="sum", denominator=torch.ones(3)), TypeError, "denominator must be a pair"),
        (dict(normalizer="sum", denominator=(torch.ones(2, 3, 9, 2),) * 2), ValueError, "denominator queries must be"),
        (
            dict(normalizer="sum", denominator=(torch.ones(2, 3, 23, 2), torch.ones(2, 3, 23, 4))),
            ValueError, "equally many features, got 2 and 4",
        ),
        (
            dict(normalizer="sum", denominator=(torch.ones(2, 3, 23, 2),) * 2, decay=torch.zeros(2, 3, 23, 4)),
            ValueError, "a decay per channel",
        ),
        (
            dict(normalizer="subtract", state=State({"S": torch.zeros(2, 3, 4, 5), "z": torch.zeros(2, 3, 4)})),
            ValueError, "state has no V, which normalizer='subtract' needs",
        ),
    ],
)  # fmt: skip
def test_bad_input_of_the_later_normalizers(change, error, message):
    q, k, v, _ = problem(dtype=torch.float32)
    with pytest.raises(error, match=message):
        linear_attention(q, k, v, **change)
