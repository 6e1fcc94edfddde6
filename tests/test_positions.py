import json

import pytest
import torch

import attnlib
from attnlib import positions as P
from attnlib.grids import coordinates

F64 = torch.float64


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _biases() -> dict[str, P.Bias]:
    g = _g()

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64, generator=g)

    small, large = coordinates((3, 4)), coordinates((5, 2))
    return {
        "dense": P.DenseBias(rand(12, 10)),
        "dense_heads": P.DenseBias(rand(2, 12, 10)),
        "dense_batch": P.DenseBias(rand(3, 1, 12, 10)),
        "dense_all": P.DenseBias(rand(3, 2, 12, 10)),
        "relative": P.RelativeBias(rand(2, 7 * 6), small, large, (2, 3), (7, 6)),
        "relative_shared": P.RelativeBias(rand(1, 3 * 3), small, large, (1, 1), (3, 3)),
        "axis": P.AxisBias([rand(3, 2, 12, 5), rand(3, 2, 12, 2)]),
        "axis_shared": P.AxisBias([rand(1, 2, 12, 5), rand(3, 1, 12, 2)]),
        "alibi": P.alibi(2, torch.arange(12), torch.arange(10), slopes=rand(2).abs()),
    }


BIASES = _biases()


T, C2, P3 = torch.zeros, coordinates((2,)), torch.arange(3)


@pytest.fixture(params=list(BIASES))
def bias(request: pytest.FixtureRequest) -> P.Bias:
    return BIASES[request.param]


ROWS, COLS, PICKED = slice(3, 9), slice(2, 7), torch.tensor([8, 1, 5, 2])


def _with_grad(bias: P.Bias) -> tuple[P.Bias, list[torch.Tensor]]:
    tensors = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in bias.tensors()]
    return type(bias).rebuild(tensors, bias.settings()), tensors


def test_block_is_a_part_of_dense(bias):
    assert bias.shape() == (12, 10)
    dense = bias.dense()
    assert torch.equal(bias.block(ROWS, COLS), dense[:, :, ROWS, COLS])
    assert torch.equal(bias.block(ROWS, PICKED), dense[:, :, ROWS][..., PICKED])


def test_part_is_some_samples_and_heads(bias):
    full = bias.dense().expand(3, 2, 12, 10)
    part = bias.part(slice(1, 3), slice(1, 2)).dense().expand(2, 1, 12, 10)
    assert torch.equal(part, full[1:3, 1:2])


@pytest.mark.parametrize("cols", [COLS, PICKED], ids=["slice", "index"])
def test_add_grad_is_the_derivative_of_block(bias, cols):
    traced, tensors = _with_grad(bias)
    grad = torch.randn(3, 2, 6, len(range(12)[cols]) if isinstance(cols, slice) else 4, dtype=F64, generator=_g(1))
    block = traced.block(ROWS, cols).expand(grad.shape)
    wanted = [t for t in tensors if t.requires_grad]
    expected = torch.autograd.grad(block, wanted, grad)
    into = [torch.zeros_like(t) if t.requires_grad else None for t in tensors]
    bias.add_grad(into, ROWS, cols, grad)
    for ours, theirs in zip([t for t in into if t is not None], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_add_grad_leaves_unwanted_tensors_alone(bias):
    bias.add_grad([None] * len(bias.tensors()), ROWS, COLS, torch.ones(3, 2, 6, 5, dtype=F64))


def test_lower_and_raise_round_trip(bias):
    spec, tensors = bias.lower()
    back = P.raise_bias(spec, tensors)
    assert json.loads(spec)[0] == bias.name
    assert torch.equal(back.dense(), bias.dense())


def test_is_a_pytree(bias):
    leaves, tree = torch.utils._pytree.tree_flatten(bias)
    assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, tree).dense(), bias.dense())


def test_relative_bias_counts_displacements():
    table = torch.arange(15.0).reshape(1, 15)
    bias = P.RelativeBias(table, coordinates((2, 3)), coordinates((2, 3)), (1, 2), (3, 5))
    q, k = coordinates((2, 3))[:, None], coordinates((2, 3))[None]
    step = k - q + torch.tensor([1, 2])
    assert torch.equal(bias.dense()[0, 0], (step[..., 0] * 5 + step[..., 1]).float())


def test_window_bias_is_swins_index():
    table = torch.arange(9.0).reshape(1, 9)
    dense = P.window_bias(table, (2, 2)).dense()[0, 0]
    assert dense[0].tolist() == [4, 5, 7, 8] and dense[3].tolist() == [0, 1, 3, 4]


def test_axis_bias_adds_one_factor_per_axis():
    rows, cols = torch.randn(1, 1, 4, 3, generator=_g()), torch.randn(1, 1, 4, 2, generator=_g(1))
    expected = (rows[..., :, None] + cols[..., None, :]).flatten(-2)
    assert torch.equal(P.AxisBias([rows, cols]).dense(), expected)


