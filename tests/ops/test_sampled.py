"""Engine E: sampling against torch's own grid_sample, in two dimensions and on the explicit volume."""

import pytest
import torch
import torch.nn.functional as F

from attnlib.ops.sampled import SAMPLED_BACKENDS, deformable_attention, deformable_attention_3d

F64 = torch.float64
SHAPES = [(4, 5), (2, 3)]


def problem(axes=2, heads=2, n=3, points=2, dtype=F64, spread=1.4):
    """Locations reach beyond the border on every side."""
    torch.manual_seed(0)
    value = torch.randn(2, heads, 26, 3, dtype=dtype)
    at = torch.rand(2, heads, n, 2, points, axes, dtype=dtype) * spread - (spread - 1) / 2
    weights = torch.randn(2, heads, n, 2, points, dtype=dtype)
    return value, at, weights


def one_by_one(value, shapes, at, weights):
    """The definition, pixel by pixel."""
    b, h, _, d = value.shape
    out = torch.zeros(b, h, at.shape[2], d, dtype=value.dtype)
    for i in torch.cartesian_prod(*(torch.arange(s) for s in at.shape[:-1])).tolist():
        start = sum(a * c for a, c in shapes[: i[3]])
        height, width = shapes[i[3]]
        x, y = (at[tuple(i)] * torch.tensor([width, height]) - 0.5).tolist()
        for row in range(height):
            for column in range(width):
                w = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                out[i[0], i[1], i[2]] += w * weights[tuple(i)] * value[i[0], i[1], start + row * width + column]
    return out


@pytest.mark.parametrize("backend", SAMPLED_BACKENDS)
def test_equals_the_definition(backend):
    value, at, weights = problem()
    y = deformable_attention(value, SHAPES, at, weights, backend=backend)
    torch.testing.assert_close(y, one_by_one(value, SHAPES, at, weights))


@pytest.mark.parametrize("backend", SAMPLED_BACKENDS)
def test_gradients_are_exact(backend):
    inputs = [t.requires_grad_() for t in problem()]
    assert torch.autograd.gradcheck(
        lambda v, a, w: deformable_attention(v, SHAPES, a, w, backend=backend), inputs, eps=1e-7
    )


@pytest.mark.parametrize("backend", SAMPLED_BACKENDS)
def test_grouped_heads_share_values(backend):
    value, at, weights = problem(heads=4)
    few = value[:, :2]
    want = deformable_attention(few.repeat_interleave(2, 1), SHAPES, at, weights, backend=backend)
    torch.testing.assert_close(deformable_attention(few, SHAPES, at, weights, backend=backend), want)


@pytest.mark.parametrize("backend", SAMPLED_BACKENDS)
def test_a_map_that_does_not_exist_is_never_read(backend):
    value, at, weights = problem()
    valid = torch.ones(2, 26, dtype=torch.bool)
    valid[:, 5:12] = False
    y = deformable_attention(value, SHAPES, at, weights, valid=valid, backend=backend)
    value[:, :, 5:12] = float("nan")
    torch.testing.assert_close(deformable_attention(value, SHAPES, at, weights, valid=valid, backend=backend), y)
    empty = deformable_attention(value, SHAPES, at, weights, valid=torch.zeros_like(valid), backend=backend)
    assert (empty == 0).all()


@pytest.mark.parametrize("backend", SAMPLED_BACKENDS)
@pytest.mark.parametrize(("batch", "n"), [(0, 3), (1, 0)])
def test_empty_batch_and_no_queries(backend, batch, n):
    value, depth = torch.zeros(batch, 2, 6, 4, requires_grad=True), torch.zeros(batch, 1, 6, 5)
    weights = torch.zeros(batch, 2, n, 1, 2)
    y = deformable_attention(value, [(2, 3)], torch.zeros(batch, 2, n, 1, 2, 2), weights, backend=backend)
    z = deformable_attention_3d(value, depth, [(2, 3)], torch.zeros(batch, 2, n, 1, 2, 3), weights)
    assert y.shape == z.shape == (batch, 2, n, 4)
    for out in (y, z):
        (grad,) = torch.autograd.grad(out.sum(), value)
        assert grad.shape == value.shape and not grad.any()


