"""Tiled attention against the specification, and its custom operator under compile, export and FLOP counting."""

import copy

import pytest
import torch
from reference import bias_cases, generator, gradients, mask_cases, qkv
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnlib import masks as M
from attnlib import positions as P
from attnlib.bench.clock import peak_bytes
from attnlib.normalizers import Activated, ClippedSoftmax, Sigmoid, as_normalizer
from attnlib.ops import _tiles, attention, attention_partial, explain, tiled
from attnlib.ops.lowered import Lowered
from attnlib.types import Partial

N = 132  # not a multiple of any tile
MASKS = mask_cases(N)
BIASES = bias_cases(N, N)
NORMALIZERS = [
    "softmax", Sigmoid(-1.0), ClippedSoftmax(-0.01, 1.02), "relu", "step", "thresholded", "softplus_l1", "uniform"
]  # fmt: skip
FAMILY = [Activated(phi, l1) for phi in ("exp", "softplus", "sigmoid", "relu", "elu1") for l1 in (False, True)]
GROUPS = [(4, 4, 4), (4, 2, 2), (4, 1, 1), (4, 2, 4), (4, 1, 2)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles at small N: everything that happens at N = 4096 happens here."""
    monkeypatch.setattr(tiled, "Q_TILES", (32, 48))
    monkeypatch.setattr(tiled, "UNKNOWN", 40)
    monkeypatch.setattr(tiled, "CPU_BUFFER", 40 * N * 8 * 3)
    monkeypatch.setattr(tiled, "PLANE_PAIRS", 1 << 30)
    monkeypatch.setattr(tiled, "TALL", 50)
    monkeypatch.setattr(tiled, "PIECE", 40 * 8 * 30)
    monkeypatch.setattr(tiled, "PIECE_WIDTH", 30)
    monkeypatch.setattr(tiled, "LONG_RUN", 24)
    monkeypatch.setattr(tiled, "DEEP", 44)
    monkeypatch.setattr(_tiles, "K_TILE", 16)
    monkeypatch.setattr(_tiles.build, "__defaults__", (16,))
    _tiles._cache.clear()
    tiled._best_q_tile.cache_clear()
    yield
    _tiles._cache.clear()
    tiled._best_q_tile.cache_clear()


def low(mask):
    """A problem with a mask and nothing else, lowered."""
    spec, tensors = mask.lower()
    return Lowered(None, None, None, tensors, [], spec, "", as_normalizer("softmax").lower(), 1.0)


def _compare(q, k, v, extra=(), **call):
    results = []
    for backend in ("eager", "tiled"):
        out = attention(q, k, v, backend=backend, **call)
        results.append([out, *gradients(out, [q, k, v, *extra])])
    for spec, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, spec, rtol=1e-9, atol=1e-10)


# ---- against the specification, float64, forward and backward


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
@pytest.mark.parametrize("name", [None, *MASKS])
def test_every_normalizer_on_every_mask(name, normalizer):
    q, k, v = qkv(n=N, m=N, heads=(4, 2, 2), dv=6)
    _compare(q, k, v, mask=None if name is None else MASKS[name], normalizer=normalizer)


@pytest.mark.parametrize("normalizer", FAMILY, ids=str)
def test_sums_divided_out_late_change_nothing(normalizer):
    """With rows that see nothing, documents, grouped heads, a bias with a gradient and rows in several pieces."""
    q, k, v = qkv(n=N, m=N, heads=(4, 2, 1), dv=6)
    bias, leaves = BIASES["relative"]()
    for mask in (None, MASKS["some_empty_rows"], M.documents(torch.arange(N) // 30)):
        _compare(q, k, v, leaves, mask=mask, bias=bias, normalizer=normalizer)


@pytest.mark.parametrize("planes", [False, True], ids=["together", "each plane alone"])
@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("name", ["window", "documents", "strided", "explicit", "prefix"])
def test_grouped_heads_and_masks_by_sample_and_head(name, heads, planes, monkeypatch):
    if planes:
        monkeypatch.setattr(tiled, "PLANE_PAIRS", 0)
    q, k, v = qkv(n=N, m=N, heads=heads, dv=6)
    valid = torch.rand(2, N, generator=generator(3)) > 0.2
    valid[1, N // 2 :] = False
    _compare(q, k, v, mask=MASKS[name], valid=valid)


@pytest.mark.parametrize("mask", [None, M.causal(), MASKS["some_empty_rows"], MASKS["explicit"]], ids=str)
@pytest.mark.parametrize("name", list(BIASES))
def test_biases_with_gradients(name, mask):
    q, k, v = qkv(n=N, m=N)
    bias, leaves = BIASES[name]()
    _compare(q, k, v, leaves, mask=mask, bias=bias, normalizer="clipped_softmax")
    _compare(q, k, v, leaves, mask=mask, bias=bias, normalizer="sigmoid")


def test_bias_on_gathered_keys():
    chosen = torch.rand(4, 9, generator=generator(4)) > 0.6
    q, k, v = qkv(n=N, m=N)
    for name in BIASES:
        bias, leaves = BIASES[name]()
        _compare(q, k, v, leaves, mask=M.blocks(chosen, 33, 16), bias=bias)


@pytest.mark.parametrize("shape", [(70, 200), (200, 70), (1, 150), (150, 1), (3, 3)], ids=str)
def test_rectangular_problems(shape):
    q, k, v = qkv(n=shape[0], m=shape[1])
    for mask in (None, M.causal(), M.strided(7, local=3)):
        _compare(q, k, v, mask=mask)


def test_positions():
    q, k, v = qkv(n=70, m=N)
    order = torch.randperm(N, generator=generator(6))
    later = torch.arange(50, 120)
    for mask in (M.causal(), M.recent(20), M.documents(torch.arange(N) // 30)):
        _compare(q, k, v, mask=mask, q_pos=later)
        _compare(q, k, v, mask=mask, q_pos=later, k_pos=order)
        _compare(q, k, v, mask=mask, q_pos=torch.stack([later, later - 20]), k_pos=order)


@pytest.mark.parametrize("planes", [False, True], ids=["together", "each plane alone"])
def test_positions_by_head(planes, monkeypatch):
    if planes:
        monkeypatch.setattr(tiled, "PLANE_PAIRS", 0)
    q, k, v = qkv(n=70, m=N)
    pos = torch.stack([torch.randperm(N, generator=generator(i))[:70] for i in range(8)]).reshape(2, 4, 70)
    _compare(q, k, v, mask=M.strided(9, local=3, per_head=2, num_heads=4), q_pos=pos)


def test_strided_inputs_and_one_sample_buffers():
    x = torch.randn(3, N, 3, 4, 8, dtype=torch.float64, generator=generator(1)).requires_grad_()
    q, k, v = (x[:, :, i].transpose(1, 2) for i in range(3))
    results = []
    for backend in ("eager", "tiled"):
        results.append(gradients(attention(q, k, v, mask=M.causal(), backend=backend), [x])[0])
    torch.testing.assert_close(results[1], results[0])


def test_partial_is_the_specifications():
    q, k, v = qkv(n=N, m=N, heads=(4, 2, 1))
    for mask in (None, M.causal(), MASKS["some_empty_rows"]):
        results = []
        for backend in ("eager", "tiled"):
            part = attention_partial(q, k, v, mask=mask, backend=backend)
            shifted = part.shift(0.3).merge(
                Partial(*(torch.full_like(t, x) for t, x in zip(part, (0.0, 1.0, 0.5), strict=True)))
            )
            results.append([part.finish(), part.lse(), *gradients(shifted.finish(), [q, k, v])])
        for spec, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, spec, rtol=1e-9, atol=1e-10)


def test_gradcheck():
    q, k, v = qkv(batch=1, heads=(2, 1, 2), n=5, m=6, d=3, dv=2)
    table = torch.randn(2, 15, dtype=torch.float64, generator=generator()).requires_grad_()
    coords = torch.arange(6)[:, None]
    mask = M.explicit(torch.rand(5, 6, generator=generator(8)) > 0.4)

    def fn(q, k, v, table):
        bias = P.RelativeBias(table, coords[:5], coords, (7,), (15,))
        part = attention_partial(q, k, v, mask=mask, bias=bias, backend="tiled")
        return part.num, torch.where(torch.isinf(part.log_scale), 0.0, part.log_scale)

    assert torch.autograd.gradcheck(fn, (q, k, v, table))


def test_large_scores_and_float32():
    q, k, v = qkv(n=N, m=N, dtype=torch.float32)
    big = (q * 100).detach()
    for normalizer in ("softmax", "sigmoid", "clipped_softmax"):
        out = attention(big, k, v, mask=M.causal(), normalizer=normalizer, backend="tiled")
        spec = attention(big, k, v, mask=M.causal(), normalizer=normalizer, backend="eager")
        torch.testing.assert_close(out, spec, rtol=1e-4, atol=1e-4)


def test_huge_forbidden_keys_change_nothing():
    q, k, v = qkv(n=N, m=N, dtype=torch.float32, grad=False)
    valid = torch.arange(N).expand(2, N) < N - 5
    loud = k.clone()
    loud[:, :, N - 5 :] = 1e38  # scores overflow to infinity
    ours = [attention(q, x, v, valid=valid, backend="tiled") for x in (k, loud)]
    assert torch.equal(*ours)


def test_nothing_is_mutated():
    q, k, v = qkv(n=N, m=N)
    bias, leaves = BIASES["axis"]()
    valid = torch.rand(2, N, generator=generator(3)) > 0.2
    before = [t.detach().clone() for t in (q, k, v, valid, *leaves)]
    gradients(attention(q, k, v, valid=valid, bias=bias, mask=MASKS["explicit"], backend="tiled"), [q, *leaves])
    for old, new in zip(before, (q, k, v, valid, *leaves), strict=True):
        assert torch.equal(old, new)


# ---- the tile lists


@pytest.mark.parametrize("name", list(MASKS))
def test_tiles_hold_exactly_the_admitted_pairs(name):
    mask = MASKS[name]
    exact = mask.dense(N).reshape(-1, N, N)
    exact = exact.reshape(mask.batch(), mask.heads(), N, N)
    tiles = _tiles.tile_list(low(mask), N, N, 40, torch.device("cpu"))
    rebuilt = torch.zeros_like(exact)
    for tile in tiles.tiles:
        part = torch.ones(*exact.shape[:2], tile.rows[1] - tile.rows[0], tile.width, dtype=torch.bool)
        for start, stop, bad in tiles.forbidden(tile):
            part[..., start:stop] &= ~bad
        rebuilt[:, :, slice(*tile.rows), tile.cols] = part
        assert tile.empty or bool(part.any(-1).all())
    assert torch.equal(rebuilt, exact)


def test_pairs_that_are_too_many_to_keep_are_computed_again(monkeypatch):
    monkeypatch.setattr(_tiles, "KEEP_PAIRS", 0)
    q, k, v = qkv(n=N, m=N)
    tiles = _tiles.tile_list(low(MASKS["explicit"]), N, N, 40, torch.device("cpu"))
    assert any(bad is None for tile in tiles.tiles for *_, bad in tile.forbidden)
    for name in ("explicit", "blocks", "neighborhood"):
        _compare(q, k, v, mask=MASKS[name])


def test_windows_are_contiguous_and_tight():
    tiles = _tiles.tile_list(low(M.sliding_window(33)), 1024, 1024, 64, torch.device("cpu"))
    assert all(isinstance(t.cols, slice) for t in tiles.tiles) and tiles.width == 64 + 32
    assert tiles.area() <= 1024 * 96


def test_blocks_are_gathered_without_waste():
    chosen = torch.rand(16, 16, generator=generator(2)) < 0.25
    tiles = _tiles.tile_list(low(M.blocks(chosen, 64, 64)), 1024, 1024, 64, torch.device("cpu"))
    assert tiles.area() <= int(chosen.sum()) * 64 * 64 / _tiles.DENSE_ENOUGH
    assert any(isinstance(t.cols, torch.Tensor) for t in tiles.tiles)


def test_lowering_is_remembered_but_never_stale():
    q, k, v = qkv(n=N, m=N, grad=False)
    mask = M.documents(torch.arange(N) // 30)
    first = attention(q, k, v, mask=mask, backend="tiled")
    where = (low(mask), N, N, 40, torch.device("cpu"))
    assert _tiles.tile_list(*where) is _tiles.tile_list(*where)
    where[0].mask_tensors[0].copy_(
        torch.arange(N) // 44
    )  # a mask keeps its tensors to itself; what was lowered is open
    second = attention(q, k, v, mask=mask, backend="tiled")
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, attention(q, k, v, mask=mask, backend="eager"))
    for i in range(50):  # tensors that die make room for others at the same address
        allowed = torch.rand(N, N, generator=generator(i)) > 0.5
        torch.testing.assert_close(
            attention(q, k, v, mask=allowed, backend="tiled"), attention(q, k, v, mask=allowed, backend="eager")
        )
    before = len(_tiles._cache)
    del allowed
    assert len(_tiles._cache) < before


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(_tiles, "CACHE_LISTS", 3)
    for window in range(3, 9):
        _tiles.tile_list(low(M.sliding_window(window)), N, N, 40, torch.device("cpu"))
    assert len(_tiles._cache) == 3
    monkeypatch.setattr(_tiles, "CACHE_PAIRS", 0)
    _tiles.tile_list(low(M.causal()), N, N, 40, torch.device("cpu"))
    assert len(_tiles._cache) == 0


# ---- memory


@pytest.mark.parametrize("mask", [None, M.sliding_window(64)], ids=str)
def test_memory_grows_with_n(mask):
    """From 1024 to 4096 tokens the map grows 16 times, what tiled holds at most 4 times and a little."""
    peaks = []
    for n in (1024, 4096):
        q, k, v = qkv(batch=1, heads=(1, 1, 1), n=n, m=n, dtype=torch.float32)
        attention(q, k, v, mask=mask, backend="tiled")

        def step(q=q, k=k, v=v):
            out = attention(q, k, v, mask=mask, backend="tiled")
            return torch.autograd.grad(out, (q, k, v), out)

        peaks.append(peak_bytes(step))
    assert 0 < peaks[0] and peaks[1] <= 4.4 * peaks[0]
    assert peaks[1] < 4096 * 4096


# ---- compile, export, FLOPs


class Net(nn.Module):
    """What a mechanism does around the operator: positions, a mask, a bias, valid tokens."""

    def __init__(self, normalizer="softmax", mask=None, bias=False, partial=False):
        super().__init__()
        self.normalizer, self.mask, self.partial = normalizer, mask, partial
        self.table = nn.Parameter(torch.randn(4, 401, generator=generator())) if bias else None

    def forward(self, q, k, v, valid=None):
        bias = None
        if self.table is not None:
            at = torch.arange(q.shape[2])[:, None]
            bias = P.RelativeBias(self.table, at, at, (200,), (401,))
        if self.partial:
            part = attention_partial(q, k, v, mask=self.mask, valid=valid, bias=bias, backend="tiled")
            return part.merge(
                Partial(torch.zeros_like(part.den), torch.ones_like(part.den), torch.zeros_like(part.num))
            ).finish()
        return attention(
            q, k, v, mask=self.mask, valid=valid, bias=bias, normalizer=self.normalizer, backend="tiled"
        )  # fmt: skip


NETS = {
    "softmax": dict(),
    "sigmoid window": dict(normalizer="sigmoid", mask=M.sliding_window(9)),
    "clipped causal biased": dict(normalizer=ClippedSoftmax(-0.02), mask=M.causal(), bias=True),
    "grid": dict(mask=M.neighborhood((12, 11), 3, 1, 1, (True, False)) | M.prefix_lm(4)),
    "tensors": dict(mask=M.documents(torch.arange(300) // 30) & ~M.strided(5)),
    "partial": dict(mask=M.causal(), bias=True, partial=True),
}


@pytest.mark.parametrize("name", list(NETS))
def test_fullgraph_compile_forward_and_backward(name):
    torch._dynamo.reset()
    net = Net(**NETS[name])
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    q, k, v = qkv(n=N, m=N, dtype=torch.float32)
    valid = torch.rand(2, N, generator=generator(3)) > 0.2
    results = []
    for module in (net, compiled):
        module.zero_grad()
        out = module(q, k, v, valid)
        results.append([out, *gradients(out, [q, k, v, *module.parameters()])])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


def test_compile_with_dynamic_sizes_does_not_compile_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(
        Net(mask=M.recent(20), normalizer="sigmoid"), fullgraph=True, dynamic=True, backend=counter
    )
    for n in (64, 100, 132):
        q, k, v = qkv(n=n, m=n, grad=False)
        torch.testing.assert_close(compiled(q, k, v), Net(mask=M.recent(20), normalizer="sigmoid")(q, k, v))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dynamic_n(name, strict):
    net = Net(**NETS[name])
    q, k, v = qkv(n=N, m=N, dtype=torch.float32, grad=False)
    valid = torch.rand(2, N, generator=generator(3)) > 0.2
    tokens = torch.export.Dim("tokens", min=2, max=N)  # more than the mask of a grid knows are refused
    shapes = {"q": {2: tokens}, "k": {2: tokens}, "v": {2: tokens}, "valid": {1: tokens}}
    program = torch.export.export(net, (q, k, v, valid), dynamic_shapes=shapes, strict=strict)
    assert sum("attnlib.tiled_attention" in str(node.target) for node in program.graph.nodes) == 1
    for n in (N, 57):
        part = [t[:, :, :n] for t in (q, k, v)]
        torch.testing.assert_close(program.module()(*part, valid[:, :n]), net(*part, valid[:, :n]))


def test_automatic_choice_traces_with_dynamic_n():
    """The choice must not tie the graph to a size: the same backend is taken for every N."""

    class Auto(nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, mask=M.sliding_window(9)) + attention(q, k, v, normalizer="sigmoid")

    q, k, v = qkv(n=N, m=N, dtype=torch.float32, grad=False)
    tokens = torch.export.Dim("tokens", min=2, max=2000)
    shapes = {name: {2: tokens} for name in "qkv"}
    program = torch.export.export(Auto(), (q, k, v), dynamic_shapes=shapes)
    assert sum("attnlib.tiled_attention" in str(node.target) for node in program.graph.nodes) == 2
    torch.testing.assert_close(program.module()(q, k, v), Auto()(q, k, v))


def test_operator_registrations_hold():
    """PyTorch's own check: schema, fake tensors, autograd registration, dynamic shapes."""
    q, k, v = qkv(n=20, m=20, dtype=torch.float32)
    bias = P.RelativeBias(torch.randn(4, 39).requires_grad_(), *[torch.arange(20)[:, None]] * 2, (19,), (39,))
    spec, tensors = bias.lower()
    args = (q, k, v, None, None, None, [torch.arange(20) // 7], tensors)
    rest = (M.documents(args[6][0]).lower()[0], spec, '{"name":"softmax"}', 0.3)
    for partial in (False, True):
        torch.library.opcheck(tiled.tiled_attention, (*args, *rest, partial))
    torch.library.opcheck(tiled.tiled_attention, (*args, *rest[:2], '{"name":"softplus_l1"}', 0.3, False))


def test_fake_output_lies_in_memory_as_the_real_one():
    q, k, v = qkv(dtype=torch.float32, grad=False)
    real = attention(q, k, v, normalizer="sigmoid", backend="tiled")
    fake = attention(*(t.to("meta") for t in (q, k, v)), normalizer="sigmoid", backend="tiled")
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.transpose(1, 2).is_contiguous()


def test_flops_count_admitted_tiles_only():
    q, k, v = qkv(batch=2, heads=(4, 2, 2), n=512, m=512, d=8, dv=16, dtype=torch.float32)

    def count(mask, backward=False):
        with FlopCounterMode(display=False) as counter:
            out = attention(q, k, v, mask=mask, normalizer="sigmoid", backend="tiled")
            if backward:
                out.sum().backward()
        return counter.get_total_flops()

    dense = 2 * 2 * 4 * 512 * 512
    assert count(None) == dense * (8 + 16)
    assert count(None, backward=True) == dense * (8 + 16) + dense * (3 * 8 + 2 * 16)
    window = count(M.sliding_window(33))
    assert 2 * 2 * 4 * 512 * 33 * 24 <= window <= 2 * 2 * 4 * 512 * (33 + 48) * 24
    assert count(M.documents(torch.arange(512) // 64)) < 0.4 * count(None)
    half = torch.cat([torch.ones(2, 256), torch.zeros(2, 256)], 1).bool()
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, valid=half, normalizer="sigmoid", backend="tiled")
    assert counter.get_total_flops() == dense * 24 // 2


def test_flops_on_meta_tensors():
    """Without contents a mask of tensors counts as dense; one without tensors is counted as it runs."""
    q, k, v = (t.to("meta") for t in qkv(n=512, m=512, dtype=torch.float32, grad=False))
    counts = []
    for mask in (None, M.sliding_window(33), M.documents(torch.zeros(512, dtype=torch.long, device="meta"))):
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v, mask=mask, backend="tiled")
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.3 * counts[0] and counts[2] == counts[0]


def test_autocast_inside_the_operator_changes_nothing():
    q, k, v = qkv(n=N, m=N, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, mask=M.causal(), normalizer="sigmoid", backend="tiled")
        grads = gradients(out, [q, k, v])
    spec = attention(q, k, v, mask=M.causal(), normalizer="sigmoid", backend="eager")
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, spec)
    for a, b in zip(grads, gradients(spec, [q, k, v]), strict=True):
        torch.testing.assert_close(a, b)


def test_inference_mode():
    with torch.inference_mode():
        q, k, v = (t.clone() for t in qkv(n=N, m=N, grad=False))
        allowed = torch.rand(N, N, generator=generator(2)) > 0.5
        out = attention(q, k, v, mask=allowed, backend="tiled")
        assert out.is_inference()
        torch.testing.assert_close(out, attention(q, k, v, mask=allowed, backend="eager"))
        attention(q, k, v, mask=M.recent(3), backend="tiled")
    q, k, v = qkv(n=N, m=N)  # what was lowered in inference mode must serve training
    _compare(q, k, v, mask=M.recent(3))


@pytest.mark.parametrize(
    "call,words", [({"dropout_p": 0.1}, "no dropout"), ({"return_weights": True}, "cannot return them")], ids=str
)
def test_refusals_give_the_reason(call, words):
    q, k, v = qkv(grad=False)
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, backend="tiled", **call)
    assert words in explain(q, k, v, normalizer="relu", **call)
