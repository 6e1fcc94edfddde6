"""The specification (eager) against loops, and SDPA against the specification."""

import math
import threading
from typing import Any

import pytest
import torch
from reference import bias_cases, generator, gradients, mask_cases, naive_softmax_attention, qkv

from attnlib import masks as M
from attnlib import ops
from attnlib.ops import BACKENDS, attention, attention_partial, explain, use_backend

MASKS = mask_cases()
BIASES = bias_cases()
GROUPS = [(4, 4, 4), (4, 2, 2), (4, 1, 1), (4, 2, 4), (4, 1, 2)]


def _allowed(mask, valid=None, batch=2, heads=4, n=24):
    out = mask.dense(n)
    out = out.reshape((1,) * (4 - out.dim()) + tuple(out.shape)).expand(batch, heads, n, n)
    return out if valid is None else out & valid[:, None, None]


# ---- eager against loops


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_eager_is_attention(heads):
    q, k, v = qkv(heads=heads, n=5, m=7, dv=6)
    torch.testing.assert_close(attention(q, k, v, backend="eager"), naive_softmax_attention(q, k, v))


@pytest.mark.parametrize("name", list(MASKS))
def test_eager_honours_masks_and_valid(name):
    q, k, v = qkv()
    valid = torch.rand(2, 24, generator=generator(3)) > 0.3
    out = attention(q, k, v, mask=MASKS[name], valid=valid, scale=0.3, backend="eager")
    expected = naive_softmax_attention(q, k, v, _allowed(MASKS[name], valid), scale=0.3)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", list(BIASES))
def test_eager_adds_biases(name):
    q, k, v = qkv()
    bias, _ = BIASES[name]()
    expected = naive_softmax_attention(q, k, v, bias=bias.dense().expand(2, 4, 24, 24))
    torch.testing.assert_close(attention(q, k, v, bias=bias, backend="eager"), expected)


def test_eager_passes_gradcheck():
    q, k, v = qkv(batch=1, heads=(2, 1, 1), n=3, m=4, d=2, dv=2)
    bias = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    mask = M.explicit(torch.tensor([[True, False, True, True], [False] * 4, [True] * 4]))
    assert torch.autograd.gradcheck(
        lambda *t: attention(*t[:3], bias=t[3], mask=mask, backend="eager"), (q, k, v, bias)
    )


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "clipped_softmax", "relu", "softplus_l1", "uniform"])
def test_weights_are_what_multiplies_the_values(normalizer):
    q, k, v = qkv()
    out, weights = attention(q, k, v, mask=M.recent(4), normalizer=normalizer, return_weights=True)
    assert weights.shape == (2, 4, 24, 24)
    torch.testing.assert_close(out, weights @ v)
    assert not bool(weights[..., ~M.recent(4).dense(24)].any())


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dropout_drops_a_share_of_the_weights_and_scales_the_others(backend):
    """Values that are the identity show the dropped weights themselves: zero, or exactly ``1 / (1 - p)`` as large."""
    torch.manual_seed(0)
    p, q, k, v = 0.4, torch.randn(1, 2, 60, 4), torch.randn(1, 2, 60, 4), torch.eye(60).expand(1, 2, 60, 60)
    _, weights = attention(q, k, v, return_weights=True)
    dropped = attention(q, k, v, dropout_p=p, backend=backend)
    gone = dropped == 0
    torch.testing.assert_close(dropped, (weights / (1 - p)).masked_fill(gone, 0.0), rtol=1e-5, atol=1e-7)
    deviation = math.sqrt(p * (1 - p) / gone.numel())
    assert abs(float(gone.float().mean()) - p) < 4 * deviation
    assert torch.equal(attention(q, k, v, dropout_p=p, return_weights=True)[1], weights)