@pytest.mark.parametrize("backend", SAMPLED_BACKENDS)
def test_gradients_of_some_inputs_only(backend):
    value, at, weights = problem()
    full = [t.clone().requires_grad_() for t in (value, at, weights)]
    g = torch.randn(2, 2, 3, 3, dtype=F64)
    want = torch.autograd.grad(deformable_attention(full[0], SHAPES, *full[1:], backend="grid_sample"), full, g)
    for i in range(3):
        inputs = [value, at, weights]
        inputs[i] = inputs[i].clone().requires_grad_()
        y = deformable_attention(inputs[0], SHAPES, *inputs[1:], backend=backend)
        torch.testing.assert_close(torch.autograd.grad(y, inputs[i], g)[0], want[i])


@pytest.mark.parametrize("backend", SAMPLED_BACKENDS)
def test_bfloat16_is_sampled_in_float32(backend):
    value, at, weights = (t.bfloat16() for t in problem(dtype=torch.float32))
    y = deformable_attention(value, SHAPES, at, weights, backend=backend)
    want = deformable_attention(value.float(), SHAPES, at.float(), weights.float(), backend="grid_sample")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want.bfloat16())


def test_far_away_and_huge_locations_read_zero():
    value, at, weights = problem()
    for far in (5.0, -7.0, 1e25):
        for backend in SAMPLED_BACKENDS:
            y = deformable_attention(value, SHAPES, torch.full_like(at, far), weights, backend=backend)
            assert (y == 0).all()


# ---- lifted into depth


