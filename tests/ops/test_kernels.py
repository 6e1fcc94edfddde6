"""Backends for CUDA without it: what is chosen, how other libraries' kernels are called, and that the answer is right.

The stand-ins take arguments by the names and layouts of the real functions (flash-linear-attention 0.5.2, NATTEN
0.21.7), compute by loops or from the specification, and keep what they were given.
"""

import math
import sys
import types

import pytest
import torch
from reference import generator, gradients, qkv

import attnlib
from attnlib import masks as M
from attnlib.ops import attention, explain, flex, linear_attention, neighborhood_attention, split_decoding
from attnlib.ops._call import prepare
from attnlib.ops._dispatch import described
from attnlib.ops.kernels import streamed
from attnlib.types import State


def runs(text):
    return text.splitlines()[0].removeprefix("runs: ")


# ---- fla


def scan(q, k, v, g, state, scale):
    """(B, N, H, D): one token after the other. ``g`` broadcasts to (B, N, H, D)."""
    outs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t].exp().unsqueeze(-1)
        state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outs.append((scale * q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, 1), state


def chunks(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    """What both functions share, with their conventions and refusals."""
    assert q.shape == k.shape and v.shape[:3] == q.shape[:3] and q.dtype == k.dtype == v.dtype
    assert all(t.is_contiguous() for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    assert cu_seqlens is None or q.shape[0] == 1
    sequences = q.shape[0] if cu_seqlens is None else len(bounds) - 1
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is None:
        initial_state = torch.zeros(shape)
    assert tuple(initial_state.shape) == shape and initial_state.dtype == torch.float32
    q, k, v = q.float(), k.float(), v.float()
    outs, finals = [], []
    for i, (a, z) in enumerate(zip(bounds, bounds[1:], strict=False)):
        assert z > a, "sequences without tokens"
        start = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        part = None if g is None else g[:, a:z]
        out, final = scan(q[:, a:z], k[:, a:z], v[:, a:z], part, start, scale)
        outs.append(out)
        finals.append(final)
    return torch.cat(outs, 1), torch.cat(finals) if output_final_state else None


@pytest.fixture
def fla(monkeypatch):
    """A stand-in for ``fla.ops``; ``calls`` holds the names that were called, with what they were given."""
    calls = []

    def chunk_simple_gla(
        q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
        cu_seqlens=None, cu_seqlens_cpu=None,
    ):  # fmt: skip
        calls.append(("simple_gla", dict(g=g, g_gamma=g_gamma, cu_seqlens=cu_seqlens, dtype=q.dtype)))
        assert g is None or g_gamma is None
        if g is not None:
            assert g.shape == q.shape[:3]
            g = g.unsqueeze(-1)
        if g_gamma is not None:
            assert g_gamma.shape == (q.shape[2],)
            g = g_gamma.detach()[:, None].expand(q.shape[0], q.shape[1], -1, 1)  # it gets no gradient there
        out, final = chunks(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
        return out.to(q.dtype), final

    def chunk_gla(
        q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        calls.append(("gla", dict(cu_seqlens=cu_seqlens, dtype=q.dtype)))
        assert g.shape == q.shape
        out, final = chunks(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
        return out.to(q.dtype), final

    module, ops = types.ModuleType("fla"), types.ModuleType("fla.ops")
    ops.chunk_simple_gla, ops.chunk_gla, module.ops = chunk_simple_gla, chunk_gla, ops
    monkeypatch.setitem(sys.modules, "fla", module)
    monkeypatch.setitem(sys.modules, "fla.ops", ops)
    return calls


B, H, N, D, DV = 2, 4, 23, 16, 18
DECAYS = {"none": None, "head": (H,), "token": (B, H, N), "channel": (B, H, N, D)}


def linear_problem(decay, heads=2, dtype=torch.float32):
    q, k, v = qkv(heads=(H, heads, heads), n=N, m=N, d=D, dv=DV, dtype=dtype)
    g = None if decay is None else -torch.rand(decay, generator=generator(5))
    return q, k, v, g


@pytest.mark.parametrize("settings", ["plain", "packed", "state", "packed state", "sum", "subtract"])
@pytest.mark.parametrize("decay", DECAYS)
def test_fla_is_the_specification(fla, decay, settings):
    q, k, v, g = linear_problem(DECAYS[decay])
    inputs = [q, k, v] if g is None else [q, k, v, g.requires_grad_()]
    call = dict(decay=g, return_state=True, valid=torch.rand(B, N, generator=generator(3)) > 0.2)
    if "packed" in settings:
        call["cu_seqlens"] = [0, 0, 5, 5, 14, N]
    if "state" in settings:
        call["state"] = State({"S": torch.randn(B, H, D, DV, generator=generator(4))})
    if settings == "sum":
        q, k = (t.detach().abs().requires_grad_() for t in (q, k))
        inputs[:2] = q, k
        call["normalizer"] = "sum"
    if settings == "subtract":
        call["normalizer"] = "subtract"
    if settings == "subtract":
        with described("cuda"), pytest.raises(ValueError, match="heads from D=16 on"):
            linear_attention(q, k, v, form="fla", **call)
        return
    with described("cuda"):
        found = linear_attention(q, k, v, form="fla", **call)
    expected = linear_attention(q, k, v, form="eager", **call)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-4, atol=1e-4)
    for name in expected.state:
        torch.testing.assert_close(found.state[name], expected.state[name], rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients(found.out, inputs), gradients(expected.out, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert [name for name, _ in fla] == ["gla" if decay == "channel" else "simple_gla"]
    if "packed" in settings:
        assert fla[0][1]["cu_seqlens"].tolist() == [0, 5, 14, N, N + 5, N + 14, 2 * N]


def test_fla_takes_a_constant_decay_as_such_where_it_wants_no_gradient(fla):
    q, k, v, g = linear_problem((H,))
    with described("cuda"):
        linear_attention(q, k, v, decay=g, form="fla")
        linear_attention(q, k, v, decay=g.requires_grad_(), form="fla")
    assert fla[0][1]["g"] is None and torch.equal(fla[0][1]["g_gamma"], g)
    assert fla[1][1]["g_gamma"] is None and fla[1][1]["g"].shape == (B, N, H)


def test_fla_serves_half_precision_by_itself_and_rounds_nothing_else(fla):
    q, k, v, _ = linear_problem(None)
    with described("cuda"):
        assert runs(explain("linear_attention", q, k, v)) == "chunkwise"
        linear_attention(q, k, v)
        assert not fla
        half = [t.detach().bfloat16() for t in (q, k, v)]
        out = linear_attention(*half)
    assert fla[0][1]["dtype"] == torch.bfloat16 and out.dtype == torch.bfloat16
    exact = linear_attention(*(t.double() for t in half), form="eager")
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=0.3)
    assert "TF32" in explain("linear_attention", q, k, v, device="cuda")


def test_fla_second_derivatives_and_refusals(fla):
    q, k, v, g = linear_problem((B, H, N))
    with described("cuda"):
        out = linear_attention(q, k, v, decay=g, form="fla")
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), k)
        with pytest.raises(ValueError, match="causal only"):
            linear_attention(q, k, v, causal=False, form="fla")
        with pytest.raises(ValueError, match="no float64"):
            linear_attention(q.double(), k.double(), v.double(), form="fla")
        with pytest.raises(ValueError, match="no vmap"):
            torch.func.vmap(lambda t: linear_attention(t, k, v, form="fla"))(q[None])
    spec = linear_attention(q, k, v, decay=g, form="eager")
    (first,) = torch.autograd.grad(spec.square().sum(), q, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), k)[0], rtol=1e-2, atol=1e-1)


# ---- natten


@pytest.fixture
def natten(monkeypatch):
    """A stand-in for NATTEN: dense attention under its windows, on (B, *grid, heads, D)."""
    calls = []

    def operator(rank):
        def na(
            query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, additional_keys=None,
            additional_values=None, **others,
        ):  # fmt: skip
            assert not others and query.dim() == rank + 3 and key.shape == value.shape
            assert all(len(x) == rank for x in (kernel_size, stride, dilation, is_causal))
            calls.append(dict(kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal))
            grid = tuple(query.shape[1:-2])
            q, k, v = (t.flatten(1, rank).transpose(1, 2) for t in (query, key, value))
            seen = M.neighborhood(grid, kernel_size, dilation, stride, is_causal).dense(math.prod(grid))
            if additional_keys is not None:
                assert additional_keys.shape[2] == key.shape[-2]
                k, v = (
                    torch.cat([t, more.transpose(1, 2)], 2)
                    for t, more in ((k, additional_keys), (v, additional_values))
                )
                seen = torch.nn.functional.pad(seen, (0, additional_keys.shape[1]), value=True)
            out = attention(q, k, v, mask=seen, scale=scale or query.shape[-1] ** -0.5, backend="eager")
            return out.transpose(1, 2).unflatten(1, grid)

        return na

    module = types.ModuleType("natten")
    module.na1d, module.na2d, module.na3d = map(operator, (1, 2, 3))
    monkeypatch.setitem(sys.modules, "natten", module)
    return calls


@pytest.mark.parametrize(
    "grid,settings",
    [
        ((11,), dict(kernel_size=4, dilation=2)),
        ((11,), dict(kernel_size=5, stride=3, causal=True)),
        ((6, 7), dict(kernel_size=(3, 5), stride=(1, 2), causal=(False, True))),
        ((6, 7), dict(kernel_size=3, dilation=(2, 1), scale=0.3, heads=(4, 2, 1))),
        ((6, 7), dict(kernel_size=3, extra=3, heads=(4, 2, 2))),
        ((4, 3, 5), dict(kernel_size=(2, 3, 3), causal=(True, False, False), flat=True)),
    ],
    ids=str,
)
def test_natten_is_the_specification(natten, grid, settings):
    settings = dict(settings)
    heads, extra, flat = settings.pop("heads", (2, 2, 2)), settings.pop("extra", 0), settings.pop("flat", False)
    g = generator(2)
    q, k, v = (torch.randn(2, h, *grid, 8, generator=g) for h in heads)
    if flat:
        q, k, v = (t.flatten(2, -2) for t in (q, k, v))
        settings["grid"] = grid
    inputs = [t.requires_grad_() for t in (q, k, v)]
    if extra:
        more = [torch.randn(2, h, extra, 8, generator=g).requires_grad_() for h in heads[1:]]
        settings.update(extra_k=more[0], extra_v=more[1])
        inputs += more
    with described("cuda"):
        out = neighborhood_attention(q, k, v, backend="natten", **settings)
    expected = neighborhood_attention(q, k, v, backend="eager", **settings)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(natten) == 1 and all(isinstance(x, tuple) for x in natten[0].values())


def test_natten_serves_half_precision_by_itself(natten):
    x = torch.randn(1, 2, 6, 6, 8)
    with described("cuda"):
        assert runs(explain("neighborhood_attention", x, x, x, kernel_size=3)) == "tiles"
        out = neighborhood_attention(*[x.half()] * 3, kernel_size=3)
    assert len(natten) == 1
    torch.testing.assert_close(out.float(), neighborhood_attention(x, x, x, kernel_size=3), rtol=1e-2, atol=1e-2)
    (first,) = torch.autograd.grad(out.sum(), x.requires_grad_(), allow_unused=True) if out.requires_grad else (None,)
    assert first is None


@pytest.mark.parametrize(
    "words,call",
    [
        ("clamped", dict(border="zero")),
        ("no valid", dict(valid=torch.ones(1, 6, 6, dtype=torch.bool))),
        ("no bias_table", dict(bias_table=torch.zeros(2, 5, 5))),
        ("no mask", dict(mask=M.causal())),
        ("no dropout", dict(dropout_p=0.1)),
        ("scale of 0", dict(scale=0.0)),
        ("multiple of 8", dict(width=6)),
    ],
)
def test_natten_refuses_by_name(natten, words, call):
    x = torch.randn(1, 2, 6, 6, call.pop("width", 8))
    with described("cuda"), pytest.raises(ValueError, match=words):
        neighborhood_attention(x, x, x, kernel_size=3, backend="natten", **call)
    assert words in explain("neighborhood_attention", x, x, x, kernel_size=3, device="cuda", **call)


# ---- flex


@pytest.fixture
def compiled(monkeypatch):
    """In place of the compiled kernel: dense attention under the block mask's own rule; keeps what was compiled."""
    made = []

    def kernel(of):
        def run(q, k, v, *, block_mask, scale, enable_gqa):
            assert enable_gqa == (q.shape[1] != k.shape[1])
            b, h, i, j = torch.meshgrid(*(torch.arange(s) for s in (*q.shape[:3], k.shape[2])), indexing="ij")
            seen = torch.ones(b.shape, dtype=torch.bool) if block_mask is None else block_mask.mask_mod(b, h, i, j)
            return attention(q, k, v, mask=seen.expand(b.shape), scale=scale, backend="eager")

        made.append(of)
        return run

    monkeypatch.setattr(flex, "_kernel", flex.functools.lru_cache(kernel))
    return made


def test_flex_is_chosen_for_structured_masks_on_cuda_and_compiled_once_per_structure(compiled):
    g = generator(1)
    q, k, v = qkv(heads=(4, 2, 2), n=512, m=512, d=16, dv=16, dtype=torch.float32)
    for _ in range(2):
        ids = torch.sort(torch.randint(0, 4, (2, 512), generator=g)).values
        for mask in (M.documents(ids), M.recent(9)):
            valid = torch.rand(2, 512, generator=g) > 0.3
            with described("cuda"):
                assert runs(explain(q, k, v, mask=mask, valid=valid)) == "flex"
                out = attention(q, k, v, mask=mask, valid=valid)
            expected = attention(q, k, v, mask=mask, valid=valid, backend="eager")
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            for a, b in zip(gradients(out, [q, k, v]), gradients(expected, [q, k, v]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(compiled) == 2


def test_flex_kernels_are_told_apart_by_structure():
    x = torch.randn(1, 2, 8, 16)
    ids = torch.tensor([[0] * 4 + [1] * 4])

    def of(t=x, **call):
        return flex.structure(prepare(t, t, t, **call))

    same = of(mask=M.documents(ids)) == of(mask=M.documents(1 - ids))
    assert same and of(mask=M.recent(2)) == of(mask=M.recent(2))
    different = [
        of(), of(mask=M.recent(2)), of(mask=M.recent(3)), of(mask=M.documents(ids)), of(mask=M.causal()),
        of(mask=M.causal(), valid=torch.ones(1, 8, dtype=torch.bool)), of(mask=M.causal(), q_pos=torch.arange(8)),
        of(mask=M.causal(), scale=2.0), of(x.half(), mask=M.causal()), of(x[:, :1], mask=M.causal()),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_a_kernel_is_compiled_once_for_new_tensors_of_one_structure():
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    counter = CompileCounter()
    kernel = torch.compile(flex_attention, backend=counter, fullgraph=True, isolate_recompiles=True)
    g = generator(3)
    for _ in range(3):
        q, k, v = torch.randn(3, 2, 2, 40, 16, generator=g)
        ids = torch.sort(torch.randint(0, 4, (2, 40), generator=g)).values
        call = prepare(q, k, v, mask=M.documents(ids), valid=torch.rand(2, 40, generator=g) > 0.2)
        out = kernel(q, k, v, block_mask=flex._blocks(call), scale=call.scale)
        torch.testing.assert_close(out, attention(q, k, v, mask=call.mask, valid=call.valid), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# ---- what is chosen on a device that is described


@pytest.mark.parametrize(
    "call,on_cuda,on_cpu",
    [
        (dict(), "sdpa", "sdpa"),
        (dict(mask=M.causal()), "sdpa", "sdpa"),
        (dict(mask=M.recent(64)), "flex", "tiled"),
        (dict(mask=M.explicit(torch.ones(1024, 1024, dtype=torch.bool))), "sdpa", "sdpa"),
        (dict(mask=M.recent(64), bias=torch.zeros(1024, 1024)), "tiled", "tiled"),
        (dict(normalizer="clipped_softmax"), "tiled", "tiled"),
        (dict(return_weights=True), "eager", "eager"),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
def test_the_choice_by_device(call, on_cuda, on_cpu):
    q = torch.empty(1, 2, 1024, 16)
    assert runs(explain(q, q, q, device="cuda", **call)) == on_cuda
    assert runs(explain(q, q, q, device="cpu", **call)) == runs(explain(q, q, q, **call)) == on_cpu
    assert runs(explain(q.to("meta"), q.to("meta"), q.to("meta"), device="cuda", **{
        name: value.to("meta") if hasattr(value, "to") else value for name, value in call.items()
    })) == on_cuda  # fmt: skip


def test_a_described_device_says_what_is_not_installed(monkeypatch):
    from attnlib import extras

    monkeypatch.setattr(extras, "_findable", lambda module: False)
    for name in ("fla", "natten", "triton"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    q = torch.randn(1, 2, 64, 16, dtype=torch.bfloat16)
    cases = [
        ("linear_attention", linear_attention, "fla", {}, "form"),
        ("neighborhood_attention", neighborhood_attention, "natten", dict(kernel_size=3), "backend"),
        ("attention", attention, "triton", dict(normalizer="sigmoid"), "backend"),
        ("split_decoding", split_decoding, "triton", {}, "backend"),
    ]
    for op, function, name, call, argument in cases:
        text = explain(op, q, q, q, device="cuda", **call)
        assert f"passed over: {name}: {name} is not installed: pip install 'attnlib[{name}]'" in text
        with described("cuda"), pytest.raises(ValueError, match=f"is not installed: pip install 'attnlib.{name}"):
            function(q, q, q, **{argument: name}, **call)
        with pytest.raises(ValueError, match="kernels run on CUDA, the tensors lie on cpu"):
            function(q, q, q, **{argument: name}, **call)


def test_a_device_that_is_none():
    q = torch.empty(1, 2, 8, 16)
    with pytest.raises(ValueError, match="device='cudda' is no device"):
        explain(q, q, q, device="cudda")
    with pytest.raises(TypeError, match="device must be"):
        explain(q, q, q, device=0)
    assert attnlib.explain(q, q, q, device=torch.device("cuda", 0)).startswith("runs: sdpa")


@pytest.mark.parametrize(
    "words,call",
    [
        ("band of key - query", dict(mask=M.strided(4, local=2))),
        ("no bias", dict(bias=torch.zeros(8, 8))),
        ("no positions", dict(mask=M.causal(), q_pos=torch.arange(8))),
        ("whole map", dict(return_weights=True)),
        ("no dropout", dict(dropout_p=0.1)),
        ("not Clipped", dict(normalizer="clipped_softmax")),
        ("need a maximum", dict(normalizer="softmax")),
    ],
)
def test_streamed_refuses_by_name(monkeypatch, words, call):
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    q = torch.randn(1, 2, 8, 16)
    with described("cuda"), pytest.raises(ValueError, match=words):
        attention(q, q, q, backend="triton", **{"normalizer": "sigmoid", **call})


def test_bands_are_the_masks():
    i = torch.arange(11)
    for mask in (M.causal(), M.recent(4), M.sliding_window(4), M.sliding_window(5) & M.causal()):
        low, high = streamed.band(mask)
        step = i[None] - i[:, None]
        assert torch.equal((step >= low) & (step <= high), mask.dense(11))
    assert streamed.band(~M.causal()) is streamed.band(M.strided(3)) is None


def test_triton_is_not_imported_by_asking():
    before = "triton" in sys.modules
    q = torch.randn(1, 2, 512, 16)
    explain(q, q, q, normalizer="sigmoid", device="cuda")
    explain("split_decoding", q[:, :, :1], q, q, device="cuda")
    assert ("triton" in sys.modules) == before