def test_alibi_is_minus_slope_times_distance():
    bias = P.alibi(4, torch.tensor([5, 2]), torch.tensor([0, 7, 3])).dense()
    distance = torch.tensor([[5.0, 2, 2], [2, 5, 1]])
    torch.testing.assert_close(bias[0], -P.alibi_slopes(4)[:, None, None] * distance)
    assert P.alibi_slopes(8).tolist() == [2.0 ** -(i + 1) for i in range(8)]
    assert len(P.alibi_slopes(6)) == 6


def test_rotary_makes_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=F64, generator=_g())
    for interleaved in (False, True):
        scores = []
        for shift in (0, 11):
            at = [P.rotary_angles(torch.tensor([p + shift]), 16).to(F64) for p in (3, 8)]
            scores.append((P.rotate(q, at[0], interleaved) * P.rotate(k, at[1], interleaved)).sum())
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-6)


def test_rotary_keeps_norms_and_turns_pairs_by_the_angle():
    x = torch.randn(2, 3, 5, 8, dtype=F64, generator=_g())
    angles = P.rotary_angles(torch.arange(5), 8)
    torch.testing.assert_close(P.rotate(x, angles).norm(dim=-1), x.norm(dim=-1))
    unit = torch.tensor([1.0, 0.0], dtype=F64).reshape(1, 1, 1, 2)
    turned = P.rotate(unit, torch.tensor([[0.5]], dtype=F64))
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.5, 0.5], dtype=F64).cos() * torch.tensor([1, 0])
                               + torch.tensor([0.5, 0.5], dtype=F64).sin() * torch.tensor([0, 1]))  # fmt: skip
    grid = P.rotary_angles(coordinates((2, 3)), 8, grid=(2, 3))
    assert grid.shape == (6, 4)
    assert torch.equal(grid[:, :2], P.rotary_angles(coordinates((2, 3))[:, 0], 4))


def test_sincos():
    out = P.sincos(coordinates((2, 3)), 8)
    assert out.shape == (6, 8)
    torch.testing.assert_close(out[:, 0], coordinates((2, 3))[:, 0].float().sin())
    torch.testing.assert_close(out[:, 6], coordinates((2, 3))[:, 1].float().cos())


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: P.DenseBias(torch.zeros(3)), "bias must be a float tensor"),
        (lambda: P.DenseBias(torch.zeros(3, 3, dtype=torch.long)), "bias must be a float tensor"),
        (lambda: P.RelativeBias(torch.zeros(2, 8), coordinates((2,)), coordinates((2,)), (1,), (3,)), "table must be"),
        (lambda: P.AxisBias([]), "factors must be"),
        (lambda: P.AxisBias([torch.zeros(1, 1, 2, 3)], torch.zeros(3, 2, dtype=torch.long)), "k_coords has 2 axes"),
        (lambda: P.rotary_angles(torch.arange(3), 6, grid=(1, 1)), "head_dim=6"),
        (lambda: P.sincos(coordinates((2, 2)), 6), "dim=6"),
        (lambda: P.sincos(coordinates((2, 2)), 8, base=0.0), "base.*0.0"),
        (lambda: P.sincos(torch.arange(3), 8), "coords"),
        (lambda: P.as_bias([1.0]), r"bias.*\[1.0\]"),
        (lambda: P.RelativeBias(T(2, 3), C2.float(), C2, (1,), (3,)), "q_coords.*float32"),
        (lambda: P.RelativeBias(T(2, 3), C2, coordinates((2, 2)), (1,), (3,)), "k_coords"),
        (lambda: P.RelativeBias(T(2, 3), C2, C2, (1, 1), (3,)), "offset"),
        (lambda: P.RelativeBias(T(2, 3), C2, C2, (0.5,), (3,)), "offset.*0.5"),
        (lambda: P.RelativeBias(T(2, 3).long(), C2, C2, (1,), (3,)), "table.*int64"),
        (lambda: P.RelativeBias(T(2, 3), C2.to("meta"), C2, (1,), (3,)), "q_coords on meta"),
        (lambda: P.AxisBias(T(1, 1, 2, 3)), "factors"),
        (lambda: P.AxisBias([T(1, 1, 2, 3), T(1, 1, 3, 3)]), "share B, H and N"),
        (lambda: P.AxisBias([T(2, 1, 2, 3), T(3, 1, 2, 3)]), "share B, H and N"),
        (lambda: P.AxisBias([T(1, 1, 2, 3)], C2 + 2), "k_coords holds 3 on axis 0; possible: 0 to 2"),
        (lambda: P.AxisBias([T(1, 1, 2, 0)], C2), r"k_coords holds 1 on axis 0; possible: none, factors\[0\]"),
        (lambda: P.AxisBias([T(1, 1, 2, 3).long()]), "factors.*int64"),
        (lambda: P.window_bias(T(2, 9), (2, 0)), "window.*0"),
        (lambda: P.alibi_slopes(0), "num_heads.*0"),
        (lambda: P.alibi_slopes(2.0), "num_heads.*2.0"),
        (lambda: P.alibi(2, P3.float(), P3), "q_pos.*float32"),
        (lambda: P.alibi(2, P3, P3.expand(2, 3)), "k_pos"),
        (lambda: P.alibi(2, P3, P3, slopes=torch.ones(3)), "slopes.*H=2"),
        (lambda: P.alibi(2, P3, P3, span=(1, -1)), "span"),
        (lambda: P.relative_offsets(T(1, 3), (0,), (-1,)), "sizes.*-1"),
        (lambda: P.toeplitz_matmul(T(3).long(), T(2, 1)), "c must.*int64"),
        (lambda: P.toeplitz_matmul(T(3), T(2)), "x"),
        (lambda: P.toeplitz_matmul(T(3), T(2, 1), ()), "queries"),
        (lambda: P.rotary_angles(P3, 0), "head_dim.*0"),
        (lambda: P.rotary_angles(P3, 7), "head_dim=7"),
        (lambda: P.rotary_angles(P3, 8, base=-1.0), "base.*-1.0"),
        (lambda: P.rotary_angles(P3, 8, base=float("inf")), "base.*inf"),
        (lambda: P.rotary_angles(P3, 8, grid=(2, 2)), r"pos.*\(3,\)"),
        (lambda: P.rotary_angles([0, 1], 8), r"pos.*\[0, 1\]"),
        (lambda: P.rotate(T(1, 2, 3, 8), T(3, 3)), "angles"),
        (lambda: P.rotate(T(1, 2, 3, 8), T(4, 4)), "angles"),
        (lambda: P.rotate(T(1, 2, 3, 8), T(2, 3, 4)), "angles"),
        (lambda: P.rotate(T(1, 2, 3, 7), T(3, 3)), "even"),
        (lambda: P.rotate(T(2, 3, 8), T(3, 4)), "x must have shape"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


SCALED = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALED, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("length", [5, 20])
def test_scaled_rotary_frequencies_are_those_of_transformers(scaling, length):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=8,
        rope_parameters={"rope_theta": 1000.0, **scaling},
    )  # fmt: skip
    pos = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 2, length, 16), pos)
    angles = P.rotary_angles(pos, 16, 1000.0, scaling=scaling, length=torch.tensor([length]))
    torch.testing.assert_close(torch.cat([angles.cos()] * 2, -1), cos, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([angles.sin()] * 2, -1), sin, atol=1e-6, rtol=1e-5)


