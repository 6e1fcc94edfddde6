"""Cascades of Einsums: what follows from their text, and that the text computes what the operators compute."""

import pytest
import torch

import attnlib
from attnlib.normalizers import (
    Activated,
    ClippedSoftmax,
    Relu,
    Sigmoid,
    Softmax,
    SoftplusL1,
    Step,
    Thresholded,
    Uniform,
    normalizer_names,
)
from attnlib.ops import block_sparse, linear, neighborhood, nystrom, partition, reduced, sampled, split_decoding
from attnlib.ops.modulation import channel_attention, depthwise, gated_sum, modulate, pool
from attnlib.ops.toeplitz import toeplitz_attention
from attnlib.theory.cascade import Cascade, Einsum
from attnlib.theory.cascades import OPERATORS, attention_cascade, softmax_cascade, unstable_cascade
from attnlib.types import Partial

DOUBLE = torch.double


def rand(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def blocks(x, size):
    """(B, H, M, D) -> (B, H, M / size, size, D)."""
    return x.unflatten(2, (-1, size))


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


# ---- the paper's cascades


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_all_cascades_of_softmax_compute_softmax(deferred, size):
    q, k, v = rand(2, 2, 5, 3), rand(2, 2, 12, 3), rand(2, 2, 12, 4)
    q = q * size
    expected = attnlib.attention(q, k, v, scale=1.0, backend="eager")
    for passes in (1, 2, 3):
        c = softmax_cascade(passes, deferred)
        cut = (lambda x: blocks(x, 4)) if passes < 3 else (lambda x: x)
        close(c.evaluate({"Q": q, "K": cut(k), "V": cut(v)})["AV"], expected)
    naive = unstable_cascade(deferred).evaluate({"Q": q, "K": k, "V": v})["AV"]
    if size == 1.0:
        close(naive, expected)
    else:
        assert not torch.isfinite(naive).all()


def test_passes_are_the_papers():
    assert [softmax_cascade(n).passes() for n in (3, 2, 1)] == [3, 2, 1]
    assert [softmax_cascade(n, deferred=True).passes() for n in (3, 2, 1)] == [2, 1, 1]
    assert [unstable_cascade(d).passes() for d in (False, True)] == [2, 1]


def test_footprints():
    """One pass keeps E + F + 2 per query, whatever M; the others keep the whole row."""
    assert softmax_cascade(1).footprint_text() == "E + F + 2"
    sizes = dict(b=1, h=1, p=1, e=64, f=64, m=1024, m1=4, m0=256)
    longer = {**sizes, "m": 4096, "m1": 16}
    one, three = softmax_cascade(1), softmax_cascade(3)
    assert one.state(sizes) == one.state(longer) == 64 + 64 + 2
    assert three.state(longer) - three.state(sizes) == 4096 - 1024
    assert softmax_cascade(2).state(longer) > 4096
    assert [t for t, _, _ in three.crossing()] == ["QK", "SN"] and not one.crossing()


def test_operations_equal_the_artifacts_table():
    """Operations per point of each Einsum, as proposal.py:Proposal.compute_cost lists them (exp is 6 mac)."""
    table = {
        "QK": {"mac": 1}, "LM": {"max": 1}, "RM": {"max": 1}, "PRM": {"mac": 6, "add": 1}, "SPD": {"mac": 1},
        "SPNV": {"mac": 1}, "SLN": {"mac": 6, "add": 1}, "SLD": {"add": 1}, "SLNV": {"mac": 1}, "RD": {"add": 1},
        "RNV": {"add": 1}, "AV": {"divide": 1},
    }  # fmt: skip
    c = softmax_cascade(1)
    sizes = dict(b=2, h=3, p=5, e=7, f=11, m1=4, m0=8)
    points = {e.out: (e, c._size(e.ranks, sizes)) for e in c.einsums if not e.initial}
    assert set(points) == set(table)
    expected = {}
    for name, (e, n) in points.items():
        found = dict(e.operations)
        found = {**{k: v for k, v in found.items() if k != "exp"}, **({"mac": 6} if "exp" in found else {})}
        assert found == table[name], name
        for op, count in table[name].items():
            expected[op] = expected.get(op, 0) + count * n
    assert c.operations(sizes, exp={"mac": 6}) == expected


def test_deferring_the_division_saves_divisions():
    sizes = dict(b=1, h=1, p=16, e=4, f=8, m=64)
    assert softmax_cascade(3).operations(sizes)["divide"] == 64 * 16
    assert softmax_cascade(3, deferred=True).operations(sizes)["divide"] == 8 * 16


#: traffic in bytes from the artifact's pregenerated results: attn-binding.csv (one pass, fused) at 1K, 4K, .., 1M and
#: attn-unfused.csv at 1K to 64K; with the heads and widths of flat_validation.csv, batch 64.
LENGTHS = (1024, 4096, 16384, 65536, 262144, 1048576)
MODELS = {
    "BERT": (12, 64, (402653184, 1610612736, 6442450944, 38654705664, 463856467968, 6803228196864),
             (6845104128, 104689827840, 1655709892608, 26414048870400)),
    "TrXL": (16, 64, (536870912, 2147483648, 8589934592, 51539607552, 618475290624, 9070970929152),
             (9126805504, 139586437120, 2207613190144, 35218731827200)),
    "T5": (8, 64, (268435456, 1073741824, 4294967296, 25769803776, 309237645312, 4535485464576),
           (4563402752, 69793218560, 1103806595072, 17609365913600)),
    "XLM": (16, 128, (1073741824, 4294967296, 17179869184, 171798691840, 2336462209024, 35734127902720),
            (9663676416, 141733920768, 2216203124736, 35253091565568)),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_traffic_equals_the_artifacts(model):
    """The tile of queries follows from our footprint and their 16 MB buffer, and gives their traffic to the byte."""
    heads, width, fused, unfused = MODELS[model]
    c, array, word = softmax_cascade(1), 256, 2
    room = 16 * 2**20 - 2 * array * width * word
    for n, expected in zip(LENGTHS, fused, strict=True):
        sizes = dict(b=64, h=heads, e=width, f=width, p=n, m1=n // array, m0=array)
        most = min(room // (c.state({**sizes, "p": 1}) * word * array), n // array)
        tile = next(t for t in range(most, 0, -1) if n // array % t == 0) * array
        assert c.traffic(sizes, tile={"p": tile}) * word == expected
    c = softmax_cascade(3)
    for n, expected in zip(LENGTHS, unfused, strict=False):
        sizes = dict(b=64, h=heads, e=width, f=width, p=n, m=n)
        assert c.traffic(sizes, groups=[["QK"], ["GM", "SN", "SD", "A"], ["AV"]]) * word == expected


def test_ways_to_treat_what_outlives_its_pass():
    c = softmax_cascade(3)
    sizes = dict(b=1, h=1, p=8, e=4, f=4, m=32)
    keep, spill, again = (c.traffic(sizes, crossing=how) for how in ("keep", "spill", "recompute"))
    assert keep == 2 * 8 * 4 + 2 * 32 * 4
    assert spill == keep + 2 * (2 * 8 * 32)  # QK and SN, written once and read once
    assert again == keep + 2 * 32 * 4  # the keys again in passes 2 and 3
    assert c.traffic(sizes, tile={"p": 2}) == 2 * 8 * 4 + 4 * 2 * 32 * 4


# ---- normalizers


NORMALIZERS = [
    Softmax(),
    Sigmoid(bias=-1.5),
    ClippedSoftmax(),
    ClippedSoftmax(gamma=-0.2, zeta=1.3),
    Relu(divisor=3.0),
    Step(),
    Thresholded(),
    Thresholded(0.6),
    SoftplusL1(),
    Uniform(u=0.3),
    Uniform(),
    *[Activated(phi) for phi in ("exp", "softplus", "sigmoid", "relu", "elu1")],
    *[Activated(phi, l1=False) for phi in ("exp", "softplus", "relu")],
    *[Activated(phi, power=3.0) for phi in ("exp", "softplus", "relu")],
    Activated("softplus", power=2.0, offset=0.5, spare=5),
]


@pytest.mark.parametrize("norm", NORMALIZERS, ids=repr)
def test_every_normalizer_is_its_cascade(norm):
    """Equal to the operator in float64, with pairs and a row that may not meet; and its passes are as it says."""
    q, k, v = rand(1, 2, 9, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    allowed = torch.rand(9, 12) > 0.4
    allowed[3] = False
    allowed[5] = torch.arange(12) == 7
    bias = torch.where(allowed, rand(1, 2, 9, 12), float("-inf"))
    expected = attnlib.attention(q, k, v, bias=bias.masked_fill(~allowed, 0.0), mask=allowed, normalizer=norm,
                                 backend="eager")  # fmt: skip
    c = attention_cascade(norm)
    got = c.evaluate({"Q": q, "K": blocks(k, 4), "V": blocks(v, 4), "W": bias.unflatten(-1, (3, 4)), "SCALE": 3**-0.5})
    close(got["AV"], expected)
    assert c.passes() == norm.passes


def test_a_uniform_mixture_can_be_had_in_one_pass():
    """Passes belong to an algorithm: mixing the two results instead of the two maps saves one."""
    one = softmax_cascade(1)
    text = f"{one}\nCNT[~p] += finite(QK[~p,m1,m0])\nSUM[~p,f] += finite(QK[~p,m1,m0]) * V[~m1,m0,f]\n"
    text += "MIX[~p,f] = AV[~p,f] * 0.7 + SUM[~p,f] / CNT[~p] * 0.3"
    c = Cascade(text, {n: " ".join(r) for n, r in one.inputs.items()}, ["MIX"], one.over)
    q, k, v = rand(1, 2, 5, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    got = c.evaluate({"Q": q, "K": blocks(k, 4), "V": blocks(v, 4)})["MIX"]
    close(got, attnlib.attention(q, k, v, scale=1.0, normalizer=Uniform(u=0.3), backend="eager"))
    assert c.passes() == 1 < Uniform(u=0.3).passes and not c.crossing()


def test_no_normalizer_is_left_out():
    assert {n.name for n in NORMALIZERS} == set(normalizer_names())


def test_one_pass_normalizers_keep_no_row():
    for norm in NORMALIZERS:
        crossing = [t for t, _, _ in attention_cascade(norm).crossing()]
        assert bool(crossing) == (norm.passes == 2), (norm, crossing)


# ---- operators


def check_attention():
    q, k, v = rand(1, 2, 7, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    return {"Q": q, "K": blocks(k, 4), "V": blocks(v, 4), "SCALE": 3**-0.5}, {}, {"AV": attnlib.attention(q, k, v)}


def check_partial():
    q, k, v = rand(1, 2, 7, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    allowed = torch.rand(7, 12) > 0.3
    part = attnlib.attention_partial(q, k, v, mask=allowed)
    bias = torch.zeros(1, 2, 7, 12, dtype=DOUBLE).masked_fill(~allowed, float("-inf"))
    given = {"Q": q, "K": blocks(k, 4), "V": blocks(v, 4), "W": bias.unflatten(-1, (3, 4)), "SCALE": 3**-0.5}
    return (
        given,
        {},
        lambda got: (
            close(Partial(got["TOP"], got["DEN"], got["NUM"]).finish(), part.finish())
            or close(Partial(got["TOP"], got["DEN"], got["NUM"]).lse(), part.lse())
        ),
    )


def check_merge():
    q, k, v = rand(1, 2, 7, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    parts = [attnlib.attention_partial(q, k[:, :, a : a + 3], v[:, :, a : a + 3]) for a in range(0, 12, 3)]
    given = {name: torch.stack([getattr(p, f) for p in parts], -1) for name, f in
             (("TOP", "log_scale"), ("DEN", "den"), ("NUM", "num"))}  # fmt: skip
    close(parts[0].merge(*parts[1:]).finish(), attnlib.attention(q, k, v))
    return given, {}, {"AV": attnlib.attention(q, k, v)}


def check_split():
    q, k, v = rand(1, 2, 3, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    given = {"Q": q, "K": blocks(k, 4), "V": blocks(v, 4), "SCALE": 3**-0.5}
    return given, {}, {"AV": split_decoding(q, k, v, tile=4, workers=3)}


def check_block_sparse():
    q, k, v = rand(1, 2, 8, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    index = torch.stack([torch.randperm(4)[:3] for _ in range(8)]).view(1, 2, 4, 3)
    count = torch.tensor([[[3, 1, 2, 3], [2, 2, 1, 0]]])
    plan = block_sparse.BlockPlan(index, q_block=2, k_block=3, n=8, m=12, count=count)
    hidden = torch.arange(3) >= count[..., None]
    bias = torch.zeros(1, 2, 4, 2, 3, 3, dtype=DOUBLE).masked_fill(hidden[:, :, :, None, :, None], float("-inf"))
    given = {"Q": blocks(q, 2), "K": blocks(k, 3), "V": blocks(v, 3), "IDX": index, "W": bias, "SCALE": 3**-0.5}
    return given, {}, {"AV": blocks(block_sparse.block_sparse_attention(q, k, v, plan), 2)}


def check_neighborhood(n=11, kernel=3, dilation=2):
    q, k, v, table = rand(1, 2, n, 3), rand(1, 2, n, 3), rand(1, 2, n, 4), torch.zeros(n, kernel, dtype=DOUBLE)
    (rule,) = neighborhood.axis_rules((n,), kernel, dilation)
    start = torch.zeros(n, dtype=torch.long)
    for i in range(n):
        group = i % dilation
        first, last = rule.window(i // dilation, rule.group_length(group))
        assert last - first + 1 == kernel
        start[i] = first * dilation + group
    given = {"Q": q, "K": k, "V": v, "START": start, "STEP": torch.full((n,), dilation), "W": table, "SCALE": 3**-0.5}
    return given, {}, {"AV": neighborhood.neighborhood_attention(q, k, v, kernel_size=kernel, dilation=dilation)}


def check_partition():
    q, k, v = rand(1, 2, 12, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    queries, keys = torch.randperm(12).view(3, 4), torch.randperm(12).view(3, 4)
    from attnlib.grids import Partition

    group, slot = torch.empty(2, 12, dtype=torch.long)
    for g in range(3):
        for i in range(4):
            group[queries[g, i]], slot[queries[g, i]] = g, i
    given = {"Q": q, "K": k, "V": v, "QI": queries, "KI": keys, "GROUP": group, "SLOT": slot, "SCALE": 3**-0.5}
    return given, {}, {"AV": partition.partition_attention(q, k, v, Partition(queries, keys))}


def check_reduced():
    q, k, v = rand(1, 2, 7, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    given = {"Q": q, "K": blocks(k, 4), "V": blocks(v, 4), "SHARE": torch.full((4,), 0.25, dtype=DOUBLE),
             "SCALE": 3**-0.5}  # fmt: skip
    return given, {}, {"AV": reduced.reduced_attention(q, k, v, block=4)}


def check_agent():
    q, a, k, v = rand(1, 2, 7, 3), rand(1, 2, 5, 3), rand(1, 2, 12, 3), rand(1, 2, 12, 4)
    given = {"Q": q, "A": a, "K": blocks(k, 4), "V": blocks(v, 4), "SCALE": 3**-0.5}
    return given, {}, {"AV": reduced.agent_attention(q, a, k, v)}


def check_reversed():
    q, k, v, message = rand(1, 2, 7, 3), rand(1, 2, 12, 3), rand(1, 2, 7, 4), rand(1, 2, 7)
    given = {"Q": q, "K": k, "V": v, "MSG": message.exp(), "SCALE": 3**-0.5}
    out = attnlib.ops.reversed_attention(q, k, v, log_message=message, backend="passes")
    return given, {}, {"AV": out}


def features(n=12, m=12):
    return torch.rand(1, 2, n, 3, dtype=DOUBLE), torch.rand(1, 2, m, 3, dtype=DOUBLE), rand(1, 2, m, 4)


def check_linear_recurrent():
    q, k, v = features()
    decay = -torch.rand(1, 2, 12, dtype=DOUBLE)
    expected = linear.linear_attention(q, k, v, decay=decay, normalizer="sum")
    return {"Q": q, "K": k, "V": v, "G": decay.exp()}, {}, {"AV": expected}


def check_linear_chunkwise():
    q, k, v = features()
    decay = -torch.rand(2, dtype=DOUBLE)
    at = torch.arange(4, dtype=DOUBLE)
    inside = torch.exp(decay[:, None, None] * (at[:, None] - at)).tril()
    given = {
        "Q": blocks(q, 4), "K": blocks(k, 4), "V": blocks(v, 4), "INSIDE": inside,
        "REACH": torch.exp(decay[:, None] * (at + 1)), "STAY": torch.exp(decay[:, None] * (3 - at)),
        "KEEP": torch.exp(decay * 4),
    }  # fmt: skip
    return given, {"j": 4}, {"AV": blocks(linear.linear_attention(q, k, v, decay=decay, chunk=4), 4)}


def check_linear_parallel():
    q, k, v = features()
    decay = -torch.rand(2, dtype=DOUBLE)
    at = torch.arange(12, dtype=DOUBLE)
    given = {"Q": q, "K": k, "V": v, "DECAY": torch.exp(decay[:, None, None] * (at[:, None] - at).abs())}
    return given, {}, {"AV": linear.linear_attention(q, k, v, decay=decay, normalizer="sum", causal=False)}


def check_linear_bidirectional():
    q, k, v = features(7, 12)
    expected = linear.linear_attention(q, k, v, normalizer="sum", causal=False)
    return {"Q": q, "K": k, "V": v}, {}, {"AV": expected}


def check_selective_scan():
    u, step = rand(2, 9, 3), torch.rand(2, 9, 3, dtype=DOUBLE)
    decays, enter, leave = -torch.rand(3, 4, dtype=DOUBLE), rand(2, 9, 4), rand(2, 9, 4)
    given = {"STEP": step.mT, "A": decays, "X": (step * u).mT, "IN": enter, "OUT": leave}
    return given, {}, {"Y": attnlib.ops.selective_scan(u, step, decays, enter, leave).mT}


def check_toeplitz():
    q, k, v = features(5, 8)
    bias = rand(2, 12)
    given = {"Q": q, "K": k, "V": v, "C": bias.exp(), "LAST": torch.full((5,), 4)}
    return given, {}, {"AV": toeplitz_attention(q, k, v, bias)}


def points(axes):
    shapes, locations = [(3, 4), (2, 2)], torch.rand(1, 2, 5, 2, 3, axes, dtype=DOUBLE) * 1.4 - 0.2
    numbers, bilinear = sampled._corners(locations[..., :2], shapes)
    weights = torch.rand(1, 2, 5, 2, 3, dtype=DOUBLE)
    return shapes, locations, weights, numbers, bilinear


def check_deformable():
    v = rand(1, 2, 16, 4)
    shapes, locations, weights, numbers, bilinear = points(2)
    given = {"V": v, "IDX": numbers.flatten(3), "W": (bilinear * weights[..., None]).flatten(3)}
    return given, {}, {"AV": sampled.deformable_attention(v, shapes, locations, weights)}


def check_deformable_3d(bins=5):
    v, depth = rand(1, 2, 16, 4), torch.rand(1, 2, 16, 5, dtype=DOUBLE)
    shapes, locations, weights, numbers, bilinear = points(3)
    # linear between bins whose centres lie at (i + 0.5) / Z, zero beyond the ends
    at = locations[..., 2] * bins - 0.5
    ramp = (1 - (at[..., None] - torch.arange(bins)).abs()).clamp(min=0)
    ramp = ramp[..., None, :].expand(*numbers.shape, bins)
    given = {"V": v, "DEPTH": depth, "IDX": numbers.flatten(3), "W": (bilinear * weights[..., None]).flatten(3),
             "R": ramp.flatten(3, 5)}  # fmt: skip
    return given, {}, {"AV": sampled.deformable_attention_3d(v, depth, shapes, locations, weights)}


def check_modulation():
    x, q, w1, w2, gates = rand(2, 9, 4), rand(2, 9, 4), rand(4, 3), rand(4, 3), rand(2, 9, 3)
    z1 = depthwise(x, w1[:, None])
    z2 = depthwise(z1, w2[:, None])
    expected = modulate(q, gated_sum([z1, z2, pool(z2)], gates))
    given = {"X": x, "Q": q, "W1": w1, "W2": w2, "SHARE": torch.full((9,), 1 / 9, dtype=DOUBLE),
             **{f"G{i + 1}": gates[..., i] for i in range(3)}}  # fmt: skip
    return given, {}, {"Y": expected}


def check_nystrom():
    q, marks, v = rand(2, 3, 5, 4), rand(2, 3, 2, 4), rand(2, 3, 5, 6)
    inverse = nystrom.newton_inverse(nystrom.gaussian_kernel(marks, marks), check=False)
    return {"Q": q, "L": marks, "INV": inverse, "V": v}, {}, {"AV": nystrom.nystrom_attention(q, marks, v)}


def check_channel_attention():
    q, k, v = rand(1, 2, 9, 3), rand(1, 2, 9, 4), rand(1, 2, 9, 4)
    return {"Q": q, "K": k, "V": v, "SCALE": 1 / 3}, {}, {"Y": channel_attention(q, k, v)}


def check_patch_attention():
    """Patches of one pixel, by cosines."""
    x, c = rand(1, 2, 4, 5), rand(1, 3, 4, 5)
    unit = lambda t: torch.nn.functional.normalize(t.flatten(1, 2).unsqueeze(1), dim=-1)  # noqa: E731
    given = {"Q": unit(x), "K": blocks(unit(c), 4), "V": blocks(c.flatten(1, 2).unsqueeze(1), 4), "SCALE": 10.0}
    want = attnlib.ops.patch_attention(x, c, kernel=1, similarity="cosine")
    return given, {}, {"AV": want.flatten(1, 2).unsqueeze(1)}


CHECKS = {
    "attention": check_attention, "attention_partial": check_partial, "merge": check_merge, "split": check_split,
    "block_sparse": check_block_sparse, "neighborhood": check_neighborhood, "partition": check_partition,
    "reduced": check_reduced, "agent": check_agent, "reversed": check_reversed, "nystrom": check_nystrom,
    "linear_recurrent": check_linear_recurrent,
    "linear_chunkwise": check_linear_chunkwise, "linear_parallel": check_linear_parallel,
    "linear_bidirectional": check_linear_bidirectional, "toeplitz": check_toeplitz, "deformable": check_deformable,
    "selective_scan": check_selective_scan,
    "deformable_3d": check_deformable_3d, "modulation": check_modulation, "channel_attention": check_channel_attention,
    "patch_attention": check_patch_attention,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_its_cascade(name):
    given, sizes, expected = CHECKS[name]()
    cascade = OPERATORS[name].cascade()
    got = cascade.evaluate(given, **sizes)
    if callable(expected):
        expected(got)
    else:
        for tensor, value in expected.items():
            assert tensor in cascade.outputs
            close(got[tensor], value)


def test_passes_and_footprints_of_the_operators():
    """What the table says; two walks where something of the whole is put back onto its tokens."""
    found = {n: (d.cascade().passes(), d.cascade().footprint_text()) for n, d in OPERATORS.items()}
    assert found == {
        "attention": (1, "E + F + 2"), "attention_partial": (1, "E + F + 2"), "merge": (1, "F + 2"),
        "split": (1, "F S + 3 S"),
        "block_sparse": (1, "E + F + 2"), "neighborhood": (1, "E + F + 2"), "partition": (1, "E + F + 2"),
        "reduced": (1, "E + F + 2"), "agent": (1, "A E + A F + 2 A"), "reversed": (3, "P M + F M + 2 M"),
        "linear_recurrent": (1, "D F + D"),
        "linear_chunkwise": (1, "D F"), "linear_parallel": (1, "D + F + 1"), "linear_bidirectional": (1, "D F + D"),
        "toeplitz": (1, "D + F + 1"), "deformable": (1, "F"), "deformable_3d": (1, "F"),
        "selective_scan": (1, "S"), "nystrom": (2, "P A + A C"),
        "modulation": (2, "2 T C + C"), "channel_attention": (2, "C D"), "patch_attention": (1, "E + F + 2"),
    }  # fmt: skip


def test_every_operator_of_the_package_is_described():
    named = {f for d in OPERATORS.values() for f in d.functions}
    operators = {n for n in attnlib.ops.__all__ if n.endswith(("attention", "partial")) or "attention" in n}
    assert operators <= named, operators - named


def test_a_cascade_of_its_own_and_its_arithmetic():
    """Iteration by hand: a cumulative sum and its last generation; shifts read zero outside."""
    c = Cascade("C[0] = 0\nC[t+1] = C[t] + X[t]\nY[t] = C[t+1] - X[t-2]\nL[one] = C[-1] * ONE[one]",
                {"X": "t", "ONE": "one"}, ["Y", "L"], over=("t",), per=())  # fmt: skip
    x = rand(6)
    got = c.evaluate({"X": x, "ONE": torch.ones(1, dtype=DOUBLE)})
    close(got["Y"], x.cumsum(0) - torch.cat([torch.zeros(2, dtype=DOUBLE), x[:-2]]))
    close(got["L"], x.sum()[None])
    assert c.passes() == 1


def test_bad_text_is_refused():
    for text, message in (
        ("S[p] = X[m,p]", r"reduces over \['m'\]"),
        ("S[p] += tanh(X[m,p])", "function='tanh' is not possible"),
        ("S += X[m]", "left side must be a tensor"),
        ("S[p] Y[p]", "must read OUT"),
        ("S[p] = Y[p", "never closed"),
    ):
        with pytest.raises(ValueError, match=message):
            Einsum.parse(text)
    with pytest.raises(ValueError, match="reads Y, which is neither"):
        Cascade("S[p] = Y[p]", {"X": "p"}, ["S"], ("p",))
    with pytest.raises(ValueError, match="output Z is not made"):
        Cascade("S[p] = X[p]", {"X": "p"}, ["Z"], ("p",))
    c = softmax_cascade(3)
    with pytest.raises(ValueError, match="needs the input K"):
        c.evaluate({"Q": rand(1, 1, 2, 3)})
    with pytest.raises(ValueError, match="rank e is 3 and, in K, 4"):
        c.evaluate({"Q": rand(1, 1, 2, 3), "K": rand(1, 1, 5, 4), "V": rand(1, 1, 5, 4)})
    with pytest.raises(ValueError, match="sizes lack"):
        c.traffic({"p": 3})
    with pytest.raises(ValueError, match="crossing='forget'"):
        c.traffic({}, crossing="forget")
    with pytest.raises(ValueError, match="groups must name every tensor once"):
        c.traffic({}, groups=[["QK"]])
    with pytest.raises(ValueError, match="passes=4"):
        softmax_cascade(4)


def test_a_planted_second_walk_is_seen():
    """Subtracting the mean of all scores before the sigmoid costs a pass; a running mean does not."""
    inputs = {"X": "p m", "V": "m f"}
    text = "MEAN[p] += X[p,m]\nA[p,m] = sigmoid(X[p,m] - MEAN[p])\nY[p,f] += A[p,m] * V[m,f]"
    assert Cascade(text, inputs, ["Y"], ("m",), ("p",)).passes() == 2
    text = "R[p,0] = 0\nR[p,m+1] = R[p,m] + X[p,m]\nA[p,m] = sigmoid(X[p,m] - R[p,m+1])\nY[p,f] += A[p,m] * V[m,f]"
    assert Cascade(text, inputs, ["Y"], ("m",), ("p",)).passes() == 1
    text = text.replace("R[p,m+1])\n", "R[p,-1])\n")
    assert Cascade(text, inputs, ["Y"], ("m",), ("p",)).passes() == 2