# ---- every backend against eager, forward and backward


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("name", [None, *MASKS])
def test_sdpa_is_eager_with_masks(name, heads):
    q, k, v = qkv(heads=heads, dv=6)
    mask = None if name is None else MASKS[name]
    results = []
    for backend in ("eager", "sdpa"):
        out = attention(q, k, v, mask=mask, backend=backend)
        results.append([out, *gradients(out, [q, k, v])])
    for ours, spec in zip(*results, strict=True):
        torch.testing.assert_close(ours, spec, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mask", [None, M.causal(), MASKS["some_empty_rows"]], ids=["all", "causal", "empty rows"])
@pytest.mark.parametrize("name", list(BIASES))
def test_sdpa_is_eager_with_biases(name, mask):
    q, k, v = qkv()
    bias, leaves = BIASES[name]()
    valid = torch.rand(2, 24, generator=generator(3)) > 0.3
    results = []
    for backend in ("eager", "sdpa"):
        out = attention(q, k, v, mask=mask, valid=valid, bias=bias, backend=backend)
        results.append([out, *gradients(out, [q, k, v, *leaves])])
    for ours, spec in zip(*results, strict=True):
        torch.testing.assert_close(ours, spec, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [40, 600])
@pytest.mark.parametrize("height", [-torch.finfo(torch.float32).max, -1e9, -1e4, 3e3])
@pytest.mark.parametrize("backend", [None, "sdpa", "tiled"])
def test_gradients_of_rows_whose_bias_lies_far_from_zero(backend, height, size):
    """What transformers adds to a row that sees nothing: SDPA's own backward loses the scores of such a row."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, size, 8, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, size, size)
    bias[:, :, 3] = height
    g = torch.randn(1, 2, size, 8)
    grads = []
    for name in ("eager", backend):
        y = attention(q, k, v, bias=bias, backend=name)
        grads.append([y, *torch.autograd.grad((y * g).sum(), (q, k, v))])
    for ours, spec in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, spec, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_rows_that_see_nothing_give_zeros_and_zero_gradients(backend):
    q, k, v = qkv(dtype=torch.float32)
    allowed = torch.rand(24, 24, generator=generator(5)) > 0.5
    allowed[3] = allowed[20] = False
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1] = False
    bias = torch.zeros(24, 24, requires_grad=True)
    out = attention(q, k, v, mask=allowed, valid=valid, bias=bias, backend=backend)
    assert not bool(out[:, :, [3, 20]].any()) and not bool(out[1].any()) and bool(out[0, :, 0].all())
    dq, dk, dv, db = gradients(out, [q, k, v, bias])
    for grad in (dq, dk, dv, db):
        assert bool(torch.isfinite(grad).all())
    assert not bool(dq[:, :, [3, 20]].any()) and not bool(db[[3, 20]].any())
    assert not any(bool(g[1].any()) for g in (dq, dk, dv))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_bias_of_minus_infinity_forbids(backend):
    q, k, v = qkv()
    allowed = torch.rand(24, 24, generator=generator(5)) > 0.5
    allowed[7] = False
    bias = torch.zeros(24, 24, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    out = attention(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(out, attention(q, k, v, mask=allowed, backend="eager"))
    for grad in gradients(out, [q, k, v]):
        assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize(
    "shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)], ids=["no batch", "no queries", "no keys", "nothing"]
)
@pytest.mark.parametrize("mask", [None, M.causal()], ids=str)
def test_empty_problems(backend, shape, mask):
    batch, n, m = shape
    q, k, v = qkv(batch=batch, n=n, m=m, dv=6)
    out = attention(q, k, v, mask=mask, valid=torch.ones(batch, m, dtype=torch.bool), backend=backend)
    assert out.shape == (batch, 4, n, 6) and not bool(out.any())
    for grad, x in zip(gradients(out, [q, k, v]), (q, k, v), strict=True):
        assert grad.shape == x.shape and not bool(grad.any())


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize(("d", "dv"), [(4, 0), (0, 3), (0, 0)])
def test_heads_without_channels(backend, d, dv):
    """Queries without channels meet all keys alike; values without channels give rows without any."""
    q, k, v = (torch.randn(2, 4, n, width, requires_grad=True) for n, width in ((5, d), (6, d), (6, dv)))
    out = attention(q, k, v, backend=backend)
    want = v.mean(2, keepdim=True).expand_as(out) if d == 0 else v.new_zeros(2, 4, 5, 0)
    torch.testing.assert_close(out, want)
    for grad, x in zip(gradients(out, [q, k, v]), (q, k, v), strict=True):
        assert grad.shape == x.shape and bool(grad.isfinite().all())


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_decoding_positions(backend):
    """One query at position 9 sees what row 9 of the whole problem sees; keys may lie in any order."""
    q, k, v = qkv()
    mask = M.causal() & M.sliding_window(9)
    whole = attention(q, k, v, mask=mask, backend="eager")
    order = torch.randperm(24, generator=generator(6))
    at = torch.tensor([9, 15])
    out = attention(
        q[:, :, at], k[:, :, order], v[:, :, order], mask=mask, q_pos=at, k_pos=order, backend=backend
    )  # fmt: skip
    torch.testing.assert_close(out, whole[:, :, at])


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("shape", [(2, 6), (2, 4, 6), (1, 4, 6)], ids=str)
def test_positions_by_sample_and_head(backend, shape):
    q, k, v = qkv(n=6)
    pos = torch.stack([torch.randperm(24, generator=generator(i))[:6] for i in range(8)]).reshape(2, 4, 6)
    pos = pos[:, 0] if len(shape) == 2 else pos[: shape[0]]
    mask = M.strided(4, local=2, per_head=1, num_heads=4)
    out = attention(q, k, v, mask=mask, q_pos=pos, backend=backend)
    allowed = mask.at(pos, torch.arange(24)).expand(2, 4, 6, 24)
    torch.testing.assert_close(out, naive_softmax_attention(q, k, v, allowed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_half_precision(backend, dtype):
    q, k, v = qkv(dtype=torch.float32)
    half = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    out = attention(*half, mask=M.causal(), backend=backend)
    assert out.dtype == dtype
    spec = attention(q, k, v, mask=M.causal(), backend="eager")
    error = float((out.float() - spec).abs().max() / spec.abs().max())
    assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3), f"{error:.1e} of the largest output"
    for a, b in zip(gradients(out, half), gradients(spec, [q, k, v]), strict=True):
        assert a.dtype == dtype
        error = float((a.float() - b).abs().max() / b.abs().max())
        assert error < (2e-2 if dtype == torch.bfloat16 else 3e-3), f"{error:.1e} of the largest gradient"


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_autocast(backend):
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, mask=M.causal(), backend=backend)
        mixed = attention(q, k.detach().bfloat16(), v, backend=backend)
    assert out.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(q, k, v, mask=M.causal(), backend="eager"), rtol=0.02, atol=0.03)
    assert [g.dtype for g in gradients(out, [q, k, v])] == [torch.float32] * 3


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_statistics_are_float32_under_autocast(backend):
    """Scores of 300 differ by 2 in bfloat16, so that the weights would be wrong by factors."""
    q = torch.full((1, 1, 1, 4), 8.0)
    k = torch.tensor([[[[9.375, 9.375, 9.375, 9.375], [9.375, 9.375, 9.375, 9.4375]]]])
    v = torch.tensor([[[[1.0], [0.0]]]])
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, scale=1.0, backend=backend)
    assert out.item() == pytest.approx(torch.tensor(-0.5).sigmoid().item(), abs=0.005)


def test_sdpa_computes_no_map_for_plain_causal():
    """``is_causal`` is handed on only where it means the same."""
    q, k, v = qkv(n=4, m=6)
    for call in ({}, {"q_pos": torch.arange(2, 6)}):
        out = attention(q, k, v, mask=M.causal(), backend="sdpa", **call)
        torch.testing.assert_close(out, attention(q, k, v, mask=M.causal(), backend="eager", **call))


# ---- choice of a backend


def test_choice_by_what_the_call_needs():
    small = qkv(grad=False)
    assert explain(*small).startswith("runs: sdpa")
    assert explain(*small, normalizer="sigmoid").startswith("runs: eager")
    assert explain(*small, return_weights=True).startswith("runs: eager")
    assert explain(*small, dropout_p=0.1).startswith("runs: sdpa")
    assert explain(*small, normalizer="relu", dropout_p=0.1).startswith("runs: eager")
    large = qkv(batch=1, n=1024, m=1024, grad=False)
    assert explain(*large).startswith("runs: sdpa")
    assert explain(*large, mask=M.causal()).startswith("runs: sdpa")
    assert explain(*large, normalizer="sigmoid").startswith("runs: tiled")
    assert explain(*large, mask=M.sliding_window(33)).startswith("runs: tiled")
    assert explain(*large, normalizer="sigmoid", return_weights=True).startswith("runs: eager")


def test_explain_gives_a_reason_for_every_other_backend():
    text = explain(*qkv(grad=False), normalizer="sigmoid", dropout_p=0.1)
    for name in BACKENDS:
        assert f"runs: {name}" in text or f"passed over: {name}: " in text
    assert "tiled: it has no dropout" in text and "SDPA only knows softmax" in text


@pytest.mark.parametrize("op", ops.operators())
def test_explain_wants_the_arguments_of_a_call(op):
    with pytest.raises(TypeError, match=rf"explain\('{op}', ...\) wants the arguments of a call: "):
        explain(op)
    with pytest.raises(TypeError, match="wants the arguments of a call: "):
        explain(getattr(ops, op), tempo=3)


def test_explain_knows_other_operators_and_head_widths():
    q, k, v = qkv(grad=False)
    assert explain("linear_attention", q, k, v).startswith("runs: chunkwise\npassed over: scatter: ")
    assert explain(ops.linear_attention, q, k, v, form="parallel").startswith("runs: eager")
    wide = qkv(n=300, m=300, dv=16, grad=False)
    assert "sdpa: with heads of D=8 and Dv=16 it builds the whole map" in explain(*wide)
    with use_backend("sdpa"), pytest.raises(ValueError, match="linear_attention has no such backend; possible"):
        ops.linear_attention(q, k, v)
    with pytest.raises(ValueError, match="op='softmax' is no operator; choose one of"):
        explain("softmax", q, k, v)


def test_forced_backend_that_cannot_serve_raises():
    q, k, v = qkv(grad=False)
    with pytest.raises(ValueError, match="backend='sdpa' cannot serve this call: its normalizer is relu"):
        attention(q, k, v, normalizer="relu", backend="sdpa")
    with (
        use_backend("tiled"),
        pytest.raises(ValueError, match="backend='tiled' cannot serve this call: it has no drop"),
    ):
        attention(q, k, v, dropout_p=0.1)


def test_use_backend_is_undone_even_after_an_error():
    q, k, v = qkv(grad=False)
    with pytest.raises(RuntimeError), use_backend("eager"):
        assert explain(q, k, v).startswith("runs: eager") or "passed over: eager" in explain(q, k, v)
        raise RuntimeError
    assert explain(q, k, v).startswith("runs: sdpa")
    with use_backend("eager"):
        torch.testing.assert_close(attention(q, k, v), attention(q, k, v, backend="sdpa"))


# ---- bad input


def _t(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    "error,words,args,kwargs",
    [
        (ValueError, "q must have shape", (_t(2, 3, 4), _t(1, 1, 3, 4), _t(1, 1, 3, 4)), {}),
        (TypeError, "k must be a torch.Tensor", (_t(1, 1, 3, 4), None, _t(1, 1, 3, 4)), {}),
        (ValueError, "share the batch", (_t(2, 1, 3, 4), _t(1, 1, 3, 4), _t(1, 1, 3, 4)), {}),
        (ValueError, "head_dim=4, k has head_dim=5", (_t(1, 1, 3, 4), _t(1, 1, 3, 5), _t(1, 1, 3, 4)), {}),
        (ValueError, "k has 3 tokens, v has 2", (_t(1, 1, 3, 4), _t(1, 1, 3, 4), _t(1, 1, 2, 4)), {}),
        (ValueError, "k has 2 heads, which do not divide the 3", (_t(1, 3, 3, 4), _t(1, 2, 3, 4), _t(1, 1, 3, 4)), {}),
        (ValueError, "v has 2 heads", (_t(1, 3, 3, 4), _t(1, 3, 3, 4), _t(1, 2, 3, 4)), {}),
        (TypeError, "one floating dtype", (_t(1, 1, 3, 4), _t(1, 1, 3, 4).double(), _t(1, 1, 3, 4)), {}),
        (TypeError, "one floating dtype", tuple(_t(1, 1, 3, 4).long() for _ in range(3)), {}),
        (ValueError, r"valid must have shape \(1, 3\)", None, {"valid": torch.ones(1, 4, dtype=torch.bool)}),
        (TypeError, "valid must be a boolean", None, {"valid": torch.ones(1, 3)}),
        (TypeError, "mask must be boolean", None, {"mask": torch.zeros(3, 3)}),
        (ValueError, "N=3 queries and M=3 keys", None, {"mask": torch.ones(3, 4, dtype=torch.bool)}),
        (ValueError, "mask is for 2 samples, but there are 1", None, {"mask": torch.ones(2, 3, 3, dtype=torch.bool)}),
        (ValueError, "mask is for 5 heads, but there are 1", None, {"mask": torch.ones(1, 5, 3, 3, dtype=torch.bool)}),
        (ValueError, "bias is for N, M", None, {"bias": torch.zeros(4, 3)}),
        (ValueError, "bias must be a float", None, {"bias": torch.zeros(3, 3, dtype=torch.long)}),
        (ValueError, r"q_pos must be \(3,\)", None, {"q_pos": torch.arange(4)}),
        (ValueError, "q_pos must be", None, {"q_pos": torch.zeros(2, 3, dtype=torch.long)}),
        (ValueError, "k_pos must be", None, {"k_pos": torch.zeros(1, 2, 3, dtype=torch.long)}),
        (TypeError, "k_pos must be an integer", None, {"k_pos": torch.zeros(3)}),
        (ValueError, "bias is for 2 samples", None, {"bias": torch.zeros(2, 1, 3, 3)}),
        (ValueError, "bias is for 1 samples and 5 heads", None, {"bias": torch.zeros(5, 3, 3)}),
        (ValueError, "bias lies on meta", None, {"bias": torch.zeros(3, 3, device="meta")}),
        (ValueError, "valid on meta", None, {"valid": torch.ones(1, 3, dtype=torch.bool, device="meta")}),
        (ValueError, "dropout_p", None, {"dropout_p": 1.0}),
        (ValueError, "dropout_p", None, {"dropout_p": -0.1}),
        (TypeError, "dropout_p", None, {"dropout_p": "0.1"}),
        (ValueError, "scale must be", None, {"scale": float("nan")}),
        (ValueError, "scale must be", None, {"scale": -1.0}),
        (TypeError, "scale must be .* a tensor goes to the queries", None, {"scale": torch.tensor(0.5)}),
        (ValueError, "normalizer='softmin'", None, {"normalizer": "softmin"}),
        (ValueError, "backend='cuda' is unknown", None, {"backend": "cuda"}),
    ],
)
def test_bad_input_is_refused(error, words, args, kwargs):
    args = args or tuple(_t(1, 1, 3, 4) for _ in range(3))
    with pytest.raises(error, match=words):
        attention(*args, **kwargs)


def test_partial_refuses_what_attention_refuses():
    with pytest.raises(ValueError, match="share the batch"):
        attention_partial(_t(2, 1, 3, 4), _t(1, 1, 3, 4), _t(1, 1, 3, 4))
    with pytest.raises(ValueError, match="cannot serve this call: SDPA does not return the row statistics"):
        attention_partial(*[_t(1, 1, 3, 4)] * 3, backend="sdpa")


def test_a_backend_is_forced_in_its_own_thread_only() -> None:
    q = torch.randn(1, 1, 4, 4)
    inside, entered, left = threading.Event(), threading.Event(), threading.Event()
    seen: dict[str, str] = {}

    def first() -> None:
        with use_backend("eager"):
            inside.set()
            entered.wait(10)
        left.set()

    def second() -> None:
        inside.wait(10)
        seen["beside"] = explain(q, q, q).splitlines()[0]
        with use_backend("tiled"):
            entered.set()
            left.wait(10)  # the other one leaves before this one does
            seen["inside"] = explain(q, q, q).splitlines()[0]

    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == {"beside": "runs: sdpa", "inside": "runs: tiled"}
    assert explain(q, q, q).splitlines()[0] == "runs: sdpa"


def test_compiled_code_follows_what_is_forced() -> None:
    q = torch.randn(1, 1, 4, 4)
    seen: list[str] = []

    def f(q: torch.Tensor) -> torch.Tensor:
        return attention(q, q, q, normalizer="relu")

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(f, backend=backend, fullgraph=True)
    compiled(q)
    with use_backend("eager"):
        with use_backend("tiled"):
            pass
        compiled(q)
    compiled(q)
    assert ["tiled_attention" in graph for graph in seen] == [True, False]


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_sides_of_one_serve_all_queries_or_keys(backend):
    q, k, v = (t.requires_grad_() for t in qkv(n=6, m=7))
    keys, rows = torch.rand(2, 7, generator=generator(1)) > 0.4, torch.rand(2, 4, 6, 1, generator=generator(2)) > 0.3
    expected = attention(q, k, v, valid=keys, backend="eager")
    for mask in (keys[:, None, None], keys[:, None]):
        torch.testing.assert_close(attention(q, k, v, mask=mask, backend=backend), expected)
    far = torch.zeros(2, 1, 1, 7).to(q).masked_fill(~keys[:, None, None], float("-inf"))
    torch.testing.assert_close(attention(q, k, v, bias=far, backend=backend), expected)
    plain = attention(q, k, v, backend="eager")
    torch.testing.assert_close(attention(q, k, v, mask=rows, backend=backend), plain * rows)
    for shape in ((1, 7), (4, 6, 1), (2, 1, 1, 7), (1, 1)):
        bias = torch.randn(shape, generator=generator(3), dtype=q.dtype, requires_grad=True)
        out = attention(q, k, v, bias=bias, backend=backend)
        spec = attention(q, k, v, bias=bias.expand(*shape[:-2], 6, 7), backend="eager")
        for ours, theirs in zip(
            torch.autograd.grad(out.square().sum(), (q, k, v, bias)),
            torch.autograd.grad(spec.square().sum(), (q, k, v, bias)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_what_looks_like_a_mask_of_keys_is_told_where_it_belongs():
    q = torch.randn(2, 2, 3, 4)
    with pytest.raises(
        ValueError, match=r"mask must be \(..., 3, 3\).*got \(2, 3\); which keys of a sample exist is v"
    ):
        attention(q, q, q, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask=explicit.* knows queries 0 to 0"):  # with positions a side is an extent
        attention(q, q, q, mask=torch.ones(1, 3, dtype=torch.bool), q_pos=torch.arange(3))


def test_a_causal_mask_begins_at_the_first_key_unless_positions_say_otherwise():
    q, k, v = qkv(n=3, m=7)
    lower = torch.ones(3, 7, dtype=torch.bool).tril()
    for backend in (None, "eager", "sdpa", "tiled"):
        out = attention(q, k, v, mask=M.causal(), backend=backend)
        torch.testing.assert_close(out, attention(q, k, v, mask=lower, backend="eager"))
        out = attention(q, k, v, mask=M.causal(), q_pos=torch.arange(4, 7), backend=backend)
        torch.testing.assert_close(out, attention(q, k, v, mask=torch.ones_like(lower).tril(4), backend="eager"))