def test_scaled_rotary_positions_in_a_mechanism():
    x = torch.randn(2, 12, 16)
    for scaling in SCALED:
        m = attnlib.create("softmax-attention", dim=16, num_heads=2, causal=True, rotary=100.0, rotary_scaling=scaling)
        plain = attnlib.create("softmax-attention", dim=16, num_heads=2, causal=True, rotary=100.0)
        plain.load_state_dict(m.state_dict())
        assert not torch.allclose(m(x), plain(x), atol=1e-4)
        dynamic = scaling["rope_type"] == "dynamic"
        assert m.traits.streaming is not dynamic and m.reads_length is dynamic
        if dynamic:  # as short as in training: nothing changes; absent tokens are no length
            torch.testing.assert_close(m(x[:, :8]), plain(x[:, :8]), atol=1e-6, rtol=1e-5)
            valid = torch.arange(12) < torch.tensor([[12], [10]])
            torch.testing.assert_close(m(x, valid=valid)[1:, :10], m(x[1:, :10]), atol=1e-6, rtol=1e-5)
            continue
        first = m(x[:, :7], returns=("state",))
        torch.testing.assert_close(m.step(x[:, 7:], first.state)[0], m(x)[:, 7:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type="),
        ({"factor": 2.0}, "rope_type="),
        ({"rope_type": "linear"}, "must hold rope_type, factor"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "must hold"),
        ({**SCALED[2], "low_freq_factor": 4.0}, "low_freq_factor=4.0 must be below"),
    ],
)
def test_scalings_that_are_none(scaling, words):
    with pytest.raises(ValueError, match=words):
        attnlib.create("softmax-attention", dim=16, num_heads=2, rotary=100.0, rotary_scaling=scaling)
    with pytest.raises(ValueError, match="needs a rotary base"):
        attnlib.create("softmax-attention", dim=16, num_heads=2, rotary_scaling={"rope_type": "linear", "factor": 2.0})


def test_axis_factors_of_a_whole_grid_are_laid_out_like_looked_up_ones():
    g = torch.Generator().manual_seed(0)
    factors = [torch.randn(*shape, generator=g) for shape in ((2, 1, 5, 3), (1, 4, 5, 2), (2, 4, 5, 4))]
    grids = coordinates([3, 2, 4])
    whole, given = P.AxisBias(factors).dense(), P.AxisBias(factors, grids).dense()
    assert whole.shape == (2, 4, 5, 24) and torch.equal(whole, given)
    assert torch.equal(P.AxisBias(factors).block(slice(1, 3), slice(None)), given[:, :, 1:3])
    assert torch.equal(P.AxisBias(factors).block(slice(1, 3), slice(2, 9)), given[:, :, 1:3, 2:9])