def volume_oracle(value, depth, shapes, at, weights):
    """Trilinear sampling of the explicit 5-D volume, level by level."""
    b, h, _, d = value.shape
    z, n, p = depth.shape[-1], at.shape[2], at.shape[4]
    depth = depth.repeat_interleave(h // depth.shape[1], 1)
    out, start = 0, 0
    for level, (height, width) in enumerate(shapes):
        part = slice(start, start + height * width)
        lifted = value[:, :, part, :, None] * depth[:, :, part, None, :]
        lifted = lifted.reshape(b * h, height, width, d, z).permute(0, 3, 4, 1, 2)
        where = 2 * at[:, :, :, level].reshape(b * h, 1, n, p, 3) - 1
        sampled = F.grid_sample(lifted, where, align_corners=False)[:, :, 0]
        out = out + (sampled * weights[:, :, :, level].reshape(b * h, 1, n, p)).sum(-1)
        start += height * width
    return out.transpose(1, 2).reshape(b, h, n, d)


@pytest.mark.parametrize("depth_heads", [1, 2])
def test_two_stages_equal_the_explicit_volume(depth_heads):
    value, at, weights = problem(3)
    depth = torch.randn(2, depth_heads, 26, 5, dtype=F64).softmax(-1)
    y = deformable_attention_3d(value, depth, SHAPES, at, weights)
    torch.testing.assert_close(y, volume_oracle(value, depth, SHAPES, at, weights), atol=1e-6, rtol=1e-6)


def test_uniform_depth_is_flat_attention_over_the_bins():
    value, at, weights = problem(3)
    at[..., 2] = 0.1 + 0.8 * torch.rand_like(at[..., 2])  # between the first and the last bin centre of 8
    depth = torch.full((2, 1, 26, 8), 1 / 8, dtype=F64)
    flat = deformable_attention(value, SHAPES, at[..., :2], weights)
    torch.testing.assert_close(deformable_attention_3d(value, depth, SHAPES, at, weights), flat / 8)


def test_one_hot_depth_at_the_bin_centre_is_flat_attention_on_those_pixels():
    value, at, weights = problem(3)
    bins = torch.randint(0, 4, (2, 26))
    depth = F.one_hot(bins, 4).to(F64).unsqueeze(1)
    for z in range(4):
        at[..., 2] = (z + 0.5) / 4
        there = value * (bins == z)[:, None, :, None]
        flat = deformable_attention(there, SHAPES, at[..., :2], weights)
        torch.testing.assert_close(deformable_attention_3d(value, depth, SHAPES, at, weights), flat)


def test_gradients_of_the_lifted_form_are_exact():
    value, at, weights = problem(3)
    depth = torch.randn(2, 1, 26, 4, dtype=F64).softmax(-1)
    inputs = [t.requires_grad_() for t in (value, depth, at, weights)]
    assert torch.autograd.gradcheck(lambda v, d, a, w: deformable_attention_3d(v, d, SHAPES, a, w), inputs, eps=1e-7)
    assert torch.autograd.gradcheck(
        lambda v, d, a, w: deformable_attention_3d(v, d, SHAPES, a, w, return_depth_score=True)[1], inputs, eps=1e-7
    )


def test_depth_scores_weigh_the_corners():
    # point exactly on pixel (0, 0): its upper and left neighbours are beyond the border
    value, depth = (
        torch.ones(1, 1, 4, 1, dtype=F64),
        torch.tensor([[0.2, 0.8], [0.3, 0.7], [0.4, 0.6], [0.5, 0.5]], dtype=F64),
    )
    at = torch.tensor([[0.25, 0.25, 0.25], [0.0, 0.25, 0.75]], dtype=F64).view(1, 1, 2, 1, 1, 3)
    _, score = deformable_attention_3d(
        value, depth.view(1, 1, 4, 2), [(2, 2)], at, torch.ones(1, 1, 2, 1, 1, dtype=F64), return_depth_score=True
    )
    torch.testing.assert_close(score[0, 0, 0, 0, 0], torch.tensor([0.2, 0.3, 0.4, 0.5], dtype=F64))
    torch.testing.assert_close(score[0, 0, 1, 0, 0], torch.tensor([0.0, 0.8, 0.0, 0.6], dtype=F64))


def test_depth_of_pixels_that_do_not_exist_is_never_read():
    value, at, weights = problem(3)
    depth = torch.randn(2, 1, 26, 4, dtype=F64).softmax(-1)
    valid = torch.arange(26).expand(2, 26) % 3 > 0
    y = deformable_attention_3d(value, depth, SHAPES, at, weights, valid=valid)
    value[:, :, ::3], depth[:, :, ::3] = float("nan"), float("nan")
    torch.testing.assert_close(deformable_attention_3d(value, depth, SHAPES, at, weights, valid=valid), y)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(spatial_shapes=[(4, 5), (2, 2)]), "adds up to 24 tokens, but value has 26"),
        (dict(spatial_shapes=[(26, 1)]), "sampling_locations have 2 levels"),
        (dict(spatial_shapes=[(4, 5), (2, 3), (0, 3)]), "must be an integer of at least 1"),
        (dict(sampling_locations=torch.zeros(2, 2, 3, 2, 2, 3, dtype=F64)), "must end in 2 coordinates"),
        (dict(sampling_locations=torch.zeros(2, 3, 3, 2, 2, 2, dtype=F64)), "do not divide the 3"),
        (dict(sampling_locations=torch.zeros(1, 2, 3, 2, 2, 2, dtype=F64)), "value has batch 2"),
        (dict(attention_weights=torch.zeros(2, 2, 3, 2, 3, dtype=F64)), "attention_weights must have shape"),
        (dict(value=torch.zeros(2, 26, 3, dtype=F64)), r"value must have shape \(B, H, M, D\)"),
        (dict(valid=torch.ones(2, 20, dtype=torch.bool)), "valid must have shape"),
        (dict(backend="cuda"), "backend='cuda' is unknown"),
    ],
)
def test_bad_input_is_refused(change, match):
    value, at, weights = problem()
    call = dict(value=value, spatial_shapes=SHAPES, sampling_locations=at, attention_weights=weights)
    with pytest.raises(ValueError, match=match):
        deformable_attention(**{**call, **change})


@pytest.mark.parametrize(
    ("depth", "match"),
    [
        (torch.zeros(2, 1, 25, 4, dtype=F64), "depth must have batch 2 and 26 tokens"),
        (torch.zeros(2, 3, 26, 4, dtype=F64), "depth has 3 heads"),
        (torch.zeros(2, 1, 26, 0, dtype=F64), "no bins"),
        (torch.zeros(2, 26, 4, dtype=F64), r"depth must have shape \(B, Hd, M, Z\)"),
    ],
)
def test_bad_depth_is_refused(depth, match):
    value, at, weights = problem(3)
    with pytest.raises(ValueError, match=match):
        deformable_attention_3d(value, depth, SHAPES, at, weights)
